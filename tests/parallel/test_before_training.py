"""Ranks that do not come to train: what has started them ends the others in time, and where nobody does they say whom
they miss.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import loopwright as lw
from loopwright.parallel import World, find_world, join

SCRIPT = """
import os
import torch
from torch import nn
import loopwright as lw
if os.environ["RANK"] == "{rank}":
    {does}
net, x = nn.Linear(4, 2), torch.randn(32, 4)
task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
lw.Trainer(epochs=1, folder=None, progress=False).fit(task, (x, (x.sum(1) > 0).long()))
"""
PROMISE = 30.0


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.mark.slow
@pytest.mark.capability("B-25")
@pytest.mark.parametrize(
    ("rank", "does", "told"),
    [
        (0, "raise ValueError('no such data')", "ValueError: no such data"),
        pytest.param(1, "os.kill(os.getpid(), 9)", "Signal 9 (SIGKILL)", marks=pytest.mark.nightly),
    ],
)
def test_torchrun_ends_those_that_wait_for_one_that_fails_before_it_trains(
    rank: int, does: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(SCRIPT.format(rank=rank, does=does))
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "loopwright", "launch", "--nproc", "2", "--", "train.py"], cwd=tmp_path,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert time.monotonic() - began < PROMISE
    assert told in done.stderr
    assert f"(local_rank: {rank})" in done.stderr  # the first that failed, as torchrun tells it


@pytest.mark.slow
@pytest.mark.capability("B-25")
@pytest.mark.parametrize("rank", [0, 1])
def test_launch_ends_those_that_wait_for_one_that_fails_before_it_trains(rank: int) -> None:
    def one_raises() -> None:
        if os.environ["RANK"] == str(rank):
            raise ValueError("no such data")
        join(find_world(), "cpu")

    def one_dies() -> None:
        if os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), 9)
        join(find_world(), "cpu")

    began = time.monotonic()
    with pytest.raises(ValueError, match="no such data") as caught:
        lw.launch(one_raises, 2)
    assert caught.value.__notes__[0].startswith(f"[loopwright] raised in rank {rank} of 2:")
    with pytest.raises(lw.LoopwrightError, match=f"rank {rank} of 2 was killed by SIGKILL"):
        lw.launch(one_dies, 2)
    assert time.monotonic() - began < PROMISE


def test_where_nobody_ends_it_a_rank_says_whom_it_has_waited_for(port: int) -> None:
    world = World(0, 0, 4, 4, 1, "torchrun", "127.0.0.1", port)
    with (
        pytest.warns(lw.LoopwrightWarning, match=r"^rank 0 has waited 1 s for ranks 1, 2, 3 of 4 to come to train$"),
        pytest.raises(lw.LoopwrightError) as caught,
    ):
        join(world, "cpu", timeout_s=2)
    assert str(caught.value) == (
        "ranks 1, 2, 3 of 4 did not come to train within 2 s. Look at what it has printed. torchrun, lw.launch and "
        "mpirun end all ranks when one fails; with SLURM, type `srun --kill-on-bad-exit=1 python train.py`"
    )


@pytest.mark.slow
def test_a_rank_that_does_not_reach_rank_0_says_where_it_looked(port: int) -> None:
    with pytest.raises(
        lw.LoopwrightError,
        match=rf"^rank 1 of 2 has waited \d+ s to train, and does not reach rank 0 at 127.0.0.1:{port}: ",
    ):
        join(World(1, 1, 2, 2, 1, "torchrun", "127.0.0.1", port), "cpu", timeout_s=2)


@pytest.mark.slow
def test_one_that_comes_late_is_waited_for() -> None:
    def late() -> Any:
        if os.environ["RANK"] == "1":
            time.sleep(3)
        join(find_world(), "cpu", timeout_s=60)
        return True

    assert lw.launch(late, 2) == [True, True]
