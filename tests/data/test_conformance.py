"""One suite for every source: the batches and draws of the plain loader, and a resume at every split point."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from loopwright.checkpoint import decode, encode
from loopwright.data import Gather, Iterated, Loader, TorchLoader, as_source, samples
from loopwright.data.generators import get_globals, set_globals

EPOCHS = 3

# ---------------------------------------------------------------------------------------------------- what is read


def tensors(n: int = 20) -> TensorDataset:
    return TensorDataset(torch.arange(n * 2.0).view(n, 2), torch.arange(n))


class Numbers(Dataset[Any]):
    """Samples 0..n-1 as (float vector, int)."""

    def __init__(self, n: int = 20) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        return torch.full((2,), float(i)), i


class Named(Numbers):
    def __getitem__(self, i: int) -> Any:
        return {"x": torch.full((2,), float(i)), "name": f"sample {i}", "y": i}


class Lengths(Numbers):
    def __getitem__(self, i: int) -> Any:
        return torch.full((i % 4 + 1,), float(i))


class Noisy(Numbers):
    """Draws from every global generator, as augmentation does."""

    def __getitem__(self, i: int) -> Any:
        return torch.rand(2) + i, random.random() + i, float(np.random.rand()) + i


class Sometimes(Numbers):
    """Draws for one sample in five only, so that workers move at different times."""

    def __getitem__(self, i: int) -> Any:
        return torch.rand(2) + i if i % 5 == 0 else torch.full((2,), float(i))


class OwnGenerators(Numbers):
    """Draws from generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.numpy = np.random.default_rng(1)
        self.legacy = np.random.RandomState(2)
        self.parts = {"python": [random.Random(3)], "torch": torch.Generator().manual_seed(4)}

    def __getitem__(self, i: int) -> Any:
        noise = self.parts["python"][0].random() + float(torch.rand((), generator=self.parts["torch"]))
        return self.numpy.random() + i, self.legacy.rand() + i, noise


class Many(Numbers):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        assert type(indices) is list
        return [torch.rand(2) + i for i in indices]


class Doubled(TensorDataset):
    def __getitem__(self, i: Any) -> Any:
        return tuple(t * 2 for t in super().__getitem__(i))


class EagerBatches:
    """Draws when ``iter`` is called, not with the first batch."""

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(20).tolist()
        random.shuffle(order)
        return iter([order[:3], order[3:10], order[10:11], order[11:]])

    def __len__(self) -> int:
        return 4


class LazyOrder(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        yield from np.random.permutation(20).tolist()

    def __len__(self) -> int:
        return 20


class Endless(Sampler[int]):
    """Has no length."""

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(20).tolist()


class Remembers(Sampler[int]):
    """Its order goes on from epoch to epoch, and it can tell where it is."""

    def __init__(self) -> None:
        self.calls = 0

    def __iter__(self) -> Iterator[int]:
        self.calls += 1
        return iter([(i * 7 + self.calls) % 20 for i in range(20)])

    def __len__(self) -> int:
        return 20

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.calls = state["calls"]


class Shouting(DataLoader[Any]):
    """A subclass with a constructor of its own."""

    def __init__(self, n: int) -> None:
        super().__init__(Noisy(n), batch_size=6, shuffle=True)


class Stream(IterableDataset[Any]):
    """Knows its position, and draws."""

    def __init__(self, n: int = 20) -> None:
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


def pad(parts: list[Tensor]) -> tuple[Tensor, list[int]]:
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), [len(p) for p in parts]


def seed_worker(worker: int) -> None:
    np.random.seed(torch.initial_seed() % 2**31 + worker)


def fixed(*shape: int) -> Tensor:
    return torch.rand(shape, generator=generator())


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_64(data: Any) -> Loader:
    """How data without batches of its own are read."""
    return Loader(data, 64, shuffle=True)


def drawn() -> Iterator[Tensor]:
    for _ in range(3):
        yield torch.rand(2) + random.random()


class Again:
    def __iter__(self) -> Iterator[Tensor]:
        return drawn()


# ------------------------------------------------------------------------------------------------------- the kinds


@dataclass
class Kind:
    make: Callable[[], Any]
    source: type
    workers: bool = False
    plain: Callable[[], Any] | None = None  # the batches, where what is made has none itself


def loader(dataset: Any = None, batch_size: Any = 6, **options: Any) -> Callable[[], Any]:
    return lambda: DataLoader(copy.deepcopy(dataset if dataset is not None else Noisy()), batch_size, **options)


