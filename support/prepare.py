"""Computes beforehand what training would compute again and again; or shows the data."""
import argparse
import json
import os
import secrets
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from diffusion import UserError
from support import checkpoint, latents
from support.cli import QUIET, Parser, fail, number, run, told_plainly
from support.datasets import list_images, load, read_captions
from support.parallel import pick_device
from support.text import full_name, text_encoder, text_files

def store_text(folder, name, device):
    """Run a T5 once on each different caption of a folder, for `load` to find. -> the file's path"""
    captions = read_captions(folder, list_images(folder))
    if captions is None:
        raise UserError(f"{folder} has no captions: write a metadata.csv with the columns file_name,text")
    if name == "bytes":
        raise UserError("bytes needs no file: name a T5, such as google/flan-t5-xl")
    path, about, captions, describes = text_files(folder, captions, name)
    encoder = text_encoder(name, device)
    lengths = [len(encoder.tokens(caption)) for caption in captions]
    shape = (len(captions), max(1, *lengths), encoder.dim)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(part, "wb") as f:     # written in order, not mapped: a full disk is an error, not a crash
            np.lib.format.write_array_header_1_0(f, dict(descr="<f2", fortran_order=False, shape=shape))
            for caption in tqdm(captions, desc="captions", disable=QUIET):
                row = encoder.embed(caption).numpy().tobytes()                      # of (n, dim)
                f.write(row.ljust(2 * shape[1] * shape[2], b"\0"))                  # to (L, dim)
        about.unlink(missing_ok=True)                       # so that it never describes another file
        os.replace(part, path)
        part.write_text(json.dumps({**describes, "lengths": lengths}))
        os.replace(part, about)
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror}): make room, or the folder writable") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def write_images(dataset, folder):
    """Each as folder/000000.png -> how many."""
    if len(dataset.shape) != 3:
        raise UserError(f"{dataset.name} holds clips: choose pictures")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: delete it, or choose another folder")
    for i in tqdm(range(len(dataset)), desc="images", unit="image"):
        x = dataset[[i]]["x"][0].permute(1, 2, 0).numpy()                           # (H, W, C)
        picture = Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)
        checkpoint.replace(folder / f"{i:06d}.png", lambda f: picture.save(f, "PNG"))
    return len(dataset)


def main(argv=None):
    p = Parser("Computes beforehand what training would compute again and again; or shows the data.")
    commands = p.add_subparsers(dest="command", metavar="COMMAND", required=True)
    about = "Stores the embeddings of a folder's captions in it."
    c = commands.add_parser("captions", help=about, description=about)
    c.add_argument("folder", type=Path, help="images with a metadata.csv")
    c.add_argument("--text-encoder", metavar="NAME", required=True, default=argparse.SUPPRESS,
                   help="a T5 of Hugging Face, such as google/flan-t5-xl, or its folder")
    about = "Stores a VAE's latents of a data set in a folder; goes on where it was stopped."
    e = commands.add_parser("encode", help=about, description=about)
    e.add_argument("data", help="shapes, mnist, fashion, cifar10 or a folder of images")
    e.add_argument("out", type=Path, help="the folder to make: 16 KiB a picture of 256 x 256")
    e.add_argument("--vae", metavar="NAME", required=True, default=argparse.SUPPRESS,
                   help="an AutoencoderKL of Hugging Face, such as stabilityai/sd-vae-ft-ema, or its folder")
    e.add_argument("--image-size", default="256", help="in pixels, 256 or 192x256 (height x width)")
    e.add_argument("--data-dir", help="where files lie or are downloaded to")
    e.add_argument("--hflip", action="store_true", help="store the mirror images too, which doubles all")
    e.add_argument("--batch-size", type=number(int, 1), default=32, help="pictures at a time, on each device")
    for command in (c, e):
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    about = "Writes a data set as PNGs, for example to compare samples with."
    i = commands.add_parser("images", help=about, description=about)
    i.add_argument("data", help="shapes, mnist, fashion, cifar10 or a folder of images")
    i.add_argument("out", type=Path, help="the folder to make")
    i.add_argument("--image-size", help="32, or HxW such as 24x40 (default: the data's own)")
    i.add_argument("--data-dir", help="where files lie or are downloaded to")
    args = p.parse_args(argv)
    if args.command == "images":
        with told_plainly():
            return print(f"{write_images(load(args.data, args.data_dir, args.image_size), args.out)} PNGs -> "
                         f"{args.out}")
    if args.command == "captions":
        with told_plainly():
            name = full_name(args.text_encoder)
            path = store_text(args.folder.expanduser(), name, pick_device(args.device))
        return print(f"wrote {path} ({path.stat().st_size / 2**20:,.1f} MB)")
    torch.backends.cudnn.allow_tf32 = False                 # which rounds to ten bits in every layer
    folder = args.out.expanduser()
    try:
        vae = latents.VAE(full_name(args.vae), pick_device(args.device))
        dataset = load(args.data, args.data_dir, args.image_size)
        about = latents.begin(dataset, folder, vae, args.hflip)
        latents.encode(dataset, folder, vae, about, args.batch_size)
        if not QUIET:
            print(latents.summary(folder, about))
    except (ValueError, OSError) as e:      # of one process alone, perhaps; torchrun ends the others at once
        fail(e, every_process=True)


if __name__ == "__main__":
    run(main)
