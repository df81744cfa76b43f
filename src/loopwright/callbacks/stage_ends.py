"""What ends a stage by what it has reached, and what it leaves behind: Plateau, KeepBest."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from loopwright.callbacks.restoring import Restoring
from loopwright.conflicts import stages_of
from loopwright.errors import MetricError, SettingError, choose
from loopwright.events import Callback
from loopwright.monitor import direction, improved
from loopwright.state import Run, Stage
from loopwright.written import warn

__all__ = ["KeepBest", "Plateau"]


class _Watch(Callback):
    """Follows ``monitor`` within a stage: at each validation, or at the end of each epoch for ``train/...``."""

    def __init__(self, monitor: str, mode: str | None, min_delta: float) -> None:
        self.monitor, self.mode, self.direction = monitor, mode, direction(monitor, mode)
        if not min_delta >= 0:
            raise SettingError(f"min_delta={min_delta!r}: expected 0 or more; mode tells the direction")
        self.min_delta = min_delta
        self._forget()

    def _forget(self) -> None:
        self.best: float | None = None
        self.best_step = 0

    def _look(self, run: Run, better: bool) -> None:
        """``monitor`` has a new value, which is ``better`` than the best before or not."""
        raise NotImplementedError

    def on_stage_start(self, run: Run, stage: Stage) -> None:
        self._forget()

    def on_validation_end(self, run: Run, values: Mapping[str, float]) -> None:
        # trainer.validate trains nothing; without values, a signal has cut it short
        if values and run.stages and not self.monitor.startswith("train/"):
            self._judge(run, values)

    def on_epoch_end(self, run: Run) -> None:
        if self.monitor.startswith("train/"):
            self._judge(run, run.history[-1])

    def _judge(self, run: Run, values: Mapping[str, float]) -> None:
        if self.monitor not in values:
            known = [name for name in values if "/" in name]
            raise MetricError(f"{type(self).__name__} watches {self.monitor!r}. {choose(self.monitor, known)}")
        value = float(values[self.monitor])
        better = improved(value, self.best, self.direction, self.min_delta)
        if better:
            self.best, self.best_step = value, run.progress.step
        self._look(run, better)


class Plateau(_Watch):
    """Ends a stage when ``monitor`` has not improved in ``patience`` looks in a row; the next stage begins.

    For ``Stage(until=Plateau("valid/loss"))``, or ``until=["50 epochs", Plateau(...)]``: whichever comes first. A look
    is a validation, or the end of an epoch for a value of the training (``"train/loss"``). To count as improved, a
    value must beat the best of this stage by more than ``min_delta``; NaN never does.

    Reads: the monitored value. Changes: nothing. Ends the stage: yes.

    >>> str(Plateau("valid/accuracy", patience=5))
    'valid/accuracy has not improved in 5 looks'

    Raises SettingError for a name that does not tell its direction, and MetricError at a look without the value.
    """

    def __init__(
        self, monitor: str = "valid/loss", *, patience: int = 3, mode: str | None = None, min_delta: float = 0.0
    ) -> None:
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
            raise SettingError(f"patience={patience!r}: expected a whole number of looks, from 1")
        self.patience = patience
        super().__init__(monitor, mode, min_delta)

    def problems(self, run: Run) -> Iterator[str]:
        if not any(self is one for stage in run.stages for one in stage.callbacks):
            yield (
                "Plateau ends a stage, and is given to none: lw.Stage(..., until=['9 epochs', lw.Plateau(...)]). "
                "lw.EarlyStopping stops a run, and schedule=torch.optim.lr_scheduler.ReduceLROnPlateau lowers the rate"
            )

    def _forget(self) -> None:
        super()._forget()
        self.waited = 0

    def _look(self, run: Run, better: bool) -> None:
        self.waited = 0 if better else self.waited + 1
        if self.waited >= self.patience:
            run.end_stage()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]

    def __str__(self) -> str:
        return f"{self.monitor} has not improved in {self.patience} look{'s' if self.patience > 1 else ''}"


class KeepBest(_Watch, Restoring):
    """At the end of a stage, puts back the weights and buffers with which ``monitor`` was best in it.

    For ``Stage(callbacks=[KeepBest("valid/loss")])``: the next stage starts from the best of this one. Among the
    callbacks of a Trainer it does so for every stage. So it does where a stop ends the run inside of a stage, unless
    something of the Trainer decides the weights after the fit, such as ``EarlyStopping(restore="best")``. Optimizers
    stay as they are. It keeps one more copy of the models, on their device and in every checkpoint; no folder is
    needed. Where validation sees averages (``EMA``), those are what is kept.

    Reads: the monitored value, the models. Changes: the models, at the end of a stage. Stops: no.

    >>> KeepBest("valid/loss").direction
    'min'

    Raises SettingError for a name that does not tell its direction, and where parameters are shared out over ranks;
    MetricError at a look without the value.
    """

    changes = ("weights",)

    def __init__(self, monitor: str = "valid/loss", *, mode: str | None = None) -> None:
        super().__init__(monitor, mode, 0.0)

    def _forget(self) -> None:
        super()._forget()
        self.models: dict[str, dict[str, Any]] = {}

    def on_fit_start(self, run: Run) -> None:
        if run.team is not None and run.team.shards:
            raise SettingError(
                "KeepBest cannot keep parameters that are shared out over ranks; use DDP, or leave it out"
            )

    def _look(self, run: Run, better: bool) -> None:
        if better:
            self.models = {name: _copied(model.state_dict()) for name, model in run.models.items()}

    def on_stage_end(self, run: Run, stage: Stage) -> None:
        if not self.models:
            warn(f"KeepBest: {self.monitor} had no value in stage {stage.name!r} that is a number; the weights stay")
        self._put_back(run)

    def _put_back(self, run: Run) -> None:
        for name, kept in self.models.items():
            run.models[name].load_state_dict(kept)

    def _decides(self) -> bool:
        return True

    def _puts_back_at(self, run: Run) -> set[str]:
        return {"" if s is run.stages[-1] else s.name for s in stages_of(run, self) or run.stages}

    def _is_its_end(self, run: Run) -> bool:
        return run.stage is not None and super()._is_its_end(run)  # one that has ended has the best already

    def _is_first(self, run: Run) -> bool:
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "models": self.models}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_step = state["best"], state["best_step"]
        self.models = {name: dict(kept) for name, kept in state["models"].items()}


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in values.items()}
