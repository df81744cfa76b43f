"""A group of named tensors as one safetensors file, and back; tied and strided tensors keep their meaning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from loopwright.checkpoint.encode import same_memory
from loopwright.errors import CheckpointError

__all__ = ["pack", "unpack"]

# what every reader of the format knows; others are stored as their bytes, and their type in the notes
_NATIVE = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip


def pack(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a safetensors file, and notes: what the format cannot say, for ``unpack``.

    ``notes["aliases"]`` maps names to the stored name whose memory they share. ``notes["tensors"]`` has the
    stride of dense tensors in another order than row by row (channels_last), and dtype and shape of those
    kept as raw bytes.
    """
    aliases: dict[str, str] = {}
    details: dict[str, dict[str, Any]] = {}
    stored: dict[str, Tensor] = {}
    seen: dict[Any, str] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        memory = same_memory(tensor)
        if memory is not None and seen.setdefault(memory, name) != name:
            aliases[name] = seen[memory]
            continue
        stored[name], detail = _plain(tensor)
        if detail:
            details[name] = detail
        start = stored[name].untyped_storage().data_ptr()
        if start in taken:  # a view of what another name holds: the format refuses memory that overlaps
            stored[name] = stored[name].clone()
        taken.add(start)
    data = save(stored, metadata={"format": "pt", **aliases})  # aliases as safetensors.torch.load_model reads them
    return data, {key: value for key, value in (("aliases", aliases), ("tensors", details)) if value}


def _plain(tensor: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The tensor on the CPU, contiguous, of a dtype that the format has; and what this lost."""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu()
    detail: dict[str, Any] = {}
    if not tensor.is_contiguous() and is_dense(tensor.shape, tensor.stride()):
        detail["stride"] = list(tensor.stride())
    tensor = tensor.contiguous()
    if tensor.dtype not in _NATIVE:
        detail |= {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        tensor = tensor.reshape(-1).view(torch.uint8)
    return tensor, detail


def is_dense(shape: tuple[int, ...] | list[int], stride: tuple[int, ...] | list[int]) -> bool:
    """True if the elements fill their memory without holes or overlap, in any order of the dimensions."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def unpack(file: Path, notes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file with the notes of ``pack``, in fresh memory: aliases are one and the same tensor.

    Raises CheckpointError for a file or notes that do not fit each other.
    """
    try:
        # cloned: mapped tensors may lie at unaligned addresses, where kernels can give other bits
        tensors = {name: _restored(t, notes.get("tensors", {}).get(name, {})) for name, t in load_file(file).items()}
        return tensors | {name: tensors[kept] for name, kept in notes.get("aliases", {}).items()}
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read as tensors ({type(error).__name__}: {error})") from error


def _restored(tensor: Tensor, detail: Mapping[str, Any]) -> Tensor:
    tensor = tensor.clone()
    if "dtype" in detail:
        dtype = getattr(torch, detail["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"torch has no dtype {detail['dtype']!r}")
        tensor = tensor.view(dtype).reshape(detail["shape"])
    if "stride" in detail:
        stride = detail["stride"]
        if not is_dense(tensor.shape, stride):
            raise ValueError(f"stride {stride} does not fit shape {list(tensor.shape)}")
        tensor = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
    return tensor
