"""The selective scan of dis.py, fast. Same inputs, same outputs, same gradients as `selective_scan_ref` there.

    y = selective_scan(u, delta, A, B, C, D)

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t            the state, one for each row, channel and n
    y_t = C_t h_t + D u_t                                     what is read from it

The definition keeps all states for backward. They are a (b, L, e, N) tensor, N times as large as the input. The
first three scans here keep one of every T states, and compute the others again in backward. Tests compare each with the
definition:

    chunked    PyTorch, on any device. A sequence is cut into chunks, and work is done one chunk at a time.
    segments   For a few long sequences. Each is cut into segments. Chunked or fused scans the segments side by side,
               as if they were rows of the batch.
    fused      Triton, on CUDA. `chunked` as one kernel: a decay never leaves its register.
    plain      The definition again, slow, for derivatives that the others do not have: forward-mode AD, second
               derivatives, and all transforms of torch.func. It is chosen by itself.

Letters.

    b, L, e, N    rows of the batch, tokens, channels (in dis.py those of a mixer), states of a channel
    T             tokens of a chunk
    S, K          segments of a sequence, tokens of a segment
    A, B, C, D    Mamba's: (e, N), (b, L, N), (b, L, N), (e,). `At` is A transposed
    t, n, s       the number of a token, of a state, of a segment
    x_t, a_t      what enters, delta_t u_t; the decay, exp(delta_t A)
    h_t, g_t      the state after token t; its gradient, dLoss/dh_t
    dX            dLoss/dX, for every X

In arrays of states N stands before e: (b, L, N, e). Inner loops then run over e numbers that lie side by side.
"""
import functools
import importlib.util
import math
import threading
import warnings

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from diffusion import UserError

try:
    import triton
    import triton.language as tl
except ImportError:                                     # only PyTorch for CUDA brings it
    triton = None


def selective_scan(u, delta, A, B, C, D):
    """The same function as dis.py's `selective_scan_ref`, fast. It uses the memory of a few (b, L, e) arrays.

    u, delta (b, L, e); A (e, N); B, C (b, L, N); D (e,) -> y (b, L, e). Raises UserError if the shapes do not fit.
    Inputs may be bfloat16. y is float32 (or float64), and so is all work in between: bfloat16 keeps 8
    significant bits, and the rounding errors of hundreds of decays would add up. (Only a GPU without the
    fused kernels may use TF32, which keeps 11: for sums over states and channels, if TF32 is on.)"""
    (b, L, channels), N = u.shape, A.shape[1]
    fits = u.shape, channels, (b, L, N), (b, L, N), (channels,)
    if (delta.shape, len(A), B.shape, C.shape, D.shape) != fits:
        raise UserError("the shapes of u, delta, A, B, C, D do not fit: see selective_scan_ref in dis.py")
    return plain(u, delta, A, B, C, D) if transformed() else scan(u, delta, A, B, C, D)[0]


def transformed():
    """Is forward-mode AD or a transform of torch.func active? They look into what is computed, and PyTorch's custom
    operators are closed to them: forward-mode AD would even take every derivative for 0, without an error."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def plain(u, delta, A, B, C, D):
    """`selective_scan_ref` of dis.py, without an operation in place. All states stay in memory."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, delta, A, B, C, D = (v.to(dtype) for v in (u, delta, A, B, C, D))
    decays = (delta[:, :, None, :] * A.T).exp()                               # (b, L, N, e)
    enter = (delta * u)[:, :, None, :] * B[:, :, :, None]                     # (b, L, N, e)
    h, hs = torch.zeros_like(enter[:, 0]), []                                 # (b, N, e)
    for a_t, x_t in zip(decays.unbind(1), enter.unbind(1)):
        h = a_t * h + x_t
        hs.append(h)
    return (torch.stack(hs, dim=1) * C[:, :, :, None]).sum(2) + D * u         # (b, L, e)


# --- chunked: PyTorch, on any device -----------------------------------------------------------------
#
# Work is done a *block* at a time: one chunk of some rows. `starts` keeps the state at every chunk boundary,
# the end included: (b, chunks + 1, N, e). From these, backward computes the states inside a chunk again.

