"""A paper of your own: this file is all that train.py and sample.py need. Here MLP-Mixer (Tolstikhin et al.
2021, arXiv 2105.01601) denoises.

    python train.py --model examples/mypaper.py
    python sample.py --model examples/mypaper.py
"""
import torch
from einops import rearrange
from torch import nn

from diffusion import Diffusion, cosine_alpha_bar

CONFIGS = {"tiny": dict(width=192, depth=6, patch=4)}


def mlp(D):
    return nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))


class Block(nn.Module):
    def __init__(self, J, D):                                                   # tokens, channels
        super().__init__()
        self.tokens, self.channels, self.adapt = mlp(J), mlp(D), nn.Linear(D, 2 * D)
        self.norm = nn.LayerNorm(D, elementwise_affine=False)

    def forward(self, h, c):
        scale, shift = self.adapt(c)[:, None].chunk(2, dim=-1)                              # (B, 1, D) each
        h = h + self.tokens((self.norm(h) * (1 + scale) + shift).mT).mT                     # (B, J, D)
        return h + self.channels(self.norm(h))


class Mixer(nn.Module):
    def __init__(self, shape, num_classes, width, depth, patch):
        super().__init__()
        (C, H, W), self.K = shape, num_classes
        if H % patch or W % patch:
            raise ValueError(f"image size {H}x{W} is not divisible by patch={patch}: --set patch=2")
        self.cut = dict(h=H // patch, w=W // patch, p=patch, q=patch)
        self.time, self.label = nn.Embedding(1000, width), nn.Embedding(num_classes + 1, width)
        self.embed, self.out = nn.Linear(C * patch**2, width), nn.Linear(width, C * patch**2)
        self.blocks = nn.ModuleList(Block(H * W // patch**2, width) for _ in range(depth))

    def forward(self, x, t, y=None):                    # (B, C, H, W), (B,), (B,): y = -1 is "no class"
        y = torch.full_like(t, -1) if y is None else y
        c = self.time(t) + self.label(y % (self.K + 1))                                     # (B, D)
        h = self.embed(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", **self.cut))      # (B, J, D)
        for block in self.blocks:
            h = block(h, c)
        return rearrange(self.out(h), "b (h w) (c p q) -> b c (h p) (w q)", **self.cut)     # as x


def build(preset, shape, num_classes=0, **options):
    return (Mixer(shape, num_classes, **{**CONFIGS[preset], **options}),
            Diffusion(cosine_alpha_bar(1000), predict="x0"))
