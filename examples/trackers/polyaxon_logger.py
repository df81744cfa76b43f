"""A logger for Polyaxon: ``loggers=[PolyaxonLogger()]`` in its jobs, else ``PolyaxonLogger("owner", "project")``;
with ``offline=True`` it writes to the run folder.

Points are sent before each checkpoint and at the end, so that a run that goes on from a checkpoint sends none twice.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import loopwright as lw


class PolyaxonLogger:
    """Writes to a run of Polyaxon, with which a resumed run goes on; it takes "/" in a name for "__", "." for "-"."""

    def __init__(self, owner: str | None = None, project: str | None = None, *, offline: bool = False) -> None:
        self.owner, self.project, self.offline, self.uuid = owner, project, offline, None

    def start(self, run: lw.Run) -> None:
        from polyaxon.tracking import Run

        self.rows: list[tuple[int, dict[str, float]]] = []
        hook = sys.excepthook  # the client takes it over; an error that ends the run is told to ``close``
        self.run = Run(
            owner=self.owner, project=self.project, run_uuid=self.uuid, name="/".join(lw.loggers.run_name(run)),
            is_offline=self.offline, artifacts_path=str(run.folder / "polyaxon") if run.folder else None,
            collect_artifacts=True, collect_resources=False, track_code=False, track_env=False, track_logs=False,
        )  # fmt: skip
        sys.excepthook = hook
        self.run.log_status("running")  # one that failed goes on

    def log_config(self, config: Mapping[str, Any]) -> None:
        self.run.log_inputs(**lw.loggers.flat({key: part for key, part in config.items() if key != "packages"}))

    def log(self, progress: lw.Progress, values: Mapping[str, float], kind: str) -> None:
        self.rows.append((progress.step, lw.loggers.points(values, kind)))

    def log_figure(self, progress: lw.Progress, name: str, figure: Any) -> None:
        self.run.log_mpl_image(figure, name, step=progress.step, close=False)

    def log_text(self, progress: lw.Progress, name: str, text: str) -> None:
        self.run.log_text(name.replace("/", "__"), text, step=progress.step)

    def log_artifact(self, progress: lw.Progress, name: str, path: Path) -> None:
        self.run.log_artifact(str(path), name, step=progress.step)

    def flush(self) -> None:
        rows, self.rows = self.rows, []
        for step, points in rows:
            self.run.log_metrics(step=step, **points)

    def state_dict(self) -> dict[str, Any]:
        return {"uuid": self.run.run_uuid}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.uuid = state["uuid"]

    def close(self, status: str) -> None:
        if status != "failed":  # else what came after the last checkpoint is logged again by a resume
            self.flush()
        {"done": self.run.log_succeeded, "failed": self.run.log_failed}.get(status, self.run.log_stopped)()
