"""Many films: which inputs are meant, what is kept and what is drawn again, shares of processes.

All but one draw with a stand-in for the networks, whose sound follows from the seed."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from bounds import PATIENCE
from clips import make_video
from main_job import run

import sample
from common import files, media
from common.media import MediaError
from common.onsets import Hit
from common.profiling import Profile
from compat import hub
from film import jobs, manifest, outputs
from film.provenance import WeightSums

ROOT = Path(sample.__file__).parent
KEPT = "kept (same settings; --overwrite draws it again)"


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("film") / "a.mp4", 0.4)


@pytest.fixture
def weights(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("cavp", "ldm", "align"):
        (folder / f"{name}.safetensors").write_text(name)
    return folder


@pytest.fixture
def folder(film, tmp_path):
    """A folder with one film."""
    (tmp_path / "films").mkdir()
    shutil.copy(film, tmp_path / "films" / "a.mp4")
    return tmp_path / "films"


@pytest.fixture
def drawn(monkeypatch):
    """Stands for the networks -> names of the videos that were drawn, and "load" where weights
    were."""
    done = []
    config = SimpleNamespace(guidance=2.5, columns=4, scales=())
    network = torch.nn.Linear(1, 1)
    network.config = config
    network.materials = ("wood",)

    def load(*_, **__):
        done.append("load")
        return sample.Models(None, network, network, name="tiny")

    def generate(videos, models, *, settings, start, **_):
        for video in map(Path, videos):
            done.append(video.name)
            try:
                seconds = media.probe(video).duration
            except MediaError as error:
                yield video, error
                continue
            rng = torch.Generator().manual_seed(settings.seed)
            wav = 0.1 * torch.randn(round(16000 * seconds), generator=rng)
            tags = {"comment": "AI-generated sound"}
            result = sample.Result(
                *(wav, {0: wav}, [-0.5], 0, torch.zeros(128, 30), [0], seconds, video, start),
                *(None, Profile(), tags),
                hits=[Hit(0.25, 0.5, "wood")],
                settings=settings,
            )
            yield video, result

    monkeypatch.setattr(sample, "load_models", load)
    monkeypatch.setattr(sample, "generate_many", generate)
    return done


@pytest.fixture
def draw(capsys, drawn, folder, weights):
    """draw(*flags) -> exit status, stdout, stderr, what was drawn; of the folder's film."""

    def call(*flags, inputs=(folder,), weights=weights):
        drawn.clear()
        done = run(capsys, *inputs, "--weights", weights, *flags)
        return *done, [name for name in drawn if name != "load"]

    return call


def lines_of(folder):
    """Without those that say that outputs are about to be written."""
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return [line for line in lines if "replacing" not in line]


# ---- kept ----------------------------------------------------------------------------------------


def test_a_finished_output_is_kept_before_weights_are_loaded(draw, drawn, folder):
    status, out, err, names = draw("--json")
    made = json.loads(out[0])
    assert status == 0 and not err and names == ["a.mp4"] and "kept" not in made
    before = (folder / "a.foley.wav").read_bytes()
    status, out, err, names = draw()
    assert status == 0 and not err and not drawn
    assert out == [f"{folder / 'a.foley.mp4'}  {KEPT}"]
    line = json.loads(draw("--json", "--profile", "--batch", 3)[1][0])
    del made["profile"]
    assert line == {**made, "kept": True} and not drawn
    assert draw("--overwrite")[3] == ["a.mp4"] and draw()[3] == []
    assert (folder / "a.foley.wav").read_bytes() == before


