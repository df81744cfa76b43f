"""The Trainer: friendly settings, and the few verbs that turn a task and data into a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from math import inf
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any, Never

import torch
from torch import nn

from loopwright import loop
from loopwright.accumulation import parse_accumulate
from loopwright.callbacks import Capsule, Checkpoint, ProgressBar
from loopwright.checkpoint.places import as_place
from loopwright.checkpoint.snapshot import unsaveable
from loopwright.compiling import Compiler, compile_options
from loopwright.cost import Meter, Rehearsal, cost_of
from loopwright.data import Cut, as_source, as_sources, opened, samples, shared
from loopwright.data.trained_on import TrainedOn
from loopwright.debug import Debug
from loopwright.delivery import check_logger
from loopwright.errors import (
    ABSENT,
    LoopwrightError,
    SettingError,
    choose,
    elsewhere,
    refuse_unknown,
    without_unknown,
)
from loopwright.events import Callback, Hooks, check_callback
from loopwright.every import Every
from loopwright.explain import explain, writers
from loopwright.foreign import EVAL_NAMES, FIT_NAMES, RUN_NAMES, TRAINER_NAMES
from loopwright.given import check_flag, check_list, check_seed, check_text, is_number, named
from loopwright.graphs import StepGraphs
from loopwright.handlers import Event, Filter, Handler
from loopwright.history import History, Series
from loopwright.interrupt import leave_if_interrupted, watch_signals
from loopwright.loggers import CSVLogger, JSONLLogger, logger_named
from loopwright.loggers.named import usual_loggers
from loopwright.metrics import check_metrics
from loopwright.optim import trainable_flags
from loopwright.parallel import (
    Single,
    check_counts,
    check_device,
    check_strategy,
    pick_precision,
    pick_team,
    watched,
)
from loopwright.plan import Plan, facts_of, make_plan
from loopwright.predictions import asking_for_predict_step, joined
from loopwright.prepare import Parts, assemble, measured_by, move_task, number_of
from loopwright.progress import Duration
from loopwright.resume import Point, Resume, find_point
from loopwright.reuse import keep_stages
from loopwright.session import closing_all, go_on, session
from loopwright.stages import admit_callbacks, chooses_parameters, inexact
from loopwright.state import Run, Stage
from loopwright.task import StepTask, Supervised, Task  # noqa: F401 - Supervised is for the doctest
from loopwright.written import blamed, caller, warn

__all__ = ["Trainer"]


class Trainer:
    """Settings of training; ``fit``, ``validate``, ``test``, ``predict`` and ``run`` use them on a task and data.

    Training lasts ``epochs``, ``steps`` or ``time`` ("10 min"), whichever is reached first. ``accumulate`` batches
    make one optimizer step, or so many as reach "256 samples" or "4096 tokens" (of ``fit(weight=)``); it may change:
    ``[(0, 1), (1000, 4)]`` by steps of the stage, or a function of ``run.progress``. ``clip_norm`` bounds the 2-norm
    of the gradients. ``callbacks`` are called in their order.
    A run has a folder ``folder/name/<time>-<id>`` with its records in ``metrics.jsonl`` (``folder=None`` writes
    nothing); ``loggers`` are what else receives them, by name (``"tensorboard"``, ``["csv", "mlflow"]``) or as objects;
    None are those that the environment variable ``LOOPWRIGHT_LOGGERS`` names.
    ``checkpoint`` is True (every 5 minutes and at the end), False, a ``Checkpoint`` or several.
    ``capsule`` keeps a step that fails in the run folder, for ``lw.replay``; ``lw.Capsule(...)`` among the callbacks
    takes its place. ``validate_every`` and ``log_every`` are durations, bare numbers steps, or several in
    the language of ``docs/guide.md``: "500 steps & after 1 epoch | at 10 min". ``seed`` seeds
    everything when training begins (a net made before has its weights already: call ``torch.manual_seed`` before
    making it), None leaves the global generators alone. ``deterministic`` asks torch for deterministic algorithms
    during the fit.
    ``precision`` is "fp32" (as the model and the data come), "bf16" or "fp16" (torch.autocast around the steps, fp16
    with torch's gradient scaler), "bf16-true" or "fp64" (the model, in place, and floating inputs are converted), a
    ``torch.amp.GradScaler`` or an object of one's own (``state.Precision``).
    ``nonfinite`` says what happens when a loss or gradient is NaN or infinite: "raise", "skip" or "skip 25"
    (at most so many steps in a row; 10 without a number), or None (train on). Under "fp16" that is for the loss: where
    only gradients overflow, the scaler drops the step and lowers its scale, 30 times in a row at most.

    ``compile=True`` compiles the steps (forward and loss, also those of validation, test and prediction) by
    torch.compile; a dict names its options. ``cuda_graphs=True`` records a training step, from its batch to the
    optimizers, and replays it: for small models on CUDA, with batches of few shapes (docs/precision.md).
    ``debug=lw.Debug(...)`` is for looking for mistakes: a rehearsal of the run, one batch again and again, a part of
    the data, anomaly mode, an audit, a profile.

    Raises SettingError for a value that cannot be used.

    >>> net = nn.Linear(2, 1)
    >>> task = Supervised(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.1))
    >>> data = [(torch.ones(4, 2), torch.zeros(4, 1))]
    >>> Trainer(epochs=2, folder=None, progress=False).fit(task, data).progress.step
    2
    """

    @elsewhere(**TRAINER_NAMES)
    def __init__(
        self,
        epochs: float | None = None,
        *,
        steps: int | None = None,
        time: str | None = None,
        device: str | torch.device = "auto",
        devices: int | str = "auto",
        nodes: int | str = "auto",
        strategy: Any = "auto",
        precision: Any = "fp32",
        accumulate: Any = 1,
        clip_norm: float | None = None,
        callbacks: Sequence[Callback] = (),
        loggers: str | Sequence[Any] | None = None,
        progress: bool | Callback = True,
        folder: str | Path | None = "runs",
        name: str | None = None,
        checkpoint: bool | Checkpoint | Sequence[Checkpoint] = True,
        capsule: bool = True,
        validate_every: int | str = "1 epoch",
        log_every: int | str = "50 steps",
        seed: int | None = None,
        deterministic: bool = False,
        nonfinite: str | None = "raise",
        compile: bool | Mapping[str, Any] = False,
        cuda_graphs: bool = False,
        debug: Debug | None = None,
    ) -> None:
        if loggers is None and folder is not None:
            loggers = usual_loggers() or None
        self.settings = {k: v for k, v in locals().items() if k != "self"}  # as given: one experiment, readable back
        self._made_at = caller()
        limits = (("epochs", epochs, "epochs"), ("steps", steps, "steps"), ("time", time, "seconds"))
        self.until = [_limit(name, value, unit) for name, value, unit in limits if value is not None]
        self.nonfinite, self.skip_limit = _nonfinite(nonfinite)
        if clip_norm is not None and not (is_number(clip_norm) and clip_norm > 0):
            raise SettingError(f"clip_norm={clip_norm!r}: expected a positive number, or None for no clipping")
        check_seed(seed, "to leave the generators alone")
        check_flag("deterministic", deterministic)
        if folder is not None and not isinstance(folder, (str, PathLike)):
            raise SettingError(f"folder={folder!r}: expected a path, such as folder='runs', or None to write nothing")
        if name is not None:
            check_text("name", name, "baseline")
        for what, when in (("validate_every", validate_every), ("log_every", log_every)):
            with named(what, when):
                Every(when)
        self.accumulate = parse_accumulate(accumulate)
        self.clip_norm, self.seed, self.deterministic = clip_norm, seed, deterministic
        self.validate_every, self.log_every = validate_every, log_every
        check_strategy(strategy)
        check_device(device)
        check_counts(devices, nodes)
        self.device, self.precision = device, precision
        self.devices, self.nodes, self.strategy = devices, nodes, strategy
        pick_precision(precision)
        self.compile = compile_options(compile)
        check_flag("cuda_graphs", cuda_graphs)
        self.cuda_graphs = cuda_graphs
        listed_loggers: Any = [loggers] if isinstance(loggers, str) else () if loggers is None else loggers
        check_list("callbacks", callbacks, "lw.EarlyStopping('valid/loss')")
        check_list("loggers", listed_loggers, "'csv'")
        if not isinstance(debug, (Debug, NoneType)):
            raise SettingError(f"debug={debug!r}: expected an lw.Debug, such as debug=lw.Debug(dev_run=2)")
        self.debug = debug or Debug()
        self.callbacks = [c for c in callbacks if not isinstance(c, Checkpoint)] + self.debug.callbacks()
        given = [c for c in callbacks if isinstance(c, Checkpoint)]
        if given and checkpoint is not True:
            raise SettingError(
                f"a Checkpoint is among the callbacks, and checkpoint={checkpoint!r} says otherwise; give all of them "
                "in one place: checkpoint=[lw.Checkpoint(...), ...]"
            )
        self.checkpoint = given or checkpoint
        self.loggers = [logger_named(one) if isinstance(one, str) else one for one in listed_loggers]
        self.progress, self.folder, self.name = progress, folder, name
        self.capsule = capsule
        self.handlers: list[Handler] = []
        explicit = not isinstance(self.checkpoint, bool)
        for saver in self.checkpoint if isinstance(self.checkpoint, (list, tuple)) else [self.checkpoint]:
            if explicit and not hasattr(saver, "due"):
                raise SettingError(
                    f"checkpoint={saver!r}: expected True, False, an lw.Checkpoint or a list of them, such as "
                    "checkpoint=lw.Checkpoint('10 min')"
                )
            if explicit and folder is None and getattr(saver, "folder", None) is None:
                raise SettingError(
                    "checkpoint=... needs a folder to write to; leave folder=None out, or checkpoint=False"
                )
        for logger in self.loggers:
            check_logger(logger)
            if folder is None and isinstance(logger, (CSVLogger, JSONLLogger)) and logger.path is None:
                kind, name = type(logger).__name__, "csv" if isinstance(logger, CSVLogger) else "jsonl"
                raise SettingError(
                    f"{kind}() has no place to write to, since folder=None: give the Trainer a folder, or the logger a "
                    f"path, loggers=['{name}:one.{name}'] or {kind}('one.{name}')"
                )
        if not isinstance(capsule, bool):
            raise SettingError(f"capsule={capsule!r}: expected True or False; lw.Capsule(...) goes among the callbacks")
        if not isinstance(progress, (bool, Callback)):
            raise SettingError(f"progress={progress!r}: expected True, False or a callback such as lw.ProgressBar()")
        for callback in self.callbacks:
            check_callback(callback)  # a wrong signature is an error here, where the callback was given

    # ------------------------------------------------------------------------------------------ handlers

    def on(
        self, event: Event | Filter, *args: Any, **kwargs: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a function for an event: ``@trainer.on(lw.Event.EPOCH_END(every=5))``.

        It is called as ``fn(run, *args, **kwargs)`` after the callbacks, in the order of registration; functions to
        call it with go by name. A parameter named like one of the hook's own (``result``, ``values``, ``batch``, ...)
        receives it. ``trainer.off(fn)`` removes it. What is registered during a fit is called from the next one on.

        >>> trainer = Trainer(epochs=1)
        >>> @trainer.on(Event.EPOCH_END(every=5))
        ... def look(run):
        ...     print(run.progress.epoch)
        """

        def register(fn: Callable[..., Any]) -> Callable[..., Any]:
            self.handlers.append(Handler(event, fn, args, kwargs))
            return fn

        if not isinstance(event, (Event, Filter)):
            Handler(event, lambda run: None, (), {})  # raises the error that lists the events
        if args and (inspect.isfunction(args[0]) or inspect.ismethod(args[0])) and _is_handler(event, *args, **kwargs):
            name = args[0].__name__
            raise SettingError(
                f"trainer.on({event}, {name}) registers nothing; write trainer.on({event})({name}). A function that a "
                "handler is to be called with is given by name: trainer.on(event, fn=...)"
            )
        return register

    def off(self, fn: Callable[..., Any]) -> None:
        """Remove every registration of ``fn``, also from a run that is under way. SettingError if there is none."""
        found = [h for h in self.handlers if h.fn is fn or h.fn == fn]  # a bound method is a new object each time
        if not found:
            name = getattr(fn, "__qualname__", repr(fn))
            raise SettingError(f"{name} is not a handler here. {choose(name, [h.name for h in self.handlers])}")
        for handler in found:
            handler.removed.append(True)
            self.handlers.remove(handler)

    # ------------------------------------------------------------------------------------------ verbs

    @without_unknown
    def fit(
        self,
        task: Task = ABSENT,
        train: Any = ABSENT,
        valid: Any = None,
        *,
        stages: Sequence[Stage] | None = None,
        weight: Callable[[Any], float] | None = None,
        resume: Resume | str | Path | None = None,
        **unknown: Never,
    ) -> Run:
        """Train ``task`` on ``train``, validating on ``valid``, and return the run.

        Data is a DataLoader, a Dataset, arrays such as ``(X, y)``, a list of batches, a generator function, or a
        DataModule; ``valid`` may be a dict of several. ``weight(batch)`` gives the samples or tokens of a batch where
        its first dimension does not; with accumulation it makes the window be read ahead, which moves the draws of a
        dataset that uses the global generators in this process. The same task fitted again goes on to the new total.

        ``resume="auto"`` goes on with the newest checkpoint of the newest run of this name, to the same bits as if it
        had never stopped; where there is none, training begins; where it had ended, it comes back as it was, what
        callbacks remember too, and nothing else is done. ``resume=path`` goes on from a checkpoint or a run;
        ``lw.Resume`` says more.

        Raises PlanError, before any work starts, with everything that cannot work, and CheckpointError for a
        checkpoint that is damaged, does not fit, or could not go on exactly.
        """
        refuse_unknown(unknown, self.fit, FIT_NAMES, task=task, train=train)
        run, parts, point = self._prepare(task, train, valid, stages, weight, resume)
        if self._begins(run, parts, point, stages):
            with self._session(run, parts):
                loop.train(run)
            leave_if_interrupted(run)
        return run

    @without_unknown
    def run(
        self,
        step: Callable[[Run, Any], Any] = ABSENT,
        data: Any = ABSENT,
        *,
        state: Mapping[str, Any] | None = None,
        weight: Callable[[Any], float] | None = None,
        resume: Resume | str | Path | None = None,
        **unknown: Never,
    ) -> Run:
        """Call ``step(run, batch)`` for each batch: the step does all the work, with any library.

        What it returns is logged: a number, a scalar tensor, a dict of these, or None. ``state`` names the objects that
        checkpoints hold: with ``state_dict`` (an optimizer with what it moves), tensors that are changed in place, or
        pairs ``(get, set)``. ``resume`` is that of ``fit``.

        >>> seen = []
        >>> run = Trainer(epochs=2, folder=None, progress=False).run(lambda run, batch: seen.append(batch), [1, 2, 3])
        >>> seen
        [1, 2, 3, 1, 2, 3]
        """
        refuse_unknown(unknown, self.run, RUN_NAMES, step=step, data=data)
        run, parts, point = self._prepare(StepTask(step, state), data, None, None, weight, resume)
        if self._begins(run, parts, point):
            with self._session(run, parts):
                loop.train(run)
            leave_if_interrupted(run)
        return run

    @elsewhere(**EVAL_NAMES)
    def validate(self, task: Task, data: Any, *, weight: Callable[[Any], float] | None = None) -> dict[str, float]:
        """Metrics and means of ``validation_step`` over ``data``, as ``valid/<name>``, weighted as in ``fit``."""
        return self._evaluate(task, data, "valid", weight)

    @elsewhere(**EVAL_NAMES)
    def test(self, task: Task, data: Any, *, weight: Callable[[Any], float] | None = None) -> dict[str, float]:
        """Metrics and means of ``test_step`` over ``data``, which may be arrays ``(X, y)``, as ``test/<name>``."""
        return self._evaluate(task, data, "test", weight)

    @elsewhere(**EVAL_NAMES)
    def predict(self, task: Task, data: Any) -> Any:
        """What ``predict_step`` returns, for all samples in order, on the CPU.

        Tensors are joined along dimension 0, also inside dicts, lists and tuples; anything else comes as a list with
        one entry a batch.
        """
        run = self._bare(_checked(task))
        source = as_source(opened(data, "predict", run.comm), train=False, key=self._key())
        _compare(run, {"": source}, "predict")
        if run.team is not None:
            source = _begin_evaluation(run, {"": source})[""]
        with loop.leaving(run), closing_all([source]), watched(run), asking_for_predict_step(task):
            return joined(loop.predict(run, source, _compiled(run, task.predict_step)))

    @elsewhere(**FIT_NAMES)
    def plan(
        self,
        task: Task | Callable[[Run, Any], Any],
        train: Any,
        valid: Any = None,
        *,
        stages: Sequence[Stage] | None = None,
        weight: Callable[[Any], float] | None = None,
        resume: Resume | str | Path | None = None,
        measure: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Check all that can be checked before step 0, and say what the run will do. Reads no batch.

        What a checkpoint could not hold is among the problems, and why a resume could not be exact among the facts.
        With ``resume``, as it is given to ``fit``, so is a checkpoint that is not there, is damaged, does not fit or
        could not go on exactly; nothing is loaded. ``weight`` is that of ``fit``.
        ``measure=20`` trains as ``lw.Debug(dev_run=20)`` does, two epochs of so many batches, and puts back all that
        this has changed; ``plan.cost`` then says how many steps the whole run has, and what it takes: time, memory,
        bytes of checkpoints. A function ``step(run, batch)`` is planned as ``run`` takes it, with ``state``.

        >>> net = nn.Linear(2, 1)
        >>> task = Supervised(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.1))
        >>> Trainer(epochs=50).plan(task, (torch.ones(640, 2), torch.zeros(640, 1)), measure=3).cost.steps
        500
        >>> print(Trainer(epochs=2, folder=None).plan(lambda run, batch: None, [1, 2, 3], state={}).facts[0])
        stage 'main': until 2 epochs; an epoch is 3 batches, 3 steps; phases: main
        """
        if type(measure) is not int or measure < 0:
            raise SettingError(
                f"measure={measure!r}: expected a number of batches, such as measure=20; 0 measures none"
            )
        plan = Plan()
        try:
            what = _task_of(task, valid, stages, state)
            run, parts, point = self._prepare(what, train, valid, stages, weight, resume, tidy=False)
            try:
                plan = make_plan(run, made_at=self._made_at, resumes=point is not None)
                plan.facts += facts_of(run)
                plan.add(unsaveable(run).items() if run.savers else ())  # in a fit, savers say so themselves
                if point is not None:
                    plan.facts.append(f"goes on from {point.data.path}")
                    point.check(run)
            finally:
                parts.undo()
        except LoopwrightError as error:
            plan.add([(str(error), blamed(error) or caller())])
            return plan
        if measure and not plan.problems:
            meter = Meter()
            given = {"callbacks": [*self.settings["callbacks"], meter], "progress": False}
            rehearsal = Trainer(**{**self.settings, **given, "debug": Rehearsal(dev_run=measure)})
            rehearsal.handlers = self.handlers
            if isinstance(what, StepTask):
                rehearsal.run(what.step, train, state=what.given, weight=weight)
            else:
                rehearsal.fit(what, train, valid, stages=stages, weight=weight)
            plan.cost = cost_of(run, meter)
            plan.facts.append(f"cost: {plan.cost}")
        return plan

    @elsewhere(**FIT_NAMES)
    def explain(
        self,
        task: Task | Callable[[Run, Any], Any],
        train: Any,
        valid: Any = None,
        *,
        stages: Sequence[Stage] | None = None,
        of: str | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> str:
        """The flat loop of this very run, with each callback and handler in its place, as text to print.

        ``of="loss"`` tells instead who writes the loss, in order, and who is given it to read; likewise "batch",
        "output", "gradients", "weights" and "lr". A function ``step(run, batch)`` is taken as by ``run``, with
        ``state``.

        >>> net = nn.Linear(2, 1)
        >>> task = Supervised(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.1))
        >>> data = [[torch.ones(4, 2), torch.ones(4, 1)]]
        >>> print(Trainer(epochs=1, clip_norm=1.0).explain(task, data, of="gradients"))
        gradients, in this order:
          1. the start of the step, which sets them to None
          2. loss.backward()
          3. clipping to a norm of 1
        >>> def count(run, batch): ...
        >>> print(Trainer(epochs=1, folder=None, progress=False).explain(count, [1, 2], of="output"))
        output, in this order:
          1. count(batch), which returns it
        """
        run, parts, _ = self._prepare(_task_of(task, valid, stages, state), train, valid, stages, None)
        parts.undo()
        return explain(run) if of is None else writers(run, of)

    # ------------------------------------------------------------------------------------------ how a run is made

    def _label(self, task: Any) -> str:
        """The folder of runs of ``task``: the given name, or the class of what is trained."""
        return self.name or type(next(iter(task.models().values()), task)).__name__

    def _key(self) -> int:
        return torch.initial_seed() if self.seed is None else self.seed

    def _prepare(
        self,
        task: Any,
        train: Any,
        valid: Any,
        stages: Sequence[Stage] | None,
        weight: Callable[[Any], float] | None,
        resume: Resume | str | Path | None = None,
        *,
        tidy: bool = True,
    ) -> tuple[Run, Parts, Point | None]:
        if not isinstance(task, StepTask):
            _checked(task)
        if not self.until and not stages:
            raise SettingError(
                "how long to train is not said; write lw.Trainer(epochs=10), steps=1000 or time='10 min'"
            )
        if stages and self.until:
            raise SettingError(
                "both the Trainer and the stages say how long to train; leave epochs, steps and time out of the Trainer"
            )
        elsewhere = [as_place(saver.folder) for saver in self._savers() if getattr(saver, "folder", None) is not None]
        run, label = self._bare(task, moves=False), self._label(task)
        point = None
        if resume is not None:
            mesh = None if run.team is None else run.team.sharing(run.device)
            point = find_point(resume, self.folder, label, elsewhere=elsewhere, comm=run.comm, mesh=mesh, tidy=tidy)
        if self.debug.dev_run and resume is not None:
            raise SettingError("Debug(dev_run=...) rehearses a run from its start; leave resume out of fit")
        begins = point is not None or self.debug.dev_run
        previous: Run | None = None if begins else getattr(task, "_run", None)
        key = run.comm.broadcast(self._key()) if point is None or point.key is None else point.key
        try:
            parts = assemble(
                task, train, valid, list(stages) if stages else None, until=self.until, accumulate=self.accumulate,
                clip_norm=self.clip_norm, validate_every=self.validate_every, weight=weight, key=key,
                comm=run.comm, holds=run.precision.holds, previous=previous, run=run,
            )  # fmt: skip
        except BaseException:
            if run.team is not None:
                run.team.undo()
            raise
        parts.label = label
        if run.team is not None:
            parts.undo_shards = run.team.undo
        with parts.undone_unless_begun(run):
            self.debug.narrow(run, parts.stages)
        _share_out(run, parts.stages)
        run.stages, run.models, run.optimizers, run.data = parts.stages, parts.models, parts.optimizers, train
        admit_callbacks(run)
        run.settings = {**self.settings, "key": key, "debug": self.debug.settings() or None}
        run.meters["valid"] = measured_by(parts.metrics)
        run.savers, run.loggers = self._savers(), self._loggers() if run.comm.rank == 0 else []
        run.nonfinite, run.skip_limit = self.nonfinite, self.skip_limit
        run.trainable = trainable_flags(task) if chooses_parameters(run) and isinstance(task, nn.Module) else {}
        if run.compiler is not None:
            for phase in (phase for stage in run.stages for phase in stage.phases):
                phase.step = run.compiler(phase.step)
        run.exact = inexact(run) or True
        if isinstance(task, StepTask):
            task.run, run.state = run, task.state
        if previous is not None:
            go_on(run, previous)
            for handler, old in product(run.handlers, previous.handlers):
                handler.take_over(old)
        return run, parts, point

    def _begins(self, run: Run, parts: Parts, point: Point | None, stages: Sequence[Stage] | None = None) -> bool:
        """Check all that can be; False if the run has been resumed at its end, and there is nothing left to do."""
        with parts.undone_unless_begun(run):
            plan = make_plan(run, made_at=self._made_at, resumes=point is not None)
            plan.check()
            for odd in plan.warnings:
                warn(plan.with_place(odd))
            if (point is None or point.how == "exact") and run.progress.step == 0:
                kept = keep_stages(run, stages, self.folder, parts.label)
                point = kept.find(run) if kept is not None and point is None else point
            if point is None:
                return True
            point.prepare(run)
            if not point.finished(run):
                return True
            point.end(run)
            if run.team is not None:
                run.team.end(run)
            return False

    @contextmanager
    def _session(self, run: Run, parts: Parts) -> Iterator[None]:
        root = self.debug.around(run, self.folder, parts.undo)
        made: dict[str, Any] = dict(seed=self.seed, label=parts.label, deterministic=self.deterministic)
        with parts.undone_unless_begun(run), watch_signals(run), root as folder, session(run, root=folder, **made):
            yield

    def _bare(self, task: Any, *, moves: bool = True) -> Run:
        """A run with nothing to train yet: enough to evaluate or predict."""
        bar = [self.progress if isinstance(self.progress, Callback) else ProgressBar()] if self.progress else []
        capsules = [c for c in self.callbacks if isinstance(c, Capsule)]
        if not capsules and self.capsule and self.folder is not None and not self.debug.dev_run:
            capsules = [Capsule()]
        others = [c for c in self.callbacks if not isinstance(c, Capsule)]  # a capsule sees all before they do
        callbacks, history = [*capsules, *others, *bar], History()
        handlers = [handler.anew() for handler in self.handlers]  # what they count belongs to the run
        handlers += [handler for callback in callbacks for handler in getattr(callback, "handlers", list)()]
        device, team = pick_team(self.device, devices=self.devices, nodes=self.nodes, strategy=self.strategy)
        precision, models = pick_precision(self.precision, device), task.models()
        if moves:
            move_task(task, models, device, precision.holds)
        if team is not None and team.comm.rank:
            callbacks = [c for c in callbacks if c not in bar]
        return Run(
            task=task, stages=[], models=models, optimizers={}, callbacks=callbacks,
            hooks=Hooks(callbacks, handlers), comm=Single() if team is None else team.ranks, team=team,
            precision=precision, device=device,
            handlers=handlers, moves_batches=device.type != "cpu" or precision.holds is not None,
            history=history, series=Series(history.losses, shared=team is not None), log_every=Every(self.log_every),
            compiler=None if self.compile is None else Compiler(self.compile, device),
            graphs=StepGraphs(device) if self.cuda_graphs else None,
        )  # fmt: skip

    def _savers(self) -> list[Any]:
        if self.checkpoint is False or (self.folder is None and self.checkpoint is True):
            return []
        if self.checkpoint is True:
            return [Checkpoint()]
        given = list(self.checkpoint) if isinstance(self.checkpoint, (list, tuple)) else [self.checkpoint]
        return self.debug.rehearsed(given) if self.debug.dev_run else given

    def _loggers(self) -> list[Any]:
        if self.debug.dev_run:
            return [JSONLLogger()]
        own = self.folder is not None and not any(isinstance(logger, JSONLLogger) for logger in self.loggers)
        return ([JSONLLogger()] if own else []) + self.loggers

    def _evaluate(self, task: Any, data: Any, kind: str, weight: Callable[[Any], float] | None) -> dict[str, float]:
        run = self._bare(_checked(task))
        run.settings = {} if weight is None else {"weight": weight}
        run.meters[kind] = measured_by(check_metrics(task.configure_metrics()))
        step = _compiled(run, task.test_step if kind == "test" else task.validation_step)
        found = opened(data, kind, run.comm)
        if found is None:
            as_source(found, train=False, key=0)  # raises: to measure nothing is no success
        sources = as_sources(found, self._key())
        _compare(run, sources, kind)
        if run.team is not None:
            sources = _begin_evaluation(run, sources)
        with loop.leaving(run), closing_all(sources.values()), watched(run):
            return loop.evaluate(run, sources, step, samples if weight is None else number_of(weight), kind=kind)


def _is_handler(event: Event | Filter, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """True for a function that can be called at ``event``."""
    try:
        Handler(event, fn, args, kwargs)
    except SettingError:
        return False
    return True


def _share_out(run: Run, stages: Sequence[Stage]) -> None:
    """Let this rank read its part of the data: a slice of each batch, or every so many-th batch in evaluation."""
    if run.team is not None:
        train, valid = _cut(run), _cut(run, whole=True)
        for stage in stages:
            stage.source = shared(stage.source, train)
            stage.valid = {name: shared(one, valid) for name, one in stage.valid.items()}


def _cut(run: Run, *, whole: bool = False) -> Cut:
    fills = run.team.shards if whole else run.team.fills  # batch norm over ranks waits for nobody in evaluation
    return Cut(run.team.comm.rank, run.team.comm.world_size, whole, fills)


def _begin_evaluation(run: Run, sources: Mapping[str, Any]) -> dict[str, Any]:
    run.team.begin(run)
    return {name: shared(source, _cut(run, whole=True)) for name, source in sources.items()}


def _checked(task: Any) -> Any:
    if isinstance(task, Task):
        return task
    if isinstance(task, type):
        raise SettingError(f"{task.__name__} is a class; make an instance: {task.__name__}()")
    if isinstance(task, nn.Module):
        raise SettingError(
            f"{type(task).__name__} is a plain module; say how to train it: lw.Supervised(module, "
            f"loss=nn.CrossEntropyLoss(), "
            "optimizer=torch.optim.AdamW(module.parameters(), lr=1e-3)), or derive it from lw.Task"
        )
    raise SettingError(
        f"{type(task).__name__} is no task; pass lw.Supervised(...) or an lw.Task, or call trainer.run(step, data)"
    )


def _task_of(task: Any, valid: Any, stages: Any, state: Mapping[str, Any] | None) -> Any:
    """What ``plan`` and ``explain`` look at: a task as it is, a function as ``Trainer.run`` takes it."""
    if isinstance(task, (nn.Module, type)) or not callable(task):
        if state is not None:
            raise SettingError("state= goes with a function step(run, batch); a task holds its own, leave it out")
        return task
    for name, given in (("valid", valid), ("stages", stages)):
        if given is not None:
            raise SettingError(f"{name}= goes with a task; trainer.run(step, data) has none, leave it out")
    return StepTask(task, state)


def _compiled(run: Run, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``step`` as this run calls it."""
    if run.compiler is None:
        return step
    problem = run.compiler.problem(run.device)
    if problem is not None:
        raise SettingError(problem)
    compiled: Callable[[Any], Any] = run.compiler(step)
    return compiled


