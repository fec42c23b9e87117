"""Captions to tensors: bytes; a T5, or something that acts like one where transformers is missing; and
embeddings computed beforehand. No network: the T5 is tiny, random and made here."""
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import sample
import train
from diffusion import UserError
from support import checkpoint, inputs, prepare, text
from support.datasets import hold_out, load
from support.text import T5Text, text_encoder

ROOT = Path(__file__).parent.parent
CAPTIONS = ["a small red circle", "a big blue star", "", "a small red circle", "ünïcode 猫", " \t",
            "word " * 200]


# --- bytes ---

def spell(text, mask):
    """The pieces of a batch of bytes, as they stand there."""
    return [[bytes(row[row > 0].tolist()) for row in rows[m]] for rows, m in zip(text, mask)]


def test_bytes_are_the_words():
    encoder = text_encoder("bytes")
    assert encoder.name == encoder.dim == "bytes"
    text, mask = encoder(["A small  RED\ncircle", "É", "internationalization of x", ""])
    assert text.shape == (4, 16, 12) and text.dtype == torch.long
    assert mask.shape == (4, 16) and mask.dtype == torch.bool
    assert spell(text, mask) == [[b"a", b"small", b"red", b"circle"], ["é".encode()],
                                 [b"internationa", b"lization", b"of", b"x"], []]
    assert mask.sum(1).tolist() == [4, 1, 4, 0] and not text[~mask].any()
    assert text[0, 1].tolist() == [*b"small"] + [0] * 7         # from the left


def test_bytes_are_cut_at_sixteen_pieces():
    text, mask = text_encoder("bytes")(["x" * 13 + " " + " ".join("abcdefghijklmnopqrst"), "y" * 500])
    assert spell(text, mask)[0] == [b"x" * 12, b"x"] + [bytes([c]) for c in b"abcdefghijklmn"]
    assert spell(text, mask)[1] == [b"y" * 12] * 16 and mask.all()


def test_what_is_cut_is_counted():
    encoder = text_encoder("bytes")
    assert text.cut(encoder, ["a " * 16, "猫" * 64, ""]) == ""
    assert re.fullmatch(r"1 of 2 words is cut after 16 words of 12 bytes .*; the longest has 17",
                        text.cut(encoder, ["猫" * 65, "a"], "words"))


@pytest.mark.parametrize("bad, good", [("re\0d \0 star\0", "red star"), ("\0", ""), ("\ud800red", "?red"),
                                       ("cafe\u0301", "caf\u00e9")])
def test_bytes_take_any_string(bad, good):
    for got, expected in zip(text_encoder("bytes")([bad, "x"]), text_encoder("bytes")([good, "x"])):
        assert torch.equal(got, expected)


