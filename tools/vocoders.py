"""Ways from a mel to sound, measured against the sound that the mel was taken of.

in   videos or sounds, or folders of them
out  two tables in Markdown: each way's means with 95 % intervals (bootstrap over the clips), and
     how far they are from the first way's, clip by clip

    python foley.py held-out --clips 48 --seed 1
    python -m tools.vocoders held-out                       the tables of docs/acceleration.md
    python -m tools.vocoders held-out --through weights/mini/ldm.safetensors
                                                            mels as an autoencoder returns them

Columns, every one of them better where it is smaller, but for F1:

lsd            log-spectral distance, dB: of the STFT's bins in the filterbank's range, the root of
               the mean square over bins, the mean over columns
short_lsd      the same of a transform of 16 ms instead of 64
convergence    spectral convergence: the norm of the magnitudes' difference over the reference's
mel            mean absolute difference of the mels, dB
decay          of ringing modes, how far the decay in dB a second is from the reference's, %
rough          of these modes, rms deviation in dB from a steady decay: beats that were not there
rise           of hits, how far the time from 10 to 90 % of the peak is from the reference's, ms
pre_echo       by how many dB the 20 ms before a hit are louder than the reference's
f1             of onsets detected in the result and in the reference, within 50 ms
seconds        of processor time a minute of sound
"""

import math
import time
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import audio, cli, media
from common.files import UserError
from vae import AutoencoderKL

LONGEST = 16 * 62  # mel columns of a clip, 16 s
IN_RANGE = slice(9, 487)  # bins in which the filterbank is not zero
FLOOR = 1.6e-3  # magnitude that a mel of 0 stands for
RESAMPLES = 1000
LEAST = 6  # columns of a mode, 96 ms
DIGITS = {"convergence": 3, "f1": 3, "decay": 1, "rise": 1, "pre_echo": 1}
ENVELOPE_HOP = 8  # samples, half a millisecond
BEFORE_HIT = slice(-48, -8)  # in these hops: 24 to 4 ms before a hit begins


# ---- measures ----------------------------------------------------------------------------------


@lru_cache(maxsize=4)  # a reference is asked for every way
def onset_times(wav):
    return audio.detect_onsets(audio.mel(wav).numpy())


def decibels(magnitude):
    return 20 * magnitude.clamp_min(FLOOR).log10()


def log_spectral_distance(wav, reference):
    """Of two sounds (n,), in dB."""
    spectra = [decibels(audio.stft(x[None])[0, IN_RANGE].abs()) for x in (wav, reference)]
    return (spectra[0] - spectra[1]).square().mean(0).sqrt().mean().item()


def short_log_spectral_distance(wav, reference):
    """The same of a transform of 256 samples, which hears where within a column something lies."""
    window = torch.hann_window(256)
    spectra = []
    for x in (wav, reference):
        # a quarter of the samples add up to a quarter of the magnitude
        magnitude = 4 * torch.stft(x, 256, 64, window=window, return_complex=True).abs()
        spectra.append(decibels(magnitude[3:122]))  # 187 to 7562 Hz
    return (spectra[0] - spectra[1]).square().mean(0).sqrt().mean().item()


def spectral_convergence(wav, reference):
    ours, theirs = (audio.stft(x[None])[0, IN_RANGE].abs() for x in (wav, reference))
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-9)).item()


def mel_distance(wav, reference):
    """In dB: a mel of 0.01 is one."""
    return 100 * (audio.mel(wav) - audio.mel(reference)).abs().mean().item()


def mode_levels(spectrum, mode):
    """Levels (columns,) in dB of a mode (bin, columns): its bin's power and its two neighbors'."""
    k, columns = mode
    power = spectrum[k - 1 : k + 2, columns].abs().square().sum(0)
    return decibels(power.sqrt()).numpy()


def fit_decay(levels):
    """Levels (n,) in dB -> dB a second, and the rms deviation from that line in dB."""
    seconds = np.arange(len(levels)) * audio.COLUMN
    slope, offset = np.polyfit(seconds, levels, 1)
    return slope, float(np.sqrt(np.mean((levels - slope * seconds - offset) ** 2)))


