"""D1 and D2: a process is killed while it writes a checkpoint.

What is there can be resumed, at most one interval is lost (in the background: and the save under way), and no
half-written file outlives the next start.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from loopwright.checkpoint import list_checkpoints
from reliability.jobs import SAVES
from reliability.server import Server
from reliability.trial import NAME

SEED = 3


def run(server: Server, count: int, *, background: bool = False, seed: int = 23, say: Any = None) -> dict[str, Any]:
    """``count`` kills, with keep 1, 2 and 3 in turn. ``background``: with ``async_save``."""
    draws, failures, orphans, inside, began = random.Random(seed), dict[int, list[str]](), 0, 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        jobs = {"background": background, "job": "saving"}
        result = place / "alone.json"
        window = _window(server, place, result, background)
        known = json.loads(result.read_text())["digests"]
        for number in range(count):
            keep, nth = 1 + number % 3, draws.randint(1, SAVES - 1)
            root, result = place / f"{number}", place / f"{number}.json"
            # it says something when a save begins and when it returns; the first save is in an empty folder
            while server.run(
                **jobs, kill_after=draws.uniform(0, window), until=2 * nth - 1, root=str(root), seed=SEED, keep=keep,
                result=str(result),
            ) is not None:  # fmt: skip
                root = place / f"{number} {draws.random()}"
            shelf = next((root / NAME).iterdir()) / "checkpoints"
            left = [p.name for p in shelf.glob(".*")] if shelf.exists() else []
            orphans += bool(left)
            steps = [int(p.name.removeprefix("step-")) for p in list_checkpoints(shelf)]
            inside += nth not in steps or bool(left)
            odd = list[str]()
            least = nth - 1 - background  # in the background the save before may still be on its way
            if max(steps, default=0) < least:
                odd.append(f"more than one interval is lost: {steps} after save {nth} had begun")
            odd += _next(server, jobs, root, keep, result, steps, known)
            if odd:
                failures[number] = odd
            if say is not None:
                say(number, odd)
    return {
        "count": count, "kills before the new one was there, or with files of the write left": inside,
        "with leftovers before the next start": orphans, "window ms": round(window * 1e3, 1), "failures": failures,
        "seed": seed, "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def _window(server: Server, place: Path, result: Path, background: bool) -> float:
    """How long to wait at most after a save has begun: the time of a step with a save, 1.2 times, from two runs."""
    times = [
        server.run(
            "saving", root=str(place / f"alone {i}"), seed=SEED, keep=2, background=background, result=str(result)
        )
        for i in range(3)
    ]
    return 1.2 * statistics.median(t for t in times[1:] if t is not None) / (SAVES + 1)


def _next(
    server: Server, jobs: Any, root: Path, keep: int, result: Path, steps: list[int], known: dict[str, str]
) -> list[str]:
    """Start the run again, to its end; what is wrong with that."""
    result.unlink(missing_ok=True)
    try:
        server.run(**jobs, root=str(root), seed=77 if steps else SEED, keep=keep, result=str(result))
    except RuntimeError as error:
        return [str(error)]
    ended = json.loads(result.read_text())
    odd = [f"other {name}" for name, digest in known.items() if ended["digests"][name] != digest]
    if ended["resumed"] != max(steps, default=None):
        odd.append(f"resumed from {ended['resumed']} of {steps}")
    if ended["leftovers"] or ended["at the end"]:
        odd.append(f"left after the next start: {ended['leftovers']}, at the end: {ended['at the end']}")
    if len(list_checkpoints(Path(ended["folder"]) / "checkpoints")) != keep:
        odd.append("other checkpoints at the end than keep says")
    return odd
