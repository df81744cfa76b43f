"""What callbacks do with several ranks: two forked processes against one."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import loopwright as lw
from tiny import acts

pytestmark = pytest.mark.slow

X = torch.randn(44, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


def supervised() -> lw.Supervised:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Linear(4, 2)
    return lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.5))


def fitted(*callbacks: lw.Callback, **settings: Any) -> tuple[list[Any], lw.Run]:
    user = lw.Trainer(**{"epochs": 3, "folder": None, "progress": False, "seed": 0, "callbacks": callbacks} | settings)
    run = user.fit(supervised(), lw.Loader((X, Y), 8, shuffle=True), lw.Loader((X, Y), 6))
    return [p.detach().clone() for p in run.models["model"].parameters()], run


def test_each_rank_mixes_its_own_slice_and_all_end_with_the_same_weights() -> None:
    def fit() -> Any:
        seen: list[Any] = []
        look = acts(map_batch=lambda run, batch: seen.append(batch[1]) or batch)
        weights, _ = fitted(lw.MixUp(classes=2), look)
        return weights, seen

    (first, mine), (second, others) = lw.launch(fit, 2)
    assert all(map(torch.equal, first, second))
    assert [len(y) for y in mine[:6]] == [len(y) for y in others[:6]] == [4, 4, 4, 4, 4, 2]
    shares = [{round(float(v), 4) for y in part for v in y.flatten()} - {0.0, 1.0} for part in (mine, others)]
    assert len(shares[0] & shares[1]) < len(shares[0]) / 4


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_penalty_is_that_of_one_process(accumulate: int) -> None:
    def fit() -> Any:
        weights, run = fitted(lw.Penalty("l1", 0.05), accumulate=accumulate)
        return weights, run.metrics["train/penalty_l1"]

    (first, penalty), (second, _) = lw.launch(fit, 2)
    alone, expected = fit()
    assert all(map(torch.equal, first, second))
    for mine, one in zip(first, alone, strict=True):
        torch.testing.assert_close(mine, one, atol=1e-6, rtol=1e-6)
    assert penalty == pytest.approx(expected, rel=1e-5)


def test_predictions_of_all_ranks_are_one_file_in_order(tmp_path: Path) -> None:
    def fit(folder: Path) -> Any:
        write = lw.Predictions(folder)
        _, run = fitted(write)
        lw.Trainer(callbacks=[write], progress=False).predict(run.task, lw.Loader((X, Y), 5))

    lw.launch(fit, 2, tmp_path / "two")
    fit(tmp_path / "one")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert len(names) == 4
    for name in names:
        one, both = (np.load(tmp_path / part / name) for part in ("one", "two"))
        assert sorted(one) == sorted(both)
        for key in one:
            np.testing.assert_allclose(both[key], one[key], rtol=1e-4, atol=1e-6)
    assert np.load(tmp_path / "two" / names[1])["target"].tolist() == Y.tolist()


def test_a_report_shows_the_samples_of_all_ranks(tmp_path: Path) -> None:
    def fit(folder: Path) -> Any:
        report = lw.Report()
        _, run = fitted(report, folder=folder)
        if run.comm.rank:
            return report.path
        seen = json.loads((run.folder / "report" / "valid.json").read_text())
        return seen["counts"], seen["samples"], [(one["row"], one["target"]) for one in seen["worst"]]

    (counts, count, worst), nothing = lw.launch(fit, 2, tmp_path / "two")
    assert nothing is None
    assert (counts, count) == fit(tmp_path / "one")[:2]
    assert sorted(worst) == sorted(fit(tmp_path / "one")[2])


def test_rates_are_those_of_all_ranks_and_the_best_weights_are_the_same_on_each() -> None:
    def fit() -> Any:
        callbacks = [
            lw.Throughput(1, tokens=lambda batch: 2 * len(batch[0]), flops=True),
            lw.EarlyStopping(patience=1, min_delta=10, restore="best"),
            lw.Resources("0.000001 s"),
        ]
        weights, run = fitted(*callbacks)
        return weights, dict(run.metrics), run.progress.epoch

    (first, metrics, epoch), (second, _, _) = lw.launch(fit, 2)
    assert epoch == 2
    assert all(map(torch.equal, first, second))
    assert metrics["train/tokens_per_second"] == pytest.approx(2 * metrics["train/samples_per_second"], rel=0.5)
    # 2 classes x 4 features x 2 operations, forward and for the gradient of the weight
    assert metrics["train/flops_per_second"] == pytest.approx(32 * metrics["train/samples_per_second"], rel=0.5)


def test_all_together_every_rank_ends_with_the_same_weights(tmp_path: Path) -> None:
    def fit() -> Any:
        callbacks = [
            lw.Capsule(), lw.BatchTransform(lambda batch, rng: (batch[0] * torch.rand((), generator=rng), batch[1])),
            lw.MixUp(classes=2), lw.Penalty("l2", 0.01), lw.EarlyStopping(restore="best"), lw.Throughput(3, flops=True),
            lw.Resources("0.000001 s"), lw.Predictions(),
        ]  # fmt: skip
        weights, run = fitted(*callbacks, folder=tmp_path, accumulate=2, checkpoint=lw.Checkpoint("1 epoch"))
        assert run.folder is not None
        return weights, sorted(path.name for path in (run.folder / "predictions").iterdir())

    (first, files), (second, _) = lw.launch(fit, 2)
    assert all(map(torch.equal, first, second))
    assert files == ["valid-00000003.npz", "valid-00000006.npz", "valid-00000009.npz"]


def test_what_a_callback_asks_for_at_the_end_of_an_epoch_is_done_there() -> None:
    def fit() -> Any:
        _, run = fitted(lw.EarlyStopping("train/loss", patience=1, min_delta=1e9), epochs=9)
        return run.progress.step, run.stop_reason

    (step, first), second = lw.launch(fit, 2)
    assert (step, first) == second
    assert step == fit()[0] == 12
    assert first.startswith("train/loss has not improved")


def test_callbacks_that_ask_to_stop_say_so() -> None:
    """Or else ranks would not listen at the end of an epoch."""

    def below(kind: type[lw.Callback]) -> Iterator[type[lw.Callback]]:
        yield kind
        for one in kind.__subclasses__():
            yield from below(one)

    for name in ("finders", "verifying"):
        importlib.import_module(f"loopwright.{name}")
    ours = [kind for kind in below(lw.Callback) if kind.__module__.startswith("loopwright.")]
    asking = [kind for kind in ours if "request_stop(" in inspect.getsource(kind)]
    assert lw.EarlyStopping in asking
    assert [kind.__name__ for kind in asking if not kind.stops] == []