IN_PROCESS: dict[str, Kind] = {
    f"gather {size} {'drop' if drop else 'keep'} {'shuffle' if shuffle else 'in order'}": Kind(
        lambda size=size, drop=drop, shuffle=shuffle: DataLoader(  # type: ignore[misc]
            tensors(), size, drop_last=drop, shuffle=shuffle
        ),
        Gather,
    )
    for size in (1, 7, 13, 20)
    for drop in (False, True)
    for shuffle in (False, True)
} | {
    "gather 33": Kind(lambda: DataLoader(tensors(), 33, shuffle=True), Gather),
    "gather subset": Kind(lambda: DataLoader(Subset(tensors(), [5, 3, 3, 19, 0]), 2, shuffle=True), Gather),
    "gather subset of subset": Kind(
        lambda: DataLoader(Subset(Subset(tensors(), range(3, 15)), np.arange(0, 12, 2)), 4, shuffle=True), Gather
    ),
    "gather strided": Kind(lambda: DataLoader(TensorDataset(fixed(3, 20).T), 6, shuffle=True), Gather),
    "gather one, three": Kind(lambda: DataLoader(TensorDataset(*fixed(3, 20, 2)), 6, shuffle=True), Gather),
    "negative subset": Kind(lambda: DataLoader(Subset(tensors(), [-1, 3, -2]), 2, shuffle=True), TorchLoader),
    "channels last": Kind(
        lambda: DataLoader(TensorDataset(fixed(20, 3, 4, 5).to(memory_format=torch.channels_last)), 6, shuffle=True),
        TorchLoader,
    ),
    "subclass of TensorDataset": Kind(lambda: DataLoader(Doubled(torch.arange(20.0)), 6, shuffle=True), TorchLoader),
    "tensors, own generator": Kind(lambda: DataLoader(tensors(), 6, shuffle=True, generator=generator()), TorchLoader),
    "in order": Kind(loader(), TorchLoader),
    "batch of 1": Kind(loader(batch_size=1, shuffle=True), TorchLoader),
    "shuffled": Kind(loader(shuffle=True), TorchLoader),
    "drop last": Kind(loader(shuffle=True, drop_last=True, batch_size=7), TorchLoader),
    "own generator": Kind(lambda: loader(shuffle=True, generator=generator())(), TorchLoader),
    "dicts": Kind(loader(Named(), shuffle=True), TorchLoader),
    "collated by hand": Kind(loader(Lengths(), shuffle=True, collate_fn=pad), TorchLoader),
    "dataset's own generators": Kind(loader(OwnGenerators(), shuffle=True), TorchLoader),
    "__getitems__": Kind(loader(Many(), shuffle=True), TorchLoader),
    "weighted": Kind(
        lambda: loader(sampler=WeightedRandomSampler(np.arange(1.0, 21), 30, generator=generator()))(), TorchLoader
    ),
    "weighted, global": Kind(lambda: loader(sampler=WeightedRandomSampler(np.arange(1.0, 21), 30))(), TorchLoader),
    "with replacement": Kind(
        lambda: loader(sampler=RandomSampler(range(20), replacement=True, num_samples=70, generator=generator()))(),
        TorchLoader,
    ),
    "part of the indices": Kind(lambda: loader(sampler=SubsetRandomSampler([1, 4, 9, 16, 2]))(), TorchLoader),
    "batches drawn at once": Kind(lambda: DataLoader(Noisy(), batch_sampler=EagerBatches()), TorchLoader),
    "batches in a list": Kind(lambda: DataLoader(Noisy(), batch_sampler=[[3, 1], [2], [7, 8, 9]]), TorchLoader),
    "batch sampler of torch": Kind(
        lambda: DataLoader(Noisy(), batch_sampler=BatchSampler(LazyOrder(), 8, False)), TorchLoader
    ),
    "sampler without length": Kind(loader(sampler=Endless()), TorchLoader),
    "sampler with a state": Kind(lambda: loader(sampler=Remembers())(), TorchLoader),
    "no batching": Kind(loader(batch_size=None, shuffle=True), TorchLoader),
    "batches as samples": Kind(
        lambda: DataLoader(tensors(), sampler=BatchSampler(RandomSampler(range(20)), 6, False), batch_size=None),
        TorchLoader,
    ),
    "subclass of DataLoader": Kind(lambda: Shouting(20), TorchLoader),
    "stream": Kind(lambda: DataLoader(Stream(), 6), Iterated),
    "list of batches": Kind(lambda: [torch.arange(3), torch.arange(3, 8), torch.arange(8, 9)], Iterated),
    "arrays": Kind(lambda: Loader((fixed(20, 2), np.arange(20)), 7, shuffle=True), Loader),
    "arrays in order": Kind(lambda: Loader({"x": torch.arange(20)}, 7, drop_last=True), Loader),
    "dataset": Kind(lambda: Loader(Noisy(), 7, shuffle=True, seed=3), Loader),
    "tensor alone": Kind(lambda: fixed(150, 2), Loader, plain=lambda: of_64(fixed(150, 2))),
    "numpy arrays": Kind(
        lambda: (fixed(150, 2).numpy(), np.arange(150)), Loader, plain=lambda: of_64((fixed(150, 2), torch.arange(150)))
    ),
    "frame and series": Kind(
        lambda: (pd.DataFrame(fixed(150, 2).numpy(), columns=["a", "b"]), pd.Series(range(150), index=range(9, 159))),
        Loader,
        plain=lambda: of_64((fixed(150, 2), torch.arange(150))),
    ),
    "dict of arrays": Kind(
        lambda: {"x": fixed(150, 2), "n": np.arange(150), "s": pd.Series(range(150))},
        Loader,
        plain=lambda: of_64({"x": fixed(150, 2), "n": torch.arange(150), "s": torch.arange(150)}),
    ),
    "dicts within a tuple": Kind(
        lambda: ({"a": fixed(150, 2), "b": np.arange(150)}, torch.arange(150)),
        Loader,
        plain=lambda: of_64(({"a": fixed(150, 2), "b": torch.arange(150)}, torch.arange(150))),
    ),
    "tensors of a dataset": Kind(lambda: tensors(150), Loader, plain=lambda: of_64(tensors(150))),
    "dataset alone": Kind(lambda: Noisy(150), Loader, plain=lambda: of_64(Noisy(150))),
}
READ_ALONE: dict[str, Kind] = {  # a resume reads them from the start of the epoch
    "generator function": Kind(lambda: drawn, Iterated, plain=Again),
    "iterable": Kind(Again, Iterated),
}

