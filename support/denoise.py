"""Denoising: a clean image is noised to step T, taken back step by step, and compared with itself after each.

"The Missing U for Efficient Diffusion Models", Calvo-Ordonez et al. 2024 (2310.20092), Section 5.2; works
with any model of one resolution. T here is the paper's t (50 .. 800), where the way back starts, not the
schedule's length; counting from 0, step T has T + 1 noisings, so the chain takes T + 1 steps. The published
code differs from Section 5.2: Gaussian noise of std 0.04 to 0.3 on [0, 1], at most 100 steps, no LPIPS.

The command line is sample.py's:

    python sample.py --denoise photo.png --from-step 150
    python sample.py --denoise test --num-samples 100 --from-step 50,150,400
"""
import collections
import csv
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from diffusion import UserError, fold, normal
from support import datasets
from support.cli import choose_labels, told_plainly
from support.pictures import grid_image, save_image, to_uint8

SIGMAS = 0.5, 0.75, 1, 1.5, 2, 3        # of the Gaussian blurs to compare with, in pixels
SHOWN = 8                               # pictures in the strip


def gaussian(x, sigma, radius):
    """(B, C, H, W) -> means weighted by exp(-r^2 / 2 sigma^2), (B, C, H - 2 radius, W - 2 radius)."""
    w = [math.exp(-0.5 * (r / sigma) ** 2) for r in range(-radius, radius + 1)]
    # sums of shifted pictures: a GPU's convolution may round to ten bits (TF32)
    for dim in (2, 3):
        n = x.shape[dim] - 2 * radius
        x = sum(w[k] / sum(w) * x.narrow(dim, k, n) for k in range(2 * radius + 1))
    return x                                                 # (B, C, H - 2 radius, W - 2 radius)


def psnr(x, y):
    """Two (B, C, H, W) in [-1, 1] -> (B,) in dB; infinite where they are equal."""
    return 10 * torch.log10(4 / (x - y).square().flatten(1).mean(1))                 # (B,)


def ssim(x, y):
    """Two (B, C, H, W) in [-1, 1], at least 11 pixels a side -> structural similarity, (B,), 1 where
    they are equal. Wang et al. 2004, Eq. 13: Gaussian window 11x11, sigma 1.5, within the borders;
    a mean over channels."""
    x, y = x + 1, y + 1             # black must be 0, or brightness counts differently; L = 2
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mx, my, xx, yy, xy = gaussian(torch.cat([x, y, x * x, y * y, x * y]), 1.5, 5).chunk(5)
    score = ((2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
             / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2)))
    return score.flatten(1).mean(1)                                                  # (B,)


def load_lpips(shape, device):
    """Learned perceptual distance (Zhang et al. 2018, AlexNet) as a metric like `ssim`, or None, having
    said why. Its weights are never downloaded from here."""
    if min(shape[1:]) < 31:
        print("LPIPS was not computed: its network needs images of at least 31 pixels a side.")
        return None
    try:
        import lpips
        if not list(Path(torch.hub.get_dir(), "checkpoints").glob("alexnet-*.pth")):
            raise ImportError
    except ImportError:
        print("LPIPS was not computed: it needs `pip install lpips` and once, for its weights (233 MB), "
              "`python -c \"import lpips; lpips.LPIPS(net='alex')\"`.")
        return None
    net = lpips.LPIPS(net="alex", verbose=False).to(device).eval()
    rgb = lambda x: x.expand(-1, 3, -1, -1)                                          # (B, 3, H, W)
    return lambda x, y: net(rgb(x), rgb(y)).flatten()                                # (B,)


def noise_to(diffusion, clean, seeds, T):
    """(B, C, H, W) at step T; row i depends on clean[i], seeds[i] and T only."""
    eps = normal(fold(seeds, T, 1), clean.shape[1:])        # (seeds, T) alone is the reverse step's
    return diffusion.q_sample(clean, torch.full_like(seeds, T), eps)


