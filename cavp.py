"""Stage 1: Contrastive Audio-Visual Pretraining, CAVP (Diff-Foley Sec. 3.1).

in   a folder of clips with sound: frames (b, f, 3, size, size) in [0, 1] at the preset's rate, mel (b, 128, s)
out  OUT/last.safetensors; with --extract, a set of every clip's features (f, 512) and its sound: what stage 2 trains on

    python cavp.py --data clips/
    python cavp.py --data clips/ --init runs/cavp/last.safetensors --extract features/
    torchrun --nproc_per_node 8 cavp.py --data vggsound/ --preset paper         (--extract likewise)
    python cavp.py --data vggsound/ --preset paper --recompute          the same batch in one process, in less memory

Both towers give one unit vector a step of time; training pulls the video and the sound of the same moment together, against
other videos (L_inter) and against other moments of the same video (L_intra). All clips of --batch are each other's negatives,
in however many processes and chunks of --micro-batch videos they are seen, and the gradient is that of the whole
(`backward`). What a norm sees in training is one chunk: 30 videos in the paper preset, as on each GPU of the published run.

Differs from the official code: mels are cut at the sample where their first frame starts, hop 256 (there at hop 250, which
drifts by 2.4 %); negatives of other processes pass gradients on (there only a process's own features do); the pooled features
of a long clip are normalised over the 512 features (there over time). The mini preset sees 15.625 small frames a second, has
temporal convolutions in the stem and all four stages, and contrasts the consecutive quarter seconds of one window instead of
three long clips, because a hit must be placed to within 100 ms; the loss is the same function, but silent moments hardly
count as anchors, a third term contrasts whole windows (`contrast`), and a frame's map gives its maximum beside its mean.
The published towers begin with networks that can name things, trained on Kinetics' and AudioSet's labels; with --labels
ours learn what is struck from the labels of the procedural set, beside the contrast (`struck`).
"""

import contextlib
import copy
import functools
import hashlib
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
from common import audio, distributed, training
from common.checkpoints import Checkpoint, checkpoint_errors, load_into


@dataclass(frozen=True)
class CAVPConfig:
    """The paper preset's sizes (official `cavp_modules.py`, `cavp_model.py`)."""

    fps: float = 4.0
    size: int = 224  # of the square frames
    video_width: int = 64
    video_blocks: tuple = (3, 4, 6, 3)
    temporal: tuple = (
        False,
        False,
        False,
        True,
        True,
    )  # stem and stages whose convolutions look one frame back and ahead
    audio_widths: tuple = (64, 128, 256, 512, 1024, 2048)
    embed_dim: int = 512
    frames: int = 16  # of one training clip
    clips: int = 3  # of one video in a training step
    video_pool: int = 16  # frames, and 16-column audio steps, that make one contrasted feature
    audio_pool: int = 16
    peak: bool = (
        False  # beside the mean over a frame's map its maximum too: what is struck is small
    )


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
# paper: 300 epochs of 567,980 videos at 8 x 30, AdamW with decay 0.2 and a cosine to 0 (official `launch_script.sh`); its towers begin with
# Kinetics' SlowOnly and PANNs' Cnn14, which are others' files: --init takes a whole CAVP
RECIPES = {
    "mini": {
        "steps": 8000,
        "batch": 16,
        "micro_batch": 16,
        "lr": 6e-4,
        "warmup": 50,
        "clip": 1,
        "by_loudness": 1,
        "whole": 1.0,
        "temporal": 1,
    },
    "paper": {
        "steps": 710_000,
        "batch": 240,
        "micro_batch": 30,
        "lr": 8e-4,
        "warmup": 200,
        "clip": 0,
        "by_loudness": 0,
        "whole": 0.0,
        "temporal": 1,
    },
}
NAMING = 2.0  # weight of the cross-entropies of naming, beside the contrast's terms
FRAMES_AT_ONCE = 4  # of full size in memory
AUDIO_STEP = 16  # mel columns a step of the audio tower
POOLS = ((2, 2), (2, 2), (2, 2), (2, 2), (1, 2), (1, 1))  # (time, mel) of its six blocks


# ---------------------------------------------------------------------------------------------------------------------
# video tower


