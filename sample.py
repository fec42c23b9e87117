"""Checkpoint in, pictures out.

    python sample.py                                        the newest run, a labelled grid
    python sample.py --class-labels 3 --num-samples 8       eight of class 3
    python sample.py --cfg-scale 3 --steps 250 --sampler ddpm --out big.png
    python sample.py --gif                                  also a film of the denoising
    python sample.py --prompt "a big blue star" "a red moon"   of a model that reads text, a row each
    python sample.py --levels                               every resolution of an mdm, side by side
    python sample.py --num-fid-samples 50000                PNG folder + .npz for FID tools
    torchrun --standalone --nproc_per_node=8 sample.py --num-fid-samples 50000
    python sample.py --denoise photo.png --from-step 150    noise a picture, take the noise away again
    python sample.py --denoise test --num-samples 100 --from-step 50,150,400      test images, scored

Model, preset, image shape and schedule are read from the checkpoint. Image i is a function of
(seed + i) and its label or prompt alone: the same at any batch size and on any number of processes.

In a notebook: `from sample import load_paper, load_run; model, diffusion, args = load_run(PATH)`.
"""
import argparse
import collections
import contextlib
import csv
import datetime
import importlib.util
import json
import math
import os
import pickle
import re
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
from diffusion import fold, normal

VERSION = 1     # of the checkpoint's layout


# --- errors: one sentence that tells the fix, exit code 2, no traceback ------------------------

def fail(message, every_process=False):
    """Under torchrun what all processes find wrong is said once."""
    if every_process or os.environ.get("RANK", "0") == "0":
        print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def run(main):
    """What both scripts start with."""
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None             # the shell's code for Ctrl-C
    except torch.OutOfMemoryError:
        fail("the GPU's memory is full: train with --grad-accum 2, --grad-checkpointing or a smaller "
             "--global-batch-size, sample with a smaller --batch-size", every_process=True)


class Parser(argparse.ArgumentParser):
    """Shows defaults in --help, and says what is wrong in one line instead of a page of usage."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        fail(f"{message} (--help lists every flag)")


@contextlib.contextmanager
def told_plainly():
    """Around the few calls that take the user's values: what these refuse is not a crash."""
    try:
        yield
    except (ValueError, OSError) as e:
        fail(e)


# --- loading ----------------------------------------------------------------------------------

def load_paper(name):
    """"dis" -> the module of dis.py beside this file; a path to a .py file -> that file.

    Loaded by path under the name "<file>_paper", because `import dis` means Python's own module.
    Raises ValueError if there is no such file or it lacks `CONFIGS` or `build`.
    """
    here = Path(__file__).resolve().parent
    path = Path(name) if name.endswith(".py") else here / f"{name}.py"
    papers = sorted(p.stem for p in here.glob("*.py")
                    if re.search(r"^CONFIGS = ", p.read_text("utf8", "replace"), re.M))
    if not path.is_file() or (path.parent == here and path.stem not in papers):
        raise ValueError(f"no model {name!r}: choose {', '.join(papers)}, or a path to a .py file "
                         f"with CONFIGS and build()")
    key = f"{path.stem}_paper"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        module = sys.modules[key] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    module = sys.modules[key]
    if not hasattr(module, "CONFIGS") or not hasattr(module, "build"):
        raise ValueError(f"{path} is no model file: it must define CONFIGS and build()")
    return module


