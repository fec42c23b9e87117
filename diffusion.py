"""Gaussian diffusion in one file: schedules, the forward process, losses, samplers, and noise.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,      eps ~ N(0, I),   t = 0 .. T-1

A network sees (x_t, t) and tells what was mixed; everything else is arithmetic on the table
`alpha_bar`. The formulas below take the network's *output* `out`, so a paper that denoises several
resolutions at once can step each one with a schedule of its own; only `loss`, `sample` and `guided`
call the network.

Index convention, that of ADM's code (Dhariwal & Nichol 2021, 2105.05233; DDPM, IDDPM and DDIM count
from 1): t = 0 is *one* step of noise, not none. alpha_bar_prev[0] = 1. x_0 is always the clean image,
never x_t at t = 0; there, x_{t-1} means x_0.

| code             | symbol                  | from                                                    |
|------------------|-------------------------|---------------------------------------------------------|
| `alpha_bar`      | alpha-bar_t             | DDPM, Ho et al. 2020 (2006.11239), Section 2            |
| `beta`           | beta_t                  | DDPM Section 2; linear schedule Section 4               |
| `q_posterior`    | q(x_{t-1} | x_t, x_0)   | DDPM Eq. 6, 7                                           |
| `cosine`, `learned`, `respaced` |         | IDDPM, Nichol & Dhariwal 2021 (2102.09672), Eq. 17, 15, Sec. 4 |
| `ddim_step`      | sigma_t(eta)            | DDIM, Song et al. 2020 (2010.02502), Eq. 12, 16         |
| `v`              | v = sqrt(ab) eps - sqrt(1-ab) x_0 | Salimans & Ho 2022 (2202.00512), App. D       |
| `guided`         | s = 1 + w               | classifier-free guidance, Ho & Salimans 2022 (2207.12598) |
| `min_snr`        | gamma                   | Hang et al. 2023 (2303.09556)                           |
| `shift_snr`      | SNR / ratio^power       | the code of MDM, Gu et al. 2023 (2310.15111)            |
| `bounded`        | s (dynamic thresholding) | Imagen, Saharia et al. 2022 (2205.11487)               |

Shapes: x is (B, C, H, W), or (B, C, T, H, W) for video; t is (B,) long; every loss is (B,).
"""
import contextlib
import math

import torch


class UserError(ValueError):
    """Something that the user can put right. The message is a sentence that says how."""


# ---------------------------------------------------------------------------------------------
# Noise as a function. Noise and timesteps are computed from integers (seed, step, index) by a hash,
# with no generator whose state would have to be saved, shipped between processes or kept in step.
# (The order of the data, initial weights and dropout come from generators, each seeded anew by such
# integers.) A resumed run therefore repeats the uninterrupted one, and image 7 of seed 0 is the same
# picture in any batch, on any number of processes. Runs where x lives: on a GPU nothing waits for
# the CPU.

GAMMA = 0x9E3779B97F4A7C15 - 2**64      # 2^64 / golden ratio, as a signed 64-bit integer


def _mix(z):
    """The finaliser of SplitMix64 (Steele et al. 2014): int64 in, well-mixed int64 out."""
    z = (z ^ (z >> 30 & 2**34 - 1)) * (0xBF58476D1CE4E5B9 - 2**64)  # `& 2**34-1` makes the shift
    z = (z ^ (z >> 27 & 2**37 - 1)) * (0x94D049BB133111EB - 2**64)  # of a signed integer logical
    return z ^ (z >> 31 & 2**33 - 1)


def fold(seed, *counters):
    """Derive a new seed from `seed` and integers. Each may be an int or a (B,) long tensor."""
    seed = torch.as_tensor(seed)
    for c in counters:
        seed = _mix(seed * GAMMA + c)
    return seed


def _bits(seeds, n):
    """(B,) seeds -> (B, n) int64: for each row the first n outputs of SplitMix64."""
    return _mix(seeds[:, None] + GAMMA * torch.arange(1, n + 1, device=seeds.device))  # (B, n)


def uniform(seeds):
    """(B,) seeds -> (B,) float32 in [0, 1)."""
    return (_bits(seeds, 1)[:, 0] >> 40 & 2**24 - 1).float() * 2**-24


