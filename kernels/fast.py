"""The networks of ldm.py for use rather than for training: the same numbers, up to rounding, with
less work; and the guided step, on a GPU one CUDA graph.

in   a U-Net or a classifier; for a guided step also a condition, both guidances' scales and the
     times that a sampler will ask for
out  the same network, in place; eps(x, t) for `diffusion.dpm_solver`, `ddim` or `plms`

    optimise(ldm.unet)
    optimise(align.model)
    times = solver_times(25)
    eps = guided(ldm.unet, context, null_context, 4.5, align, features, 50.0, times, sigma)

`optimise` gives every block a fused form. What depends on weights alone is folded once: queries,
keys and values of self-attention are one product, 1x1 convolutions are products, biases go where
something is added anyway. What depends on the condition or on the time alone is computed once a
clip (`prepare`): keys and values of cross-attention, and a table of what each time adds in every
residual block. On a CPU, weights are brought into oneDNN's order once instead of in every call.

`guided` is `diffusion.guided_eps` for such networks. On a GPU the gradient of the classifier is
computed on a second stream, beside the U-Net, and the step is recorded as a CUDA graph, which is
kept: later clips of the same shape are copied into its inputs.
"""

import functools
import itertools
import platform
import warnings
from dataclasses import dataclass
from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from kernels.attention import attention
from kernels.group_norm import group_norm
from kernels.transformer import add_layer_norm, geglu

KEPT = 4  # recorded steps of a U-Net, each with its memory: a batch, its remainder, two more shapes


# --------------------------------------------------------------------------------------------------
# weights in the order in which oneDNN multiplies. It works on blocks of channels and reorders a
# weight before every product, of the published U-Net's convolutions 2.4 GB a step in float32. These
# operations are private to torch: they are those that torch.compile's frozen CPU graphs call,
# without its minutes of compilation

PACKED_SINCE = (2, 11)  # torch: earlier versions were not tried
NOTHING_BEHIND = "none", [], ""  # the pointwise operation that oneDNN could append


def can_pack(dtype):
    """Whether this CPU and this torch can do it, and whether it pays: in bfloat16 it was worth 6 to
    20 %, and moments in which a weight lies in memory twice took `sample.py` from 1.13 to 1.20
    times the size of its files."""
    return (
        dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and platform.machine() in ("x86_64", "AMD64")
        and torch.__version__ >= PACKED_SINCE
        and _packing_works()
    )


@functools.cache
@torch.no_grad()
def _packing_works():
    """Whether this torch has the private operations, with the arguments given to them here."""
    x = torch.zeros(1, 16, 8, 8)
    product = nn.utils.skip_init(nn.Linear, 8, 8)
    product.forward = MethodType(_packed_product, product)
    try:
        _packed_convolution(nn.utils.skip_init(nn.Conv2d, 16, 16, 3), x)
        add_product(product(x), x, product)
    except Exception:  # whatever it is, torch's own operations will do
        return False
    return True


def _packed_convolution(self, x):
    if not self.weight.is_mkldnn:
        weight, self.weight = self.weight.data.to_mkldnn(), None  # never three copies at once
        ordered = torch._C._nn.mkldnn_reorder_conv2d_weight(
            weight, self.padding, self.stride, self.dilation, self.groups, list(x.shape)
        )
        self.weight = nn.Parameter(ordered, requires_grad=False)
    geometry = self.padding, self.stride, self.dilation, self.groups
    return torch.ops.mkldnn._convolution_pointwise(
        x, self.weight, self.bias, *geometry, *NOTHING_BEHIND
    )


def _order(layer, rows):
    if not layer.weight.is_mkldnn:
        ordered = torch.ops.mkldnn._reorder_linear_weight(layer.weight.data, rows)
        layer.weight = nn.Parameter(ordered, requires_grad=False)


def _packed_product(self, x):
    _order(self, x.numel() // x.shape[-1])
    return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *NOTHING_BEHIND)


PACKED = {nn.Conv2d: _packed_convolution, nn.Linear: _packed_product}


def pack(network):
    """In place, for a network through which no gradient passes. Each weight is ordered at its first
    use. -> network"""
    weight = next(network.parameters())
    if kernels.mode != "torch" and weight.device.type == "cpu" and can_pack(weight.dtype):
        for layer in network.modules():
            if type(layer) in PACKED:
                layer.forward = MethodType(PACKED[type(layer)], layer)
    return network


