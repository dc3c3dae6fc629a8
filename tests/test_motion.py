"""common/motion.py: the curve peaks where things are stopped, and costs no memory by length."""

import numpy as np
import pytest
from clips import make, steady

from common import media, motion

SIDE = 12  # pixels of the thing that moves


def scene(places, size=96):
    """A textured square of SIDE pixels at x = places[k] in frame k: uint8 (f, 3, size, size)."""
    rng = np.random.default_rng(0)
    square = rng.integers(0, 255, (SIDE // 3, SIDE // 3)).repeat(3, 0).repeat(3, 1)
    frames = np.full((len(places), 3, size, size), 120, np.uint8)
    for frame, x in zip(frames, places, strict=True):
        frame[:, 40 : 40 + SIDE, x : x + SIDE] = square
    return frames


def test_it_peaks_where_a_thing_stops():
    """In frame 20; a start in frame 40 is none, nor is going on."""
    k = np.arange(50)
    curve = motion.motion_onsets(scene(20 + 2 * np.minimum(k, 20) + 2 * np.maximum(k - 40, 0)))
    assert curve.shape == (50,) and curve.dtype == np.float32
    # smoothed over three frames; going on costs little, where blocks hold an edge of the thing
    assert curve.argmax() == 20
    assert np.flatnonzero(curve > 0.25 * curve.max()).tolist() == [19, 20, 21]
    assert not curve[23:39].any()


def test_a_bounce_counts_more_than_a_stop():
    k = np.arange(60)
    stopped = 2 * np.minimum(k, 20)  # to 40 in frame 20
    bounced = np.where(k >= 40, np.abs(50 - k) - 10, 0)  # one pixel a frame from 40 on, back at 50
    curve = motion.motion_onsets(scene(30 + stopped + 2 * bounced))
    assert curve[50] > 1.5 * curve[20] > 0


def test_stillness_noise_and_light_are_no_motion():
    rng = np.random.default_rng(1)
    still = scene(np.full(30, 40))
    assert not motion.motion_onsets(still).any()
    noise = np.clip(still + rng.normal(0, 3, still.shape), 0, 255).astype(np.uint8)
    assert motion.motion_onsets(noise).max() < 0.5
    flat = np.full((30, 1, 96, 96), 50, np.uint8)
    flat[15:] = 200
    assert not motion.motion_onsets(flat).any()


def test_size_and_contrast_of_a_clip_hardly_matter():
    """Curves are comparable between clips: the same motion, a picture of half the contrast."""
    k = np.arange(60)
    frames = scene(20 + 2 * np.abs((k % 20) - 10))
    dim = (frames // 2 + 60).astype(np.uint8)
    assert np.abs(motion.motion_onsets(frames) - motion.motion_onsets(dim)).max() < 0.15


@pytest.mark.parametrize("count", [0, 1, 2, 3, 63, 64, 65, 66, 129])
def test_batches_leave_no_seam(count, monkeypatch):
    frames = scene(20 + 2 * np.abs((np.arange(count) % 20) - 10))
    curve = motion.motion_onsets(frames)
    assert curve.shape == (count,)
    monkeypatch.setattr(motion, "BATCH", 1000)
    assert np.array_equal(motion.motion_onsets(frames), curve)


def test_a_file_gives_the_curve_of_its_frames(tmp_path):
    """From any start, in the child process as well, and gray as in color."""

    def paint(image, k):
        x = 8 + 2 * min(k, 30)
        image[20:30, x : x + 10] = np.arange(100, dtype=np.uint8).reshape(10, 10, 1) * 2

    path = make(tmp_path / "a.mp4", steady(25, 2), [60] * 50, size=(96, 96), draw=paint)
    frames = media.read_frames(path, motion.FPS, motion.SIZE)
    whole = motion.clip_motion(path)
    assert whole.shape == (50,) and whole.argmax() in (29, 30, 31)
    assert np.array_equal(whole, motion.motion_onsets(frames))
    part = motion.clip_motion(path, 0.4, 1.4)
    assert np.array_equal(part, motion.motion_onsets(frames[10:45]))
    assert np.array_equal(media.clip_motion(path, 0.4, 1.4).numpy(), part)
    gray = motion.gray(frames)[:, None]
    assert np.array_equal(motion.motion_onsets(gray), whole)


def test_a_file_without_a_picture_is_one_line(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"\0" * 100)
    for read in (motion.clip_motion, media.clip_motion):
        with pytest.raises(media.MediaError, match=r"a\.mp4"):
            read(tmp_path / "a.mp4")
