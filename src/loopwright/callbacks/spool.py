"""Rows of arrays that wait on disk: written batch by batch, and at the end as one file."""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from loopwright.errors import DataError

__all__ = ["FORMATS", "Spool"]

_ROWS = 4096  # that are written at a time


class Spool:
    """Columns by name, each in a temporary file without a name, which is gone when the process is.

    >>> spool = Spool()
    >>> spool.add({"y": np.array([0.5, 1.5])})
    >>> spool.add({"y": np.array([2.5])})
    >>> spool.write_csv(Path("y.csv"))
    >>> Path("y.csv").read_text().split()
    ['y', '0.5', '1.5', '2.5']
    """

    def __init__(self) -> None:
        self._files: dict[str, IO[bytes]] = {}
        self._kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self.rows: dict[str, int] = {}

    def add(self, columns: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Append a batch; raises DataError where names, dtypes or the shapes of a row are not those of before."""
        if self._files and columns.keys() != self._files.keys():
            raise DataError(f"a batch of predictions has {sorted(columns)}, those before had {sorted(self._files)}")
        for name, column in columns.items():
            kind = (column.dtype, column.shape[1:])
            known = self._kinds.setdefault(name, kind)
            if kind != known:
                raise DataError(
                    f"{name!r} has rows of {kind[0]} {list(kind[1])}, those of batches before were {known[0]} "
                    f"{list(known[1])}; make them alike, such as by padding, before they are returned"
                )
            if name not in self._files:
                self._files[name], self.rows[name] = tempfile.TemporaryFile(), 0  # noqa: SIM115 - closed by close()
            self._files[name].write(np.ascontiguousarray(column).tobytes())
            self.rows[name] += len(column)

    def close(self) -> None:
        """Drop everything."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __del__(self) -> None:
        self.close()  # of an evaluation that an error has ended

    def write_npz(self, path: Path) -> None:
        """All columns as an npz file, which ``numpy.load`` reads without pickle."""
        with _whole(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            for name, file in self._files.items():
                dtype, tail = self._kinds[name]
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False,
                          "shape": (self.rows[name], *tail)}  # fmt: skip
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    file.seek(0)
                    shutil.copyfileobj(file, member, 1 << 20)

    def write_csv(self, path: Path) -> None:
        """One line a row, a column for each number; raises DataError for rows that are no vectors."""
        heads: list[str] = []
        for name, (_, tail) in self._kinds.items():
            if len(tail) > 1:
                raise DataError(
                    f"{name!r} has rows of shape {list(tail)}, which no line of CSV holds; use format='npz'"
                )
            heads += [f"{name}_{i}" for i in range(tail[0])] if tail else [name]
        if len(set(self.rows.values())) > 1:
            raise DataError(f"columns of different length cannot be lines of CSV: {self.rows}; use format='npz'")
        with _whole(path) as part, part.open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out)
            writer.writerow(heads)
            for file in self._files.values():
                file.seek(0)
            left = next(iter(self.rows.values()), 0)
            while left > 0:
                count = min(left, _ROWS)
                columns = [self._read(name, count).reshape(count, -1).astype(str) for name in self._files]
                writer.writerows(np.concatenate(columns, axis=1).tolist())
                left -= count

    def _read(self, name: str, count: int) -> np.ndarray[Any, Any]:
        dtype, tail = self._kinds[name]
        size = count * int(np.prod(tail, dtype=int)) * dtype.itemsize
        return np.frombuffer(self._files[name].read(size), dtype).reshape(count, *tail)


FORMATS = {"npz": Spool.write_npz, "csv": Spool.write_csv}


class _whole:  # noqa: N801 - reads as a verb
    """A file that is there when it is complete, or not at all."""

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(f".{path.name}.part")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.part

    def __exit__(self, kind: type[BaseException] | None, *args: object) -> None:
        if kind is None:
            os.replace(self.part, self.path)
        else:
            self.part.unlink(missing_ok=True)
