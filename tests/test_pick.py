"""sample.py --pick: the candidate that was picked by ear is in the video and the wav, and nothing
is drawn for it. Networks are tiny and random."""

import json
import shutil

import numpy as np
import pytest
import soundfile
from clips import clicks, make_video
from main_job import run

import sample
from common import media, xmp
from common.files import sha256
from film import outputs, pick

ARGS = ("--steps", 1, "--cg", 0, "--candidates", 3, "--keep-all")


@pytest.fixture(scope="module")
def drawn(weights, tmp_path_factory):
    """A folder with a clip and three candidates of its sound, which no test changes."""
    folder = tmp_path_factory.mktemp("drawn")
    sound = clicks(2, (0.4, 1.2))
    make_video(folder / "clip.mp4", 2, flashes=(0.4, 1.2), sound=sound)
    assert sample.main([str(a) for a in (folder / "clip.mp4", "--weights", weights, *ARGS)]) == 0
    return folder


@pytest.fixture
def folder(drawn, tmp_path):
    return shutil.copytree(drawn, tmp_path / "films")


@pytest.fixture
def picked(capsys, folder, tmp_path, monkeypatch):
    """picked(name, *flags) -> exit status, stdout, stderr; with no weights to load."""
    monkeypatch.setattr(sample, "load_models", None)

    def call(name, *flags):
        picks = tmp_path / "picks.json"
        picks.write_text(json.dumps({str(folder / "clip.mp4"): name}))
        return run(capsys, "--pick", picks, *flags)

    return call


def track(path):
    return media.read_audio(path, 0, 2).numpy()


def last_line(folder):
    return json.loads((folder / "manifest.jsonl").read_text().splitlines()[-1])


def others(folder):
    """Names of the candidates that the video does not have, and of the one that it has."""
    wav = (folder / "clip.foley.wav").read_bytes()
    names = [f"clip.foley.{k}.wav" for k in range(3)]
    best = next(name for name in names if (folder / name).read_bytes() == wav)
    return [name for name in names if name != best], best


def test_the_picked_sound_gets_into_the_video(picked, folder):
    (name, other), best = others(folder)
    before = last_line(folder)
    packets = media.read_tags(folder / "clip.foley.mp4"), xmp.read(folder / "clip.foley.mp4")
    status, out, err = picked(name)
    assert status == 0 and not err
    assert out == [f"{folder / 'clip.foley.mp4'}  has the sound of {name}"]
    assert (folder / "clip.foley.wav").read_bytes() == (folder / name).read_bytes()
    # its sound, through the codec, and no other's
    heard = track(folder / "clip.foley.mp4")
    distances = [np.abs(track(folder / one) - heard).mean() for one in (name, other, best)]
    assert distances[0] < 0.5 * min(distances[1:])
    # the film says what it said, but for the gain of another sound
    tags = media.read_tags(folder / "clip.foley.mp4")
    ungained = [pick.GAIN.sub("", one["comment"]) for one in (tags, packets[0])]
    assert ungained[0] == ungained[1]
    assert xmp.read(folder / "clip.foley.mp4") == packets[1] is not None
    assert (
        pick.GAIN.search(tags["comment"])[0]
        == pick.GAIN.search(media.read_tags(folder / name)["comment"])[0]
    )
    # the manifest says what is there, and what else it said
    line = last_line(folder)
    assert line["picked"] == name
    for file in ("clip.foley.mp4", "clip.foley.wav", name, other, best):
        assert line["files"][file]["sha256"] == sha256(folder / file)
    for key in ("input", "weights", "settings", "left_open", "version", "candidates", "paths"):
        assert line[key] == before[key]
    scores = {one["wav"]: one["score"] for one in before["candidates"]}
    assert line["result"]["score"] == scores[name] < before["result"]["score"]


