"""diffussm.py: counts, the kernel in three ways, both directions, frozen kernels, torch.compile, the equations."""
import cmath
import copy
import importlib.util
import math
import pickle
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import train
from diffusion import UserError, fold, normal
from support import cost, longconv
from support.checkpoint import load_paper
from support.parallel import recompute

diffussm = load_paper("diffussm")
ROOT = Path(__file__).resolve().parent.parent


def meta(preset, shape=(4, 32, 32), num_classes=1000, **options):
    with torch.device("meta"):
        return diffussm.build(preset, shape, num_classes, **options)[0]


def count(module):
    return sum(p.numel() for p in module.parameters())


def small(shape=(3, 8, 8), num_classes=5, preset="tiny", paper=diffussm, **options):
    torch.manual_seed(0)
    options = dict(width=16, depth=2, ratio=2, state=8) | options
    model, diffusion = paper.build(preset, shape, num_classes, **options)
    with torch.no_grad():           # the last layers start at zero, and there most gradients vanish
        model.final.weight.normal_(0, 0.2)
        model.final_adaln[-1].weight.normal_(0, 0.02)
        for block in model.blocks:
            block.condition[-1].weight.normal_(0, 0.1)
    return model, diffusion


def ssm_inputs(channels, N, dtype, init="lin", method="zoh", seed=0, **steps):
    """-> a layer; its parameters log_dt, Re and Im of A, and C; and (log_Abar, CB), made from them."""
    torch.manual_seed(seed)
    layer = diffussm.BidirectionalS4D(channels, N, init, method, **steps).to(dtype)
    leaves = [layer.log_dt, layer.log_neg_A_real, layer.A_imag, layer.C]
    return layer, leaves, layer.discretized(dtype)


def dense(U, K):
    """The convolution as double sums: Y_l = sum_{i<=l} K_{l-i} U_i in the first half of the channels, and
    Y_l = sum_{i>=l} K_{i-l} U_i in the second."""
    L, half = U.shape[1], U.shape[2] // 2
    lag = torch.arange(L)[:, None] - torch.arange(L)                            # l - i
    matrix = torch.where(lag >= 0, K[:, lag.clamp(min=0)], 0.0)                 # (2D, l, i)
    matrix[half:] = torch.where(lag <= 0, K[half:][:, (-lag).clamp(min=0)], 0.0)
    return torch.einsum("hli,bih->blh", matrix, U)


# --- sizes ---

@pytest.mark.parametrize("M, squares", [(1, 11), (2, 13), (4, 17)])
def test_a_blocks_matrices_count_as_in_the_paper(M, squares):
    """9 D^2 + 2 M D^2."""
    D = 1152
    with torch.device("meta"):
        block = diffussm.Block(D, M)
    linear = sum(m.weight.numel() for n, m in block.named_modules()
                 if isinstance(m, torch.nn.Linear) and "condition" not in n)
    assert linear + block.W_down.numel() == squares * D**2


@pytest.mark.parametrize("preset, parameters", [
    ("DiffuSSM-S", 32_279_824), ("DiffuSSM-L", 248_455_696), ("DiffuSSM-XL", 668_878_864)])
def test_parameter_counts(preset, parameters):
    model = meta(preset)
    assert count(model) == parameters
    assert preset != "DiffuSSM-XL" or abs(parameters / 673e6 - 1) < 0.01        # "about 673M"


def test_where_the_parameters_of_xl_are():
    model = meta("DiffuSSM-XL")
    block = model.blocks[0]
    assert len(model.blocks) == 29 and count(block) == 22_876_416
    assert count(block.ssm) == 299_520 and count(block.condition) == 5_313_024
    outside = (model.embed, model.time_embed, model.label_embed, model.final_adaln, model.final)
    assert [count(m) for m in outside] == [10_368, 1_624_320, 1_153_152, 2_656_512, 18_448]


def test_unconditional_has_no_label_table():
    assert meta("DiffuSSM-XL", num_classes=0).label_embed is None
    assert count(meta("DiffuSSM-XL", num_classes=0)) == 668_878_864 - 1_153_152


