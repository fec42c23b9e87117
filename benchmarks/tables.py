"""What `python dis.py`, `python diffussm.py`, `python mdm.py` and `python cunet.py` print: parameters and multiply-adds
of their presets, beside the paper's figures. A function for each paper, and one for the presets that all four have."""
import math
from unittest import mock

import torch
from torch import nn

from support.checkpoint import load_paper
from support.cost import blank_batch, multiply_adds
from support.longconv import operations

# --- all four ---------------------------------------------------------------------------------------

def small(name):
    """The presets for a laptop, each with the data that it is for."""
    print("\nFor a laptop                parameters  multiply-adds")
    for preset, data, shape, classes in (("tiny", "shapes", (3, 32, 32), 8), ("mini", "MNIST", (1, 28, 28), 10)):
        with torch.device("meta"):
            model, diffusion = load_paper(name).build(preset, shape, classes)
        macs = multiply_adds(model, diffusion, blank_batch(diffusion, shape, 1, classes))
        weights = sum(p.numel() for p in model.parameters())
        print(f"{preset}, {data:6s} {classes:3d} classes {weights:14,d} {macs / 1e6:13.0f}M")


# --- DiS --------------------------------------------------------------------------------------------

# Millions of parameters and GFLOPs, from memory of the paper's table: see the footnote below.
DIS = {"S": (28.4, 0.43), "B": (119.1, 1.86), "M": (229.4, 3.70), "L": (404.0, 6.57), "H": (900.6, 14.79)}


def counted(paper, preset, shape, num_classes=0, mixers=True):
    """Multiply-adds of one forward pass for one image. Each pair of a shallow and a deep block costs the same, so it is
    enough to count a model without pairs and one with a pair. mixers: count them, too, or all but them."""
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
    for size, (millions, gflops) in DIS.items():
        preset = f"DiS-{size}/4"
        print(f"{preset} {parameters(paper, preset, pixels):13,d} {millions:7.1f}M"
              f" {counted(paper, preset, pixels) / 1e9:14.2f}G"
              f" {2 * counted(paper, preset, pixels, mixers=False) / 1e9:23.2f}G {gflops:16.2f}")
    print("\n32x32x4 latents of ImageNet 256, patch 2, 1000 classes"
          "  (DiT-XL/2 at this size: 118.6G)\n          parameters   multiply-adds")
    for size in DIS:
        preset = f"DiS-{size}/2"
        print(f"{preset} {parameters(paper, preset, latents, 1000):13,d}"
              f" {counted(paper, preset, latents, 1000) / 1e9:14.2f}G")
    print("\nWhy are the paper's GFLOPs a fraction of the multiply-adds? They were counted by hooks on layers,\n"
          "and doubled for multiply and add. Mamba's mixers call a kernel that hooks do not see. What is left is\n"
          "the column 'outside the mixers': mostly the linear layers of the long skips. With everything counted,\n"
          "DiS-H/2 costs about twice DiT-XL/2, not a fraction of it.\n"
          "* From memory of the paper's table. The authors' counting script, written anew, gives the same numbers.\n"
          "  Only the paper's 28.4 (S) and 6.57 (L) are 28.457 and 6.579 cut off, not rounded.")
    small("dis")


# --- DiffuSSM ---------------------------------------------------------------------------------------

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
                model, diffusion = paper.build(preset, (4, side, side), 1000, depth=depth, **options)
            with mock.patch.object(paper, "kernel", blank_kernel):
                everything = multiply_adds(model, diffusion, blank_batch(diffusion, model.shape, 1, 1000))
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
  Units     One flop of the paper is one multiply-add, as in DiT, whose XL/2 has 118.6 G at 256 px and 524.5 at 512.
  *         280.3 and 1066.2 are total Gflops divided by images seen, 1.85e11 / 660M and 3.22e11 / 302M, from
            the paper's Table 1 as others quote it.
  Formula   For a layer the paper has 13 (L/M) D^2 + L D^2 + FFTs (M = 2). Its first term gives 256.2 and 1024.7,
            its first two 295.6 and 1182.3. No matrix in the paper's equations costs the second term.
  Growth    1066.2 is 3.80 times 280.3, though from L = 1024 to 4096 no term grows less than 4 times.
So one image costs DiffuSSM-XL 2 to 2.5 times what it costs DiT-XL/2, in training and in sampling. The saving that the
paper reports is in the number of training images: their total cost is 13% lower than DiT's.""")
    small("diffussm")


def kernel_cost(channels, state, L):
    """Multiply-adds to make the kernels of one layer, by `kernel`: its matrix product, and the kernels' FFT."""
    n = 2 * L
    return channels * (state * L + 1.25 * n * math.log2(n))


# --- MDM --------------------------------------------------------------------------------------------

