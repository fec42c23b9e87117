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
(seed + i) and its label or prompt alone: up to rounding the same at any batch size and on any number of
processes.

In a notebook: `from support.checkpoint import load_paper, load_run; model, diffusion, args = load_run(PATH)`.
"""
import argparse
import os
from pathlib import Path

import torch
from tqdm import tqdm

from diffusion import UserError
from support import checkpoint, denoise, latents
from support.checkpoint import load_run, newest_run
from support.cli import Parser, choose_labels, number, read_prompts, run, told_plainly
from support.fid import fid_samples
from support.parallel import pick_device
from support.pictures import grid_image, save_gif, save_image, side_by_side, to_pil, to_uint8
from support.text import full_name, text_encoder

def decoder(space, vae):
    """-> a function: latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1], by the VAE; without one in false
    colours. Pictures stay as they are. space: of the training's args; None: of pictures."""
    if space and vae:
        parts = 4       # 512 x 512 pixels take a GiB on the way
        return lambda z: torch.cat([vae.decode(p, space["scale"], space["shift"]) for p in z.split(parts)])
    return (lambda z: z[:, :3] / 3 if z.shape[1] >= 3 else z[:, :1] / 3) if space else lambda x: x


def generate(model, diffusion, shape, seeds, cond, batch_size, device,
             film=None, progress=True, levels=False, decode=lambda x: x, **options):
    """Seeds (N,), cond {"y": labels (N,)}, {"text": .., "text_mask": ..} or {} -> images (N, C, [T,] H, W)
    in [-1, 1], on the CPU, `batch_size` at a time. A list given as `film` receives, per step, what the
    model then believed the N images to be. levels: see `side_by_side`; decode: of latents, `decoder`."""
    done, beliefs = [], {}
    if film is not None:
        options["on_step"] = lambda i, x, x0: beliefs.setdefault(i, []).append(decode(x0).cpu())
    for i in tqdm(range(0, len(seeds), batch_size), desc="sampling", unit="batch", leave=False,
                  disable=not progress):
        part = slice(i, i + batch_size)
        draw = diffusion.sample_levels if levels else diffusion.sample
        drawn = draw(model, shape, seeds[part].to(device), **options,
                     **{k: v[part].to(device) for k, v in cond.items()})
        done.append((side_by_side(drawn) if levels else decode(drawn)).cpu())
    if film is not None:
        film += [torch.cat(beliefs[i]) for i in sorted(beliefs, reverse=True)]
    return torch.cat(done)                                               # (N, C, [T,] H, W)


def preview(model, diffusion, args, encode, vae, device):
    """A small grid of samples from the same noise every time, for looking on while training -> PIL image."""
    rows = min(args.num_classes, 10) or len(args.prompts) or 4
    columns = 4 if len(args.shape) == 3 else 1                      # a video is a row by itself
    cond = {"y": torch.arange(rows).repeat(columns)} if args.num_classes else {}
    if encode:
        cond = dict(zip(("text", "text_mask"), encode(args.prompts * columns)))
    images = generate(model, diffusion, tuple(args.shape), torch.arange(columns * rows), cond, columns * rows,
                      device, progress=False, steps="25", clip=not args.space,
                      decode=decoder(args.space, vae), cfg_scale=2.0 if cond and args.cond_dropout else 1.0)
    return grid_image(to_uint8(images), rows, args.class_names[:rows] or args.prompts)


# --- command line -----------------------------------------------------------------------------

