"""DiffuSSM: Diffusion Models Without Attention, in one file.

Jing Nathan Yan, Jiatao Gu, Alexander M. Rush. arXiv 2311.18257, CVPR 2024.

The idea. Attention costs L^2 for L pixels, so transformers cut the image into patches first and
lose detail. DiffuSSM mixes single pixels (of the latent) by two long convolutions, one per reading
direction, whose kernels are state space models (S4D), at a cost of L log L. Then the dense layers
are the expensive part, so they form an "hourglass" (the paper's word, though it is long in the
middle): the residual stream holds M neighbouring tokens folded into one, and only inside a block,
around the convolution, is the sequence unfolded to its full length. There is no attention anywhere.

Glossary. Some letters mean two things:
    in S4D's formulas and parameters    B input vector, C output vector, D direct path, x state, y output
    in shapes and everywhere else       B batch, C channels of the image, D width, x image or stream, y class
H counts SSMs in S4D's shapes; elsewhere it is the image's height.

| code            | symbol    | shape           | meaning, and where it is from                          |
|-----------------|-----------|-----------------|--------------------------------------------------------|
| `width`         | D         |                 | channels of the residual stream                        |
| `patch`         | P         |                 | side of a patch; 1: none                               |
| `ratio`         | M         |                 | of the hourglass: tokens folded into one; 1: none      |
|                 | m         |                 | phase: a token's place, 0 .. M-1, among the M folded   |
|                 | L         |                 | tokens at full length, H W / P^2, row by row           |
|                 | J         |                 | tokens of the residual stream, L / M                   |
| `I`             | I_j       | (B, J, D)       | what a block reads: the normed, modulated stream       |
| `W_0`, `W_up`   | W_0, W^up | D -> D -> M 2D  | expand each of the J tokens to its M phases            |
| `U`             | U_l       | (B, L, 2D)      | for the SSMs: forward half, backward half (choice 1)   |
| `Y`             | Y         | (B, L, 2D)      | both halves after their SSMs                           |
| `W_down`        | W^down    | (M, 2D, 2D / M) | one matrix per phase, back to J tokens                 |
| `I_` (I')       | I'_j      | (B, J, 2D)      | what the M phases bring back                           |
| `W_1, W_2, W_3` | W_1 ...   |                 | gate from I, value from I', and out                    |
| `state`         | N         |                 | state size of an SSM (64), as N / 2 conjugate pairs    |
| `dt`            | Delta     | (2D,)           | step size of each channel (S4D Sec. 3)                 |
| `A`, `C`        | A, C      | (2D, N/2)       | complex; stored as real numbers                        |
| `log_Abar`      | log A-bar | (2D, N/2)       | one token's decay and rotation of each state           |
| `CB`            | C B-bar   | (2D, N/2)       | diagonal A: only this product of B and C matters       |
| `K`             | K         | (2D, L)         | the convolution kernel; in the model with D in K_0     |
| `c`             | t + y     | (B, D)          | time plus class, the same at each position             |

S4D: On the Parameterization and Initialization of Diagonal State Space Models, Gu, Gupta, Goel, Re
2022, 2206.11893. DiT: Scalable Diffusion Models with Transformers, Peebles & Xie 2022, 2212.09748. BiGS:
Pretraining Without Attention, Wang et al. 2022, 2212.10544, the declared ancestor: gated, bidirectional
S4D, for text. Not here: training (train.py), the noise schedule (diffusion.py), the VAE that makes a
32x32x4 latent of a 256 px image. No code and no weights of the authors could be found; the paper gives,
among other things, the equations of the block, the number of its parameters (9 D^2 + 2 M D^2), D and depth
of XL. What was read: the text and the equations of the main paper, in translation; not its appendix nor its
drawing of the block (Figure 2). "Not given", "no .. mentioned" and "only .. in print" mean: in what was read.

Choices. What the paper says, what it leaves open, and what this file does. "Ours" is inferred or chosen by
us; the rest is the paper's or the named source's.
 1. U is printed as (L, D), Y as (L, 2D). Keep Y, and M different W^up and W^down. Three widths are then open:
    of U, between W_0 and W^up, and of the gate (W_1 and W_2 lead to it, W_3 from it). Of D/2, D and 2D for
    each, only 2D, D, D count 9 D^2 + 2 M D^2 at every M. Ours: U has 2D, a half for each direction.
 2. The text mentions an MLP after the two directions are concatenated; in the count there is room
    for none. We take it to be W^down.
 3. "An activation" sigma: ours is GELU, that of BiGS.
 4. No norm appears in the equations. Ours, as in DiT: LayerNorm without parameters before each
    block, and before the decoder.
 5. Time and class are "integrated at each position". Ours: a 2-layer MLP per block, c -> D -> 3D,
    makes shift, scale and gate, the last layer zero at the start as in DiT's adaLN-Zero (which has one
    layer, c -> 6D; that would give 745.9M). As in DiT, SiLU and one layer, c -> 2D, also zero at the start,
    make shift and scale before the decoder; and c is 256 cosines and sines of t through a 2-layer MLP, plus
    a table of classes with one more row for "none". The block MLP's 4 D^2 are what the paper's total of
    about 673M leaves for it: XL has 668,878,864 parameters with it, 514.8M without.
 6. Folding M tokens into the J x D stream, and back: ours is one linear map of M tokens that follow each
    other in a row, together with the patch's: M P^2 C -> D and back. (Where M does not divide W / P, some
    groups run on into the next row. A group has its first token's position.)
 7. No positions are mentioned. Ours: fixed sines and cosines of row and column, no parameters.
 8. Only XL has its depth in print (29), S its width (384); L's width, "786", we take to be a slip for
    768. The depths of S and L are ours: 12, DiT-S's, and 24, DiT-L's, although 768 is DiT-B's width (so L
    has 248M parameters, between DiT-B's and DiT-L's).
 9. S4D's settings are not given. Ours are those of its authors' code: N = 64, dt log-uniform in
    [0.001, 0.1], A as S4D-Lin, zero-order hold, a direct path D. Their layer's own GELU, output matrix
    and GLU are left out: the block has its own (and they would cost 4 L D^2 more).
10. Both directions see the current token. (The S4 code's bidirectional option is strictly future in its
    backward half.) The two directions share nothing.
11. Linear layers start Xavier-uniform, the MLP of the time step at std 0.02 and the last layers at zero, as
    in DiT; each phase of W^up and W^down by itself.
12. S4D's authors train dt and A at a rate of 0.001 at most and without weight decay. Ours: one rate for all,
    the same up to 0.001. Weight decay (train.py's default: none) would pull dt to 1 and frequencies to 0.
13. 280.3 and 1066.2 Gflops an image are not printed as such. They are the total Gflops divided by the images
    of the paper's Table 1 (1.85e11 / 660M, 3.22e11 / 302M), as others quote it. `python diffussm.py` does
    not reproduce them; see what it prints.
"""
import inspect
import math
import re
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion import SCHEDULES, Diffusion, UserError


