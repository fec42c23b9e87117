"""The U-Net that cU-Net is compared with, in one file: presets `unet`, `unet-tiny` and `unet-mini` of cunet.py.

The paper calls its baseline the "same U-Net as Ho et al.". What the authors ran is lucidrains'
denoising-diffusion-pytorch 1.8.3 with dim = 64. Layout and parameter count here are exactly those. Three things
are ours: the norms around attention, the sinusoid of the time, and the activation after it.

Letters: B images, `dim` channels at full size, h x w the size of a level.
"""
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from diffusion import UserError, check_labels


class UNet(nn.Module):
    """(x_t, t, y) -> prediction (eps, or what Diffusion asks for); if the variance is learned, its channels follow.

    Each of the four levels has two residual blocks and attention. It is linear attention, whose cost is linear in the
    number of positions, except at the lowest level and in the middle. Each level leaves two skips, after its first
    block and after its attention. The way up takes them back, the last one first.
    """

    def __init__(self, shape, dim: int = 64, num_classes=0, label_std: float = 0.02, learn_sigma=False):
        super().__init__()
        self.shape, self.num_classes = shape, num_classes
        if dim % 2:
            raise UserError(f"dim {dim} is odd: try {dim + 1}")
        width = 4 * dim                                                 # of the embedding of time and class
        self.condition = Conditioning(dim, width, num_classes, label_std)
        self.stem = nn.Conv2d(shape[0], dim, 7, padding=3)
        widths = [dim, dim, 2 * dim, 4 * dim, 8 * dim]
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for i, (narrow, wide) in enumerate(zip(widths[:-1], widths[1:])):
            lowest = i == 3
            attention = FullAttention if lowest else LinearAttention
            self.downs.append(nn.ModuleList([
                ResBlock(narrow, narrow, width), ResBlock(narrow, narrow, width), attention(narrow),
                nn.Conv2d(narrow, wide, 3, padding=1) if lowest else nn.Conv2d(4 * narrow, wide, 1)]))
            self.ups.insert(0, nn.ModuleList([
                ResBlock(wide + narrow, wide, width), ResBlock(wide + narrow, wide, width), attention(wide),
                nn.Conv2d(wide, narrow, 3, padding=1)]))
        self.middle = nn.ModuleList([ResBlock(widths[-1], widths[-1], width), FullAttention(widths[-1]),
                                     ResBlock(widths[-1], widths[-1], width)])
        self.last = ResBlock(2 * dim, dim, width)
        self.head = nn.Conv2d(dim, shape[0] * (2 if learn_sigma else 1), 1)

    def forward(self, x, t, y=None):
        """x (B, c, H, W), t (B,) long, y (B,) long or None, where -1 means "no class" -> (B, c or 2c, H, W)."""
        e = self.condition(t, y)                                                    # (B, 4 dim)
        x = first = self.stem(x)                                                    # (B, dim, H, W)
        skips = []
        for i, (block1, block2, attention, to_wide) in enumerate(self.downs):
            x = block1(x, e)                                                        # (B, narrow, h, w)
            skips.append(x)
            x = attention(block2(x, e))
            skips.append(x)
            # the lowest level stays h x w
            x = to_wide(x if i == 3 else pixels_to_channels(x))                     # (B, wide, h/2, w/2)
        block1, attention, block2 = self.middle
        x = block2(attention(block1(x, e)), e)
        for i, (block1, block2, attention, to_narrow) in enumerate(self.ups):
            x = block1(torch.cat([x, skips.pop()], dim=1), e)                       # (B, wide, h, w)
            x = attention(block2(torch.cat([x, skips.pop()], dim=1), e))
            if i < 3:
                x = F.interpolate(x, size=skips[-1].shape[2:], mode="nearest")      # (B, wide, 2h, 2w)
            x = to_narrow(x)                                                        # (B, narrow, 2h, 2w)
        return self.head(self.last(torch.cat([x, first], dim=1), e))                # (B, c or 2c, H, W)


