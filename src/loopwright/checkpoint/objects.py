"""The state of objects: of what kind each is, and which of several of a kind has which state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from loopwright.errors import CheckpointError
from loopwright.handlers import Handler
from loopwright.state import has_state
from loopwright.text import with_article

__all__ = ["given_state", "kind_of", "listed", "matched", "put_back", "state_of"]


def kind_of(obj: Any) -> str:
    """What an object is told from others by: its class, or the name of a handler."""
    return f"handler {obj.name}" if isinstance(obj, Handler) else type(obj).__qualname__


def state_of(obj: Any) -> Any:
    """The ``state_dict`` of an object; empty for one that has none, or cannot load it."""
    return obj.state_dict() if has_state(obj) else {}


def given_state(name: str, obj: Any) -> Any:
    """The state of what the user has given by ``name``; raises CheckpointError for an object without any."""
    if isinstance(obj, tuple) and len(obj) == 2 and all(map(callable, obj)):
        return obj[0]()
    if isinstance(obj, Tensor):
        return obj
    if has_state(obj):
        return obj.state_dict()
    raise CheckpointError(
        f"state[{name!r}] is {with_article(kind_of(obj))}, which has no state_dict and load_state_dict; give an "
        f"object that has them, or two functions: state={{{name!r}: (get, set)}}"
    )


def put_back(obj: Any, state: Any) -> None:
    """Give ``obj`` what ``given_state`` has returned: a tensor takes it in place, for an optimizer may have it."""
    if isinstance(obj, tuple):
        obj[1](state)
    elif isinstance(obj, Tensor):
        obj.detach().copy_(state)
    else:
        obj.load_state_dict(state)


def listed(objects: list[Any]) -> list[dict[str, Any]]:
    """The kind and state of each, in order."""
    return [{"kind": kind_of(o), "state": state_of(o)} for o in objects]


def matched(objects: list[Any], saved: list[dict[str, Any]]) -> Iterator[tuple[Any, Any]]:
    """Objects with their saved state: the n-th of a class with the n-th of that class."""
    waiting = [o for o in objects if has_state(o)]
    for entry in saved:
        obj = next((o for o in waiting if kind_of(o) == entry["kind"]), None)
        if obj is not None:
            waiting.remove(obj)
            if entry["state"]:
                yield obj, entry["state"]
