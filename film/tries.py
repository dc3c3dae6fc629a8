"""A window whose sound does not play the hits that it was given is drawn again: sample.py --tries.

in   windows of clips that are given hits (film/windows.py); functions that sample and decode them
out  of each window the latents whose sound leaves out and adds the fewest hits

The U-Net now and then leaves out a hit that it is given, or adds one that it sees in the picture.
From other noise it seldom makes the same mistake.
"""

import math

import torch

from common import audio
from common.audio import APART, COLUMN, HOP
from film.windows import COLUMNS, KEPT, known_latents
from ldm import LATENT_SHAPE

TOLERANCE = 0.05  # seconds between a hit and its sound


def best_of_tries(windows, sample_latents, decode, tries: int):
    """[(latents (4, 16, 64), score)] of windows: of each the best of `tries` attempts, or the first
    one without a fault.

    windows: [(clip, candidate, start)]; sample_latents(windows, k): such a list, from the k-th
    noise; decode(windows, latents (b, 4, 16, 64)): mels (b, 128, 512). Those of clips of one window
    are kept in `clip.mels`, of KEPT candidates at most, so that they are decoded once.
    """
    if tries == 1 or not any(clip.hits_given for clip, _, _ in windows):
        return sample_latents(windows, 0)
    best = {}  # number of a window -> its latents and score
    least = [math.inf] * len(windows)  # faults of these
    for attempt in range(tries):
        again = [k for k, faults in enumerate(least) if faults]
        if not again:
            break
        wrong = [windows[k] for k in again]
        sampled = sample_latents(wrong, attempt)
        mels = decode(wrong, torch.stack([z for z, _ in sampled])).float().cpu()
        for k, new, mel in zip(again, sampled, mels, strict=True):
            if not mel.isfinite().all():
                # the sampler has diverged: in a first attempt that is said where the sound is made
                if attempt == 0:
                    best[k] = new
                    least[k] = 0
                continue
            faults = count_faults(mel, *windows[k])
            # of equal attempts the first
            if faults < least[k]:
                best[k] = new
                least[k] = faults
                keep_mel(mel, *windows[k])
    return [best[k] for k in range(len(windows))]


def keep_mel(mel, clip, candidate: int, start: int):
    """Sets the mel of a clip's only window in `clip.mels`, of KEPT candidates at most."""
    has_room = candidate in clip.mels or len(clip.mels) < KEPT
    if clip.starts == [start] and has_room:
        # a copy of its own, which does not hold the whole batch
        clip.mels[candidate] = {0: mel.clone()}


def count_faults(mel, clip, candidate: int, start: int):
    """Hits of a window that its mel (128, 512) leaves out or adds, in what is drawn of it.

    The rest is known of its neighbors, or lies behind the clip's end.
    """
    detected = audio.detect_onsets(mel.numpy()).tolist()
    begin = start / audio.SAMPLE_RATE
    given = separate([hit.time - begin for hit in clip.hits])
    pairs = audio.match(detected, given, TOLERANCE)
    matched_detected = {k for k, _ in pairs}
    matched_given = {k for _, k in pairs}
    added = [time for k, time in enumerate(detected) if k not in matched_detected]
    missing = [time for k, time in enumerate(given) if k not in matched_given]

    _, is_known = known_latents(clip, candidate, start)
    counts = ~is_known.repeat_interleave(COLUMNS // LATENT_SHAPE[2])  # (512,)
    counts[max(0, (clip.samples - start) // HOP) :] = False
    # no onset is detected in the first columns, since nothing is known of what was before
    counts[: audio.LAG] = False
    columns = [min(round(time / COLUMN), COLUMNS - 1) for time in added + missing]
    return sum(bool(counts[column]) for column in columns)


def separate(times):
    """Those of the times that lie in the window, ascending; of some so close together that one
    onset is detected, the first."""
    kept = []
    for time in sorted(times):
        is_inside = 0 <= time < COLUMNS * COLUMN
        if is_inside and (not kept or round(time / COLUMN) - round(kept[-1] / COLUMN) > APART):
            kept.append(time)
    return kept