class ResBlock(nn.Module):
    """x (B, narrow, h, w), e (B, width) -> (B, wide, h, w): convolution, norm, scale and shift by e, SiLU;
    convolution, norm, SiLU; plus a residual."""

    def __init__(self, narrow, wide, width):
        super().__init__()
        self.film = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * wide))
        self.conv1, self.norm1 = nn.Conv2d(narrow, wide, 3, padding=1), group_norm(wide)
        self.conv2, self.norm2 = nn.Conv2d(wide, wide, 3, padding=1), group_norm(wide)
        self.residual = nn.Conv2d(narrow, wide, 1) if narrow != wide else nn.Identity()

    def forward(self, x, e):
        scale, shift = self.film(e)[:, :, None, None].chunk(2, dim=1)               # 2 x (B, wide, 1, 1)
        hidden = F.silu(self.norm1(self.conv1(x)) * (1 + scale) + shift)            # (B, wide, h, w)
        return F.silu(self.norm2(self.conv2(hidden))) + self.residual(x)


UNet.unit = ResBlock        # FSDP2 gathers one at a time, --grad-checkpointing recomputes it


def group_norm(channels):
    """1, 2, 4 or 8 groups: the most that are equal and leave each at least 4 channels. A group of one channel would be
    an instance norm, which forgets the mean of every channel."""
    groups = max(d for d in (1, 2, 4, 8) if d == 1 or channels % d == 0 and channels >= 4 * d)
    return nn.GroupNorm(groups, channels)


class FullAttention(nn.Module):
    """x + softmax attention among all h w positions, (B, channels, h, w) -> the same."""

    def __init__(self, channels, heads=4, head=32):
        super().__init__()
        self.heads = heads
        self.norm = ChannelNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * heads * head, 1, bias=False)
        self.out = nn.Conv2d(heads * head, channels, 1)

    def forward(self, x):
        return x + self.attend(self.norm(x))

    def attend(self, x):
        q, k, v = rearrange(self.qkv(x), "b (qkv n d) h w -> qkv b n (h w) d", qkv=3, n=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v)                             # (B, n, h w, d)
        return self.out(rearrange(mixed, "b n (h w) d -> b (n d) h w", h=x.shape[2]))


class LinearAttention(FullAttention):
    """The same task, at a cost linear in the number of positions: q gets a softmax over its channels, and k one over
    the positions. So v k^T can be computed first, and it is only d x d."""

    def __init__(self, channels):
        super().__init__(channels)
        self.out_norm = ChannelNorm(channels)

    def attend(self, x):
        q, k, v = rearrange(self.qkv(x), "b (qkv n d) h w -> qkv b n d (h w)", qkv=3, n=self.heads)
        q, k = q.softmax(dim=-2) / math.sqrt(q.shape[-2]), k.softmax(dim=-1)
        mixed = (v @ k.mT) @ q                                  # (B, n, d, d) @ (B, n, d, h w) -> (B, n, d, h w)
        return self.out_norm(self.out(rearrange(mixed, "b n d (h w) -> b (n d) h w", h=x.shape[2])))


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each position, with a gain and no bias."""

    def __init__(self, channels):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        var, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)            # 2 x (B, 1, h, w)
        return (x - mean) * (var + 1e-5).rsqrt() * self.gain[:, None, None]


def pixels_to_channels(x):
    """(B, channels, h, w) -> (B, 4 channels, h/2, w/2): 2 x 2 pixels become channels. An odd size repeats its edge."""
    x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), mode="replicate")
    return rearrange(x, "b c (h p1) (w p2) -> b (c p1 p2) h w", p1=2, p2=2)


class Conditioning(nn.Module):
    """t (B,) and label y (B,) or None -> e (B, width). The label -1 and None mean "no class"."""

    def __init__(self, sines, width, num_classes, label_std):
        super().__init__()
        self.sines, self.num_classes = sines, num_classes
        self.time = nn.Sequential(nn.Linear(sines, width), nn.SiLU(), nn.Linear(width, width))
        # one more row than classes: "no class", for guidance
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        if num_classes:
            nn.init.normal_(self.label.weight, std=label_std)

    def forward(self, t, y):
        e = self.time(sinusoid(t, self.sines))                                      # (B, width)
        y = torch.full_like(t, -1) if y is None else y
        check_labels(y, self.num_classes)
        return e + self.label(torch.where(y < 0, self.num_classes, y)) if self.label else e


def sinusoid(t, sines):
    """(B,) -> (B, sines): cosines, then sines, of t at wavelengths from 2 pi to nearly 2 pi 10^4."""
    half = sines // 2
    freqs = (-math.log(10000) / half * torch.arange(half, device=t.device)).exp()
    angles = t.float()[:, None] * freqs                                             # (B, sines / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)                          # (B, sines)
