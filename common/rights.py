"""Where the clips of a set come from and under which license: read, kept with them, summed up.

in   a CSV that says it of videos, one a row, or the .json files beside foley.py's clips
out  {clip: Rights}, the table SET/licences.csv, and the summary in the header of trained weights

The CSV begins with the names of its columns: `file,source,licence,consent`, and `attribution` if
one likes. `file` is the path of a video below the folder that is prepared, or its name alone, with
or without the suffix. The other columns are free text: a URL or a description; the license's name;
"yes", "no" or what was agreed; whom to name. An empty cell, "-", "?", "n/a", "none" and "unknown"
mean that it is not known. The table in a set has the same form.
"""

import csv
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from common.files import UserError, write_bytes

TABLE = "licences.csv"  # of a set
REQUIRED = ("file", "source", "licence", "consent")
COLUMNS = (*REQUIRED, "attribution")
NOT_KNOWN = {"", "-", "?", "n/a", "none", "unknown"}
LISTED = 10  # sources and licenses that a summary names
LONGEST = 200  # characters of a name in a summary


class RightsError(UserError):
    """A table of licenses that cannot be read or does not fit the videos."""


class Rights(NamedTuple):
    """What is known of one clip, as written; "" where nothing is."""

    source: str = ""
    license: str = ""
    consent: str = ""
    attribution: str = ""

    @property
    def refused(self):
        """Whether the people in it said no."""
        return self.consent.lower() in ("no", "refused")


UNKNOWN = Rights()


class Row(NamedTuple):
    line: int
    file: str
    rights: Rights


# ---- reading and writing -----------------------------------------------------------------------


def text_of(content: bytes) -> str:
    """UTF-8, UTF-16 with its mark, or else what spreadsheets write on Windows."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def normal(name: str) -> str:
    """A name such that what looks the same is the same; a file's own need not be text."""
    return unicodedata.normalize("NFC", text_of(os.fsencode(name))).strip()


def column_names(cells: list) -> list:
    names = [cell.strip().lower() for cell in cells]
    return ["licence" if name == "license" else name for name in names]


def delimiter_of(header: str) -> str:
    """The one of `,`, `;` and tab with which the header has the most of our columns."""

    def known(delimiter):
        cells = next(csv.reader([header], delimiter=delimiter), [])
        return len({*column_names(cells)} & {*COLUMNS})

    return max(",;\t", key=known)


def read_rows(path: Path | str) -> list[Row]:
    """The rows of a CSV of licenses. Raises RightsError, which names the line."""
    try:
        text = text_of(Path(path).read_bytes())
    except OSError as error:
        raise RightsError(
            f"{path}: cannot be read ({error.strerror}); give a CSV with the columns "
            + ",".join(REQUIRED)
        ) from None
    return parse_rows(text, path)


def parse_rows(text: str, path: Path | str) -> list[Row]:
    """The same of its content."""
    delimiter = delimiter_of(text.partition("\n")[0])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows = []
    try:
        names = column_names(next(reader, []))
        missing = [name for name in REQUIRED if name not in names]
        if missing:
            raise RightsError(
                f"{path}: its first line has no column {', '.join(missing)}; begin it with "
                + ",".join(REQUIRED)
            )
        for cells in reader:
            # spreadsheets fill rows up, and end in empty ones
            while cells and not cells[-1].strip():
                cells.pop()
            if not cells:
                continue
            if len(cells) > len(names):
                raise RightsError(
                    f"{path}: line {reader.line_num} has {len(cells)} cells, the first line "
                    f"{len(names)}; put quotes around text with a {delimiter!r} in it"
                )
            row = dict(zip(names, cells, strict=False))
            if not row.get("file", "").strip():
                raise RightsError(f"{path}: line {reader.line_num} names no file; add it")
            # what is said of it: a line of text each
            values = [" ".join(row.get(name, "").split()) for name in COLUMNS[1:]]
            known = ["" if value.lower() in NOT_KNOWN else value for value in values]
            rows.append(Row(reader.line_num, row["file"], Rights(*known)))
    except csv.Error as error:
        raise RightsError(
            f"{path}: line {reader.line_num} is not of a CSV ({error}); correct it"
        ) from None
    return rows


