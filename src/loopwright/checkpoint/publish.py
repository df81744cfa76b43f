"""How a checkpoint comes to be, is replaced and goes, so that at any moment it is there as a whole or not at all.

On a local disk it is made in a hidden folder beside its place and renamed into it. An object store has no rename:
there a checkpoint exists when its manifest does, which is written last and deleted first; a mark stands in its folder
while it is incomplete. Whatever a killed process leaves, ``sweep`` removes when the next one starts.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from loopwright.checkpoint import manifest as manifests
from loopwright.checkpoint.places import Place, Remote, as_place
from loopwright.checkpoint.streams import sync
from loopwright.errors import CheckpointError

__all__ = ["delete", "publish", "sweep"]

Fill = Callable[[Place, str], None]
"""Writes the files of a checkpoint into a folder, the manifest last; the text distinguishes their names."""

_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(writing|deleted|replaced)|\.index\.json\.writing")
_MARK = ".unfinished"  # in a folder on an object store


def publish(folder: Place, fill: Fill) -> None:
    """Make the checkpoint ``folder`` of what ``fill`` writes; an older one of that name is there until it is whole.

    Whatever is raised, nothing new is left and what was there before is there still.
    """
    taken = folder.exists() if isinstance(folder, Path) else any(folder.iterdir())
    if taken and not any((folder / name).is_file() for name in (manifests.NAME, _MARK)) and not _is_rest(folder):
        raise CheckpointError(f"{folder} exists and is not a checkpoint (it has no manifest.json); nothing was written")
    if isinstance(folder, Path):
        _publish_local(folder, fill)
    else:
        _publish_remote(folder, fill)


def _is_rest(folder: Place) -> bool:
    """True for what is left of a checkpoint that has lost its manifest: files with the names of ours, and no others."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return "state.json" in names and all(manifests.FILE.fullmatch(name) for name in names)


def _publish_local(folder: Path, fill: Fill) -> None:
    temporary = _beside(folder, "writing")
    try:
        _make(folder.parent)
        temporary.mkdir()
        fill(temporary, "")
        _move(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _move(temporary: Path, folder: Path) -> None:
    """Rename into place. An older one steps aside first; ``sweep`` puts it back if it came to no more."""
    aside = _beside(folder, "replaced")
    replaces = folder.exists()
    if replaces:
        os.rename(folder, aside)
    try:
        os.rename(temporary, folder)
        try:
            sync(folder.parent)
        except BaseException:  # the new name may not be on disk
            os.rename(folder, temporary)
            raise
    except BaseException:
        if replaces:
            os.rename(aside, folder)
        raise
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)


def _make(folder: Path) -> None:
    """Make a folder and those above it, each synced into its parent."""
    if not folder.exists():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{what}")


def _publish_remote(folder: Remote, fill: Fill) -> None:
    """New files stand beside those of an older checkpoint under other names; to write the manifest is to switch."""
    folder.make()
    replaces = (folder / manifests.NAME).is_file()
    (folder / _MARK).write_bytes(b"")
    try:
        fill(folder, f"~{secrets.token_hex(4)}" if replaces else "")
    except BaseException:
        with suppress(Exception):
            _tidy(folder)
        raise
    _tidy(folder)


def _tidy(folder: Remote) -> None:
    """Remove from a marked folder what its manifest does not name, all if there is none, and then the mark."""
    named = manifests.parse(folder)["files"] if (folder / manifests.NAME).is_file() else {}
    for file in list(folder.iterdir()):
        if file.name not in (*named, manifests.NAME, _MARK):
            file.remove()
    (folder / _MARK).remove()
    if not named and folder.exists():  # where there are folders
        folder.remove()


def delete(path: Place | str) -> None:
    """Remove a checkpoint, in such an order that no half of it is ever taken for one.

    Raises CheckpointError if it is not a checkpoint, and when it cannot be removed.
    """
    path = as_place(path)
    if not (path / manifests.NAME).is_file():
        raise CheckpointError(f"{path} is not a checkpoint: it has no manifest.json; nothing was deleted")
    try:
        if isinstance(path, Path):
            away = _beside(path, "deleted")
            os.rename(path, away)
            shutil.rmtree(away)
        else:
            (path / _MARK).write_bytes(b"")
            (path / manifests.NAME).remove()
            _tidy(path)
    except OSError as error:
        raise CheckpointError(f"the checkpoint {path} could not be deleted: {error}") from error


def sweep(folder: Place | str) -> list[Place]:
    """Remove what killed processes left in a folder of checkpoints, and return it; nothing else is touched.

    Call it when a run opens its folder, before anything is written there.
    """
    folder = as_place(folder)
    return _sweep_local(folder) if isinstance(folder, Path) else _sweep_remote(folder)


def _sweep_local(folder: Path) -> list[Place]:
    swept: list[Place] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _UNFINISHED.fullmatch(path.name)
        if match is None:
            continue
        if match[2] == "replaced" and not (folder / match[1]).exists():
            os.rename(path, folder / match[1])  # killed between the two renames of a replacement
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        swept.append(path)
    return swept


def _sweep_remote(folder: Remote) -> list[Place]:
    marked = [path for path in sorted(folder.iterdir()) if (path / _MARK).is_file()]
    for path in marked:
        _tidy(path)
    return [path for path in marked if not (path / manifests.NAME).is_file()]
