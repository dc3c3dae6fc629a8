"""tests/background.py: what tests wait for is begun once, before them, and ends with them."""

import os
import subprocess
import sys

import background

SUITE = """
import background
import pytest

def wait(seconds):
    return background.python(["-c", f"import time; time.sleep({seconds}); print(1)"]).stdout

@pytest.fixture
def processes():
    return lambda call: background.start(call).result()

@pytest.mark.parametrize("call", [(wait, 1)])
def test_first_in_the_file(processes, call):
    assert "test_second" in DONE and processes(call) == "1\\n"

DONE = []

def test_second():
    assert len(background.started) == 1
    DONE.append("test_second")
"""


def run(folder, suite, *options):
    (folder / "test_it.py").write_text(suite)
    # with the project's own conftest.py
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "conftest", *options]
    paths = [str(background.ROOT), str(background.ROOT / "tests")]
    others = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *command, "test_it.py"],
        cwd=folder,
        env={**others, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_what_is_waited_for_is_begun_first_and_waited_for_last(tmp_path):
    done = run(tmp_path, SUITE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_failure_leaves_no_process(tmp_path):
    suite = SUITE.replace("(wait, 1)", "(wait, 600)").replace("== 1\n", "== 0\n")
    done = run(tmp_path, suite, "-x")
    # at once, or `timeout` would have ended it
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout + done.stderr
