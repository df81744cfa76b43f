"""Checkpoints: written whole or not at all, hashed while they are written, verified while they are read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import Tensor

from loopwright.checkpoint import manifest as manifests
from loopwright.checkpoint.decode import decode
from loopwright.checkpoint.encode import encode
from loopwright.checkpoint.migrations import migrate_state
from loopwright.checkpoint.pieces import File, joined, plan, wanted
from loopwright.checkpoint.places import Place, as_place
from loopwright.checkpoint.publish import publish
from loopwright.checkpoint.shelf import list_checkpoints, order
from loopwright.checkpoint.streams import HASHES, Hashed, Writer, new_hash
from loopwright.checkpoint.tensors import Layout, layout, unpack
from loopwright.errors import CheckpointError

__all__ = ["Contents", "Packed", "read", "verify", "write"]

STATE = "state.json"
_OURS = ("optimizer", "state")  # groups of the tensors found in the state
_STATE_SIZE = 1 << 28  # bytes of JSON that are read; what is large belongs into tensors
_READERS = 4  # files that are read at the same time
_LARGE = 1 << 22  # bytes of a group from which on it may become several files
_PARTS = 4  # files of a group at most


@dataclass(frozen=True, slots=True)
class Packed:
    """What goes into a checkpoint: the state and ``info`` as plain data, and all tensors by group and name.

    The plain data are a copy; the tensors are those of the run until ``Copies.of`` has made them one too. Raises
    CheckpointError for a value of unknown type, and for a group that cannot name a file. ``shards``: there may be
    DTensors, which all ranks write together.
    """

    groups: dict[str, dict[str, Tensor]]
    state: bytes
    info: Any

    @classmethod
    def of(
        cls, files: Mapping[str, Mapping[str, Tensor]], state: Any, info: Mapping[str, Any], *, shards: bool = False
    ) -> Packed:
        plain, tensors = encode(state, shards=shards)
        groups = {name: dict(named) for name, named in files.items()}
        for name in _OURS:
            mine = {k: t for k, t in tensors.items() if k.startswith("optimizers") == (name == "optimizer")}
            if mine and (taken := [group for group in files if re.fullmatch(rf"{name}(-\d+)?", group, re.IGNORECASE)]):
                raise CheckpointError(
                    f"the group name {taken[0]!r} is used for the tensors of the state; choose another"
                )
            groups |= {name: mine} if mine else {}
        known: set[str] = set()
        for group in groups:
            if not manifests.FILE.fullmatch(_file(group)):
                raise CheckpointError(f"{group!r} cannot name a group of tensors; begin with a letter or a digit")
            if _file(group).lower() in known:
                raise CheckpointError(
                    f"the group {group!r} differs from another in upper and lower case only; rename one"
                )
            known.add(_file(group).lower())
        about, kept = encode(dict(info), "info")
        if kept:
            raise CheckpointError(f"info holds plain data only, and {next(iter(kept))} is a tensor; use float(...)")
        text = json.dumps(plain, allow_nan=False, separators=(",", ":")).encode()
        if len(text) > _STATE_SIZE:
            raise CheckpointError(
                f"the state has {len(text):,} bytes besides its tensors, and at most {_STATE_SIZE:,} can be read "
                "again; keep large data in tensors or arrays"
            )
        return cls(groups, text, about)

    def write(self, folder: Place | str) -> Place:
        """Write a checkpoint and return its folder, once all of it is on disk; see ``write``."""
        folder = as_place(folder)
        try:
            if isinstance(folder, Path):
                self.need_space(folder)
            number = max((order(p) for p in list_checkpoints(folder.parent)), default=0) + 1
            publish(folder, lambda place, mark: self.fill(place, mark, number, _several(plan(self.groups, mark=mark))))
        except CheckpointError:
            raise
        except Exception as error:  # the libraries behind URLs raise errors of their own
            raise CheckpointError(
                f"the checkpoint {folder} could not be written: {error}. Older ones are untouched"
            ) from error
        return folder

    def fill(self, folder: Place, mark: str, number: int, files: list[File], others: Entries = dict) -> None:
        """Write ``files``, the state and the manifest, which names those that ``others`` have written as well."""
        with Writer(folder) as out:
            name = STATE.replace(".", f"{mark}.")
            with out.hashing():
                entries, digests = _begun(out, files)
                digests[name] = out.write(name, [(memoryview(self.state), False)], size=len(self.state))
            entries[name] = {"size": len(self.state)}
            for file, digest in digests.items():
                entries[file][digest.name] = digest.hexdigest()
            entries |= others()
            text = manifests.render({"format": manifests.FORMAT, "order": number, "info": self.info, "files": entries})
            out.write(manifests.NAME, [(memoryview(text), False)], size=len(text))
            out.sync_folder()

    def size(self) -> int:
        """How many bytes its files will have."""
        entries: dict[str, dict[str, Any]] = {STATE: {"size": len(self.state)}}
        for file in _several(plan(self.groups)):
            entries[file.name] = _entry(file, _laid(file))
        named = {file: {**entry, HASHES[0]: "0" * 64} for file, entry in entries.items()}
        manifest = {"format": manifests.FORMAT, "order": 10**9, "info": self.info, "files": named}
        sizes: list[int] = [entry["size"] for entry in entries.values()]
        return len(manifests.render(manifest)) + sum(sizes)

    def need_space(self, folder: Path) -> None:
        """Better no checkpoint than half of one, and a full disk for everybody."""
        needed = len(self.state) + sum(layout(named).size for named in self.groups.values()) + (1 << 16)
        above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(above).free
        if free < needed:
            raise CheckpointError(
                f"the checkpoint {folder} was not written: it needs {needed / 1e6:,.1f} MB, and the disk has "
                f"{free / 1e6:,.1f} MB free. Older ones are untouched. Make room, keep fewer (Checkpoint(keep=1)), or "
                "write to another disk (Checkpoint(folder=...))"
            )


Entries = Callable[[], dict[str, dict[str, Any]]]
"""What the manifest says of files, by name."""


def write_files(folder: Place, files: list[File]) -> dict[str, dict[str, Any]]:
    """Write ``files`` alone, and return what the manifest is to say of them, once they are on disk."""
    with Writer(folder) as out:
        with out.hashing():
            entries, digests = _begun(out, files)
        for name, digest in digests.items():
            entries[name][digest.name] = digest.hexdigest()
        out.sync_folder()
    return entries


def _begun(out: Writer, files: list[File]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Write ``files``; their entries, and their digests, which are complete after ``out.hashing``."""
    entries: dict[str, dict[str, Any]] = {}
    digests: dict[str, Any] = {}
    for file in files:
        laid = _laid(file)
        digests[file.name] = out.write(file.name, laid.parts(), size=laid.size)
        entries[file.name] = _entry(file, laid)
    return entries, digests


