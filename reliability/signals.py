"""F1: real processes that are sent a real signal in a chosen phase of training, and what must then be true of each.

It goes to the whole process group, as from a terminal. The exit status is that of the signal. The newest checkpoint is
whole and stands where the run stopped; after the signal at most one step ended and at most one save began. A fit that
goes on from there ends as one that was left alone.
"""

from __future__ import annotations

import json
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopwright.checkpoint import list_checkpoints, read
from reliability.phases import PHASES
from reliability.server import Server
from reliability.trial import NAME

SIGNALS = {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: 143, signal.SIGUSR1: 138}  # a shell shows the first as 130
NTH = (5, 1, 2, 4, 7)  # the call of the phase that waits, in one repeat after the other
CASES = [(number, phase, nth) for nth in NTH for number in SIGNALS for phase in PHASES]
SAMPLE = [(list(SIGNALS)[i % 3], phase, NTH[i % 5]) for i, phase in enumerate(PHASES)]
LIMIT_S = 5.0  # a process that takes longer hangs, however busy the machine is: a step and a save take milliseconds


Case = tuple[signal.Signals, str, int]


@dataclass
class Outcome:
    """What came of one signal; ``problems`` is empty if all was as it must be."""

    signal: str
    phase: str
    nth: int
    seconds: float = 0.0  # from the signal until fit had saved and was left
    problems: list[str] = field(default_factory=list)


def run(server: Server, cases: Sequence[Case] = CASES, *, say: Any = None) -> dict[str, Any]:
    """Go through ``cases``, one after the other."""
    outcomes, began = list[Outcome](), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        expected = {workers: _alone(server, workers, place) for workers in (0, 1)}
        for number, case in enumerate(cases):
            outcomes.append(signalled(server, *case, place / f"{number}", expected))
            if say is not None:
                say(outcomes[-1])
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    return {
        "count": len(outcomes),
        "failures": {f"{o.signal} in {o.phase}, call {o.nth}": o.problems for o in outcomes if o.problems},
        "ms from the signal until saved and left, median": round(statistics.median(o.seconds for o in outcomes) * 1e3),
        "slowest": f"{slowest.seconds * 1e3:.0f} ms, {slowest.signal} in {slowest.phase}",
        "seconds": round(time.perf_counter() - began, 1),
    }


def signalled(
    server: Server, number: signal.Signals, phase: str, nth: int, place: Path, expected: dict[int, Any]
) -> Outcome:
    """Send ``number`` to a new process in call ``nth`` of ``phase``, look at what it leaves in ``place``, and go on.

    ``expected``: the digests of a run that was left alone, by number of workers.
    """
    place.mkdir()
    outcome, workers, result = Outcome(number.name, phase, nth), _workers(phase), place / "result.json"
    job: dict[str, Any] = {"folder": str(place), "workers": workers, "result": str(result), "nth": nth}
    if phase == "resuming":
        server.interrupt("waits", signal.SIGTERM, **job, phase="callback")
        job["resume"] = "auto"
    code, sent, text = server.interrupt("waits", number, **job, phase=phase)
    outcome.problems += _ended(code, time.monotonic() - sent, SIGNALS[number], text)
    if not result.exists():
        return outcome
    times = json.loads(result.read_text())
    outcome.seconds = times["left"] - sent
    late = {name: sum(1 for moment in times[name] if moment > sent) for name in ("steps ended", "saves begun")}
    outcome.problems += [f"{count} {name} after the signal" for name, count in late.items() if count > 1]
    outcome.problems += _left(place / NAME, "done" if phase == "teardown" else "interrupted")
    try:
        server.run("waits", **job | {"resume": "auto"}, phase="none")
    except RuntimeError as error:
        outcome.problems.append(str(error))
    else:
        found = json.loads(result.read_text())["digests"]
        odd = [name for name, digest in expected[workers].items() if found[name] != digest]
        outcome.problems += [f"gone on, it ends with other {', '.join(odd)} than a run left alone"] if odd else []
    return outcome


def _ended(code: int, seconds: float, expected: int, text: str) -> list[str]:
    problems = [] if code == expected else [f"left with {code}, not {expected}: {text[-1500:]}"]
    return problems + ([f"left {seconds:.1f} s after the signal"] if seconds > LIMIT_S else [])


def _left(folder: Path, expected: str) -> list[str]:
    """What is wrong with the folder of a run that was stopped."""
    (file,) = folder.glob("*/run.json")
    record = json.loads(file.read_text())
    problems = [] if record["status"] == expected else [f"status {record['status']!r}, not {expected!r}"]
    checkpoints, stopped = list_checkpoints(file.parent / "checkpoints"), record["progress"]["step"]
    saved = read(checkpoints[-1]).info["step"] if checkpoints else None
    if saved != stopped:
        problems.append(f"the newest checkpoint is of step {saved}, and the run stopped after step {stopped}")
    return problems


def _alone(server: Server, workers: int, place: Path) -> dict[str, str]:
    """The digests of a run that nothing disturbs."""
    result = place / f"{workers}.json"
    folder = place / f"alone {workers}"
    server.run("waits", folder=str(folder), phase="none", nth=0, workers=workers, result=str(result))
    digests: dict[str, str] = json.loads(result.read_text())["digests"]
    return digests


def _workers(phase: str) -> int:
    return 1 if phase == "fetch" else 0  # a signal to the group reaches the worker as well
