"""What train.py asks of its data."""
import inspect
import signal

from torch.utils.data import DataLoader

from diffusion import UserError
from support import checkpoint, latents
from support.cli import fail
from support.datasets import hold_out, load, permutation
from support.text import text_encoder

# --- for train.py ---------------------------------------------------------------------------------

def for_training(args, paper, device):
    """The command line and the paper's module -> the Dataset, and what turns captions into tensors, or None
    if the class, or nothing, is the condition. Writes into args what a checkpoint must tell of the data:
    shape, num_classes, class_names, num_examples, text, prompts, space. Raises ValueError."""
    if args.latents:
        for flag in ("image_size", "frames", "hold_out", "hflip", "data_dir", "data"):
            if getattr(args, flag) not in (None, False, [], "shapes"):
                raise UserError(f"--{flag.replace('_', '-')} is for images and --latents are none: drop it, "
                                f"and if you need it pass it to `python -m support.prepare encode`")
        dataset = latents.load(args.latents)
    else:
        if args.vae:
            raise UserError("--vae decodes latents: add --latents DIR, or drop it")
        dataset = load(args.data, args.data_dir, args.image_size, text_encoder=args.text_encoder,
                       frames=args.frames)
    if args.hold_out:
        dataset = hold_out(dataset, args.hold_out)
    K = dataset.num_classes if args.num_classes < 0 else args.num_classes
    if K not in (0, dataset.num_classes):
        raise UserError(f"--num-classes {K}, but {dataset.name} has {dataset.num_classes}: drop the flag")
    encode = choose_text(args, dataset, "text" in inspect.signature(paper.build).parameters, device)
    K = 0 if encode else K
    if args.hold_out and K and len(set(dataset.labels.tolist())) < K:
        raise UserError("without the words held out a class has no examples: hold out less, or add "
                        "--cond text")
    if args.hflip and encode and args.data == "moving":
        raise UserError("--hflip would move what goes left to the right: drop it")
    args.shape, args.num_classes, args.num_examples = list(dataset.shape), K, len(dataset)
    args.class_names, args.space = list(dataset.class_names) if K else [], dataset.latents
    args.text, args.prompts = encode.dim if encode else 0, some_captions(dataset, args.seed) if encode else []
    stored = ", stored" * bool(dataset.texts)
    if encode and args.text == "bytes":
        dataset.texts = encode              # so that workers do it, into memory that a GPU fetches from
    dataset.condition = (f"{K} classes" if K else f"captions ({args.text_encoder}{stored})" if encode
                         else "no classes")
    return dataset, encode


def choose_text(args, dataset, reads, device):
    """The text encoder, or None. reads: the model takes text."""
    if args.cond == "class" and not dataset.num_classes or args.cond == "text" and not dataset.has_captions:
        raise UserError(f"{dataset.name} has no {'captions' if args.cond == 'text' else 'classes'}: "
                        f"drop --cond {args.cond}")
    if args.cond == "text" and not reads:
        raise UserError(f"{args.model} reads no text: pass --model mdm, or drop --cond text")
    if args.cond != "auto" and args.num_classes >= 0:
        raise UserError(f"--cond {args.cond} and --num-classes {args.num_classes} do not go together: drop "
                        f"one")
    auto = reads and dataset.has_captions and not dataset.num_classes and args.num_classes < 0
    if args.cond == "text" or args.cond == "auto" and auto:
        return dataset.texts or text_encoder(args.text_encoder, device)
    if args.text_encoder != "bytes":
        raise UserError("--text-encoder is for captions: add --cond text, or drop it")
    return None


def some_captions(dataset, seed, n=8):
    """The first n different captions in a random order, for the grids of samples."""
    order = permutation(seed, 0, len(dataset))[:1000]
    return list(dict.fromkeys(dataset.captions[i] for i in order if dataset.captions[i]))[:n] or [""]


def batches(dataset, order, workers, pinned):
    """The batches of `order`, read by so many processes beside this one, into memory that a GPU can fetch
    from if `pinned`. An image that cannot be read is told plainly."""
    loader = DataLoader(dataset, batch_size=None, sampler=order, num_workers=workers, pin_memory=pinned,
                        worker_init_fn=leave_signals_to_the_main_process)
    try:
        yield from loader
    except UserError as e:                  # a worker's message begins with its traceback
        fail(str(e).splitlines()[-1].removeprefix("diffusion.UserError: "), every_process=True)


def leave_signals_to_the_main_process(worker):
    """At module level, since spawned workers import it. What a scheduler sends reaches workers as well, and a
    worker that dies of it would take the last step's batch along. Nor do workers hold the run's folder."""
    checkpoint.let_go()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
