"""Less memory for more time: what chosen blocks compute forward is computed again in the backward, not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loopwright.errors import SettingError
from loopwright.optim import match_names

__all__ = ["CheckpointedActivations", "checkpoint_activations"]

_SMALL = 2**20  # bytes; larger buffers are masks and tables, which no forward changes


def checkpoint_activations(model: nn.Module, patterns: str | Sequence[str]) -> CheckpointedActivations:
    """Keep only the inputs of the modules of ``model`` whose names match; their insides are computed again.

    ``"blocks.*"`` takes every module of the list ``model.blocks``: of modules inside of one another the outermost.
    Weights, gradients and random numbers have the same bits as without, dropout and batch statistics included; a
    backward takes about a forward longer. The names in ``state_dict`` stay. Nothing is done where no gradient is
    recorded. ``remove()`` undoes it, and so does the end of a ``with`` block.

    Raises SettingError for a pattern that matches no module, and for what is never called, such as a ModuleList.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    >>> with checkpoint_activations(net, "1") as checkpointed:
    ...     net(torch.ones(1, 2)).sum().backward()
    >>> checkpointed
    CheckpointedActivations(1)
    """
    modules = dict(model.named_modules())
    modules.pop("")
    found = match_names(patterns, modules, what="module")
    outermost = [n for n in modules if n in found and not any(n.startswith(f"{other}.") for other in found)]
    for name in outermost:
        module = modules[name]
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            raise SettingError(f"{name} is a {type(module).__name__}, which is never called; write '{name}.*'")
        if _is_checkpointed(module):
            raise SettingError(f"{name} is checkpointed already; call remove() on what the first call returned")
    return CheckpointedActivations({name: modules[name] for name in outermost})


class CheckpointedActivations:
    """The modules that compute their insides again, until ``remove()``."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        for module in modules.values():
            # a partial of the module: a deep copy of the model calls its own copies
            module.forward = partial(_recomputed, module, module.__dict__.get("forward"))

    def remove(self) -> None:
        """Let the modules keep what they compute again."""
        for module in self.modules.values():
            if _is_checkpointed(module):
                own = module.__dict__.pop("forward").args[1]
                if own is not None:
                    module.forward = own

    def __enter__(self) -> CheckpointedActivations:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"CheckpointedActivations({', '.join(self.modules)})"


def _is_checkpointed(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return isinstance(forward, partial) and forward.func is _recomputed


def _recomputed(module: nn.Module, own: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    forward = type(module).forward.__get__(module) if own is None else own
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    buffers = [] if torch.compiler.is_compiling() else _changing(module)  # the compiler sees to buffers by itself
    if not buffers:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    before = partial(_contexts, buffers)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=before, **kwargs)


def _changing(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Copies of the buffers that a forward may change, as the statistics of batch norm."""
    return [
        (part, name, buffer.clone())
        for part in module.modules()
        if part.training
        for name, buffer in part.named_buffers(recurse=False)
        if buffer.numel() * buffer.element_size() <= _SMALL
    ]


def _contexts(buffers: list[tuple[nn.Module, str, Tensor]]) -> tuple[Any, Any]:
    return nullcontext(), _as_before(buffers)


@contextmanager
def _as_before(buffers: list[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """A second forward reads the buffers that the first one read, and its changes to them are dropped."""
    own = [getattr(module, name) for module, name, _ in buffers]
    for module, name, before in buffers:
        setattr(module, name, before.clone())
    try:
        yield
    finally:
        for (module, name, _), buffer in zip(buffers, own, strict=True):
            setattr(module, name, buffer)
