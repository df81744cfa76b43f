"""Records as the event files that TensorBoard shows."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopwright.errors import SettingError, elsewhere
from loopwright.loggers.tracking import flat, needs, points, run_name
from loopwright.state import Progress, Run

__all__ = ["TensorBoardLogger"]


class TensorBoardLogger:
    """Writes event files to ``tensorboard`` in the run's folder, or to ``path/<time>-<id>``.

    Scalars over steps under their logged names, means over an epoch under ``epoch/...``; figures and texts; the
    settings as text, and at the end as hyper-parameters with the latest metrics. A resumed run cuts its event files to
    where its checkpoint stood. ``tensorboard --logdir runs`` shows them all.
    Needs tensorboard: ``pip install "loopwright[tensorboard]"``.

    Raises SettingError in ``start`` without a folder and a ``path``.

    >>> TensorBoardLogger("tb").path
    'tb'
    """

    @elsewhere()
    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        needs("tensorboard", "tensorboard", "TensorBoardLogger")
        self.path = path
        self._writer: Any = None
        self._folder, self._suffix = Path(), ""
        self._keep: dict[str, int] | None = None
        self._config: dict[str, Any] = {}
        self._metrics: dict[str, float] = {}
        self._at = 0

    def start(self, run: Run) -> None:
        """Open an event file; after ``load_state_dict``, cut earlier ones of this run to what the checkpoint knew."""
        from torch.utils.tensorboard import SummaryWriter

        if self.path is None and run.folder is None:
            raise SettingError(
                "TensorBoardLogger() has no place to write to: give it one, TensorBoardLogger('tb'), or give the "
                "Trainer a folder"
            )
        self._close()
        own = run_name(run)[1]
        self._folder = Path(self.path, own) if self.path is not None else Path(run.folder or "", "tensorboard")
        self._suffix = f".{own}"
        self._config, self._metrics = {}, {}
        if self._keep is not None:
            self._cut(self._keep)
        self._keep = None
        self._writer = SummaryWriter(str(self._folder), filename_suffix=self._suffix)
        if run.settings.get("progress"):
            print(f"to look at it: tensorboard --logdir {shlex.quote(str(self._folder))}")

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Write the settings, versions and data of the run as a text."""
        self._config = flat({key: part for key, part in config.items() if key != "packages"})
        rows = "".join(f"| {_cell(name)} | {_cell(value)} |\n" for name, value in self._config.items())
        self._writer.add_text("config", f"| setting | value |\n|---|---|\n{rows}", self._at)

    def log(self, progress: Progress, values: Mapping[str, float], kind: str) -> None:
        """Write one value for each curve."""
        self._at = progress.step
        for name, value in points(values, kind).items():
            self._writer.add_scalar(name, value, progress.step)
            self._metrics[name] = float(value)

    def log_figure(self, progress: Progress, name: str, figure: Any) -> None:
        """Write a figure of matplotlib as an image."""
        self._writer.add_figure(name, figure, progress.step, close=False)

    def log_text(self, progress: Progress, name: str, text: str) -> None:
        """Write a text, which TensorBoard shows as Markdown."""
        self._writer.add_text(name, text, progress.step)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        if self._writer is not None:
            self._writer.flush()

    def close(self, status: str) -> None:
        """Write the hyper-parameters with the latest metrics, and close the file."""
        if self._writer is not None and self._config:
            from torch.utils.tensorboard.summary import hparams

            known = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in self._config.items()}
            for summary in hparams(known, self._metrics):
                self._writer.file_writer.add_summary(summary)
        self._close()

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def state_dict(self) -> dict[str, Any]:
        """How long the event files of this run are, by name."""
        return {"files": {path.name: path.stat().st_size for path in self._files()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next ``start`` cut the event files to the lengths that ``state`` knew."""
        self._keep = dict(state["files"])

    def _files(self) -> list[Path]:
        """Event files that this run has written, in the order in which they were begun."""
        return sorted(path for path in self._folder.glob("events.out.tfevents.*") if path.name.endswith(self._suffix))

    def _cut(self, keep: Mapping[str, int]) -> None:
        for path in self._files() if self._suffix != "." else []:
            if path.name not in keep:  # begun after the checkpoint
                path.unlink()
            elif path.stat().st_size > keep[path.name]:
                os.truncate(path, keep[path.name])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
