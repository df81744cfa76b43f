"""Our own loader: batches of arrays or of a dataset, in an order that is a pure function of a key and the epoch."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopwright.data.fetching import keep_fetch_note, place_of
from loopwright.data.generators import Streams
from loopwright.data.plan import Blocks, Plan, Planned, check_state, order_of
from loopwright.data.readers import reader_of
from loopwright.data.samplers import BatchSampler
from loopwright.data.share import Cut, Part
from loopwright.data.workers import Watch, Workers
from loopwright.errors import DataError, SettingError, elsewhere
from loopwright.given import check_flag, check_seed

__all__ = ["Loader"]


class Loader:
    """Batches of ``data`` in a known order: iterate it, or hand it to ``fit``.

    ``data`` holds samples along the first dimension: a tensor, a NumPy array, a data frame or series, an Arrow table, a
    sparse matrix of SciPy (of which only the rows of a batch become dense), a tuple, list or dict of these (nested too;
    batches have the same structure, with tensors), or a dataset with ``__getitem__`` and ``__len__``, whose samples
    ``collate`` puts together (None: torch's ``default_collate``). Dtypes are kept: float64 arrays give float64 batches.
    Nothing is copied at the start where torch can share the memory.

    ``shuffle`` is True, False, or ``Blocks(size)`` for data that is read from disk. ``sampler`` makes the batches in
    place of ``batch_size`` (64), ``shuffle`` and ``drop_last``: see ``BatchSampler``. The order depends on ``seed`` and
    the epoch and on nothing else; ``seed=None`` takes the key of the run, and outside of a run
    ``torch.initial_seed()``. Each iteration is an epoch: 0, 1, 2, ...

    ``transform(sample)``, or ``transform(sample, rng)`` with a torch.Generator, changes each sample. It, the dataset
    and ``collate`` may draw from any generator of Python, NumPy and torch (CPU): each is seeded from (key, epoch,
    sample), and put back. So the batches are the same with any number of ``workers`` (processes that read ahead, each
    ``prefetch`` batches, 2 by default), and after a resume. Workers live until ``close()``, or an error.

    Raises DataError for data that cannot be read so, and SettingError for arguments that do not go together.

    >>> loader = Loader((torch.arange(5), torch.arange(5) * 10), batch_size=2)
    >>> [(x.tolist(), y.tolist()) for x, y in loader]
    [([0, 1], [0, 10]), ([2, 3], [20, 30]), ([4], [40])]
    >>> len(loader)
    3
    """

    @elsewhere(
        num_workers="workers", collate_fn="collate", prefetch_factor="prefetch", batch_sampler="sampler",
        generator="seed", bs="batch_size",
    )  # fmt: skip
    def __init__(
        self,
        data: Any,
        batch_size: int | None = None,
        *,
        shuffle: bool | Blocks = False,
        drop_last: bool = False,
        seed: int | None = None,
        sampler: BatchSampler | None = None,
        transform: Callable[..., Any] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        workers: int = 0,
        prefetch: int | None = None,
    ) -> None:
        if sampler is None:
            batch_size = 64 if batch_size is None else batch_size
            _check_number("batch_size", batch_size, 1)
        else:
            _check_sampler(sampler, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)
        if not isinstance(shuffle, (bool, Blocks)):
            raise SettingError(f"shuffle={shuffle!r}; expected True, False or lw.data.Blocks(size)")
        check_flag("drop_last", drop_last)
        check_seed(seed, "for that of the run")
        _check_number("workers", workers, 0)
        if prefetch is not None:
            _check_number("prefetch", prefetch, 1)
            if not workers:
                raise SettingError(f"prefetch={prefetch} needs workers to fetch ahead; add workers=2, or leave it out")
        self.data, self.batch_size, self.shuffle, self.drop_last = data, batch_size, shuffle, drop_last
        self.seed, self.sampler, self.transform, self.collate = seed, sampler, transform, collate
        self.workers, self.prefetch = workers, prefetch
        self._key = seed
        self._read = reader_of(data, transform, collate, repeated=sampler is not None)
        self._plan = None if batch_size is None else Plan(self._read.length, batch_size, drop_last)
        made_for = getattr(sampler, "length", self._read.length)
        if made_for != self._read.length:
            raise DataError(f"{sampler!r} was made for {made_for} samples, and the data has {self._read.length}")
        self._passes = self._epoch = 0
        self.waited = 0.0  # seconds, for batches
        self._chosen: tuple[Any, Sequence[Any]] = (None, ())  # the batches of the sampler that were asked for last
        self._digest: tuple[int | None, int] = (None, 0)
        self._idle: list[Workers] = []
        self._loaded: Mapping[str, Any] | None = None
        self.cut: Cut | None = None  # the part of this rank, among several

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        self._passes += 1
        return self.at(self._passes - 1, 0)

    def __repr__(self) -> str:
        names = ["batch_size", "shuffle", "drop_last"] if self.sampler is None else ["sampler"]
        names += ["seed", *(name for name in ("transform", "collate", "workers", "prefetch") if getattr(self, name))]
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"Loader({type(self.data).__name__} of {self._read.length} samples, {settings})"

    def close(self) -> None:
        """Stop the workers; the next epoch would start new ones."""
        while self._idle:
            self._idle.pop().close()

    # --------------------------------------------------------------------------------------------- as a source

    def keyed(self, key: int) -> Loader:
        """This loader with ``key`` in place of a seed that was not given; it shares the data, and no workers."""
        clone = copy.copy(self)  # always: the same loader may be trained on and validated on
        clone._key = key if self.seed is None else self.seed
        clone._idle, clone._epoch, clone.waited = [], 0, 0.0
        return clone

    @property
    def streams(self) -> Streams:
        """The generators that reading samples may draw from, besides the global ones."""
        return self._read.streams

    @property
    def batches(self) -> int:
        """Batches in an epoch; with a sampler, in the one begun last."""
        return len(self._batches(self._epoch)) if self._plan is None else self._plan.batches

    @property
    def exact(self) -> list[str]:
        return []

    def sizes(self, batch: int) -> Iterator[int]:
        """Samples in each batch from ``batch`` on; with a sampler, of the epoch begun last."""
        if self._plan is not None:
            return self._plan.sizes(batch)
        batches = self._batches(self._epoch)
        return (len(batches[i]) for i in range(batch, len(batches)))

    def at(self, epoch: int, batch: int) -> Iterator[Any]:
        state, self._loaded = self._loaded, None
        if state is not None:
            self.close()
            self.streams.set_found(state.get("generators", {}))
            self._read.look(state.get("salts"))
        self._epoch = epoch
        batches = self._read_ahead(epoch, batch) if self.workers else self._read_here(epoch, batch)
        return batches if self.cut is None else self._parts(batches, epoch, batch)

    def _parts(self, batches: Iterator[Any], epoch: int, batch: int) -> Iterator[Part]:
        """This rank's part of each batch, which was read alone."""
        assert self.cut is not None
        try:
            for number, indices in self._indices(epoch, batch):
                mine = self.cut.rows(indices, number)
                yield self.cut.given(None if mine is None else next(batches), len(indices), number)
        finally:
            batches.close()  # type: ignore[attr-defined]

    def _read_here(self, epoch: int, batch: int) -> Iterator[Any]:
        read = self._read.read
        for task in self._tasks(epoch, batch):
            began = perf_counter()
            item = read(*task)
            self.waited += perf_counter() - began
            yield item
            del item

    def _read_ahead(self, epoch: int, batch: int) -> Iterator[Any]:
        if self._read.own is None:
            self._read.look()  # here, so that all workers have the same
        start = batch
        workers = self._idle.pop() if self._idle else Workers(self._read.read, self.workers, self.prefetch or 2)
        try:
            results = workers.go(lambda: self._tasks(epoch, start))
            with Watch(results, lambda ahead: self._place(epoch, batch + ahead)):
                began = perf_counter()
                for item in results:
                    self.waited += perf_counter() - began
                    batch += 1
                    yield item
                    del item  # or two batches would be held while the next one is fetched
                    began = perf_counter()
        except GeneratorExit as leaving:
            if leaving.__context__ is not None:  # an error is on its way
                workers.close()
            else:
                self._idle.append(workers)
            raise
        except BaseException as error:
            keep_fetch_note(error, lambda: self._place(epoch, batch))
            workers.close()
            raise
        self._idle.append(workers)

    # ------------------------------------------------------------------------------------------------ its order

    def _tasks(self, epoch: int, batch: int) -> Iterator[tuple[Any, int, int, int]]:
        """What to read, batch by batch, as plain data."""
        key = self._run_key()
        for number, indices in self._indices(epoch, batch):
            if self.cut is not None and (indices := self.cut.rows(indices, number)) is None:
                continue
            if self.workers and isinstance(indices, Tensor):
                indices = indices.tolist()  # a tensor would be sent as a shared file
            yield indices, key, epoch, number

    def _indices(self, epoch: int, batch: int) -> Iterator[tuple[int, Any]]:
        """The numbers of the batches from ``batch`` on, and their samples."""
        batches = self._batches(epoch)
        rest = range(batch, len(batches))
        rows = batches.since(batch) if isinstance(batches, Planned) else (batches[i] for i in rest)
        return enumerate(rows, batch) if self.sampler is None else self._checked(enumerate(rows, batch), epoch)

    def _checked(self, rows: Iterator[tuple[int, Any]], epoch: int) -> Iterator[tuple[int, Any]]:
        """What the sampler gives, where it is samples of the data: 2.7 would be cut to 2, and -1 be the last one."""
        for number, indices in rows:
            rows_of = indices if isinstance(indices, Tensor) else np.asarray(indices)
            found, length = torch.as_tensor(rows_of), self._read.length
            whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
            wrong = (found < 0) | (found >= length) if whole else torch.ones_like(found, dtype=torch.bool)
            if found.numel() and bool(wrong.any()):
                bad = next(one for one in found[wrong].tolist() if not whole or not 0 <= one < length)
                raise DataError(
                    f"{type(self.sampler).__name__}.batches gave the index {bad!r} in batch {number + 1} of epoch "
                    f"{epoch + 1}; expected whole numbers from 0 to {length - 1}, for the data has {length} samples"
                )
            yield number, indices

    def _run_key(self) -> int:
        return torch.initial_seed() if self._key is None else self._key

    def _batches(self, epoch: int) -> Sequence[Any]:
        key = self._run_key()
        if self._plan is not None:
            return Planned(self._plan, order_of(self.shuffle, self._plan.length, key, epoch))
        if self._chosen[0] != (key, epoch):
            assert self.sampler is not None
            self._chosen = (key, epoch), self.sampler.batches(epoch, key)
        return self._chosen[1]

    def _place(self, epoch: int, batch: int) -> str:
        return place_of(epoch, batch, torch.as_tensor(self._batches(epoch)[batch]).tolist())

    # -------------------------------------------------------------------------------------------------- its state

    def state_dict(self) -> dict[str, Any]:
        if self._loaded is not None:
            return dict(self._loaded)  # nothing has been read since
        return {**self._own(), "generators": self.streams.get_found(), "salts": self._read.salts}

    def _own(self) -> dict[str, Any]:
        if self._plan is not None:
            shuffle = self.shuffle if isinstance(self.shuffle, bool) else repr(self.shuffle)
            return {**self._plan.state_dict(), "shuffle": shuffle, "key": self._key}
        assert self.sampler is not None
        key = self._run_key()
        if self._digest[0] != key:  # of the first epoch: other weights, lengths or settings show there
            digest = 0
            for indices in self.sampler.batches(0, key):
                digest = zlib.crc32(torch.as_tensor(indices, dtype=torch.int64).numpy().tobytes(), digest)
            self._digest = key, digest
        name = type(self.sampler).__name__
        return {"length": self._read.length, "sampler": name, "batches": self._digest[1], "key": self._key}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError if length, batch size, order or seed differ from those of the saved run."""
        if self.seed is None:
            self._key = state.get("key")  # the saved run goes on with its own key
        check_state(self._own(), state)
        self._loaded = state


def _check_number(name: str, value: Any, least: int) -> None:
    if type(value) is not int or value < least:
        raise SettingError(f"{name}={value!r}; expected a whole number of at least {least}")


def _check_sampler(sampler: Any, **others: Any) -> None:
    if not isinstance(sampler, BatchSampler):
        raise SettingError(
            f"sampler={sampler!r} has no batches(epoch, key), which returns the batches of an epoch as lists of "
            "indices: see lw.data.BatchSampler. One of torch's own goes into torch.utils.data.DataLoader(dataset, "
            "sampler=...), which fit takes as well"
        )
    given = [f"{name}={value!r}" for name, value in others.items() if value is not None and value is not False]
    if given:
        raise SettingError(
            f"Loader({', '.join(given)}) cannot be used with sampler={sampler!r}, which makes the batches. Leave it "
            "out here; a batch size is an argument of the sampler"
        )
