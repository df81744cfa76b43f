"""Records as lines of JSON: the log file that every run folder has."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from loopwright.errors import DataError, elsewhere
from loopwright.folder import put
from loopwright.loggers.files import keep_artifact, keep_figure, keep_text
from loopwright.loggers.tracking import run_label
from loopwright.state import Progress, Run

__all__ = ["NON_FINITE", "JSONLLogger", "read_jsonl", "read_whole_lines", "unreadable"]

NON_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
_encode = json.JSONEncoder(allow_nan=False, default=float, check_circular=False).encode  # else twice the cost


class JSONLLogger:
    """Appends one JSON object a record to ``metrics.jsonl`` in the run's folder, or to ``path``.

    ``{"kind": "train", "step": 50, "epoch": 2, "samples": 3200, "seconds": 0.81, "train/loss": 0.3, "lr":
    0.001}``; ``kind`` is "train", "valid", "epoch" or "test". NaN and infinities, which JSON does not have,
    are written as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which ``float()`` of Python
    and ``Number()`` of JavaScript take; ``read_jsonl`` gives them back as numbers.

    A ``path`` may be that of many runs, one after the other: each record says of which one it is, ``"run":
    "digits/20261121-101500-1a2b3c"``, the end of its folder. A record is with the operating system when
    ``log`` returns: it survives the end of the process, however it ends, but not that of the machine. A
    resumed run drops those of its records that its checkpoint did not know, so that none is there twice.
    Figures, texts and files are kept beside it. A Trainer without a folder refuses one without a
    ``path``. Of several processes only rank 0 writes.

    >>> logger = JSONLLogger("metrics.jsonl")
    >>> logger.log(Progress(step=50), {"train/loss": float("nan")}, "train")
    >>> read_jsonl("metrics.jsonl")
    [{'kind': 'train', 'step': 50, 'epoch': 0, 'samples': 0, 'seconds': 0.0, 'train/loss': nan}]
    """

    @elsewhere()
    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = path
        self._target = None if path is None else Path(path)
        self._file: FileIO | None = None
        self._size = 0
        self._label = ""  # of the run in a file of many
        self._records = 0  # of this run
        self._keep: int | None = None

    def start(self, run: Run) -> None:
        """Open the file for ``run``; after ``load_state_dict``, cut it to what the checkpoint knew."""
        self.close(run.status)
        path = self.path if self.path is not None else run.folder and run.folder / "metrics.jsonl"
        self._target = Path(path) if path and run.comm.rank == 0 else None
        self._size, before = 0, self._label
        if self.path is not None:
            self._label = run_label(run, before)
            self._records = self._records if self._keep is not None or self._label == before else 0
        if self._target is not None:
            if self._label and self._keep is not None:
                _drop(self._target, self._label, self._records)
                self._keep = None
            self._file, self._size = _open(self._target, self._keep)
        self._keep = None

    def log(self, progress: Progress, values: Mapping[str, float], kind: str) -> None:
        """Write one record."""
        if self._target is None:
            return
        record: dict[str, Any] = {
            "kind": kind,
            "step": progress.step,
            "epoch": progress.epoch,
            "samples": progress.samples,
            "seconds": round(progress.seconds, 6),
            **values,
        }
        if self._label:
            record = {"run": self._label, **record}
        try:
            text = _encode(record)
        except ValueError:  # NaN or infinite: looking for them in each record would cost more
            text = _encode({name: _finite(value) for name, value in record.items()})
        line = text.encode() + b"\n"
        if self._file is None:  # outside of a run, such as the values of a test afterwards
            file, _ = _open(self._target, None)
            with file:
                file.write(line)
            return
        try:
            rest = memoryview(line)
            while rest:  # a full disk may take a part of it
                rest = rest[self._file.write(rest) :]
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._size)
            raise
        self._size += len(line)
        self._records += 1

    def log_figure(self, progress: Progress, name: str, figure: Any) -> None:
        """Write ``figures/<name>-<step>.png`` beside the records."""
        if self._target is not None:
            keep_figure(self._target.parent, progress, name, figure)

    def log_text(self, progress: Progress, name: str, text: str) -> None:
        """Write ``texts/<name>-<step>.txt`` beside the records."""
        if self._target is not None:
            keep_text(self._target.parent, progress, name, text)

    def log_artifact(self, progress: Progress, name: str, path: Path) -> None:
        """Copy a file or a folder to ``artifacts/<name>/`` beside the records."""
        if self._target is not None:
            keep_artifact(self._target.parent, name, path)

    def close(self, status: str) -> None:
        """Close the file; a later ``log`` still appends to it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def state_dict(self) -> dict[str, Any]:
        """How long the file is, in bytes; of one of many runs, how many records this run has in it."""
        return {"size": self._size, **({"run": self._label, "records": self._records} if self._label else {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next ``start`` cut the file to the length that ``state`` knew."""
        self._keep = int(state["size"])
        self._label, self._records = str(state.get("run", "")), int(state.get("records", 0))


def _open(path: Path, keep: int | None) -> tuple[FileIO, int]:
    """``path`` ready to append to, with whole lines only and at most ``keep`` bytes, and its length."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b", buffering=0)
    size = file.seek(0, os.SEEK_END)
    if keep is not None and keep < size:
        size = keep
    file.truncate(_whole_lines(file, size))
    return file, file.seek(0, os.SEEK_END)


def _drop(path: Path, label: str, keep: int) -> None:
    """Leave the run ``label`` its first ``keep`` records in a file of many runs."""
    kept, own = [], 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        is_own = line.startswith(b'{"run": ' + _encode(label).encode() + b",")
        own += is_own
        if not is_own or own <= keep:
            kept.append(line)
    put(path, lambda part: part.write_bytes(b"".join(kept)))


def _whole_lines(file: FileIO, size: int) -> int:
    """Length of the first ``size`` bytes without a last line that was not written to its end."""
    while size > 0:
        begin = max(0, size - 65536)
        file.seek(begin)
        newline = file.read(size - begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        size = begin
    return 0


def _finite(value: Any) -> Any:
    if isinstance(value, str):
        return value
    number = float(value)
    if number != number:
        return "NaN"
    if number in (float("inf"), float("-inf")):
        return "Infinity" if number > 0 else "-Infinity"
    return value


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, NaN and infinities as numbers.

    A last line that was cut off, because the process was killed or is writing now, is left out.

    >>> written = Path("metrics.jsonl").write_text('{"step": 9, "valid/loss": "Infinity"}\\n{"kind": "tr')
    >>> read_jsonl("metrics.jsonl")
    [{'step': 9, 'valid/loss': inf}]

    Raises DataError, naming the line, if another line is not a JSON object.
    """
    records, bad, _ = read_whole_lines(path)
    if bad:
        line = Path(path).read_bytes().split(b"\n")[bad[0] - 1]
        raise DataError(f"{path}, line {bad[0]} is not a JSON object: {line[:80]!r}. Delete it to read the others")
    return records


def read_whole_lines(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], list[int], int | None]:
    """The records of the lines that are one, the numbers of lines that are none, and that of a last line which was not
    written to its end; None if there is none such.

    >>> written = Path("metrics.jsonl").write_text('{"step": 9}\\n{"st\\n{"step": 10}\\n{"kind": "tr')
    >>> read_whole_lines("metrics.jsonl")
    ([{'step': 9}, {'step': 10}], [2], 4)
    """
    records, bad = [], []
    *whole, last = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(whole, 1):
        try:
            record = json.loads(line)
            records.append({k: NON_FINITE.get(v, v) if type(v) is str else v for k, v in record.items()})
        except (ValueError, AttributeError, RecursionError):
            bad.append(number)
    return records, bad, len(whole) + 1 if last else None


def unreadable(file: str | os.PathLike[str], bad: list[int]) -> str:
    """The sentence about lines that are no records.

    >>> unreadable("metrics.jsonl", [3, 7])
    '2 lines of metrics.jsonl could not be read: line 3, 7'
    """
    shown = ", ".join(f"{one:,}" for one in bad[:5]) + (", …" if len(bad) > 5 else "")
    return f"{len(bad):,} line{'s' * (len(bad) > 1)} of {os.fspath(file)} could not be read: line {shown}"
