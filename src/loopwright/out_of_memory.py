"""Memory: the most that was taken, and what to say when it runs out in a step, the cheapest remedy first."""

from __future__ import annotations

import re
import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from loopwright.events import describe
from loopwright.kept import kept_for_backward
from loopwright.state import Run, Step

__all__ = ["add_memory", "is_out_of_memory", "peak_memory"]

# the CPU allocator, and allocators of devices that raise no class of their own
_TEXT = re.compile(r"can't allocate memory|not enough memory|out of memory", re.I)
_SHOWN = 5
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # themselves: a class made from one is a block

_BEGIN = "[loopwright] memory ran out"


def add_memory(error: BaseException, run: Run, batch: Any = None) -> None:
    """Where ``error`` says that memory ran out, note on it, once, what fills it and what to do."""
    if is_out_of_memory(error) and not any(n.startswith(_BEGIN) for n in getattr(error, "__notes__", ())):
        error.add_note(_note(run, batch))


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch raises where an allocation fails, and for Python's and NumPy's own MemoryError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return type(error) is RuntimeError and _TEXT.search(str(error)) is not None


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peaks in bytes, where the system tells them: ``memory`` of this process, ``device_memory`` of CUDA's tensors.

    >>> all(size > 0 for size in peak_memory(torch.device("cpu")).values())
    True
    """
    found = {}
    try:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:  # there is none on Windows
        pass
    if device.type == "cuda":
        found["device_memory"] = torch.cuda.max_memory_allocated(device)
    return found


def _note(run: Run, batch: Any) -> str:
    """What is held, the peak by module, and what to do about it."""
    modules = _Modules(run)
    parts, now, peak = _sizes(run, modules)
    kept = _kept(run, batch, modules)
    lines = [f"{_BEGIN}. Held: {_listed(parts) or 'nothing'}"]
    if run.device.type == "cuda" and torch.cuda.is_initialized():
        allocated, most = torch.cuda.memory_allocated(run.device), torch.cuda.max_memory_allocated(run.device)
        lines[0] += f"; allocated {_text(allocated)}, at the peak {_text(most)}"
    if kept is None:
        lines[0] += f"; most of it by {_listed(modules.by_block(now), _SHOWN) or 'no module'}"
    else:
        lines.append(_peak_by_block(modules.by_block(peak + kept), modules.by_block(kept), modules))
    if batch is not None:
        lines[0] += f"; batch: {describe(batch)}"
    lines.append("Make it smaller, in this order: " + "; ".join(_advice(run, modules, kept)))
    return "\n".join(lines)


class _Modules:
    """The modules of the models, and of the task (a loss), with the paths that messages call them by."""

    def __init__(self, run: Run) -> None:
        self.several, self.root = len(run.models) > 1, next(iter(run.models), "")
        self.names: dict[nn.Module, str] = {}
        for model_name, model in run.models.items():
            for path, module in model.named_modules():
                name = f"{model_name}.{path}".rstrip(".") if self.several else path or model_name
                self.names.setdefault(module, name)
        for path, module in run.task.named_modules() if isinstance(run.task, nn.Module) else ():
            self.names.setdefault(module, path or "task")
        self.named = {name: module for module, name in self.names.items()}

    def block(self, name: str) -> str:
        """The outermost entry of a list (``layers.3``) in which the module is, else its own name."""
        above, path = self.root, ""
        for part in name.split("."):
            path = f"{path}.{part}" if path else part
            if type(self.named.get(above)) in _LISTS and type(self.named.get(path)) not in _LISTS:
                return path
            above = path
        return name

    def by_block(self, sizes: Counter[str]) -> Counter[str]:
        summed: Counter[str] = Counter()
        for name, size in sizes.items():
            summed[self.block(name) if name else "outside of modules"] += size
        return summed

    def pattern(self, kept: Counter[str]) -> tuple[str, int] | None:
        """What to pass to ``checkpoint_activations``, of the list whose blocks keep the most, and how much they do."""
        lists: Counter[str] = Counter()
        for name, size in self.by_block(kept).items():
            block = self.named.get(name)
            if (
                block is not None
                and any(block.children())
                and self.block(name) == name
                and "forward" not in vars(block)
            ):
                lists[name.rpartition(".")[0]] += size
        for above, size in lists.most_common(1):
            model, _, path = above.partition(".") if self.several else ("model", "", above)
            return f'{model}, "{path}.*"' if path else f'{model}, "*"', size
        return None


def _sizes(run: Run, modules: _Modules) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Bytes that are there now, by what they are and by module; and by module with the gradients to come."""
    parts = Counter(dict.fromkeys(("parameters", "gradients", "optimizer states", "buffers"), 0))
    now, peak, seen = Counter[str](), Counter[str](), set[int]()
    state_of = _state_bytes(run)
    for model in run.models.values():
        for module in model.modules():
            name = modules.names[module]
            for parameter in (p for p in module.parameters(recurse=False) if id(p) not in seen):
                seen.add(id(parameter))
                own, state = _bytes(parameter), state_of.get(id(parameter), 0)
                grad = 0 if parameter.grad is None else _bytes(parameter.grad)
                parts.update({"parameters": own, "gradients": grad, "optimizer states": state})
                now[name] += own + grad + state
                peak[name] += own + state + (own if parameter.requires_grad else grad)
            for buffer in (b for b in module.buffers(recurse=False) if id(b) not in seen):
                seen.add(id(buffer))
                for sizes, key in ((parts, "buffers"), (now, name), (peak, name)):
                    sizes[key] += _bytes(buffer)
    return parts, now, peak


