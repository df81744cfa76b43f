from __future__ import annotations

import copy
import gc
import multiprocessing
import random
import traceback
import weakref
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from loopwright.data import Iterated, TorchLoader, as_source
from loopwright.data.generators import get_globals
from loopwright.errors import CheckpointError, DataError


@pytest.fixture(autouse=True)
def few_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataLoader, "check_worker_number_rationality", lambda self: None)


class Broken(Dataset[Any]):
    """Raises for sample 7."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> Any:
        if i == 7:
            raise KeyError("no such file")
        return torch.tensor(i)


class Keyed(Dataset[Any]):
    """Samples by number or by name."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __getitem__(self, key: Any) -> Any:
        return self.samples[key if isinstance(key, str) else int(key)]


class BrokenMany(Broken):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


def note_of(loader: DataLoader[Any], epoch: int = 0) -> str:
    with pytest.raises(KeyError) as error:
        list(TorchLoader(loader).at(epoch, 0))
    (note,) = error.value.__notes__
    return str(note)


def test_the_note_on_a_fetch_error_names_the_batch_and_the_sample() -> None:
    assert note_of(DataLoader(Broken(), 3), epoch=2) == (
        "[loopwright] while fetching batch 3 of epoch 3, dataset indices [6, 7, 8]; it was dataset[7] that raised"
    )


def test_the_sample_is_found_by_reading_again_where_the_dataset_reads_a_batch_at_once() -> None:
    assert note_of(DataLoader(BrokenMany(), 3)) == (
        "[loopwright] while fetching batch 3 of epoch 1, dataset indices [6, 7, 8]; read again, it was dataset[7] that "
        "raised"
    )


class OddError(Exception):
    """torch cannot make it anew from a text alone, and hands on a RuntimeError that names it."""

    def __init__(self, path: str, line: int) -> None:
        super().__init__(path, line)


class Drawing(Dataset[Any]):
    """Draws a number for each sample; the first time that 7 is read it raises ``first``, later ``again``."""

    def __init__(self, first: Exception, again: Exception | None) -> None:
        self.raising, self.states = [first, again], list[Any]()

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> Any:
        torch.rand(1)
        if i == 7:
            self.states.append(torch.get_rng_state())
            error = self.raising[min(len(self.states), 2) - 1]
            if error is not None:
                raise error
        return i

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


@pytest.mark.parametrize(("again", "found"), [(KeyError("label"), True), (ValueError("another"), False), (None, False)])
def test_a_sample_is_blamed_only_for_an_error_of_the_same_type_and_no_generator_moves(again: Any, found: bool) -> None:
    data = Drawing(KeyError("label"), again)
    note = note_of(DataLoader(data, 3))
    assert len(data.states) == 2
    assert torch.equal(torch.get_rng_state(), data.states[0])
    assert note == "[loopwright] while fetching batch 3 of epoch 1, dataset indices [6, 7, 8]" + (
        "; read again, it was dataset[7] that raised" if found else ""
    )


def test_an_error_of_a_worker_that_has_another_type_here_is_found_too() -> None:
    data = Drawing(OddError("a.png", 3), OddError("a.png", 3))
    with pytest.raises(RuntimeError, match="Caught OddError in DataLoader worker process 0") as error:
        list(TorchLoader(DataLoader(data, 3, num_workers=2)).at(0, 0))
    (note,) = error.value.__notes__
    assert note.endswith("; read again, it was dataset[7] that raised")


def test_the_note_names_the_index_alone_where_there_are_no_batches() -> None:
    assert note_of(DataLoader(Broken(), None)) == "[loopwright] while fetching batch 8 of epoch 1, dataset indices 7"


def test_an_error_in_collating_is_noted_with_its_batch() -> None:
    def collate(parts: list[Any]) -> Any:
        raise KeyError("uneven")

    note = note_of(DataLoader(range(4), 2, collate_fn=collate))  # type: ignore[arg-type]
    assert note == "[loopwright] while fetching batch 1 of epoch 1, dataset indices [0, 1]"


@pytest.mark.parametrize("persistent", [False, True])
def test_a_worker_error_is_noted_and_no_worker_outlives_it(persistent: bool) -> None:
    source = TorchLoader(DataLoader(Broken(), 3, num_workers=2, persistent_workers=persistent))
    with pytest.raises(KeyError) as error:
        list(source.at(0, 0))
    source.close()
    assert multiprocessing.active_children() == []  # although error.value still holds the frames
    (note,) = error.value.__notes__
    assert note == (
        "[loopwright] while fetching batch 3 of epoch 1, dataset indices [6, 7, 8]; read again, it was dataset[7] that "
        "raised"
    )
    assert "no such file" in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize("taken", [0, 1])
