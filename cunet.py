"""cU-Net: The Missing U for Efficient Diffusion Models, in one file, with the U-Net it is compared to.

Sergio Calvo-Ordonez, Chun-Wun Cheng, Jiahao Huang, Lipei Zhang, Guang Yang, Carola-Bibiane Schoenlieb,
Angelica I. Aviles-Rivero. arXiv 2310.20092, TMLR April 2024.

The idea. Keep the diffusion as it is and replace the blocks of the U-Net that denoises: instead of a
few convolutions with a residual, a *second-order neural ODE* moves the features, like particles with a
position z and a velocity v, from time 0 to 1, under an acceleration that a small network computes. The
same weights serve every evaluation (four per block in one step of rk4), so few parameters do much work.
There are two times: t, the step of the diffusion, fixed during a call of the network, and t~, from 0 to 1
inside a block.

Glossary. B is the batch, C the channels of z and of v (so 2C of the state), h x w a level's size.

| code             | symbol         | shape          | meaning, and the part of the paper                |
|------------------|----------------|----------------|---------------------------------------------------|
| `y`              | (x, x')        | (B, 2C, h, w)  | the ODE's state: z, then v                        |
| `z`, `v`         | x, x' (Eq. 4)  | (B, C, h, w)   | features and their velocity                       |
| `s`              | t~             | scalar, 0 .. 1 | the inner time                                    |
| `t`              | t              | (B,)           | the diffusion step                                |
| `Acceleration` a | f^(a) (Eq. 4)  |                | x'' = f(x, x', t, t~)                             |
| `F`              |                |                | of a first-order y' = F(y) (not torch's F)        |
| `Velocity`       | g (Eq. 4)      |                | x'(0) = g(x(0)), once, at the network's input     |
| `DynamicBlock`   |                |                | solves on [0, 1] ("dynamic blocks", Figure 2)     |
| `e`              |                | (B, 256) *     | embedding of t, plus class if there is one        |
| `scale`, `shift` |                | (B, 2C, 1, 1)  | how e steers the acceleration                     |
| `nf`             |                |                | C of the first level, doubled at each level below |

* `UNet`: (B, 4 dim). In the networks' `forward`, x is the image, y the class label and C the image's
channels. A lone h is hidden features, in the solver the step's length.

Not here: training (train.py), the diffusion (diffusion.py), denoising and its measures (denoise.py,
Section 5.2).

What the published code does instead of the paper, and what this file does. ("Code" is the authors'
release; the preset `published` has its layout, to count and to try.)
 1. Eq. 4 is of second order. The code solves y' = F(y) on one stack of channels, a first-order neural ODE:
    no z' = v, no acceleration. Here dynamics="second" is Eq. 4, "first" what the code does. Eq. 4's f also
    reads t~: here only with inner_time=True.
 2. The code's network never sees the diffusion step: its outputs for t = 0 and t = 999 are equal, bit for
    bit (what we take to be its wo/R variant does see it). Its instance norm of the raw image also hides
    brightness and contrast. Ours sees t in every block (scale and shift, zero before training), and z(0) is
    a convolution of the raw image.
 3. Norms inside the ODE: group norm in the paper and here; instance norm in the code.
 4. The code's g ends with a softplus, so that its output is never negative. That output, 2C channels, is
    the whole initial state; the image's own features are dropped. Here z(0) is the stem's output and v(0) =
    g(z(0)), C channels each; g has the paper's ReLU inside (the code: softplus) and ends with its last
    convolution, so that v(0) has either sign. In all later blocks the state starts as in the code: a 1x1
    convolution mixes z and v, softplus, and its output is split again. There v(0) is never negative here
    either; within the block the acceleration's residual can turn v.
 5. The acceleration ends with a softplus, as in the paper, and is never negative by itself: its sign
    comes from the residual, a 1x1 convolution of (z, v). (In the code the residual is the identity.)
 6. Attention, here at 1/8 of the size, has a residual and a group norm (the code replaces the features,
    after an RMS norm). A group norm precedes the head, which starts at zero (the code: a bare 1x1
    convolution).
 7. The paper argues with the adjoint method and its O(1) memory; the code backpropagates through one step
    of rk4, and its adjoint setting crashes. Here gradients="direct" (backpropagation through all steps, as
    in the code; the default), "checkpoint" (same gradients; keeps a state per step and, in backward, one
    step's activations) or "adjoint" (constant memory, approximate; allowed only for rk4 with four or more
    steps. Relative error of all gradients, of random weights: below 1e-3, with one step up to a fifth. It
    grows: 2e-2 after 64 training steps of `mini` on 12 x 12 pixels with steps=4, 9e-4 with steps=8).
 8. Images of any size above one pixel: levels have half the size, rounded up, and going up takes the size of
    the skip. (In the code 28 x 28 fails.) The paper gives no widths; nf = 16 and four levels are the code's.
 9. The paper's "GFLOPs" are multiply-adds at 3 x 64 x 64, as a profiler saw them; real FLOPs are twice
    that.
10. The class enters like the time; the paper is unconditional. The time's embedding is ours (64 cosines and
    64 sines, two linear layers). The schedule, as in Ho et al., is linear, predicting eps; the code's
    default is v, on a sigmoid schedule.
"""
import inspect
import math

