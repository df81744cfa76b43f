"""Records as a run of MLflow: in a local SQLite file, or on a server."""

from __future__ import annotations

import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loopwright.errors import elsewhere
from loopwright.loggers.files import as_path
from loopwright.loggers.tracking import flat, needs, points, run_name
from loopwright.state import Progress, Run

__all__ = ["MLflowLogger"]

_BATCH = 1000  # metrics, 100 parameters or tags: the most that MLflow takes at once
_SECONDS = 5.0  # between two batches
_MOST = 100_000  # points that may wait for a server that does not answer
_PATIENCE = 30.0  # seconds for the last batch
_ENDS = {"done": "FINISHED", "stopped": "FINISHED", "interrupted": "KILLED"}


class MLflowLogger:
    """Writes to MLflow at ``uri``: a server, or a file such as ``sqlite:///mlflow.db``, which ``mlflow ui`` shows.

    ``uri`` None is MLflow's own default: the variable ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working
    directory. The experiment is ``experiment``, or named as the run; the run in it is named as the folder. Points are
    sent together, each 5 seconds, by a thread: training does not wait for a server. Settings become parameters;
    versions, commit and the fingerprint of the data, tags; all of it the file ``config.json``.

    A resumed run goes on with the same run of MLflow; points that it has already are not sent again, and those that a
    killed process had not sent are in the checkpoint. Needs ``pip install "loopwright[mlflow]"``, which is
    mlflow-skinny with what SQLite takes.

    >>> MLflowLogger("sqlite:///mlflow.db", experiment="digits").experiment
    'digits'
    """

    @elsewhere()
    def __init__(self, uri: str | None = None, *, experiment: str | None = None) -> None:
        needs("mlflow", "mlflow", "MLflowLogger")
        self.uri, self.experiment = uri, experiment
        self.run_id: str | None = None
        self._client: Any = None
        self._history: Any = None
        self._waiting: list[tuple[str, float, int, int]] = []  # name, value, milliseconds, step
        self._there: dict[str, int] | None = None  # the last step of each curve; None where all is new
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._sent_at = 0.0
        self._step = 0
        self._loaded = False

    def start(self, run: Run) -> None:
        """Make a run of MLflow, or go on with that of the checkpoint."""
        from mlflow import MlflowClient

        _reach(self.uri or os.environ.get("MLFLOW_TRACKING_URI", ""))
        self._client = MlflowClient(tracking_uri=self.uri)
        goes_on = self.run_id is not None and (self._loaded or self._history is run.history)
        name, own = run_name(run)
        if goes_on:
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            experiment = self._experiment(self.experiment or name)
            self.run_id = self._client.create_run(experiment, run_name=own or None).info.run_id
            self._waiting.clear()
        self._there = {} if goes_on else None
        self._history, self._loaded, self._step, self._error = run.history, False, run.progress.step, None
        self._sent_at = time.monotonic()
        if run.settings.get("progress") and not str(self._client.tracking_uri).startswith("http"):
            print(f"to look at it: mlflow ui --backend-store-uri {self._client.tracking_uri}")

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return str(self._client.create_experiment(name) if found is None else found.experiment_id)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Write parameters, tags and the file; parameters that MLflow has already cannot change."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self.run_id).data.params
        params = {_key(k): str(v)[:500] for k, v in flat(config["settings"]).items() if _key(k) not in known}
        rest = {key: part for key, part in config.items() if key not in ("settings", "packages")}
        tags = {_key(k): str(v)[:500] for k, v in flat(rest).items()}
        for listed, name, kind in ((params, "params", Param), (tags, "tags", RunTag)):
            entries = [kind(key, value) for key, value in listed.items()]
            for i in range(0, len(entries), 100):
                self._client.log_batch(self.run_id, **{name: entries[i : i + 100]})
        file = f"config-{self._step:08d}.json" if self._step else "config.json"
        self._client.log_dict(self.run_id, dict(config), file)

    def log(self, progress: Progress, values: Mapping[str, float], kind: str) -> None:
        """Keep the points of a record until the next batch is sent. Raises what the last batch failed with."""
        error, self._error = self._error, None
        if error is not None:
            raise error
        now = time.time_ns() // 1_000_000
        self._waiting += [(_key(k), float(v), now, progress.step) for k, v in points(values, kind).items()]
        if time.monotonic() - self._sent_at > _SECONDS or len(self._waiting) >= _BATCH:
            self._send()
        if len(self._waiting) > _MOST:
            del self._waiting[_MOST:]
            raise ConnectionError(f"MLflow at {self.uri} does not answer: {_MOST} points wait, later ones are dropped")

    def _send(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._sent_at = time.monotonic()
            self._thread = threading.Thread(target=self._post, daemon=True)  # the process need not wait for a server
            self._thread.start()

    def _post(self) -> None:
        from mlflow.entities import Metric

        try:
            while self._waiting:
                batch = self._waiting[:_BATCH]
                new = [Metric(*point) for point in batch if self._is_new(point)]
                if new:
                    self._client.log_batch(self.run_id, metrics=new)
                del self._waiting[: len(batch)]
        except Exception as error:
            self._error, self._there = error, {}  # a part of the batch may have arrived

    def _is_new(self, point: tuple[str, float, int, int]) -> bool:
        """True for a point behind the last one of its curve; MLflow is asked once a curve, and only after a resume."""
        name, _, _, step = point
        if self._there is None:
            return True
        if name not in self._there:
            known = self._client.get_metric_history(self.run_id, name)
            self._there[name] = max((metric.step for metric in known), default=-1)
        return step > self._there[name]

    def log_figure(self, progress: Progress, name: str, figure: Any) -> None:
        """Write a figure as a PNG among the artifacts."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{as_path(name).rpartition('/')[2]}-{progress.step:08d}.png"
            figure.savefig(path, format="png")
            self._client.log_artifact(self.run_id, str(path), f"figures/{as_path(name).rpartition('/')[0]}".rstrip("/"))

    def log_text(self, progress: Progress, name: str, text: str) -> None:
        """Write a text file among the artifacts."""
        self._client.log_text(self.run_id, text, f"texts/{as_path(name)}-{progress.step:08d}.txt")

    def log_artifact(self, progress: Progress, name: str, path: Path) -> None:
        """Upload a file, or the files of a folder."""
        self._client.log_artifact(self.run_id, os.fspath(path), as_path(name))

    def close(self, status: str) -> None:
        """Send what waits, within a minute, and end the run."""
        if self._client is None:
            return
        for _ in range(2):  # what came while a batch was sent
            self._send()
            assert self._thread is not None
            self._thread.join(_PATIENCE)
        if self._waiting:
            raise self._error or TimeoutError(f"{len(self._waiting)} points were not sent within {_PATIENCE:g} seconds")
        self._client.set_terminated(self.run_id, _ENDS.get(status, "FAILED"))
        self._client = None

    def state_dict(self) -> dict[str, Any]:
        """Which run of MLflow this is, and what waits to be sent."""
        return {"run_id": self.run_id, "waiting": [list(point) for point in self._waiting]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next ``start`` go on with that run."""
        self.run_id, self._loaded = state["run_id"], True
        self._waiting = [(str(name), float(value), int(at), int(step)) for name, value, at, step in state["waiting"]]


def _reach(uri: str) -> None:
    """Raise OSError if nobody listens at the address of a server: MLflow itself would try for minutes."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.hostname:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname, port), timeout=5).close()


def _key(name: str) -> str:
    """``name`` with what MLflow does not take in a name replaced."""
    text = re.sub(r"[^\w.\- :/]", "_", name, flags=re.ASCII)[:250]
    return "/".join(part if part.strip(".") else "_" for part in text.split("/"))
