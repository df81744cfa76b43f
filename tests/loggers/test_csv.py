from __future__ import annotations

import csv
import math

import pytest

from loopwright.errors import SettingError
from loopwright.loggers import CSVLogger
from loopwright.state import Progress


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_columns_grow_and_earlier_rows_get_empty_cells(make_run, tmp_path):
    logger = CSVLogger()
    logger.start(make_run())
    logger.log(Progress(step=5, samples=20, seconds=0.5), {"train/loss": 0.5, "lr": 0.1}, "train")
    logger.log(Progress(step=10, epoch=1), {"valid/loss": math.nan}, "valid")
    assert (tmp_path / "metrics.csv").read_text() == (
        "kind,step,epoch,samples,seconds,train/loss,lr,valid/loss\ntrain,5,0,20,0.5,0.5,0.1,\nvalid,10,1,0,0.0,,,nan\n"
    )
    logger.close("finished")
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_names_with_commas_quotes_and_newlines_keep_their_column(make_run, tmp_path):
    logger = CSVLogger()
    logger.start(make_run())
    for name in ('a,"b"', "c\nd", "e\u2028f"):
        logger.log(Progress(), {name: 1.0}, "train")
    logger.close("finished")
    last = rows(tmp_path / "metrics.csv")[-1]
    assert (last["e\u2028f"], last["c\nd"], last['a,"b"']) == ("1.0", "", "")


def test_a_resumed_run_has_the_same_table_as_one_that_was_never_killed(make_run, tmp_path):
    records = [(n, {"train/loss": n / 8} if n < 4 else {"valid/loss": n / 8}) for n in range(1, 7)]

    def write(logger, some):
        for step, values in some:
            logger.log(Progress(step=step), values, "train")

    whole = CSVLogger()
    whole.start(make_run(tmp_path / "whole"))
    write(whole, records)
    whole.close("finished")

    first = CSVLogger()
    first.start(make_run())
    write(first, records[:2])
    saved = first.state_dict()
    write(first, records[2:5])  # new columns as well, all after the checkpoint
    first.close("failed")
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("train,6,0")
    second = CSVLogger()
    second.load_state_dict(saved)
    second.start(make_run(step=2))
    write(second, records[2:])
    assert second.state_dict()["rows"] == 6
    second.close("finished")
    assert (tmp_path / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_a_file_that_is_no_such_table_is_left_alone(make_run, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SettingError, match=r"its first line is 'a,b', expected 'run,kind,step,epoch,samples,seconds,"):
        CSVLogger(path).start(make_run())
    assert path.read_text() == "a,b\n1,2\n"


def test_only_rank_0_writes_and_no_folder_means_no_file(make_run, tmp_path):
    for run in (make_run(rank=1), make_run(None)):
        logger = CSVLogger()
        logger.start(run)
        logger.log(Progress(), {"train/loss": 1.0}, "train")
        logger.close("finished")
    assert list(tmp_path.iterdir()) == []


def test_the_values_of_a_test_after_the_run_are_added(make_run, tmp_path):
    logger = CSVLogger()
    logger.start(make_run())
    logger.log(Progress(step=1), {"train/loss": 0.5}, "epoch")
    logger.close("finished")
    logger.log(Progress(step=1), {"test/loss": 0.25}, "test")
    assert [(row["kind"], row["test/loss"]) for row in rows(tmp_path / "metrics.csv")] == [
        ("epoch", ""),
        ("test", "0.25"),
    ]


def test_a_torn_last_row_is_left_out_and_never_joined_to_the_next(make_run, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("kind,step,epoch,samples,seconds\ntrain,1,0,0,0.0\ntrain,2,")
    logger = CSVLogger()
    logger.start(make_run())
    logger.log(Progress(step=2), {}, "train")
    logger.close("finished")
    assert [row["step"] for row in rows(path)] == ["1", "2"]
