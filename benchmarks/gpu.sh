#!/usr/bin/env bash
# All that needs a GPU, in one call of under 8 minutes: is everything right there, and how fast is it? gpu.py has the
# parts and their time limits. Into DIR go gpu.json, a table gpu.md, a picture, and gpu.log with all that was said.
#   bash benchmarks/gpu.sh [--out DIR] [--data-dir DIR-WITH-CIFAR-10]       DIR is ./gpu if you name none
#   bash benchmarks/gpu.sh right scan                                       some parts again, into the same table
#   bash benchmarks/gpu.sh --rehearse                                       the same on a CPU (Linux), tiny, into ./gpu-rehearsal
exec "$(command -v python || command -v python3)" "$(dirname "${BASH_SOURCE[0]}")/gpu.py" "$@"
