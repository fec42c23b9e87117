"""Gaussian diffusion in one file: schedules, the process and its losses, samplers, guidance, random numbers.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,      eps ~ N(0, I),   t = 0 .. T-1

A network gets x_t and t and predicts what was mixed: eps, x_0, or v, a combination of the two. Everything else is
arithmetic on the table `alpha_bar`. Only `loss`, `sample` and `guided` call the network. Most other methods take its
*output*, `out`. So a paper that denoises several resolutions at once can give each resolution its own schedule.

Steps are counted as in ADM's code (Dhariwal & Nichol 2021, 2105.05233): t = 0 has *one* step of noise, not none. The
papers count from 1. x_0 always means the clean image: at t = 0, x_{t-1} is x_0 and alpha_bar_prev is 1.

| code                  | symbol                    | from                                                           |
|-----------------------|---------------------------|----------------------------------------------------------------|
| `alpha_bar`, `beta`   | alpha-bar_t, beta_t       | DDPM, Ho et al. 2020 (2006.11239), Section 2; linear: Section 4 |
| `q_posterior`         | q(x_{t-1} | x_t, x_0)     | DDPM Eq. 6, 7                                                  |
| `cosine_..`, "learned", `respaced` |              | IDDPM, Nichol & Dhariwal 2021 (2102.09672), Eq. 17, 15, Sec. 4 |
| `ddim_step`           | sigma_t(eta)              | DDIM, Song et al. 2020 (2010.02502), Eq. 12, 16                |
| "v"                   | sqrt(ab) eps - sqrt(1 - ab) x_0, ab = alpha_bar | Salimans & Ho 2022 (2202.00512), App. D  |
| `min_snr`             | gamma                     | Hang et al. 2023 (2303.09556)                                  |
| `max_snr`             | 1 in its "truncated SNR"  | Salimans & Ho 2022 (2202.00512), Section 4                     |
| `shift_snr`           | SNR / ratio^power         | the code of MDM, Gu et al. 2023 (2310.15111)                   |
| `bounded`             | dynamic thresholding      | Imagen, Saharia et al. 2022 (2205.11487)                       |
| `guided`: `scale`     | 1 + w                     | classifier-free guidance, Ho & Salimans 2022 (2207.12598)      |
| `cfg_below`           | sigma_hi                  | guidance in an interval, Kynkaanniemi et al. 2024 (2404.07724) |

Shapes: x is (B, C, H, W), or (B, C, frames, H, W) for video; t is (B,) long; every loss is (B,).
"""
import contextlib
import math
import re

import torch


class UserError(ValueError):
    """Something that the user can put right. The message is one sentence that says how."""


# --- schedules -------------------------------------------------------------------------------------------------------
# A schedule is a function of T, the number of steps. It returns alpha_bar, (T,), on the CPU and in float64:
# 1 - alpha_bar is 1e-4 at t = 0, and float32 would keep only three digits of that.

def linear_alpha_bar(T):
    """beta from 1e-4 to 0.02 (DDPM Section 4), times 1000 / T as in ADM's code, so that any T adds the same noise."""
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


# To add a schedule, write a function like these two and give it a name here: `--set schedule=NAME` then selects it.
SCHEDULES = {"linear": linear_alpha_bar, "cosine": cosine_alpha_bar}


def shift_snr(alpha_bar, ratio, power=1):
    """Divide the signal-to-noise ratio by ratio^power: more noise, for an image whose sides are `ratio` times longer.

    Such an image shows in ratio^2 pixels what the smaller one shows in one. Averaging these divides the variance of the
    noise by ratio^2, so power 2 hides the content equally well. MDM's released model for 256 pixels uses power 1, our
    default, and the one for 1024 uses 2. The formula is from MDM's code. The paper says only that resolution shifts it.
    """
    return 1 / (1 + ratio**power * (1 - alpha_bar) / alpha_bar)


# --- the process -----------------------------------------------------------------------------------------------------

