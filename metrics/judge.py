"""What generated sounds are judged by: a classifier of struck materials that has heard true sounds only, and distances in its space.

in   for training: clips with labels, as foley.py makes; then mels (128, s) in [0, 1]
out  OUT/last.safetensors; for a moment of a mel the probability of each material, or of nothing being struck; for sets of
     clips the Fréchet distance (Heusel et al. 2017), the inception score (Salimans et al. 2016) and the KL divergence

    python judge.py --data clips/                       a few minutes on two cores

Plays the part of the paper's Melception (Sec. 5.1; SpecVQGAN), which knows VGGSound's sounds, for the procedural set: no network
that draws sounds, guides or ranks them is trained with it.
"""

import functools
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from cavp import CAVPConfig, Cnn14
from common import audio, distributed, media, training
from common.checkpoints import load_network

SPAN, BEFORE = 32, 4  # mel columns of a moment (0.51 s), and how many of them come before the hit
JITTER = 2  # columns by which a hit may lie beside its place
CLEAR = (
    0.25  # seconds after a hit in which no other material may be struck, or the moment is left out
)
NOTHING = "nothing"  # the class of moments in which nothing is struck
STRIDE = 16  # columns between the moments that stand for a whole clip


@dataclass(frozen=True)
class JudgeConfig:
    classes: tuple = (NOTHING,)
    widths: tuple = (16, 32, 64, 64, 128, 128)
    features: int = 64


class Judge(nn.Module):
    def __init__(self, config=JudgeConfig()):
        super().__init__()
        self.config = config
        self.tower = Cnn14(CAVPConfig(audio_widths=config.widths, embed_dim=config.features))
        self.head = nn.Linear(config.features, len(config.classes))

    def features(self, moments):  # (b, 128, SPAN) -> (b, d)
        return F.relu(self.tower(moments)).mean(1)

    def forward(self, moments):  # -> logits (b, classes)
        return self.head(self.features(moments))

    @torch.no_grad()
    def clip(self, level):
        """Mel (128, s) of a whole clip -> mean features (d,) and mean probabilities (classes,) of its moments, float64."""
        level = F.pad(level, (0, max(0, SPAN - level.shape[1])))
        moments = level.unfold(1, SPAN, STRIDE).transpose(0, 1)  # (n, 128, SPAN)
        features = self.features(moments)
        return features.double().mean(0).numpy(), self.head(features).double().softmax(1).mean(
            0
        ).numpy()

    @torch.no_grad()
    def hear(self, level, columns):
        """Class numbers of what is struck in a mel (128, s) at these columns."""
        if not columns:
            return []
        return self(torch.stack([moment(level, c) for c in columns])).argmax(1).tolist()

    @classmethod
    def load(cls, path, device="cpu"):
        """Strict."""
        return load_network(cls, path, JudgeConfig(), device)


# ---------------------------------------------------------------------------------------------------------------------
# moments


def moment(level, column, spare=0):
    """The SPAN columns around a hit at `column` of a mel (128, s), and `spare` more on both sides; silence outside the clip."""
    first, width = column - BEFORE - spare, SPAN + 2 * spare
    level = F.pad(level, (max(0, -first), max(0, first + width - level.shape[1])))
    return level[:, max(0, first) : max(0, first) + width]


def clear_hits(onsets):
    """[{"time", "material"}] -> [(column, material)] of the hits that no other material follows or precedes too soon to be told apart."""
    return [
        (round(a["time"] / audio.COLUMN), a["material"])
        for a in onsets
        if all(
            b["material"] == a["material"] or not -0.1 < b["time"] - a["time"] < CLEAR
            for b in onsets
        )
    ]


def quiet(onsets, columns, draw, count):
    """Up to `count` columns at which nothing is struck in the whole moment."""
    busy = np.zeros(columns + SPAN, bool)
    for onset in onsets:
        at = round(onset["time"] / audio.COLUMN)
        busy[max(0, at - SPAN) : at + 2 * BEFORE] = True
    free = np.flatnonzero(~busy[:columns])
    return draw.choice(free, min(count, len(free)), replace=False).tolist()


