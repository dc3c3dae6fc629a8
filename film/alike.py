"""More hits like those that a person has marked: sample.py --onsets FILE --find-rest.

in   marks, which are all hits from the start of a clip to the last of them; what the onset head and
     the finder say of the whole clip (common/controls.py, finder.py)
out  the marks, and the hits that follow

What is filmed differs from the drawn pictures that the networks were trained on, in each clip in
its own way. A few marks say in which: the time up to the last one shows what moves where as
something is hit in this clip, and as nothing is. A logistic regression learns that, of the
principal components of the motion; it adds to the log odds of the networks, which count as much as
ever where the marks say nothing.
"""

import numpy as np
import torch

from common import audio, controls, motion
from common.audio import COLUMN
from finder import MINUTE, ONSET_WEIGHT, inputs, target

LEAST = 2  # marks at different times
AFTER = 0.1  # seconds after the last mark in which there is no other hit
# set by the skill of the hits found in 480 procedural clips; twice or half as much of any of these
# changes it by 0.01 at most
COMPONENTS = 16
DECAY = 10.0  # of the weights of the components
CONSTANT_DECAY = 1.0  # of the constant, which says how often something is hit in this clip
NEWTON_STEPS = 100  # at most; five to ten are usual


def find_rest(marks, head, finder, parts, columns: int):
    """[Hit] in time order: the marks, and those that are found after them.

    marks: LEAST or more Hit; head (columns or more,): log odds of the onset head, a mel column
    each; finder: a `finder.Finder`; parts: all that `finder.minutes` yields of the video. Hits that
    are found have the marks' material, if it is one for all of them and no guess.
    """
    until = max(hit.time for hit in marks) + AFTER

    # of both networks and of the finder alone, what finds the marks better
    said = finder.read_parts(parts)
    sources = [controls.log_odds(head, said, columns), controls.log_odds(None, said, columns)]
    odds = max(sources, key=lambda odds: found_marks(odds, marks, until))

    # what the time up to then says besides
    moving = motion_components(parts, until)
    times = np.arange(len(moving)) / motion.FPS
    column_times = np.arange(columns) * COLUMN
    offsets = np.interp(times, column_times, odds)
    wanted = target([hit.time for hit in marks], 0, len(moving))
    shown = times <= until
    weights = regress(moving[shown], wanted[shown], offsets[shown])
    learned = moving @ weights[:-1] + weights[-1]

    found = controls.find_peaks(odds + np.interp(column_times, times, learned))
    materials = {None if hit.is_guess else hit.material for hit in marks}
    material = materials.pop() if len(materials) == 1 else None
    rest = [hit._replace(material=material) for hit in found if hit.time > until]
    return sorted([*marks, *rest], key=lambda hit: hit.time)


def found_marks(odds, marks, until: float):
    """F1 within 100 ms, against the marks, of the hits of log odds (columns,) up to `until`."""
    hits = [hit.time for hit in controls.find_peaks(odds) if hit.time <= until]
    times = sorted(hit.time for hit in marks)
    _, _, f1 = audio.f1(len(audio.match(hits, times, 0.1)), len(hits), len(times))
    return f1


def count(marks):
    """How many marks there are at different times."""
    return len({hit.time for hit in marks})


@torch.no_grad()
def motion_components(parts, until: float):
    """Principal components of a video's motion, float32 (f, COMPONENTS or fewer) in numpy.

    parts: all that `finder.minutes` yields. The components are those of the minute that `until`
    (seconds) lies in, or of the last one.
    """

    def flat(blocks, kept):
        return inputs(blocks[None].float())[0, kept].flatten(1)  # (f, 7 rows cols)

    minute = flat(*parts[min(int(until * motion.FPS) // MINUTE, len(parts) - 1)])
    mean = minute.mean(0)
    axes = torch.linalg.svd(minute - mean, full_matrices=False).Vh[:COMPONENTS]
    return torch.cat([(flat(*part) - mean) @ axes.T for part in parts]).numpy()


def regress(x, wanted, offsets):
    """Logistic regression with offsets: weights (d + 1,), the last one of a constant.

    x (n, d); wanted (n,): from 0 to 1, as the finder's target; offsets (n,): log odds without x.
    Newton's method (Bishop 2006, section 4.3.3), with a normal prior on the weights; a step that
    does not make the loss smaller is halved, as far from the solution whole ones lead astray.
    """
    x = np.concatenate([x, np.ones((len(x), 1))], 1, dtype=np.float64)
    # as in the finder's loss
    importance = 1 + (ONSET_WEIGHT - 1) * wanted
    decays = np.array([DECAY] * (x.shape[1] - 1) + [CONSTANT_DECAY])

    def loss(weights):
        odds = x @ weights + offsets
        likelihood = importance * np.logaddexp(0, odds) - ONSET_WEIGHT * wanted * odds
        return likelihood.sum() + (decays * weights**2).sum() / 2

    weights = np.zeros(x.shape[1])
    for _ in range(NEWTON_STEPS):
        share = np.exp(-np.logaddexp(0, -(x @ weights + offsets)))
        slope = x.T @ (importance * share - ONSET_WEIGHT * wanted) + decays * weights
        curvature = x.T @ (importance * share * (1 - share) * x.T).T + np.diag(decays)
        step = np.linalg.solve(curvature, slope)
        before = loss(weights)
        while loss(weights - step) > before and np.abs(step).max() > 1e-9:
            step /= 2
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    return weights
