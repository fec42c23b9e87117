"""A paper of your own is one file with `CONFIGS` and `build`; train.py and sample.py need nothing else. In this one
MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601) denoises images.

    python train.py --model examples/mypaper.py
    python sample.py --model examples/mypaper.py

It may also have TRAINING: its presets' own defaults for the flags of train.py, as in dis.py. And the model that `build`
returns may have some of these attributes:

    unit             a class, usually that of the blocks. --grad-checkpointing computes each module of this class again
                     in backward; --shard gathers one of them at a time (and, as --dry-run, calls `build` for shapes
                     only: it must not look at the numbers of a tensor)
    nfe              a number, written in one more column of log.csv. In cunet.py: how often its network was evaluated
    frozen()         a context for sampling: in it no weight changes, so diffussm.py computes its kernels only once
    seeded           true if, in training, it also takes seeds= (B,), one for each image. What a model draws from these
                     depends on neither processes nor micro-batches. In dis.py: which images skip a block (drop_path)
    empty_prompt     true if the model reads a T5's empty prompt where no text is meant. In mdm.py: presets cc12m-..
    nest             its networks, from the inside out: --init-inner fills the inner ones. mdm.py has it

--weight-decay knows a model's matrices by their names: weight.. or W.. (support/optimizer.py).
"""
import torch
from einops import rearrange
from torch import nn

from diffusion import Diffusion, UserError, cosine_alpha_bar
from support.options import checked

CONFIGS = {"tiny": dict(width=192, depth=6, patch=4)}


def mlp(n):
    return nn.Sequential(nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n))


class Block(nn.Module):
    def __init__(self, L, D):                           # L tokens of D channels
        super().__init__()
        self.tokens, self.channels, self.adapt = mlp(L), mlp(D), nn.Linear(D, 2 * D)
        self.norm = nn.LayerNorm(D, elementwise_affine=False)

    def forward(self, x, c):                            # tokens (B, L, D), condition (B, D)
        scale, shift = self.adapt(c)[:, None].chunk(2, dim=-1)                              # (B, 1, D) each
        x = x + self.tokens((self.norm(x) * (1 + scale) + shift).mT).mT                     # (B, L, D)
        return x + self.channels(self.norm(x))                                              # (B, L, D)


class Mixer(nn.Module):
    def __init__(self, shape, num_classes, width: int, depth: int, patch: int):
        super().__init__()
        if len(shape) != 3:
            raise UserError("Mixer draws pictures, not videos: add --frames 1")
        (C, H, W), self.num_classes = shape, num_classes
        if H % patch or W % patch:
            raise UserError(f"image size {H}x{W} is not divisible by patch={patch}: try --set patch=2")
        self.grid = dict(h=H // patch, w=W // patch, p=patch, q=patch)
        self.time, self.label = nn.Embedding(1000, width), nn.Embedding(num_classes + 1, width)
        self.embed, self.out = nn.Linear(C * patch**2, width), nn.Linear(width, C * patch**2)
        self.blocks = nn.ModuleList(Block(H * W // patch**2, width) for _ in range(depth))

    def forward(self, x_t, t, y=None):                  # (B, C, H, W), (B,), (B,); y = -1 means "no class"
        y = torch.full_like(t, -1) if y is None else y
        c = self.time(t) + self.label(y % (self.num_classes + 1))                           # (B, D)
        x = self.embed(rearrange(x_t, "b c (h p) (w q) -> b (h w) (c p q)", **self.grid))   # (B, L, D)
        for block in self.blocks:
            x = block(x, c)
        return rearrange(self.out(x), "b (h w) (c p q) -> b c (h p) (w q)", **self.grid)    # (B, C, H, W)


def build(preset, shape, num_classes=0, **options):     # options: what --set gives
    model = Mixer(shape, num_classes, **checked("mypaper", CONFIGS, preset, options, Mixer, {}))
    return model, Diffusion(cosine_alpha_bar(1000), predict="x0")
