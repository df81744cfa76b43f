"""TensorBoard, W&B and Neptune beside each of what ships: they show every loss, and change nothing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import loopwright as lw
from callbacks.test_pairs import ENTRIES, NAMES, Entry, Trial, result_of
from loopwright.loggers import WandbLogger, read_jsonl
from tiny import same
from tracked import plug_in
from trackers.test_plug_ins import read as sent_by
from trackers.test_tensorboard import read as events_of
from trackers.test_wandb import rows as rows_of

NEPTUNE = pytest.mark.skipif(find_spec("neptune_scale") is None, reason="neptune_scale is not installed")
FEW = ["MixUp", "EarlyStopping", "bf16", "accumulate", "a schedule", "oversampling", "GAN", "CSVLogger"]


def wanted(trial: Trial) -> dict[str, Any]:
    """The points of each loss: every step of training, every epoch of the validation."""
    history = trial.run.history
    if trial.run.comm.world_size > 1:  # the losses that a rank remembers are those of its part of each batch
        rows = read_jsonl(trial.run.folder / "metrics.jsonl")  # type: ignore[operator]
        train = [(row["step"], row["train/loss"]) for row in rows if row["kind"] == "train"]
        found = {"train/loss": [(at, pytest.approx(value)) for at, value in train]}
        assert len(train) > 3
    else:
        found = {f"train/{name}": list(enumerate(losses.tolist(), 1)) for name, losses in history.losses.items()}
    return found | {"valid/loss": list(zip(history.steps, history["valid/loss"], strict=True))}


def on_tensorboard(trial: Trial, name: str) -> None:
    assert trial.run.folder is not None
    events = events_of(trial.run.folder / "tensorboard")
    for logged, points in wanted(trial).items():
        assert [(e.step, e.value) for e in events.Scalars(logged)] == [(at, pytest.approx(v)) for at, v in points]


def on_wandb(trial: Trial, name: str) -> None:
    assert trial.run.folder is not None
    rows = rows_of(trial.run.folder)
    for logged, points in wanted(trial).items():
        found = [(row["_step"], row[logged]) for row in rows if logged in row]
        assert found == [(at, pytest.approx(v)) for at, v in points]


def on_neptune(trial: Trial, name: str) -> None:
    curves, _ = sent_by("neptune", trial.run)
    for logged, points in wanted(trial).items():
        assert curves[logged] == points


TRACKERS = {
    "TensorBoard": Entry(on_tensorboard, settings=lambda folder: {"loggers": ["tensorboard"]}, observes=True),
    "W&B": Entry(on_wandb, settings=lambda folder: {"loggers": [WandbLogger("a", mode="offline")]}, observes=True),
    "Neptune": Entry(on_neptune, settings=lambda folder: {"loggers": plug_in("neptune")}, observes=True),
}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, entry in TRACKERS.items():
        monkeypatch.setitem(ENTRIES, name, entry)


def both(tracker: str, other: str, folder: Path) -> None:
    """The pair, against the other one alone."""
    trial = Trial((other, tracker), folder / "both").fit()
    assert same(result_of(trial), result_of(Trial((other,), folder / "alone").fit()))
    for name in (tracker, other):
        ENTRIES[name].effect(trial, name)


@pytest.mark.slow
@pytest.mark.capability("FA-25")
@pytest.mark.filterwarnings("ignore")  # of the clients
@pytest.mark.parametrize("name", ["TensorBoard", "W&B", pytest.param("Neptune", marks=NEPTUNE)])
def test_each_with_two_ranks(name: str, tmp_path: Path) -> None:
    """TensorBoard, W&B and Neptune beside distributed training: rank 0 sends the losses over all ranks, once."""

    def rank(folder: Path) -> Any:
        ENTRIES.update(TRACKERS)
        trial = Trial((name,), folder).fit()
        if trial.run.comm.rank == 0:
            ENTRIES[name].effect(trial, name)
        return trial.run.comm.world_size, [p.detach().clone() for p in trial.run.task.parameters()]

    (size, first), (_, second) = lw.launch(rank, 2, tmp_path)
    assert size == 2
    assert same(first, second)


def few(names: list[str]) -> list[Any]:
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.nightly) for name in names]


@pytest.mark.capability("FA-25")
@pytest.mark.parametrize("other", NAMES)
def test_tensorboard_beside_each_other_one(other: str, tmp_path: Path) -> None:
    """TensorBoard in pairs with all that ships: its points are the losses of the run, whose bits are unchanged."""
    both("TensorBoard", other, tmp_path)


@pytest.mark.capability("FA-25")
@pytest.mark.parametrize("other", few([*NAMES, "TensorBoard"]))
def test_wandb_beside_each_other_one(other: str, tmp_path: Path) -> None:
    """W&B in pairs with all that ships: its rows are the losses of the run, whose bits are unchanged."""
    both("W&B", other, tmp_path)


@pytest.mark.capability("FA-25")
@NEPTUNE
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of the client
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("other", few([*NAMES, "TensorBoard", "W&B"]))
def test_neptune_beside_each_other_one(other: str, tmp_path: Path) -> None:
    """Neptune in pairs with all that ships: its points are the losses of the run, whose bits are unchanged."""
    both("Neptune", other, tmp_path)
