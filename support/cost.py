"""What a model costs, counted without a GPU, by tensors that have a shape, a type and no numbers: the multiply-adds
of a forward pass, and the memory of training.

    multiply_adds(model, diffusion, blank_batch(diffusion, shape, 1, num_classes=1000))
    table(model, diffusion, blank_batch(diffusion, shape, 32, num_classes=1000), world=8, bf16=True)

Counted is what PyTorch's allocator would be asked for. Not seen: what kernels take for themselves (workspaces
of cuDNN, cuBLAS, cuFFT), the allocator's gaps, NCCL's buffers. benchmarks/memory.py compares with real runs.
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


class Tracker(TorchDispatchMode):
    """Adds up the bytes of storages made while it is active, takes off those that are freed: `now`, `peak`. A
    view, or what an in-place operation returns, has the storage of another tensor: nothing counts twice.
    Storages of `known` tensors do not count at all. bodies: {custom operator: its Python function}, which is
    run, so that what it allocates counts."""
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
        if self.cuda and func is aten._fft_c2r.default:     # cuFFT destroys its input, so it gets a copy
            self.peak = max(self.peak, self.now + args[0].numel() * args[0].itemsize)
        return out


class FusedRMSNorm(torch.autograd.Function):
    """CUDA's kernel keeps its input and a number per row; the CPU does it in steps and keeps more."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x[..., :1].clone())
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def engines(model):
    """The files whose custom operators and sizes of blocks a model may use: its own and the fast forms'."""
    names = (type(model).__module__, "support.scan", "support.longconv")
    return [sys.modules[name] for name in names if name in sys.modules]


def operators(model):
    """{custom operator of these files: its Python function}."""
    return {op._opoverload: op._init_fn for file in engines(model) for op in vars(file).values()
            if isinstance(op, CustomOpDef)}


def stand_ins(model, cuda):
    """A context in which tensors without numbers, "on the CPU", need what real ones need on CUDA."""
    stack = ExitStack()

    def replace(where, name, value):
        stack.enter_context(mock.patch.object(where, name, value, create=True))

    if not cuda:
        return stack

    for file in engines(model):
        for numbers in vars(file).values():                 # sizes of blocks, by kind of device
            if isinstance(numbers, dict) and "cpu" in numbers:
                stack.enter_context(mock.patch.dict(numbers))
                numbers.pop("cpu")
        if hasattr(file, "fused"):                          # the scan: all of it but the kernels
            replace(file, "engine", lambda *_, fast=(file.fused, file.fused_backward): fast)
            for kernel in ("_fused", "_fused_backward"):
                replace(file, kernel, defaultdict(lambda: lambda *args, **options: None))       # [grid](..)
    if hasattr(aten, "_fused_rms_norm"):                    # PyTorch 2.9
        replace(F, "rms_norm",
                lambda x, shape, weight=None, eps=None: FusedRMSNorm.apply(x.float(), weight))
    # Autocast takes these to float32 on CUDA, but not on the CPU. (Of the list, what networks use.)
    for where, names in ((F, "layer_norm group_norm softmax softplus normalize interpolate"),
                         (torch.Tensor, "softmax")):
        for name in names.split():
            def in_float32(x, *args, function=getattr(where, name), **kwargs):
                return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)
            replace(where, name, in_float32)
    return stack


def blank_batch(diffusion, shape, size, num_classes=0, text=0, words=128):
    """The arguments of diffusion.loss for `size` images of `shape`, on the meta device. num_classes and text
    as for the paper's build; `words` of a caption, for embeddings (text="bytes": 16 words of 12 bytes)."""
    with torch.device("meta"):
        batch = dict(x0=torch.empty(size, *shape), t=torch.empty(size, dtype=torch.long),
                     noise=torch.empty(size, *diffusion.noise_shape(shape)))
        if num_classes:
            batch["y"] = torch.empty(size, dtype=torch.long)
        if text:
            batch["text"] = (torch.empty(size, 16, 12, dtype=torch.long) if text == "bytes" else
                             torch.empty(size, words, text))
            batch["text_mask"] = torch.empty(batch["text"].shape[:2], dtype=torch.bool)
    return batch


def without_numbers(model, diffusion, batch):
    """Copies of the three whose tensors are "on the CPU" and have no numbers, and what is made from them has none
    either. The mode is not left on: solvers of ODEs need the numbers of their times."""
    twin, diffusion = copy.deepcopy(model), copy.copy(diffusion)
    if hasattr(diffusion, "mixed"):
        diffusion.mixed = None          # mdm: which rows have which resolutions is random; here all have all
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = {k: torch.empty_like(v, device="cpu") for k, v in batch.items()}
        for module in twin.modules():
            for store in (module._parameters, module._buffers):
                for name, old in store.items():
                    if old is not None:
                        store[name] = torch.empty_like(old, device="cpu")
                    if isinstance(old, torch.nn.Parameter):
                        store[name] = torch.nn.Parameter(store[name], old.requires_grad)
    return twin, diffusion, batch


