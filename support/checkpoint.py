"""A run on the disk. It is written so that a kill, a full disk or a flipped bit at any moment loses nothing. Code that
someone may have put into a checkpoint is never run.

    results/<name>/checkpoints/0000500.pt    {version, model, ema, opt, step, images, args}
    results/<name>/latest.pt                 a second name for the newest of these files
    results/<name>/log.csv, args.json, samples/

A checkpoint holds whole tensors under the model's own names. Neither the number of processes, nor DDP or shards, nor
precision or torch.compile changes that: a run made in one of these ways can continue in any other.

    python -m support.checkpoint results/dis-mnist dis-mnist.pt      to share: an eighth of the size
"""
import contextlib
import errno
import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from concurrent import futures
from pathlib import Path

import torch

from diffusion import UserError
from support.cli import Parser, command, quoted, run, told_plainly
from support.parallel import whole

try:
    import fcntl
except ImportError:                             # Windows
    fcntl = None

VERSION = 1                                     # of the layout above
FREE_TO_CHANGE = {                              # flags that may differ between a run and its continuation
    "max_steps", "grad_accum", "device", "num_workers", "log_every", "sample_every", "ckpt_every",
    "keep_ckpts", "results_dir", "name", "resume", "grad_checkpointing", "compile", "shard", "data_dir",
    "smoke", "dry_run", "prompts", "set", "init_inner", "cond", "precision", "bf16", "latents", "vae",
    "image_size", "frames"}                     # (we compare the shape instead of these two, "options" for "set")
MUST_MATCH = {"model", "preset", "options", "shape", "num_classes", "text", "text_encoder"}     # for --resume PATH
# Presets that have changed since. Their older runs keep the old values, but did not write them down.
BEFORE = {("mdm", preset): dict(predict="v", error="v") for preset in ("tiny", "tiny-x4")} | {
    ("mdm", "tiny-video"): dict(predict="v", error="v", channels=(48, 96), embedding=256, text_width=64,
                                temporal=dict(channels=(24, 24, 32, 48, 48), blocks=(1,) * 5))} | {
    ("mdm", preset): dict(per_group=4, see_padding=False, standardise=False, empty_prompt=False)
    for preset in ("cc12m-64", "cc12m-256", "cc12m-1024")}
_DIS = dict(conv=4, state=8, min_snr=None, max_snr=None, t_normal=None, cfg_below=1)
BEFORE |= {("dis", "tiny"): dict(width=128, **_DIS), ("dis", "mini"): dict(width=160, grid=4, **_DIS)}
BEFORE |= dict.fromkeys([("diffussm", "tiny"), ("diffussm", "mini"), ("mdm", "mini"), ("cunet", "tiny"),
                         ("cunet", "mini"), ("cunet", "unet-tiny"), ("cunet", "unet-mini")], dict(t_normal=None))


# --- reading ------------------------------------------------------------------------------------------------

def check(path):
    """Raises zipfile.BadZipFile if a byte is not as it was written. (torch.load does not compare the checksums.) This
    takes a second for each gigabyte."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise zipfile.BadZipFile


def sums(path):
    """A number that changes with any bit of a checkpoint. It reads only the archive's own checksums."""
    with zipfile.ZipFile(path) as archive:
        return zlib.crc32(repr([record.CRC for record in archive.infolist()]).encode())


def read(path, checked=False):
    """A file -> the checkpoint's dict. Its tensors are on the CPU, and mapped from the file until they are used.
    Nothing in the file can run: weights_only=True admits only tensors, numbers, strings, lists and dicts. checked: True
    if its checksums were compared before. Raises UserError."""
    try:
        if (zipped := zipfile.is_zipfile(path)) and not checked:        # torch.save writes zip files
            check(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # the errors below say it better
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}: train first, or give the path of another") from None
    except pickle.UnpicklingError:                      # stands first, so that it does not count as damage
        raise UserError(f"{path} contains more than numbers and text (perhaps code), or is not a checkpoint: use one "
                        f"that train.py wrote") from None
    except PermissionError:
        raise
    except Exception as e:                              # damage makes the unpickler stumble in many ways
        if "unable to mmap" in str(e) or getattr(e, "errno", None) in (errno.EIO, errno.ENOMEM):    # but a good file?
            raise OSError(f"cannot read {path} ({str(e).splitlines()[0]})") from None
        raise UserError(f"{path} is damaged or cut short: use an earlier file of its checkpoints folder") from None
    if not isinstance(checkpoint, dict) or not {"version", "model", "ema", "args"} <= set(checkpoint):
        raise UserError(f"{path} is not a checkpoint of this project: use one that train.py wrote")
    if checkpoint["version"] != VERSION:
        raise UserError(f"{path} has layout version {checkpoint['version']}, this code reads {VERSION}: use the code "
                        f"that wrote it")
    return checkpoint


