"""How many threads torch starts, and how they wait (support/threads.py)."""
import contextlib
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support import cli, threads

ROOT = Path(__file__).resolve().parent.parent
V1 = "30 25 0:27 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "30 25 0:27 {top} /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID = V1 + "31 25 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
TREES = {       # /proc/self/cgroup, the mounts, files below /sys/fs/cgroup, the quota
    "a container, version 2": ("0::/\n", V2.format(top="/"), {"cpu.max": "150000 100000\n"}, 1.5),
    "no limit, version 2": ("0::/\n", V2.format(top="/"), {"cpu.max": "max 100000\n"}, math.inf),
    "the parent's limit": ("0::/job/step\n", V2.format(top="/"), {
        "job/step/cpu.max": "max 100000\n", "job/cpu.max": "200000 100000\n", "other/cpu.max": "1 100\n"}, 2),
    "version 1": ("3:cpuset:/a\n2:cpuacct,cpu:/a\n0::/\n", HYBRID.format(top="/"), {
        "cpu,cpuacct/a/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 3),
    "Docker, version 1: its own part of the tree": ("2:cpu,cpuacct:/docker/1f/a\n", V1.format(top="/docker/1f"), {
        "cpu,cpuacct/a/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"}, 0.5),
    "unreadable": ("0::/\n", V2.format(top="/"), {"cpu.max": "many\n"}, math.inf),
    "not Linux": (None, None, {}, math.inf)}


@pytest.mark.parametrize("name", TREES)
def test_quota_of_a_cgroup(name, tmp_path):
    groups, mounts, files, quota = TREES[name]
    for path, text in {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts,
                       **{f"sys/fs/cgroup/{path}": text for path, text in files.items()}}.items():
        if text:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
    assert threads.quota(tmp_path) == quota


@pytest.mark.parametrize("cores, quota, given, threads_set", [
    (8, math.inf, {}, None), (8, 2.5, {}, "2"), (8, 0.3, {}, "1"), (2, 4, {}, None), (4, 4, {}, None),
    (8, math.inf, {"LOCAL_WORLD_SIZE": "2"}, "4"), (8, 4, {"LOCAL_WORLD_SIZE": "2"}, "2"),
    (2, math.inf, {"LOCAL_WORLD_SIZE": "4"}, "1"), (8, 2, {"OMP_NUM_THREADS": "5"}, "5"),
    (8, 2, {"MKL_NUM_THREADS": "5"}, None)])
def test_number_of_threads(cores, quota, given, threads_set, monkeypatch):
    """Nothing is set where torch does right by itself, or where the user has said how many."""
    monkeypatch.setattr(threads, "cores", lambda root: cores)
    monkeypatch.setattr(threads, "quota", lambda root: quota)
    env = dict(given)
    threads.choose(env)
    assert env == {"KMP_BLOCKTIME": "1", **given, **({"OMP_NUM_THREADS": threads_set} if threads_set else {})}
    env = {"KMP_BLOCKTIME": "7"}
    threads.choose(env)
    assert env["KMP_BLOCKTIME"] == "7"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux")
def test_cores_not_hardware_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 9})
    for cpu, siblings in (0, "0-1"), (1, "0-1"), (2, "2-3"):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings)
    assert threads.cores(tmp_path) == 3


def test_said_before_torch_is_loaded():
    """Scripts that set OMP_NUM_THREADS themselves, for what they start, need nothing. Those of support/ begin with
    support/__init__.py."""
    done = subprocess.run([sys.executable, "-c", "import os, sys, support; print('torch' in sys.modules, os.environ)"],
                          cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.stdout.startswith("False") and "KMP_BLOCKTIME" in done.stdout, done.stderr
    scripts = {p: p.read_text("utf8") for p in [ROOT / "train.py", ROOT / "sample.py", *ROOT.glob("benchmarks/*.py")]}
    scripts = {p.name: text for p, text in scripts.items() if 'if __name__ == "__main__"' in text
               and "\nimport torch" in text and "OMP_NUM_THREADS" not in text}
    assert {"train.py", "sample.py", "step.py"} <= set(scripts)
    for name, text in scripts.items():
        assert "\nimport support " in text.partition("\nimport torch")[0], name


LIBGOMP = any(Path(torch.__file__).parent.glob("lib*/libgomp*"))     # and nobody has told it how to wait
needs_libgomp = pytest.mark.skipif(not LIBGOMP or {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ),
                                   reason="how libgomp waits")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def awake():
    """Milliseconds that torch's other threads compute after an operation, until they sleep."""
    def others(file):
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):              # a thread that has just ended
                if int(task) != os.getpid():
                    yield Path("/proc/self/task", task, file).read_text()

    def used():
        return sum(int(text.split()[0]) for text in others("schedstat")) * 1e-6
    torch.zeros(2**17).fill_(1.0)
    start = used()
    while any(") R " in text for text in others("stat")):
        time.sleep(0.001)
    return used() - start


@needs_libgomp
def test_a_crowd_lets_threads_sleep(two_threads):
    assert any(awake() > 0.5 for _ in range(9))
    crowd = threads.Crowd()
    assert any(awake() < 0.1 for _ in range(99))            # it takes a moment to come
    assert not any(awake() > 0.5 for _ in range(9))
    crowd.leave()
    assert any(awake() > 0.5 for _ in range(99))


def test_a_crowd_comes_and_goes(monkeypatch):
    """Waiting seconds in each period of a second: below a fifth nothing happens, above it a crowd comes, and it stays
    until there are almost none."""
    said, seconds = [], iter([0.0, 0.1, 0.6, 0.7, 1.7, 1.71, 1.72, 2.72, None])
    monkeypatch.setattr(threads, "waited", lambda: next(seconds))
    monkeypatch.setattr(time, "sleep", lambda period: said.append("-"))

    class Crowd:
        def __init__(self):
            said.append("comes")

        def leave(self):
            said.append("leaves")
    monkeypatch.setattr(threads, "Crowd", Crowd)
    with pytest.raises(TypeError):                          # where the numbers end
        threads.follow(period=1)
    assert "".join(said) == "--comes---leaves--comes-"


@pytest.mark.parametrize("given, watched", [({}, True), ({"GOMP_SPINCOUNT": "0"}, False),
                                            ({"OMP_WAIT_POLICY": "passive"}, False)])
def test_every_command_watches(given, watched, monkeypatch):
    """Unless the user has said how threads wait."""
    begun = []
    fake = SimpleNamespace(Thread=lambda target, daemon: SimpleNamespace(start=lambda: begun.append(target)))
    monkeypatch.setattr(threads, "threading", fake)
    for name in "GOMP_SPINCOUNT", "OMP_WAIT_POLICY":
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "end", lambda workers: None)
    for name in "stdout", "stderr":                         # `run` puts others in their place
        monkeypatch.setattr(sys, name, getattr(sys, name))
    with pytest.raises(SystemExit):
        cli.run(lambda: None)
    assert begun == [threads.follow] * watched
