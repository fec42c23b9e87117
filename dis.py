"""DiS: Scalable Diffusion Models with State Space Backbone, in one file.

Zhengcong Fei, Mingyuan Fan, Changqian Yu, Junshi Huang. arXiv 2402.05608 (v3, March 2024).

The idea. Everything is a token: the image patches, the diffusion step, the class. A transformer mixes L tokens by
attention, at a cost of L^2. DiS reads them with a recurrence, Mamba's selective scan, once from the left and once
from the right, at a cost linear in L. As in U-ViT, long skips join the first block to the last, the second to the
last but one, and so on. There is no attention and no MLP. A block is one norm and one mixer; in the second half
there is also the linear layer that merges the long skip.

Glossary. A, B, C, D are Mamba's matrices. Shapes use: b images, c channels of an image, and the letters below.

| code           | symbol   | shape         | meaning                                                               |
|----------------|----------|---------------|-----------------------------------------------------------------------|
| `width`        | D        |               | channels of a token; d in shapes, as D is also Mamba's direct path    |
| `patch`        | p        |               | side of a patch, in pixels                                            |
|                | J        |               | patches: J = H W / p^2                                                |
|                | L        |               | tokens: patches and, if time="token", t and y. (Blocks in the paper)  |
| `expand`       | E        |               | a mixer works on e = E d channels (E = 2)                             |
| `state`        | N        |               | numbers in the state of one channel (16)                              |
| `rank`         | R        |               | of the projection that makes delta: d / 16, rounded up                |
| `conv`         |          |               | taps of the causal convolution before the scan (4)                    |
| `x`, `z`       | x, z     | (b, L, e)     | a mixer's two halves: what is scanned, and the gate                   |
| `u`            | u_t      | (b, L, e)     | what the scan reads: x after convolution and SiLU                     |
| `delta`        | Delta_t  | (b, L, e)     | > 0, the step size: a large one favours this token (Mamba Sec. 3)     |
| `A`            | A        | (e, N)        | < 0, rates of decay, the same for every input                         |
| `B`, `C`       | B_t, C_t | (b, L, N)     | what to write into the state, what to read from it                    |
| `D`            | D        | (e,)          | the direct path from u to y                                           |
| `h`            | h_t      | (b, e, N)     | the state; it starts at 0                                             |
| `residual`     | r        | (b, L, d)     | the running sum, in float32                                           |
| `hidden`       | m        | (b, L, d)     | what a mixer has made and the next block will add                     |
| `x_t`          | x_t      | (b, c, H, W)  | the noisy image, or latent                                            |
| `t`            | t        | (b,)          | its diffusion step; as index of u, delta, B, C, h, y: a token number  |
| `cond`         |          | (b, d)        | the embedded step, plus the embedded class if there is one            |

Departures from the paper or from the authors' code. docs/dis.md has them in full, and a map from paper to code. We
could read only the paper's abstract, summaries of it, and the authors' code ("the code" below). So we cite no sections.

 1. B is discretised by Euler's method, delta B, as in the code. The papers of Mamba and DiS print zero-order hold.
 2. A long skip carries what the shallow block's mixer made, as in the code. The paper says "hidden states".
 3. With classes, the step and the class also modulate the last norm, as in the code. In the paper they are only tokens.
 4. Both directions start with delta between 0.001 and 0.1. The code's backward one starts near 0.69.
 5. The last linear layer starts at zero, as in ADM and DiT. The code's starts at random.
 6. Stochastic depth is off: the paper, as far as we read it, has none. The code trains with `drop_path=0.1`.
 7. Multiply-adds are counted with the mixers. The GFLOPs of the paper leave them out.
 8. Guidance acts on every channel (diffusion.py). The code's acts on three of four latent channels.
 9. skip="add" and time="adaln" are ablations of the paper. The code lacks them, so their details are ours.
10. `pos_init`, `label_std`, `patch=None` and `conv=None` are ours. The defaults are the code's values.
11. Two norms stand before the last layer, as in the code. The paper, as far as we read it, has one.
"""
if __spec__ and __spec__.name == "dis":     # somebody asked for Python's own `dis`, as `import torch` does
    from support.namesake import *          # noqa: F403 (Python's own takes the place of this file)
