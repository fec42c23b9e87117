"""mdm.py: counts, schedules, the weights of the loss, nesting bit for bit, mixed batches, text, video, growing."""
import math
import runpy
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks import tables
from support import checkpoint, cost, parallel
import ranks
import sample
import train
from diffusion import UserError, fold, normal, shift_snr, cosine_alpha_bar, uniform
from test_cunet import as_compiled, assert_no_looks, assert_one_graph

mdm = checkpoint.load_paper("mdm")
ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(side=8, channels=(8, 16), blocks=(1, 1), attention=(0, 1), text_width=16, layers=1, embedding=32,
             heads=2, outer=(dict(channels=(8, 8), blocks=(1, 1)), dict(channels=(4, 8), blocks=(1, 1))),
             temporal=dict(channels=(8, 8, 8), blocks=(1, 1, 1)))


def small(shape=(3, 16, 16), num_classes=0, text=0, awake=True, **options):
    torch.manual_seed(0)
    model, diffusion = mdm.build("tiny", shape, num_classes, text, **(SMALL | options))
    if awake:                       # away from zero, where the adapters and heads start
        wake(model)
    return model, diffusion


@torch.no_grad()
def wake(model):
    for p in model.parameters():
        if not p.any():
            p.normal_(0, 0.1)


def inputs(model, B=2, seed=0):
    """z, t."""
    seeds = fold(seed, torch.arange(B))
    return ([normal(fold(seeds, r), s) for r, s in enumerate(model.shapes())],
            torch.tensor([3, 700, 400, 999, 0, 50])[:B])


def words(B=2, L=5, dim=12, seed=0):
    text = normal(fold(seed, torch.arange(B)), (L, dim))
    mask = torch.arange(L) < torch.tensor([[3], [5], [1], [4], [2], [5]])[:B]
    return dict(text=text, text_mask=mask)


def batch(diffusion, B, seed=0):
    """x0, t, noise, as train.py makes them."""
    seeds = fold(seed, torch.arange(B))
    return (normal(fold(seeds, 5), diffusion.shapes[-1]).clamp(-1, 1), (uniform(seeds) * 1000).long(),
            normal(fold(seeds, 1), diffusion.noise_shape(diffusion.shapes[-1])))


# --- sizes ---

COUNTS = [("cc12m-64", (3, 64, 64), 461_359_107), ("cc12m-256", (3, 256, 256), 476_613_958),
          ("cc12m-1024", (3, 1024, 1024), 480_970_057), ("paper-256", (3, 64, 64), 435_891_203),
          ("paper-256", (3, 256, 256), 449_833_286), ("paper-128-256", (3, 256, 256), 453_483_977),
          ("paper-1024", (3, 1024, 1024), 452_876_617)]


@pytest.mark.parametrize("preset, shape, parameters", COUNTS, ids=lambda v: str(v))
def test_parameters_are_the_released_models_to_the_digit(preset, shape, parameters):
    with torch.device("meta"):
        model, _ = mdm.build(preset, shape, text=2048)
    null = model.core.condition.null                        # ours alone, and not in the released networks
    assert sum(p.numel() for p in model.parameters()) - (0 if null is None else null.numel()) == parameters
    assert (null is None) == preset.startswith("cc12m")


def test_the_core_has_31_layers_of_attention_and_outer_levels_none():
    with torch.device("meta"):
        model, _ = mdm.build("cc12m-256", (3, 256, 256), text=2048)
    kinds = [sum(isinstance(m, mdm.Attention) for m in part.modules()) for part in (model, model.core)]
    assert kinds == [31, 31]
    assert [len(stage.attention) for stage in model.core.middle] == [1, 0] and len(model.middle) == 0


def test_micro_conditioning_costs_what_it_costs_and_reads_the_size():
    with torch.device("meta"):
        with_size = mdm.build("paper-256", (3, 64, 64), text=2048, micro=True)[0]
    assert sum(p.numel() for p in with_size.parameters()) - 1024 == 437_203_971
    model, _ = small(micro=True)
    z, t = inputs(model)
    sizes = [model(z, t, size=s)[-1] for s in (None, torch.tensor([16, 99]), torch.tensor([16, 4]))]
    assert torch.equal(sizes[0], sizes[1])                  # larger originals count as large enough
    assert torch.equal(sizes[0][0], sizes[2][0]) and not torch.allclose(sizes[0][1], sizes[2][1])


@pytest.mark.parametrize("shape, kind", [((3, 32, 32), dict(text=12)), ((1, 16, 16), dict(num_classes=3)),
                                         ((3, 4, 16, 16), dict(text="bytes")), ((3, 16, 24), {})], ids=str)
def test_multiply_adds_agree_with_a_real_forward_pass(shape, kind):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    model, diffusion = small(shape, **kind)
    z, t = inputs(model, 1)
    spelt = dict(text=torch.ones(1, 16, 12, dtype=torch.long), text_mask=torch.ones(1, 16, dtype=torch.bool))
    cond = {12: words(1, 32), 0: {}, "bytes": spelt}[kind.get("text", 0)]
    # the fused attention of a CPU is not counted
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(z, t, **cond)
    blank = cost.blank_batch(diffusion, shape, 1, words=32, **kind)
    assert counter.get_total_flops() == 2 * cost.multiply_adds(model, diffusion, blank)


def test_the_table_prints_and_its_counts_are_those_beside_them(capsys, monkeypatch):
    """`python mdm.py`; here the released networks alone."""
    monkeypatch.setattr(tables, "MDM_ROWS", tables.MDM_ROWS[:3])
    monkeypatch.setattr(tables, "small", lambda name: None)      # test_launch.py has it for dis
    tables.mdm()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("cc12m")]
    assert len(rows) == 3
    for row in rows:
        *_, parameters, macs, theirs, their_macs = row
        assert parameters == theirs
        assert float(macs[:-1]) == pytest.approx(float(their_macs[:-1]), rel=1e-3)
    assert [row[-1] for row in rows] == ["182G", "294.5G", "509.3G"]


