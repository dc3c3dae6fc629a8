"""Melception: names, shapes and arithmetic of the network, its mels, the scores, one evaluation."""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
import foley
from common import audio, media
from metrics import judge, melception
from metrics.melception import Melception

ROOT = Path(evaluate.__file__).parent

# torchvision/models/inception.py, one convolution a word: name, channels in and out, kernel; "c"
# and "w" stand for a block's own
A = """
branch1x1:c-64-1x1
branch5x5_1:c-48-1x1 branch5x5_2:48-64-5x5
branch3x3dbl_1:c-64-1x1 branch3x3dbl_2:64-96-3x3 branch3x3dbl_3:96-96-3x3
branch_pool:c-w-1x1"""
B = """
branch3x3:288-384-3x3
branch3x3dbl_1:288-64-1x1 branch3x3dbl_2:64-96-3x3 branch3x3dbl_3:96-96-3x3"""
C = """
branch1x1:768-192-1x1
branch7x7_1:768-w-1x1 branch7x7_2:w-w-1x7 branch7x7_3:w-192-7x1
branch7x7dbl_1:768-w-1x1 branch7x7dbl_2:w-w-7x1 branch7x7dbl_3:w-w-1x7 branch7x7dbl_4:w-w-7x1
branch7x7dbl_5:w-192-1x7
branch_pool:768-192-1x1"""
D = """
branch3x3_1:768-192-1x1 branch3x3_2:192-320-3x3
branch7x7x3_1:768-192-1x1 branch7x7x3_2:192-192-1x7 branch7x7x3_3:192-192-7x1
branch7x7x3_4:192-192-3x3"""
E = """
branch1x1:c-320-1x1
branch3x3_1:c-384-1x1 branch3x3_2a:384-384-1x3 branch3x3_2b:384-384-3x1
branch3x3dbl_1:c-448-1x1 branch3x3dbl_2:448-384-3x3
branch3x3dbl_3a:384-384-1x3 branch3x3dbl_3b:384-384-3x1
branch_pool:c-192-1x1"""
STEM = """
Conv2d_1a_3x3:1-32-3x3 Conv2d_2a_3x3:32-32-3x3 Conv2d_2b_3x3:32-64-3x3
Conv2d_3b_1x1:64-80-1x1 Conv2d_4a_3x3:80-192-3x3"""
BLOCKS = {
    "Mixed_5b": (A, 192, 32),
    "Mixed_5c": (A, 256, 64),
    "Mixed_5d": (A, 288, 64),
    "Mixed_6a": (B, 0, 0),
    "Mixed_6b": (C, 0, 128),
    "Mixed_6c": (C, 0, 160),
    "Mixed_6d": (C, 0, 160),
    "Mixed_6e": (C, 0, 192),
    "Mixed_7a": (D, 0, 0),
    "Mixed_7b": (E, 1280, 0),
    "Mixed_7c": (E, 2048, 0),
    "AuxLogits": ("conv0:768-128-1x1 conv1:128-768-5x5", 0, 0),
}


def published_shapes():
    words = [("", word, 0, 0) for word in STEM.split()]
    words += [
        (f"{block}.", word, c, w)
        for block, (table, c, w) in BLOCKS.items()
        for word in table.split()
    ]
    shapes = {}
    for block, word, c, w in words:
        name, numbers = word.split(":")
        c_in, c_out, kernel = numbers.split("-")
        c_in, c_out = ({"c": c, "w": w}.get(n) or int(n) for n in (c_in, c_out))
        shapes[f"{block}{name}.conv.weight"] = (c_out, c_in, *map(int, kernel.split("x")))
        shapes |= {
            f"{block}{name}.bn.{part}": (c_out,)
            for part in ("weight", "bias", "running_mean", "running_var")
        }
        shapes[f"{block}{name}.bn.num_batches_tracked"] = ()
    return shapes | {
        "fc.weight": (309, 2048),
        "fc.bias": (309,),
        "AuxLogits.fc.weight": (309, 768),
        "AuxLogits.fc.bias": (309,),
    }


