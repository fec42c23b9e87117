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

    def matrices(block):
        return sum(p.numel() for n, p in block.named_parameters() if n.startswith("W_") and "bias" not in n)

    def blank_kernel(log_Abar, CB, L):              # making kernels is not counted, so it need not be done
        return torch.empty(len(CB), L)

    def count(preset, side, **options):
        """-> parameters, multiply-adds, matrices of a block. All blocks are alike, so models with one and with two tell
        what a deep one has."""
        counts = []
        for depth in (1, 2):
            with torch.device("meta"):
                model, diffusion = paper.build(preset, (4, side, side), CLASSES, depth=depth, **options)
            with mock.patch.object(paper, "kernel", blank_kernel):
                everything = multiply_adds(model, diffusion, blank_batch(diffusion, model.shape, 1, CLASSES))
            counts.append((sum(p.numel() for p in model.parameters()), everything))
        more = paper.CONFIGS[preset]["depth"] - 1
        return *(one + more * (two - one) for one, two in zip(*counts)), matrices(model.blocks[0])

    D = paper.CONFIGS["DiffuSSM-XL"]["width"]
    print("The matrices of one block, in units of D^2; the paper: 9 + 2M")
    for M in (1, 2, 4):
        size = matrices(paper.Block(D, M, state=2).to("meta"))
        print(f"  M = {M}: {size:11,d} = {size / D**2:g} D^2")

    print("\nLatents of ImageNet 256 and 512 (32x32x4 and 64x64x4), 1000 classes, P = 1, M = 2. Multiply-adds per\n"
          "image:\n"
          "  all        everything but making the kernels\n"
          "  matrices   the W matrices of the blocks, 6.5 L D^2 a block\n"
          "  SSM        the convolutions of the SSMs\n"
          "  attention  what attention over all L tokens would cost in their place, 2 L^2 D a block\n"
          "  kernels    making the kernels, once for all images of a batch\n\n"
          "                       parameters       all  matrices      SSM attention  kernels   the paper")
    for preset in ("DiffuSSM-S", "DiffuSSM-L", "DiffuSSM-XL"):
        width, depth, M = (paper.CONFIGS[preset][key] for key in ("width", "depth", "ratio"))
        for side, quoted in ((32, "280.3* Gflops"), (64, "1066.2*")):
            L = side**2
            parameters, everything, of_a_block = count(preset, side)
            figures = (everything, depth * L // M * of_a_block, depth * operations((1, L, 2 * width), None) / 2,
                       depth * 2 * L**2 * width, depth * kernel_cost(2 * width, 64, L))
            print(f"{preset:12s} {8 * side}px {parameters:14,d} " + " ".join(f"{f / 1e9:8.1f}G" for f in figures)
                  + (f"   {'about 673M, ' if side == 32 else ''}{quoted}" if preset.endswith("XL") else ""))
    print("\nPatches or hourglass? XL at 256 px (Figures 5 and 6)")
    for patch, ratio in ((1, 1), (1, 2), (2, 1)):
        parameters, everything, _ = count("DiffuSSM-XL", 32, patch=patch, ratio=ratio)
        print(f"  P = {patch}, M = {ratio}: {everything / 1e9:6.1f}G, {parameters / 1e6:6.1f}M parameters")
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
