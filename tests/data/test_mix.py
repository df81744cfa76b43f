from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import loopwright as lw
from loopwright.data import Loader, as_source
from loopwright.data.mix import Mix
from loopwright.errors import CheckpointError, DataError, SettingError
from splits import check_every_split
from tiny import trainer


class Noisy(Dataset[Any]):
    """Draws from every global generator, and from one of its own."""

    def __init__(self, n: int, seed: int = 1) -> None:
        self.n, self.rng = n, np.random.default_rng(seed)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        return torch.rand(2) + i, random.random(), self.rng.random()


class Stream(IterableDataset[Any]):
    """Knows its position."""

    def __init__(self, n: int = 9) -> None:
        self.n, self.position = n, 0

    def __iter__(self) -> Iterator[Any]:
        while self.position < self.n:
            self.position += 1
            yield torch.rand(2) + self.position
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


def numbers(n: int, first: int = 0) -> list[int]:
    return list(range(first, first + n))


def arrays(n: int = 14) -> Loader:
    return Loader(torch.arange(n), 3, shuffle=True)


def plain(n: int = 10) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(n)), 3, shuffle=True)


def noisy(n: int = 11, seed: int = 1) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(Noisy(n, seed), 3, shuffle=True, generator=generator)


ALL = {"arrays": arrays, "plain": plain, "noisy": noisy}


@pytest.mark.parametrize("until", ["first", "all", "longest"])
@pytest.mark.parametrize("weights", [None, {"arrays": 1.0, "plain": 3.0, "noisy": 1.5}], ids=["in turn", "weighted"])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_a_mix_resumes_at_every_batch_in_bits(until: str, weights: Any, twice: bool) -> None:
    def make() -> Mix:
        return Mix({name: one() for name, one in ALL.items()}, weights=weights, until=until)

    check_every_split(make, epochs=2, twice=twice)


def test_a_mix_of_streams_and_mixes_resumes_at_every_batch_in_bits() -> None:
    def make() -> Mix:
        inner = Mix({"x": arrays(7), "y": noisy(4, 7)}, until="longest")
        return Mix({"stream": DataLoader(Stream(), 2), "inner": inner}, until="all", tag=True)

    check_every_split(make)


def test_sources_take_turns_until_the_first_or_the_longest_or_all_are_used_up() -> None:
    sources = {"a": [1, 2, 3], "b": [10], "c": [100, 200]}
    assert list(Mix(sources)) == [1, 10, 100, 2]
    assert list(Mix(sources, until="all")) == [1, 10, 100, 2, 200, 3]
    assert list(Mix(sources, until="longest")) == [1, 10, 100, 2, 10, 200, 3]
    assert list(Mix({"a": [1, 2], "b": [3, 4]}, until="longest")) == [1, 3, 2, 4]
    assert list(Mix(sources, tag=True))[:2] == [("a", 1), ("b", 10)]


def test_data_whose_length_is_unknown_is_mixed_the_same_way() -> None:
    def three() -> Iterator[int]:
        yield from (1, 2, 3)

    for until in ("first", "all"):
        listed = list(Mix({"a": [1, 2, 3], "b": [10]}, until=until))
        assert list(Mix({"a": three, "b": [10]}, until=until)) == listed
    made = as_source(Mix({"a": three, "b": [10]}), train=True, key=0)
    assert made.exact == [
        "source 'a': test_data_whose_length_is_unknown_is_mixed_the_same_way.<locals>.three has no position to "
        "save, as an iterable with state_dict and load_state_dict has; "
        "a resume reads it again from the start of the epoch"
    ]


lengths = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 6), min_size=1)


@given(lengths, st.sampled_from(["first", "all", "longest"]))
def test_the_number_of_batches_is_told_before(lengths: dict[str, int], until: str) -> None:
    made = as_source(Mix({k: numbers(n) for k, n in lengths.items()}, until=until), train=True, key=0)
    assert made.batches == len(list(made.at(0, 0)))


@given(lengths, st.sampled_from(["first", "all", "longest"]), st.integers(0, 5), st.data())
def test_any_batch_of_any_epoch_can_be_reached_without_a_state(
    lengths: dict[str, int], until: str, epoch: int, data: Any
) -> None:
    weights = data.draw(st.none() | st.just({k: i + 0.5 for i, k in enumerate(lengths)}))
    mix = Mix({k: numbers(n, 10 * n) for k, n in lengths.items()}, weights=weights, until=until)
    whole = list(as_source(mix, train=True, key=3).at(epoch, 0))
    start = data.draw(st.integers(0, len(whole)))
    assert list(as_source(mix, train=True, key=3).at(epoch, start)) == whole[start:]


@given(lengths)
def test_until_all_gives_each_batch_once_however_it_is_drawn(lengths: dict[str, int]) -> None:
    mix = Mix({k: numbers(n) for k, n in lengths.items()}, weights=dict.fromkeys(lengths, 2.0), until="all", tag=True)
    assert sorted(mix) == sorted((k, i) for k, n in lengths.items() for i in range(n))


