"""The manifest of a checkpoint: what it holds, and the checksum of each file.

A checkpoint exists when its manifest does, which reads::

{"checksum": "...", "format": 1, "order": 12, "info": {"step": 1200, ...},
 "files": {"model.safetensors": {"group": "model", "size": 4096, "blake2b": "..."}, "state.json": {...}}}

``checksum`` and ``format`` mean the same in every format, so that any version can tell damage from news.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from reprlib import repr  # what it shows of a forged value is short
from typing import Any

from loopwright import __version__
from loopwright.checkpoint.migrations import FORMAT, migrate_manifest
from loopwright.checkpoint.places import Place
from loopwright.checkpoint.streams import HASHES
from loopwright.errors import CheckpointError
from loopwright.text import with_article

__all__ = ["FILE", "FORMAT", "NAME", "no_link", "parse", "peek", "render"]

NAME = "manifest.json"
FILE = re.compile(r"[\w%~-][\w.%~-]*\.(safetensors|json)")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LARGEST = 1 << 26  # bytes: a manifest has a line or two for a tensor that is tied or strided, no more


def render(manifest: dict[str, Any]) -> bytes:
    """The text of a manifest, with the checksum of everything else in it."""
    return json.dumps({"checksum": _checksum(manifest), **manifest}, indent=1, allow_nan=False).encode()


def _checksum(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def parse(path: Place) -> dict[str, Any]:
    """The verified manifest of the checkpoint folder ``path``, in the layout of today whatever version wrote it.

    ``format`` says what was written: hand it to ``migrate_state`` with the state. Raises CheckpointError if there is
    none, if it is damaged, and if a newer version wrote it.
    """
    file = path / NAME
    no_link(file)
    if not file.is_file():  # not merely missing: a pipe or a device of that name would never end
        state = "has no manifest.json" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} is not a checkpoint: it {state}")
    try:
        manifest, text = _load(file)
        expected, found = manifest.get("checksum"), _checksum(manifest)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if expected != found:
        raise CheckpointError(
            f"{file} is damaged: it says that its checksum is {str(expected)[:64]}, and it is {found}"
        )
    if b"".join(text.split()) != b"".join(render({k: v for k, v in manifest.items() if k != "checksum"}).split()):
        raise CheckpointError(f"{file} is damaged: it means what was written, in other bytes")  # 1e-05 for 1E-05
    written = manifest.get("format")
    if type(written) is not int or written < 0:
        raise CheckpointError(f"{file} is damaged: its format is {repr(written)}, not a number from 0")
    if written > FORMAT:
        raise CheckpointError(
            f"{path} has format {written}, and this version of Loopwright reads format {FORMAT} and older: it was "
            f"written by a newer Loopwright than {__version__}. To read it: pip install -U loopwright"
        )
    try:
        manifest = migrate_manifest(manifest)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is damaged: it does not hold what format {written} has ({type(error).__name__}: {error})"
        ) from error
    _check_files(file, manifest.get("files"))
    if not isinstance(manifest.get("info"), dict):
        raise CheckpointError(f"{file} is damaged: its info is {repr(manifest.get('info'))}, not an object")
    return manifest


def no_link(file: Place) -> None:
    """Raise CheckpointError for a link: it leads to a file that others may have, change or not want read."""
    if isinstance(file, Path) and file.is_symlink():
        raise CheckpointError(
            f"{file} is a link, and the files of a checkpoint lie in its folder. If you have put it there, put a copy "
            f"in its place: cp --remove-destination {os.path.realpath(file)} {file}"
        )


def _load(file: Place) -> tuple[dict[str, Any], bytes]:
    """The JSON object in a file, and its bytes; ValueError for what is none, or might be read in two ways."""
    if not file.is_file():
        raise ValueError("it is not a file")
    if (size := file.stat().st_size) > _LARGEST:
        raise ValueError(f"it has {size:,} bytes, and no manifest has more than {_LARGEST:,}")
    try:
        text = file.read_bytes()
        manifest: Any = json.loads(text.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"it holds {with_article(type(manifest).__name__)}, not an object")
    return manifest, text


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {repr(key)} stands there twice")
        found[key] = value
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number in JSON")


def _check_files(file: Place, files: Any) -> None:
    """A checksum proves that nothing was damaged, not that nobody forged it: no path may lead out of the folder."""
    for name, entry in files.items() if isinstance(files, dict) else [("files", None)]:
        if not (FILE.fullmatch(name) and isinstance(entry, dict) and _is_entry(entry)):
            raise CheckpointError(f"{file} names a file that no checkpoint has: {repr(name)}: {repr(entry)}")


def _is_entry(entry: dict[str, Any]) -> bool:
    size, digests = entry.get("size"), [entry[name] for name in HASHES if name in entry]
    hashed = len(digests) == 1 and isinstance(digests[0], str) and _DIGEST.fullmatch(digests[0]) is not None
    return type(size) is int and size >= 0 and hashed


def peek(path: Place) -> dict[str, Any]:
    """The manifest as it stands, unverified; empty if there is none that can be read. For listings."""
    try:
        no_link(path / NAME)
        return migrate_manifest(_load(path / NAME)[0])
    except (CheckpointError, OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
