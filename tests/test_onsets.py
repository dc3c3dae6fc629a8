"""common/onsets.py: hits that a person gives, in every form that is taken, and every mistake."""

import numpy as np
import pytest

from common.files import FileError, UserError
from common.onsets import Hit, read_hits, write_hits

MATERIALS = ("wood", "metal", "water")
BOTH = [Hit(0.512, 0.8, "wood"), Hit(1.25)]


@pytest.fixture
def read(tmp_path):
    """-> a function that writes text or bytes to a file and reads its hits."""

    def write_and_read(content):
        path = tmp_path / "hits.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_hits(path, MATERIALS)

    return write_and_read


@pytest.mark.parametrize(
    "text",
    [
        "time,strength,material\n0.512,0.8,wood\n1.25,,\n",
        "Material, Time ,STRENGTH\nwood,0.512,0.8\n,1.25,\n",
        "0.512,0.8,wood\n1.25\n",
        "1.25,,\n\n 0.512 , .8 , wood \n,,\n",
        '"0.512","8e-1","wood"\n+1.25,\n',
    ],
)
def test_csv(read, text):
    """With a header and without, in any order of columns and of times, cells left empty or out."""
    assert read(text) == BOTH
    assert read("\ufeff" + text) == BOTH
    assert read(text.replace("\n", "\r\n")) == BOTH
    assert read(text.rstrip("\n")) == BOTH


def test_csv_with_fewer_columns(read):
    assert read("time\n2\n1\n") == [Hit(1.0), Hit(2.0)]
    assert read("time,material\n1,metal\n") == [Hit(1.0, None, "metal")]
    assert read("strength,time\n0.5,1\n") == [Hit(1.0, 0.5)]
    assert read("3\n0\n") == [Hit(0.0), Hit(3.0)]


@pytest.mark.parametrize(
    "text",
    [
        "0.512000\t0.512000\twood 0.8\n1.250000\t1.250000\t\n",
        "0.512000\t0.600000\t0.8 wood\n1.250000\t1.250000\n",
        "0,512000\t0,512000\twood 0,8\n1,250000\t1,250000\t\n",
        "0.512\t0.512\twood  0.8\n\\\t100.0\t8000.0\n\n1.25\t1.25\t\n\\\t-1\t-1\n",
        "1.25\t1.25\t\n0.512\t0.512\t 0.8 wood \n",
    ],
)
def test_label_tracks(read, text):
    """Points and stretches, decimal commas, lines of selected frequencies."""
    assert read(text) == BOTH
    assert read("\ufeff" + text.replace("\n", "\r\n")) == BOTH


def test_labels_with_one_word(read):
    assert read("1\t1\tmetal\n2\t2\t0.25\n") == [Hit(1.0, None, "metal"), Hit(2.0, 0.25)]


@pytest.mark.parametrize("text", ["", "\n", "\ufeff", "time\n", "time,strength,material\r\n"])
def test_no_hits_is_a_wish(read, text):
    assert read(text) == []


