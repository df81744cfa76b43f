"""How numbers are held while a step runs: in which dtype, under which autocast, with which gradient scaler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from loopwright.errors import SettingError, choose
from loopwright.state import Precision

__all__ = ["Autocast", "Plain", "Scaled", "pick_precision"]


class Plain:
    """Nothing is done around a step. ``holds`` is the dtype of the model and its inputs; None leaves both alone."""

    plain = True
    scaler = None

    def __init__(self, name: str = "fp32", holds: torch.dtype | None = None) -> None:
        self.name, self.holds = name, holds

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext()


class Autocast:
    """torch.autocast around the step: weights stay as they are, what gains by it is computed in ``dtype``."""

    plain = False
    holds: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=self.dtype)


class Scaled(Autocast):
    """Autocast to float16, whose small gradients would be 0: the loss is scaled up, the gradients down again.

    What checkpoints hold is the state of torch's own ``scaler``, which is lazy: its scale comes to the device with the
    first loss.
    """

    scaler: torch.amp.GradScaler

    def __init__(self, name: str, scaler: torch.amp.GradScaler) -> None:
        super().__init__(name, torch.float16)
        self.scaler = scaler

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:  # of a checkpoint that was written with another precision, there is none to go on with
            self.scaler.load_state_dict(dict(state))


_MADE: dict[str, Callable[[torch.device], Precision]] = {
    "fp32": lambda device: Plain("fp32"),
    "bf16": lambda device: Autocast("bf16", torch.bfloat16),
    "fp16": lambda device: Scaled("fp16", torch.amp.GradScaler(device.type)),
    "bf16-true": lambda device: Plain("bf16-true", torch.bfloat16),
    "fp64": lambda device: Plain("fp64", torch.float64),
}

# one name for one thing: what others call it is answered with the name that it has here
_ELSEWHERE = {
    "fp32": ("32", "32-true", "fp32-true", "float32", "float", "no"),
    "bf16": ("bf16-mixed", "bfloat16", "amp_bf16"),
    "fp16": ("16", "16-mixed", "fp16-mixed", "float16", "half", "amp", "amp_fp16"),
    "fp64": ("64", "64-true", "fp64-true", "float64", "double"),
}
_HERE = {theirs: ours for ours, names in _ELSEWHERE.items() for theirs in names}
_PARTS = ("name", "plain", "holds", "scaler", "autocast")


def pick_precision(precision: Any, device: torch.device | None = None) -> Precision:
    """The object for a name such as ``"bf16"``, for the steps of one run on ``device``.

    A ``torch.amp.GradScaler`` is "fp16" with its settings: each run scales by itself. An object of the user's own,
    with all that ``state.Precision`` names, is taken as it is. Raises SettingError for anything else.

    >>> pick_precision("bf16").dtype
    torch.bfloat16
    >>> pick_precision(torch.amp.GradScaler("cpu", init_scale=1024.0)).scaler.get_scale()
    1024.0
    """
    device = device or torch.device("cpu")
    if isinstance(precision, str) and precision in _MADE:
        return _MADE[precision](device)
    if isinstance(precision, torch.amp.GradScaler):
        return Scaled("fp16", _like(precision, device))
    absent = [part for part in _PARTS if not hasattr(precision, part)]
    if not absent:
        found: Precision = precision
        return found
    known = _HERE.get(str(precision).removeprefix("torch."))
    if known is not None:
        raise SettingError(f"precision={precision!r} is called {known!r} here: precision={known!r}")
    if isinstance(precision, str):
        raise SettingError(f"precision={precision!r} is unknown. {choose(precision, _MADE)}")
    raise SettingError(
        f"precision={precision!r}: expected one of {', '.join(map(repr, _MADE))}, a torch.amp.GradScaler, or an object "
        f"with {', '.join(_PARTS)}; this one has no {', '.join(absent)}"
    )


def _like(scaler: torch.amp.GradScaler, device: torch.device) -> torch.amp.GradScaler:
    """A scaler with the settings and the scale of the given one, that counts by itself."""
    if not scaler.is_enabled():
        raise SettingError(
            "precision=GradScaler(...): it is not enabled, so nothing would be scaled; make it for the device that is "
            f"trained on: torch.amp.GradScaler({device.type!r})"
        )
    made = torch.amp.GradScaler(device.type)
    made.load_state_dict(scaler.state_dict())
    return made
