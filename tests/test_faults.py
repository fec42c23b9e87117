"""What can go wrong in training is made to go wrong: bits, disks, processes, clocks. Nothing is lost, nothing runs that
should not, and one sentence says what to do. benchmarks/kill.py sends SIGKILL at random moments."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import ranks
import train
from support import checkpoint, cli, inputs, parallel
from support.fid import fid_samples
from test_train import SMALL, losses, run, same

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("counted_once")         # conftest.py
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
forked = pytest.mark.skipif(sys.platform != "linux", reason="workers are not forked here")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A run of 8 steps with checkpoints at 2, 4, 6, 8, of which the last two are kept."""
    folder = tmp_path_factory.mktemp("good")
    run(folder, "--max-steps", 8, "--ckpt-every", 2, "--log-every", 1)
    return folder


def copy_of(good, tmp_path):
    shutil.copytree(good / "run", tmp_path / "run")
    return tmp_path / "run"


def parts(folder):
    return [p for p in folder.rglob("*") if p.name.endswith(".tmp") or p.name.startswith(".")]


# --- damage ---

def test_every_flipped_bit_is_found_or_harmless(good, tmp_path):
    """PyTorch itself would load most of these, with other weights."""
    whole = checkpoint.read(good / "run" / "latest.pt")
    raw = (good / "run" / "latest.pt").read_bytes()
    draw, found, path = random.Random(0), 0, tmp_path / "flipped.pt"
    for _ in range(150):
        i = draw.randrange(len(raw))
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 1 << draw.randrange(8)]) + raw[i + 1:])
        try:
            assert same(checkpoint.read(path), whole), i          # in the gaps between records
        except ValueError as e:
            found += 1
            assert "damaged" in str(e)
    assert found > 100


def test_every_truncation_is_found(good, tmp_path):
    raw = (good / "run" / "latest.pt").read_bytes()
    for size in (0, 100, len(raw) // 2, len(raw) - 100, len(raw) - 1):
        (tmp_path / "cut.pt").write_bytes(raw[:size])
        with pytest.raises(ValueError, match="damaged or cut short"):
            checkpoint.read(tmp_path / "cut.pt")


def test_a_damaged_newest_checkpoint_costs_steps_not_the_run(good, tmp_path, capsys):
    """latest.pt and the file it names are the same file: both are cut. The run continues from the one before, to the
    same bits."""
    folder = copy_of(good, tmp_path)
    for path in (folder / "latest.pt", folder / "checkpoints" / "0000008.pt"):
        path.unlink(missing_ok=True)
        path.write_bytes((good / "run" / "latest.pt").read_bytes()[:5000])
    again = run(tmp_path, "--max-steps", 8, "--ckpt-every", 2, "--log-every", 1)
    said = capsys.readouterr().out
    assert "damaged" in said and "resumed     at step 6" in said
    assert same(again["model"], checkpoint.read(good / "run" / "latest.pt")["model"])
    assert losses(tmp_path) == losses(good)


def test_a_run_of_which_all_is_damaged_is_left_alone(good, tmp_path, capsys):
    folder = copy_of(good, tmp_path)
    for path in folder.rglob("*.pt"):
        path.unlink()
        path.write_bytes(b"PK\3\4 half a file")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit):
        run(tmp_path, "--max-steps", 8)
    assert "damaged" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_what_a_kill_left_half_written_is_swept_out(good, tmp_path):
    folder = copy_of(good, tmp_path)
    for name in ("latest.pt.tmp", "log.csv.tmp", "checkpoints/0000010.pt.tmp", "samples/.77.step_10.png"):
        (folder / name).write_bytes(b"half")
    other = folder / "of another run" / "latest.pt.tmp"         # which may be writing it just now
    other.parent.mkdir()
    other.write_bytes(b"half")
    with open(folder / "log.csv", "a") as f:
        f.write("9,72,0.1")                                     # half a line
    with open(folder / "log.csv", "ab") as f:
        f.write(b"\0\xb5")                                      # and what a power cut leaves
    (folder / "latest.pt").unlink()                             # killed between the two names
    assert run(tmp_path, "--max-steps", 9, "--log-every", 1)["step"] == 9
    assert parts(folder) == [other] and sorted(losses(tmp_path)) == list(range(1, 10))


