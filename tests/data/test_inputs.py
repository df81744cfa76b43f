"""What users have, in every form that it comes in: read the same, and resumed at every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

import loopwright as lw
from loopwright.data import Loader, as_source, as_sources
from loopwright.data.lengths import epoch_length, limit
from loopwright.data.mix import Mix
from loopwright.errors import DataError
from splits import check_every_split
from tiny import trainer

N = 10
X = np.arange(N * 2, dtype=np.float32).reshape(N, 2)


class ByArray:
    """An array of another library, by ``__array__``."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self.values, dtype=dtype)

    def __len__(self) -> int:
        return len(self.values)


class ByDlpack:
    """An array of another library, by ``__dlpack__`` alone."""

    def __init__(self, values: Any) -> None:
        self.values = torch.as_tensor(values)

    def __dlpack__(self, **options: Any) -> Any:
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.values.__dlpack_device__()


class Refuses(ByArray):
    """Offers both, and gives only one."""

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("read-only")

    def __dlpack_device__(self) -> Any:
        return (1, 0)


class Rows:
    """A dataset of another library, as Hugging Face's: no class of torch, whole batches by ``__getitems__``."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return {"x": torch.from_numpy(X)[i], "noise": torch.rand(())}

    def __getitems__(self, rows: list[int]) -> list[Any]:
        return [self[i] for i in rows]


class Streamed:
    """A stream of ready batches that tells its position, as a streamed Hugging Face dataset does."""

    def __init__(self) -> None:
        self.position = self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        for i in range(self.position, 4):
            self.position = i + 1
            yield torch.rand(2) + 10 * self.epoch + i
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position, self.epoch = state["position"], state["epoch"]


class StatefulStream(IterableDataset[Any]):
    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)
        self.position = 0

    def __iter__(self) -> Iterator[Any]:
        while self.position < N:
            self.position += 1
            yield self.rng.random() + self.position
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


class Noisy(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return torch.rand(2) + i


class Remembers(Noisy):
    """A dataset whose samples depend on what it has been asked for before."""

    def __init__(self) -> None:
        self.asked = 0

    def __getitem__(self, i: int) -> Any:
        self.asked += 1
        return torch.tensor(100.0 * self.asked + i)

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.asked = state["asked"]


class Stateful(DataLoader[Any]):
    """Has the public protocol of torchdata's StatefulDataLoader: the loaded state goes into the next iterator.

    As there, asking for the state begins to read, an iterator that has ended is passed over at the price of another
    draw, and the order comes from a generator that it shares with the seed of the workers.
    """

    def __init__(self, dataset: Any, generator: torch.Generator | None = None) -> None:
        super().__init__(dataset, 3, generator=generator)
        self.next_iter_state: Any = None
        self.iterator: Any = None

    def __iter__(self) -> Any:
        self.iterator = self.made()
        if self.iterator.ended:
            self.iterator = self.made()
        return self.iterator

    def made(self) -> Reading:
        state, self.next_iter_state = self.next_iter_state, None
        return Reading(self, state)

    def state_dict(self) -> dict[str, Any]:
        if self.iterator is None:
            self.iterator = self.made()
        return {"began": self.iterator.began.tolist(), "given": self.iterator.given, "ended": self.iterator.ended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next_iter_state = state


class Reading:
    def __init__(self, loader: Stateful, state: Any) -> None:
        generator = loader.generator or torch.default_generator
        torch.empty((), dtype=torch.int64).random_(generator=generator)
        self.loader, self.given, self.ended = loader, 0, False
        if state is not None:
            generator.set_state(torch.tensor(state["began"], dtype=torch.uint8))
            self.given, self.ended = state["given"], state["ended"]
        self.began = generator.get_state()
        self.order = torch.randperm(N, generator=generator).tolist()

    def __iter__(self) -> Reading:
        return self

    def __next__(self) -> Any:
        rows = self.order[self.given * 3 : self.given * 3 + 3]
        if not rows:
            self.ended = True
            raise StopIteration
        self.given += 1
        return torch.stack([self.loader.dataset[i] for i in rows])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def generated() -> Iterator[Any]:
    yield from torch.from_numpy(X).split(3)


ARRAYS: dict[str, Callable[[], Any]] = {
    "numpy": lambda: X,
    "torch": lambda: torch.from_numpy(X),
    "pandas": lambda: pd.DataFrame(X, columns=["a", "b"]),
    "__array__": lambda: ByArray(X),
    "__dlpack__": lambda: ByDlpack(X),
    "both, one refused": lambda: Refuses(X),
    "read-only": lambda: np.frombuffer(X.tobytes(), np.float32).reshape(N, 2),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_every_kind_of_array_gives_the_same_batches_alone_and_nested(kind: str) -> None:
    array = ARRAYS[kind]()
    for data, pick in (
        (array, lambda batch: batch),
        ((array, {"y": array}), lambda batch: batch[1]["y"]),
        ({"x": [array]}, lambda batch: batch["x"][0]),
    ):
        source = as_source(data, train=False, key=0)
        (batch,) = source.at(0, 0)
        assert torch.equal(pick(batch), torch.from_numpy(X))
        assert batch is not None


@pytest.mark.parametrize("kind", ARRAYS)
def test_every_kind_of_array_is_trained_on_validated_and_resumed(kind: str) -> None:
    array = ARRAYS[kind]()
    check_every_split(lambda: Loader(ARRAYS[kind](), 3, shuffle=True))
    net = torch.nn.Linear(2, 2)
    task = lw.Supervised(net, torch.nn.MSELoss(), torch.optim.SGD(net.parameters(), 1e-4))
    run = trainer(epochs=1).fit(task, (array, array), (array, array))
    assert "valid/loss" in run.metrics
    assert trainer().predict(task, array).shape == (N, 2)


def test_columns_of_another_library_are_not_taken_for_several_data_sets() -> None:
    assert list(as_sources({"x": ByDlpack(X), "y": ByDlpack(X)}, 0)) == [""]
    assert list(as_sources({"near": (X, X), "far": (X, X)}, 0)) == ["near", "far"]


def test_an_array_that_cannot_be_taken_over_is_named() -> None:
    class Broken(ByDlpack):
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("on another planet")

    with pytest.raises(DataError, match=r"data\[1\] \(Broken\) cannot be taken over by torch.from_dlpack: on another"):
        as_source((X, Broken(X)), train=False, key=0)


RESUMED: dict[str, Callable[[], Any]] = {
    "rows": lambda: Loader(Rows(), 3, shuffle=True),
    "rows in a loader": lambda: DataLoader(Rows(), 3, shuffle=True),  # type: ignore[arg-type]
    "dataset with a state": lambda: Loader(Remembers(), 3, shuffle=True),
    "dataset with a state in a loader": lambda: DataLoader(Subset(Remembers(), [3, 1, 4, 5, 9]), 2, shuffle=True),
    "bare dataset with a state": Remembers,
    "stream of batches": Streamed,
    "stream of samples": lambda: DataLoader(StatefulStream(), 3),
    "bare stream": StatefulStream,
    "stateful": lambda: Stateful(Noisy()),
    "stateful, own generator": lambda: Stateful(Noisy(), generator()),
}
AROUND: dict[str, Callable[[Any], Any]] = {
    "alone": lambda data: data,
    "limited": lambda data: limit(data, batches=2),
    "lengthened": lambda data: epoch_length(data, 3),
    "mixed": lambda data: Mix({"a": data, "b": [1, 2]}),
    "mixed to the longest": lambda data: Mix({"a": data, "b": [1, 2]}, until="longest"),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", RESUMED)
def test_data_with_a_position_of_its_own_resumes_at_every_batch(kind: str, around: str) -> None:
    check_every_split(lambda: AROUND[around](RESUMED[kind]()), twice=True)


def test_asking_for_the_state_before_the_first_batch_changes_nothing() -> None:
    loader = Stateful(Noisy())
    source = as_source(loader, train=True, key=0)
    before = torch.get_rng_state()
    source.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert loader.iterator is None


def test_stateful_workers_are_no_exact_resume() -> None:
    class Workers(Stateful):
        num_workers = 2

    loader = Workers(Noisy())
    loader.__dict__["num_workers"] = 2
    assert as_source(loader, train=True, key=0).exact == [
        "the workers of Workers keep no random state that can be saved"
    ]


def test_a_state_that_changes_in_workers_is_no_exact_resume() -> None:
    says = ["the state of Remembers changes in the workers, which do not tell it"]
    assert as_source(Loader(Remembers(), 3, workers=1), train=True, key=0).exact == says
    assert as_source(DataLoader(Remembers(), 3, num_workers=1), train=True, key=0).exact == says


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.filterwarnings("ignore:'set_vital'")
def test_torchdata_resumes_at_every_batch(around: str, shuffle: bool, own: bool) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    check_every_split(
        lambda: AROUND[around](
            torchdata.StatefulDataLoader(Noisy(), 3, shuffle=shuffle, generator=generator() if own else None)
        )
    )


@pytest.mark.capability("FA-05")
def test_arrays_are_shuffled_to_train_and_in_order_to_validate_by_construction() -> None:
    seen: dict[str, list[int]] = {"train": [], "valid": []}

    class Notes(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(1, 1)

        def training_step(self, batch: Any) -> Any:
            seen["train" if torch.is_grad_enabled() else "valid"] += batch[0].flatten().int().tolist()
            return self.net(batch[0]).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 1e-6)

    data = torch.arange(200.0)[:, None], torch.zeros(200)
    trainer(epochs=2, seed=1).fit(Notes(), data, data)
    first, second = seen["train"][:200], seen["train"][200:]
    assert sorted(first) == sorted(second) == list(range(200))
    assert first != sorted(first)
    assert first != second
    assert seen["valid"] == [*range(200), *range(200)]
