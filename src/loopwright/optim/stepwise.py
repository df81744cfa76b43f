"""An optimizer made of step functions, each of which works on whole lists of tensors at once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from loopwright.errors import SettingError, choose
from loopwright.optim.bunch import Bunch
from loopwright.optim.steps import follow

__all__ = ["Stepwise"]

_RESERVED = ("params", "steps", "capturable", "param_names")
_HOW = {"params", "param_names", "steps", "capturable", "foreach", "fused", "differentiable"}  # change no result
_FROM_0 = {"lr", "momentum", "weight_decay", "eps"}  # which torch's optimizers take from 0 only
_ALTERS = {"amsgrad", "centered", "dampening", "decoupled_weight_decay", "maximize", "momentum", "nesterov"}  # torch's


class Stepwise(Optimizer):
    """An optimizer whose step is a list of functions, one after the other: ``step(bunch, lr, momentum=0.9)``.

    A step function gets a ``Bunch`` (lists of parameters, gradients and what is kept of them) and, by the names of its
    other parameters, hyper-parameters of the group. Their defaults are those of the functions; ``hypers`` replaces
    them, a parameter group may have its own, and a schedule changes them as in any torch optimizer. ``lw.optim`` has
    the usual functions (``decay``, ``sgd``, ``adam``, ``radam``, ``lamb``, ``lookahead``), which are written in the
    same way.

    ``capturable=True`` keeps the numbers of steps on the device and reads nothing from it, for CUDA graphs; under
    ``torch.compile`` it is so by itself. A function that keeps what it keeps under the names of torch's optimizer, as
    ``adam`` and ``radam`` do, gives states that this one loads, and loads those of it.

    Raises SettingError for a hyper-parameter, also of a group, that no function takes, that is missing or that torch's
    optimizers refuse (``lr=-1``), for sparse gradients and complex parameters, and for a ``state_dict`` that was made
    with other functions.
    Source: the generic optimizer of fastai (Howard & Gugger 2020, arXiv:2002.04688).

    >>> def sign_sgd(bunch, lr, beta=0.9):
    ...     average = bunch.average("average", beta)
    ...     bunch.descend([one.sign() for one in average], lr)
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = Stepwise([weight], [sign_sgd], lr=0.25)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> weight.data
    tensor([0.7500, 0.7500])
    """

    def __init__(
        self, params: Any, steps: Sequence[Callable[..., None]], *, capturable: bool = False, **hypers: Any
    ) -> None:
        steps = [steps] if callable(steps) else list(steps)
        if not steps or not all(map(callable, steps)):
            raise SettingError(f"Stepwise(params, {steps!r}): expected step functions, such as [lw.optim.adam]")
        taken = [_hypers_of(step) for step in steps]
        defaults = {**_defaults(steps, taken, hypers), "steps": ", ".join(map(_name, steps)), "capturable": capturable}
        self._steps = [(step, tuple(names)) for step, names in zip(steps, taken, strict=True)]
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_steps": self._steps}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters that are moved from now on; hyper-parameters left out are the defaults."""
        unknown = next((name for name in param_group if not self._has(name)), None)
        if unknown is not None:
            known = self.defaults.keys() - _RESERVED
            raise SettingError(
                f"a group has {unknown!r}, which no step function takes ({self.defaults['steps']}). "
                f"{choose(unknown, known)}"
            )
        super().add_param_group(param_group)
        self._check_values(self.param_groups[-1])
        for parameter in self.param_groups[-1]["params"]:
            if parameter.is_complex():
                raise SettingError(
                    f"Stepwise moves real parameters; it was given a complex one of shape {list(parameter.shape)}. "
                    "Give it to an optimizer of torch, or keep torch.view_as_real(parameter) as the parameter"
                )

    def _has(self, name: str) -> bool:
        """True for what a group may hold; schedulers keep there what a value was at first, ``groups`` a note."""
        return name in self.defaults or name in (*_HOW, "name", "no_decay") or name.startswith("initial_")

    def _check_values(self, group: Mapping[str, Any]) -> None:
        """What torch's optimizers refuse, and what would only fail in a step."""
        for name in _FROM_0 & group.keys():
            if isinstance(group[name], (int, float)) and not 0 <= group[name] < math.inf:
                raise SettingError(f"{name}={group[name]!r}: expected a number from 0")
        betas = group.get("betas", ())
        if isinstance(betas, (tuple, list)) and not all(0 <= beta < 1 for beta in betas):
            raise SettingError(f"betas={betas!r}: expected numbers from 0 to below 1, such as (0.9, 0.999)")
        if any(step is follow for step, _ in self._steps):
            k, alpha = group["k"], group["alpha"]
            if not isinstance(k, int) or isinstance(k, bool) or k < 1:
                raise SettingError(f"k={k!r}: lookahead expected a whole number of steps, from 1")
            if not 0 <= alpha <= 1:
                raise SettingError(f"alpha={alpha!r}: lookahead expected a number from 0 to 1")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what ``closure``, if there is one, has returned as the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            in_graph = group["capturable"] or torch.compiler.is_compiling()
            for params in _alike(group["params"]):
                bunch = Bunch(params, self.state, in_graph=in_graph, on_device=group["capturable"])
                for function, names in self._steps:
                    function(bunch, **{name: group[name] for name in names})
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What torch's optimizers keep in theirs; a decay that no function takes stands there as none."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group.setdefault("weight_decay", 0.0)  # torch's Adam and others cannot step without
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back a state of these step functions, or of the torch optimizer whose names they share."""
        own = self.param_groups
        for saved in state_dict["param_groups"]:
            _check_group(self.defaults, saved)
        super().load_state_dict(dict(state_dict))
        for before, group in zip(own, self.param_groups, strict=True):
            group["steps"], group["capturable"] = before["steps"], before["capturable"]
            for parameter in group["params"]:
                count = self.state[parameter].get("step") if parameter in self.state else None
                if count is not None:
                    device = parameter.device if group["capturable"] else "cpu"
                    self.state[parameter]["step"] = torch.as_tensor(count, dtype=torch.float32, device=device)


def _alike(parameters: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Those that have a gradient, by device and dtype; parts of FSDP's and plain tensors are not mixed either."""
    kinds: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        if grad.layout is not torch.strided:
            raise SettingError(
                f"Stepwise works on dense gradients; that of a parameter of shape {list(parameter.shape)} is "
                f"{grad.layout}. Use sparse=False in nn.Embedding, or give it to torch.optim.SparseAdam or SGD"
            )
        kinds.setdefault((parameter.device, parameter.dtype, type(parameter)), []).append(parameter)
    return kinds.values()