# --- the disk ---

def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    for error in (OSError(28, "No space left"), RuntimeError("unexpected pos 64 vs 0"), KeyError("bug")):
        def write(f):
            f.write(b"ne")
            raise error
        with pytest.raises(OSError if isinstance(error, RuntimeError) else type(error)):
            checkpoint.replace(path, write)
        assert path.read_text() == "old" and not parts(tmp_path)


def test_a_checkpoint_that_the_disk_kept_badly_replaces_nothing(tmp_path, monkeypatch):
    """It is read back before older ones are deleted."""
    args, save = SimpleNamespace(global_batch_size=1, keep_ckpts=1), torch.save
    state = {"model": {"w": torch.ones(2000)}, "ema": {}, "opt": {}}
    checkpoint.save(tmp_path, args, 1, state)

    def badly(what, f):
        save(what, f)
        f.seek(f.tell() // 2)
        f.write(b"!")
    monkeypatch.setattr(torch, "save", badly)
    with pytest.raises(OSError, match="step 2 could not be saved"):
        checkpoint.save(tmp_path, args, 2, state)
    assert checkpoint.read(tmp_path / "latest.pt")["step"] == 1
    assert (tmp_path / "checkpoints" / "0000001.pt").exists()


def test_a_new_name_that_fails_once_costs_no_checkpoint(tmp_path, monkeypatch):
    """As on Windows while somebody reads latest.pt: the second try must not write through the second name."""
    put, failed = checkpoint.put, []

    def fails_once(part, path):
        if path.name == "latest.pt" and not failed:
            failed.append(path)
            raise PermissionError
        put(part, path)
    monkeypatch.setattr(checkpoint, "put", fails_once)
    args = SimpleNamespace(global_batch_size=1, keep_ckpts=1)
    checkpoint.save(tmp_path, args, 1, {"model": {"w": torch.ones(2000)}, "ema": {}, "opt": {}})
    for name in "latest.pt", "checkpoints/0000001.pt":
        assert failed and checkpoint.read(tmp_path / name)["model"]["w"].sum() == 2000


def test_no_room_in_memory_is_not_called_damage(good, monkeypatch):
    def load(*args, **kwargs):
        raise RuntimeError("unable to mmap 14 bytes: Cannot allocate memory (12)")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        checkpoint.read(good / "latest.pt")


def test_a_deleted_folder_is_made_again_and_a_log_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch, capsys):
    save, log = checkpoint.save_aside, tmp_path / "run" / "log.csv"

    def meddle(team, folder, args, step, wait, **parts):
        save(team, folder, args, step, wait=True, **parts)
        if step == 1:
            shutil.rmtree(tmp_path)
        if step == 2:
            assert losses(tmp_path).keys() == {2}
            log.unlink()
            log.mkdir()
    monkeypatch.setattr(checkpoint, "save_aside", meddle)
    assert run(tmp_path, "--max-steps", 4, "--ckpt-every", 1)["step"] == 4
    assert capsys.readouterr().out.count("no line in log.csv") == 1


