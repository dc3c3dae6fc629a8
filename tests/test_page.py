"""The pages to pick and to listen: what they hold, what they refer to, and what ratings say."""

import html.parser
import io
import json
import math
import os
import re
import shlex
import urllib.parse
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from clips import make_video
from main_job import run
from pages import NAME, outputs, write_page

import evaluate
import foley
from common import media, plots
from common.media import read_audio
from film import listen, page
from film.jobs import Job
from film.page import Page
from sample import Settings


class Reader(html.parser.HTMLParser):
    """Scripts by id, and every URL that an element loads."""

    def __init__(self, text):
        super().__init__()
        self.scripts = []
        self.loaded = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.loaded += [given[name] for name in ("src", "href") if name in given]
        if tag == "script":
            self.scripts.append([given.get("id"), ""])

    def handle_data(self, data):
        if self.scripts and self.lasttag == "script":
            self.scripts[-1][1] += data


def read(path):
    """-> the page's data, checked to be one script that nothing in it ends."""
    text = path.read_text()
    reader = Reader(text)
    assert [name for name, _ in reader.scripts] == ["data", None]
    assert not reader.loaded and not re.search(r"https?:|//\w+\.\w|@import", text)
    assert text.count("class Player") == 1 and "{{data}}" not in text
    assert text.count("\n") < 600
    assert text.rstrip().endswith("</html>")
    return json.loads(reader.scripts[0][1])


