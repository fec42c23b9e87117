"""What the commands share: how they report errors, how they read flags, and how they choose the images to draw.

A `UserError` (diffusion.py) is something that the user can put right. It is caught in one place, `told_plainly`, around
the `main` of each command.
"""
import argparse
import ast
import contextlib
import difflib
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from diffusion import UserError, fold
from support import threads

QUIET = (os.environ.get("RANK") or "0") != "0"  # only the first of torchrun's processes shows progress

# What gloo and NCCL say when they no longer hear from a process.
LOST = "connection (was )?(closed|reset|refused)|timed ?out|broken pipe|remote process|socket.*closed"
SAID = {                                        # what libraries say, and what we say instead
    r"No working C\+\+ compiler|Failed to find C compiler":
        "torch.compile needs a C++ compiler, and finds none: install one, such as g++, or drop --compile",
    "DefaultCPUAllocator|MPS backend out of memory":
        "the memory is full: pass --grad-accum 2 or more or --grad-checkpointing, or sample.py a smaller --batch-size",
    "Expected to have finished reduction in the prior":
        "a parameter of this model has no part in its loss, and several processes wait for the gradient of each: use "
        "it, or set requires_grad = False, or train with one process"}


def processes():
    """The number of this process and how many there are: what torchrun says, or 0 and 1. Raises UserError."""
    rank, world = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        raise UserError(f"RANK={rank} needs a WORLD_SIZE above it, not {world}: start several processes by torchrun, "
                        f"which sets both, or unset both for one process")
    return int(rank), int(world)


def several():
    return os.environ.get("WORLD_SIZE", "") not in ("", "1")


HELPERS = []                                    # processes that this one has started (parallel.share_cores)


# --- errors: one sentence that tells the fix, exit code 2, no traceback -------------------------------------

def fail(message, every_process=False):
    """Print the message as one sentence and leave with exit code 2.

    Most errors are the same in all of torchrun's processes. Then only the first process speaks. It leaves, and torchrun
    ends the others. A process that is still there after ten seconds has met an error of its own, so it speaks, too.
    every_process: True for an error that one process may meet alone. Then it speaks at once, whichever it is.
    """
    rank = several() and os.environ.get("RANK") or "0"
    if rank != "0" and not every_process:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    where = "" if rank == "0" else f" on process {rank}"
    print(f"error{where}:", " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


@contextlib.contextmanager
def told_plainly():
    """`@told_plainly()` above a `main`: a UserError, an OSError of a file, or what is in SAID becomes one sentence.
    Python makes a lost connection an OSError, too, but that has nothing to do with a file: we leave it to `run`."""
    try:
        yield
    except ConnectionError:
        raise
    except (UserError, OSError) as e:
        fail(e)
    except Exception as e:
        for theirs, ours in SAID.items():
            if re.search(theirs, str(e)):
                fail(ours)
        raise


class Stream:
    """Standard output or error. If nobody reads it any more (`train.py | head`, a terminal that closed), that is no
    reason to stop: it falls silent."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")           # None: it was closed from the beginning (2>&-)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            with open(os.devnull, "w") as nobody:
                os.dup2(nobody.fileno(), self.stream.fileno())


def end(workers):
    """Kill processes that read data, or train with us. Python and PyTorch would send the former a signal, which they
    ignore, and wait."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)           # otherwise PyTorch complains of their death
    for worker in workers:
        worker.kill()


def run(main):
    """Run the `main` of a script, and report the errors that `main` itself does not report."""
    if hasattr(sys.stdout, "reconfigure"):      # a console may lack the letters of a folder's name
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    at_once = False
    threads.watch()
    try:
        main()
        code = 0
    except SystemExit as e:
        code, at_once = e.code, True
    except KeyboardInterrupt:
        code, at_once = 130, True               # the code that shells use for Ctrl-C
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full: train with --grad-accum 2, --grad-checkpointing, --shard or "
              "a smaller --global-batch-size; draw with a smaller --batch-size", file=sys.stderr)
        code = 2
    except Exception as e:
        if several() and isinstance(e, RuntimeError) and re.search(LOST, str(e), re.I):
            reason = f"process {os.environ['RANK']} lost another process, whose own message says why"
        elif isinstance(e, ConnectionError) or "DataLoader worker" in str(e):
            reason = ("a process that reads data has ended, perhaps for lack of memory: try fewer --num-workers, or in "
                      "a container a larger --shm-size")
        elif several():
            reason = None
        else:
            raise
        if reason:
            print(f"error: {reason}. The same command continues from the last checkpoint. ({e})", file=sys.stderr)
        else:
            traceback.print_exc()
        code = 1
    finally:
        end([*multiprocessing.active_children(), *HELPERS])
    if at_once or several():
        # Nothing is left to do. The interpreter would free models and connections in any order, and we saw it hang or
        # abort, the latter also with a checkpoint half written; or it would wait for torch.compile.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else code is not None)
    raise SystemExit(code)