class ConvUnit(nn.Module):
    """Convolution over (frames, height, width) without bias, then BatchNorm. Parameters have the official 3-D shapes; the work
    is done by 2-D convolutions on channels-last maps with the frames folded into the batch, several times faster on a CPU:
    a spatial kernel sees b*f images (a spatio-temporal one with the neighbouring frames as further channels), and a purely temporal
    one sees one image of f rows and h*w columns a clip."""

    def __init__(self, c_in, c_out, kernel, stride=1):
        super().__init__()
        self.conv = nn.Conv3d(
            c_in, c_out, kernel, (1, stride, stride), [k // 2 for k in kernel], bias=False
        )
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x, frames):  # (b*f, c, h, w)
        weight, bias = self.conv.weight, self.conv.bias  # (c_out, c_in, k_f, k_h, k_w)
        h, w = x.shape[2:]
        if weight.shape[2] == 1 or weight.shape[3] > 1:
            if weight.shape[2] == 3:
                clips = F.pad(
                    x.view(-1, frames, *x.shape[1:]), (0, 0, 0, 0, 0, 0, 1, 1)
                )  # (b, f + 2, c, h, w)
                x = torch.cat([clips[:, :-2], clips[:, 1:-1], clips[:, 2:]], 2).flatten(
                    0, 1
                )  # (b*f, 3c, h, w)
                x = x.contiguous(memory_format=torch.channels_last)
            weight = weight.transpose(1, 2).flatten(1, 2)  # (c_out, k_f * c_in, k_h, k_w)
            x = F.conv2d(x, weight, bias, self.conv.stride[1:], self.conv.padding[1:])
        else:
            x = (
                x.permute(0, 2, 3, 1).reshape(-1, frames, h * w, x.shape[1]).permute(0, 3, 1, 2)
            )  # (b, c, f, h*w)
            x = F.conv2d(x, weight[..., 0], bias, padding=(1, 0))
            x = (
                x.permute(0, 2, 3, 1).reshape(-1, h, w, x.shape[1]).permute(0, 3, 1, 2)
            )  # (b*f, c, h, w)
        return self.bn(x)

    def fold(self):
        """Take the norm's fixed scale and shift into the convolution: a pass over the map less. For use, not for training or saving."""
        scale = self.bn.weight * (self.bn.running_var + self.bn.eps).rsqrt()
        self.conv.weight.data *= scale[:, None, None, None, None]
        self.conv.bias = nn.Parameter(self.bn.bias - self.bn.running_mean * scale)
        self.bn = nn.Identity()


class Bottleneck3d(nn.Module):
    def __init__(self, c_in, width, stride, temporal, project):
        super().__init__()
        self.conv1 = ConvUnit(c_in, width, (3 if temporal else 1, 1, 1))
        self.conv2 = ConvUnit(width, width, (1, 3, 3), stride)
        self.conv3 = ConvUnit(width, 4 * width, (1, 1, 1))
        if project:
            self.downsample = ConvUnit(c_in, 4 * width, (1, 1, 1), stride)

    def forward(self, x, frames):  # (b*f, c_in, h, w) -> (b*f, 4*width, h/stride, w/stride)
        h = F.relu(
            self.conv1(x, frames), inplace=True
        )  # in place: half the memory, and a CPU waits for memory here
        h = F.relu(self.conv2(h, frames), inplace=True)
        h = self.conv3(h, frames)
        return F.relu_(h.add_(self.downsample(x, frames) if hasattr(self, "downsample") else x))


