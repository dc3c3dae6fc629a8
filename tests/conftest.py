"""Every test and every fixture begins in the same state, whatever ran before it."""

import os
import random

# Of several processes on few cores, those that wait must sleep, not spin: two ranks beside other busy
# processes took 15 minutes instead of one. Read when torch loads, also by processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import kernels  # noqa: E402


def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    kernels.mode = "auto"  # which the main job sets for the whole process


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup():
    seed()  # a fixture of several tests is made in whichever of them comes first


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():
    seed()
