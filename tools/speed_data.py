"""What preparing and reading training clips costs: measured on one core, and by arithmetic for a large set.

    python -m tools.speed_data [FOLDER]       FOLDER of videos with sound; without one, four procedural clips are made. A minute

Preparing: the first ten seconds of every video, both presets; hours and bytes for VGGSound's 200,000 clips, were all like these.
Reading: windows of each preset a second, from a set of those clips in the page cache, sound included. Opening a set and drawing a
window from it: at 200 and at 200,000 clips, of which the index says so.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the sources lie a folder up

from test_data import of_many  # noqa: E402

import data  # noqa: E402
import foley  # noqa: E402
from common import (
    ffmpeg,  # noqa: E402
    media,  # noqa: E402
)

PRESETS = {
    "paper": (4.0, 224, 16),
    "mini": (15.625, 64, 128),
}  # frames a second, pixels, frames of a window
VGGSOUND, CORES = 200_000, (2, 16, 64)


def seconds(call, rounds):
    """The median of `rounds` calls, in this process's own time, so that others on the machine do not count."""
    times = []
    for k in range(rounds):
        start = time.process_time()
        call(k)
        times.append(time.process_time() - start)
    return statistics.median(times)


def table(titles, rows):
    print("\n| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def preparing(jobs, name):
    """A row a file and the means; -> {file: columns}."""
    fps, size, _ = PRESETS[name]
    made, cost, rows = {}, [], []

    def encode(job):
        ffmpeg._probe.cache_clear()  # what is known of the file from the round before
        made[job.name] = data.encode_clip(job, fps, size)

    for job in jobs:
        took = seconds(lambda _: encode(job), 3)
        columns = made[job.name]
        if not isinstance(columns, dict):
            print(f"{job.name}: {columns[0]}, {columns[1]}")
            del made[job.name]
            continue
        info, n = media.probe(job.path), len(columns["bounds"]) // 4 - 1
        scale = 10 / (n / fps)  # clips shorter than ten seconds count by their length
        cost.append((took * scale, scale * sum(map(len, columns.values()))))
        rows.append(
            [
                job.name,
                f"{info.codec} {info.width}x{info.height} at {info.fps:.3g}",
                f"{took * scale:.3f}",
                f"{len(columns['frames']) / n / 1000:.1f}",
                f"{cost[-1][1] / 1e6:.2f}",
            ]
        )
    core, size_of = (sum(column) / len(cost) for column in zip(*cost))
    rows.append(["mean", "", f"{core:.3f}", "", f"{size_of / 1e6:.2f}"])
    table(
        [f"{name} preset, ten seconds of", "", "seconds of a core", "kB a frame", "MB a clip"], rows
    )
    hours = ", ".join(f"{VGGSOUND * core / cores / 3600:.1f} h on {cores} cores" for cores in CORES)
    print(f"\n{VGGSOUND:,} clips of ten seconds: {hours}; {VGGSOUND * size_of / 1e9:.0f} GB")
    return made


def write(folder, name, made):
    """A set of every clip 40 times, and how fast it was written: the one thing that all cores wait for."""
    fps, size, _ = PRESETS[name]
    about = {"columns": ["bounds", "frames", "sound"], "fps": fps, "size": size, "labels": False}
    start = time.perf_counter()
    with data.Writer(folder, about) as writer:
        for k in range(40):
            for clip, columns in made.items():
                writer.add(f"{k}/{clip}", "", "train", columns)
        writer.finish(needed=())
    rate = 40 * len(made) / (time.perf_counter() - start)
    print(f"the one process that writes, disk included: {rate:.0f} clips a second")


def drawing(sets):
    """Windows a second; opening and drawing at both numbers of clips."""
    rows, costs = [], []
    for name, root in sets.items():
        fps, size, frames = PRESETS[name]
        clips = data.Clips(root, fps, size, frames)
        took = seconds(clips.__getitem__, 100)
        rows.append(
            [name, f"{frames} frames of {size}x{size}", f"{1000 * took:.1f}", f"{1 / took:.0f}"]
        )
        for count in (200, VGGSOUND):
            many = of_many(root, root.with_name(f"{name}-{count}"), count)
            opening, choosing = (
                seconds(call, 5)
                for call in (
                    lambda _: data.Set(many),
                    lambda _: data.Clips(many, fps, size, frames),
                )
            )
            clips = data.Clips(many, fps, size, frames)
            where = torch.randint(
                len(clips), (100,), generator=torch.Generator().manual_seed(0)
            ).tolist()
            draw = seconds(lambda k: clips[where[k]], 100)
            costs.append(
                [
                    name,
                    f"{count:,}",
                    f"{1000 * opening:.2f}",
                    f"{1000 * choosing:.2f}",
                    f"{1000 * draw:.1f}",
                ]
            )
    table(["windows, sound included", "", "ms", "a second and core"], rows)
    table(
        ["", "clips in the set", "opening, ms", "and choosing clips, ms", "drawing a window, ms"],
        costs,
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folder", type=Path, nargs="?", help="videos with sound")
    args = p.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of clips that are too short for a window
    known = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next(
        (line.split(":")[1].strip() for line in known if "model name" in line), platform.processor()
    )
    print(f"{cpu}, {os.cpu_count()} cores, one of them used")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        if args.folder is None:
            args.folder = scratch / "foley"
            foley.make_set(args.folder, 4, seed=0, size=256, fps=25, duration=10.0)
        jobs = [job._replace(seconds=10.0) for job in data.find_jobs(args.folder)[0]]
        sets = {}
        for name in PRESETS:
            sets[name] = scratch / name
            write(sets[name], name, preparing(jobs, name))
        drawing(sets)


if __name__ == "__main__":
    main()
