"""Checkpoint in, pictures out.

    python sample.py                                        the newest run: a grid, one class a row
    python sample.py --class-labels 3 --num-samples 8       eight pictures of class 3
    python sample.py --cfg-scale 3 --steps 250 --sampler ddpm --out big.png
    python sample.py --gif                                  also a film: how the pictures come out of the noise
    python sample.py --prompt "a big blue star" "a red moon"        a model that reads text: one prompt a row
    python sample.py --levels                               an mdm: all its resolutions, side by side
    python sample.py --num-fid-samples 50000                a folder of PNGs and an .npz, for FID tools
    torchrun --standalone --nproc_per_node=8 sample.py --num-fid-samples 50000
    python sample.py --ckpt assets/dis-mnist.pt --denoise photo.png --from-step 150    add noise and take it away again
    python sample.py --ckpt assets/dis-mnist.pt --denoise test --num-samples 100 --from-step 50,150,400    test images
    python sample.py --ckpt assets/dis-mnist.pt --denoise test --from-step 150 --against assets/diffussm-mnist.pt

The checkpoint tells the model, the preset, the shape of the images and the schedule. Image i depends only on
seed + i and on its label or prompt: it is the same, up to rounding, at any batch size and on any number of processes.

In a notebook: `from support.checkpoint import load_paper, load_run; model, diffusion, args = load_run(PATH)`.
"""
import argparse
import contextlib
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))    # finds our files even under PYTHONSAFEPATH

import support              # noqa: F401 (before torch: it chooses how many threads torch starts)
import torch
from tqdm import tqdm

from diffusion import UserError, spaced_timesteps
from support import checkpoint, denoise, latents
from support.cli import (QUIET, Parser, check_flags, check_model, choose_labels, number, read_prompts, refuse, run,
                         several, told_plainly)
from support.fid import fid_samples
from support.parallel import Team, pick_device, set_precision
from support.pictures import (decoder, grid_image, make_folder, refuse_old, save_each, save_gif, save_image,
                              side_by_side, to_uint8)
from support.text import cut, full_name, text_encoder


def generate(model, diffusion, shape, seeds, cond, batch_size, device,
             film=None, progress=True, levels=False, decode=lambda x: x, **options):
    """Draw one image for each seed -> (N, C, [T,] H, W) in [-1, 1], on the CPU.

    shape    (C, [T,] H, W), what the model makes
    seeds    (N,) long
    cond     {"y": labels (N,)}, or {"text": .., "text_mask": ..}, or {}
    film     None, or a list. It gets an entry for each step: the N images x0 that the model predicted at that step
    levels   draw all resolutions of an mdm, see `side_by_side`
    decode   turns latents into pictures, see `decoder`
    options  of `Diffusion.sample`, `steps` among them
    """
    done, beliefs = [], {}
    batches = range(0, len(seeds), batch_size)
    bar = tqdm(total=len(batches) * len(spaced_timesteps(diffusion.T, options["steps"])), desc="sampling", unit="step",
               leave=False, disable=not progress)

    def on_step(i, x, x0):
        bar.update()
        if film is not None:
            beliefs.setdefault(i, []).append(decode(x0).cpu())
    if progress or film is not None:
        options["on_step"] = on_step
    draw = diffusion.sample_levels if levels else diffusion.sample
    for i in batches:
        part = slice(i, i + batch_size)
        drawn = draw(model, shape, seeds[part].to(device), **options,
                     **{k: v[part].to(device) for k, v in cond.items()})
        done.append((side_by_side(drawn) if levels else decode(drawn)).cpu())
    bar.close()
    if film is not None:
        film += [torch.cat(beliefs[i]) for i in sorted(beliefs, reverse=True)]           # i counts down
    return torch.cat(done)                                                               # (N, C, [T,] H, W)


def negative(model, encode, prompt, device):
    """What guidance leads away from, an option of `Diffusion.sample`: a negative prompt, or the empty one if the model
    reads that where no text is meant. Otherwise {}: the model itself knows "no text"."""
    if prompt is None and not getattr(model, "empty_prompt", False):
        return {}
    return {"negative": {k: v.to(device) for k, v in zip(("text", "text_mask"), encode([prompt or ""]))}}


