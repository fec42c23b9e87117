"""cU-Net: The Missing U for Efficient Diffusion Models, in one file.

Sergio Calvo-Ordonez, Chun-Wun Cheng, Jiahao Huang, Lipei Zhang, Guang Yang, Carola-Bibiane Schoenlieb,
Angelica I. Aviles-Rivero. arXiv 2310.20092, TMLR April 2024.
"The code" below is the authors' release: github.com/Sergio20f/cDDPM, cUNet.py.

The idea. Keep the diffusion as it is. In the U-Net that denoises, replace the convolution blocks by second-order
neural ODEs: features move like particles. They have a position z and a velocity v, and a small network computes
their acceleration. A solver moves them from inner time 0 to 1. One step of rk4 calls the network four times with
the same weights, so few parameters do much work. The diffusion step t stands still while the inner time t~ runs.

Glossary. B images; C channels of z, and C of v. A level of the U-Net has h x w pixels, the image has H x W.

| code             | symbol         | shape            | meaning, and the part of the paper               |
|------------------|----------------|------------------|--------------------------------------------------|
| `z`, `v`         | x, x' (Eq. 4)  | (B, C, h, w)     | features and their velocity                      |
| `state`          | (x, x')        | (B, 2C, h, w)    | z, then v                                        |
| `s`, `dt`        | t~             | number, 0 .. 1   | the inner time, and the solver's step in it      |
| `t`              | t              | (B,)             | the diffusion step                               |
| `Acceleration` a | f^(a) (Eq. 4)  |                  | x'' = f(x, x', t, t~), Figure 2; weights theta_f |
| `Velocity` g     | g (Eq. 4)      |                  | x'(0) = g(x(0)), after the stem; weights theta_g |
| `DynamicBlock`   |                |                  | solves on [0, 1] ("dynamic blocks", Figure 2)    |
| `e`              |                | (B, 256)         | embedding of t, plus that of the class           |
| `scale`, `shift` |                | (B, 2C, 1, 1)    | how e steers the acceleration                    |
| `nf`             |                |                  | C at full size; doubled at each level below      |

Where paper, code and this file differ. The long form, with reasons, is in docs/cunet.md.
 1. The paper writes two ODEs: Eq. 4 is of second order, but Section 4.1 and Figure 2 also have dz/dt = f(t, z),
    with (v, z) as input. The code solves one of first order, state' = f(state), without z' = v. Here
    dynamics="second" is Eq. 4, and "first" of first order. Eq. 4's f reads t~; here only with inner_time=True.
 2. The code's network never sees the diffusion step, nor the image's brightness and contrast. Here every block sees t.
 3. Norms inside the ODE are group norms in the paper and here, instance norms in the code.
 4. Here z(0) is a convolution of the image, and v(0) = g(z(0)) can have either sign. The code's g ends with a
    softplus, so it is never negative. The code starts from this g alone and drops z(0).
 5. The convolutions of f end with a softplus, so they are never negative. The residual of Figure 2 is added: here a 1x1
    convolution of (z, v), which can have either sign. The code's residual is the identity.
 6. Here attention and the head have a norm, and attention a residual. In the code attention replaces the features.
 7. The paper builds on the adjoint method. The code and, by default, this file backpropagate through one step of rk4.
 8. Images have any size above 1 x 1 (28 x 28 fails in the code). The paper gives no widths; nf = 16 is the code's.
 9. The paper's "GFLOPs" are multiply-adds at 3 x 64 x 64. FLOPs are twice as many.
10. Classes are ours (the paper has none). The embedding of t, the linear schedule and the prediction of eps are those
    of Ho et al.; the code has a fixed table for t, a sigmoid schedule, and predicts v.
11. Eq. 2 prints sqrt(beta_t) where DDPM has beta_t. That is a misprint; diffusion.py follows DDPM.
12. Section 4.3 (the reverse SDE, and the adjoint of its probability-flow ODE) is an argument. It needs no code.
"""
import functools
import math
from typing import Literal

