"""Anneal: numbers on the task, or elsewhere, that follow schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from anywhere import ends_alike
from loopwright.schedules import concat, cosine, linear, scaled, warmup
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
    alpha = lw.Anneal({"alpha": concat([4.0, 0.0], ["2 steps"])})
    strength = lw.Anneal({"strength": lambda f: f**2}, of=penalty)
    stages = [lw.Stage("a", until="4 steps"), lw.Stage("b", until="2 steps")]
    trainer(callbacks=[alpha, strength, penalty, look]).fit(task, loader(40, batch_size=8), stages=stages)
    assert seen == [(4.0 if k < 2 else 0.0, (k / 4) ** 2) for k in range(4)] + [(4.0, 0.0), (4.0, 0.25)]
    assert task.alpha is held


def test_resumed_at_any_step_it_goes_on_where_it_stood(folder: Path) -> None:
    def fit(resume: Any, **settings: Any) -> lw.Run:
        seed_all()
        anneal = lw.Anneal({"module.2.p": cosine(0.8, 0.1)})
        data = loader(40, batch_size=8, shuffle=True)
        return lw.Trainer(2, callbacks=[anneal], **settings).fit(dropout_task(), data, resume=resume)

    assert ends_alike(fit, folder) == 9


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
