"""Images for training: drawn, downloaded, or your own.

    name       native size   images    test  labels          comes from
    shapes     3x32x32 *     65,536   4,096  8 shapes        drawn on the fly, with captions
    moving     3x8x32x32 *   65,536   4,096  8 shapes        the same, on their way: clips of 8 frames
    mnist      1x28x28       60,000  10,000  10 digits       download, 11 MB
    fashion    1x28x28       60,000  10,000  10 garments     download, 29 MB
    cifar10    3x32x32       50,000  10,000  10 things       download, 162 MB
    a/folder   its images'      all       -  its subfolders  png, jpg, webp, bmp, gif; captions from
                                                             metadata.csv (columns file_name,text)
    * or any other, drawn sharply

`load` returns a Dataset. Indexed with a list it gives a whole batch, so that a worker process
prepares batches and nothing is left to collate:

    dataset = load("mnist")
    dataset[[3, 5]] -> {"x": uint8 (2, 1, 28, 28), "y": long (2,)}      and "caption": list of str
    DataLoader(dataset, batch_size=None, sampler=batch_order(...))

Your own images need no code: pass the folder. For anything else write a function that returns a
Dataset, as `shapes` does below, and give it a line in `load`.

What is slow and stays the same can be computed once, before training: what a T5 (`text_encoder`) makes of a
folder's captions, and what a VAE makes of pictures (latents.py reads that):

    python data.py captions path/to/pictures --text-encoder google/flan-t5-xl
    python data.py encode path/to/pictures path/to/latents --vae stabilityai/sd-vae-ft-ema --hflip
"""
import argparse
import csv
import difflib
import functools
import glob
import gzip
import hashlib
import http.client
import inspect
import json
import logging
import math
import os
import re
import secrets
import shutil
import signal
import tarfile
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
from diffusion import fold, normal
from parallel import Parser, fail, number, pick_device, run, told_plainly

IN_MEMORY = 2**30                                       # bytes; more is decoded batch by batch
QUIET = os.environ.get("RANK", "0") != "0"              # one of torchrun's processes shows progress


class DataError(ValueError):
    """Something the user can put right. The message is one sentence that says how."""


class Dataset:
    """name, shape = (C, H, W), or (C, T, H, W) of clips, num_classes (0: no labels), class_names,
    has_captions, len(), and batches: dataset[indices], see above; `prepare` makes x0 of their "x".
    latents: None for pictures, else a dict: data, image_shape of the pictures, vae (a name), scale, shift."""

    def __init__(self, name, shape, images, length, labels=None, class_names=(), captions=None, texts=None,
                 latents=None):
        """images: uint8 array (N, C, H, W), or a function: B indices -> (B, C, H, W), which
        must survive pickling to reach workers; labels: N integers; captions: N strings;
        texts: what makes tensors of captions fast, a StoredText or ByteText, if there is one. With
        `latents`, images are float16 (N, 2C, h, w): means, then standard deviations, of latents (C, h, w)."""
        self.name, self.shape, self.images, self.length = name, tuple(shape), images, length
        self.class_names, self.num_classes = list(class_names), len(class_names)
        self.labels = torch.tensor(labels).long() if self.num_classes else None
        self.captions, self.has_captions, self.texts = captions, captions is not None, texts
        self.latents = latents

    def __len__(self):
        return self.length

    def __getitem__(self, indices):
        indices = np.asarray(indices)                                               # (B,)
        # in numpy: torch would use threads, which for so few bytes wait longer than they work
        x = self.images(indices) if callable(self.images) else self.images[indices]
        batch = {"x": torch.from_numpy(x)}                                          # (B, C, H, W)
        if self.num_classes:
            batch["y"] = self.labels[indices]                                       # (B,)
        if self.has_captions:
            batch["caption"] = [self.captions[i] for i in indices]
        if self.texts:              # half the bytes to move: .float() is for where they are used
            # (B, L, dim), (B, L)
            batch["text"], batch["text_mask"] = self.texts(batch["caption"], half=True)
        return batch

    def prepare(self, x, seeds):
        """"x" of a batch, on any device -> x0 float32 (B, C, ..), what a network learns: pictures in [-1, 1];
        latents drawn anew from their distributions, shifted and scaled to about N(0, 1). seeds (B,) long, on
        x's device, decide the draw; pictures need none."""
        if not self.latents:
            return x.float() / 127.5 - 1
        mean, std = x.float().chunk(2, dim=1)                                       # (B, C, h, w) each
        z = mean + std * normal(fold(seeds, 4), self.shape)     # train.py draws the rest from 0 to 3
        return (z - self.latents["shift"]) * self.latents["scale"]

    def subset(self, keep):
        """The Dataset of the examples `keep` alone: indices, or a bool for each."""
        keep = np.arange(self.length)[keep]                                         # (M,)
        images = functools.partial(take_of, self.images, keep)
        labels = self.labels.numpy()[keep] if self.num_classes else None
        captions = [self.captions[i] for i in keep] if self.has_captions else None
        return Dataset(self.name, self.shape, images, len(keep), labels, self.class_names, captions,
                       self.texts, self.latents)


