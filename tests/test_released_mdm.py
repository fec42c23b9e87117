"""The authors' released MDM checkpoints: a tiny network of their classes with its outputs, the names and shapes in
their three files, files that are none of these, and the way from such a file to pictures and to further training. The
weights themselves are not here."""
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from diffusion import UserError, cosine_alpha_bar, normal
from support import checkpoint, cost, inputs, prepare, released_mdm
from support.datasets import load
from test_text import PretendT5

mdm = checkpoint.load_paper("mdm")
HERE = Path(__file__).parent
LEVEL = dict(channels=(32, 32), blocks=(1, 1))
GOLDEN = dict(**LEVEL, attention=(0, 2), outer=(LEVEL, LEVEL), side=8, text_width=64, embedding=64, heads=8)
THIN = dict(channels=(4, 8, 16), blocks=(1, 1, 1), attention=(0, 0, 1), text_width=16, embedding=16, heads=2, side=8,
            T=10)
SIDES = (8, 16, 32)


def golden():
    """The authors' classes, configured like their network for 1024 pixels, but tiny, with random weights -> {their
    name: tensor}, and inputs and outputs. The weights are whole numbers q times a scale s."""
    stored = np.load(HERE / "released_mdm_tiny.npz")
    state, q = {}, torch.from_numpy(stored["q"])
    for line, s in zip(bytes(stored["names"]).decode().splitlines(), stored["s"]):
        name, shape = line.split()
        shape = [int(n) for n in shape.split("x")]
        part, q = q[:np.prod(shape)], q[np.prod(shape):]
        state[name] = part.view(shape) * float(s)
    return state, {k: torch.from_numpy(stored[k]) for k in stored if k[:2] in ("in", "ou")}


def released_names():
    """-> {side: {their name: shape}} of the three files."""
    own, files = {}, {}
    for line in (HERE / "released_mdm_names.txt").read_text().splitlines():
        if line.startswith("["):
            side = int(line[1:-1])
            own[side] = {}
        elif not line.startswith("#"):
            layer, shape = line.split()
            shape = [int(n) for n in shape.split("x")]
            own[side][f"{layer}.weight"] = shape
            if layer != "cond_emb":
                own[side][f"{layer}.bias"] = shape[:1]
    inner = {}
    for side in (64, 256, 1024):
        inner = files[side] = {**own[side], **{f"inner_unet.{name}": shape for name, shape in inner.items()}}
    return files


def thin_file(path, side=64, preset="cc12m-64", **more):
    """A file like the authors', with a thin network of ours for T5s of width 16 -> that network, and its options."""
    torch.manual_seed(0)
    options = {**THIN, **more}
    model, _ = mdm.build(preset, (3, side, side), text=16, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1)
    state = {released_mdm.their_name(name, model): tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, path)
    return model, options


# --- the function ---

@pytest.mark.parametrize("changed, least", [({}, 0), (dict(per_group=4), 1), (dict(see_padding=False), 0.1),
                                            (dict(standardise=False), 0.04)], ids=str)
def test_the_authors_network_gives_the_authors_numbers(tmp_path, changed, least):
    """Through a file like theirs, the converter and a checkpoint of ours. With one option off, no output fits."""
    state, expected = golden()
    torch.save({"state_dict": state, "step": 7}, tmp_path / "vis_model.pth")
    preset = released_mdm.write(tmp_path / "vis_model.pth", tmp_path / "mdm.pt", shape=(3, 32, 32), **GOLDEN, **changed)
    assert preset == "cc12m-1024"
    model, _, args = checkpoint.load_run(tmp_path / "mdm.pt")
    assert args["text"] == 64 and sum(p.numel() for p in model.parameters()) == sum(map(torch.numel, state.values()))
    z = [expected[f"in_z{side}"] for side in SIDES]
    for size, kind in ((None, "out"), (expected["in_size"], "out_size")):
        with torch.no_grad():
            outs = model(z, expected["in_t"], text=expected["in_text"], text_mask=expected["in_mask"], size=size)
        for side, out in zip(SIDES, outs, strict=True):
            off = (out - expected[f"{kind}_{side}"]).abs().max()
            assert off > least if changed else off < 1e-5, (kind, side, off)


def test_a_level_that_is_not_trained_is_not_standardised():
    """Its z is 0, and so is the standard deviation."""
    model, _ = mdm.build("tiny", (3, 64, 64), standardise=True)
    diffusion = mdm.build("tiny", (3, 64, 64), weights="finest")[1]
    outs = model(diffusion.visible([normal(torch.arange(1), shape) for shape in model.shapes()]), torch.tensor([5]))
    assert all(out.isfinite().all() for out in outs)


