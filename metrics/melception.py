"""Never run on the published weights. The paper's FID, inception score and KL (Sec. 5.1).

They are computed in the space of Melception, SpecVQGAN's classifier of VGGSound's 309 classes.

in   SpecVQGAN's published weights, melception-21-05-10T09-28-40.pt (md5 a71a4104...), and beside
     them the mean and deviation of its mel bands, train_means_stds_melspec_10s_22050hz.txt
     (f449c6fd...; addresses: its specvqgan/util.py); then 16 kHz sound and its mel
out  features (2048,) and logits (309,) of a sound; of sets of clips FID, inception score with its
     deviation, and KL

    python evaluate.py --data vggsound-test --official-melception melception-21-05-10T09-28-40.pt

What follows which file (S: v-iashin/SpecVQGAN, D: luosiallen/Diff-Foley; by its
evaluation/readme.md that is SpecVQGAN's script on mels that transform_spec.py turned from 128 to 80
bands):

network          S evaluation/feature_extractors/melception.py: torchvision's Inception3
                 (models/inception.py) with one input channel, without its two max-pools, 309
                 classes; the auxiliary head is in the file and never used
normalization    S vggishish/transforms.py: mels in [0, 1], standardized band by band
reference sound  S feature_extraction/extract_mel_spectrogram.py, configs/vggsound_transformer.yaml:
                 10 s at 22,050 Hz, the middle 848 of 860 columns
generated sound  D evaluation/transform_spec.py, oddities included: it spreads the bands of 125 to
                 7600 Hz as if they reached from 0 to 8000 Hz, reads the 16 kHz spectrum as one of
                 22,050 Hz, and its 80 bands end at 11,025 Hz: 1 kHz looks like 1.2 kHz
scores           S evaluation/metrics/{fid,isc,kl}.py, evaluation/configs/
                 eval_melception_vggsound.yaml: seed 2020, 10 splits

The row ground_truth of evaluate.py's table is recorded sound on the generated sound's path: what
that path alone costs. Fewer clips make a larger FID.

The weights were not available. Checked once: the network against torchvision 0.29 (names and their
order, shapes, outputs: equal), both mels against librosa 0.11 with resampy 0.2's filter (within
1e-5). That the paper took SpecVQGAN's own mels as reference is how its readme reads; it says
neither that nor how many clips or which seeds it drew.

Differs: the paper's generated mels come from the decoder, these from the sound that Griffin-Lim
makes of it; clips are shuffled for the splits from the order of their names, there from that of
class and name.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.audio import FMAX, FMIN, HOP, N_FFT, N_MELS, SAMPLE_RATE, filterbank
from common.checkpoints import Checkpoint, CheckpointError, load_into
from metrics.judge import frechet_distance, inception_score, kl_divergence

CLASSES = 309
STATISTICS = "train_means_stds_melspec_10s_22050hz.txt"

# SpecVQGAN's mel
RATE = 22050  # Hz
BANDS = 80
SECONDS = 10
FIRST = 6  # column of the crop: the middle of 860 columns
CROP = 848
SHORTEST = 23  # columns below which a strided layer has no output

# resampling by UP / DOWN = 22050 / 16000 with a tabled, windowed sinc
UP = 441
DOWN = 320
ZEROS = 64  # zero crossings on each side
TABLE = 512  # tabled values between two of them
ROLLOFF = 0.9475937167399596  # end of the pass band
BETA = 14.769656459379492  # of the Kaiser window

# scores
SPLITS = 10
SEED = 2020
EPS = 1e-6


class Output(NamedTuple):
    """What the network says of a sound, or of a batch with a dimension more."""

    features: np.ndarray  # (2048,)
    unbiased: np.ndarray  # (309,) logits without the last layer's bias, for the inception score
    logits: np.ndarray  # (309,)


# --------------------------------------------------------------------------------------------------
# the network, named as torchvision names it; b clips, m bands, s columns


class Conv(nn.Module):
    """Convolution, batch norm, ReLU; with `same` and stride 1 the map keeps its size."""

    def __init__(self, c_in, c_out, kernel, stride=1, same=True):
        super().__init__()
        padding = "same" if same and stride == 1 else "valid"
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """Branches over one map, concatenated in their channels.

    branches  name=[(channels, kernel), ...]: convolutions in sequence, called NAME, or NAME_1,
              NAME_2 ... where there are several. With two kernels in a step two convolutions see
              the same input and are concatenated: NAME_2a and NAME_2b
    pool      channels of the last branch: average pooling and a 1x1 convolution. None: the block
              halves the map; the last branch is max pooling and the others end with stride 2
    """

    def __init__(self, c_in, pool, **branches):
        super().__init__()
        self.branches = []  # for each branch, the names of the convolutions of each step
        for name, steps in branches.items():
            branch = []
            channels = c_in
            for number, (c_out, *kernels) in enumerate(steps, 1):
                last = number == len(steps)
                stride = 2 if last and pool is None else 1
                label = name if len(steps) == 1 else f"{name}_{number}"
                labels = [label] if len(kernels) == 1 else [f"{label}a", f"{label}b"]
                for key, kernel in zip(labels, kernels, strict=True):
                    self.add_module(key, Conv(channels, c_out, kernel, stride))
                branch.append(labels)
                channels = c_out
            self.branches.append(branch)
        self.branch_pool = Conv(c_in, pool, 1) if pool else None

    def forward(self, x):
        outputs = []
        for branch in self.branches:
            y = x
            for labels in branch:
                y = torch.cat([getattr(self, label)(y) for label in labels], 1)
            outputs.append(y)
        if self.branch_pool:
            outputs.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1)))
        else:
            outputs.append(F.max_pool2d(x, 3, 2))
        return torch.cat(outputs, 1)


def inception_a(c_in, pool):
    return Inception(
        c_in,
        pool,
        branch1x1=[(64, 1)],
        branch5x5=[(48, 1), (64, 5)],
        branch3x3dbl=[(64, 1), (96, 3), (96, 3)],
    )


def inception_c(c):
    row = (1, 7)
    column = (7, 1)
    return Inception(
        768,
        192,
        branch1x1=[(192, 1)],
        branch7x7=[(c, 1), (c, row), (192, column)],
        branch7x7dbl=[(c, 1), (c, column), (c, row), (c, column), (192, row)],
    )


def inception_e(c_in):
    row_and_column = (384, (1, 3), (3, 1))
    return Inception(
        c_in,
        192,
        branch1x1=[(320, 1)],
        branch3x3=[(384, 1), row_and_column],
        branch3x3dbl=[(448, 1), (384, 3), row_and_column],
    )


class Melception(nn.Module):
    """Inception3 of mels. `load` reads the published file; the order of the layers is theirs."""

    statistics = None  # (2, m, 1): mean and deviation of the bands

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(1, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, same=False)
        self.Mixed_5b = inception_a(192, 32)
        self.Mixed_5c = inception_a(256, 64)
        self.Mixed_5d = inception_a(288, 64)
        self.Mixed_6a = Inception(
            288, None, branch3x3=[(384, 3)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)]
        )
        self.Mixed_6b = inception_c(128)
        self.Mixed_6c = inception_c(160)
        self.Mixed_6d = inception_c(160)
        self.Mixed_6e = inception_c(192)
        # in the published file, and never used
        self.AuxLogits = nn.ModuleDict(
            {"conv0": Conv(768, 128, 1), "conv1": Conv(128, 768, 5), "fc": nn.Linear(768, CLASSES)}
        )
        self.Mixed_7a = Inception(
            768,
            None,
            branch3x3=[(192, 1), (320, 3)],
            branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)],
        )
        self.Mixed_7b = inception_e(1280)
        self.Mixed_7c = inception_e(2048)
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, x):
        """Standardized mels (b, m, s) -> Output of tensors (b, ...)."""
        x = x[:, None]
        for name, layer in self.named_children():
            if name.startswith(("Conv2d", "Mixed")):
                x = layer(x)  # ... (b, 192, 35, s/2), (b, 768, 17, s/4), (b, 2048, 8, s/8)
        x = x.mean((2, 3))
        unbiased = F.linear(x, self.fc.weight)
        return Output(x, unbiased, unbiased + self.fc.bias)

    @torch.no_grad()
    def embed_clip(self, mel):
        """Mel (80, s) in [0, 1] -> Output."""
        mel = np.pad(mel, ((0, 0), (0, max(0, SHORTEST - mel.shape[1]))))
        mean, deviation = self.statistics
        x = torch.from_numpy((mel - mean) / deviation).float().to(self.fc.weight.device)
        return Output(*(y[0].cpu().numpy() for y in self(x[None])))

    @classmethod
    def load(cls, path, device="cpu"):
        """The network of SpecVQGAN's file, and its bands' statistics from the file beside it.

        Strict; CheckpointError where one of them is missing or something else. SpecVQGAN's trainer
        (vggishish/logger.py) saves the weights as `model`, beside loss, metrics and optimizer.
        """
        statistics = Path(path).with_name(STATISTICS)
        with torch.device("meta"):
            model = cls()
        model = load_into(model, Checkpoint(path), device=device)
        try:
            table = np.loadtxt(statistics)
            if table.shape != (BANDS, 2) or not np.isfinite(table).all() or table[:, 1].min() <= 0:
                raise ValueError(f"not {BANDS} means and deviations")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(
                f"{statistics}: not read ({reason}); put SpecVQGAN's there, "
                "of its specvqgan/modules/losses/vggishish/data"
            ) from None
        model.statistics = table.T[..., None]
        return model


# --------------------------------------------------------------------------------------------------
# mels as the network was trained on; float64


@functools.lru_cache
def resampling_matrix():
    """The weights of DOWN samples and ZEROS more on each side in UP new ones: (448, 441).

    A tabled sinc: resampy's kaiser_best, librosa 0.8's default.
    """
    grid = np.arange(ZEROS * TABLE + 1) / TABLE
    window = np.kaiser(2 * ZEROS * TABLE + 1, BETA)[ZEROS * TABLE :]
    half = ROLLOFF * np.sinc(ROLLOFF * grid) * window
    distance = np.arange(UP) * DOWN / UP - np.arange(-ZEROS, DOWN + ZEROS)[:, None]
    return np.interp(np.abs(distance), grid, half, right=0)


def resample(x):
    """16,000 to 22,050 Hz along the last axis: (..., n) -> (..., ceil(n * 441/320)).

    The last sample is 0 unless n * 441/320 is whole (resampy 0.2's length, librosa's padding).
    """
    *batch, n = x.shape
    padded = np.pad(x.reshape(-1, n), ((0, 0), (ZEROS, -n % DOWN + ZEROS)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, DOWN + 2 * ZEROS, 1)
    y = windows[:, ::DOWN] @ resampling_matrix()  # (..., blocks, 448) @ (448, 441)
    y = y.reshape(*batch, -1)[..., : -(-n * UP // DOWN)]
    y[..., n * UP // DOWN :] = 0
    return y


def to_mel(magnitude):
    """Magnitudes of bands -> [0, 1], as `audio.mel`."""
    return (0.2 * np.log10(np.maximum(magnitude, 1e-5)) + 0.8).clip(0, 1)


def reference_mel(wav):
    """16 kHz sound (n,) -> SpecVQGAN's mel of its first 10 s, padded with silence: (80, 848)."""
    y = resample(np.asarray(wav, float)[: SECONDS * SAMPLE_RATE])
    y = torch.from_numpy(np.pad(y, (0, SECONDS * RATE - len(y))))
    window = torch.hann_window(N_FFT, dtype=y.dtype)
    spectrum = torch.stft(y, N_FFT, HOP, window=window, return_complex=True).abs().numpy()
    return to_mel(filterbank(RATE, BANDS, FMIN, FMAX) @ spectrum[:, FIRST : FIRST + CROP])


