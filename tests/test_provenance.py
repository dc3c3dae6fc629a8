"""What outputs say of their making: XMP and IPTC's source type in every container, sums of the
weights; Content Credentials in and out."""

import json
import struct
from argparse import Namespace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import av
import pytest
import soundfile
import torch
from clips import clicks, make, steady
from main_job import run

import sample
from common import media, watermark, xmp
from common.audio import mel
from common.files import UserError, sha256
from common.onsets import Hit
from common.profiling import Profile
from film import provenance
from film.outputs import write_outputs

optional = pytest.mark.optional  # each of these asks for c2pa-python
COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


@pytest.fixture
def models(tmp_path):
    """What makes tags: a name, and two files with their sums."""
    for name in ("cavp", "ldm"):
        (tmp_path / name).write_bytes(name.encode())
    paths = {"cavp": tmp_path / "cavp", "ldm": tmp_path / "ldm", "align": None}
    return sample.Models(None, None, None, name="ti<n>y", sums=provenance.WeightSums(paths))


def result_of(source, models, **settings):
    """A Result of silence, as the main job makes it."""
    settings = sample.Settings(**settings)
    wav = torch.zeros(32000)
    tags = [provenance.make_tags(models, settings, "9.9", has_picture=p) for p in (True, False)]
    return sample.Result(
        wav,
        {0: wav},
        [None],
        0,
        mel(wav),
        [0],
        2.0,
        source,
        0.0,
        None,
        Profile(),
        tags[0],
        sound_tags=tags[1],
        settings=settings,
    )


def write(result, target, signer=None):
    """The files of a result -> paths of film and sound."""
    off = ("keep_all", "keep_tracks", "write_onsets", "plot", "stems", "verbose")
    args = Namespace(**dict.fromkeys(off, False), format=None, signer=signer, seed=3)
    line = write_outputs(result, target, args)
    return Path(line["output"]), Path(line["wav"])


def source_of(path):
    suffix = Path(path).suffix
    codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
    sound = "libopus" if suffix == ".webm" else "aac"
    return make(
        path, steady(25, 2), wav=clicks(2, [1], 48000), rate=48000, codec=codec, sound=sound
    )


# ---- XMP ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_every_container_says_what_it_is(models, tmp_path, suffix):
    source = source_of(tmp_path / f"a{suffix}")
    film, wav = write(result_of(source, models, seed=3, cfg=2.5), tmp_path / "a.foley")
    assert film.suffix == suffix
    for path, source_type in ((film, COMPOSITE), (wav, GENERATED)):
        verdict = watermark.check(path)
        said = verdict.said
        assert verdict.has_tag and said["source_type"] == source_type
        assert said["model"] == "ti<n>y" and said["seed"] == "3" and said["watermark"] == "yes"
        assert json.loads(said["settings"])["cfg"] == 2.5
        assert said["weights"] == ", ".join(
            f"{name} {sha256(tmp_path / name)}" for name in ("cavp", "ldm")
        )
        assert said["system_version"] == "9.9" and said["tool"] == "diff-foley-compact 9.9"
        # the container's own tag has the same
        comment = media.read_tags(path)["comment"]
        assert comment.startswith(f"{watermark.CLAIM} ti<n>y, seed 3, version 9.9")
        for part in (source_type.rsplit("/")[-1], said["weights"], '"cfg": 2.5'):
            assert part in comment
        # and they can be played
        assert len(media.read_audio(path)) == pytest.approx(32000, abs=1024)
    assert media.probe(film).frames == 50


def test_a_sound_that_holds_the_clips_own_is_a_composite(models, tmp_path):
    source = source_of(tmp_path / "a.mp4")
    _, wav = write(result_of(source, models, keep_audio=-6.0), tmp_path / "a.foley")
    assert watermark.check(wav).said["source_type"] == COMPOSITE


def test_other_boxes_stay_where_they_are(models, tmp_path):
    """The packet follows all else, so that no offset in the file changes."""
    source = source_of(tmp_path / "a.mp4")
    film, _ = write(result_of(source, models), tmp_path / "a.foley")
    content = film.read_bytes()
    with open(film, "rb") as file:
        names = [part.name for part in xmp.parts_of(file)]
    assert names[0] == b"ftyp" and names[1] == b"moov" and names[-1] == xmp.XMP_BOX
    # a whole file without it is the same
    packet = xmp.read(film)
    assert content.endswith(packet.encode())
    film.write_bytes(content[: -len(packet.encode()) - 24])
    assert media.probe(film).frames == 50 and xmp.read(film) is None


