"""One process or many: what train.py and sample.py need to know of the machine they run on.

torchrun starts one process for each GPU and tells it its number in RANK, LOCAL_RANK and WORLD_SIZE. On a CPU
`share_cores` does the same for the cores. All processes run the same script. They fail together, stop together, and
split the work in one of two ways:

    DDP      DistributedDataParallel: each process has all weights. Gradients are averaged while backward runs.
    shards   FSDP2, `fully_shard`; ZeRO-3: each process keeps 1/world of weights, gradients, average and optimizer. The
             weights of one block at a time are gathered, used and dropped. This sends more data and needs less memory.

The processes talk through gloo on CPUs and through NCCL on GPUs.
"""
import contextlib
import datetime
import functools
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from diffusion import UserError
from support import threads
from support.cli import HELPERS, QUIET, fail, processes, several

# --- devices ------------------------------------------------------------------------------------------------

def pick_device(name):
    """The flag --device -> a torch.device. "auto" is CUDA, else Apple's MPS, else the CPU. Each of torchrun's processes
    gets a GPU of its own. Raises UserError."""
    found = {"cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available() and not several(), "cpu": True}
    if name == "auto":
        name = next(d for d in found if found[d])
    kind, _, index = name.partition(":")
    if not found.get(kind) or index and not (kind == "cuda" and index.isdigit()
                                             and int(index) < torch.cuda.device_count()):
        raise UserError(f"device {name!r} is not available here: choose {' or '.join(d for d in found if found[d])}")
    if kind == "cuda" and several():
        index = os.environ.get("LOCAL_RANK", "")
        if not index.isdigit():
            raise UserError("LOCAL_RANK does not tell the number of this process's GPU: start several processes by "
                            "torchrun, which sets it")
        if int(index) >= torch.cuda.device_count():
            fail(f"process {index} has no GPU, because this machine has {torch.cuda.device_count()}: pass "
                 f"torchrun --nproc_per_node={torch.cuda.device_count()}", every_process=True)
    device = torch.device(f"{kind}:{index}" if index else kind)
    if kind == "cuda" and index:
        torch.cuda.set_device(device)
    return device


def set_precision(name, device):
    """The flag --precision: "auto" | "fp32" | "bf16" -> use bf16 autocast? On CUDA this also turns TF32 on or off:
    float32 matrix products with a mantissa of 10 bits."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if name == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = name != "fp32"        # convolutions have their own switch
        if name == "auto":                      # older GPUs only emulate bf16, which is slower than float32
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return name == "bf16"


def micro_batch(args, world):
    """How many images each of `world` processes computes at once. Raises UserError."""
    parts = world * args.grad_accum
    micro, rest = divmod(args.global_batch_size, parts)
    if rest:
        raise UserError(f"--global-batch-size {args.global_batch_size} cannot be split over {world} processes x "
                        f"--grad-accum {args.grad_accum}: try {max(1, micro) * parts}")
    if args.shard and world == 1:
        raise UserError("--shard splits a model over processes, but only one runs: start more by torchrun, or drop it")
    return micro


def memory_mb(device):
    """The peak so far in MiB: of the GPU if there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:                         # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)        # macOS counts bytes, others KiB


# --- the processes of a run ---------------------------------------------------------------------------------

def share_cores(args):
    """On a CPU, train with up to four processes that share the cores. This one starts the others, as torchrun would.

    The threads of one process wait for one another after each of a step's thousands of operations, processes once a
    step. Beside busy programs processes are up to twice as fast, and alone about as fast (docs/speed.md). The
    sums are the same up to rounding. We do it on Linux, where we could measure it, and for the papers' networks: with
    several processes, all parameters must have a part in the loss, and yours may not. A T5 is too large to load
    twice. And a debugger, profiler or notebook that runs train.py would be started again with it."""
    before = sys.orig_argv[1:-len(sys.argv)]
    plain = sys.orig_argv[-len(sys.argv):] == sys.argv and all(a.startswith("-") and "m" not in a for a in before)
    if (not plain or processes()[1] > 1 or threads.SET or sys.platform != "linux" or args.shard
            or args.model.endswith(".py") or args.text_encoder != "bytes" or pick_device(args.device).type != "cpu"):
        return
    cores = torch.get_num_threads()
    fits = (n for n in (1, 2, 3, 4) if n <= cores and args.global_batch_size % (n * args.grad_accum) == 0)
    world = max(fits, key=lambda n: (n * (cores // n), n), default=1)       # no core may be idle
    if world == 1:
        return
    share_cores.all = cores
    share_cores.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)   # 0: any free port
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(share_cores.store.port),
                      TORCHELASTIC_USE_AGENT_STORE="True",              # the store is there already
                      GLOO_SOCKET_IFNAME=os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    each = cores // world
    threads.use(each)
    HELPERS.extend(subprocess.Popen(            # in a session of its own: a Ctrl-C comes to us, and we tell the others
        [sys.executable, *sys.orig_argv[1:]], start_new_session=True,
        env={**os.environ, "RANK": str(r), "LOCAL_RANK": str(r), "OMP_NUM_THREADS": str(each)})
        for r in range(1, world))
    for helper in HELPERS:
        threading.Thread(target=watch, args=(helper,), daemon=True).start()


def watch(helper):
    """If a helper fails, this process may wait for it without end: then leave, too."""
    code = helper.wait()
    if code:
        time.sleep(5)                           # there may be a better message on its way
        print(f"error: a process that trains with this one has ended (code {code}), perhaps for lack of memory. The "
              f"same command continues from the last checkpoint; with OMP_NUM_THREADS={share_cores.all} before it, "
              f"in one process", file=sys.stderr, flush=True)
        for other in HELPERS:
            other.kill()
        os._exit(1)


@contextlib.contextmanager
def all_cores():
    """While the helpers wait or are gone, this process may use their cores."""
    own = torch.get_num_threads()
    if HELPERS:
        threads.use(share_cores.all)
    try:
        yield
    finally:
        if HELPERS:
            threads.use(own)


class Team:
    """All processes of this run; this one is number `rank` of `world`. The first, rank 0, prints and writes files for
    all. Without torchrun there is one process, and it agrees with itself. hours: how long a process waits for another
    one that is busy; one that has ended is noticed at once."""

    def __init__(self, device, hours=0.5):
        self.device = device
        self.rank, self.world = processes()
        if self.world > 1:
            # Small agreements go through gloo, on GPUs too: to read a number from NCCL is to wait for the GPU.
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                        timeout=datetime.timedelta(hours=hours))
            except ValueError as e:             # one of torchrun's variables is missing
                raise UserError(f"{e}: start several processes by torchrun") from None

    def say(self, text):
        """Print, once for all processes."""
        if self.rank == 0:
            print(text, flush=True)

    def any(self, yes):
        """Does any process say yes? All get the same answer, at the same place in their work."""
        if self.world == 1:
            return bool(yes)
        votes = torch.tensor(int(yes))
        dist.all_reduce(votes)
        return votes.item() > 0

    def sum(self, x):
        """Add up a tensor over all processes, in place, on its device."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def first(self, f, *args):
        """The first process calls f(*args). All get what it returns. If it raises a UserError or an OSError, all raise
        a UserError with that message."""
        answer, error = None, None
        if self.rank == 0:
            try:
                answer = f(*args)
            except (UserError, OSError) as e:
                error = str(e)
        if self.world > 1:
            told = [answer, error]
            dist.broadcast_object_list(told, device="cpu")
            answer, error = told
        if error is not None:
            raise UserError(error)
        return answer

    def copy(self, path, to):
        """Send the file `path` of the first process to the others, each of which writes it into `to`."""
        size = self.first(os.path.getsize, path)
        with open(path, "rb") if self.rank == 0 else open(to, "wb") as f:
            for start in range(0, size, 2**26):
                part = torch.empty(min(2**26, size - start), dtype=torch.uint8)                 # 64 MiB
                if self.rank == 0:
                    f.readinto(part.numpy())
                dist.broadcast(part, 0)
                if self.rank > 0:
                    f.write(part.numpy())
        self.any(False)                         # wait until all have written it

    def spread(self, model, average, compiled, shard):
        """Put a model and the average of its weights on the device -> the module to train with: the model, compiled if
        asked for, and inside DDP if there are several processes. shard: cut both into shards, in place; only the first
        process's need numbers. Raises UserError."""
        if shard:
            from torch.distributed.device_mesh import init_device_mesh
            mesh = init_device_mesh(self.device.type, (self.world,))
            if self.device.type == "cpu":           # gradients are averaged so; PyTorch 2.7 and 2.8 give their sum
                mean = torch.empty(1)
                dist.reduce_scatter_tensor(mean, torch.ones(self.world), op=dist.ReduceOp.AVG)
                if mean != 1:
                    raise UserError(f"on CPUs, PyTorch {torch.__version__} adds up the gradients of shards instead of "
                                    f"averaging them: drop --shard, or update torch")
        for network in (model, average):
            cut(network, mesh, self.device) if shard else network.to(self.device)
        net = torch.compile(model) if compiled else model
        if self.world == 1 or shard:
            return net
        return torch.nn.parallel.DistributedDataParallel(
            net, device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True)       # or there would be a second copy of the gradients

    def leave(self):
        """Wait for all, so that nobody waits for one that has left; then end the process group. `votes` lives longer
        than the group: a thread of the group may be about to free it, for which it needs Python's lock, and the end of
        the group waits for that thread and has the lock."""
        if self.world > 1:
            votes = torch.zeros(())
            dist.all_reduce(votes)
            dist.destroy_process_group()


def cut(network, mesh, device):
    """Cut a network into shards, in place. The first process has it on the CPU, and in the others it is on the device
    "meta", without numbers. Each module of type `network.unit` is sent to the devices of all processes, is cut and
    later gathered by itself: no device ever holds the whole network."""
    from torch.distributed.fsdp import fully_shard      # imported here, because it takes half a second
    # PyTorch warns of views that are changed in place: no model does that to what a block returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    # What is in no unit stays gathered from forward to backward; the average has no backward.
    trains = any(p.requires_grad for p in network.parameters())
    units = [m for m in network.modules() if isinstance(m, getattr(network, "unit", ()))]
    for module in dict.fromkeys([*units, network]):
        others = [x for m in module.modules() for x in vars(m).values() if isinstance(x, torch.Tensor)]
        for x in (*module.parameters(), *module.buffers(), *others):
            if hasattr(x, "device_mesh"):               # it is in a unit, and cut
                continue
            numbers = (x.detach().to(device).contiguous() if dist.get_rank() == 0 else     # a shard is some rows, so
                       torch.empty(x.shape, dtype=x.dtype, device=device))                 # there is no channels_last
            dist.broadcast(numbers, 0)
            # x gets other contents, but stays the same object: a weight may have two places in a network
            torch.utils.swap_tensors(x, torch.nn.Parameter(numbers, x.requires_grad) if
                                     isinstance(x, torch.nn.Parameter) else numbers)
        fully_shard(module, mesh=mesh, reshard_after_forward=not (trains and module is network))


def recompute(model):
    """Activation checkpointing: between forward and backward, each module of type `model.unit` keeps only its inputs.
    In backward it runs a second time. That takes a third more time. Raises UserError if the model has no `unit`."""
    if not hasattr(model, "unit"):
        raise UserError("this model does not say which of its modules to run a second time (unit): drop "
                        "--grad-checkpointing")
    for module in model.modules():
        if isinstance(module, model.unit):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def accumulate(net, last):
    """A context for the backward of one of several micro-batches: only that of the last exchanges gradients. Shards
    exchange them every time. To wait, each GPU would have to keep all gradients."""
    return contextlib.nullcontext() if last or not hasattr(net, "no_sync") else net.no_sync()


# --- shards in checkpoints ----------------------------------------------------------------------------------
# PyTorch's get_optimizer_state_dict and set_optimizer_state_dict do the same. They are not used here because they take
# half a second to import, and because the second fails if some parameter has had no gradient yet.

def full(x):
    """A tensor, put together if it lies in shards: then all processes must call this."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def whole(state):
    """Nested dicts and lists of tensors -> copies on the CPU, with shards put together. All processes must call this.
    The first process gets the tensors, the others get None in their place."""
    if isinstance(state, dict):
        return {k: whole(v) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return [whole(v) for v in state]
    if not isinstance(state, torch.Tensor):
        return state
    tensor = full(state)
    return tensor.to("cpu", copy=tensor is state) if processes()[0] == 0 else None


def load_optimizer(optimizer, state):
    """Load the state that `whole` made of an optimizer's; cut it where the parameters are cut. Rates and decays stay
    those of the command line."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, moments in state["state"].items():
        if hasattr(params[i], "device_mesh"):
            from torch.distributed.tensor import distribute_tensor
            moments.update({k: distribute_tensor(v, params[i].device_mesh, params[i].placements)
                            for k, v in moments.items() if v.ndim})
        else:       # in the layout of the weight, else AdamW is wrong; not mapped from the file: Windows keeps it
            moments.update({k: torch.empty_like(params[i]).copy_(v) if v.ndim else v.clone()
                            for k, v in moments.items()})
    optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})


