"""A run on the disk: written so that a kill, a full disk or a flipped bit at any moment loses nothing, read
so that nothing in it can run.

    results/<name>/latest.pt                 the newest checkpoint, another name of the newest of these:
    results/<name>/checkpoints/0000500.pt    {version, model, ema, opt, step, images, args}
    results/<name>/log.csv, args.json, samples/

A checkpoint holds whole tensors under the model's own names, whatever the number of processes, DDP or shards,
precision or torch.compile: a run can go on in any of these ways from a checkpoint made in another.

    python -m support.checkpoint results/dis-mnist dis-mnist.pt      to share: an eighth of the size
"""
import csv
import importlib.util
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import torch

from diffusion import UserError
from support.cli import Parser, run, told_plainly

try:
    import fcntl
except ImportError:                         # Windows
    fcntl = None

VERSION = 1     # of the checkpoint's layout
FREE_TO_CHANGE = {                           # between a run and its continuation
    "max_steps", "grad_accum", "device", "num_workers", "log_every", "sample_every", "ckpt_every",
    "keep_ckpts", "results_dir", "name", "resume", "grad_checkpointing", "compile", "shard", "data_dir",
    "smoke", "dry_run", "class_names", "prompts", "init_inner", "cond", "precision", "bf16", "latents", "vae",
    "image_size", "frames"}                  # the shape is compared
MUST_MATCH = {"model", "preset", "set", "shape", "num_classes", "text", "text_encoder"}   # in any checkpoint


# --- reading ------------------------------------------------------------------------------------

def check(path):
    """Raises zipfile.BadZipFile if a byte is not as it was written: torch.load does not look at the
    checksums. Takes a second per gigabyte."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise zipfile.BadZipFile


def sums(path):
    """A number that changes with any bit of a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        return zlib.crc32(repr([record.CRC for record in archive.infolist()]).encode())


def read(path, checked=False):
    """-> the checkpoint's dict, tensors on the CPU, mapped from the file until they are used. Never runs code
    in it: weights_only=True admits tensors, numbers, strings, lists and dicts. checked: its checksums were
    compared already. Raises ValueError."""
    try:
        if (zipped := zipfile.is_zipfile(path)) and not checked:    # what torch.save writes
            check(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # the errors below say it better
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}: train first, or pass --ckpt PATH") from None
    except pickle.UnpicklingError:  # before the next: told apart from damage
        raise UserError(f"{path} contains more than numbers and text (perhaps code), or is not a "
                         f"checkpoint: use one that train.py wrote") from None
    except PermissionError:
        raise
    except Exception:               # damage makes the unpickler stumble in all kinds of ways
        raise UserError(f"{path} is damaged or cut short: use an earlier file of its "
                         f"checkpoints folder") from None
    if not isinstance(checkpoint, dict) or not {"version", "model", "ema", "args"} <= set(checkpoint):
        raise UserError(f"{path} is not a checkpoint of this project: use one that train.py wrote")
    if checkpoint["version"] != VERSION:
        raise UserError(f"{path} has layout version {checkpoint['version']}, this code reads "
                         f"{VERSION}: use the code that wrote it")
    return checkpoint


def in_folder(path):
    """A run's folder -> its latest.pt; a file as it is."""
    path = Path(path)
    return path / "latest.pt" if path.is_dir() else path


