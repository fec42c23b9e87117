"""Train a diffusion model of one of the papers. Reads top to bottom; `main` is the whole story.

    python train.py                                            DiS tiny on drawn shapes, minutes
    python train.py --data mnist                               digits (downloaded once, 11 MB)
    python train.py --data path/to/images --image-size 64      your own pictures
    torchrun --standalone --nproc_per_node=8 train.py --preset DiS-S/2 --data cifar10 ...
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py ...

Run the same command again and it continues, bit for bit, from results/<model>-<data>/latest.pt.
"""
import argparse
import ast
import copy
import csv
import datetime
import functools
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import sample
from diffusion import fold, normal, uniform
from sample import fail, told_plainly

BINS = 5                                     # the loss is also logged in this many bands of t
FREE_TO_CHANGE = {                           # between a run and its continuation
    "max_steps", "grad_accum", "device", "num_workers", "log_every", "sample_every", "ckpt_every",
    "keep_ckpts", "results_dir", "name", "resume", "grad_checkpointing", "compile", "data_dir",
    "smoke", "dry_run", "class_names", "prompts", "init_inner", "cond"}
MUST_MATCH = {"model", "preset", "set", "shape", "num_classes", "text", "text_encoder"}   # in any checkpoint


# --- command line ---------------------------------------------------------------------------

def parse(argv):
    p = sample.Parser(__doc__.splitlines()[0])
    flag = argparse.BooleanOptionalAction
    g = p.add_argument_group("what")
    g.add_argument("--model", default="dis", help="a paper's file, or a path to your own .py")
    g.add_argument("--preset", default="tiny", help="a name in the file's CONFIGS, e.g. DiS-S/2")
    g.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE",
                   help="change options of the preset: --set skip=add patch=8 (see build)")
    g.add_argument("--data", default="shapes",
                   help="shapes, moving, mnist, fashion, cifar10, or a folder of images")
    g.add_argument("--data-dir", help="where data sets lie or are downloaded to (default: a cache)")
    g.add_argument("--image-size", help="32, or HxW such as 24x40 (default: the data's own)")
    g.add_argument("--frames", type=int,
                   help="of moving's clips (default: 8); 1: pictures, their first frames")
    g.add_argument("--num-classes", type=int, default=-1,
                   help="-1: as the data has; 0: unconditional")
    g.add_argument("--cond", choices=["auto", "class", "text"], default="auto",
                   help="what tells the model what to draw; auto: the class, or the caption of data without "
                        "classes if the model reads text")
    g.add_argument("--text-encoder", default="bytes", metavar="NAME",
                   help="bytes: learned along; or a T5 of Hugging Face, or a folder with one (needs "
                        "transformers)")
    g.add_argument("--hold-out", nargs="+", default=[], metavar="WORDS",
                   help="leave out examples with these words in the caption: --hold-out 'red star' heart")
    g.add_argument("--hflip", action=flag, default=False, help="mirror half of the images")
    g = p.add_argument_group("length")
    g.add_argument("--max-steps", type=int, default=4000, help="optimizer steps")
    g.add_argument("--global-batch-size", type=int, default=32,
                   help="images per step, over all processes")
    g.add_argument("--grad-accum", type=int, default=1, help="split each step's share into this many")
    g = p.add_argument_group("optimisation")
    g.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    g.add_argument("--lr-schedule", choices=["cosine", "constant"], default="cosine",
                   help="after the warm-up: to zero at --max-steps, or no change")
    g.add_argument("--warmup-steps", type=int, default=100, help="the rate rises linearly over these")
    g.add_argument("--beta2", type=float, default=0.99, help="AdamW's second-moment decay")
    g.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's")
    g.add_argument("--grad-clip", type=float, default=1.0, help="largest gradient norm; 0: no limit")
    g.add_argument("--ema-decay", type=float, default=0.9999,
                   help="of the averaged weights; lower in early steps: (1 + step) / (10 + step)")
    g.add_argument("--cond-dropout", type=float, default=0.1,
                   help="chance to hide an image's class or caption, so that guidance can ask for none")
    g = p.add_argument_group("system")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    g.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                   help="auto: bf16 autocast on GPUs that have it")
    g.add_argument("--compile", action=flag, default=False, help="torch.compile the model")
    g.add_argument("--grad-checkpointing", action=flag, default=False,
                   help="recompute activations in backward: less memory, a third more time")
    g.add_argument("--num-workers", type=int, default=0, help="processes that read large folders")
    g.add_argument("--seed", type=int, default=0, help="of everything random")
    g = p.add_argument_group("output")
    g.add_argument("--results-dir", default="results", help="runs are folders in here")
    g.add_argument("--name", help="the run's folder (default: <model>-<data>)")
    g.add_argument("--resume", default="auto", metavar="auto|none|PATH",
                   help="auto: continue the run if it exists; none: begin anew, the old folder is "
                        "renamed; or a new run that begins from a checkpoint, perhaps with another --lr")
    g.add_argument("--init-inner", metavar="PATH",
                   help="progressive training (mdm): a run at a smaller size, with whose weights the inner "
                        "network begins")
    g.add_argument("--log-every", type=int, default=50,
                   help="steps between lines of log.csv; each checkpoint adds one too")
    g.add_argument("--sample-every", type=int, default=500,
                   help="steps between sample grids, the first after 100 already; 0: none")
    g.add_argument("--ckpt-every", type=int, default=500, help="steps between checkpoints")
    g.add_argument("--keep-ckpts", type=int, default=1, help="how many numbered checkpoints to keep")
    g = p.add_argument_group("checking")
    g.add_argument("--overfit-one-batch", action=flag, default=False,
                   help="the same images and noise at every step: the loss must fall towards 0")
    g.add_argument("--smoke", action="store_true",
                   help="one step, save, resume, one more, sample; leaves nothing behind")
    g.add_argument("--dry-run", action="store_true", help="print the plan and exit")
    args = p.parse_args(argv)
    at_least = dict(max_steps=1, global_batch_size=1, grad_accum=1, lr=0, warmup_steps=0, beta2=0,
                    weight_decay=0, grad_clip=0, ema_decay=0, cond_dropout=0, num_workers=0, seed=0,
                    log_every=1, sample_every=0, ckpt_every=1, keep_ckpts=1, num_classes=-1)
    for name, low in at_least.items():
        if not low <= getattr(args, name) < 2**62:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {low} "
                 f"and below 2^62")
    args.text_encoder = data.full_name(args.text_encoder)
    if args.frames is not None and not 1 <= args.frames <= 1024:
        fail(f"--frames {args.frames}: must be from 1 to 1024")
    for name in ("beta2", "ema_decay", "cond_dropout"):
        if getattr(args, name) >= 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be below 1")
    options = {}
    for item in args.set:
        key, equals, value = item.partition("=")
        if not equals:
            fail(f"--set {item}: write KEY=VALUE, for example --set patch=8")
        try:
            options[key] = ast.literal_eval(value)          # a number, True ...
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            options[key] = value                            # ... or a word
    args.set = options
    return args