def _name(step: Any) -> str:
    return str(getattr(step, "__name__", type(step).__name__)).removeprefix("_")


def _hypers_of(step: Callable[..., None]) -> dict[str, Any]:
    """The hyper-parameters that a step function takes, with their defaults."""
    first, *rest = inspect.signature(step).parameters.values() or (None,)
    odd = [p.name for p in rest if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if first is None or odd or any(p.name in _RESERVED for p in rest):
        raise SettingError(
            f"the step function {_name(step)}{inspect.signature(step)} must take a bunch and then hyper-parameters by "
            f"names (other than {', '.join(_RESERVED)}): def {_name(step)}(bunch, lr, momentum=0.9): ..."
        )
    return {p.name: p.default for p in rest}


def _defaults(steps: Sequence[Any], taken: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for step, names in zip(steps, taken, strict=True):
        for name, default in names.items():
            known = found.get(name, inspect.Parameter.empty)
            if default is inspect.Parameter.empty or name in given:
                found.setdefault(name, default)
            elif known is not inspect.Parameter.empty and known != default:
                raise SettingError(
                    f"{name} has two defaults, {known!r} and {default!r} (of {_name(step)}); say which: {name}=..."
                )
            else:
                found[name] = default
    unknown = next((name for name in given if name not in found), None)
    if unknown is not None:
        raise SettingError(f"no step function takes {unknown!r} ({', '.join(map(_name, steps))}). "
                           f"{choose(unknown, found)}")  # fmt: skip
    found |= given
    missing = next((name for name, value in found.items() if value is inspect.Parameter.empty), None)
    if missing is not None:
        raise SettingError(f"{missing} has no default; pass it: Stepwise(params, [...], {missing}=...)")
    return found


def _check_group(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise SettingError if a saved group was made with other step functions or settings than there are here."""
    made = saved.get("steps", own["steps"])
    if made != own["steps"]:
        raise SettingError(
            f"this state was made with the steps [{made}], and this optimizer has [{own['steps']}]; make it with the "
            "same ones"
        )
    absent = sorted(own.keys() - saved.keys() - _HOW)
    unknown = sorted(name for name in _ALTERS & saved.keys() - own.keys() if saved[name])
    if absent or unknown:
        told = f"no {', '.join(absent)}" if absent else ", ".join(f"{name}={saved[name]!r}" for name in unknown)
        raise SettingError(
            f"this state has {told}, and this optimizer takes the hyper-parameters "
            f"{', '.join(sorted(own.keys() - _HOW))}; make it with the step functions that belong to the state"
        )