def test_the_manifest_says_what_was_made_from_what(draw, folder, weights):
    draw("--cg", 3, "--seed", 7)
    (line,) = lines_of(folder)
    assert line["input"]["path"] == "a.mp4"
    assert line["input"]["sha256"] == files.sha256(folder / "a.mp4")
    assert set(line["files"]) == {"a.foley.mp4", "a.foley.wav"}
    for name, entry in line["files"].items():
        assert entry["sha256"] == files.sha256(folder / name)
        assert entry["size"] == (folder / name).stat().st_size
    assert line["weights"]["name"] == "tiny" and line["version"] == sample.VERSION
    # the shipped finder among them, since the folder has none
    used = {path.name: path for path in hub.find_weights(weights).values()}
    assert line["weights"]["files"].keys() == used.keys()
    for name, entry in line["weights"]["files"].items():
        assert entry["sha256"] == files.sha256(used[name])
    settings = line["settings"]
    assert settings["seed"] == 7 and settings["cg"] == 3 and settings["cfg"] == 2.5
    assert settings["onsets"] == "both" and set(line["left_open"]) == {
        "steps",
        "sampler",
        "guidance",
        "cfg",
        "onsets",
    }
    assert not {"out", "inputs", "json", "batch", "device"} & set(settings)
    assert line["dtype"] == "float32" and line["date"].endswith("Z")


def test_what_changes_an_output_draws_it_again(draw, folder, weights):
    draw()
    assert draw("--seed", 1)[3] == ["a.mp4"]
    assert draw("--seed", 1)[3] == [] and draw()[3] == ["a.mp4"]
    # given as the weights would have chosen
    assert draw("--cfg", 2.5)[3] == [] and draw("--cfg", 2)[3] == ["a.mp4"]
    # and not left to them any more
    assert draw()[3] == ["a.mp4"]
    assert draw("--keep-audio")[3] == ["a.mp4"]  # at 0 dB, which is not off
    assert draw("--keep-audio", 0)[3] == []
    (folder / "a.foley.wav").unlink()
    assert draw("--keep-audio")[3] == ["a.mp4"]
    # other weights, and the same elsewhere
    moved = shutil.copytree(weights, weights.parent / "moved")
    assert draw("--keep-audio", weights=moved)[3] == []
    (moved / "ldm.safetensors").write_text("new")
    assert draw("--keep-audio", weights=moved)[3] == ["a.mp4"]
    (moved / "align.safetensors").unlink()
    assert draw("--keep-audio", weights=moved)[3] == ["a.mp4"]


def test_another_input_of_that_name_is_drawn(draw, folder):
    draw()
    os.utime(folder / "a.mp4")  # the same bytes at another time
    assert draw()[3] == []
    make_video(folder / "a.mp4", 0.8)
    assert draw()[3] == ["a.mp4"] and draw()[3] == []


def test_any_flag_counts_unless_it_is_known_not_to():
    """Also one that is new, and that a line of an earlier version does not have."""
    line = {"settings": {"seed": 0, "cfg": 2.5, "old": False}, "left_open": ["cfg"]}
    given = {"seed": 0, "cfg": None}

    def same(**more):
        return manifest.same_settings(line, Namespace(**given, **more), None)

    assert same() and same(lufs=None, stems=False, names=()) and same(json=True, batch=3, out="x")
    assert not same(lufs=-23.0) and not same(lufs=0) and not same(stems=True) and not same(old=True)
    assert not same(path=Path("x"))
    line["settings"]["path"] = "x"
    assert same(path=Path("x")) and not same()


def test_what_somebody_edited_is_not_replaced_in_silence(draw, folder):
    draw()
    wav = folder / "a.foley.wav"
    os.utime(wav)  # not changed, only newer
    assert draw()[3] == []
    edited = wav.read_bytes()[:-2] + b"\1\1"
    wav.write_bytes(edited)
    for flags in ((), ("--seed", 1)):
        status, out, err, names = draw(*flags)
        assert status == 1 and not out and not names and wav.read_bytes() == edited
        assert err == [
            f"sample.py: {wav}: was changed since it was written; move it, or give --overwrite"
        ]
    assert draw("--overwrite")[3] == ["a.mp4"] and wav.read_bytes() != edited
    wav.write_bytes(edited)
    wav.rename(folder / "mine.wav")
    assert draw()[0] == 0 and draw()[3] == []


