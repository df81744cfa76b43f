"""The fast path: a plain DataLoader over tensors, served with one ``index_select`` a tensor instead of collating."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from loopwright import rng
from loopwright.data.generators import Streams
from loopwright.data.plan import Plan, check_state
from loopwright.data.share import Cut

__all__ = ["Gather", "is_gatherable", "rows_of"]


class Gather:
    """A source with the batches and the global draws of the DataLoader, at the same moments, in less time.

    Every batch is a list of tensors in memory of its own, as from the loader itself. Only for a loader that
    ``is_gatherable``. Exact: a resume needs the seed of the epoch's order and reads nothing that is skipped.

    >>> loader = DataLoader(TensorDataset(torch.arange(5)), batch_size=2)
    >>> list(Gather(loader).at(0, 1))
    [[tensor([2, 3])], [tensor([4])]]
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader, self.streams = loader, Streams({})  # tensors draw nothing
        sampler: Any = loader.batch_sampler
        self._plan = Plan(len(sampler.sampler), sampler.batch_size, sampler.drop_last)
        self._shuffled = type(loader.sampler) is RandomSampler
        self._seed: int | None = None
        self._epoch: int | None = None  # the epoch of that seed
        self.cut: Cut | None = None  # the part of this rank, among several

    @property
    def batches(self) -> int:
        return self._plan.batches

    @property
    def exact(self) -> list[str]:
        return []

    def sizes(self, batch: int) -> Iterator[int]:
        return self._plan.sizes(batch)

    def at(self, epoch: int, batch: int) -> Iterator[Any]:
        """An epoch that was begun, here or in the saved run, goes on in its order; any other one begins."""
        if batch == 0 or epoch != self._epoch:
            self._open()
            self._epoch = epoch
        return self._batches(batch)

    def _open(self) -> None:
        """Draw what torch draws when the iterator is made: the workers' seed, and with workers the order's."""
        loader = self.loader
        if self._epoch is None or not loader.persistent_workers:
            draw_seed()
        self._seed = None
        if loader.num_workers and self._shuffled:
            self._seed = draw_seed()  # workers are given their first batches at once

    def _batches(self, skip: int) -> Iterator[Any]:
        if self._shuffled and self._seed is None:
            self._seed = draw_seed()  # without workers torch draws it with the first batch
        tensors, index = rows_of(self.loader.dataset)
        order = self._order(index, tensors[0].device)[skip * self._plan.batch_size : self._plan.samples]
        pin, select, cut = self.loader.pin_memory, torch.index_select, self.cut
        if not len(order):
            return
        if cut is not None:
            for number, rows in enumerate(order.split(self._plan.batch_size), skip):
                mine = cut.rows(rows, number)
                yield cut.given(None if mine is None else [select(t, 0, mine) for t in tensors], len(rows), number)
            return
        for rows in order.split(self._plan.batch_size):  # views of one large gather would be unaligned: other bits
            if pin:
                yield [select(t, 0, rows).pin_memory() for t in tensors]
            else:
                yield [select(t, 0, rows) for t in tensors]

    def _order(self, index: Tensor | None, device: torch.device) -> Tensor:
        length = self._plan.length
        if self._seed is None:
            order = torch.arange(length, device="cpu")
        else:
            generator = torch.Generator(device="cpu").manual_seed(self._seed)
            order = torch.randperm(length, generator=generator, device="cpu")
        return (order if index is None else index[order]).to(device)

    def state_dict(self) -> dict[str, Any]:
        return {**self._plan.state_dict(), "seed": self._seed, "epoch": self._epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError if the data or the batches of the saved run have another size."""
        check_state(self._plan.state_dict(), state)
        self._seed, self._epoch = state["seed"], state["epoch"]


def draw_seed() -> int:
    """The draw that torch makes from the default generator for a seed."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_().item())


def rows_of(dataset: object) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Tensors of a TensorDataset, or of a Subset of one, and the rows that the subset chose (None: all)."""
    if isinstance(dataset, Subset):
        tensors, outer = rows_of(dataset.dataset)
        index = torch.as_tensor(dataset.indices, device="cpu")
        return tensors, (index if outer is None else outer[index])
    assert isinstance(dataset, TensorDataset)
    return dataset.tensors, None


def is_gatherable(loader: DataLoader[Any]) -> bool:
    """True where ``Gather`` gives what ``loader`` would give: exact types and default parts only."""
    dataset, sampler = loader.dataset, loader.sampler
    return (
        type(loader) is DataLoader
        and loader.collate_fn is default_collate
        and type(loader.batch_sampler) is BatchSampler
        and loader.batch_sampler.sampler is sampler
        and loader.worker_init_fn is None
        and loader.generator is None
        and (not loader.pin_memory or torch.cuda.is_available())
        and _has_default_order(sampler, dataset)
        and has_plain_rows(dataset)
        and not (loader.num_workers and rows_of(dataset)[0][0].device.type != "cpu")
        and _proved()
    )


def _has_default_order(sampler: object, dataset: Any) -> bool:
    if type(sampler) is RandomSampler:
        plain = sampler.generator is None and not sampler.replacement
        return plain and sampler.data_source is dataset and sampler.num_samples == len(dataset)
    return type(sampler) is SequentialSampler and sampler.data_source is dataset


def has_plain_rows(dataset: object) -> bool:
    """True if selecting rows of the dataset's tensors gives what collating its samples gives, strides included."""
    if type(dataset) is Subset:
        return has_plain_rows(dataset.dataset) and _is_index(dataset)
    return (
        type(dataset) is TensorDataset
        and len(dataset.tensors) > 0
        and all(_is_plain(t) and t.device == dataset.tensors[0].device for t in dataset.tensors)
    )


def _is_index(subset: Subset[Any]) -> bool:
    try:
        index = torch.as_tensor(subset.indices, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return False
    size = len(subset.dataset)  # type: ignore[arg-type]
    whole = not (index.is_floating_point() or index.is_complex() or index.dtype is torch.bool)
    return index.dim() == 1 and whole and bool(((index >= 0) & (index < size)).all())


def _is_plain(t: Tensor) -> bool:
    plain = type(t) is Tensor and t.layout is torch.strided and not (t.requires_grad or t.is_quantized)
    if not plain or t.dim() == 0 or t.is_conj() or t.is_neg() or not (t.dim() <= 2 or t.is_contiguous()):
        return False  # more than 2 dimensions in another memory order: collating would keep that order
    try:
        t[:1].index_select(0, torch.zeros(min(1, len(t)), dtype=torch.int64, device=t.device))
    except RuntimeError:
        return False  # a dtype that cannot be selected from
    return True


_proof = threading.Lock()
_verdict: list[bool] = []


def _proved() -> bool:
    """The fast path shows once a process, on five samples, that it gives what torch's loader gives, or is not used."""
    with _proof:
        if not _verdict:
            with rng.forked():
                kinds = [(shuffle, drop_last) for shuffle in (False, True) for drop_last in (False, True)]
                _verdict.append(all(_agrees(shuffle, drop_last) for shuffle, drop_last in kinds))
        return _verdict[0]


def _agrees(shuffle: bool, drop_last: bool) -> bool:
    dataset = TensorDataset(torch.arange(5.0, device="cpu"), torch.arange(10, device="cpu").view(5, 2))
    loader = DataLoader(dataset, 2, shuffle=shuffle, drop_last=drop_last)
    torch.default_generator.manual_seed(7)
    theirs, after = list(loader), torch.get_rng_state()
    torch.default_generator.manual_seed(7)
    ours = list(Gather(loader).at(0, 0))
    return (
        torch.equal(torch.get_rng_state(), after)
        and len(ours) == len(theirs)
        and all(
            type(a) is type(b) and len(a) == len(b) and all(map(torch.equal, a, b))
            for a, b in zip(ours, theirs, strict=True)
        )
    )