import torch
import torch.nn.functional as F
import torchdiffeq
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusion import Diffusion, UserError, check_labels

try:
    from support.options import checked
    from support.published import Published     # the layout of the published code
    from support.unet import UNet               # the U-Net of the paper's comparison
except ImportError:                             # only this file and diffusion.py are there
    checked = Published = UNet = None

FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")          # `steps` equal steps
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun")       # as many steps as rtol and atol ask for


# --- Eq. 4 ---------------------------------------------------------------------------------------

class DynamicBlock(nn.Module):
    """state(0) -> state(1), both (B, 2C, h, w). Eq. 4, x'' = a(x, x', t, t~), as two equations of first order:

        z' = v,     v' = a(z, v, t, t~)

    Any solver of first-order equations solves them: here torchdiffeq, as in the code. `nfe` counts evaluations of a in
    the last forward, and in its backward if that recomputes (gradients="checkpoint") or solves the ODE ("adjoint").

    Adaptive solvers choose their steps for the whole batch. So an image's result depends on the other images of the
    batch, by about the tolerance.
    """

    def __init__(self, channels, second=True, residual=True, inner_time=False, embedding=256,
                 solver="rk4", steps=1, rtol=1e-3, atol=1e-3, gradients="direct"):
        super().__init__()
        self.second, self.solver, self.steps, self.rtol, self.atol = second, solver, steps, rtol, atol
        self.gradients, self.nfe = gradients, 0
        self.f = Acceleration(channels, second, residual, inner_time)
        self.film = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 4 * channels))
        nn.init.zeros_(self.film[-1].weight)    # before training t changes nothing
        nn.init.zeros_(self.film[-1].bias)

    def forward(self, state, e):
        """state (B, 2C, h, w), e (B, 256) -> (B, 2C, h, w), float32 also under autocast."""
        # once per block, not per evaluation: t stands still while t~ runs
        scale, shift = self.film(e).float()[:, :, None, None].chunk(2, dim=1)       # 2 x (B, 2C, 1, 1)
        return self.solve(state.float(), scale, shift)

    def derivative(self, s, state, scale, shift):
        """d state / d t~, (B, 2C, h, w)."""
        _, v = state.chunk(2, dim=1)                                                # each (B, C, h, w)
        a = self.f(s, state, scale, shift).float()
        if not self.second:                     # the code: the network gives the derivative of all channels
            return a
        return torch.cat([v, a], dim=1)         # z' = v, v' = a. With z' = v the ODE is of second order

    def odeint(self, start, end, state, *condition, steps=1, solver=torchdiffeq.odeint):
        """The definition. On a GPU the times lie there, too, and torchdiffeq looks at them: it waits 9 times or more.
        Raises UserError if an adaptive solver gives up."""
        def slope(s, state):
            self.nfe += 1
            return self.derivative(s, state, *condition)

        def grid(slope, state, ends):           # equal steps. In the adjoint's backward ends is (1, 0)
            return ends[0] + (ends[1] - ends[0]) * torch.arange(steps + 1, device=ends.device) / steps

        times = torch.tensor([start, end], dtype=state.dtype, device=state.device)
        options = {"grid_constructor": grid} if self.solver in FIXED else {"dtype": torch.float32}  # no float64 on MPS
        try:
            return solver(slope, state, times, method=self.solver, rtol=self.rtol, atol=self.atol, options=options)[-1]
        except AssertionError:                  # "underflow in dt", or a state that is not finite
            raise UserError(f"{self.solver} found no step small enough: train with solver=rk4, larger rtol and atol, "
                            f"or a smaller --lr; or draw from an earlier checkpoint") from None

    def rk4_step(self, start, end, state, *condition):
        """The same for one step of "rk4", which is Kutta's 3/8 rule. Here times are numbers of Python, so nothing waits
        for a GPU. test_own_step_is_torchdiffeqs compares the two."""
        def slope(s, state):
            return self.derivative(s, state, *condition)

        dt = end - start
        k1 = slope(start, state)                                                    # each (B, 2C, h, w)
        k2 = slope(start + dt / 3, state + dt / 3 * k1)
        k3 = slope(start + dt * 2 / 3, state + dt * (k2 - k1 / 3))
        k4 = slope(end, state + dt * (k1 - k2 + k3))
        return state + dt / 8 * (k1 + 3 * (k2 + k3) + k4)

    def solve(self, state, *condition):
        """state(0) -> state(1) by `odeint`. For rk4, `rk4_step` takes over on GPUs, when compiled, and to recompute."""
        gradients = self.gradients if torch.is_grad_enabled() else "direct"
        recomputes, compiling = gradients == "checkpoint", torch.compiler.is_compiling()
        own = self.solver == "rk4" and gradients != "adjoint" and (recomputes or compiling or not state.is_cpu)
        # `odeint` counts as it goes. Our own steps are counted here, since a compiled recomputation could not count
        self.nfe = 4 * self.steps * (2 if recomputes else 1) if own else 0
        # compiling torchdiffeq would make dozens of small graphs: it is better to leave the graph once per block
        odeint = torch.compiler.disable(self.odeint) if compiling and not own else self.odeint
        if gradients == "adjoint":
            solver = functools.partial(odeint_adjoint, parameters=(*self.f.parameters(), *condition))
            return odeint(0.0, 1.0, state, *condition, steps=self.steps, solver=solver)
        if not own and not recomputes:
            return odeint(0.0, 1.0, state, *condition, steps=self.steps)
        step = self.rk4_step if own else odeint
        if recomputes:                          # memory: a state per step, and one step's activations at a time
            step = functools.partial(checkpoint, step, use_reentrant=False, preserve_rng_state=False)
        for i in range(self.steps):
            state = step(i / self.steps, (i + 1) / self.steps, state, *condition)   # (B, 2C, h, w)
        return state


