"""What training changes beside the models: plain attributes, such as a running centre, and modules left out of them."""

from __future__ import annotations

import copy
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loopwright.checkpoint.encode import check
from loopwright.data.generators import OF_MODULES
from loopwright.errors import CheckpointError
from loopwright.provenance import is_own
from loopwright.written import warn

__all__ = ["Attributes", "put_back"]

_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_LISTS, _DICTS = (list, tuple, deque, set, frozenset), (dict, OrderedDict, defaultdict, Counter)
_ITEMS, _BYTES, _SMALL, _DEPTH = 10_000, 256 * 2**20, 2**16, 8


class _OtherError(Exception):
    """Something else hangs there, which checkpoints cannot hold."""


class _Same:
    """A tensor or an array by itself, which it does not keep alive."""

    def __init__(self, value: Any) -> None:
        self._value = weakref.ref(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value() is not None and self._value() is other._value()

    __hash__ = None  # type: ignore[assignment]


class Attributes:
    """The plain attributes of ``roots`` as they are now: numbers, texts, tensors, arrays, lists and dicts of them.

    ``roots`` are modules and other objects, by name; the modules in them are looked at as well, and what hangs on an
    attribute and is of a class of the user's. ``changed()`` gives the attributes that have another value since, and
    ``load`` puts such values back. Parameters and buffers are among them where no state_dict of ``models`` has them,
    such as those of a teacher. Left alone is what torch keeps on its own modules, what is ``apart``, since it is saved
    by itself, and objects of any other kind.

    >>> class Net(nn.Linear):
    ...     seen = 0
    >>> net = Net(1, 1)
    >>> before = Attributes({"model": net})
    >>> net.seen, net.center = 3, torch.ones(1)
    >>> before.changed()
    {'model': {'seen': 3, 'center': tensor([1.])}}
    >>> other = Net(1, 1)
    >>> Attributes({"model": other}).load(before.changed(), torch.device("cpu"))
    >>> other.seen, other.center
    (3, tensor([1.]))
    """

    def __init__(
        self, roots: Mapping[str, Any], apart: Iterable[object] = (), models: Iterable[nn.Module] | None = None
    ) -> None:
        self.roots, self.apart = dict(roots), list(apart)
        self.models = None if models is None else [one for one in models if isinstance(one, nn.Module)]
        self._before = {(id(owner), name): _now(value) for _, owner, name, value in self._all()}
        self._told: set[str] = set()

    def changed(self) -> dict[str, dict[str, Any]]:
        """By the path of an object, its attributes that are not what they were; tensors themselves, not copies.

        What has more than 10,000 items or 256 MiB is told in a warning, once, and left out.
        """
        changed: dict[str, dict[str, Any]] = {}
        for path, owner, name, value in self._all():
            now = _now(value)
            if now is None or now == self._before.get((id(owner), name)):
                continue
            who = f"{type(owner).__name__}.{name}"
            why = _too_much(value, who)
            if why is None:
                changed.setdefault(path, {})[name] = value
            elif who not in self._told:
                self._told.add(who)
                warn(
                    f"{who} changes in training and is not in checkpoints: {why}. If a step reads it, a resumed run "
                    "will differ: make it a buffer (register_buffer), or a part of its get_extra_state"
                )
        return changed

    def load(self, saved: Mapping[str, Mapping[str, Any]], device: torch.device) -> None:
        """Put back what ``changed`` gave, and what has been read of it from a file; tensors come to ``device``."""
        owners: dict[str, Any] = dict(_modules(self.roots)) | dict(_owners(self.roots, self.apart))
        for path, values in saved.items():
            for name, value in values.items() if path in owners else ():
                held = _tensors(owners[path]).get(name)
                if held is None:
                    vars(owners[path])[name] = _moved(value, device)
                else:
                    held.detach().copy_(value)

    def _all(self) -> Iterator[tuple[str, Any, str, Any]]:
        yield from _found(self.roots, self.apart)
        if self.models is None:
            return
        saved = {id(value) for model in self.models for value in _in_state_dict(model)}
        saved |= {id(value) for one in self.apart if isinstance(one, nn.Module) for value in _in_state_dict(one)}
        for path, module in _modules(self.roots):
            for name, value in _tensors(module).items():
                if id(value) not in saved:
                    saved.add(id(value))  # a module may be in several roots
                    yield path, module, name, value


@contextmanager
def put_back(roots: Mapping[str, Any]) -> Iterator[None]:
    """Afterwards the plain attributes of ``roots`` are as they were before."""
    before = {(id(owner), name): copy.deepcopy(value) for _, owner, name, value in _found(roots) if _now(value)}
    try:
        yield
    finally:
        for _, owner, name, value in list(_found(roots)):
            if (id(owner), name) in before:
                vars(owner)[name] = before[id(owner), name]
            elif _now(value):
                del vars(owner)[name]


def _owners(roots: Mapping[str, Any], apart: Iterable[object] = ()) -> Iterator[tuple[str, Any]]:
    """``roots``, the modules in them, and objects of the user's classes on their attributes; each once."""
    seen = {id(one) for one in apart}
    waiting = list(roots.items())
    while waiting:
        name, root = waiting.pop(0)
        for path, owner in root.named_modules() if isinstance(root, nn.Module) else [("", root)]:
            if id(owner) in seen or not hasattr(owner, "__dict__") or type(owner).__module__.startswith("torch.nn."):
                continue
            seen.add(id(owner))
            place = f"{name}.{path}".rstrip(".")
            yield place, owner
            held = ((key, value) for key, value in vars(owner).items() if key not in OF_MODULES)
            waiting += [(f"{place}.{key}", value) for key, value in held if is_own(type(value).__module__)]


def _modules(roots: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    """The modules in ``roots``, by the paths that ``_owners`` has for them."""
    for name, root in roots.items():
        for path, module in root.named_modules() if isinstance(root, nn.Module) else ():
            yield f"{name}.{path}".rstrip("."), module


def _tensors(owner: Any) -> dict[str, Tensor]:
    """The parameters and buffers of a module itself, by name."""
    held = {**owner._parameters, **owner._buffers} if isinstance(owner, nn.Module) else {}
    return {name: value for name, value in held.items() if value is not None}


def _in_state_dict(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        apart = module._non_persistent_buffers_set
        yield from (value for name, value in _tensors(module).items() if name not in apart)


def _found(roots: Mapping[str, Any], apart: Iterable[object] = ()) -> Iterator[tuple[str, Any, str, Any]]:
    for path, owner in _owners(roots, apart):
        for name, value in vars(owner).items():
            if name not in OF_MODULES:
                yield path, owner, name, value


def _now(value: Any) -> Any:
    """What tells ``value`` from another one and from itself when it is changed; None where it is not plain."""
    try:
        return _told(value, 0)
    except _OtherError:
        return None


def _told(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind in _NUMBERS:
        return kind, repr(value) if kind is float else value  # nan is nan, and 0.0 is not -0.0
    if isinstance(value, Tensor):
        return _Same(value), None if value.is_inference() else value._version, _content(value)
    if isinstance(value, np.generic):
        return kind, repr(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return _Same(value), value.tobytes() if value.nbytes <= 2**20 else None
    if depth < _DEPTH and kind in _LISTS:
        return kind, len(value), () if len(value) > _ITEMS else tuple(_told(one, depth + 1) for one in value)
    if depth < _DEPTH and kind in _DICTS:
        pairs = () if len(value) > _ITEMS else value.items()
        return kind, len(value), tuple((_told(k, depth + 1), _told(v, depth + 1)) for k, v in pairs)
    raise _OtherError


def _content(value: Tensor) -> Any:
    """What tells a tensor's content from another: ``x.data.add_(1)``, and batch norm, change no version.

    Of a large one it is two sums over its bits, which take 0.2 ms a MB; another order of the same values has the same.
    """
    if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or value.is_meta:
        return None
    flat = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if value.nbytes <= _SMALL:
        return flat.view(torch.uint8).cpu().numpy().tobytes() if flat.numel() else b""
    aligned = flat.clone() if flat.storage_offset() * flat.element_size() % 8 else flat
    parts = aligned.view(torch.uint8)
    numbers = parts[: len(parts) // 8 * 8].view(torch.int64)
    return numbers.sum().item(), torch.hash_tensor(numbers).item(), parts[-8:].tolist()


def _too_much(value: Any, who: str) -> str | None:
    """Why ``value`` is not saved; None where it is."""
    items, size = _extent(value)
    if items > _ITEMS or size > _BYTES:
        return f"it has {items:,} items, {size:,} bytes"
    try:
        check(value, who)
    except CheckpointError as error:
        return str(error)
    return None


def _extent(value: Any) -> tuple[int, int]:
    """How many items there are in ``value``, and the bytes of its tensors and arrays."""
    if isinstance(value, (Tensor, np.ndarray)):
        return 1, value.nbytes
    if isinstance(value, (*_LISTS, *_DICTS)):
        if len(value) > _ITEMS:
            return len(value), 0
        inside = [_extent(one) for one in (value.values() if isinstance(value, dict) else value)]
        return sum(items for items, _ in inside), sum(size for _, size in inside)
    return 1, 0


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        for key in value:
            value[key] = _moved(value[key], device)
    elif isinstance(value, (list, deque)):
        for i, one in enumerate(value):
            value[i] = _moved(one, device)
    elif type(value) is tuple:
        return tuple(_moved(one, device) for one in value)
    return value
