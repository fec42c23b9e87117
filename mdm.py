"""MDM: Matryoshka Diffusion Models, in one file: images from classes, from text, and video.

Jiatao Gu, Shuangfei Zhai, Yizhe Zhang, Josh Susskind, Navdeep Jaitly. arXiv 2310.15111, ICLR 2024.

The idea. Make a large picture in one process, without an autoencoder and without a cascade of models:
denoise the picture and smaller copies of itself at the same time, one inside the other like Matryoshka
dolls. Pixel for pixel the small copies become readable first and guide the large ones; most of the network
works at the smallest resolution; and a network trained there is the core of the next larger one.

    z_t^r = alpha_t^r D_r(x) + sigma_t^r eps^r,    eps^r ~ N(0, I),    r = 1 .. R, one t for all     (Eq. 2)
    loss  = sum over r of omega_t^r |x_theta^r(z_t, t) - D_r(x)|^2,    omega^r / omega^R = N_R / N_r (Eq. 3)

Glossary. B is the batch, R the number of resolutions; lists of resolutions begin with the coarsest, as
the paper's index r does, but count from 0: levels[0] has alpha^1. In shapes T is the number of frames (T'
once shrunk), elsewhere, as in diffusion.py, of steps. L: words of a caption; W: letters of a word, where
text is (B, L, W); D: width of a token; E: width of `e`.

| code            | symbol          | shape              | meaning, and the part of the paper             |
|-----------------|-----------------|--------------------|------------------------------------------------|
| `x`             | x               | (B, C, H, W)       | a picture; (B, C, T, H, W) a video             |
| `reduce`        | D_r             |                    | the picture at resolution r (Section 3.1)      |
| `z`             | z_t^1 .. z_t^R  | [(B, C, H_r, W_r)] | the extended space: every resolution, noised   |
| `t`             | t               | (B,)               | one time for all resolutions                   |
| `levels[r]`     | alpha^r sigma^r |                    | its schedule: alpha^2 = alpha_bar = 1 - sigma^2 |
| `noise`         | eps^1 .. eps^R  | (B, n)             | of all resolutions in a row; `unpack` parts it |
| `weights`       | omega^r N_r/N_R | R numbers          | of the mean squared errors (Eq. 3); see 1      |
| `UNet`          |                 |                    | the network of the coarsest resolution         |
| `NestedUNet`    | (Figure 3)      |                    | one more resolution around another network     |
| `in_adapter`, `out_adapter` |     |                    | the arrows into the inner network and out of it |
| `tokens`, `mask` |                | (B, L, D), (B, L)  | the words, or one token for the class          |
| `words`         |                 |                    | in methods [`tokens`, `mask`]; as an option D  |
| `pooled`        |                 | (B, E)             | a linear map of their mean, a part of `e`      |
| `e`             |                 | (B, E)             | embedding of t, the condition, the size        |

Not here: training (train.py; --init-inner is progressive training, Section 3.3), the formulas of one
resolution's diffusion (diffusion.py), captions to numbers (data.py).

Where paper, authors' code and this file differ. ("Code" is the authors' release.)
 1. Loss. Eq. 3 sums squared errors over pixels and weights resolution r by N_R / N_r, N_r the number of
    values of D_r(x): each resolution then counts alike. The code takes the *mean* over pixels and adds the
    resolutions up, which is the same. To do both, means and N_R / N_r, would count the coarse ones N_R / N_r
    times too much. Here: means.
 2. The paper's loss is the error of x with a free weight omega_t, and it allows eps or v instead. The code's
    network predicts v = alpha eps - sigma x, and its loss is the error of the eps that follows: alpha^2 (the
    code's gamma, alpha_bar here) times the error of v. The finer the resolution the smaller its alpha, so
    the fine ones are learned least. (Against that the released 1024 px configuration asks for weights 16:4:1,
    finest first, but a misplaced key switches them off.) error="eps" is the code's; the tiny presets take
    "v"; "x0" is the paper's, with omega_t = 1.
 3. Shift of the schedule: SNR / ratio^power, ratio = side / coarsest side. The paper has no formula; the
    released 256 px model has power 1, the 1024 px model power 2 (means of s x s pixels have a noise variance
    s^2 times smaller, so that with power 2 all resolutions should look equally noisy once reduced; with power
    1 the reduced fine picture is even clearer than its small copy, s times in SNR).
 4. Batches of mixed resolutions: the paper trains all models on them unless it says otherwise. The released
    256 px configuration asks for "2:1" (the first two thirds of the rows have the fine one), but a misplaced
    key switches it off. Here they are off, in the presets "paper-.." too, unless, say, mixed=[1, 0.67] gives
    each resolution's chance: the rows are random, yet the same on any number of processes.
 5. Text. The language model's output is projected to width D; then the paper has two self-attention layers,
    the released models none. The released models attend to padding, too; here it is masked. In the code
    captions are never dropped and "unconditional" is an empty prompt; here a learned token stands for "no
    text" (2048 or 1024 parameters more than the released counts) and is trained by --cond-dropout, whose 10%
    are ours. So is text="bytes", the spelling of words instead of a language model.
 6. A class is one token of a table, then takes the path of the text, text layers included. In the code (where
    this does not run) a one-hot vector goes to each attention layer, without text layers: but for these and a
    norm the same, with 407M inside instead of our 435M.
 7. Sampling begins at t = T - 1 = 999 (--steps ddim50: 980). The code's 50 steps begin at our t = 980, from
    pure noise, where a trace of the picture should be left (alpha_bar 9e-4).
 8. Video is five-dimensional. The code folds 16 frames into a 4 x 4 mosaic, over whose seams some
    convolutions leak, and its temporal attention does not know the order of frames; here it does (sines).
    Widths of the temporal level are ours: no configuration was released. D_r takes block means in space, as
    the code does; the paper says bilinear for video.
 9. Left out: dividing a level's input by its standard deviation (the released 1024 px model does at 256 px),
    and "residual mode" (unused). Group norms have 4 channels a group or more (the code: always 32 groups).
10. The size of the original picture ("micro-conditioning", micro=True) is in the released models and not in
    the paper's main text. Their data never sets it, nor does ours.
11. The paper says 450M parameters for the inner network; no released or described setting has that. The
    presets "paper-.." have the paper's two text layers, and a projection to 1024 that the authors give in a
    later paper (Kaleido): 436M inside, 450M with the level of 256 px. Widths, heads, error and power (2 at
    1024 px) are the released configurations' where there is one.
"""
import copy
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from diffusion import SCHEDULES, Diffusion, UserError, fold, normal, shift_snr, with_and_without


