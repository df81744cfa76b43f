"""Debug switches: a rehearsal that leaves nothing behind, one batch again and again, less data, anomalies."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import loopwright as lw
from loopwright.events import HOOKS
from tiny import bits, classifier, line, loader, pairs, recorder, same, samples, seed_all, sgd_task, trainer


def task_of(net: nn.Module, **settings: Any) -> lw.Supervised:
    return lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), 0.01), **settings)


class Kept:
    """A logger that remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def log(self, progress: lw.Progress, values: Any, kind: str) -> None:
        self.told.append(values)


# -------------------------------------------------------------------------------------------------------- a rehearsal


def test_a_rehearsal_exercises_every_hook_and_leaves_nothing_behind(folder: Path, monkeypatch: Any) -> None:
    seen: list[Any] = []
    logger, temporary = Kept(), folder.parent / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    net = classifier(dropout=0.5, batch_norm=True)
    task = task_of(net, metrics={"accuracy": lw.metrics.Accuracy()}, schedule=torch.optim.lr_scheduler.LinearLR)
    before = bits(net, task.optimizer)
    user = lw.Trainer(
        epochs=100, folder=folder, progress=False, callbacks=[recorder(seen)], loggers=[logger],
        checkpoint=lw.Checkpoint("1000 steps", monitor="valid/loss", at_end=False, folder=folder / "elsewhere"),
        debug=lw.Debug(dev_run=2),
    )  # fmt: skip
    run = user.fit(task, loader(37, batch_size=5, shuffle=True, noisy=True), loader(37, batch_size=5, noisy=True))
    assert (run.status, run.progress.step, run.progress.epoch) == ("done", 2, 1)
    assert seen.count("on_eval_batch_end") == 2
    evaluating = {"on_exception", *(name for name in HOOKS if "test" in name or "predict" in name)}
    assert set(HOOKS) - set(seen) == evaluating
    assert run.metrics.keys() >= {"train/loss", "train/accuracy", "valid/loss", "valid/accuracy"}
    assert same(bits(net, task.optimizer), before)
    assert not folder.exists()
    assert list(temporary.iterdir()) == []
    assert (run.folder, logger.told) == (None, [])
    assert net[0].weight.grad is None


@pytest.mark.parametrize("kind", [torch.optim.lr_scheduler.LinearLR, torch.optim.lr_scheduler.StepLR])
def test_the_run_after_a_rehearsal_is_the_run_without_one(kind: Any) -> None:
    """Weights, optimizer state, generators and learning rates as if nothing had been rehearsed; also in between."""

    def fitted(rehearses: bool) -> list[Any]:
        net = classifier(dropout=0.5, batch_norm=True)
        options = {"step_size": 1} if kind is torch.optim.lr_scheduler.StepLR else {}
        task = task_of(net, schedule=lambda o: kind(o, **options))
        data = loader(23, batch_size=7, shuffle=True, noisy=True)
        seed_all(4)
        for epochs in (1, 2):
            if rehearses:
                trainer(epochs=5, debug=lw.Debug(dev_run=3)).fit(task, data, data)
            run = trainer(epochs=epochs).fit(task, data)
        assert run.progress.step == 8
        return [*bits(net, task.optimizer), run.history["train/loss"], run.lr]

    assert same(fitted(True), fitted(False))


def test_a_rehearsal_that_fails_leaves_nothing_behind_as_well(folder: Path) -> None:
    class Broken(lw.Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"file": open}

        def load_state_dict(self, state: Any) -> None: ...

    net = line(1.0)
    task = sgd_task(net)
    user = lw.Trainer(epochs=3, folder=folder, progress=False, callbacks=[Broken()], debug=lw.Debug(dev_run=1))
    with pytest.raises(lw.CheckpointError, match="Broken"):  # found in seconds, not with the first real checkpoint
        user.fit(task, pairs([1.0], [2.0]))
    assert not folder.exists()
    assert net.weight.item() == 1.0


def test_stages_and_functions_are_rehearsed_as_well() -> None:
    task = task_of(classifier())
    stages = [lw.Stage("head", until="3 epochs", train="module.2.*"), lw.Stage("all", until="500 steps")]
    run = trainer(debug=lw.Debug(dev_run=2)).fit(task, loader(37, batch_size=5), stages=stages)
    assert (run.progress.step, run.progress.stage) == (4, 2)
    net, bare, moved = line(1.0), torch.zeros(()), torch.ones((), requires_grad=True)
    sgd = torch.optim.SGD([moved], lr=0.1)
    seen: list[Any] = []

    def step(run: lw.Run, batch: Any) -> None:
        seen.append(batch)
        with torch.no_grad():
            net.weight.add_(1)
            bare.add_(1)
        moved.square().backward()
        sgd.step()

    trainer(epochs=9, debug=lw.Debug(dev_run=2)).run(step, [1, 2, 3], state={"net": net, "bare": bare, "sgd": sgd})
    assert (seen, net.weight.item(), bare.item(), moved.item(), moved.grad) == ([1, 2], 1.0, 0.0, 1.0, None)