def test_runs_without_support(monkeypatch):
    """mdm.py and diffusion.py alone: the same network, the same loss; options are not checked."""
    for name in ["support", *(name for name in sys.modules if name.startswith("support."))]:
        monkeypatch.setitem(sys.modules, name, None)                    # importing it is an ImportError
    alone = runpy.run_path(str(ROOT / "mdm.py"))
    assert alone["checked"].__module__ != "support.options"
    losses = []
    for build in (alone["build"], mdm.build):
        torch.manual_seed(0)
        model, diffusion = build("mini", (1, 28, 28), 10, error="v")
        losses.append(diffusion.loss(model, *batch(diffusion, 2), y=torch.tensor([3, -1]))["loss"])
    assert torch.equal(*losses)
    drawn = diffusion.sample(model, (1, 28, 28), torch.arange(2), steps=2, y=torch.tensor([3, 4]))
    assert drawn.shape == (2, 1, 28, 28)
    with pytest.raises(ValueError, match="support/text.py"):
        alone["build"]("mini", (1, 28, 28), text="bytes")


# --- the extended space ---

GAMMAS = {(4, 1): "0.999835 0.896995 0.580557 0.196089 0.0404443 6.07e-10",
          (4, 2): "0.999340 0.685244 0.257074 0.0574748 0.0104274 1.52e-10",
          (16, 2): "0.989536 0.11977 0.021169 0.00379676 6.58e-4 9.5e-12",
          (1, 1): "0.999959 0.972093 0.847012 0.493844 0.144272 2.43e-9"}


@pytest.mark.parametrize("ratio, power", GAMMAS)
def test_shifted_schedules_are_the_released_ones_to_five_digits(ratio, power):
    """The code's gamma has an entry for "no noise" before the first."""
    gamma = shift_snr(cosine_alpha_bar(1000), ratio, power)[torch.tensor([1, 100, 250, 500, 750, 1000]) - 1]
    for ours, theirs in zip(gamma.tolist(), GAMMAS[ratio, power].split(), strict=True):
        # five digits, or what is printed: the sixth is float32's in the code, float64's here
        digit = max(Decimal(theirs).as_tuple().exponent, math.floor(math.log10(ours)) - 4)
        assert abs(ours - float(theirs)) <= 0.6 * 10.0**digit, (ours, theirs)


@pytest.mark.parametrize("shapes, ratios", [
    ([(3, 8, 8), (3, 16, 16), (3, 32, 32)], (1, 2, 4)), ([(1, 8, 12), (1, 32, 48)], (1, 4)),
    # 16 frames are a 4 x 4 mosaic to the authors' code, 4 frames a 2 x 2 mosaic
    ([(3, 8, 8), (3, 16, 8, 8), (3, 16, 32, 32)], (1, 4, 16)), ([(3, 8, 8), (3, 4, 8, 8)], (1, 2))], ids=str)
def test_each_resolution_has_its_own_schedule_and_the_coarsest_the_plain_one(shapes, ratios):
    base = cosine_alpha_bar(1000)
    for power in (1, 2):
        levels = mdm.ExtendedDiffusion(base, shapes, power=power).levels
        for level, ratio in zip(levels, ratios, strict=True):
            torch.testing.assert_close(level.alpha_bar / (1 - level.alpha_bar), base / (1 - base) / ratio**power)
        # at each t the signal of a pixel is weaker than in the next coarser resolution
        assert all((coarse.alpha_bar > fine.alpha_bar).all() for coarse, fine in zip(levels, levels[1:]))


def test_reduction_takes_block_means_and_the_first_frame():
    x = torch.arange(2 * 3 * 4 * 8 * 16.).view(2, 3, 4, 8, 16)
    small_clip = mdm.reduce(x, (3, 4, 2, 4))
    torch.testing.assert_close(small_clip[1, 2, 3, 1, 2], x[1, 2, 3, 4:8, 8:12].mean())
    torch.testing.assert_close(mdm.reduce(x, (3, 2, 4)), small_clip[:, :, 0])
    assert torch.equal(mdm.reduce(x[:, :, 0], (3, 8, 16)), x[:, :, 0])


def test_the_noise_of_resolutions_is_independent():
    """z^1 is not the mean of z^2: at the end of time both are noise, and unrelated."""
    _, d = small((3, 32, 32))
    seen = []

    def model(z, t):
        seen.extend(z)
        return [torch.zeros_like(y) for y in z]
    x0, t, noise = batch(d, 64)
    d.loss(model, x0, torch.full_like(t, 999), noise)
    for fine, coarse in ((2, 1), (2, 0), (1, 0)):
        pooled = mdm.reduce(seen[fine], seen[coarse].shape[1:]).flatten()
        assert abs(torch.corrcoef(torch.stack([pooled, seen[coarse].flatten()]))[0, 1]) < 0.02
    assert all(abs(z.std() - 1) < 0.02 for z in seen)


def test_equal_weights_on_means_are_eq_3s_weights_on_sums():
    """omega^r / omega^R = N_R / N_r on sums over pixels. On means it would weight twice."""
    model, d = small((3, 32, 32), predict="x0", error="x0")
    x0, t, noise = batch(d, 3)
    noise_r = d.unpack(noise[:, :-1])
    z = [level.q_sample(mdm.reduce(x0, s), t, e) for level, s, e in zip(d.levels, d.shapes, noise_r)]
    squares = [(out - mdm.reduce(x0, s)).square().flatten(1).sum(1)
               for out, s in zip(model(z, t), d.shapes)]
    N = [math.prod(s) for s in d.shapes]
    eq3 = sum(N[-1] / n * square for n, square in zip(N, squares))
    torch.testing.assert_close(d.loss(model, x0, t, noise)["loss"], eq3 / N[-1])


@pytest.mark.parametrize("predict, error", [(p, e) for p in ("v", "x0", "eps") for e in ("v", "x0", "eps")
                                            if p != "eps" or e == "eps"])        # the others are refused
