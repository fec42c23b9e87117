"""What the commands share: how errors are told, and how flags are read.

What a user can put right is a `UserError` (diffusion.py). It is caught once, by `run`.
"""
import argparse
import ast
import contextlib
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from diffusion import UserError, fold

QUIET = os.environ.get("RANK", "0") != "0"              # one of torchrun's processes shows progress

# --- errors: one sentence that tells the fix, exit code 2, no traceback -------------------------

def fail(message, every_process=False):
    """Under torchrun what all processes find wrong is said once: the first one speaks and leaves, torchrun
    ends the others. One that is still there after a while has found something of its own."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and not every_process:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    where = "" if rank == "0" else f" on process {rank}"
    print(f"error{where}:", " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


# what gloo and NCCL say when they no longer hear from a process
LOST = "connection (was )?(closed|reset|refused)|timed ?out|broken pipe|remote process|socket.*closed"


def run(main):
    """What the scripts start with."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        main()
        code = 0
    except SystemExit as e:
        code = e.code
    except KeyboardInterrupt:
        code = 130                                      # the shell's for Ctrl-C
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full: train with --grad-accum 2, --grad-checkpointing, --shard or "
              "a smaller --global-batch-size, sample with a smaller --batch-size", file=sys.stderr)
        code = 2
    except Exception as e:
        goes_on, gone = "The same command goes on from what was saved.", ""
        if several and isinstance(e, RuntimeError) and re.search(LOST, str(e), re.I):
            gone = f"process {os.environ['RANK']} lost another one: above or in its machine's log stands why"
        elif isinstance(e, ConnectionError) or "DataLoader worker" in str(e):
            gone = "a process that reads data is gone, perhaps for want of memory: try fewer --num-workers"
        elif not several:
            raise
        traceback.print_exc() if not gone else print(f"error: {gone}. {goes_on} ({e})", file=sys.stderr)
        code = 1
    finally:            # at exit Python waits for workers that it asks to end, by a signal they ignore
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # or PyTorch complains that they were killed
        for worker in multiprocessing.active_children():
            worker.kill()
    if several:         # leave at once: the interpreter would free models and connections in any order (seen
        sys.stdout.flush()                              # to hang and to abort), and nothing is left to do
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else code is not None)
    raise SystemExit(code)


class Parser(argparse.ArgumentParser):
    """Shows defaults in --help, and says what is wrong in one line instead of a page of usage."""

    def __init__(self, description, **options):
        super().__init__(description=description, allow_abbrev=False, **options,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        fail(f"{message} (--help lists every flag)")


def number(kind, low=0, high=2**62, below=None):
    """For a flag's type=: the int or float that was written, if it is from low to high, or below `below`."""
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
    """For a flag's type=: KEY=VALUE -> (key, value), a Python literal or else a word."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: write KEY=VALUE, for example patch=8")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return key, value


@contextlib.contextmanager
def told_plainly():
    """Around the few calls that take the user's values: what these refuse is not a crash."""
    try:
        yield
    except (UserError, OSError) as e:
        fail(e)


# --- what to draw

def choose_labels(spec, num_classes, seeds):
    """"all" | "random" | "0,1,2" -> (B,) long labels, or None for an unconditional model."""
    if not num_classes:
        if spec not in ("all", "random"):
            raise UserError("this model was trained without classes: drop --class-labels")
        return None
    if spec == "random":
        return fold(seeds, num_classes) % num_classes
    try:
        labels = list(range(num_classes)) if spec == "all" else [int(s) for s in spec.split(",")]
    except ValueError:
        raise UserError(f"--class-labels {spec!r} not understood: write all, random, or numbers "
                         f"such as 0,1,2") from None
    if not all(0 <= label < num_classes for label in labels):
        raise UserError(f"--class-labels {spec} is out of range: this model's classes are 0 to "
                         f"{num_classes - 1}")
    return torch.tensor([labels[i % len(labels)] for i in range(len(seeds))])


def read_prompts(prompts):
    """["a moon", "@file"] -> ["a moon", a prompt for each line of the file ...]."""
    found = []
    for prompt in prompts or []:
        if not prompt.startswith("@"):
            found.append(prompt)
            continue
        try:                                            # -sig: editors write a BOM
            lines = Path(prompt[1:]).read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"cannot read {prompt[1:]!r} ({e}): write a prompt a line, in UTF-8") from None
        found += [line for line in lines if line.strip()]
    if prompts and not found:
        raise UserError(f"no prompts in {' '.join(prompts)}: write a prompt a line")
    return found
