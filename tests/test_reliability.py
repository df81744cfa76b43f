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


CHAINED = ("augmentation, 2 workers", "accumulation 4, killed inside a window", "validation inside epochs")


@pytest.mark.slow
def test_killed_processes_end_with_the_bits_of_those_that_were_not(server: Server) -> None:
    assert set(CHAINED) < set(kills.KILLED)
    found = kills.chains(server, 3, (2, 3), seed=1, names=CHAINED)
    assert found["failures"] == {}  # one that no kill has hit is among them
    assert found["count"] == 3
    assert found["kills"] >= 3


def forking(call: str) -> Any:
    """What a function of the harness returns, in a process without threads: it forks."""
    code = f"import json; from reliability import inside, server, worlds; server.warm_up(); print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("row", [pytest.param("signals", marks=pytest.mark.nightly), "faults"])
def test_ranks_that_are_signalled_or_fail_leave_in_time_and_can_be_gone_on_from(row: str) -> None:
    found = forking(f"worlds.{row}(2)")
    assert (found["count"], found["failures"]) == (2, {})


@pytest.mark.slow
@pytest.mark.capability("B-01")
def test_ranks_killed_inside_of_a_window_or_a_validation_end_with_the_same_bits_and_log() -> None:
    """Real processes, 1 and 2 ranks, 0 and 2 workers; each run is killed inside of a window of accumulation, and
    when it has been started again, inside of a validation.
    """
    found = forking('inside.run(4, places=("window", "validation"))')
    assert found["failures"] == {}  # other weights or another log, lines that are there twice, a kill that did not hit
    assert found["kinds"] == [[1, 0], [1, 2], [2, 0], [2, 2]]
    assert found["places"] == {"window": 4, "validation": 4}
    assert found["kills"] == 8


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
