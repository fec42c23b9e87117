"""Images for training: drawn, downloaded, or your own.

    name       native size   images    test  labels          comes from
    shapes     3x32x32 *     65,536   4,096  8 shapes        drawn when asked for, with captions (shapes.py)
    moving     3x8x32x32 *   65,536   4,096  8 shapes        the same shapes, moving: clips of 8 frames
    mnist      1x28x28       60,000  10,000  10 digits       download, 11 MB
    fashion    1x28x28       60,000  10,000  10 garments     download, 29 MB
    cifar10    3x32x32       50,000  10,000  10 things       download, 162 MB
    a/folder   its images'      all       -  its subfolders  png, jpg, webp, bmp, gif; captions from a table
    * or any other size: they are drawn at the size you ask for

The table of captions is metadata.csv, with the columns file_name,text, or metadata.jsonl, with lines such as
{"file_name": "1.png", "text": "a cat"}. An image may have several captions: several lines, or a list as "text". Each
step then draws one of them. Hidden files and folders of runs are no part of the data.
Films (gif, webp or png with several pictures) are refused.

`load` returns a Dataset. Index it with a list and you get a whole batch. So a worker process prepares batches, and
nothing is left to collate:

    dataset = load("mnist")
    dataset[[3, 5]] -> {"x": uint8 (2, 1, 28, 28), "y": long (2,)}      and "caption": list of str
    DataLoader(dataset, batch_size=None, sampler=batch_order(...))

Files are downloaded only if they are not in --data-dir already. That folder may be torchvision's root, its MNIST/raw or
FashionMNIST/raw (gzipped or not), and hold CIFAR-10 as bytes or as pickles, as an archive or not; see `locate`.

Your own images need no code: pass the folder. For anything else write a function that returns a Dataset, as `digits`
does below, and call it in `load`.
"""
import contextlib
import csv
import difflib
import functools
import gzip
import hashlib
import http.client
import io
import json
import math
import os
import pickle
import posixpath
import re
import socket
import sys
import tarfile
import tempfile
import unicodedata
import zlib
from array import array
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from diffusion import UserError, fold, normal
from support import shapes, text
from support.cli import QUIET

try:
    import fcntl                                # locks, on Linux and macOS
except ImportError:
    fcntl = None

IN_MEMORY = 2**30                       # bytes of a data set to keep; a larger one is read batch by batch


