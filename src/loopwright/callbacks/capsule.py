"""What a step that failed was made of, kept so that ``lw.replay`` can make it fail again."""

from __future__ import annotations

import re
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from loopwright import rng
from loopwright.checkpoint import check, encode, snapshot, write
from loopwright.data import Chunks
from loopwright.errors import CheckpointError, LoopwrightWarning, SettingError
from loopwright.events import Callback
from loopwright.parallel import is_shard
from loopwright.state import Progress, Run, StepResult, has_state
from loopwright.text import with_article

__all__ = ["Capsule"]

_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SMALL = 10**6  # bytes of buffers that are copied at each step
_IN_STEP = (
    "on_step_start", "on_batch_start", "map_batch", "map_output", "map_loss", "on_backward_end", "on_grads_ready",
)  # fmt: skip
_PARTS = {"optimizers": "the optimizer states", "weights": "the weights", "window": "the batches"}  # in this order
_READS = 16  # as long as no step draws, the random state is read in so many steps, and then in each 16th of an epoch
_FETCHING = "[loopwright] while fetching"


class Capsule(Callback):
    """Writes ``<run folder>/capsules/step-00000012-ValueError`` when a step raises, or is skipped as not finite.

    ``lw.replay(capsule, task)`` makes the same error happen again, with the same bits, also on another machine. In it:
    the batches of the step so far and torch's random state before each, the weights, buffers, optimizer states and
    train/eval flags before the step, where training stood, the error with its traceback, versions. Tensors and plain
    data only; no code. Of skipped steps only the first has a capsule (none under a
    gradient scaler, which drops some), and errors between steps (reading data, validation, saving) have none: the last
    checkpoint is the better place to go on from.

    ``max_size`` bounds it, as a number of bytes or "100 MB": what is too much is left out, the optimizer states first,
    then the weights, then the batches. ``folder`` is another place than the run folder. It must come first in the list
    of callbacks, to see batches and random numbers before the others do.

    What it cannot bring back: draws from Python's or NumPy's generator in a step (their state is taken when the error
    comes), what a step has changed in place in its batch, statistics of batch norm as they were before the forward
    (they do not enter it), other buffers that change, beyond 1 MB, and weights that have moved when the
    error comes (in a later phase, or inside of ``optimizer.step``); draws of torch that began a few steps before, late
    in an epoch of a run that had drawn nothing. The manifest names what it knows of it.

    Reads: batches, weights. Changes: nothing. Stops: no. Raises SettingError for a size that is none, and without a
    folder to write to.

    >>> Capsule(max_size="1.5 GB").max_bytes
    1500000000
    """

    def __init__(self, max_size: int | str = "100 MB", folder: str | Path | None = None) -> None:
        self.max_size, self.folder = max_size, folder
        self.max_bytes = _bytes(max_size)
        self.last: Any = None  # the path of the last capsule
        self._cuda = False
        self._forget()

    def _forget(self) -> None:
        self._at: Progress | None = None
        self._window: list[tuple[Any, dict[str, Tensor]]] = []
        self._open: tuple[list[float] | None, dict[str, Any]] = (None, {})
        self._moving: list[tuple[dict[str, Tensor | None], str]] = []
        self._buffers: list[Tensor] = []
        self._skipped: int | None = 0
        self._in_row = 0
        # to read torch's random state takes 15 us: where nobody draws, a step has that of a step before. As a rule it
        # shows in the first steps who draws; where it did not, the limits of the capsule say so
        self._random: dict[str, Tensor] = {}
        self._reads, self._draws, self._reused = 0, self._cuda, False

    def on_fit_start(self, run: Run) -> None:
        if self.folder is None and run.folder is None:
            raise SettingError("Capsule needs a folder to write to: Trainer(folder='runs'), or Capsule(folder=...)")
        self._cuda = run.device.type == "cuda"
        self._forget()
        self._skipped, self._moving = run.skipped, _moving(run)
        if run.team is None and all(stage.accumulate == 1 for stage in run.stages):
            # on_step_start sees all: two hooks less in each step
            for name in ("on_batch_start", "on_step_end"):
                own = getattr(self, name)
                setattr(run.hooks, name, tuple(hook for hook in getattr(run.hooks, name) if hook != own))

    def on_step_start(self, run: Run) -> None:
        self._begin(run)
        if self._open[0] is None:  # a single batch, which is fetched by now: nobody has drawn since
            (batch,), p = run.window, run.progress
            self._reused = not (self._draws or self._reads < _READS or p.batch % _READS == 0)
            if not self._reused:
                before, self._random = self._random, self._read(run)
                self._reads += 1
                if p.batch and before and not self._draws:  # an epoch may begin with a draw: that of its order
                    self._draws = not torch.equal(before["torch"], self._random["torch"])
            self._note(batch, self._random)

    def on_batch_start(self, run: Run, batch: Any) -> None:
        if self._open[0] is not None:
            self._note(batch, self._read(run))

    def _read(self, run: Run) -> dict[str, Tensor]:
        cuda = {"cuda": torch.cuda.get_rng_state(run.device)} if self._cuda else {}
        return {"torch": torch.default_generator.get_state(), **cuda}

    def _note(self, batch: Any, random: dict[str, Tensor]) -> None:
        kind = type(batch)
        self._window.append((batch.copy() if kind is dict or kind is list else batch, random))

    def _begin(self, run: Run) -> None:
        """A new step; if the one before was skipped, all of it is still here."""
        if run.skipped != self._skipped and self._skipped is not None and run.precision.scaler is None:
            self._skipped = None
            try:
                self._write(run, None)
            except CheckpointError as error:  # training goes on
                warnings.warn(f"no capsule of the skipped step: {error}", LoopwrightWarning, stacklevel=2)
        self._at, self._open, self._in_row = run.progress, run.open_step, run.skips_in_row
        self._window.clear()
        if self._moving:
            self._buffers = [owner[name].clone() for owner, name in self._moving]  # type: ignore[union-attr]

    def on_step_end(self, run: Run, result: StepResult) -> None:
        self._window.clear()  # a batch is not held while the next one is fetched

    def on_fit_end(self, run: Run) -> None:
        self._begin(run)
        self._forget()

    def on_exception(self, run: Run, error: BaseException) -> None:
        fetching = any(note.startswith(_FETCHING) for note in getattr(error, "__notes__", ()))
        if isinstance(error, Exception) and self._at is run.progress and self._window and not fetching:
            self._write(run, error)
            error.add_note(f"[loopwright] to make it happen again: lw.replay({str(self.last)!r}, task)")
        self._forget()

    # -------------------------------------------------------------------------------------------- what is written

    def _write(self, run: Run, error: Exception | None) -> None:
        root = Path(self.folder) if self.folder is not None else run.folder
        assert root is not None
        assert self._at is not None
        name = type(error).__name__ if error is not None else "NonFiniteError"
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
        if self._reused and not torch.equal(self._random["torch"], torch.default_generator.get_state()):
            limits.append(
                f"torch's random state was read up to {_READS - 1} steps before: until then no step had drawn"
            )
        state: dict[str, Any] = {
            "window": [{"batch": _kept(batch, f"batch {i + 1}", limits), "rng": r}
                       for i, (batch, r) in enumerate(self._window)],
            "planned": planned, "values": _kept(dict(values), "values", limits),
            "optimizers": {name: _kept(o.state_dict(), f"optimizer {name!r}", limits)
                           for name, o in run.optimizers.items()},
            "optimizer_kinds": {name: type(o).__qualname__ for name, o in run.optimizers.items()},
            "models": extras, "flags": _flags(run), "progress": {**self._at._asdict(), "stage": run.progress.stage},
            "precision": run.precision.state_dict() if has_state(run.precision) else {},  # type: ignore[attr-defined]
            "key": run.settings["key"], "skips_in_row": self._in_row,
            "rng": {k: v for k, v in rng.get().items() if k in ("python", "numpy")},
            "callbacks": [type(c).__qualname__ for c in run.callbacks if c is not self and _takes_part(c)],
        }  # fmt: skip
        files = self._fitting(files, state, limits)
        n = stage.accumulate if isinstance(stage.accumulate, int) else len(planned or [1])
        about = {
            **snapshot.info(run), "kind": "capsule", "device": str(run.device), "stage_index": self._at.stage,
            "error": {"type": name, "message": None if error is None else str(error),
                      "notes": list(getattr(error, "__notes__", ())), "traceback": _traceback(error)},
            "settings": {"accumulate": n, "clip_norm": run.settings.get("clip_norm"),
                         "precision": run.precision.name, "nonfinite": _policy(run, error),
                         "deterministic": bool(run.settings.get("deterministic"))},
            "conditions": snapshot.conditions(run), "limits": limits,
        }  # fmt: skip
        rank = f"-rank{run.comm.rank}" if run.comm.rank else ""  # several may fail at once
        self.last = write(root / "capsules" / f"step-{self._at.step + 1:08d}-{name}{rank}", files, state, about)

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

    def _fitting(self, files: dict[str, Any], state: dict[str, Any], limits: list[str]) -> dict[str, Any]:
        """Leave out what is too much."""

        def size(part: Any) -> int:
            return sum(t.numel() * t.element_size() for t in encode(part)[1].values())

        sizes = {"optimizers": size(state["optimizers"]), "weights": size(files), "window": size(state["window"])}
        for part, what in _PARTS.items():
            if sum(sizes.values()) <= self.max_bytes:
                break
            limits.append(
                f"{what} ({sizes.pop(part):,} bytes) were left out: the capsule is bounded by {self.max_size}"
            )
            if part == "weights":
                files = {}
            else:
                state[part] = None
        return files


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


def _flags(run: Run) -> dict[str, dict[str, bool]]:
    return {name: {path: m.training for path, m in model.named_modules()} for name, model in run.models.items()}


def _takes_part(callback: Callback) -> bool:
    """True if it may change or end a step."""
    return any(getattr(type(callback), hook) is not getattr(Callback, hook) for hook in _IN_STEP)


def _policy(run: Run, error: Exception | None) -> Any:
    return "raise" if error is None else run.settings.get("nonfinite")  # a skipped step raises when it is replayed


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
