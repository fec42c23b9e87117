"""Parameters and multiply-adds of the released networks of MDM, of those like the paper's and of ours, beside what the
authors' code counts."""
import torch

from support.checkpoint import load_paper
from support.cost import blank_batch, multiply_adds

T5 = 2048                   # width of the embeddings of flan-T5-XL
WORDS = 32                  # of a caption, counted in multiply-adds


def mdm():
    """The token for "no text" is ours and not counted among the parameters."""
    paper = load_paper("mdm")

    def row(preset, shape, note="", **condition):
        with torch.device("meta"):
            model, diffusion = paper.build(preset, shape, **condition)
        null = sum(p.numel() for k, p in model.named_parameters() if k.endswith("condition.null"))
        n = sum(p.numel() for p in model.parameters()) - null
        macs = multiply_adds(model, diffusion, blank_batch(diffusion, shape, 1, words=WORDS, **condition))
        sizes = " ".join("x".join(map(str, s[1:] if len(s) == 4 else s[1:2])) for s in model.shapes())
        print(f"{preset:14s} {sizes:26s} {n:12,d} {macs / 1e9:8.1f}G   {note}")

    print(f"Without the token for \"no text\" (2048 or 1024 parameters, ours). Multiply-adds of one picture,\n"
          f"or clip, and a caption of {WORDS} tokens.\n"
          f"preset         resolutions                  parameters  mult.-adds   the authors' code, measured")
    row("cc12m-64", (3, 64, 64), "461,359,107  182G", text=T5)
    row("cc12m-256", (3, 256, 256), "476,613,958  294.5G", text=T5)
    row("cc12m-1024", (3, 1024, 1024), "480,970,057  509.3G", text=T5)
    row("paper-256", (3, 64, 64), "435,891,203  (two text layers, no size)", text=T5)
    row("paper-256", (3, 256, 256), "449,833,286", text=T5)
    row("paper-128-256", (3, 256, 256), "453,483,977", text=T5)
    row("paper-1024", (3, 1024, 1024), "452,876,617", text=T5)
    row("paper-256", (3, 256, 256), "421.4M  (1000 classes and \"none\"; theirs: no text layers)", num_classes=1000)
    row("paper-video", (3, 16, 256, 256), "(none; widths of the temporal level ours)", text=T5)
    print("\nfor two CPU cores, bytes as text")
    for preset, *shape in (("tiny", 3, 16, 16), ("tiny", 3, 32, 32), ("tiny", 3, 64, 64), ("tiny-x4", 3, 64, 64),
                           ("tiny-video", 3, 8, 32, 32)):
        row(preset, tuple(shape), text="bytes")
