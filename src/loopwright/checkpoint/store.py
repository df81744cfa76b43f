"""Checkpoints on disk: written whole or not at all, verified when read, deleted without leaving half of one.

A checkpoint is made in a hidden folder beside its place, each file hashed while it is written and synced, the
manifest last, and then renamed into place. Whatever happens in between leaves the older checkpoints as they
were.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import SafetensorError
from torch import Tensor

from loopwright.checkpoint import manifest as manifests
from loopwright.checkpoint.decode import decode
from loopwright.checkpoint.encode import encode
from loopwright.checkpoint.shelf import list_checkpoints, order
from loopwright.checkpoint.tensors import pack, unpack
from loopwright.errors import CheckpointError

__all__ = ["Contents", "delete", "read", "sweep", "verify", "write"]

STATE = "state.json"
_OURS = ("optimizer", "state")  # groups of the tensors found in the state
_CHUNK = 1 << 22
_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(writing|deleted|replaced)")


def write(folder: Path, files: Mapping[str, Mapping[str, Tensor]], state: Any, info: Mapping[str, Any]) -> Path:
    """Write a checkpoint and return its folder, once all of it is on disk.

    ``files``: tensors by group; the group ``model`` becomes ``model.safetensors`` with the same keys.
    ``state``: what ``encode`` takes; tensors below its key ``optimizers`` go to ``optimizer.safetensors``,
    others to ``state.safetensors``. ``info``: plain data for the manifest. An older checkpoint of that name
    is replaced. Raises CheckpointError if it cannot be written (the disk is full, ``folder`` is something
    else, a value has an unknown type); what was there before is there still.

    >>> import torch
    >>> files, state = {"model": {"w": torch.ones(2)}}, {"seen": (1, 2)}
    >>> path = write(Path("checkpoints/step-00000001"), files, state, {"step": 1})
    >>> read(path).state, read(path).files["model"]["w"]
    ({'seen': (1, 2)}, tensor([1., 1.]))
    """
    folder = Path(folder)
    if folder.exists() and not (folder / manifests.NAME).is_file():
        raise CheckpointError(f"{folder} exists and is not a checkpoint (it has no manifest.json); nothing was written")
    temporary = _beside(folder, "writing")
    try:
        _make(folder.parent)
        temporary.mkdir()
        _fill(temporary, files, state, info, order=_next_order(folder.parent))
        _move(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint {folder} could not be written: {error}. Older ones are untouched"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _fill(
    temporary: Path,
    files: Mapping[str, Mapping[str, Tensor]],
    state: Any,
    info: Mapping[str, Any],
    *,
    order: int,
) -> None:
    plain, tensors = encode(state)
    groups = dict(files)
    for name in _OURS:
        mine = {k: t for k, t in tensors.items() if k.startswith("optimizers") == (name == "optimizer")}
        if mine and name in groups:
            raise CheckpointError(f"the group name {name!r} is used for the tensors of the state; choose another")
        groups |= {name: mine} if mine else {}
    entries: dict[str, dict[str, Any]] = {}
    for group, named in groups.items():
        file = f"{quote(group, safe='')}.safetensors"
        if not manifests.FILE.fullmatch(file):
            raise CheckpointError(f"{group!r} cannot name a group of tensors; begin with a letter or a digit")
        if file.lower() in (name.lower() for name in entries):
            raise CheckpointError(f"the group {group!r} differs from another in upper and lower case only; rename one")
        data, notes = pack(named)
        entries[file] = {"group": group, **_save(temporary / file, data), **notes}
    entries[STATE] = _save(temporary / STATE, json.dumps(plain, allow_nan=False, separators=(",", ":")).encode())
    about, kept = encode(dict(info), "info")
    if kept:
        raise CheckpointError(f"info holds plain data only, and {next(iter(kept))} is a tensor; use float(...)")
    manifest = {"format": manifests.FORMAT, "order": order, "info": about, "files": entries}
    _save(temporary / manifests.NAME, manifests.render(manifest))
    _sync(temporary)


def _save(file: Path, data: bytes) -> dict[str, Any]:
    """Write and sync a file; its size and sha256."""
    digest, view = hashlib.sha256(), memoryview(data)
    with open(file, "xb") as out:
        for start in range(0, len(data), _CHUNK):
            out.write(view[start : start + _CHUNK])
            digest.update(view[start : start + _CHUNK])
        out.flush()
        os.fsync(out.fileno())
    return {"size": len(data), "sha256": digest.hexdigest()}


def _move(temporary: Path, folder: Path) -> None:
    """Rename into place. An older one steps aside first; ``sweep`` puts it back if it came to no more."""
    aside = _beside(folder, "replaced")
    replaces = folder.exists()
    if replaces:
        os.rename(folder, aside)
    try:
        os.rename(temporary, folder)
    except BaseException:
        if replaces:
            os.rename(aside, folder)
        raise
    _sync(folder.parent)
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)


def _make(folder: Path) -> None:
    """Make a folder and those above it, each synced into its parent."""
    if not folder.exists():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _sync(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{what}")


def _next_order(folder: Path) -> int:
    return max((order(p) for p in list_checkpoints(folder)), default=0) + 1


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds: ``info`` of its manifest, the decoded ``state``, tensors of ``files`` by group."""

    path: Path
    info: dict[str, Any]
    state: Any
    files: dict[str, dict[str, Tensor]]


