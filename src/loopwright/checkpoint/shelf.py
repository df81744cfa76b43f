"""A folder of checkpoints: what is in it, which is the newest, which is the best."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, overload

from loopwright.checkpoint import manifest as manifests
from loopwright.checkpoint.decode import decode
from loopwright.checkpoint.places import Place, Remote, as_place
from loopwright.errors import CheckpointError

__all__ = ["find", "index", "list_checkpoints", "newest", "write_index"]

INDEX = "index.json"
_ASIDE = re.compile(r"\.(.+)\.[0-9a-f]{8}\.replaced")


@overload
def list_checkpoints(folder: Path) -> list[Path]: ...
@overload
def list_checkpoints(folder: Place | str) -> list[Place]: ...
def list_checkpoints(folder: Place | str) -> Any:
    """The checkpoints in ``folder``, in the order in which they were written; none if there is no such folder.

    A folder without a manifest is not a checkpoint, and neither is one that is still being written. One that a killed
    process had moved aside, and did not replace, is.
    """
    folder = as_place(folder)
    found = [path for path in (folder.iterdir() if folder.is_dir() else ()) if _is_listed(path)]
    return sorted((p for p in found if (p / manifests.NAME).is_file()), key=lambda p: (order(p), p.name))


def _is_listed(path: Place) -> bool:
    aside = _ASIDE.fullmatch(path.name)
    return not path.name.startswith(".") or (aside is not None and not (path.parent / aside[1]).exists())


def order(path: Place) -> int:
    """A number that grows with each checkpoint written to a folder: clocks and step numbers may go back."""
    number = manifests.peek(path).get("order")
    return number if isinstance(number, int) else 0


@overload
def newest(folder: Path) -> Path | None: ...
@overload
def newest(folder: Place | str) -> Place | None: ...
def newest(folder: Place | str) -> Any:
    """The checkpoint written last in ``folder``, or None."""
    return next(reversed(list_checkpoints(folder)), None)


@overload
def find(path: Path) -> Path: ...
@overload
def find(path: Place | str) -> Place: ...
def find(path: Place | str) -> Any:
    """The checkpoint that ``path`` means: itself, or the newest of a run folder or of a folder of checkpoints.

    Raises CheckpointError if there is none.
    """
    path = as_place(path)
    if (path / manifests.NAME).is_file():
        return path
    found = newest(path / "checkpoints") or newest(path)
    if found is None:
        state = "has no manifest.json, and no checkpoints are in it" if path.is_dir() else "does not exist"
        if isinstance(path, Path) and path.is_file():
            raise CheckpointError(
                f"{path} is a file, and a checkpoint is a folder; make one of what another program saved: "
                f"loopwright import-legacy {path} {path.with_name(f'{path.stem}-checkpoint')}"
            )
        runs = sorted(one.name for one in path.iterdir() if (one / "checkpoints").is_dir()) if path.is_dir() else []
        which = f": the newest in it is {path / runs[-1]}" if runs else ""  # their names begin with the time
        raise CheckpointError(
            f"{path} is not a checkpoint: it {state}. Give the folder of a run or of a checkpoint{which}"
        )
    return found


@overload
def index(folder: Path) -> dict[str, Path | None]: ...
@overload
def index(folder: Place | str) -> dict[str, Place | None]: ...
def index(folder: Place | str) -> Any:
    """``{"last": path, "best": path}`` of a folder of checkpoints, read from its ``index.json``.

    The file is a cache: where it is missing, damaged, names what is gone or knows no best one, the manifests tell.
    """
    folder = as_place(folder)
    try:
        cached = json.loads(_small(folder / INDEX).decode())
        found = {key: folder / cached[key] if cached[key] else None for key in ("last", "best")}
    except Exception:  # whatever stands there, and whatever a library behind a URL raises
        found = {}
    present = list_checkpoints(folder)
    if found and found["last"] == next(reversed(present), None) and found["best"] in present:
        return found
    return {"last": next(reversed(present), None), "best": best(present)}


def _small(file: Place) -> bytes:
    """A small regular file: what is no file could be read for ever."""
    if isinstance(file, Remote):
        return file.read_bytes()
    if not file.is_file() or file.stat().st_size > 1 << 16:
        raise OSError(f"{file} is no small file")
    return file.read_bytes()


def write_index(folder: Place, *, last: Place | None, best: Place | None) -> None:
    """Write ``index.json``, in one move."""
    data = json.dumps({"last": last and last.name, "best": best and best.name}).encode()
    if isinstance(folder, Remote):
        (folder / INDEX).write_bytes(data)
        return
    temporary = folder / f".{INDEX}.writing"
    try:
        temporary.write_bytes(data)
        os.replace(temporary, folder / INDEX)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def best(checkpoints: Iterable[Place]) -> Place | None:
    """The one with the best monitored value; the earliest of equals, None where nothing was monitored."""
    ranked = [(value, path) for path in checkpoints if (value := monitored(path)) is not None]
    return min(ranked, key=lambda pair: pair[0])[1] if ranked else None


def monitored(path: Place, monitor: str | None = None) -> float | None:
    """The monitored value of a checkpoint, smaller is better; None where there is none (of that name)."""
    info: Any = manifests.peek(path).get("info")
    try:
        found = next(i for i in (info, *info.get("others", ())) if monitor is None or i.get("monitor") == monitor)
        value = float(decode(found.get("value"), {}))
        return None if math.isnan(value) else -value if found.get("mode") == "max" else value
    except (StopIteration, AttributeError, TypeError, ValueError, OverflowError, CheckpointError):
        return None  # no such value, or a manifest that nobody has verified