def newest_run(results="results"):
    runs = sorted(Path(results).glob("*/latest.pt"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UserError(f"no {results}/*/latest.pt here: run `python train.py` first, or pass "
                         f"--ckpt PATH")
    return runs[-1]


def numbered(folder):
    """The checkpoints of a run, the newest last."""
    return sorted((folder / "checkpoints").glob("[0-9]*.pt"), key=lambda p: (len(p.name), p.name))


def newest_good(folder, say=print):
    """-> path and contents of the newest checkpoint of a run that is whole, or two Nones if there is none at
    all. Raises ValueError if all are damaged."""
    problems = []
    for path in [folder / "latest.pt"] * (folder / "latest.pt").exists() + numbered(folder)[::-1]:
        try:
            checkpoint = read(path)
        except UserError as e:
            problems.append(str(e))
            continue
        if problems:
            say(f"damaged     {folder / 'latest.pt'}: going on from {path}")
        return path, checkpoint
    if problems:
        raise UserError(problems[0])
    return None, None


def share(path, out):
    """Writes the averaged weights of a checkpoint in half precision, without the optimizer and without what
    only the machine of the training knows: enough to draw, and to begin other runs. -> bytes"""
    saved = read(path)
    half = {k: v.half() if v.is_floating_point() else v for k, v in saved["ema"].items()}
    args = {**saved["args"], "data_dir": None, "results_dir": "results", "name": None, "device": "auto",
            "resume": "auto", "init_inner": None}
    slim = {**saved, "model": half, "ema": half, "opt": None, "args": args}   # written once
    replace(Path(out), lambda f: torch.save(slim, f))
    return Path(out).stat().st_size


# --- models ---------------------------------------------------------------------------------------

def load_paper(name):
    """"dis" -> the module of dis.py beside this file; a path to a .py file -> that file.

    Loaded by path under the name "<file>_paper", because `import dis` means Python's own module.
    Raises ValueError if there is no such file or it lacks `CONFIGS` or `build`.
    """
    here = Path(__file__).resolve().parents[1]
    path = Path(name) if name.endswith(".py") else here / f"{name}.py"
    papers = sorted(p.stem for p in here.glob("*.py")
                    if re.search(r"^CONFIGS = ", p.read_text("utf8", "replace"), re.M))
    if not path.is_file() or not name.endswith(".py") and name not in papers or (
            path.parent == here and path.stem not in papers):
        raise UserError(f"no model {name!r}: choose {', '.join(papers)}, or a path to a .py file "
                         f"with CONFIGS and build()")
    key = f"{path.stem}_paper"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        module = sys.modules[key] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    module = sys.modules[key]
    if not hasattr(module, "CONFIGS") or not hasattr(module, "build"):
        raise UserError(f"{path} is no model file: it must define CONFIGS and build()")
    return module


def load_run(path, weights="ema", device="cpu", model=None):
    """A checkpoint or a run's folder -> (model in eval mode, diffusion, args of the training, "step" too).

    model: for a run of a model of your own its .py file: a checkpoint's word is not enough to run a file.
    Raises ValueError.
    """
    checkpoint = read(in_folder(path))
    args = {**checkpoint["args"], "step": checkpoint.get("step")}
    if args["model"].endswith(".py") and not model:
        raise UserError(f"{path} asks for the code in {args['model']}: if you trust it, pass --model "
                         f"{args['model']}")
    net, diffusion = load_paper(model or args["model"]).build(
        args["preset"], tuple(args["shape"]), args["num_classes"],
        **({"text": args["text"]} if args.get("text") else {}), **args["set"])
    try:
        net.load_state_dict(checkpoint[weights])
    except RuntimeError:
        raise UserError(f"the weights in {path} do not fit {args['model']} {args['preset']} as it "
                         f"is now: use the code that trained them") from None
    return net.to(device).eval(), diffusion, args


def differences(args, saved, keys):
    """What is not as in the checkpoint, as "--lr 0.001 (was 0.002)"."""
    flags = {"text": "--cond: text", "shape": "--image-size: shape", "num_examples": "--data: examples",
             "space": "--latents: from"}
    return [f"{flags.get(k, '--' + k.replace('_', '-'))} {vars(args)[k]} (was {saved[k]})" for k in vars(args)
            if k in keys and k in saved and vars(args)[k] != saved[k]]


def origin(args, folder, restarted, say=print):
    """Where training begins -> the path of a checkpoint, or None: with fresh weights. Raises ValueError where
    the command line and the files do not agree. restarted: by torchrun, after a failure of this very run."""
    hold(folder)
    if args.resume == "none" and folder.exists() and not restarted:
        let_go()
        n = next(n for n in range(1, 10**6) if not Path(f"{folder}.old{n}").exists())
        folder.rename(f"{folder}.old{n}")
        say(f"renamed     the earlier run is now {folder}.old{n}")
    (path, checkpoint), keys = newest_good(folder, say), vars(args).keys() - FREE_TO_CHANGE
    own = path is not None
    if not own and args.resume not in ("auto", "none"):
        path, keys = in_folder(args.resume), MUST_MATCH
        checkpoint = read(path)
    if path is None:
        return None
    saved = checkpoint["args"]
    if Path(args.data).is_dir() and Path(saved["data"]).name == Path(args.data).name:
        keys = keys - {"data"}              # it may have moved; how many there are is compared
    for flag, given in (("resume", {"auto", "none", saved["resume"]}),
                        ("init_inner", {None, saved.get("init_inner")})):
        if own and getattr(args, flag) not in given:
            flag, value = flag.replace("_", "-"), getattr(args, flag)
            raise UserError(f"{folder} already holds a run that did not begin from {value}: pass another "
                             f"--name, or drop --{flag}")
    changed = differences(args, saved, keys)
    if changed:
        raise UserError(f"{path} was trained differently: {', '.join(changed)}. Use its flags; or begin a "
                         f"new run with --name NEW, or with --name NEW --resume {path} from these weights")
    if args.max_steps < checkpoint["step"]:
        raise UserError(f"{path} is at step {checkpoint['step']} already: pass a larger --max-steps, or "
                         f"--name NEW for a run of its own")
    if own and saved.get("bf16", args.bf16) != args.bf16:
        say(f"precision   was {'bf16' if saved['bf16'] else 'float32'} and changes: the run is not, bit for "
            f"bit, the one that would have gone on")
    return path


def begin_inside(model, args):
    """Progressive training: the averaged weights of args.init_inner into the inner network of the model."""
    path = in_folder(args.init_inner)
    checkpoint = read(path)
    if not hasattr(model, "load_inner"):
        raise UserError(f"{args.model} has no inner network: drop --init-inner, or pass --model mdm")
    changed = differences(args, checkpoint["args"], {"model", "text", "text_encoder"})
    changed += [f"--set {k}={v}" for k, v in checkpoint["args"]["set"].items()
                if k in ("predict", "schedule", "T") and args.set.get(k) != v]
    if changed:
        raise UserError(f"{path} was trained differently: {', '.join(changed)}. Use its flags")
    model.load_inner(checkpoint["ema"])


# --- one process at a time ------------------------------------------------------------------------

HELD = {}                                   # folder: its file descriptor


def hold(folder):
    """Raises ValueError if another process trains in this folder, perhaps one that outlived its torchrun. No
    file is made for it, and a process that is killed lets go."""
    if not fcntl or folder in HELD or not folder.is_dir():
        return
    HELD[folder] = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(HELD[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        let_go()
        raise UserError(f"another process is training in {folder}: stop it, or pass --name NEW") from None
    except OSError:                         # not every file system can
        pass


def let_go():
    while HELD:
        os.close(HELD.popitem()[1])


# --- writing --------------------------------------------------------------------------------------

def replace(path, write):
    """write(file) what is to stand at `path`. A kill at any moment leaves the old file or the new one, whole;
    an OSError leaves the old one, and nothing beside it."""
    path = Path(path)
    part = path.with_name(f"{path.name}.tmp")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())            # the name must not reach the disk before the bytes
        os.replace(part, path)
    except RuntimeError as e:               # how torch.save tells of a full disk
        raise OSError(f"cannot write {path} ({str(e).splitlines()[0]})") from None
    finally:
        part.unlink(missing_ok=True)


def prepare(folder):
    """Make the run's folder, and sweep out what an earlier process left half written when it was killed."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints").mkdir(exist_ok=True)
    hold(folder)
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write into {folder}: pass another --results-dir")
    for part in [*folder.rglob("*.tmp"), *folder.rglob(".[0-9]*.png")]:
        part.unlink()


def save(checkpoint, folder, keep):
    """Write checkpoints/<step>.pt and point latest.pt at it. Earlier ones are deleted, but for the newest
    `keep`, when the new one has been read back and found whole."""
    path = folder / "checkpoints" / f"{checkpoint['step']:07d}.pt"
    try:
        replace(path, lambda f: torch.save(checkpoint, f))
        check(path)
        latest, part = folder / "latest.pt", folder / "latest.pt.tmp"
        part.unlink(missing_ok=True)
        try:
            os.link(path, part)             # a second name for the same bytes
            os.replace(part, latest)
        except OSError:                     # not every file system can
            with open(path, "rb") as f:
                replace(latest, lambda copy: shutil.copyfileobj(f, copy))
    except (OSError, zipfile.BadZipFile) as e:
        raise OSError(f"step {checkpoint['step']} could not be saved ({e}): make room and run the same "
                      f"command again, it goes on from what was saved before") from None
    for old in numbered(folder)[:-keep]:
        old.unlink()


def describe(folder, args, argv, processes):
    """args.json: what was asked for, and of which code."""
    try:
        git = subprocess.run(["git", "-C", Path(__file__).resolve().parent, "rev-parse", "HEAD"],
                             capture_output=True, text=True).stdout.strip()
    except OSError:
        git = ""                            # no git here
    about = {**vars(args), "command": shlex.join(["train.py", *argv]), "git": git,
             "torch": torch.__version__, "processes": processes}
    replace(folder / "args.json", lambda f: f.write(json.dumps(about, indent=1).encode()))


def write_line(log, values):
    """To log.csv. Raises OSError with what to do."""
    try:
        log.write(",".join(map(str, values)) + "\r\n")
        log.flush()
    except OSError as e:
        raise OSError(f"cannot write {log.name} ({e.strerror}): make room and run the same command again, it "
                      f"goes on from what was saved before") from None


def open_log(path, fields, step):
    """log.csv, without the lines after `step`: those steps will be taken again."""
    rows = []
    if path.exists() and step:
        with open(path, newline="") as f:   # the last line may be half a line
            rows = [r for r in csv.reader(f)
                    if len(r) == len(fields) and r[0].isdigit() and int(r[0]) <= step]
    text = "".join(",".join(row) + "\r\n" for row in [fields, *rows])
    replace(path, lambda f: f.write(text.encode()))
    return open(path, "a", newline="")


def main(argv=None):
    p = Parser("The averaged weights of a run in half precision, to share.")
    p.add_argument("run", help="a run's folder, or one of its checkpoints")
    p.add_argument("out", help="the file to write")
    args = p.parse_args(argv)
    with told_plainly():
        print(f"{share(in_folder(args.run), args.out) / 1e6:.1f} MB -> {args.out}: "
              f"python sample.py --ckpt {args.out}")


if __name__ == "__main__":
    run(main)
