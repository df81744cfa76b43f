"""Several sources mixed batch by batch, in an order that is a pure function of a key and the epoch."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch

from loopwright.data.fingerprint import fingerprint
from loopwright.data.generators import Streams
from loopwright.data.held import close, streams_of
from loopwright.data.plan import check_state
from loopwright.data.sources import as_source
from loopwright.errors import DataError, SettingError, choose
from loopwright.state import Source

__all__ = ["Mix", "Mixed"]

_UNTIL = ("first", "all", "longest")
_DRAWS = 1024  # turns that are drawn together
_PASS = 1 << 20  # a source that begins again within an epoch is told another epoch


class Mix:
    """Batches from several sources by turns: hand it to ``fit``, or iterate it.

    ``sources`` maps names to anything that ``fit`` takes as data. They take turns in their order; with ``weights``
    (positive numbers by name) each turn is drawn in proportion to them. ``until`` says when an epoch ends:

    - ``"first"``: when a source whose turn it is has no batch left;
    - ``"all"``: when all are used up; those that end before are passed over;
    - ``"longest"``: when each has been used up once; those that end before begin again.

    The turns depend on ``seed`` and the epoch and on nothing else; ``seed=None`` takes the key of the run. A run
    resumes exactly at any batch if its sources do. ``tag=True`` gives ``(name, batch)`` in place of the batch.
    Raises SettingError for a setting that cannot be used.

    >>> mixed = Mix({"a": [1, 2, 3], "b": [10, 20]}, until="all", tag=True)
    >>> list(mixed)
    [('a', 1), ('b', 10), ('a', 2), ('b', 20), ('a', 3)]
    """

    def __init__(
        self,
        sources: Mapping[str, Any],
        *,
        weights: Mapping[str, float] | None = None,
        until: str = "first",
        seed: int | None = None,
        tag: bool = False,
    ) -> None:
        if not isinstance(sources, Mapping) or not sources:
            raise SettingError(
                f'Mix needs its sources by name, as in Mix({{"a": loader, "b": loader}}); got {sources!r}'
            )
        if until not in _UNTIL:
            raise SettingError(f"until={until!r}; {choose(until, _UNTIL)}")
        if weights is not None:
            _check_weights(weights, sources)
        self.sources, self.weights, self.until, self.seed, self.tag = sources, weights, until, seed, tag
        self._passes = 0

    def as_source(self, *, train: bool, key: int) -> Mixed:
        """What ``fit`` and the evaluations read."""
        key = key if self.seed is None else self.seed
        read: dict[str, Source] = {}
        for name, data in self.sources.items():
            try:
                read[name] = as_source(data, train=train, key=_hash(key, name))
            except DataError as error:
                raise DataError(f"the source {name!r} of Mix: {error}") from error
        return Mixed(self, read, key)

    def __iter__(self) -> Iterator[Any]:
        self._passes += 1
        return self.as_source(train=True, key=torch.initial_seed()).at(self._passes - 1, 0)

    def __repr__(self) -> str:
        names = ("weights", "until", "seed", "tag")
        return f"Mix({', '.join(self.sources)}, {', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "Mix", "sources": {name: fingerprint(data) for name, data in self.sources.items()}}


def _check_weights(weights: Any, sources: Mapping[str, Any]) -> None:
    if not isinstance(weights, Mapping):
        named = ", ".join(f'"{name}": {number}' for number, name in enumerate(sources, 1))
        raise SettingError(f"weights={weights!r}; expected a positive number for each source by name: {{{named}}}")
    for name in [*weights, *sources]:
        if name not in sources:
            raise SettingError(f"weights has {name!r}, which is no source. {choose(name, sources)}")
        if name not in weights or not 0 < weights[name] < float("inf"):
            raise SettingError(
                f"weights of {name!r} is {weights.get(name)!r}; expected a positive number for each source"
            )


def _hash(*parts: object) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(slots=True)
class _Walk:
    """How far an epoch has come."""

    epoch: int
    passes: dict[str, int]  # how often each source has begun again
    given: dict[str, int]  # batches that each has given in that pass
    ended: list[str]
    batch: int = 0
    turn: int = 0


class Mixed:
    """The source that a ``Mix`` is read by."""

    def __init__(self, mix: Mix, sources: Mapping[str, Source], key: int) -> None:
        self.mix, self.sources, self.key = mix, dict(sources), key
        self._names = list(sources)
        twice = [pair for pair in combinations(self._names, 2) if sources[pair[0]] is sources[pair[1]]]
        if twice:
            raise DataError(f"{twice[0][0]!r} and {twice[0][1]!r} are the same source, which cannot be in two places")
        self._walk = self._begin(0)
        self._open: dict[str, Iterator[Any]] = {}
        self._loaded: Mapping[str, Any] | None = None
        self._waiting: dict[str, Any] = {}  # states of sources that have not been read since they were loaded
        self._draws: tuple[tuple[int, int], list[int]] = ((-1, -1), [])

    # ------------------------------------------------------------------------------------------------- what is known

    @property
    def streams(self) -> Streams:
        """The generators that the sources may draw from."""
        return Streams(
            {
                f"{name}.{root}": held
                for name in self._names
                for root, held in streams_of(self.sources[name]).roots.items()
            }
        )

    @property
    def batches(self) -> int | None:
        """Batches in an epoch; None if a source does not tell, or if it depends on what is drawn."""
        counts = [self.sources[name].batches for name in self._names]
        known = [count for count in counts if count is not None]
        if self.mix.until == "all":
            return sum(known) if len(known) == len(counts) else None
        if self.mix.weights is not None or len(known) < len(counts):
            return None
        if self.mix.until == "first":
            return min(known) * len(known) + known.index(min(known))
        return max(known) * len(known) - known[::-1].index(max(known))

    @property
    def exact(self) -> list[str]:
        told = [f"source {name!r}: {why}" for name in self._names for why in self.sources[name].exact]
        held = {name: {id(one) for one in streams_of(self.sources[name]).find().values()} for name in self._names}
        return told + [
            f"the sources {a!r} and {b!r} draw from the same generator"
            for a, b in combinations(self._names, 2)
            if held[a] & held[b]
        ]

    def sizes(self, batch: int) -> Iterator[int] | None:
        """None: which batch comes next differs from epoch to epoch."""
        return None

    def _own(self) -> dict[str, Any]:
        weights = self.mix.weights and dict(self.mix.weights)
        return {"names": self._names, "weights": weights, "until": self.mix.until, "key": self.key}

    def state_dict(self) -> dict[str, Any]:
        states = {name: self._waiting.get(name) or self.sources[name].state_dict() for name in self._names}
        return {**self._own(), "walk": asdict(self._walk), "sources": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError if names, weights, ``until``, the seed or a source differ from the saved run."""
        if self.mix.seed is None:
            self.key = state.get("key", self.key)  # the saved run goes on with its own key
        check_state(self._own(), state)
        for name, source in self.sources.items():
            source.load_state_dict(state["sources"][name])
        self._waiting = dict(state["sources"])
        self._loaded = state

    # ------------------------------------------------------------------------------------------------- going through

    def at(self, epoch: int, batch: int) -> Iterator[Any]:
        state, self._loaded = self._loaded, None
        if batch and state is not None and (state["walk"]["epoch"], state["walk"]["batch"]) == (epoch, batch):
            self._walk = _Walk(**copy.deepcopy(dict(state["walk"])))
        elif not batch or (epoch, batch) != (self._walk.epoch, self._walk.batch):
            self._walk = self._begin(epoch)
            while self._walk.batch < batch and self._advance(self._walk, self._has_more):
                pass
        walk = self._walk
        begun = [name for name in self._names if walk.given[name] and not (self._passed(name, walk))]
        return self._batches({name: self._opened(name) for name in begun})

    def _begin(self, epoch: int) -> _Walk:
        return _Walk(epoch, dict.fromkeys(self._names, 0), dict.fromkeys(self._names, 0), [])

    def _batches(self, iterators: dict[str, Iterator[Any]]) -> Iterator[Any]:
        item: Any = None

        def ask(name: str) -> bool:
            nonlocal item
            if name not in iterators:
                iterators[name] = self._opened(name)
            try:
                item = next(iterators[name])
            except StopIteration:
                del iterators[name]
                return False
            return True

        try:
            while name := self._advance(self._walk, ask):
                yield (name, item) if self.mix.tag else item
                item = None  # or it would be held while the next one is fetched
        finally:
            for iterator in iterators.values():
                close(iterator)

    def _opened(self, name: str) -> Iterator[Any]:
        self._waiting.pop(name, None)
        return self.sources[name].at(self._walk.epoch + _PASS * self._walk.passes[name], self._walk.given[name])

    def _advance(self, walk: _Walk, ask: Callable[[str], bool]) -> str | None:
        """The source that has given the next batch, as ``ask`` says; None at the end of the epoch."""
        while not self._is_over(walk):
            name = self._names[self._turn(walk.epoch, walk.turn)]
            walk.turn += 1
            if self._passed(name, walk):
                continue
            given = ask(name)
            if not given:
                walk.ended += [name] * (name not in walk.ended)
                if self.mix.until == "longest" and not self._is_over(walk):
                    walk.passes[name], walk.given[name] = walk.passes[name] + 1, 0
                    given = ask(name)
                    if not given:
                        raise DataError(f"the source {name!r} gave no batch when it began again; is it used up?")
            if given:
                walk.given[name] += 1
                walk.batch += 1
                return name
        return None

    def _passed(self, name: str, walk: _Walk) -> bool:
        return self.mix.until == "all" and name in walk.ended

    def _is_over(self, walk: _Walk) -> bool:
        if self.mix.until == "first":
            return bool(walk.ended)
        if self.mix.until == "all":
            return len(walk.ended) == len(self._names)
        return all(name in walk.ended or not self._has_more(name) for name in self._names)

    def _has_more(self, name: str) -> bool:
        """False if the source is known to have given its last batch."""
        return self._walk.given[name] != self.sources[name].batches

    def _turn(self, epoch: int, turn: int) -> int:
        if self.mix.weights is None:
            return turn % len(self._names)
        chunk, at = divmod(turn, _DRAWS)
        if self._draws[0] != (epoch, chunk):
            weights = torch.tensor([self.mix.weights[name] for name in self._names], dtype=torch.float64, device="cpu")
            generator = torch.Generator(device="cpu").manual_seed(_hash("mix", self.key, epoch, chunk))
            drawn = torch.rand(_DRAWS, dtype=torch.float64, generator=generator, device="cpu") * weights.sum()
            picked = torch.searchsorted(weights.cumsum(0), drawn, right=True).clamp_(max=len(self._names) - 1)
            self._draws = (epoch, chunk), picked.tolist()
        return self._draws[1][at]

    def close(self) -> None:
        """Stop what the sources keep running between epochs."""
        for source in self.sources.values():
            close(source)
