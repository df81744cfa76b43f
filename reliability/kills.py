"""R2 and R3: real processes, killed at random moments, once or many times over.

The bits at the end are those of the run that nobody killed.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loopwright.checkpoint import list_checkpoints
from loopwright.folder import newest_folder
from reliability.server import Server
from reliability.trial import NAME, memory

SEED = 3
KILLED = (
    "dropout and batch norm",
    "augmentation, 2 workers",
    "accumulation 4, killed inside a window",
    "two optimizers",
    "sharded stream",
    "weighted sampler",
    "validation inside epochs",
    "early stop",
)
INTERVALS = ("1 steps", "3 steps", "7 steps", "1 epoch")


def chains(
    server: Server, count: int, kills: tuple[int, int], *, seed: int, names: Sequence[str] = KILLED, say: Any = None
) -> dict[str, Any]:
    """``count`` runs, each killed as often as ``kills`` (least, most) says, and then left to finish."""
    draws, failures, killed, moments = random.Random(seed), dict[int, list[str]](), 0, dict[str, int]()
    began = time.perf_counter()
    known: dict[str, dict[str, Any]] = {name: {} for name in names}
    with memory() as place:
        for number in range(count):
            name = names[number % len(names)]
            every, often, own = draws.choice(INTERVALS), draws.randint(*kills), Path(place) / str(number)
            if every not in known[name]:
                known[name][every] = _alone(server, name, every, Path(place))
            odd, times = _chain(server, name, every, known[name][every], draws, often, own)
            killed += sum(times.values())
            for moment, n in times.items():
                moments[moment] = moments.get(moment, 0) + n
            if odd:
                failures[number] = [name, *odd]
            if say is not None:
                say(number, name, odd)
    return {
        "count": count, "kills": killed, "moments": moments, "failures": failures, "seed": seed,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def _alone(server: Server, name: str, every: str, place: Path) -> dict[str, Any]:
    """What the run comes to that is never killed, and how long it takes."""
    result = place / f"{name} {every}.json"
    seconds = server.run(
        "variant", name=name, root=str(place / f"{name} {every}"), seed=SEED, every=every, keep=2, result=str(result)
    )
    found: dict[str, Any] = json.loads(result.read_text())
    return {**found, "seconds": seconds}


def _chain(
    server: Server, name: str, every: str, known: dict[str, Any], draws: random.Random, kills: int, place: Path
) -> tuple[list[str], dict[str, int]]:
    """Kill a run ``kills`` times and let it finish; what differs, and how many kills came when."""
    root, result = place / "runs", place / "result.json"
    place.mkdir()
    keep, moments, length = draws.randint(1, 3), dict[str, int](), known["seconds"]
    for attempt in range(40 * kills):
        if sum(moments.values()) == kills:
            break
        begun = _saved(root)
        early = kills > 1 and draws.random() < 0.4  # while it starts, or while it resumes
        after = draws.uniform(0, 0.05 if early else length if kills == 1 else length / 2)
        ended = server.run(
            "variant", kill_after=after, name=name, root=str(root), every=every, keep=keep, result=str(result),
            seed=100 * attempt + 7 if begun else SEED,
        )  # fmt: skip
        if ended is not None:  # it was done before the kill: nothing was tried
            if moments:
                break
            root = place / f"again {attempt}"
            continue
        now = _saved(root)
        moment = "before its first checkpoint" if not now else "while it resumed" if now == begun else "later"
        moments[moment] = moments.get(moment, 0) + 1
    if not moments:
        return ["no kill has hit"], moments
    result.unlink(missing_ok=True)
    try:
        server.run(
            "variant", name=name, root=str(root), seed=99 if _saved(root) else SEED, every=every, keep=keep,
            result=str(result),
        )  # fmt: skip
    except RuntimeError as error:
        return [str(error)], moments
    ended = json.loads(result.read_text())
    odd = [what for what, digest in known["digests"].items() if ended["digests"].get(what) != digest]
    batches = ended["batches"]
    if batches and known["batches"][-len(batches) :] != batches:
        odd.append("other batches, or another order")
    return odd, moments


def _saved(root: Path) -> list[str]:
    """Names of the checkpoints of the newest run: without any, a start begins anew and needs the seed of the script."""
    run = newest_folder(root, NAME)
    return [path.name for path in list_checkpoints(run / "checkpoints")] if run is not None else []
