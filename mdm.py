"""MDM: Matryoshka Diffusion Models, in one file. Pictures from classes or from text, and video.

Jiatao Gu, Shuangfei Zhai, Yizhe Zhang, Josh Susskind, Navdeep Jaitly. arXiv 2310.15111, ICLR 2024.

The idea. Denoise a picture and smaller copies of it together, in one process, without an autoencoder and without a
cascade of models. The networks are nested like Matryoshka dolls: the network of a larger copy contains the network of
the next smaller one, and what it computes for the small copy helps with the large one. At the same t a larger copy has
more noise in each pixel. Most weights work at the smallest resolution, and a network trained there alone becomes the
core of a larger one.

    z_t^r = alpha_t^r D_r(x) + sigma_t^r eps^r,    eps^r ~ N(0, I),    r = 1 .. R, one t for all     (Eq. 2)
    loss  = sum over r of omega_t^r |x_theta^r(z_t, t) - D_r(x)|^2,    omega^r / omega^R = N_R / N_r (Eq. 3)

Glossary. B: pictures in a batch. R: resolutions. Lists of them begin with the coarsest, like the paper's index r, but
count from 0. T: diffusion steps. frames: pictures in a clip, 1 for a picture. L: words in a caption. K: letters in
a word. D: width of a token. E: width of `e`. Axes in einops: b, c, f (frames), row, col, l, heads.

| code             | symbol            | shape               | meaning                                                |
|------------------|-------------------|---------------------|--------------------------------------------------------|
| `x0`             | x                 | (B, C, H, W)        | a picture; a clip is (B, C, frames, H, W)              |
| `reduce`         | D_r               |                     | the picture at resolution r (Section 3.1)              |
| `z`              | z_t^1 .. z_t^R    | [(B, C, H_r, W_r)]  | the extended space: every resolution, noised           |
| `levels[r]`      | alpha^r, sigma^r  |                     | its schedule: alpha^2 = alpha_bar = 1 - sigma^2        |
| `noise`          | eps^1 .. eps^R    | (B, numbers)        | of all resolutions, one after the other; see `unpack`  |
| `weights`        | omega^r N_r / N_R | R numbers           | of the mean squared errors; see (1) below              |
| `h`              |                   | (B frames, C, H, W) | features of a network                                  |
| `tokens`, `mask` |                   | (B, L, D), (B, L)   | a caption, or one token for a class: `words`. A mask   |
|                  |                   |                     | of None: all count                                     |
| `sizes[r]`       | N_r               | R numbers           | how many numbers resolution r has                      |
| `outs`           | x_theta^r         | like `z`            | the network's outputs: x, v or eps, see `predict`      |
| `e`, `pooled`    |                   | (B, E)              | embedding of t and more; its part that is from `words` |

Where this file departs from the paper or the authors' code: docs/mdm.md has all twelve points, and a map of the
paper's sections. The main ones: (1) The loss adds up *means* over pixels, as Eq. 3's weights do. (3) The shift of
schedules is the code's; the paper has no formula. (4) Batches of mixed resolutions, the paper's default, are off. (5)
Padding is masked, and a learned token means "no text". (9) Group norms have 4 channels a group or more. The presets
"cc12m-.." compute what the released networks do.
"""
import math
from typing import Annotated, Literal, TypedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from diffusion import (SCHEDULES, Diffusion, UserError, check_labels, check_sampler, check_shape, fold, for_each,
                       normal, shift_snr, with_and_without)

try:
    from support.options import checked
    from support.text import Spelling
except ImportError:                         # this file and diffusion.py alone: options go unchecked
    def Spelling(D):
        raise UserError('text="bytes" needs support/text.py: put it beside this file')

    def checked(paper, presets, preset, options, *types):
        return {**presets[preset], **options}


# --- the extended space: Section 3.1 ----------------------------------------------------------------

def reduce(x, shape):
    """D_r: x (B, C, [frames,] H, W) -> (B, *shape). Means of blocks. As a picture, a clip is its first frame."""
    if x.ndim > len(shape) + 1:
        x = x[:, :, 0]                                                                # (B, C, H, W)
    k = x.shape[-1] // shape[-1]
    return F.avg_pool2d(x, k) if x.ndim == 4 else F.avg_pool3d(x, (1, k, k))          # (B, *shape)


