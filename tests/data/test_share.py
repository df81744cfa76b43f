"""Which rank reads what: pure functions of the order, proved for up to 4,096 ranks without a process."""

from __future__ import annotations

import time
import tracemalloc
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from loopwright.data import Cut, Loader, as_source, limit, shared
from loopwright.data.share import Part
from loopwright.errors import DataError

N = 50
X = torch.arange(N)
MANY = st.integers(1, 4096)


@given(st.integers(0, 100_000), MANY)
def test_the_slices_of_a_batch_are_all_of_it_once_and_differ_by_one_sample_at_most(size: int, world: int) -> None:
    bounds = [Cut(rank, world).bounds(size) for rank in range(world)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == size
    assert all(one[1] == other[0] for one, other in pairwise(bounds))
    sizes = [high - low for low, high in bounds]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 10**9), MANY)
def test_a_whole_batch_has_one_rank(number: int, world: int) -> None:
    owners = [rank for rank in range(world) if Cut(rank, world, whole=True).rows([1], number) is not None]
    assert owners == [number % world]


@given(st.integers(1, 4096), st.integers(1, 64), st.integers(1, 64))
def test_resharding_changes_who_reads_and_not_what_is_read(size: int, before: int, after: int) -> None:
    indices = torch.randperm(size)
    for world in (before, after):
        parts = [Cut(rank, world).rows(indices, 0) for rank in range(world)]
        assert torch.equal(torch.cat([part for part in parts if part is not None]), indices)


def sources() -> dict[str, Any]:
    pairs = [(x, x * 10) for x in X]
    return {
        "arrays": lambda: Loader((X, X * 10), 8, shuffle=True),
        "tensor dataset": lambda: DataLoader(TensorDataset(X, X * 10), 8, shuffle=True),
        "data loader": lambda: DataLoader(pairs, 8, shuffle=True),
        "one sample a batch": lambda: DataLoader([(x[None], x[None] * 10) for x in X], None, shuffle=True),
        "workers": lambda: DataLoader(pairs, 8, shuffle=True, num_workers=2),
        "list": lambda: [[x, x * 10] for x in X.split(8)],
        "dicts": lambda: [{"x": x, "y": x * 10, "name": [str(i) for i in x.tolist()]} for x in X.split(8)],
        "limited": lambda: limit(DataLoader(pairs, 8, shuffle=True), batches=4),
        "own loader with workers": lambda: Loader(TensorDataset(X, X * 10), 8, shuffle=True, workers=2),
    }


def whole(make: Any, epoch: int, batch: int = 0) -> list[Any]:
    torch.manual_seed(epoch)
    source = as_source(make(), train=True, key=3)
    batches = list(source.at(epoch, batch))
    close(source)
    return batches


def close(source: Any) -> None:
    """Workers of our loader live on."""
    if hasattr(source, "close"):
        source.close()


def flat(batches: list[Any]) -> list[Any]:
    """The samples of batches, one after the other."""
    first = [batch["x"] if isinstance(batch, dict) else batch[0] for batch in batches]
    return [x.tolist() for x in first]


@pytest.mark.parametrize("world", [2, 3, 16])
@pytest.mark.parametrize("kind", list(sources()))
def test_the_parts_of_all_ranks_are_the_batches_of_one_process(kind: str, world: int) -> None:
    make = sources()[kind]
    expected, found = flat(whole(make, 1)), None
    for rank in range(world):
        torch.manual_seed(1)
        source = shared(as_source(make(), train=True, key=3), Cut(rank, world))
        parts = list(source.at(1, 0))
        assert [type(part) for part in parts] == [Part] * len(expected)
        assert [part.size for part in parts] == [len(samples) for samples in expected]
        mine = [[] if part.batch is None else flat([part.batch])[0] for part in parts]
        found = mine if found is None else [one + more for one, more in zip(found, mine, strict=True)]
        close(source)
    assert found == expected


@pytest.mark.parametrize("kind", list(sources()))
def test_in_evaluation_whole_batches_go_round(kind: str) -> None:
    make = sources()[kind]
    expected = flat(whole(make, 0))
    for rank in range(3):
        torch.manual_seed(0)
        source = shared(as_source(make(), train=True, key=3), Cut(rank, 3, whole=True))
        parts = list(source.at(0, 0))
        close(source)
        found = [None if part.batch is None else flat([part.batch])[0] for part in parts]
        assert found == [one if number % 3 == rank else None for number, one in enumerate(expected)]


@pytest.mark.parametrize("kind", ["data loader", "tensor dataset", "arrays", "workers"])
def test_a_rank_goes_on_in_the_middle_of_an_epoch(kind: str) -> None:
    make = sources()[kind]
    torch.manual_seed(4)
    source = shared(as_source(make(), train=True, key=3), Cut(1, 2))
    parts = iter(source.at(0, 0))
    for _ in range(3):
        next(parts)
    state = source.state_dict()
    rest = [part.batch[0].tolist() for part in parts]
    again = shared(as_source(make(), train=True, key=3), Cut(1, 2))
    again.load_state_dict(state)
    assert [part.batch[0].tolist() for part in again.at(0, 3)] == rest


def test_what_cannot_be_sliced_says_so() -> None:
    source = shared(as_source([[torch.zeros(4, 2), torch.zeros(3)]], train=True, key=0), Cut(0, 2))
    with pytest.raises(DataError, match=r"a batch of 4 samples cannot be shared out over the ranks: float32\[3\]"):
        list(source.at(0, 0))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 4095), st.integers(0, 10**6))
def test_one_of_4096_ranks_begins_anywhere_in_a_billion_samples_in_next_to_no_time_and_memory(
    rank: int, batch: int
) -> None:
    class Many:
        """A dataset of a billion samples that is asked for indices."""

        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, i: int) -> int:
            return i

    loader = Loader(Many(), 8192, shuffle=True).keyed(1)
    batch %= loader.batches
    began = time.process_time()
    next(iter(shared(loader, Cut(rank, 4096)).at(5, batch)))
    assert time.process_time() - began < 1.0  # 8 ms; a permutation of all of them takes 10 s and more
    tracemalloc.start()
    first = next(iter(shared(loader, Cut(rank, 4096)).at(5, batch)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 2**20
    other = next(iter(shared(loader.keyed(1), Cut(0, 1)).at(5, batch)))
    low, high = Cut(rank, 4096).bounds(first.size)
    assert torch.equal(first.batch, other.batch[low:high])
