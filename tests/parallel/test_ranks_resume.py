"""Runs of two ranks that die or are stopped, and go on to the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import resume_of_ranks

pytestmark = pytest.mark.slow


def train(folder: Path, mode: str, kind: str = "all", *, world: int = 2, restarts: int = 0) -> Any:
    """What rank 0 printed; where it ended otherwise, what all wrote to stderr."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [sys.executable, *launcher, "--max-restarts", str(restarts), resume_of_ranks.__file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [*command, str(folder), mode, kind], env=environment, capture_output=True, text=True, timeout=120
    )
    return json.loads(found.stdout.splitlines()[-1]) if found.returncode == 0 else found.stderr


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run that nothing has happened to: batch norm, dropout, workers."""
    return train(tmp_path_factory.mktemp("full"), "full")


def test_a_rank_that_is_killed_costs_nothing_where_the_launcher_restarts(full: Any, tmp_path: Path) -> None:
    found = train(tmp_path, "die", restarts=1)
    assert found["weights"] == full["weights"]
    assert found["records"] == full["records"]  # none twice, none lost
    assert len(list((tmp_path / "n").iterdir())) == 1  # in the same folder


@pytest.mark.nightly
def test_sigterm_to_one_rank_saves_once_and_the_run_goes_on_to_the_same_bits(full: Any, tmp_path: Path) -> None:
    told = train(tmp_path, "stop")
    assert "exitcode  : 143" in told
    (folder,) = (tmp_path / "n").iterdir()
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    found = train(tmp_path, "resume")
    assert (found["weights"], found["records"]) == (full["weights"], full["records"])


@pytest.mark.nightly
def test_another_number_of_ranks_is_refused_as_inexact_and_goes_on_when_asked_to(tmp_path: Path) -> None:
    train(tmp_path, "stop", "plain")
    assert "ranks was 2 and is 1" in train(tmp_path, "resume", "plain", world=1)
    found, expected = train(tmp_path, "approximate", "plain", world=1), train(tmp_path / "alone", "full", "plain")
    for mine, other in zip(found["records"], expected["records"], strict=True):
        assert mine.keys() == other.keys()
        assert mine["samples"] == other["samples"]
        for name in mine.keys() - {"kind"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-5), name
