#!/usr/bin/env bash
# All that needs a GPU, in one call of under 9 minutes: the fused scan against its definition, times beside
# the bound and beside others, S4D, throughput with and without kernel and compile, memory. Into gpu.log, too.
set -u
cd "$(dirname "$0")/.."
part() {                                        # seconds at most, command; a part that fails stops no other
    echo; echo "+ ${*:2}"; timeout "$1" "${@:2}" || echo "(ended with $?)"
}
{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
    part 60 python -m pytest -q tests/test_fused.py
    part 100 python benchmarks/scan.py --sizes 32x256x768 16x1024x1536 1x16384x768
    part 40 python benchmarks/s4d.py --sizes 2304x1024
    part 60 python benchmarks/step.py --models dis diffussm
    part 80 python benchmarks/step.py --throughput dis:DiS-S/2
    part 80 python benchmarks/step.py --throughput diffussm:DiffuSSM-S
    part 60 python benchmarks/memory.py
    part 55 python benchmarks/step.py --throughput dis:DiS-B/2
} 2>&1 | tee gpu.log
