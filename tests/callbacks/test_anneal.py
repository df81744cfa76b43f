"""Anneal: numbers on the task, or elsewhere, that follow schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from anywhere import ends_alike
from loopwright.schedules import concat, constant, cosine, linear, scaled, warmup
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


def test_where_setting_does_more_it_is_set_as_by_hand() -> None:
    """A property and a ``__setattr__`` of one's own see every value; a plain number of a module is only there."""

    class Told(nn.Dropout):
        def __init__(self) -> None:
            super().__init__(0.5)
            self.seen: list[tuple[str, float]] = []

        @property
        def rate(self) -> float:
            return self.p

        @rate.setter
        def rate(self, value: float) -> None:
            self.seen.append(("rate", value))
            self.p = value

    class Strict(Told):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "p" and hasattr(self, "seen"):
                self.seen.append((name, value))
            super().__setattr__(name, value)

    for layer, name in ((Told(), "rate"), (Strict(), "p"), (Told(), "p")):
        net = nn.Sequential(layer, nn.Linear(5, 3))
        task = sgd_task(net, lr=0.1, loss=nn.CrossEntropyLoss())
        anneal = lw.Anneal({f"module.0.{name}": linear(0.0, 0.5)})
        trainer(epochs=1, callbacks=[anneal]).fit(task, loader(16, batch_size=8))
        plain = type(layer) is Told and name == "p"
        assert layer.seen == ([] if plain else [(name, 0.0), (name, 0.25)])
        assert layer.p == 0.25


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_alpha_of_a_mixture_follows_its_schedule(per_sample: bool) -> None:
    """0 mixes nothing; a small alpha leaves samples nearly whole, a large one makes halves."""
    mix = lw.MixUp(0.4, classes=3, per_sample=per_sample)
    shares: list[float] = []
    look = acts(map_batch=lambda run, batch: shares.append(float(batch[1].amax(1).mean())) or batch)
    anneal = lw.Anneal({"alpha": concat([0.0, 0.01, 500.0], ["10 steps", "60 steps"])}, of=mix)
    data = [(torch.randn(3, 5), torch.arange(3))] * 120
    trainer(epochs=1, callbacks=[anneal, mix, look], seed=1).fit(dropout_task(), data)
    none, small, large = shares[:10], shares[10:60], shares[60:]
    assert none == [1.0] * 10
    assert sum(small) / len(small) > 0.95
    assert sum(large) / len(large) < 0.75  # a half, and whole where a sample is its own partner
    below = acts(on_step_start=lambda run: setattr(mix, "alpha", -1.0))
    with pytest.raises(lw.SettingError, match="MixUp: alpha has become -1; expected 0"):
        trainer(epochs=1, callbacks=[below, mix]).fit(dropout_task(), data)


def test_the_decay_of_an_average_follows_its_schedule() -> None:
    ema, seen = lw.EMA(0.9), []
    weight = lambda run: run.task.module[0].weight.detach().clone()  # noqa: E731
    look = acts(on_step_end=lambda run, result: seen.append(weight(run)))
    anneal = lw.Anneal({"decay": linear(0.0, 1.0)}, of=ema)
    trainer(epochs=1, callbacks=[anneal, ema, look]).fit(dropout_task(), loader(40, batch_size=8))
    wanted = seen[0]
    for k, values in enumerate(seen[1:], 1):
        wanted = torch.lerp(values, wanted, k / 5)
    torch.testing.assert_close(ema.averages["model"].module[0].weight, wanted)


@pytest.mark.parametrize("kind", ["alpha", "decay"])
def test_with_what_it_moves_on_a_callback_a_resume_is_exact(kind: str, folder: Path) -> None:
    def fit(resume: Any, **settings: Any) -> lw.Run:
        seed_all()
        other = lw.MixUp(0.4, classes=3) if kind == "alpha" else lw.EMA(0.9, replace_at_end=True)
        callbacks = [lw.Anneal({kind: linear(0.1, 0.9)}, of=other), other]
        data = loader(40, batch_size=8, shuffle=True)
        return lw.Trainer(2, callbacks=callbacks, **settings).fit(dropout_task(), data, resume=resume)

    assert ends_alike(fit, folder) == 9