# --- the extended space -------------------------------------------------------------------------

def reduce(x, shape):
    """D_r: x (B, C, [T,] H, W) -> (B, *shape). Means of blocks in space, the first frame in time."""
    if x.ndim > len(shape) + 1:
        x = x[:, :, 0]                                                                # (B, C, H, W)
    k = x.shape[-1] // shape[-1]
    return F.avg_pool2d(x, k) if x.ndim == 4 else F.avg_pool3d(x, (1, k, k))          # (B, *shape)


class ExtendedDiffusion:
    """The diffusion of all resolutions at once, with the methods of diffusion.Diffusion that train.py and
    sample.py call. Sections 3.1, 3.3.

    shapes    of the resolutions, coarsest first: [(3, 16, 16), (3, 32, 32)]; of videos (C, T, H, W), but for
              the coarsest, which is the first frame alone: [(3, 16, 16), (3, 8, 16, 16), (3, 8, 32, 32)]
    predict   what the network's outputs mean: "v" | "x0" | "eps"
    error     of what the squared error is taken: "v" | "x0" | "eps"
    power     resolution r has the signal-to-noise ratio of the coarsest, divided by
              (side_r / side_1)^power
    weights   of the resolutions' mean squared errors, that is, omega^r N_r / N_R of Eq. 3; None: all 1, the
              paper's; "finest": the last one alone, its "simple DM" with a nested network (Figure 4b, c).
              A resolution of weight 0 is not trained; the network sees zeros in its place (our choice), and
              zeros are returned
    mixed     for each resolution the chance that a row has it, such as [1, 0.67]: every row has the coarsest,
              two thirds the finer, too. A row that has a resolution has all coarser ones; without the finer
              ones it costs less. None: all rows have all resolutions
    """

    def __init__(self, alpha_bar, shapes, predict="v", error="eps", power=1, weights=None, mixed=None):
        self.shapes, self.R, self.T = [tuple(s) for s in shapes], len(shapes), len(alpha_bar)
        if error not in ("eps", "v", "x0"):
            raise UserError(f"unknown error {error!r}: choose eps, v or x0")
        weights = [1.0] * self.R if weights is None else weights
        weights = [0.0] * (self.R - 1) + [1.0] if weights == "finest" else weights
        self.weights = check_list("weights", weights, self.R)
        self.mixed = None if mixed is None else check_list("mixed", mixed, self.R)
        if not any(self.weights):
            raise UserError(f"weights={weights}: one at least must be above 0")
        if self.mixed and (self.mixed[0] != 1 or self.mixed[-1] == 0
                           or self.mixed != sorted(self.mixed, reverse=True)):
            raise UserError(f"mixed={self.mixed}: must begin with 1, not rise and end above 0, such as "
                             f"{[1] + [0.5] * (self.R - 1)}")
        self.levels = [Diffusion(shift_snr(alpha_bar, s[-1] / shapes[0][-1], power), predict)
                       for s in self.shapes]
        for d in self.levels:
            # squared errors as multiples of v's: eps - eps' = alpha (v - v') and x0 - x0' = sigma (v' - v)
            times_v = {"v": torch.ones_like(d.alpha_bar), "eps": d.alpha_bar, "x0": 1 - d.alpha_bar}
            d.tables["rescale"] = times_v[error] / times_v[predict]

    def model_t(self, t):
        return self.levels[0].model_t(t)

    def respaced(self, spec):
        """The same process at fewer steps, for sampling; see diffusion.Diffusion.respaced."""
        few = copy.copy(self)
        few.levels = [d.respaced(spec) for d in self.levels]
        few.T = few.levels[0].T
        return few

    def noise_shape(self, shape):
        """The shape of the normal numbers that one row of `loss` needs: noise for each resolution, all
        independent (as in the code; the paper writes only the marginals), and one number more, from which
        `mixed` decides which resolutions the row has."""
        return (sum(math.prod(s) for s in self.shapes) + 1,)

    def unpack(self, numbers):
        """(B, n) -> a tensor (B, *shape) for each resolution."""
        parts = numbers.split([math.prod(s) for s in self.shapes], dim=1)
        return [p.view(len(p), *s) for p, s in zip(parts, self.shapes)]

    def shown(self, z):
        """What the network may see: zeros for a resolution of weight 0. It is not trained, so in sampling it
        would have no sensible z; and in training a less noisy small copy would make the large one's task
        easier than it is in sampling."""
        return [y if w else torch.zeros_like(y) for y, w in zip(z, self.weights)]

    def loss(self, model, x0, t, noise, **cond):
        """x0 (B, C, [T,] H, W), t (B,), noise (B, n) as by `noise_shape` -> {"loss", "loss_1" .. "loss_R"},
        each (B,). loss_r is the mean squared error at resolution r, 0 in rows without it."""
        u = torch.special.ndtr(noise[:, -1])                # normal -> uniform in 0 .. 1, (B,)
        noise, rows = self.unpack(noise[:, :-1]), [len(x0)] * self.R
        if self.mixed:
            # Rows are sorted so that those with resolution r come first, and a slice selects them. At least
            # one is computed, even if it does not count: no weight may go unused under DDP.
            order = u.argsort()                                                       # (B,)
            has = u[order, None] <= torch.tensor(self.mixed, device=t.device)         # (B, R)
            rows = has.sum(0).clamp(min=1).tolist()     # a copy to the CPU: waits for the GPU
            x0, t, noise = x0[order], t[order], [eps[order] for eps in noise]
            cond = {k: v[order] for k, v in cond.items() if v is not None}
        x = [reduce(x0[:n], s) for n, s in zip(rows, self.shapes)]                    # [(n, *shape)]
        z = [d.q_sample(y, t[:n], eps[:n]) for d, y, n, eps in zip(self.levels, x, rows, noise)]
        outs = model(self.shown(z), self.model_t(t), **cond)                          # [(n, *shape)]
        terms, total = {}, 0
        for r, (d, n, out) in enumerate(zip(self.levels, rows, outs)):
            mse = (out.float() - d.target(x[r], t[:n], noise[r][:n])).square().flatten(1).mean(1)
            mse = F.pad(mse * d.at("rescale", t[:n], mse), (0, len(t) - n))           # (B,)
            terms[f"loss_{r + 1}"] = mse = mse * has[:, r] if self.mixed else mse
            # divided by the chance, so that a resolution counts as much as in unmixed batches, on average
            total = total + self.weights[r] / (self.mixed[r] if self.mixed else 1) * mse
        terms["loss"] = total
        if self.mixed:
            terms = {k: torch.zeros_like(v).index_copy(0, order, v) for k, v in terms.items()}
        return terms

    @torch.no_grad()
    def sample_levels(self, model, shape, seeds, *, sampler="ddim", steps="50", eta=0.0, cfg_scale=1.0,
                      clip=True, on_step=None, **cond):
        """As diffusion.Diffusion.sample, without `start` -> every resolution, [(B, *shape_r)]. All are
        denoised in parallel, one call of the network a step, each by its own schedule. on_step gets lists."""
        if tuple(shape) != self.shapes[-1]:
            raise UserError(f"this diffusion makes {self.shapes[-1]}, not {tuple(shape)}")
        few = self.respaced(steps)
        size = (sum(math.prod(s) for s in self.shapes),)
        z = self.unpack(normal(fold(seeds, self.T), size))                            # [(B, *shape)]
        model = guided(model, cfg_scale) if cfg_scale != 1 else model
        for i in reversed(range(few.T)):
            t = torch.full_like(seeds, i)
            outs = model(self.shown(z), few.model_t(t), **cond)
            noise = [None] * self.R
            if sampler == "ddpm" or eta:
                noise = self.unpack(normal(fold(seeds, i), size))
            if on_step:
                x0 = [d.predict_x0_eps(o, y, t, clip)[0] for d, o, y in zip(few.levels, outs, z)]
            z = [d.ddpm_step(o, y, t, eps, clip) if sampler == "ddpm"
                 else d.ddim_step(o, y, t, eps, clip, eta)
                 for d, o, y, eps in zip(few.levels, outs, z, noise)]
            if on_step:
                on_step(i, z, x0)
        return self.shown(z)

    def sample(self, model, shape, seeds, *, on_step=None, **options):
        """The finest resolution, (B, *shape); on_step gets that one too."""
        if on_step:
            options["on_step"] = lambda i, z, x0: on_step(i, z[-1], x0[-1])
        return self.sample_levels(model, shape, seeds, **options)[-1]


