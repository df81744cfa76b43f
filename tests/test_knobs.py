"""Every knob of a run stands in its config.yaml as it came out; what cannot come to anything is told."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import loopwright as lw
from loopwright.errors import LoopwrightWarning
from tiny import classifier, samples

X, Y = samples(24)
SHARPNESS = 3.0  # a knob that a step reads, and that nobody passes
LOUD, FAR = 7, 0.75  # knobs that a handler and a metric read
UNREAD = 4.0


def far(preds: Any, target: Any) -> Any:
    return (preds > FAR).float().mean()


def sharpened(preds: Any) -> Any:
    return preds * SHARPNESS


class Digits(lw.Task):
    """With knobs in its arguments, its body, its constructor, and in the module."""

    truncate = None
    recorded = {"margin": "epoch"}  # noqa: RUF012
    rate = 0.05
    layers = (8, 3)

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.depth = depth
        self.warm = 0.25
        self.net = classifier()

    def configure_metrics(self) -> Any:
        return {"far": lw.metrics.Function(far, "margin", "loss")}

    def training_step(self, batch: Any) -> Any:
        preds = sharpened(self.net(batch[0]))
        return {"loss": nn.functional.cross_entropy(preds, batch[1]), "margin": preds.max()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.rate)


def epoch(run: lw.Run, stage: lw.Stage) -> None:
    lw.loop.train_epoch(run, stage)


class Own(lw.DataModule):
    def __init__(self, batch_size: int, scale: float = 2.0) -> None:
        self.batch_size, self.x = batch_size, X * scale

    def train_data(self) -> Any:
        return lw.Loader((self.x, Y), self.batch_size, shuffle=True)

    def valid_data(self) -> Any:
        return lw.Loader((X, Y), 12)


@pytest.mark.capability("GEN-06")
def test_what_handlers_stages_bodies_and_modules_say_stands_in_the_file_and_auto_is_resolved() -> None:
    """config.yaml lists handlers, loops of stages, what classes and modules set, data modules, what auto came to."""
    trainer = lw.Trainer(progress=False)

    @trainer.on(lw.Event.EPOCH_END(every=2) | lw.Event.FIT_END, "text", level=3)
    def look(run: lw.Run, words: str, level: int) -> None:
        assert (words, level) == ("text", 3)
        assert level < LOUD

    stages = [lw.Stage("a", "1 epoch", loop=epoch), lw.Stage("b", "1 epoch", accumulate=[(0, 1), (2, 3)])]
    run = trainer.fit(Digits(5), Own(8), stages=stages)
    assert run.folder is not None
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert config == run.config
    assert config["handlers"] == [{
        "function": f"<{__name__}.{look.__qualname__}>", "event": "EPOCH_END(every=2) | FIT_END", "args": ["text"],
        "kwargs": {"level": 3},
    }]  # fmt: skip
    assert config["task"] == {
        "class": f"<{__name__}.Digits>", "depth": 5, "truncate": None, "recorded": {"margin": "epoch"}, "rate": 0.05,
        "layers": [8, 3], "attributes": {"warm": 0.25},
    }  # fmt: skip
    assert config["reads"] == {f"{__name__}.{name}": globals()[name] for name in ("SHARPNESS", "LOUD", "FAR")}
    told = config["stages"]
    assert (told["a"]["loop"], told["b"]["loop"]) == (f"<{__name__}.epoch>", None)
    assert told["a"]["phases"]["main"]["step"] == f"<{__name__}.Digits.training_step>"
    assert told["b"]["accumulate"] == "[(0, 1), (2, 3)]"
    assert config["data_module"] == {
        "class": f"<{__name__}.Own>",
        "batch_size": 8,
        "scale": "<not kept as an attribute>",
    }
    # as they came out: all of these were left to the Trainer
    assert [config[name] for name in ("device", "devices", "nodes", "strategy")] == ["cpu", 1, 1, "single"]
    assert config["checkpoint"]["every"] == "5 min"
    assert config["key"] == torch.initial_seed()
    assert config["torch"] == {
        "default_dtype": "torch.float32", "float32_matmul_precision": "highest", "cudnn_benchmark": False, "threads": 1,
    }  # fmt: skip
    assert "auto" not in re.split(r"\W+", (run.folder / "config.yaml").read_text())


SEVERAL = """
import torch
import loopwright as lw

