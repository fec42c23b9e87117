"""The network of cU-Net's published code, in one file: preset `published` of cunet.py, to try it and to count.

It is what the authors' release (github.com/Sergio20f/cDDPM, cUNet.py) computes, and not what the paper writes: a
first-order ODE, whose network never sees the diffusion step. docs/cunet.md lists the differences. Three things are
still ours: sizes that are not multiples of 16 work, the schedule is linear, and the network predicts eps. The code has
a sigmoid schedule and predicts v. Here predict=v can be set, and there is no sigmoid schedule.

Letters: B images, h x w the size of a level, `width` its channels.
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

from diffusion import UserError, check_labels

FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun")


class PublishedBlock(nn.Module):
    """state(0) -> state(1), both (B, width, h, w), by state' = f(state). f has instance norms and does not see t.

    residual=False is our reading of the paper's "wo/R", from its parameter count. There the second convolution is 1x1,
    and the embedding of the diffusion step is added before the block, so only this variant sees it. DynamicBlock in
    cunet.py explains `odeint`, `rk4_step`, `solve` and `nfe`. The authors ran one step of torchdiffeq's rk4.
    """

    def __init__(self, width, residual, solver, steps, rtol, atol, gradients):
        super().__init__()
        self.residual, self.solver, self.steps, self.rtol, self.atol = residual, solver, steps, rtol, atol
        self.gradients, self.nfe = gradients, 0
        self.norm = nn.InstanceNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3 if residual else 1, padding=1 if residual else 0)
        self.time = None if residual else nn.Sequential(
            nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, state, e):
        if self.time is not None:
            state = state + self.time(e)[:, :, None, None]                          # (B, width, h, w)
        return self.solve(state.float())

    def f(self, s, state):
        hidden = F.softplus(self.conv1(self.norm(state)))
        hidden = F.softplus(self.conv2(self.norm(hidden))).float()                  # (B, width, h, w)
        return hidden + state if self.residual else hidden

    def odeint(self, start, end, state, steps=1, adjoint=False):
        kind = state.device.type                # the adjoint's backward enters forward's autocast again
        amp = torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), dtype=torch.get_autocast_dtype(kind))

        def f(s, state):
            self.nfe += 1
            with amp:
                return self.f(s, state)

        def grid(f, state, ends):
            return ends[0] + (ends[1] - ends[0]) * torch.arange(steps + 1, device=ends.device) / steps

        options = {"grid_constructor": grid} if self.solver in FIXED else {"dtype": torch.float32}
        settings = dict(method=self.solver, rtol=self.rtol, atol=self.atol, options=options)
        times = torch.tensor([start, end], dtype=state.dtype, device=state.device)
        try:
            if not adjoint:
                return torchdiffeq.odeint(f, state, times, **settings)[-1]
        except AssertionError:                  # "underflow in dt", or a state that is not finite
            raise UserError(f"{self.solver} found no step small enough: train with solver=rk4, larger rtol and atol, "
                            f"or a smaller --lr; or draw from an earlier checkpoint") from None
        parameters = (*self.conv1.parameters(), *self.conv2.parameters())
        return torchdiffeq.odeint_adjoint(f, state, times, **settings, adjoint_params=parameters)[-1]

    def rk4_step(self, start, end, state):
        dt = end - start
        k1 = self.f(start, state)                                                   # each (B, width, h, w)
        k2 = self.f(start + dt / 3, state + dt / 3 * k1)
        k3 = self.f(start + dt * 2 / 3, state + dt * (k2 - k1 / 3))
        k4 = self.f(end, state + dt * (k1 - k2 + k3))
        return state + dt / 8 * (k1 + 3 * (k2 + k3) + k4)

    def solve(self, state):
        gradients = self.gradients if torch.is_grad_enabled() else "direct"
        recomputes, compiling = gradients == "checkpoint", torch.compiler.is_compiling()
        own = self.solver == "rk4" and gradients != "adjoint" and (recomputes or compiling or not state.is_cpu)
        odeint = torch.compiler.disable(self.odeint) if compiling and not own else self.odeint
        self.nfe = 4 * self.steps * (1 + recomputes) if own else 0
        if not own and not recomputes:
            return odeint(0.0, 1.0, state, self.steps, gradients == "adjoint")
        step = self.rk4_step if own else odeint
        if recomputes:
            step = functools.partial(checkpoint, step, use_reentrant=False, preserve_rng_state=False)
        for i in range(self.steps):
            state = step(i / self.steps, (i + 1) / self.steps, state)
        return state


class PublishedAttention(nn.Module):
    """Softmax attention that *replaces* its input, (B, width, h, w) -> the same. Its norm divides by the root mean
    square of the channels."""

    def __init__(self, width, heads=4, head=32):
        super().__init__()
        self.heads = heads
        self.gain = nn.Parameter(torch.ones(width))
        self.qkv = nn.Conv2d(width, 3 * heads * head, 1, bias=False)
        self.out = nn.Conv2d(heads * head, width, 1)

    def forward(self, state):
        normed = F.normalize(state, dim=1) * math.sqrt(state.shape[1]) * self.gain[:, None, None]
        q, k, v = rearrange(self.qkv(normed), "b (qkv n d) h w -> qkv b n (h w) d", qkv=3, n=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v)                             # (B, heads, h w, head)
        return self.out(rearrange(mixed, "b n (h w) d -> b (n d) h w", h=state.shape[2]))


class Published(nn.Module):
    """(x_t, t) -> prediction; if the variance is learned, its channels follow. There is no class."""

    LEVELS = 4                                  # and one more below, the bottleneck
    unit = PublishedBlock                       # FSDP2 gathers one at a time, --grad-checkpointing recomputes it

    def __init__(self, shape, nf: int = 16, num_classes=0, attention: bool = True, residual: bool = True,
                 solver: Literal[FIXED + ADAPTIVE] = "rk4", steps: int = 1, rtol: float = 1e-3, atol: float = 1e-3,
                 gradients: Literal["direct", "checkpoint", "adjoint"] = "direct", learn_sigma=False):
        super().__init__()
        if num_classes:
            raise UserError("the published layout takes no class: pass --num-classes 0")
        if max(shape[1:]) <= 2**self.LEVELS:
            raise UserError(f"the published layout normalizes each channel at 1/{2**self.LEVELS} of the image's size, "
                            f"and one pixel is too few for that: use images larger than {2**self.LEVELS} px")
        self.shape, self.num_classes = shape, 0

        def block(width):
            return PublishedBlock(width, residual, solver, steps, rtol, atol, gradients)

        # Sines on even columns, cosines on odd ones. The code doubles the exponent of the usual embedding, so
        # wavelengths reach nearly 2 pi 10^8. The table is not trained, and only residual=False reads it.
        angles = torch.arange(1000)[:, None] * 10_000 ** (-torch.arange(128) / 64)  # (1000, 128)
        table = rearrange([angles.sin(), angles.cos()], "two t j -> t (j two)")     # (1000, 256)
        self.table = nn.Parameter(table, requires_grad=False)
        # the norm of the raw image hides its brightness and contrast
        self.stem = nn.Sequential(
            nn.InstanceNorm2d(shape[0]), nn.Conv2d(shape[0], nf, 3, padding=1), nn.Softplus(),
            nn.InstanceNorm2d(nf), nn.Conv2d(nf, 2 * nf, 1), nn.Softplus())
        widths = [2 * nf * 2**i for i in range(self.LEVELS + 1)]                    # 32 .. 512
        pairs = list(zip(widths[:-1], widths[1:]))
        self.downs = nn.ModuleList(block(w) for w in widths[:-1])
        self.to_wide = nn.ModuleList(nn.Conv2d(w, wide, 1) for w, wide in pairs)
        self.bottleneck = block(widths[-1])
        self.to_narrow = nn.ModuleList(nn.Conv2d(wide + w, w, 1) for w, wide in reversed(pairs))
        self.ups = nn.ModuleList(block(w) for w in reversed(widths[:-1]))
        self.attend_down, self.attend_up = (
            PublishedAttention(widths[-2]) if attention else nn.Identity() for _ in range(2))
        self.head = nn.Conv2d(widths[0], shape[0] * (2 if learn_sigma else 1), 1)

    def forward(self, image, t, y=None):
        """image (B, colours, H, W), t (B,) long -> (B, colours or 2 colours, H, W). y: None, or -1 for each."""
        if y is not None:
            check_labels(y, 0)
        e = self.table[t]                                                           # (B, 256)
        state = self.stem(image)                                                    # (B, 2nf, H, W)
        skips = []
        for i, (block, to_wide) in enumerate(zip(self.downs, self.to_wide)):
            state = block(state, e)                                                 # (B, width, h, w)
            if i == self.LEVELS - 1:
                state = self.attend_down(state)
            skips.append(state)
            state = F.softplus(to_wide(state))                                      # (B, 2 width, h, w)
            state = resize(state, [(n + 1) // 2 for n in state.shape[2:]])          # (B, 2 width, h/2, w/2)
        state = self.bottleneck(state, e)
        for i, (block, to_narrow) in enumerate(zip(self.ups, self.to_narrow)):
            skip = skips.pop()                                                      # (B, width, h, w)
            state = torch.cat([resize(state, skip.shape[2:]), skip], dim=1)         # (B, 2 width + width, h, w)
            state = block(F.softplus(to_narrow(state)), e)                          # (B, width, h, w)
            if i == 0:
                state = self.attend_up(state)
        return self.head(state)

    @property
    def nfe(self):
        """How often f was evaluated since the last forward began: the mean of the blocks. train.py logs it."""
        blocks = [m for m in self.modules() if isinstance(m, self.unit)]
        return sum(block.nfe for block in blocks) / len(blocks)


def resize(state, size):
    return F.interpolate(state, size=list(size), mode="bilinear", align_corners=False)
