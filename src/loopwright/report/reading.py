"""What a run folder tells, for a report: read with patience, since a run may have been killed, or still be going on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loopwright.checkpoint import list_checkpoints
from loopwright.errors import SettingError, choose
from loopwright.folder import newest_in, read_settings
from loopwright.report.log import Curve, read_log

__all__ = ["Recorded", "find_run", "read_run"]

_LARGEST = 1 << 26  # bytes of a file that is read whole
_CONFIG = 200_000  # characters of settings that are taken apart


@dataclass(slots=True)
class Recorded:
    """A run as its folder tells it. ``notes`` say what could not be read.

    ``curves`` are by kind of record ("train", "valid", "epoch", "test", "step") and name. ``parts`` holds what
    ``lw.Report`` has written into the folder ``report``, by file name; ``record`` is ``run.json``.
    """

    folder: Path
    record: dict[str, Any] = field(default_factory=dict)
    config: Any = None
    curves: dict[str, dict[str, Curve]] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    profile: dict[str, Any] = field(default_factory=dict)
    packages: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.record.get("name") or self.folder.parent.name or self.folder.name)

    @property
    def status(self) -> str:
        status = str(self.record.get("status") or "unknown")
        return status if len(status) <= 20 else f"{status[:20]}…"

    def part(self, name: str) -> dict[str, Any]:
        """A dict that ``lw.Report`` wrote, or an empty one."""
        found = self.parts.get(name)
        return found if isinstance(found, dict) else {}

    def fact(self, *path: str) -> Any:
        """A value of ``run.json``, None where it is not there: the file may be anybody's."""
        found: Any = self.record
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        return found


def find_run(where: str | Path) -> Path:
    """The folder of a run: ``where`` itself, or the newest run in it, as in ``runs/<name>``.

    Raises SettingError for anything else.
    """
    path = Path(where)
    if (path / "run.json").is_file():
        return path
    found: Path | None = newest_in(path)
    if found is not None:
        return found
    if path.exists() and (path.parent / "run.json").is_file():
        what = "a file" if path.is_file() else "a folder"
        raise SettingError(f"{path} is {what} of a run; give that: {path.parent}")
    if list_checkpoints(path.parent) and (path.parent.parent / "run.json").is_file():
        raise SettingError(f"{path} is a checkpoint; give the folder of its run: {path.parent.parent}")
    known = [str(one) for one in (*_below(path), *_below(path.parent))]
    state = "is a file" if path.is_file() else "does not exist"
    state = "is not the folder of a run: it has no run.json" if path.is_dir() else state
    told = choose(path, known) if known else "A run writes one with Trainer(folder='runs')."
    raise SettingError(f"{path} {state}. {told} To list runs: loopwright runs FOLDER")


def _below(folder: Path) -> Iterator[Path]:
    """Folders in ``folder`` that hold runs."""
    try:
        inside = sorted(one for one in folder.iterdir() if one.is_dir())[:200]
    except OSError:
        return
    yield from (one for one in inside if (one / "run.json").is_file() or newest_in(one) is not None)


def read_run(folder: Path) -> Recorded:
    """All that the folder of a run tells. What is missing is left out, what is damaged is told in ``notes``."""
    run = Recorded(folder)
    record = _json(folder / "run.json", run.notes)
    run.record = record if isinstance(record, dict) else {}
    run.config = _config(folder / "config.yaml", run.notes)
    run.curves, more = read_log(folder / "metrics.jsonl")
    run.notes += more
    profile = _json(folder / "profile.json", run.notes)
    run.profile = profile if isinstance(profile, dict) else {}
    for name in ("about", "valid", "test", "warnings"):
        found = _json(folder / "report" / f"{name}.json", run.notes)
        if found is not None:
            run.parts[name] = found
    _steps(folder / "report" / "losses.safetensors", run)
    run.packages = (_text(folder / "environment.txt") or "").strip()
    return run


def _text(file: Path) -> str | None:
    try:
        if not file.is_file() or file.stat().st_size > _LARGEST:
            return None
        return file.read_bytes().decode("utf-8", "replace")
    except OSError:
        return None


def _json(file: Path, notes: list[str]) -> Any:
    text = _text(file)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        notes.append(f"{file.name} could not be read: {str(error)[:100]}")
        return None


def _config(file: Path, notes: list[str]) -> Any:
    """The settings as plain data, or as the text of the file."""
    text = _text(file)
    if text is None:
        return None
    if len(text) > _CONFIG:
        return text
    try:
        return read_settings(text)
    except ValueError:
        notes.append(f"{file.name} is no plain YAML and is shown as it is")
        return text


def _steps(file: Path, run: Recorded) -> None:
    """The loss of every step, as the kind "step"."""
    if not file.is_file():
        return
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found = load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        run.notes.append(f"{file.name} could not be read: {str(error)[:100]}")
        return
    for name, values in found.items():
        if values.ndim == 1 and values.dtype == np.float32 and len(values):
            curve = Curve(np.arange(1, len(values) + 1, dtype=np.int64), values.astype(np.float64))
            run.curves.setdefault("step", {})[f"train/{name}"] = curve
