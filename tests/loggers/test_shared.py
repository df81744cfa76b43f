"""One file for many runs: each row says of which run it is, and no run takes what is of another."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

import loopwright as lw
from loopwright.loggers import read_jsonl
from tiny import line, pairs, sgd_task, trainer

DATA = pairs([1.0], [2.0], [3.0], [4.0])
KINDS = pytest.mark.parametrize("kind", [lw.CSVLogger, lw.JSONLLogger])


def fit(logger: Any, **settings: Any) -> lw.Run:
    resume = settings.pop("resume", None)
    user = trainer(**{"epochs": 2, "log_every": 1, "loggers": [logger], **settings})
    return user.fit(sgd_task(line(), lr=0.25), DATA, resume=resume)


def rows(path: str) -> list[tuple[str, str, int]]:
    """Run, kind and step of each record."""
    if path.endswith(".csv"):
        with open(path, newline="") as file:
            found: list[dict[str, Any]] = list(csv.DictReader(file))
    else:
        found = read_jsonl(path)
    return [(row["run"], row["kind"], int(row["step"])) for row in found]


@KINDS
def test_rows_of_several_runs_are_told_apart_by_the_end_of_their_folder(kind: Any, folder: Path) -> None:
    runs = [fit(kind("all.csv" if kind is lw.CSVLogger else "all.jsonl"), folder=folder, name=n) for n in ("a", "b")]
    found = rows("all.csv" if kind is lw.CSVLogger else "all.jsonl")
    labels = [f"{run.folder.parent.name}/{run.folder.name}" for run in runs if run.folder]
    assert [label for label, _, _ in found] == [label for label in labels for _ in range(len(found) // 2)]
    assert labels[0].startswith("a/")
    assert labels[1].startswith("b/")


@KINDS
def test_runs_without_a_folder_are_told_apart_and_one_that_is_continued_is_one_run(kind: Any) -> None:
    path = "all.csv" if kind is lw.CSVLogger else "all.jsonl"
    logger, task = kind(path), sgd_task(line(), lr=0.25)
    for epochs in (1, 2):
        trainer(epochs=epochs, log_every=4, loggers=[logger]).fit(task, DATA)
    fit(logger)
    found = rows(path)
    first, second = dict.fromkeys(label for label, _, _ in found)
    assert first.startswith("Supervised/")
    assert [step for label, kind, step in found if (label, kind) == (first, "epoch")] == [4, 8]
    assert [step for label, kind, step in found if (label, kind) == (second, "epoch")] == [4, 8]


@KINDS
def test_a_resume_drops_rows_of_its_own_run_and_none_of_another(kind: Any, folder: Path) -> None:
    """The first run is interrupted at step 5 of 8, its last checkpoint is of step 4; another run writes meanwhile."""
    path = "all.csv" if kind is lw.CSVLogger else "all.jsonl"

    def stop(run: lw.Run) -> None:
        if run.progress.step == 5:
            raise OSError("the power went off")

    user = trainer(
        epochs=2, log_every=1, folder=folder, name="first", loggers=[kind(path)],
        checkpoint=lw.Checkpoint("4 steps", at_end=False, on_error="raise"),
    )  # fmt: skip
    user.on(lw.Event.STEP_END(once=5))(stop)
    with pytest.raises(OSError, match="the power went off"):
        user.fit(sgd_task(line(), lr=0.25), DATA)
    fit(kind(path), folder=folder, name="other")
    between = rows(path)
    other = between[-1][0]
    (at,) = folder.glob("first/*/checkpoints/*4")
    fit(kind(path), folder=folder, name="first", resume=at)
    after = rows(path)
    assert [row for row in after if row[0] == other] == [row for row in between if row[0] == other]
    first = [row[1:] for row in after if row[0] != other]
    assert first == [row[1:] for row in between if row[0] == other]  # the very records of a run that nothing stopped


def test_runs_that_are_sent_to_one_table_by_turns_stay_whole(folder: Path) -> None:
    a, b = (fit(lw.JSONLLogger(), folder=folder, name=name).folder for name in ("a", "b"))
    assert a
    assert b
    for one in (a, b):
        assert lw.loggers.send(one, "csv:all.csv") == 10
    with (a / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "test", "step": 8, "test/loss": 0.5}\n')
    assert lw.loggers.send(a, "csv:all.csv") == 1
    assert lw.loggers.send(b, "csv:all.csv") == 0
    names = [label.partition("/")[0] for label, _, _ in rows("all.csv")]
    assert (names.count("a"), names.count("b")) == (11, 10)
