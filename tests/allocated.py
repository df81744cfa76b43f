"""Memory that a block of code takes, in bytes: of NumPy and Python, of Arrow, and of torch, whoever asks for it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocated(TorchDispatchMode):
    """``with Allocated() as made``: afterwards ``made.peak`` is the most that was held at one time.

    Of torch counts the largest piece of memory that an operation gave, and that was no part of what it was given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.arrays = self.arrow = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {piece.data_ptr() for piece in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        new = [piece.nbytes() for piece in _storages(result) if piece.data_ptr() not in given]
        self.largest = max([self.largest, *new])
        return result

    def __enter__(self) -> Allocated:
        self._before = pa.default_memory_pool()
        self._pool = pa.proxy_memory_pool(self._before)
        pa.set_memory_pool(self._pool)
        tracemalloc.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.arrays = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        self.arrow = self._pool.max_memory()
        pa.set_memory_pool(self._before)

    @property
    def peak(self) -> int:
        return self.arrays + self.arrow + self.largest


def _storages(value: Any) -> Iterator[Any]:
    for one in tree_leaves(value):
        if isinstance(one, Tensor) and one.layout is torch.sparse_csr:
            yield from _storages((one.crow_indices(), one.col_indices(), one.values()))
        elif isinstance(one, Tensor) and one.layout is torch.strided:
            yield one.untyped_storage()