def test_wav_stays_a_wav_of_even_chunks(tmp_path):
    for odd in ("x", "xy"):
        tags = {"comment": "c", xmp.TAG: xmp.make_packet({"model": odd})}
        media.write_wav(tmp_path / "a.wav", torch.zeros(1001), tags)
        content = (tmp_path / "a.wav").read_bytes()
        assert struct.unpack("<I", content[4:8])[0] == len(content) - 8 and len(content) % 2 == 0
        assert xmp.parse_packet(xmp.read(tmp_path / "a.wav")) == {"model": odd}
        assert len(media.read_audio(tmp_path / "a.wav")) == 1001


def test_flac_has_it_among_its_comments(tmp_path):
    sound = clicks(1, [0.5])
    soundfile.write(tmp_path / "a.flac", sound, 16000)
    with open(tmp_path / "a.flac", "r+b") as file:
        xmp.embed(file, xmp.make_packet({"model": "m"}))
    assert xmp.parse_packet(media.read_tags(tmp_path / "a.flac")["xmp"]) == {"model": "m"}
    assert abs(soundfile.read(tmp_path / "a.flac")[0] - sound).max() < 1e-4
    assert watermark.check(tmp_path / "a.flac").said == {"model": "m"}


@pytest.mark.parametrize(
    "packet",
    [
        "",
        "no XML",
        "<a>",
        "\0" * 9,
        '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>',
        "<rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'><rdf:Description/></rdf:RDF>",
    ],
)
def test_what_is_no_packet_says_nothing(packet):
    assert xmp.parse_packet(packet) == {}