WORDS = 32                  # of a caption, counted in multiply-adds
T5 = {"text": 2048}         # the width of flan-T5-XL
MDM_ROWS = [                # preset, shape, condition, what the authors' code has
    ("cc12m-64", (3, 64, 64), T5, "461,359,107  182G"),
    ("cc12m-256", (3, 256, 256), T5, "476,613,958  294.5G"),
    ("cc12m-1024", (3, 1024, 1024), T5, "480,970,057  509.3G"),
    ("paper-256", (3, 64, 64), T5, "435,891,203  (two text layers, no size)"),
    ("paper-256", (3, 256, 256), T5, "449,833,286"),
    ("paper-128-256", (3, 256, 256), T5, "453,483,977"),
    ("paper-1024", (3, 1024, 1024), T5, "452,876,617"),
    ("paper-256", (3, 256, 256), {"num_classes": 1000}, "421.4M  (1000 classes and \"none\"; theirs: no text layers)"),
    ("paper-video", (3, 16, 256, 256), T5, "(none; widths of the temporal level ours)"),
    ("tiny", (3, 16, 16), {"text": "bytes"}, ""),
    ("tiny", (3, 32, 32), {"text": "bytes"}, ""),
    ("tiny", (3, 64, 64), {"text": "bytes"}, ""),
    ("tiny-x4", (3, 64, 64), {"text": "bytes"}, ""),
    ("tiny-video", (3, 8, 32, 32), {"text": "bytes"}, "")]


def mdm():
    """Prints the table. The token for "no text", which is ours alone, is not counted among the parameters."""
    build = load_paper("mdm").build
    print(f"Parameters without the token for \"no text\" (1024 more in paper-..), which is ours. Multiply-adds of one\n"
          f"picture or clip, and of a caption of {WORDS} tokens.\n"
          f"preset         resolutions                  parameters  mult.-adds   the authors' code, measured")
    for i, (preset, shape, condition, theirs) in enumerate(MDM_ROWS):
        if preset == "tiny" and MDM_ROWS[i - 1][0] != "tiny":
            print("\nfor two CPU cores, bytes as text")
        with torch.device("meta"):
            model, diffusion = build(preset, shape, **condition)
        null = sum(p.numel() for name, p in model.named_parameters() if name.endswith("condition.null"))
        parameters = sum(p.numel() for p in model.parameters()) - null
        macs = multiply_adds(model, diffusion, blank_batch(diffusion, shape, 1, words=WORDS, **condition))
        sizes = " ".join("x".join(map(str, s[1:] if len(s) == 4 else s[1:2])) for s in model.shapes())
        print(f"{preset:14s} {sizes:26s} {parameters:12,d} {macs / 1e9:8.1f}G   {theirs}")
    small("mdm")


# --- cU-Net -----------------------------------------------------------------------------------------

def cunet():
    """Prints Figure 6 and Table 5 of the paper beside our counts, and the evaluations that each solver takes."""
    paper = load_paper("cunet")

    def row(name, figures, preset, **options):
        shape = (3, 64, 64)
        with torch.device("meta"):                                  # to count, no weights are needed
            model, diffusion = paper.build(preset, shape, **options)
        n = sum(p.numel() for p in model.parameters())
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        macs = multiply_adds(model, diffusion, blank_batch(diffusion, shape, 1))
        megabytes = (16 * (n - frozen) + 8 * frozen) / 2**20       # weights, average, and Adam's two
        print(f"{name:34s} {n:10,d} {macs / 1e9:9.3f}G {megabytes:9.1f}   {figures}")

    print("""\
For 3 x 64 x 64, unconditional, one step of rk4 where there is an ODE. MB is the size of a checkpoint: weights, their
average, and Adam's two moments, in float32. The paper's GFLOPs are multiply-adds, too (one is two FLOPs). The authors'
profiler counted instance norms, but not the matrix products of attention. We count those products and no norms.
                                   parameters  mult.-adds       MB   the paper""")
    row("unet", "35.7M, 7.21, 545.5", "unet")
    row("published", "8.8M, 2.90 *, 137.9 *", "published")
    row("published attention=False", "wo/A: 2.81, 128.7", "published", attention=False)
    row("published residual=False", "wo/R: 1.71 *, 92.0", "published", residual=False)
    row("  and attention=False", "wo/A/R: 1.62, 88.4", "published", attention=False, residual=False)
    row("cunet (true second order, sees t)", "", "cunet")
    row("cunet attention=False", "", "cunet", attention=False)
    row("cunet residual=False", "", "cunet", residual=False)
    row("cunet dynamics=first", "", "cunet", dynamics="first")
    print("""\
* These numbers fit a network with five attentions. Figure 6's 8.8M, and ours, have two. (In the row wo/R, 1.71
  is nearer to five, and 92.0 MB fits two.) Both rows without residual are inferred from the number of parameters. With
  as many attentions, they are 1% below the paper. Their second convolution is 1x1, which is most of what they save.

Evaluations of the acceleration in a block, per forward pass. Preset tiny, random weights, 1 x 28 x 28.""")
    for solver in paper.FIXED + paper.ADAPTIVE:
        torch.manual_seed(0)
        model = paper.build("tiny", (1, 28, 28), solver=solver)[0]
        with torch.no_grad():
            model(torch.randn(1, 1, 28, 28), torch.tensor([500]))
        print(f"  {solver:14s} {model.nfe:5.1f}{'' if solver in paper.FIXED else '   at rtol = atol = 1e-3'}")
    small("cunet")
