"""A small network from mel to the spectrum's magnitudes and how its phases go on.

in   training: a folder of clips or a prepared set; use: mel (b, 128, s) in [0, 1]
out  magnitudes (b, 478, s), and for each of these bins the cosine and sine of how much its phase
     turns until the next column and the next bin; OUT/last.safetensors

    python vocoder.py --data clips/                     0.2 s a step on one CPU core

A spectrum's phases are not in its mel, and no network can say them: of a steady tone the mel stays
the same while its phase goes on turning. How much it turns is in the mel, as the tone's frequency;
so is, in the turn from bin to bin, where in a column a hit lies. Magnitude and both turns together
are a spectrum but for one phase (Prusa, Balazs and Sondergaard 2017 take the turns from the
magnitude's derivatives; Takamichi et al. 2018 have a network predict them). `common/audio.py`
integrates them and makes the result consistent with a few iterations of Griffin-Lim.

Blocks are ConvNeXt's over columns, as in Vocos (Siuzdak 2023). Learned is a regression, nothing
adversarial: the magnitude's logarithm, and the mean of cos and sin, whose length is small where a
turn cannot be told, as in noise.
"""

import functools
import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from common import audio, distributed, training
from common.checkpoints import load_network, one_line

# bins within the filterbank's 125 to 7600 Hz; of others a mel says nothing
FIRST = 9
BINS = 478
# magnitudes below are silence: a mel of 0 in every band
FLOOR = 1e-3
CROP = 128  # mel columns of a training sample
FASTEST = 1.5  # how much faster or slower training plays a sound

RECIPES = {
    "mini": {
        "steps": 3000,
        "batch": 64,
        "micro_batch": 64,
        "lr": 1e-3,
        "warmup": 100,
        "grad_clip": 1,
    }
}


# --------------------------------------------------------------------------------------------------
# the network


@dataclass(frozen=True)
class VocoderConfig:
    width: int = 256
    hidden: int = 512
    blocks: int = 4


class Block(nn.Module):
    """ConvNeXt's: a convolution over 7 columns in each channel, then two layers at each column."""

    def __init__(self, width, hidden, scale):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.scale = nn.Parameter(torch.full((width,), scale))

    def forward(self, x):  # (b, s, width) -> the same shape
        h = self.conv(x.transpose(1, 2)).transpose(1, 2)
        h = self.down(F.gelu(self.up(self.norm(h))))
        return x + self.scale * h


class Vocoder(nn.Module):
    """mel (b, 128, s) -> log magnitudes and turns, each column from 13 on either side."""

    def __init__(self, config=VocoderConfig()):
        super().__init__()
        self.config = config
        self.stem = nn.Conv1d(audio.N_MELS, config.width, 3, padding=1)
        self.norm_in = nn.LayerNorm(config.width)
        blocks = (
            Block(config.width, config.hidden, 1 / config.blocks) for _ in range(config.blocks)
        )
        self.blocks = nn.Sequential(*blocks)
        self.norm_out = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, 5 * BINS)
        # at first the interpolated mel, the bins' own frequencies and the delays that it tells of
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.bias[BINS::2] = 0.5

    __repr__ = one_line

    def forward(self, mel):
        """Mel (b, 128, s) -> log magnitudes (b, s, 478) in a mel's units; turns (b, s, 478, 2).

        The turns are complex numbers (cos, sin) of at most about length 1, to the next column and
        to the next bin; see `turns`.
        """
        x = self.norm_in(self.stem(4 * mel - 2).transpose(1, 2))
        out = self.head(self.norm_out(self.blocks(x))).float()  # (b, s, 5 * 478)
        interpolated = interpolate(mel)
        log_magnitude = out[..., :BINS] + interpolated
        next_column, next_bin = out[..., BINS:].unflatten(2, (2, BINS, 2)).unbind(2)
        return log_magnitude, next_column, turned(next_bin, delays(interpolated))

    @classmethod
    def load(cls, path, device="cpu"):
        """The network of a file that training wrote, for use; CheckpointError for any other."""
        return load_network(cls, path, VocoderConfig(), device)


