"""The judge: a small classifier of hit materials, and distances between sets of clips in its space.

in   for training: clips with labels, as foley.py makes; then mels (128, s) in [0, 1]
out  OUT/last.safetensors; for an excerpt of a mel the probability of each material, or of no hit;
     for sets of clips the Fréchet distance (Heusel et al. 2017), the inception score (Salimans et
     al. 2016) and the KL divergence

    python -m metrics.judge --data clips/               a few minutes on two cores

It plays the part of the paper's Melception (Sec. 5.1; SpecVQGAN's classifier of VGGSound) for the
procedural set. It is trained on recorded sound alone, and nothing that generates, guides or ranks
is trained with it.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from cavp import CAVPConfig, Cnn14
from common import audio, distributed, media, rights, training
from common.checkpoints import load_network

SPAN = 32  # mel columns of an excerpt (0.51 s)
BEFORE = 4  # of them, how many come before the hit
STRIDE = 16  # columns between the excerpts of a clip
JITTER = 2  # columns by which training shifts a hit in its excerpt
CLEAR = 0.25  # seconds after a hit without one of another material, or the hit is left out
NOTHING = "nothing"  # the class of excerpts without a hit

RECIPES = {
    "mini": {
        "steps": 1500,
        "batch": 128,
        "micro_batch": 128,
        "lr": 1e-3,
        "warmup": 50,
        "grad_clip": 0,
    }
}


# --------------------------------------------------------------------------------------------------
# the network


@dataclass(frozen=True)
class JudgeConfig:
    classes: tuple = (NOTHING,)
    widths: tuple = (16, 32, 64, 64, 128, 128)
    features: int = 64


class Judge(nn.Module):
    def __init__(self, config: JudgeConfig):
        super().__init__()
        self.config = config
        self.tower = Cnn14(CAVPConfig(audio_widths=config.widths, embed_dim=config.features))
        self.head = nn.Linear(config.features, len(config.classes))

    def features(self, excerpts):  # (b, 128, SPAN) -> (b, d)
        return F.relu(self.tower(excerpts)).mean(1)

    def forward(self, excerpts):  # (b, 128, SPAN) -> logits (b, classes)
        return self.head(self.features(excerpts))

    @torch.no_grad()
    def embed_clip(self, mel):
        """Mel (128, s) of a whole clip -> features (d,), class probabilities (classes,).

        Means over its excerpts, numpy float64.
        """
        mel = F.pad(mel, (0, max(0, SPAN - mel.shape[1])))
        excerpts = mel.unfold(1, SPAN, STRIDE).transpose(0, 1)  # (n, 128, SPAN)
        features = self.features(excerpts)
        probabilities = self.head(features).double().softmax(1)
        return features.double().mean(0).numpy(), probabilities.mean(0).numpy()

    @torch.no_grad()
    def classify(self, mel, columns: list):
        """The name of the most likely class at each of these columns of a mel (128, s)."""
        if not columns:
            return []
        excerpts = torch.stack([excerpt(mel, column) for column in columns])
        return [self.config.classes[k] for k in self(excerpts).argmax(1).tolist()]

    @classmethod
    def load(cls, path, device="cpu"):
        """The network of a file that training wrote, for use; CheckpointError for any other."""
        return load_network(cls, path, JudgeConfig(), device)


# --------------------------------------------------------------------------------------------------
# excerpts


def excerpt(mel, column: int, margin: int = 0):
    """The SPAN columns of a mel (128, s) around a hit at `column`, and `margin` more on both sides.

    Silence outside the clip. -> (128, SPAN + 2 margin)
    """
    first = column - BEFORE - margin
    last = first + SPAN + 2 * margin
    padded = F.pad(mel, (SPAN, max(0, last - mel.shape[1])))
    return padded[:, SPAN + first : SPAN + last]


def column_of(onset: dict):
    """The mel column of an onset {"time": seconds, ...}."""
    return round(onset["time"] / audio.COLUMN)


def isolated_hits(onsets: list):
    """[{"time": seconds, "material": name}] -> [(mel column, material)].

    Left out are hits with another material so near that nobody could tell the two apart.
    """
    hits = []
    for onset in onsets:
        others = [o["time"] for o in onsets if o["material"] != onset["material"]]
        if not any(-0.1 < time - onset["time"] < CLEAR for time in others):
            hits.append((column_of(onset), onset["material"]))
    return hits


def background(onsets: list, columns: int, rng: np.random.Generator, count: int):
    """Up to `count` of a mel's `columns`, drawn from those whose excerpt has no hit in it."""
    free = np.arange(columns)
    for hit in map(column_of, onsets):
        free = free[(free < hit - SPAN) | (free >= hit + 2 * BEFORE)]
    return rng.choice(free, min(count, len(free)), replace=False).tolist()