def test_training_goes_on_while_a_checkpoint_is_written(monkeypatch):
    """What is written are the weights of its step. The next one waits for it, and so does whoever leaves with an error;
    a second Ctrl-C does not. If it is lost, the next one tells all processes."""
    net, disk, written = torch.nn.Linear(2, 1), threading.Event(), {}

    def save(folder, args, step, state):
        assert disk.wait(9)
        if step == 3:
            raise OSError("step 3 could not be saved")
        written[step] = state["model"]["weight"].sum().item()

    def begin(step, wait=False):
        torch.nn.init.constant_(net.weight, step)
        checkpoint.save_aside(parallel.Team(torch.device("cpu")), None, None, step, wait=wait, model=net)
    monkeypatch.setattr(checkpoint, "save", save)
    begin(1)
    net.weight.data.zero_()
    with pytest.raises(KeyboardInterrupt), checkpoint.finished():
        raise KeyboardInterrupt
    assert not written and not checkpoint.failed()
    threading.Timer(0.05, disk.set).start()
    with pytest.raises(KeyError), checkpoint.finished():
        raise KeyError
    assert written == {1: 2}
    begin(2, wait=True)
    assert written == {1: 2, 2: 4}
    begin(3)
    checkpoint.WRITING[0].exception()                       # waits
    assert checkpoint.failed()
    with pytest.raises(ValueError, match="step 3 could not"):
        begin(4)
    begin(5, wait=True)
    assert written == {1: 2, 2: 4, 5: 10} and not checkpoint.failed()


def mounts():
    return shutil.which("unshare") and subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0


@pytest.mark.skipif(not mounts(), reason="may not mount a small file system here")
def test_full_disk_ends_all_processes_and_more_room_continues(tmp_path):
    """Two processes on a disk that holds one checkpoint and a half; then one process on a larger disk."""
    whole = run(tmp_path / "whole", "--max-steps", 6, "--ckpt-every", 2, "--log-every", 1)
    size = (tmp_path / "whole" / "run" / "latest.pt").stat().st_size
    disk = tmp_path / "disk"
    disk.mkdir()
    command = " ".join(map(str, ["train.py", *SMALL, "--results-dir", disk, "--name", "run", "--max-steps", 6,
                                 "--ckpt-every", 2, "--log-every", 1]))
    script = f"""mount -t tmpfs -o size={int(1.5 * size)} none {disk}
        {" ".join(TORCHRUN)} {command}; echo "code $?"; find {disk} -type f
        mount -o remount,size=50m {disk}
        {sys.executable} {command} && cp -r {disk}/run {tmp_path}/copy"""
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], cwd=ROOT, capture_output=True, text=True,
                          env=ENV, timeout=200)
    first, second = done.stdout.split("code ")
    assert done.stderr.count("error: step 4 could not be saved") == 1 and "No space left" in done.stderr
    assert not first.count("trained") and not second.startswith("0")
    files = second.split("device")[0]
    assert "0000002.pt" in files and "0000004.pt" not in files and ".tmp" not in files
    assert "resumed     at step 2" in second and "trained     6 of 6" in second, done.stderr
    other = checkpoint.read(tmp_path / "copy" / "latest.pt")
    assert other["step"] == 6
    for k, v in whole["model"].items():
        torch.testing.assert_close(v, other["model"][k], atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
def test_a_quota_is_told_in_one_sentence(tmp_path):
    limit = "import resource as r, train; r.setrlimit(r.RLIMIT_FSIZE, (100_000, 100_000)); train.main()"
    [process] = ranks.start(tmp_path / "said", 1, "-c", limit, *SMALL, "--results-dir", tmp_path, "--name", "run",
                            "--max-steps", "2")
    process.join(200)
    said = (tmp_path / "said" / "0").read_text()
    assert process.exitcode == 2 and "Traceback" not in said, said
    assert said.count("error:") == 1 and "error: step 2 could not be saved" in said
    assert not list((tmp_path / "run").rglob("*.pt")) and not parts(tmp_path)


# --- processes ---

def started(tmp_path, command, *flags, **options):
    """A training process that has logged four steps."""
    flags = [*SMALL, "--results-dir", tmp_path, "--name", "run", "--max-steps", 50000, "--log-every", 1,
             *flags]
    process = subprocess.Popen([*map(str, command), *map(str, flags)], cwd=ROOT, env=ENV, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    log = tmp_path / "run" / "log.csv"
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 5):
        time.sleep(0.01)
    return process


def test_preemption_saves_and_exits_0(tmp_path, capsys):
    """SIGTERM to the whole group, data workers included, as schedulers send it. Until then the folder is locked."""
    process = started(tmp_path, [sys.executable, "train.py"], "--num-workers", 2, start_new_session=True)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path)
    assert stopped.value.code == 2 and "another process is training in" in capsys.readouterr().err
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "The same command continues" in out and "Traceback" not in err
    assert checkpoint.read(tmp_path / "run" / "latest.pt")["step"] == max(losses(tmp_path)) >= 4


