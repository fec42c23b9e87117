"""Checkpoint in, pictures out.

    python sample.py                                        the newest run, a labelled grid
    python sample.py --class-labels 3 --num-samples 8       eight of class 3
    python sample.py --cfg-scale 3 --steps 250 --sampler ddpm --out big.png
    python sample.py --gif                                  also a film of the denoising
    python sample.py --num-fid-samples 50000                PNG folder + .npz for FID tools
    torchrun --standalone --nproc_per_node=8 sample.py --num-fid-samples 50000

Model, preset, image shape and schedule are read from the checkpoint. Image i is a function of
(seed + i) and its label alone: the same at any batch size and on any number of processes.

In a notebook: `from sample import load_paper, load_run; model, diffusion, args = load_run(PATH)`.
"""
import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import pickle
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from tqdm import tqdm

from diffusion import fold

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
        args["preset"], tuple(args["shape"]), args["num_classes"], **args["set"])
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
    """[-1, 1] (B, C, H, W) -> uint8 numpy (B, H, W, C)."""
    x = (x.float().cpu() * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return rearrange(x, "b c h w -> b h w c").numpy()                    # (B, H, W, C)


def to_pil(image):
    """uint8 (H, W, 1 or 3) -> PIL image."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def grid_image(images, rows, names=None, zoom=None):
    """uint8 (B, H, W, C), image i in row i % rows -> PIL image; names are written beside the rows."""
    B, H, W, C = images.shape
    zoom = zoom or max(1, round(56 / max(H, W)))          # a 28 px digit is small on a screen
    images = np.pad(images, ((0, -B % rows), (0, 0), (0, 0), (0, 0)), constant_values=255)
    images = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    sheet = rearrange(images, "(col row) h w c -> (row h) (col w) c", row=rows)
    sheet = sheet.repeat(zoom, 0).repeat(zoom, 1)
    picture = to_pil(sheet if C == 1 else sheet[..., :3])
    if not names:
        return picture
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


def generate(model, diffusion, shape, seeds, labels, batch_size, device,
             film=None, progress=True, **options):
    """Seeds (N,) -> images (N, C, H, W) in [-1, 1], on the CPU, `batch_size` at a time. A list given
    as `film` receives, per step, what the model then believed the N images to be."""
    done, beliefs = [], {}
    if film is not None:
        options["on_step"] = lambda i, x, x0: beliefs.setdefault(i, []).append(x0.cpu())
    for i in tqdm(range(0, len(seeds), batch_size), desc="sampling", unit="batch", leave=False,
                  disable=not progress):
        part = slice(i, i + batch_size)
        cond = {} if labels is None else {"y": labels[part].to(device)}
        done.append(diffusion.sample(model, shape, seeds[part].to(device), **options, **cond).cpu())
    if film is not None:
        film += [torch.cat(beliefs[i]) for i in sorted(beliefs, reverse=True)]
    return torch.cat(done)                                               # (N, C, H, W)


def save_image(image, path):
    """PIL image -> file, written aside and renamed: a killed run leaves no half a picture."""
    path = Path(path)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    image.save(part)
    os.replace(part, path)


def fid_samples(args, generate_part, num_classes, settings):
    """N images of random classes as PNGs, by all processes of torchrun, then one .npz by the first.
    Goes on where an earlier call with the same settings stopped."""
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
        seeds = args.seed + part
        images = to_uint8(generate_part(seeds, choose_labels("random", num_classes, seeds)))
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
                      help="how many images (default: 10 a class, or 16)")
    what.add_argument("--class-labels", default="all", help="all, random, or numbers: 0,1,2")
    how = p.add_argument_group("how")
    how.add_argument("--cfg-scale", type=float,
                     help="guidance: 1 is off; more is clearer and less varied (default: 2 if the "
                          "model can, that is, was trained with classes and --cond-dropout)")
    how.add_argument("--sampler", choices=["ddim", "ddpm"], default="ddim", help="which update")
    how.add_argument("--steps", default="50", help="50: evenly spaced; ddim50; or 10,15,20")
    how.add_argument("--eta", type=float, default=0.0, help="noise of DDIM: 0 none, 1 as DDPM")
    how.add_argument("--clip", action=argparse.BooleanOptionalAction, default=True,
                     help="keep predicted pixels in range at every step; not for latents")
    how.add_argument("--seed", type=int, default=0, help="image i is made from seed + i")
    how.add_argument("--batch-size", type=int, default=100, help="images at a time")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    out = p.add_argument_group("output")
    out.add_argument("--out", default="samples.png", help="the grid's file")
    out.add_argument("--gif", action="store_true", help="also a film of the denoising, beside --out")
    out.add_argument("--save-images", metavar="DIR", help="also every image as DIR/000000.png")
    out.add_argument("--num-fid-samples", type=int, default=0, metavar="N",
                     help="instead of a grid: N images of random classes into --save-images "
                          "(default: fid-samples) and one .npz, as FID tools read them")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    with told_plainly():
        for flag, low in (("num_samples", 1), ("batch_size", 1), ("num_fid_samples", 0), ("eta", 0),
                          ("seed", 0)):
            value = getattr(args, flag)
            if value is not None and not low <= value < 2**62:
                raise ValueError(f"--{flag.replace('_', '-')} {value}: must be at least {low} "
                                 f"and below 2^62")
        if args.eta and args.sampler == "ddpm":
            raise ValueError("--eta is DDIM's: drop it, or --sampler ddpm")
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
        diffusion.respaced(args.steps)                 # refuse a bad --steps before any work
        shape, K = tuple(trained["shape"]), trained["num_classes"]
        can_guide = K and trained["cond_dropout"] > 0
        if not can_guide and args.cfg_scale not in (None, 1):
            raise ValueError("this model never saw images without their class, so it cannot be "
                             "guided: drop --cfg-scale" if K else
                             "guidance needs classes, and this model has none: drop --cfg-scale")
        if args.cfg_scale is None:
            args.cfg_scale = 2.0 if can_guide else 1.0
        for folder in (out.resolve().parent, args.save_images):
            if folder:
                os.makedirs(folder, exist_ok=True)
                if not os.access(folder, os.W_OK):
                    raise ValueError(f"cannot write into {folder}: choose another --out")
    options = dict(sampler=args.sampler, steps=args.steps, eta=args.eta, clip=args.clip,
                   cfg_scale=args.cfg_scale)
    if args.num_fid_samples:
        settings = {"ckpt": str(path), "step": trained["step"], "weights": weights,
                    "seed": args.seed, **options}
        return fid_samples(args, lambda seeds, labels: generate(
            model, diffusion, shape, seeds, labels, len(seeds), device, progress=False, **options),
            K, settings)

    N = args.num_samples or (10 * K if args.class_labels == "all" and 0 < K <= 20 else 16)
    seeds = args.seed + torch.arange(N)
    with told_plainly():
        labels = choose_labels(args.class_labels, K, seeds)
    film = [] if args.gif else None
    images = to_uint8(generate(model, diffusion, shape, seeds, labels, args.batch_size, device,
                               film=film, **options))                          # (N, H, W, C)
    rows, names = min(4, N), None
    if labels is not None and args.class_labels != "random":      # a class a row, its name beside
        rows = min(N, K if args.class_labels == "all" else args.class_labels.count(",") + 1)
        names = [trained["class_names"][y] for y in labels[:rows].tolist()]
    save_image(grid_image(images, rows, names), out)
    print(f"{N} images from {path} -> {args.out}")
    if args.gif:
        frames = [grid_image(to_uint8(x0), rows, names) for x0 in film]
        frames[0].save(gif, save_all=True, append_images=frames[1:] + frames[-1:] * 15, duration=60,
                       loop=0)
        print(f"film of the {len(film)} steps -> {gif}")
    if args.save_images:
        for i, image in enumerate(images):
            save_image(to_pil(image), Path(args.save_images) / f"{i:06d}.png")
        print(f"{N} PNGs -> {args.save_images}")


if __name__ == "__main__":
    run(main)
