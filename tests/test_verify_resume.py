"""verify_resume: exact runs are found exact, and what a resume leaves out is found by name."""

from __future__ import annotations

import inspect
import itertools
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import loopwright as lw
from loopwright.verifying import _Cut, _differences
from tiny import Noisy, acts, bits, classifier, loader, same, samples


def task_of(net: nn.Module | None = None, **settings: Any) -> lw.Supervised:
    net = classifier(dropout=0.3, batch_norm=True) if net is None else net
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    return lw.Supervised(net, nn.CrossEntropyLoss(), optimizer, metrics={"accuracy": lw.metrics.Accuracy()}, **settings)


def plain() -> Any:
    return task_of(), lw.Loader(samples(37), 8, shuffle=True)


def augmented(workers: int) -> Any:
    return lambda: (task_of(), loader(38, noisy=True, batch_size=4, shuffle=True, num_workers=workers), samples(9))


def staged() -> Any:
    stages = [lw.Stage("head", until="4 steps", train="module.4.*"), lw.Stage("all", until="2 epochs", accumulate=2)]
    return {"task": task_of(), "train": lw.Loader(Noisy(38), 4, shuffle=True), "stages": stages}


def plateau() -> Any:
    task = task_of(schedule=lambda adam: ReduceLROnPlateau(adam, patience=0, threshold=0.5))
    return task, samples(160), samples(9)


def function() -> Any:
    net = classifier(dropout=0.3)
    sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)

    def step(run: lw.Run, batch: Any) -> Tensor:
        loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        return loss.detach()

    return {"step": step, "data": lw.Loader(samples(37), 8, shuffle=True), "state": {"net": net, "sgd": sgd}}


EXACT: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (plain, {"epochs": 3}),
    "augmentation, no worker, inside of windows": (augmented(0), {"epochs": 4, "accumulate": 3}),
    "augmentation, 2 workers": (augmented(2), {"epochs": 2, "validate_every": "3 steps"}),
    "stages": (staged, {}),
    "plateau": (plateau, {"epochs": 4, "precision": "bf16-true"}),
    "a function": (function, {"epochs": 3}),
    "averages and mixed batches": (plain, {"epochs": 3, "callbacks": [lw.EMA(0.9), lw.MixUp(classes=3)]}),
}
STOPS = {"plateau": (3, 5, 9), "augmentation, 2 workers": (1, 6, 9)}  # a validation follows


@pytest.mark.capability("B-01")
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_anybody_can_prove_that_their_own_run_resumes_exactly(name: str) -> None:
    """verify_resume stops a user's run inside of windows and validations, goes on, and compares all of it by bits."""
    make, settings = EXACT[name]
    found = lw.verify_resume(make, lw.Trainer(**settings), steps=11, stop=STOPS.get(name))
    assert isinstance(found, lw.Verified)
    assert found.differences == found.unsteady == []
    assert found.exact
    assert (found.steps, found.stopped) == (11, STOPS.get(name, (1, 5, 10)))
    assert str(found).endswith(" and gone on with: the same bits")


@pytest.mark.capability("B-01")
def test_a_run_is_stopped_inside_of_a_window_or_a_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[str] = []
    monkeypatch.setattr(_Cut, "__init__", lambda self: raised.append(inspect.stack()[2].function))
    lw.verify_resume(plateau, lw.Trainer(epochs=4, accumulate=2), steps=6, stop=[1, 2])
    assert raised == ["on_backward_end", "on_eval_batch_end"]  # an epoch has 2 steps


class Forgetful(lw.Callback):
    """Has a memory that no checkpoint holds: neither a plain value nor of a class of the user's."""

    def __init__(self) -> None:
        self.count = itertools.count(1)

    def map_loss(self, run: lw.Run, loss: Tensor, *_: Any) -> Tensor:
        return loss / next(self.count)


class Drifting(nn.Module):
    """Counts in an attribute that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = classifier(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return self.net(x + 0.01 * self.calls)  # type: ignore[no-any-return]


def test_what_no_checkpoint_holds_is_found_by_name() -> None:
    trainer = lw.Trainer(epochs=3, callbacks=[Forgetful()])
    found = lw.verify_resume(plain, trainer, steps=6, stop=[2, 3])
    assert not found.exact
    assert [text.partition(" differs")[0] for text in found.differences] == [
        "after step 2: weights/model/0.weight", "after step 3: weights/model/0.weight",
    ]  # fmt: skip
    assert "differs in 40 of 40 elements, by up to " in found.differences[0]
    assert str(found).startswith(
        "6 steps, stopped after 2, 3 and gone on with: not the same\n  - after step 2: weights"
    )
    assert next(trainer.callbacks[0].count) == 1  # a copy took part


def test_a_module_that_counts_in_an_attribute_goes_on_counting() -> None:
    found = lw.verify_resume(lambda: (task_of(Drifting()), samples(40)), lw.Trainer(epochs=9), steps=4)
    assert found.exact
    assert len(found.stopped) == 3


class Hides(nn.Module):
    """Draws from generators that nobody else knows: of Python, NumPy and torch, one of them in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.torch, self.python = classifier(), torch.Generator().manual_seed(1), random.Random(1)
        self.others = [np.random.default_rng(1), np.random.RandomState(1)]

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=self.torch) + self.python.random()
        return self.net(x + noise + sum(float(other.normal()) for other in self.others))  # type: ignore[no-any-return]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_generators_that_hang_on_a_module_go_on_where_they_were(accumulate: int) -> None:
    def make() -> Any:
        return task_of(Hides()), lw.Loader(samples(37), 8, shuffle=True), samples(9)

    found = lw.verify_resume(make, lw.Trainer(epochs=3, accumulate=accumulate), steps=6)
    assert found.exact, str(found)


