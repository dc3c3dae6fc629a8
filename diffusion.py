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

import math
from itertools import pairwise

import numpy as np
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
    unet,
    context,
    null_context,
    cfg: float,
    classifier=None,
    features=None,
    cg: float = 0.0,
    open_context=None,
    emphasis: float = 0.0,
):
    """Double guidance as one function eps(x, t): Sec. 3.3, Eq. 9-10; official `dpm_solver.py` 1340.

    unet(x, t, context) -> eps; context (b, f, d); null_context (1 or b, f, d), or None for the
    conditional branch alone; cfg: classifier-free scale, 1 for the conditional branch alone;
    classifier: has grad_log_prob(x, t, features); features (b, f, 512); cg: scale of its gradient,
    0 for none. The gradient is added after classifier-free guidance, so cfg does not multiply it,
    and it stays when cfg is 1.

    Ours: open_context is the context with something left open, such as the material, and emphasis
    the scale at which eps is led away from it, 0 for none.
    """

    def eps_fn(x, t):
        # the conditional branch alone
        if cfg == 1 or null_context is None:
            eps = unet(x, t, context).float()
        else:
            # classifier-free guidance (Eq. 9), both branches in one batch
            contexts = torch.cat([null_context.expand_as(context), context])
            both = unet(torch.cat([x, x]), torch.cat([t, t]), contexts)
            eps_null, eps_cond = both.float().chunk(2)
            eps = eps_null + cfg * (eps_cond - eps_null)
        if emphasis:
            # the same equation once more, for what is left open in one of two contexts
            contexts = torch.cat([open_context, context])
            both = unet(torch.cat([x, x]), torch.cat([t, t]), contexts)
            eps_open, eps_cond = both.float().chunk(2)
            eps = eps + emphasis * (eps_cond - eps_open)
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


def time_at(lam):
    """Half log signal-to-noise ratios (n,) -> the times t (n,) that have them, float32.

    The inverse of `log_snr`, between integer times linear as that nearly is.
    """
    # np.interp wants the places rising
    falling = np.arange(999, -1, -1)
    rising = log_snr(torch.from_numpy(falling)).numpy()
    return torch.from_numpy(np.interp(lam, rising, falling)).float()


def log_snr(t):
    """Times (n,) -> half the log of the signal-to-noise ratio, log(alpha_t / sigma_t), float64."""
    return log_alpha(t) - sigma(t).log()


SCHEDULES = ("uniform", "quadratic", "logsnr", "karras", "ays")
# Align Your Steps (Sabour et al. 2024, arXiv 2404.14507), its list for this noise schedule
AYS = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0]


def time_grid(steps: int, schedule="uniform"):
    """(steps + 1,) float32: the times at which a solver stops, from 999 down to 0.

    uniform: evenly in time, from 1 to 0.001, as published; quadratic: evenly in its square root;
    logsnr: evenly in the log signal-to-noise ratio; karras: evenly in the seventh root of the noise
    (Karras et al. 2022, Eq. 5); ays: Align Your Steps' list, between its entries evenly in the log;
    or a list of rising or falling times, as `search_schedule` gives, of any number of steps.
    """
    # how much of the way is gone at each time
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if schedule == "uniform":
        return (torch.linspace(1, 0.001, steps + 1) - 0.001) * 1000
    # times that are denser where there is little noise
    if schedule == "quadratic":
        return (999 * (1 - share) ** 2).float()
    # the others in terms of the log signal-to-noise ratio, whose ends all of them have
    first, last = log_snr(torch.tensor([999, 0])).tolist()
    if schedule == "logsnr":
        return time_at(first + (last - first) * share)
    if schedule == "karras":
        # noise over signal, which is exp(-lambda), in its seventh root
        low = math.exp(-first / 7)
        high = math.exp(-last / 7)
        return time_at(-7 * (low + (high - low) * share).log())
    # a list: its own times, and those between them
    listed = AYS if schedule == "ays" else schedule
    falling = torch.tensor(sorted(listed)[::-1])
    shares = np.linspace(0, 1, len(falling))
    return time_at(np.interp(share, shares, log_snr(falling)))


def solver_times(steps: int, schedule="uniform"):
    """The times at which the solvers of a `time_grid` ask for eps: all but the last."""
    return time_grid(steps, schedule)[:-1]


class Grid:
    """The times of a solver's steps, and what its equations need of them: all float64 (steps + 1,).

    t, alpha, sigma; lam: half the log signal-to-noise ratio, in which steps are measured.
    """

    def __init__(self, steps: int, schedule):
        self.t = time_grid(steps, schedule)
        self.alpha = log_alpha(self.t).exp()
        self.sigma = sigma(self.t)
        self.lam = log_snr(self.t)

    def eps(self, eps_fn, x, i):
        return eps_fn(x, self.t[i].expand(len(x)))

    def clean(self, eps_fn, x, i):
        """The clean latent that eps implies at time i."""
        eps = self.eps(eps_fn, x, i)
        return (x - self.sigma[i] * eps) / self.alpha[i]

    def ratio(self, i):
        """How many times as long as the step from time i the one before it was."""
        before = self.lam[i] - self.lam[i - 1]
        return before / (self.lam[i + 1] - self.lam[i])

    def advance(self, x, d, i):
        """From time i to i + 1: exactly the linear part, with the clean latent d held fixed."""
        h = self.lam[i + 1] - self.lam[i]
        # what is left of x, and the share of d
        kept = self.sigma[i + 1] / self.sigma[i]
        return kept * x - self.alpha[i + 1] * torch.expm1(-h) * d


