"""Small images, a net for them, and what callbacks make of their batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import loopwright as lw
from tiny import acts, sgd_task, trainer

N, SIDE = 6, 8  # as many images as classes: a row of the soft targets tells who was mixed, and by what share


def images(batches: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.rand(N, 2, SIDE, SIDE, generator=generator), torch.arange(N)) for _ in range(batches)]


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(2 * SIDE * SIDE, N))


def spy(seen: list[Any]) -> lw.Callback:
    def note(run: lw.Run, batch: Any) -> Any:
        seen.append(batch)
        return batch

    return acts(map_batch=note)


def seen_through(*callbacks: lw.Callback, data: Any = None, **settings: Any) -> list[Any]:
    """The batches that come out of ``callbacks``."""
    seen: list[Any] = []
    task = sgd_task(net(), lr=0.01, loss=nn.CrossEntropyLoss())
    trainer(**{"epochs": 1, "seed": 7, "callbacks": [*callbacks, spy(seen)]} | settings).fit(task, data or images())
    return seen
