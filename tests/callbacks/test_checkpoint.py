"""When checkpoints are written, which are kept, and what happens when they cannot be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from loopwright.checkpoint import index, list_checkpoints, read
from loopwright.cli import main
from loopwright.errors import CheckpointError, LoopwrightWarning, SettingError
from tiny import acts, line, loader, pairs, sgd_task, trainer


def fit(*savers: lw.Checkpoint, epochs: int = 4, scores: list[float] | None = None, callbacks: Any = ()) -> lw.Run:
    """Epochs of 3 steps, each validated at its end; ``valid/score`` is the first of ``scores``, then the next, ..."""
    net = nn.Linear(5, 3)
    metrics = {} if scores is None else {"score": Scripted(scores)}
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1), metrics=metrics)
    made = trainer(epochs=epochs, folder="runs", checkpoint=savers, loggers=[], callbacks=callbacks)
    return made.fit(task, loader(12, batch_size=4), loader(4, batch_size=4))


class Scripted:
    """A metric whose value is the first of a list; its copies share the list."""

    inputs = ("preds",)

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __deepcopy__(self, memo: Any) -> Scripted:
        return Scripted(self.values)

    def update(self, preds: torch.Tensor) -> None:
        pass

    def compute(self) -> float:
        return self.values[0]

    def reset(self) -> None:
        pass


def turn(scores: list[float]) -> lw.Callback:
    """Goes on to the next score after each validation."""

    def after(run: lw.Run, values: Any) -> None:
        del scores[: len(scores) > 1]

    return acts(on_validation_end=after)


def kept(run: lw.Run) -> list[str]:
    assert run.folder is not None
    return [p.name for p in list_checkpoints(run.folder / "checkpoints")]


def steps(*numbers: int) -> list[str]:
    return [f"step-{n:08d}" for n in numbers]


def test_the_newest_are_kept_and_the_last_is_the_end() -> None:
    saver = lw.Checkpoint("2 steps", keep=3)
    run = fit(saver)
    assert kept(run) == steps(8, 10, 12)
    assert saver.last is not None
    assert saver.last.name == "step-00000012"
    assert saver.best is None
    assert saver.best_value is None
    assert read(saver.last).info["step"] == 12


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        ("5 steps", [5, 10, 12]), (5, [5, 10, 12]), ("1 epoch", [3, 6, 9, 12]), ("2 epochs", [6, 12]),
        ("20 samples", [5, 10, 12]), ("1 hour", [12]), ("0.5 epochs", [2, 3, 5, 6, 8, 9, 11, 12]),
    ],
)  # fmt: skip
def test_intervals_count_what_was_completed(every: Any, expected: list[int]) -> None:
    assert kept(fit(lw.Checkpoint(every, keep=99))) == steps(*expected)


def test_at_end_false_leaves_the_end_out() -> None:
    assert kept(fit(lw.Checkpoint("5 steps", keep=99, at_end=False))) == steps(5, 10)


def test_seconds_are_an_interval() -> None:
    run = fit(lw.Checkpoint("0.000001 s", keep=99))
    assert kept(run) == steps(*range(1, 13))


def test_hooks_learn_of_each_checkpoint() -> None:
    seen: list[str] = []
    fit(lw.Checkpoint("6 steps"), callbacks=[acts(on_checkpoint=lambda run, path: seen.append(path.name))])
    assert seen[0] == "step-00000006"
    assert seen[-1] == "step-00000012"


def monitored(scores: list[float], **settings: Any) -> tuple[lw.Checkpoint, lw.Run]:
    scores = list(scores)
    saver = lw.Checkpoint("1 day", **{"monitor": "valid/score", "keep": 2, **settings})
    run = fit(saver, scores=scores, callbacks=[turn(scores)], epochs=len(scores))
    return saver, run


@pytest.mark.parametrize(
    ("scores", "mode", "best", "expected"),
    [
        ([0.1, 0.4, 0.3, 0.2], None, (6, 0.4), [6, 9, 12]),  # a score is better when larger
        ([0.1, 0.4, 0.3, 0.2], "min", (3, 0.1), [3, 12]),
        ([0.1, 0.2, 0.3, 0.4], "max", (12, 0.4), [9, 12]),
        ([0.4, 0.4, 0.4, 0.4], "max", (3, 0.4), [3, 6, 12]),  # the earliest of equals
        ([float("nan"), 0.1, float("nan"), float("nan")], "max", (6, 0.1), [6, 12]),
        ([float("inf"), 0.1, 0.2, 0.3], "min", (6, 0.1), [6, 9, 12]),
        ([-1.0, -0.5, 0.0, -2.0], "max", (9, 0.0), [6, 9, 12]),
    ],
)
def test_the_best_are_kept_besides_the_last(scores: Any, mode: Any, best: Any, expected: list[int]) -> None:
    saver, run = monitored(scores, mode=mode)
    assert kept(run) == steps(*expected)
    assert saver.best is not None
    assert saver.last is not None
    assert (saver.best.name, saver.best_value) == (steps(best[0])[0], best[1])
    assert saver.last.name == "step-00000012"
    assert index(saver.last.parent) == {"last": saver.last, "best": saver.best}
    assert read(saver.best).info["value"] == best[1]


def test_nan_alone_is_never_the_best() -> None:
    saver, run = monitored([float("nan")] * 3)
    assert saver.best is None
    assert saver.best_value is None
    assert kept(run) == steps(9)


@pytest.mark.capability("IG-09")
def test_the_best_holds_the_weights_of_its_step() -> None:
    """The best by a score of the validation is kept, with the weights that it had then."""
    weights: list[torch.Tensor] = []
    scores = [0.1, 0.9, 0.2]
    saver = lw.Checkpoint("1 day", monitor="valid/score")
    note = acts(on_epoch_end=lambda run: weights.append(next(iter(run.models.values())).weight.detach().clone()))
    fit(saver, scores=scores, callbacks=[note, turn(scores)], epochs=3)
    assert saver.best is not None
    assert torch.equal(read(saver.best).files["model"]["weight"], weights[1])


def test_a_checkpoint_between_validations_has_no_value() -> None:
    saver = lw.Checkpoint("2 steps", monitor="valid/loss", keep=1)
    run = fit(saver, epochs=3)
    assert run.folder is not None
    infos = {p.name: read(p).info.get("value") for p in list_checkpoints(run.folder / "checkpoints")}
    assert saver.best is not None
    assert saver.best.name in steps(3, 6, 9)
    assert infos[saver.best.name] == saver.best_value


def test_a_monitored_name_that_is_not_there_is_an_error_with_the_names_that_are() -> None:
    run = fit(lw.Checkpoint(at_end=False))
    saver = lw.Checkpoint(monitor="valid/los", mode="min")
    saver.start(run)
    with pytest.raises(CheckpointError) as caught:
        saver.due(run, validated=True)
    assert str(caught.value) == (
        "Checkpoint monitors 'valid/los', which this validation did not produce. "
        "Known: 'lr', 'train/loss', 'valid/loss'. Did you mean 'valid/loss'?"
    )


def test_a_validation_that_is_not_among_the_best_writes_nothing() -> None:
    run = fit(lw.Checkpoint(at_end=False))
    saver = lw.Checkpoint("1 day", monitor="valid/score", keep=2)
    saver.start(run)
    written = []
    for step, value in enumerate([0.1, 0.4, 0.2, 0.2, 0.3, float("nan"), 0.5], start=1):
        run.progress = run.progress._replace(step=step)
        run.metrics["valid/score"] = value
        if saver.due(run, validated=True):
            written.append(value)
            saver.save(run)
    assert written == [0.1, 0.4, 0.2, 0.3, 0.5]


def test_what_is_in_the_folder_is_known_again_after_a_restart() -> None:
    saver, run = monitored([0.1, 0.4, 0.3])
    again = lw.Checkpoint("1 day", monitor="valid/score", keep=2)
    again.start(run)
    assert (again.best, again.best_value, again.last) == (saver.best, saver.best_value, saver.last)
    other = lw.Checkpoint("1 day", monitor="valid/loss")  # values of another name do not compare
    other.start(run)
    assert (other.best, other.last) == (None, saver.last)


def test_start_sweeps_what_a_killed_process_left() -> None:
    saver, run = monitored([0.1])
    assert saver.last is not None
    left = saver.last.parent / ".step-00000099.0123abcd.writing"
    left.mkdir()
    saver.start(run)
    assert not left.exists()


def test_nothing_new_writes_nothing() -> None:
    saver = lw.Checkpoint("1 day")
    run = fit(saver)
    assert saver.last is not None
    before = (saver.last / "manifest.json").stat()
    assert saver.save(run) == saver.last
    assert (saver.last / "manifest.json").stat() == before


def test_an_older_one_is_deleted_only_after_the_new_one_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    saver = lw.Checkpoint("3 steps", keep=1)

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    def full(run: lw.Run, result: Any) -> None:
        if run.progress.step == 5:
            monkeypatch.setattr(os, "fsync", fail)

    with pytest.raises(CheckpointError, match="No space left on device"):
        fit(saver, callbacks=[acts(on_step_end=full)])
    monkeypatch.undo()
    assert saver.last is not None
    assert read(saver.last).info["step"] == 3
    assert [p.name for p in saver.last.parent.iterdir() if p.is_dir()] == steps(3)


def test_on_error_warn_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    saver = lw.Checkpoint("3 steps", keep=9, on_error="warn")
    genuine = os.fsync

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    def full(run: lw.Run, result: Any) -> None:
        monkeypatch.setattr(os, "fsync", fail if run.progress.step == 6 else genuine)

    with pytest.warns(LoopwrightWarning, match="no checkpoint at step 6: .*No space left on device"):
        run = fit(saver, callbacks=[acts(on_step_end=full)])
    assert run.status == "done"
    assert kept(run) == steps(3, 9, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0}, "keep=0: expected the number of checkpoints to keep, from 1"),
        ({"keep": True}, "keep=True: expected the number of checkpoints to keep, from 1"),
        ({"on_error": "ignore"}, "on_error='ignore' is unknown; use on_error='raise' or on_error='warn'"),
        ({"mode": "max"}, "mode='max' needs a value to watch: add monitor='valid/loss', or leave mode out"),
        ({"monitor": "valid/loss", "mode": "up"}, "mode='up' is unknown"),
        ({"monitor": "valid/profit"}, "whether 'valid/profit' should fall or rise does not follow from its name"),
        ({"every": "5 parsecs"}, "Checkpoint: every='5 parsecs': unknown unit 'parsecs'"),
        ({"every": 0}, "Checkpoint: every=0: the duration 0 must be a positive number"),
    ],
)
def test_arguments_are_checked_where_they_are_given(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError) as caught:
        lw.Checkpoint(**arguments)
    assert str(caught.value).startswith(message)


def test_a_run_without_a_folder_is_refused() -> None:
    run = trainer(epochs=1).fit(
        lw.Supervised(net := nn.Linear(5, 3), nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters())), loader(4)
    )
    with pytest.raises(SettingError, match=r"Checkpoint needs a folder to write to: Trainer\(folder='runs'\)"):
        lw.Checkpoint().start(run)


def test_checkpoints_change_no_bit_of_the_training() -> None:
    def weights(*savers: lw.Checkpoint) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        run = fit(*savers)
        return next(iter(run.models.values())).state_dict()

    with_them, without = weights(lw.Checkpoint("1 step", monitor="valid/loss")), weights()
    assert all(torch.equal(with_them[k], without[k]) for k in without)
    assert Path("runs").is_dir()


def test_a_mean_of_training_can_be_monitored_without_validation(folder: Path) -> None:
    saver = lw.Checkpoint("1 day", monitor="train/loss", keep=3, at_end=False)
    net = torch.nn.Linear(1, 1)
    task = lw.Supervised(net, torch.nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.1))
    data = [(torch.ones(2, 1), torch.zeros(2, 1))]
    run = lw.Trainer(epochs=5, folder=folder, progress=False, checkpoint=saver).fit(task, data)
    assert saver.best_value == run.history[-1]["train/loss"]
    assert len(list((run.folder / "checkpoints").glob("step-*"))) == 3


@pytest.mark.parametrize("background", [False, True])
def test_several_at_once_share_a_folder_and_none_deletes_what_another_wants(background: bool) -> None:
    scores = [0.9, 0.1, 0.5, 0.2]
    newest = lw.Checkpoint("2 steps", keep=2, async_save=background)
    best = lw.Checkpoint("1 day", monitor="valid/score", keep=1, async_save=background)
    lowest = lw.Checkpoint("1 day", monitor="valid/loss", keep=1, async_save=background)
    run = fit(newest, best, lowest, scores=scores, callbacks=[turn(scores)])
    for saver in run.savers:
        saver.finish(run)
    assert best.best is not None
    assert lowest.best is not None
    assert (best.best.name, best.best_value) == ("step-00000003", 0.9)
    assert kept(run) == sorted({*steps(10, 12), "step-00000003", lowest.best.name})
    for saver in (best, lowest):  # a new process reads from the manifests what each has watched
        again = lw.Checkpoint("1 day", monitor=saver.monitor, keep=1)
        again.start(run)
        assert (again.best, again.best_value) == (saver.best, saver.best_value)


def indexed(run: lw.Run) -> Any:
    assert run.folder is not None
    return json.loads((run.folder / "checkpoints" / "index.json").read_text())


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_the_index_names_the_best_whoever_writes_last(first: int, background: bool) -> None:
    """Also where one of several savers judges by nothing, and is the last one to write."""
    scores = [0.9, 0.1, 0.5, 0.2]
    best = lw.Checkpoint("1 day", monitor="valid/score", keep=1, async_save=background)
    savers = [best, lw.Checkpoint("3 steps", keep=1, async_save=background)]
    run = fit(savers[first], savers[1 - first], scores=scores, callbacks=[turn(scores)])
    assert indexed(run) == {"last": "step-00000012", "best": "step-00000003"}
    assert main(["checkpoints", "prune", str(run.folder), "--keep", "1"]) == 0
    assert indexed(run) == {"last": "step-00000012", "best": "step-00000003"}


@pytest.mark.parametrize("first", [0, 1])
def test_the_best_of_the_index_is_that_of_the_first_that_judges(first: int) -> None:
    scores = [0.2, 0.9, 0.1, 0.5]
    savers = [lw.Checkpoint("1 day", monitor="valid/score", mode=mode, keep=1) for mode in ("max", "min")]
    run = fit(lw.Checkpoint("2 steps"), savers[first], savers[1 - first], scores=scores, callbacks=[turn(scores)])
    assert indexed(run)["best"] == ["step-00000006", "step-00000009"][first]


def test_a_best_that_nothing_was_judged_by_is_told(folder: Path) -> None:
    best = lw.Checkpoint(monitor="valid/loss", restore="best")
    user = trainer(epochs=1, folder=folder, checkpoint=best)
    with pytest.warns(lw.LoopwrightWarning, match="restored nothing: .* 'valid/loss', which was nan. The weights are"):
        user.fit(sgd_task(line()), pairs([1.0]), pairs([float("nan")]))
