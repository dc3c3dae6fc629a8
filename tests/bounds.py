"""How far a kernel may be from the exact result, and how long a test waits for another process: one
definition, for every processor."""

import torch

# Seconds after which a process is taken to hang. Longer than any load makes the wait; a test that
# passes never waits this long.
PATIENCE = 600

# Kernels compute in float32 whatever the dtype of their tensors. A result may be off by this many
# roundings of float32 whatever torch achieves: 3.5 were seen where torch's own error was 1.
# Products in TF32 are off by a thousand and more.
ROUNDINGS = 8


def rms(x):
    return x.double().square().mean().sqrt().item()


def largest(x):
    return x.double().abs().max().item()


def check_kernel(name, ours, torchs, exact, magnitude=0.0, measure=rms):
    """Assert that a kernel is as near to float64 as torch is at the same dtype: at most twice its
    error, or a floor.

    Why a floor: torch's own error is that of one order of summation, on one processor and number of
    threads. Elsewhere it can be next to nothing by luck, and twice that is a bound which a right
    kernel misses. What no kernel can do without is the rounding of its float32 sums, and half a
    unit for the rounding of the result to its own dtype.

    `magnitude` is that of the terms which a result is a small difference of, by which rounding
    counts; at least the result's own.
    """
    assert ours.dtype == torchs.dtype and ours.shape == exact.shape, name
    assert ours.isfinite().all(), name
    error = measure(ours.double() - exact)
    torch_error = measure(torchs.double() - exact)
    size = measure(exact)
    in_sums = ROUNDINGS * torch.finfo(torch.float32).eps * max(size, magnitude)
    of_result = torch.finfo(ours.dtype).eps / 2 * size
    allowed = max(2 * torch_error, in_sums + of_result)
    report = (
        f"{name}: {measure.__name__} error {error:.2e}, torch's own {torch_error:.2e}, "
        f"allowed {allowed:.2e} for values of {size:.2e}"
    )
    print(report)
    assert error <= allowed, report
