"""DiS: Scalable Diffusion Models with State Space Backbone, in one file.

Zhengcong Fei, Mingyuan Fan, Changqian Yu, Junshi Huang. arXiv 2402.05608 (v3, March 2024).

The idea. Everything is a token: the image patches, the time step, the class. Where a transformer
would mix the tokens by attention, at a cost of J^2, DiS reads them with a recurrence (Mamba's
selective scan), once from the left and once from the right, at a cost linear in J. As in U-ViT, long
skip connections join the first block to the last, the second to the last but one, and so on. There
is no attention and no MLP: a block is one norm and one mixer.

Glossary. Two letters are overloaded, as in the papers: B is the batch axis in shapes and Mamba's
input matrix in formulas; D is the width in shapes and the direct path in formulas.

| code         | symbol   | shape              | meaning, and the part of the paper (or of Mamba)        |
|--------------|----------|--------------------|---------------------------------------------------------|
| `width`      | D        |                    | channels of a token                                     |
| `patch`      | p        |                    | side of a patch; "image patchify"                       |
|              | J, L     |                    | number of patches, H W / p^2; of all tokens             |
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
| `h`          | h_t      | (B, E D, N)        | the state, before the first token 0                     |
| `residual`   | r        | (B, L, D) float32  | the running sum                                         |
| `hidden`     | m        | (B, L, D)          | what a mixer has made and the next block will add       |
| `c`          | c        | (B, D)             | time, plus class if there is one                        |
| `skip`       |          |                    | "long skip": concat (paper), add, none (ablations)      |
| `time`       |          |                    | "condition": token (paper), adaln (ablation)            |

Not here: training (train.py), the noise schedule (diffusion.py), the VAE that turns a 256 px image
into a 32x32x4 latent, the authors' weights (never published).

Where the paper, the authors' code and this file differ. ("Code" is the authors' release; "paper" is
what could be read of it here, the abstract and summaries, hence no section numbers.)
 1. B is discretised as delta B (Euler), in Mamba's and in the authors' code, though both papers
    print the zero-order hold, (delta A)^-1 (exp(delta A) - I) delta B. We follow the code, which
    made the results. The two agree to first order in delta.
 2. A long skip carries the *mixer output* of the shallow block, not the residual stream, and it
    changes only what the deep block is about to add (code; paper: "hidden states").
 3. Class-conditional models also modulate the final LayerNorm by time + class (code; in the paper
    tokens are the default and adaptive norms an ablation). Kept, so that conditional models have
    the code's parameter counts.
 4. The code leaves the backward direction's dt bias at 0: its delta starts near softplus(0) = 0.69,
    7 to 700 times the forward one, and forgets all but its neighbours. Here both directions
    start alike.
 5. The code starts the final linear layer at random; here it starts at zero (as in ADM and DiT), so
    that the first squared error is that of predicting nothing: 1 on average for eps.
 6. The code trains with stochastic depth 0.1, which the paper, as far as read, does not mention. Off
    in `CONFIGS`; `drop_path=0.1` turns it on.
 7. The code's GFLOPs count the layers that a profiler's hooks can see, which leaves out the mixers.
    `python dis.py` prints all of it.
 8. The code's guidance touches three of four latent channels and, unconditional, copies half of
    the batch's noise prediction to the other half; diffusion.py guides every channel.
 9. skip="add" and time="adaln" are ablations of the paper that the code lacks. Ours writes the
    adaptive norm y_s LayerNorm(h) + y_b as (1 + scale) RMSNorm(r) + shift, both zero at the start.
10. `pos_init` and `label_std` are ours; their defaults are the code's. See `CONFIGS["tiny"]`.

In a notebook Python's own module `dis` is loaded already, so `from dis import DiS` finds the wrong
one: write `from checkpoint import load_paper; DiS = load_paper("dis").DiS`.
"""
if __spec__ and __spec__.name == "dis":
    # This file's name hides Python's own `dis`, which torch needs (through `inspect`): whoever asks
    # this folder for the module "dis" may be Python. So it gets Python's, taught to find the names
    # of this file on demand. The import system then insists on running the rest of this file too;
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
    nn = torch
