"""The time that training waits for its data is measured, kept, and told where it matters."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import loopwright as lw
from tiny import classifier, samples, trainer

NAP = 0.02
X, Y = samples(8)


class Slow(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        time.sleep(NAP / 2)
        return X[i], Y[i]


def batches(nap: float = NAP) -> Any:
    for pair in zip(X.split(2), Y.split(2), strict=True):
        time.sleep(nap)
        yield pair


def task() -> lw.Supervised:
    net = classifier()
    return lw.Supervised(net, optimizer=torch.optim.SGD(net.parameters(), 0.1))


@pytest.mark.parametrize(
    "data", [DataLoader(Slow(), 2), lw.Loader(Slow(), 2), batches], ids=["theirs", "ours", "stream"]
)
def test_waiting_for_data_is_measured(data: Any) -> None:
    run = trainer(epochs=2).fit(task(), data)
    assert 8 * NAP <= run.waited <= run.progress.seconds


def test_what_the_model_takes_is_no_waiting() -> None:
    slow = task()
    slow.module.register_forward_pre_hook(lambda *_: time.sleep(NAP))
    run = trainer(epochs=2).fit(slow, DataLoader(list(zip(X, Y, strict=True)), 2))
    assert run.waited <= run.progress.seconds - 8 * NAP


def test_tensors_in_memory_are_not_waited_for() -> None:
    assert trainer(epochs=2).fit(task(), DataLoader(TensorDataset(X, Y), 2)).waited == 0


def test_a_run_that_waits_says_so_at_its_end_and_in_its_folder() -> None:
    out = io.StringIO()
    user = lw.Trainer(epochs=1, name="waits", progress=lw.ProgressBar(file=out))
    run = user.fit(task(), lambda: batches(0.3))
    assert "% of the time was spent waiting for data; more workers or a faster transform would help" in out.getvalue()
    assert run.folder is not None
    assert json.loads((run.folder / "run.json").read_text())["progress"]["waited"] == pytest.approx(run.waited)
    quick = io.StringIO()
    lw.Trainer(epochs=1, name="quick", progress=lw.ProgressBar(file=quick)).fit(task(), (X, Y))
    assert "waiting" not in quick.getvalue()
