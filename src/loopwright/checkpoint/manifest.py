"""The manifest of a checkpoint: what it holds, and the checksum of each file.

A checkpoint exists when its manifest does, which reads::

{"checksum": "...", "format": 1, "order": 12, "info": {"step": 1200, ...},
 "files": {"model.safetensors": {"group": "model", "size": 4096, "sha256": "..."}, "state.json": {...}}}
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from loopwright.errors import CheckpointError

__all__ = ["FILE", "FORMAT", "NAME", "parse", "peek", "render"]

NAME = "manifest.json"
FORMAT = 1
FILE = re.compile(r"[\w%~-][\w.%~-]*\.(safetensors|json)")


def render(manifest: dict[str, Any]) -> bytes:
    """The text of a manifest, with the checksum of everything else in it."""
    return json.dumps({"checksum": _checksum(manifest), **manifest}, indent=1, allow_nan=False).encode()


def _checksum(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def parse(path: Path) -> dict[str, Any]:
    """The verified manifest of the checkpoint folder ``path``.

    Raises CheckpointError if there is none, if it is damaged, and if a newer version wrote it.
    """
    file = path / NAME
    try:
        manifest: Any = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        state = "has no manifest.json" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} is not a checkpoint: it {state}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: it is not JSON ({error})") from None
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{file} is damaged: it holds a {type(manifest).__name__}, not an object")
    expected, found = manifest.get("checksum"), _checksum(manifest)
    if expected != found:
        raise CheckpointError(f"{file} is damaged: it says that its checksum is {expected}, and it is {found}")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.get('format')!r}, and this version of Loopwright reads format {FORMAT}. "
            "Read it with the version that wrote it, or a newer one: pip install -U loopwright"
        )
    _check_files(file, manifest.get("files"))
    return manifest


def _check_files(file: Path, files: Any) -> None:
    """A checksum proves that nothing was damaged, not that nobody forged it: no path may lead out of the folder."""
    for name, entry in files.items() if isinstance(files, dict) else [("files", None)]:
        fits = isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
        if not fits or not FILE.fullmatch(name):
            raise CheckpointError(f"{file} names a file that no checkpoint has: {name!r}: {entry!r}")


def peek(path: Path) -> dict[str, Any]:
    """The manifest as it stands, unverified; empty if there is none that can be read. For listings."""
    try:
        manifest = json.loads((path / NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}
