"""Damaged copies of small files through the commands that read files: none may hang or crash.

in   how many copies, a seed
out  a line of figures a command; exit status 1 if anything failed, with the copies in --keep

    python -m tools.fuzz --copies 2000            half an hour on two cores; not part of the tests

Twenty seed files of different containers and codecs are made with PyAV. A copy has bytes flipped,
zeroed, swapped, left out or repeated, or its end cut off. Copies go through `sample.py --steps 1`,
`sample.py --verify` and `data.py prepare` in batches, as a user would give a folder. A run fails by
a traceback, another exit status than these commands have, a silence of 30 s, more than 2 GB, a
temporary file left behind, or an input that is gone.
"""

import collections
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from common import cli

ROOT = Path(__file__).resolve().parent.parent

SILENCE = 30.0  # seconds without a line, after which a run is taken to hang
MEMORY = 2e9  # bytes that a run may hold
BATCH = 50
# name, command line (FILES: the names of all copies), the exit statuses it may have
COMMANDS = (
    ("sample.py --steps 1", "sample.py FILES --out out --steps 1 --cg 0 --json", (0, 1)),
    ("sample.py --verify", "sample.py --verify FILES", (0, 1, 3)),
    ("data.py prepare", "data.py prepare . ../set", (0, 1)),
)
# name: muxer, picture codec, sound codec, layout
SEEDS = {
    "a.mp4": ("mp4", "libx264", "aac", "stereo"),
    "b.mp4": ("mp4", "libx265", "aac", "7.1"),
    "c.mov": ("mov", "prores_ks", "pcm_f32le", "stereo"),
    "d.mov": ("mov", "mjpeg", "pcm_s16le", "mono"),
    "e.mkv": ("matroska", "libx264", "flac", "5.1"),
    "f.mkv": ("matroska", "ffv1", "libopus", "7.1"),
    "g.webm": ("webm", "libvpx-vp9", "libopus", "stereo"),
    "h.webm": ("webm", "libvpx", "libopus", "stereo"),
    "i.avi": ("avi", "mpeg4", "libmp3lame", "stereo"),
    "j.avi": ("avi", "libx264", "pcm_s16le", "stereo"),
    "k.ts": ("mpegts", "libx264", "mp2", "stereo"),
    "l.mpg": ("mpeg", "mpeg2video", "mp2", "stereo"),
    "m.flv": ("flv", "flv", "libmp3lame", "stereo"),
    "n.wmv": ("asf", "wmv2", "libmp3lame", "stereo"),
    "o.ogv": ("ogg", "libvpx", "libopus", "stereo"),
    "p.3gp": ("3gp", "h263", None, None),
    "q.264": ("h264", "libx264", None, None),
    "r.hevc": ("hevc", "libx265", None, None),
    "s.gif": ("gif", "gif", None, None),
    "t.nut": ("nut", "mpeg2video", "ac3", "5.1"),
}


