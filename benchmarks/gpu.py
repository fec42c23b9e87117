"""The parts of benchmarks/gpu.sh. Each part is a process of its own with its own time limit, and each of its cases may
fail: that is noted, and the next one begins. After each part all results so far are in gpu.json and gpu.md.

A case returns a row, or several. A row that has `of`, `under` and `cell` is one cell of the part's table: its line,
its column and its text. The rest of it is in gpu.json only. Other rows are printed as they are. ok = False says that a
number is not what it must be, or that there was an error. The exit code is 1 if there is such a row.
"""
import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import metadata, util
from pathlib import Path
from unittest import mock

BEGUN = time.monotonic()                                        # before torch is imported, which may take long
from timing import ROOT, markdown, text, within  # noqa: E402
import torch  # noqa: E402
import memory  # noqa: E402
import processes  # noqa: E402
import s4d  # noqa: E402
import scan as scans  # noqa: E402
import step as steps  # noqa: E402
from support import checkpoint, scan  # noqa: E402

PARTS = {}
LATENTS = (4, 32, 32), 32, 1000
S2, SSM = ("dis", "DiS-S/2", *LATENTS), ("diffussm", "DiffuSSM-S", *LATENTS)


def part(seconds, title):
    """Registers a generator of cases. What earlier parts leave of their seconds is for it, too."""
    def register(function):
        PARTS[function.__name__.strip("_")] = seconds, title, function
        return function
    return register


def cell(of, under, *numbers, most=None, **rest):
    """most: limits of the numbers, which are errors. A number may be None: it was not measured."""
    of = of if isinstance(of, str) else "x".join(map(str, of))
    shown = " / ".join(f"{n:.0e}" if most and n and n < 0.1 else text(n) for n in numbers)
    ok = all(n is None or n <= limit for n, limit in zip(numbers, most or ()))
    return {"of": of, "under": under, "cell": shown, "numbers": numbers, "ok": ok, **rest}


def timed(of, under, row):
    return cell(of, under, row["forward ms"], row["with backward ms"], **row)


# --- what is measured. The first limit has room for importing torch from a cold disk ------------------------------

@part(40, "Machine")
def machine(args):
    gpu = torch.cuda.get_device_properties(0) if args.cuda else None
    here = {str(package.name).replace("-", "_"): package.version for package in metadata.distributions()}
    yield lambda: {"GPU": f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" if gpu else "none: this is a rehearsal",
                   "GPUs": torch.cuda.device_count(), "CPUs": os.cpu_count(), "CUDA": torch.version.cuda,
                   "driver": gpu and subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv")[15:],
                   **{name: here.get(name) for name in ("torch", "triton", "mamba_ssm")},
                   "commit": subprocess.getoutput(f"git -C '{ROOT}' rev-parse --short HEAD")[:40]}


@part(30, "Scan: the largest relative errors, of y / of the gradients")
def right(args):
    yield lambda: {"models use": (form := scans.chosen(args.device)), "ok": form.startswith("fused") or not args.cuda}
    # A rehearsal runs the kernels in Triton's interpreter, with a GPU's chunks.
    with mock.patch.object(scan, "CHUNK", {"cuda": scan.CHUNK["cuda"]} if args.small else scan.CHUNK):
        for size in args.pick([(2, 37, 70, 16), (1, 19, 80, 2), (3, 300, 736, 16), (1, 3000, 96, 16)], [(1, 9, 70, 2)]):
            for form, low in ("fused", False), ("fused", True), ("chunked", False):
                yield lambda: cell(size, form + ", bf16" * low, *scans.errors(size, form, low, args.device),
                                   most=(1e-4, 2**-7 if low else 1e-4))
        size = args.pick((129, 256, 2**16, 2), (2, 9, 65, 1))               # more than 2^31 numbers
        yield lambda: cell(size, "fused", scans.last_row_error(size, "fused", args.device), most=[1e-4])


@part(25, "Models: errors relative to the CPU, of forward / loss / two sampling steps / gradients")
def models(args):
    side, images = args.pick((32, 4), (8, 2))
    limits = 1e-3, 1e-3, 1e-3, 1e-2         # one rounding of the weights changes DiffuSSM's gradients by up to 2e-4
    for which in [*((model, "tiny", (3, side << (model == "mdm"), side << (model == "mdm")), images)
                    for model in steps.CORES), *args.pick([(*S2[:3], 2)], [])]:
        yield lambda: [
            cell(" ".join(which[:2]), precision, *off.values(), most=limits if precision == "fp32" else [9] * 4)
            for precision, off in steps.errors((*which, 10), args.device).items()]


