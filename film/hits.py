"""The hits that a clip's sound plays: given by a person, found in its features and its motion, or
some given and the rest found.

in   a clip with features, stage 2 with its heads (common/controls.py), the settings
out  [Hit]; a material that nobody has named is what the network sees, where it is sure of it
"""

import functools

import torch

from common import controls
from common.audio import COLUMN
from common.files import UserError
from common.onsets import read_hits
from compat.hub import MINI
from film import alike
from film.jobs import check_onsets, labels_of
from finder import Finder, minutes


def check_hits(jobs, args, settings, models):
    """`check_onsets`; and before any work one line for a finder that does not load, and one for
    every file of too few marks.

    Raises ValueError, CheckpointError.
    """
    if settings.onsets in ("flow", "both") or settings.find_rest:
        finder_of(models)
    check_onsets(jobs, args, settings, models)
    if settings.find_rest:
        for job in jobs:
            if job.line is None:
                try:
                    check_marks(settings.onsets if job.hits is None else job.hits, job.given)
                except UserError as fault:
                    job.fail(fault)


def check_marks(marks, source):
    """Raises UserError for too few marks to find the rest of a clip by."""
    if alike.count(marks) < alike.LEAST:
        raise UserError(
            f"{source}: --find-rest: needs the first {alike.LEAST} hits or more; of the file's, "
            f"{alike.count(marks)} at different times lie in what is made"
        )


@torch.no_grad()
def hits_to_play(clip, models, settings):
    """The hits of a clip, in seconds from its start. Raises UserError for labels, MediaError."""
    ldm = models.ldm
    if settings.onsets in controls.FINDERS:
        hits = found_hits(clip, models, settings.onsets)
    else:
        hits = settings.onsets
        if not isinstance(hits, tuple):
            hits = read_hits(labels_of(clip.source, hits), ldm.materials)
        hits = controls.hits_within(hits, clip.start, clip.seconds, clip.source)
        if settings.find_rest:
            hits = completed(hits, clip, models)
    # of what material they are, unless a person says so
    if ldm.config.names_materials and hits and not settings.material:
        seen = controls.read_head(ldm.material_head, clip.features)
        hits = controls.name_materials(hits, seen, ldm.config.materials, 1 / ldm.config.fps)
    return hits


@functools.cache
def load_finder(path):
    return Finder.load(path)


def finder_of(models):
    """The finder beside the other files, or the shipped one."""
    return load_finder(models.sums.paths.get("finder", MINI / "finder.safetensors"))


def found_hits(clip, models, source):
    """What the onset head finds in the clip's features, the finder in its motion, or both."""
    if source == "none":
        return []
    head = motion = None
    if source != "flow":
        head = ask_head(clip, models)
    if source != "model":
        with clip.profile("motion"):
            motion = finder_of(models).read(clip.source, clip.start, clip.seconds)
    return controls.find_hits(head, motion, round(clip.seconds / COLUMN))


def ask_head(clip, models):
    """The onset head's log odds of a hit in each mel column of the clip's features."""
    with clip.profile("features"):
        return controls.read_head(models.ldm.onset_head, clip.features).ravel()


def completed(marks, clip, models):
    """The marks, and the hits after them that look alike. Raises UserError."""
    check_marks(marks, clip.source)
    head = ask_head(clip, models)
    with clip.profile("motion"):
        # held for the whole clip, 18 KB a second: they are needed more than once
        parts = list(minutes(clip.source, clip.start, clip.seconds))
        columns = round(clip.seconds / COLUMN)
        return alike.find_rest(marks, head, finder_of(models), parts, columns)