def multiply_adds(model, diffusion, batch):
    """Of one forward pass: half of what PyTorch's FLOP counter counts. Custom operators tell it their own formulas
    (`register_flop_formula`). What depends on weights alone and is made once for many images, if the model has
    `frozen`, is left out. None where the work depends on numbers, as that of adaptive solvers does."""
    twin, diffusion, batch = without_numbers(model, diffusion, batch)
    twin.eval()
    try:
        with (torch.no_grad(), getattr(twin, "frozen", nullcontext)(), FlopCounterMode(display=False) as counter,
              sdpa_kernel(SDPBackend.MATH)):                # attention as matrix products, which the counter knows
            diffusion.loss(twin, **batch)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return None
    return counter.get_total_flops() // 2


def activations(model, diffusion, batch, bf16, checkpointing=False, device="cuda"):
    """The peak, in bytes, of what is alive in one forward and backward pass besides the weights, the batch,
    and gradients where they are kept (a gradient on its way there counts).

    model on the meta device (any other is left alone, too); batch as by `blank_batch`; bf16: under autocast;
    checkpointing: with `recompute`; device: "cuda", or "cpu" as a CPU would do it. Takes as long
    for large batches as for small ones. Raises ValueError for solvers that choose their steps by numbers.
    """
    cuda, twin, diffusion, batch = device != "cpu", *without_numbers(model, diffusion, batch)
    twin.train()
    if checkpointing:
        recompute(twin)
    for p in twin.parameters():         # as in DDP's buckets: there before, and added to
        p.grad = torch.empty_like(p) if p.requires_grad else None
    weights = [*twin.parameters(), *twin.buffers()]
    known = [*weights, *(p.grad for p in weights if p.grad is not None), *batch.values()]
    try:
        with stand_ins(model, cuda), Tracker(known, cuda, operators(model)) as tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = diffusion.loss(twin, **batch)["loss"].mean()
            loss.backward()
    except (DataDependentOutputException, DynamicOutputShapeException):
        raise UserError("the work of this model depends on its numbers, as that of adaptive solvers does: "
                         "its memory cannot be told before") from None
    return tracker.peak


def table(model, diffusion, batch, world, bf16, units=None):
    """-> a dict for each way to train on `world` GPUs, in bytes on one GPU: weights, gradients, optimizer
    (AdamW), ema, activations, total; and its name. All in float32 but, with bf16, what autocast makes.

    The ways: DDP (with gradient_as_bucket_view, so that gradients exist once); sharded (`fully_shard`), where
    each GPU keeps 1/world of all that; and both with activation checkpointing, if the model has it. Sharded,
    the modules in `units` (None: those of type model.unit) are gathered one after the other, the next while
    one computes and the last is let go, and all other parameters from the forward pass to the end of the
    backward pass.
    """
    def size(parameters):
        return 4 * sum(p.numel() for p in parameters)

    if units is None:
        units = [m for m in model.modules() if isinstance(m, getattr(model, "unit", ()))]
    everything = size(model.parameters())
    trained = size(p for p in model.parameters() if p.requires_grad)
    buffers = sum(b.numel() * b.itemsize for b in model.buffers())
    gathered = sorted((size(u.parameters()) for u in units), reverse=True)
    root = everything - sum(gathered)
    memo = {"": activations(model, diffusion, batch, bf16)}                 # sharding changes none
    if hasattr(model, "unit"):
        memo[", checkpointing"] = activations(model, diffusion, batch, bf16, checkpointing=True)
    rows = []
    for name, n, weights, gradients in (("DDP", 1, 0, 0), (
            "sharded", world, root + sum(gathered[:3]), root + sum(gathered[:2])))[:1 + (world > 1)]:
        for end, kept in memo.items():
            row = dict(weights=everything / n + buffers + weights, gradients=trained / n + gradients,
                       optimizer=2 * trained / n, ema=everything / n + buffers, activations=kept)
            rows.append({"name": (name if world > 1 else "one GPU") + end, **row,
                         "total": sum(row.values())})
    return rows


def report(rows, capacity=80e9):
    """`rows` of `table` as lines of text, in GiB; totals that `capacity` bytes cannot hold are marked."""
    columns = [key for key in rows[0] if key != "name"]
    lines = [f"{'GiB on each GPU':22s}" + "".join(f"{c:>12s}" for c in columns)]
    for row in rows:
        lines.append(f"{row['name']:22s}" + "".join(f"{row[c] / 2**30:12.2f}" for c in columns)
                     + "  does not fit" * (row["total"] + CONTEXT > capacity))
    lines.append(f"A GPU of {capacity / 1e9:g} GB has room for {(capacity - CONTEXT) / 2**30:.1f} GiB: "
                 f"{CONTEXT / 1e9:g} GB are CUDA's own. Not counted: kernels' workspaces, gaps, NCCL, a T5 "
                 f"or VAE, and the grids of samples (--sample-every 0).")
    return "\n".join(lines)
