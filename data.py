"""Mel spectrograms and back, onsets, and the clips that training reads.

in   sound float32 (n,) at 16 kHz, and folders of videos; files themselves are read and written by media.py, whose functions
     are handed on here
out  mel float32 (128, s) in [0, 1] and sound again, onset times, and a prepared training set (safetensors shards + index.json)

Diff-Foley section 3.1 and its data_preprocess/wav2spec.py fix the mel; fast Griffin-Lim is Perraudin, Balazs and
Sondergaard 2013.

    python data.py prepare RAW OUT --fps 15.625 --size 64 --workers 4

Differs from the official code: one filterbank at 16 kHz serves mel and its inverse (there: the inverse is at 22,050 Hz,
and tones fall).
"""
import argparse
import json
import math
import os
import sys
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.numpy import save as to_safetensors
from safetensors.torch import load_file as load_safetensors
from tqdm import tqdm

from media import (SAMPLE_RATE, MediaError, MediaInfo, find_videos, frames_from, output_suffix, picture,     # noqa: F401
                   probe, read_audio, read_frames, read_tags, whole, write_video, write_wav)

N_FFT = 1024
HOP = 256
N_MELS = 128
FMIN = 125.0
FMAX = 7600.0
WINDOW = 131072                 # samples of one model window: 512 mel columns, 8.192 s
COLUMN = HOP / SAMPLE_RATE      # seconds a mel column
LAG = 2                         # columns over which a level has to rise
QUIET = 0.3                     # mel level below which nothing counts: the room's tone, and residue of coding
RISE = 0.03                     # mean rise over the bins that makes an onset
ABOVE = 1.5                     # and by how many times the median rise around it, so that steady noise makes none
AROUND, APART = 20, 3           # columns each side: of that median; where only the strongest rise is an onset
SHARD = 64                      # clips per file of a prepared set


# ---- mel spectrogram and its inverse -------------------------------------------------------------------------------