def _kept(run: Run, batch: Any, modules: _Modules) -> Counter[str] | None:
    """Bytes that the forward of ``batch`` keeps for the backward, by module; None where that cannot be told.

    Of several phases, what the one keeps that keeps the most: the others' is gone when it comes.
    """
    if batch is None or run.stage is None or run.team is not None or run.compiler is not None:
        return None  # ranks wait for one another; a compiler chooses what is kept
    most: Counter[str] | None = None
    source = run.stage.source
    also = [source] if hasattr(source, "carried") else []  # from one piece of a sequence to the next
    for phase in run.stage.phases or ():
        step = getattr(phase.step, "profiled", phase.step)
        kept = kept_for_backward(partial(_autocast, run, step), batch, modules.names, also) if phase.moved else None
        if kept is not None and (most is None or kept.total() > most.total()):
            most = kept
    return most


def _autocast(run: Run, step: Step, batch: Any) -> None:
    with nullcontext() if run.precision.plain else run.precision.autocast(run.device):
        step(batch)


def _peak_by_block(peak: Counter[str], kept: Counter[str], modules: _Modules) -> str:
    rows: dict[tuple[str, int, int], list[str]] = {}
    for name, size in peak.most_common():
        above, _, last = name.rpartition(".")
        if size:  # entries of a list that are alike stand together
            rows.setdefault((above if last.isdigit() else name, size, kept[name]), []).append(name)
    shown = [_told(names, size, activations) for (_, size, activations), names in list(rows.items())[:_SHOWN]]
    more = sum(map(len, list(rows.values())[_SHOWN:]))
    # what the recurrent kernels of oneDNN and cuDNN keep for themselves is not known without calling them
    least = " at least" if any(isinstance(module, nn.RNNBase) for module in modules.names) else ""
    total = _told([f"in all{least}"], peak.total(), kept.total())
    return f"Peak by module, for this batch: {', '.join(shown)}{f', and {more} more' if more else ''}; {total}"


def _told(names: list[str], size: int, activations: int) -> str:
    alike = f" and {len(names) - 1} like it, each" if len(names) > 1 else ""
    return f"{names[0]}{alike} {_text(size)}" + (f" (activations {_text(activations)})" if activations else "")


def _advice(run: Run, modules: _Modules, kept: Counter[str] | None) -> list[str]:
    n = run.stage.accumulate if run.stage is not None else 1
    n = n if isinstance(n, int) else 1
    advice = [
        f"half the batch_size with Trainer(accumulate={2 * n}), which trains by the same gradients (batch norm sees "
        "the smaller batches)"
    ]
    if run.precision.name == "fp32":
        advice.append('Trainer(precision="bf16"), which halves what forwards keep and changes bits')
    blocks = None if kept is None else modules.pattern(kept)
    if blocks is None:
        advice.append('lw.checkpoint_activations(model, "blocks.*") on the largest blocks, which computes them twice')
    else:
        pattern, size = blocks
        advice.append(
            f"lw.checkpoint_activations({pattern}), which computes twice what is kept there now, {_text(size)}"
        )
    return advice


def _state_bytes(run: Run) -> dict[int, int]:
    """Bytes that the optimizers keep, by the id of the parameter."""
    return {
        id(parameter): sum(_bytes(value) for value in state.values() if isinstance(value, Tensor))
        for optimizer in run.optimizers.values()
        for parameter, state in optimizer.state.items()
    }


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size() if tensor.layout == torch.strided and not is_lazy(tensor) else 0


def _listed(sizes: Counter[str], most: int | None = None) -> str:
    shown = sizes.items() if most is None else sizes.most_common(most)
    return ", ".join(f"{name} {_text(size)}" for name, size in shown if size)


def _text(size: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} bytes"
