"""What `python diffussm.py` prints: its presets beside the paper's figures."""
import math
from unittest import mock

import torch

from support.checkpoint import load_paper
from support.cost import blank_batch, multiply_adds
from support.longconv import operations

CLASSES = 1000


def diffussm():
    """Parameters and multiply-adds."""
    paper = load_paper("diffussm")

    def on_meta(preset, side, **options):
        with torch.device("meta"):
            return paper.build(preset, (4, side, side), CLASSES, **options)

    def blank_kernel(log_Abar, CB, L):          # kernels are not counted, so they need not be made
        return torch.empty(len(CB), L)

    def cost(model, diffusion):
        with mock.patch.object(paper, "kernel", blank_kernel):
            return multiply_adds(model, diffusion, blank_batch(diffusion, model.shape, 1, CLASSES))

    def matrices(block):
        return sum(p.numel() for n, p in block.named_parameters() if n.startswith("W_") and "bias" not in n)

    D = paper.CONFIGS["DiffuSSM-XL"]["width"]
    print("The matrices of one block, in units of D^2; the paper: 9 + 2M")
    for M in (1, 2, 4):
        count = matrices(paper.Block(D, M, state=2).to("meta"))
        print(f"  M = {M}: {count:11,d} = {count / D**2:g} D^2")

    print("\nLatents of ImageNet 256 and 512 (32x32x4 and 64x64x4), 1000 classes, P = 1, M = 2. Multiply-adds per\n"
          "image:\n"
          "  all        everything but making the kernels\n"
          "  matrices   the W matrices of the blocks, 6.5 L D^2 a block\n"
          "  SSM        the convolutions of the SSMs\n"
          "  attention  what attention over all L tokens would cost in their place, 2 L^2 D a block\n"
          "  kernels    making the kernels, once for all images of a batch\n\n"
          "                       parameters       all  matrices      SSM attention  kernels   the paper")
    for preset in ("DiffuSSM-S", "DiffuSSM-L", "DiffuSSM-XL"):
        for side, quoted in ((32, "280.3* Gflops"), (64, "1066.2*")):
            model, diffusion = on_meta(preset, side)
            depth, L, width = len(model.blocks), side**2, paper.CONFIGS[preset]["width"]
            figures = (cost(model, diffusion), depth * L // model.ratio * matrices(model.blocks[0]),
                       depth * operations((1, L, 2 * width), None) / 2, depth * 2 * L**2 * width,
                       depth * kernel_cost(2 * width, 64, L))
            print(f"{preset:12s} {8 * side}px {sum(p.numel() for p in model.parameters()):14,d} "
                  + " ".join(f"{f / 1e9:8.1f}G" for f in figures)
                  + (f"   {'about 673M, ' if side == 32 else ''}{quoted}" if preset.endswith("XL") else ""))
    print("\nPatches or hourglass? XL at 256 px (Figures 5 and 6)")
    for patch, ratio in ((1, 1), (1, 2), (2, 1)):
        model, diffusion = on_meta("DiffuSSM-XL", 32, patch=patch, ratio=ratio)
        print(f"  P = {patch}, M = {ratio}: {cost(model, diffusion) / 1e9:6.1f}G,"
              f" {sum(p.numel() for p in model.parameters()) / 1e6:6.1f}M parameters")
    print("""
The paper's figures do not quite add up, so this is our own count.
  Units     A flop there is a multiply-add, as in DiT, whose XL/2 has 118.6 G at 256 px and 524.5 at 512.
  *         280.3 and 1066.2 are total Gflops divided by images seen, 1.85e11 / 660M and 3.22e11 / 302M, from
            the paper's Table 1 as others quote it.
  Formula   The paper's for a layer is 13 (L/M) D^2 + L D^2 + FFTs (M = 2). Its first term gives 256.2 and 1024.7,
            its first two 295.6 and 1182.3. No matrix in the paper's equations costs the second term.
  Growth    1066.2 is 3.80 times 280.3, though from L = 1024 to 4096 no term grows less than 4 times.
So one image costs DiffuSSM-XL about twice what it costs DiT-XL/2, in training and in sampling. The saving that the
paper reports is in the number of training images.""")


def kernel_cost(channels, state, L):
    """Multiply-adds to make the kernels of one layer, by `kernel`: its matrix product, and the kernels' FFT."""
    n = 2 * L
    return channels * (state * L + 1.25 * n * math.log2(n))