def test_edited_hits_are_played_and_kept(draw, folder):
    """--write-onsets, an edit, --onsets: the hits' file is the user's, the sound is drawn anew."""
    hits = folder / "a.onsets.txt"
    assert draw("--write-onsets")[3] == ["a.mp4"]
    assert json.loads(draw("--write-onsets", "--json")[1][0])["onsets"] == str(hits)
    assert draw("--write-onsets", "--seed", 1)[3] == ["a.mp4"]  # nobody edited them
    hits.write_text("0.1\t0.1\twood 0.9\n")
    status, _, err, _ = draw("--write-onsets")
    assert status == 1 and "a.onsets.txt: was changed since" in err[0]
    assert draw("--onsets", hits)[3] == ["a.mp4"] and draw("--onsets", hits)[3] == []
    assert lines_of(folder)[-1]["settings"]["onsets"] == [[0.1, 0.9, "wood"]]
    assert draw("--onsets", folder)[3] == []  # the same hits, found another way
    hits.write_text("0.2\t0.2\t\n")
    assert draw("--onsets", folder)[3] == ["a.mp4"] and draw("--onsets", folder)[3] == []
    status, _, err, _ = draw("--write-onsets")
    assert status == 1 and "is there already; move it" in err[0]
    hits.write_text("")  # no hits are not the weights' own hits
    assert draw("--onsets", hits)[3] == ["a.mp4"] and draw()[3] == ["a.mp4"]


def test_what_is_not_ours_is_not_replaced_in_silence(draw, folder):
    """A sound, a video or a candidate of that name that no line of the manifest says we made."""
    foreign = {
        "a.foley.wav": (),
        "a.foley.mp4": (),
        "a.foley.mov": ("--format", "mov"),
        "a.foley.flac": ("--format", "flac"),
        "a.foley.1.wav": ("--candidates", 2, "--keep-all"),
        "a.foley.png": ("--plot",),
    }
    for name, flags in foreign.items():
        path = folder / name
        path.write_text("mine")
        status, out, err, names = draw(*flags)
        assert status == 1 and not out and not names and path.read_text() == "mine"
        assert err == [
            f"sample.py: {path}: is there already, and no line of manifest.jsonl says that it is "
            "ours; move it, or give --overwrite"
        ]
        path.unlink()
    # what is not in the way is left alone
    (folder / "a.foley.mov").write_text("mine")
    assert draw()[::3] == (0, ["a.mp4"])
    assert draw("--format", "mov")[0] == 1
    assert draw("--format", "mov", "--overwrite")[::3] == (0, ["a.mp4"])
    # ours by an earlier line is ours
    assert draw()[::3] == (0, ["a.mp4"]) and draw("--format", "mov")[::3] == (0, ["a.mp4"])
    # without the manifest nobody knows
    (folder / "manifest.jsonl").unlink()
    assert draw()[0] == 1 and draw("--overwrite")[::3] == (0, ["a.mp4"])


def test_outputs_of_another_version_are_drawn_again(draw, folder, monkeypatch):
    draw()
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "VERSION", "9.9")
        patch.setattr(manifest, "VERSION", "9.9")
        assert draw()[::3] == (0, ["a.mp4"]) and draw()[3] == []
    assert draw()[3] == ["a.mp4"] and lines_of(folder)[-1]["version"] == sample.VERSION


# ---- the manifest's file -------------------------------------------------------------------------


def test_a_damaged_manifest_costs_its_lines_alone(draw, folder, film):
    shutil.copy(film, folder / "b.mp4")
    draw()
    path = folder / "manifest.jsonl"
    whole = path.read_bytes()
    # as a power cut leaves the last line
    path.write_bytes(whole[:-300])
    status, out, err, names = draw()
    assert status == 0 and not err and names == ["b.mp4"]
    assert draw()[3] == []
    # that line is now in the middle
    assert draw()[2] == [f"sample.py: {path}: line 4 is damaged, left out"]
    begun, first, *_ = whole.splitlines()
    begun = begun.replace(b"a.foley", b"b.foley")
    for nonsense in (b"[]", b'{"target": []}', b'{"target": "a.foley"}', b"\xff\0", b"[" * 10**5):
        path.write_bytes(b"\n".join((first, begun, nonsense, b"")))
        status, out, err, names = draw()
        assert status == 0 and len(err) == 1 and "line 3 is damaged" in err[0], nonsense
        assert names == ["b.mp4"]