def normal(seeds, shape):
    """(B,) seeds -> (B, *shape) float32 standard normals; row i depends on seeds[i] only."""
    n = math.prod(shape)
    bits = _bits(seeds, (n + 1) // 2)
    high, low = (bits >> 32 & 2**32 - 1).float(), (bits & 2**32 - 1).float()
    radius = ((high + 0.5) * 2**-32).log().mul(-2).sqrt()         # Box-Muller: two per hash
    angle = low * (2 * math.pi * 2**-32)
    z = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return z[:, :n].reshape(len(seeds), *shape)


# ---------------------------------------------------------------------------------------------
# Schedules. A schedule is its alpha_bar, float64 (T,): 1 - alpha_bar at t = 0 is 1e-4, and float32
# would have only three digits of it left. Tables are made on the CPU whatever the default device.

def linear_alpha_bar(T):
    """beta from 1e-4 to 0.02 (DDPM Sec. 4) times 1000 / T (ADM's code): its sum does not depend on T."""
    if T <= 20:
        raise UserError(f"a linear schedule of {T} steps would need a beta of 1 or more: use more than 20")
    beta = torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64, device="cpu")
    return (1 - beta).cumprod(0)


def cosine_alpha_bar(T):
    """alpha_bar(u) = cos^2((u + 0.008) / 1.008 * pi / 2), each beta at most 0.999. IDDPM Eq. 17."""
    u = torch.arange(T + 1, dtype=torch.float64, device="cpu") / T
    f = ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return (1 - beta).cumprod(0)


SCHEDULES = {"linear": linear_alpha_bar, "cosine": cosine_alpha_bar}


def shift_snr(alpha_bar, ratio, power=1):
    """Divide the signal-to-noise ratio by ratio^power (ratio > 1: more noise).

    For an image `ratio` times larger per side. Averaging the ratio^2 pixels that show the same content
    divides the noise variance by ratio^2, so equal hiding needs power 2. MDM's released 256 px model
    uses power 1, our default; the 1024 px one uses 2. The formula is from MDM's code; the paper says
    only that it shifts by resolution.
    """
    return 1 / (1 + ratio**power * (1 - alpha_bar) / alpha_bar)