@lru_cache(maxsize=1)
def mel_basis(rate=SAMPLE_RATE):
    """Slaney's filterbank: linear below 1 kHz and logarithmic above, triangles of unit area in Hz. (128, 513)"""
    step = math.log(6.4) / 27                    # 27 steps from 1 kHz to 6.4 kHz, by definition of the scale

    def to_mel(hz):
        return hz * 3 / 200 if hz < 1000 else 15 + math.log(hz / 1000) / step

    mels = np.linspace(to_mel(FMIN), to_mel(FMAX), N_MELS + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * step))
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    hz = np.linspace(0, rate / 2, N_FFT // 2 + 1)
    triangles = np.minimum((hz - low) / (centre - low), (high - hz) / (high - centre)).clip(0)
    return torch.from_numpy(triangles * 2 / (high - low)).float()


def stft(wav):
    """(b, n) -> complex (b, 513, ceil(n/256)). The last sample is dropped, as the published preprocessing does: a
    centred transform of n-1 samples has 1 + (n-1)//256 = ceil(n/256) columns, so 131,072 samples make exactly 512."""
    window = torch.hann_window(N_FFT, device=wav.device)
    return torch.stft(wav[..., :-1], N_FFT, HOP, window=window, center=True, pad_mode="reflect", return_complex=True)


def mel(wav):
    """Sound (..., n) to mel (..., 128, ceil(n/256)): clip(0.2 log10(magnitude) + 0.8, 0, 1), reflected at the ends."""
    shape, n = wav.shape[:-1], wav.shape[-1]
    short = max(0, N_FFT // 2 + 2 - n)           # reflection needs more than half a window of sound: append silence
    wav = torch.nn.functional.pad(wav.float().reshape(-1, n), (0, short))
    power = mel_basis().to(wav.device) @ stft(wav).abs()                             # (b, m, s)
    level = (0.2 * power.clamp_min(1e-5).log10() + 0.8).clamp(0, 1)
    return level[..., :-(-n // HOP)].reshape(*shape, N_MELS, -(-n // HOP))


def mel_to_magnitude(level, iterations=32):
    """(b, 128, s) -> non-negative (b, 513, s) whose mel is `level`. Multiplicative updates for the Kullback-Leibler
    divergence (Lee and Seung 2001): they are scale-free, so quiet columns are met as exactly as loud ones. A level of
    0 stands for "at most 1e-4" (-82 dB) and gives exact silence; resynthesised, that floor would be a steady hiss."""
    basis = mel_basis().to(level.device).expand(len(level), -1, -1)                  # (b, m, 513)
    target = torch.where(level > 0, 10 ** (5 * level - 4), 0.0)                      # (b, m, s)
    weight = basis.sum(1).clamp_min(1e-9)[..., None]                                 # (b, 513, 1)
    magnitude = basis.transpose(1, 2) @ (target / basis.sum(2, keepdim=True)) / weight
    for _ in range(iterations):
        magnitude = magnitude * (basis.transpose(1, 2) @ (target / (basis @ magnitude + 1e-12))) / weight
    return magnitude


def griffin_lim(magnitude, iterations=32, seed=0):
    """(b, 513, s) -> (b, s*256): phases that fit each other, by the fast algorithm (Perraudin et al. 2013), momentum 0.99.

    Every item starts from the same random phases, drawn on the CPU from `seed`, so its sound depends neither on the
    batch it sits in nor on the device."""
    window = torch.hann_window(N_FFT, device=magnitude.device)
    samples = magnitude.shape[-1] * HOP
    generator = torch.Generator().manual_seed(seed)
    turn = torch.rand(magnitude.shape[1:], generator=generator) * (2 * math.pi)
    spectrum = magnitude * torch.polar(torch.ones_like(turn), turn).to(magnitude.device)
    previous = torch.zeros_like(spectrum)
    for _ in range(iterations):
        consistent = stft(torch.istft(spectrum, N_FFT, HOP, window=window, length=samples))
        ahead = consistent + 0.99 * (consistent - previous)      # momentum; the first step only finds a phase
        spectrum = magnitude * ahead / ahead.abs().clamp_min(1e-12)
        previous = consistent
    return torch.istft(spectrum, N_FFT, HOP, window=window, length=samples)


def vocode(level, iterations=32, seed=0, length=None):
    """Mel (..., 128, s) to sound (..., s*256), or `length` samples: the filterbank's inverse, then Griffin-Lim."""
    shape, columns = level.shape[:-2], level.shape[-1]
    if columns < 3:                              # too short to reflect: vocode with silence appended, then cut
        level = torch.nn.functional.pad(level, (0, 3 - columns))
    magnitude = mel_to_magnitude(level.float().reshape(-1, *level.shape[-2:]))       # (b, 513, s)
    wav = griffin_lim(magnitude, iterations, seed)[:, :columns * HOP]
    length = columns * HOP if length is None else length
    return torch.nn.functional.pad(wav, (0, length - wav.shape[-1])).reshape(*shape, length)


# ---- onsets --------------------------------------------------------------------------------------------------------

def onset_strength(level):
    """How much louder each column of a mel (128, s) is than LAG columns before, rises only, mean over the bins -> (s,).
    Each bin is held against its neighbours too, so that a gliding tone is no onset (Boeck and Widmer 2013)."""
    level = np.maximum(np.asarray(level, np.float32) - QUIET, 0) / (1 - QUIET)                      # (m, s)
    padded = np.pad(level, ((1, 1), (LAG, 0)))
    before = np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:])[:, :level.shape[1]]
    before[:, :LAG] = level[:, :LAG]                # what sounds as the clip begins has not begun in it
    return np.maximum(level - before, 0).mean(0)


def detect_onsets(level):
    """Mel (128, s) -> onset times in seconds, ascending. A column's time is its centre."""
    strength, times = onset_strength(level), []
    for k in range(len(strength)):
        near = strength[max(k - APART, 0):k + APART + 1]
        around = strength[max(k - AROUND, 0):k + AROUND + 1]
        first = k == 0 or strength[k] > strength[k - 1]             # of equal columns the first
        if first and strength[k] >= near.max() and strength[k] > RISE + ABOVE * np.median(around):
            times.append(k * COLUMN)
    return np.array(times)


def match(found, labelled, tolerance):
    """The most pairs (found, labelled) no further apart than `tolerance`, each used once; both lists ascend."""
    i, j, pairs = 0, 0, []
    while i < len(found) and j < len(labelled):
        if abs(found[i] - labelled[j]) <= tolerance:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif found[i] < labelled[j]:
            i += 1
        else:
            j += 1
    return pairs


def f1(pairs, found, labelled):
    """Precision, recall and F1 of counts; 0 where there is nothing to count."""
    return pairs / max(found, 1), pairs / max(labelled, 1), 2 * pairs / max(found + labelled, 1)


# ---- training sets -------------------------------------------------------------------------------------------------

def load_clip(path, fps, size):
    """Frames (f, 3, h, w) and int16 sound (n,) of a whole clip, equally long; or the reason why it cannot be used."""
    with warnings.catch_warnings(record=True):
        try:
            frames = read_frames(path, fps, size)
            wav = read_audio(path, duration=probe(path).duration)
        except MediaError as error:
            return str(error)
    return frames.numpy(), (wav.numpy() * 32767).round().astype(np.int16)


def load_clips(paths, fps, size, workers):
    """`load_clip` of every path, in order, in `workers` processes that stay at most a few clips ahead."""
    if workers <= 1:
        yield from (load_clip(path, fps, size) for path in paths)
        return
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ahead = deque()
        for path in paths:
            ahead.append(pool.submit(load_clip, path, fps, size))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def write_shard(path, tensors):
    """Named arrays to a safetensors file, whole or not at all."""
    with whole(path) as part:
        part.write_bytes(to_safetensors(tensors))


def prepare(raw, out, fps=15.625, size=64, workers=1):
    """Folder of videos to OUT/shard-*.safetensors and OUT/index.json; the same bytes for any number of workers.
    Returns the index. index.json comes last, so an interrupted set is never mistaken for a finished one."""
    out, raw = Path(out), Path(raw)
    videos = find_videos([raw])
    root = raw if raw.is_dir() else raw.parent
    index = {"fps": fps, "size": size, "clips": [], "left_out": []}
    with whole(out / "index.json") as part:      # an unwritable folder is noticed before the work, not after
        out.mkdir(parents=True, exist_ok=True)
        for old in (out / "index.json", *out.glob("shard-*.safetensors")):
            old.unlink(missing_ok=True)
        shard, full = {}, 0
        for path, clip in zip(videos, tqdm(load_clips(videos, fps, size, workers), total=len(videos), unit="clip")):
            name = path.relative_to(root).as_posix()
            if isinstance(clip, str):
                index["left_out"].append({"name": name, "reason": clip})
                continue
            if len(shard) == 2 * SHARD:
                write_shard(out / f"shard-{full:05d}.safetensors", shard)
                shard, full = {}, full + 1
            shard[f"{name}/frames"], shard[f"{name}/sound"] = clip
            index["clips"].append({"name": name, "shard": full, "frames": len(clip[0]), "samples": len(clip[1])})
        if shard:
            write_shard(out / f"shard-{full:05d}.safetensors", shard)
        part.write_text(json.dumps(index, indent=1))
    return index


def prepared_index(path):
    """index.json -> (frames a second, size), [clip entries]."""
    try:
        index = json.loads(path.read_text())
        return (index["fps"], index["size"]), index["clips"]
    except (ValueError, KeyError, TypeError) as error:
        raise MediaError(f"{path}: not the index of a prepared set; run python data.py prepare again") from error


class Clips(torch.utils.data.Dataset):
    """Windows of `frames` pictures and the sound that starts with the first of them, from a prepared set (read lazily,
    slice by slice) or from a plain folder of videos (decoded on access).

    item  {"video": uint8 (frames, 3, size, size), "wav": float32 (round(16000 * frames / fps),), "name", "start": s}
    random_start draws the first frame from (seed, index), where index e * len + i is clip i in epoch e, so runs repeat
    whatever reads them, and leaves out clips that are too short; otherwise windows start at 0 and short clips end in
    their last picture and in silence. `frames` None: whole clips."""

    def __init__(self, root, fps, size, frames=None, seed=0, random_start=True):
        self.root, self.fps, self.size, self.frames = Path(root), fps, size, frames
        if not self.root.is_dir():
            raise MediaError(f"{root}: no such folder; give a prepared set or a folder of videos")
        self.seed, self.random_start = seed, random_start and frames is not None
        self.shards, self.process = {}, None     # open files, and the process that opened them
        index = self.root / "index.json"
        self.prepared = index.is_file()
        found = self.read_index(index) if self.prepared else self.search()
        self.clips = [clip for clip in found if not self.random_start or clip["frames"] >= frames]
        if len(found) > len(self.clips):
            warnings.warn(f"{root}: left out {len(found) - len(self.clips)} of {len(found)} clips, "
                          f"shorter than {frames / fps:.2f} s", stacklevel=2)
        if not self.clips:
            raise MediaError(f"{root}: no clip with sound of at least {frames / fps:.2f} s; give longer clips")

    def read_index(self, path):
        made, clips = prepared_index(path)
        if made != (self.fps, self.size):
            raise MediaError(f"{self.root}: prepared at {made[0]:g} fps and {made[1]} pixels; run python data.py "
                             f"prepare RAW {self.root} --fps {self.fps:g} --size {self.size}")
        return clips

    def search(self):
        if list(self.root.glob("shard-*.safetensors")):
            raise MediaError(f"{self.root}: an unfinished prepared set; run python data.py prepare again")
        videos, clips = find_videos([self.root]), []
        for path in videos:
            with suppress(MediaError):
                info = probe(path)
                if info.has_audio:
                    frames = math.ceil(info.duration * self.fps - 1e-6)
                    clips.append({"name": path.relative_to(self.root).as_posix(), "frames": frames})
        if len(clips) < len(videos):
            warnings.warn(f"{self.root}: left out {len(videos) - len(clips)} of {len(videos)} files, unreadable or "
                          "without sound", stacklevel=3)
        return clips

    def __len__(self):
        return len(self.clips)

    def __getstate__(self):
        return {**self.__dict__, "shards": {}}   # open files do not travel to another process

    def window(self, index):
        """Entry of the clip, its first frame in this draw, and the number of frames."""
        clip, first = self.clips[index % len(self.clips)], 0
        if self.random_start:
            first = int(np.random.default_rng([self.seed, index]).integers(clip["frames"] - self.frames + 1))
        return clip, first, self.frames or clip["frames"]

    def __getitem__(self, index):
        clip, first, frames = self.window(index)
        start, n = first / self.fps, round(frames / self.fps * SAMPLE_RATE)
        if self.prepared:
            video = self.slice(clip, "frames", first, frames)
            wav = self.slice(clip, "sound", round(start * SAMPLE_RATE), n).float() / 32767
        else:
            path = self.root / clip["name"]
            video = read_frames(path, self.fps, self.size, start, frames / self.fps)[:frames]
            wav = read_audio(path, start, n / SAMPLE_RATE)
        video = torch.cat([video, video[-1:].expand(frames - len(video), -1, -1, -1)])  # (f, 3, h, w)
        wav = torch.nn.functional.pad(wav, (0, n - len(wav)))                                # (n,)
        return {"video": video, "wav": wav, "name": clip["name"], "start": start}

    def slice(self, clip, what, start, n):
        """`n` entries from `start` of a clip's "frames" or "sound", read from its shard without touching the rest."""
        if self.process != os.getpid():
            self.shards, self.process = {}, os.getpid()
        path = self.root / f"shard-{clip['shard']:05d}.safetensors"
        if path not in self.shards:
            try:
                self.shards[path] = safetensors.safe_open(path, "pt")
            except (OSError, safetensors.SafetensorError) as error:
                raise MediaError(f"{path}: missing or damaged; run python data.py prepare again") from error
        return self.shards[path].get_slice(f"{clip['name']}/{what}")[start:start + n]


class Sounds(Clips):
    """Windows of the sound alone, for the autoencoder: {"wav": float32 (samples,)}; a "frame" is one mel column here."""

    def __init__(self, root, samples, seed=0):
        super().__init__(root, SAMPLE_RATE / HOP, None, samples // HOP, seed)

    def read_index(self, path):
        return [{**clip, "frames": clip["samples"] // HOP} for clip in prepared_index(path)[1]]

    def __getitem__(self, index):
        clip, first, columns = self.window(index)
        if self.prepared:
            wav = self.slice(clip, "sound", first * HOP, columns * HOP).float() / 32767
        else:
            wav = read_audio(self.root / clip["name"], first / self.fps, columns / self.fps)
        return {"wav": torch.nn.functional.pad(wav, (0, columns * HOP - len(wav)))}


class Pairs(torch.utils.data.Dataset):
    """Features and sound of one model window, for stage 2, from the folder that `cavp.py --extract` wrote.

    item  {"features": float32 (frames, 512), "wav": float32 (WINDOW,)}, a pure function of (seed, index), see Clips
    merge  share of the items that are two clips joined in time (split-and-merge augmentation of stage 2), with
           the sound cut at the sample where the second one's first frame starts (officially up to 0.25 s beside it)
    roll   share of the items whose features and sound are rotated in time by the same amount
    A clip shorter than the window ends in its last feature and in silence."""

    def __init__(self, root, fps, frames, merge=0.0, roll=0.0, seed=0):
        self.fps, self.frames, self.merge, self.roll, self.seed = fps, frames, merge, roll, seed
        self.files = sorted(Path(root).glob("*.safetensors"))
        if not self.files:
            raise MediaError(f"{root}: no features here; write them with "
                             f"python cavp.py --data CLIPS --init CAVP --extract {root}")
        with safetensors.safe_open(self.files[0], "pt") as file:
            made = float((file.metadata() or {}).get("fps", 0))
        if made != fps:
            raise MediaError(f"{root}: features at {made:g} a second, the model needs {fps:g}; "
                             "extract them with a CAVP of the same preset")

    def __len__(self):
        return len(self.files)

    def cut(self, path, draw, frames, samples):
        """`frames` features and `samples` of sound from a random place of a clip."""
        try:
            clip = load_safetensors(path)
            features, sound = clip["features"], clip["sound"]
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            raise MediaError(f"{path}: not a file of cavp.py --extract; remove it and extract again") from error
        first = int(draw.integers(max(0, len(features) - frames) + 1))
        features = features[first:first + frames].float()
        features = torch.cat([features, features[-1:].expand(frames - len(features), -1)])
        start = round(first / self.fps * SAMPLE_RATE)
        wav = sound[start:start + samples].float() / 32767
        return features, torch.nn.functional.pad(wav, (0, samples - len(wav)))

    def __getitem__(self, index):
        draw = np.random.default_rng([self.seed, index])
        path = self.files[index % len(self.files)]
        if draw.random() < self.merge:
            n = int(draw.integers(self.frames // 4, self.frames * 3 // 4 + 1))
            m = round(n / self.fps * SAMPLE_RATE)
            other = self.files[int(draw.integers(len(self.files)))]
            parts = [self.cut(path, draw, n, m), self.cut(other, draw, self.frames - n, WINDOW - m)]
            features, wav = (torch.cat(part) for part in zip(*parts))
        else:
            features, wav = self.cut(path, draw, self.frames, WINDOW)
        if draw.random() < self.roll:
            n = int(draw.integers(self.frames))
            features, wav = features.roll(n, 0), wav.roll(round(n / self.fps * SAMPLE_RATE))
        return {"features": features, "wav": wav}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="prepare")
    p = commands.add_parser("prepare", help="folder of videos to a compact training set",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("raw", type=Path, help="folder of videos")
    p.add_argument("out", type=Path, help="folder to write: shard-*.safetensors and index.json")
    p.add_argument("--fps", type=float, default=15.625, help="frames a second: one to 4 mel columns (paper: 4)")
    p.add_argument("--size", type=int, default=64, help="side of the square frames in pixels (mini: 64, paper: 224)")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode")
    args = parser.parse_args()
    if not (0 < args.fps <= 240 and 1 <= args.size <= 4096 and args.workers >= 0):
        parser.error("--fps must be in (0, 240], --size in [1, 4096], --workers at least 0")
    try:
        index = prepare(args.raw, args.out, args.fps, args.size, args.workers)
    except MediaError as error:
        sys.exit(print(error, file=sys.stderr) or 1)
    for clip in index["left_out"]:
        print(clip["reason"], file=sys.stderr)
    print(f"{args.out}: {len(index['clips'])} clips, {len(index['left_out'])} left out")
    sys.exit(1 if index["left_out"] else 0)


if __name__ == "__main__":
    main()
