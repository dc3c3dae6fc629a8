"""The watermark: a mark in the sound itself, which stays when a file's tags are gone.

in   sound float32 (n,) at 16 kHz in [-1, 1]
out  mark(): the same sound with each of 24 bands raised or lowered by 1 dB every 64 ms, following a
     fixed pattern of signs; confidence(): how sure it is that a sound carries the pattern

Spread spectrum on magnitudes in decibels, its signs repeated in time (Kirovski and Malvar 2003,
IEEE Trans. Signal Processing 51(4)). The mark scales with the sound, so silence stays silent, and
neither gain nor phase matters. It survives codecs, cuts, resampling and speeds from 0.8 to 1.25; it
is lost under other sound as loud as the quiet parts (docs/provenance.md has the table).

There is no secret: whoever has this file can remove the mark, or put it on another sound. It stops
mistakes, not attackers.
"""

import json
import math
import sys
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import media, xmp
from common.audio import HOP, N_FFT, SAMPLE_RATE, stft

CLAIM = "AI-generated sound: diff-foley"  # how the tag of every output begins
DEPTH = 1.0  # dB, up or down: about the smallest change of a band that is audible
BANDS = 24
LOW = 400  # Hz to HIGH: what telephones and codecs keep
HIGH = 6400
TILE = 4  # mel columns that share a sign
PERIOD = 64  # tiles (4.096 s) after which the signs repeat
SPAN = 4 * PERIOD * TILE * HOP  # samples processed together (16.4 s): over more, clocks drift
MARGIN = N_FFT  # samples on each side that the ends of a transform could disturb
FAINT = -75  # dB of magnitude: below, a band holds rounding errors and no mark
MOST = 3.0  # dB: a band that stands out by more is a hit, and is clipped to this
# other ways of playing that are searched: speed and pitch by these factors
SLOWEST = 0.8
FASTEST = 1.25  # the highest band then ends at 8 kHz
SPEED_STEP = 1.003  # over a span, half a step is an eighth of a tile's length at each end
PITCH_STEP = 1.04  # a third of a band
SEARCHED = 8  # spans (131 s) of a longer sound in which other ways of playing are searched
SURE = 0.9999  # confidence from which a sound counts as ours: one false alarm in 10,000


@lru_cache
def pattern():
    """The signs, +1 or -1: float (bands, period)."""
    signs = np.random.default_rng(230617203).integers(0, 2, (BANDS, PERIOD)) * 2.0 - 1
    return torch.from_numpy(signs).float()


