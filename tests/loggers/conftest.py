from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loopwright.events import Hooks
from loopwright.parallel import Plain, Single
from loopwright.state import Progress, Run


class Second(Single):
    rank, world_size = 1, 2


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A run that no one drives: what a logger sees in ``start``."""

    def make(folder: Path | None = tmp_path, *, rank: int = 0, step: int = 0) -> Run:
        return Run(
            task=None,
            stages=[],
            models={},
            optimizers={},
            callbacks=[],
            hooks=Hooks(),
            comm=Second() if rank else Single(),
            precision=Plain(),
            device=torch.device("cpu"),
            folder=folder,
            progress=Progress(step=step),
        )

    return make
