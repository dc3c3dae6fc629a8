"""Every training command as a user types it, on four clips; then the main job with their weights.

The three steps of each stage run in a process of their own. What must then hold (a seed gives one
result, an interruption changes nothing) is checked in this process against what those wrote.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from bounds import PATIENCE
from safetensors import safe_open
from safetensors.torch import load_file

import align
import cavp
import ldm
import vae
from common import checkpoints, files, training

VALIDATION = {
    "vae": {"val_error", "val_kl", "val_onset_f1"},
    "ldm": {"val_loss", "val_onset_f1"},
    "align": {"val_loss", "val_accuracy"},
    "cavp": {f"val_{way}_r{k}" for way in ("video_to_sound", "sound_to_video") for k in (1, 5)},
}
ROOT = Path(__file__).resolve().parent.parent
MAINS = {"vae": vae.main, "cavp": cavp.main, "ldm": ldm.main, "align": align.main}
LOADS = {
    "vae": vae.AutoencoderKL.load,
    "cavp": cavp.CAVP.load,
    "ldm": ldm.LDM.load,
    "align": align.Alignment.load,
}


def command(script, *args, **options):
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        **options,
    )


def checked(*args):
    done = command(*args)
    assert done.returncode == 0, f"{args}: {done.stderr[-2000:]}"
    return done


def arguments(home, stage, out, steps=3):
    """What follows the script's name to train one stage."""
    args = [
        "--data",
        home / ("clips" if stage in ("vae", "cavp") else "features"),
        "--out",
        out,
        "--steps",
        steps,
        "--batch",
        2,
        "--seed",
        5,
    ]
    if stage in ("ldm", "align"):
        args += ["--vae", home / "vae" / "last.safetensors", "--repeats", 1]
    return [str(a) for a in args]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """clips/, and what each stage made of them."""
    home = tmp_path_factory.mktemp("runs")
    checked("foley.py", home / "clips", "--clips", 4, "--seed", 1, "--size", 64)
    checked("vae.py", *arguments(home, "vae", home / "vae"))
    checked("cavp.py", *arguments(home, "cavp", home / "cavp"))
    checked(
        "cavp.py",
        "--data",
        home / "clips",
        "--init",
        home / "cavp" / "last.safetensors",
        "--extract",
        home / "features",
    )
    for stage in ("ldm", "align"):
        checked(f"{stage}.py", *arguments(home, stage, home / stage))
    return home


def header(path):
    with safe_open(path, "pt") as f:
        return {k: json.loads(v) for k, v in f.metadata().items()}


def left_behind(folder):
    return [p.name for p in folder.rglob("*") if ".part" in p.name or p.name.endswith(".tmp")]


def same_weights(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("stage", MAINS)
def test_a_run_leaves_what_it_promises(home, stage):
    out = home / stage
    pictures = ["curves.png"] + ["mels.png"] * (stage in ("vae", "ldm"))
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["last.safetensors", "last.state.pt", "log.jsonl", *pictures]
    )
    metadata = header(out / "last.safetensors")
    assert (
        metadata["step"] == 3 and metadata["args"]["seed"] == 5 and metadata["args"]["batch"] == 2
    )
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [
        3,
        3,
    ]  # what was trained, then what that is worth on other clips
    assert {
        "loss",
        "lr",
        "gradient_norm",
        "seconds",
        "clips_per_second",
        "waiting",
        "memory_gb",
    } <= rows[0].keys()
    assert VALIDATION[stage] == {k for k in rows[1] if k.startswith("val_")}
    assert (
        all(math.isfinite(value) for row in rows for value in row.values())
        and 0 <= rows[0]["waiting"] < 1
    )
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    if stage == "vae":
        assert rows[0]["loss"] == pytest.approx(
            rows[0]["error"] + rows[0]["delta"] + 1e-4 * rows[0]["kl"], rel=1e-5
        )
    assert metadata["metrics"] == rows[1] and metadata["commit"] == training.commit()
    began_with = (
        {"vae": files.sha256(home / "vae" / "last.safetensors")}
        if stage in ("ldm", "align")
        else {}
    )
    assert metadata["started_from"] == began_with
    model = LOADS[stage](out / "last.safetensors")
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_commit_is_that_of_the_code_and_says_when_files_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "__file__", str(tmp_path / "training.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert training.commit() is None  # no checkout
    (tmp_path / "training.py").write_text("1")

    def git(*args):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", "-C", tmp_path, *who, *args], check=True, capture_output=True, text=True
        ).stdout.strip()

    for command in (
        ("init", "-q"),
        ("add", "."),
        ("commit", "-qm", "1"),
        ("tag", "-a", "v1", "-m", "1"),
    ):
        git(*command)
    assert training.commit() == git("rev-parse", "HEAD")
    (tmp_path / "training.py").write_text("2")
    assert training.commit() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert training.commit() is None  # no git


