"""Names that are watched: those that nothing will produce, and those watched the wrong way, found before step 0."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from loopwright.callbacks import ProgressBar
from loopwright.conflicts import stages_of
from loopwright.errors import choose
from loopwright.events import Callback
from loopwright.metrics import check_metrics, keys_of
from loopwright.metrics.algebra import inputs_of, leaves
from loopwright.monitor import better
from loopwright.optim import Scheduler
from loopwright.optim.schedulers import default_monitor
from loopwright.recorded import rule
from loopwright.records import learning_rates
from loopwright.returned import names_returned
from loopwright.state import Run, Stage
from loopwright.task import Supervised, Task
from loopwright.written import is_derived, is_name, is_ours, parsed

__all__ = ["output_names", "watched_in_vain", "watched_oddly", "watched_the_wrong_way"]

_WITH_VALUES = ("on_loader_end", "on_validation_end")  # hooks that are passed the values of a validation
_OF_RECORDS = ("epoch", "step", "samples", "seconds")
Found = Iterator[tuple[str, Any]]  # what is wrong, and who says so: a callback, a saver, the task


def watched_in_vain(run: Run) -> Found:
    """A monitored name that nothing produces; only what is certain is told."""
    names, kind_of_task = _Names(run), type(run.task).__name__
    for item, who, cause in _watching(run):
        monitor = item.monitor
        kind, _, name = monitor.partition("/")
        said = rule(run.recorded, name) if kind == "train" else None
        if said is not None and "epoch" not in said:
            yield (
                f"{who} monitors {monitor!r}, which {kind_of_task}.recorded keeps out of the records of epochs; write "
                f"recorded = {{{name!r}: 'step epoch', ...}}",
                run.task,
            )
        elif kind == "valid" and not names.is_validated(item):
            yield (
                f"{who} monitors {monitor!r}, but there is no validation; pass fit(..., valid=loader) or monitor "
                f"'train/{name}'",
                cause,
            )
        elif kind not in ("train", "valid", "lr"):
            known = [one for k in (("train", "valid") if names.has_valid else ("train",)) for one in names.known(k)]
            likely = f"{'valid' if names.has_valid else 'train'}/{monitor}"
            yield f"{who} monitors {monitor!r}, which is not logged. {choose(likely, known)}", cause
        elif kind == "lr" and not _is_a_rate(run, monitor):
            yield (
                f"{who} monitors {monitor!r}, which is no learning rate. {choose(monitor, learning_rates(run))}",
                cause,
            )
        elif kind != "lr" and not names.may_come(kind, name):
            yield f"{who} monitors {monitor!r}, which nothing produces. {choose(monitor, names.known(kind))}", cause


def output_names(run: Run) -> Iterator[frozenset[str] | None]:
    """What the step of each phase returns, as far as that is known: what is logged and what is not."""
    more = {"preds", "target"} if isinstance(run.task, Supervised) else frozenset[str]()
    for names in _Names(run).series["train"].values():
        yield None if names is None else names | more


def watched_the_wrong_way(run: Run) -> Found:
    """A loss that is to rise, and a plateau that waits for the wrong side: its ``mode`` is "min" unless said."""
    for item, monitor, who, cause in _against_its_name(run):
        if _is_the_loss(monitor) and _is_made_smaller(run):
            told = "make it with mode='min'" if hasattr(item, "torch") else "leave mode out"
            if item.monitor is None:
                told += ", or say what it is to monitor: lw.Scheduler(plateau, monitor='valid/accuracy')"
            yield (
                f"{who} monitors {monitor!r} with mode='max', and training makes the loss smaller: the worst "
                f"would be taken for the best; {told}",
                cause,
            )


def watched_oddly(run: Run) -> Found:
    """What may be meant: a value whose name tells the other way, one that a stage or a bar does not see."""
    yield from _shown_in_vain(run)
    yield from _watched_in_some_stages(run)
    yield from _first_of_several(run)
    for item, monitor, who, cause in _against_its_name(run):
        told = _is_the_loss(monitor) and (_is_made_smaller(run) or _rises(run))
        if not told and "score" not in monitor:  # of anything
            given = getattr(item, "torch", item)
            way = f"make it with mode={better(monitor)!r}" if given is not item else "leave mode out"
            yield (
                f"{who} monitors {monitor!r} with mode={given.mode!r}, and its name tells the other way; {way}, "
                "or give the value a name that does not tell",
                cause,
            )
    yield from _across_losses(run)


def _across_losses(run: Run) -> Found:
    """A loss by which one EarlyStopping, or one Checkpoint, compares stages that have other losses."""
    losses = {id(stage.loss): stage.name for stage in run.stages}
    for item, who, cause in _watching(run) if len(losses) > 1 else ():
        over_stages = hasattr(item, "restore") and not stages_of(run, item)  # of a stage: within that
        if over_stages and item.monitor.endswith("/loss"):
            own = "" if hasattr(item, "due") else f", or give each stage an {who} of its own"
            yield (
                f"{who} monitors {item.monitor!r} over stages with other losses ({', '.join(losses.values())}), whose "
                f"values cannot be compared; monitor a metric{own}",
                cause,
            )


def _shown_in_vain(run: Run) -> Found:
    """A name that a progress bar is to show, and that nothing produces: it would show "-" for ever."""
    bars = [one for one in run.callbacks if isinstance(one, ProgressBar) and one.metrics]
    names = _Names(run)
    for cause, shown in ((bar, shown) for bar in bars for shown in bar.metrics or ()):
        kind, _, name = shown.partition("/")
        if kind == "lr" or shown in _OF_RECORDS or (kind in names.series and names.may_come(kind, name)):
            continue
        if kind == "valid" and (names.logs_validation or not names.has_valid):
            continue  # the same bar serves runs without a validation
        known = [one for kind in ("train", "valid") for one in names.known(kind)]
        yield f"ProgressBar shows {shown!r}, which nothing produces. {choose(shown, known)}", cause


def _watched_in_some_stages(run: Run) -> Found:
    """A plateau that is told to look at a validation, in a stage that has none."""
    names = _Names(run)
    for stage in run.stages if names.has_valid and not names.logs_validation else ():
        for scheduler in (s for phase in stage.phases if not stage.valid for s in phase.epoch_schedulers):
            if (scheduler.monitor or "").startswith("valid/"):
                yield (
                    f"{type(scheduler.torch).__name__} monitors {scheduler.monitor!r}, and stage {stage.name!r} has no "
                    "validation: it leaves the learning rate as it is there. Give the stage valid=, or leave monitor "
                    "out: then it looks at 'train/loss' in such a stage",
                    stage,
                )


def _first_of_several(run: Run) -> Found:
    """A plateau that nobody has told at which of several data sets to look."""
    for stage in run.stages:
        for scheduler, monitor in _by_default(stage) if len(stage.valid) > 1 else ():
            last = [*stage.valid][-1]
            yield (
                f"{type(scheduler.torch).__name__} monitors {monitor!r}, the first of {len(stage.valid)} validation "
                "sets, as nothing says which; say it: lw.Scheduler(plateau, monitor="
                f"'valid/{last}/loss')",
                run.task,
            )


def _by_default(stage: Stage) -> Iterator[tuple[Scheduler, str]]:
    """The plateaus of a stage of which nothing says what they monitor, and what that is."""
    for scheduler in (s for phase in stage.phases for s in phase.epoch_schedulers):
        if scheduler.plateau and scheduler.monitor is None:
            yield scheduler, default_monitor(stage.valid)


def _against_its_name(run: Run) -> Iterator[tuple[Any, str, str, Any]]:
    """What watches a name the other way than it tells: the item, the name, what the item is called, who gave it."""
    found = [(item, item.monitor, who, cause) for item, who, cause in _watching(run)]
    unsaid = {(id(one), name): (one, name) for stage in run.stages for one, name in _by_default(stage)}
    found += [(one, name, type(one.torch).__name__, run.task) for one, name in unsaid.values()]
    for item, monitor, who, cause in found:
        mode, wanted = getattr(getattr(item, "torch", item), "mode", None), better(monitor)
        if wanted is not None and mode in ("min", "max") and mode != wanted:
            yield item, monitor, who, cause


def _is_the_loss(monitor: str) -> bool:
    """True for the loss that is trained on, or that of a validation; one of several phases may play against another."""
    return monitor == "train/loss" or (monitor.startswith("valid/") and monitor.endswith("/loss"))


def _is_a_rate(run: Run, monitor: str) -> bool:
    """True for the rate of an optimizer; those of groups are known once a schedule of theirs is at work."""
    of_groups = any(name.startswith("lr/") for s in run.stages for one in s.scheduled for name in one.schedules)
    return of_groups or monitor in learning_rates(run)


def _is_made_smaller(run: Run) -> bool:
    """True where one objective is trained, and validated by the same: several may play against each other."""
    phases, kind = [phase for stage in run.stages for phase in stage.phases], type(run.task)
    own = getattr(kind, "validation_step", None)
    same = own in (Task.validation_step, Supervised.validation_step) or not any(stage.valid for stage in run.stages)
    return same and all(phase.moved and not phase.prefix for phase in phases) and not _rises(run)


def _rises(run: Run) -> bool:
    """True where an optimizer makes a loss larger: ``maximize=True``."""
    return any(group.get("maximize") for one in run.optimizers.values() for group in one.param_groups)


def _watching(run: Run) -> Iterator[tuple[Any, str, Any]]:
    """What has a name to monitor, what it is called, and who is to be named for it."""
    given = [(one, one) for one in (*run.callbacks, *run.savers) if is_derived(type(one), Callback)]
    given += [(s, run.task) for stage in run.stages for phase in stage.phases for s in phase.epoch_schedulers]
    for item, cause in given:
        if isinstance(getattr(item, "monitor", None), str):
            yield item, type(getattr(item, "torch", item)).__name__, cause


class _Names:
    """What the steps, the metrics and the callbacks of a run may log."""

    def __init__(self, run: Run) -> None:
        self.run, self.has_valid = run, any(stage.valid for stage in run.stages)

    def is_validated(self, item: Any) -> bool:
        """True where ``item`` may see values of a validation: in its stage, or logged by hand where it reads those."""
        own = [stage for stage in self.run.stages if any(one is item for one in stage.callbacks)]
        by_hand = isinstance(item, Scheduler) or hasattr(item, "due")  # what looks at run.metrics
        return any(stage.valid for stage in own or self.run.stages) or (by_hand and self.logs_validation)

    @cached_property
    def logs_validation(self) -> bool:
        """True if something may log a name of a validation itself, as what ``trainer.validate`` has found."""
        return any(map(_may_log_validation, (*self.run.callbacks, *self.run.handlers)))

    @cached_property
    def metrics(self) -> dict[str, list[str] | None]:
        """The names under which each metric is logged, as far as they are known."""
        return {name: keys_of(name, one) for name, one in check_metrics(self.run.task.configure_metrics()).items()}

    @cached_property
    def series(self) -> dict[str, dict[str, frozenset[str] | None]]:
        """By kind, what is in front of the names of a phase or a loader, and what its step returns."""
        stages, step = self.run.stages, getattr(self.run.task, "validation_step", None)
        train = {phase.prefix: self._of(phase.step) for stage in stages for phase in stage.phases}
        loaders = {f"{name}/" if name else "" for stage in stages for name in stage.valid}
        return {"train": train, "valid": dict.fromkeys(loaders, self._of(step) if loaders else None)}

    def _of(self, step: Any) -> frozenset[str] | None:
        losses = [getattr(self.run.task, "loss", None), *(stage.loss for stage in self.run.stages)]
        terms = [getattr(one, "terms", None) or names_returned(one) for one in losses if callable(one)]
        names = None if None in terms else frozenset({"loss"}.union(*(t for t in terms if t is not None)))
        known = {Supervised.training_step: names}
        return names_returned(step if self.run.compiler is None else inspect.unwrap(step), known)

    def known(self, kind: str) -> list[str]:
        """The names that are known to come, as far as they are."""
        metrics = [(name, key) for name, keys in self.metrics.items() for key in keys or [name]]
        found = []
        for prefix, names in self.series[kind].items():
            measured = [key for name, key in metrics if not self._is_left_out(name, names, kind)]
            found += [f"{kind}/{prefix}{name}" for name in (*sorted(names or {"loss"}), *measured)]
        return found

    def may_come(self, kind: str, name: str) -> bool:
        if kind == "train" and name != "loss" and any(map(_may_log, (*self.run.callbacks, *self.run.handlers))):
            return True  # run.log refuses that one name
        if kind == "valid" and (self.logs_validation or any(map(_may_add, (*self.run.callbacks, *self.run.handlers)))):
            return True
        return any(
            name.startswith(prefix) and self._may_be_of(name.removeprefix(prefix), names, kind)
            for prefix, names in self.series[kind].items()
        )

    def _may_be_of(self, name: str, returned: frozenset[str] | None, kind: str) -> bool:
        metric = name.partition("/")[0]
        if metric in self.metrics:
            keys = self.metrics[metric]
            return not self._is_left_out(metric, returned, kind) and (keys is None or name in keys)
        return returned is None or name in returned

    def _is_left_out(self, metric: str, returned: frozenset[str] | None, kind: str) -> bool:
        """True for a metric of training that reads nothing of what the step returns."""
        if kind != "train" or returned is None:
            return False
        found = check_metrics(self.run.task.configure_metrics())[metric]
        more = ("preds", "target") if isinstance(self.run.task, Supervised) else ()  # are returned, and not logged
        return not any(name in returned or name in more for leaf in leaves(found) for name in inputs_of(leaf))


def _may_log(one: Any) -> bool:
    """True for handlers, for callbacks of the user's own, and for those of ours that add a name."""
    kind = type(one)
    if not isinstance(one, Callback) or not is_ours(kind):
        return True
    logs = "run.log(" in inspect.getsource(inspect.getmodule(kind) or kind)
    return logs or kind.map_output is not Callback.map_output


