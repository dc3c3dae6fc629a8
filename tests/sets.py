"""What the tests ask of prepared sets on disk."""

from pathlib import Path

import data


def content(folder):
    """{name: bytes} of a folder's files."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def names(root):
    opened = data.Set(root)
    return [opened.describe(clip)[0] for clip in range(opened.metadata["clips"])]


def splits(root):
    opened = data.Set(root)
    descriptions = map(opened.describe, range(opened.metadata["clips"]))
    return {name: split for name, _, split in descriptions}
