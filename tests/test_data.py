"""datasets.py and shapes.py on tiny files made here; what a run knows of its data; words beside pictures. No network:
mirrors are file:// addresses."""
import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import socket
import sys
import tarfile
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from torch.utils.data import DataLoader

import train
from diffusion import UserError
from support import checkpoint, cli, datasets, inputs, pictures, shapes
from support.datasets import batch_order, hold_out, load, parse_size
from support.shapes import draw_shapes

RNG = np.random.default_rng(0)


# --- files to read ---

def write_idx(path, array, magic=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, array.ndim if magic is None else magic])
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(head + sizes + array.tobytes()))


def write_digits(folder, n=6, part="train", labels=None):
    """-> x (n, 28, 28), y (n,), written as MNIST would be."""
    x = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8)
    y = np.arange(n, dtype=np.uint8) % 10 if labels is None else np.array(labels, np.uint8)
    write_idx(folder / f"{part}-images-idx3-ubyte.gz", x)
    write_idx(folder / f"{part}-labels-idx1-ubyte.gz", y)
    return x, y


def pickled(rows, order="C"):
    """Rows of CIFAR-10 (N, 3073) as the Python version has them: pickled by Python 2, with NumPy of 2009."""
    def string(content):
        return b"T" + len(content).to_bytes(4, "little") + content
    shape = b"J" + len(rows).to_bytes(4, "little") + b"M" + (3072).to_bytes(2, "little") + b"\x86"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    data = string(rows[:, 1:].tobytes(order))
    array = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01" + shape + dtype
             + (b"\x88" if order == "F" else b"\x89") + data + b"tb")
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in rows[:, 0]) + b"e"
    return b"\x80\x02}(" + string(b"labels") + labels + string(b"data") + array + b"u."


def write_cifar(folder, n=4, ending=".bin", content=np.ndarray.tobytes):
    """-> training x (5n, 3, 32, 32), y (5n,), and the same for the test file, of n images."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        rows = RNG.integers(0, 256, (n, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        (folder / f"{name}{ending}").write_bytes(content(rows))
        parts.append(rows)
    train = np.concatenate(parts[:5])
    return [(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]) for rows in (train, parts[5])]


def write_image(path, colour=(10, 20, 30), size=(16, 16), mode="RGB", **options):
    """size is (width, height), as PIL has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def whole(dataset):
    return dataset[range(len(dataset))]


# --- shapes ---

def test_an_image_depends_on_its_index_alone():
    one, two = load("shapes"), load("shapes")
    together = one[[70, 3, 65535, 3]]
    for row, i in enumerate([70, 3, 65535, 3]):
        alone = two[[i]]
        assert torch.equal(together["x"][row], alone["x"][0])
        assert together["y"][row] == alone["y"][0]
        assert together["caption"][row] == alone["caption"][0]
    assert not torch.equal(together["x"][0], together["x"][1])
    assert together["x"].dtype == torch.uint8 and together["y"].dtype == torch.long


def test_shapes_are_balanced_and_the_test_split_is_another():
    train, test = load("shapes"), load("shapes", split="test")
    assert (len(train), len(test), train.shape, train.num_classes) == (65536, 4096, (3, 32, 32), 8)
    assert len(set(train.captions)) == 8 * 6 * 2 == len(set(test.captions))
    counts = [train.captions.count(c) for c in set(train.captions)]
    assert max(counts) - min(counts) <= 1
    for i in (0, 1, 4095):
        caption, x = test.captions[i], test[[i]]["x"]
        same = train[[j for j, c in enumerate(train.captions) if c == caption]]["x"]
        assert len(same) > 600 and not (same == x).flatten(1).all(1).any()


def ink(x, rgb):
    """uint8 (B, 3, H, W) and its shapes' colours (B, 3) -> share of ink per pixel (B, H, W)."""
    towards = rgb - np.array(shapes.BACKGROUND)                                       # (B, 3)
    away = x.numpy().astype(float) - np.array(shapes.BACKGROUND)[:, None, None]
    return np.einsum("bchw,bc->bhw", away, towards) / (towards**2).sum(1)[:, None, None]


def test_pictures_show_what_labels_and_captions_say():
    dataset = load("shapes")
    batch = dataset[RNG.integers(0, 65536, 300)]
    names = list(shapes.COLOURS)
    palette = np.array(list(shapes.COLOURS.values()))                                 # (6, 3)
    area = {}
    for x, y, caption in zip(batch["x"], batch["y"].tolist(), batch["caption"]):
        a, size, colour, shape = caption.split()
        assert a == "a" and shape == dataset.class_names[y]
        darkest = (x.float() - torch.tensor(shapes.BACKGROUND)[:, None, None]).abs().sum(0).flatten()
        pixels = x.flatten(1)[:, darkest.topk(10).indices].float().mean(1).numpy()   # (3,)
        assert names[np.abs(palette - pixels).sum(1).argmin()] == colour
        cover = ink(x[None], palette[[names.index(colour)]])
        area.setdefault((shape, size), []).append(cover.sum())
    for shape in dataset.class_names:
        assert min(area[shape, "big"]) > 1.8 * max(area[shape, "small"])
    for values in area.values():    # nothing is cut off, and edges are smooth at any position
        assert max(values) < 1.06 * min(values)


@pytest.mark.parametrize("size", ["small", "big"])
def test_classes_look_different(size):
    """Nearest mean picture, after moving each shape's centre of mass to the middle."""
    dataset = load("shapes")
    indices = [i for i in RNG.permutation(65536)[:2500] if dataset.captions[i].split()[1] == size]
    batch = dataset[indices]
    rgb = np.array([shapes.COLOURS[c.split()[2]] for c in batch["caption"]])
    masks, y = ink(batch["x"], rgb), batch["y"].numpy()
    place = np.arange(32)
    for i, mask in enumerate(masks):
        row, column = mask.sum(1) @ place / mask.sum(), mask.sum(0) @ place / mask.sum()
        masks[i] = np.roll(mask, (round(16 - row), round(16 - column)), (0, 1))
    half = len(y) // 2
    means = np.stack([masks[:half][y[:half] == k].mean(0) for k in range(8)])
    distance = ((masks[half:, None] - means) ** 2).sum((2, 3))                      # (B, 8)
    assert (distance.argmin(1) == y[half:]).mean() > 0.99


@pytest.mark.parametrize("size, H, W", [(64, 64, 64), ("24x40", 24, 40), ((8, 16), 8, 16)])
def test_shapes_of_any_size(size, H, W):
    dataset = load("shapes", image_size=size)
    assert dataset.shape == (3, H, W) and dataset[[0, 1]]["x"].shape == (2, 3, H, W)
    indices = [i for i in range(2000) if dataset.captions[i].endswith("big red square")]
    mask = ink(dataset[indices]["x"], np.array([shapes.COLOURS["red"]] * len(indices)))
    side = 2 * 0.88 * shapes.SIZES["big"] * min(H, W)
    np.testing.assert_allclose(mask.sum((1, 2)), side**2, rtol=0.06)