def spaced_timesteps(T, spec):
    """Which of the T steps to keep when sampling. IDDPM Section 4.

    "250": 250 steps evenly from 0 to T-1, both included. "10,15,20": the same within three equal
    sections of 0..T-1. "ddim50": every (T/50)-th step from 0; it never starts at T-1.
    Raises ValueError if that many steps do not fit. (ADM's code takes "ddimN" if any whole stride gives
    N steps; its sum of strides may round a tie the other way; one step alone is its section's first.)
    """
    spec = str(spec)
    try:
        counts = [int(c) for c in spec.removeprefix("ddim").split(",")]
        if spec.startswith("ddim") and len(counts) > 1:
            raise UserError
    except ValueError:
        raise UserError(f"steps {spec!r} not understood: write 50, ddim50 or 10,15,20") from None
    if min(counts) < 1 or any(c > T // len(counts) for c in counts):
        raise UserError(f"cannot take {spec} of the {T} diffusion steps: "
                         f"ask for 1 to {T // len(counts)}")
    if spec.startswith("ddim"):
        if T % counts[0] or counts == [1]:      # one step from 0 would take pure noise for the least noisy
            raise UserError(f"{spec} needs a count above 1 that divides {T}: drop 'ddim' for even spacing")
        return list(range(0, T, T // counts[0]))
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = T // len(counts) + (i < T % len(counts))
        stride = (size - 1) / (count - 1) if count > 1 else 1
        # one step alone must be the noisiest: it has to start from pure noise
        kept += [start + (round(stride * j) if count > 1 else size - 1) for j in range(count)]
        start += size
    return kept


# ---------------------------------------------------------------------------------------------

class Diffusion:
    """The Gaussian diffusion of one schedule.

    alpha_bar     (T,) float64
    predict       what the network's output means: "eps" | "v" | "x0"
    variance      of a DDPM step: "small" (the posterior's) | "large" (beta) | "learned" (the
                  network has C more channels that interpolate between the two; IDDPM Eq. 15)
    min_snr       None, or the gamma that caps the weight of easy, little-noised steps (5 in its
                  paper, from memory)
    timestep_map  (T,) the t to show the network; set by `respaced`
    """

    def __init__(self, alpha_bar, predict="eps", variance="small", min_snr=None,
                 timestep_map=None):
        for value, allowed in ((predict, ("eps", "v", "x0")),
                               (variance, ("small", "large", "learned"))):
            if value not in allowed:
                raise UserError(f"unknown diffusion setting {value!r}: choose one of {allowed}")
        self.alpha_bar, self.predict, self.variance, self.min_snr = (
            alpha_bar, predict, variance, min_snr)
        self.T = len(alpha_bar)
        self.timestep_map = torch.arange(self.T, device="cpu") if timestep_map is None else timestep_map
        prev = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        beta = 1 - alpha_bar / prev
        posterior_var = beta * (1 - prev) / (1 - alpha_bar)                     # DDPM Eq. 7
        # posterior_var[0] = 0: x_{t-1} is then x_0 itself. Its log is needed all the same, so ADM's code
        # takes the next entry's.
        second = posterior_var[min(1, self.T - 1)]
        # a respaced schedule of one step has no second entry: fall back on beta
        floor = second if second > 0 else beta[0]
        log_small = torch.cat([floor[None], posterior_var[1:]]).log()
        self.tables = {
            "alpha_bar": alpha_bar, "alpha_bar_prev": prev, "beta": beta,
            "posterior_var": posterior_var, "log_small": log_small, "log_beta": beta.log(),
            "log_large": torch.cat([floor[None], beta[1:]]).log(),
            "c1": beta * prev.sqrt() / (1 - alpha_bar),
            "c2": (1 - prev) * (1 - beta).sqrt() / (1 - alpha_bar),
            "ddim_sigma": ((1 - prev) / (1 - alpha_bar) * (1 - alpha_bar / prev)).sqrt(),
            "signal_prev": prev.sqrt(), "noise_var_prev": 1 - prev,
            "signal": alpha_bar.sqrt(), "noise": (1 - alpha_bar).sqrt(),
            "snr": alpha_bar / (1 - alpha_bar),
        }
        self._on_device = {}

    @classmethod
    def of(cls, options):
        """Takes schedule, T, predict, variance and min_snr out of the dict `options` -> the Diffusion they mean."""
        own = {k: options.pop(k) for k in ("predict", "variance", "min_snr") if k in options}
        return cls(SCHEDULES[options.pop("schedule")](options.pop("T", 1000)), **own)

    def at(self, name, t, x):
        """Entry t of a table as float32, (B,) -> (B, 1, 1, 1) to broadcast over x."""
        key = name, t.device
        if key not in self._on_device:          # once per device: a copy is a synchronisation
            table = self.timestep_map if name == "t" else self.tables[name].float()
            self._on_device[key] = table.to(t.device)
        return self._on_device[key][t].view(-1, *[1] * (x.ndim - 1))          # (B, 1, 1, 1)

    def model_t(self, t):
        """(B,) index into this schedule -> (B,) the original step number the network knows."""
        return self.at("t", t, t)

    def respaced(self, spec, last=None):
        """The same process seen at fewer steps (see `spaced_timesteps`). IDDPM Section 4.

        `last`: of the steps 0 to `last` only. Raises ValueError if they would not end there.
        """
        keep = torch.tensor(spaced_timesteps(self.T if last is None else last + 1, spec))
        if last is not None and keep[-1] != last:
            raise UserError(f"steps {spec} do not begin at step {last}: drop 'ddim' for even spacing")
        return Diffusion(self.alpha_bar[keep], self.predict, self.variance, self.min_snr,
                         self.timestep_map[keep])

    def noise_shape(self, shape):
        """Of the normal numbers that `loss` needs for one example of `shape`."""
        return shape

    # --- the forward process ---

    def q_sample(self, x0, t, noise):
        """Noise x0 to step t. DDPM Eq. 4."""
        return self.at("signal", t, x0) * x0 + self.at("noise", t, x0) * noise

    def q_posterior(self, x0, x_t, t):
        """Mean, variance, log-variance of q(x_{t-1} | x_t, x_0). DDPM Eq. 6, 7."""
        mean = self.at("c1", t, x0) * x0 + self.at("c2", t, x0) * x_t
        return mean, self.at("posterior_var", t, x0), self.at("log_small", t, x0)

    def target(self, x0, t, noise):
        """What a perfect network would output."""
        if self.predict == "eps":
            return noise
        if self.predict == "x0":
            return x0
        return self.at("signal", t, x0) * noise - self.at("noise", t, x0) * x0          # v

    # --- reading the network's output ---

    def split(self, out):
        """(prediction (B, C, ..), variance channels (B, C, ..) or None), float32."""
        out = out.float()       # under autocast bf16 would lose the small-t terms below
        if self.variance == "learned":
            return out.chunk(2, dim=1)                                         # 2 x (B, C, H, W)
        return out, None

    def predict_x0_eps(self, out, x_t, t, clip=False):
        """The network's belief about (x_0, eps). `clip` keeps x_0 in [-1, 1], see `bounded`: right
        for pixels, wrong for latents."""
        pred, _ = self.split(out)
        signal, noise = self.at("signal", t, x_t), self.at("noise", t, x_t)
        if self.predict == "eps":
            x0 = (x_t - noise * pred) / signal
        elif self.predict == "x0":
            x0 = pred
        else:
            x0 = signal * x_t - noise * pred
        if clip:
            x0 = bounded(x0, clip)
        elif self.predict == "eps":             # the general form below would only add rounding
            return x0, pred
        elif self.predict == "v":
            return x0, noise * x_t + signal * pred
        return x0, (x_t - signal * x0) / noise

    def p_mean_logvar(self, out, x_t, t, clip=False):
        """Mean and log-variance of p(x_{t-1} | x_t), the learned reverse step."""
        x0, _ = self.predict_x0_eps(out, x_t, t, clip)
        mean, _, log_small = self.q_posterior(x0, x_t, t)
        if self.variance == "small":
            return mean, log_small
        if self.variance == "large":
            return mean, self.at("log_large", t, x_t)
        frac = (self.split(out)[1] + 1) / 2                               # IDDPM Eq. 15
        return mean, frac * self.at("log_beta", t, x_t) + (1 - frac) * log_small

    # --- training ---

    def loss(self, model, x0, t, noise, **cond):
        """One training example per row. Returns {"loss", "mse", ["vb"]}, each (B,)."""
        x_t = self.q_sample(x0, t, noise)
        return self.loss_terms(model(x_t, self.model_t(t), **cond), x0, x_t, t, noise)

    def loss_terms(self, out, x0, x_t, t, noise):
        """The hybrid loss of IDDPM: squared error, plus (learned variance only) the variational
        term of step t in bits per dimension, with the mean detached so that it trains only the
        variance. Its weight 1 per step is, at T = 1000, IDDPM's 0.001 L_vlb."""
        pred, var = self.split(out)
        mse = (pred - self.target(x0, t, noise)).square().flatten(1).mean(1)              # (B,)
        terms = {"mse": mse, "loss": mse}
        if self.min_snr is not None:
            snr = self.at("snr", t, t)
            scale = {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[self.predict]
            terms["loss"] = mse * snr.clamp(max=self.min_snr) / scale
        if var is not None:
            terms["vb"] = self.vb(torch.cat([pred.detach(), var], dim=1), x0, x_t, t)
            terms["loss"] = terms["loss"] + terms["vb"]
        return terms

    def vb(self, out, x0, x_t, t):
        """L_t of the variational bound (DDPM Eq. 5: L_{t-1}, t from 1 on), bits per dimension, (B,)."""
        true_mean, _, true_logvar = self.q_posterior(x0, x_t, t)
        mean, logvar = self.p_mean_logvar(out, x_t, t)
        kl = 0.5 * (logvar - true_logvar - 1 + (true_logvar - logvar).exp()
                    + (true_mean - mean).square() * (-logvar).exp())
        nll = -discretized_log_likelihood(x0, mean, logvar / 2)
        return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)

    # --- sampling ---

    def ddpm_step(self, out, x_t, t, noise, clip=False):
        """x_t -> a sample of x_{t-1}; at t = 0 the mean. DDPM Algorithm 2."""
        mean, logvar = self.p_mean_logvar(out, x_t, t, clip)
        not_last = (t > 0).view(-1, *[1] * (x_t.ndim - 1))                     # (B, 1, 1, 1)
        return mean + not_last * (logvar / 2).exp() * noise

    def ddim_step(self, out, x_t, t, noise=None, clip=False, eta=0.0):
        """x_t -> x_{t-1}. DDIM Eq. 12, with eps recomputed from the (clipped) x_0; a learned
        variance is not used. eta = 0 is deterministic, eta = 1 as noisy as the posterior (Eq. 16)."""
        x0, eps = self.predict_x0_eps(out, x_t, t, clip)
        sigma = eta * self.at("ddim_sigma", t, x_t)
        rest = (self.at("noise_var_prev", t, x_t) - sigma**2).clamp(min=0)
        x = self.at("signal_prev", t, x_t) * x0 + rest.sqrt() * eps
        return x if noise is None else x + sigma * noise       # sigma is 0 at t = 0

    @torch.no_grad()
    def sample(self, model, shape, seeds, *,
               sampler="ddim",      # "ddim" | "ddpm"
               steps="50",          # how many of the T steps, see spaced_timesteps
               eta=0.0,             # DDIM only: 0 deterministic .. 1 as noisy as DDPM
               cfg_scale=1.0,       # guidance; 1 = off, and then half the work
               clip=True,           # keep the predicted x_0 in [-1, 1], see `bounded`; False for latents
               start=None,          # (x (B, C, H, W), t): from x at step t, not from noise at T - 1;
                                    # `steps` are then chosen among the t + 1 steps t .. 0
               on_step=None,        # called as on_step(i, x, x0) after each step, i counting down
               **cond):             # y=, text=, text_mask=: one row per image
        """Draw len(seeds) images of `shape` = (C, H, W); image i is a function of seeds[i]."""
        # noise is numbered: T makes the starting x, i what step i adds
        x, last = start or (normal(fold(seeds, self.T), shape), None)              # (B, C, H, W)
        d = self.respaced(steps, last)
        # while sampling no weights change: what depends on them alone is made once
        with getattr(model, "frozen", contextlib.nullcontext)():
            model = guided(model, cfg_scale) if cfg_scale != 1 else model
            for i in reversed(range(d.T)):
                t = torch.full_like(seeds, i)
                out = model(x, d.model_t(t), **cond)
                noise = normal(fold(seeds, i), shape) if sampler == "ddpm" or eta else None
                x0 = d.predict_x0_eps(out, x, t, clip)[0] if on_step else None
                x = (d.ddpm_step(out, x, t, noise, clip) if sampler == "ddpm"
                     else d.ddim_step(out, x, t, noise, clip, eta))
                if on_step:
                    on_step(i, x, x0)
        return x


THRESHOLDS = {"imagen": (0.995, 100.0), "deepfloyd": (0.95, 1.5)}


def bounded(x0, clip):
    """Keep x0 (B, ..) in [-1, 1]. clip=True cuts off. "imagen" ("deepfloyd"), dynamic thresholding: x0 is
    cut at +-s and divided by s, the 99.5% (95%) quantile of |x0| of each image, but at least 1 and at
    most 100 (1.5), limits of MDM's code. Guided images keep their contrasts."""
    if clip is True:
        return x0.clamp(-1, 1)
    part, most = THRESHOLDS[clip]
    values = x0.abs().flatten(1)                                                       # (B, n)
    s = values.kthvalue(math.ceil(part * values.shape[1])).values.clamp(1, most)       # (B,)
    s = s.view(-1, *[1] * (x0.ndim - 1))                                               # (B, 1, 1, 1)
    return x0.clamp(-s, s) / s


def discretized_log_likelihood(x, mean, log_scale):
    """Log-probability of the 8-bit value x (scaled to [-1, 1]) under a Gaussian. DDPM Eq. 13.

    A bin is 2/255 wide and the outermost two are open. On latents "8-bit" is false; the term then
    only trains the variance of the very last step, as in DiT. (ADM approximates the normal
    distribution function by a tanh; here it is exact.)
    """
    inv = (-log_scale).exp()
    upper = (0.5 * torch.erfc((mean - x - 1 / 255) * inv * 0.5**0.5))
    lower = (0.5 * torch.erfc((mean - x + 1 / 255) * inv * 0.5**0.5))
    p = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return p.clamp(min=1e-12).log()


def with_and_without(cond):
    """{name: (B, ..)} -> {name: (2B, ..)}: the condition, then none: label -1, a mask of zeros."""
    none = {"y": lambda y: torch.full_like(y, -1), "text_mask": torch.zeros_like}
    return {k: torch.cat([v, none[k](v) if k in none else v]) for k, v in cond.items() if v is not None}


def guided(model, scale):
    """Classifier-free guidance: `model` pushed away from what it says without the condition.

    One doubled batch, see `with_and_without`. All C prediction channels are guided. (DiT, and DiS after it,
    guide only the first three of four latent channels, which DiT's authors call unintended.) Variance
    channels are the conditional ones.
    """
    def call(x, t, **cond):
        both = with_and_without(cond)
        with_c, without = model(torch.cat([x, x]), torch.cat([t, t]), **both).float().chunk(2)
        C = x.shape[1]
        pred = without[:, :C] + scale * (with_c[:, :C] - without[:, :C])
        return torch.cat([pred, with_c[:, C:]], dim=1)                        # (B, C or 2C, ..)

    return call
