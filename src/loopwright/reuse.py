"""Stages that were finished before are not trained again with ``reuse=True`` if nothing that decides them changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from loopwright import rng
from loopwright._compat import hooks_on
from loopwright.checkpoint import Contents as Saved
from loopwright.checkpoint import list_checkpoints, read, snapshot, write
from loopwright.compared import decisive
from loopwright.conflicts import has_a_say
from loopwright.contents import Contents
from loopwright.data import fingerprint
from loopwright.data.fingerprint import innermost
from loopwright.data.generators import streams_of
from loopwright.data.held import streams_of as streams_of_data
from loopwright.errors import CheckpointError, SettingError
from loopwright.events import Callback
from loopwright.optim import settings_of
from loopwright.provenance import is_own
from loopwright.resolved import resolved
from loopwright.resume import Point
from loopwright.state import Phase, Run, Stage
from loopwright.written import is_ours, warn

__all__ = ["Kept", "keep_stages"]

_APART = ("callbacks", "metrics", "optimizers", "stages")  # of the settings: told by stage, or as objects
_ELSEWHERE = ("source", "valid", "optimizer", "callbacks", "until", "validate_every")  # of a stage: as they came out


class Kept(Callback):
    """The ends of stages in ``root/<name>/stages``, each under a digest of all that decides what it comes to."""

    def __init__(self, root: Path, digests: Mapping[str, str]) -> None:
        self.root, self.digests = root, digests
        self._begun_at: Any = None

    def find(self, run: Run) -> Point | None:
        """Where ``run`` can begin: at the end of the last stage that was finished before in the very same way."""
        for index in reversed(range(len(run.stages))):
            stage = run.stages[index]
            place = self._place(stage)
            found = [] if place is None else list_checkpoints(place)
            if not found:
                continue
            try:
                data = _fitting(run, index, read(found[-1]))
            except CheckpointError as error:
                warn(f"stage {stage.name!r} is trained again: {error}")
                continue
            self._begun_at = place
            run.reused = [one.name for one in run.stages[: index + 1]]
            return Point(data, "approximate", None, auto=False)
        return None

    def on_stage_end(self, run: Run, stage: Stage) -> None:
        place = self._place(stage)
        if place is None or place == self._begun_at or run.stage is None:
            return
        files, state = snapshot.take(run)
        later = {id(c) for other in run.stages[run.progress.stage + 1 :] for c in other.callbacks}
        mine = [entry for c, entry in zip(run.callbacks, state["callbacks"], strict=True) if id(c) not in later]
        state |= {"callbacks": mine, "loggers": [], "savers": []}
        write(place / f"step-{run.progress.step:08d}", files, state, snapshot.info(run))

    def _place(self, stage: Stage) -> Path | None:
        return self.root / self.digests[stage.name] if stage.reuse else None


def keep_stages(run: Run, stages: Sequence[Stage] | None, root: str | Path | None, label: str) -> Kept | None:
    """What keeps the ends of those ``stages`` that ask for it; None where none does.

    ``stages``: as they were given to ``fit``. To be called where the models are as training will find them. Raises
    SettingError where nothing can be kept.
    """
    asking = [stage for stage in run.stages if stage.reuse]
    if not asking:
        return None
    if root is None:
        raise SettingError(
            f"Stage({asking[0].name!r}, reuse=...) needs a folder to keep its end in; leave folder=None out"
        )
    if run.team is not None:
        raise SettingError(f"Stage({asking[0].name!r}, reuse=...) works in one process only; leave it out")
    kept = Kept(Path(root, label, "stages"), dict(_digests(run, stages or ())))
    run.callbacks.insert(0, kept)
    run.hooks.on_stage_end = (kept.on_stage_end, *run.hooks.on_stage_end)  # before others change what they find
    return kept


def _fitting(run: Run, index: int, data: Saved) -> Saved:
    """``data`` with what belongs to later stages as this run has it: they may have been changed."""
    moved = {id(o) for stage in run.stages[: index + 1] for phase in stage.phases for o in phase.moved}
    state = dict(data.state)
    for name, one in (("optimizers", Optimizer.state_dict), ("optimizer_kinds", lambda o: type(o).__qualname__)):
        state[name] = {n: state[name][n] if id(o) in moved else one(o) for n, o in run.optimizers.items()}
    begun = {stage.name for stage in run.stages[: index + 1]}
    state["schedulers"] = {name: kept for name, kept in state.get("schedulers", {}).items() if name in begun}
    found = Saved(data.path, data.info, state, data.files)
    snapshot.check_fit(run, found)
    return found


# --------------------------------------------------------------------------------------------- what decides a stage


def _digests(run: Run, given: Sequence[Stage]) -> Iterator[tuple[str, str]]:
    """By name of a stage, a digest of it, of all stages before it, and of what they begin with.

    What decides is what a resume holds against the settings of a checkpoint, with what objects hold besides: private
    attributes, settings deep inside, what functions read, where generators stand. What only measures or watches is in
    it where something may go by it.
    """
    settings = resolved(run)
    told, digest = Contents(), hashlib.sha256()

    def add(*parts: Any) -> None:
        for part in parts:
            for one in told.of(part):
                digest.update(one)

    names = {id(p): f"{name}.{path}" for name, model in run.models.items() for path, p in model.named_parameters()}
    for parameter in (one for model in run.models.values() for one in model.parameters()):
        told.leave(parameter, names[id(parameter)])  # the state_dict tells what is in it
    told.leave(getattr(run.task, "metrics", None), "metrics")
    staged = {id(c) for stage in run.stages for c in stage.callbacks}
    callbacks = [c for c in run.callbacks if id(c) not in staged and has_a_say(c)]
    handlers = [h for h in run.handlers if has_a_say(h.fn)]
    models, whole = run.models.values(), {k: v for k, v in settings.items() if k not in _APART}
    seed = run.settings.get("seed")
    add(
        snapshot.conditions(run), [seed, rng.get() if seed is None else None, run.settings.get("key")],
        list(decisive(whole)), [model.state_dict() for model in models],
        [[[p.requires_grad, *hooks_on(p)] for p in model.parameters()] for model in models],
        streams_of({**run.models, "task": run.task}).get_found(),
        list(models), run.task, callbacks, [[str(h.event), h.fn, h.args, h.kwargs] for h in handlers],
    )  # fmt: skip
    measured = bool(handlers) or any(map(_looks, callbacks))
    for stage, raw in zip(run.stages, given, strict=True):
        for data in map(innermost, (stage.source, *stage.valid.values())):
            if not is_own(type(data).__module__):  # its fingerprint tells
                told.leave(data, type(data).__qualname__)
        mine = [c for c in stage.callbacks if has_a_say(c)]
        measured = measured or any(map(_looks, mine)) or any(map(_goes_by_measures, stage.phases))
        measured = measured or callable(stage.accumulate) or stage.loop is not None
        said = {f.name: getattr(raw, f.name) for f in fields(raw) if f.init and f.name not in _ELSEWHERE}
        now = {**settings["stages"][stage.name], "callbacks": ()}
        also = {"metrics": settings["metrics"]} if measured else {}
        deciding = decisive({"stages": {stage.name: now}, **also}, measured=measured)
        add(
            said, stage.name, stage.ends, mine, list(deciding),
            _of_data(run.data if raw.source is None else raw.source), stage.weight, stage.accumulate,
            [[p.name, p.every, p.clip_norm, p.step] for p in stage.phases], _held_by(stage.source),
        )  # fmt: skip
        for optimizer in {id(o): o for phase in stage.phases for o in phase.moved}.values():
            add(type(optimizer), [_group(one, names) for one in optimizer.param_groups])
            add(optimizer.state_dict()["state"], hooks_on(optimizer))
        for scheduler in (s for phase in stage.phases for s in (*phase.step_schedulers, *phase.epoch_schedulers)):
            add(settings_of(scheduler, stage.valid), scheduler.state_dict())
        add([s.schedules for s in stage.scheduled])
        if measured:
            valid = list(stage.valid.values()) if raw.valid is None else [raw.valid]
            add(str(stage.validate_every), [_of_data(one) for one in valid], run.task.configure_metrics(),
                [_held_by(one) for one in stage.valid.values()])  # fmt: skip
        yield stage.name, digest.hexdigest()[:16]


def _group(group: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    """What an optimizer does with a group, and with which parameters.

    A schedule, also one of a later stage, notes with what the group came; that is told where it is something else.
    """
    told = {k: v for k, v in group.items() if not (k.startswith("initial_") and v == group.get(k[len("initial_") :]))}
    return {**told, "params": [names.get(id(p), tuple(p.shape)) for p in group["params"]]}


def _looks(callback: Any) -> bool:
    """True for a callback that may go by what is measured: of ours by what it monitors, of the user's by anything."""
    monitor = getattr(callback, "monitor", None)
    return not str(monitor).startswith("train/") if monitor is not None else not is_ours(type(callback))


def _goes_by_measures(phase: Phase) -> bool:
    return callable(phase.every) or any(s.plateau for s in phase.epoch_schedulers)


def _of_data(data: Any) -> Any:
    several = isinstance(data, dict) and not any(isinstance(v, (Tensor, np.ndarray)) for v in data.values())
    return {name: fingerprint(one) for name, one in data.items()} if several else fingerprint(data)


def _held_by(source: Any) -> Any:
    """What of the data a fingerprint does not tell: what the user's dataset holds, and how its samples are chosen."""
    loader = getattr(source, "loader", source)
    names = ("sampler", "batch_sampler", "collate_fn", "worker_init_fn", "collate", "transform")
    parts = [getattr(loader, name, None) for name in names]
    return [innermost(source), *parts, streams_of_data(source).get_found()]
