"""What goes on inside a model and its optimizers, logged whenever an event says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loopwright.callbacks.resources import gpu_memory
from loopwright.errors import SettingError, choose
from loopwright.events import Callback
from loopwright.handlers import Event, Filter, Handler
from loopwright.state import Run

__all__ = ["Watch"]


class Watch(Callback):
    """Logs ``what`` at the event ``at``, every 50th step unless another is given; it is in the next record.

    | what | as ``train/...`` |
    |---|---|
    | "parameters" | ``parameter_norm/<name>`` |
    | "gradients" | ``gradient_norm/<name>``, as they stand: after clipping; of those that have one |
    | "activations" | ``activation_mean/<module>``, ``activation_std/<module>`` in the next forward that is trained on |
    | "optimizer" | ``optimizer/<setting>`` for each number: ``lr``, ``weight_decay``, ``betas.0``, ... |
    | "gpu" | ``gpu_memory_mb``, ``gpu_memory_peak_mb``, ``gpu_utilization`` in percent |

    Norms are 2-norms. Modules are those without children. With several optimizers or groups their name or number
    follows the setting. Values stay on the device until the record, which has the mean over what was logged since the
    last one; between events nothing is done.

    Reads: what it is told. Changes: nothing. Stops: no. Raises SettingError for an unknown name; before step 0 for
    "gpu" without CUDA and for activations of compiled steps or parameters that FSDP shares out. "gpu" needs
    nvidia-ml-py: ``pip install "loopwright[gpu]"``.

    >>> Watch("gradients", "optimizer", at=Event.EPOCH_END | Event.VALIDATION_END).what
    ('gradients', 'optimizer')
    """

    def __init__(self, *what: str, at: Event | Filter | None = None) -> None:
        for one in what or ("",):
            if one not in _LOOKS:
                raise SettingError(f"Watch({one!r}): there is nothing of that name to watch. {choose(one, _LOOKS)}")
        self.what = what
        self.at = Event.STEP_END(every=50) if at is None else at
        self._handler = Handler(self.at, self._look, (), {})
        self._handles: list[Any] = []
        self._awaited: set[str] = set()  # modules whose next output is to be logged
        self._run: Run | None = None

    def handlers(self) -> list[Handler]:
        """What the run is to call at the event."""
        return [self._handler.anew()]

    def problems(self, run: Run) -> Iterator[str]:
        if not any(handler.fn == self._look for handler in run.handlers):
            yield "Watch belongs among the callbacks of the Trainer, not of a stage; at=... says when it looks"
        if "gpu" in self.what and run.device.type != "cuda":
            yield f"Watch('gpu') looks at CUDA, and this run is on {run.device}; leave 'gpu' out"
        if "activations" in self.what and run.merges:
            yield f"Watch('activations') looks at each module, which {run.merges} merges; leave one of them out"
        shards = getattr(getattr(run.team, "strategy", None), "shards", False)
        if shards and {"parameters", "gradients"} & {*self.what}:
            yield "Watch needs whole parameters, which FSDP shares out; look at the model with strategy='ddp'"

    def on_fit_start(self, run: Run) -> None:
        self._run = run
        if "gpu" in self.what:
            torch.cuda.utilization(run.device)  # a missing package is an error now

    def _look(self, run: Run) -> None:
        for one in self.what:
            _LOOKS[one](self, run)

    def on_fit_end(self, run: Run) -> None:
        self._release()

    def on_exception(self, run: Run, error: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        self._run, self._awaited = None, set()
        while self._handles:
            self._handles.pop().remove()

    def state_dict(self) -> dict[str, Any]:
        return {"awaited": sorted(self._awaited)} if self._awaited else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._run is not None and self._run.status == "running":  # else a run that had ended is only loaded
            self._await(self._run, set(state["awaited"]))

    def _parameters(self, run: Run) -> None:
        run.log({f"parameter_norm/{name}": p.detach().norm() for name, p in _parameters(run)})

    def _gradients(self, run: Run) -> None:
        run.log({f"gradient_norm/{name}": p.grad.detach().norm() for name, p in _parameters(run) if p.grad is not None})

    def _activations(self, run: Run) -> None:
        if run.status == "running":
            self._await(run, {name for name, _ in _leaves(run)})

    def _await(self, run: Run, names: set[str]) -> None:
        """Log the next output that is trained on of the modules called ``names``, and of no others."""
        self._release()
        self._run, self._awaited = run, names
        for name, module in _leaves(run):
            if name in names:
                self._handles.append(module.register_forward_hook(_outputs(run, name, names)))

    def _optimizer(self, run: Run) -> None:
        values: dict[str, float] = {}
        for name, optimizer in run.optimizers.items():
            several = f"/{name}" if len(run.optimizers) > 1 else ""
            for i, group in enumerate(optimizer.param_groups):
                end = several + (f"/{i}" if len(optimizer.param_groups) > 1 else "")
                values |= {f"optimizer/{key}{end}": value for key, value in _numbers(group)}
        run.log(values)

    def _gpu(self, run: Run) -> None:
        run.log({**gpu_memory(run.device), "gpu_utilization": float(torch.cuda.utilization(run.device))})


_LOOKS = {
    "parameters": Watch._parameters, "gradients": Watch._gradients, "activations": Watch._activations,
    "optimizer": Watch._optimizer, "gpu": Watch._gpu,
}  # fmt: skip


def _models(run: Run) -> Iterator[tuple[str, nn.Module]]:
    """Each model with what its names begin with: nothing if it is the only one."""
    for key, model in run.models.items():
        yield f"{key}." if len(run.models) > 1 else "", model


def _leaves(run: Run) -> Iterator[tuple[str, nn.Module]]:
    """The modules without children, each once."""
    for start, model in _models(run):
        for path, module in model.named_modules():
            if not any(True for _ in module.children()):
                yield start + (path or type(module).__name__), module


def _parameters(run: Run) -> list[tuple[str, Tensor]]:
    return [(start + path, p) for start, model in _models(run) for path, p in model.named_parameters()]


def _outputs(run: Run, name: str, awaited: set[str]) -> Any:
    """A forward hook that logs the first output that is trained on, and no other."""

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        trained = isinstance(output, Tensor) and output.is_floating_point() and torch.is_grad_enabled()
        if name in awaited and trained:
            awaited.discard(name)
            held = output.detach().float()
            run.log({f"activation_mean/{name}": held.mean(), f"activation_std/{name}": held.std(correction=0)})

    return look


def _numbers(group: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings of a parameter group that are numbers; those of a tuple, such as betas, by their place."""
    for key, value in group.items():
        listed = value if isinstance(value, tuple) else ()
        for name, one in ((key, value), *((f"{key}.{i}", part) for i, part in enumerate(listed))):
            number = isinstance(one, (int, float)) and not isinstance(one, bool)
            if number or (isinstance(one, Tensor) and not one.dim()):
                yield name, one