def parse(argv):
    p = Parser(__doc__.splitlines()[0])
    what = p.add_argument_group("what")
    what.add_argument("--ckpt", default="latest", metavar="PATH",
                      help="a checkpoint, a run's folder, or latest: the newest results/*/latest.pt")
    what.add_argument("--results-dir", default="results", help="where latest looks")
    what.add_argument("--model", metavar="PATH",
                      help="the .py file, needed for runs of a model of your own: a checkpoint never chooses "
                           "which code to run")
    what.add_argument("--weights", choices=["ema", "raw"], default="ema",
                      help="the moving average of the weights, or the last ones")
    what.add_argument("--num-samples", type=number(int, 1), metavar="N",
                      help="how many images (default: 10 a class if 20 or fewer; 8 a prompt, of videos 2, of "
                           "more than 20 prompts 1; else 16)")
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
    how.add_argument("--eta", type=number(float), default=0.0, help="noise of DDIM: 0 none, 1 as DDPM")
    how.add_argument("--clip", choices=["hard", "imagen", "deepfloyd", "none"],
                     help="how to keep predicted pixels in range at every step: cut off (the default), or "
                          "thresholds as in Imagen and DeepFloyd, for strong guidance; none: the default for "
                          "latents")
    how.add_argument("--no-clip", dest="clip", action="store_const", const="none", default=argparse.SUPPRESS,
                     help="as --clip none")
    how.add_argument("--seed", type=number(int), default=0, help="image i is made from seed + i")
    how.add_argument("--batch-size", type=number(int, 1), default=100, help="images at a time")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    how.add_argument("--compile", action="store_true",
                     help="torch.compile the model, into CUDA graphs on a GPU: for many images")
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
    out.add_argument("--vae", metavar="NAME",
                     help="of a model of latents: what decodes them, or its folder (default: what encoded "
                          "them); none: show them in false colours")
    out.add_argument("--gif", action="store_true", help="also a film of the denoising, beside --out")
    out.add_argument("--levels", action="store_true",
                     help="show every resolution, coarsest first (mdm)")
    out.add_argument("--save-images", metavar="DIR", help="also every image as DIR/000000.png")
    out.add_argument("--num-fid-samples", type=number(int), default=0, metavar="N",
                     help="instead of a grid: N images of random classes, or of --prompt, into --save-images "
                          "(default: fid-samples) and one .npz, as FID tools read them")
    return p.parse_args(argv)


