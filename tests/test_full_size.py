"""The published files' form and size from end to end: 4.3 GB of stand-in weights.

They are filled by the rule (`golden/rule.py`) and deleted afterwards.

    python -m pytest tests/test_full_size.py -rPs        prints what was measured
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clips import make, steady
from golden import rule

import cavp
import ldm
import sample
from align import Alignment
from common import audio, checkpoints, media
from common.checkpoints import Checkpoint
from compat import official
from kernels import fast

pytestmark = pytest.mark.slow
ROOT = Path(sample.__file__).resolve().parent
DISK = 10e9  # bytes that must be free
MEMORY = 8e9


def free_memory():
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def lightning(state, epoch):
    """What a trainer leaves: the weights among its own affairs."""
    moments = {
        "step": torch.tensor(1.0),
        "exp_avg": torch.zeros(1000),
        "exp_avg_sq": torch.ones(1000),
    }
    return {
        "epoch": epoch,
        "global_step": 1000 * epoch,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {
            "ModelCheckpoint{'monitor': 'val/loss'}": {"best_model_score": torch.tensor(0.5)}
        },
        "optimizer_states": [
            {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
        ],
        "lr_schedulers": [{"base_lrs": [1e-4], "last_epoch": 3}],
    }


# A process's peak starts with that of the process which started it, so one that is small has to.
LAUNCH = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, file=sys.stderr)
sys.exit(status)
"""


