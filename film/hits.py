"""The hits of a clip that nobody has given: found in its features, by its motion, or by both.

in   a clip with features, stage 2 with its heads (common/controls.py), who is to find them
out  [Hit], with the material that is seen where the network is sure of it
"""

import torch

from common import controls, media
from common.audio import COLUMN


@torch.no_grad()
def found_hits(clip, ldm, finder, materials):
    """The hits that the onset head finds in the clip's features, its motion shows, or both say.

    materials: named by a person, () if the model is to say what it sees."""
    if finder == "none":
        return []
    # what each of the two says
    odds = motion = None
    if finder != "flow":
        with clip.profile("features"):
            odds = controls.read_head(ldm.onset_head, clip.features).ravel()
    if finder != "model":
        with clip.profile("decode"):
            motion = media.clip_motion(clip.source, clip.start, clip.seconds).numpy()
    hits = controls.find_hits(odds, motion, round(clip.seconds / COLUMN))
    # and of what material they are, unless a person says so
    if not ldm.config.names_materials or materials:
        return hits
    said = controls.read_head(ldm.material_head, clip.features)
    return controls.name_materials(hits, said, ldm.config.materials, 1 / ldm.config.fps)