@functools.lru_cache
def band_matrix():
    """From our 128 bands to 80, as transform_spec.py: (80, 128).

    It goes over the spectrum's 513 bins, whatever their frequency.
    """
    inverse = np.linalg.pinv(filterbank(SAMPLE_RATE, N_MELS, 0, SAMPLE_RATE / 2))
    return filterbank(RATE, BANDS, 0, RATE / 2) @ inverse


def generated_mel(mel):
    """Mel (128, s) of `audio.mel` -> transform_spec.py's of it, (80, ceil(s * 441/320)).

    706 columns of 512.
    """
    return to_mel(band_matrix() @ resample(10 ** (5 * np.asarray(mel, float) - 4)))


# --------------------------------------------------------------------------------------------------
# scores of sets of clips


def softmax(logits):
    """Probabilities along the last axis, float64."""
    odds = np.exp(np.float64(logits) - np.max(logits, -1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def fid(generated, reference):
    """Fréchet distance of features (n, 2048)."""
    generated = np.float64(generated)
    reference = np.float64(reference)
    # computed in the space that the clips span: outside it there is none
    axes = np.linalg.qr(np.concatenate([generated, reference]).T)[0]  # (2048, at most one a clip)
    return frechet_distance(generated @ axes, reference @ axes)


def split_inception_score(probabilities):
    """(n, 309) -> mean and deviation of the inception scores of SPLITS shuffled parts.

    (None, None) for fewer clips than parts.
    """
    n = len(probabilities)
    if n < SPLITS:
        return None, None
    shuffled = probabilities[np.random.RandomState(SEED).permutation(n)]
    scores = []
    for k in range(SPLITS):
        part = shuffled[k * n // SPLITS : (k + 1) * n // SPLITS]
        scores.append(inception_score(part))
    return float(np.mean(scores)), float(np.std(scores))


def kl(reference, generated):
    """KL(reference || generated) of the logits (..., 309) of two sounds for one video.

    The mean over all clips, several of one video too, is the paper's MKL.
    """
    return kl_divergence(softmax(reference), softmax(generated) + EPS)