class SlowOnly(nn.Module):
    """ResNet-50 over frames, nothing strides over time (Feichtenhofer et al. 2019)."""

    def __init__(self, cfg):
        super().__init__()
        self.conv1 = ConvUnit(3, cfg.video_width, (3 if cfg.temporal[0] else 1, 7, 7), 2)
        c = cfg.video_width
        for i, (blocks, temporal) in enumerate(zip(cfg.video_blocks, cfg.temporal[1:])):
            width = cfg.video_width * 2**i
            stage = nn.ModuleList()
            for j in range(blocks):
                stage.append(
                    Bottleneck3d(c, width, 2 if i > 0 and j == 0 else 1, temporal, project=j == 0)
                )
                c = 4 * width
            setattr(self, f"layer{i + 1}", stage)
        self.peak, self.temporal = cfg.peak, cfg.temporal
        self.out_dim = c * (1 + cfg.peak)

    def run(self, part, x, frames):  # 0: the stem; 1 to 4: the stages
        if part == 0:
            return F.max_pool2d(F.relu(self.conv1(x, frames), inplace=True), 3, 2, 1)
        for block in getattr(self, f"layer{part}"):
            x = block(x, frames)
        return x

    def forward(self, video):  # (b, f, 3, h, w) -> (b, f, out_dim)
        b, frames = video.shape[:2]
        x = video.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # (b*f, 3, h, w)
        # the parts that see one frame at a time have the largest maps; but a norm in training must see the whole batch
        alone = 0 if self.training else (*self.temporal, True).index(True)
        if alone:
            maps = None
            for i in range(0, len(x), FRAMES_AT_ONCE):
                piece = x[i : i + FRAMES_AT_ONCE]
                for part in range(alone):
                    piece = self.run(part, piece, len(piece))
                if maps is None:
                    maps = piece.new_empty(len(x), *piece.shape[1:]).to(
                        memory_format=torch.channels_last
                    )
                maps[i : i + FRAMES_AT_ONCE] = piece
            x = maps
        for part in range(alone, 5):
            x = self.run(part, x, frames)
        return torch.cat([x.mean((2, 3))] + [x.amax((2, 3))] * self.peak, 1).view(b, frames, -1)


# ---------------------------------------------------------------------------------------------------------------------
# audio tower


class ConvBlock(nn.Module):
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
        widths = (1, *cfg.audio_widths)
        for i, (a, b) in enumerate(zip(widths, widths[1:])):
            setattr(self, f"conv_block{i + 1}", ConvBlock(a, b))
        self.fc1 = nn.Linear(widths[-1], widths[-1])
        self.final_project = nn.Linear(widths[-1], cfg.embed_dim)

    def forward(self, mel):  # (b, m, s) -> (b, s/16, embed_dim)
        x = self.bn(mel[..., None])  # (b, m, s, 1): one scale and shift a mel bin
        x = x.permute(0, 3, 2, 1).contiguous(memory_format=torch.channels_last)  # (b, 1, s, m)
        for i, pool in enumerate(POOLS):
            x = getattr(self, f"conv_block{i + 1}")(x, pool)
        x = x.mean(3)  # (b, c, s/16)
        x = F.max_pool1d(x, 3, 1, 1) + F.avg_pool1d(x, 3, 1, 1)
        x = x.transpose(1, 2)  # (b, s/16, c)
        x = F.relu(self.fc1(F.relu(self.fc1(x))))  # twice with the same weights, as published
        return self.final_project(x)


# ---------------------------------------------------------------------------------------------------------------------
# the network


