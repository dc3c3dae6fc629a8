"""Small videos and sounds made with PyAV for the tests, and what reading them back must show.

Frame k of a video is one gray (`grey(k)`), so that what was read says which frame it was. Sounds
are silence with short clicks, so that what was read says when each was.
"""

from fractions import Fraction

import av
import numpy as np

TICK = Fraction(1, 90000)  # seconds; the default clock of the videos
RATE = 16000


# ---- making ------------------------------------------------------------------------------------


def grey(k):
    """The gray value of frame k, far enough from its neighbors' to survive coding."""
    return 20 + k * 37 % 211


def steady(fps, seconds):
    """Time stamps of a constant frame rate; the last is the end of the last frame."""
    return [k / fps for k in range(round(fps * seconds) + 1)]


def clicks(seconds, times, rate=RATE):
    """Silence with a 2 ms burst at each time: float32 (n,)."""
    wav = np.zeros(round(seconds * rate), np.float32)
    for time in times:
        at = round(time * rate)
        wav[at : at + rate // 500] = 0.8
    return wav


def add_frame(track, image, pts, time_base):
    """Encode one RGB image (h, w, 3), uint8, shown from `pts` ticks on; -> packets."""
    frame = av.VideoFrame.from_ndarray(image)
    frame.pts = pts
    frame.time_base = time_base
    return track.encode(frame)


def add_sound(container, track, wav, sample_format="fltp", start=0):
    """Encode and write all of a sound: (n,) or (channels, n), interleaved for packed formats."""
    frame = av.AudioFrame.from_ndarray(
        np.atleast_2d(wav), format=sample_format, layout=track.layout.name
    )
    frame.sample_rate = track.rate
    frame.time_base = Fraction(1, track.rate)
    frame.pts = start
    container.mux(track.encode(frame))
    container.mux(track.encode(None))


def make(
    path,
    times,
    levels=None,
    wav=None,
    rate=RATE,
    size=(64, 48),
    codec="libx264",
    sound="aac",
    late=0.0,
    draw=None,
    options=None,
    layout="mono",
    tags=None,
    tick=TICK,
):
    """A video whose frame k is shown from times[k]; the last of `times` is the end.

    Frames have the gray values `levels`, or `grey(k)`; `draw(image, k)` may paint over them.
    The sound `wav` starts `late` seconds after the picture.
    """
    width, height = size
    stamps = [round(time / tick) for time in times]
    lengths = {a: b - a for a, b in zip(stamps[:-1], stamps[1:], strict=True)}
    if levels is None:
        levels = [grey(k) for k in range(len(lengths))]

    with av.open(str(path), "w") as file:
        video = file.add_stream(codec, rate=1000, options={"g": "12", **(options or {})})
        video.width = width
        video.height = height
        video.pix_fmt = "yuv420p"
        video.codec_context.time_base = tick
        track = None if wav is None else file.add_stream(sound, rate=rate, layout=layout)
        file.metadata.update(tags or {})

        def mux(packets):
            for packet in packets:
                packet.duration = lengths.get(packet.pts, packet.duration)
                file.mux_one(packet)

        for k, stamp in enumerate(stamps[:-1]):
            image = np.full((height, width, 3), levels[k], np.uint8)
            if draw:
                draw(image, k)
            mux(add_frame(video, image, stamp, tick))
        mux(video.encode(None))
        if track is not None:
            add_sound(file, track, wav, start=round(late * rate))
    return path


def make_video(path, seconds, fps=25, flashes=(), sound=None, size=32):
    """A dark picture that turns white for 0.1 s at each flash; sound (n,) at 16 kHz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        options = {"preset": "ultrafast", "crf": "30", "bf": "0"}
        video = out.add_stream("libx264", rate=fps, options=options)
        video.width = size
        video.height = size
        video.pix_fmt = "yuv420p"
        track = None if sound is None else out.add_stream("aac", rate=RATE, layout="mono")
        for i in range(round(seconds * fps)):
            white = any(f - 1e-6 <= i / fps < f + 0.1 for f in flashes)
            image = np.full((size, size, 3), 250 if white else 10, np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        out.mux(video.encode(None))
        if track:
            add_sound(out, track, np.asarray(sound, np.float32))
    return path


# ---- reading -----------------------------------------------------------------------------------


def onsets(wav):
    """Seconds at which the sound rises above half of its peak."""
    size = np.abs(np.asarray(wav))
    loud = np.flatnonzero(size > 0.5 * size.max())
    return loud[np.diff(loud, prepend=-RATE // 2) > RATE // 4] / RATE


def seen(frames):
    """Mean gray of each frame: (f, 3, h, w) -> (f,)."""
    return frames.float().mean((1, 2, 3)).numpy()


def shown(times, moments):
    """Gray values that a viewer sees at these moments; time stamps are whole ticks."""
    stamps = [round(time / TICK) for time in times[:-1]]
    ticks = [float(moment / TICK) + 0.5 for moment in moments]
    return [grey(int(np.searchsorted(stamps, tick, "right")) - 1) for tick in ticks]


def packets(path):
    """(bytes, seconds from the first shown, whether a key frame) of the video's packets."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        read = [packet for packet in file.demux(stream) if packet.dts is not None]
        stamps = [packet.pts * packet.time_base for packet in read]
        return [
            (bytes(packet), float(stamp - min(stamps)), packet.is_keyframe)
            for packet, stamp in zip(read, stamps, strict=True)
        ]


def one_line(caught, *words):
    """Assert that an error is one line with the reason, the remedy and these words."""
    message = str(caught.value)
    assert "\n" not in message and ";" in message
    assert all(word in message for word in words), message
