"""What stage 2 is told beside the features: hits and materials as tracks, the onset head, and what
training leaves out."""

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
    # of several in a column the strongest, whose strength may be open
    close = [Hit(0.032, 0.25), Hit(0.033, 0.75), Hit(0.034, 0.5), Hit(0.064), Hit(0.065, 0.5)]
    assert controls.track_hits(close, 5).tolist() == [0, 0, 0.75, 0, 0.5]


def test_a_material_holds_up_to_the_middle_between_two_hits():
    hits = [Hit(0.1, None, "glass"), Hit(0.3), Hit(0.62, None, "wood")]
    # features of 0.1 s, by their middles; the second hit leaves its material open
    assert controls.track_materials(hits, MATERIALS, 6, 0.1).tolist() == [2, 2, -1, -1, -1, 0]
    assert controls.track_materials(hits[:1], MATERIALS, 3, 0.1).tolist() == [2, 2, 2]
    assert controls.track_materials([], MATERIALS, 3, 0.1).tolist() == [-1, -1, -1]
    hot = controls.one_hot(torch.tensor([[2, -1]]), 3)
    assert hot.tolist() == [[[0, 0, 1], [0, 0, 0]]]


def test_hits_are_the_single_peaks_above_even_odds():
    logits = np.full(60, -5.0)
    logits[0] = 3
    logits[20:23] = (1, 2, 2)
    logits[24] = 1.5  # too near to a higher one
    logits[40] = -0.5

    def found(*given):
        return [round(hit.time / COLUMN) for hit in controls.find_hits(*given, 60)]

    assert found(logits, None) == [0, 21]
    # of the motion alone; a frame is two and a half columns
    motion = np.full(25, -4.0)
    motion[16] = 2.0
    assert found(None, motion) == [40]
    # neither says anything
    assert found(None, np.full(25, -1.0)) == [] and found(np.full(70, -1.0), None) == []


def bumps(*columns):
    """Log odds of 2 at these mel columns, -4 elsewhere; as an onset head's, and as the motion's."""
    head = np.full(250, -4.0)
    for column in columns:
        head[column - 1 : column + 2] = (1.5, 2.0, 1.5)
    frames = np.arange(100) / 25
    nearest = np.abs(frames[:, None] - COLUMN * np.array(columns, float)).min(1, initial=9)
    return head, np.where(nearest < 0.021, 2.0, -4.0)


def test_the_head_counts_as_far_as_the_motion_agrees():
    def found(head, motion):
        return [round(hit.time / COLUMN) for hit in controls.find_hits(head, motion, 250)]

    head, motion = bumps(20, 60, 100, 150, 200)
    # where they agree the head is believed, with a hit that the motion does not show
    head[125] = 2.0
    motion[90] = 2.0  # column 225, where the head knows of none
    assert controls.agreement(*on_columns(head, motion)) > controls.FAMILIAR
    assert found(head, motion) == [20, 60, 100, 125, 150, 200]
    # where they do not, it is not asked: what it was trained on looked otherwise
    strange, _ = bumps(40, 80, 120, 170, 220)
    assert controls.agreement(*on_columns(strange, motion)) < controls.STRANGE
    assert found(strange, motion) == found(None, motion)
    # two that find nothing agree
    silent = np.full(250, -9.0)
    assert controls.agreement(silent, silent) == pytest.approx(1)


def on_columns(head, motion):
    return head, controls.log_odds(None, motion, len(head))


def test_tokens_are_laid_out_as_documented():
    features = torch.zeros(1, 2, 5)
    tracks = controls.Tracks(
        hits=torch.tensor([[0, 0.5, 0, 0, -1.0, 0, 0, 0]]),
        given=torch.ones(1, 1, 1),
        materials=controls.one_hot(torch.tensor([[1, 0]]), 3),
    )
    first, second = controls.tokens(tracks, features, 4, 3)[0].tolist()
    assert first == [0, 1, 0, 0] + [0, 0.5, 0, 0] + [1] + [0, 1, 0]
    assert second == [1, 0, 0, 0] + [0, 0, 0, 0] + [1] + [1, 0, 0]
    assert len(first) == controls.width(4, 3)
    # hits that are not told are not there, and no tracks are zeros
    silent = tracks._replace(given=None, materials=None)
    assert not controls.tokens(silent, features, 4, 3).any()
    assert not controls.tokens(controls.Tracks(), features, 4, 3).any()