def test_multiply_adds_by_hand():
    """A matrix at each of J tokens, or once an image where it reads time and class; and the convolutions."""
    model, diffusion = small()
    J, L = 32, 64
    matrices = sum(p.numel() * (1 if any(part in n for part in ("time_embed", "condition", "adaln")) else J)
                   for n, p in model.named_parameters()
                   if p.ndim > 1 and ".ssm." not in n and "b_down" not in n and "label" not in n)
    n = 2 * L
    convolutions = len(model.blocks) * 32 * (2.5 * n * math.log2(n) + 3 * (L + 1))
    counted = cost.multiply_adds(model, diffusion, cost.blank_batch(diffusion, model.shape, 1, 5))
    assert counted == matrices + convolutions
    assert longconv.operations((3, L, 32), (32, L)) == 3 * convolutions         # two blocks; half are multiply-adds


def test_the_table_shows_the_papers_figures(capsys):
    runpy.run_path(str(ROOT / "diffussm.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for figure in ("668,878,864", "about 673M", "256.2G", "1024.7G", "70.1G", "1121.0G", "280.3", "1066.2",
                   "= 13 D^2", " 260.3G", " 1043.5G", "437.6G", "109.4G", " 4.0G", " 18.6G", " 6.3G", " 26.4G"):
        assert figure in printed


# --- S4D ---

@pytest.mark.parametrize("method", ["zoh", "bilinear"])
@pytest.mark.parametrize("L", [1, 7, 256, 1024])
def test_three_kernels_agree(L, method):
    """The sum over powers, the product of two small matrices, and the recurrence's answer to an impulse. Outputs and
    gradients."""
    # "bilinear" makes fast states decay slowly, so their phase turns further. In float32 the gradients of all three
    # forms are then 2e-5 away from float64.
    for dtype, tolerance in ((torch.float32, 1e-5 if method == "zoh" else 4e-5), (torch.float64, 1e-10)):
        impulse = torch.zeros(1, L, 6, dtype=dtype)
        impulse[:, 0, :3] = 1           # the right half is read from the right
        impulse[:, -1, 3:] = 1

        def recurrent(log_Abar, CB, L):
            Y = diffussm.ssm_ref(impulse, log_Abar, CB, torch.zeros(6, dtype=dtype))[0].T
            return torch.cat([Y[:3], Y[3:].flip(1)])

        results = []
        for form in (diffussm.kernel_ref, diffussm.kernel, recurrent):
            _, leaves, discretized = ssm_inputs(6, 16, dtype, method=method)
            K = form(*discretized, L)
            dK = torch.randn(K.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            results.append([K, *torch.autograd.grad(K, leaves, dK)])
        for other in results[1:]:
            for got, want in zip(other, results[0]):
                assert got.dtype == dtype
                assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("init", ["inv", "legs"])
def test_fast_kernel_is_as_exact_as_the_definition(init):
    """Both in float32, against float64, with fast states, and a length (1023) that leaves the last row ragged."""
    _, _, discretized = ssm_inputs(6, 64, torch.float32, init)
    exact = diffussm.kernel_ref(*(x.to(torch.complex128) for x in discretized), 1023)
    errors = [(form(*discretized, 1023) - exact).abs().max() / exact.abs().max()
              for form in (diffussm.kernel, diffussm.kernel_ref)]
    assert errors[0] < 2e-5 and errors[0] < 3 * errors[1]


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
@pytest.mark.parametrize("dt", [1e-5, 1e-6])
def test_small_steps_keep_their_digits(dt, method):
    """Abar is then almost 1. Its difference from 1, or its logarithm, would lose most digits in float32."""
    layer, _, discretized = ssm_inputs(6, 64, torch.float32, "inv", method, dt_min=dt, dt_max=dt)
    K = diffussm.kernel(*discretized, 1024)
    exact = diffussm.kernel_ref(*layer.double().discretized(torch.float64), 1024)
    assert ((K - exact).abs().amax(1) < 1e-5 * exact.abs().amax(1)).all()


def test_kernel_gradcheck():
    log_Abar = torch.complex(-torch.rand(2, 3), 3 * torch.randn(2, 3)).to(torch.complex128).requires_grad_()
    CB = torch.randn(2, 3, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, c: diffussm.kernel(a, c, 7), (log_Abar, CB))


def saved_bytes(function):
    """The memory that autograd keeps for backward; tensors that share memory count once."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = function()
    del y
    return sum(kept.values())


def test_fast_kernel_keeps_little_for_backward():
    """At N = 64, L = 1024. It holds for any number of channels (benchmarks/s4d.py has 2304)."""
    _, _, discretized = ssm_inputs(24, 64, torch.float32)
    discretized = [x.detach().requires_grad_() for x in discretized]
    definition, fast = (saved_bytes(lambda: form(*discretized, 1024))
                        for form in (diffussm.kernel_ref, diffussm.kernel))
    assert definition > 24 * 32 * 1024 * 8 and definition > 7.9 * fast


@pytest.mark.parametrize("L", [1, 2, 7, 63, 256])
def test_layer_equals_recurrence_and_double_sum(L):
    """Outputs and gradients of all inputs and parameters."""
    layer, leaves, _ = ssm_inputs(8, 8, torch.float64)
    g = torch.Generator().manual_seed(1)
    U, dY = (torch.randn(3, L, 8, generator=g, dtype=torch.float64) for _ in range(2))
    U.requires_grad_()
    results = []
    for form in (lambda U, log_Abar, CB, direct: layer(U), diffussm.ssm_ref,
                 lambda U, log_Abar, CB, direct: dense(U, diffussm.kernel_ref(log_Abar, CB, L)) + direct * U):
        Y = form(U, *layer.discretized(torch.float64), layer.D)
        results.append([Y, *torch.autograd.grad(Y, [U, layer.D, *leaves], dY)])
    for got, want, summed in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(got, summed, rtol=1e-9, atol=1e-10)


def test_convolution_in_tiles(monkeypatch):
    U = torch.randn(7, 5, 6, dtype=torch.float64, requires_grad=True)
    K = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for most, channels, images in ((2**18, 2, 1), (3 * 3 * 5, 2, 3), (2 * 5, 4, 7), (1, 6, 7)):
        monkeypatch.setattr(longconv, "TILE", {"cpu": most})
        parts = longconv.tiles(U)
        assert len(parts) == channels and all(len(batches) == images for *_, batches in parts)
        Y = longconv.convolve(U, K)
        results.append([Y, *torch.autograd.grad(Y.square().sum(), (U, K))])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
    monkeypatch.setattr(longconv, "TILE", {"cpu": 3 * 3 * 5})
    assert torch.autograd.gradcheck(longconv.convolve, (U, K))
    assert saved_bytes(lambda: longconv.convolve(U, K)) == 8 * (U.numel() + K.numel())


def test_fast_convolution_equals_the_plain_one():
    """To rounding."""
    for shape in ((3, 5, 6), (2, 64, 10), (40, 256, 64)):       # the last one takes several tiles
        U, K = torch.randn(shape, requires_grad=True), torch.randn(shape[2], shape[1], requires_grad=True)
        dY, results = torch.randn(shape), []
        for form in (longconv.convolve, diffussm.convolve_ref):
            Y = form(U, K)
            results.append([Y, *torch.autograd.grad(Y, (U, K), dY)])
        for fast, plain in zip(*results):
            assert (fast - plain).norm() <= 1e-6 * plain.norm()


@pytest.mark.parametrize("channels, kernel", [(5, (5, 4)), (6, (6, 3)), (6, (6, 5)), (6, (4, 4))])
def test_kernels_that_do_not_fit_are_refused(channels, kernel):
    """The tiles of an odd number of channels leave one as it was in memory. A kernel of another size would be cut."""
    with pytest.raises(ValueError, match="do not fit: make them"):
        longconv.convolve(torch.zeros(2, 4, channels), torch.zeros(kernel))


def test_operators_are_what_pytorch_expects():
    """Their shapes without numbers are right, and they change none of their inputs."""
    U, K = torch.randn(3, 5, 6, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    tests = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(longconv.convolution, (U, K), test_utils=tests)
    torch.library.opcheck(longconv.convolve_backward, (U.detach(), U.detach(), K.detach()), test_utils=tests)


def test_runs_without_support(monkeypatch):
    """With diffusion.py alone: the same kernels, outputs, gradients and losses."""
    with monkeypatch.context() as hidden:
        for name in ["support", *(name for name in sys.modules if name.startswith("support."))]:
            hidden.setitem(sys.modules, name, None)
        spec = importlib.util.spec_from_file_location("diffussm_alone", ROOT / "diffussm.py")
        alone = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(alone)
    assert alone.convolve is alone.convolve_ref and diffussm.convolve is longconv.convolve
    x0, t = normal(fold(0, torch.arange(4)), (3, 8, 8)), torch.arange(4) * 300
    noise, y = normal(fold(1, torch.arange(4)), (3, 8, 8)), torch.tensor([0, 1, -1, 2])
    results = []
    for paper in (diffussm, alone):
        model, diffusion = small(paper=paper)
        K = [block.ssm.impulse_response(64) for block in model.blocks]
        out = model(x0, t, y)
        gradients = torch.autograd.grad(out.square().sum(), list(model.parameters()))
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        for _ in range(5):
            loss = diffusion.loss(model, x0, t, noise, y=y)["loss"].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append((K, out, gradients, torch.stack(losses)))
    (K, out, gradients, losses), (K_alone, out_alone, gradients_alone, losses_alone) = results
    assert all(map(torch.equal, K, K_alone))
    for got, want in zip((out_alone, *gradients_alone), (out, *gradients)):
        assert (got - want).norm() <= 1e-5 * want.norm()
    torch.testing.assert_close(losses_alone, losses, rtol=1e-5, atol=0)
    assert losses[4] < losses[0]


def test_each_direction_sees_the_current_token_and_its_own_side():
    layer, _, _ = ssm_inputs(8, 8, torch.float32)
    U = torch.randn(1, 9, 8)
    changed = U.clone()
    changed[:, 4] += 1
    moved = ((layer(changed) - layer(U)).abs() > 1e-4)[0]
    assert moved[:, :4].any(1).tolist() == [False] * 4 + [True] * 5
    assert moved[:, 4:].any(1).tolist() == [True] * 5 + [False] * 4


def test_zero_order_hold_is_exact_for_steps_and_bilinear_is_the_trapezoid():
    """"zoh" against many small Euler steps of h' = A h + U, with U constant over each dt; "bilinear" against
    (1 - dt A/2) h_l = (1 + dt A/2) h_{l-1} + dt U_l."""
    A, dt, U = -0.5 + 3j, 0.3, [1.0, -2.0, 0.5]
    tensors = torch.tensor([[A]], dtype=torch.complex128), torch.tensor([dt], dtype=torch.float64)
    for method in ("zoh", "bilinear"):
        log_Abar, Bbar = (v.item() for v in diffussm.discretize(*tensors, method))
        h = expected = 0
        for U_l in U:
            h = cmath.exp(log_Abar) * h + Bbar * U_l
            if method == "zoh":
                for _ in range(100_000):
                    expected += 3e-6 * (A * expected + U_l)
            else:
                expected = ((1 + dt * A / 2) * expected + dt * U_l) / (1 - dt * A / 2)
        assert abs(h - expected) < (1e-5 if method == "zoh" else 1e-12)


def test_initial_state_matrices():
    omega, _ = diffussm.initial_state_matrix("lin", 64)
    assert omega[0] == 0 and omega[-1].item() == pytest.approx(97.39, abs=0.01)       # 31 pi
    omega, _ = diffussm.initial_state_matrix("inv", 64)
    assert omega[0].item() == pytest.approx(1283.5, abs=0.1) and omega[-1] > 0
    # legs: B^T e^(At) B, with HiPPO's matrix without its rank-one part, must follow from the eigenvalues
    N, t = 16, 0.1
    n = torch.arange(N, dtype=torch.float64)
    hippo = -((2 * n[:, None] + 1) * (2 * n + 1)).sqrt().tril(-1) - torch.diag(n + 1)
    P = (n + 0.5).sqrt()
    A, B = hippo + P[:, None] * P, (2 * n + 1).sqrt()
    omega, b = diffussm.initial_state_matrix("legs", N)
    assert len(omega) == N // 2
    diagonal = 2 * (b.abs()**2 * ((-0.5 + 1j * omega) * t).exp()).sum().real
    torch.testing.assert_close(diagonal, B @ torch.matrix_exp(A * t) @ B)
    # the layer begins with these: Re A = -1/2, so that a state remembers 2 / dt tokens, and B within C
    (plain, *_), (legs, *_) = (ssm_inputs(4, N, torch.float32, init) for init in ("lin", "legs"))
    half_dt = 0.5 * plain.log_dt.exp()[:, None].expand(4, N // 2)
    torch.testing.assert_close(plain.discretized()[0].real, -half_dt)
    C, C_and_B = (torch.view_as_complex(layer.C) for layer in (plain, legs))
    torch.testing.assert_close(C_and_B, C * b.to(C.dtype))


def test_inits_and_discretizations_are_different_models():
    kernels = [diffussm.kernel(*ssm_inputs(4, 16, torch.float32, init, method)[2], 32)
               for init in ("lin", "inv", "legs") for method in ("zoh", "bilinear")]
    assert all(k.isfinite().all() for k in kernels)
    for i, k in enumerate(kernels):
        assert not any(torch.allclose(k, other, atol=0.01) for other in kernels[:i])


def test_no_parameter_is_complex_and_bf16_weights_survive():
    layer, _, _ = ssm_inputs(8, 8, torch.float32)
    assert not any(p.is_complex() for p in layer.parameters())
    U = torch.randn(2, 20, 8)
    rough = layer.bfloat16()(U.bfloat16())
    exact = layer.float()(U.bfloat16().float())                 # the weights stay rounded
    assert rough.dtype == torch.bfloat16 and (rough - exact).norm() < 0.01 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(U)
    assert torch.equal(inside, layer(U))                        # autocast does not reach into it


# --- frozen kernels ---

@pytest.fixture
def made(monkeypatch):
    """Counts calls of `kernel`."""
    calls, original = [], diffussm.kernel
    monkeypatch.setattr(diffussm, "kernel", lambda *args: calls.append(1) or original(*args))
    return calls


def test_sampling_makes_each_kernel_once(made):
    model, diffusion = small(depth=3)
    model.eval()
    cond = dict(y=torch.tensor([1, 2]))
    diffusion.sample(model, model.shape, torch.arange(2), sampler="ddpm", steps="50", **cond)
    assert len(made) == 3
    diffusion.sample(model, model.shape, torch.arange(2), steps="10", cfg_scale=2, **cond)
    assert len(made) == 6


@pytest.mark.parametrize("dtype, bf16", [
    (torch.float32, False), (torch.float32, True), (torch.float64, False)])
def test_frozen_equals_fresh(dtype, bf16, made):
    model, _ = small()
    model.eval().to(dtype).time_embed.register_forward_pre_hook(lambda m, args: args[0].to(dtype))
    x, t = torch.randn(2, 3, 8, 8, dtype=dtype), torch.tensor([3, 700])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        fresh = model(x, t)
        made.clear()
        with model.frozen():
            assert torch.equal(model(x, t), fresh) and torch.equal(model(x, t), fresh)
    assert len(made) == 2


def test_frozen_kernels_end_with_the_context():
    """After an error, too; and an inner context does not end the outer one."""
    model, _ = small()
    model.eval()
    x, t, names = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), list(model.state_dict())
    with torch.no_grad():
        before = model(x, t)
        with pytest.raises(KeyError), model.frozen():
            with model.frozen():
                assert list(model.state_dict()) == names
            for block in model.blocks:
                block.ssm.C.mul_(2)
            assert torch.equal(model(x, t), before)             # still those of the start
            raise KeyError
        after = model(x, t)
        assert not torch.allclose(after, before)
        with model.frozen():
            assert torch.equal(model(x, t), after)


def test_frozen_kernels_are_not_used_in_training_or_with_gradients(made):
    model, _ = small()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    with model.frozen():
        made.clear()
        model.eval()(x, t).sum().backward()
        assert len(made) == 2 and model.blocks[0].ssm.C.grad.any()
        with torch.no_grad():
            model.train()(x, t)
    assert len(made) == 4


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_not_frozen(twin_of):
    model, _ = small()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    with torch.no_grad(), model.eval().frozen():
        twin, before = twin_of(model), model(x, t)
        for block in twin.blocks:
            block.ssm.C.mul_(2)
        changed = twin(x, t)
        assert torch.equal(model(x, t), before) and not torch.allclose(changed, before)
        with twin.frozen():
            assert torch.equal(twin(x, t), changed)


def test_sampling_between_training_steps_follows_the_weights():
    """As in train.py, twice: the weights move, their average follows, and the average draws samples."""
    model, diffusion = small()
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pictures = []
    for step in range(2):
        model(torch.randn(2, 3, 8, 8), torch.tensor([3, 700])).square().sum().backward()
        optimizer.step()
        train.update_ema(average, model, step, 0.9)
        fresh = small()[0].eval()
        fresh.load_state_dict(average.state_dict())
        pair = [diffusion.sample(m, m.shape, torch.arange(2), steps="4") for m in (average, fresh)]
        assert torch.equal(*pair)
        pictures.append(pair[0])
    assert not torch.allclose(*pictures)


# --- torch.compile ---

def test_compiles_in_one_graph_without_a_break():
    """One graph for training, and one for all steps of all samples."""
    model, _ = small(depth=1, width=8)
    counter = CompileCounterWithBackend("aot_eager")
    net = torch.compile(model, fullgraph=True, backend=counter)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.tensor([1, -1])
    outs = [f(x, t, y) for f in (net, model)]
    gradients = [torch.autograd.grad(out.square().sum(), list(model.parameters())) for out in outs]
    torch.testing.assert_close([outs[0], *gradients[0]], [outs[1], *gradients[1]])
    assert counter.frame_count == 1
    model.eval()
    for _ in range(2):
        with torch.no_grad(), net.frozen():
            for step in range(3):
                torch.testing.assert_close(net(x, t - step, y), model(x, t - step, y))
        with torch.no_grad():
            model.blocks[0].ssm.C.mul_(2)                       # kernels are inputs of the graph
    assert counter.frame_count == 2


# --- block and model ---

@pytest.mark.parametrize("M, J", [(4, 6), (3, 5), (1, 7)])
def test_block_is_the_papers_equations(M, J):
    """Token by token and phase by phase, in the paper's letters. L is 24, 15 and 7."""
    D, L = 12, J * M
    model, _ = small(ratio=M, width=D, shape=(1, J, M))
    block = model.blocks[0]
    x, c = torch.randn(2, J, D), torch.randn(2, D)
    sigma = F.gelu
    shift, scale, alpha = block.condition(c)[:, None].chunk(3, -1)
    I = F.layer_norm(x, (D,), eps=1e-6) * (1 + scale) + shift
    W_up, b_up = block.W_up.weight.view(M, 2 * D, D), block.W_up.bias.view(M, 2 * D)
    U = torch.stack([sigma(sigma(block.W_0(I[:, l // M])) @ W_up[l % M].T + b_up[l % M])
                     for l in range(L)], dim=1)
    Y = diffussm.ssm_ref(U, *block.ssm.discretized(), block.ssm.D)
    D_m, I_prime = 2 * D // M, torch.empty(2, J, 2 * D)
    for l in range(L):
        j, m = l // M, l % M
        I_prime[:, j, D_m * m:D_m * (m + 1)] = sigma(Y[:, l] @ block.W_down[m] + block.b_down[m])
    O = block.W_3(sigma(block.W_2(I_prime)) * sigma(block.W_1(I)))
    torch.testing.assert_close(block(x, c), x + alpha * O, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [
    {}, dict(ratio=1), dict(patch=2, ratio=1), dict(patch=2, ratio=4), dict(variance="learned"),
    dict(num_classes=0), dict(init="inv"), dict(init="legs", discretization="bilinear"),
    dict(shape=(1, 9, 7), ratio=1), dict(shape=(1, 9, 7), ratio=3, width=6),
    dict(shape=(2, 6, 10), ratio=4)], ids=lambda o: str(o) or "default")
def test_gradient_reaches_every_parameter(options):
    model, diffusion = small(**options)
    x0, t = torch.randn(6, *model.shape), torch.arange(6) * 150
    cond = {"y": torch.tensor([0, 1, 2, 3, 4, -1])} if model.num_classes else {}
    out = model(x0, t, **cond)
    assert out.shape[1] == x0.shape[1] * (2 if diffusion.variance == "learned" else 1)
    diffusion.loss(model, x0, t, torch.randn_like(x0), **cond)["loss"].sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


def test_pixels_come_back_in_place():
    """Tokens are numbered row by row and folded M at a time; the channels of a group's pixel k begin at k x channels."""
    model, _ = small(shape=(2, 4, 6), ratio=4, num_classes=0, width=16)
    with torch.no_grad():
        model.final.weight.zero_()
        model.final.bias.copy_(torch.arange(8.))
    out = model(torch.zeros(1, 2, 4, 6), torch.tensor([0]))
    assert out[0, 1, 1, 3] == (9 % 4) * 2 + 1                       # row 1, column 3: token 9
    x, folded = torch.zeros(1, 2, 4, 6), []
    model.embed.register_forward_hook(lambda m, args, o: folded.append(args[0]))
    x[0, 1, 1, 3] = 1
    model(x, torch.tensor([0]))
    assert folded[0].nonzero().tolist() == [[0, 9 // 4, (9 % 4) * 2 + 1]]


def test_positions_are_those_of_each_groups_first_pixel():
    model, _ = small(shape=(1, 4, 6), ratio=4)                      # groups straddle rows
    rows, columns = torch.tensor([0, 0, 1, 2, 2, 3]), torch.tensor([0, 4, 2, 0, 4, 2])
    expected = torch.cat([diffussm.sinusoid(rows, 8), diffussm.sinusoid(columns, 8)], dim=1)
    assert torch.equal(model.positions(), expected) and len(expected.unique(dim=0)) == 6


def test_an_empty_model_filled_from_a_checkpoint_is_the_same_model():
    """Built on "meta", so without numbers; every number that it needs must be in the checkpoint."""
    model, _ = small()
    with torch.device("meta"):
        empty, _ = diffussm.build("tiny", model.shape, 5, width=16, depth=2, ratio=2, state=8)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    assert torch.equal(empty(x, t), model(x, t))


def test_first_prediction_is_zero_and_blocks_start_as_the_identity():
    model, _ = diffussm.build("tiny", (3, 8, 8), 5)
    assert not model(torch.randn(2, 3, 8, 8), torch.tensor([1, 2])).any()
    x = torch.randn(2, 16, 64)
    assert torch.equal(model.blocks[0](x, torch.randn(2, 64)), x)


def test_every_pixel_sees_every_other_time_and_class():
    model, _ = small()
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([500])
    base = model(x, t, torch.tensor([1]))
    for pixel in ((0, 0), (7, 7), (3, 4)):
        changed = x.clone()
        changed[..., pixel[0], pixel[1]] += 1
        assert ((model(changed, t, torch.tensor([1])) - base).abs().amax((0, 1)) > 0).all()
    for other in (model(x, t + 300, torch.tensor([1])), model(x, t, torch.tensor([2])), model(x, t)):
        assert ((other - base).abs().amax((0, 1)) > 0).all()
    assert torch.equal(model(x, t), model(x, t, torch.tensor([-1])))


def test_stays_close_under_bf16():
    model, diffusion = small(shape=(1, 14, 14), ratio=4, width=32)
    stream, dense = [], []
    model.blocks[0].register_forward_hook(lambda m, args, out: stream.append(out.dtype))
    model.blocks[0].W_2.register_forward_hook(lambda m, args, out: dense.append(args[0].dtype))
    x0, t, noise = torch.randn(4, 1, 14, 14), torch.arange(4) * 300, torch.randn(4, 1, 14, 14)
    results = []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = diffusion.loss(model, x0, t, noise)["loss"]
            gradient = torch.autograd.grad(loss.mean(), model.blocks[0].ssm.C)[0]
            with torch.no_grad():
                results.append((model.eval()(x0, t), model.train()(x0, t), gradient))
        assert loss.isfinite().all()
    assert set(stream) == {torch.float32} and dense == [torch.float32] * 3 + [torch.bfloat16] * 3
    for (exact, rough), tolerance in zip(zip(*results), (2e-2, 2e-2, 5e-2)):
        assert (exact - rough).norm() < tolerance * exact.norm()


def test_recomputing_gives_the_same_gradients():
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    grads = []
    for on in (False, True):
        model, _ = small()
        if on:
            recompute(model)
        model(x, t).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


@pytest.mark.parametrize("call, fix", [
    (dict(ratio=3), "ratio 3 must divide the 64 tokens .* try ratio=2 or ratio=4"),
    (dict(shape=(1, 9, 7), ratio=2), "try ratio=1"), (dict(width=6, ratio=8), "try ratio=2 or ratio=4"),
    (dict(patch=3), "try 6x6 or 9x9"), (dict(state=7), "try 8"), (dict(init="hippo"), "lin or inv or legs"),
    (dict(discretization="euler"), "zoh or bilinear"), (dict(colour=3), "unknown option"),
    (dict(ratio=0), "at least 1"), (dict(dt_min=1.0), "try dt_min=0.001"), (dict(schedule="x"), "linear"),
    (dict(width=2, ratio=1), "try 64"), (dict(preset="huge"), "DiffuSSM-XL, tiny"),
    (dict(shape=(3, 4, 8, 8)), "pictures, not videos"), (dict(label_std=-1.0), "at least 0"),
    (dict(width=8.0), "a whole number")])
def test_wrong_options_are_refused_with_the_fix(call, fix):
    with pytest.raises(ValueError, match=fix):
        small(**call)


def test_what_does_not_fit_the_model_is_refused():
    """A picture of another shape with as many tokens, and a label that is no class."""
    model, _ = small()
    for shape, y, fix in (((3, 4, 16), 1, "images of 3x8x8"), ((3, 8, 8), 5, "classes 0 to 4")):
        with pytest.raises(UserError, match=fix):
            model(torch.zeros(1, *shape), torch.tensor([3]), torch.tensor([y]))
    with pytest.raises(UserError, match="state 5 is odd.*try 6"):
        diffussm.BidirectionalS4D(8, state=5)


def test_overfits_one_batch():
    model, diffusion = small(num_classes=2, shape=(1, 8, 8))
    x0 = torch.sign(normal(fold(0, torch.arange(8)), (1, 8, 8)))
    t, noise = torch.arange(8) * 120, normal(fold(1, torch.arange(8)), (1, 8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        loss = diffusion.loss(model, x0, t, noise, y=torch.arange(8) % 2)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02                                              # it starts above 1


def test_trains_and_samples_from_the_command_line(tmp_path, capsys):
    train.main(["--model", "diffussm", "--smoke", "--image-size", "16", "--set", "width=16", "depth=2",
                "--global-batch-size", "4", "--device", "cpu"])
    assert "sampling all worked" in capsys.readouterr().out
