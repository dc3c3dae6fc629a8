"""What an output says of its making: model, weights, seed, settings, and IPTC's source type.

in   the networks' files, the settings
out  tags: the comment that every container holds, and the XMP packet (common/xmp.py)

docs/provenance.md says what each layer is good for.
"""

import json
from dataclasses import asdict
from pathlib import Path
from threading import Thread

from common import watermark, xmp
from common.files import UserError, sha256

VERSION = "0.2"  # of this program
# https://cv.iptc.org/newscodes/digitalsourcetype/: the names of its terms begin with http
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
COMPOSITE = "compositeWithTrainedAlgorithmicMedia"  # a real picture or sound is in it
GENERATED = "trainedAlgorithmicMedia"


class WeightSums:
    """The SHA-256 of files, computed in a thread while other work goes on.

    A gigabyte takes about a second (measured on one core of an AMD EPYC).
    """

    def __init__(self, paths: dict[str, Path | None] | None = None):
        self.paths = {name: path for name, path in (paths or {}).items() if path is not None}
        self.sums = {}
        self.error = None
        # a daemon: once the program ends, nobody waits for it
        self.thread = Thread(target=self.compute, daemon=True)
        self.thread.start()

    def compute(self):
        try:
            for name, path in self.paths.items():
                self.sums[name] = sha256(path)
        except OSError as error:
            reason = f"cannot be read ({error.strerror}); put it back, or copy it again"
            self.error = UserError(f"{path}: {reason}")

    def result(self) -> dict[str, str]:
        """{"cavp": hexadecimal, "ldm": ..., "align": ...}; waits for it. Raises UserError."""
        self.thread.join()
        if self.error is not None:
            raise self.error
        return self.sums


def weights_sha256(source) -> dict[str, str]:
    """The sums of `sample.Models` (computed once, when they were loaded), or of {name: path}."""
    sums = WeightSums(source) if isinstance(source, dict) else source.sums
    return sums.result()


def settings_text(settings) -> str:
    """Settings as JSON: what is unset is left out.

    Of hits that were given their number, and no path: whoever gets a file need not know it.
    """
    values = {}
    for name, value in asdict(settings).items():
        if name == "onsets" and isinstance(value, tuple):
            value = f"{len(value)} given"
        if isinstance(value, Path):
            value = "given in files"
        is_unset = value is None or value is False or (isinstance(value, tuple) and not value)
        if name != "seed" and not is_unset:
            values[name] = value
    # numbers may be numpy's
    return json.dumps(values, default=lambda number: number.item())


def describe(models, settings, version: str, mark: bool, has_picture: bool) -> dict[str, str]:
    """What one output says, by the names of `common.xmp.PROPERTIES`.

    has_picture: it is a film with the picture of a source, not the sound alone.
    """
    composite = has_picture or settings.keep_audio is not None
    sums = weights_sha256(models)
    return {
        "source_type": SOURCE_TYPES + (COMPOSITE if composite else GENERATED),
        "system": f"diff-foley-compact, model {models.name}",
        "system_version": version,
        "tool": f"diff-foley-compact {version}",
        "model": models.name,
        "weights": ", ".join(f"{name} {value}" for name, value in sums.items()),
        "seed": str(settings.seed),
        "settings": settings_text(settings),
        "watermark": "yes" if mark else "no",
    }


def make_tags(models, settings, version: str, mark: bool = True, has_picture: bool = True):
    """-> {"comment": ..., "XMP": packet}, for `write_video` and `write_wav`."""
    said = describe(models, settings, version, mark, has_picture)
    parts = [f"{watermark.CLAIM} {models.name}, seed {settings.seed}, version {version}"]
    if not mark:
        parts.append("no watermark")
    parts.append(f"digital source type {said['source_type'].removeprefix(SOURCE_TYPES)}")
    parts.append(f"settings {said['settings']}")
    if said["weights"]:
        parts.append(f"weights SHA-256 {said['weights']}")
    return {"comment": "; ".join(parts), xmp.TAG: xmp.make_packet(said)}


def with_source_type(tags, composite: bool):
    """Tags of `make_tags` that name the source type of what is, or is not, generated alone."""
    now, wanted = (GENERATED, COMPOSITE) if composite else (COMPOSITE, GENERATED)
    return {name: text.replace(now, wanted) for name, text in tags.items()}
