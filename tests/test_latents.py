"""Latents: encoded once, stored, and drawn from in training. No network: the VAE is a stand-in for diffusers'
class or, where diffusers is installed, that class itself, tiny and random."""
import copy
import functools
import json
import os
import pickle
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diffusion import UserError, fold
from support import datasets, latents, prepare
from support.datasets import Dataset

SCALE, SHIFT = 0.7, 0.2
N = 20                                                  # pictures, of 16 x 16; chunks are of 8, batches of 3


class PretendKL(torch.nn.Module):
    """What this project uses of diffusers.AutoencoderKL."""
    config = SimpleNamespace(scaling_factor=SCALE, shift_factor=SHIFT, block_out_channels=(8, 8),
                             latent_channels=4, in_channels=3)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up = torch.nn.Linear(12, 8), torch.nn.Linear(4, 12)     # of and to 2 x 2 pixels

    @classmethod
    def from_pretrained(cls, name, local_files_only, output_loading_info):
        if name != "pretend/vae":
            raise OSError(f"{name} is not here\nnor there")
        return cls(), {"missing_keys": []}

    def encode(self, x):
        pixels = torch.nn.functional.pixel_unshuffle(x, 2).movedim(1, -1)                   # (B, h, w, 12)
        mean, log_std = self.down(pixels).movedim(-1, 1).chunk(2, dim=1)                    # (B, 4, h, w)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=log_std.exp()))

    def decode(self, z):
        pixels = self.up(z.movedim(1, -1)).movedim(-1, 1)                                   # (B, 12, h, w)
        return SimpleNamespace(sample=torch.nn.functional.pixel_shuffle(pixels, 2))         # (B, 3, H, W)