def read_checkpoint(path):
    """-> the checkpoint's dict, tensors on the CPU. Raises ValueError. Never runs code in it:
    weights_only=True admits tensors, numbers, strings, lists and dicts."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # the errors below say it better
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no checkpoint at {path}: train first, or pass --ckpt PATH") from None
    except pickle.UnpicklingError:  # before the next: told apart from damage
        raise ValueError(f"{path} contains more than numbers and text (perhaps code), or is not a "
                         f"checkpoint: use one that train.py wrote") from None
    except PermissionError:
        raise
    except Exception:               # damage makes the unpickler stumble in all kinds of ways
        raise ValueError(f"{path} is damaged or cut short: use an earlier file of its "
                         f"checkpoints folder") from None
    if not isinstance(checkpoint, dict) or not {"version", "model", "ema", "args"} <= set(checkpoint):
        raise ValueError(f"{path} is not a checkpoint of this project: use one that train.py wrote")
    if checkpoint["version"] != VERSION:
        raise ValueError(f"{path} has layout version {checkpoint['version']}, this code reads "
                         f"{VERSION}: use the code that wrote it")
    return checkpoint


def load_run(path, weights="ema", device="cpu"):
    """Checkpoint path -> (model in eval mode, diffusion, args of the training, with its "step").
    Raises ValueError."""
    checkpoint = read_checkpoint(path)
    args = {**checkpoint["args"], "step": checkpoint.get("step")}
    model, diffusion = load_paper(args["model"]).build(
        args["preset"], tuple(args["shape"]), args["num_classes"],
        **({"text": args["text"]} if args.get("text") else {}), **args["set"])
    try:
        model.load_state_dict(checkpoint[weights])
    except RuntimeError:
        raise ValueError(f"the weights in {path} do not fit {args['model']} {args['preset']} as it "
                         f"is now: use the code that trained them") from None
    return model.to(device).eval(), diffusion, args


def newest_run(results="results"):
    runs = sorted(Path(results).glob("*/latest.pt"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise ValueError(f"no {results}/*/latest.pt here: run `python train.py` first, or pass "
                         f"--ckpt PATH")
    return runs[-1]


def pick_device(name):
    """"auto" -> CUDA, else Apple's MPS, else CPU. Of torchrun's processes each gets its own GPU."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    found = {"cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available() and not several, "cpu": True}
    if name == "auto":
        name = next(d for d in found if found[d])
    kind, _, index = name.partition(":")
    if not found.get(kind) or index and not (kind == "cuda" and index.isdigit()
                                             and int(index) < torch.cuda.device_count()):
        raise ValueError(f"device {name!r} is not available here: choose "
                         f"{' or '.join(d for d in found if found[d])}")
    if kind == "cuda" and several:
        index = os.environ["LOCAL_RANK"]
        if int(index) >= torch.cuda.device_count():
            fail(f"process {index} has no GPU, this machine has {torch.cuda.device_count()}: pass "
                 f"torchrun --nproc_per_node={torch.cuda.device_count()}", every_process=True)
    device = torch.device(f"{kind}:{index}" if index else kind)
    if kind == "cuda" and index:
        torch.cuda.set_device(device)
    return device


# --- drawing ----------------------------------------------------------------------------------