else:
    import math
    from typing import Literal

    import torch
    import torch.nn.functional as F
    from einops import rearrange
    from torch import nn

    from diffusion import Diffusion, UserError, check_labels, check_shape, fold, uniform

    try:
        from support.options import checked
        from support.scan import choose_scan, selective_scan
    except ModuleNotFoundError:             # this file without support/: slower, and options are not checked
        def selective_scan(*inputs):
            return selective_scan_ref(*inputs)

        def choose_scan(name):
            return selective_scan_ref

        def checked(paper, presets, preset, options, network):
            return {**presets[preset], **options}


# --- the selective scan (Mamba, Gu & Dao 2023, 2312.00752, Algorithm 2) -----------------------

# authors: mamba_ssm/ops/selective_scan_interface.py, selective_scan_ref
def selective_scan_ref(u, delta, A, B, C, D):
    """The definition, one token after the other. Slow.

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t          (Mamba Eq. 2a; departure 1)
        y_t = C_t h_t + D u_t                                   (Eq. 2b; D u is in the code only)

    u, delta (b, L, e); A (e, N); B, C (b, L, N); D (e,) -> y (b, L, e). delta > 0, A < 0.
    `selective_scan` is the same function, fast (support/scan.py; tests/test_dis.py::test_scan_equals_reference).
    """
    h, ys = u.new_zeros(u.shape[0], *A.shape), []                                  # (b, e, N)
    for u_t, delta_t, B_t, C_t in zip(*(x.unbind(1) for x in (u, delta, B, C))):
        decay = (delta_t[:, :, None] * A).exp()                                    # (b, e, N)
        h = decay * h + (delta_t * u_t)[:, :, None] * B_t[:, None, :]              # (b, e, N)
        ys.append((h * C_t[:, None, :]).sum(-1))                                   # (b, e)
    return torch.stack(ys, dim=1) + D * u                                          # (b, L, e)


# --- the model --------------------------------------------------------------------------------

