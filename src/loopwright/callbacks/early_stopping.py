"""Stop when a watched value has not got better for a while."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from loopwright.callbacks.restoring import Restoring
from loopwright.errors import MetricError, SettingError, choose, elsewhere
from loopwright.given import check_flag, is_number
from loopwright.monitor import direction, improved
from loopwright.state import Run, Stage

__all__ = ["EarlyStopping"]


class EarlyStopping(Restoring):
    """Stops the run when ``monitor`` has not improved in ``patience`` looks in a row.

    A look is a validation; for a value of the training (``"train/loss"``) it is the end of an epoch. To
    count as improved, the value must beat the best so far by more than ``min_delta``, with ``relative=True`` by more
    than that share of the best; NaN never does. The first ``start_from`` looks are left out. ``mode`` is ``"min"`` or
    ``"max"``; by default the name tells (``loss`` falls, ``accuracy`` rises). ``run.stop_reason`` says with numbers why
    the run stopped.

    It also stops at the first look, those left out too, at which the value is as good as ``stop_at``, or worse than
    ``diverged_at`` (as NaN is). ``restore="best"`` puts the weights of the best look back into the models when training
    has ended, for whatever reason but a signal: a copy is held in memory and in checkpoints, which grow by it. (With
    ``Checkpoint(monitor=..., restore="best")`` it is read from disk.) Among the callbacks of a stage it counts anew in
    each stage, and puts back at the end of that. Where validation sees averages (``EMA``), those are what is kept.

    Reads: the monitored value. Changes: nothing, unless ``restore`` asks for it. Stops: yes.

    >>> EarlyStopping("valid/accuracy", patience=5, stop_at=0.99).direction
    'max'

    Raises SettingError for arguments that cannot be used, such as a name that does not tell its direction, and
    MetricError at the first look that does not have the value.
    """

    changes = ("weights",)  # of restore="best"
    stops = True

    @elsewhere(stopping_threshold="stop_at", divergence_threshold="diverged_at", restore_best_weights="restore")
    def __init__(
        self,
        monitor: str = "valid/loss",
        *,
        mode: str | None = None,
        patience: int = 3,
        min_delta: float = 0.0,
        relative: bool = False,
        start_from: int = 0,
        stop_at: float | None = None,
        diverged_at: float | None = None,
        restore: str | None = None,
    ) -> None:
        self.monitor, self.mode, self.direction = monitor, mode, direction(monitor, mode)
        counts: list[tuple[str, Any, int]] = [("patience", patience, 1), ("start_from", start_from, 0)]
        for name, value, least in counts:
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise SettingError(f"{name}={value!r}: expected a whole number of validations from {least}")
        check_flag("relative", relative)
        for name, value in (("stop_at", stop_at), ("diverged_at", diverged_at)):
            if value is not None and not is_number(value):
                raise SettingError(f"{name}={value!r}: expected a number, or None")
        if not (is_number(min_delta) and min_delta >= 0):
            raise SettingError(f"min_delta={min_delta!r}: expected 0 or more; mode tells the direction")
        if relative and not min_delta:
            raise SettingError("relative=True says what min_delta is a share of; give one, such as min_delta=0.01")
        if restore not in (None, "best"):
            raise SettingError(f"restore={restore!r}: expected None or 'best'")
        if stop_at is not None and diverged_at is not None and not improved(stop_at, diverged_at, self.direction):
            raise SettingError(
                f"stop_at={stop_at:g} is no better than diverged_at={diverged_at:g}: one of them is wrong"
            )
        self.patience, self.min_delta, self.relative, self.start_from = patience, min_delta, relative, start_from
        self.stop_at, self.diverged_at, self.restore = stop_at, diverged_at, restore
        self._forget()

    def _forget(self) -> None:
        self.best: float | None = None
        self.best_step = 0
        self.looks = self.waited = 0
        self._weights: dict[str, dict[str, Any]] = {}

    def on_fit_start(self, run: Run) -> None:
        if self.restore and run.team is not None and run.team.shards:
            raise SettingError(
                "EarlyStopping(restore='best') holds whole weights, which FSDP shares out; let the checkpoints do it: "
                f"Checkpoint(monitor={self.monitor!r}, restore='best')"
            )
        if run.progress.step == 0:  # another run than the one that this object has seen before
            self._forget()

    def on_validation_end(self, run: Run, values: Mapping[str, float]) -> None:
        # trainer.validate looks at a model and trains none; without values, a signal has cut it short
        if values and run.stages and not self.monitor.startswith("train/"):
            self._look(run, values)

    def on_epoch_end(self, run: Run) -> None:
        if self.monitor.startswith("train/"):
            self._look(run, run.history[-1])

    def on_stage_start(self, run: Run, stage: Stage) -> None:
        if any(one is self for one in stage.callbacks):
            self._forget()

    def on_stage_end(self, run: Run, stage: Stage) -> None:
        super().on_stage_end(run, stage)
        if stage is not run.stages[-1] and any(one is self for one in stage.callbacks):
            self._weights = {}  # no checkpoint of a later stage has to hold them

    def _decides(self) -> bool:
        return self.restore is not None

    def _put_back(self, run: Run) -> None:
        if self._weights:
            for name, model in run.models.items():
                model.load_state_dict(self._weights[name])

    def _look(self, run: Run, values: Mapping[str, float]) -> None:
        if self.monitor not in values:
            known = [name for name in values if "/" in name]
            raise MetricError(f"EarlyStopping watches {self.monitor!r}. {choose(self.monitor, known)}")
        value, step = float(values[self.monitor]), run.progress.step
        self.looks += 1
        if self.looks > self.start_from:
            if improved(value, self.best, self.direction, self._margin()):
                self.best, self.best_step, self.waited = value, step, 0
                if self.restore:
                    self._weights = {name: _copied(model.state_dict()) for name, model in run.models.items()}
            else:
                self.waited += 1
                if self.waited >= self.patience:
                    run.request_stop(self._reason(value, step))
        if self.stop_at is not None and not math.isnan(value) and not improved(self.stop_at, value, self.direction):
            run.request_stop(f"{self.monitor} has reached {value:.6g} at step {step}; asked for was {self.stop_at:g}")
        if self.diverged_at is not None and improved(self.diverged_at, value, self.direction):
            run.request_stop(f"{self.monitor} is {value:.6g} at step {step}, worse than {self.diverged_at:g}")

    def _margin(self) -> float:
        return self.min_delta * abs(self.best or 0.0) if self.relative else self.min_delta

    def _reason(self, value: float, step: int) -> str:
        looks = "epoch" if self.monitor.startswith("train/") else "validation"
        looks += "s" if self.waited > 1 else ""
        margin = f" by more than {f'{self.min_delta:.3%}' if self.relative else f'{self.min_delta:g}'}"
        if self.best is None:
            return f"{self.monitor} was NaN in all of {self.waited} {looks}"
        return (
            f"{self.monitor} has not improved{margin if self.min_delta else ''} in {self.waited} {looks}: "
            f"best {self.best:.6g} at step {self.best_step}, last {value:.6g} at step {step}"
        )

    def state_dict(self) -> dict[str, Any]:
        state = {"best": self.best, "best_step": self.best_step, "looks": self.looks, "waited": self.waited}
        return {**state, "weights": self._weights} if self._weights else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_step = state["best"], state["best_step"]
        self.looks, self.waited = state["looks"], state["waited"]
        self._weights = state.get("weights", {})


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in state.items()}