def take_of(images, keep, indices):
    return images(keep[indices]) if callable(images) else images[keep[indices]]


def hold_out(dataset, phrases):
    """The Dataset without the examples whose caption contains one of `phrases`, as whole words."""
    if not dataset.has_captions:
        raise DataError(f"{dataset.name} has no captions to hold out: use shapes, moving or a folder with a "
                        f"metadata.csv")
    keep = np.ones(len(dataset), bool)
    for phrase in phrases:
        words = r"\s+".join(map(re.escape, phrase.split())) or "(?!)"               # that matches nothing
        found = re.compile(rf"(?<![\w-]){words}(?![\w-])", re.IGNORECASE).search    # dark-red is a word
        held = np.array([found(caption) is not None for caption in dataset.captions])
        if not held.any():
            raise DataError(f"no caption of {dataset.name} contains {phrase!r}: hold out words as in "
                            f"{dataset.captions[0]!r}")
        keep &= ~held
    if not keep.any():
        raise DataError(f"without {' and '.join(phrases)} nothing of {dataset.name} is left: hold out less")
    return dataset.subset(keep)


def load(name, data_dir=None, image_size=None, split="train", text_encoder=None, frames=None):
    """A Dataset by name or folder.

    data_dir    where the files lie or are downloaded to; None: ~/.cache/four-denoisers
    image_size  in pixels, as `parse_size` takes it; None: native. Digits and garments are padded
                to larger sizes, other pictures scaled to cover the size and cropped in the middle
    split       "train" or "test"
    text_encoder  whose name: if `python data.py captions FOLDER --text-encoder NAME` was run on this
                folder, batches hold "text" float16 (B, L, dim) and "text_mask" (B, L), too
    frames      of clips; 1: their first frames, as pictures; None: 8

    Raises DataError for all that can be wrong with names, files and sizes.
    """
    size = None if image_size is None else parse_size(image_size)
    root = Path(data_dir or "~/.cache/four-denoisers").expanduser()
    if split not in ("train", "test"):
        raise DataError(f"no split {split!r}: choose train or test")
    if name == "moving":
        return moving(size or (32, 32), split, 8 if frames is None else frames)
    if frames is not None:
        raise DataError(f"{name} has no frames: drop --frames, or pass --data moving")
    if name == "shapes":
        return shapes(size or (32, 32), split)
    if name in ("mnist", "fashion"):
        return digits(name, root, size, split)
    if name == "cifar10":
        return cifar10(root, size, split)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        names = ["shapes", "moving", "mnist", "fashion", "cifar10"]
        close = difflib.get_close_matches(str(name).lower(), names, n=1)
        guess = f", did you mean {close[0]}" if close else ""
        raise DataError(f"no data set or folder {str(name)!r}{guess}: choose {', '.join(names)}, "
                        f"or a path to a folder of images")
    if split == "test":
        raise DataError(f"folder {name} has no test split: pass the folder of your test images")
    return image_folder(str(name), folder, size, text_encoder)


def parse_size(size):
    """32, "32", "24x40" or (24, 40) -> (H, W) in pixels. DataError if unparsable or below 8."""
    parts = size.lower().split("x") if isinstance(size, str) else np.atleast_1d(size).tolist()
    try:
        H, W = [int(n) for n in (parts * 2 if len(parts) == 1 else parts)]
    except ValueError:
        raise DataError(f"image size {size!r} not understood: write 32, or 24x40 for height x "
                        f"width") from None
    if min(H, W) < 8:
        raise DataError(f"image size {H}x{W} is too small: use at least 8 pixels a side")
    return H, W


# --- the order of training examples -----------------------------------------------------------

@functools.lru_cache(maxsize=2)         # a batch rarely touches more than two epochs
def permutation(seed, epoch, n):
    return np.random.default_rng((seed, epoch)).permutation(n)


class batch_order:                      # lower case like range, which it resembles
    """The indices (hi - lo,) of each training step: slots lo to hi - 1 of its global batch.

    Slot s of step k is number k * global_batch_size + s of an endless sequence: one shuffled pass
    over all examples after another. There is no state: to resume is to pass another first_step, and
    processes split a batch by lo and hi, whatever their number.
    """

    def __init__(self, num_examples, seed, global_batch_size, first_step, last_step, lo, hi):
        self.n, self.seed, self.batch = num_examples, seed, global_batch_size
        self.steps, self.slots = range(first_step, last_step), np.arange(lo, hi)

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        for step in self.steps:
            epoch, place = np.divmod(step * self.batch + self.slots, self.n)
            indices = np.empty_like(place)
            for e in np.unique(epoch):
                now = epoch == e
                indices[now] = permutation(self.seed, int(e), self.n)[place[now]]
            yield indices                                                          # (hi - lo,)


