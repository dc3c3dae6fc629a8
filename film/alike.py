"""The remaining hits of a clip, by the first ones that a person marked: sample.py --find-rest.

in   the marks: all hits from the clip's start to the last of them; log odds of the onset head
     (common/controls.py); the finder, and the block motion of the clip (finder.py)
out  the marks, and the predicted hits after them

Footage differs from the drawn clips that the networks were trained on, and each clip differs in its
own way. The marked part has examples of hits, and of motion without hits, in this very clip. A
logistic regression is fitted to it, on principal components of the block motion. The log odds of
the networks are its offset, so they decide where the marks say nothing.
"""

import numpy as np
import torch

from common import audio, controls, motion
from common.audio import COLUMN
from finder import MINUTE, ONSET_WEIGHT, inputs, target

LEAST = 2  # marks at different times
AFTER = 0.1  # seconds after the last mark that still belong to the marked part
# Chosen by the skill of the predicted hits on 480 procedural clips, in a study that is not kept.
# Half or twice any of the three changes that skill by 0.01 at most
COMPONENTS = 16
DECAY = 10.0  # weight decay of the components' weights
CONSTANT_DECAY = 1.0  # and of the constant, which adapts to how often something is hit
NEWTON_STEPS = 100  # at most


def find_rest(marks, head_odds, finder, parts, columns: int):
    """[Hit] in time order: the marks, and the hits that are predicted after them.

    marks: LEAST or more Hit; head_odds (columns or more,): log odds of the onset head, a mel column
    each; finder: a `finder.Finder`; parts: all that `finder.minutes` yields of the video. Predicted
    hits get the material of the marks, if all have the same and it is no guess.
    """
    end = max(hit.time for hit in marks) + AFTER

    # both networks together or the finder alone, whichever predicts the marks better
    finder_odds = finder.read_parts(parts)
    candidates = [
        controls.log_odds(head_odds, finder_odds, columns),
        controls.log_odds(None, finder_odds, columns),
    ]
    odds = max(candidates, key=lambda odds: marks_f1(odds, marks, end))

    # fit the regression to the marked part
    components = motion_components(parts, end)
    times = np.arange(len(components)) / motion.FPS
    column_times = np.arange(columns) * COLUMN
    offsets = np.interp(times, column_times, odds)
    labels = target([hit.time for hit in marks], 0, len(components))
    is_marked = times <= end
    weights = regress(components[is_marked], labels[is_marked], offsets[is_marked])
    correction = components @ weights[:-1] + weights[-1]

    predicted = controls.find_peaks(odds + np.interp(column_times, times, correction))
    materials = {None if hit.is_guess else hit.material for hit in marks}
    material = materials.pop() if len(materials) == 1 else None
    rest = [hit._replace(material=material) for hit in predicted if hit.time > end]
    return sorted([*marks, *rest], key=lambda hit: hit.time)


def marks_f1(odds, marks, end: float):
    """F1 within 100 ms of the hits that log odds (columns,) predict up to `end`, in seconds."""
    predicted = [hit.time for hit in controls.find_peaks(odds) if hit.time <= end]
    annotated = sorted(hit.time for hit in marks)
    pairs = len(audio.match(predicted, annotated, 0.1))
    return audio.f1(pairs, len(predicted), len(annotated))[2]


def count_times(marks):
    """Number of different times among the marks."""
    return len({hit.time for hit in marks})


@torch.no_grad()
def motion_components(parts, end: float):
    """Principal components of a video's motion, float32 (f, COMPONENTS or fewer) in numpy.

    parts: all that `finder.minutes` yields. The axes are fitted to the minute in which the marked
    part ends, at `end` seconds.
    """

    def flat(blocks, kept):
        return inputs(blocks[None].float())[0, kept].flatten(1)  # (f, 7 rows cols)

    minute = flat(*parts[min(int(end * motion.FPS) // MINUTE, len(parts) - 1)])
    mean = minute.mean(0)
    axes = torch.linalg.svd(minute - mean, full_matrices=False).Vh[:COMPONENTS]
    return torch.cat([(flat(*part) - mean) @ axes.T for part in parts]).numpy()


def regress(x, labels, offsets):
    """Logistic regression with offsets: weights (d + 1,), the last one of a constant.

    x (n, d); labels (n,) from 0 to 1, as of `finder.target`; offsets (n,): log odds to add to.
    Newton's method (Bishop 2006, section 4.3.3) with weight decay. A step that does not reduce the
    loss is halved: full steps diverge where the offsets are far from 0.
    """
    x = np.concatenate([x, np.ones((len(x), 1))], 1, dtype=np.float64)
    # as in the finder's loss
    importance = 1 + (ONSET_WEIGHT - 1) * labels
    decays = np.array([DECAY] * (x.shape[1] - 1) + [CONSTANT_DECAY])

    def loss(weights):
        odds = x @ weights + offsets
        likelihood = importance * np.logaddexp(0, odds) - ONSET_WEIGHT * labels * odds
        return likelihood.sum() + (decays * weights**2).sum() / 2

    weights = np.zeros(x.shape[1])
    for _ in range(NEWTON_STEPS):
        share = np.exp(-np.logaddexp(0, -(x @ weights + offsets)))
        slope = x.T @ (importance * share - ONSET_WEIGHT * labels) + decays * weights
        curvature = x.T @ (importance * share * (1 - share) * x.T).T + np.diag(decays)
        step = np.linalg.solve(curvature, slope)
        before = loss(weights)
        while loss(weights - step) > before and np.abs(step).max() > 1e-9:
            step /= 2
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    return weights