class Excerpts(torch.utils.data.Dataset):
    """{"mel": (128, SPAN), "class": index}: hits of a folder of labeled clips, and as many without.

    Where a hit lies in its excerpt changes by up to JITTER columns with every epoch, as onsets in
    generated sound do.
    split      "train", "val", "test", or None for all clips
    classes    their names; default NOTHING and the materials that occur
    Raises MediaError where there is no labeled clip.
    """

    left_out = ()

    def __init__(self, root, seed: int = 0, split: str | None = None, classes=None):
        self.seed = seed
        self.mels = []
        self.rights = []  # of each clip
        names = []
        for number, video in enumerate(media.find_videos([root])):
            if split and data.split_of(video.name) != split:
                continue
            self.rights.append(rights.made_by_foley(video) or rights.UNKNOWN)
            onsets = data.read_onsets(video)
            mel = audio.mel(media.read_audio(video))
            rng = np.random.default_rng([seed, number])
            silent = background(onsets, mel.shape[1], rng, max(1, len(onsets)))
            for column, name in isolated_hits(onsets) + [(column, NOTHING) for column in silent]:
                self.mels.append(excerpt(mel, column, JITTER).half())
                names.append(name)
        if not names:
            raise media.MediaError(
                f"{root}: no labeled clip (split: {split or 'all'}); make more with foley.py"
            )

        self.classes = classes or (NOTHING, *sorted({*names} - {NOTHING}))
        self.labels = [self.classes.index(name) for name in names]

    def __len__(self):
        return len(self.mels)

    def data_summary(self):
        """As `data.Windows` has it."""
        return rights.summarize(self.rights)

    def __getitem__(self, index):
        # the index counts on from epoch to epoch: see training.Shuffled
        shift = int(np.random.default_rng([self.seed, index]).integers(2 * JITTER + 1))
        item = index % len(self)
        mel = self.mels[item][:, shift : shift + SPAN].float()
        return {"mel": mel, "class": self.labels[item]}


# --------------------------------------------------------------------------------------------------
# distances between sets of clips; features (n, d) and probabilities (n, k) in float64


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), with A and B the covariances.

    The trace of the root is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is
    symmetric.
    """
    difference = a.mean(0) - b.mean(0)
    a_cov = np.cov(a.T)
    b_cov = np.cov(b.T)
    values, vectors = np.linalg.eigh(a_cov)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b_cov @ root).clip(0)).sum()
    return float(difference @ difference + np.trace(a_cov) + np.trace(b_cov) - 2 * cross)


def kl_divergence(p, q):
    """KL(p || q) in nats, along the last axis."""
    return (p * (np.log(p.clip(1e-12)) - np.log(q.clip(1e-12)))).sum(-1)


def inception_score(p):
    """exp of the mean KL divergence of each row from the mean row: 1 to the number of classes."""
    return float(np.exp(kl_divergence(p, p.mean(0)).mean()))


# --------------------------------------------------------------------------------------------------
# training


def validate(model, dataset, limit=2048):
    """Cross-entropy, accuracy, and accuracy among hits, over the first `limit` excerpts."""
    device = model.head.weight.device
    mels = torch.stack([dataset[i]["mel"] for i in range(min(limit, len(dataset)))])
    logits = torch.cat([model(batch.to(device)).cpu() for batch in mels.split(128)])
    labels = torch.tensor(dataset.labels[:limit])
    correct = (logits.argmax(1) == labels).float()
    is_hit = labels != dataset.classes.index(NOTHING)
    return {
        "val_loss": F.cross_entropy(logits, labels).item(),
        "val_accuracy": correct.mean().item(),
        "val_material": correct[is_hit].mean().item(),
    }, []


def train(args):
    training.resolve_defaults(args, RECIPES, "judge")
    distributed.init(args.device)
    training.check_batch(args)
    training.check_run_folder(args)
    device = training.set_up(args)

    clips = Excerpts(args.data, args.seed, "train")
    try:
        held_out = Excerpts(args.data, args.seed, "val", clips.classes)
    except media.MediaError:
        held_out = None

    model = Judge.load(args.init) if args.init else Judge(JudgeConfig(clips.classes))
    model = model.train().to(device)
    optimizer = training.adamw([{"params": model.parameters()}], args, weight_decay=0.01)
    ema = training.EMA(model)
    config = asdict(model.config)
    run = training.TrainingRun(args, model, optimizer, config, ema, clips, held_out, validate)
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