def test_half_precision_is_half_as_large_and_nearly_as_good(tmp_path):
    thin_file(tmp_path / "a.pth")
    for name, half in (("whole", False), ("half", True)):
        released_mdm.write(tmp_path / "a.pth", tmp_path / name, half, **THIN)
    whole, half = (checkpoint.load_run(tmp_path / name)[0].state_dict() for name in ("whole", "half"))
    assert all((v - half[k]).abs().max() < 1e-3 for k, v in whole.items())
    sizes = [(tmp_path / name).stat().st_size for name in ("whole", "half")]
    assert 0.5 < sizes[1] / sizes[0] < 0.7


@pytest.mark.parametrize("side, count", [(64, 713), (256, 889), (1024, 1063)])
def test_all_names_and_shapes_of_the_three_files_have_their_place(side, count):
    state = {name: torch.empty(shape, device="meta") for name, shape in released_names()[side].items()}
    preset, shape, width, ours = released_mdm.convert(state)
    assert (preset, shape, width) == (f"cc12m-{side}", (3, side, side), 2048)
    assert len(state) == count and {*map(id, state.values())} == {*map(id, ours.values())}
    with torch.device("meta"):
        mdm.build(preset, shape, text=2048)[0].load_state_dict(ours, assign=True)
    gigabytes = 4 * sum(map(torch.numel, state.values())) / 1e9
    assert released_mdm.GIGABYTES[side] == pytest.approx(gigabytes, abs=0.05)


def test_a_network_with_a_token_for_no_text_is_another():
    with pytest.raises(UserError, match="inner_unet.inner_unet.condition.null is missing"):
        released_mdm.convert(golden()[0], (3, 32, 32), **GOLDEN, empty_prompt=False)


# --- files that are none of the three ---

class Code:
    """Runs when Python's own pickle reads it."""

    def __init__(self, function, mark):
        self.function, self.mark = function, mark

    def __reduce__(self):
        words = f"touch {self.mark}" if self.function is os.system else f"open({str(self.mark)!r}, 'w')"
        return self.function, (words,)


def test_the_authors_file_is_not_replaced(tmp_path, capsys):
    (path := tmp_path / "vis_model.pth").write_bytes(b"theirs")
    with pytest.raises(SystemExit):
        released_mdm.main([str(path), str(tmp_path / "." / "vis_model.pth")])
    assert "would be replaced" in capsys.readouterr().err and path.read_bytes() == b"theirs"


def refused(path, capsys, *needed):
    with pytest.raises(SystemExit):
        released_mdm.main([str(path), str(path.with_name("out.pt"))])
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and all(word in said for word in needed), said
    assert not path.with_name("out.pt").exists()


def test_tensors_that_do_not_fit_are_named(tmp_path, capsys):
    path = tmp_path / "vis_model.pth"
    state = {name: torch.empty(1).expand(shape) for name, shape in released_names()[64].items()}   # takes no memory

    def saved(**changes):
        torch.save({"state_dict": {k: v for k, v in {**state, **changes}.items() if v is not None}}, path)
        return path
    refused(saved(**{"down_blocks.2.attn.9.qkv.bias": None}), capsys, "cc12m-64, but",
            "down_blocks.2.attn.9.qkv.bias is missing")
    refused(saved(**{"down_blocks.2.attn.10.qkv.bias": torch.zeros(1)}), capsys,
            "down_blocks.2.attn.10.qkv.bias is left over")
    refused(saved(**{"conv_in.bias": torch.zeros(4)}), capsys, "conv_in.bias is (4,) and not (256,)")
    thin_file(path)                                         # another configuration
    refused(path, capsys, "cc12m-64, but", "not all tensors fit", "; ...")


@pytest.mark.parametrize("content, needed", [
    ({"model": {}}, "no state_dict of tensors"), ({"state_dict": {"a": 1}}, "no state_dict of tensors"),
    ([1, 2], "no state_dict of tensors"), (b"<html>", "damaged, cut short or no checkpoint")], ids=str)
def test_files_that_are_something_else(tmp_path, capsys, content, needed):
    path = tmp_path / "vis_model.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    refused(path, capsys, needed)


