"""The code of a run that is the user's own: which files, what was typed, a zip of it all, and how to run that."""

from __future__ import annotations

import fnmatch
import io
import os
import re
import sys
import zipfile
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from loopwright.provenance import SECRETS, archived, file_of, files_of_modules, git_says, in_environment, is_installed

__all__ = ["Sources", "add_sources", "command", "sources"]

FILE_LIMIT, TOTAL_LIMIT = 1_000_000, 10_000_000  # bytes
CELLS, COMMAND = "cells.py", "command.py"  # what was typed into a notebook, and behind python -c
_FRAMEWORK = os.path.dirname(os.path.realpath(__file__)) + os.sep  # framework.zip has it
_HIDDEN = re.compile(r"(^|/)\.")
# a module whose name is made of such words alone holds nothing else; tokens.py and key_value.py are code like any other
_SECRET_WORDS = {"secret", "credential", "password", "passwd", "apikey"}  # and their plurals
_BESIDE = {"", "my", "local", "private"}
_LAUNCHER = re.compile(r"multiprocessing|sys\.stdin")  # not written by the user: a worker of theirs, of pytest-xdist
_kept: dict[Any, Sources] = {}


class Sources(NamedTuple):
    """A zip, the names in it, and why something was left out, by its name."""

    archive: bytes
    names: list[str]
    left_out: dict[str, str]


class _Source(NamedTuple):
    base: str  # the folder that its name starts from
    path: str
    text: bytes | None = None  # of what was typed


def sources() -> Sources:
    """A zip of the user's own code, as it is now: the script, cells of a notebook, every module that was imported.

    Own is what is neither installed nor part of Python or of this package. Names are relative to the working
    directory; to the folder of the script where that lies elsewhere; and of what lies in neither, to the entry of
    ``sys.path`` that it comes from: unpacked, they are imported as they were. Left out is what git ignores, what seems
    to hold a secret, what is too large, compiled, hidden or cannot be read. The zip is kept until a file changes.

    >>> sources().left_out
    {}
    """
    own, lost = _own()
    key = os.getcwd(), tuple((name, one.path, _stamp(one)) for name, one in own.items()), tuple(lost)
    if key not in _kept:
        _kept.clear()
        _kept[key] = _pack(own, lost)
    return _kept[key]


def add_sources(file: Path) -> tuple[list[str], dict[str, str]]:
    """Add to a zip that ``sources`` made what was imported or typed since; the names of that, and what is left out now.

    What is in it stays as it was when the run began.
    """
    now, before = sources(), dict[str, bytes]()
    if file.exists():
        with zipfile.ZipFile(file) as archive:
            if set(now.names) <= set(archive.namelist()) - {CELLS}:
                return [], now.left_out  # as good as always: nothing to be read
            before = {name: archive.read(name) for name in archive.namelist()}
    later = dict[str, bytes]()
    with zipfile.ZipFile(io.BytesIO(now.archive or archived({}))) as archive:
        for name in now.names:
            text = archive.read(name)
            if name == CELLS and not text.startswith(before.get(name, b"")):  # of another session
                name = f"cells-{sum(one.startswith('cells') for one in before) + 1}.py"
            if name not in before or (name == CELLS and text != before[name]):
                later[name] = text
    if later:
        part = file.with_name(f".{file.name}.writing")
        part.write_bytes(archived(before | later))
        os.replace(part, file)
    return list(later), now.left_out


def command() -> list[str]:
    """What to give to Python to run this again, here or where the zip of ``sources`` was unpacked.

    ``["-m", "train", "--lr=1"]`` for a module; the name of the script in the zip for a script that is in it.
    """
    main, arguments, module = _main(), sys.argv[1:], _module()
    if module is not None and os.path.realpath(_program()) == os.path.realpath(file_of(sys.modules["__main__"]) or ""):
        return ["-m", module.removesuffix(".__main__"), *arguments]
    if main is not None:
        return [_named(main, _root(main)), *arguments]
    typed, _ = _typed()
    if CELLS in typed:  # the arguments are those of the kernel
        return ["-m", "IPython", CELLS] if b"get_ipython()" in typed[CELLS] else [CELLS]
    return [COMMAND, *arguments] if COMMAND in typed else list(sys.argv)


