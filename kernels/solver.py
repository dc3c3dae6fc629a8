"""One update of DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2), the whole arithmetic between two calls of the network in one pass.

in   x, eps and the previous clean latent (b, 4, 16, w), float32; row (5,): sigma, 1/alpha, k, a, b of this step
out  the next x and this step's clean latent:  m = (x - sigma eps) / alpha,  d = m + k (m - previous),  x' = a x - b d

Replaces nine elementwise kernels, each of which only costs its launch: a latent has 4096 numbers. The coefficients lie in memory rather
than in the launch, so that one CUDA graph serves every step. On a CPU, or where the kernel cannot run, `multistep_ref` does.
"""

import torch

import kernels

BLOCK = 1024


def multistep_ref(x, eps, previous, row):
    sigma, inverse_alpha, k, a, b = row
    m = (x - sigma * eps) * inverse_alpha
    return a * x - b * (m + k * (m - previous)), m


if kernels.triton is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def multistep_kernel(x, eps, previous, row, out, m_out, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        now = tl.load(x + i, mask=inside, other=0.0)
        m = (now - tl.load(row) * tl.load(eps + i, mask=inside, other=0.0)) * tl.load(row + 1)
        d = m + tl.load(row + 2) * (m - tl.load(previous + i, mask=inside, other=0.0))
        tl.store(out + i, tl.load(row + 3) * now - tl.load(row + 4) * d, mask=inside)
        tl.store(m_out + i, m, mask=inside)


def shipped():
    """What `kernels.gate` compiles."""
    args = dict.fromkeys(("x", "eps", "previous", "row", "out", "m_out"), "*fp32") | {"n": 4096}
    yield {
        "name": "multistep",
        "fn": multistep_kernel,
        "args": args,
        "constexprs": {"BLOCK": BLOCK},
        "num_warps": 4,
        "num_stages": 1,
    }


def multistep(x, eps, previous, row):
    """-> next x, clean latent. No gradient passes: a sampler's state has none."""
    if not (kernels.active(x, eps, previous, row) and x.dtype == eps.dtype == torch.float32):
        return multistep_ref(x, eps, previous, row)
    x, eps, previous = x.contiguous(), eps.contiguous(), previous.contiguous()
    out, m = torch.empty_like(x), torch.empty_like(x)
    try:
        multistep_kernel[triton.cdiv(x.numel(), BLOCK),](
            x, eps, previous, row, out, m, x.numel(), BLOCK, num_warps=4
        )
    except Exception as error:  # of many kinds: compiler, driver, resources
        kernels.failed("multistep", error)
        return multistep_ref(x, eps, previous, row)
    return out, m