# --- pieces of the loop ----------------------------------------------------------------------

def learning_rate(step, args):
    """Warm-up, then a half cosine to zero. A function of the step: nothing to save."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    if args.lr_schedule == "constant":
        return args.lr
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return args.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """ema <- d ema + (1 - d) model. d is small at first, else the average would keep the random
    initial weights for 1 / (1 - decay) steps, and early samples would be noise."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)
    for average, now in zip(ema.buffers(), model.buffers()):
        average.copy_(now)


def make_batch(batch, step_seeds, diffusion, args, num_classes, encode, device):
    """One micro-batch on its device with its random draws, each a function of (seed, step, slot):
    x0 (B, C, [T,] H, W) in [-1, 1], t (B,), noise (B, ..), cond."""
    seeds = step_seeds.to(device, non_blocking=True)                                       # (B,)
    x0 = batch["x"].to(device, non_blocking=True).float() / 127.5 - 1
    if args.hflip:
        flip = uniform(fold(seeds, 2)) < 0.5
        x0 = torch.where(flip.view(-1, *[1] * (x0.ndim - 1)), x0.flip(-1), x0)
    t = (uniform(fold(seeds, 0)) * diffusion.T).long()
    noise = normal(fold(seeds, 1), diffusion.noise_shape(x0.shape[1:]))
    hide = uniform(fold(seeds, 3)) < args.cond_dropout
    if num_classes:
        return x0, t, noise, {"y": torch.where(hide, -1, batch["y"].to(device, non_blocking=True))}
    if not encode:
        return x0, t, noise, {}
    text, mask = (batch["text"], batch["text_mask"]) if "text" in batch else encode(batch["caption"])
    text, mask = text.to(device, non_blocking=True), mask.to(device, non_blocking=True)
    text = text if text.dtype == torch.long else text.float()           # bytes; stored embeddings are float16
    return x0, t, noise, {"text": text, "text_mask": mask & ~hide[:, None]}               # (B, L, ..), (B, L)


