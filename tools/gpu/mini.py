"""The mini model's sounds for held-out clips, in both dtypes: this process samples every WORLD-th
clip, clip k with seed k, into OUT/bf16 and OUT/fp32.

    python -m tools.gpu.mini CLIPS RANK WORLD OUT
"""

import os
import sys
import time
import warnings
from pathlib import Path

import soundfile
import torch

from sample import Settings, generate, load_models

warnings.simplefilter("ignore")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DRY = bool(os.environ.get("DRY"))  # few steps, and no bfloat16, in which many a CPU takes minutes
STEPS = 2 if DRY else 25


def main():
    folder, rank, world, out = sys.argv[1:]
    rank = int(rank)
    out = Path(out)
    # the same order in every process
    videos = sorted(Path(folder).glob("*.mp4"))
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        models = load_models("mini", DEVICE, torch.float32 if DRY else dtype)
        (out / name).mkdir(parents=True, exist_ok=True)
        seconds = []
        # the seed goes with the clip, so the number of processes changes nothing
        for k in range(rank, len(videos), int(world)):
            start = time.perf_counter()
            wav = generate(videos[k], models, settings=Settings(seed=k, steps=STEPS, tries=1)).wav
            seconds.append(time.perf_counter() - start)
            path = out / name / f"{videos[k].stem}.foley.flac"
            soundfile.write(path, wav.numpy(), 16000, subtype="PCM_16")
        print(name, rank, "seconds a clip:", " ".join(f"{t:.2f}" for t in seconds), flush=True)


if __name__ == "__main__":
    main()
