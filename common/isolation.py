"""A child process for FFmpeg: a file that crashes a decoder ends one input with one line, not the whole run.

in   call("common.ffmpeg", "read_audio", path, ...): a function by its name, and arguments
out  what it returns; its warnings and errors too. MediaError where the child died

One child serves all calls, so a call costs a fraction of a millisecond beside the file's own; it starts in about
0.2 s, while its parent still imports torch. A child that died is replaced at the next call. Requests and answers are
JSON and the plain bytes of arrays: the parent unpickles nothing that a child may have been made to say.
"""

import atexit
import errno
import importlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path

import numpy as np

# of the file that is written: the reader names a missing input itself
DISK_ERRORS = {
    getattr(errno, name)
    for name in [
        "ENOSPC",
        "EDQUOT",
        "EFBIG",
        "EACCES",
        "EPERM",
        "EROFS",
        "ENAMETOOLONG",
        "ENOENT",
        "ENOTDIR",
    ]
    if hasattr(errno, name)
}
ROOT = Path(__file__).resolve().parent.parent
COMMAND = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); from common.isolation import serve; serve()"
)


# ---- messages ----------------------------------------------------------------------------------


def send(stream, message):
    """A message of dicts, lists, numbers, strings, paths and arrays: its length, JSON, the arrays' bytes."""
    arrays = []

    def plain(value):
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, np.generic):
            return value.item()
        if is_dataclass(value):
            return asdict(value)
        if isinstance(value, np.ndarray):
            arrays.append(np.ascontiguousarray(value))
            return {"array": len(arrays) - 1, "dtype": value.dtype.str, "shape": value.shape}
        raise TypeError(f"{type(value).__name__} cannot be sent to another process")

    text = json.dumps(message, default=plain).encode()
    stream.write(struct.pack("<Q", len(text)))
    stream.write(text)
    for array in arrays:
        stream.write(memoryview(array).cast("B") if array.size else b"")
    stream.flush()


def receive(stream):
    """The next message, or None where the other end is gone."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    text = stream.read(struct.unpack("<Q", head)[0])
    try:
        message = json.loads(text, object_hook=lambda found: read_array(stream, found))
    except (ValueError, EOFError):  # cut off
        return None
    return message


def read_array(stream, found):
    """The array that a dict stands for: they follow in the order in which JSON names them."""
    if "array" not in found:
        return found
    array = np.empty(found["shape"], found["dtype"])
    view = memoryview(array).cast("B") if array.size else memoryview(b"")
    while view:
        count = stream.readinto(view)
        if not count:
            raise EOFError
        view = view[count:]
    return array


# ---- the child ---------------------------------------------------------------------------------


def answer(request):
    """What a request asks for, as {"result"} or {"error", "kind"}, with the warnings that were given."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            function = getattr(importlib.import_module(request["module"]), request["function"])
            reply = {"result": function(*request["args"], **request["kwargs"])}
        except (
            Exception
        ) as error:  # whatever a damaged file makes a library raise is this file's error alone
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            number = getattr(error, "errno", None)
            number = number if number in DISK_ERRORS else None
            reply = {"error": reason, "kind": type(error).__name__, "disk": number}
    return {
        **reply,
        "warnings": [str(w.message) for w in said if issubclass(w.category, UserWarning)],
    }


def serve():
    """Answer requests on standard input until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between
    while (request := receive(requests)) is not None:
        with suppress(BrokenPipeError):
            send(replies, answer(request))


# ---- the parent --------------------------------------------------------------------------------

_lock = threading.Lock()
_child = None
_owner = None  # the process whose child it is: after a fork it is not ours


def start():
    """The child, started if there is none; call it early, so that its start costs no time."""
    global _child, _owner
    if _child is None or _owner != os.getpid() or _child.poll() is not None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        _child = subprocess.Popen([sys.executable, "-c", COMMAND], **pipes)
        _owner = os.getpid()
    return _child


def stop():
    """End the child, if there is one: at exit, and where an answer will never be read."""
    global _child
    child, _child = _child, None
    if child is None or _owner != os.getpid():
        return
    with suppress(OSError):
        os.kill(child.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    with suppress(
        subprocess.TimeoutExpired
    ):  # a second signal in mid-wait leaves Popen's lock held
        child.wait(timeout=2)
    for pipe in (child.stdin, child.stdout):
        with suppress(OSError):
            pipe.close()


atexit.register(stop)


class ChildDied(Exception):
    """The child ended before it answered; the message says by which signal."""


class ChildError(Exception):
    """A function raised in the child: `kind` is the name of the exception's class; `disk` the number of the error where
    the disk refused to be written."""

    def __init__(self, message, kind, disk=None):
        super().__init__(message)
        self.kind = kind
        self.disk = disk


def call(module, function, *args, **kwargs):
    """`module.function(*args, **kwargs)` in the child. Its warnings are given here; exceptions become ChildError."""
    with _lock:
        child = start()
        try:
            send(
                child.stdin,
                {"module": module, "function": function, "args": args, "kwargs": kwargs},
            )
            reply = receive(child.stdout)
        except BrokenPipeError:
            reply = None
        except BaseException:  # Ctrl-C: the answer would be taken for that of the next call
            stop()
            raise
        if reply is None:
            status = child.wait()
            stop()
            name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            raise ChildDied(name)
    for message in reply["warnings"]:
        warnings.warn(message, stacklevel=3)
    if "error" in reply:
        raise ChildError(reply["error"], reply["kind"], reply["disk"])
    return reply["result"]
