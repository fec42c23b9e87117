"""What train.py needs of its data: the data set that the flags name, its captions as tensors, and its batches."""
import inspect
import json
import signal
import sys

import torch
from torch.utils.data import DataLoader

from diffusion import UserError
from support import checkpoint, datasets, latents
from support.cli import end, fail
from support.text import cut, text_encoder

SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


def for_training(args, paper, device):
    """The command line and the paper's module -> the Dataset, and a function that turns captions into tensors. The
    function is None if the model is told a class or nothing. Raises UserError.

    Writes into args what a checkpoint must say about the data: shape, num_classes, class_names, num_examples, identity,
    text, prompts, space.
    """
    if args.latents:
        for flag in ("image_size", "frames", "hold_out", "hflip", "data_dir", "data"):
            if getattr(args, flag) not in (None, False, [], "shapes"):
                raise UserError(f"--{flag.replace('_', '-')} is for images, not for latents: drop it; perhaps it "
                                f"belongs to `python -m support.prepare encode`")
        dataset = latents.load(args.latents)
    else:
        if args.vae:
            raise UserError("--vae decodes latents: add --latents DIR, or drop it")
        dataset = datasets.load(args.data, args.data_dir, args.image_size, text_encoder=args.text_encoder,
                                frames=args.frames)
    if args.hold_out:
        dataset = datasets.hold_out(dataset, args.hold_out)
    classes = dataset.num_classes if args.num_classes < 0 else args.num_classes
    if classes not in (0, dataset.num_classes):
        raise UserError(f"--num-classes {classes}, but {dataset.name} has {dataset.num_classes}: drop the flag")
    encode = choose_text(args, dataset, "text" in inspect.signature(paper.build).parameters, device)
    classes = 0 if encode else classes
    if args.hold_out and classes and len(set(dataset.labels.tolist())) < classes:
        raise UserError("with this --hold-out a class has no examples: hold out less, or add --cond text")
    if args.hflip and encode and args.data == "moving":
        raise UserError("--hflip would make what moves left move right, against its caption: drop it")
    args.shape, args.num_classes, args.num_examples = list(dataset.shape), classes, len(dataset)
    args.class_names, args.space = list(dataset.class_names) if classes else [], dataset.latents
    args.identity = dataset.identity
    if encode and dataset.files:                # captions of your own, which you may edit
        args.identity = datasets.digest(json.dumps([args.identity, *dataset.captions]).encode())[:16]
    args.text, args.prompts = encode.dim if encode else 0, some_captions(dataset, args.seed) if encode else []
    dataset.condition = condition(args, dataset, encode)
    if encode and args.text == "bytes":
        dataset.texts = encode                  # then the workers make the bytes, in memory that a GPU can fetch from
    return dataset, encode


def condition(args, dataset, encode):
    """What the model is told about an image, for the plan. Further lines say what the user may not expect."""
    names, said = dataset.class_names, "no classes"
    if encode:
        most = max(len(datasets.flat([caption])) for caption in dataset.captions)
        said = f"captions ({args.text_encoder}{', stored' * bool(dataset.texts)})"
        said += f", up to {most} for an image" * (most > 1)
    elif args.num_classes:
        shown = names if len(names) <= 20 else [names[0], "...", names[-1]]
        said = f"{len(names):,} classes ({', '.join(shown)})"
    splits = sorted((name for name in names if name.lower() in SPLITS), key=lambda name: "train" in name.lower())
    if splits and (len(splits) > 1 or len(names) == 1):
        said += (f"\nnote        all of {', '.join(splits)} is trained on, as classes: if they are parts of a data "
                 f"set, pass one folder, such as --data {dataset.name}/{splits[-1]}")
    if encode:                                              # 10,000 captions take a T5's tokenizer a second or two
        captions = list(dict.fromkeys(datasets.flat(dataset.captions)))[:10_000]
        cuts = cut(encode, captions, "different captions")
        said += f"\nnote        {cuts}" * bool(cuts)
    return said


def choose_text(args, dataset, reads, device):
    """The text encoder, or None. reads: does the model read text? Raises UserError."""
    if args.cond == "class" and not dataset.num_classes or args.cond == "text" and not dataset.has_captions:
        raise UserError(f"{dataset.name} has no {'captions' if args.cond == 'text' else 'classes'}: drop --cond "
                        f"{args.cond}")
    if args.cond == "text" and not reads:
        raise UserError(f"{args.model} reads no text: pass --model mdm, or drop --cond text")
    if args.cond != "auto" and args.num_classes >= 0:
        raise UserError(f"--cond {args.cond} and --num-classes {args.num_classes} do not go together: drop one")
    auto = reads and dataset.has_captions and not dataset.num_classes and args.num_classes < 0
    if args.cond == "text" or args.cond == "auto" and auto:
        return dataset.texts or text_encoder(args.text_encoder, device)
    if args.text_encoder != "bytes":
        raise UserError("--text-encoder is for captions: add --cond text, or drop it")
    return None


def some_captions(dataset, seed, n=8):
    """The first n different captions in a random order, for the grids of samples."""
    order = datasets.permutation(seed, 0, len(dataset))[:1000]
    captions = (datasets.one_of(dataset.captions[i]) for i in order)
    return list(dict.fromkeys(caption for caption in captions if caption))[:n] or [""]


def batches(dataset, order, workers, pinned):
    """The batches of `order`. workers: the number of other processes that read them; 0: this process reads. pinned: put
    them into memory that a GPU can fetch from. If an image cannot be read, the error names it."""
    loader = iter(DataLoader(dataset, batch_size=None, sampler=order, num_workers=workers, pin_memory=pinned,
                             collate_fn=hand_over if workers else None,
                             # forked, they share the images in memory; from Python 3.14 on that must be said
                             multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
                             worker_init_fn=leave_signals_to_the_main_process))
    try:
        yield from loader
    except ConnectionError:
        raise
    except (UserError, OSError) as e:           # the message of a worker is its traceback; the last line counts
        fail(str(e).splitlines()[-1].removeprefix("diffusion.UserError: "), every_process=True)
    finally:                                    # a worker may still wait for its data
        end(getattr(loader, "_workers", []))


def hand_over(batch):
    """What each worker does with a batch: put it into memory that the main process sees. PyTorch would do that later
    itself, in a thread whose errors nobody hears; the main process would wait for ever."""
    try:
        return {k: v.share_memory_() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    except RuntimeError as e:
        raise UserError(f"no room for a batch in the memory that processes share ({str(e).splitlines()[0]}): try "
                        f"fewer --num-workers, or give the container more, as in docker run --shm-size=8g") from None


def leave_signals_to_the_main_process(worker):
    """What each worker does first. Schedulers and terminals send their signals to workers, too. A worker that ended
    then would take the last step's batch with it. Workers must not keep the run's folder locked, either. This function
    is at module level, because spawned workers import it."""
    checkpoint.let_go()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):               # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)