# --- shapes ------------------------------------------------------------------------------------
# A shape is its signed distance: negative inside, in units of its radius, x to the right and y up.
# Each fits the square from -1 to 1. Distances need be right only near the outline, where they
# become the coverage of a pixel, that is, anti-aliasing.

def star(x, y, points, inner):
    """Tips at radius 1, one of them up, notches at `inner`."""
    half = math.pi / points                                 # the angle from a tip to a notch
    angle = np.abs((np.arctan2(x, y) + half) % (2 * half) - half)       # fold: one edge remains
    r = np.hypot(x, y)
    dx, dy = inner * math.cos(half) - 1, inner * math.sin(half)         # from tip (1, 0) to notch
    return ((r * np.cos(angle) - 1) * dy - r * np.sin(angle) * dx) / math.hypot(dx, dy)


def heart(x, y):
    """A square standing on a corner, half its diagonal h, and a disc on each of its upper sides."""
    h = 2 / (1 + math.sqrt(2))
    x, y = np.abs(x), y + 0.086                             # centred in height
    return np.minimum((x + np.abs(y) - h) * math.sqrt(0.5),
                      np.hypot(x - h / 2, y - h / 2) - h * math.sqrt(0.5))


SHAPES = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.88,
    "triangle": lambda x, y: star(x, y + 0.2, 3, 0.5) - 0.04,
    "cross": lambda x, y: np.minimum(np.maximum(np.abs(x) - 1, np.abs(y) - 0.3),
                                     np.maximum(np.abs(y) - 1, np.abs(x) - 0.3)),
    "star": lambda x, y: star(x, y, 5, 0.5),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.76) - 0.24,
    "heart": heart,
    "moon": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.82 - np.hypot(x - 0.5, y - 0.15)),
}
COLOURS = {"red": (214, 39, 40), "orange": (250, 135, 20), "yellow": (238, 210, 20),
           "green": (34, 150, 60), "blue": (40, 90, 220), "purple": (140, 50, 190)}
SIZES = {"small": 0.30, "big": 0.42}                        # radius / the picture's shorter side
BACKGROUND = (245, 244, 240)


def draw_shapes(kind, centre, radius, colour, H, W):
    """One shape a picture, uint8 (B, 3, H, W). The frames of a video are just a batch here.

    kind (B,) places in SHAPES; centre (B, 2) as y, x from the top left corner and radius (B,), both
    in pixels; colour (B, 3) from 0 to 255.
    """
    scale = radius.astype(np.float32)[:, None, None]
    y = (centre[:, :1, None] - 0.5 - np.arange(H)[:, None]) / scale                 # (B, H, 1)
    x = (np.arange(W) + 0.5 - centre[:, 1:, None]) / scale                          # (B, 1, W)
    x, y = x.astype(np.float32), y.astype(np.float32)
    distance = np.empty((len(kind), H, W), np.float32)
    for k, signed_distance in enumerate(SHAPES.values()):
        these = kind == k
        distance[these] = signed_distance(x[these], y[these])
    cover = np.clip(0.5 - distance * scale, 0, 1)[:, None]                          # (B, 1, H, W)
    paper = np.array(BACKGROUND, np.float32)[:, None, None]                         # (3, 1, 1)
    ink = np.asarray(colour, np.float32)[:, :, None, None]                          # (B, 3, 1, 1)
    return (paper + cover * (ink - paper) + 0.5).astype(np.uint8)                   # (B, 3, H, W)


def things(split, radii, shorter_side):
    """What image i shows is a function of i alone; the test split goes on where training ends."""
    i = np.arange(65536) if split == "train" else np.arange(65536, 65536 + 4096)
    kind, colour, big = i % 8, i // 8 % 6, i // 48 % 2      # all combinations, equally often
    kinds, colours, sizes = list(SHAPES), list(COLOURS), list(SIZES)
    captions = [f"a {sizes[b]} {colours[c]} {kinds[k]}" for k, c, b in zip(kind, colour, big)]
    # Multiples of two irrational numbers, modulo 1, fill a square more evenly than random points.
    where = i[:, None] * np.array([0.7548776662466927, 0.5698402909980532]) % 1     # (N, 2)
    radius = np.array(radii)[big] * shorter_side                                    # (N,)
    ink = np.array(list(COLOURS.values()))[colour]                                  # (N, 3)
    return i, kind, captions, where, radius, ink


def shapes(size, split):
    i, kind, captions, where, radius, ink = things(split, list(SIZES.values()), min(size))
    margin = radius[:, None] + 0.5                          # half a pixel for the soft outline
    centre = margin + where * (np.array(size) - 2 * margin)                         # (N, 2)
    images = functools.partial(shapes_batch, kind, centre, radius, ink, *size)
    return Dataset("shapes", (3, *size), images, len(i), kind, list(SHAPES), captions)


def shapes_batch(kind, centre, radius, ink, H, W, rows):
    return draw_shapes(kind[rows], centre[rows], radius[rows], ink[rows], H, W)     # (B, 3, H, W)


DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}      # as y, x


