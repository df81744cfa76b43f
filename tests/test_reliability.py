"""A sample of each row of docs/reliability.md, and that the harness would see a fault if there were one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import loopwright as lw

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:  # the harness is a folder of scripts beside the tests
    sys.path.append(ROOT)

from reliability import damage, kills, resume, saves, signals  # noqa: E402
from reliability.server import Server  # noqa: E402
from reliability.trial import audit, differences, observe, train  # noqa: E402
from reliability.variants import STEPS, VARIANTS  # noqa: E402


@pytest.fixture(autouse=True)
def _as_the_harness() -> Iterator[None]:
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as one:
        yield one


@pytest.mark.slow
@pytest.mark.capability("IG-19")
@pytest.mark.parametrize(
    "name", ["augmentation, 2 workers", "accumulation 4, killed inside a window", "sharded stream"]
)
def test_a_run_resumed_after_its_steps_is_the_run_that_went_on(name: str) -> None:
    (row,) = resume.every_step({name: VARIANTS[name]}, (32, 50))
    assert row["failures"] == {}
    assert row["count"] == 2


@pytest.mark.slow
def test_killed_processes_end_with_the_bits_of_those_that_were_not(server: Server) -> None:
    found = kills.chains(server, 2, (2, 3), seed=1)
    assert found["failures"] == {}
    assert found["count"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("row", [pytest.param("signals", marks=pytest.mark.nightly), "faults"])
def test_ranks_that_are_signalled_or_fail_leave_in_time_and_can_be_gone_on_from(row: str) -> None:
    """In a process without threads: it forks."""
    code = f"import json; from reliability import worlds; print(json.dumps(worlds.{row}(2)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert (found["count"], found["failures"]) == (2, {}), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_kill_while_saving_loses_at_most_one_interval_and_leaves_nothing(server: Server, background: bool) -> None:
    found = saves.run(server, 2, background=background)
    assert found["failures"] == {}
    assert found["count"] == 2


@pytest.mark.slow
def test_a_signal_in_any_phase_saves_leaves_and_can_be_gone_on_from(server: Server) -> None:
    found = signals.run(server, signals.SAMPLE)
    assert found["failures"] == {}
    assert found["count"] == 9


@pytest.mark.slow
def test_damage_is_seen_and_the_older_checkpoint_gone_on_from() -> None:
    found = damage.run(0.05)
    assert found["failures"] == {}
    assert found["count"] > 60


def test_the_harness_sees_what_a_resume_leaves_out(tmp_path: Path) -> None:
    make = VARIANTS["dropout and batch norm"]
    saver = lw.Checkpoint("32 steps", keep=9, at_end=False)
    whole, _, ledger = train(make, tmp_path / "whole", seed=3, checkpoint=saver)
    expected = observe(whole)
    path = whole.folder
    assert path is not None
    weights = lw.Resume(path / "checkpoints" / "step-00000064", how="weights")
    other, parts, again = train(make, tmp_path / "other", seed=3, resume=weights)
    odd = differences(expected, observe(other))
    assert {"weights", "optimizers", "metrics", "history", "log"} <= set(odd)
    assert other.progress.step == STEPS
    assert audit(again.batches[1:], ledger.batches, parts.batches, once=True) != []
    assert audit(ledger.batches, ledger.batches, parts.batches, once=True) == []


def test_the_audit_names_doubled_and_missed_samples() -> None:
    expected: list[list[int]] = [[0, 1], [2, 3], [4, 5], [1, 0], [3, 5], [2, 4]]
    seen: Any = [[0, 1], [2, 3], [2, 3], [1, 0], [3, 5], [2, 4]]
    assert audit(seen, expected, 3, once=True) == [
        "other batches, or another order", "epoch 0: 2 samples twice", "epoch 0: 2 samples missed",
        "epoch 0: not every sample once",
    ]  # fmt: skip
    assert audit(expected, expected, 3, once=True) == []
