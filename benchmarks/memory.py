"""Is the memory that support/cost.py estimates right? Compares it with the peak of a real forward and backward pass.

    python benchmarks/memory.py             takes minutes; on a GPU if there is one, in float32 and bf16

On a CPU (Linux, float32) the peak is that of the process's memory, on a GPU that of PyTorch's allocator. Each line of
the table is measured in a new process. A first pass makes the gradients and warms up; it is not measured.
"""
import argparse
import os
import subprocess
import sys

from timing import peak_megabytes
import torch

from support import cost
from support.checkpoint import load_paper
from support.parallel import recompute

# paper, preset, shape, number of images, other arguments of build
CASES = [("dis", "DiS-S/2", (4, 32, 32), 2, {"num_classes": 10}),
         ("diffussm", "DiffuSSM-S", (4, 32, 32), 4, {"num_classes": 10}),
         ("mdm", "tiny", (3, 32, 32), 32, {"text": "bytes"}),
         ("cunet", "cunet", (3, 64, 64), 4, {}),
         ("cunet", "unet", (3, 64, 64), 4, {})]


def line(case, bf16, checkpointing, device):
    """Measure one of CASES -> its line of the table."""
    paper, preset, shape, size, options = case
    build = load_paper(paper).build
    with torch.device("meta"):
        model, diffusion = build(preset, shape, **options)
    batch = cost.blank_batch(diffusion, shape, size, **options)
    guess = cost.activations(model, diffusion, batch, bf16, checkpointing, device)
    model, diffusion = build(preset, shape, **options)
    if checkpointing:
        recompute(model)
    batch = {k: torch.ones(v.shape, dtype=v.dtype, device=device) for k, v in batch.items()}
    model.to(device).train()

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = diffusion.loss(model, **batch)["loss"].mean()
        loss.backward()
    step()                                                  # makes the gradients
    peak = 1e6 * peak_megabytes(step, torch.device(device))
    return {"preset": preset, "shape": "x".join(map(str, shape)), "images": size,
            "precision": "bf16" if bf16 else "fp32", "checkpoints": "yes" if checkpointing else "no",
            "estimate": guess / 2**20, "measured": peak / 2**20, "ratio": guess / peak}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--line", type=int, nargs=3, help=argparse.SUPPRESS)
    args = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.line:
        row = line(CASES[args.line[0]], *map(bool, args.line[1:]), device)
        return print(" ".join(f"{v:9.3f}" if isinstance(v, float) else f"{v:>{width}}"
                              for v, width in zip(row.values(), (12, 9, 6, 9, 11, 0, 0, 0))))
    print("      preset     shape images precision checkpoints  estimate  measured     ratio (MiB)", flush=True)
    # these make glibc give freed memory back at once, so the process holds only what is in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for case in range(len(CASES)):
        for bf16 in "01" if device == "cuda" else "0":
            for checkpointing in "01":
                subprocess.run([sys.executable, __file__, "--line", str(case), bf16, checkpointing],
                               env=environment, check=True)


if __name__ == "__main__":
    main()
