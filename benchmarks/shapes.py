"""What is wrong with drawn shapes? Colour and grain of networks that were trained on them, for docs/results.md.

    python benchmarks/shapes.py results/RUN ...

Pixels are from -1 to 1. For a network of one resolution:
    error    of x_0 where sigma / alpha = 0.1: the mean square over all pixels, and over those inside the shapes
    colour   the part of the error inside that is the shape's mean colour
For an MDM:
    grain    of 16 samples, guidance 2: how far the outermost pixels, which are background in every picture, lie from
             their mean. Root mean square
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import support  # noqa: F401 (before torch)
import torch

import sample
from diffusion import fold, normal
from support import checkpoint, cli, datasets, shapes

N = 256


@torch.no_grad()
def errors(model, diffusion, size):
    """-> mean squared errors: of all pixels, of those inside the shapes, and of the shapes' mean colours."""
    test = datasets.load("shapes", None, size, split="test")[range(N)]
    x0, rows = test["x"] / 127.5 - 1, torch.arange(N)                                       # (N, 3, H, W)
    ink = torch.from_numpy(shapes.attributes("test", shapes.SIZES, min(size))[-1][:N])      # (N, 3)
    inside = (test["x"] == ink[:, :, None, None]).all(1, keepdim=True).float()              # (N, 1, H, W)
    tables = diffusion.tables
    t = (tables["noise"] / tables["signal"] - 0.1).abs().argmin().expand(N)                 # (N,)
    x_t = diffusion.q_sample(x0, t, normal(fold(rows, 1), x0.shape[1:]))
    out = torch.cat([model(x_t[i], diffusion.model_t(t[i]), y=test["y"][i]) for i in rows.split(64)])
    wrong = diffusion.predict_x0_eps(out, x_t, t)[0] - x0
    share = inside / inside.sum((2, 3), keepdim=True).clamp(min=1)
    return (wrong.square().mean(), (wrong.square() * share).sum((2, 3)).mean(),
            (wrong * share).sum((2, 3)).square().mean())


def grain(model, diffusion, shape, sampler, steps, n=16):
    numbers = torch.arange(n)
    x = sample.generate(model, diffusion, shape, 1000 + numbers, {"y": numbers % 8}, n, "cpu", progress=False,
                        sampler=sampler, steps=steps, cfg_scale=2.0)                        # (n, 3, H, W)
    ring = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], dim=2)           # (n, 3, pixels)
    return (ring - ring.mean(2, keepdim=True)).square().mean().sqrt()


@cli.told_plainly()
def main():
    for path in sys.argv[1:]:
        model, diffusion, trained = checkpoint.load_run(path)
        shape = tuple(trained["shape"])
        if hasattr(diffusion, "levels"):
            of = {"DDIM 50": ("ddim", "50"), "DDPM 100": ("ddpm", "100")}
            found = [f"grain, {name}: {grain(model, diffusion, shape, *how):.3f}" for name, how in of.items()]
        else:
            names = "error", "inside", "colour"
            found = [f"{name} {e:.4f}" for name, e in zip(names, errors(model, diffusion, shape[1:]))]
        print(f"{Path(path).name:20}", *found, sep="   ", flush=True)


if __name__ == "__main__":
    cli.run(main)