def test_draw_shapes_moves_a_shape_with_its_centre():
    kind, radius, red = np.full(2, 6), np.full(2, 6.0), np.array([shapes.COLOURS["red"]] * 2)
    x = draw_shapes(kind, np.array([[10, 9], [14, 20]]), radius, red, 24, 40)
    assert np.array_equal(np.roll(x[0], (4, 11), (1, 2)), x[1])
    assert not np.array_equal(x[0], x[1])


# --- moving ---

def test_a_clip_depends_on_its_index_alone():
    dataset = load("moving")
    assert dataset.shape == (3, 8, 32, 32) and dataset.class_names == list(shapes.SHAPES)
    together = dataset[[70, 3, 65535, 3]]
    assert together["x"].shape == (4, 3, 8, 32, 32) and together["x"].dtype == torch.uint8
    for row, i in enumerate([70, 3, 65535, 3]):
        alone = load("moving")[[i]]
        assert torch.equal(together["x"][row], alone["x"][0])
        assert together["caption"][row] == alone["caption"][0]
        assert dataset.class_names[together["y"][row]] == alone["caption"][0].split()[3]


def test_clips_are_balanced_and_the_test_split_is_another():
    train, test = load("moving"), load("moving", split="test")
    assert (len(train), len(test), train.num_classes) == (65536, 4096, 8)
    assert len(set(train.captions)) == 8 * 6 * 2 * 4 == len(set(test.captions))
    counts = [train.captions.count(c) for c in set(train.captions)]
    assert max(counts) - min(counts) <= 1
    x = test[[0]]["x"]
    same = train[[i for i, c in enumerate(train.captions) if c == test.captions[0]]]["x"]
    assert len(same) > 150 and not (same == x).flatten(1).all(1).any()
    assert len(same.flatten(1).unique(dim=0)) == len(same)          # each starts somewhere else


@pytest.mark.parametrize("size, H, W", [(None, 32, 32), ("24x40", 24, 40), ("64x32", 64, 32), (12, 12, 12)])
def test_clips_show_what_captions_say(size, H, W):
    """Direction, distance, speed, colour; and never cut off."""
    dataset = load("moving", image_size=size)
    batch = dataset[RNG.integers(0, 65536, 200)]
    T = batch["x"].shape[2]
    area = {}
    for x, caption in zip(batch["x"], batch["caption"]):
        a, size, colour, shape, moving, direction = caption.split()
        assert (a, moving) == ("a", "moving")
        mask = ink(x.swapaxes(0, 1), np.array([shapes.COLOURS[colour]] * T))          # (T, H, W)
        total = mask.sum((1, 2))
        centre = np.stack([(mask.sum(2) * (np.arange(H) + 0.5)).sum(1),
                           (mask.sum(1) * (np.arange(W) + 0.5)).sum(1)], 1) / total[:, None]    # (T, 2)
        steps = np.diff(centre, axis=0)                                             # (T - 1, 2)
        down, right = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}[direction]
        expected = np.array([down * H, right * W]) * 0.4 / (T - 1)
        np.testing.assert_allclose(steps, np.tile(expected, (T - 1, 1)), atol=0.2 if min(H, W) > 12 else 0.35)
        area.setdefault((shape, size), []).extend(total)
    if min(H, W) >= 24:
        for values in area.values():                        # the same in every clip and frame: whole
            assert max(values) < 1.12 * min(values)
        ratio = np.mean(area["circle", "big"]) / np.mean(area["circle", "small"])
        assert abs(ratio - (0.25 / 0.17) ** 2) < 0.1


# --- subsets ---

