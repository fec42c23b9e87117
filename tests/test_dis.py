"""dis.py: parameter counts, the scan against its definition, directions, skips, and that it learns."""
import math
import re
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import tables
from diffusion import fold, normal
from support import scan
from support.checkpoint import load_paper
from support.cost import blank_batch, multiply_adds
from support.parallel import recompute

dis = load_paper("dis")
ROOT = Path(__file__).resolve().parent.parent


def count(preset, shape, num_classes=0, **options):
    with torch.device("meta"):
        model, _ = dis.build(preset, shape, num_classes, **options)
    return sum(p.numel() for p in model.parameters())


def small(shape=(3, 16, 16), num_classes=5, **options):
    torch.manual_seed(0)
    options = dict(width=32, depth=4, patch=4, expand=2, state=4, time="token") | options
    model, diffusion = dis.build("tiny", shape, num_classes, **options)
    with torch.no_grad():           # away from zero, where most gradients vanish
        model.final.weight.normal_(0, 0.05)
    return model, diffusion


def inputs(b, L, D, N, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    delta = torch.empty(b, L, D, dtype=dtype).uniform_(-6.9, 0, generator=g).exp()   # 1e-3 .. 1
    A = -torch.arange(1, N + 1, dtype=dtype).repeat(D, 1) * (0.1 * randn(D, N)).exp()
    return [x.requires_grad_() for x in
            (randn(b, L, D), delta, A, randn(b, L, N), randn(b, L, N), randn(D))]


# --- sizes ---

@pytest.mark.parametrize("size, pixels, latents, gmacs", [
    ("S", 28_457_168, 29_132_752, 1.9), ("B", 119_139_168, 121_163_552, 7.7),
    ("M", 229_390_176, 231_414_560, 15.0), ("L", 404_026_464, 407_249_952, 26.3),
    ("H", 900_558_432, 906_966_560, 58.2)])
def test_parameter_counts_are_the_papers(size, pixels, latents, gmacs):
    assert count(f"DiS-{size}/4", (3, 32, 32)) == pixels
    assert count(f"DiS-{size}/2", (4, 32, 32), 1000) == latents
    assert tables.counted(dis, f"DiS-{size}/4", (3, 32, 32)) / 1e9 == pytest.approx(gmacs, abs=0.06)


@pytest.mark.parametrize("options", [{}, dict(time="adaln"), dict(num_classes=0, depth=7)], ids=str)
def test_multiply_adds_by_hand(options):
    """A weight is used once for each token that it sees. The scan takes 4 multiply-adds for each number of the
    state. The causal convolution also makes conv - 1 tokens that are cut off."""
    model, diffusion = small(**options)
    L, patches, want = model.pos_embed.shape[1], 16, 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            tokens = L if "mixer" in name or "skip" in name else patches if name in ("patch_embed", "final") else 1
            want += tokens * module.weight.numel()
        if isinstance(module, dis.Direction):
            want += (L + module.conv.kernel_size[0] - 1) * module.conv.weight.numel() + L * 4 * module.A_log.numel()
    assert multiply_adds(model, diffusion, blank_batch(diffusion, model.shape, 1, model.num_classes)) == want


def test_the_table_counts_every_block():
    """It counts with two depths and multiplies."""
    whole, diffusion = dis.build("tiny", (3, 16, 16))
    batch = blank_batch(diffusion, (3, 16, 16), 1)
    assert tables.counted(dis, "tiny", (3, 16, 16)) == multiply_adds(whole, diffusion, batch)


# --- the scan ---

@pytest.mark.parametrize("N", [1, 16])
@pytest.mark.parametrize("L, segments", [(1, 1), (2, 1), (37, 1), (256, 1), (331, 5)])
def test_scan_equals_reference(L, segments, N, monkeypatch):
    """Outputs and all gradients, several batch blocks and chunks, the last ones ragged; and segments."""
    monkeypatch.setitem(scan.ELEMENTS, "cpu", 2 * scan.CHUNK["cpu"][0] * N * 24)
    monkeypatch.setitem(scan.BUSY, "cpu", 3 * 24 * segments)
    x = inputs(3, L, 24, N, torch.float32)
    assert scan.segments(x[0]) == segments
    y, expected = dis.selective_scan(*x), dis.selective_scan_ref(*[v.double() for v in x])
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(y, x, dy)
    for got, want in zip((y, *grads), (expected, *torch.autograd.grad(expected, x, dy.double()))):
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def test_memory_of_a_scan_is_used_again_whatever_came_before():
    """A new thread has none yet. What inference mode makes, nothing outside of it may change."""
    y = []

    def scans():
        x = inputs(2, 5, 4, 3, torch.float32)
        with torch.inference_mode():
            y.append(dis.selective_scan(*(v.detach().clone() for v in x)))
        y.append(dis.selective_scan(*x))
        y[1].sum().backward()
        y.append(x[0].grad)
    thread = threading.Thread(target=scans)
    thread.start()
    thread.join()
    assert len(y) == 3 and torch.equal(y[0], y[1].detach())


@pytest.mark.parametrize("L, N, fast", [(1, 2, False), (2, 1, False), (37, 2, False),
                                        (256, 1, True), (256, 3, True)])
def test_scan_gradcheck(L, N, fast):
    assert torch.autograd.gradcheck(dis.selective_scan, inputs(2, L, 2, N, torch.float64),
                                    fast_mode=fast)


def test_scan_of_one_token_and_of_no_time():
    u, delta, A, B, C, D = inputs(2, 1, 4, 3, torch.float64)
    by_hand = D * u + ((delta * u)[..., None] * B[:, :, None] * C[:, :, None]).sum(-1)
    torch.testing.assert_close(dis.selective_scan(u, delta, A, B, C, D), by_hand)
    torch.testing.assert_close(dis.selective_scan(u, 0 * delta, A, B, C, D), D * u)


MEMORY = """
import re, sys, torch
from support.checkpoint import load_paper
dis = load_paper("dis")
def kb(key): return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
def tensors(b, L, D, N):
    x = [torch.randn(b, L, D), torch.rand(b, L, D), -torch.rand(D, N), torch.randn(b, L, N),
         torch.randn(b, L, N), torch.randn(D)]
    return [v.requires_grad_() for v in x], torch.randn(b, L, D)
def run(x, dy): return torch.autograd.grad(dis.selective_scan(*x), x, dy)
run(*tensors(2, 40, 8, 16))             # load the libraries before measuring
x, dy = tensors(64, 256, 512, 16)
open("/proc/self/clear_refs", "w").write("5")           # reset the high-water mark
before = kb("VmRSS")
run(x, dy)
print((kb("VmHWM") - before) * 1024 / (4 * 64 * 256 * 512))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_scan_memory_is_a_few_inputs():
    """Forward and backward at N = 16: the (B, L, D, N) tensor alone would be 16 of them."""
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 3 < float(done.stdout) < 10


@pytest.mark.parametrize("segments", [1, 3])
def test_scan_of_views(segments, monkeypatch):
    """As in the mixer: u transposed, B and C slices of one projection, y flipped. opcheck also compares what
    torch.compile believes of the operators with what they do."""
    monkeypatch.setattr(scan, "segments", lambda u: segments)
    u, delta, A, B, C, D = (v.detach() for v in inputs(2, 40, 4, 3, torch.float32))
    dense = [v.clone().requires_grad_() for v in (u, delta, A, B, C, D)]
    views = [*(v.mT.contiguous().mT for v in (u, delta, A)), *torch.cat([B, C], -1).split([3, 3], -1), D]
    assert not any(v.is_contiguous() for v in views[:5])
    views = [v.requires_grad_() for v in views]
    y, want = (dis.selective_scan(*x).flip(1) for x in (views, dense))
    pairs = zip(torch.autograd.grad(y.square().sum(), views), torch.autograd.grad(want.square().sum(), dense))
    assert torch.equal(y, want) and all(torch.equal(a, b) for a, b in pairs)
    torch.library.opcheck(scan.scan, views, test_utils=("test_schema", "test_autograd_registration",
                                                       "test_faketensor"))


def test_wrong_shapes_are_refused():
    """They would broadcast here, and be read out of bounds by a kernel."""
    x = inputs(2, 5, 4, 3, torch.float32)
    for i, wrong in ((1, x[1][:, :, :1]), (3, x[3][..., :1]), (4, x[4][:1]), (5, x[5][:1])):
        with pytest.raises(ValueError, match="do not fit"):
            dis.selective_scan(*x[:i], wrong, *x[i + 1:])


def test_autocast_changes_nothing():
    """Matrix products inside would become bf16, in backward too, if it runs in the same region."""
    x = inputs(2, 20, 4, 3, torch.float32)
    want = (y := dis.selective_scan(*x), *torch.autograd.grad(y.sum(), x))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, (y := dis.selective_scan(*x), *torch.autograd.grad(y.sum(), x)), want))


def test_bfloat16_inputs():
    """As autocast leaves u, B and C: as if they were made float32 first; gradients have their types."""
    x = inputs(2, 40, 4, 3, torch.float32)
    low = [v.detach().bfloat16().requires_grad_() if i in (0, 3, 4) else v for i, v in enumerate(x)]
    same = [v.detach().float().requires_grad_() for v in low]
    y, want = dis.selective_scan(*low), dis.selective_scan(*same)
    assert y.dtype == torch.float32 and torch.equal(y, want)
    for v, got, g in zip(low, torch.autograd.grad(y.sum(), low), torch.autograd.grad(want.sum(), same)):
        assert got.dtype == v.dtype and torch.equal(got, g.to(v.dtype))


def test_flops_that_the_counter_is_told():
    """Two for each multiply-add, of which a number of the state takes 4 forward and 12 backward."""
    x = inputs(3, 10, 5, 4, torch.float32)
    with FlopCounterMode(display=False) as counter:
        y = dis.selective_scan(*x)
        assert counter.get_total_flops() == 2 * 4 * 3 * 10 * 5 * 4
        y.sum().backward()
    assert counter.get_total_flops() == 2 * (4 + 12) * 3 * 10 * 5 * 4


def test_compiles_into_one_graph():
    """Forward and backward, training and not, without a break; and the numbers stay the same."""
    torch.manual_seed(0)
    model, _ = dis.build("tiny", (1, 8, 8), 3, width=16, depth=2)
    torch.nn.init.normal_(model.final.weight)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 7]), torch.tensor([1, 2])
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph
    for training in (True, False):
        net = torch.compile(model.train(training), backend=count, fullgraph=True)
        for _ in range(2):
            assert torch.equal(net(x, t, y), model(x, t, y))
    assert len(graphs) == 2
    net, weights = torch.compile(model.train(), backend="aot_eager", fullgraph=True), list(model.parameters())
    got, want = (torch.autograd.grad(f(x, t, y).sum(), weights) for f in (net, model))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


def test_scan_of_mamba_ssm(monkeypatch):
    """Time last, as its interface wants it, where there is a GPU; and a sentence if it is missing, or for a second
    derivative, which it lacks."""
    seen = []

    def theirs(u, delta, A, B, C, D):                   # stands in for the CUDA kernel
        seen.append(u.shape)
        return dis.selective_scan_ref(u.mT, delta.mT, A, B.mT, C.mT, D).mT
    interface = types.SimpleNamespace(selective_scan_fn=theirs)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", interface)
    x = inputs(2, 20, 4, 3, torch.float32)
    torch.testing.assert_close(scan.mamba_ssm_scan(*x), dis.selective_scan(*x))
    assert seen == [(2, 4, 20)]
    y = scan.mamba_ssm_scan(*x).sum()
    torch.autograd.grad(y, x, retain_graph=True)
    with pytest.raises(ValueError, match="no second derivatives: drop scan=mamba_ssm"):
        torch.autograd.grad(y, x, create_graph=True)
    gpu = types.SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(scan, "selective_scan", lambda *x: "ours")
    with torch.autograd.forward_ad.dual_level():
        assert scan.choose_scan("mamba_ssm")(gpu) == "ours"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", interface)
    model, _ = dis.build("tiny", (1, 8, 8), scan="mamba_ssm")
    model(torch.zeros(1, 1, 8, 8), torch.zeros(1).long())              # on a CPU ours
    assert len(seen) == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="pip install mamba-ssm"):
        dis.build("tiny", (1, 8, 8), scan="mamba_ssm")


# --- dis.py without support/ ---

FEW_STEPS = """
import torch
def few_steps(build):
    torch.manual_seed(0)
    model, diffusion = build("tiny", (1, 8, 8), 3, width=32, depth=4, time="token", variance="learned")
    torch.nn.init.normal_(model.final.weight, std=0.05)
    x0, t, noise = torch.randn(4, 1, 8, 8), torch.arange(4) * 300, torch.randn(4, 1, 8, 8)
    optimizer, y, found = torch.optim.SGD(model.parameters(), lr=0.1), torch.arange(4) - 1, []
    for step in range(5):
        loss = diffusion.loss(model, x0, t, noise, y=y)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            found += [model(x0, t, y).detach(), *(p.grad.clone() for p in model.parameters())]
        optimizer.step()
        found.append(loss.detach())
    return found
"""
ALONE = FEW_STEPS + """
import sys
from dis import build, selective_scan, selective_scan_ref
torch.save(few_steps(build), "found.pt")
shapes = (1, 2, 3), (1, 2, 3), (3, 2), (1, 2, 2), (1, 2, 2), (3,)
x = [torch.rand(shape) for shape in shapes]
assert torch.equal(selective_scan(*x), selective_scan_ref(*x))
assert [m for m in sys.modules if m.startswith("support.")] == ["support.namesake"]
"""


def test_without_support_it_is_the_same_network(tmp_path):
    """dis.py, diffusion.py and support/namesake.py in an empty folder: outputs, gradients and losses are equal up to
    rounding, though the scan is the definition."""
    for name in ("dis.py", "diffusion.py", "support/namesake.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "alone.py").write_text(ALONE)
    done = subprocess.run([sys.executable, "alone.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scope = {}
    exec(FEW_STEPS, scope)
    for got, want in zip(torch.load(tmp_path / "found.pt"), scope["few_steps"](dis.build), strict=True):
        assert (got - want).abs().max() <= 1e-5 * max(want.abs().max(), 1e-3)


def test_two_files_and_ten_lines_are_enough(tmp_path):
    """The loop of docs/dis.md, where dis.py has another name: then nothing of support/ is needed."""
    loop = re.search(r"```python\n(.*?)```", (ROOT / "docs/dis.md").read_text(), re.S)[1]
    shutil.copy(ROOT / "dis.py", tmp_path / "my_dis.py")
    shutil.copy(ROOT / "diffusion.py", tmp_path)
    loop = loop.replace("from dis import", "from my_dis import").replace("range(100)", "range(5)")
    (tmp_path / "loop.py").write_text(loop)
    done = subprocess.run([sys.executable, "loop.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "tensor" in done.stdout, done.stderr


# --- the mixer ---

def test_flipped_sequence_and_swapped_directions_give_the_flipped_output():
    torch.manual_seed(0)
    mixer, u = dis.BiMamba(16, state=4), torch.randn(2, 21, 16)
    y = mixer(u)
    mixer.forwards, mixer.backwards = mixer.backwards, mixer.forwards
    torch.testing.assert_close(mixer(u.flip(1)), y.flip(1))


def test_each_direction_is_causal_and_both_together_see_everything():
    torch.manual_seed(0)
    mixer, u = dis.BiMamba(16, state=4), torch.randn(1, 9, 16)
    changed = u.clone()
    changed[:, 4] += 1
    moved = lambda m: (m(changed) - m(u)).abs().amax((0, 2)) > 1e-7
    assert moved(mixer).all()
    silent = torch.zeros_like
    backwards = mixer.backwards.forward
    mixer.backwards.forward = silent
    assert moved(mixer).tolist() == [False] * 4 + [True] * 5
    mixer.forwards.forward, mixer.backwards.forward = silent, backwards
    assert moved(mixer).tolist() == [True] * 5 + [False] * 4


def test_both_directions_start_with_the_same_memories():
    """Departure 4: delta between 0.001 and 0.1, backwards too."""
    model, _ = small()
    for module in model.modules():
        if isinstance(module, dis.Direction):
            delta = torch.nn.functional.softplus(module.dt_proj.bias)
            assert delta.min() > 0.9e-3 and delta.max() < 0.11 and delta.max() / delta.min() > 10


# --- the convolution ---

def test_taps_equal_convolution():
    """A CPU adds tap after tap; all else, as here a subclass of Tensor, takes `conv`."""
    class Other(torch.Tensor):
        pass
    torch.manual_seed(0)
    direction, x, calls = dis.Direction(8, 2, 1, 4, "auto").double(), torch.randn(2, 5, 8).double(), []
    direction.conv.register_forward_hook(lambda *_: calls.append(1))
    ours = direction(x)
    assert not calls
    assert (direction(x.as_subclass(Other)) - ours).abs().max() < 1e-12 and calls


# --- the model ---

def by_hand(w, x, t, y, patch, conv, half):
    """The whole network for one image x (c, H, W), written anew from the glossary, with loops over tokens, in float64.
    w: the state dict. -> (c, H, W)"""
    linear = lambda name, v: v @ w[name + ".weight"].T + w.get(name + ".bias", 0)
    silu = lambda v: v / (1 + (-v).exp())
    rms = lambda name, v: v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"]

    def direction(name, x):                                         # (L, e), in reading order
        N, R, h, ys = w[name + ".A_log"].shape[1], w[name + ".dt_proj.weight"].shape[1], 0, []
        past = [torch.zeros_like(x[0])] * (conv - 1) + list(x)
        for now in range(len(x)):
            taps = w[name + ".conv.weight"][:, 0].T                 # (conv, e), the last is for the token itself
            u = silu(sum(taps[k] * past[now + k] for k in range(conv)) + w[name + ".conv.bias"])
            made = w[name + ".x_proj.weight"] @ u                   # (R + 2N,)
            delta = (1 + linear(name + ".dt_proj", made[:R]).exp()).log()                       # (e,)
            B, C = made[R:R + N], made[R + N:]
            h = (-delta[:, None] * w[name + ".A_log"].exp()).exp() * h + (delta * u)[:, None] * B       # (e, N)
            ys.append(h @ C + w[name + ".D"] * u)
        return torch.stack(ys)

    def mixer(name, v):
        x, z = linear(name + ".in_proj", v).chunk(2, dim=1)         # 2 x (L, e)
        y = direction(name + ".forwards", x) + direction(name + ".backwards", x.flip(0)).flip(0)
        return linear(name + ".out_proj", y * silu(z))

    c, rows, columns = x.shape[0], range(0, x.shape[1], patch), range(0, x.shape[2], patch)
    inside = [(i, j) for i in range(patch) for j in range(patch)]
    m = linear("patch_embed", torch.stack([torch.cat([x[:, row + i, col + j] for i, j in inside])
                                           for row in rows for col in columns]))                # (J, d)
    J, d = m.shape
    angles = torch.tensor([t / 10000 ** (k / (d // 2)) for k in range(d // 2)], dtype=torch.float64)
    step = linear("time_embed.2", silu(linear("time_embed.0", torch.cat([angles.cos(), angles.sin()]))))
    label = w["label_embed.weight"][y]                              # the last row: "no class"
    if len(w["pos_embed"][0]) > J:
        m = torch.cat([label[None], step[None], m])                 # (L, d)
    m, r, made = m + w["pos_embed"][0], 0, []
    for name in [*(f"shallow.{i}" for i in range(half)), "middle", *(f"deep.{i}" for i in range(half))]:
        if name + ".skip_linear.weight" in w:
            m = linear(name + ".skip_linear", torch.cat([m, made.pop()], dim=1))
        r = r + m
        normed = rms(name + ".norm", r)
        if name + ".adaln.weight" in w:
            shift, scale = linear(name + ".adaln", silu(step + label)).chunk(2)
            normed = normed * (1 + scale) + shift
        m = mixer(name + ".mixer", normed)
        made += [m] * name.startswith("shallow")
    v = rms("norm", r + m)[-J:]
    v = (v - v.mean(1, keepdim=True)) / (v.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    shift, scale = linear("final_adaln", silu(step + label)).chunk(2)
    v, out = linear("final", v * (1 + scale) + shift), torch.empty_like(x)
    for token, (row, col) in zip(v, [(row, col) for row in rows for col in columns]):
        for (i, j), pixel in zip(inside, token.split(c)):
            out[:, row + i, col + j] = pixel
    return out


@pytest.mark.parametrize("time", ["token", "adaln"])
def test_the_whole_network_by_hand(time):
    """Any change of the arithmetic or of an order shows here: of tokens, halves of a matrix, rows of an embedding."""
    model, _ = small((3, 8, 12), time=time)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)                          # none is zero, none is 1
    w = {k: v.double() for k, v in model.state_dict().items()}
    x, t, y = torch.randn(3, 3, 8, 12), torch.tensor([3, 70, 900]), torch.tensor([0, -1, 4])
    for i, got in enumerate(model(x, t, y)):
        want = by_hand(w, x[i].double(), t[i].item(), y[i].item(), 4, 4, 2)
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_first_weights():
    torch.manual_seed(0)
    model, _ = dis.build("tiny", (3, 8, 12), 5, width=32, depth=4, patch=4, expand=2, state=4, time="token",
                         pos_init="sincos", label_std=0.5)
    w = model.state_dict()
    for row, col in [(0, 0), (0, 2), (1, 0), (1, 2)]:               # half of the channels tell the row
        angles = [[n / 10000 ** (k / 8) for k in range(8)] for n in (row, col)]
        want = [f(a) for part in angles for f in (math.cos, math.sin) for a in part]
        torch.testing.assert_close(w["pos_embed"][0, 2 + 3 * row + col], torch.tensor(want), atol=1e-5, rtol=0)
    assert not w["pos_embed"][0, :2].any() and not w["final.weight"].any()
    assert 0.4 < w["label_embed.weight"].std() < 0.6
    for name, v in w.items():
        if name.endswith("A_log"):
            torch.testing.assert_close(v.exp(), torch.arange(1., 5).expand_as(v))
        elif name.endswith(".D"):
            assert (v == 1).all()
        elif name.endswith(".bias") and "dt_proj" not in name:
            assert v.any() == ("patch_embed" in name or "conv" in name), name
        elif name.endswith("_proj.weight") or "skip" in name:       # uniform; the sum over blocks does not grow
            most = v.shape[1]**-0.5 / (2 if "out_proj" in name else 1)
            assert 0.9 * most < v.abs().max() <= most, name


@pytest.mark.parametrize("options", [{}, dict(skip="add"), dict(skip="none"), dict(time="adaln"),
                                     dict(variance="learned"), dict(num_classes=0),
                                     dict(shape=(1, 8, 24)), dict(depth=3), dict(expand=1)],
                         ids=lambda o: str(o) or "default")
def test_gradient_reaches_every_parameter(options):
    model, diffusion = small(**options)
    for module in model.modules():
        if isinstance(module, dis.Block) and module.adaln is not None:
            torch.nn.init.normal_(module.adaln.weight, std=0.02)
    x0, t = torch.randn(6, *model.shape), torch.arange(6) * 150
    cond = {"y": torch.tensor([0, 1, 2, 3, 4, -1])} if model.num_classes else {}
    diffusion.loss(model, x0, t, torch.randn_like(x0), **cond)["loss"].sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


def test_options_change_the_model():
    concat, add, none = (count("tiny", (3, 32, 32), skip=s) for s in ("concat", "add", "none"))
    assert concat - add == 3 * (2 * 160 * 160 + 160) and add == none
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    outs = [small(skip=s)[0](x, t) for s in ("add", "none")]
    assert not torch.allclose(*outs)
    assert small(time="adaln")[0].pos_embed.shape[1] == 16          # no tokens but the patches
    assert small()[0].pos_embed.shape[1] == 18
    assert small(num_classes=0)[0].pos_embed.shape[1] == 17


def test_no_class_is_label_minus_one():
    model, _ = small()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    assert torch.equal(model(x, t), model(x, t, torch.tensor([-1, -1])))
    assert not torch.allclose(model(x, t), model(x, t, torch.tensor([0, 1])))


def test_what_does_not_fit_the_model_is_refused():
    """Label 5 of 5 would be read as "no class", and an 8x32 image has as many patches as a 16x16 one."""
    model, _ = small()
    with pytest.raises(ValueError, match="label 5, but this model has classes 0 to 4"):
        model(torch.zeros(2, 3, 16, 16), torch.tensor([3, 700]), torch.tensor([4, 5]))
    with pytest.raises(ValueError, match="images of 3x16x16, and got 3x8x32"):
        model(torch.zeros(2, 3, 8, 32), torch.tensor([3, 700]))


def test_stays_close_under_bf16_and_keeps_delta_and_the_residual_in_float32():
    model, _ = small()
    deltas, sums = [], []
    model.middle.mixer.backwards.dt_proj.register_forward_hook(lambda m, args, out: deltas.append(out))
    model.middle.register_forward_hook(lambda m, args, out: sums.append((out[1], args[1] + args[0].float())))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    exact = model(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, t)
    assert deltas[1].dtype == torch.float32 and not torch.equal(deltas[1], deltas[1].bfloat16().float())
    assert all(torch.equal(*pair) for pair in sums)
    assert (exact - rough).norm() < 0.03 * exact.norm()


def test_what_is_dropped_depends_on_the_image_s_seed():
    """Not on the other images of the batch, and not on whether blocks are computed twice (without seeds, too)."""
    x, t, seeds = torch.randn(4, 3, 16, 16), torch.tensor([3, 700, 30, 7]), torch.arange(4)
    model, _ = small(drop_path=0.5)
    together = model(x, t, seeds=seeds)
    torch.testing.assert_close(torch.cat([model(x[i:i + 1], t[i:i + 1], seeds=seeds[i:i + 1]) for i in range(4)]),
                               together)
    differ = (together - model(x, t, seeds=seeds + 4)).abs().amax((1, 2, 3)) > 0
    assert 1 < differ.sum() and not torch.equal(model(x, t), model(x, t))
    again, _ = small(drop_path=0.5)
    recompute(again)
    for given in (dict(seeds=seeds), {}):
        grads = []
        for net in (model, again):
            torch.manual_seed(0)
            grads.append(torch.autograd.grad(net(x, t, **given).square().sum(), list(net.parameters()),
                                             allow_unused=True))
        assert all(a is b is None or torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))
    assert torch.equal(model.eval()(x, t), again.eval()(x, t, seeds=seeds))


def test_drop_path_keeps_the_mean():
    """Addition i is dropped with a chance that rises from 0 to drop_path. What is kept counts 1 / (1 - rate)."""
    model, _ = small(drop_path=0.4)
    keep = torch.stack(list(model.survivors(torch.zeros(4000).long(), torch.arange(4000)))).flatten(1)   # (6, 4000)
    rates = torch.tensor([0, 0, 0.4 / 3, 0.8 / 3, 0.4, 0.4])
    assert ((keep == 0).float().mean(1) - rates).abs().max() < 0.025
    torch.testing.assert_close(keep, (keep > 0) / (1 - rates[:, None]))
    assert abs(torch.corrcoef(keep[2:]) - torch.eye(4)).max() < 0.06


@pytest.mark.parametrize("call, fix", [
    (dict(shape=(3, 30, 30)), "try 28x28 or 32x32"), (dict(skip="residual"), "choose concat or add"),
    (dict(time="film"), "token or adaln"), (dict(colour=3), "unknown option"),
    (dict(schedule="sigmoid"), "linear"), (dict(drop_path=1.0), "try 0.1")])
def test_wrong_options_are_refused_with_the_fix(call, fix):
    with pytest.raises(ValueError, match=fix):
        small(**call)


def test_overfits_one_batch():
    model, diffusion = small(num_classes=2, shape=(1, 8, 8), patch=2)
    x0 = torch.sign(normal(fold(0, torch.arange(8)), (1, 8, 8)))
    t, noise = torch.arange(8) * 120, normal(fold(1, torch.arange(8)), (1, 8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = diffusion.loss(model, x0, t, noise, y=torch.arange(8) % 2)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02                                              # it starts above 1
