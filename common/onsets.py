"""Hits given by a person: when something is to sound, how strongly, and what it is made of.

in   a CSV file `time,strength,material`, or a label track as Audacity exports it
out  [Hit], ascending in time, and label tracks that Audacity imports

    time,strength,material          0.512000 <tab> 0.512000 <tab> wood 0.8
    0.512,0.8,wood                  1.250000 <tab> 1.250000 <tab>
    1.25,,

A CSV's first line may name its columns, in any order and without those that it lacks; otherwise
they are in this one. Cells may be empty. A label's text holds a material, a strength, both in
either order, or nothing; where it ends does not count. A material with a question mark behind it
is what the model saw, and says nothing. Label tracks may have decimal commas, as
Audacity writes them in some countries.
"""

import csv
import math
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from common.files import UserError, write_bytes

# without what float() takes besides: "nan", "1_000", digits of other scripts
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


class Hit(NamedTuple):
    """Seconds from the first picture; strength above 0, up to 1; None: left to the model."""

    time: float
    strength: float | None = None
    material: str | None = None
    is_guess: bool = False  # the material is what the model sees, not what a person says


COLUMNS = ("time", "strength", "material")  # of a CSV file


# ---- fields: a ValueError says what is wrong with a line, and the remedy -------------------------


def seconds(text):
    """A time as written -> float, 0 or later."""
    if not NUMBER.fullmatch(text):
        raise ValueError(f"{text!r:.40} is not a number; give the time of the hit in seconds")
    time = float(text)
    # digits enough make infinity
    if not 0 <= time < math.inf:
        raise ValueError(
            f"{text!r:.40} is no time in the clip; give seconds from its first picture"
        )
    return time


def hit_of(fields, materials, with_guesses=False):
    """{"time", "strength", "material"}, as written, missing or empty -> Hit."""
    time = seconds(fields.get("time", ""))
    strength = None
    if text := fields.get("strength"):
        if not NUMBER.fullmatch(text) or not 0 < float(text) <= 1:
            raise ValueError(
                f"the strength {text!r:.40} is not in range; give a number above 0, up to 1"
            )
        strength = float(text)
    material = (fields.get("material") or "").lower() or None
    # the model's own guess, as `write_hits` writes it
    if material and material.endswith("?"):
        guess = material.removesuffix("?")
        if with_guesses and guess in materials:
            return Hit(time, strength, guess, is_guess=True)
        material = None
    if material and material not in materials:
        known = ", ".join(materials)
        raise ValueError(f"the material {material!r:.40} is not known; give one of {known}")
    return Hit(time, strength, material)


def csv_fields(line, columns):
    """A line of a CSV file -> {column: cell}."""
    cells = csv_cells(line)
    if len(cells) > len(columns):
        names = ",".join(columns)
        raise ValueError(f"{len(cells)} cells; give {len(columns)} at most: {names}")
    # a line may leave out its last cells
    return dict(zip(columns, cells, strict=False))


def csv_cells(line):
    try:
        (cells,) = csv.reader([line], strict=True)
    except csv.Error as error:
        raise ValueError(f"not a line of CSV ({error}); give time,strength,material") from None
    return [cell.strip() for cell in cells]


def csv_columns(line):
    """Names of the columns where the line is a header; None where it is not."""
    # a header has the one column that every hit needs
    names = [cell.lower() for cell in csv_cells(line)]
    if "time" not in names:
        return None
    if len(set(names)) < len(names) or not set(names) <= set(Hit._fields):
        raise ValueError("columns that are not known or there twice; give time,strength,material")
    return names


def label_fields(line):
    """A line of a label track -> {field: text}."""
    start, *rest = line.replace(",", ".").split("\t")
    if len(rest) not in (1, 2):
        raise ValueError("not a label; give start, end and text with a tab between them")
    # its end must be one, or this is some other table
    if seconds(rest[0].strip()) < seconds(start.strip()):
        raise ValueError("ends before it starts; give start, end and text, or a CSV with commas")
    fields = {"time": start.strip()}
    # a word is a strength if it is a number, in whichever order they come
    for word in " ".join(rest[1:]).split():
        # punctuation between the two
        if not NUMBER.fullmatch(word):
            word = word.strip(".;:")
        name = "strength" if NUMBER.fullmatch(word) else "material"
        if name in fields:
            raise ValueError(
                f"a second {name} {word!r:.40}; give a label one material, one strength"
            )
        fields[name] = word
    return fields


