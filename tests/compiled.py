"""Compiles the kernels of support/scan.py as for a GPU, without one, and prints what became of them, as JSON:

    python tests/compiled.py            some seconds, and fewer the second time, since Triton keeps what it compiled
"""
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from support import scan  # noqa: E402


def built(kernel, capability, low, choice):
    """-> the kernel for u, B and C of this type, a multiple of 16 channels, and aligned arrays, as PyTorch's are."""
    sizes, names = dict(N=16, T=scan.CHUNK["cuda"][0], BLOCK=choice[0]), kernel.arg_names
    types = {name: "constexpr" if name in sizes else "i32" if name in ("L", "channels", "chunks") else
             f"*{low}" if name in ("u", "B", "C") else "*fp32" for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types[n][0] == "*" or n == "channels"}
    source = ASTSource(kernel, types, {(names.index(k),): v for k, v in sizes.items()}, aligned)
    registers = dict(maxnreg=choice[1]) if "dy" in names else {}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={**scan.OPTIONS, **registers}).asm


def registers(cubin):
    """-> the registers of a thread, and the bytes it spills into memory."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        said = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return [int(re.search(rf"{word}:(\d+)", said)[1]) for word in ("REG", "STACK")]


def narrow(ttir, names):
    """-> the lines of Triton's intermediate code that would overflow at 2^31: offsets of 32 bits into any array but A
    and D, and products of 32 bits with more in them than `channels` and constants."""
    given = re.findall(r"(%\w+): ", re.search(r"tt\.func.*", ttir)[0])
    argument = dict(zip(given, names))
    argument.update({out: argument[x] for out, x in re.findall(r"(%\w+) = tt\.splat (%\w+)", ttir) if x in argument})
    fixed = {*re.findall(r"(%\S+) = arith\.constant", ttir), *(x for x in given if argument[x] == "channels")}
    return [line for line in ttir.splitlines()
            if (m := re.search(r"tt\.addptr (%\w+), \S+ : \S+, (?:tensor<\d+x)?i32", line))
            and argument.get(m[1], "A") not in "AD"
            or (m := re.search(r"arith\.muli (%\S+), (%\S+) : i32", line)) and not fixed & {m[1], m[2]}]


if __name__ == "__main__":
    for kernel, capability, low in ((scan._fused, 80, "bf16"), (scan._fused, 90, "fp32"),
                                    (scan._fused_backward, 80, "fp32"), (scan._fused_backward, 90, "bf16")):
        asm = built(kernel, capability, low, scan.CHOICES[0])
        print(json.dumps(dict(kernel=kernel.fn.__name__, capability=capability, inputs=low,
                              registers=registers(asm["cubin"]), narrow=narrow(asm["ttir"], kernel.arg_names),
                              barriers=len(re.findall(r"\bbar(?:rier)?\.(?:warp\.)?sync", asm["ptx"])),
                              reordered=re.findall(r"ld\.global\.nc|cp\.async", asm["ptx"]))))