@torch.no_grad()
def denoise(model, diffusion, clean, seeds, labels, T, steps, metrics, batch_size, device, **options):
    """Noise clean (N, C, H, W) in [-1, 1] to step T and sample back, `steps` of the T + 1.

    -> scores {(metric, state): mean over images}, seconds {k: per image, up to k}, film {state: list
    of uint8 (H, W, C)}; the states are "clean", "noisy", ("blur", sigma), "one step" (what the network
    believes x_0 to be at T) and k = 1, 2, ..: after k reverse steps.
    """
    N, S = len(clean), diffusion.respaced(steps, T).T
    scores, film, spent = (collections.defaultdict(kind) for kind in (float, list, float))
    bar = tqdm(total=math.ceil(N / batch_size) * S, desc=f"from step {T}", unit="step", leave=False)
    for first in range(0, N, batch_size):
        part = slice(first, first + batch_size)
        target, seed = clean[part].to(device), seeds[part].to(device)

        def judge(state, x):
            x = x.clamp(-1, 1)
            for name, metric in metrics.items():
                scores[name, state] += metric(x, target).sum().item() / N
            if first < SHOWN:       # 8 pictures of 3x64x64 over 1000 steps: 98 MB
                film[state] += list(to_uint8(x[:SHOWN - first]))

        def on_step(i, x, belief):
            nonlocal began
            x.flatten()[0].item()                       # waits for a GPU to have done the step
            spent[S - i] += (time.perf_counter() - began) / N
            judge(S - i, x)
            if i == S - 1:
                judge("one step", belief)
            bar.update()
            began = time.perf_counter()                 # the comparing itself is not counted

        x = noise_to(diffusion, target, seed, T)                                # (B, C, H, W)
        noisy = x / diffusion.alpha_bar[T].sqrt().item()
        judge("clean", target)
        judge("noisy", noisy)
        for sigma in SIGMAS:
            r = math.ceil(3 * sigma)
            wide = torch.nn.functional.pad(noisy, [r] * 4, mode="replicate")    # (B, C, H + 2r, W + 2r)
            judge(("blur", sigma), gaussian(wide, sigma, r))
        cond = {} if labels is None else {"y": labels[part].to(device)}
        began = time.perf_counter()
        diffusion.sample(model, clean.shape[1:], seed, steps=steps, start=(x, T), on_step=on_step,
                         **options, **cond)
    bar.close()
    seconds = dict(zip(range(1, S + 1), np.cumsum([spent[k] for k in range(1, S + 1)]).tolist()))
    return scores, seconds, film


