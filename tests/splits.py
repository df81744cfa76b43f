"""A source interrupted after every batch goes on as if it had not been: the batches and all random generators."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopwright.checkpoint import decode, encode
from loopwright.data import as_source
from loopwright.data.generators import get_globals, set_globals


def saved(state: Any) -> Any:
    """Through the codec of checkpoints and through JSON."""
    plain, tensors = encode(state)
    return decode(json.loads(json.dumps(plain)), tensors)


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, in the same types."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def seed_everything() -> None:
    torch.manual_seed(11)
    random.seed(12)
    np.random.seed(13)


def train() -> None:
    """What a model does with the global generators between two batches."""
    torch.rand(3)
    random.random()
    np.random.rand()


def go_through(source: Any, epochs: int, epoch: int = 0, batch: int = 0, points: Any = None) -> list[Any]:
    """Each batch with the generators after it; ``points`` takes states to come back to."""
    trace: list[Any] = []
    for number in range(epoch, epochs):
        batches = source.at(number, batch)
        train()
        for item in batches:
            trace.append((number, item, get_globals()))
            train()
            batch += 1
            if points is not None:
                points[number, batch] = saved(source.state_dict()), get_globals(), len(trace)
        batch = 0
        if points is not None:
            points[number + 1, 0] = saved(source.state_dict()), get_globals(), len(trace)
    return [*trace, (None, None, get_globals())]


def check_every_split(make: Callable[[], Any], *, epochs: int = 3, twice: bool = False) -> list[Any]:
    """Interrupt ``make()`` at every batch and epoch's end; the batches of the whole, for further checks.

    ``twice``: the state that each resumed one gives at once is what is resumed.
    """
    seed_everything()
    source = as_source(make(), train=True, key=1)
    points: dict[Any, Any] = {}
    whole = go_through(source, epochs, points=points)
    assert source.exact == []
    for (epoch, batch), (state, generators, done) in list(points.items())[:-1]:
        torch.manual_seed(99)
        fresh = as_source(make(), train=True, key=2)
        fresh.load_state_dict(state)
        set_globals(generators)
        if twice and batch:  # an epoch that has begun: between its begin and its first step nothing is saved
            begun = fresh.at(epoch, batch)
            state = saved(fresh.state_dict())
            begun.close()  # type: ignore[attr-defined]
            fresh = as_source(make(), train=True, key=2)
            fresh.load_state_dict(state)
            set_globals(generators)
        if batch:
            again = as_source(make(), train=True, key=2)
            again.load_state_dict(state)
            before = get_globals()
            again.at(epoch, batch)
            assert get_globals() == before, f"split at {epoch, batch}: the generators were drawn from"
        set_globals(generators)
        rest = go_through_rest(fresh, epochs, epoch, batch)
        assert len(rest) == len(whole) - done, f"split at {epoch, batch}"
        for ours, theirs in zip(rest, whole[done:], strict=True):
            assert ours[0] == theirs[0]
            assert same(ours[1], theirs[1]), f"split at {epoch, batch}: {ours[1]} is not {theirs[1]}"
            assert ours[2] == theirs[2], f"split at {epoch, batch}: the generators differ"
    return [item for _, item, _ in whole[:-1]]


def go_through_rest(source: Any, epochs: int, epoch: int, batch: int) -> list[Any]:
    """As ``go_through``, from the middle of an epoch that has begun."""
    trace: list[Any] = []
    if batch:
        for item in source.at(epoch, batch):
            trace.append((epoch, item, get_globals()))
            train()
        epoch += 1
    return [*trace, *go_through(source, epochs, epoch)]
