"""What a run remembers of its epochs and steps, and how it is looked at."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from loopwright.history import History, Series
from tiny import acts, classifier, line, pairs, samples, sgd_task, trainer


def trained(epochs: int = 2) -> lw.Run:
    return trainer(epochs=epochs, log_every=2).fit(sgd_task(line()), pairs([1.0], [2.0, 2.0]), pairs([3.0]))


def test_there_is_one_record_an_epoch_with_means_over_its_samples() -> None:
    run = trained()
    assert len(run.history) == 2
    first, second = run.history
    assert {k: v for k, v in first.items() if k != "seconds"} == {
        "epoch": 1, "step": 2, "samples": 3, "train/loss": (0 * 1 + -2 * 2) / 3, "valid/loss": -9.0, "lr": 1.0,
    }  # fmt: skip
    assert second["epoch"] == 2
    assert second["seconds"] >= first["seconds"] > 0


def test_a_record_that_is_not_there_is_an_error_that_tells_which_are() -> None:
    history = History()
    with pytest.raises(
        IndexError, match=r"^history\[-1\]: the history has no record yet; the first is there by on_epoch_end$"
    ):
        history[-1]
    history = trained().history
    assert history[-2]["epoch"] == 1
    with pytest.raises(IndexError, match=r"^history\[-99\]: the history has 2 records, one an epoch: -2 to 1$"):
        history[-99]
    assert history[5:] == []


def test_records_are_found_by_position_by_slice_and_by_name() -> None:
    history = trained(3).history
    assert history[-1]["epoch"] == 3
    assert [record["epoch"] for record in history[1:]] == [2, 3]
    assert history["epoch"] == [1, 2, 3]
    assert [record["epoch"] for record in history] == [1, 2, 3]
    with pytest.raises(IndexError):
        history[3]
    with pytest.raises(KeyError) as caught:
        history["train/los"]
    assert caught.value.args[0] == (
        "the history has no 'train/los'. Known: 'epoch', 'lr', 'samples', 'seconds', 'step', 'train/loss', "
        "'valid/loss'. "
        "Did you mean 'train/loss'?"
    )


def test_values_are_drawn_over_the_steps_of_their_records() -> None:
    history = trained(3).history
    assert history.steps == [2, 4, 6]
    assert len(history["valid/loss"]) == 3


def test_a_notebook_shows_a_table_in_which_names_cannot_be_markup() -> None:
    history = History()
    assert history._repr_html_() == "<p>no epoch yet</p>"
    for epoch in range(1, 101):
        history.append({"epoch": epoch, "train/<script>": 0.123456})
    text = history._repr_html_()
    assert text.startswith("<table><tr><th>epoch</th><th>train/&lt;script&gt;</th></tr>")
    assert re.sub(" style=[^>]*", "", text).count("<tr><td>1</td><td>0.1235</td>") == 1
    assert text.count("<tr>") == 42
    assert "<script>" not in text


def test_a_name_that_some_epochs_do_not_have_is_none_there() -> None:
    run = trainer(epochs=4, validate_every="2 epochs").fit(sgd_task(line()), pairs([1.0]), pairs([1.0]))
    assert run.history["valid/loss"] == [None, -2.0, None, -4.0]
    assert run.history["train/loss"] == [0.0, -1.0, -2.0, -3.0]


def test_the_loss_of_every_step_is_kept() -> None:
    """The loss of each batch, in order, and the metrics of each epoch are in the history."""
    run = trained()
    assert run.history.losses["loss"].tolist() == [0.0, -2.0, -3.0, -8.0]
    assert run.history.losses["loss"].itemsize == 4
    assert run.history["valid/loss"] == [-9.0, -18.0]


@pytest.mark.capability("FA-14")
def test_loss_and_metrics_are_recorded_after_every_batch(folder: Path) -> None:
    """The loss of each batch is kept unasked; with log_every=1 each batch has a record of loss, metrics and rate."""
    x, y = samples(20)
    net = classifier()

    class Measured(lw.Supervised):
        def training_step(self, batch: Any, carry: Any = None) -> dict[str, Any]:
            found = super().training_step(batch)
            return found | {"accuracy": (found["preds"].argmax(1) == found["target"]).float().mean()}

    def expected(rate: float) -> list[dict[str, float]]:
        by_hand, told = copy.deepcopy(net), []
        for inputs, target in zip(x.split(6), y.split(6), strict=True):
            preds = by_hand(inputs)
            loss = nn.functional.cross_entropy(preds, target)
            accuracy = (preds.argmax(1) == target).float().mean()
            told.append({"train/loss": loss.item(), "train/accuracy": accuracy.item(), "lr": rate})
            for p, grad in zip(by_hand.parameters(), torch.autograd.grad(loss, [*by_hand.parameters()]), strict=True):
                p.data.sub_(rate * grad)
        return told

    wanted = expected(0.5)
    task = Measured(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.5))
    run = lw.Trainer(epochs=1, folder=folder, progress=False, log_every=1).fit(task, lw.Loader((x, y), 6))
    assert run.history.losses["loss"].tolist() == [record["train/loss"] for record in wanted]
    assert run.folder is not None
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    records = [line for line in lines if line["kind"] == "train"]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [{name: record[name] for name in wanted[0]} for record in records] == wanted


def test_losses_of_several_phases_are_kept_apart() -> None:
    class Two(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = line(1.0)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def phases(self) -> list[lw.Phase]:
            return [lw.Phase(str(n), lambda batch, n=n: n * self.net(batch[0]).mean()) for n in (1, 2)]

    run = trainer(epochs=1).fit(Two(), pairs([1.0], [3.0]))
    assert {name: losses.tolist() for name, losses in run.history.losses.items()} == {
        "1/loss": [1.0, 3.0], "2/loss": [2.0, 6.0],
    }  # fmt: skip
    assert run.history[-1]["train/2/loss"] == 4.0


def test_a_data_frame_has_a_row_an_epoch() -> None:
    pytest.importorskip("pandas")
    frame = trained(3).history.to_pandas()
    assert list(frame["epoch"]) == [1, 2, 3]
    assert set(frame.columns) == {"epoch", "step", "samples", "seconds", "train/loss", "valid/loss", "lr"}


def probed(trainer: lw.Trainer) -> lw.Trainer:
    @trainer.on(lw.Event.EPOCH_END)
    def probe(run: lw.Run) -> None:
        assert "train/probe" not in run.history[-1]
        run.log({"probe": 10.0 * run.progress.epoch + run.comm.rank, "one": 5.0})

    return trainer


def test_what_is_logged_at_the_end_of_an_epoch_is_in_its_record_and_no_other(folder: Path) -> None:
    data = pairs([1], [2], [3], [4])
    logs = acts(on_step_start=lambda run: run.log({"one": 1.0}))
    settings: Any = {"folder": folder, "progress": False, "log_every": 3, "callbacks": [logs]}
    run = probed(lw.Trainer(epochs=3, **settings)).fit(sgd_task(line(1.0)), data)
    assert run.history["train/one"] == [1.0] * 3  # the mean over the epoch, which it had before
    assert run.history["train/probe"] == [10.0, 20.0, 30.0]
    assert run.metrics["train/probe"] == 30.0
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]  # type: ignore[operator]
    assert [(r["step"], r["train/probe"]) for r in records if "train/probe" in r] == [(6, 10.0), (9, 20.0), (12, 30.0)]
    again = probed(lw.Trainer(epochs=4, progress=False)).fit(sgd_task(line(1.0)), data, resume=run.folder)
    assert again.history["train/probe"] == [10.0, 20.0, 30.0, 40.0]


def test_what_is_logged_at_the_end_of_an_epoch_is_the_mean_over_ranks() -> None:
    def fit() -> Any:
        run = probed(trainer(epochs=2)).fit(sgd_task(line(1.0)), pairs([1, 2], [3, 4]))
        return run.history["train/probe"], run.metrics["train/probe"]

    assert lw.launch(fit, 2) == [([10.5, 20.5], 20.5)] * 2


def test_without_pandas_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError) as caught:
        History().to_pandas()
    assert str(caught.value) == 'history.to_pandas() needs pandas: pip install "loopwright[pandas]"'


def test_history_and_run_print_where_they_stand() -> None:
    run = trained()
    assert repr(History()) == "History(0 epochs; last: no epoch yet)"
    assert repr(run.history).startswith("History(2 epochs; last: epoch=2, step=4, samples=6, seconds=")
    assert repr(run) == "Run(done, epoch=2, step=4, train/loss=-6.333, lr=1, valid/loss=-18)"


def test_the_state_of_a_history_is_a_copy() -> None:
    run = trained()
    state = run.history.state_dict()
    run.history.append({"epoch": 3})
    run.history.losses["loss"].append(0.0)
    other = History()
    other.append({"epoch": 9})
    losses = other.losses
    other.load_state_dict(state)
    assert other["epoch"] == [1, 2]
    assert other.losses["loss"].tolist() == [0.0, -2.0, -3.0, -8.0]
    assert other.losses is losses  # whoever adds to it holds it


# ------------------------------------------------------------------------------------------------------------- series


def test_record_and_epoch_are_means_of_their_own() -> None:
    series = Series()
    for value, weight in ((1.0, 3.0), (5.0, 1.0)):
        series.add({"loss": torch.tensor(value), "n": 2}, weight)
    assert series.take_record() == {"loss": 2.0, "n": 2.0}
    assert series.take_record() == {}
    series.add({"loss": torch.tensor(8.0)}, 4.0)
    assert series.take_record() == {"loss": 8.0}
    assert series.take_epoch() == {"loss": 5.0, "n": 2.0}
    assert series.take_epoch() == {}


def test_a_value_that_comes_now_and_then_is_averaged_over_when_it_came() -> None:
    series = Series()
    series.add({"loss": 1.0, "rare": 10.0}, 1.0)
    series.add({"loss": 3.0}, 1.0)
    assert series.take_epoch() == {"loss": 2.0, "rare": 10.0}


def test_means_do_not_depend_on_when_they_were_read() -> None:
    values = [0.1 * n for n in range(3000)]
    often, once = Series(), Series()
    for i, value in enumerate(values):
        for series in (often, once):
            series.add({"x": torch.tensor(value)}, 0.7)
        if i % 7 == 0:
            often.read()
    assert often.take_epoch() == once.take_epoch()


def test_what_waits_is_bounded() -> None:
    series = Series()
    for _ in range(5000):
        series.add({"x": 1.0}, 1.0)
    assert len(series._rows) < 1024


def test_a_mean_over_no_weight_is_nan() -> None:
    series = Series()
    series.add({"x": 1.0}, 0.0)
    assert math.isnan(series.take_record()["x"])


def merged(*ranks: Series) -> list[dict[str, float]]:
    """Means since the last record, as each rank has them where all join."""
    waiting: list[Any] = []
    for series in ranks:  # what each would send
        blank = copy.deepcopy(series)
        blank.take_record(lambda mine: waiting.append(mine) or {})  # type: ignore[func-returns-value]
    total: dict[Any, tuple[float, float]] = {}
    for sums in waiting:
        for key, (value, weight) in sums.items():
            before = total.get(key, (0.0, 0.0))
            total[key] = before[0] + value, before[1] + weight
    return [series.take_record(lambda mine: total) for series in ranks]


@pytest.mark.parametrize("kept_at", [None, 1, 2, 3, 4, 5])
def test_losses_of_steps_are_those_of_all_ranks_also_after_a_resume_between_two_records(kept_at: int | None) -> None:
    """Of ranks with other weights, of which one has no sample in one step."""
    losses: list[dict[str, Any]] = [{}, {}]
    ranks = [Series(found, shared=True) for found in losses]
    rows = [
        ((1.0, 3.0), (5.0, 1.0)),
        ((2.0, 2.0), None),
        ((4.0, 1.0), (8.0, 3.0)),
        (None, (6.0, 1.0)),
        ((1.0, 1.0),) * 2,
    ]
    for step, row in enumerate(rows):
        if step == kept_at:
            states = [json.loads(json.dumps(series.state_dict())) for series in ranks]
            ranks = [Series(found, shared=True) for found in losses]
            for series, state in zip(ranks, states, strict=True):
                series.load_state_dict(state)
        for series, one in zip(ranks, row, strict=True):
            series.add({} if one is None else {"loss": torch.tensor(one[0])}, 0.0 if one is None else one[1])
        if step == 2:
            assert merged(*ranks) == [{"loss": (3 + 5 + 4 + 4 + 24) / 10}] * 2
    merged(*ranks)
    assert [list(found["loss"]) for found in losses] == [[2.0, 2.0, 7.0, 6.0, 1.0]] * 2


def test_one_process_goes_on_with_the_losses_of_several() -> None:
    losses: dict[str, Any] = {}
    ranks = [Series({}, shared=True), Series({}, shared=True)]
    for first, second in ((1.0, 3.0), (2.0, 6.0)):
        ranks[0].add({"loss": first}, 1.0)
        ranks[1].add({"loss": second}, 1.0)
    alone = Series(losses)
    alone.load_state_dict(ranks[0].state_dict())
    alone.include(ranks[1].state_dict())
    alone.add({"loss": 9.0}, 1.0)
    alone.read()
    assert list(losses["loss"]) == [2.0, 4.0, 9.0]
    assert alone.take_record() == {"loss": (1 + 3 + 2 + 6 + 9) / 5}
