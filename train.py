"""Train a diffusion model of one of the papers. Reads top to bottom; `main` is the whole story.

    python train.py                                            DiS tiny on drawn shapes, minutes
    python train.py --data mnist                               digits (downloaded once, 11 MB)
    python train.py --data path/to/images --image-size 64      your own pictures
    python train.py --latents path/to/latents                  what `python -m support.prepare encode` wrote
    torchrun --standalone --nproc_per_node=8 train.py --preset DiS-S/2 --data cifar10 ...
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py ...

Run the same command again and it continues, on a CPU bit for bit, from results/<model>-<data>/latest.pt.
"""
import argparse
import copy
import functools
import math
import os
import re
import signal
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))    # our files are found under PYTHONSAFEPATH, too

import sample
from diffusion import UserError, fold, normal, uniform
from support import checkpoint, cost, inputs, latents, parallel
from support.cli import Parser, fail, number, option, run, told_plainly
from support.datasets import batch_order
from support.pictures import save_image
from support.text import full_name

BINS = 5                                     # the loss is also logged in this many bands of t


# --- command line ---------------------------------------------------------------------------

def parse(argv):
    p = Parser(__doc__.splitlines()[0])
    flag, count, below_1 = argparse.BooleanOptionalAction, number(int, 1), number(float, 0, below=1)
    g = p.add_argument_group("what")
    g.add_argument("--model", default="dis", help="dis, diffussm, mdm, cunet, or a path to a .py file")
    g.add_argument("--preset", default="tiny", help="of the file's CONFIGS: tiny, mini, DiS-S/2 ...")
    g.add_argument("--set", type=option, nargs="*", default=[], metavar="KEY=VALUE",
                   help="change options of the preset: --set skip=add patch=8 (a wrong key lists all)")
    g.add_argument("--data", default="shapes", help="shapes, moving, mnist, fashion, cifar10, or a folder")
    g.add_argument("--data-dir", help="where data sets lie or are downloaded to (default: a cache)")
    g.add_argument("--latents", metavar="DIR", help="instead of images: what `python -m support.prepare encode` wrote")
    g.add_argument("--image-size", help="32, or HxW such as 24x40 (default: the data's own)")
    g.add_argument("--frames", type=number(int, 1, 1024), help="per clip of moving (default: 8); 1: pictures")
    g.add_argument("--num-classes", type=number(int, -1), default=-1, help="-1: as the data has; 0: none")
    g.add_argument("--cond", choices=["auto", "class", "text"], default="auto",
                   help="what tells the model what to draw; auto: the class, or the caption of data without "
                        "classes if the model reads text")
    g.add_argument("--text-encoder", default="bytes", metavar="NAME",
                   help="bytes: learned along; or a T5 of Hugging Face, or its folder (needs transformers)")
    g.add_argument("--hold-out", nargs="+", default=[], metavar="WORDS",
                   help="leave out examples with these words in the caption: --hold-out 'red star' heart")
    g.add_argument("--hflip", action=flag, default=False, help="mirror half of the images")
    g = p.add_argument_group("length")
    g.add_argument("--max-steps", type=count, default=4000, help="optimizer steps")
    g.add_argument("--global-batch-size", type=count, default=32, help="images per step, over all processes")
    g.add_argument("--grad-accum", type=count, default=1, help="micro-batches per step and process")
    g = p.add_argument_group("optimisation")
    g.add_argument("--lr", type=number(float), default=2e-3, help="peak learning rate of AdamW")
    g.add_argument("--lr-schedule", choices=["cosine", "constant"], default="cosine",
                   help="after the warm-up: to zero at --max-steps, or no change")
    g.add_argument("--warmup-steps", type=number(int), default=100, help="the rate rises linearly over these")
    g.add_argument("--beta2", type=below_1, default=0.99, help="AdamW's second-moment decay")
    g.add_argument("--weight-decay", type=number(float), default=0.0, help="AdamW's")
    g.add_argument("--grad-clip", type=number(float), default=1.0, help="largest gradient norm; 0: no limit")
    g.add_argument("--ema-decay", type=below_1, default=0.9999,
                   help="of the averaged weights; in early steps (1 + step) / (10 + step), if lower")
    g.add_argument("--cond-dropout", type=below_1, default=0.1,
                   help="chance to hide an image's class or caption, so that guidance can ask for none")
    g = p.add_argument_group("system")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    g.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                   help="auto: bf16 autocast and TF32 on GPUs that have them; fp32: neither")
    g.add_argument("--compile", action=flag, default=False, help="torch.compile the model")
    g.add_argument("--grad-checkpointing", action=flag, default=False,
                   help="recompute activations in backward: less memory, a third more time")
    g.add_argument("--shard", action=flag, default=False,
                   help="each process keeps a part of the weights (FSDP2): for models that outgrow a GPU")
    g.add_argument("--num-workers", type=number(int), default=0, metavar="N",
                   help="processes that prepare batches, beside each that trains; for large folders")
    g.add_argument("--seed", type=number(int), default=0, help="of the data's order, noise, first weights")
    g = p.add_argument_group("output")
    g.add_argument("--results-dir", default="results", help="runs are folders in here")
    g.add_argument("--name", help="the run's folder (default: <model>-<data>)")
    g.add_argument("--resume", default="auto", metavar="auto|none|PATH",
                   help="auto: continue the run if it exists; none: begin anew, the old folder is "
                        "renamed; PATH: a new run goes on from this checkpoint, at its step, perhaps with "
                        "another --lr")
    g.add_argument("--init-inner", metavar="PATH",
                   help="progressive training (mdm): a smaller run, whose weights the inner network gets")
    g.add_argument("--log-every", type=count, default=50, help="steps between lines of log.csv")
    g.add_argument("--sample-every", type=number(int), default=500,
                   help="steps between sample grids, the first after 100 already; 0: none")
    g.add_argument("--vae", metavar="NAME",
                   help="decodes the grids of latents (default: they are shown in false colours)")
    g.add_argument("--ckpt-every", type=count, default=500, help="steps between checkpoints")
    g.add_argument("--keep-ckpts", type=count, default=2, help="how many numbered checkpoints to keep")
    g = p.add_argument_group("checking")
    g.add_argument("--overfit-one-batch", action=flag, default=False,
                   help="the same images and noise at every step: the loss must fall towards 0")
    g.add_argument("--smoke", action="store_true",
                   help="one step, save, resume, one more, sample; leaves nothing behind")
    g.add_argument("--dry-run", type=count, nargs="?", const=0, default=None, metavar="GPUS",
                   help="print the plan and what memory each of so many GPUs needs, and exit")
    args = p.parse_args(argv)
    args.set, args.text_encoder = dict(args.set), full_name(args.text_encoder)
    args.vae = args.vae and full_name(args.vae)
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