def dpm_solver(eps_fn, x, steps: int, callback=None, schedule="uniform"):
    """DPM-Solver++(2M), Lu et al. 2022, Algorithm 2: data prediction, `steps` calls of eps_fn.

    The end point is not evaluated: as published, the result still carries its sigma of 0.0292.
    """
    grid = Grid(steps, schedule)
    previous = None
    for i in range(steps):
        x0 = grid.clean(eps_fn, x, i)
        if previous is None or (steps < 15 and i == steps - 1):
            # first order: in the first step, and in the last of few
            d = x0
        else:
            # second order: extrapolate from the step before, which was r times as long
            r = grid.ratio(i)
            d = x0 + (x0 - previous) / (2 * r)
        x = grid.advance(x, d, i)
        previous = x0
        if callback:
            callback(i, x)
    return x


def unipc(eps_fn, x, steps: int, callback=None, schedule="uniform"):
    """UniPC-2 (Zhao et al. 2023, arXiv 2302.04867, B(h) = e^h - 1): `steps` calls of eps_fn.

    DPM-Solver++(2M) predicts; the clean latent found there then corrects the step that led to it.
    """
    grid = Grid(steps, schedule)
    clean = []
    begun = x  # where the step before began
    for i in range(steps):
        clean.append(grid.clean(eps_fn, x, i))
        if i > 0:
            # corrector: the step before once more, through the clean latent found at its end
            x = grid.advance(begun, corrected(clean, grid, i), i - 1)
        # predictor
        begun = x
        d = clean[i]
        # of first order as in dpm_solver
        if i > 0 and not (steps < 15 and i == steps - 1):
            r = grid.ratio(i)
            d = d + (clean[i] - clean[i - 1]) / (2 * r)
        x = grid.advance(x, d, i)
        if callback:
            callback(i, x)
    return x


def corrected(clean, grid, i):
    """UniPC's mean clean latent over the step that led to time i (its Eq. 9, order 2)."""
    change = clean[i] - clean[i - 1]
    if i == 1:
        return clean[0] + change / 2
    # the weights for which the step is exact where clean latents are quadratic in lambda
    h = grid.lam[i] - grid.lam[i - 1]
    # B(h), and the two right-hand sides
    b = torch.expm1(-h)
    b1 = -1 / h - 1 / b
    b2 = -2 * b1 / h - 1 / b
    r = -grid.ratio(i - 1)
    early = (b1 - b2) / (1 - r)
    slope = (clean[i - 2] - clean[i - 1]) / r
    return clean[i - 1] + early * slope + (b1 - early) * change


def deis(eps_fn, x, steps: int, callback=None, schedule="uniform", order: int = 3):
    """DEIS (Zhang and Chen 2023, arXiv 2204.13902, rho-AB): `steps` calls of eps_fn.

    With y = x / alpha and rho = sigma / alpha the equation is dy = eps d rho; eps is taken for the
    polynomial in rho through its last `order` values. With one of them this is DDIM.
    """
    grid = Grid(steps, schedule)
    rho = (grid.sigma / grid.alpha).tolist()
    history = []
    for i in range(steps):
        # the latest first
        history = [(rho[i], grid.eps(eps_fn, x, i)), *history][:order]
        # the integral of eps over the step
        change = torch.zeros_like(x)
        for k, (own, eps) in enumerate(history):
            # of Lagrange's polynomial that is 1 here and 0 at the others
            others = [other for n, (other, _) in enumerate(history) if n != k]
            lagrange = np.poly1d(others, True) / np.prod(own - np.array(others))
            primitive = lagrange.integ()
            weight = primitive(rho[i + 1]) - primitive(rho[i])
            change = change + float(weight) * eps
        # y and back
        x = grid.alpha[i + 1] * (x / grid.alpha[i] + change)
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


SAMPLERS = {"dpm": dpm_solver, "unipc": unipc, "deis": deis, "ddim": ddim, "plms": plms}


def search_schedule(eps_fn, x, steps: int, solver=dpm_solver, exact=200, rounds=4):
    """-> steps + 1 times (a `schedule`) that bring the solver nearest to the same ODE's end.

    eps_fn, x: of one's own networks, e.g. `guided_eps` on 8 windows; exact: steps of the solver on
    an even log-SNR grid whose end counts as the ODE's. One inner time after the other is moved
    towards its neighbors, in log-SNR, by a share that shrinks each round, while that helps: about
    2 * steps * rounds runs of the solver.
    """
    target = solver(eps_fn, x, exact, schedule="logsnr")
    # what came out best for mixtures of Gaussians is where it begins
    best = log_snr(time_grid(steps, "quadratic")).tolist()

    def distance(lam):
        # how far from the exact end these times lead
        drawn = solver(eps_fn, x, steps, schedule=time_at(lam).tolist())
        return float((drawn - target).square().mean())

    least = distance(best)
    for r in range(rounds):
        for i in range(1, steps):
            for neighbor in (i - 1, i + 1):
                # a try
                moved = list(best)
                moved[i] += 0.5**r / 2 * (best[neighbor] - best[i])
                # and whether it helps
                found = distance(moved)
                if found < least:
                    best = moved
                    least = found
    return time_at(best).tolist()


# the times at which each asks for eps, for a network that is prepared for them (kernels/fast.py)
TIMES = {
    "dpm": solver_times,
    "unipc": solver_times,
    "deis": solver_times,
    "ddim": ddim_times,
    "plms": plms_times,
}