def _may_log_validation(one: Any) -> bool:
    """True for callbacks and handlers of the user's own that log what is not written out, or named ``valid/...``."""
    if isinstance(one, Callback):
        kinds = [kind for kind in type(one).__mro__ if kind not in (Callback, object) and not is_ours(kind)]
        functions = [method for kind in kinds for method in vars(kind).values() if inspect.isfunction(method)]
    else:
        functions = [] if is_ours(one.fn) else [one.fn]
    return any(map(_logs_validation, functions))


def _logs_validation(function: Any) -> bool:
    function = getattr(function, "__func__", function)
    tree, code = parsed(function), getattr(function, "__code__", None)
    if tree is None:
        return code is None or bool({"log", "validate"} & {*code.co_names})
    given = next((one.arg for one in tree.args.args if one.arg != "self"), "")
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if getattr(call.func, "attr", "") == "log":
            values = call.args[0] if call.args else None
            named = isinstance(values, ast.Dict) and all(isinstance(key, ast.Constant) for key in values.keys)
            keys = [str(getattr(key, "value", "")) for key in values.keys] if isinstance(values, ast.Dict) else []
            if not named or any(key.startswith("valid/") for key in keys):
                return True
        elif isinstance(call.func, ast.Name) and call.func.id != "print" and any(is_name(a, given) for a in call.args):
            return True  # what is handed the run may log
    return False


