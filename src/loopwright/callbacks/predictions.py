"""Predictions on disk: what the model says of each sample of a validation, a test or a prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopwright.callbacks.spool import FORMATS, Spool
from loopwright.errors import DataError, MetricError, SettingError, choose
from loopwright.events import Callback, describe
from loopwright.state import Run

__all__ = ["Predictions"]

_KINDS = ("valid", "test", "predict")


class Predictions(Callback):
    """Writes what each step of an evaluation returns under ``keys``, for all samples in their order.

    ``<folder>/valid-00000120.npz`` after the validation at step 120, ``test.npz``, ``predict.npz``; ``folder`` None is
    ``predictions`` in the run folder. ``kinds`` says which evaluations are written. An npz file has an array for each
    key (``numpy.load(path)["preds"]``, rows as samples); parts of a dict are ``preds.<name>``, of a tuple ``preds.0``.
    CSV has a column for each number. Several validation sets follow one another. Of a prediction all that
    ``predict_step`` returns is written, a single tensor as ``preds``.

    Batches wait in temporary files, so that memory does not grow with the data; of several ranks, all meet in the
    memory of rank 0, which writes. bfloat16 is written as float32. A file is whole or not there.

    Reads: the output of evaluation steps, from the device. Changes: nothing. Stops: no. Raises SettingError without a
    folder and for unknown names, MetricError where a step returns none of ``keys``, DataError for what is no row for
    each sample, or not the same in all batches.

    >>> Predictions("out", format="csv", kinds="test").kinds
    ('test',)
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        format: str = "npz",
        keys: Sequence[str] = ("preds", "target"),
        kinds: str | Sequence[str] = _KINDS,
    ) -> None:
        if format not in FORMATS:
            raise SettingError(f"Predictions(format={format!r}) is unknown. {choose(format, FORMATS)}")
        self.folder, self.format = folder, format
        self.keys = (keys,) if isinstance(keys, str) else tuple(keys)
        self.kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        for kind in self.kinds:
            if kind not in _KINDS:
                raise SettingError(f"Predictions(kinds={kind!r}) is unknown. {choose(kind, _KINDS)}")
        self._spool: Spool | None = None
        self._mine: list[tuple[int, dict[str, np.ndarray[Any, Any]]]] = []
        self.last: Path | None = None  # what was written last

    def on_fit_start(self, run: Run) -> None:
        self._place(run, "valid")

    def on_validation_start(self, run: Run) -> None:
        self._open(run, "valid")

    def on_test_start(self, run: Run) -> None:
        self._open(run, "test")

    def on_predict_start(self, run: Run) -> None:
        self._open(run, "predict")

    def on_eval_batch_end(self, run: Run, output: Any, batch: Any) -> None:
        if self._spool is None:
            return
        found = {key: output[key] for key in self.keys if key in output}
        if not found:
            raise MetricError(
                f"Predictions writes {' and '.join(map(repr, self.keys))}, and the step returned {describe(output)}. "
                f"{choose(self.keys[0], output)}"
            )
        self._add(run, found)

    def on_predict_batch_end(self, run: Run, output: Any, batch: Any) -> None:
        if self._spool is not None:
            self._add(run, output if isinstance(output, Mapping) else {"preds": output})

    def on_validation_end(self, run: Run, values: Mapping[str, float]) -> None:
        self._close(run, f"valid-{run.progress.step:08d}" if values else None)

    def on_test_end(self, run: Run, values: Mapping[str, float]) -> None:
        self._close(run, "test")

    def on_predict_end(self, run: Run) -> None:
        self._close(run, "predict")

    def _place(self, run: Run, kind: str) -> Path | None:
        if kind not in self.kinds:
            return None
        if self.folder is None and run.folder is None:
            raise SettingError(f"Predictions needs a folder for those of {kind!r}: lw.Predictions('predictions')")
        return Path(self.folder) if self.folder is not None else Path(str(run.folder)) / "predictions"

    def _open(self, run: Run, kind: str) -> None:
        if self._spool is not None:
            self._spool.close()  # of an evaluation that an error has ended
        self._spool = None if self._place(run, kind) is None else Spool()
        self._mine = []

    def _add(self, run: Run, found: Mapping[str, Any]) -> None:
        assert self._spool is not None
        columns = dict(_columns(found, ""))
        if run.team is None:
            self._spool.add(columns)
        else:
            self._mine.append((run.team.batch, columns))

    def _close(self, run: Run, name: str | None) -> None:
        spool, self._spool = self._spool, None
        if spool is None:
            return
        try:
            if run.team is not None and name is not None:
                every = run.team.in_order(self._mine)
                self._mine = []
                for columns in every if run.comm.rank == 0 else ():
                    spool.add(columns)
            if name is not None and run.comm.rank == 0:
                folder = self._place(run, name.partition("-")[0])
                assert folder is not None
                self.last = folder / f"{name}.{self.format}"
                FORMATS[self.format](spool, self.last)
        finally:
            spool.close()


def _columns(value: Any, path: str) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _columns(part, f"{path}.{name}" if path else str(name))
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _columns(part, f"{path}.{i}")
    elif isinstance(value, Tensor) and value.dim():
        value = value.detach().cpu()
        yield path, (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    elif isinstance(value, np.ndarray) and value.ndim and value.dtype.kind in "biufc":
        yield path, value
    else:
        raise DataError(f"{path!r} is {describe(value)}; Predictions writes tensors that have a row for each sample")
