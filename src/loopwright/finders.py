"""Finding a learning rate, and the largest batch that fits, without leaving a trace."""

from __future__ import annotations

import copy
import gc
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from loopwright.data import Loader
from loopwright.errors import LoopwrightWarning, SettingError, elsewhere
from loopwright.events import HOOKS, Callback
from loopwright.lr_curve import LRCurve
from loopwright.out_of_memory import is_out_of_memory
from loopwright.schedules import exponential
from loopwright.state import Run, Stage, StepResult
from loopwright.task import Task
from loopwright.trainer import Trainer
from loopwright.untouched import untouched

__all__ = ["batch_size_find", "lr_find"]


@elsewhere(min_lr="start", start_lr="start", max_lr="end", end_lr="end", num_training="steps", num_it="steps")
def lr_find(
    trainer: Trainer,
    task: Task,
    train: Any,
    *,
    start: float = 1e-7,
    end: float = 10.0,
    steps: int = 100,
    smooth: float = 0.98,
    stop_at: float = 4.0,
) -> LRCurve:
    """Train ``task`` for a while at rates that grow from ``start`` to ``end``, and tell what the losses suggest.

    It takes ``steps`` steps, less if the smoothed loss passes ``stop_at`` times its smallest, or is not finite. All
    groups get the same rate; what the task schedules waits. Precision, accumulation and clipping are those of
    ``trainer``; of its callbacks those take part, as copies, that change batches, outputs, losses or gradients. Nothing
    is left behind: model, optimizer, random generators and the order of the data are bit for bit as they were.

    Source: Smith 2017 (arXiv:1506.01186), section 3.3; the smoothing, the settings and the suggestions are fastai's.

    >>> from torch import nn
    >>> from loopwright.task import Supervised
    >>> net = nn.Linear(2, 1)
    >>> task = Supervised(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), 0.1))
    >>> curve = lr_find(Trainer(folder=None), task, [(torch.ones(4, 2), torch.zeros(4, 1))])
    >>> sorted(curve.suggestions)
    ['slide', 'steep', 'valley']

    Raises SettingError for a task with several phases, and for data that could be read only once.
    """
    if not 0 < start < end:
        raise SettingError(f"start={start!r}, end={end!r}: expected learning rates that grow")
    if not 0 <= smooth < 1 or not stop_at > 1:
        raise SettingError(f"smooth={smooth!r}, stop_at={stop_at!r}: expected 0 <= smooth < 1, and stop_at over 1")
    _check(task, train, "lr_find")
    probe = _Losses(smooth, stop_at)
    schedule = exponential(start, end)
    _try(trainer, task, train, until=f"{steps} steps", schedule=schedule, watch=probe)
    taken = len(probe.smoothed)
    return LRCurve([schedule(k / steps) for k in range(taken)], probe.smoothed, probe.losses)