def moving(size, split, frames):
    """Clips: smaller shapes, each at a constant speed, all the time inside the picture. One frame: images."""
    i, kind, captions, where, radius, ink = things(split, [0.17, 0.25], min(size))
    direction = i // 96 % 4                                 # every thing goes everywhere, equally often
    captions = [f"{c} moving {list(DIRECTIONS)[d]}" for c, d in zip(captions, direction)]
    room = np.array(size) - 2 * radius[:, None] - 1         # for the centre, (N, 2)
    way = np.array(list(DIRECTIONS.values()))[direction] * np.minimum(0.4 * np.array(size), room)
    start = radius[:, None] + 0.5 + where * (room - abs(way)) - np.minimum(way, 0)  # (N, 2), as way
    shape = (3, frames, *size) if frames > 1 else (3, *size)
    images = functools.partial(moving_batch, kind, start, way, radius, ink, frames, *size)
    return Dataset("moving", shape, images, len(i), kind, list(SHAPES), captions)


def moving_batch(kind, start, way, radius, ink, T, H, W, rows):
    share = np.linspace(0, 1, T)[:, None]                   # of the way, (T, 1)
    centre = (start[rows, None] + way[rows, None] * share).reshape(-1, 2)           # (B T, 2)
    kind, radius, ink = (np.repeat(a[rows], T, 0) for a in (kind, radius, ink))
    frames = draw_shapes(kind, centre, radius, ink, H, W)                           # (B T, 3, H, W)
    if T == 1:
        return frames                                                               # (B, 3, H, W)
    return np.ascontiguousarray(frames.reshape(-1, T, 3, H, W).swapaxes(1, 2))      # (B, 3, T, H, W)


# --- arrays: MNIST, Fashion-MNIST, CIFAR-10 ----------------------------------------------------

CLASSES = {
    "mnist": "0 1 2 3 4 5 6 7 8 9".split(),
    "fashion": "T-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split(),
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split()}
MIRRORS = {
    "mnist": ["https://ossci-datasets.s3.amazonaws.com/mnist/",
              "https://storage.googleapis.com/cvdf-datasets/mnist/"],
    "fashion": ["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"],
    "cifar10": ["https://www.cs.toronto.edu/~kriz/"]}
MD5 = {
    "mnist": {"train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
              "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
              "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
              "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"},
    "fashion": {"train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
                "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
                "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310"},
    "cifar10": {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}}
AGAIN = "put a good copy in its place, or move it away to have it downloaded"


def digits(name, root, size, split):
    part = "train" if split == "train" else "t10k"
    x_path = locate(name, f"{part}-images-idx3-ubyte.gz", root)
    y_path = locate(name, f"{part}-labels-idx1-ubyte.gz", root)
    x, y = read_idx(x_path, 3)[:, None], read_idx(y_path, 1)              # (N, 1, 28, 28), (N,)
    if len(x) != len(y) or not len(x):
        raise DataError(f"{x_path} has {len(x)} images and {y_path} {len(y)} labels: put the two "
                        f"files of one download there")
    return array_dataset(name, x, y, y_path, size, pad=True)


