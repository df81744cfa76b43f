"""The global random generators: Python, NumPy, torch and accelerators in use, taken and put back together."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import numpy as np
import torch

__all__ = ["READ", "forked", "get", "same", "seed", "set"]

# of the generators that every process has: how to take the state of each
READ: dict[str, Callable[[], Any]] = {
    "torch": torch.default_generator.get_state,
    "python": random.getstate,
    "numpy": lambda: np.random.get_state(legacy=False),
}


def get() -> dict[str, Any]:
    """The state of every global generator, as plain data and tensors that later draws do not change.

    Keys: ``torch`` (uint8 tensor), ``python``, ``numpy``, and ``cuda`` (a list, one uint8 tensor a device) or
    ``mps`` once they are in use: a device that nobody has touched is not started for it.

    >>> state = get()
    >>> first = torch.rand(2)
    >>> set(state)
    >>> torch.equal(torch.rand(2), first)
    True
    """
    state = {name: read() for name, read in READ.items()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set(state: Mapping[str, Any]) -> None:
    """Put back what ``get`` gave. States of devices that this machine does not have are left out.

    Raises ValueError or RuntimeError if a state is not one of its generator.
    """
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if state.get("cuda") and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    if state.get("mps") is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def same(a: Any, b: Any) -> bool:
    """True for equal states: of one generator, or all that ``get`` gives.

    >>> state = get()
    >>> same(state, get())
    True
    >>> _ = torch.rand(1)
    >>> same(state, get()), same(state["python"], random.getstate())
    (False, True)
    """
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):  # one a device
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else bool(a == b)


def seed(number: int) -> None:
    """Seed the global generators of Python, NumPy and torch, every device's too.

    >>> seed(7)
    >>> first = random.random()
    >>> seed(7)
    >>> random.random() == first
    True
    """
    random.seed(number)
    np.random.seed(number % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(number)
    else:  # which would keep a stack trace for each kind of device that is not there: 70 times the cost
        torch.default_generator.manual_seed(number)


class forked:  # noqa: N801 - reads as a verb: with rng.forked()
    """Leave the generators afterwards as they were before, whatever is drawn inside, also after an exception.

    >>> with forked():
    ...     inside = torch.rand(2)
    >>> torch.equal(torch.rand(2), inside)
    True
    """

    __slots__ = ("_state",)

    def __enter__(self) -> None:
        self._state = get()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        set(self._state)