def test_packets_of_others_are_read_too():
    """Properties as elements, as other programs write them."""
    packet = xmp.make_packet({"seed": "1"}).replace(
        "/>\n </rdf:RDF>",
        f"><Iptc4xmpExt:DigitalSourceType>{COMPOSITE}</Iptc4xmpExt:DigitalSourceType>"
        "</rdf:Description>\n </rdf:RDF>",
    )
    assert xmp.parse_packet(packet) == {"seed": "1", "source_type": COMPOSITE}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"RIFF",
        b"RIFF\0\0\0\0WAVE_PMX\xff\xff\xff\xff",
        b"RIFF\0\0\0\0WAVE_PMX",
        b"\0\0\0\x18ftypisom" + b"\0" * 12 + b"\0\0\0\1uuid",
        b"\0\0\0\x18ftypisom" + b"\0" * 12 + b"\0\0\0\x09uuid\0",
        b"\0\0\0\x18ftypisom" + b"\0" * 12 + b"\0\0\0\1free\0\0\0\0\0\0\0\0",
    ],
)
def test_damaged_files_hold_no_packet(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    assert xmp.read(tmp_path / "a") is None and not xmp.has_credentials(tmp_path / "a")


def test_sums_are_those_of_the_files(models, tmp_path):
    sums = {"cavp": sha256(tmp_path / "cavp"), "ldm": sha256(tmp_path / "ldm")}
    assert provenance.weights_sha256(models) == sums
    assert provenance.weights_sha256({"ldm": tmp_path / "ldm"}) == {"ldm": sums["ldm"]}
    with pytest.raises(UserError, match="cannot be read"):
        provenance.weights_sha256({"ldm": tmp_path / "missing"})


def test_settings_name_no_paths_and_no_hits(tmp_path):
    hits = (Hit(0.5), Hit(1.25, 0.8, "metal"))
    said = provenance.settings_text(sample.Settings(onsets=hits, material=("wood",), seed=4))
    assert json.loads(said)["onsets"] == "2 given" and json.loads(said)["material"] == ["wood"]
    assert "seed" not in said and "keep_audio" not in said
    said = provenance.settings_text(sample.Settings(onsets=tmp_path))
    assert json.loads(said)["onsets"] == "given in files" and str(tmp_path) not in said


def test_verify_prints_what_the_xmp_says(capsys, models, tmp_path):
    tags = provenance.make_tags(models, sample.Settings(seed=5), "9.9", has_picture=False)
    media.write_wav(tmp_path / "a.wav", torch.zeros(16000), tags)
    status, lines, _ = run(capsys, "--verify", tmp_path / "a.wav")
    assert status == 0
    assert lines[0].endswith("XMP: model ti<n>y, seed 5, trainedAlgorithmicMedia")
    _, lines, _ = run(capsys, "--verify", "--json", tmp_path / "a.wav")
    line = json.loads(lines[0])
    assert line["xmp"]["seed"] == "5" and line["content_credentials"] is False


# ---- Content Credentials that an input carries -------------------------------------------------


def test_credentials_of_an_input_are_lost_and_that_is_said(models, tmp_path):
    """A box as C2PA's, made by hand."""
    source = source_of(tmp_path / "a.mp4")
    assert not xmp.has_credentials(source)
    with pytest.warns() as caught:
        with open(source, "ab") as file:
            file.write(struct.pack(">I4s", 28, b"uuid") + xmp.CREDENTIALS_BOX + bytes(4))
        assert xmp.has_credentials(source)
        film, _ = write(result_of(source, models), tmp_path / "a.foley")
    (said,) = [str(warning.message) for warning in caught]
    assert said.startswith(f"{source}: not kept in .mp4: Content Credentials")
    assert not xmp.has_credentials(film)
    # and those of a wav
    media.write_wav(tmp_path / "b.wav", torch.zeros(10))
    with open(tmp_path / "b.wav", "ab") as file:
        file.write(b"C2PA" + struct.pack("<I", 4) + bytes(4))
    assert xmp.has_credentials(tmp_path / "b.wav")


# ---- signing -----------------------------------------------------------------------------------


def certificate(name, key, issuer=None, issuer_key=None, days=30):
    """A certificate of `key`, signed by an issuer or by itself as an authority."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def attributes(text):
        organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test")
        return x509.Name([organization, x509.NameAttribute(NameOID.COMMON_NAME, text)])

    authority = issuer is None
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    usage |= {"digital_signature": not authority}
    usage |= {"key_cert_sign": authority, "crl_sign": authority}
    begin = datetime.now(UTC) - timedelta(days=60)
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(attributes(name))
        .issuer_name(issuer.subject if issuer else attributes(name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=60 + days))
        .add_extension(x509.BasicConstraints(authority, None), True)
        .add_extension(x509.KeyUsage(**usage), True)
        .add_extension(own, False)
    )
    if issuer:
        signed_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key())
        email = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(signed_by, False).add_extension(email, False)
    return builder.sign(issuer_key or key, hashes.SHA256())


def write_pem(path, *things):
    from cryptography.hazmat.primitives import serialization as pem

    content = b""
    for thing in things:
        if hasattr(thing, "private_bytes"):
            form = pem.PrivateFormat.TraditionalOpenSSL
            content += thing.private_bytes(pem.Encoding.PEM, form, pem.NoEncryption())
        else:
            content += thing.public_bytes(pem.Encoding.PEM)
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Files of an authority and of certificates by it: good, run out, self-signed; keys."""
    pytest.importorskip("c2pa")
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("chain")
    root_key, key, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    root = certificate("Root", root_key)
    good = certificate("Signer", key, root, root_key)
    late = certificate("Signer", key, root, root_key, days=-1)
    return Namespace(
        root=write_pem(folder / "root.pem", root),
        certificate=write_pem(folder / "chain.pem", good, root),
        late=write_pem(folder / "late.pem", late, root),
        backwards=write_pem(folder / "backwards.pem", root, good),
        self_signed=write_pem(folder / "self.pem", certificate("Me", key)),
        key=write_pem(folder / "key.pem", key),
        other=write_pem(folder / "other.pem", other),
    )


def manifest_of(path, chain):
    """-> the active manifest as the library's own reader sees it, and "Trusted" where all holds."""
    import c2pa

    settings = {
        "trust": {"user_anchors": chain.root.read_text()},
        "verify": {"verify_trust": True, "remote_manifest_fetch": False},
    }
    with c2pa.Reader(path, context=c2pa.Context.from_dict(settings)) as reader:
        store = json.loads(reader.json())
        return store["manifests"][store["active_manifest"]], reader.get_validation_state()


def actions_of(manifest):
    """{action: digital source type} of a manifest."""
    return {
        action["action"]: action.get("digitalSourceType")
        for assertion in manifest["assertions"]
        if assertion["label"].startswith("c2pa.actions")
        for action in assertion["data"]["actions"]
    }


@optional
@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_signed_outputs_satisfy_the_librarys_own_reader(chain, models, tmp_path, suffix):
    from film.credentials import LABEL, Signer

    source = source_of(tmp_path / f"a{suffix}")
    signer = Signer(chain.certificate, chain.key)
    film, wav = write(result_of(source, models, seed=3), tmp_path / "a.foley", signer)
    for path, action, source_type in (
        (film, "c2pa.edited", COMPOSITE),
        (wav, "c2pa.created", GENERATED),
    ):
        manifest, state = manifest_of(path, chain)
        assert state == "Trusted" and actions_of(manifest)[action] == source_type
        (said,) = [a["data"] for a in manifest["assertions"] if a["label"] == LABEL]
        assert said["model"] == "ti<n>y" and said["seed"] == "3" and "ldm" in said["weights"]
        assert manifest["title"] == path.name
        # tag and XMP are there as well, and it plays
        verdict = watermark.check(path)
        assert verdict.has_credentials and verdict.has_tag
        assert verdict.said["source_type"] == source_type
        assert len(media.read_audio(path)) == pytest.approx(32000, abs=1024)
    assert actions_of(manifest_of(film, chain)[0])["c2pa.opened"] is None
    # a byte of the picture changed
    content = bytearray(film.read_bytes())
    content[content.index(b"mdat") + 100] ^= 1
    film.write_bytes(content)
    assert manifest_of(film, chain)[1] == "Invalid"
    assert sorted(p.name for p in tmp_path.glob(".*")) == []


@optional
def test_credentials_of_an_input_go_along_as_those_of_an_ingredient(chain, models, tmp_path):
    from film.credentials import Signer

    signer = Signer(chain.certificate, chain.key)
    source = source_of(tmp_path / "a.mp4")
    said = {"source_type": GENERATED}
    assert signer.sign(source, "a.mp4", said) and xmp.has_credentials(source)
    with pytest.warns(UserWarning, match="not kept in .mp4: Content Credentials"):
        film, _ = write(result_of(source, models), tmp_path / "a.foley", signer)
    manifest, state = manifest_of(film, chain)
    (ingredient,) = manifest["ingredients"]
    assert state == "Trusted" and ingredient["title"] == "a.mp4"
    assert ingredient["relationship"] == "parentOf" and ingredient["active_manifest"]


@optional
def test_flac_is_signed_and_matroska_is_not_and_that_is_said(chain, models, tmp_path):
    from film.credentials import Signer

    signer = Signer(chain.certificate, chain.key)
    soundfile.write(tmp_path / "a.flac", clicks(2, [1]), 16000)
    assert signer.sign(tmp_path / "a.flac", "a.flac", {"source_type": GENERATED})
    assert manifest_of(tmp_path / "a.flac", chain)[1] == "Trusted"
    assert xmp.has_credentials(tmp_path / "a.flac")
    source = source_of(tmp_path / "a.mkv")
    with pytest.warns(UserWarning, match="mkv holds no Content Credentials; a.foley.mkv is not"):
        film, wav = write(result_of(source, models), tmp_path / "a.foley", signer)
    assert manifest_of(wav, chain)[1] == "Trusted" and media.probe(film).frames == 50


@optional
@pytest.mark.parametrize(
    "certificate, key, words",
    [
        ("certificate", "other", ("chain.pem", "not that of the key", "other.pem")),
        ("backwards", "key", ("backwards.pem", "before its issuers'")),
        ("self_signed", "key", ("self.pem", "signed itself", "validators refuse")),
        ("late", "key", ("late.pem", "valid from", "valid today")),
        ("key", "certificate", ("CERT first, then KEY",)),
        ("missing", "key", ("missing", "cannot be read")),
    ],
)
def test_what_cannot_sign_is_one_line_before_any_work(
    capsys, monkeypatch, chain, tmp_path, certificate, key, words
):
    monkeypatch.setattr(sample, "load", lambda args: pytest.fail("work began"))
    given = vars(chain) | {"missing": tmp_path / "missing"}
    status, lines, err = run(capsys, "x.mp4", "--sign", given[certificate], given[key])
    assert status == 2 and not lines and len(err) == 1
    assert err[0].startswith("sample.py: --sign ") and ";" in err[0]
    assert all(word in err[0] for word in words), err[0]


def test_without_the_library_a_line_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "c2pa", None)
    status, _, err = run(capsys, "x.mp4", "--sign", "a.pem", "b.pem")
    assert status == 1 and len(err) == 1 and "pip install c2pa-python" in err[0]


def test_containers_are_not_decoded_to_look_for_credentials(tmp_path, monkeypatch):
    """Boxes are walked; FFmpeg is not asked."""
    source = source_of(tmp_path / "a.mp4")
    monkeypatch.setattr(av, "open", lambda *args, **kwargs: pytest.fail("opened"))
    assert not xmp.has_credentials(source) and xmp.read(source) is None