# --- S4D: one state space model per channel ------------------------------------------------------
#
# x'(t) = A x(t) + B u(t),  y(t) = 2 Re C x(t) + D u(t)          A diagonal: N/2 separate complex states
#
# (each stands for itself and its conjugate, hence 2 Re). If u is constant over each step of length dt,
#
# x_l = Abar x_{l-1} + Bbar u_l,  y_l = 2 Re C x_l + D u_l        with Abar = exp(dt A), Bbar = (Abar - 1) / A
#
# ("zoh"; `discretize` has another form). Abar is the same at every token, so that the recurrence unrolls into
#
# y = K * u + D u,  K_l = 2 Re sum_n C_n Bbar_n Abar_n^l           * : convolution over tokens
#
# Mamba (dis.py) gives that up: its Abar depends on the token. Here the kernel depends on parameters only, not
# even on the image.
#
# In shapes H counts SSMs: 2D in the model, D per direction. The functions want float32 or float64 and no
# autocast; BidirectionalS4D sees to that.

def initial_state_matrix(init, N):
    """Im A_n, (N/2,) float64, and B_n, (N/2,) complex128, at the start; Re A_n is always -1/2.
    S4D Sec. 4. What the initialisation decides is which periods a kernel hears: with "zoh" 2 pi / (dt Im A_n)
    tokens. (Where dt Im A_n exceeds pi, a rotation is seen as a slower one: harmless. With "lin" and N = 64
    that happens to the fastest states at dt above 0.03. "bilinear" squeezes all angles below pi.)"""
    n = torch.arange(N, dtype=torch.float64, device="cpu")
    ones = torch.ones(N // 2, dtype=torch.complex128, device="cpu")
    if init == "lin":                   # a Fourier series
        return math.pi * n[:N // 2], ones
    if init == "inv":                   # approximates "legs"; a few very fast states
        return N / math.pi * (N / (2 * n[:N // 2] + 1) - 1), ones
    # "legs": HiPPO-LegS, made to remember all of the past by Legendre polynomials: A = -1/2 + skew - p p^T.
    # Without the rank-one p p^T its eigenvalues are -1/2 + i omega. `eigh` wants a Hermitian matrix, hence
    # -i skew. B = sqrt(2) p is carried into the basis of eigenvectors, and one of each conjugate pair kept.
    p = (n + 0.5).sqrt()
    skew = (p[:, None] * p).triu(1) - (p[:, None] * p).tril(-1)                        # (N, N)
    omega, V = torch.linalg.eigh(-1j * skew)
    B = V.mH @ (2 ** 0.5 * p).to(V.dtype)                                              # (N,)
    return omega[omega > 0], B[omega > 0]


def discretize(A, dt, method):
    """Complex A (H, N/2), dt (H,) -> log Abar, Bbar, both (H, N/2), for B = 1. S4D Sec. 3.1."""
    dtA = dt[:, None] * A                                                              # (H, N/2)
    if method == "zoh":                 # zero-order hold: exact if u is constant over a step
        return dtA, (dtA.exp() - 1) / A
    return ((1 + dtA / 2) / (1 - dtA / 2)).log(), dt[:, None] / (1 - dtA / 2)         # "bilinear"


def kernel_ref(log_Abar, CB, L):
    """The definition: a Vandermonde matrix per channel. log_Abar, CB complex (H, N/2) -> K (H, L).
    Keeps L N numbers per channel for backward."""
    V = (log_Abar[:, :, None] * torch.arange(L, device=CB.device)).exp()               # (H, N/2, L)
    return 2 * (CB[:, :, None] * V).sum(1).real                                        # (H, L)


def kernel(log_Abar, CB, L):
    """The same, from two small Vandermonde matrices. With l = a + b, where a steps by S, about sqrt(L),
    and b < S,

        K_l = 2 Re sum_n (C_n Bbar_n Abar_n^a) Abar_n^b

    is the product of an (L/S, N/2) and an (N/2, S) matrix: N sqrt(L) exponentials instead of N L / 2.
    Equal to `kernel_ref`: tests/test_diffussm.py::test_three_kernels_agree."""
    S = math.isqrt(L - 1) + 1                                                   # sqrt(L), rounded up
    a = torch.arange(0, L, S, device=CB.device)                                        # (L/S,)
    b = torch.arange(S, device=CB.device)                                              # (S,)
    h = 256 if CB.device.type == "cpu" else len(CB)         # channels whose powers fit a CPU's cache
    Ks = []
    for log_Abar_h, CB_h in zip(log_Abar.split(h), CB.split(h)):
        coarse = (2 * CB_h)[:, None] * powers(log_Abar_h, a)                           # (h, L/S, N/2)
        fine = powers(log_Abar_h.conj(), b)                                            # (h, S, N/2)
        # Wanted: Re(coarse Abar^b). `fine` is conj(Abar^b), so that it is Re coarse Re fine + Im coarse Im
        # fine: a real product, faster than a complex one. (On a GPU where TF32 is allowed, train.py's default
        # there, its inputs are rounded to TF32's 10 bits of mantissa.)
        coarse, fine = (torch.view_as_real(x).flatten(2) for x in (coarse, fine))      # (h, ., N)
        Ks.append((coarse @ fine.mT).flatten(1)[:, :L])                                # (h, L)
    return torch.cat(Ks)                                                               # (H, L)


def powers(log_Abar, l):
    """Abar_n^l, complex (H, N/2), (k,) -> (H, k, N/2). By real exp, cos and sin, since CPUs take the complex
    exp one number at a time: 4 times slower."""
    decay, angle = log_Abar.real[:, None], log_Abar.imag[:, None]                      # (H, 1, N/2)
    return torch.polar((decay * l[:, None]).exp(), angle * l[:, None])                 # (H, k, N/2)


def ssm_ref(u, log_Abar, CB, D):
    """The recurrence, one token after the other. Its x is without the factor Bbar which, since it is the same
    at every token, can be multiplied at the output: CB = C Bbar.

    u (B, L, H): the first half of the H channels is read from the left, the second from the right.
    log_Abar, CB complex (H, N/2), D (H,) -> y (B, L, H). Both directions see the current token.
    """
    def read(u, log_Abar, CB):
        Abar, x, ys = log_Abar.exp(), 0, []
        for u_l in u.unbind(1):
            x = Abar * x + u_l[:, :, None]                                         # (B, H/2, N/2)
            ys.append(2 * (CB * x).sum(-1).real)                                       # (B, H/2)
        return torch.stack(ys, dim=1)                                                  # (B, L, H/2)

    half = u.shape[2] // 2
    y_left = read(u[..., :half], log_Abar[:half], CB[:half])
    y_right = read(u[..., half:].flip(1), log_Abar[half:], CB[half:]).flip(1)
    return torch.cat([y_left, y_right], dim=2) + D * u                                 # (B, L, H)


def ssm(u, log_Abar, CB, D):
    """The same as a convolution. Equal to `ssm_ref`: tests/test_diffussm.py::test_ssm_*. (The model takes the
    two steps apart, `impulse_response` and `convolve`, so that sampling can keep the kernel.)"""
    return convolve(u, with_direct_path(kernel(log_Abar, CB, u.shape[1]), D))


def with_direct_path(K, D):
    """D u_l is the convolution with a kernel that is D at 0: one addition to K, not L per image."""
    return K + F.pad(D[:, None], (0, K.shape[1] - 1))                                  # (H, L)


# The convolution is an operator of its own: torch.compile takes it as one step, of which it needs to know the
# shapes alone, and Inductor has no code for complex numbers. The backward is by hand, too: PyTorch's own of
# rfft is a complex FFT of twice the work, and would keep spectra; this one keeps u and K.
OPS = re.sub(r"\W", "_", __name__)      # namespace: a changed copy of this file has its own operators


@torch.library.custom_op(f"{OPS}::convolve", mutates_args=())
def convolve(u: Tensor, K: Tensor) -> Tensor:
    """u (B, L, H), K (H, L) -> y (B, L, H). The first half of the channels is read from the left, y_l =
    sum_{i <= l} K_i u_{l-i}, the second from the right, y_l = sum_{i < L-l} K_i u_{l+i}. Here and below h
    and b are slices of channels and images; in shapes, their lengths."""
    y = torch.empty_like(u)
    for h, right, rows in tiles(u):
        K_hat = spectrum(K[h], mirrored=right)                                         # (h, L+1)
        for b in rows:
            y[b, :, h] = irfft(rfft(u[b, :, h].mT).mul_(K_hat)).mT                     # (b, L, h)
    return y


@torch.library.custom_op(f"{OPS}::convolve_backward", mutates_args=())
def convolve_backward(dy: Tensor, u: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """Convolutions and correlations, so products of spectra (_hat), in a correlation one is conjugated:

    from the left     du_l = sum_i K_i dy_{l+i}    conj(K_hat) dy_hat
                      dK_i = sum_l u_l dy_{l+i}    conj(u_hat) dy_hat
    from the right    du_l = sum_i K_i dy_{l-i}    K_hat dy_hat
                      dK_i = sum_l dy_l u_{l+i}    conj(dy_hat) u_hat, the conjugate of what it is above
    """
    du, dK = torch.empty_like(u), torch.empty_like(K)
    for h, right, rows in tiles(u):
        K_hat = spectrum(K[h], mirrored=not right)                                     # (h, L+1)
        dK_hat = torch.zeros_like(K_hat)
        for b in rows:
            dy_hat = rfft(dy[b, :, h].mT)                                              # (b, h, L+1)
            dK_hat += rfft(u[b, :, h].mT).conj_physical_().mul_(dy_hat).sum(0)         # (h, L+1)
            du[b, :, h] = irfft(dy_hat.mul_(K_hat)).mT                                 # (b, L, h)
        dK[h] = irfft(dK_hat.conj() if right else dK_hat)                              # (h, L)
    return du, dK


convolve.register_fake(lambda u, K: torch.empty_like(u))
convolve_backward.register_fake(lambda dy, u, K: (torch.empty_like(u), torch.empty_like(K)))
convolve.register_autograd(lambda ctx, dy: convolve_backward(dy, *ctx.saved_tensors),
                           setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

TILE = {"cpu": 2**18}                   # numbers per tile of u, whose spectra then fit a CPU's cache


def tiles(u):
    """-> [(channels, read from the right?, [images, ..]), ..]; where TILE says nothing, one per direction."""
    B, L, H = u.shape
    most = TILE.get(u.device.type, u.numel())
    h = min(H // 2, max(1, most // L))
    b = max(1, most // (L * h))
    return [(slice(i, min(i + h, end)), end == H, [slice(j, j + b) for j in range(0, B, b)])
            for end in (H // 2, H) for i in range(end - H // 2, end, h)]


def spectrum(K, mirrored):
    """A kernel read from the right, y_l = sum_i K_i u_{l+i}, is the mirror image of one read from the
    left, and to mirror in time is to conjugate in frequency. Hence no flips."""
    return rfft(K).conj_physical_() if mirrored else rfft(K)


def rfft(u):
    # padded to 2L: a product of spectra is a circular convolution, whose end would wrap to the start
    return torch.fft.rfft(u.contiguous(), n=2 * u.shape[-1])                           # (.., L+1)


def irfft(u_hat):
    L = u_hat.shape[-1] - 1
    return torch.fft.irfft(u_hat, n=2 * L)[..., :L]                                    # (.., L)


class BidirectionalS4D(nn.Module):
    """(B, L, 2D) -> (B, L, 2D): D channels read from the left, D from the right.

    All parameters are real: .bfloat16() drops the imaginary part of complex ones, and optimizers, DDP and
    file formats support them halfway. Always computed in float32 (or float64; on TF32 see `kernel`), inside
    autocast too: bf16 has no FFT, and powers of Abar would lose their angle.
    """

    def __init__(self, channels, state=64, init="lin", discretization="zoh", dt_min=1e-3, dt_max=0.1):
        super().__init__()
        self.discretization = discretization
        self.K = None                       # (2D, L), D in it; set by `DiffuSSM.frozen`
        self.log_dt = nn.Parameter(torch.empty(channels))
        self.log_neg_A_real = nn.Parameter(torch.empty(channels, state // 2))
        self.A_imag = nn.Parameter(torch.empty(channels, state // 2))
        self.C = nn.Parameter(torch.empty(channels, state // 2, 2))
        self.D = nn.Parameter(torch.empty(channels))
        omega, B = initial_state_matrix(init, state)        # B goes into C: only their product matters
        with torch.no_grad():
            # a state remembers 1 / (dt / 2) tokens: 20 to 2000
            self.log_dt.uniform_(math.log(dt_min), math.log(dt_max))
            self.log_neg_A_real.fill_(math.log(0.5))
            self.A_imag.copy_(omega.expand(channels, -1))
            C = torch.randn(channels, state // 2, 2, device="cpu") / 2**0.5
            self.C.copy_(torch.view_as_real(torch.view_as_complex(C) * B))             # (2D, N/2, 2)
            self.D.normal_()

    def discretized(self, dtype=torch.float32):
        """-> log_Abar, CB, complex (2D, N/2)."""
        log_dt, log_neg_A_real, A_imag, C = (
            whole(p).to(dtype) for p in (self.log_dt, self.log_neg_A_real, self.A_imag, self.C))
        A = torch.complex(-log_neg_A_real.exp(), A_imag)    # (2D, N/2); Re A < 0: no state can explode
        log_Abar, Bbar = discretize(A, log_dt.exp(), self.discretization)
        return log_Abar, torch.view_as_complex(C) * Bbar

    def impulse_response(self, L):
        """-> K (2D, L), the direct path in it."""
        dtype = torch.promote_types(self.D.dtype, torch.float32)
        with torch.autocast(self.D.device.type, enabled=False):
            return with_direct_path(kernel(*self.discretized(dtype), L), whole(self.D).to(dtype))

    def forward(self, u):
        K = self.K
        if K is None or self.training or torch.is_grad_enabled():
            K = self.impulse_response(u.shape[1])
        return convolve(u.to(K.dtype), K).to(u.dtype)

    def __getstate__(self):             # copies are not frozen
        return {**self.__dict__, "K": None}


def whole(p):
    """Outside of a forward pass FSDP2's parameters are shards."""
    return p.full_tensor() if hasattr(p, "full_tensor") else p


# --- block ------------------------------------------------------------------------------------------

class Block(nn.Module):
    """(B, J, D) -> (B, J, D). With sigma = GELU, l = j M + m, and m the phase, 0 .. M-1:

        I     = norm(x) (1 + scale) + shift
        U_l   = sigma(W_up_m sigma(W_0 I_j))                        up:   J x D  -> L x 2D
        Y     = BidirectionalSSM(U)                                 mix:  here far tokens meet
        I'_j  = concatenation over m of sigma(W_down_m Y_l)         down: L x 2D -> J x 2D
        O_j   = W_3 (sigma(W_2 I'_j) * sigma(W_1 I_j))              gate from I
        x    <- x + gate O                                          this gate, shift, scale from c: choice 5

    Matrices: 1 + 2M + 4 + 1 + 2 + 1 = 9 + 2M times D^2, all of them applied J = L/M times.
    """

    def __init__(self, width, ratio=2, **s4d):
        super().__init__()
        D, M = width, ratio
        self.ratio = M
        self.norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.condition = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, 3 * D))   # choice 5
        self.W_0 = nn.Linear(D, D)
        self.W_up = nn.Linear(D, M * 2 * D)                                # M matrices D -> 2D in one
        self.ssm = BidirectionalS4D(2 * D, **s4d)
        self.W_down = nn.Parameter(torch.empty(M, 2 * D, 2 * D // M))      # M matrices 2D -> 2D/M
        self.b_down = nn.Parameter(torch.empty(M, 2 * D // M))
        self.W_1, self.W_2, self.W_3 = nn.Linear(D, D), nn.Linear(2 * D, D), nn.Linear(D, D)

    def forward(self, x, c):
        """x (B, J, D) the residual stream, float32; c (B, D)."""
        shift, scale, gate = self.condition(c)[:, None].chunk(3, dim=-1)                # 3 x (B, 1, D)
        I = self.norm(x) * (1 + scale) + shift                                          # (B, J, D)
        U = F.gelu(self.W_up(F.gelu(self.W_0(I))))                                      # (B, J, M*2D)
        Y = self.ssm(rearrange(U, "b j (m d) -> b (j m) d", m=self.ratio))              # (B, L, 2D)
        Y = rearrange(Y, "b (j m) d -> m (b j) d", m=self.ratio)                        # (M, B*J, 2D)
        I_ = F.gelu(torch.baddbmm(self.b_down[:, None], Y, self.W_down))                # (M, B*J, 2D/M)
        I_ = rearrange(I_, "m (b j) d -> b j (m d)", b=len(x))                          # (B, J, 2D)
        O = self.W_3(F.gelu(self.W_2(I_)) * F.gelu(self.W_1(I)))                        # (B, J, D)
        return x + gate * O


# --- the model --------------------------------------------------------------------------------------

def sinusoid(t, width):
    """(B,) -> (B, width): cosines, then sines, of the numbers t (steps; rows and columns, too) at wavelengths
    from 2 pi to almost 2 pi 10^4."""
    half = width // 2
    freqs = (-math.log(10000) / half * torch.arange(half, device=t.device)).exp()
    angles = t.float()[:, None] * freqs                                                 # (B, width // 2)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, width % 2))


class DiffuSSM(nn.Module):
    """(x_t, t, y) -> prediction (eps, or what the Diffusion says), and with learn_sigma the C channels of
    the variance after it. Parameters stay float32; for bf16 use autocast."""

    unit = Block                        # what FSDP2 gathers at a time

    def __init__(self,
                 shape,                 # (C, H, W) of the image or latent
                 width,                 # D
                 depth,                 # blocks
                 patch=1,               # P; 1: every pixel is a token, the paper's point
                 ratio=2,               # M; 1: no hourglass. Must divide L and 2D
                 num_classes=0,         # 0: unconditional
                 state=64,              # N, even
                 init="lin",            # of A: "lin" | "inv" | "legs"
                 discretization="zoh",  # "zoh" | "bilinear"
                 dt_min=1e-3, dt_max=0.1,    # range of the step sizes at the start
                 label_std=0.02,        # of the class vectors at the start (0.02: DiT's)
                 learn_sigma=True,
                 grad_checkpointing=False):  # recompute each block in backward: less memory, +1/3 time
        super().__init__()
        C, H, W = shape
        for value, allowed in ((init, ("lin", "inv", "legs")), (discretization, ("zoh", "bilinear"))):
            if value not in allowed:
                raise UserError(f"unknown DiffuSSM option {value!r}: choose {' or '.join(allowed)}")
        if H % patch or W % patch:
            fits = [f"{h}x{w}" for h, w in dict.fromkeys(
                (H // patch * patch + k, W // patch * patch + k) for k in (0, patch)) if h * w]
            raise UserError(f"image size {H}x{W} is not divisible by the patch size {patch}: "
                             f"try {' or '.join(fits)}")
        L = H * W // patch**2
        if L % ratio or 2 * width % ratio:
            fits = [m for m in range(1, 4 * ratio) if L % m == 0 == 2 * width % m]
            fits = sorted(sorted(fits, key=lambda m: abs(m - ratio))[:2])
            raise UserError(f"ratio {ratio} does not divide the {L} tokens of a {H}x{W} image and 2 x "
                             f"width {width}: try ratio={' or ratio='.join(map(str, fits))}")
        if state % 2:
            raise UserError(f"state {state} is odd, but states are kept as conjugate pairs: "
                             f"try {state + 1}")
        if not 0 < dt_min <= dt_max:
            raise UserError(f"dt_min {dt_min} and dt_max {dt_max}: the first must be above 0 and not above "
                             f"the second, try dt_min=0.001 dt_max=0.1")
        if width < 4:
            raise UserError(f"width {width} leaves no room for the positions: try 64")
        self.shape, self.patch, self.ratio, self.num_classes = shape, patch, ratio, num_classes
        self.label_std, self.grad_checkpointing = label_std, grad_checkpointing
        self.out_channels = 2 * C if learn_sigma else C

        self.embed = nn.Linear(ratio * patch**2 * C, width)                              # choice 6
        self.time_embed = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        # one more row than classes: "no class", for guidance
        self.label_embed = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.blocks = nn.ModuleList(
            Block(width, ratio, state=state, init=init, discretization=discretization,
                  dt_min=dt_min, dt_max=dt_max) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.final_adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))         # choice 5
        self.final = nn.Linear(width, ratio * patch**2 * self.out_channels)
        # where the first of a stream token's M tokens lies (choice 7)
        first = torch.arange(0, L, ratio)
        row, col = first // (W // patch), first % (W // patch)
        self.register_buffer("positions", torch.cat(                                     # (J, D)
            [sinusoid(row, width // 2), sinusoid(col, width - width // 2)], dim=-1), persistent=False)
        self.init_weights()

    def init_weights(self):
        """As in DiT: Xavier-uniform matrices, zero biases, zero last layers (choices 5 and 11)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.time_embed:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=self.label_std)
        for block in self.blocks:
            for up, down in zip(block.W_up.weight.chunk(self.ratio), block.W_down):
                nn.init.xavier_uniform_(up)
                nn.init.xavier_uniform_(down)
            nn.init.zeros_(block.b_down)
        for last in [b.condition[-1] for b in self.blocks] + [self.final_adaln[-1], self.final]:
            nn.init.zeros_(last.weight)          # each block starts as the identity, the output as 0

    def forward(self, x, t, y=None):
        """x (B, C, H, W), t (B,) long, y (B,) long or None; label -1 means "no class".
        -> (B, C', H, W), where C' is C or, with learn_sigma, 2C."""
        p, M, H = self.patch, self.ratio, self.shape[1]
        c = self.time_embed(sinusoid(t, 256))                                            # (B, D)
        if self.num_classes:
            y = torch.full_like(t, -1) if y is None else y
            c = c + self.label_embed(torch.where(y < 0, self.num_classes, y))            # (B, D)
        x = rearrange(x, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=p, p2=p)           # (B, L, p*p*C)
        x = rearrange(x, "b (j m) k -> b j (m k)", m=M)                                  # (B, J, M*p*p*C)
        x = self.embed(x).float() + self.positions      # the stream is float32: its sum has many terms
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, c, use_reentrant=False)
            else:
                x = block(x, c)
        shift, scale = self.final_adaln(c)[:, None].chunk(2, dim=-1)                     # 2 x (B, 1, D)
        x = self.final(self.final_norm(x) * (1 + scale) + shift)                         # (B, J, M*p*p*C')
        x = rearrange(x, "b j (m k) -> b (j m) k", m=M)                                  # (B, L, p*p*C')
        return rearrange(x, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=H // p, p1=p, p2=p)

    @contextmanager
    def frozen(self):
        """Inside, parameters must not change: kernels are made on entry, and not in each call (in eval mode
        and without gradients). They take (2D, L) numbers a block, 0.27 GB for XL at L = 1024."""
        layers = [block.ssm for block in self.blocks]
        before = [layer.K for layer in layers]
        try:
            with torch.no_grad():
                for layer in layers:
                    layer.K = layer.impulse_response(len(self.positions) * self.ratio)
            yield
        finally:
            for layer, K in zip(layers, before):
                layer.K = K

    def macs(self):
        """Multiply-adds of one forward pass for one image. Making the kernels is not included: that is
        done once for all images of a batch (see `kernel_macs`)."""
        J, total = len(self.positions), 0
        for name, p in self.named_parameters():
            if p.ndim > 1 and ".ssm." not in name and "b_down" not in name and "label" not in name:
                once = any(part in name for part in ("time_embed", "condition", "adaln"))
                total += p.numel() * (1 if once else J)
        return total + sum(convolution_macs(len(b.ssm.D), J * self.ratio) for b in self.blocks)


def convolution_macs(channels, L):
    """Half the operations of two real FFTs of n = 2L numbers, 2.5 n log2 n each, and of L + 1 complex
    products, 6 each."""
    n = 2 * L
    return channels * (2.5 * n * math.log2(n) + 3 * (L + 1))


def kernel_macs(channels, state, L):
    """Of the fast kernel's matrix product and its FFT, for one layer and all images of a batch."""
    n = 2 * L
    return channels * (state * L + 1.25 * n * math.log2(n))


# --- presets ------------------------------------------------------------------------------------------

_PAPER = dict(patch=1, ratio=2, schedule="linear", predict="eps", variance="learned")
_TINY = dict(patch=1, ratio=4, label_std=1.0, schedule="cosine", predict="x0", variance="small")
CONFIGS = {
    "DiffuSSM-S": dict(width=384, depth=12, **_PAPER),      # choice 8
    "DiffuSSM-L": dict(width=768, depth=24, **_PAPER),
    "DiffuSSM-XL": dict(width=1152, depth=29, **_PAPER),
    # The paper's block on single pixels, for two CPU cores. There, x0 prediction on the cosine schedule beat
    # v: after 1,200 steps on MNIST a classifier recognised 85% of 100 samples without guidance, with v 75%
    # (one run each). Class vectors start at full size, or the class would be learned late.
    "tiny": dict(width=64, depth=6, **_TINY),
    # 0.9 million parameters, to be compared with the other papers' "mini" (README)
    "mini": dict(width=96, depth=4, **_TINY),
}


def build(preset, shape, num_classes=0, **options):
    """-> (model, diffusion): all that train.py and sample.py ask of a paper.

    model(x_t (B, C, H, W), t (B,), y (B,) or None) -> what diffusion.loss and .sample expect; if it has
    macs(), that is printed. shape (C, H, W); num_classes 0: no y. `options` override the preset:
    patch=2, ratio=1 ... Raises ValueError, with the fix, for a preset, option or size that is wrong.
    """
    if len(shape) != 3:
        raise UserError("DiffuSSM makes pictures, not videos: pass --model mdm --preset tiny-video")
    if preset not in CONFIGS:
        raise UserError(f"unknown preset {preset!r}: diffussm has {', '.join(CONFIGS)}")
    config = {**CONFIGS[preset], **options}
    of_diffusion = {k: config.pop(k) for k in ("schedule", "predict", "variance", "T", "min_snr")
                    if k in config}
    own = [k for k in inspect.signature(DiffuSSM).parameters
           if k not in ("shape", "num_classes", "learn_sigma")]
    for key in config:
        if key not in own:
            raise UserError(f"unknown option {key!r}: diffussm has {', '.join(own)}, schedule, predict, "
                             f"variance, T, min_snr")
    for key, value in {**config, **of_diffusion}.items():
        if key in ("width", "depth", "patch", "ratio", "state", "T"):
            if type(value) is not int or value < 1:
                raise UserError(f"{key}={value!r}: must be a whole number, at least 1")
        elif key in ("dt_min", "dt_max", "label_std") or key == "min_snr" and value is not None:
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise UserError(f"{key}={value!r}: must be a number, at least 0")
    schedule = of_diffusion.pop("schedule")
    if schedule not in SCHEDULES:
        raise UserError(f"unknown schedule {schedule!r}: choose {' or '.join(SCHEDULES)}")
    diffusion = Diffusion(SCHEDULES[schedule](of_diffusion.pop("T", 1000)), **of_diffusion)
    return DiffuSSM(shape, num_classes=num_classes, learn_sigma=diffusion.variance == "learned",
                    **config), diffusion


def table():
    """Parameters and multiply-adds beside the paper's figures."""
    def on_meta(preset, shape, **options):
        with torch.device("meta"):
            return build(preset, shape, 1000, **options)[0]

    def matrices(block):
        return sum(p.numel() for n, p in block.named_parameters() if n.startswith("W_") and "bias" not in n)

    D = CONFIGS["DiffuSSM-XL"]["width"]
    print("The matrices of one block, in units of D^2; the paper: 9 + 2M")
    for M in (1, 2, 4):
        count = matrices(Block(D, M, state=2).to("meta"))
        print(f"  M = {M}: {count:11,d} = {count / D**2:g} D^2")

    print("\nLatents of ImageNet 256 and 512 (32x32x4 and 64x64x4), 1000 classes, P = 1, M = 2. Multiply-\n"
          "adds per image: all; of the W matrices alone, 6.5 L D^2 a block; of the SSMs' convolutions;\n"
          "what attention over all L tokens would cost in their place, 2 L^2 D a block; and of making\n"
          "the kernels, once for all images of a batch\n"
          "                       parameters       all  matrices      SSM attention  kernels   the paper")
    for preset in list(CONFIGS)[:3]:
        for side, paper in ((32, "280.3* Gflops"), (64, "1066.2*")):
            model = on_meta(preset, (4, side, side))
            depth, L, width = len(model.blocks), side**2, CONFIGS[preset]["width"]
            figures = (model.macs(), depth * L // model.ratio * matrices(model.blocks[0]),
                       depth * convolution_macs(2 * width, L), depth * 2 * L**2 * width,
                       depth * kernel_macs(2 * width, 64, L))
            print(f"{preset:12s} {8 * side}px {sum(p.numel() for p in model.parameters()):14,d} "
                  + " ".join(f"{f / 1e9:8.1f}G" for f in figures)
                  + (f"   {'about 673M, ' if side == 32 else ''}{paper}" if preset.endswith("XL") else ""))
    print("\nPatches or hourglass? XL at 256 px (Figures 5 and 6)")
    for patch, ratio in ((1, 1), (1, 2), (2, 1)):
        model = on_meta("DiffuSSM-XL", (4, 32, 32), patch=patch, ratio=ratio)
        print(f"  P = {patch}, M = {ratio}: {model.macs() / 1e9:6.1f}G,"
              f" {sum(p.numel() for p in model.parameters()) / 1e6:6.1f}M parameters")
    print("\nThe paper's figures do not quite add up. Of its formula for a layer, 13 (L/M) D^2 + L D^2 +\n"
          "FFTs (M = 2), the first term gives 256.2 and 1024.7, the first two 295.6 and 1182.3, and no\n"
          "matrix in its equations costs the second. 280.3 and 1066.2 (*: total Gflops divided by images\n"
          "seen, 1.85e11 / 660M and 3.22e11 / 302M, from its Table 1 as others quote it) lie between; the\n"
          "second is 3.80 times the first, though from L = 1024 to 4096 no term grows less than 4 times.\n"
          "So we report our own count. A flop there is a multiply-add, as in DiT, whose XL/2 has 118.6 at\n"
          "256 px, 524.5 at 512. Hence an image costs DiffuSSM-XL about twice what it costs DiT-XL/2, in\n"
          "training and in sampling; the saving the paper reports is in the number of training images.")


if __name__ == "__main__":
    table()