def test_a_rehearsal_cannot_be_a_resume(folder: Path) -> None:
    with pytest.raises(lw.SettingError, match=r"Debug\(dev_run=...\) rehearses a run from its start; leave resume out"):
        lw.Trainer(epochs=1, folder=folder, debug=lw.Debug(dev_run=1)).fit(sgd_task(line()), pairs([1]), resume="auto")


# ----------------------------------------------------------------------------------------------------------- the data


def test_one_batch_is_learned_by_heart_and_validated_on() -> None:
    seen: list[Any] = []
    net = classifier()
    net.register_forward_hook(lambda module, args, out: seen.append(args[0].clone()))
    data = DataLoader(TensorDataset(*samples(37)), 5, shuffle=True)
    user = trainer(epochs=40, debug=lw.Debug(overfit=1))
    task = task_of(net, metrics={"accuracy": lw.metrics.Accuracy()})
    task.optimizer.param_groups[0]["lr"] = 0.1
    run = user.fit(task, data, loader(9))
    assert run.progress.step == 40
    assert all(torch.equal(x, seen[0]) for x in seen)
    assert len(seen[0]) == 5
    assert run.metrics["valid/accuracy"] == 1.0
    assert run.exact == ["Debug(overfit=1) trains on batches that it has in memory"]


def test_the_first_batches_are_those_of_the_data(folder: Path) -> None:
    seen: list[Any] = []
    user = trainer(epochs=2, accumulate=2, debug=lw.Debug(overfit=3), callbacks=[])
    user.on(lw.Event.BATCH_START)(lambda run, batch: seen.append(batch[0].item()))
    run = user.fit(sgd_task(line()), pairs([1], [2], [3], [4]))
    assert seen == [1, 2, 3, 1, 2, 3]
    assert run.progress.step == 4


@pytest.mark.capability("PL-13")
@pytest.mark.parametrize(("train", "valid", "steps", "looks"), [(0.1, None, 2, 12), (3, 0.25, 3, 3), (1.0, 1, 12, 1)])
def test_a_part_of_the_data_is_trained_and_validated_on(train: Any, valid: Any, steps: int, looks: int) -> None:
    """One argument: 10 % of the batches of every epoch, or so many; the same of the validation data."""
    seen: list[str] = []
    user = trainer(epochs=2, callbacks=[recorder(seen)], debug=lw.Debug(train=train, valid=valid))
    run = user.fit(task_of(classifier()), loader(60, batch_size=5, shuffle=True), loader(60, batch_size=5))
    assert run.progress.step == 2 * steps
    assert seen.count("on_eval_batch_end") == 2 * looks


def test_limited_data_still_says_how_long_it_was_waited_for() -> None:
    run = trainer(epochs=1, debug=lw.Debug(train=3)).fit(task_of(classifier()), loader(40, batch_size=4, noisy=True))
    assert run.waited > 0


# --------------------------------------------------------------------------------------------------------- anomalies