def main(argv=None, encode=None):
    """encode: what turns prompts into tensors, if there is one already."""
    args = parse(argv)
    args.sampler = args.sampler or ("ddpm" if args.denoise else "ddim")
    args.out = args.out or ("denoise.png" if args.denoise else "samples.png")
    if not args.denoise:                # there the default is every step
        args.steps = args.steps or "50"
    with told_plainly():
        if args.eta and args.sampler == "ddpm":
            raise UserError("--eta is DDIM's: drop it, or pass --sampler ddim")
        if bool(args.denoise) != bool(args.from_step):
            raise UserError("--denoise and --from-step go together: --denoise photo.png --from-step 150")
        if args.data_dir and args.denoise != "test":
            raise UserError("--data-dir is where --denoise test looks: drop it")
        if args.denoise and (args.gif or args.save_images or args.num_fid_samples
                             or args.cfg_scale not in (None, 1) or args.class_labels == "random"):
            raise UserError("--denoise does without --gif, --save-images, --num-fid-samples, --cfg-scale "
                             "and --class-labels random: drop them")
        if args.denoise not in (None, "test") and args.num_samples:
            raise UserError("--num-samples counts test images: drop it, or pass --denoise test")
        out, gif = Path(args.out), Path(args.out).with_suffix(".gif")
        if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp") or out.is_dir():
            raise UserError(f"--out {args.out} must be a file that ends in .png, .jpg or .webp")
        if args.num_fid_samples and (args.gif or args.num_samples or args.class_labels != "all"):
            raise UserError("--num-fid-samples draws random classes into a folder: drop "
                             "--gif, --num-samples and --class-labels")
        path = newest_run(args.results_dir) if args.ckpt == "latest" else checkpoint.in_folder(args.ckpt)
        device = pick_device(args.device)
        weights = "model" if args.weights == "raw" else "ema"
        model, diffusion, trained = load_run(path, weights, device, args.model)
        if args.compile:                # shapes stay the same and no step looks at numbers: graphs can replay
            model = torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else "default")
        space = trained.get("space")                        # of latents, or None
        clip = args.clip or ("none" if space else "hard")
        args.clip = {"hard": True, "none": False}.get(clip, clip)
        if not args.denoise:
            diffusion.respaced(args.steps)              # refuse a bad --steps before any work
        shape, K = tuple(trained["shape"]), trained["num_classes"]
        text, video = trained.get("text"), len(shape) == 4
        if args.prompt and not text:
            raise UserError("this model reads no text: drop --prompt, or train with --model mdm --cond text")
        if text and args.class_labels != "all":
            raise UserError("this model reads text, not classes: pass --prompt instead of --class-labels")
        if args.levels and not hasattr(diffusion, "sample_levels"):
            raise UserError("--levels shows the resolutions of an mdm, and this model has one: drop it")
        if args.levels and (args.gif or args.num_fid_samples or space):
            raise UserError("--levels goes without --gif, --num-fid-samples and latents: drop them")
        if args.vae and not space:
            raise UserError("this model was trained on pictures, not on latents: drop --vae")
        if args.denoise and space:
            raise UserError("this model was trained on latents, and --denoise is of pictures: use another "
                             "model")
        if video and (args.gif or args.num_fid_samples):
            raise UserError("a video's .gif is always written, and there is no FID of videos: drop --gif "
                             "and --num-fid-samples")
        if args.num_fid_samples and text and not args.prompt:
            raise UserError("this model reads text: add --prompt @captions.txt, a caption a line")
        if args.text_encoder and (not text or text == "bytes"):
            raise UserError("this model reads no T5: drop --text-encoder")
        prompts = read_prompts(args.prompt) or trained["prompts"] if text else []
        can_guide = (K or text) and trained["cond_dropout"] > 0
        if not can_guide and args.cfg_scale not in (None, 1):
            raise UserError("this model never saw images without their class or caption, so it cannot be "
                             "guided: drop --cfg-scale" if K or text else
                             "guidance needs classes or captions, and this model has none: drop --cfg-scale")
        if args.cfg_scale is None:
            args.cfg_scale = 2.0 if can_guide else 1.0
        for folder in (out.resolve().parent, args.save_images):
            if folder:
                os.makedirs(folder, exist_ok=True)
                if not os.access(folder, os.W_OK):
                    raise UserError(f"cannot write into {folder}: choose another --out")
        if text and not encode:         # last: it may take a while
            encode = text_encoder(args.text_encoder or trained["text_encoder"], device)
        args.vae = full_name(args.vae) if args.vae else space and space["vae"]
        vae = latents.VAE(args.vae, device) if space and args.vae != "none" else None
    if args.denoise:
        return denoise.main(args, model, diffusion, trained, device, out)
    options = dict(sampler=args.sampler, steps=args.steps, eta=args.eta, clip=args.clip,
                   cfg_scale=args.cfg_scale)
    decode = decoder(space, vae)

    def condition(spec, numbers):
        """Of the images with these numbers (N,)."""
        if encode:
            return dict(zip(("text", "text_mask"), encode([prompts[i % len(prompts)] for i in numbers])))
        labels = choose_labels(spec, K, args.seed + numbers)
        return {} if labels is None else {"y": labels}

    if args.num_fid_samples:
        settings = {"ckpt": str(path), "sums": checkpoint.sums(path), "weights": weights, "seed": args.seed,
                    "batch_size": args.batch_size, **options, **({"prompts": prompts} if text else {}),
                    **({"vae": args.vae} if space else {})}
        return fid_samples(args, lambda numbers: generate(
            model, diffusion, shape, args.seed + numbers, condition("random", numbers), len(numbers), device,
            progress=False, decode=decode, **options), settings, space["data"] if space else trained["data"])

    kinds = K if args.class_labels == "all" and 0 < K <= 20 else 0
    each = 1 if len(prompts) > 20 else 2 if video else 8 if text else 10
    N = args.num_samples or each * (len(prompts) or kinds) or 16
    with told_plainly():
        cond = condition(args.class_labels, torch.arange(N))
    film = [] if args.gif else None
    images = to_uint8(generate(model, diffusion, shape, args.seed + torch.arange(N), cond, args.batch_size,
                               device, film=film, levels=args.levels, decode=decode,
                               **options))                                         # (N, [T,] H, W, C)
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