def test_the_error_of_one_quantity_follows_from_that_of_another(predict, error):
    model, d = small(predict=predict, error=error)
    x0, _, noise = batch(d, 4)
    t = torch.tensor([20, 300, 600, 900])
    terms = d.loss(model, x0, t, noise)
    noises = d.unpack(noise[:, :-1])
    z = [level.q_sample(mdm.reduce(x0, s), t, e) for level, s, e in zip(d.levels, d.shapes, noises)]
    for r, (level, s, e) in enumerate(zip(d.levels, d.shapes, noises)):
        x = mdm.reduce(x0, s)
        x_hat, eps_hat = level.predict_x0_eps(model(z, t)[r], z[r], t)
        a, b = level.at("signal", t, x), level.at("noise", t, x)
        wrong = {"x0": x_hat - x, "eps": eps_hat - e, "v": a * (eps_hat - e) - b * (x_hat - x)}[error]
        mse = wrong.square().flatten(1).mean(1)
        torch.testing.assert_close(terms[f"loss_{r + 1}"], mse, rtol=2e-3, atol=1e-6)


def test_weights_and_the_simple_baseline():
    model, d = small((3, 32, 32), weights=[1, 0, 0.5])
    x0, t, noise = batch(d, 3)
    terms = d.loss(model, x0, t, noise)
    torch.testing.assert_close(terms["loss"], terms["loss_1"] + 0.5 * terms["loss_3"])
    terms = small((3, 32, 32), weights="finest")[1].loss(model, x0, t, noise)
    torch.testing.assert_close(terms["loss"], terms["loss_3"])


def test_resolutions_without_weight_are_neither_visible_nor_sampled():
    """Visible in training, they would give the picture away, and in sampling they would be missing."""
    model, d = small((3, 32, 32), weights=[0, 1, 1])
    x0, t, noise = batch(d, 2)
    other = torch.cat([torch.randn(2, math.prod(d.shapes[0])), noise[:, math.prod(d.shapes[0]):]], 1)
    assert torch.equal(d.loss(model, x0, t, noise)["loss"], d.loss(model, x0, t, other)["loss"])
    shown = []
    model.core.stem.register_forward_pre_hook(lambda stem, args: shown.append(args[0].abs().max().item()))
    levels = d.sample_levels(model, (3, 32, 32), torch.arange(2), steps="3")
    assert shown == [0, 0, 0] and not levels[0].any() and levels[1].std() > 0.1 and levels[2].std() > 0.1


def test_the_finest_loss_alone_starts_dead_and_all_losses_together_do_not():
    for weights, moved in (("finest", {"head"}), (None, {"head", "inner"})):
        model, d = small(awake=False, weights=weights)
        x0, t, noise = batch(d, 2)
        d.loss(model, x0, t, noise)["loss"].sum().backward()
        assert {k.split(".")[0] for k, p in model.named_parameters() if p.grad.any()} == moved


# --- the networks, once more ---

