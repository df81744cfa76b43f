"""Our own loader: batches of arrays or of a dataset, in an order that is a pure function of a key and the epoch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from loopwright.data.arrays import as_tensors, is_array, pick, shared_length
from loopwright.data.fetch import Indices, add_fetch_note, fetch_samples
from loopwright.data.gather import has_plain_rows, rows_of
from loopwright.data.generators import Streams
from loopwright.data.plan import Plan, check_state, shuffled
from loopwright.errors import DataError, SettingError

__all__ = ["Loader"]


class Loader:
    """Batches of ``data`` in a known order: iterate it, or hand it to ``fit``.

    ``data`` holds samples along the first dimension: a tensor, a NumPy array, a data frame or series, a tuple, list or
    dict of these (nested too; batches have the same structure, with tensors), or a dataset with ``__getitem__`` and
    ``__len__``, whose samples torch's ``default_collate`` puts together. Dtypes are kept: float64 arrays give float64
    batches. Nothing is copied at the start where torch can share the memory.

    The shuffled order depends on ``seed`` and the epoch and on nothing else; the global generators are not drawn
    from. ``seed=None`` takes the key of the run, and outside of a run ``torch.initial_seed()``. Each iteration is an
    epoch: 0, 1, 2, ...

    Raises DataError for data that cannot be read so, and SettingError for a batch size below 1.

    >>> loader = Loader((torch.arange(5), torch.arange(5) * 10), batch_size=2)
    >>> [(x.tolist(), y.tolist()) for x, y in loader]
    [([0, 1], [0, 10]), ([2, 3], [20, 30]), ([4], [40])]
    >>> len(loader)
    3
    """

    def __init__(
        self,
        data: Any,
        batch_size: int = 64,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int | None = None,
    ) -> None:
        if type(batch_size) is not int or batch_size < 1:
            raise SettingError(f"batch_size={batch_size!r}; expected a whole number of at least 1")
        self.data, self.batch_size, self.shuffle, self.drop_last, self.seed = (
            data,
            batch_size,
            shuffle,
            drop_last,
            seed,
        )
        self._key = seed
        self._read = _reader(data)
        self._plan = Plan(self._read.length, batch_size, drop_last)
        self._passes = 0
        self._loaded: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        return self._plan.batches

    def __iter__(self) -> Iterator[Any]:
        self._passes += 1
        return self.at(self._passes - 1, 0)

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={getattr(self, k)!r}" for k in ("batch_size", "shuffle", "drop_last", "seed"))
        return f"Loader({type(self.data).__name__} of {self._plan.length} samples, {settings})"

    # --------------------------------------------------------------------------------------------- as a source

    def keyed(self, key: int) -> Loader:
        """This loader with ``key`` in place of a seed that was not given; it shares the data."""
        clone = copy.copy(self)  # always: the same loader may be trained on and validated on
        clone._key = key if self.seed is None else self.seed
        return clone

    @property
    def streams(self) -> Streams:
        """The generators that reading samples may draw from."""
        return self._read.streams

    @property
    def batches(self) -> int:
        return self._plan.batches

    @property
    def exact(self) -> list[str]:
        return []

    def sizes(self, batch: int) -> Iterator[int]:
        return self._plan.sizes(batch)

    def at(self, epoch: int, batch: int) -> Iterator[Any]:
        state, self._loaded = self._loaded, None
        if state is not None:
            self.streams.set_found(state.get("generators", {}))
        order = self._order(epoch)[batch * self.batch_size : self._plan.samples]
        return self._batches(order, epoch, batch)

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self._plan.length, device="cpu")
        return shuffled(self._plan.length, torch.initial_seed() if self._key is None else self._key, epoch)

    def _batches(self, order: Tensor, epoch: int, batch: int) -> Iterator[Any]:
        for rows in order.split(self.batch_size) if len(order) else ():
            yield self._read.fetch(rows, epoch, batch)
            batch += 1

    def state_dict(self) -> dict[str, Any]:
        return {**self._own(), "generators": self.streams.get_found()}

    def _own(self) -> dict[str, Any]:
        return {**self._plan.state_dict(), "shuffle": self.shuffle, "key": self._key}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError if length, batch size, order or seed differ from those of the saved run."""
        own = self._own()
        if self.seed is None:
            self._key = own["key"] = state.get("key")  # the saved run goes on with its own key
        check_state(own, state)
        self._loaded = state


class _Rows:
    """Reads batches of arrays, or of a TensorDataset, with one ``index_select`` a tensor."""

    def __init__(self, tensors: Any, index: Tensor | None, length: int, device: torch.device | None = None) -> None:
        self.tensors, self.index, self.length, self.device = tensors, index, length, device
        self.streams = Streams({})

    def fetch(self, rows: Tensor, epoch: int, batch: int) -> Any:
        if self.index is not None:
            rows = self.index[rows]
        return pick(self.tensors, rows if self.device is None else rows.to(self.device))


class _Samples:
    """Reads batches of a dataset sample by sample."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.length = dataset, len(dataset)
        self.streams = Streams({"dataset": dataset})

    def fetch(self, rows: Tensor, epoch: int, batch: int) -> Any:
        indices = Indices(rows.tolist())
        try:
            return default_collate(fetch_samples(self.dataset, indices))
        except Exception as error:
            add_fetch_note(error, epoch, batch, indices)
            raise


def _reader(data: Any) -> _Rows | _Samples:
    if has_plain_rows(data):
        tensors, index = rows_of(data)
        return _Rows(list(tensors), index, len(data), _device_of(tensors))  # a list, as torch's loader gives
    if is_array(data):
        tensors = as_tensors(data)
        return _Rows(tensors, None, shared_length(tensors), _device_of(tensors))
    if isinstance(data, IterableDataset):
        raise DataError(
            f"{type(data).__name__} is an IterableDataset, which has no samples to pick from; pass "
            "torch.utils.data.DataLoader(dataset, batch_size=...) instead of lw.Loader"
        )
    if isinstance(data, (list, tuple, Mapping, str, bytes)) or not (
        isinstance(data, Dataset) or hasattr(type(data), "__getitem__")
    ):
        raise DataError(
            f"lw.Loader cannot read {_kind(data)}; expected a tensor, a NumPy array, a data frame, a tuple, list or "
            "dict of these, or a dataset with __getitem__ and __len__"
        )
    if not hasattr(data, "__len__"):
        raise DataError(
            f"{type(data).__name__} has no __len__; define it, so that the order of its samples can be planned"
        )
    return _Samples(data)


def _kind(data: Any) -> str:
    if isinstance(data, (list, tuple)) and data:
        return f"a {type(data).__name__} of {type(data[0]).__name__}"
    return f"an empty {type(data).__name__}" if isinstance(data, (list, tuple, Mapping)) and not data else repr(data)


def _device_of(tensors: Any) -> torch.device | None:
    """Where rows are selected, if that is not the CPU; the first tensor speaks for all."""
    while not isinstance(tensors, Tensor):
        tensors = next(iter(tensors.values() if isinstance(tensors, dict) else tensors))
    return None if tensors.device.type == "cpu" else tensors.device
