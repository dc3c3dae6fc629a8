"""Stage 1: Contrastive Audio-Visual Pretraining, CAVP (Diff-Foley Sec. 3.1).

in   a folder of clips with sound: frames (b, f, 3, size, size) in [0, 1] at the preset's rate,
     mel (b, 128, s)
out  OUT/last.safetensors; with --extract, a set of every clip's features (f, 512) and its sound,
     which stage 2 trains on

    python cavp.py --data clips/
    python cavp.py --data clips/ --init runs/cavp/last.safetensors --extract features/
    torchrun --nproc_per_node 8 cavp.py --data vggsound/ --preset paper    (--extract likewise)
    python cavp.py --data vggsound/ --preset paper --recompute       one process, in less memory

Both towers give one unit vector per time step. Training pulls the video and the sound of the same
moment together, and apart from other videos (L_inter) and from other moments of the same video
(L_intra). All clips of --batch are each other's negatives, in any number of processes and chunks of
--micro-batch videos, with the exact gradient of the global batch (`training.cached_backward`).
BatchNorm in training sees one chunk: 30 videos in the paper preset, as on each GPU of the published
run.

Differs from the official code: mels are cut at the sample where their first frame starts, hop 256
(there at hop 250, which drifts by 2.4 %); negatives of other processes pass gradients on (there
only a process's own features do); the pooled features of a long clip are normalized over the 512
features (there over time).

The mini preset sees 15.625 small frames a second, has temporal convolutions in the stem and all
four stages, and contrasts the consecutive quarter seconds of one window instead of three long
clips, because a hit must be placed to within 100 ms. The loss is the same function, but silent
moments hardly count as anchors, a third term contrasts windows (`contrast`), and a frame's feature
map gives its maximum beside its mean. The published towers start from classifiers pretrained on the
labels of Kinetics and AudioSet; with --labels ours learn the materials of hits from the labels of
the procedural set, beside the contrast (`data.HitLabels`).
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import itertools
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm import tqdm

import data
from common import audio, cli, distributed, training
from common.checkpoints import load_network, one_line


@dataclass(frozen=True)
class CAVPConfig:
    """The paper preset's sizes (official `cavp_modules.py`, `cavp_model.py`)."""

    fps: float = 4.0
    size: int = 224  # of the square frames
    video_width: int = 64
    video_blocks: tuple = (3, 4, 6, 3)
    # stem and stages whose convolutions see one frame before and after
    temporal: tuple = (False, False, False, True, True)
    audio_widths: tuple = (64, 128, 256, 512, 1024, 2048)
    embed_dim: int = 512
    frames: int = 16  # of one training clip
    clips: int = 3  # of one video in a training step
    # frames, and 16-column audio steps, in one contrasted segment
    video_pool: int = 16
    audio_pool: int = 16
    # the maximum over a frame's feature map beside its mean: what is hit is small
    peak: bool = False


PRESETS = {
    "paper": CAVPConfig(),
    "mini": CAVPConfig(
        fps=15.625,
        size=64,
        video_width=16,
        video_blocks=(1, 1, 2, 1),
        temporal=(True,) * 5,
        audio_widths=(8, 16, 32, 64, 128, 256),
        frames=64,
        clips=1,
        video_pool=4,
        audio_pool=1,
        peak=True,
    ),
}
RECIPES = {
    "mini": {
        "steps": 8000,
        "batch": 16,
        "micro_batch": 16,
        "lr": 6e-4,
        "warmup": 50,
        "grad_clip": 1,
        "temporal_contrast": True,
        "loudness_weighting": True,
        "window_contrast": 1.0,
    },
    # 300 epochs of 567,980 videos at 8 x 30, AdamW with decay 0.2 and a cosine to 0 (official
    # `launch_script.sh`). Its towers start from Kinetics' SlowOnly and PANNs' Cnn14, which are not
    # ours to ship: --init takes a complete CAVP
    "paper": {
        "steps": 710_000,
        "batch": 240,
        "micro_batch": 30,
        "lr": 8e-4,
        "warmup": 200,
        "grad_clip": 0,
        "temporal_contrast": True,
        "loudness_weighting": False,
        "window_contrast": 0.0,
    },
}
LABEL_WEIGHT = 2.0  # of the labels' mean cross-entropy, beside the contrast's terms
FRAMES_AT_ONCE = 4  # in the stages with the largest feature maps
AUDIO_STEP = 16  # mel columns per step of the audio tower
POOLS = ((2, 2), (2, 2), (2, 2), (2, 2), (1, 2), (1, 1))  # (time, mel) of its six blocks


