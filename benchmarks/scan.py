"""Compares the selective scan of support/scan.py with its definition and with other libraries: time and memory.

    python benchmarks/scan.py                       3 minutes on two CPU cores
    python benchmarks/scan.py --sizes 16x256x768    b x L x e: rows, tokens, channels

Other scans are timed if they are installed: mambapy's parallel scan (pip install mambapy), mamba_ssm (CUDA). All
numbers are float32. The scans take turns in one process, so on a busy machine you can trust the ratios, but not the
milliseconds. (The definition is too slow for that. It is timed once, after the others.) Memory is the peak of forward
and backward, without the inputs; on a CPU each scan has its own process.
"""
import argparse
import contextlib
import math
import warnings
from unittest import mock

from timing import in_fresh_process, median, milliseconds, peak_megabytes, ratio, table, turns
import torch
import torch.nn.functional as F

from support import scan
from support.checkpoint import load_paper

dis = load_paper("dis")


def inputs(b, L, e, N, device, dtype=torch.float32):
    """As at the start of a training: delta log-uniform in [0.001, 0.1], A about -1 .. -N."""
    torch.manual_seed(0)
    with torch.device(device):
        delta = torch.empty(b, L, e).uniform_(math.log(1e-3), math.log(0.1)).exp_()
        A = -torch.arange(1., N + 1).repeat(e, 1) * (0.1 * torch.randn(e, N)).exp()
        x = torch.randn(b, L, e), delta, A, torch.randn(b, L, N), torch.randn(b, L, N), torch.randn(e)
    return [v.to(dtype).requires_grad_() for v in x]


def plain(*x):
    """Our scan without the fused kernels: `both` switches them off."""
    return scan.selective_scan(*x)


def using(form):
    """A context in which our scan is "chunked" or "fused", whatever `scan.engine` would choose."""
    pair = getattr(scan, form), getattr(scan, f"{form}_backward")
    return mock.patch.object(scan, "engine", lambda *_: pair)


def forms(device):
    """-> {name: function}, for the scans that are installed."""
    found = {"definition": dis.selective_scan_ref}
    if device.type == "cuda":
        found["chunked, PyTorch"] = plain
    found["ours"] = scan.selective_scan
    with contextlib.suppress(ImportError):
        from mambapy.pscan import pscan

        def mambapy(u, delta, A, B, C, D):
            h = pscan((delta[..., None] * A).exp(), (delta * u)[..., None] * B[:, :, None])     # (b, L, e, N)
            return (h @ C[..., None])[..., 0] + D * u
        found["mambapy pscan"] = mambapy
    with contextlib.suppress(Exception):    # not here; or its compiled code does not fit: it may then fail in any way
        scan.mamba_ssm_scan(*inputs(1, 2, 4, 2, device))
        found["mamba_ssm"] = scan.mamba_ssm_scan
    return found


def both(function, x, dy=None):
    """Forward, and backward if there is something to differentiate. dy: the gradient of y; None: ones."""
    with using("chunked") if function is plain else contextlib.nullcontext():
        y = function(*x)
        return y, *(torch.autograd.grad(y, x, torch.ones_like(y) if dy is None else dy) if y.requires_grad else ())


def error(got, want):
    """The largest error of y and the six gradients, each relative to its largest entry."""
    return torch.stack([(g.double() - w).abs().max() / w.abs().max() for g, w in zip(got, want)]).max().item()