class Dataset:
    """Examples, and what is known about them. `dataset[indices]` is a batch; `prepare` turns its "x" into x0.

    name, length
    shape        (C, H, W), or (C, T, H, W) for clips of T frames
    images       uint8 array (N, C, H, W); or a function of B indices -> (B, C, H, W), which must be picklable to reach
                 worker processes
    labels       N integers, places in class_names; both or neither
    captions     None, or for each image a str or a list of several
    texts        None, or a text encoder that is fast enough for workers: batches then hold "text" and "text_mask", too
    latents      None for pictures; else a dict: data, image_shape (of the pictures), vae (its name), scale, shift.
                 Then images are float16 (N, 2C, h, w): means, then standard deviations, of latents (C, h, w)
    files        None, or a digest of the files' names and sizes: a part of `identity`

    Raises UserError if these do not fit together; images of a function are checked when a batch is made.
    """

    def __init__(self, name, shape, images, length, labels=None, class_names=(), captions=None, texts=None,
                 latents=None, files=None):
        self.name, self.shape, self.images, self.length = name, tuple(shape), images, length
        self.class_names, self.num_classes = list(class_names), len(class_names)
        self.captions, self.has_captions, self.texts = captions, captions is not None, texts
        self.several = any(not isinstance(caption, str) for caption in (captions if self.has_captions else ()))
        self.latents, self.files, self.labels = latents, files, None
        if self.num_classes:
            y = np.asarray(labels)                                                  # (N,)
            if y.shape != (length,) or y.dtype.kind not in "iu" or not ((y >= 0) & (y < self.num_classes)).all():
                raise UserError(f"{name} has {length} images and {self.num_classes} classes: give each image a whole "
                                f"number from 0 to {self.num_classes - 1} in labels")
            self.labels = torch.from_numpy(y.astype(np.int64))                      # (N,)
        elif labels is not None:
            raise UserError(f"{name} has labels but no class_names: pass both or neither")
        if self.has_captions and len(captions) != length:
            raise UserError(f"{name} has {length} images and {len(captions)} captions: give each image one")
        if not callable(images):
            self.check(images, length)

    def check(self, x, n):
        """Raises UserError if x is not n images as training needs them."""
        C, *size = self.shape
        shape, kind = ((n, 2 * C, *size), "float16") if self.latents else ((n, C, *size), "uint8")
        if not isinstance(x, np.ndarray) or x.shape != shape or x.dtype != kind:
            found = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
            raise UserError(f"the images of {self.name} are {found}: make them a NumPy array, {kind} of shape {shape}")

    @property
    def identity(self):
        """A digest that is another one for other files, classes or labels, wherever the files are."""
        labels = None if self.labels is None else digest(self.labels.numpy().astype("<i8").tobytes())
        return digest(json.dumps([self.files, self.class_names, labels]).encode())[:16]

    def __len__(self):
        return self.length

    def __getitem__(self, indices):
        """indices: (B,), or (2, B): with numbers that choose among several captions. Without them the first is
        taken."""
        indices = np.asarray(indices)
        indices, draws = indices if indices.ndim == 2 else (indices, np.zeros_like(indices))    # (B,) each
        # numpy, because torch would start threads, which cost more than so few bytes
        x = self.images(indices) if callable(self.images) else self.images[indices]
        self.check(x, len(indices))
        batch = {"x": torch.from_numpy(x)}                                          # (B, C, H, W)
        if self.num_classes:
            batch["y"] = self.labels[indices]                                       # (B,)
        if self.has_captions:
            batch["caption"] = [one_of(self.captions[i], n) for i, n in zip(indices, draws)]
        if self.texts:          # embeddings in float16, to move half the bytes; ByteText gives (B, L, W), (B, L)
            batch["text"], batch["text_mask"] = self.texts(batch["caption"], half=True)     # (B, L, dim), (B, L)
        return batch

    def prepare(self, x, seeds):
        """"x" of a batch, on any device -> x0 float32 (B, C, ..), what a network learns. Pictures: scaled to [-1, 1].
        Latents: drawn anew from their distributions, shifted and scaled to about N(0, 1); seeds (B,) long, on x's
        device, decide the draw."""
        if not self.latents:
            return x.float() / 127.5 - 1
        mean, std = x.float().chunk(2, dim=1)                                       # (B, C, h, w) each
        z = mean + std * normal(fold(seeds, 4), self.shape)     # train.py uses 0 to 3 and 6 for its own
        return (z - self.latents["shift"]) * self.latents["scale"]

    def subset(self, keep):
        """The Dataset of some examples. keep: their indices, or a bool for each example."""
        keep = np.arange(self.length)[keep]                                         # (M,)
        images = functools.partial(images_of, self.images, keep)
        labels = self.labels.numpy()[keep] if self.num_classes else None
        captions = [self.captions[i] for i in keep] if self.has_captions else None
        return Dataset(self.name, self.shape, images, len(keep), labels, self.class_names, captions,
                       self.texts, self.latents, self.files)


def digest(content):
    return hashlib.sha256(content).hexdigest()


def one_of(caption, n=0):
    """What a Dataset keeps as an image's caption -> the caption, or number n of several."""
    return caption if isinstance(caption, str) else caption[n % len(caption)]


def flat(captions):
    """All captions of all images -> a list of str."""
    return [c for caption in captions for c in ([caption] if isinstance(caption, str) else caption)]


def images_of(images, keep, indices):
    return images(keep[indices]) if callable(images) else images[keep[indices]]


def hold_out(dataset, phrases):
    """The Dataset without the examples that have one of `phrases` in a caption, as whole words. Raises UserError if a
    phrase is in no caption, or if no example is left."""
    if not dataset.has_captions:
        raise UserError(f"{dataset.name} has no captions to hold out: use shapes, moving or a folder with a "
                        f"metadata.csv or metadata.jsonl")
    keep = np.ones(len(dataset), bool)
    composed = functools.partial(unicodedata.normalize, "NFC")      # a letter with an accent may be two characters
    for phrase in phrases:
        words = r"\s+".join(map(re.escape, composed(phrase).split())) or "(?!)"     # (?!) matches nothing
        found = re.compile(rf"(?<![\w-]){words}(?![\w-])", re.IGNORECASE).search    # dark-red is one word
        held = np.array([any(map(found, map(composed, flat([caption])))) for caption in dataset.captions])
        if not held.any():
            raise UserError(f"no caption of {dataset.name} contains {phrase!r}: hold out words as in "
                            f"{one_of(dataset.captions[0])!r}")
        keep &= ~held
    if not keep.any():
        raise UserError(f"without {' and '.join(phrases)} nothing of {dataset.name} is left: hold out less")
    return dataset.subset(keep)