def test_generators_of_the_task_itself_and_of_its_loss_go_on_as_well() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rng = torch.Generator().manual_seed(2)

        def forward(self, preds: Tensor, target: Tensor) -> Tensor:
            return nn.functional.cross_entropy(preds + torch.rand(preds.shape, generator=self.rng), target)

    class Own(lw.Supervised):
        def training_step(self, batch: Any, carry: Any = None) -> Any:
            return super().training_step([batch[0] * self.scale.random(), batch[1]])

    def make() -> Any:
        net = classifier()
        task = Own(net, Noise(), torch.optim.Adam(net.parameters(), 0.01))
        task.scale = random.Random(3)
        return task, samples(40)

    found = lw.verify_resume(make, lw.Trainer(epochs=9), steps=4)
    assert found.exact, str(found)


def test_a_run_that_refuses_to_be_resumed_is_told_with_its_reasons() -> None:
    found = lw.verify_resume(plain, lw.Trainer(epochs=3, time="1 hour"), steps=4, stop=[2])
    (told,) = found.differences
    assert told.startswith("after step 2 it was refused: ")
    assert "its length is bounded by time" in told


def test_what_differs_without_a_stop_is_told_apart() -> None:
    class Rate(lw.Callback):
        def on_step_end(self, run: lw.Run, result: Any) -> None:
            run.log({"rate": float(np.frombuffer(os.urandom(4), np.uint32)[0])})

    found = lw.verify_resume(plain, lw.Trainer(epochs=3, callbacks=[Rate()]), steps=6)
    assert found.exact
    assert found.unsteady
    assert all(name.startswith(("metrics/", "history/", "log/")) and name.endswith("rate") for name in found.unsteady)
    assert "  not compared: metrics/train/rate" in str(found).splitlines()

    def unseeded() -> Any:
        net = nn.Linear(5, 3)
        nn.init.constant_(net.weight, int.from_bytes(os.urandom(2), "big") / 2**16)
        return task_of(net), samples(40)

    found = lw.verify_resume(unseeded, lw.Trainer(epochs=3), steps=4)
    assert not found.exact
    assert found.differences[0].startswith(
        "two runs of which none was stopped differ: weights/model/weight differs in "
    )


@pytest.mark.filterwarnings("error:this very run")  # which the suite leaves out elsewhere
def test_its_own_runs_are_not_told_that_they_repeat_one_another() -> None:
    assert lw.verify_resume(plain, lw.Trainer(epochs=3, seed=1), steps=4, stop=[2]).exact


def test_nothing_is_left_behind() -> None:
    seen: list[int] = []
    trainer = lw.Trainer(epochs=3, callbacks=[acts(on_step_end=lambda run, _: seen.append(1))], name="mine")
    before = bits()
    lw.verify_resume(plain, trainer, steps=4, stop=[2])
    assert same(bits(), before)
    assert list(Path().iterdir()) == []
    assert len(seen) == 4 + 4 + 2 + 2


@pytest.mark.parametrize(
    ("make", "settings", "stop", "says"),
    [
        (lambda: task_of(), {}, None, "make() returned Supervised; expected (task, train) or (task, train, valid)"),
        (plain, {}, [12], "stop=[12]: expected steps from 1 to 11, of a run of 12"),
        (plain, {"debug": lw.Debug(dev_run=2)}, None, "Debug(dev_run=...) leaves nothing behind that could be gone on "
         "with; leave it out"),
    ],
)  # fmt: skip
def test_what_cannot_be_verified_is_refused(make: Any, settings: Mapping[str, Any], stop: Any, says: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        lw.verify_resume(make, lw.Trainer(epochs=3, **settings), stop=stop)
    assert str(caught.value) == says


def test_differences_are_of_bits() -> None:
    zero, nan = torch.zeros(2), torch.full((2,), torch.nan)
    assert _differences({"a": nan, "b": 1}, {"a": nan.clone(), "b": 1}) == {}
    assert _differences({"a": zero}, {"a": -zero}) == {"a": "a differs in 0 of 2 elements, by up to 0"}
    assert _differences({"a": zero, "b": 1}, {"a": zero.double()}) == {
        "a": "a should be float32[2] and is float64[2]", "b": "b is only in one of the runs",
    }  # fmt: skip
    assert _differences({"a": 1}, {"a": 1.0}) == {"a": "a should be 1 and is 1.0"}


@pytest.mark.parametrize("steps", [0, -3, 1, True, 2.5, None])
def test_a_number_of_steps_that_leaves_nothing_to_stop_is_refused(steps: Any) -> None:
    with pytest.raises(lw.SettingError) as caught:
        lw.verify_resume(plain, lw.Trainer(epochs=1), steps=steps)
    assert str(caught.value) == f"steps={steps!r}: expected a whole number of steps from 2, to stop after one of them"
