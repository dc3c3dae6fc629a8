"""Guidance distilled: what the teacher says, where the student learns it, and what sampling does
with the result."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

import distill
import ldm
from align import Alignment, AlignmentConfig
from common import checkpoints, controls
from diffusion import dpm_solver, guided_eps, time_grid
from kernels import fast
from sample import Models, Settings, guided

MINI_WEIGHTS = Path(__file__).parent.parent / "weights" / "mini"
USUAL = (2.5, 1.0, 5.0)
MINI = ldm.LDMConfig(
    **tiny.TIME,
    guidance=2.5,
    columns=4,
    materials=("A", "B", "C"),
    names_materials=True,
    unet=tiny.UNET,
    vae=tiny.VAE,
)


def noisy(network, seed=0, scale=0.05):
    """Random weights everywhere, also where training begins at zero."""
    rng = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.data += scale * torch.randn(p.shape, generator=rng)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def align():
    return noisy(Alignment(AlignmentConfig(**tiny.TIME, guidance=1.0, unet=tiny.UNET)), 1)


@pytest.fixture(scope="module")
def teacher():
    return noisy(ldm.LDM(MINI))


@pytest.fixture(scope="module")
def files(teacher, align, tmp_path_factory):
    """Teacher and classifier as checkpoints."""
    folder = tmp_path_factory.mktemp("teacher")
    checkpoints.save_model(folder / "ldm.safetensors", teacher, asdict(MINI))
    checkpoints.save_model(folder / "align.safetensors", align, asdict(align.config))
    return folder


@pytest.fixture
def latents():
    """Latents, times, features, conditions and what is left open, of three clips; the first two
    are told their material."""
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(3, *ldm.LATENT_SHAPE, generator=rng)
    features = torch.nn.functional.normalize(torch.randn(3, 128, 32, generator=rng), dim=2)
    told = torch.zeros(3, 128, 9 + 3)
    told[:, ::16, 0] = told[:, :, 8] = 1
    told[:2, :, 9] = 1
    conditions = torch.cat([features, told], 2)
    opened = conditions.clone()
    opened[..., -3:] = 0
    return x, torch.tensor([900.0, 500.0, 20.0]), features, conditions, opened


def test_the_teacher_says_what_double_guidance_says(teacher, align, latents):
    x, t, features, conditions, opened = latents
    scales = torch.tensor([[1.5, 20.0, 3.0], [4.0, 0.0, 0.0], [1.0, 9.0, 0.0]])
    guides = distill.Guides(align, teacher)
    eps, conditional, unconditional = distill.teach(
        guides, x, t, features, conditions, opened, scales
    )
    context = teacher.conditioner(conditions)
    for k, (cfg, cg, emphasis) in enumerate(scales.tolist()):
        one = slice(k, k + 1)
        wanted = guided_eps(
            teacher.unet,
            context[one],
            teacher.null_context(128),
            cfg,
            align,
            features[one],
            cg,
            teacher.conditioner(opened)[one],
            emphasis,
        )(x[one], t[one])
        torch.testing.assert_close(eps[one], wanted, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(conditional, teacher.unet(x, t, context), atol=2e-5, rtol=1e-4)
    null_context = teacher.null_context(128).expand(3, -1, -1)
    torch.testing.assert_close(
        unconditional, teacher.unet(x, t, null_context), atol=2e-5, rtol=1e-4
    )


def test_trajectories_are_those_of_dpm_solver(teacher, latents):
    """The same points as `dpm_solver`'s, for clips that are all at the same times."""
    x, *_ = latents
    context = teacher.conditioner(latents[3])
    points = []
    steps = 16
    dpm_solver(
        lambda x, t: teacher.unet(x, t, context), x, steps, lambda _, x: points.append(x.clone())
    )
    times = time_grid(steps)[:steps].expand(3, -1)
    trajectory = distill.Trajectory(x, times, None, None, None, None)
    while not trajectory.is_last():
        now, t, *_ = trajectory.state()
        trajectory.advance(teacher.unet(now, t, context))
        torch.testing.assert_close(trajectory.x, points[trajectory.point - 1], atol=1e-4, rtol=1e-4)
    assert trajectory.point == steps - 1


