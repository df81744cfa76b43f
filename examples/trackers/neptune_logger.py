"""A logger for Neptune: ``loggers=[NeptuneLogger("workspace/project")]``, or ``mode="offline"`` and no account.

Points are sent before each checkpoint and at the end, so that a run that goes on from a checkpoint sends none twice.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import loopwright as lw


class NeptuneLogger:
    """Writes to a run of Neptune that is named as the run folder, which also makes a resumed run go on with it."""

    def __init__(self, project: str, *, mode: str | None = None) -> None:
        self.project, self.mode = project, mode

    def start(self, run: lw.Run) -> None:
        from neptune_scale import Run

        name, own = lw.loggers.run_name(run)
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.run = Run(
            project=self.project, run_id=f"{name}-{own}", experiment_name=name, mode=self.mode,
            log_directory=run.folder / "neptune" if run.folder else None, enable_console_log_capture=False,
        )  # fmt: skip

    def log_config(self, config: Mapping[str, Any]) -> None:
        told = lw.loggers.flat({key: part for key, part in config.items() if key != "packages"})
        # it has no None, and integers of 63 bits, of which a seed of torch may have 64
        large = {k: str(v) for k, v in told.items() if v is None or (isinstance(v, int) and v >= 1 << 63)}
        self.run.log_configs(told | large)

    def log(self, progress: lw.Progress, values: Mapping[str, float], kind: str) -> None:
        self.rows.append(
            (progress.step, {k: v for k, v in lw.loggers.points(values, kind).items() if math.isfinite(v)})
        )

    def log_figure(self, progress: lw.Progress, name: str, figure: Any) -> None:
        figure.savefig(picture := io.BytesIO(), format="png")
        self.run.log_files({name: picture.getvalue()}, step=progress.step)

    def log_text(self, progress: lw.Progress, name: str, text: str) -> None:
        self.run.log_string_series({name: text}, step=progress.step)

    def log_artifact(self, progress: lw.Progress, name: str, path: Path) -> None:
        self.run.assign_files({name: path})

    def flush(self) -> None:
        rows, self.rows = self.rows, []
        for step, points in rows:
            self.run.log_metrics(points, step=step)

    def close(self, status: str) -> None:
        if status != "failed":  # else what came after the last checkpoint is logged again by a resume
            self.flush()
        self.run.close()
