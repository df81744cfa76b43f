"""Bytes on their way to a file and back, hashed as they pass."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from loopwright.checkpoint.places import Place

__all__ = ["HASHES", "Hashed", "Writer", "new_hash", "sync"]

_CHUNK = 1 << 20
_THREAD = 1 << 20  # bytes from which on it is worth the start of a thread to hash them
_HELD = 1 << 23  # bytes made for a write that may wait for their digest
_SYNCING = 8  # files that are synced at the same time: they share the commits of the disk's journal


HASHES = ("blake2b", "sha256")
"""What manifests may give of a file, the one that is written first; each has 64 hex digits."""


def new_hash(name: str = "blake2b") -> Any:
    """An empty digest of that name. BLAKE2b with 256 bits (RFC 7693), which ``b2sum -l 256`` prints as well.

    On a processor without instructions for sha256 it takes half the time.
    """
    return hashlib.blake2b(digest_size=32) if name == "blake2b" else hashlib.sha256()


class Hashed:
    """A binary file that is read once from its begin to its end, and the digest of what has been read."""

    def __init__(self, file: IO[bytes], digest: Any) -> None:
        self._file, self._digest = file, digest

    def read(self, size: int) -> bytearray:
        """The next ``size`` bytes; zeros where the file has ended."""
        data = bytearray(size)
        self.fill(memoryview(data))
        return data

    def fill(self, view: memoryview) -> int:
        """Fill ``view`` with the next bytes, and return how many there were."""
        at = 0
        while at < len(view):
            part = view[at : at + _CHUNK]  # while it is in the cache of the processor
            got = self._file.readinto(part)  # type: ignore[attr-defined]
            if not got:
                break
            self._digest.update(part[:got])
            at += got
        return at

    def hexdigest(self) -> str:
        """Of the whole file: reads what is left of it."""
        rest = memoryview(bytearray(_CHUNK))
        while self.fill(rest):
            pass
        return str(self._digest.hexdigest())


class Writer:
    """Writes the files of one folder. What is written is hashed, and synced, by threads while the next is written.

    Leaving the ``with`` waits for all of it. A local file is on disk then, or the error of the disk is raised.
    """

    def __init__(self, folder: Place) -> None:
        self._folder, self._hashing, self._synced = folder, ExitStack(), list[Future[None]]()
        self._held: deque[tuple[int, Future[None]]] = deque()
        self._syncing = ThreadPoolExecutor(_SYNCING) if isinstance(folder, Path) else None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._hashing.close()
        if self._syncing is not None:
            self._syncing.shutdown()
        if error[0] is None:
            for future in self._synced:
                future.result()

    def hashing(self) -> ExitStack:
        """Leaving this ``with`` waits for the digests of what has been written."""
        return self._hashing

    def write(self, name: str, parts: Iterable[tuple[memoryview, bool]], *, size: int) -> Any:
        """Write a new file of ``size`` bytes; the digest that has seen all of it after ``hashing``.

        A part comes with True where its memory was made for this; it is let go before many more are made.
        """
        digest = new_hash()
        hashing = self._hashing.enter_context(ThreadPoolExecutor(1)) if size >= _THREAD else None
        out = (self._folder / name).open("wb" if self._syncing is None else "xb")
        try:
            for part, made in parts:
                if hashing is None:
                    digest.update(part)
                elif made:
                    self._held.append((len(part), hashing.submit(digest.update, part)))
                else:
                    hashing.submit(digest.update, part)
                out.write(part)
                while sum(size for size, _ in self._held) > _HELD:
                    self._held.popleft()[1].result()
            out.flush()
        except BaseException:
            out.close()
            raise
        if self._syncing is None:
            out.close()  # now it is in the store
        else:
            self._synced.append(self._syncing.submit(_sync_file, out))
        return digest

    def sync_folder(self) -> None:
        """Have the names of the files on disk as well."""
        if self._syncing is not None and isinstance(self._folder, Path):
            self._synced.append(self._syncing.submit(sync, self._folder))


def _sync_file(file: IO[bytes]) -> None:
    with file:
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Have the names in a folder on disk."""
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
