"""Where do training and sampling spend their time? How does a training step grow with tokens, width and batch?

    python benchmarks/step.py                                   all four papers, some minutes on a CPU
    python benchmarks/step.py --models dis -- --data mnist --data-dir DIR       flags after -- are for train.py
    python benchmarks/step.py --throughput dis:DiS-S/2 diffussm:DiffuSSM-S      32x32x4 latents, on a GPU

The steps are those of train.py itself, with a clock around its functions. "Python" is the time outside all of them.
The time of a part leaves out the parts inside it. On a GPU the clock waits for every part, so the sum is more than a
step takes without a clock.
"""
import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from timing import median, ratio, table, turns  # noqa: E402

import sample  # noqa: E402
import train  # noqa: E402
from diffusion import Diffusion  # noqa: E402
from support import checkpoint, inputs, log  # noqa: E402

# The functions at the core of a paper, forward and backward. They are in its file or in support.
CORES = {"dis": ["scan", "scan_grad"], "diffussm": ["kernel", "convolve", "convolve_backward"],
         "mdm": [], "cunet": []}
SHAPE = {"dis": (4, 32, 32), "diffussm": (4, 32, 32), "mdm": (3, 64, 64), "cunet": (3, 64, 64)}


def core(model):
    """-> (part, module, name of a function there) for a Clock."""
    files = [checkpoint.load_paper(model), *map(sys.modules.get, ("support.scan", "support.longconv"))]
    return [("core", file, name) for file in files for name in CORES[model] if hasattr(file, name)]


class Clock:
    """parts: seconds by name. The time of a part leaves out the parts inside it."""

    def __init__(self, device):
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.parts, self.inside = defaultdict(float), []

    def now(self):
        self.wait()
        return time.perf_counter()

    def of(self, name, function):
        def timed(*args, **kwargs):
            start = self.now()
            self.inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = self.now() - start
                self.parts[name] += took - self.inside.pop()
                if self.inside:
                    self.inside[-1] += took
        return timed

    @contextlib.contextmanager
    def watch(self, *places):
        """A context in which functions are clocked. places: (part, module or class, name of a function there)."""
        with contextlib.ExitStack() as stack:
            for part, where, name in places:
                stack.enter_context(mock.patch.object(where, name, self.of(part, getattr(where, name))))
            yield


def training(model, flags, device, steps=60, warm=6):
    """-> the milliseconds of one step of train.py by part, and their sum."""
    paper, clock, marks = checkpoint.load_paper(model), Clock(device), []

    def batches(*args, batches=inputs.batches, **options):
        take = clock.of("data", iter(batches(*args, **options)).__next__)
        with contextlib.suppress(StopIteration):
            while True:
                yield take()

    def ema(*args, update=train.update_ema):
        clock.of("EMA", update)(*args)
        marks.append((clock.now(), dict(clock.parts)))
    places = [("data", train, "make_batch"), *(("noise", train, f) for f in ("normal", "uniform", "fold")),
              ("network", Diffusion, "loss"), ("network", torch.Tensor, "backward"), *core(model),
              ("optimizer", torch.nn.utils, "clip_grad_norm_"), ("optimizer", torch.optim.AdamW, "step"),
              ("optimizer", torch.optim.AdamW, "zero_grad"), ("logging", log.Log, "loss"),
              ("logging", log.Log, "step"), ("logging", log.Log, "write")]
    if "loss" in vars(type(paper.build("tiny", (1, 32, 32))[1])):       # mdm has its own loss
        places.append(("network", type(paper.build("tiny", (1, 32, 32))[1]), "loss"))
    with tempfile.TemporaryDirectory() as folder, clock.watch(*places), \
            mock.patch.object(inputs, "batches", batches), mock.patch.object(train, "update_ema", ema), \
            contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main(["--model", model, "--max-steps", str(steps), "--results-dir", folder, "--sample-every",
                    "0", "--ckpt-every", str(10 * steps), "--device", str(device), *flags])
    (start, before), (end, after) = marks[warm - 1], marks[-1]
    per_step = 1e3 / (steps - warm)
    parts = {k: per_step * (after[k] - before.get(k, 0)) for k in after}
    total = per_step * (end - start)
    parts["Python"] = total - sum(parts.values())
    return parts, total


def sampling(model, device, steps=5, images=64):
    """-> the milliseconds of one step of DDIM with guidance by part, and their sum."""
    clock = Clock(device)
    torch.manual_seed(0)
    net, diffusion = checkpoint.load_paper(model).build("tiny", (1, 28, 28) if model != "mdm" else (1, 32, 32), 10)
    net.to(device).eval()
    shape, labels = net.shape, torch.arange(images) % 10
    places = [("network", type(net), "forward"), *core(model), ("noise", sys.modules["diffusion"], "normal")]

    def draw():
        return sample.generate(net, diffusion, shape, torch.arange(images), {"y": labels}, images, device,
                               progress=False, steps=str(steps), cfg_scale=2.0)
    draw()
    with clock.watch(*places):
        clock.of("sampler", draw)()
    parts = {k: 1e3 / steps * v for k, v in clock.parts.items()}
    return parts, sum(parts.values())


