"""A process killed while it writes leaves the older checkpoint or the new one, whole."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from loopwright.checkpoint import list_checkpoints, newest, read, sweep

WRITER = """
import itertools, sys, torch
from pathlib import Path
from loopwright.checkpoint import delete, list_checkpoints, write

folder, name = Path(sys.argv[1]), sys.argv[2]
for n in itertools.count(1):
    tensors = {f"w{i}": torch.full((200_000,), float(n)) for i in range(10)}
    path = write(folder / name.format(n), {"model": tensors}, {"n": n, "optimizers": {"o": tensors}}, {"step": n})
    for old in list_checkpoints(folder)[:-1]:
        delete(old)
    print(n, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param("step-{:08d}", id="a new name each time"), pytest.param("last", id="replacing")],
)
@pytest.mark.nightly
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(name: str, tmp_path: Path) -> None:
    moments = random.Random(name)
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), name], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "1\n"
            time.sleep(moments.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            printed = [1, *map(int, process.stdout.read().split())]
        sweep(folder)
        left = list_checkpoints(folder)
        assert 1 <= len(left) <= 2
        assert sorted(folder.iterdir()) == sorted(left)  # no orphans
        for path in left:
            data = read(path)
            n = data.state["n"]
            assert data.info == {"step": n}
            for tensors in (data.files["model"], data.state["optimizers"]["o"]):
                assert all(torch.equal(t, torch.full((200_000,), float(n))) for t in tensors.values())
        last = newest(folder)
        assert last is not None
        assert read(last).state["n"] in (printed[-1], printed[-1] + 1)
