"""How near few steps of each solver and schedule come to the exact end of the sampling equation.

in   a folder of clips; weights that sample.py takes
out  a line a row, and FILE, a line of JSON each: relative distance of the latents from those of the
     same equation in --exact steps, the mean over clips and its 95 % interval; seconds a clip

    python -m tools.few_steps clips/ --guidance double --out double.jsonl

Every clip's first window begins at the same noise in all rows. A row of `searched` has the schedule
that `diffusion.search_schedule` finds on the first eight clips; distances are of the others, in all
rows. Seconds are those of the sampler alone, in batches of --batch, of its second run.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from diffusion import SAMPLERS, SCHEDULES, TIMES, guided_eps, search_schedule
from film.progress import Progress
from sample import Settings, guided, load_models, noise_field, open_clip

SOLVERS = ("dpm", "unipc", "deis")  # they take schedules; DDIM and PLMS do not
STEPS = (4, 6, 8, 10, 15, 25)
LEARNED = 8  # clips that schedules are searched on


def first_windows(folder, count, models, settings):
    """-> conditions (n, f, d) and noise (n, 4, 16, w) of the first window of each clip."""
    conditions = []
    noise = []
    for k, path in enumerate(sorted(folder.glob("*.mp4"))[:count]):
        clip = open_clip(path, models, settings, 0.0, 8.0, Progress(None))
        conditions.append(clip.conditions[: models.ldm.config.frames])
        noise.append(noise_field(k, 0, 64))
    return torch.stack(conditions), torch.stack(noise).to(models.device)


class Study:
    """Draws all windows by any solver."""

    def __init__(self, models, settings, conditions, noise, batch):
        self.models = models
        self.settings = settings
        self.conditions = conditions
        self.noise = noise
        self.batch = batch

    @torch.no_grad()
    def draw(self, sampler, steps, clips=slice(None), **schedule):
        """-> latents (n, 4, 16, w) of these clips."""
        times = TIMES[sampler](steps, **schedule)
        parts = []
        conditions = self.conditions[clips].split(self.batch)
        for c, x in zip(conditions, self.noise[clips].split(self.batch), strict=True):
            eps = guided(self.models, c, None, self.settings, times)
            parts.append(SAMPLERS[sampler](eps, x, steps, **schedule))
        return torch.cat(parts)

    @torch.no_grad()
    def search(self, sampler, steps):
        """-> the times that suit these weights."""

        ldm = self.models.ldm
        conditions = self.conditions[:LEARNED]
        # as `sample.guided`, which wants to know all times before
        if self.settings.guidance == "distilled":
            scales = torch.tensor([[self.settings.cfg, self.settings.cg, 0.0]])
            context = ldm.guided_context(conditions, scales.to(conditions.device))
            eps = guided_eps(ldm.unet, context, None, 1)
        else:
            context = ldm.conditioner(conditions)
            null_context = ldm.null_context(conditions.shape[1])
            features = conditions[..., : ldm.config.feature_dim]
            given = (self.settings.cfg, self.models.align, features, self.settings.cg)
            eps = guided_eps(ldm.unet, context, null_context, *given)
        x = self.noise[:LEARNED]
        return search_schedule(eps, x, steps, SAMPLERS[sampler], exact=100, rounds=3)


def rows(study, every, search):
    """(sampler, name of the schedule, steps, schedule's argument) of all rows."""
    for steps in every:
        for sampler in SOLVERS:
            for name in SCHEDULES:
                yield sampler, name, steps, {"schedule": name}
        for sampler in ("ddim", "plms"):
            yield sampler, "uniform", steps, {}
        if steps in search:
            for sampler in SOLVERS[:2]:
                yield sampler, "searched", steps, {"schedule": study.search(sampler, steps)}


def interval(values):
    """95 % of the mean of values (n,), by bootstrap over clips."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (2000, len(values))).mean(1)
    return np.quantile(means, (0.025, 0.975)).round(4).tolist()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("clips", type=Path, help="folder of mp4 files")
    p.add_argument("--weights", default="mini", help="as of sample.py")
    p.add_argument("--guidance", choices=("double", "distilled"), default="double")
    p.add_argument("--count", type=int, default=32, help="clips")
    p.add_argument("--batch", type=int, default=8, help="clips in one call")
    p.add_argument("--exact", type=int, default=500, help="steps that count as exact")
    p.add_argument("--steps", type=int, nargs="+", default=STEPS, help="numbers of steps")
    p.add_argument("--search", type=int, nargs="*", default=[6, 8, 10], help="steps to search for")
    p.add_argument("--device", default="auto")
    p.add_argument("--out", type=Path, default=Path("few_steps.jsonl"))
    args = p.parse_args(argv)
    if len(list(args.clips.glob("*.mp4"))) <= LEARNED:
        p.error(f"{args.clips}: give a folder of more than {LEARNED} mp4 files")
    models = load_models(args.weights, args.device)
    settings = Settings(guidance=args.guidance).resolve(models)
    study = Study(
        models, settings, *first_windows(args.clips, args.count, models, settings), args.batch
    )
    exact = study.draw("dpm", args.exact, schedule="logsnr")
    with open(args.out, "w") as file:
        for sampler, name, steps, schedule in rows(study, args.steps, args.search):
            study.draw(sampler, steps, slice(args.batch), **schedule)
            start = time.perf_counter()
            z = study.draw(sampler, steps, **schedule)
            # waits for the device, too
            away = (z - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
            away = away[LEARNED:].cpu().numpy()
            row = {
                "sampler": sampler,
                "schedule": name,
                "steps": steps,
                "distance": round(float(away.mean()), 4),
                "interval": interval(away),
                "seconds": round((time.perf_counter() - start) / len(z), 4),
            }
            if name == "searched":
                row["times"] = [round(t, 1) for t in schedule["schedule"]]
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