def test_the_picture_fades_where_a_person_names_a_material():
    features = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    opened = torch.cat([features, torch.ones(2, 3, 2), torch.zeros(2, 3, 2)], 2)
    conditions = opened.clone()
    conditions[1, 2, 8] = 1  # in one frame
    faded, faded_open = controls.fade_picture(conditions, opened, features)
    assert torch.equal(faded[1, 2, :5], controls.SEEN * features[1, 2])
    assert torch.equal(faded_open[..., :5], faded[..., :5])
    # nothing else has changed, and without a name nothing at all
    faded[1, 2, :5] = features[1, 2]
    assert torch.equal(faded, conditions)
    assert controls.fade_picture(conditions, None, features) == (conditions, None)


@pytest.fixture(scope="module")
def drawn():
    """4,000 items, what they could be told, and what of it training tells them."""
    rng = torch.Generator().manual_seed(0)
    n = 4000
    features = torch.randn(n, 16, 4, generator=rng)
    hits = (torch.rand(n, 64, generator=rng) < 0.1) * torch.rand(n, 64, generator=rng)
    materials = torch.randint(0, 3, (n, 16), generator=rng)
    stranger = (torch.rand(n, generator=rng) < 0.15).float()
    conditional = (torch.rand(n, 1, 1, generator=rng) >= 0.2).float()
    u = torch.rand(n, 4, generator=rng)
    seen, tracks = controls.draw(features, hits, materials, stranger, 3, conditional, u)
    return hits, stranger == 1, conditional.flatten() == 1, features, seen, tracks


def test_the_unconditional_branch_is_told_nothing(drawn):
    *_, conditional, features, seen, tracks = drawn
    assert 700 < (~conditional).sum() < 900
    tokens = controls.tokens(tracks, seen, 4, 3)
    assert not tokens[~conditional].any() and not seen[~conditional].any()
    assert torch.equal(seen[conditional], features[conditional])


def test_each_kind_is_left_out_at_random(drawn):
    hits, stranger, conditional, _, _, tracks = drawn
    own = ~stranger & conditional
    told = tracks.given.flatten() == 1
    named = tracks.materials.any(2).any(1)
    assert abs(told[own].float().mean() - 0.5) < 0.03
    assert abs(named[own].float().mean() - 0.5) < 0.03
    # every combination of the two
    assert all(
        ((told == a) & (named == b))[own].any() for a in (True, False) for b in (True, False)
    )
    # strengths: of an item all known, or all open
    struck = hits != 0
    assert not tracks.hits[~struck].any()
    is_open = torch.where(struck, tracks.hits == -1, True).all(1)
    is_known = torch.where(struck, tracks.hits == hits, True).all(1)
    assert (is_open | is_known).all()
    assert abs(is_open.float().mean() - 0.25) < 0.03
    # materials: of the nearest hit, or the same at any time
    constant = (tracks.materials == tracks.materials[:, :1]).all(2).all(1)
    assert 0.4 < constant[named & own].float().mean() < 0.6


def test_with_another_clips_features_an_item_is_told_everything(drawn):
    _, stranger, conditional, _, _, tracks = drawn
    assert (tracks.given.flatten()[stranger & conditional] == 1).all()
    assert tracks.materials[stranger & conditional].any(2).all()


