"""A group of named tensors as one safetensors file, and back; tied and strided tensors keep their meaning.

The format is read and written here, tensor by tensor, so that a file is hashed while it passes, is never in memory a
second time, and so that nothing is allocated before all that its header says has been checked. Any safetensors reader
reads these files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopwright.checkpoint.encode import same_memory
from loopwright.checkpoint.streams import Hashed

__all__ = ["Layout", "layout", "unpack"]

# what every reader of the format knows; others are stored as their bytes, and their type in the notes
_NATIVE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _NATIVE.items()}
_HEADER = 100_000_000  # bytes, the limit of the format
_RANK = 64  # dimensions, the limit of torch's own kernels
_SMALL = 1 << 16  # bytes: tensors below are gathered, since each write has its price
_GATHERED = 1 << 20


@dataclass(frozen=True, slots=True)
class Layout:
    """A file to be written: its header, its tensors in their order, and ``notes``: what the format cannot say."""

    header: bytes
    tensors: list[Tensor]
    notes: dict[str, Any]
    size: int  # of the file, in bytes

    def parts(self) -> Iterator[tuple[memoryview, bool]]:
        """The bytes of the file, and whether they are a copy: tensors are brought to the CPU one at a time."""
        gathered = bytearray(self.header)
        for tensor in self.tensors:
            plain = _plain(tensor)
            data = _bytes(plain)
            if len(data) < _SMALL:
                gathered += data
            if len(gathered) >= _GATHERED or (gathered and len(data) >= _SMALL):
                yield memoryview(gathered), True
                gathered = bytearray()
            if len(data) >= _SMALL:
                made = plain.data_ptr() != tensor.data_ptr()
                del plain
                yield data, made
        yield memoryview(gathered), True


def layout(tensors: Mapping[str, Tensor], offsets: Mapping[str, list[int]] | None = None) -> Layout:
    """How ``tensors`` are to be written; reads none of their values.

    ``notes["aliases"]`` maps names to the stored name whose memory they share. ``notes["tensors"]`` has the
    stride of dense tensors in another order than row by row (channels_last), and dtype and shape of those
    kept as raw bytes. ``offsets``: where in the whole tensors these begin, if they are pieces.
    """
    aliases: dict[str, str] = {}
    details: dict[str, dict[str, Any]] = {}
    seen: dict[Any, str] = {}
    for name, tensor in tensors.items():
        memory = same_memory(tensor)
        if memory is not None and seen.setdefault(memory, name) != name:
            aliases[name] = seen[memory]
        elif detail := _detail(tensor):
            details[name] = detail
    stored = [(name, tensor) for name, tensor in tensors.items() if name not in aliases]
    stored.sort(key=lambda pair: -pair[1].element_size())  # so that each begins at a multiple of its element size
    metadata = {"format": "pt", **aliases}  # as safetensors.torch.load_model reads it
    if offsets is not None:  # as torch.distributed.checkpoint's HuggingFaceStorageReader does
        metadata["DCP_SHARDING_INFO"] = json.dumps({name: {"saved_offsets": at} for name, at in offsets.items()})
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in stored:
        start, end = end, end + tensor.numel() * tensor.element_size()
        raw = "dtype" in details.get(name, {})
        shape = [end - start] if raw else list(tensor.shape)
        entries[name] = {"dtype": "U8" if raw else _CODES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    notes = {key: value for key, value in (("aliases", aliases), ("tensors", details)) if value}
    return Layout(header, [tensor for _, tensor in stored], notes, len(header) + end)


def _detail(tensor: Tensor) -> dict[str, Any]:
    """What the format loses of a tensor."""
    detail: dict[str, Any] = {}
    if not tensor.is_contiguous() and is_dense(tensor.shape, tensor.stride()):
        detail["stride"] = list(tensor.stride())
    if tensor.dtype not in _CODES:
        detail |= {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    return detail


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, to read or to fill."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def is_dense(shape: tuple[int, ...] | list[int], stride: tuple[int, ...] | list[int]) -> bool:
    """True if the elements fill their memory without holes or overlap, in any order of the dimensions."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def unpack(file: Hashed, size: int, notes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file of ``size`` bytes with the notes of ``layout``: aliases are one and the same tensor.

    Raises ValueError, KeyError or TypeError for a file or notes that do not fit each other, before memory is taken.
    """
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, _HEADER):
        raise ValueError(f"a header of {length:,} bytes in a file of {size:,}, at most {_HEADER:,}")
    header: Any = json.loads(file.read(length).decode())
    details, aliases = notes.get("tensors", {}), notes.get("aliases", {})
    end, found = 0, []
    for name, entry in sorted(_entries(header), key=lambda pair: pair[1]["data_offsets"]):
        dtype, shape = _NATIVE[entry["dtype"]], _shape(entry["shape"])
        start, stop = entry["data_offsets"]
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name[:200]!r} of shape {shape} lies at {start} to {stop}, and {end} is where it begins")
        found.append((name, dtype, shape))
        end = stop
    if end != size - 8 - length:
        raise ValueError(f"the header describes {end:,} bytes, and {size - 8 - length:,} follow it")
    tensors = {name: _restored(_tensor(file, dtype, shape), details.get(name, {})) for name, dtype, shape in found}
    return tensors | {name: tensors[kept] for name, kept in aliases.items()}


def _entries(header: Any) -> list[tuple[str, Any]]:
    pairs = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for name, entry in pairs:
        offsets = entry["data_offsets"]
        if len(offsets) != 2 or not all(type(at) is int for at in offsets):
            raise ValueError(f"{name[:200]!r} lies at {str(offsets)[:200]}")
    return pairs


def _shape(shape: Any) -> list[int]:
    if not isinstance(shape, list) or len(shape) > _RANK or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise ValueError(f"a shape of {str(shape)[:200]}; at most {_RANK} dimensions")
    return shape


def _tensor(file: Hashed, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """The next tensor of a file, in memory of its own: kernels may give other bits where memory is not aligned."""
    tensor = torch.empty(shape, dtype=dtype)
    view = _bytes(tensor)
    if file.fill(view) != len(view):
        raise ValueError("the file ends inside a tensor")
    return tensor


def _restored(tensor: Tensor, detail: Mapping[str, Any]) -> Tensor:
    if "dtype" in detail:
        dtype = vars(torch).get(detail["dtype"])  # getattr would import what a file names
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"torch has no dtype {detail['dtype']!r}")
        tensor = tensor.view(dtype).reshape(_shape(detail["shape"]))
    if "stride" in detail:
        stride = detail["stride"]
        if not is_dense(tensor.shape, stride):
            raise ValueError(f"stride {stride} does not fit shape {list(tensor.shape)}")
        tensor = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
    return tensor