# --- the network -----------------------------------------------------------------------------------

class CUNet(nn.Module):
    """(x_t, t, y) -> prediction (eps, or what Diffusion asks for); if the variance is learned, its channels follow."""

    LEVELS = 4                                  # and one more below, the bottleneck
    unit = DynamicBlock                         # FSDP2 gathers one at a time, --grad-checkpointing recomputes it

    def __init__(self,
                 shape,                         # of the image, any size above 1 x 1: (colours, H, W)
                 nf: int = 16,                  # C of z and of v at full size
                 num_classes=0,                 # 0: unconditional
                 dynamics: Literal["second", "first"] = "second",       # Eq. 4, or state' = f(state)
                 attention: bool = True,        # False: "wo/A" of Table 5
                 residual: bool = True,         # of the acceleration; False: a >= 0. For Table 5's "wo/R" we infer
                                                # a 1x1 second convolution, too (support/published.py)
                 inner_time: bool = False,      # show t~ to the acceleration
                 solver: Literal[FIXED + ADAPTIVE] = "rk4",
                 steps: int = 1,                # of the fixed solvers
                 rtol: float = 1e-3, atol: float = 1e-3,                # of the adaptive ones
                 gradients: Literal["direct", "checkpoint", "adjoint"] = "direct",
                 label_std: float = 0.02,       # of the class vectors, before training
                 learn_sigma=False):
        super().__init__()
        self.shape, self.num_classes = shape, num_classes

        def block(width):
            return DynamicBlock(width // 2, dynamics == "second", residual, inner_time, solver=solver, steps=steps,
                                rtol=rtol, atol=atol, gradients=gradients)

        # A state keeps its shape inside an ODE: channels change only between blocks, in 1x1 convolutions.
        widths = [2 * nf * 2**i for i in range(self.LEVELS + 1)]                    # 2C of each level: 32 .. 512
        pairs = list(zip(widths, widths[1:]))
        self.condition = Conditioning(128, 256, num_classes, label_std)
        self.stem = nn.Conv2d(shape[0], nf, 3, padding=1)
        self.velocity = Velocity(nf)
        self.downs = nn.ModuleList(block(narrow) for narrow, _ in pairs)
        self.to_wide = nn.ModuleList(nn.Conv2d(narrow, wide, 1) for narrow, wide in pairs)
        self.bottleneck = block(widths[-1])
        self.to_narrow = nn.ModuleList(nn.Conv2d(wide + narrow, narrow, 1) for narrow, wide in reversed(pairs))
        self.ups = nn.ModuleList(block(narrow) for narrow, _ in reversed(pairs))
        self.attend_down, self.attend_up = (Attention(widths[-2]) if attention else nn.Identity() for _ in range(2))
        self.norm = group_norm(widths[0])
        self.head = nn.Conv2d(widths[0], shape[0] * (2 if learn_sigma else 1), 1)

    def forward(self, image, t, y=None):
        """image (B, colours, H, W), t (B,) long, y (B,) long or None, where -1 means "no class".
        -> (B, colours or 2 colours, H, W). In the comments C, h and w are those of the level."""
        e = self.condition(t, y)                                                    # (B, 256)
        z = self.stem(image)                                                        # (B, nf, H, W)
        state = torch.cat([z, self.velocity(z)], dim=1)                             # (B, 2nf, H, W)
        skips = []
        for i, (block, to_wide) in enumerate(zip(self.downs, self.to_wide)):
            state = block(state, e)                                                 # (B, 2C, h, w)
            if i == self.LEVELS - 1:
                state = self.attend_down(state)
            skips.append(state)
            # as in the code, a 1x1 convolution mixes z and v, and its output is the next block's z(0) and v(0)
            state = F.softplus(to_wide(state))                                      # (B, 4C, h, w)
            state = resize(state, [(side + 1) // 2 for side in state.shape[2:]])    # (B, 4C, h/2, w/2)
        state = self.bottleneck(state, e)                                           # (B, 32nf, H/16, W/16)
        for i, (block, to_narrow) in enumerate(zip(self.ups, self.to_narrow)):
            skip = skips.pop()                                                      # (B, 2C, h, w)
            state = torch.cat([resize(state, skip.shape[2:]), skip], dim=1)         # (B, 4C + 2C, h, w)
            state = block(F.softplus(to_narrow(state)), e)                          # (B, 2C, h, w)
            if i == 0:
                state = self.attend_up(state)
        return self.head(self.norm(state))

    def blocks(self):
        return [*self.downs, self.bottleneck, *self.ups]

    @property
    def nfe(self):
        """How often a was evaluated since the last forward began: the mean of the blocks. train.py logs it."""
        return sum(block.nfe for block in self.blocks()) / len(self.blocks())


# --- its parts, in the order data meets them ---------------------------------------------------------

class Conditioning(nn.Module):
    """t (B,) and label y (B,) or None -> e (B, embedding). The label -1 and None mean "no class"."""

    def __init__(self, sines, embedding, num_classes, label_std):
        super().__init__()
        self.sines, self.num_classes = sines, num_classes
        self.time = nn.Sequential(nn.Linear(sines, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        # one more row than classes: "no class", for guidance
        self.label = nn.Embedding(num_classes + 1, embedding) if num_classes else None
        if num_classes:
            nn.init.normal_(self.label.weight, std=label_std)

    def forward(self, t, y):
        e = self.time(sinusoid(t, self.sines))                                      # (B, embedding)
        y = torch.full_like(t, -1) if y is None else y
        check_labels(y, self.num_classes)
        return e + self.label(torch.where(y < 0, self.num_classes, y)) if self.label else e


def sinusoid(t, sines):
    """(B,) -> (B, sines): cosines, then sines, of t at wavelengths from 2 pi to nearly 2 pi 10^4."""
    half = sines // 2
    freqs = (-math.log(10000) / half * torch.arange(half, device=t.device)).exp()
    angles = t.float()[:, None] * freqs                                             # (B, sines / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)                          # (B, sines)


class Velocity(nn.Module):
    """g of Eq. 4: features (B, C, H, W) -> their initial velocity, the same shape. The norms are instance norms, as in
    the paper: v(0) hardly depends on brightness and contrast. Nothing is lost, since z keeps them."""

    def __init__(self, channels):
        super().__init__()
        self.net = nn.Sequential(nn.InstanceNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
                                 nn.InstanceNorm2d(channels), nn.Conv2d(channels, channels, 1))

    def forward(self, z):
        return self.net(z)


class Acceleration(nn.Module):
    """a(z, v, t, t~) = x'' of Eq. 4, (B, 2C, h, w) -> (B, C, h, w). Figure 2: norm, convolution, softplus; norm, scale
    and shift by the diffusion step, convolution, softplus; plus a residual.

    second=False: f of the code's state' = f(state), which returns (B, 2C, h, w). inner_time=True: both convolutions
    read t~ (here s) as one more channel; otherwise s is not used.
    """

    def __init__(self, channels, second=True, residual=True, inner_time=False):
        super().__init__()
        width, out = 2 * channels, channels if second else 2 * channels
        self.inner_time = inner_time
        self.norm1, self.norm2 = group_norm(width), group_norm(width)
        self.conv1 = nn.Conv2d(width + inner_time, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width + inner_time, out, 3, padding=1)
        self.residual = None
        if residual:
            self.residual = nn.Conv2d(width, channels, 1) if second else nn.Identity()

    def forward(self, s, state, scale, shift):
        hidden = F.softplus(self.conv1(self.with_time(s, self.norm1(state))))       # (B, 2C, h, w)
        hidden = self.norm2(hidden) * (1 + scale) + shift
        a = F.softplus(self.conv2(self.with_time(s, hidden)))                       # (B, C or 2C, h, w)
        return a if self.residual is None else a + self.residual(state)

    def with_time(self, s, hidden):
        if not self.inner_time:
            return hidden
        return torch.cat([hidden, s * torch.ones_like(hidden[:, :1])], dim=1)       # (B, 2C + 1, h, w)


class Attention(nn.Module):
    """state + softmax attention among all h w positions, (B, width, h, w) -> the same. width is 2C: z and v."""

    def __init__(self, width, heads=4, head=32):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(width)
        self.qkv = nn.Conv2d(width, 3 * heads * head, 1, bias=False)
        self.out = nn.Conv2d(heads * head, width, 1)

    def forward(self, state):
        query, key, value = rearrange(self.qkv(self.norm(state)), "b (three heads d) h w -> three b heads (h w) d",
                                      three=3, heads=self.heads)
        mixed = F.scaled_dot_product_attention(query, key, value)                   # (B, heads, h w, head)
        return state + self.out(rearrange(mixed, "b heads (h w) d -> b (heads d) h w", h=state.shape[2]))


def group_norm(channels):
    """1, 2, 4 or 8 groups: the most that are equal and leave each at least 4 channels. A group of one channel would be
    an instance norm, which forgets the mean of every channel."""
    groups = max(d for d in (1, 2, 4, 8) if d == 1 or channels % d == 0 and channels >= 4 * d)
    return nn.GroupNorm(groups, channels)


def resize(state, size):
    return F.interpolate(state, size=list(size), mode="bilinear", align_corners=False)


def odeint_adjoint(slope, state, times, parameters, **settings):
    """torchdiffeq's: constant memory, since backward solves the ODE in the other direction. torchdiffeq does so outside
    autocast, where the ODE is a different one, so `same_slope` enters forward's autocast again. `parameters` must list
    all tensors inside slope that need gradients, scale and shift too: a missing one silently gets none."""
    kind = state.device.type
    amp = torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), dtype=torch.get_autocast_dtype(kind))

    def same_slope(s, state):
        with amp:
            return slope(s, state)

    return torchdiffeq.odeint_adjoint(same_slope, state, times, adjoint_params=parameters, **settings)


# --- presets ------------------------------------------------------------------------------------------

_DDPM = dict(schedule="linear", predict="eps", variance="small")        # as in Ho et al.
# For two CPU cores (docs/results.md). The middle steps are trained most. With a small label_std the network would learn
# the classes late.
_TINY = dict(label_std=1.0, schedule="linear", predict="x0", variance="small", t_normal=[0.4, 1.3])
CONFIGS = {"cunet": dict(nf=16, **_DDPM),
           "tiny": dict(nf=8, **_TINY),
           "mini": dict(nf=6, **_TINY)}         # 1.4 million parameters, to be compared with the other papers' "mini"
NETWORKS = dict.fromkeys(CONFIGS, CUNet)
if UNet:
    CONFIGS |= {"published": dict(nf=16, **_DDPM),
                "unet": dict(dim=64, **_DDPM),
                "unet-tiny": dict(dim=32, **_TINY),
                "unet-mini": dict(dim=16, **_TINY)}
    NETWORKS |= {"published": Published} | dict.fromkeys(("unet", "unet-tiny", "unet-mini"), UNet)
TRAINING = dict(tiny=dict(max_steps=2000))      # train.py trains for 5,000 steps, unless a preset has its own number


def build(preset, shape, num_classes=0, **options):
    """-> (model, diffusion): all that train.py and sample.py ask of a paper.

    model(x_t (B, colours, H, W), t (B,), y (B,) or None) -> what diffusion.loss and .sample expect. shape is
    (colours, H, W); num_classes 0: no y. `options` override the preset: steps=4, dynamics="first" ... Raises UserError,
    with the fix, for a preset, option or size that is wrong.
    """
    if len(shape) != 3:
        raise UserError("cU-Net makes pictures, not videos: pass --model mdm --preset tiny-video")
    network = NETWORKS.get(preset, CUNet)
    options = checked("cunet", CONFIGS, preset, options, network) if checked else CONFIGS[preset] | options
    check_solver(**options)
    diffusion = Diffusion.of(options)
    if preset == "published" and diffusion.T > 1000:
        raise UserError(f"T={diffusion.T}, but the published layout has a table of 1000 times: use T=1000 or fewer")
    return network(shape, num_classes=num_classes, learn_sigma=diffusion.variance == "learned", **options), diffusion


def check_solver(solver="rk4", steps=1, rtol=1e-3, atol=1e-3, gradients="direct", **_):
    """Raises UserError, with the fix, for settings that contradict each other or would give wrong gradients."""
    if rtol <= 0 or atol <= 0:
        raise UserError(f"rtol={rtol} and atol={atol} must be above 0: try 1e-3")
    if solver in ADAPTIVE and steps != 1:
        raise UserError(f"{solver} chooses its own steps: drop steps={steps}, or use solver=rk4")
    if solver in ADAPTIVE and gradients == "checkpoint":
        raise UserError(f"checkpoint recomputes step by step, and {solver} chooses its own steps: use "
                        f"gradients=direct, or solver=rk4")
    if solver in FIXED and (rtol, atol) != (1e-3, 1e-3):
        raise UserError(f"{solver} takes fixed steps and has no tolerance: drop rtol and atol, or use solver=dopri5")
    if gradients == "adjoint" and (solver != "rk4" or steps < 4):
        raise UserError(f"the adjoint solves the ODE backwards, and the way back differs from the way forward. With "
                        f"one step of rk4 the gradients of some weights were off by up to 60%; with adaptive solvers "
                        f"the error depends on the tolerance. Instead of {solver} steps={steps} use solver=rk4 "
                        f"steps=4 or more, or gradients=checkpoint, which is exact")


if __name__ == "__main__":                      # prints its presets beside the paper's figures
    from benchmarks import tables
    tables.cunet()