def test_trained_autoencoder_has_unit_latents(home):
    """The published latent scale must fit every autoencoder that leaves vae.py."""
    model = vae.AutoencoderKL.load(home / "vae" / "last.safetensors")
    root = vae.data.prepared(home / "clips", cache=home / "prepared")
    clips = vae.data.Sounds(root, vae.data.WINDOW, seed=5, split="train")
    mean, std = vae.latent_statistics(model, clips, torch.device("cpu"))
    assert torch.allclose(std * ldm.LATENT_SCALE, torch.ones(4), atol=0.05)
    assert (mean * ldm.LATENT_SCALE).abs().max() < 0.05


def test_stage_2_carries_the_autoencoder_it_was_trained_on(home):
    inner = ldm.LDM.load(home / "ldm" / "last.safetensors").vae.state_dict()
    own = vae.AutoencoderKL.load(home / "vae" / "last.safetensors").state_dict()
    assert inner.keys() == own.keys() and all(torch.equal(inner[k], own[k]) for k in own)


def test_stage_2_goes_on_with_the_autoencoder_that_it_is_given(home, tmp_path):
    def equal(a, b):
        return all(torch.equal(a.state_dict()[k], b.state_dict()[k]) for k in b.state_dict())

    old, new = (
        ldm.LDM.load(home / "ldm" / "last.safetensors"),
        vae.AutoencoderKL(vae.PRESETS["mini"]),
    )
    checkpoints.save_model(tmp_path / "new.safetensors", new, dataclasses.asdict(new.config))
    args = argparse.Namespace(
        init=home / "ldm" / "last.safetensors",
        vae=None,
        new_conditioner=False,
        new_controls=False,
        freeze=[],
        preset="mini",
    )
    assert equal(ldm.initial(args), old)
    args.vae = tmp_path / "new.safetensors"
    model = ldm.initial(args)
    assert equal(model.vae, new) and not equal(model.vae, old.vae) and equal(model.unet, old.unet)
    other = vae.AutoencoderKL(dataclasses.replace(new.config, width=8))
    checkpoints.save_model(args.vae, other, dataclasses.asdict(other.config))
    with pytest.raises(checkpoints.CheckpointError, match="new.safetensors"):
        ldm.initial(args)


def test_extracted_features_are_the_towers(home):
    stored = cavp.data.Set(home / "features")
    assert sorted(stored.describe(i)[0] for i in range(4)) == [f"{i:05d}.mp4" for i in range(4)]
    model = cavp.CAVP.load(home / "cavp" / "last.safetensors")
    root = cavp.data.prepared(
        home / "clips", model.config.fps, model.config.size, home / "prepared"
    )
    clip = cavp.data.Clips(root, fps=model.config.fps, size=model.config.size)[0]
    at = [stored.describe(i)[0] for i in range(4)].index(clip["name"])
    with torch.no_grad():
        features = model.encode_video(clip["video"][None].float() / 255)[0]
    kept = torch.from_numpy(stored.column(at, "features").astype("float32"))
    assert kept.shape == features.shape
    assert (
        kept - features
    ).norm() / features.norm() < 0.02  # float16, and bfloat16 where it is fast
    sound = torch.from_numpy(stored.column(at, "sound").astype("float32"))
    assert (sound / 32767 - clip["wav"]).abs().max() < 1e-4


