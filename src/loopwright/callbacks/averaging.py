"""Averages of the weights, kept beside the training: EMA and SWA, by torch's own AveragedModel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from loopwright import rng
from loopwright.callbacks.in_parts import InParts, held, load_parts, parts_of
from loopwright.callbacks.restoring import Restoring
from loopwright.conflicts import meet, puts_back_at
from loopwright.data import as_source
from loopwright.errors import SettingError, choose
from loopwright.every import Every
from loopwright.parallel import like, local, whole
from loopwright.parallel.fsdp import wrapped_in
from loopwright.progress import Duration, Progress, is_counted
from loopwright.state import Run, Stage, StepResult
from loopwright.unheard import most_of
from loopwright.unseen import read
from loopwright.written import warn

__all__ = ["EMA", "SWA"]


class Average(Restoring):
    """What EMA and SWA share: models averaged beside the training, shown to validation, kept in checkpoints."""

    changes = ("weights",)

    def __init__(
        self, every: str | int | Duration, *, models: str | Sequence[str] | None, evaluate: bool, replace_at_end: bool
    ) -> None:
        self.every, self.models = every, models
        self._names = [models] if isinstance(models, str) else models
        self._every = Every(self._counted("every", every))
        self.evaluate, self.replace_at_end = evaluate, replace_at_end
        self.buffers = False  # averaged as well; else they are those of the model
        self.batch_norm: Any = False  # data to compute statistics from
        self._averages: dict[str, AveragedModel] = {}
        self._gathered: dict[str, dict[str, Any]] = {}  # states of averages that were held in parts, whole
        self._start: Duration | None = None
        self._sources: dict[str, nn.Module] = {}
        self._others: list[Average] = []  # all averages of the run
        self._told = False  # that it comes after the end of the run
        self._trained: list[Tensor] = []  # the weights of the training, in whose place the averages are since a fit
        self._forget(Progress())

    def _counted(self, name: str, given: str | int | Duration) -> Duration:
        duration = Duration.parse(given)
        if not is_counted(duration) or duration.unit == "seconds":
            raise SettingError(f"{type(self).__name__}({name}={given!r}): expected steps, samples or whole epochs")
        return duration

    def _forget(self, now: Progress) -> None:
        self.updates, self._measured = 0, 0
        self._shown, self._shown_at = False, -1  # the step at which validation has seen the averages last
        self._every.start(now)

    def _averaged(self, model: nn.Module) -> AveragedModel:
        raise NotImplementedError

    @property
    def averages(self) -> dict[str, AveragedModel]:
        """The averages by the names of the models: ``averages[name].module`` is a module like the model.

        Where FSDP shares the parameters out, it is this rank's part of them, and whole when the fit has ended.
        """
        for name in [name for name in self._gathered if not wrapped_in(self._sources[name])]:
            self._averages[name] = self._averaged(self._sources[name]).requires_grad_(False)
            load_parts(self._averages[name], self._sources[name], self._gathered.pop(name))
        return self._averages

    # ------------------------------------------------------------------------------------------ the hooks

    def problems(self, run: Run) -> Iterator[str]:
        name = type(self).__name__
        if run.team is not None and (self.buffers or self._measures):
            what = "buffers=True" if self.buffers else "batch_norm=data"
            instead = "Leave it out" if self.buffers else "Say batch_norm=False"
            yield (
                f"{name}({what}) works in one process: each rank would have statistics of its own. {instead}, and call "
                "torch.optim.swa_utils.update_bn on the averaged model after the fit"
            )
        for other in run.callbacks:
            if other is self:
                break  # the second one of two says it
            if isinstance(other, Average) and other.evaluate and self.evaluate and meet(run, other, self):
                yield (
                    f"{type(other).__name__} and {name} both show their averages to validation; give one of them "
                    "evaluate=False"
                )
        for one in (*run.savers, *run.callbacks) if self.replace_at_end else ():
            both = set() if isinstance(one, Average) else puts_back_at(run, one) & self._puts_back_at(run)
            if both:
                given = "(restore=...)" if hasattr(one, "restore") else ""
                when = "after the fit" if "" in both else f"at the end of stage {min(both)!r}"
                yield (
                    f"{name}(replace_at_end=True) and {type(one).__name__}{given} both decide the weights {when}; "
                    "leave one of them out"
                )
        for stage in run.stages:
            yield from (f"{name}: {problem}" for problem in self._every.problems(stage))
        known, chosen = _averageable(run), self._chosen(run)
        yield from (f"{name}(models={one!r}): {choose(one, known)}" for one in self._names or () if one not in known)
        if not known:
            yield f"{name} has no model to average; with Trainer.run, name it: run(step, data, state={{'net': net}})"
        has_norm = any(isinstance(m, _BatchNorm) for one in chosen.values() for m in one.modules())
        if self.batch_norm is None and has_norm:
            yield (
                f"the model has batch norm, whose statistics belong to no averaged weights; say where they come from: "
                f"{name}(batch_norm=train_loader), or batch_norm=False to keep those of the model"
            )
        if self._measures and chosen and not has_norm:
            yield f"{name}(batch_norm=data) is for models with batch norm, and there is none here; leave it out"

    @property
    def _begins(self) -> Duration:
        return self._start if self._start is not None else Duration.parse(self.every)

    @property
    def _measures(self) -> bool:
        return self.batch_norm is not None and self.batch_norm is not False

    def _chosen(self, run: Run) -> dict[str, nn.Module]:
        return {n: m for n, m in _averageable(run).items() if self._names is None or n in self._names}

    def on_fit_start(self, run: Run) -> None:
        chosen = self._chosen(run)
        self._others = [other for other in run.callbacks if isinstance(other, Average)]
        self._told = Every(self._begins).missed(most_of(run), moments=("every",)) is not None  # the plan has
        if run.progress.step == 0 or self._sources != chosen:  # another run than the one seen before
            self._forget(run.progress)
            self._sources, self._gathered = chosen, {}
            self._averages = {n: self._averaged(held(m)).requires_grad_(False) for n, m in chosen.items()}
        else:
            self._cut()
            if run.restore is None:
                self._go_on(run)
        self._trained = []

    def _cut(self) -> None:
        """Hold averages as the models are held now, which FSDP has shared out since."""
        for name, averaged in self.averages.items():
            if wrapped_in(self._sources[name]) and not isinstance(averaged.module, InParts):
                self._gathered[name] = parts_of(averaged, self._sources[name])  # until a stage begins: this fit may not
                self._averages[name] = self._averaged(held(self._sources[name])).requires_grad_(False)
                load_parts(self._averages[name], self._sources[name], self._gathered[name])

    def _go_on(self, run: Run) -> None:
        """Put back the weights of the training, where another fit goes on from the averages that one has left."""
        pairs = list(self._pairs()) if self._trained else []
        changed = not all(torch.equal(mine, averaged) for mine, averaged in pairs)
        if not (run.comm.any(changed) if self._trained else changed):
            with torch.no_grad():
                for own, (mine, _), trained in zip(self._own(), pairs, self._trained, strict=False):
                    mine.copy_(local(like(own, trained.to(mine.device))))

    def on_stage_start(self, run: Run, stage: Stage) -> None:
        self._gathered.clear()
        self._every.start(run.progress)  # what was due before is not made up for: it may be of this stage alone

    def on_step_end(self, run: Run, result: StepResult) -> None:
        self._look(run)

    def on_validation_start(self, run: Run) -> None:
        if run.stages:  # trainer.validate looks at the model that it is given
            self._look(run)  # at the end of an epoch, before its weights are judged
            if self.evaluate and self.updates:
                self._measure(run)
                self._exchange()
                self._shown_at = run.progress.step
                hooks = run.hooks.on_validation_end  # this one last: what the others judge is what they find
                mine = tuple(hook for hook in hooks if getattr(hook, "__self__", None) is self)
                run.hooks.on_validation_end = (*(hook for hook in hooks if hook not in mine), *mine)

    def on_validation_end(self, run: Run, values: Mapping[str, float]) -> None:
        if self._shown and run.stages:
            self._exchange()

    def on_epoch_end(self, run: Run) -> None:
        self._look(run)

    def on_exception(self, run: Run, error: BaseException) -> None:
        if self._shown:
            self._exchange()

    def on_stage_end(self, run: Run, stage: Stage) -> None:
        if stage is run.stages[-1]:
            self._measure(run)  # before the last checkpoint
        elif any(one is self for one in stage.callbacks):
            self._end(run, f"stage {stage.name!r}")
            self._put_back(run)

    def on_fit_end(self, run: Run) -> None:
        if not run.interrupted and self._is_its_end(run):
            self._end(run, "the run")
            self.put_back(run)
        else:
            self._gather(run)

    def _gather(self, run: Run) -> None:
        """Keep averages that are held in parts whole, for the time after the fit. All ranks together."""
        for name, averaged in self._averages.items():
            if isinstance(averaged.module, InParts) and run.team is not None and run.team.strategy.gather:
                state = parts_of(averaged, self._sources[name])
                self._gathered[name] = {key: whole(one) for key, one in state.items()}

    def _end(self, run: Run, what: str) -> None:
        if self.updates:
            self._measure(run)
        elif not (self._told or run.stop_reason or run.settings.get("debug")):  # else cut short, as was asked for
            warn(
                f"{type(self).__name__} has averaged nothing: it begins after '{self._begins}', and {what} ended after "
                f"{run.progress.epoch} epochs ({run.progress.step} steps). Begin earlier"
            )

    def _decides(self) -> bool:
        return self.replace_at_end

    def put_back(self, run: Run) -> None:
        """As the others, and keep the weights of the training for another fit that goes on."""
        trained = [whole(own.detach()).to("cpu", copy=True) for own in self._own()] if self.replace_at_end else []
        super().put_back(run)
        self._trained = trained
        self._gather(run)  # a run that had ended before is only loaded: nothing else is called

    def _put_back(self, run: Run) -> None:
        if self.updates and self.replace_at_end:
            self._measure(run)
            with torch.no_grad():
                for mine, averaged in self._pairs():
                    mine.copy_(averaged)

    @torch.no_grad()
    def _put_as_validated(self, state: Mapping[str, Any], step: int) -> None:
        """Put averages into the models, from a ``state`` of ``step``, if those are what a validation saw there."""
        for name in self.averages if state.get("shown_at") == step else ():
            model, kept = self._sources[name], state["averages"][name]
            held(model)
            own: dict[str, Tensor] = dict(model.named_parameters())
            own |= dict(model.named_buffers()) if self.buffers or self._measures else {}
            for key, mine in own.items():
                mine.copy_(like(mine, kept[f"module.{key}"]))

    # ------------------------------------------------------------------------------------------ what they do

    def _look(self, run: Run) -> None:
        """Take the weights into the average, if they are due."""
        progress = run.progress
        if not self._every.due(progress):
            return
        if self._start is not None and self._start.position(progress) < self._start.value:
            return
        shown = [other for other in self._others if other._shown]
        for other in shown:  # its averages are in the models, for a validation that begins
            other._exchange()
        for name, averaged in self.averages.items():
            if run.models[name] is not self._sources[name]:
                raise SettingError(
                    f"run.replace has changed {name!r}, and {type(self).__name__} holds averages of the one before; "
                    "begin another fit with the new model"
                )
            averaged.update_parameters(held(run.models[name]))
        for other in reversed(shown):
            other._exchange()
        self.updates += 1

    def _measure(self, run: Run) -> None:
        """Batch-norm statistics for the averaged weights, once for each average."""
        if not self._measures or self._measured == self.updates:
            return
        self._measured = self.updates
        with rng.forked(), torch.no_grad():
            for averaged in self.averages.values():
                update_bn(read(run, as_source(self.batch_norm, train=False, key=0), "batch_norm"), averaged)

    def _own(self) -> Iterator[Tensor]:
        """The tensors of the models that have an average."""
        for name in self.averages:
            held(self._sources[name])  # which leaves DTensors where the parameters are
            yield from self._sources[name].parameters()
            if self.buffers or self._measures:
                yield from self._sources[name].buffers()

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same, or what this rank holds of them, with their averages."""
        for name, averaged in self.averages.items():
            model = held(self._sources[name])
            yield from zip(model.parameters(), averaged.module.parameters(), strict=True)
            if self.buffers or self._measures:
                yield from zip(model.buffers(), averaged.module.buffers(), strict=True)

    @torch.no_grad()
    def _exchange(self) -> None:
        """Let models and averages change places; a second call undoes the first, bit for bit."""
        pairs = list(self._pairs())
        for mine, averaged in reversed(pairs) if self._shown else pairs:  # two models may share a tensor
            before = mine.clone()
            mine.copy_(averaged)
            averaged.copy_(before)
        self._shown = not self._shown

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The models have the averaged weights inside of this context, for a test or an export, and not after it."""
        if not self.updates:
            raise SettingError(f"{type(self).__name__} has averaged nothing yet; call fit with it first")
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state_dict(self) -> dict[str, Any]:
        averages = {
            name: parts_of(one, self._sources[name]) if isinstance(one.module, InParts) else dict(one.state_dict())
            for name, one in self.averages.items()
        }
        shown = {"shown_at": self._shown_at} if self._shown_at >= 0 else {}
        counts = {"updates": self.updates, "next": self._every.next, "measured": self._measured}
        return {"averages": averages, **counts, **shown}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, averaged in self.averages.items():
            if isinstance(averaged.module, InParts):
                load_parts(averaged, self._sources[name], state["averages"][name])
            else:
                averaged.load_state_dict(state["averages"][name])
        self.updates, self._measured, self._every.next = state["updates"], state["measured"], state["next"]
        self._shown_at = state.get("shown_at", -1)


def _averageable(run: Run) -> dict[str, nn.Module]:
    return {name: model for name, model in run.models.items() if any(True for _ in model.parameters())}


class EMA(Average):
    """An exponential moving average of the weights, shown to validation: ``decay * average + (1 - decay) * weights``.

    It takes the weights at ``every`` step ("10 steps", "1 epoch"); the first ones are copied. ``warmup=True`` begins
    with a smaller decay, ``(1 + n) / (10 + n)`` after n updates; ``Anneal({"decay": schedule}, of=ema)`` moves it.
    Buffers stay those of the model, or are averaged too with ``buffers=True``. ``models`` names some of
    ``run.models``; by default all are averaged, each for itself.
    ``evaluate=False`` lets validation see the weights in training. In ``on_validation_end`` all others see the
    averages, wherever they stand in the list, so that what keeps the best weights keeps those that were measured. After
    the fit the averages are in ``ema.averages[name].module``, and ``with ema.applied():`` puts them into the models for
    a while; ``replace_at_end=True`` leaves them there, among the callbacks of a stage at the end of that. Another fit
    of the same task with this object goes on from the weights of the training. Checkpoints hold both: the weights as
    the model's, the averages as this callback's.

    Reads: the weights. Changes: the weights that a validation sees, and with ``replace_at_end`` those after the fit.
    Training has the bits that it has without. Stops: no.
    Over ranks, ``buffers=True`` is refused before step 0, and another average that validation is to see always.
    Source: ``torch.optim.swa_utils.AveragedModel``, after Polyak & Juditsky 1992; the warm-up is TensorFlow's.

    >>> EMA(0.99, every="10 steps").decay
    0.99
    """

    _ranges: ClassVar = {"decay": (0.0, 1.0)}  # where a schedule may take it

    def __init__(
        self,
        decay: float = 0.999,
        *,
        every: str | int | Duration = "1 step",
        warmup: bool = False,
        buffers: bool = False,
        models: str | Sequence[str] | None = None,
        evaluate: bool = True,
        replace_at_end: bool = False,
    ) -> None:
        if not 0 <= decay < 1:
            raise SettingError(f"EMA(decay={decay!r}): expected a number from 0 to below 1, such as 0.999")
        super().__init__(every, models=models, evaluate=evaluate, replace_at_end=replace_at_end)
        self.decay, self.warmup, self.buffers = decay, warmup, buffers
        self._made: tuple[float, Any] | None = None

    def _averaged(self, model: nn.Module) -> AveragedModel:
        return AveragedModel(model, multi_avg_fn=self._move, use_buffers=self.buffers)

    def _move(self, averages: Any, values: Any, count: Any) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        if self._made is None or self._made[0] != decay:  # it may follow a schedule
            self._made = decay, get_ema_multi_avg_fn(decay)
        self._made[1](averages, values, count)


class SWA(Average):
    """Stochastic weight averaging: the mean of the weights at the end of each epoch from ``start`` on.

    ``start`` is how much is trained before the first weights count ("15 epochs"), ``every`` the distance of those that
    do. Use a constant or cyclical learning rate from there on, such as ``torch.optim.swa_utils.SWALR``.
    ``batch_norm`` is the data from which batch norm takes statistics for the averaged weights, in one pass before each
    validation and at the end (torch's ``update_bn``: the model is called with the first part of each batch);
    ``batch_norm=False`` keeps those of the model. A model with batch norm must say which. The other options and
    promises are those of ``EMA``.

    Reads: the weights. Changes: the weights that a validation sees, and with ``replace_at_end`` those after the fit.
    Stops: no.
    What EMA refuses is refused here too, and batch norm where ``batch_norm`` is not said.
    Source: Izmailov et al. 2018 (arXiv:1803.05407).

    >>> SWA("15 epochs").every
    '1 epoch'
    """

    def __init__(
        self,
        start: str | int | Duration,
        *,
        every: str | int | Duration = "1 epoch",
        batch_norm: Any = None,
        models: str | Sequence[str] | None = None,
        evaluate: bool = True,
        replace_at_end: bool = False,
    ) -> None:
        super().__init__(every, models=models, evaluate=evaluate, replace_at_end=replace_at_end)
        self.start, self.batch_norm = start, batch_norm
        self._start = self._counted("start", start)

    def _averaged(self, model: nn.Module) -> AveragedModel:
        return AveragedModel(model)
