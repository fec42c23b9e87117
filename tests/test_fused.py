"""The fused scan (Triton) against the definition, in Triton's interpreter (see conftest.py): no GPU needed.
On a machine with one the same tests run compiled."""
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from packaging.version import Version

from support import scan
from support.checkpoint import load_paper

triton = pytest.importorskip("triton", "3.3", reason="triton is not installed (PyTorch for CUDA brings it)")
dis = load_paper("dis")
ENGINE, COMPARE, CHUNKED = scan.engine, scan.compare, (scan.chunked, scan.chunked_backward)
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"
if DEVICE == "cpu" and Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
    pytest.skip(f"the interpreter of Triton {triton.__version__} fails with numpy {numpy.__version__}: pip install "
                "'numpy<2.4'", allow_module_level=True)
CLOSE = 1e-6 if DEVICE == "cpu" else 2e-5               # a GPU's 2^x has 22 bits


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The fused kernels also on a CPU; several chunks and blocks of channels in tiny arrays."""
    monkeypatch.setattr(scan, "engine", lambda device, dtype: (scan.fused, scan.fused_backward))
    monkeypatch.setattr(scan, "CHOICES", ((4, 168),))
    monkeypatch.setattr(scan, "compare", lambda device: list(scan.CHOICES))         # the real one remembers its answer
    monkeypatch.setattr(scan, "CHUNK", {"cuda": (4, 4)})


@pytest.fixture
def cut_into(monkeypatch):
    return lambda S: monkeypatch.setattr(scan, "segments", lambda u: S)


def inputs(b, L, D, N, seed=0):
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g)
    delta = torch.empty(b, L, D).uniform_(-6.9, 0, generator=g).exp()               # 1e-3 .. 1
    A = -torch.arange(1., N + 1).repeat(D, 1) * (0.1 * randn(D, N)).exp()
    x = (randn(b, L, D), delta, A, randn(b, L, N), randn(b, L, N), randn(D))
    return [v.to(DEVICE).requires_grad_() for v in x]


def grads(x, f=dis.selective_scan):
    """y and the gradients of a random projection of it."""
    y = f(*x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return y.detach(), *torch.autograd.grad(y, x, dy)


def worst(got, want):
    """The largest error, relative to the largest number of what is wanted."""
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want))


def exact(x):
    return grads([v.detach().double().requires_grad_() for v in x], dis.selective_scan_ref)


@pytest.mark.parametrize("b, L, D, N, segments", [
    (1, 1, 1, 1, 1), (2, 1, 5, 2, 1), (1, 3, 4, 16, 1), (3, 7, 2, 2, 1), (1, 9, 6, 3, 2), (1, 16, 4, 3, 4),
    (1, 30, 7, 2, 7), (2, 8, 8, 1, 1)])
def test_equals_the_definition(b, L, D, N, segments, cut_into):
    """Ragged and whole channels, chunks and segments, any N."""
    cut_into(segments)
    x = inputs(b, L, D, N)
    assert worst(grads(x), exact(x)) < CLOSE


def test_the_sizes_of_a_gpu(monkeypatch):
    monkeypatch.undo()
    assert (scan.CHUNK["cuda"], scan.CHOICES[0]) == ((8, 8), (64, 168))
    monkeypatch.setattr(scan, "CHUNK", {"cuda": (8, 8)})
    monkeypatch.setattr(scan, "compare", lambda device: list(scan.CHOICES))
    monkeypatch.setattr(scan, "engine", lambda device, dtype: (scan.fused, scan.fused_backward))
    x = inputs(1, 19, 70, 3)
    assert worst(grads(x), exact(x)) < CLOSE


@pytest.mark.parametrize("step", [0.0, 100.0])
def test_a_step_of_zero_and_one_that_forgets_all(step, cut_into):
    """exp(0 A) = 1 and exp(100 A) = 0: no NaN from either, also across segments."""
    cut_into(3)
    u, delta, *rest = inputs(1, 18, 3, 2)
    x = [u, torch.full_like(delta, step).requires_grad_(), *rest]
    want = exact(x)
    for got, reference in zip(grads(x), want):
        assert (got - reference).abs().max() <= CLOSE * reference.abs().max() + 1e-30


@pytest.mark.parametrize("segments", [1, 2])
def test_twice_the_same_bits(segments, cut_into):
    cut_into(segments)
    x = inputs(2, 13, 5, 2)
    assert all(map(torch.equal, grads(x), grads(x)))


def test_bfloat16(cut_into):
    """u, B and C as autocast leaves them. They are exact in float32, so y (float32) and the float32 gradients
    are as precise as ever; those in bf16 are rounded once: by 2^-8, as the interpreter cuts bits off."""
    cut_into(2)
    u, delta, A, B, C, D = inputs(2, 11, 5, 4)
    low = [v.detach().bfloat16().requires_grad_() for v in (u, B, C)]
    x = [low[0], delta, A, low[1], low[2], D]
    got, want = grads(x), exact(x)
    assert [v.dtype for v in got] == [torch.float32] + [v.dtype for v in x]
    for g, w in zip(got, want):
        assert worst([g], [w]) < (CLOSE if g.dtype == torch.float32 else 2**-8 + CLOSE)


def test_all_bfloat16():
    x = [v.detach().bfloat16().requires_grad_() for v in inputs(1, 9, 5, 2)]
    got = grads(x)
    assert [v.dtype for v in got[1:]] == [torch.bfloat16] * 6
    assert worst(got, exact(x)) < 2**-8 + CLOSE


def test_views():
    """As in the mixer: u transposed, B and C slices of one projection, y flipped."""
    u, delta, A, B, C, D = (v.detach() for v in inputs(2, 10, 5, 2))
    dense = [v.requires_grad_() for v in (u, delta, A, B, C, D)]
    B2, C2 = (v.requires_grad_() for v in torch.cat([B, C], -1).split([2, 2], -1))
    u2, delta2, A2 = (v.detach().mT.contiguous().mT.requires_grad_() for v in (u, delta, A))
    views = [u2, delta2, A2, B2, C2, D]
    assert not any(v.is_contiguous() for v in views[:5])
    flipped = lambda *x: dis.selective_scan(*x).flip(1)
    assert all(map(torch.equal, grads(views, flipped), grads(dense, flipped)))


def tf32(x):
    """x, a float32, with 10 bits after the point, as a GPU's matrix products may read it."""
    return (x.view(torch.int32) & -2**13).view(torch.float32) if x.dtype == torch.float32 else x