def again(w, z, t, tokens, size):
    """The networks from their weights w, for one picture: z, coarsest first, from its coarsest resolution on; t and
    size are numbers, tokens (L, D') its words without padding -> predictions like z. What is there is read off w."""
    silu, gelu = torch.nn.functional.silu, torch.nn.functional.gelu

    def linear(name, x):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def conv(name, x, stride=1):                            # x (frames, C, H, W)
        weight = w[name + ".weight"]
        return torch.nn.functional.conv2d(x, weight, w[name + ".bias"], stride, weight.shape[-1] // 2)

    def norm(name, x):                                      # (frames, C, H, W) in groups of 4; (L, C) as a whole
        groups = x.reshape(len(x), x.shape[1] // 4 if x.ndim == 4 else 1, -1)
        normal = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
        weight, bias = (w[f"{name}.{part}"].view(-1, *[1] * (x.ndim - 2)) for part in ("weight", "bias"))
        return normal.view(x.shape) * weight + bias

    def attend(q, k, v, heads):                             # (n, C), (m, C), (m, C)
        parts = [part.chunk(heads, dim=1) for part in (q, k, v)]
        return torch.cat([(q @ k.T / q.shape[1]**0.5).softmax(1) @ v for q, k, v in zip(*parts)], dim=1)

    def waves(number, width):
        angles = [number / 1e4 ** (2 * k / width) for k in range(width // 2)]
        return torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])

    def mlp2(name, x):
        return linear(name + ".2", silu(linear(name + ".0", x)))

    def words_too(name, h):                                 # Attention; h (1, C, H, W)
        C, size = h.shape[1], h.shape[2:]
        q, k, v = conv(name + ".qkv", norm(name + ".norm", h))[0].flatten(1).T.chunk(3, dim=1)
        word_k, word_v = linear(name + ".word_kv", norm(name + ".word_norm", tokens)).chunk(2, dim=1)
        seen = attend(q, k, v, 2) + attend(q, word_k, word_v, 2)
        h = h + conv(name + ".out", seen.T.reshape(1, C, *size))
        return h + conv(name + ".mlp.3", gelu(conv(name + ".mlp.1", norm(name + ".mlp.0", h))))

    def frames_too(name, h):                                # TemporalAttention; h (frames, C, H, W)
        C, small = h.shape[1], conv(name + ".shrink", h, 2)
        places = torch.stack([waves(f, C) for f in range(len(h))])
        for row in range(small.shape[2]):
            for col in range(small.shape[3]):
                pixel = small[:, :, row, col]               # (frames, C)
                q, k, v = linear(name + ".qkv", norm(name + ".norm1", pixel) + places).chunk(3, dim=1)
                pixel = pixel + linear(name + ".out", attend(q, k, v, max(1, C // 32)))
                pixel = pixel + linear(name + ".mlp.2", gelu(linear(name + ".mlp.0", norm(name + ".norm2", pixel))))
                small[:, :, row, col] = pixel
        return h + conv(name + ".grow", small.repeat_interleave(2, 2).repeat_interleave(2, 3))

    def stage(name, h, e):
        scale, shift = linear(name + ".block.film", silu(e))[:, None, None].chunk(2)
        x = norm(name + ".block.norm2", conv(name + ".block.conv1", silu(norm(name + ".block.norm1", h))))
        x = conv(name + ".block.conv2", silu(x * (1 + scale) + shift))
        h = x + (conv(name + ".block.skip", h) if name + ".block.skip.weight" in w else h)
        for i in range(2):
            h = words_too(f"{name}.attention.{i}", h) if f"{name}.attention.{i}.out.weight" in w else h
        return frames_too(name + ".temporal", h) if name + ".temporal.out.weight" in w else h

    def resize(name, h, grow):
        if w[name + ".weight"].ndim == 3:                   # frames
            h = h.repeat_interleave(2, 0) if grow else h
            x = h.permute(2, 3, 1, 0).flatten(0, 1)         # (H W, C, frames)
            x = torch.nn.functional.conv1d(x, w[name + ".weight"], w[name + ".bias"], 1 if grow else 2, 1)
            return x.view(*h.shape[2:], *x.shape[1:]).permute(3, 2, 0, 1)
        return conv(name, h.repeat_interleave(2, 2).repeat_interleave(2, 3)) if grow else conv(name, h, 2)

    def network(p, z, above=0):                             # p: how the names of its weights begin
        x, side = z[-1].transpose(0, 1) if z[-1].ndim == 4 else z[-1][None], z[-1].shape[-1]
        e = mlp2(p + "embed_t", waves(t, 8)) + pooled
        if p + "micro.0.weight" in w:
            e = e + mlp2(p + "micro", waves(min(size, side), 8))
        h = conv(p + "stem", x) + above
        skips, outs = [h], []
        for i in range(3):
            if p + f"shrink.{i - 1}.conv.weight" in w and i:
                h = resize(p + f"shrink.{i - 1}.conv", h, False)
                skips.append(h)
            for j in range(2):
                if p + f"down.{i}.{j}.block.film.weight" in w:
                    h = stage(p + f"down.{i}.{j}", h, e)
                    skips.append(h)
        if len(z) > 1:
            outs, below = network(p + "inner.", z[:-1], conv(p + "in_adapter", h))
            h = h + conv(p + "out_adapter", below)
        else:
            h = stage(p + "middle.1", stage(p + "middle.0", h, e), e)
        for i in range(3):
            if p + f"grow.{i - 1}.conv.weight" in w and i:
                h = resize(p + f"grow.{i - 1}.conv", h, True)
            for j in range(3):
                if p + f"up.{i}.{j}.block.film.weight" in w:
                    h = stage(p + f"up.{i}.{j}", torch.cat([h, skips.pop()], dim=1), e)
        assert not skips
        out = conv(p + "head", silu(norm(p + "norm", h)))
        return [*outs, out.transpose(0, 1) if z[-1].ndim == 4 else out[0]], h

    core = max((name.split("condition")[0] for name in w if "condition.pool" in name), key=len)
    c = core + "condition."
    tokens = linear(c + "source", tokens) if len(tokens) else w[c + "null"][None]                   # (L, D)
    layer = c + "layers.0"
    q, k, v = linear(layer + ".qkv", norm(layer + ".norm1", tokens)).chunk(3, dim=1)
    tokens = tokens + linear(layer + ".out", attend(q, k, v, 8))
    tokens = tokens + linear(layer + ".mlp.2", gelu(linear(layer + ".mlp.0", norm(layer + ".norm2", tokens))))
    pooled = linear(c + "pool", tokens.mean(0))
    return network("inner." * (core.count("inner.") + 1 - len(z)), z)[0]


@torch.no_grad()
@pytest.mark.parametrize("shape, rows", [((3, 32, 32), (4, 3, 2)), ((3, 4, 12, 12), (2, 2, 1))], ids=str)
def test_the_networks_once_more_from_their_weights(shape, rows):
    """By plain sums, one picture at a time: no padding, no batch, no frames folded into it. A picture without its fine
    resolution is the inner network's alone."""
    model, _ = small(shape, text=12, micro=True, temporal=dict(channels=(8, 64, 8), blocks=(2, 1, 1)))
    w = model.state_dict()
    z, t = inputs(model, rows[0])
    z, cond, sizes = [x[:n] for x, n in zip(z, rows)], words(rows[0]), [9, 300, 8, 30]
    cond["text_mask"][-1] = False                           # the last one has no words
    outs = model(z, t, **cond, size=torch.tensor(sizes[:rows[0]]))
    for i in range(rows[0]):
        mine = [x[i] for x in z if i < len(x)]
        found = again(w, mine, t[i].item(), cond["text"][i][cond["text_mask"][i]], sizes[i])
        for a, b in zip(found, outs):
            torch.testing.assert_close(a, b[i], atol=1e-4, rtol=1e-4)


# --- nesting ---

@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 16, 24), (3, 20, 12), (3, 4, 8, 8), (3, 2, 16, 16)])
def test_a_fresh_outer_level_leaves_the_inner_network_alone_bit_for_bit(shape):
    model, _ = small(shape, awake=False, text=12)
    wake(model.inner)
    z, t = inputs(model, 3)
    nested, alone = model(z, t, **words(3)), model.inner(z[:-1], t, **words(3))
    assert all(torch.equal(a, b) for a, b in zip(nested, alone, strict=False)) and alone[0].std() > 0.1
    wake(model)
    assert not torch.allclose(model(z, t, **words(3))[0], alone[0])


def test_rows_without_the_fine_level_get_the_inner_networks_answer_bit_for_bit():
    model, _ = small((3, 32, 32), text=12)
    z, t = inputs(model, 6)
    mixed = model([z[0], z[1][:4], z[2][:1]], t, **words(6))
    assert [len(out) for out in mixed] == [6, 4, 1]
    core, middle = model.core(z[:1], t, **words(6)), model.inner([z[0], z[1][:4]], t, **words(6))
    assert torch.equal(mixed[0][4:], core[0][4:]) and not torch.allclose(mixed[0][:4], core[0][:4])
    assert torch.equal(mixed[0][1:], middle[0][1:]) and torch.equal(mixed[1][1:], middle[1][1:])


def test_mixed_batches_count_each_row_right_whatever_its_company():
    model, whole = small((3, 32, 32), num_classes=3)
    mixed = small((3, 32, 32), num_classes=3, mixed=[1, 0.5, 0.25])[1]
    x0, t, noise = batch(mixed, 24)
    y = torch.arange(24) % 3
    terms, full = mixed.loss(model, x0, t, noise, y=y), whole.loss(model, x0, t, noise, y=y)
    has = [terms[f"loss_{r}"] > 0 for r in (1, 2, 3)]
    assert [own.sum() for own in has] == [24, 12, 7] and not (has[2] & ~has[1]).any()
    sizes = []                                              # the same at every step: one compiled graph
    for seed in (1, 2):
        mixed.loss(lambda z, *args, **cond: sizes.append(list(map(len, z))) or model(z, *args, **cond),
                   *batch(mixed, 24, seed), y=y)
    assert sizes == [[24, 12, 7]] * 2
    torch.testing.assert_close(terms["loss_1"][has[2]], full["loss_1"][has[2]])
    torch.testing.assert_close(terms["loss_3"][has[2]], full["loss_3"][has[2]])
    expected = terms["loss_1"] + terms["loss_2"] / 0.5 + terms["loss_3"] / 0.25
    torch.testing.assert_close(terms["loss"], expected)
    part = mixed.loss(model, x0[7:12], t[7:12], noise[7:12], places=torch.arange(7, 12), y=y[7:12])
    torch.testing.assert_close(part["loss"], terms["loss"][7:12])


@pytest.mark.parametrize("shape, mixed", [((3, 16, 16), [1, 0.5]), ((3, 4, 16, 16), [1, 0.5, 0.5])])
def test_a_mixed_batch_may_happen_to_have_no_fine_row(shape, mixed):
    model, d = small(shape, mixed=mixed)
    terms = d.loss(model, *batch(d, 2), places=torch.tensor([1, 3]))        # places in the upper half of 0 .. 1
    terms["loss"].sum().backward()
    assert not terms["loss_2"].any() and all(p.grad is not None for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_growing_goes_on_at_the_inner_models_loss_and_checks_every_weight():
    inner, d_inner = small((3, 8, 8), text=12)
    middle, d_middle = small((3, 16, 16), text=12, awake=False)
    x0, t, noise = batch(d_middle, 4)
    checkpoint.load_inner(middle, inner.state_dict())
    n = math.prod(d_inner.shapes[0])
    small_x0 = mdm.reduce(x0, d_inner.shapes[0])
    alone = d_inner.loss(inner, small_x0, t, torch.cat([noise[:, :n], noise[:, -1:]], 1), **words(4))["loss"]
    assert torch.equal(d_middle.loss(middle, x0, t, noise, **words(4))["loss_1"], alone)
    large, _ = small((3, 32, 32), text=12)
    checkpoint.load_inner(large, inner.state_dict())                    # two levels at once
    assert torch.equal(large.core.stem.weight, inner.stem.weight)
    clip, _ = small((3, 4, 16, 16), text=12)
    checkpoint.load_inner(clip, inner.state_dict())                     # a video from a picture
    checkpoint.load_inner(large, middle.state_dict())
    for options, name in ((dict(), "condition"), (dict(text=12, layers=2), "layers.1")):
        other, _ = small((3, 8, 8), **options)
        with pytest.raises(ValueError, match=name):
            checkpoint.load_inner(large, other.state_dict())
    with pytest.raises(ValueError, match="weights do not fit"):
        checkpoint.load_inner(large, small((3, 8, 8), text=12, embedding=16)[0].state_dict())
    with pytest.raises(ValueError, match="larger --image-size"):
        checkpoint.load_inner(inner, inner.state_dict())


# --- sampling ---

def test_every_sampler_and_clip_finds_the_picture_that_a_perfect_network_knows():
    _, d = small((3, 32, 32), predict="x0", error="x0")
    x = normal(torch.tensor([5]), (3, 32, 32)).clamp(-1, 1)
    truth = [mdm.reduce(x, s) for s in d.shapes]

    def model(z, t):
        return [y.expand(len(t), -1, -1, -1) for y in truth]
    for options in (dict(sampler="ddpm", steps="1000"), dict(steps="7"), dict(steps="20", eta=1.0),
                    dict(steps="5", clip="imagen"), dict(steps="5", clip=False)):
        levels = d.sample_levels(model, (3, 32, 32), torch.arange(2), **options)
        for got, want in zip(levels, truth, strict=True):
            torch.testing.assert_close(got, want.expand(2, -1, -1, -1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0), ("ddim", 0), ("ddim", 1)])
def test_each_resolution_is_sampled_by_its_own_schedule(sampler, eta):
    """For pixels that are independent normals of deviation 0.5 the best prediction is linear, and samples
    made with it must have that deviation, at every resolution."""
    _, d = small((1, 16, 16), predict="x0", error="x0", power=2)

    def model(z, t):
        outs = []
        for y, level in zip(z, d.levels):
            g = level.at("alpha_bar", t, y)
            outs.append(g.sqrt() * 0.25 * y / (g * 0.25 + 1 - g))
        return outs
    for level in d.sample_levels(model, (1, 16, 16), torch.arange(60), sampler=sampler, eta=eta, steps="250",
                                 clip=False):
        assert level.std().item() == pytest.approx(0.5, abs=0.015)


def test_samples_do_not_depend_on_their_batch_and_all_levels_agree_with_the_finest():
    model, d = small((3, 32, 32), num_classes=3)
    seeds, y = torch.arange(5), torch.tensor([0, 1, 2, -1, 0])
    films = []
    options = dict(steps="4", sampler="ddpm", cfg_scale=2.0)
    whole = d.sample(model, (3, 32, 32), seeds, on_step=lambda *step: films.append(step), **options, y=y)
    one = d.sample(model, (3, 32, 32), seeds[2:3], **options, y=y[2:3])
    torch.testing.assert_close(one, whole[2:3], atol=1e-4, rtol=0)
    levels = d.sample_levels(model, (3, 32, 32), seeds, **options, y=y)
    assert [tuple(z.shape[1:]) for z in levels] == d.shapes and torch.equal(levels[-1], whole)
    assert [i for i, _, _ in films] == [3, 2, 1, 0] and torch.equal(films[-1][1], whole)
    with pytest.raises(ValueError, match="makes"):
        d.sample(model, (3, 16, 16), seeds)


def test_guidance_pushes_every_resolution_away_from_no_condition():
    model, _ = small((3, 16, 16), text=12)
    z, t = inputs(model, 2)
    none = dict(words(2), text_mask=torch.zeros(2, 5, dtype=torch.bool))
    for with_c, without, out in zip(model(z, t, **words(2)), model(z, t, **none),
                                    mdm.guided(model, 3.0)(z, t, **words(2)), strict=True):
        torch.testing.assert_close(out, without + 3 * (with_c - without), atol=1e-4, rtol=1e-4)


def test_guidance_leaves_out_the_noisiest_steps():
    model, d = small((3, 16, 16), text=12, cfg_below=0.6)
    shown = {}

    def spy(z, t, **cond):
        shown[t[0].item()] = len(t)
        return model(z, t, **cond)
    d.sample(spy, (3, 16, 16), torch.arange(2), steps="ddim5", cfg_scale=2, **words(2))
    assert shown == {800: 2, 600: 2, 400: 4, 200: 4, 0: 4}


# --- the condition ---

def test_no_text_is_a_learned_token_whatever_the_words_behind_the_mask():
    model, _ = small((3, 16, 16), text=12)
    z, t = inputs(model, 2)
    none = torch.zeros(2, 5, dtype=torch.bool)
    outs = [model(z, t)[1], model(z, t, **(words(2) | dict(text_mask=none)))[1],
            model(z, t, **(words(2, seed=1) | dict(text_mask=none)))[1]]
    torch.testing.assert_close(outs[0], outs[1])
    assert torch.equal(outs[1], outs[2]) and outs[0].isfinite().all()
    outs[1].square().mean().backward()
    assert model.core.condition.null.grad.any()


def test_masked_words_do_not_matter_and_others_do_twice():
    """Through cross-attention and through the pooled vector."""
    model, _ = small((3, 16, 16), text=12)
    z, t = inputs(model, 2)
    cond, out = words(2), None
    out = model(z, t, **cond)[0]
    behind = cond["text"].masked_fill(~cond["text_mask"][..., None], 9.0)
    torch.testing.assert_close(model(z, t, text=behind, text_mask=cond["text_mask"])[0], out)
    other = words(2, seed=1) | dict(text_mask=cond["text_mask"])
    with torch.no_grad():
        model.core.condition.pool.weight.zero_()
        apart = model(z, t, **cond)[0] - model(z, t, **other)[0]
        assert apart.abs().max() > 1e-3                     # cross-attention alone
        for m in model.modules():
            if isinstance(m, mdm.Attention):
                m.word_kv.weight.zero_()
        assert torch.equal(model(z, t, **cond)[0], model(z, t, **other)[0])


def test_a_class_is_a_caption_of_one_token_and_minus_one_is_none():
    model, _ = small((3, 16, 16), num_classes=4)
    z, t = inputs(model, 2)
    none = model(z, t)[1]
    assert torch.equal(none, model(z, t, y=torch.tensor([-1, -1]))[1])
    a, b = (model(z, t, y=torch.tensor(y))[1] for y in ([0, -1], [3, -1]))
    assert torch.equal(a[1], none[1]) and torch.equal(b[1], none[1])
    assert not any(torch.allclose(*pair) for pair in ((a[0], none[0]), (b[0], none[0]), (a[0], b[0])))
    for label, other in ((4, model), (-2, model), (0, small((3, 16, 16))[0]), (0, small((3, 16, 16), text=12)[0])):
        with pytest.raises(UserError, match=f"label {label}, but this model has"):
            other(z, t, y=torch.tensor([-1, label]))


def test_pictures_and_outputs_of_another_shape_are_refused():
    """Each of these would pass without a check: means of blocks reduce a larger picture, an output broadcasts."""
    model, d = small((3, 16, 16))
    z, t = inputs(model)
    with pytest.raises(UserError, match="built for images of 3x8x8, and got 3x8x12"):
        model([normal(t, (3, 8, 12)), normal(t, (3, 16, 24))][:1] + z[1:], t)
    x0, t, noise = batch(d, 2)
    with pytest.raises(UserError, match="built for images of 3x16x16, and got 3x32x32"):
        d.loss(model, x0.repeat(1, 1, 2, 2), t, noise)
    for wrong in (lambda z, t: [z[0], z[1][:, :1]], lambda z, t: [z[0][:1], z[1]], lambda z, t: z[:1]):
        with pytest.raises(ValueError, match="the model's output is|shorter"):
            d.loss(wrong, x0, t, noise)


def test_spelling_tells_words_apart_by_their_letters_and_places():
    torch.manual_seed(0)
    spell = mdm.Spelling(8)
    text = torch.zeros(3, 16, 12, dtype=torch.long)
    for i, word in enumerate((b"star", b"rats", b"star")):
        text[i, 0, :4] = torch.tensor(list(word))
    text[2, 0, 11] = 0
    one, other, same = spell(text)[:, 0]
    assert not torch.allclose(one, other) and torch.equal(one, same)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 16, 16), (1, 32, 32), (3, 14, 18), (3, 22, 40),
                                   (2, 8, 16, 24)])
