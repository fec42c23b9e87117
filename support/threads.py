"""Threads for the machine that we are on. `import support` comes before `import torch`, because the libraries that
start torch's threads read their environment once, when they are loaded.

How many? torch takes one for each core that it sees. In a container with a CPU quota it sees all cores of the host, and
started by Slurm or the like, each process sees all of them. Then we set OMP_NUM_THREADS, unless it is set. The
number depends on the machine, never on its load: sums depend on it in their last bits, and a run must resume exactly.

How do they wait? An operation takes less than a millisecond, and after each the threads wait for one another. On an
idle machine it is fastest to wait awake. But beside other busy programs, a thread that waits awake keeps its core from
the thread that it waits for. We saw a step take 5 seconds instead of 0.2. So the threads must wait awake on an idle
machine, and sleep on a busy one. No number changes by that. `follow` does it on Linux; elsewhere, KMP_BLOCKTIME.
Processes wait for one another only once a step: so train.py starts several (`share_cores` in parallel.py). `follow`
still matters to sample.py, and where a process has several threads.
"""
import contextlib
import glob
import math
import os
import threading
import time
from pathlib import Path


def cpu_groups(root="/"):
    """-> the folders of the cgroups that limit this process's CPU time: its own, and those around it. root: for
    tests."""
    def text(name):
        return Path(root, name).read_text("utf8", "replace")    # a mount may have any bytes in its name
    try:
        groups = [line.split(":", 2) for line in text("proc/self/cgroup").splitlines()]
        mounts = [line.split() for line in text("proc/self/mountinfo").splitlines()]
    except OSError:                                             # not Linux
        return
    for mount in mounts:
        top, place, kind, flags = mount[3], Path(root, mount[4][1:]), mount[mount.index("-") + 1], mount[-1].split(",")
        for _, controllers, path in groups:
            if (kind == "cgroup2" and not controllers                                           # version 2
                    or kind == "cgroup" and "cpu" in flags and "cpu" in controllers.split(",")):    # version 1
                # A container may see only its own part of the tree: `top` is mounted at `place`.
                own = place / (path[len(top):] if path.startswith(top) else "").strip("/")
                yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(place))


def quota(root="/"):
    """-> how many cores the quotas of these cgroups allow; inf: no limit."""
    return min((limit(folder) for folder in cpu_groups(root)), default=math.inf)


def limit(folder):
    """The quota of one cgroup, in cores: cpu.max of version 2, or two files of version 1."""
    for names in ["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]:
        with contextlib.suppress(OSError, ValueError):
            most, period = " ".join((folder / name).read_text() for name in names).split()
            return math.inf if most in ("max", "-1") else int(most) / int(period)
    return math.inf


def cores(root="/"):
    """-> how many cores this process may use. Two hardware threads of a core count once, as torch counts them."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    found = set()
    for cpu in os.sched_getaffinity(0):
        try:
            found.add(Path(root, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            found.add(cpu)
    return len(found)


def choose(env, root="/"):
    """Set in the environment `env` what the user has not set there."""
    env.setdefault("KMP_BLOCKTIME", "1")        # ms awake, for the OpenMP of macOS and Windows; it would be 200
    processes = env.get("LOCAL_WORLD_SIZE", "")                         # of torchrun, on this machine
    most = max(1, int(min(cores(root), quota(root))) // max(1, int(processes) if processes.isdigit() else 1))
    if most < cores(root) and "MKL_NUM_THREADS" not in env:
        env.setdefault("OMP_NUM_THREADS", str(most))


# by the user, or for one of several processes
SET = not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}.isdisjoint(os.environ)
choose(os.environ)


# --- waiting on Linux -------------------------------------------------------------------------------------------

NUMBER = None                                   # of torch's threads, if it has changed since the start


def use(n):
    """From now on, torch uses n threads."""
    global NUMBER
    import torch
    torch.set_num_threads(n)
    NUMBER = n


def waited():
    """Seconds that threads of this process could have run while something else had the core, summed over threads. None
    if this system does not say."""
    total = None
    for name in glob.glob("/proc/self/task/*/schedstat"):
        with contextlib.suppress(OSError):      # a thread that has just ended
            total = (total or 0) + int(Path(name).read_text().split()[1]) * 1e-9
    return total


class Crowd:
    """While it exists, torch's threads fall asleep almost at once instead of waiting awake for milliseconds.

    That is a rule of libgomp, the OpenMP library of torch on Linux: a thread waits awake for only 100 rounds if the
    process has more OpenMP threads than cores (see GOMP_SPINCOUNT in its manual). So we keep threads that do nothing:
    any thread that runs a parallel operation gets a team of its own, and keeps it as long as it lives."""

    def __init__(self):
        import torch                            # loaded long ago; this file itself must not load it
        n, self.end = NUMBER or torch.get_num_threads(), threading.Event()
        missing = len(os.sched_getaffinity(0)) - n + 1                  # threads, to be more than cores
        for _ in range(math.ceil(missing / (n - 1)) if n > 1 else 0):
            threading.Thread(target=self.idle, args=(torch,), daemon=True).start()

    def idle(self, torch):
        torch.empty(2**16).fill_(0.0)           # two of torch's smallest portions: parallel
        self.end.wait()

    def leave(self):
        self.end.set()


def follow(period=0.5):
    """Every half second: do others want our cores? Then a Crowd comes, and leaves when they no longer do."""
    crowd, size, before = None, None, waited()
    while before is not None:
        time.sleep(period)
        now = waited()
        share, before = (now - before) / period, now        # of the time, summed over threads; a busy program: about 1
        if crowd and (share < 0.05 or share > 0.2 and size != NUMBER):
            crowd = crowd.leave()                           # None
        if share > 0.2 and not crowd:
            crowd, size = Crowd(), NUMBER


def watch():
    """What a command does first. If the user has said how to wait, we leave it so."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        threading.Thread(target=follow, daemon=True).start()