def _own() -> tuple[dict[str, _Source], dict[str, str]]:
    """The user's code by its name in the zip, that of the script's folder first, and what no file is there for."""
    main, (typed, cut), cwd = _main(), _typed(), os.path.realpath(os.getcwd())
    root = cwd if main is None else _root(main)
    everywhere = main is not None or bool(typed)  # else somebody else's program runs, such as pytest
    near, far, lost = dict[str, _Source](), dict[str, _Source](), dict[str, str]()
    entries = [os.path.realpath(entry) for entry in sys.path if entry]
    for path in sorted(_imported(cwd, tuple(map(id, sys.modules.values()))) | ({main} if main else set())):
        base = next((folder for folder in (root, cwd) if _below(path, folder)), None)
        if base is None and not everywhere:
            continue
        found, base = (near if base else far), base or _entry(path, entries)
        name = _named(path, base)
        if _HIDDEN.search(name):
            if found is near:
                lost[name] = "it is in a hidden folder"
        elif path != main and not path.endswith(".py"):
            if found is near:
                lost[name] = "it is compiled"
        else:
            while name in near or name in far:
                name = f"other/{name}"
            found[name] = _Source(base, path)
    if not near and main is None and not typed and _program() in ("", "-"):
        lost["<stdin>"] = "it was typed or piped into Python, not written in a file"
    if cut:
        lost[f"a part of {CELLS}"] = "it looks as if it held a secret"
    own = dict(sorted(near.items())) | {name: _Source(cwd, "", text) for name, text in typed.items()}
    return own | {name: one for name, one in sorted(far.items()) if name not in own}, lost


@lru_cache(1)
def _imported(cwd: str, modules: tuple[int, ...]) -> set[str]:
    """The files of modules that are neither installed nor of Python; of thousands these are a few."""
    return {path for file in files_of_modules() if (path := _resolved(file, cwd)) is not None}


@cache
def _resolved(file: str, cwd: str) -> str | None:
    """A file without links; None for one of the environment, and for the made-up names of some modules of torch."""
    path = file
    for _ in range(2):  # as it is named, which is quick and mostly enough, and as it is
        if not os.path.isabs(path) or path.startswith(_FRAMEWORK) or is_installed(path) or in_environment(path, cwd):
            return None
        path = os.path.realpath(path)
    return path


def _main() -> str | None:
    """The file of the user's main program, also while a debugger or profiler runs it."""
    cwd = os.path.realpath(os.getcwd())
    for file in (file_of(sys.modules.get("__main__")), _program() if _program().endswith(".py") else None):
        path = os.path.realpath(file) if file else ""
        if file and os.path.isfile(path) and not (is_installed(path) or in_environment(path, cwd)):
            return None if path.startswith(_FRAMEWORK) else path
    return None


def _module() -> str | None:
    """The name behind ``python -m``."""
    name = getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", None)
    return name if isinstance(name, str) and name != "__main__" else None  # that is python folder/


def _root(main: str) -> str:
    """The working directory where the script is below it, else the folder from which the script imports."""
    cwd = os.path.realpath(os.getcwd())
    if _below(main, cwd):
        return cwd
    folder = Path(main).parent
    dots = (_module() or "").count(".")
    return str(folder.parents[dots - 1] if 0 < dots <= len(folder.parents) else folder)


def _entry(path: str, entries: list[str]) -> str:
    """The entry of ``sys.path`` from which a file is imported; its folder where there is none."""
    return max((entry for entry in entries if _below(path, entry)), key=len, default=os.path.dirname(path))


def _below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def _named(path: str, base: str) -> str:
    return os.path.relpath(path, base).replace(os.sep, "/")


