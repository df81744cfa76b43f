"""Real ranks of which one raises, dies, is stopped, waits alone or is slow: do all end in time, and say why?

``python -m reliability.ranks --count 40`` goes through all kinds in turn and prints what came of each.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from loopwright.parallel.watch import Watch

STEPS, AT = 2000, 20
GONE = r"rank {rank} ended without a word, killed or crashed"
OTHERWISE = r"collectives do not match at step {at}: call \d+ of the default group: .*rank {rank}: "
# what is done to one rank, and what the others must print of it
ENDS = {
    "raise": r"rank {rank} failed at step {at}, .*ranks\.py:\d+ in spoil: ValueError: spoiled on purpose",
    "raise in backward": r"rank {rank} failed at step {at}, .*ranks\.py:\d+ in spoiled: ValueError: spoiled on purpose",
    "kill": GONE + r" \(its last report, which came [\d.]+ s ago: at step \d+, .*ranks\.py:\d+ in \w+",
    "stop": r"rank {rank} has not been heard of for \d+ s: its process was stopped by a signal \(its last report: ",
    "barrier alone": OTHERWISE + r"barrier\(\), .*ranks\.py:\d+ in spoil",
    "gather alone": OTHERWISE + r"all_gather\(long\[1\]\), .*ranks\.py:\d+ in spoil",
    "shapes": OTHERWISE + r"all_reduce\(float\[2\]\), .*ranks\.py:\d+ in train",
    "sizes": GONE.replace("{rank}", r"\d"),  # gloo aborts the rank that gets more than it expects
    "leaves early": r"deadlock: .*rank {rank}: step {at}, has left training",
}
GOES_ON = ("slow", "holds the lock", "all stopped", "done early", "twice")


@dataclass
class Outcome:
    """What came of a run; ``problems`` is empty if all was as it must be.

    ``seconds`` until the last process had gone, ``left`` until the last rank had cleaned up: the rest is Python's end.
    """

    kind: str
    rank: int
    codes: list[int]
    seconds: float
    printed: list[str]
    left: float = 0.0
    problems: list[str] = field(default_factory=list)


def injected(
    kind: str, world_size: int, rank: int, *, timeout: float, delay: float = 0.0, within: float | None = None
) -> Outcome:
    """Do ``kind`` to one of ``world_size`` ranks, ``delay`` seconds after step 20, and look at how all of them end.

    They must be gone ``within`` so many seconds; by default ``timeout``, the promise of the watch.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = json.dumps([kind, world_size, rank, timeout, name])
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ranks = subprocess.Popen([sys.executable, __file__, "ranks", settings], env=environment)
        try:
            began = _spoiled(folder / f"{rank}.out", ranks)
            if kind in ("kill", "stop"):
                time.sleep(delay + 2 * min(1.0, timeout / 30))  # it has reported from a step
                began = time.monotonic()
                os.kill(_pids(folder)[rank], signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
            if kind == "all stopped":  # Ctrl-Z, and later on fg
                for number, wait in ((signal.SIGSTOP, 2 * timeout), (signal.SIGCONT, 0)):
                    for pid in _pids(folder):
                        os.kill(pid, number)
                    time.sleep(wait)
            with suppress(subprocess.TimeoutExpired):
                ranks.wait((8 if kind in GOES_ON else 2) * timeout + 20)
            seconds = time.monotonic() - began
        finally:
            if ranks.poll() is None:
                for pid in _pids(folder):
                    os.kill(pid, signal.SIGKILL)
                ranks.wait()
        codes = json.loads((folder / "codes").read_text())
        printed = [(folder / f"{r}.err").read_text() for r in range(world_size)]
        notes = [(folder / f"{r}.out").read_text() for r in range(world_size)]
    outcome = Outcome(kind, rank, codes, round(seconds, 2), printed)
    cleaned = [float(at) for note in notes for at in re.findall(r"cleaned up at ([\d.]+)", note)]
    outcome.left = round(max(cleaned, default=began) - began, 2)
    outcome.problems += list(_odd(outcome, notes, timeout if within is None else within))
    return outcome


def _spoiled(out: Path, process: subprocess.Popen[Any]) -> float:
    """When the rank says that it has come to its step."""
    found = None
    while found is None and process.poll() is None:
        time.sleep(0.02)
        found = re.search(r"at ([\d.]+)\n", out.read_text()) if out.exists() else None
    return float(found.group(1)) if found else time.monotonic()


def _pids(folder: Path) -> list[int]:
    found: list[int] = json.loads((folder / "pids").read_text())
    return found


def _odd(outcome: Outcome, notes: list[str], within: float) -> Iterator[str]:
    expected = {outcome.rank: -signal.SIGKILL} if outcome.kind in ("kill", "stop") else {}
    if outcome.kind == "sizes":  # gloo ends the one that gets more than it expects, which prints where it is
        expected = {rank: code for rank, code in enumerate(outcome.codes) if code == -signal.SIGABRT}
        if not any(re.search(r"ranks\.py\", line \d+ in train", outcome.printed[rank]) for rank in expected):
            yield f"no rank tells where it crashed: {outcome.printed}"
    for rank, (code, printed, note) in enumerate(zip(outcome.codes, outcome.printed, notes, strict=True)):
        if code != (0 if outcome.kind in GOES_ON else expected.get(rank, 1)):
            yield f"rank {rank} left with {code}: {printed[-1500:]}"
        if outcome.kind in GOES_ON:
            if "[loopwright]" in printed:
                yield f"rank {rank} was alarmed: {printed[-500:]}"
            continue
        if rank in expected:
            continue
        said = [line for line in printed.splitlines() if line.startswith("[loopwright]")]
        pattern = ENDS[outcome.kind].format(rank=outcome.rank, at=AT)
        if not any(re.search(pattern, line) for line in said):
            yield f"rank {rank} said {said}, not {pattern}: {printed[-1500:]}"
        if outcome.kind == "raise" and rank == 0 and 'raise ValueError("spoiled on purpose")' not in printed:
            yield f"rank 0 printed no traceback of rank {outcome.rank}: {printed[-1500:]}"
        if "cleaned up" not in note and rank != outcome.rank:
            yield f"rank {rank} had no chance to clean up"
    if outcome.kind not in GOES_ON and outcome.seconds > within:
        yield f"it took {outcome.seconds} s, more than {within} s"


# ------------------------------------------------------------------------------------------ in the ranks


def spoil(kind: str, *, timeout: float) -> None:
    """What one rank does at its step."""
    print(f"at {time.monotonic()}", flush=True)
    if kind == "raise":
        raise ValueError("spoiled on purpose")
    if kind == "barrier alone":
        dist.barrier()
    if kind == "gather alone":
        dist.all_gather_object([None] * dist.get_world_size(), "mine")
    if kind == "slow":
        time.sleep(3 * timeout)
    if kind == "holds the lock":  # Python's: no thread of this process runs meanwhile
        ctypes.PyDLL(None).sleep(int(2 * timeout))


def spoiled(grad: torch.Tensor) -> None:
    """A hook of a gradient."""
    print(f"at {time.monotonic()}", flush=True)
    raise ValueError("spoiled on purpose")


def train(kind: str, mine: bool, at: list[int], *, timeout: float) -> None:
    """Steps with gradients and a loss that are reduced over ranks; ``kind`` is done at step 20 if it is ``mine``."""
    torch.manual_seed(0)
    net = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for step in range(STEPS if kind in (*ENDS, "all stopped") else 2 * AT):
        at[0] = step
        if mine and step == AT:
            if kind == "leaves early":
                print(f"at {time.monotonic()}", flush=True)
                return
            if kind == "raise in backward":
                net.module[2].weight.register_hook(spoiled)
            else:
                spoil(kind, timeout=timeout)
        if kind == "done early" and step > AT:
            if mine:
                return
            time.sleep(0.1)  # work of its own
            continue
        time.sleep(0.01)
        optimizer.zero_grad()
        loss = net(torch.randn(4, 8)).pow(2).mean()
        loss.backward()
        optimizer.step()
        numbers = 10**4 if kind == "sizes" else 1
        if mine and step == AT and kind in ("shapes", "sizes"):
            print(f"at {time.monotonic()}", flush=True)
            numbers *= 2
        dist.all_reduce(loss.detach().repeat(numbers) if numbers > 1 else loss.detach())


def launch(kind: str, world_size: int, target: int, timeout: float, folder: str) -> None:
    """Fork the ranks, for torch is slow to import; each ends as Python ends by itself. Note how."""
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # imports torch's compiler
    place, pids = Path(folder), []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            for name, number in (("out", 1), ("err", 2)):
                os.dup2(os.open(place / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
            main_of_a_rank(kind, rank, world_size, target, timeout, place)
            return
        pids.append(pid)
    (place / "new").write_text(json.dumps(pids))
    (place / "new").rename(place / "pids")
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    (place / "codes").write_text(json.dumps(codes))


def cleaned_up(text: str = "") -> None:
    """What a run does last: close its folder, flush its loggers."""
    print(f"cleaned up at {time.monotonic()}", flush=True)


def main_of_a_rank(kind: str, rank: int, world_size: int, target: int, timeout: float, folder: Path) -> None:
    """Join the others, train, leave."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    for _ in range(2 if kind == "twice" else 1):
        at = [0]
        try:
            with Watch(rank, world_size, lambda at=at: at[0], timeout=timeout, on_abort=cleaned_up):
                train(kind, rank == target, at, timeout=timeout)
        except BaseException:
            cleaned_up()
            raise
    if kind in GOES_ON:
        dist.barrier()
    dist.destroy_process_group()


def run(count: int, *, timeout: float = 30.0, seed: int = 17, say: Any = None) -> dict[str, Any]:
    """The rank part of row F3: ``count`` runs of 2 or 4 ranks, all kinds in turn, on ranks drawn at random."""
    draws, failures, seconds = random.Random(seed), dict[str, list[str]](), dict[str, list[float]]()
    kinds = itertools.cycle([*ENDS, *GOES_ON])
    for number in range(1, count + 1):
        kind, world_size = next(kinds), draws.choice((2, 2, 4))
        rank, delay = draws.randrange(world_size), draws.uniform(0, 0.5)
        outcome = injected(kind, world_size, rank, timeout=timeout, delay=delay)
        seconds.setdefault(kind, []).append(outcome.seconds)
        if outcome.problems:
            failures[f"number {number}: {kind}, rank {rank} of {world_size}"] = outcome.problems
        if say is not None:
            what = (
                f"{number}: {kind}, rank {rank} of {world_size}: left after {outcome.left} s, gone {outcome.seconds} s"
            )
            say(f"{what}, {outcome.problems or 'as it must be'}")
    slowest = {kind: max(values) for kind, values in seconds.items()}
    return {"count": count, "failures": failures, "seed": seed, "timeout": timeout, "slowest": slowest}


def main() -> int:
    """Run injections from the command line; 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--timeout", type=float, default=30.0, help="of the watch, in seconds, and what is allowed")
    parser.add_argument("--seed", type=int, default=17)
    options = parser.parse_args()
    found = run(options.count, timeout=options.timeout, seed=options.seed, say=lambda line: print(line, flush=True))
    print(f"{found['count']} runs, failed: {len(found['failures'])}; slowest, in seconds: {found['slowest']}")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["ranks"]:
        launch(*json.loads(sys.argv[2]))
    else:
        sys.exit(main())
