"""What exactness costs: a position found again, a save, its stall in the background, and each step in between.

Contenders take turns: other work on the machine slows down all of them. What each line tells, and of what, is in
``LINES``; the page has it below the table.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.data import DataLoader

import loopwright as lw
from loopwright.checkpoint import streams, write
from loopwright.data.torch_loader import TorchLoader
from reliability.trial import memory

POSITION = "our loader: resume at step 1,000,000 against step 10"
SAVE = "a save against torch.save and fsync of the same"
STALL = "stall of a save in the background against one copy"
STEP = "what exactness adds to a step"
# which number of all that were measured a line gives, and what was timed
LINES = {
    POSITION: (
        "median of the rounds",
        "the loader alone, from being handed its saved state until the first batch is there, for a position near step "
        "1,000,000 (step 999,990: epoch 99, batch 9,990) and for step 10; of each round the ratio of both. Reading the "
        "checkpoint, making the trainer and all else of a resume are not in it.",
    ),
    SAVE: (
        "median of the rounds",
        "one whole save of ours, with checksums and fsync, until the files are safe, and one `torch.save` of the same "
        "tensors into one file with fsync; of each round the ratio of both.",
    ),
    STALL: (
        "median of the saves",
        "how long training waits in a save with `async_save=True`, the one before having landed, against fresh clones "
        "of the same weights (`p.clone()`, memory and all) made right before; of each save the ratio of both. It is "
        "not compared with a copy into memory that is there already, which is faster than fresh clones; the line has "
        "all three.",
    ),
    STEP: (
        "5th percentile of windows of 100 steps",
        "a step of two loops that train nothing: asking a Checkpoint that is not due, less an empty loop; batches of a "
        "DataLoader through ours, less the DataLoader alone. Each of the four is the 5th percentile (the median "
        "beside it: the median) of the mean times of windows of 100 steps, and the line is the sum of both "
        "differences: the undisturbed cost, for the median has in it what else the machine did.",
    ),
}


def run(*, quick: bool = False) -> dict[str, Any]:
    """Each line with its goal; a line fails if it is missed."""
    rounds = 3 if quick else 15
    lines = [*_position(rounds), *_saves(rounds, megabytes=10 if quick else 100), _step(rounds, 500 if quick else 2000)]
    missed = {line["what"]: f"{line['measured']} {line['unit']}" for line in lines if line["measured"] > line["goal"]}
    return {"count": len(lines), "lines": lines, "failures": missed, "rounds": rounds}


def _line(what: str, measured: float, goal: float, unit: str, note: str, median: float | None = None) -> dict[str, Any]:
    """``median``: given where ``measured`` is another number."""
    line = {"what": what, "measured": float(f"{measured:.3g}"), "goal": goal, "unit": unit, "note": note}
    return line if median is None else {**line, "median": float(f"{median:.3g}")}


def _turns(rounds: int, contenders: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """The seconds of each in ``rounds`` rounds; of three times as many those in which other programs did least.

    ``"others"``: how many cores they used meanwhile.
    """
    found: list[dict[str, float]] = []
    for number in range(3 * rounds + 1):
        began, before = time.perf_counter(), _cpu_of_others()
        one = {name: contenders[name]() for name in list(contenders)[:: 1 if number % 2 else -1]}
        one["others"] = (_cpu_of_others() - before) / (time.perf_counter() - began)
        found += [one] if number else []  # the first imports and allocates
        if sum(taken["others"] < 0.1 for taken in found) == rounds:
            break
    calm = sorted(found, key=lambda taken: taken["others"])[:rounds]
    return {name: [taken[name] for taken in calm] for name in (*contenders, "others")}


def _cpu_of_others() -> float:
    """Seconds of CPU time that all programs but this one have used; the same number each time where nobody tells."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, *interrupts = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


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
    return [_line(POSITION, _ratio(times, "late", "early"), 1.25, "x", note)]


class _Unhashed:
    """Takes the place of the digest, to tell what a save would take without."""

    name = "blake2b"

    def update(self, data: Any) -> None:
        """Nothing."""

    def hexdigest(self) -> str:
        return "0" * 64


