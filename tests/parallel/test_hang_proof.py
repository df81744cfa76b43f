"""A fit of real ranks with nobody above them: whatever one of them does, all are gone within 10 s and know why.

The time-out is that of ``lw.DDP()``: nothing is set.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:  # the harness is a folder of scripts beside the tests
    sys.path.append(ROOT)

from reliability import worlds  # noqa: E402

PROMISE = 10.0
pytestmark = [pytest.mark.slow, pytest.mark.nightly]


def faulty(kind: str, world: int, rank: int, folder: Path, *, buffers: bool) -> tuple[list[str], float]:
    """The outcome, in a process of its own: what ranks that are forked from pytest print is kept from their files."""
    code = (
        "import json, sys; from pathlib import Path; from reliability import worlds\n"
        "kind, world, rank, folder, buffers = json.loads(sys.argv[1])\n"
        "found = worlds.faulty(kind, world, rank, Path(folder), buffers=buffers)\n"
        "print(json.dumps([found.problems, found.seconds]))"
    )
    settings = json.dumps([kind, world, rank, str(folder), buffers])
    found = subprocess.run(
        [sys.executable, "-c", code, settings], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert found.returncode == 0, found.stderr
    problems, seconds = json.loads(found.stdout.splitlines()[-1])
    return problems, seconds


@pytest.mark.parametrize(
    ("kind", "world"),
    [
        ("alone in a barrier", 2),  # what rank 0 does that logs alone
        ("alone in a barrier, without buffers", 2),
        ("alone in a barrier", 4),
        ("on_step_end", 2),
        ("another shape", 2),
        ("short loader", 2),
        ("SIGKILL", 2),
        ("leaves", 4),
    ],
)
@pytest.mark.capability("B-25")
def test_all_ranks_end_within_ten_seconds_and_name_the_rank_the_step_and_the_line(
    kind: str, world: int, tmp_path: Path
) -> None:
    rank = 0 if kind == "alone in a barrier" else 1
    kind = kind.partition(",")[0]
    problems, seconds = faulty(kind, world, rank, tmp_path / "run", buffers=rank == 0)  # without, a backward waits
    assert problems == []
    assert seconds < PROMISE
    told = (tmp_path / "run" / "0.err").read_text()
    if kind == "on_step_end":
        assert 'raise ValueError(f"spoiled in {kind}")' in told  # the traceback of rank 1, printed by rank 0
    else:  # the lines of the culprit, where it stood when it last reported
        assert f"rank {rank} stood in, when it last reported (most recent call last):" in told


@pytest.mark.capability("B-25")
def test_sigterm_inside_a_wait_for_a_slow_rank_saves_and_ends_all(tmp_path: Path) -> None:
    ranks = worlds.Ranks("forked", tmp_path, 2, kind="slow", target=1, buffers=False)
    try:
        assert worlds.await_(lambda: (tmp_path / "spoiled").exists(), 120)
        time.sleep(3)  # rank 0 is in the backward of the next step by now
        sent = time.monotonic()
        os.kill(ranks.pids()[0], signal.SIGTERM)
        code = ranks.wait(2 * worlds.LIMIT_S)
        assert time.monotonic() - sent < 20 + PROMISE  # the other rank sleeps for 20 s, and is waited for
        assert list(worlds._left(ranks, code, signal.SIGTERM, time.monotonic() - sent)) == []
    finally:
        ranks.kill()


@pytest.mark.capability("B-25")
def test_sigterm_inside_a_wait_that_never_ends_does_not_keep_it_up(tmp_path: Path) -> None:
    ranks = worlds.Ranks("forked", tmp_path, 2, kind="alone in a barrier", target=1, buffers=False)
    try:
        assert worlds.await_(lambda: (tmp_path / "spoiled").exists(), 120)
        for pid in ranks.pids():
            os.kill(pid, signal.SIGTERM)
        assert ranks.wait(2 * worlds.LIMIT_S) is not None
        codes, ended = json.loads((tmp_path / "ended").read_text())
        assert all(codes)
        assert ended - float((tmp_path / "spoiled").read_text()) < PROMISE
    finally:
        ranks.kill()
