"""Windows of a long clip: where they start, which is drawn after which, and one spectrogram of all.

in   length of the sound, and latents (4, 16, 64) of windows that are drawn
out  start samples; what a window knows of its neighbors; a Spectrogram (128, columns), decoded
     where it is read

Every other window, the first among them, is drawn by itself; those between follow and know their
neighbors' latents in the half of each overlap that is nearer to the neighbor's middle. So they
agree, whatever is drawn at once or in an earlier run. Windows that do not start on latent columns
(at 4 frames a second some cannot) share none; they are drawn by themselves and only cross-faded.
"""

import itertools
import math
from fractions import Fraction

import torch

from common.audio import HOP, N_MELS, SAMPLE_RATE, WINDOW
from common.checkpoints import CheckpointError
from common.files import UserError
from ldm import LATENT_SHAPE

COLUMNS = WINDOW // HOP  # mel columns of a window
LATENT_HOP = WINDOW // LATENT_SHAPE[2]  # samples of a latent column
FADE = 32  # mel columns of a cross-fade: long against a hit, short against the overlap
OVERLAP = 16384  # samples that neighboring windows share at least
KEPT = 16  # decoded windows that a Spectrogram holds: 4 MB, more than a span of the vocoder reads


# ---- where windows start -------------------------------------------------------------------------


