"""A run that goes on has the settings that it began with, or the user is told which one is another."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import Dataset

import loopwright as lw
from loopwright.compared import compared
from loopwright.errors import CheckpointError, LoopwrightWarning
from tiny import acts, bits, same, samples

X, Y = samples(24)


class Net(nn.Module):
    def __init__(self, drop: float = 0.1, act: nn.Module | None = None) -> None:
        super().__init__()
        self.drop = drop
        self.body = nn.Sequential(nn.Linear(5, 4), act or nn.Tanh(), nn.Dropout(drop), nn.Linear(4, 3))

    def forward(self, x: Any) -> Any:
        return self.body(x)


def without_dropout(net: Net) -> Net:
    """It stays so, since a fit leaves parts of a model in the mode in which they are."""
    net.body[2].eval()
    return net


class Scales(lw.Callback):
    """Changes what is trained."""

    def __init__(self, by: float = 2.0) -> None:
        self.by = by

    def map_loss(self, run: lw.Run, loss: Any, output: Any, batch: Any, phase: Any) -> Any:
        return loss * self.by


class Looks(lw.Callback):
    """Watches, also where it could change something."""

    def __init__(self, often: int = 1) -> None:
        self.often = often

    def map_loss(self, run: lw.Run, loss: Any, output: Any, batch: Any, phase: Any) -> Any:
        self.last = float(loss.detach())
        return loss

    def on_epoch_end(self, run: lw.Run) -> None:
        assert run.history


class Counts(lw.Callback):
    """Watches, and remembers."""

    steps = 0

    def on_step_end(self, run: lw.Run, result: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def loss_of(preds: Any, target: Any) -> Any:
    return nn.functional.cross_entropy(preds, target)


def other_loss(preds: Any, target: Any) -> Any:
    return nn.functional.multi_margin_loss(preds, target)


def adamw(**settings: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.AdamW(params, **{"lr": 0.01, **settings})


def step_lr(gamma: float) -> Callable[[Any], Any]:
    return lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma)


def fit(epochs: int = 2, resume: Any = "auto", **given: Any) -> lw.Run:
    """As a script would, each time with new objects; ``given`` is what somebody has changed in it."""
    torch.manual_seed(given.pop("weights", 1))
    named = {name: given.pop(name, None) for name in ("schedule", "metrics", "inputs", "targets")}
    net, loss = given.pop("net", None) or Net(), given.pop("loss", None) or nn.CrossEntropyLoss()
    kind = given.pop("task", lw.Supervised)
    optimizer = given.pop("optimizer", adamw())
    fitted = {name: given.pop(name) for name in ("valid", "stages", "weight") if name in given}
    train = given.pop("train", None) or lw.Loader((X, Y), 8, shuffle=True, seed=5)
    ends = {} if "stages" in fitted else {"epochs": epochs}
    handlers = given.pop("handlers", ())
    trainer = lw.Trainer(**{"progress": False, "name": "a", **ends, **given})
    for event, function in handlers:
        trainer.on(event)(function)
    return trainer.fit(kind(net, loss, optimizer, **named), train, resume=resume, **{"valid": (X[:8], Y[:8]), **fitted})


def changed(first: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    return {**first, **then}


# ------------------------------------------------------------------------------------------ what decides the bits

WEIGHTS = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 9.0])]
DECIDES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another loss": (
        {}, {"loss": nn.MultiMarginLoss()},
        "loss was <torch.nn.modules.loss.CrossEntropyLoss> and is <torch.nn.modules.loss.MultiMarginLoss>",
    ),
    "an argument of the loss": (
        {}, {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, "loss/label_smoothing was 0.0 and is 0.1"
    ),
    "weights of classes": (
        {"loss": nn.CrossEntropyLoss(weight=WEIGHTS[0])}, {"loss": nn.CrossEntropyLoss(weight=WEIGHTS[1])},
        "loss/weight was [1.0, 1.0, 1.0] and is [1.0, 1.0, 9.0]",
    ),
    "a loss function": ({"loss": loss_of}, {"loss": other_loss}, "loss was <NAME.loss_of> and is <NAME.other_loss>"),
    "a lambda": (
        {"loss": lambda p, t: loss_of(p, t)}, {"loss": lambda p, t: 2 * loss_of(p, t)},
        "loss is a lambda with another body",
    ),
    "which inputs": ({"inputs": 0}, {"inputs": [0]}, "task/inputs was 0 and is [0]"),
    "an activation": ({}, {"net": Net(act=nn.ReLU())}, "models/model/layers/body.1 was 'Tanh()' and is 'ReLU()'"),
    "a layer without weights": (
        {"net": nn.Sequential(nn.Linear(5, 3))}, {"net": nn.Sequential(nn.Linear(5, 3), nn.Tanh())},
        "models/model/layers/1 is new",
    ),
    "dropout": (
        {}, {"net": Net(0.5)},
        "models/model/drop was 0.1 and is 0.5\n  - models/model/layers/body.2 was 'Dropout(p=0.1, inplace=False)' and "
        "is 'Dropout(p=0.5, inplace=False)'",
    ),
    "a layer in eval mode": (
        {}, {"net": without_dropout(Net())}, "models/model/in_eval_mode was [] and is ['body.2']"
    ),
    "weight decay": ({}, {"optimizer": adamw(weight_decay=0.5)}, "optimizers/main/weight_decay was 0.01 and is 0.5"),
    "the rate of a group": (
        {"optimizer": lambda p: torch.optim.SGD([{"params": p, "lr": 0.1}], 1.0)},
        {"optimizer": lambda p: torch.optim.SGD([{"params": p, "lr": 0.2}], 1.0)},
        "optimizers/main/lr was 0.1 and is 0.2",
    ),
    "a schedule": (
        {"schedule": step_lr(0.5)}, {"schedule": step_lr(0.9)},
        "stages/main/phases/main/schedules/0/gamma was 0.5 and is 0.9",
    ),
    "clipping": ({}, {"clip_norm": 1.0}, "stages/main/phases/main/clip_norm was None and is 1.0"),
    "accumulation": ({}, {"accumulate": 2}, "stages/main/accumulate was 1 and is 2"),
    "precision": ({}, {"precision": "bf16"}, "precision was 'fp32' and is 'bf16'"),
    "non-finite steps": ({"nonfinite": "skip 3"}, {"nonfinite": "skip 9"}, "nonfinite was 'skip 3' and is 'skip 9'"),
    "seed": ({"seed": 1}, {"seed": 2}, "seed was 1 and is 2"),
    "deterministic": ({}, {"deterministic": True}, "deterministic was False and is True"),
    "a transform": (
        {}, {"train": lw.Loader((X, Y), 8, shuffle=True, seed=5, transform=lambda s: (s[0] * 2, s[1]))},
        "stages/main/data/transform was None and is <NAME.<lambda>>",
    ),
    "a callback that is new": ({}, {"callbacks": [Scales()]}, "callbacks was [] and is [<NAME.Scales>]"),
    "a callback that is gone": (
        {"callbacks": [lw.MixUp(0.3, classes=3)]}, {"callbacks": []},
        "callbacks was [<loopwright.callbacks.mixup.MixUp>] and is []",
    ),
    "an argument of a callback": (
        {"callbacks": [Scales(), Looks()]}, {"callbacks": [Scales(3.0)]}, "callbacks/0/by was 2.0 and is 3.0"
    ),
    "a weight": (
        {"weight": lambda b: len(b[0])}, {"weight": lambda b: 2 * len(b[0])},
        "stages/main/weight is a lambda with another body",
    ),
    "what a stage freezes": (
        {"stages": [lw.Stage("a", "1 epoch")]}, {"stages": [lw.Stage("a", "2 epochs", freeze="module.body.0.*")]},
        "stages/a/freeze was None and is 'module.body.0.*'",
    ),
    "the loss of a stage": (
        {"stages": [lw.Stage("a", "1 epoch")]}, {"stages": [lw.Stage("a", "2 epochs", loss=nn.MultiMarginLoss())]},
        "stages/a/loss was None and is <torch.nn.modules.loss.MultiMarginLoss>",
    ),
    "a stage before": (
        {"stages": [lw.Stage("a", "1 epoch")]}, {"stages": [lw.Stage("b", "1 epoch"), lw.Stage("a", "1 epoch")]},
        "the stages began with 'a' and are 'b', 'a'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DECIDES)
def test_what_decides_the_bits_is_refused_with_its_name_and_both_values_and_what_to_type(what: str) -> None:
    first, then, says = DECIDES[what]
    fit(1, **first)
    before = {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError) as caught:
        fit(**changed(first, then))
    assert str(caught.value).partition("\n")[2] == (
        f"  - {says.replace('NAME', __name__)}\nMend that; or begin another run, resume=None, also from these weights, "
        "resume='weights'; or go on all the same: fit(..., resume='approximate')"
    )
    assert {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("what", ["another loss", "a callback that is new", "clipping"])
def test_each_thing_that_the_refusal_names_can_be_typed(what: str) -> None:
    first, then, says = DECIDES[what]
    start = fit(1, **first)
    on = fit(**changed(first, then), resume="approximate")
    assert (on.folder, on.progress.epoch) == (start.folder, 2)
    record = json.loads((on.folder / "run.json").read_text())  # type: ignore[operator]
    assert says.replace("NAME", __name__) in record["changes"][0]["settings"]
    assert fit(3, **changed(first, then)).progress.epoch == 3  # from then on the new settings are those of the run
    for how in ("weights", None):
        assert fit(1, **changed(first, then), resume=how).folder != start.folder


# ------------------------------------------------------------------------------------------ what does not

FREE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "other fresh weights": ({}, {"weights": 2}),
    "another logger": ({}, {"loggers": ["csv"]}),
    "checkpoints": ({}, {"checkpoint": lw.Checkpoint("2 steps")}),
    "when to log": ({}, {"log_every": 2}),
    "when to validate": ({}, {"validate_every": "2 steps"}),
    "a handler": ({}, {"handlers": [(lw.Event.EPOCH_END, lambda run: None)]}),
    "who watches": ({"callbacks": [Looks(1)]}, {"callbacks": [Looks(2), acts(on_step_end=lambda run, result: None)]}),
    "patience": (
        {"callbacks": [lw.EarlyStopping("valid/loss", patience=3)]},
        {"callbacks": [lw.EarlyStopping("valid/loss", patience=5)]},
    ),
    "no early stopping": ({"callbacks": [lw.EarlyStopping("valid/loss", patience=3)]}, {"callbacks": []}),
    "a watcher with a memory": ({"callbacks": [Counts()]}, {"callbacks": []}),
    "a lambda written again": ({"loss": lambda p, t: loss_of(p, t)}, {"loss": lambda p, t: loss_of(p, t)}),
    "workers": ({}, {"train": lw.Loader((X, Y), 8, shuffle=True, seed=5, workers=1)}),
    "a stage more": (
        {"stages": [lw.Stage("a", "1 epoch")]},
        {"stages": [lw.Stage("a", "1 epoch"), lw.Stage("b", "1 epoch", freeze="module.body.0.*")]},
    ),
}


@pytest.mark.parametrize("what", FREE)
def test_what_decides_nothing_is_silent_and_the_bits_are_those_of_the_run_that_was_never_stopped(what: str) -> None:
    first, then = FREE[what]
    start = fit(1, **first)
    run = fit(**changed(first, then))  # a warning would be an error
    whole = fit(**{**changed(first, then), "weights": 1}, name="whole")
    assert (run.folder, run.progress.step) == (start.folder, 6)
    assert same(bits(run.task)[0], bits(whole.task)[0])


MEASURES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another metric": (
        {"metrics": {"top": lw.metrics.Accuracy()}}, {"metrics": {"top": lw.metrics.Accuracy(top_k=2)}},
        "metrics/top/top_k was 1 and is 2",
    ),
    "a metric by another name": (
        {"metrics": {"top": lw.metrics.Accuracy()}}, {"metrics": {"best": lw.metrics.Accuracy()}},
        "metrics/top is gone",
    ),
    "a metric of another kind": (
        {"metrics": {"top": lw.metrics.Accuracy()}}, {"metrics": {"top": lw.metrics.Mean("loss")}},
        "metrics/top was <loopwright.metrics.accuracy.Accuracy> and is <loopwright.metrics.averages.Mean>",
    ),
    "more to validate on": (
        {}, {"valid": (X, Y)},
        "the data of stages/main/valid/valid has 24 samples, and had 8 when the checkpoint was written",
    ),
    "other values to validate on": (
        {}, {"valid": (X[:8] + 1, Y[:8])},
        "the data of stages/main/valid/valid has other values than when the checkpoint was written, in the same number "
        "and shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("stop", ["an epoch", "a step"])
@pytest.mark.parametrize("what", MEASURES)
def test_what_only_measures_goes_on_to_the_same_bits_with_one_warning(what: str, stop: str) -> None:
    first, then, says = MEASURES[what]
    saves = {"checkpoint": lw.Checkpoint("1 step", keep=9)}
    start = fit(1, **first, **saves)
    assert start.folder is not None
    at = start.folder / f"checkpoints/step-0000000{3 if stop == 'an epoch' else 2}"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = fit(**changed(first, then), resume=at)
    step = at.name[-1]
    assert [(str(one.message), one.filename, one.category) for one in told] == [(
        f"the run goes on, but what is measured from step {step} on cannot be compared with what was measured before: "
        f"{says}", __file__, LoopwrightWarning,
    )]  # fmt: skip
    whole = fit(**changed(first, then), name="whole")
    assert same(bits(run.task)[0], bits(whole.task)[0])
    assert run.metrics.keys() >= whole.metrics.keys()


def test_where_a_schedule_goes_by_the_validation_its_data_decides() -> None:
    def plateau(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)

    fit(1, schedule=plateau)
    with pytest.raises(CheckpointError, match="the data of stages/main/valid/valid has 24 samples, and had 8"):
        fit(schedule=plateau, valid=(X, Y))


# ------------------------------------------------------------------------------------------ config.yaml


def test_the_folder_has_the_settings_of_now_and_what_they_were() -> None:
    start = fit(1)
    assert start.folder is not None
    run = fit(callbacks=[Looks(4)], checkpoint=lw.Checkpoint("2 steps"))
    config = yaml.safe_load((start.folder / "config.yaml").read_text())
    assert (config["epochs"], config["checkpoint"]["every"]) == (2, "2 steps")
    assert config == {**run.config}
    record = json.loads((start.folder / "run.json").read_text())
    (change,) = record["changes"]
    assert change["at"] == record["restarts"][0]
    assert change["step"] == 3
    assert change["settings"] == [
        "epochs was 1 and is 2", "checkpoint/every was '5 min' and is '2 steps'",
        "stages/main/until was ['1 epoch'] and is ['2 epochs']",
        f"callbacks that watch was [] and is [<{__name__}.Looks>]",
    ]  # fmt: skip
    fit(3)
    record = json.loads((start.folder / "run.json").read_text())
    assert [one["step"] for one in record["changes"]] == [3, 6]


def test_a_task_fitted_again_in_one_process_writes_its_settings_anew_and_is_not_refused_later() -> None:
    def lower(run: lw.Run) -> None:
        for group in run.optimizers["main"].param_groups:
            group["lr"] *= 0.5  # by hand: no schedule knows what it was

    torch.manual_seed(1)
    net = Net()
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.AdamW(net.parameters(), 0.01))
    train = lw.Loader((X, Y), 8, shuffle=True, seed=5)
    for epochs in (1, 2):
        user = lw.Trainer(epochs, name="a", progress=False)
        user.on(lw.Event.EPOCH_END)(lower)
        run = user.fit(task, train, (X[:8], Y[:8]))
    assert run.folder is not None
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["epochs"] == 2
    assert fit(3, handlers=[(lw.Event.EPOCH_END, lower)]).optimizers["main"].param_groups[0]["lr"] == 0.01 / 8


# ------------------------------------------------------------------------------------------ code

SCRIPT = """
import sys
import torch
import loopwright as lw

