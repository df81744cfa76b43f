"""What TensorBoard reads from the event files of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import loopwright as lw
from loopwright.loggers import TensorBoardLogger, send
from tiny import line, sgd_task, trainer
from tracked import CURVES, DATA, expected, failed, fit, killed


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return events.Reload()


def curves(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    events = read(folder)
    found = {name: events.Scalars(name) for name in CURVES}
    return {name: sorted((e.step, pytest.approx(e.value)) for e in points) for name, points in found.items()}


def test_every_value_is_there_once(folder: Path) -> None:
    run = fit("tensorboard", folder)
    assert run.folder is not None
    assert curves(run.folder / "tensorboard") == expected(run)
    assert "lr" in read(run.folder / "tensorboard").Tags()["scalars"]


def test_figures_texts_settings_and_hyper_parameters_are_shown(folder: Path) -> None:
    user = trainer(epochs=1, loggers=["tensorboard"], folder=folder)
    figure = plt.figure(figsize=(2, 1), dpi=50)
    user.on(lw.Event.STEP_END(once=2))(lambda run: run.log({"drawn": figure, "note": "look **here**"}))
    run = user.fit(sgd_task(line(), lr=0.125), DATA)
    plt.close(figure)
    assert run.folder is not None
    events = read(run.folder / "tensorboard")
    (image,) = events.Images("drawn")
    assert (image.step, image.width, image.height) == (2, 100, 50)
    (note,) = events.Tensors("note/text_summary")
    assert (note.step, note.tensor_proto.string_val[0]) == (2, b"look **here**")
    (config,) = events.Tensors("config/text_summary")
    assert b"| settings.optimizers.main.lr | 0.125 |" in config.tensor_proto.string_val[0]
    assert b"| versions.torch |" in config.tensor_proto.string_val[0]
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data
    assert plugin.plugin_name == "hparams"
    assert b"settings.optimizers.main.lr" in plugin.content


@pytest.mark.parametrize("kill_at", [3, 11])
def test_a_killed_run_goes_on_without_a_point_twice_or_lost(folder: Path, kill_at: int) -> None:
    killed("tensorboard", folder, "killed", kill_at)
    run = fit("tensorboard", folder, "killed")
    assert run.folder is not None
    assert run.resumed_from is not None or kill_at == 3
    assert curves(run.folder / "tensorboard") == expected(run)


@pytest.mark.parametrize("at", [4, 8, 12])
def test_a_failed_run_goes_on_and_what_it_had_written_after_its_checkpoint_is_cut(folder: Path, at: int) -> None:
    failed("tensorboard", folder, "failed", at)
    failed("tensorboard", folder, "failed", at)
    run = fit("tensorboard", folder, "failed")
    assert run.folder is not None
    assert curves(run.folder / "tensorboard") == expected(run)


def test_a_run_that_is_killed_twice_before_its_next_checkpoint_as_well(folder: Path) -> None:
    killed("tensorboard", folder, "killed", 7)
    killed("tensorboard", folder, "killed", 9)
    run = fit("tensorboard", folder, "killed")
    assert run.folder is not None
    assert curves(run.folder / "tensorboard") == expected(run)


def test_runs_in_one_place_stay_apart(folder: Path) -> None:
    runs = [fit([TensorBoardLogger("tb")], folder, name) for name in ("a", "b")]
    for run in runs:
        assert run.folder is not None
        assert curves(Path("tb") / run.folder.name) == expected(run)


def test_a_task_that_is_fitted_again_adds_to_its_curves(folder: Path) -> None:
    task = sgd_task(line(), lr=0.1)
    for epochs in (1, 2):
        run = trainer(epochs=epochs, log_every=1, loggers="tensorboard", folder=folder).fit(task, DATA)
    assert run.folder is not None
    assert [e.step for e in read(run.folder / "tensorboard").Scalars("train/loss")] == [*range(1, 9)]


def test_without_a_place_it_is_refused() -> None:
    with pytest.raises(lw.SettingError, match=r"TensorBoardLogger\(\) has no place to write to"):
        fit("tensorboard", None)


def test_a_recorded_run_is_sent_once(folder: Path) -> None:
    run = fit(None, folder)
    assert run.folder is not None
    assert send(run.folder, "tensorboard") > 0
    assert send(run.folder, "tensorboard") == 0
    assert curves(run.folder / "tensorboard") == expected(run)


def test_it_says_how_to_look_at_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit("tensorboard", folder, progress=lw.Callback())
    assert f"to look at it: tensorboard --logdir {run.folder}/tensorboard\n" in capsys.readouterr().out
