"""Checkpoints with random weights, of the published size (bfloat16, 2.2 GB) or of the mini model's,
under the names that `sample.py --weights DIR` looks for.

    python -m tools.gpu.weights DIR [--mini]
"""

from dataclasses import asdict
from pathlib import Path

import torch

import align
import cavp
import ldm
from common import checkpoints, cli

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where 860 million take a second, not 15


def random_tensor(key, t):
    """Weights that keep activations of order one."""
    if not t.is_floating_point():
        return torch.zeros(t.shape, dtype=t.dtype)
    # matrices keep the variance; norms start as the identity
    value = torch.empty(t.shape, device=DEVICE)
    if t.ndim > 1:
        value.normal_(0, t[0].numel() ** -0.5)
    else:
        value.fill_(float(key.endswith(("weight", "running_var"))))
    return value.bfloat16().cpu() if t.ndim > 1 else value.cpu()


def main():
    p = cli.Parser("tools.gpu.weights", __doc__)
    p.add_argument("folder", type=Path)
    p.add_argument("--mini", action="store_true", help="narrow, to try a run without a GPU")
    args = p.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    # the same files on every machine of a kind
    torch.manual_seed(0)
    preset = "mini" if args.mini else "paper"
    parts = {
        "cavp": (cavp.CAVP, cavp.PRESETS[preset]),
        "ldm": (ldm.LDM, ldm.PRESETS[preset]),
        "align": (align.Alignment, align.PRESETS[preset]),
    }
    for name, (cls, config) in parts.items():
        # shapes alone; values are drawn key by key, so no model is held
        with torch.device("meta"):
            state = cls(config).state_dict()
        state = {key: random_tensor(key, t) if t.is_meta else t for key, t in state.items()}
        path = args.folder / f"{name}.safetensors"
        saved = asdict(config) if args.mini else None
        checkpoints.save_tensors(path, state, torch.bfloat16, config=saved)
        print(f"{path}: {sum(t.nbytes for t in state.values()) / 1e6:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
