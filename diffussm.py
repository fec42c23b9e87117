"""DiffuSSM: Diffusion Models Without Attention, in one file.

Jing Nathan Yan, Jiatao Gu, Alexander M. Rush. arXiv 2311.18257, CVPR 2024. Companion page: docs/diffussm.md

The idea. Attention over L tokens costs L^2, so transformers cut the image into patches and lose detail. DiffuSSM has
no attention. It mixes single pixels (of the latent) by two long convolutions, one per reading direction. They cost
L log L; their kernels come from state space models (S4D). That leaves the dense layers as the expensive part. So they
work on a shorter sequence, with M neighbours folded into one token. A block unfolds it to full length only around
its convolutions. The paper calls this an hourglass.

| code            | paper     | shape           | meaning                                                            |
|-----------------|-----------|-----------------|--------------------------------------------------------------------|
|                 |           | b               | images of a batch                                                  |
| `width`         | D         |                 | channels of the residual stream                                    |
| `patch`         | P         |                 | side of a patch; 1: none                                           |
| `ratio`         | M         |                 | of the hourglass: tokens folded into one; 1: none                  |
|                 | m         |                 | phase: a token's place among the M of a fold, 0 .. M-1 (paper: k)  |
|                 | L, l      |                 | L = rows x columns / P^2 tokens at full length, row by row; l: one |
|                 | J, j      |                 | J = L / M tokens of the residual stream; j: one                    |
| `x`             |           | (b, J, D)       | the residual stream. `x_t` is the noised image                     |
| `c`             | t + y     | (b, D)          | time plus class, the same for every token                          |
| `I`             | I_j       | (b, J, D)       | what a block reads: the stream, normed and modulated               |
| `W_0`, `W_up`   | W_0, W^up | D -> D -> M 2D  | expand each of the J tokens to its M phases                        |
| `U`             | U_l       | (b, L, 2D)      | input of the SSMs: D channels for each direction                   |
| `Y`             | Y_l       | (b, L, 2D)      | their output                                                       |
| `W_down`        | W^down    | (M, 2D, 2D / M) | a matrix per phase; their results, D_m = 2D / M each, make a token |
| `I_prime`       | I'_j      | (b, J, 2D)      | what the M phases bring back                                       |
| `W_1, W_2, W_3` | W_1 ...   |                 | gate (from I), value (from I') and output, `O`                     |
| `state`         | N         |                 | size of an SSM's state (64), as N / 2 conjugate pairs              |
| `h`             | x in S4D  | (b, 2D, N/2)    | the state, complex                                                 |
| `dt`            | Delta     | (2D,)           | step size of each SSM                                              |
| `A`, `C`        | A, C      | (2D, N/2)       | of the SSMs, complex, made from real parameters. B is kept in C    |
| `log_Abar`      | log A-bar | (2D, N/2)       | decay and rotation of each state in one step                       |
| `CB`            | C B-bar   | (2D, N/2)       | A is diagonal, so only this product of B and C matters             |
| `direct`        | D in S4D  | (2D,)           | direct path from U to Y; its parameter is called `ssm.D`           |
| `K`             | K         | (2D, L)         | the convolution kernel                                             |

S4D is arXiv 2206.11893, DiT 2212.09748. BiGS (2212.10544) is the declared ancestor: gated, bidirectional S4D, for text.

Choices. The paper leaves much open, and no code of its authors could be found. We read the main text in translation,
without appendix and Figure 2. Reasons for each choice: docs/diffussm.md.
 1. Widths: U is 2D wide, not D. Of D/2, D and 2D no others fit the paper's count, 9 D^2 + 2 M D^2 parameters a block.
 2. The "MLP" after the two directions is W^down: the count has no room for another.
 3. The activation sigma is GELU, as in BiGS.      4. LayerNorm before each block and the decoder, as in DiT.
 5. In each block a 2-layer MLP turns time and class into shift, scale and a gate alpha (DiT's adaLN-Zero). XL then has
    668.9M parameters; the paper says "about 673M".
 6. One linear map folds M neighbours into a token, another unfolds them.      7. Positions: fixed sines and cosines.
 8. The depths of S and L are ours. The width of L is 768; the paper prints "786".
 9. S4D as in its authors' code (N = 64, zero-order hold), without that layer's GELU, output matrix and GLU.
10. Both directions see the current token, and they share no parameters.
11. Initialisation as in DiT; each phase of W^up and W^down starts as a matrix of its own.
12. One learning rate for all parameters. --weight-decay spares those of the SSMs: it would pull dt to 1.
13. The Gflops quoted for the paper cannot be reproduced. `python diffussm.py` prints our count, and why.
"""
import math
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from diffusion import Diffusion, UserError, check_labels, check_shape

