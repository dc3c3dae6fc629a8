"""A window whose sound does not play the hits that it was given is drawn again: sample.py --tries.

in   windows of clips that are told hits (film/windows.py), and what draws and decodes them
out  of each window the draw that leaves out and adds the fewest hits

The U-Net now and then leaves out a hit that it is told, or adds one that it sees in the picture.
From other noise it seldom makes the same mistake.
"""

import math

import torch

from common import audio
from common.audio import COLUMN, HOP
from film.windows import COLUMNS, KEPT, known_latents
from ldm import LATENT_SHAPE

TOLERANCE = 0.05  # seconds between a hit and its sound
CLOSEST = audio.APART * COLUMN  # seconds; of hits that are no farther apart one onset is heard


def draw_best(windows, draw, decode, tries: int):
    """[(latents (4, 16, 64), score)] of windows: of each the best of `tries` draws, or the first
    one without a fault.

    windows: [(clip, candidate, start)]; draw(windows, k): such a list, from the k-th noise;
    decode(windows, latents (b, 4, 16, 64)): mels (b, 128, 512). Those of clips of one window are
    kept in `clip.mels`, of KEPT candidates at most, so that they are decoded once.
    """
    if tries == 1 or not any(clip.is_told for clip, _, _ in windows):
        return draw(windows, 0)
    best = {}  # number of a window -> its best draw
    least = [math.inf] * len(windows)  # faults of that draw
    for attempt in range(tries):
        again = [k for k, count in enumerate(least) if count]
        if not again:
            break
        wrong = [windows[k] for k in again]
        drawn = draw(wrong, attempt)
        mels = decode(wrong, torch.stack([z for z, _ in drawn])).float().cpu()
        for k, new, mel in zip(again, drawn, mels, strict=True):
            # one that has diverged is no better than what was drawn before
            if attempt and not mel.isfinite().all():
                continue
            count = count_faults(mel, *windows[k])
            # of equal draws the first
            if count < least[k]:
                least[k] = count
                best[k] = new
                clip, candidate, _ = windows[k]
                has_room = candidate in clip.mels or len(clip.mels) < KEPT
                if len(clip.starts) == 1 and has_room and mel.isfinite().all():
                    # a copy of its own, which does not hold the whole batch
                    clip.mels[candidate] = {0: mel.clone()}
    return [best[k] for k in range(len(windows))]


def count_faults(mel, clip, candidate: int, start: int):
    """Hits of a window that its mel (128, 512) leaves out or adds, in what is drawn of it.

    The rest is known of its neighbors, or lies behind the clip's end. In its first two columns
    nothing counts.
    """
    # a sampler that has diverged is reported where the sound is made
    if not mel.isfinite().all():
        return 0
    # in seconds from the window's start
    begin = start / audio.SAMPLE_RATE
    told = []
    for time in sorted(hit.time - begin for hit in clip.hits):
        if 0 <= time < COLUMNS * COLUMN and (not told or time - told[-1] > CLOSEST):
            told.append(time)
    heard = audio.detect_onsets(mel.numpy()).tolist()

    _, is_known = known_latents(clip, candidate, start)
    is_drawn = ~is_known.repeat_interleave(COLUMNS // LATENT_SHAPE[2])  # (512,)
    is_drawn[max(0, (clip.samples - start) // HOP) :] = False
    # of what sounds in the first columns nobody can hear whether it begins there
    is_drawn[: audio.LAG] = False
    pairs = audio.match(heard, told, TOLERANCE)
    played = {k for _, k in pairs}
    asked = {k for k, _ in pairs}
    wrong = [time for k, time in enumerate(told) if k not in played]
    wrong += [time for k, time in enumerate(heard) if k not in asked]
    return sum(bool(is_drawn[min(round(time / COLUMN), COLUMNS - 1)]) for time in wrong)
