"""The watermark's table: how often it is found where it is not, and where it is after what.

in   how many unmarked sounds, how many marked ones
out  a table in Markdown on stdout

    python -m tools.watermark_table                 15 minutes of one core; its figures are those of
                                                    docs/provenance.md

Unmarked are procedural sounds (foley.py), noise of five colors, and what sounds the installed
Python packages and Python's own tests ship. Marked are other procedural sounds. Intervals are
Wilson's, 95 %.
"""

import argparse
import io
import math
import sys
import sysconfig
import time
from pathlib import Path

import av
import numpy as np
import torch

import foley
from common import audio, media, watermark
from common.audio import SAMPLE_RATE

SECONDS = 8.192  # a window of the model
LONG = 12.0  # seconds of a marked sound, of which excerpts are taken
# exponents of the power's fall with frequency
COLORS = {"violet": -2, "blue": -1, "white": 0, "pink": 1, "brown": 2}


# ---- sounds ------------------------------------------------------------------------------------


def procedural(seed, index, seconds=SECONDS, rates="usual"):
    """The sound (n,) of a procedural clip, its picture left out."""
    fps = 15.625
    world_rng = np.random.default_rng([seed, index, 0])
    sound_rng = np.random.default_rng([seed, index, 2])
    times = np.arange(round(seconds * fps)) / fps
    world = foley.make_world(world_rng, times, seconds, foley.SOLIDS["usual"], rates)
    return torch.from_numpy(foley.sound(world, sound_rng, round(seconds * SAMPLE_RATE)))


def noise(exponent, index, seconds=SECONDS):
    """Noise (n,) whose power falls with frequency to this exponent; every other one swells."""
    rng = np.random.default_rng([20, index])
    n = round(seconds * SAMPLE_RATE)
    spectrum = np.fft.rfft(rng.standard_normal(n))
    spectrum[1:] *= np.arange(1, len(spectrum)) ** (-exponent / 2)
    wav = np.fft.irfft(spectrum, n)
    if index % 2:
        turns = rng.uniform(0.1, 4) * np.arange(n) / SAMPLE_RATE + rng.uniform()
        wav *= 10 ** (np.sin(2 * np.pi * turns) * rng.uniform(0.1, 1))
    return torch.from_numpy(wav / np.abs(wav).max() * rng.uniform(0.01, 0.9)).float()


def packages_own():
    """The sounds (n,) that Python's tests and the installed packages ship, each once."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    files = {file for folder in folders for file in Path(folder).rglob("*.wav")}
    seen = set()
    for file in sorted(files):
        try:
            wav = media.read_audio(file)
        except media.MediaError:
            continue
        if len(wav) and wav.numpy().tobytes() not in seen:
            seen.add(wav.numpy().tobytes())
            yield wav


def unmarked(count):
    """(kind, sound (n,)) of so many unmarked sounds; a quarter is noise."""
    own = list(packages_own())[:count]
    yield from (("packages", wav) for wav in own)
    for k in range(count - len(own)):
        color = list(COLORS)[k // 4 % len(COLORS)]
        if k % 4 == 3:
            yield "noise", noise(COLORS[color], k)
        else:
            yield "procedural", procedural(1000, k, rates="real" if k % 4 == 2 else "usual")


# ---- what happens to sound on its way ----------------------------------------------------------


def pieces(frames):
    """Packed float frames -> sound (n,)."""
    return torch.from_numpy(np.concatenate([frame.to_ndarray()[0] for frame in frames]))


def frame_of(wav, rate=SAMPLE_RATE):
    frame = av.AudioFrame.from_ndarray(wav[None].float().numpy(), "flt", "mono")
    frame.sample_rate = rate
    frame.pts = 0
    return frame


def resampled(wav, before, after):
    """Sound (n,) at another rate."""
    resampler = av.AudioResampler("flt", "mono", after)
    return pieces([p for f in (frame_of(wav, before), None) for p in resampler.resample(f)])


def coded(wav, codec, container, rate):
    """Through a lossy codec, as a stream of `rate` bits a second."""
    sampling = 48000 if codec == "libopus" else SAMPLE_RATE
    memory = io.BytesIO()
    with av.open(memory, "w", container) as out:
        track = out.add_stream(codec, rate=sampling, layout="mono")
        track.bit_rate = rate
        wanted = track.codec_context.format
        resampler = av.AudioResampler(wanted, "mono", sampling, track.frame_size or 1024)
        for given in (frame_of(wav), None):
            for frame in resampler.resample(given):
                out.mux(track.encode(frame))
        out.mux(track.encode(None))
    memory.seek(0)
    with av.open(memory) as source:
        resampler = av.AudioResampler("flt", "mono", SAMPLE_RATE)
        frames = [*source.decode(audio=0), None]
        return pieces([p for frame in frames for p in resampler.resample(frame)])


def filtered(wav, *filters):
    """Through FFmpeg's filters, each (name, arguments)."""
    graph = av.filter.Graph()
    nodes = [graph.add_abuffer(sample_rate=SAMPLE_RATE, format="flt", layout="mono")]
    last = ("aformat", f"sample_fmts=flt:sample_rates={SAMPLE_RATE}")
    nodes += [graph.add(name, arguments) for name, arguments in (*filters, last)]
    nodes.append(graph.add("abuffersink"))
    graph.link_nodes(*nodes).configure()
    graph.push(frame_of(wav))
    graph.push(None)
    frames = []
    try:
        while True:
            frames.append(graph.pull())
    except (av.error.BlockingIOError, av.error.EOFError):
        return pieces(frames)