def compress(magnitude):
    """Magnitudes -> a mel's units."""
    return 0.2 * magnitude.clamp_min(FLOOR).log10() + 0.8


def interpolate(mel):
    """Mel (b, 128, s) -> log magnitudes (b, s, 478): each bin's from the bands it lies in."""
    basis = audio.mel_basis().to(mel.device)
    weight = basis[:, FIRST : FIRST + BINS]
    bands = 10 ** (5 * mel.float().transpose(1, 2) - 4) / basis.sum(1)  # (b, s, 128)
    # eight bits would not do
    with torch.autocast(mel.device.type, enabled=False):
        return compress(bands @ weight / weight.sum(0))


def delays(log_magnitude):
    """Log magnitudes (b, s, 478) in a mel's units -> angles (b, s, 478) to the next bin.

    By the phase gradient, as in `audio.likely_phases`.
    """
    rise = F.pad(log_magnitude, (0, 0, 1, 1), mode="replicate")
    rise = 5 * math.log(10) * (rise[:, 2:] - rise[:, :-2]) / 2
    rise = F.pad(rise, (0, 1), mode="replicate")
    return -audio.DELAY * (rise[..., 1:] + rise[..., :-1]) / 2


def turned(turn, angle):
    """Numbers (..., 2), cos and sin, turned by angles (...)."""
    cos, sin = angle.cos(), angle.sin()
    x, y = turn.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], -1)


# --------------------------------------------------------------------------------------------------
# from turns to phases


def integrate(magnitude, next_column, next_bin, seed: int = 0):
    """Magnitudes (s, k) and turns (s, k, 2), tensors -> unit numbers (s, k) complex.

    Column after column. Within one, the turns from bin to bin, added up, say all phases but for
    what they have in common; that, near every bin, is what the turns from the column before say
    there, weighted with the magnitude that both columns have. Where there was nothing before, as
    at a hit, it is drawn from `seed`. On the CPU: 512 short columns are no work for a GPU.
    """
    magnitude = magnitude.cpu().numpy()
    next_column = torch.view_as_complex(next_column.cpu().contiguous()).numpy()
    next_bin = torch.view_as_complex(next_bin.cpu().contiguous()).sgn()
    s, k = magnitude.shape

    # phases within each column
    within = np.ones((s, k), np.complex64)
    within[:, 1:] = torch.cumprod(-next_bin[:, :-1], 1).numpy()
    within /= np.abs(within) + 1e-20

    # what each column says of the next, against that
    quarters = np.array([1, 1j, -1, -1j], np.complex64)[np.arange(FIRST, FIRST + k) % 4]
    common = np.minimum(magnitude[1:], magnitude[:-1])
    onward = common * quarters * next_column[:-1] * within[1:].conj()
    rng = np.random.default_rng(seed)
    unknown = np.exp(2j * np.pi * rng.random((s, 1))).astype(np.complex64)
    weak = audio.UNKNOWN * magnitude * unknown
    near = (1 / (1 + (np.arange(-audio.REACH, audio.REACH + 1) / audio.NEAR) ** 2)).astype(
        np.float32
    )

    phases = np.empty((s, k), np.complex64)
    phases[0] = within[0] * unknown[0]
    for t in range(1, s):
        offset = np.convolve(phases[t - 1] * onward[t - 1], near, "same") + weak[t]
        phases[t] = within[t] * offset / (np.abs(offset) + 1e-30)
    return torch.from_numpy(phases)


# --------------------------------------------------------------------------------------------------
# what is learned


def turns(spectrum):
    """Spectrum (b, s, 478) complex -> unit numbers (b, s - 1, 478) and (b, s, 477).

    How the phase turns to the next column, less what the bin's own frequency turns in that time,
    and how it turns to the next bin, less the half turn that a hit in the middle of a column has:
    both are 1 for what lies in the middle of its bin or column.
    """
    unit = torch.view_as_real(spectrum)
    unit = torch.view_as_complex(F.normalize(unit, dim=-1, eps=1e-12))
    # a hop is a quarter of the transform: bin k turns by k quarters
    quarter = torch.arange(FIRST, FIRST + BINS, device=spectrum.device) % 4
    own = torch.polar(torch.ones(BINS, device=spectrum.device), -quarter * math.pi / 2)
    return unit[:, 1:] * unit[:, :-1].conj() * own, -unit[:, :, 1:] * unit[:, :, :-1].conj()


