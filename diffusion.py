"""The diffusion itself: noise schedule, double guidance and samplers (Diff-Foley Sec. 3.2, 3.3).

in   any eps(x, t), or networks and a condition to make one of; x (b, 4, 16, w) float32, t (b,) in [0, 999], possibly fractional
out  latents (b, 4, 16, w), drawn in a few calls of eps

    eps = guided_eps(unet, context, null_context, 4.5, classifier, features, 50.0)
    z = dpm_solver(eps, noise, 25)

Pure functions, which know no network and no device. DPM-Solver++ is Lu et al. 2022, DDIM Song et al. 2021, PLMS Liu et al. 2022.
Differs from the official code: every sampler takes every guidance; S steps of DDIM are S; coefficients are computed once a run.
"""

import torch

# ---------------------------------------------------------------------------------------------------------------------
# noise schedule (official `diffusionmodules/util.py`: square roots evenly spaced, called "linear" there)


def make_schedule():
    """The 12 buffers of the official checkpoints, float32 (1000,), computed in float64; v_posterior = 0."""
    betas = (
        torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64, device="cpu") ** 2
    )  # also where a network is laid out as meta
    a = (1 - betas).cumprod(0)
    previous = torch.cat([a.new_ones(1), a[:-1]])
    variance = betas * (1 - previous) / (1 - a)
    s = {
        "betas": betas,
        "alphas_cumprod": a,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": a.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - a).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - a).log(),
        "sqrt_recip_alphas_cumprod": a.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / a - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - a),
        "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - a),
    }
    return {k: v.float() for k, v in s.items()}


ALPHAS_CUMPROD = make_schedule()["alphas_cumprod"]


# log of the signal scale at the 1000 integer times, float64
LOG_ALPHA = 0.5 * ALPHAS_CUMPROD.double().log()


def log_alpha(t):
    """log of the signal scale at (fractional) diffusion time t in [0, 999], float64: linear between integer times."""
    table = LOG_ALPHA.to(t.device)
    t = t.double().clamp(0, 999)
    low = t.floor().long().clamp(max=998)
    return torch.lerp(table[low], table[low + 1], t - low)


def sigma(t):
    """Noise scale at (fractional) diffusion time t: sqrt(1 - alpha^2)."""
    return (-torch.expm1(2 * log_alpha(t))).sqrt()


def q_sample(z, t, noise):
    """z (b, 4, 16, w), integer t (b,) -> alpha_t z + sigma_t noise."""
    alpha_t = log_alpha(t).exp().to(z.dtype)[:, None, None, None]
    sigma_t = sigma(t).to(z.dtype)[:, None, None, None]
    return alpha_t * z + sigma_t * noise


# ---------------------------------------------------------------------------------------------------------------------
# guidance


