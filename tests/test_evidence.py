"""What judges the pictures, and what runs the studies of the README."""
import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import sample

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import evidence  # noqa: E402
import figures  # noqa: E402
import judge  # noqa: E402


@pytest.fixture
def small(monkeypatch):
    """Six hundred drawn shapes to train on, two hundred to test; a classifier of twenty steps."""
    load, train = data.load, judge.train
    monkeypatch.setattr(data, "load", lambda name, data_dir=None, size=None, split="train", **kw: load(
        name, data_dir, size, split, **kw).subset(range(600 if split == "train" else 200)))
    monkeypatch.setattr(judge, "train", lambda dataset: train(dataset, steps=20, batch=32))


# --- the figures ---

def test_frechet_distance_of_what_is_known():
    f = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) @ torch.randn(6, 6)
    assert judge.frechet(f, f) == pytest.approx(0, abs=1e-4)
    assert judge.frechet(f, f + 2) == pytest.approx(6 * 4, rel=1e-5)               # the means alone
    variance = torch.cov(f.double().T).trace().item()
    grown = judge.frechet(f - f.mean(0), 3 * (f - f.mean(0)))
    assert grown == pytest.approx((3 - 1)**2 * variance, rel=1e-5)
    a, b = torch.randn(400, 3).double(), torch.randn(300, 3).double() * torch.tensor([1, 2, 3])
    A, B = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(A @ B).real.sqrt().sum()        # no symmetric form: another way to it
    assert judge.frechet(a, b) == pytest.approx(
        (((a.mean(0) - b.mean(0))**2).sum() + A.trace() + B.trace() - 2 * root).item(), rel=1e-9)


def test_precision_and_recall_of_what_is_known():
    g = torch.Generator().manual_seed(0)
    real = torch.cat([torch.randn(200, 4, generator=g), 50 + torch.randn(200, 4, generator=g)])
    one_mode, far = torch.randn(300, 4, generator=g), torch.randn(300, 4, generator=g) - 99
    assert judge.share_within(real, real) == 1
    assert judge.share_within(one_mode, real) > 0.8                             # precise
    assert 0.35 < judge.share_within(real, one_mode) < 0.5                      # half is missing
    assert judge.share_within(far, real) == judge.share_within(real, far) == 0
    loop = torch.tensor([[0.0], [1], [2], [3], [10]])       # radii to the third neighbour: 3, 2, 2, 3, 9
    assert judge.share_within(torch.tensor([[-3.0], [-3.1], [5.9], [0.99], [20]]), loop) == pytest.approx(0.6)


def test_the_judge_on_cases_with_known_answers(small, tmp_path):
    j = judge.Judge("shapes", cache=tmp_path, say=lambda text: None)
    found = {name: j(x, y) for name, x, y in judge.known_cases(j, 200)}
    real = found["real training images"]
    assert real["x_real"] < 1.6 and real["precision"] > 0.7 and real["recall"] > 0.7
    assert found["labels shuffled"]["recognised"] < 0.35 < real["recognised"]
    assert found["labels shuffled"]["distance"] == real["distance"]
    assert found["no picture of class 0"]["distance"] > 1.3 * real["distance"]
    assert found["50 images, over and over"]["recall"] < 0.7 * real["recall"]
    assert found["nothing but noise"]["distance"] > 5 * real["distance"]
    again = judge.Judge("shapes", cache=tmp_path, say=lambda text: pytest.fail("trained twice"))
    assert torch.equal(again.real, j.real)


