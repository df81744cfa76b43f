"""What the user's own functions do, in short: a digest of the code of each, and the plain values that they read."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from loopwright.described import Description
from loopwright.provenance import is_own

__all__ = ["LENGTHS", "Bodies", "bodies", "closed_over", "code_of", "edited", "names_in"]

LENGTHS = frozenset({"epochs", "max_epochs", "num_epochs", "max_steps"})  # in code of the user's: how long it trains

Bodies = dict[str, dict[str, Any]]

_MOST = 500  # functions that are told


def bodies(told: Any) -> Bodies:
    """What the functions and classes in ``told`` do, as far as they are the user's, and what these call.

    ``functions``: a digest of the bytecode by name, which spaces, comments and line numbers do not change.
    ``lambdas``: the same by their place in ``told``, since they have no name. ``reads``: numbers, truth values and
    texts that functions read of their modules, or have closed over. ``python``: another version has other bytecode.

    >>> bodies({"loss": sorted})["functions"]
    {}
    """
    python = {"version": ".".join(map(str, sys.version_info[:2]))}
    found: Bodies = {"python": python, "functions": {}, "lambdas": {}, "reads": {}}
    for path, function in _met(told, ""):
        if function.__name__ == "<lambda>":
            held = (*(function.__defaults__ or ()), *closed_over(function).values())
            found["lambdas"][path] = _digest(function, held)
        _add(function, found)
    return found


def edited(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Lambdas that are not what they were, and, in words, functions and what they read that are not.

    Nothing is known of another version of Python, and of what only one of the two has. How long training lasts, by its
    usual names, is left out: what follows from it, such as a schedule, is a setting.
    """
    if saved.get("python") != now["python"]:
        return [], []

    def changed(kind: str) -> Iterator[tuple[str, Any, Any]]:
        was = saved.get(kind, {})
        return ((name, was[name], one) for name, one in now[kind].items() if name in was and was[name] != one)

    lambdas = [f"{place} is a lambda with another body" for place, *_ in changed("lambdas")]
    told = [f"the code of {name}" for name, *_ in changed("functions")]
    reads = [one for one in changed("reads") if one[0].rpartition(".")[2].lower() not in LENGTHS]
    return lambdas, told + [f"{name}, which was {was!r} and is {one!r}" for name, was, one in reads]


def _met(told: Any, path: str) -> Iterator[tuple[str, types.FunctionType]]:
    """Functions of the user's in nested settings, and the methods of classes of the user's, by their place there."""
    if isinstance(told, Mapping):
        for name, one in told.items():
            yield from _met(one, f"{path}/{name}" if path else str(name))
    elif isinstance(told, (list, tuple)):
        for i, one in enumerate(told):
            yield from _met(one, f"{path}/{i}")
    elif isinstance(told, type):
        for kind in (one for one in told.__mro__ if is_own(one.__module__)):
            yield from ((path, one) for one in map(_function, vars(kind).values()) if one is not None)
    elif (function := _function(told)) is not None:
        yield path, function


def _function(value: Any) -> types.FunctionType | None:
    """The function behind a method, a property, or what wraps it; None for what is none of the user's."""
    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
    value = inspect.unwrap(value) if callable(value) and not isinstance(value, type) else value
    value = getattr(value, "__func__", value)
    return value if isinstance(value, types.FunctionType) and is_own(value.__module__) else None


def _add(function: types.FunctionType, found: Bodies) -> None:
    """A function, what it reads of its module, and the functions of the user's that it calls there."""
    name = f"{function.__module__}.{function.__qualname__}"
    if name in found["functions"] or len(found["functions"]) > _MOST:
        return
    if function.__name__ != "<lambda>":
        found["functions"][name] = _digest(function, function.__defaults__ or ())
        told = {f"{name}.{used}": value for used, value in closed_over(function).items()}
        found["reads"] |= {used: Description().value(used, value) for used, value in told.items() if _is_plain(value)}
    for used in sorted(names_in(function.__code__)):
        value = function.__globals__.get(used)
        if _is_plain(value) and not used.startswith("__"):
            found["reads"][f"{function.__module__}.{used}"] = Description().value(used, value)
        elif isinstance(value, types.FunctionType) and (helper := _function(value)) is not None:
            _add(helper, found)


def closed_over(function: types.FunctionType) -> dict[str, Any]:
    """What a function has closed over, by name."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}


def code_of(function: types.FunctionType) -> str:
    """The bytecode of a function as text, which spaces, comments and line numbers do not change."""
    return _text(function.__code__, function.__doc__)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def _digest(function: types.FunctionType, held: Iterable[Any]) -> str:
    """Of the code, and of what is plain among the values that are ``held`` with it."""
    told = code_of(function) + repr([one for one in held if _is_plain(one)])
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


@functools.lru_cache(1024)
def _text(code: types.CodeType, doc: str | None) -> str:
    """All of the code that decides what it does, less its docstring."""
    consts = [_text(one, None) if isinstance(one, types.CodeType) else _constant(one) for one in code.co_consts]
    consts = [one for one in consts if doc is None or one != repr(doc)]
    return repr((code.co_code, consts, code.co_names, code.co_varnames, code.co_freevars))


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def names_in(code: types.CodeType) -> set[str]:
    """Globals and attributes that code reads, also the code of functions within."""
    inner = (names_in(one) for one in code.co_consts if isinstance(one, types.CodeType))
    return set(code.co_names).union(*inner)


def _is_filled(cell: Any) -> bool:
    """False for a cell of a closure in which there is nothing yet."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