def test_an_error_in_training_does_not_leave_workers_to_wait_for(tmp_path):
    """A worker meets a damaged picture. Workers ignore SIGTERM, with which the interpreter would end them."""
    for i in range(4):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:40])
    lazy = "import train; from support import cli, datasets; datasets.IN_MEMORY = 0; cli.run(train.main)"
    done = subprocess.run([sys.executable, "-c", lazy, *SMALL, "--data", tmp_path, "--num-workers", "2",
                           "--results-dir", tmp_path / "results"], cwd=ROOT, capture_output=True, text=True,
                          env=ENV, timeout=60)
    assert done.returncode == 2 and "cannot read" in done.stderr and "2.png (" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_preemption_before_the_first_step_exits_0(tmp_path):
    process = subprocess.Popen([sys.executable, "train.py", *SMALL, "--results-dir", str(tmp_path)], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    process.stdout.readline()                                   # the plan; now weights are made
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err


class Stuck:
    """The first example is there. The second lies where nobody answers: a pipe."""

    def __init__(self):
        self.answer, self.write = os.pipe()

    def __getitem__(self, indices):
        return {"x": torch.zeros(1) if indices == [0] else os.read(self.answer, 1)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_at_once(capfd, number):
    stop, before = parallel.Interruption(), signal.signal(number, signal.SIG_DFL)       # nohup and & ignore SIGINT
    stop.next(iter("ab"))
    for _ in range(2 - (number == signal.SIGINT)):              # a second Ctrl-C would end this process
        signal.raise_signal(number)
    stop.over()
    signal.signal(number, before)
    said = capfd.readouterr().err
    assert said.count("finishing this step, then saving") == 1
    assert ("Ctrl-C again: quit without saving" in said) == (number == signal.SIGINT)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGHUP")
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=forked)])
def test_a_signal_is_heard_while_data_do_not_come(workers):
    """Not before the first `next`; and then, as later ones, it ends nothing."""
    dataset, stop, heard = Stuck(), parallel.Interruption(), []
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.signal(number, lambda *_: heard.append(1)) for number in numbers]
    signal.raise_signal(signal.SIGTERM)
    given = inputs.batches(dataset, [[0], [1]], workers, pinned=False)
    assert stop.next(given)["x"] == 0 and heard == [1]
    late = threading.Timer(3, os.write, (dataset.write, b"x"))
    late.start()
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGHUP)).start()
    began = time.monotonic()
    assert stop.next(given) is None and stop.asked
    given.close()
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)
    assert time.monotonic() - began < 2.5 and heard == [1]
    signal.raise_signal(signal.SIGINT)
    stop.over()
    assert heard == [1, 1] and stop.next(given) is None         # what was asked stays asked
    stop.over()
    late.cancel()
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def test_a_second_ctrl_c_waits_for_no_thread(tmp_path):
    """Such as one that writes a checkpoint. Python itself would wait, or, for a daemon, abort."""
    code = """if True:
        import threading, time
        from support import cli
        threading.Thread(target=time.sleep, args=(60,)).start()
        def main():
            raise KeyboardInterrupt
        cli.run(main)"""
    [process] = ranks.start(tmp_path / "said", 1, "-c", code)
    process.join(30)
    assert process.exitcode == 130
    process.kill()


@forked
def test_memory_that_is_too_small_for_workers_is_told(monkeypatch, capfd):
    """/dev/shm of a container has 64 MB."""
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file: No space left on device (28)")
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(SystemExit):
        next(inputs.batches(Stuck(), [[0]], 1, pinned=False))
    said = capfd.readouterr().err
    assert said.startswith("error: no room") and "--shm-size" in said and said.count("\n") == 1