def smoke(main, argv, args):
    """train.py --smoke: a little of everything, in a temporary folder. main: of train.py."""
    if args.dry_run is not None or several() or args.resume not in ("auto", "none"):
        raise UserError("--smoke does not work with --dry-run, torchrun or --resume PATH: drop them")
    with tempfile.TemporaryDirectory() as folder:
        for steps in "1", "3":
            main([*(a for a in argv if a != "--smoke"), "--results-dir", folder, "--name", "smoke", "--resume", "auto",
                  "--sample-every", "1", "--log-every", "1", "--ckpt-every", "1", "--max-steps", steps],
                 ["--steps", "1", "--num-samples", "4"])
    print("smoke: steps, save, resume, a grid and sampling all worked")


# --- flags ----------------------------------------------------------------------------------------------------

# Flags of other programs: what ours are called, in train.py or sample.py. Names that look like ours need no line here.
OTHERS = {"--epochs": ["--max-steps"], "--iterations": ["--max-steps"], "--learning-rate": ["--lr"],
          "--dataset": ["--data"], "--checkpoint": ["--ckpt", "--resume"], "--outdir": ["--out", "--results-dir"],
          "--output": ["--out", "--results-dir"], "--guidance": ["--cfg-scale"], "--guidance-scale": ["--cfg-scale"],
          "--amp": ["--precision"], "--fp16": ["--precision"], "--bf16": ["--precision"],
          "--gpu": ["--device"], "--n": ["--num-samples"], "--config": ["--preset"],
          "--labels": ["--class-labels"], "--classes": ["--class-labels"], "--class": ["--class-labels"]}


def quoted(words):
    """A command as one line to paste: a word with a space in it needs quotes, and Windows has other quotes."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def command(program, *words):
    """`python program words` to paste. Elsewhere than in the folder of train.py it needs the program's path."""
    here = Path(__file__).resolve().parents[1]
    return quoted(["python", program if Path.cwd() == here else str(here / program), *map(str, words)])


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default, if it has one. If None stands for something else, the help must say that itself."""

    def _get_help_string(self, action):
        none = action.default is None or action.default is False or action.default == []        # but 0 is a default
        return action.help if none else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Shows defaults in --help, and reports an error in one line instead of a page of usage. description: of which the
    first line is shown, such as __doc__."""

    def __init__(self, description, **options):
        description = (description or "").partition("\n")[0]                # None under python -OO
        super().__init__(description=description, allow_abbrev=False, **options,
                         formatter_class=Defaults)

    def parse_args(self, args=None, namespace=None):
        """A shell replaces the ~ of `--out ~/a.png`, but not that of `--out=~/a.png`. Here every flag's is."""
        args = super().parse_args(args, namespace)
        for name, value in vars(args).items():
            if isinstance(value, (str, Path)):
                setattr(args, name, type(value)(os.path.expanduser(value)))
        return args

    def error(self, message):
        """If a flag is unknown, the message also names the one of ours that was probably meant."""
        ours, meant = [flag for flag in self._option_string_actions if flag.startswith("--")], []
        for flag in re.findall(r"(?<!\S)-+([a-zA-Z][\w-]*)", message.partition("unrecognized arguments: ")[2]):
            flag = f"--{flag.replace('_', '-')}"
            meant += [flag] * (flag in ours) or [f for f in OTHERS.get(flag, []) if f in ours][:1] or (
                difflib.get_close_matches(flag, ours, 1, 0.7))
        words = message.partition("unrecognized arguments: ")[2].split()
        if words and os.path.exists(words[0]):              # a path without its flag
            meant += [f"{flag} {words[0]}" for flag in ("--ckpt", "--data") if flag in ours][:1]
        hint = f"did you mean {', '.join(dict.fromkeys(meant))}? " if meant else ""
        fail(f"{message} ({hint}--help lists every flag)")


