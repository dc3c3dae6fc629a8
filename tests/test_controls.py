"""What stage 2 is told beside the features: tracks of hits, the onset head, what training leaves out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common import controls
from common.audio import COLUMN
from common.onsets import Hit
from ldm import LDM, PRESETS

MATERIALS = ("wood", "metal", "glass")


def test_hits_stand_in_their_columns_and_nothing_is_lost():
    hits = [Hit(0.0, 0.5), Hit(0.1, None, "metal"), Hit(0.999 * 8 * COLUMN, 1.0), Hit(9.0, 1.0)]
    track = controls.track_hits(hits, 9)
    assert track.tolist() == [0.5, 0, 0, 0, 0, 0, -1, 0, 1.0]
    assert controls.track_hits([], 4).tolist() == [0, 0, 0, 0]


def test_a_material_holds_up_to_the_middle_between_two_hits():
    hits = [Hit(0.1, None, "glass"), Hit(0.2), Hit(0.62, None, "wood")]
    # features of 0.1 s, by their middles: the hit without a material does not count
    assert controls.track_materials(hits, MATERIALS, 6, 0.1).tolist() == [2, 2, 2, 2, 0, 0]
    assert controls.track_materials(hits[1:2], MATERIALS, 3, 0.1).tolist() == [-1, -1, -1]
    hot = controls.one_hot(torch.tensor([[2, -1]]), 3)
    assert hot.tolist() == [[[0, 0, 1], [0, 0, 0]]]


def test_motion_is_read_at_the_mel_columns():
    motion = np.arange(50, dtype=np.float32)  # 25 a second: its value is 25 times the time
    track = controls.track_motion(motion, 100, start=0.5)
    times = 0.5 + np.arange(100) * COLUMN
    inside = times <= 49 / 25
    assert np.allclose(track[inside], 25 * times[inside], atol=1e-4)
    assert not track[~inside].any() and (~inside).any()
    assert not controls.track_motion(motion[:0], 5).any()


def test_peaks_are_single_columns_above_the_threshold():
    curve = np.zeros(60)
    curve[0] = 0.9
    curve[20:23] = (0.5, 0.8, 0.8)
    curve[24] = 0.7  # too near to a higher one
    curve[40] = controls.HEARD / 2
    found = controls.peaks(torch.tensor(curve))
    assert [round(time / COLUMN) for time, _ in found] == [0, 21]
    assert [height for _, height in found] == pytest.approx([0.9, 0.8])


def test_tokens_are_laid_out_as_documented():
    features = torch.zeros(1, 2, 5)
    tracks = controls.Tracks(
        hits=torch.tensor([[0, 0.5, 0, 0, -1.0, 0, 0, 0]]),
        told=torch.ones(1, 1, 1),
        curve=torch.full((1, 8), 0.25),
        seen=torch.ones(1, 1, 1),
        materials=controls.one_hot(torch.tensor([[1, 0]]), 3),
    )
    first, second = controls.tokens(tracks, features, 4, 3)[0].tolist()
    assert first == [0, 1, 0, 0] + [0, 0.5, 0, 0] + [1] + [0.25] * 4 + [1] + [0, 1, 0]
    assert second == [1, 0, 0, 0] + [0, 0, 0, 0] + [1] + [0.25] * 4 + [1] + [1, 0, 0]
    assert len(first) == controls.width(4, 3)
    # a track without its flag says nothing, and no tracks are zeros
    silent = tracks._replace(told=None, seen=None, materials=None)
    assert not controls.tokens(silent, features, 4, 3).any()
    assert not controls.tokens(controls.Tracks(), features, 4, 3).any()


@pytest.fixture(scope="module")
def drawn():
    """4,000 items whose features, motion and materials say which item they are of."""
    rng = torch.Generator().manual_seed(0)
    n = 4000
    features = torch.arange(1.0, n + 1)[:, None, None].expand(n, 16, 4)
    motion = torch.rand(n, 64, generator=rng)
    hits = (torch.rand(n, 64, generator=rng) < 0.1) * torch.rand(n, 64, generator=rng)
    materials = torch.randint(0, 3, (n, 16), generator=rng)
    conditional = (torch.rand(n, 1, 1, generator=rng) >= 0.2).float()
    stranger = (torch.rand(n, generator=rng) < 0.15).float()
    u = torch.rand(n, 11, generator=rng)
    result = controls.draw(features, motion, hits, materials, stranger, 3, conditional, u)
    return features, motion, hits, stranger, conditional, result


def test_the_unconditional_branch_is_told_nothing(drawn):
    *_, conditional, result = drawn
    without = conditional.flatten() == 0
    assert 700 < without.sum() < 900
    tokens = controls.tokens(result.tracks, result.features, 4, 3)
    assert not tokens[without].any() and not result.features[without].any()


def test_each_kind_is_left_out_at_random(drawn):
    features, motion, hits, stranger, conditional, result = drawn
    n = conditional.sum().item()
    told = result.tracks.told.flatten() == 1
    seen = result.tracks.seen.flatten() == 1
    assert torch.equal(result.own, 1 - stranger)
    own = (stranger == 0) & (conditional.flatten() == 1)
    assert abs(told[own].float().mean() - 0.5) < 0.03
    assert abs((seen & ~told).sum() / (n - told.sum()) - 0.75) < 0.03
    # the network must also know both kinds of silence: no hits told, and nothing told of them
    assert (seen & told).any() and (~seen & ~told).any()
    named = result.tracks.materials.any(2).any(1)
    assert 0.5 < named.sum() / n < 0.65
    # strengths: all known or all open
    given = result.tracks.hits
    struck = hits != 0
    assert torch.equal(given[~struck], torch.zeros_like(given[~struck]))
    either = torch.where(struck, given == -1, True).all(1) | torch.where(
        struck, given == hits, True
    ).all(1)
    assert either.all()
    # the head: either input alone, both, and what it is to find is never changed
    assert torch.equal(result.hits, hits)
    blind = ~result.head_features.any(2).any(1)
    still = ~result.head_motion.any(1)
    assert abs(blind.float().mean() - 0.3) < 0.03 and abs(still.float().mean() - 0.4) < 0.03
    assert (~blind & ~still).any()


def test_who_sees_a_stranger_is_told_everything(drawn):
    *_, stranger, conditional, result = drawn
    stranger = (conditional.flatten() == 1) & (stranger == 1)
    assert (result.tracks.told.flatten()[stranger] == 1).all()
    assert result.tracks.materials[stranger].any(2).all()


def test_the_curve_is_late_or_early_and_has_gaps(drawn):
    *_, result = drawn
    logits = torch.full((4000, 64), -20.0)
    logits[:, 30] = 20.0
    curve = controls.shown_curve(logits, result)
    place = curve.argmax(1)[curve.amax(1) > 0.5] - 30
    assert sorted(place.unique().tolist()) == [-2, -1, 0, 1, 2]
    lost = (curve.amax(1) < 0.5).float().mean()
    assert 0.03 < lost < 0.1


def test_the_head_learns_from_features_and_from_motion():
    torch.manual_seed(0)
    head = controls.OnsetHead(8, 4, hidden=16)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    direction = torch.nn.functional.normalize(torch.randn(8), dim=0)

    def batch():
        hits = (torch.rand(16, 64) < 0.03).float()
        seen = hits.unflatten(1, (16, 4)).amax(2)[..., None]  # which feature has one
        return seen * direction, hits, hits

    for _ in range(150):
        features, motion, hits = batch()
        motion = motion * (torch.rand(16, 1) < 0.5)
        loss = controls.onset_loss(head(features, motion), hits).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    features, motion, hits = batch()
    both = head(features, motion).sigmoid()
    assert both[hits > 0].mean() > 0.6 and both[hits == 0].mean() < 0.15
    # from features alone it knows the feature, not the column
    alone = head(features, torch.zeros_like(motion)).sigmoid()
    assert alone[hits > 0].mean() > 2 * alone[hits == 0].mean()


def test_new_layers_change_nothing_until_they_are_trained():
    torch.manual_seed(0)
    config = PRESETS["mini"]
    small = replace(config.unet, width=16, multipliers=(1, 2), attention=(2,), heads=1, groups=4)
    model = LDM(replace(config, unet=small, materials=MATERIALS))
    features = torch.randn(2, 128, 512)
    tracks = controls.Tracks(hits=torch.rand(2, 512), told=torch.ones(1, 1, 1))
    told = model.tell(features, tracks)
    assert told.shape == (2, 128, 512 + controls.width(4, 3))
    assert torch.equal(model.conditioner(told), model.conditioner(features))
    # and then they do, where something is told
    torch.nn.init.normal_(model.conditioner.told.weight)
    assert not torch.allclose(model.conditioner(told), model.conditioner(features))
    nothing = model.tell(features, controls.Tracks())
    assert torch.equal(model.conditioner(nothing), model.conditioner(features))
    with pytest.raises(ValueError, match=r"wanted is \(b, frames, 512\)"):
        model.conditioner(torch.randn(1, 128, 513))
    # the published network cannot be told anything
    plain = LDM(replace(config, unet=small, columns=0, materials=()))
    assert plain.tell(features, tracks) is features
    assert not any("told" in name or "onset" in name for name in plain.state_dict())
