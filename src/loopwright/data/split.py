"""Parts of a data set to train and to validate on: by chance, by class, by group, by time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from torch import Tensor

from loopwright.data.arrays import check_classes
from loopwright.data.parts import Index, by_rows, length, parts
from loopwright.data.plan import shuffled
from loopwright.errors import DataError, SettingError

__all__ = ["folds", "train_valid_split"]


def train_valid_split(
    data: Any,
    valid: float = 0.2,
    *,
    seed: int = 0,
    stratify: Any = None,
    groups: Any = None,
    by_time: Any = None,
) -> tuple[Any, Any]:
    """Two parts of ``data`` of the same kind, each in the order of the data: one to train on, one to validate on.

    ``valid`` is a share or a number of samples: m = round(share * n), at least 1 and at most n - 1. Which samples it
    takes depends on ``seed`` and n and on nothing else, and never on the global generators.

    - ``stratify``, one class a sample (a name or a whole number): every class gives its share, to the nearest whole
      number; m in all.
    - ``groups``, one name a sample: no group is in both parts; whole groups, in shuffled order, as long as m is not
      exceeded, and at least the smallest.
    - ``by_time``, one time a sample, or True for data in order of time: the latest m, and what is as late as the
      first of them. Nothing to validate on is then as early as anything to train on.

    Arrays (also in tuples and dicts) give arrays, which are views where a part is in one piece, and copies of its
    samples where it is not; data frames give data frames; datasets give ``Subset``s, which copy nothing, or what their
    own ``select`` gives. A list gives lists of its entries, the ready batches that it is for ``fit``: here they are
    what is counted. Raises DataError for data that cannot be split so, such as a stream, and SettingError for settings
    that cannot be used.

    >>> train, valid = train_valid_split(np.arange(10), 0.3)
    >>> len(train), len(valid), sorted({*train.tolist(), *valid.tolist()}) == list(range(10))
    (7, 3, True)
    >>> train_valid_split(np.arange(5), 2, by_time=[3, 1, 2, 5, 4])[1]
    array([3, 4])
    """
    data = by_rows(data)
    n = length(data)
    m = _number(valid, n)
    _check_one(stratify=stratify, groups=groups, by_time=by_time)
    if by_time is not None:
        chosen = _latest(by_time, n, m)
    elif groups is not None:
        chosen = _grouped(_codes(groups, n, "groups"), m, seed)
    else:
        order = _order(n, seed)
        chosen = order[:m] if stratify is None else _stratified(_codes(stratify, n, "stratify"), m, order)
    return parts(data, chosen, n)


def folds(
    data: Any, k: int = 5, *, seed: int = 0, stratify: Any = None, groups: Any = None
) -> Iterator[tuple[Any, Any]]:
    """``k`` pairs as of ``train_valid_split``: every sample is in the second part of just one of them.

    The second parts differ by at most one sample in size; with ``stratify`` in each class too. With ``groups`` no
    group is in both parts, and the largest go first, each to the part that is the smallest by then. A pair is made
    when it is asked for: of arrays, it holds a copy of all samples, and of a dataset none.

    >>> [(len(train), len(valid)) for train, valid in folds(np.arange(5), 2)]
    [(2, 3), (3, 2)]
    """
    data = by_rows(data)
    n = length(data)
    _check_one(stratify=stratify, groups=groups)
    if type(k) is not int or not 2 <= k <= n:
        counted = "batches in the list" if isinstance(data, list) else "samples"
        raise SettingError(f"k={k!r}; expected a whole number from 2 to {n}, the number of {counted}")
    order = _order(n, seed)
    fold = np.empty(n, np.intp)
    if groups is not None:
        codes = _codes(groups, n, "groups")
        sizes, filled = np.bincount(codes), np.zeros(k, np.intp)
        if len(sizes) < k:
            raise DataError(f"there are {len(sizes)} groups, too few for {k} folds")
        of = np.empty(len(sizes), np.intp)
        for group in sorted(_order(len(sizes), seed), key=lambda g: -sizes[g]):
            of[group] = filled.argmin()
            filled[of[group]] += sizes[group]
        fold = of[codes]
    else:
        if stratify is not None:
            order = order[np.argsort(_codes(stratify, n, "stratify")[order], kind="stable")]
        fold[order] = np.arange(n) % k
    return (parts(data, np.flatnonzero(fold == i), n) for i in range(k))


# ---------------------------------------------------------------------------------------------------- who is chosen


def _order(n: int, seed: int) -> Index:
    return cast(Index, shuffled(n, seed, -1).numpy())  # not the order of an epoch


def _stratified(codes: Index, m: int, order: Index) -> Index:
    counts = np.bincount(codes)
    shares = counts * (m / len(codes))
    take = np.floor(shares).astype(np.intp)
    rest = np.argsort(take - shares, kind="stable")[: m - take.sum()]  # the largest remainders
    take[rest] += 1
    return np.concatenate([order[codes[order] == code][: take[code]] for code in range(len(counts))])


def _grouped(codes: Index, m: int, seed: int) -> Index:
    sizes = np.bincount(codes)
    if len(sizes) < 2:
        raise DataError("all samples are of one group, which cannot be in both parts; there must be at least two")
    chosen, left = [], m
    for group in _order(len(sizes), seed):
        if sizes[group] <= left:
            chosen.append(group)
            left -= sizes[group]
    return np.flatnonzero(np.isin(codes, chosen or [sizes.argmin()]))


def _latest(times: Any, n: int, m: int) -> Index:
    if times is True:
        return np.arange(n - m, n)
    values = _column(times, n, "by_time")
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise DataError("by_time has values that are not a number; fill them in, or leave those samples out")
    chosen = np.flatnonzero(values >= np.sort(values)[n - m])
    if len(chosen) == n:
        raise DataError(
            f"the earliest of the latest {m} samples are as early as all others, so that nothing is left to train on"
        )
    return chosen


def _codes(labels: Any, n: int, name: str) -> Index:
    """The labels numbered from 0."""
    if name == "stratify":
        check_classes(labels, name)
    return cast(Index, np.unique(_column(labels, n, name), return_inverse=True)[1])


def _column(values: Any, n: int, name: str) -> np.ndarray[Any, Any]:
    column = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    if column.shape != (n,):
        raise SettingError(f"{name} has shape {column.shape}; expected one entry a sample, ({n},)")
    return column


def _number(valid: float, n: int) -> int:
    whole = type(valid) is int and 0 < valid < n
    if not whole and not (isinstance(valid, float) and 0 < valid < 1):
        raise SettingError(
            f"valid={valid!r}; expected a share between 0 and 1, or a number of samples from 1 to {n - 1}"
        )
    return int(valid) if whole else min(max(round(valid * n), 1), n - 1)


def _check_one(**given: Any) -> None:
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise SettingError(f"{' and '.join(names)} cannot be kept at the same time; give one of them")