def test_times_fall_from_the_first_one_and_lie_everywhere():
    times = distill.draw_times(500, 24, torch.Generator().manual_seed(0))
    assert (times[:, 0] == 999).all()
    assert (times.diff(dim=1) < 0).all()
    assert times.min() >= 0
    visited = torch.histc(times[:, 1:], 20, 0, 999)
    assert visited.min() > 0.5 * visited.mean()


def test_scales_are_the_usual_ones_or_anything_up_to_the_largest():
    drawn = distill.draw_scales(USUAL, (5.0, 2.0, 10.0), 4000, torch.Generator().manual_seed(0))
    usual = (drawn == torch.tensor(USUAL)).all(1)
    assert abs(usual.float().mean() - distill.USUAL) < 0.05
    others = drawn[~usual]
    assert (others >= torch.tensor([1.0, 0.0, 0.0])).all()
    assert (others <= torch.tensor([5.0, 30.0, 10.0])).all()
    spread = others.quantile(0.95, 0) - others.quantile(0.05, 0)
    assert (spread > 0.8 * torch.tensor([4.0, 2.0, 10.0])).all()


def test_a_trajectory_is_led_to_half_of_the_named_materials_and_fades_the_picture_there(
    files, align
):
    """As sample.py does where a person names them, and does not where the head does."""
    count = 400
    student = distill.make_student(files / "ldm.safetensors", align)
    batch = {
        "features": torch.nn.functional.normalize(torch.randn(count, 128, 32), dim=2),
        "hits": torch.zeros(count, 512),
        "materials": torch.zeros(count, 128, dtype=torch.long),
        "stranger": torch.zeros(count),
    }
    args = SimpleNamespace(batch=count, repeats=4)
    rng = torch.Generator().manual_seed(0)
    begun = distill.begin_trajectory(args, student, align, batch, slice(None), rng, "cpu")
    named = begun.conditions[..., -3:].flatten(1).any(1)
    led = (begun.conditions != begun.opened).flatten(1).any(1)
    assert abs(named.float().mean() - 0.5) < 0.1
    assert abs(led[named].float().mean() - 0.5) < 0.15 and not led[~named].any()
    assert not begun.scales[~led, 2].any() and begun.scales[led, 2].any()
    # the classifier sees all of the picture
    weight = torch.where(led, controls.SEEN, 1.0)[:, None, None]
    assert torch.equal(begun.features, batch["features"])
    torch.testing.assert_close(begun.conditions[..., :32], weight * begun.features)


def test_a_student_begins_as_its_teacher(files, teacher, align, latents):
    student = distill.make_student(files / "ldm.safetensors", align)
    assert student.config.scales == (5.0, 2.0, 10.0)
    conditions = latents[3]
    told = student.guided_context(conditions, torch.tensor([USUAL]))
    torch.testing.assert_close(told, teacher.conditioner(conditions))


def test_the_loss_asks_for_all_three_predictions(files, teacher, align, latents):
    """It is zero for a network that makes them, and each of them counts."""
    x, t, features, conditions, opened = latents
    scales = torch.tensor([USUAL]).repeat(3, 1)
    student = distill.make_student(files / "ldm.safetensors", align)
    plain = torch.tensor([0, 2])
    context = teacher.conditioner(conditions)
    conditional = teacher.unet(x, t, context)
    unconditional = teacher.unet(x, t, teacher.null_context(128).expand(3, -1, -1))

    @torch.no_grad()
    def loss(*targets):
        return float(distill.student_loss(student, x, t, conditions, scales, targets, plain))

    least = loss(conditional, conditional, unconditional)
    assert least < 1e-8
    for k in range(3):
        targets = [conditional, conditional, unconditional]
        targets[k] = targets[k] + 0.1
        assert loss(*targets) > 1e-4


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """A short distillation, as a user starts it. -> its folder"""
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        tiny.install(patch.setattr)
        tiny.install_no_extras(patch.setattr)
        distill.main(distill_arguments(files, out, steps=8))
    return out


