from __future__ import annotations

import random
import tracemalloc
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from loopwright.data import Blocks, Loader
from loopwright.data.generators import get_globals
from loopwright.data.plan import scattered
from loopwright.errors import CheckpointError, DataError, SettingError


class Pair(NamedTuple):
    x: Any
    y: Any


class Squares(Dataset[Any]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> Any:
        return {"n": i, "square": torch.tensor(i * i)}


def test_batches_have_the_structure_of_the_data() -> None:
    x, y = torch.arange(6).view(3, 2), np.arange(3.0)
    data = {"pair": Pair(x, y), "list": [x, (y,)], "alone": x}
    first, second = Loader(data, 2)
    assert type(first) is dict
    assert type(first["pair"]) is Pair
    assert type(first["list"]) is list
    assert type(first["list"][1]) is tuple
    assert torch.equal(second["pair"].x, x[2:])
    assert torch.equal(first["list"][1][0], torch.tensor([0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "int8", "uint8", "bool"])
def test_dtypes_of_numpy_stay(dtype: str) -> None:
    (batch,) = Loader(np.ones(3, dtype), 3)
    assert str(batch.dtype) == f"torch.{dtype}"


def test_arrays_that_torch_would_not_take_are_read_all_the_same(tmp_path: Path) -> None:
    """Read-only, big-endian, reversed and memory-mapped ones; without a warning, and without a copy where it can be."""
    frozen = np.arange(4.0)
    frozen.flags.writeable = False
    path = tmp_path / "x.npy"
    np.save(path, np.arange(4.0))
    mapped = np.load(path, mmap_mode="r")
    for array in (
        frozen,
        np.arange(4.0, dtype=">f8"),
        np.arange(4.0)[::-1][::-1],
        np.arange(3.0, -1, -1)[::-1],
        mapped,
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loader = Loader(array, 4)
        (batch,) = loader
        assert batch.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert loader._read.tensors.data_ptr() == mapped.ctypes.data


def test_frames_become_one_tensor_that_holds_all_columns() -> None:
    frame = pd.DataFrame({"a": [1, 2, 3], "b": [0.5, 1.5, 2.5], "c": [True, False, True]})
    (batch,) = Loader((frame, frame["a"]), 3)
    assert torch.equal(batch[0], torch.tensor([[1, 0.5, 1], [2, 1.5, 0], [3, 2.5, 1]], dtype=torch.float64))
    assert torch.equal(batch[1], torch.tensor([1, 2, 3]))
    nullable = pd.DataFrame({"a": pd.array([1, None], "Int64")})
    (batch,) = Loader(nullable, 3)
    assert torch.equal(batch.isnan(), torch.tensor([[False], [True]]))


def test_columns_that_are_not_numbers_are_named() -> None:
    frame = pd.DataFrame({"age": [1, 2], "name": ["a", "b"], "day": pd.to_datetime(["2020-01-01", "2020-01-02"])})
    with pytest.raises(DataError) as error:
        Loader({"x": frame})
    assert str(error.value).startswith("data['x'] has columns that are not numbers: 'name' (str), 'day' (datetime64[")
    assert str(error.value).endswith(
        'Turn them into numbers first, as in frame["name"].astype("category").cat.codes, or drop them'
    )


@pytest.mark.parametrize("table", [pd.DataFrame(index=range(3)), pa.table({})])
def test_a_table_without_columns_is_told_by_its_place(table: Any) -> None:
    with pytest.raises(DataError) as error:
        Loader({"x": torch.zeros(3), "kinds": table})
    assert str(error.value) == "data['kinds'] is a table without columns; leave it out, or choose others"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ((torch.zeros(3), torch.zeros(4)), r"different lengths: len\(data\[0\]\) == 3, len\(data\[1\]\) == 4\. All"),
        (
            [(torch.zeros(n + 1), torch.zeros(n + 1)) for n in range(5000)],
            r"len\(data\[3\]\[1\]\) == 4, and 9992 more\. .{,200} of a list of them torch\.utils\.data\.Subset",
        ),
        (
            np.array(["a"]),
            r"dtype <U1; expected numbers or booleans\. Names of classes are numbered by np\.unique\(names,",
        ),
        (np.array(1.0), "data is a single number"),
        ((), "cannot read an empty tuple"),
        ([1, 2], "cannot read a list of int"),
        ("text", "cannot read 'text'"),
        (iter([1]), r"cannot read <list_iterator.*\. Ready batches, from a function or an iterable, go to fit as they"),
        ({"x": [1] * 9}, r"cannot read a dict of list; .*Of numbers in a list make an array, np\.asarray\(y\); of te"),
        ([{"text": "a"}], r"a list of dict; .*samples make one: torch\.utils\.data\.Subset\(samples, range\(len\(samp"),
        (np.array([np.ones(2), 1], object), r"dtype object; .* lengths make a dataset, torch\.utils\.data\.StackData"),
        (np.array(["2020"], "M8[D]"), r"dtype datetime64\[D\]; expected numbers or booleans\. Times are numbers as in"),
        (np.zeros(2, [("a", "f4")]), r"Fields are columns, as in \{name: x\[name\] for name in x\.dtype\.names\}"),
        (
            type("Stream", (IterableDataset,), {"__iter__": iter})(),
            r"Stream is an IterableDataset, .* pass torch\.utils\.data\.DataLoader",
        ),
        (type("Sized", (Dataset,), {})(), "Sized has no __len__; define it"),
    ],
)
def test_data_that_cannot_be_read_is_refused_with_the_reason(data: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        Loader(data)


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_a_batch_size_below_one_is_refused(size: Any) -> None:
    with pytest.raises(SettingError, match=rf"batch_size={size}; expected a whole number of at least 1"):
        Loader(torch.zeros(3), size)


def test_a_dataset_is_collated_as_torch_does() -> None:
    theirs = list(DataLoader(Squares(), 2))
    ours = list(Loader(Squares(), 2))
    assert str(ours) == str(theirs)
    assert str(list(Loader(TensorDataset(torch.arange(5)), 2))) == str(
        list(DataLoader(TensorDataset(torch.arange(5)), 2))
    )
    subset = Subset(TensorDataset(torch.arange(5)), [4, 1, 1])
    assert str(list(Loader(subset, 2))) == str(list(DataLoader(subset, 2)))


def test_a_failing_sample_is_named() -> None:
    class Bad(Squares):
        def __getitem__(self, i: int) -> Any:
            return 1 // (3 - i)

    with pytest.raises(ZeroDivisionError) as error:
        list(Loader(Bad(), 2))
    assert error.value.__notes__ == [
        "[loopwright] while fetching batch 2 of epoch 1, dataset indices [2, 3]; it was dataset[3] that raised"
    ]


def test_every_iteration_is_an_epoch_and_draws_nothing() -> None:
    before = get_globals()
    loader = Loader(torch.arange(50), 50, shuffle=True, seed=1)
    (first,), (second,) = loader, loader
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, torch.arange(50))
    assert torch.equal(next(Loader(torch.arange(50), 50, shuffle=True, seed=1).at(1, 0)), second)
    assert get_globals() == before


def test_the_key_comes_from_the_seed_then_the_run_then_torch() -> None:
    def order(loader: Loader) -> list[int]:
        return next(loader.at(0, 0)).tolist()  # type: ignore[no-any-return]

    bare = Loader(torch.arange(50), shuffle=True)
    seeded = Loader(torch.arange(50), shuffle=True, seed=7)
    assert order(seeded.keyed(1)) == order(seeded)
    assert order(bare.keyed(7)) == order(seeded) != order(bare.keyed(8))
    torch.manual_seed(7)
    assert order(bare) == order(seeded)


shuffles = st.sampled_from([False, True]) | st.builds(Blocks, st.integers(1, 20), st.integers(1, 5))


@settings(max_examples=100)
@given(
    n=st.integers(1, 60),
    size=st.integers(1, 70),
    shuffle=shuffles,
    drop=st.booleans(),
    epoch=st.integers(0, 9),
    skip=st.integers(0, 9),
)
def test_the_rest_of_an_epoch_is_its_tail(n: int, size: int, shuffle: Any, drop: bool, epoch: int, skip: int) -> None:
    loader = Loader(torch.arange(n), size, shuffle=shuffle, drop_last=drop, seed=0)
    whole = [batch.tolist() for batch in loader.at(epoch, 0)]
    seen = sorted(i for batch in whole for i in batch)
    assert len(set(seen)) == len(seen) == (n // size * size if drop else n), "every sample exactly once"
    assert [batch.tolist() for batch in loader.at(epoch, skip)] == whole[skip:]
    assert list(loader.sizes(skip)) == [len(batch) for batch in whole[skip:]]
    assert len(loader) == loader.batches == len(whole)


def test_a_resumed_run_keeps_its_key_and_refuses_other_data() -> None:
    state = Loader(torch.arange(9), 2, shuffle=True).keyed(5).state_dict()
    fresh = Loader(torch.arange(9), 2, shuffle=True).keyed(6)
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state
    with pytest.raises(CheckpointError, match="length was 9 and is 8, shuffle was True and is False"):
        Loader(torch.arange(8), 2).load_state_dict(state)
    with pytest.raises(CheckpointError, match="key was 5 and is 4"):
        Loader(torch.arange(9), 2, shuffle=True, seed=4).load_state_dict(state)


def test_neighbouring_keys_and_epochs_have_orders_of_their_own() -> None:
    orders = {
        tuple(next(Loader(torch.arange(30), shuffle=True, seed=key).at(epoch, 0)).tolist())
        for key in range(20)
        for epoch in range(20)
    }
    assert len(orders) == 400


def test_the_representation_tells_the_settings() -> None:
    assert repr(Loader(torch.zeros(3, 1), seed=1)) == (
        "Loader(Tensor of 3 samples, batch_size=64, shuffle=False, drop_last=False, seed=1)"
    )


class Drawing(Squares):
    """Noise from a generator of its own."""

    def __init__(self, rng: Any) -> None:
        self.rng = rng

    def __getitem__(self, i: int) -> Any:
        if isinstance(self.rng, torch.Generator):
            return torch.rand((), generator=self.rng)
        return torch.tensor(float(self.rng.random()))


@pytest.mark.parametrize("make", [np.random.default_rng, random.Random, lambda n: torch.Generator().manual_seed(n)])
def test_the_generators_of_a_dataset_come_back_with_the_position(make: Any) -> None:
    whole = [batch.tolist() for batch in Loader(Drawing(make(1)), 2, seed=0)]
    source = Loader(Drawing(make(1)), 2, seed=0)
    next(source.at(0, 0))
    state = source.state_dict()
    fresh = Loader(Drawing(make(9)), 2, seed=0)
    fresh.load_state_dict(state)
    assert [batch.tolist() for batch in fresh.at(0, 1)] == whole[1:]
    assert [batch.tolist() for batch in fresh.at(1, 0)] != whole  # the state is used once


def test_a_loader_that_is_shared_keeps_a_loaded_state_for_its_own_pass() -> None:
    shared = Loader(Drawing(random.Random(1)), 2, seed=0)
    train, valid = shared.keyed(1), shared.keyed(1)
    state = train.state_dict()
    train.load_state_dict(state)
    assert valid._loaded is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shuffle": "blocks"}, r"shuffle='blocks'; expected True, False or lw\.data\.Blocks\(size\)"),
        ({"workers": -1}, "workers=-1; expected a whole number of at least 0"),
        ({"workers": 1, "prefetch": 0}, "prefetch=0; expected a whole number of at least 1"),
        ({"prefetch": 3}, "prefetch=3 needs workers to fetch ahead; add workers=2, or leave it out"),
        ({"transform": 3}, "transform=3 cannot be called; pass a function of a sample"),
        ({"collate": 3}, "collate=3 cannot be called; pass a function of a list of samples"),
        ({"transform": lambda a, b, c: a}, r"transform needs the arguments a, b, c; expected transform\(sample\), or"),
    ],
)
def test_arguments_that_cannot_apply_are_refused(options: Any, says: str) -> None:
    with pytest.raises(SettingError, match=says):
        Loader(torch.arange(3), 2, **options)


