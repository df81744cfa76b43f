"""What comes after the last step is the affair of all ranks: one that fails there fails the run, one that is slow is
waited for.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn

import loopwright as lw
from loopwright.parallel import find_world, join
from loopwright.parallel.watch import Watch

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


class Last(lw.Callback):
    """Does something at the very end, on one rank only."""

    def __init__(self, rank: int, what: str) -> None:
        self.rank, self.what = rank, what

    def on_fit_end(self, run: lw.Run) -> None:
        if run.comm.rank == self.rank and self.what == "raise":
            raise ValueError("no space for the report")
        if run.comm.rank == self.rank and self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if run.comm.rank == self.rank and self.what == "slow":
            time.sleep(4)


def fit(rank: int, what: str, folder: Path) -> Any:
    net = nn.Linear(4, 2)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    trainer = lw.Trainer(
        epochs=1, folder=folder, name="run", progress=False, callbacks=[Last(rank, what)], strategy=lw.DDP(timeout=2)
    )
    mine = os.environ["RANK"]
    try:
        run = trainer.fit(task, lw.Loader((X, Y), 8))
    except lw.LoopwrightError as error:
        (folder / f"told-{mine}").write_text(str(error))
        raise
    return run.status, time.monotonic()


def record(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "run").glob("*/run.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.slow
@pytest.mark.capability("B-25")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_after_training_fails_the_run_on_all_and_is_named(rank: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no space for the report"):  # the cause, and not what the other makes of it
        lw.launch(fit, 2, rank, "raise", tmp_path)
    assert record(tmp_path)["status"] == "failed"
    told = (tmp_path / f"told-{1 - rank}").read_text()
    place = Path(__file__).name
    assert told.startswith(f"rank {rank} failed at step 4, ")
    assert f"{place}:" in told
    assert told.endswith("in on_fit_end: ValueError: no space for the report")


@pytest.mark.slow
@pytest.mark.capability("B-25")
def test_a_rank_that_dies_after_training_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(lw.LoopwrightError, match="rank 1 of 2 was killed by SIGKILL"):
        lw.launch(fit, 2, 1, "kill", tmp_path)
    assert record(tmp_path)["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_rank_that_is_slow_after_training_is_waited_for_and_alarms_nobody(
    rank: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """For twice the time-out of the watch; all come out of the fit together."""
    (first, at), (second, then) = lw.launch(fit, 2, rank, "slow", tmp_path)
    assert (first, second, record(tmp_path)["status"]) == ("done", "done", "done")
    assert abs(at - then) < 2
    assert "[loopwright]" not in capfd.readouterr().err


@pytest.mark.slow
def test_many_runs_end_whenever_the_watch_looks() -> None:
    """The thread that judges looks in the very moment in which all have left, sooner or later: it must not end them."""

    def often() -> int:
        step = [0]
        join(find_world(), "cpu")
        for _ in range(15):
            with Watch(dist.get_rank(), 2, lambda: step[0], timeout=0.06):  # it looks every 2 ms
                step[0] += 1
        return step[0]

    assert lw.launch(often, 2) == [15, 15]


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loopwright")]


def soon(seconds: float, call: Any, *args: object) -> None:
    timer = threading.Timer(seconds, call, args)
    timer.daemon = True
    timer.start()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupt_of_a_rank_that_waits_for_the_others_ends_them_all_and_leaves_nothing(
    rank: int, tmp_path: Path
) -> None:
    """The other one is told while it still works."""
    left = tmp_path / "left"

    def waits() -> Any:
        join(find_world(), "cpu")
        mine, told = dist.get_rank(), ""
        soon(20, os._exit, 9)  # else it could wait for ever
        try:
            with Watch(mine, 2, lambda: 7, timeout=60):
                if mine == rank:
                    soon(0.3, os.kill, os.getpid(), signal.SIGINT)
                else:
                    while not left.exists():
                        time.sleep(0.01)
        except (KeyboardInterrupt, lw.LoopwrightError) as error:
            told = f"{type(error).__name__}: {error}"
        found = told, ours(), faulthandler.is_enabled()
        left.touch()
        return found

    faulthandler.disable()  # of pytest
    try:
        found = lw.launch(waits, 2)
    finally:
        faulthandler.enable()
    assert found[rank] == ("KeyboardInterrupt: ", [], False)
    told, *nothing = found[1 - rank]
    assert nothing == [[], False]
    assert told.startswith(f"FailedElsewhereError: rank {rank} failed at step 7, ")
    assert told.endswith(": KeyboardInterrupt")


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "telling"), [(0, [1, 2]), (1, [0])])
def test_whoever_waits_for_long_says_once_for_whom(
    rank: int, telling: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 for all; the others for rank 0, of which alone they know."""
    monkeypatch.setattr("loopwright.parallel.watch._TELL_S", 0.5)

    def one_is_slow() -> list[str]:
        join(find_world(), "cpu")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with Watch(dist.get_rank(), 3, lambda: 7, timeout=6):
                time.sleep(2 if dist.get_rank() == rank else 0)
        return [str(one.message) for one in told]

    found = lw.launch(one_is_slow, 3)
    assert [mine for mine in range(3) if found[mine]] == telling
    for mine in telling:
        (text,) = found[mine]
        assert text.startswith(f"rank {mine} of 3 is through, and has waited ")
        assert f" s for rank {rank} (step 7, test_last_words.py:" in text.replace(
            str(Path(__file__).parent) + os.sep, ""
        )
        assert text.endswith("). To end the run, press Ctrl-C twice")


@pytest.mark.slow
def test_a_failure_in_a_fit_inside_of_a_fit_is_that_of_the_rank_that_failed() -> None:
    """Also where that one needs longer to come out than the others, which have only heard of it."""

    def inside() -> Any:
        join(find_world(), "cpu")
        rank = dist.get_rank()
        try:
            with Watch(rank, 2, lambda: 7):
                try:
                    with Watch(rank, 2, lambda: 3):
                        if rank == 1:
                            raise ValueError("mine")
                finally:
                    time.sleep(1.5 * rank)  # closes a file
        except (ValueError, lw.LoopwrightError) as error:
            return type(error).__name__, getattr(error, "__notes__", [])

    (heard, notes), cause = lw.launch(inside, 2)
    assert cause == ("ValueError", [])  # it was caused by nobody else
    assert (heard, len(notes)) == ("FailedElsewhereError", 1)
    assert notes[0].startswith("[loopwright] rank 1 failed at step 7, ")


@pytest.mark.slow
def test_a_rank_whose_reports_end_for_whatever_reason_comes_to_an_end() -> None:
    def odd() -> str:
        join(find_world(), "cpu")
        soon(20, os._exit, 9)  # else it could wait for ever

        def step() -> int:
            if dist.get_rank() == 1 and threading.current_thread().name == "loopwright report":
                raise KeyError("step")
            return 7

        try:
            with Watch(dist.get_rank(), 2, step, timeout=6):
                pass
        except lw.LoopwrightError as error:
            return str(error)
        return ""

    zero, one = lw.launch(odd, 2)
    assert one.startswith("rank 0 cannot be reached (KeyError: 'step')")
    assert zero.startswith("rank 1 ended without a word")
