"""Callbacks that get into each other's way: one drops what another has made, or looks before another changes it.

Found in the source of their hooks, before step 0; where that does not tell, nothing is said.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import Any

from loopwright.events import HOOKS, Callback, hook_name
from loopwright.state import Run, Stage
from loopwright.text import with_article
from loopwright.written import is_derived, is_name, is_ours, parsed, where

__all__ = [
    "changed_by", "has_a_say", "lost_work", "meet", "odd_work", "puts_back_at", "read_too_early", "set_twice",
    "stages_of",
]  # fmt: skip

_MAPS = ("map_batch", "map_output", "map_loss")
_IN_A_STEP = (*_MAPS, "on_step_start", "on_batch_start", "on_backward_end", "on_grads_ready")  # before optimizers move
_AFTER = "on_backward_end, which is passed what is trained on"
_SEEN = {  # what a hook is given, as it is called, and where else it is to be seen, before and after
    "map_batch": ("batch", "it", f", or look in on_batch_start, which comes before both, or in {_AFTER}"),
    "map_output": ("output", "it", f", or look in {_AFTER}"),
    "map_loss": ("loss", "it", f", or look in map_output, which comes before both, or in {_AFTER}"),
    "on_grads_ready": ("gradients", "them", ""),
}
_MAY_SKIP = ("on_batch_start", "map_batch")
_HARMLESS = ("append", "float", "isinstance", "len", "list", "print", "repr", "str", "type")  # as a call with the value

_SHOWS = ("dict", "log", "max", "min", "round", "sorted", "sum", "tuple")  # or with what a hook is given besides
_ACTS = ("add_param_group", "end_stage", "load_state_dict", "replace", "request_stop", "setattr", "step")


def lost_work(run: Run) -> Iterator[tuple[str, str | None]]:
    """What a hook returns is lost, since a later one makes its own; weights put back twice; what is the loop's alone.

    Each with the line of the hook that is to blame, where it is one.
    """
    for hook in _MAPS:
        for first, second in combinations(_own(run, hook), 2):
            given = hook.removeprefix("map_")
            if not _uses(second) and not _only_looks(first, may_raise=True) and _meet(run, first, second):
                yield (
                    f"{_said(second, run)} makes {with_article(given)} of its own and does not look at the one that it "
                    f"is given, so that what {_said(first, run)} has returned before is lost; go on from {given!r} "
                    "there, or leave one of the two out",
                    where(second),
                )
    yield from _written_twice(run)
    yield from _not_its_own(run)
    judged: list[Any] = [
        one for one in (*run.savers, *run.callbacks) if hasattr(one, "monitor") and is_derived(type(one), Callback)
    ]
    for one, other in combinations(judged, 2):
        both = puts_back_at(run, one) & puts_back_at(run, other)
        if both and one.monitor != other.monitor:
            when = "after the fit" if "" in both else f"at the end of stage {min(both)!r}"
            yield (
                f"{type(one).__name__}(monitor={one.monitor!r}) and {type(other).__name__}(monitor={other.monitor!r}) "
                f"both put weights back {when}; leave {_how_to_leave(one, other)} to one of them",
                None,
            )


def _how_to_leave(*both: Any) -> str:
    return "restore='best'" if all(hasattr(one, "restore") for one in both) else "that"


def stages_of(run: Run, callback: Any) -> list[Stage]:
    """The stages among whose callbacks ``callback`` is; empty for those of the Trainer."""
    return [stage for stage in run.stages if any(one is callback for one in stage.callbacks)]


def meet(run: Run, one: Any, other: Any) -> bool:
    """False for callbacks of different stages."""
    first, second = stages_of(run, one), stages_of(run, other)
    return not first or not second or any(stage is another for stage in first for another in second)


def puts_back_at(run: Run, one: Any) -> set[str]:
    """At the ends of which stages, by their names, ``one`` decides the weights; "" for the end of the fit."""
    own = getattr(one, "_puts_back_at", None)
    if own is not None:
        return set(own(run))
    return {""} if getattr(one, "restore", None) == "best" else set()


def _written_twice(run: Run) -> Iterator[tuple[str, str | None]]:
    """A key of the output that a hook puts there, and a later one puts there anew before anybody has looked."""
    own = _own(run, "map_output")
    for (i, first), (j, second) in combinations(enumerate(own), 2):
        between = own[i + 1 : j + 1]
        for key in sorted(_put(first) & _put(second)):
            seen = any(not _put(one) or key in _keys(one, ast.Load) for one in between)
            if not seen and _meet(run, first, second):
                yield (
                    f"{_said(second, run)} puts {key!r} in the output, where {_said(first, run)} has put one of its "
                    "own, which is lost; give one of them another name",
                    where(second),
                )


def _put(function: Any) -> set[str]:
    """Keys that a hook is sure to put in its value, ``output["x"] = ...`` or ``{**output, "x": ...}``."""
    tree, name = parsed(function.__func__), _name(function)
    if tree is None or name is None or any(_may_add_keys(node, name) for node in ast.walk(tree)):
        return set()
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and is_name(node.value, name):
            found.add(str(getattr(node.slice, "value", "")))
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Dict):
            found |= {str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)}
    return found


def read_too_early(run: Run, returned: Iterable[frozenset[str] | None]) -> Iterator[tuple[str, str | None]]:
    """A key of the output that a hook reads, and that only a later one puts there. ``returned``: keys by the steps."""
    own, there = _own(run, "map_output"), set[str]()
    for names in returned if len(own) > 1 else ():
        if names is None:
            return
        there |= names
    for i, first in enumerate(own):
        for key in sorted(_keys(first, ast.Load) - there - _keys(first, ast.Store)):
            second = next(
                (one for one in own[i + 1 :] if key in _keys(one, ast.Store) and _meet(run, first, one)), None
            )
            if second is not None:
                late, early = type(_owner(second)).__name__, type(_owner(first)).__name__
                yield (
                    f"{_said(first, run)} reads {key!r} of the output, which {_said(second, run)} puts there later; "
                    f"put {early} after {late} in the list",
                    where(first),
                )
        there |= _keys(first, ast.Store)
        if not _keys(first, ast.Store) and not _only_looks(first, may_raise=True):
            return  # it may have put anything there


def _keys(function: Any, use: type) -> set[str]:
    """Keys of the value of a hook that it is sure to read, ``output["x"]``, or that it may write."""
    tree, name = parsed(function.__func__), _name(function)
    if tree is None or name is None:
        return set()
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, use) and is_name(node.value, name):
            found.add(str(getattr(node.slice, "value", "")))
        if use is ast.Store and isinstance(node, ast.Dict):
            found |= {key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    if use is ast.Load and any(_may_add_keys(node, name) for node in ast.walk(tree)):
        return set()
    return found


def _may_add_keys(node: ast.AST, name: str) -> bool:
    """True where ``name`` may get other keys before it is read, or may not be read at all."""
    if isinstance(node, ast.Name):
        return node.id == name and isinstance(node.ctx, ast.Store)
    if isinstance(node, ast.Call):
        return any(is_name(given, name) for given in (*node.args, *(k.value for k in node.keywords)))
    method = isinstance(node, ast.Attribute) and is_name(node.value, name)
    return method or isinstance(node, (ast.If, ast.IfExp, ast.Try, ast.BoolOp, ast.comprehension, ast.Match))


def _not_its_own(run: Run) -> Iterator[tuple[str, str | None]]:
    """A hook sets the progress, or skips a batch where that is not possible: said before step 0, at no cost later."""
    told: set[tuple[int, str]] = set()
    for hook in HOOKS if run.callbacks or run.handlers else ():
        mine = [
            (one, getattr(one, "__func__", one), f"{hook_name(one, run)} ({where(one)})") for one in _own(run, hook)
        ]
        mine += [(h.fn, h.fn, f"handler {h.name} ({where(h.fn)})") for h in run.handlers if hook in h.tests]
        for function, key, said in mine:
            if _sets_progress(function) and (id(key), "progress") not in told:
                told.add((id(key), "progress"))
                yield (
                    f"{said} sets run.progress, which the loop alone counts; to end training or a stage, call "
                    "run.request_stop(reason) or run.end_stage(), or raise lw.StopEpoch",
                    where(function),
                )
            if hook not in _MAY_SKIP and _skips_batch(function) and not _serves(run, key):
                yield (
                    f"{said} raises SkipBatch, which leaves a batch out only from {' and '.join(_MAY_SKIP)}; raise it "
                    "there, or drop a step by lw.SkipStep, before the optimizers move",
                    where(function),
                )


def _serves(run: Run, function: Any) -> bool:
    """True if ``function`` is a hook from which a batch can be skipped as well: which one it serves, it can ask."""
    return any(getattr(one, "__func__", one) is function for hook in _MAY_SKIP for one in getattr(run.hooks, hook))


def odd_work(run: Run) -> Iterator[tuple[str, str | None]]:
    """What may be meant: rates set outside of a step that a schedule sets anew, and hooks that look too early."""
    yield from _lost_rates(run)
    yield from _early_looks(run)


def _meet(run: Run, one: Any, other: Any) -> bool:
    """False for hooks of callbacks of different stages."""
    return meet(run, _owner(one), _owner(other))


def _lost_rates(run: Run) -> Iterator[tuple[str, str | None]]:
    """A hook outside of a step sets in the groups of optimizers what schedules set anew before every step."""
    each = [{name for s in stage.scheduled if s.optimizer is o for name in s.schedules}
            for stage in run.stages for o in run.optimizers.values()]  # fmt: skip
    scheduled = set.intersection(*each) if each else set()
    for hook in (h for h in HOOKS if scheduled and h not in _IN_A_STEP):
        mine = [(one, _said(one, run)) for one in _own(run, hook)]
        mine += [(h.fn, f"handler {h.name} ({where(h.fn)})") for h in run.handlers if hook in h.tests]
        for function, said in mine:
            for name in sorted(scheduled & _stored_in_groups(function)):
                yield (
                    f"{said} sets {name!r} of an optimizer, and its schedule sets that anew before every step, so that "
                    "it is lost; make it a part of the schedule, or leave the schedule out",
                    where(function),
                )


def _early_looks(run: Run) -> Iterator[tuple[str, str | None]]:
    """A hook only reads what a later one changes, and sees what is not trained on; other hooks are there for that."""
    for hook in (*_MAPS, "on_grads_ready"):
        own = _own(run, hook)
        for (_, first), (i, second) in combinations(enumerate(own), 2):
            if hook in _MAPS:
                conflict = _only_looks(first) and _uses(second) and not _only_looks(second, may_raise=True)
            else:
                conflict = not _may_edit(first) and _stores_gradients(second)
            if conflict and _meet(run, first, second) and not _is_again(first, own[i + 1 :]):
                what, them, before = _SEEN[hook]
                late, early = type(_owner(second)).__name__, type(_owner(first)).__name__
                yield (
                    f"{_said(first, run)} looks at the {what} before {_said(second, run)} changes {them}, and does not "
                    f"see what is trained on; put {early} after {late} in the list{before}",
                    where(first),
                )


def set_twice(run: Run) -> Iterator[tuple[str, Any]]:
    """Rates that a callback says to change, and that a schedule sets; and the callback."""
    for callback in (one for one in run.callbacks if "rates" in getattr(one, "changes", ())):
        for scheduled in (one for stage in run.stages for one in stage.scheduled):
            yield (
                f"{type(callback).__name__} says that it changes rates, and the schedule of "
                f"{type(scheduled.optimizer).__name__} sets {', '.join(scheduled.schedules)} before every step",
                callback,
            )


def changed_by(callback: Any) -> list[str]:
    """What of training a callback changes, as far as its class and the source of its hooks tell; nothing: it watches.

    >>> class Half(Callback):
    ...     def map_loss(self, run, loss, output, batch, phase):
    ...         return loss / 2
    >>> changed_by(Half()), changed_by(Callback())
    (['loss'], [])
    """
    kind = type(callback)
    bases = {hook: getattr(Callback, hook) for hook in _MAPS}
    maps = [hook for hook, base in bases.items() if getattr(kind, hook, base) is not base]
    found = [hook.removeprefix("map_") for hook in maps if not _only_looks(getattr(callback, hook))]
    edits = getattr(kind, "on_grads_ready", Callback.on_grads_ready)
    if edits is not Callback.on_grads_ready and _may_edit(callback.on_grads_ready):
        found.append("gradients")
    asked = getattr(callback, "restore", "best") is not None  # EarlyStopping puts weights back where that is said
    return found + [one for one in getattr(kind, "changes", ()) if asked and one not in found]


def has_a_say(one: Any) -> bool:
    """False for a callback or the function of a handler that only watches, as far as its source tells.

    >>> class Loud(Callback):
    ...     def on_epoch_end(self, run):
    ...         print(run.progress.epoch)
    >>> class Early(Callback):
    ...     def on_epoch_end(self, run):
    ...         run.end_stage()
    >>> has_a_say(Loud()), has_a_say(Early())
    (False, True)
    """
    if not isinstance(one, Callback):
        return not is_ours(one) and _acts(one)
    methods = [
        method for kind in type(one).__mro__ if kind not in (Callback, object)
        for method in vars(kind).values() if inspect.isfunction(method)
    ]  # fmt: skip
    ends = any({"end_stage", "request_stop"} & {*method.__code__.co_names} for method in methods)
    return ends or bool(changed_by(one)) or any(_acts(method) for method in methods if not is_ours(method))


def _is_again(function: Any, later: list[Any]) -> bool:
    """True if a callback of the same class comes later too: one looks before and one after, to compare."""
    return any(type(_owner(one)) is type(_owner(function)) for one in later)


def _own(run: Run, hook: str) -> list[Any]:
    """The functions of a hook that belong to callbacks, in their order; those of stages come when a stage begins."""
    functions, own = getattr(run.hooks, hook), [c for stage in run.stages for c in stage.callbacks]
    if not functions and not own:
        return []
    found = [function for function in functions if isinstance(_owner(function), Callback)]
    known, base = {id(_owner(function)) for function in found}, getattr(Callback, hook)
    later = [c for c in own if id(c) not in known]
    return found + [getattr(c, hook) for c in later if getattr(type(c), hook, base) is not base]


def _owner(function: Any) -> Any:
    return getattr(function, "__self__", None)


def _said(function: Callable[..., Any], run: Run) -> str:
    return f"{hook_name(function, run)} ({where(function)})"


# ------------------------------------------------------------------------------------------- what a source tells


def _uses(function: Any) -> bool:
    """False where the value that a hook is given is nowhere read; True also where the source does not tell."""
    tree, name = parsed(function.__func__), _name(function)
    if tree is None or name is None:
        return True
    named = (node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in (name, "locals", "vars"))
    return any(isinstance(node.ctx, ast.Load) for node in named)


def _only_looks(function: Any, *, may_raise: bool = False) -> bool:
    """True where a hook returns what it was given, wherever it returns, and gives nobody a chance to change it.

    ``may_raise``: it may choose among batches, whose work is not lost by what comes later.
    """
    tree, name = parsed(function.__func__), _name(function)
    if tree is None or name is None:
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and not is_name(node.value, name):
            return False
        if isinstance(node, ast.Raise) and not may_raise:
            return False
        if isinstance(node, ast.Assign) and is_name(node.value, name):
            return False  # it may change what has another name by then
        if isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)) and _mentions(node, name):
            return False
        if isinstance(node, ast.Call):
            handed_on = any(is_name(given, name) for given in (*node.args, *(k.value for k in node.keywords)))
            if (handed_on and _called(node) not in _HARMLESS) or (_in_place(node) and _mentions(node, name)):
                return False
    return True


def _acts(function: Any) -> bool:
    """True where a function stores into anything but its own, works in place, or hands on what it is given."""
    tree = parsed(getattr(function, "__func__", function))
    if tree is None:
        return True
    given = {one.arg for one in tree.args.args}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, (ast.Store, ast.Del)):
            owner: ast.AST = node
            while isinstance(owner, (ast.Attribute, ast.Subscript)):
                owner = owner.value
            if not is_name(owner, "self"):
                return True
        if isinstance(node, ast.Call):
            if _called(node) in _ACTS or (_called(node).endswith("_") and not _called(node).startswith("__")):
                return True
            values = (*node.args, *(k.value for k in node.keywords))
            if _called(node) not in (*_HARMLESS, *_SHOWS) and any(
                isinstance(value, ast.Name) and value.id in given and value.id != "self" for value in values
            ):
                return True
    return False


def _may_edit(function: Any) -> bool:
    """True where a hook stores into gradients, or calls a method of its own, which may."""
    tree = parsed(function.__func__)
    if tree is None or _stores_gradients(function):
        return True
    called = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(isinstance(one, ast.Attribute) and is_name(one.value, "self") for one in called)


def _stores_gradients(function: Any) -> bool:
    """True where a hook stores into ``.grad``, or calls what torch names as working in place: ``mul_``."""
    tree = parsed(function.__func__)
    nodes = list(ast.walk(tree)) if tree is not None else []
    stores = (node for node in nodes if isinstance(getattr(node, "ctx", None), ast.Store))
    into = any(isinstance(n, ast.Attribute) and n.attr == "grad" for store in stores for n in ast.walk(store))
    return into or any(isinstance(node, ast.Call) and _called(node).endswith("_") for node in nodes)


def _stored_in_groups(function: Any) -> set[str]:
    """The names under which a function stores into ``optimizer.param_groups``."""
    tree = parsed(getattr(function, "__func__", function))
    nodes = list(ast.walk(tree)) if tree is not None else []
    loops = {node.target.id for node in nodes if isinstance(node, (ast.For, ast.comprehension))
             and isinstance(node.target, ast.Name) and _is_of_groups(node.iter)}  # fmt: skip
    found = set()
    for node in nodes:
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.slice, ast.Constant):
            group = node.value
            if _is_of_groups(group) or (isinstance(group, ast.Name) and group.id in loops):
                found.add(str(node.slice.value))
    return found


def _is_of_groups(node: ast.AST) -> bool:
    """True for ``optimizer.param_groups``, and for one of them."""
    node = node.value if isinstance(node, ast.Subscript) else node
    return isinstance(node, ast.Attribute) and node.attr == "param_groups"


def _in_place(call: ast.Call) -> bool:
    return _called(call).endswith("_") or _called(call) in ("update", "pop", "clear", "insert", "setdefault")


def _called(call: ast.Call) -> str:
    return str(getattr(call.func, "attr", getattr(call.func, "id", "")))


def _mentions(node: ast.AST, name: str) -> bool:
    return any(is_name(one, name) for one in ast.walk(node))


def _name(function: Any) -> str | None:
    """What a hook calls the value that it is given; None where it takes it as one of ``*args``."""
    named = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return named[1] if len(named) > 1 else None


def _sets_progress(function: Any) -> bool:
    """True where a function stores into ``run.progress``, whatever it calls the run, its first argument."""
    tree = parsed(getattr(function, "__func__", function))
    if tree is None:
        return False
    named = next(iter(inspect.signature(function).parameters), "")
    stores = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    return any(n.attr == "progress" and is_name(n.value, named) for n in stores)


def _skips_batch(function: Any) -> bool:
    """True where a function raises SkipBatch, and catches nothing."""
    tree = parsed(getattr(function, "__func__", function))
    nodes = list(ast.walk(tree)) if tree is not None else []
    raised = [n.exc.func if isinstance(n.exc, ast.Call) else n.exc for n in nodes if isinstance(n, ast.Raise)]
    named = any(getattr(one, "attr", getattr(one, "id", "")) == "SkipBatch" for one in raised)
    return named and not any(isinstance(node, ast.Try) for node in nodes)
