"""A GPU, simulated: LD_PRELOAD=LIBRARY python simulate.py FOLDER < CASES. For tests/test_gpu.py.

A tensor "on the GPU" has its numbers on the CPU here, and says that its device is cuda. So train.py and sample.py run
as they are, and with the right numbers. Every operation is watched: does it mix devices, copy between them, wait for
the GPU, or do what Apple's MPS cannot? What happens inside a GPU's kernels is not seen.

LIBRARY   fake_cuda.cpp, compiled
FOLDER    pictures to train on
CASES     JSON: {name: flags of train.py, or options of a block of cunet.py}

Prints JSON: {name: {"error", "gradients", "predictions", "mps", "training", "drawing"}}. The last two count, for each
function that asked, {"copies": those that need not wait, "waits": all that waits}; "training" does so for each step.
"""
import collections
import contextlib
import io
import json
import os
import re
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample
import train
from diffusion import Diffusion
from support import checkpoint, cost, inputs, parallel, scan
from support.checkpoint import load_paper

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = str(ROOT), str(ROOT / "support"), str(ROOT / "examples")
aten = torch.ops.aten
# These give the CPU a number, or a size, that the GPU must compute first. Indexing by a mask does so, too.
WAIT = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2,
        aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave, aten.bincount}


class OnGPU(torch.Tensor):
    """A tensor "on the GPU"; `numbers` is the one on the CPU that has its numbers."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype,
            device="cuda:0")
        tensor.numbers = numbers
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return MACHINE.run(func, args, kwargs or {})

    def tolist(self):                           # PyTorch has none for classes of one's own
        return self.cpu().tolist()


def each(f, x):
    """f of each tensor in nested lists."""
    if isinstance(x, torch.Tensor):
        return f(x)
    return type(x)([each(f, v) for v in x]) if isinstance(x, (list, tuple)) else x


def place():
    """The function of this repository that asked: "cunet.odeint". In backward there may be none."""
    frame = sys._getframe(1)
    while frame and (os.path.dirname(frame.f_code.co_filename) not in FOLDERS or frame.f_code.co_name.startswith("<")):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}" if frame else "backward"


class Machine(TorchDispatchMode):
    """The CPU and its GPU. While it is active, it sees all operations."""

    def begin(self):
        self.copies, self.waits, self.refused, self.bodies = collections.Counter(), collections.Counter(), set(), {}

    def counts(self):
        """What was counted since the last call."""
        counts = {"copies": dict(self.copies), "waits": dict(self.waits)}
        self.copies.clear()
        self.waits.clear()
        return counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        tensors = []

        def take(t):
            tensors.append(t)
            return t.numbers if isinstance(t, OnGPU) else t
        own, own_kwargs = each(take, args), {k: each(take, v) for k, v in kwargs.items()}
        known = {id(t.numbers): t for t in tensors if isinstance(t, OnGPU)}
        target = kwargs.get("device") and torch.device(kwargs["device"]).type
        if not known and target != "cuda":
            return func(*args, **kwargs)
        if func in self.bodies:                 # look into our own operators
            with self:
                return self.bodies[func](*args)
        if target:
            own_kwargs["device"] = "cpu"
        name, to_gpu = func.overloadpacket, target != "cpu"
        if name in (aten._to_copy, aten.copy_):
            source, to_gpu = (args[1], isinstance(args[0], OnGPU)) if name is aten.copy_ else (args[0], to_gpu)
            if isinstance(source, OnGPU) != to_gpu:
                free = to_gpu and (kwargs.get("non_blocking") or name is aten.copy_ and args[2:] == (True,))
                (self.copies if free else self.waits)[place()] += 1
        else:
            by_index = name in (aten.index, aten.index_put_)
            for stranger in (t for t in tensors if t.ndim and not isinstance(t, OnGPU)):
                if not by_index:                # PyTorch itself moves indices
                    raise RuntimeError(f"{func}: one tensor on the GPU, and one of {tuple(stranger.shape)} on the CPU")
                self.waits[place()] += 1
            if name in WAIT or by_index and any(i is not None and i.dtype == torch.bool for i in args[1]):
                self.waits[place()] += 1
        # An operation in place returns the tensor that it got
        out = each(lambda t: known[id(t)] if id(t) in known else OnGPU(t.resolve_conj()) if to_gpu else t,
                   func(*own, **own_kwargs))
        if self.bodies:
            each(lambda t: self.check_mps(func, t), [*tensors, out])
        return out

    def check_mps(self, func, t):
        """Note what Apple's MPS would refuse, or compute wrongly."""
        name = func._schema.name.removeprefix("aten::")
        if ".".join(filter(None, (name, func._schema.overload_name))) in NO_KERNEL:
            self.refused.add(f"{place()}: MPS has no {name}")
        if isinstance(t, OnGPU) and t.dtype in (torch.float64, torch.complex128):
            self.refused.add(f"{place()}: {name} of {t.dtype}")
        # by way of float32: https://github.com/pytorch/pytorch/issues/154171 and 190052
        if (name in ("abs", "remainder", "fmod", "floor_divide", "div") and t.dtype in (torch.int32, torch.int64)
                and isinstance(t, OnGPU) and (t.numbers.abs() > 2**24).any()):
            self.refused.add(f"{place()}: {name} of integers above 2^24")