import torch
import torch.nn.functional as F
import torchdiffeq
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusion import SCHEDULES, Diffusion, UserError

# Runge-Kutta methods, as Butcher tableaux: row i has the weights a_ij, the last row the weights b.
#
#     slope_i  = derivative(s + h sum_j a_ij, y + h sum_j a_ij slope_j)          over j < i
#     y(s + h) = y + h sum_j b_j slope_j
#
# "rk4" is torchdiffeq's: the 3/8 rule, not the classic tableau.
FIXED = {"euler": ([], [1]),
         "midpoint": ([], [1 / 2], [0, 1]),
         "heun3": ([], [1 / 3], [0, 2 / 3], [1 / 4, 0, 3 / 4]),
         "rk4": ([], [1 / 3], [-1 / 3, 1], [1, -1, 1], [1 / 8, 3 / 8, 3 / 8, 1 / 8])}
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun")       # as many steps as rtol and atol ask for


# --- the ODE --------------------------------------------------------------------

class Acceleration(nn.Module):
    """a(z, v, t, t~) = x'' of Eq. 4, (B, 2C, h, w) -> (B, C, h, w): norm, convolution, softplus, norm,
    scale and shift by the diffusion time, convolution, softplus, plus a residual (Figure 2).

    second=False: F of a first-order y' = F(y), -> (B, 2C, h, w). inner_time: t~ is a further channel of
    what both convolutions read; else s is not used.
    """

    def __init__(self, C, second=True, residual=True, inner_time=False):
        super().__init__()
        out = C if second else 2 * C
        self.inner_time = inner_time
        self.norm1, self.norm2 = group_norm(2 * C), group_norm(2 * C)
        self.conv1 = nn.Conv2d(2 * C + inner_time, 2 * C, 3, padding=1)
        self.conv2 = nn.Conv2d(2 * C + inner_time, out, 3, padding=1)
        self.residual = None
        if residual:
            self.residual = nn.Conv2d(2 * C, C, 1) if second else nn.Identity()

    def forward(self, s, y, scale, shift):
        h = F.softplus(self.conv1(self.with_time(s, self.norm1(y))))                  # (B, 2C, h, w)
        h = self.norm2(h) * (1 + scale) + shift
        h = F.softplus(self.conv2(self.with_time(s, h)))                              # (B, C or 2C, h, w)
        return h if self.residual is None else h + self.residual(y)

    def with_time(self, s, h):
        if not self.inner_time:
            return h
        return torch.cat([h, s * torch.ones_like(h[:, :1])], dim=1)                   # (B, 2C + 1, h, w)


def group_norm(channels):
    """8 groups; fewer where they would be unequal or have less than 4 channels: a group of one channel is an
    instance norm, which forgets every channel's mean."""
    groups = max(d for d in (1, 2, 4, 8) if d == 1 or channels % d == 0 and channels >= 4 * d)
    return nn.GroupNorm(groups, channels)


class DynamicBlock(nn.Module):
    """y(0) -> y(1), both (B, 2C, h, w), where y = (z, v) and, for second-order dynamics (Eq. 4),

        z' = v,     v' = a(z, v, t, t~)

    which is how any solver of first-order equations solves one of second order. `nfe` is the evaluations of a
    in the last forward, and in its backward, where that recomputes (checkpoint: counted ahead) or solves
    (adjoint).

    Adaptive solvers choose their steps for the whole batch, so that an image's result then depends, by about
    the tolerance, on the others in its batch.
    """

    def __init__(self, C, second=True, residual=True, inner_time=False, embedding=256,
                 solver="rk4", steps=1, rtol=1e-3, atol=1e-3, gradients="direct"):
        super().__init__()
        self.second, self.solver, self.steps, self.rtol, self.atol = second, solver, steps, rtol, atol
        self.gradients, self.nfe = gradients, 0
        self.f = Acceleration(C, second, residual, inner_time)
        self.film = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 4 * C))

    def forward(self, y, e):
        """e (B, embedding) of the diffusion time."""
        # once per block, not per evaluation: t stands still while t~ runs
        scale, shift = self.film(e).float()[:, :, None, None].chunk(2, dim=1)         # 2 x (B, 2C, 1, 1)
        return solve(self.derivative, y.float(), (scale, shift), tuple(self.f.parameters()), self)

    def derivative(self, s, y, scale, shift):
        a = self.f(s, y, scale, shift).float()
        return torch.cat([y.chunk(2, dim=1)[1], a], dim=1) if self.second else a      # (B, 2C, h, w)


def solve(derivative, y, captured, parameters, how):
    """The state at t~ = 1. derivative(s, y, *captured) -> like y, float32. `how` is the block: its solver,
    steps, rtol, atol and gradients are read, its nfe is set. `captured` (scale, shift) and `parameters` are
    listed because the adjoint finds no gradient for a tensor it is not given; checkpoint, too, is handed
    `captured` as arguments. Fixed steps are made here; the adaptive ones, and the adjoint, are torchdiffeq's.
    """
    gradients = how.gradients if torch.is_grad_enabled() else "direct"
    if how.solver not in FIXED or gradients == "adjoint":
        return solve_by_torchdiffeq(derivative, y, captured, parameters, how, gradients)
    tableau, h = FIXED[how.solver], 1 / how.steps
    # counted from the settings: a counter inside would not run in a compiled recomputation
    how.nfe = how.steps * (len(tableau) - 1) * (2 if gradients == "checkpoint" else 1)
    for i in range(how.steps):
        step = derivative, tableau, i * h, h, y, *captured
        y = (checkpoint(runge_kutta, *step, use_reentrant=False, preserve_rng_state=False)
             if gradients == "checkpoint" else runge_kutta(*step))
    return y


