"""Guidance distilled: one call instead of two of the U-Net and one of the classifier and its
gradient (Meng et al. 2023, arXiv 2210.03142).

in   the set that `cavp.py --extract` wrote (its sound is not needed); weights of stage 2 (--init)
     and of the alignment classifier (--align)
out  OUT/last.safetensors: the same networks, which can be told the scales of guidance

    python distill.py --data features/ --init runs/ldm/last.safetensors \\
        --align runs/align/last.safetensors

The student is the teacher's own network with a small layer more, `controls.Scales`. Told scales, it
predicts what the teacher predicts under double guidance with them; told none, what the teacher does
without guidance. So one file serves both, and a guided step is one call:

    Trajectory     x at falling times, from noise, by DPM-Solver++ under the teacher's guidance
    teach          eps = Eq. 9 and 10 of the paper, every clip with scales of its own
    student_loss   || eps(x, t, context, scales) - eps ||^2 / alpha_t^2, relative to the change

The student learns where sampling leads, on the teacher's own trajectories: every step adds a batch
of clips that begin at noise, and takes all others on by one of their --repeats times.
"""

import functools
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

from common import startup

# isort: split
import torch
from torch import Tensor

import data
from align import Alignment
from common import controls, distributed, training
from diffusion import dpm_solver, guided_eps, log_alpha, log_snr, sigma
from kernels import fast
from ldm import LATENT_SHAPE, LDM, begin_run, final_lr, repeat_items

startup.imported(__name__ == "__main__")

# only for networks of the mini size was it tried
RECIPES = {
    "mini": {
        "steps": 1000,
        "batch": 8,
        "lr": 3e-4,
        "warmup": 50,
        "grad_clip": 1,
        "merge": 0.5,
        "roll": 0,
        "repeats": 24,
    },
    "paper": {
        "steps": 10_000,
        "batch": 32,
        "lr": 5e-5,
        "warmup": 200,
        "grad_clip": 1,
        "merge": 0.5,
        "roll": 0,
        "repeats": 24,
    },
}
USUAL = 0.5  # share of the clips with the scales that suit the weights; the others' are drawn
PLAIN = 0.25  # share of the latents at which the student also keeps what it knew without guidance
LEAST = 0.2  # mean square of v's change by guidance below which errors count by their own size
# of the student's steps in validation, beside the teacher's 25
FEW = 10


# --------------------------------------------------------------------------------------------------
# trajectories


def draw_times(clips: int, points: int, rng):
    """(clips, points) falling times, each clip's own, the first of them 999."""
    # evenly spaced places, moved by up to nine tenths of their distance: all times are visited
    places = torch.arange(points) - 0.9 * torch.rand(clips, 1, generator=rng)
    places[:, 0] = 0
    return 999 * (1 - places / (points - 1))


def draw_scales(usual, largest, clips: int, rng):
    """(clips, 3) scales as `controls.Scales` takes them: the usual ones, or anything from no
    guidance (1, 0, 0) to the largest."""
    usual = torch.tensor(usual)
    off = torch.tensor([1.0, 0.0, 0.0])
    drawn = off + (torch.tensor(largest) - off) * torch.rand(clips, 3, generator=rng)
    is_usual = torch.rand(clips, 1, generator=rng) < USUAL
    return torch.where(is_usual, usual, drawn)


@dataclass
class Trajectory:
    """A batch of clips on its way from noise to sound."""

    x: Tensor  # (b, 4, 16, w), at the current time
    times: Tensor  # (b, points), on the CPU
    features: Tensor  # (b, f, 512), of the classifier
    conditions: Tensor  # (b, f, d), of the conditioner
    opened: Tensor  # (b, f, d), the same with materials left open
    scales: Tensor  # (b, 3)
    point: int = 0  # index of the current time
    clean: Tensor | None = None  # (b, 4, 16, w), the clean latents that eps implied a step before

    def state(self):
        """Latents and times (b,), and what the teacher's eps depends on besides."""
        t = self.times[:, self.point].to(self.x)
        return self.x, t, self.features, self.conditions, self.opened, self.scales

    def is_last(self):
        return self.point == self.times.shape[1] - 1

    def advance(self, eps):
        """To the next time by DPM-Solver++(2M), as `diffusion.dpm_solver`, where every clip has
        times of its own."""
        now, following = self.times[:, self.point], self.times[:, self.point + 1]

        def column(y):
            return y.to(self.x)[:, None, None, None]

        clean = (self.x - column(sigma(now)) * eps) / column(log_alpha(now).exp())
        h = log_snr(following) - log_snr(now)
        d = clean
        # second order: extrapolate from the step before, which was r times as long
        if self.clean is not None:
            r = (log_snr(now) - log_snr(self.times[:, self.point - 1])) / h
            d = clean + (clean - self.clean) / column(2 * r)
        kept = column(sigma(following) / sigma(now))
        self.x = kept * self.x - column(log_alpha(following).exp() * torch.expm1(-h)) * d
        self.clean = clean
        self.point += 1


