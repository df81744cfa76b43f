"""CartPole-v1 of gymnasium, several poles at a time, and what they did: both are in every checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn


class Poles(nn.Module):
    """``count`` poles to balance; one that has fallen begins anew."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.envs = make(count)
        self.envs.reset(seed=0)

    def get_extra_state(self) -> dict[str, Any]:  # torch's own way for what is in a state_dict and no tensor
        named = {name: getattr(self.envs, name).copy() for name in ("state", "steps", "prev_done")}
        return {**named, "random": self.envs.np_random.bit_generator.state}

    def set_extra_state(self, saved: dict[str, Any]) -> None:
        self.envs.np_random.bit_generator.state = saved.pop("random")
        vars(self.envs).update(saved)

    @property
    def state(self) -> Tensor:
        """Where the poles stand, [count, 4]."""
        return torch.from_numpy(self.envs.state.T).float()

    def step(self, action: Tensor) -> Tensor:
        """Push each pole; rows [n, 11] of state, action, reward, whether it stands, next state.

        A pole that had fallen has no row: the step begins it anew.
        """
        state, over = self.state, torch.from_numpy(self.envs.prev_done.copy())
        seen, reward, ended, _ = map(torch.from_numpy, self.envs.step(action.numpy())[:4])
        return torch.cat([state, action[:, None], reward[:, None], ~ended[:, None], seen], 1)[~over]


class Replay(nn.Module):
    """The newest ``size`` rows of ``Poles.step``, to draw from."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, 11))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))

    def add(self, rows: Tensor) -> None:
        self.rows[(self.written + torch.arange(len(rows))) % len(self.rows)] = rows
        self.written += len(rows)

    def draw(self, count: int) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """States [count, 4], ``(action, reward, stands)`` [count] each, next states [count, 4]."""
        rows = self.rows[torch.randint(min(int(self.written), len(self.rows)), (count,))]
        return rows[:, :4], rows[:, 4:7].unbind(1), rows[:, 7:]


def make(count: int) -> Any:
    return gymnasium.make_vec("CartPole-v1", count, vectorization_mode="vector_entry_point")


def mean_return(choose: Callable[[Tensor], Tensor], count: int, seed: int) -> float:
    """How long ``choose(state)`` keeps ``count`` poles up: the mean of one episode of each."""
    envs, alive, total = make(count), torch.ones(count, dtype=torch.bool), 0.0
    state = envs.reset(seed=seed)[0]
    while alive.any():
        total += alive.sum().item() / count
        state, _, ended, cut, _ = envs.step(choose(torch.from_numpy(state)).numpy())
        alive &= torch.from_numpy(~(ended | cut))
    return total