def make_batch(batch, seeds, dataset, diffusion, args, encode, device):
    """One micro-batch on its device with its random draws, each a function of (seed, step, slot):
    x0 (B, C, [T,] H, W), t (B,), noise (B, ..), cond."""
    seeds = seeds.to(device, non_blocking=True)                                            # (B,)
    x0 = dataset.prepare(batch["x"].to(device, non_blocking=True), seeds)
    if args.hflip:
        flip = uniform(fold(seeds, 2)) < 0.5
        x0 = torch.where(flip.view(-1, *[1] * (x0.ndim - 1)), x0.flip(-1), x0)
    t = (uniform(fold(seeds, 0)) * diffusion.T).long()
    noise = normal(fold(seeds, 1), diffusion.noise_shape(x0.shape[1:]))
    hide = uniform(fold(seeds, 3)) < args.cond_dropout
    if args.num_classes:
        return x0, t, noise, {"y": torch.where(hide, -1, batch["y"].to(device, non_blocking=True))}
    if not encode:
        return x0, t, noise, {}
    text, mask = (batch["text"], batch["text_mask"]) if "text" in batch else encode(batch["caption"])
    text, mask = text.to(device, non_blocking=True), mask.to(device, non_blocking=True)
    text = text if text.dtype == torch.long else text.float()           # bytes; stored embeddings are float16
    return x0, t, noise, {"text": text, "text_mask": mask & ~hide[:, None]}               # (B, L, ..), (B, L)


def final_samples(folder, args, *flags, encode=None):
    """What `python sample.py` draws, into the run's folder."""
    sample.main(["--ckpt", str(folder), "--out", str(folder / "samples.png"), "--device", args.device, *flags,
                 *["--vae", args.vae or "none"] * bool(args.latents),
                 *["--model", args.model] * args.model.endswith(".py")], encode)


