"""The pages in a real browser: they play, switch in place, rate and save. Skipped without Chromium.

`python -m pytest -m optional`, as root on Debian, installs it (tests/browser.py).
"""

import browser
import clips
import numpy as np
import pytest
import torch
from pages import NAME, outputs, write_page

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
    picks = page.downloaded("picks.json")
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
    assert chromium.downloaded(name)["answers"] == {first: "a", second: "same"}

    pairs, raters = listen.read_ratings([chromium.downloads / name], tmp_path / listen.KEY)
    share = listen.tally(pairs, raters)["ground_truth"]["share"]
    assert share == (0.75 if pairs[first]["a"] == "ours" else 0.25)
    assert chromium.mistakes() == []
