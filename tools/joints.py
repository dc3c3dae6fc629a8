"""Whether redone stretches can be heard by their joints: steps of the level there.

in   a folder of clips with sound; two stretches of each are redone, of its own sound
out  the largest step of the level between neighboring 16 ms within 80 ms: at the beginnings and
     ends of stretches, in the redone sound and in the clip's own, and at random places; dB, means
     with 95 % intervals (bootstrap). What is below -60 dBFS counts as that.

    python foley.py clips --clips 40 --seed 31
    python -m tools.joints clips

A rise is a hit, in any sound; a fall that the clips' own sound does not have is something cut off.
"""

import argparse
import warnings
from pathlib import Path

import numpy as np

from common.audio import SAMPLE_RATE
from common.media import read_audio
from sample import Settings, generate, load_models

FRAME = 256  # samples
NEAR = 1280  # samples on each side


def steps(wav, second):
    """Sound (n,) -> the largest rise and the largest fall of the level near a time, dB."""
    at = round(second * SAMPLE_RATE)
    frames = wav[at - NEAR : at + NEAR].reshape(-1, FRAME)
    level = 10 * np.log10(np.maximum(np.square(frames).mean(1), 1e-6))
    change = np.diff(level)
    return change.max(), -change.min()


def stretches(rng):
    """Two of 0.8 to 1.6 s, in a clip of 8."""
    starts = rng.uniform(0.6, 1.4), rng.uniform(4.2, 5.2)
    return [(start, start + rng.uniform(0.8, 1.6)) for start in starts]


def row(name, values):
    """A line of the table: rises and falls (n, 2)."""
    values = np.array(values)
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    cells = [
        f"{m:.1f} [{a:.1f}, {b:.1f}]" for m, a, b in zip(values.mean(0), low, high, strict=True)
    ]
    print(f"| {name} | " + " | ".join(cells) + " |")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("clips", type=Path, help="folder of mp4 files of 8 seconds")
    p.add_argument("--weights", default="mini", help="as of sample.py")
    args = p.parse_args(argv)
    paths = sorted(args.clips.glob("*.mp4"))
    if not paths:
        p.error(f"{args.clips}: no mp4 files in it")
    warnings.simplefilter("ignore")  # about the files
    models = load_models(args.weights, encoder=True)
    rng = np.random.default_rng(0)
    found = {}
    for k, path in enumerate(paths):
        redo = stretches(rng)
        # as any draw joins, not the best of several
        settings = Settings(redo=tuple(redo), seed=k, lufs=None, tries=1)
        result = generate(path, models, settings=settings)
        sounds = {"redone": result.wav.numpy(), "own": read_audio(path).numpy()}
        places = {
            "beginnings": [start for start, _ in redo],
            "ends": [end for _, end in redo],
            "random places": rng.uniform(0.3, 7.5, 10),
        }
        for where, times in places.items():
            for name, wav in sounds.items():
                found.setdefault((where, name), []).extend(steps(wav, time) for time in times)
    print("| | rise, dB | fall, dB |\n|---|---|---|")
    for (where, name), values in found.items():
        row(f"{where}, {name}", values)


if __name__ == "__main__":
    main()