class CAVP(nn.Module):
    def __init__(self, config=CAVPConfig()):
        super().__init__()
        self.config = config
        self.video_encoder = SlowOnly(config)
        self.video_project_head = nn.Linear(self.video_encoder.out_dim, config.embed_dim)
        self.spec_encoder = Cnn14(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def context(self):
        """Frames on each side that a frame's feature depends on (9 in the paper preset)."""
        return sum(
            n
            for n, temporal in zip((1, *self.config.video_blocks), self.config.temporal)
            if temporal
        )

    @torch.no_grad()
    def fold(self):
        """Every norm of the video tower into its convolution: faster, the same features. -> self, no longer for training or saving."""
        for unit in self.video_encoder.modules():
            if isinstance(unit, ConvUnit):
                unit.fold()
        return self

    def encode_video(self, video, pool=False, normalize=True):
        """(b, f, 3, h, w) float in [0, 1], no mean or deviation removed -> unit features (b, f, 512);
        pool: the maximum over every `config.video_pool` frames, (b, f/pool, 512), or (b, 512) where that is one."""
        return finish(
            self.video_project_head(self.video_encoder(video)),
            self.config.video_pool if pool else 1,
            normalize,
        )

    def encode_audio(self, mel, pool=False, normalize=True):
        """(b, 128, s) in [0, 1] -> unit features (b, s/16, 512); pool as for video, over `config.audio_pool` steps."""
        return finish(self.spec_encoder(mel), self.config.audio_pool if pool else 1, normalize)

    @torch.no_grad()
    def encode_clip(self, frames, chunk=64):
        """uint8 (f, 3, h, w) of any length -> unit features (f, 512), in chunks that carry `context` frames on each side, so that
        no feature depends on where a chunk ends."""
        device, dtype, out = self.logit_scale.device, self.video_project_head.weight.dtype, []
        for i in range(0, len(frames), chunk):
            first = max(0, i - self.context)
            video = (
                frames[first : i + chunk + self.context]
                .to(device)
                .to(dtype, memory_format=torch.channels_last)
                .div_(255)
            )
            out.append(self.encode_video(video[None])[0, i - first : i - first + chunk].float())
        return torch.cat(out)

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32, audio=True):
        """Ours, or the official cavp_epoch66.ckpt; strict. audio=False: without the audio tower, which generating does not need."""
        file = Checkpoint(path)
        with checkpoint_errors(path, cls), torch.device("meta"):
            model = cls(
                CAVPConfig(
                    **{
                        k: tuple(v) if isinstance(v, list) else v
                        for k, v in (file.config or {}).items()
                    }
                )
            )
        if not audio:
            del model.spec_encoder
        return load_into(
            model,
            file,
            {k: file[k] for k in file if audio or not k.startswith("spec_encoder.")},
            device,
            dtype,
        )


def finish(features, pool, normalize):  # (b, n, d)
    if pool > 1:
        features = F.max_pool1d(features.transpose(1, 2), pool).transpose(1, 2)  # (b, n/pool, d)
        features = features.squeeze(1) if features.shape[1] == 1 else features
    return F.normalize(features, dim=-1) if normalize else features


def symmetric_cross_entropy(logits, weights):
    """(..., n, n), rows video and columns sound, weights (..., n) -> weighted mean over both directions of the cross-entropy
    to the diagonal."""
    diagonal = logits.diagonal(dim1=-2, dim2=-1)
    both = 0.5 * (logits.logsumexp(-1) + logits.logsumexp(-2)) - diagonal
    return (both * weights).sum() / weights.sum()


def contrastive_loss(video, audio, scale, clips, weights=None, temporal=True):
    """video, audio: unit (n*clips, d), the clips of one video in a row -> L_inter, L_intra (Sec. 3.1, Eq. 2-4; official
    `open_clip/loss.py` 451).
    The inter term's negatives include the other clips of the same video, as published; L = L_inter + L_intra.
    weights (n*clips,): how much each clip counts as an anchor; all count as negatives. None: all alike, as published.
    temporal: False for the semantic contrast alone, the paper's ablation: no clip is a negative of its own video's, L_intra is 0."""
    weights = torch.ones(len(video), device=video.device) if weights is None else weights
    logits = scale * video @ audio.T  # (n*clips, n*clips)
    if not temporal:
        video_of = torch.arange(len(logits), device=logits.device) // clips
        others = (video_of[:, None] == video_of).fill_diagonal_(False)
        return symmetric_cross_entropy(
            logits.masked_fill(others, -math.inf), weights
        ), logits.new_zeros(())
    n = len(logits) // clips
    own = (
        logits.view(n, clips, n, clips).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    )  # (n, clips, clips)
    return symmetric_cross_entropy(logits, weights), symmetric_cross_entropy(
        own, weights.view(n, clips)
    )


def loudness_rise(mel, segments):
    """mel (b, 128, s) -> (b, segments): how far each segment's loudest column stands above the clip's median column, plus a little.
    Two silent moments are not each other's negatives in any sense a network could learn, and most quarter seconds are silent."""
    level = mel.mean(1)  # (b, s)
    loudest = level.unflatten(1, (segments, -1)).amax(2)
    return (loudest - level.median(1, keepdim=True).values).clamp(min=0) + 0.002


# ---------------------------------------------------------------------------------------------------------------------
# training


def span(config):
    """Frames of a video that the clips of one training step lie in."""
    return config.frames + (config.clips - 1) * config.frames // 2 + (8 if config.clips > 1 else 0)


