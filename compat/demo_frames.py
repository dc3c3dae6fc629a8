"""The frames that the official demo sees: those of a lossy copy of the video at 4 frames a second.

in   a video
out  uint8 (f, 3, size, size)

Runs in a child process, as `common.ffmpeg` does, and so does not import torch. Follows
`inference/demo_util.py` 39-58 of the official repository.
"""

import io
import math
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from common.ffmpeg import MediaError, frames_from, picture, probe


def at_ticks(path: Path | str, fps: float, start: float, ticks: int) -> Iterator[av.VideoFrame]:
    """The frame that FFmpeg's copy at `fps` shows at each tick of the cut.

    FFmpeg rounds a frame's time to the nearest tick, so the copy shows the last frame that begins
    up to half a tick later, where a viewer sees the one that began before.
    """
    current = None
    done = 0
    for moment, frame in frames_from(path, start):
        if moment < start:
            continue
        if done == ticks:
            break
        tick = min(ticks, math.floor((moment - start) * fps + 0.5))
        if current is not None:
            for _ in range(done, tick):
                yield current
            done = max(done, tick)
        current = frame
    if current is None:
        raise MediaError(f"{path}: no picture begins after {start:g} s; choose an earlier start")
    for _ in range(done, ticks):
        yield current


def read_frames(path: Path | str, fps: float, size: int, start: float, seconds: float):
    """uint8 (f, 3, size, size): the frames of an H.264 copy of the video at `fps`.

    Raises MediaError where no picture begins after `start`.
    """
    info = probe(path)
    width = info.width // 2 * 2  # H.264 wants even sizes
    height = info.height // 2 * 2
    ticks = math.floor(min(seconds, info.duration - start) * fps + 0.5)
    scaler = VideoReformatter()

    # the copy, in memory
    memory = io.BytesIO()
    with av.open(memory, "w", format="mp4") as copy:
        # libx264's default quality
        track = copy.add_stream("libx264", rate=round(fps), options={"crf": "23"})
        track.width = width
        track.height = height
        track.pix_fmt = "yuv420p"
        for frame in at_ticks(path, fps, start, ticks):
            upright = np.ascontiguousarray(picture(frame, width, height, scaler))
            copy.mux(track.encode(av.VideoFrame.from_ndarray(upright, "rgb24")))
        copy.mux(track.encode(None))

    # its frames
    memory.seek(0)
    with av.open(memory) as copy:
        frames = [picture(frame, size, size, scaler) for frame in copy.decode(video=0)]
    return np.stack(frames).transpose(0, 3, 1, 2)  # (f, h, w, 3) -> (f, 3, h, w)