def to_uint8(x):
    """[-1, 1] (B, C, H, W) -> uint8 numpy (B, H, W, C); videos (B, C, T, H, W) -> (B, T, H, W, C)."""
    x = (x.float().cpu() * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return rearrange(x, "b c ... h w -> b ... h w c").numpy()            # (B, [T,] H, W, C)


def to_pil(image):
    """uint8 (H, W, 1 or 3) -> PIL image."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def grid_image(images, rows, names=None, zoom=None):
    """uint8 (B, H, W, C), image i in row i % rows -> PIL image; names are written beside the rows. Of videos
    (B, T, H, W, C) the frames follow one another in a row."""
    if images.ndim == 5:
        images = np.pad(images, ((0, -len(images) % rows), *[(0, 0)] * 4), constant_values=255)
        images = rearrange(images, "(col row) t h w c -> (col t row) h w c", row=rows)    # (B T, H, W, C)
    B, H, W, C = images.shape
    zoom = zoom or max(1, round(56 / min(H, W)))          # a 28 px digit is small on a screen
    images = np.pad(images, ((0, -B % rows), (0, 0), (0, 0), (0, 0)), constant_values=255)
    images = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    sheet = rearrange(images, "(col row) h w c -> (row h) (col w) c", row=rows)
    sheet = sheet.repeat(zoom, 0).repeat(zoom, 1)
    picture = to_pil(sheet if C == 1 else sheet[..., :3])
    if not names:
        return picture
    names = [textwrap.shorten(name, 40, placeholder=" ...") for name in names]          # captions can be long
    margin = 12 + max(int(ImageDraw.Draw(picture).textlength(n)) for n in names)
    labelled = Image.new("RGB", (margin + picture.width, picture.height), "white")
    labelled.paste(picture, (margin, 0))
    draw = ImageDraw.Draw(labelled)
    for r, name in enumerate(names):
        draw.text((6, (r + 0.5) * picture.height / rows - 6), name, fill="black")
    return labelled


def choose_labels(spec, num_classes, seeds):
    """"all" | "random" | "0,1,2" -> (B,) long labels, or None for an unconditional model."""
    if not num_classes:
        if spec not in ("all", "random"):
            raise ValueError("this model was trained without classes: drop --class-labels")
        return None
    if spec == "random":
        return fold(seeds, num_classes) % num_classes
    try:
        labels = list(range(num_classes)) if spec == "all" else [int(s) for s in spec.split(",")]
    except ValueError:
        raise ValueError(f"--class-labels {spec!r} not understood: write all, random, or numbers "
                         f"such as 0,1,2") from None
    if not all(0 <= label < num_classes for label in labels):
        raise ValueError(f"--class-labels {spec} is out of range: this model's classes are 0 to "
                         f"{num_classes - 1}")
    return torch.tensor([labels[i % len(labels)] for i in range(len(seeds))])


def read_prompts(prompts):
    """["a moon", "@file"] -> ["a moon", a prompt for each line of the file ...]."""
    found = []
    for prompt in prompts or []:
        if not prompt.startswith("@"):
            found.append(prompt)
            continue
        try:                                            # -sig: editors write a BOM
            lines = Path(prompt[1:]).read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"cannot read {prompt[1:]!r} ({e}): write a prompt a line, in UTF-8") from None
        found += [line for line in lines if line.strip()]
    if prompts and not found:
        raise ValueError(f"no prompts in {' '.join(prompts)}: write a prompt a line")
    return found


def generate(model, diffusion, shape, seeds, cond, batch_size, device,
             film=None, progress=True, levels=False, **options):
    """Seeds (N,), cond {"y": labels (N,)}, {"text": .., "text_mask": ..} or {} -> images (N, C, [T,] H, W)
    in [-1, 1], on the CPU, `batch_size` at a time. A list given as `film` receives, per step, what the
    model then believed the N images to be. levels: see `side_by_side`."""
    done, beliefs = [], {}
    if film is not None:
        options["on_step"] = lambda i, x, x0: beliefs.setdefault(i, []).append(x0.cpu())
    for i in tqdm(range(0, len(seeds), batch_size), desc="sampling", unit="batch", leave=False,
                  disable=not progress):
        part = slice(i, i + batch_size)
        draw = diffusion.sample_levels if levels else diffusion.sample
        drawn = draw(model, shape, seeds[part].to(device), **options,
                     **{k: v[part].to(device) for k, v in cond.items()})
        done.append((side_by_side(drawn) if levels else drawn).cpu())
    if film is not None:
        film += [torch.cat(beliefs[i]) for i in sorted(beliefs, reverse=True)]
    return torch.cat(done)                                               # (N, C, [T,] H, W)


def side_by_side(levels):
    """Every resolution of an mdm, coarsest first -> one picture (N, C, [T,] H, R W), the coarse ones
    magnified, a single frame standing still."""
    size = levels[-1].shape[2:]
    levels = [x if x.ndim == len(size) + 2 else x[:, :, None] for x in levels]   # (N, C, [T or 1,] H_r, W_r)
    return torch.cat([torch.nn.functional.interpolate(x, size, mode="nearest") for x in levels], dim=-1)


def save_image(image, path, **options):
    """PIL image -> file, written aside and renamed: a killed run leaves no half a picture."""
    path = Path(path)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    image.save(part, **options)
    os.replace(part, path)


def save_gif(frames, path, milliseconds):
    """PIL images -> file, each shown for so long, over and over."""
    save_image(frames[0], path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def fid_samples(args, generate_part, settings):
    """N images of random classes, or of the prompts in turn, as PNGs, by all processes of torchrun, then one
    .npz by the first. Goes on where an earlier call with the same settings stopped."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder, N = Path(args.save_images or "fid-samples"), args.num_fid_samples
    about = folder / "settings.json"
    names = [folder / f"{i:06d}.png" for i in range(N)]
    with told_plainly():
        os.makedirs(folder, exist_ok=True)
        same = about.exists() and about.read_text() == json.dumps(settings, indent=1)
        if not same and any(folder.glob("*.png")):
            raise ValueError(f"{folder} holds images made with other settings than these: choose "
                             f"another --save-images")
    missing = [i for i, name in enumerate(names) if not name.exists()]
    if world > 1:                                   # all have looked before the first one writes
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(hours=12))
        torch.distributed.barrier()
    if rank == 0 and not same:
        about.write_text(json.dumps(settings, indent=1))
    todo = missing[rank::world]
    for start in tqdm(range(0, len(todo), args.batch_size), desc="sampling", unit="batch",
                      disable=rank > 0):
        part = torch.tensor(todo[start:start + args.batch_size])
        images = to_uint8(generate_part(part))
        for i, image in zip(part.tolist(), images):
            save_image(to_pil(image), names[i])
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        images = np.stack([np.asarray(Image.open(name)) for name in names])
        images = images[..., None] if images.ndim == 3 else images           # (N, H, W, C)
        npz = f"samples_{'x'.join(str(n) for n in images.shape)}.npz"
        np.savez(npz, arr_0=images)
        print(f"{N} images -> {folder} and {npz} (arr_0, uint8, NHWC)")
    if world > 1:
        torch.distributed.destroy_process_group()


