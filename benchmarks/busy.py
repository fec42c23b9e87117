"""How fast does train.py train beside other busy programs, and where it may use only one core?

    python benchmarks/busy.py                       the four papers, more than ten minutes
    python benchmarks/busy.py --models dis --loops 2 --seconds 20

Each run of train.py is timed alone, and then beside --loops programs that compute without end. `threads` is the same
run in one process with a thread for each core; `awake`, with GOMP_SPINCOUNT=300000: its threads wait for one another as
torch's own do. Then a run has one core, by its affinity (Linux), and one by the quota of a cgroup (if we may make one):
how many times as long does a step take as with OMP_NUM_THREADS=1 in the same place?
"""
import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from timing import ROOT, table

from support import threads


def training(stack, model, folder, place, settings):
    """Start train.py -> the path of its log.csv. It ends with `stack`. place: a function that the new process calls."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_", "GOMP_", "KMP_"))} | settings
    child = stack.enter_context(subprocess.Popen(
        [sys.executable, "train.py", "--model", model, "--results-dir", folder, "--name", "run", "--log-every", "1",
         "--global-batch-size", "32", "--sample-every", "0", "--ckpt-every", "100000"],
        cwd=ROOT, env=env, preexec_fn=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    stack.callback(child.kill)
    return Path(folder, "run", "log.csv")


def steps(log):
    return log.read_bytes().count(b"\n") - 1 if log.exists() else 0


def rate(log, seconds):
    """Steps a second, from one step's end to another's."""
    def next_step(limit):
        before, end = steps(log), time.monotonic() + limit
        while steps(log) == before and time.monotonic() < end:
            time.sleep(0.005)
        return steps(log), time.monotonic()
    first, begin = next_step(60)
    time.sleep(seconds)
    last, end = next_step(60)                               # the cliff: a minute is enough to see it
    return (last - first) / (end - begin)


def timed(model, args, loops=0, place=None, **settings):
    """Train -> steps a second alone, and beside so many loops, if any."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        log, end = training(stack, model, folder, place, settings), time.monotonic() + 120
        while steps(log) < 3:                               # the first steps are slower
            if time.monotonic() > end:
                sys.exit(f"no three steps of {model} in two minutes")
            time.sleep(0.05)
        found = [rate(log, args.seconds)]
        for _ in range(loops):
            loop = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(loop.kill)
        return found + [rate(log, args.seconds)] * bool(loops)


def one_core_quota(stack):
    """Make a cgroup with a quota of one core -> what a process calls to go there; None if we may not."""
    for folder in threads.cpu_groups():
        group = folder / f"busy-{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
            stack.callback(group.rmdir)
            if (group / "cpu.max").exists():
                (group / "cpu.max").write_text("100000 100000")
            else:
                (group / "cpu.cfs_quota_us").write_text("100000")
            return lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    return None


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--models", nargs="+", default=["dis", "diffussm", "mdm", "cunet"])
    p.add_argument("--loops", type=int, default=4)
    p.add_argument("--seconds", type=float, default=8)
    args = p.parse_args()
    print(f"{threads.cores()} cores, quota {threads.quota():g}; {args.loops} busy loops\n")
    rows = []
    columns = ["", "images/s alone", "threads", "beside: times as long", "threads", "awake", "one core: affinity",
               "quota"]
    cores = str(threads.cores())
    with ExitStack() as stack:
        quota = one_core_quota(stack)
        first = {min(os.sched_getaffinity(0))} if hasattr(os, "sched_getaffinity") else None
        affinity = first and (lambda: os.sched_setaffinity(0, first))
        for model in args.models:
            ours, busy = timed(model, args, args.loops)
            alone, beside = timed(model, args, args.loops, OMP_NUM_THREADS=cores)
            _, cliff = timed(model, args, args.loops, OMP_NUM_THREADS=cores, GOMP_SPINCOUNT="300000")
            one = [timed(model, args, place=place, OMP_NUM_THREADS="1")[0] / timed(model, args, place=place)[0]
                   if place else None for place in (affinity, quota)]
            rows.append([model, 32 * ours, 32 * alone, ours / busy, alone / beside,
                         alone / cliff if cliff else math.inf, *one])
            table(columns, rows)                            # again after each model: you may stop it


if __name__ == "__main__":
    main()
