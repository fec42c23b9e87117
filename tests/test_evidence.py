"""The judge of pictures, the studies that it looks at, and the page that tells what they found."""
import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion import SCHEDULES, Diffusion, UserError
from support import checkpoint, datasets
from support.checkpoint import load_paper
from support.pictures import to_pil

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("counted_once")         # conftest.py
sys.path.insert(0, str(ROOT / "benchmarks"))
import evidence  # noqa: E402
import figures  # noqa: E402
import judge  # noqa: E402


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Drawn shapes, 1,440 for training and 400 for testing, and a classifier that is trained for twenty steps."""
    load, train = datasets.load, judge.train
    monkeypatch.setattr(datasets, "load", lambda name, data_dir=None, size=None, split="train", **kw: load(
        name, data_dir, size, split, **kw).subset(range(1440 if split == "train" else 400)))
    monkeypatch.setattr(judge, "train", lambda dataset, photographs: train(dataset, photographs, 20, 32))
    monkeypatch.setattr(judge, "ASSETS", tmp_path)


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


def test_the_judge_on_cases_with_known_answers(small, monkeypatch):
    j = judge.Judge("shapes")
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
    assert len({*j.draws(40, 3)}) == 3                          # and each draw has other images
    monkeypatch.setattr(judge, "train", lambda *args: pytest.fail("trained twice"))
    assert torch.equal(judge.Judge("shapes").real, j.real)


def test_the_judge_reads_folders(small, tmp_path, capsys):
    x, folder = datasets.load("shapes")[range(24)]["x"].permute(0, 2, 3, 1).numpy(), tmp_path / "pngs"
    for i, image in enumerate(x):
        for where, shown in ((folder, image), (tmp_path / "gray", image[..., :1])):
            where.mkdir(exist_ok=True)
            to_pil(shown).save(where / f"{i:06d}.png")
    j = judge.Judge("shapes")
    r = j(torch.from_numpy(x).permute(0, 3, 1, 2), torch.arange(24) % 8)
    judge.main([str(folder), "--data", "shapes"])
    line = capsys.readouterr().out.splitlines()[-1].split()[1:]
    assert line[:3] == ["24", f"{r['recognised']:.1%}", f"{r['distance']:.4g}"]
    shutil.copytree(folder, tmp_path / "few", ignore=lambda _, names: sorted(names)[3:])
    shutil.copytree(tmp_path / "few", tmp_path / "both")
    shutil.copy(tmp_path / "gray" / "000000.png", tmp_path / "both" / "gray.png")
    for flags, says in (([str(tmp_path / "nowhere")], "no .png"), ([str(tmp_path / "gray")], "(1, 32, 32)"),
                        ([str(tmp_path / "both")], "several shapes"),
                        ([str(tmp_path / "few")], "needs 4 to "),
                        (["--data", "moving"], "needs pictures with classes")):
        with pytest.raises(SystemExit) as e:
            judge.main(["--data", "shapes", *flags])
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


TINY = "--model dis --set width=16 depth=2 --global-batch-size 32 --lr 2e-3"
SMALL_MDM = "--model mdm --set channels=[8,16] outer=[{'channels':[8,8],'blocks':[1,1]}]"


def speeds(folder, *flags):
    """Say that each trains 16 images/s: a minute has 30 steps."""
    evidence.write_rows(folder / "shapes-speed.csv", [
        {"flags": f, "made_of": evidence.settings("shapes", f), "images_per_s": 16.0} for f in flags])


def test_a_study_from_training_to_tables(small, tmp_path, monkeypatch, capsys):
    """Two arms of 0.2 minutes = 6 steps; the first is judged after 2 and 6 of them, with two scales of guidance."""
    monkeypatch.setitem(evidence.STUDIES, "small", evidence.Study("A small study", {
        "DiS": [TINY]}, 0.2, (1/3, 1), 40, 2, (1, 2), evidence.LEVELS))
    monkeypatch.setitem(evidence.STUDIES, "stages", evidence.Study("Stages", {
        "half first": [f"{SMALL_MDM} --image-size 16", SMALL_MDM]}, 0.3, (0.1, 1), 40, 2))
    common = ["--data", "shapes", "--results-dir", str(tmp_path / "runs"), "--out", str(tmp_path)]
    (tmp_path / "runs").mkdir()
    args = argparse.Namespace(data="shapes", data_dir=None, results_dir=tmp_path / "runs", out=tmp_path, seeds=[0, 1])
    evidence.judge_itself(args)
    with pytest.raises(SystemExit):
        evidence.main(["small", *common, "--run", "DiS", "0"])
    assert "evidence.py small --speed --missing --data shapes" in capsys.readouterr().err
    speeds(tmp_path, TINY, SMALL_MDM, f"{SMALL_MDM} --image-size 16")
    draw, drawn = evidence.sample.generate, []

    def generate(*args, **options):
        drawn.append((args[3][1].item(), args[4]["y"].bincount().tolist(), options["steps"], options["cfg_scale"],
                      args[1].cfg_below))
        return draw(*args, **options)
    monkeypatch.setattr(evidence.sample, "generate", generate)
    evidence.main(["small", *common, "--run", "DiS", "0"])
    assert drawn == [(10**6 + 1, [5] * 8, "2", cfg, 0.7) for cfg in (1, 2, 1, 2)]
    evidence.main(["stages", *common, "--run", "half first", "0"])
    path = tmp_path / "runs/shapes-small-dis-0.csv"
    rows = evidence.read_rows(path)
    assert [(r["step"], r["images"], r["cfg"], round(r["minutes"], 3)) for r in rows] == [
        (2, 64, 1, 0.067), (2, 64, 2, 0.067), (6, 192, 1, 0.2), (6, 192, 2, 0.2)]
    assert rows[0]["error_1"] > rows[2]["error_1"] > 0
    rates = evidence.read_rows(path.with_suffix("") / "log.csv")
    assert rates[-1]["step"] == 6 and rates[-1]["lr"] == 2e-3 * 6 / 100         # constant, after the warm-up
    staged = evidence.read_rows(tmp_path / "runs/shapes-stages-half-first-0.csv")
    assert [(r["step"], r["images"]) for r in staged] == [(7, 8 * 32)]          # 0.2 of 9 steps at half size, then 0.8
    begun = checkpoint.read(tmp_path / "runs/shapes-stages-half-first-0/latest.pt")["args"]["init_inner"]
    assert begun.endswith("shapes-stages-half-first-0.stage1")
    older = torch.load(begun + "/latest.pt", weights_only=True)
    torch.save({**older, "args": {**older["args"], "max_steps": 5}}, begun + "/latest.pt")
    (tmp_path / "runs/shapes-stages-half-first-0.csv").rename(tmp_path / "scores")
    with pytest.raises(SystemExit):                                     # annealed over other steps than these
        evidence.main(["stages", *common, "--run", "half first", "0"])
    assert "is a run of 5 steps, and now 1 are equal time" in capsys.readouterr().err
    (tmp_path / "scores").rename(tmp_path / "runs/shapes-stages-half-first-0.csv")

    evidence.main(["small", *common, "--run", "DiS", "0"])              # all is done already: nothing happens
    assert capsys.readouterr().out == "" and evidence.read_rows(path) == rows
    evidence.write_rows(path, rows[:3])                                 # only what is missing is done
    evidence.main(["small", *common, "--run", "DiS", "0"])
    assert evidence.read_rows(path) == rows
    evidence.write_rows(path, rows[2:])                                 # the run has passed step 2
    with pytest.raises(SystemExit):
        evidence.main(["small", *common, "--run", "DiS", "0"])
    assert evidence.read_rows(path) == rows[2:]
    evidence.write_rows(path, rows)
    evidence.gather(args, "small")                                      # seed 1 was not run
    path.rename(tmp_path / "elsewhere")                                 # what another machine ran stays
    evidence.gather(argparse.Namespace(**vars(args) | {"seeds": [1]}), "small")
    assert evidence.read_rows(tmp_path / "shapes-small.csv") == rows
    evidence.write_rows(path, rows[:2])                                 # so do its scores if one here was stopped
    evidence.gather(args, "small")
    assert evidence.read_rows(tmp_path / "shapes-small.csv") == rows
    path.unlink()
    started = []
    monkeypatch.setattr(subprocess, "run", lambda command, **kw: (
        started.append(command[2:6]), subprocess.CompletedProcess(command, 0))[1])
    with pytest.raises(SystemExit):
        evidence.main(["small", *common, "--missing", "--seeds", "0", "1"])
    assert started == [["small", "--run", "DiS", "1"]]
    evidence.gather(args, "stages")
    figures.main(["shapes-judge", "shapes-small", "shapes-stages", "--folder", str(tmp_path)])
    tables = capsys.readouterr().out
    for text in ("| real images |", "| DiS | 1 | ", "| 16 | 192 |", "--max-steps 6 --lr-schedule",
                 "--image-size 16 --data shapes --max-steps 1 --lr-schedule constant`, then with --init-inner `tr",
                 "guidance 2: distance / 40 real"):
        assert text in tables, text
    assert (tmp_path / "shapes-small.png").exists() == bool(figures.Figure)
    speeds(tmp_path, TINY.replace("2e-3", "1e-3"))                      # a flag of the study has changed
    monkeypatch.setitem(evidence.STUDIES["small"].arms, "DiS", [TINY.replace("2e-3", "1e-3")])
    assert evidence.Run(args, "small", "DiS", 0).rows(tmp_path / "shapes-small.csv") == []


def test_tables_have_means_and_ranges_at_the_last_place():
    rows = [{"arm": "a", "seed": seed, "step": step, "cfg": 1, "n": 500, "parameters": 1000, "macs": 2e6,
             "minutes": step, "images": 600 * step, "recognised": 0.5, "x_real": x, "precision": 0, "recall": 1}
            for seed, step, x in ((0, 1, 99), (0, 2, 4), (1, 1, 99), (1, 2, 6))]
    assert figures.table(rows).splitlines()[2] == (
        "| a | 2 | 1,000 | 2M | 10 | 1,200 | 50.0% (50.0% to 50.0%) | 5 (4 to 6) | 0.00 (0.00 to 0.00) | "
        "1.00 (1.00 to 1.00) |")
    assert figures.table(rows, photographs=True).splitlines()[2].endswith("| 5 (4 to 6) | 1.00 (1.00 to 1.00) |")
    half = rows + [dict(rows[-1], arm="b", cfg=cfg) for cfg in (1, 2)]       # of `a` guidance 2 is not judged yet
    assert figures.table(half, photographs=True).splitlines()[2].endswith(" (1.00 to 1.00) |  |  |")
    assert [figures.number(x) for x in (10529, 1.3845, 0.0012345)] == ["10,529", "1.38", "0.00123"]


def test_each_run_is_a_process_and_failures_are_told(tmp_path, monkeypatch, capsys):
    calls = []

    def run(command, env, **kwargs):
        calls.append((command[2:6], env["OMP_NUM_THREADS"]))
        return subprocess.CompletedProcess(command, -9 if "no skips, norms" in command else 0)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(evidence, "judge_itself", lambda args: None)
    flags = [f for study in evidence.STUDIES.values() for arm in study.arms.values() for f in arm]
    evidence.write_rows(tmp_path / "mnist-speed.csv", [
        {"flags": f, "made_of": evidence.settings("mnist", f), "images_per_s": 100.0} for f in flags])
    common = ["--results-dir", str(tmp_path), "--out", str(tmp_path), "--jobs", "1"]
    for study, code in (("dis-parts", 1), ("mdm", 0)):
        with pytest.raises(SystemExit) as e:
            evidence.main([study, *common])
        assert e.value.code == code
    assert len(calls) == 3 * 4 + 3 * 4 and calls[0] == (["dis-parts", "--run", "skips joined, norms", "0"], "1")
    assert capsys.readouterr().out.count("stopped or failed") == 3
    with pytest.raises(SystemExit) as e:
        evidence.main(["skips", *common])
    assert e.value.code == 2
    args = argparse.Namespace(data="mnist", results_dir="", out=tmp_path)
    runs = [evidence.Run(args, name, arm, 0) for name, study in evidence.STUDIES.items() for arm in study.arms]
    assert len({run.path for run in runs}) == len(runs)
    assert runs[0].stages == [(evidence.DIS, {11200: 60})]              # an hour of 100 images/s, to three digits


def test_speeds_are_of_each_in_turn(small, tmp_path, monkeypatch):
    tiny, args = TINY.replace("32", "4"), argparse.Namespace(data="shapes", data_dir=None, out=tmp_path)
    arms = {"one": [tiny], "two": [tiny, f"{tiny} --warmup-steps 9"]}
    monkeypatch.setattr(evidence, "STUDIES", {"s": evidence.Study("", arms)})
    threads, path = torch.get_num_threads(), tmp_path / "shapes-speed.csv"
    evidence.speed(argparse.Namespace(**vars(args), missing=False), ["s"], turns=1)
    rows = evidence.read_rows(path)
    assert [r["flags"] for r in rows] == [tiny, f"{tiny} --warmup-steps 9"] and all(r["images_per_s"] > 0 for r in rows)
    evidence.write_rows(path, [rows[0] | {"images_per_s": 7.0}, rows[1] | {"images_per_s": 7.0, "made_of": 7}])
    evidence.speed(argparse.Namespace(**vars(args), missing=True), ["s"], turns=1)      # a preset has changed
    torch.set_num_threads(threads)
    again = evidence.read_rows(path)
    assert again[0]["images_per_s"] == 7 != again[1]["images_per_s"] and again[1]["made_of"] == rows[1]["made_of"]


# --- the page ---

PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_the_tables_of_the_pages_are_what_was_measured(tmp_path, monkeypatch, capsys):
    """figures.py writes the pages as they are: each table and each command, from the scores in assets/evidence."""
    monkeypatch.setattr(figures, "Figure", None)            # or it would draw the figures again
    texts, copies = [page.read_text("utf8") for page in PAGES], [tmp_path / page.name for page in PAGES]
    assert sum(text.count("<!-- end -->") for text in texts) >= 3
    for copy, text in zip(copies, texts):
        copy.write_text(re.sub(r"(<!-- \S+-\S+ -->\n).*?(<!-- end -->)", r"\1\2", text, flags=re.S), "utf8")
    figures.main(["--into", *map(str, copies)])
    assert [copy.read_text("utf8") for copy in copies] == texts


def test_words_stay_and_a_table_needs_its_place():
    page = "before\n<!-- a-b -->\nold\n<!-- end -->\nafter\n<!-- a-c -->\n<!-- end -->\n"
    done, other = figures.put([page, "other"], "a-c", "new 1\\1")
    assert done == page[:-len("<!-- end -->\n")] + "\nnew 1\\1\n\n<!-- end -->\n" and other == "other"
    assert figures.put(figures.put([done], "a-b", "x"), "a-b", "y")[0].count("<!-- end -->") == 2
    with pytest.raises(UserError, match="no page has a place for a-d"):
        figures.put([page, "other"], "a-d", "")


def test_distances_are_on_the_scale_that_the_page_says():
    """1,000 real images are at distance 8.9 from the test set of MNIST, 500 at 16.6. Only `minutes` judges 1,000."""
    text = " ".join((ROOT / "docs/results.md").read_text("utf8").split())
    assert "1,000 real images are at distance 8.9, 500 real images at 16.6" in text
    for path in (ROOT / "assets/evidence").glob("mnist-*.csv"):
        for r in evidence.read_rows(path):
            if "x_real" in r:
                assert r["n"] == (1000 if path.stem in ("mnist-minutes", "mnist-judge") else 500)
                assert r["distance"] / r["x_real"] == pytest.approx({1000: 8.9, 500: 16.6}[r["n"]], rel=3e-3)
