"""What trackers make of a run: the points of a record, a config as flat parameters, the name to file it under."""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from loopwright.state import Run

__all__ = ["flat", "needs", "points", "run_label", "run_name"]

_MOST = 500  # parameters of a config; one that is larger is in the files of the run


def points(values: Mapping[str, float], kind: str) -> dict[str, float]:
    """The values of a record by the name of the curve that they belong to, of which each has one value a step.

    Means over an epoch are curves of their own; its validation and learning rates were in records before.

    >>> points({"train/loss": 0.5, "valid/loss": 0.6, "lr": 0.1}, "epoch")
    {'epoch/train/loss': 0.5}
    """
    if kind != "epoch":
        return dict(values)
    return {f"epoch/{name}": value for name, value in values.items() if name.startswith("train/")}


def flat(config: Any, name: str = "") -> dict[str, Any]:
    """Nested plain data as one dict, at most 500 entries of it.

    >>> flat({"stages": {"main": {"until": ["10 epochs"]}}, "seed": None})
    {'stages.main.until.0': '10 epochs', 'seed': None}
    """
    found: dict[str, Any] = {}
    for key, value in _leaves(config, name):
        if len(found) == _MOST:
            break
        found[key] = value
    return found


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (dict, list)) and value:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(part, f"{name}.{key}" if name else str(key))
    elif not isinstance(value, (dict, list)):
        yield name, value


def run_name(run: Run) -> tuple[str, str]:
    """The name of a run and what tells it from others of that name: ``("digits", "20261121-101500-1a2b3c")``.

    They are those of its folder, so that a resumed run has them again; without a folder the second one is empty.

    >>> import loopwright as lw
    >>> trainer = lw.Trainer(epochs=1, folder=None, name="digits", progress=False)
    >>> run_name(trainer.run(lambda run, batch: None, [1]))
    ('digits', '')
    """
    if run.folder is not None:
        return run.folder.parent.name or "runs", run.folder.name
    return run.settings.get("name") or type(run.task).__name__, ""


def run_label(run: Run, before: str = "") -> str:
    """What tells a run from all others in one file: ``digits/20261121-101500-1a2b3c``, the end of its folder.

    A run without a folder gets such an end of its own; one that goes on keeps ``before``, which it had until then.
    """
    name, own = run_name(run)
    if not own and before and run.progress.step:
        return before
    return f"{name}/{own or f'{datetime.datetime.now().astimezone():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}'}"


def needs(package: str, extra: str, logger: str) -> None:
    """Raise ImportError that tells what to install if ``package``, on which ``logger`` stands, is missing."""
    if find_spec(package) is None:
        raise ImportError(f'{logger} needs {package}: pip install "loopwright[{extra}]"')
