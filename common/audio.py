"""Mel spectrograms and back, and onsets.

in   sound float32 (n,) at 16 kHz in [-1, 1]
out  mel float32 (128, s) in [0, 1] and sound again; onset times in seconds

A mel is 0.2 log10(magnitude) + 0.8, clipped to [0, 1], so 0 stands for magnitudes up to 1e-4 and 1
for 10 and more; it has 62.5 columns a second. Diff-Foley Sec. 3.1 and its
`data_preprocess/wav2spec.py` fix it. Fast Griffin-Lim is Perraudin, Balazs and Sondergaard 2013.

Differs from the official code: one filterbank at 16 kHz serves mel and its inverse (there the
inverse is at 22,050 Hz, and tones fall).
"""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from common.ffmpeg import SAMPLE_RATE

N_FFT = 1024
HOP = 256
N_MELS = 128
FMIN = 125.0
FMAX = 7600.0
WINDOW = 131072  # samples of one model window: 512 mel columns, 8.192 s
COLUMN = HOP / SAMPLE_RATE  # seconds a mel column
SPAN = 4096  # mel columns vocoded at once: 65 s, which bounds memory
CHUNK = 256  # mel columns that the vocoder works on at once on a CPU: their spectrum is 1 MB

JITTER = 0.8  # radians by which a turn from bin to bin may differ from the likely one, either way

# onset detector, set on recorded sounds of the procedural set (seed 9)
LAG = 2  # columns over which a bin has to rise
QUIET = 0.3  # of a mel; below, nothing counts: room tone, coding residue
RISE = 0.03  # mean rise over the bins that makes an onset
ABOVE = 1.5  # and by how many times the median rise around it, so that steady noise makes none
AROUND = 20  # columns on each side for that median
APART = 3  # columns on each side in which only the strongest rise is an onset


# ---- mel spectrogram and its inverse -------------------------------------------------------------


