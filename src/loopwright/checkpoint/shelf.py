"""A folder of checkpoints: what is in it, which is the newest, which is the best."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from loopwright.checkpoint import manifest as manifests
from loopwright.errors import CheckpointError

__all__ = ["find", "index", "list_checkpoints", "newest", "write_index"]

INDEX = "index.json"


def list_checkpoints(folder: Path | str) -> list[Path]:
    """The checkpoints in ``folder``, in the order in which they were written; none if there is no such folder.

    A folder without a manifest is not a checkpoint, and neither is one that is still being written.
    """
    folder = Path(folder)
    found = [p for p in folder.iterdir() if not p.name.startswith(".")] if folder.is_dir() else []
    return sorted((p for p in found if (p / manifests.NAME).is_file()), key=lambda p: (order(p), p.name))


def order(path: Path) -> int:
    """A number that grows with each checkpoint written to a folder: clocks and step numbers may go back."""
    number = manifests.peek(path).get("order")
    return number if isinstance(number, int) else 0


def newest(folder: Path | str) -> Path | None:
    """The checkpoint written last in ``folder``, or None."""
    return next(reversed(list_checkpoints(folder)), None)


def find(path: Path | str) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest of a run folder or of a folder of checkpoints.

    Raises CheckpointError if there is none.
    """
    path = Path(path)
    if (path / manifests.NAME).is_file():
        return path
    found = newest(path / "checkpoints") or newest(path)
    if found is None:
        state = "has no manifest.json, and no checkpoints are in it" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} is not a checkpoint: it {state}. Give the folder of a run or of a checkpoint")
    return found


def index(folder: Path | str) -> dict[str, Path | None]:
    """``{"last": path, "best": path}`` of a folder of checkpoints, read from its ``index.json``.

    The file is a cache: where it is missing, damaged or names what is gone, the manifests tell.
    """
    folder = Path(folder)
    try:
        cached = json.loads((folder / INDEX).read_bytes())
        found = {key: folder / cached[key] if cached[key] else None for key in ("last", "best")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        found = {}
    present = list_checkpoints(folder)
    if found and found["last"] == next(reversed(present), None) and found["best"] in (None, *present):
        return found
    return {"last": next(reversed(present), None), "best": best(present)}


def write_index(folder: Path, *, last: Path | None, best: Path | None) -> None:
    """Write ``index.json``, in one move."""
    temporary = folder / f".{INDEX}.writing"
    temporary.write_text(json.dumps({"last": last and last.name, "best": best and best.name}), encoding="utf-8")
    os.replace(temporary, folder / INDEX)


def best(checkpoints: list[Path]) -> Path | None:
    """The one with the best monitored value; the earliest of equals, None where nothing was monitored."""
    ranked = [(value, path) for path in checkpoints if (value := monitored(path)) is not None]
    return min(ranked, key=lambda pair: pair[0])[1] if ranked else None


def monitored(path: Path, monitor: str | None = None) -> float | None:
    """The monitored value of a checkpoint, smaller is better; None where there is none (of that name)."""
    info: Any = manifests.peek(path).get("info")
    if not isinstance(info, dict) or not isinstance(value := info.get("value"), (int, float)) or math.isnan(value):
        return None
    if monitor is not None and info.get("monitor") != monitor:
        return None
    return -float(value) if info.get("mode") == "max" else float(value)
