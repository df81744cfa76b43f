"""The plan of an order: how many batches an epoch has and how many samples each of them, known without reading."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopwright.errors import CheckpointError

__all__ = ["Plan", "check_state", "shuffled"]


class Plan(NamedTuple):
    """``length`` samples in batches of ``batch_size``, the short last one left out with ``drop_last``.

    >>> plan = Plan(10, 4, False)
    >>> plan.batches, list(plan.sizes(1))
    (3, [4, 2])
    """

    length: int
    batch_size: int
    drop_last: bool

    @property
    def batches(self) -> int:
        return self.length // self.batch_size if self.drop_last else -(-self.length // self.batch_size)

    @property
    def samples(self) -> int:
        """Samples that an epoch uses."""
        return min(self.length, self.batches * self.batch_size)

    def sizes(self, batch: int) -> Iterator[int]:
        """Samples in each batch from ``batch`` on."""
        return (min(self.batch_size, self.length - i * self.batch_size) for i in range(batch, self.batches))

    def state_dict(self) -> dict[str, Any]:
        return {"length": self.length, "batch_size": self.batch_size, "drop_last": self.drop_last}


def check_state(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming what differs, unless ``saved`` has every value of ``own``."""
    missing = object()
    differ = [
        (name, saved.get(name, missing), value) for name, value in own.items() if saved.get(name, missing) != value
    ]
    if differ:
        told = ", ".join(
            f"{name} was {'not noted' if was is missing else repr(was)} and is {now!r}" for name, was, now in differ
        )
        raise CheckpointError(
            f"the saved position does not fit this data: {told}. Pass the same data, in the same kind of loader, as in "
            "the saved run"
        )


def shuffled(length: int, key: int, epoch: int) -> Tensor:
    """Permutation of ``range(length)`` (int64) that depends on ``key`` and ``epoch`` and on nothing else.

    >>> torch.equal(shuffled(5, key=1, epoch=0), shuffled(5, key=1, epoch=0))
    True
    """
    # hashed: the generator keeps 32 bits of a seed, and key + epoch would give neighbouring keys the same orders
    digest = hashlib.blake2b(f"order {key} {epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randperm(length, generator=generator, device="cpu")
