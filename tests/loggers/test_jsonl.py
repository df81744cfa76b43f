from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from loopwright.errors import DataError
from loopwright.loggers import JSONLLogger, read_jsonl
from loopwright.state import Progress


def strict(line: str) -> Any:
    """Read JSON as a reader does that knows nothing but the standard."""
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_record_is_one_line_with_kind_place_and_values(make_run, tmp_path):
    logger = JSONLLogger()
    logger.start(make_run())
    place = Progress(step=50, epoch=2, samples=3200, seconds=0.81)
    logger.log(place, {"train/loss": 0.25, "lr": 0.5}, "train")
    text = (tmp_path / "metrics.jsonl").read_text()  # not closed: what is logged is with the operating system
    assert text == (
        '{"kind": "train", "step": 50, "epoch": 2, "samples": 3200, "seconds": 0.81, "train/loss": 0.25, "lr": 0.5}\n'
    )
    logger.close("finished")


def test_every_json_reader_takes_nan_and_infinity_and_ours_gives_them_back(make_run, tmp_path):
    logger = JSONLLogger()
    logger.start(make_run())
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": torch.tensor(math.inf), "e": 1.5}
    logger.log(Progress(), values, "train")
    logger.close("finished")
    record = strict((tmp_path / "metrics.jsonl").read_text())
    assert [record[k] for k in "abcde"] == ["NaN", "Infinity", "-Infinity", "Infinity", 1.5]
    (back,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert math.isnan(back["a"])
    assert [back[k] for k in "bcde"] == [math.inf, -math.inf, math.inf, 1.5]


def test_tensors_and_numpy_scalars_are_written_as_numbers(make_run, tmp_path):
    logger = JSONLLogger()
    logger.start(make_run())
    logger.log(Progress(), {"a": torch.tensor(0.5), "b": torch.tensor(3).numpy()[()]}, "valid")
    logger.close("finished")
    assert strict((tmp_path / "metrics.jsonl").read_text())["a"] == 0.5


@given(values=st.dictionaries(st.text(min_size=1, max_size=8).map("train/{}".format), st.floats(), max_size=5))
def test_what_is_logged_is_read_back(values, tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    JSONLLogger(path).log(Progress(step=1), values, "train")
    (record,) = read_jsonl(path)
    assert {k: str(v) for k, v in record.items() if k in values} == {k: str(v) for k, v in values.items()}


def test_a_resumed_run_has_no_record_twice(make_run, tmp_path):
    first = JSONLLogger()
    first.start(make_run())
    for step in (1, 2):
        first.log(Progress(step=step), {"train/loss": 0.5}, "train")
    saved = first.state_dict()
    first.log(Progress(step=3), {"train/loss": 0.4}, "train")  # after the checkpoint: will be done again
    first.close("failed")
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "tr')  # killed while writing

    second = JSONLLogger()
    second.load_state_dict(saved)
    second.start(make_run(step=2))
    for step in (3, 4):
        second.log(Progress(step=step), {"train/loss": 0.4}, "train")
    second.close("finished")
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_the_cut_is_made_once_and_not_again_when_the_run_goes_on(make_run, tmp_path):
    logger = JSONLLogger()
    logger.load_state_dict({"size": 0})
    for step in (1, 2):
        logger.start(make_run(step=step))
        logger.log(Progress(step=step), {}, "train")
        logger.close("finished")
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


def test_resuming_into_a_new_folder_begins_a_new_file(make_run, tmp_path):
    logger = JSONLLogger()
    logger.load_state_dict({"size": 10_000})
    logger.start(make_run(tmp_path / "other", step=7))
    logger.log(Progress(step=8), {}, "train")
    assert logger.state_dict() == {"size": (tmp_path / "other" / "metrics.jsonl").stat().st_size}
    logger.close("finished")


def test_a_torn_last_line_is_left_out_and_never_joined_to_the_next(make_run, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "st')
    assert [record["step"] for record in read_jsonl(path)] == [1]
    logger = JSONLLogger()
    logger.start(make_run())
    logger.log(Progress(step=2), {}, "train")
    logger.close("finished")
    assert [record["step"] for record in read_jsonl(path)] == [1, 2]


def test_a_torn_line_longer_than_the_search_block_is_cut(make_run, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"x" * 200_000)
    logger = JSONLLogger()
    logger.start(make_run())
    logger.close("finished")
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl, line 2 is not a JSON object: b'\[2\]'. Delete it to read"):
        read_jsonl(path)


def test_without_a_folder_nothing_is_written_unless_a_path_is_given(make_run, tmp_path):
    silent, named = JSONLLogger(), JSONLLogger("here/log.jsonl")
    for logger in (silent, named):
        logger.start(make_run(None))
        logger.log(Progress(step=1), {}, "train")
        logger.close("finished")
    assert [p.relative_to(tmp_path) for p in tmp_path.rglob("*.jsonl")] == [Path("here/log.jsonl")]


def test_only_rank_0_writes(make_run, tmp_path):
    logger = JSONLLogger()
    logger.start(make_run(rank=1))
    logger.log(Progress(), {}, "train")
    logger.close("finished")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_values_of_a_test_after_the_run_are_appended(make_run, tmp_path):
    logger = JSONLLogger()
    logger.start(make_run())
    logger.log(Progress(step=1), {}, "epoch")
    logger.close("finished")
    logger.log(Progress(step=1), {"test/loss": 0.5}, "test")
    assert [record["kind"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == ["epoch", "test"]
