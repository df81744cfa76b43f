"""Everything that a run needs to go on exactly where it stands: taken from a Run, and put back into one."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loopwright import __version__, rng
from loopwright._compat import has_stepped
from loopwright.checkpoint.attributes import Attributes
from loopwright.checkpoint.encode import check as check_value
from loopwright.checkpoint.fit import misfits, problems_of
from loopwright.checkpoint.objects import given_state, kind_of, listed, matched, put_back, state_of
from loopwright.checkpoint.stage_state import load_resting, load_stage, resting_states, stage_state
from loopwright.checkpoint.store import Contents
from loopwright.conflicts import changed_by
from loopwright.data import fingerprint
from loopwright.data.generators import streams_of
from loopwright.data.plan import seed_from
from loopwright.data.trained_on import TrainedOn
from loopwright.delivery import logger_states, restore_logger
from loopwright.errors import CheckpointError, choose
from loopwright.events import Callback, describe
from loopwright.parallel import like, readers
from loopwright.progress import Progress
from loopwright.resolved import resolved
from loopwright.state import Run, has_state
from loopwright.written import is_ours, placed, where

__all__ = [
    "attributes", "check", "check_fit", "conditions", "info", "note_attributes", "own", "progress", "remembering",
    "restore", "restore_attributes", "restore_loggers", "restore_models", "shared_out", "take", "unsaveable",
]  # fmt: skip

_COUNTERS = ("skipped", "skips_in_row", "validated_at", "stage_ended_at")
_WATCHERS = ("handlers", "savers")  # may differ after a resume: they change nothing in training


def take(run: Run, ranks: Sequence[Mapping[str, Any]] = ()) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors of the models by group, and all other state, of a run that stands between two optimizer steps.

    The tensors are those of the run, not copies: hand them to ``store.write`` before training goes on. ``ranks``: what
    the others gave as their ``own``.
    Raises CheckpointError for an object in ``run.state`` that has no state to give.
    """
    files, extras = _models(run)
    at = min(run.progress.stage, len(run.stages) - 1)  # after the last stage: what it ended with
    return files, {
        "progress": _plain(run.progress),
        "stage_start": _plain(run.stage_start),
        "counters": {name: getattr(run, name) for name in _COUNTERS},
        "stop_reason": None if run.interrupted else run.stop_reason,
        "replaced": list(run.replaced),
        "ended": run.ended,
        "data": _data(run),
        "recipe": resolved(run),
        "code": run.code,
        "conditions": conditions(run),
        "models": extras,
        "attributes": attributes(run),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in run.optimizers.items()},
        "optimizer_kinds": {name: kind_of(optimizer) for name, optimizer in run.optimizers.items()},
        "precision": state_of(run.precision),
        "stage": {"index": at, **stage_state(run, run.stages[at])} if run.stages else {},
        "schedulers": resting_states(run, at),
        **{name: listed(getattr(run, name)) for name in ("callbacks", *_WATCHERS)},
        "loggers": [{"kind": kind_of(logger), "state": kept} for logger, kept in logger_states(run)],
        "user": {name: given_state(name, obj) for name, obj in _user(run)},
        "tensors": _bare(run),
        "series": run.series.state_dict(),  # before the history, which receives what waits in it
        "history": run.history.state_dict(),
        "metrics": dict(run.metrics),
        "latest": dict(run.latest),
        "rng": _random(run),
        "ranks": list(ranks),
    }


def own(run: Run) -> dict[str, Any]:
    """What of the state differs from rank to rank."""
    at = min(run.progress.stage, len(run.stages) - 1)
    return {
        "stage": stage_state(run, run.stages[at]),
        "series": run.series.state_dict(),
        "rng": _random(run),
        "attributes": attributes(run),
        "speaks": run.comm.rank in readers(run).speakers,
    }


def attributes(run: Run) -> dict[str, Any]:
    """What training has changed of the plain attributes of modules."""
    return {} if run.attributes is None else run.attributes.changed()


def _random(run: Run) -> dict[str, Any]:
    """The global generators, and those that hang on modules, by their path."""
    return {**rng.get(), "modules": streams_of({**run.models, "task": run.task}).get_found()}


def _set_random(run: Run, state: Mapping[str, Any]) -> None:
    rng.set(state)
    streams_of({**run.models, "task": run.task}).set_found(state.get("modules", {}))


def check(run: Run) -> None:
    """Raise CheckpointError naming what in ``run`` cannot be saved; for the start of ``fit``."""
    shards = shared_out(run)
    for name in ("callbacks", *_WATCHERS):
        for obj in getattr(run, name):
            _check_state(obj, shards=shards)
    files, state = take(run)
    check_value([files, state], shards=shards)


