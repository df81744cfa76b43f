"""Every setting on which a run depends, in one place, as it came out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from loopwright.bodies import bodies
from loopwright.conflicts import changed_by
from loopwright.data import DataModule, fingerprint
from loopwright.data.fingerprint import innermost
from loopwright.described import Description, described, plain
from loopwright.optim import settings_of
from loopwright.parallel import World, find_world
from loopwright.provenance import is_own
from loopwright.state import Run, Stage
from loopwright.text import rule_name

__all__ = ["OF_TASK", "resolved"]

OF_TASK = frozenset({"module", "loss", "optimizer", "schedule", "metrics"})  # of Supervised, each told by itself

_MOST = 300  # layers that are listed


def resolved(run: Run) -> dict[str, Any]:
    """Every setting on which a run depends, as it came out: of the Trainer, the task, optimizers, stages and data.

    Objects are told by their class and by what they keep of the arguments that they were made with, and so are the
    objects among these. It is plain data, told once and kept as ``run.config``: to be called before the first step.
    ``run.code`` is then told as well: digests of the functions that train.
    """
    if not run.config:
        loss = getattr(run.task, "loss", None)
        given = {**Description().value("", run.settings), **_where(run)}
        told = {
            **given, "callbacks": _callbacks(run.settings.get("callbacks", ())),
            "handlers": [_handler(one) for one in run.handlers], "task": _task(run, loss),
            "loss": described(loss) if isinstance(loss, nn.Module) else Description().value("loss", loss),
            "metrics": {name: described(metric) for name, metric in (run.task.configure_metrics() or {}).items()},
            "models": {name: _model(model) for name, model in run.models.items()},
            "optimizers": {name: _told_before(run, name) or _optimizer(one) for name, one in run.optimizers.items()},
            "stages": {stage.name: _stage(stage, innermost(run.data)) for stage in run.stages},
            "torch": _torch(), **({"data_module": described(run.data)} if isinstance(run.data, DataModule) else {}),
        }  # fmt: skip
        run.code = bodies(_training(told) | {"modules": _own_modules(run)})
        looking = {name: told[name] for name in ("callbacks", "handlers", "metrics", "stages")}
        run.config = plain({**told, "reads": run.code["reads"] | bodies(looking)["reads"]})
    return run.config


def _training(told: Any) -> dict[str, Any]:
    """The part of the settings whose code decides what is trained."""
    task = {name: one for name, one in told["task"].items() if name not in OF_TASK}
    stages = {
        name: {key: one for key, one in stage.items() if key not in ("valid", "callbacks")}
        for name, stage in told["stages"].items()
    }
    callbacks = [[one for one in held["callbacks"] if "changes" in one] for held in (told, *told["stages"].values())]
    return {"loss": told["loss"], "task": task, "stages": stages, "callbacks": callbacks}


def _own_modules(run: Run) -> list[type]:
    """The classes of the user's among all modules of the models."""
    kinds = {type(module) for model in run.models.values() for module in model.modules()}
    return sorted((kind for kind in kinds if is_own(kind.__module__)), key=str)


def _where(run: Run) -> dict[str, Any]:
    """What "auto" and True have come to."""
    given = run.settings.get("strategy")
    made = given if run.team is None else run.team.strategy
    strategy = "single" if isinstance(made, str) else Description().value("strategy", made)
    world = World() if run.team is None else find_world()
    savers = [described(saver) for saver in run.savers]
    return {
        "device": str(run.device), "devices": world.local_world_size, "nodes": world.nodes, "strategy": strategy,
        "checkpoint": savers[0] if len(savers) == 1 else savers or False,
    }  # fmt: skip