def choose_text(args, dataset, paper, device):
    """What turns captions into tensors, or None if the class, or nothing, is the condition."""
    reads = "text" in inspect.signature(paper.build).parameters
    if args.cond == "class" and not dataset.num_classes or args.cond == "text" and not dataset.has_captions:
        raise ValueError(f"{args.data} has no {'captions' if args.cond == 'text' else 'classes'}: "
                         f"drop --cond {args.cond}")
    if args.cond == "text" and not reads:
        raise ValueError(f"{args.model} reads no text: pass --model mdm, or drop --cond text")
    if args.cond != "auto" and args.num_classes >= 0:
        raise ValueError(f"--cond {args.cond} and --num-classes {args.num_classes} do not go together: drop "
                         f"one")
    auto = reads and dataset.has_captions and not dataset.num_classes and args.num_classes < 0
    if args.cond == "text" or args.cond == "auto" and auto:
        return dataset.texts or data.text_encoder(args.text_encoder, device)
    if args.text_encoder != "bytes":
        raise ValueError("--text-encoder is for captions: add --cond text, or drop it")
    return None


def begin_inside(model, args):
    """Progressive training: the averaged weights of args.init_inner into the inner network of the model."""
    path = Path(args.init_inner)
    checkpoint = sample.read_checkpoint(path / "latest.pt" if path.is_dir() else path)
    if not hasattr(model, "load_inner"):
        raise ValueError(f"{args.model} has no inner network: drop --init-inner, or pass --model mdm")
    changed = differences(args, checkpoint["args"], {"model", "text", "text_encoder"})
    changed += [f"--set {k}={v}" for k, v in checkpoint["args"]["set"].items()
                if k in ("predict", "schedule", "T") and args.set.get(k) != v]
    if changed:
        raise ValueError(f"{path} was trained differently: {', '.join(changed)}. Use its flags")
    model.load_inner(checkpoint["ema"])


def some_captions(dataset, seed, n=8):
    """The first n different captions in a random order, for the grids of samples."""
    order = data.permutation(seed, 0, len(dataset))[:1000]
    return list(dict.fromkeys(dataset.captions[i] for i in order if dataset.captions[i]))[:n] or [""]


def save(checkpoint, folder, keep):
    """Write checkpoints/<step>.pt and point latest.pt at it. The old file stays until the new one is
    whole: a kill at any moment leaves a good latest.pt."""
    numbered = folder / "checkpoints"
    numbered.mkdir(exist_ok=True)
    path = numbered / f"{checkpoint['step']:07d}.pt"
    torch.save(checkpoint, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)
    latest = folder / "latest.pt.tmp"
    latest.unlink(missing_ok=True)
    try:
        os.link(path, latest)               # a second name for the same bytes
    except OSError:                         # not every file system can
        shutil.copyfile(path, latest)
    os.replace(latest, folder / "latest.pt")
    for old in sorted(numbered.glob("*.pt"))[:-keep]:
        old.unlink()


def open_log(path, fields, step):
    """log.csv, without the lines after `step`: those steps will be taken again."""
    rows = []
    if path.exists() and step:
        with open(path, newline="") as f:
            rows = [r for r in csv.reader(f) if r and r[0].isdigit() and int(r[0]) <= step]
    with open(f"{path}.tmp", "w", newline="") as f:
        csv.writer(f).writerows([fields, *rows])
    os.replace(f"{path}.tmp", path)
    return open(path, "a", newline="")


