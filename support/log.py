"""What a run tells: the plan, the progress bar, log.csv, and at the end a summary and what to try next."""
import contextlib
import csv
import math
import os
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from diffusion import UserError
from support import cost, datasets, parallel
from support.checkpoint import FREE_TO_CHANGE, images, replace
from support.cli import HELPERS, command
from support.pictures import save_image, summary

BANDS = 5                                       # log.csv also has the loss in each fifth of the range of t
ASSETS = Path(__file__).resolve().parents[1] / "assets"
# Runs of ours: the flags of train.py, and the log.csv that came out, in assets/. The loss to expect is read from it.
RUNS = {"": "shapes",
        "--model diffussm": "diffussm-shapes", "--model mdm": "mdm-shapes", "--model cunet": "cunet-shapes",
        "--data mnist --preset mini": "dis-mnist", "--model diffussm --data mnist --preset mini": "diffussm-mnist",
        "--model mdm --data mnist --preset mini": "mdm-mnist",
        "--model cunet --data mnist --preset mini": "cunet-mnist",
        "--model mdm --data cifar10 --preset small --lr 1e-3 --warmup-steps 500 --max-steps 8000": "cifar10-mdm"}
# What a preset is too small for: data and preset -> what it ends in, and what does better.
TOO_SMALL = {("cifar10", "tiny"): "blotches of colour, hardly objects: tiny is made for drawn shapes. README.md has a "
                                  "command that takes two hours of one core",
             ("a folder", "tiny"): "blotches of colour if these are photographs: tiny is made for drawn shapes. "
                                   "README.md tells what CIFAR-10 took"}


def plan(args, folder, team, dataset, model, diffusion, world, micro):
    """What is printed before the first step. world: the number of processes; micro: images in a forward pass."""
    parameters = sum(p.numel() for p in model.parameters())
    macs = None
    if not args.model.endswith(".py"):          # counting calls the model, and we call your own only to train
        image = cost.blank_batch(diffusion, dataset.shape, 1, args.num_classes, args.text)
        macs = cost.multiply_adds(model, diffusion, image)
    macs, kind = "unknown" if macs is None else f"{macs / 1e6:,.1f}M", "a folder" if dataset.files else args.data
    return (f"device      {team.device} ({'--device' if args.device != 'auto' else 'the best found'}), "
            f"{world} process{'es, each with' if world > 1 else ','} "
            f"threads {torch.get_num_threads()} of {os.cpu_count()}, {'bf16 autocast' if args.bf16 else 'float32'}\n"
            f"data        {dataset.name}: {len(dataset):,} of {'x'.join(map(str, dataset.shape))}, "
            f"{dataset.condition}\n"
            f"model       {args.model} {args.preset}: {parameters:,} parameters, {macs} multiply-adds "
            f"per image and forward pass\n"
            f"training    {args.max_steps:,} steps of {args.global_batch_size} images "
            f"({world} x {args.grad_accum} x {micro}), peak learning rate {args.lr:g}\n"
            f"folder      {folder}\n"
            f"pictures    {command('sample.py', *which(args, folder))}"
            + (f"\nexpect      {words}" if (words := TOO_SMALL.get((kind, args.preset))) else ""))


def which(args, folder):
    """The flags of sample.py that name this run."""
    return ["--ckpt", folder, *["--model", args.model] * args.model.endswith(".py")]


def expected(argv, parse):
    """The flags of train.py, and what reads them -> the log of the run of ours that had the same: [(step, images, loss,
    learning rate)], perhaps empty. Flags that do not change the loss may differ."""
    free = (FREE_TO_CHANGE | {"seed", "hflip"}) - {"set", "cond", "latents", "image_size", "frames", "init_inner"}

    def flags(argv):
        return {k: v for k, v in vars(parse(argv)).items() if k not in free}
    given = flags(argv)
    for typed, name in RUNS.items():
        path = ASSETS / f"{name}.csv"
        if path.exists() and flags(typed.split()) == given:
            with open(path, newline="") as f:
                return [tuple(float(row[k]) for k in ("step", "images", "loss", "lr")) for row in csv.DictReader(f)]
    return []


def link(path):
    """A path that a click opens, in terminals that know such links; the others show the path."""
    knows = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and (os.name != "nt" or "WT_SESSION" in os.environ)
    return f"\033]8;;{path.resolve().as_uri()}\033\\{path}\033]8;;\033\\" if knows else f"{path}"