def test_the_judge_reads_folders_and_npz(small, tmp_path, capsys):
    x, folder = data.load("shapes")[range(24)]["x"].permute(0, 2, 3, 1).numpy(), tmp_path / "pngs"
    folder.mkdir()
    for i, image in enumerate(x):
        sample.to_pil(image).save(folder / f"{i:06d}.png")
    np.savez(tmp_path / "few.npz", arr_0=x, arr_1=np.arange(24) % 8)
    common = ["--data", "shapes", "--cache", str(tmp_path)]
    judge.main([str(folder), str(tmp_path / "few.npz"), "--class-labels", "all", *common])
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].split()[1:] == lines[1].split()[1:] and lines[0].split()[1] == "24"
    for flags, says in (([str(tmp_path / "nowhere")], "neither a folder nor an .npz"),
                        ([str(tmp_path)], "no .png"),
                        ([str(folder), "--image-size", "16"], "(3, 16, 16)"),
                        (["--data", "moving"], "needs pictures with classes")):
        with pytest.raises(SystemExit) as e:
            judge.main([*common, *flags])
        assert e.value.code == 2 and says in capsys.readouterr().err


# --- the studies ---

def test_a_study_from_training_to_tables(small, tmp_path, monkeypatch, capsys):
    draw = dict(sampler="ddim", steps=2, cfg=1.0, n=40)
    small_mdm = [*evidence.MDM, "--set", "channels=[8,16]", "outer=[{'channels':[8,8],'blocks':[1,1]}]"]
    monkeypatch.setitem(evidence.STUDIES, "small", evidence.Study("A small study", {
        "DiS": [([*evidence.DIS, "--set", "width=16", "depth=2"], [2, 3])]},
        draws=[draw], seeds=(0, 1), noise=evidence.LEVELS, denoise=(20,)))
    monkeypatch.setitem(evidence.STUDIES, "stages", evidence.Study("Stages", {
        "MDM": [([*small_mdm, *evidence.HALF], [2]), (small_mdm, [2])]}, draws=[draw], noise=(0.1, 10)))
    common = ["--data", "shapes", "--results-dir", str(tmp_path / "runs"), "--out", str(tmp_path)]
    evidence.main(["small", *common, "--run", "DiS", "0"])
    evidence.main(["stages", *common, "--run", "MDM", "0"])
    path = tmp_path / "runs/shapes-small-dis-0.csv"
    rows = evidence.read_rows(path)
    assert [(r["step"], r.get("steps"), r.get("from_step"), r.get("metric")) for r in rows] == [
        (2, 2, None, None), (3, 2, None, None), (3, None, 20, "psnr"), (3, None, 20, "ssim")]
    assert rows[0]["distance"] > 0 and rows[1]["minutes"] > rows[0]["minutes"] > 0
    assert rows[2]["after"] in range(1, 22) and rows[3]["best"] <= 1
    staged = evidence.read_rows(tmp_path / "runs/shapes-stages-mdm-0.csv")
    assert (tmp_path / "runs/shapes-stages-mdm-0.stage1/latest.pt").exists()
    assert all(r["error_0.1"] < r["error_10"] for r in staged) and len(staged) == 1
    capsys.readouterr()

    evidence.main(["small", *common, "--run", "DiS", "0"])       # all is done: nothing is done
    assert "trained" not in capsys.readouterr().out and evidence.read_rows(path) == rows
    evidence.write_rows(path, rows[:1])                                 # what is missing alone
    evidence.main(["small", *common, "--run", "DiS", "0"])
    again = evidence.read_rows(path)
    timed = "minutes", "seconds"
    assert [{k: v for k, v in r.items() if k not in timed} for r in again] == [
        {k: v for k, v in r.items() if k not in timed} for r in rows]

    args = argparse.Namespace(data="shapes", results_dir=tmp_path / "runs", out=tmp_path)
    evidence.gather(args, "small")                                      # seed 1 was not run
    figures.main(["shapes-small", "--folder", str(tmp_path)])
    tables = capsys.readouterr().out
    assert "| DiS | 3 | DDIM 2 | 1 |" in tables and "SSIM from step 20 | DiS" in tables
    assert (tmp_path / "shapes-small.png").exists() == bool(figures.pyplot)


def test_studies_refuse_what_cannot_be_judged(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "benchmarks/evidence.py", "skip", "--data", "moving",
                           "--results-dir", tmp_path, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and "needs pictures with classes" in done.stderr
    with pytest.raises(SystemExit) as e:
        evidence.main(["skips"])
    assert e.value.code == 2
