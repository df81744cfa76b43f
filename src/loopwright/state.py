"""What a run is made of: progress, phases, stages, the run itself, and the few protocols that it holds."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from loopwright.accumulation import parse_accumulate
from loopwright.delivery import hand_over, log_values, takes
from loopwright.errors import SettingError, choose, name_nearest
from loopwright.every import Every
from loopwright.given import check_list, check_text, is_number, not_callable_with
from loopwright.history import History, Series
from loopwright.notebook import sparkline, table_html
from loopwright.progress import Duration, Progress, Whole
from loopwright.text import format_time, format_value, rule_name
from loopwright.written import caller

if TYPE_CHECKING:
    import torch

    from loopwright.events import Callback, Hooks

__all__ = [
    "Comm",
    "Duration",
    "Every",
    "Logger",
    "Metric",
    "Phase",
    "Precision",
    "Progress",
    "Run",
    "Saver",
    "Source",
    "Stage",
    "StepResult",
    "Strategy",
    "has_state",
]


# ---------------------------------------------------------------------------------------------- protocols


class Source(Protocol):
    """Batches in a known order. One pass of training is ``at(epoch, 0)``.

    ``state_dict`` is asked between steps; after ``load_state_dict`` the next ``at(epoch, batch)`` goes on exactly
    there and leaves the global random generators as it found them. ``exact`` lists the reasons why it could not.
    """

    def at(self, epoch: int, batch: int) -> Iterator[Any]:
        """Batches of ``epoch``, the first ``batch`` of them left out."""
        ...

    def sizes(self, batch: int) -> Iterator[int] | None:
        """Samples in each batch from ``batch`` on, when the plan of the order tells; None where only reading tells."""
        ...

    @property
    def batches(self) -> int | None:
        """Batches in an epoch; None when unknown."""
        ...

    @property
    def exact(self) -> list[str]:
        """Reasons why a resume could not be exact; empty when it is."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def has_state(obj: object) -> bool:
    """True for what can be saved and put back: it has ``state_dict`` and ``load_state_dict``."""
    return callable(getattr(obj, "state_dict", None)) and callable(getattr(obj, "load_state_dict", None))


@runtime_checkable
class Metric(Protocol):
    """What a metric must offer; every torchmetrics metric does."""

    def update(self, *args: Any) -> None: ...
    def compute(self) -> Any: ...
    def reset(self) -> None: ...


class Logger(Protocol):
    """A destination of records. Only ``log`` is required; the others are called where they exist.

    ``kind`` is "train" (each ``log_every``), "valid" (each validation) or "epoch" (each epoch).
    """

    def log(self, progress: Progress, values: Mapping[str, float], kind: str) -> None: ...


class Saver(Protocol):
    """Writes checkpoints. The loop asks ``due`` between steps, and calls ``save`` when it says so.

    ``end`` is called once all is trained and saved; ``finish`` waits for what is being written, also after an error.
    """

    at_end: bool
    monitor: str | None

    def start(self, run: Run) -> None: ...
    def due(self, run: Run, *, validated: bool) -> bool: ...
    def save(self, run: Run) -> Any: ...
    def end(self, run: Run) -> None: ...
    def finish(self, run: Run) -> None: ...


