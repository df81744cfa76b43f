"""A run that ends inside a save, in front of any operation or at any moment, has lost one interval at most."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def crash(*arguments: str) -> Any:
    """In a process of its own, which forks: this one has threads."""
    script = Path(__file__).with_name("crash.py")
    done = subprocess.run([sys.executable, script, *arguments], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.capability("B-26")
@pytest.mark.parametrize(
    ("least", "mode"),
    [
        pytest.param(100, ["--keep", "1", "--stride", "1"], id="sync", marks=pytest.mark.nightly),
        pytest.param(15, ["--keep", "2", "--stride", "7", "--background"], id="async"),
    ],
)
def test_after_any_operation_of_a_save_the_newest_checkpoint_is_good_and_nothing_is_left_over(
    least: int, mode: list[str]
) -> None:
    """A run that ends before any operation of a save, or in the middle of a write, leaves a valid newest one."""
    found = crash("prefixes", *mode)
    assert found["failures"] == {}
    assert found["count"] >= least


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(["--keep", "1"], id="sync", marks=pytest.mark.nightly),
        pytest.param(["--keep", "1", "--background"], id="async", marks=pytest.mark.nightly),
    ],
)
def test_after_a_kill_at_any_moment_the_newest_checkpoint_is_good_and_nothing_is_left_over(mode: list[str]) -> None:
    found = crash("kills", "--count", "10", *mode)
    assert (found["count"], found["failures"]) == (10, {})