# --------------------------------------------------------------------------------------------------
# fused forms of ldm.py's blocks: each is mixed into a block's class, and uses its names and weights


def linear(weight, bias=None):
    """A linear layer of this weight (c_out, c_in) and bias; for use, not for training."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def add_product(x, y, layer):
    """x (..., n) + layer(y), y (..., k). Where the product can add to what is there, it does, in
    x's own memory: x is not to be used afterwards."""
    if layer.forward.__func__ is _packed_product:
        _order(layer, y.numel() // y.shape[-1])
        return torch.ops.mkldnn._linear_pointwise.binary(y, x, layer.weight, layer.bias, "add")
    if layer.bias is not None:
        return x + layer(y)
    rows = x.flatten(0, -2)
    recorded = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    add = rows.addmm if recorded else rows.addmm_  # on a GPU, addmm would first copy x
    return add(y.flatten(0, -2), layer.weight.t()).view(x.shape)


def normalize(norm, x, **around):
    return group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, **around)


class FusedResBlock:
    skip_width = 0  # channels of its input that come from the way down, as a map of their own

    def fuse(self):
        # the first convolution's bias goes through the time embedding, which is added to its output
        conv = self.in_layers["2"]
        self.emb_layers[1].bias += conv.bias
        conv.bias = None
        # the 1x1 convolution becomes a product for each source: nothing is joined in memory
        if isinstance(self.skip_connection, nn.Conv2d):
            self.out_layers["3"].bias += self.skip_connection.bias
            weight = self.skip_connection.weight.flatten(1)
            sources = weight.split((weight.shape[1] - self.skip_width, self.skip_width), 1)
            self.skip_connection = nn.ModuleList(linear(w) for w in sources if w.shape[1])

    def forward(self, x, shift, skip=None):
        """(b, c, h, w), what the time adds (b, c_out), (b, skip_width, h, w) -> (b, c_out, h, w)"""
        h = self.in_layers["2"](normalize(self.in_layers["0"], x, silu=True, skip=skip))
        h = self.out_layers["3"](normalize(self.out_layers["0"], h, silu=True, add=shift))
        if isinstance(self.skip_connection, nn.Identity):
            return x + h
        h = h.permute(0, 2, 3, 1)
        for source, layer in zip((x, skip), self.skip_connection, strict=False):
            h = add_product(h, source.permute(0, 2, 3, 1), layer)
        return h.permute(0, 3, 1, 2)


class FusedAttention:
    def heads_of(self, x):
        return x.unflatten(2, (self.heads, -1))

    def keys_values(self, context):
        """(b, m, context_dim) -> two of (b, m, heads, d)"""
        return self.heads_of(self.to_k(context)), self.heads_of(self.to_v(context))

    def fuse_self(self):
        """Of self-attention: one product instead of three."""
        self.to_qkv = linear(torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight]))
        del self.to_q, self.to_k, self.to_v

    def forward(self, x, keys_values=None):
        """(b, n, dim) -> (b, n, dim); keys_values None: those of x itself"""
        if keys_values is None:
            q, k, v = self.to_qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)
        else:
            q = self.heads_of(self.to_q(x))
            k, v = keys_values
        return self.to_out(attention(q, k, v).flatten(2))


class FusedTransformerBlock:
    def forward(self, x, keys_values):
        """Each residual sum is one kernel with the norm behind it."""
        _, h = add_layer_norm(x, None, self.norm1.weight, self.norm1.bias)
        x, h = add_layer_norm(x, self.attn1(h), self.norm2.weight, self.norm2.bias)
        x, h = add_layer_norm(x, self.attn2(h, keys_values), self.norm3.weight, self.norm3.bias)
        first, _, last = self.ff.net
        return add_product(x, geglu(first.proj(h)), last)