@lru_cache(maxsize=64)
def band_bins(pitch: float = 1.0):
    """Which bins of the transform belong to each band, 0 or 1: float (bands, 513).

    pitch: by what factor the bands' frequencies were changed.
    """
    hz = torch.arange(N_FFT // 2 + 1) * SAMPLE_RATE / N_FFT / pitch
    band = (BANDS * (hz.clamp_min(1) / LOW).log() / math.log(HIGH / LOW)).floor()
    return (band == torch.arange(BANDS)[:, None]).float()


def mark(wav, out=None):
    """Sound (n,) -> the same, marked: float32 on the CPU. Its peak may rise by DEPTH.

    out: where it is written, which may be `wav`; None: a tensor of its own.
    """
    wav = wav.float().cpu()
    if out is None:
        out = torch.empty_like(wav)
    # the signs of every column of a span and its margins; the pattern starts with the span
    repeats = SPAN // (PERIOD * TILE * HOP) + 1
    signs = pattern().repeat_interleave(TILE, 1).repeat(1, repeats).roll(MARGIN // HOP, 1)

    before = wav.new_zeros(MARGIN)  # this span, as it was if `out` is `wav`
    for start in range(0, len(wav), SPAN):
        piece = wav[start : start + SPAN + MARGIN]
        piece = torch.cat([before, F.pad(piece, (0, SPAN + MARGIN - len(piece)))])
        spectrum = stft(piece[None])  # (1, 513, s)
        gain = 10 ** (DEPTH / 20 * band_bins().T @ signs[:, : spectrum.shape[2]])
        window = torch.hann_window(N_FFT)
        marked = torch.istft(spectrum * gain, N_FFT, HOP, window=window, length=len(piece))[0]
        before = piece[SPAN : SPAN + MARGIN]
        out[start : start + SPAN] = marked[MARGIN : MARGIN + SPAN][: len(wav) - start]
    return out


def steps_between(low, high, ratio):
    """Factors from low to high, evenly spaced, neighbors at most `ratio` apart; 1 is none."""
    count = math.ceil(math.log(high / low) / math.log(ratio)) + 1
    factors = torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64)
    return [factor for factor in factors.tolist() if abs(math.log(factor)) > math.log(ratio) / 2]


@lru_cache
def playbacks():
    """(speed, pitch) of every way of playing that is tried beside the plain one."""
    speeds = steps_between(SLOWEST, FASTEST, SPEED_STEP)
    pitches = steps_between(SLOWEST, FASTEST, PITCH_STEP)
    played = [(speed, speed) for speed in speeds]  # as by another sampling rate, or a tape
    stretched = [(speed, 1.0) for speed in speeds]
    shifted = [(1.0, pitch) for pitch in pitches]
    return played + stretched + shifted


def band_levels(power, speed, pitch):
    """Power (513, s) -> dB (bands, s * speed), on the clock that the sound had when it was marked.

    There a column is HOP samples long.
    """
    bins = band_bins(pitch)
    decibels = 10 * torch.log10(bins @ power / bins.sum(1, keepdim=True) + 1e-18)
    if speed == 1:
        return decibels
    # columns of the old clock lie between those of the new one
    place = torch.arange(int((power.shape[1] - 1) * speed) + 1) / speed
    left = place.long().clamp_max(power.shape[1] - 2)
    return torch.lerp(decibels[:, left], decibels[:, left + 1], place - left)


def correlation(power, speed=1.0, pitch=1.0):
    """Power (513, s) -> (tile, period): how well the pattern fits at every offset.

    speed, pitch: by what factors the sound was made faster and higher after it was marked. Without
    a mark these are numbers as from N(0, 1).
    """
    # every band's level in dB, averaged over tiles that begin at every column
    decibels = band_levels(power, speed, pitch)
    tiles = F.avg_pool1d(decibels, TILE, 1)
    audible = -F.max_pool1d(-decibels, TILE, 1) > FAINT

    # how much a tile stands out from its neighbors in time: decays are straight lines
    count = tiles.shape[1] - 2 * TILE
    before = slice(0, count)
    now = slice(TILE, TILE + count)
    after = slice(2 * TILE, 2 * TILE + count)
    contrast = tiles[:, now] - (tiles[:, before] + tiles[:, after]) / 2
    known = audible[:, before] & audible[:, now] & audible[:, after]
    # and from the other bands: a hit raises all
    contrast = contrast - (contrast * known).sum(0) / known.sum(0).clamp_min(1)
    contrast = (contrast * known).clamp(-MOST, MOST)

    # summed over the repetitions, then correlated with the pattern at all offsets at once
    missing = -contrast.shape[1] % (PERIOD * TILE)
    folded = F.pad(contrast, (0, missing)).unflatten(1, (-1, PERIOD, TILE))
    folded = folded.sum(1)  # (bands, period, tile)
    products = torch.fft.rfft(folded, dim=1) * torch.fft.rfft(pattern()).conj()[..., None]
    fit = torch.fft.irfft(products.sum(0), PERIOD, dim=0)  # (period, tile)
    return fit / folded.square().sum((0, 1)).sqrt().clamp_min(1e-9)


def spans_of(wav, most=None):
    """The power (513, s) of the spans of a sound (n,) that are long enough to hold a tile.

    most: of more spans, so many, evenly spread.
    """
    shortest = 4 * TILE * HOP / SLOWEST
    starts = list(range(0, max(1, len(wav) - SPAN // 2), SPAN))
    if most is not None and len(starts) > most:
        starts = [starts[k * len(starts) // most] for k in range(most)]
    for start in starts:
        piece = wav[start : start + SPAN]
        if len(piece) > shortest:
            yield stft(piece[None])[0].abs().square()


def chance_below(best, tries):
    """The probability that so many independent N(0, 1) numbers all stay below `best`."""
    return math.exp(tries * math.log1p(-math.erfc(best / math.sqrt(2)) / 2))


@dataclass(frozen=True)
class Match:
    """How well a sound fits the pattern, and how it has to be played for that."""

    confidence: float = 0.0  # 1 - p, p the probability of such a match in unmarked sound
    speed: float = 1.0
    pitch: float = 1.0


def best_match(powers, ways):
    """The best fit over all spans, offsets and ways of playing, its confidence by itself."""
    best = 0.0
    tries = 0
    found = 1.0, 1.0
    for power in powers:
        for speed, pitch in ways:
            fit = correlation(power, speed, pitch)
            tries += fit.numel()
            if (largest := fit.max().item()) > best:
                best = largest
                found = speed, pitch
    return Match(chance_below(best, tries) if tries else 0.0, *found)


def match(wav, search=True) -> Match:
    """Look for the mark in a sound (n,), played as it is and, with `search`, at other speeds.

    Other speeds are searched only where the sound as it is does not show the mark. That they are
    many is part of the confidence; plain playing has half of all false alarms to itself, so that
    the search hardly makes it less sure.
    """
    wav = wav.float().cpu()
    plain = best_match(spans_of(wav), [(1.0, 1.0)])
    if not search:
        return plain
    # the better of two: 1 - p is the square of its confidence by itself
    plain = replace(plain, confidence=plain.confidence**2)
    if plain.confidence >= SURE:
        return plain
    other = best_match(spans_of(wav, SEARCHED), playbacks())
    other = replace(other, confidence=other.confidence**2)
    return max(plain, other, key=lambda found: found.confidence)


def confidence(wav):
    """Sound (n,) -> 1 - p, p the probability of such a match in unmarked sound, played anyhow."""
    return match(wav).confidence


# ---- whose sound a file holds ------------------------------------------------------------------


@dataclass
class Verdict:
    """Whether a file's sound is ours."""

    file: Path
    has_tag: bool
    match: Match  # of the watermark
    said: dict[str, str] = field(default_factory=dict)  # by its XMP: see common/xmp.py
    has_credentials: bool = False  # Content Credentials; whose and whether valid is not checked

    @property
    def confidence(self):
        return self.match.confidence

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
            "speed": round(self.match.speed, 4),
            "pitch": round(self.match.pitch, 4),
            "xmp": self.said,
            "content_credentials": self.has_credentials,
        }

    def __str__(self):
        verdict = "ours" if self.is_ours else "not known as ours"
        tag = "tag" if self.has_tag else "no tag"
        mark = "watermark" if self.has_watermark else "no watermark"
        parts = [tag, mark, f"confidence {self.confidence:.4f}"]
        # how it is played, where that shows the mark
        if self.has_watermark and (self.match.speed, self.match.pitch) != (1, 1):
            parts[2] += f" at speed {self.match.speed:.3f}, pitch {self.match.pitch:.3f}"
        line = f"{self.file}: {verdict} ({', '.join(parts)})"
        # what the file says of itself, which anybody could have written
        said = [f"{name} {self.said[name]}" for name in ("model", "seed") if name in self.said]
        if "source_type" in self.said:
            said.append(self.said["source_type"].rsplit("/", 1)[-1])
        if said:
            line += f"; XMP: {', '.join(said)}"
        if self.has_credentials:
            line += "; Content Credentials: yes, not checked here"
        return line


def check(file) -> Verdict:
    """Look for our tag and watermark in a video or a sound file. Raises MediaError."""
    tags = media.read_tags(file)
    has_tag = tags.get("comment", "").startswith(CLAIM)
    found = match(media.read_audio(file))
    # in a box of the file's own, or a tag of Matroska's
    packet = xmp.read(file) or tags.get(xmp.TAG.lower(), "")
    return Verdict(file, has_tag, found, xmp.parse_packet(packet), xmp.has_credentials(file))


def verify(paths, script: str, as_json: bool = False) -> int:
    """Print a verdict for each file, of folders all videos and sounds. -> exit status.

    paths: also MediaErrors, in place of what cannot be read.
    1 where a file could not be read (said on stderr after the script's name), else 3 where the
    sound of one is not ours, else 0.
    """
    any_failed = False
    any_foreign = False
    for given in paths:
        files = [given]
        if isinstance(given, Path) and given.is_dir():
            files = media.search(given, ("video", "sound"), ours=True)[0]
        if not files:
            any_failed = True
            print(f"{script}: {given}: no video or sound in this folder", file=sys.stderr)
        for file in files:
            try:
                if isinstance(file, media.MediaError):
                    raise file
                verdict = check(file)
            except media.MediaError as error:
                any_failed = True
                print(f"{script}: {error}", file=sys.stderr)
                if as_json:
                    print(json.dumps({"file": str(file), "error": str(error)}), flush=True)
                continue
            any_foreign = any_foreign or not verdict.is_ours
            print(json.dumps(verdict.line()) if as_json else verdict, flush=True)
    if any_failed:
        return 1
    return 3 if any_foreign else 0
