"""What stage 2 may be told beside the features: when something is hit, how hard, of what material.

The paper's network has only the features of the video. The mini preset's conditioner takes these
numbers too, after each feature, where c is the number of mel columns that a feature lasts:

    hits        1 in the mel column of every hit that is told                      c
    strengths   its strength, 0 where that is left open                            c
    given       1 if hits are told: then there are these and no others             1
    materials   1 for each material that may be heard at this time, 0: left open   a number each

A network into which guidance was distilled (distill.py) is told the scales of guidance, too.

Zeros say nothing of a kind, as in training, where each is left out at random. Who tells it the
hits is a person, or `find_hits`: from the features, by a `Head`, from the motion of the picture
(finder.py), or from both; of what material they are, another `Head` says.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.audio import COLUMN
from common.motion import FPS
from common.onsets import Hit

# who finds the hits: the onset head, the picture's motion, both; none: stage 2 is given no hits, as
# published
FINDERS = ("model", "flow", "both", "none")
# scale of the guidance towards materials that somebody names (diffusion.guided_eps): of 0, 2 and 5
# the best on the demo and three clips of seed 3. Without it the picture often has the last word.
# Towards materials that the network finds itself it brings nothing (0, 2, 5: 0.885, 0.885, 0.883 of
# the materials right, 96 clips of seed 3)
EMPHASIS = 5.0
# what the features are multiplied by where a person names a material, so that the picture does not
# have the last word. With 1, 0.7 and 0.5 the judge heard a named material in 0.65, 0.90 and 0.96 of
# the hits (16 procedural clips at real rates, four materials each, mostly not their own); but how
# loud a hit is follows the picture less (correlation with the true strength 0.62, 0.51, 0.42)
SEEN = 0.5
# how far the onset head and the motion of the picture agree (`agreement`): at STRANGE and below the
# head is not asked, from FAMILIAR on it is trusted. Of 460 procedural clips that neither was
# trained on the two agree by less than 0.3 in two, of 20 real ones in seven
STRANGE = 0.2
FAMILIAR = 0.3
BESIDE_HEAD = 0.25  # weight of the motion's log odds beside the head's
QUIET = 0.004  # share of columns with a hit below which a clip counts as quiet (`agreement`)
APART = 3  # mel columns on each side in which only the highest peak is a hit
ONSET_WEIGHT = 6.0  # in the head's loss, of a column with an onset: one in 30 has one
# of the features that the head is trained on, relative to them: what it learns of drawn pictures
# then holds for recorded ones a little better
HEAD_NOISE = 0.5
SURE = 0.5  # share that a material needs to be named by the head
HEAD_REACH = 4  # features on each side that one of the head's columns depends on
HEAD_SPAN = 4096  # features that it looks at at once


class Tracks(NamedTuple):
    """What is said of some clips; None or zeros: nothing. c mel columns to a feature."""

    hits: torch.Tensor | None = None  # (b, f * c) strength in the hits' columns, -1: left open
    given: torch.Tensor | None = None  # (b, 1, 1) 1 where the hits are told
    materials: torch.Tensor | None = None  # (b, f, materials) 0 or 1


class Scales(nn.Module):
    """What a distilled network is told of guidance: its scales (b, 3) -> (b, 1, dim), added to all
    of its context. Zero at first.

    The scales: classifier-free, the classifier's, and that towards named materials; largest: those
    that it was trained up to.
    """

    def __init__(self, largest, dim: int, hidden: int = 64):
        super().__init__()
        self.largest = tuple(largest)
        self.layers = nn.Sequential(nn.Linear(3, hidden), nn.SiLU(), nn.Linear(hidden, dim))
        nn.init.zeros_(self.layers[2].weight)
        nn.init.zeros_(self.layers[2].bias)

    def forward(self, scales):
        weight = self.layers[0].weight
        # a guidance that the network does not have has the largest scale 0
        largest = torch.tensor(self.largest).clamp_min(1e-6)
        return self.layers((scales / largest.to(scales)).to(weight))[:, None]


def check_scales(asked, largest, name: str):
    """Raises ValueError for scales that a distilled network was not trained for; asked: all or the
    first two of the three; name: of the weights."""
    if not largest:
        raise ValueError(
            f"guidance distilled: {name} holds no distilled guidance; take double, or distill it "
            "with distill.py"
        )
    for flag, scale, most in zip(("cfg", "cg"), asked, largest, strict=False):
        # a classifier-free scale of 1 is none
        if not (flag == "cfg") <= scale <= most:
            least = int(flag == "cfg")
            raise ValueError(
                f"{flag} {scale:g}: guidance is distilled from {least} to {most:g}; give such a "
                "scale, or --guidance double"
            )


def width(columns: int, materials: int):
    """How many numbers a feature is given, of `columns` mel columns each."""
    return 2 * columns + 1 + materials


def tokens(tracks: Tracks, features, columns: int, materials: int):
    """-> (b, f, width): the numbers beside features (b, f, d), as the module's table has them."""
    b, f, _ = features.shape
    hits = strengths = features.new_zeros(b, f, columns)
    given = features.new_zeros(b, f, 1)
    named = features.new_zeros(b, f, materials)
    if tracks.given is not None:
        given = given + tracks.given
    if tracks.hits is not None:
        track = tracks.hits.to(features).unflatten(1, (f, columns))
        hits = (track != 0) * given
        strengths = track.clamp_min(0) * given
    if tracks.materials is not None:
        named = named + tracks.materials
    return torch.cat([hits, strengths, given, named], 2)