def memory_mb(device):
    """Peak so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:                     # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)      # bytes there, KB elsewhere


def differences(args, saved, keys):
    """What is not as in the checkpoint, as "--lr 0.001 (was 0.002)"."""
    flags = {"text": "--cond: text", "shape": "--image-size: shape", "num_examples": "--data: examples"}
    return [f"{flags.get(k, '--' + k.replace('_', '-'))} {vars(args)[k]} (was {saved[k]})" for k in vars(args)
            if k in keys and k in saved and vars(args)[k] != saved[k]]


def batches(loader):
    """What the loader gives; an image that cannot be read is told plainly."""
    try:
        yield from loader
    except data.DataError as e:             # a worker's message begins with its traceback
        fail(str(e).splitlines()[-1].removeprefix("data.DataError: "), every_process=True)


def leave_ctrl_c_to_the_main_process(worker):
    """For data workers. At module level, since spawned ones import it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def smoke(argv, args):
    """One step of everything, in a temporary folder."""
    if args.dry_run or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("--smoke goes without --dry-run and without torchrun: drop them")
    argv = [a for a in argv if a != "--smoke"]
    with tempfile.TemporaryDirectory() as folder:
        common = argv + ["--results-dir", folder, "--name", "smoke", "--resume", "auto",
                         "--sample-every", "0", "--log-every", "1", "--ckpt-every", "1"]
        main(common + ["--max-steps", "1"])
        main(common + ["--max-steps", "2"])
        sample.main(["--ckpt", f"{folder}/smoke", "--steps", "2", "--num-samples", "4",
                     "--out", f"{folder}/samples.png", "--device", args.device])
    print("smoke: one step, save, resume, one step and sampling all worked")