class Moments(torch.utils.data.Dataset):
    """Every hit of a folder of labelled clips, and about as many moments without one: {"mel": (128, SPAN), "class": number}. Where a hit
    lies in its moment changes by up to JITTER columns with every epoch, as onsets drawn by a model do."""

    left_out = ()

    def __init__(self, root, seed=0, split=None, classes=None):
        self.seed, self.items, names = seed, [], []
        for number, video in enumerate(media.find_videos([root])):
            if split and data.split_of(video.name) != split:
                continue
            onsets, level = data.read_onsets(video), audio.mel(media.read_audio(video))
            idle = quiet(
                onsets, level.shape[1], np.random.default_rng([seed, number]), max(1, len(onsets))
            )
            for column, name in (*clear_hits(onsets), *((c, NOTHING) for c in idle)):
                self.items.append(moment(level, column, JITTER).half())
                names.append(name)
        if not self.items:
            raise media.MediaError(
                f"{root}: no labelled clip"
                + f" in its {split} split" * bool(split)
                + "; make more with foley.py"
            )
        self.classes = classes or (NOTHING, *sorted({*names} - {NOTHING}))
        self.numbers = [self.classes.index(name) for name in names]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        first = int(np.random.default_rng([self.seed, index]).integers(2 * JITTER + 1))
        item = index % len(self.items)
        return {
            "mel": self.items[item][:, first : first + SPAN].float(),
            "class": self.numbers[item],
        }


# ---------------------------------------------------------------------------------------------------------------------
# distances between sets of clips; features (n, d) and probabilities (n, k) in float64


def frechet(a, b):
    """|mean difference|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances; the trace of the root is the sum of the roots of the
    eigenvalues of A^(1/2) B A^(1/2), which is symmetric."""
    difference, a_cov, b_cov = a.mean(0) - b.mean(0), np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(a_cov)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b_cov @ root).clip(0)).sum()
    return float(difference @ difference + np.trace(a_cov) + np.trace(b_cov) - 2 * cross)


def divergence(p, q):
    """KL(p | q) in nats, along the last axis."""
    return (p * (np.log(p.clip(1e-12)) - np.log(q.clip(1e-12)))).sum(-1)


def inception_score(p):
    return float(np.exp(divergence(p, p.mean(0)).mean()))


# ---------------------------------------------------------------------------------------------------------------------
# training

RECIPES = {"mini": {"steps": 1500, "batch": 128, "lr": 1e-3, "warmup": 50, "micro_batch": 128}}


def validate(model, moments, device, most=2048):
    logits = torch.cat(
        [
            model(
                torch.stack(
                    [moments[i]["mel"] for i in range(k, min(k + 128, most, len(moments)))]
                ).to(device)
            )
            for k in range(0, min(most, len(moments)), 128)
        ]
    ).cpu()
    numbers = torch.tensor(moments.numbers[: len(logits)])
    right = logits.argmax(1) == numbers
    hit = numbers != moments.classes.index(NOTHING)
    return {
        "val_loss": F.cross_entropy(logits, numbers).item(),
        "val_accuracy": right.float().mean().item(),
        "val_material": right[hit].float().mean().item(),
    }, []


def train(args):
    training.resolve_defaults(args, RECIPES, "judge")
    distributed.init(args.device)
    training.check_batch(args)
    training.check_run_folder(args)
    device = training.set_up(args)
    clips = Moments(args.data, args.seed, "train")
    try:
        held_out = Moments(args.data, args.seed, "val", clips.classes)
    except media.MediaError:
        held_out = None
    model = Judge.load(args.init) if args.init else Judge(JudgeConfig(clips.classes))
    model = model.train().to(device)
    optimizer = training.adamw([{"params": model.parameters()}], args, weight_decay=0.01)
    ema = training.EMA(model)
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
    network = distributed.wrap_ddp(model, lambda judge, mel: judge(mel))
    for step in run:
        for batch, _rows in run.parts(network):
            with training.autocast(args):
                logits = network(batch["mel"].to(device))
            loss = F.cross_entropy(logits.float(), batch["class"].to(device))
            (loss / run.count).backward()
            run.add(loss=loss)
        run.report(gradient_norm=training.update(args, step, optimizer, ema, model))


def main(argv=None):
    args = training.arguments(__doc__, RECIPES).parse_args(argv)
    with distributed.report_errors("judge.py"):
        train(args)


if __name__ == "__main__":
    main()
