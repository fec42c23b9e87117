"""Latents: diffusion in the space of a frozen autoencoder (VAE). Each picture is encoded once, before training.

    python -m support.prepare encode DATA OUT --vae stabilityai/sd-vae-ft-ema --image-size 256 --hflip
    torchrun --standalone --nproc_per_node=8 -m support.prepare encode DATA OUT ...     the same files, sooner

    dataset = latents.load(OUT)                     a datasets.Dataset; x0 = dataset.prepare(batch["x"], seeds)
    images = latents.VAE(name, device).decode(z0, scale, shift)

A VAE's encoder gives a mean and a standard deviation for each element of a latent. Both are stored, so that training
draws a new latent each time, as DiT (Peebles & Xie 2022, 2212.09748) does by encoding during training:

    latents.json    describes the other files; written before the latents
    labels.npy      int64 (N,), if there are classes
    00000.npy ...   float16 (n, 2C, h, w): means, then standard deviations, of n = 1024 examples, fewer in the last.
                    Examples 0 to N - 1 are the pictures; with --hflip, N to 2N - 1 are their mirror images

A file appears only when it is whole. Its number decides which examples it holds; device and batch size change only the
rounding. So you may stop at any time: the same command goes on, on any number of processes. You need diffusers to
encode and decode, not to train.
"""
import io
import itertools
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from diffusion import UserError
from support.cli import QUIET, processes
from support.datasets import Dataset, digest, expanded
from support.text import full_name, pretrained

CHUNK = 1024                                                # examples a file: 16 MiB of 4x32x32 latents
AGAIN = "delete it and run the same python -m support.prepare encode again"