def turn_loss(predicted, target, first, second):
    """Mean squared error of turns (b, s, k), weighted with the roots of the magnitudes they join.

    Of every sample alike, loud or quiet; 1 for no idea, 0 for every turn known.
    """
    weight = (first * second).clamp_min(FLOOR**2) ** 0.25
    error = (predicted - torch.view_as_real(target)).square().sum(-1)
    return ((weight * error).sum((1, 2)) / weight.sum((1, 2))).mean()


def losses(model, mel, spectrum):
    """mel (b, 128, s), spectrum (b, s, 478) complex -> the four terms.

    L1 of the log magnitude, in a mel's units; L1 of the magnitude's root, for what is loud, of
    every sample alike; and the error of both turns.
    """
    log_magnitude, next_column, next_bin = model(mel)
    magnitude = spectrum.abs()
    log_error = (log_magnitude - compress(magnitude)).abs().mean()
    # the floor is far below what matters here
    root = magnitude.clamp_min(FLOOR).sqrt()
    predicted = 10 ** (2.5 * (log_magnitude.clamp(max=2.0) - 0.8))
    root_error = ((predicted - root).abs().mean((1, 2)) / root.mean((1, 2))).mean()

    column_target, bin_target = turns(spectrum)
    column_error = turn_loss(
        next_column[:, :-1], column_target, magnitude[:, :-1], magnitude[:, 1:]
    )
    bin_error = turn_loss(
        next_bin[:, :, :-1], bin_target, magnitude[:, :, :-1], magnitude[:, :, 1:]
    )
    return log_error, root_error, column_error, bin_error


def total(terms):
    """The loss of `losses`' terms: the log magnitude's error is the smallest by its units."""
    log_error, root_error, column_error, bin_error = terms
    return 10 * log_error + root_error + column_error + bin_error


# --------------------------------------------------------------------------------------------------
# samples; `rng` is a generator of the device that they are made on


def uniform(rng, low, high, *shape):
    return low + (high - low) * torch.rand(shape, generator=rng, device=rng.device)


def decibels(rng, low, high, b):
    """Factors (b, 1) of these levels in dB."""
    return 10 ** (uniform(rng, low, high, b, 1) / 20)


def some(rng, b):
    """1 for about half of the samples, 0 for the others: (b, 1)."""
    return (uniform(rng, 0, 1, b, 1) < 0.5).float()


def tones(rng, b, n):
    """Sums of eight decaying tones (b, n), a third of which glide: modes that no clip has."""
    shape = (b, 8, 1)
    time = torch.arange(n, device=rng.device) / audio.SAMPLE_RATE
    start = uniform(rng, -0.5, n / audio.SAMPLE_RATE, *shape)
    frequency = 60 * 120 ** uniform(rng, 0, 1, *shape)  # Hz, to 7200
    glides = uniform(rng, 0, 1, *shape) < 0.3
    glide = uniform(rng, -0.2, 0.2, *shape) * glides  # of the frequency, in a second
    decay = 10 ** uniform(rng, -2, 0.5, *shape)  # seconds
    level = 10 ** uniform(rng, -2, -0.5, *shape)
    since = time - start  # (b, 8, n)
    envelope = torch.exp(-since.clamp_min(0) / decay) * (since > 0)
    cycles = frequency * since * (1 + glide * since / 2) + uniform(rng, 0, 1, *shape)
    return (level * envelope * (2 * math.pi * cycles).sin()).sum(1)


