"""The logger that docs/loggers.md shows how to write: short, found by name, and exact after a resume."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest

import loopwright as lw
from test_docs import ROOT, script
from tiny import line, pairs, sgd_task, trainer

DATA = pairs([1.0], [2.0], [3.0], [4.0])


def printed() -> Any:
    """The class as it is printed."""
    text = script((ROOT / "docs" / "loggers.md").read_text(encoding="utf-8"))
    found = re.search(r"^class SQLiteLogger:\n(?:(?: .*)?\n)*", text, re.M)
    assert found is not None
    names: dict[str, Any] = {"lw": lw, "json": json, "sqlite3": sqlite3}
    exec(found[0], names)
    names["SQLiteLogger"].length = len(found[0].split("\n"))
    return names["SQLiteLogger"]


@pytest.fixture
def sqlite_logger() -> Any:
    return printed()


def rows(run: lw.Run) -> list[Any]:
    with sqlite3.connect("runs.db") as db:
        found = db.execute("select step, name, value from points where run = ? order by rowid", (str(run.folder),))
        return found.fetchall()


@pytest.mark.capability("GEN-05")
def test_a_tracker_is_a_plug_in_of_less_than_50_lines_that_loses_and_repeats_nothing(
    sqlite_logger: Any, folder: Path
) -> None:
    """A tracker of one's own takes less than 50 lines, is stopped and goes on without a row twice."""
    assert sqlite_logger.length < 50

    def fit(name: str, stop_at: int = 0) -> lw.Run:
        user = trainer(epochs=3, log_every=1, loggers=[sqlite_logger()], folder=folder, name=name,
                       checkpoint=lw.Checkpoint("5 steps", at_end=False))  # fmt: skip

        def stop(run: lw.Run) -> None:
            if run.progress.step == stop_at:
                raise OSError("the power went off")

        user.on(lw.Event.STEP_END)(stop)
        return user.fit(sgd_task(line(), lr=0.1), DATA, resume="auto")

    whole = rows(fit("whole"))
    assert len(whole) == 12 * 2 + 3  # loss and learning rate of each step, the loss of each epoch
    for stop_at in range(1, 13):
        with pytest.raises(OSError, match="the power went off"):
            fit(f"stopped-{stop_at}", stop_at)
        resumed = fit(f"stopped-{stop_at}")
        assert rows(resumed) == whole, stop_at


def test_settings_and_data_are_in_it(sqlite_logger: Any, folder: Path) -> None:
    run = trainer(epochs=1, loggers=[sqlite_logger()], folder=folder).fit(sgd_task(line(), lr=0.125), DATA)
    with sqlite3.connect("runs.db") as db:
        ((config,),) = db.execute("select config from configs where run = ?", (str(run.folder),))
    assert json.loads(config)["settings"]["optimizers"]["main"]["lr"] == 0.125
