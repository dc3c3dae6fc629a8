"""Damaged copies of small files through the commands that read files: no traceback, no crash, no
hang, nothing left behind.

in   how many copies, a seed
out  a line of figures a command; exit status 1 if anything went wrong, with the copies that caused
     it in --keep

    python -m tools.fuzz --copies 2000      half an hour on two cores; not part of the tests

Twenty seed files of different containers and codecs are made with PyAV. A copy has bytes flipped,
zeroed, swapped, left out or repeated, or its end cut off. Copies go through `sample.py --steps 1`,
`sample.py --verify` and `data.py prepare` in batches, as a user would give a folder; a batch
without a new line for 30 s hangs.
"""

import argparse
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

ROOT = Path(__file__).resolve().parent.parent
STILL = 30.0  # seconds without a line
MEMORY = 2e9  # bytes that a process may hold
BATCH = 50
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


def make_seed(path, muxer, codec, sound, layout):
    """A clip of a second and a half with a moving square and a click."""
    size = (176, 144) if codec == "h263" else (96, 64)
    rate = 44100 if codec in ("flv", "wmv2") else 48000
    pixels = {"prores_ks": "yuv422p10le", "gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {"g": "8"}
    with av.open(str(path), "w", format=muxer) as file:
        video = file.add_stream(codec, rate=25, options=options)
        video.width, video.height, video.pix_fmt = *size, pixels
        track = file.add_stream(sound, rate=rate, layout=layout) if sound else None
        if track:
            channels = track.layout.nb_channels
            wav = np.zeros((channels, 3 * rate // 2), np.float32)
            wav[:, rate // 2 : rate // 2 + 200] = 0.5
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(wav.T).reshape(1, -1), format="flt", layout=layout
            )
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
            file.mux(track.encode(frame))
            file.mux(track.encode(None))
        for k in range(37):
            image = np.full((size[1], size[0], 3), 40, np.uint8)
            image[20:40, k : k + 20] = 200
            frame = av.VideoFrame.from_ndarray(image)
            frame.pts, frame.time_base = k, Fraction(1, 25)
            file.mux(video.encode(frame))
        file.mux(video.encode(None))


def damaged(content, rng):
    """A copy of bytes with one to eight wounds, most of them where headers are."""
    content = bytearray(content)
    for _ in range(int(rng.integers(1, 9))):
        size = len(content)
        end = size if rng.random() < 0.6 else min(size, 2048)
        at = int(rng.integers(0, max(1, end - 1)))
        length = int(min(size - at, 2 ** rng.integers(0, 10)))
        kind = rng.integers(7)
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


def peak_memory(pid):
    """Bytes that a process and its children have held at most so far."""
    total = 0
    for status in [Path(f"/proc/{pid}/status"), *Path(f"/proc/{pid}/task").glob("*/children")]:
        try:
            text = status.read_text()
        except OSError:
            continue
        if status.name == "children":
            total += sum(peak_memory(child) for child in text.split())
        elif found := re.search(r"VmHWM:\s*(\d+)", text):
            total += 1024 * int(found[1])
    return total


def run(command, folder):
    """-> (exit status or "hang", lines, the most bytes held). Lines are read as they come, so that
    a hang is noticed."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder
    )
    text, peak, last = b"", 0, time.monotonic()
    while True:
        ready, _, _ = select.select([process.stdout], [], [], 1.0)
        peak = max(peak, peak_memory(process.pid))
        if ready:
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                break
            text += piece
            last = time.monotonic()
        elif time.monotonic() - last > STILL:
            process.kill()
            process.wait()
            return "hang", text.decode(errors="replace").splitlines(), peak
    return process.wait(), text.decode(errors="replace").splitlines(), peak


def check(name, command, folder, allowed, before, found):
    """Run a command over the folder of a batch and note what went wrong in `found`."""
    status, lines, peak = run(command, folder)
    wrong = []
    if status not in allowed:
        wrong.append(f"exit status {status}")
    if any("Traceback" in line for line in lines):
        wrong.append("traceback")
    if peak > MEMORY:
        wrong.append(f"{peak / 1e9:.1f} GB")
    left = sorted(p.name for p in folder.rglob(".*") if p.is_file() and p.name != ".lock")
    if left:
        wrong.append(f"left behind: {left[:3]}")
    if sorted(p.name for p in folder.iterdir() if p.name in before) != before:
        wrong.append("an input is gone")
    found[name]["crashes of FFmpeg, each one line"] += sum(
        "FFmpeg crashed" in line for line in lines
    )
    found[name]["peak GB"] = max(found[name]["peak GB"], round(peak / 1e9, 2))
    if wrong:
        found[name]["wrong"] += 1
        print(
            f"\n{folder.name} {name}: {'; '.join(wrong)}", *lines[-12:], sep="\n  ", file=sys.stderr
        )
    return not wrong


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--copies", type=int, default=2000, metavar="N", help="damaged copies (2000)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep",
        type=Path,
        default=Path("fuzz-failed"),
        metavar="DIR",
        help="where batches that failed go",
    )
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    sample, data = str(ROOT / "sample.py"), str(ROOT / "data.py")
    found = collections.defaultdict(lambda: collections.Counter({"wrong": 0}))
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        seeds = []
        for name, seed in SEEDS.items():
            make_seed(scratch / name, *seed)
            seeds.append((scratch / name).read_bytes())
        for first in tqdm(range(0, args.copies, BATCH), unit="batch"):
            folder = scratch / f"batch{first:05d}"
            folder.mkdir()
            for k in range(first, min(first + BATCH, args.copies)):
                name = list(SEEDS)[k % len(SEEDS)]
                (folder / f"{k:05d}{Path(name).suffix}").write_bytes(
                    damaged(seeds[k % len(SEEDS)], rng)
                )
            before = sorted(p.name for p in folder.iterdir())
            outputs = ["--out", str(folder / "out")]
            python = sys.executable
            fine = [
                check(
                    "sample.py --steps 1",
                    [python, sample, *before, *outputs, "--steps", "1", "--cg", "0", "--json"],
                    folder,
                    (0, 1),
                    before,
                    found,
                ),
                check(
                    "sample.py --verify",
                    [python, sample, "--verify", *before],
                    folder,
                    (0, 1, 3),
                    before,
                    found,
                ),
                check(
                    "data.py prepare",
                    [python, data, "prepare", ".", str(scratch / f"set{first}")],
                    folder,
                    (0, 1),
                    before,
                    found,
                ),
            ]
            for name in found:
                found[name]["copies"] += len(before)
            if not all(fine):
                failed += 1
                args.keep.mkdir(exist_ok=True)
                shutil.copytree(folder, args.keep / folder.name, dirs_exist_ok=True)
            shutil.rmtree(folder)
            shutil.rmtree(scratch / f"set{first}", ignore_errors=True)
    for name, figures in found.items():
        print(f"{name}: {json.dumps(dict(figures))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