def test_a_later_run_keeps_the_pick_and_another_pick_replaces_it(
    picked, capsys, folder, weights, monkeypatch
):
    (name, other), best = others(folder)
    status, lines, _ = picked(name, "--json")
    made = json.loads(lines[0])
    assert status == 0 and made["picked"] == name and "kept" not in made
    clip = folder / "clip.mp4"
    status, lines, err = run(capsys, clip, "--weights", weights, *ARGS, "--json")
    line = json.loads(lines[0])
    assert status == 0 and not err and line["kept"]
    assert line["score"] == made["score"] and line["lufs"] == made["lufs"]
    assert [one["wav"] for one in line["candidates"]] == [
        str(folder / f"clip.foley.{k}.wav") for k in range(3)
    ]
    # the same again has nothing to do
    times = (folder / "clip.foley.mp4").stat().st_mtime_ns
    assert f"kept ({name} was picked" in picked(name)[1][0]
    # nor is it undone by other settings, unless one says so
    other_settings = (clip, "--weights", weights, "--out", folder, "--steps", 3)
    sound = (folder / "clip.foley.wav").read_bytes()
    assert f"kept ({name} was picked" in run(capsys, *other_settings)[1][0]
    assert (folder / "clip.foley.wav").read_bytes() == sound
    assert (folder / "clip.foley.mp4").stat().st_mtime_ns == times
    for again in (other, best):
        assert picked(again)[0] == 0
        assert (folder / "clip.foley.wav").read_bytes() == (folder / again).read_bytes()
    monkeypatch.undo()  # now weights are loaded
    assert "kept" not in run(capsys, *other_settings, "--overwrite")[1][0]
    assert "picked" not in json.loads((folder / "manifest.jsonl").read_text().splitlines()[-1])


def test_the_pick_of_what_is_there_is_kept_too(picked, capsys, folder, weights):
    """Somebody who listens may agree with the classifier."""
    best = others(folder)[1]
    before = (folder / "manifest.jsonl").read_text().splitlines()
    # a second time there is nothing to say
    for _ in range(2):
        assert f"kept ({best} was picked" in picked(best)[1][0]
        *lines, line = (folder / "manifest.jsonl").read_text().splitlines()
        assert lines == before and json.loads(line)["picked"] == best
    clip = folder / "clip.mp4"
    flags = (clip, "--weights", weights, "--out", folder, "--steps", 3)
    assert f"kept ({best} was picked" in run(capsys, *flags)[1][0]


@pytest.mark.parametrize("form", ["flac", "mkv"])
def test_every_format_is_picked(capsys, folder, weights, monkeypatch, tmp_path, form):
    """Of flac the tags are elsewhere; with --out and a cut the picture is that of the output."""
    out = tmp_path / "out"
    clip = folder / "clip.mp4"
    flags = ("--out", out, "--format", form, "--start", 0.5, "--duration", 1)
    assert run(capsys, clip, "--weights", weights, *ARGS, *flags)[0] == 0
    suffix = "flac" if form == "flac" else "wav"
    sound = out / f"clip.foley.{suffix}"
    names = [f"clip.foley.{k}.{suffix}" for k in range(3)]
    name = next(n for n in names if (out / n).read_bytes() != sound.read_bytes())
    (tmp_path / "picks.json").write_text(json.dumps({str(clip): name}))
    monkeypatch.setattr(sample, "load_models", None)
    assert run(capsys, "--pick", tmp_path / "picks.json", "--out", out)[0] == 0
    assert sound.read_bytes() == (out / name).read_bytes()
    output = out / f"clip.foley.{form}"
    assert "seed 0" in media.read_tags(output)["comment"] and "xmp" in media.read_tags(output)
    if form == "mkv":
        assert media.probe(output).duration == pytest.approx(1, abs=0.1)
        heard = media.read_audio(output, 0, 1).numpy()
        assert np.abs(heard - soundfile.read(sound)[0][: len(heard)]).max() < 1e-3


