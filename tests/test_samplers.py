"""Samplers and guidance against the official code's recorded runs on two analytic networks, and
against formulas by hand."""

import copy

import pytest
import torch
from golden import rule

import diffusion
import ldm
from align import Alignment, AlignmentConfig
from kernels import fast

GOLDEN = rule.recorded("analytic")
SCHEDULE = rule.recorded("schedule")
OFFICIAL_30 = list(range(1, 1000, 33))  # "30 steps" of the official DDIM and PLMS are 31


def gather(tokens):
    """(b, 32, d) -> (b, 4, 16, 64): each latent column reads the token of its own time."""
    b, n = tokens.shape[:2]
    return tokens[:, :, :64].reshape(b, n, 4, 16).repeat_interleave(2, dim=1).permute(0, 2, 3, 1)


def eps_a(x, t, context):
    return torch.tanh(0.5 * x + 0.25 * gather(context) + t[:, None, None, None] / 1000)


def eps_b(x, t, context):
    return ((t[:, None, None, None] + 1) / 1000).sqrt() * x - 0.3 * torch.tanh(x + gather(context))


class Judge:
    """The analytic classifier, with the interface of Alignment that guidance uses."""

    def logit(self, x, t, features):
        return (
            (torch.tanh(x) * gather(features)).sum((1, 2, 3))[:, None] / 64
            + t[:, None] / 1000
            - 0.5
        )

    def grad_log_prob(self, x, t, features):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(
            torch.nn.functional.logsigmoid(self.logit(x, t, features)).sum(), x
        )[0]


@pytest.fixture(scope="module")
def inputs():
    return (
        rule.normal("in.sample.x_T", 2, 4, 16, 64),
        rule.normal("in.sample.cond", 2, 32, 768),
        rule.normal("in.sample.feat", 2, 32, 512),
    )


def recorder(eps_fn):
    """eps_fn that notes the times it was called with and the first sample it saw."""
    calls = []

    def recording(x, t):
        calls.append((t[0].item(), x[0].clone()))
        return eps_fn(x, t)

    return recording, calls


def run(sampler, steps, inputs, cfg=4.5, cg=0.0, network=eps_a, **options):
    x, context, features = inputs
    eps_fn, calls = recorder(
        diffusion.guided_eps(
            network, context, torch.zeros_like(context), cfg, Judge(), features, cg
        )
    )
    return diffusion.SAMPLERS[sampler](eps_fn, x, steps, **options), calls


def test_analytic_networks_are_the_recorded_ones(inputs):
    x, context, features = inputs
    t = torch.full((2,), 500.0)
    rule.close("eps_a", eps_a(x, t, context), GOLDEN["analytic_eps_at_x_T_t500"], 1e-6)
    rule.close("eps_b", eps_b(x, t, context), GOLDEN["analytic_eps_b_at_x_T_t500"], 1e-6)
    rule.close(
        "p", Judge().logit(x, t, features).sigmoid(), GOLDEN["analytic_prob_at_x_T_t500"], 1e-6
    )


