"""The frames that the official demo sees: those of a lossy copy of the video at 4 frames a second.

in   a video
out  uint8 (f, 3, size, size)

Runs in a child process, as `common.ffmpeg` does, and so does not import torch. Each function names what it follows in the
official repository, under `inference/`.
"""

import io
import math

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from common.ffmpeg import MediaError, frames_from, picture, probe


def at_ticks(path, fps, start, ticks):
    """The frame that FFmpeg's copy at `fps` shows at each tick: the last one up to half a tick later, where a viewer sees
    what was shown last."""
    shown, done = None, 0
    for moment, frame in frames_from(path, start):
        if moment < start:
            continue
        if done == ticks:
            break
        until = min(ticks, math.floor((moment - start) * fps + 0.5))
        if shown is not None:
            yield from [shown] * (until - done)
            done = max(done, until)
        shown = frame
    if shown is None:
        raise MediaError(f"{path}: no picture begins after {start:g} s; choose an earlier start")
    yield from [shown] * (ticks - done)


def read_frames(path, fps, size, start, seconds):
    """uint8 (f, 3, size, size): the frames of an H.264 copy of the video at `fps` (`demo_util.py` 39-58)."""
    info, scaler, memory = probe(path), VideoReformatter(), io.BytesIO()
    width, height = info.width // 2 * 2, info.height // 2 * 2  # H.264 wants even sizes
    ticks = math.floor(min(seconds, info.duration - start) * fps + 0.5)
    with av.open(memory, "w", format="mp4") as copy:
        stream = copy.add_stream(
            "libx264", rate=round(fps), options={"crf": "23"}
        )  # libx264's default
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for shown in at_ticks(path, fps, start, ticks):
            upright = np.ascontiguousarray(picture(shown, width, height, scaler))
            copy.mux(stream.encode(av.VideoFrame.from_ndarray(upright, "rgb24")))
        copy.mux(stream.encode(None))
    memory.seek(0)
    with av.open(memory) as copy:
        frames = [
            picture(frame, size, size, scaler).transpose(2, 0, 1) for frame in copy.decode(video=0)
        ]
    return np.stack(frames)
