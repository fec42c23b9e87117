"""Does training survive SIGKILL at any moment? Kill it, start it again, and compare it with a run that was left alone.

    python benchmarks/kill.py                   100 kills, shared among the models; one model runs on each core
    python benchmarks/kill.py --processes 2     with torchrun: one of the processes is killed, or all

Half of the kills come during a save or just after it, the others at any moment around the first steps. POSIX only.
"""
import argparse
import contextlib
import os
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from tempfile import TemporaryDirectory

import torch

MODELS = {      # options that make a step take 20 to 80 ms on one core; steps between checkpoints
    "dis": ("width=32 depth=2 state=4", 1), "diffussm": ("width=16 depth=2", 2),
    "mdm": ("side=8 channels=[16,32] embedding=32 heads=2 text_width=16 layers=1", 1),
    "cunet": ("nf=4 solver=euler", 2)}
FINAL = re.compile(r"args\.json|log\.csv|(latest|checkpoints/\d+)\.pt")     # other files are temporary
LINE = "{:9s}{:4d} kills, {:3d} during a save, {:4d} starts, {:5d} steps, {:5.0f} s: equal bit for bit"
stopped = []                                    # not empty after Ctrl-C, or when a model has failed


def files(folder):
    return {f"{path}/{name}"[len(folder) + 1:] for path, _, found in os.walk(folder) for name in found}


def start(command, folder, processes, rng=None, after=1 << 62, delay=0.0):
    """Start a run and kill it `delay` seconds after its `after`-th new temporary file (0: after its start). -> whether
    it reached its end, whether it left a temporary file, the seconds at the start (0) and each new temporary file."""
    begun, seen, moments, said, heard, sign = time.time(), files(folder), [0.0], b"", None, 0
    command = [*command, "--results-dir", os.path.dirname(folder), "--name", os.path.basename(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
    os.set_blocking(process.stdout.fileno(), False)
    ranks = [process.pid] * (processes == 1)
    while (part := process.stdout.read(1 << 16)) != b"":        # None: no news; b"": every process has ended
        now, found = time.time() - begun, files(folder)
        said, sign = said + (part or b""), now if part or found != seen else sign
        moments += [now for f in found - seen if not FINAL.fullmatch(f)]
        seen, hopeless = found, stopped or now > sign + 120
        if len(ranks) < processes and not hopeless:             # until torchrun has started them all
            ranks = [int(pid) for pid in subprocess.getoutput(f"pgrep -P {process.pid}").split()]
        elif hopeless or heard is None and len(moments) > after and now > moments[after] + delay:
            heard = said                                        # what comes later is torchrun's complaint
            for pid in [process.pid, *ranks] if hopeless or rng.random() < 0.5 else [rng.choice(ranks)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            assert not hopeless, f"{folder}: no sign of life for two minutes"
        time.sleep(0.0002)
    code, text = process.wait(), (said if heard is None else heard).decode(errors="replace")
    complained = heard is None and code or re.search("error:|Traceback", text)
    assert not complained, f"{folder}: exit code {code}, having written\n{text[-2000:]}"
    left = [f for f in files(folder) if not FINAL.fullmatch(f) and os.stat(f"{folder}/{f}").st_mtime > begun]
    return code == 0, bool(left), moments


def compare(a, b):
    for part in ("step", "model", "ema", "opt"):
        x, y = (torch.load(f"{f}/latest.pt", weights_only=True)[part] for f in (a, b))
        torch.testing.assert_close(y, x, rtol=0, atol=0, msg=lambda m: f"{b}/latest.pt, {part}: {m}")
    x, y = ([line.split(",")[:8] for line in open(f"{f}/log.csv")] for f in (a, b))    # steps, losses
    assert x == y, f"{b}/log.csv: steps or losses are not those of {a}/log.csv"
    odd = files(a) ^ files(b) | {f for f in files(b) if not FINAL.fullmatch(f)}
    assert not odd, f"{b}: left behind, or missing: {', '.join(sorted(odd))}"


def torture(model, args, out):
    rng, n, (options, every) = random.Random(f"{args.seed} {model}"), args.processes, MODELS[model]
    begun, kills = time.time(), -(-args.kills // len(args.models))
    steps = 20 + 4 * every * kills              # most lives are shorter than four checkpoints
    launcher = f"-m torch.distributed.run --standalone --nproc_per_node={n}".split() * (n > 1)
    command = [sys.executable, *launcher, os.path.abspath(f"{__file__}/../../train.py"),
               *f"--model {model} --data shapes --image-size 16 --global-batch-size 4 --device cpu".split(),
               *f"--max-steps {steps} --ckpt-every {every} --log-every 3 --sample-every 0".split(),
               "--set", *options.split()]
    *_, moments = start(command, f"{out}/whole", n)
    ready, pace = moments[1], (moments[-1] - moments[1]) * every / steps     # seconds; `pace`: per checkpoint
    left, torn, lives, rounds = kills, 0, 0, 0
    while left or not rounds:                   # a run that ends before all kills is followed by another
        folder, step, ended, rounds = f"{out}/killed-{rounds}", 0, False, rounds + 1
        while not ended:
            last, delay = step, pace * (rng.random() ** 2 if left % 2 else rng.uniform(-2, 10))
            aim = (rng.randint(1, 5) if left % 2 else 1, delay) if delay > 0 else (0, ready + delay)
            ended, leftover, moments = start(command, folder, n, rng, *aim * (left > 0))
            torn, lives, left, ready = torn + leftover, lives + 1, left - (not ended), [*moments, ready][1]
            with contextlib.suppress(Exception):        # there may be none yet; train.py tells if it is damaged
                step = torch.load(f"{folder}/latest.pt", weights_only=True)["step"]
            assert step >= last, f"{folder}: start {lives} went back from step {last} to {step}"
        compare(f"{out}/whole", folder)
    print(LINE.format(model, kills, torn, lives, steps * rounds, time.time() - begun), flush=True)
    return kills, torn, lives, steps * rounds


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("kills", 100), ("seed", 0), ("processes", 1)):
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    p.add_argument("--out", help="a new folder for the runs, kept (default: a temporary one)")
    args, begun = p.parse_args(), time.time()
    os.environ["OMP_NUM_THREADS"] = "1"
    with TemporaryDirectory() as out, ThreadPoolExecutor(os.cpu_count() // args.processes or 1) as pool:
        jobs = [pool.submit(torture, m, args, os.path.abspath(f"{args.out or out}/{m}")) for m in args.models]
        try:
            rows = [job.result() for job in as_completed(jobs)]
        except (KeyboardInterrupt, AssertionError) as e:
            sys.exit(str(e) or 130)             # the code that shells use for Ctrl-C
        finally:
            stopped.append(True)
    print(LINE.format("all", *map(sum, zip(*rows)), time.time() - begun))


if __name__ == "__main__":
    main()