def check_list(name, values, n):
    if not isinstance(values, (list, tuple)) or len(values) != n or not all(
            type(v) in (int, float) and 0 <= v < math.inf for v in values):
        raise UserError(f"{name}={values!r}: must be a list of {n} numbers, one for each resolution, "
                         f"coarsest first")
    return [float(v) for v in values]


def guided(model, scale):
    """As diffusion.guided, at every resolution."""
    def call(z, t, **cond):
        both = with_and_without(cond)
        outs = model([torch.cat([y, y]) for y in z], torch.cat([t, t]), **both)       # [(2B, ..)]
        pairs = [out.float().chunk(2) for out in outs]
        return [without + scale * (with_c - without) for with_c, without in pairs]    # [(B, ..)]
    return call


# --- the condition: words, or a class -----------------------------------------------------------

class Spelling(nn.Module):
    """Bytes of words (B, L, W), 0 where there is none -> tokens (B, L, D), learned with the network: a vector
    for each letter at each place of a word, summed, and one for each place in the caption."""

    def __init__(self, D, L=16, W=12):
        super().__init__()
        self.letters = nn.Embedding(256 * W, D)
        self.places = nn.Parameter(0.1 * torch.randn(L, D))
        nn.init.normal_(self.letters.weight, std=0.5)       # a word of five letters has about size one

    def forward(self, text):
        W = text.shape[2]
        letters = self.letters(text + 256 * torch.arange(W, device=text.device))      # (B, L, W, D)
        return (letters * (text > 0)[..., None]).sum(2) + self.places                 # (B, L, D)


class TextLayer(nn.Module):
    """Self-attention among the words, then an MLP: tokens (B, L, D), mask (B, L) -> (B, L, D). No change at
    the start."""

    def __init__(self, D, heads=8):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), zero(nn.Linear(D, D))
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), zero(nn.Linear(4 * D, D)))

    def forward(self, tokens, mask):
        q, k, v = rearrange(self.qkv(self.norm1(tokens)), "b l (qkv n d) -> qkv b n l d", qkv=3, n=self.heads)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])    # (B, n, L, d)
        tokens = tokens + self.out(rearrange(h, "b n l d -> b l (n d)"))              # (B, L, D)
        return tokens + self.mlp(self.norm2(tokens))