@pytest.fixture(scope="module")
def model():
    """Weights by chance, no two norms alike."""
    torch.manual_seed(0)
    model = Melception().eval()
    for name, tensor in model.state_dict().items():
        if ".bn." in name and tensor.ndim:
            tensor.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else tensor.normal_(
                0, 0.3
            )
    for unit in model.modules():
        if isinstance(unit, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(unit.weight)
    return model


@pytest.fixture(scope="module")
def published(model, tmp_path_factory):
    """A file of SpecVQGAN's layout, and its bands' statistics."""
    path = tmp_path_factory.mktemp("melception") / "melception.pt"
    moments = {0: {"step": 3, "exp_avg": torch.ones(4)}}
    torch.save(
        {
            "loss": 1.5,
            "metrics": {"accuracy_1": np.float64(0.44)},
            "epoch": 7,
            "optimizer": {"state": moments, "param_groups": [{"lr": 3e-4}]},
            "model": OrderedDict(model.state_dict()),
        },
        path,
    )
    rng = np.random.default_rng(0)
    np.savetxt(
        path.with_name(melception.STATISTICS),
        np.stack([rng.uniform(0.2, 0.5, 80), rng.uniform(0.08, 0.1, 80)], 1),
        fmt="%0.8f",
    )
    return path


# --------------------------------------------------------------------------------------------------
# the network


def test_names_shapes_and_count_are_torchvisions(model):
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == published_shapes()
    # torchvision states 27,161,264 for 3 channels and 1000 classes, the auxiliary head's included
    expected = 27_161_264 - 2 * 9 * 32 - (1000 - 309) * (2048 + 1 + 768 + 1)
    assert sum(p.numel() for p in model.parameters()) == expected == 25_213_450


def test_maps_have_the_sizes_that_specvqgan_notes():
    """Those in the comments of its melception.py, for 848 columns; nothing is computed."""
    sizes, meta = {}, Melception().to("meta").eval()
    for name, part in meta.named_children():
        part.register_forward_hook(
            lambda _part, _in, out, name=name: sizes.update({name: tuple(out.shape[1:])})
        )
    features, unbiased, logits = meta(torch.empty(2, 80, 848, device="meta"))
    assert (features.shape, unbiased.shape, logits.shape) == ((2, 2048), (2, 309), (2, 309))
    assert sizes == {
        "Conv2d_1a_3x3": (32, 39, 423),
        "Conv2d_2a_3x3": (32, 37, 421),
        "Conv2d_2b_3x3": (64, 37, 421),
        "Conv2d_3b_1x1": (80, 37, 421),
        "Conv2d_4a_3x3": (192, 35, 419),
        "Mixed_5b": (256, 35, 419),
        "Mixed_5c": (288, 35, 419),
        "Mixed_5d": (288, 35, 419),
        "Mixed_6a": (768, 17, 209),
        "Mixed_6b": (768, 17, 209),
        "Mixed_6c": (768, 17, 209),
        "Mixed_6d": (768, 17, 209),
        "Mixed_6e": (768, 17, 209),
        "Mixed_7a": (1280, 8, 104),
        "Mixed_7b": (2048, 8, 104),
        "Mixed_7c": (2048, 8, 104),
    }


def plainly(w, x):
    """The same network as its formulas stand in torchvision, from a state dict."""

    def conv(name, x, stride=1, same=True):
        kernel, bn = w[f"{name}.conv.weight"], f"{name}.bn."
        padding = (kernel.shape[2] // 2, kernel.shape[3] // 2) if same else 0
        scale = w[bn + "weight"] / torch.sqrt(w[bn + "running_var"] + 0.001)
        y = (
            F.conv2d(x, kernel, stride=stride, padding=padding)
            - w[bn + "running_mean"][:, None, None]
        )
        return (y * scale[:, None, None] + w[bn + "bias"][:, None, None]).clamp(min=0)

    def chain(block, name, x, steps, halve=False):
        for k in range(1, steps + 1):
            x = conv(f"{block}.{name}_{k}", x, *((2, False) if halve and k == steps else ()))
        return x

    def fork(name, x):
        return [conv(f"{name}a", x), conv(f"{name}b", x)]

    def pooled(block, x):
        return conv(f"{block}.branch_pool", F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))

    x = conv("Conv2d_1a_3x3", x[:, None], 2, False)
    x = conv("Conv2d_2b_3x3", conv("Conv2d_2a_3x3", x, same=False))
    x = conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x), same=False)
    for m in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = torch.cat(
            [
                conv(f"{m}.branch1x1", x),
                chain(m, "branch5x5", x, 2),
                chain(m, "branch3x3dbl", x, 3),
                pooled(m, x),
            ],
            1,
        )
    m = "Mixed_6a"
    x = torch.cat(
        [
            conv(f"{m}.branch3x3", x, 2, False),
            chain(m, "branch3x3dbl", x, 3, True),
            F.max_pool2d(x, kernel_size=3, stride=2),
        ],
        1,
    )
    for m in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = torch.cat(
            [
                conv(f"{m}.branch1x1", x),
                chain(m, "branch7x7", x, 3),
                chain(m, "branch7x7dbl", x, 5),
                pooled(m, x),
            ],
            1,
        )
    m = "Mixed_7a"
    x = torch.cat(
        [
            chain(m, "branch3x3", x, 2, True),
            chain(m, "branch7x7x3", x, 4, True),
            F.max_pool2d(x, kernel_size=3, stride=2),
        ],
        1,
    )
    for m in ("Mixed_7b", "Mixed_7c"):
        x = torch.cat(
            [
                conv(f"{m}.branch1x1", x),
                *fork(f"{m}.branch3x3_2", conv(f"{m}.branch3x3_1", x)),
                *fork(f"{m}.branch3x3dbl_3", chain(m, "branch3x3dbl", x, 2)),
                pooled(m, x),
            ],
            1,
        )
    x = x.flatten(2).mean(2)
    return x, x @ w["fc.weight"].T, x @ w["fc.weight"].T + w["fc.bias"]


