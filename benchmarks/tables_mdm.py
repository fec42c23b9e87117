"""Parameters and multiply-adds of MDM's presets, beside what the authors' code has."""
import torch

from support.checkpoint import load_paper
from support.cost import blank_batch, multiply_adds

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
    print(f"Without the token for \"no text\" (2048 or 1024 parameters, ours). Multiply-adds of one picture,\n"
          f"or clip, and a caption of {WORDS} tokens.\n"
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
