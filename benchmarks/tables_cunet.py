"""The presets of cunet.py beside the figures of its paper: `python cunet.py`."""
import torch

from support import cost
from support.checkpoint import load_paper


def cunet():
    """Prints Figure 6 and Table 5 of the paper beside our counts, and the evaluations that each solver takes."""
    paper = load_paper("cunet")

    def row(name, figures, preset, **options):
        shape = (3, 64, 64)
        with torch.device("meta"):                                  # to count, no weights are needed
            model, diffusion = paper.build(preset, shape, **options)
        n = sum(p.numel() for p in model.parameters())
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        macs = cost.multiply_adds(model, diffusion, cost.blank_batch(diffusion, shape, 1))
        megabytes = (16 * (n - frozen) + 8 * frozen) / 2**20       # weights, average, and Adam's two
        print(f"{name:34s} {n:10,d} {macs / 1e9:9.3f}G {megabytes:9.1f}   {figures}")

    print("""\
For 3 x 64 x 64, unconditional, one step of rk4 where there is an ODE. MB is the size of a checkpoint: weights, their
average, and Adam's two moments, in float32. The paper's GFLOPs are multiply-adds, too (one is two FLOPs). The authors'
profiler left out the matrix products of attention and counted instance norms; our column does the reverse.
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
* These numbers fit a network with five attentions. Figure 6's 8.8M, and ours, have two. (Of wo/R, 1.71 is nearer to
  five, and 92.0 MB fits two.) Both rows without residual are inferred from the number of parameters; with as many
  attentions they come out 1% below the paper. Their second convolution is 1x1, and that is most of what they save.

Evaluations of the acceleration in a block, per forward pass. Preset tiny, random weights, 1 x 28 x 28.""")
    for solver in paper.FIXED + paper.ADAPTIVE:
        torch.manual_seed(0)
        model = paper.build("tiny", (1, 28, 28), solver=solver)[0]
        with torch.no_grad():
            model(torch.randn(1, 1, 28, 28), torch.tensor([500]))
        print(f"  {solver:14s} {model.nfe:5.1f}{'' if solver in paper.FIXED else '   at rtol = atol = 1e-3'}")