def runge_kutta(derivative, tableau, s, h, y, *captured):
    """One step, y(s) -> y(s + h), s and h numbers of Python's: a GPU's would have to be waited for."""
    slopes, point = [], y
    for row, next_row in zip(tableau, tableau[1:]):
        slopes.append(derivative(s + h * sum(row), point, *captured))
        point = y
        for weight, slope in zip(next_row, slopes):
            point = torch.add(point, slope, alpha=h * weight)       # point + h * weight * slope, in one go
    return point


def solve_by_torchdiffeq(derivative, y, captured, parameters, how, gradients):
    """Waits for a GPU at each step, since torchdiffeq compares times, and breaks compiled graphs."""
    how.nfe = 0
    # The adjoint's backward runs outside autocast. It enters forward's again, or it would solve the ODE in
    # another precision.
    kind = y.device.type
    amp = dict(device_type=kind, enabled=torch.is_autocast_enabled(kind),
               dtype=torch.get_autocast_dtype(kind))

    def right_hand_side(s, y):
        how.nfe += 1
        with torch.autocast(**amp):
            return derivative(s, y, *captured)

    settings = dict(method=how.solver, rtol=how.rtol, atol=how.atol)
    if how.solver in FIXED:     # without a grid torchdiffeq would take one step, whatever `steps` says
        settings["options"] = {"grid_constructor": lambda f, y, ends: torch.linspace(
            *ends.tolist(), how.steps + 1, device=y.device)}
    else:
        settings["options"] = {"dtype": torch.float32}              # its float64 time does not exist on MPS
    ends = torch.tensor([0., 1.], device=y.device)
    with torch.autocast(kind, enabled=False):                       # the state stays float32
        if gradients == "adjoint":
            # Tensors missing from adjoint_params would get no gradient, without a word: the time embedding
            # would never learn.
            return torchdiffeq.odeint_adjoint(right_hand_side, y, ends, **settings,
                                              adjoint_params=(*parameters, *captured))[-1]
        return torchdiffeq.odeint(right_hand_side, y, ends, **settings)[-1]


class Velocity(nn.Module):
    """g of Eq. 4: features (B, C, H, W) -> their initial velocity (B, C, H, W). Instance norms, as in the
    paper: v(0) hardly depends on brightness and contrast. Nothing is lost, since z keeps them."""

    def __init__(self, C):
        super().__init__()
        self.net = nn.Sequential(nn.InstanceNorm2d(C), nn.Conv2d(C, C, 3, padding=1), nn.ReLU(),
                                 nn.InstanceNorm2d(C), nn.Conv2d(C, C, 1))

    def forward(self, z):
        return self.net(z)


# --- attention and time, for both networks ------------------------------------------------------------

class Attention(nn.Module):
    """x + softmax attention among all h w positions, (B, C, h, w) -> the same. In CUNet x is the state, so
    that here C counts z and v."""

    def __init__(self, C, heads=4, head=32):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(C)
        self.qkv = nn.Conv2d(C, 3 * heads * head, 1, bias=False)
        self.out = nn.Conv2d(heads * head, C, 1)

    def forward(self, x):
        return x + self.attend(self.norm(x))

    def attend(self, x):
        q, k, v = rearrange(self.qkv(x), "b (qkv n d) h w -> qkv b n (h w) d", qkv=3, n=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)                                   # (B, n, h w, d)
        return self.out(rearrange(y, "b n (h w) d -> b (n d) h w", h=x.shape[2]))     # (B, C, h, w)

    def macs(self, positions):
        """Multiply-adds: two 1x1 convolutions, q k^T, and its product with v."""
        inner = self.out.weight.shape[1]
        return positions * (self.qkv.weight.numel() + self.out.weight.numel() + 2 * positions * inner)


def sinusoid(t, width):
    """(B,) -> (B, width): cosines, then sines, of t at wavelengths from 2 pi to nearly 2 pi 10^4."""
    half = width // 2
    freqs = (-math.log(10000) / half * torch.arange(half, device=t.device)).exp()
    angles = t.float()[:, None] * freqs                                               # (B, width // 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)                            # (B, width)


