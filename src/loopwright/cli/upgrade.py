"""``loopwright upgrade``."""

from __future__ import annotations

import difflib
import io
import os
import shlex
import shutil
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

from loopwright.cli.rewrite import rewritten
from loopwright.cli.tables import safe
from loopwright.renamed import RENAMED

__all__ = ["upgrade"]


def upgrade(paths: Sequence[Path], *, write: bool) -> int:
    """Show as a diff what is to be changed, or change it; 0 if nothing is left, 1 if there is, 2 after an error."""
    names = {old: now.to for old, now in RENAMED.items()}
    changed = failed = 0
    found = dict.fromkeys(file for path in paths for file in _files(path))
    for path in found:
        try:
            before, encoding = _read(path)
            after = rewritten(before, names)
            if after != before and write:
                _replace(path, after.encode(encoding))
        except (OSError, SyntaxError, ValueError, RecursionError) as error:
            failed += 1
            _say(f"loopwright: {path}{_why(error)}")
            continue
        if after != before:
            changed += 1
            print(safe(f"changed  {path}")) if write else _show(path, before, after, encoding)
    files = f"{len(found)} file{'s' * (len(found) != 1)}"
    skipped = f", {failed} left out" * bool(failed)
    if write and (changed or failed):
        _say(f"changed {changed} of {files}{skipped}")
    elif changed:
        command = shlex.join(["loopwright", "upgrade", *map(str, paths), "--write"])
        _say(f"\nold names in {changed} of {files}{skipped}. To change them: {command}")
    else:
        _say(f"nothing to change in {files}{skipped}")
    return 2 if failed else int(changed > 0 and not write)


def _files(path: Path) -> Iterator[Path]:
    """The file itself, or those of Python in a folder, less what is hidden or installed."""
    if not path.is_dir():
        yield path
        return
    for folder, folders, names in os.walk(path):
        foreign = {name for name in folders if (Path(folder) / name / "pyvenv.cfg").exists()} | {"site-packages"}
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in foreign)
        yield from (Path(folder) / name for name in sorted(names) if name.endswith(".py"))


def _read(path: Path) -> tuple[str, str]:
    """Text and encoding, with line endings as they are; no text where the package is not named."""
    raw = path.read_bytes()
    if b"loopwright" not in raw:  # then it may be written in whatever it likes
        return "", "utf-8"
    encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
    text = raw.decode(encoding)
    if text.encode(encoding) != raw:
        raise ValueError(f"{encoding} has two ways to write some letter in it; change it by hand")
    return text, encoding


def _replace(path: Path, raw: bytes) -> None:
    """Put another content into a file in one go: nobody sees a half of it."""
    path = path.resolve()  # a link stays one
    with path.open("r+b"):  # refused where it may not be written
        part = path.with_name(f".{path.name}.writing")
    try:
        shutil.copy(path, part)  # with its permissions
        part.write_bytes(raw)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _show(path: Path, before: str, after: str, encoding: str) -> None:
    """Print a unified diff: for the eye at a terminal, else to the very byte, so that it is a patch."""
    name = os.fsencode(path)
    old, new = ([*io.BytesIO(text.encode(encoding))] for text in (before, after))  # in lines that end with \n
    for line in difflib.diff_bytes(difflib.unified_diff, old, new, name, name):
        if sys.stdout.isatty():
            print(safe(line.decode(encoding).rstrip().expandtabs()))
        else:
            sys.stdout.buffer.write(line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n")


def _say(text: str) -> None:
    """Print to the error output: the other one is a diff, which may go to a file."""
    sys.stdout.flush()
    print("\n".join(map(safe, text.split("\n"))), file=sys.stderr)


def _why(error: Exception) -> str:
    if isinstance(error, SyntaxError):
        return f":{error.lineno}: {error.msg}" if error.lineno else f": {error.msg}"
    return f": {error.strerror if isinstance(error, OSError) else error}"
