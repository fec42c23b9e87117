"""Train a diffusion model of one of the papers. To read it, begin at `main`: a plain loop, from top to bottom.

    python train.py                                            DiS tiny on drawn shapes, minutes
    python train.py --data mnist                               digits (downloaded once, 11 MB)
    python train.py --data path/to/images --image-size 64      your own pictures
    python train.py --latents path/to/latents                  what `python -m support.prepare encode` wrote
    torchrun --standalone --nproc_per_node=8 train.py --preset DiS-S/2 --data cifar10 ...

The same command, run again, continues from results/<model>-<data>/latest.pt. On a CPU a stop changes no bit of the run.

A model of your own: --model path/to/file.py, see examples/mypaper.py.
"""
import argparse
import copy
import math
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))    # finds our files even under PYTHONSAFEPATH

import support              # noqa: F401 (before torch: it chooses how many threads torch starts)
import torch

import sample
from diffusion import UserError, fold, normal, uniform
from support import checkpoint, cost, inputs, latents, parallel
from support.cli import Parser, number, option, processes, run, smoke, told_plainly
from support.datasets import batch_order
from support.log import Log, expected, further, plan, summarise
from support.optimizer import AdamW
from support.text import full_name


# --- command line -------------------------------------------------------------------------------------------

def parse(argv):
    p = Parser(__doc__)
    switch, count, below_1 = argparse.BooleanOptionalAction, number(int, 1), number(float, 0, below=1)
    add = p.add_argument_group("what").add_argument
    add("--model", default="dis", help="dis, diffussm, mdm, cunet, or a path to a .py file")
    add("--preset", default="tiny",
        help="a name from the file's CONFIGS: tiny, mini, DiS-S/2 ... It may have its own defaults for the flags below "
             "(TRAINING in dis.py)")
    add("--set", type=option, nargs="*", action="extend", default=[], metavar="KEY=VALUE",
        help="change options of the preset, as in --set skip=add patch=8. Those of the diffusion are among them: "
             "schedule=linear or cosine, predict=eps, v or x0 (mdm: also error), T=1000; for all but mdm also "
             "variance=small, large or learned, min_snr=5. A wrong key prints them all")
    add("--data", default="shapes", help="shapes, moving, mnist, fashion, cifar10, or a folder of pictures")
    add("--data-dir", help="where data sets are, or are downloaded to (default: a cache)")
    add("--latents", metavar="DIR", help="instead of --data: what `python -m support.prepare encode` wrote")
    add("--image-size", help="32, or HxW such as 24x40 (default: the data's own)")
    add("--frames", type=number(int, 1, 1024), help="frames in a clip of moving (default: 8); 1: pictures")
    add("--num-classes", type=number(int, -1), default=-1, help="-1: as many as the data has; 0: none")
    add("--cond", choices=["auto", "class", "text"], default="auto",
        help="what the model is told about an image: its class or its caption. auto: the class; but the caption, if "
             "the data has no classes and the model reads text")
    add("--text-encoder", default="bytes", metavar="NAME",
        help="bytes: learned with the model; or a T5 of Hugging Face, or its folder (needs transformers)")
    add("--hold-out", nargs="+", action="extend", default=[], metavar="WORDS",
        help="leave out examples whose caption has one of these in it: --hold-out 'red star' heart")
    add("--hflip", action=switch, default=False, help="mirror half of the images")
    add = p.add_argument_group("length").add_argument
    add("--max-steps", type=count, default=5000, help="optimizer steps")
    add("--global-batch-size", type=count, default=32, help="images in each step, over all processes")
    add("--grad-accum", type=count, default=1, help="micro-batches in each step, on each process")
    add = p.add_argument_group("optimisation").add_argument
    add("--lr", type=number(float), default=2e-3, help="peak learning rate of AdamW")
    add("--lr-schedule", choices=["cosine", "constant"], default="cosine",
        help="after the warm-up: cosine falls to zero at --max-steps, constant stays")
    add("--warmup-steps", type=number(int), default=100, help="the rate rises linearly during these steps")
    add("--beta2", type=below_1, default=0.99, help="decay of AdamW's second moment")
    add("--weight-decay", type=number(float), default=0.0,
        help="AdamW's weight decay, of matrices only: not of biases, norms, embeddings, positions, an SSM's A, D or "
             "log dt")
    add("--grad-clip", type=number(float), default=1.0, help="largest gradient norm; 0: no limit")
    add("--ema-decay", type=below_1, default=0.9999,
        help="decay of the averaged weights; early steps use (1 + step) / (10 + step) if that is lower")
    add("--cond-dropout", type=below_1, default=0.1,
        help="chance to hide an image's class or caption. Guidance needs a model that can draw without them")
    add = p.add_argument_group("system").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="auto: bf16 autocast and TF32 on GPUs that have them; fp32: neither")
    add("--compile", action=switch, default=False, help="torch.compile the model")
    add("--grad-checkpointing", action=switch, default=False,
        help="compute activations again in backward: less memory, a third more time")
    add("--shard", action=switch, default=False,
        help="each process keeps a part of the weights (FSDP2): for models that are too large for one GPU")
    add("--num-workers", type=number(int), default=0, metavar="N",
        help="how many extra processes read the data for each process that trains. Useful for large folders")
    add("--seed", type=number(int), default=0, help="decides the data's order, the noise and the first weights")
    add = p.add_argument_group("output").add_argument
    add("--results-dir", default="results", help="each run is a folder in this folder")
    add("--name", help="the run's folder (default: <model>-<data>)")
    add("--resume", default="auto", metavar="auto|none|PATH",
        help="auto: continue the run if it exists. none: begin anew; the old folder is renamed. PATH: a new run "
             "continues from this checkpoint, at its step, perhaps with another --lr")
    add("--init-inner", metavar="PATH",
        help="progressive training (mdm): the inner network begins with the weights of this smaller run")
    add("--log-every", type=count, default=50, help="steps between lines of log.csv")
    add("--sample-every", type=number(int), default=500,
        help="steps between grids of samples; a first one comes after 100 steps; 0: none")
    add("--vae", metavar="NAME", help="the VAE that decodes grids of latents (default: false colours)")
    add("--ckpt-every", type=count, default=500, help="steps between checkpoints")
    add("--keep-ckpts", type=count, default=2, help="how many checkpoints to keep")
    add = p.add_argument_group("checking").add_argument
    add("--overfit-one-batch", action=switch, default=False,
        help="the same images and noise in every step: the loss must fall towards 0")
    add("--smoke", action="store_true",
        help="try everything: three steps, save, resume, a grid, sample. Leaves nothing behind")
    add("--dry-run", type=count, nargs="?", const=0, default=None, metavar="GPUS",
        help="print the plan and, for a number of GPUs, the memory that each needs; then exit")
    args = p.parse_args(argv)
    own = getattr(checkpoint.load_paper(args.model), "TRAINING", {}).get(args.preset)
    if own:                                     # the preset's defaults: typed flags go before them
        if wrong := sorted(own.keys() - vars(args).keys()):
            raise UserError(f"{args.model} has TRAINING of {wrong[0]!r}, which is no flag of train.py: write the names "
                            f"as in max_steps")
        p.set_defaults(**own)
        args = p.parse_args(argv)
    args.set, args.text_encoder = dict(args.set), full_name(args.text_encoder)
    args.vae = args.vae and full_name(args.vae)
    return args


