"""Predictions on disk are those of every sample, in order, whole or not there."""

from __future__ import annotations

import csv
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import loopwright as lw
from loopwright.callbacks.spool import Spool
from tiny import acts, bits, classifier, line, loader, pairs, same, samples, seed_all, sgd_task, trainer


def task_of(**settings: Any) -> lw.Supervised:
    return sgd_task(classifier(), lr=0.1, loss=nn.CrossEntropyLoss(), **settings)


def test_each_validation_of_a_fit_is_written_with_the_weights_of_its_step(folder: Path) -> None:
    expected: dict[str, Any] = {}
    x, y = samples(11)

    def note(run: lw.Run, values: Any) -> None:
        with torch.no_grad():
            expected[f"valid-{run.progress.step:08d}.npz"] = run.models["model"](x).numpy()

    user = trainer(epochs=2, folder=folder, callbacks=[lw.Predictions(), acts(on_validation_end=note)])
    run = user.fit(task_of(), loader(batch_size=8), list(zip(x.split(4), y.split(4), strict=True)))
    assert run.folder is not None
    files = {path.name: np.load(path) for path in (run.folder / "predictions").iterdir()}
    assert files.keys() == expected.keys()
    for name, arrays in files.items():
        assert sorted(arrays) == ["preds", "target"]
        np.testing.assert_allclose(arrays["preds"], expected[name], rtol=1e-5, atol=1e-6)
        assert arrays["target"].tolist() == y.tolist()
        assert arrays["target"].dtype == np.int64


def test_a_test_and_a_prediction_are_written(tmp_path: Path) -> None:
    x, y = samples(10)
    task, write = task_of(), lw.Predictions(tmp_path)
    user = trainer(callbacks=[write])
    user.test(task, list(zip(x.split(3), y.split(3), strict=True)))
    returned = user.predict(task, lw.Loader(x, 4))
    assert np.array_equal(np.load(tmp_path / "predict.npz")["preds"], returned.detach().numpy())
    np.testing.assert_allclose(np.load(tmp_path / "test.npz")["preds"], returned.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert write.last == tmp_path / "predict.npz"


class Nested(lw.Task):
    def predict_step(self, batch: Any) -> Any:
        return {"scores": (batch[0], batch[0].sum(1)), "half": batch[0].bfloat16()}


def test_parts_are_named_by_their_path(tmp_path: Path) -> None:
    x = torch.randn(5, 2)
    trainer(callbacks=[lw.Predictions(tmp_path)]).predict(Nested(), [[x[:3]], [x[3:]]])
    found = np.load(tmp_path / "predict.npz")
    assert sorted(found) == ["half", "scores.0", "scores.1"]
    assert np.array_equal(found["scores.0"], x.numpy())
    assert found["half"].dtype == np.float32


def test_csv_has_a_line_a_sample_and_a_column_a_number(tmp_path: Path) -> None:
    x, y = samples(9)
    trainer(callbacks=[lw.Predictions(tmp_path, format="csv")]).test(task_of(), [(x[:5], y[:5]), (x[5:], y[5:])])
    with (tmp_path / "test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["preds_0", "preds_1", "preds_2", "target"]
    assert [int(row["target"]) for row in rows] == y.tolist()
    with torch.no_grad():
        expected = classifier()(x)
    told = torch.tensor([[float(row[f"preds_{i}"]) for i in range(3)] for row in rows])
    torch.testing.assert_close(told, expected)


@pytest.mark.parametrize("rows", [0, 1, 4096, 5000])
def test_a_spool_gives_back_every_row_in_both_formats(rows: int, tmp_path: Path) -> None:
    values, numbers = np.random.default_rng(1).random((rows, 2), dtype=np.float32), np.arange(rows)
    spool = Spool()
    for start in range(0, max(rows, 1), 700):
        spool.add({"v": values[start : start + 700], "n": numbers[start : start + 700]})
    spool.write_npz(tmp_path / "a.npz")
    spool.write_csv(tmp_path / "a.csv")
    found = np.load(tmp_path / "a.npz")
    assert np.array_equal(found["v"], values)
    assert np.array_equal(found["n"], numbers)
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert lines[0] == "v_0,v_1,n"
    read = np.array([line.split(",") for line in lines[1:]], dtype=np.float32).reshape(rows, 3)
    assert np.array_equal(read[:, :2], values)  # the shortest text that is this number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.npz"]


def test_writing_predictions_changes_no_bit(tmp_path: Path) -> None:
    def trained(*callbacks: lw.Callback) -> list[Any]:
        seed_all()
        task = sgd_task(classifier(dropout=0.3), lr=0.1, loss=nn.CrossEntropyLoss())
        trainer(epochs=2, callbacks=callbacks).fit(task, loader(batch_size=8, shuffle=True), loader(9, batch_size=4))
        return bits(task)

    assert same(trained(), trained(lw.Predictions(tmp_path)))


def test_a_validation_that_is_cut_short_leaves_no_file(tmp_path: Path) -> None:
    def interrupt(run: lw.Run, output: Any, batch: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    user = trainer(epochs=1, callbacks=[lw.Predictions(tmp_path), acts(on_eval_batch_end=interrupt)])
    with pytest.raises(KeyboardInterrupt):
        user.fit(sgd_task(line()), pairs([1]), pairs([1], [2]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: lw.Predictions("x", format="xml"), "Predictions(format='xml') is unknown. Known: 'csv', 'npz'."),
        (lambda: lw.Predictions("x", kinds="train"), "Predictions(kinds='train') is unknown. Known: 'predict', "
         "'test', 'valid'."),
        (lambda: trainer(epochs=1, callbacks=[lw.Predictions()]).fit(sgd_task(line()), pairs([1])), "Predictions needs "
         "a folder for those of 'valid': lw.Predictions('predictions')"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_used_are_refused(make: Any, text: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        make()
    assert str(caught.value) == text


class Returns(lw.Task):
    def __init__(self, *outputs: Any) -> None:
        super().__init__()
        self.outputs = iter(outputs)

    def validation_step(self, batch: Any) -> Any:
        return next(self.outputs)


@pytest.mark.parametrize(
    ("outputs", "settings", "kind", "text"),
    [
        ([{"loss": torch.zeros(())}], {}, lw.MetricError, "Predictions writes 'preds' and 'target', and the step "
         "returned {'loss': float32[]}. Known: 'loss'."),
        ([{"preds": "a"}], {}, lw.DataError, "'preds' is str; Predictions writes tensors that have a row for each "
         "sample"),
        ([{"preds": torch.zeros(2, 3)}, {"preds": torch.zeros(2, 4)}], {}, lw.DataError, "'preds' has rows of float32 "
         "[4], those of batches before were float32 [3]; make them alike, such as by padding, before they are "
         "returned"),
        ([{"preds": torch.zeros(2, 3, 3)}] * 2, {"format": "csv"}, lw.DataError, "'preds' has rows of shape [3, 3], "
         "which no line of CSV holds; use format='npz'"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused(
    outputs: list[Any], settings: Any, kind: Any, text: str, tmp_path: Path
) -> None:
    x: Tensor = torch.zeros(2, 1)
    with pytest.raises(kind) as caught:
        trainer(callbacks=[lw.Predictions(tmp_path, **settings)]).test(Returns(*outputs), [x, x])
    assert str(caught.value) == text
    assert list(tmp_path.iterdir()) == []
