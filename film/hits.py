"""The hits that a clip's sound plays: given by a person, or predicted from its features and motion;
or the first ones given and the rest predicted.

in   a clip with features, stage 2 with its heads (common/controls.py), the settings
out  [Hit]; a material that nobody has named is what the network sees, where it is sure of it
"""

import functools
import math

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
    """`check_onsets`, and what would otherwise fail in each clip: that the finder loads, and that
    --find-rest has enough marks.

    Raises ValueError, CheckpointError.
    """
    if settings.onsets in ("flow", "both") or settings.find_rest:
        finder_of(models)
    check_onsets(jobs, args, settings, models)
    if settings.find_rest:
        end = args.start + (args.duration or math.inf)
        for job in jobs:
            if job.line is None:
                hits = settings.onsets if job.hits is None else job.hits
                try:
                    check_marks([hit for hit in hits if args.start <= hit.time < end], job.given)
                except UserError as fault:
                    job.fail(fault)


def check_marks(marks, source):
    """Raises UserError if --find-rest has too few marks."""
    count = alike.count_times(marks)
    if count < alike.LEAST:
        raise UserError(
            f"{source}: --find-rest: needs the first {alike.LEAST} hits or more, at different "
            f"times; the labels have {count} in this part of the video"
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
            hits = find_remaining(hits, clip, models)
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
        head = read_onset_head(clip, models)
    if source != "model":
        with clip.profile("motion"):
            motion = finder_of(models).read(clip.source, clip.start, clip.seconds)
    return controls.find_hits(head, motion, round(clip.seconds / COLUMN))


def read_onset_head(clip, models):
    """The onset head's log odds of a hit in each mel column of the clip's features."""
    with clip.profile("features"):
        return controls.read_head(models.ldm.onset_head, clip.features).ravel()


def find_remaining(marks, clip, models):
    """The marks and the hits predicted after them. Raises UserError for too few, MediaError."""
    check_marks(marks, clip.source)
    head_odds = read_onset_head(clip, models)
    with clip.profile("motion"):
        # 18 KB a second, held for the whole clip, since they are used more than once
        parts = list(minutes(clip.source, clip.start, clip.seconds))
        columns = round(clip.seconds / COLUMN)
        return alike.find_rest(marks, head_odds, finder_of(models), parts, columns)