@pytest.mark.parametrize("kind", [dict(num_classes=3), dict(text=12), dict(text="bytes"), {}], ids=str)
def test_any_size_a_batch_of_one_and_every_gradient(shape, kind):
    options = dict(temporal=dict(channels=(8, 8, 8, 8), blocks=(1, 1, 1, 1)))
    model, d = small(shape, **kind, **options)
    assert d.shapes[-1] == shape and len(d.shapes) == len(model.shapes())
    cond = {}
    if "num_classes" in kind:
        cond = dict(y=torch.tensor([1]))
    elif kind.get("text") == 12:
        cond = words(1)
        model.core.condition.null.requires_grad_(False)     # nothing is null here
    elif kind:
        cond = dict(text=torch.randint(97, 120, (1, 16, 12)), text_mask=torch.arange(16)[None] < 3)
        model.core.condition.null.requires_grad_(False)
    x0, t, noise = batch(d, 1)
    terms = d.loss(model, x0, t, noise, **cond)
    assert {k for k in terms} == {"loss", *(f"loss_{r + 1}" for r in range(d.R))}
    terms["loss"].sum().backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or p.grad.any() and p.grad.isfinite().all(), name


# --- video ---

def test_frames_see_each_other_through_the_temporal_level_only():
    model, _ = small((3, 4, 16, 16))
    z, t = inputs(model, 1)
    for fine, blocked in ((True, False), (True, True)):
        if blocked:                                         # cut the finest level off the temporal one
            torch.nn.init.zeros_(model.out_adapter.weight)
        z[-1].requires_grad_()
        grad, = torch.autograd.grad(model(z, t)[-1][0, :, 3].sum(), z[-1])
        reach = grad[0].abs().sum((0, 2, 3)) > 0            # of the last frame, to each frame
        assert reach.tolist() == ([False] * 3 + [True] if blocked else [True] * 4)