WORKERS: dict[str, Kind] = {
    "gather": Kind(lambda: DataLoader(tensors(), 7, shuffle=True, num_workers=2), Gather),
    "gather persistent": Kind(
        lambda: DataLoader(tensors(), 7, shuffle=True, num_workers=2, persistent_workers=True), Gather
    ),
    "shuffled": Kind(loader(batch_size=3, shuffle=True, num_workers=2), TorchLoader, True),
    "persistent": Kind(loader(batch_size=3, shuffle=True, num_workers=2, persistent_workers=True), TorchLoader, True),
    "persistent, seldom": Kind(
        lambda: loader(Sometimes(), 3, shuffle=True, num_workers=2, persistent_workers=True, generator=generator())(),
        TorchLoader,
        True,
    ),
    "own generators": Kind(
        lambda: loader(OwnGenerators(), 3, shuffle=True, num_workers=2, generator=generator())(), TorchLoader, True
    ),
    "three workers": Kind(
        loader(batch_size=2, num_workers=3, prefetch_factor=1, worker_init_fn=seed_worker), TorchLoader, True
    ),
    "with replacement": Kind(
        lambda: loader(
            batch_size=5,
            num_workers=2,
            sampler=RandomSampler(range(20), replacement=True, num_samples=70, generator=(g := generator())),
            generator=g,
        )(),
        TorchLoader,
        True,
    ),
    "batches drawn at once": Kind(
        lambda: DataLoader(Noisy(), batch_sampler=EagerBatches(), num_workers=2), TorchLoader, True
    ),
    "__getitems__": Kind(loader(Many(), 3, num_workers=2), TorchLoader, True),
    "no batching": Kind(loader(batch_size=None, shuffle=True, num_workers=2), TorchLoader, True),
}

NIGHTLY = {"three workers", "with replacement", "batches drawn at once", "no batching"}  # others start workers as well
EVERY = [pytest.param(kind, id=name) for name, kind in IN_PROCESS.items()] + [
    pytest.param(
        kind,
        id=f"workers: {name}",
        marks=[pytest.mark.nightly] if name in NIGHTLY else [pytest.mark.slow] if kind.source is not Gather else [],
    )
    for name, kind in WORKERS.items()
]


