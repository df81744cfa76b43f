"""Tensors that are shared out over ranks, in files: each rank writes what it holds, any number of them can read it.

The manifest says of each file which rows of which tensors are in it; ``plan`` makes these notes, ``joined`` follows
them. A file of pieces says the same in its head in the words of torch.distributed.checkpoint, whose
``HuggingFaceStorageReader`` reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from torch import Tensor

from loopwright.parallel import local, region, shard_of, whole

__all__ = ["File", "joined", "plan", "wanted"]

Notes = Mapping[str, Mapping[str, Any]]
"""By name: ``dtype`` and ``shape`` of the whole tensor, and its rows along ``dim`` from ``start`` up to ``stop``."""


class File(NamedTuple):
    """A file to be written: ``shards`` are the notes of its pieces, None where its tensors are whole."""

    name: str
    group: str
    tensors: dict[str, Tensor]
    shards: dict[str, dict[str, Any]] | None = None


def plan(groups: Mapping[str, Mapping[str, Tensor]], rank: int = 0, world: int = 1, mark: str = "") -> list[File]:
    """The files that ``rank`` of ``world`` writes of ``groups``; what is whole is written by rank 0.

    Of what is shared out in any other way than each rank a part along one dimension, the whole is written: all ranks
    must ask together. ``mark`` distinguishes the names of files from those of an older checkpoint.
    """
    files = []
    for group, named in groups.items():
        parts = {name: dim for name, tensor in named.items() if (dim := shard_of(tensor)) is not None}
        rest = {name: whole(tensor) for name, tensor in named.items() if name not in parts}
        base = quote(group, safe="")
        if not rank and (rest or not parts):
            files.append(File(f"{base}{mark}.safetensors", group, rest))
        tensors: dict[str, Tensor] = {}
        notes: dict[str, dict[str, Any]] = {}
        for name, dim in parts.items():
            shape, held = list(named[name].shape), local(named[name])
            start, stop = region(shape, dim, rank, world)
            if held.numel() or (not rank and not named[name].numel()):
                tensors[name] = held
                dtype = str(held.dtype).removeprefix("torch.")
                notes[name] = {"dtype": dtype, "shape": shape, "dim": dim, "start": start, "stop": stop}
        if tensors:
            files.append(File(f"{base}{mark}-{rank + 1:05d}-of-{world:05d}.safetensors", group, tensors, notes))
    return files


def wanted(notes: Notes, mesh: Any) -> bool:
    """True if this rank needs any of the pieces that ``notes`` tell of; without a ``mesh`` it needs all."""
    return mesh is None or any(low < high for low, high in (_overlap(note, mesh) for note in notes.values()))


def joined(parts: Iterable[tuple[Notes, Mapping[str, Tensor] | None]], mesh: Any) -> dict[str, Tensor]:
    """The tensors of pieces, each file with its notes; None for one that was not read.

    Whole ones, or with a ``mesh`` DTensors that hold this rank's rows. Raises ValueError, KeyError or TypeError unless
    the pieces of each tensor, side by side, are all of it: before memory is taken, and so that none stays unwritten.
    """
    parts = list(parts)
    pieces: dict[str, list[tuple[Mapping[str, Any], Tensor | None]]] = {}
    for notes, tensors in parts:
        if tensors is not None and tensors.keys() != notes.keys():
            raise ValueError(f"a file holds {sorted(tensors)[:4]}, and its notes tell of {sorted(notes)[:4]}")
        for name, note in notes.items():
            piece = None if tensors is None else tensors[name]
            pieces.setdefault(name, []).append((_checked(name, note, piece), piece))
    return {name: _whole(name, found, mesh) for name, found in pieces.items()}


def _checked(name: str, note: Mapping[str, Any], piece: Tensor | None) -> Mapping[str, Any]:
    shape, (dim, start, stop) = note["shape"], (note[key] for key in ("dim", "start", "stop"))
    numbers = [dim, start, stop, *shape]
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers) or not dim < len(shape):
        raise ValueError(f"the notes of {name[:200]!r} are {str(dict(note))[:200]}")
    if not isinstance(dtype := vars(torch).get(note["dtype"]), torch.dtype):  # getattr would import what a file names
        raise ValueError(f"torch has no dtype {str(note['dtype'])[:200]!r}")
    expected = [*shape[:dim], stop - start, *shape[dim + 1 :]]
    if piece is not None and (list(piece.shape), piece.dtype) != (expected, dtype):
        raise ValueError(f"{name[:200]!r} has rows of shape {list(piece.shape)}, and its notes tell of {expected}")
    return note


def _whole(name: str, found: list[tuple[Mapping[str, Any], Tensor | None]], mesh: Any) -> Tensor:
    found.sort(key=lambda pair: (pair[0]["start"], pair[0]["stop"]))
    note, end = found[0][0], 0
    shape, dim = note["shape"], note["dim"]
    for other, _ in found:
        same = all(other[key] == note[key] for key in ("dtype", "shape", "dim"))
        if not same or other["start"] != end or other["stop"] < end:
            raise ValueError(f"the pieces of {name[:200]!r} do not fit together after its first {end} rows")
        end = other["stop"]
    if end != shape[dim]:
        raise ValueError(f"the pieces of {name[:200]!r} make {end} rows of {shape[dim]}")
    low, high = (0, shape[dim]) if mesh is None else _overlap({**note, "start": 0, "stop": shape[dim]}, mesh)
    tensor = torch.empty([*shape[:dim], high - low, *shape[dim + 1 :]], dtype=vars(torch)[note["dtype"]])
    for other, piece in found:
        start, stop = max(low, other["start"]), min(high, other["stop"])
        if start < stop:
            if piece is None:
                raise ValueError(f"rows of {name[:200]!r} were not read")
            rows = piece.narrow(dim, start - other["start"], stop - start)
            tensor.narrow(dim, start - low, stop - start).copy_(rows)
    return tensor if mesh is None or dim else _as_part(tensor, shape, mesh)


def _overlap(note: Mapping[str, Any], mesh: Any) -> tuple[int, int]:
    """Which rows of a piece this rank of ``mesh`` holds; all of them where it is not cut along dimension 0."""
    if note["dim"] != 0:
        return note["start"], note["stop"]
    low, high = region(note["shape"], 0, mesh.get_local_rank(), mesh.size())
    return max(low, note["start"]), max(low, min(high, note["stop"]))


def _as_part(tensor: Tensor, shape: list[int], mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    stride = torch.empty(shape, device="meta").stride()
    held = tensor.to(mesh.device_type)
    return DTensor.from_local(held, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)