def unsaveable(run: Run) -> dict[str, str | None]:
    """Everything in ``run`` that a checkpoint could not hold, for a plan: each with its path and what to do.

    The values are the lines at which it is written, where that is known.
    """
    held = (obj for name in ("callbacks", *_WATCHERS) for obj in getattr(run, name))
    parts: list[Callable[..., None]] = [partial(_check_state, obj) for obj in held]
    parts += [partial(_check_given, name, obj) for name, obj in _user(run)]
    found: dict[str, str | None] = {}
    for part in parts:
        try:
            part(shards=shared_out(run))
        except CheckpointError as error:
            found[str(error)] = error.place
    if not found:  # all the rest at once
        try:
            check(run)
        except CheckpointError as error:
            found[str(error)] = error.place
    return found


def _check_state(obj: Any, *, shards: bool) -> None:
    if has_state(obj):
        with placed(f"{kind_of(obj)}.state_dict", where(obj.state_dict)):
            check_value(obj.state_dict(), f"{kind_of(obj)}.state_dict()", shards=shards)


def _check_given(name: str, obj: Any, *, shards: bool) -> None:
    check_value(given_state(name, obj), f"state[{name!r}]", shards=shards)


def shared_out(run: Run) -> bool:
    """True if parameters are shared out over ranks, so that all of them write a checkpoint together."""
    return run.team is not None and bool(run.team.shards)


def info(run: Run) -> dict[str, Any]:
    """What the manifest of a checkpoint says about the run: where it stands, its metrics, versions, exactness."""
    p = run.progress
    return {
        "step": p.step, "epoch": p.epoch, "batch": p.batch, "samples": p.samples, "seconds": p.seconds,
        "stage": run.stage.name if run.stage is not None else None,
        "metrics": dict(run.metrics),
        "exact": run.exact,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
            "loopwright": __version__,
        },
    }  # fmt: skip


def progress(data: Contents, name: str = "progress") -> Progress:
    """Where the run of a checkpoint stood; with ``"stage_start"``, where its stage began."""
    return Progress(**data.state[name])


def _data(run: Run) -> dict[str, Any]:
    """Which data it is, to be compared when the run goes on."""
    if run.fingerprint is None and run.data is not None:
        run.fingerprint = fingerprint(run.data)
    return {"fingerprint": run.fingerprint, **TrainedOn.of(run).as_dict()}


def conditions(run: Run) -> dict[str, Any]:
    """What else the bits depend on: the version of torch, and the hardware that computes."""
    cpu = {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}
    version = ".".join(str(torch.__version__).split(".")[:2])
    world, parts = run.comm.world_size, readers(run).world_size
    told = world if parts == world else f"{world}, for {parts} parts of the data"
    ranks = {"ranks": told, "parameters shared out": shared_out(run)}
    if run.device.type == "cpu":
        return {"torch": version, "device": "cpu", **cpu, **ranks}
    names = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type
    return {"torch": version, "device": names, **ranks}


def restore(run: Run, data: Contents) -> None:
    """Put a checkpoint into ``run``, whose stages, models and optimizers are ready and may hold anything.

    Everything is compared first, so that a checkpoint that does not fit changes nothing. Optimizers may go on
    with the very tensors of ``data``: read it again to restore it again. The random generators are set last.
    Loggers are not touched, since they cut their files when they start: ``restore_loggers`` is called before.
    Raises CheckpointError that lists what is missing, unexpected or has another shape.
    """
    state = data.state
    check_fit(run, data)
    try:
        _load_models(run, data)
        for name, optimizer in run.optimizers.items():
            saved = state["optimizers"][name]
            optimizer.load_state_dict(_held(optimizer, saved) if shared_out(run) else saved)
            if state["progress"]["step"]:
                has_stepped(optimizer)
        _load_parts(run, state)
        restore_attributes(run, state)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{data.path} does not fit this run ({type(error).__name__}: {error}). Part of it has been loaded: make "
            "the model and the optimizers anew before you use them"
        ) from error
    _set_random(run, state["rng"])
    others = state.get("ranks", [])
    speaking = [0, *(rank for rank, other in enumerate(others, 1) if other.get("speaks", True))]
    if len(others) + 1 == run.comm.world_size and speaking == list(readers(run).speakers):
        if run.comm.rank:
            _restore_own(run, others[run.comm.rank - 1], state["stage"].get("index", 0))
    else:
        _spread(run, [other for rank, other in enumerate(others, 1) if rank in speaking])


def _restore_own(run: Run, mine: Mapping[str, Any], index: int) -> None:
    if index < len(run.stages):
        load_stage(run, run.stages[index], mine["stage"])
    run.series.load_state_dict(mine["series"])
    restore_attributes(run, mine)
    _set_random(run, mine["rng"])


