"""Worker processes: what they run, what comes back from them, and what is said when one of them dies."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from loopwright import rng
from loopwright._compat import lost_workers, stop_workers
from loopwright.data.generators import Streams
from loopwright.data.plan import seed_from
from loopwright.data.sending import Sendable, SentDataset, sent
from loopwright.errors import DataError

__all__ = ["Collate", "Start", "Watch", "Workers"]


class Collate:
    """Wraps ``collate_fn``: gives ``(worker, batch, state)``, where state is None if the worker's has not changed."""

    def __init__(self, collate_fn: Callable[[Any], Any]) -> None:
        self.collate_fn = collate_fn
        self.streams = Streams({})
        self.check = Sendable()
        self.last: Any = None

    def __call__(self, samples: Any) -> tuple[int, Any, Any]:
        batch = sent(self.collate_fn, samples, what="collate_fn")
        self.check(batch)
        info = get_worker_info()
        assert info is not None
        now = self.streams.get()
        if now == self.last:
            return info.id, batch, None
        self.last = now
        return info.id, batch, now


def outlive_signals(worker: int = 0) -> None:
    """In a worker: signals that a terminal or a scheduler sends to all processes of a run do not end it.

    The main process saves first, and ends its workers itself: by the SIGTERM that follows the first one, if need be.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, "SIGUSR1"):
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


class Start:
    """Wraps ``worker_init_fn``: afterwards the worker continues from the random state noted for it, if there is one."""

    def __init__(self, worker_init_fn: Callable[[int], None] | None, collate: Collate) -> None:
        self.worker_init_fn, self.collate = worker_init_fn, collate
        self.states: Mapping[int, Any] = {}
        self.rank = 0

    def __call__(self, worker: int) -> None:
        outlive_signals()
        info = get_worker_info()
        assert info is not None
        if isinstance(info.dataset, SentDataset):
            info.dataset.step_aside()
        if self.rank:  # every rank draws the same seed for its workers, whose samples are others
            rng.seed(seed_from(torch.initial_seed(), self.rank))
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker)
        self.collate.streams = Streams({"dataset": info.dataset, "collate_fn": self.collate.collate_fn})
        if worker in self.states:
            self.collate.streams.set(self.states[worker])
        self.collate.last = self.collate.streams.get()


class Workers:
    """Processes that call ``read(*task)``, kept from one pass to the next; torch's own, in a DataLoader over tasks.

    Results come in the order of the tasks, each worker up to ``prefetch`` of them ahead.

    >>> workers = Workers(divmod, 1, 2)
    >>> list(workers.go(lambda: iter([(7, 2), (9, 4)])))
    [(3, 1), (2, 1)]
    >>> workers.close()
    """

    def __init__(self, read: Callable[..., Any], number: int, prefetch: int) -> None:
        self._tasks = _Tasks()
        self.loader: DataLoader[Any] = DataLoader(
            _Reader(read),  # type: ignore[arg-type]
            batch_size=None,
            sampler=self._tasks,
            collate_fn=_as_it_is,
            num_workers=number,
            prefetch_factor=prefetch,
            persistent_workers=True,
            worker_init_fn=outlive_signals,
            generator=torch.Generator(device="cpu"),  # or it would draw from the global one
        )
        self.iterator: Any = None

    def go(self, tasks: Callable[[], Iterator[tuple[Any, ...]]]) -> Iterator[Any]:
        """Begin a pass; what is left of an earlier one is dropped."""
        self._tasks.make = tasks
        self.iterator = iter(self.loader)
        return self.iterator  # type: ignore[no-any-return]

    def close(self) -> None:
        if self.iterator is not None:
            stop_workers(self.iterator)


class _Tasks:
    """torch asks twice for the iterator of a new worker pool, and uses the second."""

    def __init__(self) -> None:
        self.make: Callable[[], Iterator[Any]] = lambda: iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.make()


class _Reader:
    def __init__(self, read: Callable[..., Any]) -> None:
        self.read, self.check = read, Sendable()

    def __getitem__(self, task: tuple[Any, ...]) -> Any:
        batch = sent(self.read, *task, what="reading a batch")
        self.check(batch)
        return batch


def _as_it_is(batch: Any) -> Any:
    return batch


class Watch:
    """Around a pass with workers: says which worker has died, of what, and on which samples, and what to do.

    As a DataError if that ended the pass. But torch raises wherever the main process is, such as in the middle of a
    training step, and the pass is closed while that error is on its way: then as a note on it.
    ``place`` says in words what batch is that many ahead.
    """

    def __init__(self, iterator: Any, place: Callable[[int], str]) -> None:
        self.iterator, self.place = iterator, place

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outside = error.__context__ if isinstance(error, GeneratorExit) else None
        if isinstance(outside, RuntimeError):
            for told in self._told(0.0):
                outside.add_note(f"[loopwright] {told}")
        elif isinstance(error, (RuntimeError, OSError, EOFError)):  # the last two from a connection that broke
            told = "; ".join(self._told(0.5))
            if told:
                raise DataError(told) from error

    def _told(self, patience_s: float) -> Iterator[str]:
        for number, process, ahead in lost_workers(self.iterator, patience_s):
            how, advice = _end_of(process.exitcode)
            where = " or ".join(map(self.place, ahead[:2]))  # the first may be on its way already
            yield f"worker {number} (pid {process.pid}) {how} while at {where or 'no batch'}. {advice}"


def _end_of(code: int) -> tuple[str, str]:
    """How a process with this exit code ended, and what to do about it."""
    if code > 0:
        return (
            f"left with exit code {code}",
            "Something in the dataset calls sys.exit or os._exit: raise an error instead",
        )
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if name == "SIGKILL":
        return "was killed (SIGKILL)", (
            "The system does so when memory runs out: use fewer workers, a smaller batch or less prefetch, and keep "
            "large data in arrays or files, since every worker copies Python lists"
        )
    if name == "SIGBUS":
        return "died of SIGBUS", "Shared memory is full: make /dev/shm larger, or use fewer workers"
    return f"died of {name}", "It broke in native code: run without workers under python -X faulthandler to see where"