# --------------------------------------------------------------------------------------------------
# teacher and student


@dataclass
class Guides:
    """Whose guidance is learnt."""

    align: Alignment
    teacher: LDM | None = None


@torch.no_grad()
def teach(guides, x, t, features, conditions, opened, scales):
    """-> eps under both guidances (Eq. 9, 10), as `diffusion.guided_eps` has it but with scales
    (b, 3) of each latent's own; and the teacher's eps without guidance, conditional and
    unconditional. Arguments as in a `Trajectory`, at times t (b,)."""
    teacher = guides.teacher
    context = teacher.conditioner(conditions)
    null_context = teacher.null_context(conditions.shape[1]).expand_as(context)
    contexts = [null_context, context]
    # a third branch, for networks that can be told materials
    if teacher.config.materials:
        contexts.append(teacher.conditioner(opened))
    n = len(contexts)
    branches = teacher.unet(x.repeat(n, 1, 1, 1), t.repeat(n), torch.cat(contexts)).float()
    unconditional, conditional, *rest = branches.chunk(n)

    cfg, cg, emphasis = scales[:, :, None, None, None].unbind(1)  # (b, 1, 1, 1) each
    eps = unconditional + cfg * (conditional - unconditional)
    if rest:
        eps = eps + emphasis * (conditional - rest[0])
    sigma_t = sigma(t).to(eps)[:, None, None, None]
    eps = eps - cg * sigma_t * guides.align.grad_log_prob(x, t, features)
    return [eps, conditional, unconditional]


def student_loss(model, x, t, conditions, scales, targets, plain):
    """Mean squared error of v, relative to what guidance changes: else the first times of clips
    with large scales would be nearly all of it.

    Of all latents the student is told the scales and is to predict targets[0]; of those in `plain`
    (n,), indices, it is told none and is to predict targets[1], conditional, for the first half and
    targets[2], unconditional, for the others."""
    half = len(plain) // 2
    first, others = plain[:half], plain[half:]
    null_context = model.null_context(conditions.shape[1])
    contexts = torch.cat(
        [
            model.guided_context(conditions, scales),
            model.conditioner(conditions[first]),
            null_context.expand(len(others), -1, -1),
        ]
    )
    x = torch.cat([x, x[plain]])
    t = torch.cat([t, t[plain]])
    target = torch.cat([targets[0], targets[1][first], targets[2][others]])
    change = torch.cat([targets[0] - targets[1], torch.zeros_like(target[len(targets[0]) :])])
    error = model.unet(x, t, contexts).float() - target
    # ||v error||^2 = ||eps error||^2 / alpha_t^2, as in ldm.denoising_loss
    alpha = log_alpha(t).exp().to(error)
    error = error.square().mean((1, 2, 3)) / alpha**2
    change = change.square().mean((1, 2, 3)) / alpha**2
    return (error / (change + LEAST)).mean()


def usual_scales(config, align):
    """The scales that suit the weights, in the order of `controls.Scales`."""
    emphasis = controls.EMPHASIS if config.materials else 0.0
    return (config.guidance, align.config.guidance, emphasis)


def make_student(path, align):
    """The network in a file of ours or the published one, with a layer for the scales, up to twice
    the usual ones."""
    teacher = LDM.load(path)
    largest = tuple(2 * scale for scale in usual_scales(teacher.config, align))
    student = LDM(replace(teacher.config, scales=largest))
    student.load_state_dict({**student.state_dict(), **teacher.state_dict()})
    return student


# --------------------------------------------------------------------------------------------------
# training


def validate(model, pairs, device, guides, max_clips: int = 4):
    """Relative distance between the student's latents in FEW steps and the teacher's in 25, from
    the same noise; the same clips every time."""
    rng = torch.Generator().manual_seed(0)
    teacher = guides.teacher
    cfg, cg, _ = usual_scales(model.config, guides.align)
    # no material is named
    scales = torch.tensor([[cfg, cg, 0.0]], device=device)
    distances = []
    mels = []
    for i in range(min(max_clips, len(pairs))):
        features = pairs[i]["features"].to(device)[None]
        noise = torch.randn(1, *LATENT_SHAPE, generator=rng).to(device)
        context = teacher.conditioner(features)
        null_context = teacher.null_context(features.shape[1])
        guided = guided_eps(teacher.unet, context, null_context, cfg, guides.align, features, cg)
        wanted = dpm_solver(guided, noise, 25)
        alone = guided_eps(model.unet, model.guided_context(features, scales), None, 1)
        drawn = dpm_solver(alone, noise, FEW)
        distances.append(((drawn - wanted).norm() / wanted.norm()).item())
        mels.append((model.decode(wanted)[0], model.decode(drawn)[0]))
    return {"val_distance": sum(distances) / len(distances)}, mels


