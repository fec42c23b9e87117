"""Trains one run with 1, 2 and 4 processes, with and without accumulation and shards. Are the losses equal?
Can a run that was begun in one of these ways continue in every other?

    python benchmarks/processes.py                          gloo on CPUs, minutes
    python benchmarks/processes.py --device cuda            NCCL, with as many GPUs as processes

It prints the largest difference from the losses of one process, over 20 steps. Then, for all pairs of ways, the
second takes 4 steps from a checkpoint of the first. On CPUs the exit code is 1 if a difference is above 1e-5.
"""
import argparse
import csv
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WAYS = {"1": (1,), "1, accumulated": (1, "--grad-accum", "4"), "2": (2,),
        "2, accumulated": (2, "--grad-accum", "2"), "2, shards": (2, "--shard"), "4": (4,),
        "4, shards": (4, "--shard"), "4, shards, accumulated": (4, "--shard", "--grad-accum", "2")}
MODELS = {      # small, with every kind of module
    "dis": ["--set", "width=32", "depth=2", "state=4"],
    "diffussm": ["--set", "width=16", "depth=2"],
    "mdm": ["--set", "side=8", "channels=(8,8)", "text_width=8", "embedding=8", "heads=2"],
    "cunet": ["--set", "nf=4"]}


def train(way, flags, folder, steps):
    processes, *more = way
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone",
                                        f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [sys.executable, *launch, "train.py", *flags, *more, "--results-dir", folder.parent,
         "--name", folder.name, "--image-size", "16", "--global-batch-size", "8", "--warmup-steps", "4",
         "--lr-schedule", "constant",
         "--log-every", "1", "--ckpt-every", "16", "--sample-every", "0", "--max-steps", str(steps)],
        cwd=ROOT, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **os.environ})
    if done.returncode:
        sys.exit(f"{way} failed:\n{done.stderr[-3000:]}")
    with open(folder / "log.csv", newline="") as f:
        return [float(row["loss"]) for row in csv.DictReader(f)]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    p.add_argument("--device", default="cpu")
    p.add_argument("--pairs", nargs="*", default=["dis"], help="models for which all pairs are tried")
    args = p.parse_args()
    worst = 0
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models:
            flags = ["--model", model, "--device", args.device, *MODELS[model]]
            straight = {}
            for name, way in WAYS.items():
                straight[name] = train(way, flags, Path(scratch, model + name.replace(", ", "-")), 20)
                off = max(abs(a - b) for a, b in zip(straight[name], straight["1"]))
                print(f"{model:10}{name:24}{len(straight[name])} steps, last loss {straight[name][-1]:.6f}, "
                      f"largest difference {off:.1e}", flush=True)
                worst = max(worst, off)
            if model not in args.pairs:
                continue
            off = 0
            for first, second in itertools.product(WAYS, WAYS):
                folder = Path(scratch, "pair")
                shutil.copytree(Path(scratch, model + first.replace(", ", "-")), folder)
                shutil.copy(folder / "checkpoints" / "0000016.pt", folder / "latest.pt")
                losses = train(WAYS[second], flags, folder, 20)
                off = max(off, *(abs(a - b) for a, b in zip(losses, straight["1"], strict=True)))
                shutil.rmtree(folder)
            print(f"{model:10}{len(WAYS)**2} pairs, the second from step 16 of the first: largest difference "
                  f"{off:.1e}", flush=True)
            worst = max(worst, off)
    print(f"largest difference in all {worst:.1e}")
    raise SystemExit(worst > 1e-5 and args.device == "cpu")


if __name__ == "__main__":
    main()
