"""The judge of pictures, the studies that it looks at, and the page that tells what they found."""
import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion import SCHEDULES, Diffusion, UserError
from support import datasets
from support.checkpoint import load_paper
from support.pictures import to_pil

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("counted_once")         # conftest.py
sys.path.insert(0, str(ROOT / "benchmarks"))
import evidence  # noqa: E402
import figures  # noqa: E402
import judge  # noqa: E402


@pytest.fixture
def small(monkeypatch):
    """Drawn shapes, 1,440 for training and 400 for testing, and a classifier that is trained for twenty steps."""
    load, train = datasets.load, judge.train
    monkeypatch.setattr(datasets, "load", lambda name, data_dir=None, size=None, split="train", **kw: load(
        name, data_dir, size, split, **kw).subset(range(1440 if split == "train" else 400)))
    monkeypatch.setattr(judge, "train", lambda dataset, photographs: train(dataset, photographs, 20, 32))
    monkeypatch.setattr(judge, "ASSETS", Path("no classifier is here"))


# --- the judge ---

def test_frechet_distance_of_what_is_known():
    f = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) @ torch.randn(6, 6)
    assert judge.frechet(f, f) == pytest.approx(0, abs=1e-4)
    assert judge.frechet(f, f + 2) == pytest.approx(6 * 4, rel=1e-5)               # only the means differ
    variance = torch.cov(f.double().T).trace().item()
    grown = judge.frechet(f - f.mean(0), 3 * (f - f.mean(0)))
    assert grown == pytest.approx((3 - 1)**2 * variance, rel=1e-5)
    a, b = torch.randn(400, 3).double(), torch.randn(300, 3).double() * torch.tensor([1, 2, 3])
    A, B = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(A @ B).real.sqrt().sum()        # without the symmetric form that judge.py uses
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


