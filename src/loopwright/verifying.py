"""Proof on a user's own task and data that a run which is stopped and gone on with ends with the same bits."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopwright import rng
from loopwright.callbacks import Checkpoint
from loopwright.errors import CheckpointError, SettingError
from loopwright.events import Callback, describe
from loopwright.state import Run
from loopwright.trainer import Trainer

__all__ = ["Verified", "verify_resume"]


@dataclass(frozen=True, slots=True)
class Verified:
    """What ``verify_resume`` has found. ``exact``: every run that was stopped has ended as the one that was not.

    ``stopped``: after how many steps. ``differences``: by name, with the first that differ of each run. ``unsteady``:
    what is not the same in two runs of which none was stopped, such as samples a second, and was not compared.

    >>> print(Verified(steps=4, stopped=(1, 3)))
    4 steps, stopped after 1, 3 and gone on with: the same bits
    """

    steps: int
    stopped: tuple[int, ...]
    differences: list[str] = field(default_factory=list)
    unsteady: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        after = ", ".join(map(str, self.stopped))
        head = f"{self.steps} steps, stopped after {after} and gone on with: "
        told = ["the same bits" if self.exact else "not the same", *(f"  - {one}" for one in self.differences)]
        return head + "\n".join(told + [f"  not compared: {name}" for name in self.unsteady])


def verify_resume(
    make: Callable[[], Sequence[Any] | Mapping[str, Any]],
    trainer: Trainer,
    *,
    steps: int = 12,
    stop: Iterable[int] | None = None,
) -> Verified:
    """Train, stop inside of steps, go on from checkpoints with new objects, and compare all that is left bit for bit.

    ``make`` does what a script does each time that it is started: it makes all objects anew, and returns what goes to
    ``fit``: ``(task, train)``, ``(task, train, valid)``, or a dict of arguments (with "step", those of
    ``Trainer.run``). What it draws at random for the data must come from a seed of its own. ``trainer`` gives the
    settings; callbacks are copied, its loggers and checkpoints left out. Runs take ``steps`` optimizer steps at most,
    in a folder that is deleted: choose more than an epoch has, so that its end and a validation are inside.

    Two runs are not stopped; the others are, by an exception in the batch or the validation that follows a checkpoint,
    with accumulation so inside of a window, ``stop`` steps from the start (three of them by default). Compared are
    weights, buffers, optimizers, schedules, random generators, metrics, callbacks, history, the loss of each step and
    the logged stream. The caller's own generators are left as they were.

    Raises SettingError where there is nothing to stop, and for several processes.

    >>> def make():
    ...     net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(), torch.nn.Linear(4, 1))
    ...     task = lw.Supervised(net, torch.nn.MSELoss(), torch.optim.Adam(net.parameters()))
    ...     return task, lw.Loader((torch.ones(20, 2), torch.ones(20, 1)), 5, shuffle=True)
    >>> import loopwright as lw
    >>> print(verify_resume(make, Trainer(epochs=3)))
    12 steps, stopped after 1, 6, 11 and gone on with: the same bits
    """
    if type(steps) is not int or steps < 2:
        raise SettingError(f"steps={steps!r}: expected a whole number of steps from 2, to stop after one of them")
    if trainer.debug.dev_run:
        raise SettingError("Debug(dev_run=...) leaves nothing behind that could be gone on with; leave it out")
    with rng.forked(), TemporaryDirectory() as folder:
        trial = _Trial(make, trainer, Path(folder), steps)
        whole, again = trial.run("whole", seed=0), trial.run("again", seed=0)
        total = int(whole["progress/step"])
        at = sorted({1, total // 2, total - 1} if stop is None else set(stop))
        if not at or at[0] < 1 or at[-1] >= total:
            raise SettingError(f"stop={at}: expected steps from 1 to {total - 1}, of a run of {total}")
        unsteady = list(_differences(whole, again))
        told = []
        if any(name.startswith(("weights", "optimizers", "generators")) for name in unsteady):
            first = next(iter(_differences(whole, again).values()))
            told = [f"two runs of which none was stopped differ: {first}. Seed what make() draws; deterministic=True"]
        for number in at:
            trial.run(f"stopped-{number}", seed=0, cut=number)
            try:
                found = trial.run(f"stopped-{number}", seed=1 + number, resume="auto")
            except CheckpointError as error:
                told.append(f"after step {number} it was refused: {error}")
                continue
            odd = [text for name, text in _differences(whole, found).items() if name not in unsteady]
            told += [f"after step {number}: {'; '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}"] if odd else []
    return Verified(total, tuple(at), told, unsteady)


class _Cut(Exception):  # noqa: N818 - it is what was asked for
    """Takes the place of a kill."""


class _Stopper(Callback):
    """Ends a run after ``steps``; or by an exception, as soon as its checkpoint is there."""

    stops = True

    def __init__(self, steps: int, *, cuts: bool) -> None:
        self.steps, self.cuts, self.saved = steps, cuts, False

    def on_step_end(self, run: Run, result: Any) -> None:
        if run.progress.step == self.steps and not self.cuts:
            run.request_stop("verified")

    def on_checkpoint(self, run: Run, path: Path) -> None:
        self.saved = self.cuts

    def on_backward_end(self, run: Run, *given: Any) -> None:
        self._cut()

    def on_step_start(self, run: Run) -> None:
        if not any(phase.moved for phase in (run.stage.phases if run.stage else ())):
            self._cut()  # a function that does all the work: nothing goes backward here

    def on_eval_batch_end(self, run: Run, *given: Any) -> None:
        self._cut()

    def on_fit_end(self, run: Run) -> None:
        self._cut()

    def _cut(self) -> None:
        if self.saved:
            raise _Cut


class _Trial:
    """Runs of ``make`` in a folder, each by objects of its own, and what they leave behind."""

    def __init__(self, make: Callable[[], Any], trainer: Trainer, folder: Path, steps: int) -> None:
        self.make, self.folder, self.steps, self.handlers = make, folder, steps, trainer.handlers
        self.settings = {**trainer.settings, "callbacks": copy.deepcopy(trainer.settings["callbacks"])}

    def run(self, name: str, *, seed: int, cut: int = 0, resume: str | None = None) -> dict[str, Any]:
        """All that is left by a run of ``steps``, or nothing by one that is cut after ``cut``."""
        rng.seed(seed)
        given = self.make()
        if not isinstance(given, Mapping):
            if not isinstance(given, (list, tuple)) or not 2 <= len(given) <= 3:
                raise SettingError(f"make() returned {describe(given)}; expected (task, train) or (task, train, valid)")
            given = dict(zip(("task", "train", "valid"), given, strict=False))
        own = [c for c in copy.deepcopy(self.settings["callbacks"]) if not isinstance(c, Checkpoint)]
        saver = Checkpoint(f"{cut} steps", keep=1, at_end=False) if cut else False
        more: dict[str, Any] = dict(
            callbacks=[*own, _Stopper(self.steps, cuts=bool(cut))], checkpoint=saver, loggers=None, progress=False,
            folder=self.folder / name, name=name, capsule=False,  # apart: none is told that it repeats another
        )  # fmt: skip
        trainer = Trainer(**{**self.settings, **more})
        trainer.handlers = [handler.anew() for handler in self.handlers]
        try:
            run = trainer.run(**given, resume=resume) if "step" in given else trainer.fit(**given, resume=resume)
        except _Cut:
            return {}
        if run.team is not None:
            raise SettingError("verify_resume works in one process; start it without a launcher")
        return dict(_flat(_left(run), ""))


def _left(run: Run) -> dict[str, Any]:
    """Everything about a run that has ended, but for its times."""
    schedulers = [s for stage in run.stages for p in stage.phases for s in (*p.step_schedulers, *p.epoch_schedulers)]
    assert run.folder is not None
    logged = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "weights": {name: model.state_dict() for name, model in run.models.items()},
        "optimizers": {name: one.state_dict() for name, one in run.optimizers.items()},
        "schedules": [one.torch.state_dict() for one in schedulers],
        "generators": rng.get(),
        "losses": {name: list(values) for name, values in run.history.losses.items()},
        "metrics": run.metrics,
        "history": [_timeless(record) for record in run.history],
        "callbacks": [callback.state_dict() for callback in run.callbacks],
        "progress": _timeless(run.progress._asdict()),
        "log": [_timeless(record) for record in logged],
    }


def _timeless(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "seconds"}


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every leaf of a nested value by its path; tensors as copies."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(item, f"{path}/{name}".lstrip("/"))
    elif isinstance(value, (list, tuple)):
        yield f"{path}/length".lstrip("/"), len(value)
        for number, item in enumerate(value):
            yield from _flat(item, f"{path}/{number}".lstrip("/"))
    elif isinstance(value, (Tensor, np.ndarray)):
        yield (
            path,
            torch.as_tensor(value.astype("i8") if isinstance(value, np.ndarray) else value).detach().cpu().clone(),
        )
    else:
        yield path, value


def _differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, str]:
    """What is not equal in bits, by name, in words."""
    told: dict[str, str] = {}
    for name in [*expected, *(name for name in found if name not in expected)]:
        if name not in expected or name not in found:
            told[name] = f"{name} is only in one of the runs"
        elif not _same(expected[name], found[name]):
            told[name] = f"{name} {_in_words(expected[name], found[name])}"
    return told


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))
    return type(a) is type(b) and (bool(a == b) or (a != a and b != b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _in_words(a: Any, b: Any) -> str:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype:
        apart = (a.to(torch.complex128) - b.to(torch.complex128)).abs()
        return f"differs in {int((a != b).sum())} of {a.numel()} elements, by up to {float(apart.max()):.3g}"
    short = describe if isinstance(a, Tensor) or isinstance(b, Tensor) else repr
    return f"should be {short(a)} and is {short(b)}"
