"""Processor and memory: values that make sense, at a bounded rate, and no trace in the weights."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from torch import nn

import loopwright as lw
from tiny import acts, bits, classifier, line, loader, pairs, same, seed_all, sgd_task, trainer


def test_it_logs_what_the_process_takes() -> None:
    run = trainer(epochs=1, callbacks=[lw.Resources("0.000001 s")]).fit(sgd_task(line()), pairs(*[[1]] * 20))
    assert 10 < run.metrics["train/memory_mb"] < 1e5
    assert 0 < run.metrics["train/machine_memory_percent"] <= 100
    assert run.metrics["train/cpu_percent"] >= 0


def test_it_logs_at_a_bounded_rate() -> None:
    seen: list[Any] = []
    look = acts(on_step_end=lambda run, result: seen.append(run.series._rows[-1][0].keys()))
    run = trainer(epochs=1, callbacks=[lw.Resources("1 hour"), look]).fit(sgd_task(line()), pairs(*[[1]] * 5))
    assert all("memory_mb" not in names for names in seen)
    assert "train/memory_mb" not in run.metrics


def test_it_changes_no_bit() -> None:
    def trained(*callbacks: lw.Callback) -> list[Any]:
        seed_all()
        net = classifier(dropout=0.3)
        trainer(epochs=2, callbacks=callbacks).fit(
            sgd_task(net, lr=0.1, loss=nn.CrossEntropyLoss()), loader(batch_size=8, shuffle=True)
        )
        return bits(net)

    assert same(trained(), trained(lw.Resources("0.000001 s")))


def test_an_interval_in_steps_is_refused() -> None:
    with pytest.raises(lw.SettingError, match=r"Resources\(every='5 steps'\): expected a time, such as '10 s'"):
        lw.Resources("5 steps")


def test_without_psutil_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(ImportError, match=r'pip install "loopwright\[system\]"'):
        trainer(epochs=1, callbacks=[lw.Resources()]).fit(sgd_task(line()), pairs([1]))
