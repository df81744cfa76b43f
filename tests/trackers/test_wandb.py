"""What the offline files of W&B hold, read by its own message types."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import loopwright as lw
from loopwright.loggers import WandbLogger, send
from tiny import line, sgd_task, trainer
from tracked import DATA, expected, failed, fit, killed
from wandb_files import curves, read, rows


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


pytestmark = pytest.mark.usefixtures("offline")


def test_a_row_has_all_values_of_a_step(folder: Path) -> None:
    run = fit("wandb", folder)
    assert run.folder is not None
    assert curves(run.folder) == expected(run)
    assert Counter(row["_step"] for row in rows(run.folder)) == Counter(range(1, 13))
    (begun,) = [r.run for r in read(run.folder) if r.WhichOneof("record_type") == "run"][:1]
    assert (begun.project, begun.display_name) == ("digits", run.folder.name)


def test_settings_figures_texts_and_files_are_there(folder: Path) -> None:
    user = trainer(epochs=1, loggers=[WandbLogger("a-project", mode="offline")], folder=folder)
    Path("labels.txt").write_text("cat")
    figure = plt.figure(figsize=(2, 1), dpi=50)
    things = {"drawn": figure, "note": "look", "labels": Path("labels.txt")}
    user.on(lw.Event.STEP_END(once=2))(lambda run: run.log(things))
    run = user.fit(sgd_task(line(), lr=0.125), DATA)
    plt.close(figure)
    assert run.folder is not None
    (shown,) = [row for row in rows(run.folder) if "note" in row]
    assert (shown["_step"], shown["note"]) == (2, "look")
    (image,) = [row for row in rows(run.folder) if any(name.startswith("drawn") for name in row)]
    assert image["_step"] == 2
    assert list(run.folder.glob("wandb/offline-run-*/files/media/images/drawn_*.png"))
    found = read(run.folder)
    config = {
        u.key or "/".join(u.nested_key): u.value_json for r in found for u in (*r.run.config.update, *r.config.update)
    }
    assert json.loads(config["settings"])["optimizers"]["main"]["lr"] == 0.125
    assert json.loads(config["data"])["kind"] == "list of batches"
    assert any("labels.txt" in str(r) for r in found)


@pytest.mark.parametrize("kill_at", [11])
def test_a_killed_run_goes_on_as_the_same_run_without_a_row_twice(folder: Path, kill_at: int) -> None:
    killed("wandb", folder, "killed", kill_at)
    run = fit("wandb", folder, "killed")
    assert run.folder is not None
    assert run.resumed_from is not None
    files = list(run.folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # of one run
    assert curves(run.folder) == expected(run)


def test_a_failed_run_goes_on_without_a_row_twice(folder: Path) -> None:
    failed("wandb", folder, "failed", 8)
    (begun,) = folder.glob("failed/*")
    rows(begun)  # until W&B has closed its file
    run = fit("wandb", folder, "failed")
    assert run.folder is not None
    assert curves(run.folder) == expected(run)


def test_a_recorded_run_is_sent_once(folder: Path) -> None:
    run = fit(None, folder)
    assert run.folder is not None
    assert send(run.folder, "wandb") > 0
    assert send(run.folder, "wandb") == 0
    assert curves(run.folder) == expected(run)


def test_runs_of_the_user_in_the_same_process_stay_as_they_are(folder: Path) -> None:
    import wandb

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = wandb.init(project="own", mode="offline", dir=".")
    fit("wandb", folder)
    assert wandb.run is own
    own.finish()