class Killed(BaseException):
    """As a kill: nothing that catches errors sees it."""


def test_a_kill_between_an_output_and_its_line(draw, folder, monkeypatch):
    def kill(*_):
        raise Killed

    for flags in ((), ("--seed", 1)):  # nothing there before; an output and its line
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "add", kill)
            with pytest.raises(Killed):
                draw(*flags)
        assert (folder / "a.foley.wav").exists()
        # neither taken for finished nor for edited
        assert draw(*flags)[::3] == (0, ["a.mp4"]) and draw(*flags)[3] == []


def test_a_failed_write_is_as_if_nothing_had_been_tried(draw, folder, monkeypatch):
    def full(*_):
        raise files.FileError("a disk is full; free some space")

    wav = folder / "a.foley.wav"
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "write_outputs", full)
        assert draw()[0] == 1 and not wav.exists()
    # what somebody puts there since is theirs
    wav.write_text("mine")
    assert draw()[0] == 1 and wav.read_text() == "mine"
    assert draw("--overwrite")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "write_outputs", full)
        assert draw("--seed", 1)[0] == 1
    # and what is finished is still known to be
    assert draw()[::3] == (0, [])


def test_a_disk_that_is_full_for_the_line_is_said(draw, folder, monkeypatch):
    synced = []

    # the line that an output is about to be written still has room
    def full(*_):
        synced.append(1)
        if len(synced) == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "os", SimpleNamespace(**{**vars(os), "fsync": full}))
        status, out, err, _ = draw()
    assert status == 0 and len(out) == 1 and len(err) == 1
    assert "manifest.jsonl: cannot be written" in err[0] and "drawn again" in err[0]
    assert draw()[0] == 0  # not in the way of itself


def test_an_input_or_weights_that_change_meanwhile_are_not_taken_for_the_new(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    before = manifest.stamp(path)
    path.write_text("newer")
    entry = manifest.fingerprint(path, before)
    assert entry["sha256"] is None and not manifest.is_same(path, entry)
    # a sum of an earlier run holds as long as the stamp does
    path.unlink()
    assert manifest.fingerprint(path, before)["sha256"] is None
    path.write_text("new")
    known = {**manifest.stamp(path), "sha256": "known"}
    assert manifest.fingerprint(path, None, known)["sha256"] == "known"
    os.utime(path, ns=(0, 0))
    assert manifest.fingerprint(path, None, known)["sha256"] == files.sha256(path)


def test_lines_of_many_processes_stay_whole(tmp_path):
    code = (
        "import sys; from pathlib import Path; from film import manifest\n"
        "for k in range(40):\n"
        "    manifest.append(Path(sys.argv[1]), {'target': sys.argv[2] * 3000, 'k': k})\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path, name], cwd=ROOT) for name in "abc"
    ]
    assert [writer.wait(timeout=PATIENCE) for writer in writers] == [0, 0, 0]
    lines = lines_of(tmp_path)
    assert sorted((line["target"][0], line["k"]) for line in lines) == sorted(
        (name, k) for name in "abc" for k in range(40)
    )


def test_folders_that_cannot_be_written_are_one_line_before_any_work(
    draw, drawn, folder, film, monkeypatch
):
    shutil.copy(film, folder / "b.mp4")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        status, out, err, _ = draw()
    assert status == 1 and not out and not drawn
    assert err == [f"sample.py: {folder}: cannot be written into; give another folder with --out"]
    draw()
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        assert draw()[:3:2] == (0, []) and not drawn  # finished ones are just kept
    (folder / "manifest.jsonl").unlink()
    (folder / "manifest.jsonl").mkdir()
    status, out, err, _ = draw()
    assert status == 1 and not drawn and len(err) == 1 and "cannot be written into" in err[0]


# ---- inputs --------------------------------------------------------------------------------------


@pytest.fixture
def tree(film, tmp_path):
    """Videos in folders, and what is none."""
    for name in ("a.mp4", "b.mov", "deep/c.mp4", "deep/er/d.mp4", "deep/er/x.foley.mp4", ".h.mp4"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(film, path)
    (tmp_path / "tree" / "notes.txt").write_text("none")
    (tmp_path / "tree" / "deep" / "round").symlink_to(tmp_path / "tree")
    return tmp_path / "tree"


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("*.mp4", "a"),
        ("?.*", "ab"),
        ("*", "abcd"),  # as of a shell: what is in a folder that fits counts
        ("*.txt", None),
        ("**", "abcd"),
        ("**/*.mp4", "acd"),
        ("**/c.*", "c"),
        ("**/er", "d"),
        ("deep/**", "cd"),
        ("deep/**/*.mov", None),
        ("de?p/*/[d]*", "d"),
        ("**/**/c.mp4", None),
        (".*", "h"),
        ("none*", None),
    ],
)
def test_patterns_that_the_shell_left(tree, pattern, names):
    # without the loop, which leads back to the tree by another name
    if not pattern.startswith("**/"):
        (tree / "deep" / "round").unlink()
    found = jobs.find_videos(f"{tree}/{pattern}")
    if names is None:
        assert len(found) == 1 and found[0][1].startswith(f"{tree}/{pattern}: ")
        assert ";" in found[0][1] and "\n" not in found[0][1]
    else:
        assert {path.stem.strip(".") for path, _ in found} == set(names)
        assert all(error is None for _, error in found)


