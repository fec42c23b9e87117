"""Many samples, for tools that compute a Frechet distance (FID)."""
import json
import os
import shlex
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from diffusion import UserError
from support import checkpoint
from support.cli import told_plainly
from support.parallel import Team
from support.pictures import save_image, to_pil, to_uint8

def fid_samples(args, generate_part, settings, data_name):
    """N images of random classes, or of the prompts in turn, as PNGs, by all processes of torchrun, then one
    .npz by the first. Goes on where an earlier call with the same settings stopped. A batch is always made as
    a whole, by whomever, since what rounding does to an image may depend on its batch."""
    team, folder, N = Team(torch.device("cpu")), Path(args.save_images or "fid-samples"), args.num_fid_samples
    names = [folder / f"{i:06d}.png" for i in range(N)]

    def begin():
        """-> the first image of every batch that is not complete."""
        os.makedirs(folder, exist_ok=True)
        about, text = folder / "settings.json", json.dumps(settings, indent=1)
        if any(folder.glob("*.png")) and not (about.exists() and about.read_text() == text):
            raise UserError(f"{folder} holds images made with other settings than these: choose "
                             f"another --save-images")
        if (folder / f"{N:06d}.png").exists():
            raise UserError(f"{folder} holds more than {N} images: ask for as many, or choose another "
                             f"--save-images")
        checkpoint.replace(about, lambda f: f.write(text.encode()))
        for part in folder.glob(".*.png"):                  # of a process that was killed
            part.unlink()
        return [i for i in range(0, N, args.batch_size)
                if not all(name.exists() for name in names[i:i + args.batch_size])]

    with told_plainly():
        todo = team.first(begin)[team.rank::team.world]
        for start in tqdm(todo, desc="sampling", unit="batch", disable=team.rank > 0):
            part = torch.arange(start, min(start + args.batch_size, N))
            for i, image in zip(part.tolist(), to_uint8(generate_part(part))):
                if not names[i].exists():
                    save_image(to_pil(image), names[i])
    team.any(False)                                         # all have come so far
    if team.rank == 0:
        shape = (N, *np.atleast_3d(np.asarray(Image.open(names[0]))).shape)                # (N, H, W, C)
        npz = f"samples_{'x'.join(map(str, shape))}.npz"
        with told_plainly():
            checkpoint.replace(npz, lambda f: write_npz(f, names, shape))
        print(f"{N} images -> {folder} and {npz} (arr_0, uint8, NHWC)")
        print(fid_commands(folder, npz, data_name, shape))
    team.leave()


def write_npz(file, names, shape):
    """What np.savez(file, arr_0=images) writes, an image at a time: 50,000 of 256 x 256 are 9.8 GB."""
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as array:    # without a date
            np.lib.format.write_array_header_1_0(array, dict(descr="|u1", fortran_order=False, shape=shape))
            for name in names:
                with Image.open(name) as image:
                    array.write(np.asarray(image).tobytes())


def fid_commands(folder, npz, data_name, shape):
    """What to type for the Frechet distance; figures of different tools must not be compared."""
    H, W = shape[1:3]
    known = data_name == "cifar10" and (H, W) == (32, 32)   # the tools bring its statistics along
    real = "cifar10-train" if known else "real"
    clean = "dataset_name='cifar10', dataset_res=32, dataset_split='train'" if known else "'real'"
    once = f"  python -m support.prepare images {shlex.quote(data_name)} real --image-size {H}x{W}     # once\n"
    return f"""for FID, one of
{once * (not known)}\
  fidelity --gpu 0 --fid --isc --input1 {folder} --input2 {real}     # pip install torch-fidelity
  python -c "from cleanfid import fid; print(fid.compute_fid('{folder}', {clean}))"   # pip install clean-fid
  python evaluator.py VIRTUAL_imagenet{H}_labeled.npz {npz}     # ImageNet: openai/guided-diffusion"""
