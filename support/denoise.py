"""Denoising: add noise to a clean picture up to step T, take it away step by step, and score every step.

Section 5.2 of "The Missing U for Efficient Diffusion Models", Calvo-Ordonez et al. 2024 (2310.20092). It works with
any model that has one resolution. The command line is sample.py's:

    python sample.py --ckpt assets/dis-mnist.pt --denoise photo.png --from-step 150
    python sample.py --ckpt assets/dis-mnist.pt --denoise test --num-samples 100 --from-step 50,150,400
    python sample.py --ckpt assets/dis-mnist.pt --denoise test --from-step 150 --against assets/diffussm-mnist.pt

When is a picture at its best? In the paper's Tables 2 and 3 each picture has its own best step, and scores, steps and
seconds are averaged over the pictures. All pictures after the same number of steps, the best one, score less. We print
both.

Here T is the paper's t (50 to 800): the step from which we go back. It is not the length of the schedule. Steps count
from 0. So a picture at step T was given noise T + 1 times, and the full way back takes T + 1 steps. The authors'
published code differs from Section 5.2: it adds Gaussian noise with a std of 0.04 to 0.3 to pictures in [0, 1], takes
at most 100 steps, and has no LPIPS.
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
from support.cli import choose_labels
from support.pictures import grid_image, save_image, to_uint8

SIGMAS = 0.5, 0.75, 1, 1.5, 2, 3        # the baseline is a blur, with the best of these sigmas (in pixels)
SHOWN = 8                               # how many pictures the strip shows


# --- scores: two (B, C, H, W) in [-1, 1] -> (B,) ---------------------------------------------------

def gaussian(x, sigma, radius):
    """Blur: (B, C, H, W) -> means weighted by exp(-r^2 / 2 sigma^2), (B, C, H - 2 radius, W - 2 radius)."""
    w = [math.exp(-0.5 * (r / sigma) ** 2) for r in range(-radius, radius + 1)]
    # We add shifted pictures, because a GPU's convolution may round to ten bits (TF32).
    for dim in (2, 3):
        n = x.shape[dim] - 2 * radius
        x = sum(w[k] / sum(w) * x.narrow(dim, k, n) for k in range(2 * radius + 1))
    return x                                                             # (B, C, H - 2 radius, W - 2 radius)


def psnr(x, y):
    """Peak signal-to-noise ratio in dB; infinite where the two are equal."""
    return 10 * torch.log10(4 / (x - y).square().flatten(1).mean(1))                     # (B,)


def ssim(x, y):
    """Structural similarity, Wang et al. 2004, Eq. 13: 1 where the two are equal. The window is Gaussian, 11 x 11 with
    sigma 1.5. It must fit into the picture, so a side needs 11 pixels. The result is the mean over the channels."""
    x, y = x + 1, y + 1             # black must be 0, or brightness counts differently; the range is 2
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mx, my, xx, yy, xy = gaussian(torch.cat([x, y, x * x, y * y, x * y]), 1.5, 5).chunk(5)
    score = ((2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
             / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2)))                  # (B, C, H - 10, W - 10)
    return score.flatten(1).mean(1)                                                      # (B,)


def load_lpips(shape, device):
    """The learned perceptual distance (Zhang et al. 2018, AlexNet) as a function like `ssim`. None if it cannot be
    computed; then the reason is printed. We never download its weights."""
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
    rgb = lambda x: x.expand(-1, 3, -1, -1)                                              # (B, 3, H, W)
    return lambda x, y: net(rgb(x), rgb(y)).flatten()                                    # (B,)


# --- the chain ------------------------------------------------------------------------------------

def noise_to(diffusion, clean, seeds, T):
    """Pictures (B, C, H, W) at step T. Row i depends only on clean[i], seeds[i] and T."""
    eps = normal(fold(seeds, T, 1), clean.shape[1:])        # the 1, because (seeds, T) is the noise of reverse step T
    return diffusion.q_sample(clean, torch.full_like(seeds, T), eps)


@torch.no_grad()
def denoise(model, diffusion, clean, seeds, labels, T, steps, metrics, batch_size, device, **options):
    """Add noise to clean (N, C, H, W) in [-1, 1] up to step T, and take it away in `steps` of the T + 1 steps.

    metrics  {name: function of two (B, C, H, W)}
    options  of `Diffusion.sample`

    -> scores  {(metric, state): (N,), of each image}
       seconds {k: per image, for the first k reverse steps}
       film    {state: the first pictures, a list of uint8 (H, W, C)}

    A state is "clean", "noisy", ("blur", sigma), "one step" (the x_0 that the network predicts at step T), or a
    number k = 1, 2, ..: after k reverse steps.
    """
    N, S = len(clean), diffusion.respaced(steps, T).T
    scores, film, spent = (collections.defaultdict(kind) for kind in (list, list, float))
    bar = tqdm(total=math.ceil(N / batch_size) * S, desc=f"from step {T}", unit="step", leave=False)
    for first in range(0, N, batch_size):
        part = slice(first, first + batch_size)
        target, seed = clean[part].to(device), seeds[part].to(device)

        def judge(state, x):
            x = x.clamp(-1, 1)
            for name, metric in metrics.items():
                scores[name, state].append(metric(x, target).cpu())
            if first < SHOWN:       # 8 pictures of 3 x 64 x 64 over 1,000 steps take 98 MB
                film[state] += list(to_uint8(x[:SHOWN - first]))

        def on_step(i, x, belief):
            nonlocal began
            x.flatten()[0].item()                       # waits until a GPU has done the step
            spent[S - i] += (time.perf_counter() - began) / N
            judge(S - i, x)
            if i == S - 1:
                judge("one step", belief)
            bar.update()
            began = time.perf_counter()                 # the time of the scores does not count

        x = noise_to(diffusion, target, seed, T)                                         # (B, C, H, W)
        noisy = x / diffusion.alpha_bar[T].sqrt().item()
        judge("clean", target)
        judge("noisy", noisy)
        for sigma in SIGMAS:
            r = math.ceil(3 * sigma)
            wide = torch.nn.functional.pad(noisy, [r] * 4, mode="replicate")             # (B, C, H + 2r, W + 2r)
            judge(("blur", sigma), gaussian(wide, sigma, r))
        cond = {} if labels is None else {"y": labels[part].to(device)}
        if not first:
            model(x, torch.full_like(seed, T), **cond)      # not timed: a network's first call takes longer
        began = time.perf_counter()
        diffusion.sample(model, clean.shape[1:], seed, steps=steps, start=(x, T), on_step=on_step,
                         **options, **cond)
    bar.close()
    seconds = dict(zip(range(1, S + 1), np.cumsum([spent[k] for k in range(1, S + 1)]).tolist()))
    return {key: torch.cat(parts) for key, parts in scores.items()}, seconds, film


def best_steps(scores, seconds, name):
    """The scores and seconds of `denoise` -> the best number of reverse steps of each image (N,); and means over the
    images: (score, steps, seconds) with each image at its own best, and with all at the step that is best for all."""
    curves = torch.stack([scores[name, k] for k in seconds])                             # (S, N)
    best = torch.argmin if name == "lpips" else torch.argmax
    each, took = best(curves, 0), torch.tensor(list(seconds.values()))                   # (N,), (S,)
    means = [[curves.gather(0, at[None]).mean().item(), at.double().mean().item() + 1, took[at].mean().item()]
             for at in (each, best(curves.mean(1), 0).expand_as(each))]
    return each + 1, *means


def strip_image(films, T, best):
    """films {name of a network: the film of `denoise`}, best {name: the best number of steps of each picture} ->
    uint8 (H, W, 3): one picture a row, its states side by side with their names above, network after network."""
    film, heads = next(iter(films.values())), []
    columns = [("clean", film["clean"]), (f"noisy {T}", film["noisy"])]
    for name, film in films.items():
        S = max(state for state in film if isinstance(state, int))
        heads.append((len(columns), name))
        columns += [(f"step {k}", film[k]) for k in (max(1, S * j // 5) for j in range(1, 5))]
        columns += [("best SSIM", [film[k][i] for i, k in enumerate(best[name][:SHOWN].tolist())]), ("last", film[S])]
    images = np.stack([image for _, column in columns for image in column])              # (columns rows, H, W, C)
    zoom = math.ceil(64 / images.shape[2])                  # wide enough for the words
    grid, top = grid_image(images, len(film["clean"]), zoom=zoom, wrap=False), 16 * min(len(films), 2)
    sheet = Image.new("RGB", (grid.width, grid.height + top), "white")
    sheet.paste(grid, (0, top))
    words = [(j, top - 13, name) for j, (name, _) in enumerate(columns)]
    for j, y, name in words + [(j, 3, name) for j, name in heads if len(films) > 1]:
        ImageDraw.Draw(sheet).text((j * grid.width / len(columns) + 3, y), name, fill="black")
    return np.asarray(sheet)


# --- the command line of sample.py --denoise --------------------------------------------------------

def to_denoise(args, trained):
    """args: those of sample.py. trained: those of the training. -> clean images (N, C, H, W) in [-1, 1], and what they
    are. Raises UserError."""
    shape, name = tuple(trained["shape"]), trained["data"]
    if min(shape[1:]) < 11:
        raise UserError(f"SSIM's window is 11x11 and this model's images are {shape[1]}x{shape[2]}: "
                        f"train one with --image-size 16")
    if args.denoise == "test":
        if name not in datasets.NAMES:
            raise UserError(f"this run was trained on the folder {name}, which has no test images: "
                            f"pass a picture to --denoise")
        images = datasets.load(name, args.data_dir or trained["data_dir"], shape[1:], "test",
                               frames=trained.get("frames"))
        N = args.num_samples or 16
        if N > len(images):
            raise UserError(f"--num-samples {N} is too many: {name} has {len(images)} test images")
        x, what = images[range(N)]["x"], f"{N} test images of {name}"                    # (N, C, H, W)
    else:
        if Path(args.denoise).is_dir():
            raise UserError(f"{args.denoise} is a folder: pass one picture to --denoise, or test")
        mode, what = "L" if shape[0] == 1 else "RGB", args.denoise
        x = torch.from_numpy(datasets.read_image(args.denoise, mode, shape[1:]).copy())[None]   # (1, C, H, W)
        with Image.open(args.denoise) as photo:
            if (photo.mode, photo.height, photo.width) != (mode, *shape[1:]):
                print(f"{args.denoise} is {photo.height}x{photo.width} {photo.mode}: scaled, cropped and "
                      f"converted to this model's {shape[1]}x{shape[2]} {mode}")
    return x / 127.5 - 1, what


def told(args, trained, N):
    """-> the labels (N,) that a network is given, or None, and how to say it. Raises UserError."""
    K = trained["num_classes"]
    if args.class_labels != "all":
        return choose_labels(args.class_labels, K, torch.arange(N)), args.class_labels
    if K and not trained["cond_dropout"]:
        raise UserError("this model never saw images without their class: pass --class-labels 3 for class 3")
    return (torch.full((N,), -1), "none (label -1)") if K else (None, "none")


def check(args, networks):
    """-> the steps of --from-step. Raises UserError if one of the networks cannot do what is asked for, or if the two
    would not see the same noisy pictures."""
    if not re.fullmatch(r"\d+(,\d+)*", args.from_step):
        raise UserError(f"--from-step {args.from_step!r} not understood: write 150, or 50,150,400")
    starts = [int(T) for T in args.from_step.split(",")]
    for _, diffusion, trained in networks.values():
        if not hasattr(diffusion, "q_sample"):
            raise UserError(f"{trained['model']} denoises several resolutions at once, but --denoise is for models "
                            f"with one: name a run of another model, as in --ckpt assets/dis-mnist.pt")
        for T in starts:
            if T >= diffusion.T:
                raise UserError(f"--from-step {T}: this model's steps are 0 to {diffusion.T - 1}")
            diffusion.respaced(args.steps or T + 1, T)      # refuses a bad --steps before any work
    (_, diffusion, trained), (_, other, against) = [*networks.values()][0], [*networks.values()][-1]
    if tuple(trained["shape"]) != tuple(against["shape"]):
        sizes = ["x".join(map(str, run["shape"])) for run in (trained, against)]
        raise UserError(f"--ckpt makes images of {sizes[0]}, and --against of {sizes[1]}: compare networks of one size")
    if not torch.equal(diffusion.alpha_bar, other.alpha_bar):
        raise UserError("--ckpt and --against have different schedules, so the same step is not the same noise: "
                        "compare networks that were trained with the same schedule and T")
    return starts


def main(args, networks, device, out):
    """Print the tables of Section 5.2, write every step and each image's best into CSVs, and pictures into `out`.
    networks: {name: (model, diffusion, the arguments of its training)}, one or two. Raises UserError."""
    starts, (_, _, trained) = check(args, networks), next(iter(networks.values()))
    clean, what = to_denoise(args, trained)
    labels = {name: told(args, trained, len(clean)) for name, (_, _, trained) in networks.items()}
    metrics = {"psnr": psnr, "ssim": ssim, "lpips": load_lpips(clean.shape[1:], device)}
    metrics = {name: metric for name, metric in metrics.items() if metric}
    results = {(T, net): denoise(model, diffusion, clean, args.seed + torch.arange(len(clean)), labels[net][0], T,
                                 args.steps or T + 1, metrics, args.batch_size, device,
                                 sampler=args.sampler, eta=args.eta, clip=args.clip)
               for T in starts for net, (model, diffusion, _) in networks.items()}

    said = ", ".join(dict.fromkeys(words for _, words in labels.values()))
    print(f"{what}, class: {said}; {args.sampler}; means over images, seconds per image in batches of "
          f"{min(args.batch_size, len(clean))}\nblur: the best of sigma {', '.join(map(str, SIGMAS))} px; "
          f"1 step: x_0 as the network first predicts it\nbest: first each image after its own best number of reverse "
          f"steps, then all after the same number; last: after all steps")
    wide = max(map(len, networks)) + 2 if len(networks) > 1 else 0
    steps, images = [["network", "from_step", "reverse_steps", *metrics, "seconds"]], [
        ["network", "from_step", "image", "metric", "noisy", "one_step", "best", "steps", "seconds"]]
    best = {}
    for name in metrics:
        pick, order = (min, "lower") if name == "lpips" else (max, "higher")
        digits = 2 if name == "psnr" else 4
        print(f"\n{name.upper()}{' in dB' * (name == 'psnr')}, {order} is better\n{'':{wide + 36}}"
              f"  each at its best           all at one step\n{'network' if wide else '':{wide}}"
              f"from step    noisy     blur   1 step     best    steps  seconds     best    steps  seconds     last")
        for (T, net), (scores, seconds, _) in results.items():
            mean = {state: score.mean().item() for (metric, state), score in scores.items() if metric == name}
            at, *both = best_steps(scores, seconds, name)
            shown = [mean["noisy"], pick(mean["blur", s] for s in SIGMAS), mean["one step"]]
            print(f"{net if wide else '':{wide}}{T:9}", *(f"{value:9.{digits}f}" for value in shown),
                  *(f"{score:9.{digits}f}{k:9.4g}{s:9.3g}" for score, k, s in both),
                  f"{mean[len(seconds)]:9.{digits}f}", sep="")
            images += [[net, T, i, name, *(f"{scores[name, state][i]:.6g}" for state in ("noisy", "one step", k)), k,
                        f"{seconds[k]:.6g}"] for i, k in enumerate(at.tolist())]
            if name == "ssim":
                best[T, net] = at
                steps += [[net, T, k, *(f"{scores[m, k].mean():.6g}" for m in metrics), f"{seconds[k]:.6g}"]
                          for k in seconds]
    strips = [strip_image({net: results[T, net][2] for net in networks}, T, {net: best[T, net] for net in networks})
              for T in starts]
    out = save_image(Image.fromarray(np.vstack(strips)), out)
    tables = {out.with_suffix(".csv"): steps, out.with_name(f"{out.stem}-images.csv"): images}
    for path, lines in tables.items():
        with open(path, "w", newline="", encoding="utf8") as f:
            csv.writer(f).writerows(lines)
    print(f"\npictures -> {out}, the mean at every step -> {{}}, each image's best -> {{}}".format(*tables))
