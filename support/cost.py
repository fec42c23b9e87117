"""What a model costs: the multiply-adds of a forward pass, and the memory that training needs on each GPU.

Both are counted without a GPU. The model runs on fake tensors: they have a shape and a type, but no numbers, so even
the largest preset takes seconds and almost no memory.

    multiply_adds    the work of one forward pass
    blank_batch      the fake images, labels or captions that all functions here need
    activations      the memory of one forward and backward pass, besides weights and gradients
    table            everything a GPU must hold, for each way to train
    report           such a table as text, for train.py --dry-run
    without_numbers  turns model and batch into fake ones
    Tracker          counts the bytes that are alive
    engines, operators, stand_ins    make a fake pass take the memory of a pass on CUDA

    multiply_adds(model, diffusion, blank_batch(diffusion, shape, 1, num_classes=1000))
    print(report(table(model, diffusion, blank_batch(diffusion, shape, 32, num_classes=1000), world=8, bf16=True)))

We count what PyTorch's allocator would be asked for. We do not see what kernels take for themselves (workspaces of
cuDNN, cuBLAS, cuFFT), the allocator's gaps and NCCL's buffers. benchmarks/memory.py compares with real runs.
"""
import copy
import sys
import weakref
from collections import defaultdict
from contextlib import ExitStack, nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import (DataDependentOutputException, DynamicOutputShapeException,
                                           FakeTensorMode)
from torch._library.custom_ops import CustomOpDef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from diffusion import UserError
from support.parallel import recompute

CONTEXT = 1e9               # bytes that CUDA, its kernels and the libraries take before the first tensor
aten = torch.ops.aten


# --- counting bytes -------------------------------------------------------------------------------

