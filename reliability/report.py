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
from reliability.cost import LINES
from reliability.hostile import MEGABYTES, SECONDS

ROOT = Path(__file__).resolve().parents[1]
JSON, PAGE = ROOT / "reliability.json", ROOT / "docs" / "reliability.md"
QUICK = ROOT / "build" / "reliability-quick.json"  # where samples go: they take no full row's place
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
        f"nothing executed or imported, errors of ours only; each takes at most {SECONDS:g} s of CPU time, and none "
        f"brings the memory in use to more than {MEGABYTES:g} MB above what it was before the first",
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
        "2 and 4 ranks, every second net without buffers: SIGTERM, SIGINT, SIGUSR1 to one rank, to all, to "
        "`lw.launch`, to torchrun, at a random moment",
        "all ranks gone within 30 s; the newest checkpoint is whole and of the step after which all stopped; gone on "
        "from, all is equal in bits to a run of as many ranks that was left alone",
        60,
    ),
    "F3": (
        "2 and 4 ranks, every second net without buffers: one raises in each hook, in the forward, backward or its "
        "data, is killed, stopped, leaves, waits in a collective alone, or is slow for 20 s",
        "all ranks gone within 30 s; each says which rank it was, at which step and in which line, and the hook is "
        "named; checkpoints are whole; a rank that is only slow alarms nobody",
        40,
    ),
    "Cost": ("what it costs", "see below", 0),
}
# the test of tests/test_reliability.py that `make test` runs of a row, and how much of the row it is
SUITE: dict[str, tuple[str, str]] = {
    "R1": (
        "test_a_run_resumed_after_its_steps_is_the_run_that_went_on",
        "6 resumes: 3 of the kinds, after 2 of the steps",
    ),
    "R2": ("test_a_process_killed_once_ends_with_the_bits_of_one_that_was_not", "1 run"),
    "R3": ("test_killed_processes_end_with_the_bits_of_those_that_were_not", "3 runs, each killed 2 or 3 times"),
    "R2 ranks": (
        "test_ranks_killed_inside_of_a_window_or_a_validation_end_with_the_same_bits_and_log",
        "1 and 2 ranks with 0 and 2 workers, each killed in a window and in a validation; none at a random moment",
    ),
    "D1": ("test_a_kill_while_saving_loses_at_most_one_interval_and_leaves_nothing", "2 kills"),
    "D1 async": ("test_a_kill_while_saving_loses_at_most_one_interval_and_leaves_nothing", "2 kills"),
    "D4": (
        "test_damage_is_seen_and_the_older_checkpoint_gone_on_from",
        "a twentieth of the bit flips, truncations and zeroed blocks, and of the files",
    ),
    "S": (
        "test_hostile_files_of_each_kind_run_nothing_and_stay_in_bounds",
        "about 570 attempts, some of each kind; all of the corpora but the mutations are in "
        "`tests/checkpoint/test_hostile.py`, too",
    ),
    "F1": ("test_a_signal_in_any_phase_saves_leaves_and_can_be_gone_on_from", "9 signals, one in each phase"),
    "F2": (
        "test_ranks_that_are_signalled_leave_in_time_and_are_gone_on_from",
        "2 signals: SIGTERM to one of 2 ranks, and to both; none to `lw.launch` or torchrun, none with 4 ranks",
    ),
    "F3": (
        "test_ranks_that_fail_leave_in_time_and_say_where",
        "2 faults: one of 2 ranks raises, in the first hook and in the second; `make nightly` has more of them, in "
        "`tests/parallel/test_hang_proof.py`",
    ),
    "Cost": ("", "none: it is timed, and other work on the machine would decide"),
}
INTRO = """# Reliability

Written by `make reliability`, which runs all of this again (`make reliability ROWS="R1 D4"` some of it). Each number
below was counted; none is extrapolated. The whole, with seeds and every failure, is in `reliability.json`. With
`QUICK=--quick` a sample of each row is run, which is told, goes to `build/reliability-quick.json` and changes neither
this page nor that file.
"""
LIMITS = """## What is not covered

On a CPU: no GPU, no mixed precision, no `torch.compile`; all rows but R2 ranks, F2 and F3 with one process. Kills are
kills of the process, not of the machine: what the page cache holds survives them, and no row tells what a power loss
does. R1, R2, R3 and D4 keep their files in memory where there is `/dev/shm`, D1 on the disk of the temporary folder.
R1 takes a new trainer, net (of another seed), data and random state for each resume, in one process; R2, R3, D1 and F1
are processes of their own, forked from one that has imported torch. The nets are small (D1: 8 MB a checkpoint). Equal
bits are promised for the same versions, instructions and number of threads; a resume under others is refused.
"""


