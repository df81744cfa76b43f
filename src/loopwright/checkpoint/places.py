"""Where checkpoints live: a folder of this machine (a ``Path``), or anything that fsspec reaches (a ``Remote``).

A Remote has those methods of a Path that checkpoints need, under the same names, so that what reads and lists them
is written once. ``s3://``, ``gs://``, ``az://`` and others need the package that fsspec names for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, TypeAlias
from urllib.parse import unquote, urlsplit

from loopwright.errors import SettingError

__all__ = ["Place", "Remote", "as_place"]


class Remote:
    """A file or folder behind a URL such as ``s3://bucket/run``; equal when the URL is."""

    def __init__(self, fs: Any, path: str) -> None:
        self.fs, self.path = fs, path.rstrip("/")

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> Remote:
        return Remote(self.fs, self.path.rpartition("/")[0])

    def __truediv__(self, name: str) -> Remote:
        return Remote(self.fs, f"{self.path}/{name}")

    def __str__(self) -> str:
        return str(self.fs.unstrip_protocol(self.path))

    def __repr__(self) -> str:
        return f"Remote({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: Remote) -> bool:
        return self.path < other.path

    def is_file(self) -> bool:
        return bool(self.fs.isfile(self.path))

    def is_dir(self) -> bool:
        return bool(self.fs.isdir(self.path))

    def exists(self) -> bool:
        return bool(self.fs.exists(self.path))

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=self.fs.info(self.path)["size"])

    def iterdir(self) -> Iterator[Remote]:
        self.fs.invalidate_cache(self.path)  # other processes write there as well
        here = self.fs.ls(self.path, detail=False) if self.is_dir() else []
        return (self / name for path in here if (name := path.rstrip("/").rpartition("/")[2]))

    def open(self, mode: str) -> IO[bytes]:
        file: IO[bytes] = self.fs.open(self.path, mode)
        return file

    def read_bytes(self) -> bytes:
        return bytes(self.fs.cat_file(self.path))

    def write_bytes(self, data: bytes) -> None:
        self.fs.pipe_file(self.path, data)

    def make(self) -> None:
        """Make the folder where there are folders; object stores have none."""
        self.fs.makedirs(self.path, exist_ok=True)

    def remove(self) -> None:
        """Remove a file, or a folder with all that is in it."""
        self.fs.rm(self.path, recursive=self.is_dir())


Place: TypeAlias = Path | Remote


def as_place(path: Place | str) -> Place:
    """The place that a path or a URL means. ``file://`` is a local folder like any other.

    Raises SettingError that names the package to install, or what is wrong with the URL.

    >>> as_place("memory://bucket/run") / "step-1"
    Remote('memory:///bucket/run/step-1')
    >>> as_place("runs/a").name
    'a'
    """
    if not isinstance(path, str) or "://" not in path:
        return Path(path) if isinstance(path, str) else path
    if path.startswith(("file://", "local://")):
        return Path(unquote(urlsplit(path).path))
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    except ImportError as error:
        raise SettingError(f"{path} is a URL, which needs fsspec: pip install 'loopwright[remote]'") from error
    try:
        return Remote(*url_to_fs(path))
    except (ImportError, ValueError) as error:  # fsspec names the package of the protocol, and the protocols it knows
        raise SettingError(f"{path} cannot be opened: {error}") from error
