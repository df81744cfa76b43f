"""The same numbers with any number of ranks, over gloo: each case is trained by 1, 2, 3 and 4 processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cases_of_ranks
import ranked

pytestmark = pytest.mark.slow


def results(world: int, folder: Path) -> dict[str, Any]:
    """What the cases give with ``world`` processes; several test processes share one run of each."""
    out, lock = folder / f"ranks-{world}.json", folder / f"ranks-{world}.lock"
    import fcntl

    with open(lock, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        if not out.exists():
            launcher = [ranked.__file__, str(world)] if world > 1 else []
            command = [sys.executable, *launcher, cases_of_ranks.__file__, str(out)]
            found = subprocess.run(
                command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280
            )
            assert found.returncode == 0, found.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.mark.capability("B-04", "B-05", "B-11", "IG-22")
@pytest.mark.parametrize("world", [2, *(pytest.param(n, marks=pytest.mark.nightly) for n in (3, 4))])
@pytest.mark.parametrize("name", list(cases_of_ranks.CASES))
def test_the_numbers_do_not_depend_on_how_many_ranks_there_are(name: str, world: int, shared_folder: Path) -> None:
    alone, ranks = results(1, shared_folder)[name], results(world, shared_folder)[name]
    close(ranks, alone, name)


@pytest.mark.capability("B-04", "IG-22")
@pytest.mark.parametrize("world", [2, *(pytest.param(n, marks=pytest.mark.nightly) for n in (3, 4))])
def test_what_is_evaluated_is_equal_to_the_last_bit(world: int, shared_folder: Path) -> None:
    assert results(world, shared_folder)["evaluated"] == results(1, shared_folder)["evaluated"]


def close(found: Any, expected: Any, where: str) -> None:
    """Equal, numbers to 1e-6."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            close(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            close(found[i], value, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6), where
    else:
        assert found == expected, where