def load(path: Path | None = None) -> dict[str, Any]:
    """What earlier runs of the harness have found, by row; ``path``: not those of the page."""
    path = path or JSON
    return json.loads(path.read_text())["rows"] if path.exists() else {}


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


def add(name: str, found: dict[str, Any], *, quick: bool) -> None:
    """Put a row in its place: a full one in the file and on the page, a sample in a file of its own."""
    path = QUICK if quick else JSON
    rows = {**load(path), name: {**found, "about": about(quick)}}  # those of other processes too
    rows = {row: rows[row] for row in ROWS if row in rows}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    if not quick:
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
    parts = [
        INTRO,
        "\n".join(table),
        _suite(),
        _variants(rows),
        _details(rows),
        _costs(rows),
        _conditions(rows),
        LIMITS,
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _suite() -> str:
    lines = [f"| {row} | {f'`{test}`' if test else ''} | {what} |" for row, (test, what) in SUITE.items()]
    about = "Of each row but the last `make test` runs a small part, by a test in `tests/test_reliability.py`:"
    return "\n".join(["## What the suite runs of it", "", about, "", "| row | test | part |", "|---|---|---|", *lines])


def _variants(rows: dict[str, Any]) -> str:
    if "R1" not in rows:
        return ""
    lines = [f"| {v['variant']} | {v['count']} | {v['failed']} |" for v in rows["R1"]["variants"]]
    return "\n".join(
        ["## R1 by kind of training", "", "| kind | resumes | not equal in bits |", "|---|---|---|", *lines]
    )


def _details(rows: dict[str, Any]) -> str:
    lines = []
    for name, row in rows.items():
        if name in ("R1", "Cost"):  # which have tables
            continue
        lines.append(f"- {summary(name, row)}")
        lines += [f"  - failed: {where}: {_short(what)}" for where, what in list(row["failures"].items())[:10]]
    for where, what in list(rows.get("R1", {}).get("failures", {}).items())[:20]:
        lines.append(f"- R1 failed: {where}: {_short(what)}")
    return "\n".join(["## Details", "", *lines]) if lines else ""


def summary(name: str, row: dict[str, Any]) -> str:
    """What a row has found besides its failures, in a line."""
    seed = f"seed {row['seed']}, " if "seed" in row else ""
    hidden = ("count", "failures", "about", "seed", "seconds", "variants", "lines")
    extra = {k: v for k, v in row.items() if k not in hidden}
    extra |= {line["what"]: f"{line['measured']:g} {line['unit']}" for line in row.get("lines", [])}
    return f"{name} ({seed}{row['seconds']:,.0f} s): " + "; ".join(f"{k}: {_shown(v)}" for k, v in extra.items())


def _shown(value: Any) -> str:
    return ", ".join(f"{n:,} {what}" for what, n in value.items()) if isinstance(value, dict) else str(value)


def _short(what: Any) -> str:
    text = ", ".join(map(str, what)) if isinstance(what, list) else str(what)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _costs(rows: dict[str, Any]) -> str:
    if "Cost" not in rows:
        return ""
    found = rows["Cost"]["lines"]
    lines = [
        f"| {line['what']} | {line['measured']:g} {line['unit']} | {LINES[line['what']][0]} | {_median(line)} | "
        f"{line['goal']:g} | {line['note']} |"
        for line in found
    ]
    timed = [f"- {line['what']}: {LINES[line['what']][1]}" for line in found]
    return "\n".join([
        "## Cost", "",
        f"{rows['Cost']['rounds']} rounds, or saves. Of the loader and of saves up to three times as many rounds were "
        "timed, and those kept\nin which other programs did least.", "",
        "| what | measured | which is the | median | at most | |", "|---|---|---|---|---|---|", *lines, "",
        "What was timed:", "", *timed,
    ])  # fmt: skip


def _median(line: dict[str, Any]) -> str:
    if LINES[line["what"]][0].startswith("median"):
        return "the same"
    return f"{line['median']:g} {line['unit']}" if "median" in line else "not kept in this run"


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


if __name__ == "__main__":  # the page anew, of the results that there are
    PAGE.write_text(page(load()))