def target_of(url, folder):
    return folder / urllib.parse.unquote(url)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with one page: two inputs, and one that failed."""
    folder = tmp_path_factory.mktemp("page")
    failed = {"input": "x</script><b>.mp4", "error": "x</script><b>.mp4: no video {{player}}"}
    inputs = [outputs(folder), outputs(folder, "plain", candidates=1)]
    return write_page(folder, inputs, [failed])


def test_the_page_refers_to_files_that_are_there_whatever_their_names(made):
    first, second, failed = read(made)["inputs"]
    assert first["name"] == f"{NAME}.mp4"
    urls = [first["picture"]["url"], *(sound["url"] for sound in first["sounds"])]
    files = [target_of(url, made.parent) for url in urls]
    assert all(path.is_file() for path in files)
    assert [path.name for path in files] == [
        f"{NAME}.foley.mp4",
        *(f"{NAME}.foley.{k}.wav" for k in range(3)),
        f"{NAME}.mp4",
    ]
    # no character of a name has a meaning in a URL
    assert not any(re.search(r"[^\w./%~-]", url) for url in urls)
    assert [sound["name"] for sound in second["sounds"]] == ["foley", "original"]
    assert failed["error"].endswith("{{player}}") and "</script>" in failed["error"]


def test_it_shows_scores_hits_and_pictures(made):
    clip = read(made)["inputs"][0]
    assert [sound["score"] for sound in clip["sounds"]] == [-0.5, -0.1, -3.0, None]
    assert [sound["first"] for sound in clip["sounds"]] == [False, True, False, False]
    assert clip["hits"] == [[1.0, 0.9, "wood", False], [4.5, None, "glass", True]]
    assert clip["seconds"] == 6
    pictures = [clip["strip"], *(sound["spectrogram"] for sound in clip["sounds"])]
    kinds = [url.partition(";")[0] for url in pictures]
    assert kinds == ["data:image/jpeg", *["data:image/png"] * 4]
    assert clip["frames"] == 16 and clip["aspect"] == 1


def test_other_sounds_are_another_clip(tmp_path):
    """What was picked of the sounds before is not picked of those that replace them."""
    made = outputs(tmp_path, "a", candidates=1)
    before = read(write_page(tmp_path, [made]))["inputs"][0]["id"]
    assert read(write_page(tmp_path, [made]))["inputs"][0]["id"] == before
    media.write_wav(made[1]["wav"], 0.1 * torch.randn(96000))
    assert read(write_page(tmp_path, [made]))["inputs"][0]["id"] != before


def test_stems_are_heard_but_not_those_of_an_earlier_run(tmp_path):
    made = outputs(tmp_path, "a", candidates=1)
    for name in ("own", "mix"):
        media.write_wav(tmp_path / f"a.{name}.wav", torch.zeros(96000))
    sounds = read(write_page(tmp_path, [made]))["inputs"][0]["sounds"]
    named = [(sound["name"], sound["file"]) for sound in sounds]
    assert named == [("foley", "a.foley.wav"), ("mix", "a.mix.wav"), ("original", "a.own.wav")]
    for name in ("own", "mix"):
        os.utime(tmp_path / f"a.{name}.wav", (0, 0))
    sounds = read(write_page(tmp_path, [made]))["inputs"][0]["sounds"]
    assert [sound["file"] for sound in sounds] == ["a.foley.wav", "a.mp4"]


def test_a_page_of_kept_outputs_keeps_hits_scores_and_picks(tmp_path):
    made = source, line, target = outputs(tmp_path, "a")
    (before,) = read(write_page(tmp_path, [made]))["inputs"]
    kept = {"input": line["input"], "output": line["output"], "kept": True}
    assert read(write_page(tmp_path, [(source, kept, target)]))["inputs"] == [before]
    media.write_wav(f"{target}.wav", 0.1 * torch.randn(96000))
    for path in tmp_path.glob("a.foley.?.wav"):
        media.write_wav(path, 0.1 * torch.randn(96000))
    (after,) = read(write_page(tmp_path, [(source, kept, target)]))["inputs"]
    assert after["id"] != before["id"]


def test_an_output_that_was_kept_is_read_from_its_files(tmp_path):
    source, line, target = outputs(tmp_path, "a")
    kept = {"input": line["input"], "output": line["output"], "kept": True}
    Path(tmp_path / "a.onsets.txt").write_text(
        "2.000000\t2.000000\twood 0.5\n3.000000\t3.000000\tglass?\n"
    )
    args = SimpleNamespace(page=True, start=0.0, duration=None, json=True, out=None)
    shown = Page(args, [Job(source, target)])
    # the result of an input before is not this one's
    shown.add(kept, target, SimpleNamespace(source=Path("other.mp4"), hits=[]))
    assert shown.write()
    (clip,) = read(tmp_path / "index.html")["inputs"]
    assert [sound["name"] for sound in clip["sounds"]][:3] == [f"candidate {k}" for k in range(3)]
    assert clip["hits"] == [[2.0, 0.5, "wood", False], [3.0, None, "glass", True]]
    assert clip["seconds"] == pytest.approx(6, abs=0.11)


def test_a_page_of_an_earlier_version_is_carried_over(tmp_path):
    """Its hits are times and strengths, and it does not say where its picture starts."""
    made = source, line, target = outputs(tmp_path, "a", candidates=1)
    index = write_page(tmp_path, [made])
    (new,) = read(index)["inputs"]
    old = {name: new[name] for name in new if name not in ("start", "hits_file", "command")}
    old["hits"] = [[1.0, 0.9], [4.5, None]]
    index.write_bytes(page.fill("page.html", {"inputs": [old]}))
    kept = line | {"kept": True}
    (after,) = read(write_page(tmp_path, [(source, kept, target)]))["inputs"]
    assert after == new | {"hits": old["hits"]}
    # of sounds that were drawn anew it is replaced
    index.write_bytes(page.fill("page.html", {"inputs": [old]}))
    assert read(write_page(tmp_path, [made]))["inputs"] == [new]


def test_the_page_says_what_plays_the_hits_that_it_saves(made, tmp_path):
    shown = read(made)
    assert shown["materials"] == [name for name in foley.MATERIALS if name not in foley.OTHER]
    first, plain, _ = shown["inputs"]
    assert plain["hits_file"] == "plain.onsets.txt"
    words = shlex.split(first["command"])
    assert words == [
        *("python", "sample.py", first["input"]),
        *("--onsets", first["hits_file"], "--out", str(made.parent)),
    ]

    def command(source, out=None, start=0.0, duration=None):
        hits_file = page.download_name(Path(source).with_suffix(".foley"))
        return page.command_of(source, hits_file, out, page.Cut(start, duration))

    assert command("clip.mp4") == "python sample.py clip.mp4 --onsets clip.onsets.txt"
    assert command("a/clip.mp4", Path("new"), 3725.123456, 10.5) == (
        "python sample.py a/clip.mp4 --onsets clip.onsets.txt --out new --start 3725.123456 "
        "--duration 10.5"
    )
    # neither a flag, nor a name under which no browser saves a file
    assert command("-v.mp4") == "python sample.py ./-v.mp4 --onsets ./-v.onsets.txt"
    name = page.download_name(Path('.$HOME "a": 1\n?.foley'))
    assert name == "_$HOME _a__ 1__.onsets.txt"
    assert page.download_name(Path(" a .foley")) == "_a .onsets.txt"
    assert shlex.split(command("it's $(x).mp4"))[2:] == [
        *("it's $(x).mp4", "--onsets", "it's $(x).onsets.txt"),
    ]


def test_inputs_of_one_name_save_their_hits_under_names_of_their_own(tmp_path):
    """From different folders, without --out: the command of one must not play the other's hits."""
    made = [outputs(tmp_path / folder, "a", 2.0, candidates=1) for folder in "xyz"]
    args = SimpleNamespace(page=True, start=0.0, duration=None, json=True, out=None)
    shown = Page(args, [Job(source, target) for source, _, target in made])
    shown.add({"input": "no.mp4", "error": "no.mp4: no such file"}, None)
    for _, line, target in made:
        shown.add(line, target)
    assert shown.write()
    _, *inputs = read(tmp_path / "x" / "index.html")["inputs"]
    names = ["a.onsets.txt", "a.2.onsets.txt", "a.3.onsets.txt"]
    assert [one["hits_file"] for one in inputs] == names
    for one, name in zip(inputs, names, strict=True):
        assert shlex.split(one["command"])[2:] == [one["input"], "--onsets", name]


