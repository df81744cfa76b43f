"""Who changed what it may not: the rules of the hooks, checked while a run goes on."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from loopwright.errors import HookError, SettingError
from loopwright.events import Callback, hook_name
from loopwright.state import Phase, Run, Stage
from loopwright.written import warn

__all__ = ["Audit"]

_SAMPLE = 256  # elements of a tensor that are compared
_FREE = ("on_fit_start", "on_exception")  # before and after training
_LOOKING = (
    "on_validation_start",
    "on_eval_batch_start",
    "on_eval_batch_end",
    "on_validation_end",
    "on_test_start",
    "on_test_end",
    "on_predict_start",
    "on_predict_batch_start",
    "on_predict_batch_end",
    "on_predict_end",
)  # fmt: skip - within these random generators and flags are put back
_RULES = {
    "weights": "Weights move in the step of an optimizer only: call run.replace('model', new)",
    "gradients": "Gradients may be edited in on_grads_ready and nowhere else",
    "values": "on_* hooks observe: return the new value from map_batch, map_output or map_loss",
    "random": "The global generators belong to the model: draw from one of its own, such as torch.Generator()",
    "rates": "Rates follow the schedule: make it a part of schedule=",
    "flags": "Flags are the user's: set them before fit, or name what a stage trains, lw.Stage(train=...)",
}


class Audit(Callback):
    """Checks at each hook of each callback and handler that it changes only what it may, and names who does not.

    Looked at, before and after every call: weights and buffers, gradients, what the hook was passed (batch, output,
    loss, result), the global random generators, ``training`` and ``requires_grad`` flags, and the numbers in the groups
    of optimizers, such as their learning rates. Tensors by their version
    counters, and by 256 elements of each, since an edit through ``.data`` leaves the counter as it is: one that
    misses all of these elements is not seen. ``map_*`` hooks take part in training: they may draw, and run the model.
    ``on_fit_start`` comes before training and may do anything. What a callback lists in its ``changes`` is allowed.

    The first finding raises HookError in the hook; with ``stop=False`` all are collected in ``found``, each callback,
    hook and kind once, and told in one warning at the end. For a short run: a call of a hook costs some hundreds of us.

    Reads: everything. Changes: nothing. Stops: by an error.

    >>> class Meddler(Callback):
    ...     def on_step_end(self, run, result):
    ...         run.models["model"].weight.data.zero_()
    >>> Audit(stop=False).found
    []
    """

    def __init__(self, *, stop: bool = True) -> None:
        if not isinstance(stop, bool):
            raise SettingError(f"stop={stop!r}: expected True (raise at the first finding) or False (collect them)")
        self.stop = stop
        self.found: list[str] = []

    def on_fit_start(self, run: Run) -> None:
        self.found, self._seen = [], set[tuple[str, str]]()
        self._slots, self._replaced = slots_of(run), len(run.replaced)
        run.hooks.wrap(lambda hook, function: self._audited(hook, function, run))

    def on_fit_end(self, run: Run) -> None:
        if self.found and not self.stop:
            told = "\n".join(f"  - {one}" for one in self.found)
            warn(f"Audit found {len(self.found)} in this run:\n{told}")

    def _audited(self, hook: str, function: Callable[..., Any], run: Run) -> Callable[..., Any]:
        owner = getattr(function, "__self__", None)
        if owner is self or hook in _FREE:
            return function
        allowed = getattr(owner, "changes", ())
        every: dict[str, _Look] = {**_looks(hook), "rates": lambda slots, args: _rates(run)}
        looks = {kind: look for kind, look in every.items() if kind not in allowed}
        name, names = hook_name(function, run), list(inspect.signature(getattr(Callback, hook)).parameters)[2:]

        def call(run: Run, *args: Any) -> Any:
            slots, given = self._current(run), dict(zip(names, args, strict=True))
            before = {kind: look(slots, given) for kind, look in looks.items()}
            returned = function(run, *args)
            for kind, look in looks.items():
                changed = differences(before[kind], look(slots, given))
                if changed and (name, kind) not in self._seen:
                    self._seen.add((name, kind))
                    self._tell(run, name, kind, changed)
            return returned

        return call

    def _tell(self, run: Run, name: str, kind: str, changed: list[str]) -> None:
        what = f"{', '.join(changed[:4])}{', ...' if len(changed) > 4 else ''}"
        verb = "drew from" if kind == "random" else "changed"
        of = {"weights": "the weights ", "gradients": "the gradients of ", "flags": "the flags of "}.get(kind, "")
        says = f"{name} {verb} {of}{what} after step {run.progress.step}"
        allow = f"or let the callback say that it is meant: changes = ({kind!r},)"
        self.found.append(f"{says}. {_RULES[kind]}; {allow}")
        if self.stop:
            raise HookError(self.found[-1])

    def _current(self, run: Run) -> list[_Slot]:
        if len(run.replaced) != self._replaced and not run.changes:
            self._slots, self._replaced = slots_of(run), len(run.replaced)
        return self._slots


def _looks(hook: str) -> dict[str, _Look]:
    """What must stay the same over a call of ``hook``."""
    if hook.startswith("map_"):  # the model may run there, which moves its buffers and the generators
        return {"weights": _parameters, "gradients": gradients, "flags": _flags}
    looks: dict[str, _Look] = {"weights": _weights, "values": _values}
    if hook != "on_grads_ready":
        looks["gradients"] = gradients
    return looks if hook in _LOOKING else {**looks, "random": _random, "flags": _flags}


# ------------------------------------------------------------------------------------------------ what is looked at

_State = dict[str, tuple[Any, ...]]  # by name: what must stay the same
_Look = Callable[[list["_Slot"], Mapping[str, Any]], _State]


class _Slot(NamedTuple):
    """Where a module keeps a parameter or a buffer: another tensor in its place is a change as well."""

    name: str
    module: nn.Module
    kept: dict[str, Any]
    key: str


def slots_of(run: Run) -> list[_Slot]:
    found: dict[int, _Slot] = {}
    for model in run.models.values():
        for path, module in model.named_modules():
            for kept in (module._parameters, module._buffers):
                for key, tensor in kept.items():
                    if tensor is not None:
                        found.setdefault(id(tensor), _Slot(f"{path}.{key}".lstrip("."), module, kept, key))
    return list(found.values())


def _state_of(tensor: Any) -> tuple[Any, ...]:
    """The tensor itself, its version, and some of its elements; None for what has none."""
    if not isinstance(tensor, Tensor):
        return (tensor,)
    if tensor.layout != torch.strided or is_lazy(tensor):
        return tensor, tensor._version
    version = 0 if tensor.is_inference() else tensor._version
    with torch.no_grad():
        flat = tensor.detach().reshape(-1)
        return tensor, version, tensor.data_ptr(), flat[:: max(1, flat.numel() // _SAMPLE)].clone()


def _parameters(slots: list[_Slot], args: Mapping[str, Any]) -> _State:
    return {slot.name: _state_of(slot.kept.get(slot.key)) for slot in slots if slot.kept is slot.module._parameters}


def _weights(slots: list[_Slot], args: Mapping[str, Any]) -> _State:
    return {slot.name: _state_of(slot.kept.get(slot.key)) for slot in slots}


def gradients(slots: list[_Slot], args: Mapping[str, Any]) -> _State:
    return {slot.name: _state_of(getattr(slot.kept.get(slot.key), "grad", None)) for slot in slots}


def _flags(slots: list[_Slot], args: Mapping[str, Any]) -> _State:
    found: _State = {}
    for slot in slots:
        found[slot.name] = (getattr(slot.kept.get(slot.key), "requires_grad", False),)
        found[f"{slot.name.rpartition('.')[0] or type(slot.module).__name__}"] = (slot.module.training,)
    return found


def _rates(run: Run) -> _State:
    """The numbers in the groups of all optimizers."""
    found: _State = {}
    for name, optimizer in run.optimizers.items():
        for i, group in enumerate(optimizer.param_groups):
            numbers = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            found.update(leaves(numbers, f"{name}.param_groups[{i}]"))
    return found


def _random(slots: list[_Slot], args: Mapping[str, Any]) -> _State:
    numpy = np.random.get_state(legacy=False)
    states: _State = {
        "torch's global generator": (None, torch.default_generator.get_state()),
        "Python's global generator": (random.getstate(),),
        "NumPy's global generator": (str(numpy["state"]["pos"]), torch.as_tensor(numpy["state"]["key"].astype("i8"))),
    }
    if torch.cuda.is_initialized():
        states["torch's CUDA generator"] = (None, torch.cuda.get_rng_state())
    return states


def _values(slots: list[_Slot], args: Mapping[str, Any]) -> _State:
    return {
        path: state
        for name, arg in args.items() if not isinstance(arg, (Phase, Stage))
        for path, state in leaves(arg, name)
    }  # fmt: skip


def leaves(value: Any, path: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves(part, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from leaves(part, f"{path}[{i}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            yield from leaves(getattr(value, one.name), f"{path}.{one.name}")
    elif isinstance(value, np.ndarray) and value.dtype != object:
        flat = value.reshape(-1)
        yield path, (value, flat[:: max(1, flat.size // _SAMPLE)].tobytes())
    else:
        yield path, _state_of(value)


def differences(old: _State, new: _State) -> list[str]:
    names = list(dict.fromkeys([*old, *new]))
    return [name for name in names if not _same(old.get(name), new.get(name))]


def _same(old: tuple[Any, ...] | None, new: tuple[Any, ...] | None) -> bool:
    if old is None or new is None or len(old) != len(new) or type(old[0]) is not type(new[0]):
        return False
    first = old[0] is new[0] or (not isinstance(old[0], (Tensor, np.ndarray)) and _equal(old[0], new[0]))
    return first and all(map(_equal, old[1:], new[1:]))


def _equal(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor):  # as bytes: NaN is the same as NaN
        return torch.equal(old.view(torch.uint8), new.view(torch.uint8))
    return old is new or bool(old == new)
