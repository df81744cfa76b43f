"""Anneal: numbers on the task, or elsewhere, that follow schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from loopwright.schedules import cosine, linear, scaled, warmup
from tiny import acts, classifier, loader, seed_all, sgd_task, trainer


def dropout_task() -> lw.Supervised:
    return sgd_task(classifier(dropout=0.5), lr=0.1, loss=nn.CrossEntropyLoss())


def test_an_attribute_of_a_module_follows_its_schedule_bit_for_bit_as_by_hand() -> None:
    task, data = dropout_task(), list(loader(40, batch_size=8))
    seed_all()
    trainer(epochs=2, callbacks=[lw.Anneal({"module.2.p": linear(0.0, 0.5)})]).fit(task, data)

    net = classifier(dropout=0.5)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    seed_all()
    for k, (x, y) in enumerate(data * 2):
        net[2].p = 0.5 * k / 10
        sgd.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        sgd.step()
    assert all(map(torch.equal, task.module.state_dict().values(), net.state_dict().values()))


def test_a_tensor_is_filled_in_place_and_another_object_can_be_meant() -> None:
    task = dropout_task()
    task.register_buffer("alpha", held := torch.tensor(7.0))
    penalty = acts(map_loss=lambda run, loss, *_: loss)
    penalty.strength = 0  # type: ignore[attr-defined]
    seen: list[tuple[float, float]] = []
    look = acts(on_backward_end=lambda *_: seen.append((float(held), penalty.strength)))  # type: ignore[attr-defined]
    annealers = [lw.Anneal({"alpha": linear(4.0, 0.0)}), lw.Anneal({"strength": lambda f: f**2}, of=penalty)]
    stages = [lw.Stage("a", until="4 steps"), lw.Stage("b", until="2 steps")]
    trainer(callbacks=[*annealers, penalty, look]).fit(task, loader(40, batch_size=8), stages=stages)
    assert seen == [(4 - k, (k / 4) ** 2) for k in range(4)] + [(4.0, 0.0), (2.0, 0.25)]
    assert task.alpha is held


class Interrupted(Exception):  # noqa: N818
    pass


def test_resumed_at_any_step_it_goes_on_where_it_stood(tmp_path: Path) -> None:
    def fit(folder: Path, stop: int | None, resume: Any = None) -> lw.Run:
        def raise_at(run: lw.Run, path: Path) -> None:
            if run.progress.step == stop:
                raise Interrupted

        seed_all()
        callbacks = [lw.Anneal({"module.2.p": cosine(0.8, 0.1)}), acts(on_checkpoint=raise_at)]
        settings = {"progress": False, "checkpoint": lw.Checkpoint("1 step"), "callbacks": callbacks}
        return lw.Trainer(2, folder=folder, **settings).fit(
            dropout_task(), loader(40, batch_size=8, shuffle=True), resume=resume
        )

    whole = fit(tmp_path / "whole", None).models["model"].state_dict()
    for stop in range(1, 10):
        with pytest.raises(Interrupted):
            fit(tmp_path / str(stop), stop)
        ended = fit(tmp_path / str(stop), None, "auto").models["model"].state_dict()
        assert all(map(torch.equal, whole.values(), ended.values())), stop


def test_what_it_cannot_set_is_told_by_plan() -> None:
    def told(callback: lw.Callback, **settings: Any) -> str:
        plan = trainer(**{"epochs": 1, **settings}, callbacks=[callback]).plan(dropout_task(), loader(40, batch_size=8))
        (problem,) = plan.problems
        return problem

    assert told(lw.Anneal({"module.2.q": 0.5})) == "Anneal: module.2, a Dropout, has no 'q'. Known: 'p'."
    assert told(lw.Anneal({"modul.2.p": 0.5})) == (
        "Anneal: what the path begins at, a Supervised, has no 'modul'. Known: 'loss', 'module', 'optimizer'. "
        "Did you mean 'module'?"
    )
    assert told(lw.Anneal({"module.2": 0.5})) == ("Anneal: 'module.2' is a Dropout, no number. Known: none.")
    assert "'9 steps' is longer than the whole" in told(lw.Anneal({"module.2.p": warmup(0.5, "9 steps")}))
    assert told(lw.Anneal({"module.2.p": 0.5}), compile=True) == (
        "Anneal changes numbers which a compiled step has built in; train with compile=False"
    )
    with pytest.raises(lw.SettingError, match=r"^'p': scaled\(...\) is for the groups of an optimizer; leave it out"):
        lw.Anneal({"p": scaled(linear(0, 1))})
    with pytest.raises(lw.SettingError, match=r"^Anneal\('p'\): expected a dict such as"):
        lw.Anneal("p")  # type: ignore[arg-type]