# --- switches ---

@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 4, 16, 16)])
def test_checkpointing_changes_no_gradient(shape):
    grads = []
    for on in (False, True):
        model, d = small(shape, num_classes=3)
        if on:
            parallel.recompute(model)
        x0, t, noise = batch(d, 2)
        d.loss(model, x0, t, noise, y=torch.tensor([0, 1]))["loss"].sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_compiles_without_a_break_and_waits_for_nothing():
    """A clip and its caption. A class takes the way of a caption of one word."""
    thin = dict(channels=(8, 8), blocks=(1, 1))             # few blocks are as good, and sooner compiled
    model, d = small((3, 2, 8, 8), text="bytes", **thin, temporal=thin)
    mask = torch.arange(16) < torch.tensor([[3], [0]])
    cond = dict(text=torch.randint(97, 120, (2, 16, 12)) * mask[..., None], text_mask=mask)
    z, _ = inputs(model)
    assert_one_graph(model, *(((z, torch.tensor(t)), cond) for t in ((3, 700), (0, 999), (5, 5))), sampled=False)
    with as_compiled():                                     # uncompiled, it looks at labels on the CPU
        assert_no_looks(model, d, *batch(d, 2), **cond)


@pytest.mark.parametrize("scale", [1, 2])
def test_sampling_compiles_once(scale):
    """The first noise, and what a step makes of it, lie in memory in the same way."""
    torch._dynamo.reset()
    model, d = mdm.build("tiny", (3, 32, 32), 3, channels=[8, 8], outer=[mdm._level(8, 8)], embedding=16, text_width=8)
    counter = CompileCounterWithBackend("eager")
    d.sample(torch.compile(model, backend=counter), (3, 32, 32), torch.arange(2), steps="3", cfg_scale=scale, y=1)
    assert counter.frame_count == 1