def test_hits_of_a_run_with_a_start_are_where_its_picture_has_them(tmp_path):
    source, line, target = outputs(tmp_path, "a", candidates=1)
    line["seconds"] = 4.0
    (clip,) = read(write_page(tmp_path, [(source, line, target)], start=2.0))["inputs"]
    assert clip["start"] == 2.0 and clip["hits"][1] == [2.5, None, "glass", True]
    assert shlex.split(clip["command"])[-2:] == ["--start", "2.0"]
    # a run that keeps or picks what is there says nothing of where that starts
    args = SimpleNamespace(page=True, start=0.0, duration=None, json=True, out=tmp_path)
    job = Job(source, target, line, record={"settings": {"start": 2.0, "duration": 4.0}})
    shown = Page(args, [job])
    shown.add(line | {"picked": "a.foley.wav"}, target)
    assert shown.write()
    (after,) = read(tmp_path / "index.html")["inputs"]
    assert after == clip | {"command": f"{clip['command']} --duration 4.0"}


def test_a_strip_shows_the_frames_in_order(tmp_path):
    """In the middle of each part, of a picture that goes white after its first half."""
    source = make_video(tmp_path / "a.mp4", 4, fps=10, flashes=[2 + 0.1 * k for k in range(20)])
    jpeg, count = page.strip(source, 0.0, 4.0, 1.0)
    with av.open(io.BytesIO(jpeg)) as file:
        image = next(file.decode(video=0)).to_ndarray(format="gray")
    grays = image.reshape(page.FRAME, count, page.FRAME).mean((0, 2))
    assert (grays[: count // 2] < 60).all() and (grays[count // 2 :] > 190).all()
    # more of a narrow picture, fewer of a wide one
    assert page.strip(source, 0.0, 4.0, 0.2)[1] == page.MOST_FRAMES
    assert page.strip(source, 0.0, 4.0, 16 / 9)[1] == 9


def test_a_long_sound_keeps_its_hits_in_a_bounded_picture(tmp_path, monkeypatch):
    wav = torch.zeros(16000 * 30)
    wav[16000 * 20 : 16000 * 20 + 64] = 0.9
    media.write_wav(tmp_path / "a.wav", wav)
    monkeypatch.setattr(page, "COLUMNS", 300)
    monkeypatch.setattr(page, "SPAN", 7)
    mel = page.spectrogram(tmp_path / "a.wav", 0.0, 30.0)
    assert mel.shape[0] == 128 and 250 <= mel.shape[1] <= 300
    loudest = int(mel.sum(0).argmax())
    assert loudest / mel.shape[1] == pytest.approx(2 / 3, abs=2 / mel.shape[1])


def test_a_mel_as_png_has_low_bands_below():
    mel = torch.zeros(128, 10)
    mel[0, 3] = 1
    with av.open(io.BytesIO(plots.mel_png(mel))) as file:
        image = next(file.decode(video=0)).to_ndarray(format="rgb24")
    assert image.shape == (128, 10, 3)
    assert tuple(image[127, 3]) == plots.DARK[-1] and tuple(image[0, 0]) == plots.DARK[0]


def test_a_page_of_somebody_else_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "index.html").write_text("<title>my site</title>")
    video = make_video(tmp_path / "a.mp4", 1)
    status, out, err = run(capsys, video, "--page")
    assert status == 2 and not out and len(err) == 1
    assert err[0].startswith("sample.py: --page: ") and "index.html" in err[0]
    assert (tmp_path / "index.html").read_text() == "<title>my site</title>"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "index.html"]
    # nor a folder of that name
    (tmp_path / "out" / "index.html").mkdir(parents=True)
    status, out, err = run(capsys, video, "--page", "--out", tmp_path / "out")
    assert status == 2 and not out and len(err) == 1 and "not of ours" in err[0]