def test_closing_the_iterator_ends_the_workers_at_once(taken: int) -> None:
    source = TorchLoader(DataLoader(range(20), 2, num_workers=2))  # type: ignore[arg-type]
    batches = source.at(0, 0)
    for _ in range(taken):
        next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()  # type: ignore[attr-defined]
    del batches
    assert multiprocessing.active_children() == []


def test_persistent_workers_end_with_their_source() -> None:
    gc.disable()
    try:
        source = TorchLoader(DataLoader(range(20), 2, num_workers=1, persistent_workers=True))  # type: ignore[arg-type]
        next(source.at(0, 0))
        assert len(multiprocessing.active_children()) == 1
        del source
        assert multiprocessing.active_children() == []  # by counting references: there is no cycle
    finally:
        gc.enable()


def test_the_users_loader_is_not_touched() -> None:
    loader = DataLoader(Broken(), 3, shuffle=True, num_workers=1, persistent_workers=True)
    before = dict(vars(loader))
    source = TorchLoader(loader)
    next(source.at(0, 0))
    source.close()
    assert vars(loader) == before


class Epochs(Sampler[int]):
    """Reverses its order in odd epochs, as told."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(6) if self.epoch % 2 == 0 else range(5, -1, -1))

    def __len__(self) -> int:
        return 6


def test_a_sampler_is_told_the_epoch_also_after_a_resume() -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(range(6), 2, sampler=Epochs())  # type: ignore[arg-type]

    source = TorchLoader(loader())
    assert [b.tolist() for b in source.at(1, 0)] == [[5, 4], [3, 2], [1, 0]]
    next(source.at(3, 0))
    fresh = TorchLoader(loader())
    fresh.load_state_dict(source.state_dict())
    assert [b.tolist() for b in fresh.at(3, 1)] == [[3, 2], [1, 0]]


class Counts(Epochs):
    """Turns by one at every pass, which nothing tells."""

    passes = 0
    set_epoch = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter([(i + self.passes) % 6 for i in range(6)])


def test_a_sampler_that_does_not_repeat_itself_is_found_out() -> None:
    source = TorchLoader(DataLoader(range(6), 2, sampler=Counts()))  # type: ignore[arg-type]
    list(source.at(0, 0))
    next(source.at(1, 0))
    fresh = TorchLoader(DataLoader(range(6), 2, sampler=Counts()))  # type: ignore[arg-type]
    fresh.load_state_dict(source.state_dict())
    with pytest.raises(DataError) as error:
        fresh.at(1, 1)
    assert str(error.value) == (
        "cannot resume: the sampler Counts gave other indices for the first 1 batches than in the saved run, so "
        "its order depends on more than the random generators. Give it set_epoch(epoch), or state_dict() and "
        "load_state_dict(state), or use lw.Loader(dataset, shuffle=True)"
    )


class Draws(Epochs):
    def __iter__(self) -> Iterator[int]:
        for _ in range(6):
            yield random.randrange(6)


def test_a_sampler_that_draws_index_by_index_is_named_in_exact() -> None:
    source = TorchLoader(DataLoader(range(6), 2, sampler=Draws()))  # type: ignore[arg-type]
    batches = source.at(0, 0)
    next(batches)
    assert source.exact == []
    next(batches)
    assert source.exact == ["the sampler Draws draws random numbers from batch to batch"]
    fresh = TorchLoader(DataLoader(range(6), 2, sampler=Draws()))  # type: ignore[arg-type]
    fresh.load_state_dict(source.state_dict())
    assert len(list(fresh.at(0, 2))) == 1  # goes on, approximately


@pytest.mark.parametrize("form", [list, tuple, torch.tensor, np.array, lambda indices: [str(i) for i in indices]])
def test_a_batch_sampler_may_name_its_samples_in_any_form(form: Any) -> None:
    data = {key: torch.tensor(int(key)) for key in [*range(20), *map(str, range(20))]}

    def source(numbers: list[list[int]]) -> TorchLoader:
        return TorchLoader(DataLoader(Keyed(data), batch_sampler=list(map(form, numbers))))  # type: ignore[arg-type]

    numbers = [[3, 1], [19, 0, 7], [2]]
    first = source(numbers)
    batches = first.at(0, 0)
    assert next(batches).tolist() == [3, 1]
    state = first.state_dict()
    assert next(batches).tolist() == [19, 0, 7]
    unasked = source(numbers)
    list(islice(unasked.at(0, 0), 2))
    assert unasked.state_dict()["order"]["digest"] == first.state_dict()["order"]["digest"]  # however often it is asked
    again = source(numbers)
    again.load_state_dict(state)
    assert [batch.tolist() for batch in again.at(0, 1)] == [[19, 0, 7], [2]]
    other = source([[1, 3], *numbers[1:]])
    other.load_state_dict(state)
    with pytest.raises(DataError, match="gave other indices for the first 1 batches"):
        next(other.at(0, 1))


def test_batches_out_of_order_are_named_in_exact() -> None:
    source = TorchLoader(DataLoader(Broken(), 2, num_workers=1, in_order=False))
    assert source.exact == ["DataLoader(in_order=False) gives batches in the order in which its workers finish"]


def test_an_epoch_left_early_with_persistent_workers_is_named_in_exact() -> None:
    source = TorchLoader(DataLoader(range(20), 2, num_workers=1, persistent_workers=True))  # type: ignore[arg-type]
    batches = source.at(0, 0)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert source.exact == []  # going on here is exact
    next(source.at(1, 0))
    assert source.exact == ["an epoch was left early while persistent workers were ahead of it"]
    source.close()


def test_an_epoch_that_was_left_goes_on_in_its_order() -> None:
    source = TorchLoader(DataLoader(range(9), 2, shuffle=True))  # type: ignore[arg-type]
    batches = source.at(0, 0)
    seen = [next(batches), next(batches)]
    before = copy.deepcopy(source.state_dict())
    batches.close()  # type: ignore[attr-defined]
    assert source.state_dict() == before
    seen += source.at(0, 2)
    assert sorted(torch.cat(seen).tolist()) == list(range(9))


def test_skipping_without_a_state_loads_nothing() -> None:
    source = TorchLoader(DataLoader(Broken(), 2, shuffle=False))
    assert [b.tolist() for b in source.at(0, 4)] == [[i, i + 1] for i in range(8, 20, 2)]


def test_a_state_of_another_loader_or_position_is_refused() -> None:
    source = TorchLoader(DataLoader(range(20), 2))  # type: ignore[arg-type]
    next(source.at(0, 0))
    state = source.state_dict()
    with pytest.raises(CheckpointError, match=r"length was 20 and is 18, batches was 10 and is 9\. Pass the same"):
        TorchLoader(DataLoader(range(18), 2)).load_state_dict(state)  # type: ignore[arg-type]
    source.load_state_dict(state)
    with pytest.raises(DataError, match="the saved position is batch 1 of epoch 0, not batch 2 of epoch 0"):
        source.at(0, 2)


def test_a_worker_that_cannot_start_leaves_the_generators_alone_on_resume() -> None:
    def fail(worker: int) -> None:
        raise OSError("no device")

    source = TorchLoader(DataLoader(range(8), 2, num_workers=1))  # type: ignore[arg-type]
    next(source.at(0, 0))
    state = source.state_dict()
    fresh = TorchLoader(DataLoader(range(8), 2, num_workers=1, worker_init_fn=fail))  # type: ignore[arg-type]
    fresh.load_state_dict(state)
    before = get_globals()
    batches = fresh.at(0, 1)
    assert get_globals() == before
    with pytest.raises(OSError, match="no device"):
        next(batches)


@pytest.mark.slow
@pytest.mark.nightly
def test_spawned_workers_resume_too() -> None:
    """What Python 3.14 does by default: the worker's parts are pickled."""

    def loader() -> DataLoader[Any]:
        data = TensorDataset(torch.arange(12))
        return DataLoader(
            data, 2, shuffle=True, num_workers=1, multiprocessing_context="spawn", worker_init_fn=print_nothing
        )

    source = as_source(loader(), train=True, key=0)
    batches = source.at(0, 0)
    next(batches)
    state = copy.deepcopy(source.state_dict())
    rest = [batch[0].tolist() for batch in batches]
    fresh = as_source(loader(), train=True, key=0)
    fresh.load_state_dict(state)
    assert [batch[0].tolist() for batch in fresh.at(0, 1)] == rest


def print_nothing(worker: int) -> None:
    torch.rand(1)


@pytest.mark.parametrize("adapter", [TorchLoader, Iterated])
def test_a_batch_that_was_let_go_is_not_held_while_the_next_is_fetched(adapter: Any) -> None:
    given: list[Any] = []
    alive: list[int] = []

    def collate(samples: list[Any]) -> Any:
        alive.append(sum(one() is not None for one in given))
        batch = torch.tensor(samples)
        given.append(weakref.ref(batch))
        return batch

    for batch in islice(adapter(DataLoader([0, 1, 2], 1, collate_fn=collate)).at(0, 0), 3):
        del batch
    assert alive == [0, 0, 0]