@pytest.mark.parametrize("keep", [[5, 1, 4], np.array([0, 1, 0, 0, 1, 1], bool), range(3)])
@pytest.mark.parametrize("in_memory", [0, 2**30])
def test_a_subset_keeps_images_labels_and_captions_together(tmp_path, monkeypatch, keep, in_memory):
    monkeypatch.setattr(datasets, "IN_MEMORY", in_memory)
    for i in range(6):
        write_image(tmp_path / "images" / "ab"[i % 2] / f"{i}.png", (40 * i, 0, 0))
    names = sorted(f"{'ab'[i % 2]}/{i}.png" for i in range(6))
    (tmp_path / "images" / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{n},picture {n}\n" for n in names))
    write_digits(tmp_path)
    for whole_set in (load(str(tmp_path / "images")), load("mnist", tmp_path, 20),
                      load("shapes").subset(range(6))):
        part = pickle.loads(pickle.dumps(whole_set.subset(keep)))
        indices = np.arange(6)[keep]
        assert len(part) == 3 and part.class_names == whole_set.class_names
        for got, expected in ((whole(part), whole_set[indices]), (part[[2, 0]], whole_set[indices[[2, 0]]])):
            assert set(got) == set(expected) and torch.equal(got["x"], expected["x"])
            assert torch.equal(got["y"], expected["y"])
            assert got.get("caption") == expected.get("caption")
        assert torch.equal(part.subset([1])[[0]]["x"], whole_set[indices[[1]]]["x"])
        with pytest.raises(IndexError):
            part[[3]]
        with pytest.raises(IndexError):
            whole_set.subset([6])


def test_hold_out():
    dataset = load("shapes")
    rest = hold_out(dataset, ["red star", "Big  BLUE ring"])
    gone = {"a small red star", "a big red star", "a big blue ring"}
    assert len(rest) == sum(c not in gone for c in dataset.captions) < 65536
    assert set(rest.captions) == set(dataset.captions) - gone and len(set(rest.captions)) == 96 - 3
    assert "a red ring" not in rest.captions
    batch = rest[range(2000)]
    assert [rest.class_names[y] for y in batch["y"]] == [c.split()[-1] for c in batch["caption"]]
    place = {i for i, c in enumerate(dataset.captions) if c not in gone}
    assert torch.equal(batch["x"], dataset[sorted(place)[:2000]]["x"])


def captioned(*captions):
    return datasets.Dataset("mine", (1, 8, 8), np.zeros((len(captions), 1, 8, 8), np.uint8), len(captions),
                        captions=list(captions))


def test_hold_out_goes_by_whole_words():
    dataset = captioned("a dark-red starfish", "dark-red star", "a red starfish", "A Red\tstar, small",
                        "red star-like", "infrared star", "red star", "a (red star)", "star red", "c++ code")
    assert hold_out(dataset, ["red star"]).captions == [dataset.captions[i] for i in (0, 1, 2, 4, 5, 8, 9)]
    assert hold_out(dataset, ["c++"]).captions == dataset.captions[:-1]             # no regular expression
    forms = [unicodedata.normalize(form, "a café") for form in ("NFC", "NFD")]
    for form in forms:                                      # é as one character, or as two
        assert hold_out(captioned(*forms, "a bar"), [form]).captions == ["a bar"]


@pytest.mark.parametrize("captions, phrases, needed", [
    (["a cat", "a dog"], ["a cat", "a bird"], ["'a bird'", "'a cat'"]),
    (["a cat", "a dog"], [""], ["''", "'a cat'"]),
    (["a cat", "a dog"], ["ca"], ["'ca'"]),
    (["a cat", "a dog"], ["c.t"], ["'c.t'"]),
    (["a cat", "a dog"], ["a"], ["nothing", "hold out less"]),
    (["a cat", "a dog"], ["cat", "dog"], ["nothing", "cat and dog"])])
def test_hold_out_says_what_is_wrong(captions, phrases, needed):
    with pytest.raises(UserError) as e:
        hold_out(captioned(*captions), phrases)
    assert all(word in str(e.value) for word in needed), e.value


def test_hold_out_needs_captions(tmp_path):
    write_digits(tmp_path)
    with pytest.raises(UserError, match="mnist has no captions.*metadata.csv"):
        hold_out(load("mnist", tmp_path), ["red star"])


@pytest.mark.parametrize("changes, needed", [
    (dict(labels=[0, 1, 2]), "a whole number from 0 to 1"), (dict(labels=[0, 1, -1]), "from 0 to 1"),
    (dict(labels=[0, 1]), "3 images and 2 classes"), (dict(labels=[0, 1, 0.5]), "whole number"),
    (dict(labels=None), "give each image"), (dict(class_names=()), "labels but no class_names"),
    (dict(captions=["a", "b"]), "3 images and 2 captions"), (dict(images=np.zeros((3, 1, 4, 4))), "float64 of shape"),
    (dict(images=np.zeros((3, 4, 4, 1), np.uint8)), r"uint8 of shape \(3, 4, 4, 1\)"),
    (dict(images=np.zeros((2, 1, 4, 4), np.uint8)), r"uint8 of shape \(3, 1, 4, 4\)"),
    (dict(images=torch.zeros(3, 1, 4, 4, dtype=torch.uint8)), "Tensor: make them a NumPy array"),
    (dict(images=lambda i: np.zeros((len(i), 1, 8, 8), np.uint8)), "uint8 of shape"),
    (dict(latents={}, images=np.zeros((3, 1, 4, 4), np.uint8)), None),
    (dict(latents={"vae": "v"}, images=np.zeros((3, 1, 4, 4), np.float16)), r"float16 of shape \(3, 2, 4, 4\)")])
def test_a_dataset_of_ones_own_must_fit_together(changes, needed):
    good = dict(name="mine", shape=(1, 4, 4), images=np.zeros((3, 1, 4, 4), np.uint8), length=3, labels=[0, 1, 1],
                class_names=["cat", "dog"])
    with pytest.raises(UserError, match=needed) if needed else contextlib.nullcontext():
        datasets.Dataset(**{**good, **changes})[[0, 1]]


# --- batch order ---

@pytest.mark.parametrize("n, batch", [(10, 4), (10, 10), (3, 16), (1, 2), (64, 8)])
def test_every_epoch_has_each_example_once(n, batch):
    order = batch_order(n, 5, batch, 0, 3 * n, 0, batch)
    steps = list(order)
    assert len(steps) == len(order) == 3 * n and all(s.shape == (batch,) for s in steps)
    epochs = np.concatenate(steps).reshape(-1, n)
    assert np.array_equal(np.sort(epochs, 1), np.tile(np.arange(n), (len(epochs), 1)))
    if n >= 10:
        assert len({tuple(e) for e in epochs}) == len(epochs)       # each in an order of its own


def test_processes_share_a_batch_and_seeds_differ():
    single = np.stack(list(batch_order(10, 1, 12, 0, 7, 0, 12)))                    # (7, 12)
    parts = [np.stack(list(batch_order(10, 1, 12, 0, 7, r * 4, r * 4 + 4))) for r in range(3)]
    assert np.array_equal(np.concatenate(parts, 1), single)
    assert not np.array_equal(np.stack(list(batch_order(10, 2, 12, 0, 7, 0, 12))), single)


def test_resuming_gives_the_tail():
    order = list(batch_order(10, 1, 4, 0, 9, 1, 3))
    tail = list(batch_order(10, 1, 4, 5, 9, 1, 3))
    assert len(tail) == 4 and all(np.array_equal(a, b) for a, b in zip(order[5:], tail))


def test_one_of_several_captions_is_drawn_for_each_step():
    """The same for any number of processes; --overfit-one-batch repeats its draw."""
    dataset = captioned(["a", "b", "c"], "only")
    assert dataset.several and not captioned("a").several and dataset[[0, 1]]["caption"] == ["a", "only"]
    order = [batch_order(2, 1, 6, 0, 20, lo, hi, dataset.several) for lo, hi in ((0, 6), (0, 4), (4, 6))]
    whole, *parts = [[dataset[i]["caption"] for i in o] for o in order]
    assert whole == [a + b for a, b in zip(*parts)]
    drawn = [c for step in whole for c in step if c != "only"]
    assert all(8 < drawn.count(c) < 32 for c in "abc") and len({tuple(step) for step in whole}) > 10
    order[0].steps = [0] * 3
    assert [dataset[i]["caption"] for i in order[0]] == whole[:1] * 3
    assert hold_out(dataset, ["b"]).captions == ["only"]
    assert inputs.some_captions(dataset, 0) in (["a", "only"], ["only", "a"])


# --- datasets and loaders ---

@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader_hands_out_whole_batches(workers):
    dataset = load("shapes")
    order = batch_order(len(dataset), 0, 8, 2, 5, 4, 8)
    batches = list(DataLoader(dataset, batch_size=None, sampler=order, num_workers=workers))
    assert len(batches) == 3
    for batch, indices in zip(batches, order):
        direct = dataset[indices]
        assert torch.equal(batch["x"], direct["x"]) and torch.equal(batch["y"], direct["y"])
        assert batch["caption"] == direct["caption"]


def test_datasets_survive_pickling(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "IN_MEMORY", 0)
    write_image(tmp_path / "images" / "a" / "1.png")
    write_digits(tmp_path)
    for dataset in (load("shapes"), load("moving"), load(str(tmp_path / "images")),
                    load("mnist", tmp_path, 32)):
        assert callable(dataset.images)
        copy = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(copy[[0]]["x"], dataset[[0]]["x"])


@pytest.mark.parametrize("in_memory", [0, 2**30])
def test_indices_out_of_range_are_refused(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(datasets, "IN_MEMORY", in_memory)
    write_image(tmp_path / "images" / "a.png")
    write_digits(tmp_path)
    for dataset in (load("shapes"), load("moving"), load(str(tmp_path / "images")),
                    load("mnist", tmp_path, 20)):
        with pytest.raises(IndexError):
            dataset[[len(dataset)]]


# --- arrays ---

@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name, place", [("mnist", "mnist"), ("mnist", "."), ("mnist", "MNIST/raw"),
                                         ("fashion", "FashionMNIST/raw"), ("fashion", "raw")])
def test_digits_round_trip(tmp_path, name, place, packed):
    """As downloaded, as torchvision has them, and in the latter's own folder."""
    for split, part in (("train", "train"), ("test", "t10k")):
        x, y = write_digits(tmp_path / place, 7, part)
        for path in () if packed else (tmp_path / place).glob("*.gz"):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
        dataset = load(name, tmp_path, split=split)
        batch = dataset[[6, 0]]
        assert len(dataset) == 7 and dataset.shape == (1, 28, 28) and not dataset.has_captions
        assert dataset.num_classes == len(dataset.class_names) == 10 and set(batch) == {"x", "y"}
        assert np.array_equal(batch["x"][:, 0].numpy(), x[[6, 0]]) and batch["y"].tolist() == [6, 0]


