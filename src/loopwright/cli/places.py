"""Which checkpoints somebody means who types the path of a run, of a folder in it, or of one checkpoint."""

from __future__ import annotations

from loopwright.checkpoint import list_checkpoints
from loopwright.checkpoint.manifest import NAME
from loopwright.checkpoint.places import Place
from loopwright.errors import CheckpointError, choose

__all__ = ["checkpoints_at", "run_folder"]

_RUN = "run.json"


def checkpoints_at(path: Place) -> list[Place]:
    """The checkpoints of a run, of its folder ``checkpoints``, of the newest run of ``runs/<name>``; or the one given.

    They come in the order in which they were written. Raises CheckpointError if there are none.
    """
    if (path / NAME).is_file():
        return [path]
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if found:
        return found
    if (path / _RUN).is_file():
        raise CheckpointError(f"the run {path} has no checkpoints (yet)")
    runs = _runs_in(path)
    if runs:
        return checkpoints_at(runs[-1])
    raise CheckpointError(_nothing_at(path))


def _runs_in(path: Place) -> list[Place]:
    """The runs in a folder, the newest last: their names begin with the time."""
    runs = [place for place in (path.iterdir() if path.is_dir() else ()) if (place / _RUN).is_file()]
    return sorted(runs, key=lambda run: run.name)


def _nothing_at(path: Place) -> str:
    if not path.exists():
        beside = [place.name for place in path.parent.iterdir()] if path.parent.is_dir() else []
        return f"{path} does not exist. {choose(path.name, beside)}"
    below = sorted(place.name for place in path.iterdir() if _runs_in(place)) if path.is_dir() else []
    hint = f". It holds runs named {', '.join(below)}: give {path / below[0]}" if below else ""
    return f"{path} is no run and no checkpoint{hint}"


def run_folder(checkpoint: Place) -> Place | None:
    """The folder of the run that wrote a checkpoint, if it still lies there."""
    folder = checkpoint.parent.parent
    return folder if (folder / _RUN).is_file() else None