def read_idx(path, ndim):
    """Gzipped idx file of bytes -> uint8 array of `ndim` axes."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path} cannot be read or is damaged ({e}): {AGAIN}") from None
    start = 4 + 4 * ndim
    shape = [int.from_bytes(raw[i:i + 4], "big") for i in range(4, start, 4)]
    if raw[:4] != bytes([0, 0, 8, ndim]) or len(raw) != start + math.prod(shape):
        raise DataError(f"{path} is not an idx file of {ndim} axes, or not all of one: {AGAIN}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def cifar10(root, size, split):
    """From unpacked .bin files if there are any, else out of the archive itself: that takes a
    second or two, and nothing an archive contains can end up on the disk."""
    files = ["test_batch.bin"] if split == "test" else [f"data_batch_{i}.bin" for i in range(1, 6)]
    inside = "cifar-10-batches-bin"
    folders = [f for f in (root / inside, root / "cifar10" / inside, root)
               if (f / files[0]).is_file()]
    source = folders[0] if folders else locate("cifar10", "cifar-10-binary.tar.gz", root)
    try:
        if folders:
            parts = [(source / file).read_bytes() for file in files]
        else:
            with tarfile.open(source) as tar:
                found = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
            parts = [found[f"{inside}/{file}"] for file in files]
    except (OSError, EOFError, KeyError, zlib.error, tarfile.TarError) as e:
        raise DataError(f"{source} is incomplete or damaged ({e}): {AGAIN}") from None
    for file, part in zip(files, parts):
        if not part or len(part) % 3073:                    # a label and 3 x 32 x 32 pixels each
            raise DataError(f"{file} of {source} has {len(part)} bytes, not a multiple of 3073: "
                            f"{AGAIN}")
    rows = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 3073)
    return array_dataset("cifar10", rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0], source, size)


def array_dataset(name, x, y, y_path, size, pad=False):
    """x uint8 (N, C, h, w), y (N,) -> Dataset of images of `size` = (H, W), or (h, w) if None."""
    if y.max() >= len(CLASSES[name]):
        raise DataError(f"{y_path} has a label {y.max()}, but {name} has classes 0 to "
                        f"{len(CLASSES[name]) - 1}: {AGAIN}")
    shape = (x.shape[1], *(size or x.shape[2:]))
    if shape != x.shape[1:]:
        x = preload(functools.partial(resized, x, shape, pad), len(y), shape)
    return Dataset(name, shape, x, len(y), y, CLASSES[name])


def resized(x, shape, pad, indices):
    """Images `indices` of x (N, C, h, w) as (B, C, H, W), shape = (C, H, W)."""
    down, right = shape[1] - x.shape[2], shape[2] - x.shape[3]
    if pad and down >= 0 and right >= 0:                    # the background of digits is black
        return np.pad(x[indices], ((0, 0), (0, 0), (down // 2, down - down // 2),
                                   (right // 2, right - right // 2)))
    pictures = [Image.fromarray(np.squeeze(x[i].transpose(1, 2, 0))) for i in indices]
    return np.stack([to_array(resize_and_crop(picture, *shape[1:])) for picture in pictures])


def preload(read, n, shape):
    """What `read` (indices -> images) gives for all n images if they fit in memory, else `read`."""
    if n * math.prod(shape) > IN_MEMORY:
        return read
    x = np.empty((n, *shape), np.uint8)
    for i in tqdm(range(0, n, 64), desc="reading images", unit="batch", delay=2, disable=QUIET):
        x[i:i + 64] = read(range(i, min(i + 64, n)))
    return x                                                                        # (n, C, H, W)


# --- download ----------------------------------------------------------------------------------

def md5_of(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def locate(name, file, root):
    """Path of a data set's file: root/name/file or root/file, else downloaded to the first."""
    path, beside = root / name / file, root / file
    if path.is_file():
        return path
    # Fashion-MNIST took over MNIST's file names: do not load one as the other
    others = [sums.get(file) for other, sums in MD5.items() if other != name]
    if beside.is_file() and md5_of(beside) not in others:
        return beside
    download([mirror + file for mirror in MIRRORS[name]], path, MD5[name][file])
    return path


def download(urls, path, md5):
    """Fetch `path` from the first URL that gives the file with this md5. Raises DataError.

    It is renamed to `path` when whole, so several processes may do this at once, or be killed.
    """
    part, problems = path.with_name(f".{path.name}.{secrets.token_hex(4)}"), []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as e:
        raise DataError(f"cannot write into {path.parent} ({e.strerror}): pass --data-dir with a "
                        f"folder of yours") from None
    try:
        for url in urls:
            try:
                fetch(url, part, md5)
                os.replace(part, path)
                return
            except (OSError, http.client.HTTPException) as e:
                problems.append(f"{url}: {e}")
    finally:
        part.unlink(missing_ok=True)
    raise DataError(f"cannot download {path.name} ({'; '.join(problems)}): get the file elsewhere "
                    f"and put it into {path.parent} under this name")


def fetch(url, path, md5):
    request = urllib.request.Request(url, headers={"User-Agent": "four-denoisers"})
    with urllib.request.urlopen(request, timeout=30) as response, open(path, "wb") as f:
        size = int(response.headers.get("Content-Length", 0))
        with tqdm.wrapattr(f, "write", total=size, desc=url.split("/")[-1], disable=QUIET) as out:
            shutil.copyfileobj(response, out)
    if md5_of(path) != md5:
        raise OSError("the checksum is wrong")


# --- folders of images -------------------------------------------------------------------------

def list_images(folder):
    """The paths of all images below a folder, from there, sorted."""
    endings = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
    found = glob.glob("**/*", root_dir=folder, recursive=True)          # without hidden files
    files = sorted(f.replace(os.sep, "/") for f in found if f.lower().endswith(endings))
    if not files:
        raise DataError(f"no images in {folder}: pass a folder with {' '.join(endings)} files")
    return files


def image_folder(name, folder, size, text_encoder=None):
    """All images below a folder; its immediate subfolders, if any, are classes."""
    files = list_images(folder)
    top = [f.split("/")[0] if "/" in f else None for f in files]
    class_names = sorted(set(top) - {None})
    if class_names and None in top:
        raise DataError(f"{folder} has images in subfolders, which are classes, and others such as "
                        f"{files[top.index(None)]} beside them: move those into a subfolder too")
    place = {c: i for i, c in enumerate(class_names)}
    captions = read_captions(folder, files)
    mode = "L" if all(is_gray(folder / f) for f in files) else "RGB"
    shape = read_image(folder / files[0], mode, size).shape
    read = functools.partial(folder_batch, folder, files, mode, size, shape)
    return Dataset(name, shape, preload(read, len(files), shape), len(files),
                   [place.get(c) for c in top], class_names, captions,
                   stored_text(folder, captions, text_encoder) if captions and text_encoder else None)