class VAE:
    """A diffusers AutoencoderKL, frozen, in float32. name: its name on Hugging Face, or a folder. Raises UserError if
    diffusers is missing, the VAE cannot be loaded, or its latents do not have `channels`.

    scale, shift    as its config has them
    C, colours      channels of a latent, of a picture
    factor          so many pixels, along each side, become one element of a latent
    """

    def __init__(self, name, device="cpu", channels=None):
        if QUIET:                                           # one of torchrun's processes shows the download
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        try:
            from diffusers import AutoencoderKL             # nothing else here needs it
        except ImportError:
            raise UserError("a VAE (--vae) needs one more package: pip install diffusers") from None

        def load(local):
            return AutoencoderKL.from_pretrained(name, local_files_only=local, output_loading_info=True)

        self.model = pretrained("VAE", name, load, "stabilityai/sd-vae-ft-ema").to(device)
        config = self.model.config
        self.name, self.device = name, torch.device(device)
        self.scale, self.shift = config.scaling_factor, getattr(config, "shift_factor", None) or 0.0
        self.C, self.colours = config.latent_channels, config.in_channels
        if channels not in (None, self.C):
            raise UserError(f"{name} decodes {self.C} channels, and these latents have {channels}: pass the VAE that "
                            f"encoded them")
        self.factor = 2 ** (len(config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, x):
        """Pictures (B, colours, H, W) in [-1, 1] -> mean, std (B, C, h, w), as the encoder gives them."""
        with torch.autocast(self.device.type, enabled=False):
            latent = self.model.encode(x.to(self.device).float()).latent_dist
        return latent.mean, latent.std

    @torch.no_grad()
    def decode(self, z0, scale, shift):
        """Latents (B, C, h, w) as a network learns them -> pictures (B, colours, H, W) in [-1, 1]. While it is decoded,
        each picture of 256 x 256 takes a quarter of a GiB. All are decoded at once, so pass few at a time."""
        with torch.autocast(self.device.type, enabled=False):
            return self.model.decode(z0.to(self.device).float() / scale + shift).sample.clamp(-1, 1)


# --- writing -------------------------------------------------------------------------------------

def chunk_path(folder, k):
    return Path(folder) / f"{k:05d}.npy"


def put(path, content):
    """Write an array or a str to a file beside `path`, then rename it. (A memory map would crash on a full disk.)
    Raises UserError if there is no room, or if another process writes the same."""
    buffer = io.BytesIO()
    if isinstance(content, str):
        buffer.write(content.encode())
    else:
        np.save(buffer, content, allow_pickle=False)
    part = path.with_name(f".{path.name}.rank{processes()[0]}.part")
    try:
        with open(part, "xb") as f:
            f.write(buffer.getbuffer())
        os.replace(part, path)
    except FileExistsError:
        raise UserError(f"another process is writing {path}: run one, or several by torchrun") from None
    except OSError as e:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({e.strerror}): make room, or make the folder writable") from None


def begin(dataset, folder, vae, hflip=False):
    """Check that the VAE takes these pictures and that the folder holds no other latents; write its description.
    Every process does all of this. -> the description, for `encode`. Raises UserError."""
    if len(dataset.shape) != 3:
        raise UserError(f"{dataset.name} holds clips, and a VAE takes pictures: choose other data")
    colours, H, W = dataset.shape
    f = vae.factor
    if colours not in (1, vae.colours):
        raise UserError(f"{dataset.name} has {colours} channels, but {vae.name} takes {vae.colours}: choose another "
                        f"VAE")
    if H % f or W % f:
        raise UserError(f"{vae.name} turns {f}x{f} pixels into one, which does not divide {H}x{W}: pass "
                        f"--image-size {-(-H // f) * f}x{-(-W // f) * f}")
    labels = dataset.labels.numpy() if dataset.num_classes else None
    about = {"vae": vae.name, "scale": vae.scale, "shift": vae.shift, "data": full_name(dataset.name),
             "images": len(dataset), "copies": 2 if hflip else 1, "shape": [vae.C, H // f, W // f],
             "image_shape": [vae.colours, H, W], "class_names": dataset.class_names,
             "labels": None if labels is None else digest(labels.astype("<i8").tobytes()),
             "files": dataset.files, "chunk": CHUNK}
    folder, (rank, world) = Path(folder), processes()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob(".*.part"):                 # left by killed runs, perhaps with more processes
            owner = re.search(r"\.rank(\d+)\.part$", part.name)
            if owner and int(owner[1]) % world == rank:
                part.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"cannot write into {folder} ({e.strerror}): choose a folder of yours") from None
    used = any(folder.glob("[0-9]*.npy"))                   # look at these first: they are written last
    if used or (folder / "latents.json").exists():
        found = read_description(folder)
        changed = [k for k in about if found.get(k, about[k]) != about[k]]         # earlier ones have no "files"
        if changed:
            raise UserError(f"{folder} holds latents made with other settings ({', '.join(changed)}): choose "
                            f"another folder, or delete it")
    if labels is not None and not (folder / "labels.npy").exists():
        put(folder / "labels.npy", labels)
    if not (folder / "latents.json").exists():
        put(folder / "latents.json", json.dumps(about, indent=1))
    return about


def encode(dataset, folder, vae, about, batch_size=32):
    """Write this process's share of the missing files. about: what `begin` returned. Raises UserError."""
    (rank, world), N, n = processes(), len(dataset), about["copies"] * len(dataset)
    todo = [range(i, min(i + CHUNK, n)) for i in range(0, n, CHUNK)][rank::world]
    todo = [chunk for chunk in todo if not chunk_path(folder, chunk[0] // CHUNK).exists()]
    # it takes longer to read pictures than to encode them on a GPU; PIL lets several threads decode at once
    with (ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
          tqdm(total=sum(map(len, todo)), desc="encoding", unit="image", disable=rank > 0) as bar):
        for chunk in todo:
            batches = [np.array(chunk[i:i + batch_size]) for i in range(0, len(chunk), batch_size)]
            stored = []
            # eight batches ahead: `map` would read the whole chunk into memory
            ahead = [pool.submit(lambda i: dataset[i % N], i) for i in batches[:8]]
            for i, later in itertools.zip_longest(batches, batches[8:]):
                batch = ahead.pop(0).result()
                if later is not None:
                    ahead.append(pool.submit(lambda i: dataset[i % N], later))
                x = dataset.prepare(batch["x"].to(vae.device), None)                # (B, 1 or colours, H, W)
                mirror = torch.from_numpy(i >= N).to(x.device).view(-1, 1, 1, 1)    # (B, 1, 1, 1)
                x = torch.where(mirror, x.flip(-1), x).expand(-1, vae.colours, -1, -1)
                z = torch.cat(vae.encode(x), dim=1).half()                          # (B, 2C, h, w)
                if not z.isfinite().all():
                    raise UserError(f"{vae.name} turns {dataset.name} into numbers that float16 cannot hold: "
                                    f"choose another VAE")
                stored.append(z.cpu())
                bar.update(len(i))
            put(chunk_path(folder, chunk[0] // CHUNK), torch.cat(stored).numpy())


# --- reading -----------------------------------------------------------------------------------

class Chunks:
    """A function of indices -> float16 (B, 2C, h, w). A file is checked when it is first needed. We read it, because a
    process that maps a file dies (SIGBUS) if another one cuts it."""

    def __init__(self, folder, about):
        C, h, w = about["shape"]
        self.folder, self.shape, self.chunk = Path(folder), (2 * C, h, w), about["chunk"]
        self.n, self.starts = about["copies"] * about["images"], {}
        self.paths = [chunk_path(folder, k) for k in range(-(-self.n // self.chunk))]

    def shape_of(self, k):
        return min(self.chunk, self.n - k * self.chunk), *self.shape

    def start(self, k):
        """The place in file k, in bytes, where its numbers begin."""
        if k not in self.starts:
            try:
                found = np.load(self.paths[k], mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as e:
                raise UserError(f"{self.paths[k]} cannot be read ({e}): {AGAIN}") from None
            if getattr(found, "shape", None) != self.shape_of(k) or found.dtype != np.float16:
                raise UserError(f"{self.paths[k]} is no float16 array of shape {self.shape_of(k)}: {AGAIN}")
            self.starts[k] = found.offset
        return self.starts[k]

    def __call__(self, indices):
        x = np.empty((len(indices), *self.shape), np.float16)
        for row, i in zip(x, indices.tolist()):
            k, i = divmod(i, self.chunk)
            start = self.start(k)
            try:
                with open(self.paths[k], "rb", buffering=0) as f:
                    f.seek(start + i * row.nbytes)
                    whole = f.readinto(row) == row.nbytes
            except OSError as e:
                raise UserError(f"{self.paths[k]} cannot be read ({e}): {AGAIN}") from None
            if not whole:
                raise UserError(f"{self.paths[k]} is cut short: {AGAIN}")
        return x                                                                    # (B, 2C, h, w)


def read_description(folder):
    try:
        about = json.loads((Path(folder) / "latents.json").read_text("utf8"))
        for key in ("vae", "scale", "shift", "image_shape", "class_names", "labels"):
            about[key]
        Chunks(folder, about)
        return about
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} has no latents.json, so python -m support.prepare encode did not make it: choose "
                        f"another folder") from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder}/latents.json cannot be read ({e!r}): encode into a new folder") from None


def statistics(folder, about):
    """Mean and standard deviation (C,) of the first file, as a network sees it."""
    chunks = Chunks(folder, about)
    first = chunks(np.arange(min(chunks.chunk, chunks.n)))                          # (n, 2C, h, w)
    mean, std = torch.from_numpy(first.astype(np.float32)).chunk(2, dim=1)
    over = (0, 2, 3)
    variance = mean.var(over, correction=0) + std.square().mean(over)               # (C,)
    return (mean.mean(over) - about["shift"]) * about["scale"], variance.sqrt() * about["scale"]


def summary(folder, about):
    """What the user is told at the end."""
    chunks = Chunks(folder, about)
    left = sum(not path.exists() for path in chunks.paths)
    mean, std = (" ".join(f"{x:.2f}" for x in xs.tolist()) for xs in statistics(folder, about))
    shape = "x".join(map(str, about["shape"]))
    return (f"{folder}: {chunks.n:,} latents of {shape}"
            + (f"; other processes are still writing {left} of {len(chunks.paths)} files" if left else "")
            + f"\nchannels have mean {mean} and std {std} (of the first "
              f"{min(CHUNK, chunks.n)}; about 0 and 1, if the VAE suits them)")


def load(folder):
    """The Dataset of what `python -m support.prepare encode` stored. Its shape is (C, h, w); "x" of a batch is float16
    (B, 2C, h, w), for `Dataset.prepare`. Checks the sizes of the files of latents, but reads none. Raises UserError."""
    folder = expanded(folder)
    about = read_description(folder)
    chunks, labels = Chunks(folder, about), None
    sizes = [path.stat().st_size if path.exists() else None for path in chunks.paths]
    if None in sizes:
        raise UserError(f"{folder} lacks {sizes.count(None)} of {len(sizes)} files of latents: run the same "
                        f"python -m support.prepare encode again, it goes on where it stopped")
    for k, size in enumerate(sizes):
        if size <= 2 * math.prod(chunks.shape_of(k)):       # bytes, without the header
            raise UserError(f"{chunks.paths[k]} is cut short: {AGAIN}")
    if about["class_names"]:
        try:
            labels = np.load(folder / "labels.npy", allow_pickle=False)             # (N,)
            if digest(labels.astype("<i8").tobytes()) != about["labels"]:
                raise ValueError
        except (OSError, ValueError, EOFError):
            raise UserError(f"{folder}/labels.npy is missing or damaged: {AGAIN}") from None
        labels = np.tile(labels, about["copies"])                                   # (copies N,)
    return Dataset(str(folder), about["shape"], chunks, chunks.n, labels, about["class_names"],
                   latents={k: about[k] for k in ("data", "vae", "scale", "shift", "image_shape")},
                   files=about.get("files"))