def test_digits_are_padded_to_larger_sizes_and_resized_to_smaller(tmp_path):
    x, _ = write_digits(tmp_path, 70)
    padded = whole(load("mnist", tmp_path, (33, 40)))["x"]
    assert padded.shape == (70, 1, 33, 40)
    assert np.array_equal(padded[:, 0, 2:30, 6:34].numpy(), x)
    assert padded.long().sum() == x.astype(int).sum()               # the rest is black
    small = whole(load("mnist", tmp_path, 14))["x"]
    assert small.shape == (70, 1, 14, 14)
    means = x.reshape(70, 14, 2, 14, 2).mean((2, 4))
    assert np.corrcoef(small[:, 0].numpy().ravel(), means.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("place, version", [
    ("cifar-10-batches-bin", ()), (".", ()), ("cifar10/cifar-10-batches-bin", ()), (".", ("", pickled)),
    ("cifar-10-batches-py", ("", pickled)), ("a/folder", ("", lambda rows: pickled(rows, "F")))])
def test_cifar_round_trip(tmp_path, place, version):
    for split, (x, y) in zip(("train", "test"), write_cifar(tmp_path / place, 4, *version)):
        dataset = load("cifar10", tmp_path, split=split)
        batch = whole(dataset)
        assert dataset.class_names[0] == "airplane" and len(dataset) == len(y)
        assert np.array_equal(batch["x"].numpy(), x) and np.array_equal(batch["y"].numpy(), y)
    resized = load("cifar10", tmp_path, (24, 40))
    assert resized.shape == (3, 24, 40) and resized[[0]]["x"].shape == (1, 3, 24, 40)


@pytest.mark.parametrize("version, folder, options", [
    ("binary", "cifar-10-batches-bin", ()), ("python", "cifar-10-batches-py", ("", pickled))])
def test_cifar_out_of_its_archive(tmp_path, version, folder, options):
    train, test = write_cifar(tmp_path / "files", 4, *options)
    files = sorted((tmp_path / "files").iterdir(), reverse=True)            # order must not matter
    with tarfile.open(tmp_path / f"cifar-10-{version}.tar.gz", "w:gz") as tar:
        for file in files:
            tar.add(file, f"{folder}/{file.name}")
        tar.add(files[0], "../escaped.bin")
    shutil.rmtree(tmp_path / "files")
    before = sorted(tmp_path.rglob("*"))
    for split, (x, y) in (("train", train), ("test", test)):
        batch = whole(load("cifar10", tmp_path, split=split))
        assert np.array_equal(batch["x"].numpy(), x) and np.array_equal(batch["y"].numpy(), y)
    assert sorted(tmp_path.rglob("*")) == before and not (tmp_path.parent / "escaped.bin").exists()


# --- download ---

@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """MNIST's training files at a file:// address, their true checksums in the table."""
    folder = tmp_path / "mirror"
    x, y = write_digits(folder)
    monkeypatch.setitem(datasets.MIRRORS, "mnist", [folder.as_uri() + "/"])
    sums = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}
    monkeypatch.setitem(datasets.SHA256, "mnist", sums)
    return x


def test_download(tmp_path, mirror, monkeypatch):
    batch = whole(load("mnist", tmp_path / "new" / "dir"))
    assert np.array_equal(batch["x"][:, 0].numpy(), mirror)
    files = sorted(f.name for f in (tmp_path / "new" / "dir" / "mnist").iterdir())
    assert files == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]
    monkeypatch.setitem(datasets.MIRRORS, "mnist", [])
    load("mnist", tmp_path / "new" / "dir")                 # the second time no mirror is needed


def test_download_tries_mirrors_in_turn(tmp_path, mirror, monkeypatch):
    bad = tmp_path / "bad"
    write_digits(bad)                                       # readable, but not the right bytes
    urls = [(tmp_path / "nowhere").as_uri() + "/", bad.as_uri() + "/", *datasets.MIRRORS["mnist"]]
    monkeypatch.setitem(datasets.MIRRORS, "mnist", urls)
    assert np.array_equal(whole(load("mnist", tmp_path))["x"][:, 0].numpy(), mirror)


def test_a_wrong_download_leaves_everything_as_it_was(tmp_path):
    source, target = tmp_path / "source", tmp_path / "cache" / "file"
    source.write_text("new")
    for old in (None, "old"):
        if old:
            target.write_text(old)
        with pytest.raises(UserError) as e:
            datasets.download([source.as_uri()], target, "0" * 64)
        assert "checksum" in str(e.value) and str(target.parent) in str(e.value)
        assert [f.read_text() for f in target.parent.iterdir()] == ([old] if old else [])


@pytest.mark.parametrize("locks", [True, False])
def test_many_processes_may_download_at_once(locks, tmp_path, monkeypatch):
    """With locks only one does, and the others wait for it."""
    source, target, asked, fetch = tmp_path / "source", tmp_path / "cache" / "file", [], torch.hub.download_url_to_file
    source.write_bytes(bytes(10**6))
    sha256 = hashlib.sha256(bytes(10**6)).hexdigest()

    def counted(*args, **more):
        asked.append(args)
        fetch(*args, **more)
    monkeypatch.setattr(torch.hub, "download_url_to_file", counted)
    if not locks:
        monkeypatch.setattr(datasets, "fcntl", None)
    elif not datasets.fcntl:
        pytest.skip("no locks on Windows")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: datasets.download([source.as_uri()], target, sha256), range(8)))
    assert len(asked) == (1 if locks else 8)
    assert [f.read_bytes() for f in target.parent.iterdir()] == [bytes(10**6)]


def test_a_silent_mirror_is_given_up_after_a_while(tmp_path, monkeypatch):
    """torch.hub has no timeout of its own: it uses the one that sockets have by default."""
    waits = []

    def silent(url, path, sha256, progress):
        waits.append(socket.getdefaulttimeout())
        raise TimeoutError("timed out")
    monkeypatch.setattr(torch.hub, "download_url_to_file", silent)
    socket.setdefaulttimeout(7)
    try:
        with pytest.raises(UserError, match="cannot download file .one: timed out; two: timed out.: get the file"):
            datasets.download(["one", "two"], tmp_path / "file", "")
        assert waits == [30, 30] and socket.getdefaulttimeout() == 7
    finally:
        socket.setdefaulttimeout(None)


def test_digits_are_not_taken_for_garments(tmp_path, mirror, monkeypatch):
    garments, _ = write_digits(tmp_path / "garments")
    monkeypatch.setitem(datasets.MIRRORS, "fashion", [(tmp_path / "garments").as_uri() + "/"])
    monkeypatch.setitem(datasets.SHA256, "fashion", {f.name: hashlib.sha256(f.read_bytes()).hexdigest()
                                              for f in (tmp_path / "garments").iterdir()})
    here = tmp_path / "mirror"                              # holds MNIST under the same file names
    assert np.array_equal(whole(load("mnist", here))["x"][:, 0].numpy(), mirror)
    assert np.array_equal(whole(load("fashion", here))["x"][:, 0].numpy(), garments)


