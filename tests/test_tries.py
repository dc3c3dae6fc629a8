"""A window is drawn again where its sound does not play the hits that it was given: --tries."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from clips import clicks, make_video

import sample
from common.audio import HOP, SAMPLE_RATE, WINDOW, mel
from common.onsets import Hit
from film import tries
from sample import Settings

TIMES = (1.0, 2.5, 4.0)


def sounding(times):
    """The mel (128, 512) of clicks at these seconds of a window."""
    return mel(torch.from_numpy(clicks(WINDOW / SAMPLE_RATE, times)))


def clip_of(times=TIMES, seconds=8.0, starts=(0,), known=None, needs=None, hits_given=True):
    return SimpleNamespace(
        hits=[Hit(time) for time in times],
        samples=round(seconds * SAMPLE_RATE),
        starts=list(starts),
        known=known or {},
        needs=needs or {},
        hits_given=hits_given,
        mels={},
    )


# ---- faults --------------------------------------------------------------------------------------


def test_hits_that_are_left_out_and_added_count():
    clip = clip_of()
    assert tries.count_faults(sounding(TIMES), clip, 0, 0) == 0
    assert tries.count_faults(sounding((1.03, 2.47, 4.0)), clip, 0, 0) == 0
    assert tries.count_faults(sounding((1.0, 4.0)), clip, 0, 0) == 1
    assert tries.count_faults(sounding((1.0, 2.5, 3.2, 4.0)), clip, 0, 0) == 1
    # a hit that is played at another time is both
    assert tries.count_faults(sounding((1.0, 2.7, 4.0)), clip, 0, 0) == 2
    assert tries.count_faults(sounding(()), clip, 0, 0) == 3
    # in whichever order they are given
    assert tries.count_faults(sounding(TIMES), clip_of(TIMES[::-1]), 0, 0) == 0


def test_hits_are_those_of_the_window():
    start = 6 * SAMPLE_RATE
    clip = clip_of((1.0, 7.0, 8.5, 20.0), 30.0)
    assert tries.count_faults(sounding((1.0, 2.5)), clip, 0, start) == 0
    assert tries.count_faults(sounding((1.0,)), clip, 0, start) == 1


def test_hits_too_close_to_be_heard_apart_are_one():
    clip = clip_of((1.0, 1.03, 4.0))
    assert tries.count_faults(sounding((1.0, 4.0)), clip, 0, 0) == 0
    assert tries.count_faults(sounding((4.0,)), clip, 0, 0) == 1
    # of a chain, those that can be
    clip = clip_of((1.0, 1.04, 1.08))
    assert tries.count_faults(sounding((1.0, 1.08)), clip, 0, 0) == 0


def test_a_hit_with_which_a_window_begins_is_never_missed():
    """No onset is heard there: it would be drawn again and again for nothing."""
    for first in (0.0, 0.016):
        clip = clip_of((first, 4.0))
        assert tries.count_faults(sounding((first, 4.0)), clip, 0, 0) == 0
        assert tries.count_faults(sounding((first,)), clip, 0, 0) == 1
    # a little later it is
    clip = clip_of((0.04, 4.0))
    assert tries.count_faults(sounding((0.04, 4.0)), clip, 0, 0) == 0
    assert tries.count_faults(sounding((4.0,)), clip, 0, 0) == 1


def test_what_is_not_drawn_or_not_heard_has_no_faults():
    # what lies behind the end is cut off
    assert tries.count_faults(sounding((1.0, 5.0)), clip_of((1.0,), seconds=4.5), 0, 0) == 0
    assert tries.count_faults(sounding((1.0, 4.0)), clip_of((1.0,), seconds=4.5), 0, 0) == 1
    # and what is known is not drawn: here the first half of the window
    is_known = torch.arange(64) < 32
    known = {(0, 0): (torch.zeros(4, 16, 64), is_known)}
    clip = clip_of((1.0, 6.0), known=known)
    assert tries.count_faults(sounding((2.0, 6.0)), clip, 0, 0) == 0
    assert tries.count_faults(sounding((1.0, 7.0)), clip, 0, 0) == 2


# ---- draws ---------------------------------------------------------------------------------------


def drawn_by(attempts, clips, most, candidate=0):
    """-> best_of_tries of one window of each clip, and the batches that were drawn.

    attempts: for each clip, the times that the sounds of its attempts have; None where the sampler
    diverges. Latents and scores are the number of clip and attempt.
    """
    windows = [(clip, candidate, 0) for clip in clips]
    for number, clip in enumerate(clips):
        clip.number = number
    batches = []

    def sample_latents(windows, attempt):
        batches.append([clip.number for clip, _, _ in windows])
        drawn = []
        for clip, _, _ in windows:
            number = 10 * clip.number + attempt
            drawn.append((torch.full((4, 16, 64), float(number)), number))
        return drawn

    def decode(windows, z):
        assert len(z) == len(windows)
        numbers = z[:, 0, 0, 0].long().tolist()
        all_times = [attempts[n // 10][n % 10] for n in numbers]
        diverged = torch.full((128, 512), torch.nan)
        return torch.stack([diverged if times is None else sounding(times) for times in all_times])

    best = tries.best_of_tries(windows, sample_latents, decode, most)
    assert all((z == score).all() for z, score in best)
    return [score for _, score in best], batches


def test_only_windows_with_faults_are_drawn_again():
    attempts = [[TIMES], [(1.0,), (1.0, 2.5), TIMES, ()], [(), TIMES]]
    best, batches = drawn_by(attempts, [clip_of() for _ in attempts], 4)
    assert best == [0, 12, 21]
    assert batches == [[0, 1, 2], [1, 2], [1]]


def test_the_best_is_kept_and_of_equal_ones_the_first():
    attempts = [[(1.0,), (1.0, 2.5), (), (2.5, 4.0)], [(), (), ()]]
    best, batches = drawn_by(attempts, [clip_of() for _ in attempts], 3)
    assert best == [1, 10] and batches == [[0, 1]] * 3


def test_a_draw_that_diverged_takes_the_place_of_none():
    attempts = [[(1.0,), None, (), (1.0, 2.5)], [None, TIMES]]
    clips = [clip_of() for _ in attempts]
    best, batches = drawn_by(attempts, clips, 4)
    assert best == [3, 10] and torch.equal(clips[0].mels[0][0], sounding((1.0, 2.5)))
    # the first one is an error where the sound is made
    assert batches == [[0, 1], [0], [0], [0]] and not clips[1].mels


def test_the_mel_of_an_only_window_is_kept_and_no_other():
    only, long = clip_of(), clip_of(starts=(0, 100_000), seconds=14.0)
    drawn_by([[(1.0,), TIMES], [TIMES]], [only, long], 4, candidate=3)
    assert only.mels.keys() == {3} and torch.equal(only.mels[3][0], sounding(TIMES))
    assert not long.mels


def test_few_mels_are_kept_and_no_batch_of_them():
    """Of a thousand candidates they would take 250 MB; those that are missing are decoded again."""
    clip = clip_of()
    windows = [(clip, k, 0) for k in range(tries.KEPT + 3)]

    def sample_latents(windows, attempt):
        return [(torch.full((4, 16, 64), float(attempt)), None) for _ in windows]

    def decode(windows, z):
        return torch.stack([sounding(TIMES if attempt else ()) for attempt in z[:, 0, 0, 0]])

    tries.best_of_tries(windows, sample_latents, decode, 2)
    assert list(clip.mels) == list(range(tries.KEPT))
    for mels in clip.mels.values():
        assert torch.equal(mels[0], sounding(TIMES))
        assert mels[0].untyped_storage().nbytes() == 4 * mels[0].numel()


@pytest.mark.parametrize(("most", "hits_given"), [(1, True), (4, False)])
def test_nothing_is_decoded_where_nothing_is_compared(most, hits_given):
    clip = clip_of(hits_given=hits_given)
    windows = [(clip, 0, 0)]
    drawn = [(torch.zeros(4, 16, 64), None)]
    assert tries.best_of_tries(windows, lambda *_: drawn, None, most) is drawn


# ---- the main job --------------------------------------------------------------------------------


def test_each_attempt_has_its_own_noise():
    fields = [sample.noise_field(3, k, 200, attempt) for k in (0, 1) for attempt in range(3)]
    assert torch.equal(fields[0], sample.noise_field(3, 0, 200))
    for k, field in enumerate(fields):
        for other in fields[:k]:
            assert abs((field * other).mean()) < 0.05  # independent


def test_a_window_without_its_hits_is_drawn_again(tmp_path, monkeypatch):
    """Of a clip of two seconds and one of three windows, all by a network that plays nothing at
    first."""
    models = tiny.models(columns=4, materials=("wood", "metal"))
    videos = [make_video(tmp_path / "short.mp4", 2), make_video(tmp_path / "long.mp4", 20)]
    asked = []
    real = sample.sample_latents

    def sample_latents(windows, attempt, **options):
        asked.append((attempt, len(windows)))
        drawn = real(windows, attempt, **options)
        return [(torch.full_like(z, float(attempt)), score) for z, score in drawn]

    def decode(z):
        """Silence in first attempts, the hit at 1 s in second ones, and whatever else in others."""
        columns = torch.zeros(len(z), 128, 512)
        is_second = z[:, 0, 0, 0] == 1
        columns[is_second] = sounding((1.0,))
        return columns

    monkeypatch.setattr(sample, "sample_latents", sample_latents)
    monkeypatch.setattr(models.ldm, "decode", decode)
    steps = []
    # the long one has hits in its first window alone
    settings = Settings(steps=2, cg=0, batch=3, onsets=(Hit(1.0),))
    results = dict(
        sample.generate_many(
            videos, models, settings=settings, on_step=lambda *numbers: steps.append(numbers)
        )
    )
    short, long = (results[video] for video in videos)
    assert (0, 3) in asked and max(attempt for attempt, _ in asked) == 1
    onset = short.mel[:, :100].mean(0).diff().argmax() + 1
    assert abs(onset - round(SAMPLE_RATE / HOP)) <= 1
    # progress counts what was planned
    assert steps[-1] == (8, 8)
    assert {"sampling", "autoencoder"} <= long.profile.rows.keys()

    # drawn once
    asked.clear()
    once = sample.generate(
        videos[0], models, settings=Settings(steps=2, cg=0, onsets=(Hit(1.0),), tries=1)
    )
    assert asked == [(0, 1)] and not once.mel[:, :100].std() > 0


def test_tries_are_a_whole_number_from_one():
    for wrong in (0, 65, 1.5):
        with pytest.raises(ValueError, match="^tries .*: not a whole number from 1 to 64"):
            Settings(tries=wrong)