def test_attention_in_the_form_and_the_number_that_cuda_takes(monkeypatch):
    given, real = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *args: given.append(args) or real(*args))
    q, k, v = (normal(torch.arange(65537), (4, n)).transpose(1, 2) for n in (1, 2, 2))      # (rows, n, 4)
    mask = torch.arange(2) <= torch.arange(65537)[:, None] % 2
    for m in (None, mask):
        got = mdm.attend(q, k, v, 2, m)
        heads = [x.unflatten(2, (2, 2)).transpose(1, 2) for x in (q, k, v)]
        expected = real(*heads, None if m is None else m[:, None, None]).transpose(1, 2).flatten(2)
        torch.testing.assert_close(got, expected)
    assert len(given) == 4 and all(len(x) <= 65535 and x.stride(-1) == 1 for args in given for x in args[:3])


def test_autocast_keeps_the_loss_in_float32():
    model, d = small((3, 16, 16), text=12)
    x0, t, noise = batch(d, 2)
    exact = d.loss(model, x0, t, noise, **words(2))["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = d.loss(model, x0, t, noise, **words(2))["loss"]
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0)


BAD = [(dict(shape=(3, 17, 16)), "not divisible by 2"), (dict(shape=(3, 3, 16, 16)), "3 frames"),
       (dict(shape=(3, 64, 16, 16)), "64 frames"), (dict(num_classes=3, text=12), "not both"),
       (dict(width=3), "unknown option"), (dict(error="l1"), "unknown error"),
       (dict(predict="x"), "unknown predict"), (dict(weights=[1]), "list of 2"),
       (dict(weights="all"), "weights='all': must be finest, or a list"), (dict(weights=[1, -1]), "weights=.1, -1.: must be"),
       (dict(heads=3, text=12), "heads=3"),
       (dict(mixed=[0.5, 1]), "begin with 1"), (dict(mixed=[1, 2]), "begin with 1"), (dict(mixed=[1]), "list of 2"),
       (dict(mixed=[1, 0]), "begin with 1"), (dict(power="two"), "power"),
       (dict(channels=8), "channels=8"), (dict(blocks=(1,)), "blocks=.1,"), (dict(blocks=(1, 0)), "blocks=.1, 0.: must be a list, each"),
       (dict(attention=(0, 0.5)), "attention"), (dict(attention=(0,)), "attention=.0,"),
       (dict(text_width=12, text=12), "text_width=12: must be divisible by 8, try 8"), (dict(T=0), "T=0"),
       (dict(embedding="big"), "embedding"), (dict(embedding=12), "embedding=12: must be divisible by 8"),
       (dict(micro=1), "micro"), (dict(schedule="sigmoid"), "schedule"),
       (dict(layers=-1), "layers"), (dict(outer=3), "outer"), (dict(temporal=[1]), "temporal"),
       (dict(outer=({},)), "outer"), (dict(schedule=[1]), "schedule"), (dict(power=1e5), "0 to 10"),
       (dict(outer=(dict(channels=(4,), blocks=(1,)),)), "channels=.4,"), (dict(channels=()), "channels=.."),
       (dict(shape=(3, 2, 16, 16), temporal=dict(channels=(7, 8), blocks=(1, 1))), "even"),
       (dict(T=10**15), "from 1 to 1000000"), (dict(weights=[0, 0]), "above 0"), (dict(weights=[1, 0]), "last one above 0"),
       (dict(weights="finest", mixed=[1, 0.5]), "drop mixed"), (dict(predict="eps", error="x0"), "add error=eps"),
       (dict(mixed=3), "mixed=3"),
       (dict(temporal=dict(channels=(8, 8), blocks=(1, 1), attention=(0, 1))), "a dict of channels .* and blocks")]


@pytest.mark.parametrize("options, words_", BAD, ids=lambda v: str(v))
def test_wrong_options_are_told_with_the_fix(options, words_):
    with pytest.raises(ValueError, match=words_):
        small(**options)


def test_without_a_mask_all_words_count_and_text_needs_a_reader():
    model, _ = small(text=12)
    z, t = inputs(model)
    text = words(len(t))["text"]
    every = torch.ones(text.shape[:2], dtype=torch.bool)
    for r, out in enumerate(model(z, t, text=text)):
        assert out.equal(model(z, t, text=text, text_mask=every)[r])
    for blind in small()[0], small(num_classes=3)[0]:
        with pytest.raises(ValueError, match="reads no text"):
            blind(z, t, text=text)