@elsewhere(init_val="start", steps_per_trial="steps", max_val="limit", max_batch_size="limit")
def batch_size_find(
    trainer: Trainer,
    task: Task,
    data: Any,
    *,
    start: int = 2,
    steps: int = 3,
    limit: int | None = None,
) -> int:
    """The largest number of samples in a batch that can be trained on: ``start``, doubled until memory runs out.

    ``data`` is a dataset, arrays, a DataLoader (whose dataset and ``collate_fn`` are taken), or a function of the size
    that gives the data to train on. Each size is trained for ``steps`` steps, so that the optimizer has made its state.
    No size is over ``limit``, nor over the number of samples where that is known. Nothing is left behind, as with
    ``lr_find``. Batches of other shapes may need more: leave a margin where lengths vary.

    Raises SettingError if not even ``start`` fits.

    >>> from torch import nn
    >>> from loopwright.task import Supervised
    >>> net = nn.Linear(2, 1)
    >>> task = Supervised(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), 0.1))
    >>> batch_size_find(Trainer(folder=None), task, (torch.ones(40, 2), torch.zeros(40, 1)), limit=30)
    16
    """
    for name, number in (("start", start), ("steps", steps), ("limit", 1 if limit is None else limit)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise SettingError(f"{name}={number!r}: expected a whole number, from 1")
    _check(task, data, "batch_size_find")
    make, known = _by_size(data)
    most = min(limit or known or math.inf, known or math.inf)
    if start > most:
        raise SettingError(f"start={start} is over the {most} samples that there may be in a batch")
    fits, size = 0, start
    while size <= most and _fits(trainer, task, make, size, steps):
        fits, size = size, 2 * size
    if not fits:
        raise SettingError(f"not even a batch of {start} fits into memory; begin with a smaller one")
    return fits


def _fits(trainer: Trainer, task: Task, make: Callable[[int], Any], size: int, steps: int) -> bool:
    try:
        _try(trainer, task, make(size), until=f"{steps} steps", watch=_Trial())
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        error.__traceback__ = None  # it holds what has filled the memory
    else:
        return True
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return False


def _by_size(data: Any) -> tuple[Callable[[int], Any], int | None]:
    """A function of the batch size that gives data to train on, and the number of samples if it is known."""
    if callable(data) and not hasattr(data, "__getitem__"):
        return data, None
    if isinstance(data, DataLoader):
        collate: Any = data.collate_fn
        data, options = data.dataset, {"collate": collate}
    else:
        options = {}
    if isinstance(data, Loader):
        raise SettingError("batch_size_find makes the batches itself; pass what the lw.Loader reads, or a function of "
                           "the size: lambda n: lw.Loader(data, n)")  # fmt: skip
    if isinstance(data, list) and data and all(isinstance(one, (tuple, list, dict)) for one in data):
        raise SettingError(
            "batch_size_find makes the batches itself, and this is a list of batches or of samples; pass arrays, (x, "
            "y), a dataset, or a function of the size: lambda n: DataLoader(samples, n)"
        )
    first = data
    while isinstance(first, (tuple, list, dict)):
        first = next(iter(first.values() if isinstance(first, dict) else first))
    known = len(data) if hasattr(data, "__getitem__") and not isinstance(data, (tuple, list, dict)) else len(first)
    return (lambda size: Loader(data, size, drop_last=True, **options)), known


def _check(task: Any, data: Any, who: str) -> None:
    if not isinstance(task, Task):
        raise SettingError(f"{who} needs a task: lw.Supervised(net, loss, optimizer); got {type(task).__name__}")
    if len(task.phases()) > 1:
        names = ", ".join(phase.name for phase in task.phases())
        raise SettingError(f"{who} tries one phase, and this task has several: {names}. Try each by a task of its own")
    if isinstance(data, Iterator):
        raise SettingError(f"{who} would use up the {type(data).__name__}; pass a list, a DataLoader or a function")


def _try(trainer: Trainer, task: Task, data: Any, *, until: str, schedule: Any = None, watch: Callback) -> None:
    """Train for a while as ``trainer`` does, without a trace."""
    if torch.cuda.is_available() and str(trainer.device) != "cpu":
        torch.cuda.init()  # so that its generators are known before the trial draws from them
    with untouched(task, data):
        own = {id(one): one for one in (*task.modules(), *task.parameters(), *task.buffers())}  # what is not copied
        changing = [copy.deepcopy(one, dict(own)) for one in trainer.callbacks if _changes(one)]
        precision = trainer.settings["precision"]
        settings = {
            **trainer.settings, "epochs": None, "steps": None, "time": None, "folder": None, "name": None,
            "checkpoint": False, "capsule": False, "loggers": [], "progress": False, "validate_every": "1 epoch",
            "nonfinite": None, "cuda_graphs": False, "callbacks": [*changing, watch],
            "precision": precision if isinstance(precision, str) else copy.deepcopy(precision),
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LoopwrightWarning)  # of batches and windows that only the trial has
            Trainer(**settings).fit(task, data, stages=[Stage("trial", until=until, schedule=schedule)])


def _changes(callback: Callback) -> bool:
    """True for callbacks that change what is trained on."""
    changing = [hook for hook in HOOKS if hook.startswith("map_") or hook == "on_grads_ready"]
    return any(getattr(type(callback), hook, None) is not getattr(Callback, hook) for hook in changing)


class _Trial(Callback):
    """Refuses what cannot be tried without a trace."""

    def problems(self, run: Run) -> Iterator[str]:
        if run.team is not None:
            yield "a finder tries in one process; call it before the others are launched, with devices=1"


class _Losses(_Trial):
    """Keeps the loss of each step, and its moving average, corrected for its beginning; stops where that explodes."""

    stops = True

    def __init__(self, smooth: float, stop_at: float) -> None:
        self.smooth, self.stop_at = smooth, stop_at
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self._average = 0.0

    def on_step_end(self, run: Run, result: StepResult) -> None:
        loss = float(result.values["loss"])
        if not math.isfinite(loss):
            run.request_stop("the loss is not finite")
            return
        self._average = self.smooth * self._average + (1 - self.smooth) * loss
        self.losses.append(loss)
        self.smoothed.append(self._average / (1 - self.smooth ** len(self.losses)))
        if self.smoothed[-1] > self.stop_at * min(self.smoothed):
            run.request_stop("the loss has exploded")
