"""Any number on the task, or on another object, that follows a schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from loopwright.conflicts import meet
from loopwright.errors import SettingError, choose
from loopwright.events import Callback
from loopwright.schedules import as_schedule, constant, scaled
from loopwright.schedules.base import check_values
from loopwright.state import Run
from loopwright.text import with_article

__all__ = ["Anneal"]


class Anneal(Callback):
    """Sets numbers by schedules before every step: a dropout rate, a temperature, the weight of a penalty.

    ``values`` maps paths of attributes to schedules: ``"module.1.p"`` is ``task.module[1].p``. The paths begin at the
    task, or at ``of``, such as another callback. A value is a number, or a tensor of one, which is filled in place.
    A schedule goes over each stage anew; afterwards the values stay as they are.

    Reads: run.fraction. Changes: what the paths name. Stops: no.

    >>> from loopwright.schedules import linear
    >>> Anneal({"module.1.p": linear(0.0, 0.5)})
    Anneal({'module.1.p': linear(start=0.0, end=0.5)})

    Raises SettingError for what is no schedule; ``plan`` and ``fit`` tell a path that does not lead to a number, and
    values that it cannot have (a dropout rate of 1.5).
    """

    changes = ("attributes",)

    def __init__(self, values: Mapping[str, Any], *, of: Any = None) -> None:
        if not isinstance(values, Mapping) or not values or not all(isinstance(path, str) for path in values):
            raise SettingError(
                f"Anneal({values!r}): expected a dict such as {{'module.1.p': lw.schedules.linear(0, 0.5)}}"
            )
        self.values = {path: as_schedule(value) for path, value in values.items()}
        for path, schedule in self.values.items():
            if isinstance(schedule, scaled):
                raise SettingError(f"{path!r}: scaled(...) is for the groups of an optimizer; leave it out here")
        self.of = of
        self._stage: int | None = None
        self._found: list[tuple[Any, str, Callable[[float], float], dict[str, Any] | None]] = []

    def problems(self, run: Run) -> Iterator[str]:
        limits: dict[str, tuple[float, ...]] = {}
        for path in self.values:
            try:
                limits[path] = _limits(*self._find(run, path))
            except SettingError as error:
                yield str(error)
        yield from self._moved_twice(run)
        if isinstance(self.of, Callback) and all(self.of is not one for one in run.callbacks):
            kind = type(self.of).__name__
            yield f"Anneal(of={kind}) moves numbers of a callback that is not in this run; add that {kind} to callbacks"
        for stage in run.stages:
            for path, schedule in self.values.items():
                if not stage.whole.is_known and not isinstance(schedule, constant):
                    yield f"Anneal of {path!r} needs to know how long stage {stage.name!r} is; count it in steps"
                    continue
                try:
                    check_values(schedule.within(stage.whole.share).at, path, *limits.get(path, ()))
                except SettingError as error:
                    yield f"Anneal of {path!r}, stage {stage.name!r}: {error}"
        if run.compiler is not None and self.of is None:
            yield "Anneal changes numbers which a compiled step has built in; train with compile=False"
        if run.graphs is not None:
            yield "Anneal changes numbers before every step, which cuda_graphs=True has built in; leave one of them out"

    def _moved_twice(self, run: Run) -> Iterator[str]:
        """Numbers that another one before moves too, or to which two paths of this one lead."""
        every = [one for one in run.callbacks if isinstance(one, Anneal)]
        moved: set[tuple[int, str]] = set()
        for other in (one for one in every[: every.index(self) + 1] if meet(run, one, self)):
            for path in other.values:
                try:
                    owner, name = other._find(run, path)
                except SettingError:
                    continue  # told where it belongs
                if other is self and (id(owner), name) in moved:
                    yield f"two schedules of Anneal move {path!r}, and the last one would win; leave one of them out"
                moved.add((id(owner), name))

    def on_step_start(self, run: Run) -> None:
        if run.progress.stage != self._stage:
            self._begin(run)
        fraction = run.fraction
        for owner, name, at, held in self._found:
            if held is not None:
                held[name] = at(fraction)
            elif isinstance(value := getattr(owner, name), Tensor):
                value.detach().fill_(at(fraction))
            else:
                setattr(owner, name, at(fraction))

    def on_fit_start(self, run: Run) -> None:
        self._stage = None

    def _begin(self, run: Run) -> None:
        self._stage, stage = run.progress.stage, run.stage
        assert stage is not None
        self._found = []
        for path, schedule in self.values.items():
            owner, name = self._find(run, path)
            self._found.append((owner, name, schedule.within(stage.whole.share).at, _held(owner, name)))

    def _find(self, run: Run, path: str) -> tuple[Any, str]:
        """The object that holds the last name of ``path``, and that name."""
        owner: Any = run.task if self.of is None else self.of
        *before, last = path.split(".")
        for i, name in enumerate([*before, last]):
            if not hasattr(owner, name):
                at = ".".join(before[:i]) or "what the path begins at"
                kind = with_article(type(owner).__name__)
                raise SettingError(f"Anneal: {at}, {kind}, has no {name!r}. {choose(name, _attributes(owner))}")
            owner = getattr(owner, name) if i < len(before) else owner
        value = getattr(owner, last)
        if not _is_number(value):
            kind = with_article(type(value).__name__)
            raise SettingError(f"Anneal: {path!r} is {kind}, no number. {choose(last, _numbers(owner))}")
        return owner, last

    def __repr__(self) -> str:
        return f"Anneal({self.values!r}{'' if self.of is None else f', of={type(self.of).__name__}'})"


def _limits(owner: Any, name: str) -> tuple[float, ...]:
    """From where to where a number may go, where that is known; () where it is not."""
    if name == "p" and isinstance(owner, _DropoutNd):
        return 0.0, 1.0
    return getattr(owner, "_ranges", {}).get(name, ()) if isinstance(owner, Callback) else ()


def _held(owner: Any, name: str) -> dict[str, Any] | None:
    """Where a module keeps a plain number; None where setting it may do more. ``setattr`` of a module takes 10 us."""
    setter: Any = type(owner).__setattr__
    plain = setter is nn.Module.__setattr__ and not hasattr(type(owner), name)
    return vars(owner) if plain and name in vars(owner) else None


def _attributes(owner: Any) -> list[str]:
    """Numbers and children: what a path may go on with."""
    children = [name for name, _ in owner.named_children()] if isinstance(owner, nn.Module) else []
    held = [name for name, value in vars(owner).items() if hasattr(value, "__dict__") and not name.startswith("_")]
    return [*children, *held, *_numbers(owner)]


def _numbers(owner: Any) -> list[str]:
    tensors = dict(owner.named_buffers(recurse=False)) if isinstance(owner, nn.Module) else {}
    held = {**getattr(owner, "__dict__", {}), **tensors}
    return [name for name, value in held.items() if not name.startswith("_") and _is_number(value)]


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float)) and not isinstance(value, bool)