# ---- blind listening ---------------------------------------------------------------------------


def write_test(folder, seed=0, clips=3):
    """A test of noises, each maker's at its own level. -> what the page holds, the key."""
    videos = [make_video(folder / "set" / f"{k}.mp4", 1.0 + k, fps=10) for k in range(clips)]
    levels = {"ours": 0.1, "ground_truth": 0.2, "wrong_video": 0.4}
    sounds = {
        maker: [(torch.full((16000,), level), {"comment": maker}) for _ in videos]
        for maker, level in levels.items()
    }
    listen.write_test(folder, videos, sounds, seed)
    return read(folder / "listen.html"), json.loads((folder / listen.KEY).read_text()), levels


def test_the_key_says_which_sound_is_whose_and_nothing_else_does(tmp_path):
    shown, key, levels = write_test(tmp_path)
    assert shown["test"] == key["test"] and len(shown["pairs"]) == len(key["pairs"]) == 6
    names = []
    for pair in shown["pairs"]:
        sides = key["pairs"][pair["id"]]
        picture = target_of(pair["picture"]["url"], tmp_path)
        assert media.probe(picture).duration == pytest.approx(pair["seconds"], abs=0.11)
        assert not read_audio(picture).any()
        assert pair["seconds"] == pytest.approx(1.0 + int(sides["clip"][0]))
        for side, sound in zip("ab", pair["sounds"], strict=True):
            path = target_of(sound["url"], tmp_path)
            wav = read_audio(path)
            assert wav[:16000].mean() == pytest.approx(levels[sides[side]], abs=1e-3)
            assert len(wav) == round(pair["seconds"] * 16000) and not wav[16000:].any()
            assert media.read_tags(path)["comment"] == sides[side]
            names.append(path.name)
    assert len(set(names)) == 12
    text = (tmp_path / "listen.html").read_text()
    assert not any(maker in text for maker in levels)
    # neither order nor sides follow a rule
    for seed in range(1, 4):
        other, other_key, _ = write_test(tmp_path / str(seed), seed)
        if [k["a"] for k in other_key["pairs"].values()] != [k["a"] for k in key["pairs"].values()]:
            break
    else:
        pytest.fail("the same sides for every seed")


def test_the_same_seed_gives_the_same_test(tmp_path):
    first, key, _ = write_test(tmp_path / "a", seed=7)
    second, same, _ = write_test(tmp_path / "b", seed=7)
    assert first == second and key == same


def test_a_test_is_not_written_over_another(tmp_path):
    write_test(tmp_path, clips=1)
    with pytest.raises(listen.RatingsError, match="give another --out"):
        listen.check_free(tmp_path)


PAIRS = {
    f"{clip}{other}": {"clip": clip, "a": "ours" if flip else other, "b": other if flip else "ours"}
    for clip, flip in (("x", True), ("y", False), ("z", True))
    for other in ("ground_truth", "wrong_video")
}


def ours(pair):
    return "a" if PAIRS[pair]["a"] == "ours" else "b"


def theirs(pair):
    return "b" if ours(pair) == "a" else "a"