def chosen(device):
    """-> which scan the models use on this device, and the reason if there is one."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        forward, _ = scan.engine(device, torch.float32)
    return "; ".join([getattr(forward, "__name__", str(forward)), *(str(w.message) for w in heard)])


def errors(size, form, low, device):
    """-> the largest errors of y and of the gradients, against the definition in float64. form: as in `using`. low: u,
    B and C are in bf16, as autocast leaves them. Their gradients are then rounded to 8 bits."""
    x = inputs(*size, device)
    for i in (0, 3, 4) if low else ():
        x[i] = x[i].detach().bfloat16().requires_grad_()
    dy = torch.randn_like(x[1])
    with using(form):
        got = both(scan.selective_scan, x, dy)
    want = both(dis.selective_scan_ref, [v.detach().double().requires_grad_() for v in x], dy.double())
    return error(got[:1], want[:1]), error(got[1:], want[1:])


def last_row_error(size, form, device):
    """-> the largest error in the last row of the batch, for arrays with more than 2^31 numbers; None if the GPU has no
    room for u, delta, y, du, ddelta and two more that come and go."""
    if device.type == "cuda" and 28 * math.prod(size[:3]) > torch.cuda.mem_get_info()[0]:
        return None
    x, of_a_row = inputs(*size, device), (0, 1, 2, 4, 5)         # y, and the gradients of u, delta, B, C
    with using(form):
        got = both(scan.selective_scan, x, x[0].detach())        # dy = u: there may be no room for one more
    last = [v[-1:] if i in (0, 1, 3, 4) else v for i, v in enumerate(x)]
    last = [v.detach().double().requires_grad_() for v in last]
    want = both(dis.selective_scan_ref, last, last[0].detach())
    return error([got[i][-1:] for i in of_a_row], [want[i] for i in of_a_row])


def compare(size, N, device, rounds, found):
    """Times the forms `found`, {name: function}, of which one is "ours" -> a dict for each form. Ratios are to ours.
    The error is that against the definition in float64, if the definition is among them."""
    x, names, times = inputs(*size, N, device), list(found), 10 if device.type == "cuda" else 1
    often, defined = [n for n in names if n != "definition"], "definition" in names
    with torch.no_grad():
        forward = turns([lambda f=found[n]: both(f, x) for n in often], device, rounds, times)
    train = turns([lambda f=found[n]: both(f, x) for n in often], device, rounds, times)
    if defined:                     # it may take half a minute: warmed up, it is timed once, after the others
        with torch.no_grad():
            forward.insert(0, [milliseconds(lambda: both(found["definition"], x), device) for _ in range(2)][1:])
        train.insert(0, [milliseconds(lambda: both(found["definition"], x), device) for _ in range(2)][1:])
        exact = both(dis.selective_scan_ref, inputs(*size, N, device, torch.float64))
    errors = [error(both(f, x), exact) if defined else None for f in found.values()]
    memory = [peak_megabytes(lambda: both(f, x), device) if device.type == "cuda" else None for f in found.values()]
    ours = names.index("ours")
    def against(record, others):            # what is timed once is compared with the median
        return ratio(record, others) if len(record) == len(others) else median(record) / median(others)
    return [{"form": name, "forward ms": median(f), "forward, ratio": against(f, forward[ours]),
             "with backward ms": median(t), "with backward, ratio": against(t, train[ours]), "MB": m, "error": e}
            for name, f, t, m, e in zip(names, forward, train, memory, errors)]


def convolutions(size, taps, device):
    """Times the convolution before the scan, in bf16, in three ways -> a dict for each. The models use conv1d on a GPU,
    and go tap by tap on a CPU. The error, of y and all gradients, is against conv1d."""
    b, L, e = size
    conv = torch.nn.Conv1d(e, e, taps, padding=taps - 1, groups=e).to(device, torch.bfloat16)
    x = torch.randn(b, L, e, device=device).bfloat16().requires_grad_()

    def conv1d(x):
        return conv(x.mT)[..., :L].mT                                                       # (b, L, e)

    def conv2d(x):                                          # x is channels_last already, as an image of one row
        x = F.pad(x.mT[:, :, None], (taps - 1, 0)).contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, conv.weight[:, :, None], conv.bias, groups=e)[:, :, 0].mT        # (b, L, e)

    def by_taps(x):
        x, u = F.pad(x, (0, 0, taps - 1, 0)), conv.bias
        for k in range(taps):
            u = torch.addcmul(u, x[:, k:k + L], conv.weight[:, 0, k])
        return u                                                                            # (b, L, e)
    ways, of = {"conv1d": conv1d, "conv2d": conv2d, "tap by tap": by_taps}, [x, *conv.parameters()]
    with torch.no_grad():
        forward = turns([lambda f=f: f(x) for f in ways.values()], device, 5, 10)
    train = turns([lambda f=f: torch.autograd.grad(f(x).sum(), of) for f in ways.values()], device, 5, 10)
    want, *found = ((f(x), *torch.autograd.grad(f(x).square().sum(), of)) for f in (conv1d, *ways.values()))
    off = [error(got, want) for got in found]
    return [{"form": f"convolution: {name}", "forward ms": median(f), "with backward ms": median(t), "error": worst}
            for name, f, t, worst in zip(ways, forward, train, off)]


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


def bound(size, N, device, n=2**28, exps=2**22):
    """-> how long moving the bytes alone must take, and computing the exps alone: a dict for each. A copy of n numbers
    and a loop of exps measure first how fast this device does them."""
    b, L, e = size
    with torch.no_grad():
        starts = scan.scan(*inputs(*size, N, device))[1].numel()
    x = torch.empty(n, device=device)
    copy, loop = turns([x.clone, exp_loop(device, exps)], device, *(5, 10) if device.type == "cuda" else (1, 1))
    copied, speed = 8e-3 * n / median(copy), 64e-3 * exps / median(loop)                    # millions a second
    # forward reads u, delta and writes y; backward reads u twice, delta, dy and writes du, ddelta; the states of
    # every chunk are written once and read twice; then B, C and the parts of dB, dC
    forward = b * L * (3 * e + 2 * N) + 2 * starts
    backward = b * L * (6 * e + 2 * N + 4 * N * -(-e // scan.BLOCK)) + starts
    return [{"form": f"bound: {what}", "forward ms": 1e-3 * first / speed, "G/s": speed / 1e3,
             "with backward ms": 1e-3 * (first + second) / speed} for what, speed, first, second in (
                 ("bytes", copied, 4 * forward, 4 * backward), ("exps", speed, b * L * e * N, b * L * e * N))]


triton, tl = scan.triton, getattr(scan, "tl", None)
if triton is not None:
    @triton.jit
    def exp_kernel(p, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(p + i)
        for _ in range(64):
            x = tl.exp2(x) - 1.0
        tl.store(p + i, x)


def exp_loop(device, n):
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
        found = forms(device)
        rows = compare(size, args.state, device, args.rounds, found)
        for row in rows:
            if device.type != "cuda":
                row["MB"] = in_fresh_process("--memory-of", row["form"], "--sizes", "x".join(map(str, size)),
                                             "--state", args.state)
        ours = next(row for row in rows if row["form"] == "ours")
        print(f"(b, L, e) = {size}, N = {args.state}")
        table(["", *list(rows[0])[1:-1], "ratio", "error"],
              [[*list(row.values())[:-1], row["MB"] and row["MB"] / ours["MB"], f"{row['error']:.0e}"] for row in rows])
        if scan.engine(device, torch.float32)[0] is scan.fused:
            for row in bound(size, args.state, device):
                print(row)
    growth(args, device)


if __name__ == "__main__":
    main()
