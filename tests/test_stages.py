"""What the training loops feed their networks: cut clips, weights, matched and wrong pairs."""

import dataclasses

import pytest
import torch

import align
import cavp
import data
import ldm
import vae
from common import audio


@pytest.mark.parametrize("preset", ["mini", "paper"])
def test_clips_are_cut_where_their_first_frame_starts(preset):
    config = dataclasses.replace(cavp.PRESETS[preset], size=2)
    frames = 40 if preset == "paper" else config.frames
    per_frame = round(audio.SAMPLE_RATE / config.fps)
    number = torch.arange(frames, dtype=torch.uint8)
    video = number[None, :, None, None, None].expand(2, -1, 3, 2, 2)
    wav = torch.zeros(2, frames * per_frame)
    wav[:, 24 * per_frame + per_frame // 2 :][:, :16] = 0.9  # a click in the middle of frame 24
    starts = cavp.clip_starts(2, config, torch.Generator().manual_seed(3))
    videos, mel = cavp.cut_clips(video, wav, config, starts)
    assert len(videos) == len(mel) == 2 * config.clips and videos.shape[1] == config.frames
    for clip, clip_mel in zip(videos[:, :, 0, 0, 0].long(), mel, strict=True):
        inside = (clip == 24).nonzero().flatten()
        if len(inside):
            # of the click, in frames of this clip
            time = clip_mel.mean(0).argmax().item() * audio.HOP / per_frame
            assert inside[0] <= time < inside[0] + 1
    if preset == "paper":
        starts = videos[:, 0, 0, 0, 0].long().view(2, 3)
        assert (
            (starts.diff(dim=1) >= 8).all()
            and (starts[:, 0] <= 8).all()
            and (starts[:, 2] <= 24).all()
        )


def test_loud_moments_weigh_and_silent_ones_are_still_negatives():
    mel = torch.zeros(1, 128, 64)
    mel[:, :, 21] = 0.5  # in the second of four segments
    weights = cavp.loudness_rise(mel, 4)
    assert weights.argmax() == 1 and weights[0, 1] > 100 * weights[0, [0, 2, 3]].max()
    g = torch.Generator().manual_seed(0)
    video, audio = (
        torch.nn.functional.normalize(torch.randn(4, 8, generator=g), dim=1).requires_grad_()
        for _ in range(2)
    )
    only_one = torch.tensor([0.0, 1.0, 0.0, 0.0])
    inter, intra = cavp.contrastive_loss(video, audio, 10.0, 2, only_one)
    logits = 10 * video @ audio.T
    by_hand = (
        sum(
            torch.nn.functional.cross_entropy(x[1:2], torch.tensor([1])) for x in (logits, logits.T)
        )
        / 2
    )
    assert torch.isclose(inter, by_hand)
    assert intra < inter  # two candidates instead of four
    inter.backward()
    assert (
        audio.grad[[0, 2, 3]].abs().sum(1) > 0
    ).all()  # pushed away although no anchors themselves


def test_pairings_are_what_their_labels_say():
    b, f = 400, 128
    clip = torch.arange(b)[:, None].expand(b, f)
    frame = torch.arange(f).expand(b, f)
    rng = torch.Generator().manual_seed(0)
    features, label = align.pairings(torch.stack([clip, frame], 2).float(), rng)
    same_clip = (features[:, :, 0] == clip).all(1)
    on_time = (features[:, :, 1] == frame).all(1)
    assert torch.equal(label[:, 0] == 1, same_clip & on_time)
    shifted = same_clip & ~on_time
    assert 0.4 < label.mean() < 0.6
    assert 0.15 < shifted.float().mean() < 0.35
    assert 0.15 < (~same_clip).float().mean() < 0.35
    first = features[shifted][:, 0, 1]
    shift = first.minimum(f - first)  # frames, the short way round
    assert shift.min() >= f // 40 and shift.max() > f // 3


@pytest.mark.parametrize(
    "network, config",
    [(ldm.UNet, ldm.PRESETS["mini"]), (align.Classifier, align.PRESETS["mini"])],
)
def test_aligned_condition_reaches_its_own_columns(network, config):
    """The mini preset's second path for the condition: tokens 2k and 2k+1 add to latent column k
    and to no other."""
    model, context = network(config.unet), torch.zeros(1, 128, 128)
    seen = []
    hook = model.input_blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for token in (None, 40, 41):
            if token is not None:
                context[0, token] = 1
            model(torch.zeros(1, 4, 16, 64), torch.zeros(1), context)
    hook.remove()
    changed = (seen[2] - seen[0]).abs().sum((0, 1, 2)) > 0
    assert changed.nonzero().flatten().tolist() == [20]


def test_the_v_loss_is_the_error_of_v():
    rng = torch.Generator().manual_seed(0)
    z, noise, wrong = torch.randn(3, 3, 4, 16, 64, generator=rng)
    t = torch.tensor([5, 400, 990])

    class Network:
        unet = staticmethod(lambda *_: noise + 0.1 * wrong)
        conditioner = staticmethod(lambda features: None)

    plain, v = (
        ldm.denoising_loss(Network, z, t, noise, None, v_loss=v_loss).item()
        for v_loss in (False, True)
    )
    a = ldm.ALPHAS_CUMPROD[t].view(-1, 1, 1, 1)
    # the clean latents that it implies
    clean = (ldm.q_sample(z, t, noise) - (1 - a).sqrt() * (noise + 0.1 * wrong)) / a.sqrt()
    error = (a.sqrt() * (0.1 * wrong) - (1 - a).sqrt() * (clean - z)).square().mean()
    assert plain == pytest.approx((0.1 * wrong).square().mean().item(), rel=1e-5)
    assert v == pytest.approx(error.item(), rel=1e-3)


def test_energy_weighting_counts_a_column_by_what_is_expected_there_not_by_what_is():
    """The same error costs more in a column that the network expects to be loud, within limits;
    and nothing flows back through the weight."""
    noise = torch.randn(1, 4, 16, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([500])
    a = ldm.ALPHAS_CUMPROD[t].view(-1, 1, 1, 1)
    # squares: 0.0001, 0.49, 4, 81
    expected = torch.tensor([0.01, 0.7, 2.0, 9.0]).expand(1, 4, 16, 4)

    def loss(z):
        noisy = ldm.q_sample(z, t, noise)
        # implies that the clean latents are `expected`
        eps = ((noisy - a.sqrt() * expected) / (1 - a).sqrt()).requires_grad_()

        class Network:
            unet = staticmethod(lambda *_: eps)
            conditioner = staticmethod(lambda features: None)

        value = ldm.denoising_loss(Network, z, t, noise, None, energy_weighting=True)
        return value.item(), torch.autograd.grad(value, eps)[0], eps.detach()

    for column, weight in enumerate((0.1, 0.49, 4.0, 8.0)):
        off = torch.zeros(4).index_fill(0, torch.tensor(column), 0.3)
        value, gradient, eps = loss(expected + off)
        error = (eps - noise).square().mean().item()
        assert value == pytest.approx(weight * error, rel=1e-3)
        torch.testing.assert_close(
            gradient, 2 * weight * (eps - noise) / eps.numel(), rtol=1e-3, atol=1e-6
        )


def test_a_timestep_shift_moves_the_times_up_without_leaving_any_out():

    def draws(shift):
        return ldm.sample_timesteps(100_000, shift, torch.Generator().manual_seed(0))

    uniform = torch.randint(0, 1000, (100_000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws(1), uniform)
    for shift in (1, 3):
        t = draws(shift)
        assert t.unique().tolist() == list(range(1000))
        quartiles = torch.quantile(t.float(), torch.tensor([0.25, 0.5, 0.75]))
        assert torch.allclose(
            quartiles,
            torch.tensor([1000 * shift * u / (1 + (shift - 1) * u) for u in (0.25, 0.5, 0.75)]),
            atol=6,
        )


@pytest.mark.parametrize(
    "decoded, error, delta",
    [(lambda x: x + 0.1, 0.1, 0.0), (lambda x: 0 * x, 0.5, 1.0), (lambda x: x, 0.0, 0.0)],
)
def test_the_autoencoders_errors(decoded, error, delta):
    """Columns that go up and down by 1: an even error leaves the time difference right, a blur to
    nothing makes it wrong at every column."""
    mel = torch.tensor([0.0, 1.0] * 8).expand(2, 1, 128, 16)

    class Network:
        encode = staticmethod(lambda x: (x.new_zeros(2, 4, 16, 2), x.new_zeros(2, 4, 16, 2)))
        decode = staticmethod(lambda z: decoded(mel))

    terms = vae.losses(Network, mel, torch.zeros(2, 4, 16, 2))
    torch.testing.assert_close(torch.stack(terms), torch.tensor([error, delta, 0.0]))


SMALL_VAE = vae.VAEConfig(channels=1, width=8, multipliers=(1, 1, 1, 1), blocks=1, groups=4)


@pytest.mark.parametrize(
    "script, flags, new, values",
    [
        (vae, ["--change", "2"], "--delta-weight", {"delta_weight": 2.0}),
        (ldm, ["--by-energy", "0"], "--energy-weighting", {"energy_weighting": False}),
        (ldm, ["--by-energy", "1"], "--energy-weighting", {"energy_weighting": True}),
        (ldm, ["--shift", "3"], "--timestep-shift", {"timestep_shift": 3.0}),
        (
            ldm,
            ["--no-v-loss", "--energy-weighting"],
            "",
            {"v_loss": False, "energy_weighting": True},
        ),
        (ldm, [], "", {"v_loss": None, "energy_weighting": None, "timestep_shift": None}),
    ],
)
def test_flags_and_their_old_spellings(monkeypatch, capsys, script, flags, new, values):
    parsed = []
    monkeypatch.setattr(script, "train", parsed.append)
    script.main(["--data", "x", *flags])
    assert values.items() <= vars(parsed[0]).items()
    said = capsys.readouterr().err
    assert said.count("\n") == bool(new) and new in said


def test_a_network_prints_as_one_line():
    model = vae.AutoencoderKL(SMALL_VAE)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert repr(model) == f"AutoencoderKL({millions:.1f} M parameters, float32, cpu)"
    assert repr(model.bfloat16()).endswith(" M parameters, bfloat16, cpu)")


def test_windows_are_contrasted_by_what_sounds_not_when():
    """Two windows with the same moments at other times: the third term is blind to it alone."""
    kinds = torch.eye(16)
    video = torch.stack([kinds[[0, 1, 2, 3]], kinds[[4, 5, 6, 7]]])
    shuffled, swapped = video[:, [1, 0, 3, 2]], video[[1, 0]]
    scale = torch.tensor(20.0)
    right, when, what = (
        cavp.contrast(video, sound, scale, None, 1.0)[1] for sound in (video, shuffled, swapped)
    )
    assert (
        right["window"] == when["window"] < 1e-3
        and what["window"] > 5
        and when["inter"] > right["inter"] + 5
    )
    assert "window" not in cavp.contrast(video, video, scale, None, 0.0)[1]


def test_without_the_temporal_contrast_no_moment_is_held_against_its_own_video():
    """Other moments of the right video cost nothing then, other videos as before."""
    rng = torch.Generator().manual_seed(0)
    video, sound = (
        torch.nn.functional.normalize(torch.randn(6, 8, generator=rng), dim=-1).requires_grad_()
        for _ in range(2)
    )
    inter, intra = cavp.contrastive_loss(video, sound, 3.0, 3, temporal=False)
    logits = (3.0 * video @ sound.T).detach()
    allowed = torch.tensor([[i == j or i // 3 != j // 3 for j in range(6)] for i in range(6)])
    by_hand = [
        0.5 * (logits[i, allowed[i]].logsumexp(0) + logits[allowed[:, i], i].logsumexp(0))
        - logits[i, i]
        for i in range(6)
    ]
    torch.testing.assert_close(inter, torch.stack(by_hand).mean())
    assert intra == 0 and inter < cavp.contrastive_loss(video, sound, 3.0, 3)[0]
    inter.backward()
    assert video.grad.isfinite().all() and video.grad.norm() > 0
    terms = cavp.contrast(
        video.detach().view(2, 3, 8),
        sound.detach().view(2, 3, 8),
        torch.tensor(3.0),
        None,
        0.0,
        temporal=False,
    )[1]
    torch.testing.assert_close(terms["loss"], inter)


def test_the_peak_of_a_map_is_seen_beside_its_mean():
    model = cavp.SlowOnly(
        cavp.CAVPConfig(size=32, video_width=4, video_blocks=(1, 1, 1, 1), peak=True)
    ).eval()
    plain = cavp.SlowOnly(cavp.CAVPConfig(size=32, video_width=4, video_blocks=(1, 1, 1, 1))).eval()
    plain.load_state_dict(model.state_dict())
    video = torch.rand(1, 4, 3, 96, 96)
    with torch.no_grad():
        both, mean = model(video), plain(video)
    assert both.shape[2] == 2 * mean.shape[2] and torch.equal(both[..., : mean.shape[2]], mean)
    assert (both[..., mean.shape[2] :] >= mean).all() and (both[..., mean.shape[2] :] > mean).any()


def test_hit_labels_are_of_segments_with_one_material():
    config = cavp.PRESETS["mini"]  # moments of 4 frames: 0.256 s
    hits = [
        (0.9, "wood"),
        (1.1, "wood"),
        (1.3, "glass"),
        (1.6, "wood"),
        (1.65, "glass"),
        (4.9, "glass"),
        (5.2, "wood"),
    ]
    labels = data.hit_labels(
        [{"time": t, "material": m} for t, m in hits], ["glass", "wood"], 1.0, config.fps, 4, 16
    )
    wanted = torch.full((16,), -1)
    # 0.9 and 5.2 are outside, the segment of 1.6 has both materials
    wanted[[0, 1, 15]] = torch.tensor([1, 0, 0])
    assert torch.equal(labels, wanted)


def test_the_label_loss_counts_labeled_segments_alone():
    """Both towers through one head; segments without a label have no gradient."""
    model = cavp.CAVP(
        cavp.CAVPConfig(
            fps=15.625,
            size=16,
            video_width=4,
            video_blocks=(1, 1, 1, 1),
            temporal=(False,) * 5,
            audio_widths=(4, 4, 8, 8, 8, 16),
            embed_dim=32,
            frames=16,
            clips=1,
            video_pool=4,
            audio_pool=1,
        )
    )
    model.label_head = torch.nn.Linear(32, 3)
    rng = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (2, 16, 3, 16, 16), generator=rng, dtype=torch.uint8)
    mel = torch.rand(2, 128, 64, generator=rng)
    label = torch.tensor([[0, -1, -1, -1], [-1, -1, 2, -1]])
    mirrored = torch.zeros(2, dtype=torch.bool)
    features = cavp.embed(model.eval(), video, mel, mirrored, torch.ones(2), label)
    towers = (features.video, features.audio)
    wanted = 0.0
    for x in towers:
        logits = model.label_head(32**0.5 * x[[0, 1], [0, 2]])
        error = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2]), reduction="sum")
        wanted += error.item()
    assert features.label_loss.item() == pytest.approx(wanted, rel=1e-5)
    for x in towers:
        x.retain_grad()
    features.label_loss.backward()
    for x in towers:
        assert torch.equal(x.grad.abs().sum(2) > 0, label >= 0)