def distill_arguments(files, out, steps, **flags):
    given = {
        "data": "random",
        "init": files / "ldm.safetensors",
        "align": files / "align.safetensors",
        "out": out,
        "steps": steps,
        "batch": 4,
        "repeats": 4,
        "lr": 3e-3,
        "warmup": 5,
        "dtype": "float32",
        "device": "cpu",
        "save-every": 20,
    } | flags
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def test_the_shipped_network_learns_what_guidance_does():
    """Told the scales, it comes nearer to guidance; told none, it stays what it was."""
    teacher = ldm.LDM.load(MINI_WEIGHTS / "ldm.safetensors")
    guides = distill.Guides(Alignment.load(MINI_WEIGHTS / "align.safetensors"), teacher)
    scales = torch.tensor([[2.5, 15.0, 0.0]]).repeat(4, 1)
    rng = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(4, 128, 512, generator=rng), dim=2)
    hits = torch.zeros(4, 512)
    hits[:, 40::60] = -1
    tracks = controls.Tracks(hits, torch.ones(4, 1, 1), None)
    conditions = teacher.with_controls(features, tracks)
    # the middle of a trajectory
    noise = torch.randn(4, *ldm.LATENT_SHAPE, generator=rng)
    times = distill.draw_times(4, 7, rng)
    trajectory = distill.Trajectory(noise, times, features, conditions, conditions, scales)
    for _ in range(3):
        targets = distill.teach(guides, *trajectory.state())
        trajectory.advance(targets[0])
    x, t, *_ = trajectory.state()
    targets = distill.teach(guides, *trajectory.state())

    student = distill.make_student(MINI_WEIGHTS / "ldm.safetensors", guides.align)
    student.unet.requires_grad_(True)
    student.conditioner.requires_grad_(True)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 3e-4)
    everywhere = torch.arange(4).repeat(2)
    for _ in range(20):
        loss = distill.student_loss(student, x, t, conditions, scales, targets, everywhere)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        told = student.unet(x, t, student.guided_context(conditions, scales))
        untold = student.unet(x, t, student.conditioner(conditions))
    change = (targets[0] - targets[1]).square().mean()
    assert (told - targets[0]).square().mean() < 0.6 * change
    assert (untold - targets[1]).square().mean() < 0.3 * change


def test_the_header_says_from_whom_it_learned(run):
    header = checkpoints.Checkpoint(run / "last.safetensors").metadata
    assert set(header["started_from"]) == {"init", "align"}
    student = ldm.LDM.load(run / "last.safetensors")
    assert student.config.scales == (5.0, 2.0, 10.0)
    # it was told them: the layer is no longer zero
    assert student.conditioner.scales.layers[2].weight.abs().max() > 0


def test_a_run_goes_on_after_a_stop(files, tmp_path, monkeypatch):
    tiny.install(monkeypatch.setattr)
    tiny.install_no_extras(monkeypatch.setattr)
    distill.main(distill_arguments(files, tmp_path, steps=4))
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["distill.py"])
        distill.main([*distill_arguments(files, tmp_path, steps=8), "--resume"])
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps[-1] == 8
    assert ldm.LDM.load(tmp_path / "last.safetensors").config.scales == (5.0, 2.0, 10.0)


def test_micro_batches_are_refused(files, tmp_path, monkeypatch):
    tiny.install(monkeypatch.setattr)
    with pytest.raises(SystemExit, match="distill.py: --micro-batch: not for distilling"):
        distill.main(distill_arguments(files, tmp_path / "out", steps=2, **{"micro-batch": 2}))
    assert not (tmp_path / "out").exists()


def test_validation_measures_the_students_few_steps(files, teacher, align, latents):
    student = distill.make_student(files / "ldm.safetensors", align)
    pairs = [{"features": latents[2][0]}]
    guides = distill.Guides(align, teacher)
    numbers, mels = distill.validate(student, pairs, "cpu", guides)
    assert numbers["val_distance"] > 0
    assert mels[0][0].shape == (128, 512)


# ---- sampling ------------------------------------------------------------------------------------


