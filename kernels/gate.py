"""Ahead-of-time compiles every kernel for sm_80/90/100 (no GPU needed); fails on spills, narrow
loads, shared-memory overflow.

in   `shipped()` of each kernel file: the launches that it makes at the networks' shapes
out  a row for each and target: registers, shared memory, spills, load widths, tensor-core
     instructions; exit status 1 if one fails

    python -m kernels.gate                  sm_80 (A100), sm_90 (H100), sm_100 (B200)
    python -m kernels.gate --target 90

Refused: registers spilled to memory; more shared memory than a block may have; narrow loads in a
kernel whose data allow 16 bytes at a time (`wide`); a matrix kernel (`matrix`) without tensor-core
instructions, unless its dtype is float32, which is computed exactly. The compiler, the assembler
and the disassembler are the ones in Triton's wheel, so another Triton version is another gate.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels
from common import cli

kernels.load()  # before the kernels' own files, which look for it

from kernels import attention, group_norm, transformer  # noqa: E402

# the disassemblers come with Triton, like the assembler
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one block may have
# their names on Ampere, Hopper and Blackwell
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC[HQ]?MMA)\b")
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# of the table, and their widths
COLUMNS = {"regs": 5, "shared": 8, "spills": 7, "wide": 6, "narrow": 7, "tensor": 7}


def source(launch):
    """What a launch hands to the compiler: pointers are 16-byte aligned; of integers, unless they
    are not to be specialized, 1 becomes a constant and multiples of 16 are marked as such."""
    signature = {}
    constants = {}
    attributes = {}
    # what the launcher would specialize on
    for i, param in enumerate(launch.kernel.params):
        value = launch.args[param.name]
        special = isinstance(value, int) and not param.do_not_specialize
        if param.is_constexpr or value is None or (special and value == 1):
            signature[param.name] = "constexpr"
            constants[i,] = value
            continue
        if torch.is_tensor(value):
            signature[param.name] = TYPES[value.dtype]
        else:
            signature[param.name] = "fp32" if isinstance(value, float) else "i32"
        if torch.is_tensor(value) or (special and value % 16 == 0):
            attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def launches():
    """Each different one once: those that compile to the same are left out."""
    seen = set()
    for module in (attention, group_norm, transformer):
        for shipped in module.shipped():
            launch = shipped.launch
            # the hash of source, constants and attributes
            key = source(launch).hash(), launch.warps, launch.stages
            if key not in seen:
                seen.add(key)
                yield shipped


def disassembled(kernel):
    """The assembler's report of resources, and the instructions."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        for command in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")):
            done = subprocess.run(
                [BIN / command[0], command[1], cubin], capture_output=True, text=True, check=True
            )
            yield done.stdout


def facts(launch, capability):
    """{regs, shared, spills, wide, narrow, tensor}: of one configuration on one target."""
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    target = GPUTarget("cuda", capability, 32)
    kernel = triton.compile(source(launch), target=target, options=options)
    usage, sass = disassembled(kernel)
    # global loads: plain, and asynchronous ones to shared memory
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


def faults(shipped, capability, row):
    """What is wrong with it, in words."""
    # lse is float32 beside any dtype
    dtypes = {x.dtype for x in shipped.launch.args.values() if torch.is_tensor(x)}
    if row["spills"]:
        yield f"{row['spills']} spills"
    if row["shared"] > SHARED[capability]:
        yield f"{row['shared']} bytes of shared memory, {SHARED[capability]} are available"
    if shipped.wide and row["narrow"]:
        yield f"{row['narrow']} loads narrower than 16 bytes"
    if shipped.matrix and dtypes != {torch.float32} and not row["tensor"]:
        yield "no tensor-core instruction"


def main(argv=None):
    p = cli.Parser("kernels.gate", __doc__)
    targets = list(SHARED)
    p.add_argument(
        "--target",
        type=int,
        choices=targets,
        action="append",
        help="compute capability; default: all",
    )
    p.add_argument("--only", default="", help="configurations whose name holds this")
    args = p.parse_args(argv)
    start = time.time()
    done = 0
    failed = 0
    print(f"triton {triton.__version__}")
    print(f"{'sm':>4}  {'configuration':<58}", *(f"{x:>{n}}" for x, n in COLUMNS.items()), sep="")
    for shipped in launches():
        name = f"{shipped.launch.kernel.__name__} {shipped.name}"
        if args.only not in name:
            continue
        # one row for each target
        for capability in args.target or targets:
            row = facts(shipped.launch, capability)
            wrong = "; ".join(faults(shipped, capability, row))
            cells = "".join(f"{row[x]:>{n}}" for x, n in COLUMNS.items())
            if wrong:
                failed += 1
                cells += f"  FAILS: {wrong}"
            done += 1
            print(f"{capability:>4}  {name:<58}{cells}", flush=True)
    print(f"{done} compiled in {time.time() - start:.0f} s, {failed} failed")
    # nothing compiled is a failure too: --only may be misspelled
    return 1 if failed or not done else 0


if __name__ == "__main__":
    sys.exit(main())