def fade_picture(conditions, opened, features):
    """-> conditions and opened (b, f, d), with their features faded where the two differ.

    opened: the conditions with the materials left open that a person names; None: nobody does.
    features (b, f, 512): the first numbers of both."""
    if opened is None:
        return conditions, None
    is_named = (conditions != opened).any(2, keepdim=True)
    weight = torch.ones_like(conditions)
    weight[..., : features.shape[2]] = torch.where(is_named, SEEN, 1.0)
    return weight * conditions, weight * opened


# ---- hits as tracks ------------------------------------------------------------------------------


def track_hits(hits, columns: int):
    """Hits (with .time in seconds and .strength) -> float32 (columns,), a number a mel column.

    The strength in the column of a hit, -1 where it is None, 0 where there is no hit. Of several
    hits in a column the strongest one counts.
    """
    track = np.zeros(columns, np.float32)
    for hit in hits:
        column = round(hit.time / COLUMN)
        if 0 <= column < columns:
            track[column] = max(track[column], hit.strength or 0) or -1
    return track


def track_materials(hits, names, count: int, seconds: float):
    """-> int64 (count,): index in `names` of the material of the hit nearest to each feature.

    A feature lasts `seconds`. -1 where that hit has none, or there is no hit.
    """
    if not len(hits):
        return np.full(count, -1)
    middles = (np.arange(count) + 0.5) * seconds
    times = np.array([hit.time for hit in hits])
    # of two that are equally near the earlier one
    nearest = np.searchsorted((times[:-1] + times[1:]) / 2, middles)
    materials = [-1 if hit.material is None else names.index(hit.material) for hit in hits]
    return np.array(materials)[nearest]


def make_tracks(hits, everywhere, names, count: int, columns: int, seconds: float):
    """Tracks of one clip (b = 1) of `count` features that is told these hits and no others.

    A hit's material is its own, or else one of those that may be heard `everywhere`. A feature
    lasts `seconds`, which are `columns` mel columns.
    """
    nearest = torch.from_numpy(track_materials(hits, names, count, seconds))
    materials = one_hot(nearest, len(names))  # (f, materials)
    others = torch.tensor([float(name in everywhere) for name in names])
    materials = torch.where(materials.any(1, keepdim=True), materials, others)
    track = torch.from_numpy(track_hits(hits, count * columns))
    return Tracks(track[None], torch.ones(1, 1, 1), materials[None])


