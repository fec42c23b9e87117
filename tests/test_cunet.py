"""cunet.py: counts, the ODE block against exact solutions, gradients three ways, what sees the time."""
import contextlib
import importlib.util
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchdiffeq
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import ranks
import train
from benchmarks import tables
from diffusion import UserError, fold, normal
from support import checkpoint, cost, published
from support.parallel import recompute
from test_train import Looks

cunet = checkpoint.load_paper("cunet")
ROOT = Path(__file__).resolve().parent.parent


def small(shape=(1, 12, 12), num_classes=3, preset="tiny", **options):
    torch.manual_seed(0)
    width = dict(dim=8) if "unet" in preset and preset != "cunet" else dict(nf=4)
    model, diffusion = cunet.build(preset, shape, num_classes, **(width | options))
    with torch.no_grad():           # away from zero, where most gradients vanish
        for name, p in model.named_parameters():
            if not p.any():
                p.normal_(0, 0.1)
    return model, diffusion


def forward(model, seed=0, t=(3, 700), **cond):
    x = torch.randn(len(t), *model.shape, generator=torch.Generator().manual_seed(seed))
    return model(x, torch.tensor(t), **cond)


# --- sizes ---

# parameters; multiply-adds at 3 x 64 x 64; the paper's "GFLOPs", as its authors' profiler counts
SIZES = [("unet", {}, 35_710_339, 7_296_565_248, 7.206), ("published", {}, 8_811_875, 2_824_929_280, 2.831),
         ("published", dict(attention=False), 8_548_707, 2_806_054_912, 2.814),
         ("published", dict(residual=False), 6_138_083, 1_617_782_784, 1.624),
         ("published", dict(attention=False, residual=False), 5_874_915, 1_598_908_416, 1.607),
         ("cunet", {}, 7_674_915, 2_230_190_080, None), ("cunet", dict(attention=False), 7_411_235, 2_211_315_712, None),
         ("cunet", dict(residual=False), 7_456_067, 2_154_692_608, None),
         ("cunet", dict(dynamics="first"), 9_419_811, 2_834_169_856, None)]


def multiply_adds(model, diffusion):
    return cost.multiply_adds(model, diffusion, cost.blank_batch(diffusion, model.shape, 1, model.num_classes))


@pytest.mark.parametrize("preset, options, parameters, macs, figure", SIZES, ids=lambda v: str(v))
def test_parameters_and_multiply_adds_are_the_papers(preset, options, parameters, macs, figure):
    with torch.device("meta"):
        model, diffusion = cunet.build(preset, (3, 64, 64), **options)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert multiply_adds(model, diffusion) == macs
    assert figure is None or abs(macs / 1e9 / figure - 1) < 0.02


@pytest.mark.parametrize("options", [
    dict(num_classes=7), dict(shape=(3, 9, 14)), dict(steps=3, solver="midpoint"), dict(attention=False),
    dict(preset="unet-tiny", num_classes=7), dict(preset="unet-tiny", shape=(1, 9, 14))], ids=str)
def test_multiply_adds_agree_with_a_real_pass(options):
    model, diffusion = small(**options)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(model, t=(5,))
    assert counter.get_total_flops() == 2 * multiply_adds(model, diffusion)


def test_the_table_shows_figure_6_and_table_5(capsys, monkeypatch):
    monkeypatch.setattr(tables, "small", lambda name: print(f"small {name}"))     # test_launch.py has it for dis
    tables.cunet()                                                # python cunet.py
    shown = capsys.readouterr().out
    for figure in ("35,710,339", "7.297G", "544.9", "8,811,875", "2.825G", "132.5", "87.7",
                   "rk4              4.0", "heun2            2.0", "small cunet"):
        assert figure in shown, figure