class Diffusion:
    """The diffusion of one schedule: noising, losses, sampling.

    alpha_bar     (T,) float64: what a schedule returns
    predict       what the network outputs: "eps" | "v" | "x0"
    variance      the variance of a DDPM step: "small" (the posterior's) | "large" (beta) | "learned": the network has
                  C more output channels, which interpolate between the two (IDDPM Eq. 15)
    min_snr       None, or gamma: a limit on the weight of steps with little noise (5 in its paper, from memory)
    max_snr       None, or the least weight, for steps with much noise. Without both, all errors weigh the same; with
                  one or both, x_0's error weighs max(max_snr, min(snr, min_snr))
    t_normal      None: training takes all steps alike. Or [mean, std]: t / T is the sigmoid of a normal number, so the
                  steps in the middle come more often (Esser et al. 2024, 2403.03206, Section 3.1)
    cfg_below     guidance acts only at steps t < cfg_below T. At the noisiest steps it narrows the choice: of drawn
                  shapes it prefers the big ones
    timestep_map  (T,) the t that the network is shown; set by `respaced`
    """

    def __init__(self, alpha_bar, predict="eps", variance="small", min_snr=None, timestep_map=None, max_snr=None,
                 t_normal=None, cfg_below=1):
        for value, allowed in ((predict, ("eps", "v", "x0")), (variance, ("small", "large", "learned"))):
            if value not in allowed:
                raise UserError(f"unknown diffusion setting {value!r}: choose one of {allowed}")
        if min_snr == 0:
            raise UserError("min_snr=0 gives all steps the weight 0: use None for no limit")
        if None not in (min_snr, max_snr) and max_snr > min_snr:
            raise UserError(f"max_snr={max_snr} is above min_snr={min_snr}: max_snr is the least weight, min_snr the "
                            f"largest. Exchange them")
        if t_normal and (len(t_normal) != 2 or t_normal[1] < 0):
            raise UserError(f"t_normal={t_normal}: must be a mean and a standard deviation, such as [0.5, 1.2]")
        self.alpha_bar, self.predict, self.variance, self.t_normal = alpha_bar, predict, variance, t_normal
        self.min_snr, self.max_snr, self.cfg_below = min_snr, max_snr, cfg_below
        self.T = len(alpha_bar)
        self.timestep_map = torch.arange(self.T, device="cpu") if timestep_map is None else timestep_map
        prev = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])               # alpha_bar of step t - 1
        beta = 1 - alpha_bar / prev
        posterior_var = beta * (1 - prev) / (1 - alpha_bar)                     # DDPM Eq. 7
        # posterior_var[0] is 0, because x_{t-1} is then x_0 itself. But we need a log there. We take that of the next
        # step, as ADM's code does. A schedule respaced to one step has no next step; there we take the log of beta.
        first = posterior_var[1:2] if self.T > 1 else beta                      # (1,)
        self.tables = {                                                         # name: (T,) float64
            "alpha_bar": alpha_bar, "alpha_bar_prev": prev, "beta": beta,
            "signal": alpha_bar.sqrt(), "noise": (1 - alpha_bar).sqrt(), "snr": alpha_bar / (1 - alpha_bar),
            "signal_prev": prev.sqrt(), "noise_var_prev": 1 - prev,
            "mean_x0": beta * prev.sqrt() / (1 - alpha_bar),                    # DDPM Eq. 7: the posterior mean is
            "mean_xt": (1 - prev) * (1 - beta).sqrt() / (1 - alpha_bar),        # mean_x0 x_0 + mean_xt x_t
            "posterior_var": posterior_var, "posterior_std": posterior_var.sqrt(),
            "log_small": torch.cat([first, posterior_var[1:]]).log(),
            "log_large": torch.cat([first, beta[1:]]).log(), "log_beta": beta.log()}
        self._on_device = {}

    @classmethod
    def of(cls, options):
        """Takes what describes a Diffusion out of the dict `options` -> that Diffusion."""
        own = {k: options.pop(k) for k in ("predict", "variance", "min_snr", "max_snr", "t_normal", "cfg_below")
               if k in options}
        return cls(SCHEDULES[options.pop("schedule")](options.pop("T", 1000)), **own)

    def at(self, name, t, x):
        """The entries t (B,) of a table, float32, as (B, 1, 1, 1) to broadcast over x."""
        key = name, t.device
        if key not in self._on_device:          # copied once per device: every copy makes the GPU wait
            table = self.timestep_map if name == "t" else self.tables[name].float()
            self._on_device[key] = table.to(t.device)
        return over(self._on_device[key][t], x)                                             # (B, 1, 1, 1)

    def model_t(self, t):
        """Steps of this schedule (B,) -> the step numbers the network was trained with (B,)."""
        return self.at("t", t, t)

    def draw_t(self, seeds):
        """(B,) seeds -> the steps to train on, (B,) long. See `t_normal`."""
        if not self.t_normal:
            return (uniform(seeds) * self.T).long()
        mean, std = self.t_normal
        share = (mean + std * normal(seeds, ())).sigmoid()                                  # (B,) t / T
        return (share * self.T).long().clamp(max=self.T - 1)

    def respaced(self, spec, last=None):
        """The same process with fewer steps (`spaced_timesteps`). With `last`, they are chosen from steps 0 to `last`.
        IDDPM Section 4. Raises UserError if sampling would not begin at `last`."""
        keep = spaced_timesteps(self.T if last is None else last + 1, spec)
        if last not in (None, keep[-1]):
            raise UserError(f"steps {spec} do not begin at step {last}: drop 'ddim' for even spacing")
        return Diffusion(self.alpha_bar[keep], self.predict, self.variance, timestep_map=self.timestep_map[keep],
                         cfg_below=self.cfg_below)

    def noise_shape(self, shape):
        """The shape of the normal noise that `loss` needs for one example of `shape`."""
        return shape

    def q_sample(self, x0, t, noise):
        """x_0 with the noise of step t. DDPM Eq. 4."""
        return self.at("signal", t, x0) * x0 + self.at("noise", t, x0) * noise

    def q_posterior(self, x0, x_t, t):
        """Mean, variance and log-variance of q(x_{t-1} | x_t, x_0). DDPM Eq. 6, 7."""
        mean = self.at("mean_x0", t, x0) * x0 + self.at("mean_xt", t, x0) * x_t
        return mean, self.at("posterior_var", t, x0), self.at("log_small", t, x0)

    # --- what the network's output means ---

    def target(self, x0, t, noise):
        """What a perfect network would output."""
        if self.predict != "v":
            return noise if self.predict == "eps" else x0
        return self.at("signal", t, x0) * noise - self.at("noise", t, x0) * x0

    def split(self, out, x):
        """The network's output -> prediction, shaped like x (B, C, ..), variance channels (B, C, ..) or None; float32.
        Raises UserError for an output of another shape, which broadcasting would hide."""
        right = (len(x), x.shape[1] * (2 if self.variance == "learned" else 1), *x.shape[2:])
        if out.shape != right:
            raise UserError(f"the model's output is {tuple(out.shape)} for images {tuple(x.shape)}: make it {right}")
        out = out.float()       # autocast's bf16 would lose terms of the sums below when t is small
        return out.chunk(2, dim=1) if self.variance == "learned" else (out, None)           # (B, C, H, W) each

    def predict_x0_eps(self, out, x_t, t, clip=False):
        """The (x_0, eps) that the network's output stands for. clip: keep x_0 in [-1, 1], see `bounded`; right for
        pixels, wrong for latents."""
        pred, _ = self.split(out, x_t)
        signal, noise = self.at("signal", t, x_t), self.at("noise", t, x_t)
        if self.predict == "eps":
            x0, eps = (x_t - noise * pred) / signal, pred
        elif self.predict == "v":
            x0, eps = signal * x_t - noise * pred, noise * x_t + signal * pred
        else:
            x0, eps = pred, (x_t - signal * pred) / noise
        if clip:
            x0 = bounded(x0, clip)
            eps = (x_t - signal * x0) / noise
        return x0, eps

    def p_mean_logvar(self, out, x_t, t, clip=False):
        """Mean and log-variance of p(x_{t-1} | x_t), the learned reverse step."""
        x0, _ = self.predict_x0_eps(out, x_t, t, clip)
        mean, _, log_small = self.q_posterior(x0, x_t, t)
        if self.variance != "learned":
            return mean, self.at(f"log_{self.variance}", t, x_t)
        fraction = (self.split(out, x_t)[1] + 1) / 2
        return mean, fraction * self.at("log_beta", t, x_t) + (1 - fraction) * log_small    # IDDPM Eq. 15

    # --- training ---

    def loss(self, model, x0, t, noise, **cond):
        """The losses of a batch, one number per example: {"loss", "mse", ["vb"]}, each (B,)."""
        x_t = self.q_sample(x0, t, noise)
        return self.loss_terms(model(x_t, self.model_t(t), **cond), x0, x_t, t, noise)

    def loss_terms(self, out, x0, x_t, t, noise):
        """The squared error. A learned variance adds the variational term of step t, in bits per dimension. This is
        IDDPM's hybrid loss. In that term the mean is detached, so it trains only the variance. Its weight is 1 at each
        step, which is IDDPM's 0.001 L_vlb at T = 1000."""
        pred, var = self.split(out, x0)
        mse = (pred - self.target(x0, t, noise)).square().flatten(1).mean(1)                # (B,)
        terms = {"mse": mse, "loss": mse}
        if (self.min_snr, self.max_snr) != (None, None):
            snr = self.at("snr", t, t)                                                      # (B,)
            weight = snr.clamp(self.max_snr, self.min_snr)                                  # of the error of x_0
            terms["loss"] = mse * weight / {"eps": snr, "v": snr + 1, "x0": 1}[self.predict]
        if var is not None:
            terms["vb"] = self.vb(torch.cat([pred.detach(), var], dim=1), x0, x_t, t)
            terms["loss"] = terms["loss"] + terms["vb"]
        return terms

    def vb(self, out, x0, x_t, t):
        """L_t of the variational bound in bits per dimension, (B,): L_{t-1} in DDPM Eq. 5, which counts from 1."""
        true_mean, _, true_logvar = self.q_posterior(x0, x_t, t)
        mean, logvar = self.p_mean_logvar(out, x_t, t)
        kl = 0.5 * (logvar - true_logvar - 1 + (true_logvar - logvar).exp()
                    + (true_mean - mean).square() * (-logvar).exp())
        nll = -discretized_log_likelihood(x0, mean, logvar / 2)
        return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)

    # --- sampling ---

    def ddpm_step(self, out, x_t, t, noise, clip=False):
        """x_t -> a sample of x_{t-1}; at t = 0 its mean. DDPM Algorithm 2."""
        mean, logvar = self.p_mean_logvar(out, x_t, t, clip)
        return mean + over(t > 0, x_t) * (logvar / 2).exp() * noise

    def ddim_step(self, out, x_t, t, noise=None, clip=False, eta=0.0):
        """x_t -> x_{t-1}. DDIM Eq. 12, with the eps of the clipped x_0; a learned variance is not used.
        eta = 0 is deterministic; eta = 1 adds as much noise as the posterior has (Eq. 16)."""
        x0, eps = self.predict_x0_eps(out, x_t, t, clip)
        sigma = eta * self.at("posterior_std", t, x_t)                                      # 0 at t = 0
        rest = (self.at("noise_var_prev", t, x_t) - sigma**2).clamp(min=0)
        x = self.at("signal_prev", t, x_t) * x0 + rest.sqrt() * eps
        return x if noise is None else x + sigma * noise

    @torch.no_grad()
    def sample(self, model, shape, seeds, *,
               sampler="ddim",      # "ddim" | "ddpm"
               steps="50",          # how many of the T steps, see `spaced_timesteps`
               eta=0.0,             # of DDIM: 0 deterministic .. 1 as noisy as DDPM
               cfg_scale=1.0,       # guidance, see `guided` and `cfg_below`; 1 turns it off and halves the work
               negative=None,       # what guidance leads away from, see `guided`; None: no condition
               clip=True,           # keep the predicted x_0 in [-1, 1], see `bounded`; False for latents
               start=None,          # (x (B, C, H, W), t): begin with x at step t, and choose `steps` from t .. 0
               on_step=None,        # called as on_step(i, x, x0) after each step, i counting down to 0
               **cond):             # y=, text=, text_mask=: one row per image; y=4: class 4 for all
        """Draw len(seeds) images of `shape` = (C, H, W) -> (B, C, H, W). Image i depends on seeds[i] and row i of cond
        alone. Raises UserError for wrong `steps`, and if the model's output has another shape than its input."""
        check_sampler(sampler)
        # noise is drawn by number: number T gives the x to begin with, number i what step i adds
        x, last = start or (normal(fold(seeds, self.T), shape), None)                       # (B, C, H, W)
        d = self.respaced(steps, last)
        cond = for_each(seeds, cond)
        # weights do not change here: a model may compute once what depends on them alone
        with getattr(model, "frozen", contextlib.nullcontext)():
            steered = guided(model, cfg_scale, negative) if cfg_scale != 1 else model
            steer = (d.timestep_map < self.cfg_below * (self.timestep_map[-1] + 1)).tolist()
            for i in reversed(range(d.T)):
                t = torch.full_like(seeds, i)                                               # (B,)
                out = (steered if steer[i] else model)(x, d.model_t(t), **cond)
                noise = normal(fold(seeds, i), shape) if sampler == "ddpm" or eta else None
                x0 = d.predict_x0_eps(out, x, t, clip)[0] if on_step else None
                x = (d.ddpm_step(out, x, t, noise, clip) if sampler == "ddpm"
                     else d.ddim_step(out, x, t, noise, clip, eta))
                if on_step:
                    on_step(i, x, x0)
        return x


