"""Compiles every shipped kernel configuration for GPUs that need not be there, and fails on what would make one slow or impossible.

in   `shipped()` of each kernel file: the launches that it makes at the networks' shapes, from the table that the launcher reads
out  a row for each and target: registers, shared memory, spills, load widths, tensor-core instructions; exit status 1 if one fails

    python -m kernels.gate                  sm_80 (A100), sm_90 (H100), sm_100 (B200)
    python -m kernels.gate --target 90

Refused: registers spilled to memory; more shared memory than a block may have; narrow loads in a kernel whose data allow 16 bytes at a
time (`wide`); a matrix kernel (`matrix`) without tensor-core instructions, unless its dtype is float32, which is done exactly. The compiler, the
assembler and the disassembler are the ones in Triton's wheel, so another Triton version is another gate.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels

kernels.load()  # before the kernels' own files, which look for it

from kernels import attention, group_norm, transformer  # noqa: E402

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one block may have
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC[HQ]?MMA)\b")


def source(launch):
    """What the launcher would hand to the compiler: pointers are 16-byte aligned, integers that are 1 become constants, multiples of
    16 are marked as such."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(launch["fn"].arg_names):
        value = launch["constexprs"].get(name, launch["args"].get(name))
        if name in launch["constexprs"] or value is None or isinstance(value, int) and value == 1:
            signature[name], constants[i,] = "constexpr", value
        else:
            signature[name] = value if isinstance(value, str) else "i32"
            if signature[name].startswith("*") or isinstance(value, int) and value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(launch["fn"], signature, constants, attributes)


def facts(launch, capability):
    """{regs, shared, spills, wide, narrow, tensor}: of one configuration on one target."""
    options = {"num_warps": launch["num_warps"], "num_stages": launch["num_stages"]}
    kernel = triton.compile(
        source(launch), target=GPUTarget("cuda", capability, 32), options=options
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage, sass = (
            subprocess.run(
                [BIN / tool, *flags, cubin], capture_output=True, text=True, check=True
            ).stdout
            for tool, *flags in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.\S+", sass)
    wide = sum(".128" in load for load in loads)
    return {
        "regs": int(re.search(r"REG:(\d+)", usage)[1]),
        "shared": kernel.metadata.shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "wide": wide + len(re.findall(r"\bUTMALDG", sass)),
        "narrow": len(loads) - wide,
        "tensor": len(TENSOR_CORE.findall(sass)),
    }


def faults(launch, capability, found):
    """What is wrong with it, in words."""
    exact = "*fp32" in launch["args"].values()
    if found["spills"]:
        yield f"{found['spills']} spills"
    if found["shared"] > SHARED[capability]:
        yield f"{found['shared']} bytes of shared memory, {SHARED[capability]} are to be had"
    if launch.get("wide") and found["narrow"]:
        yield f"{found['narrow']} loads narrower than 16 bytes"
    if launch.get("matrix") and not exact and not found["tensor"]:
        yield "no tensor-core instruction"


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--target",
        type=int,
        choices=list(SHARED),
        action="append",
        help="compute capability; default: all",
    )
    p.add_argument("--only", default="", help="configurations whose name holds this")
    args = p.parse_args(argv)
    start, failed, done = time.time(), 0, 0
    print(
        f"triton {triton.__version__}\n{'sm':>4}  {'configuration':<58}{'regs':>5}{'shared':>8}{'spills':>7}{'wide':>6}{'narrow':>7}{'tensor':>7}"
    )
    for launch in (
        *attention.shipped(),
        *group_norm.shipped(),
        *transformer.shipped(),
    ):
        if args.only not in launch["name"]:
            continue
        for capability in args.target or SHARED:
            found = facts(launch, capability)
            wrong = "; ".join(faults(launch, capability, found))
            print(
                f"{capability:>4}  {launch['name']:<58}{found['regs']:>5}{found['shared']:>8}{found['spills']:>7}{found['wide']:>6}"
                f"{found['narrow']:>7}{found['tensor']:>7}"
                + (f"  FAILS: {wrong}" if wrong else ""),
                flush=True,
            )
            failed, done = failed + bool(wrong), done + 1
    print(f"{done} compiled in {time.time() - start:.0f} s, {failed} failed")
    return 1 if failed or not done else 0


if __name__ == "__main__":
    sys.exit(main())