def number(kind, low=0, high=2**62, below=None):
    """For a flag's type=: reads an int or a float from `low` to `high`. below: a limit to use instead of `high`; the
    number must be less."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            which = "a whole" if kind is int else "a"
            raise argparse.ArgumentTypeError(f"{text!r} is not {which} number") from None
        if not (low <= value < below if below else low <= value <= high):
            limit = f"below {below}" if below else f"at most {high}" if high < 2**62 else "below 2^62"
            raise argparse.ArgumentTypeError(f"{text} must be at least {low} and {limit}")
        return value
    return parse


def option(text):
    """For a flag's type=: reads KEY=VALUE -> (key, value). The value is a Python literal that JSON has, or a word."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: write KEY=VALUE, for example patch=8")
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return key, value
    try:
        json.dumps(found)                       # as args.json will have it
    except TypeError:
        raise argparse.ArgumentTypeError(f"{text}: write a number, a word, or a list such as {key}=[1,2]") from None
    return key, found


# --- which flags of sample.py go together ---------------------------------------------------------------------

def refuse(*cases):
    """cases: (is it wrong?, the message with the fix). Raises UserError for the first case that is wrong."""
    for wrong, sentence in cases:
        if wrong:
            raise UserError(sentence)


def check_flags(args):
    """Refuse flags that do not go together, whatever the model."""
    refuse(
        (args.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp") or args.out.is_dir(),
         f"--out {args.out} must be a file that ends in .png, .jpg or .webp"),
        (args.eta and args.sampler == "ddpm", "--eta is DDIM's: drop it, or pass --sampler ddim"),
        (args.num_fid_samples and (args.gif or args.num_samples or args.class_labels != "all"),
         "--num-fid-samples draws random classes into a folder: drop --gif, --num-samples and --class-labels"),
        (args.denoise not in (None, "test") and not Path(args.denoise).exists(),
         f"no picture {args.denoise}: --denoise takes the path of one, or test"),
        (args.denoise not in (None, "test") and args.out.exists() and args.out.samefile(args.denoise),
         f"--out {args.out} is the picture itself, and would replace it: name another"),
        (bool(args.denoise) != bool(args.from_step),
         "--denoise and --from-step go together: --denoise photo.png --from-step 150"),
        (args.denoise and (args.gif or args.save_images or args.num_fid_samples
                           or args.cfg_scale not in (None, 1) or args.cfg_below is not None
                           or args.class_labels == "random"),
         "--denoise does not work with --gif, --save-images, --num-fid-samples, --cfg-scale, --cfg-below or "
         "--class-labels random: drop them"),
        (args.against and not args.denoise, "--against is for --denoise: drop it, or add --denoise test"),
        (args.data_dir and args.denoise != "test", "--data-dir is where --denoise test looks: drop it"),
        (args.num_samples and args.denoise not in (None, "test"),
         "--num-samples counts test images: drop it, or pass --denoise test"))