# --- the story -----------------------------------------------------------------------------

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.smoke:
        return smoke(argv, args)

    # Processes. torchrun starts one per GPU and tells each its rank; without it there is just one.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    share = world * args.grad_accum
    if args.global_batch_size % share:
        fail(f"--global-batch-size {args.global_batch_size} cannot be split over {world} processes x "
             f"--grad-accum {args.grad_accum}: try {max(1, args.global_batch_size // share) * share}")
    with told_plainly():
        device = sample.pick_device(args.device)
    bf16 = args.precision == "bf16"
    if device.type == "cuda":
        if args.precision == "auto":        # emulated bf16, on older GPUs, would be slower
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        tf32 = args.precision != "fp32"     # float32 matrix products with 10 bits of mantissa
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    main_process = rank == 0
    say = functools.partial(print, flush=True) if main_process else lambda *a: None

    # Data: `share` slices of each global batch, this process takes grad_accum of them.
    with told_plainly():
        size = data.parse_size(args.image_size) if args.image_size else None
        dataset = data.load(args.data, args.data_dir, size, text_encoder=args.text_encoder,
                            frames=args.frames)
        if args.hold_out:
            dataset = data.hold_out(dataset, args.hold_out)
        K = dataset.num_classes if args.num_classes < 0 else args.num_classes
        if K not in (0, dataset.num_classes):
            fail(f"--num-classes {K}, but {args.data} has {dataset.num_classes}: drop the flag")
        paper = sample.load_paper(args.model)
        encode = choose_text(args, dataset, paper, device)
        if args.hold_out and K and not encode and len(set(dataset.labels.tolist())) < K:
            fail("without the words held out a class has no examples: hold out less, or add --cond text")
        if args.hflip and encode and args.data == "moving":
            fail("--hflip would move what goes left to the right: drop it")
    K = 0 if encode else K
    args.shape, args.num_classes, args.num_examples = list(dataset.shape), K, len(dataset)
    args.class_names = list(dataset.class_names) if K else []
    args.text = encode.dim if encode else 0
    args.prompts = some_captions(dataset, args.seed) if encode else []
    reader = args.text_encoder + ", stored" * bool(dataset.texts)
    about_text = {"text": args.text} if encode else {}
    micro = args.global_batch_size // share

    # Model. Built from the same seed everywhere, so that all processes start alike.
    torch.manual_seed(args.seed)
    # in a file of your own a ValueError is more likely a bug than a wrong flag: show it whole
    with nullcontext() if args.model.endswith(".py") else told_plainly():
        with torch.device("meta") if args.dry_run else nullcontext():
            model, diffusion = paper.build(args.preset, dataset.shape, K, **about_text, **args.set)
    parameters = sum(p.numel() for p in model.parameters())
    macs = f"{model.macs() / 1e6:,.1f}M" if hasattr(model, "macs") else "unknown"
    folder = Path(args.results_dir) / (args.name or re.sub(
        r"[^\w.-]+", "-", f"{Path(args.model).stem}-{Path(args.data).name}"))
    say(f"device      {device} ({'--device' if args.device != 'auto' else 'the best found'}), "
        f"{world} process{'es' if world > 1 else ''}, {'bf16 autocast' if bf16 else 'float32'}\n"
        f"data        {args.data}: {len(dataset):,} images of {'x'.join(map(str, dataset.shape))}, "
        f"{f'{K} classes' if K else f'captions ({reader})' if encode else 'no classes'}\n"
        f"model       {args.model} {args.preset}: {parameters:,} parameters, {macs} multiply-adds "
        f"per image and forward pass\n"
        f"training    {args.max_steps:,} steps of {args.global_batch_size} images "
        f"({world} x {args.grad_accum} x {micro}), peak learning rate {args.lr:g}\n"
        f"folder      {folder}\n"
        f"pictures    python sample.py --ckpt {folder}")
    if args.grad_checkpointing:
        if not hasattr(model, "grad_checkpointing"):
            fail(f"{args.model} has no activation checkpointing: drop --grad-checkpointing")
        with told_plainly():
            model.grad_checkpointing = True
    if args.dry_run:
        return

    # Resume: what a run needs beside its arguments is weights, optimizer and step.
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0      # by torchrun, not you
    with told_plainly():
        latest, checkpoint, origin = folder / "latest.pt", None, None
        if args.init_inner and args.resume not in ("auto", "none"):
            raise ValueError("--resume PATH and --init-inner both begin from weights: drop one")
        if args.init_inner and (not latest.exists() or args.resume == "none"):
            begin_inside(model, args)
            say(f"begun       from the network of {args.init_inner}")
        if args.resume == "none" and folder.exists() and main_process and not restarted:
            n = next(n for n in range(1, 10**6) if not Path(f"{folder}.old{n}").exists())
            folder.rename(f"{folder}.old{n}")
            say(f"renamed     the earlier run is now {folder}.old{n}")
        if latest.exists() and (args.resume != "none" or restarted):
            origin, keys = latest, vars(args).keys() - FREE_TO_CHANGE
        elif args.resume not in ("auto", "none"):
            origin, keys = Path(args.resume), MUST_MATCH
            origin = origin / "latest.pt" if origin.is_dir() else origin
        if origin:
            checkpoint = sample.read_checkpoint(origin)
            if origin == latest and args.resume not in ("auto", checkpoint["args"]["resume"]):
                raise ValueError(f"{folder} already holds a run that did not begin from "
                                 f"{args.resume}: pass another --name, or drop --resume")
            began = checkpoint["args"].get("init_inner")
            if origin == latest and args.init_inner not in (None, began):
                raise ValueError(f"{folder} already holds a run that did not begin from {args.init_inner}: "
                                 f"pass another --name, or drop --init-inner")
            args.init_inner = began if origin == latest else None
            changed = differences(args, checkpoint["args"], keys)
            if changed:
                raise ValueError(f"{origin} was trained differently: {', '.join(changed)}. Use its "
                                 f"flags; or begin a new run with --name NEW, or with --name NEW "
                                 f"--resume {origin} from these weights")
            if args.max_steps < checkpoint["step"]:
                raise ValueError(f"{origin} is at step {checkpoint['step']} already: pass a larger "
                                 f"--max-steps, or --name NEW for a run of its own")
        if main_process:
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise ValueError(f"cannot write into {folder}: pass another --results-dir")

    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, args.beta2),
                                  weight_decay=args.weight_decay, fused=device.type != "mps")
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    first = 0
    if checkpoint:
        try:
            model.load_state_dict(checkpoint["model"])
            ema.load_state_dict(checkpoint["ema"])
            optimizer.load_state_dict(checkpoint["opt"])
        except (RuntimeError, ValueError, KeyError):
            fail(f"the weights in {origin} do not fit {args.model} {args.preset} as it is now: use the "
                 f"code that trained them, or --name NEW for a run of its own")
        first = checkpoint["step"]
        say(f"resumed     at step {first}")
        del checkpoint
    net, loss = torch.compile(model) if args.compile else model, None
    if world > 1:
        with told_plainly():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                    timeout=datetime.timedelta(minutes=30))
        ends = torch.tensor([first, -first], device=device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        if ends.sum():
            fail(f"the processes found different checkpoints: --results-dir {args.results_dir} must be "
                 f"on a disk that all machines share")
        net = torch.nn.parallel.DistributedDataParallel(
            net, device_ids=[device.index] if device.type == "cuda" else None)

    def checkpoint_now(step):
        if not main_process:
            return
        with told_plainly():                # a full disk
            save({"version": sample.VERSION, "model": model.state_dict(), "ema": ema.state_dict(),
                  "opt": optimizer.state_dict(), "step": step,
                  "images": step * args.global_batch_size, "args": vars(args)},
                 folder, args.keep_ckpts)

    def leave():
        nonlocal net, loss
        if world > 1:
            dist.barrier()
            # Both hold on to the process group. Freed after it, they would take Python's lock into
            # its destructor, which waits for threads that may want the lock: seen to hang.
            net = loss = None
            dist.destroy_process_group()

    def draw(step):
        """A small grid from the same noise every time, of the averaged weights. Rank 0 only: it calls
        no collective, the others wait for it at the next step."""
        rows = min(K, 10) or len(args.prompts) or 4
        columns = 4 if len(dataset.shape) == 3 else 1               # a video is a row by itself
        cond = {"y": torch.arange(rows).repeat(columns)} if K else {}
        if encode:
            cond = dict(zip(("text", "text_mask"), encode(args.prompts * columns)))
        images = sample.generate(ema, diffusion, tuple(dataset.shape), torch.arange(columns * rows), cond,
                                 columns * rows, device, progress=False, steps="25",
                                 cfg_scale=2.0 if cond and args.cond_dropout else 1.0)
        path = folder / "samples" / f"step_{step:07d}.png"
        sample.grid_image(sample.to_uint8(images), rows, args.class_names[:rows] or args.prompts).save(path)
        return path

    # Ctrl-C or a preempting SIGTERM: finish the step, save, leave. A second Ctrl-C kills; a second
    # SIGTERM does not, since under a scheduler and torchrun a process may well get two.
    stop, handlers = [], {}

    def ask_to_stop(number, _):
        stop.append(number)
        if number == signal.SIGINT:
            signal.signal(number, handlers[number])
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, ask_to_stop)

    if main_process:
        try:
            git = subprocess.run(["git", "-C", Path(__file__).resolve().parent, "rev-parse", "HEAD"],
                                 capture_output=True, text=True).stdout.strip()
        except OSError:
            git = ""                        # no git here
        (folder / "args.json").write_text(json.dumps(
            {**vars(args), "command": shlex.join(["train.py", *argv]), "git": git,
             "torch": torch.__version__, "processes": world}, indent=1))
        fields = ["step", "images", "loss", *(f"loss_t{b}" for b in range(BINS)), "grad_norm", "lr",
                  "images_per_s", "memory_mb"] + ["nfe"] * hasattr(model, "nfe")
        log = open_log(folder / "log.csv", fields, first)

    # The loop.
    order = data.batch_order(len(dataset), args.seed, args.global_batch_size, first, args.max_steps,
                             rank * args.grad_accum * micro, (rank + 1) * args.grad_accum * micro)
    if args.overfit_one_batch:
        order.steps = [0] * len(order)
    loader = DataLoader(dataset, batch_size=None, sampler=order, num_workers=args.num_workers,
                        pin_memory=device.type == "cuda",
                        worker_init_fn=leave_ctrl_c_to_the_main_process)
    slots = torch.arange(rank * args.grad_accum * micro, (rank + 1) * args.grad_accum * micro)
    losses, norms, since, began = [], [], first, time.perf_counter()
    bins = torch.zeros(2, BINS, device=device)                      # sums, counts
    bar = tqdm(total=args.max_steps, initial=first, unit="step", disable=not main_process,
               mininterval=0.5 if sys.stderr.isatty() else 30, dynamic_ncols=True)
    model.train()
    step = first
    for step, batch in enumerate(batches(loader), start=first + 1):          # steps are counted from 1
        seeds = fold(args.seed, 0 if args.overfit_one_batch else step, slots)              # (B,)
        torch.manual_seed(int(fold(args.seed, step, rank)))         # for dropout, if a model has any
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, args)
        total = torch.zeros((), device=device)
        for a in range(args.grad_accum):
            part = slice(a * micro, (a + 1) * micro)
            x0, t, noise, cond = make_batch({k: v[part] for k, v in batch.items()}, seeds[part],
                                            diffusion, args, K, encode, device)
            # gradients SUM over micro-batches, and we want the mean: hence the division. Processes
            # need to exchange them only once, after the last.
            last = a == args.grad_accum - 1
            with nullcontext() if last or world == 1 else net.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss = diffusion.loss(net, x0, t, noise, **cond)["loss"]               # (B,)
                (loss.mean() / args.grad_accum).backward()
            total += loss.detach().mean() / args.grad_accum
            band = t * BINS // diffusion.T
            bins[0].index_add_(0, band, loss.detach())
            bins[1].index_add_(0, band, torch.ones_like(loss))
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(),
                                                    args.grad_clip or math.inf))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, step, args.ema_decay)
        losses.append(total)
        bar.update()

        # Stop together: each process has its own signal, and none may wait for one that left. On GPUs
        # they agree only every 10 steps, since reading the vote waits for the GPU.
        stopping = bool(stop)
        if world > 1:
            votes = torch.tensor(len(stop), device=device)
            if asked := device.type == "cpu" or step % 10 == 0:
                dist.all_reduce(votes)
            stopping = asked and votes.item() > 0
        at_end = stopping or step == args.max_steps

        # Once in a while, all processes: look at the numbers (this waits for the GPU).
        if step % args.log_every == 0 or step % args.ckpt_every == 0 or at_end:
            stats = torch.cat([torch.stack(losses) / world, bins.flatten()])
            if world > 1:
                dist.all_reduce(stats)
            loss_list, (sums, counts) = stats[:len(losses)].tolist(), stats[len(losses):].view(
                2, BINS).tolist()
            norm_list = torch.stack(norms).tolist()
            bad = [s for s, values in enumerate(zip(loss_list, norm_list), step - len(losses) + 1)
                   if not all(map(math.isfinite, values))]
            if bad:             # every process sees the same numbers, so every process stops here
                bar.close()
                leave()
                fail(f"the loss or its gradient is not finite at step {bad[0]}: "
                     f"{f'{latest} is from before; ' if latest.exists() else ''}try a new run with "
                     f"--lr {args.lr / 2:g}{' or --precision fp32' if bf16 else ''}")
            rate = (step - since) * args.global_batch_size / (time.perf_counter() - began)
            mean = sum(loss_list) / len(loss_list)
            if main_process:
                row = [step, step * args.global_batch_size, f"{mean:.6g}",
                       *(f"{s / c:.6g}" if c else "" for s, c in zip(sums, counts)),
                       f"{sum(norm_list) / len(norm_list):.4g}", f"{learning_rate(step - 1, args):.4g}",
                       f"{rate:.4g}", f"{memory_mb(device):.0f}"]
                if hasattr(model, "nfe"):           # evaluations in the ODEs of the last step
                    row.append(f"{model.nfe:.4g}")
                csv.writer(log).writerow(row)
                log.flush()
                bar.set_postfix_str(f"loss {mean:.4f}, {rate:.0f} images/s")
            losses, norms, since, began = [], [], step, time.perf_counter()
            bins.zero_()

        # Once in a while, the first process: save, and show what it can do.
        if step % args.ckpt_every == 0 or at_end:
            checkpoint_now(step)
        if main_process and args.sample_every and not at_end and (
                step % args.sample_every == 0 or step == min(100, args.sample_every)):
            pause = time.perf_counter()
            bar.write(f"step {step}: {draw(step)}")
            began += time.perf_counter() - pause                     # images/s is of training alone
        if stopping:
            break

    bar.close()
    leave()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if main_process:
        log.close()
        if step < args.max_steps:
            say(f"stopped     at step {step}, saved. The same command continues.")
        else:
            say(f"trained     {step} of {args.max_steps} steps. A larger --max-steps goes on, its "
                f"learning rate too.")
            if args.sample_every and not stop:
                sample.main(["--ckpt", str(folder), "--out", str(folder / "samples.png"),
                             "--device", args.device], encode)


if __name__ == "__main__":
    sample.run(main)