def _torch() -> dict[str, Any]:
    """What torch is told for the whole process, and computes by."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was said by torch's newer switches, which this one does not tell
        precision = "set for each backend"
    return {
        "default_dtype": str(torch.get_default_dtype()), "float32_matmul_precision": precision,
        "cudnn_benchmark": torch.backends.cudnn.benchmark, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _callbacks(given: Any) -> list[dict[str, Any]]:
    """Callbacks, each with what of training it changes."""
    told = [(one, described(one)) for one in given]
    return [{**one, **({"changes": by} if (by := changed_by(callback)) else {})} for callback, one in told]


def _handler(handler: Any) -> dict[str, Any]:
    told = Description().value
    return {
        "function": told("function", handler.fn), "event": str(handler.event), "args": told("args", handler.args),
        "kwargs": told("kwargs", handler.kwargs),
    }  # fmt: skip


def _task(run: Run, loss: Any) -> dict[str, Any]:
    """The task by its arguments, what its class says, and, apart, the other plain values that it holds."""
    task = run.task
    schedulers = [s.torch for st in run.stages for ph in st.phases for s in (*ph.step_schedulers, *ph.epoch_schedulers)]
    told = Description(loss, *run.models.values(), *run.optimizers.values(), *schedulers)
    known = {"class": type(task), **told._arguments(task)}
    if isinstance(task, nn.Module):
        known |= {"truncate": getattr(task, "truncate", None), "recorded": getattr(task, "recorded", {})}
    others = {
        name: told.value(name, value) for name, value in vars(task).items()
        if isinstance(value, (bool, int, float, str)) and not name.startswith("_") and name not in known
        and name != "training"
    }  # fmt: skip
    return known | ({"attributes": others} if others else {})


def _model(model: nn.Module) -> dict[str, Any]:
    count = sum(p.numel() for p in model.parameters() if not is_lazy(p))
    leaves = [
        (path, module) for path, module in model.named_modules() if path and next(module.children(), None) is None
    ]
    layers = {path: repr(module) for path, module in leaves[:_MOST]}
    more = {} if len(leaves) <= _MOST else {"more_layers": len(leaves) - _MOST}
    told = Description(trained=model.buffers()).of(model)
    still = [path for path, module in model.named_modules() if model.training and not module.training]
    return {**told, "parameters": count, "layers": layers, **more, "in_eval_mode": still}


def _told_before(run: Run, name: str) -> Any:
    """What was told of the very same optimizer before an earlier fit of the task in this process has moved it."""
    before: Run | None = getattr(run.task, "_run", None)
    if before is None or before.optimizers.get(name) is not run.optimizers[name]:
        return None
    return before.config.get("optimizers", {}).get(name)


def _optimizer(one: Optimizer) -> dict[str, Any]:
    """What it was made with, and of each group what is its own; of what a schedule sets, where that began."""
    told = Description().value
    began = [{k: group.get(f"initial_{k}", v) for k, v in group.items() if k != "params"} for group in one.param_groups]
    groups = [
        {k: told(k, v) for k, v in group.items()
         if not k.startswith("initial_") and str(v) != str(one.defaults.get(k, one))} | {"tensors": len(own["params"])}
        for group, own in zip(began, one.param_groups, strict=True)
    ]  # fmt: skip
    defaults = {name: told(name, value) for name, value in one.defaults.items()}
    return {"class": type(one), **defaults} | ({"groups": groups} if len(groups) > 1 else groups[0])


def _stage(stage: Stage, known: Any) -> dict[str, Any]:
    """``known``: data of which the run tells elsewhere what it is."""
    told = Description().value
    valid = {name or "valid": _data(source, known) for name, source in stage.valid.items()}
    phases = {
        phase.name: {
            "step": told("step", phase.step), "every": rule_name(phase.every), "clip_norm": phase.clip_norm,
            "optimizers": told("optimizers", phase.optimizers),
            "schedules": [settings_of(s, stage.valid) for s in (*phase.step_schedulers, *phase.epoch_schedulers)]
            + [s.plain() for s in stage.scheduled if s.optimizer in phase.moved],
        } for phase in stage.phases
    }  # fmt: skip
    return {
        "until": stage.ends, "accumulate": rule_name(stage.accumulate), "train": stage.train,
        "weight": told("weight", stage.weight), "loop": told("loop", stage.loop),
        "freeze": stage.freeze, "loss": told("loss", stage.loss), "callbacks": _callbacks(stage.callbacks),
        "reuse": stage.reuse, "validate_every": str(stage.validate_every), "phases": phases,
        "data": _data(stage.source, known), "valid": valid,
    }  # fmt: skip


def _data(source: Any, known: Any) -> dict[str, Any]:
    """How batches are read, and from what, with its fingerprint unless that is ``known``.

    Of a source within a source, such as the first part of it, both.
    """
    inner = getattr(source, "source", getattr(source, "inner", None))
    if inner is not None:
        return {**Description(inner).of(source), "batches": source.batches, "source": _data(inner, known)}
    loader = getattr(source, "loader", source)  # the user's own
    data = getattr(loader, "dataset", getattr(loader, "data", None))
    told = Description(data).of(loader)
    how = {**{k: v for k, v in told.items() if k != "data"}, "batches": source.batches, "dataset": described(data)}
    return how if innermost(source) is known else {**how, "fingerprint": fingerprint(source)}