def played(wav, speed):
    """Faster and higher by a factor, as a tape."""
    return filtered(wav, ("asetrate", str(round(SAMPLE_RATE * speed))))


def shifted(wav, pitch):
    """Higher by a factor, as fast as before."""
    rate = str(round(SAMPLE_RATE * pitch))
    return filtered(wav, ("asetrate", rate), ("atempo", f"{1 / pitch:.6f}"))


def under_noise(wav, decibels):
    """White noise this far below the sound's own power."""
    rng = torch.Generator().manual_seed(len(wav))
    size = wav.square().mean().sqrt() * 10 ** (-decibels / 20)
    return wav + size * torch.randn(len(wav), generator=rng)


def under_sound(wav, decibels):
    """Mixed with a sound of another clip, its power so many dB below (0: the same)."""
    other = procedural(3000, int(1e6 * wav.abs().max()) % 1000, len(wav) / SAMPLE_RATE + 0.1)
    other = other[: len(wav)]
    gain = (wav.square().mean() / other.square().mean().clamp_min(1e-12)).sqrt()
    return wav + 10 ** (decibels / 20) * gain * other


def low_pass(wav, hz):
    """Nothing above a frequency."""
    spectrum = torch.fft.rfft(wav)
    spectrum[math.ceil(hz * len(wav) / SAMPLE_RATE) :] = 0
    return torch.fft.irfft(spectrum, len(wav))


def without_mark(wav):
    """The mark taken off by somebody who has this code and the sound as it was written."""
    depth = watermark.DEPTH
    try:
        watermark.DEPTH = -depth
        return watermark.mark(wav)
    finally:
        watermark.DEPTH = depth


def excerpt(wav, seconds):
    """So many seconds from somewhere inside."""
    n = round(seconds * SAMPLE_RATE)
    first = int(1e6 * wav.abs().max()) % max(1, len(wav) - n)
    return wav[first : first + n]


def cut(change):
    """A change of the first seconds alone, as long as a window of the model."""
    return lambda wav: change(wav[: round(SECONDS * SAMPLE_RATE)])


