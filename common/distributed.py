"""One process or many: the collectives that training, extraction and evaluation need.

in   torchrun's environment: RANK, WORLD_SIZE, LOCAL_RANK, rendezvous; without it, one process
out  tensors and objects of all processes, in order of rank
"""

import contextlib
import os
import re
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.files import UserError

# rank 0 may prepare a large data set while the others wait
PATIENCE = timedelta(days=7)
store = None  # torchrun's key-value store, shared by all processes


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def init(device: str):
    """Join the process group, if torchrun started several. `device`: "cpu" or "cuda"."""
    global store
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    store, number, count = next(dist.rendezvous("env://"))
    store.set_timeout(PATIENCE)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    # connected before anything can go wrong
    dist.barrier()


def leave():
    """Leave the process group, if there is one."""
    global store
    if dist.is_initialized():
        dist.destroy_process_group()
        store = None


def on_rank0(make):
    """make() -> a path, called on rank 0 alone; the other ranks wait for what it writes there."""
    if rank() > 0:
        return Path(store.get("path").decode())
    path = make()
    if world() > 1:
        store.set("path", str(path))
    return path


def all_gather(x):
    """(n, ...) of every process -> (world * n, ...) in order of rank, without a gradient."""
    if world() == 1:
        return x
    # the collective asks for contiguous tensors of one shape
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def all_gather_object(item):
    """-> [item of every process], anything that pickles, in order of rank."""
    if world() == 1:
        return [item]
    items = [None] * world()
    dist.all_gather_object(items, item)
    return items


class Step(nn.Module):
    """function(model, ...) as the one forward that DistributedDataParallel asks for."""

    def __init__(self, model, function):
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *inputs):
        return self.function(self.model, *inputs)


def wrap_ddp(model, function):
    """-> a module that computes function(model, ...), with gradients averaged over processes."""
    step = Step(model, function)
    if world() == 1:
        return step
    # every process has the same buffers already: `training.merge_running_stats`
    with warnings.catch_warnings():
        # the newest torch renames broadcast_buffers, others have no other name for it
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(step, broadcast_buffers=False, gradient_as_bucket_view=True)


def explain(error):
    """-> one line about an error that is no bug of ours; None where the traceback says more."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, UserError):
        # raised in a data worker, its line stands below the worker's traceback
        return re.sub(r"^[\w.]+Error: ", "", lines[-1])
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full; give a smaller --micro-batch, or --recompute"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted before the first step"
    if "DataLoader worker" in str(error):
        return (
            "a process that reads data died, often for lack of memory; "
            "go on with --resume and fewer --workers"
        )
    return None


def first_to_fail():
    """Whether no other process failed before; the rest fail only because that one is gone."""
    try:
        return store is None or store.add("failed", 1) == 1
    except RuntimeError:
        # the process that keeps the store is gone
        return False


@contextlib.contextmanager
def report_errors(script: str):
    """Around a command: a user's mistake ends it with one line, printed by one process."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        # one line or traceback for the job, not one for each process
        if not first_to_fail():
            sys.exit(1)
        line = explain(error)
        if line is None:
            raise
        sys.exit(f"{script}: {line}")
    leave()
