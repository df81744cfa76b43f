"""The same bits with any number of workers, any prefetch, after any resume; and what is said when a worker fails."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import loopwright as lw
from loopwright.data import Blocks, BucketSampler, Loader, WeightedSampler, as_source
from loopwright.data.generators import get_globals
from loopwright.errors import DataError
from tiny import trainer

N = 23


class Numbers(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return torch.tensor(float(i))


class Noisy(Numbers):
    """Draws from every global generator, and a different number of times for each sample."""

    def __getitem__(self, i: int) -> Any:
        return torch.rand(2 + i % 2)[:2] + i, random.random() + i, float(np.random.rand()) + i


class OwnGenerators(Numbers):
    def __init__(self, seed: int = 1) -> None:
        self.numpy = np.random.default_rng(seed)
        self.parts = {"legacy": np.random.RandomState(seed), "python": [random.Random(seed)]}
        self.torch = torch.Generator().manual_seed(seed)

    def __getitem__(self, i: int) -> Any:
        noise = self.parts["python"][0].random() + self.parts["legacy"].rand()  # type: ignore[index]
        return self.numpy.random() + i, noise, torch.rand((), generator=self.torch)


class Many(Numbers):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        assert type(indices) is list
        return [torch.rand(2) + i for i in indices]


class Jitter:
    """A transform with a generator of its own, as albumentations has."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(7)

    def __call__(self, sample: Any) -> Any:
        return sample + float(self.rng.random()) + random.random()


def jitter(sample: Any, rng: torch.Generator) -> Any:
    return sample + torch.rand((), generator=rng) + torch.rand(())


def scale(sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    sample[0].mul_(torch.rand(()))  # in place: the data stays as it is
    return sample


def mask(samples: list[Any]) -> Any:
    """Draws while it collates, as collators of language models do."""
    return torch.stack(samples) * (torch.rand(len(samples)) < 0.5)


def pairs() -> tuple[Tensor, Tensor]:
    return torch.arange(2.0 * N).view(N, 2), torch.arange(N)


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "draws": lambda: dict(data=Noisy()),
    "draws, part of it": lambda: dict(data=Subset(Noisy(), range(3, N))),
    "own generators": lambda: dict(data=OwnGenerators()),
    "__getitems__": lambda: dict(data=Many(), transform=Jitter()),
    "transform": lambda: dict(data=Numbers(), transform=Jitter()),
    "transform with rng": lambda: dict(data=Numbers(), transform=jitter, shuffle=Blocks(3, window=2)),
    "arrays": lambda: dict(data=pairs()),
    "arrays, transform": lambda: dict(data=pairs(), transform=scale),
    "tensors, transform": lambda: dict(data=TensorDataset(*pairs()), transform=lambda s: (s[0] + torch.rand(2), s[1])),
    "collate": lambda: dict(data=Numbers(), collate=mask),
    "weighted": lambda: dict(
        data=Noisy(), sampler=WeightedSampler(np.arange(N) % 3, 4), batch_size=None, shuffle=False, drop_last=False
    ),
    "buckets": lambda: dict(
        data=Noisy(),
        sampler=BucketSampler(np.arange(N) % 7, tokens=20),
        batch_size=None,
        shuffle=False,
        drop_last=False,
    ),
}


def loader(kind: str, **options: Any) -> Loader:
    return Loader(**{"batch_size": 4, "shuffle": True, "drop_last": True, "seed": 5} | KINDS[kind]() | options)


