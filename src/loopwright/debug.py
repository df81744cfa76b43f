"""Switches for looking for mistakes: a rehearsal of the run, a few batches, less data, audits and profiles."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from loopwright import rng
from loopwright.callbacks import Audit, Checkpoint, Profiler
from loopwright.callbacks.anomaly import Anomaly
from loopwright.checkpoint.attributes import put_back
from loopwright.data import limit, samples
from loopwright.data.held import close, streams_of
from loopwright.data.trained_on import TrainedOn
from loopwright.errors import SettingError, name_nearest
from loopwright.events import Callback
from loopwright.progress import Duration
from loopwright.state import Run, Source, Stage, has_state

__all__ = ["Debug"]


@dataclass(frozen=True, slots=True)
class Debug:
    """What ``Trainer(debug=lw.Debug(...))`` does otherwise than a plain run. Nothing by default.

    ``dev_run=2``: a rehearsal. Every stage is one epoch of at most 2 batches, validation has 2, one checkpoint is
    taken at least, all in a folder that is deleted; loggers are left out. Then parameters, buffers, optimizers and
    random generators are put back as they were, and the task knows nothing of it.
    ``overfit=1``: trains on the first batch (or the first few) again and again, and validates on it: a model that
    cannot learn that by heart has a mistake. The batches are read once, in the order of the data. Such a run cannot be
    resumed exactly.
    ``train`` and ``valid``: that many batches of every epoch (a whole number), or that part of them (0.1).
    ``anomaly``: torch's anomaly mode, and the name of the first module whose output is not finite.
    ``audit``: ``lw.Audit()``. ``profile``: ``lw.Profiler()``.

    Raises SettingError for a value that is none, and for two that contradict.

    >>> Debug(overfit=1).overfit
    1
    """

    dev_run: int = 0
    overfit: int = 0
    train: float | None = None
    valid: float | None = None
    anomaly: bool = False
    audit: bool = False
    profile: bool = False

    def __post_init__(self) -> None:
        for name in ("dev_run", "overfit"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise SettingError(f"Debug({name}={value!r}): expected a number of batches, such as {name}=2")
        for name in ("train", "valid"):
            value = getattr(self, name)
            if value is not None:
                try:
                    limit([], **_part(value))
                except SettingError as error:
                    raise SettingError(f"Debug({name}={value!r}): {error}") from None
        for name in ("anomaly", "audit", "profile"):
            if not isinstance(getattr(self, name), bool):
                raise SettingError(f"Debug({name}={getattr(self, name)!r}): expected True or False")
        data = [f"{name}={value!r}" for name, value in self.settings().items() if name in _OF_DATA]
        if len(data) > 1 and data[0].startswith(("dev_run", "overfit")):
            raise SettingError(f"Debug({', '.join(data)}): each says which batches there are; give one of them")

    # ------------------------------------------------------------------------------------- what the Trainer asks for

    def settings(self) -> dict[str, Any]:
        """What is switched on, as plain data."""
        return {name: value for name in self.__slots__ if (value := getattr(self, name))}

    def callbacks(self) -> list[Callback]:
        """What is added to the callbacks, after them: Anomaly sees the loss as the backward does."""
        kinds = ((self.audit, Audit), (self.profile, Profiler), (self.anomaly, Anomaly))
        return [kind() for wanted, kind in kinds if wanted]

    def narrow(self, run: Run, stages: Sequence[Stage]) -> None:
        """Give ``stages`` the data that is asked for."""
        if self.overfit and run.comm.world_size > 1:
            raise SettingError("Debug(overfit=...) keeps batches in one process; start one, or use Debug(train=...)")
        for stage in stages:
            if self.valid is not None and not stage.valid:
                raise SettingError(f"Debug(valid={self.valid!r}) has nothing to limit: give fit(..., valid=loader)")
            if self.overfit:
                stage.source = First(stage.source, self.overfit)
                stage.valid = dict.fromkeys(stage.valid, First(stage.source, self.overfit))
            train, valid = self.dev_run or self.train, self.dev_run or self.valid
            if train is not None and train:
                stage.source = limit(stage.source, **_part(train)).as_source(train=True, key=0)
            if valid is not None and valid:
                stage.valid = {
                    name: limit(one, **_part(valid)).as_source(train=False, key=0) for name, one in stage.valid.items()
                }
            if self.dev_run:
                stage.until = [Duration(1.0, "epochs")]

    def rehearsed(self, savers: Sequence[Any]) -> list[Any]:
        """Checkpoints for the folder that is deleted, each of which takes one."""
        made = [copy.copy(saver) if isinstance(saver, Checkpoint) else Checkpoint() for saver in savers]
        for saver in made:
            saver.folder, saver.at_end = None, True
        return made

    @contextmanager
    def around(self, run: Run, root: Path | str | None, undo: Callable[[], None]) -> Iterator[Path | str | None]:
        """The folder for runs; of a rehearsal one that is deleted, after which all is as it was.

        ``undo`` puts back what preparing the run did to the optimizers.
        """
        if not self.dev_run:
            yield root
            return
        with TemporaryDirectory() as folder, _put_back(run):
            try:
                yield None if root is None else folder
            finally:
                run.folder = None
        undo()


_OF_DATA = ("dev_run", "overfit", "train", "valid")


name_nearest(Debug)


def _part(value: float) -> dict[str, Any]:
    return {"batches": value} if isinstance(value, int) else {"fraction": value}


@contextmanager
def _put_back(run: Run) -> Iterator[None]:
    """Afterwards parameters, buffers, gradients, attributes, optimizers, schedulers, generators are as they were."""
    roots = [run.task] if isinstance(run.task, nn.Module) else list(run.models.values())
    tensors = [t for root in roots for t in (*root.parameters(), *root.buffers())]
    tensors += [p for one in run.optimizers.values() for group in one.param_groups for p in group["params"]]
    tensors += [one for one in run.state.values() if isinstance(one, Tensor)]
    kept = [(t, t.detach().clone(), t.grad) for t in {id(t): t for t in tensors}.values()]
    schedulers = [
        s for stage in run.stages for phase in stage.phases for s in (*phase.step_schedulers, *phase.epoch_schedulers)
    ]
    stateful = [*run.optimizers.values(), *schedulers, *filter(has_state, run.state.values())]
    states = [copy.deepcopy(one.state_dict()) for one in stateful]
    previous, random = run.task.__dict__.get("_run"), rng.get()
    loaded = {module: TrainedOn.remembered([module]) for module in (run.task, *run.models.values())}
    try:
        with put_back({**run.models, "task": run.task}):
            yield
    finally:
        with torch.no_grad():
            for tensor, value, grad in kept:
                tensor.copy_(value)
                tensor.grad = grad
        for one, state in zip(stateful, states, strict=True):
            one.load_state_dict(state)
        rng.set(random)
        run.task.__dict__["_run"] = previous
        for module, trained_on in loaded.items():
            TrainedOn.forget([module])
            if trained_on is not None:
                trained_on.remember(module)


class First:
    """The source that gives the first ``count`` batches of ``source``, read once, in every epoch."""

    def __init__(self, source: Source, count: int) -> None:
        self.inner: Source = source.inner if isinstance(source, First) else source
        self.count, self.streams = count, streams_of(self.inner)
        self._held: list[Any] = source._held if isinstance(source, First) else []

    @property
    def batches(self) -> int:
        known = self.inner.batches
        return len(self._held) or (self.count if known is None else min(self.count, known))

    @property
    def exact(self) -> list[str]:
        return [f"Debug(overfit={self.count}) trains on batches that it has in memory"]

    @property
    def waited(self) -> float:
        return float(getattr(self.inner, "waited", 0.0))

    def sizes(self, batch: int) -> Iterator[int] | None:
        return map(samples, self._held[batch:]) if self._held else None

    def state_dict(self) -> dict[str, Any]:
        return {"overfit": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The batches are read again."""

    def at(self, epoch: int, batch: int) -> Iterator[Any]:
        if not self._held:
            batches = self.inner.at(0, 0)
            self._held += islice(batches, self.count)
            close(batches)
        return iter(self._held[batch:])

    def close(self) -> None:
        close(self.inner)