def test_processes_share_the_picks_out(capsys, folder, tmp_path, monkeypatch):
    picks = {str(folder / "clip.mp4"): others(folder)[0][0], str(folder / "b.mp4"): "b.foley.0.wav"}
    (tmp_path / "picks.json").write_text(json.dumps(picks))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    before = (folder / "clip.foley.wav").read_bytes()
    status, out, err = run(capsys, "--pick", tmp_path / "picks.json")
    assert status == 1 and not out and len(err) == 1 and "b.mp4: no finished output" in err[0]
    assert (folder / "clip.foley.wav").read_bytes() == before
    monkeypatch.setenv("RANK", "0")
    status, out, err = run(capsys, "--pick", tmp_path / "picks.json")
    assert status == 0 and len(out) == 1 and not err
    assert (folder / "clip.foley.wav").read_bytes() != before


def test_stems_and_signatures_are_not_lost(capsys, picked, folder, weights, monkeypatch):
    name = others(folder)[0][0]
    # what is signed is signed again, or left alone
    with monkeypatch.context() as patch:
        patch.setattr(xmp, "has_credentials", lambda path: "mp4" in path.name)
        status, _, err = picked(name)
        assert status == 1 and "is signed; give --sign CERT KEY" in err[0]
    signed = []
    with monkeypatch.context() as patch:
        patch.setattr(sample, "Signer", lambda *given: given)
        for module in (outputs, pick):
            patch.setattr(module, "sign", lambda signer, part, path, *_: signed.append(path.name))
        assert picked(name, "--sign", "cert", "key")[0] == 0
    assert signed == ["clip.foley.mp4", "clip.foley.wav"]


def test_stems_are_those_of_the_pick(capsys, folder, weights):
    clip = folder / "clip.mp4"
    flags = (clip, "--weights", weights, *ARGS, "--stems")
    picks = folder / "picks.json"
    name = others(folder)[0][0]
    picks.write_text(json.dumps({str(clip): name}))
    assert run(capsys, *flags)[0] == 0
    assert run(capsys, "--pick", picks)[0] == 0
    for stem in ("clip.foley.wav", "clip.mix.wav"):
        assert (folder / stem).read_bytes() == (folder / name).read_bytes()
    # of a mix there is no stem
    assert run(capsys, *flags, "--keep-audio", "--overwrite")[0] == 0
    status, _, err = run(capsys, "--pick", picks)
    assert status == 1 and len(err) == 1 and "--stems and --keep-audio" in err[0]


def test_what_cannot_be_picked_is_one_line(picked, capsys, folder, tmp_path):
    name, other = others(folder)[0]
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def refused(words, name=name, *flags):
        status, out, err = picked(name, *flags)
        assert status == 1 and not out and len(err) == 1 and words in err[0], err

    refused("is no sound of ours", "clip.mp4")
    refused("is none of its candidates", "clip.foley.7.wav")
    refused("no finished output", name, "--out", tmp_path / "elsewhere")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    # what somebody edited
    video = folder / "clip.foley.mp4"
    video.write_bytes(b"edited")
    refused("clip.foley.mp4: was changed")
    assert video.read_bytes() == b"edited"
    assert picked(name, "--overwrite")[0] == 0 and media.probe(video).duration > 1.9
    with open(folder / name, "ab") as file:
        file.write(b"more")
    refused(f"{name}: was changed or deleted since")
    make_video(folder / "clip.mp4", 1)
    refused("is not the video that", other)
    # files that are no picks
    for content in ("[]", '{"a": 1}', "nothing", "[" * 10**5):
        (tmp_path / "wrong.json").write_text(content)
        status, _, err = run(capsys, "--pick", tmp_path / "wrong.json")
        assert status == 1 and len(err) == 1 and "the file that Save picks wrote" in err[0]
    status, _, err = run(capsys, "--pick", tmp_path / "none.json")
    assert status == 1 and len(err) == 1 and "No such file" in err[0]
