"""Recorded runs, sent to another logger afterwards: ``loopwright log RUN --to mlflow``."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from loopwright.delivery import check_logger
from loopwright.errors import SettingError
from loopwright.events import Hooks
from loopwright.folder import put, recorded
from loopwright.loggers.jsonl import read_whole_lines, unreadable
from loopwright.loggers.named import logger_named
from loopwright.parallel import Plain, Single
from loopwright.state import Progress, Run, has_state
from loopwright.written import warn

__all__ = ["send", "send_whole_lines"]

_PLACE = ("kind", "step", "epoch", "samples", "seconds")
_NOTE = "sent.json"


def send(folder: str | os.PathLike[str], to: Any, *, again: bool = False) -> int:
    """Give the records, figures, texts and files of a run folder to the logger ``to``; how many records it got.

    ``to`` is a logger or the name of one. What has been sent before to one of that name or class is not sent again:
    ``sent.json`` in the folder says so, and a run that is still going on may be sent as often as you like.
    ``again=True`` sends everything, after what it had was deleted. A last line of ``metrics.jsonl`` that is not
    complete is left out; so are other damaged lines, with a warning that numbers them.

    Raises SettingError for what is no run folder or no logger.

    >>> from loopwright.folder import open_folder
    >>> path = open_folder("runs", "digits", settings={}, seed=0)
    >>> written = (path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "train/loss": 0.5}\\n{"kind": "tr')
    >>> send(path, "csv:table.csv"), send(path, "csv:table.csv")
    (1, 0)
    """
    return send_whole_lines(folder, to, again=again)[0]


def send_whole_lines(folder: str | os.PathLike[str], to: Any, *, again: bool = False) -> tuple[int, int | None]:
    """What ``send`` does and returns, and the number of a last line that was left out; None if there is none such."""
    record, place = recorded(folder), Path(folder)
    logger = logger_named(to) if isinstance(to, str) else to
    check_logger(logger)
    label = to if isinstance(to, str) else type(logger).__name__
    notes = _notes(place)
    before = {} if again else notes.get(label, {})
    lines = place / "metrics.jsonl"
    records, bad, torn = read_whole_lines(lines) if lines.exists() else ([], [], None)
    if bad:
        warn(f"{unreadable(lines, bad)}. {'It is' if len(bad) == 1 else 'They are'} left out, the others are sent")
    if before.get("state") and has_state(logger):
        logger.load_state_dict(before["state"])
    count = _give(logger, _bare(place, record), record, records[before.get("records", 0) :], before)
    known = {"records": len(records), "files": sorted(map(str, _files(place)))}
    notes[label] = known | ({"state": logger.state_dict()} if has_state(logger) else {})
    _write(place / _NOTE, notes)
    return count, torn


def _give(logger: Any, run: Run, record: dict[str, Any], new: list[dict[str, Any]], before: dict[str, Any]) -> int:
    """Everything in the order of a run: it starts, tells its config, its records, its files, and ends."""
    if hasattr(logger, "start"):
        logger.start(run)
    if hasattr(logger, "log_config") and not before:
        logger.log_config({key: value for key, value in record.items() if key != "status"})
    for one in new:
        values = {key: float(value) for key, value in one.items() if key not in _PLACE and _is_number(value)}
        logger.log(_progress(one), values, str(one.get("kind", "train")))
    for file in _files(run.folder or Path()):
        if str(file) not in before.get("files", ()):
            _hand_over(logger, run.folder or Path(), file)
    if hasattr(logger, "flush"):
        logger.flush()  # also of a run that failed: one that goes on is sent from here
    if hasattr(logger, "close"):
        logger.close(record["status"])
    return len(new)


def _files(folder: Path) -> list[Path]:
    """Texts and files that the run has logged, relative to its folder; its figures are files as well."""
    found = [p for kind in ("figures", "texts", "artifacts") for p in sorted((folder / kind).rglob("*"))]
    return [p.relative_to(folder) for p in found if p.is_file() and not p.is_symlink()]


def _hand_over(logger: Any, folder: Path, file: Path) -> None:
    kind, *parts = file.parts
    name, _, step = "/".join(parts).rpartition("-")
    if kind == "texts" and hasattr(logger, "log_text") and step.partition(".")[0].isdigit():
        logger.log_text(Progress(step=int(step.partition(".")[0])), name, (folder / file).read_text(encoding="utf-8"))
    elif hasattr(logger, "log_artifact"):
        logger.log_artifact(Progress(), file.parent.as_posix(), folder / file)


def _bare(folder: Path, record: dict[str, Any]) -> Run:
    """What a logger sees in ``start``: the run without what it trained."""
    return Run(
        task=None, stages=[], models={}, optimizers={}, callbacks=[], hooks=Hooks(), comm=Single(), precision=Plain(),
        device=torch.device("cpu"), folder=folder.resolve(), settings={"name": record["name"]},
    )  # fmt: skip


def _progress(record: dict[str, Any]) -> Progress:
    step, epoch, samples, seconds = (
        value if _is_number(value := record.get(key, 0)) and math.isfinite(value) else 0 for key in _PLACE[1:]
    )
    return Progress(step=int(step), epoch=int(epoch), samples=int(samples), seconds=float(seconds))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _notes(folder: Path) -> dict[str, Any]:
    try:
        notes = json.loads((folder / _NOTE).read_bytes())
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _write(file: Path, notes: dict[str, Any]) -> None:
    text = json.dumps(notes)
    try:
        put(file, lambda part: part.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"all was sent, but {file} cannot be written ({error}): it would be sent again") from error
