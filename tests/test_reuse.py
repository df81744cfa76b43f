"""A finished stage that has not changed is not trained again: its end is loaded, with the bits of having trained it."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from tiny import acts, bits, classifier, loader, same, samples, seed_all

TRAINED: list[str] = []  # the stages of which a step was made


class Noting(lw.Callback):
    def __init__(self, setting: int = 1) -> None:
        self.setting, self.steps = setting, 0

    def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
        assert run.stage is not None
        TRAINED.append(run.stage.name)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Any) -> None:
        self.steps = state["steps"]


def sgd(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr, momentum=0.9)


def experiment(root: Path | None, changes: dict[str, Any] | None = None, **fit: Any) -> tuple[lw.Run, list[str]]:
    """Three stages of which the first two are kept; the run, and the stages that it has trained."""
    changes = {} if changes is None else changes
    seed_all(3)
    net = classifier(dropout=0.3, seed=changes.get("weights", 1))
    optimizer = torch.optim.Adam(net.parameters(), changes.get("adam", 0.01))
    task = lw.Supervised(net, nn.CrossEntropyLoss(), optimizer, metrics={"accuracy": lw.metrics.Accuracy()})
    x, y = samples(23)
    if changes.get("data"):
        x = x + 1.0
    train = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 5, shuffle=True)
    first: dict[str, Any] = {
        "until": ["6 epochs", lw.Plateau(patience=2)], "train": "module.3.*", "reuse": True,
        "callbacks": [lw.KeepBest("valid/loss")],
    }  # fmt: skip
    second: dict[str, Any] = {
        "until": "7 steps", "optimizer": sgd(0.1), "reuse": True, "callbacks": [lw.KeepBest("valid/accuracy")],
        "source": loader(17, noisy=True, batch_size=4, shuffle=True), "valid": loader(8, batch_size=8),
    }  # fmt: skip
    third: dict[str, Any] = {"until": "1 epoch", "optimizer": sgd(0.2), "callbacks": [Extra()]}
    for stage, values in (("first", first), ("second", second), ("third", third)):
        values |= changes.get(stage, {})
    stages = [lw.Stage("first", **first), lw.Stage("second", **second), lw.Stage("third", **third)]
    if changes.get("fewer"):
        stages = stages[:2]
    callbacks = [Noting(changes.get("callback", 1)), *fit.pop("callbacks", ())]
    trainer = lw.Trainer(
        folder=root, name="x", progress=False, checkpoint=fit.pop("checkpoint", False), callbacks=callbacks,
        seed=changes.get("seed", 7), clip_norm=changes.get("clip_norm"), validate_every="3 steps",
    )  # fmt: skip
    TRAINED.clear()
    run = trainer.fit(task, train, loader(9, batch_size=5), stages=stages, **fit)
    return run, list(dict.fromkeys(TRAINED))


class Extra(lw.Callback):
    """A callback of the last stage that remembers something."""

    epochs = 0

    def on_epoch_end(self, run: lw.Run) -> None:
        self.epochs += 1

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: Any) -> None:
        self.epochs = state["epochs"]


def end(run: lw.Run) -> list[Any]:
    moved = {id(o): o for phase in run.stages[-1].phases for o in phase.moved}
    # every record has the rates of all optimizers, those of later stages too
    history = [{k: v for k, v in record.items() if k not in ("seconds", "lr/third.main")} for record in run.history]
    return [*bits(run.models["model"], *moved.values()), history, run.progress._replace(seconds=0.0), dict(run.metrics)]


ALL = ["first", "second", "third"]


@pytest.mark.capability("B-12")
def test_an_unchanged_stage_is_not_trained_again_and_ends_the_same(folder: Path, tmp_path: Path) -> None:
    """The last stage is changed: the first two are loaded, and the end has the bits of having trained all three."""
    run, trained = experiment(folder)
    assert trained == ALL
    assert run.reused == []
    again, trained = experiment(folder)
    assert trained == ["third"]
    assert again.reused == ["first", "second"]
    assert again.status == "done"
    assert same(end(again), end(run))

    for third in ({"optimizer": sgd(0.5)}, {"until": "2 epochs"}, {"callbacks": []}, {"optimizer": adam}):
        changes = {"third": third}
        changed, trained = experiment(folder, changes)
        assert trained == ["third"]
        anew, everything = experiment(tmp_path / str(id(third)), changes)
        assert everything == ALL
        assert same(end(changed), end(anew))
        assert same(end(changed), end(run)) is ("callbacks" in third)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, 0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": 2}, {"seed": 8}, {"data": True}, {"adam": 0.02}, {"clip_norm": 1.0},
        {"first": {"until": "2 epochs"}}, {"first": {"train": "module.*"}}, {"first": {"accumulate": 2}},
        {"first": {"until": ["6 epochs", lw.Plateau(patience=3)]}}, {"first": {"reuse": "second try"}},
        {"first": {"validate_every": "2 steps"}}, {"first": {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}},
    ],
)  # fmt: skip
def test_whatever_decides_the_first_stage_trains_all_again(changes: dict[str, Any], kept: Path) -> None:
    assert experiment(kept, changes)[1] == ALL


@pytest.mark.parametrize("changes", [{"second": {"optimizer": sgd(0.3)}}, {"second": {"until": "8 steps"}}])
def test_a_changed_second_stage_begins_at_the_end_of_the_first(changes: dict[str, Any], kept: Path) -> None:
    run, trained = experiment(kept, changes)
    assert trained == ["second", "third"]
    assert run.reused == ["first"]


@pytest.fixture(scope="module")
def _kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kept")
    experiment(root / "runs")
    return root / "runs"


@pytest.fixture
def kept(_kept: Path, tmp_path: Path) -> Path:
    """A copy of a folder in which all three stages were finished."""
    return Path(shutil.copytree(_kept, tmp_path / "copy"))


def test_a_finished_last_stage_is_not_trained_again_either(folder: Path) -> None:
    run, trained = experiment(folder, {"fewer": True})
    assert trained == ["first", "second"]
    again, trained = experiment(folder, {"fewer": True}, checkpoint=True)
    assert trained == []
    assert same(end(again), end(run))
    assert (again.status, again.reused) == ("done", ["first", "second"])
    assert again.folder is not None
    assert list((again.folder / "checkpoints").glob("step-*"))
    grown, trained = experiment(folder)  # one stage more than there was
    assert trained == ["third"]
    assert grown.reused == ["first", "second"]


class Killed(Exception):  # noqa: N818
    pass


def killed_at(step: int) -> lw.Callback:
    def kill(run: lw.Run, *rest: Any) -> None:
        if run.progress.step == step:
            raise Killed

    return acts(on_grads_ready=kill)


@pytest.mark.capability("B-12", "CA-22")
def test_killed_in_the_second_stage_it_resumes_there(folder: Path, tmp_path: Path) -> None:
    """Own data, optimizer, metric and end for each stage, from the best of the one before; killed in the second."""
    whole, _ = experiment(tmp_path / "whole")
    at = next(i for i, record in enumerate(whole.history) if record["stage"] == "second")
    step = whole.history[at]["step"]
    with pytest.raises(Killed):
        experiment(folder, checkpoint=lw.Checkpoint("1 steps"), callbacks=[killed_at(step + 1)])
    run, trained = experiment(folder, checkpoint=lw.Checkpoint("1 steps"), resume="auto")
    assert trained == ["second", "third"]
    assert same(end(run), end(whole))
    assert experiment(folder)[1] == ["third"]  # the end of the second was kept, though another process began it


def test_without_a_seed_a_run_that_draws_otherwise_is_another(folder: Path) -> None:
    assert experiment(folder, {"seed": None})[1] == ALL
    assert experiment(folder, {"seed": None})[1] == ["third"]  # seed_all came before


def test_damage_is_said_and_the_stage_is_trained_again(kept: Path) -> None:
    whole, _ = experiment(kept)
    for file in (kept / "x" / "stages").rglob("model.safetensors"):
        file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run, trained = experiment(kept)
    assert trained == ALL
    assert same(end(run), end(whole))
    assert ["is trained again" in str(one.message) for one in told] == [True, True]
    assert experiment(kept)[1] == ["third"]  # what was damaged has been written anew


def test_a_folder_is_needed_and_it_is_said() -> None:
    with pytest.raises(lw.SettingError) as caught:
        experiment(None)
    assert str(caught.value) == ("Stage('first', reuse=...) needs a folder to keep its end in; leave folder=None out")


def test_the_text_of_the_users_own_code_decides_as_well(tmp_path: Path) -> None:
    """The file in which the task stands has changed: a comment, the step, a function that the step calls."""
    source = (
        "import torch, loopwright as lw\n"
        "def halved(value):\n    return value / 2\n"
        "class T(lw.Task):\n"
        "    def __init__(self):\n        super().__init__()\n        self.net = torch.nn.Linear(1, 1)\n"
        "    def training_step(self, batch):\n        return halved(self.net(batch).SOMETHING)\n"
        "    def configure_optimizers(self):\n        return torch.optim.SGD(self.parameters(), 0.1)\n"
    )
    again = source.replace("SOMETHING", "mean()").replace("2\\n", "2  # once\\n")
    texts = ("mean()", "mean()", again, "sum()", source.replace("SOMETHING", "sum()").replace("/ 2", "/ 4"))
    sys.path.insert(0, str(tmp_path))
    try:
        found = []
        for i, text in enumerate(texts):
            (tmp_path / "users_task.py").write_text(text if "lw" in text else source.replace("SOMETHING", text))
            os.utime(tmp_path / "users_task.py", (i, i))
            sys.modules.pop("users_task", None)
            torch.manual_seed(0)
            trainer = lw.Trainer(folder=tmp_path / "runs", progress=False, checkpoint=False, seed=1)
            stages = [lw.Stage("a", "1 epoch", reuse=True), lw.Stage("b", "1 epoch")]
            task = importlib.import_module("users_task").T()
            found.append(trainer.fit(task, [torch.ones(2, 1)], stages=stages).reused)
        assert found == [[], ["a"], ["a"], [], []]
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("users_task", None)


SMOOTH, WEIGHTS = 0.0, {"classes": [1.0, 1.0]}  # what a step reads


def mixed(preds: Any, target: Any, smooth: float) -> Any:
    weight = torch.tensor(WEIGHTS["classes"])
    return nn.functional.cross_entropy(preds, target, weight, label_smoothing=smooth + SMOOTH)


class Scaled(nn.Module):
    def __init__(self, public: float, private: float) -> None:
        super().__init__()
        self.factor, self._more = 1 + public, 1 + private
        self.register_buffer("shift", torch.zeros(1), persistent=False)

    def forward(self, x: Any) -> Any:
        return self.factor * self._more * x + self.shift


class Classes(lw.Task):
    ratio = 0.0

    def __init__(self, **made: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        scaled = Scaled(made.get("public", 0.0), made.get("private", 0.0))
        act = made.get("act", nn.ReLU)()
        inner = nn.Sequential(nn.Linear(8, 8), nn.Sequential(act, nn.Sequential(scaled)))
        self.net = nn.Sequential(inner, nn.Dropout(made.get("p", 0.1)), nn.Linear(8, 2))
        self._smooth = made.get("hidden", 0.0)
        self.deep = {"a": {"b": {"c": {"d": {"e": made.get("deep", 0.0)}}}}}
        self.loss = made.get("loss", nn.CrossEntropyLoss())
        self.measured = made.get("metrics", {})

    def training_step(self, batch: Any) -> Any:
        preds = self.net(batch[0])
        smooth = self._smooth + self.deep["a"]["b"]["c"]["d"]["e"] + self.ratio
        return self.loss(preds, batch[1]) + mixed(preds, batch[1], smooth)

    def validation_step(self, batch: Any) -> Any:
        return {"loss": nn.functional.cross_entropy(self.net(batch[0]), batch[1])}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Other(Classes):
    ratio = 0.5


def touched(how: str) -> Any:
    """A task of which something is set that is no argument of anything."""

    def kind(**made: Any) -> Classes:
        task = Classes(**made)
        weight = task.net[2].weight

        def doubled(*given: Any) -> None:
            weight.grad.mul_(2)

        if how == "mode":
            task.net[1].eval()
        elif how == "hook of a gradient":
            weight.register_hook(lambda gradient: gradient * 2)
        elif how == "hook of an accumulated gradient":
            weight.register_post_accumulate_grad_hook(doubled)
        else:
            optimizer = torch.optim.SGD(task.parameters(), 0.1)
            optimizer.register_step_pre_hook(doubled)
            task.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
        return task

    return kind


class Rows(torch.utils.data.Dataset[Any]):
    """Nothing in it is as long as it is, so that a fingerprint tells its class and length only."""

    def __init__(self, factor: float) -> None:
        self._by = 1 + factor

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> Any:
        return torch.full((8,), self._by * (i % 5 - 2)), i % 2


class Louder(lw.Callback):
    def __init__(self, by: float) -> None:
        self._gain = 1 + by

    def map_loss(self, run: lw.Run, loss: Any, output: Any, batch: Any, phase: Any) -> Any:
        return loss * self._gain


class Ender(lw.Callback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
        if run.progress.step == self.after:
            run.end_stage()


def of_lengths(scale: float) -> Any:
    def weight(batch: Any) -> float:
        return 1 + scale * float(batch[1].sum())

    return weight


def two_stages(root: Path, kind: Any = Classes, **given: Any) -> lw.Run:
    """Two small stages of which the first is kept; what is ``given`` changes one thing of it."""
    trainer = lw.Trainer(
        folder=root, name="x", progress=False, checkpoint=False, seed=given.pop("seed", 1), accumulate=2,
        callbacks=[Louder(given.pop("louder", 0.0)), Ender(given.pop("after", 5)), *given.pop("watching", ())],
        log_every=given.pop("log_every", "50 steps"),
    )  # fmt: skip
    if "handler" in given:
        trainer.on(lw.Event.EPOCH_START)(given.pop("handler"))
    data = torch.utils.data.DataLoader(Rows(given.pop("rows", 0.0)), 8, num_workers=given.pop("workers", 0))
    weight, valid, later = given.pop("weight", None), given.pop("valid", None), given.pop("later", {})
    stages = [lw.Stage("a", "2 epochs", reuse=True), lw.Stage("b", "1 epoch", **later)]
    return trainer.fit(kind(**given), data, valid, stages=stages, weight=weight)


@pytest.fixture(scope="module")
def _two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two") / "runs"
    assert two_stages(root).reused == []
    return root


@pytest.fixture
def two(_two: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_two, tmp_path / "copy"))


@pytest.mark.capability("B-12")
@pytest.mark.parametrize(
    "changes",
    [
        {"p": 0.6}, {"act": nn.Tanh}, {"loss": nn.CrossEntropyLoss(label_smoothing=0.3)}, {"hidden": 0.4},
        {"loss": nn.CrossEntropyLoss(torch.tensor([1.0, 3.0]))}, {"public": 1.0}, {"private": 1.0}, {"deep": 0.4},
        {"weight": of_lengths(1.0)}, {"rows": 1.0}, {"louder": 0.5}, {"kind": Other}, {"after": 3},
        {"handler": lambda run: run.optimizers["main"].param_groups[0].update(lr=0.2)},
        {"loss": lambda preds, target: nn.functional.cross_entropy(preds, target) * 2},
        *({"kind": touched(how)} for how in ("mode", "hook of a gradient", "hook of an accumulated gradient", "step")),
    ],
)  # fmt: skip
def test_what_a_fingerprint_of_settings_does_not_show_trains_again(changes: dict[str, Any], two: Path) -> None:
    """Settings of modules, loss and dataset, private and deep ones, what a function reads or has closed over."""
    assert two_stages(two, **changes).reused == []
    assert two_stages(two, **changes).reused == ["a"]
    assert two_stages(two).reused == ["a"]


@pytest.mark.capability("B-12")
@pytest.mark.parametrize(("name", "value"), [("SMOOTH", 0.4), ("WEIGHTS", {"classes": [1.0, 3.0]})])
def test_a_constant_of_the_module_that_a_step_reads_trains_again(
    name: str, value: Any, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), name, value)
    assert two_stages(two).reused == []
    assert two_stages(two).reused == ["a"]


def test_two_functions_of_one_maker_are_told_apart_by_what_they_have_closed_over(two: Path) -> None:
    assert two_stages(two, weight=of_lengths(1.0)).reused == []
    assert two_stages(two, weight=of_lengths(2.0)).reused == []
    assert two_stages(two, weight=of_lengths(1.0)).reused == ["a"]


class Follows(lw.Callback):
    """Watches, and keeps what it has seen."""

    def __init__(self, every: int = 1) -> None:
        self.every, self.seen = every, list[float]()

    def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
        if run.progress.step % self.every == 0:
            self.seen.append(float(result.values["loss"]))
            print(run.progress.step, self.seen[-1])


def test_what_only_watches_or_is_of_a_later_stage_leaves_a_stage_as_it_is(two: Path) -> None:
    watched: list[dict[str, Any]] = [
        {"watching": [Follows()]}, {"watching": [Follows(3)]}, {"log_every": "1 step"}, {"handler": print_step},
        {"later": {"lr": 0.01}}, {"later": {"schedule": lw.schedules.cosine(0.1, 0.0)}},
        {"later": {"callbacks": [Follows()]}}, {"later": {"optimizer": sgd(0.3)}},
    ]  # fmt: skip
    for changes in watched:
        assert two_stages(two, **changes).reused == ["a"], changes


def print_step(run: lw.Run) -> None:
    print(run.progress.step)


def test_what_only_measures_leaves_a_stage_as_it_is_unless_something_goes_by_it(folder: Path) -> None:
    def go(metric: Any, n: int, every: str, **first: Any) -> list[str]:
        seed_all(0)
        net = classifier()
        task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1), metrics=metric)
        trainer = lw.Trainer(folder=folder, name="x", progress=False, checkpoint=False, seed=1, validate_every=every)
        stages = [lw.Stage("a", "2 epochs", reuse=True, **first), lw.Stage("b", "1 epoch")]
        return trainer.fit(task, loader(17, batch_size=5), loader(n, batch_size=4), stages=stages).reused

    top, both = {"top": lw.metrics.Accuracy()}, {"top": lw.metrics.Accuracy(), "f1": lw.metrics.F1(classes=3)}
    assert go(top, 8, "1 epoch") == []
    for changed in ((both, 8, "1 epoch"), (top, 8, "2 steps")):
        assert go(*changed) == ["a"]
    with pytest.warns(lw.LoopwrightWarning, match="cannot be compared with what was measured before"):
        assert go(top, 12, "1 epoch") == ["a"]
    assert go(top, 8, "1 epoch", callbacks=[lw.KeepBest("valid/loss")]) == []
    for changed in ((top, 12, "1 epoch"), (top, 8, "2 steps")):
        assert go(*changed, callbacks=[lw.KeepBest("valid/loss")]) == []
    assert go(top, 8, "1 epoch", callbacks=[lw.KeepBest("valid/loss")]) == ["a"]


def test_the_schedule_of_the_task_goes_on_after_a_reused_stage_that_has_its_own(folder: Path, tmp_path: Path) -> None:
    def go(root: Path, gamma: float) -> tuple[lw.Run, list[float]]:
        seed_all(0)
        net, rates = classifier(), list[float]()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        task = lw.Supervised(
            net, nn.CrossEntropyLoss(), optimizer, schedule=torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        )
        stages = [
            lw.Stage("a", "3 epochs", reuse=True), lw.Stage("b", "1 epoch", lr=0.01, reuse=True),
            lw.Stage("c", "3 epochs"),
            lw.Stage("d", "3 epochs", optimizer=stepped(net.parameters(), gamma)),
        ]  # fmt: skip
        rated = acts(on_step_start=lambda run: rates.append(run.stage.phases[0].moved[0].param_groups[0]["lr"]))
        trainer = lw.Trainer(folder=root, name="x", progress=False, checkpoint=False, seed=1, callbacks=[rated])
        return trainer.fit(task, loader(10, batch_size=5), stages=stages), rates

    go(folder, 0.5)
    again, rates = go(folder, 0.1)
    anew, everything = go(tmp_path / "anew", 0.1)
    assert again.reused == ["a", "b"]
    assert rates == everything[8:]
    assert same(end(again), end(anew))


def stepped(params: Any, gamma: float) -> Any:
    optimizer = torch.optim.SGD(params, 0.2)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma)


def test_a_step_that_failed_in_a_kept_stage_can_be_made_again(folder: Path) -> None:
    def parts() -> tuple[lw.Supervised, list[Any], list[lw.Stage]]:
        net = torch.nn.Linear(1, 1)
        task = lw.Supervised(net, lambda preds, target: (preds / target).mean(), torch.optim.SGD(net.parameters(), 0.1))
        return task, [(torch.ones(2, 1), torch.full((2, 1), 1.0 - i)) for i in range(2)], [
            lw.Stage("kept", "1 epoch", reuse=True)
        ]  # fmt: skip

    task, data, stages = parts()
    with pytest.raises(lw.NonFiniteError):
        lw.Trainer(folder=folder, progress=False).fit(task, data, stages=stages)
    (path,) = folder.rglob("capsules/*")
    task, _, stages = parts()
    assert lw.replay(path, task, stages=stages).same_error
