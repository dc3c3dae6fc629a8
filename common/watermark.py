"""Is this sound ours? A mark that stays in a sound when its tags are gone: what we write says that it is generated.

in   sound (n,), 16 kHz
out  mark(): the same with 24 bands of every 64 ms a little louder or softer, after a fixed pattern of signs;
     confidence(): how sure it is that a sound carries the pattern, at any offset

Spread spectrum on magnitudes in decibels with the signs repeated in time (Kirovski and Malvar 2003, IEEE Trans. Signal Processing
51(4)): it moves with the sound's own level, so silence stays silent, and sees neither gain nor phase. Codecs, cuts and another sample rate
leave it; other sound on top as loud as the quiet parts, or a change of speed by some percent, takes it away.
It keeps no secret: whoever has this file can remove the mark, or put it on another sound. It is for the honest and the hasty.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import media
from common.audio import HOP, N_FFT, SAMPLE_RATE, stft

CLAIM = "AI-generated sound: diff-foley"  # how the tag of every output begins
DEPTH = 1.0  # dB, up or down: about the least change of a band's level that an ear can tell
LOW, HIGH, BANDS = 400, 6400, 24  # Hz; what telephones and codecs keep
TILE, PERIOD = (
    4,
    64,
)  # mel columns that share a sign; tiles (4.096 s) after which the signs come again
SPAN = (
    4 * PERIOD * TILE * HOP
)  # samples that are looked at, and marked, together (16.4 s): longer, and clocks drift apart
MARGIN = N_FFT  # samples on each side that a transform's ends could disturb
FAINT = -75  # dB of magnitude: below, a band holds rounding and no mark
MOST = 3.0  # dB: what stands out by more is a hit, and counts as this
SURE = 0.9999  # of confidence: "ours". One sound without the mark in 10,000 gets as much by chance


@lru_cache
def pattern():
    """Signs +-1, float (bands, period)."""
    return torch.from_numpy(
        np.random.default_rng(230617203).integers(0, 2, (BANDS, PERIOD)) * 2.0 - 1
    ).float()


@lru_cache
def members():
    """Which of the transform's bins a band has, 0 or 1, float (bands, 513)."""
    hz = torch.arange(N_FFT // 2 + 1) * SAMPLE_RATE / N_FFT
    band = (BANDS * (hz.clamp_min(1) / LOW).log() / math.log(HIGH / LOW)).floor()
    return (band == torch.arange(BANDS)[:, None]).float()


def mark(wav):
    """Sound (n,) -> the same, marked. Its peak may rise by DEPTH."""
    n, spans = len(wav), []
    padded = F.pad(wav.float().cpu(), (MARGIN, MARGIN + SPAN))
    signs = (
        pattern()
        .repeat_interleave(TILE, 1)
        .repeat(1, SPAN // (PERIOD * TILE * HOP) + 1)
        .roll(MARGIN // HOP, 1)
    )
    for start in range(0, n, SPAN):
        piece = padded[start : start + SPAN + 2 * MARGIN]
        x = stft(piece[None])  # (1, 513, s)
        gain = 10 ** (DEPTH / 20 * members().T @ signs[:, : x.shape[2]])
        back = torch.istft(x * gain, N_FFT, HOP, window=torch.hann_window(N_FFT), length=len(piece))
        spans.append(back[0, MARGIN : MARGIN + SPAN])
    return torch.cat(spans)[:n] if spans else wav


def agreement(wav):
    """Sound (n,) -> (tile, period): how the signs at every offset agree with what stands out; without a mark, numbers as from N(0, 1)."""
    power = members() @ stft(wav[None])[0].abs().square() / members().sum(1, keepdim=True)
    level = 10 * torch.log10(power + 1e-18)  # (bands, s)
    tile = F.avg_pool1d(level, TILE, 1)  # a tile's level, wherever it begins
    heard = -F.max_pool1d(-level, TILE, 1) > FAINT
    before, now, after = (slice(i * TILE, tile.shape[1] - (2 - i) * TILE) for i in range(3))
    out = (
        tile[:, now] - (tile[:, before] + tile[:, after]) / 2
    )  # of its neighbours in time: decays are straight lines
    known = heard[:, before] & heard[:, now] & heard[:, after]
    out = out - (out * known).sum(0) / known.sum(0).clamp_min(
        1
    )  # of the other bands: a hit raises all
    out = (out * known).clamp(-MOST, MOST)
    turns = (
        F.pad(out, (0, -out.shape[1] % (PERIOD * TILE))).unflatten(1, (-1, PERIOD, TILE)).sum(1)
    )  # (bands, period, tile)
    products = torch.fft.rfft(turns, dim=1) * torch.fft.rfft(pattern()).conj()[..., None]
    found = torch.fft.irfft(products.sum(0), PERIOD, dim=0)  # (period, tile)
    return found / turns.square().sum((0, 1)).sqrt().clamp_min(1e-9)


def confidence(wav):
    """Sound (n,) -> in [0, 1]: 1 less the probability that a sound without the mark agrees with it so well anywhere by chance."""
    wav, best, tries = wav.float().cpu(), 0.0, 0
    for start in range(0, max(1, len(wav) - SPAN // 2), SPAN):
        piece = wav[start : start + SPAN]
        if len(piece) > (3 * TILE + 1) * HOP:
            found = agreement(piece)
            best, tries = max(best, found.max().item()), tries + found.numel()
    return math.exp(tries * math.log1p(-math.erfc(best / math.sqrt(2)) / 2)) if tries else 0.0


# ---- whose sound a file holds ------------------------------------------------------------------


@dataclass
class Verdict:
    """Whether a file's sound is ours."""

    file: Path
    has_tag: bool
    confidence: float  # 1 - p(chance match of the watermark)

    @property
    def has_watermark(self):
        return self.confidence >= SURE

    @property
    def is_ours(self):
        return self.has_tag or self.has_watermark

    def line(self):
        return {
            "file": str(self.file),
            "tags": self.has_tag,
            "watermark": self.has_watermark,
            "confidence": round(self.confidence, 6),
        }

    def __str__(self):
        verdict = "ours" if self.is_ours else "not known as ours"
        tag = "tag" if self.has_tag else "no tag"
        mark = "watermark" if self.has_watermark else "no watermark"
        return f"{self.file}: {verdict} ({tag}, {mark}, confidence {self.confidence:.4f})"


def check(file) -> Verdict:
    """Look for our tag and watermark in a video or a sound file. Raises MediaError."""
    has_tag = media.read_tags(file).get("comment", "").startswith(CLAIM)
    return Verdict(file, has_tag, confidence(media.read_audio(file)))