def read(path: Path | str) -> Contents:
    """The contents of a checkpoint, all on the CPU, after its sizes and checksums have been verified.

    Reads tensors and plain data only; nothing in it is executed. Raises CheckpointError that names the bad
    file, the checksum expected and found, and the newest good checkpoint beside it.
    """
    path = Path(path)
    try:
        manifest = verify(path)
        entries = manifest["files"]
        files = {e["group"]: unpack(path / name, e) for name, e in entries.items() if name != STATE}
        tensors = {k: t for group in _OURS for k, t in files.pop(group, {}).items()}
        state = decode(json.loads((path / STATE).read_bytes()), tensors)
        return Contents(path, decode(manifest["info"], {}), state, files)
    except (CheckpointError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        text = (
            str(error) if isinstance(error, CheckpointError) else f"{path} is damaged ({type(error).__name__}: {error})"
        )
        raise CheckpointError(text + _instead(path)) from error


def verify(path: Path | str) -> dict[str, Any]:
    """The manifest of a checkpoint whose files all have the size and sha256 that it says.

    Raises CheckpointError that names the first bad file.
    """
    path = Path(path)
    manifest = manifests.parse(path)
    for name, entry in manifest["files"].items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != entry["size"]:
                raise CheckpointError(f"{file} is damaged: it has {size} bytes, and the manifest says {entry['size']}")
            with open(file, "rb") as data:
                found = hashlib.file_digest(data, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
        if found != entry["sha256"]:
            raise CheckpointError(f"{file} is damaged: its sha256 is {found}, and the manifest says {entry['sha256']}")
    return manifest


def _instead(path: Path) -> str:
    """Which checkpoint to use instead of a bad one."""
    for other in reversed(list_checkpoints(path.parent)):
        if other != path:
            with suppress(CheckpointError):
                verify(other)
                return f". The newest good checkpoint beside it is {other}"
    return ""


def delete(path: Path | str) -> None:
    """Remove a checkpoint: first renamed away, so that no half of it is ever taken for one.

    Raises CheckpointError if it is not a checkpoint.
    """
    path = Path(path)
    if not (path / manifests.NAME).is_file():
        raise CheckpointError(f"{path} is not a checkpoint: it has no manifest.json; nothing was deleted")
    away = _beside(path, "deleted")
    os.rename(path, away)
    shutil.rmtree(away)


def sweep(folder: Path | str) -> list[Path]:
    """Remove what killed processes left in a folder of checkpoints, and return it; nothing else is touched.

    Call it when a run opens its folder, before anything is written there.
    """
    folder, swept = Path(folder), []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _UNFINISHED.fullmatch(path.name)
        if match is None:
            continue
        if match[2] == "replaced" and not (folder / match[1]).exists():
            os.rename(path, folder / match[1])  # killed between the two renames of a replacement
            continue
        shutil.rmtree(path)
        swept.append(path)
    return swept