def guided_eps(unet, context, null_context, cfg, classifier=None, features=None, cg=0.0):
    """Double guidance (Sec. 3.3, Eq. 9-10; official `dpm_solver.py` 1340) as one function eps(x, t).

    unet(x, t, context); context (b, f, d); null_context (1 or b, f, d) or None; cfg: classifier-free scale, 1 for the conditional
    branch alone; classifier with grad_log_prob, features (b, f, 512) and cg: the gradient's scale, 0 for none. The gradient is added
    after classifier-free guidance, so cfg does not multiply it, and it stays when cfg is 1.
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
            # classifier guidance (Eq. 10): towards what sounds aligned
            sigma_t = sigma(t).to(eps)[:, None, None, None]
            eps = eps - cg * sigma_t * classifier.grad_log_prob(x, t, features)
        return eps

    return eps_fn


# ---------------------------------------------------------------------------------------------------------------------
# samplers: pure functions of eps(x, t). They hand on times as tensors of the CPU, where they are known without waiting for a device


def dpm_times(steps):
    """The times at which `dpm_solver` asks for eps: 999, 959.04, ...; float32 and fractional, as published."""
    return _dpm_grid(steps)[:-1]


def _dpm_grid(steps):
    """Those and the end, (steps + 1,): uniform in continuous time from 1 to 0.001."""
    return (torch.linspace(1, 0.001, steps + 1) - 0.001) * 1000


def dpm_solver(eps_fn, x, steps, callback=None):
    """DPM-Solver++(2M), Lu et al. 2022, Algorithm 2: data prediction, uniform in time, `steps` calls of eps_fn.

    Second order but in the first step, and in the last of fewer than 15. The end point is not evaluated, and the result still carries
    the published sigma of 0.0292 there.
    """
    t = _dpm_grid(steps)
    alpha, sig = log_alpha(t).exp(), sigma(t)
    lam = alpha.log() - sig.log()  # half the log signal-to-noise ratio
    previous = None
    for i in range(steps):
        # the clean latent that eps implies
        x0 = (x - sig[i] * eps_fn(x, t[i].expand(len(x)))) / alpha[i]
        h = lam[i + 1] - lam[i]
        if previous is None or (steps < 15 and i == steps - 1):
            d = x0
        else:
            # extrapolated from the step before, which was r times as long
            r = (lam[i] - lam[i - 1]) / h
            d = x0 + (x0 - previous) / (2 * r)
        x = sig[i + 1] / sig[i] * x - alpha[i + 1] * torch.expm1(-h) * d
        previous = x0
        if callback:
            callback(i, x)
    return x


def ddim_times(steps):
    """`steps` integer times, rising; the official 1, 41, ..., 961 where steps divides 1000 (elsewhere it takes a few more)."""
    return [i * 1000 // steps + 1 for i in range(steps)]


def ddim_step(x, eps, t, t_next):
    """One deterministic DDIM update (Song et al. 2021, eq. 12 with eta 0); t_next None: the end, alphas_cumprod[0]."""
    a, b = ALPHAS_CUMPROD[t].item(), ALPHAS_CUMPROD[t_next or 0].item()
    clean = (x - (1 - a) ** 0.5 * eps) / a**0.5
    return b**0.5 * clean + (1 - b) ** 0.5 * eps


def ddim(eps_fn, x, steps, callback=None, times=None):
    """Deterministic DDIM, `steps` calls of eps_fn; `times` (rising integers) replaces the default ones."""
    times = list(reversed(times or ddim_times(steps)))
    for i, (t, t_next) in enumerate(zip(times, times[1:] + [None])):
        eps = eps_fn(x, torch.full((len(x),), float(t)))
        x = ddim_step(x, eps, t, t_next)
        if callback:
            callback(i, x)
    return x


def plms_times(steps):
    """The times at which `plms` asks for eps: DDIM's; a single step also looks ahead, to the end."""
    return ddim_times(steps) if steps > 1 else [0, *ddim_times(steps)]


def plms(eps_fn, x, steps, callback=None, times=None):
    """Pseudo linear multistep (Liu et al. 2022): DDIM's times, steps + 1 calls of eps_fn (the first step takes two: pseudo
    improved Euler), then Adams-Bashforth of order 2, 3 and 4."""
    times = list(reversed(times or ddim_times(steps)))
    history = []
    for i, (t, t_next) in enumerate(zip(times, times[1:] + [None])):
        eps = eps_fn(x, torch.full((len(x),), float(t)))
        if not history:
            ahead = ddim_step(x, eps, t, t_next)
            mean = (eps + eps_fn(ahead, torch.full((len(x),), float(t_next or 0)))) / 2
        elif len(history) == 1:
            mean = (3 * eps - history[-1]) / 2
        elif len(history) == 2:
            mean = (23 * eps - 16 * history[-1] + 5 * history[-2]) / 12
        else:
            mean = (55 * eps - 59 * history[-1] + 37 * history[-2] - 9 * history[-3]) / 24
        history = (history + [eps])[-3:]
        x = ddim_step(x, mean, t, t_next)
        if callback:
            callback(i, x)
    return x


SAMPLERS = {"dpm": dpm_solver, "ddim": ddim, "plms": plms}
TIMES = {"dpm": dpm_times, "ddim": ddim_times, "plms": plms_times}  # at which each asks for eps
