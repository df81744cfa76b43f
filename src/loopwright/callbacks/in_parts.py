"""What a rank holds of a model that FSDP shares out, as a module whose arithmetic is that of plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from loopwright.parallel import is_shard, like, local
from loopwright.parallel.fsdp import wrapped_in

__all__ = ["InParts", "held", "load_parts", "parts_of"]


class InParts(nn.Module):
    """This rank's part of each parameter of ``model``, in the same memory, and the buffers; in the order of the model.

    An average over it is torch's own, part by part, with the bits of the whole.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for module in wrapped_in(model):  # an evaluation leaves whole copies, which are no parameters
            module.reshard()
        parts = [local(parameter.detach()) for parameter in model.parameters()]
        self.held = nn.ParameterList(nn.Parameter(part, requires_grad=False) for part in parts)
        for i, buffer in enumerate(model.buffers()):
            self.register_buffer(str(i), buffer)


def held(model: nn.Module) -> nn.Module:
    """``model``, or what this rank holds of it."""
    return InParts(model) if wrapped_in(model) else model


def parts_of(averaged: AveragedModel, model: nn.Module) -> dict[str, Any]:
    """The state of an ``averaged`` InParts of ``model``, as that of an average of the model itself: with DTensors."""
    from torch.distributed.tensor import DTensor

    found: dict[str, Any] = {}
    for name, own, part in _named(averaged, model):
        part = part.detach()
        if is_shard(own) and isinstance(averaged.module, InParts):
            made: Any = DTensor
            part = made.from_local(
                part, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
            )
        found[name] = part
    found |= {name: one for name, one in model.state_dict().items() if name.endswith("_extra_state")}
    return {"n_averaged": averaged.n_averaged, **{f"module.{name}": one for name, one in found.items()}}


@torch.no_grad()
def load_parts(averaged: AveragedModel, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Put in what ``parts_of`` gave, or the ``state_dict`` of an average of the whole model. All ranks together."""
    averaged.n_averaged.copy_(state["n_averaged"])
    for name, own, part in _named(averaged, model):
        part.copy_(local(like(own, state[f"module.{name}"])))


def _named(averaged: AveragedModel, model: nn.Module) -> list[tuple[str, Any, Tensor]]:
    """Parameters and buffers of ``model`` by all their names, each with what ``averaged`` holds for it."""
    InParts(model)  # which leaves DTensors where the parameters are
    own = [*model.parameters(), *model.buffers()]
    parts = dict(zip(map(id, own), [*averaged.module.parameters(), *averaged.module.buffers()], strict=True))
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    gone = {
        f"{at}.{name}".removeprefix(".")
        for at, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    return [(name, tensor, parts[id(tensor)]) for name, tensor in named if name not in gone]
