"""``loopwright checkpoints show``: what a checkpoint holds, read from its manifest and the heads of its files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from loopwright.checkpoint import decode, list_checkpoints
from loopwright.checkpoint.manifest import parse
from loopwright.checkpoint.places import Place, as_place
from loopwright.checkpoint.streams import HASHES
from loopwright.cli.checkpoints import damage, marks, size_of
from loopwright.cli.places import checkpoints_at, run_folder
from loopwright.cli.tables import format_any, format_size, format_written, plain, safe, table
from loopwright.errors import CheckpointError
from loopwright.folder import read_settings
from loopwright.text import format_time

__all__ = ["print_checkpoint"]

_LONGEST = 100_000  # bytes of config.yaml
_HEADER = 100_000_000  # bytes, the limit of the format
_DTYPES = {  # the names that the format has for types
    "BOOL": "bool", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "I8": "int8",
    "I16": "int16", "I32": "int32", "I64": "int64", "U8": "uint8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def print_checkpoint(where: str, *, every: bool, as_json: bool) -> int:
    """The checkpoint at ``where``, or the newest of a run, in readable form; 1 if it is damaged, which is told last."""
    path = checkpoints_at(as_place(where))[-1]
    manifest, wrong = parse(path), damage(path)
    info, notes = decode(manifest["info"], {}), marks(list_checkpoints(path.parent)).get(path, [])
    files = {name: _file(path, name, entry) for name, entry in manifest["files"].items()}
    settings = info.pop("settings", None) or _settings(path)
    if as_json:
        shown = {"path": str(path), "format": manifest["format"], "marks": notes, "info": info, "files": files}
        print(json.dumps(plain({**shown, "settings": settings, "damage": wrong}), indent=1, allow_nan=False))
        return int(wrong is not None)
    name = str(path) + (f"  ({', '.join(notes)})" if notes else "")
    print(table([("checkpoint", name), *_facts(manifest["format"], info)]))
    for name, file in files.items():
        print(_tensors(name, file, every=every or file.get("group", "").startswith("model")))
    count = sum(len(file.get("tensors", ())) for file in files.values())
    print(f"\ntotal: {len(files) + 1} files, {count} tensors, {format_size(size_of(path))}")
    if settings:
        print("\nsettings\n" + table(([line] for line in _lines(settings)), indent=2))
    if wrong is not None:
        print("\n" + safe(f"DAMAGED: {wrong}"))
        print(safe(f"Which to use instead: loopwright checkpoints verify {path.parent}"))
    return int(wrong is not None)


def _facts(number: int, info: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The rows above the tensors: a name and a value each."""
    yield "written", f"{format_written(info.get('written'))}, format {number}"
    for name in ("stage", "step", "epoch", "batch", "samples"):
        if info.get(name) is not None:
            yield name, format_any(info[name])
    if isinstance(seconds := info.get("seconds"), (int, float)) and abs(seconds) < 1e12:
        yield "time", format_time(seconds)
    for name in sorted(name for name in info.keys() - _KNOWN if info[name] not in (None, [], {}, 0)):
        yield name.replace("_", " "), format_any(info[name])
    exact = info.get("exact")
    yield "exact", "yes" if exact is True else "no, since" if exact else "-"
    yield from (("", f"- {format_any(reason)}") for reason in (exact if isinstance(exact, list) else ()))
    versions = info.get("versions")
    yield (
        "versions",
        ", ".join(f"{k} {format_any(v)}" for k, v in versions.items()) if isinstance(versions, dict) else "-",
    )
    yield from _listed("metrics", info.get("metrics"), {format_any(info.get("monitor")): "  (monitored)"})


_KNOWN = {
    "stage", "step", "epoch", "batch", "samples", "seconds", "written", "exact", "versions", "metrics", "monitor",
    "mode", "value",
}  # fmt: skip


