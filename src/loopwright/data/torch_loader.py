"""A user's own DataLoader, served unchanged and able to continue in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from loopwright import rng
from loopwright._compat import begin_workers, copy_loader, stop_workers
from loopwright.data.ahead import Ahead, Copier
from loopwright.data.fetching import add_fetch_note, place_of, stopped_early
from loopwright.data.generators import Streams
from loopwright.data.order import Order
from loopwright.data.plan import Plan, check_state
from loopwright.data.sending import SentDataset
from loopwright.data.share import Cut
from loopwright.data.workers import Collate, Start, Watch
from loopwright.errors import DataError

__all__ = ["TorchLoader"]


_DRAWN_AT_ONCE = (SequentialSampler, SubsetRandomSampler, WeightedRandomSampler, list, tuple, range)
_ROOTS = ("generator", "batch_sampler", "sampler", "dataset", "collate_fn")


class TorchLoader:
    """A source with the batches, the order and the draws of any map-style DataLoader.

    It works on a shallow copy; the loader itself is not touched. A sampler, batch sampler or dataset that has
    ``set_epoch`` is told the epoch, unless ``tells`` is False. When fetching fails, the exception gains a note with
    the batch, its indices, and the sample that raised; when a worker dies, which one, and what it had.
    A resume runs the sampler again and loads nothing that is skipped; the random state of workers comes back too.

    >>> loader = DataLoader([1, 2, 3], batch_size=2)
    >>> import torch
    >>> [batch.tolist() for batch in TorchLoader(loader).at(0, 0)]
    [[1, 2], [3]]
    """

    def __init__(self, loader: DataLoader[Any], *, tells: bool = True) -> None:
        self.loader, self.tells = loader, tells
        self.workers = loader.num_workers
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        mark = not self.workers and loader.batch_sampler is not None and not hasattr(loader.dataset, "__getitems__")
        self.streams = Streams({part: getattr(loader, part) for part in _ROOTS})
        self._order = Order(getattr(loader, name), self.streams, ahead=self.workers > 0, mark=mark)
        self._parts: dict[str, Any] = {name: self._order}
        if self.workers:
            collate = Collate(loader.collate_fn)
            self._start = Start(loader.worker_init_fn, collate)
            dataset = SentDataset(loader.dataset)
            self._parts |= {"dataset": dataset, "collate_fn": collate, "worker_init_fn": self._start}
        self._clone = copy_loader(loader, self._parts)
        self._made: dict[str, Any] | None = None  # the generators when the workers were made
        self._states: dict[int, Any] = {}  # of the workers, after the last batch that each has given
        self._running: Any = None  # the iterator of persistent workers
        self._loaded: Mapping[str, Any] | None = None
        self._at = (0, 0)
        self.waited = 0.0  # seconds, for batches
        self.ahead_copier: Copier | None = None  # to where batches are copied ahead
        self._ended = True  # the last pass went to its end
        self._left = False  # an epoch began although the one before had not ended, with workers that live on

    # ------------------------------------------------------------------------------------------ what is known

    @property
    def cut(self) -> Cut | None:
        """The part of this rank, among several."""
        return self._order.cut

    @cut.setter
    def cut(self, cut: Cut) -> None:
        self._order.cut = cut
        if self.workers:
            self._start.rank = cut.rank

    @property
    def digest(self) -> int:
        """Stands for the indices that were read in the open epoch, of all ranks together."""
        return self._order.digest

    @property
    def batches(self) -> int | None:
        try:
            return len(self.loader)
        except (TypeError, NotImplementedError):
            return None

    def sizes(self, batch: int) -> Iterator[int] | None:
        """Indices in each batch, where the plan tells: always, but for a batch sampler of one's own."""
        sampler = self.loader.batch_sampler
        if type(sampler) in (list, tuple):
            return (len(indices) for indices in sampler[batch:])  # type: ignore[index]
        if type(sampler) is not BatchSampler:
            return None
        try:
            length = len(sampler.sampler)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None
        return Plan(length, sampler.batch_size, sampler.drop_last).sizes(batch)

    @property
    def exact(self) -> list[str]:
        reasons = []
        if self.workers and not self.loader.in_order:
            reasons.append("DataLoader(in_order=False) gives batches in the order in which its workers finish")
        if self._order.draws and self.workers:
            reasons.append(
                f"the sampler {self._order.name} draws random numbers while its workers are ahead of training"
            )
        elif self._order.draws:
            reasons.append(f"the sampler {self._order.name} draws random numbers from batch to batch")
        if self._left:
            reasons.append("an epoch was left early while persistent workers were ahead of it")
        return reasons

    @property
    def _may_go_ahead(self) -> bool:
        """True where to ask for a batch earlier draws nothing earlier: workers read it, and its order was drawn."""
        loader, batches = self.loader, self.loader.batch_sampler
        if not (self.workers and loader.in_order) or (batches is None and self.cut is not None):
            return False
        if type(batches) in (list, tuple):
            return True
        sampler = loader.sampler if batches is None else getattr(batches, "sampler", None)
        if type(sampler) is RandomSampler:
            drawn = sampler.generator is None  # of one's own: it draws from that when it has ended
        else:
            drawn = type(sampler) in _DRAWN_AT_ONCE
        return drawn and type(batches) in (BatchSampler, type(None))

    def _own(self) -> dict[str, Any]:
        dataset: Any = self.loader.dataset
        return {
            "length": len(dataset) if hasattr(dataset, "__len__") else None,
            "batches": self.batches,
            "workers": self.workers,
        }

    def state_dict(self) -> dict[str, Any]:
        if self._loaded is not None:  # nothing has been read since: the position is still the loaded one
            return dict(self._loaded)
        return {
            **self._own(),
            "epoch": self._at[0],
            "batch": self._at[1],
            "order": self._order.state_dict(),
            "generators": self.streams.get_found(),
            "made": self._made,
            "states": dict(self._states),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError if the dataset, its batches or the number of workers differ from the saved run."""
        check_state(self._own(), state)
        self._loaded = state

    # ------------------------------------------------------------------------------------------ going through

    def at(self, epoch: int, batch: int) -> Iterator[Any]:
        """Raises DataError if a loaded state is of another batch, or the sampler does not repeat itself."""
        state, self._loaded = self._loaded, None
        if state is None and batch and (epoch, batch) == self._at:
            state = self.state_dict()  # goes on where it was left
        if self.tells:
            self._tell(epoch)
        if state is not None and batch:
            iterator = self._resume(state, epoch, batch)
        else:
            iterator = self._begin(state, batch)
        self._at = (epoch, batch)
        return self._batches(iterator, epoch, batch)

    def _tell(self, epoch: int) -> None:
        sampler = self.loader.batch_sampler
        told: tuple[Any, ...] = (
            self.loader.dataset,
            self.loader.sampler,
            sampler,
            getattr(sampler, "sampler", None),
        )
        for part in {id(part): part for part in told}.values():
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)

    def _begin(self, state: Mapping[str, Any] | None, skip: int) -> Iterator[Any]:
        """A new epoch, as ``iter(loader)`` begins it."""
        persistent = self.loader.persistent_workers
        if state is not None:
            self._order.renew(state["order"])
            self.streams.set_found(state["generators"])
            if persistent and state["made"] is not None:
                with rng.forked():
                    self._remake(state)
        self._order.reset()
        if skip:
            self._order.skip(skip)
        new = self.workers > 0 and not (persistent and self._running is not None)
        if new:
            self._states, self._start.states = {}, {}
        elif self.workers and not self._ended:
            self._left = True
        iterator = iter(self._clone)
        if new:
            self._made = self._order.made
        self._running = iterator if persistent else None
        return iterator

    def _remake(self, state: Mapping[str, Any]) -> Iterator[Any]:
        """Workers as they were, with the same seeds and random states, and nothing to do yet."""
        self.close()
        now = self.streams.get_found()
        self._made, self._states = state["made"], dict(state["states"])
        self._start.states = self._states
        self._order.silence()
        self.streams.set(state["made"])
        iterator = iter(self._clone)
        self.streams.set_found(now)
        self._running = iterator if self.loader.persistent_workers else None
        return iterator

    def _resume(self, state: Mapping[str, Any], epoch: int, batch: int) -> Iterator[Any]:
        if (epoch, batch) != (state["epoch"], state["batch"]):
            raise DataError(
                f"the saved position is batch {state['batch']} of epoch {state['epoch']}, not batch {batch} of epoch "
                f"{epoch}; ask for that one, or load no state"
            )
        with rng.forked():
            indices = self._order.seek(state["order"], batch)
            if self.workers:
                iterator = self._remake(state)
                begin_workers(iterator, indices, batch % self.workers)
            else:
                self._order.hand_out(indices)
                iterator = iter(self._clone)
            self.streams.set_found(state["generators"])
        return iterator

    def _batches(self, iterator: Iterator[Any], epoch: int, batch: int) -> Iterator[Any]:
        order, workers, self._ended = self._order, self.workers, False
        early = Ahead(iterator, self.ahead_copier) if self.ahead_copier is not None and self._may_go_ahead else None
        batches: Iterator[Any] = iterator if early is None else early

        def place(ahead: int) -> str:
            ahead += 0 if early is None else early.held
            return place_of(epoch, batch + ahead, order.pending[ahead] if ahead < len(order.pending) else None)

        try:
            with Watch(iterator, place):
                while True:
                    began = perf_counter()
                    try:
                        item = next(batches)
                    except StopIteration as stop:
                        if order.pending:
                            raise self._stopped(stop, epoch, batch) from stop
                        self._ended = True
                        if order.cut is not None:
                            yield from order.parts(ended=True)
                        return
                    except Exception as error:
                        indices, data = order.pending[0] if order.pending else None, self.loader.dataset
                        add_fetch_note(error, epoch, batch, indices, dataset=data, by_worker=workers > 0)
                        raise
                    self.waited += perf_counter() - began
                    if workers:
                        worker, item, moved = item
                        if moved is not None:
                            self._states[worker] = moved
                    if order.cut is not None:
                        for part in order.parts(item):
                            batch += 1
                            self._at = (epoch, batch)
                            yield part
                        del item, part
                        continue
                    order.used()
                    batch += 1
                    self._at = (epoch, batch)
                    yield item
                    del item  # or two batches would be held while the next one is fetched
        finally:
            if early is not None:
                early.close()
            if workers and not self.loader.persistent_workers:
                stop_workers(iterator)  # a traceback may hold the iterator, and with it the workers

    def _stopped(self, stop: StopIteration, epoch: int, batch: int) -> DataError:
        indices, dataset = self._order.pending[0], self.loader.dataset
        add_fetch_note(stop, epoch, batch, indices, dataset=dataset, by_worker=self.workers > 0)
        return stopped_early(stop)

    def close(self) -> None:
        """Stop persistent workers; the next epoch would start new ones."""
        if self._running is not None:
            stop_workers(self._running)
            self._clone = copy_loader(self.loader, self._parts)
            self._running = None
