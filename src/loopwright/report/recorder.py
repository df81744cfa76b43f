"""``lw.Report``: notes during a fit what no other file of a run has, and writes the page at its end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loopwright.errors import SettingError
from loopwright.events import Callback, describe
from loopwright.folder import put
from loopwright.model_summary import rows_of, summary
from loopwright.out_of_memory import peak_memory
from loopwright.report.markup import standard
from loopwright.report.page import write
from loopwright.report.samples import Samples, misnamed
from loopwright.report.warned import Warned
from loopwright.state import Run
from loopwright.written import warn, where

__all__ = ["Report"]

_STEPS = 5_000_000  # losses that are kept, 4 bytes each


class Report(Callback):
    """Writes ``report.html`` into the run folder at the end of a fit, whichever way it ends: one file, no network.

    Besides what each run records, it shows confusions or residuals and the ``keep`` worst and best samples of the last
    validation and of a ``trainer.test`` afterwards, the layers, the loss of every step, peaks of memory, and the
    warnings that came up. For that it keeps small files of plain data in the folder ``report`` of the run. ``classes``
    are the names of the classes, ``columns`` those of a table's columns; names that do not fit what the model predicts
    are a warning. ``show(batch)`` gives what is shown of the samples of a batch: images [N, C, H, W] or [N, H, W], rows
    of numbers [N, D], or a list of texts; by default the first part of the batch is taken. One that raises, or
    returns another number than there are samples, is a warning, and the report goes on without what it shows.

    Reads: the output of evaluation steps, from the device; the arguments of the first forward; Python's warnings, which
    go on to where they went before. Changes: nothing. Stops: no. A report that cannot be written is a warning.

    >>> import loopwright as lw
    >>> net = nn.Linear(2, 2)
    >>> task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    >>> data = [(torch.eye(2), torch.tensor([0, 1]))]
    >>> report = Report(classes=["cat", "dog"])
    >>> run = lw.Trainer(epochs=1, callbacks=[report], progress=False).fit(task, data, valid=data)
    >>> report.path == run.folder / "report.html" and report.path.is_file()
    True
    """

    def __init__(
        self,
        *,
        classes: Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
        show: Callable[[Any], Any] | None = None,
        keep: int = 12,
    ) -> None:
        for name, given in (("classes", classes), ("columns", columns)):
            if isinstance(given, str):
                raise SettingError(f"Report({name}={given!r}): expected a list of names, such as [{given!r}]")
        if show is not None and not callable(show):
            raise SettingError(f"Report(show={show!r}) cannot be called; pass a function of a batch")
        if type(keep) is not int or not 0 <= keep <= 1000:
            raise SettingError(f"Report(keep={keep!r}): expected a whole number from 0 to 1000")
        self.classes = None if classes is None else list(map(str, classes))
        self.columns = None if columns is None else list(map(str, columns))
        self.show, self.keep = show, keep
        self.path: Path | None = None  # the page that was written last
        self._folder: Path | None = None
        self._task: Any = None
        self._parts: dict[str, Any] = {}
        self._samples: Samples | None = None
        self._warned = Warned()
        self._calls: dict[str, Any] = {}
        self._handles: list[Any] = []
        self._validating = self._began = 0.0
        self._said = set[str]()
        self._blank = False  # ``show`` has failed

    def problems(self, run: Run) -> Iterator[str]:
        if run.settings.get("folder", "") is None:
            yield "lw.Report writes into the run folder, and there is none: Trainer(folder='runs'), or leave it out"

    def on_fit_start(self, run: Run) -> None:
        self._parts, self._validating, self._folder, self._task = {}, 0.0, None, run.task
        self._said.clear()
        self._blank = False
        if run.comm.rank == 0:
            self._warned.start()
            if not run.merges and run.team is None:
                self._watch(run.models)
        run.closing.append(self._close)

    # ----------------------------------------------------------------------------------------------- evaluations

    def on_validation_start(self, run: Run) -> None:
        self._open(run)

    def on_test_start(self, run: Run) -> None:
        self._open(run)

    def on_eval_batch_end(self, run: Run, output: Any, batch: Any) -> None:
        if self._samples is not None and isinstance(output, Mapping):
            self._samples.add(output, batch)

    def on_validation_end(self, run: Run, values: Mapping[str, float]) -> None:
        self._validating += time.perf_counter() - self._began
        told = self._ended(run)
        if values and run.stages:  # none: a validation on its own, between fits
            self._parts["valid"] = {**told, "step": run.progress.step} if told else {}

    def on_test_end(self, run: Run, values: Mapping[str, float]) -> None:
        told = self._ended(run)
        if self._folder is not None and run.task is self._task and run.comm.rank == 0:
            self._write({"test": {**told, "metrics": {name: float(value) for name, value in values.items()}}})

    def _open(self, run: Run) -> None:
        self._began = time.perf_counter()
        show = None if self.show is None else self._show
        self._samples = Samples(keep=self.keep, show=show, loss=getattr(run.task, "loss", None))

    def _show(self, batch: Any) -> Any:
        """What is shown of a batch; nothing from where the user's function has failed."""
        assert self.show is not None
        if self._blank:
            return None
        try:
            return self.show(batch)
        except Exception as error:  # no training ends because of a picture
            self._blank = True
            warn(
                f"lw.Report: show= ({where(self.show)}) failed on a batch: {error!r}. The report goes on without "
                f"what it shows; it was given {describe(batch)}"
            )
            return None

    def _ended(self, run: Run) -> dict[str, Any]:
        samples, self._samples = self._samples, None
        assert samples is not None
        if run.team is not None:
            samples.show = samples.loss = None  # what is sent is plain data
            first, *others = run.team.comm.gather(samples)
            for other in others:
                first.include(other)
            samples = first
        told: dict[str, Any] = samples.as_dict()
        unseen = self._blank or samples.wrong  # of no samples there are no columns
        found = misnamed(told, self.classes or (), () if unseen else self.columns or ()) if told else ()
        for wrong in () if run.comm.rank else (*samples.wrong, *found):
            if wrong not in self._said:
                self._said.add(wrong)
                warn(f"lw.Report: {wrong}")
        return told and {**told, "classes": self.classes, "columns": self.columns}

    # ----------------------------------------------------------------------------------------------- the forward

    def _watch(self, models: Mapping[str, nn.Module]) -> None:
        """Keep two samples of what each model is called with first: its layers are shown with their shapes."""
        self._release()
        self._calls.clear()
        for name, model in models.items():

            def note(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                self._calls.setdefault(name, (_few(args), _few(kwargs)))

            self._handles.append(model.register_forward_pre_hook(note, with_kwargs=True))

    def on_step_end(self, run: Run, result: Any) -> None:
        if self._handles:
            self._release()

    def _release(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    # --------------------------------------------------------------------------------------------------- the end

    def _close(self, run: Run) -> None:
        """Called when the run folder is complete."""
        self._release()
        if run.comm.rank:
            return
        met = self._warned.stop()
        if run.folder is None:
            return
        self._folder = run.folder
        about = {
            "device": str(run.device), "threads": torch.get_num_threads(), "seconds": {"validation": self._validating},
            **peak_memory(run.device),
        }  # fmt: skip
        for name, find in (("summary", self._layers), ("losses", _keep_losses)):
            try:
                about[name] = find(run)
            except Exception as error:  # training is done: neither it nor the rest may be lost for this part
                _warn(error, f"the {name} of the run")
        self._write({**self._parts, "about": about, "warnings": met})

    def _write(self, parts: Mapping[str, Any]) -> None:
        assert self._folder is not None
        try:
            for name, part in parts.items():
                _save(self._folder / "report" / f"{name}.json", part)
            self.path = write(self._folder)
        except Exception as error:
            _warn(error)

    def _layers(self, run: Run) -> dict[str, Any]:
        rows, totals, count = list[list[str]](), list[str](), 0
        for name, model in run.models.items():
            args, kwargs = self._calls.get(name, ((), {}))
            found = None if (args and kwargs) or not (args or kwargs) else summary(model, args or kwargs)
            more, line, parameters = rows_of(model, found if found and found.problem is None else None)
            rows += more
            totals += [f"{name}: {one}" if len(run.models) > 1 else one for one in line]
            count += parameters
        return {"rows": rows, "totals": totals, "parameters": count}


def _few(value: Any) -> Any:
    """The first two samples of what a model is given, so that no batch is held."""
    if isinstance(value, Tensor):
        return value.detach()[:2].clone() if value.dim() else value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _few(part) for key, part in value.items()}
    return type(value)(map(_few, value)) if type(value) in (list, tuple) else value


def _keep_losses(run: Run) -> int:
    """The loss of every step, where there is one for each; how many values that are."""
    assert run.folder is not None
    found = {name: np.frombuffer(values, dtype=np.float32) for name, values in run.history.losses.items()}
    whole = {name: values for name, values in found.items() if len(values) == run.progress.step}
    if whole and sum(map(len, whole.values())) <= _STEPS:
        from safetensors.numpy import save_file

        file = run.folder / "report" / "losses.safetensors"
        file.parent.mkdir(exist_ok=True)
        put(file, lambda part: save_file(whole, part))
    return sum(map(len, whole.values()))


def _save(file: Path, part: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    text = json.dumps(standard(part))
    put(file, lambda beside: beside.write_text(text, encoding="utf-8"))


def _warn(error: Exception, what: str = "the report") -> None:
    warn(f"{what} could not be written: {error!r}. The run itself is complete; to try again: loopwright report RUN")