def _listed(title: str, values: Any, notes: dict[Any, str]) -> Iterator[tuple[str, str]]:
    named = {str(name): value for name, value in values.items()} if isinstance(values, dict) else {}
    width = max(map(len, named), default=0)
    for number, (name, value) in enumerate(named.items()):
        yield "" if number else title, f"{name:<{width}}  {format_any(value)}{notes.get(name, '')}"


def _file(path: Place, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Size, checksum and, for a group of tensors, what the head of the file says of each; no tensor is read."""
    shown: dict[str, Any] = {key: entry[key] for key in ("group", "size", *HASHES) if key in entry}
    if "group" not in entry:
        return shown
    notes = entry.get("tensors", {})
    try:
        if not (path / name).is_file():  # a pipe would never end
            raise ValueError("it is not a file")
        with (path / name).open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(min(length, entry["size"], _HEADER)).decode())
        heads = ((name, head) for name, head in header.items() if name != "__metadata__")
        tensors = {name: _tensor(head, notes.get(name, {})) for name, head in heads}
        tied = {name: {"tied_to": str(kept)} for name, kept in entry.get("aliases", {}).items()}
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path / name} cannot be read as tensors ({error}). To check the whole checkpoint: "
            f"loopwright checkpoints verify {path}"
        ) from error
    return {**shown, "tensors": {**tensors, **tied}}


def _tensor(head: dict[str, Any], note: dict[str, Any]) -> dict[str, Any]:
    """One tensor; ``note`` has dtype and shape of one that is stored as its bytes, and the stride of a strided one."""
    start, stop = map(int, head["data_offsets"])
    shape = [int(size) for size in note.get("shape", head["shape"])]
    count, size = math.prod(shape), stop - start
    if not max(count, size) < 1 << 63:
        raise ValueError("a tensor is larger than memory can be")
    strided = {"stride": note["stride"]} if "stride" in note else {}
    dtype = str(note.get("dtype", _DTYPES[head["dtype"]]))
    return {"dtype": dtype, "shape": shape, **strided, "count": count, "bytes": size}


def _tensors(name: str, file: dict[str, Any], *, every: bool) -> str:
    """A file in the readable form: a line, and a table of its tensors."""
    if "tensors" not in file:
        return f"\n{name}  {format_size(file['size'])}"
    tensors = file["tensors"]
    own = [t for t in tensors.values() if "bytes" in t]
    counts = f"{len(tensors)} tensor{'s' * (len(tensors) != 1)}, {sum(t['count'] for t in own):,} values"
    head = f"\n{name}  {counts}, {format_size(sum(t['bytes'] for t in own))}"
    rows = [_row(name, tensor) for name, tensor in tensors.items()]
    return f"{head}\n{table(rows, right=[3], indent=2)}" if every and rows else head


def _row(name: str, tensor: dict[str, Any]) -> tuple[str, ...]:
    if "tied_to" in tensor:
        return name, f"is {tensor['tied_to']}", "", ""
    return name, tensor["dtype"], str(tensor["shape"]), format_size(tensor["bytes"])


def _settings(path: Place) -> Any:
    """The settings of the run that wrote a checkpoint: plain data, or the text of a file that is no plain data."""
    run = run_folder(path)
    try:
        file = (run or path) / "config.yaml"
        text = file.read_bytes().decode() if file.is_file() and file.stat().st_size <= _LONGEST else ""
    except (OSError, ValueError):
        return None
    try:
        return read_settings(text)
    except ValueError:
        return text


def _lines(settings: Any, indent: str = "") -> Iterator[str]:
    """Settings as lines, what is nested indented."""
    if isinstance(settings, str):
        yield from settings.splitlines()
        return
    for name, value in settings.items() if isinstance(settings, dict) else [("", settings)]:
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        elif isinstance(value, list) and any(isinstance(one, dict) and one for one in value):
            yield f"{indent}{name}:"
            for one in value:
                yield from (f"{indent}{'  ' if i else '- '}{line}" for i, line in enumerate(_lines(one)))
        else:
            yield f"{indent}{name}: {value if isinstance(value, str) else format_any(value)}"
