"""What the report of a long run costs: 100,000 steps, every value logged at every step, through the real logger.

Run: python benchmarks/report.py [--steps 100000] [--series 10]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import loopwright as lw
from loopwright.folder import close_folder, open_folder
from loopwright.report import write


def record(root: Path, steps: int, series: int, seed: int) -> Path:
    """A run folder in which a run of ``steps`` has logged ``series`` values a step, and a validation each 1,000."""
    folder = open_folder(root, "long", settings={"seed": seed, "epochs": 10, "lr": 0.1}, seed=seed)
    logger = lw.JSONLLogger(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        progress = lw.Progress(step=step, epoch=step * 10 // steps, samples=step * 32, seconds=step / 100)
        falls = 2.0 / math.sqrt(step) + 0.1 * math.sin(step * (1 + seed))
        logger.log(progress, {"train/loss": falls, **{f"norm/{i}": falls * i for i in range(1, series)}}, "train")
        if step % 1000 == 0:
            logger.log(progress, {"valid/loss": falls, "valid/accuracy": 1 - falls / 2}, "valid")
    close_folder(folder, "done", progress={"step": steps, "seconds": steps / 100, "samples": steps * 32})
    return folder


def main(steps: int, series: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        runs = [record(root, steps, series, seed) for seed in range(3)]
        size = (runs[0] / "metrics.jsonl").stat().st_size
        print(f"{steps:,} steps, {series} values at each; metrics.jsonl {size / 1e6:.1f} MB")
        for name, given in (("one run", runs[:1]), ("three seeds", runs)):
            times = []
            for _ in range(3):
                begin = time.perf_counter()
                page = write(given, root / "page.html")
                times.append(time.perf_counter() - begin)
            result = {
                "page": name,
                "MB": round(page.stat().st_size / 1e6, 2),
                "s": [round(t, 2) for t in sorted(times)],
            }
            print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--series", type=int, default=10)
    main(**vars(parser.parse_args()))
