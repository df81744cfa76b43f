"""What goes on in each layer while a model trains: activations, gradients, updates; and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loopwright.callbacks.diagnosis import diagnose
from loopwright.errors import SettingError
from loopwright.events import Callback
from loopwright.state import Phase, Run, StepResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ACTIVATIONS", "BINS", "WEIGHTS", "Doctor"]

ACTIVATIONS = ("mean", "std", "zero", "saturated", "dead")
WEIGHTS = ("gradient", "no gradient", "weight", "update")
_SAMPLE = 2**14  # values of an output that are looked at
_READ = 64  # records that may wait on the device
_DECADES = 3
_POSITIVE = 10.0 ** np.linspace(-_DECADES, _DECADES, 25)
BINS = np.concatenate([-_POSITIVE[::-1], _POSITIVE])  # edges of the histograms; the middle bin holds what is near 0


@dataclass(slots=True)
class _Seen:
    """What a layer has given in the open step."""

    sums: Tensor  # values, their sum, that of their squares, those that are 0, those that are saturated
    counts: Tensor  # by bin
    alive: Tensor | None = None  # by unit, of a ReLU


class Doctor(Callback):
    """Looks into every layer at steps ``every``, 2 * ``every``, ..., and says in words what is wrong.

    Of each module without children: mean and standard deviation of its output, the share of zeros, of saturated
    values (beyond 0.97 of the range, of Tanh and Sigmoid), of dead units (0 for the whole batch, of ReLU), a histogram.
    Of each trained parameter: the norm of its gradient after clipping, the share of the gradient that is 0, its own
    norm, and that of its update. What is computed by functions (``F.relu``) has no module and is not seen. Of outputs
    with more than 16,384 values every so many-th is taken.

    ``findings`` holds the diagnosis, printed at the end (``show=False`` does not) with its sources; the numbers are
    in ``activations`` and ``weights``, arrays of (records, layers, what), and in ``doctor.json`` of the run folder;
    ``plot("doctor.png")`` draws them. Between such steps nothing is done. Numbers stay on the device until 64 records
    have come together or somebody asks. A step that is looked at keeps a copy of the weights while it lasts.
    After a resume the record begins anew.

    Reads: outputs of modules, gradients, weights. Changes: nothing. Stops: no. Raises SettingError for an ``every``
    that is none; before step 0 with compiled steps, whose modules are merged, and with FSDP.

    >>> doctor = Doctor(every=10, show=False)
    >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> doctor.findings
    []
    """

    def __init__(self, every: int = 50, *, show: bool = True) -> None:
        if type(every) is not int or every < 1:
            raise SettingError(f"Doctor(every={every!r}): expected a whole number of steps, from 1")
        self.every, self.show = every, show
        self._forget()

    def _forget(self) -> None:
        self.layers: list[str] = []
        self.kinds: list[str] = []
        self.parameters: list[str] = []
        self._modules: list[nn.Module] = []
        self._steps: list[int] = []
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._read: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
        self._handles: list[Any] = []
        self._seen: dict[int, _Seen] = {}
        self._before: dict[int, Tensor] = {}
        self._measured: dict[int, list[Tensor]] = {}
        self._own: list[Tensor] = []
        self._edges: dict[torch.device, Tensor] = {}

    def problems(self, run: Run) -> Iterator[str]:
        if run.merges:
            yield f"Doctor looks at each module, which {run.merges} merges; leave one of them out"
        if getattr(getattr(run.team, "strategy", None), "shards", False):
            yield "Doctor needs whole parameters, which FSDP shares out; look at the model with strategy='ddp'"

    # ---------------------------------------------------------------------------------------------- while it trains

    def on_fit_start(self, run: Run) -> None:
        self._forget()
        several = len(run.models) > 1
        for key, model in run.models.items():
            start = f"{key}." if several else ""
            for path, module in model.named_modules():
                if not any(True for _ in module.children()) and id(module) not in map(id, self._modules):
                    self._modules.append(module)
                    self.layers.append((start + path).rstrip(".") or type(module).__name__)
                    self.kinds.append(type(module).__name__)
            for path, parameter in model.named_parameters():
                if not any(parameter is known for known in self._own):
                    self._own.append(parameter)
                    self.parameters.append(start + path)

    def on_step_start(self, run: Run) -> None:
        if self._handles:  # a step that was dropped has no end
            self._release()
        if not (run.progress.step + 1) % self.every:
            for i, module in enumerate(self._modules):
                self._handles.append(module.register_forward_hook(self._watcher(i)))

    def _watcher(self, i: int) -> Any:
        def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and output.numel() and torch.is_grad_enabled():
                with torch.no_grad():
                    self._look(i, module, output.detach())

        return watch

    def _look(self, i: int, module: nn.Module, output: Tensor) -> None:
        flat = output.reshape(-1)
        flat = flat[:: -(-flat.numel() // _SAMPLE)].float()
        limit = _SATURATED.get(type(module))
        saturated = torch.full_like(flat[0], torch.nan) if limit is None else ((flat - limit[0]).abs() > limit[1]).sum()
        sums = torch.stack([flat.new_tensor(float(flat.numel())), flat.sum(), flat.square().sum(), (flat == 0).sum(),
                            saturated])  # fmt: skip
        if flat.device not in self._edges:  # what is beyond the ends counts as at them
            self._edges[flat.device] = torch.from_numpy(BINS[1:-1]).to(flat)
        cut = torch.searchsorted(flat.sort().values, self._edges[flat.device])
        counts = torch.diff(cut, prepend=cut.new_zeros(1), append=cut.new_full((1,), flat.numel()))
        alive = _alive(output) if isinstance(module, _RECTIFIERS) else None
        if (known := self._seen.get(i)) is None:
            self._seen[i] = _Seen(sums, counts, alive)
        else:
            known.sums, known.counts = known.sums + sums, known.counts + counts
            if alive is not None and known.alive is not None and known.alive.shape == alive.shape:
                known.alive = known.alive | alive

    def on_grads_ready(self, run: Run, phase: Phase, grad_norm: Tensor | None) -> None:
        if not self._handles:
            return
        with torch.no_grad():
            for parameter in phase.parameters():
                if not parameter.requires_grad:
                    continue
                grad = parameter.grad
                self._before[id(parameter)] = parameter.detach().clone()
                values = grad.coalesce().values() if grad is not None and grad.is_sparse else grad
                nothing = torch.zeros((), device=parameter.device)
                found = (
                    [nothing, nothing + 1] if values is None else [values.float().norm(), (values == 0).float().mean()]
                )
                self._measured[id(parameter)] = [*found, parameter.detach().float().norm()]

    def on_step_end(self, run: Run, result: StepResult) -> None:
        if not self._handles:
            return
        with torch.no_grad():
            outputs, counts = self._outputs(run.device)
            self._steps.append(run.progress.step)
            self._waiting.append((outputs, counts, self._weights(run.device)))
        self._release()
        if len(self._waiting) >= _READ:
            self._fetch()

    def _outputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        none = torch.full((len(ACTIVATIONS),), torch.nan, device=device)
        empty = torch.zeros(len(BINS) - 1, dtype=torch.int64, device=device)
        rows, counts = [], []
        for i in range(len(self._modules)):
            if (seen := self._seen.get(i)) is None:
                rows.append(none)
                counts.append(empty)
                continue
            n, total, squares, zero, saturated = seen.sums
            mean = total / n
            dead = none[0] if seen.alive is None else 1 - seen.alive.float().mean()
            rows.append(torch.stack([mean, (squares / n - mean**2).clamp(min=0).sqrt(), zero / n, saturated / n, dead]))
            counts.append(seen.counts)
        return torch.stack(rows), torch.stack(counts)

    def _weights(self, device: torch.device) -> Tensor:
        none = torch.full((len(WEIGHTS),), torch.nan, device=device)
        rows = []
        for parameter in self._own:
            if (measured := self._measured.get(id(parameter))) is None:
                rows.append(none)
                continue
            update = (parameter.detach() - self._before[id(parameter)]).float().norm()
            rows.append(torch.stack([*measured, update]))
        return torch.stack(rows)

    def _release(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._seen, self._before, self._measured = {}, {}, {}

    def _fetch(self) -> None:
        if self._waiting:
            parts = (torch.stack(part).cpu().numpy() for part in zip(*self._waiting, strict=True))
            self._read.append(tuple(parts))  # type: ignore[arg-type]
            self._waiting = []

    # ------------------------------------------------------------------------------------------- what came of it

    def _array(self, which: int, width: int) -> NDArray[Any]:
        self._fetch()
        size = len(self.parameters) if which == 2 else len(self.layers)
        return np.concatenate([np.zeros((0, size, width)), *(part[which] for part in self._read)])

    @property
    def steps(self) -> list[int]:
        """The steps that were looked at."""
        return list(self._steps)

    @property
    def activations(self) -> NDArray[Any]:
        """Of (records, layers, what): mean, std, share of zeros, of saturated values, of dead units; NaN for none."""
        return self._array(0, len(ACTIVATIONS))

    @property
    def histograms(self) -> NDArray[Any]:
        """Of (records, layers, bins): values in each; the bins are ten to the power of -3 to 3 of either sign."""
        return self._array(1, len(BINS) - 1)

    @property
    def weights(self) -> NDArray[Any]:
        """Of (records, parameters, what): norm of the gradient, share of it that is 0, own norm, norm of the update."""
        return self._array(2, len(WEIGHTS))

    @property
    def findings(self) -> list[str]:
        """What is wrong, in words; empty where nothing is, or nothing was looked at yet."""
        if not self._steps:
            return []
        dims = [parameter.dim() for parameter in self._own]
        return diagnose(self.layers, self.kinds, self.activations, self.parameters, dims, self.weights)

    def __str__(self) -> str:
        if not self._steps:
            return f"Doctor: nothing was looked at yet; the first look is at step {self.every}"
        found = self.findings
        head = f"Doctor: {len(self._steps)} looks at {len(self.layers)} layers, up to step {self._steps[-1]:,}"
        return "\n".join(
            [f"{head}: {f'{len(found)} findings' if found else 'all is well'}", *(f"  - {f}" for f in found)]
        )

    def plot(self, path: str | Path | None = None) -> Figure:
        """Histograms of outputs over time and curves of all else; written to ``path`` if one is given.

        Needs matplotlib. Raises SettingError where nothing was looked at yet.
        """
        from loopwright.callbacks.doctor_picture import draw

        if not self._steps:
            raise SettingError(f"Doctor has nothing to draw: the first look is at step {self.every}")
        return draw(self, path)

    def on_fit_end(self, run: Run) -> None:
        self._end(run)

    def on_exception(self, run: Run, error: BaseException) -> None:
        if run.stages:  # in trainer.test nothing has been looked at
            self._end(run)

    def _end(self, run: Run) -> None:
        self._release()
        if run.comm.rank:
            return
        if run.folder is not None and self._steps:
            (run.folder / "doctor.json").write_text(json.dumps(self.as_dict()), encoding="utf-8")
        if self.show:
            print(self)

    def as_dict(self) -> dict[str, Any]:
        """What ``doctor.json`` holds: ``steps``, ``findings``, ``layers`` and ``parameters`` with a list for each."""
        outputs, weights = self.activations, self.weights
        return {
            "steps": self.steps,
            "findings": self.findings,
            "layers": {n: _columns(outputs[:, i], ACTIVATIONS) for i, n in enumerate(self.layers)},
            "parameters": {n: _columns(weights[:, i], WEIGHTS) for i, n in enumerate(self.parameters)},
        }


_RECTIFIERS = (nn.ReLU, nn.ReLU6)
_SATURATED: dict[type[nn.Module], tuple[float, float]] = {nn.Tanh: (0.0, 0.97), nn.Sigmoid: (0.5, 0.47)}


def _alive(output: Tensor) -> Tensor:
    """Which units gave anything but 0: features are dimension 1 of a batch of vectors or images, else the last."""
    if output.dim() < 2:
        return (output != 0).reshape(-1)
    unit = 1 if output.dim() in (2, 4, 5) else output.dim() - 1
    return (output != 0).movedim(unit, 0).flatten(1).any(1)


def _columns(values: NDArray[Any], names: tuple[str, ...]) -> dict[str, list[float | None]]:
    return {name: [float(v) if np.isfinite(v) else None for v in values[:, i]] for i, name in enumerate(names)}