class Log(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log(x)


def failing(*layers: nn.Module, data: Any = None, loss: Any = None) -> tuple[type, str, list[str]]:
    net = nn.Sequential(*layers)
    task = sgd_task(net, loss=loss or (lambda preds, target: preds.mean()), lr=0.1)
    user = trainer(epochs=1, debug=lw.Debug(anomaly=True))
    with pytest.raises((lw.NonFiniteError, RuntimeError)) as caught:
        user.fit(task, data or pairs([1.0, -1.0]))
    assert (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()) == (False, True)
    assert not net._forward_hooks
    return caught.type, str(caught.value), getattr(caught.value, "__notes__", [])


def test_the_first_module_whose_output_is_not_finite_is_named() -> None:
    kind, text, _ = failing(line(1.0), Log(), nn.Tanh())
    assert kind is lw.NonFiniteError
    assert text == (
        "phase 'main' has a loss of nan at step 1. The first output that is not finite was that of 1 (Log): "
        "float32[2, 1] with 1 NaN and 0 infinite of 2 values; what it was given was finite: (float32[2, 1])"
    )


def test_a_batch_or_a_loss_function_that_is_not_finite_is_told_from_a_module() -> None:
    _, text, _ = failing(line(1.0), data=pairs([1.0, float("inf")]))
    assert text.endswith("The batch itself is not finite: float32[2, 1] with 0 NaN and 1 infinite of 2 values")
    _, text, _ = failing(line(1.0), loss=lambda preds, target: torch.log(preds - preds).mean())
    assert text.endswith("Every module's output was finite: look at the loss function and what else the step computes")


@pytest.mark.filterwarnings("ignore:Error detected in")
def test_a_backward_that_gives_nan_is_named_by_torch() -> None:
    kind, text, notes = failing(line(0.0), loss=lambda preds, target: torch.sqrt(preds * 0).sum())
    assert kind is RuntimeError
    assert "returned nan values" in text
    assert "[loopwright] Every module's output was finite: NaN came in the backward of that function only" in notes


def test_anomaly_mode_ends_with_the_fit_and_changes_no_bit() -> None:
    def fitted(**more: Any) -> list[Any]:
        net = classifier(dropout=0.5, batch_norm=True)
        seed_all(1)
        task = task_of(net)
        modes: list[bool] = []
        user = trainer(epochs=2, **more)
        user.on(lw.Event.STEP_END)(lambda run: modes.append(torch.is_anomaly_enabled()))
        user.fit(task, loader(23, batch_size=7, shuffle=True), loader(9))
        assert set(modes) == {bool(more)}
        return bits(net, task.optimizer)

    assert same(fitted(debug=lw.Debug(anomaly=True)), fitted())
    assert not torch.is_anomaly_enabled()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"nonfinite": "skip"}, "which nonfinite='skip' asks to pass over"),
        ({"precision": "fp16"}, "cannot apply to precision='fp16', where scaled gradients overflow by design"),
        ({"compile": True}, "looks at each module, which compile=True merges"),
    ],
)
def test_anomaly_mode_is_refused_where_it_cannot_apply(settings: Any, text: str) -> None:
    plan = trainer(epochs=1, debug=lw.Debug(anomaly=True), **settings).plan(sgd_task(line()), pairs([1.0]))
    assert any(text in problem for problem in plan.problems)


# ------------------------------------------------------------------------------------------------ with all the rest


@pytest.mark.parametrize("stop", range(1, 8))
def test_a_run_that_is_looked_into_resumes_exactly_from_every_step(stop: int, folder: Path) -> None:
    """Half of the data, with an audit, a profile and a doctor: the weights of the run that was never interrupted."""

    class HaltError(Exception):
        pass

    def user(root: Path, *callbacks: lw.Callback, **debug: Any) -> tuple[lw.Trainer, lw.Supervised, Any]:
        net = classifier(dropout=0.5, batch_norm=True)
        task = task_of(net, metrics={"accuracy": lw.metrics.Accuracy()})
        made = lw.Trainer(
            epochs=2, folder=root, progress=False, checkpoint=lw.Checkpoint("1 step"), callbacks=callbacks,
            debug=lw.Debug(train=0.5, **debug), seed=3,
        )  # fmt: skip
        return made, task, loader(40, batch_size=5, shuffle=True, noisy=True)

    made, whole, data = user(folder / "whole")
    made.fit(whole, data, loader(9))
    made, task, data = user(folder / "parts", lw.Doctor(2, show=False), audit=True)

    def halt(run: lw.Run) -> None:
        raise HaltError

    made.on(lw.Event.STEP_START(once=stop + 1))(halt)
    with pytest.raises(HaltError):
        made.fit(task, data, loader(9))
    made, task, data = user(folder / "parts", lw.Doctor(2, show=False), lw.Profiler(show=False))
    run = made.fit(task, data, loader(9), resume="auto")
    assert run.progress.step == 8
    assert same(bits(task, task.optimizer)[:2], bits(whole, whole.optimizer)[:2])


