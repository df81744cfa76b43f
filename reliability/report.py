"""The results as ``reliability.json`` for programs and as ``docs/reliability.md`` for people."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import loopwright

ROOT = Path(__file__).resolve().parents[1]
JSON, PAGE = ROOT / "reliability.json", ROOT / "docs" / "reliability.md"
# what a row is called, what must be so, and the number of the full run
ROWS: dict[str, tuple[str, str, int]] = {
    "R1": (
        "resume after every optimizer step of a run of 96 steps",
        "weights, optimizers, schedulers, random generators, metrics, history, losses of all steps, callbacks, "
        "counters, `metrics.jsonl` (no line twice, none lost) and the ids of all samples (none twice, none missed) "
        "equal in bits those of the run that went on",
        0,
    ),
    "R2": ("SIGKILL at a random moment", "the same, in processes of their own", 200),
    "R3": ("3 to 10 SIGKILLs of one run, also while it resumes and before its first step", "the same", 50),
    "R2 ranks": (
        "SIGKILL of 1 and 2 ranks with 0 and 2 workers, thrice each: at a random moment, with a window of accumulation "
        "half done, inside of a validation",
        "the same as of a run without workers that nobody killed, and `metrics.jsonl` is the same file but for the "
        "times",
        40,
    ),
    "D1": (
        "SIGKILL while a checkpoint is written, keep 1, 2, 3",
        '`resume="auto"` goes on, at most one interval is lost, the bits at the end are the same, and no half-written '
        "file is left after the next start",
        250,
    ),
    "D1 async": ("the same with `async_save=True`", "the same, but for the save that was under way", 250),
    "D4": (
        "bit flips, truncations, zeroed blocks; missing, foreign and swapped files",
        "refused, the file named, the older checkpoint offered, and gone on from with a warning",
        1347,
    ),
    "S": (
        "malicious pickles, names of code, bombs, mutated files, all with valid checksums",
        "nothing executed or imported, errors of ours only, at most a second each",
        0,
    ),
    "F1": (
        "SIGTERM, SIGINT, SIGUSR1 to a process group in nine phases of training, at five moments of each",
        "left with the status of the signal (143, 130, 138); after it at most one step ended and at most one save "
        "began; the newest checkpoint is whole and of the last step; gone on from, all is equal in bits to a run that "
        "was left alone",
        135,
    ),
    "F2": (
        "2 and 4 ranks: SIGTERM, SIGINT, SIGUSR1 to one rank, to all, to `lw.launch`, to torchrun, at a random moment",
        "all ranks gone within 30 s; the newest checkpoint is whole and of the step after which all stopped; gone on "
        "from, all is equal in bits to a run of as many ranks that was left alone",
        60,
    ),
    "F3": (
        "2 and 4 ranks: one raises in each hook, in the forward, backward or its data, is killed, stopped, leaves, "
        "waits in a collective alone, or is slow for 20 s",
        "all ranks gone within 30 s; each says which rank it was, at which step and in which line, and the hook is "
        "named; checkpoints are whole; a rank that is only slow alarms nobody",
        40,
    ),
    "Cost": ("what it costs", "see below", 0),
}
INTRO = """# Reliability

Written by `make reliability`, which runs all of this again (`make reliability ROWS="R1 D4"` some of it, `QUICK=--quick`
a sample). Each number below was counted; none is extrapolated. The whole, with seeds and every failure, is in
`reliability.json`. The suite runs a sample of each row (`tests/test_reliability.py`).
"""
LIMITS = """## What is not covered

