"""One run of a variant, and all that can be told about it afterwards, compared bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import loopwright as lw
from reliability.parts import Ledger
from reliability.variants import Make, Parts

NAME = "trial"


def memory() -> tempfile.TemporaryDirectory[str]:
    """A folder for what no disk is needed for: in memory where there is such a place."""
    place = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else None)


class Interrupt(lw.Callback):
    """Raises ``Stopped`` after ``batches`` backward passes of this process; None: never."""

    def __init__(self, batches: int | None) -> None:
        self.batches, self.seen = batches, 0

    def on_backward_end(self, run: lw.Run, *args: Any) -> None:
        self.seen += 1
        if self.seen == self.batches:
            raise Stopped


class Stopped(Exception):  # noqa: N818 - it is what was asked for
    """Takes the place of a kill inside the process."""


def seed_all(seed: int) -> None:
    """Seed the three global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def train(
    make: Make,
    root: Path,
    *,
    seed: int,
    resume: Any = None,
    checkpoint: Any = False,
    callbacks: Iterable[Any] = (),
    warn: bool = False,
) -> tuple[lw.Run, Parts, Ledger]:
    """Make everything anew from ``seed`` and train; what a script does in a process of its own.

    ``warn``: warnings are allowed; otherwise they are errors.
    """
    seed_all(seed)
    ledger = Ledger()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if warn else "error")
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
        warnings.filterwarnings("ignore", "this very run was done before")  # a trial compares a run with itself
        parts = make(ledger)
        settings = {"epochs": 3, "log_every": "3 steps", **parts.settings}
        settings["callbacks"] = [*settings.get("callbacks", ()), *callbacks]
        trainer = lw.Trainer(folder=root, name=NAME, progress=False, checkpoint=checkpoint, **settings)
        if isinstance(parts.task, tuple):
            step, state = parts.task
            run = trainer.run(step, parts.train, state=state, resume=resume)
        else:
            run = trainer.fit(parts.task, parts.train, parts.valid, stages=parts.stages, resume=resume)
    return run, parts, ledger


def observe(run: lw.Run) -> dict[str, Any]:
    """Everything about a run that has ended, by name; with the global generators as they stand now."""
    rng = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False), "torch": torch.get_rng_state()}
    phases = [phase for stage in run.stages for phase in stage.phases]
    schedulers = [s.torch.state_dict() for p in phases for s in (*p.step_schedulers, *p.epoch_schedulers)]
    hidden = ("_get_lr_called_within_step", "_is_initial")
    found = {
        "weights": {name: model.state_dict() for name, model in run.models.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in run.optimizers.items()},
        "schedulers": [{k: v for k, v in s.items() if k not in hidden} for s in schedulers],
        "generators": rng,
        "metrics": run.metrics,
        "callbacks": [callback.state_dict() for callback in run.callbacks],
        "history": [without_time(record) for record in run.history.records],
        "losses": {name: list(values) for name, values in run.history.losses.items()},
        "counters": [run.progress._asdict() | {"seconds": 0}, run.skipped, run.validated_at],
        "stop": run.stop_reason,
        "status": run.status,
        "log": stream(run.folder) if run.folder is not None else None,
    }
    return {name: frozen(value) for name, value in found.items()}


def stream(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without the times."""
    return [without_time(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_time(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record less the one value that may differ."""
    return {name: value for name, value in record.items() if name != "seconds"}


def frozen(value: Any) -> Any:
    """A copy that training does not change any more."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Mapping):
        return {name: frozen(item) for name, item in value.items()}
    return [frozen(item) for item in value] if isinstance(value, (list, tuple)) else value


def same(a: Any, b: Any) -> bool:
    """True if two nested states are equal, tensors bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _raw(a) == _raw(b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(value, b[name]) for name, value in a.items())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(v, w) for v, w in zip(a, b, strict=True))
    return type(a) is type(b) and (bool(a == b) or (a != a and b != b))


def _raw(tensor: Tensor) -> bytes:
    raw: bytes = tensor.detach().cpu().contiguous().numpy().tobytes()
    return raw


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Names of what is not equal in bits."""
    return [name for name in expected if not same(expected[name], found.get(name))]


def audit(seen: Sequence[Sequence[int]], expected: Sequence[Sequence[int]], batches: int, *, once: bool) -> list[str]:
    """What is wrong with the samples that were trained on: too many, missing, another order; nothing if all is well.

    ``batches``: in an epoch (0: unknown); ``once``: each id must come exactly once an epoch.
    """
    problems = [] if list(seen) == list(expected) else ["other batches, or another order"]
    size = batches or max(len(seen), len(expected))
    for start in range(0, max(len(seen), len(expected)), size or 1):
        mine, theirs = (Counter(i for ids in part[start : start + size] for i in ids) for part in (seen, expected))
        for what, odd in (("twice", mine - theirs), ("missed", theirs - mine)):
            problems += [f"epoch {start // size}: {odd.total()} samples {what}"] if odd else []
        if once and batches and start + size <= len(seen) and set(mine.values()) != {1}:
            problems.append(f"epoch {start // size}: not every sample once")
    return problems


def digests(found: Mapping[str, Any]) -> dict[str, str]:
    """The sha256 of each value of ``observe``, for processes that cannot hand over their objects."""
    return {name: hashlib.sha256(_spelled(value)).hexdigest() for name, value in found.items()}


def _spelled(value: Any) -> bytes:
    if isinstance(value, (Tensor, np.ndarray)):
        raw = _raw(value) if isinstance(value, Tensor) else value.tobytes()
        return f"{value.dtype}{tuple(value.shape)}".encode() + raw
    if isinstance(value, Mapping):
        return b"{" + b",".join(repr(name).encode() + b":" + _spelled(item) for name, item in value.items()) + b"}"
    if isinstance(value, (list, tuple)):
        return b"[" + b",".join(map(_spelled, value)) + b"]"
    return repr(value).encode()
