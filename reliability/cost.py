"""What exactness costs: a position found again, a save, its stall in the background, and each step in between.

Contenders take turns, and what is told is the median over the turns: other work on the machine slows down all of them.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import loopwright as lw
from loopwright.checkpoint import write
from reliability.trial import memory


def run(*, quick: bool = False) -> dict[str, Any]:
    """Each line with its goal; a line fails if it is missed."""
    rounds = 3 if quick else 15
    lines = [*_position(rounds), *_saves(rounds, megabytes=10 if quick else 100), _step(rounds, 500 if quick else 2000)]
    missed = {line["what"]: f"{line['measured']} {line['unit']}" for line in lines if line["measured"] > line["goal"]}
    return {"count": len(lines), "lines": lines, "failures": missed, "rounds": rounds}


def _line(what: str, measured: float, goal: float, unit: str, note: str) -> dict[str, Any]:
    return {"what": what, "measured": float(f"{measured:.3g}"), "goal": goal, "unit": unit, "note": note}


def _turns(rounds: int, contenders: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        names = list(contenders)[:: 1 if number % 2 else -1]
        for name in names:
            seconds = contenders[name]()
            if number:  # the first turn imports and allocates
                times[name].append(seconds)
    return times


def _ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def _position(rounds: int) -> list[dict[str, Any]]:
    loader = lw.Loader(torch.randn(320_000, 4), 32, shuffle=True, seed=1)  # 10,000 batches an epoch

    def seek(step: int) -> Callable[[], float]:
        def once() -> float:
            source = loader.keyed(1)
            state = source.state_dict()
            began = time.perf_counter()
            source.load_state_dict(state)
            next(source.at(*divmod(step, 10_000)))
            return time.perf_counter() - began

        return once

    times = _turns(rounds, {"early": seek(10), "late": seek(999_990)})
    ms = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    note = f"first batch after {ms['late']:.1f} ms at step 999,990, {ms['early']:.1f} ms at step 10 of 320,000 samples"
    return [
        _line("our loader: resume at step 1,000,000 against step 10", _ratio(times, "late", "early"), 1.25, "x", note)
    ]


def _saves(rounds: int, megabytes: int) -> list[dict[str, Any]]:
    tensors = {f"w{i}": torch.randn(megabytes * 250_000 // 10) for i in range(10)}
    with tempfile.TemporaryDirectory() as folder:
        place, number = Path(folder), iter(range(10**6))

        def ours() -> float:
            path = place / f"{next(number)}"
            began = time.perf_counter()
            write(path, {"model": tensors}, {"n": 1}, {})
            return time.perf_counter() - began

        def torchs() -> float:
            path = place / f"{next(number)}.pt"
            began = time.perf_counter()
            with open(path, "wb") as file:
                torch.save(tensors, file)  # noqa: TID251 - what we compare with
                file.flush()
                os.fsync(file.fileno())
            return time.perf_counter() - began

        times = _turns(rounds, {"ours": ours, "torch": torchs})
    note = f"{megabytes} MB: {_ms(times['ours'])} ms against {_ms(times['torch'])} ms"
    return [
        _line(
            "a save against torch.save and fsync of the same tensors", _ratio(times, "ours", "torch"), 1.3, "x", note
        ),
        _stall(megabytes, rounds),
    ]


def _ms(values: list[float]) -> str:
    return f"{statistics.median(values) * 1e3:.1f}"


class _Timed(lw.Checkpoint):
    """Notes how long training waits for a save, and how long a copy of its tensors takes at that moment."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.stalls, self.copies = list[float](), list[float]()

    def save(self, run: lw.Run) -> Any:
        self.finish(run)  # the one before has landed: what is timed is this one alone
        began = time.perf_counter()
        kept = [p.detach().clone() for model in run.models.values() for p in model.parameters()]
        self.copies.append(time.perf_counter() - began)
        del kept
        began = time.perf_counter()
        path = super().save(run)
        self.stalls.append(time.perf_counter() - began)
        return path


def _stall(megabytes: int, rounds: int) -> dict[str, Any]:
    width = round((megabytes * 250_000 / 4) ** 0.5)
    net = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
    task = lw.Supervised(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.01))
    saver = _Timed("1 steps", keep=1, async_save=True, at_end=False)
    data = (torch.randn(rounds + 2, width), torch.randn(rounds + 2, width))
    with memory() as root:
        lw.Trainer(epochs=1, folder=root, progress=False, checkpoint=saver).fit(task, lw.Loader(data, 1))
    pairs = list(zip(saver.stalls, saver.copies, strict=True))[2:]
    note = (
        f"{megabytes} MB: training waits {_ms([a for a, _ in pairs])} ms, a clone takes {_ms([b for _, b in pairs])} ms"
    )
    return _line(
        "stall of a save in the background against one copy", statistics.median(a / b for a, b in pairs), 1.0, "x", note
    )


def _step(rounds: int, steps: int) -> dict[str, Any]:
    x, y = torch.randn(4, 4), torch.zeros(4, 1)

    def once(checkpoint: Any, root: str) -> float:
        torch.manual_seed(0)
        net, stamps = nn.Linear(4, 1), list[float]()
        loss_of = nn.MSELoss()

        def loss(preds: Any, target: Any) -> Any:
            stamps.append(time.process_time())
            return loss_of(preds, target)

        task = lw.Supervised(net, loss, torch.optim.SGD(net.parameters(), lr=0.01))
        trainer = lw.Trainer(steps=steps, folder=root, progress=False, checkpoint=checkpoint)
        trainer.fit(task, [(x, y)] * steps)
        return (stamps[-1] - stamps[0]) / (steps - 1)

    with memory() as root:
        never = lambda: lw.Checkpoint("1000000 steps", at_end=False)  # noqa: E731
        times = _turns(rounds, {"with": lambda: once(never(), root), "without": lambda: once(False, root)})
    extra = statistics.median(a - b for a, b in zip(times["with"], times["without"], strict=True)) * 1e6
    note = (
        f"CPU time of a step of Linear(4, 1): {statistics.median(times['without']) * 1e6:.1f} us without a Checkpoint"
    )
    return _line("a step with a Checkpoint that is not due", extra, 5.0, "us", note)
