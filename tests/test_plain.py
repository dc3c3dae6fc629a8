"""The yardstick measures the same work: a plain reading of a network gives that network's numbers.
Of both forms, published and mini."""

import copy
from dataclasses import replace

import pytest
import tiny
import torch

import align
import cavp
import ldm
import vae
from tools.plain import plainly

PUBLISHED = replace(tiny.TOWERS, peak=False, clips=3, temporal=cavp.CAVPConfig().temporal)


def inputs(name):
    """Of `method`, in float64."""
    rng = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    if name == "cavp":
        return [torch.rand(2, 16, 3, 16, 16, generator=rng, dtype=torch.float64)]
    if name == "unet":
        return [
            normal(2, 4, 16, 64),
            torch.tensor([500.0, 3.0], dtype=torch.float64),
            normal(2, 128, 16),
        ]
    return [normal(2, 4, 16, 8)]


def network(kind):
    name, form = kind.split()
    if name == "cavp":
        return cavp.CAVP(tiny.TOWERS if form == "mini" else PUBLISHED), "encode_video"
    if name == "unet":
        return ldm.UNet(tiny.UNET if form == "mini" else replace(tiny.UNET, aligned=0)), "forward"
    return vae.AutoencoderKL(tiny.VAE), "decode"


@pytest.mark.parametrize(
    "kind", ["cavp mini", "cavp published", "unet mini", "unet published", "vae mini"]
)
def test_a_plain_reading_gives_the_networks_own_numbers(kind):
    """In float64, where only a mistake shows. In float32 the two round differently, torch's
    GroupNorm of channels-last maps by as much as 5e-4 where a map's mean is a hundred times its
    deviation, as with such random weights it can be."""
    torch.manual_seed(0)
    ours, method = network(kind)
    for p in ours.parameters():
        torch.nn.init.normal_(
            p, 0.1, p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
        )  # some begin as zero: nothing must hide
    ours = ours.double().eval()
    theirs = plainly(copy.deepcopy(ours))
    given = inputs(kind.split()[0])
    with torch.no_grad():
        y, z = (getattr(model, method)(*given) for model in (ours, theirs))
    assert y.dtype == z.dtype == torch.float64
    assert y.std() > 1e-3 and (y - z).abs().max() < 1e-9 * y.abs().max()


@pytest.mark.parametrize("form", ["mini", "published"])
def test_a_plain_classifier_has_the_same_gradient(form):
    torch.manual_seed(0)
    unet = tiny.UNET if form == "mini" else replace(tiny.UNET, aligned=0)
    ours = align.Alignment(align.AlignmentConfig(**tiny.TIME, unet=unet)).requires_grad_(False)
    for p in ours.parameters():
        torch.nn.init.normal_(p, 0.1, p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    theirs = plainly(copy.deepcopy(ours))
    x, t, features = (
        torch.randn(2, 4, 16, 64),
        torch.tensor([500.0, 3.0]),
        torch.randn(2, 128, tiny.TIME["feature_dim"]),
    )
    y, z = (model.grad_log_prob(x, t, features) for model in (ours, theirs))
    assert y.abs().max() > 1e-6 and (y - z).abs().max() < 1e-4 * y.abs().max()
