"""A plan that may measure says what the whole run will take, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopwright as lw
from loopwright.cost import Cost
from tiny import bits, classifier, loader, same, samples


def task_of(net: nn.Module) -> lw.Supervised:
    return lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), 0.01))


def on_disk(run: lw.Run) -> list[int]:
    """Bytes of each checkpoint."""
    assert run.folder is not None
    folders = [path for path in (run.folder / "checkpoints").iterdir() if path.is_dir()]
    return [sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in folders]


class Clock:
    """Stands in for the time of the machine: it moves when the work says that it has taken time, and then alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed(nn.Module):
    """A batch of training takes 4 s, one of validation 1 s, the state for a checkpoint 16 s."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += 4.0 if self.training else 1.0
        return x

    def get_extra_state(self) -> Tensor:
        self.clock.now += 16.0
        return torch.zeros(1)

    def set_extra_state(self, state: Tensor) -> None:
        pass


class Waits:
    """Batches that take 8 s to begin with in each epoch, as workers that start do."""

    def __init__(self, clock: Clock, n: int) -> None:
        self.clock, self.batches = clock, [samples(4, seed=i) for i in range(n)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.clock.now += 8.0
        return iter(self.batches)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("loopwright.cost.perf_counter", made)
    return made


@pytest.mark.capability("GEN-04")
def test_the_cost_of_a_run_is_estimated_from_its_first_batches(folder: Path, clock: Clock) -> None:
    """The seconds that the run then takes, to the last one; its steps; its checkpoints within a twentieth."""
    net = nn.Sequential(Timed(clock), nn.Linear(5, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 3))
    task, data, valid = task_of(net), Waits(clock, 10), loader(64, batch_size=4)
    saver = lw.Checkpoint("3 epochs", keep=2)
    trainer = lw.Trainer(epochs=12, folder=folder, progress=False, checkpoint=saver, validate_every="4 epochs")

    before = bits(net, task.optimizer)
    cost = trainer.plan(task, data, valid, measure=5).cost
    assert same(bits(net, task.optimizer), before)
    assert not folder.exists()
    began = clock.now
    assert began < cost.seconds / 2  # it was not tried out whole
    run = trainer.fit(task, data, valid)
    assert cost.parts == {
        "starting": 0.0, "training": 120 * 4.0 + 12 * 8.0, "validation": 3 * 16 * 1.0, "checkpoints": 5 * 16.0,
    }  # fmt: skip
    assert cost.seconds == sum(cost.parts.values())
    assert cost.seconds == clock.now - began - 16.0  # a fit looks once whether its state can be saved
    assert cost.steps == run.progress.step == 120
    found = on_disk(run)
    assert len(found) == 2
    assert cost.checkpoint_bytes == pytest.approx(max(found), rel=0.05)
    assert cost.disk_bytes == 3 * cost.checkpoint_bytes  # one is written before another is deleted
    assert 4 * 4 * 300 * 300 < cost.memory_bytes < 1 << 36


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"epochs": 3}, 24), ({"epochs": 0.5}, 4), ({"steps": 100}, 100), ({"epochs": 3, "steps": 5}, 5),
        ({"epochs": 2, "accumulate": 3}, 6), ({"epochs": 50, "debug": lw.Debug(train=4)}, 200),
    ],
    ids=str,
)  # fmt: skip
def test_steps_are_those_of_the_run(settings: dict[str, Any], steps: int) -> None:
    trainer = lw.Trainer(folder=None, progress=False, **settings)
    task = task_of(classifier())
    assert trainer.plan(task, loader(37, batch_size=5), measure=4).cost.steps == steps
    assert trainer.fit(task, loader(37, batch_size=5)).progress.step == steps


def test_every_stage_is_measured_and_counted() -> None:
    task = task_of(classifier())
    stages = [lw.Stage("head", until="1 epoch", train="module.2.*"), lw.Stage("all", until="6 steps", accumulate=2)]
    plan = lw.Trainer(progress=False).plan(
        task, loader(37, batch_size=5), loader(10, batch_size=5), stages=stages, measure=3
    )
    assert plan.cost.steps == 8 + 6
    assert plan.facts[-1] == f"cost: {plan.cost}"
    assert str(plan.cost).startswith("14 steps in about ")


def test_a_time_limit_is_the_cost() -> None:
    cost = lw.Trainer(time="10 min", folder=None).plan(task_of(classifier()), samples(), measure=3).cost
    assert cost.parts["training"] == pytest.approx(600, rel=0.2)
    assert cost.checkpoint_bytes == cost.disk_bytes == 0


def test_a_run_that_goes_on_costs_what_is_left() -> None:
    task, data = task_of(classifier()), loader(37, batch_size=5)
    run = lw.Trainer(epochs=2, folder=None, progress=False).fit(task, data)
    after = bits(task)
    trainer = lw.Trainer(epochs=5, folder=None, progress=False)
    assert trainer.plan(task, data, measure=3).cost.steps == 24
    assert same(bits(task), after)
    assert trainer.fit(task, data).progress.step == run.progress.step + 24


def test_data_without_a_length_has_steps_only_where_they_are_said() -> None:
    def batches() -> Any:
        yield from ((x, y) for x, y in loader(37, batch_size=5))

    cost = lw.Trainer(epochs=2, folder=None).plan(task_of(classifier()), batches, measure=3).cost
    assert (cost.steps, cost.seconds) == (None, None)
    assert str(cost).startswith("how long it takes is not known, since its data has no length (")
    assert lw.Trainer(steps=9, folder=None).plan(task_of(classifier()), batches, measure=3).cost.steps == 9


def test_without_asking_nothing_is_measured_and_a_problem_is_told_first() -> None:
    assert lw.Trainer(epochs=2).plan(task_of(classifier()), samples()).cost is None
    plan = lw.Trainer(epochs=2).plan(task_of(classifier()), [], measure=3)
    assert plan.cost is None
    assert plan.problems


@pytest.mark.parametrize("measure", [-1, 2.5, True])
def test_what_is_no_number_of_batches_is_refused(measure: Any) -> None:
    with pytest.raises(lw.SettingError, match="measure="):
        lw.Trainer(epochs=2).plan(task_of(classifier()), samples(), measure=measure)


def test_what_is_not_known_is_left_out_of_the_text() -> None:
    assert str(Cost(2.5, 10, 0, 0, 0, {"training": 2.5})) == "10 steps in about 2.5 s (training 2.5 s); no checkpoints"
