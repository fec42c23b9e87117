"""sample.py --denoise: its scores checked by hand, its chain with a perfect model, and the command line."""
import csv
import math
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from diffusion import Diffusion, UserError, cosine_alpha_bar, fold, linear_alpha_bar, normal
from support import datasets, denoise
from test_train import SMALL

D = Diffusion(cosine_alpha_bar(1000), "eps")
METRICS = {"psnr": denoise.psnr, "ssim": denoise.ssim}


def pictures(n=3, size=16):
    x = datasets.load("shapes", image_size=size, split="test")[range(n)]["x"]
    return x / 127.5 - 1                                                     # (n, 3, size, size)


def knowing(x0):
    """A perfect network: the eps that leads to x0."""
    def model(x, t, y=None):
        ab = D.alpha_bar[t].float().view(-1, 1, 1, 1)
        return (x - ab.sqrt() * x0) / (1 - ab).sqrt()
    return model


# --- scores ---

def naive_ssim(x, y):
    """Wang et al. 2004, Eq. 13, of one channel with values in [0, 2]: window by window, float64."""
    r = np.arange(-5, 6)
    w = np.exp(-(r[:, None] ** 2 + r ** 2) / (2 * 1.5 ** 2))
    w /= w.sum()
    scores = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i:i + 11, j:j + 11], y[i:i + 11, j:j + 11]
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb, cov = (w * (a - ma)**2).sum(), (w * (b - mb)**2).sum(), (w * (a - ma) * (b - mb)).sum()
            scores.append((2 * ma * mb + 4e-4) * (2 * cov + 3.6e-3)
                          / ((ma**2 + mb**2 + 4e-4) * (va + vb + 3.6e-3)))
    return np.mean(scores)


def test_ssim_of_equal_images_is_one_and_of_others_less():
    x = pictures()
    torch.testing.assert_close(denoise.ssim(x, x), torch.ones(3))
    assert (denoise.ssim(x, -x) < 0.5).all()
    torch.testing.assert_close(denoise.ssim(x, x.flip(0)), denoise.ssim(x.flip(0), x))


def test_ssim_is_the_double_loop():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (2, 3, 13, 17))
    y = np.clip(x + 0.4 * rng.standard_normal(x.shape), -1, 1)
    naive = [np.mean([naive_ssim(a + 1, b + 1) for a, b in zip(*pair)]) for pair in zip(x, y)]
    np.testing.assert_allclose(denoise.ssim(torch.tensor(x), torch.tensor(y)), naive, rtol=1e-10)
    single = denoise.ssim(torch.tensor(x).float(), torch.tensor(y).float())
    np.testing.assert_allclose(single, naive, atol=1e-5)


@pytest.mark.parametrize("a, b", [(-1, 1), (0.2, 0.5), (-1, -0.9)])
def test_ssim_of_two_constants_is_the_luminance_term(a, b):
    x, y = (torch.full((1, 1, 12, 12), v, dtype=torch.float64) for v in (a, b))
    a, b = a + 1, b + 1
    assert denoise.ssim(x, y).item() == pytest.approx((2 * a * b + 4e-4) / (a * a + b * b + 4e-4), rel=1e-9)


def test_psnr_by_hand():
    """An error of 0.2 everywhere, peak 2: 20 log10(2 / 0.2) = 20 dB."""
    x, y = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.2)
    y[1] = 1
    torch.testing.assert_close(denoise.psnr(x, y), torch.tensor([20.0, 20 * math.log10(2)]))


def test_gaussian_keeps_means_and_spreads_a_point():
    torch.testing.assert_close(denoise.gaussian(torch.ones(1, 1, 9, 9), 2, 3), torch.ones(1, 1, 3, 3))
    point = torch.zeros(1, 1, 9, 9)
    point[..., 4, 4] = 1
    out = denoise.gaussian(point, 1, 3)[0, 0]                                 # (3, 3)
    assert out[0, 1] / out[1, 1] == pytest.approx(math.exp(-0.5)) and out[0, 0] < out[0, 1]


# --- the chain ---

@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_perfect_model_returns_the_clean_picture(sampler):
    x0 = pictures()
    scores, seconds, film = denoise.denoise(knowing(x0), D, x0, torch.arange(3), None, 150, "151",
                                           METRICS, 3, torch.device("cpu"), sampler=sampler)
    assert list(seconds) == list(range(1, 152)) and sorted(seconds.values()) == list(seconds.values())
    assert scores["psnr", 151].min() > 80 and scores["ssim", 151].min() > 0.9999
    assert scores["psnr", "one step"].min() > 80
    for name in METRICS:
        curve = torch.stack([scores[name, k] for k in (1, 40, 80, 120, 151)])               # (5, 3)
        assert (curve.diff(dim=0) > 0).all()
        assert scores[name, "noisy"].mean() < max(scores[name, ("blur", s)].mean() for s in denoise.SIGMAS)
    assert len(film["noisy"]) == 3 and np.abs(film[151][0].astype(int) - film["clean"][0]).max() <= 1


