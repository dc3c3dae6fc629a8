"""Whose the clips are: the CSV of licenses, the sets, the weights' header, the model card."""

import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from clips import clicks, make, steady
from safetensors.torch import save_file

import data
import foley
import vae
from common import audio, checkpoints, model_card, rights
from common.checkpoints import Checkpoint
from common.rights import Rights, RightsError

ROOT = Path(__file__).parent.parent
HEADER = "file,source,licence,consent,attribution\n"


# ---- the CSV -----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("delimiter", ",;\t")
def test_a_table_of_any_program_is_read(tmp_path, encoding, delimiter):
    """Names of columns in any case and order, in American spelling; empty cells at the end."""
    lines = [
        ["Consent", "File", "License", "Source", "remarks"],
        ["yes", "Tür.mp4", "CC BY 4.0", "https://x.org/1", "", "", ""],
        [],
        ["n/a", "b.mp4", " - "],
        ["no", "c.mp4", "CC0", "two\n lines"],
    ]
    cells = [[f'"{cell}"' if "\n" in cell else cell for cell in line] for line in lines]
    text = "\r\n".join(delimiter.join(line) for line in cells)
    path = tmp_path / "licences.csv"
    path.write_bytes(text.encode(encoding))
    rows = rights.read_rows(path)
    assert [row.file for row in rows] == ["Tür.mp4", "b.mp4", "c.mp4"]
    assert rows[0].rights == Rights("https://x.org/1", "CC BY 4.0", "yes", "")
    assert rows[1].rights == rights.UNKNOWN
    assert rows[2].rights == Rights("two lines", "CC0", "no") and rows[2].rights.refused
    assert not rows[0].rights.refused


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "its first line has no column file, source, licence, consent"),
        ("a.mp4,x,CC0,yes\n", "its first line has no column file"),
        ("file,source,consent\na.mp4,x,yes\n", "has no column licence; begin it with file,"),
        (HEADER + "a.mp4,x,CC0,yes,A,B\n", "line 2 has 6 cells, the first line 5; put quotes"),
        (HEADER + "\n,x,CC0,yes\n", "line 3 names no file"),
        (HEADER + f"a.mp4,{'x' * 200_000},CC0\n", "is not of a CSV"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path, content, words):
    path = tmp_path / "licences.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RightsError) as caught:
        rights.read_rows(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and words in message and "\n" not in message


def rows_of(*files):
    return [rights.Row(2 + k, file, Rights(license=f"L{k}")) for k, file in enumerate(files)]


def test_a_row_is_of_the_video_that_it_names():
    """By path, by name, without the suffix; as Windows and as macOS write names."""
    decomposed = unicodedata.normalize("NFD", "ö.mp4")
    files = {name: name for name in ("a.mp4", "sub/a.mp4", "sub/b.mkv", "sub/c.d.mp4", decomposed)}
    rows = rows_of("a.mp4", "sub\\a.mp4", "b", "./sub/c.d", " ö.mp4", "z.mp4")
    assigned, unknown = rights.assign(rows, files, "t.csv")
    assert {clip: known.license for clip, known in assigned.items()} == {
        "a.mp4": "L0",
        "sub/a.mp4": "L1",
        "sub/b.mkv": "L2",
        "sub/c.d.mp4": "L3",
        decomposed: "L4",
    }
    assert unknown == ["z.mp4"]


def test_a_row_is_of_all_clips_of_its_video():
    files = {"v_000010.mp4": "v.mp4", "v_000020.mp4": "v.mp4"}
    for name in ("v.mp4", "v"):
        assigned, _ = rights.assign(rows_of(name), files, "t.csv")
        assert assigned.keys() == files.keys()
    assigned, _ = rights.assign(rows_of("v_000020"), files, "t.csv")
    assert [*assigned] == ["v_000020.mp4"]


def test_rows_that_are_not_certain_are_refused():
    files = {"x/a.mp4": "x/a.mp4", "y/a.mp4": "y/a.mp4"}
    with pytest.raises(RightsError, match=r"t.csv: line 2: a.mp4 may be x/a.mp4 or y/a.mp4; give"):
        rights.assign(rows_of("a.mp4"), files, "t.csv")
    with pytest.raises(RightsError, match=r"lines 2 and 3 are both of x/a.mp4 and differ"):
        rights.assign(rows_of("x/a.mp4", "x/a"), files, "t.csv")
    same = [rights.Row(line, "x/a.mp4", Rights("s")) for line in (2, 3)]
    assert rights.assign(same, files, "t.csv") == ({"x/a.mp4": Rights("s")}, [])


def test_a_sets_table_keeps_every_name_and_reads_as_a_csv(tmp_path):
    strange = ["a, b.mp4", 'q"t.mp4', "  two  spaces .mp4", "line\nbreak.mp4", "byte\udcff.mp4"]
    known = {name: Rights("s", "CC0", "yes", name.strip()[:1]) for name in strange}
    rights.write_table(tmp_path / "licences.csv", known)
    assert rights.read_table(tmp_path / "licences.csv") == known
    rows = rights.read_rows(tmp_path / "licences.csv")
    files = {name: name for name in strange}
    assert rights.assign(rows, files, "t.csv") == (known, [])
    assert rights.read_table(tmp_path / "none.csv") == {}


def test_the_summary_counts_clips():
    clips = [Rights("https://freesound.org/s/1", "CC0", "yes"), Rights("", "CC0", "no", "Ann")]
    clips += [Rights("http://freesound.org:80/s/2", "CC BY 4.0"), rights.UNKNOWN]
    assert rights.summarize(clips) == {
        "clips": 4,
        "sources": {"freesound.org": 2},
        "other_sources": 0,
        "licenses": {"CC0": 2, "CC BY 4.0": 1},
        "other_licenses": 0,
        "without_source": 0.5,
        "without_license": 0.25,
        "consent": 2,
        "attribution": 1,
    }
    many = rights.summarize([Rights(f"s{k:02d}", "x" * 999) for k in range(15)])
    assert [*many["sources"]] == [f"s{k:02d}" for k in range(10)] and many["other_sources"] == 5
    assert [*many["licenses"]] == ["x" * 200]


# ---- sets --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    for name in ("a.mp4", "b.mp4", "c.mp4", "d.mp4"):
        times = steady(25, 1.0)
        make(folder / name, times, [30] * 25, wav=clicks(1.0, [0.3]), size=(32, 32))
    return folder


def table(path, *rows):
    path.write_text(HEADER + "".join(f"{row}\n" for row in rows))
    return path


def command(capsys, *args):
    """`python data.py ...` in this process. -> how many faults, stdout, lines of stderr"""
    capsys.readouterr()
    arguments = data.parse_arguments([str(arg) for arg in args])
    faults = arguments.run(arguments)
    out, err = capsys.readouterr()
    return faults, out, [line for line in err.split("\n") if line and "prepare:" not in line]


def prepare(raw, out, licenses=None, require=False):
    return data.prepare(raw, out, 15.625, 32, licenses=licenses, require_license=require)


def test_the_command_keeps_them_and_leaves_out_the_rest(raw, tmp_path, capsys):
    path = table(
        tmp_path / "t.csv", "a.mp4,https://x.org,CC0,yes", "b,me,?,yes", "c,me,MIT,no", "e.mp4,x,,"
    )
    out = tmp_path / "set"
    flags = ("--size", 32, "--workers", 1, "--licence-csv", path, "--require-license")
    faults, shown, said = command(capsys, "prepare", raw, out, *flags)
    assert faults == 3
    assert shown == f"{out}: 1 clips, 1 of them new, 1 with a license\n"
    assert said[0] == f"{path}: 1 of its files are not among the videos: e.mp4"
    assert "left out 3 files (1 consent refused, 2 no license)" in said[1] and len(said) == 2
    assert data.Set(out).left_out() == [
        ("b.mp4", "no license"),
        ("c.mp4", "consent refused"),
        ("d.mp4", "no license"),
    ]
    assert data.Set(out).rights == {"a.mp4": Rights("https://x.org", "CC0", "yes")}


def test_a_set_takes_more_rows_and_forgets_none(raw, tmp_path):
    """Without a CSV what is known stays; a new one replaces what it names; videos may be gone."""
    out = tmp_path / "set"
    assert prepare(raw, out).licensed == 0 and not (out / rights.TABLE).exists()
    assert prepare(raw, out, table(tmp_path / "1.csv", "a,me,CC0,yes", "b,me,,")).licensed == 1
    shard = (out / "shard-00000.safetensors").read_bytes()
    assert prepare(raw, out).licensed == 1
    fewer = tmp_path / "raw"
    fewer.mkdir()
    shutil.copy(raw / "d.mp4", fewer)
    report = prepare(fewer, out, table(tmp_path / "2.csv", "b,me,CC BY 4.0,yes,Ann", "z,,,"))
    assert (report.clips, report.new, report.licensed, report.unknown) == (4, 0, 2, ["z"])
    known = data.Set(out).rights
    assert known == {
        "a.mp4": Rights("me", "CC0", "yes"),
        "b.mp4": Rights("me", "CC BY 4.0", "yes", "Ann"),
    }
    assert (out / "shard-00000.safetensors").read_bytes() == shard
    assert not list(data.check(out))
    # a set with clips that nobody may use cannot become one without them
    with pytest.raises(data.MediaError, match=r"c.mp4 is in this set already \(no license\); name"):
        prepare(raw, out, require=True)


def test_a_kill_parts_no_clip_from_its_rights(raw, tmp_path, monkeypatch):
    path = table(tmp_path / "t.csv", *(f"{name},me,CC0,yes" for name in "abcd"))
    encode = data.encode_all

    def interrupted(*args):
        for k, item in enumerate(encode(*args)):
            if k == 2:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(data, "encode_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(raw, tmp_path / "set", path)
    monkeypatch.undo()
    report = prepare(raw, tmp_path / "set")
    assert (report.clips, report.new, report.licensed) == (4, 2, 4)
    prepare(raw, tmp_path / "whole", path)
    for name in ("set.json", rights.TABLE, "shard-00000.safetensors"):
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_check_counts_them_and_sees_a_change(raw, tmp_path, capsys):
    out = tmp_path / "set"
    prepare(raw, out, table(tmp_path / "t.csv", "a,me,CC0,yes"))
    counted = f"{out}: 1 of its clips have a license\n{out}: 4 clips, shards: 1, faults: 0\n"
    assert command(capsys, "check", out) == (0, counted, [])
    (out / rights.TABLE).write_text((out / rights.TABLE).read_text().replace("CC0", "MIT"))
    faults, shown, _ = command(capsys, "check", out)
    assert faults == 1 and "licences.csv: it has changed since" in shown
    (out / rights.TABLE).write_text("nonsense\n")
    with pytest.raises(data.MediaError, match=r"licences.csv: damaged \(its first line has no"):
        prepare(raw, out)
    (out / rights.TABLE).unlink()
    (fault,) = data.check(out)
    assert fault.endswith("licences.csv: missing; prepare the set again with its CSV")


def test_clips_of_foley_say_theirs_themselves(raw, tmp_path):
    videos = tmp_path / "videos"
    foley.make_set(videos, 1, seed=7, size=32, fps=8, duration=2.0)
    shutil.copy(raw / "a.mp4", videos)
    (videos / "a.json").write_text('{"onsets": []}')  # somebody's own labels
    prepare(videos, tmp_path / "set")
    made = Rights("foley.py --seed 7", "MIT", "not needed")
    assert data.Set(tmp_path / "set").rights == {"00000.mp4": made}
    # a row of the CSV counts before that
    prepare(videos, tmp_path / "set", table(tmp_path / "t.csv", "00000,me,CC0,yes"))
    assert data.Set(tmp_path / "set").rights == {"00000.mp4": Rights("me", "CC0", "yes")}


# ---- weights -----------------------------------------------------------------------------------

METADATA = {"columns": ["features", "sound"], "fps": 15.625, "width": 4, "network": "x"}


@pytest.fixture
def sounds(tmp_path):
    """A set of three clips with sound, of which one has a license."""
    folder = tmp_path / "sounds"
    rng = np.random.default_rng(0)
    known = {"0": Rights("https://x.org/0", "CC0", "yes"), "1": Rights("me")}
    with data.Writer(folder, METADATA, known) as writer:
        for k in range(3):
            columns = {
                "features": np.zeros((128, 4), np.float16),
                "sound": rng.integers(-9000, 9000, audio.WINDOW).astype(np.int16),
            }
            writer.add(str(k), "", "train", columns)
        writer.finish(needed=())
    return folder


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(data set, folder, ...) -> the header of the weights that two steps of vae.py leave."""
    monkeypatch.setattr(vae, "PRESETS", {**vae.PRESETS, "mini": tiny.VAE})
    tiny.install_no_extras(monkeypatch.setattr)

    def run(folder, out, **flags):
        typed = tiny.arguments("vae", tmp_path / out, batch=2, **{"steps": 1, **flags})
        vae.main(["--data", str(folder), *typed[2:]])
        return Checkpoint(tmp_path / out / "last.safetensors").metadata

    return run


def test_the_header_says_whose_the_clips_were(sounds, run, tmp_path):
    header = run(sounds, "first")
    known = header["data"]
    assert (known["clips"], known["sources"], known["licenses"]) == (
        3,
        {"me": 1, "x.org": 1},
        {"CC0": 1},
    )
    assert known["without_license"] == pytest.approx(2 / 3)
    assert known["seconds"] == pytest.approx(3 * 8.192, abs=0.1) and known["earlier"] == {}
    assert len(header["date"]) == 10
    # another run that starts from these weights, on data of which nothing is known
    (sounds / rights.TABLE).unlink()
    later = run(sounds, "second", init=tmp_path / "first" / "last.safetensors")["data"]
    assert later["without_license"] == 1 and later["earlier"] == {"init": known}
    # resumed on the same data, then on other
    assert run(sounds, "second", steps=2, resume=True)["data"] == later
    rights.write_table(sounds / rights.TABLE, {"2": Rights("me", "MIT")})
    last = run(sounds, "second", steps=3, resume=True)["data"]
    assert last["licenses"] == {"MIT": 1} and last["earlier"]["init"] == known
    assert last["earlier"]["until step 2"]["without_license"] == 1


def test_a_run_of_the_release_before_goes_on(sounds, run, tmp_path):
    run(sounds, "run")
    path = tmp_path / "run" / "last.state.pt"
    state = torch.load(path, weights_only=True)
    del state["data"]
    torch.save(state, path)
    assert run(sounds, "run", steps=2, resume=True)["data"]["clips"] == 3


def test_the_summary_opens_no_shard_where_nothing_is_known(sounds, monkeypatch):
    (sounds / rights.TABLE).unlink()
    clips = data.Sounds(sounds, audio.WINDOW)
    monkeypatch.setattr(data, "open_shard", None)
    assert clips.data_summary()["without_license"] == 1


# ---- the card ----------------------------------------------------------------------------------


def card(path):
    return model_card.render(Checkpoint(path))


def test_the_card_of_a_run(sounds, run, tmp_path, capsys):
    run(sounds, "run")
    capsys.readouterr()
    path = tmp_path / "run" / "last.safetensors"
    checkpoints.main(["show", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# Model card: last.safetensors" and "`vae.AutoencoderKL`" in lines[2]
    for heading in ("Configuration", "Training data", "Metrics", "License of the weights"):
        assert lines.count(f"## {heading}") == 1
    assert "- multipliers: 1 1 1 1" in lines and "- steps: 1" in lines
    assert "- started from: random weights" in lines
    assert "3 clips, 25 seconds of sound." in lines
    assert "| CC0 | 1 |" in lines and "| x.org | 1 |" in lines
    assert any(line.startswith("Without a license: 67 %. With a word on con") for line in lines)


@pytest.mark.parametrize(
    "clips, seconds, words",
    [(1, 8.19, "1 clip, 8 seconds of"), (9, 7200, "9 clips, 2.00 hours of"), (9, None, "9 clips.")],
)
def test_the_card_says_how_much_in_words_that_fit(clips, seconds, words):
    text = model_card.describe({"clips": clips, "seconds": seconds})
    assert text.startswith(words)


def test_the_card_names_the_data_of_earlier_weights(tmp_path):
    known = rights.summarize([Rights("https://x.org/1", "CC0"), Rights("me", "MIT")])
    last = {**rights.summarize([rights.UNKNOWN]), "earlier": {"init": known, "vae": None}}
    header = {"data": json.dumps(last), "started_from": json.dumps({"init": "ab12"})}
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", header)
    lines = card(tmp_path / "x.safetensors").splitlines()
    assert "- started from: init (SHA-256 ab12)" in lines
    first = lines.index("Before that, the weights of --init:")
    assert lines.index("No license is recorded for any of them.") < first
    assert first < lines.index("| CC0 | 1 |") < lines.index("| x.org | 1 |")
    assert lines[lines.index("Before that, the weights of --vae:") + 2] == "Not recorded."


def test_the_card_of_the_shipped_weights():
    names = {
        "cavp": "CAVP",
        "ldm": "LDM",
        "align": "Alignment",
        "judge": "Judge",
        "finder": "Finder",
    }
    for name, cls in names.items():
        shown = card(ROOT / "weights" / "mini" / f"{name}.safetensors")
        assert f".{cls}`" in shown.splitlines()[2] and "- code (commit): " in shown
        # newer ones have the set's own summary
        has_summary = "| foley.py --seed" in shown
        assert has_summary or "The note above names a set: " in shown and "foley.py" in shown


def test_the_card_of_a_file_that_says_nothing(tmp_path):
    """As the published ones: a Lightning checkpoint."""
    state = {"video_project_head.weight": torch.zeros(2, 3)}
    torch.save({"state_dict": state, "epoch": 66, "global_step": 9}, tmp_path / "cavp.ckpt")
    shown = card(tmp_path / "cavp.ckpt")
    assert "`cavp.CAVP`" in shown and "- epoch: 66" in shown and "- steps: 9" in shown
    assert shown.count("ot recorded") >= 8
    save_file(state, tmp_path / "bare.safetensors", {"format": "pt", "note": "{"})
    assert "- code (commit): not recorded" in card(tmp_path / "bare.safetensors")


HOSTILE = [
    "|<b>\x1b[31m\n# x",
    1e999,
    -1,
    None,
    True,
    [],
    {},
    [[["a"]]],
    {"a": {"b": []}},
    "9" * 999,
]


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_a_header_may_say_anything(tmp_path, value):
    """One line each, nothing for a terminal, no heading of its own."""
    data_of = dict.fromkeys(rights.summarize([]), value) | {"earlier": {"x": value}}
    headers = [dict.fromkeys(("config", *model_card.KEYS), value)]
    headers.append(
        {"data": {**data_of, "earlier": {"|\n# x": data_of}}, "metrics": {"val_\n": value}}
    )
    for header in headers:
        header = {key: json.dumps(content) for key, content in header.items()}
        save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", header)
        shown = card(tmp_path / "x.safetensors")
        headings = [line for line in shown.splitlines() if line.startswith("#")]
        assert len(headings) == 7 and "\x1b" not in shown and "<b>" not in shown.replace("\\<", "")
        assert max(map(len, shown.splitlines())) < 10_000


def test_weights_that_began_with_weights_without_end(tmp_path):
    known = rights.summarize([Rights("me", "CC0")])
    for _ in range(50):
        known = {**rights.summarize([Rights("me", "CC0")]), "earlier": {"init": known}}
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", {"data": json.dumps(known)})
    assert card(tmp_path / "x.safetensors").count("Before that") == model_card.DEEPEST


def test_converted_weights_keep_what_they_say(sounds, run, tmp_path):
    header = run(sounds, "first")
    foreign = {"path": "1", "dtype": "2", "format": "pt"}
    save_file({"x": torch.zeros(2, 2)}, tmp_path / "first" / "foreign.safetensors", foreign)
    checkpoints.convert(tmp_path / "first", tmp_path / "half", torch.bfloat16)
    assert Checkpoint(tmp_path / "half" / "last.safetensors").metadata == header
    assert Checkpoint(tmp_path / "half" / "foreign.safetensors").metadata == {"config": None}


def test_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"no weights")
    for name in ("none.ckpt", "x.safetensors"):
        with pytest.raises(SystemExit) as caught:
            checkpoints.main(["show", str(tmp_path / name)])
        assert caught.value.code.startswith(f"python -m common.checkpoints: {tmp_path / name}: ")
        assert "\n" not in caught.value.code
    for typed in (["show"], ["shaw", "x"]):
        with pytest.raises(SystemExit) as caught:
            checkpoints.main(typed)
        assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1
