"""All four networks at a size where a step takes a fraction of a second.

install()                           the scripts' own trainings of these, with clips of random
                                    numbers, in this process from now on
install(monkeypatch.setattr)        for one test
models(), save(models, folder)      random weights for the main job, and their checkpoints
"""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from main_job import shuffled

import align
import cavp
import data
import ldm
import sample
import vae
from common import audio, checkpoints, rights, training

MAINS = {"vae": vae.main, "cavp": cavp.main, "ldm": ldm.main, "align": align.main}
VAE = vae.VAEConfig(channels=1, width=8, multipliers=(1, 1, 1, 1), blocks=1, groups=4)
UNET = ldm.UNetConfig(
    width=16,
    multipliers=(1, 2),
    blocks=1,
    attention=(2,),
    heads=2,
    context_dim=16,
    groups=8,
    aligned=2,
)
TIME = {"fps": 15.625, "frames": 128, "positions": 128, "feature_dim": 32}
TOWERS = replace(
    cavp.PRESETS["mini"],
    size=16,
    video_width=4,
    video_blocks=(1, 1, 1, 1),
    audio_widths=(4, 4, 8, 8, 8, 16),
    embed_dim=32,
)


class RandomClips(torch.utils.data.Dataset):
    """Six training and two validation clips, each a pure function of (seed, index)."""

    left_out = ()

    def __init__(self, seed, split):
        self.key = (seed, int(split != "train"))
        self.length = 6 if split == "train" else 2

    def __len__(self):
        return self.length

    def data_summary(self):
        return rights.summarize([rights.UNKNOWN] * self.length)

    def rng(self, index):
        return np.random.default_rng([*self.key, index])

    def sound(self, rng, samples):
        wav = rng.standard_normal(samples).astype(np.float32) * 0.01
        for at in rng.integers(0, samples - 400, 5):
            wav[at : at + 400] += 0.5 * rng.standard_normal(400).astype(np.float32)
        return torch.from_numpy(wav.clip(-1, 1))


class Clips(RandomClips):
    def __init__(self, root, fps, size, frames=None, seed=0, random_start=True, split=None):
        super().__init__(seed, split)
        self.size = size
        self.frames = frames
        self.samples = round(frames / fps * audio.SAMPLE_RATE)

    def __getitem__(self, index):
        rng = self.rng(index)
        video = rng.integers(0, 256, (self.frames, 3, self.size, self.size), np.uint8)
        return {
            "video": torch.from_numpy(video),
            "wav": self.sound(rng, self.samples),
            "name": f"{index % self.length}.mp4",
            "start": 0.5,
        }

    def describe(self, index):
        return f"{index % self.length}.mp4", "", "train"


class Sounds(RandomClips):
    def __init__(self, root, samples, seed=0, split=None):
        super().__init__(seed, split)
        self.samples = samples

    def __getitem__(self, index):
        return {"wav": self.sound(self.rng(index), self.samples)}


class Pairs(RandomClips):
    def __init__(self, root, fps, frames, seed=0, split=None, columns=0, **_):
        super().__init__(seed, split)
        self.columns = columns

    def __getitem__(self, index):
        rng = self.rng(index)
        features = torch.from_numpy(rng.standard_normal((128, 32)).astype(np.float32))
        item = {
            "features": torch.nn.functional.normalize(features, dim=1),
            "wav": self.sound(rng, audio.WINDOW),
        }
        if self.columns:
            count = 128 * self.columns
            item["hits"] = torch.from_numpy((rng.random(count) < 0.02) * rng.random(count)).float()
            item["materials"] = torch.from_numpy(rng.integers(-1, 3, 128))
            item["stranger"] = torch.tensor(float(index % 4 == 3))
        return item


def onsets(video):
    """A clip's labels: hits of one to three materials, more hits in clips of a higher number."""
    return [{"time": 0.6 + 0.7 * k, "material": "ABC"[k % 3]} for k in range(1 + int(video.stem))]


def install(setattr=setattr):
    """Replace the data sets and the mini presets, with a `setattr` of choice."""
    setattr(data, "prepared", lambda root, *_, **__: root)
    setattr(data, "read_onsets", onsets)
    for kind in (Clips, Sounds, Pairs):
        setattr(data, kind.__name__, kind)
    setattr(cavp, "PRESETS", {**cavp.PRESETS, "mini": TOWERS})
    setattr(vae, "PRESETS", {**vae.PRESETS, "mini": VAE})
    mini = ldm.LDMConfig(
        **TIME, columns=4, materials=("A", "B", "C"), names_materials=True, unet=UNET, vae=VAE
    )
    setattr(ldm, "PRESETS", {**ldm.PRESETS, "mini": mini})
    mini = align.AlignmentConfig(**TIME, unet=UNET)
    setattr(align, "PRESETS", {**align.PRESETS, "mini": mini})


def install_no_extras(setattr=setattr):
    """No validation and no pictures, which take longer than these steps."""
    setattr(training, "train_val_split", lambda reader: (reader(split="train"), None))
    setattr(training, "plot", lambda out, pairs: None)


def arguments(stage, out, steps=3, batch=4, first_stage=None, **flags):
    """The command line of a stage; flags by name, True for one without a value."""
    args = ["--data", "random", "--out", out, "--steps", steps, "--batch", batch, "--seed", 5]
    args += ["--dtype", "float32", "--device", "cpu"]
    if stage in ("ldm", "align"):
        args += ["--repeats", 2]
        if stage == "align" or "resume" not in flags:  # a resumed stage 2 has one
            args += ["--vae", first_stage]
    if stage == "cavp":
        args += ["--labels", "."]
    for name, value in flags.items():
        args += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
    return [str(a) for a in args]


def autoencoder(folder):
    """A checkpoint for the stages that need one."""
    torch.manual_seed(0)
    path = Path(folder) / "first_stage.safetensors"
    checkpoints.save_model(path, vae.AutoencoderKL(VAE), vars(VAE))
    return path


def models(**told):
    """The networks of the main job with random weights; `told`: of LDMConfig, what it is told."""
    torch.manual_seed(0)
    networks = (
        cavp.CAVP(TOWERS),
        ldm.LDM(ldm.LDMConfig(**TIME, **told, unet=UNET, vae=VAE)),
        align.Alignment(align.AlignmentConfig(**TIME, unet=UNET)),
    )
    mixed = [shuffled(network, seed) for seed, network in enumerate(networks, 1)]
    return sample.Models(*mixed, name="tiny")


def save(models, folder):
    """The checkpoints of `models` in `folder`. -> the folder"""
    for name in ("cavp", "ldm", "align"):
        network = getattr(models, name)
        checkpoints.save_model(folder / f"{name}.safetensors", network, asdict(network.config))
    return folder