class Tracker(TorchDispatchMode):
    """While it is active, it counts the bytes of all storages. `now`: those that are alive; `peak`: the most so far.

    A view shares the storage of another tensor, and so does the result of an in-place operation: nothing counts
    twice. known: tensors that do not count. bodies: {custom operator: its Python function}. The function is run in
    place of the operator, so that what it allocates counts.
    """

    def __init__(self, known=(), cuda=False, bodies={}):
        super().__init__()
        self.now = self.peak = 0
        self.cuda, self.bodies, self.alive = cuda, bodies, {}
        for tensor in known:
            self.add(tensor, 0)

    def add(self, tensor, size=None):
        storage = tensor.untyped_storage()
        key = storage._cdata                                # its address
        if key not in self.alive:
            size = storage.nbytes() if size is None else size
            self.alive[key] = weakref.ref(storage, lambda _: self.free(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def free(self, key, size):
        del self.alive[key]
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.bodies:
            with self:
                out = self.bodies[func](*args)
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        if self.cuda and func is aten._fft_c2r.default:     # cuFFT destroys its input, so PyTorch gives it a copy
            self.peak = max(self.peak, self.now + args[0].numel() * args[0].itemsize)
        return out


class FusedRMSNorm(torch.autograd.Function):
    """CUDA's kernel keeps its input and one number a row. The CPU works in steps and keeps more."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x[..., :1].clone())
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def engines(model):
    """The files whose custom operators and block sizes this model may use: its own, and the fast scan's and
    convolution's."""
    names = (type(model).__module__, "support.scan", "support.longconv")
    return [sys.modules[name] for name in names if name in sys.modules]


def operators(model):
    """{custom operator in these files: its Python function}."""
    return {op._opoverload: op._init_fn for file in engines(model) for op in vars(file).values()
            if isinstance(op, CustomOpDef)}


def stand_ins(model):
    """A context in which fake tensors "on the CPU" take the memory that real ones take on CUDA."""
    stack = ExitStack()

    def replace(where, name, value):
        stack.enter_context(mock.patch.object(where, name, value, create=True))

    for file in engines(model):
        for numbers in vars(file).values():                 # block sizes: {"cpu": .., "cuda": ..}
            if isinstance(numbers, dict) and "cpu" in numbers:
                stack.enter_context(mock.patch.dict(numbers))
                numbers.pop("cpu")
        if hasattr(file, "fused"):                          # the scan on a GPU: everything but its kernels runs
            replace(file, "engine", lambda *_, fast=(file.fused, file.fused_backward): fast)
            for kernel in ("_fused", "_fused_backward"):
                replace(file, kernel, defaultdict(lambda: lambda *args, **options: None))       # [grid](..)
    if hasattr(aten, "_fused_rms_norm"):                    # PyTorch 2.9
        replace(F, "rms_norm",
                lambda x, shape, weight=None, eps=None: FusedRMSNorm.apply(x.float(), weight))
    # On CUDA autocast computes these in float32, on the CPU it does not. (Those of PyTorch's list that we use.)
    for where, names in ((F, "layer_norm group_norm softmax softplus normalize interpolate"),
                         (torch.Tensor, "softmax")):
        for name in names.split():
            def in_float32(x, *args, function=getattr(where, name), **kwargs):
                return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)
            replace(where, name, in_float32)
    return stack


# --- fake models and batches ----------------------------------------------------------------------

def blank_batch(diffusion, shape, size, num_classes=0, text=0, words=128):
    """The arguments of diffusion.loss for `size` images of `shape`, on the meta device.

    num_classes, text: as for the paper's build. words: how many words of a caption have embeddings. With text="bytes"
    there are always 16 words of 12 bytes.
    """
    with torch.device("meta"):
        batch = dict(x0=torch.empty(size, *shape), t=torch.empty(size, dtype=torch.long),
                     noise=torch.empty(size, *diffusion.noise_shape(shape)))
        if num_classes:
            batch["y"] = torch.empty(size, dtype=torch.long)
        if text:
            batch["text"] = (torch.empty(size, 16, 12, dtype=torch.long) if text == "bytes" else
                             torch.empty(size, words, text))                                # (B, words, 12 or width)
            batch["text_mask"] = torch.empty(batch["text"].shape[:2], dtype=torch.bool)     # (B, words)
    return batch


def without_numbers(model, batch):
    """-> copies of both. Their tensors are fake ones "on the CPU", and so is all that is computed from them.
    The fake mode itself is switched off again, because an ODE solver needs the real numbers of its times."""
    twin = copy.deepcopy(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in twin.modules():           # `to_empty` would do the same, but not in PyTorch 2.7
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad))
            for name, b in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(b, device="cpu"))
        return twin, {k: torch.empty_like(v, device="cpu") for k, v in batch.items()}


# --- what it costs --------------------------------------------------------------------------------

def multiply_adds(model, diffusion, batch):
    """The multiply-adds of one forward pass: half of what PyTorch's FLOP counter counts.

    A custom operator brings its own formula (`register_flop_formula`). If the model has `frozen`, we leave out what
    depends on the weights alone, since it is computed once for many images. -> None if the work depends on the numbers
    in the tensors, as with an adaptive solver.
    """
    twin, batch = without_numbers(model, batch)
    twin.eval()
    try:
        with (torch.no_grad(), getattr(twin, "frozen", nullcontext)(), FlopCounterMode(display=False) as counter,
              sdpa_kernel(SDPBackend.MATH)):                # attention as matrix products: the counter knows those
            diffusion.loss(twin, **batch)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return None
    return counter.get_total_flops() // 2


