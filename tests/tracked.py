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

sys.path.append(str(Path(__file__).parents[1] / "examples" / "trackers"))  # plug-ins
DATA = pairs([1.0], [2.0], [3.0], [4.0])
STEPS = 12
CURVES = ("train/loss", "epoch/train/loss", "valid/loss", "epoch/train/error", "valid/error")


def fit(loggers: Any, folder: Path | None, name: str = "digits", *, kill_at: int = 0, **settings: Any) -> lw.Run:
    """3 epochs of 4 steps with a record at each; checkpoints after steps 5 and 10; killed after step ``kill_at``."""
    checkpoint = False if folder is None else lw.Checkpoint("5 steps", at_end=False)
    user = trainer(epochs=3, log_every=1, loggers=loggers, folder=folder, name=name, checkpoint=checkpoint, **settings)

    def end(run: lw.Run) -> None:
        if run.progress.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    user.on(lw.Event.STEP_END)(end)
    task = sgd_task(line(), lr=0.1, metrics={"error": lw.metrics.MAE()})
    return user.fit(task, DATA, pairs([1.0]), resume="auto" if folder is not None else None)


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


def plug_in(name: str) -> Any:
    """A logger of the examples by its name, made for working offline; any other name as it is."""
    if name == "comet":
        from comet_logger import CometLogger

        return [CometLogger(online=False)]
    if name == "neptune":
        from neptune_logger import NeptuneLogger

        return [NeptuneLogger("someone/digits", mode="offline")]
    if name == "visdom":
        from visdom_logger import VisdomLogger

        return [VisdomLogger(offline=True)]
    if name == "polyaxon":
        from polyaxon_logger import PolyaxonLogger

        return [PolyaxonLogger("someone", "digits", offline=True)]
    return name


def expected(run: lw.Run) -> dict[str, list[tuple[int, float]]]:
    """The points of each curve, from what the run itself remembers."""
    steps = {"train/loss": list(enumerate(run.history.losses["loss"].tolist(), 1))}
    history = {name: run.history[name.removeprefix("epoch/")] for name in CURVES[1:]}
    return steps | {name: list(zip(run.history.steps, told, strict=True)) for name, told in history.items()}


if __name__ == "__main__":
    fit(plug_in(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], kill_at=int(sys.argv[4]))