class ExtendedDiffusion:
    """The diffusion of all resolutions at once, with the methods of diffusion.Diffusion that train.py and sample.py
    call. Authors: ml_mdm/diffusion.py, NestedDiffusion; ml_mdm/samplers.py, NestedSampler.

    alpha_bar (T,), the schedule of the coarsest resolution
    shapes    coarsest first: [(3, 16, 16), (3, 32, 32)]. Those of clips are (C, frames, H, W), but their coarsest
              resolution is the first frame alone: [(3, 16, 16), (3, 8, 16, 16), (3, 8, 32, 32)]
    predict   what the network's outputs mean; error: which quantity's squared error is the loss. "v" | "x0" | "eps"
    power     the signal-to-noise ratio of resolution r is the coarsest one's divided by ratio^power, with ratio =
              sqrt(N_r / N_1): of pictures the ratio of their sides; 4 for 16 frames of the coarsest size
    weights   omega^r N_r / N_R of Eq. 3. None: all 1, as in the paper. "finest": 0, .., 0, 1, the paper's "simple DM"
              with a nested network (Figure 4b, c)
    mixed     Section 3.3: the part of the rows that has a resolution, and with it all coarser ones: with [1, 0.67] two
              thirds of the rows have both. None: all rows have all
    t_normal, cfg_below       as in diffusion.Diffusion: the steps that are trained most; those that guidance acts on"""

    def __init__(self, alpha_bar, shapes, predict="v", error="eps", power=1, weights=None, mixed=None,
                 t_normal=None, cfg_below=1):
        self.shapes, self.R, self.T = [tuple(s) for s in shapes], len(shapes), len(alpha_bar)
        self.sizes = [math.prod(s) for s in shapes]                                   # N_r
        ones, finest = [1] * self.R, [0] * (self.R - 1) + [1]
        self.weights = ones if weights is None else finest if weights == "finest" else weights
        self.mixed, self.cfg_below = mixed, cfg_below
        self.parts = ones if mixed is None else mixed
        if len(self.weights) != self.R or not self.weights[-1]:
            raise UserError(f"weights={weights}: give a list of {self.R} numbers, coarsest first, the last one above 0")
        if mixed and not self.weights[0]:
            raise UserError("mixed leaves rows that have only the coarsest resolution, whose weight is 0: drop mixed")
        if predict == "eps" != error:           # error / error of eps is up to 1e9 where there is almost only noise
            raise UserError(f"predict=eps with error={error} counts the noisiest steps up to 1e9 times: add error=eps")
        falling = [1, *self.parts[1:]] == sorted(self.parts, reverse=True)
        if len(self.parts) != self.R or not falling or self.parts[-1] <= 0:
            raise UserError(f"mixed={mixed}: must be a list of {self.R} numbers, coarsest first, that begin with 1, do "
                            f"not rise and end above 0, such as {[1] + [0.5] * (self.R - 1)}")
        ratios = [math.sqrt(N / self.sizes[0]) for N in self.sizes]
        self.levels = [Diffusion(shift_snr(alpha_bar, ratio, power), predict, t_normal=t_normal) for ratio in ratios]
        self.draw_t, self.model_t = self.levels[0].draw_t, self.levels[0].model_t     # the same at every resolution

        for level in self.levels:
            # Each squared error is a multiple of that of v: eps - eps' = alpha (v - v'), x0 - x0' = sigma (v' - v).
            times_v = {"v": torch.ones_like(alpha_bar), "eps": level.alpha_bar, "x0": 1 - level.alpha_bar}
            level.tables["rescale"] = times_v[error] / times_v[predict]

    def loss(self, model, x0, t, noise, **cond):
        """x0 (B, C, [frames,] H, W), t (B,), noise (B, numbers), see `noise_shape` -> {"loss", "loss_1" .. "loss_R"},
        each (B,). loss_r is the mean squared error at resolution r, 0 in rows without it."""
        check_shape(x0, self.shapes[-1])
        errors = (self.mixed_errors if self.mixed else self.errors)(model, x0, t, noise, **cond)     # [(B,)]
        # The division by the part that has a resolution makes it count about as much as in unmixed batches.
        total = sum(w / part * error for w, part, error in zip(self.weights, self.parts, errors))    # Eq. 3, (B,)
        return {"loss": total} | {f"loss_{r + 1}": error for r, error in enumerate(errors)}

    def errors(self, model, x0, t, noise, rows=None, **cond):
        """-> mean squared errors, [(n,)]. Resolution r is computed for the first n = rows[r] pictures (None: all)."""
        rows, noise = rows or [len(t)] * self.R, self.unpack(noise[:, :-1])
        x = [reduce(x0[:n], shape) for n, shape in zip(rows, self.shapes)]                 # D_r(x), [(n, *shape)]
        each = [(level, x_r, t[:n], eps[:n]) for level, x_r, n, eps in zip(self.levels, x, rows, noise)]
        z = [level.q_sample(x_r, t_r, eps) for level, x_r, t_r, eps in each]               # Eq. 2
        outs = model(self.visible(z), self.model_t(t), **cond)                             # [(n, *shape)]
        return [level.at("rescale", t_r, t_r) * level.loss_terms(out, x_r, z_r, t_r, eps)["mse"]
                for (level, x_r, t_r, eps), z_r, out in zip(each, z, outs, strict=True)]   # [(n,)]

    def mixed_errors(self, model, x0, t, noise, places=None, **cond):
        """Like `errors`, but only the part mixed[r] of the rows has resolution r -> [(B,)], 0 in the others. A row's
        place in the whole batch decides: so it is the same on any number of processes, each step has as many, and
        nobody waits for the GPU to count. places (B,) long, on the CPU; None: 0 .. B - 1."""
        places = torch.arange(len(t), device="cpu") if places is None else places
        u = places * ((math.sqrt(5) - 1) / 2) % 1           # the golden ratio spreads them evenly over 0 .. 1, (B,)
        order = u.argsort()                                 # rows with the finest resolution first, (B,)
        has = u[order, None] <= torch.tensor(self.mixed)                                   # (B, R)
        # At least one row is computed, even if it does not count: under DDP every weight must be used.
        rows = has.sum(0).clamp(min=1).tolist()
        order, has = (v.to(t.device, non_blocking=t.is_cuda) for v in (order, has))
        cond = {k: v[order] for k, v in cond.items() if v is not None}
        errors = self.errors(model, x0[order], t[order], noise[order], rows, **cond)       # [(n,)]
        errors = [F.pad(error, (0, len(t) - len(error))) for error in errors]              # [(B,)]
        return [(error * has[:, r])[order.argsort()] for r, error in enumerate(errors)]

    def visible(self, z):
        """What the network may see: zeros for a resolution of weight 0. It is not trained, so in sampling its z would
        mean nothing. In training it would be a second look at the picture, with noise of its own."""
        return [z_r if w else torch.zeros_like(z_r) for z_r, w in zip(z, self.weights)]

    def noise_shape(self, shape):
        """How many normal numbers a row of `loss` needs: independent noise for each resolution (as in the code; the
        paper writes only the marginals), and one that is not read, for older runs to go on with the same noise."""
        return (sum(self.sizes) + 1,)

    def unpack(self, numbers):
        """(B, numbers) -> a tensor (B, *shape) for each resolution."""
        return [part.view(-1, *shape) for part, shape in zip(numbers.split(self.sizes, dim=1), self.shapes)]

    def respaced(self, spec):
        """The levels at fewer steps, for sampling; see diffusion.Diffusion.respaced."""
        return [level.respaced(spec) for level in self.levels]

    @torch.no_grad()
    def sample_levels(self, model, shape, seeds, *, sampler="ddim", steps="50", eta=0.0, cfg_scale=1.0,
                      negative=None, clip=True, on_step=None, **cond):
        """Like diffusion.Diffusion.sample, without `start` -> every resolution, [(B, *shape_r)]. One call of the
        network a step denoises all of them, each by its own schedule. on_step gets lists."""
        check_sampler(sampler)
        if tuple(shape) != self.shapes[-1]:
            raise UserError(f"this diffusion makes {self.shapes[-1]}, not {tuple(shape)}: ask for that shape")
        if cfg_scale != 1 and not negative and getattr(model, "empty_prompt", False):
            raise UserError("this model has no token for no text: pass negative={'text': (1, L, n), 'text_mask': (1, "
                            "L)}, the embedding of the empty prompt")
        levels, numbers, ddpm = self.respaced(steps), (sum(self.sizes),), sampler == "ddpm"
        z = self.unpack(normal(fold(seeds, self.T), numbers))                              # [(B, *shape_r)]
        cond = for_each(seeds, cond)
        steered = guided(model, cfg_scale, negative) if cfg_scale != 1 else model
        steer = (levels[0].timestep_map < self.cfg_below * self.T).tolist()
        for i in reversed(range(levels[0].T)):
            t = torch.full_like(seeds, i)                                                  # (B,)
            z = [z_r.contiguous() for z_r in z]             # one layout, so --compile makes one graph
            outs = (steered if steer[i] else model)(self.visible(z), levels[0].model_t(t), **cond)
            noise = self.unpack(normal(fold(seeds, i), numbers)) if ddpm or eta else [None] * self.R
            each = list(zip(levels, outs, z, noise))
            z = [level.ddpm_step(out, z_r, t, eps, clip) if ddpm else level.ddim_step(out, z_r, t, eps, clip, eta)
                 for level, out, z_r, eps in each]
            if on_step:
                on_step(i, z, [level.predict_x0_eps(out, z_r, t, clip)[0] for level, out, z_r, _ in each])
        return self.visible(z)

    def sample(self, model, shape, seeds, *, on_step=None, **options):
        """The finest resolution, (B, *shape). on_step gets that one alone."""
        finest = on_step and (lambda i, z, x0: on_step(i, z[-1], x0[-1]))
        return self.sample_levels(model, shape, seeds, on_step=finest, **options)[-1]


