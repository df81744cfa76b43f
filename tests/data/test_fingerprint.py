from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from loopwright.data import Loader
from loopwright.data.fingerprint import changes, fingerprint
from loopwright.data.generators import get_globals
from loopwright.data.lengths import epoch_length, limit
from loopwright.data.mix import Mix


class Files(Dataset[Any]):
    """As torchvision's ImageFolder keeps what it has found."""

    def __init__(self, n: int = 5, ending: str = "jpg") -> None:
        self.samples = [(f"{i}.{ending}", i % 2) for i in range(n)]
        self.seen = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Any:
        raise AssertionError("a sample was read")


def x(n: int = 20, fill: float = 0.0) -> torch.Tensor:
    return torch.full((n, 3), fill)


def told(before: Any, after: Any) -> list[str]:
    saved, now = (json.loads(json.dumps(fingerprint(data))) for data in (before, after))
    assert changes(saved, saved) == changes(now, now) == []
    return changes(saved, now)


SAME: list[Callable[[], Any]] = [
    x,
    lambda: (x(), np.arange(20)),
    lambda: {"a": pd.DataFrame({"a": range(20), "b": ["x"] * 20}), "b": pd.Series(range(20))},
    lambda: DataLoader(TensorDataset(x(), x()), 4, shuffle=True, num_workers=2),
    lambda: DataLoader(Subset(Files(), [3, 1]), 2),
    lambda: ConcatDataset([TensorDataset(x()), Files()]),
    lambda: Loader(x(), 4),
    lambda: [(x(), x()), (x(), x())],
    lambda: Mix({"a": x(), "b": limit(Files(), batches=2), "c": epoch_length([1, 2], 3)}),
    lambda: np.array([{}, object()], dtype=object),
    lambda: (i for i in range(3)),
]


@pytest.mark.parametrize("make", SAME)
def test_the_same_data_has_the_same_fingerprint_and_nothing_is_read_or_drawn(make: Callable[[], Any]) -> None:
    before = get_globals()
    assert told(make(), make()) == []
    assert get_globals() == before


def test_the_kind_of_array_does_not_matter() -> None:
    arrays = x().numpy(), torch.arange(20)
    assert told(arrays, DataLoader(TensorDataset(x(), torch.arange(20)), 64)) == []


WHEN = " when the checkpoint was written"


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (x(1200), x(1000), [f"the training data has 1,000 samples, and had 1,200{WHEN}"]),
        (Files(6), Files(5), [f"the training data has 5 samples, and had 6{WHEN}"]),
        ([1] * 3, [1] * 2, [f"the training data has 2 batches, and had 3{WHEN}"]),
        (x(), x().double(), [f"the training data is torch.float64 (20, 3), and was torch.float32 (20, 3){WHEN}"]),
        ((x(), x()), (x(), x()[:, :2]),
         [f"data[1] of the training data is torch.float32 (20, 2), and was torch.float32 (20, 3){WHEN}"]),
        ((x(9), x(9)), (x(), x().double()),
         [f"the training data has 20 samples, and had 9{WHEN}",
          f"data[1] of the training data is torch.float64 (any, 3), and was torch.float32 (any, 3){WHEN}"]),
        (x(), {"a": x()}, [f"the training data is missing, and was torch.float32 (20, 3){WHEN}",
                           f"data['a'] of the training data is torch.float32 (20, 3), and was not there{WHEN}"]),
        (x(), x(fill=1.0), ["the training data has other values than when the checkpoint was written, in the same "
                            "number and shape"]),
        (Files(), Files(ending="png"), ["the training data has other values than when the checkpoint was written, in "
                                        "the same number and shape"]),
        (Files(), x(5), [f"the training data is arrays, and was Files{WHEN}",
                         f"the training data is torch.float32 (5, 3), and was not there{WHEN}"]),
        (DataLoader(Files(), 2), DataLoader(Files(), 3),
         [f"the training data gives 3 samples a batch, and gave 2{WHEN}"]),
        (Mix({"a": x(), "b": x()}), Mix({"a": x(9), "c": x()}),
         ["the training data has no source 'b' any more", "the training data has a new source 'c'",
          f"source 'a' of the training data has 9 samples, and had 20{WHEN}"]),
    ],
)  # fmt: skip
def test_what_changed_is_said_in_words(before: Any, after: Any, says: list[str]) -> None:
    assert told(before, after) == says


def test_a_subset_of_other_samples_and_a_subset_of_other_data_are_seen() -> None:
    data = TensorDataset(x())
    assert told(Subset(data, [1, 2]), Subset(data, [1, 3]))
    assert told(Subset(data, [1, 2]), Subset(TensorDataset(x(fill=1.0)), [1, 2]))


@pytest.mark.parametrize("kind", ["tensor", "strided", "numpy", "bfloat16"])
def test_large_arrays_are_sampled_from_the_first_to_the_last_element(kind: str) -> None:
    def make(at: int | None = None) -> Any:
        flat = torch.zeros(60_000, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
        if at is not None:
            flat[at] = 1
        data = flat.view(200, 300)
        return {"strided": data.T.contiguous().T, "numpy": data.float().numpy()}.get(kind, data)

    for at in (0, 15, 59_999, 59_984):
        assert told(make(), make(at))
    assert told(make(), make(17)) == []  # between the places: documented


def test_data_that_knows_its_own_fingerprint_is_asked() -> None:
    class Table:
        _fingerprint = "3f"

        def __len__(self) -> int:
            return 3

    assert fingerprint(Table()) == {"kind": "Table", "length": 3, "content": "3f"}
    assert fingerprint(limit(Table(), batches=2)) == {
        "limit": "2 batches",
        "kind": "Table",
        "length": 3,
        "content": "3f",
    }


def test_empty_and_strange_data_has_a_fingerprint() -> None:
    for data in (torch.zeros(0, 3), torch.eye(3).to_sparse(), np.zeros(3, "M8[s]"), torch.zeros(2).conj(), None, 3):
        json.dumps(fingerprint(data))
