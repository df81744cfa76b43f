"""Tensors of which every rank holds a part: torch's DTensor, whole ones from it and back, and who holds which rows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

__all__ = ["is_shard", "like", "local", "region", "shard_of", "spans", "whole"]


def is_shard(value: object) -> bool:
    """True for a DTensor. Where nobody has imported its module, which takes seconds, there is none.

    >>> import torch
    >>> is_shard(torch.zeros(2))
    False
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local(tensor: Any) -> Tensor:
    """What this rank holds of ``tensor``."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[no-any-return]


def whole(tensor: Any) -> Tensor:
    """All of ``tensor``, plain; of a DTensor, all ranks must ask for it together."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[no-any-return]


def shard_of(tensor: Any) -> int | None:
    """The dimension along which all ranks share ``tensor`` out, each a part; None where it is held in any other way."""
    if not is_shard(tensor) or not spans(tensor.device_mesh):
        return None
    (placement,) = tensor.placements
    return int(placement.dim) if type(placement).__name__ == "Shard" else None


def spans(mesh: Any) -> bool:
    """True if ``mesh`` is all ranks in a row."""
    return bool(mesh.ndim == 1 and mesh.size() == dist.get_world_size())


def region(shape: Sequence[int], dim: int, rank: int, world: int) -> tuple[int, int]:
    """First and one past the last row along ``dim`` that ``rank`` of ``world`` holds, as ``torch.chunk`` cuts.

    >>> [region((5, 2), 0, rank, 4) for rank in range(4)]
    [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    size = shape[dim]
    step = -(-size // world)
    return min(step * rank, size), min(step * (rank + 1), size)


def like(own: Any, value: Any) -> Any:
    """``value`` held as ``own`` is: cut where that is a DTensor, whole where it is not.

    Both have the same shape. All ranks must ask together.
    """
    if not isinstance(own, Tensor) or not isinstance(value, Tensor) or own.shape != value.shape:
        return value
    if not is_shard(own):
        return whole(value)
    return _cut(own, value)


def _cut(own: Any, value: Any) -> Any:
    """``value`` placed as ``own`` is; where all ranks have it whole, nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = own.device_mesh, own.placements
    if is_shard(value):
        return value if value.placements == placements else value.redistribute(mesh, placements)
    return distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None)