def test_a_file_cut_in_half_or_with_a_flipped_bit(tmp_path, capsys):
    path = tmp_path / "vis_model.pth"
    thin_file(path)
    whole = path.read_bytes()
    for damaged in (whole[:len(whole) // 2], whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:]):
        path.write_bytes(damaged)
        refused(path, capsys, "damaged, cut short or no checkpoint: download it again")


def test_nothing_in_the_file_runs(tmp_path, capsys):
    """A name of os is refused. Others, and objects of classes that are not here, are left out, and it converts."""
    path, mark = tmp_path / "vis_model.pth", tmp_path / "it-ran"
    thin_file(path)
    state = torch.load(path)["state_dict"]
    torch.save({"state_dict": state, "reader": Code(os.system, mark)}, path)
    refused(path, capsys, "holds more than weights, perhaps code")
    theirs = types.ModuleType("ml_mdm_config")
    exec("class Config:\n    def __init__(self): self.lr = 1e-4", vars(theirs))
    theirs.Config.__module__ = "ml_mdm_config"
    sys.modules["ml_mdm_config"] = theirs
    torch.save({"state_dict": state, "config": theirs.Config(), "reader": Code(eval, mark)}, path)
    del sys.modules["ml_mdm_config"]
    found = released_mdm.read(path)
    assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)
    assert "no weight (builtins.eval, ml_mdm_config.Config): nothing" in capsys.readouterr().out
    assert not mark.exists() and "ml_mdm_config" not in sys.modules


def test_without_a_file_it_says_where_to_get_one(tmp_path, capsys):
    refused(tmp_path / "vis_model.pth", capsys, *(f"models/mdm/flickr{side}/vis_model.pth" for side in (64, 256, 1024)),
            "1.9 GB", "licence")


# --- pictures ---

@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A function: flags of sample.py -> pictures (N, H, W, 3), drawn by a thin network of two levels, from a file like
    the authors'. The T5 is made up. While pictures are drawn, it must be gone."""
    _, options = thin_file(tmp_path / "vis_model.pth", 16, "cc12m-256", outer=(dict(channels=(8, 8), blocks=(1, 1)),))
    released_mdm.write(tmp_path / "vis_model.pth", tmp_path / "mdm.pt", shape=(3, 16, 16), text_encoder="pretend/t5",
                       **options)
    made, real = [], sample.generate

    def text_encoder(*args):
        made.append(PretendT5(*args))
        return made[-1]

    def generate(*args, **kwargs):
        assert made[-1].model is None
        return real(*args, **kwargs)
    monkeypatch.setattr(sample, "text_encoder", text_encoder)
    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.chdir(tmp_path)

    def draw(*flags, folder=None, fid=False):
        folder = folder or f"pictures{len(made)}"
        sample.main(["--ckpt", "mdm.pt", "--steps", "ddim2", "--save-images", folder, *flags,
                     *["--num-samples", "2"] * (not fid)])
        return np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted(Path(folder).glob("*.png"))])
    return draw


def test_from_a_prompt_to_pictures_away_from_another(drawn):
    prompt = "--prompt", "a red fox in the snow"
    plain, empty, other = (drawn(*prompt, "--cfg-scale", "7.5", *more) for more in (
        (), ("--negative-prompt", ""), ("--negative-prompt", "low quality")))
    assert np.array_equal(plain, empty) and np.abs(plain - other).mean() > 0.1
    assert np.abs(plain - drawn(*prompt, "--cfg-scale", "1")).mean() > 0.1
    model, diffusion, _ = checkpoint.load_run("mdm.pt")
    t5 = PretendT5()
    t5.empty = True
    for negative, pictures in (("", plain), ("low quality", other)):
        (text, mask), (away, away_mask) = t5([prompt[1]]), t5([negative])

        def guided(z, t):                                   # two calls, with the authors' formula
            pairs = zip(model(z, t, text=away, text_mask=away_mask), model(z, t, text=text, text_mask=mask))
            return [u + 7.5 * (c - u) for u, c in pairs]
        x = diffusion.sample(guided, (3, 16, 16), torch.tensor([0]), steps="ddim2")
        assert np.abs(sample.to_uint8(x)[0] - pictures[0]).max() <= 1
    fid = drawn(*prompt, "--cfg-scale", "7.5", "--negative-prompt", "low quality", "--num-fid-samples", "2", fid=True)
    assert np.abs(fid - other).max() <= 1
    assert np.load("pictures4.npz")["arr_0"].shape == (2, 16, 16, 3)
    with pytest.raises(SystemExit):                         # these are pictures away from something else
        drawn(*prompt, "--cfg-scale", "7.5", "--num-fid-samples", "2", folder="pictures4", fid=True)


def test_no_text_is_the_empty_prompt_and_nothing_else(tmp_path):
    model, _ = thin_file(tmp_path / "a.pth")
    assert not PretendT5()([""])[1].any()
    t5 = PretendT5()
    t5.empty = True
    text, mask = t5(["", "a moon"])
    assert mask.sum(1).tolist() == [1, 7] and text[0, 0].any() and not text[0, 1:].any()
    z, t = [normal(torch.arange(2), (3, 64, 64))], torch.tensor([3, 700])
    assert model(z, t, text=text, text_mask=mask)[0].isfinite().all()
    with pytest.raises(UserError, match="always reads text"):
        model(z, t)
    empty = mdm.ExtendedDiffusion(cosine_alpha_bar(10), model.shapes())
    with pytest.raises(UserError, match="pass negative="):
        empty.sample(model, (3, 64, 64), torch.arange(2), steps="1", cfg_scale=2.0, text=text, text_mask=mask)
    with pytest.raises(UserError, match="empty_prompt=True needs a T5"):
        mdm.build("cc12m-64", (3, 64, 64), text="bytes")