else:
    import inspect
    import math

    import torch
    import torch.nn.functional as F
    from einops import rearrange
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    from diffusion import SCHEDULES, Diffusion


# --- the selective scan (Mamba, Gu & Dao 2023, 2312.00752, Algorithm 2) -----------------------

def selective_scan_ref(u, delta, A, B, C, D):
    """The definition, one token after the other. Slow.

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t          (Mamba Eq. 2a; departure 1)
        y_t = C_t h_t + D u_t                                   (Eq. 2b; D u is in the code only)

    u, delta (b, L, D); A (D, N); B, C (b, L, N); D (D,) -> y (b, L, D). delta > 0, A < 0. In these
    shapes, and down to `_Scan`, D counts the channels of the scan: E times the model's width.
    """
    h = u.new_zeros(u.shape[0], *A.shape)                                          # (b, D, N)
    ys = []
    for t in range(u.shape[1]):
        decay = (delta[:, t, :, None] * A).exp()                                   # (b, D, N)
        h = decay * h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]     # (b, D, N)
        ys.append((h * C[:, t, None, :]).sum(-1))                                  # (b, D)
    return torch.stack(ys, dim=1) + D * u                                          # (b, L, D)


@torch.compiler.disable         # traced, the loops over time would become thousands of nodes
def selective_scan(u, delta, A, B, C, D):
    """The same map, fast, and with memory for a few (b, L, D) arrays only. Always in float32 (or
    float64): the products of many decays below have no room for bf16's 8 bits.
    Equal to `selective_scan_ref`: tests/test_dis.py::test_scan_equals_reference."""
    with torch.autocast(u.device.type, enabled=False):
        dtype = torch.promote_types(u.dtype, torch.float32)
        u, delta, A, B, C, D = (x.to(dtype) for x in (u, delta, A, B, C, D))
        return torch.addcmul(_Scan.apply(delta * u, delta, A, B, C), D, u)


