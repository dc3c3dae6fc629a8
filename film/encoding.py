"""What a codec makes of a sound's peak: lossy ones overshoot, and what is played counts.

in   a file of sound as plain float32 (n, channels), the suffix of the video that will hold it
out  the true peak, in dBTP, of that sound encoded as `common.mux` does and decoded again

Runs in the child process and does not import torch.
"""

import io
from pathlib import Path

import av

from common.mux import CONTAINERS, add_sound, sound_packets
from film.loudness import measure


def decoded_blocks(file):
    """(rate, blocks (n, channels)) of the one sound track of a file."""
    container = av.open(file)
    track = container.streams.audio[0]
    layout = track.layout.name
    to_float = av.AudioResampler("flt", layout, track.rate)
    channels = len(track.layout.channels)

    def blocks():
        with container:
            for frame in container.decode(track):
                for part in to_float.resample(frame):
                    yield part.to_ndarray().reshape(-1, channels)

    return track.rate, blocks()


def encoded_peak(path: str, suffix: str, rate: int, channels: int) -> float:
    """The true peak of the sound in `path` once it is in a video of this suffix."""
    samples = Path(path).stat().st_size // (4 * channels)
    muxer, codec = CONTAINERS[suffix]
    memory = io.BytesIO()
    with av.open(memory, "w", muxer) as container:
        track = add_sound(container, codec, rate, channels)
        for packet in sound_packets(path, track, samples):
            container.mux(packet)
    memory.seek(0)
    decoded_rate, blocks = decoded_blocks(memory)
    return measure(blocks, decoded_rate).true_peak