def check_model(args, model, diffusion, trained):
    """Refuse what this model cannot do. trained: the arguments of its training."""
    text, space, classes = trained.get("text"), trained.get("space"), trained["num_classes"]
    video, reads = len(trained["shape"]) == 4, getattr(model, "empty_prompt", False)
    guides = reads or (classes or text) and trained["cond_dropout"] > 0
    refuse(
        (args.prompt and not text, "this model reads no text: drop --prompt, or train with --model mdm --cond text"),
        (text and args.class_labels != "all", "this model reads text: pass --prompt instead of --class-labels"),
        ((args.text_encoder or args.text_device or args.text_precision == "bf16") and (not text or text == "bytes"),
         "this model reads no T5: drop --text-encoder, --text-device and --text-precision"),
        (args.negative_prompt is not None and not text, "this model reads no text: drop --negative-prompt"),
        (args.denoise and reads, "this model always reads a prompt, and --denoise passes none: name another"),
        (args.levels and not hasattr(diffusion, "sample_levels"),
         "--levels shows the resolutions of an mdm, and this model has one: drop it"),
        (args.levels and (args.gif or args.num_fid_samples or space),
         "--levels does not work with --gif, --num-fid-samples or latents: drop them"),
        (args.vae and not space, "this model was trained on pictures, not on latents: drop --vae"),
        (args.denoise and space, "--denoise takes pictures, but this model was trained on latents: name another"),
        (video and (args.gif or args.num_fid_samples),
         "the .gif of a video is always written, and there is no FID of videos: drop --gif and --num-fid-samples"),
        (args.num_fid_samples and text and not args.prompt,
         "this model reads text: add --prompt @captions.txt, a caption a line"),
        (args.cfg_scale not in (None, 1) and not (classes or text),
         "guidance needs classes or captions, and this model has none: drop --cfg-scale"),
        (args.cfg_scale not in (None, 1) and not guides,
         "this model never saw images without their class or caption, so it cannot be guided: drop --cfg-scale"))
    if args.denoise:
        return
    args.steps = args.steps or str(min(50, diffusion.T))
    diffusion.respaced(args.steps)                          # refuses a bad --steps before any work
    if args.cfg_scale is None:
        args.cfg_scale = 2.0 if guides else 1.0
    refuse((args.negative_prompt is not None and not guides,
            "this model never saw images without their caption, so it cannot be guided: drop --negative-prompt"),
           (args.negative_prompt is not None and args.cfg_scale == 1,
            "a negative prompt needs guidance: pass --cfg-scale 3, or drop --negative-prompt"),
           (args.cfg_below is not None and (args.cfg_scale == 1 or not hasattr(diffusion, "cfg_below")),
            "--cfg-below limits guidance, and there is none, or this model has its own: drop it"))
    if args.cfg_below is not None:
        diffusion.cfg_below = args.cfg_below


# --- which images ---------------------------------------------------------------------------------------------

def choose_labels(spec, num_classes, seeds):
    """The flag --class-labels, "all" | "random" | "0,1,2", -> a class for each seed, (B,) long; None if the model has
    no classes. Raises UserError."""
    if not num_classes:
        if spec not in ("all", "random"):
            raise UserError("this model was trained without classes: drop --class-labels")
        return None
    if spec == "random":
        return fold(seeds, num_classes) % num_classes
    try:
        labels = list(range(num_classes)) if spec == "all" else [int(s) for s in spec.split(",")]
    except ValueError:
        raise UserError(f"--class-labels {spec!r} not understood: write all, random, or numbers such as "
                        f"0,1,2") from None
    if not all(0 <= label < num_classes for label in labels):
        raise UserError(f"--class-labels {spec} is out of range: this model's classes are 0 to {num_classes - 1}")
    return torch.tensor([labels[i % len(labels)] for i in range(len(seeds))])


def read_prompts(prompts):
    """The flag --prompt, ["a moon", "@file"], -> a list of prompts; @file stands for one prompt a line of that file.
    Raises UserError."""
    found = []
    for prompt in prompts or []:
        if not prompt.startswith("@"):
            found.append(prompt)
            continue
        try:                                    # -sig: some editors begin a file with a byte order mark
            lines = Path(prompt[1:]).expanduser().read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"cannot read {prompt[1:]!r} ({e}): write one prompt a line, in UTF-8") from None
        found += [line for line in lines if line.strip()]
    if prompts and not found:
        raise UserError(f"no prompts in {' '.join(prompts)}: write one prompt a line")
    return found