def guided(model, scale, negative=None):
    """Like diffusion.guided, at every resolution."""
    def call(z, t, **cond):
        outs = model([torch.cat([z_r, z_r]) for z_r in z], torch.cat([t, t]), **with_and_without(cond, negative))
        pairs = [out.float().chunk(2) for out in outs]                                # [2 x (B, *shape_r)]
        return [without + scale * (with_c - without) for with_c, without in pairs]    # [(B, *shape_r)]
    return call


# --- the networks: Section 3.2 ----------------------------------------------------------------------

class UNet(nn.Module):
    """The network of the coarsest resolution, and the U that NestedUNet shares. Authors: ml_mdm/models/unet.py, UNet.

    shape     (C, H, W) of its pictures, or (C, frames, H, W) of its clips
    channels, blocks, attention: a number for each size of the U, largest first. blocks: residual blocks on the way
              down; there is one more on the way up. attention: layers of attention after each block
    middle    layers of attention in the middle. None: no middle. condition: None, or one with tokens of width D
    temporal  each smaller size has half the frames, not half the height and width; each pixel looks at all frames
    micro     micro-conditioning: the network is told the original size of each picture, see `forward`"""
    standardise = False                         # divide z of this resolution by its standard deviation; see `assemble`

    def __init__(self, shape, channels, blocks, E, attention=None, middle=None, heads=None, condition=None, D=0,
                 temporal=False, micro=False):
        super().__init__()
        attention = [0] * len(channels) if attention is None else attention
        if not len(channels) == len(blocks) == len(attention) > 0:
            raise UserError(f"channels={channels}, blocks={blocks}, attention={attention}: make them equally long")
        self.shape, self.sines = shape, E // 4
        self.nest = [self]                      # networks, from the innermost to this one; --init-inner fills one
        self.unit = Stage                       # what support/parallel.py shards and recomputes at a time
        self.embed_t = nn.Sequential(nn.Linear(self.sines, E), nn.SiLU(), nn.Linear(E, E))
        self.micro = micro and nn.Sequential(nn.Linear(self.sines, E), nn.SiLU(), zero(nn.Linear(E, E)))
        self.condition = condition
        self.stem = nn.Conv2d(shape[0], channels[0], 3, padding=1)

        def stages(enter, C, layers):           # enter: the channels that come into each
            return nn.ModuleList(Stage(C_in, C, E, layers, heads, D, temporal) for C_in in enter)

        self.down, self.shrink, skips = nn.ModuleList(), nn.ModuleList(), [channels[0]]
        for i, (C_in, C, n, layers) in enumerate(zip([channels[0], *channels], channels, blocks, attention)):
            if i > 0:
                self.shrink.append(Resize(C_in, temporal, stride=2))
                skips.append(C_in)
            self.down.append(stages([C_in] + [C] * (n - 1), C, layers))
            skips += [C] * n
        self.middle = nn.ModuleList() if middle is None else stages([C], C, middle) + stages([C], C, 0)
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for C_in, C, n, layers in reversed([*zip([*channels[1:], C], channels, blocks, attention)]):
            if len(self.up) > 0:
                self.grow.append(Resize(C_in, temporal))
            self.up.append(stages([C_h + skips.pop() for C_h in [C_in] + [C] * n], C, layers))
        self.norm, self.head = group_norm(C), zero(nn.Conv2d(C, shape[0], 3, padding=1))

    def forward(self, z, t, y=None, text=None, text_mask=None, size=None):
        """z [(B, *shape_1), .., (B_R, *shape_R)], t (B,) long -> predictions, shaped like z. A finer resolution may
        have fewer rows, those of the first pictures: B_R <= .. <= B. y (B,), or text and text_mask: see Condition.
        size (B,), read only with micro: the shorter side that each picture had before it was resized. None: at least as
        large as here. Raises UserError for another shape, for a label that is no class, and for text not asked for."""
        read = self.core.condition              # the innermost network reads the words once, for all resolutions
        if y is not None:
            check_labels(y, read.num_classes if read else 0)
        if text is not None and (not read or read.num_classes):
            raise UserError("this model reads no text: drop text=")
        *words, pooled = read(t, y, text, text_mask) if read else [None]
        return self.denoise(z, t, words, pooled, size)[0]

    def denoise(self, z, t, words, pooled, size, above=None):
        """z [(B, *shape_1), .., (n, *shape)] up to this resolution -> predictions like z, and features (n frames,
        C_1, H, W) before the head. above: features from the network around this one, for all rows or the first ones."""
        x, t_x, side = z[-1], t[:len(z[-1])], min(self.shape[-2:])
        check_shape(x, self.shape)
        if self.standardise:
            x = x / x.std(dim=[*range(1, x.ndim)], keepdim=True).clamp(min=1e-6)      # z is 0 without a weight
        e = self.embed_t(sinusoid(t_x, self.sines))                                   # (n, E)
        if pooled is not None:
            e = e + pooled[:len(x)]
        if self.micro:                          # a level is told at most its own side
            own = torch.full_like(t_x, side) if size is None else size[:len(x)].clamp(max=side)
            e = e + self.micro(sinusoid(own, self.sines))
        h = self.stem(rearrange(x, "b c f row col -> (b f) c row col") if x.ndim == 5 else x)
        if above is not None:                   # rows without a finer resolution get zeros, as if there were none
            h = h + F.pad(above, (0, 0) * 3 + (0, len(h) - len(above)))               # (n frames, C_1, H, W)
        skips = [h]
        for i, stages in enumerate(self.down):
            if i > 0:                           # half of H_i and W_i or, in a temporal level, of the frames
                h = self.shrink[i - 1](h, len(e))
                skips.append(h)
            for stage in stages:
                h = stage(h, e, words)                                                # (n frames, C_i, H_i, W_i)
                skips.append(h)
        outs, h = self.inside(h, e, z[:-1], t, words, pooled, size)
        for i, stages in enumerate(self.up):    # i counts from the lowest
            if i > 0:
                h = self.grow[i - 1](h, len(e), skips[-1])                            # as large as skips[-1]
            for stage in stages:                # each also gets features of its size from the way down
                h = stage(torch.cat([h, skips.pop()], dim=1), e, words)               # (n frames, C_i, H_i, W_i)
        out = self.head(F.silu(self.norm(h)))                                         # (n frames, C, H, W)
        out = rearrange(out, "(b f) c row col -> b c f row col", b=len(x)) if x.ndim == 5 else out
        return [*outs, out], h

    def inside(self, h, e, z, t, words, pooled, size):
        """What happens at the bottom of the U -> the predictions of inner networks, and features like h."""
        for stage in self.middle:
            h = stage(h, e, words)
        return [], h

    core = property(lambda self: self.nest[0])                                        # the innermost network

    def shapes(self):
        return [network.shape for network in self.nest]


