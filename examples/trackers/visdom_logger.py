"""A logger for Visdom: ``loggers=[VisdomLogger()]``, or ``offline=True``, for ``visdom.Visdom().replay_log`` later.

Points are sent before each checkpoint and at the end, so that a run that goes on from a checkpoint sends none twice.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import loopwright as lw


class VisdomLogger:
    """Draws each curve in a window of its own, in an environment that is named as the run folder."""

    def __init__(self, server: str = "http://localhost", *, port: int = 8097, offline: bool = False) -> None:
        self.server, self.port, self.offline = server, port, offline

    def start(self, run: lw.Run) -> None:
        import visdom

        if self.offline and run.folder is None:
            raise lw.SettingError("VisdomLogger(offline=True) writes to the run folder; this run has none: folder=None")
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.client = visdom.Visdom(
            self.server, port=self.port, env="_".join(lw.loggers.run_name(run)), offline=self.offline,
            raise_exceptions=True, use_incoming_socket=False,
            log_to_filename=str(run.folder / "visdom.log") if self.offline and run.folder else None,
        )  # fmt: skip

    def log_config(self, config: Mapping[str, Any]) -> None:
        told = lw.loggers.flat({key: part for key, part in config.items() if key != "packages"})
        rows = (f"<tr><td>{html.escape(key)}<td>{html.escape(str(value))}" for key, value in told.items())
        self.client.text(f"<table>{''.join(rows)}</table>", win="config", opts={"title": "config"})

    def log(self, progress: lw.Progress, values: Mapping[str, float], kind: str) -> None:
        self.rows.append((progress.step, lw.loggers.points(values, kind)))

    def log_figure(self, progress: lw.Progress, name: str, figure: Any) -> None:
        self.client.matplot(figure, win=name, opts={"title": f"{name}, step {progress.step}"})

    def log_text(self, progress: lw.Progress, name: str, text: str) -> None:
        self.client.text(html.escape(text), win=name, opts={"title": f"{name}, step {progress.step}"})

    def flush(self) -> None:
        rows, self.rows = self.rows, []
        for name in dict.fromkeys(key for _, points in rows for key in points):
            steps, values = zip(*((step, points[name]) for step, points in rows if name in points), strict=True)
            self.client.line(list(values), list(steps), win=name, update="append", opts={"title": name})

    def close(self, status: str) -> None:
        if status != "failed":  # else what came after the last checkpoint is logged again by a resume
            self.flush()
