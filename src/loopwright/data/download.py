"""A file from the net: fetched once, verified, unpacked safely."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import sys
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from loopwright.data.unpack import hash_of, is_as_unpacked, stem_of, unpack
from loopwright.errors import DataError, SettingError

__all__ = ["fetch"]

_CHUNK = 1 << 20
_BIG = 10_000_000  # bytes from which progress is shown
_WAIT = 30.0  # seconds without an answer


def fetch(url: str, sha256: str | None = None, *, folder: str | Path | None = None, extract: bool = True) -> Path:
    """Where the file of ``url`` lies, after downloading and unpacking it if that has not been done before.

    Of an archive (.zip, .tar, .tar.gz, .tgz, .tar.xz, .tar.bz2) the folder with its contents, of a single packed file
    (.gz, .xz, .bz2) the unpacked one, of anything else, or with ``extract=False``, the file itself. It is kept below
    ``folder``; without it below the environment variable LOOPWRIGHT_DATA, or else below ~/.cache/loopwright.

    With ``sha256`` (64 hex digits) the content is verified, also when it was there already, for which all of it is
    read: a file that is not what was fetched is fetched anew; unpacked files are compared with a record that is kept
    beside them, and those changed or missing are told by a warning and put back. Files that were added stay. Without
    it only https and file URLs are taken, http is not; a file of this machine that has changed is fetched anew, and an
    archive that cannot be unpacked is deleted, so that the next call fetches it again. Processes may fetch the same
    file at the same time. No archive can write outside its folder, make links, or grow beyond a gigabyte and 100 times
    its size.
    Progress of big files is written to stderr. Raises DataError if the file cannot be had, or is not what was asked
    for, and SettingError for a URL or a hash that cannot be used.

    >>> import pathlib, tempfile
    >>> source = pathlib.Path(tempfile.mkdtemp()) / "words.txt"
    >>> _ = source.write_text("one two")
    >>> fetch(source.as_uri(), folder=source.parent).read_text()
    'one two'
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise SettingError(f"sha256={sha256!r} is not 64 hex digits; sha256sum FILE prints them")
    sha256 = sha256 and sha256.lower()
    _check_scheme(url, sha256)
    name = _name(url)
    identity = f"{url} {sha256}{_stamp(url) if sha256 is None else ''}"
    own = f"{stem_of(name) or name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    place = _root(folder) / own
    file, target = place / name, place / (stem_of(name) or name)
    wants, record = extract and stem_of(name) is not None, place / f".{target.name}.sha256"
    if wants and os.path.exists(target) and (sha256 is None or is_as_unpacked(target, record)):
        return target
    if not os.path.exists(file) or (sha256 is not None and hash_of(file) != sha256):
        _make(place)
        _download(url, sha256, file)
    if not wants:
        return file
    try:
        return unpack(file, target, None if sha256 is None else record)
    except DataError as error:
        ours = getattr(error.__cause__, "errno", None) is not None  # a full disk, a permission
        if sha256 is None and not ours:  # what was asked for by its hash would only come again
            file.unlink(missing_ok=True)
            error.add_note(f"[loopwright] {file} was deleted: the next call fetches it anew")
        raise


def _root(folder: str | Path | None) -> Path:
    if folder is None:
        folder = os.environ.get("LOOPWRIGHT_DATA") or Path.home() / ".cache" / "loopwright"
    return Path(folder).expanduser()


def _make(place: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a ValueError: no path can hold a zero byte
        raise DataError(
            f"cannot make the folder {place}: {getattr(error, 'strerror', None) or error}. Name one that can be "
            "written to: fetch(..., folder='data'), or the environment variable LOOPWRIGHT_DATA"
        ) from error


def _stamp(url: str) -> str:
    """Of a file of this machine, size and time: another version of it is another file, with a place of its own."""
    if urlsplit(url).scheme != "file":
        return ""
    try:
        found = os.stat(url2pathname(urlsplit(url).path))
    except OSError:
        return ""  # fetching it says why
    return f" {found.st_size} {found.st_mtime_ns}"


def _check_scheme(url: str, sha256: str | None) -> None:
    if not isinstance(url, str):
        path = isinstance(url, os.PathLike)
        mend = "path.resolve().as_uri() for a file of this machine" if path else "'https://example.org/digits.zip'"
        raise SettingError(f"cannot fetch {url!r}, which is no text; expected a URL, such as {mend}")
    scheme = urlsplit(url).scheme
    if scheme == "http" and sha256 is None:
        raise SettingError(
            f"{_shown(url)} is not encrypted, so that anybody on the way could change the data; write https://, or "
            "say what it must be: fetch(url, sha256=...)"
        )
    if scheme not in ("https", "http", "file"):
        raise SettingError(
            f"cannot fetch {url!r}; expected a URL that begins with https:// or file://. Of a file of this machine: "
            "fetch(pathlib.Path(...).resolve().as_uri())"
        )


def _name(url: str) -> str:
    name = unquote(urlsplit(url).path).rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII).lstrip(".")[-100:] or "data"


def _shown(url: str) -> str:
    """Without user, password and query, which may hold secrets."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirections are held to the rule that the first URL was held to."""

    def __init__(self, sha256: str | None) -> None:
        self.sha256 = sha256

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        try:
            _check_scheme(newurl, self.sha256)
        except SettingError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, sha256: str | None, file: Path) -> None:
    """Into a file of its own beside ``file``, which takes its place when it is complete and verified."""
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "loopwright"})
        with part.open("xb") as out, _opened(request, sha256) as answer:
            found = _copy(answer, out, file)
            out.flush()
            os.fsync(out.fileno())
        if sha256 is not None and found != sha256:
            raise DataError(
                f"{_shown(url)} has sha256 {found}, and {sha256} was asked for. Either the file was changed or "
                "damaged, or the hash is that of another file"
            )
        os.replace(part, file)
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(error, HTTPError):
            error.close()  # it holds the answer
        raise DataError(
            f"cannot fetch {_shown(url)}: {reason}. Check the address and the connection, or put the file at {file} "
            "yourself"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _opened(request: urllib.request.Request, sha256: str | None) -> Any:
    return urllib.request.build_opener(_Redirects(sha256)).open(request, timeout=_WAIT)


def _copy(answer: Any, out: IO[bytes], file: Path) -> str:
    """Copy all of ``answer``; its sha256. Raises DataError if it ends early or does not fit on the disk."""
    total = int(answer.headers.get("Content-Length") or 0)
    free = shutil.disk_usage(file.parent).free
    if total > free:
        raise DataError(
            f"{file.name} has {total:,} bytes, and {file.parent} has {free:,} left; make room or pass folder="
        )
    digest, done, shown, clock = hashlib.sha256(), 0, False, time.monotonic()
    while chunk := answer.read(_CHUNK):
        out.write(chunk)
        digest.update(chunk)
        done += len(chunk)
        if done > _BIG and time.monotonic() - clock > 0.5:
            shown, clock = True, time.monotonic()
            of = f" of {total / 1e6:,.0f}" if total else ""
            print(f"\rfetching {file.name}: {done / 1e6:,.0f}{of} MB", end="", file=sys.stderr, flush=True)
    if shown:
        print(file=sys.stderr)
    if total and done != total:
        raise DataError(f"{file.name} ended after {done:,} of {total:,} bytes; try again")
    return digest.hexdigest()
