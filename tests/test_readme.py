"""What README.md and docs/ say: files that exist, commands that start, pictures that the weights draw."""
import inspect
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support import checkpoint
from support import datasets
from support import cost
import sample
import train
from support.checkpoint import load_paper
from support.log import TOO_SMALL

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("counted_once")         # conftest.py
sys.path.insert(0, str(ROOT / "benchmarks"))
import evidence  # noqa: E402
import figures  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WEIGHTS = sorted(p.stem for p in (ROOT / "assets").glob("*-mnist.pt"))


def commands(page):
    """What bash would start, as lists of words: its variables are put in, and python only says what it was
    told. (`python3`, which begins the installations, fails, so that these stop.)"""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
    said = 'python() { printf "%q " python "$@"; echo; }; torchrun() { python "$@"; }; python3() { false; }\n'
    done = subprocess.run(["bash", "-c", said + "\n".join(blocks)], capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_the_first_screen():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 220
    assert any("<img" in line or line.startswith("![") for line in lines[:5])
    assert {"&& python train.py", "&& python -m pytest"} <= {
        line[line.rindex("&&"):] for line in lines[:22] if "&&" in line}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_is_linked_exists(page):
    text = page.read_text()
    for link in re.findall(r'\]\(([^)#]+)|src="([^"]+)"', text):
        link = link[0] or link[1]
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_files_and_their_lines():
    rows = re.findall(r"^\| \[`([^`]+)`\]\(\1\) \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert {name for name, _ in rows} >= {p.name for p in ROOT.glob("*.py")}
    for name, lines in rows:
        assert len((ROOT / name).read_text().splitlines()) == int(lines), name


def test_the_table_is_what_was_measured():
    """The README's fair table: means over the seeds in assets/evidence, of distances also the range."""
    text, arms = (ROOT / "README.md").read_text(), {}
    for r in evidence.read_rows(ROOT / "assets/evidence/mnist-minutes.csv"):
        arms.setdefault(r["arm"], {}).setdefault(r["cfg"], []).append(r)
    assert set(arms) <= set(evidence.STUDIES["minutes"].arms) and len(arms) >= 4
    for arm, of in arms.items():
        def mean(key, cfg=1):
            return statistics.mean(r[key] for r in of[cfg])
        line = [arm, f"{mean('parameters'):,.0f}", f"{mean('macs') / 1e6:.0f}M",
                f"{mean('images') / mean('minutes') / 60:.0f}", f"{mean('images'):,.0f}",
                *(figures.spread([r[key] for r in of[cfg]], f) if key == "x_real" else f(mean(key, cfg))
                  for cfg, keys in ((1, ("recognised", "x_real", "precision", "recall")),
                                    (1.25, ("recognised", "x_real")))
                  for key, f in zip(keys, ("{:.1%}".format, "{:.1f}".format, "{:.2f}".format, "{:.2f}".format)))]
        assert f"| {' | '.join(line)} |" in text, line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_of_train_start(page, tmp_path, monkeypatch, capsys):
    """Each `train.py ...` as typed, with --dry-run, on stand-ins for data that would be downloaded."""
    def load(name, data_dir=None, image_size=None, split="train", text_encoder=None, frames=None):
        if name in ("shapes", "moving"):
            return real_load(name, data_dir, image_size, split, text_encoder, frames)
        shape = {"mnist": (1, 28, 28), "fashion": (1, 28, 28)}.get(name, (3, 32, 32))
        size = datasets.parse_size(image_size) if image_size else shape[1:]
        classes = {} if "/" in str(name) and "imagenet" not in str(name) else dict(
            labels=range(10), class_names=list("0123456789"))
        return datasets.Dataset(name, (shape[0], *size), np.zeros((10, shape[0], *size), np.uint8), 10, **classes)
    real_load = datasets.load
    monkeypatch.setattr(datasets, "load", load)
    monkeypatch.setattr(cost, "table", lambda *args: [{"name": "nothing", "total": 0}])
    monkeypatch.chdir(ROOT)
    count = 0
    for words in commands(page):
        if "train.py" not in words or {"...", "--latents", "--text-encoder"} & set(words):
            continue            # those with latents: test_train.py; with a T5: test_text.py
        flags, count = words[words.index("train.py") + 1:], count + 1
        if "--init-inner" in flags:             # the run that it names is not there
            i = flags.index("--init-inner")
            flags = flags[:i] + flags[i + 2:]
        processes = [w.split("=")[1] for w in words if w.startswith("--nproc_per_node")] or ["1"]
        train.main([*flags, "--dry-run", processes[0], "--results-dir", str(tmp_path)])
        said, args = capsys.readouterr().out, train.parse(flags)
        assert "parameters" in said and ("\nexpect " in said) == ((args.data, args.preset) in TOO_SMALL), words
    assert count >= {"README.md": 7, "mdm.md": 5, "scaling.md": 3}.get(page.name, 0)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_of_sample_work(page, tmp_path, monkeypatch):
    """Each `sample.py ...` is understood; those of the weights that are here draw, in fewer steps
    and with fewer pictures."""
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        if "sample.py" in words:
            flags = words[words.index("sample.py") + 1:]
            if sample.parse(flags).ckpt.startswith("assets"):
                sample.main([*flags, "--steps", "2", "--num-samples", "8", "--out", str(tmp_path / "a.png")])


def test_a_paper_of_your_own(capsys):
    """Trains, goes on, and draws, also without classes."""
    for flags in ([], ["--num-classes", "0"]):
        train.main(["--model", str(ROOT / "examples/mypaper.py"), "--smoke", "--device", "cpu", *flags])
    for flags, needed in ((["--set", "heads=3"], "mypaper has width, depth, patch"),
                          (["--set", "patch=0"], "at least 1"), (["--data", "moving"], "add --frames 1")):
        with pytest.raises(SystemExit):
            train.main(["--model", str(ROOT / "examples/mypaper.py"), "--smoke", "--device", "cpu", *flags])
        assert needed in capsys.readouterr().err


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_draw_the_picture(name, tmp_path):
    """The first of three rows of the picture, drawn by the weights beside it; rounding differs by machine."""
    weights, out = ROOT / "assets" / f"{name}.pt", tmp_path / "few.png"
    assert weights.stat().st_size <= 3e6 and weights.with_suffix(".csv").exists()
    assert checkpoint.read(weights)["args"]["data"] == "mnist"
    sample.main(["--ckpt", str(weights), "--num-samples", "3", "--out", str(out), "--device", "cpu"])
    drawn = np.asarray(Image.open(out)).astype(int)
    there = np.asarray(Image.open(weights.with_suffix(".png"))).astype(int)[:drawn.shape[0], :drawn.shape[1]]
    assert there.shape == drawn.shape and drawn.std() > 50
    assert np.abs(drawn - there).mean() < 4


def test_python_in_the_readme(monkeypatch, tmp_path):
    """The scan that is shown is dis.py's, and what is to be typed into a notebook runs."""
    shown, typed = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    scan = load_paper("dis").selective_scan_ref
    assert shown == re.sub(r' {4}""".*?"""\n', "", inspect.getsource(scan), count=1, flags=re.S)
    monkeypatch.chdir(ROOT)
    names, picture = {}, tmp_path / "fours.png"
    exec(typed.replace("fours.png", picture.as_posix()).replace("y=4", "y=4, steps=5"), names)      # not 50
    assert names["fours"].shape == (8, 1, 28, 28) and names["DiS"].__name__ == "DiS"
    assert Image.open(picture).size == (8 * 60, 60) and np.asarray(Image.open(picture)).std() > 50


def test_reproduce_starts_what_exists(tmp_path):
    """benchmarks/reproduce.sh with a `python` that only takes notes and leaves empty files: each command is
    understood, what is done is not done again, and the README's pictures and weights are written."""
    for folder in ("benchmarks", "assets", "docs"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "benchmarks/reproduce.sh", tmp_path / "benchmarks")
    python = tmp_path / "python"
    python.write_text("""#!/usr/bin/env bash
printf '%q ' "$@" >> notes; echo >> notes
for run in reproduced/runs/{{dis,diffussm,mdm,cunet}-shapes,mdm-cifar10,words,moving} \\
        evidence/mnist-minutes-{dis,diffussm,mdm,cu-net}-0; do
    mkdir -p results/$run; touch results/$run/{log.csv,samples.png} results/{moving-mdm,mdm-fours}.gif
done
for word in "$@"; do case $word in assets/*) touch $word;; esac; done
""")
    python.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["bash", str(tmp_path / "benchmarks/reproduce.sh"), str(tmp_path)]
    counts = []
    for _ in range(2):
        done = subprocess.run(script, env=env, capture_output=True, text=True)
        assert not done.returncode and "all of it is there" in done.stdout, done.stderr
        lines = [shlex.split(line) for line in (tmp_path / "notes").read_text().splitlines()]
        counts.append(len(lines))
    assert counts[0] > 30 and counts[1] - counts[0] == 5    # the studies see for themselves what is done
    for program, *flags in lines:
        if program == "-m":                                 # support.checkpoint
            program, flags = flags[0].replace(".", "/") + ".py", flags[1:]
        assert (ROOT / program).exists(), program
        if program in ("train.py", "sample.py"):
            {"train.py": train, "sample.py": sample}[program].parse(flags)
        if program == "benchmarks/evidence.py":
            assert flags[0].startswith("-") or flags[0] in evidence.STUDIES, flags
    made = {p.name for p in (tmp_path / "assets").iterdir()}
    shown = set(re.findall(r'assets/([\w.-]+\.(?:png|gif|pt))', "".join(p.read_text() for p in PAGES)))
    assert shown - made <= {"mnist-judge.pt"}, shown - made
