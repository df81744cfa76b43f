"""The same GAN with many processes: its weights are those of one, whoever has how much of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import loopwright as lw
from cases_of_ranks import Gan

X = torch.randn(400, 5, generator=torch.Generator().manual_seed(1))


def gan() -> Any:
    torch.manual_seed(0)
    task = Gan()
    trainer = lw.Trainer(steps=4, seed=1, folder=None, progress=False, strategy=lw.DDP(timeout=240))
    run = trainer.fit(task, lw.Loader((X, X[:, 0]), 200, shuffle=True))
    return [p.detach().clone() for p in task.parameters()], run.progress.phase_steps


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.capability("PL-18")
@pytest.mark.parametrize("world", [8, 32, 128])
def test_a_gan_on_many_processes_has_the_weights_of_one(world: int) -> None:
    """Two networks, two optimizers, one of them every second step: 8, 32 and 128 processes run the code of one."""
    ranks, (alone, steps) = lw.launch(gan, world), gan()
    assert all(phase_steps == steps == {"disc": 4, "gen": 2} for _, phase_steps in ranks)
    for weights, _ in ranks:
        assert all(map(torch.equal, weights, ranks[0][0]))
    for mine, one in zip(ranks[0][0], alone, strict=True):
        torch.testing.assert_close(mine, one, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.capability("B-11")
def test_a_gan_on_two_processes_has_the_weights_of_one_without_find_unused() -> None:
    """A GAN in two phases on 2 ranks, with DDP as it comes (no find_unused): all move alike, and as one rank does."""
    assert not lw.DDP().find_unused
    ranks, (alone, steps) = lw.launch(gan, 2), gan()
    assert all(phase_steps == steps == {"disc": 4, "gen": 2} for _, phase_steps in ranks)
    assert all(map(torch.equal, ranks[0][0], ranks[1][0]))
    for mine, one in zip(ranks[0][0], alone, strict=True):
        torch.testing.assert_close(mine, one, atol=1e-6, rtol=0)