@lru_cache(maxsize=4)
def ringing_modes(reference):
    """Sound (n,) -> [(bin, columns)] that ring after its hits.

    A mode is a bin 8 dB above the median around it, whose level falls by a steady 8 to 1000 dB a
    second over at least LEAST columns, from 3 columns after a hit to the next one at most.
    """
    spectrum = audio.stft(reference[None])[0]  # (513, s)
    level = decibels(spectrum.abs())
    hits = [round(time / audio.COLUMN) for time in onset_times(reference)]
    modes = []
    for hit, following in pairwise([*hits, spectrum.shape[1]]):
        first = hit + 3
        last = min(following - 3, first + 60)
        if last - first < LEAST:
            continue
        now = level[:, first : first + 3].mean(1)  # (513,)
        around = F.pad(now, (12, 12)).unfold(0, 25, 1)
        peaks = (now == around[:, 9:16].amax(1)) & (now > around.median(1).values + 8)
        for k in peaks.nonzero().flatten().tolist():
            if not IN_RANGE.start < k < IN_RANGE.stop - 1:
                continue
            levels = mode_levels(spectrum, (k, slice(first, last)))
            # until it is 40 dB down or in the noise
            lowest = max(levels[0] - 40, 20 * math.log10(FLOOR) + 20)
            too_low = np.flatnonzero(levels < lowest)
            length = int(too_low[0]) if len(too_low) else len(levels)
            if length < LEAST:
                continue
            slope, deviation = fit_decay(levels[:length])
            if -1000 < slope < -8 and deviation < 1.5:
                modes.append((k, slice(first, first + length)))
    return modes


def decays(wav, reference):
    """-> mean error of the modes' decay in %, at most 100 each, and their roughness in dB."""
    modes = ringing_modes(reference)
    spectra = [audio.stft(x[None])[0] for x in (wav, reference)]
    errors = []
    roughness = []
    for mode in modes:
        ours, theirs = (fit_decay(mode_levels(spectrum, mode)) for spectrum in spectra)
        errors.append(min(100.0, 100 * abs(ours[0] / theirs[0] - 1)))
        roughness.append(ours[1])
    if not modes:
        return math.nan, math.nan
    return float(np.mean(errors)), float(np.mean(roughness))


def envelope(wav):
    """Sound (n,) -> rms (h,) over 2 ms, every half millisecond; value k is around sample 8 k."""
    padded = F.pad(wav, (16, 16))
    return padded.unfold(0, 32, ENVELOPE_HOP).square().mean(1).sqrt().numpy()


def rise(levels, first, last):
    """Of an envelope's rise to its peak within hops [first, last): where it begins, how long it is,
    in hops, and the peak."""
    peak = first + int(levels[first:last].argmax())
    below = np.flatnonzero(levels[:peak] < 0.1 * levels[peak])
    begin = int(below[-1]) if len(below) else 0
    high = begin + int(np.flatnonzero(levels[begin : peak + 1] >= 0.9 * levels[peak])[0])
    return begin, high - begin, levels[peak]


def attacks(wav, reference):
    """-> mean error of the hits' rise times in ms, and what is before them too loud, in dB.

    Of hits that begin clearly: from below a tenth of their peak, 24 ms long, within 30 ms.
    """
    ours, theirs = envelope(wav), envelope(reference)
    errors = []
    echoes = []
    for onset in onset_times(reference):
        middle = round(onset * audio.SAMPLE_RATE / ENVELOPE_HOP)
        first = max(0, middle - 48)
        last = min(middle + 112, len(theirs))
        begin, length, peak = rise(theirs, first, last)
        before = slice(begin + BEFORE_HIT.start, begin + BEFORE_HIT.stop)
        if before.start < 0 or length > 60 or theirs[before].max() > 0.1 * peak:
            continue
        errors.append(abs(rise(ours, first, last)[1] - length) / 2)
        quiet = 1e-3 * peak
        levels = [20 * np.log10(np.sqrt(np.mean(x[before] ** 2)) + quiet) for x in (ours, theirs)]
        echoes.append(max(0.0, levels[0] - levels[1]))
    if not errors:
        return math.nan, math.nan
    return float(np.mean(errors)), float(np.mean(echoes))


def onset_counts(wav, reference):
    """-> matches within 50 ms, onsets of the one, of the other."""
    ours, theirs = (onset_times(x) for x in (wav, reference))
    return len(audio.match(ours, theirs, 0.05)), len(ours), len(theirs)


def measure(wav, reference):
    """Two sounds (n,) -> {column: number}, NaN where the clip has nothing to measure."""
    decay, rough = decays(wav, reference)
    rise_error, pre_echo = attacks(wav, reference)
    return {
        "lsd": log_spectral_distance(wav, reference),
        "short_lsd": short_log_spectral_distance(wav, reference),
        "convergence": spectral_convergence(wav, reference),
        "mel": mel_distance(wav, reference),
        "decay": decay,
        "rough": rough,
        "rise": rise_error,
        "pre_echo": pre_echo,
        "f1": onset_counts(wav, reference),
    }


