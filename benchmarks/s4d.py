"""Compares the S4D of diffussm.py with the textbook's: time, memory kept for backward, error, time to sample.

    python benchmarks/s4d.py                     6 minutes on two CPU cores
    python benchmarks/s4d.py --sizes 2304x1024

All numbers are float32. Gradients go to log_Abar, CB and U. The forms take turns in one process, so on a busy machine
you can trust the ratios, but not the milliseconds.
"""
import argparse
from unittest import mock

from timing import median, ratio, table, turns
import torch
import torch.nn.functional as F

from support.checkpoint import load_paper

diffussm = load_paper("diffussm")


def kept_megabytes(function, inputs):
    """-> MB that autograd keeps for backward, and the output. Tensors that share memory count once. The inputs exist
    anyway, so they do not count."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        Y = function(*inputs)
    for x in inputs:
        kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values()) / 1e6, Y.detach()


def textbook(U, log_Abar, CB, direct):
    """The common way: a convolution for each direction. The second one's input and output are flipped."""
    def one(U, K):
        L = U.shape[1]
        Y_hat = torch.fft.rfft(U.mT, n=2 * L) * torch.fft.rfft(K, n=2 * L)
        return torch.fft.irfft(Y_hat, n=2 * L)[..., :L].mT
    half, L = U.shape[2] // 2, U.shape[1]
    left = one(U[..., :half], diffussm.kernel_ref(log_Abar[:half], CB[:half], L))
    right = one(U[..., half:].flip(1), diffussm.kernel_ref(log_Abar[half:], CB[half:], L)).flip(1)
    return torch.cat([left, right], dim=2) + direct * U


def ours(U, log_Abar, CB, direct):
    """What `BidirectionalS4D` does."""
    L = U.shape[1]
    K = diffussm.kernel(log_Abar, CB, L) + F.pad(direct[:, None], (0, L - 1))
    return diffussm.convolve(U, K)


def compare(forms, inputs, device, rounds):
    """-> a dict for each form. The first form is the reference for the ratios and, in float64, for the errors."""
    def run(form):
        Y = form(*inputs)
        return torch.autograd.grad(Y, inputs, torch.ones_like(Y))
    times = 10 if device.type == "cuda" else 1          # one call may be over before the clock has started
    with torch.no_grad():
        forward = turns([lambda f=f: f(*inputs) for f in forms.values()], device, rounds, times)
    both = turns([lambda f=f: run(f) for f in forms.values()], device, rounds, times)
    kept, results = zip(*(kept_megabytes(f, inputs) for f in forms.values()))
    with torch.no_grad():
        exact = next(iter(forms.values()))(
            *(x.to(torch.complex128 if x.is_complex() else torch.float64) for x in inputs))
    return [{"": name, "forward ms": median(f), "faster": f"{ratio(forward[0], f):.1f}x",
             "with backward ms": median(b), "both, faster": f"{ratio(both[0], b):.1f}x", "kept for backward MB": k,
             "less": f"{kept[0] / k:.1f}x", "error": f"{((Y - exact).abs().max() / exact.abs().max()).item():.0e}"}
            for name, f, b, k, Y in zip(forms, forward, both, kept, results)]


def cases(channels, L, state, batch, device):
    """-> [(title, forms, inputs)]: what `compare` compares at this size."""
    torch.manual_seed(0)
    layer = diffussm.BidirectionalS4D(channels, state).to(device)
    log_Abar, CB = (x.detach().requires_grad_() for x in layer.discretized())
    U, direct = torch.randn(batch, L, channels, device=device, requires_grad=True), layer.D.detach()
    return [(f"kernel, {channels} channels, L = {L}", {
                "textbook, one large matrix": lambda a, c: diffussm.kernel_ref(a, c, L),
                "two small matrices": lambda a, c: diffussm.kernel(a, c, L)}, [log_Abar, CB]),
            (f"kernel and both directions, {channels} channels, L = {L}, batch {batch}", {
                "textbook, two convolutions": lambda U, a, c: textbook(U, a, c, direct),
                "ours": lambda U, a, c: ours(U, a, c, direct)}, [U, log_Abar, CB])]


def sampling(device, rounds, images=64, steps=5):
    """All steps of a sampler cost the same, so it is enough to time a few."""
    torch.manual_seed(0)
    model, diffusion = diffussm.build("tiny", (1, 28, 28))
    model.eval().to(device)

    def sample(frozen, kernel):
        net = model if frozen else lambda *args: model(*args)
        with mock.patch.object(diffussm, "kernel", kernel):
            diffusion.sample(net, model.shape, torch.arange(images, device=device), steps=str(steps))
    forms = {"textbook, at every step": (False, diffussm.kernel_ref),
             "two small matrices, every step": (False, diffussm.kernel),
             "two small matrices, frozen": (True, diffussm.kernel)}
    times = turns([lambda f=f: sample(*f) for f in forms.values()], device, rounds)
    print(f"sampling {images} images of 28x28, tiny; {steps} of 50 steps of DDIM are timed")
    table(["", "50 steps, s", "ratio"], [[name, median(t) * 0.05 / steps, f"{ratio(times[0], t):.2f}x"]
                                         for name, t in zip(forms, times)])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--sizes", nargs="*", default=["1152x1024", "1152x4096", "2304x1024"],
                   help="channels x tokens; XL has 2304 channels")
    p.add_argument("--state", type=int, default=64)
    p.add_argument("--tokens", type=int, default=4096, help="tokens of all images together, for the convolution")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    device = torch.device(args.device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, N = {args.state}\n")
    for size in args.sizes:
        channels, L = map(int, size.split("x"))
        for title, *case in cases(channels, L, args.state, max(1, args.tokens // L), device):
            rows = compare(*case, device, args.rounds)
            print(title)
            table(list(rows[0]), [list(row.values()) for row in rows])
    sampling(device, args.rounds)


if __name__ == "__main__":
    main()