def test_resumed_at_any_step_it_goes_on_where_it_stood(folder: Path) -> None:
    def fit(resume: Any, **settings: Any) -> lw.Run:
        seed_all()
        anneal = lw.Anneal({"module.2.p": cosine(0.8, 0.1)})
        data = loader(40, batch_size=8, shuffle=True)
        return lw.Trainer(2, callbacks=[anneal], **settings).fit(dropout_task(), data, resume=resume)

    assert ends_alike(fit, folder) == 9


@pytest.mark.parametrize(
    ("path", "schedule", "of", "text"),
    [
        ("module.2.p", linear(0, 2), None, "1.0625 when 0.53125 of the stage is done; expected a number from 0 to 1"),
        ("module.2.p", lambda f: float("nan"), None, "nan when 0 of the stage is done; expected a number from 0 to 1"),
        ("alpha", linear(1, -1), lw.MixUp(classes=3), "-0.0625 when 0.53125 of the stage is done; expected 0 or more"),
        ("decay", constant(1.5), lw.EMA(), "1.5 when 0 of the stage is done; expected a number from 0 to 1"),
    ],
)
def test_values_that_a_number_cannot_have_are_told_by_plan(path: str, schedule: Any, of: Any, text: str) -> None:
    callbacks = [lw.Anneal({path: schedule}, of=of), *([of] if of else [])]
    (problem,) = trainer(epochs=1, callbacks=callbacks).plan(dropout_task(), loader(40, batch_size=8)).problems
    assert problem == f"Anneal of {path!r}, stage 'main': the schedule of {path!r} gives {text}"


def test_the_ends_of_what_a_number_may_be_are_allowed() -> None:
    ema = lw.EMA()
    callbacks = [lw.Anneal({"module.2.p": linear(1.0, 0.0)}), lw.Anneal({"decay": constant(1.0)}, of=ema), ema]
    assert trainer(epochs=1, callbacks=callbacks).plan(dropout_task(), loader(40, batch_size=8)).problems == []


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
    assert told(lw.Anneal({"decay": 0.5}, of=lw.EMA())) == (
        "Anneal(of=EMA) moves numbers of a callback that is not in this run; add that EMA to callbacks"
    )
    assert told(lw.Anneal({"module.2.p": 0.5}), compile=True) == (
        "Anneal changes numbers which a compiled step has built in; train with compile=False"
    )
    with pytest.raises(lw.SettingError, match=r"^'p': scaled\(...\) is for the groups of an optimizer; leave it out"):
        lw.Anneal({"p": scaled(linear(0, 1))})
    with pytest.raises(lw.SettingError, match=r"^Anneal\('p'\): expected a dict such as"):
        lw.Anneal("p")  # type: ignore[arg-type]


def test_a_number_that_two_schedules_move_is_refused() -> None:
    task = dropout_task()

    def problems(*callbacks: Any, stages: Any = None) -> list[str]:
        user = lw.Trainer(epochs=None if stages else 1, folder=None, progress=False, callbacks=list(callbacks))
        return user.plan(task, loader(8, batch_size=4), stages=stages).problems

    def one(path: str = "module.2.p") -> lw.Anneal:
        return lw.Anneal({path: linear(0.0, 0.5)})

    told = "two schedules of Anneal move 'module.2.p', and the last one would win; leave one of them out"
    (found,) = problems(one(), one())
    assert found == told
    assert problems(lw.Anneal({"2.p": 0.1}, of=task.module), one()) == [told]
    stages = [lw.Stage(name, "1 epoch", callbacks=[one()]) for name in "ab"]
    assert problems(stages=stages) == []
    assert set(problems(one(), stages=stages)) == {told}  # in each stage
