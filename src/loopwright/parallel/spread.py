"""Parameters that were replaced by their parts for the time of a fit, and how they come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loopwright._compat import unwrap
from loopwright.parallel.fsdp import wrapped_in
from loopwright.parallel.shards import is_shard, like, whole

__all__ = ["Spread"]

_HOOKS = [name for name in vars(nn.Module()) if "_hooks" in name]  # where torch keeps them


class Spread:
    """What ``shard`` does to ``models``: which parameter stood where, to be put back, the same objects as before.

    ``optimizers``, those of an earlier fit, go on with the parts.
    """

    def __init__(self, models: Iterable[nn.Module], optimizers: Iterable[Optimizer], shard: Callable[[], None]) -> None:
        self.models = list(models)
        self.modules = list({id(m): m for model in self.models for m in model.modules()}.values())
        self.begun = False
        self.came_sharded = any(wrapped_in(model) for model in self.models)
        self.optimizers = list(optimizers)
        self.places = [(m, n, p) for m in self.modules for n, p in m._parameters.items() if p is not None]
        before = [_marks(module) for module in self.modules]
        self.came: list[set[tuple[str, Any]]] = []
        try:
            shard()
        except BaseException:
            self._note(before)
            self.undo()
            raise
        self._note(before)
        self._move({id(p): m._parameters[n] for m, n, p in self.places}, self.optimizers)

    def _note(self, before: Iterable[set[tuple[str, Any]]]) -> None:
        self.came = [_marks(module) - old for module, old in zip(self.modules, before, strict=True)]

    def begin(self) -> None:
        """Training begins: let go of the whole parameters."""
        self.begun = True
        for module, name, parameter in self.places:
            if is_shard(module._parameters[name]) and not is_shard(parameter):
                parameter.data = parameter.data.new_empty(0)

    def undo(self) -> None:
        """Put the parameters back as they were: nothing has been trained, and no other rank is asked."""
        if self.came_sharded:
            return
        parts = {id(m._parameters[n]): p for m, n, p in self.places}
        kept = [m._parameters[n] for m, n, _ in self.places]  # an id is that of one object while it is held
        self._unwrap()
        for module, name, parameter in self.places:
            module._parameters[name] = parameter
        self._move(parts, self.optimizers)
        del kept

    def gather(self, optimizers: Iterable[Optimizer]) -> None:
        """Put whole parameters back, as they are now; ``optimizers`` go on with them. All ranks together."""
        for model in self.models:
            for module in wrapped_in(model):
                module.reshard()
        made: dict[int, tuple[Any, nn.Parameter]] = {}  # by part, which is held: an id is that of one object meanwhile
        for module, name, parameter in self.places:
            part = module._parameters[name]
            if is_shard(part) and id(part) not in made:
                made[id(part)] = part, self._whole(part, parameter)
        for module, name, _ in self.places:
            part = module._parameters[name]
            if id(part) in made:
                module._parameters[name] = made[id(part)][1]
        self._unwrap()
        self._move({i: parameter for i, (_, parameter) in made.items()}, optimizers)

    def _unwrap(self) -> None:
        """Take off what ``shard`` has put on the modules: those of FSDP, and hooks and attributes of others."""
        for module, came in zip(self.modules, self.came, strict=True):
            unwrap(module)
            for name, key in came:
                if key is None:
                    module.__dict__.pop(name, None)
                else:
                    module.__dict__.get(name, {}).pop(key, None)

    @staticmethod
    def _whole(part: Any, parameter: Any) -> nn.Parameter:
        data = whole(part.detach())
        if is_shard(parameter):  # the model came in parts
            return nn.Parameter(data, requires_grad=part.requires_grad)
        parameter.data, parameter.grad = data, None
        parameter.requires_grad_(part.requires_grad)
        return parameter  # type: ignore[no-any-return]

    @staticmethod
    def _move(new: Mapping[int, Any], optimizers: Iterable[Optimizer]) -> None:
        """Let ``optimizers`` move the new parameters in the place of the old ones, with what they keep of them."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for at, old in enumerate(group["params"]):
                    parameter = new.get(id(old))
                    if parameter is None or parameter is old:
                        continue
                    group["params"][at] = parameter
                    if old in optimizer.state:
                        kept = optimizer.state.pop(old)
                        optimizer.state[parameter] = {k: _held_as(parameter, v) for k, v in kept.items()}


def _marks(module: nn.Module) -> set[tuple[str, Any]]:
    """The attributes of a module, and the keys of its hooks."""
    hooks = [(name, key) for name in _HOOKS for key in vars(module).get(name, ())]
    return {*((name, None) for name in vars(module)), *hooks}


def _held_as(parameter: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.dim():
        return value
    with torch.no_grad():
        return like(parameter, value) if value.shape == parameter.shape else whole(value)