def test_a_file_of_specvqgans_layout_loads_and_computes_the_formulas(model, published):
    loaded = Melception.load(published)
    assert (
        all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
        and not loaded.training
    )
    mel = np.random.default_rng(1).random((80, 60))
    mean, deviation = np.loadtxt(published.with_name(melception.STATISTICS)).T
    x = np.array([(row - m) / d for row, m, d in zip(mel, mean, deviation, strict=True)])
    with torch.no_grad():
        expected = plainly(model.state_dict(), torch.tensor(x[None]).float())
    for got, plain in zip(loaded.embed_clip(mel), expected, strict=True):
        assert (
            got.shape == plain[0].shape
            and np.abs(got - plain[0].numpy()).max() < 1e-4 * plain.abs().max()
        )
    assert expected[0].std() > 1e-2  # there was something to compare
    assert loaded.embed_clip(mel[:, :1]).features.shape == (2048,)


def test_wrong_files_are_one_line(published, tmp_path):
    (tmp_path / "alone.pt").symlink_to(published)
    broken = tmp_path / "broken" / "melception.pt"
    broken.parent.mkdir()
    broken.symlink_to(published)
    broken.with_name(melception.STATISTICS).write_text("0.5 0.1\n" * 79)
    foley.make_set(tmp_path / "clips", 2, seed=3, size=64, fps=15.625, duration=4.0)
    for path, word in (
        (tmp_path / "none.pt", "no such checkpoint"),
        (tmp_path / "alone.pt", "vggishish/data"),
        (broken, "80 means"),
        (ROOT / "weights" / "mini" / "judge.safetensors", "not a checkpoint of Melception"),
    ):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(
                [
                    "--data",
                    str(tmp_path / "clips"),
                    "--samples",
                    str(tmp_path / "clips"),
                    "--official-melception",
                    str(path),
                    "--out",
                    str(tmp_path / "out"),
                ]
            )
        assert (
            str(stopped.value).startswith("evaluate.py:")
            and word in str(stopped.value)
            and "\n" not in str(stopped.value)
        )


# --------------------------------------------------------------------------------------------------
# sound to mel


def plain_filterbank(rate, bands, low, high):
    """Triangle by triangle."""

    def to_mel(hz):
        return hz / (200 / 3) if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)

    def to_hz(m):
        return m * 200 / 3 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27)

    edges = [
        to_hz(to_mel(low) + k * (to_mel(high) - to_mel(low)) / (bands + 1))
        for k in range(bands + 2)
    ]
    out = np.zeros((bands, 513))
    for band in range(bands):
        a, b, c = edges[band : band + 3]
        for k in range(513):
            hz = k * rate / 1024
            out[band, k] = max(0, min((hz - a) / (b - a), (c - hz) / (c - b))) * 2 / (c - a)
    return out, edges[1:-1]


def plain_mel(magnitude):
    return np.clip((20 * np.log10(np.maximum(1e-5, magnitude)) - 20 + 100) / 100, 0, 1)


def test_one_filterbank_of_all_ranges():
    for args in ((22050, 80, 125.0, 7600.0), (22050, 80, 0, 11025.0)):
        assert np.abs(melception.filterbank(*args) - plain_filterbank(*args)[0]).max() < 1e-14


