"""What the loop holds: the metrics of one series, fed from what the steps return."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from loopwright import rng
from loopwright.errors import CheckpointError, MetricError, SettingError, choose
from loopwright.events import describe
from loopwright.metrics.algebra import INPUTS, inputs_of, leaves
from loopwright.metrics.around import Around
from loopwright.metrics.check import check_metrics, fresh, keys_of, parts_of, unwrapped, within
from loopwright.metrics.draws import OwnDraws
from loopwright.metrics.function import Function
from loopwright.metrics.memory import remember, restore
from loopwright.metrics.modes import Running, Window, tells_each_record
from loopwright.metrics.values import flat
from loopwright.state import has_state
from loopwright.written import is_ours

__all__ = ["Meters"]

Feed = tuple[str, Any, tuple[str, ...]]


class Meters:
    """Copies of ``metrics`` that collect one series: a training epoch, a validation, a test.

    ``feed`` passes to each metric the entries of a step's output that its ``inputs`` name (``preds`` and ``target`` if
    it has none), detached. Which metrics take part is settled at the first batch after a reset: in training, one of
    whose inputs the step returns none is left out; otherwise all inputs must be there. A metric that draws random
    numbers (as its first batch shows) draws from a stream of its own, and computing leaves the generators as they were:
    training goes the same way with and without metrics.

    >>> import torch
    >>> from loopwright.metrics import Accuracy
    >>> meters = Meters({"accuracy": Accuracy()})
    >>> meters.feed({"preds": torch.tensor([[0.1, 0.9], [0.8, 0.2]]), "target": torch.tensor([1, 1])})
    >>> meters.compute()
    {'accuracy': 0.5}
    """

    def __init__(self, metrics: Mapping[str, Any] | None, *, training: bool = False) -> None:
        self.metrics = fresh(check_metrics(metrics))
        self.training = training
        self._parts = parts_of(self.metrics)  # what is fed: metrics may share some
        self._fed: list[str] = []  # of the parts, those that take part
        self._feeds: list[Feed] | None = None
        self._draws: dict[str, OwnDraws] = {}
        self._reads_batch = False
        self._spare: dict[str, Any] = {}  # blank copies, through which what other ranks saw is joined
        self._settled: tuple[tuple[str, ...], list[Feed]] | None = None  # who took part, where none is foreign

    def feed(self, output: Any, batch: Any = None) -> None:
        """Update the metrics with what a step returned for one batch, or with entries of a batch that is a dict.

        Raises MetricError if an input is missing, or if the step returns a scalar under the name of a metric. What a
        metric raises keeps its type and gains a note with the metric's name and the shapes.
        """
        feeds = self._feeds
        settled = feeds is not None
        if feeds is None:
            feeds = self._resolve(output, batch)
        if self._reads_batch and isinstance(output, Mapping) and isinstance(batch, Mapping):
            output = {**batch, **output}
        for name, update, inputs in feeds:
            try:
                given = [
                    (value.detach() if value.requires_grad else value)
                    if type(value := output[key]) is Tensor
                    else _detached(value)
                    for key in inputs
                ]
            except (KeyError, TypeError, IndexError):
                raise self._missing(name, inputs, output) from None
            try:
                update(*given)
            except Exception as error:
                shapes = ", ".join(f"{key}: {describe(value)}" for key, value in zip(inputs, given, strict=True))
                error.add_note(f"[loopwright] in metric {name!r}, given {shapes}")
                raise
        if not settled:
            self._settle()

    def _resolve(self, output: Any, batch: Any) -> list[Feed]:
        known = returned = output if isinstance(output, Mapping) else {}
        self._reads_batch = False
        if isinstance(output, Mapping) and isinstance(batch, Mapping):
            needed = {key for part in self._parts.values() for key in inputs_of(part)} - known.keys()
            self._reads_batch = not needed.isdisjoint(batch)
            known = {**batch, **output} if self._reads_batch else known
        if self._settled is not None and self._settled[0] == tuple(known):  # as in the series before
            self._feeds = self._settled[1]
            self._fed = [name for name, _, _ in self._feeds]
            return self._feeds
        feeds: list[Feed] = []
        for name, part in self._parts.items():
            metric, inputs = unwrapped(part)
            missing = [key for key in inputs if key not in known]
            if self.training and missing and not any(key in returned for key in inputs):
                continue
            if missing:
                raise self._missing(name, inputs, known or output)
            tensors = [known[key] for key in inputs if isinstance(known[key], Tensor)]
            for module in within(metric):
                if isinstance(module, nn.Module) and tensors:
                    module.to(tensors[0].device)
            if _draws_nothing(metric):
                feeds.append((name, metric.update, inputs))
            else:
                draws = self._draws.setdefault(name, OwnDraws())
                feeds.append((name, partial(draws.call, metric.update), inputs))
        self._feeds, self._fed = feeds, [name for name, _, _ in feeds]
        self._check_names(returned)
        self._settled = None if self._draws else (tuple(known), feeds)
        return feeds

    def _check_names(self, known: Mapping[str, Any]) -> None:
        for name in self._measured():
            if _is_scalar(known.get(name)):
                raise MetricError(
                    f"the step returns the number {name!r}, and a metric has this name too: both would be logged as "
                    f"one. Rename one of them, or leave one out"
                )

    def _settle(self) -> None:
        """After the first batch: call those metrics directly that drew nothing."""
        self._draws = {name: draws for name, draws in self._draws.items() if draws.state is not None}
        self._feeds = [
            (name, update.args[0] if isinstance(update, partial) and name not in self._draws else update, inputs)
            for name, update, inputs in self._feeds or []
        ]

    def _missing(self, name: str, inputs: tuple[str, ...], output: Any) -> MetricError:
        kind = type(unwrapped(self._parts[name])[0]).__name__
        reads = f"metric {name.partition('/')[0]!r} reads {' and '.join(map(repr, inputs))} of what the step returns"
        if not isinstance(output, Mapping):
            keys = ", ".join(f"{key!r}: {key}" for key in inputs)
            return MetricError(f"{reads}, which is {describe(output)}. Return a dict: {{'loss': loss, {keys}}}")
        missing = next(key for key in inputs if key not in output)
        return MetricError(
            f"{reads}, which has no {missing!r}. {choose(missing, output)} Return it under this name, or name what to "
            f"read: lw.metrics.On({kind}(...), {', '.join(map(repr, _others(output, len(inputs))))})"
        )

    def compute(self) -> dict[str, float]:
        """The values since the last reset: ``name``, ``name/key`` of a dict, ``name/0``, ``name/1``, ... of a vector.

        Metrics that were left out, or not fed yet, are not in it. Raises MetricError for a value of another kind.
        """
        return {key: value for name in self._measured() for key, value in self._values(name, self.metrics[name])}

    def each_record(self, gather: Callable[[Any], list[Any]] | None = None) -> dict[str, float]:
        """The values so far of those metrics that are told in each record: ``Running``, ``Window``.

        ``gather`` collects an object from all ranks, in their order; all of them call this together.
        """
        names = [name for name, metric in self.metrics.items() if tells_each_record(metric)]
        if not names:
            return {}
        if gather is None:
            told = {name: self.metrics[name] for name in names if name in self._fed}
        else:
            mine = {name: self.metrics[name].state_dict() if name in self._fed else None for name in names}
            told = {}
            for state in gather(mine):
                for name, values in state.items():
                    if values is not None:
                        told.setdefault(name, _blank(self.metrics[name])).merge(_blank(self.metrics[name], values))
        return {key: value for name, metric in told.items() for key, value in self._values(name, metric)}

    def unfed(self) -> dict[str, list[str]]:
        """The metrics that take no part, and what they read that no step has returned."""
        measured = self._measured()
        return {
            name: list(dict.fromkeys(key for leaf in leaves(metric) for key in inputs_of(leaf)))
            for name, metric in self.metrics.items()
            if name not in measured
        }

    def _measured(self) -> list[str]:
        """The metrics all of whose parts take part."""
        fed = {id(self._parts[name]) for name in self._fed}
        return [name for name, metric in self.metrics.items() if all(id(leaf) in fed for leaf in leaves(metric))]

    def _values(self, name: str, metric: Any) -> list[tuple[str, float]]:
        try:
            with nullcontext() if _draws_nothing(metric) else rng.forked():
                value, keys = metric.compute(), keys_of(name, metric)
                if keys and isinstance(value, Tensor) and value.ndim and value.numel() == len(keys):
                    return list(zip(keys, map(float, value.flatten().tolist()), strict=True))
                return list(flat(name, value))
        except Exception as error:
            error.add_note(f"[loopwright] when metric {name!r} was computed")
            raise

    # ------------------------------------------------------------------------------------------ several ranks

    def cut(self) -> dict[str, Any]:
        """What was taken in since the last cut, which is forgotten; None for torchmetrics', which join themselves."""
        states: dict[str, Any] = {}
        for name in self._fed:
            metric, states[name] = unwrapped(self._parts[name])[0], None
            if _merges(metric):
                states[name] = metric.state_dict()
                metric.reset()
        return states

    def join(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Take in what was cut, here and on other ranks, in this order."""
        for state in states:
            for name, values in state.items():
                metric = unwrapped(self._parts[name])[0]
                if values is not None:
                    if name not in self._spare:
                        self._spare[name] = _blank(metric)
                    spare = self._spare[name]
                    spare.load_state_dict(values)
                    metric.merge(spare)
                if name not in self._fed:  # this rank had no batch
                    self._fed.append(name)

    def check_ranks(self, *, alike: bool = False) -> None:
        """Raise SettingError for a metric whose value over several ranks could not be told.

        ``alike``: several of them see the same samples, which torchmetrics would count more than once.
        """
        for name, part in self._parts.items():
            if _has_window(part):
                raise SettingError(
                    f"metric {name.partition('/')[0]!r} is a Window, whose batches could not be told apart on several "
                    "ranks: take lw.metrics.Running, the value over the epoch so far"
                )
            inner = unwrapped(part)[0]
            if not _merges(inner) and not hasattr(inner, "sync_on_compute") and not hasattr(inner, "compute_groups"):
                raise SettingError(
                    f"metric {name.partition('/')[0]!r} ({type(inner).__name__}) sees a part of the data on each rank, "
                    "and has no merge(other), state_dict() and load_state_dict() by which the parts could be joined; "
                    "derive it from lw.metrics.Metric, or take one of torchmetrics"
                )
            if alike and not _merges(inner):
                raise SettingError(
                    f"metric {name.partition('/')[0]!r} ({type(inner).__name__}) is joined over all ranks by "
                    "torchmetrics, and several of them see the same samples here: take one of lw.metrics"
                )

    def reset(self) -> None:
        """Begin a new series."""
        for name in self._fed:
            self._parts[name].reset()
        self._fed, self._feeds, self._draws = [], None, {}

    @property
    def exact(self) -> list[str]:
        """Reasons why a resume in the middle of a series would not give the same values; empty if it would."""
        return [
            f"metric {name.partition('/')[0]!r} ({type(metric).__name__}) has no state_dict and load_state_dict: after "
            "a resume in the middle of an epoch, its value of that epoch covers the rest only"
            for name, part in self._parts.items()
            for metric in within(part)
            if remember(metric) is None
        ]

    def state_dict(self) -> dict[str, Any]:
        """What the metrics have taken in, by name, as plain data, tensors and states of generators."""
        return {
            name: {
                "kind": type(unwrapped(self._parts[name])[0]).__qualname__,
                "state": remember(unwrapped(self._parts[name])[0]),
                "draws": self._draws[name].state if name in self._draws else None,
            }
            for name in self._fed
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave; a metric that was not there, or was another one, begins here."""
        self.reset()
        for name, saved in state.items():
            metric = unwrapped(self._parts[name])[0] if name in self._parts else None
            if metric is None or type(metric).__qualname__ != saved.get("kind", type(metric).__qualname__):
                continue
            if saved["state"] is not None:
                try:
                    restore(metric, saved["state"])
                except CheckpointError:  # of other parts
                    metric.reset()
                    continue
            if saved["draws"] is not None:
                self._draws[name] = OwnDraws(saved["draws"])
            self._fed.append(name)


def _merges(metric: Any) -> bool:
    if isinstance(metric, Running):
        return all(map(_merges, within(metric)))
    return callable(getattr(metric, "merge", None)) and has_state(metric)


def _has_window(metric: Any) -> bool:
    inside = leaves(metric.metric) if isinstance(metric, Around) else ()
    return isinstance(metric, Window) or any(map(_has_window, inside))


def _blank(metric: Any, state: Mapping[str, Any] | None = None) -> Any:
    """A copy that has taken in nothing, or what ``state`` holds."""
    made = copy.deepcopy(metric)
    made.reset()
    if state is not None:
        made.load_state_dict(state)
    return made


def _draws_nothing(metric: Any) -> bool:
    """True for the built-in ones; watching the generators around others costs 0.2 ms an epoch."""
    return all(is_ours(type(m)) and not isinstance(m, Function) for m in within(metric))


def _others(output: Mapping[str, Any], count: int) -> list[str]:
    """Names to suggest: of tensors first."""
    keys = sorted((str(key) for key in output), key=lambda key: _is_scalar(output.get(key)))
    return [*keys, *INPUTS][:count]


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if type(value) in (list, tuple):
        return type(value)(_detached(item) for item in value)
    if type(value) is dict:
        return {key: _detached(item) for key, item in value.items()}
    return value


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0)
