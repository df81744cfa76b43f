"""The log of a run as curves, read with patience and in bulk: a long run has a million values."""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopwright.loggers.jsonl import NON_FINITE, unreadable

__all__ = ["Curve", "read_log"]

_MOST = 2000  # series
_NOT_VALUES = ("kind", "step", "epoch", "samples", "seconds")
_NUMBERS = {float, int}
_AT_ONCE = 1000  # lines

Blocks = dict[tuple[str, ...], "array[float]"]  # by kind and names, the values of all records that have these names


@dataclass(slots=True)
class Curve:
    """The values of one name: ``step`` [N], int64, that never falls, and ``value`` [N], float64."""

    step: NDArray[np.int64]
    value: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.step)


def read_log(file: Path) -> tuple[dict[str, dict[str, Curve]], list[str]]:
    """The curves of a ``metrics.jsonl`` by kind of record and name, and what could not be read, in words."""
    blocks: Blocks = {}
    bad, number, torn = list[int](), 0, False
    try:
        with file.open("rb") as data:
            while lines := list(islice(data, _AT_ONCE)):
                torn = not lines[-1].endswith(b"\n")
                for i, record in enumerate(_records(lines), number + 1):
                    if not _add(record, blocks):
                        bad.append(i)
                number += len(lines)
    except OSError:
        return {}, [f"{file.name} is missing: nothing was logged"]
    notes = []
    if torn:
        bad = [i for i in bad if i != number]
        notes.append(
            f"the last line of {file.name} (line {number:,}) was not written to its end and is left out: the run was "
            "killed then, or is writing now"
        )
    if bad:
        notes.append(unreadable(file.name, bad))
    curves, left_out = _curves(blocks)
    if left_out:
        notes.append(f"{file.name} holds more than {_MOST:,} series; {left_out:,} are left out")
    return curves, notes


def _records(lines: list[bytes]) -> list[Any]:
    """What the lines hold, None for one that is no JSON or was not written to its end."""
    try:
        found = json.loads(b"[" + b",".join(lines) + b"]")  # at once: half the time of one by one
        if len(found) == len(lines) and lines[-1].endswith(b"\n"):
            return list(found)
    except (ValueError, RecursionError):
        pass
    return [_record(line) for line in lines]


def _record(line: bytes) -> Any:
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None


def _add(record: Any, blocks: Blocks) -> bool:
    """Put the values of a record to those of all that have the same names; False for what is no record.

    Almost all records hold numbers alone, under the names of the one before: nothing is done name by name then.
    """
    if not isinstance(record, dict) or type(record.get("step")) not in _NUMBERS or not 0 <= record["step"] < 1 << 53:
        return False
    kind = record.pop("kind", "train")
    if not _NUMBERS.issuperset(map(type, record.values())):
        record = {name: NON_FINITE.get(value, value) if type(value) is str else value for name, value in record.items()}
        record = {name: value for name, value in record.items() if type(value) in _NUMBERS}
    try:
        values = array("d", record.values())
    except OverflowError:  # an integer beyond all floats
        record = {name: value for name, value in record.items() if -1e308 < value < 1e308 or value - value != 0}
        values = array("d", record.values())
    key = (str(kind)[:40], *record)
    if key in blocks:
        blocks[key].extend(values)
    else:
        blocks[key] = values
    return True


def _curves(blocks: Blocks) -> tuple[dict[str, dict[str, Curve]], int]:
    """Curves by kind and name, and how many names there was no room for."""
    parts: dict[tuple[str, str], list[tuple[NDArray[Any], NDArray[Any]]]] = {}
    left_out = set[str]()
    for (kind, *names), values in blocks.items():
        table = np.frombuffer(values, dtype=np.float64).reshape(-1, len(names))
        step = table[:, names.index("step")].astype(np.int64)
        for i, name in enumerate(names):
            if name in _NOT_VALUES:
                continue
            if (kind, name) not in parts and len(parts) >= _MOST:
                left_out.add(name)
            else:
                parts.setdefault((kind, name), []).append((step, table[:, i]))
    curves: dict[str, dict[str, Curve]] = {}
    for (kind, name), found in parts.items():
        step, value = (np.concatenate(columns) for columns in zip(*found, strict=True))
        if (np.diff(step) < 0).any():
            order = step.argsort(kind="stable")
            step, value = step[order], value[order]
        curves.setdefault(kind, {})[name] = Curve(step, value)
    return curves, len(left_out)