def test_photographs_are_moved_and_mirrored():
    """At most 4 pixels, about half of them mirrored, the same for the same seeds. A picture keeps what it shows."""
    x = torch.zeros(400, 1, 12, 12)
    x[:, 0, 6, 5], x[:, 0, 6, 7] = 1, 2                         # two dots, 2 pixels apart
    y = judge.moved(x, torch.arange(400))
    assert torch.equal(y, judge.moved(x, torch.arange(400))) and torch.equal(y.sum((1, 2, 3)), torch.full((400,), 3.0))
    one, two = ((y == dot).flatten(1).float().argmax(1) for dot in (1, 2))
    assert set((one // 12).tolist()) == set(range(2, 11)) and set((two - one).tolist()) == {2, -2}
    assert 0.4 < (two < one).float().mean() < 0.6


def test_a_classifier_of_photographs_learns(small):
    part = datasets.load("shapes")
    net, x, y = judge.train(part, True), *(part[range(300)][k] for k in ("x", "y"))
    with torch.no_grad():
        features, logits = net(x / 127.5 - 1)
    assert features.shape == (300, 256) and (logits.argmax(1) == y).float().mean() > 0.25


def test_the_judge_on_cases_with_known_answers(small, tmp_path):
    j = judge.Judge("shapes", cache=tmp_path, say=lambda text: None)
    found = {name: j(x, y) for name, x, y in judge.known_cases(j, 200)}
    real = found["real images"]
    assert real["x_real"] < 1.7 and real["precision"] > 0.6 and real["recall"] > 0.6
    assert found["labels shuffled"]["recognised"] < 0.4 < real["recognised"]
    assert found["labels shuffled"]["distance"] == real["distance"]
    assert found["no picture of class 0"]["distance"] > 1.2 * real["distance"]
    assert found["50 images, over and over"]["recall"] < 0.9 * real["recall"]
    assert found["nothing but noise"]["distance"] > 5 * real["distance"]
    labels = j.fresh.labels[j.some_fresh(40, seed=3)]
    assert labels.bincount().tolist() == [5] * 8                # as many of each class
    again = judge.Judge("shapes", cache=tmp_path, say=lambda text: pytest.fail("trained twice"))
    assert torch.equal(again.real, j.real)


def test_where_the_judge_is(tmp_path):
    """In assets; in the cache, if that has one or if one is to be trained anew."""
    assert judge.path_of("mnist", None, tmp_path) == judge.ASSETS / "mnist-judge.pt"
    own = judge.path_of("mnist", None, tmp_path, anew=True)
    own.touch()
    assert judge.path_of("mnist", None, tmp_path) == own == tmp_path / "mnist-judge.pt"
    assert judge.path_of("mnist", 16, tmp_path) == tmp_path / "mnist-16-judge.pt"


def test_the_judge_reads_folders_and_npz(small, tmp_path, capsys):
    x, folder = datasets.load("shapes")[range(24)]["x"].permute(0, 2, 3, 1).numpy(), tmp_path / "pngs"
    folder.mkdir()
    for i, image in enumerate(x):
        to_pil(image).save(folder / f"{i:06d}.png")
    np.savez(tmp_path / "few.npz", arr_0=x, arr_1=np.arange(24) % 8)
    common = ["--data", "shapes", "--cache", str(tmp_path)]
    judge.main([str(folder), str(tmp_path / "few.npz"), "--class-labels", "all", *common])
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].split()[1:] == lines[1].split()[1:] and lines[0].split()[1] == "24"
    np.savez(tmp_path / "gray.npz", arr_0=x[..., :1])
    for flags, says in (([str(tmp_path / "nowhere")], "neither a folder nor an .npz"),
                        ([str(tmp_path)], "no .png"),
                        ([str(tmp_path / "gray.npz")], "(1, 32, 32)"),
                        (["--data", "moving"], "needs pictures with classes")):
        with pytest.raises(SystemExit) as e:
            judge.main([*common, *flags])
        assert e.value.code == 2 and says in capsys.readouterr().err


# --- the studies ---

@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_errors_are_at_the_noise_they_say(schedule, levels):
    """A network that sees no noise believes in x_t / alpha. That is sigma / alpha times the noise away from x_0."""
    alpha_bar = SCHEDULES[schedule](1000)
    if levels:
        shapes = [(3, 16, 16), (3, 32, 32)][2 - levels:]
        diffusion = load_paper("mdm").ExtendedDiffusion(alpha_bar, shapes, "eps")
    else:
        diffusion = Diffusion(alpha_bar, "eps")

    def net(z, t, y):
        return [torch.zeros_like(x) for x in z] if levels else torch.zeros_like(z)
    found = evidence.errors_by_noise(net, diffusion, datasets.load("shapes", split="test"), (0.1, 1, 10), n=50)
    assert found == {f"error_{r}": pytest.approx(r * r, rel=0.05) for r in (0.1, 1, 10)}


def test_a_study_from_training_to_tables(small, tmp_path, monkeypatch, capsys):
    draw = dict(sampler="ddim", steps=2, cfg=1.0, n=40)
    small_mdm = [*evidence.MDM, "--set", "channels=[8,16]", "outer=[{'channels':[8,8],'blocks':[1,1]}]"]
    monkeypatch.setitem(evidence.STUDIES, "small", evidence.Study("A small study", {
        "DiS": [([*evidence.DIS, "--set", "width=16", "depth=2"], [2, 3])]},
        draws=[draw], seeds=(0, 1), noise=evidence.LEVELS, denoise=(20,)))
    monkeypatch.setitem(evidence.STUDIES, "stages", evidence.Study("Stages", {
        "MDM": [([*small_mdm, *evidence.HALF], [2]), (small_mdm, [2])]}, draws=[draw]))
    common = ["--data", "shapes", "--results-dir", str(tmp_path / "runs"), "--out", str(tmp_path)]
    args = argparse.Namespace(data="shapes", data_dir=None, results_dir=tmp_path / "runs", out=tmp_path)
    (tmp_path / "runs").mkdir()
    judge_path = evidence.judge_itself(args)
    evidence.main(["small", *common, "--run", "DiS", "0"])
    evidence.main(["stages", *common, "--run", "MDM", "0"])
    path = tmp_path / "runs/shapes-small-dis-0.csv"
    rows = evidence.read_rows(path)
    assert [(r["step"], r.get("steps"), r.get("from_step"), r.get("metric")) for r in rows] == [
        (2, 2, None, None), (3, 2, None, None), (3, None, 20, "psnr"), (3, None, 20, "ssim")]
    assert rows[0]["distance"] > 0 and rows[0]["minutes"] > 0 and rows[1]["images"] == 96
    assert rows[2]["after"] in range(1, 22) and rows[3]["best"] <= rows[3]["best_each"] <= 1
    staged = evidence.read_rows(tmp_path / "runs/shapes-stages-mdm-0.csv")
    assert (tmp_path / "runs/shapes-stages-mdm-0.stage1/latest.pt").exists()
    assert len(staged) == 1 and staged[0]["images"] == 128
    capsys.readouterr()

    evidence.main(["small", *common, "--run", "DiS", "0"])              # all is done already: nothing happens
    assert capsys.readouterr().out == "" and evidence.read_rows(path) == rows
    evidence.write_rows(path, [rows[0], *rows[2:]])                     # only what is missing is done
    evidence.main(["small", *common, "--run", "DiS", "0"])
    again = evidence.read_rows(path)
    assert again[-1].items() - rows[1].items() <= {(k, again[-1][k]) for k in ("minutes", "seconds")}

    evidence.gather(args, "small", judge_path)                          # seed 1 was not run
    path.rename(tmp_path / "elsewhere")                                 # what another machine ran stays
    evidence.gather(args, "small", judge_path)
    assert evidence.read_rows(tmp_path / "shapes-small.csv") == again
    started = []
    monkeypatch.setattr(subprocess, "run", lambda command, **kw: (
        started.append(command[2:6]), subprocess.CompletedProcess(command, 0))[1])
    with pytest.raises(SystemExit):
        evidence.main(["small", *common, "--missing"])
    assert started == [["small", "--run", "DiS", "1"]]
    evidence.write_rows(path, [row | {"made_of": 7} for row in rows])   # made with other flags, or weights
    evidence.gather(args, "stages", judge_path)
    figures.main(["shapes-judge", "shapes-small", "shapes-stages", "--folder", str(tmp_path)])
    tables = capsys.readouterr().out
    for text in ("| real images |", "| DiS | 3 | DDIM 2 | 1 | 40 |", "SSIM from step 20 | DiS", "x0, cosine", "each at its best"):
        assert text in tables
    assert (tmp_path / "shapes-small.png").exists() == bool(figures.pyplot)
    (tmp_path / "shapes-small.csv").unlink()
    evidence.gather(args, "small", judge_path)
    assert not (tmp_path / "shapes-small.csv").exists()


def test_time_is_at_the_usual_rate(tmp_path):
    lines = ["step,images,images_per_s", "50,1600,100", "100,3200,2", "150,4800,100", "200,6400,99"]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    assert evidence.done_in(tmp_path / "log.csv") == (pytest.approx(6400 / 99.5 / 60), 6400)


def test_each_run_is_a_process_and_failures_are_told(tmp_path, monkeypatch, capsys):
    calls = []

    def run(command, env, **kwargs):
        calls.append((command[2:6], env["OMP_NUM_THREADS"]))
        return subprocess.CompletedProcess(command, -9 if "skip=none" in command else 0)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(evidence, "judge_itself", lambda args: None)
    common = ["--results-dir", str(tmp_path), "--out", str(tmp_path), "--jobs", "1"]
    for study, code in (("dis", 1), ("losses", 0)):
        with pytest.raises(SystemExit) as e:
            evidence.main([study, *common])
        assert e.value.code == code
    assert len(calls) == 3 * 6 + 3 * 3 and calls[0] == (["dis", "--run", "concat, adaln, patch 7", "0"], "1")
    assert capsys.readouterr().out.count("stopped or failed") == 3
    with pytest.raises(SystemExit) as e:
        evidence.main(["skips", *common])
    assert e.value.code == 2
    names = [evidence.file_of(argparse.Namespace(data="x", results_dir=""), name, arm, 0)
             for name, study in evidence.STUDIES.items() for arm in study.arms]
    assert len(set(names)) == len(names)


def test_speeds_are_of_each_in_turn(small, tmp_path, monkeypatch):
    tiny = [*evidence.DIS, "--set", "width=16", "depth=2", "--global-batch-size", "4"]
    monkeypatch.setattr(evidence, "FOUR", {"one": tiny, "two": tiny})
    threads = torch.get_num_threads()
    evidence.speed(argparse.Namespace(data="shapes", data_dir=None, out=tmp_path), turns=1)
    torch.set_num_threads(threads)
    rows = evidence.read_rows(tmp_path / "shapes-speed.csv")
    assert [r["arm"] for r in rows] == ["one", "two"] and all(r["images_per_s"] > 0 for r in rows)


# --- the page ---

PAGE = ROOT / "docs/results.md"


def scores(name):
    return evidence.read_rows(ROOT / f"assets/evidence/{name}.csv")


def test_the_tables_of_the_page_are_what_was_measured(tmp_path, monkeypatch, capsys):
    """figures.py writes the page as it is: each table and each command, from the scores in assets/evidence."""
    monkeypatch.setattr(figures, "pyplot", None)            # or it would draw the figures again
    copy = tmp_path / "results.md"
    text = PAGE.read_text("utf8")
    copy.write_text(text.replace("91.8%", "99.9%").replace("8.2 hours", "0 hours"), "utf8")
    figures.main(["--into", str(copy)])
    assert copy.read_text("utf8") == text and "| DiS | 19,000 |" in text


def test_words_stay_and_a_table_needs_its_place():
    page = "before\n<!-- a-b -->\nold\n<!-- end -->\nafter\n<!-- a-c -->\n<!-- end -->\n"
    done = figures.put(page, "a-c", "new 1\\1")
    assert done == page[:-len("<!-- end -->\n")] + "\nnew 1\\1\n\n<!-- end -->\n"
    assert figures.put(figures.put(done, "a-b", "x"), "a-b", "y").count("<!-- end -->") == 2
    with pytest.raises(UserError, match="no place for a-d"):
        figures.put(page, "a-d", "")


def test_equal_steps_and_colour_are_what_was_measured():
    """The short table of two studies, with words of our own around it."""
    steps, colour, text = scores("mnist-steps"), scores("shapes-colour"), PAGE.read_text("utf8")
    assert [r["arm"] for r in steps] == [r["arm"] for r in colour] == [*evidence.FOUR]
    for a, b in zip(steps, colour):
        line = [a["arm"], f"{a['recognised']:.1%}", f"{a['x_real']:.1f}", f"{a['error_1']:.3f}",
                f"{b['images']:,.0f}", f"{b['recognised']:.1%}", f"{b['x_real']:.0f}",
                f"{b['error_1']:.4f}"]
        assert f"| {' | '.join(line)} |" in text, line


def test_the_short_tables_of_guidance_and_samplers_are_what_was_measured():
    text = PAGE.read_text("utf8").replace("**", "")

    def line(head, rows, *wanted):
        distances = [[r["x_real"] for r in rows if how.items() <= r.items()] for how in wanted]
        return f"| {head} | {' | '.join(figures.digits(statistics.median(d)) for d in distances)} |"
    for arm, draws in (("DiS", "median of three draws"), ("MDM", "one draw")):
        guided, drawn = ([r for r in scores(f"mnist-{name}") if r["arm"] == arm] for name in ("guidance", "samplers"))
        assert line(f"{arm}: distance / 500 real", guided, *({"cfg": w} for w in (1, 1.5, 2))) in text
        assert line(f"{arm} ({draws})", drawn, *({"sampler": s, "steps": k} for s in ("ddim", "ddpm")
                                                for k in (10, 100))) in text


def test_distances_are_on_the_scale_that_the_page_says():
    """1,000 real images are at distance 8.9 from the test set of MNIST, 500 at 16.6. Only `minutes` judges 1,000."""
    text = PAGE.read_text("utf8")
    assert "1,000 real images are at distance 8.9,\n500 real images at 16.6" in text
    for path in (ROOT / "assets/evidence").glob("mnist-*.csv"):
        for r in evidence.read_rows(path):
            if "x_real" in r:
                assert r["n"] == (1000 if path.stem in ("mnist-minutes", "mnist-judge") else 500)
                assert r["distance"] / r["x_real"] == pytest.approx({1000: 8.9, 500: 16.6}[r["n"]], rel=3e-3)
