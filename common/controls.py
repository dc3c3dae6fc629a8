"""What stage 2 may be told beside the features: when something is hit, how hard, of what material.

The paper's network has only the features of the video. The mini preset's conditioner takes these
numbers too, after each feature, where c is the number of mel columns that a feature lasts:

    hits        1 in the mel column of every hit that is told                      c
    strengths   its strength, 0 where that is left open                            c
    told        1 if hits are told: then there are these and no others             1
    curve       probability of an onset in each mel column, by `OnsetHead`         c
    seen        1 if there is a curve                                              1
    materials   1 for each material that may be heard at this time, 0: left open   a number each

Zeros say nothing of a kind, as in training, where each is left out at random.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.audio import COLUMN

MOTION_FPS = 25
HEARD = 0.35  # of the curve: the peaks above it are hits
APART = 3  # mel columns on each side in which only the highest peak is one
ONSET_WEIGHT = 6.0  # in the head's loss, of a column with an onset: one in 30 has one


class Tracks(NamedTuple):
    """What is said of some clips; None or zeros: nothing. c mel columns to a feature."""

    hits: torch.Tensor | None = None  # (b, f * c) strength in the hits' columns, -1: left open
    told: torch.Tensor | None = None  # (b, 1, 1) 1 where the hits are told
    curve: torch.Tensor | None = None  # (b, f * c) in [0, 1]
    seen: torch.Tensor | None = None  # (b, 1, 1) 1 where there is a curve
    materials: torch.Tensor | None = None  # (b, f, materials) 0 or 1


def width(columns: int, materials: int):
    """How many numbers a feature is given, of `columns` mel columns each."""
    return 3 * columns + 2 + materials


def tokens(tracks: Tracks, features, columns: int, materials: int):
    """-> (b, f, width): the numbers beside features (b, f, d), as the module's table has them."""
    b, f, _ = features.shape
    nothing = features.new_zeros(b, f, columns)
    no = features.new_zeros(b, f, 1)
    told = no if tracks.told is None else no + tracks.told
    seen = no if tracks.seen is None else no + tracks.seen
    hits = strengths = curve = nothing
    if tracks.hits is not None:
        given = tracks.hits.to(features).unflatten(1, (f, columns))
        hits = (given != 0) * told
        strengths = given.clamp_min(0) * told
    if tracks.curve is not None:
        curve = tracks.curve.to(features).unflatten(1, (f, columns)) * seen
    heard = features.new_zeros(b, f, materials)
    if tracks.materials is not None:
        heard = heard + tracks.materials
    return torch.cat([hits, strengths, told, curve, seen, heard], 2)


# ---- hits as tracks ------------------------------------------------------------------------------


def track_hits(hits, columns: int):
    """Hits (with .time in seconds and .strength) -> float32 (columns,), a number a mel column.

    The strength in the column of a hit, -1 where it is None, 0 where there is no hit. Of two hits
    in a column the last one counts.
    """
    track = np.zeros(columns, np.float32)
    for hit in hits:
        column = round(hit.time / COLUMN)
        if 0 <= column < columns:
            track[column] = -1 if hit.strength is None else hit.strength
    return track


def track_materials(hits, names, count: int, seconds: float):
    """-> int64 (count,): index in `names` of the material of the hit nearest to each feature.

    A feature lasts `seconds`. -1 where no hit has a material.
    """
    known = [hit for hit in hits if hit.material is not None]
    if not known:
        return np.full(count, -1)
    middles = (np.arange(count) + 0.5) * seconds
    times = np.array([hit.time for hit in known])
    nearest = np.abs(middles[:, None] - times).argmin(1)
    return np.array([names.index(hit.material) for hit in known])[nearest]


def track_motion(motion, columns: int, start: float = 0.0):
    """Motion (n,), MOTION_FPS a second, -> float32 (columns,) of mel columns from `start` s on.

    0 after its end, and where there is none.
    """
    if not len(motion):
        return np.zeros(columns, np.float32)
    times = start + np.arange(columns) * COLUMN
    known = np.arange(len(motion)) / MOTION_FPS
    return np.interp(times, known, motion, right=0.0).astype(np.float32)


def one_hot(materials, count: int):
    """Indices (b, f), -1 for none -> float32 (b, f, count)."""
    return F.one_hot(materials + 1, count + 1)[..., 1:].float()


def peaks(curve):
    """Curve (s,), a number a mel column -> [(seconds, height)] of its hits, ascending."""
    curve = np.asarray(curve, np.float32)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(curve, APART), 2 * APART + 1).max(1)
    rises = np.concatenate([[True], curve[1:] > curve[:-1]])  # of equal columns the first
    columns = np.flatnonzero((curve >= around) & rises & (curve > HEARD))
    return [(float(k) * COLUMN, float(curve[k])) for k in columns]


# ---- the onset head ------------------------------------------------------------------------------


