"""Reading batches: rows of arrays, or samples one by one, whose draws are the same in any process and any order."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, default_collate

from loopwright.data.arrays import as_tensors, is_array, pick, shared_length
from loopwright.data.fetching import Indices, add_fetch_note, fetch_samples, stopped_early
from loopwright.data.gather import has_plain_rows, rows_of
from loopwright.data.generators import Streams, kept
from loopwright.data.picked import PickedRows
from loopwright.data.plan import seed_from
from loopwright.data.tables import say_if_misaligned
from loopwright.errors import DataError, SettingError
from loopwright.given import not_callable_with
from loopwright.text import rule_name, with_article

__all__ = ["Rows", "RowsAsSamples", "Samples", "reader_of", "takes_rng"]


def reader_of(data: Any, transform: Any, collate: Any, *, repeated: bool) -> Rows | Samples:
    """What reads batches of ``data``; raises DataError for what cannot be read so.

    >>> reader_of(torch.arange(4) * 10, None, None, repeated=False).read([3, 0], key=0, epoch=0, batch=0)
    tensor([30,  0])
    """
    by_sample = transform is not None or collate is not None
    if has_plain_rows(data) and not by_sample:
        tensors, index = rows_of(data)
        return Rows(list(tensors), index, len(data), _device_of(tensors))  # a list, as torch's loader gives
    if is_array(data):
        say_if_misaligned(data)
        tensors = as_tensors(data)
        length = shared_length(tensors)
        if not by_sample:
            return Rows(tensors, None, length, _device_of(tensors))
        data = RowsAsSamples(tensors, length)
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
            f"dict of these, or a dataset with __getitem__ and __len__{_as_dataset(data)}"
        )
    if not hasattr(data, "__len__"):
        raise DataError(
            f"{type(data).__name__} has no __len__; define it, so that the order of its samples can be planned"
        )
    return Samples(data, transform, collate, repeated=repeated)


class Rows:
    """Reads batches of arrays, or of a TensorDataset, with one ``index_select`` a tensor; nothing is drawn."""

    def __init__(self, tensors: Any, index: Tensor | None, length: int, device: torch.device | None = None) -> None:
        self.tensors, self.index, self.length, self.device = tensors, index, length, device
        self.streams, self.own = Streams({}), ()
        self.salts: dict[str, int] = {}

    def look(self, salts: Mapping[str, int] | None = None) -> None:
        """There are no generators."""

    def read(self, rows: Any, key: int, epoch: int, batch: int) -> Any:
        if type(rows) is not Tensor:
            rows = torch.as_tensor(rows, dtype=torch.int64, device="cpu")
        try:
            if self.index is not None:
                rows = self.index[rows]
            return pick(self.tensors, rows if self.device is None else rows.to(self.device))
        except Exception as error:
            add_fetch_note(error, epoch, batch, rows.tolist())
            raise


class RowsAsSamples:
    """Arrays as a dataset, for what handles samples one by one; they have the structure of the data.

    >>> RowsAsSamples({"x": torch.arange(3)}, 3)[1]
    {'x': tensor(1)}
    """

    def __init__(self, tensors: Any, length: int) -> None:
        self.tensors, self.length = tensors, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Any:
        return _row(self.tensors, i)


def _row(data: Any, i: int) -> Any:
    if isinstance(data, (Tensor, PickedRows)):
        return data[i].clone()  # its own memory, so that a transform may work in place
    if isinstance(data, dict):
        return {key: _row(part, i) for key, part in data.items()}
    parts = [_row(part, i) for part in data]
    return type(data)._make(parts) if hasattr(data, "_make") else type(data)(parts)


class Samples:
    """Reads batches of a dataset sample by sample, each with every generator seeded from the sample's own key.

    Seeded are the global generators (Python, NumPy, torch on the CPU) and those that hang on the dataset, the
    transform and the collate function; afterwards all stand where they stood. The key of a sample is (key, epoch,
    index), with its place in the batch where a sample may come ``repeated`` in an epoch; collating goes on with the
    draws of the last one. A dataset that reads a batch at once with ``__getitems__`` has the key (key, epoch, batch).

    Seeding for each sample costs more than reading a small one, so where no sample of the first batch has drawn
    anything, batches are read without; one in which a generator has moved is read again, and all later ones as above.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable[..., Any] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        *,
        repeated: bool = False,
    ) -> None:
        if collate is not None and not callable(collate):
            raise SettingError(f"collate={collate!r} cannot be called; pass a function of a list of samples")
        self.dataset, self.transform, self.repeated = dataset, transform, repeated
        self.collate: Callable[[list[Any]], Any] = default_collate if collate is None else collate
        self.length = len(dataset)
        self.streams = Streams({"dataset": dataset, "transform": transform, "collate": collate})
        self._with_rng = transform is not None and takes_rng(transform)
        self._many = _reads_many(dataset)
        self.own: list[tuple[Any, int]] | None = None  # generators on these parts, each with its salt
        self._draws: bool | None = None  # None: the first batch is to tell
        self._mark: Any = None
        self.salts: dict[str, int] = {}

    def look(self, salts: Mapping[str, int] | None = None) -> None:
        """Find the generators that hang on the parts.

        Each is seeded with a salt, by default from where it stands now: seeds that the user gave them count.
        """
        self.salts = {path: seed_from(path, state) for path, state in self.streams.get_found().items()}
        self.salts |= salts or {}
        self.own = [(generator, self.salts[path]) for path, generator in self.streams.find().items()]

    def read(self, rows: Any, key: int, epoch: int, batch: int) -> Any:
        indices = Indices(rows.tolist() if isinstance(rows, Tensor) else rows)
        if self.own is None:
            self.look()
        try:
            with self._kept():
                self._mark = None if self._draws else _states()
                read = self._read(indices, key, epoch, batch)
                if self._draws is False and _states() != self._mark:
                    self._draws = True  # after all
                    read = self._read(indices, key, epoch, batch)
                self._watch()
                self._draws = bool(self._draws)
                return read
        except Exception as error:
            add_fetch_note(error, epoch, batch, indices, dataset=self.dataset if self._many else None)
            if isinstance(error, StopIteration):
                raise stopped_early(error) from error
            raise

    def _read(self, indices: Indices, key: int, epoch: int, batch: int) -> Any:
        samples: list[Any] = []
        if self._many:
            self._seed("batch", key, epoch, batch)
            samples = fetch_samples(self.dataset, indices)
        if not self._many or self.transform is not None:
            samples = [
                self._sample(i, samples[place] if self._many else None, (key, epoch, i, batch, place))
                for place, i in enumerate(indices)
            ]
        return self.collate(samples)

    def _sample(self, i: int, sample: Any, place: tuple[int, ...]) -> Any:
        place = place if self.repeated else place[:3]
        self._seed("sample", *place)
        if not self._many:
            sample = self.dataset[i]
        if self.transform is None:
            return sample
        if not self._with_rng:
            return self.transform(sample)
        generator = torch.Generator(device="cpu").manual_seed(seed_from("transform", *place))
        return self.transform(sample, generator)

    def _watch(self) -> None:
        """While it is not known whether reading draws: have the global generators moved since they were seeded?"""
        if self._draws is None and (self.own or _states() != self._mark):
            self._draws = True

    def _seed(self, *place: object) -> None:
        if self._draws is False:
            return
        self._watch()
        number = seed_from(*place)
        random.seed(number)
        np.random.seed(number >> 31)  # other bits than torch takes: the two run the same algorithm
        torch.default_generator.manual_seed(number)  # not torch.manual_seed, which looks for devices: 400 us
        for generator, salt in self.own or ():
            _seed(generator, seed_from(salt, number))
        self._mark = None if self._draws else _states()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Only generators of this process on the CPU: asking a device for its state would wait for it."""
        python, numpy = random.getstate(), np.random.get_state(legacy=False)
        try:
            with kept([torch.default_generator, *(generator for generator, _ in self.own or ())]):
                yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _states() -> Any:
    """The global generators of this process on the CPU, to be compared."""
    numpy: Any = np.random.get_state(legacy=True)
    return random.getstate(), numpy[1].tobytes(), numpy[2:], torch.default_generator.get_state().numpy().tobytes()


def _seed(generator: Any, number: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(number)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(number).state
    else:
        generator.seed(number >> 31)  # random.Random or RandomState, which takes 32 bits


def _reads_many(dataset: Any) -> bool:
    while type(dataset) is Subset:  # it has __getitems__ also where what it is a part of has not
        dataset = dataset.dataset
    return hasattr(dataset, "__getitems__")


def takes_rng(transform: Callable[..., Any], *, name: str = "transform", of: str = "sample") -> bool:
    """True if ``transform`` needs two arguments: the sample (or what it is called with ``of``), and a generator.

    Raises SettingError for what cannot be called with one or two.

    >>> takes_rng(lambda sample: sample), takes_rng(lambda sample, rng: sample), takes_rng(lambda x, scale=2: x)
    (False, True, False)
    """
    if not callable(transform):
        raise SettingError(f"{name}={transform!r} cannot be called; pass a function of a {of}")
    try:
        parameters = inspect.signature(transform).parameters.values()
    except (TypeError, ValueError):  # some built in C have none
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(needed) > 2 or not all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in needed):
        raise SettingError(
            f"{name} needs the arguments {', '.join(p.name for p in needed)}; expected {name}({of}), or "
            f"{name}({of}, rng) with a torch.Generator. Fix the others with functools.partial"
        )
    if len(needed) < 2 and (why := not_callable_with(transform, of)) is not None:
        raise SettingError(f"{name}={rule_name(transform)}{why}. Write: {name}=lambda {of}: ...")
    return len(needed) == 2


def _kind(data: Any) -> str:
    if isinstance(data, (list, tuple)) and data:
        return f"{with_article(type(data).__name__)} of {type(data[0]).__name__}"
    if isinstance(data, Mapping) and data:
        return f"{with_article(type(data).__name__)} of {type(next(iter(data.values()))).__name__}"
    return f"an empty {type(data).__name__}" if isinstance(data, (list, tuple, Mapping)) and not data else repr(data)


def _as_dataset(data: Any) -> str:
    if isinstance(data, list) and data:
        return ". Of a list of samples make one: torch.utils.data.Subset(samples, range(len(samples)))"
    if isinstance(data, (tuple, Mapping)) and data:
        return (
            ". Of numbers in a list make an array, np.asarray(y); of texts, or of samples of different lengths, a "
            "dataset: torch.utils.data.StackDataset(x, y)"
        )
    if callable(data) or (isinstance(data, Iterable) and not isinstance(data, (str, bytes, list, tuple, Mapping))):
        return ". Ready batches, from a function or an iterable, go to fit as they are"
    return ""


def _device_of(tensors: Any) -> torch.device | None:
    """Where rows are selected, if that is not the CPU; the first tensor speaks for all."""
    while not isinstance(tensors, (Tensor, PickedRows)):
        tensors = next(iter(tensors.values() if isinstance(tensors, dict) else tensors))
    return None if tensors.device.type == "cpu" else tensors.device
