"""Every test and every fixture begins in the same state, whatever ran before it."""

import random

import numpy as np
import pytest
import torch

import kernels


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