def test_verify_takes_the_same_patterns_and_our_own_outputs(tree):
    def found(pattern):
        return [path.name for path in jobs.find_sounds([f"{tree}/{pattern}"])]

    assert found("**/er") == ["d.mp4", "x.foley.mp4"]
    # the folder that leads back to the tree is gone through once, as when drawing
    assert found("deep/**") == ["c.mp4", "d.mp4", "x.foley.mp4", "a.mp4", "b.mov"]
    assert found("none*") == ["none*"]
    (error,) = jobs.find_sounds([f"{tree}/**/**/c.mp4"])
    assert "** twice" in str(error)


def test_names_that_look_like_patterns_and_lists(tree, film, monkeypatch):
    monkeypatch.chdir(tree)
    for name in ("a [1].mp4", "@b.mp4"):
        shutil.copy(film, name)
        assert jobs.find_videos(name) == [(Path(name), None)]
    (tree / "[odd]").mkdir()
    shutil.copy(film, "[odd]/e.mp4")
    (tree / "[odd]" / "list.txt").write_text("*.mp4\ne.mp4\n")
    assert [p for p, _ in jobs.find_videos("@[odd]/list.txt")] == [Path("[odd]/e.mp4")] * 2
    long = "x" * 300 + ".mp4"
    ((given, error),) = jobs.find_videos(long)
    assert given == long and "too long" in error


def test_lists(tree):
    path = tree / "deep" / "films.m3u"
    path.write_bytes(
        b"\xef\xbb\xbf#EXTM3U\r\n\r\nc.mp4\r\n  ../*.mov \r\n# no\r\n"
        + str(tree / "a.mp4").encode()
        + b"\r\ner\r\nmissing.mp4"
    )
    found = jobs.find_videos(f"@{path}")
    assert [p.name for p, _ in found] == ["c.mp4", "b.mov", "a.mp4", "d.mp4", "missing.mp4"]
    assert found[0][0] == tree / "deep" / "c.mp4" and not any(error for _, error in found)
    for content, word in ((b"\xff\xfe", "text"), (b"a\0b", "text"), (b"# c\n\n", "no file")):
        path.write_bytes(content)
        ((given, error),) = jobs.find_videos(f"@{path}")
        assert given == f"@{path}" and word in error and ";" in error
    for given in (f"@{path}.none", f"@{tree}"):
        assert "cannot be read" in jobs.find_videos(given)[0][1]


