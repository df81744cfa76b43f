"""The folder of a run: what is needed to know later which code, settings and packages made its results."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import secrets
import sys
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal, cast, get_args

from loopwright import __version__
from loopwright.compared import compared
from loopwright.described import plain
from loopwright.errors import SettingError, choose
from loopwright.provenance import conda_packages, framework_archive, git_state
from loopwright.sources import add_sources, command, sources
from loopwright.written import warn

__all__ = [
    "about", "close_folder", "hold", "newest_folder", "newest_in", "open_folder", "packages", "put",
    "read_record", "read_settings", "recorded", "reopen_folder",
]  # fmt: skip

Status = Literal["running", "done", "failed", "interrupted", "stopped"]
_LONGEST = 100  # file systems end names at 255 bytes, and a letter may take four


def open_folder(
    root: Path | str,
    name: str,
    *,
    settings: Mapping[str, Any],
    seed: int | None,
    data: Mapping[str, Any] | None = None,
    identity: Mapping[str, str] | None = None,
) -> Path:
    """Make ``root/name/<time>-<id>/`` for a run that begins now, and return it.

    In it: ``run.json`` (status "running", ``command``: what to give to Python where ``source.zip`` was unpacked,
    ``typed`` and ``cwd``: what was given, and where, seed, versions, host, git commit and uncommitted changes,
    ``data``: the fingerprint of that, ``identity``: hashes that only the same run has),
    ``config.yaml`` (the settings; what is not plain data by its class), ``environment.txt`` (installed
    packages), ``environment.conda.txt`` (those of a conda environment), ``source.zip`` (the script, or the cells of a
    notebook as ``cells.py``, and the imported modules that are not installed: no file that git ignores, none that
    looks like it holds a secret, at most 1 MB each and 10 MB together), ``framework.zip`` (this package's own source,
    as it is). Environment variables are not kept. Warns of code that is left out. Raises SettingError for a name that
    is no folder name, and for a ``root`` that cannot be written.

    >>> path = open_folder("runs", "digits", settings={"epochs": 2}, seed=0)
    >>> {"config.yaml", "environment.txt", "run.json"} <= {p.name for p in path.iterdir()}
    True
    """
    _check_name(name)
    now = datetime.datetime.now().astimezone()
    folder = Path(root) / name / f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    code = sources()
    _say_what_is_missing(code.left_out)
    record = {
        "status": "running", "name": name, "seed": seed, "started": now.isoformat(), "command": command(),
        "typed": list(sys.argv), "cwd": os.getcwd(), **_process(), "versions": _versions(), "git": git_state(),
        "source": {"files": len(code.names), "left_out": list(code.left_out)}, "data": data, "identity": identity,
    }  # fmt: skip
    try:
        folder.mkdir(parents=True)
        _write(folder / "run.json", record)
        (folder / "config.yaml").write_text(_yaml(settings), encoding="utf-8")
        (folder / "environment.txt").write_text(_environment(), encoding="utf-8")
        for file, content in (
            ("source.zip", code.archive), ("framework.zip", framework_archive()),
            ("environment.conda.txt", conda_packages().encode()),
        ):  # fmt: skip
            if content:
                (folder / file).write_bytes(content)
    except OSError as error:
        raise SettingError(
            f"the run cannot be written to {folder}: {error.strerror or error}. Give a folder that can be written, "
            "folder='runs', or folder=None to write nothing"
        ) from error
    return folder


def about(
    name: str, settings: Mapping[str, Any], *, seed: int | None, data: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a tracker is told of a run, as plain data: ``name``, ``seed``, ``versions``, ``packages``, ``git`` (the
    commit, and whether it is dirty), ``data`` (its fingerprint), ``settings``.

    >>> about("digits", {"epochs": 2}, seed=0, data=None)["settings"]
    {'epochs': 2}
    """
    git = {key: value for key, value in (git_state() or {}).items() if key in ("commit", "dirty")}
    told = {"name": name, "seed": seed, "versions": _versions(), "packages": packages(), "git": git, "data": data}
    return cast("dict[str, Any]", _standard(told | {"settings": settings}))