def read_captions(folder, files):
    """The text of each file in folder/metadata.csv, or None if there is no such table."""
    table = folder / "metadata.csv"
    if not table.is_file():
        return None
    try:
        with open(table, newline="", encoding="utf-8-sig") as f:        # -sig: Excel writes a BOM
            rows = list(csv.DictReader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{table} cannot be read ({e}): save it as CSV in UTF-8") from None
    if not rows or not {"file_name", "text"} <= set(rows[0]):
        raise DataError(f"{table} lacks lines or columns: its first line must be file_name,text")
    texts = {row["file_name"]: row["text"] or "" for row in rows}
    for file in sorted(set(texts) ^ set(files)):
        raise DataError(f"{table} has no line for {file}: add one or move the image away"
                        if file in files else
                        f"{table} names {file}, which does not exist: add it or delete the line")
    return [texts[f] for f in files]


def folder_batch(folder, files, mode, size, shape, indices):
    batch = [read_image(folder / files[i], mode, size) for i in indices]
    for i, image in zip(indices, batch):
        if image.shape != shape:
            raise DataError(f"{folder / files[i]} is {image.shape[1]}x{image.shape[2]}, but "
                            f"{files[0]} {shape[1]}x{shape[2]}: pass --image-size, for example 64")
    return np.stack(batch)                                                          # (B, C, H, W)


def is_gray(path):
    try:
        with Image.open(path) as image:
            return image.mode in ("1", "L", "LA")
    except Exception:       # read_image will say what is wrong with it
        return True


def read_image(path, mode, size=None):
    """-> uint8 (C, H, W) of mode "L" or "RGB", upright, transparency on white."""
    try:
        with Image.open(path) as image:
            deep = image.mode[0] in "IF"
            image = ImageOps.exif_transpose(image)          # phones store pictures sideways
            if image.has_transparency_data:
                paper = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(paper, image.convert("RGBA"))
            image = image.convert(mode)
    except Exception as e:  # decoders meet damage with all kinds of exceptions
        raise DataError(f"{path} is no readable image ({e}): replace it or move it away") from None
    if deep:                # converting has spoiled it
        raise DataError(f"{path} has more than 8 bits per channel: save it with 8")
    return to_array(resize_and_crop(image, *size) if size else image)


def resize_and_crop(image, H, W):
    """Scaled so that it just covers H x W, what sticks out cut off on both sides."""
    return ImageOps.fit(image, (W, H), Image.Resampling.BICUBIC)


def to_array(image):
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)                      # (C, H, W)


# --- captions to numbers -----------------------------------------------------------------------

def text_encoder(name, device="cpu"):
    """What makes tensors of captions, by name: "bytes", built in, or a T5 of Hugging Face, or its folder.

    encoder(captions) -> text, mask (B, L): True where there is a token; nowhere, if a caption is empty.
    text is long (B, 16, 12) of bytes, or float32 (B, 128, dim); encoder.dim tells a model what comes in.
    """
    return ByteText() if name == "bytes" else T5Text(name, device)


def full_name(name):
    """A folder's absolute path, so that a run finds its T5 from anywhere; other names as they are."""
    return str(Path(name).resolve()) if name != "bytes" and Path(name).is_dir() else name


def tidy(caption):
    """Without what no encoder can take: NUL, and halves of characters from a terminal's bad bytes."""
    return caption.replace("\0", "").encode("utf-8", "replace").decode().strip()


class ByteText:
    """Words as the bytes they are spelt with: the model learns to read. text: long (B, 16, 12), a word
    a row, longer ones in several; 0 where there is no byte."""
    name = dim = "bytes"
    L, W = 16, 12                                           # words, and bytes of a word

    def __call__(self, captions, half=False):               # bytes have no halves; as StoredText is called
        text = np.zeros((len(captions), self.L, self.W), np.int64)                  # (B, L, W)
        for rows, caption in zip(text, captions):
            words = [word.encode() for word in tidy(caption).lower().split()]
            pieces = [word[i:i + self.W] for word in words for i in range(0, len(word), self.W)]
            for row, piece in zip(rows, pieces):            # ends with the shorter: L pieces at most
                row[:len(piece)] = list(piece)
        text = torch.from_numpy(text)
        return text, text[:, :, 0] > 0                                              # (B, L, W), (B, L)


TOKENS = 128                                                # of a caption that a T5 reads


