"""The pictures that the scripts draw, as png.

in   numbers and tensors
out  the picture, written to `path`
"""

import math
import struct
import zlib
from contextlib import contextmanager

import numpy as np
import torch

from common.audio import HOP, SAMPLE_RATE

# red, green and blue of a spectrogram on dark ground, from silence to the loudest
DARK = ((13, 15, 22), (43, 29, 89), (126, 37, 119), (211, 73, 86), (247, 153, 61), (252, 246, 196))
SHADES = 32  # in between: what the eye tells apart at this size, and a third of the bytes of 256


@contextmanager
def new_figure(path, width: float, height: float):
    """A Matplotlib figure of this size in inches, written to `path` at the end."""
    # takes a second to import, so only those who draw do
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    yield figure
    figure.savefig(path, format="png", dpi=100)


def show_mel(axis, mel, **options):
    """A mel (m, s), low bands below, at the same gray of every value in all pictures."""
    image = mel.float().cpu().numpy()
    axis.imshow(image, origin="lower", aspect="auto", vmin=0, vmax=1, **options)


def plot_result(path, title: str, frames, onsets: dict, mel, wav, seconds: float):
    """What `sample.py` made, on one time axis.

    frames uint8 (n, 3, h, w), spread evenly over `seconds`; onsets {row name: times in seconds};
    mel (128, s); wav (n,).
    """
    with new_figure(path, 12, 6) as figure:
        axes = figure.subplots(4, 1, sharex=True, height_ratios=(4, 1.5, 8, 4))
        strip, marks, spectrogram, wave = axes

        # the video
        width = seconds / len(frames)
        for k, frame in enumerate(frames):  # (3, h, w)
            extent = (k * width, (k + 1) * width, 0, 1)
            strip.imshow(frame.permute(1, 2, 0).numpy(), extent=extent, aspect="auto")
        strip.set(yticks=[], ylim=(0, 1), title=title)

        # onsets, a color for each row
        colors = [f"C{k}" for k in range(len(onsets))]
        marks.eventplot(list(onsets.values()), colors=colors, linelengths=0.8)
        marks.set(yticks=range(len(onsets)), yticklabels=list(onsets))

        # the sound
        show_mel(spectrogram, mel, extent=(0, mel.shape[1] * HOP / SAMPLE_RATE, 0, mel.shape[0]))
        spectrogram.set(ylabel="mel band")
        times = torch.arange(len(wav)) / SAMPLE_RATE
        wave.plot(times.numpy(), wav.numpy(), linewidth=0.5)
        wave.set(xlim=(0, seconds), ylim=(-1, 1), xlabel="seconds", ylabel="sound")


def plot_curves(path, rows: list):
    """The rows of log.jsonl, a panel for each logged value."""
    # in order of appearance; a row has only some of them
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if name not in ("step", "seconds")]
    height = max(1, math.ceil(len(names) / 4))
    with new_figure(path, 16, 3 * height) as figure:
        for i, name in enumerate(names, 1):
            axis = figure.add_subplot(height, 4, i)
            logged = [row for row in rows if name in row]
            steps = [row["step"] for row in logged]
            values = [row[name] for row in logged]
            # validation is rare: mark where it happened
            marker = "." if name.startswith("val_") else ""
            axis.plot(steps, values, marker=marker)
            axis.set(title=name, xlabel="step")


def plot_mels(path, pairs: list):
    """[(reference, generated) mels (128, s)] side by side, the references above."""
    with new_figure(path, 16, 5) as figure:
        axes = figure.subplots(2, len(pairs), squeeze=False)
        for column, pair in zip(axes.T, pairs, strict=True):
            for axis, title, mel in zip(column, ("reference", "generated"), pair, strict=True):
                show_mel(axis, mel)
                axis.set(title=title, xticks=[], yticks=[])


def plot_table(path, rows: dict, intervals: dict, columns: list):
    """Values between 0 and 1 as dots with their intervals: a panel for each column.

    rows {row: {column: value}}, intervals {row: {column: (low, high)}}.
    """
    with new_figure(path, 3 * len(columns) + 1, 1 + 0.35 * len(rows)) as figure:
        panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for axis, column in zip(panels, columns, strict=True):
            for k, name in enumerate(rows):
                axis.plot(intervals[name][column], [k, k], "C0", linewidth=3, alpha=0.4)
                axis.plot(rows[name][column], k, "C0o")
            axis.set(title=column, xlim=(-0.02, 1.02))
            axis.set(yticks=range(len(rows)), yticklabels=list(rows))
            axis.grid(alpha=0.3)
        # the first row on top
        panels[0].invert_yaxis()


def plot_speedups(path, title: str, ratios: dict):
    """{baseline: {row name: its time / ours}} as bars."""
    names = list(dict.fromkeys(name for rows in ratios.values() for name in rows))
    with new_figure(path, 8, 1.5 + 0.28 * len(names)) as figure:
        axis = figure.subplots()
        # two bars side by side where both baselines have the row
        for k, (baseline, rows) in enumerate(ratios.items()):
            places = [names.index(name) + 0.4 * k - 0.2 for name in rows]
            axis.barh(places, list(rows.values()), 0.4, label=baseline)
        axis.axvline(1, color="black")
        axis.set(title=title, xlabel="its time, in ours (right of the line ours is faster)")
        axis.set(yticks=range(len(names)), yticklabels=names)
        axis.invert_yaxis()
        axis.legend()


def mel_png(mel):
    """A mel (m, s) in [0, 1] as the bytes of a png, a pixel for each value, low bands below.

    In colors of `DARK`, without axes: for a page that draws its own.
    """
    anchors = np.linspace(0, SHADES - 1, len(DARK))
    palette = [np.interp(range(SHADES), anchors, channel) for channel in zip(*DARK, strict=True)]
    palette = np.stack(palette, 1).round().astype(np.uint8)  # (shades, 3)
    shades = (mel.float().clamp(0, 1) * (SHADES - 1)).round().byte().numpy()[::-1]  # (m, s)

    # every row begins with the number of its filter; 0 is none
    rows = np.pad(shades, ((0, 0), (1, 0))).tobytes()
    height, width = shades.shape
    chunks = {
        # 8 bits a pixel, indices of a palette
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0),
        b"PLTE": palette.tobytes(),
        b"IDAT": zlib.compress(rows, 9),
        b"IEND": b"",
    }
    png = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks.items():
        check = zlib.crc32(name + content)
        png += struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)
    return png