class _Scan(torch.autograd.Function):
    """y_t = C_t h_t with h_t = exp(delta_t A) h_{t-1} + B_t x_t, where x = delta u.

    All states at once would be a (b, L, D, N) tensor, N times the size of the input. So time is cut
    into chunks of T tokens and the batch into blocks, such that a work array of one chunk and block
    has about `elements` numbers. Kept for backward is only the state before each chunk; backward
    recomputes the rest of a chunk when it gets there.

    Work arrays are (b, T, N, D), N before D: inner loops then run over D contiguous numbers.
    """
    CHUNK, ELEMENTS = 16, {"cpu": 2**20}    # 4 MB stay in the cache of a CPU; a GPU, where each of the
    # many small operations is a launch, wants few and large ones. Neither number is delicate.

    @staticmethod
    def blocks(x, A):
        """Slices of the batch and of time that a work array can hold."""
        (b, L, D), N, T = x.shape, A.shape[1], _Scan.CHUNK
        elements = _Scan.ELEMENTS.get(x.device.type, 2**28)
        rows = max(1, elements // (T * N * D))
        return ([slice(i, i + rows) for i in range(0, b, rows)],
                [slice(t, min(t + T, L)) for t in range(0, L, T)])

    @staticmethod
    def states(h, x, delta, At, B):
        """One chunk. h (b, N, D) the state before it -> decays and states after each of its tokens,
        both (b, T, N, D)."""
        a = torch.mul(delta[:, :, None, :], At).exp_()                        # (b, T, N, D)
        hs = torch.mul(x[:, :, None, :], B[:, :, :, None])                    # (b, T, N, D)
        for t in range(x.shape[1]):
            h = hs[:, t].addcmul_(a[:, t], h)                                 # (b, N, D)
        return a, hs

    @staticmethod
    def forward(ctx, x, delta, A, B, C):
        y, At = torch.empty_like(x), A.T.contiguous()                         # At: (N, D)
        rows, chunks = _Scan.blocks(x, A)
        starts = x.new_zeros(len(chunks), len(x), *At.shape)                  # (chunks, b, N, D)
        for r in rows:
            for c, s in enumerate(chunks):
                _, hs = _Scan.states(starts[c, r], x[r, s], delta[r, s], At, B[r, s])
                y[r, s] = (C[r, s, None, :] @ hs)[:, :, 0]                    # (b, T, D)
                if c + 1 < len(chunks):
                    starts[c + 1, r] = hs[:, -1]
        ctx.save_for_backward(x, delta, A, B, C, starts)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        """With g_t = dLoss/dh_t, the adjoint recurrence runs from the right:

            g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}
        """
        x, delta, A, B, C, starts = ctx.saved_tensors
        At = A.T.contiguous()                                                 # (N, D)
        dA = torch.zeros_like(At)
        dx, ddelta, dB, dC = (torch.empty_like(v) for v in (x, delta, B, C))
        rows, chunks = _Scan.blocks(x, A)
        for r in rows:
            carry = torch.zeros_like(starts[0, r])     # exp(delta A) g of the token to the right
            for c, s in reversed(list(enumerate(chunks))):
                a, hs = _Scan.states(starts[c, r], x[r, s], delta[r, s], At, B[r, s])
                dC[r, s] = (hs @ dy[r, s, :, None])[..., 0]                   # (b, T, N)
                g = torch.mul(dy[r, s, None, :], C[r, s, :, None])            # (b, T, N, D)
                g[:, -1] += carry
                for t in reversed(range(1, g.shape[1])):
                    g[:, t - 1].addcmul_(a[:, t], g[:, t])                    # (b, N, D)
                carry = a[:, 0] * g[:, 0]
                dx[r, s] = (B[r, s, None, :] @ g)[:, :, 0]                    # (b, T, D)
                dB[r, s] = (g @ x[r, s, :, None])[..., 0]                     # (b, T, N)
                # d/d(delta A) = g_t exp(delta_t A) h_{t-1}: multiply g by both, in place
                g.mul_(a)
                g[:, 1:].mul_(hs[:, :-1])
                g[:, 0].mul_(starts[c, r])
                torch.sum(torch.mul(g, At, out=a), dim=2, out=ddelta[r, s])   # (b, T, D)
                dA += g.mul_(delta[r, s, None, :]).sum((0, 1))                # (N, D)
        return dx, ddelta, dA.T, dB, dC


# --- the mixer: Mamba, read in both directions (in Vision Mamba's code: "v2") -----------------

class Direction(nn.Module):
    """What one reading direction owns: convolution, projections to (delta, B, C), A and D."""

    def __init__(self, channels, state, rank, conv):
        super().__init__()
        self.rank, self.state = rank, state
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
        # delta is float32 from here on: under autocast a bf16 softplus could not tell apart the
        # small steps, which are the long memories
        with torch.autocast(x.device.type, enabled=False):
            delta = F.softplus(self.dt_proj(dt.to(self.dt_proj.weight.dtype)))   # (B, L, ED)
        return selective_scan(u, delta, -self.A_log.exp(), Bt, Ct, self.D)       # (B, L, ED)


class BiMamba(nn.Module):
    """(B, L, D) -> (B, L, D). Both directions share the projections in and out and the gate z; their
    outputs are summed. Time and class tokens come first for one direction, last for the other. (The
    authors' code gates each direction before the sum: the same, since the gate is the same.)"""

    def __init__(self, width, expand=2, state=16, conv=4):
        super().__init__()
        channels, rank = expand * width, math.ceil(width / 16)
        self.in_proj = nn.Linear(width, 2 * channels, bias=False)
        self.forwards = Direction(channels, state, rank, conv)
        self.backwards = Direction(channels, state, rank, conv)
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

    def __init__(self, width, skip=None, adaln=False, drop_path=0.0, **mixer):
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
    """(B,) -> (B, width): cosines, then sines, of t at wavelengths from 2 pi to 2 pi 10^4."""
    half = width // 2
    freqs = (-math.log(10000) / half * torch.arange(half, device=t.device)).exp()
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
                 patch=2,               # p; None: the largest that fits 4 x 4 times or more
                 num_classes=0,         # 0: unconditional
                 expand=2,              # E
                 state=16,              # N
                 conv=4,                # taps of the causal convolution
                 skip="concat",         # long skips: "concat" | "add" | "none"
                 time="token",          # "token": a token for time, one for the class | "adaln": time
                                        # + class scale and shift every block's norm (ablation)
                 pos_init="zero",       # learned positions start at "zero" (the authors') | "sincos"
                 label_std=0.02,        # of the class vectors at the start (0.02: the authors')
                 drop_path=0.0,         # stochastic depth of the last block, rising linearly from 0
                 learn_sigma=True,
                 grad_checkpointing=False):  # recompute each block in backward: less memory, +1/3 time
        super().__init__()
        C, H, W = shape
        for value, allowed in ((skip, ("concat", "add", "none")), (time, ("token", "adaln")),
                               (pos_init, ("zero", "sincos"))):
            if value not in allowed:
                raise ValueError(f"unknown DiS option {value!r}: choose {' or '.join(allowed)}")
        if patch is None:
            patch = next(p for p in range(max(1, min(H, W) // 4), 0, -1) if H % p == W % p == 0)
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path {drop_path} is not a probability below 1: try 0.1")
        if H % patch or W % patch:
            fits = [f"{h}x{w}" for h, w in dict.fromkeys(
                (H // patch * patch + k, W // patch * patch + k) for k in (0, patch)) if h * w]
            raise ValueError(f"image size {H}x{W} is not divisible by the patch size {patch}: "
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
        # one more row than classes: "no class", for guidance
        self.label_embed = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.pos_embed = nn.Parameter(torch.zeros(1, extras + J, width))
        half = depth // 2
        self.shallow, self.deep = nn.ModuleList(), nn.ModuleList()
        rates = [0.0] + [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        block = dict(width=width, adaln=time == "adaln", expand=expand, state=state, conv=conv)
        for i in range(half):
            self.shallow.append(Block(drop_path=rates[i], **block))
        self.middle = Block(drop_path=rates[half], **block)
        for i in range(half):
            self.deep.append(Block(skip=skip, drop_path=rates[half + 1 + i], **block))
        self.drop_path = drop_path
        self.norm = nn.RMSNorm(width, eps=1e-5)
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
                    module.out_proj.weight /= math.sqrt(max(self.depth, 1))
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=self.label_std)
        if self.pos_init == "sincos":
            row, col = (torch.arange(n // self.patch) for n in self.shape[1:])
            D = self.pos_embed.shape[-1]
            table = torch.cat([timestep_embedding(row, D // 2)[:, None].expand(-1, len(col), -1),
                               timestep_embedding(col, D - D // 2).expand(len(row), -1, -1)], -1)
            with torch.no_grad():       # time and class tokens, before the patches, keep 0
                self.pos_embed[0, -len(row) * len(col):] = rearrange(table, "h w d -> (h w) d")
        nn.init.zeros_(self.final.weight)                        # departure 5
        for module in self.modules():
            if isinstance(module, Block) and module.adaln is not None:
                nn.init.zeros_(module.adaln.weight)              # adaLN blocks start unmodulated

    def forward(self, x, t, y=None):
        """x (B, C, H, W), t (B,) long, y (B,) long or None; label -1 means "no class".
        -> (B, C or 2C, H, W)."""
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
        hidden, residual = x + self.pos_embed, None

        skips = []
        for block in self.shallow:
            hidden, residual = self.run(block, hidden, residual, None, c)
            skips.append(hidden)
        hidden, residual = self.run(self.middle, hidden, residual, None, c)
        for block in self.deep:                                  # last in, first out
            hidden, residual = self.run(block, hidden, residual, skips.pop(), c)
        x = self.norm(add(residual, hidden, self.drop_path if self.training else 0))

        x = self.final_norm(x[:, -(H * W // p**2):])             # drop time and class (B, J, D)
        if self.final_adaln is not None:                         # departure 3
            shift, scale = self.final_adaln(F.silu(c))[:, None].chunk(2, dim=-1)
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
# and GFLOPs).
_SIZES = {"S": (368, 24, 28.4, 0.43), "B": (768, 24, 119.1, 1.86), "M": (768, 48, 229.4, 3.70),
          "L": (1024, 48, 404.0, 6.57), "H": (1536, 48, 900.6, 14.79)}
_PAPER_DIFFUSION = dict(schedule="linear", predict="eps", variance="learned")
CONFIGS = {f"DiS-{size}/{p}": dict(width=width, depth=depth, patch=p, **_PAPER_DIFFUSION)
           for size, (width, depth, _, _) in _SIZES.items() for p in (2, 4)}
# Learns shapes or digits in minutes on two CPU cores. There the number of updates decides, so it cuts
# an image into 4 x 4 patches and halves E and N; and it predicts x0, since 128 channels cannot carry
# the noise of a large patch, which predicting eps or v would ask for. Class tokens are learned late
# (after 2,000 steps on shapes, at guidance 2, a classifier recognised 80% of 160 samples as the class
# asked for, with adaptive norms 97%), hence time="adaln", the paper's ablation; for the same reason
# positions start as sines and cosines and class vectors at full size.
CONFIGS["tiny"] = dict(width=128, depth=6, patch=None, expand=1, state=8, time="adaln",
                       pos_init="sincos", label_std=1.0, schedule="cosine", predict="x0", variance="small")


def build(preset, shape, num_classes=0, **options):
    """-> (model, diffusion): all that train.py and sample.py ask of a paper.

    model(x_t (B, C, H, W), t (B,), y (B,) or None) -> what diffusion.loss and .sample expect. What it may
    have: macs(), to be printed; grad_checkpointing, which --grad-checkpointing sets; unit, the class of the
    modules that --shard gathers one at a time. shape (C, H, W); num_classes 0: no y. `options` override the
    preset: skip="add", patch=8 ... Raises ValueError, with the fix, for a preset, option or size that is
    wrong.
    """
    if len(shape) != 3:
        raise ValueError("DiS makes pictures, not videos: pass --model mdm --preset tiny-video")
    if preset not in CONFIGS:
        raise ValueError(f"unknown preset {preset!r}: dis has {', '.join(CONFIGS)}")
    config = {**CONFIGS[preset], **options}
    of_diffusion = {k: config.pop(k) for k in ("schedule", "predict", "variance", "T", "min_snr")
                    if k in config}
    own = [k for k in inspect.signature(DiS).parameters
           if k not in ("shape", "num_classes", "learn_sigma")]
    for key in config:
        if key not in own:
            raise ValueError(f"unknown option {key!r}: dis has {', '.join(own)}, schedule, predict, "
                             f"variance, T, min_snr")
    for key, value in {**config, **of_diffusion}.items():
        if key in ("width", "depth", "patch", "expand", "state", "conv", "T"):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{key}={value!r}: must be a whole number, at least 1")
        elif key in ("drop_path", "label_std", "min_snr"):
            if value is not None and (type(value) not in (int, float) or not value >= 0):
                raise ValueError(f"{key}={value!r}: must be a number, at least 0")
    schedule = of_diffusion.pop("schedule")
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: choose {' or '.join(SCHEDULES)}")
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
          "is left is mostly the linear layers of the long skips (third column). Counting everything,\n"
          "DiS-H/2 costs about twice DiT-XL/2, not a fraction of it.\n"
          "* from memory of the paper's table; the authors' counting script, re-created, gives the same up\n"
          "  to the last digit.")


if __name__ == "__main__":
    table()
