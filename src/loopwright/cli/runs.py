"""``loopwright env``, ``loopwright runs`` and ``loopwright log``."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from loopwright import __version__
from loopwright.cli.tables import safe

__all__ = ["print_environment", "print_runs", "send_run"]


def print_environment() -> int:
    """Versions and hardware, a line each."""
    import numpy
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    rows = {
        "loopwright": __version__, "python": sys.version.split()[0], "torch": torch.__version__,
        "numpy": numpy.__version__, "platform": platform.platform(), "accelerator": str(accelerator or "none"),
        "threads": str(torch.get_num_threads()),
    }  # fmt: skip
    for name, value in rows.items():
        print(f"{name:<12} {value}")
    return 0


def print_runs(folder: Path) -> int:
    """The runs below ``folder``, the newest first, with status, what ended those that failed, and metrics.

    ``folder`` is that of all runs, that of the runs of a name, or a run.
    """
    depths = ("run.json", "*/run.json", "*/*/run.json")
    files = (path for depth in depths for path in folder.glob(depth) if path.is_file())
    found = sorted(files, key=lambda path: path.parent.name, reverse=True)
    if not found:
        print(f"no runs in {folder}")
    for path in found:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            metrics = dict(record.get("metrics") or {})
            shown = [f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, (int, float))]
            line = "  ".join([f"{_status(record):<11}", *_end_of(record), *shown])
        except (OSError, ValueError, AttributeError, TypeError, OverflowError, RecursionError):
            print(f"{safe(str(path.parent))}  unreadable run.json")
            continue
        print(safe(f"{path.parent}  {line}"))
    return 0


def send_run(run: str, to: str, *, again: bool) -> int:
    """Send the records of a run to the logger of that name."""
    from loopwright.loggers.sending import send_whole_lines
    from loopwright.report.reading import find_run

    folder = find_run(run)
    count, torn = send_whole_lines(folder, to, again=again)
    print(safe(f"{count} record{'s' * (count != 1)} of {folder} sent to {to}"))
    if torn is not None:
        print(safe(f"left out: line {torn} of {folder / 'metrics.jsonl'}, which was not written to its end"))
    return 0


def _status(record: dict[str, Any]) -> str:
    """What ``run.json`` says; "killed" for one that says it is running, whose process on this machine is gone."""
    status, pid = str(record.get("status", "?")), record.get("pid")
    if status == "running" and record.get("host") == platform.node() and isinstance(pid, int) and not _is_alive(pid):
        return "killed"
    return status


def _is_alive(pid: int) -> bool:
    if sys.platform == "win32":  # where os.kill(pid, 0) ends a process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is another user's
        return True
    return True


def _end_of(record: dict[str, Any]) -> list[str]:
    """What ended a run too early, and where; empty for one that runs or is done."""
    error, progress = record.get("error"), record.get("progress")
    if not isinstance(error, dict):
        return []
    step = f"after step {progress.get('step')}: " if isinstance(progress, dict) else ""
    text = f"{error.get('type')}: {error.get('message')}".removesuffix(": ").partition("\n")[0]
    notes = error.get("notes")
    for note in map(str, notes if isinstance(notes, list) else ()):
        if note.startswith("[loopwright] rank "):  # of a rank that failed the others only know that it is gone
            text = note.removeprefix("[loopwright] ").partition("\n")[0]
    return [f"{step}{text[:100]}{'...' * (len(text) > 100)}"]