def recorded(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``about`` told of a run that was recorded in a folder, and its ``status``; other types are left out.

    Raises SettingError for a folder that is not that of a run.
    """
    folder = Path(path)
    record = read_record(folder)
    if not record:
        what = "does not exist" if not folder.exists() else "is no run: it has no run.json that can be read"
        raise SettingError(f"{folder} {what}. Give the folder of a run, such as runs/digits/20261121-101500-1a2b3c")
    told: dict[str, Any] = {"name": folder.resolve().parent.name, "status": "running", "seed": None, "versions": {},
                            "git": {}, "data": None}  # fmt: skip
    known = {"name": str, "status": str, "seed": int, "versions": dict, "git": dict, "data": dict}
    told |= {key: record[key] for key, kind in known.items() if isinstance(record.get(key), kind)}
    git = {key: value for key, value in told["git"].items() if key in ("commit", "dirty")}
    return told | {"git": git, "packages": _required(folder), "settings": _settings(folder)}


def _required(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / "environment.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    return {name: version for name, _, version in (line.partition("==") for line in lines) if version}


def _settings(folder: Path) -> Any:
    try:
        settings = read_settings((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def read_settings(text: str) -> Any:
    """The plain data of a ``config.yaml``; ValueError if it is none.

    >>> read_settings("epochs: 2")
    {'epochs': 2}
    """
    import yaml

    class Plain(yaml.SafeLoader):
        """Without aliases, of which a few can stand for more than memory holds."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Plain)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"these are no settings: {error}") from error


def close_folder(path: Path | str, status: Status, **more: Any) -> None:
    """Write into ``run.json`` how a run ended: its ``status``, when, after how many seconds, and ``more`` values.

    ``error=`` takes an exception (its type, message and notes are kept), ``metrics=`` the final ones. The file is
    replaced in one move. Code that was first imported since the run began is added to ``source.zip``, and named as
    ``later`` of ``source``. Raises SettingError for an unknown status.

    >>> path = open_folder("runs", "digits", settings={}, seed=0)
    >>> close_folder(path, "done", metrics={"valid/loss": 0.5})
    >>> json.loads((path / "run.json").read_text())["metrics"]
    {'valid/loss': 0.5}
    """
    if status not in get_args(Status):
        raise SettingError(f"status={status!r} is unknown. {choose(status, get_args(Status))}")
    file = Path(path) / "run.json"
    record, now = read_record(path), datetime.datetime.now().astimezone()
    record |= {"status": status, "ended": now.isoformat()}
    if "started" in record:
        began = (record.get("restarts") or [record["started"]])[-1]
        record["seconds"] = (now - datetime.datetime.fromisoformat(began)).total_seconds()
    if isinstance(error := more.pop("error", None), BaseException):
        record["error"] = {"type": type(error).__qualname__, "message": str(error)}
        if notes := [str(note) for note in getattr(error, "__notes__", ())]:  # the place, and which rank it was
            record["error"]["notes"] = notes
    told, lost = _look_again(Path(path), record)
    _write(file, record | more | told)
    _say_what_is_missing(lost)


def _look_again(path: Path, record: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """``source`` of a run that ends, with what was imported since it began; and what of that is left out, and why."""
    source = record.get("source")
    if not isinstance(source, dict) or not path.is_dir():
        return {}, {}
    try:
        later, left_out = add_sources(path / "source.zip")
    except (OSError, ValueError, zipfile.BadZipFile):  # how a run ended is told whatever became of its zip
        return {}, {}
    known = source.get("left_out") or []
    lost = {name: why for name, why in left_out.items() if name not in known}
    if not later and not lost:
        return {}, {}
    told = {"files": source.get("files", 0) + len(later), "left_out": [*known, *lost]}
    return {"source": source | told | {"later": [*source.get("later", []), *later]}}, lost


def _say_what_is_missing(left_out: Mapping[str, str]) -> None:
    """Once, that a part of the user's code is not kept with the run."""
    if left_out:
        shown = "; ".join(f"{name}: {why}" for name, why in list(left_out.items())[:5])
        more = "" if len(left_out) <= 5 else f"; and {len(left_out) - 5} more"
        warn(
            f"not all of your code is kept with the run. Left out of source.zip: {shown}{more}. Keep it elsewhere if "
            "the run is to be made again; run.json lists it under source"
        )


def reopen_folder(path: Path | str, *, settings: Mapping[str, Any] | None = None, step: int = 0, **more: Any) -> None:
    """Note in ``run.json`` that the run goes on now, in this process: status "running", one more of ``restarts``.

    Where ``settings`` are not those of ``config.yaml``, that is written anew, and what has changed after ``step``
    becomes one more of ``changes``. ``more`` is kept as ``close_folder`` keeps it.

    >>> path = open_folder("runs", "digits", settings={}, seed=0)
    >>> close_folder(path, "interrupted")
    >>> reopen_folder(path)
    >>> json.loads((path / "run.json").read_text())["status"]
    'running'
    """
    file, config = Path(path) / "run.json", Path(path) / "config.yaml"
    record = {k: v for k, v in read_record(path).items() if k not in ("ended", "seconds", "error")}
    now = datetime.datetime.now().astimezone().isoformat()
    if settings is not None:
        before = _settings(config.parent)
        told = [one for kind in compared(before, settings) for one in kind]
        if told:
            record["changes"] = [*record.get("changes", []), {"at": now, "step": step, "settings": told}]
        if told or not before:
            text = _yaml(settings)
            put(config, lambda part: part.write_text(text, encoding="utf-8"))
    _write(file, record | _process() | more | {"status": "running", "restarts": [*record.get("restarts", []), now]})


def newest_folder(root: Path | str, name: str) -> Path | None:
    """The folder of the run of that name that was begun last, or None."""
    _check_name(name)
    found: Path | None = newest_in(Path(root, name))
    return found


def newest_in(folder: Any) -> Any:
    """The run in ``folder``, a Path or where fsspec has it, that was begun last; None where there is none to be seen.

    >>> path = open_folder("runs", "digits", settings={}, seed=0)
    >>> newest_in(Path("runs/digits")) == path, newest_in(Path("runs"))
    (True, None)
    """
    try:
        found = [one for one in folder.iterdir() if (one / "run.json").is_file()]
    except OSError:
        return None
    last = max((one.name.rpartition("-")[0] for one in found), default="")  # the second in which it was begun
    latest = [one for one in found if one.name.startswith(last)]
    return max(latest, key=lambda one: str(read_record(one).get("started")), default=None)


def hold(path: Path | str) -> IO[bytes]:
    """Keep other processes from training in the folder of a run, until the result is closed or this process ends.

    Raises SettingError while another process holds it.
    """
    file = open(Path(path) / ".lock", "ab")  # noqa: SIM115 - the caller closes it
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: forked workers do not keep it
    except (BlockingIOError, PermissionError) as error:
        file.close()
        who = read_record(path)
        raise SettingError(
            f"{path} is in use: process {who.get('pid', '?')} on {who.get('host', '?')} is training there. Wait until "
            "it has ended, or begin another run: Trainer(name=...), or fit(resume=None)"
        ) from error
    except (ImportError, OSError):
        pass  # there are no such locks here
    return file


def _check_name(name: Any) -> None:
    fits = isinstance(name, str) and re.fullmatch(r"\w([\w .,+=@()-]*[\w+=@)-])?", name)
    if not fits or len(name) > _LONGEST:
        shown = repr(name) if len(repr(name)) <= 80 else f"{repr(name)[:77]}..."
        raise SettingError(
            f"name={shown} cannot be the name of a folder; use up to {_LONGEST} letters, digits, and '-', '_', '.' or "
            "spaces between them, such as name='digits-baseline'"
        )


def _process() -> dict[str, Any]:
    return {"host": platform.node(), "pid": os.getpid()}


def _versions() -> dict[str, str]:
    found = packages()
    known: dict[str, str] = {name: found[name] for name in ("torch", "numpy") if name in found}
    return {"python": platform.python_version(), **known, "loopwright": __version__}


@cache
def packages() -> dict[str, str]:
    """Version of every installed distribution by name, as its folder is named: reading them all takes half a second."""
    found: dict[str, str] = {}
    for folder in filter(Path.is_dir, map(Path, sys.path)):
        for info in sorted([*folder.glob("*-*.dist-info"), *folder.glob("*-*.egg-info")]):
            # torch-2.13.0.dist-info; PyYAML-6.0-py3.11.egg-info, as Debian has it
            parts = info.stem.rsplit("-", 1) if info.suffix == ".dist-info" else info.stem.split("-")
            found.setdefault(parts[0], parts[1])  # the first on the path is the one that is imported
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _environment() -> str:
    """A requirements file that pip can read."""
    return "".join(f"{name}=={number}\n" for name, number in packages().items())


def _yaml(settings: Mapping[str, Any]) -> str:
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return str(yaml.dump(plain(settings), Dumper=dumper, sort_keys=False, allow_unicode=True))


def _standard(value: Any) -> Any:
    """Values as standard JSON has them: numbers that are not finite become text."""
    value = plain(value)
    if isinstance(value, dict):
        return {key: _standard(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_standard(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_record(folder: Any) -> dict[str, Any]:
    """What ``run.json`` in the folder of a run holds, unchecked; empty where it is not there or torn.

    >>> read_record("no run")
    {}
    """
    try:
        record = json.loads(((Path(folder) if isinstance(folder, str) else folder) / "run.json").read_bytes())
    except (OSError, ValueError, RecursionError):  # it was deleted or torn: what is known now is written anew
        return {}
    return record if isinstance(record, dict) else {}


def _write(file: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(_standard(record), indent=1)
    put(file, lambda part: part.write_text(text, encoding="utf-8"))


def put(file: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make the file beside its place, and move it there in one go: nobody sees a half of it.

    >>> put(Path("note.txt"), lambda part: part.write_text("all of it"))
    >>> Path("note.txt").read_text()
    'all of it'
    """
    part = file.with_name(f".{file.name}.writing")
    write(part)
    os.replace(part, file)
