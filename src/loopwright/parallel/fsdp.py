"""Fully sharded: every rank holds a part of each parameter, its gradient and its optimizer state (torch's FSDP2)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from loopwright._compat import renew_dtypes
from loopwright.errors import SettingError, choose, elsewhere
from loopwright.given import check_flag
from loopwright.parallel.ddp import idle
from loopwright.parallel.shards import is_shard
from loopwright.state import Phase, Run, Stage

__all__ = ["FSDP"]

Blocks = str | type[nn.Module] | Sequence[str | type[nn.Module]]


class FSDP:
    """Strategy: each rank holds a part of every parameter, and has a whole block only while that computes.

    ``blocks`` says what is gathered at a time: patterns of module names as they stand in the ``state_dict``
    (``"layers.*"``; a ``*`` stays within one part of the name), module classes, or several of these. ``"auto"`` takes
    the elements of the outermost ``nn.ModuleList``; what is in no block is gathered as one. ``precision="bf16"``
    computes and gathers in bfloat16 while parameters, optimizer and the sum of gradients stay as they are; an object is
    a ``MixedPrecisionPolicy``. ``reshard_after_forward=False`` keeps blocks whole until their backward: more memory,
    fewer messages. ``offload=True`` keeps parameters, gradients and optimizer state in the memory of the CPU.
    ``sync_batch_norm=True``: batch norms measure the whole batch, and not each rank's part of it.

    The optimizer must be made of the parts: give a factory, or make it in ``configure_optimizers``. ``models`` hold
    DTensors during the fit (``p.full_tensor()`` is the whole one, which all ranks must ask for together). When the fit
    ends they are whole, plain parameters on every rank again, the same objects as before; with ``gather=False`` they
    stay as they are, for models that fit into no single device. With one process nothing is sharded. A rank that fails,
    dies, is stopped or is alone in a collective ends all of them within ``timeout`` seconds.

    Raises SettingError for a pattern or class that matches no module, and for options that cannot be used.
    ``torch.distributed.fsdp.fully_shard`` does the work: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html

    >>> FSDP(blocks="layers.*").blocks
    ('layers.*',)
    """

    name = "fsdp"
    shards = True

    @elsewhere()
    def __init__(
        self,
        blocks: Blocks = "auto",
        *,
        precision: Any = None,
        reshard_after_forward: bool = True,
        offload: bool = False,
        gather: bool = True,
        sync_batch_norm: bool = False,
        timeout: float = 30.0,
    ) -> None:
        self.blocks = tuple(blocks) if isinstance(blocks, (list, tuple)) else (blocks,)
        for one in self.blocks:
            if not (isinstance(one, str) or (isinstance(one, type) and issubclass(one, nn.Module))):
                raise SettingError(
                    f"FSDP(blocks={one!r}): expected patterns of module names such as 'layers.*', or module classes"
                )
        if isinstance(precision, str) and precision != "bf16":
            raise SettingError(f"FSDP(precision={precision!r}) is unknown. {choose(precision, ['bf16'])}")
        self.precision, self.reshard_after_forward = precision, reshard_after_forward
        if not timeout > 0:
            raise SettingError(f"FSDP(timeout={timeout!r}); expected a number of seconds above 0")
        check_flag("sync_batch_norm", sync_batch_norm)
        self.offload, self.gather, self.sync_batch_norm, self.timeout = offload, gather, sync_batch_norm, timeout
        self._mesh: Any = None

    def mesh(self, device: torch.device, size: int) -> Any:
        """All ranks in a row, as torch's DeviceMesh; they must ask for it together."""
        if self._mesh is None:
            from torch.distributed.device_mesh import init_device_mesh

            self._mesh = init_device_mesh(device.type, (size,))
        return self._mesh

    def shard(self, task: Any, models: Mapping[str, nn.Module], mesh: Any) -> None:
        """Let this rank keep its part of each parameter of ``models``, none of which is sharded yet."""
        if self.offload and mesh.device_type == "cpu":
            raise SettingError(
                "FSDP(offload=True) moves parameters to the CPU, where this run is already; leave it out"
            )
        for model in models.values():
            _check_lazy(model)
        chosen = self._chosen(models)
        options = self._options(mesh)
        from torch.distributed.fsdp import fully_shard

        for model in models.values():
            roots = list(_roots(model, is_task=model is task))
            for module in reversed(list(model.modules())):  # from the inside out
                if id(module) in chosen or any(module is root for root in roots):
                    fully_shard(module, **options)

    def _options(self, mesh: Any) -> dict[str, Any]:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

        options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": self.reshard_after_forward}
        if self.precision is not None:
            bf16 = self.precision == "bf16"
            options["mp_policy"] = (
                MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else self.precision
            )
        return options | ({"offload_policy": CPUOffloadPolicy()} if self.offload else {})

    def _chosen(self, models: Mapping[str, nn.Module]) -> set[int]:
        """The modules that are blocks, by id."""
        named = {name: module for model in models.values() for name, module in model.named_modules() if name}
        found: set[int] = set()
        for wanted in self.blocks if models else ():
            if wanted == "auto":
                hits = [module for model in models.values() for module in _listed(model)]
            elif isinstance(wanted, str):
                hits = [module for name, module in named.items() if _matches(name, wanted)]
            else:
                hits = [module for module in named.values() if isinstance(module, wanted)]
            if not hits and wanted != "auto":
                kinds = list(dict.fromkeys(type(module).__name__ for module in named.values()))
                choice = choose(wanted, named) if isinstance(wanted, str) else choose(wanted.__name__, kinds)
                told = repr(wanted) if isinstance(wanted, str) else wanted.__name__
                raise SettingError(f"FSDP(blocks={told}) matches no module. {choice}")
            found |= {id(module) for module in hits if any(True for _ in module.parameters())}
        return found

    def begin_stage(self, run: Run, stage: Stage) -> dict[str, Sharded]:
        """Let the phases of ``stage`` say which of their backwards is the last of a window; each by its name."""
        wrapped = [module for model in run.models.values() for module in wrapped_in(model)]
        for module in wrapped:
            module.reshard()
        renew_dtypes(wrapped)
        for name, model in run.models.items():
            if any(not is_shard(p) for p in model.parameters()):
                raise SettingError(
                    f"{name} has parameters that are not sharded: run.replace cannot change a model that FSDP trains. "
                    "Begin another fit with it"
                )
        return {phase.name: Sharded(phase, run, wrapped) for phase in stage.phases if phase.moved}


