"""What `python dis.py` prints: parameters and multiply-adds of its presets, beside the paper's figures."""
import torch
from torch import nn

from support.checkpoint import load_paper
from support.cost import blank_batch, multiply_adds

# Millions of parameters and GFLOPs, from memory of the paper's table: see the footnote below.
PAPER = {"S": (28.4, 0.43), "B": (119.1, 1.86), "M": (229.4, 3.70), "L": (404.0, 6.57), "H": (900.6, 14.79)}


def dis():
    paper = load_paper("dis")

    def build(preset, shape, num_classes=0):
        with torch.device("meta"):
            model, diffusion = paper.build(preset, shape, num_classes)
        count = lambda: multiply_adds(model, diffusion, blank_batch(diffusion, shape, 1, num_classes))    # noqa: E731
        return model, sum(p.numel() for p in model.parameters()), count

    print("32x32 RGB, patch 4, unconditional: the setting that reproduces the paper's parameters\n"
          "          parameters    paper*  multiply-adds   outside the mixers, x2   paper's GFLOPs*")
    for size, (millions, gflops) in PAPER.items():
        model, parameters, count = build(f"DiS-{size}/4", (3, 32, 32))
        everything = count()
        for module in model.modules():
            if isinstance(module, paper.Block):
                module.mixer = nn.Identity()
        print(f"DiS-{size}/4 {parameters:13,d} {millions:7.1f}M {everything / 1e9:14.2f}G {2 * count() / 1e9:23.2f}G"
              f" {gflops:16.2f}")
    print("\n32x32x4 latents of ImageNet 256, patch 2, 1000 classes"
          "  (DiT-XL/2 at this size: 118.6G)\n          parameters   multiply-adds")
    for size in PAPER:
        _, parameters, count = build(f"DiS-{size}/2", (4, 32, 32), 1000)
        print(f"DiS-{size}/2 {parameters:13,d} {count() / 1e9:14.2f}G")
    print("\nWhy are the paper's GFLOPs a fraction of the multiply-adds? They were counted by hooks on layers, times two\n"
          "for multiply and add. Mamba's mixers call a kernel that hooks do not see. What is left is the column 'outside\n"
          "the mixers': mostly the linear layers of the long skips. With everything counted, DiS-H/2 costs about twice\n"
          "DiT-XL/2, not a fraction of it.\n"
          "* From memory of the paper's table. The authors' counting script, written anew, gives the same numbers. Only\n"
          "  the paper's 28.4 (S) and 6.57 (L) are 28.457 and 6.579 cut off, not rounded.")