def preview(model, diffusion, args, encode, vae, device):
    """The small grid that train.py draws now and then, always from the same noise -> PIL image."""
    rows = min(args.num_classes, 10) or len(args.prompts) or 4
    columns = 4 if len(args.shape) == 3 else 1                      # a video fills a row with its frames
    cond, away = {"y": torch.arange(rows).repeat(columns)} if args.num_classes else {}, {}
    if encode:
        away = negative(model, encode, None, device)
        cond = dict(zip(("text", "text_mask"), encode(args.prompts * columns)))
    images = generate(model, diffusion, tuple(args.shape), torch.arange(columns * rows), cond, columns * rows,
                      device, progress=False, steps=str(min(25, diffusion.T)), clip=not args.space,
                      decode=decoder(args.space, vae), cfg_scale=2.0 if cond and args.cond_dropout else 1.0, **away)
    return grid_image(to_uint8(images), rows, args.class_names[:rows] or args.prompts)


# --- command line -----------------------------------------------------------------------------

def parse(argv):
    p = Parser(__doc__)
    g = p.add_argument_group("what")
    g.add_argument("--ckpt", default="latest", metavar="PATH",
                   help="a checkpoint, a run's folder, or latest: the newest latest.pt in --results-dir")
    g.add_argument("--results-dir", default="results", help="where latest looks")
    g.add_argument("--model", metavar="PATH",
                   help="the .py file, if you trained a model of your own: a checkpoint never decides which code runs")
    g.add_argument("--weights", choices=["ema", "raw"], default="ema", help="ema: averaged; raw: of the last step")
    g.add_argument("--num-samples", type=number(int, 1), metavar="N",
                   help="how many images (default: 10 for each class, if there are at most 20 classes; 8 for each "
                        "prompt, or 1 if there are more than 20 prompts; 2 instead of 10 or 8 for videos; else 16)")
    g.add_argument("--class-labels", default="all", help="all, random, or numbers: 0,1,2")
    g.add_argument("--text-encoder", metavar="NAME", help="the T5 of the training, if its folder has moved")
    g.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT",
                   help="what to draw, if the model reads text; @FILE: one on a line (default: captions of its data)")
    g.add_argument("--text-device", metavar="DEVICE",
                   help="where the T5 runs (default: as --device). It leaves the memory before images are drawn, "
                        "unless there are more than 1,000 prompts")
    g.add_argument("--text-precision", choices=["fp32", "bf16"], default="fp32",
                   help="of the T5: bf16 takes half the memory")
    g = p.add_argument_group("how")
    g.add_argument("--negative-prompt", metavar="TEXT",
                   help="guidance leads away from what this text describes (default: from no text)")
    g.add_argument("--cfg-scale", type=number(float, -1000, 1000),
                   help="guidance: 1 is off; more gives clearer and less varied images (default: 2 if the model was "
                        "trained with classes or captions and --cond-dropout, otherwise 1)")
    g.add_argument("--cfg-below", type=number(float, 0, 1), metavar="PART",
                   help="guidance acts only at steps t < PART T (default: as the preset says; 1: at all)")
    g.add_argument("--sampler", choices=["ddim", "ddpm"],
                   help="how to step from noise to image (default: ddim; ddpm with --denoise)")
    g.add_argument("--steps", help="50: so many, evenly spaced; 10,15,20: so many in each third; ddim50: every "
                                   "(T / 50)-th step (default: 50, or T if it is less; with --denoise, every step)")
    g.add_argument("--eta", type=number(float), default=0.0, help="DDIM's noise: 0: none; 1: as much as DDPM's")
    g.add_argument("--clip", choices=["hard", "imagen", "deepfloyd", "none"],
                   help="how to keep the predicted pixels in range at every step. hard, the default, cuts them off; "
                        "imagen and deepfloyd scale them, for strong guidance; none is the default for latents")
    g.add_argument("--no-clip", dest="clip", action="store_const", const="none", help="the same as --clip none",
                   default=argparse.SUPPRESS)
    g.add_argument("--seed", type=number(int), default=0, help="image i is made from seed + i")
    g.add_argument("--batch-size", type=number(int, 1), default=100, help="images at a time")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    g.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                   help="auto: float32, with TF32 on GPUs that have it; bf16: autocast, faster; fp32: no TF32 either")
    g.add_argument("--compile", action="store_true", help="torch.compile the model: worth it for many images")
    g = p.add_argument_group("denoise a picture instead")
    g.add_argument("--denoise", metavar="PICTURE",
                   help="add noise to this picture, take it away, and score every step; test: use the first "
                        "--num-samples (default: 16) test images of the run's data. The model is told a class only if "
                        "--class-labels gives numbers")
    g.add_argument("--from-step", metavar="STEPS", help="how much noise: the step, or steps, to go back from")
    g.add_argument("--against", metavar="PATH",
                   help="another checkpoint or run: it gets the same noise, and is shown beside --ckpt")
    g.add_argument("--data-dir", metavar="DIR", help="where --denoise test finds its data (default: as in training)")
    g = p.add_argument_group("output")
    g.add_argument("--out", help="the file of the grid (default: samples.png, or denoise.png; --denoise writes its "
                                 "scores into two .csv files beside it)")
    g.add_argument("--vae", metavar="NAME",
                   help="the VAE that decodes latents (default: the one that encoded them); none: false colours")
    g.add_argument("--gif", action="store_true", help="also write a film of the denoising, beside --out")
    g.add_argument("--levels", action="store_true", help="show every resolution of an mdm, coarsest first")
    g.add_argument("--save-images", metavar="DIR",
                   help="also write each image by itself, as DIR/000000.png; DIR must hold no older ones")
    g.add_argument("--num-fid-samples", type=number(int), default=0, metavar="N",
                   help="instead of a grid, write N images of random classes, or of --prompt, into the folder "
                        "--save-images (default: fid-samples) and into an .npz of that name, as FID tools read them")
    args = p.parse_args(argv)
    if args.out and args.num_fid_samples:
        raise UserError("--num-fid-samples writes no grid: drop --out, and name the folder by --save-images")
    args.sampler = args.sampler or ("ddpm" if args.denoise else "ddim")
    args.out = Path(args.out or ("denoise.png" if args.denoise else "samples.png"))
    return args