class FusedSpatialTransformer:
    def fuse(self):
        self.before = None  # bias of the convolution before it, where that is to be added here
        for block in self.transformer_blocks:
            block.attn1.fuse_self()
        # the last product's bias goes through the projection, so that its sum with the residual
        # is made inside the product
        last = self.transformer_blocks[-1].ff.net[2]
        self.proj_out.bias += self.proj_out.weight.flatten(1) @ last.bias
        last.bias = None
        # as products, the 1x1 convolutions add their bias inside; cuDNN's take a launch more for it
        self.proj_in = linear(self.proj_in.weight.flatten(1), self.proj_in.bias)
        self.proj_out = linear(self.proj_out.weight.flatten(1), self.proj_out.bias)

    def take_bias(self, conv):
        """Of the convolution that makes the input: added in the norm and in the last product."""
        self.before = conv.bias
        self.proj_out.bias += conv.bias
        conv.bias = None

    def forward(self, x, keys_values):
        """(b, c, h, w), of each block two of (b, m, heads, d) -> (b, c, h, w)"""
        before = None if self.before is None else self.before.expand(len(x), -1)
        y = normalize(self.norm, x, add=before).permute(0, 2, 3, 1)
        b, h, w, c = y.shape
        y = self.proj_in(y.reshape(b, h * w, c))
        for block in self.transformer_blocks:
            y = block(y, next(keys_values))
        y = add_product(x.permute(0, 2, 3, 1), y.view(b, h, w, c), self.proj_out)
        return y.permute(0, 3, 1, 2)


class FusedBlocks:
    def forward(self, x, shifts, keys_values, skip=None):
        for layer in self:
            if isinstance(layer, FusedResBlock):
                x = layer(x, next(shifts), skip)
                skip = None
            elif isinstance(layer, FusedSpatialTransformer):
                x = layer(x, keys_values)
            else:
                x = layer(x)
        return x


# --------------------------------------------------------------------------------------------------
# the networks


def row_of(times, t):
    """{time: row of a table}, t (b,) -> (b,) rows, on the CPU; without a wait if t is there."""
    asked = t.tolist()
    for time in asked:
        if time not in times:
            raise ValueError(
                f"time {time:g}: not among the {len(times)} that this condition was prepared for; "
                "prepare it with all times that the sampler asks for, or with none"
            )
    return torch.tensor([times[time] for time in asked])


@dataclass
class Condition:
    """What a network makes of its condition, and of a sampler's times: once for all steps."""

    keys_values: list  # of each cross-attention, in order, two of (b, m, heads, d)
    columns: torch.Tensor | None  # (b, c, 1, w): what is added to the latent columns
    times: dict | None = None  # {time: its row}
    shifts: torch.Tensor | None = None  # (times, n): what each adds in all residual blocks

    def tensors(self):
        tensors = [*itertools.chain(*self.keys_values), self.columns, self.shifts]
        return [x for x in tensors if x is not None]


