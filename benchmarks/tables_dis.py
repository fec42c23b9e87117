"""What `python dis.py` prints: parameters and multiply-adds of its presets, beside the paper's figures."""
import torch
from torch import nn

from support.checkpoint import load_paper
from support.cost import blank_batch, multiply_adds

# Millions of parameters and GFLOPs, from memory of the paper's table: see the footnote below.
PAPER = {"S": (28.4, 0.43), "B": (119.1, 1.86), "M": (229.4, 3.70), "L": (404.0, 6.57), "H": (900.6, 14.79)}


def counted(paper, preset, shape, num_classes=0, mixers=True):
    """Multiply-adds of one forward pass for one image. Each pair of a shallow and a deep block costs the same, so it is
    enough to count without a pair and with one. mixers: with them, or all but them."""
    def at(depth):
        with torch.device("meta"):
            model, diffusion = paper.build(preset, shape, num_classes, depth=depth)
        for block in model.modules():
            if isinstance(block, paper.Block) and not mixers:
                block.mixer = nn.Identity()
        return multiply_adds(model, diffusion, blank_batch(diffusion, shape, 1, num_classes))
    pairs, alone = paper.CONFIGS[preset]["depth"] // 2, at(1)
    return alone + pairs * (at(2) - alone)


def parameters(paper, preset, shape, num_classes=0):
    with torch.device("meta"):
        return sum(p.numel() for p in paper.build(preset, shape, num_classes)[0].parameters())


def dis():
    paper, pixels, latents = load_paper("dis"), (3, 32, 32), (4, 32, 32)
    print("32x32 RGB, patch 4, unconditional: the setting that reproduces the paper's parameters\n"
          "          parameters    paper*  multiply-adds   outside the mixers, x2   paper's GFLOPs*")
    for size, (millions, gflops) in PAPER.items():
        preset = f"DiS-{size}/4"
        print(f"{preset} {parameters(paper, preset, pixels):13,d} {millions:7.1f}M"
              f" {counted(paper, preset, pixels) / 1e9:14.2f}G"
              f" {2 * counted(paper, preset, pixels, mixers=False) / 1e9:23.2f}G {gflops:16.2f}")
    print("\n32x32x4 latents of ImageNet 256, patch 2, 1000 classes"
          "  (DiT-XL/2 at this size: 118.6G)\n          parameters   multiply-adds")
    for size in PAPER:
        preset = f"DiS-{size}/2"
        print(f"{preset} {parameters(paper, preset, latents, 1000):13,d}"
              f" {counted(paper, preset, latents, 1000) / 1e9:14.2f}G")
    print("\nWhy are the paper's GFLOPs a fraction of the multiply-adds? They were counted by hooks on layers, times\n"
          "two for multiply and add. Mamba's mixers call a kernel that hooks do not see. What is left is the column\n"
          "'outside the mixers': mostly the linear layers of the long skips. With everything counted, DiS-H/2 costs\n"
          "about twice DiT-XL/2, not a fraction of it.\n"
          "* From memory of the paper's table. The authors' counting script, written anew, gives the same numbers.\n"
          "  Only the paper's 28.4 (S) and 6.57 (L) are 28.457 and 6.579 cut off, not rounded.")