@pytest.mark.parametrize(
    "network, sampler, steps, calls, cfg, cg, name",
    [
        (eps_a, "dpm", 5, 5, 4.5, 0, "dpm5.cfg4.5"),
        # the last step count whose final step is of first order
        (eps_a, "dpm", 14, 14, 4.5, 0, "dpm14.cfg4.5"),
        (eps_a, "dpm", 15, 15, 4.5, 0, "dpm15.cfg4.5"),
        (eps_a, "dpm", 25, 25, 4.5, 0, "dpm25.cfg4.5"),
        (eps_a, "dpm", 25, 25, 1.0, 0, "dpm25.cfg1"),
        (eps_a, "dpm", 5, 5, 4.5, 50, "dpm5.cfg4.5.cg50"),
        (eps_a, "dpm", 25, 25, 4.5, 50, "dpm25.cfg4.5.cg50"),
        (eps_a, "ddim", 25, 25, 4.5, 0, "ddim25.cfg4.5"),
        (eps_a, "ddim", 50, 50, 4.5, 0, "ddim50.cfg4.5"),
        (eps_a, "ddim", 25, 25, 4.5, 50, "ddim25.cfg4.5.cg50"),
        (eps_a, "ddim", 50, 50, 4.5, 50, "ddim50.cfg4.5.cg50"),
        (eps_a, "ddim", 25, 25, 1.0, 50, "ddim25.cfg1.cg50"),
        (eps_a, "ddim", 30, 31, 4.5, 0, "ddim30.cfg4.5"),
        (eps_a, "ddim", 30, 31, 4.5, 50, "ddim30.cfg4.5.cg50"),
        (eps_a, "plms", 25, 26, 4.5, 0, "plms25.cfg4.5"),
        (eps_a, "plms", 50, 51, 4.5, 0, "plms50.cfg4.5"),
        (eps_a, "plms", 30, 32, 4.5, 0, "plms30.cfg4.5"),
        (eps_b, "dpm", 25, 25, 4.5, 0, "b.DPM_Solver.25.cfg4.5"),
        (eps_b, "dpm", 25, 25, 4.5, 50, "b.DPM_Solver.25.cfg4.5.cg50"),
        (eps_b, "ddim", 25, 25, 4.5, 0, "b.DDIM.25.cfg4.5"),
        (eps_b, "ddim", 25, 25, 4.5, 50, "b.DDIM.25.cfg4.5.cg50"),
        (eps_b, "plms", 25, 26, 4.5, 0, "b.PLMS.25.cfg4.5"),
    ],
    ids=lambda v: v if isinstance(v, str) and "." in v else "",
)
def test_sampler_equals_the_official_one(inputs, network, sampler, steps, calls, cfg, cg, name):
    options = {"times": OFFICIAL_30} if steps == 30 else {}
    x, seen = run(sampler, steps, inputs, cfg, cg, network, **options)
    assert len(seen) == calls
    rule.close(name, x, GOLDEN[name])
    if f"{name}.x_at_model_calls_b0" in GOLDEN:
        rule.close(
            f"{name} on the way",
            torch.stack([x for _, x in seen]),
            GOLDEN[f"{name}.x_at_model_calls_b0"],
        )


def test_classifier_guidance_stays_at_cfg_1(inputs):
    """The official DPM-Solver drops the classifier there (its cg 0 and cg 50 runs are equal)."""
    assert torch.equal(GOLDEN["dpm25.cfg1"], GOLDEN["dpm25.cfg1.cg50"])
    x, _ = run("dpm", 25, inputs, cfg=1.0, cg=50.0)
    assert rule.relative(x, GOLDEN["dpm25.cfg1"]) > 1e-3


@pytest.mark.parametrize("steps", [5, 25, 50])
def test_dpm_schedule(steps):
    eps_fn, calls = recorder(lambda x, t: torch.zeros_like(x))
    diffusion.dpm_solver(eps_fn, torch.zeros(1, 4, 16, 64), steps)
    times = SCHEDULE[f"dpm.model_input_time_{steps}"]
    # fractional times enter the time embedding; processors round linspace differently, by a unit in
    # the last place of the first, 999
    asked = torch.tensor([t for t, _ in calls])
    torch.testing.assert_close(asked, times[:-1], rtol=0, atol=999 * torch.finfo(torch.float32).eps)
    log_a, s = diffusion.log_alpha(times), diffusion.sigma(times)
    rule.close(f"dpm.log_alpha_{steps}", log_a, SCHEDULE[f"dpm.log_alpha_{steps}"], 1e-5)
    rule.close(f"dpm.sigma_{steps}", s, SCHEDULE[f"dpm.sigma_{steps}"], 1e-5)
    rule.close(f"dpm.lambda_{steps}", log_a - s.log(), SCHEDULE[f"dpm.lambda_{steps}"], 1e-5)


@pytest.mark.parametrize("steps", [25, 50])
def test_ddim_times(steps):
    times = torch.tensor(diffusion.ddim_times(steps))
    assert torch.equal(times, SCHEDULE[f"ddim.timesteps_{steps}"])
    assert torch.equal(ldm.ALPHAS_CUMPROD[times], SCHEDULE[f"ddim.alphas_{steps}"])


def test_recorded_31_times_are_what_we_pass():
    assert SCHEDULE["ddim.timesteps_30"].tolist() == OFFICIAL_30


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30, 333, 999])
@pytest.mark.parametrize("sampler, extra", [("dpm", 0), ("ddim", 0), ("plms", 1)])
def test_s_steps_are_s_network_calls(sampler, extra, steps):
    eps_fn, calls = recorder(lambda x, t: torch.zeros_like(x))
    reported = []
    x = diffusion.SAMPLERS[sampler](
        eps_fn, torch.ones(1, 1, 1, 1), steps, callback=lambda i, x: reported.append(i)
    )
    assert len(calls) == steps + extra and reported == list(range(steps)) and x.isfinite().all()
    assert all(0 <= t <= 999 for t, _ in calls)


