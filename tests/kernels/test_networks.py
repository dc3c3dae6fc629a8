"""Whole networks and a guided sampling run through the kernels, in the interpreter, beside plain
torch.

TRITON_INTERPRET=1 python -m pytest tests/kernels/test_networks.py
"""

import copy

import pytest
import torch
from golden import rule

import align
import diffusion
import kernels
import ldm
import vae
from kernels import attention, fast, group_norm, transformer

UNET = ldm.UNetConfig(
    width=16, multipliers=(1, 2), blocks=1, attention=(2,), heads=2, context_dim=24, groups=4
)
CLASSIFIER = align.AlignmentConfig(frames=8, positions=8, feature_dim=16, unet=UNET)
INFERENCE = ["add_layer_norm_ref", "geglu_ref"]
REFERENCES = {
    attention: ["attention_ref"],
    group_norm: ["group_norm_ref"],
    transformer: INFERENCE,
}


@pytest.fixture(autouse=True)
def insist():
    """A kernel that fails is then an error, not a fallback."""
    kernels.choose("triton")
    yield
    kernels.choose("auto")


@pytest.fixture(scope="module")
def unet():
    return rule.fill(ldm.UNet(UNET), "model.diffusion_model.")


@pytest.fixture(scope="module")
def classifier():
    return rule.fill(align.Alignment(CLASSIFIER))


@pytest.fixture(autouse=True)
def no_fallback(monkeypatch):
    """Where a reference runs while kernels are on, a test would compare torch with itself. (Those
    for inference alone do with gradients.)"""

    def guarded(name, reference):
        def run(*args, **kwargs):
            grad = torch.is_grad_enabled() and name in INFERENCE
            assert kernels.mode == "torch" or grad, f"{name} ran"
            return reference(*args, **kwargs)

        return run

    for module, names in REFERENCES.items():
        for name in names:
            monkeypatch.setattr(module, name, guarded(name, getattr(module, name)))


def both(run):
    """-> by the kernels, by torch"""
    by_kernels = run()
    kernels.choose("torch")
    return by_kernels, run()


def snr(ours, other):
    return 20 * torch.log10(other.float().norm() / (ours.float() - other.float()).norm())


def inputs(b=2, w=8):
    return (
        rule.normal("x", b, 4, 16, w),
        torch.tensor([10.5, 699.25])[:b],
        rule.normal("context", b, 8, 24),
    )


@torch.no_grad()
def test_unet(unet):
    ours, plain = both(lambda: unet(*inputs()))
    rule.close("U-Net", ours, plain, 1e-5)
    fused = fast.optimise(copy.deepcopy(unet))  # reads the skips where they are
    rule.close("U-Net, fused", both(lambda: fused(*inputs()))[0], plain, 1e-5)
    kernels.choose("triton")
    fused.defer_biases()  # as on a GPU
    rule.close("U-Net, biases deferred", fused(*inputs()), plain, 1e-5)


@torch.no_grad()
def test_unet_in_bfloat16(unet):
    rounded = copy.deepcopy(unet).bfloat16()
    ours, plain = both(lambda: rounded(*inputs()))
    exact = unet(*inputs())
    assert snr(ours, plain) > 30 and snr(ours, exact) > snr(plain, exact) - 1


def test_classifier_gradient(classifier):
    x, t, features = inputs()[0], inputs()[1], rule.normal("features", 2, 8, 16)
    ours, plain = both(lambda: classifier.grad_log_prob(x, t, features))
    rule.close("classifier gradient", ours, plain, 1e-5)


@torch.no_grad()
def test_guided_sampling(unet, classifier):
    x, _, context = inputs(1)
    unet, classifier = copy.deepcopy(unet), copy.deepcopy(classifier)
    fast.optimise(unet)
    fast.optimise(classifier.model)
    unet.defer_biases()
    classifier.model.defer_biases()
    features, times = rule.normal("features", 1, 8, 16), diffusion.solver_times(3)
    null_context = torch.zeros_like(context)

    def run():
        eps = fast.guided(
            unet, context, null_context, 4.5, classifier, features, 15.0, times, diffusion.sigma
        )
        return diffusion.dpm_solver(eps, x, 3)

    ours, plain = both(run)
    rule.close("three guided steps", ours, plain, 1e-4)


def test_training_step(unet):
    """Gradients of every weight."""
    net = copy.deepcopy(unet).requires_grad_(True)

    def run():
        net.zero_grad()
        net(*inputs()).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    rule.close("U-Net gradients", *both(run), 1e-4)


@torch.no_grad()
def test_decoder():
    model = rule.fill(
        vae.AutoencoderKL(
            vae.VAEConfig(channels=1, width=8, multipliers=(1, 2), blocks=1, groups=4)
        )
    )
    ours, plain = both(lambda: model.decode(rule.normal("z", 1, 4, 8, 8)))
    rule.close("decoder", ours, plain, 1e-5)
