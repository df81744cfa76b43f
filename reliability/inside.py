"""R2 ranks: runs of 1 and 2 ranks, with 0 and 2 workers, killed again and again where a step or a validation is open.

Each rank is a real process that ends itself by SIGKILL with a window of accumulation half done, or a validation; or all
are sent one at a random moment. Started again, the run goes on by itself. In the end weights, and all else that a run
leaves behind, have the bits of a run without a worker that nobody killed; its log is the same file, but for the times.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from loopwright.folder import newest_folder
from reliability.trial import NAME
from reliability.worlds import Ranks, alone_run, await_

SETTINGS: dict[str, Any] = {"steps": 12, "accumulate": 3, "every": 2, "validate": 3, "pause": 0.0002}  # 3, 3, 2 batches
KINDS = [(world, workers) for world in (1, 2) for workers in (0, 2)]
WHERE = {"anywhere": (0, 0), "window": (1, 8), "validation": (1, 4)}  # at which call: all come before the end


def run(count: int, *, places: Sequence[str] = tuple(WHERE), seed: int = 29, say: Any = None) -> dict[str, Any]:
    """``count`` chains: the kinds in turn, each killed in all of ``places``, one after the other."""
    draws, failures, hits = random.Random(seed), dict[str, list[str]](), Counter[str]()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        place, alone = Path(name), dict[int, Any]()
        for number in range(count):
            world, workers = KINDS[number % len(KINDS)]
            if world not in alone:
                digests = alone_run(place / f"alone-{world}", world, **SETTINGS)
                alone[world] = (digests, log_of(place / f"alone-{world}"))
            odd, killed = chain(place / str(number), world, workers, places, draws, alone[world])
            hits += killed
            if odd:
                failures[f"{number}: {world} ranks, {workers} workers"] = odd
            if say is not None:
                say(number, (world, workers), odd)
    return {
        "count": count, "kills": hits.total(), "places": dict(hits), "failures": failures, "seed": seed,
        "kinds": KINDS[:count],
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def chain(
    folder: Path, world: int, workers: int, places: Sequence[str], draws: random.Random, alone: tuple[Any, list[bytes]]
) -> tuple[list[str], Counter[str]]:
    """Start a run, kill it, and so on; let it finish. What differs from ``alone``, and how many kills came where."""
    folder.mkdir()
    digests, log = alone
    killed, odd = Counter[str](), list[str]()
    for where in places:
        (folder / "spoiled").unlink(missing_ok=True)
        dies = None if where == "anywhere" else (where, draws.randint(*WHERE[where]))
        ranks = Ranks("forked", folder, world, dies=dies, workers=workers, **SETTINGS)
        try:
            killed[where] += _killed(ranks, world, where, draws.uniform(0, 0.03))
        finally:
            ranks.kill()
    last = Ranks("forked", folder, world, workers=workers, **SETTINGS)
    code = last.wait(120)
    last.kill()
    result = folder / "result.json"
    odd += [f"the kill in {where!r} did not hit" for where in places if not killed[where]]
    if code != 0 or not result.exists():
        return [*odd, f"it does not go on: {last.text()[-2000:]}"], killed
    found = json.loads(result.read_text())
    odd += [f"other {what}" for what, digest in digests.items() if found[what] != digest]
    lines = log_of(folder)
    apart = [(a, b) for a, b in zip_longest(log, lines) if a != b]
    odd += [f"in the log stands {b!r}, not {a!r}" for a, b in apart[:3]]
    odd += [f"{n} times in the log: {line.decode()}" for line, n in Counter(lines).items() if n > 1]
    return odd, killed


def _killed(ranks: Ranks, world: int, where: str, delay: float) -> bool:
    """True if SIGKILL ended each of the ranks, and where it should."""
    if where == "anywhere":
        if not await_(lambda: all((ranks.folder / f"began-{rank}").exists() for rank in range(world)), 120):
            return False
        time.sleep(delay)
        for pid in ranks.pids():
            os.kill(pid, signal.SIGKILL)
    if ranks.wait(120) is None:
        return False
    codes, _ = json.loads((ranks.folder / "ended").read_text())
    return codes == [-signal.SIGKILL] * world and (where == "anywhere" or (ranks.folder / "spoiled").exists())


def log_of(folder: Path) -> list[bytes]:
    """The lines of the log of a run as they stand in the file, without the times."""
    newest = newest_folder(folder / "runs", NAME)  # one that is killed before its first save begins anew
    assert newest is not None
    log = (newest / "metrics.jsonl").read_bytes()
    return re.sub(rb'"seconds": [^,}]+', b'"seconds": -', log).splitlines(keepends=True)