def children(pid):
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(c) for c in tasks.read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find a rank")
def test_a_rank_that_dies_ends_the_others_with_a_message(tmp_path):
    process = started(tmp_path, [*TORCHRUN, "train.py"], "--ckpt-every", 1)
    first, second = sorted(children(process.pid))[:2]
    os.kill(second, signal.SIGKILL)
    began = time.monotonic()
    out, err = process.communicate(timeout=100)
    assert process.returncode != 0 and time.monotonic() - began < 60
    assert "process 0 lost another process" in err and "The same command continues" in err
    saved = checkpoint.read(tmp_path / "run" / "latest.pt")["step"]
    assert saved >= 3
    assert run(tmp_path, "--max-steps", saved + 1, "--ckpt-every", 1, "--log-every", 1)["step"] == saved + 1
    assert not parts(tmp_path)


# --- other machines ---

def test_the_clock_does_not_matter(good, tmp_path):
    folder = copy_of(good, tmp_path)
    for i, path in enumerate(sorted(folder.rglob("*.pt"), reverse=True)):
        os.utime(path, (0, 10 * i))                             # 1970, the older the later
    assert run(tmp_path, "--max-steps", 10, "--ckpt-every", 2, "--log-every", 1)["step"] == 10
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["0000008.pt", "0000010.pt"]


def offline():
    return shutil.which("unshare") and subprocess.run(["unshare", "-rn", "true"],
                                                      capture_output=True).returncode == 0


@pytest.mark.skipif(not offline(), reason="may not hide the network here")
def test_a_host_without_network(tmp_path):
    """The default data need none. A download that fails is told in one sentence."""
    flags = [*SMALL, "--results-dir", str(tmp_path)]
    both = f"""
import sys, train
try:
    train.main({[*flags, "--data", "mnist", "--data-dir", str(tmp_path)]})
except SystemExit as told:
    assert told.code == 2
    print("and then", file=sys.stderr)
    train.main({[*flags, "--max-steps", "1"]})
    print("the end", file=sys.stderr)
"""
    done = subprocess.run(["unshare", "-rn", sys.executable, "-c", both], cwd=ROOT, capture_output=True, text=True,
                          env=ENV, timeout=100)
    first, second = done.stderr.split("and then\n")
    assert "cannot download" in first and "Traceback" not in first, first
    assert done.returncode == 0 and second.endswith("the end\n") and "Traceback" not in second, second


def test_another_precision_goes_on_and_says_so(good, tmp_path, capsys):
    copy_of(good, tmp_path)
    later = run(tmp_path, "--max-steps", 10, "--precision", "bf16")
    assert "was float32 and changes" in capsys.readouterr().out
    assert later["step"] == 10 and later["args"]["bf16"]
    assert all(v.dtype == torch.float32 for v in later["model"].values() if v.is_floating_point())


def test_a_checkpoint_cannot_choose_which_file_runs(good, tmp_path, monkeypatch):
    """Not by an absolute name, not by dots, not by a .py beside it."""
    (tmp_path / "evil.py").write_text("CONFIGS = {}\nraise SystemError('executed')\n")
    whole = checkpoint.read(good / "run" / "latest.pt")
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "evil"), os.path.relpath(tmp_path / "evil", ROOT), "evil.py", "./evil.py"):
        torch.save({**whole, "args": {**whole["args"], "model": name}}, "given.pt")
        with pytest.raises(ValueError, match="no model|if you trust it, pass --model"):
            checkpoint.load_run("given.pt")


def test_a_new_run_from_a_checkpoint_takes_the_command_lines_decays_and_batch(good, tmp_path):
    decays = ["--beta2", 0.5, "--weight-decay", 0.25, "--global-batch-size", 4]
    later = run(tmp_path, "--max-steps", 9, "--resume", good / "run", *decays)
    assert later["opt"]["param_groups"][0]["betas"][1] == 0.5 and later["args"]["weight_decay"] == 0.25
    run(tmp_path, "--max-steps", 10, *decays)                                   # auto; then the first again
    last = run(tmp_path, "--max-steps", 11, "--resume", good / "run", *decays, "--log-every", 1)
    assert last["images"] == 8 * 8 + 3 * 4
    assert [row.split(",")[1] for row in (tmp_path / "run" / "log.csv").read_text().split()[1:]] == ["68", "72", "76"]


