"""Captions to tensors: spelt in bytes, or read by a frozen T5.

    encoder = text_encoder(name)
    text, mask = encoder(captions)      mask (B, L): True where there is a token; nowhere, if a caption is empty, except
                                        with `encoder.empty = True`: a T5 then embeds the empty caption, too

    ByteText      "bytes", built in: the bytes of each word. text long (B, 16, 12)
    Spelling      a layer of the model, for "bytes": it learns to read them
    T5Text        a T5 of Hugging Face, by its name or folder. text float32 (B, 128, dim)
    StoredText    what a T5 has made of a folder's captions, from a file that `python -m support.prepare captions` wrote

`encoder.dim` tells a model what comes in: "bytes", or the width of the T5. `encoder.size(caption)` is the length of a
caption, of which the encoder reads the first `encoder.L`, counted in `encoder.unit`.
"""
import contextlib
import hashlib
import json
import logging
import math
import re
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from diffusion import UserError
from support.cli import QUIET

TOKENS = 128                            # of a caption that a T5 reads
MEMO = 2**30                            # bytes of embeddings that a T5Text keeps


def text_encoder(name, device="cpu", dtype=torch.float32):
    return ByteText() if name == "bytes" else T5Text(name, device, dtype)


def full_name(name):
    """A folder's absolute path, so that a run finds its T5 from anywhere. Other names stay as they are."""
    return str(Path(name).resolve()) if name != "bytes" and Path(name).is_dir() else name