# ---- candidates: mel (1, 128, s) -> sound (s*256,) ---------------------------------------------


def signal(spectrum):
    """Spectrum (1, 513, s) -> sound (1, s*256)."""
    window = torch.hann_window(audio.N_FFT)
    length = spectrum.shape[-1] * audio.HOP
    return torch.istft(spectrum, audio.N_FFT, audio.HOP, window=window, length=length)


def consistent(spectrum):
    """The spectrum of the sound nearest to this one."""
    return audio.stft(signal(spectrum))


def random_phases(magnitude, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.polar(magnitude, 2 * math.pi * torch.rand(magnitude.shape, generator=rng))


def griffin_lim(mel, iterations=32):
    """From random phases: Perraudin, Balazs and Sondergaard 2013."""
    return audio.griffin_lim(audio.mel_to_magnitude(mel), iterations)[0]


def accelerated(mel, iterations=32, alpha=0.09, beta=1.1, gamma=1.25):
    """Nenov, Nguyen, Balazs and Bot 2023 (arXiv 2306.12504), with their parameters."""
    magnitude = audio.mel_to_magnitude(mel)
    spectrum = random_phases(magnitude)
    base = previous = consistent(spectrum)
    for _ in range(iterations):
        projected = consistent(magnitude * spectrum.sgn())
        new = torch.lerp(base, projected, gamma)
        spectrum = new + alpha * (new - previous)
        base = new + beta * (new - previous)
        previous = new
    return signal(magnitude * spectrum.sgn())[0]


def admm(mel, iterations=32):
    """Masuyama, Yatabe and Oikawa 2019: phases by the alternating direction method."""
    magnitude = audio.mel_to_magnitude(mel)
    spectrum = random_phases(magnitude)
    dual = torch.zeros_like(spectrum)
    for _ in range(iterations):
        fitting = magnitude * (spectrum - dual).sgn()
        spectrum = consistent(fitting + dual)
        dual = dual + fitting - spectrum
    return signal(magnitude * (spectrum - dual).sgn())[0]


def towards_mel(magnitude, target):
    """One multiplicative step, as in `audio.mel_to_magnitude`: (1, 513, s) and (1, 128, s)."""
    basis = audio.mel_basis()
    ratio = target / (basis @ magnitude).clamp_min(1e-12)
    return magnitude * (basis.T @ ratio) / basis.sum(0).clamp_min(1e-9)[:, None]


def joint(mel, iterations=32, momentum=0.99):
    """Magnitudes and phases together, after Masuyama, Ueno and Ono 2023.

    Magnitudes are no longer given: each iteration takes those of the consistent spectrum, and one
    step towards the mel. Theirs is an ADMM with a quadratic distance.
    """
    magnitude = audio.mel_to_magnitude(mel)
    target = torch.where(mel > 0, 10 ** (5 * mel - 4), 0.0)
    spectrum = random_phases(magnitude)
    previous = torch.zeros_like(spectrum)
    for _ in range(iterations):
        now = consistent(spectrum)
        ahead = now + momentum * (now - previous)
        previous = now
        spectrum = towards_mel(now.abs(), target) * ahead.sgn()
    return signal(spectrum)[0]


def likely_phases(mel):
    """What Griffin-Lim starts from in `audio.vocode`."""
    return audio.griffin_lim(audio.mel_to_magnitude(mel), 0, phases=audio.likely_phases)[0]


def true_phases(mel, reference):
    """What no vocoder knows: the reference's phases, with the magnitudes that its mel leaves."""
    return signal(audio.mel_to_magnitude(mel) * audio.stft(reference[None]).sgn())[0]


WAYS = {
    "Griffin-Lim, 32": griffin_lim,
    "likely phases, 28 (shipped)": lambda mel: audio.vocode(mel)[0],
    "Griffin-Lim, 64": lambda mel: griffin_lim(mel, 64),
    "accelerated, 32": accelerated,
    "ADMM, 32": admm,
    "joint, 32": joint,
    "likely phases alone": likely_phases,
}


# ---- the tables --------------------------------------------------------------------------------


def windows(mel):
    """Mel (128, s) in pieces of a model window, 512 columns; the last is filled up with silence."""
    padded = F.pad(mel, (0, -mel.shape[1] % 512))
    return padded.unflatten(1, (-1, 512)).transpose(0, 1)  # (n, 128, 512)


@torch.no_grad()
def through(autoencoder, mel):
    """Mel (128, s) -> what the autoencoder makes of it, window by window."""
    mean, _ = autoencoder.encode(windows(mel)[:, None])
    decoded = autoencoder.decode(mean)[:, 0].clamp(0, 1)  # (n, 128, 512)
    return decoded.transpose(0, 1).flatten(1)[:, : mel.shape[1]]


def measure_clip(reference, ways, autoencoder=None):
    """Sound (n,) -> {way: {column: number}}."""
    mel = audio.mel(reference)
    if autoencoder is not None:
        mel = through(autoencoder, mel)
    rows = {}
    for name, way in ways.items():
        start = time.process_time()
        wav = way(mel[None])
        seconds = time.process_time() - start
        minutes = len(reference) / audio.SAMPLE_RATE / 60
        rows[name] = measure(wav, reference) | {"seconds": seconds / minutes}
    rows["the true phases"] = measure(true_phases(mel[None], reference), reference)
    return rows


def column_means(columns, chosen):
    """{column: numbers (n, ...) of clips} -> {column: of the chosen clips the mean, F1 of all}."""
    means = {}
    for name, values in columns.items():
        values = values[chosen]
        if name == "f1":
            matches, *onsets = values.sum(0)
            means[name] = 2 * matches / max(1.0, sum(onsets))
        else:
            values = values[np.isfinite(values)]
            means[name] = values.mean() if len(values) else math.nan
    return means


def with_intervals(clips, first=None):
    """[{column: number}] of clips -> {column: (mean, half of its 95 % interval)}.

    With `first`, other numbers of the same clips: of the difference from these.
    """

    def arrays(clips):
        return {name: np.array([clip[name] for clip in clips], float) for name in clips[0]}

    ours = arrays(clips)
    others = arrays(first) if first is not None else None

    def numbers(chosen):
        means = column_means(ours, chosen)
        if others is not None:
            less = column_means(others, chosen)
            means = {name: means[name] - less[name] for name in means}
        return means

    rng = np.random.default_rng(0)
    n = len(clips)
    resampled = [numbers(rng.integers(n, size=n)) for _ in range(RESAMPLES)]
    row = {}
    for name, value in numbers(np.arange(n)).items():
        values = [r[name] for r in resampled if math.isfinite(r[name])]
        low, high = np.percentile(values, (2.5, 97.5)) if values else (math.nan, math.nan)
        row[name] = (value, (high - low) / 2)
    return row


def print_table(rows):
    """{way: {column: (number, interval)}} as Markdown."""
    columns = list(next(iter(rows.values())))
    print("| | " + " | ".join(columns) + " |")
    print("|" + "---|" * (len(columns) + 1))
    for name, row in rows.items():
        cells = []
        for column in columns:
            value, interval = row.get(column, (math.nan, math.nan))
            digits = DIGITS.get(column, 2)
            cells.append("" if math.isnan(value) else f"{value:.{digits}f} ± {interval:.{digits}f}")
        print(f"| {name} | " + " | ".join(cells) + " |")
    print()


def read(path):
    """-> the sound (n,) of a file, whole columns of it, at most LONGEST; None if it has none."""
    wav = torch.as_tensor(media.read_audio(path))
    wav = wav[: min(LONGEST, len(wav) // audio.HOP) * audio.HOP]
    return wav if len(wav) >= audio.SAMPLE_RATE and wav.abs().max() > 0.001 else None


def main(argv=None):
    p = cli.Parser(None, __doc__)
    p.add_argument("inputs", nargs="+", type=Path, help="videos or sounds, or folders of them")
    p.add_argument("--clips", type=cli.number(int, 1), help="only so many of them")
    p.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="NAME")
    p.add_argument("--through", type=Path, help="an autoencoder that the mels go through")
    args = p.parse_args(argv)

    torch.set_num_threads(1)
    autoencoder = AutoencoderKL.load(args.through) if args.through else None
    ways = {name: WAYS[name] for name in args.ways}
    measured = {}
    try:
        for path in media.find_videos(args.inputs)[: args.clips]:
            reference = read(path)
            if reference is None:
                continue
            for name, row in measure_clip(reference, ways, autoencoder).items():
                measured.setdefault(name, []).append(row)
    except UserError as error:
        p.error(str(error))
    if not measured:
        p.error(f"{args.inputs[0]}: no sound of a second or more; give other files")

    count = len(next(iter(measured.values())))
    print(f"{count} clips\n")
    print_table({name: with_intervals(clips) for name, clips in measured.items()})
    first, *others = ways
    print(f"less {first}:\n")
    print_table({name: with_intervals(measured[name], measured[first]) for name in others})


if __name__ == "__main__":
    main()