def test_scores_do_not_depend_on_the_batch_size():
    x0, seeds = pictures(10), 5 + torch.arange(10)
    model = lambda x, t: 0.9 * x
    a, b = [denoise.denoise(model, D, x0, seeds, None, 30, "31", METRICS, size, torch.device("cpu"),
                           sampler="ddpm") for size in (10, 3)]
    assert a[0].keys() == b[0].keys()
    assert all(len(a[0][key]) == 10 for key in a[0])
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-6)
    assert all(len(b[2][key]) == 8 and np.array_equal(a[2][key], b[2][key]) for key in a[2])


def test_each_image_has_its_own_best_step():
    """Two images, at their best after 1 and after 3 steps of three; their mean is, after 3."""
    curves, seconds = torch.tensor([[9.0, 1.0], [5.0, 2.0], [6.0, 8.0]]), {1: 0.5, 2: 1.0, 3: 1.5}
    scores = {("ssim", k): curve for k, curve in enumerate(curves, 1)}
    scores |= {("lpips", k): -curve for k, curve in enumerate(curves, 1)}
    for name, sign in (("ssim", 1), ("lpips", -1)):
        at, each, together = denoise.best_steps(scores, seconds, name)
        assert at.tolist() == [1, 3] and each == [sign * 8.5, 2, 1] and together == [sign * 7, 3, 1.5]


def test_noise_depends_on_seed_and_step_alone():
    x0, seeds = pictures(), torch.tensor([4, 9, 2])
    x = denoise.noise_to(D, x0, seeds, 200)
    assert torch.equal(denoise.noise_to(D, x0[1:2], seeds[1:2], 200), x[1:2])
    assert torch.equal(denoise.noise_to(D, x0.flip(0), seeds.flip(0), 200), x.flip(0))
    eps = (x - D.alpha_bar[200].sqrt() * x0) / (1 - D.alpha_bar[200]).sqrt()
    assert eps.std().item() == pytest.approx(1, abs=0.05)
    other = denoise.noise_to(D, x0, seeds, 201)
    assert (other - x).std() > 0.1
    for t in range(202):                                    # the reverse chain uses other noise
        assert (normal(fold(seeds, t), (3, 16, 16)) - eps).abs().mean() > 0.5


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_start_at_the_last_step_from_noise_is_ordinary_sampling(sampler):
    model, seeds = lambda x, t: 0.9 * x, torch.arange(3)
    noise = normal(fold(seeds, D.T), (1, 4, 4))
    options = dict(sampler=sampler, steps="20")
    assert torch.equal(D.sample(model, (1, 4, 4), seeds, start=(noise, 999), **options),
                       D.sample(model, (1, 4, 4), seeds, **options))


@pytest.mark.parametrize("T, steps, expected", [
    (40, "41", list(range(40, -1, -1))), (0, "1", [0]), (40, "3", [40, 20, 0]), (40, "1", [40])])
def test_the_chain_shows_the_model_every_step_from_T_down(T, steps, expected):
    shown = []

    def model(x, t):
        shown.append(t.tolist())
        return 0 * x
    D.sample(model, (1, 4, 4), torch.arange(2), steps=steps, start=(torch.zeros(2, 1, 4, 4), T))
    assert shown == [[t, t] for t in expected]


def test_a_chain_that_would_not_begin_at_T_is_refused():
    with pytest.raises(ValueError, match="drop 'ddim'"):
        D.sample(lambda x, t: x, (1, 4, 4), torch.arange(1), steps="ddim10",
                 start=(torch.zeros(1, 1, 4, 4), 99))
    with pytest.raises(ValueError, match="ask for 1 to 100"):
        D.respaced("101", 99)


# --- the command line ---

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("denoise")
    train.main([*SMALL, "--max-steps", "2", "--results-dir", str(root), "--name", "run"])
    return root / "run"


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_test_images_give_tables_pictures_and_every_step(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)         # as if it were not installed
    monkeypatch.setattr(denoise, "load_lpips", lambda shape, device, real=denoise.load_lpips:
                        real((3, 64, 64), device))          # large enough for it
    sample.main(["--ckpt", str(trained), "--denoise", "test", "--num-samples", "3", "--from-step", "12,30",
                 "--device", "cpu", "--out", str(tmp_path / "d.png")])
    said = capsys.readouterr().out
    assert "LPIPS was not computed" in said and "pip install lpips" in said
    assert "3 test images of shapes, class: none (label -1); ddpm" in said
    assert [line.split()[0] for line in said.splitlines() if line[:9].strip().isdigit()] == ["12", "30"] * 2
    table = rows(tmp_path / "d.csv")
    assert list(table[0]) == ["network", "from_step", "reverse_steps", "psnr", "ssim", "seconds"]
    assert [(int(r["from_step"]), int(r["reverse_steps"])) for r in table] == [
        *((12, k) for k in range(1, 14)), *((30, k) for k in range(1, 32))]
    assert all(0 < float(r["psnr"]) < 60 and -1 <= float(r["ssim"]) <= 1 for r in table)
    with Image.open(tmp_path / "d.png") as strip:
        # two blocks of a line of words and 3 pictures of 16 + 2 pixels, 8 states, 4 times as large
        assert strip.size == (8 * 18 * 4, 2 * (16 + 3 * 18 * 4))


