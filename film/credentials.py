"""Content Credentials: a signed statement of who made a file from what, by the C2PA's standard.

in   a certificate (with those of its issuers behind it) and its private key, both PEM; a file
out  the same file with a signed manifest in it: mp4, m4v, mov, wav, flac

Through c2pa-python, which is optional. Nothing is fetched from the network, so the signature has no
time stamp of an authority: it counts for as long as the certificate is valid. Certificates that
signed themselves are refused by the library and by everybody who checks.
"""

import io
import warnings
import wave
from datetime import UTC, datetime
from pathlib import Path

from common.files import UserError, atomic_write

SUFFIXES = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/quicktime"}
SUFFIXES |= {".wav": "audio/wav", ".flac": "audio/flac"}
# what an input may be to be named as an ingredient, with credentials of its own if it has any
INGREDIENTS = SUFFIXES | {".avi": "video/x-msvideo"}
LABEL = "org.diff-foley-compact.generation"  # of the assertion that is ours
ELLIPTIC = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
OFFLINE = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "builder": {"thumbnail": {"enabled": False}},
}
NEEDS = "signing needs the package c2pa-python; pip install c2pa-python"


def read_pem(path):
    """Bytes of a file that the command line names. Raises ValueError."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a PEM file") from None


def read_key(path):
    """-> (private key, its C2PA algorithm). Raises ValueError for what cannot sign."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    content = read_pem(path)
    try:
        key = serialization.load_pem_private_key(content, None)
    except TypeError:
        raise ValueError(f"{path}: has a passphrase; give a key without one") from None
    except ValueError:
        raise ValueError(f"{path}: no private key in PEM; give CERT first, then KEY") from None
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in ELLIPTIC:
        return key, ELLIPTIC[key.curve.name]
    if isinstance(key, rsa.RSAPrivateKey):
        return key, "ps256"
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key, "ed25519"
    raise ValueError(
        f"{path}: C2PA signs with EC keys of P-256, P-384 or P-521, RSA or Ed25519; give one"
    )


def check_certificate(path, key, key_path):
    """Raises ValueError for a certificate that does not fit the key, or that is not to be used."""
    from cryptography import x509

    content = read_pem(path)
    try:
        chain = x509.load_pem_x509_certificates(content)
    except ValueError:
        raise ValueError(f"{path}: no certificate in PEM; give CERT first, then KEY") from None
    # the signer's own comes first
    own = chain[0]
    if own.public_key() != key.public_key():
        raise ValueError(
            f"{path}: the first certificate is not that of the key {key_path}; give the two that "
            "belong together, the signer's certificate before its issuers'"
        )
    if own.issuer == own.subject:
        raise ValueError(
            f"{path}: has signed itself, which validators refuse; give one of an authority "
            "(a test's own will do), followed by its issuers'"
        )
    if not own.not_valid_before_utc <= datetime.now(UTC) <= own.not_valid_after_utc:
        raise ValueError(
            f"{path}: valid from {own.not_valid_before_utc:%Y-%m-%d} to "
            f"{own.not_valid_after_utc:%Y-%m-%d} only; give one that is valid today"
        )


def silence():
    """A hundredth of a second of nothing, as a wav in memory."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes(bytes(320))
    file.seek(0)
    return file


class Signer:
    """Signs files with one certificate.

    Raises ValueError, in one line that begins with "sign", for a certificate or key that cannot
    be used, and UserError where c2pa-python is missing.
    """

    def __init__(self, certificate, key):
        try:
            import c2pa
            from cryptography.hazmat.primitives import serialization
        except ImportError:
            raise UserError(NEEDS) from None
        try:
            private, self.algorithm = read_key(key)
            check_certificate(certificate, private, key)
        except ValueError as error:
            raise ValueError(f"sign {error}") from None
        self.certificate = read_pem(certificate)
        # the one form that the library takes
        self.key = private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        # whatever else the library minds in it (its purpose, its chain) shows in a trial
        said = {"source_type": "http://cv.iptc.org/newscodes/digitalsourcetype/algorithmicMedia"}
        try:
            self.write(silence(), io.BytesIO(), "audio/wav", "trial", said)
        except c2pa.C2paError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"sign {certificate}: refused ({reason}); C2PA wants a certificate for digital "
                "signatures whose extended key usage is e-mail protection or C2PA's own"
            ) from None

    def write(self, source, out, kind, title, said, ingredient=None):
        """Sign what the open file `source` holds into the open file `out`.

        said: what the file says of its making (film/provenance.py). ingredient: (path, kind) of
        what it was made from.
        """
        import c2pa

        agent = {"name": "diff-foley-compact", "version": said.get("system_version", "")}
        action = {
            "action": "c2pa.created" if ingredient is None else "c2pa.edited",
            "digitalSourceType": said["source_type"],
            "softwareAgent": agent,
        }
        manifest = {
            "title": title,
            "claim_generator_info": [agent],
            "assertions": [
                {"label": "c2pa.actions", "data": {"actions": [action]}},
                {"label": LABEL, "data": said},
            ],
        }
        info = c2pa.C2paSignerInfo(self.algorithm, self.certificate, self.key, None)
        context = c2pa.Context.from_dict(OFFLINE)
        with c2pa.Signer.from_info(info) as signer, c2pa.Builder(manifest, context) as builder:
            if ingredient is not None:
                # what it was made from was opened first, which the library states by itself
                path, ingredient_kind = ingredient
                builder.set_intent(c2pa.C2paBuilderIntent.EDIT)
                parent = {"title": path.name, "relationship": "parentOf"}
                with open(path, "rb") as file:
                    builder.add_ingredient(parent, ingredient_kind, file)
            builder.sign(signer, kind, source, out)

    def sign(self, path, title, said, source=None):
        """Sign a file in place: whole, or left as it was. -> whether its kind can be signed.

        title: its name to be. source: the file whose picture it has; the credentials of that go
        along. Raises FileError and UserError.
        """
        import c2pa

        path = Path(path)
        kind = SUFFIXES.get(path.suffix.lower())
        if kind is None:
            return False
        ingredients = [None]
        if source is not None and Path(source).suffix.lower() in INGREDIENTS:
            source = Path(source)
            # a source that the library cannot read is not named
            ingredients.insert(0, (source, INGREDIENTS[source.suffix.lower()]))
        for ingredient in ingredients:
            try:
                with (
                    atomic_write(path) as part,
                    open(path, "rb") as given,
                    open(part, "w+b") as out,
                ):
                    self.write(given, out, kind, title, said, ingredient)
            except c2pa.C2paError as error:
                reason = " ".join(str(error).split())
                continue
            if source is not None and ingredient is None:
                unnamed = f"{source}: not named in the Content Credentials of {title}"
                warnings.warn(unnamed, stacklevel=2)
            return True
        raise UserError(f"{title}: cannot be signed ({reason}); leave --sign out")
