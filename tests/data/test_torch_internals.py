"""What the adapters need of torch beyond its public face: a new torch that lacks it fails here first."""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from loopwright._compat import begin_workers, copy_loader, has_ended, is_own_iteration, lost_workers, stop_workers


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(range(10), 2, **options)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def few_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataLoader, "check_worker_number_rationality", lambda self: None)


def test_a_copied_loader_has_other_parts_and_no_running_workers() -> None:
    original = loader(num_workers=1, persistent_workers=True)
    running = iter(original)
    clone = copy_loader(original, {"batch_sampler": [[4, 2]]})
    assert [batch.tolist() for batch in clone] == [[4, 2]]
    assert next(running).tolist() == [0, 1]
    assert len(list(original)) == 5
    stop_workers(original._iterator)
    stop_workers(clone._iterator)
    assert multiprocessing.active_children() == []


def which_worker(parts: list[int]) -> tuple[int, list[int]]:
    info = torch.utils.data.get_worker_info()
    assert info is not None
    return info.id, parts


def test_workers_begin_with_the_one_whose_turn_it_is() -> None:
    iterator: Any = iter(copy_loader(loader(num_workers=3, collate_fn=which_worker), {"batch_sampler": []}))
    begin_workers(iterator, iter([[i] for i in range(9)]), 2)
    assert list(iterator) == [((i + 2) % 3, [i]) for i in range(9)]


def test_stopped_workers_are_gone_while_the_iterator_is_still_held() -> None:
    iterator = iter(loader(num_workers=2))
    next(iterator)
    stop_workers(iterator)
    assert multiprocessing.active_children() == []
    stop_workers(iterator)  # again is no harm


def test_a_worker_that_died_is_found_with_the_batches_that_it_had() -> None:
    iterator: Any = iter(loader(num_workers=2, prefetch_factor=1, collate_fn=leave_at_6))
    assert lost_workers(iterator) == []
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):
        list(iterator)
    ((number, process, ahead),) = lost_workers(iterator, 5.0)
    assert (number, process.exitcode, ahead) == (1, 9, [3 - iterator._rcvd_idx])
    stop_workers(iterator)
    assert multiprocessing.active_children() == []
    assert lost_workers(iter([])) == []


def leave_at_6(parts: list[int]) -> list[int]:
    if 6 in parts:
        time.sleep(0.5)  # the batch before it has been sent
        os._exit(9)
    return parts


def test_the_end_of_a_stream_is_seen_with_its_last_short_batch() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

    iterator = iter(DataLoader(Stream(), 2))
    next(iterator)
    assert not has_ended(iterator)
    next(iterator)
    assert has_ended(iterator)
    assert not has_ended(iter([]))


def test_a_subclass_with_a_way_of_its_own_is_known() -> None:
    class Own(DataLoader[Any]):
        def __iter__(self) -> Any:
            return iter([])

    class Named(DataLoader[Any]):
        pass

    assert is_own_iteration(Own(range(3)))  # type: ignore[arg-type]
    assert not is_own_iteration(Named(range(3)))  # type: ignore[arg-type]