@pytest.fixture(autouse=True)
def few_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one CPU warns about workers."""
    monkeypatch.setattr(DataLoader, "check_worker_number_rationality", lambda self: None)


# ------------------------------------------------------------------------------------------------------ the checks


def seed_everything() -> None:
    torch.manual_seed(11)
    random.seed(12)
    np.random.seed(13)


def train() -> None:
    """What a model does with the global generators between two batches."""
    torch.rand(3)
    random.random()
    np.random.rand()


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, in the same types and memory orders."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def saved(state: dict[str, Any]) -> Any:
    """The state as a checkpoint gives it back."""
    plain, tensors = encode(state)
    return decode(json.loads(json.dumps(plain)), tensors)


def epoch_of(data: Any, trace: list[Any]) -> None:
    trace.append(("begun", get_globals()))
    train()  # torch's samplers draw with the first batch, not when the iterator is made
    for batch in data:
        trace.append((batch, get_globals()))
        train()
    trace.append(("ended", get_globals()))


@pytest.mark.parametrize("kind", EVERY + [pytest.param(kind, id=name) for name, kind in READ_ALONE.items()])
def test_batches_and_draws_are_those_of_the_plain_loader(kind: Kind) -> None:
    seed_everything()
    plain = (kind.plain or kind.make)()
    theirs: list[Any] = []
    for _ in range(EPOCHS):
        epoch_of(iter(plain), theirs)
    seed_everything()
    source = as_source(kind.make(), train=True, key=1)
    assert type(source) is kind.source
    ours: list[Any] = []
    for epoch in range(EPOCHS):
        if isinstance(source, Loader):
            source = source.keyed(torch.initial_seed())
        epoch_of(source.at(epoch, 0), ours)
    assert len(ours) == len(theirs)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert same(a[0], b[0]), f"batch {number}: {a[0]} is not {b[0]}"
        assert a[1] == b[1], f"the generators differ at {number}"
    close(source)


def close(source: Any) -> None:
    if isinstance(source, TorchLoader):
        source.close()


def run(source: Any, epoch: int, batch: int, trace: list[Any], snapshots: dict[Any, Any] | None = None) -> None:
    """Go on from a position to the end, noting each batch with the generators, and states to come back to."""
    for number in range(epoch, EPOCHS):
        batches = source.at(number, batch)
        if batch == 0:
            train()
        for item in batches:
            trace.append((number, item, get_globals()))
            train()
            batch += 1
            if snapshots is not None:
                snapshots[number, batch] = saved(source.state_dict()), get_globals(), len(trace)
        batch = 0
        if snapshots is not None:
            snapshots[number + 1, 0] = saved(source.state_dict()), get_globals(), len(trace)
    trace.append((None, None, get_globals()))


def chosen_points(points: list[tuple[int, int]], kind: Kind) -> list[tuple[int, int]]:
    """All of them; of a loader with workers one in the middle, the end of an epoch and the start of the next."""
    last = max(batch for _, batch in points)
    few = [(1, last // 2), (0, last), (1, 0), (0, 1)]
    return points if kind.source is not TorchLoader or not kind.workers else few


@pytest.mark.capability("IG-19")
@pytest.mark.parametrize("kind", EVERY)
def test_every_split_point_resumes_exactly(kind: Kind) -> None:
    """Loaders of every kind go on inside an epoch with the same samples and draws, with and without workers."""
    seed_everything()
    whole: list[Any] = []
    snapshots: dict[Any, Any] = {}
    source = as_source(kind.make(), train=True, key=1)
    run(source, 0, 0, whole, snapshots)
    close(source)
    assert source.exact == []
    for epoch, batch in chosen_points(list(snapshots)[:-1], kind):
        state, generators, done = snapshots[epoch, batch]
        torch.manual_seed(99)
        fresh = as_source(kind.make(), train=True, key=1)
        fresh.load_state_dict(state)
        set_globals(generators)
        rest: list[Any] = []
        run(fresh, epoch, batch, rest)
        assert len(rest) == len(whole) - done, f"split at {epoch, batch}"
        for a, b in zip(rest, whole[done:], strict=True):
            assert a[0] == b[0]
            assert same(a[1], b[1]), f"split at {epoch, batch}: {a[1]} is not {b[1]}"
            assert a[2] == b[2], f"split at {epoch, batch}: the generators differ"
        close(fresh)


@pytest.mark.parametrize("kind", IN_PROCESS.values(), ids=list(IN_PROCESS))
def test_a_resumed_iterator_leaves_the_generators_alone_and_states_survive_it(kind: Kind) -> None:
    seed_everything()
    source = as_source(kind.make(), train=True, key=1)
    batches = source.at(0, 0)
    next(batches)
    state, generators = saved(source.state_dict()), get_globals()
    fresh = as_source(kind.make(), train=True, key=1)
    before = copy.deepcopy(state)
    fresh.load_state_dict(state)
    torch.manual_seed(99)
    found = get_globals()
    fresh.at(0, 1)
    assert get_globals() == found
    set_globals(generators)
    assert state == before


@pytest.mark.parametrize("kind", IN_PROCESS.values(), ids=list(IN_PROCESS))
def test_planned_sizes_are_the_true_ones(kind: Kind) -> None:
    source = as_source(kind.make(), train=True, key=1)
    planned = source.sizes(1)
    if planned is not None:
        true = [samples(batch) for batch in source.at(0, 0)]
        assert list(planned) == true[1:]
        assert source.batches is None or source.batches == len(true)
