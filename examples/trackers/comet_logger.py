"""A logger for Comet: ``loggers=[CometLogger("project")]``, or ``online=False``, for ``comet upload`` later.

Points are sent before each checkpoint and at the end, so that a run that goes on from a checkpoint sends none twice.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import loopwright as lw


class CometLogger:
    """Writes to an experiment of Comet whose key comes from the run folder, so that a resumed run goes on with it."""

    def __init__(self, project: str | None = None, *, online: bool = True) -> None:
        self.project, self.online = project, online

    def start(self, run: lw.Run) -> None:
        import comet_ml

        quiet = dict.fromkeys(("log_code", "log_env_details", "auto_output_logging", "auto_metric_logging"), False)
        place = None
        if run.folder is not None and not self.online:
            # its own: Comet names its files by Python's generator, which a resume sets to where it stood
            place = run.folder / "comet" / str(time.time_ns())
            place.mkdir(parents=True)
        name, own = lw.loggers.run_name(run)
        self.rows: list[tuple[int, int, dict[str, float]]] = []
        self.experiment = comet_ml.start(
            project_name=self.project or name, online=self.online, mode="get_or_create",
            experiment_key=hashlib.sha256(f"{name}/{own}".encode()).hexdigest()[:32],
            experiment_config=comet_ml.ExperimentConfig(name=own, offline_directory=place and str(place), **quiet),
        )  # fmt: skip

    def log_config(self, config: Mapping[str, Any]) -> None:
        told = {key: part for key, part in config.items() if key != "packages"}
        self.experiment.log_parameters(lw.loggers.flat(told))

    def log(self, progress: lw.Progress, values: Mapping[str, float], kind: str) -> None:
        self.rows.append((progress.step, progress.epoch, lw.loggers.points(values, kind)))

    def log_figure(self, progress: lw.Progress, name: str, figure: Any) -> None:
        self.experiment.log_figure(name, figure, step=progress.step)

    def log_text(self, progress: lw.Progress, name: str, text: str) -> None:
        self.experiment.log_text(text, step=progress.step, metadata={"name": name})

    def log_artifact(self, progress: lw.Progress, name: str, path: Path) -> None:
        (self.experiment.log_asset_folder if path.is_dir() else self.experiment.log_asset)(str(path))

    def flush(self) -> None:
        rows, self.rows = self.rows, []
        for step, epoch, points in rows:
            self.experiment.log_metrics(points, step=step, epoch=epoch)

    def close(self, status: str) -> None:
        if status != "failed":  # else what came after the last checkpoint is logged again by a resume
            self.flush()
        self.experiment.end()
