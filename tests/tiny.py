"""Tiny real objects that several test files share: trainers that write nothing, nets, data, states as bits."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import loopwright as lw
from loopwright.events import HOOKS

Batches = list[tuple[Tensor, Tensor]]


def trainer(**settings: Any) -> lw.Trainer:
    """A Trainer that writes nothing and shows nothing."""
    return lw.Trainer(**{"folder": None, "progress": False, **settings})


def line(weight: float = 0.0, bias: float | None = None) -> nn.Linear:
    """Linear(1, 1) with a known weight; without a bias, unless one is given."""
    with torch.random.fork_rng():
        net = nn.Linear(1, 1, bias=bias is not None)
    nn.init.constant_(net.weight, weight)
    if bias is not None:
        nn.init.constant_(net.bias, bias)
    return net


def pairs(*batches: list[float]) -> Batches:
    """Batches (x, y) of columns: x as given, y = 0."""
    return [(torch.tensor(x, dtype=torch.float32).view(-1, 1), torch.zeros(len(x), 1)) for x in batches]


def mean_of_preds(preds: Tensor, target: Tensor) -> Tensor:
    """A loss whose gradient with respect to the weight of ``line`` is the mean of x."""
    return preds.mean()


def sgd_task(net: nn.Module, *, lr: float = 1.0, loss: Any = mean_of_preds, **settings: Any) -> lw.Supervised:
    return lw.Supervised(net, loss, torch.optim.SGD(net.parameters(), lr=lr), **settings)


def classifier(*, dropout: float = 0.0, batch_norm: bool = False, seed: int = 1) -> nn.Sequential:
    """5 features, 3 classes; the weights depend on ``seed`` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Linear(5, 8)]
        layers += [nn.BatchNorm1d(8)] if batch_norm else []
        layers += [nn.Tanh()]
        layers += [nn.Dropout(dropout)] if dropout else []
        return nn.Sequential(*layers, nn.Linear(8, 3))


def samples(n: int = 37, *, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator), torch.randint(3, (n,), generator=generator)


class Noisy(Dataset[Any]):
    """Adds noise from all three global generators when a sample is read, as augmentation does."""

    def __init__(self, n: int = 37) -> None:
        self.x, self.y = samples(n)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + torch.rand(5) + random.random() + float(np.random.rand()), self.y[i]


def loader(n: int = 37, *, noisy: bool = False, **settings: Any) -> DataLoader[Any]:
    return DataLoader(Noisy(n) if noisy else TensorDataset(*samples(n)), **settings)


def seed_all(seed: int = 0) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def bits(*objects: Any) -> list[Any]:
    """Copies of the states of modules and optimizers, and of all global generators as they stand now."""
    states = [_copied(obj.state_dict()) for obj in objects]
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    return [*states, torch.get_rng_state(), python, _copied(numpy)]


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value.astype(np.int64))
    if isinstance(value, Mapping):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, (list, tuple)) else value


def same(a: Any, b: Any) -> bool:
    """True if two nested states are equal, tensors bit for bit (NaN equals NaN)."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (
            a.dtype == b.dtype
            and torch.equal(torch.isnan(a), torch.isnan(b))
            and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        )
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(v, w) for v, w in zip(a, b, strict=True))
    return bool(a == b)


def recorder(seen: list[Any], *, note: Callable[..., Any] = lambda name, run, args: name) -> lw.Callback:
    """A callback that overrides every hook and appends ``note(name, run, args)`` to ``seen``."""

    def hook(name: str) -> Callable[..., Any]:
        def called(self: Any, run: lw.Run, *args: Any) -> Any:
            seen.append(note(name, run, args))
            return args[0] if name.startswith("map_") else None

        called.__name__ = name
        return called

    made = type("Recorder", (lw.Callback,), {name: hook(name) for name in HOOKS})()
    assert isinstance(made, lw.Callback)
    return made


def acts(**hooks: Callable[..., Any]) -> lw.Callback:
    """A callback made of functions: ``acts(map_loss=lambda run, loss, *_: 2 * loss)``."""

    def method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(self: Any, run: lw.Run, *args: Any) -> Any:
            return function(run, *args)

        called.__name__ = name
        return called

    made = type("Acts", (lw.Callback,), {name: method(name, f) for name, f in hooks.items()})()
    assert isinstance(made, lw.Callback)
    return made