def test_bytes_do_not_depend_on_the_batch():
    encoder = text_encoder("bytes")
    together = encoder(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        for batch, alone in zip(together, encoder([caption])):
            assert torch.equal(batch[i], alone[0])


def test_bytes_tell_the_drawn_captions_apart():
    captions = sorted(set(load("moving").captions))
    text, mask = text_encoder("bytes")(captions)
    assert len(text.flatten(1).unique(dim=0)) == len(captions) == 384 and (mask.sum(1) == 6).all()


# --- T5 ---

class Counted(torch.nn.Module):
    """Counts the captions that run through a T5."""

    def __init__(self, model):
        super().__init__()
        self.model, self.count = model, 0

    def forward(self, ids):
        self.count += len(ids)
        return self.model(ids)


class PretendT5(T5Text):
    """What transformers would load is made up: bytes are tokens, and all tokens of a caption mix."""

    def __init__(self, name="pretend/t5", device="cpu", dtype=torch.float32):
        torch.manual_seed(0)
        table, mix = torch.nn.Embedding(257, 16), torch.nn.Linear(16, 16)

        def model(ids):
            x = table(ids)
            return SimpleNamespace(last_hidden_state=mix(x + x.cumsum(1)).tanh().detach())

        def tokenizer(caption, truncation, max_length):
            return SimpleNamespace(input_ids=[*caption.encode()[:max_length - 1], 256])
        self.name, self.device, self.dim, self.tokenizer = name, torch.device(device), 16, tokenizer
        self.model = Counted(model)
        self.memo, self.room = {}, text.MEMO


def save_t5(folder):
    """A folder with a tiny random T5, as Hugging Face's would be: encoder and decoder."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=16, d_kv=4, num_heads=2, d_ff=32, num_layers=2, vocab_size=384)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    transformers.ByT5Tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["pretend", "transformers"])
def make(request, tmp_path, monkeypatch):
    """A function that makes the encoder; text_encoder(make.name) does the same."""
    name = "pretend/t5" if request.param == "pretend" else save_t5(tmp_path / "t5")
    real = T5Text if request.param == "transformers" else PretendT5

    def encoder(name=name, device="cpu", dtype=torch.float32):
        made = real(name, device, dtype)
        if not isinstance(made.model, Counted):
            made.model = Counted(made.model)
        return made
    monkeypatch.setattr(text, "T5Text", encoder)
    encoder.name = name
    return encoder


def test_t5(make):
    encoder = text_encoder(make.name)
    assert (encoder.name, encoder.dim) == (make.name, 16)
    text, mask = encoder(CAPTIONS)
    assert text.shape == (7, 128, 16) and text.dtype == torch.float32 and not text.requires_grad
    assert mask.shape == (7, 128) and mask.dtype == torch.bool
    lengths = [len(c.encode()) + 1 for c in CAPTIONS]           # a token a byte, and the end
    lengths[2] = lengths[5] = 0
    lengths[6] = 128
    assert mask.sum(1).tolist() == lengths
    assert not text[~mask].any() and text[mask].abs().sum(1).min() > 0
    assert torch.equal(text[0], text[3]) and not torch.equal(text[0], text[1])
    assert not any(p.requires_grad for p in encoder.model.parameters())


def test_t5_runs_once_for_each_caption(make):
    encoder = make()
    first = encoder(CAPTIONS)
    assert encoder.model.count == 4                             # different ones that are not empty
    for captions in (CAPTIONS, CAPTIONS[::-1], CAPTIONS[4:5]):
        encoder(captions)
    assert encoder.model.count == 4
    for got, expected in zip(encoder(CAPTIONS), first):
        assert torch.equal(got, expected)


def test_t5_does_not_depend_on_batch_memory_or_autocast(make):
    """Bit for bit: fresh, remembered, alone, in company, and where training has switched to bf16."""
    together = make()(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        with torch.autocast("cpu", torch.bfloat16):
            for batch, alone in zip(together, make()([caption])):
                assert torch.equal(batch[i], alone[0])


def test_t5_forgets_what_is_too_much(make, monkeypatch):
    monkeypatch.setattr(text, "MEMO", 3 * 8 * 16 * 2)      # three captions of 7 bytes
    encoder = make()
    captions = [f"number{i}" for i in range(5)]
    first = encoder(captions)
    assert list(encoder.memo) == captions[2:] and encoder.room == 0
    encoder([captions[2]])                                      # now captions[3] is the oldest
    assert encoder.model.count == 5
    encoder([captions[0]])
    assert encoder.model.count == 6 and list(encoder.memo) == [captions[i] for i in (4, 2, 0)]
    for got, expected in zip(encoder(captions), first):
        assert torch.equal(got, expected)
    encoder(["longer than memory " * 5])
    assert len(encoder.memo) == 1
    encoder(captions)
    assert len(encoder.memo) == 3 and encoder.room == 0


def test_t5_lets_its_network_go_and_keeps_what_it_read(make, monkeypatch):
    monkeypatch.setattr(text, "MEMO", 100)                      # not even one caption
    encoder = make()
    first = encoder(CAPTIONS)
    encoder.only(CAPTIONS)
    assert encoder.model is None
    for got, expected in zip(encoder(CAPTIONS[::-1]), first):
        assert torch.equal(got.flip(0), expected)


def test_t5_in_half_the_memory(tmp_path):
    name = save_t5(tmp_path)
    whole, half = (text_encoder(name, "cpu", dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    (text, mask), (rough, same) = whole(CAPTIONS), half(CAPTIONS)
    assert torch.equal(mask, same) and rough.dtype == torch.float32
    torch.testing.assert_close(rough, text, atol=0.1, rtol=0.1)


def test_t5_agrees_with_transformers_on_a_padded_batch(tmp_path):
    name = save_t5(tmp_path)
    import transformers
    model = transformers.T5EncoderModel.from_pretrained(name).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(name)(
        CAPTIONS, padding="max_length", max_length=128, truncation=True, return_tensors="pt")
    with torch.no_grad():
        reference = model(**tokens).last_hidden_state * tokens.attention_mask[:, :, None]
    text, mask = text_encoder(name)(CAPTIONS)
    some = torch.tensor([bool(c.strip()) for c in CAPTIONS])
    assert torch.equal(mask[some], tokens.attention_mask[some].bool())
    torch.testing.assert_close(text[some], reference[some], atol=2e-3, rtol=2e-3)


def test_loading_a_t5_is_quiet(tmp_path, capfd):
    name = save_t5(tmp_path)
    capfd.readouterr()
    text_encoder(name)(["a caption"])
    out, err = capfd.readouterr()
    assert not out and not err


# --- stored ---

def pictures(folder, captions):
    folder.mkdir(exist_ok=True)
    for i, _ in enumerate(captions):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / f"{i}.png")
    lines = "".join(f'{i}.png,"{caption}"\n' for i, caption in enumerate(captions))
    (folder / "metadata.csv").write_text("file_name,text\n" + lines, encoding="utf-8")
    return str(folder)


SHORT = ["a red circle", "a blue star", "", "a red circle", "ünïcode 猫", "a green cross"]


def test_stored_is_on_the_fly(make, tmp_path, capsys):
    folder = pictures(tmp_path / "pictures", SHORT)
    assert "text" not in load(folder, text_encoder=make.name)[[0]]
    prepare.main(["captions", folder, "--text-encoder", make.name, "--device", "cpu"])
    assert ".npy" in capsys.readouterr().out
    assert "text" not in load(folder)[[0]] and "text" not in load(folder, text_encoder="other/t5")[[0]]
    dataset = load(folder, text_encoder=make.name)
    text, mask = make()(SHORT)
    L = int(mask.sum(1).max())
    file, = (tmp_path / "pictures").glob("*.npy")
    assert np.load(file).shape == (5, L, 16) and np.load(file).dtype == np.float16      # each caption once
    batch = dataset[[4, 0, 2, 3]]
    assert batch["text"].dtype == torch.float16 and batch["text_mask"].dtype == torch.bool
    assert torch.equal(batch["text"].float(), text[[4, 0, 2, 3]])
    assert torch.equal(batch["text_mask"], mask[[4, 0, 2, 3]])
    # as an encoder
    assert (dataset.texts.name, dataset.texts.dim) == (make.name, 16)
    again = dataset.texts(SHORT)
    assert again[0].dtype == torch.float32
    assert torch.equal(again[0], text) and torch.equal(again[1], mask)
    with pytest.raises(UserError, match="does not know 'a violet heart'"):
        dataset.texts(["a violet heart"])


def stored(tmp_path, monkeypatch, captions=SHORT):
    monkeypatch.setattr(text, "T5Text", PretendT5)
    folder = pictures(tmp_path / "pictures", captions)
    prepare.store_text(Path(folder), "pretend/t5", "cpu")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_subsets_and_workers_keep_text_aligned(tmp_path, monkeypatch, workers):
    dataset = load(stored(tmp_path, monkeypatch), text_encoder="pretend/t5")
    assert len(pickle.dumps(dataset.texts)) < 2000              # the table itself stays in its file
    part = hold_out(dataset.subset([5, 4, 3, 2, 1]), ["star"])
    text, mask = dataset.texts(SHORT)
    order = [[0, 1], [3, 2]]
    for batch, indices in zip(DataLoader(part, batch_size=None, sampler=order, num_workers=workers), order):
        old = [[5, 4, 3, 2][i] for i in indices]
        assert batch["caption"] == [SHORT[i] for i in old]
        assert torch.equal(batch["text"].float(), text[old]) and torch.equal(batch["text_mask"], mask[old])


@pytest.mark.parametrize("damage", ["caption", "json", "npy", "no npy", "name", "older"])
def test_what_does_not_fit_is_refused(tmp_path, monkeypatch, damage):
    folder = Path(stored(tmp_path, monkeypatch))
    npy, about = folder / "text-pretend-t5.npy", folder / "text-pretend-t5.json"
    if damage == "caption":
        pictures(folder, ["a violet circle", *SHORT[1:]])
    elif damage == "json":
        about.write_bytes(about.read_bytes()[:-9])
    elif damage == "npy":
        npy.write_bytes(npy.read_bytes()[:-9])
    elif damage == "no npy":
        npy.unlink()
    elif damage == "older":                                     # from when the empty caption was not embedded
        about.write_text(json.dumps({k: v for k, v in json.loads(about.read_text()).items() if k != "empty"}))
    else:                                                       # a T5 whose name gives the same file name
        about.write_text(json.dumps({**json.loads(about.read_text()), "encoder": "pretend-t5"}))
    with pytest.raises(UserError) as e:
        load(str(folder), text_encoder="pretend/t5")
    assert f"python -m support.prepare captions {folder} --text-encoder pretend/t5" in str(e.value)
    load(str(folder))                                           # without a text encoder nothing is checked
    prepare.store_text(folder, "pretend/t5", "cpu")
    batch = load(str(folder), text_encoder="pretend/t5")[range(6)]
    assert torch.equal(batch["text_mask"].sum(1), PretendT5()(batch["caption"])[1].sum(1))


def test_several_and_long_captions_are_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text, "T5Text", PretendT5)
    folder = Path(pictures(tmp_path / "pictures", SHORT[:2]))
    (folder / "metadata.csv").write_text(f"file_name,text\n0.png,one\n1.png,two\n0.png,{'word ' * 40}\n")
    prepare.store_text(folder, "pretend/t5", "cpu")
    said = "1 of {} captions is cut after 128 tokens; the longest has 200"
    assert capsys.readouterr().out.strip() == said.format(4)    # "" is the fourth
    args = train.parse(["--model", "mdm", "--data", str(folder), "--text-encoder", "pretend/t5"])
    dataset, encode = inputs.for_training(args, checkpoint.load_paper("mdm"), "cpu")
    assert dataset.condition == ("captions (pretend/t5, stored), up to 2 for an image\nnote        "
                                 + said.format("3 different"))
    for draw, (a, b) in enumerate((("one", "two"), ("word " * 40, "two"))):
        for got, expected in zip((dataset[[0, 1], [draw, draw]][k] for k in ("text", "text_mask")),
                                 PretendT5()([a, b])):
            assert torch.equal(got.to(expected.dtype), expected)


def test_pictures_may_change_if_captions_do_not(tmp_path, monkeypatch):
    folder = stored(tmp_path, monkeypatch)
    before = load(folder, text_encoder="pretend/t5").texts(SHORT)[0]
    pictures(Path(folder), [*SHORT[::-1], "a red circle"])
    batch = load(folder, text_encoder="pretend/t5")[range(7)]
    assert torch.equal(batch["text"].float(), torch.cat([before.flip(0), before[:1]]))


def test_an_interrupted_run_leaves_everything_as_it_was(tmp_path, monkeypatch):
    folder = Path(stored(tmp_path, monkeypatch))
    before = {f: f.read_bytes() for f in folder.iterdir()}

    def interrupted(self, caption):
        if "green" in caption:
            raise KeyboardInterrupt
        return torch.zeros(len(self.tokens(caption)), self.dim, dtype=torch.float16)
    monkeypatch.setattr(PretendT5, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.store_text(folder, "pretend/t5", "cpu")
    assert {f: f.read_bytes() for f in folder.iterdir()} == before


def test_a_picture_without_a_caption_is_named(tmp_path):
    folder = pictures(tmp_path / "pictures", SHORT)
    Image.new("RGB", (8, 8)).save(Path(folder) / "z.png")
    with pytest.raises(UserError, match="no line for z.png"):
        prepare.store_text(Path(folder), "pretend/t5", "cpu")


def test_a_full_disk_is_told_and_leaves_no_wrong_description(tmp_path, monkeypatch):
    folder = Path(stored(tmp_path, monkeypatch))
    replace = os.replace

    def full(source, target):
        if target.suffix == ".json":
            raise OSError(28, "No space left on device")
        replace(source, target)
    monkeypatch.setattr(prepare.os, "replace", full)
    with pytest.raises(UserError, match="cannot write .*No space left on device.*make room"):
        prepare.store_text(folder, "pretend/t5", "cpu")
    assert not [f for f in folder.iterdir() if f.suffix == ".json" or f.name.startswith(".")]
    assert "text" not in load(str(folder), text_encoder="pretend/t5")[[0]]


def test_stored_text_knows_the_empty_caption(tmp_path, monkeypatch):
    texts = load(stored(tmp_path, monkeypatch, SHORT[:2]), text_encoder="pretend/t5").texts
    text, mask = texts(["", SHORT[1]])
    assert mask.sum(1).tolist() == [0, 12] and not text[0].any()


# --- what users get wrong ---

def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers, or pass --text-encoder bytes"):
        text_encoder("google/flan-t5-xl")


@pytest.mark.parametrize("case", ["offline", "nowhere", "empty", "no weights", "half the weights"])
def test_what_is_no_t5(case, tmp_path, monkeypatch, capfd):
    name = save_t5(tmp_path / "t5")
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if case == "offline":
        name = "nobody/no-such-t5"
    elif case == "nowhere":
        name = "./nowhere/at/all"
    elif case == "empty":
        (tmp_path / "t5" / "config.json").write_text("")
    elif case == "no weights":
        (tmp_path / "t5" / "model.safetensors").unlink()
    else:
        from safetensors.torch import load_file, save_file
        weights = load_file(tmp_path / "t5" / "model.safetensors")
        weights = {k: v for k, v in weights.items() if "encoder.block.1" not in k}
        save_file(weights, tmp_path / "t5" / "model.safetensors", {"format": "pt"})
    capfd.readouterr()
    with pytest.raises(UserError) as e:
        text_encoder(name)
    message = str(e.value)
    assert name in message and "google/flan-t5-xl" in message and "\n" not in message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("arguments, needed", [
    (["pictures", "--text-encoder", "bytes"], ["bytes needs no file", "google/flan-t5-xl"]),
    (["plain", "--text-encoder", "pretend/t5"], ["plain has no captions", "metadata.csv", "file_name,text"]),
    (["nowhere", "--text-encoder", "pretend/t5"], ["no images in nowhere"]),
    (["pictures"], ["--text-encoder", "--help"]),
    (["pictures", "--text-encoder", "pretend/t5", "--device", "abacus"], ["abacus", "cpu"])])
def test_the_command_says_what_is_wrong(arguments, needed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text, "T5Text", PretendT5)
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pictures", SHORT)
    pictures(tmp_path / "plain", SHORT)
    (tmp_path / "plain" / "metadata.csv").unlink()
    with pytest.raises(SystemExit) as e:
        prepare.main(["captions", *arguments])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in needed), err
    assert not list(tmp_path.rglob("*.npy"))


def test_the_command_from_a_shell(tmp_path):
    """Without transformers, or with it but without this T5: the same kind of answer."""
    folder = pictures(tmp_path / "pictures", SHORT)
    done = subprocess.run([sys.executable, "-m", "support.prepare", "captions", folder, "--text-encoder",
                           str(tmp_path / "nowhere")],
                          cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: text encoder") and done.stderr.count("\n") == 1


def test_training_on_stored_text_never_needs_the_t5(tmp_path, monkeypatch, capsys):
    """From the first step to the last grid; prompts of one's own do need it."""
    folder = stored(tmp_path, monkeypatch)
    monkeypatch.setattr(inputs, "text_encoder", None)           # to call it would be an error
    monkeypatch.setattr(sample, "text_encoder", None)
    monkeypatch.setattr(train, "final_samples", lambda *args, draw=train.final_samples, **kwargs: draw(
        *args, "--steps", "2", **kwargs))
    train.main(["--model", "mdm", "--data", folder, "--text-encoder", "pretend/t5", "--results-dir",
                str(tmp_path), "--name", "run", "--max-steps", "2", "--global-batch-size", "4",
                "--sample-every", "1", "--set", "outer=()", "channels=(4,4)", "text_width=8", "embedding=8", "heads=2"])
    assert (tmp_path / "run" / "samples.png").exists()
    assert (tmp_path / "run" / "samples" / "step_0000001.png").exists()
    args = checkpoint.read(tmp_path / "run" / "latest.pt")["args"]
    assert args["text"] == 16 and set(args["prompts"]) == set(SHORT) - {""}
    with pytest.raises(TypeError):
        sample.main(["--ckpt", str(tmp_path / "run"), "--prompt", "a violet heart"])
    monkeypatch.setattr(sample, "text_encoder", PretendT5)
    sample.main(["--ckpt", str(tmp_path / "run"), "--prompt", "a violet heart", "word " * 40, "--steps", "1",
                 "--num-samples", "1", "--out", str(tmp_path / "heart.png")])
    assert (tmp_path / "heart.png").exists()
    assert "1 of 2 prompts is cut after 128 tokens; the longest has 200\n" in capsys.readouterr().out
