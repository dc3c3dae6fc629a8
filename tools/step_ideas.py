"""Ideas for cheaper or steadier guided steps, measured.

in   a folder of labeled clips, as foley.py makes them; weights that sample.py takes
out  a line a row, and FILE, a line of JSON each: what evaluate.py measures of the sounds, with 95 %
     intervals, and seconds of sampling a clip

    python -m tools.step_ideas clips/ --count 48 --out ideas.jsonl

All rows sample with DPM-Solver++(2M), evenly spaced, but for the distilled ones (UniPC, Karras).
The networks are the plain ones of ldm.py, so that seconds compare with each other alone.

cached       the deep half of the U-Net in every second step alone (DeepCache, Ma et al. 2024);
             the one of these ideas that was built in: sample.py --deep-every 2
early, late  the classifier's gradient only while t >= 500, or only after
interval     classifier-free guidance only for t from 200 to 800 (Kynkäänniemi et al. 2024)
apart        the classifier's gradient moves the latents, but is no part of what the solver
             extrapolates from: operator splitting (after Wizadwongsa and Suwajanakorn 2023)
"""

import argparse
import json
import time
from pathlib import Path

import torch

import evaluate
from align import Alignment
from common.audio import vocode
from diffusion import TIMES, Grid, dpm_solver, guided_eps, log_alpha, sigma, unipc
from ldm import LDM
from sample import Settings, load_models
from tools.few_steps import first_windows
from tools.plain import Cached

COLUMNS = ("onset_f1_100ms", "onset_f1_50ms", "material_acc", "frechet", "loudness_db")


class Ideas:
    """Draws one batch of windows in each way."""

    def __init__(self, ldm, align, conditions, settings):
        self.ldm = ldm
        self.align = align
        self.conditions = conditions
        self.features = conditions[..., : ldm.config.feature_dim]
        self.settings = settings
        self.context = ldm.conditioner(conditions)

    def eps(self, cfg=None, cg=None, unet=None):
        """eps(x, t) under double guidance, at the usual scales where none are given."""
        cfg = self.settings.cfg if cfg is None else cfg
        cg = self.settings.cg if cg is None else cg
        null_context = self.ldm.null_context(self.context.shape[1])
        given = (cfg, self.align, self.features, cg)
        return guided_eps(unet or self.ldm.unet, self.context, null_context, *given)

    def plain(self, x, steps):
        return dpm_solver(self.eps(), x, steps)

    def cached(self, x, steps):
        return dpm_solver(self.eps(unet=Cached(self.ldm.unet)), x, steps)

    def early(self, x, steps):
        return dpm_solver(switch(self.eps(), self.eps(cg=0.0), 500, 999), x, steps)

    def late(self, x, steps):
        return dpm_solver(switch(self.eps(), self.eps(cg=0.0), 0, 500), x, steps)

    def interval(self, x, steps):
        return dpm_solver(switch(self.eps(), self.eps(cfg=1.0), 200, 800), x, steps)

    def apart(self, x, steps):
        """`diffusion.dpm_solver`, with the classifier's gradient outside of its history."""
        grid = Grid(steps, "uniform")
        eps = self.eps(cg=0.0)
        previous = None
        for i, t in enumerate(TIMES["dpm"](steps)):
            t = x.new_full((len(x),), float(t))
            x0 = grid.clean(eps, x, i)
            d = x0
            if previous is not None and not (steps < 15 and i == steps - 1):
                d = x0 + (x0 - previous) / (2 * grid.ratio(i))
            previous = x0
            # Eq. 10's term of eps, as a change of the clean latents
            strength = (self.settings.cg * sigma(t) ** 2 / log_alpha(t).exp()).to(x)
            gradient = self.align.grad_log_prob(x, t, self.features)
            x = grid.advance(x, d + strength[:, None, None, None] * gradient, i)
        return x

    def distilled(self, x, steps, unet=None):
        scales = torch.tensor([[self.settings.cfg, self.settings.cg, 0.0]])
        context = self.ldm.guided_context(self.conditions, scales)
        eps = guided_eps(unet or self.ldm.unet, context, None, 1)
        return unipc(eps, x, steps, schedule="karras")

    def distilled_cached(self, x, steps):
        return self.distilled(x, steps, Cached(self.ldm.unet))


def switch(inside, outside, low, high):
    """eps(x, t): that of `inside` for low <= t <= high, else that of `outside`."""

    def eps(x, t):
        return (inside if low <= float(t[0]) <= high else outside)(x, t)

    return eps


ROWS = (
    ("plain", 25),
    ("cached", 25),
    ("early", 25),
    ("late", 25),
    ("interval", 25),
    ("apart", 25),
    ("plain", 10),
    ("apart", 10),
    ("distilled", 8),
    ("distilled_cached", 8),
)


@torch.no_grad()
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("clips", type=Path, help="folder of clips with labels")
    p.add_argument("--weights", type=Path, default=evaluate.MINI, help="folder")
    p.add_argument("--count", type=int, default=48, help="clips")
    p.add_argument("--batch", type=int, default=8, help="clips in one call")
    p.add_argument("--rows", nargs="*", help="NAME_STEPS; default: all")
    p.add_argument("--out", type=Path, default=Path("step_ideas.jsonl"))
    args = p.parse_args(argv)

    # conditions of all first windows, and what the metrics know of the clips
    models = load_models(args.weights, "cpu")
    settings = Settings(guidance="double").resolve(models)
    conditions, noise = first_windows(args.clips, args.count, models, settings)
    metrics = evaluate.load_metrics(evaluate.MINI)
    videos = sorted(args.clips.glob("*.mp4"))[: args.count]
    clips = [evaluate.read_clip(video, metrics) for video in videos]
    # plain networks
    ldm = LDM.load(args.weights / "ldm.safetensors").eval()
    align = Alignment.load(args.weights / "align.safetensors").eval()

    with open(args.out, "w") as file:
        for name, steps in ROWS:
            if args.rows and f"{name}_{steps}" not in args.rows:
                continue
            measured = []
            begun = time.perf_counter()
            parts = [
                getattr(Ideas(ldm, align, c, settings), name)(x, steps)
                for c, x in zip(conditions.split(args.batch), noise.split(args.batch), strict=True)
            ]
            seconds = (time.perf_counter() - begun) / len(clips)
            for z, clip in zip(torch.cat(parts), clips, strict=True):
                wav = vocode(models.ldm.decode(z[None]))[0]
                measured.append(evaluate.measure(wav, clip, metrics, seconds))
            row, intervals = evaluate.score(measured)
            line = {"row": name, "steps": steps, "seconds": round(seconds, 3)}
            for column in COLUMNS:
                low, high = intervals[column]
                line[column] = [round(row[column], 4), round((high - low) / 2, 4)]
            print(json.dumps(line), flush=True)
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
