"""data.py: mel and its inverse against goldens and by ear's measures, training clips."""
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors

import data
from test_media import clicks, make, one_line, onsets, seen, steady

GOLDEN = Path(__file__).parent / "golden" / "audio.safetensors"
ROOT = Path(__file__).parent.parent


# ---- mel and vocoder -----------------------------------------------------------------------------------------------

def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_mel_equals_the_golden():
    golden = load_file(GOLDEN)
    assert relative(data.mel_basis(), golden["mel_basis_16k"]) < 1e-6
    mel = data.mel(golden["waveform"])
    assert mel.shape == (128, 512)
    assert relative(mel[:, ::4], golden["mel_every4"]) < 1e-4
    assert relative(mel[:, -3:], golden["mel_last3"]) < 1e-4     # where reflection differs from zero padding


@pytest.mark.parametrize("n", [1, 255, 256, 257, 513, 514, 5000, 131072])
def test_mel_columns(n):
    wav = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(n)) * 0.1
    mel = data.mel(wav)
    assert mel.shape == (2, 3, 128, -(-n // 256)) and 0 <= mel.min() and mel.max() <= 1
    torch.testing.assert_close(mel[1, 2], data.mel(wav[1, 2]), atol=1e-5, rtol=0)


def test_inverse_filterbank_meets_the_mel():
    mel = data.mel(load_file(GOLDEN)["waveform"])[None]
    back = data.mel_basis() @ data.mel_to_magnitude(mel)
    target = torch.where(mel > 0, 10 ** (5 * mel - 4), 0.0)
    assert relative(back, target) < 0.002                        # librosa's solver leaves 0.049 here


@pytest.mark.parametrize("hz", [250, 1000, 3000])
def test_a_tone_keeps_its_pitch(hz):
    tone = 0.5 * torch.sin(2 * torch.pi * hz * torch.arange(65536) / 16000)
    back = data.vocode(data.mel(tone))
    assert back.shape == tone.shape
    peak = torch.fft.rfft(back * torch.hann_window(len(back))).abs().argmax().item() * 16000 / len(back)
    assert abs(peak - hz) < max(0.005 * hz, 4)
    assert 0.5 < back.square().mean().sqrt() / tone.square().mean().sqrt() < 1.5


def test_vocoder_closes_the_circle_and_keeps_onsets():
    golden = load_file(GOLDEN)["waveform"]
    mel = data.mel(golden)
    assert (data.mel(data.vocode(mel)) - mel).abs().mean() < 0.03
    times = [0.5, 1.25, 2.0, 3.1]
    noise = torch.randn(1600, generator=torch.Generator().manual_seed(0)) * torch.exp(-torch.arange(1600) / 300)
    wav = torch.zeros(65536)
    for time in times:
        wav[round(time * 16000):][:1600] += 0.3 * noise
    back = data.vocode(data.mel(wav))
    assert np.abs(onsets(back) - times).max() < 0.016


def test_silence_stays_silence():
    mel = torch.zeros(2, 128, 64)
    mel[1, 40:50, 20:30] = 0.6
    back = data.vocode(mel)
    assert back[0].abs().max() == 0 and back[1].abs().max() > 0.001
    assert back[1, 40 * 256:].abs().max() < 1e-6


def test_vocoder_does_not_depend_on_the_batch_but_on_the_seed():
    mel = torch.rand(3, 128, 48, generator=torch.Generator().manual_seed(5)) * 0.7
    alone, together = data.vocode(mel[2], seed=3), data.vocode(mel.view(3, 1, 128, 48), seed=3)
    assert together.shape == (3, 1, 48 * 256)
    assert torch.equal(alone, together[2, 0])
    assert not torch.allclose(alone, data.vocode(mel[2], seed=4), atol=1e-3)
    assert data.vocode(mel[0], iterations=2, length=5000).shape == (5000,)
    assert data.vocode(mel[0, :, :1], iterations=2).shape == (256,)


# ---- training sets -------------------------------------------------------------------------------------------------

FPS = 15.625


def flash_clip(path, moment, seconds=3.0):
    """White for 40 ms and a click, both at `moment`."""
    times = steady(125, seconds)
    levels = [235 if 0 <= time - moment < 0.04 else 30 for time in times[:-1]]
    return make(path, times, levels, wav=clicks(seconds, [moment]), size=(32, 32))


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    (folder / "sub").mkdir()
    for k, name in enumerate(("c.mp4", "a.mp4", "sub/b.mp4")):
        flash_clip(folder / name, 1.0 + 0.4 * k)
    flash_clip(folder / "short.mp4", 0.3, 0.6)
    make(folder / "mute.mp4", steady(25, 3))
    (folder / "broken.mp4").write_bytes(b"\0" * 100)
    (folder / "a.foley.mp4").write_bytes((folder / "a.mp4").read_bytes())
    return folder


def test_prepare_is_the_same_for_any_number_of_workers(raw, tmp_path):
    data.prepare(raw, tmp_path / "1", FPS, 32)
    done = subprocess.run([sys.executable, "data.py", "prepare", str(raw), str(tmp_path / "3"), "--size", "32",
                           "--workers", "3"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "broken.mp4" in done.stderr and "Traceback" not in done.stderr, done.stderr
    one, three = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "13")
    assert one == three and sorted(one) == ["index.json", "shard-00000.safetensors"]
    index = json.loads(one["index.json"])
    assert [clip["name"] for clip in index["clips"]] == ["a.mp4", "c.mp4", "short.mp4", "sub/b.mp4"]
    assert [clip["name"] for clip in index["left_out"]] == ["broken.mp4", "mute.mp4"]


@pytest.mark.parametrize("kind", ["plain", "prepared"])
def test_clips_keep_picture_and_sound_together(raw, tmp_path, kind):
    root = raw
    if kind == "prepared":
        data.prepare(raw, tmp_path / "set", FPS, 32)
        root = tmp_path / "set"
    with pytest.warns(UserWarning, match="left out"):
        clips = data.Clips(root, FPS, 32, frames=20, seed=1)
    assert len(clips) == 3
    both = 0
    for index in range(12):                                      # four epochs
        item = clips[index]
        assert item["video"].shape == (20, 3, 32, 32) and item["wav"].shape == (20480,)
        assert torch.equal(item["video"], clips[index]["video"]) and torch.equal(item["wav"], clips[index]["wav"])
        light = seen(item["video"])
        if light.max() > 120 and item["wav"].abs().max() > 0.4:
            flash, click = light.argmax() / FPS, onsets(item["wav"])[0]
            assert -1e-3 <= flash - click < 0.041                # the first frame taken within 40 ms of the click
            both += 1
    assert both >= 3 and len({clips[index]["start"] for index in range(12)}) > 4


def test_a_short_clip_is_padded(raw, tmp_path):
    data.prepare(raw, tmp_path / "set", FPS, 32)
    for root in (raw, tmp_path / "set"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                      # of the files that are no clips
            clips = data.Clips(root, FPS, 32, frames=20, random_start=False)
        items = [clips[i] for i in range(4)]
        item = next(item for item in items if item["name"] == "short.mp4")
        assert item["start"] == 0 and torch.equal(item["video"][-1], item["video"][9])
        assert item["wav"][12000:].abs().max() == 0 and onsets(item["wav"]) == pytest.approx([0.3], abs=2e-3)


def test_a_set_made_otherwise_names_the_command(raw, tmp_path):
    data.prepare(raw, tmp_path / "set", FPS, 32)
    with pytest.raises(data.MediaError) as caught:
        data.Clips(tmp_path / "set", 4, 32, frames=4)
    one_line(caught, "--fps 4 --size 32")
    os.remove(tmp_path / "set" / "index.json")
    with pytest.raises(data.MediaError) as caught:
        data.Clips(tmp_path / "set", FPS, 32, frames=4)
    one_line(caught, "prepare again")


def test_clips_in_worker_processes(raw, tmp_path):
    data.prepare(raw, tmp_path / "set", FPS, 32)
    clips = data.Clips(tmp_path / "set", FPS, 32, frames=8, random_start=False)
    here = [clips[i]["video"] for i in range(len(clips))]        # opens the shard here, before the workers start
    loader = torch.utils.data.DataLoader(clips, batch_size=1, num_workers=2)
    assert all(torch.equal(a["video"][0], b) for a, b in zip(loader, here, strict=True))


# ---- windows for stage 2 and for the autoencoder --------------------------------------------------------------------

FPS = 15.625                                     # 1024 samples a frame


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """Three extracted clips whose features and sound both say which clip and which frame they belong to."""
    folder = tmp_path_factory.mktemp("features")
    for k in range(3):
        frame = torch.arange(160) + 200 * k                                          # (f,)
        save_tensors({"features": frame[:, None].half().expand(-1, 512).contiguous(),
                      "sound": frame.to(torch.int16).repeat_interleave(1024)}, folder / f"{k}.safetensors", {"fps": str(FPS)})
    return folder


def spoken(item):
    """The frame number that the sound of each feature says: its samples must all agree."""
    sound = (item["wav"] * 32767).round().view(-1, 1024)
    assert (sound == sound[:, :1]).all()
    return sound[:, 0]


@pytest.mark.parametrize("kind", [{}, {"merge": 1.0}, {"roll": 1.0}, {"merge": 1.0, "roll": 1.0}])
def test_pairs_keep_sound_and_features_together(extracted, kind):
    pairs = data.Pairs(extracted, FPS, 128, **kind)
    joins, seams = set(), set()
    for index in range(24):
        item = pairs[index]
        assert item["features"].shape == (128, 512) and item["wav"].shape == (data.WINDOW,)
        frame = item["features"][:, 0]
        assert torch.equal(frame, spoken(item))
        jumps = (frame.diff() != 1).nonzero().flatten().tolist()
        joins.add(len(jumps))
        seams.update(jumps)
    assert max(joins) == {0: 0, 1: 1, 2: 2}[len(kind)] and len(seams) >= 5 * len(kind)


def test_pairs_are_a_function_of_seed_and_index(extracted):
    a, b = (data.Pairs(extracted, FPS, 128, merge=0.5, roll=0.5, seed=seed) for seed in (1, 1))
    other = data.Pairs(extracted, FPS, 128, merge=0.5, roll=0.5, seed=2)
    assert all(torch.equal(a[k]["wav"], b[k]["wav"]) for k in range(9))
    assert any(not torch.equal(a[k]["wav"], other[k]["wav"]) for k in range(9))
    assert not torch.equal(a[0]["wav"], a[3]["wav"])                                 # the same clip one epoch later


def test_pairs_name_the_remedy(extracted, tmp_path):
    with pytest.raises(data.MediaError, match="--extract"):
        data.Pairs(tmp_path, FPS, 128)
    with pytest.raises(data.MediaError, match="15.625"):
        data.Pairs(extracted, 4.0, 32)


def test_sounds_start_on_mel_columns(tmp_path):
    ramp = (torch.arange(3 * data.HOP * 64) // data.HOP).to(torch.int16).numpy()       # each sample says its mel column
    frames = np.zeros((1, 3, 2, 2), np.uint8)
    (tmp_path / "shard-00000.safetensors").write_bytes(data.to_safetensors({"a/frames": frames, "a/sound": ramp}))
    (tmp_path / "index.json").write_text(json.dumps(
        {"fps": 4, "size": 2, "clips": [{"name": "a", "shard": 0, "frames": 1, "samples": len(ramp)}], "left_out": []}))
    sounds = data.Sounds(tmp_path, 64 * data.HOP)
    starts = {int((sounds[k]["wav"][0] * 32767).round()) for k in range(20)}
    assert len(starts) > 10
    for k in range(5):
        columns = (sounds[k]["wav"] * 32767).round().view(-1, data.HOP)
        assert (columns == columns[:, :1]).all() and (columns[:, 0].diff() == 1).all()
