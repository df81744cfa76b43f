"""REINFORCE (Williams 1992): a policy learns to balance a pole, 16 episodes an optimizer step.

A batch is a seed, and the step plays its episodes with the policy as it is: the data of reinforcement learning is made
inside the step. Actions are drawn by torch's generator, which is in every checkpoint, so that a run that was killed
goes on to the same bits. Real task: CartPole-v1 of gymnasium, solved at a mean return of 475 of at most 500.
Run: python examples/reinforce.py [--steps 150] [--solved 475]
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import loopwright as lw


class Reinforce(lw.Task):
    """The policy gives the probability of a push to the right."""

    def __init__(self, episodes: int = 16) -> None:
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1), nn.Flatten(-2))
        self.envs = gymnasium.make_vec("CartPole-v1", episodes, vectorization_mode="vector_entry_point")

    @torch.no_grad()
    def play(self, seed: Tensor, *, greedy: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """One episode in each env: states [T, E, 4], actions [T, E], and 1.0 where an episode still goes on [T, E]."""
        state = torch.from_numpy(self.envs.reset(seed=int(seed))[0])
        alive, steps = torch.ones(len(state)), []
        while alive.any():
            push = self.policy(state).sigmoid()
            right = push > 0.5 if greedy else torch.rand(len(push)) < push
            steps.append((state, right.float(), alive))
            seen, _, ended, cut, _ = self.envs.step(right.long().numpy())
            state, alive = torch.from_numpy(seen), alive * torch.from_numpy(~(ended | cut))
        states, actions, lives = (torch.stack(part) for part in zip(*steps, strict=True))
        return states, actions, lives

    def training_step(self, seed: Tensor) -> dict[str, Tensor]:
        states, actions, alive = self.play(seed)
        discount = 0.99 ** torch.arange(len(alive))[:, None]
        to_go = (alive * discount).flip(0).cumsum(0).flip(0) / discount  # every step that is survived is worth 1
        better = (to_go - to_go[alive > 0].mean()) / to_go[alive > 0].std()
        surprise = binary_cross_entropy_with_logits(self.policy(states), actions, reduction="none")
        return {"loss": (surprise * better * alive).sum() / alive.sum(), "return": alive.sum(0).mean()}

    def validation_step(self, seed: Tensor) -> dict[str, Tensor]:
        return {"return": self.play(seed, greedy=True)[2].sum(0).mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.policy.parameters(), lr=0.03)


def main(steps: int = 150, solved: float = 475.0, resume: Any = None, **settings: Any) -> lw.Run:
    """Train until the greedy policy is at ``solved``; its mean return is ``run.metrics["valid/return"]``."""
    torch.manual_seed(0)
    trainer = lw.Trainer(**{"steps": steps, "validate_every": "5 steps", "seed": 0, "name": "reinforce", **settings})

    @trainer.on(lw.Event.VALIDATION_END)
    def stop(run: lw.Run, values: dict[str, float]) -> None:
        if values.get("valid/return", 0.0) >= solved:
            run.request_stop(f"solved after {16 * run.progress.step} episodes")

    seeds, unseen = lw.Loader(torch.arange(1000), batch_size=1), lw.Loader(torch.tensor([10**6]), batch_size=1)
    run = trainer.fit(Reinforce(), train=seeds, valid=unseen, resume=resume)
    print(f"{run.stop_reason or 'not solved'}: a mean return of {run.metrics['valid/return']:.0f}")
    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--solved", type=float, default=475.0)
    main(**vars(parser.parse_args()))
