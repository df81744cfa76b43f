"""Which checkpoints somebody means who types the path of a run, of a folder in it, or of one checkpoint."""

from __future__ import annotations

from loopwright.checkpoint import list_checkpoints
from loopwright.checkpoint.manifest import NAME
from loopwright.checkpoint.places import Place
from loopwright.errors import CheckpointError, choose
from loopwright.folder import newest_in

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
    newest = newest_in(path)
    if newest is not None:
        return checkpoints_at(newest)
    raise CheckpointError(_nothing_at(path))


def _entries(path: Place) -> list[Place]:
    try:
        return list(path.iterdir()) if path.is_dir() else []
    except OSError:  # it may not be read
        return []


def _has_runs(path: Place) -> bool:
    """True for a run, a checkpoint, a folder of either, and a folder of such folders, as ``runs`` is."""
    own = (path / _RUN).is_file() or (path / NAME).is_file()
    return own or bool(list_checkpoints(path) or newest_in(path)) or any(map(newest_in, _entries(path)))


def _nothing_at(path: Place) -> str:
    if not path.exists():
        beside = [place.name for place in _entries(path.parent) if _has_runs(place)]
        return f"{path} does not exist" + (f". {choose(path.name, beside)}" if beside else "")
    below = sorted(place.name for place in _entries(path) if newest_in(place))
    hint = f". It holds runs named {', '.join(below)}: give {path / below[0]}" if below else ""
    if (path.parent / _RUN).is_file():
        hint = f". It belongs to a run: give {path.parent}"
    return f"{path} is no run and no checkpoint{hint}"


def run_folder(checkpoint: Place) -> Place | None:
    """The folder of the run that wrote a checkpoint, if it still lies there."""
    folder = checkpoint.parent.parent
    return folder if (folder / _RUN).is_file() else None
