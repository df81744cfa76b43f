"""The plan of an order: which samples each batch of an epoch holds, known without reading any of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from loopwright.errors import CheckpointError, SettingError

__all__ = ["Blocks", "Plan", "Planned", "check_state", "order_of", "seed_from", "shuffled"]

Part = Callable[[int, int], Tensor]  # the sample indices (int64) at positions start to stop of an epoch
_LARGE = 10_000_000  # samples from which a permutation is computed piece by piece; it would take 8 bytes a sample
_AHEAD = 65_536  # indices computed in one go


class Plan(NamedTuple):
    """``length`` samples in batches of ``batch_size``, the short last one left out with ``drop_last``.

    >>> plan = Plan(10, 4, False)
    >>> plan.batches, list(plan.sizes(1))
    (3, [4, 2])
    """

    length: int
    batch_size: int
    drop_last: bool = False

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


class Planned(Sequence[Tensor]):
    """The batches of a plan: indices are computed when they are asked for, so that any of them costs the same.

    >>> list(Planned(Plan(5, 2), torch.arange))
    [tensor([0, 1]), tensor([2, 3]), tensor([4])]
    """

    def __init__(self, plan: Plan, part: Part) -> None:
        self.plan, self.part = plan, part

    def __len__(self) -> int:
        return self.plan.batches

    @overload
    def __getitem__(self, i: int) -> Tensor: ...
    @overload
    def __getitem__(self, i: slice) -> list[Tensor]: ...
    def __getitem__(self, i: int | slice) -> Tensor | list[Tensor]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        start = range(len(self))[i] * self.plan.batch_size  # IndexError beyond the end
        return self.part(start, min(start + self.plan.batch_size, self.plan.length))

    def __iter__(self) -> Iterator[Tensor]:
        return self.since(0)

    def since(self, batch: int) -> Iterator[Tensor]:
        """The batches from ``batch`` on, many at a time."""
        size, samples = self.plan.batch_size, self.plan.samples
        step = max(1, _AHEAD // size) * size
        for start in range(batch * size, samples, step):
            yield from self.part(start, min(start + step, samples)).split(size)


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


def seed_from(*parts: object) -> int:
    """A seed of 63 bits that depends on all of ``parts``.

    Hashed: generators keep 32 bits of a seed, and sums such as key + epoch would give neighbouring keys the same one.
    """
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def shuffled(length: int, key: int, epoch: int, *more: object) -> Tensor:
    """Permutation of ``range(length)`` (int64) that depends on the other arguments and on nothing else.

    >>> torch.equal(shuffled(5, 1, 0), shuffled(5, 1, 0))
    True
    """
    generator = torch.Generator(device="cpu").manual_seed(seed_from("order", key, epoch, *more))
    return torch.randperm(length, generator=generator, device="cpu")


@dataclass(frozen=True)
class Blocks:
    """Shuffle for data that does not fit in memory: ``Loader(data, shuffle=Blocks(1024))``.

    Blocks of ``size`` consecutive samples are permuted, then the samples of ``window`` blocks among each other. So at
    most ``window * size`` neighbouring samples are read at random, from ``window`` places, before the next ones are
    touched; and the order takes 8 bytes a block and 8 a sample of the window. Every sample comes once an epoch.

    Raises SettingError for a ``size`` or ``window`` below 1.

    >>> order = order_of(Blocks(2, window=2), 10, key=0, epoch=0)
    >>> sorted(order(0, 10).tolist()), sorted(order(4, 8).tolist())
    ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [4, 5, 6, 7])
    """

    size: int
    window: int = 16

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("window", self.window)):
            if type(value) is not int or value < 1:
                raise SettingError(f"Blocks({name}={value!r}); expected a whole number of at least 1")

    def order(self, length: int, key: int, epoch: int) -> Part:
        """The samples at positions ``start`` to ``stop`` of the epoch."""
        count, span = -(-length // self.size), self.window * self.size
        blocks = shuffled(count, key, epoch)
        missing = count * self.size - length  # from the last block, which comes in some window; those after it shift
        after = (int((blocks == count - 1).nonzero()) // self.window + 1) * span - missing

        @lru_cache(maxsize=1)
        def window(number: int) -> Tensor:
            chosen = blocks[number * self.window : (number + 1) * self.window]
            rows = (chosen[:, None] * self.size + torch.arange(self.size, device="cpu")).flatten()
            rows = rows[rows < length]
            return rows[shuffled(len(rows), key, epoch, "window", number)]

        def part(start: int, stop: int) -> Tensor:
            pieces = []
            while start < stop:
                shift = missing if start >= after else 0
                number, place = divmod(start + shift, span)
                pieces.append(window(number)[place : place + stop - start])
                start += len(pieces[-1])
            return torch.cat(pieces)

        return part


def order_of(shuffle: bool | Blocks, length: int, key: int, epoch: int) -> Part:
    """The order of an epoch, asked for piece by piece."""
    if not shuffle or not length:
        return partial(torch.arange, device="cpu")
    if isinstance(shuffle, Blocks):
        return shuffle.order(length, key, epoch)
    if length > _LARGE:
        return partial(scattered, length, key, epoch)
    order = shuffled(length, key, epoch)
    return lambda start, stop: order[start:stop]


def scattered(length: int, key: int, epoch: int, start: int, stop: int) -> Tensor:
    """Positions ``start`` to ``stop`` of a permutation of ``range(length)`` of which nothing is held in memory.

    A Feistel network permutes the next power of 4; what falls outside is permuted again until it is inside
    (cycle walking: Black & Rogaway 2002, "Ciphers with arbitrary finite domains").

    >>> sorted(scattered(7, 1, 0, 0, 7).tolist())
    [0, 1, 2, 3, 4, 5, 6]
    """
    half = np.uint64(((length - 1).bit_length() + 1) // 2 or 1)
    mask, shift = np.uint64((1 << int(half)) - 1), np.uint64(32)
    rounds = [np.uint64(seed_from("order", key, epoch, "round", i)) for i in range(6)]

    def permute(x: Any) -> Any:
        left, right = x >> half, x & mask
        for number in rounds:
            mixed = (right ^ number) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> shift)) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ ((mixed ^ (mixed >> shift)) & mask)
        return left << half | right

    found = permute(np.arange(start, stop, dtype=np.uint64))
    while len(outside := np.flatnonzero(found >= length)):
        found[outside] = permute(found[outside])
    return torch.from_numpy(found.astype(np.int64))
