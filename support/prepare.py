"""Slow work whose result never changes, done once before training. Also writes data as pictures, to look at.

    python -m support.prepare captions path/to/pictures --text-encoder google/flan-t5-xl    # see text.py
    python -m support.prepare encode path/to/pictures path/to/latents --vae stabilityai/sd-vae-ft-ema   # latents.py
    python -m support.prepare images mnist path/to/pngs
"""
import argparse
import json
import os
import secrets
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from diffusion import UserError
from support import latents
from support.cli import QUIET, Parser, fail, number, run, told_plainly
from support.datasets import expanded, flat, list_images, load, read_captions
from support.parallel import pick_device
from support.pictures import save_image, to_pil
from support.text import TOKENS, cut, full_name, text_encoder, text_files


def store_text(folder, name, device):
    """Run T5 `name` once on each caption of a folder -> the path of the file. Raises UserError."""
    captions = read_captions(folder, list_images(folder)[0])
    if captions is None:
        raise UserError(f"{folder} has no captions: write a metadata.csv with the columns file_name,text, or a "
                        f"metadata.jsonl")
    if name == "bytes":
        raise UserError("bytes needs no file: name a T5, such as google/flan-t5-xl")
    path, about, captions, description = text_files(folder, flat(captions), name)
    encoder = text_encoder(name, device)
    encoder.empty = True
    if not QUIET and (said := cut(encoder, captions)):
        print(said)
    lengths = [encoder.size(caption) for caption in captions]
    shape = (len(captions), min(TOKENS, max(1, *lengths)), encoder.dim)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(part, "wb") as f:     # not a memory map: on a full disk that would crash
            np.lib.format.write_array_header_1_0(f, dict(descr="<f2", fortran_order=False, shape=shape))
            for caption in tqdm(captions, desc="captions", disable=QUIET):
                row = encoder.embed(caption).numpy().tobytes()                      # of (n, dim)
                f.write(row.ljust(2 * shape[1] * shape[2], b"\0"))                  # of (longest, dim)
        about.unlink(missing_ok=True)                       # it must never stand beside a file it does not describe
        os.replace(part, path)
        part.write_text(json.dumps({**description, "lengths": lengths}), "utf8")
        os.replace(part, about)
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror}): make room, or make the folder writable") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def write_images(dataset, folder):
    """Each picture as folder/000000.png -> how many there are. Raises UserError."""
    if len(dataset.shape) != 3:
        raise UserError(f"{dataset.name} holds clips: pass --frames 1, or choose pictures")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: delete it, or choose another folder")
    for i in tqdm(range(len(dataset)), desc="images", unit="image"):
        x = dataset[[i]]["x"][0].permute(1, 2, 0).numpy()                           # (H, W, C)
        save_image(to_pil(x), folder / f"{i:06d}.png")
    return len(dataset)


def captions(args):
    with told_plainly():
        name = full_name(args.text_encoder)
        path = store_text(expanded(args.folder), name, pick_device(args.device))
    print(f"wrote {path} ({path.stat().st_size / 2**20:,.1f} MB)")


def encode(args):
    torch.backends.cudnn.allow_tf32 = False                 # TF32 rounds to ten bits in every layer
    try:
        folder = expanded(args.out)
        vae = latents.VAE(full_name(args.vae), pick_device(args.device))
        dataset = load(args.data, args.data_dir, args.image_size)
        if dataset.has_captions and not QUIET:
            print("the captions are left out: a model of these latents can be told a class, but no caption")
        about = latents.begin(dataset, folder, vae, args.hflip)
        latents.encode(dataset, folder, vae, about, args.batch_size)
        if not QUIET:
            print(latents.summary(folder, about))
    except (UserError, OSError) as e:   # perhaps of this process alone: torchrun then ends the others at once
        fail(e, every_process=True)


def images(args):
    with told_plainly():
        n = write_images(load(args.data, args.data_dir, args.image_size, frames=args.frames), expanded(args.out))
    print(f"{n} PNGs -> {args.out}")


def main(argv=None):
    p = Parser("Does slow work once, before training: text embeddings, latents. Or writes data as PNGs.",
               prog="python -m support.prepare")
    commands = p.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(command, about):
        parser = commands.add_parser(command.__name__, help=about, description=about)
        parser.set_defaults(command=command)
        return parser

    c = add(captions, "Stores a T5's embeddings of a folder's captions in that folder.")
    c.add_argument("folder", type=Path, help="images with a metadata.csv or metadata.jsonl")
    c.add_argument("--text-encoder", metavar="NAME", required=True, default=argparse.SUPPRESS,
                   help="a T5 of Hugging Face, such as google/flan-t5-xl, or its folder")
    e = add(encode, "Stores a VAE's latents of a data set in a folder: 16 KiB for a picture of 256 x 256. If it is "
                    "stopped, the same command continues.")
    e.add_argument("--vae", metavar="NAME", required=True, default=argparse.SUPPRESS,
                   help="an AutoencoderKL of Hugging Face, such as stabilityai/sd-vae-ft-ema, or its folder")
    e.add_argument("--image-size", default="256", help="in pixels, 256 or 192x256 (height x width)")
    e.add_argument("--hflip", action="store_true", help="store the mirror images too: twice as many")
    e.add_argument("--batch-size", type=number(int, 1), default=32, help="pictures at a time, on each device")
    i = add(images, "Writes a data set as PNGs, for example to compare samples with.")
    i.add_argument("--image-size", help="32, or HxW such as 24x40 (default: the data's own)")
    i.add_argument("--frames", type=number(int, 1), help="1: the first frame of each clip of moving")
    for command in (c, e):
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    for command in (e, i):
        command.add_argument("data", help="shapes, mnist, fashion, cifar10 or a folder of images")
        command.add_argument("out", type=Path, help="the folder to make")
        command.add_argument("--data-dir", help="where files are, or are downloaded to (default: a cache)")
    args = p.parse_args(argv)
    args.command(args)


if __name__ == "__main__":
    run(main)
