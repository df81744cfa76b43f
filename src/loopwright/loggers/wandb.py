"""Records as a run of Weights & Biases, online or offline."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopwright.errors import elsewhere
from loopwright.loggers.jsonl import read_whole_lines
from loopwright.loggers.tracking import needs, points, run_name
from loopwright.loggers.wandb_files import last_row
from loopwright.state import Progress, Run

__all__ = ["WandbLogger"]


class WandbLogger:
    """Writes to a run of W&B in ``project``, named as the run folder; the files of W&B lie in the folder's ``wandb``.

    ``mode`` is "online", "offline" (to be sent later by ``wandb sync``), or None: the variable ``WANDB_MODE``, else
    online. A row has all values of a step. A resumed run goes on with the same run of W&B, behind the last row that it
    has; rows before the checkpoint that W&B had not written when the process was killed come from ``metrics.jsonl``.
    Needs wandb: ``pip install "loopwright[wandb]"``.

    >>> WandbLogger("digits", mode="offline").mode
    'offline'
    """

    @elsewhere()
    def __init__(self, project: str | None = None, *, mode: str | None = None) -> None:
        needs("wandb", "wandb", "WandbLogger")
        self.project, self.mode = project, mode
        self.run_id: str | None = None
        self._run: Any = None
        self._history: Any = None
        self._row: dict[str, float] = {}  # of the open step: W&B takes a row when the next one begins
        self._step = 0
        self._there = self._written = -1  # the last step that W&B had when it started, and that it was given
        self._had: set[str] = set()  # what the row of that step has
        self._loaded = False

    def start(self, run: Run) -> None:
        """Begin a run of W&B, or go on with that of the checkpoint."""
        import wandb

        goes_on = self.run_id is not None and (self._loaded or self._history is run.history)
        self.run_id = self.run_id if goes_on else None
        self._there, self._had = (self._written if goes_on else -1), set()
        if self._loaded and self.run_id is not None and run.folder is not None:
            self._there, self._had = last_row(run.folder, self.run_id)
        name, own = run_name(run)
        self._run = wandb.init(
            project=self.project or re.sub(r"[/\\#?%:]", "-", name)[:128], name=own or None, id=self.run_id,
            resume="allow" if goes_on else None, mode=self.mode, dir=run.folder and os.fspath(run.folder),
            reinit="create_new",  # other runs of this process stay as they are
        )  # fmt: skip
        self._history, self._loaded, self._row, self._step = run.history, False, {}, run.progress.step
        self.run_id = self._run.id
        if goes_on:
            if self._run.starting_step - 1 > self._there:  # what its server has
                self._there, self._had = self._run.starting_step - 1, set()
            self._catch_up(run)

    def _catch_up(self, run: Run) -> None:
        """Write the rows that W&B has lost with a process that was killed: those of the records of the run."""
        file = run.folder and run.folder / "metrics.jsonl"
        for record in read_whole_lines(file)[0] if file and file.exists() else ():
            if self._there <= record["step"] <= run.progress.step:
                values = {key: value for key, value in record.items() if "/" in key or key.startswith("lr")}
                self.log(Progress(step=record["step"]), values, record["kind"])

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Write settings, versions, commit and the fingerprint of the data."""
        told = {key: part for key, part in config.items() if key != "packages"}
        self._run.config.update(told, allow_val_change=True)

    def log(self, progress: Progress, values: Mapping[str, float], kind: str) -> None:
        """Add the values to the row of this step."""
        self._begin(progress.step)
        self._row.update({name: float(value) for name, value in points(values, kind).items()})

    def _begin(self, step: int) -> None:
        """Write the open row if it is that of another step."""
        if step != self._step:
            self._write(self._row, self._step)
            self._row, self._step = {}, step

    def _write(self, values: Mapping[str, Any], step: int) -> None:
        if step == self._there and self._had:  # of a run that failed inside of it
            values = {name: value for name, value in values.items() if name not in self._had}
        elif step <= self._there:
            return
        if values:
            self._run.log(dict(values), step=step)
            self._written = step

    def log_figure(self, progress: Progress, name: str, figure: Any) -> None:
        """Write a figure as an image."""
        import wandb
        from PIL import Image

        self._begin(progress.step)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
        self._write({name: wandb.Image(Image.open(drawn))}, progress.step)

    def log_text(self, progress: Progress, name: str, text: str) -> None:
        """Write a text."""
        self._begin(progress.step)
        self._write({name: text}, progress.step)

    def log_artifact(self, progress: Progress, name: str, path: Path) -> None:
        """Upload a file or a folder as an artifact of type "file"."""
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", f"{self.run_id}-{name}", flags=re.ASCII)[:128], "file")
        (artifact.add_dir if path.is_dir() else artifact.add_file)(os.fspath(path))
        self._run.log_artifact(artifact)

    def close(self, status: str) -> None:
        """Write the open row and end the run."""
        if self._run is None:
            return
        self._write(self._row, self._step)
        run, self._run, self._row = self._run, None, {}
        run.finish(exit_code=int(status == "failed"))

    def state_dict(self) -> dict[str, Any]:
        """Which run of W&B this is."""
        return {"run_id": self.run_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next ``start`` go on with that run."""
        self.run_id, self._loaded = state["run_id"], True