def test_temporal_attention_takes_any_even_width():
    model, _ = small((3, 2, 8, 8), temporal=dict(channels=(100, 70), blocks=(1, 1)))
    assert model(*inputs(model))[1].isfinite().all()


def test_presets_that_make_no_videos_say_so():
    with pytest.raises(ValueError, match="tiny-video"):
        mdm.build("tiny", (3, 8, 16, 16))
    with pytest.raises(ValueError, match="unknown preset"):
        mdm.build("huge", (3, 16, 16))


# --- the whole way ---

@pytest.fixture
def quick(monkeypatch):
    """Runs do not count multiply-adds, which takes longer than their steps: test_readme.py has runs that do. The last
    grid is drawn in two steps."""
    monkeypatch.setattr(cost, "multiply_adds", lambda *args: None)
    monkeypatch.setattr(train, "final_samples", lambda *args, draw=train.final_samples, **kwargs: draw(
        *args, "--steps", "2", **kwargs))


FLAGS = ["--model", "mdm", "--sample-every", "0", "--log-every", "1", "--global-batch-size", "4", "--image-size", "16",
         "--set", "side=8", "channels=(8,8)", "text_width=8", "embedding=16", "heads=2"]


def train_(folder, *flags, name="run", steps=2):
    train.main(["--results-dir", str(folder), "--name", name, "--max-steps", str(steps), *FLAGS, *map(str, flags)])


def test_text_from_training_to_prompts_and_levels(tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    flags = "--data", "shapes", "--cond", "text", "--hold-out", "red star"
    train_(tmp_path, *flags, steps=4, name="whole")
    train_(tmp_path, *flags, "--ckpt-every", 2, steps=2)
    train_(tmp_path, *flags, steps=4)
    runs = [checkpoint.read(tmp_path / n / "latest.pt") for n in ("whole", "run")]
    assert all(torch.equal(runs[0]["ema"][k], runs[1]["ema"][k]) for k in runs[0]["ema"])
    assert runs[1]["args"]["num_examples"] < 65536 and len(runs[1]["args"]["prompts"]) == 8
    draw = ["--ckpt", str(tmp_path / "run"), "--steps", "2"]
    sample.main([*draw, "--prompt", "a big red star", "a moon", "--levels", "--num-samples", "6", "--out",
                 "levels.png", "--save-images", "each"])
    images = [np.asarray(Image.open(f)) for f in sorted((tmp_path / "each").iterdir())]
    assert len(images) == 6 and images[0].shape == (16, 32, 3)
    left = images[0][:, :16]                                # the coarse picture, each pixel four times
    assert (left[::2, ::2] == left[1::2, 1::2]).all()
    assert not (images[0][::2, 16::2] == images[0][1::2, 17::2]).all()
    (tmp_path / "prompts.txt").write_text("a big red star\n\na moon\n")
    sample.main([*draw, "--prompt", "@prompts.txt", "--num-samples", "6", "--save-images", "again"])
    again = [np.asarray(Image.open(f)) for f in sorted((tmp_path / "again").iterdir())]
    assert all((a[:, 16:] == b).all() for a, b in zip(images, again, strict=True))
    sample.main([*draw, "--num-fid-samples", "3", "--prompt", "a moon", "--save-images", "fid"])
    assert np.load(tmp_path / "fid.npz")["arr_0"].shape == (3, 16, 16, 3)


def test_progressive_training_from_one_size_to_the_next(tmp_path, capsys, quick):
    grow = "--data", "shapes", "--lr", 0, "--init-inner"
    train_(tmp_path, "--image-size", 8, "--data", "shapes", name="small")
    train_(tmp_path, *grow, tmp_path / "small", name="large")
    assert "begun       from the network of" in capsys.readouterr().out
    two = ranks.launch(tmp_path / "said", 2, "train.py", *FLAGS, *grow, tmp_path / "small", "--max-steps", 2, "--name",
                       "two", "--results-dir", tmp_path)
    assert "begun       from the network of" in two
    small_, large = (checkpoint.read(tmp_path / n / "latest.pt") for n in ("small", "large"))
    for k, v in small_["ema"].items():
        assert torch.equal(v, large["model"][f"inner.{k}"]) and torch.equal(v, large["ema"][f"inner.{k}"])
    with pytest.raises(SystemExit):                         # begun from there, not from elsewhere
        train_(tmp_path, *grow, tmp_path / "large", name="large")
    # run again, it goes on from itself and not from the small one
    train_(tmp_path, *grow, tmp_path / "small", name="large", steps=3)
    train_(tmp_path, *grow[:-1], name="large", steps=4)
    assert checkpoint.read(tmp_path / "large" / "latest.pt")["args"]["init_inner"].endswith("small")
    assert "resumed     at step 2" in capsys.readouterr().out


def test_videos_become_moving_pictures(tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    # v: an untrained prediction of x0 is grey everywhere, and a GIF keeps equal frames once
    thin = ("temporal={'channels':(4,4,4,4),'blocks':(1,1,1,1)}", "outer=[{'channels':(4,4),'blocks':(1,1)}]",
            "predict=v", "error=v")
    train_(tmp_path, *thin, "--preset", "tiny-video", "--data", "moving", "--cond", "text",
           "--sample-every", 1)
    grid = Image.open(tmp_path / "run" / "samples" / "step_0000001.png")
    assert grid.width > 8 * 16
    sample.main(["--ckpt", str(tmp_path / "run"), "--steps", "2", "--prompt", "a small red moon moving up",
                 "--save-images", "clips", "--out", "a.png"])
    for path in (tmp_path / "a.gif", *(tmp_path / "clips").iterdir()):
        assert Image.open(path).n_frames == 8
    assert len(list((tmp_path / "clips").iterdir())) == 2
    sample.main(["--ckpt", str(tmp_path / "run"), "--steps", "1", "--prompt", "a\nb", "c" * 500, "d",
                 "--num-samples", "5", "--out", "b.png"])   # a ragged grid, and captions of all kinds
    assert Image.open(tmp_path / "b.png").width < 3000