def activations(model, diffusion, batch, bf16, checkpointing=False, device="cuda"):
    """The most bytes that are alive during one forward and backward pass, besides the weights, the batch, and the
    gradients that stay. (A new gradient, before it is added to those, does count.)

    model          on the meta device, or any other: it is not changed
    batch          of `blank_batch`; a large one takes no longer than a small one
    bf16           under bf16 autocast
    checkpointing  with support.parallel.recompute
    device         "cuda", or "cpu" for what a CPU would take

    Raises UserError for an adaptive solver: its steps depend on the numbers in the tensors.
    """
    cuda, twin, batch = device != "cpu", *without_numbers(model, batch)
    twin.train()
    if checkpointing:
        recompute(twin)
    for p in twin.parameters():         # as in DDP's buckets: they exist before, and backward adds to them
        p.grad = torch.empty_like(p) if p.requires_grad else None
    weights = [*twin.parameters(), *twin.buffers()]
    known = [*weights, *(p.grad for p in weights if p.grad is not None), *batch.values()]
    try:
        with stand_ins(model) if cuda else nullcontext(), Tracker(known, cuda, operators(model)) as tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = diffusion.loss(twin, **batch)["loss"].mean()
            loss.backward()
    except (DataDependentOutputException, DynamicOutputShapeException):
        raise UserError("the work of an adaptive solver depends on the numbers it sees, so its memory is not known "
                        "beforehand: pass --set solver=rk4") from None
    return tracker.peak


def table(model, diffusion, batch, world, bf16):
    """What one of `world` GPUs must hold, in bytes -> a dict for each way to train: name, weights, gradients,
    optimizer (AdamW), ema, activations, total.

    DDP             every GPU holds everything; with gradient_as_bucket_view, so gradients exist once
    sharded         (fully_shard) every GPU holds 1/world of all that. The modules of type model.unit are gathered one
                    after the other: while one computes, the next one arrives and the last one leaves. All other
                    weights are whole from the forward pass to the end of the backward pass
    checkpointing   both ways again, with recomputation, if the model has a `unit`

    Everything is float32, except what bf16 autocast makes.
    """
    def size(parameters):
        return 4 * sum(p.numel() for p in parameters)

    units = [m for m in model.modules() if isinstance(m, getattr(model, "unit", ()))]
    everything = size(model.parameters())
    trained = size(p for p in model.parameters() if p.requires_grad)
    buffers = sum(b.numel() * b.itemsize for b in model.buffers())
    gathered = sorted((size(u.parameters()) for u in units), reverse=True)
    root = everything - sum(gathered)
    memo = {"": activations(model, diffusion, batch, bf16)}                 # the same with and without shards
    if hasattr(model, "unit"):
        memo[", checkpointing"] = activations(model, diffusion, batch, bf16, checkpointing=True)
    rows, ways = [], [("DDP" if world > 1 else "one GPU", 1, 0, 0)]
    if world > 1:
        ways.append(("sharded", world, root + sum(gathered[:3]), root + sum(gathered[:2])))
    for name, n, weights, gradients in ways:
        for end, kept in memo.items():
            row = dict(weights=everything / n + buffers + weights, gradients=trained / n + gradients,
                       optimizer=2 * trained / n, ema=everything / n + buffers, activations=kept)
            rows.append({"name": name + end, **row, "total": sum(row.values())})
    return rows


def report(rows, capacity=80e9):
    """`rows` of `table` as text, in GiB. It marks the totals that a GPU of `capacity` bytes cannot hold."""
    columns = [key for key in rows[0] if key != "name"]
    lines = [f"{'GiB on each GPU':22s}" + "".join(f"{c:>12s}" for c in columns)]
    for row in rows:
        lines.append(f"{row['name']:22s}" + "".join(f"{row[c] / 2**30:12.2f}" for c in columns)
                     + "  does not fit" * (row["total"] + CONTEXT > capacity))
    lines.append(f"A GPU of {capacity / 1e9:g} GB has room for {(capacity - CONTEXT) / 2**30:.1f} GiB, as CUDA itself "
                 f"takes {CONTEXT / 1e9:g} GB. Not counted: kernels' workspaces, the allocator's gaps, NCCL, a T5 or "
                 f"VAE, and the grids of samples (--sample-every 0 draws none).")
    return "\n".join(lines)