def _spread(run: Run, others: Sequence[Mapping[str, Any]]) -> None:
    """Other ranks than in the saved run: rank 0 takes over what all have measured, the others draw anew."""
    if part := readers(run).rank:
        rng.seed(seed_from(run.settings["key"], "rank", part, run.progress.step))
    if run.comm.rank:
        run.series.load_state_dict({"record": {}, "epoch": {}})
        for phase in run.stages[min(run.progress.stage, len(run.stages) - 1)].phases:
            if phase.meters is not None:
                phase.meters.reset()
        return
    for other in others:
        run.series.include(other["series"])
        stage = run.stages[min(run.progress.stage, len(run.stages) - 1)]
        for phase in stage.phases:
            measured = other["stage"]["phases"].get(phase.name, {}).get("meters", {})
            if phase.meters is not None and measured:
                phase.meters.join([{name: one["state"] for name, one in measured.items()}])


def check_fit(run: Run, data: Contents) -> None:
    """Raise CheckpointError that lists what is missing, unexpected or has another shape in a checkpoint for ``run``."""
    state = data.state
    problems = misfits(run_groups(run), data.files)
    problems += problems_of(run.optimizers, state["optimizers"], state["optimizer_kinds"])
    _refuse(data, problems + _lost(run, state))


def restore_loggers(run: Run, data: Contents) -> None:
    """Tell the loggers of ``run`` how far their records went; for the moment before they start."""
    for logger, saved in matched(run.loggers, data.state["loggers"]):
        restore_logger(run, logger, saved)


def check_models(run: Run, data: Contents) -> None:
    """Raise CheckpointError that lists what is missing, unexpected or has another shape in the models alone."""
    _refuse(data, misfits(run_groups(run), data.files))


def restore_models(run: Run, data: Contents) -> None:
    """Put only the weights and buffers of a checkpoint into the models of ``run``, if all of them fit.

    Raises CheckpointError as ``check_models`` does.
    """
    check_models(run, data)
    _load_models(run, data)


def run_groups(run: Run) -> dict[str, dict[str, Any]]:
    """The state_dict of each model by its group in a checkpoint: ``model``, or ``model.<name>`` for several."""
    if len(run.models) == 1:
        return {"model": next(iter(run.models.values())).state_dict()}
    return {f"model.{name}": model.state_dict() for name, model in run.models.items()}


def remembering(run: Run, data: Contents) -> list[Any]:
    """The callbacks of ``run`` for which a checkpoint holds what they remember."""
    return [callback for callback, _ in matched(run.callbacks, data.state["callbacks"])]


def note_attributes(run: Run) -> None:
    """Look at the plain attributes of the task, its models, and the callbacks that change training without saying how.

    They are looked at once, before the first step. What of the run is in checkpoints by itself is left out.
    """
    if run.attributes is None:
        silent = [
            one
            for one in run.callbacks
            if getattr(type(one), "state_dict", Callback.state_dict) is Callback.state_dict and not is_ours(type(one))
        ]
        changing = [one for one in silent if changed_by(one)]
        kinds = [kind_of(one) for one in changing]
        named = {f"{kinds[i]} {kinds[:i].count(kinds[i])}": one for i, one in enumerate(changing)}
        by_itself = (run.data, *run.state.values(), *run.optimizers.values(), *run.loggers, *run.savers)
        run.attributes = Attributes({**run.models, "task": run.task, **named}, by_itself, run.models.values())


def restore_attributes(run: Run, state: Mapping[str, Any]) -> None:
    """Put back what training had changed of the plain attributes of modules."""
    note_attributes(run)
    run.attributes.load(state.get("attributes", {}), run.device)  # older checkpoints have none


def _models(run: Run) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Any]]]:
    """Plain tensors of each model for its own file; what else is in a state_dict (extra state) by itself."""
    files: dict[str, dict[str, Tensor]] = {}
    extras: dict[str, dict[str, Any]] = {}
    for group, values in run_groups(run).items():
        files[group] = {}
        for key, value in values.items():
            if isinstance(value, Tensor) and value.layout == torch.strided:
                files[group][key] = value
            else:
                extras.setdefault(group, {})[key] = value
    return files, extras


def _load_models(run: Run, data: Contents) -> None:
    for (group, own), model in zip(run_groups(run).items(), run.models.values(), strict=True):
        # into the model's own dict, which carries the versions of its modules
        own.update({key: like(own.get(key), value) for key, value in data.files[group].items()})
        own.update(data.state["models"].get(group, {}))
        model.load_state_dict(own)


