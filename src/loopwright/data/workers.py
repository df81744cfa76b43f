"""Inside a worker process: the random state travels to the main process with every batch that moved it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import get_worker_info

from loopwright.data.generators import Streams

__all__ = ["Collate", "Start"]


class Collate:
    """Wraps ``collate_fn``: gives ``(worker, batch, state)``, where state is None if the worker's has not changed."""

    def __init__(self, collate_fn: Callable[[Any], Any]) -> None:
        self.collate_fn = collate_fn
        self.streams = Streams({})
        self.last: Any = None

    def __call__(self, samples: Any) -> tuple[int, Any, Any]:
        batch = self.collate_fn(samples)
        info = get_worker_info()
        assert info is not None
        now = self.streams.get()
        if now == self.last:
            return info.id, batch, None
        self.last = now
        return info.id, batch, now


class Start:
    """Wraps ``worker_init_fn``: afterwards the worker continues from the random state noted for it, if there is one."""

    def __init__(self, worker_init_fn: Callable[[int], None] | None, collate: Collate) -> None:
        self.worker_init_fn, self.collate = worker_init_fn, collate
        self.states: Mapping[int, Any] = {}

    def __call__(self, worker: int) -> None:
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker)
        info = get_worker_info()
        assert info is not None
        self.collate.streams = Streams({"dataset": info.dataset, "collate_fn": self.collate.collate_fn})
        if worker in self.states:
            self.collate.streams.set(self.states[worker])
        self.collate.last = self.collate.streams.get()