def test_weights_are_met_and_turns_depend_on_the_key_and_the_epoch_alone() -> None:
    mix = Mix({"a": [0] * 9000, "b": [1] * 9000}, weights={"a": 1, "b": 3})

    def turns(key: int, epoch: int) -> list[int]:
        return list(as_source(mix, train=True, key=key).at(epoch, 0))

    state = torch.get_rng_state()
    first = turns(0, 0)
    assert sum(first) / len(first) == pytest.approx(0.75, abs=0.01)
    torch.manual_seed(8)
    assert turns(0, 0) == first
    assert turns(0, 1)[:50] != first[:50] != turns(1, 0)[:50]
    torch.set_rng_state(state)
    turns(0, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_of_its_own_outlives_the_key_of_the_run() -> None:
    mix = Mix({"a": arrays(), "b": numbers(9)}, weights={"a": 1, "b": 1}, seed=4)
    one, two = (list(as_source(mix, train=True, key=key).at(0, 0)) for key in (1, 2))
    assert all(map(same_batch, one, two))


def same_batch(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def test_sources_of_equal_length_are_shuffled_apart_and_a_source_that_begins_again_anew() -> None:
    data = torch.arange(40)
    batches = list(Mix({"a": Loader(data, 40, shuffle=True), "b": Loader(data, 40, shuffle=True)}, seed=1))
    assert not torch.equal(*batches)
    again = Mix({"a": Loader(data, 40, shuffle=True), "b": [0, 0]}, until="longest", seed=1)
    a, _, more, _ = again
    assert not torch.equal(a, more)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Mix({}), 'Mix needs its sources by name, as in Mix({"a": loader, "b": loader}); got {}'),
        (lambda: Mix({"a": [1]}, until="lats"), "until='lats'; Known: 'all', 'first', 'longest'."),
        (lambda: Mix({"a": [1]}, weights={"b": 1}), "weights has 'b', which is no source. Known: 'a'."),
        (lambda: Mix({"a": [1], "b": [1]}, weights={"a": 1}), "weights of 'b' is None; expected a positive number"),
        (
            lambda: Mix({"a": [1], "b": [1]}, weights=[1, 3]),
            'weights=[1, 3]; expected a positive number for each source by name: {"a": 1, "b": 2}',
        ),
        (lambda: Mix({"a": [1]}, weights={"a": 0.0}), "weights of 'a' is 0.0; expected a positive number for each"),
    ],
)
def test_settings_that_cannot_be_are_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(SettingError) as error:
        make()
    assert says in str(error.value)


def test_a_source_that_is_empty_is_named() -> None:
    for empty in ([], torch.zeros(0, 2)):
        with pytest.raises(DataError, match=r"^the source 'b' of Mix: there is not one batch in the data"):
            list(Mix({"a": [1], "b": empty}))


def test_a_mix_shows_what_it_is() -> None:
    mixed = Mix({"a": [1], "b": [2]}, weights={"a": 1, "b": 2}, until="all")
    assert repr(mixed) == "Mix(a, b, weights={'a': 1, 'b': 2}, until='all', seed=None, tag=False)"


def test_one_source_in_two_places_is_refused_and_a_shared_generator_is_no_exact_resume() -> None:
    inner = as_source([1, 2], train=True, key=0)
    with pytest.raises(DataError, match="'a' and 'b' are the same source"):
        as_source(Mix({"a": inner, "b": inner}), train=True, key=0)
    generator = torch.Generator()
    both = {k: DataLoader(Noisy(5, seed), shuffle=True, generator=generator) for seed, k in enumerate("ab")}
    assert as_source(Mix(both), train=True, key=0).exact == ["the sources 'a' and 'b' draw from the same generator"]


def test_a_source_that_is_used_up_cannot_begin_again() -> None:
    with pytest.raises(DataError, match="used up in an earlier epoch"):
        list(Mix({"a": iter([1]), "b": [1, 2, 3]}, until="longest"))


def test_a_mix_with_other_sources_than_the_saved_one_is_refused() -> None:
    state = as_source(Mix({"a": [1], "b": [2]}), train=True, key=0).state_dict()
    with pytest.raises(CheckpointError, match=r"names was \['a', 'b'\] and is \['a', 'c'\]"):
        as_source(Mix({"a": [1], "c": [2]}), train=True, key=0).load_state_dict(state)
    with pytest.raises(CheckpointError, match="until was 'first' and is 'all'"):
        as_source(Mix({"a": [1], "b": [2]}, until="all"), train=True, key=0).load_state_dict(state)


def test_iterators_of_all_sources_are_closed_when_the_loop_leaves_early() -> None:
    closed = []

    def endless(name: str) -> Callable[[], Iterator[str]]:
        def batches() -> Iterator[str]:
            try:
                while True:
                    yield name
            finally:
                closed.append(name)

        return batches

    turns = as_source(Mix({"a": endless("a"), "b": endless("b")}), train=True, key=0).at(0, 0)
    assert [next(turns) for _ in range(3)] == ["a", "b", "a"]
    turns.close()  # type: ignore[attr-defined]
    assert closed == ["a", "b"]


def test_fit_trains_on_a_mix() -> None:
    x = torch.randn(20, 1, generator=torch.Generator().manual_seed(0))
    net = torch.nn.Linear(1, 1)
    task = lw.Supervised(net, torch.nn.MSELoss(), torch.optim.SGD(net.parameters(), 0.1))
    run = trainer(epochs=2, accumulate=3).fit(task, Mix({"a": Loader((x, x), 5), "b": Loader((x, -x), 4)}), (x, x))
    assert (run.progress.epoch, run.progress.samples) == (2, 2 * (4 * 5 + 4 * 4))
    assert run.exact is True