@pytest.fixture
def models(run, align):
    """A distilled network and the classifier, optimised as `load_models` does."""
    student = ldm.LDM.load(run / "last.safetensors")
    fast.optimise(student.unet)
    return Models(None, student, align, "cpu", "tiny")


def test_a_distilled_step_is_one_call(models, latents, monkeypatch):
    settings = Settings().resolve(models)
    assert settings.guidance == "distilled"
    calls = []
    step = type(models.ldm.unet).step
    monkeypatch.setattr(
        type(models.ldm.unet),
        "step",
        lambda self, x, *rest: calls.append(len(x)) or step(self, x, *rest),
    )
    monkeypatch.setattr(models.align.model, "forward", None)
    times = time_grid(settings.steps)[:-1]
    eps = guided(models, latents[3], None, settings, times)
    dpm_solver(eps, latents[0], settings.steps)
    assert calls == [3] * settings.steps


def test_scales_reach_a_distilled_network(models, latents):
    x, _, _, conditions, opened = latents
    t = torch.full((3,), 999.0)

    def eps(conditions, **changes):
        settings = Settings(**changes).resolve(models)
        return guided(models, conditions, opened, settings, [999.0])(x, t)

    usual = eps(conditions)
    assert not torch.allclose(usual, eps(conditions, cfg=1.0), atol=1e-4)
    assert not torch.allclose(usual, eps(conditions, cg=0.0), atol=1e-4)
    # the third clip names no material: it is led to none, whatever the others do
    torch.testing.assert_close(usual[2], eps(opened)[2], atol=1e-5, rtol=1e-4)


def test_double_guidance_stays_selectable(models, latents):
    settings = Settings(guidance="double").resolve(models)
    assert settings.steps == 25
    x, _, features, conditions, opened = latents
    t = torch.full((3,), 999.0)
    ours = guided(models, conditions, opened, settings, [999.0])(x, t)
    student = models.ldm
    conditions, opened = controls.fade_picture(conditions, opened, features)
    wanted = guided_eps(
        student.unet,
        student.conditioner(conditions),
        student.null_context(128),
        settings.cfg,
        models.align,
        features,
        settings.cg,
        student.conditioner(opened),
        controls.EMPHASIS,
    )(x, t)
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


def test_few_steps_where_guidance_is_distilled(models):
    def how(**given):
        settings = Settings(**given).resolve(models)
        return settings.steps, settings.sampler, settings.schedule

    assert how() == (6, "unipc", "uniform")
    assert how(steps=8, schedule="karras") == (8, "unipc", "karras")
    # on another schedule, or of another sampler, so few give noise
    assert how(schedule="karras") == (25, "unipc", "karras")
    assert how(sampler="plms") == (25, "plms", "uniform")
    assert how(sampler="dpm") == (6, "dpm", "uniform")
    assert how(guidance="double") == (25, "dpm", "uniform")
    assert how(guidance="double", steps=4) == (4, "dpm", "uniform")


def test_what_was_not_distilled_is_refused(models, teacher, align):
    for wrong in ({"cfg": 5.5}, {"cfg": 0.5}, {"cg": 2.5}):
        with pytest.raises(ValueError, match="--guidance double"):
            Settings(**wrong).resolve(models)
        Settings(guidance="double", **wrong).resolve(models)
    # within reach
    Settings(cfg=5.0, cg=2.0).resolve(models)
    undistilled = replace(models, ldm=teacher)
    with pytest.raises(ValueError, match="distill.py"):
        Settings(guidance="distilled").resolve(undistilled)
    assert Settings().resolve(undistilled).guidance == "double"
    with pytest.raises(ValueError, match="double, distilled"):
        Settings(guidance="triple")


def test_training_on_drops_guidance_that_would_be_stale(run):
    """Unless the U-Net is frozen, as where a head alone is trained."""
    assert ldm.from_ours(run / "last.safetensors").config.scales == ()
    kept = ldm.from_ours(run / "last.safetensors", trains_unet=False)
    assert kept.config.scales == (5.0, 2.0, 10.0)
