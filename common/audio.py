"""Mel spectrograms and back, and onsets.

in   sound float32 (n,) at 16 kHz
out  mel float32 (128, s) in [0, 1] and sound again; onset times in seconds

Diff-Foley Sec. 3.1 and its `data_preprocess/wav2spec.py` fix the mel; fast Griffin-Lim is Perraudin, Balazs and
Sondergaard 2013.

Differs from the official code: one filterbank at 16 kHz serves mel and its inverse (there the inverse is at 22,050 Hz,
and tones fall).
"""

import itertools
import math
from functools import lru_cache

import numpy as np
import torch

from common.ffmpeg import SAMPLE_RATE

N_FFT = 1024
HOP = 256
N_MELS = 128
FMIN = 125.0
FMAX = 7600.0
WINDOW = 131072  # samples of one model window: 512 mel columns, 8.192 s
COLUMN = HOP / SAMPLE_RATE  # seconds a mel column
LAG = 2  # columns over which a level has to rise
QUIET = 0.3  # mel level below which nothing counts: the room's tone, and residue of coding
RISE = 0.03  # mean rise over the bins that makes an onset
ABOVE = 1.5  # and by how many times the median rise around it, so that steady noise makes none
AROUND, APART = (
    20,
    3,
)  # columns each side: of that median; where only the strongest rise is an onset
SPAN = 4096  # mel columns vocoded at once: 65 s, which bounds memory
CHUNK = 256  # mel columns that the vocoder works on at once on a CPU: their spectrum is 1 MB


# ---- mel spectrogram and its inverse -------------------------------------------------------------------------------


