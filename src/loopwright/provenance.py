"""Which code is running: the git commit with its uncommitted changes, what is the user's own, the packages."""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import sysconfig
import time
import zipfile
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

__all__ = [
    "SECRETS", "archived", "code_digest", "conda_packages", "file_of", "files_of_modules", "framework_archive",
    "git_says", "git_state", "in_environment", "is_installed", "is_own",
]  # fmt: skip

DIFF_LIMIT = 200_000  # bytes
_FRESH = 10.0  # seconds that what git said is taken as still true: a sweep of short runs asks often
SECRETS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY|\bAKIA[0-9A-Z]{16}\b"
    r"|\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}"
)
_asked: dict[str, tuple[float, dict[str, Any] | None]] = {}


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
    commit = git_says("rev-parse", "HEAD")
    if commit is None:
        return None
    diff = git_says("diff", "HEAD", "--no-color", "--no-ext-diff", "--", ":(top)", ":(top,exclude,glob)**/.env*")
    state = {"commit": commit.strip(), "dirty": bool(diff)}
    if diff and SECRETS.search(diff):
        return state | {"diff": None, "diff_left_out": "it looks as if it held a secret"}
    return state | {"diff": diff and diff[:DIFF_LIMIT], "diff_cut": bool(diff and len(diff) > DIFF_LIMIT)}


def git_says(*arguments: str, text: str | None = None, cwd: str | None = None) -> str | None:
    """What git prints in a folder; None without git, outside a repository, or if it takes too long."""
    try:
        done = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", *arguments],
            input=text, cwd=cwd, capture_output=True, encoding="utf-8", errors="replace", timeout=5, check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def code_digest() -> str | None:
    """A hash of the source that runs: the script, and every module that is not part of the environment.

    None where it is not known: where the main program is no file, as in a notebook, or a file is gone.
    """
    main = _main_file()
    if main is None or not os.path.isfile(main):
        return None
    try:
        files = [(name, file, os.stat(file)) for name, file in _written(main, os.getcwd(), len(sys.modules))]
        return _hashed(tuple((name, file, stat.st_mtime_ns, stat.st_size) for name, file, stat in files))
    except OSError:  # what runs is not there any more
        return None


@cache
def is_own(module: str) -> bool:
    """True for a module of the user's: the main program, also in a notebook, and what is imported and not installed.

    >>> is_own("torch"), is_own(__name__)
    (False, False)
    """
    file = file_of(sys.modules.get(module))
    if file is None or module.partition(".")[0] == __name__.partition(".")[0]:
        return module == "__main__"
    return not is_installed(file) and not in_environment(os.path.realpath(file), os.path.realpath(os.getcwd()))


@lru_cache(1)
def _written(main: str, cwd: str, modules: int) -> list[tuple[str, str]]:
    """``main`` and the source of what is imported and not installed, by name; found anew if there are more modules."""
    here, files = os.path.realpath(cwd), {main}
    for file in files_of_modules():
        if file.endswith(".py") and not is_installed(file) and not in_environment(file, here):
            files.add(file)
    return sorted((os.path.relpath(file, cwd), file) for file in files if os.path.isfile(file))


@lru_cache(1)
def _hashed(files: tuple[tuple[str, str, int, int], ...]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for name, file, *_ in files:
        text = Path(file).read_bytes()
        digest.update(f"{name}\0{len(text)}\0".encode() + text)
    return digest.hexdigest()


@cache
def framework_archive() -> bytes:
    """A zip of this package's own source, whole, wherever it is imported from: no version tells a development one."""
    package = Path(__file__).parent
    files = sorted(p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts)  # the report has CSS
    own = {f"{package.name}/{p.relative_to(package).as_posix()}": p for p in files}
    return archived({name: path.read_bytes() for name, path in own.items()})


@cache
def conda_packages() -> str:
    """``name=version=build`` of each package of the conda environment, for ``conda create --file``; or ``""``."""
    found = sorted(path.stem.rsplit("-", 2) for path in Path(sys.prefix, "conda-meta").glob("*-*-*.json"))
    return "".join(f"{'='.join(parts)}\n" for parts in found)


def archived(files: dict[str, bytes]) -> bytes:
    """A zip of files by name, the same bytes for the same files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), text, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def file_of(module: Any) -> str | None:
    """The file that a module says it is from."""
    file = getattr(module, "__dict__", {}).get("__file__")  # getattr(module, ...) could import a lazy one
    return file if isinstance(file, str) else None


def files_of_modules() -> set[str]:
    """The files of all modules, but for those that torch's compiler has written, which it imports as its own."""
    known = sys.modules.copy()  # at once: a collection amid list(items()) may import, which changes the dict
    modules = [module for name, module in known.items() if not name.startswith("torch.")]
    return {file for module in modules if (file := file_of(module)) is not None}


def _main_file() -> str | None:
    return file_of(sys.modules.get("__main__"))


def is_installed(file: str) -> bool:
    """True for a file of an installed package."""
    return "site-packages" in file or "dist-packages" in file


def in_environment(path: str, here: str) -> bool:
    """True for what belongs to Python or to a virtual environment, also one that lies below ``here``."""
    return path.startswith(_prefixes(here))


@cache
def _prefixes(here: str) -> tuple[str, ...]:
    """Folders of the environment; the library alone where ``here`` lies below the rest, as /usr/src does."""
    found = {os.path.realpath(p).rstrip(os.sep) + os.sep for p in (sys.prefix, sys.base_prefix)}
    library = {os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib")}
    return tuple({p for p in found if not (here + os.sep).startswith(p)} | library)
