"""Which code is running: the git commit with its uncommitted changes, the user's own source files, the packages."""

from __future__ import annotations

import fnmatch
import io
import os
import re
import subprocess
import sys
import time
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["conda_packages", "framework_archive", "git_state", "source_archive"]

FILE_LIMIT, TOTAL_LIMIT, DIFF_LIMIT = 1_000_000, 10_000_000, 200_000  # bytes
_FRESH = 10.0  # seconds that what git said is taken as still true: a sweep of short runs asks often
_SECRET_NAMES = {
    "secret", "secrets", "credential", "credentials", "password", "passwords", "passwd", "apikey", "apikeys", "key",
    "keys", "token", "tokens",
}  # fmt: skip
_SECRETS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY|\bAKIA[0-9A-Z]{16}\b"
    r"|\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}"
)
_HIDDEN = re.compile(r"(^|/)\.")
_asked: dict[str, tuple[float, dict[str, Any] | None]] = {}
_archived: dict[Any, tuple[bytes, int, list[str]]] = {}


def git_state() -> dict[str, Any] | None:
    """``{"commit", "dirty", "diff"}`` of the repository around the working directory; None where there is none.

    ``diff`` is that of tracked files against the commit, cut at 200 kB, and left out if it shows a secret.
    """
    here = os.getcwd()
    at, state = _asked.get(here, (-_FRESH, None))
    if time.monotonic() - at > _FRESH:
        state = _ask_git()
        _asked[here] = (time.monotonic(), state)
    return state


def _ask_git() -> dict[str, Any] | None:
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    diff = _git("diff", "HEAD", "--no-color", "--no-ext-diff", "--", ":(top)", ":(top,exclude,glob)**/.env*")
    state = {"commit": commit.strip(), "dirty": bool(diff)}
    if diff and _SECRETS.search(diff):
        return state | {"diff": None, "diff_left_out": "it looks as if it held a secret"}
    return state | {"diff": diff and diff[:DIFF_LIMIT], "diff_cut": bool(diff and len(diff) > DIFF_LIMIT)}


def _git(*arguments: str, text: str | None = None) -> str | None:
    """What git prints; None without git, outside a repository, or if it takes too long."""
    try:
        done = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", *arguments],
            input=text, capture_output=True, encoding="utf-8", errors="replace", timeout=5, check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def source_archive() -> tuple[bytes, int, list[str]]:
    """A zip of the user's own source files, how many, and which were left out: ignored, secret, or too large.

    Own are the script that runs and the imported modules whose ``.py`` lies below the working directory,
    outside of hidden folders and of installed packages. The archive is kept until a file changes.
    """
    own = _own_files()
    key = (os.getcwd(), tuple((name, *_stamp(path)) for name, path in own.items()))
    if key not in _archived:
        _archived.clear()
        _archived[key] = _pack(own)
    return _archived[key]


@cache
def framework_archive() -> bytes:
    """A zip of this package's own source, whole, wherever it is imported from: no version tells a development one."""
    package = Path(__file__).parent
    own = {f"{package.name}/{p.relative_to(package).as_posix()}": p for p in sorted(package.rglob("*.py"))}
    return _zip({name: path.read_bytes() for name, path in own.items()})


@cache
def conda_packages() -> str:
    """``name=version=build`` of each package of the conda environment, for ``conda create --file``; or ``""``."""
    found = sorted(path.stem.rsplit("-", 2) for path in Path(sys.prefix, "conda-meta").glob("*-*-*.json"))
    return "".join(f"{'='.join(parts)}\n" for parts in found)


def _own_files() -> dict[str, Path]:
    """Paths by their name in the archive."""
    cwd, here = os.getcwd(), os.path.realpath(os.getcwd())
    main = vars(sys.modules["__main__"]).get("__file__") if "__main__" in sys.modules else None
    found: dict[str, Path] = {}
    for module in list(sys.modules.values()):
        file = getattr(module, "__dict__", {}).get("__file__")  # getattr(module, ...) could import a lazy one
        if not isinstance(file, str) or not (file.startswith((cwd, here)) or file is main):
            continue  # most modules: not worth resolving links
        if not file.endswith(".py") or "site-packages" in file or "dist-packages" in file:
            continue
        path = os.path.realpath(file)
        inside = path.startswith(here + os.sep)
        name = os.path.relpath(path, here).replace(os.sep, "/") if inside else os.path.basename(path)
        if (inside or file is main) and not _HIDDEN.search(name) and not _in_environment(path, here):
            found[name] = Path(path)
    return {name: path for name, path in sorted(found.items()) if path.is_file()}


def _in_environment(path: str, here: str) -> bool:
    """True for what belongs to Python or to a virtual environment, also one that lies below ``here``."""
    return path.startswith(_prefixes(here))


@cache
def _prefixes(here: str) -> tuple[str, ...]:
    return tuple({os.path.realpath(p) + os.sep for p in (sys.prefix, sys.base_prefix)} - {here + os.sep})


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def _pack(own: dict[str, Path]) -> tuple[bytes, int, list[str]]:
    ignored, left_out, packed, total = _ignored(list(own)), list[str](), dict[str, bytes](), 0
    for name, path in own.items():
        size = path.stat().st_size
        if size > FILE_LIMIT or total + size > TOTAL_LIMIT or name in ignored or _is_secret(name):
            left_out.append(name)
            continue
        text = path.read_bytes()
        if _SECRETS.search(text.decode("utf-8", "replace")):
            left_out.append(name)
            continue
        packed[name], total = text, total + size
    return (_zip(packed) if packed else b""), len(packed), left_out


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), text, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _is_secret(name: str) -> bool:
    stem = name.rpartition("/")[2].removesuffix(".py").lower()
    return bool(_SECRET_NAMES & {stem, *re.split(r"[^a-z0-9]+", stem), stem.replace("_", "")})


def _ignored(names: list[str]) -> set[str]:
    """Those that ``.gitignore`` excludes, as git says; without git, as the plain patterns of the file here say."""
    if _git("rev-parse", "--git-dir") is not None:
        listed = _git("check-ignore", "-z", "--stdin", text="\0".join(names) + "\0") if names else ""
        return set((listed or "").split("\0")) - {""}
    try:
        lines = Path(".gitignore").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return set()
    patterns = [line.strip().strip("/") for line in lines if line.strip() and line[0] not in "#!"]
    return {name for name in names if any(_matches(name, pattern) for pattern in patterns)}


def _matches(name: str, pattern: str) -> bool:
    """Whether a path, or a part of it, is what a plain pattern of ``.gitignore`` means."""
    parts = name.split("/")
    heads = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatch.fnmatch(text, pattern) for text in (*heads, *parts))