def test_guided_eps_by_hand(inputs):
    """eps_u + w (eps_c - eps_u) - s sigma grad log p, at a fractional time, with its own null
    context."""
    x, context, features = inputs
    t, w, s = torch.tensor([321.5, 321.5]), 3.0, 20.0
    null = rule.normal("null", 1, 32, 768)
    without, given = eps_a(x, t, null.expand_as(context)), eps_a(x, t, context)
    gradient = Judge().grad_log_prob(x, t, features)
    expected = (
        without
        + w * (given - without)
        - s * diffusion.sigma(t).float()[:, None, None, None] * gradient
    )
    got = diffusion.guided_eps(eps_a, context, null, w, Judge(), features, s)(x, t)
    rule.close("guided_eps", got, expected, 1e-6)
    # the sign raises log p: a step against eps is a step up
    assert (
        Judge().logit(x - 0.1 * (got - without - w * (given - without)), t, features)
        > Judge().logit(x, t, features)
    ).all()
    rule.close(
        "guided_eps, cfg 1",
        diffusion.guided_eps(eps_a, context, null, 1.0, Judge(), features, s)(x, t),
        given - s * diffusion.sigma(t).float()[:, None, None, None] * gradient,
        1e-6,
    )
    opened = rule.normal("opened", 2, 32, 768)
    rule.close(
        "guided_eps, with something left open",
        diffusion.guided_eps(eps_a, context, null, w, Judge(), features, s, opened, 2.0)(x, t),
        expected + 2 * (given - eps_a(x, t, opened)),
        1e-6,
    )
    rule.close(
        "guided_eps, no null context",
        diffusion.guided_eps(eps_a, context, None, w)(x, t),
        given,
        1e-6,
    )


def test_conditional_branch_alone_is_one_network_sample_a_clip(inputs):
    x, context, _ = inputs
    sizes = []

    def network(x, t, context):
        sizes.append(len(x))
        return eps_a(x, t, context)

    t = torch.full((2,), 10.0)
    diffusion.guided_eps(network, context, torch.zeros_like(context), 1.0)(x, t)
    diffusion.guided_eps(network, context, torch.zeros_like(context), 4.5)(x, t)
    assert sizes == [2, 4]


@pytest.mark.parametrize("sampler", list(diffusion.SAMPLERS))
def test_a_sample_does_not_depend_on_its_batch(inputs, sampler):
    x, context, features = inputs
    together, _ = run(sampler, 10, inputs, cg=50.0)
    for i in range(2):
        alone, _ = run(
            sampler, 10, (x[i : i + 1], context[i : i + 1], features[i : i + 1]), cg=50.0
        )
        rule.close(f"{sampler}, sample {i} alone", alone, together[i : i + 1], 1e-6)


@pytest.mark.parametrize("sampler", list(diffusion.SAMPLERS))
def test_samplers_leave_their_input_alone(inputs, sampler):
    before = inputs[0].clone()
    run(sampler, 3, inputs, cg=50.0)
    assert torch.equal(inputs[0], before)


@pytest.mark.parametrize("sampler", list(diffusion.SAMPLERS))
def test_what_is_known_stays_and_the_rest_is_drawn_to_fit(inputs, sampler):
    x, _, _ = inputs
    z = rule.normal("in.known", 2, 4, 16, 64)
    known = torch.arange(64) < 40

    def from_neighbors(x, t):
        # every column wants to be what its left neighbor is
        return torch.tanh(x - x.roll(1, 3))

    drawn = diffusion.SAMPLERS[sampler](diffusion.fill_in(from_neighbors, z, known), x, 10)
    # known latents come back, with no more noise on them than every sampler leaves
    begin = torch.tensor([float(max(diffusion.TIMES[sampler](10)))])
    noise = (x - diffusion.log_alpha(begin).exp() * z) / diffusion.sigma(begin)
    end = torch.zeros(1)
    kept = diffusion.log_alpha(end).exp() * z + diffusion.sigma(end) * noise
    assert torch.allclose(drawn[..., :40], kept[..., :40].float(), atol=2e-4)
    # and the first column that is not known depends on the last one that is
    other = torch.where(torch.arange(64) == 39, z + 1, z)
    again = diffusion.SAMPLERS[sampler](diffusion.fill_in(from_neighbors, other, known), x, 10)
    assert (again - drawn)[..., 40].abs().mean() > 0.01
    assert torch.equal(again[..., :39], drawn[..., :39])


