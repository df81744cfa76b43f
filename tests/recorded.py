"""Run folders made by hand, as a killed, a foreign or a hostile run leaves them."""

from __future__ import annotations

import json
from pathlib import Path


def made(folder: Path, log: str = "", **record: object) -> Path:
    """A run folder with ``log`` as its metrics."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"name": "digits", "status": "done"} | record))
    (folder / "metrics.jsonl").write_text(log)
    return folder


def line(step: int, kind: str = "train", **values: object) -> str:
    return json.dumps({"kind": kind, "step": step, "epoch": 0, "samples": 0, "seconds": 0.0, **values}) + "\n"
