"""Trying something on a task, and leaving everything as it was, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from loopwright import rng
from loopwright.data.generators import Streams, find_on_modules, kept
from loopwright.state import has_state

__all__ = ["untouched"]


@contextmanager
def untouched(task: nn.Module, data: Any = None) -> Iterator[None]:
    """Train ``task`` on ``data`` inside; afterwards both are what they were, also after an exception.

    Put back are: parameters and buffers (their very storage: inside, copies are trained), gradients, ``requires_grad``,
    train and eval flags, attributes of modules that are numbers, lists or dicts, the optimizers that the task has, the
    run that it has been trained in, and the random generators: the global ones, and those of modules and data.

    >>> from loopwright.task import Supervised
    >>> from torch.optim import SGD
    >>> task = Supervised(nn.Linear(1, 1), optimizer=lambda params: SGD(params, 0.1))
    >>> with untouched(task):
    ...     nn.init.constant_(task.module.weight, 7.0).item(), task.eval().training
    (7.0, False)
    >>> task.module.weight.item() == 7.0, task.training
    (False, True)
    """
    with ExitStack() as back:
        back.enter_context(rng.forked())
        back.enter_context(kept(find_on_modules(task.modules())))
        back.enter_context(kept(Streams({"data": data}).find().values()))
        for part in (getattr(data, name, None) for name in ("dataset", "sampler", "batch_sampler")):
            if has_state(part):
                stateful: Any = part
                back.callback(stateful.load_state_dict, copy.deepcopy(stateful.state_dict()))
        for module in task.modules():
            back.callback(_put_back, vars(module), _shallow(vars(module)))
        task.__dict__.pop("_run", None)  # what is tried is no part of the run that the task was trained in
        for tensor in {id(t): t for t in (*task.parameters(), *task.buffers())}.values():
            back.callback(_restore, tensor, tensor.data, tensor.grad, tensor.requires_grad)
            tensor.data = tensor.data.clone()
        for optimizer in _optimizers(task):
            _keep(optimizer, back)
        yield


def _optimizers(task: Any) -> list[Optimizer]:
    """Those that the task holds, or always gives; what it makes anew for each run needs no keeping."""
    found = task.configure_optimizers()
    given = found.values() if isinstance(found, Mapping) else [found]
    held = [*vars(task).values(), *(one[0] if isinstance(one, tuple) else one for one in given)]
    return list({id(one): one for one in held if isinstance(one, Optimizer)}.values())


def _keep(optimizer: Optimizer, back: ExitStack) -> None:
    """Let ``optimizer`` go on with a copy of its state, until ``back`` is left."""
    state, groups = dict(optimizer.state), [(group, dict(group)) for group in optimizer.param_groups]
    own = dict(vars(optimizer))

    def restore() -> None:
        _put_back(vars(optimizer), own)
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, settings in groups:
            _put_back(group, settings)
        optimizer.param_groups[:] = [group for group, _ in groups]

    back.callback(restore)
    for parameter, values in state.items():
        optimizer.state[parameter] = copy.deepcopy(values)
    for group in optimizer.param_groups:
        group.update({name: value.clone() for name, value in group.items() if isinstance(value, Tensor)})


def _restore(tensor: Tensor, data: Tensor, grad: Tensor | None, requires_grad: bool) -> None:
    tensor.requires_grad_(False)  # or another dtype could not take its place
    tensor.grad = None
    tensor.data = data
    tensor.requires_grad_(requires_grad)
    tensor.grad = grad


def _shallow(values: dict[str, Any]) -> dict[str, Any]:
    """The same values; of dicts and lists, copies."""
    return {k: copy.copy(v) if isinstance(v, (dict, list)) else v for k, v in values.items()}


def _put_back(values: dict[Any, Any], saved: Mapping[Any, Any]) -> None:
    """Make ``values`` what was ``saved`` of it; dicts and lists stay the objects that they were."""
    for name in values.keys() - saved.keys():
        del values[name]
    for name, was in saved.items():
        now = values.get(name)
        if isinstance(was, dict) and isinstance(now, dict) and was is not now:
            now.clear()
            now.update(was)
        elif isinstance(was, list) and isinstance(now, list) and was is not now:
            now[:] = was
        else:
            values[name] = was
