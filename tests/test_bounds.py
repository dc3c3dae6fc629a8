"""The bound for kernels lets rounding through, on any processor, and nothing coarser."""

import pytest
import torch
from bounds import check_kernel, largest, rms

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def product():
    """Of two matrices, in float64."""
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(64, 64, generator=rng, dtype=torch.float64) for _ in range(2)]


def tf32(x):
    """Rounded to 10 bits behind the point, as tensor cores take float32 unless told otherwise."""
    bits = x.float().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("measure", [rms, largest])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_passes_although_torch_has_the_nearest_number(dtype, measure):
    """Sums of 4 roundings in float32, of either sign, then one to the dtype."""
    a, b = product()
    exact = a @ b
    roundings = 4 * torch.randn(
        a.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).clamp(-1, 1)
    sums = exact * (1 + roundings * torch.finfo(torch.float32).eps)
    check_kernel("rounded", sums.to(dtype), exact.to(dtype), exact, measure=measure)


@pytest.mark.parametrize("measure", [rms, largest])
def test_tf32_does_not_pass_for_float32(measure):
    a, b = product()
    exact = a.float().double() @ b.float().double()
    with pytest.raises(AssertionError, match="torch's own"):
        check_kernel("TF32", tf32(a) @ tf32(b), a.float() @ b.float(), exact, measure=measure)


@pytest.mark.parametrize("measure", [rms, largest])
@pytest.mark.parametrize(
    "dtype, coarser", [(torch.float32, torch.float16), (torch.float16, torch.bfloat16)]
)
def test_a_sum_in_a_coarser_dtype_does_not_pass(dtype, coarser, measure):
    a, b = (x.to(dtype) for x in product())
    exact = a.double() @ b.double()
    with pytest.raises(AssertionError):
        check_kernel(
            "coarse", (a.to(coarser) @ b.to(coarser)).to(dtype), a @ b, exact, measure=measure
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [0.01, -0.01, float("nan")])
def test_a_wrong_factor_and_what_is_not_a_number_do_not_pass(wrong, dtype):
    a, b = (x.to(dtype) for x in product())
    with pytest.raises(AssertionError):
        check_kernel("wrong", (a @ b) * (1 + wrong), a @ b, a.double() @ b.double())


def test_what_cancels_may_be_off_by_the_rounding_of_its_terms_and_not_more():
    terms, zero = torch.ones(64), torch.zeros(64, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    check_kernel("cancelled", 2 * eps * terms, 0 * terms, zero, magnitude=1.0)
    with pytest.raises(AssertionError):
        check_kernel("not of that size", 2 * eps * terms, 0 * terms, zero)
    with pytest.raises(AssertionError):
        check_kernel("left over", 1e-4 * terms, 0 * terms, zero, magnitude=1.0)