def test_wilsons_interval():
    """Against values worked out by hand, and its own definition."""
    assert listen.wilson(1.0, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    assert listen.wilson(0.5, 20) == pytest.approx((0.29929, 0.70071), abs=1e-5)
    for share, count in ((0.2, 5), (0.75, 40)):
        for limit in listen.wilson(share, count):
            off = (share - limit) / math.sqrt(limit * (1 - limit) / count)
            assert abs(off) == pytest.approx(listen.NORMAL)


def test_preference_counts_clips_not_answers():
    """Ours wins x for both raters, y for one of them, and is as good in z, which one rated."""
    first = {
        "xground_truth": ours("xground_truth"),
        "yground_truth": ours("yground_truth"),
        "zground_truth": "same",
    }
    second = {"xground_truth": ours("xground_truth"), "yground_truth": theirs("yground_truth")}
    scores = listen.tally(PAIRS, {"p": first, "q": second})
    assert list(scores) == ["ground_truth"]  # what nobody rated has no row
    score = scores["ground_truth"]
    assert score["share"] == pytest.approx((1 + 0.5 + 0.5) / 3) and score["clips"] == 3
    assert score["interval"] == listen.wilson(score["share"], 3)
    assert score["answers"] == {"ours": 3, "same": 1, "other": 1}
    assert score["raters"] == pytest.approx({"p": 2.5 / 3, "q": 0.5})
    lines = listen.report(scores).splitlines()
    assert lines[1].split()[:5] == ["ground_truth", "0.667", "0.208", "to", "0.939"]
    assert lines[2].split() == ["p", "0.833"] and lines[3].split() == ["q", "0.500"]
    assert listen.report({}) == "no answers"


def test_ratings_on_the_command_line(tmp_path, capsys):
    (tmp_path / listen.KEY).write_text(json.dumps({"test": "t", "pairs": PAIRS}))
    answers = {pair: ours(pair) for pair in PAIRS if "wrong" in pair}

    def rated(name, **changes):
        path = tmp_path / name
        content = {"test": "t", "rater": "p", "answers": answers} | changes
        path.write_text(json.dumps(content))
        return str(path)

    evaluate.main(["--out", str(tmp_path), "--ratings", rated("1.json")])
    assert capsys.readouterr().out.splitlines()[1].startswith("wrong_video     1.000")
    (tmp_path / "bad.json").write_text("[")
    for files, word in (
        ([rated("1.json"), rated("2.json")], "same rater"),
        ([rated("3.json", test="u")], "another test"),
        ([rated("4.json", answers={"xground_truth": "c"})], "xground_truth"),
        ([rated("5.json", answers={"nobody": "a"})], "nobody"),
        ([rated("6.json", answers={"xground_truth": ["a"]})], "xground_truth"),
        ([rated("7.json", answers=[])], "no ratings"),
        ([str(tmp_path / "bad.json")], "bad.json"),
        ([str(tmp_path / "none.json")], "none.json"),
    ):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(["--out", str(tmp_path), "--ratings", *files])
        message = str(stopped.value)
        assert message.startswith("evaluate.py: ") and word in message and "\n" not in message
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--out", str(tmp_path / "else"), "--ratings", rated("1.json")])
    assert "listen-key.json: is not there" in str(stopped.value)


def test_flags_that_do_not_go_together(tmp_path, capsys):
    for flags in (
        [],
        ["--ratings", "a.json", "--page"],
        ["--data", "d", "--against", "e"],
        ["--data", "d", "--page", "--ablate", "cfg"],
        ["--data", "d", "--page", "--weights", "mini", "e"],
    ):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(flags)
        message = capsys.readouterr().err
        assert stopped.value.code == 2 and message.startswith("evaluate.py: --")
        assert message.count("\n") == 1


def test_generated_sounds_of_a_test_are_marked(tmp_path, monkeypatch):
    """And those made elsewhere keep the tag that they have."""
    videos = [make_video(tmp_path / "set" / f"{k}.mp4", 1.0, sound=np.zeros(16000)) for k in (0, 1)]
    wavs = [torch.full((16000,), 0.1), torch.full((16000,), 0.2)]
    monkeypatch.setattr(evaluate, "add_watermark", lambda wav: -wav)
    other = tmp_path / "other"
    for video in videos:
        path = other / f"{video.stem}.wav"
        other.mkdir(exist_ok=True)
        media.write_wav(path, torch.full((16000,), 0.4), {"comment": "another model"})
    args = SimpleNamespace(
        **(asdict(Settings()) | {"seed": 5}),
        weights=["mini"],
        samples=None,
        against=other,
        out=tmp_path,
        device="cpu",
    )
    evaluate.write_listening(videos, wavs, [1, 0], args)
    key = json.loads((tmp_path / listen.KEY).read_text())["pairs"]
    expected = {
        ("ours", 0): (-0.1, "mini, seed 5"),
        ("ours", 1): (-0.2, "mini, seed 6"),
        ("wrong_video", 0): (-0.2, "mini, seed 6"),
        ("wrong_video", 1): (-0.1, "mini, seed 5"),
        ("against", 0): (0.4, "another model"),
        ("against", 1): (0.4, "another model"),
    }
    heard = {}
    for pair in read(tmp_path / "listen.html")["pairs"]:
        sides = key[pair["id"]]
        for side, sound in zip("ab", pair["sounds"], strict=True):
            path = target_of(sound["url"], tmp_path)
            tag = media.read_tags(path).get("comment")
            heard[sides[side], int(sides["clip"][0])] = (float(read_audio(path).mean()), tag)
    assert heard["ground_truth", 0][1] is None
    for which, (level, tag) in expected.items():
        assert heard[which][0] == pytest.approx(level, abs=1e-3) and tag in heard[which][1]