def _compare(run: Run, sources: Mapping[str, Any], kind: str) -> None:
    """Refuse tables with other columns than those on which the task was trained, and let batches be compared.

    What it was trained on is known where it was trained, or where its weights were loaded from.
    """
    trained: Run | None = getattr(run.task, "_run", None)
    known = TrainedOn.remembered((run.task, *run.models.values()))
    if known is None and trained is not None:
        known = TrainedOn.of(trained)
    if known is not None:
        run.schema = known.schema
        for source in sources.values():
            known.check(source, kind)


_SUCH_AS = {"epochs": "10", "steps": "1000", "time": "'10 min'"}


def _limit(name: str, value: Any, unit: str) -> Duration:
    if isinstance(value, (int, float)) and not (is_number(value) and 0 < value < inf):
        raise SettingError(f"{name}={value!r}: expected a positive number, such as {name}={_SUCH_AS[name]}")
    with named(name, value):
        limit = Duration.parse(value, unit=unit)
    if limit.unit != unit:
        if limit.unit == "percent":
            raise SettingError(
                f"{name}={value!r} is a part of a whole whose length nothing else says; write {name}={_SUCH_AS[name]}, "
                "or epochs=0.25 for a quarter of an epoch"
            )
        argument = {"epochs": "epochs", "steps": "steps", "seconds": "time"}.get(limit.unit)
        instead = f"{argument}={value!r}" if argument else f"fit(..., stages=[lw.Stage('all', until={value!r})])"
        raise SettingError(f"{name}={value!r} is not a number of {unit}; write {instead} instead")
    return limit


def _nonfinite(value: str | None) -> tuple[str | None, int]:
    words = value.split() if isinstance(value, str) else []
    if value is None or words == ["raise"]:
        return value, 0
    if words[:1] == ["skip"] and len(words) <= 2 and (len(words) == 1 or (words[1].isdigit() and int(words[1]) > 0)):
        return "skip", int(words[1]) if len(words) == 2 else 10
    raise SettingError(f"nonfinite={value!r}: expected 'raise', 'skip', 'skip 25' (at most so many in a row) or None")
