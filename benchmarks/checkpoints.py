"""What a checkpoint costs: our save next to torch.save + fsync of the same tensors, memory, stall and read.

``python benchmarks/checkpoints.py`` prints one table. The contenders take turns, in an order that is rotated; a ratio
is the median of those of all rounds, so that a machine that is slow for a second slows down both.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loopwright.checkpoint import Packed, read, write
from loopwright.checkpoint.background import Copies

TENSORS = 30


def state(megabytes: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model, and an optimizer with two moments of each weight: together ``megabytes`` of float32."""
    n = int(megabytes * 1e6 / 4 / 3 / TENSORS)
    model = {f"layer{i}.weight": torch.randn(n) for i in range(TENSORS)}
    moments = {i: {"exp_avg": torch.randn(n), "exp_avg_sq": torch.rand(n)} for i in range(TENSORS)}
    return model, {"optimizers": {"optimizer": {"state": moments}}}


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def peak(work: Callable[[], Any]) -> float:
    """Megabytes of memory that ``work`` adds to what the process has, at most; nan where the system does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    before = _memory("VmRSS")
    work()
    return (_memory("VmHWM") - before) / 1e3


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure(megabytes: float, rounds: int, place: Path) -> None:
    model, moments = state(megabytes)
    flat = dict(enumerate(_tensors([model, moments])))
    copies = Copies()
    kept = [torch.empty_like(t) for t in flat.values()]

    def by_torch() -> None:
        with open(place / "torch.pt", "wb") as file:
            torch.save([model, moments], file)
            file.flush()
            os.fsync(file.fileno())

    work: dict[str, Callable[[], Any]] = {
        "torch.save + fsync": by_torch,
        "save": lambda: write(place / "step-1", {"model": model}, moments, {}),
        "one copy": lambda: [mine.copy_(t) for mine, t in zip(kept, flat.values(), strict=True)],
        "async stall": lambda: copies.of(Packed.of({"model": model}, moments, {})),
        "torch.load": lambda: torch.load(place / "torch.pt"),
        "read": lambda: read(place / "step-1"),
        "blake2b alone": lambda: [hashlib.blake2b(t.numpy()) for t in flat.values()],
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        names = list(work)
        for name in names if number == 0 else names[number % len(names) :] + names[: number % len(names)]:
            taken = seconds(work[name])
            if number:  # the first round only warms up
                times[name].append(taken)
    pairs = {"save": "torch.save + fsync", "async stall": "one copy", "read": "torch.load"}
    print(f"\n{megabytes:g} MB, {rounds} rounds")
    for name, taken in times.items():
        line = f"  {name:<20}{statistics.median(taken) * 1e3:10.2f} ms"
        if name in pairs:
            ratios = sorted(mine / other for mine, other in zip(taken, times[pairs[name]], strict=True))
            low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
            line += f"   {statistics.median(ratios):5.2f} x {pairs[name]} (middle half {low:.2f} to {high:.2f})"
        print(line)
    for name in ("save", "torch.save + fsync"):
        print(f"  memory of {name}: {peak(work[name]):.1f} MB more at its peak")


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in (value.values() if isinstance(value, dict) else value) for t in _tensors(v)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 100])
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    for megabytes in given.megabytes:
        with tempfile.TemporaryDirectory() as place:
            measure(megabytes, given.rounds, Path(place))


if __name__ == "__main__":
    main()