# --- state space models -------------------------------------------------------------------------
#
# An SSM reads a sequence U and writes a sequence Y of the same length. A state h between them remembers what was read:
#
#     h' = A h + B U,    Y = 2 Re C h + direct U
#
# S4D takes a diagonal A. So h is N/2 complex numbers that do not mix. Each also stands for its conjugate, hence 2 Re.
# Hold U constant over each step of length dt, and the equation becomes exactly this recurrence over tokens:
#
#     h_l = Abar h_{l-1} + Bbar U_l,    Y_l = 2 Re C h_l + direct U_l       Abar = exp(dt A),  Bbar = B (Abar - 1) / A
#
# Abar is the same for every token. So the recurrence unrolls into a convolution over tokens, with a kernel K:
#
#     Y = K * U + direct U,    K_l = 2 Re sum_n C_n Bbar_n Abar_n^l
#
# The kernel depends on parameters only, not on the image. Mamba (dis.py) gives that up: each token has its own Abar.
# Each channel of U has its own SSM. In a block there are 2D of them, D for each direction.

def ssm_ref(U, log_Abar, CB, direct):
    """The recurrence, one token after the other: the definition of what `BidirectionalS4D` computes.

    U (b, L, 2D): the first D channels are read from the left, the others from the right. log_Abar, CB complex
    (2D, N/2), direct (2D,) -> Y (b, L, 2D). Both directions see the current token (choice 10).
    Bbar is the same for every token. So h leaves it out, and the output multiplies by it: CB = C Bbar.
    """
    def read(U, log_Abar, CB):
        Abar, h, Y = log_Abar.exp(), 0, []
        for U_l in U.unbind(1):                                                        # (b, D)
            h = Abar * h + U_l[:, :, None]                                             # (b, D, N/2)
            Y.append(2 * (CB * h).sum(-1).real)                                        # (b, D)
        return torch.stack(Y, dim=1)                                                   # (b, L, D)

    D = U.shape[2] // 2
    from_left = read(U[..., :D], log_Abar[:D], CB[:D])
    from_right = read(U[..., D:].flip(1), log_Abar[D:], CB[D:]).flip(1)
    return torch.cat([from_left, from_right], dim=2) + direct * U                      # (b, L, 2D)


def kernel_ref(log_Abar, CB, L):
    """The kernel by its formula, with a matrix of powers per SSM. log_Abar, CB complex (2D, N/2) -> K (2D, L). It keeps
    L N numbers per SSM for backward; the model uses `kernel`, below. S4D's authors: models/s4/s4d.py, S4DKernel."""
    powers_of_Abar = (log_Abar[:, :, None] * torch.arange(L, device=CB.device)).exp()  # (2D, N/2, L)
    return 2 * (CB[:, :, None] * powers_of_Abar).sum(1).real                           # (2D, L)


# --- the block ----------------------------------------------------------------------------------