@pytest.mark.parametrize("stage", MAINS)
def test_interrupting_and_resuming_changes_nothing(home, stage, tmp_path, monkeypatch):
    """Two steps, Ctrl-C, one step after --resume: bit for bit three steps of another process."""
    report = training.TrainingRun.report

    def interrupting(run, **values):
        if run.step == 1:
            signal.raise_signal(signal.SIGINT)
        report(run, **values)

    monkeypatch.setattr(training.TrainingRun, "report", interrupting)
    MAINS[stage](arguments(home, stage, tmp_path / stage))
    assert header(tmp_path / stage / "last.safetensors")["step"] == 2
    MAINS[stage](arguments(home, stage, tmp_path / stage) + ["--resume"])
    assert header(tmp_path / stage / "last.safetensors")["step"] == 3
    assert same_weights(tmp_path / stage / "last.safetensors", home / stage / "last.safetensors")
    assert not left_behind(tmp_path)


def test_another_seed_gives_other_weights(home, tmp_path):
    vae.main(arguments(home, "vae", tmp_path / "vae") + ["--seed", "6"])
    assert not same_weights(
        tmp_path / "vae" / "last.safetensors", home / "vae" / "last.safetensors"
    )


def test_ctrl_c_saves_and_ends(home, tmp_path):
    """Exit status 0 and a line that says how to go on; what was trained so far loads."""
    args = [
        sys.executable,
        ROOT / "vae.py",
        *arguments(home, "vae", tmp_path / "vae", steps=100_000),
    ]
    run = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        seen, limit = b"", time.monotonic() + PATIENCE
        while (
            not re.search(rb" ([3-9]|\d\d+)/100000", seen) and time.monotonic() < limit
        ):  # the bar: training is under way
            seen += os.read(run.stderr.fileno(), 4096)
        run.send_signal(signal.SIGINT)
        _, rest = run.communicate(timeout=PATIENCE)  # all its steps would take hours
    finally:
        run.kill()
    assert run.returncode == 0
    assert b"stopped after step" in rest and b"--resume" in rest and b"Traceback" not in seen + rest
    vae.AutoencoderKL.load(tmp_path / "vae" / "last.safetensors")
    assert header(tmp_path / "vae" / "last.safetensors")["step"] >= 3
    assert not left_behind(tmp_path)


def test_labels_beside_the_clips_are_learned_and_leave_no_head_behind(home, tmp_path):
    plain = home / "cavp" / "last.safetensors"
    MAINS["cavp"](
        arguments(home, "cavp", tmp_path / "run")
        + ["--labels", str(home / "clips"), "--init", str(plain)]
    )
    assert load_file(tmp_path / "run" / "last.safetensors").keys() == load_file(plain).keys()
    cavp.CAVP.load(tmp_path / "run" / "last.safetensors")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum("label" in row for row in rows) == 1 and any(
        {"val_label_accuracy_video", "val_label_accuracy_sound"} <= row.keys() for row in rows
    )


# what the user did: (stage, arguments, words of the one line); capitals stand for paths, see below
MISTAKES = {
    "no such folder": ("vae", "--data NOWHERE", ["nowhere: no such folder"]),
    "folder without videos": ("cavp", "--data EMPTY", ["empty"]),
    "clips where features belong": ("ldm", "--data CLIPS --vae WEIGHTS", ["clips", "--extract"]),
    "no autoencoder": ("ldm", "--data FEATURES", ["--vae"]),
    "no autoencoder for the classifier": ("align", "--data FEATURES", ["--vae"]),
    "classifier's weights alone": (
        "align",
        "--data FEATURES --init CLASSIFIER",
        ["--vae"],
    ),
    "--extract without weights": ("cavp", "--data CLIPS --extract NOWHERE", ["--init"]),
    "checkpoint that is none": ("vae", "--data CLIPS --init JUNK", ["junk.ckpt"]),
    "checkpoint that is missing": ("vae", "--data CLIPS --init NOWHERE", ["nowhere"]),
    "checkpoint of another stage": (
        "cavp",
        "--data CLIPS --init WEIGHTS",
        ["last.safetensors", "CAVP"],
    ),
    "no labels there": (
        "cavp",
        "--data CLIPS --labels NOWHERE",
        ["nowhere: no such folder", "--labels"],
    ),
    "labels for long clips": (
        "cavp",
        "--data CLIPS --labels CLIPS --preset paper",
        ["--labels", "preset"],
    ),
    "nothing to resume": ("vae", "--data CLIPS --resume", ["--resume"]),
    "a run already there": ("vae", "--data CLIPS --out RUN", ["--resume", "--out"]),
}