def checked(hits: Iterable[Hit], materials: Collection[str]) -> tuple[Hit, ...]:
    """Hits that a program gives, ascending in time. ValueError for what cannot be, in one line."""
    for hit in hits:
        if not isinstance(hit, Hit):
            raise ValueError(f"onsets {hit!r:.60}: is no Hit; give a tuple of common.onsets.Hit")
        if not 0 <= hit.time < math.inf:
            raise ValueError(f"onsets {hit}: its time is not 0 or more seconds")
        if hit.strength is not None and not 0 < hit.strength <= 1:
            raise ValueError(f"onsets {hit}: its strength is not above 0, up to 1")
        if hit.material is not None and hit.material not in materials:
            raise ValueError(f"onsets {hit}: its material is not one of {', '.join(materials)}")
    return tuple(sorted(hits, key=lambda hit: hit.time))


# ---- files ---------------------------------------------------------------------------------------


def read_lines(path):
    """[(number, line)] of a text file's lines that are not empty."""
    remedy = "give a CSV file or a label track of Audacity, in UTF-8"
    try:
        # a byte order mark goes, and every kind of line end becomes \n
        text = Path(path).read_text("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; {remedy}") from None
    if "\0" in text:
        raise UserError(f"{path}: not a text file; {remedy}")
    # spreadsheets write rows of empty cells as commas
    return [(k, line) for k, line in enumerate(text.split("\n"), 1) if line.strip(", \t")]


def read_hits(
    path: Path | str, materials: Collection[str], with_guesses: bool = False
) -> list[Hit]:
    """Hits of a CSV file or a label track, ascending in time; none where the file has none.

    materials: those that are known. with_guesses: materials with a question mark are guesses, to be
    shown or written again; without it they are as good as missing. Raises UserError, which names
    the line.
    """
    lines = read_lines(path)
    # a label has two times with a tab between; a line of CSV has none
    is_labels = bool(lines) and "\t" in lines[0][1]
    columns = COLUMNS
    hits = []
    for place, (number, line) in enumerate(lines):
        try:
            header = csv_columns(line) if place == 0 and not is_labels else None
            if header:
                columns = header
            elif not is_labels:
                hits.append(hit_of(csv_fields(line, columns), materials, with_guesses))
            # the frequencies of the label before, where it was drawn in a spectrogram
            elif not place or not line.startswith("\\"):
                hits.append(hit_of(label_fields(line), materials, with_guesses))
        except ValueError as error:
            raise UserError(f"{path}: line {number}: {error}") from None
    # by time alone: a strength that is missing cannot be compared
    return sorted(hits, key=lambda hit: hit.time)


def opened_hits(given, finders: Collection[str], materials: Collection[str]):
    """What may be given as hits, ready for use: hits, checked; the name of a finder; of a file, its
    hits, so that a mistake in it shows before any work; a folder's path; None.

    Raises ValueError for what is none of these, and UserError of `read_hits`.
    """
    if isinstance(given, tuple):
        return checked(given, materials)
    if given is None or given in finders:
        return given
    if not str(given) or not Path(given).exists():
        names = ", ".join(finders)
        raise ValueError(f"onsets {str(given)!r:.40}: not one of {names}, nor a file")
    path = Path(given)
    return path if path.is_dir() else tuple(read_hits(path, materials))


def write_hits(path: Path | str, hits: Iterable[Hit]):
    """Write a label track, which `read_hits` and Audacity read; times in whole microseconds.

    What the model guesses has a question mark behind it, and reads as nothing said. Atomic. Raises
    FileError.
    """
    # a hit is a label that ends where it starts
    lines = []
    for hit in hits:
        material = f"{hit.material}?" if hit.is_guess else hit.material
        words = [str(word) for word in (material, hit.strength) if word is not None]
        lines.append(f"{hit.time:.6f}\t{hit.time:.6f}\t{' '.join(words)}\n")
    write_bytes(path, "".join(lines).encode())
