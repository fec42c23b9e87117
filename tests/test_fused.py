"""The fused scan (Triton) against the definition, in Triton's interpreter (see conftest.py): no GPU needed. On
a machine with one the same tests run compiled."""
import os

import pytest
import torch

import checkpoint

pytest.importorskip("triton", minversion="3.3", reason="triton is not installed (PyTorch for CUDA brings it)")
dis = checkpoint.load_paper("dis")
scan_ref = dis.selective_scan_ref
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several chunks and blocks of channels in tiny arrays."""
    monkeypatch.setattr(dis._FusedScan, "BD", 4)
    monkeypatch.setattr(dis._FusedScan, "T", 4)


def inputs(b, L, D, N, seed=0):
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g)
    delta = torch.empty(b, L, D).uniform_(-6.9, 0, generator=g).exp()               # 1e-3 .. 1
    A = -torch.arange(1., N + 1).repeat(D, 1) * (0.1 * randn(D, N)).exp()
    x = (randn(b, L, D), delta, A, randn(b, L, N), randn(b, L, N), randn(D))
    return [v.to(DEVICE).requires_grad_() for v in x]


def grads(f, x, **options):
    """y and the gradients of a random projection of it."""
    y = f(*x, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return y.detach(), *torch.autograd.grad(y, x, dy)


def worst(got, want):
    """The largest error, relative to the largest number of what is wanted."""
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want))


def exact(x):
    return grads(scan_ref, [v.detach().double().requires_grad_() for v in x])


@pytest.mark.parametrize("b, L, D, N, segments", [
    (1, 1, 1, 1, 1), (2, 1, 5, 2, 1), (1, 3, 4, 16, 1), (2, 4, 3, 4, 1), (1, 5, 8, 8, 1), (3, 7, 2, 2, 1),
    (1, 9, 6, 3, 2), (1, 7, 3, 32, 2), (2, 21, 5, 2, 3), (1, 30, 7, 2, 7), (1, 16, 4, 8, 4), (1, 37, 9, 1, 5),
    (2, 8, 4, 1, None), (1, 41, 2, 3, None)])
def test_equals_the_definition(b, L, D, N, segments):
    """Ragged and whole channels, chunks and segments, any N."""
    x = inputs(b, L, D, N)
    assert worst(grads(dis.fused_scan, x, segments=segments), exact(x)) < 1e-6


def test_the_sizes_of_a_gpu(monkeypatch):
    monkeypatch.undo()
    assert (dis._FusedScan.T, dis._FusedScan.BD) == (8, 64)
    x = inputs(1, 19, 70, 3)
    assert worst(grads(dis.fused_scan, x), exact(x)) < 1e-6


def test_any_number_of_segments_gives_the_same():
    x = inputs(1, 27, 3, 2)
    one, *others = [grads(dis.fused_scan, x, segments=s) for s in (1, 2, 3, 7, 100)]
    assert all(worst(other, one) < 1e-6 for other in others)


@pytest.mark.parametrize("step", [0.0, 100.0])
def test_a_step_of_zero_and_one_that_forgets_all(step):
    """exp(0 A) = 1 and exp(100 A) = 0: no NaN from either, also across segments."""
    u, delta, *rest = inputs(1, 18, 3, 2)
    x = [u, torch.full_like(delta, step).requires_grad_(), *rest]
    want = exact(x)
    for got, reference in zip(grads(dis.fused_scan, x, segments=3), want):
        assert (got - reference).abs().max() <= 1e-6 * reference.abs().max() + 1e-30


def test_twice_the_same_bits():
    x = inputs(2, 13, 5, 2)
    for segments in (1, 2):
        pairs = zip(*(grads(dis.fused_scan, x, segments=segments) for _ in range(2)))
        assert all(torch.equal(*pair) for pair in pairs)


def test_without_gradients_the_same_bits_and_no_state_of_every_chunk(monkeypatch):
    x, kept = inputs(1, 18, 3, 4), []
    y = dis.fused_scan(*x, segments=2)
    run = dis._scan_forward.run
    monkeypatch.setattr(dis._scan_forward, "run", lambda *a, **k: (kept.append(k["KEEP"]), run(*a, **k)))
    with torch.no_grad():
        assert torch.equal(dis.fused_scan(*x, segments=2), y)
    assert torch.equal(dis.fused_scan(*[v.detach() for v in x], segments=2), y)
    assert kept == [False] * 4


def test_bfloat16():
    """u, B and C as autocast leaves them. They are exact in float32, so y (float32) and the float32 gradients
    are as precise as ever; those in bf16 are rounded once: by 2^-8, as the interpreter cuts bits off."""
    u, delta, A, B, C, D = inputs(2, 11, 5, 4)
    low = [v.detach().bfloat16().requires_grad_() for v in (u, B, C)]
    x = [low[0], delta, A, low[1], low[2], D]
    got, want = grads(dis.fused_scan, x, segments=2), exact(x)
    assert [v.dtype for v in got] == [torch.float32] + [v.dtype for v in x]
    for g, w in zip(got, want):
        assert worst([g], [w]) < (1e-6 if g.dtype == torch.float32 else 2**-8 + 1e-6)


def test_all_bfloat16():
    x = [v.detach().bfloat16().requires_grad_() for v in inputs(1, 9, 5, 2)]
    got = grads(dis.fused_scan, x)
    assert [v.dtype for v in got[1:]] == [torch.bfloat16] * 6
    assert worst(got, exact(x)) < 2**-8 + 1e-6


def test_views():
    """As in the mixer: u transposed, B and C slices of one projection, y flipped."""
    u, delta, A, B, C, D = (v.detach() for v in inputs(2, 10, 5, 2))
    dense = [v.requires_grad_() for v in (u, delta, A, B, C, D)]
    both = torch.cat([B, C], -1)
    B2, C2 = (v.requires_grad_() for v in both.split([2, 2], -1))
    u2, delta2, A2 = (v.detach().mT.contiguous().mT.requires_grad_() for v in (u, delta, A))
    views = [u2, delta2, A2, B2, C2, D]
    assert not any(v.is_contiguous() for v in views[:5])
    flipped = lambda *x: dis.fused_scan(*x, segments=2).flip(1)
    for a, b in zip(grads(flipped, views), grads(flipped, dense)):
        assert torch.equal(a, b)


def test_some_inputs_need_no_gradient():
    x = inputs(1, 9, 3, 2)
    want = exact(x)[1:]
    for wanted in ([0], [1, 4], [2, 5], [3]):
        some = [v.detach().requires_grad_(i in wanted) for i, v in enumerate(x)]
        dy = torch.randn(1, 9, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)       # as in grads
        dis.fused_scan(*some).backward(dy)
        assert [i for i, v in enumerate(some) if v.grad is not None] == wanted
        assert worst([some[i].grad for i in wanted], [want[i] for i in wanted]) < 1e-6


def test_asked_once_whether_it_works(monkeypatch):
    """It does; and where it gives other numbers, or will not compile, a warning says so."""
    monkeypatch.undo()
    device = torch.device(DEVICE)
    assert dis.fused_works(device)
    for fault in (lambda *x: 1.01 * scan_ref(*x), lambda *x: 1 / 0):
        dis.fused_works.cache_clear()
        monkeypatch.setattr(dis, "fused_scan", fault)
        with pytest.warns(UserWarning, match="using the slower one"):
            assert not dis.fused_works(device)
    dis.fused_works.cache_clear()


def test_rule_of_segments(monkeypatch):
    """8 programs per multiprocessor and 256 tokens per segment at least; two segments would gain nothing."""
    class Properties:
        multi_processor_count = 132
    class Cuda:
        is_cuda, device = True, 0
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    rule = dis._FusedScan.segments
    assert rule(Cuda, 32 * 12, 32) == 1             # DiS-S, batch 32, 256 tokens
    assert rule(Cuda, 1 * 12, 33) == 1              # one image
    assert rule(Cuda, 1 * 12, 2048) == 32           # 16384 tokens
    assert rule(Cuda, 16 * 12, 2048) == 5
    assert rule(Cuda, 32 * 12, 2048) == 1
    assert rule(torch.zeros(1), 1, 2048) == 1