@told_plainly()
def main(argv=None, encode=None):
    """encode: what turns prompts into tensors, if the caller has it already."""
    args = parse(argv)
    check_flags(args)
    refuse((argv is None and several() and not args.num_fid_samples,
            "torchrun is for --num-fid-samples: start python sample.py without it"))
    # First, so that one that fails ends the others. At the end it waits for the slowest: a batch may take hours
    team = Team(torch.device("cpu"), hours=200) if args.num_fid_samples else None
    path = checkpoint.newest_run(args.results_dir) if args.ckpt == "latest" else checkpoint.in_folder(args.ckpt)
    device, weights = pick_device(args.device), "model" if args.weights == "raw" else "ema"
    set_precision(args.precision, device)

    def load(path):
        # with --against, one may be a paper's model and the other your own: --model is for that one
        own = not args.against or checkpoint.read(path)["args"]["model"].endswith(".py")
        model, diffusion, trained = checkpoint.load_run(path, weights, device, args.model if own else None)
        check_model(args, model, diffusion, trained)
        if args.precision == "bf16":
            model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
        if args.compile:    # no step changes shapes or looks at numbers, so a GPU can replay CUDA graphs
            model = torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else "default")
        return model, diffusion, trained

    with contextlib.suppress(OSError, zipfile.BadZipFile):              # `load` says it better
        sums = checkpoint.sums(path)
    model, diffusion, trained = load(path)
    refuse((args.num_fid_samples and sums != checkpoint.sums(path),
            f"train.py wrote a new {path} just now: name a file of its checkpoints folder by --ckpt"))
    many = Path(args.save_images or "fid-samples").resolve()
    for folder in (many.parent, many) if args.num_fid_samples else filter(None, (args.out.resolve().parent,
                                                                                 args.save_images)):
        make_folder(folder)
    if args.save_images and not args.num_fid_samples:
        refuse_old(args.save_images)
    shape, K, text, space = tuple(trained["shape"]), trained["num_classes"], trained.get("text"), trained.get("space")
    video = len(shape) == 4
    args.clip = {None: not space, "hard": True, "none": False}.get(args.clip, args.clip)
    if args.denoise:
        networks = {str(path): (model, diffusion, trained)}
        if args.against:
            other = checkpoint.in_folder(args.against)
            refuse((other == path, f"--against {other} is --ckpt itself: name another"))
            networks[str(other)] = load(other)
        return denoise.main(args, networks, device, args.out)

    prompts = (read_prompts(args.prompt) or trained["prompts"]) if text else []
    ours = text and not encode
    if ours:                                                            # loading this or a VAE may take a while
        dtype = torch.bfloat16 if args.text_precision == "bf16" else torch.float32
        where = pick_device(args.text_device or args.device)
        encode = text_encoder(args.text_encoder or trained["text_encoder"], where, dtype)
        refuse((encode.dim != text, f"{encode.name} gives {encode.dim} and the text encoder of the training {text}: "
                                    f"pass {trained['text_encoder']}"))
    if text:
        encode.empty = getattr(model, "empty_prompt", False)
    if text and (said := cut(encode, [*prompts, *filter(None, [args.negative_prompt])], "prompts")) and not QUIET:
        print(said)
    args.vae = full_name(args.vae) if args.vae else space and space["vae"]
    vae = latents.VAE(args.vae, device, shape[0]) if space and args.vae != "none" else None
    options = dict(sampler=args.sampler, steps=args.steps, eta=args.eta, clip=args.clip, cfg_scale=args.cfg_scale)
    away = negative(model, encode, args.negative_prompt, device) if text else {}
    if ours and hasattr(encode, "only") and len(prompts) <= 1000:
        encode.only(prompts)

    def condition(numbers, labels):
        """numbers of images (N,), labels as in --class-labels -> what `generate` takes as cond."""
        if text:
            return dict(zip(("text", "text_mask"), encode([prompts[i % len(prompts)] for i in numbers])))
        y = choose_labels(labels, K, args.seed + numbers)
        return {} if y is None else {"y": y}

    def draw(numbers, cond, **more):
        return generate(model, diffusion, shape, args.seed + numbers, cond, args.batch_size, device,
                        decode=decoder(space, vae), **options, **away, **more)

    if args.num_fid_samples:
        settings = {"ckpt": str(path), "sums": sums, "weights": weights, "seed": args.seed,
                    "batch_size": args.batch_size, "precision": args.precision, **options,
                    **({"prompts": prompts} if text else {}),
                    **({} if args.negative_prompt is None else {"negative_prompt": args.negative_prompt}),
                    **({} if args.text_precision == "fp32" else {"text_precision": args.text_precision}),
                    **({} if args.cfg_below is None else {"cfg_below": args.cfg_below}),
                    **({"vae": args.vae} if space else {})}
        return fid_samples(team, args.save_images or "fid-samples", args.num_fid_samples, args.batch_size, settings,
                           lambda numbers: draw(numbers, condition(numbers, "random"), progress=not QUIET),
                           [space["data"]] if space else [
                               trained["data"], *["--frames", "1"] * (trained["data"] == "moving"),
                               *(["--data-dir", trained["data_dir"]] if trained.get("data_dir") else [])])

    listed = K if args.class_labels == "all" else args.class_labels.count(",") + 1
    kinds = len(prompts) or (listed if args.class_labels != "random" and listed <= 20 else 0)
    each = 1 if len(prompts) > 20 else 2 if video else 8 if text else 10
    N = args.num_samples or each * kinds or 16
    cond, film = condition(torch.arange(N), args.class_labels), [] if args.gif else None
    images = to_uint8(draw(torch.arange(N), cond, film=film, levels=args.levels))        # (N, [T,] H, W, C)
    rows, names = min(4, N), None
    if text:                                                            # a prompt a row
        rows, names = min(N, len(prompts)), prompts[:N]
    elif K and args.class_labels != "random":                           # a class a row
        rows = min(N, listed)
        names = [trained["class_names"][y] for y in cond["y"][:rows].tolist()]
    out, gif = save_image(grid_image(images, rows, names), args.out), args.out.with_suffix(".gif")
    print(f"{N} {'videos' if video else 'images'} from {path} -> {out}")
    if video:
        gif = save_gif([grid_image(images[:, i], rows, names) for i in range(images.shape[1])], gif, 120)
        print(f"moving -> {gif}")
    if args.gif:
        frames = [grid_image(to_uint8(x0), rows, names) for x0 in film]
        gif = save_gif(frames + frames[-1:] * 15, gif, 60)              # the last one stays for a second
        print(f"film of the {len(film)} steps -> {gif}")
    if args.save_images:
        print(f"{N} {save_each(images, args.save_images)} -> {args.save_images}")


if __name__ == "__main__":
    run(main)
