"""DiS: Scalable Diffusion Models with State Space Backbone, in one file.

Zhengcong Fei, Mingyuan Fan, Changqian Yu, Junshi Huang. arXiv 2402.05608 (v3, March 2024).

The idea. Everything is a token: the image patches, the time step, the class. Where a transformer
would mix L tokens by attention, at a cost of L^2, DiS reads them with a recurrence (Mamba's
selective scan), once from the left and once from the right, at a cost linear in L. As in U-ViT, long
skip connections join the first block to the last, the second to the last but one, and so on. There
is no attention and no MLP: a block is one norm and one mixer, and in the second half the linear layer
that merges its long skip.

Glossary. Letters mean more than one thing, as in the papers. B: the batch in shapes (the scan's have b),
Mamba's input matrix in formulas. C: an image's channels; Mamba's output matrix. D: the width in shapes (in
the scan's, E times that), the direct path in formulas. W: an image's width; in the scan's code its number
of channels; in `Block` a matrix. In the scan t runs over tokens, T is the tokens of a chunk, c a chunk's
number, x = delta u, h the state; elsewhere t is the diffusion step, T the number of steps, c the condition,
x an image, its tokens or half a mixer's channels, h counts rows. In the fast scans S counts segments, K the
tokens of one, b rows (of a block, or batch times S), r and s are slices of rows and tokens (in `entering` s
is a segment's number), a = exp(delta A), g_t = dLoss / dh_t.

| code         | symbol   | shape              | meaning, and the part of the paper (or of Mamba)        |
|--------------|----------|--------------------|---------------------------------------------------------|
| `width`      | D        |                    | channels of a token                                     |
| `patch`      | p        |                    | side of a patch; "image patchify"                       |
|              | J, L     |                    | J: patches, H W / p^2; L: tokens, J + time and class    |
| `expand`     | E        |                    | the mixer works on E D channels (2)                     |
| `state`      | N        |                    | state size of each channel (16)                         |
| `rank`       | R        |                    | of the projection that makes delta, ceil(D / 16)        |
| `conv`       |          |                    | taps of the causal convolution before the scan (4)      |
| `x, z`       | x, z     | (B, L, E D)        | the mixer's two halves: to be scanned, and the gate     |
| `u`          | u_t      | (B, L, E D)        | what the scan reads: x after convolution and SiLU       |
| `dt`         |          | (B, L, R)          | delta before its projection                             |
| `delta`      | Delta_t  | (B, L, E D), > 0   | step size; large: look at this token (Mamba Sec. 3)     |
| `A`          | A        | (E D, N), < 0      | decay rates, independent of the input                   |
| `Bt`, `Ct`   | B_t, C_t | (B, L, N)          | what to write into the state, what to read from it      |
| `D`          | D        | (E D,)             | the direct path from u to y                             |
| `h`          | h_t      | (B, E D, N)        | the state; starts at 0. The fast scans: (B, N, E D)     |
| `residual`   | r        | (B, L, D) float32  | the running sum                                         |
| `hidden`     | m        | (B, L, D)          | what a mixer has made and the next block will add       |
| `c`          | c        | (B, D)             | time, plus class if there is one                        |
| `skip`       |          |                    | "long skip": concat (paper), add, none (ablations)      |
| `time`       |          |                    | "condition": token (paper), adaln (ablation)            |

Not here: training (train.py), which also drops labels for guidance (--cond-dropout 0.1; the authors' model
does it itself, when training), the noise schedule (diffusion.py), the VAE that turns a 256 px image into a
32x32x4 latent, the authors' weights (never published).

Departures: where the paper, the authors' code and this file differ. ("Code" is the authors' release;
"paper" is what could be read of it here, the abstract and summaries, hence no section numbers.)
 1. B is discretised as delta B (Euler), in Mamba's and in the authors' code, though both papers
    print the zero-order hold, (delta A)^-1 (exp(delta A) - I) delta B. We follow the code, which
    made the results. The two agree to first order in delta.
 2. A long skip carries the *mixer output* of the shallow block, not the residual stream, and it
    changes only what the deep block is about to add (code; paper: "hidden states").
 3. Class-conditional models also modulate the final LayerNorm by time + class (code; in the paper
    tokens are the default and adaptive norms an ablation). Kept, so that conditional models have
    the code's parameter counts.
 4. The code zeroes the bias of the backward `dt_proj`. The backward delta then starts near
    softplus(0) = 0.69, 7 to 700 times the forward one: even its slowest state halves at every
    token. Here both directions start alike (`init_dt`).
 5. The code starts the final linear layer at random; here it starts at zero (as in ADM and DiT), so
    that the first squared error is that of predicting nothing: 1 on average for eps.
 6. The code trains with stochastic depth 0.1, which the paper, as far as read, does not mention. Off
    in `CONFIGS`, since the paper's text is silent; `drop_path=0.1` trains as the authors did.
 7. The code's GFLOPs count the layers that a profiler's hooks can see, which leaves out the mixers.
    `python dis.py` prints all of it.
 8. The code's guidance touches three of four latent channels (so the same scale guides more
    here) and, in unconditional sampling, copies the first half's noise prediction to the second half
    of the batch; diffusion.py guides every channel.
 9. skip="add" and time="adaln" are ablations of the paper that the code lacks. Ours writes the
    adaptive norm y_s LayerNorm(h) + y_b as (1 + scale) RMSNorm(r) + shift, both zero at the start.
10. `pos_init` and `label_std` are ours; their defaults are the code's. See `CONFIGS["tiny"]`.
11. The code normalises twice at the end: RMSNorm with a gain after the blocks, LayerNorm without one
    before the linear layer. The paper, as far as read, has the LayerNorm only. We follow the code.

In a notebook Python's own module `dis` is loaded already, so `from dis import DiS` finds the wrong
one: write `from support.checkpoint import load_paper; DiS = load_paper("dis").DiS`.
"""
if __spec__ and __spec__.name == "dis":
    # With this folder first on sys.path (as in `python train.py`), `import torch` imports `inspect`,
    # which imports `dis`, and finds this file. So hand out Python's own, taught to find five names of
    # this file on demand. The import system then insists on running the rest of this file too;
    # the names used at module level become a stand-in that swallows everything. The price: nothing
    # below may compute with torch outside a function.
    import importlib.util
    import os
    import runpy
    import sys

    _PYTHONS = os.path.join(os.path.dirname(os.__file__), "dis.py")
    if __name__ == "__main__":                      # `python -m dis` means the disassembler
        runpy.run_path(_PYTHONS, run_name="__main__")
        sys.exit()

    def _load(name, path):
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
        return sys.modules[name]

    def _find_here(attribute, here=__file__):
        if attribute not in ("DiS", "CONFIGS", "build", "selective_scan", "selective_scan_ref"):
            raise AttributeError(f"module 'dis' has no attribute {attribute!r}")
        return getattr(sys.modules.get("dis_paper") or _load("dis_paper", here), attribute)

    _load("dis", _PYTHONS).__getattr__ = _find_here

    class _Anything(type):
        def __getattr__(cls, name):
            return cls

        def __call__(cls, *args, **kwargs):
            return cls

    class torch(metaclass=_Anything):
        """Stands in for torch; it is also what each of its attributes and calls returns."""
    functools = nn = triton = tl = torch
