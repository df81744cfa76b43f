"""DQN (Mnih et al. 2015) with soft updates (Lillicrap et al. 2016): a value of each action learns to balance a pole.

Three phases at every step: act in 8 environments, learn from a draw of the replay buffer, let the target network
follow. Networks, buffer and environments are in every checkpoint, so that a run that was killed at any step goes on to
the same bits. Real task: CartPole-v1 of gymnasium, up to a mean return of 195 (one at random has 20).
Run: python examples/dqn.py [--steps 6000] [--solved 195]
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

import loopwright as lw

ENVS, SIZE, WARM = 8, 10_000, 100  # environments; what the buffer holds; steps before learning begins


class DQN(lw.Task):
    """``value`` learns the return of each action; ``target`` is what it learns from."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        self.target = copy.deepcopy(self.value).requires_grad_(False)
        self.register_buffer("replay", torch.zeros(SIZE, 11))  # state, action, reward, went on, next state
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))
        make = lambda: gymnasium.make_vec("CartPole-v1", ENVS, vectorization_mode="vector_entry_point")  # noqa: E731
        self.envs, self.tests = make(), make()
        self.envs.reset(seed=0)

    def get_extra_state(self) -> dict[str, Any]:  # torch's own way for what is in a state_dict and no tensor
        named = {name: getattr(self.envs, name).copy() for name in ("state", "steps", "prev_done")}
        return {**named, "random": self.envs.np_random.bit_generator.state}

    def set_extra_state(self, saved: dict[str, Any]) -> None:
        self.envs.np_random.bit_generator.state = saved.pop("random")
        vars(self.envs).update(saved)

    @torch.no_grad()
    def act(self, clock: Tensor) -> None:
        """A step in each environment, at random less and less often; what came of it goes into the buffer."""
        state, over = torch.from_numpy(self.envs.state.T).float(), torch.from_numpy(self.envs.prev_done.copy())
        wild = torch.rand(ENVS) < max(0.05, 1 - clock.item() / 500)
        action = torch.where(wild, torch.randint(2, (ENVS,)), self.value(state).argmax(1))
        seen, reward, ended, _ = map(torch.from_numpy, self.envs.step(action.numpy())[:4])
        rows = torch.cat([state, action[:, None], reward[:, None], ~ended[:, None], seen], 1)[~over]  # else a reset
        self.replay[(self.written + torch.arange(len(rows))) % SIZE] = rows
        self.written += len(rows)

    def learn(self, clock: Tensor) -> Tensor:
        rows = self.replay[torch.randint(min(int(self.written), SIZE), (128,))]
        state, (action, reward, goes_on), after = rows[:, :4], rows[:, 4:7].unbind(1), rows[:, 7:]
        best = self.target(after).gather(1, self.value(after).argmax(1, keepdim=True))[:, 0]  # double DQN
        chosen = self.value(state).gather(1, action.long()[:, None])[:, 0]
        return smooth_l1_loss(chosen, reward + 0.99 * goes_on * best.detach())

    @torch.no_grad()
    def follow(self, clock: Tensor) -> None:
        torch._foreach_lerp_(list(self.target.parameters()), list(self.value.parameters()), 0.01)

    def phases(self) -> list[lw.Phase]:
        warm = lambda run: run.progress.step >= WARM  # noqa: E731
        return [
            lw.Phase("act", self.act, optimizers=()),
            lw.Phase("learn", self.learn, optimizers="main", every=warm, clip_norm=10.0),
            lw.Phase("follow", self.follow, optimizers=(), every=warm),
        ]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.value.parameters(), lr=1e-3)

    def validation_step(self, seed: Tensor) -> dict[str, float]:
        state, alive, total = self.tests.reset(seed=int(seed))[0], torch.ones(ENVS, dtype=torch.bool), 0.0
        while alive.any():
            total += alive.sum().item() / ENVS
            state, _, ended, cut, _ = self.tests.step(self.value(torch.from_numpy(state)).argmax(1).numpy())
            alive &= torch.from_numpy(~(ended | cut))
        return {"return": total}


def main(steps: int = 6000, solved: float = 195.0, resume: Any = None, **settings: Any) -> lw.Run:
    """Train until the greedy policy is at ``solved``; its mean return is ``run.metrics["valid/return"]``."""
    torch.manual_seed(0)
    trainer = lw.Trainer(**{"steps": steps, "validate_every": "250 steps", "seed": 0, "name": "dqn", **settings})

    @trainer.on(lw.Event.VALIDATION_END)
    def stop(run: lw.Run, values: dict[str, float]) -> None:
        if values.get("valid/return", 0.0) >= solved:
            run.request_stop(f"solved after {ENVS * run.progress.step} steps of the environment")

    clock, unseen = lw.Loader(torch.arange(10**6), batch_size=1), lw.Loader(torch.tensor([10**6]), batch_size=1)
    run = trainer.fit(DQN(), train=clock, valid=unseen, resume=resume)
    print(f"{run.stop_reason or 'not solved'}: a mean return of {run.metrics['valid/return']:.0f}")
    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--solved", type=float, default=195.0)
    main(**vars(parser.parse_args()))