def shares(title, names, found):
    """A table of percentages; found: {model: (parts, total)}."""
    print(title)
    table(["", "ms", *names], [[model, total, *(f"{100 * parts.get(n, 0) / total:.1f}%" for n in names)]
                               for model, (parts, total) in found.items()])


def step_of(model, preset, shape, batch, device, bf16=False, compiled=False, classes=0, **options):
    """-> a function that makes one training step, without data and logging."""
    torch.manual_seed(0)
    net, diffusion = checkpoint.load_paper(model).build(preset, shape, classes, **options)
    net.to(device).train()
    x0, t = torch.randn(batch, *shape, device=device), torch.arange(batch, device=device) * 997 % diffusion.T
    noise = torch.randn(batch, *diffusion.noise_shape(shape), device=device)
    cond = {"y": torch.arange(batch, device=device) % classes} if classes else {}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    run = torch.compile(net) if compiled else net

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = diffusion.loss(run, x0, t, noise, **cond)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def growth(models, device, rounds):
    """How much more time do four times the tokens (twice the side), twice the width and twice the batch take?"""
    options = {"dis": lambda D: dict(patch=1, depth=2, width=64 * D),
               "diffussm": lambda D: dict(width=64 * D),
               "mdm": lambda D: dict(channels=(32 * D, 64 * D), outer=()), "cunet": lambda D: dict(nf=8 * D)}
    rows = []
    for model in models:
        steps = [step_of(model, "tiny", (1, side, side), B, device, **options[model](D))
                 for side, D, B in ((32, 1, 2), (64, 1, 2), (32, 2, 2), (32, 1, 4))]
        ms = turns(steps, device, rounds)
        rows.append([model, median(ms[0]), *(f"{ratio(x, ms[0]):.2f}x" for x in ms[1:])])
    print("growth of a training step, float32; at first 32x32 (1024 tokens), 2 images, narrow networks")
    table(["", "ms", "64x64", "twice the width", "twice the batch"], rows)


def throughput(names, device, batch):
    """Images per second in training, and peak memory: with and without the fused scan and compilation."""
    dis, rows = checkpoint.load_paper("dis"), []
    scan = sys.modules.get("support.scan", dis)
    for name in names:
        model, preset = name.split(":")
        for fused in (False, True) if model == "dis" and device.type == "cuda" else (False,):
            for compiled in (False, True):
                chunked = scan.chunked, scan.chunked_backward
                engine = scan.engine if fused else lambda device, dtype: chunked
                with mock.patch.object(scan, "engine", engine):
                    step = step_of(model, preset, SHAPE[model], batch, device, device.type == "cuda",
                                   compiled, classes=1000 * (model != "cunet"))
                    step()
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                    ms = median(turns([step], device, 3, 5)[0])
                kind = " + ".join(["fused scan"] * fused + ["compile"] * compiled)
                rows.append([name, kind or "plain", 1e3 * batch / ms,
                             torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None])
                del step
                torch.compiler.reset()
    print(f"training, {batch} images, {'bf16 autocast' if device.type == 'cuda' else 'float32'}")
    table(["", "", "images/s", "GB at the peak"], rows)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--models", nargs="*", default=list(CORES), choices=list(CORES))
    p.add_argument("--steps", type=int, default=60, help="training steps; the first six do not count")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--rounds", type=int, default=5, help="how often the growth measures each time")
    p.add_argument("--throughput", nargs="+", metavar="PAPER:PRESET", help="measure only the throughput of these")
    p.add_argument("--batch", type=int, default=64, help="images in a step, for --throughput")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, flags = p.parse_args(sys.argv[1:end]), sys.argv[end + 1:]
    device = torch.device(args.device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads\n")
    if args.throughput:
        return throughput(args.throughput, device, args.batch)
    shares(f"training: a step of train.py {' '.join(flags)}; core: the scan of dis, the S4D of diffussm",
           ["core", "network", "optimizer", "data", "noise", "EMA", "logging", "Python"],
           {m: training(m, flags, device, args.steps) for m in args.models})
    shares("sampling: a step of DDIM for 64 digits with guidance",
           ["core", "network", "noise", "sampler"], {m: sampling(m, device) for m in args.models})
    growth(args.models, device, args.rounds)


if __name__ == "__main__":
    main()