class Bar(tqdm):
    """A bar with the time to the end. In a file, which shows no bar, each state is a line of its own. grids: the
    seconds that a step takes longer because of the grids of samples."""
    grids = 0.0

    def __init__(self, **options):
        shown = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"
        super().__init__(**options, bar_format=shown, miniters=1, dynamic_ncols=True,
                         mininterval=0.5 if sys.stderr.isatty() else 30)

    @property
    def format_dict(self):
        d = super().format_dict                 # its rate is of the last steps; it has none before the first
        rate = d["rate"] or self.n and (self.n - self.initial) / (d["elapsed"] or 1)
        return {**d, "rate": rate and 1 / (1 / rate + self.grids)}

    @staticmethod
    def status_printer(file):
        return tqdm.status_printer(file) if file.isatty() else lambda line: line and print(line, file=file, flush=True)

    def clear(self, *args, **options):
        if not self.disable and self.fp.isatty():
            super().clear(*args, **options)


class Log:
    """Keeps losses and gradient norms on the device until `write`, because to look at a number is to wait for the GPU.
    All processes have a Log and call `write` together. Only the first one writes the file."""

    def __init__(self, args, folder, team, model, T, start, expect=()):
        self.args, self.folder, self.team, self.model, self.T = args, folder, team, model, T
        self.expect, self.doubted, self.warned = expect, False, False
        self.bar = Bar(total=args.max_steps, initial=start, disable=team.rank > 0)
        if team.rank == 0:
            self.fields = ["step", "images", "loss", *(f"loss_t{b}" for b in range(BANDS)), "grad_norm", "lr",
                           "images_per_s", "memory_mb", *["nfe"] * hasattr(model, "nfe")]
            begin_csv(folder / "log.csv", self.fields, start)
        self.begin(start)

    def begin(self, step):
        """Forget the numbers up to `step`."""
        self.losses, self.norms, self.since, self.began = [], [], step, time.perf_counter()
        self.bands = torch.zeros(2, BANDS, device=self.team.device)                     # sums, counts

    def loss(self, loss, t):
        """Take note of the losses of one micro-batch, (B,), at the steps t (B,)."""
        loss = loss.detach()
        self.losses.append(loss.mean())
        band = t * BANDS // self.T
        self.bands[0].index_add_(0, band, loss)
        self.bands[1].index_add_(0, band, torch.ones_like(loss))

    def step(self, norm):
        """Take note that an optimizer step was made, with this norm of the gradient."""
        self.norms.append(parallel.full(norm))
        self.bar.update()

    @contextlib.contextmanager
    def pause(self):
        """For a grid of samples: images_per_s does not count its time, and the time to the end counts it apart."""
        start = time.perf_counter()
        yield
        took = time.perf_counter() - start
        self.began += took
        if not self.bar.disable:
            self.bar.last_print_t += took
            self.bar.grids = took / self.args.sample_every

    def write(self, step, lr):
        """A line of log.csv about the steps since the last one. All processes call this. Raises UserError if a number
        is not finite."""
        losses = torch.stack(self.losses).view(len(self.norms), -1).mean(1) / self.team.world       # (steps,)
        numbers = self.team.sum(torch.cat([losses, self.bands.flatten()])).tolist()
        losses, sums, counts = numbers[:-2 * BANDS], numbers[-2 * BANDS:-BANDS], numbers[-BANDS:]
        norms = torch.stack(self.norms).tolist()
        for i, pair in enumerate(zip(losses, norms), step - len(losses) + 1):
            if not all(map(math.isfinite, pair)):       # all processes see the same numbers, so all stop here
                self.bar.close()
                latest = self.folder / "latest.pt"
                raise UserError(f"the loss or its gradient is not finite at step {i}: "
                                f"{f'{latest} is from an earlier step; ' if latest.exists() else ''}try a new run with "
                                f"--lr {self.args.lr / 2:g}{' or --precision fp32' if self.args.bf16 else ''}")
        speed = (step - self.since) * self.args.global_batch_size / (time.perf_counter() - self.began)
        loss = sum(losses) / len(losses)
        if self.team.rank == 0:
            row = [step, images(self.args, step), f"{loss:.6g}", *(f"{s / c:.6g}" if c else "" for s, c in zip(sums, counts)),
                   f"{sum(norms) / len(norms):.4g}", f"{lr:.4g}", f"{speed:.4g}",
                   f"{parallel.memory_mb(self.team.device):.0f}"]
            if hasattr(self.model, "nfe"):
                row.append(f"{self.model.nfe:.4g}")
            self.line(row)
            usual = self.usual(step, lr)
            self.bar.set_postfix_str(f"loss {loss:.4f}{f' (expect {usual:.2g})' if usual else ''}, {speed:.0f} images/s",
                                     refresh=sys.stderr.isatty())
            if usual and loss > 2 * usual and step % self.args.ckpt_every == 0 and not self.doubted:
                self.bar.write(f"step {step}: the loss is {loss:.2g}, but the same command gave us {usual:.2g} here. "
                               f"If you changed the code, look there first")
                self.doubted = True
        self.begin(step)

    def usual(self, step, lr):
        """The loss that a run of ours had around this step, or None. Only while its batch and learning rate were these:
        with another --max-steps that is so at the beginning. Its losses are means of 50 steps: a mean of more, early
        in a run, is far larger."""
        if step - self.since > 50:
            return None
        near = [loss for at, images, loss, rate in self.expect if abs(at - step) <= step / 10
                and images == at * self.args.global_batch_size and abs(rate - lr) <= 0.05 * lr]
        return sum(near) / len(near) if near else None

    def line(self, row):
        """Append to log.csv. A full disk, or a file that became read-only, costs the line, not the run."""
        path = self.folder / "log.csv"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)      # somebody may have deleted it
            lines = [row] if path.exists() else [self.fields, row]
            with open(path, "a", newline="") as f:
                f.write("".join(",".join(map(str, line)) + "\r\n" for line in lines))
        except OSError as e:
            if not self.warned:
                self.bar.write(f"step {row[0]}: no line in log.csv ({e}), and training goes on")
            self.warned = True

    def picture(self, image, step):
        """A PIL image -> samples/step_<step>.png. A full disk costs the picture, not the run."""
        path = self.folder / "samples" / f"step_{step:07d}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(image, path)
        except OSError as e:
            path = f"no picture ({e})"
        else:
            path = link(path)
        first = 100 == step <= self.args.sample_every
        self.bar.write(f"step {step}: {path}{' (the first: blocks of colour, or fog, are normal here)' * first}")