class Comm(Protocol):
    """The other processes of this run."""

    rank: int
    world_size: int
    speakers: Sequence[int]  # the ranks whose measurements count: one of those that see the same samples

    def sum(self, value: float) -> float:
        """``value`` summed over all ranks."""
        ...

    def any(self, flag: bool) -> bool:
        """True if ``flag`` is true on any rank."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of every rank, in their order, on every rank."""
        ...

    def broadcast(self, value: Any) -> Any:
        """The ``value`` of rank 0."""
        ...

    def first(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns on rank 0, which alone calls it."""
        ...


class Strategy(Protocol):
    """How a model is spread over ranks, and its gradients joined."""

    name: str

    def begin_stage(self, run: Run, stage: Stage) -> Mapping[str, Any]:
        """Change the steps of the stage's phases so that their gradients are joined; what does it, by phase.

        Each has ``last`` (set before the last batch of a window), ``stale``, ``seconds``, ``flush()`` and ``check()``.
        A strategy with ``shards = True`` shares the parameters out as well: see ``FSDP`` for what it has besides. One
        in which several ranks see the same samples says so by ``data_part(device, world_size)``: which part of each
        batch this rank has (rank 0 has part 0), and how many parts there are. What joins the gradients takes their mean
        over the parts.
        """
        ...


class Precision(Protocol):
    """How numbers are held while a step runs.

    ``plain`` is true when nothing is to be done around a step; otherwise ``autocast`` is entered for each batch.
    ``holds`` is the dtype to which floating parameters, buffers and inputs are converted, or None. ``scaler`` is a
    ``torch.amp.GradScaler``, or None. What has ``state_dict`` and ``load_state_dict`` as well is in checkpoints.
    """

    name: str
    plain: bool

    @property
    def holds(self) -> torch.dtype | None: ...

    @property
    def scaler(self) -> torch.amp.GradScaler | None: ...

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]: ...


# ---------------------------------------------------------------------------------------------- the run

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # as a stop_reason they interrupt a run; any other reason ends it
OWED = -2  # as validated_at: a signal cut a validation within an epoch short, and it is made first thing after a resume

Step = Callable[[Any], Any]


@dataclass(slots=True)
class Phase:
    """One objective and the optimizers that it moves; a GAN has two.

    ``step(batch)`` returns the loss, or a dict with ``"loss"``. ``optimizers`` names those of
    ``configure_optimizers`` (or gives instances); None means all. A phase with ``optimizers=()`` moves nothing by
    itself: its step does all the work. ``every=5`` lets it run at optimizer steps 5, 10, ... of the run; a function of
    the run is asked before each step, and the phase runs where it returns True. What it may read to be the same after
    a resume: ``run.progress``, ``run.latest`` (the latest value of each name that a step returned), ``run.metrics``.
    ``clip_norm`` bounds the 2-norm of all its gradients. ``schedule`` is one of ``lw.schedules``, a dict of them by
    hyper-parameter, a torch scheduler, or a factory ``optimizer -> scheduler``.

    >>> Phase("generator", step=lambda batch: {"loss": batch.mean()}, optimizers="gen", every=5).every
    5
    >>> def clear(run):
    ...     return run.latest.get("critic/loss", 1.0) < 0.5
    >>> lazy = Phase("generator", step=lambda batch: {"loss": batch.mean()}, optimizers="gen", every=clear)
    """

    name: str
    step: Step
    optimizers: str | Optimizer | Sequence[str | Optimizer] | None = None
    every: int | Callable[[Run], Any] = 1
    clip_norm: float | None = None
    schedule: Any = None
    # filled in before training starts
    moved: tuple[Optimizer, ...] = field(default=(), init=False, repr=False)
    step_schedulers: tuple[Any, ...] = field(default=(), init=False, repr=False)
    epoch_schedulers: tuple[Any, ...] = field(default=(), init=False, repr=False)
    meters: Any = field(default=None, init=False, repr=False)
    prefix: str = field(default="", init=False, repr=False)
    closure: bool = field(default=False, init=False, repr=False)  # the optimizer calls back, as LBFGS does

    def __post_init__(self) -> None:
        check_text("name", self.name, "generator", where="Phase: ")
        if not callable(self.step):
            raise SettingError(
                f"Phase {self.name!r}: step={self.step!r} cannot be called; pass a function of the batch"
            )
        number = isinstance(self.every, int) and not isinstance(self.every, bool) and self.every >= 1
        if not number and (isinstance(self.every, type) or not callable(self.every)):
            raise SettingError(
                f"Phase {self.name!r}: every={self.every!r}; expected a whole number of steps, from 1, or a function "
                "of the run that says whether it is to run in the next step"
            )
        rule: Any = self.every
        if not number and (why := not_callable_with(rule, "run")) is not None:
            raise SettingError(f"Phase {self.name!r}: every={rule_name(self.every)}{why}. Write: every=lambda run: ...")
        moved: Any = self.optimizers
        several = moved is not None and not isinstance(moved, (str, Optimizer))
        listed = isinstance(moved, (list, tuple)) and all(isinstance(one, (str, Optimizer)) for one in moved)
        if several and not listed and (isinstance(moved, (list, tuple)) or not isinstance(moved, Iterable)):
            raise SettingError(
                f"Phase {self.name!r}: optimizers={self.optimizers!r}; expected a name of those of "
                "configure_optimizers, an optimizer, a list of these, or None for all"
            )
        if self.clip_norm is not None and not (is_number(self.clip_norm) and self.clip_norm > 0):
            raise SettingError(f"Phase {self.name!r}: clip_norm={self.clip_norm!r}; expected a positive number or None")

    def is_due(self, run: Run) -> bool:
        """True if this phase runs in the step that comes next; with several ranks, rank 0 says so."""
        if isinstance(self.every, int):
            return (run.progress.step + 1) % self.every == 0
        due = bool(self.every(run))
        return due if run.comm.world_size == 1 else bool(run.comm.broadcast(due))

    def parameters(self) -> list[Tensor]:
        """All parameters that this phase moves, as they stand in its optimizers now."""
        return [p for optimizer in self.moved for group in optimizer.param_groups for p in group["params"]]


@dataclass(slots=True)
class Stage:
    """A part of an experiment: "train the head for 1 epoch, then all for 4" is a list of two.

    ``until`` is a duration counted from the start of the stage, or several: "10 epochs | 2 h" (whichever is over
    first), "2 epochs & 500 steps" (both are). ``source``, ``valid``, ``phases``, ``accumulate``,
    ``weight`` and ``validate_every`` left None are those of ``fit``. ``weight(batch)`` gives the samples or tokens of
    a batch. ``train`` holds name patterns (``"head.*"``) of the parameters that this stage trains, ``freeze`` of those
    that it does not; with neither, requires_grad is left as the user set it. ``schedule`` takes the place of all
    others in this stage: one of ``lw.schedules``, or a dict of them by hyper-parameter; ``lr`` is that of the learning
    rate alone, or a number. After the stage, what it has set has the values again that were there before it.

    ``until`` may also be a ``Plateau``, alone or in a list with durations: whichever comes first. ``loss`` takes the
    place of the task's own during the stage. ``callbacks`` are active in this stage only, after those of the Trainer;
    only ``on_fit_start``, ``on_fit_end`` and ``on_exception`` reach them whatever stage is open. ``reuse=True``: where
    a run of this name has finished this very stage before, it is not trained again; its end is loaded.
    ``loop(run, stage)`` goes through an epoch in the place of ``loop.train_epoch``.

    >>> Stage("head", until="1 epoch", train="head.*").until
    '1 epoch'
    """

    name: str
    until: Any
    source: Any = None
    valid: Any = None
    phases: Any = None
    accumulate: Any = None
    weight: Any = None
    validate_every: Any = None
    optimizer: Any = None
    train: str | Sequence[str] | None = None
    freeze: str | Sequence[str] | None = None
    lr: Any = None
    schedule: Any = None
    scheduled: tuple[Any, ...] = field(default=(), init=False, repr=False)  # what is set before every step
    whole: Whole = field(default=Whole(()), init=False, repr=False)
    loss: Any = None
    callbacks: Sequence[Any] = ()
    reuse: bool | str = False
    loop: Callable[[Run, Stage], None] | None = None
    ends: list[str] = field(default_factory=list, init=False, repr=False)  # ``until`` in words
    counts_samples: bool = field(default=True, init=False, repr=False)  # no weight function: sizes come from the plan
    made_at: str | None = field(default_factory=caller, init=False, repr=False, compare=False)  # file and line

    def __post_init__(self) -> None:
        check_text("name", self.name, "head", where="Stage: ")
        ends = self.until if isinstance(self.until, (list, tuple)) else [self.until]
        if not ends or any(one is None or (isinstance(one, str) and not one.strip()) for one in ends):
            raise SettingError(
                f"Stage {self.name!r}: until={self.until!r} says no end, and it would train forever; write a duration, "
                "until='2 epochs', or several, until=['10 epochs', '2 h'], of which the first one counts"
            )
        if self.accumulate is not None:
            parse_accumulate(self.accumulate)
        for name, patterns in (("train", self.train), ("freeze", self.freeze)):
            listed = [patterns] if isinstance(patterns, str) else patterns
            if listed is not None and not (isinstance(listed, Iterable) and all(isinstance(p, str) for p in listed)):
                raise SettingError(
                    f"Stage {self.name!r}: {name}={patterns!r}; expected a pattern of names of parameters, such as "
                    f"{name}='head.*', or a list of them"
                )
        for name, kind in (("loss", self.loss), ("loop", self.loop)):
            if kind is not None and (isinstance(kind, type) or not callable(kind)):
                raise SettingError(f"Stage {self.name!r}: {name}={kind!r} cannot be called; pass a function")
        if self.loop is not None and (why := not_callable_with(self.loop, "run", "stage")) is not None:
            raise SettingError(
                f"Stage {self.name!r}: loop={rule_name(self.loop)}{why}. Write: def loop(run, stage): ..."
            )
        check_list("callbacks", self.callbacks, "lw.EarlyStopping('valid/loss')", where=f"Stage {self.name!r}: ")
        if not isinstance(self.reuse, (bool, str)):
            raise SettingError(
                f"Stage {self.name!r}: reuse={self.reuse!r}; expected True, False, or a text that names a version"
            )
        if self.lr is not None and self.schedule is not None:
            raise SettingError(
                f"Stage {self.name!r} has both lr= and schedule=; write schedule={{'lr': {self.lr!r}, ...}} for both"
            )

    @property
    def epoch_steps(self) -> int | None:
        """Optimizer steps of an epoch of a stage that ``fit`` has filled in; None where that is not known before."""
        batches: int | None = self.source.batches
        if batches is None or isinstance(self.accumulate, int):
            return batches and -(-batches // self.accumulate)
        sizes = self.source.sizes(0) if self.counts_samples else None
        return None if sizes is None else self.accumulate.steps(sizes)


for _kind in (Phase, Stage):  # an unknown argument is an error that names the nearest, as everywhere
    name_nearest(_kind)


@dataclass(slots=True)
class StepResult:
    """What an optimizer step left behind.

    ``values``: detached scalars by name, weighted over the window. ``output``: what the last phase's step returned
    for the last batch. ``weight``: samples (or tokens) of the window. ``grad_norm``: 2-norm before clipping, None
    where nothing was clipped. ``moved``: names of the phases that ran.
    """

    values: dict[str, Any]
    output: Any
    weight: float
    grad_norm: Tensor | None = None
    moved: tuple[str, ...] = ()
    ends_epoch: bool = False


Placement = Literal["replicated", "sharded", "own", "rank 0"]

_PLACED: dict[Placement, str] = {
    "replicated": "precision savers settings folder status exact progress stage_start metrics history stop_reason "
    "resumed_from nonfinite skip_limit skipped replaced fingerprint schema log_every ended changes stage_end reused "
    "stage_ended_at own_loss trainable validates_within validated_at skips_in_row stepless stages recorded",
    "sharded": "task models optimizers",
    "own": "callbacks hooks comm device state meters latest series team data handlers window looking open_step "
    "compiler graphs restore moves_batches began closing at_sigterm config code attributes",
    "rank 0": "loggers lost",
}  # fmt: skip


_OUTPUT = "what a step returned is passed as output to map_output, on_backward_end and on_eval_batch_end"
_GRADS = "parameter.grad of run.models, in on_grads_ready"
_MODELS = "run.models, a dict by name, or run.task"
_ELSEWHERE = {  # what is asked of a run by another name, and what to write
    **{name: f"run.progress.{name}" for name in Progress._fields if name != "stage"},
    "epochs": "run.progress.epoch", "steps": "run.progress.step", "current_epoch": "run.progress.epoch",
    "global_step": "run.progress.step", "iteration": "run.progress.step", "seconds": "run.progress.seconds",
    "net": _MODELS, "model": _MODELS, "module": _MODELS, "optimizer": "run.optimizers, a dict by name",
    "grads": _GRADS, "grad": _GRADS, "gradients": _GRADS,
    "preds": f"output['preds']; {_OUTPUT}", "target": f"output['target']; {_OUTPUT}",
    "scheduler": "run.stage.scheduled", "phases": "run.stage.phases", "phase": "run.stage.phases",
    "trainer": "run.settings, what the Trainer was given", "logger": "run.loggers", "metric": "run.metrics",
    "stop": "run.request_stop(reason)", "should_stop": "run.stop_reason",
}  # fmt: skip


_COME = {"train/": "on_epoch_end", "valid/": "on_validation_end", "test/": "on_test_end"}


class _Latest(dict[str, float]):
    """The latest values by name; one that is not there is an error that names those that are, and when it comes."""

    def __missing__(self, name: str) -> float:
        came = ", ".join(f"{kind!r} by {hook}" for kind, hook in _COME.items())
        raise KeyError(f"nothing was logged as {name!r} yet. {choose(name, self)} What begins with {came} is there")

    def copy(self) -> _Latest:
        return type(self)(self)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # a plain dict is what is sent and saved


class _Returned(_Latest):
    """The latest values of steps."""

    def __missing__(self, name: str) -> float:
        raise KeyError(
            f"no step has returned {name!r} yet. {choose(name, self)} What steps return is there by on_step_end"
        )


@dataclass(slots=True, eq=False)
class Run:
    """One execution of training: handed to every hook, returned by ``fit``.

    Read anything. To change something there are four verbs: ``request_stop(reason)``, ``end_stage()``, ``log(values)``
    and ``replace(name, obj)``. All fields are there from ``on_fit_start`` on, and after the fit; what lives shorter is
    passed to the hooks in which it lives: ``run.batch`` is an AttributeError that names them.

    ``Run.placement`` says where each field is if there are several ranks. "replicated": the same on all of them when
    ``on_step_end`` and later hooks are called. "sharded": each rank holds its part where the strategy shares parameters
    out (``FSDP``), and all of it elsewhere. "own": each rank has its own. "rank 0": there alone; empty on the others.

    >>> Run.placement["metrics"], Run.placement["optimizers"], Run.placement["latest"], Run.placement["loggers"]
    ('replicated', 'sharded', 'own', 'rank 0')
    """

    placement: ClassVar[Mapping[str, Placement]] = {n: place for place, names in _PLACED.items() for n in names.split()}

    task: Any
    stages: list[Stage]
    models: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    callbacks: list[Callback]
    hooks: Hooks
    comm: Comm
    precision: Precision
    device: torch.device
    loggers: list[Any] = field(default_factory=list)
    savers: list[Saver] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)  # the user's own objects that checkpoints hold
    meters: dict[str, Any] = field(default_factory=dict)  # "valid", "test"; those of training are on the phases
    settings: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # every setting as it came out, once it was told
    code: dict[str, dict[str, Any]] = field(default_factory=dict)  # digests of the functions that train
    folder: Path | None = None
    status: Literal["created", "running", "done", "stopped", "interrupted", "failed"] = "created"
    exact: bool | list[str] = True
    progress: Progress = field(default_factory=Progress)
    stage_start: Progress = field(default_factory=Progress)
    metrics: dict[str, float] = field(default_factory=_Latest)  # the latest value of each logged name
    latest: dict[str, Any] = field(default_factory=_Returned)  # and of each name that a step returned, not yet averaged
    history: History = field(default_factory=History)
    series: Series = field(default_factory=Series)
    team: Any = None  # the other ranks, if there are any
    stop_reason: str | None = None
    resumed_from: Any = None  # the checkpoint: a Path, or where fsspec has it
    nonfinite: str | None = "raise"
    skip_limit: int = 10
    skipped: int = 0
    replaced: list[str] = field(default_factory=list)
    # how the loop keeps its place
    data: Any = None  # the training data as it was given
    attributes: Any = None  # of modules, plain ones, as they were at the start
    fingerprint: dict[str, Any] | None = None  # of that data, once a checkpoint was taken
    schema: Any = None  # what its first batches are made of
    handlers: list[Any] = field(default_factory=list)
    recorded: Mapping[str, frozenset[str]] = field(default_factory=dict)  # what the task says of its values
    log_every: Every = field(default_factory=lambda: Every("50 steps"))
    lost: dict[int, Any] = field(default_factory=dict)  # of a logger that fails: what was lost
    window: Iterable[Any] = ()  # the batches of the open step, as the source gives them
    open_step: tuple[list[float] | None, dict[str, Any]] = (None, {})  # planned weights, values so far
    looking: tuple[str, int, Any] | None = None  # in an evaluation: its kind, the number of its batch, and that
    ended: bool = False  # all is trained, validated and recorded; what is left is to save it
    changes: list[tuple[str, Any]] = field(default_factory=list)
    compiler: Any = None  # makes the compiled form of a step
    graphs: Any = None  # takes the place of loop.train_step where steps are recorded and replayed
    restore: Callable[[], None] | None = None  # puts back what a checkpoint holds
    closing: list[Callable[[Run], None]] = field(default_factory=list)  # called when the folder of the run is closed
    at_sigterm: tuple[Callable[..., None], ...] = ()  # these become hooks, on_grads_ready, when SIGTERM comes
    stage_end: Progress = field(default_factory=Progress)
    reused: list[str] = field(default_factory=list)  # names of stages that were finished before, and not trained again
    stage_ended_at: int | None = None  # the step at which ``end_stage`` was asked for
    own_loss: Any = None  # the task's, where stages have others
    trainable: dict[str, bool] = field(default_factory=dict)
    moves_batches: bool = False
    validates_within: bool = False
    validated_at: int = -1
    skips_in_row: int = 0
    stepless: int = 0  # epochs in a row without an optimizer step
    began: float = 0.0

    if not TYPE_CHECKING:  # type checkers and editors know the fields, and mark what is none

        def __getattr__(self, name: str) -> Any:
            """Only asked for what is no field: AttributeError that names the hooks in which it lives."""
            at = [] if name == "hooks" else self.hooks.passed_to(name)  # there is none while a copy is made
            where = f", which lives shorter than a run: take it where it is passed, in {', '.join(at)}"
            instead = f": write {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
            known = "" if at or instead else f". {choose(name, [one.name for one in fields(self)])}"
            raise AttributeError(f"Run has no {name!r}{where if at else instead or known}", name=name, obj=self)

    @property
    def stage(self) -> Stage | None:
        """The open stage; None after the last one."""
        return self.stages[self.progress.stage] if self.progress.stage < len(self.stages) else None

    @property
    def counts_samples(self) -> bool:
        """True where the weight of a batch is the number of its samples, and this process sees them all."""
        asked = "weight" in self.settings if self.stage is None else not self.stage.counts_samples
        return not asked and self.team is None and isinstance(self.task, nn.Module)

    @property
    def validation_step(self) -> Step:
        """What a validation calls for each batch."""
        step: Step = self.task.validation_step
        return step if self.compiler is None else self.compiler(step)

    @property
    def merges(self) -> str:
        """The setting under which Python does not run through the modules in every step; "" where it does."""
        return "compile=True" if self.compiler is not None else "cuda_graphs=True" if self.graphs is not None else ""

    @property
    def owes_epoch_end(self) -> bool:
        """True when all batches of the open epoch are trained on, and its end is not made: a checkpoint lies there."""
        p, stage = self.progress, self.stage
        return stage is not None and 0 < p.batch == stage.source.batches and not self.interrupted

    @property
    def fraction(self) -> float:
        """How much of the open stage is done, from 0 to 1, in the unit of its end: for schedules of one's own.

        It is k / total before step k, counted from 0. Epochs of unknown length count when they are over.
        """
        stage = self.stage
        return 1.0 if stage is None else stage.whole.fraction(self.progress, self.stage_start)

    @property
    def lr(self) -> float | None:
        """Learning rate of the first group of the first optimizer."""
        for optimizer in self.optimizers.values():
            return float(optimizer.param_groups[0]["lr"])
        return None

    @property
    def waited(self) -> float:
        """Seconds for which training has waited for its data in this process, where that is measured.

        A TensorDataset is not: to pick from it takes next to nothing.
        """
        return sum(float(getattr(stage.source, "waited", 0.0)) for stage in self.stages)

    @property
    def interrupted(self) -> bool:
        """True when a signal has asked to stop: the run is to be gone on with."""
        return self.stop_reason in SIGNALS

    def request_stop(self, reason: str) -> None:
        """Stop at the next boundary between optimizer steps; the first reason is kept in ``stop_reason``.

        With several ranks one may ask, and all stop after the same step, one or two steps later.
        """
        if self.team is None:
            self.stop_reason = self.stop_reason or reason
        else:
            self.team.pulse.asked = self.team.pulse.asked or reason

    def end_stage(self) -> None:
        """End the open stage at the next boundary between optimizer steps; the next one begins. On all ranks alike."""
        self.stage_ended_at = self.progress.step
        self.stage_end = self.stage_end._replace(step=min(self.stage_end.step, self.progress.step))

    def log(self, values: Mapping[str, Any]) -> None:
        """Add scalars (numbers or 0-dimensional tensors) to the next record, as the mean since the last one.

        What is called ``valid/...`` or ``test/...``, as ``trainer.validate`` and ``test`` give it, is a record at once.
        A text, a figure of matplotlib and a ``Path`` (a file or folder) go to every logger that takes them at once,
        and into the run folder: ``figures/<name>-<step>.png``, ``texts/<name>-<step>.txt``, ``artifacts/<name>``.
        Raises SettingError for anything else, where nothing takes them, and for the name "loss", which is that of the
        steps.
        """
        if not isinstance(values, Mapping):
            raise SettingError(f"run.log({values!r}) takes a dict with a name for each: run.log({{'name': value}})")
        things = {k: v for k, v in values.items() if not isinstance(v, (Tensor, float, int)) and takes(v)}
        for name, thing in things.items():
            hand_over(self, name, thing)
        values = {name: value for name, value in values.items() if name not in things} if things else values
        for name, value in values.items():
            if getattr(value, "ndim", 0) != 0 or isinstance(value, bytes) or not hasattr(value, "__float__"):
                got = repr(value)
                if shape := tuple(getattr(value, "shape", ())):  # an image is no curve, and its numbers no message
                    got = f"an array of shape {shape}: log its .mean(), or draw it, figure.gca().imshow(...)"
                raise SettingError(
                    f"run.log({{{name!r}: ...}}) takes a number, a 0-dimensional tensor, a text, a figure with "
                    f"savefig() or a Path; got {got}"
                )
            if not isinstance(name, str):
                raise SettingError(f"run.log({{{name!r}: ...}}): names are texts; write {{{str(name)!r}: ...}}")
            if name.startswith("train/"):
                instead = name.removeprefix("train/")
                raise SettingError(
                    f"run.log({{{name!r}: ...}}) would be logged as 'train/{name}': it adds to the records of "
                    f"training, whose names begin with 'train/'. Write {{{instead.replace('loss', 'my_loss')!r}: ...}}"
                )
            if name == "loss":
                raise SettingError("run.log cannot log 'loss', the name of the steps' own; call it something else")
        measured = {name: float(v) for name, v in values.items() if name.startswith(("valid/", "test/"))}
        if measured:
            log_values(self, measured, "valid")
        means = {name: v for name, v in values.items() if name not in measured} if measured else values
        self.series.add({name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in means.items()})

    def replace(self, name: str, obj: Any) -> None:
        """Change ``"model"``, ``"loss"``, ``"optimizer"`` (or ``"optimizer.<name>"``), ``"train"`` or ``"valid"``.

        ``"model.<name>"`` is one child of a Task. It takes effect before the next step; data, at the next epoch or
        validation. The change is noted in ``run.replaced``. Raises SettingError for an unknown name, and for
        ``"optimizer"`` where the open stage has several.
        """
        models = {f"model.{name}" for name, _ in self.task.named_children()} if isinstance(self.task, nn.Module) else ()
        known = {"model", "loss", "train", "valid", "optimizer", *models, *(f"optimizer.{n}" for n in self.optimizers)}
        if name not in known:
            raise SettingError(f"run.replace has no {name!r} to replace. {choose(name, known)}")
        key = self._only_optimizer() if name == "optimizer" else name
        self.changes.append((key, obj))
        self.replaced.append(f"{name} by {type(obj).__name__} after step {self.progress.step}")

    def _only_optimizer(self) -> str:
        """The optimizer that the open stage moves, by its full name; SettingError where it could be another."""
        phases = self.stage.phases if self.stage is not None else ()
        moved = {id(optimizer) for phase in phases for optimizer in phase.moved}
        names = [name for name, one in self.optimizers.items() if id(one) in moved] or list(self.optimizers)
        if len(names) != 1:
            such = f"name the one: run.replace('optimizer.{names[0]}', new)" if names else "there is none"
            raise SettingError(
                f"run.replace('optimizer', ...) could mean {', '.join(map(repr, names)) or 'nothing'}; {such}"
            )
        return f"optimizer.{names[0]}"

    def _repr_html_(self) -> str:
        """For a notebook: how the run stands, the latest value of each name, and the curve of the loss."""
        p = self.progress
        facts = {"status": self.status, "epoch": str(p.epoch), "step": f"{p.step:,}", "time": format_time(p.seconds)}
        facts |= {"stopped": self.stop_reason} if self.stop_reason else {}
        values = [(name, format_value(value)) for name, value in self.metrics.items()]
        curve = sparkline(next(iter(self.history.losses.values()), []))
        where = "" if self.folder is None else f"<p><code>{html.escape(str(self.folder))}</code></p>"
        return curve + table_html(["run", ""], [*facts.items(), *values]) + where

    def __repr__(self) -> str:
        p = self.progress
        shown = ", ".join(f"{k}={v:.4g}" for k, v in self.metrics.items())
        where = f", folder={str(self.folder)!r}" if self.folder else ""
        return f"Run({self.status}, epoch={p.epoch}, step={p.step}{', ' if shown else ''}{shown}{where})"
