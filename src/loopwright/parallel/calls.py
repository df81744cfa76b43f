"""What this rank has called of the others, as torch has noted it, and where the ranks' calls do not match."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import prod
from typing import Any, NamedTuple

from loopwright._compat import recorded_collectives
from loopwright.parallel.standing import Line, place_at

__all__ = ["Call", "clash", "last_calls"]

_GROUPS = {"default_pg": "the default group", "loopwright": "Loopwright's group"}  # all ranks are in them
# in which all ranks send alike, or receive alike; of the others (gather, scatter, all_to_all) only the name must agree
_ALIKE = ("all_reduce", "broadcast", "reduce", "all_gather", "reduce_scatter", "barrier")
_TOLD = 24  # calls of a rank in each group


class Call(NamedTuple):
    """A collective that a rank has called: ``number`` counts those of its group; ``key`` must agree on all ranks."""

    group: str
    number: int
    key: str
    what: str
    place: str

    def __str__(self) -> str:
        return f"{self.what}, {self.place}"


def last_calls() -> list[Call]:
    """The last collectives that this process has called, those of a group oldest first; of groups of all ranks.

    torch notes every one in C++, those of the user and of DistributedDataParallel too: its name, its shapes and the
    Python lines it came from. To read the notes takes up to 0.2 s: for when something is wrong.
    """
    by_group: dict[str, list[Mapping[str, Any]]] = {name: [] for name in _GROUPS}
    for entry in recorded_collectives():
        name = entry["process_group"][1]
        if name in by_group and not entry["is_p2p"]:
            by_group[name].append(entry)
    return [_call(entry) for made in by_group.values() for entry in made[-_TOLD:]]


def _call(entry: Mapping[str, Any]) -> Call:
    backend, _, name = entry["profiling_name"].partition(":")
    sizes, dtypes = entry["input_sizes"], entry["input_dtypes"]
    counts = [prod(size) for size in sizes] if name in _ALIKE else []
    shapes = ", ".join(f"{dtype.lower()}{size}" for size, dtype in zip(sizes, dtypes, strict=False))
    lines = [Line(frame["filename"], frame["line"], frame["name"]) for frame in entry["frames"]]
    return Call(
        f"{entry['process_group'][1]} {backend}",
        entry["collective_seq_id"],
        f"{name} {counts} {dtypes if counts else ''}",
        f"{name}({shapes})",
        place_at(lines),
    )


def clash(calls: Mapping[int, Sequence[Call]]) -> tuple[str, dict[int, str]] | None:
    """Where the calls of the ranks do not match: in words, and the call of each rank there; None if they do.

    All ranks must make the same calls in a group, and those of both groups in one order. So it is wrong if the call of
    one number is another one on another rank, and if each of two ranks has made a call that the other has not.

    >>> mine = Call("default_pg gloo", 7, "all_reduce [3]", "all_reduce(float[3])", "train.py:41 in step")
    >>> clash({0: [mine], 1: [mine]})
    >>> text, by_rank = clash({0: [mine], 1: [mine._replace(key="all_reduce [4]", what="all_reduce(float[4])")]})
    >>> text, by_rank[1]
    ('call 7 of the default group', 'all_reduce(float[4]), train.py:41 in step')
    """
    numbered = {rank: {(call.group, call.number): call for call in made} for rank, made in calls.items()}
    for place in sorted(_shared(numbered), key=lambda place: place[1]):
        here = {rank: made[place] for rank, made in numbered.items() if place in made}
        if len({call.key for call in here.values()}) > 1:
            group = _GROUPS[place[0].partition(" ")[0]]
            return f"call {place[1]} of {group}", {rank: str(call) for rank, call in here.items()}
    for (one, mine), (other, theirs) in combinations(numbered.items(), 2):
        lacks, has = _first_missing(mine, theirs), _first_missing(theirs, mine)
        if lacks is not None and has is not None:
            return "each waits for a call that the other has not made", {one: str(has), other: str(lacks)}
    return None


def _shared(numbered: Mapping[int, Mapping[tuple[str, int], Call]]) -> Iterator[tuple[str, int]]:
    seen: set[tuple[str, int]] = set()
    for made in numbered.values():
        yield from seen & made.keys()
        seen |= made.keys()


def _first_missing(mine: Mapping[tuple[str, int], Call], theirs: Mapping[tuple[str, int], Call]) -> Call | None:
    """The first of their calls that goes beyond all of mine in its group."""
    if not mine or not theirs:
        return None
    newest: dict[str, int] = {}
    for group, number in mine:
        newest[group] = max(number, newest.get(group, 0))
    return next((call for (group, number), call in theirs.items() if number > newest.get(group, number)), None)