@pytest.mark.parametrize("flags, needed", [
    (["--cfg-scale", "1", "--negative-prompt", "x"], "needs guidance"),
    (["--denoise", "test", "--from-step", "5"], "always reads a prompt")], ids=str)
def test_flags_that_do_not_fit(drawn, capsys, flags, needed):
    with pytest.raises(SystemExit):
        drawn(*flags) if "--denoise" not in flags else sample.main(["--ckpt", "mdm.pt", *flags])
    assert needed in capsys.readouterr().err


# --- further training ---

def test_older_runs_of_these_presets_keep_what_they_computed():
    """Their options do not name the four that the presets have now."""
    new = {"per_group", "see_padding", "standardise", "empty_prompt"}
    preset = mdm.CONFIGS["cc12m-64"]
    run = dict(model="mdm", preset="cc12m-64", set={}, options={k: v for k, v in preset.items() if k not in new})
    options = checkpoint.before(run)
    assert options.keys() == preset.keys() and {k for k in new if options[k] != preset[k]} == new
    assert checkpoint.before({**run, "options": preset}) == preset


def captioned(folder, captions):
    folder.mkdir()
    lines = ["file_name,text"]
    for i, caption in enumerate(captions):
        Image.fromarray(np.full((64, 64, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{caption}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return str(folder)


@pytest.mark.parametrize("stored", [False, True])
def test_training_goes_on_from_a_released_network(tmp_path, monkeypatch, capsys, stored):
    """At 64 pixels. A hidden caption becomes the empty prompt."""
    _, options = thin_file(tmp_path / "vis_model.pth")
    released_mdm.write(tmp_path / "vis_model.pth", tmp_path / "mdm.pt", text_encoder="pretend/t5", **options)
    folder = captioned(tmp_path / "pictures", ["a cat", "a small dog"])
    monkeypatch.setattr(cost, "multiply_adds", lambda *args: None)          # takes longer than the steps
    for module in (inputs, sample, prepare):
        monkeypatch.setattr(module, "text_encoder", PretendT5)
    if stored:
        prepare.store_text(Path(folder), "pretend/t5", "cpu")
        assert load(folder, text_encoder="pretend/t5").texts([""])[1].any() == False        # noqa: E712
    given, real, read = [], train.make_batch, mdm.Condition.forward

    def forward(self, t, y, text, mask):                    # also for the grid of samples, which is guided
        assert mask.any(1).all()
        return read(self, t, y, text, mask)
    monkeypatch.setattr(mdm.Condition, "forward", forward)

    def make_batch(batch, seeds, dataset, diffusion, args, encode, device):
        assert encode.nothing[0].shape[0] == 1
        with monkeypatch.context() as no_more:              # what no text is was read before: the GPU need not wait
            no_more.setattr(type(encode), "__call__", lambda self, captions, now=type(encode).__call__: (
                now(self, captions) if captions != [""] else pytest.fail("read again")))
            given.append(real(batch, seeds, dataset, diffusion, args, encode, device))
        return given[-1]
    monkeypatch.setattr(train, "make_batch", make_batch)
    flags = ["--model", "mdm", "--preset", "cc12m-64", "--data", folder, "--image-size", "64", "--text-encoder",
             "pretend/t5", "--results-dir", str(tmp_path), "--name", "mine", "--global-batch-size", "4",
             "--cond-dropout", "0.5", "--ckpt-every", "1", "--keep-ckpts", "2", "--warmup-steps", "1",
             "--set", *(f"{key}={value}" for key, value in options.items())]
    train.main([*flags, "--resume", str(tmp_path / "mdm.pt"), "--max-steps", "2", "--sample-every", "1", "--lr",
                "1e-3"], ["--steps", "2"])
    t5 = PretendT5()
    t5.empty = True
    (empty, empty_mask), hidden = t5([""]), 0
    for _, _, _, cond in given:
        for text, mask in zip(cond["text"], cond["text_mask"]):
            hidden += (gone := torch.equal(text, empty[0]))
            assert mask.any() and gone == torch.equal(mask, empty_mask[0])
    assert 0 < hidden < 8
    before = checkpoint.read(tmp_path / "mdm.pt")["ema"]
    first = checkpoint.read(tmp_path / "mine" / "checkpoints" / "0000001.pt")
    moved = max((v - before[k]).abs().max().item() for k, v in first["model"].items())
    assert 0 < moved < 2e-3                                 # one step of AdamW from there
    sample.main(["--ckpt", str(tmp_path / "mine"), "--steps", "2", "--prompt", "a cat", "--num-samples", "1", "--out",
                 str(tmp_path / "cat.png")])
    assert (tmp_path / "cat.png").exists()