class Block(nn.Module):
    """(b, J, D) -> (b, J, D). The paper's equations, with sigma = GELU and l = j M + m:

        I     = norm(x) (1 + scale) + shift                         shift, scale, alpha from c: choice 5
        U_l   = sigma(W_up_m sigma(W_0 I_j))                        up:   J x D  -> L x 2D
        Y     = BidirectionalSSM(U)                                 here, far tokens meet
        I'_j  = concatenation over m of sigma(W_down_m Y_l)         down: L x 2D -> J x 2D
        O_j   = W_3 (sigma(W_2 I'_j) * sigma(W_1 I_j))              the second factor is the gate
        x    <- x + alpha O

    The matrices have 1 (W_0) + 2M (W_up) + 4 (W_down) + 1 + 2 + 1 (W_1, W_2, W_3) = 9 + 2M times D^2 parameters, as in
    the paper. All are applied J = L/M times, which is why folding is cheap.
    """

    def __init__(self, width, ratio=2, **s4d):
        super().__init__()
        D, M = width, ratio
        self.ratio = M
        self.norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.condition = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, 3 * D))   # DiT: DiTBlock
        self.W_0 = nn.Linear(D, D)
        self.W_up = nn.Linear(D, M * 2 * D)                                # M matrices D -> 2D in one
        self.ssm = BidirectionalS4D(2 * D, **s4d)                          # `ssm_ref`, as a convolution: below
        self.W_down = nn.Parameter(torch.empty(M, 2 * D, 2 * D // M))      # M matrices 2D -> 2D/M
        self.b_down = nn.Parameter(torch.empty(M, 2 * D // M))
        self.W_1, self.W_2, self.W_3 = nn.Linear(D, D), nn.Linear(2 * D, D), nn.Linear(D, D)

    def forward(self, x, c):
        """x (b, J, D) the residual stream, float32; c (b, D)."""
        M = self.ratio
        shift, scale, alpha = self.condition(c)[:, None].chunk(3, dim=-1)              # 3 x (b, 1, D)
        I = self.norm(x) * (1 + scale) + shift                                         # (b, J, D)
        phases = F.gelu(self.W_up(F.gelu(self.W_0(I))))                                # (b, J, M*2D)
        U = rearrange(phases, "b j (m d) -> b (j m) d", m=M)                           # (b, L, 2D)
        Y = self.ssm(U)                                                                # (b, L, 2D)
        Y_phase = rearrange(Y, "b (j m) d -> m (b j) d", m=M)                          # (M, b*J, 2D)
        I_phase = F.gelu(torch.baddbmm(self.b_down[:, None], Y_phase, self.W_down))    # (M, b*J, 2D/M)
        I_prime = rearrange(I_phase, "m (b j) d -> b j (m d)", b=len(x))               # (b, J, 2D)
        O = self.W_3(F.gelu(self.W_2(I_prime)) * F.gelu(self.W_1(I)))                  # (b, J, D)
        return x + alpha * O


# --- the model ----------------------------------------------------------------------------------

class DiffuSSM(nn.Module):
    """(x_t, t, y) -> the prediction (eps, or what the Diffusion asks for). With learn_sigma, as many
    channels follow for the variance. Parameters stay float32; for bf16 use autocast."""

    unit = Block                        # what recomputation and FSDP2 take as one piece

    def __init__(self,
                 shape,                 # (channels, rows, columns) of the image or latent
                 width: int,            # D
                 depth: int,            # blocks
                 patch: int = 1,        # P; 1: every pixel is a token, which is the paper's point
                 ratio: int = 2,        # M; must divide L and 2D
                 num_classes=0,         # 0: unconditional
                 state: int = 64,       # N, even
                 init: Literal["lin", "inv", "legs"] = "lin",           # of A
                 discretization: Literal["zoh", "bilinear"] = "zoh",
                 dt_min: float = 1e-3, dt_max: float = 0.1,             # range of dt at the start
                 label_std: float = 0.02,                               # of the class vectors at the start; DiT: 0.02
                 learn_sigma=True):
        super().__init__()
        check_sizes(shape, width, patch, ratio, dt_min, dt_max)
        channels = shape[0]
        self.shape, self.patch, self.ratio, self.num_classes = shape, patch, ratio, num_classes
        self.label_std, self.out_channels = label_std, 2 * channels if learn_sigma else channels

        self.embed = nn.Linear(ratio * patch**2 * channels, width)                     # choice 6
        self.time_embed = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        # one row more than there are classes: it means "no class", for guidance
        self.label_embed = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.blocks = nn.ModuleList(
            Block(width, ratio, state=state, init=init, discretization=discretization, dt_min=dt_min, dt_max=dt_max)
            for _ in range(depth))
        self.final_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)      # DiT: FinalLayer
        self.final_adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.final = nn.Linear(width, ratio * patch**2 * self.out_channels)
        self.init_weights()

    def forward(self, x_t, t, y=None):
        """x_t (b, channels, rows, columns), t (b,) long, y (b,) long or None; label -1 means "no class".
        -> (b, out_channels, rows, columns)."""
        check_shape(x_t, self.shape)
        P, M, rows = self.patch, self.ratio, self.shape[1]
        c = self.time_embed(sinusoid(t, 256))                                          # (b, D)
        y = torch.full_like(t, -1) if y is None else y
        check_labels(y, self.num_classes)
        if self.num_classes:
            c = c + self.label_embed(torch.where(y < 0, self.num_classes, y))          # (b, D)
        tokens = rearrange(x_t, "b ch (row p1) (col p2) -> b (row col) (p1 p2 ch)", p1=P, p2=P)
        folded = rearrange(tokens, "b (j m) k -> b j (m k)", m=M)                      # (b, J, M*P*P*channels)
        x = self.embed(folded).float() + self.positions(x_t.device)    # (b, J, D), float32: many terms will be added
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_adaln(c)[:, None].chunk(2, dim=-1)                   # 2 x (b, 1, D)
        out = self.final(self.final_norm(x) * (1 + scale) + shift)                     # (b, J, M*P*P*out_channels)
        out = rearrange(out, "b j (m k) -> b (j m) k", m=M)                            # (b, L, P*P*out_channels)
        return rearrange(out, "b (row col) (p1 p2 ch) -> b ch (row p1) (col p2)", row=rows // P, p1=P, p2=P)

    def positions(self, device=None):
        """-> (J, D): a stream token has the position of the first of its M tokens (choice 7). They are computed in each
        call. In a model built on "meta", a buffer would be empty, and no checkpoint has it."""
        rows, columns, D = self.shape[1] // self.patch, self.shape[2] // self.patch, self.embed.out_features
        first = torch.arange(0, rows * columns, self.ratio, device=device)             # (J,)
        return torch.cat([sinusoid(first // columns, D // 2), sinusoid(first % columns, D - D // 2)], dim=-1)

    @contextmanager
    def frozen(self):
        """A context in which each block's kernel is made once, on entry, and not in each call; sampling uses it.
        Parameters must not change meanwhile. Calls that train or need gradients ignore the stored kernels. A stored
        kernel has (2D, L) numbers: 0.27 GB for all blocks of XL at L = 1024."""
        layers, L = [block.ssm for block in self.blocks], self.shape[1] * self.shape[2] // self.patch**2
        before = [layer.K for layer in layers]
        try:
            with torch.no_grad():
                for layer in layers:
                    layer.K = layer.impulse_response(L)
            yield
        finally:
            for layer, K in zip(layers, before):
                layer.K = K

    def init_weights(self):
        """As in DiT, models.py: Xavier-uniform matrices, zero biases, zero last layers (choices 5, 11)."""
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
            nn.init.zeros_(last.weight)         # so each block starts as the identity, and the output as 0


def sinusoid(numbers, width):
    """(k,) -> (k, width): cosines, then sines, of step numbers, rows or columns, at wavelengths from 2 pi to almost
    2 pi 10^4. DiT: TimestepEmbedder."""
    half = width // 2
    frequencies = (-math.log(10000) / half * torch.arange(half, device=numbers.device)).exp()
    angles = numbers.float()[:, None] * frequencies                                    # (k, width // 2)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, width % 2))      # (k, width)


def check_sizes(shape, width, patch, ratio, dt_min, dt_max):
    """Raises UserError, with the fix, for sizes that do not fit each other."""
    if len(shape) != 3:
        raise UserError("DiffuSSM makes pictures, not videos: pass --model mdm --preset tiny-video")
    _, rows, columns = shape
    if rows % patch or columns % patch:
        below = rows // patch * patch, columns // patch * patch
        fits = [f"{high}x{wide}" for high, wide in (below, (below[0] + patch, below[1] + patch)) if high * wide]
        raise UserError(f"image size {rows}x{columns} is not divisible by the patch size {patch}: "
                        f"try {' or '.join(fits)}")
    L = rows * columns // patch**2
    if L % ratio or 2 * width % ratio:
        fits = [other for other in range(1, 4 * ratio) if L % other == 0 and 2 * width % other == 0]
        nearest = sorted(sorted(fits, key=lambda other: abs(other - ratio))[:2])
        raise UserError(f"ratio {ratio} must divide the {L} tokens of a {rows}x{columns} image, and 2 x width = "
                        f"{2 * width}: try ratio={' or ratio='.join(map(str, nearest))}")
    if not 0 < dt_min <= dt_max:
        raise UserError(f"dt_min {dt_min} must be above 0, and dt_max {dt_max} must not be below dt_min: "
                        f"try dt_min=0.001 dt_max=0.1")
    if width < 4:
        raise UserError(f"width {width} leaves no room for the positions: try 64")


# --- S4D: the layer, its kernel, its convolution -----------------------------------------------

class BidirectionalS4D(nn.Module):
    """`ssm_ref` as a convolution: U (b, L, 2D) -> Y (b, L, 2D). D channels are read from the left, D from the right.
    S4D's authors: models/s4/s4d.py, S4D, which reads in one direction and has more layers (choice 9).
    Test of equality: tests/test_diffussm.py::test_layer_equals_recurrence_and_double_sum.

    All parameters are real. (.bfloat16() would drop the imaginary part of complex ones, and optimizers, DDP and file
    formats support them only in part.) The layer computes in float32 or float64, even under autocast: bf16 has no FFT,
    and in it powers of Abar would lose their angle.
    """

    def __init__(self, channels, state=64, init="lin", discretization="zoh", dt_min=1e-3, dt_max=0.1):
        super().__init__()
        if state % 2:
            raise UserError(f"state {state} is odd, but states are stored as conjugate pairs: try {state + 1}")
        self.discretization = discretization
        self.K = None                           # (2D, L), with the direct path; set by `DiffuSSM.frozen`
        start = initial_parameters(channels, state, init, dt_min, dt_max)
        self.log_dt, self.log_neg_A_real, self.A_imag, self.C, self.D = map(nn.Parameter, start)

    def forward(self, U):
        K = self.K
        replaced = not isinstance(self.C, nn.Parameter)     # by other weights, which torch.func.functional_call brings
        if K is None or self.training or torch.is_grad_enabled() or replaced:
            K = self.impulse_response(U.shape[1])
        return convolve(U.to(K.dtype), K).to(U.dtype)

    def impulse_response(self, L):
        """-> K (2D, L). It includes the direct path: direct U is U convolved with (direct, 0, ..., 0)."""
        dtype = torch.promote_types(self.D.dtype, torch.float32)
        with torch.autocast(self.D.device.type, enabled=False):
            direct = whole(self.D).to(dtype)
            return kernel(*self.discretized(dtype), L) + F.pad(direct[:, None], (0, L - 1))

    def discretized(self, dtype=torch.float32):
        """-> log_Abar, CB, complex (2D, N/2)."""
        log_dt, log_neg_A_real, A_imag, C = (
            whole(parameter).to(dtype) for parameter in (self.log_dt, self.log_neg_A_real, self.A_imag, self.C))
        A = torch.complex(-log_neg_A_real.exp(), A_imag)    # (2D, N/2); Re A < 0, so no state can explode
        log_Abar, Bbar = discretize(A, log_dt.exp(), self.discretization)
        return log_Abar, torch.view_as_complex(C) * Bbar

    def __getstate__(self):                     # copies are not frozen
        return {**self.__dict__, "K": None}


def whole(parameter):
    """Gathers a parameter that FSDP2 cut into shards: `frozen` reads it outside forward, where nothing else does so."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def discretize(A, dt, method):
    """Complex A (2D, N/2), dt (2D,) -> log_Abar, Bbar, both (2D, N/2), for B = 1. S4D Sec. 3.1."""
    dtA = dt[:, None] * A                                                              # (2D, N/2)
    if method == "zoh":                         # zero-order hold: exact if U is constant over a step
        return dtA, dtA.expm1() / A             # expm1(x) = exp(x) - 1, which would lose the digits of a small x
    # "bilinear", trapezoids: Abar = (1 + dtA/2) / (1 - dtA/2). Its logarithm by atanh keeps the digits, too.
    return 2 * (dtA / 2).atanh(), dt[:, None] / (1 - dtA / 2)


def kernel(log_Abar, CB, L):
    """The same numbers as `kernel_ref`, from two small matrices. Write l = start + offset, where a start is a multiple
    of some stride near sqrt(L), and an offset is below the stride. Then

        K_l = 2 Re sum_n (C_n Bbar_n Abar_n^start) Abar_n^offset

    is, for each SSM, the product of an (L/stride, N/2) and an (N/2, stride) matrix. It takes N sqrt(L) exponentials,
    not N L / 2. Test: tests/test_diffussm.py::test_three_kernels_agree."""
    stride = math.isqrt(L - 1) + 1                                                     # sqrt(L), rounded up
    starts = torch.arange(0, L, stride, device=CB.device)                              # (L/stride,)
    offsets = torch.arange(stride, device=CB.device)                                   # (stride,)
    together = 256 if CB.device.type == "cpu" else len(CB)      # n SSMs at a time: their powers fit a CPU's cache
    parts = []
    for log_Abar_part, CB_part in zip(log_Abar.split(together), CB.split(together)):
        # With z = 2 CB Abar^start and w = Abar^offset we want
        #     Re(z w) = Re z Re w - Im z Im w,
        # which is the real product of (Re z, Im z) and (Re w, -Im w). The latter is w conjugated. A real product is
        # faster than a complex one. (With TF32, which train.py turns on for GPUs, it reads 10 bits of mantissa.)
        z = (2 * CB_part)[:, None] * powers(log_Abar_part, starts)                     # (n, L/stride, N/2)
        w_conj = powers(log_Abar_part.conj(), offsets)                                 # (n, stride, N/2)
        z, w_conj = (torch.view_as_real(v).flatten(2) for v in (z, w_conj))            # (n, .., N)
        parts.append((z @ w_conj.mT).flatten(1)[:, :L])                                # (n, L)
    return torch.cat(parts)                                                            # (2D, L)


def powers(log_Abar, exponents):
    """Abar^exponent: complex (2D, N/2), (k,) -> (2D, k, N/2). It uses the real exp, cos and sin, because on CPUs the
    complex exp is 4 times slower."""
    decay, angle = log_Abar.real[:, None], log_Abar.imag[:, None]                      # (2D, 1, N/2)
    return torch.polar((decay * exponents[:, None]).exp(), angle * exponents[:, None])


def convolve_ref(U, K):
    """U (b, L, 2D), K (2D, L) -> Y (b, L, 2D), as a product of spectra (_hat). Reading from the right means
    mirroring the kernel in time, and that conjugates its spectrum. Padding to 2L keeps a sequence's end from wrapping
    to its start. S4D's authors: models/s4/s4d.py, S4D."""
    L, D = U.shape[1], U.shape[2] // 2
    K_hat = torch.fft.rfft(K, n=2 * L)                                                 # (2D, L+1)
    K_hat = torch.cat([K_hat[:D], K_hat[D:].conj()])
    U_hat = torch.fft.rfft(U.mT, n=2 * L)                                              # (b, 2D, L+1)
    return torch.fft.irfft(U_hat * K_hat, n=2 * L)[..., :L].mT                         # (b, L, 2D)


try:                                            # the same numbers, faster and in less memory
    from support.longconv import convolve
except ImportError:                             # this file also runs with diffusion.py alone
    convolve = convolve_ref


def initial_parameters(channels, state, init, dt_min, dt_max):
    """-> log dt (2D,), log(-Re A) and Im A, both (2D, N/2), C (2D, N/2, 2) and direct (2D,), all real (choice 9)."""
    omega, B = initial_state_matrix(init, state)
    # dt is log-uniform. A state remembers 1 / (dt / 2) tokens: 20 to 2000 of them.
    log_dt = torch.empty(channels).uniform_(math.log(dt_min), math.log(dt_max))
    C = torch.view_as_complex(torch.randn(channels, state // 2, 2, device="cpu") / 2**0.5)
    return (log_dt, torch.full((channels, state // 2), math.log(0.5)),
            torch.empty(channels, state // 2).copy_(omega),
            torch.empty(channels, state // 2, 2).copy_(torch.view_as_real(C * B)),  # B is kept in C
            torch.randn(channels))


def initial_state_matrix(init, N):
    """Im A, (N/2,) float64, and B, (N/2,) complex128, at the start. Re A is always -1/2. S4D Sec. 4.

    Im A decides to which frequencies a kernel listens: with "zoh", state n has a period of 2 pi / (dt Im A_n) tokens.
    (An angle dt Im A_n above pi looks like a smaller one, which does no harm. With "lin" and N = 64 this happens to the
    fastest states if dt is above 0.03. "bilinear" squeezes all angles to less than pi.)"""
    n = torch.arange(N, dtype=torch.float64, device="cpu")
    ones = torch.ones(N // 2, dtype=torch.complex128, device="cpu")
    if init == "lin":                           # a Fourier series
        return math.pi * n[:N // 2], ones
    if init == "inv":                           # approximates "legs"; has a few very fast states
        return N / math.pi * (N / (2 * n[:N // 2] + 1) - 1), ones
    # "legs", HiPPO-LegS, remembers the whole past by Legendre polynomials: A = -1/2 + skew - p p^T. S4D leaves p p^T
    # out. The rest has eigenvalues -1/2 + i omega. (`eigh` takes Hermitian matrices, hence -i skew.) B = sqrt(2) p is
    # rotated to the basis of eigenvectors, and one of each conjugate pair is kept.
    p = (n + 0.5).sqrt()                                                               # (N,)
    skew = (p[:, None] * p).triu(1) - (p[:, None] * p).tril(-1)                        # (N, N)
    omega, eigenvectors = torch.linalg.eigh(-1j * skew)
    B = eigenvectors.mH @ (2**0.5 * p).to(eigenvectors.dtype)                          # (N,)
    return omega[omega > 0], B[omega > 0]


# --- presets ------------------------------------------------------------------------------------

_PAPER = dict(patch=1, ratio=2, schedule="linear", predict="eps", variance="learned")
# For two CPU cores. Predicting x0 on the cosine schedule won short trials, and the middle steps are trained most. Class
# vectors start large, because otherwise the class would be learned late.
_TINY = dict(patch=1, ratio=4, label_std=1.0, schedule="cosine", predict="x0", variance="small", t_normal=[0.4, 1.3])
CONFIGS = {
    "DiffuSSM-S": dict(width=384, depth=12, **_PAPER),      # choice 8
    "DiffuSSM-L": dict(width=768, depth=24, **_PAPER),
    "DiffuSSM-XL": dict(width=1152, depth=29, **_PAPER),
    "tiny": dict(width=64, depth=6, **_TINY),
    "mini": dict(width=96, depth=4, **_TINY),               # 0.9M parameters, to compare with the other papers' "mini"
}
TRAINING = dict(tiny=dict(max_steps=2000))      # train.py trains for 5,000 steps, unless a preset has its own number

try:
    from support.options import checked
except ImportError:                             # without it, options are not checked
    def checked(paper, presets, preset, options, network):
        return {**presets[preset], **options}


def build(preset, shape, num_classes=0, **options):
    """-> (model, diffusion), which is all that train.py and sample.py ask of a paper.

    preset: a key of CONFIGS; options replace its settings: patch=2, ratio=1 ... shape: (channels, rows, columns).
    num_classes: 0 makes a model without y. Raises UserError, with the fix, for a wrong preset, option or size.
    """
    options = checked("diffussm", CONFIGS, preset, options, DiffuSSM)
    diffusion = Diffusion.of(options)
    model = DiffuSSM(shape, num_classes=num_classes, learn_sigma=diffusion.variance == "learned", **options)
    return model, diffusion


if __name__ == "__main__":                      # prints the presets beside the paper's figures
    from benchmarks import tables
    tables.diffussm()