class Sharded:
    """A phase whose gradients are reduced in the backward of the last batch of its window."""

    stale = False
    seconds = 0.0  # of forwards, which wait for the other ranks here: they would tell nothing of this one

    def __init__(self, phase: Phase, run: Run, wrapped: Sequence[Any]) -> None:
        self.phase, self.run, self.wrapped = phase, run, wrapped
        self.held: Any = None  # the last batch of an open window
        self._last = True

    @property
    def last(self) -> bool:
        return self._last

    @last.setter
    def last(self, last: bool) -> None:
        if last != self._last:
            for module in self.wrapped:
                module.set_requires_gradient_sync(last, recurse=False)
        self._last = last

    def idle(self, batch: Any) -> None:
        """Take part in the forward and the backward of the others, and add nothing to the gradients."""
        idle(self.run, self.phase.step, batch)

    def flush(self) -> None:
        """Reduce what was accumulated although no batch is left: all ranks have ended their window."""
        if self.held is not None:
            self.last = True
            self.idle(self.held)

    def check(self) -> None:
        """A parameter without a gradient is left alone, as with one process."""


def wrapped_in(model: nn.Module) -> list[Any]:
    """The modules of ``model`` that FSDP gathers parameters for. Where nobody has imported it, there are none."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def _roots(model: nn.Module, *, is_task: bool) -> Iterable[nn.Module]:
    """What is called as a whole: the model; of a task, whose steps call them, its children."""
    if not is_task and not isinstance(model, (nn.ModuleList, nn.ModuleDict)):
        if any(True for _ in model.parameters()):
            yield model
        return
    own = next((name for name, _ in model.named_parameters(recurse=False)), None)
    if own is not None:
        raise SettingError(
            f"the parameter {own!r} lies on {type(model).__name__} itself, and FSDP gathers parameters when their "
            "module is called; put it into a module of its own, whose forward uses it"
        )
    for child in model.children():
        yield from _roots(child, is_task=False)


def _listed(model: nn.Module) -> Iterable[nn.Module]:
    """The elements of the outermost module lists."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _listed(child)


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _check_lazy(model: nn.Module) -> None:
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise SettingError(
            f"the parameter {lazy} has no shape yet, and cannot be shared out; call the model once on a batch before "
            "fit"
        )
