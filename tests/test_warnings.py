"""A warning names the line of the user's own code that has led to it, never one of ours."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from tiny import classifier, line, pairs, samples, sgd_task, trainer

SOURCE = Path(lw.__file__).parent


class Broken:
    def log(self, progress: Any, values: Any, kind: str) -> None:
        raise OSError("no space")


def fails() -> None:
    trainer(epochs=1, loggers=[Broken()]).fit(sgd_task(line()), pairs([1.0]))  # here


def is_in_eval_mode() -> None:
    task = sgd_task(line())
    task.module.eval()
    trainer(epochs=1).fit(task, pairs([1.0]))  # here


def is_done_already() -> None:
    task, user = sgd_task(line()), trainer(epochs=1)
    user.fit(task, pairs([1.0]))
    user.fit(task, pairs([1.0]))  # here


def never_predicts_a_class() -> None:
    precision = lw.metrics.Precision(classes=3)
    precision.update(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1]))
    precision.compute()  # here


def never_predicts_a_class_in_a_validation() -> None:
    net = classifier()
    net[-1].bias.data[0] = -100.0
    task = lw.Supervised(net, nn.CrossEntropyLoss(), metrics={"each": lw.metrics.Precision(3, average=None)})
    trainer().test(task, [samples(9)])  # here


def averages_nothing() -> None:
    net = classifier()
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    trainer(epochs=1, callbacks=[lw.SWA("5 epochs")]).fit(task, [samples(9)])  # here


@pytest.mark.parametrize(
    "warns",
    [
        fails, is_in_eval_mode, is_done_already, never_predicts_a_class, never_predicts_a_class_in_a_validation,
        averages_nothing,
    ],
)  # fmt: skip
def test_a_warning_names_the_line_that_led_to_it(warns: Callable[[], None]) -> None:
    with warnings.catch_warnings(record=True, action="always") as caught:
        warns()
    ours = [one for one in caught if issubclass(one.category, lw.LoopwrightWarning)]
    assert ours
    lines = Path(__file__).read_text().splitlines()
    assert {(one.filename, lines[one.lineno - 1].endswith("# here")) for one in ours} == {(__file__, True)}


def test_every_warning_of_ours_is_given_by_the_one_that_finds_the_line() -> None:
    """A number of frames is wrong as soon as a function is put between."""
    found = [
        file.relative_to(SOURCE).as_posix()
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warnings.warn_explicit")
    ]
    assert sorted(found) == ["written.py"]
