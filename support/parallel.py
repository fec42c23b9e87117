"""One process or many: what train.py and sample.py need to know of the machine they run on.

torchrun starts a process per GPU and tells each its number, in RANK, LOCAL_RANK and WORLD_SIZE. All run the
same script; they fail together, stop together, and split a model's work in one of two ways:

    DDP     (DistributedDataParallel) each has all weights; gradients are averaged while backward runs
    shards  (FSDP2, `fully_shard`; ZeRO-3) each keeps 1/world of weights, gradients, EMA, optimizer;
            the weights of one block at a time are gathered, used and dropped. More traffic, less memory

On CPUs they talk through gloo, on GPUs through NCCL.
"""
import contextlib
import datetime
import functools
import math
import os
import signal
import sys
import warnings

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from diffusion import UserError
from support.cli import fail

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
        raise UserError(f"device {name!r} is not available here: choose "
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
            except (UserError, OSError) as e:
                told[1] = str(e)
        if self.world > 1:
            dist.broadcast_object_list(told, device="cpu")
        if told[1] is not None:
            raise UserError(told[1])
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


def recompute(model):
    """Activation checkpointing: from forward to backward each module of type `model.unit` keeps its inputs alone, and
    in backward it runs once more. Takes a third more time."""
    for module in model.modules():
        if isinstance(module, model.unit):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


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