def test_log_alpha_at_the_knots():
    t = torch.arange(1000)
    rule.close("alpha^2", (2 * diffusion.log_alpha(t)).exp(), SCHEDULE["alphas_cumprod"], 1e-6)
    half = diffusion.log_alpha(torch.tensor([10.5]))
    assert torch.allclose(half, diffusion.log_alpha(torch.tensor([10, 11])).mean())


# --------------------------------------------------------------------------------------------------
# networks that are asked for what they cannot give

SMALL = ldm.UNetConfig(
    width=8,
    multipliers=(1, 2),
    blocks=1,
    attention=(2,),
    heads=2,
    context_dim=8,
    groups=4,
    aligned=2,
)


@pytest.fixture(scope="module")
def small():
    """U-Net, x, t and a condition of 128 frames, two for each of the 64 latent columns."""
    unet = rule.fill(ldm.UNet(SMALL), "model.diffusion_model.").requires_grad_(False)
    return (
        unet,
        rule.normal("x", 2, 4, 16, 64),
        torch.tensor([500.0, 500.0]),
        rule.normal("c", 2, 128, 8),
    )


def test_a_time_that_was_not_prepared_is_no_other_time(small):
    unet, x, t, context = small
    fused = fast.optimise(copy.deepcopy(unet))
    known = fused.prepare(context, torch.tensor([999.0, 500.0, 1.0]))
    rule.close("a prepared time", fused(x, t, known), unet(x, t, context), 1e-5)
    for wrong in (torch.tensor([250.0, 250.0]), torch.tensor([500.0, 250.0])):
        with pytest.raises(ValueError, match="time 250: not among the 3 that"):
            fused(x, wrong, known)


@pytest.mark.parametrize("sampler", list(diffusion.SAMPLERS))
def test_an_eps_asked_for_a_time_it_was_not_prepared_for_raises(small, sampler):
    """On the CPU, where the samplers' times are: on a GPU no step waits to be looked at."""
    unet, x, _, context = small
    fused = fast.optimise(copy.deepcopy(unet))
    solve = diffusion.SAMPLERS[sampler]
    for steps in (1, 3):
        eps = fast.guided(fused, context, None, 1.0, times=diffusion.TIMES[sampler](steps))
        plain = solve(diffusion.guided_eps(unet, context, None, 1.0), x, steps)
        rule.close(f"{sampler}, {steps} steps", solve(eps, x, steps), plain, 1e-5)
        with pytest.raises(ValueError, match="not among the .* that this condition was prepared"):
            solve(eps, x, 7)


def test_a_time_may_be_a_number(small):
    unet, x, t, context = small
    expected = unet(x, t, context)
    for time in (500, 500.0, torch.tensor(500), torch.tensor([500.0])):
        assert torch.equal(unet(x, time, context), expected)
    fused = fast.optimise(copy.deepcopy(unet))
    known = fused.prepare(context, t[:1])
    assert torch.equal(fused(x, 500, known), fused(x, t, known))
    for network in (unet, fused):
        with pytest.raises(ValueError, match="times of shape .3,. for 2 latents"):
            network(x, torch.zeros(3), context)


@pytest.mark.parametrize("frames", [127, 126, 64, 130])
def test_a_condition_of_another_length_is_said(small, frames):
    unet, x, t, _ = small
    align = Alignment(AlignmentConfig(frames=128, positions=130, feature_dim=16, unet=SMALL))
    wrong, features = rule.normal("wrong", 2, frames, 8), rule.normal("f", 2, frames, 16)
    fused = fast.optimise(copy.deepcopy(unet))
    calls = [
        lambda: unet(x, t, wrong),
        lambda: fused(x, t, wrong),
        lambda: fused(x, t, fused.prepare(wrong)),
        lambda: align(x, t, features),
        lambda: align.grad_log_prob(x, t, features),
    ]
    for call in calls:
        with pytest.raises(
            ValueError,
            match=f"the condition has {frames} frames; 64 latent columns want 128, 2 each",
        ):
            call()
    assert align(x, t, rule.normal("f", 2, 128, 16)).shape == (2, 1)


