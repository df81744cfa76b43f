"""Resumed from a checkpoint of each of its steps, a run must end with the bits of the whole one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import loopwright as lw
from tiny import same


def ends_alike(fit: Callable[..., lw.Run], folder: Path) -> int:
    """``fit(resume, **settings)`` makes all anew, with a Trainer of ``settings``. Returns the number of steps tried."""
    whole = fit(None, folder=folder, progress=False, checkpoint=lw.Checkpoint("1 step", keep=99))
    assert whole.folder is not None
    paths = sorted((whole.folder / "checkpoints").glob("step-*"))
    for path in paths[:-1]:
        run = fit(path, folder=None, progress=False)
        assert run.resumed_from == path
        assert same(_state(run), _state(whole)), path.name
    return len(paths) - 1


def _state(run: lw.Run) -> Any:
    models = {name: model.state_dict() for name, model in run.models.items()}
    return models, {name: optimizer.state_dict() for name, optimizer in run.optimizers.items()}