def test_reference_mel_is_specvqgans():
    """Against frame after frame of the same tones sampled at 22,050 Hz."""
    tones, times = (
        [(440, 0.3, 0), (1000, 0.2, 1), (5123.4, 0.1, 2)],
        [np.arange(10 * rate) / rate for rate in (16000, 22050)],
    )
    slow, fast = (sum(a * np.sin(2 * np.pi * f * t + p) for f, a, p in tones) for t in times)
    basis, window = (
        plain_filterbank(22050, 80, 125, 7600)[0],
        0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024),
    )
    padded = np.pad(fast, 512, "reflect")
    expected = np.stack(
        [
            basis @ np.abs(np.fft.rfft(window * padded[256 * k : 256 * k + 1024]))
            for k in range(860)
        ],
        1,
    )
    got = melception.reference_mel(torch.tensor(slow))
    assert (
        got.shape == (80, 848) and np.abs(got - plain_mel(expected)[:, 6:854])[:, :-6].max() < 1e-3
    )
    assert np.array_equal(
        got, melception.reference_mel(np.concatenate([slow, slow]))
    )  # the first 10 s


def test_a_tone_lands_where_it_should():
    centres = np.array(plain_filterbank(22050, 80, 125, 7600)[1])
    wav = 0.5 * torch.sin(2 * torch.pi * 1000 * torch.arange(audio.WINDOW) / 16000)
    reference = melception.reference_mel(wav)
    generated = melception.generated_mel(audio.mel(wav))
    assert reference.shape == (80, 848)
    assert generated.shape == (80, 706)
    for mel in (reference, generated):
        assert mel.min() >= 0 and mel.max() <= 1
    assert reference[:, 300].argmax() == np.abs(centres - 1000).argmin()
    assert (
        not reference[:, round(8.3 * 22050 / 256) :].any() and reference[:, 690].any()
    )  # silence after the sound
    # transform_spec.py: 1 kHz is band 0.308 of 125-7600 Hz, that of 0-8000 Hz is 929 Hz, times
    # 22050/16000 1280 Hz, and so on to 1208 Hz
    assert generated[:, 300].argmax() == np.abs(centres - 1208).argmin()
    assert (
        not melception.reference_mel(torch.zeros(16000)).any()
        and not melception.generated_mel(torch.zeros(128, 512)).any()
    )
    click = torch.zeros(160000)
    click[80000] = 1
    assert abs(int(melception.reference_mel(click).sum(0).argmax()) - (5 * 22050 / 256 - 6)) <= 1


def test_generated_mel_is_the_papers():
    """transform_spec.py, sample by sample: resampy's table, pseudo-inverse, both filterbanks."""
    mel = np.random.default_rng(0).random((128, 70))
    rolloff, half = 0.9475937167399596, np.zeros(64 * 512 + 1)
    for k in range(len(half)):
        half[k] = (
            rolloff
            * np.sinc(rolloff * k / 512)
            * np.i0(14.769656459379492 * np.sqrt(1 - (k / 32768) ** 2))
            / np.i0(14.769656459379492)
        )
    # values of the published table, from a Java reading of it (its test of "kaiser best")
    for k, value in {
        123: 0.8687706122525141,
        456: 0.16804652520040697,
        789: -0.20410492924006962,
        8192: -0.006147657848870016,
    }.items():
        assert half[k] == pytest.approx(value, abs=1e-6)
    magnitude, columns = 10 ** ((mel * 100 - 100 + 20) / 20), int(70 * 22050 / 16000)
    slowed = np.zeros((128, columns + 1))  # librosa pads to the next whole column
    for j in range(columns):
        for i in range(70):
            at = abs(j * 16000 / 22050 - i) * 512
            if at < 32768:
                slowed[:, j] += (
                    half[int(at)] + (at - int(at)) * (half[int(at) + 1] - half[int(at)])
                ) * magnitude[:, i]
    there, back = plain_filterbank(16000, 128, 0, 8000)[0], plain_filterbank(22050, 80, 0, 11025)[0]
    expected = plain_mel(back @ (np.linalg.pinv(there) @ slowed))
    got = melception.generated_mel(mel)
    assert (
        got.shape == expected.shape == (80, 97)
        and np.abs(got - expected).max() < 1e-5
        and 0.1 < got[:, :-1].mean() < 0.9
    )


# --------------------------------------------------------------------------------------------------
# figures


def test_fid_of_a_shifted_and_stretched_copy():
    """Of b = 3 a + d: |2 mean + d|^2 + trace((1 - 3)^2 A); 40 clips do not fill 2048 dimensions."""
    rng = np.random.default_rng(0)
    a, d = rng.normal(size=(40, 2048)), rng.normal(size=2048)
    expected = ((2 * a.mean(0) + d) ** 2).sum() + 4 * a.var(0, ddof=1).sum()
    assert melception.fid(a, 3 * a + d) == pytest.approx(expected, rel=1e-9) and melception.fid(
        a, a
    ) == pytest.approx(0, abs=1e-6)
    b = rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5))
    assert melception.fid(a[:, :5], b) == pytest.approx(judge.frechet_distance(a[:, :5], b))


