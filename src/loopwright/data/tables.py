"""Tables and columns of pandas and Arrow as they lie in memory, in however many pieces; nothing of them is copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from loopwright.data.picked import ConvertedRows, PickedRows, StackedRows, TableRows, array_rows
from loopwright.errors import DataError
from loopwright.written import warn

__all__ = ["arrow_column", "arrow_rows", "frame_rows", "is_arrow", "is_frame", "is_table", "say_if_misaligned"]

Rows = np.ndarray[Any, Any] | PickedRows
_NUMBERS = "biuf"
_FLOAT = np.dtype("float64")  # of whole numbers and truths of which some are missing


def is_frame(data: object) -> bool:
    """True for a data frame or series of pandas."""
    return callable(getattr(data, "to_numpy", None)) and hasattr(data, "iloc")


def say_if_misaligned(data: Any) -> None:
    """Warn where tables that are paired by position have the same labels in another order."""
    parts = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, tuple) else ()
    frames = [(key, part.index) for key, part in parts if is_frame(part)]
    for key, index in frames[1:]:
        (first, labels) = frames[0]
        if len(index) == len(labels) and not index.equals(labels) and bool(index.isin(labels).all()):
            warn(
                f"the rows of data[{first!r}] and data[{key!r}] are paired by their position, and their indices hold "
                "the same labels in another order. If they belong together by label, bring them into one order first, "
                "such as y = y.loc[X.index]; if not, drop the labels: y.reset_index(drop=True)"
            )


def is_table(data: object) -> bool:
    """True for an Arrow table or record batch."""
    return callable(getattr(data, "itercolumns", None)) and hasattr(data, "column_names")


def is_arrow(data: object) -> bool:
    """True for an Arrow array, in one piece or in chunks."""
    kind = type(data)
    return all(hasattr(kind, name) for name in ("null_count", "type", "take", "to_numpy"))


def frame_rows(frame: Any, path: str) -> Rows:
    """A data frame (samples, columns) or series (samples): itself as an array, where it lies in memory in one piece.

    Otherwise its columns stay where they are. Nullable ones are converted for the rows of a batch (about 15 us each);
    what is missing becomes nan, and whole numbers of which some are missing, or which stand beside others that are
    nullable, become float64. Raises DataError for columns that are not numbers, naming them, and where there are none.
    """
    columns = list(frame.dtypes.items()) if frame.ndim == 2 else [(frame.name, frame.dtype)]  # a name may come twice
    _check_columns(
        len(columns),
        [f"{name!r} ({dtype})" for name, dtype in columns if getattr(dtype, "kind", "O") not in _NUMBERS],
        path,
        'frame["name"].astype("category").cat.codes',
    )
    if all(isinstance(one, np.dtype) for _, one in columns) and _is_one_piece(frame):
        return frame.to_numpy()  # type: ignore[no-any-return]
    apart = [frame] if frame.ndim == 1 else [frame.iloc[:, i] for i in range(len(columns))]
    dtype = frame.iloc[:0].to_numpy().dtype
    if dtype.kind not in _NUMBERS or (dtype.kind in "biu" and any(one.hasnans for one in apart)):
        dtype = _FLOAT
    rows = [one.to_numpy() if isinstance(one.dtype, np.dtype) else _nullable(one, dtype) for one in apart]
    return rows[0] if frame.ndim == 1 else TableRows(rows, dtype)


def _is_one_piece(frame: Any) -> bool:
    alone = frame.ndim == 1 or frame.shape[1] == 1
    return alone or np.may_share_memory(frame.iloc[:1].to_numpy(), frame.iloc[:1, 0].to_numpy())


def _nullable(series: Any, dtype: np.dtype[Any]) -> Rows:
    """A series that is no array of NumPy below; one of Arrow is as Arrow has it, in its own dtype."""
    array = series.array
    if hasattr(series.dtype, "pyarrow_dtype"):
        return arrow_column(array.__arrow_array__(), repr(series.name))

    def convert(index: Any) -> Any:
        return array.take(index).to_numpy(dtype=dtype, **({"na_value": np.nan} if dtype.kind == "f" else {}))

    return ConvertedRows((len(array),), dtype, convert)


def arrow_rows(table: Any, path: str) -> Rows:
    """An Arrow table or record batch (samples, columns), whose dtype holds all columns; chunks stay where they are.

    As ``arrow_column`` has it for each column. Raises DataError for columns that are not numbers, naming them, and
    where there are none.
    """
    kinds = {field.name: field.type for field in table.schema}
    wrong = [f"{name!r} ({kind})" for name, kind in kinds.items() if _kind_of(kind) not in _NUMBERS]
    _check_columns(len(kinds), wrong, path, 'table["name"].dictionary_encode().combine_chunks().indices')
    dtypes = [_arrow_dtype(column) for column in table.itercolumns()]
    batches = [one for one in table.to_batches() if len(one)] if hasattr(table, "to_batches") else [table]
    pieces = [_side_by_side(one.columns, dtypes) for one in batches]
    if not pieces:
        return np.empty((0, len(dtypes)), np.result_type(*dtypes))
    return pieces[0] if len(pieces) == 1 else _stacked(pieces)


def _side_by_side(columns: Any, dtypes: list[np.dtype[Any]]) -> Rows:
    """One record batch."""
    rows = [_arrow_piece(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)]
    if len(rows) == 1 and isinstance(rows[0], np.ndarray):
        return rows[0][:, None]
    return TableRows(rows, np.result_type(*dtypes))


def arrow_column(column: Any, path: str) -> Rows:
    """An Arrow array (samples), in one piece or in chunks, which stay where they are.

    Truths, which Arrow keeps as bits, and pieces in which a value is missing are converted for the rows of a batch:
    what is missing becomes nan, and whole numbers of which some are missing float64. Raises DataError for what is no
    number.
    """
    if _kind_of(column.type) not in _NUMBERS:
        raise DataError(f"{path} is an Arrow array of {column.type}; expected numbers or booleans")
    dtype = _arrow_dtype(column)
    pieces = [_arrow_piece(one, dtype) for one in getattr(column, "chunks", [column]) if len(one)]
    if not pieces:
        return np.empty(0, dtype)
    return pieces[0] if len(pieces) == 1 else _stacked(pieces)


def _arrow_piece(array: Any, dtype: np.dtype[Any]) -> Rows:
    if array.null_count == 0 and array.type.bit_width > 1:
        values: np.ndarray[Any, Any] = array.to_numpy(zero_copy_only=True)
        return values if values.dtype == dtype else array_rows(values, dtype)  # values are missing in another piece
    return ConvertedRows(
        (len(array),), dtype, lambda index: array.take(index).to_numpy(zero_copy_only=False).astype(dtype, copy=False)
    )


def _arrow_dtype(column: Any) -> np.dtype[Any]:
    dtype = np.dtype(column.type.to_pandas_dtype())
    return _FLOAT if column.null_count and dtype.kind in "biu" else dtype


def _kind_of(kind: Any) -> str:
    """The letter that NumPy has for an Arrow type."""
    try:
        return str(np.dtype(kind.to_pandas_dtype()).kind)
    except NotImplementedError:
        return "O"


def _stacked(pieces: list[Rows]) -> PickedRows:
    return StackedRows([one if isinstance(one, PickedRows) else array_rows(one) for one in pieces])


def _check_columns(count: int, wrong: list[str], path: str, how: str) -> None:
    if not count:
        raise DataError(f"{path} is a table without columns; leave it out, or choose others")
    if wrong:
        raise DataError(
            f"{path} has columns that are not numbers: {', '.join(wrong)}. Turn them into numbers first, as in {how}, "
            "or drop them"
        )