class Condition(nn.Module):
    """A class y (B,), or `text` with `mask` (B, L) -> tokens (B, L, D), mask (B, L), pooled (B, E).

    text is (B, L, W) bytes if the model was built with text="bytes", else (B, L, n) embeddings of a frozen
    language model, where the argument `text` of __init__ is n. A class becomes a caption of one token. "No
    condition" is written as label -1, as a row of the mask without a True, or as y and text both None; then a
    learned token stands in its place (of classes, the table's last row).
    """

    def __init__(self, num_classes, text, D, E, layers):
        super().__init__()
        self.num_classes = num_classes
        if num_classes:
            self.source = nn.Embedding(num_classes + 1, D)          # the last row: no class
        else:
            self.source = Spelling(D) if text == "bytes" else nn.Linear(text, D)
            self.null = nn.Parameter(torch.randn(D))
        self.layers = nn.ModuleList(TextLayer(D) for _ in range(layers))
        self.pool = nn.Linear(D, E, bias=False)

    def forward(self, t, y, text, mask):
        if self.num_classes:
            y = torch.full_like(t, -1) if y is None else y
            tokens = self.source(torch.where(y < 0, self.num_classes, y))[:, None]    # (B, 1, D)
            mask = torch.ones_like(t, dtype=torch.bool)[:, None]                      # (B, 1)
        elif text is None:
            tokens = self.null.expand(len(t), 1, -1)                                  # (B, 1, D)
            mask = torch.ones_like(t, dtype=torch.bool)[:, None]                      # (B, 1)
        else:
            # Where no token is valid, all become "no text" and the first is made valid: attention over none
            # means nothing, and their mean, below, would be 0/0.
            none = ~mask.any(dim=1, keepdim=True)                                     # (B, 1)
            tokens = torch.where(none[..., None], self.null, self.source(text))       # (B, L, D)
            mask = torch.cat([mask[:, :1] | none, mask[:, 1:]], dim=1)                # (B, L)
        for layer in self.layers:
            tokens = layer(tokens, mask)
        valid = mask[..., None].to(tokens.dtype)                                      # (B, L, 1)
        return tokens, mask, self.pool((tokens * valid).sum(1) / valid.sum(1))


# --- blocks ---------------------------------------------------------------------------------------

def zero(layer):
    """Start a layer at zero: what it adds to is at first unchanged."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(C):
    """32 groups or fewer, as many as divide C, each of 4 channels or more (a channel alone would lose its
    mean) where C allows."""
    return nn.GroupNorm(math.gcd(C, min(32, max(1, C // 4))), C)


def sinusoid(t, width):
    """(B,) -> (B, width): sines, then cosines, of t at wavelengths from 2 pi to almost 2 pi 10^4."""
    half = width // 2
    angles = t.float()[:, None] * (-math.log(1e4) / half * torch.arange(half, device=t.device)).exp()
    return torch.cat([angles.sin(), angles.cos()], dim=1)                             # (B, width)


class ResBlock(nn.Module):
    """h (B, C_in, h, w), e (B, E) -> (B, C, h, w); for videos h has T rows for each of e."""

    def __init__(self, C_in, C, E):
        super().__init__()
        self.norm1, self.conv1 = group_norm(C_in), nn.Conv2d(C_in, C, 3, padding=1)
        self.film = nn.Linear(E, 2 * C)     # e's scale and shift of channels (FiLM, "adaptive group norm")
        self.norm2, self.conv2 = group_norm(C), zero(nn.Conv2d(C, C, 3, padding=1))
        self.skip = nn.Conv2d(C_in, C, 1) if C_in != C else nn.Identity()

    def forward(self, h, e):
        film = per_frame(self.film(F.silu(e)), len(h))[:, :, None, None]              # (B, 2C, 1, 1)
        scale, shift = film.chunk(2, dim=1)                                           # 2 x (B, C, 1, 1)
        x = self.conv1(F.silu(self.norm1(h)))                                         # (B, C, h, w)
        x = self.conv2(F.silu(self.norm2(x) * (1 + scale) + shift))
        return self.skip(h) + x


def per_frame(x, rows):
    """A row for each clip -> one for each frame."""
    return x if len(x) == rows else x.repeat_interleave(rows // len(x), dim=0)


class Attention(nn.Module):
    """Each position looks at all others, and, with the same query, at the words; the two results are added.
    Then (mlp=True) a small network at each position. h (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, C, heads, D, mlp):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = group_norm(C), nn.Conv2d(C, 3 * C, 1), zero(nn.Conv2d(C, C, 1))
        if D:
            self.word_norm, self.word_kv = nn.LayerNorm(D), nn.Linear(D, 2 * C)
        self.mlp = mlp and nn.Sequential(group_norm(C), nn.Conv2d(C, 4 * C, 1), nn.GELU(),
                                         zero(nn.Conv2d(4 * C, C, 1)))

    def forward(self, h, words):
        q, k, v = rearrange(self.qkv(self.norm(h)), "b (qkv n d) h w -> qkv b n (h w) d", qkv=3, n=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)                                   # (B, n, h w, d)
        if words:
            tokens, mask = (per_frame(w, len(h)) for w in words)
            k, v = rearrange(self.word_kv(self.word_norm(tokens)), "b l (kv n d) -> kv b n l d", kv=2,
                             n=self.heads)
            x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        h = h + self.out(rearrange(x, "b n (h w) d -> b (n d) h w", h=h.shape[2]))    # (B, C, h, w)
        return h + self.mlp(h) if self.mlp else h


class TemporalAttention(nn.Module):
    """Each pixel looks at itself in all frames of its clip, at half the resolution: h (B T, C, h, w) -> the
    same. C is even. The layout is the code's."""

    def __init__(self, C, head=32):
        super().__init__()
        self.heads = math.gcd(C, max(1, C // head))
        self.shrink = nn.Conv2d(C, C, 3, stride=2, padding=1)
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.out = nn.Linear(C, 3 * C), zero(nn.Linear(C, C))
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), zero(nn.Linear(4 * C, C)))
        self.grow = nn.Conv2d(C, C, 3, padding=1)

    def forward(self, h, B):
        small = self.shrink(h)                                                        # (B T, C, h/2, w/2)
        x = rearrange(small, "(b t) c h w -> (b h w) t c", b=B)
        frame = sinusoid(torch.arange(x.shape[1], device=x.device), x.shape[2])       # (T, C)
        q, k, v = rearrange(self.qkv(self.norm1(x) + frame), "p t (qkv n d) -> qkv p n t d", qkv=3,
                            n=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)                                   # (B h/2 w/2, n, T, d)
        x = x + self.out(rearrange(y, "p n t d -> p t (n d)"))
        x = x + self.mlp(self.norm2(x))                                               # (B h/2 w/2, T, C)
        x = rearrange(x, "(b h w) t c -> (b t) c h w", b=B, h=small.shape[2])
        return h + self.grow(F.interpolate(x, size=h.shape[2:], mode="nearest"))      # (B T, C, h, w)


