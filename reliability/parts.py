"""Small data, nets and callbacks that have state wherever training can have it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Sampler

import loopwright as lw

FEATURES, CLASSES = 6, 3


class Ledger:
    """The sample ids of every batch that was trained on, in order. It is the harness's own: no checkpoint holds it."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def note(self, ids: Tensor) -> None:
        if torch.is_grad_enabled():  # not those of a validation
            self.batches.append(ids.tolist())

    def inputs(self, batch: Any) -> Tensor:
        """What ``lw.Supervised(inputs=...)`` gives to the net."""
        self.note(batch[2])
        return batch[0]


def arrays(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """n samples: features (n, 6), classes (n,), ids (n,)."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, FEATURES, generator=generator)
    return x, torch.randint(CLASSES, (n,), generator=generator), torch.arange(n)


class Noisy(Dataset[Any]):
    """Draws from all three global generators when a sample is read, as augmentation does."""

    def __init__(self, n: int) -> None:
        self.x, self.y, self.ids = arrays(n)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        noise = torch.rand(FEATURES) + random.random() + float(np.random.rand())
        return self.x[i] + noise, self.y[i], self.ids[i]


class Ragged(Dataset[Any]):
    """Sequences of 1 to 9 tokens."""

    def __init__(self, n: int) -> None:
        generator = torch.Generator().manual_seed(2)
        self.lengths = torch.randint(1, 10, (n,), generator=generator).tolist()
        self.tokens = [torch.randint(20, (length,), generator=generator) for length in self.lengths]
        self.y = torch.randint(CLASSES, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        return self.tokens[i], self.y[i], i


def pad(samples: list[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (batch, longest), padded with zeros; classes; ids."""
    tokens, y, ids = zip(*samples, strict=True)
    return nn.utils.rnn.pad_sequence(list(tokens), batch_first=True), torch.stack(y), torch.tensor(ids)


class Buckets(Sampler[list[int]]):
    """A user's own batch sampler: shuffles, sorts pieces by length, shuffles the batches."""

    def __init__(self, lengths: list[int], batch_size: int) -> None:
        self.lengths, self.batch_size = lengths, batch_size

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order, piece = torch.randperm(len(self.lengths)).tolist(), 8 * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), piece):
            part = sorted(order[start : start + piece], key=lambda i: self.lengths[i])
            batches += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        random.shuffle(batches)
        yield from batches


class Shards(IterableDataset[Any]):
    """A stream over shards in an order of its own each epoch, with a shuffle buffer; it can say where it stands."""

    def __init__(self, n: int, shard: int = 10, buffer: int = 16) -> None:
        self.x, self.y, self.ids = arrays(n)
        self.n, self.shard, self.buffer = n, shard, buffer
        self.epoch, self.read, self.held = 0, 0, list[int]()
        self.random = random.Random(4)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _order(self) -> list[int]:
        shards = list(range(0, self.n, self.shard))
        random.Random(self.epoch).shuffle(shards)
        return [i for start in shards for i in range(start, min(start + self.shard, self.n))]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = self._order()
        while self.read < len(order) or self.held:
            while self.read < len(order) and len(self.held) < self.buffer:
                self.held.append(order[self.read])
                self.read += 1
            i = self.held.pop(self.random.randrange(len(self.held)))
            yield self.x[i], self.y[i], self.ids[i]
        self.read = 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "read": self.read, "held": list(self.held), "random": self.random.getstate()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.read, self.held = state["epoch"], state["read"], list(state["held"])
        self.random.setstate(state["random"])


class Pooled(nn.Module):
    """The mean of token embeddings, and a score for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.scores = nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.scores(self.embedding(tokens).mean(1))
        return out


class Walks(Dataset[Any]):
    """Sequences of 11 steps whose noise is drawn when they are read, and what they add up to."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        x = torch.randn(11, FEATURES)
        return x, x.cumsum(0), i


class Recurrent(nn.Module):
    """An LSTM that predicts at every step; called with what it carries and returning it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.drop, self.out = nn.LSTM(FEATURES, 5, batch_first=True), nn.Dropout(0.2), nn.Linear(5, FEATURES)

    def forward(self, x: Tensor, carry: Any = None) -> tuple[Tensor, Any]:
        states, carry = self.lstm(x, carry)
        return self.out(self.drop(states)), carry


class Counting(nn.Module):
    """A net that knows how often it was trained: ``count`` is a buffer."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.count += self.training
        out: Tensor = self.net(x)
        return out


def mlp(*, dropout: float = 0.0, batch_norm: bool = False, outputs: int = CLASSES) -> nn.Sequential:
    """Two layers."""
    layers: list[nn.Module] = [nn.Linear(FEATURES, 10)]
    layers += [nn.BatchNorm1d(10)] if batch_norm else []
    layers += [nn.Tanh()]
    layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(10, outputs))


class Ema(lw.Callback):
    """An exponential moving average of the weights, kept in checkpoints."""

    def __init__(self, decay: float = 0.9) -> None:
        self.decay, self.shadow = decay, dict[str, Tensor]()

    def on_fit_start(self, run: lw.Run) -> None:
        self.shadow = {name: p.detach().clone() for name, p in run.models["model"].named_parameters()}

    def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
        for name, p in run.models["model"].named_parameters():
            self.shadow[name].lerp_(p.detach(), 1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": dict(self.shadow)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.shadow = {name: value.clone() for name, value in state["shadow"].items()}


class Gan(lw.Task):
    """Two objectives with an optimizer each; the generator moves at every second step."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.gen, self.disc = mlp(outputs=FEATURES, dropout=0.2), mlp(outputs=1)
        self.__dict__["ledger"] = ledger

    def configure_optimizers(self) -> dict[str, Any]:
        disc = torch.optim.SGD(self.disc.parameters(), lr=0.05, momentum=0.9)
        return {"gen": torch.optim.Adam(self.gen.parameters(), lr=0.01, betas=(0.5, 0.99)), "disc": disc}

    def phases(self) -> list[lw.Phase]:
        return [
            lw.Phase("disc", self.disc_step, optimizers="disc", clip_norm=1.0),
            lw.Phase("gen", self.gen_step, optimizers="gen", every=2),
        ]

    def _fake(self, real: Tensor) -> Tensor:
        out: Tensor = self.gen(torch.randn_like(real))
        return out

    def disc_step(self, batch: Any) -> dict[str, Tensor]:
        real, _, ids = batch
        self.ledger.note(ids)
        wrong = nn.functional.softplus(self.disc(self._fake(real).detach())).mean()
        return {"loss": wrong + nn.functional.softplus(-self.disc(real)).mean(), "wrong": wrong.detach()}

    def gen_step(self, batch: Any) -> dict[str, Tensor]:
        return {"loss": nn.functional.softplus(-self.disc(self._fake(batch[0]))).mean()}