def test_runs_without_support(monkeypatch):
    """cunet.py with diffusion.py alone: the presets of cU-Net, unchecked, and the same numbers."""
    for name in ("options", "published", "unet"):
        monkeypatch.setitem(sys.modules, f"support.{name}", None)       # importing it is an ImportError
    spec = importlib.util.spec_from_file_location("cunet_alone", ROOT / "cunet.py")
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert list(alone.CONFIGS) == ["cunet", "tiny", "mini"]
    expected = forward(small()[0], y=torch.tensor([0, -1]))
    torch.manual_seed(0)
    model, _ = alone.build("tiny", (1, 12, 12), 3, nf=4)
    model.load_state_dict(small()[0].state_dict())
    assert torch.equal(forward(model, y=torch.tensor([0, -1])), expected)


# --- the ODE block ---

def solved(derivative, state, solver="rk4", steps=1, gradients="direct", tolerance=1e-3, condition=()):
    block = cunet.DynamicBlock(1, solver=solver, steps=steps, gradients=gradients, rtol=tolerance, atol=tolerance)
    block.derivative = derivative
    return block.solve(state, *condition)


@pytest.mark.parametrize("solver", ["midpoint", "heun2", "heun3", "rk4"])
def test_constant_acceleration_is_solved_exactly(solver):
    """z(1) = z0 + v0 + a / 2, v(1) = v0 + a, through the block's own second-order form."""
    block = cunet.DynamicBlock(3, solver=solver)
    acceleration = torch.randn(3)[:, None, None].expand(3, 4, 4)
    block.f.forward = lambda s, state, scale, shift: acceleration.expand(len(state), -1, -1, -1)
    state = torch.randn(2, 6, 4, 4)
    z, v = state.chunk(2, dim=1)
    expected = torch.cat([z + v + acceleration / 2, v + acceleration], dim=1)
    torch.testing.assert_close(block(state, torch.zeros(2, 256)), expected)


@pytest.mark.parametrize("solver, order", [("rk4", 4), ("midpoint", 2), ("euler", 1), ("heun2", 2), ("heun3", 3)])
def test_order_on_the_harmonic_oscillator(solver, order):
    """x'' = -omega^2 x: twice the steps, 2^order times less error."""
    omega, state = 3.0, torch.tensor([[1.0, 0.5]], dtype=torch.float64)

    def oscillate(s, state):
        z, v = state.chunk(2, dim=1)
        return torch.cat([v, -omega**2 * z], dim=1)
    w = torch.tensor(omega, dtype=torch.float64)
    exact = torch.stack([w.cos() + 0.5 / omega * w.sin(), -omega * w.sin() + 0.5 * w.cos()])
    errors = [(solved(oscillate, state, solver, steps) - exact).norm() for steps in (16, 32)]
    assert (errors[0] / errors[1]).log2().item() == pytest.approx(order, abs=0.35)


