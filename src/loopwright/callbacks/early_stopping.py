"""Stop when a watched value has not got better for a while."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loopwright.errors import MetricError, SettingError, choose
from loopwright.events import Callback
from loopwright.monitor import direction, improved
from loopwright.state import Run

__all__ = ["EarlyStopping"]


class EarlyStopping(Callback):
    """Stops the run when ``monitor`` has not improved in ``patience`` looks in a row.

    A look is a validation; for a value of the training (``"train/loss"``) it is the end of an epoch. To
    count as improved, the value must beat the best so far by more than ``min_delta``; NaN never does. The
    first ``start_from`` looks are left out. ``mode`` is ``"min"`` or ``"max"``; by default the name tells
    (``loss`` falls, ``accuracy`` rises). ``run.stop_reason`` says with numbers why the run stopped.

    Reads: the monitored value. Changes: nothing. Stops: yes.

    >>> EarlyStopping("valid/accuracy", patience=5).direction
    'max'

    Raises SettingError for a name that does not tell its direction, and MetricError at the first look that
    does not have the value.
    """

    def __init__(
        self,
        monitor: str = "valid/loss",
        *,
        mode: str | None = None,
        patience: int = 3,
        min_delta: float = 0.0,
        start_from: int = 0,
    ) -> None:
        self.monitor, self.mode, self.direction = monitor, mode, direction(monitor, mode)
        counts: list[tuple[str, Any, int]] = [("patience", patience, 1), ("start_from", start_from, 0)]
        for name, value, least in counts:
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise SettingError(f"{name}={value!r}: expected a whole number of validations from {least}")
        if not min_delta >= 0:
            raise SettingError(f"min_delta={min_delta!r}: expected 0 or more; mode tells the direction")
        self.patience, self.min_delta, self.start_from = patience, min_delta, start_from
        self._forget()

    def _forget(self) -> None:
        self.best: float | None = None
        self.best_step = 0
        self.looks = self.waited = 0

    def on_fit_start(self, run: Run) -> None:
        if run.progress.step == 0:  # another run than the one that this object has seen before
            self._forget()

    def on_validation_end(self, run: Run, values: Mapping[str, float]) -> None:
        # trainer.validate looks at a model and trains none; without values, a signal has cut it short
        if values and run.stages and not self.monitor.startswith("train/"):
            self._look(run, values)

    def on_epoch_end(self, run: Run) -> None:
        if self.monitor.startswith("train/"):
            self._look(run, run.history[-1])

    def _look(self, run: Run, values: Mapping[str, float]) -> None:
        if self.monitor not in values:
            known = [name for name in values if "/" in name]
            raise MetricError(f"EarlyStopping watches {self.monitor!r}. {choose(self.monitor, known)}")
        value = float(values[self.monitor])
        self.looks += 1
        if self.looks <= self.start_from:
            return
        if improved(value, self.best, self.direction, self.min_delta):
            self.best, self.best_step, self.waited = value, run.progress.step, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            run.request_stop(self._reason(value, run.progress.step))

    def _reason(self, value: float, step: int) -> str:
        looks = "epoch" if self.monitor.startswith("train/") else "validation"
        looks += "s" if self.waited > 1 else ""
        margin = f" by more than {self.min_delta:g}" if self.min_delta else ""
        if self.best is None:
            return f"{self.monitor} was NaN in all of {self.waited} {looks}"
        return (
            f"{self.monitor} has not improved{margin} in {self.waited} {looks}: "
            f"best {self.best:.6g} at step {self.best_step}, last {value:.6g} at step {step}"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "looks": self.looks, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_step = state["best"], state["best_step"]
        self.looks, self.waited = state["looks"], state["waited"]
