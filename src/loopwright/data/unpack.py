"""Archives from strangers: nothing is written outside of the folder, no link is made, and no bomb goes off."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from loopwright.errors import DataError
from loopwright.written import warn

__all__ = ["hash_of", "is_as_unpacked", "stem_of", "unpack"]

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
_SINGLE: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_FREE, _RATIO, _MEMBERS = 1 << 30, 100, 5_000_000
_HEADER = 1 << 24  # bytes that are read at once: more is asked for by a header made to fill the memory
_BROKEN = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error,
    EOFError, OSError, RuntimeError, ValueError, LookupError,
)  # fmt: skip


def stem_of(name: str) -> str | None:
    """``name`` without the ending that says how it is packed; None if it is not packed.

    >>> stem_of("digits.tar.gz"), stem_of("train.csv.gz"), stem_of("names.txt")
    ('digits', 'train.csv', None)
    """
    for ending in sorted((*_TARS, *_SINGLE, ".zip"), key=len, reverse=True):
        if name.lower().endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)]
    return None


def unpack(file: Path, target: Path, record: Path | None = None) -> Path:
    """Unpack ``file`` into the folder (or, a single packed file, the file) ``target``, which appears when all is there.

    ``record``: keep the hash of each file there; of a ``target`` that exists, files that differ are told and put back.
    Only files and folders are written; a link to a file inside the archive becomes a copy of it. Raises DataError,
    and leaves nothing behind, for a damaged archive, for names and links that lead outside, devices, and for more
    than a gigabyte and 100 times the archive's size.
    """
    work: Path | None = None
    try:
        work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        made = work / target.name
        budget = _Budget(file, max(_FREE, _RATIO * file.stat().st_size))
        if file.name.lower().endswith((".zip", *_TARS)):
            made.mkdir()
            _unpack_members(file, made, budget)
        else:
            with _SINGLE[file.suffix.lower()](file) as source, made.open("wb") as out:
                budget.copy(source, out)
        if record is not None:
            hashes = _hashes(made)
            (work / record.name).write_text(json.dumps(hashes))
            os.replace(work / record.name, record)  # the same whoever writes it
            if target.exists():
                _put_back(made, target, _differing(target, hashes))
                return target
        try:
            os.rename(made, target)  # a folder that is not empty stays: another process was faster
        except OSError:
            if not target.exists():
                raise
    except DataError:  # a ValueError
        raise
    except _BROKEN as error:
        own = getattr(error, "errno", None) is not None  # of the disk, or a permission; no fault of the archive
        raise DataError(f"cannot unpack {file}: {error}{'' if own else '. It is damaged, or no archive'}") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return target


def is_as_unpacked(target: Path, record: Path) -> bool:
    """True if every file that ``record`` names is in ``target`` with the content that it had."""
    try:
        hashes = json.loads(record.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(hashes, dict) and not _differing(target, hashes)


def _hashes(made: Path) -> dict[str, str]:
    """Of each file, by its path below ``made``; "." where that is a file itself."""
    files = [made] if made.is_file() else sorted(path for path in made.rglob("*") if path.is_file())
    return {path.relative_to(made).as_posix(): hash_of(path) for path in files}


def hash_of(file: Path) -> str:
    """The sha256 of what is in ``file``, as 64 hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _differing(target: Path, hashes: Mapping[str, str]) -> dict[str, str]:
    """What is wrong with files that were unpacked, by name."""
    found = {}
    for name, digest in hashes.items():
        path = target / name
        try:
            if not path.is_file() or hash_of(path) != digest:  # a pipe would never end
                found[name] = "was changed" if path.exists() else "is missing"
        except OSError:
            found[name] = "cannot be read"
    return found


def _put_back(made: Path, target: Path, differing: Mapping[str, str]) -> None:
    """Move these files from ``made`` to ``target``, each at once: others may be reading there."""
    for name in differing:
        path = target / name
        for above in [folder for folder in reversed(path.parents) if folder.is_relative_to(target)]:
            if above.is_file() or (above.is_symlink() and above != target):  # nothing is written through a link
                above.unlink()
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(made / name, path)
    if differing:
        told = [f"{name} {wrong}" if name != "." else wrong for name, wrong in list(differing.items())[:5]]
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        warn(
            f"{target} was not as it had been unpacked: {', '.join(told)}{more}. The files of the archive are there "
            "again; to change some, work on a copy of the folder"
        )