def clip_starts(videos, config, generator):
    """(videos, clips) first frames: 0 (mini), or three at least half a clip apart (paper: s1 in [0, 8], s2 in [s1+8, 16],
    s3 in [s2+8, 24])."""
    starts, half = torch.zeros(videos, config.clips, dtype=torch.long), config.frames // 2
    for row in starts if config.clips > 1 else ():
        for k in range(config.clips):
            low = row[k - 1].item() + half if k else 0
            row[k] = torch.randint(low, half * (k + 1) + 1, (), generator=generator)
    return starts


def cut_clips(video, wav, config, starts):
    """The clips of each video that begin at `starts` (b, clips), and their sound from the sample where their first frame starts:
    (b, f, 3, h, w), (b, n) -> (b*clips, frames, 3, h, w), mel (b*clips, 128, s)."""
    samples = config.frames // config.video_pool * config.audio_pool * AUDIO_STEP * audio.HOP
    videos, wavs = [], []
    for v, a, row in zip(video, wav, starts.tolist()):
        for start in row:
            videos.append(v[start : start + config.frames])
            first = round(start / config.fps * audio.SAMPLE_RATE)
            piece = a[first : first + samples]
            wavs.append(F.pad(piece, (0, samples - len(piece))))
    return torch.stack(videos), audio.mel(torch.stack(wavs))


def augment(video, mirrored, gain):
    """uint8 (b, f, 3, h, w) -> float in [0, 1]; each clip mirrored or not, brighter or darker (b,): neither changes its sound."""
    mirrored, gain = (x[:, None, None, None, None] for x in (mirrored, gain))
    return (torch.where(mirrored, video.flip(-1), video).float() / 255 * gain).clamp_(0, 1)


def edge(model):
    """Consecutive segments of one window could be told apart by their distance to its zero-padded ends, so those are left out."""
    return math.ceil(model.context / model.config.video_pool) if model.config.clips == 1 else 0