@lru_cache
def filterbank(rate, bands, low, high):
    """Slaney's mel filterbank, librosa's: linear below 1 kHz and logarithmic above, triangles of unit area in Hz. (bands, 513) float64"""
    step = math.log(6.4) / 27  # 27 steps from 1 kHz to 6.4 kHz, by definition of the scale

    def to_mel(hz):
        return hz * 3 / 200 if hz < 1000 else 15 + math.log(hz / 1000) / step

    mels = np.linspace(to_mel(low), to_mel(high), bands + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * step))
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    hz = np.linspace(0, rate / 2, N_FFT // 2 + 1)
    triangles = np.minimum((hz - low) / (centre - low), (high - hz) / (high - centre)).clip(0)
    return triangles * 2 / (high - low)


@lru_cache
def mel_basis(rate=SAMPLE_RATE):
    """The bands of all mels here, float32 (128, 513)."""
    return torch.from_numpy(filterbank(rate, N_MELS, FMIN, FMAX)).float()


def stft(wav):
    """(b, n) -> complex (b, 513, ceil(n/256)). The last sample is dropped, as the published preprocessing does: a
    centred transform of n-1 samples has 1 + (n-1)//256 = ceil(n/256) columns, so 131,072 samples make exactly 512."""
    window = torch.hann_window(N_FFT, device=wav.device)
    return torch.stft(
        wav[..., :-1],
        N_FFT,
        HOP,
        window=window,
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )


def mel(wav):
    """Sound (..., n) to mel (..., 128, ceil(n/256)): clip(0.2 log10(magnitude) + 0.8, 0, 1), reflected at the ends."""
    shape, n = wav.shape[:-1], wav.shape[-1]
    short = max(
        0, N_FFT // 2 + 2 - n
    )  # reflection needs more than half a window of sound: append silence
    wav = torch.nn.functional.pad(wav.float().reshape(-1, n), (0, short))
    power = mel_basis().to(wav.device) @ stft(wav).abs()  # (b, m, s)
    level = (0.2 * power.clamp_min(1e-5).log10() + 0.8).clamp(0, 1)
    return level[..., : -(-n // HOP)].reshape(*shape, N_MELS, -(-n // HOP))


def chunks(rows, device):
    """Slices of `rows` to work on one after the other. On a CPU they are small, so that all that is computed from them stays in its
    cache; a GPU takes them all at once, because there every operation costs a launch."""
    size = CHUNK if device.type == "cpu" else rows
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


@lru_cache
def filterbank_blocks():
    """[(bins, bands, basis[bands, bins])]: the filterbank in blocks of 64 bins with the bands that reach into them. Seven eighths of
    the whole matrix are zeros outside of these."""
    basis = mel_basis()
    blocks = []
    for first in range(0, basis.shape[1], 64):
        bins = slice(first, first + 64)
        reaching = basis[:, bins].sum(1).nonzero().flatten().tolist()
        if reaching:
            bands = slice(reaching[0], reaching[-1] + 1)
            blocks.append((bins, bands, basis[bands, bins]))
    return blocks


@torch.no_grad()
def mel_to_magnitude(level, iterations=32):
    """(b, 128, s) -> non-negative (b, 513, s) whose mel is `level`. Multiplicative updates for the Kullback-Leibler
    divergence (Lee and Seung 2001): they are scale-free, so quiet columns are met as exactly as loud ones. A level of
    0 stands for "at most 1e-4" (-82 dB) and gives exact silence; resynthesised, that floor would be a steady hiss."""
    b, _, s = level.shape
    level = level.transpose(1, 2).reshape(b * s, -1)  # (b*s, m): every column for itself
    target = torch.where(level > 0, 10 ** (5 * level - 4), 0.0)
    basis = mel_basis().to(level.device)  # (m, 513)
    weight = basis.sum(0).clamp_min(1e-9)
    magnitude = (target / basis.sum(1)) @ basis / weight  # (b*s, 513)
    blocks = [
        (bins, bands, block.to(level.device).T, block.to(level.device) / weight[bins])
        for bins, bands, block in filterbank_blocks()
    ]
    for rows in chunks(b * s, level.device):
        for _ in range(iterations):
            ratio = torch.full_like(target[rows], 1e-12)  # the mel as it is, then wanted / is
            for bins, bands, to_mel, _ in blocks:
                ratio[:, bands].addmm_(magnitude[rows, bins], to_mel)
            torch.div(target[rows], ratio, out=ratio)
            for bins, bands, _, to_bins in blocks:
                magnitude[rows, bins] *= ratio[:, bands] @ to_bins
    return magnitude.view(b, s, -1).transpose(1, 2)


def overlap_add(sound, spectrum, window, first):
    """Inverse transform of the columns (b, n, 513) from `first` on, added to `sound` (b, s + 3, 256): rows of one hop, of which a
    frame covers four."""
    frames = torch.fft.irfft(spectrum, N_FFT).mul_(window).unflatten(2, (-1, HOP))  # (b, n, 4, 256)
    n = frames.shape[1]
    for k in range(frames.shape[2]):
        sound[:, first + k : first + k + n] += frames[:, :, k]


def reflect_ends(padded, samples):
    """In place, what `stft` reads beyond a sound of `samples` that lies in `padded` (b, n) from N_FFT // 2 on."""
    start = N_FFT // 2
    last = start + samples - 2  # stft drops the sample after this one
    beyond = padded.shape[1] - 1 - last
    padded[:, :start] = padded[:, start + 1 : 2 * start + 1].flip(1)
    padded[:, last + 1 :] = padded[:, last - beyond : last].flip(1)


@torch.no_grad()
def griffin_lim(magnitude, iterations=32, seed=0):
    """(b, 513, s) -> (b, s*256): phases that fit each other, by the fast algorithm (Perraudin et al. 2013), momentum 0.99.

    Every item starts from the same random phases, drawn on the CPU from `seed`, so its sound depends neither on the
    batch it sits in nor on the device, but for the rounding of the FFT. That rounding grows tenfold every ten iterations or so:
    float32 ends within 1e-3 of float64, in any implementation, and equally consistent.

    An iteration is `stft(torch.istft(spectrum))` and a new phase. Here both transforms pass over the columns once, chunk by chunk,
    so that no whole spectrum is made anew; that takes an eighth of the time on a CPU."""
    b, bins, s = magnitude.shape
    samples, device = s * HOP, magnitude.device
    window = torch.hann_window(N_FFT, dtype=magnitude.dtype, device=device)
    magnitude = magnitude.transpose(
        1, 2
    ).contiguous()  # (b, s, 513): FFTs want their bins side by side

    # the sum of the squared windows over every sample, which overlap-add is divided by
    envelope = magnitude.new_zeros(s + N_FFT // HOP - 1, HOP)
    for k, part in enumerate(window.square().view(-1, HOP)):
        envelope[k : k + s] += part
    envelope.clamp_min_(1e-11)  # 0 at the very first sample

    generator = torch.Generator().manual_seed(seed)
    turn = (torch.rand((bins, s), generator=generator) * (2 * math.pi)).T
    sound = magnitude.new_zeros(b, *envelope.shape)
    for at in chunks(s, device):
        phase = torch.polar(torch.ones_like(turn[at]), turn[at]).to(device)
        overlap_add(sound, magnitude[:, at] * phase, window, at.start)

    previous = torch.zeros_like(
        magnitude, dtype=magnitude.dtype.to_complex()
    )  # the last iteration's consistent spectrum
    for _ in range(iterations):
        padded = (sound / envelope).flatten(1)
        reflect_ends(padded, samples)
        frames = padded.unfold(1, N_FFT, HOP)  # (b, s, 1024), a view
        sound.zero_()
        for at in chunks(s, device):
            consistent = torch.fft.rfft(frames[:, at] * window)
            # consistent + 0.99 (consistent - previous), but for its length, of which nothing is kept
            ahead = torch.sub(consistent, previous[:, at], alpha=0.99 / 1.99)
            previous[:, at] = consistent
            overlap_add(sound, ahead.sgn_().mul_(magnitude[:, at]), window, at.start)
    return (sound / envelope).flatten(1)[:, N_FFT // 2 : N_FFT // 2 + samples]


def vocode(level, iterations=32, seed=0, length=None):
    """Mel (..., 128, s) to sound (..., s*256), or `length` samples: the filterbank's inverse, then Griffin-Lim."""
    shape, columns = level.shape[:-2], level.shape[-1]
    if columns < 3:  # too short to reflect: vocode with silence appended, then cut
        level = torch.nn.functional.pad(level, (0, 3 - columns))
    magnitude = mel_to_magnitude(level.float().reshape(-1, *level.shape[-2:]))  # (b, 513, s)
    wav = griffin_lim(magnitude, iterations, seed)[:, : columns * HOP]
    length = columns * HOP if length is None else length
    return torch.nn.functional.pad(wav, (0, length - wav.shape[-1])).reshape(*shape, length)


def vocode_long(mel, samples, device="cpu"):
    """(128, columns) -> (samples,), at most full scale.

    A long sound is made in spans, whose phases do not fit together: they change over within one
    column, the quietest near a span's end.
    """
    columns = mel.shape[1]
    cuts = [0]
    while columns - cuts[-1] > SPAN:
        late = cuts[-1] + SPAN - 128  # the last 2 s of a span
        cuts.append(late + int(mel[:, late : late + 128].sum(0).argmin()))
    out = torch.zeros(columns * HOP)
    rise = (torch.arange(HOP) + 0.5) / HOP
    for a, b in itertools.pairwise([*cuts, columns]):
        # some columns more on either side, for the phases
        low = max(0, a - 16)
        high = min(columns, b + 16)
        wav = vocode(mel[:, low:high].to(device)).cpu()  # ((high - low) * HOP,)
        weight = torch.ones_like(wav)
        if a:
            weight[: (a - low + 1) * HOP] = torch.cat([torch.zeros((a - low) * HOP), rise])
        if b < columns:
            weight[(b - low) * HOP :] = torch.cat([1 - rise, torch.zeros((high - b - 1) * HOP)])
        out[low * HOP : high * HOP] += weight * wav
    return limit(out[:samples])


def limit(wav):
    """Scaled down as a whole where it would clip."""
    return wav / max(1.0, float(wav.abs().max()))


# ---- onsets --------------------------------------------------------------------------------------------------------


def onset_strength(level):
    """How much louder each column of a mel (128, s) is than LAG columns before, rises only, mean over the bins -> (s,).
    Each bin is held against its neighbours too, so that a gliding tone is no onset (Boeck and Widmer 2013)."""
    level = np.maximum(np.asarray(level, np.float32) - QUIET, 0) / (1 - QUIET)  # (m, s)
    padded = np.pad(level, ((1, 1), (LAG, 0)))
    before = np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:])[:, : level.shape[1]]
    before[:, :LAG] = level[:, :LAG]  # what sounds as the clip begins has not begun in it
    return np.maximum(level - before, 0).mean(0)


def detect_onsets(level):
    """Mel (128, s) -> onset times in seconds, ascending. A column's time is its centre."""
    strength, times = onset_strength(level), []
    for k in range(len(strength)):
        near = strength[max(k - APART, 0) : k + APART + 1]
        around = strength[max(k - AROUND, 0) : k + AROUND + 1]
        first = k == 0 or strength[k] > strength[k - 1]  # of equal columns the first
        if first and strength[k] >= near.max() and strength[k] > RISE + ABOVE * np.median(around):
            times.append(k * COLUMN)
    return np.array(times)


def match(found, labelled, tolerance):
    """The most pairs (found, labelled) no further apart than `tolerance`, each used once; both lists ascend."""
    i, j, pairs = 0, 0, []
    while i < len(found) and j < len(labelled):
        if abs(found[i] - labelled[j]) <= tolerance:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif found[i] < labelled[j]:
            i += 1
        else:
            j += 1
    return pairs


def f1(pairs, found, labelled):
    """Precision, recall and F1 of counts; 0 where there is nothing to count."""
    return pairs / max(found, 1), pairs / max(labelled, 1), 2 * pairs / max(found + labelled, 1)
