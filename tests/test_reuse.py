"""A finished stage that has not changed is not trained again: its end is loaded, with the bits of having trained it."""

from __future__ import annotations

import shutil
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
        {"weights": 2}, {"seed": 8}, {"data": True}, {"adam": 0.02}, {"callback": 2}, {"clip_norm": 1.0},
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
    """The same names with another step: the file in which the task stands has changed."""
    import importlib
    import sys

    source = (
        "import torch, loopwright as lw\n"
        "class T(lw.Task):\n"
        "    def __init__(self):\n        super().__init__()\n        self.net = torch.nn.Linear(1, 1)\n"
        "    def training_step(self, batch):\n        return self.net(batch).SOMETHING\n"
        "    def configure_optimizers(self):\n        return torch.optim.SGD(self.parameters(), 0.1)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        found = []
        for i, text in enumerate(("mean()", "mean()", "sum()")):
            (tmp_path / f"users_task_{i}.py").write_text(source.replace("SOMETHING", text))
            kind = importlib.import_module(f"users_task_{i}").T
            kind.__module__, kind.__qualname__ = "users_task_0", "T"
            sys.modules["users_task_0"] = sys.modules[f"users_task_{i}"]
            torch.manual_seed(0)
            trainer = lw.Trainer(folder=tmp_path / "runs", progress=False, checkpoint=False, seed=1)
            stages = [lw.Stage("a", "1 epoch", reuse=True), lw.Stage("b", "1 epoch")]
            found.append(trainer.fit(kind(), [torch.ones(2, 1)], stages=stages).reused)
        assert found == [[], ["a"], []]
    finally:
        sys.path.remove(str(tmp_path))
        for name in [name for name in sys.modules if name.startswith("users_task_")]:
            del sys.modules[name]


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
