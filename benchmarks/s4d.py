"""The S4D kernel of diffussm.py against the textbook form: time, memory kept for backward, error; and what
that means for sampling.

    python benchmarks/s4d.py                     6 minutes on two CPU cores
    python benchmarks/s4d.py --sizes 2304x1024

float32, forward and backward to log_Abar and CB (and u). Forms take turns in one process, so ratios hold on
a noisy machine and milliseconds do not.
"""
import argparse
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from timing import median, ratio, table, turns  # noqa: E402

from support.checkpoint import load_paper  # noqa: E402

diffussm = load_paper("diffussm")


def kept_megabytes(function, inputs):
    """Distinct memory that autograd keeps for backward, beside the inputs, which exist anyway."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = function(*inputs)
    for x in inputs:
        kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values()) / 1e6, y.detach()


def two_flipped(u, log_Abar, CB, D):
    """The common way: a convolution per direction, one of them between two flips."""
    def one(u, K):
        L = u.shape[1]
        Y = torch.fft.rfft(u.mT, n=2 * L) * torch.fft.rfft(K, n=2 * L)
        return torch.fft.irfft(Y, n=2 * L)[..., :L].mT
    half, L = u.shape[2] // 2, u.shape[1]
    left = one(u[..., :half], diffussm.kernel_ref(log_Abar[:half], CB[:half], L))
    right = one(u[..., half:].flip(1), diffussm.kernel_ref(log_Abar[half:], CB[half:], L)).flip(1)
    return torch.cat([left, right], dim=2) + D * u


def compare(title, forms, inputs, device, rounds):
    """Prints a line per form; ratios are to the first, errors to it in float64."""
    def run(form):
        y = form(*inputs)
        return torch.autograd.grad(y, inputs, torch.ones_like(y))
    with torch.no_grad():
        forward = turns([lambda f=f: f(*inputs) for f in forms.values()], device, rounds)
    both = turns([lambda f=f: run(f) for f in forms.values()], device, rounds)
    kept, results = zip(*(kept_megabytes(f, inputs) for f in forms.values()))
    with torch.no_grad():
        exact = next(iter(forms.values()))(
            *(x.to(torch.complex128 if x.is_complex() else torch.float64) for x in inputs))
    print(title)
    table(["", "forward ms", "ratio", "with backward ms", "ratio", "kept for backward MB", "ratio", "error"],
          [[name, median(f), f"{ratio(forward[0], f):.1f}x", median(b), f"{ratio(both[0], b):.1f}x", k,
            f"{kept[0] / k:.1f}x", f"{((y - exact).abs().max() / exact.abs().max()).item():.0e}"]
           for name, f, b, k, y in zip(forms, forward, both, kept, results)])


def sampling(device, rounds, images=64, steps=5):
    """A step of a sampler costs the same as any other, so few are enough."""
    torch.manual_seed(0)
    model, diffusion = diffussm.build("tiny", (1, 28, 28))
    model.eval().to(device)

    def sample(frozen, kernel):
        net = model if frozen else lambda *args: model(*args)
        with mock.patch.object(diffussm, "kernel", kernel):
            diffusion.sample(net, model.shape, torch.arange(images, device=device), steps=str(steps))
    forms = {"textbook, at every step": (False, diffussm.kernel_ref),
             "two small ones, every step": (False, diffussm.kernel),
             "two small ones, frozen": (True, diffussm.kernel)}
    times = turns([lambda f=f: sample(*f) for f in forms.values()], device, rounds)
    print(f"sampling {images} images of 28x28, tiny; {steps} of 50 steps of DDIM are timed")
    table(["", "50 steps, s", "ratio"], [[name, median(t) * 0.05 / steps, f"{ratio(times[0], t):.2f}x"]
                                         for name, t in zip(forms, times)])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--sizes", nargs="*", default=["1152x1024", "1152x4096", "2304x1024"],
                   help="channels x length; XL has 2304 channels")
    p.add_argument("--state", type=int, default=64)
    p.add_argument("--tokens", type=int, default=4096, help="of all images, for the convolution")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    device = torch.device(args.device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, N = {args.state}\n")
    for size in args.sizes:
        H, L = map(int, size.split("x"))
        torch.manual_seed(0)
        layer = diffussm.BidirectionalS4D(H, args.state).to(device)
        log_Abar, CB = (x.detach().requires_grad_() for x in layer.discretized())
        batch = max(1, args.tokens // L)
        u, D = torch.randn(batch, L, H, device=device, requires_grad=True), layer.D.detach()
        compare(f"kernel, {H} channels, L = {L}", {
            "textbook Vandermonde": lambda a, c: diffussm.kernel_ref(a, c, L),
            "two small ones": lambda a, c: diffussm.kernel(a, c, L)}, [log_Abar, CB], device, args.rounds)
        compare(f"kernel and both directions, {H} channels, L = {L}, batch {batch}", {
            "textbook, two convolutions": lambda u, a, c: two_flipped(u, a, c, D),
            "ssm": lambda u, a, c: diffussm.ssm(u, a, c, D)}, [u, log_Abar, CB], device, args.rounds)
    sampling(device, args.rounds)


if __name__ == "__main__":
    main()