@part(30, "Tests of the fused scan")
def tests(args):
    def pytest():
        flags = args.pick(["-n", "8"] * bool(util.find_spec("xdist")), ["-k", "views"])
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-o", "addopts=", *flags, "tests/test_fused.py"],
                              cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout)
        return {"pytest": done.stdout.splitlines()[-1], "ok": done.returncode == 0}
    yield pytest


@part(35, "Scan, b x L x e: ms forward / with backward")
def scan_(args):
    # one with the definition; DiS-S/2 and B/2 with 32 images; a long sequence
    sizes = args.pick([(8, 64, 256), (32, 258, 736), (32, 258, 1536), (1, 16384, 768)], [(1, 16, 8), (1, 24, 8)])
    for size in sizes:
        forms = {k: f for k, f in scans.forms(args.device).items() if k != "definition" or size == sizes[0]}
        yield lambda: [timed(size, row["form"], row)
                       for row in scans.compare(size, 16, args.device, args.pick(5, 1), forms)]
        yield lambda: [timed(size, row["form"], row) for row in scans.convolutions(size, 4, args.device)]
        yield lambda: [timed(size, row["form"], row) for row in scans.bound(
            size, 16, args.device, *args.pick((), (2**16, 2**8)))] if scans.triton else []
    yield lambda: {"chosen kernels": str([*getattr(scan, "CHOSEN", {}).values()])}


def speed(which, switch, args, **how):
    found = steps.speed(which, switch, args.device, args.pick(0.4, 0), **how)
    return cell(f"{' '.join(which[:2])}, {which[3]} images", switch, found["images/s"], found["GB"], **found)


@part(75, "A training step, without clipping and EMA: images/s / GB at the peak")
def step(args):
    for which in (S2, ("dis", "DiS-B/2", *LATENTS), SSM, ("mdm", "cc12m-64", (3, 64, 64), 16, 1000),
                  ("cunet", "cunet", (3, 64, 64), 32)):
        small = which[0], "tiny", (3, 16, 16), 1
        for switch in ["fp32", "TF32", "bf16", "bf16, checkpointing", *["bf16, chunked"] * (which is S2)]:
            yield lambda: speed(args.pick(which, small), switch, args)


@part(95, "A minute of train.py, DiS")
def training(args):
    flags = args.pick(["--preset", "DiS-S/2", "--global-batch-size", "64", "--lr", "5e-4"],
                      ["--image-size", "8", "--global-batch-size", "4"])
    yield lambda: steps.train_for(args.pick(60, 1), flags, args.data_dir, args.out / "samples.png", args.device,
                                  args.pick([], ["--steps", "1", "--num-samples", "8"]))
    yield lambda: {"MiB that --dry-run expects": steps.planned(flags)}


@part(25, "How often does a step of train.py wait for the GPU? (With dopri5 it may.)")
def waits(args):
    small = args.pick([], ["--global-batch-size", "1"])
    for flags in *([m] for m in steps.CORES), ["mdm", "--set", "mixed=[1,0.67]"], ["cunet", "--set", "solver=dopri5"]:
        yield lambda: cell("waits", " ".join([flags[0], *flags[2:]]), sum((where := steps.waits(
            ["--model", *flags, *small], args.device, *args.pick((6, 12), (1, 2)))).values()),
            most=[0 if args.cuda and "solver=dopri5" not in flags else 99], where=where)


@part(15, "S4D: ms forward / with backward")
def s4d_(args):
    for size in args.pick([(768, 1024, 64, 32), (2304, 1024, 64, 16)], [(4, 16, 8, 1)]):
        yield lambda: [timed(title, row[""], row) for title, *rest in s4d.cases(*size, args.device)
                       for row in s4d.compare(*rest, args.device, args.pick(5, 1))]


@part(35, "Peak of activations, MiB: estimate / measured")
def memory_(args):
    for again in False, True:
        for which in args.pick(memory.CASES, [("cunet", "tiny", (1, 16, 16), 2, {})]):
            yield lambda: cell((row := memory.line(which, args.cuda, again, args.device.type))["preset"],
                               row["precision"] + ", checkpointing" * again, row["estimate"], row["measured"], **row)


