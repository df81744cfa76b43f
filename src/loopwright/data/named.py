"""The columns of tables, by name and type: a batch has no names, so that columns in another order would go unseen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from loopwright.data.arrays import is_array
from loopwright.data.picked import is_sparse
from loopwright.data.tables import is_table
from loopwright.errors import DataError

__all__ = ["Columns", "check_columns", "columns_of", "without_names"]

Columns = Sequence[tuple[Any, str]]  # of a table: the name and the type of each, in their order
_PLAIN = (str, int, float, bool, type(None))
_SHOWN = 5  # columns of another type that one error lists


def columns_of(data: Any) -> dict[str, Columns]:
    """The columns of each table in ``data``, by its path; also of what a loader or a source reads.

    >>> import pandas as pd
    >>> columns_of((pd.DataFrame({"a": [1], "b": [0.5]}), [0]))
    {'[0]': [('a', 'int64'), ('b', 'float64')]}
    """
    return dict(_tables(data, ""))


def check_columns(trained_on: Mapping[str, Columns], data: Any, kind: str) -> None:
    """Raise DataError if a table in ``data`` has other columns than ``trained_on``, what ``columns_of`` gave.

    Other are names, their order, and a type that holds what the one of training did not. ``data`` may be the inputs
    alone. What is no table, or was none in training, has no names to compare.

    >>> import pandas as pd
    >>> trained_on = columns_of((pd.DataFrame({"a": [1], "b": [2]}), [0]))
    >>> check_columns(trained_on, pd.DataFrame({"b": [2], "a": [1]}), "predict")
    Traceback (most recent call last):
    loopwright.errors.DataError: the columns of the predict data come as 'b', 'a', and were 'a', 'b' in training. Choose
    them by name, in that order: data[['a', 'b']]
    >>> check_columns(trained_on, pd.DataFrame({"a": [1], "b": [0.5]}), "predict")
    Traceback (most recent call last):
    loopwright.errors.DataError: column 'b' of the predict data is float64, and was int64 in training. Make it as it
    was, as by data.astype({'b': 'int64'})
    """
    for path, columns in _tables(data, ""):
        before = trained_on.get(path) or trained_on.get(f"[0]{path}")
        if before is not None:
            _check_names([name for name, _ in before], [name for name, _ in columns], f"the {kind} data{path}")
            _check_types(before, columns, f"the {kind} data{path}")


def without_names(trained_on: Mapping[str, Columns], data: Any) -> dict[str, list[Any]]:
    """Where ``data`` has as many columns as a table of ``trained_on``, but no names: by the path, those of training.

    >>> import pandas as pd
    >>> without_names(columns_of(pd.DataFrame({"a": [1], "b": [2]})), np.zeros((3, 2)))
    {'': ['a', 'b']}
    """
    found = {}
    for path, shape in _arrays(data, ""):
        before = trained_on.get(path) or trained_on.get(f"[0]{path}")
        if before is not None and shape[1:] == (len(before),):
            found[path] = [name for name, _ in before]
    return found


def _check_names(before: list[Any], names: list[Any], what: str) -> None:
    gone, new = [one for one in before if one not in names], [one for one in names if one not in before]
    if gone or new:
        told = [f"without {_listed(gone)}"] * bool(gone) + [f"with {_listed(new)}, which is new"] * bool(new)
        raise DataError(
            f"{what} is {' and '.join(told)}: the model was trained on the columns {_listed(before)}. Choose them by "
            f"name, in that order: data[{before!r}]"
        )
    if names != before:
        raise DataError(
            f"the columns of {what} come as {_listed(names)}, and were {_listed(before)} in training. "
            f"Choose them by name, in that order: data[{before!r}]"
        )


def _check_types(before: Columns, columns: Columns, what: str) -> None:
    changed = [(name, was, now) for (name, was), (_, now) in zip(before, columns, strict=True) if not _holds(was, now)]
    if changed:
        told = "; ".join(
            f"column {name!r} of {what} is {now}, and was {was} in training" for name, was, now in changed[:_SHOWN]
        )
        more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        types = {name: was for name, was, _ in changed[:_SHOWN]}
        raise DataError(f"{told}{more}. Make it as it was, as by data.astype({types!r})")


def _holds(was: str, now: str) -> bool:
    """True if every value of the type ``now`` is one of the type ``was``: whole numbers among floats are no drift."""
    try:
        return was == now or np.can_cast(np.dtype(now), np.dtype(was), "safe")
    except TypeError:  # a type of pandas
        return False


def _arrays(data: Any, path: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The shapes of what is no table with names, as ``_tables`` goes through it."""
    if type(data).__module__.startswith("loopwright."):
        yield from _arrays(_inner(data), path)
    elif isinstance(data, (Mapping, tuple)) and not is_sparse(data):
        for key, part in data.items() if isinstance(data, Mapping) else enumerate(data):
            yield from _arrays(part, f"{path}[{key!r}]")
    elif is_array(data) and not isinstance(data, list) and not dict(_tables(data, path)):
        yield path, tuple(getattr(data, "shape", ()))


def _inner(data: Any) -> Any:
    inner = (getattr(data, name, None) for name in ("data", "source", "inner"))
    return next((one for one in inner if one is not None), None)


def _tables(data: Any, path: str) -> Iterator[tuple[str, Columns]]:
    if type(data).__module__.startswith("loopwright."):  # a loader of ours, or a source
        yield from _tables(_inner(data), path)
    elif is_table(data):
        yield path, [(field.name, str(np.dtype(field.type.to_pandas_dtype()))) for field in data.schema]
    elif hasattr(data, "columns") and hasattr(data, "iloc"):
        names = list(data.columns)
        if names != list(range(len(names))):  # as pandas numbers those that were given no name
            yield path, [(_plain(name), str(kind)) for name, kind in zip(names, data.dtypes, strict=True)]
    elif isinstance(data, Mapping) and is_array(data):
        for key, part in data.items():
            yield from _tables(part, f"{path}[{key!r}]")
    elif isinstance(data, tuple):
        for i, part in enumerate(data):
            yield from _tables(part, f"{path}[{i}]")


def _plain(name: Any) -> Any:
    """A name that a checkpoint can keep; levels of names are tuples of them."""
    if isinstance(name, tuple):
        return tuple(map(_plain, name))
    return name if type(name) in _PLAIN else str(name)


def _listed(names: list[Any]) -> str:
    return ", ".join(map(repr, names))