SCALE = 1.0

def helper(loss):
    return loss * SCALE

class Digits(lw.Task):
    rate = 0.1

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.net = torch.nn.Linear(3, 1)

    def training_step(self, batch):
        '''The loss.'''
        return helper(torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

class Logs(lw.Callback):
    def on_epoch_end(self, run):
        pass

torch.manual_seed(0)
data = (torch.randn(20, 3), torch.randn(20, 1))
trainer = lw.Trainer(epochs=EPOCHS, progress=False, name="a", callbacks=[Logs()])
trainer.fit(Digits(4), lw.Loader(data, 5, shuffle=True), resume="auto")
"""
EDITS = [
    ("", "", []),
    ("'''The loss.'''", "'''The loss, in other words.'''  # and a comment", []),
    ("        pass", "        assert run.history", []),  # of who only looks
    ("self.net(batch[0]), batch[1]", "self.net(batch[0]), 2 * batch[1]", ["the code of __main__.Digits.training_step"]),
    ("return loss * SCALE", "return loss + SCALE", ["the code of __main__.helper"]),
    ("SCALE = 1.0", "SCALE = 3.0", ["__main__.SCALE, which was 1.0 and is 3.0"]),
    ("rate = 0.1", "rate = 0.2", ["  - task/rate was 0.1 and is 0.2"]),
]
STARTS = """
import json, runpy, shutil, sys, warnings
from pathlib import Path

def start(text, epochs):
    Path("train.py").write_text(text.replace("EPOCHS", str(epochs)))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            runpy.run_path("train.py", run_name="__main__")
        except Exception as error:
            return [str(error)]
    return [str(one.message) for one in told]

texts = json.loads(Path("texts.json").read_text())
assert start(texts[0], 1) == []
shutil.copytree("runs", "kept")
said = []
for text in texts:
    shutil.rmtree("runs")
    shutil.copytree("kept", "runs")
    said.append(start(text, 2))
print(json.dumps(said))
"""


@pytest.mark.slow
def test_an_edit_of_what_trains_is_told_and_one_of_a_comment_or_of_what_only_looks_is_not() -> None:
    Path("starts.py").write_text(STARTS)
    Path("texts.json").write_text(json.dumps([SCRIPT.replace(old, new) for old, new, _ in EDITS]))
    done = subprocess.run([sys.executable, "starts.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for (_, _, says), said in zip(EDITS, json.loads(done.stdout), strict=True):
        assert len(said) == len(says)
        for one, told in zip(says, said, strict=True):
            assert one in told
            if "task/rate" not in one:
                assert told.startswith(f"the run goes on, but {one}: not as it was when runs/a/")
                assert told.endswith(
                    "step-00000004 was written. If what it computes has changed, the rest of the run is another one"
                )


# ------------------------------------------------------------------------------------------ what is not compared


class Staged(Dataset[Any]):
    """Data that a job copies to a place of its own."""

    def __init__(self, root: str) -> None:
        self.root = root

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> Any:
        return X[i], Y[i]


def test_names_of_files_and_folders_may_change_from_job_to_job() -> None:
    def loader(root: str) -> Any:
        return torch.utils.data.DataLoader(Staged(root), 8, shuffle=True)

    fit(1, train=loader("/scratch/job-1/data"))
    assert fit(train=loader("/scratch/job-2/data")).progress.epoch == 2


class Projected(nn.Module):
    """Has a buffer of random numbers, which is in checkpoints."""

    scale: torch.Tensor

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.net = nn.Linear(5, 3)

    def forward(self, x: Any) -> Any:
        return self.net(x * self.scale)


def test_what_a_checkpoint_puts_back_may_begin_with_other_random_numbers() -> None:
    start = fit(1, net=Projected(torch.rand(5)))
    run = fit(net=Projected(torch.rand(5)))
    assert torch.equal(run.models["model"].scale, start.models["model"].scale)


class Configured(lw.Supervised):
    """Is given all settings of a script at once."""

    def __init__(self, net: Any, loss: Any, optimizer: Any, *, args: Any = None, **more: Any) -> None:
        super().__init__(net, loss, optimizer, **more)
        self.args = args


def scaled_by(factor: float, epochs: int) -> Any:
    def loss(preds: Any, target: Any) -> Any:
        assert epochs
        return factor * loss_of(preds, target)

    return loss


def test_what_a_function_has_closed_over_is_told_by_its_name() -> None:
    fit(1, loss=scaled_by(2.0, 1))
    fit(2, loss=scaled_by(2.0, 2))  # longer is no other run
    with pytest.warns(LoopwrightWarning, match=r"scaled_by.<locals>.loss.factor, which was 2.0 and is 3.0: not as it"):
        fit(3, loss=scaled_by(3.0, 3))


def test_settings_that_a_script_hands_on_as_a_whole_are_compared_but_for_how_long_it_trains() -> None:
    def task(**args: Any) -> Any:
        return lambda *given, **named: Configured(*given, args=argparse.Namespace(**args), **named)

    fit(1, task=task(epochs=1, temperature=0.5))
    fit(2, task=task(epochs=2, temperature=0.5))
    with pytest.raises(CheckpointError, match=r"with the same bits:\n  - task/args/temperature was 0.5 and is 0.7\n"):
        fit(3, task=task(epochs=3, temperature=0.7))


def test_settings_of_another_version_and_addresses_are_not_compared_and_nan_is_nan() -> None:
    assert compared({"gone": 1, "loss": "<f at 0x7f01>", "nonfinite": float("nan")},
                    {"new": 1, "loss": "<f at 0x7f02>", "nonfinite": float("nan")}) == ([], [], [])  # fmt: skip


@pytest.mark.parametrize(
    ("was", "now", "same_one"),
    [
        ("<__main__.Net>", "<pkg.train.Net>", True),
        ("<pkg.train.Net>", "<__main__.Net>", True),
        ("<__main__.Net>", "<pkg.train.Other>", False),
        ("<pkg.old.Net>", "<pkg.new.Net>", False),
    ],
)
def test_a_script_that_is_run_and_imported_is_one_module(was: str, now: str, same_one: bool) -> None:
    """``python -m pkg.train`` calls its classes ``__main__.Net``; whoever imports it has ``pkg.train.Net``."""
    told = compared({"loss": {"class": was}}, {"loss": {"class": now}}).decides
    assert told == ([] if same_one else [f"loss was {was} and is {now}"])