def _typed() -> tuple[dict[str, bytes], bool]:
    """What was run that is in no file, by name: the cells of an IPython session so far, or what stood behind ``-c``.

    And whether a cell was left out, since it looks as if it held a secret.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    if shell is not None:
        cells = {number: cell for number, cell in enumerate(shell.user_ns.get("In", ())) if cell.strip()}
        safe = {number: cell for number, cell in cells.items() if not SECRETS.search(cell)}
        text = "\n".join(f"# %% [{number}]\n{cell.rstrip()}\n" for number, cell in safe.items())
        return {CELLS: text.encode()} if safe else {}, len(safe) < len(cells)
    if _program() == "-c" and "-c" in sys.orig_argv:
        text = sys.orig_argv[sys.orig_argv.index("-c") + 1]
        if not _LAUNCHER.search(text):
            return {COMMAND: text.encode()}, False
    return {}, False


def _program() -> str:
    return sys.argv[0] if sys.argv else ""


def _stamp(one: _Source) -> Any:
    if one.text is not None:
        return one.text
    try:
        stat = os.stat(one.path)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def _pack(own: dict[str, _Source], lost: dict[str, str]) -> Sources:
    ignored = set[str]()
    for base in {one.base for one in own.values() if one.path}:
        inside = {_named(one.path, base): name for name, one in own.items() if one.path and one.base == base}
        ignored |= {inside[name] for name in _ignored(base, list(inside)) if name in inside}
    packed, left_out, total = dict[str, bytes](), dict(lost), 0
    for name, one in own.items():
        why, text = _refused(name, one) if name not in ignored else ("git ignores it", b"")
        if why is None and total + len(text) > TOTAL_LIMIT:
            why = f"all of them are larger than {TOTAL_LIMIT // 1_000_000} MB"
        if why is None:
            packed[name], total = text, total + len(text)
        else:
            left_out[name] = why
    return Sources(archived(packed) if packed else b"", list(packed), dict(sorted(left_out.items())))


def _refused(name: str, one: _Source) -> tuple[str | None, bytes]:
    """Why a file cannot be kept, or what it holds."""
    if _is_secret(name):
        return "its name says that it holds secrets", b""
    try:
        size = os.path.getsize(one.path) if one.text is None else len(one.text)
        if size > FILE_LIMIT:
            return f"it is larger than {FILE_LIMIT // 1_000_000} MB", b""
        text = Path(one.path).read_bytes() if one.text is None else one.text
    except OSError:
        return "it cannot be read", b""
    return ("it looks as if it held a secret" if SECRETS.search(text.decode("utf-8", "replace")) else None), text


def _is_secret(name: str) -> bool:
    stem = name.rpartition("/")[2].removesuffix(".py").lower()
    words = {word.removesuffix("s") for word in re.split(r"[^a-z0-9]+", re.sub("api[_-]?key", "apikey", stem))}
    return bool(words & _SECRET_WORDS) and words <= _SECRET_WORDS | _BESIDE


def _ignored(base: str, names: list[str]) -> set[str]:
    """Those below ``base`` that ``.gitignore`` excludes, as git says; without git, as the plain patterns there say."""
    if git_says("rev-parse", "--git-dir", cwd=base) is not None:
        listed = git_says("check-ignore", "-z", "--stdin", text="\0".join(names) + "\0", cwd=base) if names else ""
        return set((listed or "").split("\0")) - {""}
    try:
        lines = Path(base, ".gitignore").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return set()
    patterns = [line.strip().strip("/") for line in lines if line.strip() and line[0] not in "#!"]
    return {name for name in names if any(_matches(name, pattern) for pattern in patterns)}


def _matches(name: str, pattern: str) -> bool:
    """Whether a path, or a part of it, is what a plain pattern of ``.gitignore`` means."""
    parts = name.split("/")
    heads = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatch.fnmatch(text, pattern) for text in (*heads, *parts))