@part(35, "Two processes, DiS: the largest difference from the losses of one")
def two(args):
    def losses():
        if args.cuda and torch.cuda.device_count() < 2:
            return {"skipped": "there is one GPU"}
        flags = ["--device", args.device.type, "--precision", "fp32", *processes.MODELS["dis"]]
        with tempfile.TemporaryDirectory() as folder:
            one, *others = (processes.train(processes.WAYS[way], flags, Path(folder, way), args.pick(20, 2))
                            for way in ("1", "2", "2, shards"))
        return [cell(f"{len(one)} steps", way, max(abs(a - b) for a, b in zip(one, other, strict=True)), most=[1e-4])
                for way, other in zip(("DDP", "shards"), others)]
    yield losses


@part(20, "torch.compile: images/s / GB at the peak")
def compile_(args):
    for which in args.pick([SSM, S2], [("dis", "tiny", (3, 16, 16), 1)]):
        yield lambda: speed(which, "bf16, compile", args, **args.pick({}, {"backend": "eager"}))


# --- running the parts ------------------------------------------------------------------------------------------

def work(name, args):
    """Do one part, in this process. All rows so far are in the file `rows`, in JSON, a line each."""
    done = []
    for number, one in enumerate(PARTS[name][2](args), 1):
        try:
            rows = one()
        except (Exception, SystemExit) as e:
            traceback.print_exc()
            rows = {"error": f"case {number}: {traceback.format_exception_only(e)[-1].strip()}", "ok": False}
        done += rows if isinstance(rows, list) else [rows]
        checkpoint.replace(args.out / "rows", lambda f: f.write("\n".join(map(json.dumps, done)).encode()))
        gc.collect()
        torch.cuda.empty_cache()


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    p = argparse.ArgumentParser(description="All that needs a GPU, in under 8 minutes.")
    p.add_argument("parts", nargs="*", help=f"default: all of {', '.join(PARTS)}")
    p.add_argument("--out", type=Path, help="the folder of the results (default: gpu, or gpu-rehearsal)")
    p.add_argument("--data-dir", help="where CIFAR-10 is; without it shapes are drawn")
    p.add_argument("--rehearse", dest="small", action="store_true", help="on the CPU, with tiny sizes")
    p.add_argument("--work", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if wrong := set(args.parts) - set(PARTS):
        p.error(f"no part {', '.join(wrong)}: there are {', '.join(PARTS)}")
    args.out = (args.out or Path("gpu-rehearsal" if args.small else "gpu")).resolve()
    args.cuda, args.device = not args.small, torch.device("cpu" if args.small else "cuda")
    args.pick = lambda gpu, small: small if args.small else gpu
    args.out.mkdir(parents=True, exist_ok=True)
    if args.work:
        return work(args.work, args)
    env = {**os.environ, **args.pick({}, {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"})}
    until, path = BEGUN, args.out / "gpu.json"
    found = json.loads(path.read_text()) if args.parts and path.exists() else {}
    if not args.parts:
        (args.out / "gpu.log").write_text("")
    for name in args.parts or PARTS:
        until += PARTS[name][0] * args.pick(1, 10)              # a laptop may be busy
        now, rows = time.monotonic(), args.out / "rows"
        rows.write_text("")
        command = [sys.executable, __file__, *argv, "--work", name]
        error = within(until - now, command, env, args.out / "gpu.log")
        wrong = [{"error": error, "ok": False}] * bool(error)
        found[name] = {"title": PARTS[name][1], "seconds": time.monotonic() - now,
                       "rows": [*map(json.loads, rows.read_text().splitlines()), *wrong]}
        checkpoint.replace(path, lambda f: f.write(json.dumps(found, indent=1).encode()))
        page = "\n".join(f"**{one['title']}**\n\n{markdown(one['rows'])}" for one in found.values())
        (args.out / "gpu.md").write_text(page)
        print(f"{name:10}{found[name]['seconds']:5.0f} s  {error or ''}", flush=True)
    rows.unlink()
    print("", page, sep="\n")
    return int(not all(row.get("ok", True) for one in found.values() for row in one["rows"]))


if __name__ == "__main__":
    sys.exit(main())