# --------------------------------------------------------------------------------------------------
# video tower


class ConvUnit(nn.Module):
    """Convolution over (frames, height, width) without bias, then BatchNorm.

    Parameters have the official 3-D shapes. The work is done by 2-D convolutions on channels-last
    maps with the frames folded into the batch, several times faster on a CPU.
    """

    def __init__(self, c_in, c_out, kernel, stride=1):
        super().__init__()
        padding = [k // 2 for k in kernel]
        self.conv = nn.Conv3d(c_in, c_out, kernel, (1, stride, stride), padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x, frames):  # (b*f, c, h, w)
        weight = self.conv.weight  # (c_out, c_in, k_f, k_h, k_w)
        bias = self.conv.bias  # None until `fold`
        k_f, k_h = weight.shape[2:4]
        if k_f > 1 and k_h == 1:
            # temporal only: a clip is one image of f rows and h*w columns
            h, w = x.shape[2:]
            x = x.permute(0, 2, 3, 1).reshape(-1, frames, h * w, x.shape[1])  # (b, f, h*w, c)
            x = F.conv2d(x.permute(0, 3, 1, 2), weight[..., 0], bias, padding=(1, 0))
            x = x.permute(0, 2, 3, 1).reshape(-1, h, w, x.shape[1])  # (b*f, h, w, c)
            return self.bn(x.permute(0, 3, 1, 2))
        if k_f > 1:
            # space and time: the frames before and after as further channels
            clips = x.view(-1, frames, *x.shape[1:])
            clips = F.pad(clips, (0, 0, 0, 0, 0, 0, 1, 1))  # (b, f + 2, c, h, w)
            x = torch.cat([clips[:, :-2], clips[:, 1:-1], clips[:, 2:]], 2)  # (b, f, 3c, h, w)
            x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        weight = weight.transpose(1, 2).flatten(1, 2)  # (c_out, k_f * c_in, k_h, k_w)
        x = F.conv2d(x, weight, bias, self.conv.stride[1:], self.conv.padding[1:])
        return self.bn(x)

    def fold(self):
        """Fold BatchNorm into the convolution; saves one pass over the map. Inference only."""
        scale = self.bn.weight * (self.bn.running_var + self.bn.eps).rsqrt()
        self.conv.weight.data *= scale[:, None, None, None, None]
        self.conv.bias = nn.Parameter(self.bn.bias - self.bn.running_mean * scale)
        self.bn = nn.Identity()


class Bottleneck3d(nn.Module):
    """ResNet's bottleneck; its first convolution sees one frame before and after if `temporal`."""

    def __init__(self, c_in, width, stride, temporal):
        super().__init__()
        self.conv1 = ConvUnit(c_in, width, (3 if temporal else 1, 1, 1))
        self.conv2 = ConvUnit(width, width, (1, 3, 3), stride)
        self.conv3 = ConvUnit(width, 4 * width, (1, 1, 1))
        if c_in != 4 * width:  # the first block of a stage
            self.downsample = ConvUnit(c_in, 4 * width, (1, 1, 1), stride)

    def forward(self, x, frames):  # (b*f, c_in, h, w) -> (b*f, 4*width, h/stride, w/stride)
        # in place: half the memory, and a CPU waits for memory here
        h = F.relu(self.conv1(x, frames), inplace=True)
        h = F.relu(self.conv2(h, frames), inplace=True)
        h = self.conv3(h, frames)
        if hasattr(self, "downsample"):
            x = self.downsample(x, frames)
        return F.relu_(h.add_(x))


class SlowOnly(nn.Module):
    """ResNet-50 over frames, nothing strides over time (Feichtenhofer et al. 2019)."""

    def __init__(self, cfg):
        super().__init__()
        self.conv1 = ConvUnit(3, cfg.video_width, (3 if cfg.temporal[0] else 1, 7, 7), 2)
        c = cfg.video_width
        for i, (blocks, temporal) in enumerate(
            zip(cfg.video_blocks, cfg.temporal[1:], strict=True)
        ):
            width = cfg.video_width * 2**i
            stage = nn.ModuleList()
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(Bottleneck3d(c, width, stride, temporal))
                c = 4 * width
            setattr(self, f"layer{i + 1}", stage)
        # stem and stages before the first temporal convolution see one frame at a time
        self.leading = [*cfg.temporal, True].index(True)
        self.peak = cfg.peak
        self.out_dim = 2 * c if cfg.peak else c

    def run(self, part, x, frames):
        """One part of the network, 0 the stem and 1 to 4 the stages, on x (b*f, c, h, w)."""
        if part == 0:
            return F.max_pool2d(F.relu(self.conv1(x, frames), inplace=True), 3, 2, 1)
        for block in getattr(self, f"layer{part}"):
            x = block(x, frames)
        return x

    def run_leading(self, x):
        """The leading parts, whose maps are the largest, a few frames at a time to save memory."""
        maps = None
        for i in range(0, len(x), FRAMES_AT_ONCE):
            h = x[i : i + FRAMES_AT_ONCE]
            for part in range(self.leading):
                h = self.run(part, h, len(h))
            if maps is None:
                maps = h.new_empty(len(x), *h.shape[1:]).to(memory_format=torch.channels_last)
            maps[i : i + FRAMES_AT_ONCE] = h
        return maps

    def forward(self, video):  # (b, f, 3, h, w) -> (b, f, out_dim)
        b, frames = video.shape[:2]
        x = video.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # (b*f, 3, h, w)
        # a norm in training must see the complete batch
        leading = 0 if self.training else self.leading
        if leading:
            x = self.run_leading(x)
        for part in range(leading, 5):
            x = self.run(part, x, frames)

        pooled = x.mean((2, 3))  # (b*f, c)
        if self.peak:
            pooled = torch.cat([pooled, x.amax((2, 3))], 1)
        return pooled.view(b, frames, -1)


# --------------------------------------------------------------------------------------------------
# audio tower


class ConvBlock(nn.Module):
    """Two convolutions with BatchNorm, average pooling, dropout."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)

    def forward(self, x, pool):  # (b, c, s, m), pool (time, mel)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.dropout(F.avg_pool2d(x, pool), 0.2, self.training)


class Cnn14(nn.Module):
    """PANNs' Cnn14 (Kong et al. 2020), 16 times shorter in time."""

    def __init__(self, cfg):
        super().__init__()
        self.bn = nn.BatchNorm2d(audio.N_MELS)
        c = 1
        for i, width in enumerate(cfg.audio_widths):
            setattr(self, f"conv_block{i + 1}", ConvBlock(c, width))
            c = width
        self.fc1 = nn.Linear(c, c)
        self.final_project = nn.Linear(c, cfg.embed_dim)

    def forward(self, mel):  # (b, m, s) -> (b, s/16, embed_dim)
        x = self.bn(mel[..., None])  # (b, m, s, 1): one scale and shift per mel bin
        x = x.permute(0, 3, 2, 1).contiguous(memory_format=torch.channels_last)  # (b, 1, s, m)
        for i, pool in enumerate(POOLS):
            x = getattr(self, f"conv_block{i + 1}")(x, pool)
        x = x.mean(3)  # (b, c, s/16)
        x = F.max_pool1d(x, 3, 1, 1) + F.avg_pool1d(x, 3, 1, 1)
        x = x.transpose(1, 2)  # (b, s/16, c)
        x = F.relu(self.fc1(F.relu(self.fc1(x))))  # twice with the same weights, as published
        return self.final_project(x)


# --------------------------------------------------------------------------------------------------
# the network


class CAVP(nn.Module):
    """Video and audio tower with one feature space."""

    def __init__(self, config: CAVPConfig = PRESETS["paper"]):
        super().__init__()
        self.config = config
        self.video_encoder = SlowOnly(config)
        self.video_project_head = nn.Linear(self.video_encoder.out_dim, config.embed_dim)
        self.spec_encoder = Cnn14(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def context(self):
        """Frames on each side that a frame's feature depends on (9 in the paper preset)."""
        blocks = (1, *self.config.video_blocks)
        return sum(n for n, temporal in zip(blocks, self.config.temporal, strict=True) if temporal)

    @torch.no_grad()
    def fold(self):
        """Fold every norm of the video tower: faster, same features. Inference only. -> self"""
        for unit in self.video_encoder.modules():
            if isinstance(unit, ConvUnit):
                unit.fold()
        return self

    def encode_video(self, video, pool: bool = False, normalize: bool = True):
        """(b, f, 3, h, w) float in [0, 1], no mean or deviation removed -> unit (b, f, 512).

        pool: the maximum over every `config.video_pool` frames, (b, f/pool, 512), or (b, 512) where
        that is one.
        """
        features = self.video_project_head(self.video_encoder(video))
        return finish(features, self.config.video_pool if pool else 1, normalize)

    def encode_audio(self, mel, pool: bool = False, normalize: bool = True):
        """(b, 128, s) in [0, 1] -> unit (b, s/16, 512); pool: over `config.audio_pool` steps."""
        return finish(self.spec_encoder(mel), self.config.audio_pool if pool else 1, normalize)

    @torch.no_grad()
    def encode_clip(self, frames, chunk: int = 64):
        """uint8 (f, 3, h, w) of any length -> unit features (f, 512).

        Chunks carry `context` frames on each side, so that no feature depends on where they end.
        """
        device = self.logit_scale.device
        dtype = self.video_project_head.weight.dtype
        features = []
        for i in range(0, len(frames), chunk):
            first = max(0, i - self.context)
            # frames as bytes to the device, as floats there
            video = frames[first : i + chunk + self.context].to(device)
            video = video.to(dtype, memory_format=torch.channels_last).div_(255)
            encoded = self.encode_video(video[None])[0]
            features.append(encoded[i - first : i - first + chunk].float())
        return torch.cat(features)

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32, audio: bool = True):
        """Ours, or the official cavp_epoch66.ckpt; strict. Raises CheckpointError.

        audio=False: without the audio tower, which generating does not need.
        """
        without = () if audio else ("spec_encoder",)
        return load_network(cls, path, CAVPConfig(), device, dtype, without)

    __repr__ = one_line


def finish(features, pool: int, normalize: bool):
    """Maximum over every `pool` steps of (b, n, d); a single pooled step loses its axis."""
    if pool > 1:
        features = F.max_pool1d(features.transpose(1, 2), pool).transpose(1, 2)  # (b, n/pool, d)
        features = features.squeeze(1) if features.shape[1] == 1 else features
    return F.normalize(features, dim=-1) if normalize else features


# --------------------------------------------------------------------------------------------------
# losses


def symmetric_cross_entropy(logits, weights):
    """Weighted mean over both directions of the cross-entropy to the diagonal.

    logits (..., n, n), rows video and columns sound; weights (..., n).
    """
    diagonal = logits.diagonal(dim1=-2, dim2=-1)
    both = 0.5 * (logits.logsumexp(-1) + logits.logsumexp(-2)) - diagonal
    return (both * weights).sum() / weights.sum()


def contrastive_loss(video, audio, scale, clips: int, weights=None, temporal: bool = True):
    """L_inter, L_intra (Sec. 3.1, Eq. 2-4; official `open_clip/loss.py` 451); L is their sum.

    video, audio  unit (n*clips, d), the clips of one video consecutive
    weights       (n*clips,), of each clip as an anchor; all count as negatives. None: all alike
    temporal      False: the semantic contrast alone, the paper's ablation. No clip is a negative of
                  its own video's, L_intra is 0

    The negatives of L_inter include the other clips of the same video, as published.
    """
    if weights is None:
        weights = torch.ones(len(video), device=video.device)
    logits = scale * video @ audio.T  # (n*clips, n*clips)
    if not temporal:
        video_of = torch.arange(len(logits), device=logits.device) // clips
        same_video = (video_of[:, None] == video_of).fill_diagonal_(False)
        inter = symmetric_cross_entropy(logits.masked_fill(same_video, -math.inf), weights)
        return inter, logits.new_zeros(())

    n = len(logits) // clips
    # the blocks of one video each, on the diagonal
    own = logits.view(n, clips, n, clips).diagonal(dim1=0, dim2=2)  # (clips, clips, n)
    inter = symmetric_cross_entropy(logits, weights)
    intra = symmetric_cross_entropy(own.permute(2, 0, 1), weights.view(n, clips))
    return inter, intra


def contrast(video, audio, scale, weights, window_contrast: float, temporal: bool = True):
    """L, {name: term to report} of unit features (n, segments, 512) of both towers.

    weights: (n*segments,) of the anchors, or None.
    window_contrast: weight of a third term, L_inter of complete windows, each the maximum over its
    segments. Segments of a quarter second can be told apart by when they sound, windows only by
    what does. The published clips are complete windows already.
    """
    n, segments, _ = video.shape
    v = video.flatten(0, 1)  # (n*segments, 512)
    a = audio.flatten(0, 1)
    inter, intra = contrastive_loss(v, a, scale, segments, weights, temporal)
    loss = inter + intra

    # share of segments whose own sound is the nearest of their window
    with torch.no_grad():
        nearest = torch.einsum("nsd,nrd->nsr", video, audio).argmax(2)  # (n, segments)
        right = nearest == torch.arange(segments, device=nearest.device)
    terms = {"inter": inter, "intra": intra, "moment_accuracy": right.float().mean()}

    if window_contrast:
        video, audio = (F.normalize(x.amax(1), dim=-1) for x in (video, audio))  # (n, 512)
        terms["window"], _ = contrastive_loss(video, audio, scale, 1)
        loss = loss + window_contrast * terms["window"]
    return loss, {"loss": loss, **terms}


def loudness_rise(mel, segments: int):
    """mel (b, 128, s) -> (b, segments): a segment's loudest column above the clip's median, plus a
    little.

    Two silent moments are not negatives that a network could tell apart, and most quarter seconds
    are silent.
    """
    loudness = mel.mean(1)  # (b, s)
    loudest = loudness.unflatten(1, (segments, -1)).amax(2)
    return (loudest - loudness.median(1, keepdim=True).values).clamp(min=0) + 0.002


# --------------------------------------------------------------------------------------------------
# clips of a step


def span(config: CAVPConfig):
    """Frames of a video that the clips of one training step lie in."""
    if config.clips == 1:
        return config.frames
    # the last clip starts at most half a clip after its earliest place
    return config.frames + config.clips * (config.frames // 2)


def clip_starts(videos: int, config: CAVPConfig, rng: torch.Generator):
    """(videos, clips) first frames: 0 (mini), or three at least half a clip apart.

    Paper: s1 in [0, 8], s2 in [s1 + 8, 16], s3 in [s2 + 8, 24].
    """
    starts = torch.zeros(videos, config.clips, dtype=torch.long)
    if config.clips == 1:
        return starts
    half = config.frames // 2
    for row in starts:
        low = 0
        for k in range(config.clips):
            row[k] = torch.randint(low, half * (k + 1) + 1, (), generator=rng)
            low = row[k].item() + half
    return starts


def cut_clips(video, wav, config: CAVPConfig, starts):
    """Clips of each video from the frames `starts` (b, clips) on, sound from the same sample on.

    (b, f, 3, h, w), (b, n) -> (b*clips, frames, 3, h, w), mel (b*clips, 128, s)
    """
    columns = config.frames // config.video_pool * config.audio_pool * AUDIO_STEP
    samples = columns * audio.HOP
    videos = []
    wavs = []
    for v, a, row in zip(video, wav, starts.tolist(), strict=True):
        for start in row:
            videos.append(v[start : start + config.frames])
            first = round(start / config.fps * audio.SAMPLE_RATE)
            piece = a[first : first + samples]
            wavs.append(F.pad(piece, (0, samples - len(piece))))
    return torch.stack(videos), audio.mel(torch.stack(wavs))


def augment(video, mirrored, gain):
    """uint8 (b, f, 3, h, w) -> float in [0, 1], mirrored (b,) and brightened by gain (b,).

    Neither changes the sound.
    """
    mirrored, gain = (x[:, None, None, None, None] for x in (mirrored, gain))
    return (torch.where(mirrored, video.flip(-1), video).float() / 255 * gain).clamp_(0, 1)


def inner_segments(model):
    """Slice of a window's segments without those that see its zero padding.

    Consecutive segments could be told apart by their distance to it.
    """
    config = model.config
    if config.clips > 1:
        return slice(None)
    edge = math.ceil(model.context / config.video_pool)
    return slice(edge, config.frames // config.video_pool - edge)


# --------------------------------------------------------------------------------------------------
# label supervision


def label_logits(model, features):
    """Unit features (..., 512) of either tower -> (..., classes): one head, so that they agree."""
    return model.label_head(math.sqrt(features.shape[-1]) * features).float()


def without_label_head(model):
    """A copy as it is saved: the head is for training only."""
    model = copy.deepcopy(model)
    del model.label_head
    return model


# --------------------------------------------------------------------------------------------------
# training


class Features(NamedTuple):
    """What the towers give for a chunk of n videos."""

    video: Tensor  # unit (n, segments, 512)
    audio: Tensor
    scale: Tensor  # of their products
    label_loss: Tensor | None = None  # summed cross-entropy of the hit labels, both towers


class Chunk(NamedTuple):
    """A micro-batch of n videos, cut into clips."""

    video: Tensor  # uint8 (n*clips, f, 3, h, w)
    mel: Tensor  # (n*clips, 128, s)
    mirrored: Tensor  # (n*clips,)
    gain: Tensor  # (n*clips,)
    label: Tensor | None  # (n, segments)
    anchor_weight: Tensor  # (n*segments,)
    seed: int  # of dropout


def embed(model, video, mel, mirrored, gain, label=None):
    """The fields of a `Chunk` -> its `Features`."""
    video = model.encode_video(augment(video, mirrored, gain), pool=True, normalize=False)
    audio = model.encode_audio(mel, pool=True, normalize=False)
    # one row of segments per video
    n = len(mel) // model.config.clips
    inner = inner_segments(model)
    video, audio = (
        F.normalize(x.float(), dim=-1).view(n, -1, x.shape[-1])[:, inner] for x in (video, audio)
    )  # (n, segments, 512)
    features = Features(video, audio, model.logit_scale.exp())
    if label is None:
        return features

    # summed, because chunks have different numbers of labels
    label = label.flatten()
    label_loss = 0
    for x in (video, audio):
        logits = label_logits(model, x).flatten(0, 1)
        label_loss += F.cross_entropy(logits, label, ignore_index=-1, reduction="sum")
    return features._replace(label_loss=label_loss)


def encode(args, network, device, chunk: Chunk):
    """`embed` of a chunk; called again, it repeats its dropout."""
    inputs = (chunk.video, chunk.mel, chunk.mirrored, chunk.gain, chunk.label)
    inputs = [x.to(device, non_blocking=True) for x in inputs if x is not None]
    torch.manual_seed(chunk.seed)
    with training.autocast(args):
        return network(*inputs)


def retrieval(similarity):
    """(n, n), rows video and columns sound -> recall of the true partner at 1 and 5, both ways."""
    scores = {}
    for name, x in (("video_to_sound", similarity), ("sound_to_video", similarity.T)):
        # number of others at least as near; a tie is a miss
        rank = (x >= x.diagonal()[:, None]).sum(1) - 1
        for k in (1, 5):
            scores[f"val_{name}_r{k}"] = (rank < k).float().mean().item()
    return scores


def validate(model, clips, device, labels: data.HitLabels | None = None, most=128, batch_size=8):
    """Retrieval among at most `most` windows, whose similarity is the mean over their segments.

    With labels, also the accuracy of both towers on segments with a hit.
    """
    config = replace(model.config, clips=1)
    count = min(most, len(clips))
    features = []
    targets = []
    for i in range(0, count, batch_size):
        numbers = range(i, min(i + batch_size, count))
        batch = default_collate([clips[k] for k in numbers])
        starts = torch.zeros(len(numbers), 1, dtype=torch.long)
        video, mel = cut_clips(batch["video"], batch["wav"], config, starts)
        v = model.encode_video(video.to(device).float() / 255, pool=True)
        a = model.encode_audio(mel.to(device), pool=True)
        shape = (len(numbers), -1, config.embed_dim)  # (b, segments, 512)
        features.append((v.view(shape).float(), a.view(shape).float()))
        if labels:
            targets.append(labels.of(batch))

    v, a = (torch.cat(x) for x in zip(*features, strict=True))  # (n, segments, 512)
    scores = retrieval(torch.einsum("isd,jsd->ij", v, a) / v.shape[1])
    if labels:
        target = torch.cat(targets).to(device)
        for name, x in (("video", v), ("sound", a)):
            right = label_logits(model, x).argmax(-1) == target
            scores[f"val_label_accuracy_{name}"] = right[target >= 0].float().mean().item()
    return scores, []


def prepared(args, config: CAVPConfig):
    """Folder of the prepared set of --data, which rank 0 prepares if needed."""
    cache = args.out.parent / "prepared"
    return distributed.on_rank0(lambda: data.prepared(args.data, config.fps, config.size, cache))


def check_labels(args, config: CAVPConfig):
    """Raises TrainingError if --labels is no folder or does not fit the preset."""
    if not args.labels.is_dir():
        raise training.TrainingError(
            f"{args.labels}: no such folder; --labels takes the clips' own, with their .json files"
        )
    if config.clips > 1:
        raise training.TrainingError("--labels is for presets that train on one window of a clip")


def train(args):
    """L_inter + L_intra over all clips of --batch, in chunks of a micro-batch (gradient cache)."""
    training.resolve_defaults(args, RECIPES, "cavp")
    distributed.init(args.device)
    training.check_batch(args, at_least=2)
    training.check_run_folder(args)
    device = training.set_up(args)

    # the network, and the data in its frame rate and size
    model = CAVP.load(args.init) if args.init else CAVP(PRESETS[args.preset])
    config = model.config
    if args.labels:
        check_labels(args, config)
    reader = functools.partial(
        data.Clips, prepared(args, config), config.fps, config.size, span(config), args.seed
    )
    clips, held_out = training.train_val_split(reader)
    # the label head is part of the network in training only
    segments = config.frames // config.video_pool  # of a clip
    labels = None
    if args.labels:
        labels = data.HitLabels(
            args.labels, [clips, held_out or []], config.fps, config.video_pool, segments
        )
        model.label_head = nn.Linear(config.embed_dim, len(labels.classes))
    model = model.train().to(device)
    model.spec_encoder.to(memory_format=torch.channels_last)
    training.freeze(args, model)

    # norms, biases and logit_scale are not decayed, as published
    matrices = {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.2}
    vectors = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    optimizer = training.adamw([matrices, vectors], args)
    ema = training.EMA(model)
    training.recompute(args, model, Bottleneck3d, ConvBlock)
    run = training.TrainingRun(
        args,
        model,
        optimizer,
        asdict(config),
        ema,
        clips,
        held_out,
        functools.partial(validate, device=device, labels=labels),
        without_label_head if labels else None,
    )
    network = distributed.wrap_ddp(model, embed)
    encode_chunk = functools.partial(encode, args, network, device)
    inner = inner_segments(model)

    for step in run:
        # the step's random numbers, for the global batch
        rng = training.generator(args, step)
        starts = clip_starts(args.batch, config, rng)
        mirrored = torch.rand(args.batch * config.clips, generator=rng) < 0.5
        gain = torch.empty(args.batch * config.clips).uniform_(0.9, 1.1, generator=rng)

        # this process's micro-batches, cut into clips
        chunks = []
        for batch, rows in run.parts(network):
            video, mel = cut_clips(batch["video"], batch["wav"], config, starts[rows])
            clip_rows = slice(config.clips * rows.start, config.clips * rows.stop)
            label = labels.of(batch)[:, inner] if labels else None
            weight = loudness_rise(mel, segments)[:, inner].flatten()
            seed = training.seed_of(args.seed, step, 1 + rows.start // args.micro_batch)
            chunks.append(
                Chunk(video, mel, mirrored[clip_rows], gain[clip_rows], label, weight, seed)
            )

        # weights of anchors and labels, over all processes
        anchor_weights = None
        if args.loudness_weighting:
            own = torch.cat([chunk.anchor_weight for chunk in chunks])
            anchor_weights = distributed.all_gather(own.to(device))
        label_weight = 0.0
        if labels:
            own = torch.stack([(chunk.label >= 0).sum() for chunk in chunks])
            label_count = distributed.all_gather(own.to(device)).sum().item()
            label_weight = LABEL_WEIGHT / max(1, label_count)

        loss_fn = functools.partial(
            contrast,
            weights=anchor_weights,
            window_contrast=args.window_contrast,
            temporal=args.temporal_contrast,
        )
        terms = training.cached_backward(run, network, encode_chunk, chunks, loss_fn, label_weight)
        norm = training.update(args, step, optimizer, ema, model)
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # as CLIP does
        run.report(**terms, gradient_norm=norm)


# --------------------------------------------------------------------------------------------------
# extraction


def extract_clip(args, model, clip: dict):
    """{"features": float16 (f, 512), "sound": int16 (n,)}"""
    with training.autocast(args):
        features = model.encode_clip(clip["video"], chunk=128)
    sound = (clip["wav"] * 32767).round().to(torch.int16)
    return {"features": features.half().cpu(), "sound": sound}


def extract_clips(args, model, clips, numbers: list):
    """Yields (i, `extract_clip` of clip i) in every process, each of which does its share."""
    world = distributed.world()
    for k in range(0, len(numbers), world):
        batch = numbers[k : k + world]
        own = batch[distributed.rank() :][:1]  # empty if the last batch has none for this process
        fields = [extract_clip(args, model, clips[i]) for i in own]
        yield from zip(batch, itertools.chain(*distributed.all_gather_object(fields)), strict=True)


def extract(args):
    """Write a set of every clip's features and sound, on one clock: what `ldm.py --data` reads.

    Clips that it holds already are not encoded again. Any number of processes shares the work; rank
    0 writes, in the order of the clips.
    """
    training.resolve_defaults(args, RECIPES, "cavp")
    distributed.init(args.device)
    device = training.set_up(args)
    if not args.init:
        raise training.TrainingError(
            "--extract needs the trained network: add --init runs/cavp/last.safetensors"
        )
    model = CAVP.load(args.init, device)
    config = model.config
    clips = data.Clips(prepared(args, config), config.fps, config.size)
    # tells the features of one network from another's
    weight = model.video_project_head.weight.detach().float().cpu().numpy()
    metadata = {
        "columns": ["features", "sound"],
        "fps": config.fps,
        "width": config.embed_dim,
        "network": hashlib.sha256(weight.tobytes()).hexdigest()[:16],
    }
    first = distributed.rank() == 0
    output = contextlib.nullcontext()
    if first:
        output = data.Writer(args.extract, metadata, clips.set.rights)
    with output as writer:
        # rank 0 knows which clips the set lacks
        missing = first and [
            i for i in range(len(clips)) if clips.describe(i)[0] not in writer.names
        ]
        missing = distributed.all_gather_object(missing)[0]
        done = len(clips) - len(missing)
        with tqdm(
            total=len(clips), initial=done, desc="extract", unit="clip", disable=not first
        ) as bar:
            for i, fields in extract_clips(args, model, clips, missing):
                if first:
                    writer.add(*clips.describe(i), fields)
                    bar.update()
        if first:
            writer.finish(needed=("val",))


def main(argv=None):
    p = training.arguments(__doc__, RECIPES)
    p.add_argument(
        "--extract",
        type=Path,
        metavar="DIR",
        help="write the features of --data there instead of training",
    )
    p.add_argument(
        "--temporal-contrast",
        action=argparse.BooleanOptionalAction,
        help="contrast the moments of one video; without: the paper's semantic ablation",
    )
    g = training.beyond_the_paper(p)
    g.add_argument(
        "--loudness-weighting",
        action=argparse.BooleanOptionalAction,
        help="weight contrastive anchors by loudness above the clip median",
    )
    g.add_argument(
        "--window-contrast",
        type=cli.number(float, 0),
        help="weight of the contrast between windows",
    )
    g.add_argument(
        "--labels",
        type=Path,
        metavar="DIR",
        help="folder of the clips' .json files, as foley.py writes them: both towers also learn "
        "the materials of hits",
    )
    cli.renamed(p, "--by-loudness", "--loudness-weighting", type=cli.truth)
    cli.renamed(p, "--whole", "--window-contrast", type=cli.number(float, 0))
    cli.renamed(p, "--temporal", "--temporal-contrast", type=cli.truth)
    args = p.parse_args(argv)
    with distributed.report_errors("cavp.py"):
        if args.extract:
            extract(args)
        else:
            train(args)


if __name__ == "__main__":
    main()