class Stage(nn.Module):
    """A residual block and the attention after it."""

    def __init__(self, C_in, C, E, D, attention, heads, mlp, temporal=False):
        super().__init__()
        self.block = ResBlock(C_in, C, E)
        self.attention = nn.ModuleList(Attention(C, heads, D, mlp) for _ in range(attention))
        self.temporal = TemporalAttention(C) if temporal else None
        self.recompute = False

    def forward(self, h, e, words):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.run, h, e, words, use_reentrant=False)
        return self.run(h, e, words)

    def run(self, h, e, words):
        h = self.block(h, e)
        for attend in self.attention:
            h = attend(h, words)
        return self.temporal(h, len(e)) if self.temporal else h


class Shrink(nn.Module):
    """(B T, C, h, w) -> half the height and width, or half the frames, by a convolution."""

    def __init__(self, C, temporal):
        super().__init__()
        self.temporal = temporal
        self.conv = (nn.Conv1d if temporal else nn.Conv2d)(C, C, 3, stride=2, padding=1)

    def forward(self, h, B):
        if not self.temporal:
            return self.conv(h)                                                       # (B T, C, h/2, w/2)
        x = self.conv(rearrange(h, "(b t) c h w -> (b h w) c t", b=B))                # (B h w, C, T/2)
        return rearrange(x, "(b h w) c t -> (b t) c h w", b=B, h=h.shape[2])          # (B T/2, C, h, w)


class Grow(nn.Module):
    """(B T, C, h, w) -> as large as `like`: each value repeated, then a convolution."""

    def __init__(self, C, temporal):
        super().__init__()
        self.temporal = temporal
        self.conv = (nn.Conv1d if temporal else nn.Conv2d)(C, C, 3, padding=1)

    def forward(self, h, B, like):
        if not self.temporal:
            return self.conv(F.interpolate(h, size=like.shape[2:], mode="nearest"))   # (B T, C, 2h, 2w)
        x = rearrange(h, "(b t) c h w -> (b h w) c t", b=B).repeat_interleave(2, dim=2)
        x = self.conv(x)                                                              # (B h w, C, 2T)
        return rearrange(x, "(b h w) c t -> (b t) c h w", b=B, h=h.shape[2])          # (B 2T, C, h, w)


# --- the networks -----------------------------------------------------------------------------------

