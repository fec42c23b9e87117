"""Every way to start a program works, although `import torch` needs Python's own `dis` and our file has its name."""
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# both modules called dis at once: ours by name, Python's by function
BOTH = """
from dis import DiS, dis as disassemble
import torch, inspect
assert DiS.__name__ == "DiS" and inspect.isfunction(disassemble)
print(sum(p.numel() for p in DiS((1, 8, 8), width=32, depth=2).parameters()), "parameters")
"""
# in a notebook Python's dis is loaded long before ours
NOTEBOOK = """
import dis, torch, sys
sys.path.insert(0, "ROOT")
from support.checkpoint import load_paper
assert dis.dis and load_paper("dis").DiS.__name__ == "DiS"
print(sum(p.numel() for p in load_paper("dis").DiS((1, 8, 8), width=32, depth=2).parameters()), "parameters")
"""
SPAWN = """
import torch
from support import datasets as data
from torch.utils.data import DataLoader
if __name__ == "__main__":
    loader = DataLoader(data.load("shapes", image_size=16), batch_size=None, sampler=[[0, 1], [2]],
                        num_workers=1, multiprocessing_context="spawn")
    print([len(b["x"]) for b in loader])
"""
TRAIN = ["--image-size", "16", "--set", "width=32", "depth=2", "state=4", "--global-batch-size", "8",
         "--sample-every", "0", "--device", "cpu", "--results-dir", "RESULTS"]
STEPS = [*TRAIN, "--max-steps", "2"]
SAMPLE = ["--ckpt", "CKPT", "--num-samples", "1", "--steps", "1", "--device", "cpu", "--out", "RESULTS/a.png"]
SAFE = {"PYTHONSAFEPATH": "1"}                  # from Python 3.11 on; earlier ones ignore it. `python -I` includes it.

# name: command, what it must say, settings of the environment. ROOT is a copy of the repository. All commands start in
# it, except those "elsewhere": they start in an empty folder.
LAUNCHES = {
    "torchrun": (["torchrun", "--standalone", "--nproc_per_node=2", "train.py", *STEPS], "trained     2 of", {}),
    "smoke": (["python", "train.py", "--smoke", *TRAIN], "samples/step_0000002.png", {}),
    "table": (["python", "dis.py"], "mini, MNIST   10 classes", {}),
    "train": (["python", "train.py", *STEPS], "trained     2 of 2", {}),
    "train elsewhere": (["python", "ROOT/train.py", *STEPS], "trained     2 of 2", {}),
    "train, safe path": (["python", "train.py", *STEPS], "trained     2 of 2", SAFE),
    "sample, safe path": (["python", "sample.py", *SAMPLE], "1 images from", SAFE),
    "sample, isolated, elsewhere": (["python", "-I", "ROOT/sample.py", *SAMPLE], "1 images from", {}),
    "notebook elsewhere": (["python", "-c", NOTEBOOK], "parameters", {}),
    "import torch": (["python", "-c", "import torch; print(torch.ones(2).sum())"], "tensor(2.)", {}),
    "import DiS": (["python", "-c", BOTH], "parameters", {}),
    "script beside it": (["python", "users_script.py"], "parameters", {}),
    "spawned worker": (["python", "spawn.py"], "[2, 1]", {}),
    "pytest": (["pytest", "--collect-only", "-q", "tests/test_dis.py"], "test_scan", {}),
    "python -m pytest": (["python", "-m", "pytest", "--collect-only", "-q", "tests"], "test_scan", {}),
    "python -m dis": (["python", "-m", "dis", "users_script.py"], "LOAD_", {})}


def launch(name, root, folder):
    command, _, settings = LAUNCHES[name]
    for word, path in (("ROOT", root), ("RESULTS", folder), ("CKPT", ROOT / "assets/dis-mnist.pt")):
        command = [part.replace(word, str(path)) for part in command]
    program = str(Path(sys.executable).parent / command[0])
    env = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
    env.pop("PYTHONDONTWRITEBYTECODE", None)            # what one launch compiles, the next need not
    return subprocess.run([program, *command[1:]], cwd=folder if "elsewhere" in name else root, timeout=200,
                          capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """All launches, two at a time: most of a launch is `import torch`, on one core."""
    root = tmp_path_factory.mktemp("copy")
    for file in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(file, root)
    for folder in ("support", "benchmarks"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tests").mkdir()
    shutil.copy(ROOT / "tests/test_dis.py", root / "tests")
    table = root / "benchmarks/tables.py"               # of one size; test_dis.py has the numbers of all
    table.write_text(re.sub(r"^DIS = .*", 'DIS = {"H": (900.6, 14.79)}', table.read_text(), flags=re.M))
    (root / "users_script.py").write_text(BOTH)
    (root / "spawn.py").write_text(SPAWN)
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(launch, name, root, tmp_path_factory.mktemp("launch")) for name in LAUNCHES}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launch_matrix(launched, name):
    """`python -m torch.distributed.run` has tests of its own."""
    done = launched[name].result()
    assert done.returncode == 0, done.stderr
    assert LAUNCHES[name][1] in done.stdout + done.stderr