def load(name, data_dir=None, image_size=None, split="train", text_encoder=None, frames=None):
    """A Dataset by its name or folder.

    data_dir      where the files are, also as torchvision leaves them, or are downloaded to; None:
                  ~/.cache/four-denoisers
    image_size    in pixels, as `parse_size` takes it; None: native. Digits and garments are padded to a larger size;
                  other pictures are scaled to cover the size and cropped in the middle
    split         "train" or "test"
    text_encoder  its name. If `python -m support.prepare captions FOLDER --text-encoder NAME` has stored embeddings of
                  this folder's captions, batches hold "text" float16 (B, L, dim) and "text_mask" (B, L), too
    frames        how many in each clip; 1: the first frames, as pictures; None: 8

    Raises UserError for a name, file or size that is wrong.
    """
    size = None if image_size is None else parse_size(image_size)
    if split not in ("train", "test"):
        raise UserError(f"no split {split!r}: choose train or test")
    if name in NAMES and not QUIET and Path(name).is_dir():
        with contextlib.suppress(UserError, OSError):       # that folder is not what we read
            if any(path.lower().endswith(ENDINGS) for path, _ in walk(Path(name))):
                print(f"note        {name} is the data set of this name: for the folder here pass ./{name}")
    if name == "moving":
        return Dataset(**shapes.moving(size or (32, 32), split, 8 if frames is None else frames))
    if frames is not None:
        raise UserError(f"{name} has no frames: drop --frames, or pass --data moving")
    if name == "shapes":
        return Dataset(**shapes.still(size or (32, 32), split))
    if name in CLASSES:
        root = expanded(data_dir or "~/.cache/four-denoisers")
        return cifar10(root, size, split) if name == "cifar10" else digits(name, root, size, split)
    folder = expanded(name)
    if not str(name) or not folder.is_dir():                # Path("") would be the folder that we are in
        close = difflib.get_close_matches(str(name).lower(), NAMES, n=1)
        guess = f", did you mean {close[0]}" if close else ""
        raise UserError(f"no data set or folder {str(name)!r}{guess}: choose {', '.join(NAMES)}, "
                        f"or a path to a folder of images")
    if split == "test":
        raise UserError(f"folder {name} has no test split: pass the folder of your test images")
    return image_folder(str(name), folder, size, text_encoder)


