"""A run that trackers are tried on, here or in a process that is killed: ``tracked.py LOGGER FOLDER NAME KILL_AT``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import loopwright as lw
from tiny import acts, line, pairs, sgd_task, trainer

DATA = pairs([1.0], [2.0], [3.0], [4.0])
STEPS = 12


def fit(loggers: Any, folder: Path | None, name: str = "digits", *, kill_at: int = 0, **settings: Any) -> lw.Run:
    """3 epochs of 4 steps with a record at each; checkpoints after steps 5 and 10; killed after step ``kill_at``."""
    checkpoint = False if folder is None else lw.Checkpoint("5 steps", at_end=False)
    user = trainer(epochs=3, log_every=1, loggers=loggers, folder=folder, name=name, checkpoint=checkpoint, **settings)

    def end(run: lw.Run) -> None:
        if run.progress.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    user.on(lw.Event.STEP_END)(end)
    return user.fit(sgd_task(line(), lr=0.1), DATA, pairs([1.0]), resume="auto" if folder is not None else None)


def failed(loggers: Any, folder: Path, name: str, at: int) -> None:
    """A run that an error ends after step ``at``: its loggers have closed, ahead of the last checkpoint."""

    def fail(run: lw.Run, result: Any) -> None:
        if run.progress.step == at:
            raise OSError("the power went off")

    with pytest.raises(OSError, match="the power went off"):
        fit(loggers, folder, name, callbacks=[acts(on_step_end=fail)])


def killed(logger: str, folder: Path, name: str, kill_at: int) -> None:
    """Run it in a process of its own that is killed with SIGKILL after step ``kill_at``."""
    arguments = [logger, str(folder), name, str(kill_at)]
    own = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}  # it would outlive the process
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *arguments], env=own, check=False,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr


def expected(run: lw.Run) -> dict[str, list[tuple[int, float]]]:
    """The points of each curve, from what the run itself remembers."""
    losses = run.history.losses["loss"].tolist()
    steps = run.history.steps
    return {
        "train/loss": [(i + 1, loss) for i, loss in enumerate(losses)],
        "epoch/train/loss": list(zip(steps, run.history["train/loss"], strict=True)),
        "valid/loss": list(zip(steps, run.history["valid/loss"], strict=True)),
    }


if __name__ == "__main__":
    fit(sys.argv[1], Path(sys.argv[2]), sys.argv[3], kill_at=int(sys.argv[4]))