def over(values, x):
    """(B,) -> (B, 1, 1, 1), with as many axes as x, to broadcast over x."""
    return values.view(-1, *[1] * (x.ndim - 1))


def discretized_log_likelihood(x, mean, log_scale):
    """Log-probability of the 8-bit values x (scaled to [-1, 1]) under a Gaussian, in x's shape. DDPM Eq. 13.

    Each value is a bin 2/255 wide; the first and the last bin are open. (Latents are not 8-bit. For them this only
    trains the variance of the very last step, as in DiT. ADM's code approximates with a tanh what we compute exactly.)
    """
    def beyond(y):                          # the probability of more than y above the mean. 1 minus it would cancel
        return 0.5 * torch.erfc(y * (-log_scale).exp() * 0.5**0.5)
    d, half = x - mean, 1 / 255
    inside = beyond(d.abs() - half) - beyond(d.abs() + half)
    p = torch.where(x < -0.999, beyond(-d - half), torch.where(x > 0.999, beyond(d - half), inside))
    return p.clamp(min=1e-12).log()


# --- for the samplers: which steps to take, and how to keep x_0 in range ---------------------------------------------

def spaced_timesteps(T, spec):
    """Which of T steps to keep when sampling -> their numbers, rising. IDDPM Section 4.

    "250"         250 steps, evenly from 0 to T - 1, both included; "1": only T - 1, the noisiest
    "10,15,20"    the same within each of three equal sections of 0 .. T - 1
    "ddim50"      every (T / 50)-th step from 0, so never T - 1

    Raises UserError if that many steps do not fit. ADM's code differs a little: its "ddimN" takes any whole stride that
    gives N steps, it may round a tie the other way, and for a count of 1 it keeps the first step of the section.
    """
    spec = str(spec)
    if not re.fullmatch(r"ddim\d+|\d+(, *\d+)*", spec):
        raise UserError(f"steps {spec!r} not understood: write 50, ddim50 or 10,15,20")
    counts = [int(n) for n in spec.removeprefix("ddim").split(",")]
    if not all(1 <= n <= T // len(counts) for n in counts):
        raise UserError(f"cannot take {spec} of the {T} diffusion steps: ask for 1 to {T // len(counts)}")
    if spec.startswith("ddim"):
        if T % counts[0] or counts == [1]:      # step 0 alone would treat pure noise as the least noisy image
            raise UserError(f"{spec} needs a count above 1 that divides {T}: drop 'ddim' for even spacing")
        return list(range(0, T, T // counts[0]))
    kept = []
    for section, n in zip(torch.arange(T, device="cpu").tensor_split(len(counts)), counts):
        stride = (len(section) - 1) / max(n - 1, 1)
        kept += section[[round(stride * j) for j in range(n)] if n > 1 else [-1]].tolist()
    return kept


def bounded(x0, clip):
    """x_0 (B, ..) kept in [-1, 1]. clip=True cuts what lies outside. "imagen" and "deepfloyd" are dynamic thresholding:
    each image is cut at +-limit and divided by the limit, so that guided images keep their contrast. The limit is a
    quantile of its |x_0|: 0.995, kept in [1, 100], or for "deepfloyd" 0.95, kept in [1, 1.5]; as in MDM's code."""
    if clip is True:
        return x0.clamp(-1, 1)
    part, most = {"imagen": (0.995, 100.0), "deepfloyd": (0.95, 1.5)}[clip]
    values = x0.abs().flatten(1).sort().values                                              # (B, n)
    place = part * (values.shape[1] - 1)        # as torch.quantile, which takes at most 2^24 values of an image
    limit = values[:, math.floor(place)].lerp(values[:, math.ceil(place)], place % 1)       # (B,)
    limit = over(limit.clamp(1, most), x0)                                                  # (B, 1, 1, 1)
    return x0.clamp(-limit, limit) / limit


# --- guidance --------------------------------------------------------------------------------------------------------

def with_and_without(cond, negative=None):
    """{name: (B, ..)} -> {name: (2B, ..)}: first with the condition, then without: label -1, mask 0; or `negative`."""
    none = {"y": lambda y: torch.full_like(y, -1), "text_mask": torch.zeros_like}
    none |= {k: other.expand_as for k, other in (negative or {}).items()}
    return {k: torch.cat([v, none[k](v) if k in none else v]) for k, v in cond.items() if v is not None}


def guided(model, scale, negative=None):
    """Classifier-free guidance: `model`, with its prediction pushed away from the unconditional one, or from that of
    `negative`: {"text": (1, L, n), "text_mask": (1, L)}.

    It runs one batch of 2B (`with_and_without`). It guides all C prediction channels; the variance stays conditional.
    (DiT, and DiS after it, guide only the first three of four latent channels; DiT's authors call that unintended.)
    """
    def call(x, t, **cond):
        both = with_and_without(cond, negative)
        with_c, without = model(torch.cat([x, x]), torch.cat([t, t]), **both).float().chunk(2)
        C = x.shape[1]
        pred = without[:, :C] + scale * (with_c[:, :C] - without[:, :C])
        return torch.cat([pred, with_c[:, C:]], dim=1)                                      # (B, C or 2C, ..)

    return call


# --- random numbers as a function ------------------------------------------------------------------------------------
# Noise and timesteps are a hash: a function of the integers (seed, step, index). A generator has a state, which must be
# saved, sent to other processes and kept in step. A function has none. So a resumed run repeats the uninterrupted one,
# and image 7 of seed 0 is the same picture in any batch, on any number of processes. All is computed on the device of
# the seeds, so a GPU does not wait for the CPU. (The order of the data, the initial weights and dropout come from
# generators. Each is seeded anew with such integers.)

GAMMA = 0x9E3779B97F4A7C15 - 2**64      # 2^64 / golden ratio, as a signed 64-bit integer


def _mix(z):
    """The finaliser of SplitMix64 (Steele et al. 2014): int64 in, well-mixed int64 out."""
    z = (z ^ (z >> 30 & 2**34 - 1)) * (0xBF58476D1CE4E5B9 - 2**64)      # the masks make the shift of a signed integer
    z = (z ^ (z >> 27 & 2**37 - 1)) * (0x94D049BB133111EB - 2**64)      # logical: zeros come in from the left
    return z ^ (z >> 31 & 2**33 - 1)


def fold(seed, *counters):
    """A new seed from a seed and integers. Each may be an int or a (B,) long tensor."""
    seed = torch.as_tensor(seed)
    for c in counters:
        seed = _mix(seed * GAMMA + c)
    return seed


def uniform(seeds):
    """(B,) seeds -> (B,) float32 in [0, 1)."""
    return (_mix(seeds + GAMMA) >> 40 & 2**24 - 1).float() * 2**-24


def normal(seeds, shape):
    """(B,) seeds -> (B, *shape) float32, standard normal. Row i depends on seeds[i] alone."""
    n = math.prod(shape)
    number = torch.arange(1, (n + 1) // 2 + 1, device=seeds.device)
    bits = _mix(seeds[:, None] + GAMMA * number)                        # (B, n / 2): the outputs of SplitMix64
    high, low = (bits >> 32 & 2**32 - 1).float(), (bits & 2**32 - 1).float()
    radius = ((high + 0.5) * 2**-32).log().mul(-2).sqrt()               # Box-Muller: two numbers per hash
    angle = low * (2 * math.pi * 2**-32)
    z = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return z[:, :n].reshape(len(seeds), *shape)                                             # (B, *shape)


# --- what callers can get wrong --------------------------------------------------------------------------------------

def check_shape(x_t, shape):
    """Raises UserError if x_t (B, ..) does not hold images of `shape`. Without this check a model of 28x28 images takes
    one of 14x56, which has as many patches."""
    if tuple(x_t.shape[1:]) != tuple(shape):
        want, got = ("x".join(map(str, size)) for size in (shape, x_t.shape[1:]))
        raise UserError(f"this model was built for images of {want}, and got {got}: build another, or resize the "
                        f"images")


def check_labels(y, num_classes):
    """Raises UserError if a label of y (B,) is no class. Without this check, label 10 of 10 classes means "no class".
    Only a plain tensor on the CPU is looked at. To look at one on a GPU, the CPU would have to wait for it."""
    if (not torch.compiler.is_compiling() and type(y) is torch.Tensor and y.device.type == "cpu"
            and not torch._C._are_functorch_transforms_active()):
        for wrong in y[(y < -1) | (y >= num_classes)].tolist():
            known = f"classes 0 to {num_classes - 1}, and -1 for none" if num_classes else "no classes: drop the labels"
            raise UserError(f"label {wrong}, but this model has {known}")


def for_each(seeds, cond):
    """What `sample` gets as y=, text=, text_mask= -> a row for each of the seeds (N,); y=4: class 4 for all. Raises
    UserError."""
    rows = {name: torch.as_tensor(c, device=seeds.device) for name, c in cond.items() if c is not None}
    for name, c in rows.items():
        if name == "y" and c.is_floating_point():
            raise UserError(f"y={cond[name]}: a class is a whole number, such as y=4")
        if c.ndim and len(c) != len(seeds):
            raise UserError(f"{name} has {len(c)} rows, for {len(seeds)} samples: give each one")
    return {name: c if c.ndim else c.expand(len(seeds)) for name, c in rows.items()}


def check_sampler(name):
    if name not in ("ddim", "ddpm"):
        raise UserError(f"unknown sampler {name!r}: choose ddim or ddpm")