def test_used_on_cuda_if_it_gives_the_same(monkeypatch):
    """Also if TF32 is on, which must not reach what it is compared with. Where it gives other numbers, or will not
    compile, a warning says so and the chunked one works."""
    monkeypatch.setattr(scan, "CHOICES", ((128, 168),))
    engine, compare, gpu = ENGINE.__wrapped__, COMPARE.__wrapped__, SimpleNamespace(type="cuda")
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: product(tf32(a), tf32(b)))
    monkeypatch.setattr(scan, "compare", lambda device: compare(torch.device(DEVICE)))
    assert engine(gpu, torch.float32) == (scan.fused, scan.fused_backward)
    asked = []
    monkeypatch.setattr(scan, "engine", lambda device, dtype: asked.append(engine(gpu, dtype)) or asked[-1])
    with torch.autocast(DEVICE, torch.bfloat16):            # which must not reach the comparison
        dis.selective_scan(*inputs(1, 2, 3, 1))
    assert asked == [(scan.fused, scan.fused_backward)]
    assert engine(gpu, torch.float64) == engine(torch.device("cpu"), torch.float32) == CHUNKED
    right, right_backward = scan.fused, scan.fused_backward
    for name, fault in (                                    # y too large by 1%; dB, too; and an exception
            ("fused", lambda *x, choice: (right(*x, choice=choice), x[-1].mul_(1.01))),
            ("fused_backward", lambda *x, choice: [v * (1.01 if i == 3 else 1)
                                                   for i, v in enumerate(right_backward(*x, choice=choice))]),
            ("fused", lambda *x, choice: 1 / 0)):
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match="using the slower one"):
            patch.setattr(scan, name, fault)
            assert engine(gpu, torch.float32) == CHUNKED
    monkeypatch.setattr(scan, "CHOICES", ((64, 168), (128, 255)))           # a choice with a fault is dropped alone
    monkeypatch.setattr(scan, "fused", lambda *x, choice: right(*x, choice=choice) if choice[0] == 128 else 1 / 0)
    assert compare(torch.device(DEVICE)) == [(128, 255)]


def test_the_fastest_is_chosen_once_for_each_size(monkeypatch):
    """With an invented clock. A kernel runs more than once to be timed, but its results are those of one run."""
    choices, times, ran = ((4, 168), (2, 255), (1, 128)), iter([3, 1, 2, 3, 2, 1, 1, 2, 3]), []
    monkeypatch.setattr(scan, "CHOICES", choices)
    monkeypatch.setattr(scan, "CHOSEN", {})
    monkeypatch.setattr(scan, "compare", lambda device: list(choices))
    monkeypatch.setattr(scan, "milliseconds", lambda run: (run(), next(times))[1])
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    fastest = scan.fastest
    monkeypatch.setattr(scan, "fastest", lambda *x: ran.append(fastest(*x)) or ran[-1])
    x = inputs(1, 3, 2, 1)
    assert worst(grads(x), exact(x)) < CLOSE
    dis.selective_scan(*x)                                  # nothing is timed again ...
    dis.selective_scan(*inputs(2, 3, 2, 1))                 # ... but at another size
    assert ran == [choices[1], choices[2], choices[1], choices[0]]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)        # a CUDA graph cannot wait
    dis.selective_scan(*inputs(3, 3, 2, 1))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    dis.selective_scan(*x)
    assert ran[4:] == [choices[0]] * 2


def test_compiled_for_a_gpu():
    """Without one: offsets of 64 bits, room for 12 warps, and a barrier in each loop, over which no load is moved."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = sys.executable, Path(__file__).with_name("compiled.py")
    said = subprocess.run(command, env=env, capture_output=True, text=True)
    print(said.stdout, said.stderr)                         # registers and bytes spilled: pytest -s
    found = [json.loads(line) for line in said.stdout.splitlines()]
    assert len(found) == 4
    for kernel in found:
        assert kernel["narrow"] == kernel["reordered"] == [] and kernel["barriers"] > 0
        registers, spilled = kernel["registers"]
        most = (128, 0) if kernel["kernel"] == "_fused" else (168, 256)
        assert (registers <= most[0], spilled <= most[1]) == (True, True)