CHANGES = {
    "nothing": cut(lambda wav: wav),
    "AAC, 96 kbit/s": cut(lambda wav: coded(wav, "aac", "adts", 96000)),
    "AAC, 32 kbit/s": cut(lambda wav: coded(wav, "aac", "adts", 32000)),
    "MP3, 128 kbit/s": cut(lambda wav: coded(wav, "libmp3lame", "mp3", 128000)),
    "MP3, 32 kbit/s": cut(lambda wav: coded(wav, "libmp3lame", "mp3", 32000)),
    "Opus, 64 kbit/s": cut(lambda wav: coded(wav, "libopus", "ogg", 64000)),
    "Opus, 24 kbit/s": cut(lambda wav: coded(wav, "libopus", "ogg", 24000)),
    "44.1 kHz and back": cut(lambda wav: resampled(resampled(wav, 16000, 44100), 44100, 16000)),
    "8 kHz and back": cut(lambda wav: resampled(resampled(wav, 16000, 8000), 8000, 16000)),
    "20 dB down, 16 bits": cut(lambda wav: (wav * 3276.7).round() / 32767),
    "20 dB up, clipped": cut(lambda wav: (10 * wav).clamp(-1, 1)),
    "10 s of it": lambda wav: excerpt(wav, 10),
    "5 s of it": lambda wav: excerpt(wav, 5),
    "3 s of it": lambda wav: excerpt(wav, 3),
    "1 s of it": lambda wav: excerpt(wav, 1),
    "speed +1 %": cut(lambda wav: played(wav, 1.01)),
    "speed -1 %": cut(lambda wav: played(wav, 0.99)),
    "speed +5 %": cut(lambda wav: played(wav, 1.05)),
    "speed -5 %": cut(lambda wav: played(wav, 0.95)),
    "speed +10 %": cut(lambda wav: played(wav, 1.1)),
    "speed -10 %": cut(lambda wav: played(wav, 0.9)),
    "speed +30 %": cut(lambda wav: played(wav, 1.3)),
    "tempo +10 %, pitch kept": cut(lambda wav: filtered(wav, ("atempo", "1.1"))),
    "tempo -10 %, pitch kept": cut(lambda wav: filtered(wav, ("atempo", "0.9"))),
    "pitch up two semitones, tempo kept": cut(lambda wav: shifted(wav, 2 ** (2 / 12))),
    "pitch down two semitones, tempo kept": cut(lambda wav: shifted(wav, 2 ** (-2 / 12))),
    "pitch up, tempo 10 % down": cut(
        lambda wav: filtered(shifted(wav, 2 ** (2 / 12)), ("atempo", "0.9"))
    ),
    "white noise, 30 dB below": cut(lambda wav: under_noise(wav, 30)),
    "white noise, 20 dB below": cut(lambda wav: under_noise(wav, 20)),
    "white noise, 10 dB below": cut(lambda wav: under_noise(wav, 10)),
    "another sound, 6 dB below": cut(lambda wav: under_sound(wav, -6)),
    "another sound, as loud": cut(lambda wav: under_sound(wav, 0)),
    "low-pass at 3.4 kHz": cut(lambda wav: low_pass(wav, 3400)),
    "low-pass at 1 kHz": cut(lambda wav: low_pass(wav, 1000)),
    "denoiser (FFmpeg's afftdn)": cut(lambda wav: filtered(wav, ("afftdn", "nr=12:nf=-50"))),
    "denoiser (FFmpeg's anlmdn)": cut(lambda wav: filtered(wav, ("anlmdn", "s=0.0005"))),
    "our mel and vocoder": cut(lambda wav: audio.vocode(audio.mel(wav))),
    "backwards": cut(lambda wav: wav.flip(0)),
    "taken off with this code": cut(without_mark),
}


# ---- the table ---------------------------------------------------------------------------------


def wilson(found, count):
    """Wilson's 95 % interval of a share: (low, high)."""
    z = 1.96
    share = found / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / count / 2) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def row(name, confidences, digits=0):
    """One line of the table: how many are sure, and the interval of that share."""
    found = sum(value >= watermark.SURE for value in confidences)
    low, high = wilson(found, len(confidences))
    share = f"{100 * found / len(confidences):.{digits}f} %"
    interval = f"{100 * low:.{digits}f} to {100 * high:.{digits}f} %"
    print(f"| {name} | {found} of {len(confidences)} | {share} | {interval} |", flush=True)


def main(argv=None):
    p = argparse.ArgumentParser(prog="watermark_table.py", description=__doc__.split("\n")[0])
    p.add_argument("--unmarked", type=int, default=2000, metavar="N", help="unmarked sounds")
    p.add_argument("--marked", type=int, default=100, metavar="N", help="marked sounds")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    began = time.process_time()
    print("| sound | found | share | 95 % interval |\n|---|---|---|---|")

    # what is not marked
    sure = {}
    for kind, wav in unmarked(args.unmarked):
        sure.setdefault(kind, []).append(watermark.confidence(wav))
    everything = [value for values in sure.values() for value in values]
    if everything:
        row("**unmarked, all**", everything, 2)
        for kind, values in sure.items():
            row(f"unmarked, {kind}", values, 2)
    # what is, after a change
    marked = [watermark.mark(procedural(2000, k, LONG)) for k in range(args.marked)]
    marked = [audio.limit(wav) for wav in marked]
    for name, change in CHANGES.items():
        if marked:
            row(name, [watermark.confidence(change(wav)) for wav in marked])

    # how true the confidence of unmarked sounds is, and what all this took
    for level in (0.5, 0.95, 0.99, 0.999):
        above = sum(value >= level for value in everything)
        print(f"unmarked with {level} or more: {above}", file=sys.stderr)
    print(f"{time.process_time() - began:.0f} s of CPU time", file=sys.stderr)


if __name__ == "__main__":
    main()