@pytest.fixture(autouse=True)
def few_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one CPU warns about workers."""
    monkeypatch.setattr(DataLoader, "check_worker_number_rationality", lambda self: None)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def train(batches: Iterator[Any]) -> list[Any]:
    """All batches, with a model in between that draws from the global generators."""
    found = []
    for batch in batches:
        found.append(batch)
        torch.rand(3), random.random(), np.random.rand()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.nightly] if i % 2 else []) for i, kind in enumerate(KINDS)]
)
def test_batches_are_the_same_with_0_2_and_4_workers_any_prefetch_and_after_every_resume(kind: str) -> None:
    alone = loader(kind)
    whole = [train(alone.at(epoch, 0)) for epoch in range(2)]
    assert not same(whole[0], whole[1])
    position = list(islice(alone.at(1, 0), 3)) and alone.state_dict()
    for workers, prefetch in ((0, None), (2, 1), (4, 3)):
        source = loader(kind, workers=workers, prefetch=prefetch)
        torch.manual_seed(workers), random.seed(workers), np.random.seed(workers)
        for epoch in range(2):
            for batch in range(len(whole[epoch]) + 1):
                rest = train(source.at(epoch, batch))
                assert same(rest, whole[epoch][batch:]), f"{workers} workers from batch {batch} of epoch {epoch}"
        resumed = loader(kind, workers=workers, prefetch=prefetch)
        resumed.load_state_dict(position)
        before = get_globals()
        assert same(list(resumed.at(1, 3)), whole[1][3:])
        assert get_globals() == before, "the loader draws from the global generators"
        source.close()
        resumed.close()
    assert multiprocessing.active_children() == []


@dataclass
class Case:
    length: int
    batch_size: int
    drop_last: bool
    shuffle: Any
    skip: int
    workers: int
    prefetch: int


cases = st.builds(
    Case,
    length=st.integers(1, 30),
    batch_size=st.integers(1, 9),
    drop_last=st.booleans(),
    shuffle=st.sampled_from([False, True]) | st.builds(Blocks, st.integers(1, 5), st.integers(1, 4)),
    skip=st.integers(0, 6),
    workers=st.sampled_from([2, 4]),
    prefetch=st.integers(1, 4),
)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases)
@example(case=Case(5, 9, True, True, 0, 2, 1))  # not one batch
def test_workers_change_no_bit_whatever_the_sizes(case: Case) -> None:
    options: Any = dict(batch_size=case.batch_size, drop_last=case.drop_last, shuffle=case.shuffle, seed=1)
    data = Subset(Noisy(), [i % N for i in range(case.length)])
    whole = list(Loader(data, **options))
    source = Loader(data, **options, workers=case.workers, prefetch=case.prefetch)
    assert same(list(source.at(0, case.skip)), whole[case.skip :])
    source.close()


def add_noise(sample: Any, rng: torch.Generator) -> Any:
    return sample + torch.rand((), generator=rng, dtype=torch.float64)


OWN_DRAWS: dict[str, Callable[[], dict[str, Any]]] = {
    "global": lambda: dict(data=Noisy(), collate=lambda samples: [sample[1] for sample in samples]),
    "of the dataset": lambda: dict(data=OwnGenerators(), collate=lambda samples: [sample[0] for sample in samples]),
    "of the transform": lambda: dict(data=torch.arange(N), transform=add_noise),
}


@pytest.mark.parametrize("make", OWN_DRAWS.values(), ids=list(OWN_DRAWS))
def test_a_sample_has_its_own_draws_wherever_it_comes_in_the_epoch(make: Callable[[], dict[str, Any]]) -> None:
    def draws(epoch: int = 2, **options: Any) -> dict[int, float]:
        batches = Loader(**make(), seed=3, **options).at(epoch, 0)
        return {int(x): float(x) - int(x) for batch in batches for x in batch}

    assert draws(batch_size=4) == draws(batch_size=7, shuffle=True) == draws(batch_size=N, shuffle=Blocks(2))
    assert len(set(draws().values())) == N, "another for each sample"
    assert not set(draws().values()) & set(draws(epoch=3).values()), "and in each epoch"


def test_a_sample_that_comes_twice_in_an_epoch_is_augmented_in_two_ways() -> None:
    source = Loader(Noisy(), sampler=WeightedSampler([1, *[0] * (N - 1)], 3, samples=6), seed=0)
    draws = torch.cat([batch[1] for batch in source.at(0, 0)])
    assert bool((draws < 1).all()), "always sample 0"
    assert len(draws.unique()) == 6


def test_generators_of_a_dataset_count_by_the_seed_that_they_were_given() -> None:
    def first(seed: int) -> Any:
        return next(Loader(OwnGenerators(seed), 4, seed=0).at(0, 0))

    assert same(first(1), first(1))
    assert not torch.equal(first(1)[0], first(2)[0])


def test_a_resume_brings_back_what_the_generators_of_a_dataset_were_seeded_with() -> None:
    """Also into a loader that has been read before, and where the user has drawn from them in between."""
    whole = list(Loader(OwnGenerators(1), 4, seed=0))
    saved, used = Loader(OwnGenerators(1), 4, seed=0), Loader(OwnGenerators(9), 4, seed=0)
    next(saved.at(0, 0)), next(used.at(0, 0))
    saved.data.numpy.random()
    used.load_state_dict(saved.state_dict())
    assert same(list(used.at(0, 1)), whole[1:])
    assert used.data.numpy.bit_generator.state == saved.data.numpy.bit_generator.state


def test_a_transform_with_a_default_argument_is_called_with_the_sample_alone() -> None:
    def double(sample: Tensor, factor: float = 2.0) -> Tensor:
        return sample * factor

    assert [b.tolist() for b in Loader(torch.arange(3.0), 2, transform=double)] == [[0.0, 2.0], [4.0]]


def test_a_transform_leaves_the_arrays_as_they_are() -> None:
    x, y = pairs()
    list(Loader((x, y), 4, transform=scale))
    assert torch.equal(x, pairs()[0])


# ------------------------------------------------------------------------------------------- the life of workers


def test_workers_live_from_epoch_to_epoch_until_closed() -> None:
    source = Loader(Pids(), 4, workers=2)
    first, second = ({pid for batch in source for pid in batch.tolist()} for _ in range(2))
    assert first == second
    assert len(first) == 2
    assert os.getpid() not in first
    source.close()
    assert multiprocessing.active_children() == []
    again = {pid for batch in source for pid in batch.tolist()}
    assert not again & first
    source.close()


class Pids(Numbers):
    def __getitem__(self, i: int) -> int:
        return os.getpid()


class Files(Dataset[Any]):
    """A file a sample, in four formats; each notes who has read it."""

    def __init__(self, folder: Path) -> None:
        self.paths: list[Path] = []
        for i in range(8):
            values = [float(i), float(i + 1), float(i + 2)]
            path = folder / f"{i}.{('csv', 'json', 'npy', 'pgm')[i % 4]}"
            if path.suffix == ".npy":
                np.save(path, np.array(values))
            else:
                texts = {".csv": ",".join(map(str, values)), ".json": json.dumps({"values": values})}
                pixels = b"P5 3 1 255\n" + bytes(int(value) for value in values)
                path.write_bytes(texts[path.suffix].encode() if path.suffix in texts else pixels)
            self.paths.append(path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        path = self.paths[i]
        data = path.read_bytes()
        if path.suffix == ".csv":
            values: Any = [float(cell) for cell in data.split(b",")]
        elif path.suffix == ".json":
            values = json.loads(data)["values"]
        elif path.suffix == ".npy":
            values = np.load(path)
        else:
            values = list(data.partition(b"\n")[2])
        path.with_suffix(".reader").write_text(str(os.getpid()))
        return torch.as_tensor(values, dtype=torch.float32)


@pytest.mark.capability("PT-06")
@pytest.mark.parametrize("kind", [Loader, DataLoader])
def test_any_format_becomes_tensors_in_processes_that_read_ahead_of_the_training(kind: Any, tmp_path: Path) -> None:
    """A Dataset turns files of any format into tensors, and workers have the next batch ready during a step."""
    files = Files(tmp_path)
    data = Loader(files, 2, workers=2) if kind is Loader else DataLoader(files, 2, num_workers=2)
    seen: list[Tensor] = []

    def step(run: lw.Run, batch: Tensor) -> None:
        seen.append(batch)
        end = time.monotonic() + 60
        following = [path.with_suffix(".reader") for path in files.paths[2 * len(seen) : 2 * len(seen) + 2]]
        while not all(path.exists() for path in following):  # this process does nothing else meanwhile
            assert time.monotonic() < end, "the next batch is not being read during the step"
            time.sleep(0.001)

    trainer(epochs=1).run(step, data)
    assert torch.equal(torch.cat(seen), torch.arange(8.0)[:, None] + torch.arange(3.0))
    readers = {int(path.with_suffix(".reader").read_text()) for path in files.paths}
    assert len(readers) == 2
    assert os.getpid() not in readers


def test_an_epoch_left_early_and_two_passes_at_once_keep_their_batches() -> None:
    source = Loader(Noisy(), 4, shuffle=True, seed=0, workers=2)
    whole = [list(Loader(Noisy(), 4, shuffle=True, seed=0).at(epoch, 0)) for epoch in range(2)]
    left = source.at(0, 0)
    assert same(next(left), whole[0][0])
    left.close()  # type: ignore[attr-defined]
    zipped = list(zip(source.at(0, 0), source.at(1, 0), strict=True))
    assert same([a for a, _ in zipped], whole[0])
    assert same([b for _, b in zipped], whole[1])
    source.close()
    assert multiprocessing.active_children() == []


def test_a_loader_with_another_key_has_workers_of_its_own() -> None:
    def pids(loader: Loader) -> set[int]:
        return {pid for batch in loader for pid in batch.tolist()}

    source = Loader(Pids(), 4, workers=1)
    first, clone = pids(source), source.keyed(3)
    assert pids(clone) != first
    clone.close()
    assert pids(source) == first
    source.close()


def test_an_error_of_the_training_closes_the_workers() -> None:
    batches = Loader(Noisy(), 4, workers=2).at(0, 0)
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        try:
            next(batches)
            _ = 1 // 0
        finally:
            batches.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []


# -------------------------------------------------------------------------------------------------- when they fail


class Bad(Numbers):
    def __getitem__(self, i: int) -> Any:
        if i == 13:
            raise KeyError("label")
        return i


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_sample_is_named_with_its_batch_and_epoch(workers: int) -> None:
    source = Loader(Bad(), 4, workers=workers)
    with pytest.raises(KeyError) as error:
        list(source.at(1, 2))
    batch = "[loopwright] while fetching batch 4 of epoch 2, dataset indices [12, 13, 14, 15]"
    assert error.value.__notes__ == [f"{batch}; it was dataset[13] that raised"]
    assert multiprocessing.active_children() == []


class Killed(Numbers):
    """Is killed as the system does it when memory runs out; ``wanted``: not before the main process says so."""

    def __init__(self, wanted: Any = None) -> None:
        self.wanted = wanted

    def __getitem__(self, i: int) -> Any:
        if i == 13:
            if self.wanted is not None:
                self.wanted.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return i


MAKERS: dict[str, Callable[[Killed], Any]] = {
    "ours": lambda data: Loader(data, 4, workers=2),
    "theirs": lambda data: DataLoader(data, 4, num_workers=2),
    "theirs, persistent": lambda data: DataLoader(data, 4, num_workers=2, persistent_workers=True),
}
TOLD = (
    r"worker 1 \(pid \d+\) was killed \(SIGKILL\) while at (batch 2 of epoch 1, dataset indices \[4, 5, 6, 7\] or )?"
    r"batch 4 of epoch 1, dataset indices \[12, 13, 14, 15\]( or batch 6 of epoch 1, .*)?\. "
)
ADVICE = (
    "The system does so when memory runs out: use fewer workers, a smaller batch or less prefetch, and keep large data "
    "in arrays or files, since every worker copies Python lists"
)


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_a_killed_worker_is_named_with_its_samples_and_what_to_do(make: Callable[[Killed], Any]) -> None:
    source: Any = as_source(make(Killed()), train=True, key=0)
    with pytest.raises(DataError, match=TOLD + ADVICE):
        list(source.at(0, 0))
    source.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_a_worker_killed_while_the_model_computes_is_noted_on_the_error_that_torch_raises(
    make: Callable[[Killed], Any],
) -> None:
    wanted = multiprocessing.Event()
    source: Any = as_source(make(Killed(wanted)), train=True, key=0)
    batches = source.at(0, 0)
    with pytest.raises(RuntimeError, match="is killed by signal") as error:  # noqa: PT012
        try:
            for _ in batches:
                wanted.set()
                time.sleep(20)  # the error comes in here
        finally:
            batches.close()
    assert len(error.value.__notes__) == 1
    assert error.value.__notes__[0].startswith("[loopwright] worker 1 (pid ")
    assert error.value.__notes__[0].endswith(ADVICE)
    source.close()
    assert multiprocessing.active_children() == []


def test_a_worker_that_exits_is_told_from_one_that_is_killed() -> None:
    class Leaves(Numbers):
        def __getitem__(self, i: int) -> Any:
            os._exit(3)

    with pytest.raises(
        DataError, match=r"worker 0 \(pid \d+\) left with exit code 3 while at batch 1 of epoch 1, .*os\._exit"
    ):
        list(Loader(Leaves(), 4, workers=1))
