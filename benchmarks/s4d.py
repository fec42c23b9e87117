"""The S4D kernel of diffussm.py against the textbook form: time, memory kept for backward, error. Then what
that means for sampling, and how a training step grows with the number of tokens.

    python benchmarks/s4d.py                     5 minutes on two CPU cores
    python benchmarks/s4d.py --sizes 2304x1024

float32, forward and backward to log_Abar and CB (and u). Medians of runs that take turns, in one process,
so the ratios hold on a noisy machine and the milliseconds do not.
"""
import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from checkpoint import load_paper  # noqa: E402

diffussm = load_paper("diffussm")


def medians(functions, device, repeats):
    """Milliseconds of each, warmed up, taking turns."""
    times = [[] for _ in functions]
    for i in range(repeats + 1):
        for function, record in zip(functions, times):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                record.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(record) for record in times]


def kept_megabytes(function, known):
    """Distinct memory that autograd keeps for backward, beside `known` tensors, which exist anyway."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = function()
    for x in known:
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


def compare(title, forms, inputs, device, repeats):
    """Prints a line per form; ratios are to the first, errors to it in float64."""
    def run(form):
        y = form(*inputs)
        return torch.autograd.grad(y, inputs, torch.ones_like(y))
    with torch.no_grad():
        forward = medians([lambda f=f: f(*inputs) for f in forms.values()], device, repeats)
    both = medians([lambda f=f: run(f) for f in forms.values()], device, repeats)
    kept, results = zip(*(kept_megabytes(lambda: f(*inputs), inputs) for f in forms.values()))
    with torch.no_grad():
        exact = next(iter(forms.values()))(
            *(x.to(torch.complex128 if x.is_complex() else torch.float64) for x in inputs))
    print(f"\n{title}\n"
          f"  {'':27s} forward     ratio   with backward   ratio   kept for backward   ratio   error")
    for i, name in enumerate(forms):
        error = (results[i] - exact).abs().max() / exact.abs().max()
        print(f"  {name:27s} {forward[i]:6.0f} ms {forward[0] / forward[i]:6.1f}x {both[i]:11.0f} ms"
              f" {both[0] / both[i]:6.1f}x {kept[i]:16.0f} MB {kept[0] / kept[i]:6.1f}x   {error:.0e}")


def sampling(device, repeats, images=64, steps=5):
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
    times = medians([lambda f=f: sample(*f) for f in forms.values()], device, repeats)
    print(f"\nsampling {images} images of 28x28, tiny; {steps} steps of DDIM are timed\n"
          f"  {'':27s} 50 steps     ratio")
    for name, t in zip(forms, times):
        print(f"  {name:27s} {t * 50 / steps / 1e3:6.1f} s  {times[0] / t:8.2f}x")


def growth(device, repeats):
    """Forward and backward, the kernels in it; with one image they weigh most."""
    sizes, forms, kept = ((32, 32), (32, 64), (64, 64)), [], []
    for size in sizes:
        torch.manual_seed(0)
        model, diffusion = diffussm.build("tiny", (1, *size))
        x0, t = torch.randn(1, 1, *size, device=device), torch.tensor([500], device=device)
        forms.append(lambda m=model.to(device), d=diffusion, x0=x0, t=t: d.loss(m, x0, t, x0)["loss"].sum())
        kept.append(kept_megabytes(forms[-1], model.parameters())[0])
    times = medians([lambda f=f: f().backward() for f in forms], device, repeats)
    print("\ntraining step of one image, tiny; in brackets: times as much as in the line before\n"
          "  tokens     with backward   kept for backward     L log L")
    L = [math.prod(size) for size in sizes]
    columns = times, kept, [n * math.log2(n) for n in L]
    for i, n in enumerate(L):
        (t, t_ratio), (m, m_ratio), (_, ratio) = (
            (c[i], f"({c[i] / c[i - 1]:.2f})" if i else "") for c in columns)
        print(f"  {n:6d} {t:6.0f} ms {t_ratio:6s} {m:9.0f} MB {m_ratio:6s} {ratio:>11s}")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--sizes", nargs="*", default=["1152x1024", "1152x4096", "2304x1024"],
                   help="channels x length; XL has 2304 channels")
    p.add_argument("--state", type=int, default=64)
    p.add_argument("--tokens", type=int, default=4096, help="of all images, for the convolution")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    device = torch.device(args.device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, N = {args.state}")
    for size in args.sizes:
        H, L = map(int, size.split("x"))
        torch.manual_seed(0)
        layer = diffussm.BidirectionalS4D(H, args.state).to(device)
        log_Abar, CB = (x.detach().requires_grad_() for x in layer.discretized())
        batch = max(1, args.tokens // L)
        u, D = torch.randn(batch, L, H, device=device, requires_grad=True), layer.D.detach()
        compare(f"kernel, {H} channels, L = {L}", {
            "textbook Vandermonde": lambda a, c: diffussm.kernel_ref(a, c, L),
            "two small ones": lambda a, c: diffussm.kernel(a, c, L)}, [log_Abar, CB], device, args.repeats)
        compare(f"kernel and both directions, {H} channels, L = {L}, batch {batch}", {
            "textbook, two convolutions": lambda u, a, c: two_flipped(u, a, c, D),
            "ssm": lambda u, a, c: diffussm.ssm(u, a, c, D)}, [u, log_Abar, CB], device, args.repeats)
    sampling(device, args.repeats)
    growth(device, 3 * args.repeats)


if __name__ == "__main__":
    main()
