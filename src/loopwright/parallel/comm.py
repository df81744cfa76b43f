"""The other processes of a run, and what one tells the others."""

from __future__ import annotations

import io
import pickle  # noqa: TID251 - between processes of one training, as torch does; nothing of it comes from a file
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from loopwright.errors import LoopwrightError, SettingError

__all__ = ["Parts", "Ranks", "Single"]

T = TypeVar("T")

_GATHERED, _SENT = 1 << 10, 1 << 15  # bytes that travel at once; a message that is longer takes a second round
_HEAD = 8  # of them tell the length
_BUNDLE = 1 << 24  # bytes of tensors that travel together


class Single:
    """A run of one process.

    >>> Single().sum(3.0), Single().gather("mine"), Single().broadcast("mine")
    (3.0, ['mine'], 'mine')
    """

    rank = 0
    world_size = 1
    speakers: Sequence[int] = (0,)

    def sum(self, value: float) -> float:
        return value

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def first(self, make: Callable[[], T]) -> T:
        return make()

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        pass


class Ranks:
    """The processes of ``torch.distributed``'s default group; every method must be called by all of them.

    Numbers and objects go over a gloo group of their own, which waits for no device.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.speakers: Sequence[int] = range(self.world_size)
        self.group = control_group()

    def sum(self, value: float) -> float:
        """``value`` summed over all ranks, in float64."""
        return float(self.sums([value])[0])

    def sums(self, values: list[float]) -> list[float]:
        """Each of ``values`` summed over all ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device="cpu")
        dist.all_reduce(total, group=self.group)
        hold(total)
        return [float(value) for value in total.tolist()]

    def any(self, flag: bool) -> bool:
        """True if ``flag`` is true on any rank."""
        return self.sum(float(flag)) > 0

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of every rank, in their order, on every rank. It travels pickled between our own processes."""
        told = _packed(value)
        texts = self._all(_page(told, _GATHERED))
        longest = max(map(_length, texts))
        if longest > _GATHERED - _HEAD:
            texts = self._all(_page(told, longest + _HEAD))
        return [_unpacked(text) for text in texts]

    def _all(self, mine: Tensor) -> list[Tensor]:
        theirs = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(theirs, mine, group=self.group)
        hold(mine, theirs)
        return theirs

    def broadcast(self, value: Any) -> Any:
        """The ``value`` of rank 0."""
        return self.send(value)()

    def send(self, value: Any) -> Callable[[], Any]:
        """Begin to tell all ranks the ``value`` of rank 0, which what is returned gives once it is there."""
        told = _packed(value) if self.rank == 0 else b""
        first = _page(told, _SENT)
        sent = dist.broadcast(first, src=0, group=self.group, async_op=True)

        def received() -> Any:
            sent.wait()
            page, length = first, _length(first)
            if length > _SENT - _HEAD:
                page = _page(told, length + _HEAD)
                dist.broadcast(page, src=0, group=self.group)
            hold(first, page)
            return _unpacked(page)

        return received

    def first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on rank 0, which alone calls it. What it raises there is an error on every rank."""
        made: Any = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                made = make()
            except Exception as caught:
                error = caught
        made, told = self.broadcast((made, None if error is None else f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        if told is not None:
            raise LoopwrightError(f"rank 0 failed, and the others stop with it: {told}")
        return made  # type: ignore[no-any-return]

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` with those of rank 0; small ones of a kind travel together."""
        with torch.no_grad():
            for some in _bundled(tensors):
                parts = [tensor.reshape(-1) for tensor in some]
                flat = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
                dist.broadcast(flat, src=0)
                if flat.data_ptr() != some[0].data_ptr():
                    for tensor, part in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):
                        tensor.copy_(part.view_as(tensor))


def _bundled(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """``tensors`` in bundles of one dtype and device, of up to 16 MiB; a larger one goes alone."""
    kinds: dict[Any, list[Tensor]] = {}
    room: dict[Any, int] = {}
    for tensor in tensors:
        kind = tensor.dtype, tensor.device
        size = tensor.numel() * tensor.element_size()
        if kind not in kinds or room[kind] < size:
            if kind in kinds:
                yield kinds[kind]
            kinds[kind], room[kind] = [], _BUNDLE
        kinds[kind].append(tensor.detach())
        room[kind] -= size
    yield from kinds.values()


class Parts:
    """``ranks`` by the part of the data that they see: those of one part do the same, and one of them speaks for it.

    ``rank`` and ``world_size`` are this rank's part and how many there are: sums and what is gathered have each part
    once. A question is asked of all.

    Raises SettingError unless every part is that of equally many ranks, and the first ranks of the parts are in order.
    """

    def __init__(self, ranks: Ranks, part: int, parts: int) -> None:
        self.ranks, self.rank, self.world_size = ranks, part, parts
        found = ranks.gather((part, parts))
        even = Counter(found) == {(one, parts): len(found) / parts for one in range(parts)}
        if not even or list(dict.fromkeys(found)) != sorted(set(found)):
            raise SettingError(
                f"data_part of the strategy told (part, parts) = {', '.join(map(str, found[:8]))} on ranks 0, 1, ...; "
                "expected each part from 0 up to parts equally often, part 0 first, then part 1 and so on, such as "
                "(0, 2), (0, 2), (1, 2), (1, 2) or (0, 2), (1, 2), (0, 2), (1, 2)"
            )
        self.speakers: Sequence[int] = [found.index((one, parts)) for one in range(parts)]
        self.speaks = ranks.rank in self.speakers

    def sum(self, value: float) -> float:
        return float(self.sums([value])[0])

    def sums(self, values: list[float]) -> list[float]:
        return self.ranks.sums(values if self.speaks else [0.0] * len(values))

    def any(self, flag: bool) -> bool:
        return self.ranks.any(flag)

    def gather(self, value: Any) -> list[Any]:
        found = self.ranks.gather(value if self.speaks else None)
        return [found[speaker] for speaker in self.speakers]

    def broadcast(self, value: Any) -> Any:
        return self.ranks.broadcast(value)

    def first(self, make: Callable[[], T]) -> T:
        return self.ranks.first(make)


_held: tuple[Any, ...] = ()


def hold(*tensors: Any) -> None:
    """Keep what the last collective has sent and received until the next one.

    A thread of gloo lets go of it a moment after the collective has returned. Were it the last to do so, it would free
    objects of Python, and abort the process where Python ends in that moment.
    """
    global _held
    _held = tensors


def _packed(value: Any) -> bytes:
    held = io.BytesIO()
    _Packer(held, pickle.HIGHEST_PROTOCOL).dump(value)
    return held.getvalue()


class _Packer(pickle.Pickler):
    """With the values of tensors, and on the CPU: elsewhere they would take a device of the rank that gets them."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Mapping):  # a dict of another kind, which may hold what cannot be sent
            return dict, (dict(value),)
        if not isinstance(value, Tensor):
            return NotImplemented
        plain = value.detach().cpu()
        if type(plain) is not Tensor or plain.layout is not torch.strided or plain.is_quantized or plain.is_nested:
            return plain.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        raw = plain.resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8)
        return _tensor, (bytearray(raw.numpy()), plain.dtype, plain.shape)


def _tensor(raw: bytearray, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.frombuffer(raw, dtype=dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)


def _page(told: bytes, size: int) -> Tensor:
    """``size`` bytes: how long ``told`` is, and as much of it as there is room for."""
    held = len(told).to_bytes(_HEAD, "little") + told[: size - _HEAD]
    return torch.frombuffer(bytearray(held.ljust(size, b"\0")), dtype=torch.uint8)


def _length(page: Tensor) -> int:
    return int.from_bytes(page[:_HEAD].numpy().tobytes(), "little")


def _unpacked(page: Tensor) -> Any:
    return pickle.loads(page[_HEAD : _HEAD + _length(page)].numpy().tobytes())


@cache
def control_group() -> Any:
    """The group for numbers and objects; made once a process, by all ranks together."""
    return dist.new_group(backend="gloo", group_desc="loopwright")
