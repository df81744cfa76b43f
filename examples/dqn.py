"""DQN (Mnih et al. 2015) with soft updates (Lillicrap et al. 2016): a value of each action learns to balance a pole.

Three phases a step: act, learn from a draw of the replay buffer, let the target network follow. Networks, buffer and
poles are in every checkpoint: a killed run goes on to the same bits. CartPole-v1, to a mean return of 195.
Run: python examples/dqn.py [--steps 6000] [--solved 195]
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from typing import Any

import torch
from cartpole import Poles, Replay, mean_return
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

import loopwright as lw

ENVS = 8  # poles at a time


class DQN(lw.Task):
    """``value`` learns the return of each action; ``target`` is what it learns from."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        self.target = deepcopy(self.value).requires_grad_(False)
        self.poles, self.replay = Poles(ENVS), Replay(10_000)

    @torch.no_grad()
    def act(self, clock: Tensor) -> None:
        """Push each pole, at random less and less often; what came of it goes into the buffer."""
        wild = torch.rand(ENVS) < max(0.05, 1 - clock.item() / 500)
        best = self.value(self.poles.state).argmax(1)
        self.replay.add(self.poles.step(torch.where(wild, torch.randint(2, (ENVS,)), best)))

    def learn(self, clock: Tensor) -> Tensor:
        state, (action, reward, goes_on), after = self.replay.draw(128)
        best = self.target(after).gather(1, self.value(after).argmax(1, keepdim=True))[:, 0]  # double DQN
        chosen = self.value(state).gather(1, action.long()[:, None])[:, 0]
        return smooth_l1_loss(chosen, reward + 0.99 * goes_on * best.detach())

    @torch.no_grad()
    def follow(self, clock: Tensor) -> None:
        torch._foreach_lerp_(list(self.target.parameters()), list(self.value.parameters()), 0.01)

    def phases(self) -> list[lw.Phase]:
        act = lw.Phase("act", self.act, optimizers=())
        warm = {"every": lambda run: run.progress.step >= 100}  # there is something to draw from
        learn = lw.Phase("learn", self.learn, optimizers="main", clip_norm=10.0, **warm)
        return [act, learn, lw.Phase("follow", self.follow, optimizers=(), **warm)]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.value.parameters(), lr=1e-3)

    def validation_step(self, seed: Tensor) -> dict[str, float]:
        return {"return": mean_return(lambda state: self.value(state).argmax(1), ENVS, int(seed))}


def main(steps: int = 6000, solved: float = 195.0, resume: Any = None, **settings: Any) -> lw.Run:
    """Train until the greedy policy is at ``solved``; its mean return is ``run.metrics["valid/return"]``."""
    torch.manual_seed(0)
    stop = lw.EarlyStopping("valid/return", mode="max", patience=steps, stop_at=solved)
    given = {"steps": steps, "validate_every": "250 steps", "seed": 0, "name": "dqn", "callbacks": [stop]}
    clock, unseen = (lw.Loader(numbers, batch_size=1) for numbers in (torch.arange(10**6), torch.tensor([10**6])))
    run = lw.Trainer(**{**given, **settings}).fit(DQN(), clock, unseen, resume=resume)
    print(f"{run.stop_reason or 'not solved'}: a mean return of {run.metrics['valid/return']:.0f}")
    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--solved", type=float, default=195.0)
    main(**vars(parser.parse_args()))