@pytest.mark.capability("IG-24")
def test_a_model_in_factored_code_is_looked_into_by_all_utilities_at_once(folder: Path) -> None:
    """Two phases and stages, a schedule; summary, rehearsal, audit, profile, doctor, explain: each by one line."""

    class Pair(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = classifier(dropout=0.1), classifier(batch_norm=True, seed=2)

        def first_step(self, batch: Any) -> Any:
            return nn.functional.cross_entropy(self.first(batch[0]), batch[1])

        def second_step(self, batch: Any) -> Any:
            preds = self.second(batch[0])
            return {"loss": nn.functional.cross_entropy(preds, batch[1]), "preds": preds, "target": batch[1]}

        def validation_step(self, batch: Any) -> Any:
            return self.second_step(batch)

        def phases(self) -> list[lw.Phase]:
            return [
                lw.Phase("first", self.first_step, optimizers="first"),
                lw.Phase("second", self.second_step, optimizers="second", every=2, clip_norm=1.0),
            ]

        def configure_optimizers(self) -> Any:
            second = torch.optim.Adam(self.second.parameters())
            return {
                "first": torch.optim.SGD(self.first.parameters(), 0.1),
                "second": (second, torch.optim.lr_scheduler.StepLR(second, 1)),
            }

        def configure_metrics(self) -> Any:
            return {"accuracy": lw.metrics.Accuracy()}

    torch.manual_seed(0)
    task, data, valid = Pair(), loader(30, batch_size=5), loader(9)
    stages = [lw.Stage("warm", until="1 epoch", freeze="first.0.*"), lw.Stage("all", until="2 epochs")]
    doctor = lw.Doctor(2, show=False)
    assert lw.summary(task.second, torch.zeros(4, 5)).parameters == sum(p.numel() for p in task.second.parameters())
    before = bits(task)[0]
    rehearsal = lw.Trainer(folder=folder, progress=False, callbacks=[doctor], debug=lw.Debug(dev_run=2, audit=True))
    assert rehearsal.fit(task, data, valid, stages=stages).progress.step == 4
    assert same(bits(task)[0], before)
    user = lw.Trainer(folder=folder, progress=False, callbacks=[doctor], debug=lw.Debug(profile=True, audit=True))
    assert "Adam, made with 0.001" in user.explain(task, data, valid, stages=stages, of="lr")
    run = user.fit(task, data, valid, stages=stages)
    assert run.progress.phase_steps == {"first": 18, "second": 9}
    assert run.folder is not None
    assert {"profile.json", "doctor.json"} <= {path.name for path in run.folder.iterdir()}
    assert set(doctor.parameters) >= {"first.0.weight", "second.0.weight"}
    assert lw.Trainer(folder=None).validate(task, valid).keys() == {"valid/loss", "valid/accuracy"}


# ------------------------------------------------------------------------------------------------- how it is told


def test_what_is_switched_on_is_in_the_settings_and_in_explain(folder: Path) -> None:
    user = lw.Trainer(epochs=1, folder=folder, progress=False, debug=lw.Debug(train=0.5, audit=True))
    run = user.fit(sgd_task(line()), pairs([1], [2]))
    assert run.settings["debug"] == {"train": 0.5, "audit": True}
    assert run.folder is not None
    assert "debug:\n  train: 0.5\n  audit: true\n" in (run.folder / "config.yaml").read_text()
    text = user.explain(sgd_task(line()), pairs([1], [2]))
    assert text.splitlines()[0] == "Debug(train=0.5, audit=True)"
    assert trainer(epochs=1).fit(sgd_task(line()), pairs([1])).settings["debug"] is None


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"dev_run": True}, r"Debug\(dev_run=True\): expected a number of batches, such as dev_run=2"),
        ({"overfit": -1}, r"Debug\(overfit=-1\): expected a number of batches"),
        ({"train": 0}, r"Debug\(train=0\): batches=0; expected a whole number from 1"),
        ({"valid": 1.5}, r"Debug\(valid=1.5\): fraction=1.5; expected a number above 0, at most 1"),
        ({"anomaly": 1}, r"Debug\(anomaly=1\): expected True or False"),
        ({"dev_run": 1, "train": 0.5}, r"Debug\(dev_run=1, train=0.5\): each says which batches there are; give one"),
        ({"dev_run": 1, "overfit": 1}, r"give one of them"),
    ],
)
def test_a_switch_that_is_none_is_refused(given: Any, text: str) -> None:
    with pytest.raises(lw.SettingError, match=text):
        lw.Debug(**given)


def test_a_switch_that_has_nothing_to_do_is_refused() -> None:
    with pytest.raises(lw.SettingError, match=r"debug=True: expected an lw.Debug, such as debug=lw.Debug\(dev_run=2\)"):
        lw.Trainer(epochs=1, debug=True)  # type: ignore[arg-type]
    with pytest.raises(lw.SettingError, match=r"Debug\(valid=2\) has nothing to limit: give fit\(..., valid=loader\)"):
        trainer(epochs=1, debug=lw.Debug(valid=2)).fit(sgd_task(line()), pairs([1]))
    with pytest.raises(TypeError, match=r"debug=lw\.Debug\(dev_run=2\)"):
        lw.Trainer(epochs=1, fast_dev_run=True)  # type: ignore[call-arg]
