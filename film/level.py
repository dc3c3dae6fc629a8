"""How loud the generated sound is, and what of it is written: --lufs, --duck, --rate, --layout.

in   sound float32 (n,) at 16 kHz, and the Settings that say how loud it should be
out  the gain that makes it so, in dB, which stands in the tags of what is written
"""

import math
from typing import NamedTuple

from common import cli
from common.audio import SAMPLE_RATE
from common.resample import blocks_of
from film import loudness

# dBTP; no file that we write has more when it is played. A tenth less is aimed at: between samples
# another meter, or a player, may find a little more than ours (film/loudness.py).
CEILING = -1.0
AIM = CEILING - 0.1
MOST_BOOST = 20.0  # dB: more would be the noise of a sound that is all but silent
ROUNDS = 3  # of finding the gain; nearly always one does
RATES = (SAMPLE_RATE, 3 * SAMPLE_RATE)
LAYOUTS = {"mono": 1, "stereo": 2}  # and their channels


class Applied(NamedTuple):
    """What was done to a generated sound."""

    gain: float = 0.0  # dB
    level: loudness.Level | None = None  # how loud it then is, 16 kHz mono; None: nobody measured


def add_lufs(g):
    g.add_argument(
        "--lufs",
        type=lambda text: None if text == "off" else cli.number(float, -60, -5)(text),
        metavar="LUFS|off",
        help="loudness of the generated sound (ITU-R BS.1770), less where it would have a true "
        "peak above -1 dBTP; off: as the model made it",
    )


def add_arguments(g):
    """The flags of level, mix and format; the defaults are those of Settings."""
    add_lufs(g)
    g.add_argument(
        "--duck",
        type=cli.number(float, -60, 0),
        nargs="?",
        const=-9.0,
        metavar="dB",
        help="with --keep-audio: lower the clip's own sound under each hit by this (-9 if none is "
        "given)",
    )
    g.add_argument(
        "--stems",
        action="store_true",
        help="three sounds: NAME.foley.wav is the generated one alone, NAME.own.wav the clip's "
        "own, untouched, NAME.mix.wav what the video has",
    )
    g.add_argument(
        "--rate",
        type=int,
        choices=RATES,
        help="of what is written; sound is generated at 16000 (wav then has 16 bits, else 24)",
    )
    g.add_argument(
        "--layout",
        choices=tuple(LAYOUTS),
        help="of what is written; the generated sound is the same in both channels, the clip's "
        "own keeps its sides",
    )
    g.add_argument(
        "--format",
        choices=("mp4", "mov", "mkv", "webm", "wav", "flac"),
        help="of what is written; wav and flac: the sound alone; default: what holds the picture",
    )


def check(settings):
    """Raises ValueError, in one line, for values of Settings that cannot be."""
    if settings.lufs is not None:
        cli.check_number("lufs", settings.lufs, -60, -5)
    if settings.duck is not None:
        cli.check_number("duck", settings.duck, -60, 0)
        if settings.keep_audio is None:
            raise ValueError(
                f"duck {settings.duck:g}: lowers the clip's own sound, which is heard with "
                "--keep-audio alone; give both, or neither"
            )
    if settings.rate not in RATES:
        raise ValueError(f"rate {cli.quoted(settings.rate)}: not one of {RATES[0]}, {RATES[1]}")
    if settings.layout not in LAYOUTS:
        raise ValueError(f"layout {cli.quoted(settings.layout)}: not one of mono, stereo")


def down(decibels):
    """To hundredths, as tags have them, and never up."""
    return math.floor(100 * decibels) / 100


def apply_one(wav, settings) -> Applied:
    """Sets a sound (n,), in place, to the loudness of the settings, in their layout.

    One constant gain: less where the true peak would be too high, and 0 for silence. As the
    official demo has it, the sound is left alone.
    """
    if settings.lufs is None or settings.as_official:
        return Applied()
    level = loudness.measure(blocks_of(wav.numpy()), SAMPLE_RATE)
    gain = 0.0
    # the gate of -70 LUFS does not move with the sound, so other blocks may count after a gain
    for _ in range(ROUNDS):
        if level.loudness == -math.inf:
            break
        now = in_layout(level, settings)
        more = min(settings.lufs - now.loudness, AIM - now.true_peak)
        before = gain
        gain = down(min(before + more, MOST_BOOST))
        expected = level.loudness + gain - before
        level = level.louder(gain - before)
        if abs(level.loudness - expected) < 0.01:
            break
    if gain:
        wav *= 10 ** (gain / 20)
    return Applied(gain, level)


def apply(wavs, settings) -> dict[int, Applied]:
    """`apply_one` of sounds by candidate."""
    return {k: apply_one(wav, settings) for k, wav in wavs.items()}


def of(result, k) -> Applied:
    """What was done to candidate k of a Result."""
    return result.levels.get(k, Applied())


def in_layout(level, settings):
    """The Level of a mono sound in all channels of the settings' layout: each counts."""
    more = 10 * math.log10(LAYOUTS[settings.layout])
    return level.louder(more)._replace(true_peak=level.true_peak)


def with_gain(tags, gain):
    """Tags whose comment says by how much a generated sound was made louder, if it was."""
    if abs(gain) < 0.005:
        return tags
    return {**tags, "comment": f"{tags['comment']}, gain {gain:+.2f} dB"}
