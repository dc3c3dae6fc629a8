"""Processes that tests wait for, started before the first test: on two cores they cost no time.

A test asks for the fixture `processes` with its parameter `call`: a function and its arguments. It
runs in a thread and starts a process by `python`. Such tests come last (tests/conftest.py).
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# beside the tests themselves, which use a core or more
pool = ThreadPoolExecutor(max(1, os.cpu_count() // 2))
started = {}  # {call: future}
running = set()


def python(arguments, **environment):
    """The interpreter with these arguments, finished: `returncode`, `stdout`, `stderr`."""
    command = [sys.executable, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, **pipes) as process:
        running.add(process)
        out, err = process.communicate()
    running.discard(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def start(call):
    if call not in started:
        started[call] = pool.submit(*call)
    return started[call]


def start_for(items):
    """What the selected tests will wait for."""
    for item in items:
        if "processes" in getattr(item, "fixturenames", ()):
            start(item.callspec.params["call"])


def stop():
    """Nobody waits any more."""
    pool.shutdown(wait=False, cancel_futures=True)
    for process in list(running):
        process.kill()
