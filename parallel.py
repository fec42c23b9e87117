"""One process or many: what train.py and sample.py need to know of the machine they run on.

torchrun starts a process per GPU and tells each its number, in RANK, LOCAL_RANK and WORLD_SIZE. All run the
same script; they fail together, stop together, and split a model's work in one of two ways:

    DDP     (DistributedDataParallel) each has all weights; gradients are averaged while backward runs
    shards  (FSDP2, `fully_shard`; ZeRO-3) each keeps 1/world of weights, gradients, EMA, optimizer;
            the weights of one block at a time are gathered, used and dropped. More traffic, less memory

On CPUs they talk through gloo, on GPUs through NCCL.
"""
import argparse
import ast
import contextlib
import datetime
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import warnings

import torch
import torch.distributed as dist

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
    except (ValueError, OSError) as e:
        fail(e)


# --- devices ------------------------------------------------------------------------------------

def pick_device(name):
    """"auto" -> CUDA, else Apple's MPS, else CPU. Of torchrun's processes each gets its own GPU."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    found = {"cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available() and not several, "cpu": True}
    if name == "auto":
        name = next(d for d in found if found[d])
    kind, _, index = name.partition(":")
    if not found.get(kind) or index and not (kind == "cuda" and index.isdigit()
                                             and int(index) < torch.cuda.device_count()):
        raise ValueError(f"device {name!r} is not available here: choose "
                         f"{' or '.join(d for d in found if found[d])}")
    if kind == "cuda" and several:
        index = os.environ["LOCAL_RANK"]
        if int(index) >= torch.cuda.device_count():
            fail(f"process {index} has no GPU, this machine has {torch.cuda.device_count()}: pass "
                 f"torchrun --nproc_per_node={torch.cuda.device_count()}", every_process=True)
    device = torch.device(f"{kind}:{index}" if index else kind)
    if kind == "cuda" and index:
        torch.cuda.set_device(device)
    return device


def set_precision(name, device):
    """auto, fp32 or bf16 -> is there to be bf16 autocast? On CUDA also decides on TF32: float32 matrix
    products with 10 bits of mantissa."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name != "fp32"
        if name == "auto":                  # emulated bf16, on older GPUs, would be slower
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return name == "bf16"


def memory_mb(device):
    """Peak so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:                     # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)      # bytes there, KB elsewhere


# --- the processes of a run -----------------------------------------------------------------------

class Team:
    """All processes of this run: rank of world. Without torchrun one, which says yes to itself."""

    def __init__(self, device):
        self.device = device
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world == 1:
            return
        # small agreements go over gloo, on GPUs too: to look at a number from NCCL is to wait for the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(minutes=30))

    def any(self, yes):
        """Does anybody say yes? All hear the same answer, at the same place in their work."""
        if self.world == 1:
            return bool(yes)
        votes = torch.tensor(int(yes))
        dist.all_reduce(votes)
        return votes.item() > 0

    def sum(self, x):
        """A tensor, on its device, added up over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def first(self, f):
        """What f() gives the first process, for all; the ValueError or OSError that it meets, for all."""
        told = [None, None]
        if self.rank == 0:
            try:
                told[0] = f()
            except (ValueError, OSError) as e:
                told[1] = str(e)
        if self.world > 1:
            dist.broadcast_object_list(told, device="cpu")
        if told[1] is not None:
            raise ValueError(told[1])
        return told[0]

    def spread(self, model, *averages, compiled, shard):
        """-> the module to train with: the model, compiled if asked for, inside DDP; or with the model and
        its averages cut into shards in place, each module of type `model.unit` gathered by itself."""
        if self.world > 1 and shard:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard  # here: it takes half a second to import
            # about views changed in place: no model does that to what a block returns
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")
            mesh = init_device_mesh(self.device.type, (self.world,))
            for network in (model, *averages):
                for p in network.parameters():
                    p.data = p.data.contiguous()            # shards are rows: no channels_last
                for module in list(network.modules()):
                    if isinstance(module, getattr(network, "unit", ())):
                        fully_shard(module, mesh=mesh)
                # what is in no unit stays whole from the model's forward to its backward; averages have none
                fully_shard(network, mesh=mesh, reshard_after_forward=network is not model)
        net = torch.compile(model) if compiled else model
        if self.world == 1 or shard:
            return net
        return torch.nn.parallel.DistributedDataParallel(
            net, device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True)               # else there would be a second copy of the gradients

    def leave(self):
        if self.world > 1:
            self.any(False)             # all are here: nobody waits for one that left
            dist.destroy_process_group()


def accumulate(net, last):
    """A context for the backward of one of several micro-batches: only the last exchanges gradients. Shards
    exchange every time: to wait, each GPU would have to keep all gradients whole."""
    return contextlib.nullcontext() if last or not hasattr(net, "no_sync") else net.no_sync()


def full(x):
    """A tensor, put together if it lies in shards: then all processes must call this."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def whole(state):
    """Nested dicts and lists of tensors -> the same on the CPU, shards put together. All processes must
    call it; the first one keeps the result, for the others it is empty."""
    if isinstance(state, dict):
        return {k: whole(v) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return [whole(v) for v in state]
    if not isinstance(state, torch.Tensor):
        return state
    one = full(state)
    return one.cpu() if int(os.environ.get("RANK", 0)) == 0 else None


def load_optimizer(optimizer, state):
    """The state as `whole` gave it, cut as the optimizer's parameters are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, moments in state["state"].items():
        if hasattr(params[i], "device_mesh"):
            from torch.distributed.tensor import distribute_tensor
            moments.update({k: distribute_tensor(v, params[i].device_mesh, params[i].placements)
                            for k, v in moments.items() if v.ndim})
    # rates and decays are the command line's, not the file's
    optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})


class Interruption:
    """Ctrl-C or a preempting SIGTERM: finish the step, save, leave. A second Ctrl-C kills; a second
    SIGTERM does not, since under a scheduler and torchrun a process may well get two."""

    def __init__(self):
        self.asked, self.handlers = False, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.ask)

    def ask(self, number, _):
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(number, self.handlers[number])

    def over(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