def hits_within(hits, start: float, seconds: float, source):
    """The hits from `start` on for `seconds`, in time from there on; others are warned about."""
    moved = [hit._replace(time=hit.time - start) for hit in hits]
    inside = [hit for hit in moved if 0 <= hit.time < seconds]
    if len(inside) < len(hits):
        warnings.warn(
            f"{source}: {len(hits) - len(inside)} of {len(hits)} hits lie outside of what is made, "
            f"{start:g} to {start + seconds:g} s, and are not played",
            stacklevel=2,
        )
    return inside


def one_hot(materials, count: int):
    """Indices (b, f), -1 for none -> float32 (b, f, count)."""
    return F.one_hot(materials + 1, count + 1)[..., 1:].float()


# ---- finding hits --------------------------------------------------------------------------------


class Head(nn.Module):
    """Features (b, f, d) of the video -> (b, f, outputs) float32, what is said of each.

    Of stage 2's two heads one says onsets, the log odds of a hit in each mel column that a feature
    lasts; the other materials, logits of what is hit.
    """

    def __init__(self, feature_dim: int, outputs: int, hidden: int = 128):
        super().__init__()
        self.scale = feature_dim**0.5  # features are unit vectors
        self.layers = nn.Sequential(
            nn.Conv1d(feature_dim, hidden, 1),
            nn.Conv1d(hidden, hidden, 5, padding=2),
            nn.SiLU(),
            nn.Conv1d(hidden, hidden, 5, padding=2),
            nn.SiLU(),
            nn.Conv1d(hidden, outputs, 1),
        )

    def forward(self, features):
        x = self.scale * features.to(self.layers[0].weight.dtype)
        return self.layers(x.transpose(1, 2)).transpose(1, 2).float()


@torch.no_grad()
def read_head(head: Head, features):
    """What a head says of the features (f, d) of a clip: float32 (f, outputs) in numpy.

    In spans with the frames around them that the head looks at: of an hour at once, its
    intermediate results would be 300 MB.
    """
    said = []
    for first in range(0, len(features), HEAD_SPAN):
        low = max(0, first - HEAD_REACH)
        span = features[low : first + HEAD_SPAN + HEAD_REACH]
        said.append(head(span[None])[0, first - low :][:HEAD_SPAN].cpu().numpy())
    return np.concatenate(said)


def name_materials(hits, logits, names, seconds: float):
    """The hits, each without a material with the one that a head sees, where it is SURE of it.

    logits (f, materials): of features that last `seconds`. A hit's are the mean around it.
    """
    logits = logits - logits.max(1, keepdims=True)
    shares = np.exp(logits)
    shares /= shares.sum(1, keepdims=True)
    named = []
    for hit in hits:
        frame = min(int(hit.time / seconds), len(shares) - 1)
        share = shares[max(0, frame - 1) : frame + 2].mean(0)
        best = int(share.argmax())
        if hit.material is None and share[best] > SURE:
            hit = hit._replace(material=names[best], is_guess=True)
        named.append(hit)
    return named


def log_odds(head, motion, columns: int):
    """Log odds of a hit in each mel column, float64 (columns,), of one source or of both.

    head (columns or more,): of the onset head, a mel column each; motion (n,): of `finder.py`, a
    frame each. Where both are given, the head's count as far as the two agree: motion looks alike
    in all pictures, and the head knows only pictures like those it was trained on.
    """
    if head is not None:
        head = np.asarray(head[:columns], np.float64)
    if motion is not None:
        times = np.arange(columns) * COLUMN
        motion = np.interp(times, np.arange(len(motion)) / FPS, motion)
    if head is None or motion is None:
        return head if motion is None else motion
    trust = np.clip((agreement(head, motion) - STRANGE) / (FAMILIAR - STRANGE), 0, 1)
    return trust * (head + BESIDE_HEAD * motion) + (1 - trust) * motion