def write_table(path: Path | str, rights: dict):
    """{clip: Rights} -> a CSV that `read_table` reads. Raises FileError."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(COLUMNS)
    writer.writerows((name, *known) for name, known in rights.items())
    # a file's name need not be text
    write_bytes(path, table.getvalue().encode("utf-8", "surrogateescape"))


def read_table(path: Path | str) -> dict:
    """{clip: Rights} of a set's table; of a set without one: {}. Raises RightsError, OSError."""
    if not Path(path).exists():
        return {}
    text = Path(path).read_bytes().decode("utf-8", "surrogateescape")
    return {row.file: row.rights for row in parse_rows(text, path)}


def made_by_foley(video: Path) -> Rights | None:
    """Of a clip that foley.py made, by the .json beside it; None of any other."""
    path = video.with_suffix(".json")
    if not path.is_file():
        return None
    try:
        labels = json.loads(path.read_text())
        made = {"onsets", "seed", "index", "fps", "duration"} <= labels.keys()
    except (OSError, ValueError, AttributeError):
        return None
    return Rights(f"foley.py --seed {labels['seed']}", "MIT", "not needed") if made else None


# ---- which row is of which clip ----------------------------------------------------------------


def assign(rows: list[Row], files: dict, path: Path | str):
    """Rows of a CSV -> {clip: Rights}, [what the CSV calls files of which there is no clip].

    files: {clip: path of its video below the folder, in POSIX form}. A row is of all clips of its
    video. Raises RightsError where a row fits several videos, or two that differ fit one clip.
    """
    # a path in full counts before a name, and that before one without a suffix
    levels = [{}, {}, {}, {}]
    for clip, file in files.items():
        for name in {clip, file}:
            whole = PurePosixPath(normal(name))
            spellings = (whole, whole.name, whole.with_suffix(""), whole.stem)
            for level, spelling in zip(levels, spellings, strict=True):
                level.setdefault(str(spelling), {})[clip] = file

    assigned = {}
    unknown = []
    for row in rows:
        name = normal(row.file)
        # as Windows writes paths
        wanted = (str(PurePosixPath(name)), str(PurePosixPath(name.replace("\\", "/"))))
        hits = (level[spelling] for spelling in wanted for level in levels if spelling in level)
        clips = next(hits, {})
        videos = sorted(set(clips.values()))
        if len(videos) > 1:
            raise RightsError(
                f"{path}: line {row.line}: {row.file} may be {videos[0]} or {videos[1]}; "
                "give the path"
            )
        if not clips:
            unknown.append(row.file)
        for clip in clips:
            before = assigned.setdefault(clip, row)
            if before.rights != row.rights:
                raise RightsError(
                    f"{path}: lines {before.line} and {row.line} are both of {clip} and differ; "
                    "keep one"
                )
    return {clip: row.rights for clip, row in assigned.items()}, unknown


def some(names: list, most: int = 3) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---- the summary in the header of weights ------------------------------------------------------


def source_group(source: str) -> str:
    """What a source counts as in a summary: a URL as its host, so that one site is one source."""
    try:
        host = urlsplit(source).hostname if "://" in source else None
    except ValueError:
        host = None
    return (host or source)[:LONGEST]


def most_common(values: Iterable) -> tuple[dict, int]:
    """-> {value: how often} of the most frequent, and how many other values there are."""
    counts = Counter(values)
    # of equally frequent ones the first by name, whatever the order of the clips
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return dict(ordered[:LISTED]), max(0, len(ordered) - LISTED)


def summarize(clips: Iterable[Rights]) -> dict:
    """What weights say of the clips that they were trained on.

    -> {"clips": how many, "sources", "licenses": {name: clips}, "other_sources", "other_licenses":
    how many are not named, "without_source", "without_license": share of the clips, "consent": how
    many clips have a word on it, "attribution": how many somebody is to be named for}
    """
    clips = list(clips)
    licenses = [known.license[:LONGEST] for known in clips if known.license]
    sources = [source_group(known.source) for known in clips if known.source]
    listed, other = most_common(sources)
    summary = {"clips": len(clips), "sources": listed, "other_sources": other}
    listed, other = most_common(licenses)
    return {
        **summary,
        "licenses": listed,
        "other_licenses": other,
        "without_source": 1 - len(sources) / max(1, len(clips)),
        "without_license": 1 - len(licenses) / max(1, len(clips)),
        "consent": sum(bool(known.consent) for known in clips),
        "attribution": sum(bool(known.attribution) for known in clips),
    }
