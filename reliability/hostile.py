"""S: files made by somebody who means harm. Nothing in them runs, every error is ours, time and memory are bounded.

The corpora are those of the suite (``tests/checkpoint/test_hostile.py``); here all of them meet every reader, and
manifests, states and headers are mutated at random besides. Time is CPU time of the process, which other work on the
machine does not add to; memory is what the process has resident at its highest, above what it had before the first.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loopwright.errors import LoopwrightError
from reliability.trial import memory

TESTS = str(Path(__file__).resolve().parents[1] / "tests")
SECONDS, MEGABYTES = 1.0, 200.0  # of CPU time that a read may take; by which all may raise the memory in use
MUTATIONS = 10_000
_JUNK = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"@",
    b"-1",
    b"1e999",
    b"null",
    b"99999999999999999999",
    b"\x00",
    b"\xff",
    b"../",
]


def run(share: float = 1.0, *, seed: int = 31) -> dict[str, Any]:
    """How many attempts there were of each kind, and what went wrong in them."""
    if TESTS not in sys.path:
        sys.path.insert(0, TESTS)
    draws, began = random.Random(seed), time.perf_counter()
    found = Attempts()
    home = os.getcwd()
    with memory() as place:
        os.chdir(place)
        try:
            for kind, attempts in _corpora(draws, share):
                for what, load in attempts:
                    found.of(kind, what, load)
        finally:
            os.chdir(home)
    return {
        "count": sum(found.counts.values()), "kinds": found.counts, "executed": found.executed,
        "failures": found.failures, "slowest, s of CPU time": round(found.slowest, 3), "slowest": found.slow,
        "memory grew by MB": round(found.grew, 1), "largest": found.large, "seed": seed,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def _peak() -> float:
    """The most memory that this process has had resident, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage may tell of the process that started this one
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


class Attempts:
    """Counts what was tried and what it came to."""

    def __init__(self, *, seconds: float = SECONDS, megabytes: float = MEGABYTES) -> None:
        self.counts, self.failures, self.executed = dict[str, int](), dict[str, str](), 0
        self.seconds, self.slowest, self.slow = seconds, 0.0, ""
        self.megabytes, self.grew, self.large = megabytes, 0.0, ""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # what was resident before no longer hides what will be
        self.before = _peak()

    def of(self, kind: str, what: str, load: Callable[[], Any]) -> None:
        """Try ``load``, and note it as a failure if it does what no file may make a reader do."""
        from checkpoint.test_hostile import watched
        from gadgets import MARK

        self.counts[kind] = self.counts.get(kind, 0) + 1
        name, problems = f"{kind}: {what}", list[str]()
        with watched() as events, contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            began = time.process_time()
            try:
                load()
            except LoopwrightError:
                pass
            except BaseException as error:
                problems.append(f"{type(error).__name__}: {str(error)[:200]}")
            took = time.process_time() - began
        if took > self.slowest:
            self.slowest, self.slow = took, name
        if took > self.seconds:
            problems.append(f"took {took:.2f} s of CPU time, more than {self.seconds:g}")
        if (grew := _peak() - self.before) > self.grew:  # a new height: this one has raised it
            self.grew, self.large = grew, name
            if grew > self.megabytes:
                problems.append(f"memory has grown by {grew:.0f} MB, more than {self.megabytes:g}")
        if events or Path(MARK).exists():
            self.executed += 1
            problems.append(f"executed: {events[:3]}")
        if problems:
            self.failures[name] = "; ".join(problems)


def _corpora(draws: random.Random, share: float) -> Iterator[tuple[str, Iterator[tuple[str, Callable[[], Any]]]]]:
    from checkpoint.test_hostile import LOADS, make

    path = make().absolute()
    for load in LOADS.values():  # what reading needs is imported before anything is watched
        load(path)
    yield "malicious pickles", _pickles(path, draws, share)
    yield "names of code", _names(path, draws, share)
    yield "bombs", _bombs(path, draws, share)
    yield "mutated manifests, states and headers", _mutated(path, draws, round(MUTATIONS * share))