def test_a_file_of_any_name_is_known_by_its_checksum(tmp_path, mirror, monkeypatch):
    """Two folders deep. Files of another size are not even read; those of other bytes are not taken."""
    monkeypatch.setitem(datasets.MIRRORS, "mnist", [])
    files, read = sorted((tmp_path / "mirror").iterdir()), []
    monkeypatch.setattr(datasets, "SIZES", {path.stat().st_size for path in files})
    monkeypatch.setattr(datasets, "digest", lambda content, real=datasets.digest: read.append(content) or real(content))
    deep = tmp_path / "home" / "some" / "folder"
    deep.mkdir(parents=True)
    for number, path in enumerate(files):
        path.rename(deep / str(number))
    (deep / "imposter").write_bytes(bytes((deep / "0").stat().st_size))
    (deep / "large").write_bytes(bytes(10**5))
    assert np.array_equal(whole(load("mnist", tmp_path / "home"))["x"][:, 0].numpy(), mirror)
    assert read and bytes(10**5) not in read
    (deep / "0").unlink()
    with pytest.raises(UserError, match="with the right checksum"):
        load("mnist", tmp_path / "home")


# --- folders ---

def test_folder_with_classes(tmp_path):
    write_image(tmp_path / "dog" / "deep" / "1.png", (1, 2, 3))
    write_image(tmp_path / "dog" / "2.bmp", (4, 5, 6))
    write_image(tmp_path / "cat" / "3.gif", (255, 255, 255))
    write_image(tmp_path / "cat" / ".hidden.png", size=(9, 9))
    write_image(tmp_path / ".hidden" / "4.png", size=(9, 9))
    (tmp_path / "notes.txt").write_text("not an image")
    dataset = load(str(tmp_path))
    assert dataset.class_names == ["cat", "dog"] and dataset.num_classes == 2
    batch = whole(dataset)
    assert batch["y"].tolist() == [0, 1, 1]
    assert batch["x"][:, :, 5, 5].tolist() == [[255, 255, 255], [4, 5, 6], [1, 2, 3]]


@pytest.mark.parametrize("in_memory", [0, 2**30])
def test_flat_folder(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(datasets, "IN_MEMORY", in_memory)
    for i, name in enumerate(["b.png", "a.PNG", "c.webp"]):
        write_image(tmp_path / name, (100 * i, 0, 0), size=(10, 12), lossless=True)
    dataset = load(str(tmp_path))
    assert callable(dataset.images) == (in_memory == 0)
    assert (dataset.shape, dataset.num_classes, dataset.class_names) == ((3, 12, 10), 0, [])
    batch = dataset[np.array([2, 0, 1])]
    assert set(batch) == {"x"} and batch["x"][:, 0, 0, 0].tolist() == [200, 100, 0]


def test_captions(tmp_path):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png")
    (tmp_path / "metadata.csv").write_text('file_name,extra,text\nb.png,1,"é, two"\na.png,2,one\n',
                                           encoding="utf-8-sig")
    dataset = load(str(tmp_path))
    assert dataset.has_captions and dataset[[1, 0]]["caption"] == ["é, two", "one"]


@pytest.mark.parametrize("table", [
    'file_name, text\n./cats/é.png ,a cat\n"cats\\1.png","a red,\nbig cat"\n\n"cats\\1.png",tom\n',
    'file_name, text\n./cats/é.png, a cat\ncats/1.png, "a red,\nbig cat"\n  \ncats/1.png, "tom"\n',
    '{"text": "a cat", "file_name": "./cats/é.png "}\n\n'
    '{"file_name": "cats\\\\1.png", "text": ["a red,\\nbig cat", "tom"]}'], ids=["csv", "spaces", "jsonl"])
def test_tables_of_captions(tmp_path, table):
    """An image may have several; files are found however they are spelt, in either form of é."""
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        folder = tmp_path / form
        for name in ("1.png", unicodedata.normalize(form, "é.png")):
            write_image(folder / "cats" / name)
        name = "metadata.csv" if table.startswith("file_name") else "metadata.jsonl"
        (folder / name).write_text(unicodedata.normalize(other, table), encoding="utf8")
        assert load(str(folder)).captions == [["a red,\nbig cat", "tom"], "a cat"]


def test_links_that_lead_back_are_not_followed(tmp_path):
    """glob follows each some 40 times, and two of them for ever. Links to other folders are followed."""
    for name in ("pictures/cat/1.png", "pictures/dog/2.png", "elsewhere/3.png"):
        write_image(tmp_path / name)
    root = tmp_path / "pictures"
    for link, target in ((root / "cat" / "up", root), (root / "dog" / "up", root),
                         (root / "fox", tmp_path / "elsewhere"), (tmp_path / "elsewhere" / "back", root)):
        try:
            link.symlink_to(target, target_is_directory=True)
        except OSError:
            pytest.skip("this system makes no links")
    assert list(datasets.list_images(root)[0]) == ["cat/1.png", "dog/2.png", "fox/3.png"]


def test_gray_folder(tmp_path):
    write_image(tmp_path / "a.png", 77, mode="L")
    write_image(tmp_path / "b.png", (0, 0), mode="LA")      # wholly transparent
    batch = whole(load(str(tmp_path)))
    assert batch["x"].shape == (2, 1, 16, 16) and batch["x"][:, 0, 3, 3].tolist() == [77, 255]
    write_image(tmp_path / "c.png", (1, 2, 3))
    assert whole(load(str(tmp_path)))["x"][:, :, 3, 3].tolist() == [[77] * 3, [255] * 3, [1, 2, 3]]


def test_transparency_on_white(tmp_path):
    write_image(tmp_path / "a.png", (200, 0, 0, 128), mode="RGBA")
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "b.png", transparency=1)
    pixels = whole(load(str(tmp_path)))["x"][:, :, 8, 8]
    torch.testing.assert_close(pixels.int(), torch.tensor([[227, 127, 127], [255, 255, 255]]).int(),
                               atol=1, rtol=0)