else:
    import functools
    import importlib.util
    import inspect
    import math
    import warnings

    import torch
    import torch.nn.functional as F
    from einops import rearrange
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    try:
        import triton
        import triton.language as tl
        triton = triton if hasattr(tl, "tuple") else None   # from 3.3 (PyTorch 2.7): the kernels use tuples
    except ImportError:                 # it comes with PyTorch for CUDA
        triton = None

    from diffusion import SCHEDULES, Diffusion, UserError


# --- the selective scan (Mamba, Gu & Dao 2023, 2312.00752, Algorithm 2) -----------------------

def selective_scan_ref(u, delta, A, B, C, D):
    """The definition, one token after the other. Slow.

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t          (Mamba Eq. 2a; departure 1)
        y_t = C_t h_t + D u_t                                   (Eq. 2b; D u is in the code only)

    u, delta (b, L, D); A (D, N); B, C (b, L, N); D (D,) -> y (b, L, D). delta > 0, A < 0. In these
    shapes, and down to the mixer, D counts the channels of the scan: E times the model's width.
    """
    h, ys = u.new_zeros(u.shape[0], *A.shape), []                                  # (b, D, N)
    for u_t, delta_t, B_t, C_t in zip(*(x.unbind(1) for x in (u, delta, B, C))):
        decay = (delta_t[:, :, None] * A).exp()                                    # (b, D, N)
        h = decay * h + (delta_t * u_t)[:, :, None] * B_t[:, None, :]              # (b, D, N)
        ys.append((h * C_t[:, None, :]).sum(-1))                                   # (b, D)
    return torch.stack(ys, dim=1) + D * u                                          # (b, L, D)


def selective_scan(u, delta, A, B, C, D):
    """The same map, fast, and in memory for a few (b, L, D) arrays. Inputs may be bfloat16; y and all that
    happens in between are float32 (or float64): bfloat16 keeps 8 significant bits, and in a product of
    hundreds of decays the rounding errors would add up.
    Equal to `selective_scan_ref`: tests/test_dis.py::test_scan_equals_reference."""
    return scan(u, delta, A, B, C, D)[0]


# All states at once would be a (b, L, D, N) tensor, N times the size of the input. So sequences are cut
# into chunks of T tokens. Kept are the state before each chunk and, as one more, the one after the last, in
# `starts` (b, chunks + 1, N, D). Backward makes a chunk's other states again when it gets there. Work is done
# a *block* at a time: some rows of the batch times one chunk (not the network's `Block`).
CHUNK = {"cpu": (16, 64), "cuda": (8, 8)}       # T, at least and at most
# Numbers in a work array of one block, (b, T, N, D). On a CPU 4 MB stay in the cache; a GPU, where each
# operation is a launch, wants large ones. Neither is delicate.
ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
# Rows times channels that keep all cores busy, see `segments`.
BUSY = {"cpu": 2**10, "cuda": 2**16}


def tuned(numbers, u):
    """The entry of CHUNK, ELEMENTS or BUSY for u's device; devices without one use CUDA's."""
    return numbers.get(u.device.type, numbers["cuda"])


