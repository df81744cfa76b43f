"""Figures, texts and files that a run logs, as files in a folder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from loopwright.errors import SettingError
from loopwright.folder import put
from loopwright.state import Progress

__all__ = ["as_path", "keep_artifact", "keep_figure", "keep_text"]

_LONGEST = 60  # letters of a part of a name: a file name ends at 255 bytes


def as_path(name: str) -> str:
    """A logged name as a relative path with "/": no part of it hides, leads upwards, or means anything to a shell.

    >>> as_path("valid/confusion"), as_path("../../etc/passwd"), as_path("a:b?")
    ('valid/confusion', '%2e%2e/%2e%2e/etc/passwd', 'a%3ab%3f')
    """
    parts = [re.sub(r"^\.+|[^\w .+=@(),-]", _escaped, part) for part in name.split("/") if part]
    return "/".join(part[:_LONGEST] for part in parts) or "%"


def _escaped(found: re.Match[str]) -> str:
    return "".join(f"%{byte:02x}" for byte in found[0].encode("utf-8", "surrogatepass"))


def keep_figure(folder: Path, progress: Progress, name: str, figure: Any) -> Path:
    """Write ``figures/<name>-<step>.png``; the figure is drawn now, and may be changed or closed afterwards."""
    path = _place(folder / "figures", progress, name, "png")
    put(path, lambda part: figure.savefig(part, format="png"))
    return path


def keep_text(folder: Path, progress: Progress, name: str, text: str) -> Path:
    """Write ``texts/<name>-<step>.txt``."""
    path = _place(folder / "texts", progress, name, "txt")
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def keep_artifact(folder: Path, name: str, path: Path) -> Path:
    """Copy a file or a folder to ``artifacts/<name>/``, unless it is in ``folder`` already."""
    source, folder = path.resolve(), folder.resolve()
    if source.is_relative_to(folder):
        return source
    if folder.is_relative_to(source):
        raise SettingError(f"run.log({{{name!r}: Path({str(path)!r})}}): the run folder {folder} lies in it")
    target = folder / "artifacts" / as_path(name) / source.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)
    return target


def _place(folder: Path, progress: Progress, name: str, suffix: str) -> Path:
    path = folder / f"{as_path(name)}-{progress.step:08d}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
