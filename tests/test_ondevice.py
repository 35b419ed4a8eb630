"""The tests of tests/ondevice, in a process that has devices made of host memory (`tests.ondevice.fakegpu`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ondevice import fakegpu

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(fakegpu.missing() is not None, reason=str(fakegpu.missing()))


def run(*arguments: str) -> None:
    """Let pytest run tests on the devices; fail with what it says where one fails."""
    environment = os.environ | {"PATCHKIT_TEST_DEVICE": "fake", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "--no-header", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-5_000:]}"
    assert " passed" in done.stdout, done.stdout


def test_on_devices() -> None:
    run("tests/ondevice", "-m", "not slow")


@pytest.mark.slow
def test_on_devices_at_length() -> None:
    run("tests/ondevice", "-m", "slow")