def strip_image(film, T, best):
    """The film of `denoise` -> uint8 (H, W, 3): a picture a row, states side by side, named above."""
    S = max(state for state in film if isinstance(state, int))
    chain = [max(1, S * j // 5) for j in range(1, 5)]
    columns = [("clean", "clean"), (f"noisy {T}", "noisy"), *((f"step {k}", k) for k in chain),
               ("best SSIM", best), ("last", S)]
    images = np.stack([image for _, state in columns for image in film[state]])  # (8 rows, H, W, C)
    zoom = math.ceil(64 / images.shape[2])                  # wide enough for the words
    grid = grid_image(images, len(film["clean"]), zoom=zoom)
    sheet = Image.new("RGB", (grid.width, grid.height + 16), "white")
    sheet.paste(grid, (0, 16))
    for j, (name, _) in enumerate(columns):
        ImageDraw.Draw(sheet).text((j * grid.width / len(columns) + 3, 3), name, fill="black")
    return np.asarray(sheet)


def to_denoise(args, trained):
    """The command line -> clean images (N, C, H, W) in [-1, 1], their labels (N,) or None, and what
    they are, in words. Raises ValueError."""
    shape, K, name = tuple(trained["shape"]), trained["num_classes"], trained["data"]
    if min(shape[1:]) < 11:
        raise UserError(f"SSIM's window is 11x11 and this model's images are {shape[1]}x{shape[2]}: "
                         f"train one with --image-size 16")
    if K and args.class_labels == "all" and not trained["cond_dropout"]:
        raise UserError("this model never saw images without their class: pass --class-labels 3 "
                         "for class 3")
    if args.denoise == "test":
        if name not in ("shapes", "moving", *datasets.CLASSES):
            raise UserError(f"this run was trained on the folder {name}, which has no test images: "
                             f"pass --denoise a picture")
        images = datasets.load(name, args.data_dir or trained["data_dir"], shape[1:], "test",
                           frames=trained.get("frames"))
        N = args.num_samples or 16
        if N > len(images):
            raise UserError(f"--num-samples {N}: {name} has {len(images)} test images")
        x, what = images[range(N)]["x"], f"{N} test images of {name}"
    else:
        if Path(args.denoise).is_dir():
            raise UserError(f"{args.denoise} is a folder: pass --denoise one picture, or test")
        mode = "L" if shape[0] == 1 else "RGB"
        x = torch.from_numpy(datasets.read_image(args.denoise, mode, shape[1:]).copy())[None]
        with Image.open(args.denoise) as photo:
            if (photo.mode, photo.height, photo.width) != (mode, *shape[1:]):
                print(f"{args.denoise} is {photo.height}x{photo.width} {photo.mode}: scaled, cropped and "
                      f"converted to this model's {shape[1]}x{shape[2]} {mode}")
        what = args.denoise
    if args.class_labels == "all":
        labels, said = (torch.full((len(x),), -1), "none (label -1)") if K else (None, "none")
    else:
        labels, said = choose_labels(args.class_labels, K, torch.arange(len(x))), args.class_labels
    return x / 127.5 - 1, labels, f"{what}, class: {said}"


def main(args, model, diffusion, trained, device, out):
    """The tables of Section 5.2 on the screen, every step in a CSV, pictures in `out`."""
    with told_plainly():
        if not hasattr(diffusion, "q_sample"):
            raise UserError(f"{trained['model']} denoises several resolutions at once, and --denoise is of "
                             f"one: use another model")
        if not re.fullmatch(r"\d+(,\d+)*", args.from_step):
            raise UserError(f"--from-step {args.from_step!r} not understood: write 150, or 50,150,400")
        starts = [int(T) for T in args.from_step.split(",")]
        for T in starts:
            if T >= diffusion.T:
                raise UserError(f"--from-step {T}: this model's steps are 0 to {diffusion.T - 1}")
            diffusion.respaced(args.steps or T + 1, T)      # refuse a bad --steps before any work
        clean, labels, what = to_denoise(args, trained)
    seeds = args.seed + torch.arange(len(clean))
    metrics = {"psnr": psnr, "ssim": ssim, "lpips": load_lpips(clean.shape[1:], device)}
    metrics = {name: metric for name, metric in metrics.items() if metric}
    results = {T: denoise(model, diffusion, clean, seeds, labels, T, args.steps or T + 1, metrics,
                          args.batch_size, device, sampler=args.sampler, eta=args.eta, clip=args.clip)
               for T in starts}

    print(f"{what}; {args.sampler}; means over images, seconds per image in batches of "
          f"{min(args.batch_size, len(clean))}\nblur: the best of sigma {', '.join(map(str, SIGMAS))} px; "
          f"1 step: the network's first belief; best: after so many reverse steps")
    strips, lines = [], [["from_step", "reverse_steps", *metrics, "seconds"]]
    for name in metrics:
        pick, order = (min, "lower") if name == "lpips" else (max, "higher")
        digits = 2 if name == "psnr" else 4
        print(f"\n{name.upper()}{' in dB' * (name == 'psnr')}, {order} is better\n"
              f"from step    noisy     blur   1 step     best    steps  seconds     last")
        for T, (scores, seconds, film) in results.items():
            best = pick(seconds, key=lambda k: scores[name, k])
            noisy, blur = scores[name, "noisy"], pick(scores[name, ("blur", s)] for s in SIGMAS)
            shown = [noisy, blur, scores[name, "one step"], scores[name, best], scores[name, len(seconds)]]
            *shown, last = [f"{value:9.{digits}f}" for value in shown]
            print(f"{T:9}", *shown, f"{f'{best}/{len(seconds)}':>9}{seconds[best]:9.3g}{last}", sep="")
            if name == "ssim":
                strips.append(strip_image(film, T, best))
                lines += [[T, k, *(f"{scores[m, k]:.6g}" for m in metrics), f"{seconds[k]:.6g}"]
                          for k in seconds]
    save_image(Image.fromarray(np.vstack(strips)), out)
    with open(out.with_suffix(".csv"), "w", newline="") as f:
        csv.writer(f).writerows(lines)
    print(f"\npictures -> {out}, every step -> {out.with_suffix('.csv')}")
