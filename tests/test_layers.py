"""Layers of tests: what `-m fast` leaves out is named as the tests are."""

from pathlib import Path

import conftest
import pytest

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("file", conftest.FAST)
def test_the_tests_left_out_of_the_fast_layer_exist(file):
    path = FOLDER / f"{file}.py"
    source = path.read_text() if path.exists() else ""
    for name in conftest.FAST[file]:
        assert not source or f"def {name}(" in source, f"tests/conftest.py: no {name} in {file}.py"


def test_this_test_is_fast_and_not_slow(request):
    assert request.node.get_closest_marker("fast")
    assert not request.node.get_closest_marker("slow")