def launch(*command):
    """-> stdout, lines of stderr, bytes of memory at the peak"""
    command = [sys.executable, "-c", LAUNCH, sys.executable, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    *err, peak = done.stderr.splitlines()
    return done.stdout, err, int(peak)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with the three files under their published names."""
    folder = tmp_path_factory.mktemp("published")
    disk, memory = shutil.disk_usage(folder).free, free_memory()
    if disk < DISK or memory is None or memory < MEMORY:
        known = "an unknown amount" if memory is None else f"{memory / 1e9:.1f}"
        pytest.skip(
            f"needs {DISK / 1e9:.0f} GB of disk at {folder} and {MEMORY / 1e9:.0f} GB of memory: "
            f"{disk / 1e9:.1f} and {known} are free"
        )
    try:
        state = {f"module.{k}": v for k, v in rule.fill(cavp.CAVP()).state_dict().items()}
        torch.save(lightning(state, 66), folder / "cavp_epoch66.ckpt")
        torch.save(
            lightning(rule.fill(Alignment()).state_dict(), 30),
            folder / "double_guidance_classifier.ckpt",
        )
        with torch.device("meta"):
            model = ldm.LDM()
        torch.save(lightning(rule.fill(model).state_dict(), 240), folder / "ldm_epoch240.ckpt")
        del state, model
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    """The same as `python -m common.checkpoints convert` writes them."""
    folder = tmp_path_factory.mktemp("converted") / "bfloat16"
    command = ("-m", "common.checkpoints", "convert", published, folder, "--dtype", "bfloat16")
    try:
        print(launch(*command)[0])
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Three seconds in which something moves."""

    def square(image, k):
        image[10:30, k % 40 : k % 40 + 20] = 220

    return make(tmp_path_factory.mktemp("clip") / "clip.mp4", steady(25, 3), draw=square)


def size(folder):
    return sum(p.stat().st_size for p in folder.iterdir())


def dub(clip, weights, out, *flags):
    """-> sample.py's line, bytes of memory at the peak; checks what holds for every run."""
    fixed = ("--weights", weights, "--out", out, "--steps", 2, "--json", "--profile")
    output, err, peak = launch(ROOT / "sample.py", clip, *fixed, *flags)
    line = json.loads(output)
    print(*err, f"peak {peak / 2**20:.0f} MiB", sep="\n")
    assert line["windows"] == 1 and line["seconds"] == 3.0 and line["score"] < 0
    info = media.probe(line["output"])
    assert abs(info.duration - 3.0) < 0.04 and info.has_audio
    wav = media.read_audio(line["wav"])
    assert len(wav) == 3 * audio.SAMPLE_RATE and wav.isfinite().all() and wav.abs().max() > 0
    assert line["profile"]["total"]["peak_mib"] == pytest.approx(peak / 2**20, rel=0.02)
    return line, peak


def test_published_files_dub_a_clip(published, clip, tmp_path):
    dub(clip, published, tmp_path, "--dtype", "float32")


@torch.no_grad()
def test_published_files_give_the_official_numbers(published):
    golden = rule.recorded("sample")
    models = sample.load_models(published, "cpu", dtype=torch.float32)
    features = models.cavp.encode_video(rule.uniform("in.cavp.video32", 1, 32, 3, 224, 224))
    rule.close("features", features, rule.recorded("cavp")["video32.norm_nopool"])
    features = rule.normal("in.sample.feat", 1, 32, 512)[0]
    x = rule.normal("in.sample.x_T", 1, 4, 16, 64)
    for cg, name in ((0.0, "dpm5.cfg4.5"), (50.0, "dpm5.cfg4.5.cg50")):
        settings = sample.Settings(steps=5, sampler="dpm", cfg=4.5, cg=cg)
        latents = {}  # by step
        mels = official.sample_mels(features, models, x, settings, latents.__setitem__)
        rule.close(name, latents[max(latents)], golden[name], 1e-3)
        if cg:  # the recorded mel is that of the run without classifier
            decoded = models.ldm.vae.decode(golden[name] / ldm.LATENT_SCALE)[:, 0]
        else:
            decoded = golden[f"{name}.decoded_channel0"]
        rule.close(f"{name}, decoded", mels[:, 0], decoded, 1e-3)


@torch.no_grad()
def test_optimised_networks_of_the_published_size_give_the_plain_ones_numbers():
    with torch.device("meta"):
        unet, align = ldm.UNet(ldm.UNetConfig()), Alignment().model
    rule.fill(unet, "model.diffusion_model.")
    rule.fill(align, "model.")
    x = rule.normal("in.unet.x", 2, 4, 16, 64)
    context = rule.normal("in.unet.context", 2, 32, 768)
    features = rule.normal("in.cls.feat", 2, 32, 512)
    t = torch.tensor([10.5, 699.25])
    for name, network, condition in (("U-Net", unet, context), ("classifier", align, features)):
        plain = network(x, t, condition)
        fast.optimise(network)
        rule.close(name, network(x, t, condition), plain, 1e-5)
        rule.close(f"{name}, prepared", network(x, t, network.prepare(condition, t)), plain, 1e-5)
        network.defer_biases()  # as on a GPU
        rule.close(f"{name}, biases deferred", network(x, t, condition), plain, 1e-5)


def test_converted_files_are_half_the_size_and_the_weights_rounded(published, converted):
    assert sorted(p.name for p in converted.iterdir()) == [
        "align.safetensors",
        "cavp.safetensors",
        "ldm.safetensors",
    ]
    print(f"{size(converted) / 1e9:.2f} GB of {size(published) / 1e9:.2f} GB")
    assert 0.49 < size(converted) / size(published) < 0.51
    for name, cls in (("cavp", cavp.CAVP), ("ldm", ldm.LDM), ("align", Alignment)):
        stem = {stem for stem, ours in checkpoints.PUBLISHED.items() if ours == name}.pop()
        file = Checkpoint(published / f"{stem}.ckpt")
        loaded = cls.load(converted / f"{name}.safetensors").state_dict()
        assert file.keys() == loaded.keys()
        for key, own in loaded.items():
            rounded = file[key].bfloat16().float() if file[key].ndim >= 2 else file[key]
            assert own.dtype == rounded.dtype and torch.equal(own, rounded), key
            file.release()


def test_converted_files_need_little_more_memory_than_their_size(converted, clip, tmp_path):
    peak = dub(clip, converted, tmp_path, "--dtype", "bfloat16")[1]
    print(f"{peak / size(converted):.3f} of {size(converted) / 1e9:.2f} GB")
    assert peak <= 1.15 * size(converted)


LOAD = """
import sys
import ldm
from common.machine import peak_memory
def peak():
    return peak_memory("cpu")
before = peak()
model = ldm.LDM.load(sys.argv[1])
own = sum(t.nbytes for t in model.state_dict().values())
print((peak() - before) / own, own)
"""


def test_loading_needs_the_networks_own_memory(published):
    ratio, own = map(float, launch("-c", LOAD, published / "ldm_epoch240.ckpt")[0].split())
    print(f"{ratio:.3f} of {own / 1e9:.2f} GB")
    assert own > 3.7e9 and 0.9 < ratio <= 1.1