def test_the_head_learns_where_onsets_are():
    torch.manual_seed(0)
    head = controls.Head(8, 4, hidden=16)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    directions = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)

    def batch():
        hits = (torch.rand(16, 64) < 0.03).float()
        return hits.unflatten(1, (16, 4)) @ directions, hits  # each column its own direction

    for _ in range(150):
        features, hits = batch()
        loss = controls.onset_loss(head(features).flatten(1), hits).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    features, hits = batch()
    found = head(features).flatten(1).sigmoid()
    far = torch.nn.functional.max_pool1d(hits[:, None], 3, 1, 1)[:, 0] == 0
    assert found[hits > 0].mean() > 0.7 and found[far].mean() < 0.2


def test_the_other_head_learns_what_is_hit():
    """From features near hits alone: what is said far from any does not count."""
    torch.manual_seed(0)
    head = controls.Head(8, 3, hidden=16)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    directions = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)

    def batch():
        hits = (torch.rand(16, 64) < 0.05).float()
        materials = torch.randint(-1, 3, (16, 1)).expand(16, 16)
        shown = directions[materials.clamp_min(0)]
        # elsewhere the picture shows another material
        is_hit = hits.view(16, 16, 4).amax(2)
        near = torch.nn.functional.max_pool1d(is_hit[:, None], 3, 1, 1)[:, 0]
        other = directions[(materials.clamp_min(0) + 1) % 3]
        return torch.where(near[..., None] == 1, shown, other), hits, materials

    for _ in range(100):
        features, hits, materials = batch()
        loss = controls.material_loss(head(features), materials, hits)
        assert (loss[(materials[:, 0] < 0) | ~hits.any(1)] == 0).all()
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    features, hits, materials = batch()
    at = (hits.view(16, 16, 4).amax(2) == 1) & (materials >= 0)
    assert (head(features).argmax(2) == materials)[at].float().mean() > 0.9


def test_hits_are_named_where_the_head_is_sure():
    logits = np.zeros((20, 3), np.float32)
    logits[4:7, 1] = 3
    logits[10:13, 2] = 0.3  # too little to be sure
    logits[19, 0] = 9
    hits = [Hit(0.5), Hit(0.55, None, "glass"), Hit(1.1), Hit(1.99), Hit(2.5)]
    named = controls.name_materials(hits, logits, ("wood", "metal", "glass"), 0.1)
    # what a person has said stays
    assert [hit.material for hit in named] == ["metal", "glass", None, "wood", "wood"]
    assert [hit.is_guess for hit in named] == [True, False, False, True, True]
    assert [hit.time for hit in named] == [hit.time for hit in hits]


def test_new_layers_change_nothing_until_they_are_trained():
    torch.manual_seed(0)
    config = PRESETS["mini"]
    small = replace(config.unet, width=16, multipliers=(1, 2), attention=(2,), heads=1, groups=4)
    model = LDM(replace(config, unet=small, materials=MATERIALS))
    features = torch.randn(2, 128, 512)
    tracks = controls.Tracks(hits=torch.rand(2, 512), given=torch.ones(1, 1, 1))
    told = model.with_controls(features, tracks)
    assert told.shape == (2, 128, 512 + controls.width(4, 3))
    assert torch.equal(model.conditioner(told), model.conditioner(features))
    # and then they do, where something is told
    torch.nn.init.normal_(model.conditioner.controls.weight)
    assert not torch.allclose(model.conditioner(told), model.conditioner(features))
    nothing = model.with_controls(features, controls.Tracks())
    assert torch.equal(model.conditioner(nothing), model.conditioner(features))
    with pytest.raises(ValueError, match=r"wanted is \(b, frames, 512\)"):
        model.conditioner(torch.randn(1, 128, 513))
    # materials alone can be left open again
    materials = torch.zeros(2, 128, 3)
    materials[:, 5, 1] = 1
    named = model.with_controls(features, tracks._replace(materials=materials))
    assert torch.equal(model.without_materials(named), model.with_controls(features, tracks))
    assert model.without_materials(model.with_controls(features, tracks)) is None
    # the published network cannot be told anything
    plain = LDM(replace(config, unet=small, columns=0, materials=()))
    assert plain.with_controls(features, tracks) is features
    assert plain.without_materials(features) is None
    assert not any("controls" in name or "onset" in name for name in plain.state_dict())