def agreement(head, motion):
    """Correlation, -1 to 1, of the probabilities of a hit that two log odds (columns,) stand for.

    About 1 where neither expects any hit.
    """
    kernel = np.ones(3) / 3
    one, other = (np.convolve(1 / (1 + np.exp(-odds)), kernel, "same") for odds in (head, motion))
    one = one - one.mean()
    other = other - other.mean()
    # in a clip without hits what little is left must not decide
    quiet = QUIET * len(one)
    energies = (one @ one + quiet) * (other @ other + quiet)
    return (one @ other + quiet) / math.sqrt(energies)


def find_hits(head, motion, columns: int):
    """-> [Hit] in time order, of one source or of both: see `log_odds`."""
    return find_peaks(log_odds(head, motion, columns))


def find_peaks(odds):
    """Log odds (columns,) -> [Hit] in time order: their peaks where a hit is likelier than none."""
    padded = np.pad(odds, APART, constant_values=-np.inf)
    highest = np.lib.stride_tricks.sliding_window_view(padded, 2 * APART + 1).max(1)
    # of equal columns the first
    rises = np.diff(odds, prepend=-np.inf) > 0
    return [Hit(float(k) * COLUMN) for k in np.flatnonzero((odds == highest) & rises & (odds > 0))]


def onset_loss(logits, hits):
    """Cross-entropy (b,) of the onset head's log odds (b, s) against the hits (b, s), 0: none.

    A neighbor of a hit's column counts as half an onset, since no picture says it more exactly.
    """
    onset = (hits != 0).float()
    target = F.max_pool1d(onset[:, None], 3, 1, 1)[:, 0] / 2 + onset / 2
    weight = torch.tensor(ONSET_WEIGHT, device=logits.device)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none", pos_weight=weight)
    return loss.mean(1)


def material_loss(logits, materials, hits):
    """Cross-entropy (b,) of the material head's logits (b, f, n) where something is hit.

    materials (b, f): indices, -1 unknown; hits (b, f * c). A hit counts in its feature and in
    those beside it.
    """
    is_hit = (hits != 0).float().unflatten(1, (logits.shape[1], -1)).amax(2)  # (b, f)
    near = F.max_pool1d(is_hit[:, None], 3, 1, 1)[:, 0]
    loss = F.cross_entropy(logits.transpose(1, 2), materials, ignore_index=-1, reduction="none")
    return (near * loss).sum(1) / near.sum(1).clamp_min(1)


# ---- what training leaves out --------------------------------------------------------------------


def draw(features, hits, materials, stranger, count: int, conditional, u):
    """-> features and Tracks as the conditioner sees them. u (b, 4) is uniform in [0, 1).

    features (b, f, d); hits (b, f * c); materials (b, f) indices; stranger (b,): 1 where the
    features are another clip's; conditional (b, 1, 1): 0 where the item trains the unconditional
    branch, which is told nothing. count: of materials.

    Half of the items are told their hits. So are all items with another clip's features, and their
    materials: what is told counts, whatever is to be seen. The others go by the features.
    """
    stranger = stranger == 1
    given = (u[:, 0] < 0.5) | stranger
    # the strength is left open for a quarter of them
    is_open = (u[:, 1] < 0.25)[:, None] & (hits != 0)

    # materials: of the nearest hit, or all of the clip at any time; for half of the items
    known = one_hot(materials, count)
    whole = known.amax(1, keepdim=True).expand_as(known)
    known = torch.where((u[:, 2] < 0.5)[:, None, None], known, whole)
    named = (u[:, 3] < 0.5) | stranger

    tracks = Tracks(
        hits=torch.where(is_open, -1.0, hits),
        given=given[:, None, None] * conditional,
        materials=known * named[:, None, None] * conditional,
    )
    return features * conditional, tracks


def head_items(features, hits, materials, stranger, noise):
    """-> what the heads learn from: features (b, f, d) with noise of HEAD_NOISE, the hits in them
    and their materials, and 0 for items whose features are another clip's, 1 for the others."""
    noisy = features + HEAD_NOISE * features.shape[2] ** -0.5 * noise
    return F.normalize(noisy, dim=2), hits, materials, 1 - stranger