@lru_cache
def filterbank(rate: int, bands: int, low: float, high: float):
    """Slaney's mel filterbank (librosa's default) from `low` to `high` Hz: (bands, 513) float64.

    Linear below 1 kHz and logarithmic above; triangles of unit area in Hz.
    """
    step = math.log(6.4) / 27  # 27 steps from 1 kHz to 6.4 kHz, by definition of the scale

    def to_mel(hz):
        return hz * 3 / 200 if hz < 1000 else 15 + math.log(hz / 1000) / step

    mels = np.linspace(to_mel(low), to_mel(high), bands + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * step))
    left = edges[:-2, None]
    center = edges[1:-1, None]
    right = edges[2:, None]

    hz = np.linspace(0, rate / 2, N_FFT // 2 + 1)
    rising = (hz - left) / (center - left)
    falling = (right - hz) / (right - center)
    return np.minimum(rising, falling).clip(0) * 2 / (right - left)


@lru_cache
def mel_basis(rate: int = SAMPLE_RATE):
    """The filterbank of all mels here, float32 (128, 513)."""
    return torch.from_numpy(filterbank(rate, N_MELS, FMIN, FMAX)).float()


def stft(wav):
    """Sound (b, n) -> complex spectrum (b, 513, ceil(n/256)), Hann window, reflected at the ends.

    The last sample is dropped, as the published preprocessing does: a centered transform of n-1
    samples has 1 + (n-1)//256 = ceil(n/256) columns, so 131,072 samples make exactly 512.
    """
    window = torch.hann_window(N_FFT, device=wav.device)
    return torch.stft(wav[..., :-1], N_FFT, HOP, window=window, return_complex=True)


def mel(wav):
    """Sound (..., n) -> mel (..., 128, ceil(n/256)) in [0, 1]."""
    *batch, n = wav.shape
    columns = math.ceil(n / HOP)
    # reflection needs more than half a window of sound: append silence
    missing = max(0, N_FFT // 2 + 2 - n)
    wav = F.pad(wav.float().reshape(-1, n), (0, missing))

    magnitude = mel_basis().to(wav.device) @ stft(wav).abs()  # (b, m, s)
    log_mel = (0.2 * magnitude.clamp_min(1e-5).log10() + 0.8).clamp(0, 1)
    return log_mel[..., :columns].reshape(*batch, N_MELS, columns)


def chunks(rows, device):
    """Slices of `rows` to work on one after the other.

    On a CPU they are small, so that intermediate results stay in its cache; a GPU takes all at
    once, because there every operation costs a launch.
    """
    size = CHUNK if device.type == "cpu" else rows
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


@lru_cache
def filterbank_blocks():
    """[(bins, bands, basis[bands, bins])]: the filterbank in blocks of 64 bins.

    Each block has only the bands that reach into its bins; seven eighths of the matrix are zeros.
    """
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
def mel_to_magnitude(log_mel, iterations: int = 32):
    """Mel (b, 128, s) -> non-negative magnitudes (b, 513, s) that have this mel.

    Multiplicative updates for the Kullback-Leibler divergence (Lee and Seung 2001) are scale-free,
    so quiet columns are met as exactly as loud ones. A mel of 0 stands for "at most 1e-4" and gives
    exact silence; resynthesized, that floor would be a steady hiss.
    """
    b, m, s = log_mel.shape
    log_mel = log_mel.transpose(1, 2).reshape(b * s, m)  # every column for itself
    target = torch.where(log_mel > 0, 10 ** (5 * log_mel - 4), 0.0)
    basis = mel_basis().to(target.device)  # (m, 513)
    weight = basis.sum(0).clamp_min(1e-9)
    magnitude = (target / basis.sum(1)) @ basis / weight  # (b*s, 513)

    blocks = []
    for bins, bands, block in filterbank_blocks():
        block = block.to(target.device)
        blocks.append((bins, bands, block.T, block / weight[bins]))
    for rows in chunks(b * s, target.device):
        for _ in range(iterations):
            # the mel of the current magnitudes, then target / current
            ratio = torch.full_like(target[rows], 1e-12)
            for bins, bands, to_mel, _ in blocks:
                ratio[:, bands].addmm_(magnitude[rows, bins], to_mel)
            torch.div(target[rows], ratio, out=ratio)
            for bins, bands, _, to_bins in blocks:
                magnitude[rows, bins] *= ratio[:, bands] @ to_bins
    return magnitude.view(b, s, -1).transpose(1, 2)


def overlap_add(wav, spectrum, window, first):
    """Add the inverse transform of the columns (b, n, 513) from `first` on to `wav` (b, s+3, 256).

    `wav` has a row for each hop, of which a frame covers four.
    """
    frames = torch.fft.irfft(spectrum, N_FFT).mul_(window).unflatten(2, (-1, HOP))  # (b, n, 4, 256)
    n = frames.shape[1]
    for k in range(frames.shape[2]):
        wav[:, first + k : first + k + n] += frames[:, :, k]


def reflect_ends(padded, samples):
    """Write in place what `stft` reads beyond a sound of `samples`.

    The sound lies in `padded` (b, n) from N_FFT // 2 on.
    """
    start = N_FFT // 2
    last = start + samples - 2  # stft drops the sample after this one
    beyond = padded.shape[1] - 1 - last
    padded[:, :start] = padded[:, start + 1 : 2 * start + 1].flip(1)
    padded[:, last + 1 :] = padded[:, last - beyond : last].flip(1)


def random_phases(magnitude, seed):
    """Magnitudes (b, s, 513) -> for each of their `chunks`, random unit numbers (1, n, 513).

    Every item has the same, drawn on the CPU from `seed`.
    """
    _, s, bins = magnitude.shape
    rng = torch.Generator().manual_seed(seed)
    angle = (torch.rand((bins, s), generator=rng) * (2 * math.pi)).T
    for columns in chunks(s, magnitude.device):
        yield torch.polar(torch.ones_like(angle[columns]), angle[columns])[None]


def likely_phases(magnitude, seed):
    """Magnitudes (b, s, 513) -> for each of their `chunks`, unit numbers (b, n, 513).

    What the magnitudes themselves say of the phases within a column, an idea of Prusa, Balazs and
    Sondergaard (2017). A click k samples after the middle of a column has the magnitude cos^2(a)
    there, a = pi k / 1024, which is the Hann window; cos^2(a - pi/4) in the column after and
    cos^2(a + pi/4) in the one before. The roots of these two differ by sqrt(2) tan(a) times the
    root of the first. And its phase turns by pi - 2a from each bin to the next.

    What all phases of a column have in common is random, and so is a part of every turn: steady
    sound would be 62 clicks a second. The random numbers are every item's, drawn on the CPU from
    `seed`.
    """
    _, s, bins = magnitude.shape
    device = magnitude.device
    rng = np.random.default_rng(seed)
    half_turns = 1.0 - 2.0 * (torch.arange(bins, device=device) % 2)
    for columns in chunks(s, device):
        # these columns and one more on either side; beyond the ends, the last one again
        wanted = torch.arange(columns.start - 1, columns.stop + 1, device=device).clamp(0, s - 1)
        # of what is not silence, as a mel has it
        root = magnitude[:, wanted].clamp_min(1e-3).sqrt()
        # between each bin and the next
        root = (root[..., 1:] * root[..., :-1]).sqrt()
        tangent = (root[:, 2:] - root[:, :-2]) / root[:, 1:-1] / math.sqrt(2)
        # a click more than 256 samples from the middle is missing in one neighbor
        tangent = torch.where(tangent.abs() > 1, 2 * tangent - tangent.sign(), tangent)

        drawn = rng.random((columns.stop - columns.start, bins), np.float32)
        drawn = torch.from_numpy(drawn).to(device, magnitude.dtype)
        turn = JITTER * (2 * drawn[:, 1:] - 1) - 2 * tangent.atan()
        common = (2 * math.pi * drawn[:, :1]).expand(len(magnitude), -1, -1)
        angle = torch.cat([common, turn], 2).cumsum(2)  # (b, n, 513)
        yield torch.polar(half_turns.to(angle).expand_as(angle), angle)


@torch.no_grad()
def griffin_lim(magnitude, iterations: int = 32, seed: int = 0, known=None, phases=random_phases):
    """Magnitudes (b, 513, s) -> sound (b, s*256) with consistent phases.

    known: a sound (b, s*256), and its share (s*256,), 0 to 1, in what each iteration starts from:
    then phases fit to it where it is mixed in with these shares.
    phases: `random_phases` or `likely_phases`, what the first iteration starts from.

    Fast Griffin-Lim with momentum 0.99. The sound of an item depends neither on the batch it sits
    in nor on the device, but for the rounding of the FFT. That rounding grows tenfold every ten
    iterations or so: float32 ends within 1e-3 of float64, in any implementation, and equally
    consistent.

    An iteration is `stft(torch.istft(spectrum))` and a new phase. Here both transforms pass over
    the columns once, chunk by chunk, so that no full spectrum is stored; that takes an eighth of
    the time on a CPU.
    """
    b, bins, s = magnitude.shape
    samples = s * HOP
    device = magnitude.device
    window = torch.hann_window(N_FFT, dtype=magnitude.dtype, device=device)
    # (b, s, 513): FFTs want their bins side by side
    magnitude = magnitude.transpose(1, 2).contiguous()

    # the sum of the squared windows over every sample, which overlap-add is divided by
    envelope = magnitude.new_zeros(s + N_FFT // HOP - 1, HOP)
    for k, part in enumerate(window.square().view(-1, HOP)):
        envelope[k : k + s] += part
    envelope.clamp_min_(1e-11)  # 0 at the very first sample

    # the sound of the first phases
    wav = magnitude.new_zeros(b, *envelope.shape)
    for columns, phase in zip(chunks(s, device), phases(magnitude, seed), strict=True):
        overlap_add(wav, magnitude[:, columns] * phase.to(device), window, columns.start)

    # the last iteration's consistent spectrum
    previous = torch.zeros_like(magnitude, dtype=magnitude.dtype.to_complex())
    for _ in range(iterations):
        padded = (wav / envelope).flatten(1)
        if known is not None:
            inner = padded[:, N_FFT // 2 : N_FFT // 2 + samples]
            inner.copy_(torch.lerp(inner, *known))
        reflect_ends(padded, samples)
        frames = padded.unfold(1, N_FFT, HOP)  # (b, s, 1024), a view
        wav.zero_()
        for columns in chunks(s, device):
            consistent = torch.fft.rfft(frames[:, columns] * window)
            # momentum: consistent + 0.99 (consistent - previous), up to a factor, as only its
            # phase is kept
            ahead = torch.sub(consistent, previous[:, columns], alpha=0.99 / 1.99)
            previous[:, columns] = consistent
            overlap_add(wav, ahead.sgn_().mul_(magnitude[:, columns]), window, columns.start)
    return (wav / envelope).flatten(1)[:, N_FFT // 2 : N_FFT // 2 + samples]


def vocode(mel, iterations: int = 28, seed: int = 0, length: int | None = None):
    """Mel (..., 128, s) -> sound (..., s*256), or `length` samples of it.

    The filterbank's inverse, then Griffin-Lim from `likely_phases`: 28 iterations take no more
    time than 32 from random ones, and end nearer to the sound (docs/acceleration.md).
    """
    *batch, m, columns = mel.shape
    # too short to reflect: vocode with silence appended, then cut
    padded = F.pad(mel, (0, max(0, 3 - columns)))
    magnitude = mel_to_magnitude(padded.float().reshape(-1, m, padded.shape[-1]))  # (b, 513, s)
    wav = griffin_lim(magnitude, iterations, seed, phases=likely_phases)[:, : columns * HOP]

    if length is None:
        length = columns * HOP
    return F.pad(wav, (0, length - wav.shape[-1])).reshape(*batch, length)


def vocode_long(mel, samples, device="cpu"):
    """(128, columns), or what is sliced like it -> (samples,), at most full scale.

    A long sound is made in spans, whose phases do not fit together: they change over within one
    column, the quietest near a span's end.
    """
    columns = mel.shape[1]
    out = torch.zeros(columns * HOP)
    rise = (torch.arange(HOP) + 0.5) / HOP
    b = 0
    while b < columns:
        a = b
        b = columns
        if columns - a > SPAN:
            late = a + SPAN - 128  # the last 2 s of a span
            b = late + int(mel[:, late : late + 128].sum(0).argmin())
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
    return limit(out[:samples], out=out[:samples])


def limit(wav, out=None):
    """Scaled down as a whole where it would clip; into `out`, which may be `wav`."""
    # without a copy of the magnitudes
    return torch.div(wav, max(1.0, float(wav.max()), -float(wav.min())), out=out)


# ---- onsets --------------------------------------------------------------------------------------


def onset_strength(mel):
    """Mel (128, s) -> spectral flux (s,): the mean over bins of rises against LAG columns before.

    Each bin is compared to the loudest of itself and its neighbors then, so that a gliding tone is
    no onset (SuperFlux, Boeck and Widmer 2013).
    """
    loud = np.maximum(np.asarray(mel, np.float32) - QUIET, 0) / (1 - QUIET)  # (m, s)
    padded = np.pad(loud, ((1, 1), (LAG, 0)))
    before = np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:])[:, : loud.shape[1]]
    # what sounds as the clip begins has not begun in it
    before[:, :LAG] = loud[:, :LAG]
    return np.maximum(loud - before, 0).mean(0)


def detect_onsets(mel):
    """Mel (128, s), or what is sliced like it -> onset times in seconds, ascending.

    A column's time is its center.
    """
    # in spans, as whoever slices an hour may hold a span of it
    spans = []
    for first in range(0, mel.shape[1], SPAN):
        low = max(0, first - LAG)
        spans.append(onset_strength(mel[:, low : first + SPAN])[first - low :])
    strength = np.concatenate(spans) if spans else np.zeros(0)
    times = []
    for k, value in enumerate(strength):
        near = strength[max(k - APART, 0) : k + APART + 1]
        around = strength[max(k - AROUND, 0) : k + AROUND + 1]
        # of equal columns the first
        rises = k == 0 or value > strength[k - 1]
        if rises and value >= near.max() and value > RISE + ABOVE * np.median(around):
            times.append(k * COLUMN)
    return np.array(times)


def detect_onsets_flux(mel):
    """The textbook's spectral flux: mel (128, s) -> onset times in seconds, ascending.

    A second opinion for evaluate.py. Rises of the log magnitude from one column to the next, their
    mean over bins; peaks above the local mean by RISE, more than APART columns from each other.
    """
    log_mel = np.asarray(mel, np.float32)
    flux = np.maximum(np.diff(log_mel, axis=1, prepend=log_mel[:, :1]), 0).mean(0)  # (s,)
    peaks = []
    for k, value in enumerate(flux):
        near = flux[max(k - APART, 0) : k + APART + 1]
        around = flux[max(k - AROUND, 0) : k + AROUND + 1]
        # of equal columns the first
        apart = not peaks or k - peaks[-1] > APART
        if apart and value >= near.max() and value > RISE + around.mean():
            peaks.append(k)
    return np.array(peaks) * COLUMN


def match(predicted, annotated, tolerance: float):
    """The most index pairs (predicted, annotated) within `tolerance` seconds, each used once.

    Both are ascending times in seconds.
    """
    pairs = []
    i = 0
    j = 0
    while i < len(predicted) and j < len(annotated):
        if abs(predicted[i] - annotated[j]) <= tolerance:
            pairs.append((i, j))
            i += 1
            j += 1
        elif predicted[i] < annotated[j]:
            i += 1
        else:
            j += 1
    return pairs


def f1(pairs: int, predicted: int, annotated: int):
    """(precision, recall, F1) of counts; 0 where there is nothing to count."""
    precision = pairs / max(predicted, 1)
    recall = pairs / max(annotated, 1)
    return precision, recall, 2 * pairs / max(predicted + annotated, 1)