class Conditioning(nn.Module):
    """t (B,) and label y (B,) or None -> e (B, embedding); label -1 and None mean "no class"."""

    def __init__(self, sines, embedding, num_classes, label_std):
        super().__init__()
        self.sines, self.num_classes = sines, num_classes
        self.time = nn.Sequential(nn.Linear(sines, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        # one more row than classes: "no class", for guidance
        self.label = nn.Embedding(num_classes + 1, embedding) if num_classes else None
        if num_classes:
            nn.init.normal_(self.label.weight, std=label_std)

    def forward(self, t, y):
        e = self.time(sinusoid(t, self.sines))                                        # (B, embedding)
        if self.label is None:
            return e
        y = torch.full_like(t, -1) if y is None else y
        return e + self.label(torch.where(y < 0, self.num_classes, y))


# --- cU-Net -------------------------------------------------------------------------

class CUNet(nn.Module):
    """(x_t, t, y) -> prediction (eps, or what the Diffusion says), and with learn_sigma the channels of the
    variance after it."""

    LEVELS = 4                                  # and one more below, the bottleneck
    unit = DynamicBlock                         # what FSDP2 gathers at a time

    def __init__(self,
                 shape,                 # (C, H, W) of the image, any H and W above 1 x 1
                 nf=16,                 # C of z and of v at full size
                 num_classes=0,         # 0: unconditional
                 dynamics="second",     # "second": Eq. 4 | "first": y' = F(y), the published code
                 attention=True,        # Table 5: "wo/A" without
                 residual=True,         # of the acceleration; without it a >= 0. Like Table 5's "wo/R",
                                        # which also had a 1x1 second convolution (see PublishedBlock)
                 inner_time=False,      # show t~ to the acceleration
                 solver="rk4",          # euler, midpoint, heun3, rk4; dopri5, dopri8, bosh3, adaptive_heun
                 steps=1,               # of the first four, which take fixed ones
                 rtol=1e-3, atol=1e-3,  # of the others
                 gradients="direct",    # "direct" | "checkpoint" | "adjoint"
                 label_std=0.02,        # of the class vectors, before training
                 learn_sigma=False):
        super().__init__()
        self.shape, self.num_classes = shape, num_classes
        check_solver(solver, steps, rtol, atol, gradients)
        if dynamics not in ("second", "first"):
            raise UserError(f"unknown dynamics {dynamics!r}: choose second or first")
        self.options = dict(second=dynamics == "second", residual=residual, inner_time=inner_time,
                            solver=solver, steps=steps, rtol=rtol, atol=atol, gradients=gradients)
        self.attention = attention
        self.condition = Conditioning(128, 256, num_classes, label_std)
        self.stem = nn.Conv2d(shape[0], nf, 3, padding=1)
        self.velocity = Velocity(nf)
        widths = [2 * nf * 2**i for i in range(self.LEVELS + 1)]       # channels of the state: 32 .. 512
        self.build_levels(widths, Attention)
        self.norm = group_norm(widths[0])
        self.head = nn.Conv2d(widths[0], shape[0] * (2 if learn_sigma else 1), 1)
        for block in self.blocks():
            nn.init.zeros_(block.film[-1].weight)           # before training, t changes nothing
            nn.init.zeros_(block.film[-1].bias)
        nn.init.zeros_(self.head.weight)                    # and the output is zero
        nn.init.zeros_(self.head.bias)

    def block(self, width):
        return DynamicBlock(width // 2, **self.options)

    def build_levels(self, widths, attention):
        """An ODE's state keeps its shape, so channels change only between blocks, in 1x1 convolutions
        (`widths` are the state's, 2C)."""
        pairs = list(zip(widths[:-1], widths[1:]))
        self.downs = nn.ModuleList(self.block(w) for w in widths[:-1])
        self.to_wide = nn.ModuleList(nn.Conv2d(w, wide, 1) for w, wide in pairs)
        self.bottleneck = self.block(widths[-1])
        self.to_narrow = nn.ModuleList(nn.Conv2d(wide + w, w, 1) for w, wide in reversed(pairs))
        self.ups = nn.ModuleList(self.block(w) for w in reversed(widths[:-1]))
        self.attend_down, self.attend_up = (attention(widths[-2]) if self.attention else nn.Identity()
                                            for _ in range(2))

    def blocks(self):
        return [*self.downs, self.bottleneck, *self.ups]

    def forward(self, x, t, y=None):
        """x (B, C, H, W), t (B,) long, y (B,) long or None; label -1 means "no class".
        -> (B, C or 2C, H, W)."""
        e = self.condition(t, y)                                                      # (B, 256)
        z = self.stem(x)                                                              # (B, nf, H, W)
        state = self.u_shape(torch.cat([z, self.velocity(z)], dim=1), e)              # (B, 2nf, H, W)
        return self.head(self.norm(state))

    def u_shape(self, state, e):
        """state (B, 2nf, H, W) -> the same; below, C and h x w are the level's."""
        skips = []
        for i, (block, to_wide) in enumerate(zip(self.downs, self.to_wide)):
            state = block(state, e)                                                   # (B, 2C, h, w)
            if i == self.LEVELS - 1:
                state = self.attend_down(state)
            skips.append(state)
            state = F.softplus(to_wide(state))                                        # (B, 4C, h, w)
            state = resize(state, [(n + 1) // 2 for n in state.shape[2:]])            # (B, 4C, h/2, w/2)
        state = self.bottleneck(state, e)                                             # (B, 32nf, h, w)
        for i, (block, to_narrow) in enumerate(zip(self.ups, self.to_narrow)):
            skip = skips.pop()                                                        # (B, 2C, h, w)
            state = torch.cat([resize(state, skip.shape[2:]), skip], dim=1)           # (B, 4C + 2C, h, w)
            state = block(F.softplus(to_narrow(state)), e)                            # (B, 2C, h, w)
            if i == 0:
                state = self.attend_up(state)
        return state

    @property
    def nfe(self):
        """Evaluations of accelerations since the last forward began, a block's mean."""
        return sum(b.nfe for b in self.blocks()) / len(self.blocks())

    @property
    def grad_checkpointing(self):
        return self.bottleneck.gradients == "checkpoint"

    @grad_checkpointing.setter
    def grad_checkpointing(self, on):
        """Raises ValueError where it would not be what was asked for: adjoint, or an adaptive solver."""
        if on and self.options["gradients"] == "adjoint":
            raise UserError("adjoint gradients keep less than checkpoints: drop --grad-checkpointing, or "
                             "gradients=adjoint")
        if on:
            check_solver(*(self.options[k] for k in ("solver", "steps", "rtol", "atol")), "checkpoint")
        for block in self.blocks():
            block.gradients = "checkpoint" if on else self.options["gradients"]

    def macs(self):
        """Multiply-adds of one forward pass for one image; of an adaptive solver, with as many evaluations
        as in the last pass, and one before any pass."""
        sizes = level_sizes(self.shape, self.LEVELS + 1)
        blocks = self.blocks()
        total = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        for block, size in zip(blocks, sizes + sizes[-2::-1]):
            evaluations = (block.steps * (len(FIXED[block.solver]) - 1) if block.solver in FIXED
                           else max(1, block.nfe))
            total += evaluations * size * conv_weights(block)
        for down, up, size in zip(self.to_wide, reversed(self.to_narrow), sizes):
            total += size * (down.weight.numel() + up.weight.numel())
        if self.attention:
            total += 2 * self.attend_down.macs(sizes[-2])
        at_full_size = conv_weights(self.stem) + conv_weights(self.velocity) + self.head.weight.numel()
        return total + sizes[0] * at_full_size


def resize(y, size):
    return F.interpolate(y, size=list(size), mode="bilinear", align_corners=False)


def level_sizes(shape, levels):
    """Pixels at each level; half the side, rounded up, from one to the next."""
    (_, H, W), sizes = shape, []
    for _ in range(levels):
        sizes.append(H * W)
        H, W = (H + 1) // 2, (W + 1) // 2
    return sizes


def conv_weights(module):
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d))


def check_solver(solver, steps, rtol, atol, gradients):
    """Raises ValueError, with the fix, for settings that do not exist or would give wrong gradients."""
    if solver not in FIXED and solver not in ADAPTIVE:
        raise UserError(f"unknown solver {solver!r}: choose {', '.join([*FIXED, *ADAPTIVE])}")
    if gradients not in ("direct", "checkpoint", "adjoint"):
        raise UserError(f"unknown gradients {gradients!r}: choose direct, checkpoint or adjoint")
    if rtol <= 0 or atol <= 0:
        raise UserError(f"rtol={rtol} and atol={atol} must be above 0: try 1e-3")
    if solver in ADAPTIVE and steps != 1:
        raise UserError(f"{solver} chooses its own steps: drop steps={steps}, or use solver=rk4")
    if solver in ADAPTIVE and gradients == "checkpoint":
        raise UserError(f"checkpoint recomputes step by step, and {solver} chooses its own steps: use "
                         f"gradients=direct, or solver=rk4")
    if solver in FIXED and (rtol, atol) != (1e-3, 1e-3):
        raise UserError(f"{solver} takes fixed steps and has no tolerance: drop rtol and atol, or use "
                         f"solver=dopri5")
    if gradients == "adjoint" and (solver != "rk4" or steps < 4):
        raise UserError(f"adjoint gradients solve the ODE again, backwards, which does not come back the "
                         f"way forward went: with one step of rk4 they were off by up to 40%, with "
                         f"adaptive solvers by an amount that depends on the tolerance. Not {solver} "
                         f"steps={steps}: use solver=rk4 steps=4 or more, or gradients=checkpoint, which is "
                         f"exact")


# --- the published code's layout, to count and to try -----------------------------------------------------

class PublishedBlock(nn.Module):
    """y' = F(y) on one stack of channels, with instance norms and no diffusion time. Without the residual
    (what we take "wo/R" to be, from its parameter count) the second convolution is 1x1 and the time is added
    before the block: only this variant sees it."""

    def __init__(self, width, residual=True, **how):
        super().__init__()
        self.residual, self.nfe = residual, 0
        self.solver, self.steps, self.gradients = how["solver"], how["steps"], how["gradients"]
        self.rtol, self.atol = how["rtol"], how["atol"]
        self.norm = nn.InstanceNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3 if residual else 1, padding=1 if residual else 0)
        self.time = None if residual else nn.Sequential(
            nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, y, e):
        if self.time is not None:
            y = y + self.time(e)[:, :, None, None]                                    # (B, 2C, h, w)
        parameters = (*self.conv1.parameters(), *self.conv2.parameters())
        return solve(self.derivative, y.float(), (), parameters, self)

    def derivative(self, s, y):
        h = F.softplus(self.conv1(self.norm(y)))
        h = F.softplus(self.conv2(self.norm(h))).float()
        return h + y if self.residual else h


class PublishedAttention(Attention):
    """Replaces its input; its norm divides by the root mean square of the channels."""

    def __init__(self, C):
        super().__init__(C)
        self.norm = nn.Identity()
        self.gain = nn.Parameter(torch.ones(C))

    def forward(self, x):
        x = F.normalize(x, dim=1) * math.sqrt(x.shape[1])
        return self.attend(x * self.gain[:, None, None])


class Published(CUNet):
    """Differences 1 to 6 undone, and the class and the time's embedding of 10. Kept are 7 (direct gradients
    by default, as the code), 8 (sizes), and our linear schedule and eps (the code: sigmoid and v; predict=v
    can be set, sigmoid cannot)."""

    unit = PublishedBlock

    def __init__(self, shape, nf=16, num_classes=0, attention=True, residual=True, solver="rk4", steps=1,
                 rtol=1e-3, atol=1e-3, gradients="direct", learn_sigma=False):
        nn.Module.__init__(self)
        if num_classes:
            raise UserError("the published layout takes no class: pass --num-classes 0")
        if level_sizes(shape, self.LEVELS + 1)[-1] == 1:
            raise UserError("the published layout norms each channel at 1/16 of the image's size, where "
                             "more than one pixel must be left: use images larger than 16 px")
        self.shape, self.num_classes = shape, 0
        check_solver(solver, steps, rtol, atol, gradients)
        self.options = dict(solver=solver, steps=steps, rtol=rtol, atol=atol, gradients=gradients)
        self.attention, self.residual = attention, residual
        # not `sinusoid`: the code doubles the exponent, so that wavelengths reach nearly 2 pi 10^8
        angles = torch.arange(1000)[:, None] * 10_000 ** (-torch.arange(128) / 64)    # (1000, 128)
        table = rearrange([angles.sin(), angles.cos()], "two t j -> t (j two)")       # (1000, 256)
        self.table = nn.Parameter(table, requires_grad=False)
        self.stem = nn.Sequential(
            nn.InstanceNorm2d(shape[0]), nn.Conv2d(shape[0], nf, 3, padding=1), nn.Softplus(),
            nn.InstanceNorm2d(nf), nn.Conv2d(nf, 2 * nf, 1), nn.Softplus())
        self.velocity = nn.Identity()
        widths = [2 * nf * 2**i for i in range(self.LEVELS + 1)]
        self.build_levels(widths, PublishedAttention)
        self.head = nn.Conv2d(widths[0], shape[0] * (2 if learn_sigma else 1), 1)

    def block(self, width):
        return PublishedBlock(width, self.residual, **self.options)

    def forward(self, x, t, y=None):
        return self.head(self.u_shape(self.stem(x), self.table[t]))


# --- the U-Net of the comparison ----------------------------------------------------------------------------

class ChannelNorm(nn.Module):
    """Layer norm over the channels of each position, with a gain and no bias."""

    def __init__(self, C):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(C))

    def forward(self, x):
        var, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        return (x - mean) * (var + 1e-5).rsqrt() * self.gain[:, None, None]


class LinearAttention(Attention):
    """Attention at a cost linear in the positions, which are the last axis: softmax of q over channels, of k
    over positions, then v k^T first, only d x d."""

    def __init__(self, C):
        super().__init__(C)
        self.norm, self.out_norm = ChannelNorm(C), ChannelNorm(C)

    def attend(self, x):
        q, k, v = rearrange(self.qkv(x), "b (qkv n d) h w -> qkv b n d (h w)", qkv=3, n=self.heads)
        q, k = q.softmax(dim=-2) / math.sqrt(q.shape[-2]), k.softmax(dim=-1)
        y = (v @ k.mT) @ q                                    # (B, n, d, d) @ (B, n, d, h w)
        return self.out_norm(self.out(rearrange(y, "b n d (h w) -> b (n d) h w", h=x.shape[2])))

    def macs(self, positions):
        inner = self.out.weight.shape[1]
        products = 2 * inner * inner // self.heads
        return positions * (self.qkv.weight.numel() + self.out.weight.numel() + products)


class FullAttention(Attention):
    def __init__(self, C):
        super().__init__(C)
        self.norm = ChannelNorm(C)


class ResBlock(nn.Module):
    """x (B, C_in, h, w), e (B, E) -> (B, C_out, h, w): convolution, norm, scale and shift by e, SiLU;
    convolution, norm, SiLU; plus a residual."""

    def __init__(self, C_in, C_out, E):
        super().__init__()
        self.film = nn.Sequential(nn.SiLU(), nn.Linear(E, 2 * C_out))
        self.conv1, self.norm1 = nn.Conv2d(C_in, C_out, 3, padding=1), group_norm(C_out)
        self.conv2, self.norm2 = nn.Conv2d(C_out, C_out, 3, padding=1), group_norm(C_out)
        self.residual = nn.Conv2d(C_in, C_out, 1) if C_in != C_out else nn.Identity()

    def forward(self, x, e):
        scale, shift = self.film(e)[:, :, None, None].chunk(2, dim=1)                 # 2 x (B, C_out, 1, 1)
        h = F.silu(self.norm1(self.conv1(x)) * (1 + scale) + shift)
        return F.silu(self.norm2(self.conv2(h))) + self.residual(x)


class UNet(nn.Module):
    """What the paper calls the "same U-Net as Ho et al." and the authors ran is lucidrains'
    denoising-diffusion-pytorch 1.8.3, dim 64. Layout and parameter count are exactly its; attention's norms
    (before, and after the linear one), the time's sinusoid and activation, and the zeroed head are ours. At
    each of four levels two residual blocks and linear attention, at the lowest and in the middle full
    attention."""

    unit = ResBlock

    def __init__(self, shape, dim=64, num_classes=0, label_std=0.02, learn_sigma=False):
        super().__init__()
        self.shape, self.num_classes = shape, num_classes
        if dim % 2:
            raise UserError(f"dim {dim} is odd: try {dim + 1}")
        E = 4 * dim
        self.condition = Conditioning(dim, E, num_classes, label_std)
        self.stem = nn.Conv2d(shape[0], dim, 7, padding=3)
        widths = [dim, dim, 2 * dim, 4 * dim, 8 * dim]
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for i, (narrow, wide) in enumerate(zip(widths[:-1], widths[1:])):
            lowest = i == 3
            attention = FullAttention if lowest else LinearAttention
            self.downs.append(nn.ModuleList([
                ResBlock(narrow, narrow, E), ResBlock(narrow, narrow, E), attention(narrow),
                nn.Conv2d(narrow, wide, 3, padding=1) if lowest else nn.Conv2d(4 * narrow, wide, 1)]))
            self.ups.insert(0, nn.ModuleList([
                ResBlock(wide + narrow, wide, E), ResBlock(wide + narrow, wide, E), attention(wide),
                nn.Conv2d(wide, narrow, 3, padding=1)]))
        self.middle = nn.ModuleList([ResBlock(widths[-1], widths[-1], E), FullAttention(widths[-1]),
                                     ResBlock(widths[-1], widths[-1], E)])
        self.last = ResBlock(2 * dim, dim, E)
        self.head = nn.Conv2d(dim, shape[0] * (2 if learn_sigma else 1), 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x, t, y=None):
        """As CUNet.forward."""
        e = self.condition(t, y)                                                      # (B, 4 dim)
        x = first = self.stem(x)                                                      # (B, dim, H, W)
        skips = []
        for i, (block1, block2, attention, to_wide) in enumerate(self.downs):
            x = block1(x, e)
            skips.append(x)
            x = attention(block2(x, e))
            skips.append(x)
            # the lowest level stays h x w
            x = to_wide(x if i == 3 else pixels_to_channels(x))                       # (B, wide, h/2, w/2)
        block1, attention, block2 = self.middle
        x = block2(attention(block1(x, e)), e)
        for i, (block1, block2, attention, to_narrow) in enumerate(self.ups):
            x = block1(torch.cat([x, skips.pop()], dim=1), e)                         # (B, wide, h, w)
            x = attention(block2(torch.cat([x, skips.pop()], dim=1), e))
            if i < 3:
                x = F.interpolate(x, size=skips[-1].shape[2:], mode="nearest")        # (B, wide, 2h, 2w)
            x = to_narrow(x)                                                          # (B, narrow, 2h, 2w)
        return self.head(self.last(torch.cat([x, first], dim=1), e))

    def macs(self):
        """Multiply-adds of one forward pass for one image."""
        sizes = level_sizes(self.shape, 4)
        total = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        total += sizes[0] * (conv_weights(self.stem) + conv_weights(self.last) + self.head.weight.numel())
        total += sizes[3] * (conv_weights(self.middle[0]) + conv_weights(self.middle[2]))
        total += self.middle[1].macs(sizes[3])
        for i, (down, up) in enumerate(zip(self.downs, reversed(self.ups))):
            n, below, above = sizes[i], sizes[min(i + 1, 3)], sizes[max(i - 1, 0)]
            total += n * sum(conv_weights(block) for block in (*down[:2], *up[:2]))
            total += down[2].macs(n) + up[2].macs(n)
            total += below * down[3].weight.numel() + above * up[3].weight.numel()
        return total


def pixels_to_channels(x):
    """(B, C, h, w) -> (B, 4C, h/2, w/2): each 2 x 2 pixels become channels; an odd edge is repeated."""
    x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), mode="replicate")
    return rearrange(x, "b c (h p1) (w p2) -> b (c p1 p2) h w", p1=2, p2=2)


