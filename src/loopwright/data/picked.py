"""Rows of what torch cannot read where it lies: it stays there, and the rows of a batch become a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopwright.errors import DataError

__all__ = ["ConvertedRows", "PickedRows", "SparseRows", "StackedRows", "TableRows", "array_rows", "is_sparse"]

Array = np.ndarray[Any, Any]


def is_sparse(data: object) -> bool:
    """True for a sparse matrix or array of SciPy, of any format."""
    return callable(getattr(data, "tocsr", None)) and hasattr(data, "nnz")


class PickedRows:
    """What samples can be picked from as from a tensor (samples, ...)."""

    device = torch.device("cpu")

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape, self.ndim = shape, len(shape)
        self.dtype = dtype if isinstance(dtype, torch.dtype) else torch.from_numpy(np.empty(0, dtype)).dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int) -> Tensor:
        return self.pick(torch.tensor([i], device=self.device))[0]

    def pick(self, rows: Tensor) -> Tensor:
        """A dense tensor (rows, ...), in memory of its own."""
        picked = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        self.fill(picked.numpy(), rows.numpy())
        return picked

    def fill(self, picked: Array, index: Array) -> None:
        """Write the rows of ``index`` into ``picked``."""
        raise NotImplementedError


class ConvertedRows(PickedRows):
    """Rows that ``convert`` makes of the numbers of some rows, as NumPy's: it reads no others.

    >>> array_rows(np.arange(4)[::-1]).pick(torch.tensor([0, 3]))
    tensor([3, 0])
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], convert: Callable[[Array], Array]) -> None:
        super().__init__(shape, dtype)
        self.convert = convert

    def fill(self, picked: Array, index: Array) -> None:
        picked[...] = self.convert(index)


def array_rows(array: Array, dtype: np.dtype[Any] | None = None) -> ConvertedRows:
    """Those of ``array``, in ``dtype`` or in its own, in the byte order of this machine."""
    native = (array.dtype if dtype is None else dtype).newbyteorder("=")
    return ConvertedRows(array.shape, native, lambda index: array[index])


class SparseRows(PickedRows):
    """The rows of a sparse matrix in CSR form, of which it shares the memory; those that are picked become dense.

    Of a matrix of SciPy, or a tensor. One in another form is converted once, which takes the memory of the CSR form.
    Raises DataError for a matrix that is not two-dimensional or has no numbers.

    >>> from scipy.sparse import csr_array
    >>> rows = SparseRows(csr_array([[0, 1, 0], [2, 0, 3]]), "data")
    >>> len(rows), rows.pick(torch.tensor([1, 1, 0])).tolist()
    (2, [[2, 0, 3], [2, 0, 3], [0, 1, 0]])
    """

    def __init__(self, matrix: Any, path: str) -> None:
        plain = isinstance(matrix, Tensor) or matrix.dtype.kind in "biufc"
        if len(matrix.shape) != 2 or not plain:
            raise DataError(
                f"{path} is a sparse array of shape {tuple(matrix.shape)} and dtype {matrix.dtype}; expected numbers "
                "in two dimensions, the first of which counts the samples"
            )
        super().__init__(tuple(matrix.shape), matrix.dtype)
        if isinstance(matrix, Tensor):
            self.device = matrix.device
            blocks = matrix.layout in (torch.sparse_bsr, torch.sparse_bsc)  # which torch makes CSR in two steps
            matrix = matrix.to_sparse_coo() if blocks else matrix
            self.matrix: Any = matrix if matrix.layout is torch.sparse_csr else matrix.to_sparse_csr()
        else:
            self.matrix = matrix.tocsr()  # itself, if it is one already

    def pick(self, rows: Tensor) -> Tensor:
        return _dense_rows(self.matrix, rows) if isinstance(self.matrix, Tensor) else super().pick(rows)

    def fill(self, picked: Array, index: Array) -> None:
        picked[...] = self.matrix[index].toarray()


def _dense_rows(matrix: Tensor, rows: Tensor) -> Tensor:
    """Of a CSR tensor, for which torch has no way to select rows."""
    begins, columns, values = matrix.crow_indices(), matrix.col_indices(), matrix.values()
    first = begins[rows]
    counts = begins[rows + 1] - first
    place = torch.arange(len(rows), device=rows.device).repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    at = torch.arange(len(place), device=rows.device) + (first - before)[place]
    dense = values.new_zeros(len(rows), matrix.shape[1])
    return dense.index_put_((place, columns[at]), values[at], accumulate=True)


class TableRows(PickedRows):
    """The rows of columns that lie apart in memory, which it shares; those that are picked are put side by side.

    ``dtype``, of NumPy, is that of the rows; it holds every column, which is an array, or rows to be picked itself. A
    column costs about 2 us a batch.

    >>> rows = TableRows([np.arange(3), np.array([0.5, 1.5, 2.5])], np.dtype("float64"))
    >>> rows.pick(torch.tensor([2, 0])).tolist()
    [[2.0, 2.5], [0.0, 0.5]]
    """

    def __init__(self, columns: Sequence[Array | PickedRows], dtype: np.dtype[Any]) -> None:
        super().__init__((len(columns[0]), len(columns)), dtype)
        self.columns = tuple(columns)

    def fill(self, picked: Array, index: Array) -> None:
        for i, column in enumerate(self.columns):
            if isinstance(column, PickedRows):
                column.fill(picked[:, i], index)
            else:
                picked[:, i] = column[index]


class StackedRows(PickedRows):
    """The rows of several pieces, one below the other, as those of a table in chunks.

    Each piece in which rows are picked costs as much as a table of its own.

    >>> StackedRows([array_rows(np.arange(2)), array_rows(np.array([7]))]).pick(torch.tensor([2, 0, 1]))
    tensor([7, 0, 1])
    """

    def __init__(self, pieces: Sequence[PickedRows]) -> None:
        lengths = [len(piece) for piece in pieces]
        super().__init__((sum(lengths), *pieces[0].shape[1:]), pieces[0].dtype)
        self.pieces, self._ends = tuple(pieces), np.cumsum(lengths)

    def fill(self, picked: Array, index: Array) -> None:
        where = np.searchsorted(self._ends, index, side="right")
        for number in np.unique(where).tolist():
            piece, here = self.pieces[number], np.flatnonzero(where == number)
            part = np.empty((len(here), *self.shape[1:]), picked.dtype)
            piece.fill(part, index[here] - (self._ends[number] - len(piece)))
            picked[here] = part
