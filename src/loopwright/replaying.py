"""The step in a crash capsule, made again with the user's own task: the same error, with the same bits."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from loopwright import rng
from loopwright.checkpoint import Contents, read, snapshot
from loopwright.checkpoint.places import Place, Remote, as_place
from loopwright.errors import CheckpointError, LoopwrightWarning, SettingError
from loopwright.events import Callback, describe
from loopwright.folder import newest_in
from loopwright.state import Phase, Progress, Run, Stage, has_state
from loopwright.trainer import Trainer

__all__ = ["Replay", "replay", "replay_command"]


@dataclass(frozen=True, slots=True)
class Replay:
    """What became of a step that was made again.

    ``error`` is what it raised now (None: nothing), ``expected`` the text of the error then. ``same_error``: type and
    message are equal; of a step to which SIGTERM came, which had no error, that it has none now. ``same_values``: every
    scalar that the step had measured until then, such as its loss, has the same bits; None if it had not come to
    measure any. ``values`` and ``saved_values`` are these scalars, ``limits`` says what could differ, and why; ``path``
    is the capsule.

    >>> print(Replay(ValueError("bad"), "ValueError: bad", True, True, {"loss": 0.5}, {"loss": 0.5}, [], "x/capsules"))
    capsule  x/capsules
    error    ValueError: bad
    values   the same bits: then {'loss': 0.5}, now {'loss': 0.5}
    the error was reproduced
    """

    error: BaseException | None
    expected: str
    same_error: bool
    same_values: bool | None
    values: dict[str, float]
    saved_values: dict[str, float]
    limits: list[str] = field(default_factory=list)
    path: str = ""

    def __str__(self) -> str:
        what = "step" if self.expected.startswith("SIGTERM: ") else "error"
        now = "nothing was raised" if self.error is None else f"{type(self.error).__name__}: {self.error}"
        bits = {True: "the same bits", False: "other bits", None: "none were measured before the error"}
        told = [f"error    {self.expected}"] if self.same_error else [f"then     {self.expected}", f"now      {now}"]
        measured = "" if self.same_values is None else f": then {self.saved_values}, now {self.values}"
        lines = [
            f"capsule  {self.path}", *told, f"values   {bits[self.same_values]}{measured}",
            *(f"note     {limit}" for limit in self.limits),
            f"the {what} was {'' if self.same_error else 'not '}reproduced",
        ]  # fmt: skip
        return "\n".join(lines)


def replay(
    path: str | Path,
    task: Any,
    *,
    callbacks: Sequence[Callback] = (),
    stages: Sequence[Stage] | None = None,
    device: str = "cpu",
) -> Replay:
    """Make the step of a crash capsule again, and say whether the same error came with the same bits.

    ``path`` is the capsule; of a run, or of the folder of the runs of a name, the newest one in it is taken.

    ``task`` is made as for ``fit``, and new: its weights and optimizers become those of the capsule. ``callbacks`` are
    those of the run that take part in a step (``stages`` too, if it had some); without them an error of theirs cannot
    come. Nothing in the capsule is executed. Bits are the same on the same kind of device with the same torch; on
    another device the error is, as a rule. Global random generators are left as they were.

    Raises SettingError for what is no path, and CheckpointError for what is damaged, no capsule, or does not fit
    ``task``, and where its batches were left out.

    >>> def make():
    ...     net = torch.nn.Linear(1, 1)
    ...     optimizer = torch.optim.SGD(net.parameters(), 0.1)
    ...     return lw.Supervised(net, lambda preds, target: (preds / target).mean(), optimizer)
    >>> import loopwright as lw
    >>> data = [(torch.ones(2, 1), torch.full((2, 1), 2.0 - i)) for i in range(4)]
    >>> try:
    ...     lw.Trainer(epochs=1, name="x", progress=False).fit(make(), data)
    ... except lw.NonFiniteError:
    ...     (path,) = Path("runs/x").glob("*/capsules/*")
    >>> found = replay(path, make())
    >>> path.name, found.same_error, found.same_values
    ('step-00000003-NonFiniteError', True, True)
    """
    place = _capsule_at(path)
    data = read(place)
    if data.info.get("kind") != "capsule":
        raise CheckpointError(f"{path} is a checkpoint, not a crash capsule; go on from it with fit(..., resume=path)")
    if data.state["window"] is None or any(one["batch"] is None for one in data.state["window"]):
        raise CheckpointError(f"{path} cannot be replayed, it has no batch: {'; '.join(data.info['limits'])}")
    again = _Again(data, task)
    stage = Stage("main", until="1 step") if stages is None else stages[data.info["stage_index"]]
    # what was scheduled is in the optimizer of the capsule: a schedule would take this step for the first one
    stage = replace(
        stage, source=again.source, until="1 step", valid=None, validate_every=None, lr=None, schedule={}, reuse=False
    )
    trainer = Trainer(
        device=device, folder=None, progress=False, checkpoint=False, loggers=[], callbacks=[again, *callbacks],
        **data.info["settings"],
    )  # fmt: skip
    error, previous = None, task.__dict__.pop("_run", None)
    with rng.forked(), warnings.catch_warnings():
        warnings.simplefilter("ignore", LoopwrightWarning)
        try:
            trainer.fit(task, again.source, stages=[stage])
        except Exception as caught:
            error = caught
    task.__dict__["_run"] = previous
    if previous is None:
        del task.__dict__["_run"]
    if again.run is None and error is not None:  # it did not come to the step
        raise error
    return replace(_compared(data, error, again, trainer), path=str(place))


def _capsule_at(path: Any) -> Place:
    """The newest capsule at ``path``, or itself. Raises for a path that cannot be a capsule, and a run without one."""
    if not isinstance(path, (str, Path, Remote)):
        raise SettingError(
            f"the first argument of replay is {describe(path)}; expected the folder of a crash capsule, as in "
            "lw.replay('runs/digits/20260101-120000-abc123/capsules/step-00000003-ValueError', task)"
        )
    place = as_place(path)
    if not isinstance(place, Path) or (place / "manifest.json").is_file():
        return place
    kept = [file for depth in ("*", "capsules/*", "*/capsules/*") for file in place.glob(f"{depth}/manifest.json")]
    found = [file.parent for file in kept if file.parent.parent.name == "capsules"]
    if found:
        return max(found, key=lambda capsule: (capsule / "manifest.json").stat().st_mtime)
    if (place / "run.json").is_file() or newest_in(place) is not None:
        raise CheckpointError(f"{path} has no crash capsule: none of its steps has failed")
    told = "is no crash capsule, and no run that has one" if place.exists() else "does not exist"
    raise CheckpointError(f"{path} {told}. A step that fails writes one: the note under its error says where")


def _compared(data: Contents, error: Exception | None, again: _Again, trainer: Trainer) -> Replay:
    saved, said = data.state["values"], data.info["error"]
    now: Mapping[str, Any] = again.run.open_step[1] if again.run is not None else {}
    limits = list(data.info["limits"])
    here = snapshot.conditions(again.run) if again.run is not None else {}
    limits += [f"{k} was {v!r}, and is {here.get(k)!r}" for k, v in data.info["conditions"].items() if here.get(k) != v]
    absent = [name for name in data.state["callbacks"] if name not in {type(c).__qualname__ for c in trainer.callbacks}]
    if absent:
        limits.append(f"callbacks of the run that are not here: {', '.join(absent)}")
    same_values = None
    if saved:
        same_values = saved.keys() == now.keys() and all(_same(v, now[k]) for k, v in saved.items())
    signalled = said["type"] == "SIGTERM"
    silent = "it came to this step, which had no error" if signalled else "the step was skipped"
    same_error = error is not None and type(error).__name__ == said["type"] and said["message"] in (None, str(error))
    if signalled:
        same_error, error = isinstance(error, _AsFar), None if isinstance(error, _AsFar) else error
    return Replay(
        error, f"{said['type']}: {said['message'] if said['message'] is not None else silent}", same_error, same_values,
        {k: float(v) for k, v in now.items()}, {k: float(v) for k, v in saved.items()}, limits,
    )  # fmt: skip


def _same(a: Any, b: Any) -> bool:
    """The same bits; NaN too."""
    a, b = (torch.as_tensor(v).detach().cpu().reshape(1) for v in (a, b))
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class _AsFar(Exception):  # noqa: N818 - it is no failure
    """A step to which a signal came has been made again as far as it was then."""


class _Again(Callback):
    """Puts a run where the capsule stands."""

    def __init__(self, data: Contents, task: Any) -> None:
        self.data = data
        self.source = _Window(data.state)
        self.run: Run | None = None

    def on_fit_start(self, run: Run) -> None:
        run.settings["key"] = self.data.state.get("key", run.settings["key"])  # of what callbacks draw
        run.restore = lambda: self._restore(run)
        if self.data.state.get("phase"):  # it was kept as far as the gradients of this phase
            run.hooks.on_grads_ready = (self._as_far, *run.hooks.on_grads_ready)

    def _restore(self, run: Run) -> None:
        state = self.data.state
        if self.data.files:
            snapshot.restore_models(run, self.data)
        snapshot.restore_attributes(run, state)
        for name, saved in (state["optimizers"] or {}).items():
            if name not in run.optimizers:
                raise CheckpointError(f"{self.data.path} has an optimizer {name!r}, which the task does not have")
            run.optimizers[name].load_state_dict(saved)
        for name, model in run.models.items():
            flags = state["flags"].get(name, {})
            for path, module in model.named_modules():
                module.training = flags.get(path, module.training)
        run.progress = run.stage_start = Progress(**{**state["progress"], "stage": 0})
        run.skips_in_row = state["skips_in_row"]
        precision: Any = run.precision
        if has_state(precision):
            precision.load_state_dict(state.get("precision", {}))
        (stage,) = run.stages
        if state["planned"]:
            weights = cycle(state["planned"])
            stage.weight, stage.counts_samples = (lambda batch: next(weights)), True
        self.run = run

    def _as_far(self, run: Run, phase: Phase, grad_norm: Any) -> None:
        if phase.name == self.data.state["phase"]:
            raise _AsFar


class _Window:
    """The batches of a capsule as a source: each comes with the random state in which it was used."""

    exact: tuple[str, ...] = ()
    batches = None

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.window, self.planned = state["window"], state["planned"]
        self.before = state.get("rng", {})  # capsules had those of Python and NumPy once, as they were at the end

    def sizes(self, batch: int) -> Iterator[float] | None:
        return iter(self.planned or [1.0] * len(self.window))

    def at(self, epoch: int, batch: int) -> Iterator[Any]:
        for one in self.window:
            states = {**self.before, **one["rng"]}
            rng.set({name: states[name] for name in rng.READ})
            if "cuda" in states and torch.cuda.is_available():
                torch.cuda.set_rng_state(states["cuda"])
            yield one["batch"]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def replay_command(path: str | Path, spec: str) -> int:
    """``loopwright replay PATH --task module:function``: print what came of it; 0 if the error came again.

    ``function`` is the caller's own, takes nothing and returns the task. ``module`` is looked for in the working
    directory as well.
    """
    name, _, function = spec.partition(":")
    if not name or not function:
        raise SettingError(f"--task {spec!r} does not say where the task is made; write --task module:function")
    _capsule_at(path)  # a wrong path is told before anything is imported
    sys.path.insert(0, str(Path.cwd()))
    try:
        make = getattr(importlib.import_module(name), function)
    except (ImportError, AttributeError) as error:
        raise SettingError(f"--task {spec!r} cannot be imported from {Path.cwd()}: {error}") from error
    finally:
        sys.path.pop(0)
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise SettingError(f"--task {spec!r}: {error}; expected a function that is called with nothing") from error
    except ValueError:  # what is built in tells no signature
        pass
    found = replay(path, make())
    print(found)
    if found.error is not None:
        print(f"\ntraceback of the error {'that was reproduced' if found.same_error else 'that came now'}:\n")
        traceback.print_exception(found.error, file=sys.stdout)
    return 0 if found.same_error and found.same_values is not False else 1
