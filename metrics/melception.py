"""The paper's figures (Diff-Foley, Sec. 5.1): FID, inception score and KL in the space of Melception, SpecVQGAN's classifier of VGGSound.

in   SpecVQGAN's published weights, melception-21-05-10T09-28-40.pt (md5 a71a4104...), and beside them the mean and deviation of its mel
     bands, train_means_stds_melspec_10s_22050hz.txt (f449c6fd...; addresses: its specvqgan/util.py); then 16 kHz sound and its mel
out  features (2048,) and logits (309,) of a sound; of sets of clips FID, inception score with its deviation, and KL

    python evaluate.py --data vggsound-test --official-melception melception-21-05-10T09-28-40.pt

What follows which file (S: v-iashin/SpecVQGAN, D: luosiallen/Diff-Foley; their evaluation/readme.md: SpecVQGAN's script on mels turned from
128 to 80 bands by transform_spec.py):
  network      S evaluation/feature_extractors/melception.py: torchvision's Inception3 (models/inception.py) of one input channel, without
               its two max-pools, 309 classes; the auxiliary head is in the file and never used
  normalising  S vggishish/transforms.py: each band's mean off and by its deviation, of mels in [0, 1]
  true sound   S feature_extraction/extract_mel_spectrogram.py, configs/vggsound_transformer.yaml: 10 s at 22,050 Hz, the middle 848 of 860 columns
  made sound   D evaluation/transform_spec.py, oddities included: it spreads the bands of 125 to 7600 Hz as if they reached from 0 to
               8000 Hz, reads the 16 kHz spectrum as one of 22,050 Hz and its 80 bands end at 11,025 Hz: 1 kHz looks like 1.2 kHz
  figures      S evaluation/metrics/{fid,isc,kl}.py, evaluation/configs/eval_melception_vggsound.yaml: seed 2020, 10 splits
Row ground_truth of the table is true sound put through the made sounds' way: what that way alone costs. Fewer clips make a larger FID.

Never run with the published weights, which were not at hand. Checked once, without being needed here: the network against torchvision 0.29's
(names and their order, shapes, outputs: equal), both ways to the mel against librosa 0.11 with resampy 0.2's filter (within 1e-5). That the
paper took SpecVQGAN's own mels for true sound is how its readme reads; it does not say so, nor how many clips or which seeds it drew.
Differs: the paper's made mels come from the decoder, these from the sound that Griffin-Lim makes of it; clips are shuffled, for the
splits, from the order of their names, there from that of class and name.
"""

import functools
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.audio import FMAX, FMIN, HOP, N_FFT, N_MELS, SAMPLE_RATE, filterbank
from common.checkpoints import Checkpoint, CheckpointError, load_into
from metrics.judge import divergence, frechet, inception_score

CLASSES = 309
STATISTICS = "train_means_stds_melspec_10s_22050hz.txt"
RATE, BANDS, SECONDS = 22050, 80, 10
FIRST, CROP = 6, 848  # the middle of 860 columns
UP, DOWN = 441, 320  # 22050 / 16000
ZEROS, TABLE = 64, 512  # of the sinc that resamples: zero crossings, values between two of them,
ROLLOFF, BETA = 0.9475937167399596, 14.769656459379492  # the pass band's end, the window's shape
SHORTEST = 23  # columns below which a stride finds nothing left
SPLITS, SEED, EPS = 10, 2020, 1e-6

Heard = namedtuple(
    "Heard", "features unbiased logits"
)  # numpy; `unbiased`: without the last layer's bias


# ---------------------------------------------------------------------------------------------------------------------
# the network; b clips, m bands, s columns