def _pickles(path: Path, draws: random.Random, share: float) -> Iterator[tuple[str, Callable[[], Any]]]:
    from checkpoint.test_hostile import FILES, LOADS, forge
    from gadgets import gadgets

    kept = {file: (path / file).read_bytes() for file in FILES}
    for name, data in _some(gadgets(), draws, share):
        for file in FILES:
            for forged in (False, True):
                (path / file).write_bytes(data)
                if forged and file != "manifest.json":
                    forge(path)
                for way in ("read", "list", "show"):
                    yield f"{name} as {file}, {way}", lambda way=way: LOADS[way](path)
                for one, good in kept.items():
                    (path / one).write_bytes(good)


def _names(path: Path, draws: random.Random, share: float) -> Iterator[tuple[str, Callable[[], Any]]]:
    from checkpoint.test_hostile import LOADS, spelled, targets
    from loopwright.checkpoint import decode

    for target in _some(targets(), draws, share):
        for value in spelled(target):
            yield f"{value}", lambda value=value: decode(value, {})
    good = (path / "manifest.json").read_bytes(), (path / "state.json").read_bytes()
    for target in _some(targets(), draws, share / 4):
        for value in spelled(target)[::3]:
            _put(path, "state.json", value)
            for way in ("read", "show"):
                yield f"{value} in a state, {way}", lambda way=way: LOADS[way](path)
        (path / "manifest.json").write_bytes(good[0])
        (path / "state.json").write_bytes(good[1])


def _put(path: Path, file: str, value: Any) -> None:
    from checkpoint.test_hostile import forge

    (path / file).write_text(json.dumps({"a": value}))
    forge(path)


def _bombs(path: Path, draws: random.Random, share: float) -> Iterator[tuple[str, Callable[[], Any]]]:
    from checkpoint.test_hostile import LOADS, STATES, TENSORS, forge

    states = {name: text.encode("utf-8", "surrogateescape") for name, text in STATES.items()}
    for file, bombs in (("model.safetensors", TENSORS), ("state.json", states)):
        kept = (path / file).read_bytes(), (path / "manifest.json").read_bytes()
        for name, data in _some(list(bombs.items()), draws, share):
            (path / file).write_bytes(data)
            forge(path)
            for way in ("read", "verify", "show", "ls of the run"):
                yield f"{name} in {file}, {way}", lambda way=way: LOADS[way](path)
        (path / file).write_bytes(kept[0])
        (path / "manifest.json").write_bytes(kept[1])


def _mutated(path: Path, draws: random.Random, count: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Files with bytes changed, removed, doubled, or replaced by what parsers stumble over; all with good checksums."""
    from checkpoint.test_hostile import LOADS, forge

    files = ("manifest.json", "state.json", "model.safetensors")
    kept = {file.name: file.read_bytes() for file in path.iterdir()}
    for number in range(count):
        name = files[number % len(files)]
        bad = bytearray(kept[name])
        for _ in range(draws.randint(1, 4)):
            at, size = draws.randrange(len(bad) + 1), draws.randint(1, 12)
            bad[at : at + draws.choice([0, size])] = draws.choice(
                [draws.choice(_JUNK), draws.randbytes(size), bad[:size]]
            )
        (path / name).write_bytes(bad)
        with contextlib.suppress(
            ValueError, LookupError, AttributeError, TypeError, RecursionError
        ):  # a manifest that is none
            forge(path)
        way = "read" if number % 4 else draws.choice(["list", "show", "verify"])
        yield f"mutation {number} of {name}, {way}", lambda way=way: LOADS[way](path)
        for file, data in kept.items():
            (path / file).write_bytes(data)


def _some(values: list[Any], draws: random.Random, share: float) -> list[Any]:
    return values if share >= 1 else draws.sample(values, max(1, round(len(values) * share)))