def in_folder(path):
    """A run's folder -> its latest.pt; a file stays as it is."""
    path = Path(path)
    return path / "latest.pt" if path.is_dir() else path


def newest_run(results="results"):
    """The folder of runs -> the latest.pt that was written last. Raises UserError if there is none."""
    runs = sorted(Path(results).rglob("latest.pt"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UserError(f"no latest.pt in {results}: run `python train.py` first, or pass --ckpt PATH")
    return runs[-1]


def numbered(folder):
    """The checkpoints of a run, the newest last."""
    return sorted((folder / "checkpoints").glob("[0-9]*.pt"), key=lambda p: (len(p.name), p.name))


def newest_good(folder, say=print):
    """A run's folder -> path and contents of its newest undamaged checkpoint; two Nones if it has no checkpoint. Raises
    UserError if all are damaged."""
    problems = []
    for path in [folder / "latest.pt"] * (folder / "latest.pt").exists() + numbered(folder)[::-1]:
        try:
            checkpoint = read(path)
        except UserError as e:
            problems.append(str(e))
            continue
        if problems:
            say(f"damaged     {folder / 'latest.pt'}: continuing from {path}")
        return path, checkpoint
    if problems:
        raise UserError(f"{problems[0]}, or begin a new run with --resume none")
    return None, None


def apart(path, out):
    """Raises UserError if the new file `out` would replace the file `path` from which it is made."""
    if Path(out).exists() and Path(path).exists() and Path(out).samefile(path):
        raise UserError(f"{out} is the checkpoint itself, and would be replaced: name another file to write")


def share(path, out):
    """Write the averaged weights of a checkpoint to `out`, in half precision -> its size in bytes. We leave out the
    optimizer, and the paths and flags of the machine. What is left can draw, and other runs can begin from it."""
    saved = read(path)
    half = {k: v.half() if v.is_floating_point() else v for k, v in saved["ema"].items()}

    def bare(value):                            # of a folder only its last name
        if isinstance(value, dict):
            return {k: bare(v) for k, v in value.items()}
        folder = isinstance(value, str) and (Path(value).is_absolute() or Path(value).is_dir())
        return Path(value).name if folder else value
    args = {**bare(saved["args"]), "data_dir": None, "results_dir": "results", "name": None, "device": "auto",
            "resume": "auto", "init_inner": None}
    slim = {**saved, "model": half, "ema": half, "opt": None, "args": args}         # the file has `half` only once
    replace(Path(out), lambda f: torch.save(slim, f))
    return Path(out).stat().st_size


# --- models -------------------------------------------------------------------------------------------------

def load_paper(name):
    """"dis" -> the module of dis.py, beside train.py; a path to a .py file -> the module of that file.

    It is loaded by its path and gets the name "<file>_paper", because `import dis` may mean Python's own module. A file
    elsewhere gets a number after that, which tells its folder: two files may be called alike. Raises UserError if there
    is no such file, or if the file lacks `CONFIGS` or `build`.
    """
    here = Path(__file__).resolve().parents[1]
    path = Path(name).resolve() if name.endswith(".py") else here / f"{name}.py"
    papers = sorted(p.stem for p in here.glob("*.py")
                    if re.search(r"^CONFIGS = ", p.read_text("utf8", "replace"), re.M))
    if not path.is_file() or not name.endswith(".py") and name not in papers or (
            path.parent == here and path.stem not in papers):
        raise UserError(f"no model {name!r}: choose {', '.join(papers)}, or a path to a .py file with CONFIGS and "
                        f"build()")
    key = f"{path.stem}_paper" + f"_{zlib.crc32(str(path.parent).encode()):x}" * (path.parent != here)
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
        raise UserError(f"{name} is no model file: it must define CONFIGS and build()")
    return module


def load_run(path, weights="ema", device="cpu", model=None):
    """A checkpoint or a run's folder -> (model in eval mode, diffusion, the arguments of the training and its "step").

    weights: "ema", the average, or "model", the last ones. model: the .py file, if the run is of a model of your own.
    We never run a file only because a checkpoint names it. Raises UserError.
    """
    checkpoint = read(in_folder(path))
    args = {**checkpoint["args"], "step": checkpoint.get("step")}
    if args["model"].endswith(".py") and not model:
        raise UserError(f"{path} asks for the code in {args['model']}: if you trust it, pass --model {args['model']}")
    if model and not args["model"].endswith(".py"):
        raise UserError(f"{path} is a run of {args['model']}: drop --model, or name a run of yours by --ckpt")
    paper = load_paper(model or args["model"])
    now = {**paper.CONFIGS.get(args["preset"], {}), **args["set"]}
    then = {**now, **before(args)}
    net, diffusion = paper.build(args["preset"], tuple(args["shape"]), args["num_classes"],
                                 **({"text": args["text"]} if args.get("text") else {}),
                                 **(args["set"] if then == now else then))
    load_weights(net, checkpoint, weights, path)
    return net.to(device).eval(), diffusion, args


def before(saved):
    """What the arguments of a run tell of its options: all that there were, or, of an older run, those that its preset
    would not give today."""
    return {**BEFORE.get((saved["model"], saved["preset"]), {}), **(saved.get("options") or saved["set"])}


def plain(value):
    """Is it something that a checkpoint can hold and `read` gives back?"""
    inside = [*value, *value.values()] if type(value) is dict else value if type(value) in (list, tuple) else ()
    return type(value) in (type(None), bool, int, float, str, list, tuple, dict) and all(map(plain, inside))


def all_options(args, paper):
    """The options of a new run: the preset's, and in place of some of them those of --set. Raises UserError."""
    options = {**paper.CONFIGS[args.preset], **args.set}
    if odd := [key for key, value in options.items() if not plain(value)]:
        raise UserError(f"the option {odd[0]} of {args.model} must be a number, a word, a list or a dict of such: no "
                        f"checkpoint could keep it (of NumPy's numbers make Python's, by float)")
    return options


def options_of(saved, args):
    """All options of a run, which now continues with args."""
    return {**{k: v for k, v in args.options.items() if k not in args.set}, **before(saved)}


def load_weights(model, checkpoint, weights, path):
    """Put the "model" or "ema" of a checkpoint, read from `path`, into a model. Raises UserError."""
    try:
        model.load_state_dict(checkpoint[weights])
    except RuntimeError:
        raise UserError(f"the weights in {path} do not fit {checkpoint['args']['model']} "
                        f"{checkpoint['args']['preset']} as it is now: use the code that trained them, or --name NEW "
                        f"for a new run") from None


# --- where a run begins -------------------------------------------------------------------------------------

def folder_of(args):
    """The run's folder: --results-dir and --name, or by default <model>-<data>."""
    data = os.path.abspath(os.path.expanduser(args.latents or args.data))           # "." has no name
    name = re.sub(r"[^\w.-]+", "-", f"{Path(args.model).stem}-{Path(data).name}")
    return Path(args.results_dir) / (args.name or name)


def differences(args, saved, keys):
    """How the arguments differ from a checkpoint's, such as ["--lr 0.001 (was 0.002)"]. keys: those to compare."""
    flags = {"text": "--cond: text", "shape": "--image-size: shape", "num_examples": "--data: examples",
             "space": "--latents: from", "class_names": "--data: classes", "identity": "--data: names, sizes, "
             "classes or captions of the files, digest", "options": "--set"}
    now, saved = vars(args), {**saved, "options": options_of(saved, args)}

    def only(k, a, b):                          # of classes and options those that changed: there may be 1,000
        if k == "options":
            return " ".join(f"{name}={value}" for name, value in a[k].items() if b[k].get(name) != value) or "nothing"
        return [name for name in a[k] if name not in b[k]] if k == "class_names" else a[k]
    return [f"{flags.get(k, '--' + k.replace('_', '-'))} {only(k, now, saved)} (was {only(k, saved, now)})"
            for k in now if k in keys and k in saved and now[k] != saved[k] and not moved(k, now[k], saved[k])]


def moved(key, now, saved):
    """Is it perhaps the same thing in another place: a T5, or the .py file of a model?"""
    return (key == "text_encoder" and "bytes" not in (now, saved)
            or key == "model" and now.endswith(".py") and Path(now).name == Path(saved).name)


def say_moved(args, saved, path, say):
    for key in ("text_encoder", "model"):
        if key in saved and saved[key] != getattr(args, key):
            say(f"moved       {path} was trained with {saved[key]}. Now it is {getattr(args, key)}: we cannot tell "
                f"whether they are the same")


def resume(args, folder, team):
    """-> (the checkpoint where training begins, its path), or (None, None) to begin with fresh weights. Makes the run's
    folder. The first process looks, and all processes get what it found. Raises UserError if the command line and the
    files do not agree."""
    if args.init_inner and args.resume not in ("auto", "none"):
        raise UserError("--resume PATH and --init-inner both begin from weights: drop one")
    own = args.identity, args.space and {k: v for k, v in args.space.items() if k != "data"}    # which is a path
    if team.any(team.first(lambda: own) != own):
        raise UserError(f"{args.latents or args.data} is not the same on all machines (names, sizes or classes of the "
                        f"files, or their VAE): copy one folder to all of them, or pass one that they share")

    def look():
        if args.init_inner and args.resume == "none":
            read(in_folder(args.init_inner))    # before the earlier run is renamed
        path = origin(args, folder, team.say)
        make_folder(folder)
        return path
    path = team.first(look)
    if path is None:
        if args.resume == "auto" and team.any((folder / "latest.pt").exists()):
            raise UserError(f"another machine than the first has {folder}/latest.pt: pass --node-rank=0 there, or "
                            f"--name NEW")
        return None, None
    checkpoint = received(path, folder, team)
    args.images_before = checkpoint["images"] - checkpoint["step"] * args.global_batch_size
    if folder in path.parents:                  # the run goes on: it keeps the record of how it began
        args.init_inner = checkpoint["args"].get("init_inner")
        if args.resume == "auto" and checkpoint["args"]["resume"] != "none":
            args.resume = checkpoint["args"]["resume"]
    else:
        args.init_inner = None
    return checkpoint, path


def origin(args, folder, say):
    """The path of the checkpoint where training begins, or None. Raises UserError."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: pass another --name")
    hold(folder)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0    # by torchrun, after this very run failed
    if args.resume == "none" and folder.exists() and not restarted:
        set_aside(folder, say)
    (path, checkpoint), keys = newest_good(folder, say), vars(args).keys() - FREE_TO_CHANGE
    own, log = path is not None, folder / "log.csv"
    if (not own and not restarted and args.resume in ("auto", "none")
            and log.exists() and log.read_bytes().count(b"\n") > 1):
        set_aside(folder, say)                  # its checkpoints were deleted, but not its pictures and its log
    if not own and args.resume not in ("auto", "none"):
        path, keys = in_folder(args.resume), MUST_MATCH
        checkpoint = read(path)
    if path is None:
        return None
    saved = checkpoint["args"]
    if Path(args.data).is_dir() and (saved["identity"] == args.identity if "identity" in saved else
                                     Path(saved["data"]).name == Path(args.data).name):
        keys = keys - {"data"}                  # the folder may have moved, but it holds the same files
    for flag, given in (("resume", {"auto", "none", saved["resume"]}),
                        ("init_inner", {None, saved.get("init_inner")})):
        if own and getattr(args, flag) not in given:
            flag, value = flag.replace("_", "-"), getattr(args, flag)
            raise UserError(f"{folder} already holds a run that did not begin from {value}: pass another --name, or "
                            f"drop --{flag}")
    changed = differences(args, saved, keys)
    if changed:
        fits = own and not differences(args, saved, MUST_MATCH)             # could a new run begin from its weights?
        raise UserError(f"{path} was trained differently: {', '.join(changed)}. Use its flags and data"
                        + "; or begin a new run with --name NEW" * own
                        + f", or with --name NEW --resume {quoted([str(path)])} from these weights" * fits)
    if args.max_steps < checkpoint["step"] + (not own):
        raise UserError(f"{path} is at step {checkpoint['step']} already: pass a larger --max-steps"
                        + ", or --name NEW for a new run" * own)
    say_moved(args, saved, path, say)
    if not own and saved.get("identity", args.identity) != args.identity:
        say(f"data        {path} was trained on other files or classes")
    if not own and any((saved.get("space") or {}).get(k, v) != v for k, v in (args.space or {}).items() if k != "data"):
        say(f"latents     {path} was trained on those of another VAE, or another size")
    if own and saved.get("bf16", args.bf16) != args.bf16:
        say(f"precision   was {'bf16' if saved['bf16'] else 'float32'} and changes: the run will differ, by "
            f"rounding, from one that does not change")
    return path


def set_aside(folder, say):
    """Rename the folder of a run, to keep it beside a new one."""
    let_go()
    n = next(n for n in range(1, 10**6) if not Path(f"{folder}.old{n}").exists())
    folder.rename(f"{folder}.old{n}")
    say(f"renamed     the earlier run is now {folder}.old{n}")


def received(path, folder, team):
    """The first process's checkpoint, for all. A machine that has not the same file there gets it through the network:
    the first of its processes writes a copy into its own `folder`, all of them open it, and it is deleted."""
    warnings.filterwarnings("ignore", ".* to a meta parameter")     # shards: only the first process needs the numbers
    def mark():
        with contextlib.suppress(OSError, zipfile.BadZipFile):
            return sums(path)
    marked = team.first(mark)
    here = team.rank == 0 or marked is not None and mark() == marked
    if not team.any(not here):
        return read(path, checked=True)
    local = int(os.environ.get("LOCAL_RANK", 0))
    copy = folder / f"{team.rank - local}.copy.tmp"             # a name for each machine: two may share the folder
    writes = not here and local == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    team.copy(path, copy if writes else os.devnull)
    checkpoint = read(path if here else copy, checked=True)
    team.any(False)                                             # wait until all have opened it
    if writes:
        with contextlib.suppress(PermissionError):              # Windows keeps what is open
            copy.unlink()
    return checkpoint


def begin_inside(args, folder, team, *models):
    """Progressive training: put the averaged weights of args.init_inner into the inner network of each model."""
    path = in_folder(args.init_inner)
    team.first(lambda: bool(read(path)))
    checkpoint = received(path, folder, team)
    if not hasattr(models[0], "nest"):
        raise UserError(f"{args.model} has no inner network: drop --init-inner, or pass --model mdm")
    changed = differences(args, checkpoint["args"], {"model", "text", "text_encoder"})
    then = options_of(checkpoint["args"], args)
    changed += [f"--set {k}={then[k]}" for k in ("predict", "schedule", "T") if then.get(k) != args.options.get(k)]
    if changed:
        raise UserError(f"{path} was trained differently: {', '.join(changed)}. Use its flags")
    say_moved(args, checkpoint["args"], path, team.say)
    for model in models:
        load_inner(model, checkpoint["ema"])


def load_inner(model, state):
    """Put all weights of a trained network into one that is inside the model. Raises UserError unless all fit.
    model.nest: the networks from the innermost to the model itself."""
    if len(model.nest) == 1:
        raise UserError("nothing is inside a network of one resolution: --init-inner needs a larger --image-size than "
                        "the checkpoint's")
    inner = next((n for n in model.nest[:-1] if n.state_dict().keys() == state.keys()), model.nest[0])
    own = inner.state_dict()
    wrong = sorted(state.keys() ^ own.keys()) or [k for k in own if own[k].shape != state[k].shape]
    if wrong:
        raise UserError(f"{len(wrong)} weights do not fit any inner network ({wrong[0]} is the first): use a "
                        f"checkpoint of the same preset, options and condition, and of a smaller --image-size")
    inner.load_state_dict(state)


# --- one process at a time ----------------------------------------------------------------------------------

HELD = {}                                       # folder: its file descriptor


def hold(folder):
    """Lock a run's folder. Raises UserError if another process trains in it, perhaps one that outlived its torchrun.
    The lock needs no file, and a killed process loses its lock."""
    if not fcntl or folder in HELD or not folder.is_dir():
        return
    HELD[folder] = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(HELD[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        let_go()
        raise UserError(f"another process is training in {folder}: stop it, or pass --name NEW") from None
    except OSError:                             # some file systems have no locks
        pass


def let_go():
    """Unlock."""
    while HELD:
        os.close(HELD.popitem()[1])


# --- writing ------------------------------------------------------------------------------------------------

def replace(path, write):
    """Call write(file) to make the file `path`. A kill at any moment leaves the old file or the new one, never a part.
    An OSError leaves the old one, and no other file."""
    path = Path(path)
    part = path.with_name(f"{path.name}.tmp")
    part.unlink(missing_ok=True)                # it may be a second name of another file, see `save`
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())                # the name must not reach the disk before the bytes
        put(part, path)
    except RuntimeError as e:                   # what torch.save raises on a full disk
        raise OSError(f"cannot write {path} ({str(e).splitlines()[0]})") from None
    finally:
        part.unlink(missing_ok=True)


def put(part, path):
    """os.replace. On Windows it fails while somebody reads `path`: then try again, for three seconds."""
    for _ in range(30 if os.name == "nt" else 0):
        with contextlib.suppress(PermissionError):
            return os.replace(part, path)
        time.sleep(0.1)
    os.replace(part, path)


def make_folder(folder):
    """Make the run's folder. Remove unfinished files that a killed process left there. Raises UserError."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints").mkdir(exist_ok=True)
    hold(folder)
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write into {folder}: pass another --results-dir")
    for inside in folder, folder / "samples", folder / "checkpoints":       # not deeper: another run may be in there
        for part in [*inside.glob("*.tmp"), *inside.glob(".[0-9]*.png")]:
            part.unlink()


def images(args, step):
    """How many were seen up to this step. A run that began from a checkpoint (--resume PATH) may have another batch size
    than that one had: args.images_before is the difference."""
    return getattr(args, "images_before", 0) + step * args.global_batch_size


def save(folder, args, step, state):
    """Write checkpoints/<step>.pt and make latest.pt a name for it. state: {"model", "ema", "opt"}. When the new file
    has been read back and is good, delete the older ones; args.keep_ckpts files stay. The OSError it may raise tells
    the fix."""
    path = folder / "checkpoints" / f"{step:07d}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)              # somebody may have deleted the folder
    content = {"version": VERSION, **state, "step": step, "images": images(args, step), "args": vars(args)}
    try:
        replace(path, lambda f: torch.save(content, f))
        check(path)
        latest, part = folder / "latest.pt", folder / "latest.pt.tmp"
        part.unlink(missing_ok=True)
        try:
            os.link(path, part)                 # a second name for the same bytes
            put(part, latest)
        except OSError:                         # some file systems have no second names
            with open(path, "rb") as f:
                replace(latest, lambda copy: shutil.copyfileobj(f, copy))
    except (OSError, zipfile.BadZipFile) as e:
        raise OSError(f"step {step} could not be saved ({e}): make room and run the same command again, which "
                      f"continues from the last checkpoint") from None
    for old in numbered(folder)[:-args.keep_ckpts]:
        with contextlib.suppress(PermissionError):              # Windows: somebody reads it. The next save deletes it
            old.unlink()


# Training goes on while the first process writes: for a large model that takes minutes.

WRITER, WRITING = futures.ThreadPoolExecutor(1), []             # a thread; the Future of what it writes, if anything


def save_aside(team, folder, args, step, wait=False, **parts):
    """Copy the states of model, ema and opt; the first process begins to save them. All processes must call this. wait:
    until they are saved. What `save` raises, all get from here as a UserError, perhaps only at the next call."""
    team.first(finish)                          # there is memory for one copy, 16 bytes a parameter
    state = whole({k: v.state_dict() for k, v in parts.items()})

    def begin():
        WRITING.append(WRITER.submit(save, folder, args, step, state))
        if wait:
            finish()
    team.first(begin)


def failed():
    """Is a checkpoint lost? Then there is no reason to train on."""
    return any(file.done() and file.exception() for file in WRITING)


def finish():
    """Wait until what `save_aside` began is saved. Raises what `save` raised."""
    while WRITING:
        if futures.wait(WRITING, 3).not_done:
            print("saving      a checkpoint is still being written: wait for it", flush=True)
            futures.wait(WRITING)
        WRITING.pop().result()


@contextlib.contextmanager
def finished():
    """`@finished()` above a main: whatever ends it, except a second Ctrl-C, a checkpoint that is being written is."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException:
        try:
            finish()
        except OSError as e:
            print(e, file=sys.stderr)
        raise


def describe(folder, args, argv, processes):
    """Write args.json: all arguments, the command, and the version of the code."""
    git = ""
    with contextlib.suppress(OSError):          # there may be no git here
        git = subprocess.run(["git", "-C", Path(__file__).resolve().parent, "rev-parse", "HEAD"],
                             capture_output=True, text=True).stdout.strip()
    about = {**vars(args), "command": quoted(["train.py", *argv]), "git": git,
             "torch": torch.__version__, "processes": processes}
    replace(folder / "args.json", lambda f: f.write(json.dumps(about, indent=1).encode()))


@told_plainly()
def main(argv=None):
    p = Parser("Write the averaged weights of a run in half precision, to share them.")
    p.add_argument("run", help="a run's folder, or one of its checkpoints")
    p.add_argument("out", help="the file to write")
    args = p.parse_args(argv)
    apart(in_folder(args.run), args.out)
    size = share(in_folder(args.run), args.out)
    print(f"{size / 1e6:.1f} MB -> {args.out}: {command('sample.py', '--ckpt', args.out)}")


if __name__ == "__main__":
    run(main)
