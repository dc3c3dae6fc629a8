"""The hits that a clip's sound plays: given by a person, or found in its features and its motion.

in   a clip with features, stage 2 with its heads (common/controls.py), the settings
out  [Hit]; a material that nobody has named is what the network sees, where it is sure of it
"""

import torch

from common import controls, media
from common.audio import COLUMN
from common.onsets import read_hits
from film.jobs import labels_of


@torch.no_grad()
def hits_to_play(clip, ldm, settings):
    """The hits of a clip, in seconds from its start. Raises UserError for a file of labels."""
    if settings.onsets in controls.FINDERS:
        hits = found_hits(clip, ldm, settings.onsets)
    else:
        hits = settings.onsets
        if not isinstance(hits, tuple):
            hits = read_hits(labels_of(clip.source, hits), ldm.materials)
        hits = controls.hits_within(hits, clip.start, clip.seconds, clip.source)
    # of what material they are, unless a person says so
    if ldm.config.names_materials and hits and not settings.material:
        seen = controls.read_head(ldm.material_head, clip.features)
        hits = controls.name_materials(hits, seen, ldm.config.materials, 1 / ldm.config.fps)
    return hits


def found_hits(clip, ldm, finder):
    """What the onset head finds in the clip's features, its motion shows, or both say."""
    if finder == "none":
        return []
    odds = motion = None
    if finder != "flow":
        with clip.profile("features"):
            odds = controls.read_head(ldm.onset_head, clip.features).ravel()
    if finder != "model":
        with clip.profile("decode"):
            motion = media.clip_motion(clip.source, clip.start, clip.seconds).numpy()
    return controls.find_hits(odds, motion, round(clip.seconds / COLUMN))
