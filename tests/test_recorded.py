"""What a step returns is in the records of steps, of epochs, or both, and in the bar, as the task says of each."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import loopwright as lw
from loopwright.loggers import read_jsonl
from tiny import line, pairs, trainer

DATA = pairs([1.0, 3.0], [5.0], [2.0, 4.0], [8.0])  # 4 batches: 2, 1, 2 and 1 samples


class Returns(lw.Task):
    """Says x five times, each under a name of its own; what is minimised is the loss."""

    recorded: ClassVar[dict[str, str]] = {
        "steps": "step",
        "epochs": "epoch",
        "watched": "step epoch bar",
        "hidden": "step epoch",
    }

    def __init__(self) -> None:
        super().__init__()
        self.net = line(1.0)

    def training_step(self, batch: Any) -> dict[str, Any]:
        x = batch[0].mean()
        return {"loss": self.net(batch[0]).mean(), **dict.fromkeys(("plain", *Returns.recorded), x)}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    (file,) = folder.glob("*/*/metrics.jsonl")
    return [record for record in read_jsonl(file) if record["kind"] == kind]


@pytest.mark.capability("PL-21")
def test_each_value_is_in_the_records_that_the_task_says(folder: Path) -> None:
    """Values at steps, at epochs or both, as means by samples, without a line of code at the end of an epoch."""
    best = lw.Checkpoint("1 epoch", monitor="valid/epochs", mode="min", keep=1)
    stop = lw.EarlyStopping("train/epochs", mode="max", patience=1)
    user = trainer(epochs=5, folder=folder, log_every=2, checkpoint=best, callbacks=[stop])
    run = user.fit(Returns(), DATA, pairs([7.0]))
    two = [(1 + 3 + 5) / 3, (2 + 4 + 8) / 3]  # by samples, since the last record
    steps = records(folder, "train")[:2]
    for name in ("plain", "steps", "watched", "hidden"):
        assert [record[f"train/{name}"] for record in steps] == pytest.approx(two)
    assert not any("train/epochs" in record for record in records(folder, "train"))
    for record in (*run.history, *records(folder, "epoch")):
        for name in ("plain", "epochs", "watched", "hidden"):
            assert record[f"train/{name}"] == pytest.approx(23 / 6)
        assert "train/steps" not in record
        assert record["valid/steps"] == 7.0  # a validation is no mean of steps
    assert run.stop_reason.startswith("train/epochs has not improved")
    assert run.progress.epoch == 2
    assert best.best.name == "step-00000004"
    # the loss was chosen to be minimised, and nothing else: two epochs down the mean of x of each batch
    assert run.task.net.weight.item() == pytest.approx(1 - 0.1 * 2 * (2 + 5 + 3 + 8))


def lines(task: lw.Task, **settings: Any) -> list[str]:
    file = io.StringIO()
    bar = lw.ProgressBar(file=file, mode="lines", **settings)
    lw.Trainer(epochs=1, folder=None, progress=bar).fit(task, DATA)
    return file.getvalue().splitlines()


@pytest.mark.capability("PL-21")
def test_the_bar_shows_what_is_to_be_shown() -> None:
    """A value is shown in the bar or not, as the task says; the bar may be told for itself."""
    (shown,) = (text for text in lines(Returns()) if text.startswith("epoch 1/1"))
    assert "watched" in shown
    assert "plain" in shown
    assert "hidden" not in shown
    assert "epochs " not in shown
    (chosen,) = (text for text in lines(Returns(), metrics=["train/hidden"]) if text.startswith("epoch 1/1"))
    assert "hidden" in chosen
    assert "watched" not in chosen


def test_a_value_of_the_bar_is_shown_while_an_epoch_goes_on() -> None:
    bar = lw.ProgressBar(file=io.StringIO(), mode="terminal")
    seen: list[set[str]] = []
    user = lw.Trainer(epochs=1, folder=None, progress=bar, log_every=1)
    user.on(lw.Event.STEP_END)(lambda run: seen.append({cell.name for cell in bar._training(run).cells}))
    user.fit(Returns(), DATA)
    assert {"train/loss", "train/watched"} <= seen[-1]
    assert not {"train/plain", "train/hidden", "train/steps"} & seen[-1]


def test_records_go_on_after_a_resume_as_if_it_had_not_been(tmp_path: Path) -> None:
    def fit(folder: Path, steps: int) -> lw.Run:
        torch.manual_seed(0)
        keep = lw.Checkpoint("1 step")
        user = trainer(steps=steps, folder=folder, name="x", log_every=3, checkpoint=keep)
        return user.fit(Returns(), DATA, resume="auto")

    def told(folder: Path, kind: str) -> list[dict[str, Any]]:
        return [{k: v for k, v in record.items() if k != "seconds"} for record in records(folder, kind)]

    fit(tmp_path / "whole", 11)
    for stop in range(1, 11):
        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            interrupted(folder, stop)
        fit(folder, 11)
        for kind in ("train", "epoch"):
            assert told(folder, kind) == told(tmp_path / "whole", kind), f"stopped after {stop}"


def interrupted(folder: Path, stop: int) -> None:
    torch.manual_seed(0)
    user = trainer(steps=11, folder=folder, name="x", log_every=3, checkpoint=lw.Checkpoint("1 step"))

    @user.on(lw.Event.STEP_END(once=stop + 1))
    def leave(run: lw.Run) -> None:
        raise KeyboardInterrupt

    user.fit(Returns(), DATA)


@pytest.mark.parametrize(
    ("recorded", "problem"),
    [
        (["kl"], "Odd.recorded is ['kl']; it says in which records values are, such as"),
        (
            {"kl": "epochs"},
            "Odd.recorded['kl'] is 'epochs'; expected 'step', 'epoch' or both, with 'bar' to show it in",
        ),
        ({"kl": "bar"}, "Odd.recorded['kl'] is 'bar'; expected 'step', 'epoch' or both, with 'bar' to show it in"),
        ({"kl": True}, "Odd.recorded['kl'] is True; expected 'step', 'epoch' or both, with 'bar' to show it in"),
        ({"kl": ""}, "Odd.recorded['kl'] is ''; expected 'step', 'epoch' or both, with 'bar' to show it in"),
    ],
)
def test_what_cannot_be_meant_is_refused(recorded: Any, problem: str) -> None:
    odd = type("Odd", (Returns,), {"recorded": recorded})()
    (told,) = trainer(epochs=1).plan(odd, DATA).problems
    assert told.startswith(problem)


def test_a_value_of_steps_alone_cannot_be_watched_by_epochs() -> None:
    plan = trainer(epochs=1, callbacks=[lw.EarlyStopping("train/steps", mode="max")]).plan(Returns(), DATA)
    assert plan.problems == [
        "EarlyStopping monitors 'train/steps', which Returns.recorded keeps out of the records of epochs; write "
        "recorded = {'steps': 'step epoch', ...}"
    ]


def test_a_name_that_nothing_returns_is_told_after_an_epoch() -> None:
    odd = type("Odd", (Returns,), {"recorded": {"plane": "epoch"}})()
    with pytest.warns(lw.LoopwrightWarning, match=r"Odd\.recorded says where 'plane' .* Did you mean 'plain'\?"):
        trainer(epochs=2).fit(odd, DATA)
