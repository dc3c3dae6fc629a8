"""A run that ended resumes as if nothing had happened, or says in one line what to do."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny
import torch
from bounds import PATIENCE
from safetensors import safe_open
from safetensors.torch import load_file

from common import training

HERE = Path(__file__).resolve().parent
STEPS = 6  # a checkpoint after 2, 4 and 6
# where the kill comes: code that runs before the training, in its process
KILL = "def die():\n    os.kill(os.getpid(), signal.SIGKILL)\n"
KILL_POINTS = {
    "in a step": """
update = training.update
def spy(args, step, *rest):
    return die() if step == 3 else update(args, step, *rest)
training.update = spy
""",
    "in the log": """
log = training.TrainingRun.log
def half(run, step, **row):
    if step == 4:
        with open(run.args.out / "log.jsonl", "a") as f:
            f.write('{"step": 4, "val')
        die()
    log(run, step, **row)
training.TrainingRun.log = half
""",
    "with the weights half written": """
def half(tensors, path, metadata):
    save(tensors, path, metadata)
    if json.loads(metadata["step"]) == 4:
        os.truncate(path, os.path.getsize(path) // 2)
        die()
save, checkpoints.save_file = checkpoints.save_file, half
""",
    "between weights and state": """
def none(state, f):
    return die() if state["step"] == 4 else save(state, f)
save, torch.save = torch.save, none
""",
    "with the state half written": """
def half(state, f):
    save(state, f)
    if state["step"] == 4:
        f.truncate(f.tell() // 2)
        f.flush()
        die()
save, torch.save = torch.save, half
""",
    "between the two names of the state": """
def one(source, target):
    replace(source, target)
    if str(target).endswith("previous.state.pt"):
        die()
replace, os.replace = os.replace, one
""",
}


def rows(out):
    """What was logged, without what depends on the clock."""
    clock = ("seconds", "clips_per_second", "waiting", "memory_gb")
    return [
        {k: v for k, v in json.loads(line).items() if k not in clock}
        for line in (out / "log.jsonl").read_text().splitlines()
    ]


def state(out, name="last.state.pt"):
    return torch.load(out / name, weights_only=True)


def equal(a, b):
    """Of anything that a state holds."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def started_from(out):
    """Of the weights' header: names and sums of the initial weights, --init, --note."""
    with safe_open(out / "last.safetensors", "pt") as file:
        metadata = {k: json.loads(file.metadata()[k]) for k in ("started_from", "args")}
    return metadata["started_from"], metadata["args"]["init"], metadata["args"]["note"]


def same_run(a, b):
    """Weights, moving average, optimizer, log, initial weights."""
    one, other = state(a), state(b)
    assert rows(a) == rows(b)
    assert all(
        equal(one[k], other[k]) for k in ("model", "ema", "updates", "optimizer", "step", "totals")
    )
    one, other = (load_file(out / "last.safetensors") for out in (a, b))
    assert equal(one, other)
    assert started_from(a) == started_from(b)
    assert not list(b.glob(".*.part"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """uninterrupted(stage) -> OUT of a run that nothing interrupted."""
    home, done = tmp_path_factory.mktemp("uninterrupted"), {}
    first_stage = tiny.autoencoder(home)

    def uninterrupted(stage):
        if stage not in done:
            with pytest.MonkeyPatch.context() as patch:
                tiny.install(patch.setattr)
                patch.setattr(training, "plot", lambda out, pairs: None)
                tiny.MAINS[stage](
                    tiny.arguments(stage, home / stage, STEPS, 2, first_stage, save_every=2)
                )
            done[stage] = home / stage
        return done[stage]

    return uninterrupted


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(stage, name, **flags) -> OUT, a tiny training in this process."""
    tiny.install(monkeypatch.setattr)
    monkeypatch.setattr(training, "plot", lambda out, pairs: None)

    def run(stage, name, steps=STEPS, **flags):
        tiny.MAINS[stage](
            tiny.arguments(
                stage, tmp_path / name, steps, 2, tiny.autoencoder(tmp_path), save_every=2, **flags
            )
        )
        return tmp_path / name

    return run


def failing(run, *args, **flags):
    """The one line with which a run ends."""
    with pytest.raises(SystemExit) as e:
        run(*args, **flags)
    line = str(e.value)
    assert "\n" not in line and line.startswith("vae.py: "), line
    return line


def in_a_process(stage, args, before):
    """A run in a process of its own, in which the code `before` ran first."""
    code = (
        f"import json, os, signal, sys\nsys.path[:0] = {[str(HERE), str(HERE.parent)]}\n"
        "import torch, tiny\nfrom common import checkpoints, media, training\ntiny.install()\n"
        f"training.plot = lambda *_: None\n{before}\ntiny.MAINS[{stage!r}](sys.argv[1:])"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def killed(stage, out, point):
    """A run that a real SIGKILL ends, in a process of its own."""
    args = tiny.arguments(
        stage, out, STEPS, 2, out.parent / "first_stage.safetensors", save_every=2
    )
    done = in_a_process(stage, args, KILL + KILL_POINTS[point])
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


@pytest.mark.parametrize(
    "stage, point",
    [("vae", m) for m in KILL_POINTS]
    + [(s, "with the state half written") for s in ("cavp", "ldm", "align")],
)
def test_a_killed_run_goes_on_bit_for_bit(uninterrupted, run, tmp_path, stage, point):
    tiny.autoencoder(tmp_path)
    killed(stage, tmp_path / "killed", point)
    run(stage, "killed", resume=True)
    same_run(uninterrupted(stage), tmp_path / "killed")


@pytest.mark.parametrize("stage", tiny.MAINS)
def test_ctrl_c_leaves_no_trace(uninterrupted, run, monkeypatch, stage):
    """Stopped after three steps, between two checkpoints, then resumed: the same log too."""
    report = training.TrainingRun.report

    def interrupt(self, **values):
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        report(self, **values)

    monkeypatch.setattr(training.TrainingRun, "report", interrupt)
    assert state(run(stage, "stopped"))["step"] == 3
    monkeypatch.setattr(training.TrainingRun, "report", report)
    same_run(uninterrupted(stage), run(stage, "stopped", resume=True))


@pytest.mark.parametrize("stage", tiny.MAINS)
def test_validation_disturbs_nothing(run, monkeypatch, stage):
    seen = run(stage, "seen", steps=4)
    monkeypatch.setattr(training, "train_val_split", lambda reader: (reader(split="train"), None))
    unseen = run(stage, "unseen", steps=4)
    assert equal(state(seen)["model"], state(unseen)["model"]) and equal(
        load_file(seen / "last.safetensors"), load_file(unseen / "last.safetensors")
    )
    validated = [row["step"] for row in rows(seen) if any(k.startswith("val_") for k in row)]
    assert validated == [2, 4] and len(rows(unseen)) == 1


def test_a_different_number_of_readers_changes_nothing(run):
    alone, helped = run("vae", "alone", steps=2), run("vae", "helped", steps=2, workers=2)
    assert equal(state(alone)["model"], state(helped)["model"])


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(uninterrupted, run, capsys, damage):
    out = run("vae", "damaged", steps=4)
    path = out / "last.state.pt"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) * 3 // 4]
    else:  # one bit of a tensor
        with zipfile.ZipFile(path) as archive:
            tensors = [entry for entry in archive.infolist() if "/data/" in entry.filename]
            tensor = archive.read(max(tensors, key=lambda entry: entry.file_size))
        content[content.find(tensor) + len(tensor) // 2] ^= 1
    path.write_bytes(content)
    run("vae", "damaged", resume=True)
    said = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "damaged/last.state.pt: damaged" in line
    ]
    assert len(said) == 1
    assert equal(state(uninterrupted("vae"))["model"], state(out)["model"])


def test_with_both_damaged_it_says_so(run):
    out = run("vae", "damaged", steps=4)
    for name in training.STATES:
        (out / name).write_bytes(b"PK\3\4 nothing")
    assert "no complete last.state.pt" in failing(run, "vae", "damaged", resume=True)


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(run, monkeypatch):
    sound = tiny.RandomClips.sound
    good = run("vae", "good", steps=4)
    seen = []

    def broken(self, rng, samples):
        seen.append(0)
        return sound(self, rng, samples) * (float("nan") if len(seen) > bad else 1)

    monkeypatch.setattr(tiny.RandomClips, "sound", broken)
    monkeypatch.setattr(training, "train_val_split", lambda reader: (reader(split="train"), None))
    monkeypatch.setattr(tiny.vae, "calibrated", lambda model, *_: model)
    bad = 8  # two clips a step: the fifth step
    line = failing(run, "vae", "broken")
    assert "step 5" in line and "from step 4" in line and "--lr" in line
    assert equal(state(good)["model"], state(good.with_name("broken"))["model"])
    seen.clear()
    bad = 0
    assert "nothing is saved" in failing(run, "vae", "broken from the start")


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(run):
    out = run("vae", "full", steps=4)
    before, size = (out / "last.state.pt").read_bytes(), (out / "last.state.pt").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        line = failing(run, "vae", "full", resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "last.state.pt" in line and "free some space" in line
    assert (out / "last.state.pt").read_bytes() == before and not list(out.glob(".*.part"))
    run("vae", "full", resume=True)
    assert state(out)["step"] == STEPS


VANISH = """
item = tiny.Sounds.__getitem__
def gone(self, index):
    if index >= 6:
        raise media.MediaError("set/shard-00001.bin: missing; prepare the set again")
    return item(self, index)
tiny.Sounds.__getitem__ = gone
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_clip_that_vanished_is_one_line(tmp_path, workers):
    """In a process of its own, which a running data worker must not keep from ending."""
    done = in_a_process(
        "vae", tiny.arguments("vae", tmp_path / "run", STEPS, 2, workers=workers), VANISH
    )
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1]
        == "vae.py: set/shard-00001.bin: missing; prepare the set again"
    )


def test_a_reader_that_dies_is_one_line(run, monkeypatch):
    item, parent = tiny.Sounds.__getitem__, os.getpid()

    def dies(self, index):
        if index >= 6 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, index)

    monkeypatch.setattr(tiny.Sounds, "__getitem__", dies)
    line = failing(run, "vae", "dead", workers=1)
    assert "died" in line and "--workers" in line and "--resume" in line


def test_changed_flags_are_printed(run, capsys):
    run("vae", "run", steps=2)
    run("vae", "run", steps=4, lr=1e-5, resume=True)
    printed = re.findall(r"going on with (\w+) (\S+), until now (\S+)", capsys.readouterr().err)
    assert printed == [("steps", "4", "2"), ("lr", "1e-05", "0.001")]


def test_another_networks_state_is_one_line(run, monkeypatch):
    out = run("vae", "run", steps=2)
    monkeypatch.setitem(tiny.vae.PRESETS, "mini", tiny.replace(tiny.VAE, width=16))
    (out / "last.safetensors").unlink()  # which would have said what the network looks like
    assert "last.state.pt" in failing(run, "vae", "run", steps=4, resume=True)


def test_a_note_stays_with_the_weights(run):
    """--note need not be given again when a run goes on."""
    assert (
        started_from(run("vae", "noted", steps=2, note="clips of seed 5"))[2] == "clips of seed 5"
    )
    assert started_from(run("vae", "noted", steps=4, resume=True))[2] == "clips of seed 5"
    assert (
        started_from(run("vae", "noted", steps=6, resume=True, note="and of seed 6"))[2]
        == "and of seed 6"
    )
    assert started_from(run("vae", "without", steps=2))[2] is None


def test_frozen_parts_stay_and_the_rest_moves(run, monkeypatch):
    """The video tower of CAVP, with its norms' statistics; from weights that a run has left."""
    begun = run("cavp", "begun", steps=2) / "last.safetensors"
    a, b = (
        load_file(begun),
        load_file(
            run("cavp", "frozen", steps=2, init=begun, freeze="video_encoder") / "last.safetensors"
        ),
    )
    for k in a:
        assert torch.equal(a[k], b[k]) == (
            k.startswith("video_encoder")
            or k.endswith("num_batches_tracked")
            and torch.equal(a[k], b[k])
        ), k
    monkeypatch.setattr(tiny, "MAINS", {**tiny.MAINS, "vae": tiny.cavp.main})
    with pytest.raises(SystemExit) as e:
        run("cavp", "misspelt", freeze="video_tower")
    assert "--freeze video_tower" in str(e.value) and "video_encoder" in str(e.value)


@pytest.mark.parametrize("stage", ["ldm", "align"])
def test_adapters_change_matrices_by_a_low_rank_and_nothing_else(run, stage):
    """Saved files have the plain network's keys and shapes; resuming is bit for bit."""
    begun = run(stage, "begun", steps=2) / "last.safetensors"
    straight = run(stage, "straight", steps=4, init=begun, lora=2, lr=0.01, warmup=1)
    again = shutil.copytree(straight, straight.parent / "again")
    (again / "last.state.pt").unlink()  # then there is the one of step 2
    same_run(
        straight,
        run(stage, again.name, steps=4, init=begun, lora=2, lr=0.01, warmup=1, resume=True),
    )
    a, b = load_file(begun), load_file(straight / "last.safetensors")
    assert a.keys() == b.keys()
    adapted = 0
    for k in a:
        if k.startswith(("cond_stage_model.", "cond_model.", "onset_head.", "material_head.")):
            continue
        if "transformer_blocks" in k and a[k].ndim == 2:
            assert torch.linalg.matrix_rank(b[k] - a[k], rtol=1e-3) == 2, k
            adapted += 1
        else:
            assert torch.equal(a[k], b[k]), k
    assert adapted > 10
    with pytest.raises(SystemExit, match="--lora"):
        run(stage, "from nothing", lora=2)
    with pytest.raises(
        SystemExit,
        match="the run in .*straight has --lora 2; give the same command again with --resume",
    ):
        run(stage, "straight", steps=6, init=begun, lr=0.01, resume=True)
    with pytest.raises(SystemExit, match="the run in .*begun has no --lora; give the same command"):
        run(stage, "begun", steps=6, init=begun, lora=2, resume=True)


def test_a_run_that_diverges_says_what_to_do(run):
    with pytest.raises(
        SystemExit, match="not finite; nothing is saved yet; start again with a lower --lr$"
    ):
        run("cavp", "wild", steps=8, lr=1e30, warmup=1)


def test_the_average_shares_what_is_frozen():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    ema = training.EMA(model)
    assert ema.model[0].weight is model[0].weight and ema.model[1].weight is not model[1].weight
    first = model[1].weight.detach().clone()
    with torch.no_grad():
        model[1].weight += 1
    ema.update(model)
    assert torch.allclose(ema.model[1].weight, first + 1 - 2 / 11)


def test_without_temporal_contrast_there_is_no_l_intra(run):
    plain = rows(run("cavp", "plain", steps=2, temporal_contrast=True))[0]
    semantic = rows(run("cavp", "semantic", steps=2, no_temporal_contrast=True))[0]
    assert plain["intra"] > 0 and semantic["intra"] == 0


def test_the_flags_of_stage_2s_loss(run):
    """--no-v-loss is the published loss, whose terms are the other's times alpha-bar, at most 1;
    --energy-weighting weights them; --timestep-shift changes the distribution of times."""
    even = rows(run("ldm", "v-loss", steps=2, v_loss=True))[0]["loss"]
    published = rows(run("ldm", "eps loss", steps=2, no_v_loss=True))[0]["loss"]
    assert even > 1.2 * published
    flat = rows(run("ldm", "flat", steps=2, no_energy_weighting=True))[0]["loss"]
    shifted = rows(run("ldm", "shifted", steps=2, timestep_shift=30))[0]["loss"]
    assert flat != even and shifted != even
    with pytest.raises(SystemExit, match="2"):
        run("ldm", "shift 0", timestep_shift=0)


def test_old_spellings_of_flags_still_work(run, capsys):
    """For one release, with a line each that says the new one."""
    old = {"clip": 0.5, "by_loudness": 0, "whole": 0.25, "temporal": 0}
    out = run("cavp", "old", steps=2, half=True, **old)
    printed = re.findall(r"(--[\w-]+) is now called (--[\w-]+);", capsys.readouterr().err)
    assert set(printed) == {
        ("--clip", "--grad-clip"),
        ("--half", "--save-dtype"),
        ("--by-loudness", "--loudness-weighting"),
        ("--whole", "--window-contrast"),
        ("--temporal", "--temporal-contrast"),
    }
    new = {"grad_clip": 0.5, "window_contrast": 0.25, "save_dtype": "float16"}
    flags = {"no_loudness_weighting": True, "no_temporal_contrast": True}
    same_run(out, run("cavp", "new", steps=2, **new, **flags))
    tensors = load_file(out / "last.safetensors")
    assert tensors["spec_encoder.fc1.weight"].dtype == torch.float16
    with pytest.raises(SystemExit):
        tiny.cavp.main(["--help"])
    shown = capsys.readouterr().out.split()
    assert "--grad-clip" in shown
    assert not {"--clip", "--half", "--by-loudness", "--whole", "--temporal", "--note"} & {*shown}


def test_a_run_of_the_release_before_can_be_resumed(run):
    """Its state has the old names of flags, which say nothing of the new ones."""
    out = run("vae", "run", steps=2)
    before = state(out)
    before["flags"]["clip"] = before["flags"].pop("grad_clip")
    before["flags"]["clips"] = before["flags"].pop("dataset_size")
    torch.save(before, out / "last.state.pt")
    run("vae", "run", steps=4, resume=True)
    assert state(out)["step"] == 4
