"""One checkpoint written by all ranks: each writes what it holds, rank 0 all that is whole and, last, the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loopwright.checkpoint.pieces import plan
from loopwright.checkpoint.places import Place
from loopwright.checkpoint.publish import publish
from loopwright.checkpoint.shelf import list_checkpoints, order
from loopwright.checkpoint.store import Packed, write_files
from loopwright.errors import CheckpointError
from loopwright.state import Comm

__all__ = ["write_together"]


def write_together(packed: Packed, folder: Place, comm: Comm) -> None:
    """Write the checkpoint ``folder`` of what every rank has packed; it is there once all of it is on disk.

    The ranks must see the same ``folder``. All of them raise CheckpointError if one cannot write its part: nothing new
    is left, and what was there before is there still.
    """
    if comm.rank:
        _follow(packed, folder, comm)
        return
    told, problem = False, None

    def fill(place: Place, mark: str) -> None:
        nonlocal told
        told = True
        comm.broadcast((place, mark))
        files = plan(packed.groups, 0, comm.world_size, mark)
        number = max((order(p) for p in list_checkpoints(folder.parent)), default=0) + 1
        gathered = False

        def others() -> dict[str, dict[str, Any]]:
            nonlocal gathered
            gathered = True
            return _entries(comm.gather(({}, None)))

        try:
            packed.fill(place, mark, number, files, others)
        finally:
            if not gathered:
                comm.gather(({}, None))

    try:
        if isinstance(folder, Path):
            packed.need_space(folder)
        publish(folder, fill)
    except CheckpointError as error:
        problem = error
    except Exception as error:
        problem = CheckpointError(f"the checkpoint {folder} could not be written: {error}. Older ones are untouched")
        problem.__cause__ = error
    if not told:
        comm.broadcast(None)
    comm.broadcast(None if problem is None else str(problem))
    if problem is not None:
        raise problem


def _follow(packed: Packed, folder: Place, comm: Comm) -> None:
    place = comm.broadcast(None)
    if place is not None:
        entries: dict[str, dict[str, Any]] = {}
        problem: str | None = None
        files = plan(packed.groups, comm.rank, comm.world_size, place[1])
        try:
            if isinstance(place[0], Path) and not place[0].is_dir():
                raise OSError(f"{place[0]} is not there: all ranks must see the same folder")
            entries = write_files(place[0], files)
        except Exception as error:
            problem = f"rank {comm.rank} could not write its part of {folder}: {error}"
        comm.gather((entries, problem))
    told = comm.broadcast(None)
    if told is not None:
        raise CheckpointError(told)


def _entries(found: list[tuple[dict[str, dict[str, Any]], str | None]]) -> dict[str, dict[str, Any]]:
    problem = next((problem for _, problem in found if problem is not None), None)
    if problem is not None:
        raise CheckpointError(f"{problem}. Older ones are untouched")
    return {name: entry for entries, _ in found for name, entry in entries.items()}
