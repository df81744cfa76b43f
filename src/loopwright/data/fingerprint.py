"""Which data this is: its length, its columns and a sampled hash, to be compared when a run goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from loopwright.data.arrays import as_tensors, is_array
from loopwright.data.picked import PickedRows, is_sparse
from loopwright.data.tables import is_table

__all__ = ["changes", "fingerprint", "innermost"]

_SMALL = 4096  # elements up to which all are hashed
_BLOCKS, _RUN = 32, 16  # else so many runs of neighbours, at fixed places from the first element to the last


def fingerprint(data: Any) -> dict[str, Any]:
    """What tells ``data`` from other data, as plain data for JSON. It costs well below 1 ms and changes nothing.

    Of arrays: ``length``, dtype and shape of each column, and ``content``, a hash of 512 elements of each at fixed
    places (of all, up to 4,096): changing a few values elsewhere goes unseen. Of a dataset: its class, length, and
    the same of its attributes that have one entry a sample (``data``, ``targets``, ``samples``); no sample is read,
    since that could draw random numbers, open files before workers start, or take long. Of a loader: its batch size
    and its dataset. Of an iterator or generator function: its name; nothing is read. An object with a method
    ``fingerprint()`` is asked itself.

    >>> fingerprint(torch.arange(6.0).view(3, 2))
    {'kind': 'arrays', 'length': 3, 'columns': {'': 'torch.float32 (3, 2)'}, 'content': 'c1337aac180713d9'}
    """
    own = getattr(data, "fingerprint", None)
    if callable(own) and not isinstance(data, type):
        return dict(own())
    inner = _inner(data)
    if inner is not None:
        return _batching(data) | fingerprint(inner)
    if type(data) is TensorDataset:
        data = data.tensors
    if is_array(data) and not isinstance(data, list):
        return _of_columns(dict(_columns(data, "")))
    if isinstance(data, (list, tuple, range)):
        few = [data[i] for i in _places(len(data), 4)]
        return {"kind": "list of batches", "batches": len(data), "content": _hash(*map(_batch_bytes, few))}
    return _of_dataset(data)


def changes(saved: Mapping[str, Any], now: Mapping[str, Any], what: str = "the training data") -> list[str]:
    """In words, how data with the fingerprint ``now`` differs from that of a checkpoint; empty if it does not.

    >>> changes(fingerprint(torch.zeros(1200, 3)), fingerprint(torch.zeros(1000, 3)))
    ['the training data has 1,000 samples, and had 1,200 when the checkpoint was written']
    """
    told = []
    if saved.get("kind") != now.get("kind"):
        told.append(f"{what} is {now.get('kind')}, and was {saved.get('kind')} when the checkpoint was written")
    for name, says, said, unit in (
        ("length", "has", "had", "samples"),
        ("batches", "has", "had", "batches"),
        ("batch_size", "gives", "gave", "samples a batch"),
    ):
        was, at = saved.get(name), now.get(name)
        if None not in (was, at) and was != at:
            told.append(f"{what} {says} {at:,} {unit}, and {said} {was:,} when the checkpoint was written")
    told += _column_changes(saved.get("columns") or {}, now.get("columns") or {}, what, bool(told))
    before, after = saved.get("sources") or {}, now.get("sources") or {}
    told += [f"{what} has no source {name!r} any more" for name in before if name not in after]
    told += [f"{what} has a new source {name!r}" for name in after if name not in before]
    for name in before.keys() & after.keys():
        told += changes(before[name], after[name], f"source {name!r} of {what}")
    if not told and None not in (saved.get("content"), now.get("content")) and saved["content"] != now["content"]:
        told.append(f"{what} has other values than when the checkpoint was written, in the same number and shape")
    return told


# ------------------------------------------------------------------------------------------------- what data is made of


def _inner(data: Any) -> Any:
    """What a loader or an adapter reads; None for what reads nothing else."""
    if type(data).__module__.startswith("loopwright."):
        return data.loader if hasattr(data, "loader") else getattr(data, "data", None)
    return data.dataset if hasattr(data, "dataset") and hasattr(data, "batch_size") else None


def innermost(data: Any) -> Any:
    """What is read in the end: ``data`` itself, or the dataset or the arrays of a loader or an adapter."""
    while (inner := _inner(data)) is not None:
        data = inner
    return data


def _batching(loader: Any) -> dict[str, Any]:
    size = getattr(loader, "batch_size", None)
    return {"batch_size": size} if isinstance(size, int) else {}


def _of_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    first = next(iter(columns.values()))
    return {
        "kind": "arrays",
        "length": int(first.shape[0]) if first.ndim else None,
        "columns": {path: _described(one) for path, one in columns.items()},
        "content": _hash(*(_column_bytes(one) for one in columns.values())),
    }


def _of_dataset(data: Any) -> dict[str, Any]:
    told: dict[str, Any] = {"kind": getattr(data, "__qualname__", None) or type(data).__name__}
    length = _length(data)
    told |= {} if length is None else {"length": length}
    known = getattr(data, "_fingerprint", None)  # Hugging Face datasets hash themselves
    if isinstance(known, str):
        return told | {"content": known}
    held = {
        name: value
        for name, value in sorted(getattr(data, "__dict__", {}).items())
        if length and _length(value) == length and (is_array(value) or _is_plain(value))
    }
    parts = [name.encode() + _bytes(value) for name, value in held.items()]
    below = getattr(data, "datasets", None) or [getattr(data, "dataset", None)]  # of ConcatDataset, of Subset
    parts += [repr(fingerprint(one)).encode() for one in list(below)[:_BLOCKS] if one is not None]
    columns = {f".{name}": _described(one) for name, one in held.items() if isinstance(one, (Tensor, np.ndarray))}
    return told | ({"columns": columns} if columns else {}) | ({"content": _hash(*parts)} if parts else {})


def _columns(data: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping) and not is_sparse(data):
        for key, part in data.items():
            yield from _columns(part, f"{path}[{key!r}]")
    elif isinstance(data, (list, tuple)):
        for i, part in enumerate(data):
            yield from _columns(part, f"{path}[{i}]")
    elif is_table(data):
        yield from _columns(dict(zip(data.column_names, data.itercolumns(), strict=True)), path)
    else:
        known = isinstance(data, (Tensor, np.ndarray)) or hasattr(data, "iloc") or is_sparse(data)
        yield path, data if known or not is_array(data) else as_tensors(data)


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        return None


def _is_plain(value: Any) -> bool:
    """A list of numbers, texts or tuples of them, as far as its first entry tells."""
    first = value[0] if isinstance(value, (list, tuple)) and value else None
    return isinstance(first, (str, int, float)) or (
        isinstance(first, (list, tuple)) and all(isinstance(part, (str, int, float)) for part in first)
    )


def _described(column: Any) -> str:
    shape = f"({', '.join(map(str, column.shape))})"
    if hasattr(column, "columns"):  # a data frame
        return f"{', '.join(f'{name} {dtype}' for name, dtype in list(column.dtypes.items())[:100])} {shape}"
    kind = f"{'' if isinstance(column, (Tensor, PickedRows)) else 'torch.'}{column.dtype}"
    if is_sparse(column):
        return f"sparse {kind} {shape}" + ("" if column.format == "csr" else f", {column.format}")
    return f"{kind} {shape}"


# --------------------------------------------------------------------------------------------------- sampled contents


def _places(count: int, most: int) -> list[int]:
    """``most`` positions spread evenly over ``range(count)``, the first and the last among them."""
    return list(range(count)) if count <= most else [i * (count - 1) // (most - 1) for i in range(most)]


def _bytes(value: Any) -> bytes:
    if is_array(value) and not isinstance(value, (list, tuple, Mapping)):
        return _column_bytes(value)
    return _told([value[i] for i in _places(len(value), _BLOCKS * _RUN)])


def _told(values: list[Any]) -> bytes:
    """Numbers and texts as they are, of anything else its type: many objects print their address."""
    plain = (str, bytes, int, float, type(None), tuple, list)
    return repr([value if isinstance(value, plain) else type(value).__name__ for value in values]).encode()


def _column_bytes(column: Any) -> bytes:
    if hasattr(column, "iloc"):
        return _told(column.iloc[_places(len(column), _BLOCKS)].to_numpy().ravel().tolist())
    if is_sparse(column):
        return b"".join(map(_column_bytes, _parts_of(column)))
    if isinstance(column, PickedRows):
        few = len(column) <= _SMALL
        return _column_bytes(column.pick(torch.arange(len(column)) if few else torch.from_numpy(_flat(len(column)))))
    if isinstance(column, Tensor) and column.layout is not torch.strided:
        return b"".join(map(_column_bytes, _parts_of_sparse(column)))
    size = int(column.numel() if isinstance(column, Tensor) else column.size)
    if isinstance(column, Tensor) and (column.is_quantized or column.is_conj()):
        return b""
    if size <= _SMALL:
        chosen: Any = column.reshape(-1)
    else:
        chosen = column[_index(size, column)]
    if isinstance(chosen, Tensor):
        return chosen.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes() if size else b""
    return _told(chosen.tolist()) if chosen.dtype.hasobject else np.ascontiguousarray(chosen).tobytes()


def _index(size: int, column: Any) -> Any:
    """The places as an index of each dimension: gathers from any strides without a copy of the whole."""
    index = np.unravel_index(_flat(size), tuple(column.shape))
    return tuple(torch.from_numpy(i).to(column.device) for i in index) if isinstance(column, Tensor) else index


def _flat(size: int) -> Any:
    return np.concatenate([np.arange(start, start + _RUN) for start in _places(size - _RUN + 1, _BLOCKS)])


def _parts_of(matrix: Any) -> Iterator[Any]:
    """The arrays that hold a matrix of SciPy: of CSR values, columns, and where rows begin."""
    for name in ("data", "indices", "indptr", "row", "col", "rows", "offsets"):
        one = getattr(matrix, name, None)
        if isinstance(one, np.ndarray):
            yield one


def _parts_of_sparse(tensor: Tensor) -> list[Tensor]:
    """Those that hold a tensor; none of one that would have to be added up first, or whose layout is another."""
    if tensor.layout is torch.sparse_coo:
        return [tensor.indices(), tensor.values()] if tensor.is_coalesced() else []
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.values(), tensor.col_indices(), tensor.crow_indices()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.values(), tensor.row_indices(), tensor.ccol_indices()]
    return []


def _batch_bytes(batch: Any) -> bytes:
    return b"".join(_column_bytes(one) for _, one in _columns(batch, "") if isinstance(one, (Tensor, np.ndarray)))


def _hash(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- changes in words


def _column_changes(saved: Mapping[str, str], now: Mapping[str, str], what: str, longer: bool) -> list[str]:
    told = []
    for path in {**saved, **now}:
        was, at = saved.get(path), now.get(path)
        if longer and was and at:  # another length has been told: what is left of the shapes
            was, at = _without_length(was), _without_length(at)
        if was != at:
            name = f"data{path} of {what}" if path else what
            told.append(f"{name} is {at or 'missing'}, and was {was or 'not there'} when the checkpoint was written")
    return told


def _without_length(column: str) -> str:
    kind, _, shape = column.rpartition(" (")
    return f"{kind} (any{shape[shape.index(',') :] if ',' in shape else ')'}"
