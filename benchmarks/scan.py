"""Compares the selective scan of support/scan.py with its definition and with other libraries: time and memory.

    python benchmarks/scan.py                       3 minutes on two CPU cores
    python benchmarks/scan.py --sizes 16x256x768    b x L x e: rows, tokens, channels

Other scans are timed if they are installed: mambapy's parallel scan (pip install mambapy), mamba_ssm (CUDA). All
numbers are float32. The scans take turns in one process, so on a busy machine you can trust the ratios, but not the
milliseconds. Memory is the peak of forward and backward, without the inputs; on a CPU each scan has its own process.
"""
import argparse
import math
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from timing import in_fresh_process, median, milliseconds, peak_megabytes, ratio, table, turns  # noqa: E402

from support import scan  # noqa: E402
from support.checkpoint import load_paper  # noqa: E402

dis = load_paper("dis")


def inputs(b, L, e, N, device, dtype=torch.float32):
    """As at the start of a training: delta log-uniform in [0.001, 0.1], A about -1 .. -N."""
    torch.manual_seed(0)
    delta = torch.empty(b, L, e).uniform_(math.log(1e-3), math.log(0.1)).exp()
    A = -torch.arange(1., N + 1).repeat(e, 1) * (0.1 * torch.randn(e, N)).exp()
    x = torch.randn(b, L, e), delta, A, torch.randn(b, L, N), torch.randn(b, L, N), torch.randn(e)
    return [v.to(device, dtype).requires_grad_() for v in x]


def plain(*x):
    """Our scan without the fused kernels: `both` switches them off."""
    return scan.selective_scan(*x)


def forms(device):
    """-> {name: function}, for the scans that are installed."""
    found = {"definition": dis.selective_scan_ref}
    if device.type == "cuda":
        found["chunked, PyTorch"] = plain
    found["ours"] = scan.selective_scan
    try:
        from mambapy.pscan import pscan

        def mambapy(u, delta, A, B, C, D):
            h = pscan((delta[..., None] * A).exp(), (delta * u)[..., None] * B[:, :, None])     # (b, L, e, N)
            return (h @ C[..., None])[..., 0] + D * u
        found["mambapy pscan"] = mambapy
    except ImportError:
        pass
    try:
        scan.mamba_ssm_scan(*inputs(1, 2, 4, 2, device))
        found["mamba_ssm"] = scan.mamba_ssm_scan
    except (ImportError, RuntimeError, NotImplementedError):      # it is for CUDA only
        pass
    return found


def both(function, x):
    """Forward, and backward if there is something to differentiate."""
    engine = (lambda device, dtype: (scan.chunked, scan.chunked_backward)) if function is plain else scan.engine
    with mock.patch.object(scan, "engine", engine):
        y = function(*x)
        return y, *(torch.autograd.grad(y, x, torch.ones_like(y)) if y.requires_grad else ())


