"""The authors' released MDM checkpoints, as checkpoints of this project.

    curl -o vis_model_256x256.pth https://docs-assets.developer.apple.com/ml-research/models/mdm/flickr256/vis_model.pth
    python -m support.released_mdm vis_model_256x256.pth mdm-256.pt
    python sample.py --ckpt mdm-256.pt --prompt "a red fox in the snow" --steps ddim250 --cfg-scale 7.5

Nothing is downloaded here, and nothing that is in the file runs. The weights are under Apple's licence
(github.com/apple/ml-mdm), not under ours. docs/mdm.md says what was verified, and what could not be.
"""
import pickle
import warnings
from pathlib import Path

import torch

from diffusion import UserError
from support import checkpoint
from support.cli import Parser, command, run, told_plainly
from support.text import full_name

ADDRESS = "https://docs-assets.developer.apple.com/ml-research/models/mdm/flickr{}/vis_model.pth"
GIGABYTES = {64: 1.8, 256: 1.9, 1024: 1.9}      # computed: the parameters in float32
T5 = "google/flan-t5-xl"                        # whose embeddings these networks read

# Our name of a part: theirs. The blocks of a U have rules of their own, in `their_name`.
PARTS = {"embed_t.0": "temb_layer1", "embed_t.2": "temb_layer2", "micro.0": "cond_layers.scale.0",
         "micro.2": "cond_layers.scale.1", "condition.source": "lm_proj", "condition.pool": "cond_emb",
         "stem": "conv_in", "norm": "norm_out", "head": "conv_out"}
LAYERS = {"film": "time_layer", "skip": "conv3",                                            # of a ResBlock
          "word_norm": "norm_cond", "word_kv": "kv_cond", "out": "proj_out", "mlp": "ffn"}  # of an Attention


def their_name(name, network):
    """Our name of a tensor in a network -> the authors' name."""
    match name.split("."):
        case ["inner", *_]:
            return f"inner_unet.{their_name(name.removeprefix('inner.'), network.inner)}"
        case ["down" | "up" as way, size, stage, "block", layer, *rest]:
            words = [f"{way}_blocks", size, "resnets", stage, LAYERS.get(layer, layer), *rest]
        case ["down" | "up" as way, size, stage, "attention", i, layer, *rest]:
            each = len(getattr(network, way)[int(size)][0].attention)       # they count through all stages of a size
            words = [f"{way}_blocks", size, "attn", str(each * int(stage) + int(i)), LAYERS.get(layer, layer), *rest]
        case ["middle", stage, "block", layer, *rest]:
            words = ["mid_blocks", stage, "resnets", "0", LAYERS.get(layer, layer), *rest]
        case ["middle", stage, "attention", i, layer, *rest]:
            words = ["mid_blocks", stage, "attn", i, LAYERS.get(layer, layer), *rest]
        case ["shrink" | "grow" as way, size, "conv", kind]:
            words = [{"shrink": "down_blocks", "grow": "up_blocks"}[way], size, "resample", kind]
        case [*part, kind]:
            words = [PARTS.get(".".join(part), ".".join(part)), kind]
    return ".".join(words)


class Inert:
    """Stands for any object in the file that is not a tensor, a number, a string, a list or a dict: it takes whatever
    it is told, and does nothing. (But PyTorch refuses objects that are filled like a list or a dict.)"""
    __init__ = __setstate__ = lambda self, *args, **kwargs: None


def read(path):
    """The authors' file -> {their name: tensor}, mapped from the file. Raises UserError.

    Nothing that the file names is imported or called: weights_only=True admits only tensors and plain data. The authors
    may have saved objects beside the weights. The names of their classes and functions stand in the file, and each of
    them becomes `Inert`. PyTorch refuses some names (those of os and sys) even then."""
    if not Path(path).is_file():
        raise UserError(f"no file at {path}: download one of {', '.join(map(ADDRESS.format, GIGABYTES))} (1.8 to 1.9 "
                        f"GB each, under the licence of github.com/apple/ml-mdm) and pass its path")
    try:
        checkpoint.check(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([(Inert, name) for name in names]):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than weights, perhaps code, and was not opened: download it from "
                        f"{ADDRESS.format('64, 256 or 1024')}. If it is from there, and you trust it, keep only the "
                        f"weights: torch.save({{'state_dict': torch.load(path, weights_only=False)['state_dict']}}, "
                        f"new_path)") from None
    except PermissionError:
        raise
    except Exception:                                   # damage makes zipfile and the unpickler stumble in many ways
        raise UserError(f"{path} is damaged, cut short or no checkpoint: download it again") from None
    if names:
        print(f"left out    what is no weight ({', '.join(sorted(names))}): nothing of it ran")
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise UserError(f"{path} has no state_dict of tensors: pass one of the files that the authors released")
    return state


