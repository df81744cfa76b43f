"""Signals during a fit; real processes are sent them in tests/test_reliability.py and by `make reliability`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

import loopwright as lw
from tiny import acts, line, pairs, sgd_task, trainer

DATA = pairs([1.0], [2.0], [3.0], [4.0])


def raises(number: int, after: int) -> Any:
    """A hook that sends a signal to this process at its call ``after``, counted from 1."""
    calls = iter(range(1, 10**6))

    def hook(run: lw.Run, *args: Any) -> None:
        if next(calls) == after:
            signal.raise_signal(number)

    return hook


def test_sigusr1_saves_and_leaves_with_138(folder: Path) -> None:
    user = trainer(epochs=9, folder=folder, name="x", loggers=[], callbacks=[acts(on_step_end=raises(10, 2))])
    with pytest.raises(SystemExit) as caught:
        user.fit(sgd_task(line()), DATA)
    assert caught.value.code == 138
    assert [path.name for path in folder.glob("x/*/checkpoints/step*")] == ["step-00000002"]


def test_a_sigusr1_that_has_a_handler_keeps_it_and_ignored_signals_stay_ignored() -> None:
    seen: list[int] = []
    old = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        callbacks = [acts(on_step_end=raises(signal.SIGUSR1, 2), on_grads_ready=raises(signal.SIGINT, 2))]
        run = trainer(epochs=1, callbacks=callbacks).fit(sgd_task(line()), DATA)
        assert seen == [signal.SIGUSR1]
        assert run.status == "done"
    finally:
        signal.signal(signal.SIGUSR1, old)
        signal.signal(signal.SIGINT, ignored)


@pytest.mark.parametrize("every", ["1 epoch", "2 steps", "3 steps"])
@pytest.mark.parametrize("at", [2, 5, 8, 11])
def test_a_validation_that_is_cut_short_is_made_again_and_nothing_is_recorded_twice(
    every: str, at: int, folder: Path
) -> None:
    class Keeps(lw.Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_validation_end(self, run: lw.Run, values: Any) -> None:
            self.seen.append((run.progress.step, values.get("valid/loss")))

        def state_dict(self) -> dict[str, Any]:
            return {"seen": [list(one) for one in self.seen if one[1] is not None]}

        def load_state_dict(self, state: Any) -> None:
            self.seen = [tuple(one) for one in state["seen"]]

    def fit(name: str, *more: lw.Callback, resume: str | None = None) -> tuple[lw.Run, list[Any]]:
        keeps, net = Keeps(), line()
        early = lw.EarlyStopping("valid/loss", patience=99, mode="min")
        user = trainer(epochs=2, folder=folder, name=name, validate_every=every, callbacks=[keeps, early, *more])
        run = user.fit(sgd_task(net, lr=0.1), DATA, pairs([1.0], [2.0], [3.0]), resume=resume)
        return run, keeps.seen

    alone, seen = fit("alone")
    if at > 3 * len(seen):
        pytest.skip("it has no such batch")
    with pytest.raises(SystemExit):
        fit("cut", acts(on_eval_batch_end=raises(signal.SIGTERM, at)))
    run, again = fit("cut", resume="auto")
    assert again == seen
    drop = {"seconds"}
    assert [{k: v for k, v in r.items() if k not in drop} for r in run.history] == [
        {k: v for k, v in r.items() if k not in drop} for r in alone.history
    ]


def test_a_hook_that_needs_values_does_not_cost_the_last_checkpoint(folder: Path) -> None:
    def wants(run: lw.Run, values: Any) -> None:
        values["valid/loss"]

    callbacks = [acts(on_validation_end=wants, on_eval_batch_end=raises(signal.SIGTERM, 1))]
    user = trainer(epochs=1, folder=folder, name="x", loggers=[], callbacks=callbacks)
    with pytest.warns(lw.LoopwrightWarning) as caught, pytest.raises(SystemExit):
        user.fit(sgd_task(line()), DATA, DATA)
    assert [str(w.message) for w in caught] == [
        "Acts.on_validation_end failed on a validation that SIGTERM cut short, where values is empty: "
        "KeyError('valid/loss'). Begin it with: if not values: return"
    ]
    assert len(list(folder.glob("x/*/checkpoints/step*"))) == 1


def test_a_signal_after_the_last_step_has_nothing_to_interrupt(folder: Path) -> None:
    task, user = sgd_task(line()), trainer(epochs=1, callbacks=[acts(on_fit_end=raises(signal.SIGTERM, 1))])
    with pytest.raises(SystemExit) as caught:
        user.fit(task, DATA)
    assert caught.value.code == 143
    assert task._run.status == "done"