def without_mps():
    """The operators of PyTorch, "name.overload", that have kernels for some devices, but none for Apple's MPS. From the
    table that PyTorch itself is built of."""
    table = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    kernels, delegate = {}, {}
    for entry in re.split(r"\n(?=- func: )", table)[1:]:
        name = re.match(r"- func: ([\w.]+)", entry)[1]
        lines = re.search(r"\n  dispatch:\n((?:    .*(?:\n|$))+)", entry)
        kernels[name] = set(re.findall(r"\w+(?=[\w, ]*:)", re.sub("#.*", "", lines[1]))) if lines else set()
        if own := re.search(r"structured_delegate: ([\w.]+)", entry):
            delegate[name] = own[1]
    return {name for name in kernels if (found := kernels[delegate.get(name, name)])
            and "MPS" not in found and not any(kind.startswith("Composite") for kind in found)}


def case(flags, folder):
    """Train and draw, and tell what was seen."""
    MACHINE.begin()
    seen, kept = {"training": [], "gradients": [], "predictions": []}, {}
    batches, spread, make_batch = inputs.batches, parallel.Team.spread, train.make_batch
    clip, split = torch.nn.utils.clip_grad_norm_, Diffusion.split

    def marked(dataset, order, workers, pinned):            # a step is what happens between two batches
        assert pinned, "only from pinned memory a copy need not wait"
        for n, batch in enumerate(batches(dataset, order, workers, pinned=False)):
            counts = MACHINE.counts()
            if n:
                seen["training"].append(counts)
            yield batch
        seen["training"].append(MACHINE.counts())

    def spread_and_keep(team, model, average, *options):
        kept["average"], kept["model"] = average, model
        if "fp32" in flags:
            MACHINE.bodies = cost.operators(model)
        return spread(team, model, average, *options)

    def batch_and_keep(*args):
        kept["diffusion"], kept["args"], kept["encode"] = args[3:6]
        return make_batch(*args)

    def look_and_split(diffusion, out, x):
        pred, var = split(diffusion, out, x)
        seen["predictions"] = sorted({*seen["predictions"], str(pred.dtype)})
        return pred, var

    def look_and_clip(parameters, *limit):
        parameters = list(parameters)
        seen["gradients"] = sorted({f"{p.grad.dtype} {p.grad.device}" for p in parameters if p.grad is not None})
        return clip(parameters, *limit)

    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as results:
        for where, name, value in (
                (inputs, "batches", marked), (parallel.Team, "spread", spread_and_keep),
                (train, "make_batch", batch_and_keep), (Diffusion, "split", look_and_split),
                (torch.nn.utils, "clip_grad_norm_", look_and_clip),
                (checkpoint, "save", lambda *_: None), (parallel, "whole", lambda _: None)):
            stack.enter_context(mock.patch.object(where, name, value))
        said = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(said))
        stack.enter_context(MACHINE)
        try:
            train.main([*(["--data", folder] * ("--data" not in flags)), "--global-batch-size", "2", "--max-steps", "1",
                        "--sample-every", "0", "--results-dir", results, "--device", "cuda", *flags])
            args, cond = kept["args"], {}
            if args.num_classes:
                cond = {"y": torch.arange(2)}
            if kept["encode"]:
                cond = dict(zip(("text", "text_mask"), kept["encode"](args.prompts[:2])))
            MACHINE.counts()
            sample.generate(kept["average"], kept["diffusion"], tuple(args.shape), torch.arange(2), cond, 2,
                            torch.device("cuda"), progress=False, steps="2", cfg_scale=2.0 if cond else 1.0,
                            sampler="ddpm" if "fp32" in flags else "ddim")
            seen["drawing"] = MACHINE.counts()
        except BaseException:
            return {"error": said.getvalue() + traceback.format_exc()}
    return {**seen, "error": None, "mps": sorted(MACHINE.refused)}


def block(**options):
    """The waits of one block of cunet.py, in training."""
    MACHINE.begin()
    with MACHINE:
        block = load_paper("cunet").DynamicBlock(8, embedding=4, **options).to("cuda")
        MACHINE.bodies = cost.operators(block)
        state, e = torch.ones(1, 16, 4, 4, device="cuda"), torch.ones(1, 4, device="cuda")
        MACHINE.counts()
        block(state, e).sum().backward()
        return {**MACHINE.counts(), "error": None, "mps": sorted(MACHINE.refused)}


MACHINE, NO_KERNEL = Machine(), without_mps()
os.environ.pop("LD_PRELOAD", None)              # it is not for git, which train.py asks for the commit
torch.__future__.set_overwrite_module_params_on_conversion(True)        # or a parameter would stay a plain tensor
torch._C._set_only_lift_cpu_tensors(True)       # torch.tensor makes its tensor on the CPU, then moves it
for name, value in (("is_available", True), ("device_count", 1), ("_lazy_init", None), ("is_bf16_supported", True),
                    ("max_memory_allocated", 0)):
    setattr(torch.cuda, name, lambda *_, value=value, **__: value)
cost.multiply_adds = lambda *_: None            # tests/test_cost.py counts
scan.engine = lambda *_: (scan.chunked, scan.chunked_backward)          # a Triton kernel needs a real GPU

if __name__ == "__main__":
    cases = json.load(sys.stdin)
    print(json.dumps({name: block(**what) if isinstance(what, dict) else case(what, sys.argv[1])
                      for name, what in cases.items()}), flush=True)
    os._exit(0)         # at the interpreter's end PyTorch aborts now and then, as its thread for this "GPU" still lives