def _saves(rounds: int, megabytes: int) -> list[dict[str, Any]]:
    """Weights and the two moments of AdamW, together ``megabytes``."""
    size = megabytes * 250_000 // 30
    model = {f"w{i}": torch.randn(size) for i in range(10)}
    moments = {i: {"exp_avg": torch.randn(size), "exp_avg_sq": torch.rand(size)} for i in range(10)}
    state = {"optimizers": {"optimizer": {"state": moments}}}
    flat = [*model.values(), *(t for both in moments.values() for t in both.values())]

    def ours(path: Path) -> None:
        write(path, {"model": model}, state, {"n": 1})

    def unhashed(path: Path) -> None:
        with mock.patch.object(streams, "new_hash", _Unhashed):
            ours(path)

    def torchs(path: Path) -> None:
        with path.open("wb") as file:
            torch.save([model, moments], file)  # noqa: TID251 - what we compare with
            file.flush()
            os.fsync(file.fileno())

    def hashed(path: Path) -> None:
        for tensor in flat:
            hashlib.blake2b(tensor.numpy())

    with tempfile.TemporaryDirectory() as folder:
        work = {"ours": ours, "torch": torchs, "unhashed": unhashed, "hashed": hashed}
        times = _turns(rounds, {name: _in(Path(folder) / "saved", one) for name, one in work.items()})
    rate = megabytes / statistics.median(times["hashed"])
    note = (
        f"{megabytes} MB of weights and moments: {_ms(times['ours'])} ms against {_ms(times['torch'])} ms. Without "
        f"checksums {_ms(times['unhashed'])} ms, {_ratio(times, 'unhashed', 'torch'):.2f} x; blake2b alone "
        f"{_ratio(times, 'hashed', 'torch'):.2f} x, {rate:.0f} MB/s on one core. {os.cpu_count()} cores, of which "
        f"other programs used {statistics.median(times['others']):.1f}"
    )
    line = _line(SAVE, _ratio(times, "ours", "torch"), 1.3, "x", note)
    return [line, _stall(megabytes, rounds)]


def _in(path: Path, work: Callable[[Path], None]) -> Callable[[], float]:
    """Times ``work(path)``, and removes what it has made."""

    def once() -> float:
        began = time.perf_counter()
        work(path)
        taken = time.perf_counter() - began
        if path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            os.sync()
        return taken

    return once


def _ms(values: list[float]) -> str:
    return f"{statistics.median(values) * 1e3:.1f}"


class _Timed(lw.Checkpoint):
    """Notes how long training waits for a save, and how long a copy of its tensors takes at that moment."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.stalls, self.clones, self.copies = list[float](), list[float](), list[float]()
        self.kept: list[torch.Tensor] = []

    def save(self, run: lw.Run) -> Any:
        self.finish(run)  # the one before has landed: what is timed is this one alone
        weights = [p.detach() for model in run.models.values() for p in model.parameters()]
        began = time.perf_counter()
        clones = [p.clone() for p in weights]
        self.clones.append(time.perf_counter() - began)
        self.kept = self.kept or clones
        del clones
        began = time.perf_counter()
        for mine, p in zip(self.kept, weights, strict=True):
            mine.copy_(p)
        self.copies.append(time.perf_counter() - began)
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
    stalls, clones, copies = saver.stalls[2:], saver.clones[2:], saver.copies[2:]
    note = (
        f"{megabytes} MB of weights: training waits {_ms(stalls)} ms; fresh clones take {_ms(clones)} ms, a copy into "
        f"memory that is there already {_ms(copies)} ms"
    )
    ratio = statistics.median(a / b for a, b in zip(stalls, clones, strict=True))
    return _line(STALL, ratio, 1.0, "x", note)


def _step(rounds: int, steps: int) -> dict[str, Any]:
    """What a step pays that could be resumed from: a Checkpoint asked, and the position in a DataLoader kept."""
    net = nn.Linear(4, 1)
    task = lw.Supervised(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.01))
    saver = lw.Checkpoint(at_end=False)
    loader = DataLoader(range(steps * 32), 32, shuffle=True, collate_fn=len)  # type: ignore[arg-type]

    def go_through(batches: Iterable[Any]) -> list[float]:
        return [time.perf_counter() for _ in batches]

    with memory() as root:
        trainer = lw.Trainer(steps=2, folder=root, progress=False, checkpoint=saver)
        run = trainer.fit(task, [(torch.randn(4, 4), torch.zeros(4, 1))] * 2)
        work = {
            "asked": lambda: go_through(saver.due(run, validated=False) for _ in range(steps)),
            "nothing": lambda: go_through(None for _ in range(steps)),
            "ours": lambda: go_through(TorchLoader(loader).at(0, 0)),
            "theirs": lambda: go_through(loader),
        }
        windows = _windows(rounds, work)
    # in the median a machine that does other things as well would be measured
    us = {name: statistics.quantiles(found, n=20)[0] * 1e6 for name, found in windows.items()}
    middle = {name: statistics.median(found) * 1e6 for name, found in windows.items()}
    asked, kept = us["asked"] - us["nothing"], us["ours"] - us["theirs"]
    median = middle["asked"] - middle["nothing"] + middle["ours"] - middle["theirs"]
    note = (
        f"{asked:.1f} us for a Checkpoint that is not due; {kept:.1f} us for the position in a DataLoader, to a batch "
        f"of 32 indices in {us['theirs']:.0f} us"
    )
    return _line(STEP, asked + kept, 5.0, "us", note, median)


def _windows(rounds: int, work: dict[str, Callable[[], list[float]]]) -> dict[str, list[float]]:
    """Seconds of a step by the moments of all: the means of windows of 100 steps, of all rounds."""
    windows: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds):
        for name in list(work)[:: 1 if number % 2 else -1]:
            stamps = work[name]()
            windows[name] += [(b - a) / 100 for a, b in zip(stamps[::100], stamps[100::100], strict=False)]
    return windows
