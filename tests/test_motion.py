"""common/motion.py: blocks are found again, a held picture is no stop, batches leave no seam."""

import numpy as np
import pytest
from clips import make, steady

from common import media, motion

SIDE = 16  # pixels of the thing that moves


def scene(places, size=96, top=40):
    """A textured square of SIDE pixels at x = places[k] in frame k: uint8 (f, size, size)."""
    rng = np.random.default_rng(0)
    square = rng.integers(0, 255, (SIDE // 2, SIDE // 2)).repeat(2, 0).repeat(2, 1)
    frames = np.full((len(places), size, size), 120, np.uint8)
    for frame, x in zip(frames, places, strict=True):
        frame[top : top + SIDE, x : x + SIDE] = square
    return frames


def test_velocities_before_and_after_in_their_units():
    """2 pixels a frame to the right until frame 20, then still; nothing elsewhere."""
    k = np.arange(30)
    frames = scene(24 + 2 * np.minimum(k, 20))
    blocks = motion.block_motion(frames)
    assert blocks.shape == (30, 5, 12, 12) and blocks.dtype == np.int8
    # in frame 20 the square is at 64, on the blocks 8 and 9 of the rows 5 and 6
    inside = blocks[20][:, 5:7, 8:10].reshape(5, -1)
    assert (inside[1] == 2 * motion.SPEED).all() and not inside[[0, 2, 3]].any()
    assert (inside[4] > 5 * motion.LEVEL).all()
    # on the way there it goes on, at rest nothing moves, far from it nothing ever does
    assert (blocks[12][[1, 3], 5:7, 6:8] == 2 * motion.SPEED).all()
    # the picture at rest is held, as long as one is
    assert np.array_equal(blocks[22], blocks[20]) and not blocks[23:].any()
    assert not blocks[:, :, :4].any()
    # no neighbor before the first and after the last
    assert not blocks[0, [0, 1, 4]].any() and not blocks[-1, 2:4].any()


def test_down_is_positive():
    frames = np.stack([scene([40], top=16 + 3 * k)[0] for k in range(9)])
    blocks = motion.block_motion(frames)
    # in frame 8 at 40, on the rows 5 and 6
    assert (blocks[8, 0, 5:7, 5:7] == 3 * motion.SPEED).all() and not blocks[8, 1].any()


@pytest.mark.parametrize("noise", [0, 0.1])
def test_a_held_picture_is_no_stop(noise):
    """12.5 pictures a second in a video of 25, as it is and coded: speeds go on, a frame's."""
    rng = np.random.default_rng(1)
    twice = scene(8 + 2 * np.arange(20)).repeat(2, 0)
    flicker = rng.random(twice.shape) < noise
    blocks = motion.block_motion(np.where(flicker, twice ^ 1, twice))
    assert len(blocks) == 40
    assert all(np.median(speeds[speeds > 0]) == motion.SPEED for speeds in blocks[10:30, 1])
    assert np.array_equal(blocks[10:30:2], blocks[11:30:2])


def test_stillness_noise_and_light_are_no_motion():
    rng = np.random.default_rng(1)
    still = scene(np.full(30, 40))
    assert not motion.block_motion(still).any()
    noise = np.clip(still + rng.normal(0, 3, still.shape), 0, 255).astype(np.uint8)
    assert not motion.block_motion(noise)[:, :4].any()
    flat = np.full((30, 96, 96), 50, np.uint8)
    flat[15:] = 200
    blocks = motion.block_motion(flat)
    assert not blocks[:, :4].any()
    # 150 gray levels in the three frames for which the picture before was held
    assert (blocks[15, 4] == 150 / 3 * motion.LEVEL).all()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 63, 64, 65, 66, 129])
def test_batches_leave_no_seam(count, monkeypatch):
    frames = scene(20 + 2 * np.abs((np.arange(count) % 20) - 10))
    blocks = motion.block_motion(frames)
    assert blocks.shape == (count, 5, 12, 12)
    monkeypatch.setattr(motion, "BATCH", 1000)
    assert np.array_equal(motion.block_motion(frames), blocks)


def test_a_file_gives_the_motion_of_its_frames(tmp_path):
    """From any start, and in the child process as well."""

    def paint(image, k):
        x = 8 + 2 * min(k, 30)
        image[20:36, x : x + 16] = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)

    path = make(tmp_path / "a.mp4", steady(25, 2), [60] * 50, size=(96, 96), draw=paint)
    frames = motion.gray(media.read_frames(path, motion.FPS, motion.SIZE).numpy())
    whole = motion.clip_motion(path)
    assert np.array_equal(whole, motion.block_motion(frames))
    assert whole[10, 1].max() == 2 * motion.SPEED
    part = motion.clip_motion(path, 0.4, 1.4)
    assert np.array_equal(part, motion.block_motion(frames[10:45]))
    assert np.array_equal(media.clip_motion(path, 0.4, 1.4).numpy(), part)


def test_a_file_without_a_picture_is_one_line(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"\0" * 100)
    for read in (motion.clip_motion, media.clip_motion):
        with pytest.raises(media.MediaError, match=r"a\.mp4"):
            read(tmp_path / "a.mp4")