On a CPU: no GPU, no mixed precision, no `torch.compile`; all rows but R2 ranks, F2 and F3 with one process. Kills are
kills of the process, not of the machine: what the page cache holds survives them, and no row tells what a power loss
does. R1, R2, R3 and D4 keep their files in memory where there is `/dev/shm`, D1 on the disk of the temporary folder.
R1 takes a new trainer, net (of another seed), data and random state for each resume, in one process; R2, R3, D1 and F1
are processes of their own, forked from one that has imported torch. The nets are small (D1: 8 MB a checkpoint). Equal
bits are promised for the same versions, instructions and number of threads; a resume under others is refused.
"""


def load() -> dict[str, Any]:
    """What earlier runs of the harness have found, by row."""
    return json.loads(JSON.read_text())["rows"] if JSON.exists() else {}


def about(quick: bool) -> dict[str, Any]:
    """Conditions under which a row was run."""
    changed = _git("status", "--porcelain", "--", "src", "reliability")  # not the results, which each row changes
    commit = _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"), "sample": quick, "commit": commit,
        "loopwright": loopwright.__version__, "torch": str(torch.__version__), "numpy": np.__version__,
        "python": platform.python_version(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(), "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def save(rows: dict[str, Any]) -> None:
    """Write both files."""
    JSON.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    PAGE.write_text(page(rows))


def page(rows: dict[str, Any]) -> str:
    """The page for people."""
    table = ["| row | what is done | tried | failed | what must be so |", "|---|---|---|---|---|"]
    for name, (what, rule, full) in ROWS.items():
        if name not in rows:
            table.append(f"| {name} | {what} | not run | | {rule} |")
            continue
        row = rows[name]
        part = f" of {full:,}" if full > row["count"] else ""
        table.append(f"| {name} | {what} | {row['count']:,}{part} | {len(row['failures'])} | {rule} |")
    parts = [INTRO, "\n".join(table), _variants(rows), _details(rows), _costs(rows), _conditions(rows), LIMITS]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _variants(rows: dict[str, Any]) -> str:
    if "R1" not in rows:
        return ""
    lines = [f"| {v['variant']} | {v['count']} | {v['failed']} |" for v in rows["R1"]["variants"]]
    return "\n".join(
        ["## R1 by kind of training", "", "| kind | resumes | not equal in bits |", "|---|---|---|", *lines]
    )


def _details(rows: dict[str, Any]) -> str:
    lines = []
    for name in ("R2", "R3", "R2 ranks", "D1", "D1 async", "D4", "S", "F1", "F2", "F3"):
        row = rows.get(name)
        if row is None:
            continue
        extra = {k: v for k, v in row.items() if k not in ("count", "failures", "about", "seed", "seconds")}
        shown = "; ".join(f"{k}: {_shown(v)}" for k, v in extra.items())
        seed = f"seed {row['seed']}, " if "seed" in row else ""
        lines.append(f"- {name} ({seed}{row['seconds']:,.0f} s): {shown}")
        lines += [f"  - failed: {where}: {_short(what)}" for where, what in list(row["failures"].items())[:10]]
    for where, what in list(rows.get("R1", {}).get("failures", {}).items())[:20]:
        lines.append(f"- R1 failed: {where}: {_short(what)}")
    return "\n".join(["## Details", "", *lines]) if lines else ""


def _shown(value: Any) -> str:
    return ", ".join(f"{n:,} {what}" for what, n in value.items()) if isinstance(value, dict) else str(value)


def _short(what: Any) -> str:
    text = ", ".join(map(str, what)) if isinstance(what, list) else str(what)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _costs(rows: dict[str, Any]) -> str:
    if "Cost" not in rows:
        return ""
    lines = [
        f"| {line['what']} | {line['measured']:g} {line['unit']} | {line['goal']:g} | {line['note']} |"
        for line in rows["Cost"]["lines"]
    ]
    return "\n".join(["## Cost", "", "| what | median | at most | |", "|---|---|---|---|", *lines])


def _conditions(rows: dict[str, Any]) -> str:
    lines = []
    for name, row in rows.items():
        a = row["about"]
        lines.append(
            f"- {name}: {a['when']}, commit {a['commit']}{', a sample' if a['sample'] else ''}; Python {a['python']}, "
            f"torch {a['torch']}, numpy {a['numpy']}; {a['cores']} cores ({a['instructions']}), {a['threads']} thread, "
            f"load {a['load']}"
        )
    return "\n".join(["## Conditions", "", *lines])
