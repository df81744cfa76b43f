"""A small run with some callbacks, interrupted after each of its steps: it must end with the bits of the whole run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import loopwright as lw
from tiny import acts, bits, same, seed_all


class Killed(Exception):  # noqa: N818
    pass


def resumes_exactly(
    make: Callable[[], tuple[Any, Sequence[lw.Callback]]], train: Callable[[], Any], valid: Any = None, **settings: Any
) -> lw.Run:
    """Run task and callbacks of ``make`` whole, and again killed after each step and resumed; the whole run.

    Weights, optimizers, generators and what the callbacks remember must be the same to the bit.
    """

    def fit(name: str, seed: int, at: int = 0, resume: str | None = None) -> tuple[lw.Run, list[Any]]:
        seed_all(seed)
        task, callbacks = make()

        def kill(run: lw.Run, result: Any) -> None:
            if run.progress.step == at:
                raise Killed

        user = lw.Trainer(
            **{"epochs": 2, "progress": False, "capsule": False, "log_every": "3 steps"} | settings,
            name=name, checkpoint=lw.Checkpoint("1 step"), callbacks=[*callbacks, acts(on_step_end=kill)],
        )  # fmt: skip
        run = user.fit(task, train(), valid, resume=resume)
        state = bits(run.task, *run.optimizers.values())
        return run, [*state, [callback.state_dict() for callback in callbacks], run.history.losses["loss"].tolist()]

    whole, state = fit("whole", 3)
    for at in range(2, whole.progress.step + 1):  # before that there is no checkpoint
        with suppress(Killed):
            fit(f"killed-{at}", 3, at)
        run, again = fit(f"killed-{at}", 99, resume="auto")
        assert run.resumed_from is not None
        assert same(again, state), f"killed after step {at}"
    assert whole.folder is not None
    assert Path(whole.folder).is_dir()
    return whole