def smoke(argv, args):
    """One step of everything, in a temporary folder."""
    if args.dry_run is not None or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("--smoke goes without --dry-run and without torchrun: drop them")
    argv = [a for a in argv if a != "--smoke"]
    with tempfile.TemporaryDirectory() as folder:
        common = argv + ["--results-dir", folder, "--name", "smoke", "--resume", "auto",
                         "--sample-every", "0", "--log-every", "1", "--ckpt-every", "1"]
        main(common + ["--max-steps", "1"])
        main(common + ["--max-steps", "2"])
        final_samples(Path(folder) / "smoke", args, "--steps", "2", "--num-samples", "4")
    print("smoke: one step, save, resume, one step and sampling all worked")


# --- the story -----------------------------------------------------------------------------

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.smoke:
        return smoke(argv, args)

    # Processes. torchrun starts one per GPU and tells each its rank; without it there is just one. A dry run
    # pretends that there are as many as it is asked for.
    rank, world = int(os.environ.get("RANK", 0)), args.dry_run or int(os.environ.get("WORLD_SIZE", 1))
    share = world * args.grad_accum
    if args.global_batch_size % share:
        fail(f"--global-batch-size {args.global_batch_size} cannot be split over {world} processes x "
             f"--grad-accum {args.grad_accum}: try {max(1, args.global_batch_size // share) * share}")
    if args.shard and world == 1:
        fail("--shard splits a model over processes, and this is one: start more by torchrun, or drop it")
    micro = args.global_batch_size // share
    main_process = rank == 0

    say = functools.partial(print, flush=True) if main_process else lambda text: None
    with told_plainly():
        device = parallel.pick_device(args.device)
    args.bf16 = parallel.set_precision(args.precision, device)
    if args.dry_run:                        # the plan is for GPUs that have it, whatever this machine has
        args.bf16 = args.precision != "fp32"

    # Data, and what it says of the model: args.shape, .num_classes, .text and more are written here.
    with told_plainly():
        paper = checkpoint.load_paper(args.model)
        dataset, encode = inputs.for_training(args, paper, device)

    # Model. Built from the same seed everywhere, so that all processes start alike.
    torch.manual_seed(args.seed)
    # in a file of your own a ValueError is more likely a bug than a wrong flag: show it whole
    with nullcontext() if args.model.endswith(".py") else told_plainly():
        with nullcontext() if args.dry_run is None else torch.device("meta"):
            model, diffusion = paper.build(args.preset, dataset.shape, args.num_classes,
                                           **({"text": args.text} if encode else {}), **args.set)
    if args.grad_checkpointing:
        if not hasattr(model, "unit"):
            fail(f"{args.model} does not say which of its modules to recompute (unit): drop --grad-checkpointing")
    parameters = sum(p.numel() for p in model.parameters())
    macs = cost.multiply_adds(model, diffusion, cost.blank_batch(diffusion, dataset.shape, 1, args.num_classes,
                                                                 args.text))
    macs = "unknown" if macs is None else f"{macs / 1e6:,.1f}M"
    name = re.sub(r"[^\w.-]+", "-", f"{Path(args.model).stem}-{Path(args.latents or args.data).name}")
    folder = Path(args.results_dir) / (args.name or name)
    say(f"device      {device} ({'--device' if args.device != 'auto' else 'the best found'}), "
        f"{world} process{'es' if world > 1 else ''}, {'bf16 autocast' if args.bf16 else 'float32'}\n"
        f"data        {dataset.name}: {len(dataset):,} of {'x'.join(map(str, dataset.shape))}, "
        f"{dataset.condition}\n"
        f"model       {args.model} {args.preset}: {parameters:,} parameters, {macs} multiply-adds "
        f"per image and forward pass\n"
        f"training    {args.max_steps:,} steps of {args.global_batch_size} images "
        f"({world} x {args.grad_accum} x {micro}), peak learning rate {args.lr:g}\n"
        f"folder      {folder}\n"
        f"pictures    python sample.py --ckpt {folder}")
    if args.dry_run is not None:
        batch = cost.blank_batch(diffusion, dataset.shape, micro, args.num_classes, args.text)
        with told_plainly():
            return say(cost.report(cost.table(model, diffusion, batch, world, args.bf16)))

    with told_plainly():                    # before anything is renamed or made
        vae = latents.VAE(args.vae, device) if args.vae and main_process else None

    # Resume: what a run needs beside its arguments is weights, optimizer and step. The first process looks,
    # all read what it found.
    team = parallel.Team(device)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0      # by torchrun, not you
    with told_plainly():
        if args.init_inner and args.resume not in ("auto", "none"):
            raise UserError("--resume PATH and --init-inner both begin from weights: drop one")
        origin = team.first(lambda: checkpoint.origin(args, folder, restarted, say))
        team.first(lambda: checkpoint.prepare(folder))
        saved = checkpoint.read(origin, checked=True) if origin else None
        if saved:
            own = folder in origin.parents      # then what it first began from stays in its record
            args.init_inner = saved["args"].get("init_inner") if own else None
            if own and args.resume == "auto" and saved["args"]["resume"] != "none":
                args.resume = saved["args"]["resume"]
        elif args.init_inner:
            checkpoint.begin_inside(model, args)
            say(f"begun       from the network of {args.init_inner}")

    model.to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    if args.grad_checkpointing:
        parallel.recompute(model)
    start = 0                               # steps taken before
    if saved:
        start = saved["step"]
        try:
            model.load_state_dict(saved["model"])
            ema.load_state_dict(saved["ema"])
        except (RuntimeError, KeyError):
            fail(f"the weights in {origin} do not fit {args.model} {args.preset} as it is now: use the "
                 f"code that trained them, or --name NEW for a run of its own")
    net = team.spread(model, ema, compiled=args.compile, shard=args.shard)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, args.beta2),
                                  weight_decay=args.weight_decay, fused=device.type != "mps")
    if saved:
        if saved["opt"]:
            parallel.load_optimizer(optimizer, saved["opt"])
        say(f"resumed     at step {start}{'' if saved['opt'] else ', with a new optimizer'}")
        saved = None                        # a large file may be mapped: let go of it
    stop, latest = parallel.Interruption(), folder / "latest.pt"
    bar = tqdm(total=args.max_steps, initial=start, unit="step", disable=not main_process,
               mininterval=0.5 if sys.stderr.isatty() else 30, dynamic_ncols=True)
    with told_plainly():
        if main_process:
            checkpoint.describe(folder, args, argv, world)
            fields = ["step", "images", "loss", *(f"loss_t{b}" for b in range(BINS)), "grad_norm", "lr",
                      "images_per_s", "memory_mb"] + ["nfe"] * hasattr(model, "nfe")
            log = checkpoint.open_log(folder / "log.csv", fields, start)

    def save(step):
        """All processes, since each may hold a part of the weights; the first writes."""
        state = parallel.whole({"model": model.state_dict(), "ema": ema.state_dict(),
                                "opt": optimizer.state_dict()})
        bar.clear()
        with told_plainly():                # a full disk
            team.first(lambda: checkpoint.save(
                {"version": checkpoint.VERSION, **state, "step": step,
                 "images": step * args.global_batch_size, "args": vars(args)}, folder, args.keep_ckpts))

    def draw(step):
        """A small grid from the same noise every time, of the averaged weights. The others wait at the next
        step; with shards all run the model, since each holds a part of it."""
        if main_process or args.shard:
            sheet = sample.preview(ema, diffusion, args, encode, vae, device)
        if main_process:
            path = folder / "samples" / f"step_{step:07d}.png"
            try:
                save_image(sheet, path)
            except OSError as e:            # a picture is not worth the run
                path = f"no picture ({e})"
            bar.write(f"step {step}: {path}")

    # The loop. Of each global batch, cut into `share` slices, this process takes grad_accum.
    lo, hi = rank * args.grad_accum * micro, (rank + 1) * args.grad_accum * micro
    order = batch_order(len(dataset), args.seed, args.global_batch_size, start, args.max_steps, lo, hi)
    if args.overfit_one_batch:
        order.steps = [0] * len(order)
    losses, norms, since, began = [], [], start, time.perf_counter()
    bins = torch.zeros(2, BINS, device=device)                      # sums, counts
    model.train()
    step = start
    batches = inputs.batches(dataset, order, args.num_workers, pinned=device.type == "cuda")
    for step, batch in enumerate(batches, start=start + 1):          # steps are counted from 1
        seeds = fold(args.seed, 0 if args.overfit_one_batch else step, torch.arange(lo, hi))       # (B,)
        torch.manual_seed(int(fold(args.seed, step, rank)))         # for dropout, if a model has any
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, args)
        total = torch.zeros((), device=device)
        for a in range(args.grad_accum):
            part = slice(a * micro, (a + 1) * micro)
            x0, t, noise, cond = make_batch({k: v[part] for k, v in batch.items()}, seeds[part],
                                            dataset, diffusion, args, encode, device)
            # Gradients SUM over micro-batches, and we want the mean: hence the division.
            with parallel.accumulate(net, last=a == args.grad_accum - 1):
                with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                    loss = diffusion.loss(net, x0, t, noise, **cond)["loss"]               # (B,)
                (loss.mean() / args.grad_accum).backward()
            total += loss.detach().mean() / args.grad_accum
            band = t * BINS // diffusion.T
            bins[0].index_add_(0, band, loss.detach())
            bins[1].index_add_(0, band, torch.ones_like(loss))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, step, args.ema_decay)
        losses.append(total)
        norms.append(parallel.full(norm))
        bar.update()

        # Stop together: each process has its own signal, and none may wait for one that left.
        stopping = team.any(stop.asked)
        at_end = stopping or step == args.max_steps

        # Once in a while, all processes: look at the numbers (this waits for the GPU).
        if step % args.log_every == 0 or step % args.ckpt_every == 0 or at_end:
            stats = team.sum(torch.cat([torch.stack(losses) / world, bins.flatten()])).tolist()
            loss_list, sums, counts = stats[:len(losses)], stats[-2 * BINS:-BINS], stats[-BINS:]
            norm_list = torch.stack(norms).tolist()
            bad = [s for s, values in enumerate(zip(loss_list, norm_list), step - len(losses) + 1)
                   if not all(map(math.isfinite, values))]
            if bad:             # every process sees the same numbers, so every process stops here
                bar.close()
                fail(f"the loss or its gradient is not finite at step {bad[0]}: "
                     f"{f'{latest} is from before; ' if latest.exists() else ''}try a new run with "
                     f"--lr {args.lr / 2:g}{' or --precision fp32' if args.bf16 else ''}")
            rate = (step - since) * args.global_batch_size / (time.perf_counter() - began)
            mean = sum(loss_list) / len(loss_list)
            if main_process:
                row = [step, step * args.global_batch_size, f"{mean:.6g}",
                       *(f"{s / c:.6g}" if c else "" for s, c in zip(sums, counts)),
                       f"{sum(norm_list) / len(norm_list):.4g}", f"{learning_rate(step - 1, args):.4g}",
                       f"{rate:.4g}", f"{parallel.memory_mb(device):.0f}"]
                if hasattr(model, "nfe"):           # evaluations in the ODEs of the last step
                    row.append(f"{model.nfe:.4g}")
                with told_plainly():
                    checkpoint.write_line(log, row)
                bar.set_postfix_str(f"loss {mean:.4f}, {rate:.0f} images/s")
            losses, norms, since, began = [], [], step, time.perf_counter()
            bins.zero_()

        # Once in a while: save, and show what it can do.
        if step % args.ckpt_every == 0 or at_end:
            save(step)
        if args.sample_every and not at_end and (
                step % args.sample_every == 0 or step == min(100, args.sample_every)):
            pause = time.perf_counter()
            draw(step)
            began += time.perf_counter() - pause                     # images/s is of training alone
        if stopping:
            break

    bar.close()
    # `net` (DDP) and `loss` (its graph) hold on to the process group. Freed after it, they would make its
    # destructor hold Python's lock while it waits for threads that may want the lock: seen to hang.
    net = loss = model = ema = optimizer = None             # and samples need the memory
    team.leave()
    checkpoint.let_go()
    stop.over()
    if main_process:
        log.close()
        if step < args.max_steps:
            again = " with --resume auto" * (args.resume == "none")
            return say(f"stopped     at step {step}, saved. The same command{again} continues.")
        say(f"trained     {step} of {args.max_steps} steps. A larger --max-steps continues, at the rates of "
            f"the longer schedule.")
        if args.sample_every and not stop.asked:
            final_samples(folder, args, encode=encode)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))           # before the first step: nothing to save
    run(main)
