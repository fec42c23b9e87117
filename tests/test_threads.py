"""How many threads torch starts, and how they wait (support/threads.py)."""
import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from support import cli, parallel, threads

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
        assert re.search("^(import support |from timing )", text.partition("\nimport torch")[0], re.M), name


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
    until there are almost none. Another one comes if torch uses more threads than before."""
    said, seconds = [], iter([0.0, 0.1, 0.6, 0.7, 1.7, 1.71, 1.72, 2.72, 3.72, 4.72, None])
    monkeypatch.setattr(threads, "waited", lambda: next(seconds))

    def sleep(period):
        said.append("-")
        if said.count("-") == 9:
            monkeypatch.setattr(threads, "NUMBER", 7)
    monkeypatch.setattr(time, "sleep", sleep)

    class Crowd:
        def __init__(self):
            said.append("comes")

        def leave(self):
            said.append("leaves")
    monkeypatch.setattr(threads, "Crowd", Crowd)
    with pytest.raises(TypeError):                          # where the numbers end
        threads.follow(period=1)
    assert "".join(said) == "--comes---leaves--comes--leavescomes-"


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


# --- a process for each core ------------------------------------------------------------------------------------

CORES = min(threads.cores(), threads.quota(), 4)
cores = pytest.mark.skipif(sys.platform != "linux" or CORES < 2, reason="two cores, Linux")
SMALL = ["--image-size", "16", "--set", "width=32", "depth=2", "state=4", "--sample-every", "0", "--device", "cpu"]


def typed(folder, *flags):
    """train.py as somebody types it who has not set OMP_NUM_THREADS."""
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    return subprocess.Popen([sys.executable, "train.py", *SMALL, "--results-dir", folder, *flags], cwd=ROOT, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def helpers(process):
    """The numbers of the processes that train.py has started."""
    return [int(n) for n in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux")
@pytest.mark.parametrize("flags, env, cores, world, each", [
    ([], {}, 2, 2, 1), ([], {}, 8, 4, 2), ([], {}, 6, 2, 3), ([], {}, 3, 1, 3),
    (["--grad-accum", "5"], {}, 2, 1, 2), (["--global-batch-size", "12"], {}, 3, 3, 1),
    (["--global-batch-size", "12", "--grad-accum", "4"], {}, 3, 3, 1), (["--global-batch-size", "7"], {}, 4, 1, 4),
    ([], {}, 1, 1, 1), ([], {"WORLD_SIZE": "2", "RANK": "1"}, 2, 1, 2), ([], {"SET": True}, 2, 1, 2),
    (["--shard"], {}, 2, 1, 2), (["--model", "examples/mypaper.py"], {}, 2, 1, 2),
    (["--text-encoder", "google/flan-t5-xl"], {}, 2, 1, 2), ([], {"BY": "-m pdb"}, 2, 1, 2),
    ([], {"BY": "-mpdb"}, 2, 1, 2),
    (["--max-steps", "5"], {"BY": "bin/coverage run"}, 2, 1, 2)])
def test_how_many_processes(flags, env, cores, world, each, monkeypatch):
    started, now = [], [cores]
    monkeypatch.setattr(threads, "SET", env.pop("SET", False))
    monkeypatch.setattr(threads, "use", lambda n: now.append(n))
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(parallel, "HELPERS", [])
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    monkeypatch.setattr(sys, "orig_argv", ["python", *env.pop("BY", "-u").split(), "train.py", *flags])
    monkeypatch.setattr(parallel, "watch", lambda helper: None)
    monkeypatch.setattr(parallel.subprocess, "Popen", lambda command, env, **_: started.append(env))
    monkeypatch.setattr(os, "environ", {**os.environ, **env})
    parallel.share_cores(train.parse(["--device", "cpu", *flags]))
    assert len(started) == world - 1 and now[-1] == each
    assert [(e["RANK"], e["WORLD_SIZE"], e["OMP_NUM_THREADS"]) for e in started] == [
        (str(r), str(world), str(each)) for r in range(1, world)]


def test_all_cores_while_the_helpers_wait(monkeypatch):
    """And again its own threads alone, even if drawing fails."""
    used = []
    monkeypatch.setattr(threads, "use", used.append)
    monkeypatch.setattr(parallel, "HELPERS", ["one"])
    monkeypatch.setattr(parallel.share_cores, "all", 7, raising=False)
    with pytest.raises(OSError), parallel.all_cores():
        raise OSError
    assert used == [7, torch.get_num_threads()]


@cores
def test_train_starts_a_process_for_each_core(tmp_path):
    """Its losses are those of one process."""
    flags = ["--max-steps", "3", "--log-every", "1", "--global-batch-size", "12", "--set", "t_normal=None"]
    process = typed(tmp_path / "many", *flags)
    said = process.communicate()
    assert process.returncode == 0, said
    n = int(CORES)
    assert f", {n} processes, each with threads {threads.cores() // n} of" in said[0]
    assert "longer      python train.py" in said[0]                     # not torchrun
    train.main([*SMALL, "--results-dir", str(tmp_path / "one"), *flags])
    one, many = (np.loadtxt(next(tmp_path.glob(f"{name}/*/log.csv")), delimiter=",", skiprows=1)[:, :8]
                 for name in ("one", "many"))
    np.testing.assert_allclose(many, one, rtol=1e-4)


@cores
def test_no_helper_is_waited_for_in_vain_or_left_behind(tmp_path):
    """A helper that dies ends the run, also before the processes have met; the end of train.py ends its helpers."""
    dies, stops = (typed(tmp_path / name, "--max-steps", "100000", "--log-every", "1") for name in ("dies", "stops"))
    while not (of_dies := helpers(dies)) or not (of_stops := helpers(stops)):
        time.sleep(0.05)
    os.kill(of_dies[0], signal.SIGKILL)
    while not any(len(log.read_text().splitlines()) > 2 for log in tmp_path.glob("stops/*/log.csv")):
        time.sleep(0.05)
    stops.terminate()
    said = stops.communicate(timeout=60)
    assert stops.returncode == 0 and ", saved." in said[0], said
    said = dies.communicate(timeout=60)
    assert dies.returncode == 1 and "has ended (code -9)" in said[1], said
    for pid in (*of_dies, *of_stops):
        with contextlib.suppress(OSError):      # it is gone, or nobody has asked yet how it ended
            assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