# --- denoising: "The Missing U", Calvo-Ordonez et al. 2024 (2310.20092), Section 5.2 ------------
# A clean image is noised to step T, taken back step by step, and compared with itself after each.

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
        raise ValueError(f"SSIM's window is 11x11 and this model's images are {shape[1]}x{shape[2]}: "
                         f"train one with --image-size 16")
    if K and args.class_labels == "all" and not trained["cond_dropout"]:
        raise ValueError("this model never saw images without their class: pass --class-labels 3 "
                         "for class 3")
    if args.denoise == "test":
        if name not in ("shapes", "moving", *data.CLASSES):
            raise ValueError(f"this run was trained on the folder {name}, which has no test images: "
                             f"pass --denoise a picture")
        images = data.load(name, args.data_dir or trained["data_dir"], shape[1:], "test",
                           frames=trained.get("frames"))
        N = args.num_samples or 16
        if N > len(images):
            raise ValueError(f"--num-samples {N}: {name} has {len(images)} test images")
        x, what = images[range(N)]["x"], f"{N} test images of {name}"
    else:
        if Path(args.denoise).is_dir():
            raise ValueError(f"{args.denoise} is a folder: pass --denoise one picture, or test")
        mode = "L" if shape[0] == 1 else "RGB"
        x = torch.from_numpy(data.read_image(args.denoise, mode, shape[1:]).copy())[None]
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


def denoise_main(args, model, diffusion, trained, device, out):
    """The tables of Section 5.2 on the screen, every step in a CSV, pictures in `out`."""
    with told_plainly():
        if not hasattr(diffusion, "q_sample"):
            raise ValueError(f"{trained['model']} denoises several resolutions at once, and --denoise is of "
                             f"one: use another model")
        if not re.fullmatch(r"\d+(,\d+)*", args.from_step):
            raise ValueError(f"--from-step {args.from_step!r} not understood: write 150, or 50,150,400")
        starts = [int(T) for T in args.from_step.split(",")]
        for T in starts:
            if T >= diffusion.T:
                raise ValueError(f"--from-step {T}: this model's steps are 0 to {diffusion.T - 1}")
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


# --- command line -----------------------------------------------------------------------------

def parse(argv):
    p = Parser(__doc__.splitlines()[0])
    what = p.add_argument_group("what")
    what.add_argument("--ckpt", default="latest", metavar="PATH",
                      help="a checkpoint, a run's folder, or latest: the newest results/*/latest.pt")
    what.add_argument("--results-dir", default="results", help="where latest looks")
    what.add_argument("--weights", choices=["ema", "raw"], default="ema",
                      help="the moving average of the weights, or the last ones")
    what.add_argument("--num-samples", type=int, metavar="N",
                      help="how many images (default: 10 a class, 8 a prompt, of videos 2, or 16)")
    what.add_argument("--class-labels", default="all", help="all, random, or numbers: 0,1,2")
    what.add_argument("--text-encoder", metavar="NAME",
                      help="the T5 of the training, if it lies elsewhere now")
    what.add_argument("--prompt", nargs="+", metavar="TEXT",
                      help="what to draw, if the model reads text, a row each; @file: one a line (default: "
                           "some captions of its data)")
    how = p.add_argument_group("how")
    how.add_argument("--cfg-scale", type=float,
                     help="guidance: 1 is off; more is clearer and less varied (default: 2 if the "
                          "model can, that is, was trained with classes or captions and --cond-dropout)")
    how.add_argument("--sampler", choices=["ddim", "ddpm"],
                     help="which update (default: ddim; ddpm with --denoise)")
    how.add_argument("--steps", help="50: evenly spaced; ddim50; or 10,15,20 (default: 50; every step "
                                     "with --denoise)")
    how.add_argument("--eta", type=float, default=0.0, help="noise of DDIM: 0 none, 1 as DDPM")
    how.add_argument("--clip", choices=["hard", "imagen", "deepfloyd", "none"], default="hard",
                     help="how to keep predicted pixels in range at every step: cut off, or thresholds as "
                          "in Imagen and DeepFloyd, for strong guidance; none: for latents")
    how.add_argument("--no-clip", dest="clip", action="store_const", const="none", default=argparse.SUPPRESS,
                     help="as --clip none")
    how.add_argument("--seed", type=int, default=0, help="image i is made from seed + i")
    how.add_argument("--batch-size", type=int, default=100, help="images at a time")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    clean = p.add_argument_group("denoising instead of drawing")
    clean.add_argument("--denoise", metavar="PICTURE",
                       help="noise this picture and take it back, scored after every step; test: the "
                            "first --num-samples (default: 16) test images of the run's own data; "
                            "without a class unless --class-labels gives numbers")
    clean.add_argument("--from-step", metavar="T,..", help="how much noise: the steps to go back from")
    clean.add_argument("--data-dir", metavar="DIR", help="of --denoise test (default: as in training)")
    out = p.add_argument_group("output")
    out.add_argument("--out", help="the grid's file (default: samples.png, or denoise.png; the curves "
                                   "of --denoise go into a .csv beside it)")
    out.add_argument("--gif", action="store_true", help="also a film of the denoising, beside --out")
    out.add_argument("--levels", action="store_true",
                     help="show every resolution, coarsest first (mdm)")
    out.add_argument("--save-images", metavar="DIR", help="also every image as DIR/000000.png")
    out.add_argument("--num-fid-samples", type=int, default=0, metavar="N",
                     help="instead of a grid: N images of random classes, or of --prompt, into --save-images "
                          "(default: fid-samples) and one .npz, as FID tools read them")
    return p.parse_args(argv)


