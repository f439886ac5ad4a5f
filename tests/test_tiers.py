"""What a marker promises."""

import subprocess
import sys

import pytest


def test_a_unit_test_cannot_start_a_process() -> None:
    with pytest.raises(RuntimeError, match="is a unit test and started a process"):
        subprocess.run([sys.executable, "-c", "print('digits')"])


@pytest.mark.process
def test_one_that_is_marked_can() -> None:
    assert subprocess.run([sys.executable, "-c", "pass"]).returncode == 0