@dataclass(slots=True)
class _Budget:
    """What may still be written."""

    file: Path
    left: int
    members: int = _MEMBERS

    def copy(self, source: IO[bytes], out: IO[bytes]) -> None:
        while chunk := source.read(1 << 20):
            self.left -= len(chunk)
            if self.left < 0:
                raise DataError(
                    f"{self.file} unpacks to more than {_RATIO} times its size and more than {_FREE >> 30} GB, as "
                    "archives do that are made to fill a disk. If you trust it, unpack it yourself: fetch(..., "
                    "extract=False)"
                )
            out.write(chunk)

    def count(self) -> None:
        self.members -= 1
        if self.members < 0:
            raise DataError(f"{self.file} has more than {_MEMBERS:,} members; unpack it yourself")


@dataclass(slots=True)
class _Member:
    name: str
    kind: str  # file, folder, link, or another word that is refused
    read: Callable[[], Any]
    link: PurePosixPath | None = None  # from the top of the archive


def _unpack_members(file: Path, folder: Path, budget: _Budget) -> None:
    links: list[tuple[Path, Path, str]] = []
    reader = _zip_members if file.name.lower().endswith(".zip") else _tar_members
    for member in reader(file):
        budget.count()
        path = folder.joinpath(*_parts(member.name, file))
        if member.kind == "folder":
            path.mkdir(parents=True, exist_ok=True)
        elif member.kind == "file":
            path.parent.mkdir(parents=True, exist_ok=True)
            with member.read() as source, path.open("wb") as out:
                budget.copy(source, out)
        elif member.kind == "link" and member.link is not None:
            links.append((path, folder.joinpath(*_parts(str(member.link), file, member.name)), member.name))
        else:
            raise DataError(f"{file} holds {member.name!r}, a {member.kind}; only files and folders are unpacked")
    for path, origin, name in links:
        if not origin.is_file():
            raise DataError(f"{file} holds the link {name!r} to {origin.name!r}, which is no file of the archive")
        path.parent.mkdir(parents=True, exist_ok=True)
        with origin.open("rb") as source, path.open("wb") as out:
            budget.copy(source, out)


def _parts(name: str, file: Path, link: str | None = None) -> tuple[str, ...]:
    """Of a name inside of the archive; raises DataError for one that leads outside, on this system or on another."""
    parts: list[str] = []
    for part in PurePosixPath(name.replace("\\", "/")).parts:
        if part == ".." and link is not None and parts:
            parts.pop()  # links may go up, as long as they stay inside
        elif part in ("..", "/", "//") or ":" in part or "\0" in part:
            what = f"the link {link!r} to {name!r}" if link is not None else f"{name!r}"
            raise DataError(
                f"{file} holds {what}, which leads out of the folder that it is unpacked to; nothing was kept"
            )
        else:
            parts.append(part)
    return tuple(parts)


def _zip_members(file: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            mode = info.external_attr >> 16
            link = None
            if stat.S_ISLNK(mode):
                kind = "link"
                link = PurePosixPath(info.filename).parent / archive.open(info).read(4096).decode(errors="replace")
            else:
                special = stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)
                kind = "special file" if special else "folder" if info.is_dir() else "file"
            yield _Member(info.filename, kind, lambda info=info: archive.open(info), link)  # type: ignore[misc]


class _Bounded:
    """A stream that does not read more at once than there is memory for."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.tell, self.seek, self.close = stream.tell, stream.seek, stream.close

    def read(self, size: int) -> bytes:
        if size > _HEADER:
            raise DataError(f"a header of the archive asks for {size:,} bytes; it is damaged, or made to do damage")
        return self._stream.read(size)


def _tar_members(file: Path) -> Iterator[_Member]:
    kind = {".tar": ".", ".tgz": ".gz"}.get(file.suffix.lower(), file.suffix.lower())
    opened: IO[bytes] = file.open("rb") if kind == "." else _SINGLE[kind](file)
    bounded: Any = _Bounded(opened)
    with opened, tarfile.open(fileobj=bounded, mode="r:") as archive:
        for info in archive:
            link = None
            if info.issym():
                link = PurePosixPath(info.name).parent / info.linkname
            elif info.islnk():
                link = PurePosixPath(info.linkname)
            kind = "folder" if info.isdir() else "file" if info.isreg() else "link" if link else "special file"
            yield _Member(info.name, kind, lambda info=info: archive.extractfile(info), link)  # type: ignore[misc]