class NestedUNet(UNet):
    """One more resolution around `inner`, a UNet or another NestedUNet. Section 3.2, Figure 3; video: Figure 10.
    Authors: ml_mdm/models/nested_unet.py, NestedUNet.

    Its own U ends at the side of the inner network's pictures. There its features are added to those of the inner
    stem, and the inner network's last features to its own. Each passes a convolution that starts at zero, so at first
    the inner network does exactly what it did alone."""

    def __init__(self, inner, shape, channels, blocks, **options):
        if len(channels) < 2:
            raise UserError(f"channels={channels}: a level around another has two sizes or more, such as (8, 16)")
        super().__init__(shape, channels, blocks, **options)
        self.inner, self.nest = inner, [*inner.nest, self]
        C, C_inner = channels[-1], inner.stem.out_channels
        self.in_adapter = zero(nn.Conv2d(C, C_inner, 3, padding=1))
        self.out_adapter = zero(nn.Conv2d(C_inner, C, 3, padding=1))

    def inside(self, h, e, z, t, words, pooled, size):
        outs, below = self.inner.denoise(z, t, words, pooled, size, self.in_adapter(h))
        return outs, h + self.out_adapter(below[:len(h)])       # `below` has all rows of the inner network


# --- the blocks, in the order the data meets them -----------------------------------------------------

