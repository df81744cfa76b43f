"""What was measured: values that wait on their device until a record reads them, and the records of a run."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from loopwright.notebook import sparkline, table_html

if TYPE_CHECKING:
    import pandas

__all__ = ["History", "Series"]

Sums = dict[Any, Any]  # by name, the sum of value * weight, and that of the weights; arrays of them for steps
Join = Callable[[Sums], Sums]
_ROWS = 20  # of a long table, at each end
LIMIT = 1024  # rows that may wait; without a limit, values that nobody reads grow for ever


class Series:
    """Scalars of the steps since the last record, read from the device all at once.

    Two running means (since the last record; since the epoch began) are fed by the one read. Values are added one by
    one in float64, so that the sums do not depend on when the read happened and a resumed run logs the same numbers.

    >>> series = Series()
    >>> series.add({"loss": torch.tensor(1.0)}, weight=3)
    >>> series.add({"loss": torch.tensor(5.0)}, weight=1)
    >>> series.take_record()
    {'loss': 2.0}
    """

    __slots__ = ("_blocks", "_first", "_parts", "_rows", "epoch", "losses", "reads", "record", "shared")

    def __init__(self, losses: dict[str, array[float]] | None = None, *, shared: bool = False) -> None:
        self._rows: list[tuple[Mapping[str, Any], float | None]] = []  # None: of no step
        self._first = 0  # the number of the first step of the rows, counted from the last record
        # stacked on an accelerator, not yet read: the name, weight and step of each, -1 for none
        self._blocks: list[tuple[list[tuple[str, float, int]], Tensor]] = []
        # this rank's part of the losses of the steps since the last record, and of their weights
        self._parts: dict[str, tuple[list[float], list[float]]] = {}
        self.record: Sums = {}
        self.epoch: Sums = {}
        self.losses, self.shared = losses, shared  # with other ranks, whose parts of a step come with the next record
        self.reads = 0  # times that a device was read

    def add(self, values: Mapping[str, Any], weight: float | None = None) -> None:
        """Keep detached 0-dimensional tensors or numbers of a step, to be averaged with ``weight``.

        Without one they are of no step: they count once each, and are no losses.
        """
        self._rows.append((values, weight))
        if len(self._rows) >= LIMIT:
            self._fold()

    def _fold(self) -> None:
        """Bound what waits: on the CPU it is summed at once, elsewhere stacked into one tensor a dtype, unread."""
        if self._parts and not self.shared:  # of a run with several ranks, which this one goes on with alone
            self._tell(dict(self._parts))
        columns: dict[str, tuple[list[float], list[float], list[int]]] = {}
        waiting: dict[Any, tuple[list[tuple[str, float, int]], list[Tensor]]] = {}
        for values, weight in self._rows:
            if weight is None:
                weight, step = 1.0, -1
            else:
                step = self._first
                self._first += 1
            for name, value in values.items():
                if type(value) is not float and isinstance(value, Tensor):
                    if not value.is_cpu:
                        names, tensors = waiting.setdefault((value.device, value.dtype), ([], []))
                        names.append((name, weight, step))
                        tensors.append(value)
                        continue
                    value = value.item()  # one by one: to stack what lies on the CPU costs more than it saves
                column = columns.get(name)
                if column is None:
                    column = columns[name] = [], [], []
                column[0].append(float(value))
                column[1].append(weight)
                column[2].append(step)
        self._rows.clear()
        for name, column in columns.items():
            self._sum(name, *column)
        self._blocks.extend((names, torch.stack(tensors)) for names, tensors in waiting.values())

    def _sum(self, name: str, values: list[float], weights: list[float], steps: list[int]) -> None:
        total, n = self.record.get(name, (0.0, 0.0))
        epoch_total, epoch_n = self.epoch.get(name, (0.0, 0.0))
        for value, weight in zip(values, weights, strict=True):  # one by one: the same sum whenever it is read
            part = value * weight
            total += part
            n += weight
            epoch_total += part
            epoch_n += weight
        self.record[name], self.epoch[name] = (total, n), (epoch_total, epoch_n)
        if self.losses is None or not (name == "loss" or name.endswith("/loss")):
            return
        if -1 in steps:
            kept = [one for one in zip(values, weights, steps, strict=True) if one[2] >= 0]
            if not kept:
                return
            values, weights, steps = map(list, zip(*kept, strict=True))
        if not self.shared:
            self.losses.setdefault(name, array("f")).extend(values)
            return
        totals, mine = self._parts.setdefault(name, ([], []))
        for step, value, weight in zip(steps, values, weights, strict=True):
            if step > len(totals):  # this rank had no sample in the steps before
                _fill(totals, mine, step)
            totals.append(value * weight)
            mine.append(weight)

    def _tell(self, joined: Sums) -> None:
        """Keep the losses of the steps since the last record, of all ranks together."""
        self._parts, self._first = {}, 0
        for name, (totals, weights) in joined.items():
            if self.losses is not None:
                weighty = np.asarray(weights) > 0  # in the other steps no rank had one, as of a phase that was not due
                found = np.asarray(totals)[weighty] / np.asarray(weights)[weighty]
                self.losses.setdefault(name, array("f")).extend(found.tolist())

    def read(self) -> None:
        """Fetch everything that waits and add it to both means."""
        self._fold()
        for names, stacked in self._blocks:
            self.reads += 1
            for (name, weight, step), value in zip(names, stacked.tolist(), strict=True):
                self._sum(name, [float(value)], [weight], [step])
        self._blocks.clear()

    def take_record(self, join: Join | None = None) -> dict[str, float]:
        """Means since the last record; begins a new one. ``join`` adds the sums of other ranks."""
        self.read()
        sums, self.record = self.record, {}
        if join is None:
            self._first = 0
            return _means(sums)
        parts = {}
        for name, (totals, weights) in self._parts.items():
            _fill(totals, weights, self._first)
            parts[(name,)] = np.array(totals), np.array(weights)  # which are added as numbers are
        joined = join({**sums, **parts})
        self._tell({key[0]: one for key, one in joined.items() if isinstance(key, tuple)})
        return _means({name: one for name, one in joined.items() if isinstance(name, str)})

    def take_epoch(self, join: Join | None = None) -> dict[str, float]:
        """Means since the epoch began; begins a new one. ``join`` adds the sums of other ranks."""
        self.read()
        sums, self.epoch = self.epoch, {}
        return _means(sums if join is None else join(sums))

    def state_dict(self) -> dict[str, Any]:
        self.read()
        state: dict[str, Any] = {"record": dict(self.record), "epoch": dict(self.epoch)}
        if self.shared:
            state |= {
                "steps": self._first,
                "losses": {name: [*map(list, parts)] for name, parts in self._parts.items()},
            }
        return state

    def include(self, state: Mapping[str, Any]) -> None:
        """Add what another one had in its ``state_dict``."""
        for mine, name in ((self.record, "record"), (self.epoch, "epoch")):
            for key, (total, n) in state[name].items():
                before = mine.get(key, (0.0, 0.0))
                mine[key] = before[0] + total, before[1] + n
        for name, theirs in state.get("losses", {}).items():
            totals, weights = self._parts.setdefault(name, ([], []))
            _fill(totals, weights, len(theirs[0]))
            for i, (total, n) in enumerate(zip(*theirs, strict=True)):
                totals[i], weights[i] = totals[i] + total, weights[i] + n

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rows.clear()
        self._blocks.clear()
        self.record = {name: (total, n) for name, (total, n) in state["record"].items()}
        self.epoch = {name: (total, n) for name, (total, n) in state["epoch"].items()}
        self._first = state.get("steps", self._first)  # of a state that has nothing in it, where this one stands
        self._parts = {name: (list(parts[0]), list(parts[1])) for name, parts in state.get("losses", {}).items()}


class History:
    """One record an epoch, and the loss of every step (4 bytes each).

    Records are plain dicts: ``{"epoch": 1, "step": 22, "samples": 1347, "seconds": 0.2, "train/loss": ...}``.

    >>> history = History()
    >>> history.append({"epoch": 1, "train/loss": 0.5})
    >>> history["train/loss"], history[-1]["epoch"], len(history)
    ([0.5], 1, 1)
    """

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.losses: dict[str, array[float]] = {}

    def append(self, record: Mapping[str, Any]) -> None:
        """Add the record of an epoch."""
        self.records.append(dict(record))

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.records)

    def __contains__(self, item: object) -> bool:
        """True for a name that a record has, and for a record."""
        return any(item in record for record in self.records) if isinstance(item, str) else item in self.records

    def __getitem__(self, key: int | slice | str) -> Any:
        """A record by position, or the values of one name over the epochs (None where an epoch has none)."""
        if isinstance(key, str):
            if not any(key in record for record in self.records):
                from loopwright.errors import choose

                names = {name for record in self.records for name in record}
                raise KeyError(f"the history has no {key!r}. {choose(key, names)}")
            return [record.get(key) for record in self.records]
        if isinstance(key, int) and not -len(self) <= key < len(self):
            n = len(self)
            held = (
                f"{n} record{'s' * (n != 1)}, one an epoch: {-n} to {n - 1}"
                if n
                else "no record yet; the first is there by on_epoch_end"
            )
            raise IndexError(f"history[{key}]: the history has {held}")
        return self.records[key]

    @property
    def steps(self) -> list[int]:
        """At which step each record was made: what the values of a name are drawn over."""
        return [record["step"] for record in self.records]

    def to_pandas(self) -> pandas.DataFrame:
        """A DataFrame with one row an epoch. Needs pandas: ``pip install "loopwright[pandas]"``."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError('history.to_pandas() needs pandas: pip install "loopwright[pandas]"') from error
        return pandas.DataFrame(self.records)

    def __repr__(self) -> str:
        last = ", ".join(f"{k}={_shown(v)}" for k, v in self.records[-1].items()) if self.records else "no epoch yet"
        return f"History({len(self)} epochs; last: {last})"

    def _repr_html_(self) -> str:
        """The curve of the loss of every step, and a line an epoch; of a long run the first and the last ones."""
        names = list(dict.fromkeys(name for record in self.records for name in record))
        rows = [[record.get(name) for name in names] for record in self.records]
        if len(rows) > 2 * _ROWS:
            rows = [*rows[:_ROWS], ["\u22ee"] * len(names), *rows[-_ROWS:]]
        curve = sparkline(next(iter(self.losses.values()), []))
        return curve + (table_html(names, rows) if rows else "<p>no epoch yet</p>")

    def state_dict(self) -> dict[str, Any]:
        losses = {name: torch.tensor(values, dtype=torch.float32) for name, values in self.losses.items()}
        return {"records": [dict(r) for r in self.records], "losses": losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.records = [dict(r) for r in state["records"]]
        self.losses.clear()
        self.losses.update({name: array("f", values.tolist()) for name, values in state["losses"].items()})


def _fill(totals: list[float], weights: list[float], length: int) -> None:
    """Nothing for the steps that are missing."""
    for values in (totals, weights):
        values.extend([0.0] * (length - len(values)))


def _means(sums: Sums) -> dict[str, float]:
    return {name: total / n if n else float("nan") for name, (total, n) in sums.items()}


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and value % 1 else str(value)