class Unit(nn.Module):
    """Convolution, norm, ReLU. Without `padding` the map shrinks."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches over one map, side by side in its channels. A branch: a chain of (width, kernel), called NAME or NAME_1, NAME_2 ...; a
    step of two kernels forks, into NAME_2a and NAME_2b. The pooled branch is last: averaged and mixed by a convolution of width `pool`,
    or, where that is None, the maximum at stride 2; then every chain ends with stride 2 too."""

    def __init__(self, c_in, pool, **branches):
        super().__init__()
        self.chains = []  # names: one a step, two where it forks
        for name, steps in branches.items():
            chain, width = [], c_in
            for number, (c_out, *kernels) in enumerate(steps, 1):
                halve, label = (
                    pool is None and number == len(steps),
                    f"{name}_{number}" if len(steps) > 1 else name,
                )
                chain.append([label + letter for letter in ("ab" if len(kernels) > 1 else [""])])
                for key, kernel in zip(chain[-1], kernels):
                    self.add_module(
                        key,
                        Unit(
                            width,
                            c_out,
                            kernel,
                            1 + halve,
                            0 if halve else tuple(k // 2 for k in kernel),
                        ),
                    )
                width = c_out
            self.chains.append(chain)
        self.branch_pool = Unit(c_in, pool, 1) if pool else None

    def forward(self, x):
        out = []
        for chain in self.chains:
            out.append(x)
            for step in chain:
                out[-1] = torch.cat([getattr(self, key)(out[-1]) for key in step], 1)
        out.append(
            self.branch_pool(F.avg_pool2d(x, 3, 1, 1))
            if self.branch_pool
            else F.max_pool2d(x, 3, 2)
        )
        return torch.cat(out, 1)


ONE, THREE, FIVE, WIDE, TALL = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def fives(c_in, pool):
    return Mixed(
        c_in,
        pool,
        branch1x1=[(64, ONE)],
        branch5x5=[(48, ONE), (64, FIVE)],
        branch3x3dbl=[(64, ONE), (96, THREE), (96, THREE)],
    )


def sevens(c):
    return Mixed(
        768,
        192,
        branch1x1=[(192, ONE)],
        branch7x7=[(c, ONE), (c, WIDE), (192, TALL)],
        branch7x7dbl=[(c, ONE), (c, TALL), (c, WIDE), (c, TALL), (192, WIDE)],
    )


def forks(c_in):
    fork = 384, (1, 3), (3, 1)
    return Mixed(
        c_in,
        192,
        branch1x1=[(320, ONE)],
        branch3x3=[(384, ONE), fork],
        branch3x3dbl=[(448, ONE), (384, THREE), fork],
    )


class Melception(nn.Module):
    """Named as torchvision names it."""

    statistics = None  # (2, m, 1): mean and deviation of the bands

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(1, 32, 3, stride=2)  # the parts run in this order
        self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = Unit(32, 32, 3), Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Unit(64, 80, 1), Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = fives(192, 32), fives(256, 64), fives(288, 64)
        self.Mixed_6a = Mixed(
            288, None, branch3x3=[(384, THREE)], branch3x3dbl=[(64, ONE), (96, THREE), (96, THREE)]
        )
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            sevens(c) for c in (128, 160, 160, 192)
        )
        self.AuxLogits = nn.ModuleDict(
            {"conv0": Unit(768, 128, 1), "conv1": Unit(128, 768, 5), "fc": nn.Linear(768, CLASSES)}
        )
        self.Mixed_7a = Mixed(
            768,
            None,
            branch3x3=[(192, ONE), (320, THREE)],
            branch7x7x3=[(192, ONE), (192, WIDE), (192, TALL), (192, THREE)],
        )
        self.Mixed_7b, self.Mixed_7c = forks(1280), forks(2048)
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, x):  # normalised (b, m, s) -> (b, 2048), (b, 309), (b, 309)
        x = x[:, None]
        for name, part in self.named_children():
            if name.startswith(("Conv2d", "Mixed")):
                x = part(x)  # ... (b, 192, 35, s/2), (b, 768, 17, s/4), (b, 2048, 8, s/8)
        x = x.mean((2, 3))
        unbiased = F.linear(x, self.fc.weight)
        return x, unbiased, unbiased + self.fc.bias

    @torch.no_grad()
    def clip(self, level):
        """Mel (80, s) in [0, 1] -> Heard."""
        level = np.pad(level, ((0, 0), (0, max(0, SHORTEST - level.shape[1]))))
        mean, deviation = self.statistics
        x = torch.from_numpy((level - mean) / deviation).float().to(self.fc.weight.device)
        return Heard(*(y[0].cpu().numpy() for y in self(x[None])))

    @classmethod
    def load(cls, path, device="cpu"):
        """Strict. SpecVQGAN's trainer (vggishish/logger.py) puts the weights beside loss, metrics, epoch and optimizer, as `model`."""
        file, statistics = Checkpoint(path), Path(path).with_name(STATISTICS)
        with torch.device("meta"):
            model = cls()
        model = load_into(model, file, device=device)
        try:
            table = np.loadtxt(statistics)
            if table.shape != (BANDS, 2) or not np.isfinite(table).all() or table[:, 1].min() <= 0:
                raise ValueError(f"not {BANDS} means and deviations")
        except (OSError, ValueError) as e:
            raise CheckpointError(
                f"{statistics}: not read ({getattr(e, 'strerror', None) or e}); put SpecVQGAN's there, "
                "of its specvqgan/modules/losses/vggishish/data"
            ) from None
        model.statistics = table.T[..., None]
        return model