# --- presets ------------------------------------------------------------------------------

_DDPM = dict(schedule="linear", predict="eps", variance="small")        # as in Ho et al.
_TINY = dict(label_std=1.0, schedule="linear", predict="x0", variance="small")
CONFIGS = {
    "cunet": dict(network=CUNet, nf=16, **_DDPM),
    "published": dict(network=Published, nf=16, **_DDPM),
    "unet": dict(network=UNet, dim=64, **_DDPM),
    # Half the channels of "cunet" and "unet", for two CPU cores. They predict x0, on the linear schedule:
    # after 2,000 steps on MNIST (nf = 6, one run each) 500 samples were at 5.9 times the Frechet distance of
    # real images (benchmarks/judge.py), v on the cosine schedule at 15. Class vectors start with standard
    # deviation 1, not 0.02, or the class would be learned late.
    "tiny": dict(network=CUNet, nf=8, **_TINY),
    "unet-tiny": dict(network=UNet, dim=32, **_TINY),
    # 1.4 and 2.4 million parameters, to be compared with the other papers' "mini" (README)
    "mini": dict(network=CUNet, nf=6, **_TINY),
    "unet-mini": dict(network=UNet, dim=16, **_TINY),
}


def build(preset, shape, num_classes=0, **options):
    """-> (model, diffusion): all that train.py and sample.py ask of a paper.

    model(x_t (B, C, H, W), t (B,), y (B,) or None) -> what diffusion.loss and .sample expect; if it has
    macs(), that is printed, and if it has nfe, that is logged. shape (C, H, W); num_classes 0: no y.
    `options` override the preset: steps=4, dynamics="first" ... Raises ValueError, with the fix, for a
    preset, option or size that is wrong.
    """
    if len(shape) != 3:
        raise UserError("cU-Net makes pictures, not videos: pass --model mdm --preset tiny-video")
    if preset not in CONFIGS:
        raise UserError(f"unknown preset {preset!r}: cunet has {', '.join(CONFIGS)}")
    config = dict(CONFIGS[preset])
    network = config.pop("network")
    config |= options
    of_diffusion = {k: config.pop(k) for k in ("schedule", "predict", "variance", "T", "min_snr")
                    if k in config}
    own = [k for k in inspect.signature(network).parameters
           if k not in ("shape", "num_classes", "learn_sigma")]
    for key in config:
        if key not in own:
            raise UserError(f"unknown option {key!r}: cunet {preset} has {', '.join(own)}, schedule, "
                             f"predict, variance, T, min_snr")
    for key, value in {**config, **of_diffusion}.items():
        if key in ("nf", "dim", "steps", "T"):
            if type(value) is not int or value < 1:
                raise UserError(f"{key}={value!r}: must be a whole number, at least 1")
        elif key in ("rtol", "atol", "label_std") or key == "min_snr" and value is not None:
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise UserError(f"{key}={value!r}: must be a number, at least 0")
        elif key in ("attention", "residual", "inner_time") and type(value) is not bool:
            raise UserError(f"{key}={value!r}: must be True or False")
    schedule = of_diffusion.pop("schedule")
    if schedule not in SCHEDULES:
        raise UserError(f"unknown schedule {schedule!r}: choose {' or '.join(SCHEDULES)}")
    T = of_diffusion.pop("T", 1000)
    if network is Published and T > 1000:
        raise UserError(f"T={T}, but the published layout has a table of 1000 times: use T=1000 or fewer")
    diffusion = Diffusion(SCHEDULES[schedule](T), **of_diffusion)
    return network(shape, num_classes=num_classes, learn_sigma=diffusion.variance == "learned",
                   **config), diffusion


