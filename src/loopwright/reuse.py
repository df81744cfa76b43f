"""Stages that were finished before are not trained again with ``reuse=True`` if nothing that decides them changed."""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loopwright import rng
from loopwright.bodies import is_filled
from loopwright.callbacks import Capsule, ProgressBar
from loopwright.checkpoint import Contents, list_checkpoints, read, snapshot, write
from loopwright.data import fingerprint
from loopwright.errors import CheckpointError, SettingError
from loopwright.events import Callback
from loopwright.optim import settings_of
from loopwright.resume import Point
from loopwright.state import Run, Stage, has_state
from loopwright.written import warn

__all__ = ["Kept", "keep_stages"]

_DEPTH = 5  # how deep objects are looked into
_WATCHERS = (Capsule, ProgressBar)  # of which no bit of training depends
_OURS = ("torch", "loopwright", "numpy", "builtins", "functools")


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


def _fitting(run: Run, index: int, data: Contents) -> Contents:
    """``data`` with what belongs to later stages as this run has it: they may have been changed."""
    moved = {id(o) for stage in run.stages[: index + 1] for phase in stage.phases for o in phase.moved}
    state = dict(data.state)
    for name, one in (("optimizers", Optimizer.state_dict), ("optimizer_kinds", lambda o: type(o).__qualname__)):
        state[name] = {n: state[name][n] if id(o) in moved else one(o) for n, o in run.optimizers.items()}
    found = Contents(data.path, data.info, state, data.files)
    snapshot.check_fit(run, found)
    return found


# --------------------------------------------------------------------------------------------- what decides a stage


def _digests(run: Run, given: Sequence[Stage]) -> Iterator[tuple[str, str]]:
    """By name of a stage, a digest of it, of all stages before it, and of what they begin with."""
    seed = run.settings.get("seed")
    digest = hashlib.sha256()
    task = [run.task] if isinstance(run.task, nn.Module) else []
    staged = {id(c) for stage in run.stages for c in stage.callbacks}
    others = [c for c in run.callbacks if not isinstance(c, _WATCHERS) and id(c) not in staged]
    _add(digest, [
        snapshot.conditions(run), run.precision.name, run.compiler and run.compiler.name, run.nonfinite, run.skip_limit,
        [seed, rng.get() if seed is None else None, run.settings.get("key"), run.settings.get("deterministic")],
        [model.state_dict() for model in run.models.values()], task, others, [h.fn for h in run.handlers],
    ])  # fmt: skip
    for stage, raw in zip(run.stages, given, strict=True):
        named = {f.name: getattr(raw, f.name) for f in fields(raw) if f.init and f.name not in ("source", "valid")}
        data = [run.data if raw.source is None else raw.source]
        data += list(stage.valid.values()) if raw.valid is None else [raw.valid]
        schedules = [s for phase in stage.phases for s in (*phase.step_schedulers, *phase.epoch_schedulers)]
        moved = {id(o): o for phase in stage.phases for o in phase.moved}
        _add(digest, [
            named, stage.ends, stage.accumulate if isinstance(stage.accumulate, int) else str(stage.accumulate),
            str(stage.validate_every), [_of_data(one) for one in data],
            [[p.name, p.every, p.clip_norm, p.step] for p in stage.phases],
            [settings_of(s) for s in schedules], list(moved.values()),
        ])  # fmt: skip
        yield stage.name, digest.hexdigest()[:16]


def _of_data(data: Any) -> Any:
    several = isinstance(data, dict) and not any(isinstance(v, (Tensor, np.ndarray)) for v in data.values())
    return {name: fingerprint(one) for name, one in data.items()} if several else fingerprint(data)


def _add(digest: Any, value: Any) -> None:
    for part in _told(value, _DEPTH, set()):
        digest.update(part)


def _told(value: Any, depth: int, seen: set[int]) -> Iterator[bytes]:
    """``value`` as bytes that are the same in every process: settings, contents of tensors, the text of functions."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, Path)):
        yield f"{type(value).__name__}:{value!r};".encode()
    elif isinstance(value, (Tensor, np.ndarray)):
        tensor = torch.as_tensor(value).detach().cpu().contiguous()
        yield f"{tensor.dtype}{tuple(tensor.shape)};".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    elif id(value) in seen or depth == 0:
        yield f"<{type(value).__qualname__}>;".encode()
    else:
        for part in _parts(value, {*seen, id(value)}):
            yield from _told(part, depth - 1, {*seen, id(value)})


def _parts(value: Any, seen: set[int]) -> Iterator[Any]:
    """What an object is made of, as far as it decides what it does."""
    yield type(value).__qualname__
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield str(name)
            yield part
    elif isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(value, type):
        for one in value.__mro__:
            yield f"{one.__module__}.{one.__qualname__}"
            yield _text(one)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        yield from (value.__func__.__qualname__, type(value.__self__))
    elif isinstance(value, types.FunctionType):
        yield _text(value)
        yield from (value.__defaults__, [c.cell_contents for c in value.__closure__ or () if is_filled(c)])
    elif isinstance(value, Optimizer):
        settings = [{k: v for k, v in group.items() if k != "params"} for group in value.param_groups]
        yield from (type(value), settings, [[p.shape for p in g["params"]] for g in value.param_groups])
        yield value.state_dict()["state"]
    else:
        yield type(value)
        yield from value.modules() if isinstance(value, nn.Module) and len(seen) < 3 else ()
        remembered = value.state_dict() if has_state(value) and isinstance(value, Callback) else {}
        for name, part in sorted(getattr(value, "__dict__", {}).items()):
            if not name.startswith("_") and name not in remembered and not isinstance(part, (Optimizer, Run)):
                yield from (name, part)


def _text(code: Any) -> str:
    """The source of a class or function of the user's; its name where that is not there, as in a console."""
    if code.__module__.partition(".")[0] not in _OURS:
        try:
            return inspect.getsource(code)
        except (OSError, TypeError):
            pass
    return str(code.__qualname__)
