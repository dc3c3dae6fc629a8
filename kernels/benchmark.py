"""What the kernels' benchmarks share: what the device could do at most, and the table as JSON and as a picture.

    python -m kernels.attention | kernels.group_norm | kernels.transformer --out NAME       NAME.json and NAME.png, on a GPU
"""
import argparse
import json
import sys
from pathlib import Path

import torch

import kernels

WAYS = "eager", "compiled", "ours"


def begin(module, description, argv):
    """-> the path to write to or None; what the device is and reaches, measured; a function's milliseconds, median of many calls."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, metavar="NAME", help="write NAME.json and NAME.png too")
    out = p.parse_args(argv).out
    if not torch.cuda.is_available() or kernels.triton is None:
        sys.exit(f"{module}: there is nothing to time without an NVIDIA GPU and Triton")
    kernels.choose("triton")

    def milliseconds(function):
        return kernels.triton.testing.do_bench(function, return_mode="median")

    block, a = torch.empty(2 ** 30, dtype=torch.uint8, device="cuda"), torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    about = dict(benchmark=module, device=torch.cuda.get_device_name(), torch=torch.__version__, triton=kernels.triton.__version__,
                 copy_gb_s=round(2 * block.numel() / 1e6 / milliseconds(block.clone)),
                 matmul_tflops=round(2 * 8192 ** 3 / 1e9 / milliseconds(lambda: a @ a)))
    print(*(f"{k} {v}" for k, v in about.items()), sep="; ")
    return out, about, milliseconds


def compiled(reference):
    """The reference under torch.compile's most thorough mode; launches are not timed, so without its CUDA graphs."""
    torch.compiler.reset()
    return torch.compile(reference, mode="max-autotune-no-cudagraphs", dynamic=False)


def finish(out, about, rows):
    """rows: {"name", then milliseconds `eager`, `compiled`, `ours`, and with `_both` appended those with the backward pass, more}."""
    if out is None:
        return
    out.with_suffix(".json").write_text(json.dumps(dict(about, rows=rows), indent=1) + "\n")
    from matplotlib.figure import Figure                        # only where a picture is drawn
    ends = [end for end in ("", "_both") if f"ours{end}" in rows[0]]
    figure = Figure((5 * len(ends) + 3, 1.5 + 0.28 * len(rows)), layout="constrained")
    for axis, end in zip(figure.subplots(1, len(ends), sharey=True, squeeze=False)[0], ends):
        for k, way in enumerate(WAYS[:2]):
            axis.barh([i + 0.4 * k - 0.2 for i in range(len(rows))], [row[way + end] / row["ours" + end] for row in rows], 0.4, label=way)
        axis.axvline(1, color="black")
        axis.set(title="with the backward pass" if end else "forward", xlabel="its time, in ours (right of the line ours is faster)",
                 yticks=range(len(rows)), yticklabels=[row["name"] for row in rows])
        axis.invert_yaxis()
    figure.axes[0].legend()
    figure.suptitle(f"{about['benchmark']}, {about['device']}, bfloat16")
    figure.savefig(out.with_suffix(".png"))
