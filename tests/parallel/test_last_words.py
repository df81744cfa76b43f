"""What comes after the last step is the affair of all ranks: one that fails there fails the run, one that is slow is
waited for.
"""

from __future__ import annotations

import json
import os
import signal
import time
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