def plan_windows(samples: int, fps: float) -> list[int]:
    """Start samples of the windows that cover `samples` of sound.

    Starts are multiples of a grid on which video features and mel columns coincide (and latent
    columns, where those can), counted from the clip's beginning: nothing adds up. Windows are
    spread evenly: where the last one would end long after the clip, all overlap more instead.
    Raises CheckpointError for frame rates that meet mel columns too rarely.
    """
    grid = window_grid(fps)
    # the start of the last window, and how many gaps of at most WINDOW - OVERLAP lead to it
    last = math.ceil(max(0, samples - WINDOW) / grid)  # in steps of the grid, as all below
    gaps = math.ceil(last / ((WINDOW - OVERLAP) // grid))
    return [last * k // max(1, gaps) * grid for k in range(gaps + 1)]


def window_grid(fps: float) -> int:
    """Samples between the places where a window may start. Raises CheckpointError."""
    # exact, as a rate such as 15.625 or 29.97 makes no whole number of samples
    frame = SAMPLE_RATE / Fraction(fps).limit_denominator(1001)  # samples of one video feature
    # on latent columns if a fine enough grid has them, else on mel columns
    grids = [
        math.lcm(frame.numerator, n * frame.denominator) // frame.denominator
        for n in (LATENT_HOP, HOP)
    ]
    grid = next((g for g in grids if g <= WINDOW // 4), None)
    if grid is None:
        raise CheckpointError(
            f"these weights want {float(fps):g} frames a second, which meet mel columns (62.5 a "
            "second) too rarely to place windows; train at 15.625, 12.5, 25 or 4"
        )
    return grid


# ---- who knows whom ------------------------------------------------------------------------------


def plan_needs(starts: list[int]) -> dict[int, tuple[int, ...]]:
    """{start of a window: those of its neighbors, which are drawn before it}, in drawing order."""
    alone = starts
    between = []
    if all(start % LATENT_HOP == 0 for start in starts):
        alone = starts[::2]
        between = starts[1::2]
    needs = dict.fromkeys(alone, ())
    for k, start in enumerate(between):
        # the last one may have none behind it; those of stretches that are redone may be far apart
        neighbors = alone[k : k + 2]
        needs[start] = tuple(other for other in neighbors if abs(other - start) < WINDOW)
    return needs


def take_batch(waiting, least: int, most: int) -> list:
    """Remove the first of the (clip, candidate, start) whose neighbors are drawn, and return them.

    At most `most`; none where they are fewer than `least`.
    """
    possible = (window for window in waiting if window[0].can_draw(*window[1:]))
    batch = list(itertools.islice(possible, most))
    if len(batch) < least:
        return []
    for window in batch:
        waiting.remove(window)
    return batch


def shared_columns(start: int, other: int):
    """-> two slices of latent columns, of the window at `start` and of the other: their overlap."""
    shift = (other - start) // LATENT_HOP
    width = LATENT_SHAPE[2]
    return slice(max(0, shift), width + min(0, shift)), slice(max(0, -shift), width - max(0, shift))


def known_latents(clip, candidate: int, start: int):
    """-> latents (4, 16, 64) of a window, and which of its columns (64,) are known.

    Known is what `clip.known` tells, and of drawn neighbors the half of the overlap that lies
    farther inside of them.
    """
    nothing = torch.zeros(LATENT_SHAPE), torch.zeros(LATENT_SHAPE[2], dtype=torch.bool)
    z, is_known = clip.known.get((candidate, start), nothing)
    for other in clip.needs.get(start, ()):
        own, theirs = shared_columns(start, other)
        half = (own.stop - own.start) // 2
        # the neighbor before knows the first half best, the one behind the second
        if other < start:
            own = slice(own.start, own.start + half)
            theirs = slice(theirs.start, theirs.start + half)
        else:
            own = slice(own.stop - half, own.stop)
            theirs = slice(theirs.stop - half, theirs.stop)
        new = torch.zeros_like(is_known)
        new[own] = True
        new &= ~is_known
        placed = torch.zeros_like(z)
        placed[..., own] = clip.latents[candidate, other][..., theirs]
        z = torch.where(new, placed, z)
        is_known = is_known | new
    return z, is_known


def agreed(clip, candidate: int) -> list[torch.Tensor]:
    """Latents (4, 16, 64) of a candidate's windows in order of time, the same where they overlap.

    Windows that were drawn knowing their neighbors have the last word.
    """
    latents = {start: clip.latents[candidate, start] for start in clip.starts}
    for start, needs in clip.needs.items():
        for other in needs:
            own, theirs = shared_columns(start, other)
            latents[other] = latents[other].clone()
            latents[other][..., theirs] = latents[start][..., own]
    return list(latents.values())


# ---- one spectrogram -----------------------------------------------------------------------------


def fade_weights(starts):
    """(n, 512): the share of each window in its own mel columns; those of a column sum to one.

    Windows hand over linearly in the middle of their overlap, where both have seen what comes
    before and after.
    """
    centers = torch.arange(COLUMNS, dtype=torch.float64) + 0.5  # counted from a window's start
    shares = torch.ones(len(starts), COLUMNS, dtype=torch.float64)
    for k, (before, after) in enumerate(itertools.pairwise(starts)):
        middle = (before + WINDOW + after) / 2
        # how far each column is past the middle, in lengths of the fade
        past_before = (centers - (middle - before) / HOP) / FADE
        past_after = (centers - (middle - after) / HOP) / FADE
        shares[k] -= (0.5 + past_before).clamp(0, 1)
        shares[k + 1] -= (0.5 - past_after).clamp(0, 1)
    return shares.float()


class Spectrogram:
    """The mel (128, columns) of a clip: sliced like a tensor, and decoded where it is read.

    latents: (4, 16, 64) of the windows at `starts`; decode: (b, 4, 16, 64) -> mels (b, 128, 512);
    batch: windows decoded at once; name: of the clip, for errors; mels: {number: mel} of windows
    that are decoded already. A window takes 16 KB this way instead of 256. Slices raise UserError
    where the sampler has diverged.
    """

    def __init__(
        self, latents, starts, columns: int, decode, batch: int = 1, name="clip", mels=None
    ):
        self.latents = latents
        self.starts = starts
        self.shape = (N_MELS, columns)
        self.decode = decode
        self.batch = batch
        self.name = name
        self.shares = fade_weights(starts)
        self.mels = mels or {}  # number of a window -> its mel, of those read last

    def __getitem__(self, key):
        rows, columns = key
        low, high, _ = columns.indices(self.shape[1])
        high = max(low, high)
        return self.read(low, high)[rows]

    def read(self, low: int, high: int):
        """(128, high - low): windows are cross-faded as amplitudes.

        An event that only one of two windows has drops by 6 dB halfway; averaging logarithms would
        halve its level in dB.
        """
        firsts = [start // HOP for start in self.starts]
        reaching = [k for k, first in enumerate(firsts) if first < high and first + COLUMNS > low]
        if self.starts == [0]:
            return self.window(0, reaching)[:, low:high]
        # a mel is 0.2 log10 of the amplitude, and a constant that cancels
        amplitude = torch.zeros(N_MELS, high - low)
        for k in reaching:
            a = max(low, firsts[k])
            b = min(high, firsts[k] + COLUMNS)
            own = slice(a - firsts[k], b - firsts[k])
            mel = self.window(k, reaching)
            amplitude[:, a - low : b - low] += self.shares[k, own] * 10 ** (5 * mel[:, own])
        return amplitude.log10_().mul_(0.2)

    def window(self, k: int, wanted):
        """The mel (128, 512) of window k, decoded with those of `wanted` that follow it."""
        if k not in self.mels:
            group = [j for j in wanted if j >= k and j not in self.mels][: self.batch]
            mels = self.decode(torch.stack([self.latents[j] for j in group])).float().cpu()
            if not mels.isfinite().all():
                raise UserError(f"{self.name}: the sampler diverged; give smaller --cfg or --cg")
            self.mels.update(zip(group, mels, strict=True))
            # the oldest go
            for old in list(self.mels)[: max(0, len(self.mels) - max(KEPT, self.batch))]:
                del self.mels[old]
        return self.mels[k]
