"""All four trainings at a size where a step takes a fraction of a second: the scripts' own code, narrow networks, clips drawn by number.

install()                       in this process from now on; install(monkeypatch.setattr) for one test
python tests/tiny.py STAGE ...  a training command under these sizes, in a process of its own
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stages lie a folder up

import align  # noqa: E402
import cavp  # noqa: E402
import data  # noqa: E402
import ldm  # noqa: E402
import vae  # noqa: E402
from common import (
    audio,  # noqa: E402
    checkpoints,
    training,  # noqa: E402
)

MAINS = {"vae": vae.main, "cavp": cavp.main, "ldm": ldm.main, "align": ldm.main}
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


class Drawn(torch.utils.data.Dataset):
    """Six clips to train on and two others, each a pure function of (seed, index), as the real sets' are."""

    left_out = ()

    def __init__(self, seed, split):
        self.key, self.length = (seed, int(split != "train")), 6 if split == "train" else 2

    def __len__(self):
        return self.length

    def sound(self, draw, samples):
        wav = draw.standard_normal(samples).astype(np.float32) * 0.01
        for at in draw.integers(0, samples - 400, 5):
            wav[at : at + 400] += 0.5 * draw.standard_normal(400).astype(np.float32)
        return torch.from_numpy(wav.clip(-1, 1))


class Clips(Drawn):
    def __init__(self, root, fps, size, frames=None, seed=0, random_start=True, split=None):
        super().__init__(seed, split)
        self.size, self.frames, self.samples = size, frames, round(frames / fps * audio.SAMPLE_RATE)

    def __getitem__(self, index):
        draw = np.random.default_rng([*self.key, index])
        video = draw.integers(0, 256, (self.frames, 3, self.size, self.size), np.uint8)
        return {
            "video": torch.from_numpy(video),
            "wav": self.sound(draw, self.samples),
            "name": f"{index % self.length}.mp4",
            "start": 0.5,
        }

    def about(self, index):
        return f"{index % self.length}.mp4", "", "train"


class Sounds(Drawn):
    def __init__(self, root, samples, seed=0, split=None):
        super().__init__(seed, split)
        self.samples = samples

    def __getitem__(self, index):
        return {"wav": self.sound(np.random.default_rng([*self.key, index]), self.samples)}


class Pairs(Drawn):
    def __init__(self, root, fps, frames, merge=0.0, roll=0.0, seed=0, split=None):
        super().__init__(seed, split)

    def __getitem__(self, index):
        draw = np.random.default_rng([*self.key, index])
        features = torch.from_numpy(draw.standard_normal((128, 32)).astype(np.float32))
        return {
            "features": torch.nn.functional.normalize(features, dim=1),
            "wav": self.sound(draw, audio.WINDOW),
        }


def onsets(video):
    """A clip's labels: one to five materials struck, the clips with a higher number by more of them."""
    return [{"time": 0.6 + 0.7 * k, "material": "ABC"[k % 3]} for k in range(1 + int(video.stem))]


def install(setattr=setattr):
    setattr(data, "prepared", lambda root, *_, **__: root)
    setattr(data, "read_onsets", onsets)
    for kind in (Clips, Sounds, Pairs):
        setattr(data, kind.__name__, kind)
    setattr(cavp, "PRESETS", {**cavp.PRESETS, "mini": TOWERS})
    setattr(vae, "PRESETS", {**vae.PRESETS, "mini": VAE})
    mini = ldm.LDMConfig(**TIME, unet=UNET, vae=VAE)
    setattr(ldm, "PRESETS", {**ldm.PRESETS, "mini": mini})
    mini = align.AlignmentConfig(**TIME, unet=UNET)
    setattr(align, "PRESETS", {**align.PRESETS, "mini": mini})


def install_no_extras(setattr=setattr):
    """No validation and no pictures, which take longer than these steps."""
    setattr(training, "train_val_split", lambda reader: (reader(split="train"), None))
    setattr(training, "plot", lambda out, pairs: None)


def arguments(stage, out, steps=3, batch=4, first_stage=None, **flags):
    """The command line of a stage; flags by name, True for one without a value."""
    args = [
        "--data",
        "drawn",
        "--out",
        out,
        "--steps",
        steps,
        "--batch",
        batch,
        "--seed",
        5,
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    if stage in ("ldm", "align"):
        args += ["--repeats", 2]
        if stage == "align" or "resume" not in flags:  # stage 2 goes on with the one that it holds
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


if __name__ == "__main__":
    install()
    MAINS[sys.argv[1]](sys.argv[2:])