net = torch.nn.Linear(5, 3)
task = lw.Supervised(net, torch.nn.CrossEntropyLoss(), lambda params: torch.optim.SGD(params, 0.1))
x, y = torch.randn(24, 5), torch.randint(3, (24,))
lw.Trainer(1, progress=False, name="a").fit(task, lw.Loader((x, y), 8))
"""


@pytest.mark.slow
def test_on_several_ranks_auto_has_come_to_a_strategy() -> None:
    Path("train.py").write_text(SEVERAL)
    command = [sys.executable, "-m", "loopwright", "launch", "--nproc", "2", "--", "train.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder,) = Path("runs/a").iterdir()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["devices"], config["nodes"]) == (2, 1)
    assert config["strategy"]["class"] == "<loopwright.parallel.ddp.DDP>"


# ------------------------------------------------------------------------------------------ what comes to nothing


def told(trainer: lw.Trainer, valid: Any = None, **how: Any) -> list[str]:
    """What a plan of 3 steps an epoch warns of."""
    net = classifier()
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    plan = trainer.plan(task, lw.Loader((X, Y), 8), valid, **how)
    return [plan.with_place(one) for one in plan.warnings]


E = lw.Event
NEVER: list[tuple[Any, str | None]] = [
    (E.EPOCH_END(every=5), "this run has 4 epochs, and it asks for 5"),
    (E.EPOCH_END(every=4), None),
    (E.EPOCH_END(once=7), "this run has 4 epochs, and it asks for 7"),
    (E.EPOCH_START(after=4), "this run has 4 epochs, and it asks for 5"),
    (E.EPOCH_START(after=3), None),
    (E.STEP_END(every=13), "this run has 12 steps, and it asks for 13"),
    (E.STEP_END(every=5, after=10), "this run has 12 steps, and it asks for 15"),
    (E.STEP_END(every=12), None),
    (E.STEP_END(before=1), "no occurrence is all that is asked for"),
    (E.STEP_END(once=7, before=7), "no occurrence is all that is asked for"),
    (E.STEP_END(every="20 epochs"), "this run has 4 epochs, and it asks for 20"),
    (E.STEP_END(once="3 epochs"), None),
    (E.STEP_END(every="10 min"), None),
    (E.STEP_END(every="500 steps | 1 epoch"), None),
    (E.STEP_END(every=3) & E.STEP_END(after=12), "this run has 12 steps, and it asks for 13"),
    (E.STEP_END(every=13) | E.EPOCH_END(every=5),
     "this run has 12 steps, and it asks for 13; this run has 4 epochs, and it asks for 5"),
    (E.STEP_END(every=13) | E.EPOCH_END(every=2), None),
    (E.STAGE_END(once=2), "this run has 1 stages, and it asks for 2"),
    (E.VALIDATION_END, "there is no validation data, pass fit(..., valid=loader)"),
    (E.CHECKPOINT, "no checkpoint is written, give the Trainer a folder= and checkpoint=True"),
    (E.BATCH_START(every=1000), None),
    (E.STEP_END(when=lambda run: False), None),
]  # fmt: skip


@pytest.mark.capability("GEN-06")
@pytest.mark.parametrize(("event", "why"), NEVER, ids=[str(event) for event, _ in NEVER])
def test_a_handler_that_can_never_be_called_is_told_with_its_line(event: Any, why: str | None) -> None:
    """It is found before step 0, with the reason, from counts, durations, events that do not take place."""
    trainer = lw.Trainer(epochs=4, folder=None, progress=False)

    @trainer.on(event)
    def look(run: lw.Run) -> None: ...

    line = look.__code__.co_firstlineno
    found = told(trainer)
    if why is None:
        assert found == []
        return
    (one,) = found
    name = f"{look.__qualname__} at {event}"
    assert re.fullmatch(
        re.escape(f"the handler {name} is never called: {why}") + rf" \(at .*test_knobs.py:{line}\)", one
    )


@pytest.mark.parametrize("ends", [{"time": "1 h"}, {"steps": 40}])
def test_where_the_length_is_not_known_or_is_enough_nothing_is_told(ends: dict[str, Any]) -> None:
    trainer = lw.Trainer(**ends, folder=None, progress=False)
    trainer.on(E.EPOCH_END(every=14))(lambda run: None)
    trainer.on(E.VALIDATION_END)(lambda run: None)
    assert told(trainer, (X, Y)) == []


def test_it_is_a_warning_of_fit_too() -> None:
    net = classifier()
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    trainer = lw.Trainer(epochs=1, folder=None, progress=False)
    trainer.on(E.EPOCH_END(every=2))(lambda run: None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(task, lw.Loader((X, Y), 8))
    assert [one.category for one in said] == [LoopwrightWarning]
    assert (said[0].filename, "is never called" in str(said[0].message)) == (__file__, True)


@pytest.mark.capability("GEN-06")
@pytest.mark.parametrize(
    ("settings", "stage", "says"),
    [
        ({"accumulate": 2}, {"accumulate": 3}, "Trainer(accumulate=2) applies nowhere, since each has its own (a: 3)"),
        ({"accumulate": 2}, {"accumulate": 2}, None),
        ({"accumulate": 2}, {}, None),
        ({"accumulate": "16 samples"}, {}, None),
        ({}, {"accumulate": 3}, None),
        ({"validate_every": "2 steps"}, {"validate_every": "1 step"},
         "Trainer(validate_every='2 steps') applies nowhere, since each has its own (a: '1 step')"),
        ({"validate_every": "2 steps"}, {}, None),
        ({"clip_norm": 1.0}, {"phases": 2.0},
         "Trainer(clip_norm=1.0) applies nowhere, since each has its own (a/main: 2.0)"),
        ({"clip_norm": 1.0}, {}, None),
    ],
)  # fmt: skip
def test_a_setting_of_the_trainer_in_whose_place_each_stage_has_another_is_told(
    settings: dict[str, Any], stage: dict[str, Any], says: str | None
) -> None:
    """``accumulate``, ``validate_every`` and ``clip_norm`` that apply nowhere, with those that do."""
    net = classifier()
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    if "phases" in stage:
        stage = {"phases": [lw.Phase("main", task.training_step, clip_norm=stage["phases"])]}
    trainer = lw.Trainer(folder=None, progress=False, **settings)
    plan = trainer.plan(task, lw.Loader((X, Y), 8), (X, Y), stages=[lw.Stage("a", "2 epochs", **stage)])
    assert plan.problems == []
    assert plan.warnings == ([] if says is None else [f"{says}; leave it out"])


@pytest.mark.capability("GEN-06")
@pytest.mark.parametrize(
    ("second", "is_told"), [({"schedule": lw.schedules.cosine(1, 0)}, True), ({"lr": 0.5}, True), ({}, False)]
)
def test_a_schedule_of_the_task_that_each_stage_replaces_is_told(second: dict[str, Any], is_told: bool) -> None:
    net = classifier()
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), sgd, schedule=lw.schedules.linear(1, 0))
    stages = [lw.Stage("a", "1 epoch", lr=0.1), lw.Stage("b", "1 epoch", **second)]
    plan = lw.Trainer(folder=None, progress=False).plan(task, lw.Loader((X, Y), 8), stages=stages)
    told = ["the task's schedule= applies nowhere, since each stage has its own (a, b); leave it out"]
    assert (plan.problems, plan.warnings) == ([], told if is_told else [])