def test_cover_and_crop(tmp_path):
    """A wide picture, red | green | blue: to a square only the middle third is left."""
    x = np.zeros((20, 60, 3), np.uint8)
    for i in range(3):
        x[:, 20 * i:20 * i + 20, i] = 255
    Image.fromarray(x).save(tmp_path / "wide.png")
    Image.fromarray(x.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    for size in (10, 20, 30):                               # smaller, equal, larger than its height
        batch = whole(load(str(tmp_path), image_size=size))["x"]
        assert batch.shape == (2, 3, size, size)
        inner = batch[:, :, 2:-2, 2:-2].float()
        assert (inner[:, 1] > 250).all() and (inner[:, [0, 2]] < 5).all()
    rows = whole(load(str(tmp_path), image_size=(20, 60)))["x"]
    assert np.array_equal(rows[1].permute(1, 2, 0).numpy(), x)      # the size it has: untouched


def test_photos_are_turned_upright(tmp_path):
    picture = Image.new("RGB", (30, 20))
    exif = picture.getexif()
    exif[0x0112] = 6                                        # "rotate by 90 degrees to view"
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert load(str(tmp_path)).shape == (3, 30, 20)


# --- what users get wrong ---

def test_parse_size():
    assert parse_size("32") == parse_size(32) == parse_size((32, 32)) == (32, 32)
    assert parse_size("24x40") == parse_size([24, 40]) == (24, 40)


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 2 // 3])


def replace_idx(folder, kind, *args, **kwargs):
    write_digits(folder)
    write_idx(folder / f"train-{kind}-ubyte.gz", *args, **kwargs)


def noise(path):
    Image.fromarray(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)


def test_pictures_in_other_formats_are_said_to_be_left_out(tmp_path, capsys):
    two_images(tmp_path)
    for name in "c.tif", "d.TIF", "notes.txt":
        (tmp_path / name).touch()
    assert len(load(str(tmp_path))) == 2
    assert capsys.readouterr().out == f"left out    2 .tif in {tmp_path}: save them as .png to train on them\n"


def two_images(folder, second="b.png", **options):
    write_image(folder / "a.png")
    write_image(folder / second, **options)


def table(folder, text, ending="csv"):
    two_images(folder)
    (folder / f"metadata.{ending}").write_bytes(text.encode("latin-1"))


def replace_bin(folder, name, content):
    write_cifar(folder)
    (folder / name).write_bytes(content)


def archive(folder, files):
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for file in files:
            (folder / "bytes").write_bytes(bytes(3073))
            tar.add(folder / "bytes", f"cifar-10-batches-bin/{file}")


# Each case: what is done to a folder; the arguments of `load` (name and data_dir are that folder unless given); words
# that the message must contain, the fix among them.
ERRORS = {
    "typo": (None, dict(name="minst"), ["mnist", "shapes", "path to a folder"]),
    "typo of moving": (None, dict(name="movng"), ["did you mean moving", "path to a folder"]),
    "unknown": (None, dict(name="imagenet"), ["imagenet", "cifar10", "path to a folder"]),
    "no folder": (None, dict(name="./nowhere/at/all"), ["./nowhere/at/all", "path to a folder"]),
    "split": (None, dict(name="shapes", split="val"), ["train or test"]),
    "no test split": (two_images, dict(split="test"), ["folder of your test images"]),
    "small size": (None, dict(name="shapes", image_size=4), ["at least 8"]),
    "odd size": (None, dict(name="shapes", image_size="big"), ["'big'", "24x40"]),
    "three sizes": (None, dict(name="shapes", image_size="1x2x3"), ["24x40"]),
    "half a size": (None, dict(name="shapes", image_size="24x"), ["24x40"]),
    "truncated gz": (lambda f: (write_digits(f), cut(f / "train-images-idx3-ubyte.gz")),
                     dict(name="mnist"), ["train-images-idx3-ubyte.gz", "put a good copy"]),
    "not gz": (lambda f: (write_digits(f), (f / "train-labels-idx1-ubyte.gz").write_text("<html>")),
               dict(name="mnist"), ["train-labels-idx1-ubyte.gz", "put a good copy"]),
    "magic": (lambda f: replace_idx(f, "images-idx3", np.zeros((6, 28, 28), np.uint8), magic=1),
              dict(name="mnist"), ["train-images-idx3-ubyte.gz", "put a good copy"]),
    "short idx": (lambda f: replace_idx(f, "labels-idx1", np.zeros((), np.uint8), magic=1),
                  dict(name="mnist"), ["train-labels-idx1-ubyte.gz", "put a good copy"]),
    "counts": (lambda f: replace_idx(f, "labels-idx1", np.zeros(5, np.uint8)),
               dict(name="mnist"), ["6 images", "5 labels", "of one download"]),
    "nothing": (lambda f: (replace_idx(f, "labels-idx1", np.zeros(0, np.uint8)),
                           write_idx(f / "train-images-idx3-ubyte.gz", np.zeros((0, 28, 28), "B"))),
                dict(name="mnist"), ["0 images", "of one download"]),
    "label": (lambda f: write_digits(f, 2, labels=[3, 10]),
              dict(name="mnist"), ["label 10", "0 to 9", "put a good copy"]),
    "short bin": (lambda f: replace_bin(f, "data_batch_3.bin", bytes(3073 + 5)),
                  dict(name="cifar10"), ["data_batch_3 of", "3073", "put a good copy"]),
    "empty bin": (lambda f: replace_bin(f, "test_batch.bin", b""),
                  dict(name="cifar10", split="test"), ["test_batch of", "put a good copy"]),
    "cifar label": (lambda f: replace_bin(f, "test_batch.bin", bytes([10]) + bytes(3072)),
                    dict(name="cifar10", split="test"), ["label 10", "put a good copy"]),
    "missing bin": (lambda f: (write_cifar(f), (f / "data_batch_4.bin").unlink()),
                    dict(name="cifar10"), ["data_batch_4.bin", "put a good copy"]),
    "cut tar": (lambda f: (archive(f, ["test_batch.bin"]), cut(f / "cifar-10-binary.tar.gz")),
                dict(name="cifar10", split="test"), ["cifar-10-binary.tar.gz", "put a good copy"]),
    "lacking tar": (lambda f: archive(f, ["data_batch_1.bin"]),
                    dict(name="cifar10"), ["data_batch_2", "put a good copy"]),
    "pickle that runs": (lambda f: write_cifar(f, 1, "", lambda _: b"\x80\x02cos\nmkdir\nU\x04evil\x85R."),
                         dict(name="cifar10"), ["data_batch_1 of", "it wants to run os.mkdir", "put a good copy"]),
    "other pickle": (lambda f: write_cifar(f, 1, "", lambda _: pickle.dumps([1, 2], 2)),
                     dict(name="cifar10"), ["data_batch_1 of", "put a good copy"]),
    "cut pickle": (lambda f: write_cifar(f, 1, "", lambda rows: pickled(rows)[:-99]),
                   dict(name="cifar10"), ["data_batch_1 of", "put a good copy"]),
    "no mirror": (None, dict(name="mnist"),
                  ["no train-images-idx3-ubyte.gz or train-images-idx3-ubyte in", "MNIST/raw/", "; cannot download",
                   "put it into"]),
    "unwritable": (lambda f: (f / "file").write_text(""), dict(name="mnist", data_dir="file"),
                   ["cannot write", "--data-dir"]),
    "no images": (lambda f: (f / "a.txt").write_text(""), {}, ["no images", ".png"]),
    "not an image": (lambda f: (two_images(f), (f / "b.png").write_text("?")), {},
                     ["b.png", "replace"]),
    "not images": (lambda f: [(f / f"{i}.png").write_text("?") for i in range(70)] + [two_images(f)], {},
                   ["70 images cannot be read: ", "/0.png", "/10.png", "/40.png", "; ...: replace them"]),
    "only others": (lambda f: [(f / name).write_text("") for name in ("a.tif", "b.TIF", "c.heic")], {},
                    ["no images in", "only 2 .tif, 1 .heic", ".png"]),
    "torchvision": (lambda f: [(f / "MNIST/raw").mkdir(parents=True), (f / "MNIST/raw/t10k-labels-idx1-ubyte").touch()],
                    {}, ["pass --data mnist --data-dir"]),
    "cut png": (lambda f: (two_images(f), noise(f / "c.png"), cut(f / "c.png")), {},
                ["c.png", "replace"]),
    "cut jpg": (lambda f: (two_images(f), noise(f / "c.jpg"), cut(f / "c.jpg")), {},
                ["c.jpg", "replace"]),
    "cut gray": (lambda f: (write_image(f / "a.png", 1, mode="L"), cut(f / "a.png")), {},
                 ["a.png", "replace"]),
    "deep": (lambda f: [write_image(f / name, 1000, mode="I;16") for name in ("a.png", "b.png")], {},
             ["2 images cannot be read", "a.png", "b.png", "save it with 8"]),
    "film": (lambda f: (two_images(f), Image.new("L", (16, 16)).save(
        f / "c.gif", save_all=True, append_images=[Image.new("L", (16, 16), 255)])), {}, ["c.gif (a film", "moving"]),
    "no target": (lambda f: (two_images(f), (f / "c.png").symlink_to(f / "nowhere")), {}, ["c.png (No such file"]),
    "no name": (lambda f: two_images(f), dict(name=""), ["no data set or folder ''"]),
    "sizes": (lambda f: two_images(f, size=(20, 10)), {}, ["b.png", "10x20", "--image-size"]),
    "loose": (lambda f: two_images(f, "cats/b.png"), {}, ["a.png", "into a subfolder"]),
    "columns": (lambda f: table(f, "file,caption\na.png,x\n"), {},
                ["first line", "file_name,text"]),
    "empty table": (lambda f: table(f, ""), {}, ["first line", "file_name,text"]),
    "missing file": (lambda f: table(f, "file_name,text\na.png,x\nb.png,y\nc.png,z\n"), {},
                     ["names c.png", "delete the line"]),
    "missing line": (lambda f: table(f, "file_name,text\na.png,x\n"), {}, ["for b.png", "add one"]),
    "encoding": (lambda f: table(f, "file_name,text\na.png,\xe9\n"), {}, ["UTF-8"]),
    "comma": (lambda f: table(f, "file_name,text\na.png,a cat\nb.png,a red, big cat\n"), {},
              ["line 3 has 3 columns instead of 2", "double quotes"]),
    "short line": (lambda f: table(f, "file_name,text\na.png\n"), {}, ["line 2 has 1 columns"]),
    "lines of a text": (lambda f: table(f, 'file_name,text\na.png,"a\nb\nc"\nd.png,x\n'), {}, ["line 5 names d.png"]),
    "open quote": (lambda f: table(f, 'file_name,text\na.png,"a cat\nb.png,a dog\n'), {}, ["line 2", "double quotes"]),
    "column twice": (lambda f: table(f, "file_name,text,text\na.png,x,y\n"), {}, ["twice", "file_name,text"]),
    "two tables": (lambda f: (table(f, "file_name,text\na.png,x\nb.png,y\n"), (f / "metadata.jsonl").touch()), {},
                   ["both metadata.csv and metadata.jsonl", "keep one"]),
    "no json": (lambda f: table(f, '{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png"', "jsonl"), {},
                ["line 2", '"text"']),
    "no text": (lambda f: table(f, '{"file_name": "a.png", "caption": "x"}', "jsonl"), {}, ["line 1", '"text"']),
    "empty list": (lambda f: table(f, '{"file_name": "a.png", "text": []}', "jsonl"), {},
                   ["line 1", '"text"']),
    "a number": (lambda f: table(f, '{"file_name": "a.png", "text": [1]}', "jsonl"), {}, ["line 1", '"text"']),
    "brackets": (lambda f: table(f, "[" * 10**5, "jsonl"), {}, ["line 1", '"text"']),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case, tmp_path, monkeypatch):
    prepare, arguments, needed = ERRORS[case]
    monkeypatch.setitem(datasets.MIRRORS, "mnist", [(tmp_path / "nowhere").as_uri() + "/"])
    folder = tmp_path / "data"
    folder.mkdir()
    if prepare:
        prepare(folder)
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    arguments = {"name": str(folder), **arguments}
    arguments["data_dir"] = folder / arguments.get("data_dir", ".")
    with pytest.raises(UserError) as e:
        load(**arguments)
    message = str(e.value)
    assert "\n" not in message and all(word in message for word in needed), message
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before


def test_what_is_left_out_is_told(tmp_path, monkeypatch, capsys):
    """A table in a subfolder; a folder that is called like a data set of ours, if there are pictures in it."""
    monkeypatch.chdir(pets(tmp_path))
    (tmp_path / "cat" / "metadata.csv").write_text("file_name,text\n0.png,a cat\n")
    assert not load(str(tmp_path), image_size=16).has_captions
    assert "left out    captions in cat/metadata.csv" in capsys.readouterr().out
    (tmp_path / "shapes").mkdir()
    load("shapes")
    assert not capsys.readouterr().out
    write_image(tmp_path / "shapes" / "a.png")
    load("shapes")
    assert "pass ./shapes" in capsys.readouterr().out and load("./shapes").shape == (3, 16, 16)
    (tmp_path / "shapes" / "a.png").rename(tmp_path / "a.png")
    (tmp_path / "shapes" / "b.png").symlink_to("nowhere")
    assert len(load("shapes")) == 65536


def test_lazy_folders_name_the_bad_image_when_they_reach_it(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "IN_MEMORY", 0)
    write_image(tmp_path / "a.png")
    noise(tmp_path / "b.png")
    cut(tmp_path / "b.png")
    dataset = load(str(tmp_path))
    assert dataset[[0]]["x"].shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match="^cannot read .*b.png"):
        dataset[[1, 0, 1]]