# --- parts of the loop --------------------------------------------------------------------------------------

def learning_rate(step, args):
    """Warm-up, then half a cosine to zero. It depends on the step alone, so a checkpoint need not hold it."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    if args.lr_schedule == "constant":
        return args.lr
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return args.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """ema <- d ema + (1 - d) model. d is small at first. Otherwise the average would keep the random first weights for
    about 1 / (1 - decay) steps, and early samples would be noise."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)
    for average, now in zip(ema.buffers(), model.buffers()):
        average.copy_(now)


def make_batch(batch, seeds, dataset, diffusion, args, encode, device):
    """A micro-batch, on its device, and its random draws: x0 (B, C, [T,] H, W), t (B,), noise (B, ...), and the model's
    other arguments. Each draw is a function of the example's seed (B,), that is, of --seed, step and place in the
    batch. A resumed run, or one with more processes, draws the same."""
    to = dict(device=device, non_blocking=device.type == "cuda")        # MPS would not keep the source until it is read
    seeds = seeds.to(**to)                                                                 # (B,)
    x0 = dataset.prepare(batch["x"].to(**to), seeds)
    if args.hflip:
        flip = uniform(fold(seeds, 2)) < 0.5
        x0 = torch.where(flip.view(-1, *[1] * (x0.ndim - 1)), x0.flip(-1), x0)
    t = diffusion.draw_t(fold(seeds, 0))
    noise = normal(fold(seeds, 1), diffusion.noise_shape(x0.shape[1:]))
    hide = uniform(fold(seeds, 3)) < args.cond_dropout
    if args.num_classes:
        return x0, t, noise, {"y": torch.where(hide, -1, batch["y"].to(**to))}
    if not encode:
        return x0, t, noise, {}
    text, mask = (batch["text"], batch["text_mask"]) if "text" in batch else encode(batch["caption"])
    text, mask = text.to(**to), mask.to(**to)
    text = text if text.dtype == torch.long else text.float()           # bytes; stored embeddings are float16
    if encode.empty:
        none, none_mask = encode.nothing                                                  # (1, L, dim), (1, L)
        return x0, t, noise, {"text": torch.where(hide[:, None, None], none, text),
                              "text_mask": torch.where(hide[:, None], none_mask, mask)}   # (B, L, dim), (B, L)
    return x0, t, noise, {"text": text, "text_mask": mask & ~hide[:, None]}               # (B, L, ...), (B, L)


