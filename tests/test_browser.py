"""The pages in a real browser: they play, switch in place, rate and save. Skipped without Chromium.

`python -m pytest -m optional`, as root on Debian, installs it (tests/browser.py).
"""

import json
import shlex

import browser
import clips
import numpy as np
import pytest
import torch
from pages import HITS, NAME, outputs, write_page

import foley
from common.onsets import Hit, read_hits, write_hits
from film import listen

pytestmark = pytest.mark.optional
SECONDS = 20.0
# of picture and sound, seconds; the page itself corrects more than 0.02
TOGETHER = "Math.abs(player.time - (player.video.currentTime - player.video.offset)) < 0.1"


@pytest.fixture(scope="module")
def chromium(request, tmp_path_factory):
    browser.have_chromium(may_install=request.config.getoption("-m") == "optional")
    session = browser.Browser(tmp_path_factory.mktemp("browser"))
    yield session
    session.close()


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A page of three inputs: with candidates; with one sound; of a codec that no browser has."""
    folder = tmp_path_factory.mktemp("page")
    made = [
        outputs(folder, seconds=SECONDS),
        outputs(folder, "plain", candidates=1),
        outputs(folder, "old", candidates=1, codec="mpeg4"),
    ]
    return write_page(folder, made, [{"input": "x.mp4", "error": "x.mp4: no video"}])


@pytest.fixture
def page(chromium, index):
    chromium.open(index)
    chromium.run("localStorage.clear()")
    chromium.open(index)
    chromium.wait("player.audios.every(a => a.readyState > 1) && player.video.readyState > 1")
    return chromium


def test_it_plays_and_switches_sounds_without_losing_the_place(page):
    # it begins with the candidate that was ranked first
    assert page.run("[player.current, player.playing]") == [1, False]
    page.press(" ")
    page.wait("player.time > 0.4 && !player.video.paused && !player.audio.paused")
    for key, sound in (("1", 0), ("3", 2), ("4", 3)):
        before = page.run("player.time")
        page.press(key)
        # from the same place on, alone, and with the picture
        assert page.run("player.audio.currentTime") >= before
        page.wait(f"player.current === {sound} && player.audios[{sound}].currentTime > {before}")
        page.wait(f"player.audios.every((a, k) => a.paused === (k !== {sound}))")
        page.wait(TOGETHER)
        after = page.run("player.time")
        assert before < after < SECONDS
    assert page.run("player.video.muted") is True
    page.press(" ")
    page.wait("player.video.paused && player.audios.every(a => a.paused)")
    # in a pause too
    place = page.run("player.time")
    page.press("2")
    assert page.run("[player.current, player.playing]") == [1, False]
    assert abs(page.run("player.time") - place) < 0.1


def test_it_stops_at_the_end_and_begins_anew(page):
    page.run(f"player.seek({SECONDS} - 0.5)")
    page.press(" ")
    page.wait("!player.playing && player.video.paused && player.time > 19.9")
    page.press(" ")
    page.wait("player.playing && player.time > 0 && player.time < 15")
    page.press("l")
    page.run(f"player.seek({SECONDS} - 0.3)")
    page.wait("player.playing && player.time < 15")


def test_a_picture_that_lags_catches_up(page):
    page.press(" ")
    page.wait("player.time > 0.2")
    for lag in (-0.25, 0.2, -1.0):
        page.run(f"player.video.currentTime += {lag}")
        page.wait(f"!player.video.seeking && {TOGETHER}")
    assert page.run("player.playing")


def test_the_axis_seeks_and_its_lanes_choose(page):
    page.click(".row.hits .lane")
    assert page.run("player.time") == pytest.approx(SECONDS / 2, abs=0.1)
    page.press("left")
    page.press("left")
    page.press("right")
    assert page.run("player.time") == pytest.approx(SECONDS / 2 - 0.5, abs=0.1)
    assert page.run("player.current") == 1
    page.click(".row.sound:nth-of-type(6) .lane")
    assert page.run("player.current") == 2
    assert page.run("player.time") == pytest.approx(SECONDS / 2, abs=0.1)
    # hits stand where they are in time, zoomed in or not
    for _ in range(2):
        box, hit = page.run(
            "[$('.over').getBoundingClientRect(), $('.over .hit').getBoundingClientRect()]"
        )
        assert (hit["x"] - box["x"]) / box["width"] == pytest.approx(1 / SECONDS, abs=0.005)
        page.press("+")
    for part in (".rows", ".row.frames img", ".row.sound img"):
        assert page.run(f"$('{part}').clientWidth > 2 * $('.axis').clientWidth")


def test_what_is_marked_as_best_is_kept_and_saved(page, index):
    page.press("3")
    page.press("m")
    page.press("down")
    assert page.run("$('h1').textContent") == "plain.mp4"
    page.press("m")
    page.press("m")
    page.press("up")
    page.open(index)
    page.wait("player.current === 2")
    assert page.run("entries.map(entry => entry.lastChild.textContent)") == ["★", "", ""]
    page.click("#save")
    picks = json.loads(page.downloaded("picks.json").read_text())
    assert list(picks.values()) == [f"{NAME}.foley.2.wav"]


def test_a_picture_that_the_browser_lacks_leaves_its_sound(page):
    assert page.run("$('.note').hidden") is True
    page.press("down")
    page.press("down")
    page.wait("player.video.broken && !$('.note').hidden")
    page.press(" ")
    page.wait("player.time > 0.3 && !player.audio.paused")
    assert page.run("$('.failed').textContent") == "x.mp4: no video"


def test_nothing_comes_from_a_network_and_nothing_goes_wrong(page):
    page.press(" ")
    page.wait("player.time > 0.2")
    urls = page.run("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(url.startswith(("file:", "data:")) for url in urls)
    page.mistakes()
    for key in ("down", "up", "up", "+", "-", "9", "m", "m", "l", " "):
        page.press(key)
    assert page.mistakes() == []


def test_a_narrow_window_shows_all_of_the_page(page):
    """Nothing lies beside it, however little room there is."""
    try:
        for width in (1400, 700, 400):
            page.resize(width, 900)
            page.wait(f"innerWidth === {width}")
            assert page.run("$('main').scrollWidth <= $('main').clientWidth")
            right = page.run("$('main').getBoundingClientRect().right")
            for part in (".screen", ".clock", "#save", "#save-hits", ".axis"):
                box = page.run(f"$('{part}').getBoundingClientRect()")
                assert box["x"] >= 0 and box["x"] + box["width"] <= right
            # there is room for hits
            assert page.run("$('.over').clientWidth > 0.55 * innerWidth")
        # an axis zoomed in goes along with what is no longer in sight, and stays with what is
        page.press("+")
        page.press("+")
        page.run("($('.axis').scrollLeft = 0, true)")
        shown = page.run("$('.axis').clientWidth - $('.lane').getBoundingClientRect().x + 12")
        second = SECONDS / page.run("$('.over').clientWidth")  # of a pixel
        page.run(f"reveal({second * (shown - 20)})")
        assert page.run("$('.axis').scrollLeft") == 0
        page.run(f"reveal({second * (shown + 20)})")
        assert page.run("$('.axis').scrollLeft") > 0
    finally:
        page.resize(1400, 900)


def test_blind_listening(chromium, tmp_path):
    """Both sounds must be heard; answers survive a reload, are saved, and are read by --ratings."""
    videos = [clips.make_video(tmp_path / "set" / f"{k}.mp4", 4.0, fps=10) for k in range(2)]
    sounds = {
        maker: [(torch.from_numpy(clips.clicks(4.0, np.arange(8) / 2)), {}) for _ in videos]
        for maker in ("ours", "ground_truth")
    }
    listen.write_test(tmp_path, videos, sounds)
    chromium.open(tmp_path / "listen.html")
    chromium.wait("player.audios.every(a => a.readyState > 1)")
    chromium.press("1")
    assert chromium.run("$('#fits-a').disabled") is True
    assert chromium.run("rating.answers") == {}
    chromium.press("a")
    chromium.wait("heard[0] > 1")
    chromium.press("b")
    chromium.wait("heard[1] > 1 && !$('#fits-a').disabled")
    first = chromium.run("pairs[0].id")
    chromium.press("1")
    # the next pair plays by itself
    chromium.wait("at === 1 && player.playing && player.time > 0")

    chromium.open(tmp_path / "listen.html")
    assert chromium.run("[at, rating.answers[pairs[0].id]]") == [1, "a"]
    chromium.click("#b")
    chromium.wait("heard[1] > 1")
    chromium.click("#a")
    chromium.wait("heard[0] > 1 && !$('#fits-same').disabled")
    second = chromium.run("pairs[1].id")
    chromium.click("#fits-same")
    chromium.wait("$('.told').textContent.startsWith('All')")
    chromium.click("#save")
    name = f"ratings-{chromium.run('rating.rater')}.json"
    saved = chromium.downloaded(name)
    assert json.loads(saved.read_text())["answers"] == {first: "a", second: "same"}

    pairs, raters = listen.read_ratings([saved], tmp_path / listen.KEY)
    share = listen.tally(pairs, raters)["ground_truth"]["share"]
    assert share == (0.75 if pairs[first]["a"] == "ours" else 0.25)
    assert chromium.mistakes() == []


# ---- correcting hits ---------------------------------------------------------------------------

START = 3.5  # of --start
SHOWN = SECONDS - START  # seconds on the page
LANE = "$('.hits .lane').getBoundingClientRect()"
TIMES = "hits.list.map(hit => hit.time)"


@pytest.fixture(scope="module")
def directed_index(tmp_path_factory):
    """A page of a run with --start."""
    folder = tmp_path_factory.mktemp("directed")
    source, line, target = outputs(folder, seconds=SECONDS)
    line["seconds"] = SHOWN
    hits = [hit._replace(time=hit.time + START) for hit in HITS]
    return write_page(folder, [(source, line, target)], start=START, hits=hits)


@pytest.fixture
def directed(chromium, directed_index):
    chromium.open(directed_index)
    chromium.run("localStorage.clear()")
    chromium.open(directed_index)
    chromium.wait("player.audios.every(a => a.readyState > 1) && player.video.readyState > 1")
    return chromium


def drag_hit(page, k, seconds=0.0, up=0.0):
    """Hit k of the list along the lane, and up by a share of its height. Without either a click."""
    box = page.run(LANE)
    x = box["x"] + page.run(f"hits.list[{k}].time") / SHOWN * box["width"]
    y = box["y"] + box["height"] * 0.9
    page.drag(x, y, seconds / SHOWN * box["width"], -up * box["height"])


def read_text(page, tmp_path):
    """The hits of the file that the page would save."""
    path = tmp_path / "saved.txt"
    path.write_text(page.run("hits.text"))
    return read_hits(path, foley.MATERIALS, with_guesses=True)


def test_hits_are_tapped_in_a_pause_and_while_it_plays(directed):
    directed.run("player.seek(8)")
    directed.press("h")
    assert directed.run(TIMES) == pytest.approx([1.0, 4.5, 8.0], abs=1e-3)
    assert directed.run("hits.list[2] === hits.selected")
    assert directed.run("$('.facts').textContent") == f"{SHOWN:.2f} s, 3 hits, edited"
    directed.press(" ")
    for count in (4, 5):
        directed.wait(f"player.time > {4.4 + count}")
        before = directed.run("player.time")
        directed.press("h")
        after = directed.run("player.time")
        assert before <= directed.run("hits.selected.time") <= after
        assert directed.run("hits.list.length") == count
    directed.press(" ")
    # drawn where they are, in the lane and over all
    assert directed.run("$('.hits .lane').children.length") == 5
    assert directed.run("document.querySelectorAll('.over .hit').length") == 5
    # at the end, too, where the last of what is made is played
    directed.run(f"player.seek({SHOWN})")
    directed.press("h")
    assert SHOWN - 0.05 < directed.run("hits.selected.time") < SHOWN


def test_a_key_that_is_held_is_one_hit_and_one_place_has_one(directed):
    directed.run("player.seek(8)")
    for repeat in ("false", "true", "true"):
        directed.run(
            "document.body.dispatchEvent(new KeyboardEvent('keydown', "
            f"{{key: 'h', bubbles: true, repeat: {repeat}}}))"
        )
        directed.run("player.seek(player.time + 1)")
    assert directed.run(TIMES) == pytest.approx([1.0, 4.5, 8.0], abs=1e-3)
    # a hit that is there already is selected instead
    directed.run("player.seek(4.504)")
    directed.press("h")
    assert directed.run("[hits.list.length, hits.list.indexOf(hits.selected)]") == [3, 1]
    # moved onto another it stays, and the page says what counts
    directed.press(".")
    assert "stronger" not in directed.run("$('.told').textContent")
    directed.run("hits.change({ time: 8.002 })")
    assert directed.run("hits.list.length") == 3
    assert "the stronger counts" in directed.run("$('.told').textContent")


def test_hits_are_moved_and_keep_what_is_known_of_them(directed, tmp_path):
    drag_hit(directed, 1)
    assert directed.run("hits.list.indexOf(hits.selected)") == 1
    assert directed.run("[player.time, hits.isEdited]") == [4.5, False]
    directed.press(".")
    directed.press(".")
    directed.press(",")
    assert directed.run("[hits.selected.time, player.time]") == pytest.approx([4.54] * 2, abs=1e-3)
    # a drag takes it along in time alone, and is one edit
    drag_hit(directed, 1, seconds=2)
    assert directed.run("hits.selected.time") == pytest.approx(6.54, abs=0.03)
    assert directed.run("hits.before.length") == 4
    expected = [Hit(4.5, 0.9, "wood"), Hit(10.04, None, "glass", is_guess=True)]
    for hit, wanted in zip(read_text(directed, tmp_path), expected, strict=True):
        assert hit[1:] == wanted[1:] and hit.time == pytest.approx(wanted.time, abs=0.03)
    directed.press("ctrl", "z")
    assert directed.run("hits.selected.time") == pytest.approx(4.54)
    # past another one, and not beyond the end
    drag_hit(directed, 1, seconds=-4)
    assert directed.run("hits.list.indexOf(hits.selected)") == 0
    drag_hit(directed, 1, seconds=SHOWN - 1)
    assert directed.run("hits.selected.time") == pytest.approx(SHOWN - 0.016)
    # a hit before the part that is shown stays there
    outside = "{ ...clips[0], id: 'outside', hits: [[-2, 0.5]] }"
    directed.run(f"(window.other = new Hits({outside}, column, () => 0)).select(other.list[0])")
    directed.run("other.change({ strength: 1 })")
    assert directed.run("other.text") == "1.500000\t1.500000\t1.0\n"
    # without a selected hit the keys move the player
    directed.press("escape")
    directed.run("player.seek(8)")
    directed.press(".")
    assert directed.run("player.time") == pytest.approx(8.04, abs=1e-3)


def test_a_drag_upward_and_the_selects_say_strength_and_material(directed, tmp_path):
    drag_hit(directed, 1, up=0.25)
    hit = read_text(directed, tmp_path)[1]
    assert hit == Hit(8.0, pytest.approx(0.85, abs=0.051), "glass", is_guess=True)
    assert directed.run("$('#material').value") == "glass?"
    options = directed.run("[...$('#material').options].map(option => option.textContent)")
    assert options == ["glass?", "not said", *(m for m in foley.MATERIALS if m not in foley.OTHER)]
    directed.click("#material option[value=metal]")
    directed.click("#strength option[value='0.3']")
    assert read_text(directed, tmp_path)[1] == Hit(8.0, 0.3, "metal")
    directed.click("#material option[value='']")
    directed.click("#strength option[value='']")
    assert read_text(directed, tmp_path) == [Hit(4.5, 0.9, "wood"), Hit(8.0)]
    # opened by the mouse, it gives the keys back, whether something was chosen or not
    directed.click("#material")
    directed.press("down")
    directed.press("enter")
    directed.wait("hits.selected.material === 'wood'")
    directed.press(" ")
    directed.wait("player.playing")
    directed.click("#strength")
    directed.press("escape")
    directed.press(" ")
    assert not directed.run("player.playing")


def test_a_select_keeps_only_the_keys_that_change_it(directed):
    drag_hit(directed, 1)
    directed.run("$('#strength').focus()")
    directed.press("down")
    directed.press("down")
    # it is still there that the keyboard is
    assert directed.run("document.activeElement.id") == "strength"
    assert directed.run("[hits.selected.strength, at]") == [0.9, 0]
    directed.press("2")
    directed.press("m")
    directed.press(",")
    assert directed.run("[player.current, pickOf(clips[0])]") == [1, 1]
    assert directed.run("hits.selected.time") == pytest.approx(4.46)
    directed.press("backspace")
    assert directed.run(TIMES) == [1.0]
    assert directed.run("$('#strength').disabled && $('#material').disabled")


def test_hits_are_deleted_and_every_edit_is_undone(directed):
    for time in (8, 9, 10, 11):
        directed.run(f"player.seek({time})")
        directed.press("h")
    before = directed.run(TIMES)
    directed.press("delete")
    directed.press("delete")
    assert directed.run(TIMES) == before[:5]
    # the next and the one before; the hit at the current time stays
    directed.run("player.seek(8.5)")
    directed.press("p")
    directed.press("p")
    directed.press("n")
    assert directed.run("hits.list.indexOf(hits.selected)") == 2
    directed.click("#remove-after")
    assert directed.run(TIMES) == before[:3]
    directed.press("ctrl", "z")
    assert directed.run(TIMES) == before[:5]
    directed.click("#undo")
    assert directed.run(TIMES) == before
    for _ in range(6):
        directed.press("ctrl", "z")
    assert directed.run(TIMES) == [1.0, 4.5] and not directed.run("hits.isEdited")
    assert directed.run("$('#undo').disabled && $('#discard').disabled")


def test_a_click_beside_a_hit_seeks(directed):
    box = directed.run(LANE)
    drag_hit(directed, 0)
    directed.drag(box["x"] + 0.5 * box["width"], box["y"] + 5)
    assert directed.run("player.time") == pytest.approx(SHOWN / 2, abs=0.05)
    assert directed.run("hits.selected") is None and not directed.run("hits.isEdited")


def test_a_key_ends_a_drag(chromium, tmp_path):
    """The selected hit of an input that it opens is not dragged along."""
    made = [outputs(tmp_path, name, candidates=1) for name in ("a", "b")]
    chromium.open(write_page(tmp_path, made))
    chromium.wait("player.audios.every(a => a.readyState > 1)")
    chromium.press("down")
    chromium.press("n")
    chromium.press("up")
    box = chromium.run(LANE)
    x = box["x"] + box["width"] / 6
    chromium.drag(x, box["y"] + 0.9 * box["height"], 0.3 * box["width"], key="down")
    assert chromium.run(f"[at, hits.selected.time, {TIMES}]") == [1, 1.0, [1.0, 4.5]]
    chromium.press("delete")
    assert chromium.run("$('.facts').textContent") == "6.00 s, 1 hit, edited"


def test_edits_are_kept_until_they_are_discarded(directed, directed_index):
    drag_hit(directed, 0)
    directed.press("delete")
    directed.run("player.seek(8)")
    directed.press("h")
    directed.open(directed_index)
    assert directed.run(TIMES) == pytest.approx([4.5, 8.0], abs=1e-3)
    assert directed.run("$('.hits .lane').children.length") == 2
    directed.click("#discard")
    assert directed.run(TIMES) == [1.0, 4.5]
    directed.press("ctrl", "z")
    directed.click("#discard")
    directed.open(directed_index)
    assert directed.run(TIMES) == [1.0, 4.5] and not directed.run("hits.isEdited")
    # where the browser keeps nothing the page says so
    directed.run("Object.defineProperty(window, 'localStorage', { get() { throw Error() } })")
    assert "keeps no edits" not in directed.run("$('.told').textContent")
    directed.press("h")
    assert "keeps no edits" in directed.run("$('.told').textContent")


def test_saved_hits_are_the_label_track_that_python_writes(directed, tmp_path):
    """In seconds from the video's first picture, under the name in the command to run next."""
    written = tmp_path / "written.txt"
    write_hits(written, [hit._replace(time=hit.time + START) for hit in HITS])
    assert directed.run("hits.text") == written.read_text()
    directed.run("player.seek(8)")
    directed.press("h")
    directed.run("hits.change({ strength: 1, material: 'stone' })")
    directed.click("#save-hits")
    command = shlex.split(directed.run("$('.next code').textContent"))
    assert command[:2] == ["python", "sample.py"] and command[2].endswith(f"/{NAME}.mp4")
    assert command[command.index("--start") + 1] == str(START)
    saved = directed.downloaded(command[command.index("--onsets") + 1])
    hits = [*HITS, Hit(8.0, 1.0, "stone")]
    write_hits(written, [hit._replace(time=hit.time + START) for hit in hits])
    assert saved.read_text() == written.read_text()
    # hits of a page that an earlier version wrote: times and strengths
    old = "{ ...clips[0], id: 'old', hits: [[1, 0.5], [2, null]] }"
    text = directed.run(f"new Hits({old}, column, () => 0).text")
    assert text == "4.500000\t4.500000\t0.5\n5.500000\t5.500000\t\n"
    # what the model guessed is not said
    assert read_hits(saved, foley.MATERIALS)[1] == Hit(4.5 + START)


def test_thousands_of_hits_stay_usable(chromium, tmp_path):
    """An edit draws what it changes, and a moment that passes draws nothing."""
    made = outputs(tmp_path, "long", seconds=SECONDS, candidates=1)
    hits = [Hit(k * SECONDS / 5000, 0.5, "wood") for k in range(5000)]
    chromium.open(write_page(tmp_path, [made], hits=hits))
    chromium.wait("player.audios.every(a => a.readyState > 1)")
    chromium.run(
        "(window.changes = [], new MutationObserver(seen => changes.push(...seen))"
        ".observe($('.rows'), { childList: true, subtree: true }), true)"
    )
    chromium.press("n")
    chromium.press("n")
    chromium.press(".")
    # one line in the lane and one over all, both put in the place of two others
    assert chromium.run("changes.length") == 4
    chromium.press(" ")
    chromium.wait("player.time > 0.5")
    assert chromium.run("changes.length") == 4
    chromium.press(" ")
    chromium.press("delete")
    assert chromium.run("[hits.list.length, $('.hits .lane').children.length]") == [4999, 4999]
    assert chromium.mistakes() == []
