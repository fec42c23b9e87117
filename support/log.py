"""What a run tells while it trains: the plan, the progress bar, log.csv."""
import contextlib
import csv
import math
import sys
import time

import torch
from tqdm import tqdm

from diffusion import UserError
from support import cost, parallel
from support.checkpoint import replace
from support.pictures import save_image

BANDS = 5                                       # log.csv also has the loss in each fifth of the range of t


def plan(args, folder, team, dataset, model, diffusion, world, micro):
    """What is printed before the first step. world: the number of processes; micro: images in a forward pass."""
    parameters = sum(p.numel() for p in model.parameters())
    macs = None
    if not args.model.endswith(".py"):          # counting calls the model, and we call your own only to train
        image = cost.blank_batch(diffusion, dataset.shape, 1, args.num_classes, args.text)
        macs = cost.multiply_adds(model, diffusion, image)
    macs = "unknown" if macs is None else f"{macs / 1e6:,.1f}M"
    return (f"device      {team.device} ({'--device' if args.device != 'auto' else 'the best found'}), "
            f"{world} process{'es' if world > 1 else ''}, {'bf16 autocast' if args.bf16 else 'float32'}\n"
            f"data        {dataset.name}: {len(dataset):,} of {'x'.join(map(str, dataset.shape))}, "
            f"{dataset.condition}\n"
            f"model       {args.model} {args.preset}: {parameters:,} parameters, {macs} multiply-adds "
            f"per image and forward pass\n"
            f"training    {args.max_steps:,} steps of {args.global_batch_size} images "
            f"({world} x {args.grad_accum} x {micro}), peak learning rate {args.lr:g}\n"
            f"folder      {folder}\n"
            f"pictures    python sample.py --ckpt {folder}")


class Log:
    """Keeps losses and gradient norms on the device until `write`, because to look at a number is to wait for the GPU.
    All processes have a Log and call `write` together. Only the first one writes the file."""

    def __init__(self, args, folder, team, model, T, start):
        self.args, self.folder, self.team, self.model, self.T = args, folder, team, model, T
        self.bar = tqdm(total=args.max_steps, initial=start, unit="step", disable=team.rank > 0,
                        mininterval=0.5 if sys.stderr.isatty() else 30, dynamic_ncols=True)
        if team.rank == 0:
            fields = ["step", "images", "loss", *(f"loss_t{b}" for b in range(BANDS)), "grad_norm", "lr",
                      "images_per_s", "memory_mb"] + ["nfe"] * hasattr(model, "nfe")
            self.fields, self.warned = fields, False
            begin_csv(folder / "log.csv", fields, start)
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
        """For what is not training: images_per_s does not count its time."""
        start = time.perf_counter()
        yield
        self.began += time.perf_counter() - start

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
        images = self.args.global_batch_size
        loss, rate = sum(losses) / len(losses), (step - self.since) * images / (time.perf_counter() - self.began)
        if self.team.rank == 0:
            row = [step, step * images, f"{loss:.6g}", *(f"{s / c:.6g}" if c else "" for s, c in zip(sums, counts)),
                   f"{sum(norms) / len(norms):.4g}", f"{lr:.4g}", f"{rate:.4g}",
                   f"{parallel.memory_mb(self.team.device):.0f}"]
            if hasattr(self.model, "nfe"):
                row.append(f"{self.model.nfe:.4g}")
            self.line(row)
            self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
        self.begin(step)

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
        self.bar.write(f"step {step}: {path}")

    def close(self):
        self.bar.close()


def begin_csv(path, fields, step):
    """Write log.csv without the lines after `step`, since those steps will be taken again."""
    rows = []
    if path.exists() and step:
        with open(path, newline="") as f:       # a kill may have left half a line at its end
            rows = [r for r in csv.reader(f) if len(r) == len(fields) and r[0].isdigit() and int(r[0]) <= step]
    text = "".join(",".join(row) + "\r\n" for row in [fields, *rows])
    replace(path, lambda f: f.write(text.encode()))