def test_one_frame_of_a_clip_is_a_picture_and_sixteen_are_a_longer_clip():
    eight, one, sixteen = (datasets.load("moving", image_size=16, frames=n) for n in (None, 1, 16))
    assert (eight.shape, one.shape, sixteen.shape) == ((3, 8, 16, 16), (3, 16, 16), (3, 16, 16, 16))
    a, b, c = (d[[5, 700]] for d in (eight, one, sixteen))
    assert torch.equal(a["x"][:, :, 0], b["x"]) and torch.equal(a["x"][:, :, -1], c["x"][:, :, -1])
    assert a["caption"] == b["caption"] == c["caption"]
    with pytest.raises(UserError, match="--frames"):
        datasets.load("shapes", frames=4)


def test_without_a_home_folder(monkeypatch):
    """As in a container whose user has no name."""
    def nobody(path):
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.setattr(Path, "expanduser", nobody)
    with pytest.raises(UserError, match="no home folder for ~/.cache.*--data-dir"):
        load("mnist")
    assert len(load("shapes")) == 65536                         # it needs none


# --- what a run knows of its data ---

def arguments(folder, *flags):
    """What train.py knows before it resumes."""
    args = train.parse(["--data", str(folder), "--results-dir", str(folder.parent / "results"), "--name", "run",
                        *flags])
    args.bf16, paper = False, checkpoint.load_paper("dis")
    args.options = paper.CONFIGS["tiny"]
    return args, inputs.for_training(args, paper, "cpu")[0]


def pets(folder):
    for i in range(4):
        write_image(folder / ("cat", "dog")[i % 2] / f"{i}.png", size=(16, 16 + i))     # files of other sizes
    return folder


def swap(a, b):
    a.rename(a.with_name("swapped"))
    b.rename(a)
    a.with_name("swapped").rename(b)