# --- agreement ---

def test_one_process_stops_all(tmp_path, monkeypatch, capsys):
    """Another one got a signal after the second step. Before the first, they agree that they have the same data and no
    checkpoint."""
    votes = iter([False, False, False, True])
    monkeypatch.setattr(parallel.Team, "any", lambda team, yes: next(votes))
    assert run(tmp_path, "--max-steps", 9, "--log-every", 1)["step"] == 2
    assert "stopped     at step 2, saved. The same command continues" in capsys.readouterr().out
    assert (tmp_path / "run" / "summary.png").exists()


def test_one_process_agrees_with_itself():
    team = parallel.Team(torch.device("cpu"))
    assert team.any(True) and not team.any(False) and team.first(lambda: 3) == 3
    for error in (ValueError("a fix"), OSError(28, "No space left on device")):
        def fails():
            raise error
        with pytest.raises(ValueError, match="a fix|No space"):
            team.first(fails)


def test_machines_that_have_not_the_same_are_told(tmp_path):
    """Each case: what the first machine says, in turn, to this one, which is not the first."""
    (tmp_path / "latest.pt").touch()
    args = SimpleNamespace(init_inner=None, resume="auto", identity="ours", space=None, latents=None, data="pets")
    settings = {"ckpt": "latest.pt"}
    ours = json.dumps(settings, indent=1)
    for says, call, needed in (
            *([[first], lambda team: checkpoint.resume(args, tmp_path, team), "pets is not the same on all machines"]
              for first in (("theirs", None), ("ours", {"vae": "other"}))),
            ([("ours", None), None], lambda team: checkpoint.resume(args, tmp_path, team), "pass --node-rank=0 there"),
            ([ours[1:]], lambda team: fid_samples(team, tmp_path, 1, 1, settings, None, ""), "another checkpoint"),
            ([ours, ".x", []], lambda team: fid_samples(team, tmp_path, 1, 1, settings, None, ""), "another folder")):
        team = SimpleNamespace(rank=1, world=2, any=bool, first=lambda f, said=iter(says): next(said))
        with pytest.raises(ValueError, match=needed):
            call(team)


def test_a_t5_or_a_file_that_has_moved(capsys):
    """A run goes on with it, and says so."""
    saved = {"text_encoder": "google/flan-t5-xl", "model": "a/own.py", "text": 64, "lr": 1.0, "preset": "tiny",
             "options": {"a": 1}}
    now = SimpleNamespace(text_encoder="/models/flan", model="b/own.py", text=64, lr=1.0, preset="tiny", set={},
                          options={"a": 1})
    assert checkpoint.differences(now, saved, saved.keys()) == []
    checkpoint.say_moved(now, saved, "x.pt", print)
    assert capsys.readouterr().out.count("moved") == 2
    for other in dict(text_encoder="bytes"), dict(text=32), dict(model="dis"), dict(model="b/other.py"):
        assert checkpoint.differences(SimpleNamespace(**{**vars(now), **other}), saved, saved.keys())


def test_numbers_and_options_of_the_command_line():
    assert cli.option("patch=8") == ("patch", 8) and cli.option("skip=add") == ("skip", "add")
    with pytest.raises(SystemExit):
        train.parse(["--beta2", "1"])
    assert train.parse(["--beta2", "0.5", "--set", "a=[1, 2]"]).set == {"a": [1, 2]}
    assert cli.Parser(None).description == ""                   # python -OO has no docstrings


def test_what_nobody_reads_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)                                            # train.py | head
    cut = cli.Stream(open(writer, "w"))
    for _ in range(2):
        print("a line", file=cut, flush=True)
    print("a line", file=cli.Stream(None), flush=True)          # train.py 2>&-
