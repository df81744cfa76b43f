"""What each module's forward keeps for the backward, counted on tensors that hold no memory."""

from __future__ import annotations

import copy
import random
import time
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loopwright import rng

__all__ = ["kept_for_backward"]

_SECONDS = 10.0  # after which it is given up
_SMALL = 2**20  # bytes; larger arrays are tables, which no forward changes
_MANY = 10_000  # items; of longer lists the insides stay shared
_ITEMS = (list, deque, dict, OrderedDict, defaultdict, Counter)  # torch's dicts of modules and hooks among them


class _TooLongError(Exception):
    """It takes more time than an explanation may."""


def kept_for_backward(
    step: Callable[[Any], Any], batch: Any, names: Mapping[nn.Module, str], also: Iterable[Any] = ()
) -> Counter[str] | None:
    """Bytes that ``step(batch)`` keeps for its backward, by the name of the module in whose forward they are kept.

    Each storage counts once, for the innermost open module of ``names``, or for "" where none is open; what was there
    before (parameters, buffers, the batch) does not count. Nothing is computed: the step runs on torch's fake tensors,
    which know their shapes alone. All modules of ``names`` and the objects ``also`` have copies of their attributes
    meanwhile, and the random generators are put back.

    None where it cannot be told: the step reads a value (``.item()``, ``if x.any()``), torch does not know the shapes
    that an operation gives, it would take more than 10 seconds, or a module is compiled, scripted or parallel. It
    never raises.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> kept_for_backward(lambda x: net(x).sum(), torch.zeros(16, 4), {m: n for n, m in net.named_modules()})
    Counter({'1': 512})
    """
    try:
        if _is_opaque(names):
            return None
        with warnings.catch_warnings(), rng.forked():
            warnings.simplefilter("ignore")
            return _counted(step, batch, names, also)
    except Exception:  # whatever it is: it would hide the error that is being explained
        return None


def _is_opaque(modules: Iterable[nn.Module]) -> bool:
    """True where a forward is not Python that runs here and now, by itself: ranks would wait for one another."""
    return (torch.distributed.is_available() and torch.distributed.is_initialized()) or any(
        isinstance(module, (torch.jit.ScriptModule, nn.DataParallel))
        or hasattr(module, "_orig_mod")  # compiled by torch.compile(module)
        or module._compiled_call_impl is not None  # and by module.compile()
        for module in modules
    )


def _counted(
    step: Callable[[Any], Any], batch: Any, names: Mapping[nn.Module, str], also: Iterable[Any]
) -> Counter[str]:
    # private in torch, and all of it that is used here
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils._pytree import tree_map_only

    alive: list[Tensor] = []  # or the place of a storage would be used again
    seen: set[int] = set()
    kept: Counter[str] = Counter()
    opened: list[str] = []
    ends = time.monotonic() + _SECONDS

    class Fakes(FakeTensorMode):
        """The mode itself computes sums and products of real tensors, and writes into them."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func not in self.lift_fns:  # those make a constant of torch.tensor(3), which may be read
                args, kwargs = tree_map_only(Tensor, fake, (args, kwargs or {}))
            return super().__torch_dispatch__(func, types, args, kwargs)

    # with fallbacks, an operation of which torch has no rule for shapes would be run itself, on zeros
    mode = Fakes(allow_fallback_kernels=False, allow_non_fake_inputs=True)

    def is_new(tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()._cdata
        if storage in seen:
            return False
        seen.add(storage)
        alive.append(tensor)
        return True

    def fake(tensor: Tensor) -> Tensor:
        if time.monotonic() > ends:
            raise _TooLongError
        if isinstance(tensor, FakeTensor):
            return tensor
        made = mode.from_tensor(tensor)
        if made.layout == torch.strided:
            is_new(made)  # no more, as it was there before
        return made

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and is_new(fake(tensor)):
            kept[opened[-1] if opened else ""] += tensor.untyped_storage().nbytes()
        return tensor

    with ExitStack() as stack:
        for one in (*names, *also):
            stack.enter_context(_stand_in(one, fake))
        for module, name in names.items():  # these go with the copies of the attributes
            module.register_forward_pre_hook(_opening(opened, name))
            module.register_forward_hook(_closing(opened), always_call=True)
        batch = tree_map_only(Tensor, fake, batch)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mode:
            step(batch)
    return kept


def _opening(opened: list[str], name: str) -> Callable[..., None]:
    return lambda *_: opened.append(name)


def _closing(opened: list[str]) -> Callable[..., None]:
    def close(*_: Any) -> None:
        opened.pop()

    return close


@contextmanager
def _stand_in(one: Any, fake: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """``one`` has a copy of its attributes meanwhile: what is set, appended or written there is lost with it."""
    own = one.__dict__
    one.__dict__ = _copied(own, fake, {})
    try:
        yield
    finally:
        one.__dict__ = own


def _copied(value: Any, fake: Callable[[Tensor], Tensor], made: dict[int, Any]) -> Any:
    """``value`` with its lists, dicts, sets and generators copied and its tensors faked; other objects as they are."""
    kind = type(value)
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, Tensor):
        return fake(value)
    if kind in _ITEMS:
        new = made[id(value)] = copy.copy(value)
        if len(value) <= _MANY:
            for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
                new[key] = _copied(inner, fake, made)
        return new
    if kind is tuple:
        return tuple(_copied(inner, fake, made) for inner in value)
    changes = isinstance(value, (set, random.Random, np.random.Generator, np.random.RandomState))
    if changes or (kind is np.ndarray and value.nbytes <= _SMALL):
        made[id(value)] = copy.copy(value) if kind is set else copy.deepcopy(value)
        return made[id(value)]
    return value
