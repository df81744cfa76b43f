"""What a step that failed was made of, kept so that ``lw.replay`` can make it fail again."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from loopwright import rng
from loopwright.checkpoint import Packed, check, encode, snapshot
from loopwright.data import Chunks
from loopwright.errors import CheckpointError, SettingError
from loopwright.events import Callback
from loopwright.parallel import is_shard
from loopwright.state import Phase, Progress, Run, StepResult, has_state
from loopwright.text import with_article
from loopwright.written import warn

__all__ = ["Capsule"]

_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SMALL = 10**6  # bytes of buffers that are copied at each step
_IN_STEP = (
    "on_step_start", "on_batch_start", "map_batch", "map_output", "map_loss", "on_backward_end", "on_grads_ready",
)  # fmt: skip
_PARTS = {"optimizers": "the optimizer states", "weights": "the weights", "window": "the batches"}  # in this order
# to read a random state takes 1 us (torch), 12 us (Python) or 33 us (NumPy). Who draws shows in the first steps, as a
# rule; where nobody has, torch's is read in each 16th batch of an epoch and the others in each 64th step, and a step
# has those of a step before. If somebody has begun meanwhile, the limits of the capsule say so
_READS, _SELDOM = 16, 64
_LAGS = {"torch": ("torch", _READS), "python": ("Python", _SELDOM), "numpy": ("NumPy", _SELDOM)}
# of a generator that draws: torch's is copied as it is, for half of what its state as a tensor takes
_QUICK = {**rng.READ, "torch": torch.default_generator.clone_state}
_FETCHING = "[loopwright] while fetching"


class Capsule(Callback):
    """Writes ``<run folder>/capsules/step-00000012-ValueError`` when a step raises, or is skipped as not finite.

    ``lw.replay(capsule, task)`` makes the same error happen again, with the same bits, also on another machine. In it:
    the batches of the step so far and the random states of torch, Python and NumPy before each, the weights, buffers,
    optimizer states and train/eval flags before the step, where training stood, the error with its traceback, versions.
    Tensors and plain data only; no code. A step to which SIGTERM comes, or before which, has one as well: what a job
    was at when it was told to go. Of skipped steps only the first has a capsule (none under a gradient scaler, which
    drops some), and errors between steps (reading data, validation, saving) have none: the last checkpoint is the
    better place to go on from.

    ``max_size`` bounds the bytes of its files, as a number or "100 MB": what is too much is left out, the optimizer
    states first, then the weights, then the batches with their random states. The rest is written whatever the bound:
    the error, settings, values, attributes, which is some kB as a rule (of a traceback the last 20,000 characters).
    ``folder`` is another place than the run folder. It must come first in the list of callbacks, to see batches and
    random numbers before the others do.

    What it cannot bring back: what a step has changed in place in its batch, statistics of batch norm as they were
    before the forward (they do not enter it), other buffers that change, beyond 1 MB, and weights that have moved when
    the error comes (in a later phase, or inside of ``optimizer.step``: a signal that comes so late leaves none); draws
    that began a few steps before, of a generator from which the run had drawn nothing until then (up to 15 steps for
    torch's, 63 for Python's and NumPy's). The manifest names what it knows of it.

    Reads: batches, weights. Changes: nothing. Stops: no. Raises SettingError for a size that is none, and without a
    folder to write to.

    >>> Capsule(max_size="1.5 GB").max_bytes
    1500000000
    """

    def __init__(self, max_size: int | str = "100 MB", folder: str | Path | None = None) -> None:
        self.max_size, self.folder = max_size, folder
        self.max_bytes = _bytes(max_size)
        self.last: Any = None  # the path of the last capsule
        self._forget()

    def _forget(self) -> None:
        self._at: Progress | None = None
        self._window: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []  # batch, random states, those read for it
        self._open: tuple[list[float] | None, dict[str, Any]] = (None, {})
        self._moving: list[tuple[dict[str, Tensor | None], str]] = []
        self._buffers: list[Tensor] = []
        self._skipped, self._in_row = 0, 0
        self._has_skip = False
        self._random: dict[str, Any] = {}  # all states, as they were when they were last looked at
        self._reads, self._draws = 0, dict[str, Callable[[], Any]]()  # who draws, and how their state is taken
        self._read_in: dict[str, tuple[int, int]] = {}

    def on_fit_start(self, run: Run) -> None:
        if self.folder is None and run.folder is None:
            raise SettingError("Capsule needs a folder to write to: Trainer(folder='runs'), or Capsule(folder=...)")
        self._forget()
        self._skipped, self._moving = run.skipped, _moving(run)
        if run.device.type == "cuda":  # this one is read in each step
            self._draws["cuda"] = partial(torch.cuda.get_rng_state, run.device)
        run.at_sigterm = (self._stopped,)
        if run.team is not None or any(stage.accumulate != 1 for stage in run.stages):
            self._draws["torch"] = _QUICK["torch"]
        else:
            # on_step_start sees all: two hooks less in each step
            for name in ("on_batch_start", "on_step_end"):
                own = getattr(self, name)
                setattr(run.hooks, name, tuple(hook for hook in getattr(run.hooks, name) if hook != own))

    def on_step_start(self, run: Run) -> None:
        if run.skipped != self._skipped:
            self._skip(run)
        self._at, self._open, self._in_row = run.progress, run.open_step, run.skips_in_row
        self._window = []
        if self._moving:
            self._buffers = [owner[name].clone() for owner, name in self._moving]  # type: ignore[union-attr]
        if self._open[0] is None:  # a single batch, which is fetched by now: nobody has drawn since
            (batch,) = run.window
            self._note(run, batch)

    def on_batch_start(self, run: Run, batch: Any) -> None:
        if self._open[0] is not None:
            self._note(run, batch)

    def _note(self, run: Run, batch: Any) -> None:
        """Keep a batch, and the random states as they are now; where nobody draws, those of a step before."""
        p, kind = run.progress, type(batch)
        if self._reads < _READS or not p.batch % _READS or not p.step % _SELDOM:
            fresh = self._look(p)
        else:
            fresh = {name: read() for name, read in self._draws.items()} if self._draws else {}
        self._window.append((batch.copy() if kind is dict or kind is list else batch, self._random, fresh))

    def _look(self, p: Progress) -> dict[str, Any]:
        """Read also generators from which nobody has drawn until now, and see whether that is so still."""
        draws = self._draws
        seldom = self._reads < _READS or not p.step % _SELDOM
        self._reads += seldom
        now = {
            name: read() for name, read in {**(rng.READ if seldom else {"torch": rng.READ["torch"]}), **draws}.items()
        }
        for name in now.keys() - draws.keys():
            # an epoch may begin with draws: those of its order
            if self._read_in.get(name) == (p.stage, p.epoch) and not rng.same(self._random[name], now[name]):
                draws[name] = _QUICK[name]
            self._read_in[name] = p.stage, p.epoch
        self._random = {**self._random, **now}
        return now

    def _skip(self, run: Run) -> None:
        """The step before was skipped: all of it is still here."""
        self._skipped = run.skipped
        if not self._has_skip and run.precision.scaler is None:
            self._has_skip = True
            try:
                self._write(run, None, "NonFiniteError")
            except CheckpointError as error:  # training goes on
                warn(f"no capsule of the skipped step: {error}")

    def on_step_end(self, run: Run, result: StepResult) -> None:
        self._window = []  # a batch is not held while the next one is fetched

    def on_fit_end(self, run: Run) -> None:
        if run.skipped != self._skipped:
            self._skip(run)
        self._forget()

    def on_exception(self, run: Run, error: BaseException) -> None:
        fetching = any(note.startswith(_FETCHING) for note in getattr(error, "__notes__", ()))
        if isinstance(error, Exception) and self._at is run.progress and self._window and not fetching:
            self._write(run, error, type(error).__name__)
            error.add_note(f"[loopwright] to make it happen again: lw.replay({str(self.last)!r}, task)")
        self._forget()

    def _stopped(self, run: Run, phase: Phase, grad_norm: Tensor | None) -> None:
        """A hook like on_grads_ready, of the step to which SIGTERM has come: its weights have not moved."""
        run.hooks.on_grads_ready = tuple(hook for hook in run.hooks.on_grads_ready if hook != self._stopped)
        if self._at is run.progress and self._window:
            try:
                self._write(run, None, "SIGTERM", phase.name)
            except (CheckpointError, OSError) as error:  # the checkpoint is worth more
                warn(f"no capsule of the step that SIGTERM came to: {error}")

    # -------------------------------------------------------------------------------------------- what is written

    def _write(self, run: Run, error: Exception | None, name: str, phase: str = "") -> None:
        root = Path(self.folder) if self.folder is not None else run.folder
        assert root is not None
        assert self._at is not None
        limits: list[str] = []
        files, extras = self._models(run, limits)
        planned, values = self._open
        stage = run.stages[self._at.stage]
        if len(stage.phases) > 1:
            limits.append(
                "if it was not the first phase of the step that failed, weights are those after the phases before it"
            )
        if isinstance(stage.source, Chunks):
            limits.append("what the piece of the sequence before this one has left was not kept: it begins with None")
        limits += [
            f"{whose}'s random state was read up to {lag - 1} steps before: until then no step had drawn"
            for generator, (whose, lag) in _LAGS.items()
            if generator not in self._window[-1][2] and not rng.same(self._random[generator], rng.READ[generator]())
        ]
        state: dict[str, Any] = {
            "window": [{"batch": _kept(batch, f"batch {i + 1}", limits), "rng": _states(r)}
                       for i, (batch, *r) in enumerate(self._window)],
            "planned": planned, "values": _kept(dict(values), "values", limits),
            "optimizers": {name: _kept(o.state_dict(), f"optimizer {name!r}", limits)
                           for name, o in run.optimizers.items()},
            "optimizer_kinds": {name: type(o).__qualname__ for name, o in run.optimizers.items()},
            "models": extras, "flags": _flags(run), "progress": {**self._at._asdict(), "stage": run.progress.stage},
            "precision": run.precision.state_dict() if has_state(run.precision) else {},  # type: ignore[attr-defined]
            "attributes": _kept(snapshot.attributes(run), "attributes", limits),
            "key": run.settings["key"], "skips_in_row": self._in_row,
            "phase": phase,
            "callbacks": [type(c).__qualname__ for c in run.callbacks if c is not self and _takes_part(c)],
        }  # fmt: skip
        if state["attributes"]:
            limits.append(f"plain attributes are those of after the error: {_listed(state['attributes'])}")
        n = stage.accumulate if isinstance(stage.accumulate, int) else len(planned or [1])
        about = {
            **snapshot.info(run), "kind": "capsule", "device": str(run.device), "stage_index": self._at.stage,
            "error": {"type": name, "message": None if error is None else str(error),
                      "notes": list(getattr(error, "__notes__", ())), "traceback": _traceback(error)},
            "settings": {"accumulate": n, "clip_norm": run.settings.get("clip_norm"),
                         "precision": run.precision.name, "nonfinite": _policy(run, name),
                         "deterministic": bool(run.settings.get("deterministic"))},
            "conditions": snapshot.conditions(run), "limits": limits,
        }  # fmt: skip
        rank = f"-rank{run.comm.rank}" if run.comm.rank else ""  # several may fail at once
        packed = self._fitting(files, state, about)
        self.last = packed.write(root / "capsules" / f"step-{self._at.step + 1:08d}-{name}{rank}")

    def _models(self, run: Run, limits: list[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Any]]]:
        """Tensors of the models as they were before the step, and what else their state_dicts hold."""
        before = {id(owner[name]): copy for (owner, name), copy in zip(self._moving, self._buffers, strict=False)}
        files: dict[str, dict[str, Tensor]] = {}
        extras: dict[str, dict[str, Any]] = {}
        for (group, _), model in zip(snapshot.run_groups(run).items(), run.models.values(), strict=True):
            for key, value in model.state_dict(keep_vars=True).items():
                if is_shard(value):
                    limits.append(f"{key} was left out: it is shared out over the ranks")
                    continue
                plain = isinstance(value, Tensor) and value.layout == torch.strided
                (files if plain else extras).setdefault(group, {})[key] = before.get(id(value), value)
            files.setdefault(group, {})
        known = {id(owner[name]) for owner, name in self._moving}
        limits += [
            f"buffer {key} is that of after the error" for key, module, name in _others(run)
            if id(module._buffers[name]) not in known
        ]  # fmt: skip
        return files, _kept(extras, "extra state", limits)

    def _fitting(self, files: dict[str, Any], state: dict[str, Any], about: dict[str, Any]) -> Packed:
        """Leave out what is too much."""
        packed = Packed.of(files, state, about)
        for part, what in _PARTS.items():
            if packed.size() <= self.max_bytes:
                break
            held = files if part == "weights" else state[part]
            about["limits"].append(
                f"{what} ({_size(held):,} bytes) were left out: the capsule is bounded by {self.max_size}"
            )
            if part == "weights":
                files = {}
            else:
                state[part] = None
            packed = Packed.of(files, state, about)
        return packed


def _size(part: Any) -> int:
    plain, tensors = encode(part)
    return len(json.dumps(plain)) + sum(tensor.nbytes for tensor in tensors.values())


def _moving(run: Run) -> list[tuple[dict[str, Tensor | None], str]]:
    """Buffers that a forward may read and change, unless they are too large to be copied at each step."""
    found, total = [], 0
    for _, module, name in _others(run):
        buffer = module._buffers[name]
        assert buffer is not None
        total += buffer.numel() * buffer.element_size()
        if total <= _SMALL:
            found.append((module._buffers, name))
    return found


def _others(run: Run) -> list[tuple[str, nn.Module, str]]:
    """Buffers of the models in checkpoints, but for the statistics of batch norm, which do not enter its forward."""
    return [
        (f"{path}.{name}".lstrip("."), module, name)
        for model in run.models.values()
        for path, module in model.named_modules()
        if not isinstance(module, _NormBase)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]


def _listed(attributes: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"{path}.{name}" for path, values in attributes.items() for name in values)


def _flags(run: Run) -> dict[str, dict[str, bool]]:
    return {name: {path: m.training for path, m in model.named_modules()} for name, model in run.models.items()}


def _states(kept: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``rng.set`` takes, of what was kept before and for this batch."""
    old, fresh = kept
    found = {**old, **fresh}
    return {name: it.get_state() if isinstance(it, torch.Generator) else it for name, it in found.items()}


def _takes_part(callback: Callback) -> bool:
    """True if it may change or end a step."""
    return any(getattr(type(callback), hook) is not getattr(Callback, hook) for hook in _IN_STEP)


def _policy(run: Run, what: str) -> Any:
    # a skipped step raises when it is replayed
    return "raise" if what == "NonFiniteError" else run.settings.get("nonfinite")


def _kept(value: Any, where: str, limits: list[str]) -> Any:
    """``value`` with None in the place of what no checkpoint can hold."""
    kind = type(value)
    if kind is dict:
        return {key: _kept(part, f"{where}[{key!r}]", limits) for key, part in value.items()}
    if kind is list or kind is tuple:
        return kind(_kept(part, f"{where}[{i}]", limits) for i, part in enumerate(value))
    try:
        check(value)
    except CheckpointError:
        limits.append(f"{where} was left out: it is {with_article(f'{kind.__module__}.{kind.__qualname__}')}")
        return None
    return value


def _traceback(error: Exception | None) -> str | None:
    return None if error is None else "".join(traceback.format_exception(error))[-20_000:]


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMG]?B?)\s*", str(size))
    if match is None or match[2] not in _UNITS or isinstance(size, bool):
        raise SettingError(f"max_size={size!r} is no size; write a number of bytes, or a text such as '100 MB'")
    return int(float(match[1]) * _UNITS[match[2]])
