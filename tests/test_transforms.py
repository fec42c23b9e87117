"""Forward-mode AD, torch.func and second derivatives go through the fast scan and convolution as through their
definitions. These two are custom operators: by itself, PyTorch would take the derivatives of forward-mode AD for 0."""
import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jvp, linearize, vmap

from support import longconv, scan
from support.checkpoint import load_paper

# PyTorch's own, about what it imports and what linearize makes
pytestmark = [pytest.mark.filterwarnings(f"ignore:{about}") for about in (".torch.jit.script. is deprecated",
                                                                          "Attempted to insert a get_attr")]
dis, diffussm = load_paper("dis"), load_paper("diffussm")
FORMS = {"scan": (scan.selective_scan, dis.selective_scan_ref),
         "convolution": (longconv.convolve, diffussm.convolve_ref)}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(form):
    if form == "convolution":
        return randn(2, 7, 4), randn(4, 7, seed=1)
    u, delta, A, B, C = (randn(*s, seed=i) for i, s in enumerate([(2, 7, 3), (2, 7, 3), (3, 2), (2, 7, 2), (2, 7, 2)]))
    return u, delta.exp() / 9, -A.exp(), B, C, randn(3, seed=5)


def dual_numbers(f, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*map(forward_ad.make_dual, x, v))).tangent


def example_gradients(f, x, v):
    """Of the last input, which all examples share (for the scan, A and D too), for each example by itself."""
    axes = [0 if len(i) == len(x[0]) and i.ndim == 3 else None for i in x]
    one = lambda *x: f(*(i if a is None else i[None] for i, a in zip(x, axes))).sin().sum()
    return vmap(grad(one, len(x) - 1), tuple(axes))(*x)


def second_derivatives(f, x, v):
    x = [i.clone().requires_grad_() for i in x]
    slopes = torch.autograd.grad(f(*x).sin().sum(), x, create_graph=True)
    return torch.autograd.grad(sum(s.sin().sum() for s in slopes), x)


def backward(tangents):
    """Of what was computed before a transform begins: many gradients at once, or the tangent of one."""
    def way(f, x, v):
        x = [i.clone().requires_grad_() for i in x]
        y = f(*x)
        dy = randn(3, *y.shape)
        if not tangents:
            return torch.autograd.grad(y, x, dy, is_grads_batched=True)
        return jvp(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True), (dy[0],), (dy[1],))[1]
    return way


WAYS = {
    "jvp": lambda f, x, v: jvp(f, x, v)[1],
    "dual numbers": dual_numbers,
    "jacfwd": lambda f, x, v: jacfwd(f, tuple(range(len(x))))(*x),
    "linearize": lambda f, x, v: linearize(f, *x)[1](*v),
    "grad": lambda f, x, v: grad(lambda *x: f(*x).sin().sum(), tuple(range(len(x))))(*x),
    "vmap": lambda f, x, v: vmap(f, (0, *[None] * (len(x) - 1)))(torch.stack([x[0], v[0]]), *x[1:]),
    "vmap of grad": example_gradients,
    "jvp of grad": lambda f, x, v: jvp(grad(lambda *x: f(*x).sin().sum(), len(x) - 1), x, v)[1],
    "second derivatives": second_derivatives,
    "batched backward": backward(tangents=False),
    "jvp of backward": backward(tangents=True)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_equal_to_the_definition(way, form):
    x = inputs(form)
    got, want = (WAYS[way](f, x, tuple(i.sin() for i in x)) for f in FORMS[form])
    torch.testing.assert_close(got, want)
    assert all(g.abs().max() > 0.01 for g in (got if isinstance(got, tuple) else [got]))


def test_compiled_with_a_transform_inside():
    x = inputs("convolution")
    tangent = lambda *x: jvp(longconv.convolve, x, x)[1]
    torch.testing.assert_close(torch.compile(tangent, backend="eager", fullgraph=True)(*x), tangent(*x))
    assert tangent(*x).abs().max() > 1


@pytest.mark.parametrize("paper, options", [(dis, dict(state=4, time="token")), (diffussm, dict(ratio=2, state=4))],
                         ids=["dis", "diffussm"])
def test_whole_models(paper, options, monkeypatch):
    """Along a direction of all weights and of the image, while kernels are frozen; and each example's gradients."""
    torch.manual_seed(0)
    model, diffusion = paper.build("tiny", (1, 8, 8), 3, width=16, depth=2, **options)
    weights = {k: torch.randn_like(v) / 9 + v.detach() for k, v in model.named_parameters()}
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), torch.tensor([1, -1])
    model.load_state_dict(weights, strict=False)
    model.eval()

    def results():
        f = lambda weights, x: functional_call(model, weights, (x, t, y))
        one = lambda weights, x0, t, y: diffusion.loss(
            lambda *args, **cond: functional_call(model, weights, args, cond), x0[None], t[None], x0.cos()[None],
            y=y[None])["loss"].sum()
        way = weights, x
        with torch.no_grad(), getattr(model, "frozen", torch.no_grad)():
            tangent = jvp(f, way, way)[1]
        return tangent, vmap(grad(one), (None, 0, 0, 0))(weights, x, t, y)
    got = results()
    monkeypatch.setattr(diffussm, "convolve", diffussm.convolve_ref)
    for module in model.modules():
        if isinstance(module, dis.Direction):
            module.selective_scan = dis.selective_scan_ref
    torch.testing.assert_close(got, results(), rtol=1e-4, atol=1e-5)
    assert got[0].norm() > 0.1
    h, f = 1e-3, lambda h: functional_call(model, {k: v * (1 + h) for k, v in weights.items()}, (x * (1 + h), t, y))
    assert (got[0] - (f(h) - f(-h)) / (2 * h)).norm() < 0.01 * got[0].norm()
