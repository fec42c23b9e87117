"""Where do training and sampling spend their time? How does a training step grow with tokens, width and batch?

    python benchmarks/step.py                                   all four papers, some minutes on a CPU
    python benchmarks/step.py --models dis -- --data mnist --data-dir DIR       flags after -- are for train.py

The steps are those of train.py itself, with a clock around its functions. "Python" is the time outside all of them.
The time of a part leaves out the parts inside it. On a GPU the clock waits for every part, so the sum is more than a
step takes without a clock.
"""
import argparse
import contextlib
import copy
import csv
import io
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from unittest import mock

from timing import median, milliseconds, ratio, table, turns
import torch
from scan import using

import sample
import train
from diffusion import UserError
from support import checkpoint, cost, datasets, inputs, log, parallel

# The functions at the core of a paper, forward and backward, in its file or in support. (The backward of DiffuSSM's
# kernel is PyTorch's own, in no function that could be clocked. It counts as network: about 3% of a step.)
CORES = {"dis": ["scan", "scan_grad"], "diffussm": ["kernel", "convolve", "convolve_backward"],
         "mdm": [], "cunet": []}


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
    clock, marks = Clock(device), []
    diffusion = type(checkpoint.load_paper(model).build("tiny", (1, 32, 32))[1])        # mdm has its own

    def batches(*args, batches=inputs.batches, **options):
        return iter(clock.of("data", iter(batches(*args, **options)).__next__), None)       # no batch is None

    def ema(*args, update=train.update_ema):
        clock.of("EMA", update)(*args)
        marks.append((clock.now(), dict(clock.parts)))
    places = [("data", train, "make_batch"), *(("noise", train, f) for f in ("normal", "uniform", "fold")),
              ("network", diffusion, "loss"), ("network", torch.Tensor, "backward"), *core(model),
              ("optimizer", torch.nn.utils, "clip_grad_norm_"), ("optimizer", torch.optim.AdamW, "step"),
              ("optimizer", torch.optim.AdamW, "zero_grad"), ("logging", log.Log, "loss"),
              ("logging", log.Log, "step"), ("logging", log.Log, "write")]
    with tempfile.TemporaryDirectory() as folder, clock.watch(*places), \
            mock.patch.object(inputs, "batches", batches), mock.patch.object(train, "update_ema", ema), \
            contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main(["--model", model, "--global-batch-size", "32", "--max-steps", str(steps), "--results-dir", folder,
                    "--sample-every", "0", "--ckpt-every", str(10 * steps), "--device", str(device), *flags])
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


# --- one step, without data and logging ------------------------------------------------------------------

def setting(model, preset, shape, batch, classes=0, **options):
    """-> a network for training, its diffusion, and the arguments of its loss: always the same, on the CPU."""
    torch.manual_seed(0)
    net, diffusion = checkpoint.load_paper(model).build(preset, shape, classes, **options)
    given = dict(x0=torch.randn(batch, *shape), t=torch.arange(batch) * 997 % diffusion.T,
                 noise=torch.randn(batch, *diffusion.noise_shape(shape)))
    if classes:
        given["y"] = torch.arange(batch) % classes
    return net.train(), diffusion, given


def step_of(net, diffusion, given, device, bf16=False, compiled=False, **how):
    """-> a function that makes one training step, without data, clipping, EMA and logging. how: for torch.compile."""
    net.to(device)
    given = {k: v.to(device) for k, v in given.items()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    run = torch.compile(net, **how) if compiled else net

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = diffusion.loss(run, **given)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def speed(case, switch, device, seconds=0.4, **how):
    """-> images/s, ms, GB at the peak, and the ms of the first step, which may compile. case: of `setting`. switch:
    fp32, TF32 or bf16; to bf16 may be added checkpointing, compile, or chunked: the scan without its fused kernels."""
    net, diffusion, given = setting(*case)
    parallel.set_precision("fp32" if switch == "fp32" else "auto", device)
    if "checkpointing" in switch:
        parallel.recompute(net)
    with using("chunked") if "chunked" in switch else contextlib.nullcontext():
        step = step_of(net, diffusion, given, device, "bf16" in switch, "compile" in switch, **how)
        first, _, warm = (milliseconds(step, device) for _ in range(3))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ms = median(turns([step], device, 2, max(1, int(1e3 * seconds / warm)))[0])
    if "compile" in switch:
        torch.compiler.reset()
    return {"images/s": 1e3 * len(given["x0"]) / ms, "ms": ms, "first ms": first,
            "GB": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None}


# --- is a GPU right, and does anybody wait for it? -------------------------------------------------------

def answers(net, diffusion, given, device, bf16=False):
    """Forward, loss, gradients and two sampling steps -> {what: list of tensors}, in float64 on the CPU."""
    net, given, seen = copy.deepcopy(net).to(device), {k: v.to(device) for k, v in given.items()}, []
    hook = net.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        loss = diffusion.loss(net, **given)["loss"]
        hook.remove()
        loss.mean().backward()
        x = diffusion.sample(net.eval(), given["x0"].shape[1:], torch.arange(len(loss), device=device), steps="2",
                             y=given["y"])
    found = {"forward": seen[0] if isinstance(seen[0], list) else seen, "loss": [loss], "two steps": [x],
             "gradients": [p.grad for p in net.parameters() if p.grad is not None]}
    return {what: [v.detach().double().cpu() for v in tensors] for what, tensors in found.items()}


def errors(case, device):
    """A network on this device against the same one on the CPU -> {precision: {what: error}}. It is the worst of all
    tensors, relative to the tensor's norm, or to a thousandth of the norm of all, if that is more."""
    net, diffusion, given = setting(*case)
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():                     # layers that start at zero would hide all others
                p.normal_(0, 0.1)
    want, found = answers(net, diffusion, given, torch.device("cpu")), {}
    for precision in "fp32", "TF32", "bf16":
        parallel.set_precision("fp32" if precision == "fp32" else "auto", device)
        got, found[precision] = answers(net, diffusion, given, device, precision == "bf16"), {}
        for what, tensors in want.items():
            least = 1e-3 * torch.stack([w.norm() for w in tensors]).norm()
            found[precision][what] = torch.stack([(g - w).norm() / w.norm().clamp(min=least)
                                                  for g, w in zip(got[what], tensors, strict=True)]).max().item()
    return found


@contextlib.contextmanager
def handed_out(hook):
    """A context in which train.py calls hook(i) before it gets batch i. If that returns True, training ends there."""
    def batches(*args, take=inputs.batches, **options):
        for i, batch in enumerate(take(*args, **options)):
            if hook(i):
                return
            yield batch
    with mock.patch.object(inputs, "batches", batches), mock.patch.object(cost, "multiply_adds", lambda *_: None):
        yield                                   # without counting multiply-adds, which takes seconds


def waits(flags, device, first=6, last=12):
    """How often does train.py wait for the GPU, in steps without a line of the log? -> Counter {where: how often in a
    step}. On a CPU nothing waits, so one warning is made up."""
    def switch(mode):
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)
        elif mode == "warn":
            warnings.warn("called a synchronizing operation")

    def hook(i):
        if i in (first, last):
            switch("warn" if i == first else "default")
        return i > last
    with tempfile.TemporaryDirectory() as folder, handed_out(hook), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            train.main.__wrapped__(["--results-dir", folder, "--sample-every", "0", "--device", str(device), *flags])
        finally:
            switch("default")
    found = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in heard if "called a synchronizing" in str(w.message))
    return {where: n / (last - first) for where, n in found.items()}


