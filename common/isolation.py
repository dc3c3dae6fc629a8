"""A child process for FFmpeg: a file that crashes a decoder ends one input with one line.

in   call("common.ffmpeg", "read_audio", path, ...): a function by its name, and arguments
out  what it returns; its warnings are given again here; ChildError where it raised, ChildDied where
     the child ended

One child serves all calls, so a call costs a fraction of a millisecond beside the file's own; it
starts in about 0.2 s, while its parent still imports torch. A child that died is replaced at the
next call. Requests and answers are JSON and the plain bytes of arrays: the parent unpickles nothing
that a child may have been made to say.
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

# errors of the file that is written: the reader itself reports a missing input
DISK_ERRORS = {
    getattr(errno, name, None)  # Windows lacks some
    for name in (
        "ENOSPC",
        "EDQUOT",
        "EFBIG",
        "EACCES",
        "EPERM",
        "EROFS",
        "ENAMETOOLONG",
        "ENOENT",
        "ENOTDIR",
    )
}
# marks the dict that stands for an array; a file's tags, which are answered in lower case, cannot
ARRAY = "ARRAY"
ROOT = Path(__file__).resolve().parent.parent
COMMAND = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); from common.isolation import serve; serve()"
)


# ---- messages ----------------------------------------------------------------------------------


def send(stream, message):
    """Write a message of dicts, lists, numbers, strings, paths, dataclasses and arrays.

    Its form: the length of the JSON (8 bytes), the JSON, the bytes of the arrays it mentions.
    """
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
            return {ARRAY: len(arrays) - 1, "dtype": value.dtype.str, "shape": value.shape}
        raise TypeError(f"{type(value).__name__} cannot be sent to another process")

    text = json.dumps(message, default=plain).encode()
    stream.write(struct.pack("<Q", len(text)))
    stream.write(text)
    for array in arrays:
        if array.size:  # a view of no bytes cannot be cast
            stream.write(memoryview(array).cast("B"))
    stream.flush()


def receive(stream):
    """The next message, or None where the other end has closed."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    text = stream.read(struct.unpack("<Q", head)[0])
    try:
        # arrays follow in the order in which the JSON mentions them
        return json.loads(text, object_hook=lambda entry: read_array(stream, entry))
    except (ValueError, EOFError):  # cut off
        return None


def read_array(stream, entry):
    """The array that a dict describes, read from the stream; any other dict as it is."""
    if ARRAY not in entry:
        return entry
    array = np.empty(entry["shape"], entry["dtype"])
    view = memoryview(array).cast("B") if array.size else b""
    while view:
        count = stream.readinto(view)
        if not count:
            raise EOFError
        view = view[count:]
    return array


# ---- the child ---------------------------------------------------------------------------------


def answer(request):
    """{"result": ...} or {"error", "kind", "disk"} of a call, with the "warnings" it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            function = getattr(importlib.import_module(request["module"]), request["function"])
            reply = {"result": function(*request["args"], **request["kwargs"])}
        # whatever a damaged file makes a library raise concerns this file alone
        except Exception as error:
            reason = getattr(error, "strerror", None) or error
            number = getattr(error, "errno", None)
            reply = {
                "error": " ".join(str(reason).split()),
                "kind": type(error).__name__,
                "disk": number if number in DISK_ERRORS else None,
            }
    reply["warnings"] = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return reply


def serve():
    """Answer requests on standard input until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get into the replies
    while (request := receive(requests)) is not None:
        with suppress(BrokenPipeError):
            send(replies, answer(request))


# ---- the parent --------------------------------------------------------------------------------

_lock = threading.Lock()
_child = None
_owner = None  # the process that started the child: after a fork it is not ours


def start():
    """The child, started if there is none; call it early, so that its start costs no time."""
    global _child, _owner
    if _child is None or _owner != os.getpid() or _child.poll() is not None:
        _child = subprocess.Popen(
            [sys.executable, "-c", COMMAND], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        _owner = os.getpid()
    return _child


def stop():
    """End the child, if there is one: at exit, and where an answer will never be read."""
    global _child
    child = _child
    _child = None
    if child is None or _owner != os.getpid():
        return
    with suppress(OSError):
        os.kill(child.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    # a timeout, since a second signal in mid-wait leaves Popen's lock held
    with suppress(subprocess.TimeoutExpired):
        child.wait(timeout=2)
    for pipe in (child.stdin, child.stdout):
        with suppress(OSError):
            pipe.close()


atexit.register(stop)


class ChildDied(Exception):
    """The child ended before it answered; the message says by which signal."""


class ChildError(Exception):
    """A function raised in the child.

    `kind` is the name of the exception's class; `disk` its errno where the disk refused a write.
    """

    def __init__(self, message: str, kind: str, disk: int | None = None):
        super().__init__(message)
        self.kind = kind
        self.disk = disk


def call(module: str, function: str, *args, **kwargs):
    """`module.function(*args, **kwargs)` in the child. Raises ChildError and ChildDied."""
    request = {"module": module, "function": function, "args": args, "kwargs": kwargs}
    with _lock:
        child = start()
        try:
            send(child.stdin, request)
            reply = receive(child.stdout)
        except BrokenPipeError:
            reply = None
        except BaseException:  # Ctrl-C: the next call would take the answer for its own
            stop()
            raise
        if reply is None:
            status = child.wait()
            stop()
            raise ChildDied(signal.Signals(-status).name if status < 0 else f"exit status {status}")
    for message in reply["warnings"]:
        warnings.warn(message, stacklevel=3)
    if "error" in reply:
        raise ChildError(reply["error"], reply["kind"], reply["disk"])
    return reply["result"]