OTHER = "--data: names, sizes, classes or captions of the files, digest"
CHANGES = {
    "same": (lambda f: None, None),
    "moved": (lambda f: shutil.move(f, f.parent / "elsewhere" / f.name), None),
    "moved and renamed": (lambda f: shutil.move(f, f.parent / "animals"), None),
    "renamed class": (lambda f: os.rename(f / "cat", f / "pet"), r"classes \['pet'\] \(was \['cat'\]\)"),
    "classes swapped": (lambda f: swap(f / "cat", f / "dog"), OTHER),
    "to another class": (lambda f: os.rename(f / "cat/0.png", f / "dog/0.png"), OTHER),
    "files swapped": (lambda f: swap(f / "cat/0.png", f / "cat/2.png"), OTHER),
    "renamed file": (lambda f: os.rename(f / "cat/0.png", f / "cat/4.png"), OTHER)}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_with_its_own_files_only(tmp_path, change):
    """Counts are the same in each case. A run of an earlier version knew only them, the class names and the path."""
    args, _ = arguments(pets(tmp_path / "pets"), "--image-size", "16")
    folder, (prepare, needed) = checkpoint.folder_of(args), CHANGES[change]
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint.save(folder, args, 1, {"model": {}, "ema": {}, "opt": None})
    moved = Path(prepare(tmp_path / "pets") or tmp_path / "pets")
    args, _ = arguments(moved, "--image-size", "16", "--results-dir", str(tmp_path / "results"))
    with pytest.raises(UserError, match=needed) if needed else contextlib.nullcontext():
        assert checkpoint.origin(args, folder, print)
    if needed is None and change != "moved and renamed":
        del args.identity
        checkpoint.save(folder, args, 2, {"model": {}, "ema": {}, "opt": None})
        args.identity = "0"
        assert checkpoint.origin(args, folder, print)
    checkpoint.let_go()


def test_a_run_with_captions_goes_on_with_its_own_captions_only(tmp_path):
    def identity(*flags):
        args, paper = arguments(tmp_path / "pets", "--image-size", "16")[0], checkpoint.load_paper("mdm")
        args.cond, args.model, args.num_classes = flags[0], "mdm", -1
        return inputs.for_training(args, paper, "cpu") and args.identity

    pets(tmp_path / "pets")
    table, lines = tmp_path / "pets" / "metadata.csv", [f"{('cat', 'dog')[i % 2]}/{i}.png,a pet" for i in range(4)]
    found = {cond: [] for cond in ("text", "class")}
    for last in "a pet", "a dog":
        table.write_text("\n".join(["file_name,text", *lines[:3], lines[3].replace("a pet", last)]))
        for cond in found:
            found[cond].append(identity(cond))
    assert found["text"][0] != found["text"][1] and found["class"][0] == found["class"][1]


def test_names_are_kept_as_they_were_and_digested_as_ever(tmp_path):
    """Even if no text has such a name. Other numbers would part old runs from their data."""
    names = ["cat/1.png", "cat/\u00e9.png", "\udcff.png"]
    assert list(datasets.Names(names)) == names and len(datasets.Names(names)) == 3
    sizes = [(pets(tmp_path) / name).stat().st_size for name in ("cat/0.png", "cat/2.png", "dog/1.png", "dog/3.png")]
    known = json.dumps([["cat/0.png", "cat/2.png", "dog/1.png", "dog/3.png"], sizes])
    assert load(str(tmp_path), image_size=16).files == datasets.digest(known.encode())


def test_two_folders_of_one_name_are_two_data_sets(tmp_path):
    args, _ = arguments(pets(tmp_path / "a" / "train"), "--image-size", "16")
    folder = checkpoint.folder_of(args)
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint.save(folder, args, 1, {"model": {}, "ema": {}, "opt": None})
    write_image(pets(tmp_path / "b" / "train") / "dog" / "3.png", size=(16, 90))
    args, _ = arguments(tmp_path / "b" / "train", "--image-size", "16", "--results-dir", str(folder.parent))
    with pytest.raises(UserError, match="--data .*b/train .was .*a/train.*--name NEW"):
        checkpoint.origin(args, folder, print)
    args.name, args.resume, said = "new", str(folder), []       # a new run from these weights may, and is told
    assert checkpoint.origin(args, checkpoint.folder_of(args), said.append)
    assert "was trained on other files or classes" in said[0] and len(said) == 1
    for space, told in (({"vae": "one", "data": "b"}, False), ({"vae": "other", "data": "a"}, True)):
        saved, args.space = torch.load(folder / "latest.pt"), space
        saved["args"]["space"] = {"vae": "one", "data": "a"}
        torch.save(saved, folder / "latest.pt")
        assert checkpoint.origin(args, checkpoint.folder_of(args), said.append)
        assert ("of another VAE" in said[-1]) == told
    checkpoint.let_go()


def test_a_run_of_this_folder_is_no_part_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(pets(tmp_path / "pets"))
    args = train.parse(["--data", "."])
    folder = checkpoint.folder_of(args)
    assert folder == Path("results/dis-pets")
    write_image(folder / "samples" / "step_0000100.png")
    assert load(".", image_size=16).num_classes == 3            # nobody's yet
    for name in ("args.json", "log.csv"):
        (folder / name).touch()
    assert load(".", image_size=16).class_names == ["cat", "dog"]


def test_the_plan_names_the_classes(tmp_path):
    _, dataset = arguments(pets(tmp_path / "pets"), "--image-size", "16")
    assert dataset.condition == "2 classes (cat, dog)"
    os.rename(tmp_path / "pets" / "cat", tmp_path / "pets" / "test")
    os.rename(tmp_path / "pets" / "dog", tmp_path / "pets" / "Train")
    _, dataset = arguments(tmp_path / "pets", "--image-size", "16")
    assert re.search(r"2 classes \(Train, test\)\nnote .*such as --data .*pets/Train$", dataset.condition)
    for i in range(30):
        write_image(tmp_path / "many" / f"c{i:02d}" / "1.png")
    assert arguments(tmp_path / "many")[1].condition == "30 classes (c00, ..., c29)"


def test_a_console_may_lack_the_letters_of_a_folders_name(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    with pytest.raises(SystemExit):
        cli.run(lambda: print("data 猫", flush=True))
    assert console.buffer.getvalue().strip() == b"data \\u732b"


# --- words beside pictures ---

def test_labels_have_all_their_letters_or_numbers_that_are_explained(monkeypatch, capsys):
    pictures.labels.cache_clear()
    assert pictures.labels(("cat", "a" * 50))[1] == ["cat", "a" * 36 + " ..."]
    lacking = ImageFont.load_default()
    assert pictures.has_letters(lacking, "cat") and not pictures.has_letters(lacking, "cat 猫")
    monkeypatch.setattr(pictures, "FONTS", ())
    images = np.zeros((2, 8, 8, 1), np.uint8)
    for _ in range(2):                                          # a film has many pictures, but one legend
        numbered = pictures.grid_image(images, 2, ["猫", "dog"])
    assert capsys.readouterr().out == "rows        1 猫, 2 dog (no font here has their letters)\n"
    assert np.array_equal(numbered, pictures.grid_image(images, 2, ["1", "2"]))
