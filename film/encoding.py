"""What a codec makes of a sound's peak: lossy ones overshoot, and what is played counts.

in   a file of sound as plain float32 (n, channels), a file for the encoded sound, the suffix of the
     video that will hold it
out  the true peak, in dBTP, of that sound encoded as `common.mux` does and decoded again

Runs in the child process and does not import torch.
"""

from pathlib import Path

import av

from common.mux import CONTAINERS, add_sound, sound_packets
from film.loudness import measure


def decoded_blocks(path):
    """(rate, blocks (n, channels)) of the one sound track of a file."""
    container = av.open(f"file:{path}")
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


def encoded_peak(path: str, out: str, suffix: str, rate: int, channels: int) -> float:
    """The true peak of the sound in `path` once it is in a video of this suffix.

    out: a file that is overwritten with the encoded sound, as that of an hour is 43 MB.
    """
    samples = Path(path).stat().st_size // (4 * channels)
    muxer, codec = CONTAINERS[suffix]
    with av.open(f"file:{out}", "w", muxer) as container:
        track = add_sound(container, codec, rate, channels)
        for packet in sound_packets(path, track, samples):
            container.mux(packet)
    decoded_rate, blocks = decoded_blocks(out)
    return measure(blocks, decoded_rate).true_peak
