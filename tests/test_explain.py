"""The picture that ``explain`` draws of a run is what the run does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

import loopwright as lw
from loopwright.events import HOOKS
from tiny import acts, line, pairs, recorder, sgd_task, trainer

IN_A_FIT = [name for name in HOOKS if name != "on_exception" and "test" not in name and "predict" not in name]
PLACE = re.compile("(?:" + "|".join(IN_A_FIT) + r")\b")


class Clip(lw.Callback):
    def on_grads_ready(self, run: lw.Run, phase: lw.Phase, grad_norm: Any) -> None: ...


class Scale(lw.Callback):
    def map_loss(self, run: lw.Run, loss: Any, output: Any, batch: Any, phase: lw.Phase) -> Any:
        return loss * 2


class Log:
    def log(self, progress: lw.Progress, values: Any, kind: str) -> None: ...


def look(run: lw.Run) -> None: ...


@pytest.mark.capability("B-08")
def test_a_rich_run_is_drawn_line_by_line(folder: Path) -> None:
    """explain() prints the flat loop of this run: settings, schedules, callbacks and handlers, each in its place."""
    user = trainer(
        epochs=3, accumulate=2, clip_norm=1.0, folder=folder, capsule=False, loggers=[Log()], log_every=10,
        nonfinite="skip 5",
        callbacks=[Clip(), Scale(), lw.EarlyStopping()],
        checkpoint=[lw.Checkpoint("1 epoch"), lw.Checkpoint("5 min", at_end=False)],
    )  # fmt: skip
    user.on(lw.Event.STEP_END(every=50) | lw.Event.FIT_END)(look)
    user.on(lw.Event.EPOCH_END(every="2 epochs"), "word")(print)
    net = line()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = [lw.per_step(CosineAnnealingLR(optimizer, 60)), StepLR(optimizer, 1)]
    task = lw.Supervised(net, nn.MSELoss(), optimizer, schedule=schedule, metrics={"error": lw.metrics.Mean("loss")})
    assert (
        user.explain(task, pairs([1.0], [2.0], [3.0]), pairs([1.0]))
        == """\
EarlyStopping.on_fit_start
stage 'main': until 3 epochs
    EarlyStopping.on_stage_start
    for each epoch:
        for each window of up to 2 batches of Iterated:
            set gradients to None
            for each batch of the window:
                output = Supervised.training_step(batch)
                Scale.map_loss
                loss.backward() scaled by the batch's share of the window
                update metrics: error
            clip the gradients to a norm of 1
            Clip.on_grads_ready
            if the loss or a gradient is not finite: skip
            SGD.step()
            every 10 steps: log train/... to JSONLLogger, Log
            CosineAnnealingLR.step()
            look, at STEP_END(every=50) | FIT_END  # on_step_end
            when due (also after validations and epochs): Checkpoint.save(run)
            when due (also after validations and epochs): Checkpoint.save(run)
        every 1 epoch: validate, with random generators and train/eval flags put back:
            for each batch of valid: validation_step(batch), update metrics
            EarlyStopping.on_validation_end
        append the record of the epoch to run.history
        StepLR.step()
        EarlyStopping.on_epoch_end
        print, at EPOCH_END(every='2 epochs')  # on_epoch_end
    EarlyStopping.on_stage_end
save a last checkpoint
EarlyStopping.on_fit_end
look, at STEP_END(every=50) | FIT_END  # on_fit_end"""
    )


def drawn(text: str) -> list[str]:
    return PLACE.findall(text)


@pytest.mark.parametrize("validate_every", ["1 step", "1 epoch"])
@pytest.mark.parametrize("phases", [1, 2])
def test_hooks_stand_in_the_order_in_which_they_fire(validate_every: str, phases: int, folder: Path) -> None:
    """The hooks of one epoch of one step, as drawn, are those recorded from the run, in the same order."""
    seen: list[str] = []
    net = line()

    class Own(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any) -> Any:
            return self.net(batch[0]).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def phases(self) -> list[lw.Phase]:
            return [lw.Phase(f"phase {i}", self.training_step) for i in range(phases)]

    saving = lw.Checkpoint("1 step", at_end=False)
    user = trainer(
        epochs=1,
        validate_every=validate_every,
        callbacks=[recorder(seen)],
        checkpoint=saving,
        folder=folder,
        capsule=False,
        loggers=[],
    )
    task = Own()
    picture = user.explain(task, pairs([1.0]), pairs([1.0]))
    user.fit(task, pairs([1.0]), pairs([1.0]))
    assert drawn(picture) == seen