# ---------------------------------------------------------------------------------------------------------------------
# 16 kHz sound to what the network hears; float64


@functools.lru_cache
def interpolation():
    """How UP new samples weigh DOWN old ones and ZEROS more on each side: a tabled sinc (resampy's kaiser_best, librosa 0.8's). (448, 441)"""
    grid = np.arange(ZEROS * TABLE + 1) / TABLE
    half = (
        ROLLOFF * np.sinc(ROLLOFF * grid) * np.kaiser(2 * ZEROS * TABLE + 1, BETA)[ZEROS * TABLE :]
    )
    distance = np.arange(UP) * DOWN / UP - np.arange(-ZEROS, DOWN + ZEROS)[:, None]
    return np.interp(np.abs(distance), grid, half, right=0)


def resample(x):
    """(..., n) -> (..., ceil(n * 441/320)), the last one 0 unless that is whole (resampy 0.2's length, librosa's padding)."""
    n = x.shape[-1]
    blocks = -(-n // DOWN)
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(ZEROS, blocks * DOWN - n + ZEROS)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, DOWN + 2 * ZEROS, -1)[
        ..., ::DOWN, :
    ]  # (..., blocks, 448)
    y = (windows @ interpolation()).reshape(*x.shape[:-1], -1)[..., : -(-n * UP // DOWN)]
    y[..., n * UP // DOWN :] = 0
    return y


def to_level(magnitude):
    return (0.2 * np.log10(np.maximum(magnitude, 1e-5)) + 0.8).clip(0, 1)


def true_mel(wav):
    """16 kHz sound (n,) -> SpecVQGAN's mel of its first 10 s, silence after it if it is shorter. (80, 848)"""
    y = resample(np.asarray(wav, float)[: SECONDS * SAMPLE_RATE])
    y = torch.from_numpy(np.pad(y, (0, SECONDS * RATE - len(y))))
    spectrum = (
        torch.stft(
            y, N_FFT, HOP, window=torch.hann_window(N_FFT, dtype=y.dtype), return_complex=True
        )
        .abs()
        .numpy()
    )
    return to_level(filterbank(RATE, BANDS, FMIN, FMAX) @ spectrum[:, FIRST : FIRST + CROP])


@functools.lru_cache
def bands_to_bands():
    """(80, 128), as transform_spec.py goes from one filterbank to the other: over the spectrum's 513 bins, whatever their frequency."""
    return filterbank(RATE, BANDS, 0, RATE / 2) @ np.linalg.pinv(
        filterbank(SAMPLE_RATE, N_MELS, 0, SAMPLE_RATE / 2)
    )


def made_mel(level):
    """Mel (128, s) at 16 kHz, of `audio.mel` -> transform_spec.py's of it, (80, ceil(s * 441/320)): 706 columns of 512."""
    return to_level(bands_to_bands() @ resample(10 ** (5 * np.asarray(level, float) - 4)))


# ---------------------------------------------------------------------------------------------------------------------
# figures of sets of clips


def softmax(logits):
    odds = np.exp(np.float64(logits) - np.max(logits, -1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def fid(made, true):
    """Fréchet distance of features (n, 2048), in the space that the clips span: outside it there is none."""
    made, true = np.float64(made), np.float64(true)
    axes = np.linalg.qr(np.concatenate([made, true]).T)[0]  # (2048, at most one a clip)
    return frechet(made @ axes, true @ axes)


def scores(classes):
    """Probabilities (n, 309) -> mean and deviation of the inception scores of SPLITS shuffled parts; None, None of fewer clips than parts."""
    n = len(classes)
    if n < SPLITS:
        return None, None
    classes = classes[np.random.RandomState(SEED).permutation(n)]
    parts = [
        inception_score(classes[k * n // SPLITS : (k + 1) * n // SPLITS]) for k in range(SPLITS)
    ]
    return float(np.mean(parts)), float(np.std(parts))


def kl(true, made):
    """Logits (..., 309) of a video's true sound and of a made one -> KL(true | made); its mean over all clips, several of one video
    too, is the paper's MKL."""
    return divergence(softmax(true), softmax(made) + EPS)