def noises(rng, b, n):
    """Noise (b, n) of random color, between white and brown, and level, -100 to -30 dB."""
    spectrum = torch.fft.rfft(torch.randn(b, n, generator=rng, device=rng.device))
    frequency = torch.linspace(0.002, 1, n // 2 + 1, device=rng.device)
    noise = torch.fft.irfft(spectrum * frequency ** -uniform(rng, 0, 1, b, 1), n)
    return noise / noise.square().mean(1, keepdim=True).sqrt() * decibels(rng, -100, -30, b)


def vary(wav, rng):
    """Sounds (b, CROP * 256 * FASTEST) -> (b, CROP * 256): other speeds, levels, company.

    The world has more sounds than the set: each is played faster or slower, half of them together
    with another, with tones or with noise.
    """
    b = len(wav)
    n = CROP * audio.HOP
    speed = FASTEST ** uniform(rng, -1, 1).item()
    wav = F.interpolate(wav[:, None, : round(n * speed)], n, mode="linear")[:, 0]
    wav = wav + some(rng, b) * decibels(rng, -30, 0, b) * wav.roll(1, 0)
    wav = wav + some(rng, b) * tones(rng, b, n)
    wav = wav + some(rng, b) * noises(rng, b, n)
    return wav * decibels(rng, -20, 6, b)


def blemish(mel, rng):
    """Mel (b, 128, s) -> some blurred, some with noise of up to 2 dB, as generated ones are."""
    b = len(mel)
    blur = (some(rng, b) * some(rng, b) * uniform(rng, 0, 1, b, 1))[:, :, None]
    mel = mel.lerp(F.avg_pool2d(mel, 3, 1, 1, count_include_pad=False), blur)
    strength = (some(rng, b) * uniform(rng, 0, 0.02, b, 1))[:, :, None]
    noise = torch.randn(mel.shape, generator=rng, device=rng.device)
    return (mel + noise * strength).clamp(0, 1)


def spectrum_of(wav):
    """Sound (b, n) -> spectrum (b, n/256, 478)."""
    return audio.stft(wav)[:, FIRST : FIRST + BINS].transpose(1, 2)


# --------------------------------------------------------------------------------------------------
# training


def validate(model, clips, device, max_clips: int = 16):
    """The terms of the loss over whole windows, as they are."""
    terms = []
    for i in range(min(max_clips, len(clips))):
        wav = clips[i]["wav"][None].to(device)
        terms.append(torch.stack(losses(model, audio.mel(wav), spectrum_of(wav))))
    names = ("val_log", "val_root", "val_column", "val_bin")
    return dict(zip(names, torch.stack(terms).mean(0).tolist(), strict=True)), []


def train(args):
    """Regression on crops of sounds."""
    training.resolve_defaults(args, RECIPES, "vocoder")
    distributed.init(args.device)
    training.check_batch(args)
    training.check_run_folder(args)
    device = training.set_up(args)

    model = Vocoder.load(args.init) if args.init else Vocoder()
    model = model.train().to(device)
    training.freeze(args, model)
    optimizer = training.adamw([{"params": model.parameters()}], args, weight_decay=0.01)
    ema = training.EMA(model)
    root = distributed.on_rank0(
        lambda: data.prepared(args.data, cache=args.out.parent / "prepared")
    )
    samples = round(CROP * audio.HOP * FASTEST)
    clips, held_out = training.train_val_split(
        functools.partial(data.Sounds, root, samples, args.seed)
    )
    run = training.TrainingRun(
        args,
        model,
        optimizer,
        asdict(model.config),
        ema,
        clips,
        held_out,
        functools.partial(validate, device=device),
    )

    network = distributed.wrap_ddp(model, losses)
    for step in run:
        for batch, rows in run.parts(network):
            # of this micro-batch: the same whatever process has it
            rng = torch.Generator(device)
            rng.manual_seed(training.seed_of(args.seed, step, rows.start))
            wav = vary(batch["wav"].to(device, non_blocking=True), rng)
            mel = blemish(audio.mel(wav), rng)  # (b, 128, CROP)
            with training.autocast(args):
                terms = network(mel, spectrum_of(wav))
            loss = total(terms)
            (loss / run.count).backward()
            names = ("log", "root", "column", "bin")
            run.add(loss=loss, **dict(zip(names, terms, strict=True)))
        run.report(gradient_norm=training.update(args, step, optimizer, ema, model))


def main(argv=None):
    args = training.arguments(__doc__, RECIPES).parse_args(argv)
    with distributed.report_errors("vocoder.py"):
        train(args)


if __name__ == "__main__":
    main()
