"""A source whose dataset remembers something of its own: saved and put back along with the position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loopwright.data.generators import Streams
from loopwright.state import Source, has_state

__all__ = ["Held", "close", "holder_of", "streams_of"]


def holder_of(dataset: Any) -> Any:
    """``dataset``, or what it is a subset of, if that has ``state_dict`` and ``load_state_dict``; else None."""
    while dataset is not None and not has_state(dataset):
        dataset = getattr(dataset, "dataset", None)
    return dataset


class Held:
    """``source`` together with the state of ``holder``, the dataset that it reads in this process."""

    def __init__(self, source: Source, holder: Any, workers: int) -> None:
        self.source, self.holder, self.workers = source, holder, workers
        self._loaded: Any = None

    @property
    def streams(self) -> Streams:
        return streams_of(self.source)

    @property
    def waited(self) -> float:
        return getattr(self.source, "waited", 0.0)

    @property
    def batches(self) -> int | None:
        return self.source.batches

    @property
    def exact(self) -> list[str]:
        name = type(self.holder).__name__
        lost = f"the state of {name} changes in the workers, which do not tell it"
        return self.source.exact + ([lost] if self.workers else [])

    def sizes(self, batch: int) -> Iterator[int] | None:
        return self.source.sizes(batch)

    def state_dict(self) -> dict[str, Any]:
        return {"source": self.source.state_dict(), "dataset": self._loaded or self.holder.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.source.load_state_dict(state["source"])
        self._loaded = state["dataset"]

    def at(self, epoch: int, batch: int) -> Iterator[Any]:
        state, self._loaded = self._loaded, None
        if state is not None:
            self.holder.load_state_dict(state)
        return self.source.at(epoch, batch)

    def close(self) -> None:
        close(self.source)


def close(one: Any) -> None:
    """End what can be ended."""
    if hasattr(one, "close"):
        one.close()


def streams_of(source: Any) -> Streams:
    """The generators that reading ``source`` may draw from."""
    known = getattr(source, "streams", None)
    return known if isinstance(known, Streams) else Streams({"source": source})