def error(got, want):
    """The largest error of y and the six gradients, each relative to its largest entry."""
    return max(((g.double() - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want))


def compare(size, args, device):
    """Prints a table of all forms at one size. Ratios are to ours."""
    found, x = forms(device), inputs(*size, args.state, device)
    names, times = list(found), 10 if device.type == "cuda" else 1
    often = names[1:]               # the definition is timed once, warmed up: it may take half a minute
    with torch.no_grad():
        forward = turns([lambda f=found[n]: both(f, x) for n in often], device, args.rounds, times)
        forward.insert(0, [milliseconds(lambda: both(found[names[0]], x), device) for _ in range(2)][1:])
    train = turns([lambda f=found[n]: both(f, x) for n in often], device, args.rounds, times)
    train.insert(0, [milliseconds(lambda: both(found[names[0]], x), device)])
    exact = both(dis.selective_scan_ref, inputs(*size, args.state, device, torch.float64))
    errors = [error(both(f, x), exact) for f in found.values()]
    del exact
    if device.type == "cuda":
        memory = [peak_megabytes(lambda: both(f, x), device) for f in found.values()]
    else:
        sizes = ["--sizes", "x".join(map(str, size)), "--state", args.state]
        memory = [in_fresh_process("--memory-of", name, *sizes) for name in names]
    ours = names.index("ours")
    print(f"(b, L, e) = {size}, N = {args.state}")
    table(["", "forward ms", "ratio", "with backward ms", "ratio", "memory MB", "ratio", "error"],
          [[name, median(f), ratio(f, forward[ours]), median(t), ratio(t, train[ours]), m,
            m and m / memory[ours], f"{e:.0e}"]
           for name, f, t, m, e in zip(names, forward, train, memory, errors)])
    return median(train[ours])


def growth(args, device):
    """How the time of our scan, forward and backward, grows if only one of b, L, e and N grows."""
    start = dict(b=4, L=512, e=256, N=16)
    rows = []
    for name in start:
        sizes = [{**start, name: start[name] * 2**i} for i in range(4)]
        xs = [inputs(*s.values(), device) for s in sizes]
        times = turns([lambda x=x: both(scan.selective_scan, x) for x in xs], device, args.rounds)
        rows.append([name, *(f"{s[name]}: {median(t):.1f} ms" for s, t in zip(sizes, times)),
                     f"{ratio(times[-1], times[0]):.1f}x"])
    print("growth of ours, with backward; all else " + ", ".join(f"{k} = {v}" for k, v in start.items()))
    table(["", "", "", "", "", "8 times as large"], rows)


def bound(size, N, device, took):
    """On a GPU: the time to move the bytes alone, and the time to compute the exps alone. A copy and a loop of exps
    measure first how fast this GPU does each."""
    (b, L, e), T, blocks = size, scan.CHUNK["cuda"][0], -(-size[2] // scan.BLOCK)
    x = torch.empty(2**28, device=device)
    copy, loop = turns([x.clone, exp_loop(device)], device, 5, 10)
    copied, exps = 8e3 * x.numel() / median(copy), 64e3 * 2**22 / median(loop)              # per second
    # forward reads u, delta and writes y; backward reads u twice, delta, dy and writes du, ddelta; the states of
    # every chunk are written once and read twice; then B, C and the parts of dB, dC
    numbers = b * L * (9 * e + 3 * N * e / T + 4 * N * blocks + 4 * N)
    count = 2 * b * L * e * N
    move, compute = 4e3 * numbers / copied, 1e3 * count / exps
    print(f"bound: {4e-6 * numbers:.0f} MB at {copied / 1e9:.0f} GB/s take {move:.3f} ms, {count / 1e6:.0f}M "
          f"exps at {exps / 1e9:.0f} G/s {compute:.3f} ms; ours {took:.3f}, {took / max(move, compute):.1f} "
          f"times the larger\n")


triton, tl = scan.triton, getattr(scan, "tl", None)
if triton is not None:
    @triton.jit
    def exp_kernel(p, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(p + i)
        for _ in range(64):
            x = tl.exp2(x) - 1.0
        tl.store(p + i, x)


def exp_loop(device, n=2**22):
    """-> a function that applies 64 exps to each of n numbers, one after another."""
    x = torch.zeros(n, device=device)
    return lambda: exp_kernel[(n // 256,)](x, 256, num_warps=4)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--sizes", nargs="*", default=["64x49x256", "16x256x768", "2x4096x768"])
    p.add_argument("--state", type=int, default=16)
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = p.parse_args()
    device = torch.device(args.device)
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    if args.memory_of:
        f = forms(device)[args.memory_of]
        both(f, inputs(1, 40, 8, args.state, device))           # load the libraries before measuring
        x = inputs(*sizes[0], args.state, device)
        return print(peak_megabytes(lambda: both(f, x), device))
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads\n")
    for size in sizes:
        took = compare(size, args, device)
        if scan.engine(device, torch.float32)[0] is scan.fused:
            bound(size, args.state, device, took)
    growth(args, device)


if __name__ == "__main__":
    main()
