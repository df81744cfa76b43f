"""Fair timing on a machine that other work shares, and the tables that come of it.

The contenders of a round train side by side in one process, each in a thread of its own, of which only one runs at a
time: after every few epochs (a *lap*) it stops and hands over to the next, in an order that is rotated. A machine that
runs slower for a second therefore slows down all of them. The ratio of two contenders is that of the sums of their laps
in one round; what is reported is the median over the rounds. Sums, not medians, inside a round: what happens rarely (a
record, the bar, a fold of held values) is in them. Each contender sees its own state of the random generators.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
EndOfEpoch = Callable[[], None]
Prepare = Callable[[int, EndOfEpoch], Callable[[], nn.Module]]
"""``prepare(epochs, end_of_epoch)`` makes all that the clock should not see and returns the run to be timed, which
calls ``end_of_epoch()`` after each epoch and returns the trained module."""


class Lane(threading.Thread):
    """One contender of a round. It runs only between a call of ``go`` and its next lap.

    The first lap is one epoch, so that what a run costs once stands out; every later one is ``chunk`` epochs.
    """

    def __init__(self, prepare: Prepare, laps: int, chunk: int, clock: Callable[[], float]):
        super().__init__(daemon=True)
        self.prepare, self.chunk, self.clock, self.epochs = prepare, chunk, clock, 1 + laps * chunk
        self.turn, self.back, self.error = threading.Semaphore(0), threading.Semaphore(0), None
        self.laps: list[float] = []
        self.ended, self.started, self.tail, self.done = 0, 0.0, 0.0, False

    def go(self) -> None:
        if not self.ident:
            self.start()
        self.turn.release()
        self.back.acquire()
        if self.error:
            raise self.error

    def run(self) -> None:
        self.turn.acquire()
        torch.set_num_threads(1)
        try:
            train = self.prepare(self.epochs, self.end_of_epoch)
            self.started = self.clock()
            module = train()
            self.tail = self.clock() - self.started
            self.weights = [parameter.detach().clone() for parameter in module.parameters()]
        except BaseException as error:
            self.error = error
        self.done = True
        self.back.release()

    def end_of_epoch(self) -> None:
        self.ended += 1
        if (self.ended - 1) % self.chunk:
            return
        self.laps.append(self.clock() - self.started)
        state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
        self.back.release()
        self.turn.acquire()
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        numpy.random.set_state(state[2])
        self.started = self.clock()


def by_hand(
    net: nn.Module, loss_of: Callable[..., Any], optimizer: Any, batches: Any, epochs: int, end_of_epoch: EndOfEpoch
) -> Callable[[], nn.Module]:
    """The run of the loop that people write, which all others are compared with."""

    def go() -> nn.Module:
        for _ in range(epochs):
            for inputs, target in batches:
                optimizer.zero_grad()
                loss = loss_of(net(inputs), target)
                loss.backward()
                optimizer.step()
            end_of_epoch()
        return net

    return go


@dataclass(frozen=True)
class Timing:
    """One contender in one round: seconds of an epoch (mean, and in the fastest lap) and of what comes once."""

    epoch_s: float
    best_s: float
    fixed_s: float


@dataclass
class Results:
    """All rounds of all contenders, and the weights with which each ended its first round."""

    steps_per_epoch: int
    rounds: list[dict[str, Timing]] = field(default_factory=list)
    weights: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def step_us(self, name: str) -> float:
        return statistics.median(timings[name].epoch_s for timings in self.rounds) / self.steps_per_epoch * 1e6

    def fixed_ms(self, name: str) -> float:
        return statistics.median(timings[name].fixed_s for timings in self.rounds) * 1e3

    def ratios(self, name: str, to: str) -> list[float]:
        return sorted(timings[name].epoch_s / timings[to].epoch_s for timings in self.rounds)

    def ratio(self, name: str, to: str) -> float:
        return statistics.median(self.ratios(name, to))

    def best_ratio(self, name: str, to: str) -> float:
        """Of the fastest laps of all rounds: steady where other work disturbs, blind to what a lap can be without."""
        return min(timings[name].best_s for timings in self.rounds) / min(timings[to].best_s for timings in self.rounds)

    def extra_us(self, name: str, over: str) -> float:
        """Microseconds a step more than the other, the median over the rounds."""
        return statistics.median(t[name].epoch_s - t[over].epoch_s for t in self.rounds) / self.steps_per_epoch * 1e6

    def spread_us(self, name: str, over: str, parts: int = 1) -> str:
        share = 1e6 / self.steps_per_epoch / parts
        low, high = middle_half([(t[name].epoch_s - t[over].epoch_s) * share for t in self.rounds])
        return f"middle half {low:.1f} to {high:.1f}"

    def same_bits(self, name: str, as_: str) -> bool:
        return all(map(torch.equal, self.weights[name], self.weights[as_]))


def middle_half(values: list[float]) -> tuple[float, float]:
    ordered, quarter = sorted(values), len(values) // 4
    return ordered[quarter], ordered[-1 - quarter]


def race(
    contenders: dict[str, Prepare],
    *,
    laps: int,
    chunk: int,
    steps_per_epoch: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Results:
    """Train all contenders side by side, ``rounds`` times. A short round more is run first and thrown away: first calls
    import, allocate and prove things.
    """
    results, names = Results(steps_per_epoch), list(contenders)
    for count in range(-1, rounds):
        length = laps if count >= 0 else 1
        lanes = {name: Lane(contenders[name], length, chunk, clock) for name in names}
        gc.collect()
        for lap in range(length + 2):
            shift = (lap + count) % len(names)
            for name in names[shift:] + names[:shift]:
                lanes[name].go()
        assert all(lane.done and len(lane.laps) == length + 1 for lane in lanes.values())
        if count < 0:
            continue
        timings = {}
        for name, lane in lanes.items():
            epoch = sum(lane.laps[1:]) / (length * chunk)
            timings[name] = Timing(epoch, min(lane.laps[1:]) / chunk, lane.laps[0] - epoch + lane.tail)
            results.weights.setdefault(name, lane.weights)
        results.rounds.append(timings)
    return results


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Standard output and error become a real terminal that another process empties, so that progress bars do draw."""
    master, slave = os.openpty()
    drain = subprocess.Popen(["cat"], stdin=master, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(master)
    kept = sys.stdout, sys.stderr
    with open(slave, "w", buffering=1, encoding="utf-8", errors="replace") as screen:
        sys.stdout = sys.stderr = screen
        try:
            yield
        finally:
            sys.stdout, sys.stderr = kept
    drain.wait()  # nothing is left to read, so it ends


@dataclass(frozen=True)
class Goal:
    """One line of the goal table. ``limit`` None: measured, but nothing was promised. ``value`` None: no such cost."""

    what: str
    value: float | None
    unit: str = ""
    limit: float | None = None
    note: str = ""

    @property
    def share(self) -> float:
        if self.limit is None or self.value is None:
            return -1.0
        return self.value / self.limit if self.limit else self.value

    def row(self) -> list[str]:
        if self.value is None:
            return [self.what, "not called in a step", "", "", self.note]
        promised = "" if self.limit is None else f"<= {self.limit:g}"
        verdict = "" if self.limit is None else "pass" if self.value <= self.limit else "**FAIL**"
        return [self.what, f"{self.value:.4g} {self.unit}".strip(), promised, verdict, self.note]


def goal_table(goals: list[Goal]) -> str:
    """The goals, those that are nearest to failing (or have failed) first; lines without a goal last."""
    ordered = sorted(goals, key=lambda goal: -goal.share)
    return table(["what", "measured", "goal", "", "note"], [goal.row() for goal in ordered])


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up in plain text too."""
    widths = [max(len(str(line[i])) for line in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(str(c).ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def machine() -> str:
    """The machine in words: processor, cores, versions. No names of hosts."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        model = found.group(1) if found else model
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "?"
    return (
        f"{model}, {os.cpu_count()} cores (load {load} at the end), Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} thread"
    )


def write_section(path: Path, name: str, text: str) -> None:
    """Put ``text`` in its own marked section of a Markdown page, and leave the other sections as they are."""
    begin, end = f"<!-- {name}: written by benchmarks/{name}.py -->", f"<!-- end of {name} -->"
    page = path.read_text() if path.exists() else "# Benchmarks\n"
    section = f"{begin}\n\n{text.strip()}\n\n{end}"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    if re.search(pattern, page, re.S):
        page = re.sub(pattern, lambda _: section, page, flags=re.S)
    else:
        page = page.rstrip() + "\n\n" + section + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)


def in_text(title: str, about: str, lines: list[str]) -> str:
    """A section of a page whose table is set in plain text."""
    table = "\n".join(lines)
    return f"## {title}\n\nMachine: {machine()}.\n{about}\n\n```text\n{table}\n```"


def arguments(description: str, **defaults: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small runs: shows that all works, its numbers are rough")
    parser.add_argument("--rounds", type=int, default=None, help=f"rounds (default {defaults['rounds']}, quick 3)")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: time of this process only, steadier where others work (blind to waiting for disks)",
    )
    parser.add_argument(
        "--write",
        nargs="?",
        type=Path,
        const=PAGE,
        default=None,
        metavar="PAGE",
        help="put the tables on this page (default docs/benchmarks.md)",
    )
    return parser


def clock_of(options: argparse.Namespace) -> Callable[[], float]:
    return time.perf_counter if options.clock == "wall" else time.process_time
