"""The diffusion process: noise schedule, double guidance and samplers (Diff-Foley Sec. 3.2, 3.3).

in   any function eps(x, t), or networks and a condition to make one of;
     x (b, 4, 16, w) float32, t (b,) in [0, 999], possibly fractional
out  latents (b, 4, 16, w), sampled in a few calls of eps

    eps = guided_eps(unet, context, null_context, 4.5, classifier, features, 50.0)
    z = dpm_solver(eps, noise, 25)

The equations, and where they are:

    q_sample     x_t = alpha_t z + sigma_t noise,  alpha_t^2 + sigma_t^2 = 1          (Sec. 3.2)
    guided_eps   eps = eps_null + cfg (eps_cond - eps_null)                           (Eq. 9)
                 eps = eps - cg sigma_t grad_x log p(aligned | x, t, features)        (Eq. 10)
    fill_in      eps = (x - alpha_t z) / sigma_t where z is known

The training loss || noise - eps(x_t, t) ||^2 is `ldm.denoising_loss`. All functions here are pure
and know no network and no device. DPM-Solver++ is Lu et al. 2022 (arXiv 2211.01095), DDIM Song et
al. 2021 (arXiv 2010.02502), PLMS Liu et al. 2022 (arXiv 2202.09778).

Differs from the official code: every sampler takes every guidance; S steps of DDIM are S;
coefficients are computed once a run.
"""

from itertools import pairwise

import torch

# --------------------------------------------------------------------------------------------------
# noise schedule


def make_schedule():
    """The 12 buffers of the official checkpoints, float32 (1000,), computed in float64.

    Square roots of beta are evenly spaced, which the official `diffusionmodules/util.py` calls
    "linear"; the posterior's are those of v_posterior = 0.
    """
    # on the CPU also where a network is laid out on the meta device
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64, device="cpu") ** 2
    a = (1 - betas).cumprod(0)
    previous = torch.cat([a.new_ones(1), a[:-1]])
    variance = betas * (1 - previous) / (1 - a)
    buffers = {
        "betas": betas,
        "alphas_cumprod": a,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": a.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - a).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - a).log(),
        "sqrt_recip_alphas_cumprod": a.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / a - 1).sqrt(),
        # only here because the official files hold them; no sampler of ours reads them
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - a),
        "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - a),
    }
    return {name: value.float() for name, value in buffers.items()}


# alpha_t^2 at the 1000 integer times
ALPHAS_CUMPROD = make_schedule()["alphas_cumprod"]
# log alpha_t there; float64, because the solver takes differences of it
LOG_ALPHA = 0.5 * ALPHAS_CUMPROD.double().log()


def log_alpha(t):
    """t (b,) in [0, 999] -> log of the signal scale, float64: linear between integer times."""
    table = LOG_ALPHA.to(t.device)
    t = t.double().clamp(0, 999)
    low = t.floor().long().clamp(max=998)
    return torch.lerp(table[low], table[low + 1], t - low)


def sigma(t):
    """t (b,) in [0, 999] -> noise scale sqrt(1 - alpha_t^2), float64."""
    return (-torch.expm1(2 * log_alpha(t))).sqrt()


def q_sample(z, t, noise):
    """z, noise (b, 4, 16, w), integer t (b,) -> alpha_t z + sigma_t noise, in z's dtype."""
    alpha_t = log_alpha(t).exp().to(z.dtype)[:, None, None, None]  # (b, 1, 1, 1)
    sigma_t = sigma(t).to(z.dtype)[:, None, None, None]
    return alpha_t * z + sigma_t * noise


# --------------------------------------------------------------------------------------------------
# guidance


def guided_eps(
    unet, context, null_context, cfg: float, classifier=None, features=None, cg: float = 0.0
):
    """Double guidance as one function eps(x, t): Sec. 3.3, Eq. 9-10; official `dpm_solver.py` 1340.

    unet(x, t, context) -> eps; context (b, f, d); null_context (1 or b, f, d), or None for the
    conditional branch alone; cfg: classifier-free scale, 1 for the conditional branch alone;
    classifier: has grad_log_prob(x, t, features); features (b, f, 512); cg: scale of its gradient,
    0 for none. The gradient is added after classifier-free guidance, so cfg does not multiply it,
    and it stays when cfg is 1.
    """

    def eps_fn(x, t):
        if cfg == 1 or null_context is None:
            eps = unet(x, t, context).float()
        else:
            # classifier-free guidance (Eq. 9), both branches in one batch
            contexts = torch.cat([null_context.expand_as(context), context])
            both = unet(torch.cat([x, x]), torch.cat([t, t]), contexts)
            eps_null, eps_cond = both.float().chunk(2)
            eps = eps_null + cfg * (eps_cond - eps_null)
        if cg:
            # classifier guidance (Eq. 10): up the gradient of "this sound is aligned"
            sigma_t = sigma(t).to(eps)[:, None, None, None]
            eps = eps - cg * sigma_t * classifier.grad_log_prob(x, t, features)
        return eps

    return eps_fn