def test_what_gives_nothing_is_one_line_and_the_others_are_done(draw, folder):
    inputs = (f"{folder}/*.mkv", f"@{folder}/none.txt", f"{folder}/*.mp4", folder / "a.mp4")
    status, out, err, names = draw("--json", inputs=inputs)
    assert status == 1 and names == ["a.mp4"] and len(err) == 2 and len(out) == 3
    assert [set(json.loads(line)) == {"input", "error"} for line in out] == [True, True, False]


# ---- processes -----------------------------------------------------------------------------------


def test_processes_share_the_inputs_out(draw, folder, film, monkeypatch):
    for name in "bcde":
        shutil.copy(film, folder / f"{name}.mp4")
    shared = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        status, out, err, names = draw(inputs=(folder, folder / "none.mp4"))
        shared.append(names)
        assert len(out) + len(err) == len(names) == 3 and status == int(rank == "1")
    assert shared == [["a.mp4", "c.mp4", "e.mp4"], ["b.mp4", "d.mp4", "none.mp4"]]
    monkeypatch.setenv("RANK", "0")
    assert draw()[3] == [] and len(draw()[1]) == 3
    for wrong in ("2", "-1", "x"):
        monkeypatch.setenv("RANK", wrong)
        status, out, err, names = draw()
        assert status == 1 and not out and not names and len(err) == 1 and "RANK" in err[0]


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    jobs.join("auto")
    for name, value in {"WORLD_SIZE": 8, "RANK": 5, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    jobs.join("cpu")
    assert not taken and jobs.join("auto") == (5, 8) and taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "3")  # more processes than GPUs share them
    jobs.join("cuda")
    assert taken == [1, 1]


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory):
    return tiny.save(tiny.models(), tmp_path_factory.mktemp("weights") / "tiny")


def test_torchrun_makes_the_same_sounds_with_one_line_a_file(tiny_weights, folder, film):
    for name in "bc":
        shutil.copy(film, folder / f"{name}.mp4")
    (folder / "bad.mp4").write_text("no film")

    def script(out, *launcher, flags=()):
        command = [sys.executable, *launcher, ROOT / "sample.py", folder, "--out", out]
        command += ["--weights", tiny_weights, "--steps", "1", "--json", *flags]
        return subprocess.run(
            [str(c) for c in command],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    one = script(folder / "one")
    two = script(folder / "two", *launcher)
    assert one.returncode == 1 and two.returncode != 0, two.stderr
    lines = [json.loads(line) for line in two.stdout.splitlines()]
    assert sorted(Path(line["input"]).stem for line in lines) == ["a", "b", "bad", "c"]
    assert sum("error" in line for line in lines) == 1
    # torchrun adds its own account, for there is no other status than its error
    assert two.stderr.count("sample.py: ") == 1 and 'sample.py", line' not in two.stderr
    for name in "abc":
        sounds = [(folder / out / f"{name}.foley.wav").read_bytes() for out in ("one", "two")]
        assert sounds[0] == sounds[1], name
    assert {line["target"] for line in lines_of(folder / "two")} == {f"{n}.foley" for n in "abc"}
    # nothing left to draw, nothing wrong
    (folder / "bad.mp4").unlink()
    again = script(folder / "two", *launcher)
    assert again.returncode == 0, again.stderr
    assert sorted(json.loads(line)["kept"] for line in again.stdout.splitlines()) == [True] * 3


def test_weights_are_read_once(tmp_path, monkeypatch):
    """What was summed while they were loaded is not summed again for the manifest."""
    for name in ("cavp", "ldm", "align"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    weights = manifest.Weights(str(tmp_path))
    expected = manifest.Weights(str(tmp_path)).sums()
    loaded = WeightSums({path.stem: path for path in weights.stamps})
    loaded.result()
    monkeypatch.setattr(manifest, "sha256", None)
    weights.take(loaded)
    assert weights.sums() == expected and len(expected) == 4  # the shipped finder, too
    # of a file that was replaced since, the sum is of another
    changed = manifest.Weights(str(tmp_path))
    (tmp_path / "ldm.safetensors").write_bytes(b"a new one")
    changed.take(loaded)
    assert "ldm.safetensors" not in changed.found and "cavp.safetensors" in changed.found