def table():
    """Figure 6 and Table 5 of the paper beside our counts."""
    def row(name, paper, preset, **options):
        model = build(preset, (3, 64, 64), **options)[0]
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        n = sum(p.numel() for p in model.parameters())
        megabytes = (16 * (n - frozen) + 8 * frozen) / 2**20       # weights, average, and Adam's two
        print(f"{name:34s} {n:10,d} {model.macs() / 1e9:9.3f}G {megabytes:9.1f}   {paper}")

    print("3 x 64 x 64, unconditional, one step of rk4 where there is an ODE. MB is a checkpoint: weights,\n"
          "their average, and Adam's two moments, in float32. The paper's GFLOPs are multiply-adds, too\n"
          "(a multiply-add is two FLOPs). Its profiler left out attention's matrix products and counted\n"
          "instance norms; our column is the reverse\n"
          "                                   parameters  mult.-adds       MB   the paper")
    row("unet", "35.7M, 7.21, 545.5", "unet")
    row("published", "8.8M, 2.90 *, 137.9 *", "published")
    row("published attention=False", "wo/A: 2.81, 128.7", "published", attention=False)
    row("published residual=False", "wo/R: 1.71 *, 92.0", "published", residual=False)
    row("  and attention=False", "wo/A/R: 1.62, 88.4", "published", attention=False, residual=False)
    row("cunet (true second order, sees t)", "", "cunet")
    row("cunet attention=False", "", "cunet", attention=False)
    row("cunet residual=False", "", "cunet", residual=False)
    row("cunet dynamics=first", "", "cunet", dynamics="first")
    print("* fits five attentions; Figure 6's 8.8M, as here, has two (wo/R: 1.71 is nearer five, 92.0 MB\n"
          "  fits two). Both rows without residual are inferred from their parameters and, with as many\n"
          "  attentions, come out 1% below the paper. Their second convolution is 1x1: most of what\n"
          "  they save")
    print("\nEvaluations of the acceleration per block and forward pass, tiny, random weights, 1 x 28 x 28")
    for solver in (*FIXED, *ADAPTIVE):
        torch.manual_seed(0)
        model = build("tiny", (1, 28, 28), solver=solver)[0]
        with torch.no_grad():
            model(torch.randn(1, 1, 28, 28), torch.tensor([500]))
        print(f"  {solver:14s} {model.nfe:5.1f}{'' if solver in FIXED else '   at rtol = atol = 1e-3'}")


if __name__ == "__main__":
    table()
