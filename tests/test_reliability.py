"""A sample of each row of docs/reliability.md, and that the harness would see a fault if there were one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import loopwright as lw

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:  # the harness is a folder of scripts beside the tests
    sys.path.append(ROOT)

from reliability import damage, hostile, kills, report, resume, run, saves, signals  # noqa: E402
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
def test_a_process_killed_once_ends_with_the_bits_of_one_that_was_not(server: Server) -> None:
    found = kills.chains(server, 1, (1, 1), seed=2, names=CHAINED[1:])
    assert found["failures"] == {}
    assert (found["count"], found["kills"]) == (1, 1)


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
def test_ranks_that_are_signalled_leave_in_time_and_are_gone_on_from(server: Server, tmp_path: Path) -> None:
    """One of two, then both; while they train, not after."""
    result = tmp_path / "found.json"
    server.run("ranks", row="signals", result=str(result), count=2, worlds=(2,), within=0.1, steps=48)
    found = json.loads(result.read_text())
    assert (found["count"], found["failures"], found["after the end of the run"]) == (2, {}, 0)


@pytest.mark.slow
def test_ranks_that_fail_leave_in_time_and_say_where(server: Server, tmp_path: Path) -> None:
    result = tmp_path / "found.json"
    server.run("ranks", row="faults", result=str(result), count=2)
    found = json.loads(result.read_text())
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
@pytest.mark.parametrize("background", [pytest.param(False, marks=pytest.mark.nightly), True])
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


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    """Row S of a quick run, whose file is put elsewhere, and what the files of full runs held before it."""
    before = [report.JSON.read_bytes(), report.PAGE.read_bytes()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "QUICK", tmp_path_factory.mktemp("build") / "new" / report.QUICK.name)
        assert run.main(["--quick", "S"]) == 0
        yield report.load(report.QUICK)["S"], before


def test_hostile_files_of_each_kind_run_nothing_and_stay_in_bounds(sample: tuple[dict[str, Any], Any]) -> None:
    found, _ = sample
    assert (found["failures"], found["executed"]) == ({}, 0)
    assert found["count"] > 500
    assert len(found["kinds"]) == 4
    assert min(found["kinds"].values()) >= 8


def test_a_quick_run_takes_no_full_rows_place(sample: tuple[dict[str, Any], list[bytes]]) -> None:
    found, before = sample
    assert found["about"]["sample"] is True
    assert [report.JSON.read_bytes(), report.PAGE.read_bytes()] == before
    assert not any(row["about"]["sample"] for row in report.load().values())


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_the_harness_sees_an_attempt_that_takes_too_long_or_too_much() -> None:
    def work() -> None:
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass

    seen = hostile.Attempts(seconds=0.1, megabytes=50)
    seen.of("some", "waits", lambda: time.sleep(0.2))  # what a busy machine does to an attempt
    seen.of("some", "small", lambda: len(b"x" * (5 << 20)))
    assert seen.failures == {}
    seen.of("some", "works", work)
    seen.of("some", "large", lambda: len(b"x" * (90 << 20)))
    seen.of("some", "small again", lambda: len(b"x" * (5 << 20)))
    assert list(seen.failures) == ["some: works", "some: large"]
    assert seen.failures["some: works"].endswith(" s of CPU time, more than 0.1")
    assert seen.failures["some: large"].endswith(" MB, more than 50")


def test_the_page_is_what_the_report_makes_of_the_results_and_names_tests_that_there_are() -> None:
    anew = "the page is another: write it by python -m reliability.report"
    assert report.PAGE.read_text(encoding="utf-8") == report.page(report.load()), anew
    assert list(report.SUITE) == list(report.ROWS)
    for row, (test, _) in report.SUITE.items():
        marks = getattr(globals()[test], "pytestmark", []) if test else []
        assert bool(test) == (row != "Cost")
        assert "nightly" not in {mark.name for mark in marks}, row


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