class T5Text:
    """The encoder half of a T5, frozen. Every caption runs by itself, unpadded: so its embedding depends
    on nothing else, and a resumed run, which meets captions in other company, gets the same bits."""
    L = TOKENS

    def __init__(self, name, device):
        try:
            import transformers                             # nothing else here needs it
        except ImportError:
            raise DataError(f"text encoder {name} needs one more package: pip install transformers, or pass "
                            f"--text-encoder bytes") from None
        for library in ("transformers", "huggingface_hub"):
            logging.getLogger(library).setLevel(logging.ERROR)
        # what is on the disk needs no network; a download shows its progress
        for local in [True] if Path(name).is_dir() else [True, False]:
            bars = "disable" if local or QUIET else "enable"
            getattr(transformers.logging, f"{bars}_progress_bar")()
            try:
                model, report = transformers.T5EncoderModel.from_pretrained(
                    name, local_files_only=local, output_loading_info=True)
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
                if report["missing_keys"]:                  # these would be random numbers
                    raise ValueError("it holds no T5 encoder")
                break
            except Exception as e:                          # damage and typos come as all kinds
                problem = (str(e).strip() or repr(e)).splitlines()[0]
        else:
            raise DataError(f"text encoder {name} cannot be loaded ({problem}): pass a T5's name, such as "
                            f"google/flan-t5-xl, or, where it cannot be downloaded, its folder")
        self.name, self.device, self.dim = name, torch.device(device), model.config.d_model
        self.model = model.float().eval().requires_grad_(False).to(device)
        self.memo, self.room = {}, IN_MEMORY                # caption: embedding; bytes left for more

    def tokens(self, caption):
        caption = tidy(caption)
        return self.tokenizer(caption, truncation=True, max_length=self.L).input_ids if caption else []

    def embed(self, caption):
        """-> float16 (n, dim), from memory if this caption was here recently."""
        e = self.memo.pop(caption, None)
        if e is None:
            e, ids = torch.zeros(0, self.dim, dtype=torch.float16), self.tokens(caption)
            if ids:
                with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                    e = self.model(torch.tensor([ids], device=self.device)).last_hidden_state[0].half().cpu()
            self.room -= 2 * e.numel()
        self.memo[caption] = e                              # at the end: the most recent
        while self.room < 0 and len(self.memo) > 1:
            self.room += 2 * self.memo.pop(next(iter(self.memo))).numel()
        return e

    def __call__(self, captions):
        found = [self.embed(caption) for caption in captions]
        text = torch.zeros(len(found), self.L, self.dim, dtype=torch.float16)       # (B, L, dim)
        for row, e in zip(text, found):
            row[:len(e)] = e
        mask = torch.arange(self.L) < torch.tensor([[len(e)] for e in found])       # (B, L)
        return text.to(self.device).float(), mask.to(self.device)


class StoredText:
    """A text encoder that looks captions up in a file, without the T5; on the CPU, in workers too."""

    def __init__(self, name, path, captions, lengths):
        self.name, self.path, self.lengths = name, path, np.array(lengths)
        self.dim = np.load(path, mmap_mode="r").shape[2]
        self.row = {caption: row for row, caption in enumerate(captions)}

    def __call__(self, captions, half=False):
        try:
            rows = [self.row[caption] for caption in captions]
        except KeyError as e:
            raise DataError(f"{self.path} does not know {e}: use captions of its folder") from None
        try:                                                # opened each time: a map cannot be pickled
            found = np.load(self.path, mmap_mode="r")[rows]                         # (B, longest, dim)
        except (OSError, ValueError) as e:
            raise DataError(f"{self.path} cannot be read ({e}): run python data.py captions again") from None
        text = torch.zeros(len(rows), TOKENS, self.dim, dtype=torch.float16 if half else torch.float32)
        text[:, :found.shape[1]] = torch.from_numpy(found)
        mask = np.arange(TOKENS) < self.lengths[rows, None]
        return text, torch.from_numpy(mask)                                         # (B, 128, dim), (B, 128)


def text_files(folder, captions, name):
    """-> the file of embeddings; what describes it; the caption of each row; what json will say."""
    path = folder / f"text-{re.sub('[^A-Za-z0-9.]+', '-', name)}.npy"
    captions = sorted({"", *captions})
    digest = hashlib.sha256(json.dumps(captions).encode()).hexdigest()
    return path, path.with_suffix(".json"), captions, {"encoder": name, "captions": digest}


def stored_text(folder, captions, name):
    """The StoredText of a folder's captions, or None if `store_text` never ran."""
    path, about, captions, expected = text_files(folder, captions, name)
    if not about.is_file():
        return None
    try:
        saved = json.loads(about.read_text())
        if {**saved, **expected} == saved:
            return StoredText(name, path, captions, saved["lengths"])
    except (OSError, ValueError, KeyError, TypeError):      # no or half a file
        pass
    raise DataError(f"{path} does not fit the captions of {folder}: run python data.py captions {folder} "
                    f"--text-encoder {name} again")


def store_text(folder, name, device):
    """Run a T5 once on each different caption of a folder, for `load` to find. -> the file's path"""
    captions = read_captions(folder, list_images(folder))
    if captions is None:
        raise DataError(f"{folder} has no captions: write a metadata.csv with the columns file_name,text")
    if name == "bytes":
        raise DataError("bytes needs no file: name a T5, such as google/flan-t5-xl")
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
        raise DataError(f"cannot write {path} ({e.strerror}): make room, or the folder writable") from None
    finally:
        part.unlink(missing_ok=True)
    return path


# --- for train.py ---------------------------------------------------------------------------------