def chunk(rows, u, A):
    """T for so many rows: longer chunks where few rows would not fill a block."""
    least, most = tuned(CHUNK, u)
    return max(least, min(most, tuned(ELEMENTS, u) // max(1, rows * A.numel())))


def block_size(u, A):
    """Rows and tokens of a block."""
    T = chunk(len(u), u, A)
    return min(len(u), max(1, tuned(ELEMENTS, u) // (T * A.numel()))), T


def blocks(u, A):
    """(slice of the batch, number of a chunk, its slice of the tokens): all of them, chunks in order."""
    (b, L, _), (rows, T) = u.shape, block_size(u, A)
    return [(slice(i, i + rows), c, slice(t, min(t + T, L)))
            for i in range(0, b, rows) for c, t in enumerate(range(0, L, T))]


def work_arrays(count, u, A):
    """(b, T, N, D) each. Made once: the system clears new memory, which takes as long as the arithmetic."""
    return u.new_empty(count, *block_size(u, A), *A.T.shape)


def states(h, x, delta, At, B, work):
    """The states of one block. h (b, N, D): that before its first token; x = delta u (b, T, D) -> for each
    token its decay a = exp(delta_t A) and the state hs after it, both (b, T, N, D), in `work`. N before D:
    inner loops then run over D contiguous numbers."""
    a, hs = work[:2, :len(x), :x.shape[1]]
    torch.mul(delta[:, :, None, :], At, out=a).exp_()                         # (b, T, N, D)
    torch.mul(x[:, :, None, :], B[:, :, :, None], out=hs)                     # (b, T, N, D)
    for a_t, h_t in zip(a.unbind(1), hs.unbind(1)):
        h = h_t.addcmul_(a_t, h)              # h_t = a_t h_{t-1} + x_t B_t     (b, N, D)
    return a, hs


def chunked(u, delta, A, B, C, D, starts, y):
    """Fills y, and all of starts but the first, which is given."""
    u, delta, B, C = (v.to(y.dtype) for v in (u, delta, B, C))
    At, work = A.T.contiguous(), work_arrays(2, u, A)                         # At: (N, D)
    for r, c, s in blocks(u, A):
        _, hs = states(starts[r, c], delta[r, s] * u[r, s], delta[r, s], At, B[r, s], work)
        starts[r, c + 1] = hs[:, -1]
        y[r, s] = torch.addcmul((C[r, s, None, :] @ hs)[:, :, 0], D, u[r, s])  # (b, T, D)


def chunked_backward(dy, u, delta, A, B, C, D, starts, carry):
    """-> the gradients of the six inputs. With g_t = dLoss/dh_t the adjoint recurrence runs from the right:

        g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}

    carry (b, N, D), updated in place. On entry: exp(delta_t A) g_t of the token t after the last one here, 0
    at the end of a sequence. At the end: that of the first token here, which the one before it adds to its
    own g."""
    dy, u, delta, B, C = (v.to(starts.dtype) for v in (dy, u, delta, B, C))
    At, work = A.T.contiguous(), work_arrays(3, u, A)
    dA, dD = torch.zeros_like(At), torch.zeros_like(D)                        # (N, D), (D,)
    du, ddelta, dB, dC = (torch.empty_like(v) for v in (u, delta, B, C))
    for r, c, s in reversed(blocks(u, A)):
        x = delta[r, s] * u[r, s]                                             # (b, T, D)
        a, hs = states(starts[r, c], x, delta[r, s], At, B[r, s], work)
        g = work[2, :len(x), :x.shape[1]]
        torch.mul(dy[r, s, None, :], C[r, s, :, None], out=g)                 # (b, T, N, D)
        g[:, -1] += carry[r]
        for t in reversed(range(1, g.shape[1])):
            g[:, t - 1].addcmul_(a[:, t], g[:, t])                            # (b, N, D)
        torch.mul(a[:, 0], g[:, 0], out=carry[r])
        # (b, T, 1, D) @ (b, T, D, N): rows times matrices; matrices times columns take seven times as long
        dC[r, s] = (dy[r, s, None, :] @ hs.mT)[:, :, 0]                       # (b, T, N)
        dB[r, s] = (x[:, :, None, :] @ g.mT)[:, :, 0]                         # (b, T, N)
        dx = (B[r, s, None, :] @ g)[:, :, 0]                                  # (b, T, D)
        du[r, s] = torch.addcmul(delta[r, s] * dx, D, dy[r, s])
        dD += torch.mul(dy[r, s], u[r, s], out=x).sum((0, 1))
        # d/d(delta A) = g_t exp(delta_t A) h_{t-1}: multiply g by both, in place
        g.mul_(a)
        g[:, 1:].mul_(hs[:, :-1])
        g[:, 0].mul_(starts[r, c])
        ddelta[r, s] = torch.mul(g, At, out=a).sum(2).addcmul_(dx, u[r, s])   # (b, T, D)
        dA += g.mul_(delta[r, s, None, :]).sum((0, 1))                        # (N, D)
    return du, ddelta, dA.T, dB, dC, dD


# Few and long sequences (one image, say) keep neither the cores of a CPU nor a GPU busy, since tokens wait
# for each other. Then each is cut into S segments that are read side by side, as if they were rows of the
# batch, twice. Pass 1 reads every segment as if the state before it were 0; call where it ends e_s. The scan
# is linear in the state before it, so that what really enters segment s is (`entering`)
#
#     h_s = e_{s-1} + (product of the decays in segment s-1) h_{s-1},      h_0 = 0
#
# Pass 2 reads all again, from there. Backward does so from the right.

def segments(u):
    """S. One, unless two passes at S times the speed are a clear gain."""
    b, L, D = u.shape
    S = min(tuned(BUSY, u) // max(1, b * D), L // (4 * tuned(CHUNK, u)[0]))
    return S if S > 4 else 1


def cut(x, S):
    """(b, L, .) -> (b S, K, .) with K = L / S rounded up. The zeros added are harmless: a token with
    delta = u = dy = 0 changes no state and no sum."""
    b, L, D = x.shape
    x = F.pad(x, (0, 0, 0, -L % S)) if S > 1 else x
    return x.contiguous().view(b * S, -1, D)


def entering(ends, delta, A, S):
    """ends (b S, N, D): e_s; delta (b S, K, D) -> h_s, what enters each segment, (b S, N, D)."""
    ends = ends.unflatten(0, (-1, S))                                                   # (b, S, N, D)
    decay = (delta.sum(1)[:, None] * A.T).exp().view_as(ends)                           # (b, S, N, D)
    h = torch.zeros_like(ends)
    for s in range(1, S):
        h[:, s] = ends[:, s - 1] + decay[:, s - 1] * h[:, s - 1]
    return h.flatten(0, 1)                                                              # (b S, N, D)


def scan_forward(u, delta, A, B, C, D):
    """-> y (b, L, D) and starts (b S, chunks + 1, N, D), for backward. In code W is from here on the number
    of channels, because there `D` is the direct path; shapes keep writing D for it."""
    (b, L, W), S, N = u.shape, segments(u), A.shape[1]
    if (delta.shape, len(A), B.shape, C.shape, D.shape) != (u.shape, W, (b, L, N), (b, L, N), (W,)):
        raise UserError("the shapes of u, delta, A, B, C, D do not fit: see selective_scan_ref")
    dtype = torch.promote_types(u.dtype, torch.float32)
    # a custom operator runs under its caller's autocast, which would turn the products below into bf16
    with torch.autocast(u.device.type, enabled=False):
        forward, _ = engine(u.device, dtype)
        A, D = A.to(dtype), D.to(dtype)
        u, delta, B, C = (cut(x, S) for x in (u, delta, B, C))                          # (b S, K, .)
        y = torch.empty_like(u, dtype=dtype)
        starts = y.new_zeros(b * S, -(-u.shape[1] // chunk(b * S, u, A)) + 1, N, W)
        if S > 1:
            forward(u, delta, A, B, C, D, starts, y)
            starts[:, 0] = entering(starts[:, -1], delta.to(dtype), A, S)
        forward(u, delta, A, B, C, D, starts, y)
    return y.view(b, -1, W)[:, :L].contiguous(), starts


def scan_backward(dy, u, delta, A, B, C, D, starts):
    """-> the gradients of u, delta, A, B, C, D."""
    (b, L, _), S, inputs = u.shape, segments(u), (u, delta, A, B, C, D)
    with torch.autocast(u.device.type, enabled=False):
        _, backward = engine(u.device, starts.dtype)
        A, D = A.to(starts.dtype), D.to(starts.dtype)
        dy, u, delta, B, C = (cut(x, S) for x in (dy, u, delta, B, C))                  # (b S, K, .)
        carry = torch.zeros_like(starts[:, 0])                                          # (b S, N, D)
        if S > 1:
            backward(dy, u, delta, A, B, C, D, starts, carry)
            carry = entering(carry.flip(0), delta.flip(0).to(A), A, S).flip(0)
        grads = backward(dy, u, delta, A, B, C, D, starts, carry)
    grads = (g if g.shape == x.shape else g.view(b, -1, x.shape[2])[:, :L] for g, x in zip(grads, inputs))
    return tuple(g.to(x.dtype).contiguous() for g, x in zip(grads, inputs))


@functools.lru_cache(maxsize=None)
def engine(device, dtype):
    """-> the two functions that do the work there. On CUDA (not ROCm) in float32, with Triton: the fused
    ones below, if they compile for this GPU and agree with the chunked ones (else a warning, once).
    Everywhere else the chunked ones."""
    if device.type == "cuda" and dtype == torch.float32 and triton is not None and not torch.version.hip:
        try:
            compare(device)
            return fused, fused_backward
        except Exception as e:          # compilers meet unknown GPUs with all kinds of exceptions
            warnings.warn(f"no fused scan on {device} ({e}): using the slower one", stacklevel=2)
    return chunked, chunked_backward


def compare(device):
    """Raises ValueError if the fused scan gives other numbers than the chunked one."""
    g = torch.Generator(device).manual_seed(0)
    u, delta, B, C = (torch.rand(2, 19, k, device=device, generator=g) for k in (80, 80, 2, 2))
    A, D, found = -u[0, 1, :, None] - B[0, 0], u[0, 0], []
    for forward, backward in ((fused, fused_backward), (chunked, chunked_backward)):
        y, starts = torch.empty_like(u), u.new_zeros(2, -(-19 // chunk(2, u, A)) + 1, 2, 80)
        forward(u, delta, A, B, C, D, starts, y)
        found.append([y, *backward(y, u, delta, A, B, C, D, starts, torch.zeros_like(starts[:, 0]))])
    if not all((a - b).abs().max() <= 1e-3 * b.abs().max() for a, b in zip(*found)):
        raise UserError("it gives other numbers")


# One node of a graph for autograd and torch.compile, which would otherwise see thousands of small ones.
_OPS = "".join(c if c.isalnum() else "_" for c in __name__)     # a changed copy of this file has its own
_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D"
scan = torch.library.custom_op(f"{_OPS}::scan", scan_forward, mutates_args=(),
                               schema=f"({_INPUTS}) -> (Tensor, Tensor)")
scan_grad = torch.library.custom_op(
    f"{_OPS}::scan_backward", scan_backward, mutates_args=(),
    schema=f"(Tensor dy, {_INPUTS}, Tensor starts) -> ({', '.join(['Tensor'] * 6)})")


def _shapes(u, delta, A, B, C, D):
    """What `scan_forward` returns, without numbers."""
    S, y = segments(u), u.new_empty(u.shape, dtype=torch.promote_types(u.dtype, torch.float32))
    K, rows = -(-u.shape[1] // S), len(u) * S
    return y, y.new_empty(rows, -(-K // chunk(rows, u, A)) + 1, A.shape[1], A.shape[0])


def _keep(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx, dy, _):
    return (None,) * 6 if dy is None else scan_grad(dy, *ctx.saved_tensors)


scan.register_fake(_shapes)
scan.register_autograd(_differentiate, setup_context=_keep)
scan_grad.register_fake(lambda dy, *inputs: tuple(x.new_empty(x.shape) for x in inputs[:6]))


# --- the same, fused (Triton, for CUDA) --------------------------------------------------------
#
# A program is one warp (32 threads). It owns a row of the batch and BD = 64 channels, two per thread, and
# goes through a chunk of T = 8 tokens at a time. Names in the plural are lists of T vectors (BD,), 2 T
# registers of each thread. The N states of a chunk are treated one after the other: u and delta are read
# once for all of them, and a decay exp(delta_t A) never leaves its register. From chunk to chunk the states
# wait in memory, `starts`; there backward finds them.
#
# Why these sizes. BD: to sum over a channel's states (y_t = C_t h_t) its thread needs no other; but dB_t and
# dC_t are sums over channels, 5 exchanges between threads each, for 64 channels as for 32. T: `starts` is
# N / T = 2 times as large as u, and backward holds 7 lists, 112 registers of 168. With 168 a multiprocessor
# has room for 12 warps, 3 to each of its four schedulers, so that two compute while one waits for memory.
# (The compiler asks for about 200 and then spills some, outside the loop over n.) Compiled for compute
# capability 9.0, a state and chunk takes 155 instructions forward, whose 16 exps occupy their unit for 128
# cycles, and about 475 backward, a third of them for sums over channels: instructions set the pace.

if triton is not None:
    LOG2_E = tl.constexpr(1.4426950408889634)           # the hardware has 2^x

    @triton.jit
    def _tokens(p, t, W, d, rest, T: tl.constexpr):
        """Rows t, ..., t + T - 1 of p (rows, W), columns d; zeros after `rest` rows, harmless as in `cut`."""
        xs = ()
        for j in tl.static_range(T):                    # unrolled: registers have no index at run time
            xs += (tl.load(p + (t + j) * W + d, mask=d < tl.where(j < rest, W, 0), other=0.0).to(tl.float32),)
        return xs

    @triton.jit
    def _fused(u, delta, A, B, C, D, starts, y, L, W, chunks, N: tl.constexpr, T: tl.constexpr,
               BD: tl.constexpr):
        """`chunked`. Per token, channel and state one exp, four multiplications and two additions."""
        b, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)      # (BD,)
        Dd = tl.load(D + d, mask=d < W, other=0.0)                                          # (BD,)
        for c in range(chunks):
            t, rest = b * L + c * T, L - c * T                      # int64: b L W can exceed 2^31
            deltas = _tokens(delta, t, W, d, rest, T)                                       # T x (BD,)
            us = _tokens(u, t, W, d, rest, T)                                               # T x (BD,)
            xs, ys = (), ()
            for j in tl.static_range(T):
                xs += (deltas[j] * us[j],)                          # x = delta u
                ys += (Dd * us[j],)
            for n in range(N):
                rate = LOG2_E * tl.load(A + n * W + d, mask=d < W, other=0.0)               # (BD,)
                Bs = _tokens(B, t, N, n, rest, T)                                           # T x ()
                Cs = _tokens(C, t, N, n, rest, T)                                           # T x ()
                at = starts + ((b * (chunks + 1) + c) * N + n) * W + d
                h = tl.load(at, mask=d < W, other=0.0)                                      # (BD,)
                sums = ()
                for j in tl.static_range(T):
                    h = tl.exp2(deltas[j] * rate) * h + xs[j] * Bs[j]
                    sums += (ys[j] + h * Cs[j],)
                ys = sums
                tl.store(at + N * W, h, mask=d < W)
            for j in tl.static_range(T):
                tl.store(y + (t + j) * W + d, ys[j], mask=d < tl.where(j < rest, W, 0))
            tl.debug_barrier()                          # `starts` may come back to other threads of the warp

    @triton.jit
    def _fused_backward(dy, u, delta, A, B, C, D, starts, carry, du, ddelta, dA, dB, dC, dD, L, W, chunks,
                        N: tl.constexpr, T: tl.constexpr, BD: tl.constexpr):
        """`chunked_backward`. Per chunk its states once more, left to right, then g, right to left."""
        b, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)      # (BD,)
        Dd = tl.load(D + d, mask=d < W, other=0.0)                                          # (BD,)
        sumD = tl.zeros([BD], tl.float32)
        for c in range(chunks - 1, -1, -1):
            t, rest = b * L + c * T, L - c * T
            deltas = _tokens(delta, t, W, d, rest, T)                                       # T x (BD,)
            us = _tokens(u, t, W, d, rest, T)                                               # T x (BD,)
            dys = _tokens(dy, t, W, d, rest, T)                                             # T x (BD,)
            xs, dxs, ddeltas = (), (), ()
            for j in tl.static_range(T):
                xs += (deltas[j] * us[j],)
                dxs += (tl.zeros([BD], tl.float32),)                # d/dx, summed over n
                ddeltas += (tl.zeros([BD], tl.float32),)            # d/d(delta) through exp(delta A)
                sumD += dys[j] * us[j]
            for n in range(N):
                An = tl.load(A + n * W + d, mask=d < W, other=0.0)                          # (BD,)
                Bs = _tokens(B, t, N, n, rest, T)                                           # T x ()
                Cs = _tokens(C, t, N, n, rest, T)                                           # T x ()
                h = tl.load(starts + ((b * (chunks + 1) + c) * N + n) * W + d, mask=d < W, other=0.0)
                at = (b * N + n) * W + d
                g = tl.load(carry + at, mask=d < W, other=0.0)                              # (BD,)
                sumA = tl.load(dA + at, mask=d < W, other=0.0)                              # (BD,)
                row = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) * L + t) * N + n
                decays, kept = (), ()
                for j in tl.static_range(T):
                    decays += (tl.exp2(deltas[j] * (LOG2_E * An)),)
                    kept += (decays[j] * h,)                        # exp(delta_t A) h_{t-1}
                    h = kept[j] + xs[j] * Bs[j]
                    tl.store(dC + row + j * N, tl.sum(h * dys[j], 0), mask=j < rest)
                sumx, sumd = (), ()
                for j in tl.static_range(T - 1, -1, -1):
                    g += dys[j] * Cs[j]
                    tl.store(dB + row + j * N, tl.sum(g * xs[j], 0), mask=j < rest)
                    dm = g * kept[j]                                # d/d(delta_t A)
                    sumA += deltas[j] * dm
                    sumx = (dxs[j] + g * Bs[j],) + sumx
                    sumd = (ddeltas[j] + dm * An,) + sumd
                    g *= decays[j]
                dxs, ddeltas = sumx, sumd
                tl.store(carry + at, g, mask=d < W)
                tl.store(dA + at, sumA, mask=d < W)
            us = _tokens(u, t, W, d, rest, T)           # read again, not held in 16 registers all the while
            for j in tl.static_range(T):
                at, inside = (t + j) * W + d, d < tl.where(j < rest, W, 0)
                tl.store(du + at, deltas[j] * dxs[j] + Dd * dys[j], mask=inside)
                tl.store(ddelta + at, us[j] * dxs[j] + ddeltas[j], mask=inside)
            tl.debug_barrier()
        tl.store(dD + b * W + d, sumD, mask=d < W)


BD, OPTIONS = 64, dict(num_warps=1, enable_fp_fusion=True)


def fused(u, delta, A, B, C, D, starts, y):
    """`chunked`. Bit for bit the same at each call: no two programs add to the same number."""
    (b, L, W), N = u.shape, A.shape[1]
    chunks, grid = starts.shape[1] - 1, (b, -(-W // BD))
    with torch.cuda.device_of(u):                       # Triton launches on the current GPU
        _fused[grid](u, delta, A.T.contiguous(), B, C, D.contiguous(), starts, y, L, W, chunks,
                     N, chunk(b, u, A), BD, **OPTIONS)


def fused_backward(dy, u, delta, A, B, C, D, starts, carry):
    """`chunked_backward`."""
    (b, L, W), N = u.shape, A.shape[1]
    chunks, grid = starts.shape[1] - 1, (b, -(-W // BD))
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dB, dC = starts.new_empty(2, grid[1], b, L, N)                  # every program's share, summed below
    dA, dD = torch.zeros_like(carry), starts.new_empty(b, W)        # likewise
    with torch.cuda.device_of(u):
        _fused_backward[grid](dy, u, delta, A.T.contiguous(), B, C, D.contiguous(), starts, carry, du, ddelta,
                              dA, dB, dC, dD, L, W, chunks, N, chunk(b, u, A), BD, maxnreg=168, **OPTIONS)
    return du, ddelta, dA.sum(0).T, dB.sum(0), dC.sum(0), dD.sum(0)


@torch.compiler.disable
def mamba_ssm_scan(u, delta, A, B, C, D):
    """`selective_scan` by Mamba's authors' CUDA kernel (pip install mamba-ssm), which has tokens last."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, delta, B, C = (x.to(dtype).mT.contiguous() for x in (u, delta, B, C))            # (b, ., L)
    return selective_scan_fn(u, delta, A, B, C, D).mT                                   # (b, L, D)


# --- the mixer: Mamba, read in both directions (in Vision Mamba's code: "v2") -----------------

class Direction(nn.Module):
    """What one reading direction owns: convolution, projections to (delta, B, C), A and D."""

    def __init__(self, channels, state, rank, conv, scan):
        super().__init__()
        self.rank, self.state, self.scan = rank, state, scan
        self.conv = nn.Conv1d(channels, channels, conv, groups=channels, padding=conv - 1)
        self.x_proj = nn.Linear(channels, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, channels)
        # S4D-real: state n of every channel decays at rate n. A = -exp(A_log) stays negative.
        self.A_log = nn.Parameter(torch.arange(1, state + 1).float().log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        self.init_dt()

    def init_dt(self, low=1e-3, high=0.1):
        """Bias such that delta = softplus(bias) is log-uniform in [low, high] (Mamba's code): the
        slowest states start with memories of 1/high to 1/low tokens."""
        delta = torch.empty(self.D.shape).uniform_(math.log(low), math.log(high)).exp()
        with torch.no_grad():
            self.dt_proj.bias.copy_(delta.expm1().log())                # inverse of softplus

    def forward(self, x):
        """(B, L, ED) -> (B, L, ED), tokens in this direction's order."""
        L = x.shape[1]
        u = self.conv(rearrange(x, "b l d -> b d l"))[..., :L]          # cut: causal (B, ED, L)
        u = rearrange(F.silu(u), "b d l -> b l d")                      # (B, L, ED)
        dt, Bt, Ct = self.x_proj(u).split([self.rank, self.state, self.state], dim=-1)
        # delta is float32 from here on: under autocast dt_proj would round its output, near -7 for
        # the long memories, to multiples of 1/32, and so delta by up to 1.6%
        with torch.autocast(x.device.type, enabled=False):
            delta = F.softplus(self.dt_proj(dt.to(self.dt_proj.weight.dtype)))   # (B, L, ED)
        scan = mamba_ssm_scan if self.scan == "mamba_ssm" and u.is_cuda else selective_scan
        return scan(u, delta, -self.A_log.exp(), Bt, Ct, self.D)                 # (B, L, ED)


class BiMamba(nn.Module):
    """(B, L, D) -> (B, L, D). Both directions share the projections in and out and the gate z; their
    outputs are summed. Time and class tokens come first for one direction, last for the other. (The
    authors' code gates each direction before the sum: the same, since the gate is the same.)"""

    def __init__(self, width, expand=2, state=16, conv=4, scan="auto"):
        super().__init__()
        channels, rank = expand * width, math.ceil(width / 16)
        self.in_proj = nn.Linear(width, 2 * channels, bias=False)
        self.forwards = Direction(channels, state, rank, conv, scan)
        self.backwards = Direction(channels, state, rank, conv, scan)
        self.out_proj = nn.Linear(channels, width, bias=False)

    def forward(self, x):
        x, z = self.in_proj(x).chunk(2, dim=-1)                         # 2 x (B, L, ED)
        y = self.forwards(x) + self.backwards(x.flip(1)).flip(1)        # (B, L, ED)
        return self.out_proj(y * F.silu(z))                             # (B, L, D)


# --- block ------------------------------------------------------------------------------------

class Block(nn.Module):
    """Add, norm, mix: Mamba's order. Two streams run through the blocks, `residual` r, the running
    sum, and `hidden` m, what the mixer before has made and this block adds:

        m' = W [m; m_shallow] + b        deep half; elsewhere m' = m       ("long skip", departure 2)
        r  = r + m'                      first block: r = m'
        m  = Mixer(RMSNorm(r))
    """

    def __init__(self, width, skip="none", adaln=False, drop_path=0.0, **mixer):
        super().__init__()
        self.skip, self.drop_path = skip, drop_path
        self.skip_linear = nn.Linear(2 * width, width) if skip == "concat" else None
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.adaln = nn.Linear(width, 2 * width) if adaln else None
        self.mixer = BiMamba(width, **mixer)

    def forward(self, hidden, residual, shallow=None, c=None):
        """hidden (B, L, D), residual (B, L, D) float32 or None before the first block, shallow
        (B, L, D) or None, c (B, D) the condition when time="adaln" -> hidden, residual."""
        if self.skip == "concat":
            hidden = self.skip_linear(torch.cat([hidden, shallow], dim=-1))    # (B, L, D)
        elif self.skip == "add":
            hidden = hidden + shallow
        residual = add(residual, hidden, self.drop_path if self.training else 0)
        x = self.norm(residual)
        if self.adaln is not None:
            shift, scale = self.adaln(F.silu(c))[:, None].chunk(2, dim=-1)     # 2 x (B, 1, D)
            x = x * (1 + scale) + shift
        return self.mixer(x), residual


def add(residual, hidden, drop_path=0.0):
    """residual + hidden in float32: dozens of small additions would drown in bf16.
    drop_path is the chance that a sample skips the addition (stochastic depth)."""
    hidden = hidden.float()
    if drop_path:
        keep = torch.rand(len(hidden), 1, 1, device=hidden.device) >= drop_path
        hidden = hidden * keep / (1 - drop_path)
    return hidden if residual is None else residual + hidden


# --- the model --------------------------------------------------------------------------------

def timestep_embedding(t, width):
    """(B,) -> (B, width): cosines, then sines, of t at wavelengths from 2 pi to almost 2 pi 10^4."""
    half = width // 2
    freqs = (-math.log(10000) / max(1, half) * torch.arange(half, device=t.device)).exp()
    angles = t.float()[:, None] * freqs                                        # (B, width // 2)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, width % 2))


class DiS(nn.Module):
    """(x_t, t, y) -> prediction (eps, or what the Diffusion says), and with learn_sigma the C channels of
    the variance after it."""

    unit = Block                        # what FSDP2 gathers at a time

    def __init__(self,
                 shape,                 # (C, H, W) of the image or latent
                 width,                 # D
                 depth,                 # depth // 2 shallow blocks, 1, depth // 2 deep: 24 gives 25
                 patch=2,               # p; None: the largest with a grid of at least 4 x 4 patches
                 num_classes=0,         # 0: unconditional
                 expand=2,              # E
                 state=16,              # N
                 conv=4,                # taps of the causal convolution
                 skip="concat",         # long skips: "concat" | "add" | "none"
                 time="token",          # "token": a token for time, one for the class | "adaln": time
                                        # + class scale and shift every block's norm (ablation)
                 pos_init="zero",       # learned positions start at "zero" (the authors') | "sincos"
                 label_std=0.02,        # of the class vectors at the start (0.02: the authors')
                 scan="auto",           # "auto": ours | "mamba_ssm": that package's, where there is a GPU
                 drop_path=0.0,         # chance that a sample skips an addition, rising linearly from 0
                 learn_sigma=True,
                 grad_checkpointing=False):  # recompute each block in backward: less memory, +1/3 time
        super().__init__()
        C, H, W = shape
        for value, allowed in ((skip, ("concat", "add", "none")), (time, ("token", "adaln")),
                               (pos_init, ("zero", "sincos")), (scan, ("auto", "mamba_ssm"))):
            if value not in allowed:
                raise UserError(f"unknown DiS option {value!r}: choose {' or '.join(allowed)}")
        if scan == "mamba_ssm" and torch.cuda.is_available() and not importlib.util.find_spec("mamba_ssm"):
            raise UserError("scan=mamba_ssm needs that package, which needs CUDA's compiler: pip install "
                             "mamba-ssm, or drop it, since the built-in scan is fused on GPUs, too")
        if patch is None:
            patch = next(p for p in range(max(1, min(H, W) // 4), 0, -1) if H % p == W % p == 0)
        if not 0 <= drop_path < 1:
            raise UserError(f"drop_path {drop_path} is not a probability below 1: try 0.1")
        if H % patch or W % patch:
            fits = [f"{h}x{w}" for h, w in dict.fromkeys(
                (H // patch * patch + k, W // patch * patch + k) for k in (0, patch)) if h * w]
            raise UserError(f"image size {H}x{W} is not divisible by the patch size {patch}: "
                             f"try {' or '.join(fits)}")
        self.shape, self.patch, self.num_classes = shape, patch, num_classes
        self.time, self.depth = time, depth
        self.pos_init, self.label_std = pos_init, label_std
        self.grad_checkpointing = grad_checkpointing
        self.out_channels = 2 * C if learn_sigma else C
        J, extras = H * W // patch**2, (1 + (num_classes > 0)) * (time == "token")

        self.patch_embed = nn.Linear(patch**2 * C, width)
        self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(),
                                        nn.Linear(4 * width, width))
        # one more row than classes: "no class", for guidance (in the code only if it drops labels)
        self.label_embed = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.pos_embed = nn.Parameter(torch.zeros(1, extras + J, width))
        half = depth // 2
        self.shallow, self.deep = nn.ModuleList(), nn.ModuleList()
        # As in the code, a block's rate is for what it adds: what the block before it made, in the deep half
        # already merged with the long skip. The first block adds only the tokens, so the ramp starts one
        # late; `forward` drops what the last one made, at the full rate.
        rates = [0.0] + [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        shared = dict(width=width, adaln=time == "adaln", expand=expand, state=state, conv=conv, scan=scan)
        for i in range(half):
            self.shallow.append(Block(drop_path=rates[i], **shared))
        self.middle = Block(drop_path=rates[half], **shared)
        for i in range(half):
            self.deep.append(Block(skip=skip, drop_path=rates[half + 1 + i], **shared))
        self.drop_path = drop_path
        self.norm = nn.RMSNorm(width, eps=1e-5)                  # departure 11
        self.final_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.final_adaln = nn.Linear(width, 2 * width) if num_classes else None
        self.final = nn.Linear(width, patch**2 * self.out_channels)
        self.init_weights()

    def init_weights(self):
        """The authors' code, but for departures 4, 5 and 10."""
        for name, module in self.named_modules():
            # weights keep PyTorch's default, uniform in +-1/sqrt(fan_in); only biases are zeroed,
            # except delta's, which Direction.init_dt has set, and those of convolutions, of which
            # patch_embed is one in their code
            if (isinstance(module, nn.Linear) and module.bias is not None
                    and "dt_proj" not in name and name != "patch_embed"):
                nn.init.zeros_(module.bias)
            if isinstance(module, BiMamba):
                with torch.no_grad():       # the sum of all blocks must not grow with their number
                    module.out_proj.weight /= math.sqrt(self.depth)
            if isinstance(module, Block) and module.adaln is not None:
                nn.init.zeros_(module.adaln.weight)              # adaLN blocks start unmodulated
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=self.label_std)
        if self.pos_init == "sincos":
            row, col = (torch.arange(n // self.patch) for n in self.shape[1:])
            D = self.pos_embed.shape[-1]
            table = torch.cat([timestep_embedding(row, D // 2)[:, None].expand(-1, len(col), -1),
                               timestep_embedding(col, D - D // 2).expand(len(row), -1, -1)],
                              dim=-1)                                           # (h, w, D), h w = J
            with torch.no_grad():       # time and class tokens, before the patches, keep 0
                self.pos_embed[0, -len(row) * len(col):] = rearrange(table, "h w d -> (h w) d")
        nn.init.zeros_(self.final.weight)                        # departure 5

    def forward(self, x, t, y=None):
        """x (B, C, H, W), t (B,) long, y (B,) long or None; label -1 means "no class", and so
        does None (which crashes the authors' code). -> (B, C or 2C, H, W)."""
        p, (_, H, W) = self.patch, self.shape
        x = rearrange(x, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=p, p2=p)  # (B, J, p*p*C)
        x = self.patch_embed(x)                                                 # (B, J, D)
        c = self.time_embed(timestep_embedding(t, x.shape[-1]))                 # (B, D)
        tokens = [c]
        if self.num_classes:
            y = torch.full_like(t, -1) if y is None else y
            label = self.label_embed(torch.where(y < 0, self.num_classes, y))   # (B, D)
            tokens, c = [label, c], c + label
        if self.time == "token":                                    # order: class, time, patches
            x = torch.cat([*(token[:, None] for token in tokens), x], dim=1)    # (B, L, D)
        hidden, residual = x + self.pos_embed, None                             # (B, L, D)

        skips = []
        for block in self.shallow:
            hidden, residual = self.run(block, hidden, residual, None, c)       # both (B, L, D)
            skips.append(hidden)
        hidden, residual = self.run(self.middle, hidden, residual, None, c)
        for block in self.deep:                                  # last in, first out
            hidden, residual = self.run(block, hidden, residual, skips.pop(), c)
        x = self.norm(add(residual, hidden, self.drop_path if self.training else 0))

        x = self.final_norm(x[:, -(H * W // p**2):])             # drop time and class (B, J, D)
        if self.final_adaln is not None:                         # departure 3
            shift, scale = self.final_adaln(F.silu(c))[:, None].chunk(2, dim=-1)   # 2 x (B, 1, D)
            x = x * (1 + scale) + shift
        return rearrange(self.final(x), "b (h w) (p1 p2 c) -> b c (h p1) (w p2)",
                         h=H // p, p1=p, p2=p)                   # (B, C or 2C, H, W)

    def run(self, block, *inputs):
        if self.grad_checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def macs(self):
        """Multiply-adds of one forward pass for one image, the scans included."""
        L, J = self.pos_embed.shape[1], math.prod(self.shape[1:]) // self.patch**2
        total = sum(mixer_macs(m, L) for m in self.modules() if isinstance(m, BiMamba))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and "mixer" not in name:
                tokens = (J if name in ("patch_embed", "final") else
                          L if "skip_linear" in name else 1)       # 1: time and its modulations
                total += tokens * module.weight.numel()
        return total


def mixer_macs(mixer, L):
    """Multiply-adds of a BiMamba over L tokens: matrices, convolutions, and 4 per state element for
    the scan (decay, input, update, read)."""
    matrices = sum(m.weight.numel() for m in mixer.modules() if isinstance(m, (nn.Linear, nn.Conv1d)))
    return L * (matrices + 4 * sum(d.A_log.numel() for d in (mixer.forwards, mixer.backwards)))


# --- presets ------------------------------------------------------------------------------------

# Only width and depth change: (D, depth, then for the table below the paper's millions of parameters
# and GFLOPs as remembered, see its footnote). 368, not DiT's 384: the authors' code; it gives the 28.4M.
_SIZES = {"S": (368, 24, 28.4, 0.43), "B": (768, 24, 119.1, 1.86), "M": (768, 48, 229.4, 3.70),
          "L": (1024, 48, 404.0, 6.57), "H": (1536, 48, 900.6, 14.79)}
_PAPER_DIFFUSION = dict(schedule="linear", predict="eps", variance="learned")
CONFIGS = {f"DiS-{size}/{p}": dict(width=width, depth=depth, patch=p, **_PAPER_DIFFUSION)
           for size, (width, depth, _, _) in _SIZES.items() for p in (2, 4)}
# Learns shapes or digits in minutes on two CPU cores. There quality is limited by how many updates fit in.
# So an image becomes a grid of only 4 x 4 patches, and E and N are halved. It predicts x0: eps or v would ask
# it to reproduce the noise of a whole patch, and 128 channels cannot carry the 192 numbers of 8 x 8 coloured
# pixels. (They could those of digits, 7 x 7 = 49; the choice is kept.) In the paper's ablation tokens beat
# adaptive norms; in a run this short they do not: after 2,000 steps on shapes, at guidance 2, a classifier
# recognised 80% of 160 samples as the class asked for with class tokens, 97% with adaptive norms, hence
# time="adaln". For the same reason positions start as sines and cosines and class vectors at full size.
CONFIGS["tiny"] = dict(width=128, depth=6, patch=None, expand=1, state=8, time="adaln",
                       pos_init="sincos", label_std=1.0, schedule="cosine", predict="x0", variance="small")
# 1.4 million parameters, to be compared with the other papers' "mini" (README)
CONFIGS["mini"] = {**CONFIGS["tiny"], "width": 160}


def build(preset, shape, num_classes=0, **options):
    """-> (model, diffusion): all that train.py and sample.py ask of a paper.

    model(x_t (B, C, H, W), t (B,), y (B,) or None) -> what diffusion.loss and .sample expect. What it may
    have: macs(), to be printed; grad_checkpointing, which --grad-checkpointing sets; unit, the class of the
    modules that --shard gathers one at a time; and, in other papers' files, frozen() (diffussm.py), nfe
    (cunet.py) and load_inner (mdm.py). shape (C, H, W); num_classes 0: no y. `options` override the
    preset: skip="add", patch=8 ... Raises ValueError, with the fix, for a preset, option or size that is
    wrong.
    """
    if len(shape) != 3:
        raise UserError("DiS makes pictures, not videos: pass --model mdm --preset tiny-video")
    if preset not in CONFIGS:
        raise UserError(f"unknown preset {preset!r}: dis has {', '.join(CONFIGS)}")
    config = {**CONFIGS[preset], **options}
    of_diffusion = {k: config.pop(k) for k in ("schedule", "predict", "variance", "T", "min_snr")
                    if k in config}
    own = [k for k in inspect.signature(DiS).parameters
           if k not in ("shape", "num_classes", "learn_sigma")]
    for key in config:
        if key not in own:
            raise UserError(f"unknown option {key!r}: dis has {', '.join(own)}, schedule, predict, "
                             f"variance, T, min_snr")
    for key, value in {**config, **of_diffusion}.items():
        if value is None and key in ("patch", "min_snr"):
            continue
        if key in ("width", "depth", "patch", "expand", "state", "conv", "T"):
            if type(value) is not int or value < 1:
                raise UserError(f"{key}={value!r}: must be a whole number, at least 1")
        elif key in ("drop_path", "label_std", "min_snr"):
            if type(value) not in (int, float) or not value >= 0:
                raise UserError(f"{key}={value!r}: must be a number, at least 0")
    schedule = of_diffusion.pop("schedule")
    if schedule not in SCHEDULES:
        raise UserError(f"unknown schedule {schedule!r}: choose {' or '.join(SCHEDULES)}")
    diffusion = Diffusion(SCHEDULES[schedule](of_diffusion.pop("T", 1000)), **of_diffusion)
    return DiS(shape, num_classes=num_classes, learn_sigma=diffusion.variance == "learned",
               **config), diffusion


def table():
    """Parameters and multiply-adds of the presets beside the paper's figures."""
    print("32x32 RGB, patch 4, unconditional: the setting that reproduces the paper's parameters\n"
          "          parameters    paper*  multiply-adds   outside the mixers, x2   paper's GFLOPs*")
    for size, (_, _, millions, gflops) in _SIZES.items():
        with torch.device("meta"):
            model, _ = build(f"DiS-{size}/4", (3, 32, 32))
        mixers = sum(mixer_macs(m, model.pos_embed.shape[1])
                     for m in model.modules() if isinstance(m, BiMamba))
        print(f"DiS-{size}/4 {sum(p.numel() for p in model.parameters()):13,d} {millions:7.1f}M"
              f" {model.macs() / 1e9:14.2f}G {2 * (model.macs() - mixers) / 1e9:23.2f}G"
              f" {gflops:16.2f}")
    print("\n32x32x4 latents of ImageNet 256, patch 2, 1000 classes"
          "  (DiT-XL/2 at this size: 118.6G)\n          parameters   multiply-adds")
    for size in _SIZES:
        with torch.device("meta"):
            model, _ = build(f"DiS-{size}/2", (4, 32, 32), 1000)
        print(f"DiS-{size}/2 {sum(p.numel() for p in model.parameters()):13,d}"
              f" {model.macs() / 1e9:14.2f}G")
    print("\nWhy the paper's GFLOPs are a fraction of the multiply-adds: they were counted with hooks on\n"
          "layers, x2 for multiply and add, and Mamba's mixers call a kernel that hooks do not see. What\n"
          "is left (the column 'outside the mixers') is mostly the linear layers of the long skips.\n"
          "Counting everything, DiS-H/2 costs about twice DiT-XL/2, not a fraction of it.\n"
          "* from memory of the paper's table; the authors' counting script, re-created, gives the same,\n"
          "  except that the paper's 28.4 (S) and 6.57 (L) are 28.457 and 6.579 cut off, not rounded.")


if __name__ == "__main__":
    table()
