"""Captions to tensors: spelt in bytes, or by a frozen T5."""
import hashlib
import json
import logging
import re
from pathlib import Path

import numpy as np
import torch

from diffusion import UserError
from support.cli import QUIET

MEMO = 2**30                                           # bytes of embeddings to keep

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
            raise UserError(f"text encoder {name} needs one more package: pip install transformers, or pass "
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
                    raise UserError("it holds no T5 encoder")
                break
            except Exception as e:                          # damage and typos come as all kinds
                problem = (str(e).strip() or repr(e)).splitlines()[0]
        else:
            raise UserError(f"text encoder {name} cannot be loaded ({problem}): pass a T5's name, such as "
                            f"google/flan-t5-xl, or, where it cannot be downloaded, its folder")
        self.name, self.device, self.dim = name, torch.device(device), model.config.d_model
        self.model = model.float().eval().requires_grad_(False).to(device)
        self.memo, self.room = {}, MEMO                # caption: embedding; bytes left for more

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
            raise UserError(f"{self.path} does not know {e}: use captions of its folder") from None
        try:                                                # opened each time: a map cannot be pickled
            found = np.load(self.path, mmap_mode="r")[rows]                         # (B, longest, dim)
        except (OSError, ValueError) as e:
            raise UserError(f"{self.path} cannot be read ({e}): run python -m support.prepare captions again") from None
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
    raise UserError(f"{path} does not fit the captions of {folder}: run python -m support.prepare captions {folder} "
                    f"--text-encoder {name} again")
