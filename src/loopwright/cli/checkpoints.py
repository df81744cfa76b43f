"""``loopwright checkpoints ls``, ``verify`` and ``prune``."""

from __future__ import annotations

import json
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from loopwright.checkpoint import decode, delete, index, list_checkpoints, verify, write_index
from loopwright.checkpoint.manifest import NAME, peek
from loopwright.checkpoint.places import Place, as_place
from loopwright.checkpoint.shelf import monitored
from loopwright.cli.places import checkpoints_at, run_folder
from loopwright.cli.tables import format_any, format_size, format_written, plain, safe, table
from loopwright.errors import CheckpointError, SettingError
from loopwright.folder import hold

__all__ = ["about", "damage", "marks", "print_list", "print_verified", "prune", "size_of"]


def print_list(path: str, *, verified: bool, as_json: bool) -> int:
    """A line for each checkpoint; with ``verified`` whether its files are as they were written, else unread."""
    found = checkpoints_at(as_place(path))
    notes = marks(list_checkpoints(found[0].parent))
    rows = [_row(checkpoint, notes.get(checkpoint, [])) for checkpoint in found]
    if verified:
        for row, checkpoint in zip(rows, found, strict=True):
            row["damage"] = damage(checkpoint)
    if as_json:
        print(json.dumps(plain(rows), indent=1, allow_nan=False))
    else:
        print(_table(rows, verified=verified))
        total = format_size(sum(row["size"] for row in rows))
        print(f"\n{len(rows)} checkpoint{'s' * (len(rows) != 1)}, {total}, in {safe(str(found[0].parent))}")
    return int(any(row.get("damage") for row in rows))


def _row(path: Place, notes: list[str]) -> dict[str, Any]:
    info = about(path)
    said = {key: info.get(key) for key in ("step", "epoch", "batch", "written", "monitor", "value", "exact")}
    said["monitor"] = said["monitor"] if isinstance(said["monitor"], str) else None
    return {"path": str(path), "name": path.name, **said, "size": size_of(path), "marks": notes}


def _table(rows: list[dict[str, Any]], *, verified: bool) -> str:
    monitors = {row["monitor"] for row in rows} - {None}
    name = str(*monitors) if len(monitors) == 1 else "monitored" if monitors else ""
    lines = [["checkpoint", "step", "epoch", "written", "size", name, "exact", "", "files" * verified]]
    for row in rows:
        batch = f" +{format_any(row['batch'])}" if row["batch"] else ""
        value = format_any(row["value"]) if name else ""
        if len(monitors) > 1 and row["monitor"] is not None:
            value = f"{row['monitor']} {value}"
        lines.append([
            row["name"], format_any(row["step"]), format_any(row["epoch"]) + batch,
            format_written(row["written"]), format_size(row["size"]), value,
            "yes" if row["exact"] is True else "no" if row["exact"] else "-", ", ".join(row["marks"]),
            "" if not verified else f"DAMAGED: {row['damage']}" if row["damage"] else "good",
        ])  # fmt: skip
    return table(lines, right=[1, 4, 5])


def about(path: Place) -> dict[str, Any]:
    """What the manifest of a checkpoint says about the run, unverified; empty if it cannot be read."""
    try:
        info = decode(peek(path).get("info"), {})
    except CheckpointError:
        return {}
    return info if isinstance(info, dict) else {}


def size_of(path: Place) -> int:
    """Bytes of the files of a checkpoint."""
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def damage(path: Place) -> str | None:
    """What is wrong with the files of a checkpoint; None if they are as they were written."""
    try:
        verify(path)
    except CheckpointError as error:
        return str(error)
    return None


def marks(found: list[Place]) -> dict[Place, list[str]]:
    """Which checkpoint of a folder is the last, and which is the best by each value that was monitored."""
    notes: dict[Place, list[str]] = {path: [] for path in found}
    names = sorted({name for path in found for name in _monitors(path)})
    for name in names:
        ranked = [(value, path) for path in found if (value := monitored(path, name)) is not None]
        if ranked:
            notes[min(ranked, key=lambda pair: pair[0])[1]].append("best" if len(names) == 1 else f"best {name}")
    chosen = index(found[0].parent)["best"] if found else None
    if chosen is not None and not notes[chosen]:
        notes[chosen].append("best")
    for path in found[-1:]:
        notes[path].append("last")
    return notes


def _monitors(path: Place) -> list[str]:
    """The names of the values that a checkpoint was judged by."""
    info = about(path)
    others = info.get("others")
    told = [info, *(others if isinstance(others, list) else ())]
    return [name for one in told if isinstance(one, dict) and isinstance(name := one.get("monitor"), str)]


def print_verified(path: str) -> int:
    """Whether the files of each checkpoint are as they were written; where one is not, which to use instead."""
    found = checkpoints_at(as_place(path))
    bad = {}
    for checkpoint in found:
        wrong = damage(checkpoint)
        if wrong is not None:
            bad[checkpoint] = wrong
        files = len(peek(checkpoint).get("files", ())) + 1
        print(safe(f"{'good' if wrong is None else 'DAMAGED':<8}{checkpoint}  "), end="", flush=True)
        print(safe(wrong or f"{files} files, {format_size(size_of(checkpoint))}"))
    if not bad:
        return 0
    rest = [p for p in list_checkpoints(found[0].parent) if p not in bad and (p in found or damage(p) is None)]
    print(f"\n{len(bad)} of {len(found)} damaged. ", end="")
    if rest:
        print(safe(f"The newest good one is {rest[-1]}"))
        print(safe(f"To go on from it: fit(..., resume={str(rest[-1])!r})"))
    else:
        print(safe(f"No good one is left in {found[0].parent}"))
    return 1


def prune(path: str, *, keep: int, dry: bool) -> int:
    """Delete all but the newest ``keep``, the best ones, the last one, and the newest whose files are good.

    Raises SettingError while a process trains in the run, whose own ``Checkpoint(keep=)`` deletes.
    """
    if keep < 1:
        raise SettingError(f"--keep {keep}: expected how many of the newest checkpoints to keep, from 1")
    place = as_place(path)
    if (place / NAME).is_file():
        raise SettingError(f"{path} is one checkpoint, and prune takes a run: {place.parent.parent}")
    first = checkpoints_at(place)[0]
    run = run_folder(first)
    with closing(hold(run)) if isinstance(run, Path) and not dry else nullcontext():
        found = list_checkpoints(first.parent)
        notes = marks(found)
        good = next((p for p in reversed(found) if damage(p) is None), None)
        kept = [p for p in found if notes[p] or p in found[-keep:] or p == good]
        surplus = [p for p in found if p not in kept]
        sizes = {p: size_of(p) for p in found}
        for checkpoint in surplus:
            if not dry:
                delete(checkpoint)
            print(safe(f"{'would delete' if dry else 'deleted'}  {checkpoint}  {format_size(sizes[checkpoint])}"))
        for checkpoint in kept:
            why = ", ".join(notes[checkpoint] or ["newest good" if checkpoint == good else ""])
            print(safe(f"{'would keep' if dry else 'kept':<{12 if dry else 7}}  {checkpoint}  {why}").rstrip())
        if not dry:
            write_index(first.parent, **index(first.parent))
    freed = format_size(sum(sizes[p] for p in surplus))
    print(f"\n{freed} {'would be freed' if dry else 'freed'}; {len(kept)} of {len(found)} checkpoints kept")
    return 0
