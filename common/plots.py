"""Every picture that the scripts draw, as png. Matplotlib takes a second to import, so only these functions do.

in   numbers and tensors
out  the picture, written to `path`
"""

import math

import torch

from common.audio import HOP, SAMPLE_RATE


def plot_result(path, title, frames, onsets, mel, wav, seconds):
    """What `sample.py` made, on one time axis.

    frames uint8 (n, 3, h, w), spread evenly over `seconds`; onsets {row name: times in seconds};
    mel (128, s); wav (n,).
    """
    from matplotlib.figure import Figure

    figure = Figure((12, 6), layout="constrained")
    strip, marks, spectrogram, wave = figure.subplots(
        4, 1, sharex=True, height_ratios=(4, 1.5, 8, 4)
    )
    width = seconds / len(frames)
    for k, frame in enumerate(frames):  # (3, h, w)
        extent = (k * width, (k + 1) * width, 0, 1)
        strip.imshow(frame.permute(1, 2, 0).numpy(), extent=extent, aspect="auto")
    strip.set(yticks=[], ylim=(0, 1), title=title)

    colors = [f"C{k}" for k in range(len(onsets))]
    marks.eventplot(list(onsets.values()), colors=colors, linelengths=0.8)
    marks.set(yticks=range(len(onsets)), yticklabels=list(onsets))

    extent = (0, mel.shape[1] * HOP / SAMPLE_RATE, 0, mel.shape[0])
    spectrogram.imshow(mel.numpy(), origin="lower", aspect="auto", extent=extent, vmin=0, vmax=1)
    spectrogram.set(ylabel="mel band")

    wave.plot((torch.arange(len(wav)) / SAMPLE_RATE).numpy(), wav.numpy(), linewidth=0.5)
    wave.set(xlim=(0, seconds), ylim=(-1, 1), xlabel="seconds", ylabel="sound")
    figure.savefig(path, format="png", dpi=100)


def plot_curves(path, rows):
    """The rows of log.jsonl, a panel for each logged value."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(k for row in rows for k in row if k not in ("step", "seconds")))
    height = max(1, math.ceil(len(names) / 4))
    figure = Figure(figsize=(16, 3 * height), layout="constrained")
    for i, name in enumerate(names):
        axis = figure.add_subplot(height, 4, i + 1)
        steps = [row["step"] for row in rows if name in row]
        values = [row[name] for row in rows if name in row]
        axis.plot(steps, values, marker="." if name.startswith("val_") else "")
        axis.set(title=name, xlabel="step")
    figure.savefig(path, format="png")


def plot_mels(path, pairs):
    """[(reference, generated) mels (128, s)] side by side, the references above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 5), layout="constrained")
    for i, pair in enumerate(pairs):
        for k, (title, mel) in enumerate(zip(("reference", "generated"), pair, strict=True)):
            axis = figure.add_subplot(2, len(pairs), k * len(pairs) + i + 1)
            axis.imshow(mel.float().cpu().numpy(), origin="lower", aspect="auto", vmin=0, vmax=1)
            axis.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, format="png")


def plot_table(path, rows, intervals, columns):
    """Values between 0 and 1 as dots with their intervals: a panel for each column."""
    from matplotlib.figure import Figure

    size = (3 * len(columns) + 1, 1 + 0.35 * len(rows))
    figure = Figure(size, layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, column in zip(panels, columns, strict=True):
        for k, name in enumerate(rows):
            low, high = intervals[name][column]
            axis.plot([low, high], [k, k], "C0", linewidth=3, alpha=0.4)
            axis.plot(rows[name][column], k, "C0o")
        axis.set(title=column, xlim=(-0.02, 1.02), yticks=range(len(rows)), yticklabels=list(rows))
        axis.grid(alpha=0.3)
    panels[0].invert_yaxis()
    figure.savefig(path, format="png")


def plot_speedups(path, title, ratios):
    """{baseline: {row name: its time in ours}} as bars; right of the line ours is faster."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for rows in ratios.values() for name in rows))
    figure = Figure((8, 1.5 + 0.28 * len(names)), layout="constrained")
    axis = figure.subplots()
    for k, (baseline, rows) in enumerate(ratios.items()):
        places = [names.index(name) + 0.4 * k - 0.2 for name in rows]
        axis.barh(places, list(rows.values()), 0.4, label=baseline)
    axis.axvline(1, color="black")
    axis.set(
        title=title,
        xlabel="its time, in ours (right of the line ours is faster)",
        yticks=range(len(names)),
        yticklabels=names,
    )
    axis.invert_yaxis()
    axis.legend()
    figure.savefig(path, format="png")