# --- the end of a run ---------------------------------------------------------------------------

def summarise(folder, last=None):
    """Write summary.png: the loss in each band of t, and grids of samples over time. last: one more picture. A run that
    is too short for a line gets none. Whatever fails, only this picture is lost."""
    try:
        with open(folder / "log.csv", newline="") as f:
            rows = list(csv.DictReader(f))
        if len(rows) < 2:
            return
        names = {"loss": "loss", **{f"loss_t{b}": f"t{b}" for b in reversed(range(BANDS))}}
        names |= {"loss_t0": "t0, little noise", f"loss_t{BANDS - 1}": f"t{BANDS - 1}, much noise"}
        lines = {name: [(int(r["step"]), float(r[key])) for r in rows if float(r[key] or 0) > 0]
                 for key, name in names.items()}
        steps = {int(path.stem[5:]): path for path in (folder / "samples").glob("step_*.png")}
        few = {min(steps, key=lambda s: abs(math.log(s / min(steps)) - k / 3 * math.log(max(steps) / min(steps))))
               for k in range(4) if steps}      # the first, the last, and two between them
        grids = [(f"step {s:,}", Image.open(steps[s])) for s in sorted(few)]
        grids += [(f"the end: {last.name}", Image.open(last))] if last else []
        picture = summary({name: line for name, line in lines.items() if line}, grids)
        print(f"summary     {link(save_image(picture, folder / 'summary.png'))}")
    except Exception as e:
        print(f"summary     no picture of it ({e})")


def further(args, folder, argv, world):
    """What to try next: commands to paste."""
    run, guided = which(args, folder), (args.num_classes or args.text) and args.cond_dropout
    told = [*["--prompt", *args.prompts[:1]] * bool(args.text and args.prompts), *["--cfg-scale", 3] * bool(guided)]
    video = len(args.shape) == 4                # sample.py always makes films of these
    lines = [f"film        {command('sample.py', *run, *told, *['--gif'] * (not video))}"]
    if (args.model in ("dis", "diffussm", "cunet") and args.data in ("shapes", *datasets.CLASSES) and not args.space
            and min(args.shape[1:]) >= 11 and args.options.get("T", 1000) > 150 and (guided or not args.num_classes)):
        lines.append(f"denoise     {command('sample.py', *run, '--denoise', 'test', '--from-step', 150)}")
    if world == 1 + len(HELPERS):               # torchrun has flags of its own
        words = [a for i, a in enumerate(argv) if "--max-steps" not in (a.partition("=")[0], argv[i - 1] * (i > 0))]
        words += ["--resume", "auto"] * (args.resume == "none")
        lines.append(f"longer      {command('train.py', *words, '--max-steps', 2 * args.max_steps)}")
    return "\n".join(lines)


def begin_csv(path, fields, step):
    """Write log.csv without the lines after `step`, since those steps will be taken again."""
    rows = []
    if path.exists() and step:
        lines = [line.split(",") for line in path.read_text("latin1").splitlines()]
        rows = [r for r in lines if len(r) == len(fields) and r[0].isdecimal() and int(r[0]) <= step]   # a kill or a
    text = "".join(",".join(row) + "\r\n" for row in [fields, *rows])       # power cut may have left half a line
    replace(path, lambda f: f.write(text.encode("latin1")))