def as_compiled():
    """A context that does what a compiled graph would do: rk4 by our own step."""
    return mock.patch.object(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("solver", cunet.FIXED)
def test_own_step_is_torchdiffeqs(solver, steps, monkeypatch):
    """Every way to take fixed steps against torchdiffeq on a grid: the end and all gradients, in float64."""
    generator = torch.Generator().manual_seed(0)
    state, w, shift = (torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (5, 3, 1))

    def derivative(s, state, shift):
        return (state @ w + s * shift).tanh() + s * state

    def ours(gradients):
        return solved(derivative, state, solver, steps, gradients, condition=(shift,))

    def theirs():
        grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        return torchdiffeq.odeint(lambda s, state: derivative(s, state, shift), state, grid, method=solver)[-1]
    inputs = [x.requires_grad_() for x in (state, w, shift)]
    expected = theirs()
    grads = torch.autograd.grad(expected.square().sum(), inputs)
    ends = [ours("direct"), ours("checkpoint")]
    if solver == "rk4":
        monkeypatch.setattr(torchdiffeq, "odeint", None)                # not called, also not in backward
        with as_compiled():
            ends += [ours("direct"), ours("checkpoint")]
    for end in ends:
        again = torch.autograd.grad(end.square().sum(), inputs)
        torch.testing.assert_close((end, *again), (expected, *grads), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("solver", ["rk4", "heun3", "dopri5"])
def test_published_solves_as_cunet_does(solver):
    """It has the solver written out once more."""
    w = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state, steps = torch.ones(2, 3, dtype=torch.float64), 1 if solver == "dopri5" else 3
    block = published.PublishedBlock(1, True, solver, steps, 1e-3, 1e-3, "direct")
    block.f = lambda s, state: (state @ w).tanh()
    expected = solved(block.f, state, solver, steps)
    torch.testing.assert_close(block.solve(state), expected, rtol=1e-13, atol=0)
    if solver == "rk4":
        with as_compiled():
            torch.testing.assert_close(block.solve(state), expected, rtol=1e-13, atol=0)
    if steps > 1:
        block.gradients = "checkpoint"
        torch.testing.assert_close(block.solve(state), expected, rtol=1e-13, atol=0)


def test_adaptive_solver_meets_its_tolerance():
    grow = lambda s, state: state
    ends = [solved(grow, torch.ones(1, 1), "dopri5", tolerance=tolerance).item() for tolerance in (1e-2, 1e-6)]
    loose, tight = (abs(end - 2.7182818) for end in ends)
    assert tight < 1e-5 and tight <= loose < 1e-2


def test_an_adaptive_solver_that_gives_up_says_what_to_do():
    solver = "dopri5"
    grow = lambda s, state: state.square()                  # reaches infinity at s = 1 / state(0)
    block = published.PublishedBlock(1, True, solver, 1, 1e-3, 1e-3, "direct")
    block.f = grow
    for size in (2.0, float("nan")):
        for solve in (block.solve, lambda state: solved(grow, state, solver)):
            with pytest.raises(UserError, match=f"{solver} found no step small enough: train with solver=rk4"):
                solve(torch.full((1, 1), size))


def test_inner_time_reaches_the_acceleration():
    plain, timed = (small(inner_time=on, steps=2)[0] for on in (False, True))
    block = timed.bottleneck
    state, scale = torch.randn(1, 128, 2, 2), torch.zeros(1, 128, 1, 1)
    at = [block.f(torch.tensor(s), state, scale, scale) for s in (0.0, 1.0)]
    assert not torch.allclose(*at)
    block = plain.bottleneck
    at = [block.f(torch.tensor(s), state, scale, scale) for s in (0.0, 1.0)]
    assert torch.equal(*at)


def gradients(recomputed=False, **options):
    model, diffusion = small(**options)
    if recomputed:
        recompute(model)
    out = forward(model, **({"y": torch.tensor([0, 1])} if model.num_classes else {}))
    out.square().sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}, model


@pytest.mark.parametrize("options", [
    dict(steps=1), dict(steps=3), dict(steps=2, solver="heun2"),
    dict(preset="published", num_classes=0, shape=(1, 20, 20))], ids=str)
def test_checkpointed_gradients_equal_direct_ones(options):
    """Both by the same kind of step, so that rounding is the same, too."""
    evaluations = {"rk4": 4, "heun2": 2}[options.get("solver", "rk4")] * options.get("steps", 1)
    with contextlib.nullcontext() if "solver" in options else as_compiled():
        out, direct, model = gradients(**options)
    assert model.nfe == evaluations
    again, checkpointed, model = gradients(**options, gradients="checkpoint")
    assert model.nfe == 2 * evaluations                             # recomputed in backward
    torch.testing.assert_close(again, out, rtol=0, atol=1e-6)
    for name, grad in direct.items():
        assert (checkpointed[name] - grad).norm() <= 1e-6 * grad.norm(), name


@pytest.mark.parametrize("options", [
    {}, dict(solver="dopri5"), dict(steps=4, gradients="adjoint"), dict(gradients="checkpoint"),
    dict(preset="unet-tiny")], ids=str)
def test_recomputed_gradients_equal_direct_ones(options):
    """--grad-checkpointing, whatever the solver."""
    out, direct, _ = gradients(**options)
    again, recomputed, _ = gradients(**options, recomputed=True)
    assert torch.equal(again, out)
    for name, grad in direct.items():
        assert (recomputed[name] - grad).norm() <= 1e-6 * grad.norm(), name


def test_evaluations_are_as_many_as_are_told():
    for options in ({}, dict(solver="heun3", steps=2), dict(steps=3, gradients="checkpoint"),
                    dict(solver="heun3", steps=2, gradients="checkpoint"),
                    dict(steps=4, gradients="adjoint"), dict(solver="dopri5")):
        model, _ = small(**options)
        calls = []
        model.bottleneck.f.register_forward_pre_hook(lambda *_: calls.append(1))
        forward(model).sum().backward()
        assert len(calls) == model.bottleneck.nfe


def test_adjoint_gradients_equal_direct_ones_at_eight_steps():
    """Including those of the time's embedding, which reach the ODE as captured tensors."""
    out, direct, _ = gradients(steps=8)
    again, adjoint, model = gradients(steps=8, gradients="adjoint")
    torch.testing.assert_close(again, out)
    assert model.nfe == 64
    # a bias that the next norm removes has a gradient of mere rounding
    rounding = 1e-6 * max(grad.norm() for grad in direct.values())
    for name, grad in direct.items():
        assert (adjoint[name] - grad).norm() <= 1e-3 * grad.norm() + rounding, name
        assert grad.norm() > rounding or ".bias" in name, name
    assert any("condition.time" in name for name in direct) and any("film" in name for name in direct)


def test_memory_of_the_three_gradients():
    """Kept for backward: direct grows with the steps, checkpoint keeps a state per step, adjoint one."""
    def kept(gradients, steps):
        block, sizes = cunet.DynamicBlock(8, steps=steps, gradients=gradients), {}

        def pack(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x
        state, e = torch.randn(2, 16, 16, 16, requires_grad=True), torch.randn(2, 256)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = block(state, e)
        del out
        return sum(sizes.values())
    assert kept("direct", 8) > 1.8 * kept("direct", 4) > 3 * kept("checkpoint", 4)
    assert kept("checkpoint", 8) < kept("direct", 1)
    assert kept("adjoint", 8) == kept("adjoint", 4) < kept("checkpoint", 4)


@pytest.mark.parametrize("options, fix", [
    (dict(gradients="adjoint"), "steps=4 or more"),
    (dict(gradients="adjoint", solver="euler", steps=9), "rk4"),
    (dict(gradients="adjoint", steps=3), "off by"), (dict(gradients="adjoint", solver="dopri5"), "rk4"),
    (dict(network=3), "unknown option"), (dict(rtol=1e-9), "dopri5"),
    (dict(solver="dopri5", steps=2), "drop steps=2"),
    (dict(solver="dopri5", gradients="checkpoint"), "gradients=direct, or"), (dict(solver="rk5"), "midpoint"),
    (dict(gradients="backprop"), "checkpoint or adjoint"), (dict(dynamics="third"), "second or first"),
    (dict(rtol=0, solver="dopri5"), "try 1e-3"), (dict(steps=0), "at least 1"),
    (dict(attention="no"), "True or False"),
    (dict(colour=1), "unknown option"), (dict(preset="cnet"), "unet-tiny"),
    (dict(preset="published"), "--num-classes 0"),
    (dict(preset="published", num_classes=0, shape=(1, 32, 32), T=2000), "1000 or fewer"),
    (dict(preset="published", num_classes=0), "larger than 16 px"), (dict(preset="unet", dim=7), "try 8")])
def test_wrong_options_are_refused_with_the_fix(options, fix):
    with pytest.raises(ValueError, match=fix):
        small(**options)


# --- the networks ---

def by_hand(w, image, t, y, groups, second):
    """What a cU-Net of one level and one step of Euler computes, written once more. w: its weights by name; groups: of
    the norms, by width."""
    def conv(x, name, padding=0):
        return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), padding=padding)

    def norm(x, name):
        parts = x.reshape(len(x), groups[x.shape[1]], -1)
        parts = (parts - parts.mean(2, True)) / (parts.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return parts.reshape(x.shape) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def instance(x):
        return (x - x.mean((2, 3), True)) / (x.var((2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def block(state, name):                                             # Figure 2, with z' = v and v' = a
        z, v = state.chunk(2, dim=1)
        scale, shift = linear(F.silu(e), f"{name}.film.1")[:, :, None, None].chunk(2, dim=1)
        h = F.softplus(conv(norm(state, f"{name}.f.norm1"), f"{name}.f.conv1", 1))
        h = (1 + scale) * norm(h, f"{name}.f.norm2") + shift
        a = F.softplus(conv(h, f"{name}.f.conv2", 1))
        return torch.cat([z + v, v + a + conv(state, f"{name}.f.residual")], dim=1) if second else 2 * state + a

    def attend(state, name):
        q, k, v = conv(norm(state, f"{name}.norm"), f"{name}.qkv").flatten(2).chunk(3, dim=1)       # (B, 128, h w)
        heads = [v @ (k.mT @ q / 32**0.5).softmax(1) for q, k, v in zip(*(x.split(32, dim=1) for x in (q, k, v)))]
        return state + conv(torch.cat(heads, dim=1).unflatten(2, state.shape[2:]), f"{name}.out")

    angles = t[:, None] * 10_000 ** (-torch.arange(64) / 64)
    e = linear(torch.cat([angles.cos(), angles.sin()], dim=1), "condition.time.0")
    e = linear(F.silu(e), "condition.time.2") + w["condition.label.weight"][y]
    z = conv(image, "stem", 1)
    v = conv(instance(conv(instance(z), "velocity.net.1", 1).relu()), "velocity.net.4")
    skip = attend(block(torch.cat([z, v], dim=1), "downs.0"), "attend_down")
    low = block(F.avg_pool2d(F.softplus(conv(skip, "to_wide.0")), 2), "bottleneck")
    # twice the size: new pixels lie a quarter of an old one from the nearest, three quarters from the next
    for axis in (2, 3):
        n = low.shape[axis]
        before, after = (low.index_select(axis, (torch.arange(n) + i).clamp(0, n - 1)) for i in (-1, 1))
        low = torch.stack([0.75 * low + 0.25 * before, 0.75 * low + 0.25 * after], dim=axis + 1).flatten(axis, axis + 1)
    state = block(F.softplus(conv(torch.cat([low, skip], dim=1), "to_narrow.0")), "ups.0")
    return conv(norm(attend(state, "attend_up"), "norm"), "head")


@pytest.mark.parametrize("dynamics", ["second", "first"])
def test_network_is_what_its_docstring_says(dynamics, monkeypatch):
    """Order of z and v, scale and shift, resizing, norms, attention, both embeddings: the outputs of `by_hand`."""
    monkeypatch.setattr(cunet.CUNet, "LEVELS", 1)
    model, _ = small((2, 4, 6), dynamics=dynamics, solver="euler")
    weights = {name: p + 0.1 * torch.randn_like(p) for name, p in model.state_dict().items()}       # no gain is 1
    model.load_state_dict(weights)
    image, t = torch.randn(3, *model.shape), torch.tensor([3, 500, 999])
    expected = by_hand(weights, image, t, torch.tensor([0, 2, 3]), {8: 2, 16: 4}, dynamics == "second")
    torch.testing.assert_close(model(image, t, torch.tensor([0, 2, -1])), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("preset", ["tiny", "unet-tiny"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 14), (1, 5, 5), (2, 1, 3)])
def test_any_size(preset, shape):
    model, _ = small(shape=shape, preset=preset)
    assert forward(model).shape == (2, *shape)


@pytest.mark.parametrize("options", [
    {}, dict(dynamics="first"), dict(residual=False), dict(attention=False), dict(inner_time=True),
    dict(num_classes=0), dict(variance="learned"), dict(preset="unet-tiny"),
    dict(preset="published", num_classes=0, shape=(1, 20, 20)),
    dict(preset="published", num_classes=0, shape=(1, 20, 20), residual=False)], ids=str)
def test_gradient_reaches_every_parameter(options):
    model, diffusion = small(**options)
    x0, t = torch.randn(4, *model.shape), torch.arange(4) * 300
    cond = {"y": torch.tensor([0, 1, 2, -1])} if model.num_classes else {}
    diffusion.loss(model, x0, t, torch.randn_like(x0), **cond)["loss"].sum().backward()
    dead = [n for n, p in model.named_parameters()              # or one of its rows, such as a shift that is not used
            if p.requires_grad and (p.grad is None or not p.grad.reshape(len(p), -1).any(1).all())]
    assert not dead


def test_published_code_does_not_see_the_time_and_ours_does():
    """Nor brightness and contrast, because it norms the raw image."""
    x = torch.randn(1, 3, 32, 32)
    for preset, blind in (("published", True), ("cunet", False), ("unet", False)):
        model, _ = small((3, 32, 32), 0, preset)
        outs = [model(x, torch.tensor([t])) for t in (0, 999)]
        assert torch.equal(*outs) == blind
        brighter = model(3 * x + 1, torch.tensor([0]))
        assert torch.allclose(brighter, outs[0], atol=1e-3) == blind
    seeing, _ = small((3, 32, 32), 0, "published", residual=False)          # wo/R
    assert not torch.equal(*(seeing(x, torch.tensor([t])) for t in (0, 999)))


def test_published_table_of_times():
    """Sines on even columns, cosines on odd ones, of t 10000^(-2j / 256) for every second j."""
    table = small((3, 32, 32), 0, "published")[0].table.double()
    angles = 999 * torch.tensor([10_000 ** (-2 * j / 256) for j in range(0, 256, 2)], dtype=torch.float64)
    torch.testing.assert_close(table[999, ::2], angles.sin(), rtol=0, atol=1e-3)
    torch.testing.assert_close(table[999, 1::2], angles.cos(), rtol=0, atol=1e-3)


def test_class_matters_and_minus_one_is_none():
    for preset in ("tiny", "unet-tiny"):
        model, _ = small(preset=preset)
        none, minus, one = (forward(model, **cond) for cond in ({}, {"y": torch.tensor([-1, -1])},
                                                               {"y": torch.tensor([1, 1])}))
        assert torch.equal(none, minus) and not torch.allclose(none, one)
        with pytest.raises(UserError, match="label 3, but this model has classes 0 to 2"):
            forward(model, y=torch.tensor([0, 3]))
    for preset in ("tiny", "unet-tiny", "published"):
        model, _ = small((1, 20, 20), 0, preset)
        assert torch.equal(forward(model), forward(model, y=torch.tensor([-1, -1])))
        with pytest.raises(UserError, match="label 0, but this model has no classes: drop"):
            forward(model, y=torch.tensor([0, -1]))


def test_odd_widths():
    assert forward(small(nf=9)[0]).shape == (2, 1, 12, 12)
    groups = {2: 1, 6: 1, 8: 2, 12: 2, 16: 4, 18: 2, 20: 4, 24: 4, 32: 8, 40: 8, 48: 8, 56: 8, 512: 8}
    assert {c: cunet.group_norm(c).num_groups for c in groups} == groups


def test_an_image_does_not_depend_on_its_batch():
    for preset in ("tiny", "unet-tiny"):
        model, _ = small(preset=preset)
        x, t = torch.randn(3, *model.shape), torch.tensor([3, 500, 900])
        torch.testing.assert_close(model(x, t)[1:2], model(x[1:2], t[1:2]), rtol=1e-4, atol=1e-5)


def test_the_head_does_not_start_at_zero():
    """From zero the network learns colours one axis after another (docs/results.md)."""
    for preset in ("tiny", "unet-tiny"):
        model, _ = cunet.build(preset, (1, 12, 12), 3)
        assert forward(model).std() > 0.05


@pytest.mark.parametrize("options", [
    {}, dict(steps=4, gradients="adjoint"),
    dict(steps=4, gradients="adjoint", preset="published", num_classes=0)], ids=str)
def test_stays_close_under_bf16_with_a_float32_state(options, monkeypatch):
    for network in (cunet.CUNet, published.Published):
        monkeypatch.setattr(network, "LEVELS", 1)
    model, diffusion = small(**options)
    seen, inside = [], []
    model.bottleneck.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    exact = forward(model)
    conv = next(m for m in model.bottleneck.modules() if isinstance(m, torch.nn.Conv2d))
    conv.register_forward_hook(lambda m, args, out: inside.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        rough = forward(model)
    rough.float().square().sum().backward()                     # outside, as in train.py
    assert seen == [torch.float32] * 2
    assert set(inside) == {torch.bfloat16}                      # in the adjoint's backward, too
    assert (exact - rough).norm() < 0.03 * exact.norm()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_unet_is_wired_as_the_baseline():
    """Two skips a level, taken last in, first out, and the stem's output at the very end."""
    model, _ = small(preset="unet-tiny")
    made, given = [], []
    for down in model.downs:
        down[0].register_forward_hook(lambda m, args, out: made.append(out))
        down[2].register_forward_hook(lambda m, args, out: made.append(out))
    for up in model.ups:
        for block in up[:2]:
            block.register_forward_hook(lambda m, args, out: given.append(args[0]))
    forward(model)
    assert len(given) == 8
    for into, skip in zip(given, reversed(made)):
        assert torch.equal(into[:, -skip.shape[1]:], skip)


def assert_one_graph(model, *batches, sampled, eager=contextlib.nullcontext):
    """torch.compile finds nothing to break the graph at, and nothing in later batches to compile again for;
    the numbers are those of the model inside `eager`, uncompiled. sampled: without gradients, too."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for args, cond in batches:
        results = []
        for net in (model, compiled):
            model.zero_grad()
            with eager() if net is model else contextlib.nullcontext():
                outs = net(*args, **cond)
            outs = outs if isinstance(outs, list) else [outs]           # mdm's resolutions
            sum(out.square().sum() for out in outs).backward()
            results.append((outs, [p.grad for p in model.parameters()]))
        torch.testing.assert_close(*results)
        assert counter.frame_count == 1
    if sampled:
        with torch.no_grad():
            torch.testing.assert_close(compiled(*args, **cond), model(*args, **cond))


def assert_no_looks(model, diffusion, x0, t, noise, **cond):
    """Neither a step of training nor one of sampling waits for a GPU to see a number."""
    with Looks() as looks:
        diffusion.loss(model, x0, t, noise, **cond)["loss"].mean().backward()
    assert looks.count == 0
    counts = []
    for steps in (2, 4):
        with Looks() as looks:
            diffusion.sample(model, x0.shape[1:], torch.arange(len(t)), sampler="ddpm", steps=steps,
                             cfg_scale=2.0, **cond)
        counts.append(looks.count)
    assert counts[0] == counts[1]               # before the first step it looks at tables, which the CPU has


@pytest.mark.parametrize("options", [
    {}, dict(gradients="checkpoint", inner_time=True), dict(preset="unet-tiny"),
    dict(preset="published", num_classes=0)], ids=str)
def test_compiles_without_a_break_and_waits_for_nothing(options, monkeypatch):
    """The compiled graph, that is: uncompiled, torchdiffeq waits at each of its steps."""
    for network in (cunet.CUNet, published.Published):
        monkeypatch.setattr(network, "LEVELS", 1)           # fewer blocks are as good, and sooner compiled
    model, diffusion = small(**options)
    x, y = torch.randn(2, 1, 12, 12), torch.tensor([2, -1]) if model.num_classes else None
    assert_one_graph(model, *(((x, torch.tensor(t)), dict(y=y)) for t in ((3, 700), (0, 999), (5, 5))),
                     sampled=not options, eager=as_compiled)
    with as_compiled():
        assert_no_looks(model, diffusion, x, torch.tensor([3, 700]), x, y=y)


@pytest.mark.parametrize("options", [
    dict(solver="heun3", steps=2, gradients="checkpoint"), dict(steps=4, gradients="adjoint"),
    dict(solver="dopri5"), dict(preset="published", num_classes=0, solver="midpoint")], ids=str)
def test_other_solvers_leave_the_compiled_graph(options, monkeypatch):
    """Once a block, into torchdiffeq; the numbers are eager's."""
    for network in (cunet.CUNet, published.Published):
        monkeypatch.setattr(network, "LEVELS", 1)
    model, _ = small(**options)
    counter, results = CompileCounterWithBackend("eager"), []
    compiled = torch.compile(model, backend=counter)
    compiled.shape = model.shape
    for net in (model, compiled, compiled):
        model.zero_grad()
        out = forward(net)
        out.square().sum().backward()
        results.append((out, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[1:], results[:1] * 2)
    assert counter.frame_count < 12


@pytest.mark.parametrize("preset", ["tiny", "unet-tiny"])
def test_overfits_one_batch(preset):
    model, diffusion = small(num_classes=2, shape=(1, 8, 8), preset=preset)
    x0 = torch.sign(normal(fold(0, torch.arange(8)), (1, 8, 8)))
    t, noise = torch.arange(8) * 120, normal(fold(1, torch.arange(8)), (1, 8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = diffusion.loss(model, x0, t, noise, y=torch.arange(8) % 2)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02                                              # it starts near 1


# --- from the command line ---

FLAGS = ["--model", "cunet", "--image-size", "12", "--global-batch-size", "4", "--warmup-steps", "2",
         "--device", "cpu", "--sample-every", "0"]


@pytest.mark.usefixtures("counted_once")
@pytest.mark.parametrize("flags", [["--set", "nf=4"], ["--preset", "unet-tiny", "--set", "dim=8"]], ids=str)
def test_trains_and_samples_from_the_command_line(flags, capsys):
    train.main([*FLAGS, *flags, "--smoke"])
    assert "sampling all worked" in capsys.readouterr().out


@pytest.mark.usefixtures("counted_once")
def test_evaluations_are_logged(tmp_path):
    train.main([*FLAGS, "--set", "nf=4", "steps=2", "--max-steps", "2", "--results-dir", str(tmp_path)])
    lines = (tmp_path / "cunet-shapes" / "log.csv").read_text().splitlines()
    assert lines[0].endswith(",nfe") and lines[-1].endswith(",8")


@pytest.mark.usefixtures("counted_once")
@pytest.mark.parametrize("options, split", [([], ["--shard"]), (["steps=4", "gradients=adjoint"], [])],
                         ids=["shards", "adjoint"])
def test_two_processes_match_one(tmp_path, options, split):
    if split:
        ranks.need_shards()
    flags = [*FLAGS, "--set", "nf=4", *options, "--max-steps", "5", "--log-every", "1"]
    train.main([*flags, "--results-dir", str(tmp_path / "one")])
    ranks.launch(tmp_path / "said", 2, "train.py", *flags, *split, "--results-dir", tmp_path / "two")
    folders = [tmp_path / name / "cunet-shapes" for name in ("one", "two")]
    one, two = (torch.load(folder / "latest.pt", weights_only=True) for folder in folders)
    # Adam's running means of the gradients, of the time's layers too (those begin to move at the second step,
    # when the modulations have left zero)
    model = cunet.build("tiny", (3, 12, 12), 8, nf=4)[0]
    grads = [run["opt"]["state"] for run in (one, two)]
    rounding = 1e-4 * max(state["exp_avg"].norm() for state in grads[0].values())
    for i, (name, _) in enumerate(model.named_parameters()):
        a, b = (state[i]["exp_avg"] for state in grads)
        assert (a - b).norm() <= 1e-3 * a.norm() + rounding, name
        assert a.any(), name
    # The weights themselves may differ: Adam makes full steps of the mere rounding that is the gradient of a
    # bias which the next norm removes.
    outs = []
    for run in (one, two):
        model.load_state_dict(run["model"])
        outs.append(forward(model))
    torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-4)
    losses = [[float(row.split(",")[2]) for row in (folder / "log.csv").read_text().splitlines()[1:]]
              for folder in folders]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