class OnsetHead(nn.Module):
    """Features of the video, or its motion, or both -> log odds of an onset in each mel column.

    features (b, f, d) and motion (b, f * columns), see common/motion.py; zeros: not known.
    """

    def __init__(self, feature_dim: int, columns: int, hidden: int = 64):
        super().__init__()
        self.scale = feature_dim**0.5  # features are unit vectors
        self.columns = columns
        self.features = nn.Linear(feature_dim, hidden)
        self.motion = nn.Linear(columns, hidden)
        self.layers = nn.Sequential(
            nn.Conv1d(hidden, hidden, 5, padding=2),
            nn.SiLU(),
            nn.Conv1d(hidden, hidden, 5, padding=2),
            nn.SiLU(),
            nn.Conv1d(hidden, columns, 1),
        )

    def forward(self, features, motion):
        features = features.to(self.features.weight.dtype)
        motion = motion.to(features).unflatten(1, (-1, self.columns))
        x = self.features(self.scale * features) + self.motion(motion)
        return self.layers(x.transpose(1, 2)).transpose(1, 2).flatten(1).float()


def onset_loss(logits, hits):
    """Cross-entropy (b,) of the head's log odds (b, s) against the hits (b, s), 0: none.

    A neighbor of a hit's column counts as half an onset, since no picture says it more exactly.
    """
    onset = (hits != 0).float()
    target = F.max_pool1d(onset[:, None], 3, 1, 1)[:, 0] / 2 + onset / 2
    weight = torch.tensor(ONSET_WEIGHT, device=logits.device)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none", pos_weight=weight)
    return loss.mean(1)


# ---- what training leaves out --------------------------------------------------------------------


class Draw(NamedTuple):
    """What some items are shown in a step, each item by random numbers of its own."""

    features: torch.Tensor  # (b, f, d) for the conditioner
    tracks: Tracks  # but for the curve, which the head computes
    hits: torch.Tensor  # (b, f * c) all of them: what the head is to find
    head_features: torch.Tensor  # (b, f, d) for the head
    head_motion: torch.Tensor  # (b, f * c)
    shift: torch.Tensor  # (b,) mel columns by which the curve is late
    kept: torch.Tensor  # (b, f * c) 0 where the curve shows nothing, 1 elsewhere
    own: torch.Tensor  # (b,) 1 where the features are the item's own: the head's loss counts


def draw(features, motion, hits, materials, stranger, count: int, conditional, u):
    """-> Draw. u (b, 9 + f / 8) is uniform in [0, 1).

    features (b, f, d); motion and hits (b, f * c); materials (b, f) indices; stranger (b,): 1 where
    the features are another clip's; conditional (b, 1, 1): 0 where the item trains the
    unconditional branch, which is told nothing. count: of materials.

    Half of the items are told their hits. These are exact, so that at use they are followed to the
    letter. So are all items with another clip's features, and their materials: what is told counts,
    whatever is to be seen. The others see the head's curve, which at use is often wrong: it comes
    late or early, lacks hits, or is not there.
    """
    u = u.to(features.device)
    stranger = stranger == 1
    told = (u[:, 0] < 0.5) | stranger
    seen = u[:, 1] < torch.where(told, 0.2, 0.75)
    # the strength is left open for a quarter of them
    open_strength = u[:, 2] < 0.25
    hits_told = torch.where(open_strength[:, None] & (hits != 0), -1.0, hits)

    # materials: of the nearest hit, or all of the clip at any time; for half of the items, and for
    # all whose features are another's
    known = one_hot(materials, count)
    whole = known.amax(1, keepdim=True).expand_as(known)
    known = torch.where((u[:, 3] < 0.5)[:, None, None], known, whole)
    named = ((u[:, 4] < 0.5) | stranger)[:, None, None].float()

    tracks = Tracks(
        hits=hits_told,
        told=told[:, None, None].float() * conditional,
        seen=seen[:, None, None].float() * conditional,
        materials=known * named * conditional,
    )
    # the head learns to do with either of its inputs
    head_features = features * (u[:, 5] >= 0.3)[:, None, None]
    head_motion = motion * (u[:, 6] >= 0.4)[:, None]
    # half a second is missing here and there, in half of the items
    thinned = (u[:, 8:9] < 0.5) & (u[:, 9:] < 0.12)
    kept = (~thinned).float().repeat_interleave(motion.shape[1] // thinned.shape[1], 1)
    shift = (u[:, 7] * 5).long() - 2
    # no features of others for it
    scale = (~stranger).float()
    return Draw(
        features * conditional, tracks, hits, head_features, head_motion, shift, kept, scale
    )


def shown_curve(logits, drawn: Draw):
    """The head's log odds (b, s) -> the curve as training shows it: late or early, with gaps."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    late = (columns - drawn.shift[:, None]) % logits.shape[1]
    return logits.detach().sigmoid().gather(1, late) * drawn.kept