def pretend(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", ModuleType("diffusers"))
    sys.modules["diffusers"].AutoencoderKL = PretendKL
    return "pretend/vae"


@pytest.fixture(params=["pretend", "diffusers"])
def name(request, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "CHUNK", 8)
    if request.param == "pretend":
        return pretend(monkeypatch)
    diffusers = pytest.importorskip("diffusers", reason="the real VAE needs pip install diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        scaling_factor=SCALE, shift_factor=SHIFT).save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


@functools.cache
def some(labels=True):
    shapes = datasets.load("shapes", image_size=16).subset(range(N))
    return shapes if labels else Dataset("plain", shapes.shape, shapes.images, N)


def store(folder, name, dataset=None, hflip=True):
    dataset, vae = dataset or some(), latents.VAE(name)
    about = latents.begin(dataset, folder, vae, hflip)
    latents.encode(dataset, folder, vae, about, batch_size=3)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# --- the VAE ---

def test_vae(name):
    vae = latents.VAE(name)
    assert (vae.name, vae.scale, vae.shift, vae.C, vae.colours, vae.factor) == (name, SCALE, SHIFT, 4, 3, 2)
    assert not vae.model.training and not any(p.requires_grad for p in vae.model.parameters())
    assert latents.VAE(name, channels=4).C == 4
    with pytest.raises(UserError, match="decodes 4 channels, and these latents have 16"):
        latents.VAE(name, channels=16)
    x = some().prepare(some()[[0, 1]]["x"], None)
    with torch.autocast("cpu", torch.bfloat16):
        mean, std = vae.encode(x)
    assert mean.shape == std.shape == (2, 4, 8, 8) and mean.dtype == torch.float32 and (std > 0).all()
    assert torch.equal(mean, vae.encode(x)[0]) and torch.equal(mean, vae.model.encode(x).latent_dist.mean)


def test_decode_undoes_shift_and_scale(name):
    vae = latents.VAE(name)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = vae.decode((z - SHIFT) * SCALE, scale=SCALE, shift=SHIFT)
    assert x.shape == (2, 3, 16, 16) and not x.requires_grad
    torch.testing.assert_close(x, vae.model.decode(z).sample.clamp(-1, 1), atol=1e-5, rtol=0)
    assert vae.decode(1e4 * z, SCALE, SHIFT).abs().max() == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(x, vae.decode((z - SHIFT) * SCALE, SCALE, SHIFT))


def test_loading_and_encoding_are_quiet(name, tmp_path, capfd):
    latents.VAE(name)
    assert capfd.readouterr() == ("", "")


def test_without_a_shift(monkeypatch):
    name = pretend(monkeypatch)
    for config in (dict(shift_factor=None), {}):            # as Stable Diffusion's; as old versions have it
        fields = {k: v for k, v in vars(PretendKL.config).items() if k != "shift_factor"}
        monkeypatch.setattr(PretendKL, "config", SimpleNamespace(**fields, **config))
        assert latents.VAE(name).shift == 0.0


# --- what is stored ---

@pytest.mark.parametrize("hflip", [False, True])
def test_stored_is_what_the_vae_tells(name, tmp_path, hflip):
    dataset, source = latents.load(store(tmp_path / "out", name, hflip=hflip)), some()
    copies = 2 if hflip else 1
    assert len(dataset) == copies * N and dataset.shape == (4, 8, 8)
    assert dataset.class_names == source.class_names and not dataset.has_captions
    assert dataset.latents == {"data": "shapes", "vae": name, "scale": SCALE, "shift": SHIFT,
                               "image_shape": [3, 16, 16]}
    batch = dataset[np.arange(len(dataset))]
    assert batch["x"].dtype == torch.float16 and batch["x"].shape == (len(dataset), 8, 8, 8)
    assert torch.equal(batch["y"], source.labels.repeat(copies))
    x = source.prepare(source[np.arange(N)]["x"], None)
    vae = latents.VAE(name)
    expected = torch.cat([torch.cat(vae.encode(x), 1)] + [torch.cat(vae.encode(x.flip(-1)), 1)] * hflip)
    torch.testing.assert_close(batch["x"].float(), expected, atol=2e-3, rtol=2e-3)
    about = json.loads((tmp_path / "out" / "latents.json").read_text())
    assert (about["data"], about["images"], about["copies"], about["chunk"]) == ("shapes", N, copies, 8)
    sizes = [len(np.load(path)) for path in sorted((tmp_path / "out").glob("0*.npy"))]
    assert sizes == ([8, 8, 8, 8, 8] if hflip else [8, 8, 4])
    # any order, and parts
    assert torch.equal(dataset[[17, 3, 3]]["x"], batch["x"][[17, 3, 3]])
    part = dataset.subset([9, 2])
    assert part.latents == dataset.latents and torch.equal(part[[0, 1]]["x"], batch["x"][[9, 2]])


def test_gray_pictures_are_repeated(name, tmp_path):
    gray = np.arange(4 * 256, dtype=np.uint16).reshape(4, 1, 16, 16).astype(np.uint8)
    dataset = latents.load(store(tmp_path / "out", name, Dataset("gray", (1, 16, 16), gray, 4), hflip=False))
    assert dataset.latents["image_shape"] == [3, 16, 16] and dataset.num_classes == 0
    x = torch.from_numpy(gray).float() / 127.5 - 1
    expected = torch.cat(latents.VAE(name).encode(x.repeat(1, 3, 1, 1)), 1)
    torch.testing.assert_close(dataset[[0, 1, 2, 3]]["x"].float(), expected, atol=2e-3, rtol=2e-3)


def test_a_stopped_run_goes_on(name, tmp_path, monkeypatch):
    before = contents(store(tmp_path / "whole", name))
    replace, out = os.replace, tmp_path / "out"

    def killed(source, target):
        if Path(target).name == "00002.npy":
            raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr(latents.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store(out, name)
    assert {"00000.npy", "00001.npy", ".00002.npy.rank0.part"} < set(contents(out))
    with pytest.raises(UserError, match="lacks 3 of 5 files.*run the same python -m support.prepare encode again"):
        latents.load(out)
    monkeypatch.setattr(latents.os, "replace", replace)
    assert contents(store(out, name)) == before
    (out / "00001.npy").unlink()
    (out / "labels.npy").unlink()
    kept = (out / "00003.npy").stat().st_mtime_ns
    assert contents(store(out, name)) == before and (out / "00003.npy").stat().st_mtime_ns == kept


def test_three_processes_write_the_same(name, tmp_path, monkeypatch):
    before = contents(store(tmp_path / "whole", name))
    out = tmp_path / "out"
    out.mkdir()
    for owner in (0, 1, 4):                                 # 0 is at work, 1 and 4 were killed
        (out / f".00009.npy.rank{owner}.part").touch()
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    store(out, name)
    assert set(contents(out)) == {"latents.json", "labels.npy", "00001.npy", "00004.npy",
                                  ".00009.npy.rank0.part"}
    for rank in "20":
        monkeypatch.setenv("RANK", rank)
        store(out, name)
    assert contents(out) == before


# --- reading ---

@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_the_same(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(latents, "CHUNK", 8)
    dataset = latents.load(store(tmp_path / "out", pretend(monkeypatch)))
    whole = dataset[np.arange(2 * N)]                           # opens all files
    again = pickle.dumps(dataset)                               # as spawned workers get it
    assert len(again) < 10_000 and torch.equal(pickle.loads(again)[[7, 30]]["x"], whole["x"][[7, 30]])
    order = [np.array([0, 39, 8]), np.array([16, 15, 1])]
    loader = DataLoader(dataset, batch_size=None, sampler=order, num_workers=workers)
    for indices, batch in zip(order, loader):
        assert torch.equal(batch["x"], whole["x"][indices]) and torch.equal(batch["y"], whole["y"][indices])


def test_loading_opens_no_chunk(tmp_path, monkeypatch):
    out = store(tmp_path / "out", pretend(monkeypatch), some(labels=False))
    monkeypatch.setattr(latents.np, "load", None)               # to call it would be an error
    assert len(latents.load(out)) == 2 * N


@pytest.mark.parametrize("damage", ["short", "header", "shape", "dtype", "pickle", "objects", "zip", "empty"])
def test_a_damaged_chunk_is_told(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(latents, "CHUNK", 8)
    out = store(tmp_path / "out", pretend(monkeypatch))
    path = out / "00001.npy"
    whole, good = np.load(path), path.read_bytes()
    if damage in ("short", "header", "empty"):                  # "header": as long as the numbers alone
        path.write_bytes(good[:{"short": len(good) // 2, "header": len(good) - 60, "empty": 0}[damage]])
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(whole.astype(np.float32)))
    elif damage == "zip":
        with open(path, "wb") as f:
            np.savez(f, whole, whole)
    else:
        wrong = {"shape": whole[:, :, :4].repeat(3, 0), "dtype": whole.astype(np.float32),
                 "objects": np.full(9000, [{}], object)}[damage]
        np.save(path, wrong, allow_pickle=True)
    with pytest.raises(UserError, match=r"00001\.npy .*: delete it and run the same python -m support.prepare encode"):
        latents.load(out)[[0, 8]]
    path.unlink()
    latents.load(store(out, "pretend/vae"))[[0, 8]]
    assert path.read_bytes() == good


def test_a_chunk_that_is_cut_while_it_is_read_is_told(tmp_path, monkeypatch):
    """A memory map would end the process."""
    monkeypatch.setattr(latents, "CHUNK", 8)
    out = store(tmp_path / "out", pretend(monkeypatch))
    dataset = latents.load(out)
    for cut in (5, 0):
        dataset[[0, 7]]
        os.truncate(out / "00000.npy", 128 + cut * 2 * 8 * 64)
        with pytest.raises(UserError, match=r"00000\.npy is cut short: delete it and run"):
            dataset[[7]]
        (out / "00000.npy").unlink()
        with pytest.raises(UserError, match=r"00000\.npy cannot be read"):
            dataset[[7]]
        store(out, "pretend/vae")


@pytest.mark.parametrize("damage, needed", [
    ("no json", "no latents.json"), ("half a json", "cannot be read.*new folder"),
    ("key", "cannot be read.*scale"), ("no labels", "labels.npy is missing"), ("labels", "or damaged"),
    ("objects", "labels.npy is missing or damaged: delete it and run"), ("nowhere", "no latents.json")])
def test_a_damaged_folder_is_told(tmp_path, monkeypatch, damage, needed):
    out = store(tmp_path / "out", pretend(monkeypatch))
    about, labels = out / "latents.json", out / "labels.npy"
    if damage == "no json":
        about.unlink()
    elif damage == "half a json":
        about.write_text(about.read_text()[:50])
    elif damage == "key":
        about.write_text(about.read_text().replace('"scale"', '"scales"'))
    elif damage == "no labels":
        labels.unlink()
    elif damage == "labels":
        np.save(labels, np.zeros(N, np.int64))
    elif damage == "objects":
        np.save(labels, np.array([{}] * N, object), allow_pickle=True)
    with pytest.raises(UserError, match=needed):
        latents.load(tmp_path / "nowhere" if damage == "nowhere" else out)


# --- x0 ---

def test_pictures_need_no_seeds():
    x = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    assert some().latents is None and some().prepare(x, None).flatten().tolist() == [-1, 1]


def test_each_draw_is_mean_plus_std_noise():
    info = {"vae": "v", "scale": 0.5, "shift": 3.0, "image_shape": [3, 16, 16]}
    dataset = Dataset("latents", (2, 8, 8), np.zeros((1, 4, 8, 8), np.float16), 1, latents=info)
    x = torch.tensor([1.0, -2, 0.5, 4], dtype=torch.float16).view(1, 4, 1, 1).expand(500, 4, 8, 8)
    seeds = fold(0, torch.arange(500))
    x0 = dataset.prepare(x, seeds)
    assert x0.shape == (500, 2, 8, 8) and x0.dtype == torch.float32
    for c, (mean, std) in enumerate([(1, 0.5), (-2, 4)]):
        assert abs(x0[:, c].mean() - 0.5 * (mean - 3)) < 0.02 * std
        assert abs(x0[:, c].std() / (0.5 * std) - 1) < 0.02
    assert torch.equal(x0, dataset.prepare(x, seeds))
    assert torch.equal(x0[3:5], dataset.prepare(x[3:5], seeds[3:5]))
    assert not torch.equal(x0[3], x0[4])
    x = x.clone()
    x[:, 2:] = 0                                                # no spread: the mean itself
    assert torch.equal(dataset.prepare(x, seeds)[:, 0], torch.full((500, 8, 8), -1.0))


def test_statistics_are_of_what_is_drawn(name, tmp_path):
    out = store(tmp_path / "out", name)
    mean, std = latents.statistics(out, latents.read_description(out))
    dataset = latents.load(out)
    x = dataset[np.arange(8)]["x"].repeat(100, 1, 1, 1)         # the first chunk
    x0 = dataset.prepare(x, fold(1, torch.arange(800)))
    torch.testing.assert_close(mean, x0.mean((0, 2, 3)), atol=0.03, rtol=0)
    torch.testing.assert_close(std, x0.std((0, 2, 3)), atol=0, rtol=0.03)


# --- the command, and what users get wrong ---

def pictures(folder, size=16):
    for i in range(4):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), (60 * i, 0, 99)).save(path)


def run(*arguments):
    prepare.main(["encode", *arguments, "--device", "cpu"])


def test_the_command(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pictures")
    (tmp_path / "pictures" / "metadata.csv").write_text("file_name,text\na/0.png,\nb/1.png,\na/2.png,\nb/3.png,\n")
    for _ in range(2):
        run("pictures", "a/new/folder", "--vae", name, "--hflip", "--image-size", "24x16")
        said = capsys.readouterr().out
        assert "8 latents of 4x12x8\nchannels have mean" in said and "captions are left out" in said
    dataset = latents.load("a/new/folder")
    assert dataset.files == datasets.load("pictures").files
    assert len(dataset) == 8 and dataset.class_names == ["a", "b"] and dataset.shape == (4, 12, 8)
    assert dataset[[0, 3, 4, 7]]["y"].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("arguments, needed", [
    (["pictures", "out", "--image-size", "17x9"], "2x2 pixels into one.*17x9: pass --image-size 18x10"),
    (["moving", "out"], "clips.*choose other data"),
    (["nowhere", "out"], "no data set or folder 'nowhere'"),
    (["pictures", "out", "--batch-size", "0"], "--batch-size: 0 must be at least 1"),
    (["pictures", "out", "--vae", "no/vae"], "VAE no/vae cannot be loaded .no/vae is not here.: pass"),
    (["pictures", "out", "--vae"], "--vae: expected one argument"),
    (["pictures", "used"], "used holds latents.*other settings .data, images, class_names, labels, files.: "
     "choose"),
    (["shapes", "used", "--hflip"], "other settings .images, copies, labels.: choose"),
    (["pictures", "other"], "other has no latents.json.*choose another folder"),
    (["pictures", "a-file"], "cannot write into a-file .File exists.: choose"),
    (["deep", "out"], "deep/a/0.png .more than 8 bits")])
def test_the_command_says_what_is_wrong(arguments, needed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pretend(monkeypatch)
    pictures(tmp_path / "pictures")
    (tmp_path / "deep" / "a").mkdir(parents=True)
    Image.new("I;16", (16, 16)).save(tmp_path / "deep" / "a" / "0.png")
    (tmp_path / "a-file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "00000.npy").touch()
    store(Path("used"), "pretend/vae", hflip=False)
    before = contents("used")
    given = {"--vae": "pretend/vae", "--image-size": "16"}
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run(*arguments, *[word for flag in given if flag not in arguments for word in (flag, given[flag])])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(needed, err), err
    assert contents("used") == before and not Path("out").exists()


def test_other_labels_or_another_vae_are_other_settings(tmp_path, monkeypatch):
    out = store(tmp_path / "out", pretend(monkeypatch))
    source = copy.copy(some())
    source.labels = source.labels.flip(0)
    with pytest.raises(UserError, match=r"other settings \(labels\)"):
        store(out, "pretend/vae", source)
    about = json.loads((out / "latents.json").read_text())
    del about["files"]                                          # as in earlier versions
    (out / "latents.json").write_text(json.dumps(about))
    source.labels, source.files = some().labels, "any"
    store(out, "pretend/vae", source)
    config = SimpleNamespace(**{**vars(PretendKL.config), "scaling_factor": 1.0})
    monkeypatch.setattr(PretendKL, "config", config)
    with pytest.raises(UserError, match=r"other settings \(scale\)"):
        store(out, "pretend/vae")


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"--vae\) needs one more package: pip install diffusers"):
        latents.VAE("pretend/vae")


@pytest.mark.parametrize("weights", ["none", "some"])
def test_what_is_no_vae(name, weights, tmp_path, monkeypatch, capfd):
    if name == "pretend/vae":
        if weights == "some":
            monkeypatch.setattr(PretendKL, "from_pretrained",
                                lambda *_, **__: (PretendKL(), {"missing_keys": ["decoder.weight"]}))
        else:
            name = "no/vae"
    else:
        from safetensors.torch import load_file, save_file
        path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
        kept = {k: v for k, v in load_file(path).items() if "decoder" not in k}
        path.unlink()
        if weights == "some":
            save_file(kept, path, {"format": "pt"})
    with pytest.raises(UserError) as e:
        latents.VAE(name)
    assert str(e.value).startswith(f"VAE {name} cannot be loaded") and "\n" not in str(e.value)
    assert capfd.readouterr() == ("", "")


def test_numbers_that_float16_cannot_hold(tmp_path, monkeypatch):
    name = pretend(monkeypatch)
    for bad in (1e6, float("nan")):
        monkeypatch.setattr(latents.VAE, "encode", lambda self, x: (bad * torch.ones(len(x), 4, 8, 8),) * 2)
        with pytest.raises(UserError, match="turns shapes into numbers that float16 cannot hold: choose another VAE"):
            store(tmp_path / "out", name)
    assert not list((tmp_path / "out").glob("0*"))


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "CHUNK", 8)
    name, out, replace = pretend(monkeypatch), tmp_path / "out", os.replace

    def full(source, target):
        if Path(target).name == "00001.npy":
            raise OSError(28, "No space left on device")
        replace(source, target)
    monkeypatch.setattr(latents.os, "replace", full)
    with pytest.raises(UserError, match=r"cannot write .*00001.npy \(No space left on device\): make room"):
        store(out, name)
    assert set(contents(out)) == {"latents.json", "labels.npy", "00000.npy"}


def test_two_runs_at_once_do_not_mix(tmp_path, monkeypatch):
    name, out, begin = pretend(monkeypatch), tmp_path / "out", latents.begin

    def another_begins_too(dataset, folder, *rest):
        about = begin(dataset, folder, *rest)
        (folder / ".00000.npy.rank0.part").write_text("half")
        return about
    monkeypatch.setattr(latents, "begin", another_begins_too)
    with pytest.raises(UserError, match="another process is writing .*00000.npy: run one, or several by"):
        store(out, name)
    assert (out / ".00000.npy.rank0.part").read_text() == "half" and not (out / "00000.npy").exists()