def make_seed(path: Path, muxer, codec, sound, layout):
    """Write a clip of a second and a half with a moving square and a click."""
    width, height = (176, 144) if codec == "h263" else (96, 64)
    rate = 44100 if codec in ("flv", "wmv2") else 48000
    pixels = {"prores_ks": "yuv422p10le", "gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {"g": "8"}
    with av.open(str(path), "w", format=muxer) as file:
        video = file.add_stream(codec, rate=25, options=options)
        video.width = width
        video.height = height
        video.pix_fmt = pixels
        # sound: silence with a click
        if sound:
            track = file.add_stream(sound, rate=rate, layout=layout)
            wav = np.zeros((3 * rate // 2, track.layout.nb_channels), np.float32)
            wav[rate // 2 : rate // 2 + 200] = 0.5
            frame = av.AudioFrame.from_ndarray(wav.reshape(1, -1), format="flt", layout=layout)
            frame.sample_rate = rate
            frame.time_base = Fraction(1, rate)
            frame.pts = 0
            file.mux(track.encode(frame))
            file.mux(track.encode(None))
        # picture: a square that moves by a pixel a frame
        for k in range(37):
            image = np.full((height, width, 3), 40, np.uint8)
            image[20:40, k : k + 20] = 200
            frame = av.VideoFrame.from_ndarray(image)
            frame.pts = k
            frame.time_base = Fraction(1, 25)
            file.mux(video.encode(frame))
        file.mux(video.encode(None))


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """A copy with one to eight changes, most of them where headers are."""
    content = bytearray(content)
    for _ in range(int(rng.integers(1, 9))):
        # where, how much and what
        size = len(content)
        end = size if rng.random() < 0.6 else min(size, 2048)
        at = int(rng.integers(0, max(1, end - 1)))
        length = int(min(size - at, 2 ** rng.integers(0, 10)))
        kind = rng.integers(7)
        # a flipped bit; noise, zeros or ones; bytes left out or repeated; the end cut off
        if kind == 0:
            content[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            content[at : at + length] = rng.bytes(length)
        elif kind == 2:
            content[at : at + length] = bytes(length)
        elif kind == 3:
            content[at : at + length] = b"\xff" * length
        elif kind == 4:
            del content[at : at + length]
        elif kind == 5:
            content[at:at] = content[at : at + length]
        elif rng.random() < 0.3:
            del content[at:]
    return bytes(content)


def peak_memory(pid) -> int:
    """Bytes that a process and its children have held at most so far."""
    # VmHWM, "high water mark", is the peak of a process's resident memory
    total = 0
    for status in [Path(f"/proc/{pid}/status"), *Path(f"/proc/{pid}/task").glob("*/children")]:
        try:
            text = status.read_text()
        except OSError:  # it has ended
            continue
        if status.name == "children":
            total += sum(peak_memory(child) for child in text.split())
        elif peak := re.search(r"VmHWM:\s*(\d+)", text):
            total += 1024 * int(peak[1])
    return total


def run(command: list[str], folder: Path):
    """-> exit status or "hang", lines of output, the most bytes held."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder
    )
    status = None
    text = b""
    peak = 0
    last = time.monotonic()
    while status is None:
        # read as it comes, so that a hang is noticed
        ready, _, _ = select.select([process.stdout], [], [], 1.0)
        peak = max(peak, peak_memory(process.pid))
        if ready:
            piece = os.read(process.stdout.fileno(), 1 << 16)
            text += piece
            last = time.monotonic()
            if not piece:
                status = process.wait()
        elif time.monotonic() - last > SILENCE:
            process.kill()
            process.wait()
            status = "hang"
    return status, text.decode(errors="replace").splitlines(), peak


def check(command: str, folder: Path, statuses, figures: dict) -> bool:
    """Run a command over a batch; whether all was well. Adds to the command's `figures`."""
    # the command line, with the names of the copies
    inputs = sorted(p.name for p in folder.iterdir() if p.is_file())
    script, *words = command.split()
    arguments = [sys.executable, str(ROOT / script)]
    for word in words:
        arguments += inputs if word == "FILES" else [word]
    status, lines, peak = run(arguments, folder)

    # what went wrong
    failures = []
    if status not in statuses:
        failures.append(f"exit status {status}")
    if any("Traceback" in line for line in lines):
        failures.append("traceback")
    if peak > MEMORY:
        failures.append(f"{peak / 1e9:.1f} GB")
    # temporary files have hidden names
    hidden = sorted(p.name for p in folder.rglob(".*") if p.is_file() and p.name != ".lock")
    if hidden:
        failures.append(f"left behind: {hidden[:3]}")
    if not all((folder / name).exists() for name in inputs):
        failures.append("an input is gone")

    figures["copies"] += len(inputs)
    figures["crashes of FFmpeg, each one line"] += sum("FFmpeg crashed" in line for line in lines)
    figures["peak GB"] = max(figures["peak GB"], round(peak / 1e9, 2))
    figures["failed runs"] += bool(failures)
    if failures:
        print(f"\n{folder.parent.name} {command}: {'; '.join(failures)}", file=sys.stderr)
        print(*lines[-12:], sep="\n  ", file=sys.stderr)
    return not failures


def main(argv=None):
    parser = cli.Parser("tools.fuzz", __doc__)
    parser.add_argument("--copies", type=int, default=2000, metavar="N", help="damaged copies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep",
        type=Path,
        default=Path("fuzz-failed"),
        metavar="DIR",
        help="folder for batches that failed",
    )
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    figures = {name: collections.Counter() for name, _, _ in COMMANDS}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        contents = {}
        # the files that are damaged
        for name, seed in SEEDS.items():
            make_seed(scratch / name, *seed)
            contents[name] = (scratch / name).read_bytes()
        names = list(SEEDS)
        for first in tqdm(range(0, args.copies, BATCH), unit="batch"):
            folder = scratch / f"batch{first:05d}" / "files"
            folder.mkdir(parents=True)
            # copies of all seeds in turn
            for k in range(first, min(first + BATCH, args.copies)):
                name = names[k % len(names)]
                copy = folder / f"{k:05d}{Path(name).suffix}"
                copy.write_bytes(damaged(contents[name], rng))
            results = [
                check(command, folder, statuses, figures[name])
                for name, command, statuses in COMMANDS
            ]
            # what failed is kept, so that it can be run again
            if not all(results):
                shutil.copytree(folder, args.keep / folder.parent.name, dirs_exist_ok=True)
            shutil.rmtree(folder.parent)
    for name, counts in figures.items():
        print(f"{name}: {json.dumps(counts)}")
    return int(any(counts["failed runs"] for counts in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
