"""What preparing and reading training clips costs: measured on one core, and for a large set.

    python -m tools.speed_data [FOLDER]

FOLDER holds videos with sound; without one, four procedural clips are made. A minute.

Preparing: the first ten seconds of every video, both presets; hours and bytes for VGGSound's
200,000 clips, by arithmetic, were all like these. Reading: windows of each preset a second, from a
set of those clips in the page cache, sound included. Opening a set and drawing a window from it: at
one shard (256 clips) and at 782 shards (200,192 clips), which are links to that one.
"""

import itertools
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

import data
import foley
from common import cli, ffmpeg

# frames a second, pixels, frames of a window
PRESETS = {"paper": (4.0, 224, 16), "mini": (15.625, 64, 128)}
VGGSOUND = 200_000
CORES = (2, 16, 64)
SHARDS = (1, -(-VGGSOUND // data.SHARD_CLIPS))


def seconds(call, rounds):
    """The median of `rounds` calls, in this process's own time, so that others do not count."""
    times = []
    for k in range(rounds):
        start = time.process_time()
        call(k)
        times.append(time.process_time() - start)
    return statistics.median(times)


def print_table(titles, rows):
    print("\n| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def prepare(jobs, name):
    """A row a file and the means; -> {file: columns}."""
    fps, size, _ = PRESETS[name]
    encoded = {}
    costs = []
    rows = []

    def encode(job):
        ffmpeg._probe.cache_clear()  # what is known of the file from the round before
        encoded[job.name] = data.encode_clip(job, fps, size)

    for job in jobs:
        core = seconds(lambda _, job=job: encode(job), 3)
        result = encoded.pop(job.name)
        if isinstance(result, data.LeftOut):
            print(f"{job.name}: {result.reason}, {result.detail}")
            continue
        columns, _ = result
        encoded[job.name] = columns
        info = ffmpeg.probe(job.path)
        frames = len(columns["bounds"]) - 1
        # clips shorter than ten seconds count by their length
        scale = 10 / (frames / fps)
        megabytes = scale * sum(column.nbytes for column in columns.values()) / 1e6
        costs.append((core * scale, megabytes))
        video = f"{info.codec} {info.width}x{info.height} at {info.fps:.3g}"
        kilobytes = len(columns["frames"]) / frames / 1000
        rows.append(
            [job.name, video, f"{core * scale:.3f}", f"{kilobytes:.1f}", f"{megabytes:.2f}"]
        )
    core, megabytes = np.mean(costs, 0)
    rows.append(["mean", "", f"{core:.3f}", "", f"{megabytes:.2f}"])
    titles = [f"{name} preset, ten seconds of", "", "seconds of a core", "kB a frame", "MB a clip"]
    print_table(titles, rows)
    hours = ", ".join(f"{VGGSOUND * core / cores / 3600:.1f} h on {cores} cores" for cores in CORES)
    print(f"\n{VGGSOUND:,} clips of ten seconds: {hours}; {VGGSOUND * megabytes / 1000:.0f} GB")
    return encoded


def write(root, name, encoded):
    """A set of one full shard, and how fast it was written: what all cores wait for."""
    fps, size, _ = PRESETS[name]
    names = ["bounds", "frames", "sound"]
    metadata = {"columns": names, "fps": fps, "size": size, "labels": False}
    clips = itertools.cycle(encoded.values())
    start = time.perf_counter()
    with data.Writer(root, metadata) as writer:
        for k, clip in zip(range(data.SHARD_CLIPS), clips, strict=False):
            columns = {column: array.copy() for column, array in clip.items()}
            writer.add(str(k), "", "train", columns)
        writer.finish(needed=())
    rate = data.SHARD_CLIPS / (time.perf_counter() - start)
    print(f"the one process that writes, disk included: {rate:.0f} clips a second")


def of_shards(source, root, count):
    """A set of `count` shards, which are links to the only one of `source`. -> root"""
    root.mkdir()
    metadata = json.loads((source / "set.json").read_text())
    metadata["clips"] *= count
    metadata["shards"] *= count
    (root / "set.json").write_text(json.dumps(metadata, indent=1))
    for number in range(count):
        os.symlink(data.shard_path(source, 0), data.shard_path(root, number))
    index = load_file(source / "index.safetensors")
    index = {name: np.tile(column, count) for name, column in index.items()}
    save_file(index, root / "index.safetensors")
    return root


def worker_memory(dataset):
    """Peak MB that a process of a DataLoader has to itself after 1,000 windows."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def draw():
        torch.set_num_threads(1)
        for k in torch.randint(len(dataset), (1000,)).tolist():
            dataset[k]
        rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
        private = [line.split()[1] for line in rollup if line.startswith("Private_")]
        theirs.send(sum(map(int, private)) / 1024)

    process = context.Process(target=draw)
    process.start()
    megabytes = ours.recv()
    process.join()
    return megabytes


def read(sets):
    """Windows a second; opening and drawing, and a reader's memory, at both numbers of clips."""
    rows = []
    costs = []
    for name, root in sets.items():
        fps, size, frames = PRESETS[name]
        clips = data.Clips(root, fps, size, frames)
        core = seconds(clips.__getitem__, 100)
        window = f"{frames} frames of {size}x{size}"
        rows.append([name, window, f"{1000 * core:.1f}", f"{1 / core:.0f}"])
        for count in SHARDS:
            large = of_shards(root, root.with_name(f"{name}-{count}"), count)
            opening = seconds(lambda _, large=large: data.Set(large), 5)
            choosing = seconds(lambda _, a=(large, fps, size, frames): data.Clips(*a), 5)
            clips = data.Clips(large, fps, size, frames)
            rng = torch.Generator().manual_seed(0)
            places = torch.randint(len(clips), (100,), generator=rng).tolist()
            drawing = seconds(lambda k, clips=clips, at=places: clips[at[k]], 100)
            times = [f"{1000 * value:.2f}" for value in (opening, choosing, drawing)]
            costs.append([name, f"{len(clips):,}", *times, f"{worker_memory(clips):.0f}"])
    print_table(["windows, sound included", "", "ms", "a second and core"], rows)
    titles = ["", "clips", "opening, ms", "and choosing clips, ms", "drawing a window, ms"]
    print_table([*titles, "a reader's own memory, MB"], costs)


def main():
    p = cli.Parser("tools.speed_data", __doc__)
    p.add_argument("folder", type=Path, nargs="?", help="videos with sound")
    args = p.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of clips that are too short for a window
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), cpu)
    print(f"{cpu}, {os.cpu_count()} cores, one of them used")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        if args.folder is None:
            args.folder = scratch / "foley"
            foley.make_set(args.folder, 4, seed=0, size=256, fps=25, duration=10.0)
        jobs = [job._replace(seconds=10.0) for job in data.find_jobs(args.folder)[0]]
        sets = {name: scratch / name for name in PRESETS}
        for name, root in sets.items():
            write(root, name, prepare(jobs, name))
        read(sets)


if __name__ == "__main__":
    main()
