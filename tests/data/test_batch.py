from __future__ import annotations

import types
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from loopwright.data import move, samples
from loopwright.errors import DataError

META = torch.device("meta")  # a device that every machine has


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass(frozen=True)
class Record:
    name: str
    x: Any


class Tagged(list[Any]):
    pass


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(3, 2),
        [torch.zeros(3), torch.zeros(5)],
        (torch.zeros(3),),
        {"name": ["a", "b", "c"], "x": torch.zeros(3, 1)},
        [{"deep": (np.zeros((3, 2)), 1)}],
        Pair(torch.zeros(3), 0),
        Record("r", torch.zeros(3)),
        UserDict(x=torch.zeros(3)),
        [torch.tensor(1.0), torch.zeros(3)],  # a scalar has no first dimension
        np.zeros(3),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_samples_are_counted_on_the_first_array(batch: Any) -> None:
    assert samples(batch) == 3


@pytest.mark.parametrize("batch", [[], {}, "text", ["a", 1], None, torch.tensor(1.0)])
def test_a_batch_without_an_array_asks_for_weight(batch: Any) -> None:
    with pytest.raises(DataError, match=r"Pass weight=\.\.\., a function of the batch that returns the number"):
        samples(batch)


def test_the_message_describes_the_batch() -> None:
    with pytest.raises(DataError) as error:
        samples({"name": "a"})
    assert str(error.value) == (
        "cannot tell how many samples this batch holds: {'name': str} has no tensor with a first dimension. "
        "Pass weight=..., a function of the batch that returns the number"
    )


def test_moving_keeps_every_kind_of_container() -> None:
    t = torch.zeros(2)
    batch = {
        "list": [t, Tagged([t])],
        "pair": Pair(t, "text"),
        "record": Record("r", (t, 1.5)),
        "ordered": OrderedDict(a=t),
        "user": UserDict(a=t),
        "frozen": types.MappingProxyType({"a": t}),
        "array": np.zeros(2),
        "none": None,
    }
    moved = move(batch, META)
    assert list(moved) == list(batch)
    assert all(type(moved[k]) is type(batch[k]) for k in batch)
    assert type(moved["list"][1]) is Tagged
    for part in (
        moved["list"][0],
        moved["list"][1][0],
        moved["pair"].x,
        moved["record"].x[0],
        moved["ordered"]["a"],
        moved["user"]["a"],
        moved["frozen"]["a"],
    ):
        assert part.device == META
    assert moved["pair"].y == "text"
    assert moved["record"].name == "r"
    assert moved["array"] is batch["array"]
    assert t.device.type == "cpu"
    assert batch["user"]["a"] is t


def test_a_tensor_that_is_there_already_is_not_copied() -> None:
    t = torch.zeros(2)
    assert move([t], "cpu")[0] is t


def test_anything_with_to_is_moved_by_its_own_method() -> None:
    class Graph:
        def to(self, device: torch.device) -> str:
            return f"graph on {device}"

    assert move((Graph(), Graph), META) == ("graph on meta", Graph)


def test_a_leaf_that_cannot_be_moved_is_named_and_its_error_chained() -> None:
    class Stuck:
        def to(self, device: torch.device) -> None:
            raise RuntimeError("glued")

    with pytest.raises(DataError) as error:
        move({"x": [torch.zeros(1), Pair(Stuck(), 0)]}, "cpu")
    assert str(error.value) == (
        "batch['x'][1].x (Stuck) cannot be moved to cpu: glued. Return tensors, or objects whose .to(device) works, "
        "from the dataset or its collate_fn"
    )
    assert repr(error.value.__cause__) == "RuntimeError('glued')"
