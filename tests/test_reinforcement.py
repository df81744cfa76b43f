"""Reinforcement learning: REINFORCE and DQN reach what CartPole asks for, twice with the same bits, killed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import loopwright as lw
from test_examples import load
from tiny import bits, same, seed_all

QUIET: dict[str, Any] = {"progress": False, "log_every": "5 steps"}


def ended(run: lw.Run) -> list[Any]:
    records = [{k: v for k, v in record.items() if k != "seconds"} for record in run.history]
    return [*bits(*run.models.values(), *run.optimizers.values()), run.progress._replace(seconds=0.0), records]


@pytest.mark.capability("CA-21")
def test_reinforce_solves_cartpole(folder: Path) -> None:
    """REINFORCE on gymnasium's CartPole-v1 reaches its threshold of 475."""
    run = load("reinforce").main(60, folder=folder, **QUIET)
    assert run.metrics["valid/return"] >= 475
    assert run.stop_reason.startswith("solved after ")


@pytest.mark.capability("CA-32")
@pytest.mark.parametrize(("name", "steps", "stops"), [("reinforce", 6, (1, 4)), ("dqn", 140, (3, 120))])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    name: str, steps: int, stops: tuple[int, ...], tmp_path: Path
) -> None:
    """Episodes, replay buffer, target network and the environments themselves: an exact resume of reinforcement."""
    main = load(name).main
    settings = {**QUIET, "validate_every": f"{steps} steps", "solved": 501.0}
    whole = main(steps, folder=None, **settings)
    assert whole.exact is True
    seed_all(9)  # what was drawn before does not matter: the example seeds
    again = main(steps, folder=None, **settings)
    assert same(ended(again), ended(whole))
    for stop in stops:
        main(stop, folder=tmp_path / str(stop), **{**settings, "validate_every": "1000 steps"})
        run = main(steps, folder=tmp_path / str(stop), resume="auto", **settings)
        assert run.resumed_from is not None
        assert same(ended(run), ended(whole)), f"stopped after {stop}"


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.capability("CA-21")
def test_dqn_reaches_a_return_of_195(folder: Path) -> None:
    """DQN with a replay buffer and a target network that follows softly, ten times as long as at random."""
    run = load("dqn").main(4000, folder=folder, **QUIET)
    assert run.metrics["valid/return"] >= 195
    assert run.progress.phase_steps["learn"] == run.progress.step - 100
    assert not torch.equal(next(run.task.target.parameters()), next(run.task.value.parameters()))


class Following(lw.Callback):
    """Compares the target network with a mean of what it was and what it follows, at every step that learns."""

    def __init__(self) -> None:
        self.before: list[torch.Tensor] = []
        self.seen = 0

    def on_step_start(self, run: lw.Run) -> None:
        self.before = [p.clone() for p in run.task.target.parameters()]

    def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
        if "learn" in result.moved:
            for now, old, value in zip(
                run.task.target.parameters(), self.before, run.task.value.parameters(), strict=True
            ):
                torch.testing.assert_close(now, old + 0.01 * (value - old))
            self.seen += 1


@pytest.mark.capability("CA-21")
def test_dqn_is_on_its_way_after_800_steps() -> None:
    """DQN whose target network follows by a hundredth a step: its poles stand several times as long as at first."""
    following = Following()
    settings: dict[str, Any] = {**QUIET, "validate_every": "200 steps", "folder": None, "callbacks": [following]}
    run = load("dqn").main(800, **settings)
    assert run.metrics["valid/return"] >= 40  # about 10 with a target network that stays where it was
    assert following.seen == 700
