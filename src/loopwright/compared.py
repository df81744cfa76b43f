"""The resolved settings of a run, then and now: what of the difference decides training, what only measures it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from loopwright.bodies import LENGTHS
from loopwright.data import changes
from loopwright.resolved import OF_TASK

__all__ = ["Differences", "compared", "decisive"]

Path = tuple[str, ...]

_ELSEWHERE = {  # of the Trainer: how long, where and how watched; what is told by stage, or among the conditions
    "epochs", "steps", "time", "accumulate", "clip_norm", "validate_every", "device", "devices", "nodes", "strategy",
    "loggers", "progress", "folder", "name", "checkpoint", "capsule", "log_every", "debug", "key", "handlers",
    "reads", "resumed_from",
}  # fmt: skip
_HELD = {"state", "attributes", "recorded"}  # in checkpoints; not said by anyone; only looked at
_SPEED = {  # of a loader: how fast, not what
    "workers", "num_workers", "prefetch", "prefetch_factor", "persistent_workers", "pin_memory", "pin_memory_device",
    "timeout", "multiprocessing_context", "generator", "cut",
}  # fmt: skip
_NAMED = {"layers", "metrics", "models", "optimizers", "phases", "valid"}  # their keys are names: one may come or go
_PLACE = re.compile(r"~|\.{0,2}[/\\]|[A-Za-z]:[/\\]|\w+://")  # how the name of a file or folder begins


class Differences(NamedTuple):
    """In words, what ``decides`` the bits of training, what only ``measures`` them, and the ``rest``."""

    decides: list[str]
    measures: list[str]
    rest: list[str]


def compared(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    """How the settings ``now`` differ from those ``saved``, both as ``resolved`` tells them.

    Callbacks decide where they say that they change something. Validation data and metrics only measure, unless a
    schedule goes by them. A setting that one of the two does not know at all, since it came with another version, is
    not compared; nor are the names of files and folders, whose content tells.

    >>> compared({"epochs": 1, "nonfinite": "raise"}, {"epochs": 2, "nonfinite": None})
    Differences(decides=["nonfinite was 'raise' and is None"], measures=[], rest=['epochs was 1 and is 2'])
    """
    found = Differences([], [], [])
    judged = any(
        str(one.get("monitor")).startswith("valid") for stage in now.get("stages", {}).values()
        for one in _schedules(stage)
    )  # fmt: skip
    for path, told in _changes(_deciding(saved), _deciding(now), ()):
        kind = 2 if path[0] == "metrics" and told.endswith(" is new") else _kind(path)
        found[0 if kind == 1 and judged else kind].append(told)
    found.rest.extend(told for _, told in _changes(_watching(saved), _watching(now), ()))
    return found


def decisive(settings: Mapping[str, Any], *, measured: bool = False) -> Iterator[str]:
    """Those of the settings that decide the bits of training, as ``compared`` has it; what measures, if that is asked.

    >>> list(decisive({"epochs": 1, "nonfinite": "raise", "metrics": {"top": 1}}))
    ["nonfinite='raise'"]
    """
    for path, value in _leaves(settings, ()):
        if _kind(path) <= measured:
            yield f"{'/'.join(path)}={_less_address(repr(value))}"


def _leaves(settings: Mapping[str, Any], path: Path) -> Iterator[tuple[Path, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _kind(path: Path) -> int:
    """Which of the three a difference at ``path`` belongs to, by number."""
    first, inner = path[0], path[2:]
    if first in _ELSEWHERE or (first == "task" and ({*path[1:2]} & (OF_TASK | _HELD) or path[-1] in LENGTHS)):
        return 2
    if first == "stages" and inner:
        if inner[0] in ("until", "reuse", "validate_every") or (inner[0] == "data" and _SPEED & set(inner)):
            return 2
        if inner[0] == "valid":
            return 2 if _SPEED & set(inner) else 1
    if first in ("data_module", "torch") and (_SPEED | {"threads"}) & set(path):
        return 2
    return 1 if first == "metrics" else 0


def _schedules(stage: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for phase in stage.get("phases", {}).values():
        yield from (one for one in phase.get("schedules", ()) if isinstance(one, Mapping))


def _deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` with only those callbacks that change something."""
    stages = {name: _less(stage) for name, stage in settings.get("stages", {}).items()}
    return {**_less(settings), "stages": stages}


def _watching(settings: Mapping[str, Any]) -> dict[str, Any]:
    listed = [one for one in settings.get("callbacks", ()) if not one.get("changes")]
    return {"callbacks that watch": listed} if "callbacks" in settings else {}


def _less(held: Mapping[str, Any]) -> dict[str, Any]:
    callbacks = [one for one in held.get("callbacks", ()) if one.get("changes")]
    return {**held, "callbacks": callbacks} if "callbacks" in held else dict(held)


def _changes(saved: Any, now: Any, path: Path) -> Iterator[tuple[Path, str]]:
    where = "/".join(path)
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        if path[-1:] == ("fingerprint",):
            yield from ((path, told) for told in changes(saved, now, f"the data of {'/'.join(path[:-1])}"))
        elif not _same(saved.get("class"), now.get("class")):
            yield path, f"{where} was {_shown(saved)} and is {_shown(now)}"
        else:
            for name in dict.fromkeys((*saved, *now)):
                if name in saved and name in now:
                    yield from _changes(saved[name], now[name], (*path, name))
                elif path and path[-1] in _NAMED:
                    yield (*path, name), f"{where}/{name} {'is gone' if name in saved else 'is new'}"
    elif isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now) and any(map(_is_dict, now)):
        for i, (was, one) in enumerate(zip(saved, now, strict=True)):
            if path[-1] != "schedules" or _is_dict(was):  # the first release told schedules as text
                yield from _changes(was, one, (*path, str(i)))
    elif not _same(saved, now):
        yield path, f"{where} was {_shown(saved)} and is {_shown(now)}"


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping)


def _same(was: Any, now: Any) -> bool:
    if isinstance(was, list) and isinstance(now, list):
        return len(was) == len(now) and all(map(_same, was, now))
    if isinstance(was, str) and isinstance(now, str):
        places = _PLACE.match(was) and _PLACE.match(now)
        return bool(places) or _less_address(was) == _less_address(now) or _is_main(was, now)
    none = all(one is None or one is False for one in (was, now))
    return none or bool(was == now) or repr(was) == repr(now)  # nan is nan


def _is_main(was: str, now: str) -> bool:
    """True for a class of one name, of a module that was imported and of the same one run as the main program."""
    names = [re.fullmatch(r"<(.+)\.([^.<>]+)>", one) for one in (was, now)]
    modules, last = zip(*(name.groups() for name in names if name), strict=True) if all(names) else ((), ())
    return "__main__" in modules and last[0] == last[1]


def _less_address(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _shown(value: Any) -> str:
    """A value as a message has it: an object by its class, an array in short."""
    if isinstance(value, Mapping):
        told = f"{{{', '.join(f'{name}: {_shown(one)}' for name, one in value.items())}}}"
        return str(value["class"]) if "class" in value else told if len(told) <= 100 else f"{told[:97]}..."
    if isinstance(value, list) and any(map(_is_dict, value)):
        return f"[{', '.join(map(_shown, value))}]"
    text = str(value) if isinstance(value, str) and value.startswith("<") else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