def test_a_resumed_run_refuses_another_shuffle() -> None:
    state = Loader(torch.arange(9), 2, shuffle=Blocks(3), seed=0).state_dict()
    Loader(torch.arange(9), 2, shuffle=Blocks(3), seed=0).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"shuffle was 'Blocks\(size=3, window=16\)' and is True"):
        Loader(torch.arange(9), 2, shuffle=True, seed=0).load_state_dict(state)


# ------------------------------------------------------------------------------------------------- bounded memory


class Lengthy:
    """Far more samples than indices fit in memory; remembers what was read."""

    def __init__(self, length: int) -> None:
        self.length, self.read = length, 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> int:
        self.read += 1
        return i


@pytest.mark.parametrize("shuffle", [False, True, Blocks(10_000)])
def test_a_billion_samples_are_read_from_anywhere_without_the_order_in_memory(shuffle: Any) -> None:
    data = Lengthy(1_000_000_000)
    loader = Loader(data, 100, shuffle=shuffle, seed=1)
    tracemalloc.start()
    found = [next(loader.at(0, batch)).tolist() for batch in (0, 1_000_000, 9_999_999)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert data.read == 300
    assert len({i for batch in found for i in batch}) == 300
    assert peak < 50e6  # NumPy's memory is counted; torch's is at most 8 bytes a block and a sample of the window
    assert found[1] == next(loader.at(0, 1_000_000)).tolist()


@settings(max_examples=50)
@given(n=st.integers(1, 300), key=st.integers(0, 5), cut=st.integers(0, 300))
def test_a_permutation_computed_in_pieces_holds_every_index_once(n: int, key: int, cut: int) -> None:
    cut = min(cut, n)
    pieces = torch.cat([scattered(n, key, 0, 0, cut), scattered(n, key, 0, cut, n)])
    assert torch.equal(pieces.sort().values, torch.arange(n))


def test_a_permutation_computed_in_pieces_spreads_as_a_shuffle_does() -> None:
    """Uniform in place by place, and neighbours part: chi-square over 20 x 20 cells, serial correlation near 0."""
    n = 100_000
    order = scattered(n, 3, 1, 0, n)
    counts = torch.zeros(20, 20).index_put_(
        (torch.arange(n) * 20 // n, order * 20 // n), torch.ones(()), accumulate=True
    )
    chi2 = float(((counts - n / 400) ** 2 / (n / 400)).sum())
    assert 250 < chi2 < 480  # 361 expected, standard deviation 27
    assert abs(float(torch.corrcoef(torch.stack([order[:-1], order[1:]]).double())[0, 1])) < 0.02
    orders = {tuple(scattered(9, key, epoch, 0, 9).tolist()) for key in range(10) for epoch in range(10)}
    assert len(orders) > 95


def test_blocks_read_few_places_at_a_time() -> None:
    loader = Loader(torch.arange(1000), 10, shuffle=Blocks(20, window=3), seed=0)
    order = torch.cat(list(loader.at(0, 0)))
    first = order[:60]
    assert len(set((first // 20).tolist())) == 3
    assert not torch.equal(first.view(3, 20) % 20, torch.arange(20).expand(3, 20))
    assert len({tuple(torch.cat(list(loader.at(epoch, 0))).tolist()) for epoch in range(10)}) == 10


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (2.0, 1)])
def test_blocks_below_one_are_refused(sizes: Any) -> None:
    with pytest.raises(SettingError, match="expected a whole number of at least 1"):
        Blocks(*sizes)