def expanded(path):
    """The Path; ~ is the home folder. Raises UserError if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:                                    # a container's user may have none
        raise UserError(f"no home folder for {path}: write a path without ~, in --data-dir if it is for "
                        f"downloads") from None


def parse_size(size):
    """32, "32", "24x40" or (24, 40) -> (H, W) in pixels. Raises UserError if it is not a size, or below 8."""
    parts = size.lower().split("x") if isinstance(size, str) else np.atleast_1d(size).tolist()
    try:
        H, W = [int(n) for n in (parts * 2 if len(parts) == 1 else parts)]
    except ValueError:
        raise UserError(f"image size {size!r} not understood: write 32, or 24x40 for height x width") from None
    if min(H, W) < 8:
        raise UserError(f"image size {H}x{W} is too small: use at least 8 pixels a side")
    return H, W


# --- the order of training examples ------------------------------------------------------------------

@functools.lru_cache(maxsize=2)         # a batch rarely touches more than two epochs
def permutation(seed, epoch, n):
    return np.random.default_rng((seed, epoch)).permutation(n)


class batch_order:                      # lower case like range, which it resembles
    """The indices (hi - lo,) of each training step: slots lo to hi - 1 of its global batch.

    Slot s of step k is number k * global_batch_size + s of an endless sequence: one shuffled pass over all examples
    after another. There is no state. To resume, pass another first_step; any number of processes split a batch by their
    lo and hi. draws: (2, hi - lo) instead, with a random number for each index, for a Dataset of several captions.
    """

    def __init__(self, num_examples, seed, global_batch_size, first_step, last_step, lo, hi, draws=False):
        self.n, self.seed, self.batch, self.draws = num_examples, seed, global_batch_size, draws
        self.steps, self.slots = range(first_step, last_step), np.arange(lo, hi, dtype=np.int64)

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        for step in self.steps:
            epoch, place = np.divmod(step * self.batch + self.slots, self.n)
            indices = np.empty_like(place)
            for e in np.unique(epoch):
                now = epoch == e
                indices[now] = permutation(self.seed, int(e), self.n)[place[now]]
            if self.draws:      # train.py uses 0 to 3 and 6 for its own draws, `prepare` 4
                draws = fold(self.seed, step + 1, torch.from_numpy(self.slots), 5).numpy()          # (hi - lo,)
                indices = np.stack([indices, draws])                                # (2, hi - lo)
            yield indices                                                           # (hi - lo,)


# --- MNIST, Fashion-MNIST, CIFAR-10 ------------------------------------------------------------------

CLASSES = {
    "mnist": "0 1 2 3 4 5 6 7 8 9".split(),
    "fashion": "T-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split(),
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split()}
NAMES = "shapes", "moving", *CLASSES
MIRRORS = {
    "mnist": ["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"],
    "fashion": ["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"],
    "cifar10": ["https://www.cs.toronto.edu/~kriz/"]}
SHA256 = {
    "mnist": {"train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
              "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
              "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
              "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
              "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
              "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
              "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
              "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"},
    "fashion": {"train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"},
    "cifar10": {"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                "cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"}}
SIZES = {9912422, 28881, 1648877, 4542, 26421880, 29515, 4422102, 5148,        # bytes of these files: no other file is
         47040016, 60008, 7840016, 10008, 170052171, 170498071}                # worth the time for its checksum
# Where a file of the right name will do, without its checksum. MNIST/raw and the like are torchvision's. The file names
# of CIFAR-10 are no other data set's, so they may be in any folder.
PLACES = {"mnist": ["mnist/", "MNIST/raw/", "raw/", ""], "fashion": ["fashion/", "FashionMNIST/raw/", "raw/", ""],
          "cifar10": ["", "*/", "*/*/"]}
AGAIN = "put a good copy in its place, or move it away to have it downloaded"


def digits(name, root, size, split):
    part = "train" if split == "train" else "t10k"
    x_path, y_path = (locate(name, [f"{part}-{kind}-ubyte.gz", f"{part}-{kind}-ubyte"], root)
                      for kind in ("images-idx3", "labels-idx1"))
    x, y = read_idx(x_path, 3)[:, None], read_idx(y_path, 1)                        # (N, 1, 28, 28), (N,)
    if len(x) != len(y) or not len(x):
        raise UserError(f"{x_path} has {len(x)} images and {y_path} {len(y)} labels: put the two files of one "
                        f"download there")
    return array_dataset(name, x, y, y_path, size, pad=True)


def read_idx(path, ndim):
    """An idx file of bytes, gzipped or not -> uint8 array of `ndim` axes."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path} cannot be read or is damaged ({e}): {AGAIN}") from None
    start = 4 + 4 * ndim                                    # after the magic number and the sizes
    shape = [int.from_bytes(raw[i:i + 4], "big") for i in range(4, start, 4)]
    if raw[:4] != bytes([0, 0, 8, ndim]) or len(raw) != start + math.prod(shape):
        raise UserError(f"{path} is not an idx file of {ndim} axes, or not all of one: {AGAIN}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def cifar10(root, size, split):
    """Reads unpacked files, of the binary or the Python version, if there are any. Otherwise it reads straight from the
    archive. That takes a second or two, and no file of an archive can be written to a wrong place on the disk."""
    names = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    source = locate("cifar10", [f"{names[0]}.bin", names[0], *SHA256["cifar10"]], root)
    try:
        if source.stem == names[0]:
            parts = [source.with_name(name + source.suffix).read_bytes() for name in names]
            source = source.parent
        else:
            with tarfile.open(source) as tar:
                found = {PurePosixPath(m.name).stem: tar.extractfile(m).read() for m in tar
                         if m.isfile() and PurePosixPath(m.name).stem in names}
            parts = [found[name] for name in names]
    except (OSError, EOFError, KeyError, zlib.error, tarfile.TarError) as e:
        raise UserError(f"{source} is incomplete or damaged ({e}): {AGAIN}") from None
    rows = np.concatenate([read_batch(f"{name} of {source}", part) for name, part in zip(names, parts)])
    return array_dataset("cifar10", rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0], source, size)


