"""Run the rows of the reliability table and write the report: ``python -m reliability.run [--quick] [ROW ...]``.

With ``--quick`` a sample of them, which is written elsewhere.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from reliability import cost, damage, hostile, inside, kills, report, resume, saves, signals, worlds
from reliability.server import Server, warm_up
from reliability.variants import EXTRAS, STEPS, VARIANTS

SAMPLE = (1, 31, 32, 33, 50, 64, 95)


def _r1(quick: bool) -> dict[str, Any]:
    steps = SAMPLE if quick else range(1, STEPS)
    rows = resume.every_step(
        {**VARIANTS, **EXTRAS}, steps, say=lambda row: _say(row["variant"], row["count"], row["failures"])
    )
    failures = {f"{row['variant']}, step {step}": odd for row in rows for step, odd in row["failures"].items()}
    shown = [
        {"variant": row["variant"], "count": row["count"], "failed": len(row["failures"]), "seconds": row["seconds"]}
        for row in rows
    ]
    return {
        "count": sum(row["count"] for row in rows), "failures": failures, "variants": shown, "seed": resume.SEED,
        "seconds": sum(row["seconds"] for row in rows),
    }  # fmt: skip


def _served(what: Callable[..., dict[str, Any]], *arguments: Any, **settings: Any) -> dict[str, Any]:
    with Server() as server:
        return what(server, *arguments, **settings)


def _with_torch(what: Callable[[int], dict[str, Any]], count: int) -> dict[str, Any]:
    """In a process that has all that is slow to import, for its forks."""
    warm_up()
    return what(count)


RUN: dict[str, Callable[[bool], dict[str, Any]]] = {
    "R1": _r1,
    "D4": lambda quick: damage.run(0.05 if quick else 1.0),
    "D1": lambda quick: _served(saves.run, 6 if quick else 250),
    "D1 async": lambda quick: _served(saves.run, 6 if quick else 250, background=True),
    "R2": lambda quick: _served(kills.chains, 8 if quick else 200, (1, 1), seed=11),
    "R3": lambda quick: _served(kills.chains, 2 if quick else 50, (3, 10), seed=13),
    "R2 ranks": lambda quick: _with_torch(inside.run, 4 if quick else 40),
    "S": lambda quick: hostile.run(0.03 if quick else 1.0),
    "F1": lambda quick: _served(signals.run, signals.SAMPLE if quick else signals.CASES),
    "F2": lambda quick: _with_torch(worlds.signals, 6 if quick else 60),
    "F3": lambda quick: _with_torch(worlds.faults, 8 if quick else 40),
    "Cost": lambda quick: cost.run(quick=quick),
}


def main(arguments: list[str] | None = None) -> int:
    """Run rows, write the report after each; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"some of {', '.join(RUN)} (default: all)")
    parser.add_argument("--quick", action="store_true", help=f"a sample of each row, to build/{report.QUICK.name} only")
    options = parser.parse_args(arguments)
    if unknown := [row for row in options.rows if row not in RUN]:
        parser.error(f"there is no row {unknown[0]!r}; the rows are {', '.join(RUN)}")
    torch.set_num_threads(1)  # bits depend on it
    failed = 0
    for name in options.rows or RUN:
        began = time.perf_counter()
        found = RUN[name](options.quick)
        found.setdefault("seconds", round(time.perf_counter() - began, 1))
        report.add(name, found, quick=options.quick)
        failed += len(found["failures"])
        _say(name, found["count"], found["failures"])
        if options.quick:
            print(f"  {report.summary(name, found)}", flush=True)
    if options.quick:
        print(f"A sample: it is in {report.QUICK}; reliability.json and docs/reliability.md are as they were.")
    return 1 if failed else 0


def _say(name: str, count: Any, failures: dict[Any, Any]) -> None:
    shown = [f"  {where}: {str(what)[:200]}" for where, what in list(failures.items())[:5]]
    print(f"{name}: {count}, failed: {len(failures)}", *shown, sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