CHUNK = {"cpu": (16, 64), "cuda": (8, 8)}       # T: at least, at most
# How many numbers a block's work array (b, T, N, e) may have. On a CPU it should have 2 MB for each thread, to stay in
# the caches of the cores. On a GPU it should be large, since each operation on it is a launch.
ELEMENTS = {"cpu": 2**19, "cuda": 2**26}


def tuned(numbers, u):
    """The entry of CHUNK, ELEMENTS or BUSY for u's device. A device without an entry takes CUDA's."""
    return numbers.get(u.device.type, numbers["cuda"])


def chunk(rows, u, A):
    """T for this number of rows. Few rows do not fill a block, so their chunks are longer."""
    least, most = tuned(CHUNK, u)
    return max(least, min(most, tuned(ELEMENTS, u) // max(1, rows * A.numel())))


def block_size(u, A):
    """-> (rows, T) of a block."""
    T, threads = chunk(len(u), u, A), torch.get_num_threads() if u.is_cpu else 1
    return min(len(u), max(1, tuned(ELEMENTS, u) * threads // (T * A.numel()))), T


def blocks(u, A):
    """-> all blocks, as (slice of the rows, number of the chunk, slice of the tokens), the chunks in order."""
    (b, L, _), (rows, T) = u.shape, block_size(u, A)
    return [(slice(i, i + rows), number, slice(t, min(t + T, L)))
            for i in range(0, b, rows) for number, t in enumerate(range(0, L, T))]


class Spare(threading.local):
    memory = torch.empty(0, device="cpu")


SPARE = Spare()


def work_arrays(count, u, A):
    """-> (count, b, T, N, e). On a CPU the thread's next scan gets the same memory: to the system new memory is work,
    as much as the arithmetic."""
    rows, T = block_size(u, A)
    shape = count, rows, min(T, u.shape[1]), *A.T.shape
    if not u.is_cpu or type(u) is not torch.Tensor:     # the second: without numbers, to count memory
        return u.new_empty(shape)
    n, dtype = math.prod(shape), torch.promote_types(u.dtype, torch.float32)
    if SPARE.memory.dtype != dtype or len(SPARE.memory) < n:
        with torch.inference_mode(False):       # otherwise a scan outside of that mode could not write to it
            SPARE.memory = torch.empty(n, dtype=dtype, device="cpu")
    return SPARE.memory[:n].view(shape)


def states(h, x, delta, At, B, work):
    """The states of one block. h (b, N, e): the state before its first token; x, delta (b, T, e); B (b, T, N)
    -> decays a and states hs, both (b, T, N, e), which lie in `work`."""
    a, hs = work[:2, :len(x), :x.shape[1]]
    # exp(v) = 2^(v / log 2). On CPUs PyTorch's exp2 takes less than half the time of its exp.
    torch.mul(delta[:, :, None, :], At / math.log(2), out=a).exp2_()          # (b, T, N, e)
    torch.mul(x[:, :, None, :], B[:, :, :, None], out=hs)                     # (b, T, N, e)
    for a_t, h_t in zip(a.unbind(1), hs.unbind(1)):
        h = h_t.addcmul_(a_t, h)              # h_t = a_t h_{t-1} + x_t B_t     (b, N, e)
    return a, hs


def chunked(u, delta, A, B, C, D, starts, y):
    """Fills y (b, L, e) and `starts`, where starts[:, 0] is given: the state before the first token."""
    u, delta, B, C = (v.to(starts.dtype) for v in (u, delta, B, C))
    At, work = A.T.contiguous(), work_arrays(2, u, A)
    for rows, number, tokens in blocks(u, A):
        at = rows, tokens
        _, hs = states(starts[rows, number], delta[at] * u[at], delta[at], At, B[at], work)
        starts[rows, number + 1] = hs[:, -1]
        y[at] = torch.addcmul((C[at][:, :, None, :] @ hs)[:, :, 0], D, u[at])      # (b, T, e)


def chunked_backward(dy, u, delta, A, B, C, D, starts, carry):
    """-> the gradients of the six inputs. The gradients of the states are a scan from the right:

        g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}

    carry (b, N, e), updated in place: the gradient that flows in from the tokens to the right of these. For the
    last token t here it is exp(delta_{t+1} A) g_{t+1}, or 0 at the end of a sequence. On return, carry is the
    gradient that flows out to the left."""
    dy, u, delta, B, C = (v.to(starts.dtype) for v in (dy, u, delta, B, C))
    At, work = A.T.contiguous(), work_arrays(3, u, A)
    dA, dD = torch.zeros_like(At), torch.zeros_like(D)                        # (N, e), (e,)
    du, ddelta, dB, dC = (torch.empty_like(v) for v in (u, delta, B, C))
    for rows, number, tokens in reversed(blocks(u, A)):
        at = rows, tokens
        x = delta[at] * u[at]                                                 # (b, T, e)
        a, hs = states(starts[rows, number], x, delta[at], At, B[at], work)
        g = work[2, :len(x), :x.shape[1]]
        torch.mul(dy[at][:, :, None, :], C[at][:, :, :, None], out=g)         # (b, T, N, e)
        g[:, -1] += carry[rows]
        gs = g.unbind(1)[::-1]                                                # from the right: g_t, g_{t-1}, ..
        for a_t, g_t, before in zip(a.unbind(1)[::-1], gs, gs[1:]):
            before.addcmul_(a_t, g_t)                                         # (b, N, e)
        torch.mul(a[:, 0], g[:, 0], out=carry[rows])
        # A row times a matrix, (1, e) @ (e, N): a matrix times a column takes seven times as long.
        dC[at] = (dy[at][:, :, None, :] @ hs.mT)[:, :, 0]                     # (b, T, N)
        dB[at] = (x[:, :, None, :] @ g.mT)[:, :, 0]                           # (b, T, N)
        dx = (B[at][:, :, None, :] @ g)[:, :, 0]                              # (b, T, e)
        du[at] = torch.addcmul(delta[at] * dx, D, dy[at])
        dD += torch.mul(dy[at], u[at], out=x).sum((0, 1))
        # d/d(delta_t A) = g_t exp(delta_t A) h_{t-1}: g is multiplied by both, in place
        g.mul_(a)
        g[:, 1:].mul_(hs[:, :-1])
        g[:, 0].mul_(starts[rows, number])
        ddelta[at] = torch.mul(g, At, out=a).sum(2).addcmul_(dx, u[at])       # (b, T, e)
        dA += g.mul_(delta[at][:, :, None, :]).sum((0, 1))                    # (N, e)
    return du, ddelta, dA.T, dB, dC, dD


# --- segments: few long sequences ---------------------------------------------------------------------
#
# Tokens wait for each other, so a few long sequences (one image, say) keep neither a GPU nor the cores of a CPU
# busy. Each sequence is then cut into S segments. They are read side by side, as if they were rows of the batch,
# in two passes. Pass 1 reads every segment as if the state before it were 0; segment s ends in the state end_s.
# The scan is linear in the state before it. So the state h_s that really enters segment s is (see `entering`)
#
#     h_s = end_{s-1} + (product of the decays in segment s-1) h_{s-1},      h_0 = 0
#
# Pass 2 reads all segments again, now starting from these states. Backward does the same from right to left.

BUSY = {"cpu": 2**10, "cuda": 2**16}            # rows times channels that keep all cores busy


def segments(u):
    """S. It is 1 unless reading S segments side by side clearly gains more than the second pass costs."""
    b, L, e = u.shape
    S = min(tuned(BUSY, u) // max(1, b * e), L // (4 * tuned(CHUNK, u)[0]))
    return S if S > 4 else 1


def cut(x, S):
    """(b, L, .) -> (b S, K, .), where K is L / S rounded up. The zeros that fill the last segment are harmless:
    a token with delta = u = dy = 0 changes no state and no sum."""
    b, L, width = x.shape
    x = F.pad(x, (0, 0, 0, -L % S)) if S > 1 else x
    return x.contiguous().view(b * S, -1, width)


def entering(ends, delta, A, S):
    """ends (b S, N, e): the end_s of pass 1; delta (b S, K, e) -> h_s (b S, N, e), what enters each segment."""
    ends = ends.unflatten(0, (-1, S))                                                   # (b, S, N, e)
    decay = (delta.sum(1)[:, None] * A.T).exp().view_as(ends)                           # (b, S, N, e)
    h = torch.zeros_like(ends)
    for s in range(1, S):
        h[:, s] = ends[:, s - 1] + decay[:, s - 1] * h[:, s - 1]
    return h.flatten(0, 1)                                                              # (b S, N, e)


# --- the operator around them -------------------------------------------------------------------------

def scan_forward(u, delta, A, B, C, D):
    """-> y (b, L, e), and for backward `starts` (b S, chunks + 1, N, e)."""
    (b, L, channels), S, N = u.shape, segments(u), A.shape[1]
    dtype = torch.promote_types(u.dtype, torch.float32)
    # A custom operator runs under its caller's autocast, which would turn the products in here into bf16.
    with torch.autocast(u.device.type, enabled=False):
        forward, _ = engine(u.device, dtype)
        A, D = A.to(dtype), D.to(dtype)
        u, delta, B, C = (cut(v, S) for v in (u, delta, B, C))                          # (b S, K, .)
        y = torch.empty_like(u, dtype=dtype)
        starts = y.new_zeros(b * S, -(-u.shape[1] // chunk(b * S, u, A)) + 1, N, channels)
        if S > 1:
            forward(u, delta, A, B, C, D, starts, y)
            starts[:, 0] = entering(starts[:, -1], delta.to(dtype), A, S)
        forward(u, delta, A, B, C, D, starts, y)
    return y.view(b, -1, channels)[:, :L].contiguous(), starts


def scan_backward(dy, u, delta, A, B, C, D, starts):
    """-> the gradients of u, delta, A, B, C, D, in their own types."""
    (b, L, _), S, inputs = u.shape, segments(u), (u, delta, A, B, C, D)
    with torch.autocast(u.device.type, enabled=False):
        _, backward = engine(u.device, starts.dtype)
        A, D = A.to(starts.dtype), D.to(starts.dtype)
        dy, u, delta, B, C = (cut(v, S) for v in (dy, u, delta, B, C))                  # (b S, K, .)
        carry = torch.zeros_like(starts[:, 0])                                          # (b S, N, e)
        if S > 1:
            backward(dy, u, delta, A, B, C, D, starts, carry)
            carry = entering(carry.flip(0), delta.flip(0).to(A), A, S).flip(0)
        grads = backward(dy, u, delta, A, B, C, D, starts, carry)
    grads = (g if g.shape == v.shape else g.view(b, -1, v.shape[2])[:, :L] for g, v in zip(grads, inputs))
    return tuple(g.to(v.dtype).contiguous() for g, v in zip(grads, inputs))


@functools.lru_cache(maxsize=None)
def engine(device, dtype):
    """-> the two functions that do the work on this device, forward and backward. On CUDA (not ROCm), in float32
    and with Triton they are the fused ones, if these compile for this GPU and give the right numbers. If not, a
    warning says so once, and they are the chunked ones, as everywhere else."""
    if device.type == "cuda" and dtype == torch.float32 and triton is not None and not torch.version.hip:
        try:
            compare(device)
            return fused, fused_backward
        except Exception as error:
            warnings.warn(f"no fused scan on {device} ({error}): using the slower one", stacklevel=2)
    return chunked, chunked_backward


@functools.lru_cache(maxsize=None)
def compare(device):
    """-> those of CHOICES with which the fused scan compiles for this GPU and gives the numbers of the chunked one in
    float64. (In float32 that one may use TF32, with errors of 1e-3.) Raises the last error if there are none."""
    generator = torch.Generator(device).manual_seed(0)
    u, delta, B, C = (torch.rand(2, 11, k, device=device, generator=generator) for k in (80, 80, 2, 2))
    x, right = (u, delta, -u[0, 1, :, None] - B[0, 0], B, C, u[0, 0]), []

    def results(forward, backward, *x, **choice):
        y, starts = torch.empty_like(x[0]), x[0].new_zeros(2, -(-11 // chunk(2, u, x[2])) + 1, 2, 80)
        forward(*x, starts, y, **choice)
        return y, *backward(y, *x, starts, torch.zeros_like(starts[:, 0]), **choice)
    want = results(chunked, chunked_backward, *(v.double() for v in x))
    for choice in CHOICES:
        try:
            found = results(fused, fused_backward, *x, choice=choice)
            if not all((got - v).abs().max() <= 1e-4 * v.abs().max() for got, v in zip(found, want)):
                raise ValueError("it gives other numbers")
            right.append(choice)
        except Exception as error:      # compilers meet unknown GPUs with all kinds of exceptions
            last = error
    if not right:
        raise last
    return right


# To autograd, torch.compile and PyTorch's counters the scan is one operator, not thousands of small ones. Each
# function below tells one of them what it needs. The operators' namespace is this file's name: a renamed copy
# must not register the same names.
NAMESPACE = "".join(c if c.isalnum() else "_" for c in __name__)
INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D"
scan = torch.library.custom_op(f"{NAMESPACE}::scan", scan_forward, mutates_args=(),
                               schema=f"({INPUTS}) -> (Tensor, Tensor)")
scan_grad = torch.library.custom_op(
    f"{NAMESPACE}::scan_backward", scan_backward, mutates_args=(),
    schema=f"(Tensor dy, {INPUTS}, Tensor starts) -> ({', '.join(['Tensor'] * 6)})")


@scan.register_fake
def shapes(u, delta, A, B, C, D):
    """The outputs of `scan_forward` without numbers, for torch.compile and support/cost.py."""
    S, y = segments(u), u.new_empty(u.shape, dtype=torch.promote_types(u.dtype, torch.float32))
    K, rows = -(-u.shape[1] // S), len(u) * S
    return y, y.new_empty(rows, -(-K // chunk(rows, u, A)) + 1, A.shape[1], A.shape[0])


@scan_grad.register_fake
def shapes_backward(dy, *inputs):
    return tuple(v.new_empty(v.shape) for v in inputs[:6])


def keep(ctx, inputs, output):
    """For autograd: keeps what backward needs."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def differentiate(ctx, dy, _):
    if dy is None:
        return (None,) * 6
    if torch.is_grad_enabled() or transformed():            # create_graph=True: this, too, will be differentiated
        return torch.func.vjp(plain, *ctx.saved_tensors[:6])[1](dy)
    return scan_grad(dy, *ctx.saved_tensors)


scan.register_autograd(differentiate, setup_context=keep)


# For the FLOP counter, which hands over shapes. A multiply-add is two FLOPs. A second pass over segments is not
# counted.

@register_flop_formula(getattr(torch.ops, NAMESPACE).scan)
def flops(u, delta, A, *_, **__):
    """4 multiply-adds for each token, channel and state: the decay, what enters, the update, the read."""
    return 2 * 4 * math.prod(u) * A[1]


@register_flop_formula(getattr(torch.ops, NAMESPACE).scan_backward)
def flops_backward(dy, u, delta, A, *_, **__):
    """12 multiply-adds: 3 make the state again; 2 are for g; 3 for dB, dC and dx; 4 for dA and ddelta."""
    return 2 * 12 * math.prod(u) * A[1]


# --- fused: the same, as Triton kernels for CUDA -----------------------------------------------------
#
# A program is one warp (32 threads). It owns one row and BLOCK = 64 channels, two for each thread, and walks
# through the sequence a chunk of T = 8 tokens at a time. Names in the plural are lists of T vectors (BLOCK,),
# which are 2 T registers of each thread. The N states of a chunk are treated one after the other. So u and
# delta are read once for all of them, and a decay exp(delta_t A) never leaves its register. Between chunks the
# states wait in memory, in `starts`, and there backward finds them.
#
# Why BLOCK = 64: a thread sums over the states of its own channels (y_t = C_t h_t) without asking others. But
# dB_t and dC_t are sums over channels. Each needs 5 exchanges between threads, no more for 64 channels than for
# 32. Why T = 8: `starts` is then N / T = 2 times as large as u. Backward holds 7 lists, which take 112 of the 168
# registers that it may use. With 168 registers a multiprocessor has room for 12 warps, 3 for each of its four
# schedulers: two compute while one waits for memory. (The compiler asks for 244 to 255. With 168 it spills 88 to 200
# bytes of each thread, outside the loop over n.) Compiled by Triton 3.9 for compute capability 8.0 and 9.0, one state
# of one chunk takes 155 or 156 instructions forward, and 168 if u, B and C are bf16. Its 16 exps occupy their unit
# for 128 cycles. Backward it takes 476 to 524, a third of them for sums over channels. So the number of instructions
# sets the pace. If the number of channels is no multiple of 16, it is up to 193 and 565.
if triton is not None:
    LOG2_E = tl.constexpr(1.4426950408889634)           # the hardware has 2^x

    @triton.jit
    def _tokens(p, row, channels, own, rest, T: tl.constexpr):
        """Rows row, ..., row + T - 1 of p (rows, channels), columns `own`. After `rest` rows come zeros, which are
        harmless as in `cut`."""
        xs = ()
        for j in tl.static_range(T):                    # unrolled: registers have no index at run time
            inside = own < tl.where(j < rest, channels, 0)
            xs += (tl.load(p + (row + j) * channels + own, mask=inside, other=0.0).to(tl.float32),)
        return xs

    @triton.jit(do_not_specialize=["L", "chunks"])      # or each length would be compiled again
    def _fused(u, delta, A, B, C, D, starts, y, L, channels, chunks,
               N: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
        """`chunked`. Per token, channel and state: one exp, four multiplications and two additions."""
        b = tl.program_id(0).to(tl.int64)       # b L e can exceed 2^31. So all that b enters has 64 bits
        own = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)                                # (BLOCK,)
        D_own = tl.load(D + own, mask=own < channels, other=0.0)                            # (BLOCK,)
        for number in range(chunks):
            row, rest = b * L + number * T, L - number * T
            deltas = _tokens(delta, row, channels, own, rest, T)                            # T x (BLOCK,)
            us = _tokens(u, row, channels, own, rest, T)                                    # T x (BLOCK,)
            xs, ys = (), ()
            for j in tl.static_range(T):
                xs += (deltas[j] * us[j],)                          # x = delta u
                ys += (D_own * us[j],)
            for n in range(N):
                rate = LOG2_E * tl.load(A + n * channels + own, mask=own < channels, other=0.0)     # (BLOCK,)
                Bs = _tokens(B, row, N, n, rest, T)                                         # T x ()
                Cs = _tokens(C, row, N, n, rest, T)                                         # T x ()
                at = starts + ((b * (chunks + 1) + number) * N + n) * channels + own
                h = tl.load(at, mask=own < channels, other=0.0)                             # (BLOCK,)
                sums = ()
                for j in tl.static_range(T):
                    h = tl.exp2(deltas[j] * rate) * h + xs[j] * Bs[j]
                    sums += (ys[j] + h * Cs[j],)
                ys = sums
                tl.store(at + N * channels, h, mask=own < channels)
            for j in tl.static_range(T):
                tl.store(y + (row + j) * channels + own, ys[j], mask=own < tl.where(j < rest, channels, 0))
            tl.debug_barrier()                          # other threads of the warp may read `starts` next

    @triton.jit(do_not_specialize=["L", "chunks"])      # or each length would be compiled again
    def _fused_backward(dy, u, delta, A, B, C, D, starts, carry, du, ddelta, dA, dB, dC, dD, L, channels, chunks,
                        N: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
        """`chunked_backward`. Per chunk it computes the states again, left to right, then g, right to left."""
        b = tl.program_id(0).to(tl.int64)
        own = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)                                # (BLOCK,)
        D_own = tl.load(D + own, mask=own < channels, other=0.0)                            # (BLOCK,)
        sumD = tl.zeros([BLOCK], tl.float32)
        for number in range(chunks - 1, -1, -1):
            row, rest = b * L + number * T, L - number * T
            deltas = _tokens(delta, row, channels, own, rest, T)                            # T x (BLOCK,)
            us = _tokens(u, row, channels, own, rest, T)                                    # T x (BLOCK,)
            dys = _tokens(dy, row, channels, own, rest, T)                                  # T x (BLOCK,)
            xs, dxs, ddeltas = (), (), ()
            for j in tl.static_range(T):
                xs += (deltas[j] * us[j],)
                dxs += (tl.zeros([BLOCK], tl.float32),)             # dx, summed over n
                ddeltas += (tl.zeros([BLOCK], tl.float32),)         # the part of ddelta through exp(delta A)
                sumD += dys[j] * us[j]
            for n in range(N):
                A_own = tl.load(A + n * channels + own, mask=own < channels, other=0.0)     # (BLOCK,)
                Bs = _tokens(B, row, N, n, rest, T)                                         # T x ()
                Cs = _tokens(C, row, N, n, rest, T)                                         # T x ()
                before = starts + ((b * (chunks + 1) + number) * N + n) * channels + own
                h = tl.load(before, mask=own < channels, other=0.0)                         # (BLOCK,)
                at = (b * N + n) * channels + own
                g = tl.load(carry + at, mask=own < channels, other=0.0)                     # (BLOCK,)
                sumA = tl.load(dA + at, mask=own < channels, other=0.0)                     # (BLOCK,)
                share = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) * L + row) * N + n
                decays, kept = (), ()
                for j in tl.static_range(T):
                    decays += (tl.exp2(deltas[j] * (LOG2_E * A_own)),)
                    kept += (decays[j] * h,)                        # exp(delta_t A) h_{t-1}
                    h = kept[j] + xs[j] * Bs[j]
                    tl.store(dC + share + j * N, tl.sum(h * dys[j], 0), mask=j < rest)
                sumx, sumd = (), ()
                for j in tl.static_range(T - 1, -1, -1):
                    g += dys[j] * Cs[j]
                    tl.store(dB + share + j * N, tl.sum(g * xs[j], 0), mask=j < rest)
                    dm = g * kept[j]                                # d/d(delta_t A)
                    sumA += deltas[j] * dm
                    sumx = (dxs[j] + g * Bs[j],) + sumx
                    sumd = (ddeltas[j] + dm * A_own,) + sumd
                    g *= decays[j]
                dxs, ddeltas = sumx, sumd
                tl.store(carry + at, g, mask=own < channels)
                tl.store(dA + at, sumA, mask=own < channels)
            us = _tokens(u, row, channels, own, rest, T)    # read again: keeping them would take 16 registers all along
            for j in tl.static_range(T):
                at, inside = (row + j) * channels + own, own < tl.where(j < rest, channels, 0)
                tl.store(du + at, deltas[j] * dxs[j] + D_own * dys[j], mask=inside)
                tl.store(ddelta + at, us[j] * dxs[j] + ddeltas[j], mask=inside)
            tl.debug_barrier()
        tl.store(dD + b * channels + own, sumD, mask=own < channels)


# More warps would wait for each other at each sum over channels. (And if they shared channels, they would race.)
BLOCK, OPTIONS = 64, dict(num_warps=1, enable_fp_fusion=True)
# BLOCK, and the registers of a thread in backward. The first is for many rows. Few rows leave schedulers idle: then
# no spilling may be faster, or 32, with twice as many programs but 1.6 times as many instructions. T is no choice: it
# sets the memory that is kept, and compiled graphs know the shape of `starts`.
CHOICES, CHOSEN = ((BLOCK, 168), (BLOCK, 255), (32, 128)), {}


def fastest(direction, u, N, run):
    """-> one of CHOICES. On a GPU they are timed when a size comes for the first time in a process. It is the first if
    algorithms shall be deterministic (another one adds up dB and dC in another order), and where nothing can run."""
    real = type(u) is torch.Tensor and u.is_cuda            # no fake tensor, and not in Triton's interpreter
    choices, size = compare(u.device) if real else CHOICES[:1], (direction, u.device, u.shape, u.dtype, N)
    if len(choices) == 1 or torch.are_deterministic_algorithms_enabled():
        return choices[0]
    if size not in CHOSEN and not torch.cuda.is_current_stream_capturing():     # nothing can wait in a CUDA graph
        with torch.cuda.device_of(u):
            CHOSEN[size] = min(choices, key=lambda choice: milliseconds(lambda: run(choice)))
    return CHOSEN.get(size, choices[0])


def milliseconds(run):                                      # Triton's own `do_bench` would take 256 MB
    run()                                                   # compiles
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(5):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 5


def fused(u, delta, A, B, C, D, starts, y, choice=None):
    """`chunked`. Each call gives the same bits: no two programs add to the same number."""
    (b, L, channels), N, chunks = u.shape, A.shape[1], starts.shape[1] - 1
    BLOCK, _ = choice or fastest("forward", u, N, lambda choice: fused(u, delta, A, B, C, D, starts, y, choice))
    with torch.cuda.device_of(u):                       # Triton launches on the current GPU
        _fused[b, -(-channels // BLOCK)](u, delta, A.T.contiguous(), B, C, D.contiguous(), starts, y, L, channels,
                                         chunks, N, chunk(b, u, A), BLOCK, **OPTIONS)


def fused_backward(dy, u, delta, A, B, C, D, starts, carry, choice=None):
    """`chunked_backward`. Each program writes its share of dA, dB, dC and dD, and PyTorch adds the shares up."""
    (b, L, channels), N, chunks = u.shape, A.shape[1], starts.shape[1] - 1
    BLOCK, registers = choice or fastest("backward", u, N, lambda choice: fused_backward(
        dy, u, delta, A, B, C, D, starts, carry.clone(), choice))
    grid, du, ddelta = (b, -(-channels // BLOCK)), torch.empty_like(u), torch.empty_like(delta)
    dB, dC = starts.new_empty(2, grid[1], b, L, N)
    dA, dD = torch.zeros_like(carry), starts.new_empty(b, channels)
    with torch.cuda.device_of(u):
        _fused_backward[grid](dy, u, delta, A.T.contiguous(), B, C, D.contiguous(), starts, carry, du, ddelta, dA, dB,
                              dC, dD, L, channels, chunks, N, chunk(b, u, A), BLOCK, maxnreg=registers, **OPTIONS)
    return du, ddelta, dA.sum(0).T, dB.sum(0), dC.sum(0), dD.sum(0)


# --- somebody else's kernel --------------------------------------------------------------------------

def mamba_ssm_scan(u, delta, A, B, C, D):
    """`selective_scan` by the CUDA kernel of Mamba's authors (pip install mamba-ssm). Its arrays have tokens last.
    Raises UserError in backward if a second derivative is asked for, which it lacks."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, delta, B, C = (v.to(dtype).mT.contiguous() for v in (u, delta, B, C))            # (b, ., L)
    y = selective_scan_fn(u, delta, A, B, C, D).mT                                      # (b, L, e)
    if y.requires_grad:
        y.register_hook(refuse_second_derivatives)
    return y


def refuse_second_derivatives(dy):
    if torch.is_grad_enabled():                 # create_graph=True
        raise UserError("the scan of mamba_ssm has no second derivatives: drop scan=mamba_ssm, since ours has")


def choose_scan(name):
    """The option `scan` of dis.py: "auto" -> `selective_scan`; "mamba_ssm" -> that package's kernel where u is
    on a GPU. Raises UserError if there is a GPU but not the package."""
    if name == "auto":
        return selective_scan
    if torch.cuda.is_available() and not importlib.util.find_spec("mamba_ssm"):
        raise UserError("scan=mamba_ssm needs that package, which needs CUDA's compiler: pip install mamba-ssm, or "
                        "drop scan=mamba_ssm, since the built-in scan is fused on GPUs, too")
    theirs = torch.compiler.disable(mamba_ssm_scan)     # as a decorator, it would import the compiler at each start
    return lambda u, *rest: (theirs if u.is_cuda and not transformed() else selective_scan)(u, *rest)
