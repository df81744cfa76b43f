"""What an older version of Loopwright wrote, as this one would have written it.

Each format number has one step to the next: pure functions of plain data, for the manifest (as JSON has it) and for
the state (decoded). A change of the layout of a checkpoint raises ``FORMAT``, adds a step here and, at the release,
a folder to ``tests/golden``; steps and golden files stay for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["FORMAT", "migrate_manifest", "migrate_state"]

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Step:
    """From one format to the next; what did not change is handed on as it is."""

    manifest: Callable[[dict[str, Any]], dict[str, Any]] = lambda manifest: manifest
    state: Callable[[Any], Any] = lambda state: state


def _say_what_is_unknown(manifest: dict[str, Any]) -> dict[str, Any]:
    info = manifest["info"]
    reason = "it has format 0, which does not say with which settings and on which hardware it was written"
    exact = info["exact"] if isinstance(info["exact"], list) else []
    return {**manifest, "info": {**info, "exact": [reason, *exact]}}


def _add_recipe(state: Any) -> Any:
    """A run that had ended noted where another stage would begin; now it notes where the last one began."""
    start = state["stage_start"]
    if state["stage"].get("index") == 0 and start["stage"] == 1:
        start = dict.fromkeys(start, 0) | {"phase_steps": {}}
    unknown = {"recipe": {"key": None}, "conditions": {}, "data": {"fingerprint": None, "schema": None}}
    ended = state["progress"]["stage"] > state["stage"].get("index", 0)
    return {**state, "stage_start": start, "stop_reason": None, "ended": ended, **unknown}


STEPS: dict[int, Step] = {
    0: Step(manifest=_say_what_is_unknown, state=_add_recipe),
}


def migrate_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest in the layout of today; its ``format`` still says what was written."""
    written = manifest["format"]
    for number in range(written, FORMAT):
        manifest = STEPS[number].manifest(manifest)
    return {**manifest, "format": written}


def migrate_state(state: Any, written: int) -> Any:
    """The decoded state of a checkpoint whose manifest has format ``written``, in the layout of today."""
    for number in range(written, FORMAT):
        state = STEPS[number].state(state)
    return state