def zero(layer):
    """Start a layer at zero, so that at first it adds nothing."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def group_norm(C, per_group=4):
    """At most 32 groups. Their number divides C, and each has 4 channels or more where C allows: a group of one
    channel would lose its mean. (The authors always have 32 groups: per_group=1 of `assemble`.)"""
    return nn.GroupNorm(math.gcd(C, min(32, max(1, C // per_group))), C)


def sinusoid(t, width):
    """(B,) -> (B, width): sines, then cosines, of t at wavelengths from 2 pi to almost 2 pi 10^4."""
    half = width // 2
    angles = t.float()[:, None] * (-math.log(1e4) / half * torch.arange(half, device=t.device)).exp()
    return torch.cat([angles.sin(), angles.cos()], dim=1)                             # (B, width)


def attend(q, k, v, heads, mask=None):
    """q (b, n, C), k and v (b, m, C), mask (b, m) -> (b, n, C). Softmax attention, in `heads` groups of channels."""
    if len(q) > 65535:                          # as many rows as CUDA takes: halve them
        masks = [None] * 2 if mask is None else mask.chunk(2)
        return torch.cat([attend(*half, heads, m) for *half, m in zip(q.chunk(2), k.chunk(2), v.chunk(2), masks)])
    # CUDA has a fast form for numbers of a token that lie side by side only
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    q, k, v = (rearrange(x, "b l (heads c) -> b heads l c", heads=heads) for x in (q, k, v))
    mask = None if mask is None else mask[:, None, None]                              # (b, 1, 1, m)
    return rearrange(F.scaled_dot_product_attention(q, k, v, mask), "b heads l c -> b l (heads c)")


class Stage(nn.Module):
    """A residual block and the attention after it: h (B frames, C_in, H, W), e (B, E) -> (B frames, C, H, W)."""

    def __init__(self, C_in, C, E, attention, heads, text_width, temporal):
        super().__init__()
        self.block = ResBlock(C_in, C, E)
        self.attention = nn.ModuleList(Attention(C, heads, text_width) for _ in range(attention))
        self.temporal = TemporalAttention(C) if temporal else None

    def forward(self, h, e, words):
        h = self.block(h, e)
        for layer in self.attention:
            h = layer(h, words)
        return self.temporal(h, len(e)) if self.temporal else h


class ResBlock(nn.Module):
    """h (B frames, C_in, H, W), e (B, E) -> (B frames, C, H, W). Authors: ml_mdm/models/unet.py, ResNet."""

    def __init__(self, C_in, C, E):
        super().__init__()
        self.norm1, self.conv1 = group_norm(C_in), nn.Conv2d(C_in, C, 3, padding=1)
        self.film = nn.Linear(E, 2 * C)     # e scales and shifts the channels (FiLM, "adaptive group norm")
        self.norm2, self.conv2 = group_norm(C), zero(nn.Conv2d(C, C, 3, padding=1))
        self.skip = nn.Conv2d(C_in, C, 1) if C_in != C else nn.Identity()

    def forward(self, h, e):
        film = self.film(F.silu(e)).repeat_interleave(len(h) // len(e), dim=0)        # (B frames, 2C)
        scale, shift = film[:, :, None, None].chunk(2, dim=1)                         # 2 x (B frames, C, 1, 1)
        change = self.conv1(F.silu(self.norm1(h)))                                    # (B frames, C, H, W)
        change = self.conv2(F.silu(self.norm2(change) * (1 + scale) + shift))
        return self.skip(h) + change


class Attention(nn.Module):
    """Each position looks at all others and, with the same query, at the words. The two results are added. An MLP
    follows. h (B, C, H, W) -> the same shape. Authors: ml_mdm/models/unet.py, SelfAttention."""

    def __init__(self, C, heads, text_width):
        super().__init__()
        if C % heads:
            raise UserError(f"{C} channels are not divisible by heads={heads}: change one of them")
        self.heads = heads
        self.norm, self.qkv, self.out = group_norm(C), nn.Conv2d(C, 3 * C, 1), zero(nn.Conv2d(C, C, 1))
        if text_width:
            self.word_norm, self.word_kv = nn.LayerNorm(text_width), nn.Linear(text_width, 2 * C)
        self.mlp = nn.Sequential(group_norm(C), nn.Conv2d(C, 4 * C, 1), nn.GELU(), zero(nn.Conv2d(4 * C, C, 1)))

    def forward(self, h, words):
        q, k, v = rearrange(self.qkv(self.norm(h)), "b (qkv c) row col -> qkv b (row col) c", qkv=3)
        seen = attend(q, k, v, self.heads)                                            # (B, H W, C)
        if words:
            tokens, mask = words
            k, v = self.word_kv(self.word_norm(tokens)).chunk(2, dim=2)               # 2 x (B, L, C)
            seen = seen + attend(q, k, v, self.heads, mask)
        h = h + self.out(rearrange(seen, "b (row col) c -> b c row col", row=h.shape[2]))
        return h + self.mlp(h)                                                        # (B, C, H, W)


class TemporalAttention(nn.Module):
    """Each pixel looks at itself in all frames of its clip, at half the resolution: h (B frames, C, H, W) -> the same
    shape. Authors: ml_mdm/models/unet.py, TemporalAttentionBlock."""

    def __init__(self, C, head_width=32):
        super().__init__()
        if C % 2:
            raise UserError(f"{C} channels in the temporal level: make them even")
        self.heads = math.gcd(C, max(1, C // head_width))
        self.shrink = nn.Conv2d(C, C, 3, stride=2, padding=1)
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.out = nn.Linear(C, 3 * C), zero(nn.Linear(C, C))
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), zero(nn.Linear(4 * C, C)))
        self.grow = nn.Conv2d(C, C, 3, padding=1)

    def forward(self, h, B):
        small = self.shrink(h)                                                        # (B frames, C, H/2, W/2)
        pixels = rearrange(small, "(b f) c row col -> (b row col) f c", b=B)          # (B H/2 W/2, frames, C)
        places = sinusoid(torch.arange(pixels.shape[1], device=h.device), pixels.shape[2])      # (frames, C)
        q, k, v = self.qkv(self.norm1(pixels) + places).chunk(3, dim=2)               # 3 x (B H/2 W/2, frames, C)
        pixels = pixels + self.out(attend(q, k, v, self.heads))
        pixels = pixels + self.mlp(self.norm2(pixels))
        small = rearrange(pixels, "(b row col) f c -> (b f) c row col", b=B, row=small.shape[2])
        return h + self.grow(F.interpolate(small, size=h.shape[2:], mode="nearest"))  # (B frames, C, H, W)


class Resize(nn.Module):
    """h (B frames, C, H, W) -> half the height and width or, if temporal, half the frames (stride 2). With `like`, as
    large as that: each value is repeated, then comes the convolution (stride 1)."""

    def __init__(self, C, temporal, stride=1):
        super().__init__()
        self.temporal = temporal
        self.conv = (nn.Conv1d if temporal else nn.Conv2d)(C, C, 3, stride=stride, padding=1)

    def forward(self, h, B, like=None):
        if not self.temporal:
            return self.conv(h if like is None else F.interpolate(h, size=like.shape[2:], mode="nearest"))
        x = rearrange(h, "(b f) c row col -> (b row col) c f", b=B)
        x = self.conv(x if like is None else x.repeat_interleave(2, dim=2))           # (B H W, C, frames')
        return rearrange(x, "(b row col) c f -> (b f) c row col", b=B, row=h.shape[2])


# --- the condition: words, or a class ---------------------------------------------------------------

class Condition(nn.Module):
    """A class y (B,), or text with mask (B, L) -> tokens (B, L, D), mask (B, L), pooled (B, E).

    text is (B, L, K) bytes if the model was built with text="bytes". Otherwise it is (B, L, n), embeddings of a frozen
    language model, and n is __init__'s `text`. Without a mask all words count. A class is a caption of one token. "No
    condition" is a label -1, a row of the mask without a True, or y and text both None. A learned token stands for it.

    empty_prompt  there is no such token, and without a True comes NaN: for no text pass the language model's embedding
                  of the empty prompt
    see_padding   cross-attention also looks at the padding, whose embeddings are zeros. So the returned mask is None"""

    def __init__(self, num_classes, text, D, E, layers, empty_prompt, see_padding):
        super().__init__()
        self.see_padding = see_padding
        self.num_classes = num_classes          # of the embeddings below, the last one is for "no class"
        self.source = (nn.Embedding(num_classes + 1, D) if num_classes else
                       Spelling(D) if text == "bytes" else nn.Linear(text, D))          # Spelling: support/text.py
        self.null = None if num_classes or empty_prompt else nn.Parameter(torch.randn(D))
        self.layers = nn.ModuleList(TextLayer(D) for _ in range(layers))
        self.pool = nn.Linear(D, E, bias=False)

    def forward(self, t, y, text, mask):
        if self.num_classes:
            y = torch.full_like(t, -1) if y is None else y
            tokens = self.source(torch.where(y < 0, self.num_classes, y))[:, None]    # (B, 1, D)
        elif text is not None:
            tokens = self.source(text)                                                # (B, L, D)
        elif self.null is not None:
            tokens = self.null.expand(len(t), 1, -1)                                  # (B, 1, D)
        else:
            raise UserError("this model always reads text: pass the embedding of the empty prompt for none")
        if text is None or mask is None:
            mask = torch.ones_like(tokens[:, :, 0], dtype=torch.bool)                 # (B, L), or (B, 1)
        if text is not None and self.null is not None:
            # A row without a valid token gets the token "no text" everywhere, and the first one is made valid: there is
            # no attention to no token, and the mean over no token, below, would be 0/0.
            none = ~mask.any(dim=1, keepdim=True)                                     # (B, 1)
            tokens = torch.where(none[..., None], self.null, tokens)                  # (B, L, D)
            mask = torch.cat([mask[:, :1] | none, mask[:, 1:]], dim=1)                # (B, L)
        for layer in self.layers:
            tokens = layer(tokens, mask)
        valid = mask[..., None].to(tokens.dtype)                                      # (B, L, 1)
        return tokens, None if self.see_padding else mask, self.pool((tokens * valid).sum(1) / valid.sum(1))


class TextLayer(nn.Module):
    """Self-attention among the words, then an MLP: tokens (B, L, D), mask (B, L) -> (B, L, D). Changes nothing at the
    start. Authors: ml_mdm/models/unet.py, SelfAttention1DBlock."""

    def __init__(self, D, heads=8):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), zero(nn.Linear(D, D))
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), zero(nn.Linear(4 * D, D)))

    def forward(self, tokens, mask):
        q, k, v = self.qkv(self.norm1(tokens)).chunk(3, dim=2)                        # 3 x (B, L, D)
        tokens = tokens + self.out(attend(q, k, v, self.heads, mask))
        return tokens + self.mlp(self.norm2(tokens))                                  # (B, L, D)


# --- presets ----------------------------------------------------------------------------------------

def _level(*channels, n=1):         # a level around another: n residual blocks at each size, but one at the smallest
    return dict(channels=channels, blocks=(n,) * (len(channels) - 1) + (1,))


_PAPER = dict(channels=(256, 512, 768), blocks=(2, 2, 2), attention=(0, 1, 5), side=64, text_width=1024, layers=2,
              micro=False, embedding=1024, heads=8, schedule="cosine", predict="v", error="eps", power=1)
_RELEASED = _PAPER | dict(text_width=2048, layers=0, micro=True, per_group=1, see_padding=True, standardise=True,
                          empty_prompt=True)
_X4, _X16 = _level(64, 128, 256, n=2), _level(32, 32, 64, n=2)      # 4 times as large; around _X4: 16 times
_TINY = _PAPER | dict(channels=(48, 96), blocks=(1, 1), attention=(0, 1), side=16, text_width=64, embedding=256,
                      heads=4, predict="x0", error="x0")
CONFIGS = {                         # `outer` lists levels from the inside out
    # The released networks. `python -m support.released_mdm` makes checkpoints of the authors' weights.
    "cc12m-64": _RELEASED | dict(outer=()),
    "cc12m-256": _RELEASED | dict(outer=(_X4,)),
    "cc12m-1024": _RELEASED | dict(outer=(_X4, _X16), power=2),
    # With the paper's two text layers; see departure 11 in docs/mdm.md. The widths of the temporal level are ours.
    "paper-256": _PAPER | dict(outer=(_X4,)),
    "paper-128-256": _PAPER | dict(outer=(_level(128, 256, n=2), _level(64, 128, n=2))),
    "paper-1024": _PAPER | dict(outer=(_X4, _X16), power=2),
    "paper-video": _PAPER | dict(temporal=_level(*[256] * 5), outer=(_X4,)),
    # For two CPU cores. x0, as thin finest levels cannot pass on the noise in v and eps; `small` keeps the code's v.
    "tiny": _TINY | dict(outer=(_level(24, 48), _level(12, 24))),
    "tiny-x4": _TINY | dict(outer=(_level(12, 24, 48),)),   # {16, 64}, where tiny has {16, 32, 64}: as in Figure 8b
    "tiny-video": _TINY | dict(channels=(32, 48), embedding=128, text_width=48,
                               temporal=_level(16, 16, 24, 32, 32), outer=(_level(16, 24),)),
    "mini": _TINY | dict(channels=(32, 64), embedding=128, outer=(_level(16, 32),), t_normal=[0.4, 1.3]),   # {14, 28}
    "small": _TINY | dict(channels=(64, 128), outer=(_level(16, 32),), predict="v", error="v"),     # for CIFAR-10
}
TRAINING = dict(tiny=dict(max_steps=2000))      # train.py trains for 5,000 steps, unless a preset has its own number
Level = TypedDict("Level", {"channels": list[int], "blocks": list[int]})        # a number for each size, largest first


def build(preset, shape, num_classes=0, text=0, **options):
    """-> (model, diffusion): all that train.py and sample.py ask of a paper. Raises UserError, with the fix.

    shape: (C, H, W), or (C, frames, H, W) with frames a power of two. num_classes: y is one of so many, or -1 for none.
    text: "bytes", or the width of a language model's embeddings. options: of `assemble`, in place of the preset's."""
    return assemble(shape, num_classes, text, **checked("mdm", CONFIGS, preset, options, assemble, {}))


def assemble(shape, num_classes, text, *, channels: list[int], blocks: list[int], attention: list[Annotated[int, 0]],
             outer: list[Level], temporal: Level | None = None, side: int, text_width: int, layers: Annotated[int, 0],
             micro: bool, embedding: int, heads: int, middle: Annotated[int, 0] = 1, per_group: Annotated[int, 1] = 4,
             see_padding: bool = False, standardise: bool = False, empty_prompt: bool = False,
             schedule: Literal[tuple(SCHEDULES)] = "cosine", T: Annotated[int, 1, 10**6] = 1000,
             predict: Literal["v", "x0", "eps"] = "v", error: Literal["v", "x0", "eps"] = "eps",
             power: Annotated[float, 0, 10] = 1, weights: Literal["finest"] | list[float] | None = None,
             mixed: list[float] | None = None, t_normal: list[Annotated[float, -10, 10]] | None = None,
             cfg_below: Annotated[float, 0, 1] = 1):
    """Builds the networks, from the inside out, and their diffusion. support/options.py checks options by these types.

    channels, blocks, attention, middle: of the innermost UNet. outer: the levels around it. They are added while
    the coarsest pictures stay at least 3/4 of `side` wide. temporal: the level that makes a frame into a
    clip. text_width: D. layers: of self-attention for the text. embedding: E. per_group: group norms have so many
    channels in a group, or more. standardise: networks between the innermost and the finest divide their z by its
    standard deviation. See also UNet, Condition and ExtendedDiffusion."""
    for key, width in (("text_width", text_width), ("embedding", embedding)):
        if width % 8:
            raise UserError(f"{key}={width}: must be divisible by 8, try {width // 8 * 8 or 8}")
    if num_classes and text:
        raise UserError("a model reads classes or text, not both: drop one")
    if empty_prompt and text == "bytes":
        raise UserError("empty_prompt=True needs a T5, as in --text-encoder google/flan-t5-xl: pass one, or --set "
                        "empty_prompt=False")
    C, *frames, H, W = shape
    ratios = [2 ** sum(len(level["channels"]) - 1 for level in outer[:n]) for n in range(len(outer) + 1)]
    levels = outer[:sum(min(H, W) / ratio >= 0.75 * side for ratio in ratios[1:])]
    ratio = ratios[len(levels)]                                 # of the finest side to the coarsest
    if H % ratio or W % ratio:
        near = "x".join(str(max(1, round(n / ratio)) * ratio) for n in (H, W))
        raise UserError(f"image size {H}x{W} is not divisible by {ratio}, the ratio of the finest to the coarsest "
                        f"resolution: try {near}")
    D, E, H, W = text_width if num_classes or text else 0, embedding, H // ratio, W // ratio
    condition = Condition(num_classes, text, D, E, layers, empty_prompt, see_padding) if D else None
    model = UNet((C, H, W), channels, blocks, E, attention, middle, heads, condition, D, micro=micro)
    if frames:
        sizes = {2**k: k + 1 for k in range(1, len(temporal["channels"]))} if temporal else {}
        if frames[0] not in sizes:
            raise UserError(f"{frames[0]} frames: this preset makes {', '.join(map(str, sizes)) or 'no videos'}. "
                            f"Change --frames, or use --preset tiny-video or paper-video")
        level = {key: values[:sizes[frames[0]]] for key, values in temporal.items()}    # halves them down to one
        model = NestedUNet(model, (C, *frames, H, W), **level, E=E, micro=micro, temporal=True)
    for level in levels:
        H, W = (n * 2 ** (len(level["channels"]) - 1) for n in (H, W))
        model = NestedUNet(model, (C, *frames, H, W), **level, E=E, micro=micro)
    for network in model.nest[1:-1]:
        network.standardise = standardise
    for norm in model.modules():
        if isinstance(norm, nn.GroupNorm):
            norm.num_groups = group_norm(norm.num_channels, per_group).num_groups
    model.empty_prompt = bool(text) and empty_prompt            # tells train.py and sample.py what "no text" is
    diffusion = ExtendedDiffusion(SCHEDULES[schedule](T), model.shapes(), predict, error, power, weights, mixed,
                                  t_normal, cfg_below)
    return model.to(memory_format=torch.channels_last), diffusion           # the faster layout of convolutions


if __name__ == "__main__":          # its presets beside the authors' figures
    from benchmarks import tables
    tables.mdm()
