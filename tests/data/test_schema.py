from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopwright.data.schema import Schema, schema_of
from loopwright.errors import DataError

Pair = namedtuple("Pair", ["image", "label"])


@dataclasses.dataclass
class Batch:
    image: Any
    names: list[str]


def image(n: int = 4, size: int = 8) -> torch.Tensor:
    return torch.zeros(n, 3, size, size)


def stored(schema: Schema) -> Schema:
    return Schema.from_dict(json.loads(json.dumps(schema.as_dict())))


def test_every_kind_of_batch_is_told_part_by_part() -> None:
    batch = {
        "pair": Pair(image(), torch.zeros(4, dtype=torch.int64)),
        "own": [Batch(np.zeros((4, 2), np.float32), ["a", "b", "c", "d"]), torch.tensor(1.0)],
        "count": 4,
    }
    assert str(schema_of(batch)).splitlines() == [
        "batch['pair'].image: torch.float32 (any, 3, 8, 8)",
        "batch['pair'].label: torch.int64 (any)",
        "batch['own'][0].image: numpy.float32 (any, 2)",
        "batch['own'][0].names: list of str",
        "batch['own'][1]: torch.float32 ()",
        "batch['count']: int",
    ]


@pytest.mark.parametrize("batch", [image(), [image(), ["a"]], {"x": (np.zeros(2), 1)}, (), torch.zeros(2).to_sparse()])
def test_a_schema_outlives_json_and_fits_its_own_batch(batch: Any) -> None:
    schema = schema_of(batch)
    assert stored(schema) == schema
    stored(schema).check(batch)


def test_another_number_of_samples_and_another_kind_of_sequence_fit() -> None:
    schema = schema_of((image(4), torch.zeros(4)))
    schema.check([image(1), torch.zeros(1)])
    schema_of({"a": image(), "b": 1}).check(OrderedDict(b=2, a=image(7)))


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"image": image().double(), "label": torch.zeros(4)},
         "batch['image'] has dtype torch.float64, and the model was trained on torch.float32"),
        ({"image": image(size=9), "label": torch.zeros(4)},
         "batch['image'] has shape (any, 3, 9, 9), and the model was trained on (any, 3, 8, 8)"),
        ({"image": image(), "label": torch.zeros(4, 1)},
         "batch['label'] has shape (any, 1), and the model was trained on (any)"),
        ({"image": image()}, "batch['label'] is missing; the model was trained on torch.float32 (any)"),
        ({"image": image(), "label": torch.zeros(4), "id": [1]},
         "batch['id'] (list of int) is new; it was not there when the model was trained"),
        ({"image": image(), "label": "cat"}, "batch['label'] has type str, and the model was trained on torch.float32"),
        (image(), "batch['image'] is missing; the model was trained on torch.float32 (any, 3, 8, 8)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(batch: Any, says: str) -> None:
    schema = stored(schema_of({"image": image(), "label": torch.zeros(4)}))
    with pytest.raises(DataError) as error:
        schema.check(batch)
    assert str(error.value).startswith(says)
    assert str(error.value).endswith(". Make this data as the training data was made, or train on data like this")


def test_the_batch_is_called_as_the_caller_says() -> None:
    assert schema_of([image()]).differences([image().half()], "the first batch of valid") == [
        "the first batch of valid[0] has dtype torch.float16, and the model was trained on torch.float32"
    ]


@pytest.mark.parametrize("batch", [image(2), (image(2),), (image(2), torch.zeros(2)), [image(2)]])
def test_prediction_may_leave_the_targets_out(batch: Any) -> None:
    schema_of((image(), torch.zeros(4))).check(batch, partial=True)
    wide = batch.double() if isinstance(batch, torch.Tensor) else type(batch)(part.double() for part in batch)
    with pytest.raises(DataError, match=r"has dtype torch\.float64, and the model was trained on torch\.float32"):
        schema_of((image(), torch.zeros(4))).check(wide, partial=True)


def test_prediction_with_nothing_of_what_was_trained_on_is_named() -> None:
    schema = schema_of({"image": image(), "label": torch.zeros(4)})
    schema.check({"image": image(), "file": ["a"]}, partial=True)
    with pytest.raises(DataError, match=r"batch\['image'\] is missing.*batch\['picture'\] .* is new"):
        schema.check({"picture": image()}, partial=True)
    schema_of(image()).check((image(), torch.zeros(4)), partial=True)


def test_lengths_that_vary_are_learned() -> None:
    schema = schema_of({"tokens": torch.zeros(4, 7), "mask": torch.zeros(4)})
    with pytest.raises(DataError, match=r"has shape \(any, 9\)"):
        schema.check({"tokens": torch.zeros(4, 9), "mask": torch.zeros(4)})
    schema = stored(schema.including({"tokens": torch.zeros(2, 9)}))
    schema.check({"tokens": torch.zeros(4, 5)})
    schema.check({"tokens": torch.zeros(4, 5), "mask": torch.zeros(4)})
    assert str(schema).splitlines()[1] == "batch['mask']: torch.float32 (any), not in every batch"
    with pytest.raises(DataError, match="tokens"):
        schema.check({"tokens": torch.zeros(4, 5, 1)})


def test_samples_in_a_list_are_one_part_of_any_number() -> None:
    boxes = [torch.zeros(n, 4) for n in (1, 5, 2)]
    images = tuple(torch.zeros(3, n, n) for n in (8, 9, 8, 8))
    schema = schema_of([images, boxes])
    assert str(schema).splitlines() == [
        "batch[0][*]: torch.float32 (any, any, any)",
        "batch[1][*]: torch.float32 (any, 4)",
    ]
    schema.check([images[:3], boxes * 2])


def test_columns_of_a_batch_stay_apart() -> None:
    schema = schema_of([torch.zeros(4, 2), torch.zeros(4, 3), torch.zeros(4, 1)])
    with pytest.raises(DataError, match=r"batch\[1\] has shape \(any, 5\), and the model was trained on \(any, 3\)"):
        schema.check([torch.zeros(4, 2), torch.zeros(4, 5), torch.zeros(4, 1)])


leaves = st.sampled_from(
    [torch.zeros(2), torch.zeros(3, 2), torch.zeros(2, dtype=torch.int8), 1, "a", None, np.zeros(4)]
)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


@given(trees, trees)
def test_a_schema_that_includes_both_fits_both(one: Any, other: Any) -> None:
    schema = stored(schema_of(one).including(other))
    assert schema.differences(one) == schema.differences(other) == []


@given(trees, trees)
def test_differences_are_found_unless_there_are_none(one: Any, other: Any) -> None:
    assert bool(schema_of(one).differences(other)) == (schema_of(one) != schema_of(other))


def test_no_value_is_read() -> None:
    meta = torch.zeros(4, 3, device="meta")
    assert str(schema_of(meta)) == "batch: torch.float32 (any, 3)"
