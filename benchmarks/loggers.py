"""What a record costs: ten scalars a step to metrics.jsonl, against a hand-written json.dumps and write, and peers.

``python benchmarks/loggers.py`` prints microseconds a record (the median of repetitions, interleaved), and how much
memory grows over a million records. Lightning's CSV logger and TensorBoard are measured where they are installed.
``--write`` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loopwright.loggers import CSVLogger, JSONLLogger
from loopwright.state import Progress
from measure import PAGE, in_text, write_section

NAMES = [f"train/value_{i}" for i in range(10)]
Log = Callable[[int, dict[str, float]], None]


def by_hand(folder: Path) -> Log:
    file = (folder / "hand.jsonl").open("w")

    def log(step: int, values: dict[str, float]) -> None:
        file.write(json.dumps({"step": step, **values}) + "\n")
        file.flush()

    return log


def ours(logger: Any) -> Log:
    return lambda step, values: logger.log(Progress(step=step, seconds=step * 0.001), values, "train")


def opened(folder: Path) -> JSONLLogger:
    """A logger as it is in a run: with its file open."""
    logger = JSONLLogger()
    logger.start(_Run(folder))  # type: ignore[arg-type]
    return logger


class _Run:
    """As much of a run as a logger of a file looks at."""

    status = "running"

    class comm:  # noqa: N801
        rank = 0

    def __init__(self, folder: Path) -> None:
        self.folder = folder


def opened_csv(folder: Path) -> CSVLogger:
    logger = CSVLogger()
    logger.start(_Run(folder))  # type: ignore[arg-type]
    return logger


def lightning(folder: Path) -> Log:
    from pytorch_lightning.loggers import CSVLogger as Theirs

    logger = Theirs(str(folder))

    def log(step: int, values: dict[str, float]) -> None:
        logger.log_metrics(values, step)

    return log


def tensorboard(folder: Path) -> Log:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tb"))

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log


def measure(log: Log, first: int, count: int = 1000) -> float:
    """Microseconds a record; the values differ from record to record, as they do in a run."""
    rows = [{name: (first + i) * 0.1234567 + k for k, name in enumerate(NAMES)} for i in range(count)]
    start = time.perf_counter()
    for i, values in enumerate(rows):
        log(first + i, values)
    return (time.perf_counter() - start) / count * 1e6


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        logs = {"json.dumps and write by hand": by_hand(folder), "JSONLLogger": ours(opened(folder)),
                "CSVLogger": ours(opened_csv(folder))}  # fmt: skip
        if find_spec("pytorch_lightning"):
            logs["Lightning's CSVLogger"] = lightning(folder)
        if find_spec("tensorboard"):
            logs["TensorBoard, add_scalar"] = tensorboard(folder)
        times: dict[str, list[float]] = {kind: [] for kind in logs}
        for repetition in range(15):
            for kind, log in logs.items():
                times[kind].append(measure(log, repetition * 1000))
        lines = [
            f"{kind:<30} {statistics.median(taken):7.1f} us a record of {len(NAMES)} scalars"
            for kind, taken in times.items()
        ]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        log = ours(opened(folder))
        for i in range(100):
            measure(log, i * 10_000, 10_000)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        lines.append(
            f"{'a million records':<30} {grown:7.1f} MB more memory at the peak (10,000 of them are held at a time)"
        )
    print(*lines, sep="\n")
    if "--write" in sys.argv:
        write_section(PAGE, "loggers", in_text("A record", "The goal is at most 30 us for ten scalars.", lines))


if __name__ == "__main__":
    main()