# --- signals ------------------------------------------------------------------------------------------------

class Interruption:
    """Ctrl-C, the SIGTERM of a scheduler, or the SIGHUP of a terminal that closes: finish the step, save, leave.
    `asked` tells that one came, and we say so at once: a step, or a grid of samples, may take a minute. A second Ctrl-C
    ends the process at once. A second SIGTERM does not: a scheduler and torchrun may well send one each. Before the
    first `next` there is nothing to save, and signals mean what they always do."""

    def __init__(self):
        self.asked, self.waiting, self.handlers = False, False, {}

    def next(self, batches):
        """The next of `batches`. None after the last one, or if a signal came, also while this process waits for the
        batch: the data may lie on a machine that no longer answers."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP") if not self.handlers else ():
            number = getattr(signal, name, None)                # Windows has no SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:           # nohup ignores it
                self.handlers[number] = signal.signal(number, self.ask)
        try:
            self.waiting = True
            batch = None if self.asked else next(batches, None)
            self.waiting = False
            return batch
        except KeyboardInterrupt:
            return None

    def ask(self, number, _):
        again = ". Ctrl-C again: quit without saving" if number == signal.SIGINT else ""
        if not (self.asked or QUIET):
            with contextlib.suppress(OSError):  # print() may be interrupted by this very signal; a terminal may be gone
                os.write(2, f"\nfinishing this step, then saving{again}\n".encode())
        self.asked = True
        if again:
            signal.signal(number, self.handlers[number])
        if self.waiting:                        # only an exception ends a read()
            self.waiting = False
            raise KeyboardInterrupt

    def over(self):
        """Signals mean again what they meant before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
