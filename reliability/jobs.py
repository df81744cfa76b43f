"""What the forked children do: train a variant, or something large enough for its saves to take a while."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import loopwright as lw
from reliability import worlds
from reliability.phases import waits
from reliability.server import say
from reliability.trial import NAME, digests, observe, seed_all, train
from reliability.variants import EXTRAS, VARIANTS

LAYERS, WIDTH = 4, 512  # 4 MB of weights, as much again of momentum
SAVES = 6


def variant(name: str, root: str, seed: int, every: str, keep: int, result: str) -> None:
    """Train a variant, resuming where it can; at the end write what it has come to."""
    saver = lw.Checkpoint(every, keep=keep)
    make = {**VARIANTS, **EXTRAS}[name]
    run, _, ledger = train(make, Path(root), seed=seed, resume="auto", checkpoint=saver)
    resumed = None if run.resumed_from is None else run.resumed_from.name
    found = {"digests": digests(observe(run)), "batches": ledger.batches, "resumed": resumed}
    _write(Path(result), found)


class Announced(lw.Checkpoint):
    """Says when it begins to save (the number of the step) and when ``save`` has come back (minus that number)."""

    def save(self, run: lw.Run) -> Path | None:
        say(run.progress.step)
        path = super().save(run)
        say(-run.progress.step)
        return path


def saving(root: str, seed: int, keep: int, background: bool, result: str) -> None:
    """Six steps with a checkpoint after each."""
    seed_all(seed)
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    task = lw.Supervised(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9))
    more: Any = {"async_save": True} if background else {}
    saver = Announced("1 steps", keep=keep, **more)
    trainer = lw.Trainer(steps=SAVES, folder=root, name=NAME, progress=False, checkpoint=saver)
    swept = None
    x = torch.randn(SAVES * 8, WIDTH, generator=torch.Generator().manual_seed(1))

    def look(run: lw.Run) -> None:  # the first moment at which training has started again
        nonlocal swept
        if swept is None and run.folder is not None:
            swept = leftovers(run.folder)

    trainer.on(lw.Event.STEP_START)(look)
    run = trainer.fit(task, lw.Loader((x, x), 8, shuffle=True), resume="auto")
    assert run.folder is not None
    resumed = None if run.resumed_from is None else int(run.resumed_from.name.removeprefix("step-"))
    _write(
        Path(result),
        {
            "digests": digests({k: v for k, v in observe(run).items() if k != "log"}), "resumed": resumed,
            "leftovers": swept or [], "at the end": leftovers(run.folder), "folder": str(run.folder),
        },
    )  # fmt: skip


def leftovers(folder: Path) -> list[str]:
    """Files of killed writes in a run folder."""
    return sorted(p.name for p in (folder / "checkpoints").glob(".*"))


def ranks(row: str, result: str, **settings: Any) -> None:
    """Signals or faults in ranks: the row of this name of ``worlds``."""
    _write(Path(result), getattr(worlds, row)(**settings))


def _write(path: Path, found: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(found))
    os.replace(temporary, path)


JOBS: dict[str, Callable[..., None]] = {"variant": variant, "saving": saving, "waits": waits, "ranks": ranks}