def test_two_networks_get_the_same_noise_and_one_picture(trained, tmp_path, capsys):
    saved = torch.load(trained / "latest.pt", weights_only=True)
    other = tmp_path / "other.pt"
    torch.save({**saved, "ema": {k: 1.1 * v for k, v in saved["ema"].items()}}, other)
    common = ["--denoise", "test", "--num-samples", "2", "--from-step", "30", "--steps", "3", "--device", "cpu"]
    sample.main([*common, "--ckpt", str(trained), "--against", str(other), "--out", str(tmp_path / "both.png")])
    sample.main([*common, "--ckpt", str(other), "--out", str(tmp_path / "one.png")])
    both, one = ([{k: v for k, v in r.items() if k != "seconds"} for r in rows(tmp_path / f"{name}.csv")]
                 for name in ("both", "one"))
    assert both[3:] == one and both[0]["ssim"] != one[0]["ssim"]
    names = [str(trained / "latest.pt"), str(other)]
    assert [r["network"] for r in both] == [names[0]] * 3 + [names[1]] * 3
    images = rows(tmp_path / "both-images.csv")
    assert [(r["network"], r["metric"], r["image"]) for r in images] == [
        (net, metric, i) for metric in METRICS for net in names for i in "01"]
    assert all(len({r["noisy"] for r in images if (r["metric"], r["image"]) == (metric, i)}) == 1
               for metric in METRICS for i in "01")
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(names[0])]
    assert float(table[1][5]) == pytest.approx(sum(float(r["best"]) for r in images[4:6]) / 2, abs=1e-4)
    with Image.open(tmp_path / "both.png") as strip:
        # two lines of words, 2 pictures of 16 + 2 pixels in 2 + 2 x 6 states, 4 times as large
        assert strip.size == (14 * 18 * 4, 32 + 2 * 18 * 4)


@pytest.mark.parametrize("alpha_bar, shape, fix", [
    (cosine_alpha_bar(1000), (3, 16, 24), "3x16x16, and --against of 3x16x24: compare networks of one size"),
    (linear_alpha_bar(1000), (3, 16, 16), "same schedule and T"), (cosine_alpha_bar(500), (3, 16, 16), "same schedule"),
    (cosine_alpha_bar(90), (3, 16, 16), "0 to 89")])
def test_networks_that_would_not_see_the_same_pictures_are_not_compared(alpha_bar, shape, fix):
    args = types.SimpleNamespace(from_step="30,90", steps=None)
    networks = {"a": (None, D, {"shape": (3, 16, 16)}), "b": (None, Diffusion(alpha_bar), {"shape": shape})}
    with pytest.raises(UserError, match=fix):
        denoise.check(args, networks)


def test_a_photo_is_converted_and_lpips_is_a_column_if_it_is_there(trained, tmp_path, capsys, monkeypatch):
    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, x, y):
            return (x - y).square().mean((1, 2, 3), keepdim=True)
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert denoise.load_lpips((3, 64, 64), torch.device("cpu")) is None          # weights are missing
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    assert denoise.load_lpips((3, 28, 28), torch.device("cpu")) is None          # too small for AlexNet
    assert "at least 31 pixels" in capsys.readouterr().out
    metric = denoise.load_lpips((1, 64, 64), torch.device("cpu"))
    assert metric(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)).tolist() == [1, 1]
    monkeypatch.setattr(denoise, "load_lpips", lambda shape, device: metric)

    Image.new("L", (50, 40), 90).save(tmp_path / "photo.png")
    before = (tmp_path / "photo.png").read_bytes()
    for picture, out, said in (("photo.png", "photo.png", "is the picture itself"),
                               ("other.png", "d.png", "no picture")):
        with pytest.raises(SystemExit):
            sample.main(["--ckpt", str(trained), "--denoise", str(tmp_path / picture), "--from-step", "9",
                         "--out", str(tmp_path / out)])
        assert said in capsys.readouterr().err and (tmp_path / "photo.png").read_bytes() == before
    sample.main(["--ckpt", str(trained), "--denoise", str(tmp_path / "photo.png"), "--from-step", "100",
                 "--steps", "4", "--sampler", "ddim", "--eta", "0.5", "--class-labels", "3",
                 "--device", "cpu", "--out", str(tmp_path / "d.png")])
    said = capsys.readouterr().out
    assert "is 40x50 L: scaled, cropped and converted to this model's 16x16 RGB" in said
    assert "class: 3; ddim" in said and "LPIPS, lower is better" in said
    table = rows(tmp_path / "d.csv")
    assert [r["reverse_steps"] for r in table] == list("1234") and "lpips" in table[0]
