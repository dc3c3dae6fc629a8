"""The diffusion itself: noise schedule, double guidance and samplers. Pure functions, which know no network (Diff-Foley Sec. 3.2, 3.3).

in   any eps(x, t), or networks and a condition to make one of; x (b, 4, 16, w) float32, t (b,) in [0, 999] and possibly fractional
out  latents (b, 4, 16, w), drawn in a few calls of eps

    eps = guided_eps(unet, context, null_context, 4.5, classifier, features, 50.0, times=TIMES["dpm"](25))
    z = dpm_solver(eps, noise, 25)

DPM-Solver++ is Lu et al. 2022, DDIM Song et al. 2021, PLMS Liu et al. 2022. Differs from the official code: every sampler takes every
guidance; S steps of DDIM are S; coefficients are computed once a run.
"""

import functools
import warnings

import torch

from kernels.solver import multistep


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
    s = dict(
        betas=betas,
        alphas_cumprod=a,
        alphas_cumprod_prev=previous,
        sqrt_alphas_cumprod=a.sqrt(),
        sqrt_one_minus_alphas_cumprod=(1 - a).sqrt(),
        log_one_minus_alphas_cumprod=(1 - a).log(),
        sqrt_recip_alphas_cumprod=a.rsqrt(),
        sqrt_recipm1_alphas_cumprod=(1 / a - 1).sqrt(),
        posterior_variance=variance,
        posterior_log_variance_clipped=variance.clamp(min=1e-20).log(),
        posterior_mean_coef1=betas * previous.sqrt() / (1 - a),
        posterior_mean_coef2=(1 - previous) * (1 - betas).sqrt() / (1 - a),
    )
    return {k: v.float() for k, v in s.items()}


ALPHAS_CUMPROD = make_schedule()["alphas_cumprod"]


@functools.cache  # on a GPU made once: a CUDA graph cannot hold a copy from the CPU
def log_alpha_knots(device):
    return 0.5 * ALPHAS_CUMPROD.double().log().to(device)


def log_alpha(t):
    """log of the signal scale at (fractional) diffusion time t in [0, 999], float64: linear between the 1000 knots."""
    table = log_alpha_knots(t.device)
    t = t.double().clamp(0, 999)
    low = t.floor().long().clamp(max=998)
    return torch.lerp(table[low], table[low + 1], t - low)


def sigma(t):
    """Noise scale at (fractional) diffusion time t: sqrt(1 - alpha^2)."""
    return (-torch.expm1(2 * log_alpha(t))).sqrt()


def q_sample(z, t, noise):
    """z (b, 4, 16, w), integer t (b,) -> alpha_t z + sigma_t noise."""
    a = log_alpha(t).exp().to(z.dtype)[:, None, None, None]
    return a * z + sigma(t).to(z.dtype)[:, None, None, None] * noise


# ---------------------------------------------------------------------------------------------------------------------
# guidance and samplers: pure functions of eps(x, t), x (b, 4, 16, w) float32, t (b,)


def beside(function, x, t):
    """Start function(x, t), on a GPU on a stream of its own; -> a call that waits for the result."""
    if not x.is_cuda:
        result = function(x, t)
        return lambda: result
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = function(x, t)

    def join():
        main.wait_stream(side)
        result.record_stream(main)
        return result

    return join


class Replayed:
    """function(x, t), recorded once as a CUDA graph and replayed for every further call: hundreds of launches become one. Where it
    cannot be recorded, plain calls, said once."""

    def __init__(self, function):
        self.function, self.graph = function, None
        self.times = getattr(function, "times", None)  # all that it may be asked for, if it says so

    def record(self, x, t):
        self.x, self.t = x.clone(), t.clone()
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(
                side
            ):  # libraries choose their algorithms before, not while recording
                for _ in range(2):
                    self.function(self.x, self.t)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = self.function(self.x, self.t)
        except RuntimeError as e:
            warnings.warn(
                f"sampling without a CUDA graph ({str(e).splitlines()[0][:120]})", stacklevel=3
            )
            self.graph = False

    def __call__(self, x, t):
        if self.graph is None:
            self.record(x, t)
        if not self.graph:
            return self.function(x, t)
        self.x.copy_(x)
        self.t.copy_(t)
        self.graph.replay()
        return self.out.clone()  # PLMS keeps some


