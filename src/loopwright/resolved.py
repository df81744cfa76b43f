"""Every setting on which a run depends, in one place, as it came out."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from loopwright.optim import settings_of
from loopwright.state import Run, Stage
from loopwright.text import rule_name

__all__ = ["described", "resolved"]

_MOST = 300  # layers that are listed
_LONG = 100  # entries of a list that are settings; more of them are data
_SECRET = re.compile(r"api_?key|secret|passw|credential|token$|^auth", re.IGNORECASE)


def resolved(run: Run) -> dict[str, Any]:
    """Every setting on which a run depends, as it came out: of the Trainer, the task, optimizers, stages and data.

    Objects are told by their class and by what they keep of the arguments that they were made with.
    """
    given = {name: _told(run.settings.get(name)) for name in ("callbacks", "loggers", "checkpoint", "progress")}
    loss = getattr(run.task, "loss", None)
    return {
        **run.settings, **given, "task": described(run.task),
        "loss": described(loss) if isinstance(loss, nn.Module) else loss,
        "metrics": {name: described(metric) for name, metric in (run.task.configure_metrics() or {}).items()},
        "models": {name: _model(model) for name, model in run.models.items()},
        "optimizers": {name: _optimizer(one) for name, one in run.optimizers.items()},
        "stages": {stage.name: _stage(stage) for stage in run.stages},
    }  # fmt: skip


def described(obj: Any) -> Any:
    """The class of an object, with what it keeps under the names of its constructor's arguments.

    Left out is what is data and no setting (more than 100 entries), and what looks like a secret.

    >>> described(nn.CrossEntropyLoss(label_smoothing=0.1))["label_smoothing"]
    0.1
    """
    kind: type = type(obj)
    names = _arguments(kind)
    kept = getattr(obj, "__dict__", None) or {name: getattr(obj, name) for name in names if hasattr(obj, name)}
    return {"class": kind, **{name: _bounded(name, kept[name]) for name in names if name in kept}}


@cache
def _arguments(kind: type) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(kind).parameters)
    except (TypeError, ValueError):  # a class that is not written in Python
        return ()


def _bounded(name: str, value: Any) -> Any:
    if _SECRET.search(name) or (isinstance(value, str) and re.search(r"://[^/]*@", value)):
        return "<not kept>"
    limit = 10 * _LONG if isinstance(value, str) else _LONG
    if isinstance(value, (list, tuple, set, frozenset, Mapping, str)) and len(value) > limit:
        return f"<{type(value).__name__} of {len(value)}>"
    if isinstance(value, Mapping):
        return {str(key): _bounded(str(key), item) for key, item in value.items()}
    return [_bounded(name, item) for item in value] if isinstance(value, (list, tuple)) else value


def _told(given: Any) -> Any:
    """A setting of the Trainer that may be an object or a list of them."""
    if given is None or isinstance(given, bool):
        return given
    return [described(one) for one in given] if isinstance(given, (list, tuple)) else described(given)


def _model(model: nn.Module) -> dict[str, Any]:
    count = sum(p.numel() for p in model.parameters() if not is_lazy(p))
    leaves = [
        (path, module) for path, module in model.named_modules() if path and next(module.children(), None) is None
    ]
    layers = {path: repr(module) for path, module in leaves[:_MOST]}
    more = {} if len(leaves) <= _MOST else {"more_layers": len(leaves) - _MOST}
    return {**described(model), "parameters": count, "layers": layers, **more}


def _optimizer(one: Optimizer) -> dict[str, Any]:
    """What it was made with, and of each group what is its own."""
    groups = [
        {k: v for k, v in group.items() if k != "params" and str(v) != str(one.defaults.get(k, group))}
        | {"tensors": len(group["params"])}
        for group in one.param_groups
    ]
    return {"class": type(one), **one.defaults} | ({"groups": groups} if len(groups) > 1 else groups[0])


def _stage(stage: Stage) -> dict[str, Any]:
    valid = {name or "valid": _data(source) for name, source in stage.valid.items()}
    phases = {
        phase.name: {
            "every": rule_name(phase.every), "clip_norm": phase.clip_norm,
            "schedules": [settings_of(s) for s in (*phase.step_schedulers, *phase.epoch_schedulers)]
            + [s.plain() for s in stage.scheduled if s.optimizer in phase.moved],
        } for phase in stage.phases
    }  # fmt: skip
    return {
        "until": stage.ends, "accumulate": rule_name(stage.accumulate), "train": stage.train,
        "freeze": stage.freeze, "loss": _told(stage.loss), "callbacks": _told(stage.callbacks),
        "reuse": stage.reuse, "validate_every": str(stage.validate_every.duration), "phases": phases,
        "data": _data(stage.source), "valid": valid,
    }  # fmt: skip


def _data(source: Any) -> dict[str, Any]:
    loader = getattr(source, "loader", source)  # the user's own
    data = getattr(loader, "dataset", getattr(loader, "data", None))
    made_with = (
        "batch_size", "shuffle", "drop_last", "seed", "sampler", "workers", "num_workers", "transform", "collate",
        "collate_fn",
    )  # fmt: skip
    settings = {name: getattr(loader, name) for name in made_with if hasattr(loader, name)}
    return {"class": type(loader), **settings, "batches": source.batches, "dataset": described(data)}