def read_batch(name, raw):
    """A file of CIFAR-10, binary or a pickle -> uint8 (N, 3073): a label and 3 x 32 x 32 pixels for each image."""
    try:
        if raw[:1] == b"\x80":                              # how a pickle begins
            batch = Unpickler(io.BytesIO(raw), encoding="bytes").load()
            _, shape, _, by_columns, pixels = batch[b"data"].state
            x = np.frombuffer(pixels, np.uint8).reshape(shape, order="CF"[by_columns])             # (N, 3072)
            rows = np.column_stack([np.array(batch[b"labels"], np.uint8), x])                      # (N, 3073)
        else:
            rows = np.frombuffer(raw, np.uint8)
        return rows.reshape(rows.size // 3073 or 1, 3073)
    except Exception as e:              # a damaged pickle raises all kinds of exceptions
        raise UserError(f"{name} does not hold 3073 bytes for each image, plain or pickled ({e}): {AGAIN}") from None


class Unpickler(pickle.Unpickler):
    """A pickle may name any function of any module, to be called with any arguments. This one calls none. What NumPy's
    arrays need is replaced by `Stored`, and all else is refused."""

    def find_class(self, module, name):
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")):
            return Stored
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


class Stored:
    """In place of an array and of its dtype: keeps what NumPy would make them of."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        self.state = state


def array_dataset(name, x, y, y_path, size, pad=False):
    """x uint8 (N, C, h, w), y (N,) -> the Dataset of images of `size` = (H, W), or (h, w) if None."""
    if y.max() >= len(CLASSES[name]):
        raise UserError(f"{y_path} has a label {y.max()}, but {name} has classes 0 to {len(CLASSES[name]) - 1}: "
                        f"{AGAIN}")
    shape = (x.shape[1], *(size or x.shape[2:]))
    if shape != x.shape[1:]:
        x = preload(functools.partial(resized, x, shape, pad), len(y), shape)
    return Dataset(name, shape, x, len(y), y, CLASSES[name])


def resized(x, shape, pad, indices):
    """Images `indices` of x (N, C, h, w) as (B, C, H, W), shape = (C, H, W)."""
    down, right = shape[1] - x.shape[2], shape[2] - x.shape[3]
    if pad and down >= 0 and right >= 0:                    # the background of digits is black
        return np.pad(x[indices], ((0, 0), (0, 0), (down // 2, down - down // 2), (right // 2, right - right // 2)))
    pictures = [Image.fromarray(np.squeeze(x[i].transpose(1, 2, 0))) for i in indices]
    return np.stack([to_array(picture, shape[1:]) for picture in pictures])


def preload(read, n, shape):
    """-> all n images that `read` gives, if they fit in memory; else `read` itself. read: indices -> images."""
    if n * math.prod(shape) > IN_MEMORY:
        return read
    x = np.empty((n, *shape), np.uint8)

    def fill(i):
        x[i:i + 64] = read(range(i, min(i + 64, n)))
    all_of(fill, tqdm(range(0, n, 64), desc="reading images", unit="batch", delay=2, disable=QUIET))
    return x                                                                        # (n, C, H, W)


def locate(name, files, root):
    """The path of the first of `files` that is there: under its name in PLACES below root, or else known by its
    checksum, under any name, in root or up to two folders below. If there is none, we download one. Raises
    UserError."""
    sums, known = SHA256[name], [file for file in files if file in SHA256[name]]
    # Fashion-MNIST has the file names of MNIST: do not load one as the other
    others = {other[file] for other in SHA256.values() if other is not sums for file in files if file in other}
    named = (path for file in files for place in PLACES[name] for path in sorted(root.glob(place + file)))
    for path in filter(os.path.isfile, named):
        if not others or digest(path.read_bytes()) not in others:
            return path
    for path in filter(os.path.isfile, (path for depth in ("*", "*/*", "*/*/*") for path in root.glob(depth))):
        if os.path.getsize(path) in SIZES and digest(path.read_bytes()) in [sums[file] for file in known]:
            return path
    file, path = known[0], root / name / known[0]
    if not QUIET:
        print(f"{name} is not in {root}: downloading {file}")
    try:
        download([mirror + file for mirror in MIRRORS[name]], path, sums[file])
    except UserError as e:
        raise UserError(f"no {' or '.join(files)} in {root} or its folders {' '.join(filter(None, PLACES[name]))}, nor "
                        f"a file with the right checksum two folders deep; {e}") from None
    return path


def download(urls, path, sha256):
    """Fetch `path` from the first URL that gives the file with this checksum. Raises UserError.

    torch.hub writes to another name, and renames the file once it is whole: a process may be killed while it downloads.
    If several need the file, one downloads it, and the others wait. (They all do so where there are no locks.)
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()     # may we write there?
    except OSError as e:
        raise UserError(f"cannot write into {path.parent} ({e.strerror}): pass --data-dir with a folder of "
                        f"yours") from None
    problems, timeout = [], socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)                            # seconds; torch.hub would wait for ever
    folder = fcntl and os.open(path.parent, os.O_RDONLY)
    try:
        if fcntl:
            with contextlib.suppress(OSError):              # not all network drives have locks
                fcntl.flock(folder, fcntl.LOCK_EX)
            if path.exists() and digest(path.read_bytes()) == sha256:
                return
        for url in urls:
            try:
                return torch.hub.download_url_to_file(url, path, sha256, progress=not QUIET)
            except RuntimeError:
                problems.append(f"{url}: the checksum is wrong")
            except (OSError, http.client.HTTPException) as e:
                problems.append(f"{url}: {e}")
    finally:
        socket.setdefaulttimeout(timeout)
        if fcntl:
            os.close(folder)
    raise UserError(f"cannot download {path.name} ({'; '.join(problems)}): get the file elsewhere and put it into "
                    f"{path.parent} under this name")