def for_training(args, paper, device):
    """The command line and the paper's module -> the Dataset, and what turns captions into tensors, or None
    if the class, or nothing, is the condition. Writes into args what a checkpoint must tell of the data:
    shape, num_classes, class_names, num_examples, text, prompts, space. Raises ValueError."""
    if args.latents:
        import latents                                      # which imports this file: not at the top
        for flag in ("image_size", "frames", "hold_out", "hflip", "data_dir", "data"):
            if getattr(args, flag) not in (None, False, [], "shapes"):
                raise DataError(f"--{flag.replace('_', '-')} is for images and --latents are none: drop it, "
                                f"and if you need it pass it to `python data.py encode`")
        dataset = latents.load(args.latents)
    else:
        if args.vae:
            raise DataError("--vae decodes latents: add --latents DIR, or drop it")
        dataset = load(args.data, args.data_dir, args.image_size, text_encoder=args.text_encoder,
                       frames=args.frames)
    if args.hold_out:
        dataset = hold_out(dataset, args.hold_out)
    K = dataset.num_classes if args.num_classes < 0 else args.num_classes
    if K not in (0, dataset.num_classes):
        raise DataError(f"--num-classes {K}, but {dataset.name} has {dataset.num_classes}: drop the flag")
    encode = choose_text(args, dataset, "text" in inspect.signature(paper.build).parameters, device)
    K = 0 if encode else K
    if args.hold_out and K and len(set(dataset.labels.tolist())) < K:
        raise DataError("without the words held out a class has no examples: hold out less, or add "
                        "--cond text")
    if args.hflip and encode and args.data == "moving":
        raise DataError("--hflip would move what goes left to the right: drop it")
    args.shape, args.num_classes, args.num_examples = list(dataset.shape), K, len(dataset)
    args.class_names, args.space = list(dataset.class_names) if K else [], dataset.latents
    args.text, args.prompts = encode.dim if encode else 0, some_captions(dataset, args.seed) if encode else []
    stored = ", stored" * bool(dataset.texts)
    if encode and args.text == "bytes":
        dataset.texts = encode              # so that workers do it, into memory that a GPU fetches from
    dataset.condition = (f"{K} classes" if K else f"captions ({args.text_encoder}{stored})" if encode
                         else "no classes")
    return dataset, encode


def choose_text(args, dataset, reads, device):
    """The text encoder, or None. reads: the model takes text."""
    if args.cond == "class" and not dataset.num_classes or args.cond == "text" and not dataset.has_captions:
        raise DataError(f"{dataset.name} has no {'captions' if args.cond == 'text' else 'classes'}: "
                        f"drop --cond {args.cond}")
    if args.cond == "text" and not reads:
        raise DataError(f"{args.model} reads no text: pass --model mdm, or drop --cond text")
    if args.cond != "auto" and args.num_classes >= 0:
        raise DataError(f"--cond {args.cond} and --num-classes {args.num_classes} do not go together: drop "
                        f"one")
    auto = reads and dataset.has_captions and not dataset.num_classes and args.num_classes < 0
    if args.cond == "text" or args.cond == "auto" and auto:
        return dataset.texts or text_encoder(args.text_encoder, device)
    if args.text_encoder != "bytes":
        raise DataError("--text-encoder is for captions: add --cond text, or drop it")
    return None


def some_captions(dataset, seed, n=8):
    """The first n different captions in a random order, for the grids of samples."""
    order = permutation(seed, 0, len(dataset))[:1000]
    return list(dict.fromkeys(dataset.captions[i] for i in order if dataset.captions[i]))[:n] or [""]


def batches(dataset, order, workers, pinned):
    """The batches of `order`, read by so many processes beside this one, into memory that a GPU can fetch
    from if `pinned`. An image that cannot be read is told plainly."""
    loader = DataLoader(dataset, batch_size=None, sampler=order, num_workers=workers, pin_memory=pinned,
                        worker_init_fn=leave_signals_to_the_main_process)
    try:
        yield from loader
    except DataError as e:                  # a worker's message begins with its traceback
        fail(str(e).splitlines()[-1].removeprefix("data.DataError: "), every_process=True)


def leave_signals_to_the_main_process(worker):
    """At module level, since spawned workers import it. What a scheduler sends reaches workers as well, and a
    worker that dies of it would take the last step's batch along. Nor do workers hold the run's folder."""
    checkpoint.let_go()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def write_images(dataset, folder):
    """Each as folder/000000.png -> how many."""
    if len(dataset.shape) != 3:
        raise DataError(f"{dataset.name} holds clips: choose pictures")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise DataError(f"{folder} is not empty: delete it, or choose another folder")
    for i in tqdm(range(len(dataset)), desc="images", unit="image"):
        x = dataset[[i]]["x"][0].permute(1, 2, 0).numpy()                           # (H, W, C)
        picture = Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)
        checkpoint.replace(folder / f"{i:06d}.png", lambda f: picture.save(f, "PNG"))
    return len(dataset)


def main(argv=None):
    import latents                                          # which imports this file: not at the top
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
