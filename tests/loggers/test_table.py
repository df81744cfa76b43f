from __future__ import annotations

import io

import pytest

from loopwright.loggers import TableLogger
from loopwright.state import Progress


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def log(table, *losses):
    for epoch, loss in enumerate(losses, 1):
        table.log(Progress(epoch=epoch, seconds=epoch / 2), {"train/loss": loss, "valid/accuracy": loss}, "epoch")


def test_one_aligned_row_an_epoch_and_one_header():
    file = io.StringIO()
    table = TableLogger(file)
    log(table, 0.5, 123.456)
    table.log(Progress(), {"train/loss": 9.0}, "train")  # not an epoch
    assert file.getvalue().splitlines() == [
        " epoch  train/loss  valid/accuracy  seconds",
        "     1      0.5000          0.5000      0.5",
        "     2      123.46          123.46      1.0",
    ]


def test_the_header_is_repeated_only_when_a_new_name_comes():
    file = io.StringIO()
    table = TableLogger(file)
    for values in ({"train/loss": 1.0}, {"train/loss": 1.0, "valid/loss": 2.0}, {"train/loss": 1.0}):
        table.log(Progress(epoch=1), values, "epoch")
    assert file.getvalue().splitlines() == [
        " epoch  train/loss  seconds",
        "     1      1.0000      0.0",
        " epoch  train/loss  valid/loss  seconds",
        "     1      1.0000      2.0000      0.0",
        "     1      1.0000           -      0.0",
    ]


def test_the_best_so_far_is_green_on_a_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    file = Tty()
    log(TableLogger(file), 0.5, 0.25, 0.75, float("nan"))
    marked = [line.count("\x1b[1;32m") for line in file.getvalue().splitlines()]
    assert marked == [0, 2, 1, 1, 0]
    assert "\x1b[1;32m    0.2500\x1b[0m          0.2500" in file.getvalue()  # a loss is best when it is small
    assert "0.7500  \x1b[1;32m        0.7500\x1b[0m" in file.getvalue()  # an accuracy when it is large


@pytest.mark.parametrize(("file", "no_color"), [(io.StringIO(), ""), (Tty(), "1")])
def test_no_colour_in_a_file_and_where_no_color_is_set(file, no_color, monkeypatch):
    monkeypatch.setenv("NO_COLOR", no_color)
    log(TableLogger(file), 0.5)
    assert "\x1b[1" not in file.getvalue()


def test_a_run_that_goes_on_knows_the_best_of_its_history(make_run, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    file, run = Tty(), make_run()
    run.history.append({"epoch": 1, "stage": "head", "train/loss": 0.1})
    table = TableLogger(file)
    table.start(run)
    table.log(Progress(epoch=2), {"train/loss": 0.2}, "epoch")
    assert "\x1b[1;32m" not in file.getvalue()


def test_only_rank_0_prints(make_run):
    file = io.StringIO()
    table = TableLogger(file)
    table.start(make_run(rank=1))
    log(table, 0.5)
    assert file.getvalue() == ""