def fill_in(eps_fn, z, known):
    """eps(x, t) for a sampler that fills in what is not known of latents z (b, 4, 16, w).

    known: bool, broadcast to z. There eps is what leads back to z, so that x is z noised to each
    step's level, as RePaint puts it there (Lugmayr et al. 2022, Eq. 8), with one noise for all
    steps: then a multistep solver's history fits, too. All samplers end with a little noise on it.
    """

    def eps_of_unknown(x, t):
        alpha_t = log_alpha(t).exp().to(x)[:, None, None, None]
        sigma_t = sigma(t).to(x)[:, None, None, None]
        # x = alpha_t z + sigma_t eps, solved for eps
        return torch.where(known, (x - alpha_t * z) / sigma_t, eps_fn(x, t))

    return eps_of_unknown


# --------------------------------------------------------------------------------------------------
# samplers: sampler(eps_fn, x, steps, callback) -> latents, of noise x (b, 4, 16, w). callback(i, x)
# follows every step. Times are given on the CPU, where no step waits for a device to know them


def dpm_grid(steps):
    """(steps + 1,) float32, 999 to 0: continuous time from 1 to 0.001, evenly, as published."""
    return (torch.linspace(1, 0.001, steps + 1) - 0.001) * 1000


def dpm_times(steps: int):
    """The fractional times at which `dpm_solver` asks for eps: 999, 959.04, ..."""
    return dpm_grid(steps)[:-1]


def dpm_solver(eps_fn, x, steps: int, callback=None):
    """DPM-Solver++(2M), Lu et al. 2022, Algorithm 2: data prediction, `steps` calls of eps_fn.

    The end point is not evaluated: as published, the result still carries its sigma of 0.0292.
    """
    t = dpm_grid(steps)
    alpha = log_alpha(t).exp()
    sig = sigma(t)
    lam = alpha.log() - sig.log()  # half the log signal-to-noise ratio
    previous = None
    for i in range(steps):
        # the clean latent that eps implies
        x0 = (x - sig[i] * eps_fn(x, t[i].expand(len(x)))) / alpha[i]
        h = lam[i + 1] - lam[i]
        if previous is None or (steps < 15 and i == steps - 1):
            # first order: in the first step, and in the last of few
            d = x0
        else:
            # second order: extrapolate from the step before, which was r times as long
            r = (lam[i] - lam[i - 1]) / h
            d = x0 + (x0 - previous) / (2 * r)
        # the exact solution of the linear part, with d held fixed over the step
        x = sig[i + 1] / sig[i] * x - alpha[i + 1] * torch.expm1(-h) * d
        previous = x0
        if callback:
            callback(i, x)
    return x


def ddim_times(steps: int):
    """`steps` integer times, rising: the official 1, 41, ..., 961 where steps divides 1000."""
    return [i * 1000 // steps + 1 for i in range(steps)]


def ddim_step(x, eps, t, t_next):
    """One deterministic DDIM update (Song et al. 2021, Eq. 12 with eta 0) between integer times."""
    a = ALPHAS_CUMPROD[t].item()
    b = ALPHAS_CUMPROD[t_next].item()
    x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
    return b**0.5 * x0 + (1 - b) ** 0.5 * eps


def descending_pairs(steps, times):
    """(t, t_next) of every step; the last one ends at time 0."""
    return pairwise([*reversed(times or ddim_times(steps)), 0])


def ddim(eps_fn, x, steps: int, callback=None, times: list | None = None):
    """Deterministic DDIM, `steps` calls of eps_fn; `times` (rising integers) replaces its own."""
    for i, (t, t_next) in enumerate(descending_pairs(steps, times)):
        eps = eps_fn(x, torch.full((len(x),), float(t)))
        x = ddim_step(x, eps, t, t_next)
        if callback:
            callback(i, x)
    return x


def plms_times(steps: int):
    """The times at which `plms` may ask for eps: DDIM's, and the end.

    The first step looks ahead to the next time, which is the end if there is no second step.
    """
    return [0, *ddim_times(steps)]


def plms(eps_fn, x, steps: int, callback=None, times: list | None = None):
    """Pseudo linear multistep (Liu et al. 2022) at DDIM's times, `steps` + 1 calls of eps_fn."""
    history = []
    for i, (t, t_next) in enumerate(descending_pairs(steps, times)):
        eps = eps_fn(x, torch.full((len(x),), float(t)))
        if i == 0:
            # pseudo improved Euler: the mean of here and one step ahead
            ahead = ddim_step(x, eps, t, t_next)
            mean = (eps + eps_fn(ahead, torch.full((len(x),), float(t_next)))) / 2
        # Adams-Bashforth of order 2, 3 and 4
        elif i == 1:
            mean = (3 * eps - history[-1]) / 2
        elif i == 2:
            mean = (23 * eps - 16 * history[-1] + 5 * history[-2]) / 12
        else:
            mean = (55 * eps - 59 * history[-1] + 37 * history[-2] - 9 * history[-3]) / 24
        history.append(eps)
        x = ddim_step(x, mean, t, t_next)
        if callback:
            callback(i, x)
    return x


SAMPLERS = {"dpm": dpm_solver, "ddim": ddim, "plms": plms}
# the times at which each asks for eps, for a network that is prepared for them (kernels/fast.py)
TIMES = {"dpm": dpm_times, "ddim": ddim_times, "plms": plms_times}