def train_for(seconds, flags, data_dir, picture, device, drawing=()):
    """train.py for so many seconds, on CIFAR-10 if it is here, else on drawn shapes -> what log.csv says. The grid of
    samples, drawn with the flags `drawing`, goes into the file `picture`."""
    data, begun = "shapes", []
    with mock.patch.object(datasets, "download", side_effect=UserError("no network")), contextlib.suppress(UserError):
        data = datasets.load("cifar10", data_dir).name

    def late(i):
        begun.extend([time.monotonic()] * (i == 1))                 # the first step compiles
        return i > 1 and time.monotonic() > begun[0] + seconds
    with tempfile.TemporaryDirectory() as folder:
        argv = [*flags, "--data", data, *["--data-dir", data_dir] * (data_dir is not None and data == "cifar10"),
                "--device", str(device), "--results-dir", folder, "--name", "run", "--max-steps", "100000",
                "--sample-every", "0", "--lr-schedule", "constant", "--log-every", "20"]
        with handed_out(late):
            train.main.__wrapped__(argv)
        run = Path(folder, "run")
        *rows, last = csv.DictReader((run / "log.csv").read_text().splitlines())
        train.final_samples(run, train.parse(argv), *drawing)
        shutil.copy(run / "samples.png", picture)
    speed = median(float(row["images_per_s"]) for row in [*rows, last])
    return {"data": data, "steps": int(last["step"]), "images/s": speed, "loss": float(last["loss"]),
            "peak MiB": float(last["memory_mb"]), "picture": picture.name}


def planned(flags):
    """The MiB that train.py --dry-run expects for DiS on CIFAR-10 with these flags."""
    args, shape = train.parse(flags), (3, 32, 32)
    with torch.device("meta"):
        model, diffusion = checkpoint.load_paper("dis").build(args.preset, shape, 10)
    batch = cost.blank_batch(diffusion, shape, args.global_batch_size, 10)
    return cost.table(model, diffusion, batch, 1, True)[0]["total"] / 2**20


def growth(models, device, rounds):
    """How much more time do four times the tokens (twice the side), twice the width and twice the batch take?"""
    options = {"dis": lambda D: dict(patch=1, depth=2, width=64 * D),
               "diffussm": lambda D: dict(width=64 * D),
               "mdm": lambda D: dict(channels=(32 * D, 64 * D), outer=()), "cunet": lambda D: dict(nf=8 * D)}
    rows = []
    for model in models:
        steps = [step_of(*setting(model, "tiny", (1, side, side), B, **options[model](D)), device)
                 for side, D, B in ((32, 1, 2), (64, 1, 2), (32, 2, 2), (32, 1, 4))]
        ms = turns(steps, device, rounds)
        rows.append([model, median(ms[0]), *(f"{ratio(x, ms[0]):.2f}x" for x in ms[1:])])
    print("growth of a training step, float32; at first 32x32 (1024 tokens), 2 images, narrow networks")
    table(["", "ms", "64x64", "twice the width", "twice the batch"], rows)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--models", nargs="*", default=list(CORES), choices=list(CORES))
    p.add_argument("--steps", type=int, default=60, help="training steps; the first six do not count")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--rounds", type=int, default=5, help="how often the growth measures each time")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, flags = p.parse_args(sys.argv[1:end]), sys.argv[end + 1:]
    device = torch.device(args.device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads\n")
    shares(f"training: a step of train.py {' '.join(flags)}; core: the scan of dis, the S4D of diffussm",
           ["core", "network", "optimizer", "data", "noise", "EMA", "logging", "Python"],
           {m: training(m, flags, device, args.steps) for m in args.models})
    shares("sampling: a step of DDIM for 64 digits with guidance",
           ["core", "network", "noise", "sampler"], {m: sampling(m, device) for m in args.models})
    growth(args.models, device, args.rounds)


if __name__ == "__main__":
    main()
