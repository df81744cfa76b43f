"""The first module whose output is not finite, and the backward that gave NaN: what ``Debug(anomaly=True)`` adds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loopwright.errors import NonFiniteError
from loopwright.events import Callback, describe
from loopwright.state import Phase, Run

__all__ = ["Anomaly"]


class Anomaly(Callback):
    """Ends the run at the first loss or gradient that is not finite, and names the module where it began.

    Torch's own anomaly mode is on during the fit, and put back afterwards: a backward that gives NaN raises
    RuntimeError with the name of its function. Each module's output is read while training: a step costs many times
    as much.

    Reads: outputs of modules, the loss. Changes: nothing. Stops: by NonFiniteError, before the backward.
    """

    def __init__(self) -> None:
        self._before: tuple[bool, bool] | None = None
        self._handles: list[Any] = []
        self._first: str | None = None

    def problems(self, run: Run) -> Iterator[str]:
        if run.settings.get("nonfinite", "raise") != "raise":
            yield (
                f"Debug(anomaly=True) ends the run at the first value that is not finite, which nonfinite="
                f"{run.settings['nonfinite']!r} asks to pass over; leave one of them out"
            )
        if run.precision.scaler is not None:
            yield (
                f"Debug(anomaly=True) cannot apply to precision={run.precision.name!r}, where scaled gradients "
                "overflow by design; look at the run with precision='bf16' or 'fp32'"
            )
        if run.merges:
            yield f"Debug(anomaly=True) looks at each module, which {run.merges} merges; leave one of them out"

    def on_fit_start(self, run: Run) -> None:
        self._first = None
        self._before = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
        torch.autograd.set_detect_anomaly(True)
        for key, model in run.models.items():
            for path, module in model.named_modules():
                name = f"{path or key} ({type(module).__name__})"
                self._handles.append(module.register_forward_hook(_Watch(self, name)))

    def on_step_start(self, run: Run) -> None:
        self._first = None

    def map_loss(self, run: Run, loss: Tensor, output: Any, batch: Any, phase: Phase) -> Tensor:
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(f"phase {phase.name!r} has a loss of {value:g} at step {run.progress.step + 1}. "
                                 f"{self._told(batch)}")  # fmt: skip
        return loss

    def _told(self, batch: Any) -> str:
        if bad := _not_finite(batch):
            return f"The batch itself is not finite: {bad}"
        if self._first is None:
            return "Every module's output was finite: look at the loss function and what else the step computes"
        return self._first

    def on_exception(self, run: Run, error: BaseException) -> None:
        if isinstance(error, RuntimeError) and "returned nan values" in str(error):
            told = self._first or "Every module's output was finite: NaN came in the backward of that function only"
            error.add_note(f"[loopwright] {told}")
        self._close()

    def on_fit_end(self, run: Run) -> None:
        self._close()

    def _close(self) -> None:
        if self._before is not None:
            torch.autograd.set_detect_anomaly(*self._before)
            self._before = None
        while self._handles:
            self._handles.pop().remove()


class _Watch:
    """A forward hook of one module; those inside of a module are called before its own."""

    def __init__(self, anomaly: Anomaly, name: str) -> None:
        self.anomaly, self.name = anomaly, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.anomaly._first is None and torch.is_grad_enabled() and (bad := _not_finite(output)):
            given = _not_finite(args)
            cause = f"it was given {given}" if given else f"what it was given was finite: {describe(args)}"
            self.anomaly._first = f"The first output that is not finite was that of {self.name}: {bad}; {cause}"


@torch.no_grad()
def _not_finite(value: Any) -> str:
    """What is not finite in a nested value, in words; "" where all is."""
    if isinstance(value, Tensor):
        if not (value.is_floating_point() or value.is_complex()) or bool(torch.isfinite(value).all()):
            return ""
        nans = int(torch.isnan(value).sum())
        infinite = int((~torch.isfinite(value)).sum()) - nans
        return f"{describe(value)} with {nans} NaN and {infinite} infinite of {value.numel()} values"
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next(filter(None, map(_not_finite, parts)), "")
