"""Pages as sample.py and evaluate.py write them, of small clips and without a model."""

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import torch
from clips import clicks, make, make_video, steady

from common.media import write_wav
from common.onsets import Hit
from film.jobs import Job
from film.page import Page

# a name with what HTML, JSON and URLs take for their own
NAME = 'a #1 100% "quoted" & ü\'s <!--<script>'
# one that a person gave, one that the model found
HITS = (Hit(1.0, 0.9, "wood"), Hit(4.5, None, "glass", is_guess=True))


def outputs(folder, name=NAME, seconds=6.0, candidates=3, codec="libx264"):
    """-> (source, line of --json, output without suffix) of a clip with its sounds."""
    sound = clicks(seconds, (1.0, 4.5))
    source = make_video(
        folder / "in" / f"{name}.mp4", seconds, fps=10, flashes=(1.0, 4.5), sound=sound
    )
    target = folder / f"{name}.foley"
    times = steady(10, seconds)
    levels = [40 + k for k in range(len(times) - 1)]
    # a clock that every codec takes
    tick = Fraction(1, 1000)
    make(f"{target}.mp4", times, levels, wav=sound, codec=codec, tick=tick)
    line = {
        "input": str(source),
        "output": f"{target}.mp4",
        "wav": f"{target}.wav",
        "seconds": seconds,
        "score": -0.1,
    }
    files = [f"{target}.wav"]
    if candidates > 1:
        scores = [-0.5, -0.1, -3.0][:candidates]
        files += [f"{target}.{k}.wav" for k in range(candidates)]
        line["candidates"] = [
            {"wav": wav, "score": score} for wav, score in zip(files[1:], scores, strict=True)
        ]
    for wav in files:
        write_wav(wav, torch.from_numpy(sound))
    return source, line, target


def write_page(folder, made, failed=(), start=0.0, hits=HITS):
    """index.html in `folder`. made: of `outputs`; failed: lines of --json. -> its path.

    start: of --start; hits: in seconds of the source.
    """
    args = SimpleNamespace(page=True, start=start, duration=None, json=True, out=folder)
    page = Page(args, [Job(source, target) for source, _, target in made])
    for source, line, target in made:
        result = None if line.get("kept") else SimpleNamespace(source=source, hits=hits)
        page.add(line, target, result)
    for line in failed:
        page.add(line, None)
    assert page.write()
    return Path(folder) / "index.html"