@pytest.mark.capability("CA-13")
def test_stages_and_phases_are_drawn_one_after_the_other() -> None:
    gen, disc = line(), line()

    class Gan(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.gen, self.disc = gen, disc

        def fool(self, batch: Any) -> Any:
            return self.gen(batch[0]).mean()

        def tell(self, batch: Any) -> Any:
            return self.disc(batch[0]).mean()

        def configure_optimizers(self) -> Any:
            return {"gen": torch.optim.SGD(gen.parameters(), lr=0.1), "disc": torch.optim.Adam(disc.parameters())}

        def phases(self) -> list[lw.Phase]:
            return [lw.Phase("gen", self.fool, "gen", every=5), lw.Phase("disc", self.tell, "disc", clip_norm=0.5)]

    user = trainer(callbacks=[acts(on_batch_start=lambda run, batch: None)], nonfinite=None)
    stages = [lw.Stage("first", "1 epoch"), lw.Stage("second", "2 steps", accumulate=3)]
    text = user.explain(Gan(), pairs([1.0]), stages=stages).replace(Gan.__qualname__, "Gan")
    assert (
        text
        == """\
stage 'first': until 1 epoch
    for each epoch:
        for each batch of Iterated:
            for each batch of the window:
                Acts.on_batch_start
            phase 'gen', every 5 steps:
                set gradients to None
                output = Gan.fool(batch)
                loss.backward()
                SGD.step()
            phase 'disc':
                set gradients to None
                output = Gan.tell(batch)
                loss.backward()
                clip the gradients to a norm of 0.5
                Adam.step()
            every 50 steps: log train/...
        append the record of the epoch to run.history
stage 'second': until 2 steps
    for each epoch:
        for each window of up to 3 batches of Iterated:
            for each batch of the window:
                Acts.on_batch_start
            phase 'gen', every 5 steps:
                set gradients to None
                for each batch of the window:
                    output = Gan.fool(batch)
                    loss.backward() scaled by the batch's share of the window
                SGD.step()
            phase 'disc':
                set gradients to None
                for each batch of the window:
                    output = Gan.tell(batch)
                    loss.backward() scaled by the batch's share of the window
                clip the gradients to a norm of 0.5
                Adam.step()
            every 50 steps: log train/...
        append the record of the epoch to run.history"""
    )


def test_a_closure_optimizer_and_a_precision_are_drawn() -> None:
    net = line()
    task = lw.Supervised(net, nn.MSELoss(), torch.optim.LBFGS(net.parameters()))
    text = trainer(epochs=1).explain(task, pairs([1.0]))
    assert "LBFGS.step(closure), which calls as often as it needs:\n                output = Supervised" in text
    assert "finite" not in text
    assert "set gradients to None" not in text
    text = trainer(epochs=1, precision="bf16").explain(sgd_task(line()), pairs([1.0]))
    assert "output = Supervised.training_step(batch) under autocast to bf16" in text
    text = trainer(epochs=1, precision="fp16", clip_norm=1.0).explain(sgd_task(line()), pairs([1.0]))
    assert text.splitlines()[3:11] == [
        "            set gradients to None",
        "            output = Supervised.training_step(batch) under autocast to fp16",
        "            scaler.scale(loss).backward()",
        "            scaler.unscale_() the gradients",
        "            clip the gradients to a norm of 1",
        "            if the loss is not finite: raise",
        "            if a gradient is not finite: drop the step",
        "            SGD.step()",
    ]
    assert text.splitlines()[11] == "            scaler.update()"


def test_two_handlers_of_one_name_are_drawn_each_with_its_event() -> None:
    user = trainer(epochs=1)
    for event in (lw.Event.STEP_END(every=2), lw.Event.EPOCH_END(once=5)):
        user.on(event)(lambda run: None)
    lines = [one.strip().rpartition("<lambda>")[2] for one in user.explain(sgd_task(line()), pairs([1.0])).splitlines()]
    assert [one for one in lines if one.startswith(", at")] == [
        ", at STEP_END(every=2)  # on_step_end", ", at EPOCH_END(once=5)  # on_epoch_end",
    ]  # fmt: skip


class Swaps(lw.Callback):
    """Says that it changes weights and rates."""

    changes = ("weights", "rates")

    def on_validation_start(self, run: lw.Run) -> None: ...

    def on_validation_end(self, run: lw.Run, values: Any) -> None: ...


class Reads(lw.Callback):
    def on_backward_end(self, run: lw.Run, loss: Any, output: Any, batch: Any, phase: lw.Phase) -> None: ...


class Edits(lw.Callback):
    """Has every hook that writes something."""

    def map_batch(self, run: lw.Run, batch: Any) -> Any:
        return batch

    def map_output(self, run: lw.Run, output: Any, batch: Any, phase: lw.Phase) -> Any:
        return output

    def map_loss(self, run: lw.Run, loss: Any, output: Any, batch: Any, phase: lw.Phase) -> Any:
        return loss + 1

    def on_grads_ready(self, run: lw.Run, phase: lw.Phase, grad_norm: Any) -> None: ...


def written(of: str, *, schedule: Any = None, stages: Any = None, task: Any = None, **settings: Any) -> str:
    user = trainer(**{"epochs": None if stages else 1, "callbacks": [Scale(), Edits(), Swaps(), Reads()], **settings})
    if "callbacks" not in settings:
        user.on(lw.Event.GRADS_READY)(check_gradients)
        user.on(lw.Event.BACKWARD_END(every=7))(read_loss)
    return user.explain(task or sgd_task(line(), schedule=schedule), pairs([1.0]), of=of, stages=stages)


def check_gradients(run: lw.Run) -> None: ...


def read_loss(run: lw.Run, loss: Any) -> None: ...


@pytest.mark.capability("TB-05", "B-08")
@pytest.mark.parametrize(
    ("of", "settings", "text"),
    [
        ("batch", {}, """\
batch, in this order:
  1. Iterated, which reads it
  2. Edits.map_batch
and passed to:
  - Edits.map_output
  - Scale.map_loss
  - Edits.map_loss
  - Reads.on_backward_end"""),
        ("output", {}, """\
output, in this order:
  1. Supervised.training_step(batch), which returns it
  2. Edits.map_output
and passed to:
  - Scale.map_loss
  - Edits.map_loss
  - Reads.on_backward_end"""),
        ("loss", {}, """\
loss, in this order:
  1. Supervised.training_step(batch), which returns it as output['loss']
  2. Edits.map_output
  3. Scale.map_loss
  4. Edits.map_loss
and passed to:
  - Reads.on_backward_end
  - read_loss, at BACKWARD_END(every=7)"""),
        ("loss", {"accumulate": 2, "precision": "fp16", "callbacks": [Edits(), Scale()]}, """\
loss, in this order:
  1. Supervised.training_step(batch), which returns it as output['loss']
  2. Edits.map_output
  3. Edits.map_loss
  4. Scale.map_loss
  5. the gradient scaler, for the backward only
  6. the batch's share of the window, for the backward only"""),
        ("gradients", {"clip_norm": 0.5}, """\
gradients, in this order:
  1. the start of the step, which sets them to None
  2. loss.backward()
  3. clipping to a norm of 0.5
  4. Edits.on_grads_ready
  5. check_gradients, at GRADS_READY, as on_grads_ready"""),
        ("weights", {}, """\
weights, in this order:
  1. SGD.step()
  2. Swaps, which says so (changes = ('weights', 'rates')), in on_validation_start, on_validation_end"""),
        ("lr", {"schedule": lambda o: torch.optim.lr_scheduler.StepLR(o, 1)}, """\
lr, in this order:
  1. SGD, made with 1
  2. StepLR.step(), once an epoch
  3. Swaps, which says so (changes = ('weights', 'rates')), in on_validation_start, on_validation_end"""),
    ],
)  # fmt: skip
def test_who_writes_what_is_told_in_order(of: str, settings: Any, text: str) -> None:
    """explain(of="loss") lists who writes the loss in this very run, in order, and who reads it; so with the others."""
    found = written(of, **settings)
    assert found.replace(f"{Scale.__qualname__}.", "Scale.") == text


def test_writers_are_told_of_each_phase_and_an_unknown_name_is_refused() -> None:
    class Two(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = line(), line()

        def step(self, batch: Any) -> Any:
            return self.a(batch[0]).mean() + self.b(batch[0]).mean()

        def phases(self) -> list[lw.Phase]:
            return [lw.Phase(name, self.step, optimizers=name) for name in "ab"]

        def configure_optimizers(self) -> Any:
            return {"a": torch.optim.SGD(self.a.parameters(), 0.1), "b": torch.optim.Adam(self.b.parameters(), 0.2)}

    assert written("lr", task=Two(), callbacks=[]) == (
        "lr in stage 'main', phase 'a', in this order:\n  1. SGD, made with 0.1\n"
        "lr in stage 'main', phase 'b', in this order:\n  1. Adam, made with 0.2"
    )
    with pytest.raises(lw.SettingError, match=r"explain\(of='lsos'\): nothing here is called so. Known: 'batch', 'gra"):
        written("lsos")


@pytest.mark.capability("TB-05")
def test_who_writes_the_loss_is_drawn_in_order() -> None:
    """Two callbacks that edit the loss are listed in the order in which they do it, between the step and backward."""

    class Add(lw.Callback):
        def map_loss(self, run: lw.Run, loss: Any, output: Any, batch: Any, phase: lw.Phase) -> Any:
            return loss + 1

    for callbacks in ([Scale(), Add()], [Add(), Scale()]):
        lines = trainer(epochs=1, callbacks=callbacks).explain(sgd_task(line()), pairs([1.0])).splitlines()
        at = next(i for i, text in enumerate(lines) if "output = " in text)
        writers = [f"{type(c).__qualname__}.map_loss" for c in callbacks]
        assert [text.strip() for text in lines[at + 1 : at + 4]] == [*writers, "loss.backward()"]


@pytest.mark.capability("B-08")
@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
def test_callbacks_of_a_stage_are_drawn_in_their_stage_alone(names: list[str]) -> None:
    """Where they are called: in the loop of their stage, and among those who write and read in it."""

    class Own(Edits):
        changes = ("weights",)

    def told(of: str | None = None) -> list[str]:
        stages = [lw.Stage(name, "1 epoch", callbacks=[Own()] if name == "a" else []) for name in names]
        text = trainer().explain(sgd_task(line()), pairs([1.0]), stages=stages, of=of)
        return text.replace(Own.__qualname__, "Own").splitlines()

    first = next((i for i, one in enumerate(told()) if one.startswith("stage 'b'")), None)
    drawn_in_a = [one.strip() for one in told()[:first] if "Own" in one]
    assert drawn_in_a == ["Own.map_batch", "Own.map_output", "Own.map_loss", "Own.on_grads_ready"]
    assert "Own" not in "".join(told()[first:] if first else [])
    where = ", in stage 'a'" if len(names) > 1 else ""
    assert [one for one in told("loss") if "Own" in one] == ["  2. Own.map_output", "  3. Own.map_loss"]
    assert [one for one in told("output") if "Own" in one] == ["  2. Own.map_output", f"  - Own.map_loss{where}"]
    assert [one for one in told("weights") if "Own" in one] == [
        "  2. Own, which says so (changes = ('weights',)), in map_batch, map_output, map_loss, on_grads_ready"
    ]