def convert(state, shape=None, **options):
    """{their name: tensor} -> (preset, shape, text width, {our name: tensor}). Raises UserError, which names tensors
    that are missing, left over or of another shape.

    shape and options: of mdm.py's `build`, for a network of another size than the released."""
    depth = max(name.count("inner_unet.") for name in state)                    # how many networks are inside
    preset = ["cc12m-64", "cc12m-256", "cc12m-1024"][min(depth, 2)]
    shape = shape or (3, *[int(preset.split("-")[1])] * 2)
    text = state.get(f"{'inner_unet.' * depth}lm_proj.weight")
    width = 2048 if text is None or text.ndim != 2 else text.shape[1]
    with torch.device("meta"):
        model, _ = checkpoint.load_paper("mdm").build(preset, shape, text=width, **options)
    ours = {their_name(name, model): (name, tensor) for name, tensor in model.state_dict().items()}
    wrong = [f"{name} is missing" for name in ours if name not in state]
    wrong += [f"{name} is left over" for name in state if name not in ours]
    wrong += [f"{name} is {tuple(state[name].shape)} and not {tuple(tensor.shape)}" for name, (_, tensor) in
              ours.items() if name in state and state[name].shape != tensor.shape]
    if wrong:
        raise UserError(f"this is most like the released {preset}, but not all tensors fit ({len(wrong)}: "
                        f"{'; '.join(wrong[:3])}{'; ...' * (len(wrong) > 3)}): pass one of the files that the authors "
                        f"released")
    return preset, shape, width, {name: state[theirs] for theirs, (name, _) in ours.items()}


def write(path, out, half=False, text_encoder=T5, shape=None, **options):
    """The authors' file `path` -> the file `out`, a checkpoint of ours -> its preset. shape, options: see `convert`."""
    preset, shape, width, weights = convert(read(path), shape, **options)
    weights = {name: tensor.half() if half else tensor.float() for name, tensor in weights.items()}
    everything = {**checkpoint.load_paper("mdm").CONFIGS[preset], **options}
    args = dict(model="mdm", preset=preset, set=options, options=everything, shape=list(shape), num_classes=0,
                class_names=[], text=width, text_encoder=text_encoder, prompts=["a red fox in the snow"],
                data="50M pairs from Flickr", identity="released", num_examples=50_000_000, cond_dropout=0.0,
                space=None, resume="auto", seed=0)
    content = dict(version=checkpoint.VERSION, model=weights, ema=weights, opt=None, step=0, images=0, args=args)
    checkpoint.replace(out, lambda f: torch.save(content, f))                   # the file has `weights` only once
    return preset


@told_plainly()
def main(argv=None):
    p = Parser("Makes a checkpoint of this project from one of the three that MDM's authors released. Nothing is "
               "downloaded, and nothing in the file runs.", prog="python -m support.released_mdm")
    p.add_argument("released", help="the authors' vis_model.pth")
    p.add_argument("out", help="the file to write")
    p.add_argument("--half", action="store_true", help="half precision: half the size")
    p.add_argument("--text-encoder", metavar="NAME", default=T5, help="the T5 that sample.py loads: this one, or a "
                                                                      "folder that holds it")
    args = p.parse_args(argv)
    checkpoint.apart(args.released, args.out)
    preset = write(args.released, args.out, args.half, full_name(args.text_encoder))
    draw = command("sample.py", "--ckpt", args.out, "--prompt", "a red fox in the snow", "--steps", "ddim250",
                   "--cfg-scale", "7.5")
    print(f"{preset}, {Path(args.out).stat().st_size / 1e9:.2f} GB -> {args.out}: {draw}")


if __name__ == "__main__":
    run(main)