def test_features_that_a_conditioner_cannot_take_are_said():
    conditioner = ldm.Conditioner(16, 8, positions=40)
    assert conditioner(torch.zeros(2, 32, 16)).shape == (2, 32, 8)
    with pytest.raises(
        ValueError, match="features of 41 frames; this network was trained on at most 40"
    ):
        conditioner(torch.zeros(2, 41, 16))
    for shape in ((32, 16), (2, 32, 17)):
        with pytest.raises(ValueError, match="wanted is .b, frames, 16."):
            conditioner(torch.zeros(shape))


def test_every_sampler_says_the_times_it_asks_for():
    assert diffusion.SAMPLERS.keys() == diffusion.TIMES.keys()
    for name, sampler in diffusion.SAMPLERS.items():
        asked = []
        sampler(lambda x, t, asked=asked: asked.append(float(t[0])) or 0.1 * x, torch.ones(1, 1), 7)
        assert set(asked) <= {float(t) for t in diffusion.TIMES[name](7)}, name


# ---- solvers and schedules -----------------------------------------------------------------------


def mixture_eps(x, t):
    """Of two Gaussians around +m and -m, whose noised densities are known exactly."""
    m = torch.linspace(-1, 1, x.shape[-1], dtype=torch.float64)
    alpha = diffusion.log_alpha(t).exp()[:, None, None, None]
    sig = diffusion.sigma(t)[:, None, None, None]
    variance = 0.3**2 * alpha**2 + sig**2
    side = torch.tanh(alpha * m * x / variance)  # of which of the two x is
    return sig * (x - alpha * m * side) / variance


@pytest.fixture(scope="module")
def exact_end():
    """-> noise, and where the mixture's ODE leads it."""
    x = torch.randn(1, 4, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x, diffusion.dpm_solver(mixture_eps, x, 2000, schedule="logsnr")


def distance(sampler, exact_end, steps, **options):
    x, end = exact_end
    return float((diffusion.SAMPLERS[sampler](mixture_eps, x, steps, **options) - end).norm())


@pytest.mark.parametrize("sampler", ["dpm", "unipc", "deis"])
def test_solvers_converge_at_their_order(exact_end, sampler):
    """Twice the steps: four times as near, or nearly, as times are interpolated."""
    errors = [distance(sampler, exact_end, n, schedule="logsnr") for n in (25, 50, 100)]
    assert errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3


def test_unipc_corrects_what_dpm_solver_predicts(exact_end):
    for steps in (8, 15, 50):
        dpm = distance("dpm", exact_end, steps, schedule="logsnr")
        assert distance("unipc", exact_end, steps, schedule="logsnr") < 0.9 * dpm
    # one step has nothing to correct
    x, _ = exact_end
    assert torch.equal(*(diffusion.SAMPLERS[s](mixture_eps, x, 1) for s in ("dpm", "unipc")))


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 25])
def test_schedules_fall_from_one_end_to_the_other(schedule, steps):
    grid = diffusion.time_grid(steps, schedule)
    assert len(grid) == steps + 1 and (grid.diff() < 0).all()
    assert grid[0] == 999 and grid[-1].abs() < 1e-3


def test_schedules_are_what_they_say():
    lam = diffusion.log_snr(diffusion.time_grid(20, "logsnr"))
    assert lam.diff().std() < 0.02 * lam.diff().mean()
    noise = (-diffusion.log_snr(diffusion.time_grid(20, "karras"))).exp() ** (1 / 7)
    assert noise.diff().std() < 0.02 * noise.diff().mean().abs()
    assert diffusion.time_grid(10, "ays").round().tolist() == diffusion.AYS
    given = [999.0, 700.0, 300.0, 0.0]
    assert torch.allclose(diffusion.time_grid(3, given[::-1]), torch.tensor(given), atol=1e-2)


def test_a_search_finds_better_times(exact_end):
    x, _ = exact_end
    found = diffusion.search_schedule(mixture_eps, x, 5, diffusion.unipc)
    assert len(found) == 6 and sorted(found) == found[::-1]
    ends = [distance("unipc", exact_end, 5, schedule=s) for s in (found, "quadratic", "uniform")]
    assert ends[0] < 0.8 * ends[1] and ends[0] < 0.5 * ends[2]