def final_samples(folder, args, *flags, encode=None):
    """Draw into the run's folder what `python sample.py` would draw."""
    sample.main(["--ckpt", str(folder), "--out", str(folder / "samples.png"), "--device", args.device, *flags,
                 *["--precision", "fp32"] * (args.precision == "fp32"),
                 *["--vae", args.vae or "none"] * bool(args.latents),
                 *["--model", args.model] * args.model.endswith(".py")], encode)


# --- training, from top to bottom ---------------------------------------------------------------------------

@told_plainly()
@checkpoint.finished()
def main(argv=None, drawing=()):
    """drawing: more flags for the pictures at the end."""
    typed = argv is None and __name__ == "__main__"
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.smoke:
        return smoke(main, argv, args)

    # Processes. torchrun starts one for each GPU and tells it its rank. On a CPU we do that: one for each core. Each
    # takes an equal part of every batch and splits it into --grad-accum micro-batches.
    planned = args.dry_run is not None
    if typed and not planned:
        parallel.share_cores(args)
    world = args.dry_run or processes()[1]                                  # a dry run plans for any number
    micro = parallel.micro_batch(args, world)                               # images of a micro-batch
    device = parallel.pick_device(args.device)
    team = parallel.Team(device)
    args.bf16 = parallel.set_precision(args.precision, device)
    if args.dry_run:                            # plan for GPUs that have bf16, even if this machine has none
        args.bf16 = args.precision != "fp32"

    # Data. It decides the model's shape, num_classes, text and more: these are written into args.
    paper = checkpoint.load_paper(args.model)
    if args.preset not in paper.CONFIGS:
        raise UserError(f"unknown preset {args.preset!r}: {args.model} has {', '.join(paper.CONFIGS)}")
    dataset, encode = inputs.for_training(args, paper, device)

    # Model. All processes build it from the same seed, so they begin alike. On the device "meta" it has shapes, but no
    # numbers: a plan needs none, and with shards the first process sends them (`spread`).
    torch.manual_seed(args.seed)
    with torch.device("meta" if planned or args.shard and team.rank > 0 else "cpu"):
        model, diffusion = paper.build(args.preset, dataset.shape, args.num_classes,
                                       **({"text": args.text} if encode else {}), **args.set)
    args.options = checkpoint.all_options(args, paper)                      # a run keeps them if its preset changes
    if encode:
        encode.empty = getattr(model, "empty_prompt", False)
    folder = checkpoint.folder_of(args)
    team.say(plan(args, folder, team, dataset, model, diffusion, world, micro))
    if args.dry_run:
        batch = cost.blank_batch(diffusion, dataset.shape, micro, args.num_classes, args.text)
        team.say(cost.report(cost.table(model, diffusion, batch, world, args.bf16)))
    if planned:
        return
    ema = copy.deepcopy(model).eval().requires_grad_(False)                 # the average of the weights, for sampling
    if args.grad_checkpointing:
        parallel.recompute(model)
    if encode and encode.empty:
        encode.nothing = [v.to(device) for v in encode([""])]               # once: each step would wait for it
    vae = latents.VAE(args.vae, device, dataset.shape[0]) if args.vae and team.rank == 0 else None

    # Resume. The state of a run is its weights, its optimizer and its step; its arguments are saved with them.
    saved, path = checkpoint.resume(args, folder, team)
    start = saved["step"] if saved else 0                                   # steps taken before
    if saved:
        checkpoint.load_weights(model, saved, "model", path)
        checkpoint.load_weights(ema, saved, "ema", path)
    elif args.init_inner:
        checkpoint.begin_inside(args, folder, team, model, ema)
        team.say(f"begun       from the network of {args.init_inner}")
    net = team.spread(model, ema, args.compile, args.shard)                 # what forward and backward go through
    optimizer = AdamW(model, args.weight_decay, lr=args.lr, betas=(0.9, args.beta2), fused=device.type != "mps")
    if args.weight_decay:
        team.say(f"decay       of {sum(w.numel() for w in optimizer.matrices):,} parameters, those of matrices")
    if saved:
        if saved["opt"]:
            parallel.load_optimizer(optimizer, saved["opt"])
        team.say(f"resumed     at step {start}{'' if saved['opt'] else ', with a new optimizer'}")
        saved = None                            # its tensors are mapped from the file: let go of it
    stop = parallel.Interruption()
    if team.rank == 0:
        checkpoint.describe(folder, args, argv, world)
    log = Log(args, folder, team, model, diffusion.T, start, expected(argv, parse))

    # Train. This process has the places lo to hi - 1 of each global batch.
    lo, hi = (args.grad_accum * micro * r for r in (team.rank, team.rank + 1))
    order = batch_order(len(dataset), args.seed, args.global_batch_size, start, args.max_steps, lo, hi, dataset.several)
    if args.overfit_one_batch:
        order.steps = [0] * len(order)
    batches = inputs.batches(dataset, order, args.num_workers, pinned=device.type == "cuda")
    model.train()
    step, batch = start, next(batches, None)
    for step in range(start + 1, args.max_steps + 1):                       # steps are counted from 1
        seeds = fold(args.seed, 0 if args.overfit_one_batch else step, torch.arange(lo, hi))        # (hi - lo,)
        torch.manual_seed(int(fold(args.seed, step, team.rank)))            # for dropout, if a model has any
        rate = learning_rate(step - 1, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for a in range(args.grad_accum):
            part = slice(a * micro, (a + 1) * micro)
            x0, t, noise, cond = make_batch({k: v[part] for k, v in batch.items()}, seeds[part], dataset, diffusion,
                                            args, encode, device)
            if getattr(model, "seeded", False):             # folds 4 and 5 are of latents and captions
                cond["seeds"] = fold(seeds[part], 6).to(device, non_blocking=device.type == "cuda")
            if getattr(diffusion, "mixed", None):           # mdm: which resolutions an image has
                cond["places"] = torch.arange(lo, hi)[part]
            with parallel.accumulate(net, last=a == args.grad_accum - 1):
                with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                    loss = diffusion.loss(net, x0, t, noise, **cond)["loss"]                        # (B,)
                (loss.mean() / args.grad_accum).backward()                  # gradients add up, so divide
            log.loss(loss, t)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, step, args.ema_decay)
        log.step(norm)

        # Each process gets its own signal to stop, but all stop at the same step: none may wait for one that has left.
        batch = stop.next(batches)                                          # None after the last one or a signal
        at_end = team.any(batch is None or checkpoint.failed())

        # Once in a while, all processes: look at the numbers. This waits for the GPU.
        if step % args.log_every == 0 or step % args.ckpt_every == 0 or at_end:
            log.write(step, rate)

        # Once in a while, all processes: save. Each may hold a part of the weights; the first one writes, and no step
        # waits for that.
        if step % args.ckpt_every == 0 or at_end:
            log.bar.clear()
            checkpoint.save_aside(team, folder, args, step, wait=at_end, model=model, ema=ema, opt=optimizer)

        # Once in a while: draw a small grid with the averaged weights, always from the same noise. The first process
        # draws, and the others wait at their next step. With shards all run the model, since each holds a part of it.
        if args.sample_every and not at_end and (
                step % args.sample_every == 0 or step == min(100, args.sample_every)):
            with log.pause(), parallel.all_cores():
                if team.rank == 0 or args.shard:
                    picture = sample.preview(ema, diffusion, args, encode, vae, device)
                if team.rank == 0:
                    log.picture(picture, step)
        if at_end:
            break

    # The end. `net` (DDP) and `loss` (its graph) use the process group, so free them first. Otherwise the group's
    # destructor keeps Python's lock while it waits for threads that may want the lock. We saw that hang.
    log.bar.close()
    net = loss = model = ema = optimizer = log = None                       # sampling needs their memory, too
    team.leave()
    checkpoint.let_go()
    stop.over()
    finished = step == args.max_steps
    again = " with --resume auto" * (args.resume == "none")
    team.say(f"trained     {step} of {args.max_steps} steps. To go on, pass a larger --max-steps: the learning rate "
             f"then follows the longer schedule." if finished else
             f"stopped     at step {step}, saved. The same command{again} continues.")
    drawn = finished and args.sample_every and not stop.asked
    if team.rank == 0:
        if drawn:
            with parallel.all_cores():
                final_samples(folder, args, *drawing, encode=encode)
        summarise(folder, folder / "samples.png" if drawn else None)
        if finished and not drawing:
            print(further(args, folder, argv, world))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))                   # nothing to save before the first step
    run(main)