def main(argv=None, encode=None):
    """encode: what turns prompts into tensors, if there is one already."""
    args = parse(argv)
    args.sampler = args.sampler or ("ddpm" if args.denoise else "ddim")
    args.out = args.out or ("denoise.png" if args.denoise else "samples.png")
    args.clip = {"hard": True, "none": False}.get(args.clip, args.clip)
    if not args.denoise:                # there the default is every step
        args.steps = args.steps or "50"
    with told_plainly():
        for flag, low in (("num_samples", 1), ("batch_size", 1), ("num_fid_samples", 0), ("eta", 0),
                          ("seed", 0)):
            value = getattr(args, flag)
            if value is not None and not low <= value < 2**62:
                raise ValueError(f"--{flag.replace('_', '-')} {value}: must be at least {low} "
                                 f"and below 2^62")
        if args.eta and args.sampler == "ddpm":
            raise ValueError("--eta is DDIM's: drop it, or pass --sampler ddim")
        if bool(args.denoise) != bool(args.from_step):
            raise ValueError("--denoise and --from-step go together: --denoise photo.png --from-step 150")
        if args.data_dir and args.denoise != "test":
            raise ValueError("--data-dir is where --denoise test looks: drop it")
        if args.denoise and (args.gif or args.save_images or args.num_fid_samples
                             or args.cfg_scale not in (None, 1) or args.class_labels == "random"):
            raise ValueError("--denoise does without --gif, --save-images, --num-fid-samples, --cfg-scale "
                             "and --class-labels random: drop them")
        if args.denoise not in (None, "test") and args.num_samples:
            raise ValueError("--num-samples counts test images: drop it, or pass --denoise test")
        out, gif = Path(args.out), Path(args.out).with_suffix(".gif")
        if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp") or out.is_dir():
            raise ValueError(f"--out {args.out} must be a file that ends in .png, .jpg or .webp")
        if args.num_fid_samples and (args.gif or args.num_samples or args.class_labels != "all"):
            raise ValueError("--num-fid-samples draws random classes into a folder: drop "
                             "--gif, --num-samples and --class-labels")
        path = newest_run(args.results_dir) if args.ckpt == "latest" else Path(args.ckpt)
        path = path / "latest.pt" if path.is_dir() else path
        device = pick_device(args.device)
        weights = "model" if args.weights == "raw" else "ema"
        model, diffusion, trained = load_run(path, weights, device)
        if not args.denoise:
            diffusion.respaced(args.steps)              # refuse a bad --steps before any work
        shape, K = tuple(trained["shape"]), trained["num_classes"]
        text, video = trained.get("text"), len(shape) == 4
        if args.prompt and not text:
            raise ValueError("this model reads no text: drop --prompt, or train with --model mdm --cond text")
        if text and args.class_labels != "all":
            raise ValueError("this model reads text, not classes: pass --prompt instead of --class-labels")
        if args.levels and not hasattr(diffusion, "sample_levels"):
            raise ValueError("--levels shows the resolutions of an mdm, and this model has one: drop it")
        if args.levels and (args.gif or args.num_fid_samples):
            raise ValueError("--levels goes without --gif and --num-fid-samples: drop them")
        if video and (args.gif or args.num_fid_samples):
            raise ValueError("a video's .gif is always written, and there is no FID of videos: drop --gif "
                             "and --num-fid-samples")
        if args.num_fid_samples and text and not args.prompt:
            raise ValueError("this model reads text: add --prompt @captions.txt, a caption a line")
        if args.text_encoder and (not text or text == "bytes"):
            raise ValueError("this model reads no T5: drop --text-encoder")
        prompts = read_prompts(args.prompt) or trained["prompts"] if text else []
        can_guide = (K or text) and trained["cond_dropout"] > 0
        if not can_guide and args.cfg_scale not in (None, 1):
            raise ValueError("this model never saw images without their class or caption, so it cannot be "
                             "guided: drop --cfg-scale" if K or text else
                             "guidance needs classes or captions, and this model has none: drop --cfg-scale")
        if args.cfg_scale is None:
            args.cfg_scale = 2.0 if can_guide else 1.0
        for folder in (out.resolve().parent, args.save_images):
            if folder:
                os.makedirs(folder, exist_ok=True)
                if not os.access(folder, os.W_OK):
                    raise ValueError(f"cannot write into {folder}: choose another --out")
        if text and not encode:         # last: it may take a while
            encode = data.text_encoder(args.text_encoder or trained["text_encoder"], device)
    if args.denoise:
        return denoise_main(args, model, diffusion, trained, device, out)
    options = dict(sampler=args.sampler, steps=args.steps, eta=args.eta, clip=args.clip,
                   cfg_scale=args.cfg_scale)

    def condition(spec, numbers):
        """Of the images with these numbers (N,)."""
        if encode:
            return dict(zip(("text", "text_mask"), encode([prompts[i % len(prompts)] for i in numbers])))
        labels = choose_labels(spec, K, args.seed + numbers)
        return {} if labels is None else {"y": labels}

    if args.num_fid_samples:
        settings = {"ckpt": str(path), "step": trained["step"], "weights": weights,
                    "seed": args.seed, **options, **({"prompts": prompts} if text else {})}
        return fid_samples(args, lambda numbers: generate(
            model, diffusion, shape, args.seed + numbers, condition("random", numbers), len(numbers), device,
            progress=False, **options), settings)

    kinds = K if args.class_labels == "all" and 0 < K <= 20 else 0
    each = 1 if len(prompts) > 20 else 2 if video else 8 if text else 10
    N = args.num_samples or each * (len(prompts) or kinds) or 16
    with told_plainly():
        cond = condition(args.class_labels, torch.arange(N))
    film = [] if args.gif else None
    images = to_uint8(generate(model, diffusion, shape, args.seed + torch.arange(N), cond, args.batch_size,
                               device, film=film, levels=args.levels, **options))  # (N, [T,] H, W, C)
    rows, names = min(4, N), None
    if text:                                                      # a prompt a row
        rows, names = min(N, len(prompts)), prompts[:N]
    elif K and args.class_labels != "random":                     # a class a row, its name beside
        rows = min(N, K if args.class_labels == "all" else args.class_labels.count(",") + 1)
        names = [trained["class_names"][y] for y in cond["y"][:rows].tolist()]
    save_image(grid_image(images, rows, names), out)
    print(f"{N} {'videos' if video else 'images'} from {path} -> {args.out}")
    if video:
        frames = [grid_image(images[:, i], rows, names) for i in range(images.shape[1])]
        save_gif(frames, gif, 120)
        print(f"moving -> {gif}")
    if args.gif:
        frames = [grid_image(to_uint8(x0), rows, names) for x0 in film]
        save_gif(frames + frames[-1:] * 15, gif, 60)
        print(f"film of the {len(film)} steps -> {gif}")
    if args.save_images:
        for i, image in enumerate(images):
            name = Path(args.save_images) / f"{i:06d}"
            if video:
                save_gif([to_pil(frame) for frame in image], name.with_suffix(".gif"), 120)
            else:
                save_image(to_pil(image), name.with_suffix(".png"))
        print(f"{N} {'GIFs' if video else 'PNGs'} -> {args.save_images}")


if __name__ == "__main__":
    run(main)