def struck(onsets, classes, start, config):
    """Labels of a clip -> (segments,) which of `classes` is struck in each segment of the window that begins at `start` seconds;
    -1: none, or several."""
    found = [set() for _ in range(config.frames // config.video_pool)]
    for onset in onsets:
        place = math.floor((onset["time"] - start) * config.fps / config.video_pool)
        if 0 <= place < len(found):
            found[place].add(classes.index(onset["material"]))
    return torch.tensor([one.pop() if len(one) == 1 else -1 for one in found])


def embed(model, video, mel, mirrored, gain, named=None):
    """uint8 (n*clips, f, 3, h, w), (n*clips, 128, s) -> unit features (n, segments, 512) of both, the scale of their products;
    with `named` (n, segments) of `struck` also the sum of the cross-entropies of naming these moments by sight and by ear."""
    video = model.encode_video(augment(video, mirrored, gain), pool=True, normalize=False)
    audio = model.encode_audio(mel, pool=True, normalize=False)
    n, cut = len(mel) // model.config.clips, edge(model)
    video, audio = (F.normalize(x.float(), dim=-1).view(n, -1, x.shape[-1]) for x in (video, audio))
    video, audio = (x[:, cut : x.shape[1] - cut] for x in (video, audio))
    if named is None:
        return video, audio, model.logit_scale.exp()
    errors = [
        F.cross_entropy(
            names(model, x).flatten(0, 1), named.flatten(), ignore_index=-1, reduction="sum"
        )
        for x in (video, audio)
    ]
    return video, audio, model.logit_scale.exp(), sum(errors)


def names(model, features):
    """Unit features (..., 512) of either tower -> logits (..., classes) of what is struck: one head for both, so that they agree."""
    return model.namer(math.sqrt(features.shape[-1]) * features).float()


def moving(model):
    """The running statistics of all norms that are in training."""
    return [
        s
        for m in model.modules()
        if isinstance(m, nn.BatchNorm2d) and m.training
        for s in (m.running_mean, m.running_var)
    ]


def put_together(now, before, chunks):
    """Running statistics as one process would have them that sees all chunks in order: each process has moved the same
    `before` by its own `chunks`, each chunk taking a tenth of the way."""
    if distributed.world() == 1 or not now:
        return
    kept = 0.9**chunks
    ours = torch.cat([(n - kept * b) for n, b in zip(now, before)]) * kept ** (
        distributed.world() - 1 - distributed.rank()
    )
    dist.all_reduce(ours)
    for n, b, moved in zip(now, before, ours.split([len(b) for b in before])):
        n.copy_(kept ** distributed.world() * b + moved)


def backward(run, network, model, device, chunks, seeds, loss_of, share=0.0):
    """Gradient of a loss over the features of the whole batch, of all processes, in the memory of one chunk (gradient
    cache, Gao et al. 2021): features of every chunk without a graph, the loss and its gradient with respect to all
    features, then every chunk again, with a graph that passes its share of that gradient on. Dropout repeats itself, by
    `seeds`; norms move once a chunk. A single chunk is seen once.

    chunks: what `embed` takes, of each; loss_of(video, audio, scale) -> loss, terms to report; share: of the loss, what each
    unit of a sum counts that `embed` gives beside the features. -> the terms"""

    def features(chunk, seed):
        torch.manual_seed(seed)
        with training.autocast(run.args):
            return network(*(x.to(device, non_blocking=True) for x in chunk))

    before, single = [s.clone() for s in moving(model)], len(chunks) == 1
    with torch.set_grad_enabled(single):
        seen = [features(*pair) for pair in zip(chunks, seeds)]
    after = [b.clone() for b in model.buffers()]
    video, audio = (
        distributed.all_gather(torch.cat([x[i].detach() for x in seen])).requires_grad_()
        for i in (0, 1)
    )
    scale = seen[0][2].detach().requires_grad_()
    loss, terms = loss_of(video, audio, scale)
    gradients = torch.autograd.grad(loss, (video, audio, scale))
    for i, (chunk, rows) in enumerate(run.parts(network, chunks)):
        outputs = seen[0] if single else features(chunk, seeds[i])
        # the processes' gradients are averaged: a feature's comes from one of them, the scale's from all, once
        shares = [g[rows] * distributed.world() for g in gradients[:2]] + [gradients[2] * (i == 0)]
        shares += [torch.full_like(x, share * distributed.world()) for x in outputs[3:]]
        torch.autograd.backward(*zip(*[(y, g) for y, g in zip(outputs, shares) if y.requires_grad]))
    for b, value in zip(model.buffers(), after):
        b.copy_(value)
    put_together(moving(model), before, len(chunks))
    if share:
        terms["named"] = (
            share * distributed.all_gather(torch.stack([x[3].detach() for x in seen])).sum()
        )
        terms["loss"] = terms["loss"] + terms["named"]
    return terms


def contrast(video, audio, scale, weights, whole, temporal=True):
    """Unit features (n, segments, 512) of both, weights (n, segments) or None -> L, what there is to report. whole: weight of a third
    term, L_inter of the windows as wholes, each the maximum over its segments: those a quarter of a second long can be told apart by
    when they sound, whole ones only by what does. The published clips are whole windows already."""
    n, segments, _ = video.shape
    v, a = video.flatten(0, 1), audio.flatten(0, 1)  # (n*segments, 512)
    inter, intra = contrastive_loss(
        v, a, scale, segments, None if weights is None else weights.flatten(), temporal
    )
    with torch.no_grad():
        own = torch.einsum("nsd,nrd->nsr", video, audio).argmax(2)  # (n, segments)
        right = (own == torch.arange(segments, device=own.device)).float().mean()
    loss, terms = inter + intra, {"inter": inter, "intra": intra, "right_moment": right}
    if whole:
        terms["whole"] = contrastive_loss(
            *(F.normalize(x.amax(1), dim=-1) for x in (video, audio)), scale, 1
        )[0]
        loss = loss + whole * terms["whole"]
    return loss, dict(loss=loss, **terms)


def retrieval(likeness):
    """(n, n), rows video and columns sound -> share of the true partner among the nearest one and five, both ways."""
    scores = {}
    for name, x in (("video_to_sound", likeness), ("sound_to_video", likeness.T)):
        place = (x >= x.diagonal()[:, None]).sum(
            1
        ) - 1  # how many others are as near; a tie is no find
        scores |= {f"val_{name}_r{k}": (place < k).float().mean().item() for k in (1, 5)}
    return scores


def validate(model, clips, device, labels=None, most=128, together=8):
    """Retrieval among at most `most` windows: two are as alike as their features are on average, moment by moment. And of the
    moments in which one material is struck, the shares that are named rightly by sight and by ear."""
    found, named, config = [], [], replace(model.config, clips=1)
    for i in range(0, min(most, len(clips)), together):
        items = [clips[k] for k in range(i, min(i + together, most, len(clips)))]
        video, wav = (torch.stack([item[k] for item in items]) for k in ("video", "wav"))
        video, mel = cut_clips(video, wav, config, torch.zeros(len(items), 1, dtype=torch.long))
        v = model.encode_video(video.to(device).float() / 255, pool=True).view(
            len(items), -1, config.embed_dim
        )
        a = model.encode_audio(mel.to(device), pool=True).view(len(items), -1, config.embed_dim)
        found.append((v.float(), a.float()))
        named += [labels(item["name"], item["start"]) for item in items if labels]
    v, a = (torch.cat(x) for x in zip(*found))  # (n, segments, 512)
    numbers = retrieval(torch.einsum("isd,jsd->ij", v, a) / v.shape[1])
    if labels:
        named = torch.stack(named).to(v.device)
        right = [
            (names(model, x).argmax(-1) == named)[named >= 0].float().mean().item() for x in (v, a)
        ]
        numbers |= {"val_named_by_sight": right[0], "val_named_by_ear": right[1]}
    return numbers, []


def read_labels(folder, readers):
    """The labels in a folder of clips for all clips of the readers -> [material], {name: onsets}."""
    there = [clips.describe(i)[0] for clips in readers if clips for i in range(len(clips))]
    onsets = {name: data.read_onsets(folder / name) for name in there}
    return sorted({onset["material"] for clip in onsets.values() for onset in clip}), onsets


def nameless(model):
    """A copy without the head that only training has."""
    model = copy.deepcopy(model)
    del model.namer
    return model


def train(args):
    training.resolve_defaults(args, RECIPES, "cavp")
    distributed.init(args.device)
    training.check_batch(args)
    training.check_run_folder(args)
    device = training.set_up(args)
    model = CAVP.load(args.init) if args.init else CAVP(PRESETS[args.preset])
    config, labels, export = model.config, None, None
    if args.labels and not args.labels.is_dir():
        raise training.TrainingError(
            f"{args.labels}: no such folder; --labels takes the clips' own, with their .json files"
        )
    if args.labels and config.clips > 1:
        raise training.TrainingError("--labels is for presets that train on one window of a clip")
    root = distributed.on_rank0(
        lambda: data.prepared(args.data, config.fps, config.size, args.out.parent / "prepared")
    )
    reader = functools.partial(data.Clips, root, config.fps, config.size, span(config), args.seed)
    clips, held_out = training.train_val_split(reader)
    if args.labels:
        classes, onsets = read_labels(args.labels, (clips, held_out))
        model.namer, export = nn.Linear(config.embed_dim, len(classes)), nameless

        def labels(name, start):
            return struck(onsets[name], classes, start, config)

    model = model.train().to(device)
    model.spec_encoder.to(memory_format=torch.channels_last)
    training.freeze(args, model)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [
        p for p in model.parameters() if p.ndim < 2
    ]  # norms, biases, logit_scale: not decayed, as published
    optimizer = training.adamw(
        [{"params": matrices, "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}], args
    )
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
        export,
    )
    network, cut, n = distributed.wrap_ddp(model, embed), edge(model), args.batch * config.clips
    for step in run:
        draw = training.generator(args, step)
        starts = clip_starts(args.batch, config, draw)
        mirrored, gain = (
            torch.rand(n, generator=draw) < 0.5,
            torch.empty(n).uniform_(0.9, 1.1, generator=draw),
        )
        chunks, weights, seeds, count = [], [], [], 0
        for batch, rows in run.parts(network):
            video, mel = cut_clips(batch["video"], batch["wav"], config, starts[rows])
            many = slice(config.clips * rows.start, config.clips * rows.stop)
            chunks.append((video, mel, mirrored[many], gain[many]))
            segments = config.frames // config.video_pool
            if labels:
                named = torch.stack(
                    [labels(*about) for about in zip(batch["name"], batch["start"].tolist())]
                )[:, cut : segments - cut]
                chunks[-1] += (named,)
                count += (named >= 0).sum()
            weights.append(
                loudness_rise(mel, segments)[:, cut : segments - cut].reshape(args.micro_batch, -1)
            )
            seeds.append(training.seed_of(args.seed, step, 1 + rows.start // args.micro_batch))
        weights = (
            distributed.all_gather(torch.cat(weights).to(device)) if args.by_loudness else None
        )
        share = (
            NAMING / max(1, distributed.all_gather(count[None].to(device)).sum().item())
            if labels
            else 0.0
        )
        loss_of = functools.partial(
            contrast, weights=weights, whole=args.whole, temporal=bool(args.temporal)
        )
        terms = backward(run, network, model, device, chunks, seeds, loss_of, share)
        norm = training.update(args, step, optimizer, ema, model)
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        run.report(**terms, gradient_norm=norm)


def extract(args):
    """A set of every clip's features (f, 512) float16 and sound int16 (n,), on one clock: what `ldm.py --data` reads. Clips that it holds
    already are not computed again. Any number of processes shares the work; the first one writes, in the order of the clips."""
    training.resolve_defaults(args, RECIPES, "cavp")
    distributed.init(args.device)
    device = training.set_up(args)
    if not args.init:
        raise training.TrainingError(
            "--extract needs the trained network: add --init runs/cavp/last.safetensors"
        )
    model = CAVP.load(args.init, device)
    config, mark = (
        model.config,
        hashlib.sha256(
            model.video_project_head.weight.detach().float().cpu().numpy().tobytes()
        ).hexdigest()[:16],
    )
    root = distributed.on_rank0(
        lambda: data.prepared(args.data, config.fps, config.size, args.out.parent / "prepared")
    )
    clips = data.Clips(root, config.fps, config.size)
    about = {
        "columns": ["features", "sound"],
        "fps": config.fps,
        "width": config.embed_dim,
        "network": mark,
    }

    def columns(i):
        clip = clips[i]
        with training.autocast(args):
            features = model.encode_clip(clip["video"], chunk=128)
        sound = (clip["wav"] * 32767).round().to(torch.int16)
        return {"features": features.half().cpu(), "sound": sound}

    first, world = distributed.rank() == 0, distributed.world()
    with data.Writer(args.extract, about) if first else contextlib.nullcontext() as writer:
        todo = distributed.all_gather_object(
            [i for i in range(len(clips)) if clips.describe(i)[0] not in writer.names]
            if first
            else None
        )[0]
        with tqdm(
            total=len(clips),
            initial=len(clips) - len(todo),
            desc="extract",
            unit="clip",
            disable=not first,
        ) as bar:
            for k in range(0, len(todo), world):
                mine = todo[k + distributed.rank()] if k + distributed.rank() < len(todo) else None
                for i, made in zip(
                    todo[k : k + world],
                    distributed.all_gather_object(None if mine is None else columns(mine)),
                ):
                    if first:
                        writer.add(*clips.describe(i), made)
                        bar.update()
        if first:
            writer.finish(needed=("val",))


def main(argv=None):
    p = training.arguments(__doc__, RECIPES)
    p.add_argument(
        "--by-loudness",
        type=int,
        choices=(0, 1),
        help="1: moments count as anchors by how far their sound rises "
        "above the clip's median; 0: all alike, as published; the preset's by default",
    )
    p.add_argument(
        "--whole",
        type=float,
        help="weight of the contrast between whole windows; the preset's by default",
    )
    p.add_argument(
        "--temporal",
        type=int,
        choices=(0, 1),
        help="0: the semantic contrast alone, for the paper's ablation",
    )
    p.add_argument(
        "--labels",
        type=Path,
        metavar="DIR",
        help="folder of the clips' .json files, as foley.py writes them: both towers "
        "also learn to name what is struck",
    )
    p.add_argument(
        "--extract",
        type=Path,
        metavar="DIR",
        help="write the features of --data there instead of training",
    )
    args = p.parse_args(argv)
    with distributed.report_errors("cavp.py"):
        (extract if args.extract else train)(args)


if __name__ == "__main__":
    main()