def _held(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer, as it is to be held of each parameter: cut where that is, whole where it is not."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    own = dict(zip(numbers, parameters, strict=True))
    state = {
        number: {key: like(own[number], value) for key, value in kept.items()} if number in own else kept
        for number, kept in saved["state"].items()
    }
    return {**saved, "state": state}


def _alike(own: Any, saved: Any) -> Any:
    """What an object remembers, held as it has it now under the same keys: averages of parameters cut as these are."""
    if isinstance(own, dict) and isinstance(saved, dict):
        return {key: _alike(own.get(key), value) for key, value in saved.items()}
    return like(own, saved)


def _load_parts(run: Run, state: Mapping[str, Any]) -> None:
    run.progress, run.stage_start = Progress(**state["progress"]), Progress(**state["stage_start"])
    for name in _COUNTERS:
        setattr(run, name, state["counters"].get(name))
    run.replaced[:] = state["replaced"]
    precision: Any = run.precision
    if has_state(precision):  # the scale of the gradients
        precision.load_state_dict(state["precision"])
    if state["stage"] and state["stage"]["index"] < len(run.stages):
        load_stage(run, run.stages[state["stage"]["index"]], state["stage"])
    load_resting(run, state)
    for name in ("callbacks", "handlers", "savers"):
        for obj, saved in matched(getattr(run, name), state[name]):
            obj.load_state_dict(_alike(obj.state_dict(), saved) if shared_out(run) else saved)
    for name, tensors in _bare(run).items():
        for tensor, saved in zip(tensors, state.get("tensors", {}).get(name, tensors), strict=True):
            put_back(tensor, saved)
    for name, obj in _user(run):
        put_back(obj, state["user"][name])
    run.history.load_state_dict(state["history"])
    run.series.load_state_dict(state["series"])
    for values, name in ((run.metrics, "metrics"), (run.latest, "latest")):
        values.clear()
        values.update(state.get(name, {}))


def _lost(run: Run, state: Mapping[str, Any]) -> list[str]:
    """What the checkpoint holds, or the run needs, that the other does not have."""
    problems = []
    if (at := state["stage"].get("index", 0)) < len(run.stages):
        stage, saved = run.stages[at], state["stage"].get("phases", {})
        for phase in stage.phases or ():
            found = len(saved[phase.name]["schedulers"]) if phase.name in saved else None
            mine = len(phase.step_schedulers) + len(phase.epoch_schedulers)
            if found is None:
                problems.append(
                    f"the checkpoint has no phase {phase.name!r} in stage {stage.name!r}. {choose(phase.name, saved)}"
                )
            elif found != mine:
                problems.append(f"phase {phase.name!r} has {mine} schedulers, the checkpoint {found}")
    own = {name for name, _ in _user(run)}
    problems += [
        f"the checkpoint has no state {name!r}. {choose(name, state['user'])}"
        for name in sorted(own - state["user"].keys())
    ]
    problems += [f"this run has no state {name!r}. {choose(name, own)}" for name in sorted(state["user"].keys() - own)]
    for name, obj in _user(run):
        if isinstance(obj, Tensor) and name in state["user"]:
            problems += _other_shapes(f"state[{name!r}] is", [obj], [state["user"][name]])
    for name, tensors in _bare(run).items():
        saved = state.get("tensors", {}).get(name, [])
        if "tensors" in state or not own:  # an older checkpoint may have them among the user's own
            problems += _other_shapes(f"the optimizer {name!r} moves, besides parameters of modules,", tensors, saved)
    return problems


def _other_shapes(what: str, own: list[Tensor], saved: list[Any]) -> list[str]:
    found, expected = (
        ", ".join(describe(t.cpu() if isinstance(t, Tensor) else t) for t in tensors) or "nothing"
        for tensors in (saved, own)
    )
    return [] if found == expected else [f"{what} {expected}, and the checkpoint has {found}"]


def _refuse(data: Contents, problems: list[str]) -> None:
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise CheckpointError(
            f"{data.path} does not fit this run, and nothing was loaded:{listed}\nBuild the run as it was when the "
            "checkpoint was written. To start anew with the weights that fit: model.load_state_dict("
            f"loopwright.checkpoint.read({str(data.path)!r}).files['model'], strict=False)"
        )


def _user(run: Run) -> list[tuple[str, Any]]:
    """The user's own objects, less those that are saved as models and optimizers."""
    known = {id(o) for o in (*run.models.values(), *run.optimizers.values())}
    return [(name, obj) for name, obj in run.state.items() if id(obj) not in known]


def _bare(run: Run) -> dict[str, list[Tensor]]:
    """By optimizer, what those of a function step move that is no parameter of a module and not given by a name."""
    known = {id(p) for model in run.models.values() for p in model.parameters()} | set(map(id, run.state.values()))
    found: dict[str, list[Tensor]] = {}
    for name, optimizer in run.optimizers.items() if not isinstance(run.task, nn.Module) else ():
        moved = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known]
        known |= set(map(id, moved))
        if moved:
            found[name] = moved
    return found


def _plain(progress: Progress) -> dict[str, Any]:
    return {**progress._asdict(), "phase_steps": dict(progress.phase_steps)}
