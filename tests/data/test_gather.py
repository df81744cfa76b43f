from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset, default_collate

from loopwright.data import Gather, gather
from loopwright.data.gather import is_gatherable
from loopwright.errors import CheckpointError


def both(loader: DataLoader[Any], seed: int, epochs: int = 2) -> tuple[list[Any], list[Any]]:
    """Batches, with the state of torch's generator after each, of the loader and of its fast path."""
    source = Gather(loader)
    traces: list[list[Any]] = []
    for begin in (lambda epoch: iter(loader), lambda epoch: source.at(epoch, 0)):
        torch.manual_seed(seed)
        trace: list[Any] = []
        for epoch in range(epochs):
            trace += [(batch, torch.get_rng_state()) for batch in begin(epoch)]
        traces.append([*trace, ([], torch.get_rng_state())])
    return traces[0], traces[1]


@settings(max_examples=60)
@given(
    n=st.integers(1, 40),
    width=st.integers(0, 5),
    size=st.integers(1, 45),
    shuffle=st.booleans(),
    drop=st.booleans(),
    seed=st.integers(0, 2**31),
    chosen=st.none() | st.lists(st.integers(0, 39), min_size=1, max_size=30),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64]),
)
def test_gathered_batches_and_draws_are_those_of_the_loader(
    n: int, width: int, size: int, shuffle: bool, drop: bool, seed: int, chosen: list[int] | None, dtype: Any
) -> None:
    data: Any = TensorDataset((torch.rand(n, width, 2) * 9).to(dtype), torch.arange(n))
    if chosen is not None:
        data = Subset(data, [i % n for i in chosen])
    loader = DataLoader(data, size, shuffle=shuffle, drop_last=drop)
    assert is_gatherable(loader)
    theirs, ours = both(loader, seed)
    assert len(theirs) == len(ours)
    for (a, after_a), (b, after_b) in zip(theirs, ours, strict=True):
        assert type(a) is type(b)
        assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(a, b, strict=True))
        assert torch.equal(after_a, after_b)


def test_every_batch_has_memory_and_a_version_of_its_own() -> None:
    first, second = list(Gather(DataLoader(TensorDataset(torch.zeros(6, 3)), 3)).at(0, 0))
    first[0].add_(1)
    assert (second[0]._version, first[0]._version) == (0, 1)
    assert first[0].untyped_storage().data_ptr() != second[0].untyped_storage().data_ptr()
    assert first[0].data_ptr() % 64 == second[0].data_ptr() % 64 == 0


X = torch.zeros(4, 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(TensorDataset(X.clone().requires_grad_()), 2),
        lambda: DataLoader(TensorDataset(torch.nn.Parameter(X)), 2),
        lambda: DataLoader(TensorDataset(X.to_sparse()), 2),
        lambda: DataLoader(TensorDataset(X), 2, collate_fn=lambda parts: default_collate(parts)),
        lambda: DataLoader(TensorDataset(X), 2, worker_init_fn=lambda worker: None),
        lambda: DataLoader(TensorDataset(X), 2, sampler=RandomSampler(range(4))),
        lambda: DataLoader(TensorDataset(X), 2, sampler=RandomSampler(X, replacement=True)),
        lambda: DataLoader(TensorDataset(X), 2, batch_sampler=None, shuffle=True, generator=torch.Generator()),
        lambda: DataLoader(TensorDataset(X), batch_sampler=[[0], [1]]),
        lambda: DataLoader(TensorDataset(X), batch_size=None),
        lambda: DataLoader(Subset(TensorDataset(X), [0, -1]), 2),
        lambda: DataLoader(Subset(TensorDataset(X), [True, False]), 2),
        lambda: DataLoader(Subset(range(4), [0, 1]), 2),  # type: ignore[arg-type]
        lambda: type("Mine", (DataLoader,), {})(TensorDataset(X), 2),
    ],
)
def test_anything_that_is_not_plain_takes_the_slow_path(make: Any) -> None:
    assert not is_gatherable(make())


def test_the_fast_path_is_not_taken_where_it_disagrees_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would with a torch that draws or collates otherwise."""
    monkeypatch.setattr(gather, "_verdict", [])
    monkeypatch.setattr(gather, "draw_seed", lambda: 3)
    assert not is_gatherable(DataLoader(TensorDataset(X), 2))


def test_the_proof_runs_once_in_any_number_of_threads_and_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict: list[bool] = []
    monkeypatch.setattr(gather, "_verdict", verdict)
    before = torch.get_rng_state()
    threads = [threading.Thread(target=gather._proved) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdict == [True]
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_that_was_left_goes_on_in_its_order() -> None:
    source = Gather(DataLoader(TensorDataset(torch.arange(9)), 2, shuffle=True))
    batches = source.at(0, 0)
    seen: list[Tensor] = [next(batches)[0], next(batches)[0]]
    batches.close()  # type: ignore[attr-defined]
    seen += [batch[0] for batch in source.at(0, 2)]
    assert sorted(torch.cat(seen).tolist()) == list(range(9))


def test_a_state_of_other_data_is_refused() -> None:
    state = Gather(DataLoader(TensorDataset(torch.arange(9)), 2)).state_dict()
    with pytest.raises(CheckpointError) as error:
        Gather(DataLoader(TensorDataset(torch.arange(8)), 4)).load_state_dict(state)
    assert str(error.value).startswith(
        "the saved position does not fit this data: length was 9 and is 8, batch_size was 2 and is 4. Pass the same"
    )