def _laid(file: File) -> Layout:
    return layout(file.tensors, None if file.shards is None else _offsets(file))


def _entry(file: File, laid: Layout) -> dict[str, Any]:
    pieces = {} if file.shards is None else {"shards": file.shards}
    return {"group": file.group, "size": laid.size, **pieces, **laid.notes}


def _several(files: list[File]) -> list[File]:
    """The same tensors, the moments of an optimizer cut into files about as large as the weights.

    To hash a file is work for one core, and takes longer than to write it. The weights stay one file, which other
    programs read.
    """
    sizes = [sum(tensor.nbytes for tensor in file.tensors.values()) for file in files]
    weights = max((size for file, size in zip(files, sizes, strict=True) if file.group not in _OURS), default=0)
    found = []
    for file, size in zip(files, sizes, strict=True):
        split = file.group in _OURS and file.shards is None and weights and size >= _LARGE
        count = min(_PARTS, max(1, round(size / weights))) if split else 1
        parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
        seen = 0
        for name, tensor in file.tensors.items():
            parts[min(count - 1, seen * count // (size or 1))][name] = tensor
            seen += tensor.nbytes
        for number, part in enumerate(parts, 1):
            name = file.name if number == 1 else file.name.replace(file.group, f"{file.group}-{number}", 1)
            found.append(file._replace(name=name, tensors=part))
    return found


def _offsets(file: File) -> dict[str, list[int]]:
    notes = file.shards or {}
    return {name: [n["start"] if d == n["dim"] else 0 for d in range(len(n["shape"]))] for name, n in notes.items()}


def _file(group: str) -> str:
    return f"{quote(group, safe='')}.safetensors"


def write(folder: Place | str, files: Mapping[str, Mapping[str, Tensor]], state: Any, info: Mapping[str, Any]) -> Place:
    """Write a checkpoint and return its folder, once all of it is on disk.

    ``folder``: a path, or a URL that fsspec knows. ``files``: tensors by group; the group ``model`` becomes
    ``model.safetensors`` with the same keys. ``state``: what ``encode`` takes; tensors below its key ``optimizers`` go
    to ``optimizer.safetensors``, others to ``state.safetensors``, and where they are larger than the weights to
    ``optimizer-2.safetensors`` as well. ``info``: plain data for the manifest. An older checkpoint of that name is
    replaced. Raises CheckpointError if it cannot be written (the disk is full, ``folder``
    is something else, a value has an unknown type); what was there before is there still.

    >>> import torch
    >>> files, state = {"model": {"w": torch.ones(2)}}, {"seen": (1, 2)}
    >>> path = write("checkpoints/step-00000001", files, state, {"step": 1})
    >>> read(path).state, read(path).files["model"]["w"]
    ({'seen': (1, 2)}, tensor([1., 1.]))
    """
    return Packed.of(files, state, info).write(folder)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds: ``info`` of its manifest, the decoded ``state``, tensors of ``files`` by group."""

    path: Place
    info: dict[str, Any]
    state: Any
    files: dict[str, dict[str, Tensor]]


def read(path: Place | str, mesh: Any = None) -> Contents:
    """The contents of a checkpoint, all on the CPU, after its sizes and checksums have been verified.

    With the ``mesh`` of ranks that share parameters out, tensors that were written in pieces are DTensors, and a rank
    reads the files that it needs; the first one verifies all.

    Reads tensors and plain data only; nothing in it is executed. Raises CheckpointError that names the bad
    file, the checksum expected and found, and the newest good checkpoint beside it.
    """
    path = as_place(path)
    try:
        manifest = manifests.parse(path)
        entries = manifest["files"]
        found = _each(path, entries, {name: load for name in entries if (load := _load_of(entries[name], mesh))})
        files = _grouped(entries, found, mesh)
        found = {name: found[name] for name, entry in entries.items() if "group" not in entry}
        if len(found) != 1:
            raise CheckpointError(f"{path / manifests.NAME} names {len(found)} files for the state, not one")
        ((file, plain),) = found.items()
        tensors = {k: t for group in _OURS for k, t in files.pop(group, {}).items()}
        try:
            state = migrate_state(decode(plain, tensors), manifest["format"])
        except CheckpointError as error:
            raise CheckpointError(f"{path / file}: {error}") from error
        return Contents(path, decode(manifest["info"], {}), state, files)
    except Exception as error:
        raise _bad(path, error) from error


def _load_of(entry: dict[str, Any], mesh: Any) -> _Load | None:
    """What is done with a file; None for pieces that other ranks of ``mesh`` need, and not this one."""
    if "group" not in entry:
        return _load_state
    if "shards" in entry and not wanted(entry["shards"], mesh):
        return _load_nothing if mesh.get_local_rank() == 0 else None
    return _load_tensors


def _grouped(entries: dict[str, dict[str, Any]], found: dict[str, Any], mesh: Any) -> dict[str, dict[str, Tensor]]:
    """The tensors that were loaded from files, by group: pieces are put together."""
    groups: dict[str, dict[str, Tensor]] = {}
    pieces: dict[str, list[tuple[Any, Any]]] = {}
    for name, entry in entries.items():
        if "shards" in entry and "group" in entry:
            pieces.setdefault(entry["group"], []).append((entry["shards"], found.pop(name, None)))
        elif "group" in entry:
            groups.setdefault(entry["group"], {}).update(found.pop(name))
    for group, parts in pieces.items():
        groups.setdefault(group, {}).update(joined(parts, mesh))
    return groups


def verify(path: Place | str) -> dict[str, Any]:
    """The manifest of a checkpoint whose files all have the size and checksum that it says.

    Raises CheckpointError that names the first bad file.
    """
    path = as_place(path)
    manifest = manifests.parse(path)
    _each(path, manifest["files"], dict.fromkeys(manifest["files"], _load_nothing))
    return manifest


_Load = Callable[[Hashed, dict[str, Any]], Any]


def _load_tensors(file: Hashed, entry: dict[str, Any]) -> dict[str, Tensor]:
    return unpack(file, entry["size"], entry)


def _load_state(file: Hashed, entry: dict[str, Any]) -> Any:
    if entry["size"] > _STATE_SIZE:
        raise ValueError(f"{entry['size']:,} bytes of JSON, at most {_STATE_SIZE:,} are read")
    return json.loads(file.read(entry["size"]).decode())


def _load_nothing(file: Hashed, entry: dict[str, Any]) -> None:
    """Only the checksum is asked for."""


def _each(path: Place, entries: dict[str, dict[str, Any]], loads: dict[str, _Load]) -> dict[str, Any]:
    """What is loaded from each file, several at a time; the error of the first one that is bad."""
    with ThreadPoolExecutor(_READERS) as threads:
        found = {name: threads.submit(_checked, path / name, entries[name], load) for name, load in loads.items()}
    return {name: future.result() for name, future in found.items()}


def _checked(file: Place, entry: dict[str, Any], load: _Load) -> Any:
    """What ``load`` makes of a file that has the size and the checksum of its entry."""
    loaded, problem = None, None
    kind = next(name for name in HASHES if name in entry)
    manifests.no_link(file)
    try:
        size = file.stat().st_size
        if not file.is_file():  # a pipe or a device would never end
            raise CheckpointError(f"{file} cannot be read: it is not a file")
        if size != entry["size"]:
            raise CheckpointError(f"{file} is damaged: it has {size} bytes, and the manifest says {entry['size']}")
        with file.open("rb") as data:
            hashed = Hashed(data, new_hash(kind))
            try:
                loaded = load(hashed, entry)
            except OSError:
                raise
            except Exception as error:  # of damage, which the checksum names better, or of bad intent
                problem = error
            found = hashed.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    if found != entry[kind]:
        raise CheckpointError(f"{file} is damaged: its {kind} is {found}, and the manifest says {entry[kind]}")
    if problem is not None:
        held = "tensors" if "group" in entry else "JSON"
        raise CheckpointError(f"{file} cannot be read as {held} ({type(problem).__name__}: {problem})") from problem
    return loaded


def _bad(path: Place, error: Exception) -> CheckpointError:
    """The error to raise, with the checkpoint to use instead."""
    text = str(error) if isinstance(error, CheckpointError) else f"{path} is damaged ({type(error).__name__}: {error})"
    with suppress(Exception):
        for other in reversed(list_checkpoints(path.parent)):
            if other != path:
                with suppress(CheckpointError):
                    verify(other)
                    return CheckpointError(f"{text}. The newest good checkpoint beside it is {other}")
    return CheckpointError(text)