def begin_trajectory(args, model, align, batch, rows, rng, device):
    """A micro-batch of clips at the beginning of their trajectories."""
    # random numbers of the whole batch, of all processes
    noise = torch.randn(args.batch, *LATENT_SHAPE, generator=rng)[rows].to(device)
    times = draw_times(args.batch, args.repeats, rng)[rows]
    usual = usual_scales(model.config, align)
    scales = draw_scales(usual, model.config.scales, args.batch, rng)[rows].to(device)
    # what is told of hits and materials: as in training, but more often hits, and without their
    # strengths, as sample.py does that finds them
    chances = torch.rand(args.batch, 4, generator=rng)[rows] * torch.tensor([0.6, 0.4, 1, 1])
    always = torch.ones(len(noise), 1, 1, device=device)
    no_noise = torch.zeros(1, device=device)
    conditions, _ = repeat_items(model, batch, 1, always, chances.to(device), no_noise)
    opened = model.without_materials(conditions) if model.config.materials else None
    opened = conditions if opened is None else opened
    features = conditions[..., : model.config.feature_dim]
    # half of the named materials are a person's, as in sample.py: eps is led to them, and the
    # picture fades; where none is named, there is nothing to be led to
    is_named = (conditions != opened).flatten(1).any(1)
    by_person = is_named & (torch.rand(args.batch, generator=rng)[rows].to(device) < 0.5)
    scales[:, 2] *= by_person
    opened = torch.where(by_person[:, None, None], opened, conditions)
    conditions, opened = controls.fade_picture(conditions, opened, features)
    return Trajectory(noise, times, features, conditions, opened, scales)


def train(args):
    """One step: a new batch of clips joins the trajectories, the student learns at the current
    times of all of them, and the teacher's eps takes each one on.

    A resumed run begins its trajectories anew: it does not go on bit for bit."""
    training.resolve_defaults(args, RECIPES, "distill")
    distributed.init(args.device)
    training.check_batch(args)
    if args.micro_batch * distributed.world() < args.batch:
        raise training.TrainingError(
            "--micro-batch: not for distilling, whose batches stay together; lower --batch instead"
        )
    training.check_run_folder(args)
    device = training.set_up(args)
    if not args.init:
        raise training.TrainingError("distilling starts from trained weights: add --init LDM")

    # the student: U-Net and conditioner learn
    align = Alignment.load(args.align, device)
    model = LDM.load(args.init) if args.resume else make_student(args.init, align)
    model = model.to(device, memory_format=torch.channels_last).train()
    model.requires_grad_(False)
    model.unet.requires_grad_(True)
    model.conditioner.requires_grad_(True)
    guides = Guides(align)
    measure = functools.partial(validate, device=device, guides=guides)
    # what the set is asked for besides features
    config = model.config
    labels = {}
    if config.columns:
        onsets = data.read_all_onsets(args.labels) if args.labels else None
        labels = {"columns": config.columns, "materials": config.materials, "labels": onsets}
    run, optimizer, ema = begin_run(args, model, model.unet, measure, **labels)
    # the teacher: of a resumed run, --init is known only now
    guides.teacher = LDM.load(args.init, device)
    fast.optimise(guides.teacher.unet)
    fast.optimise(align.model)
    network = distributed.wrap_ddp(model, student_loss)

    pool = deque()
    for step in run:
        rng = training.generator(args, step)
        for batch, rows in run.parts(network):
            pool.append(begin_trajectory(args, model, align, batch, rows, rng, device))
            # all clips of all trajectories, each at its current time
            x, t, *given = map(torch.cat, zip(*(each.state() for each in pool), strict=True))
            targets = teach(guides, x, t, *given)
            _, conditions, _, scales = given
            plain = torch.randperm(len(x), generator=rng)[: round(PLAIN * len(x))].to(device)
            with training.autocast(args):
                loss = network(x, t, conditions, scales, targets, plain)
            loss.backward()
            run.add(loss=loss)
            # on to the next times; the oldest trajectory has arrived
            if pool[0].is_last():
                targets = [eps[len(pool[0].x) :] for eps in targets]
                pool.popleft()
            for trajectory, eps in zip(pool, targets[0].split(args.micro_batch), strict=True):
                trajectory.advance(eps)
        norm = training.update(args, step, optimizer, ema, model, final_lr(args))
        run.report(gradient_norm=norm)


def main(argv=None):
    p = training.arguments(__doc__, RECIPES)
    p.add_argument(
        "--align", type=Path, required=True, help="the alignment classifier of double guidance"
    )
    p.add_argument(
        "--labels",
        type=Path,
        metavar="DIR",
        help="folder of the clips' .json files, as foley.py writes them, for networks that can be "
        "told hits; default: the onsets of the clips' own sound",
    )
    training.add_stage2_arguments(p)
    args = p.parse_args(argv)
    with distributed.report_errors("distill.py"):
        train(args)


if __name__ == "__main__":
    main()