def test_fid_against_the_root_of_the_product():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(90, 30)), rng.normal(size=(70, 30)) @ rng.normal(size=(30, 30)) + 0.3
    root = linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        np.cov(a.T) + np.cov(b.T) - 2 * np.real(root)
    )
    assert melception.fid(a, b) == pytest.approx(expected, rel=1e-9)


def test_inception_score_over_the_shuffled_splits():
    logits = 3 * np.random.default_rng(0).normal(size=(47, 309))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    order = np.random.RandomState(2020).permutation(47)
    expected = []
    for k in range(10):
        part = [p[i] for i in order[k * 47 // 10 : (k + 1) * 47 // 10]]
        mean = sum(part) / len(part)
        expected.append(np.exp(sum((q * np.log(q / mean)).sum() for q in part) / len(part)))
    got = melception.split_inception_score(melception.softmax(logits))
    assert got == pytest.approx(
        (np.mean(expected), np.sqrt(np.mean((np.array(expected) - np.mean(expected)) ** 2))),
        rel=1e-9,
    )
    assert melception.split_inception_score(p[:9]) == (None, None)


def test_kl_is_of_the_reference_from_the_generated():
    p, q = np.log([9 / 25, 12 / 25, 4 / 25]), np.zeros(3)
    assert melception.kl(p, q) == pytest.approx(
        0.0853, abs=1e-4
    )  # SpecVQGAN's own example, evaluation/metrics/kl.py
    assert melception.kl(q, p) == pytest.approx(0.0975, abs=1e-4)
    sure, wrong = np.array([800.0, 0, 0]), np.array([0, 800.0, 0])
    assert melception.kl(sure, wrong) == pytest.approx(
        -np.log(1e-6)
    )  # its EPS beside the probabilities
    rng = np.random.default_rng(0)
    reference, generated = rng.normal(size=(2, 6, 309)).astype(np.float32)
    plain = []
    for r, g in zip(reference.astype(float), generated.astype(float), strict=True):
        p = np.exp(r) / np.exp(r).sum()
        q = np.exp(g) / np.exp(g).sum()
        plain.append(sum(p * (np.log(p) - np.log(q + 1e-6))))
    assert melception.kl(reference, generated) == pytest.approx(plain, rel=1e-9)


def test_the_table_has_the_papers_scores(published, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(melception, "SECONDS", 1)  # of reference sound, for speed
    foley.make_set(tmp_path / "clips", 3, seed=3, size=64, fps=15.625, duration=4.0)
    videos = sorted((tmp_path / "clips").glob("*.mp4"))
    (tmp_path / "samples").mkdir()
    for video in videos:
        media.write_wav(
            tmp_path / "samples" / f"{video.stem}.wav",
            0.5 * media.read_audio(video)[-16000:].flip(0),
        )
    evaluate.main(
        [
            "--data",
            str(tmp_path / "clips"),
            "--samples",
            str(tmp_path / "samples"),
            "--out",
            str(tmp_path),
            "--judges",
            str(tmp_path),
            "--official-melception",
            str(published),
        ]
    )
    written = json.loads((tmp_path / "evaluate.json").read_text())
    model = Melception.load(published)
    reference = []
    generated = []
    for video in videos:
        mel = melception.reference_mel(media.read_audio(video))
        reference.append(model.embed_clip(mel))
        wav = media.read_audio(tmp_path / "samples" / f"{video.stem}.wav")
        generated.append(model.embed_clip(melception.generated_mel(audio.mel(wav))))
    row = written["rows"]["ours"]
    features = [np.float64([o.features for o in outputs]) for outputs in (generated, reference)]
    assert row["melception_fid"] == pytest.approx(judge.frechet_distance(*features), rel=1e-4)
    assert row["melception_kl"] == pytest.approx(
        np.mean(
            [melception.kl(r.logits, g.logits) for r, g in zip(reference, generated, strict=True)]
        ),
        rel=1e-6,
    )
    assert row["melception_is"] is None  # of ten parts, with three clips
    for name, other in written["rows"].items():
        if name in ("slid", "metronome"):
            assert other["melception_fid"] is other["melception_kl"] is None  # of no sound
        else:
            assert other["melception_fid"] > 0 and other["melception_kl"] > 0
    intervals = written["intervals"]["ours"]
    assert (
        "melception_fid" not in intervals
        and intervals["melception_kl"][0] <= row["melception_kl"] <= intervals["melception_kl"][1]
    )
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("melception_fid")
    )
    assert f"{row['melception_fid']:.2f}" in line and "±" not in line