def _may_add(one: Any) -> bool:
    """True for callbacks and handlers of the user's own that may put more into the values of a validation."""
    if isinstance(one, Callback):
        base = type(one) if is_ours(type(one)) else Callback
        functions = [getattr(one, h) for h in _WITH_VALUES if getattr(type(one), h) is not getattr(base, h)]
    else:
        asks = any("values" in (asked for _, asked in one.passed[hook]) for hook in _WITH_VALUES if hook in one.tests)
        functions = [one.fn] if asks else []
    return any(map(_changes_values, functions))


def _changes_values(function: Any) -> bool:
    """True where a function stores into its last argument or hands it on, and where its source does not tell."""
    tree = parsed(getattr(function, "__func__", function))
    if tree is None or not tree.args.args or tree.args.vararg is not None:
        return True
    name = tree.args.args[-1].arg
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)) and is_name(node.value, name):
            return True
        if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store):
            return True
        if isinstance(node, ast.Assign) and is_name(node.value, name):  # under another name
            return True
        if isinstance(node, ast.Call):
            by = node.func.attr if isinstance(node.func, ast.Attribute) and is_name(node.func.value, name) else ""
            harmless = getattr(node.func, "id", "") in ("dict", "float", "len", "list", "print", "sorted", "str")
            given = any(is_name(one, name) for one in (*node.args, *(k.value for k in node.keywords)))
            if by in ("update", "setdefault", "pop", "clear") or (given and not harmless):
                return True
    return False
