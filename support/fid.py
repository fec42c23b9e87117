"""Many samples in the form that FID tools read: a folder of PNGs and one .npz file.

FID (the Frechet Inception Distance) compares samples with real images. The tools for it bring their own network,
so nothing here computes it. `fid_commands` prints what to type.
"""
import json
import os
import secrets
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from diffusion import UserError
from support import checkpoint
from support.cli import quoted
from support.pictures import save_image, to_pil, to_uint8


def fid_samples(team, folder, N, batch_size, settings, draw, real):
    """Draw N images into `folder` and into <folder>.npz. All processes of torchrun share the work.

    settings   a dict of everything that decides how an image looks. It is kept in settings.json
    draw       numbers of images (B,) -> those images (B, C, H, W) in [-1, 1]
    real       what `python -m support.prepare images` needs to write the real images: the data set, and perhaps flags

    The same call goes on where an earlier one stopped. A process always draws a whole batch, even if some of its
    images exist: rounding may differ with the batch size. Raises UserError if the folder holds other images, or if not
    all processes see the same folder and checkpoint.
    """
    folder, text = Path(folder), json.dumps(settings, indent=1)
    if team.any(team.first(lambda: text) != text):
        raise UserError(f"{settings['ckpt']} is another checkpoint on another machine: copy one to all of them")
    names = [folder / f"{i:06d}.png" for i in range(N)]

    def begin():
        """-> the first number of every batch that is not complete."""
        os.makedirs(folder, exist_ok=True)
        about = folder / "settings.json"
        if any(folder.glob("*.png")) and not (about.exists() and about.read_text() == text):
            raise UserError(f"{folder} holds images that were made with other settings: choose another "
                            f"--save-images")
        if any(p.stem.isdigit() and int(p.stem) >= N for p in folder.glob("*.png")):
            raise UserError(f"{folder} holds more than {N} images: ask for as many, or choose another "
                            f"--save-images")
        checkpoint.replace(about, lambda f: f.write(text.encode()))
        for part in folder.glob(".*.png"):                  # left by a process that was killed
            part.unlink()
        mark.touch()
        return [i for i in range(0, N, batch_size) if not all(name.exists() for name in names[i:i + batch_size])]

    mark = folder / team.first(lambda: f".{secrets.token_hex(8)}.png")     # a name that no other machine can have
    todo = team.first(begin)[team.rank::team.world]
    apart = team.any(not mark.exists())
    if team.rank == 0:
        mark.unlink()
    if apart:
        raise UserError(f"{folder} is another folder on another machine: pass --save-images FOLDER, which they share")
    for start in tqdm(todo, desc="sampling", unit="batch", disable=team.rank > 0):
        numbers = torch.arange(start, min(start + batch_size, N))
        for i, image in zip(numbers.tolist(), to_uint8(draw(numbers))):
            if not names[i].exists():
                save_image(to_pil(image), names[i])
    team.any(False)                                         # wait until all processes are done
    if team.rank == 0:
        shape = (N, *np.atleast_3d(np.asarray(Image.open(names[0]))).shape)              # (N, H, W, C)
        npz = f"{folder}.npz"                               # of its own: other exports may have the same shape
        checkpoint.replace(npz, lambda f: write_npz(f, names, shape))
        print(f"{N} images -> {folder} and {npz} (arr_0, uint8, NHWC)")
        print(fid_commands(folder, npz, real, shape))
    team.leave()


def write_npz(file, names, shape):
    """What np.savez(file, arr_0=images) writes, one image at a time: 50,000 of 256 x 256 pixels are 9.8 GB."""
    with zipfile.ZipFile(file, "w") as archive:
        # an entry without a date, so that equal images give equal files
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, dict(descr="|u1", fortran_order=False, shape=shape))
            for name in names:
                with Image.open(name) as image:
                    array.write(np.asarray(image).tobytes())


def fid_commands(folder, npz, data, shape):
    """The commands that compute FID, one for each tool. Do not compare numbers of different tools."""
    H, W = shape[1:3]
    known = data[0] == "cifar10" and (H, W) == (32, 32)   # the tools know this data set
    real = "cifar10-train" if known else "real"
    clean = "dataset_name='cifar10', dataset_res=32, dataset_split='train'" if known else "'real'"
    once = f"  python -m support.prepare images {quoted([data[0], 'real', *data[1:]])} --image-size {H}x{W}    # once\n"
    return f"""for FID, one of
{once * (not known)}\
  fidelity --gpu 0 --fid --isc --input1 {quoted([str(folder)])} --input2 {real}     # pip install torch-fidelity
  python -c "from cleanfid import fid; print(fid.compute_fid('{folder.as_posix()}', {clean}))"   # pip install clean-fid
  python evaluator.py VIRTUAL_imagenet{H}_labeled.npz {quoted([npz])}     # ImageNet: openai/guided-diffusion"""