# authors: models_dis.py, DisModel
class DiS(nn.Module):
    """(x_t, t, y) -> what the Diffusion asks for: eps, v or x0; with learn_sigma then c channels for the variance.

    Parameters stay float32; for bf16 use autocast. Raises UserError if the patch size does not divide the image, or if
    drop_path is 1 or more."""

    def __init__(self,
                 shape,                     # (c, H, W) of the image or latent
                 width: int,                # d
                 depth: int,                # depth // 2 shallow blocks, 1 in the middle, depth // 2 deep: 24 gives 25
                 patch: int | None = 2,     # p; None: the largest that leaves at least `grid` x `grid` patches
                 grid: int = 4,             # read only if patch is None
                 num_classes=0,             # 0: no classes
                 expand: int = 2,           # E
                 state: int = 16,           # N
                 conv: int | None = 4,      # taps of the causal convolution; None: they reach the patch above, or below
                 skip: Literal["concat", "add", "none"] = "concat",     # long skips; "add" and "none" are ablations
                 time: Literal["token", "adaln"] = "token",             # the step and the class are tokens, or they
                                                                        # scale and shift the blocks' norms (ablation)
                 pos_init: Literal["zero", "sincos"] = "zero",          # how the learned positions start
                 label_std: float = 0.02,   # how large the class vectors start
                 scan: Literal["auto", "mamba_ssm"] = "auto",           # "mamba_ssm": that package's, on a GPU
                 drop_path: float = 0.0,    # chance that an image skips an addition, rising from 0 over the blocks
                 learn_sigma=True):
        super().__init__()
        channels, H, W = shape
        if patch is None:
            patch = next(p for p in range(max(1, min(H, W) // grid), 0, -1) if H % p == W % p == 0)
        if H % patch or W % patch:
            fits = dict.fromkeys("x".join(str(max(1, n // patch + k) * patch) for n in (H, W)) for k in (0, 1))
            raise UserError(f"image size {H}x{W} is not divisible by the patch size {patch}: try {' or '.join(fits)}")
        if drop_path >= 1:
            raise UserError(f"drop_path {drop_path} is not a probability below 1: try 0.1")
        self.shape, self.patch, self.num_classes, self.depth = shape, patch, num_classes, depth
        self.time, self.pos_init, self.label_std, self.drop_path = time, pos_init, label_std, drop_path
        self.unit = Block               # activation checkpointing recomputes, and FSDP2 gathers, one unit at a time
        self.seeded = drop_path > 0     # then train.py passes seeds
        self.out_channels = 2 * channels if learn_sigma else channels
        J = H * W // patch**2
        L = J + (1 + (num_classes > 0)) * (time == "token")

        self.patch_embed = nn.Linear(patch**2 * channels, width)
        self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        # one row more than there are classes: it means "no class", for guidance
        self.label_embed = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.pos_embed = nn.Parameter(torch.zeros(1, L, width))
        half = depth // 2
        conv = W // patch + 1 if conv is None else conv
        mixer = dict(expand=expand, state=state, conv=conv, scan=scan)
        blocks = [Block(width, skip if i > half else "none", time == "adaln", **mixer) for i in range(2 * half + 1)]
        self.shallow, self.deep = nn.ModuleList(blocks[:half]), nn.ModuleList(blocks[half + 1:])
        self.middle = blocks[half]
        self.norm = nn.RMSNorm(width, eps=1e-5)                                                 # departure 11
        self.final_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.final_adaln = nn.Linear(width, 2 * width) if num_classes else None                 # departure 3
        self.final = nn.Linear(width, patch**2 * self.out_channels)
        self.init_weights()

    def forward(self, x_t, t, y=None, seeds=None):
        """x_t (b, c, H, W), t (b,) long, y (b,) long or None. A label of -1 means "no class". y=None
        means it for every image (the authors' code then crashes). seeds (b,) long: see `survivors`.
        -> (b, c or 2 c, H, W). Raises UserError for images of another shape, and for a label that is no class."""
        check_shape(x_t, self.shape)
        p, (_, H, W) = self.patch, self.shape
        patches = rearrange(x_t, "b c (row p1) (col p2) -> b (row col) (p1 p2 c)", p1=p, p2=p)  # (b, J, p p c)
        tokens = self.patch_embed(patches)                                                      # (b, J, d)
        step = self.time_embed(timestep_embedding(t, tokens.shape[-1]))                         # (b, d)
        extra, cond = [step], step
        y = torch.full_like(t, -1) if y is None else y
        check_labels(y, self.num_classes)
        if self.num_classes:
            label = self.label_embed(torch.where(y < 0, self.num_classes, y))                   # (b, d)
            extra, cond = [label, step], step + label
        if self.time == "token":                                # in this order: class, step, patches
            tokens = torch.cat([*(v[:, None] for v in extra), tokens], dim=1)                   # (b, L, d)
        hidden, residual = tokens + self.pos_embed, None                                        # (b, L, d)

        skips, keep = [], iter(self.survivors(t, seeds))
        for block in self.shallow:
            hidden, residual = block(hidden, residual, None, cond, next(keep))                  # 2 x (b, L, d)
            skips.append(hidden)
        hidden, residual = self.middle(hidden, residual, None, cond, next(keep))
        for block in self.deep:                                 # the last skip comes first
            hidden, residual = block(hidden, residual, skips.pop(), cond, next(keep))
        tokens = self.norm(add(residual, hidden, next(keep)))                                   # (b, L, d)

        # authors: models_dis.py, FinalLayer
        tokens = self.final_norm(tokens[:, -(H * W // p**2):])  # without step and class          (b, J, d)
        if self.final_adaln is not None:
            shift, scale = self.final_adaln(F.silu(cond))[:, None].chunk(2, dim=-1)             # 2 x (b, 1, d)
            tokens = tokens * (1 + scale) + shift
        return rearrange(self.final(tokens), "b (row col) (p1 p2 c) -> b c (row p1) (col p2)",
                         row=H // p, p1=p, p2=p)                                                # (b, c or 2 c, H, W)

    # authors: models_dis.py, drop_path
    def survivors(self, t, seeds=None):
        """Stochastic depth, in training: an image skips an addition with a chance that rises to drop_path; the others
        count more. (Block i adds what block i - 1 made. So the first skips nothing, and one addition follows the last.)
        -> for each addition (b, 1, 1), 0 or 1 / (1 - rate); or None. seeds (b,): image i depends on seeds[i] alone, so
        not on how a batch is split. None: they are drawn from PyTorch's generator."""
        additions = 2 * (self.depth // 2) + 2
        if not (self.training and self.drop_path):
            return [None] * additions
        seeds = torch.randint_like(t, 2**62) if seeds is None else seeds
        number = torch.arange(additions, device=t.device)
        rates = self.drop_path * ((number - 1) / max(self.depth - 1, 1)).clamp(0, 1)            # (additions,)
        draws = uniform(fold(seeds[:, None], number))                                           # (b, additions)
        return ((draws >= rates) / (1 - rates)).T[:, :, None, None]                             # (additions, b, 1, 1)

    # authors: models_dis.py, _init_weights (but for departures 4, 5, 9 and 10)
    def init_weights(self):
        """Linear layers keep PyTorch's weights, uniform in +-1/sqrt(fan_in). Their biases become 0, except in dt_proj,
        where `Direction.init_dt` has set them, and in patch_embed, which is a convolution in the authors' code."""
        for name, module in self.named_modules():
            if (isinstance(module, nn.Linear) and module.bias is not None
                    and "dt_proj" not in name and name != "patch_embed"):
                nn.init.zeros_(module.bias)
            if isinstance(module, BiMamba):
                with torch.no_grad():       # the sum over all blocks must not grow with their number
                    module.out_proj.weight /= math.sqrt(self.depth)
            if isinstance(module, Block) and module.adaln is not None:
                nn.init.zeros_(module.adaln.weight)             # the norms start unmodulated
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=self.label_std)
        if self.pos_init == "sincos":       # half of the channels tell the row, half the column
            rows, cols = (torch.arange(n // self.patch) for n in self.shape[1:])
            width = self.pos_embed.shape[-1]
            row = timestep_embedding(rows, width // 2)[:, None].expand(-1, len(cols), -1)       # (rows, cols, d / 2)
            col = timestep_embedding(cols, width - width // 2).expand(len(rows), -1, -1)        # (rows, cols, d / 2)
            with torch.no_grad():           # the tokens before the patches keep 0
                self.pos_embed[0, -len(rows) * len(cols):] = torch.cat([row, col], dim=-1).flatten(0, 1)    # (J, d)
        nn.init.zeros_(self.final.weight)                       # departure 5


# authors: models_dis.py, timestep_embedding
def timestep_embedding(t, width):
    """(b,) -> (b, width): cosines, then sines, of t at wavelengths from 2 pi to almost 2 pi 10^4."""
    half = width // 2
    freqs = (-math.log(10000) / max(1, half) * torch.arange(half, device=t.device)).exp()
    angles = t.float()[:, None] * freqs                                            # (b, width // 2)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, width % 2))  # (b, width)


# --- a block ----------------------------------------------------------------------------------

# authors: models_dis.py, Block
class Block(nn.Module):
    """Add, norm, mix: Mamba's order. Two streams run through the blocks. `residual` r is the running sum. `hidden` m
    is what the previous block's mixer made, and this block adds it:

        m' = W [m; m_shallow] + b        in the deep half; elsewhere m' = m       (long skip, departure 2; the paper
                                         names m_shallow first, which only reorders W)
        r  = r + m'                      in the first block r = m'
        m  = BiMamba(RMSNorm(r))
    """

    def __init__(self, width, skip="none", adaln=False, **mixer):
        super().__init__()
        self.skip = skip
        self.skip_linear = nn.Linear(2 * width, width) if skip == "concat" else None            # W, b
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.adaln = nn.Linear(width, 2 * width) if adaln else None
        self.mixer = BiMamba(width, **mixer)

    def forward(self, hidden, residual, shallow=None, cond=None, keep=None):
        """hidden (b, L, d); residual (b, L, d) float32, None before the first block; shallow (b, L, d), what the long
        skip brings; cond (b, d), used when time="adaln"; keep (b, 1, 1) or None -> the next hidden and residual."""
        if self.skip == "concat":
            hidden = self.skip_linear(torch.cat([hidden, shallow], dim=-1))        # (b, L, d)
        elif self.skip == "add":
            hidden = hidden + shallow
        residual = add(residual, hidden, keep)
        normed = self.norm(residual)
        if self.adaln is not None:                                                 # departure 9
            shift, scale = self.adaln(F.silu(cond))[:, None].chunk(2, dim=-1)      # 2 x (b, 1, d)
            normed = normed * (1 + scale) + shift
        return self.mixer(normed), residual


def add(residual, hidden, keep=None):
    """residual + keep hidden in float32: dozens of small additions would drown in bf16. keep: see `DiS.survivors`."""
    hidden = hidden.float() if keep is None else hidden.float() * keep
    return hidden if residual is None else residual + hidden


# --- the mixer: Mamba, read in both directions ------------------------------------------------

# authors: mamba_ssm/modules/mamba_simple.py in Vision Mamba's fork, Mamba with bimamba_type="v2"
class BiMamba(nn.Module):
    """(b, L, d) -> (b, L, d). Both directions share the input and output projections and the gate z. Their outputs
    are summed. Step and class tokens come first for one direction and last for the other. (The authors gate
    each direction before the sum. That is the same, since the gate is the same.)"""

    def __init__(self, width, expand=2, state=16, conv=4, scan="auto"):
        super().__init__()
        inner, rank = expand * width, math.ceil(width / 16)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.forwards = Direction(inner, state, rank, conv, scan)
        self.backwards = Direction(inner, state, rank, conv, scan)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, tokens):
        x, z = self.in_proj(tokens).chunk(2, dim=-1)                               # 2 x (b, L, e)
        y = self.forwards(x) + self.backwards(x.flip(1)).flip(1)                   # (b, L, e)
        return self.out_proj(y * F.silu(z))                                        # (b, L, d)


class Direction(nn.Module):
    """What one reading direction owns: the convolution, the projections that make delta, B and C, and A and D."""

    def __init__(self, inner, state, rank, conv, scan):
        super().__init__()
        self.rank, self.state, self.selective_scan = rank, state, choose_scan(scan)
        self.conv = nn.Conv1d(inner, inner, conv, groups=inner, padding=conv - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        # S4D-real: state n of every channel decays at rate n. A = -exp(A_log) stays negative.
        self.A_log = nn.Parameter(torch.arange(1, state + 1).float().log().repeat(inner, 1))    # (e, N)
        self.D = nn.Parameter(torch.ones(inner))                                                # (e,)
        self.init_dt()

    def init_dt(self, low=1e-3, high=0.1):
        """Sets the bias such that delta = softplus(bias) is log-uniform in [low, high] (Mamba's code). The
        slowest states then remember 1 / high to 1 / low tokens."""
        delta = torch.empty(self.D.shape).uniform_(math.log(low), math.log(high)).exp()         # (e,)
        with torch.no_grad():
            self.dt_proj.bias.copy_(delta.expm1().log())                           # the inverse of softplus

    def forward(self, x):
        """(b, L, e) -> (b, L, e), tokens in this direction's order."""
        taps, L = self.conv.kernel_size[0], x.shape[1]
        if x.is_cpu and type(x) is torch.Tensor:        # faster, tap by tap; fake ones take `conv`, to be counted
            x, weight = F.pad(x, (0, 0, taps - 1, 0)), self.conv.weight[:, 0].T    # (b, taps - 1 + L, e), (taps, e)
            u, weight = self.conv.bias, weight.contiguous()                        # (e,), (taps, e)
            for k in range(taps):
                u = torch.addcmul(u, x[:, k:k + L], weight[k])                     # (b, L, e)
        else:
            u = self.conv(rearrange(x, "b l e -> b e l"))                          # (b, e, L + taps - 1)
            u = rearrange(u[..., :L], "b e l -> b l e")                            # cut, hence causal (b, L, e)
        u = F.silu(u)
        low, B, C = self.x_proj(u).split([self.rank, self.state, self.state], dim=-1)   # (b, L, R), 2 x (b, L, N)
        # delta is float32 from here on. The output of dt_proj is near -7 for long memories. Autocast would round it
        # to multiples of 1/32, and that would change delta by up to 1.6%.
        with torch.autocast(x.device.type, enabled=False):
            delta = F.softplus(self.dt_proj(low.to(self.dt_proj.weight.dtype)))    # (b, L, e)
        return self.selective_scan(u, delta, -self.A_log.exp(), B, C, self.D)      # (b, L, e)


# --- presets ------------------------------------------------------------------------------------

# Only width and depth change. Width 368 is from the authors' code (DiT: 384): about the paper's 28.4M parameters.
SIZES = {"S": dict(width=368, depth=24), "B": dict(width=768, depth=24), "M": dict(width=768, depth=48),
         "L": dict(width=1024, depth=48), "H": dict(width=1536, depth=48)}
PAPER = dict(schedule="linear", predict="eps", variance="learned")
CONFIGS = {f"DiS-{name}/{patch}": dict(**size, patch=patch, **PAPER)
           for name, size in SIZES.items() for patch in (2, 4)}
# For minutes on two CPU cores: a 4 x 4 grid of large patches, E and N smaller, adaptive norms. It predicts x0, since
# 160 channels cannot carry the noise of 8 x 8 coloured pixels (docs/dis.md).
CONFIGS["tiny"] = dict(width=160, depth=6, patch=None, conv=None, expand=1, state=4, time="adaln", pos_init="sincos",
                       label_std=1.0, schedule="cosine", predict="x0", variance="small", min_snr=10, max_snr=1,
                       t_normal=[0.4, 1.3], cfg_below=0.9)
# For an hour of one core: a digit is a grid of 7 x 7 patches. 0.9 million parameters; the other papers have one, too.
CONFIGS["mini"] = CONFIGS["tiny"] | dict(width=128, grid=7, min_snr=5, max_snr=0.3, cfg_below=0.8)
# How train.py trains a preset, unless its flags say otherwise. Large batches are cheap for so small a network.
TRAINING = {"tiny": dict(global_batch_size=64, lr=4e-3, max_steps=3200)}


def build(preset, shape, num_classes=0, **options):
    """-> (model, diffusion), all that train.py and sample.py ask of a paper.

    shape (c, H, W). num_classes 0: the model takes no y. `options` override the preset's: skip="add", patch=8 ...
    Raises UserError, with the fix, for a preset, an option or a size that is wrong.
    """
    if len(shape) != 3:
        raise UserError("DiS makes pictures, not videos: pass --model mdm --preset tiny-video")
    options = checked("dis", CONFIGS, preset, options, DiS)
    diffusion = Diffusion.of(options)
    return DiS(shape, num_classes=num_classes, learn_sigma=diffusion.variance == "learned", **options), diffusion


if __name__ == "__main__":                  # prints the presets beside the paper's figures
    from benchmarks import tables
    tables.dis()