WRONG_USAGE = {
    "vae": ("--lr nan", "--lr -1", "--seed -1", "--workers -1", "--save-every 0", "--steps 0"),
    "cavp": ("--grad-clip -1", "--warmup -1", "--micro-batch 0", "--window-contrast nan"),
    "ldm": (
        "--repeats 0",
        "--merge 2",
        "--timestep-shift 0.5",
        "--new-conditioner",
        "--model align",
        "--convert a b",
    ),
    "align": ("--roll -1", "--batch 0", "--lora -1"),
}


@pytest.mark.parametrize(
    "stage, typed", [(stage, typed) for stage, lines in WRONG_USAGE.items() for typed in lines]
)
def test_wrong_usage_is_one_line_and_status_2(capsys, stage, typed):
    with pytest.raises(SystemExit) as stop:
        MAINS[stage](["--data", "clips", *typed.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and typed.split()[0] in line and "--help" in line


@pytest.mark.parametrize("stage", MAINS)
def test_a_gpu_that_is_not_there_is_one_line(home, stage, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    args = arguments(home, stage, tmp_path / "run") + ["--device", "cuda"]
    with pytest.raises(SystemExit, match="--device .*torch finds no such GPU; give auto or cpu"):
        MAINS[stage](args)


@pytest.mark.parametrize("stage, typed, words", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line(home, tmp_path, stage, typed, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.ckpt").write_bytes(b"not a checkpoint")
    places = {
        "NOWHERE": tmp_path / "nowhere",
        "EMPTY": tmp_path / "empty",
        "JUNK": tmp_path / "junk.ckpt",
        "CLIPS": home / "clips",
        "FEATURES": home / "features",
        "WEIGHTS": home / "vae" / "last.safetensors",
        "RUN": home / "vae",
        "CLASSIFIER": home / "align" / "last.safetensors",
    }
    args = [str(places.get(word, word)) for word in typed.split()]
    if "--out" not in args:
        args += ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as e:
        MAINS[stage](args)
    line = str(e.value)
    assert "\n" not in line and line.startswith(("vae.py: ", "cavp.py: ", "ldm.py: ", "align.py: "))
    assert all(word in line for word in words), line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "junk.ckpt"]


def test_a_mistake_shows_no_traceback(home, tmp_path):
    done = command("vae.py", "--data", tmp_path / "nowhere", cwd=tmp_path)
    assert (
        done.returncode == 1
        and len(done.stderr.strip().splitlines()) == 1
        and "nowhere" in done.stderr
    )
    assert command("vae.py", cwd=tmp_path).returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_the_main_job_runs_on_trained_weights(home, tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    for stage in ("cavp", "ldm", "align"):
        (weights / f"{stage}.safetensors").symlink_to(home / stage / "last.safetensors")
    done = checked(
        "sample.py",
        home / "clips" / "00000.mp4",
        "--weights",
        weights,
        "--out",
        tmp_path / "out",
        "--steps",
        2,
        "--json",
    )
    line = json.loads(done.stdout.splitlines()[-1])
    assert Path(line["output"]).exists() and Path(line["wav"]).exists()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "00000.foley.mp4",
        "00000.foley.wav",
        "manifest.jsonl",
    ]


def test_a_classifier_that_is_to_judge_sees_no_noise(tmp_path, monkeypatch):
    """--clean: every latent at t = 0 without noise, in training and in validation; else never."""
    tiny.install(monkeypatch.setattr)
    seen, plain = [], align.classify

    def classify(model, z, t, noise, features):
        seen.append(not t.any() and not noise.any())
        return plain(model, z, t, noise, features)

    monkeypatch.setattr(align, "classify", classify)
    first_stage = tiny.autoencoder(tmp_path)
    for name, flags in (("judging", {"clean": True}), ("guiding", {})):
        seen.clear()
        align.main(
            tiny.arguments("align", tmp_path / name, steps=2, first_stage=first_stage, **flags)
        )
        assert seen and all(clean == (name == "judging") for clean in seen)