MISTAKES = {
    # CSV
    "soon,0.5,wood": (1, "'soon' is not a number", "in seconds"),
    "time\n1\n\nsoon": (4, "'soon' is not a number"),
    "1_000": (1, "not a number"),
    "nan": (1, "not a number"),
    "inf": (1, "not a number"),
    "1e999": (1, "no time in the clip"),
    "-0.5": (1, "no time in the clip", "from its first picture"),
    ",0.5,wood": (1, "'' is not a number"),
    "strength,time\n0.5": (2, "'' is not a number"),
    "1,0.5,cheese": (1, "'cheese' is not known", "give one of wood, metal, water"),
    "1,0": (1, "strength '0'", "above 0, up to 1"),
    "1,1.01": (1, "strength '1.01'"),
    "1,-0.1": (1, "strength '-0.1'"),
    "1,nan": (1, "strength 'nan'"),
    "1,0.5,wood,loud": (1, "4 cells"),
    "time,material\n1,wood,2": (2, "3 cells", "time,material"),
    "time,loudness": (1, "not known"),
    "time,time": (1, "twice"),
    "onset,material": (1, "'onset' is not a number"),
    '1,"0.5': (1, "not a line of CSV"),
    "1;0.5;wood": (1, "not a number"),
    '{"onsets": []}': (1, "not a number"),
    "x" * 200_000: (1,),
    # label tracks
    "time\tend\ttext": (1, "'end' is not a number"),
    "1\t1\twood\nsoon\t1\twood": (2, "'soon' is not a number"),
    "1\tlater\twood": (1, "'later' is not a number"),
    "-1\t1\t": (1, "no time in the clip"),
    "1\t1\t2": (1, "strength '2'"),
    "1\t1\t0,0": (1, "strength '0.0'"),
    "1\t1\tcheese 0.5": (1, "'cheese' is not known"),
    "1\t1\twood metal": (1, "second material 'metal'"),
    "1\t1\t0.5 0.6": (1, "second strength '0.6'"),
    "1\t1\twood\t0.5": (1, "not a label", "a tab between"),
    "1\t1\n2": (2, "not a label"),
    "\\\t100\t8000\n1\t1\t": (1, "not a number"),
}


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: repr(text[:20]))
def test_a_mistake_is_one_line_with_the_remedy(read, tmp_path, text):
    with pytest.raises(UserError) as caught:
        read(text)
    message = str(caught.value)
    line, *words = MISTAKES[text]
    assert message.startswith(f"{tmp_path / 'hits.txt'}: line {line}: ")
    assert "\n" not in message and "; give" in message and len(message) < 300
    assert all(word in message for word in words), message


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\xff", b"1\0\n", "1\n".encode("utf-16")])
def test_what_is_no_text_is_one_line(read, content):
    with pytest.raises(UserError, match=r"hits\.txt: not a text file; give .* in UTF-8$"):
        read(content)


def test_what_is_not_there_is_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(UserError, match=r": cannot be read \(.*\); give a CSV file"):
            read_hits(path, MATERIALS)


def test_what_is_written_is_read(tmp_path):
    """Strengths exactly, times up to half a microsecond; and Audacity's own form."""
    rng = np.random.default_rng(0)
    hits = [Hit(0.0), Hit(21600.0, 1.0, "water"), Hit(1.5, 1e-7), Hit(2.0, None, "metal")]
    for time, strength in zip(rng.uniform(0, 600, 50), rng.uniform(0.001, 1, 50), strict=True):
        hits.append(Hit(time, strength, "wood"))
    path = tmp_path / "new" / "hits.txt"
    write_hits(path, hits)
    hits.sort(key=lambda hit: hit.time)
    for hit, again in zip(hits, read_hits(path, MATERIALS), strict=True):
        assert again[1:] == hit[1:] and abs(again.time - hit.time) <= 0.51e-6
    write_hits(path, BOTH)
    assert path.read_text() == "0.512000\t0.512000\twood 0.8\n1.250000\t1.250000\t\n"
    write_hits(path, [])
    assert read_hits(path, MATERIALS) == []


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="file"):
        write_hits(tmp_path / "file" / "hits.txt", BOTH)


def test_a_label_ends_after_it_starts_and_words_may_be_capitals(tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("0.5\t0.5\tWood, 0.8\n1.0\t1.2\t0.3 METAL\n")
    assert read_hits(labels, ("wood", "metal")) == [Hit(0.5, 0.8, "wood"), Hit(1.0, 0.3, "metal")]
    # a table of time, strength and material with tabs is no label track
    labels.write_text("0.5\t0.3\twood\n")
    with pytest.raises(UserError, match="line 1: ends before it starts"):
        read_hits(labels, ("wood", "metal"))


def test_guesses_are_read_where_they_are_wanted(tmp_path):
    """To be written again as they were; of materials that are not known nothing is."""
    hits = [Hit(0.5, 0.8, "wood", is_guess=True), Hit(1.0, None, "metal", is_guess=True), *BOTH[1:]]
    path = tmp_path / "hits.txt"
    write_hits(path, hits)
    assert read_hits(path, MATERIALS, with_guesses=True) == hits
    assert read_hits(path, MATERIALS) == [Hit(0.5, 0.8), Hit(1.0), Hit(1.25)]
    assert read_hits(path, ("metal",), with_guesses=True)[0] == Hit(0.5, 0.8)