# --- folders of images -------------------------------------------------------------------------------

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
OTHERS = (".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".jfif", ".ppm", ".pgm", ".dng", ".svg")


def walk(folder, below="", above=()):
    """Yields path and bytes of each image below a folder, also with an ending of OTHERS. A link to a folder above it is
    not followed: there the same images would come again, without end. What train.py has written is left out."""
    here = os.path.join(folder, below)
    real = os.path.realpath(here)
    if real in above:
        return
    entries = [e for e in os.scandir(here) if not e.name.startswith(".")]
    if below and {"args.json", "log.csv"} <= {e.name for e in entries}:             # a run's folder
        return
    for e in entries:
        if e.is_dir():
            yield from walk(folder, f"{below}{e.name}/", (*above, real))
        elif e.name.lower().endswith(ENDINGS + OTHERS):
            try:
                yield below + e.name, e.stat().st_size
            except OSError as error:                        # a link to nothing
                raise unreadable([f"{os.path.join(here, e.name)} ({error.strerror})"]) from None


def plain(path):
    """One spelling for all of a path: "./cats\\é.png " is cats/é.png, whichever of Unicode's two forms é has."""
    spelt = posixpath.normpath(unicodedata.normalize("NFC", path.strip().replace("\\", "/")))
    return path if spelt == path else spelt                 # most need no second copy


class Names:
    """Many paths in one block of memory: a list of 1.28 million takes 120 MB, and as much again in every worker, since
    to look at a str is to write to its page, which the worker then copies."""

    def __init__(self, names):
        names = [os.fsencode(name) for name in names]
        self.bytes, self.ends = b"".join(names), np.cumsum([0, *map(len, names)])   # (N + 1,)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):                          # ends a `for`, too
            raise IndexError(i)
        return os.fsdecode(self.bytes[self.ends[i]:self.ends[i + 1]])


def list_images(folder):
    """All images below a folder -> their paths, relative to it and sorted, as Names, and their bytes (N,). Files of
    OTHERS are counted, and left out. Raises UserError if there are no images."""
    paths, sizes, others = [], array("q"), Counter()
    for path, size in walk(folder) if folder.is_dir() else ():
        if path.lower().endswith(OTHERS):
            others[os.path.splitext(path)[1].lower()] += 1
        else:
            paths.append(path)
            sizes.append(size)
    left = ", ".join(f"{n:,} {ending}" for ending, n in others.items())
    if not paths:
        known = [name for name, sums in SHA256.items() for place in PLACES[name]
                 for file in (*sums, *["data_batch_1", "data_batch_1.bin"] * (name == "cifar10"))
                 if any(folder.glob(place + file))]
        if known:                                           # fashion has the file names of mnist
            raise UserError(f"{folder} has the files of a data set: pass --data {' or '.join(dict.fromkeys(known))} "
                            f"--data-dir {folder}")
        raise UserError(f"no images in {folder}{f', only {left}' * bool(left)}: pass a folder with "
                        f"{' '.join(ENDINGS)} files")
    if left and not QUIET:
        print(f"left out    {left} in {folder}: save them as .png to train on them")
    order = sorted(range(len(paths)), key=paths.__getitem__)
    order.sort(key=lambda i: plain(paths[i]))               # the order of the first sort stays, if two are spelt alike
    return Names(paths[i] for i in order), np.array(sizes)[order]


def image_folder(name, folder, size, text_encoder=None):
    """All images below a folder. Its immediate subfolders, if it has any, are the classes."""
    files, sizes = list_images(folder)
    top, sha = [], hashlib.sha256()                         # of json.dumps([spelt, sizes]), which would take 100 MB
    for spelt in map(plain, files):
        sha.update((("[[" if not top else ", ") + json.dumps(spelt)).encode())
        top.append(sys.intern(spelt.split("/")[0]) if "/" in spelt else None)       # one str a class, not one an image
    sha.update(f"], {sizes.tolist()}]".encode())
    class_names = sorted(set(top) - {None})
    if class_names and None in top:
        raise UserError(f"{folder} has images in subfolders, which are classes, and others such as "
                        f"{files[top.index(None)]} beside them: move those into a subfolder too")
    place = {c: i for i, c in enumerate(class_names)}
    captions = read_captions(folder, files)
    mode = "L" if all(is_gray(folder / f) for f in files) else "RGB"
    [shape] = all_of(lambda f: read_image(folder / f, mode, size).shape, files, 1)
    read = functools.partial(read_images, folder, files, mode, size, shape)
    return Dataset(name, shape, preload(read, len(files), shape), len(files),
                   [place[c] for c in top] if class_names else None, class_names, captions,
                   text.stored_text(folder, flat(captions), text_encoder) if captions and text_encoder else None,
                   files=sha.hexdigest())


def read_captions(folder, files):
    """The captions of each file, as a Dataset keeps them, from the folder's metadata.csv or metadata.jsonl; None if
    there is no such table. Raises UserError if any word of it would be lost."""
    tables = [folder / name for name in ("metadata.csv", "metadata.jsonl") if (folder / name).is_file()]
    if not tables:
        lost = sorted(f"{below}/{name}" for below in {posixpath.dirname(f) for f in files} - {""}
                      for name in ("metadata.csv", "metadata.jsonl") if (folder / below / name).is_file())
        if lost and not QUIET:
            some = ", ".join(lost[:5]) + ", ..." * (len(lost) > 5)
            print(f"left out    captions in {some}: put one table into {folder}, with paths from there")
        return None
    if len(tables) > 1:
        raise UserError(f"{folder} has both metadata.csv and metadata.jsonl: keep one")
    table, found = tables[0], {plain(f): [] for f in files}
    try:
        with open(table, newline="", encoding="utf-8-sig") as f:        # -sig: Excel begins with a byte order mark
            for line, file, captions in (csv_lines if table.suffix == ".csv" else json_lines)(f, table):
                if plain(file) not in found:
                    problem = ("is no picture that we read: save it as .png" if (folder / file).is_file()
                               else "does not exist: add it")
                    raise UserError(f"{table}, line {line} names {file}, which {problem}, or delete the line")
                found[plain(file)] += captions
    except UnicodeDecodeError as e:
        raise UserError(f"{table} cannot be read ({e}): save it in UTF-8") from None
    captions = [found[plain(f)] for f in files]
    if [] in captions:
        raise UserError(f"{table} has no line for {files[captions.index([])]}: add one or move the image away")
    return [c[0] if len(c) == 1 else c for c in captions]


def csv_lines(f, table):
    """Yields line number, file and captions for each row of a CSV."""
    rows, line = csv.reader(f, strict=True, skipinitialspace=True), 1
    try:
        header = [column.strip() for column in next(rows, [])]
        if header.count("file_name") != 1 or header.count("text") != 1:
            raise UserError(f"{table} lacks columns or has them twice: its first line must be file_name,text")
        line = rows.line_num + 1
        for row in rows:
            if any(map(str.strip, row)):                    # else the line is blank
                if len(row) != len(header):
                    raise UserError(f"{table}, line {line} has {len(row)} columns instead of {len(header)}: put a text "
                                    f"with commas into double quotes")
                yield line, row[header.index("file_name")], [row[header.index("text")]]
            line = rows.line_num + 1                        # a text in quotes may have several lines
    except csv.Error as e:
        raise UserError(f"{table} cannot be read from line {line} on ({e}): check its double quotes") from None


def json_lines(f, table):
    """Yields line number, file and captions for each line of JSON."""
    for line, content in enumerate(f, 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
            file, captions = row["file_name"], row["text"]
            captions = [captions] if isinstance(captions, str) else captions
            if not (captions and isinstance(captions, list) and all(isinstance(c, str) for c in [file, *captions])):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f'{table}, line {line} is not understood: write {{"file_name": "1.png", "text": "a cat"}}, '
                            f'or as text a list, ["a cat", "a pet"]') from None
        yield line, file, captions


def unreadable(images):
    """The UserError for images that cannot be read. images: a str for each, its path and what is wrong."""
    many, them = (f"{len(images):,} images cannot be read: ", "them") if len(images) > 1 else ("cannot read ", "it")
    some = "; ".join([*images[:50], *["..."] * (len(images) > 50)])
    error = UserError(f"{many}{some}: replace {them} or move {them} away")
    error.images = images
    return error


def all_of(read, items, enough=None):
    """[read(item) for each item], or for so many as are `enough`. Raises one UserError for all images that cannot be
    read."""
    done, bad = [], []
    for item in items:
        try:
            done.append(read(item))
        except UserError as e:
            if not hasattr(e, "images"):
                raise
            bad += e.images
        if len(done) == enough:
            return done
    if bad:
        raise unreadable(list(dict.fromkeys(bad)))          # a batch may have an image twice
    return done


def read_images(folder, files, mode, size, shape, indices):
    """The images `indices` of `files` -> uint8 (B, C, H, W). Raises UserError if one is not of `shape`."""
    batch = all_of(lambda i: read_image(folder / files[i], mode, size), indices)
    for i, image in zip(indices, batch):
        if image.shape != shape:
            raise UserError(f"{folder / files[i]} is {image.shape[1]}x{image.shape[2]}, but images before it are "
                            f"{shape[1]}x{shape[2]}: pass --image-size, for example 64")
    return np.stack(batch)                                                          # (B, C, H, W)


def is_gray(path):
    try:
        with Image.open(path) as image:
            return image.mode in ("1", "L", "LA")
    except Exception:                   # read_image will say what is wrong with it
        return True


def read_image(path, mode, size=None):
    """-> uint8 (C, H, W) of mode "L" or "RGB", upright, transparent parts white. Raises UserError."""
    try:
        with Image.open(path) as image:
            deep = image.mode[0] in "IF"
            film = getattr(image, "is_animated", False) and image.format != "MPO"   # (a phone's JPEG with its preview)
            image = ImageOps.exif_transpose(image)          # phones store pictures sideways
            if image.has_transparency_data:
                paper = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(paper, image.convert("RGBA"))
            image = image.convert(mode)
    except Exception as e:              # decoders raise all kinds of exceptions for damaged files
        raise unreadable([f"{path} ({e})"]) from None
    if deep:                            # the conversion has clipped it
        raise unreadable([f"{path} (more than 8 bits per channel: save it with 8)"])
    if film:
        raise unreadable([f"{path} (a film: only pictures are read, or moving, which we draw)"])
    return to_array(image, size)


def to_array(image, size):
    """-> uint8 (C, H, W). With size = (H, W), the image is scaled until it just covers that, and cropped to it."""
    image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC) if size else image
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)                      # (C, H, W)