class FusedBackbone:
    def fuse(self):
        self.shift_widths = [block.emb_layers[1].out_features for block in self.res_blocks()]
        if self.time_embed[0].weight.device.type != "cpu":
            self.defer_biases()

    def defer_biases(self):
        """Of convolutions in front of a transformer. On a GPU a bias is a launch of its own; on a
        CPU it costs nothing, but the norm would need a pass more to add it."""
        for blocks in self.modules():
            if isinstance(blocks, FusedBlocks):
                for layer, following in itertools.pairwise(blocks):
                    if isinstance(following, FusedSpatialTransformer):
                        following.take_bias(layer.out_layers["3"])

    def res_blocks(self):
        """In the order in which they run, as they are registered."""
        return [block for block in self.modules() if isinstance(block, FusedResBlock)]

    def shifts(self, t):
        """(b,) -> (b, n): what the time adds in all residual blocks."""
        emb = F.silu(self.embed(t))
        return torch.cat([block.emb_layers[1](emb) for block in self.res_blocks()], 1)

    def prepare(self, context, times=None):
        """(b, f, context_dim), times (s,): all that a sampler will ask for; then no step computes
        its time embedding, and no other time may be asked for."""
        context = context.to(self.dtype)
        keys_values = [
            block.attn2.keys_values(context)
            for block in self.modules()
            if isinstance(block, FusedTransformerBlock)
        ]
        columns = None
        if self.config.aligned:
            columns = self.columns(context, -(-context.shape[1] // self.config.aligned))
        if times is None:
            return Condition(keys_values, columns)
        times = torch.as_tensor(times, dtype=torch.float32)
        rows = {time: row for row, time in enumerate(times.tolist())}
        return Condition(keys_values, columns, rows, self.shifts(times.to(context.device)))

    def forward(self, x, t, context):
        """t (b,) or a number, context (b, f, context_dim) or `prepare`d. A prepared time is looked
        up on the CPU: where t is on a GPU, the call waits for it."""
        t = self.one_time_each(t, x)
        condition = context if isinstance(context, Condition) else self.prepare(context)
        if condition.times is None:
            shifts = self.shifts(t)
        else:
            shifts = condition.shifts[row_of(condition.times, t).to(x.device)]
        return self.step(x, shifts, condition)

    def fused_down(self, x, shifts, condition, count=None):
        """The way down, or its first `count` blocks: the maps to be read on the way up, and
        iterators of what the blocks that follow take, in their order."""
        shifts = iter(shifts.expand(len(x), -1).split(self.shift_widths, 1))
        keys_values = iter(condition.keys_values)
        x = x.to(self.dtype, memory_format=torch.channels_last)
        h = self.input_blocks[0](x, shifts, keys_values)
        if self.config.aligned:
            self.check_frames(self.config.aligned * condition.columns.shape[3], x.shape[3])
            h = h + condition.columns
        skips = [h]
        for block in self.input_blocks[1:count]:
            h = block(h, shifts, keys_values)
            skips.append(h)
        return skips, shifts, keys_values


class FusedUNet(FusedBackbone):
    def step(self, x, shifts, condition):
        """(b, 4, 16, w), (b or 1, n) -> eps (b, 4, 16, w)"""
        return self.step_from(x, shifts, condition)[0]

    def step_from(self, x, shifts, condition, deep=None):
        """-> eps, and the map halfway up (b, c, h, w). `deep`: that of a step before, and then
        nothing below it is computed (DeepCache, Ma et al. 2024, arXiv 2312.00858)."""
        half = len(self.output_blocks) // 2
        shallow = len(self.input_blocks) - half
        if deep is None:
            skips, shifts, keys_values = self.fused_down(x, shifts, condition)
            deep = self.middle_block(skips[-1], shifts, keys_values)
            for block in self.output_blocks[:half]:
                deep = block(deep, shifts, keys_values, skips.pop())
        else:
            skips, shifts, keys_values = self.fused_down(x, shifts, condition, shallow)
            below = (*self.input_blocks[shallow:], self.middle_block, *self.output_blocks[:half])
            leave_out(below, shifts, keys_values)
        h = deep
        for block in self.output_blocks[half:]:
            h = block(h, shifts, keys_values, skips.pop())
        return self.out["2"](normalize(self.out["0"], h, silu=True)), deep


def leave_out(blocks, shifts, keys_values):
    """Takes from the iterators what these blocks would have taken."""
    for part in itertools.chain.from_iterable(block.modules() for block in blocks):
        if isinstance(part, FusedResBlock):
            next(shifts)
        elif isinstance(part, FusedTransformerBlock):
            next(keys_values)


class FusedClassifier(FusedBackbone):
    def step(self, x, shifts, condition):
        """(b, 4, 16, w), (b or 1, n) -> logit (b, 1)"""
        skips, *rest = self.fused_down(x, shifts, condition)
        h = self.middle_block(skips[-1], *rest)
        h = self.out["2"](normalize(self.out["0"], h, silu=True))
        return self.classifier(h.mean((2, 3)))


FUSED = {  # by the name of a class in ldm.py, which imports the kernels and not they it
    "ResBlock": FusedResBlock,
    "Attention": FusedAttention,
    "TransformerBlock": FusedTransformerBlock,
    "SpatialTransformer": FusedSpatialTransformer,
    "Blocks": FusedBlocks,
    "UNet": FusedUNet,
    "Classifier": FusedClassifier,
}


@functools.cache
def mixed(fused, plain):
    return type(fused.__name__, (fused, plain), {})


@torch.no_grad()
def optimise(network):
    """A U-Net or classifier, in place: faster, the same numbers up to rounding; for use, not for
    training or saving. -> network"""
    if isinstance(network, FusedBackbone):
        return network
    name = type(network).__name__
    if not issubclass(FUSED.get(name, object), FusedBackbone):
        raise ValueError(f"{name}: no fused form of it is known; give a UNet or a Classifier")
    parts = list(network.modules())
    for part in parts:
        fused = FUSED.get(type(part).__name__)
        if fused is not None:
            part.__class__ = mixed(fused, type(part))
    if isinstance(network, FusedUNet):
        widths = reversed(network.skip_widths)
        for blocks, width in zip(network.output_blocks, widths, strict=True):
            blocks[0].skip_width = width
    for part in reversed(parts):  # the network itself last
        if hasattr(part, "fuse"):
            part.fuse()
    return pack(network) if isinstance(network, FusedUNet) else network


# --------------------------------------------------------------------------------------------------
# a guided step


@functools.cache
def stream(_use, device):
    """One for each use, and not one a call: every stream has a workspace of cuBLAS."""
    return torch.cuda.Stream(device)


def beside(function, x, row):
    """Start function(x, row), on a GPU on a second stream; -> a call that waits for the result."""
    if not x.is_cuda:
        result = function(x, row)
        return lambda: result
    main = torch.cuda.current_stream(x.device)
    side = stream("beside", x.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = function(x, row)

    def join():
        main.wait_stream(side)
        result.record_stream(main)
        return result

    return join


def prepared(network, context, times, in_halves=False):
    """network(x, t, context) as a function of x and a row of `times`; its condition's tensors.

    in_halves: the function is `FusedUNet.step_from`, of x, a row, and the map of a step before."""
    if isinstance(network, FusedBackbone):
        condition = network.prepare(context, times)
        step = network.step_from if in_halves else network.step

        def call(x, row, *deep):
            return step(x, condition.shifts.index_select(0, row), condition, *deep)

        return call, condition.tensors()
    table = times.to(context.device)

    def call(x, row):
        return network(x, table.index_select(0, row).expand(len(x)), context)

    return call, [context]


def prepared_gradient(classifier, features, times):
    """Likewise of d log p(aligned) / d x; classifier as `align.Alignment`."""
    model = getattr(classifier, "model", None)
    if not isinstance(model, FusedBackbone):
        return prepared(classifier.grad_log_prob, features, times)
    logit, tensors = prepared(model, classifier.cond_model(features), times)

    def gradient(x, row):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_prob = F.logsigmoid(logit(x, row).float())
            return torch.autograd.grad(log_prob.sum(), x)[0]

    return gradient, tensors


class Step:
    """eps of both guidances, as `diffusion.guided_eps` has it, at a row of the table of times."""

    def __init__(self, denoise, gradient, cfg, scales, tensors, emphasis=0.0, deep_every=1):
        self.denoise = denoise
        self.deep_every = deep_every
        self.deep = None  # the U-Net's map halfway up, where not every step computes it
        self.emphasis = emphasis  # of what one more context leaves open; 0: there is none
        self.gradient = gradient  # None: without classifier guidance
        self.cfg = cfg  # None: the conditional branch alone
        self.scales = scales  # (times, 1, 1, 1): cg sigma_t
        self.tensors = tensors  # of the condition: all that differs from clip to clip

    def __call__(self, x, row, is_deep=True):
        """is_deep: computes the deep half of the U-Net, too."""
        gradient = None
        if self.gradient is not None:
            gradient = beside(self.gradient, x, row)  # it needs x alone, as the U-Net does
        # unconditional, with something left open, conditional: as many of them as there are
        count = 1 + (self.cfg is not None) + (self.emphasis != 0)
        branches = torch.cat([x] * count)
        if self.deep_every == 1:
            branches = self.denoise(branches, row)
        else:
            deep = None if is_deep else self.deep
            branches, self.deep = self.denoise(branches, row, deep)
        branches = branches.float().chunk(count)
        eps = branches[-1]
        if self.cfg is not None:
            eps = torch.add(branches[0], eps - branches[0], alpha=self.cfg)
        if self.emphasis:
            eps = torch.add(eps, branches[-1] - branches[-2], alpha=self.emphasis)
        if gradient is not None:
            eps = torch.addcmul(eps, self.scales.index_select(0, row), gradient(), value=-1)
        return eps


def recordable(x):
    return x.is_cuda


def record(function, device):
    """A function without arguments as a CUDA graph -> its result, and the call that computes it
    anew in the same place."""
    current = torch.cuda.current_stream(device)
    side = stream("record", device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(2):  # libraries choose their algorithms before, not while recording
            function()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return result, graph.replay


class Recorded:
    """A step as a CUDA graph, for latents of one shape: hundreds of launches become one. Where it
    cannot be recorded, plain calls, said once."""

    def __init__(self, guided, x):
        self.step = step = guided.step
        guided.tensors = [y.clone() for y in step.tensors]  # the step's own will hold other clips'
        self.owner = None  # of the condition that lies there, and of the map halfway up
        self.x = x.clone()
        self.row = torch.zeros(1, dtype=torch.long, device=x.device)
        # a graph of a shallow step reads the map where that of a deep one writes it
        kinds = (True,) if step.deep_every == 1 else (True, False)
        try:
            self.graphs = [record(lambda k=k: step(self.x, self.row, k), x.device) for k in kinds]
        except RuntimeError as e:
            reason = str(e).splitlines()[0][:120]
            warnings.warn(f"sampling without a CUDA graph ({reason})", stacklevel=4)
            self.graphs = None

    def __call__(self, guided, x, row, is_deep):
        if self.owner is not guided.token:
            torch._foreach_copy_(self.step.tensors, guided.tensors)
            self.owner = guided.token
            is_deep = True  # the map is another clip's
        self.x.copy_(x)
        self.row.fill_(row)
        if self.graphs is None:
            return self.step(self.x, self.row, is_deep)
        out, replay = self.graphs[not is_deep]
        replay()
        return out.clone()  # PLMS keeps some


class Guided:
    """eps(x, t) of one clip's condition, t one time for all latents and on the CPU, as the samplers
    give it: then no step waits for the device."""

    def __init__(self, step, times, kept, key):
        self.step = step
        self.tensors = step.tensors
        self.times = {time: row for row, time in enumerate(times.tolist())}
        self.kept = kept
        self.key = key
        self.token = object()
        # the first of them is the one at which sampling begins
        falling = sorted(self.times, reverse=True)
        self.deep_rows = {self.times[time] for time in falling[:: step.deep_every]}

    def recorded(self, x):
        key = (*self.key, x.shape, kernels.mode)
        if key not in self.kept:
            while len(self.kept) >= KEPT:
                del self.kept[next(iter(self.kept))]
            self.kept[key] = Recorded(self, x)
        return self.kept[key]

    def __call__(self, x, t):
        rows = row_of(self.times, t)
        if (rows != rows[0]).any():
            raise ValueError("a guided step is made at one time for all latents of the batch")
        is_deep = int(rows[0]) in self.deep_rows
        if recordable(x):
            return self.recorded(x)(self, x, int(rows[0]), is_deep)
        return self.step(x, rows[:1].to(x.device), is_deep)


def guided(
    unet,
    context,
    null_context,
    cfg,
    classifier=None,
    features=None,
    cg=0.0,
    times=None,
    sigma=None,
    open_context=None,
    emphasis=0.0,
    deep_every=1,
):
    """`diffusion.guided_eps` with all that can be computed before the first step.

    Arguments as there, and times: all that the sampler will ask for (`diffusion.TIMES`); sigma: the
    noise scale, a function of time; deep_every: of so many calls one computes the deep half of an
    optimised U-Net, the others go on with its result. Networks that are not optimised, or any
    functions of (x, t, context), are called as they are."""
    times = torch.as_tensor(times, dtype=torch.float32)
    contexts = [context]
    if open_context is None or not emphasis:
        emphasis = 0.0
    else:
        contexts.insert(0, open_context)
    if cfg == 1 or null_context is None:
        cfg = None
    else:
        contexts.insert(0, null_context.expand_as(context))
    context = torch.cat(contexts)
    # only a fused one has halves
    deep_every = deep_every if isinstance(unet, FusedUNet) else 1
    denoise, tensors = prepared(unet, context, times, deep_every > 1)
    gradient = scales = None
    if cg:
        gradient, more = prepared_gradient(classifier, features, times)
        tensors = tensors + more
        scales = (cg * sigma(times)).float().to(context.device)[:, None, None, None]
    step = Step(denoise, gradient, cfg, scales, tensors, emphasis, deep_every)
    # a recorded step serves all clips of these networks, scales, times and shapes
    kept = vars(unet).setdefault("recorded", {}) if isinstance(unet, FusedBackbone) else {}
    shapes = tuple((x.shape, x.dtype) for x in tensors)
    model = id(getattr(classifier, "model", classifier)) if cg else None
    key = (cfg, cg, emphasis, deep_every, model, tuple(times.tolist()), shapes)
    return Guided(step, times, kept, key)
