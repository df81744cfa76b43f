"""An exception in any hook keeps its type, is noted once with its place, and leaves the rest closed and usable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import loopwright as lw
from loopwright.events import HOOKS
from tiny import acts, line, pairs, recorder, sgd_task, trainer

DATA = pairs([1.0], [2.0], [3.0])
AFTERWARDS = {hook for hook in HOOKS if hook.startswith(("on_test", "on_predict"))}
IN_FIT = [hook for hook in HOOKS if hook not in AFTERWARDS | {"on_exception"}]


class UsersError(Exception):
    pass


def fails(*hooks: str) -> lw.Callback:
    def fail(run: lw.Run, *args: Any) -> Any:
        raise UsersError("mine")

    return acts(**dict.fromkeys(hooks, fail))


class Closes:
    def __init__(self) -> None:
        self.closed: list[str] = []

    def log(self, progress: Any, values: Any, kind: str) -> None: ...

    def close(self, status: str) -> None:
        self.closed.append(status)


@pytest.mark.parametrize("also_on_exception", [False, True])
@pytest.mark.parametrize("hook", IN_FIT)
def test_a_hook_that_fails_in_a_fit(hook: str, also_on_exception: bool, folder: Path) -> None:
    seen: list[str] = []
    logger, net = Closes(), line()
    task, bad = sgd_task(net), fails(hook, *(["on_exception"] if also_on_exception else []))

    def fit(*callbacks: lw.Callback, epochs: int) -> lw.Run:
        checkpoint = lw.Checkpoint("1 step")
        user = trainer(epochs=epochs, callbacks=callbacks, loggers=[logger], folder=folder, checkpoint=checkpoint)
        return user.fit(task, DATA, DATA)

    for epochs in (2, 3):  # the second time it goes on from where the first one stands
        seen.clear()
        with pytest.raises(UsersError) as caught:
            fit(bad, recorder(seen), epochs=epochs)
        assert (type(caught.value), str(caught.value)) == (UsersError, "mine")
        notes = [note for note in caught.value.__notes__ if f"in Acts.{hook}, " in note]
        assert len(notes) == 1
        assert seen[-1] == "on_exception"  # of the callback after it, too
        again = "Acts.on_exception failed as well: UsersError('mine')"
        twice = [note for note in caught.value.__notes__ if again in note]
        assert len(twice) == also_on_exception
        assert logger.closed[-1] == "failed"
        assert task._run.status == "failed"
    run = fit(epochs=4)
    assert run.status == "done"
    assert run.progress.epoch == 4


@pytest.mark.parametrize("hook", sorted(AFTERWARDS))
def test_a_hook_that_fails_in_a_test_or_a_prediction(hook: str) -> None:
    task, user = sgd_task(line()), trainer(epochs=1, callbacks=[fails(hook)])
    verb = user.test if "test" in hook else user.predict
    for _ in range(2):
        with pytest.raises(UsersError) as caught:
            verb(task, DATA)
        assert len([note for note in caught.value.__notes__ if f"in Acts.{hook}, " in note]) == 1
    assert task.training