def guided_eps(
    unet,
    context,
    null_context,
    cfg,
    classifier=None,
    features=None,
    cg=0.0,
    project=True,
    times=None,
):
    """Double guidance (Sec. 3.3, Eq. 9-10; official `dpm_solver.py` 1340) as one function eps(x, t).

    unet(x, t, context); context (b, f, d); null_context (1 or b, f, d) or None; cfg: classifier-free scale, 1 for the conditional
    branch alone; classifier with grad_log_prob, features (b, f, 512) and cg: the gradient's scale, 0 for none. The gradient is added
    after classifier-free guidance, so cfg does not multiply it, and it stays when cfg is 1. times (s,): all that the sampler will ask
    for (`TIMES`), which spares every step its time embeddings.
    """
    both = cfg != 1 and null_context is not None
    if both:
        context = torch.cat(
            [null_context.expand_as(context), context]
        )  # (2b, f, d): unconditional first
    if hasattr(unet, "prepare"):  # else any function of (x, t, context)
        context = unet.prepare(context, times)
    classifier = classifier if cg else None
    if hasattr(classifier, "prepare"):
        features = classifier.prepare(features, project, times)

    def gradient_of(x, t):
        return classifier.grad_log_prob(x, t, features, project)

    def eps_fn(x, t):
        gradient = (
            beside(gradient_of, x, t) if classifier is not None else None
        )  # it needs x alone, as the U-Net does
        if both:
            without, given = unet(torch.cat([x, x]), torch.cat([t, t]), context).float().chunk(2)
            eps = without + cfg * (given - without)
        else:
            eps = unet(x, t, context).float()
        if gradient is not None:
            eps = eps - cg * sigma(t).float()[:, None, None, None] * gradient()
        return eps

    if times is not None and isinstance(context, dict):  # prepared for these alone
        eps_fn.times = times
    return eps_fn


def check_times(eps_fn, times):
    """Before the first step of a sampler: is eps_fn prepared for all its times? On the CPU, where they come from, so that no step on
    a GPU waits for the answer."""
    prepared = getattr(eps_fn, "times", None)
    if prepared is None:
        return
    missing = sorted(set(torch.as_tensor(times).float().tolist()) - set(prepared.float().tolist()))
    if missing:
        raise ValueError(
            f"{len(missing)} of the sampler's {len(times)} times, the first {missing[0]:g}, are not among the {len(prepared)} "
            "that eps was prepared for; give guided_eps the times of this sampler and its steps, or none"
        )


def dpm_table(steps):
    """-> times (steps,) that the network is told: 999, 959.04, ..., and rows (steps, 5) of `kernels.solver`; float32, computed in
    float64. Uniform in continuous time, which is float32 as published; second order but in the first step, and in the last of fewer than 15."""
    u = torch.linspace(1.0, 0.001, steps + 1)
    times = (u - 0.001) * 1000
    log_a = log_alpha(times)
    s, lam = sigma(times), log_a - sigma(times).log()
    h = lam.diff()
    k = torch.zeros(steps, dtype=torch.float64)
    k[1:] = h[1:] / (2 * h[:-1])
    if steps < 15:
        k[-1] = 0
    return times[:-1], torch.stack(
        [s[:-1], (-log_a[:-1]).exp(), k, s[1:] / s[:-1], log_a[1:].exp() * torch.expm1(-h)], 1
    ).float()


def dpm_solver(eps_fn, x, steps, callback=None):
    """DPM-Solver++(2M), data prediction, uniform in time (Lu et al. 2022, Algorithm 2): `steps` calls of eps_fn.
    The end point, time 0.001, is not evaluated, and the result still carries the published sigma of 0.0292 there."""
    times, rows = dpm_table(steps)
    check_times(eps_fn, times)
    times, rows = times.to(x.device), rows.to(x.device)
    previous = torch.zeros_like(x)  # the first step gives it no weight
    for i in range(steps):
        x, previous = multistep(x, eps_fn(x, times[i].expand(len(x))), previous, rows[i])
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
    check_times(eps_fn, times)
    for i, (t, t_next) in enumerate(zip(times, times[1:] + [None])):
        x = ddim_step(x, eps_fn(x, torch.full((len(x),), float(t), device=x.device)), t, t_next)
        if callback:
            callback(i, x)
    return x


def plms(eps_fn, x, steps, callback=None, times=None):
    """Pseudo linear multistep (Liu et al. 2022): DDIM's times, steps + 1 calls of eps_fn (the first step takes two: pseudo
    improved Euler), then Adams-Bashforth of order 2, 3 and 4."""
    times = list(reversed(times or ddim_times(steps)))
    check_times(
        eps_fn, times if len(times) > 1 else [*times, 0]
    )  # a single step looks ahead to the end
    history = []
    for i, (t, t_next) in enumerate(zip(times, times[1:] + [None])):
        eps = eps_fn(x, torch.full((len(x),), float(t), device=x.device))
        if not history:
            ahead = ddim_step(x, eps, t, t_next)
            mean = (
                eps + eps_fn(ahead, torch.full((len(x),), float(t_next or 0), device=x.device))
            ) / 2
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
TIMES = {
    "dpm": lambda steps: dpm_table(steps)[0],
    "ddim": lambda steps: torch.tensor(ddim_times(steps), dtype=torch.float32),
    "plms": lambda steps: torch.tensor([0, *ddim_times(steps)], dtype=torch.float32),
}  # all that each of them asks eps_fn for