def pretrained(kind, name, load, example):
    """A frozen network of Hugging Face, or of a folder, loaded silently. Raises UserError.

    load(local_files_only) -> network, report. kind, such as "VAE", and example, a good name, are for the message."""
    for library in ("transformers", "diffusers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    for local in [True] if Path(name).is_dir() else [True, False]:      # what is on the disk needs no network
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")             # they are meant for libraries, not for our users
                network, report = load(local)
            if report["missing_keys"]:                      # these weights would be random
                raise UserError(f"it holds no {kind}")
            return network.float().eval().requires_grad_(False)
        except Exception as e:                              # typos and damage raise all kinds of exceptions
            problem = (str(e).strip() or repr(e)).splitlines()[0]
    raise UserError(f"{kind} {name} cannot be loaded ({problem}): pass a name such as {example} or, where it cannot be "
                    f"downloaded, its folder")


def tidy(caption):
    """A caption without what no encoder can take: NUL, and the half characters that a terminal makes of bad bytes. A
    letter with an accent is one character (NFC): names of files on a Mac have two."""
    return unicodedata.normalize("NFC", caption.replace("\0", "").encode("utf-8", "replace").decode()).strip()


def cut(encoder, captions, what="captions"):
    """A sentence that says how many captions are longer than an encoder reads; "" if none is."""
    sizes = [encoder.size(caption) for caption in captions]
    longer = sum(size > encoder.L for size in sizes)
    if not longer:
        return ""
    are = "is" if longer == 1 else "are"
    most = max(sizes)
    return f"{longer:,} of {len(sizes):,} {what} {are} cut after {encoder.L} {encoder.unit}; the longest has {most}"


class ByteText:
    """Words as the bytes that spell them. text: long (B, 16, 12). Each word fills a row, a word of more than 12 bytes
    several rows. 0 means that there is no byte."""
    name = dim = "bytes"
    empty = False
    L, W = 16, 12                                           # words; bytes of a word
    unit = "words of 12 bytes (a longer word counts as several)"

    def pieces(self, caption):
        words = [word.encode() for word in tidy(caption).lower().split()]
        return [word[i:i + self.W] for word in words for i in range(0, len(word), self.W)]

    def size(self, caption):
        return len(self.pieces(caption))

    def __call__(self, captions, half=False):               # half: only StoredText needs it
        text = np.zeros((len(captions), self.L, self.W), np.int64)                  # (B, L, W)
        for rows, caption in zip(text, captions):
            for row, piece in zip(rows, self.pieces(caption)):      # zip ends after L pieces
                row[:len(piece)] = list(piece)
        text = torch.from_numpy(text)
        return text, text[:, :, 0] > 0                                              # (B, L, W), (B, L)


class Spelling(nn.Module):
    """Bytes of words (B, L, K), 0 where there is none -> tokens (B, L, D), learned with the network: the sum of a
    vector for each letter at its place in the word, and one for the word's place in the caption."""

    def __init__(self, D, L=ByteText.L, K=ByteText.W):
        super().__init__()
        self.letters = nn.Embedding(256 * K, D)
        self.places = nn.Parameter(0.1 * torch.randn(L, D))
        nn.init.normal_(self.letters.weight, std=0.5)       # a word of five letters has about size one

    def forward(self, text):
        letters = self.letters(text + 256 * torch.arange(text.shape[2], device=text.device))    # (B, L, K, D)
        return (letters * (text > 0)[..., None]).sum(2) + self.places                           # (B, L, D)


class T5Text:
    """The encoder half of a T5, frozen.

    Each caption runs alone, without padding, so its embedding depends on nothing else. A resumed run gets the same
    bits, although it embeds other captions together."""
    L, unit, empty = TOKENS, "tokens", False

    def __init__(self, name, device, dtype):
        try:
            import transformers                             # nothing else here needs it
        except ImportError:
            raise UserError(f"text encoder {name} needs one more package: pip install transformers, or pass "
                            f"--text-encoder bytes") from None

        def load(local):
            bars = "disable" if local or QUIET else "enable"                # a download shows its progress
            getattr(transformers.logging, f"{bars}_progress_bar")()
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
            return transformers.T5EncoderModel.from_pretrained(name, local_files_only=local, output_loading_info=True)

        self.model = pretrained("text encoder", name, load, "google/flan-t5-xl").to(device, dtype)
        self.name, self.device, self.dim = name, torch.device(device), self.model.config.d_model
        self.memo, self.room = {}, MEMO                     # caption: its embedding; bytes left for more

    def tokens(self, caption, most=TOKENS):
        caption = tidy(caption)
        return self.tokenizer(caption, truncation=True, max_length=most).input_ids if caption or self.empty else []

    def size(self, caption):
        return len(self.tokens(caption, 10**6))

    def embed(self, caption):
        """-> float16 (n, dim), from memory if this caption came up recently."""
        e = self.memo.pop(caption, None)
        if e is None:
            e, ids = torch.zeros(0, self.dim, dtype=torch.float16), self.tokens(caption)
            if ids:
                with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                    e = self.model(torch.tensor([ids], device=self.device)).last_hidden_state[0].half().cpu()
            self.room -= 2 * e.numel()
        self.memo[caption] = e                              # the last in the dict is the most recent
        while self.room < 0 and len(self.memo) > 1:
            self.room += 2 * self.memo.pop(next(iter(self.memo))).numel()
        return e

    def only(self, captions):
        """Embed these captions, and let the network go: whoever draws needs its memory. It can embed no others."""
        self.room = math.inf
        for caption in captions:
            self.embed(caption)
        self.model = None

    def __call__(self, captions):
        found = [self.embed(caption) for caption in captions]
        text = torch.zeros(len(found), TOKENS, self.dim, dtype=torch.float16)       # (B, 128, dim)
        for row, e in zip(text, found):
            row[:len(e)] = e
        mask = torch.arange(TOKENS) < torch.tensor([[len(e)] for e in found])       # (B, 128)
        return text.to(self.device).float(), mask.to(self.device)


class StoredText:
    """Looks embeddings of captions up in a file, without the T5: on the CPU, and in worker processes too."""
    L, unit, empty = TOKENS, "tokens", False

    def __init__(self, name, path, captions, lengths):
        self.name, self.path, self.lengths = name, path, np.array(lengths)
        self.dim = np.load(path, mmap_mode="r").shape[2]
        self.row = {caption: row for row, caption in enumerate(captions)}

    def size(self, caption):
        return int(self.lengths[self.row[caption]])

    def __call__(self, captions, half=False):
        """half: text in float16, as it is stored."""
        try:
            rows = [self.row[caption] for caption in captions]
        except KeyError as e:
            raise UserError(f"{self.path} does not know {e}: use captions of its folder") from None
        try:                                                # opened each time: a memory map cannot be pickled
            found = np.load(self.path, mmap_mode="r")[rows]                         # (B, longest, dim)
        except (OSError, ValueError) as e:
            raise UserError(f"{self.path} cannot be read ({e}): run python -m support.prepare captions again") from None
        text = torch.zeros(len(rows), TOKENS, self.dim, dtype=torch.float16 if half else torch.float32)
        text[:, :found.shape[1]] = torch.from_numpy(found)
        mask = torch.arange(TOKENS) < torch.from_numpy(self.lengths[rows, None])    # (B, 128)
        if not self.empty:                                  # the file has embeddings of empty captions, too
            none = torch.tensor([not tidy(caption) for caption in captions])        # (B,)
            text[none], mask[none] = 0, False
        return text, mask                                                           # (B, 128, dim), (B, 128)


def text_files(folder, captions, name):
    """Where the embeddings of a folder's captions by T5 `name` are stored -> the file of embeddings, one caption a row;
    the file that describes it; the caption of each row; what the description must say."""
    path = folder / f"text-{re.sub('[^A-Za-z0-9.]+', '-', name)}.npy"
    captions = sorted({"", *captions})
    digest = hashlib.sha256(json.dumps(captions).encode()).hexdigest()
    return path, path.with_suffix(".json"), captions, {"encoder": name, "captions": digest, "empty": True}


def stored_text(folder, captions, name):
    """The StoredText of a folder's captions, or None if none was stored. Raises UserError if it is of other captions,
    or damaged."""
    path, about, captions, expected = text_files(folder, captions, name)
    if not about.is_file():
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):     # the file is missing or damaged
        saved = json.loads(about.read_text("utf8"))
        if {**saved, **expected} == saved:
            return StoredText(name, path, captions, saved["lengths"])
    raise UserError(f"{path} does not fit the captions of {folder}: run python -m support.prepare captions {folder} "
                    f"--text-encoder {name} again")