class UNet(nn.Module):
    """The network of the coarsest resolution, and the U that NestedUNet shares."""

    unit = Stage                        # what FSDP2 gathers at a time

    def __init__(self,
                 shape,                 # (C, H, W) of its pictures, or (C, T, H, W) of its clips
                 channels,              # of each of its sizes, largest first: (256, 512, 768)
                 blocks,                # residual blocks on the way down at each size; one more going up
                 attention,             # layers of attention after each block at each size: (0, 1, 5)
                 heads=8,               # of attention
                 embedding=1024,        # E, of t and of what is added to it
                 condition=None,        # a Condition, or None
                 words=0,               # D of its tokens, 0: none; in the methods `words` is [tokens, mask]
                 middle=1,              # layers of attention in the middle; None: no middle
                 mlp=True,              # a small network after each attention
                 temporal=False,        # shrink in time, not in height and width, and look along time
                 micro=False):          # micro-conditioning on the size of the original picture
        super().__init__()
        E, self.shape, self.sines = embedding, shape, embedding // 4
        self.embed_t = nn.Sequential(nn.Linear(self.sines, E), nn.SiLU(), nn.Linear(E, E))
        self.micro = micro and nn.Sequential(nn.Linear(self.sines, E), nn.SiLU(), zero(nn.Linear(E, E)))
        self.condition = condition
        self.stem = nn.Conv2d(shape[0], channels[0], 3, padding=1)

        def stage(C_in, i):
            return Stage(C_in, channels[i], E, words, attention[i], heads, mlp, temporal)

        self.down, self.shrink, skips, C = nn.ModuleList(), nn.ModuleList(), [channels[0]], channels[0]
        for i, n in enumerate(blocks):
            self.down.append(nn.ModuleList(stage(C if j == 0 else channels[i], i) for j in range(n)))
            C = channels[i]
            skips += [C] * n
            if i < len(channels) - 1:
                self.shrink.append(Shrink(C, temporal))
                skips.append(C)
        self.middle = nn.ModuleList([] if middle is None else [Stage(C, C, E, words, middle, heads, mlp),
                                                               Stage(C, C, E, words, 0, heads, mlp)])
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for i in reversed(range(len(channels))):
            stages = nn.ModuleList()
            for _ in range(blocks[i] + 1):
                stages.append(stage(C + skips.pop(), i))
                C = channels[i]
            self.up.append(stages)
            if i > 0:
                self.grow.append(Grow(C, temporal))
        self.norm, self.head = group_norm(C), zero(nn.Conv2d(C, shape[0], 3, padding=1))

    def forward(self, z, t, y=None, text=None, text_mask=None, size=None):
        """z [(B, *shape_1), .., (B_R, *shape_R)], t (B,) long, y (B,) or text and text_mask as for Condition,
        size (B,): the shorter side each picture had before it was resized, None: at least as large as here;
        each level sees min(size, its own side). -> like z.

        A finer resolution may have fewer rows, those of the first pictures: B_R <= .. <= B.
        """
        condition = self.core.condition
        words, pooled = None, None      # words: [tokens (B, L, D), mask (B, L)]
        if condition is not None:       # computed once, by the innermost network, for all resolutions
            *words, pooled = condition(t, y, text, text_mask)
        return self.denoise(z, t, words, pooled, size)[0]

    @property
    def core(self):
        """The innermost network."""
        return self

    def denoise(self, z, t, words, pooled, size, above=None):
        """z [(B, *shape_1)] -> ([prediction], features (B T, C_1, H, W)). `above`: what the outer network
        hands in, (n T, C_1, H, W) of the first n rows. T is 1: in videos, too, the innermost network makes
        one frame."""
        h, e = self.enter(z[-1], t, pooled, size, above)                              # (B T, C_1, H, W)
        h, skips = self.descend(h, e, words)
        for stage in self.middle:
            h = stage(h, e, words)
        h = self.ascend(h, skips, e, words)
        return [self.predict(h, z[-1])], h

    def enter(self, x, t, pooled, size, above):
        """The noised pictures x (B, *shape) -> features (B T, C_1, H, W) and the embedding e (B, E)."""
        rows = len(x)
        e = self.embed_t(sinusoid(t[:rows], self.sines))                              # (B, E)
        if pooled is not None:
            e = e + pooled[:rows]
        if self.micro:
            side = min(self.shape[-2:])
            size = torch.full_like(t, side) if size is None else size.clamp(max=side)
            e = e + self.micro(sinusoid(size[:rows], self.sines))
        x = rearrange(x, "b c t h w -> (b t) c h w") if x.ndim == 5 else x            # (B T, C, H, W)
        h = self.stem(x)                                                              # (B T, C_1, H, W)
        if above is not None:           # rows without a finer resolution get zeros: as if there were none
            h = h + F.pad(above, (0, 0, 0, 0, 0, 0, 0, len(h) - len(above)))
        return h, e

    def descend(self, h, e, words):
        """Down the U -> its lowest features, and all on the way. From one size to the next h and w halve, or,
        in a temporal level, T."""
        skips = [h]
        for i, stages in enumerate(self.down):
            for stage in stages:
                h = stage(h, e, words)                                                # (B T, C_i, h, w)
                skips.append(h)
            if i < len(self.shrink):
                h = self.shrink[i](h, len(e))                                         # (B T, C_i, h/2, w/2)
                skips.append(h)
        return h, skips

    def ascend(self, h, skips, e, words):
        """Up again, each stage with the features from its own height; i counts from the lowest."""
        for i, stages in enumerate(self.up):
            for stage in stages:
                h = stage(torch.cat([h, skips.pop()], dim=1), e, words)               # (B T, C_i, h, w)
            if i < len(self.grow):
                h = self.grow[i](h, len(e), skips[-1])                                # (B T, C_i, 2h, 2w)
        return h

    def predict(self, h, like):
        out = self.head(F.silu(self.norm(h)))                                         # (B T, C, H, W)
        return rearrange(out, "(b t) c h w -> b c t h w", b=len(like)) if like.ndim == 5 else out

    @property
    def grad_checkpointing(self):
        return any(m.recompute for m in self.modules() if isinstance(m, Stage))

    @grad_checkpointing.setter
    def grad_checkpointing(self, on):
        for m in self.modules():
            if isinstance(m, Stage):
                m.recompute = on

    def shapes(self):
        return [self.shape]

    def load_inner(self, state):
        raise UserError("a network of one resolution has no inner one: --init-inner needs a larger "
                         "--image-size than the checkpoint's")

    def macs(self, length=32):
        """Multiply-adds of one forward pass for one picture, or clip, with a caption of `length` tokens,
        counted by PyTorch as it runs the network without numbers (on the meta device)."""
        def blank(*shape, dtype=torch.float32):
            return torch.zeros(*shape, dtype=dtype, device="meta")

        source = self.core.condition and self.core.condition.source
        cond = {}
        if isinstance(source, nn.Embedding):
            cond = dict(y=blank(1, dtype=torch.long))
        elif isinstance(source, Spelling):
            L, W = len(source.places), len(source.letters.weight) // 256
            cond = dict(text=blank(1, L, W, dtype=torch.long), text_mask=blank(1, L, dtype=torch.bool))
        elif source is not None:
            cond = dict(text=blank(1, length, source.in_features),
                        text_mask=blank(1, length, dtype=torch.bool))
        weights = {k: blank(*v.shape) for k, v in self.state_dict().items()}
        inputs = [blank(1, *s) for s in self.shapes()], blank(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            torch.func.functional_call(self, weights, inputs, cond)
        return counter.get_total_flops() // 2


class NestedUNet(UNet):
    """One more resolution around `inner`, a UNet or a NestedUNet. Section 3.2, Figure 3; of video Figure 10.

    Its own U ends where the inner network's side begins; there its features are added to those of the inner
    stem, and those of the inner network, before its head, to its own. Both ways lead through a convolution
    that starts at zero: at first the inner network does exactly what it did alone.
    """

    def __init__(self, inner, shape, channels, blocks, attention, **options):
        super().__init__(shape, channels, blocks, attention, middle=None, **options)
        self.inner = inner
        C, C_inner = channels[-1], inner.stem.out_channels
        self.in_adapter = zero(nn.Conv2d(C, C_inner, 3, padding=1))
        self.out_adapter = zero(nn.Conv2d(C_inner, C, 3, padding=1))

    @property
    def core(self):
        return self.inner.core

    def denoise(self, z, t, words, pooled, size, above=None):
        """z [(B, *shape_1), .., (B_R, *shape_R)] -> (predictions like z, features of the finest)."""
        h, e = self.enter(z[-1], t, pooled, size, above)                              # (B_R T, C_1, H, W)
        own = words and [w[:len(e)] for w in words]     # of the first rows: those that have this resolution
        h, skips = self.descend(h, e, own)                                            # (B_R T', C_k, h, w)
        outs, below = self.inner.denoise(z[:-1], t, words, pooled, size, self.in_adapter(h))
        h = h + self.out_adapter(below[:len(h)])        # `below` has all rows that the inner network has
        h = self.ascend(h, skips, e, own)                                             # (B_R T, C_1, H, W)
        return [*outs, self.predict(h, z[-1])], h

    def shapes(self):
        return [*self.inner.shapes(), self.shape]

    def load_inner(self, state):
        """Progressive training, Section 3.3: begin with a trained network of fewer resolutions, every weight
        of it. Raises ValueError unless all fit."""
        inner = self.inner
        while isinstance(inner, NestedUNet) and inner.state_dict().keys() != state.keys():
            inner = inner.inner
        own = inner.state_dict()
        wrong = sorted(state.keys() ^ own.keys()) or [k for k in own if own[k].shape != state[k].shape]
        if wrong:
            raise UserError(f"{len(wrong)} weights do not fit any inner network ({wrong[0]} is the first): "
                             f"use a checkpoint of the same preset, options and condition, and of a smaller "
                             f"--image-size")
        inner.load_state_dict(state)


# --- presets ----------------------------------------------------------------------------------------

_CORE = dict(channels=(256, 512, 768), blocks=(2, 2, 2), attention=(0, 1, 5))
_RELEASED = dict(**_CORE, side=64, words=2048, layers=0, micro=True, embedding=1024, heads=8)
_PAPER = dict(**_CORE, side=64, words=1024, layers=2, micro=False, embedding=1024, heads=8)
_X4 = dict(channels=(64, 128, 256), blocks=(2, 2, 1))           # an outer level, four times as large
_X16 = dict(channels=(32, 32, 64), blocks=(2, 2, 1))            # around _X4: 16 times the coarsest
_DIFFUSION = dict(schedule="cosine", predict="v", error="eps", power=1)
_TINY = dict(channels=(48, 96), blocks=(1, 1), attention=(0, 1), side=16, words=64, layers=2, micro=False,
             embedding=256, heads=4, schedule="cosine", predict="v", error="v", power=1)
CONFIGS = {
    # `outer` lists levels from the inside out; build takes one after the other while the coarsest pictures
    # stay at least 3/4 of `side` wide. (A picture larger than the preset's has no more levels: all its
    # resolutions are larger.) cc12m-.. are the released configurations' names; the released checkpoints were
    # trained on 50M pairs from Flickr.
    "cc12m-64": dict(**_RELEASED, outer=(), **_DIFFUSION),
    "cc12m-256": dict(**_RELEASED, outer=(_X4,), **_DIFFUSION),
    "cc12m-1024": dict(**_RELEASED, outer=(_X4, _X16), **{**_DIFFUSION, "power": 2}),
    "paper-256": dict(**_PAPER, outer=(_X4,), **_DIFFUSION),
    "paper-128-256": dict(**_PAPER, outer=(dict(channels=(128, 256), blocks=(2, 1)),
                                           dict(channels=(64, 128), blocks=(2, 1))), **_DIFFUSION),
    "paper-1024": dict(**_PAPER, outer=(_X4, _X16), **{**_DIFFUSION, "power": 2}),
    # 16 frames of 256 px; the temporal level's widths are ours
    "paper-video": dict(**_PAPER, temporal=dict(channels=(256,) * 5, blocks=(1,) * 5), outer=(_X4,),
                        **_DIFFUSION),
    # For two CPU cores. Few channels; the error of v, since so short a training must reach the fine
    # resolutions too.
    "tiny": dict(**_TINY, outer=(dict(channels=(24, 48), blocks=(1, 1)),
                                 dict(channels=(12, 24), blocks=(1, 1)))),
    # 1.2 million parameters at {14, 28}, to be compared with the other papers' "mini" (README). It predicts
    # x0: after 1,100 steps on MNIST 500 samples were at 3.4 times the Frechet distance of real images
    # (benchmarks/judge.py), with v at 5.5 (one run each).
    "mini": dict(**{**_TINY, "channels": (32, 64), "embedding": 128, "predict": "x0", "error": "x0"},
                 outer=(dict(channels=(16, 32), blocks=(1, 1)),)),
    # two resolutions instead of three, as Figure 8b compares, at our sizes: {16, 64}, {16, 32, 64}
    "tiny-x4": dict(**_TINY, outer=(dict(channels=(12, 24, 48), blocks=(1, 1, 1)),)),
    "tiny-video": dict(**_TINY, temporal=dict(channels=(24, 24, 32, 48, 48), blocks=(1,) * 5),
                       outer=(dict(channels=(16, 24), blocks=(1, 1)),)),
}


def build(preset, shape, num_classes=0, text=0, **options):
    """-> (model, diffusion): all that train.py and sample.py ask of a paper.

    model(z, t, y=None, text=None, text_mask=None) -> what diffusion.loss and .sample expect. shape (C, H, W)
    or (C, T, H, W), T a power of two. num_classes K: y is a class, -1: none. text: "bytes", or the width of
    a language model's embeddings; see Condition. `options` override the preset. Raises ValueError, with the
    fix.
    """
    if preset not in CONFIGS:
        raise UserError(f"unknown preset {preset!r}: mdm has {', '.join(CONFIGS)}")
    c = {"temporal": None, "middle": 1, "weights": None, "mixed": None, "T": 1000, **CONFIGS[preset]}
    for key in options:
        if key not in c:
            raise UserError(f"unknown option {key!r}: mdm {preset} has {', '.join(c)}")
    c |= options
    check(c)
    if num_classes and text:
        raise UserError("a model reads classes or text, not both: drop one")

    # Which of the outer levels? See CONFIGS.
    outer, factor = [], 1
    for spec in c["outer"]:
        k = 2 ** (len(spec["channels"]) - 1)
        if min(shape[-2:]) / (factor * k) < 0.75 * c["side"]:
            break
        outer.append(spec)
        factor *= k
    if any(n % factor for n in shape[-2:]):
        near = "x".join(str(max(1, round(n / factor)) * factor) for n in shape[-2:])
        raise UserError(f"image size {shape[-2]}x{shape[-1]} is not divisible by {factor}, the ratio of the "
                         f"finest to the coarsest resolution: try {near}")
    E, D = c["embedding"], c["words"] if num_classes or text else 0
    common = dict(embedding=E, words=D, heads=c["heads"], micro=c["micro"])
    condition = Condition(num_classes, text, D, E, c["layers"]) if D else None
    H, W = (n // factor for n in shape[-2:])
    model = UNet((shape[0], H, W), c["channels"], c["blocks"], c["attention"], condition=condition,
                 middle=c["middle"], **common)
    frames = shape[1:-2]                                        # (T,) or ()
    if frames:
        if not c["temporal"]:
            raise UserError(f"{preset} makes no videos: use --preset tiny-video or paper-video")
        k = frames[0].bit_length()
        if frames[0] != 2 ** (k - 1) or not 2 <= k <= len(c["temporal"]["channels"]):
            raise UserError(f"{frames[0]} frames: the temporal level halves them down to one, so use "
                             f"{', '.join(str(2**n) for n in range(1, len(c['temporal']['channels'])))}")
        model = NestedUNet(model, (shape[0], *frames, H, W), c["temporal"]["channels"][:k],
                           c["temporal"]["blocks"][:k], (0,) * k, temporal=True, **common)
    for spec in outer:
        k = len(spec["channels"])
        H, W = H * 2 ** (k - 1), W * 2 ** (k - 1)
        model = NestedUNet(model, (shape[0], *frames, H, W), spec["channels"], spec["blocks"],
                           spec.get("attention", (0,) * k), mlp=False, **common)
    diffusion = ExtendedDiffusion(SCHEDULES[c["schedule"]](c["T"]), model.shapes(), c["predict"], c["error"],
                                  c["power"], c["weights"], c["mixed"])
    # channels_last: the faster layout of convolutions
    return model.to(memory_format=torch.channels_last), diffusion


def check(c):
    """The options, most of which a user may have typed."""
    for key, low in dict(side=1, words=8, layers=0, embedding=8, heads=1, middle=0, T=1).items():
        if type(c[key]) is not int or c[key] < low:
            raise UserError(f"{key}={c[key]!r}: must be a whole number, at least {low}")
    for key in ("words", "embedding"):
        if c[key] % 8:
            raise UserError(f"{key}={c[key]}: must be divisible by 8, try {c[key] // 8 * 8}")
    if type(c["micro"]) is not bool:
        raise UserError(f"micro={c['micro']!r}: must be True or False")
    if c["T"] > 10**6:
        raise UserError(f"T={c['T']}: a million steps are the most")
    if type(c["power"]) not in (int, float) or not 0 <= c["power"] <= 10:
        raise UserError(f"power={c['power']!r}: must be a number from 0 to 10")
    if c["schedule"] not in list(SCHEDULES):
        raise UserError(f"unknown schedule {c['schedule']!r}: choose {' or '.join(SCHEDULES)}")
    if not isinstance(c["outer"], (list, tuple)):
        raise UserError(f"outer={c['outer']!r}: must be a list of levels, each a dict")
    core = {k: c[k] for k in ("channels", "blocks", "attention")}
    for name, u in (("coarsest", core), *(("outer", u) for u in c["outer"]), ("temporal", c["temporal"])):
        if name == "temporal" and u is None:
            continue
        allowed = {"channels", "blocks"} | ({"attention"} if name != "temporal" else set())
        if not isinstance(u, dict) or not {"channels", "blocks"} <= u.keys() <= allowed:
            raise UserError(f"{name} level {u!r}: must be a dict of {', '.join(sorted(allowed))}")
        sizes = len(u["channels"]) if isinstance(u["channels"], (list, tuple)) else 0
        if sizes < (1 if u is core else 2):
            raise UserError(f"channels={u['channels']!r} of the {name} level: must be a list, a number for "
                             f"each size, such as (8, 16)")
        for key, low in (("channels", 1), ("blocks", 1), ("attention", 0)):
            values = u.get(key, (0,) * sizes)
            if not isinstance(values, (list, tuple)) or len(values) != sizes or not all(
                    type(v) is int and v >= low for v in values):
                raise UserError(f"{key}={values!r} of the {name} level: must be {sizes} whole numbers, at "
                                 f"least {low}, one for each size")
        if name == "temporal" and any(C % 2 for C in u["channels"]):
            raise UserError(f"channels={u['channels']!r} of the temporal level: must be even")
        with_attention = [n > 0 for n in u.get("attention", (0,) * sizes)]
        with_attention[-1] |= u is core and c["middle"] > 0      # the middle
        for C, attention in zip(u["channels"], with_attention):
            if attention and C % c["heads"]:
                raise UserError(f"{C} channels are not divisible by heads={c['heads']}: change one of them")


def table():
    """Parameters and multiply-adds of the released and paper-like networks; the null token is ours."""
    def row(preset, shape, note="", **condition):
        with torch.device("meta"):
            model = build(preset, shape, **condition)[0]
        null = sum(p.numel() for k, p in model.named_parameters() if k.endswith("condition.null"))
        n = sum(p.numel() for p in model.parameters()) - null
        sizes = " ".join("x".join(map(str, s[1:] if len(s) == 4 else s[1:2])) for s in model.shapes())
        print(f"{preset:14s} {sizes:26s} {n:12,d} {model.macs() / 1e9:8.1f}G   {note}")

    print("Without the token for \"no text\" (2048 or 1024 parameters, ours). Multiply-adds of one picture,\n"
          "or clip, and a caption of 32 tokens.\n"
          "preset         resolutions                  parameters  mult.-adds   the authors' code, measured")
    t5 = dict(text=2048)
    row("cc12m-64", (3, 64, 64), "461,359,107  182G", **t5)
    row("cc12m-256", (3, 256, 256), "476,613,958  294.5G", **t5)
    row("cc12m-1024", (3, 1024, 1024), "480,970,057  509.3G", **t5)
    row("paper-256", (3, 64, 64), "435,891,203  (two text layers, no size)", **t5)
    row("paper-256", (3, 256, 256), "449,833,286", **t5)
    row("paper-128-256", (3, 256, 256), "453,483,977", **t5)
    row("paper-1024", (3, 1024, 1024), "452,876,617", **t5)
    row("paper-256", (3, 256, 256), "421.4M  (1000 classes and \"none\"; theirs: no text layers)",
        num_classes=1000)
    row("paper-video", (3, 16, 256, 256), "(none; widths of the temporal level ours)", **t5)
    print("\nfor two CPU cores, bytes as text")
    for preset, *shape in (("tiny", 3, 16, 16), ("tiny", 3, 32, 32), ("tiny", 3, 64, 64),
                           ("tiny-x4", 3, 64, 64), ("tiny-video", 3, 8, 32, 32)):
        row(preset, tuple(shape), text="bytes")


if __name__ == "__main__":
    table()
