"""Memory: the most that was taken, and what to say when it runs out in a step, the cheapest remedy first."""

from __future__ import annotations

import re
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from loopwright.events import describe
from loopwright.state import Run

__all__ = ["add_memory", "is_out_of_memory", "peak_memory"]

# the CPU allocator, and allocators of devices that raise no class of their own
_TEXT = re.compile(r"can't allocate memory|not enough memory|out of memory", re.I)
_SHOWN = 5


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
    """Bytes of parameters, gradients and optimizer states, also by module, and what to do about it.

    What a forward keeps for its backward is not counted by torch per module; on an accelerator it is the difference
    between the peak and what is listed.
    """
    parts: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    state_of = _state_bytes(run)
    for model_name, model in run.models.items():
        for name, parameter in model.named_parameters():
            grad = _bytes(parameter.grad) if parameter.grad is not None else 0
            own, state = _bytes(parameter), state_of.get(id(parameter), 0)
            parts.update({"parameters": own, "gradients": grad, "optimizer states": state})
            modules[name.rpartition(".")[0] or model_name] += own + grad + state
        parts["buffers"] += sum(_bytes(buffer) for buffer in model.buffers())
    held = ", ".join(f"{name} {_text(size)}" for name, size in parts.items() if size)
    largest = ", ".join(f"{name} {_text(size)}" for name, size in modules.most_common(_SHOWN) if size)
    lines = [f"{_BEGIN}. Held: {held or 'nothing'}; most of it by {largest or 'no module'}"]
    if run.device.type == "cuda" and torch.cuda.is_initialized():
        now, peak = torch.cuda.memory_allocated(run.device), torch.cuda.max_memory_allocated(run.device)
        lines[0] += f"; allocated {_text(now)}, at the peak {_text(peak)}, the rest of which is what forwards keep"
    if batch is not None:
        lines[0] += f"; batch: {describe(batch)}"
    lines.append("Make it smaller, in this order: " + "; ".join(_advice(run)))
    return "\n".join(lines)


def _advice(run: Run) -> list[str]:
    n = run.stage.accumulate if run.stage is not None else 1
    n = n if isinstance(n, int) else 1
    advice = [
        f"half the batch_size with Trainer(accumulate={2 * n}), which trains by the same gradients (batch norm sees "
        "the smaller batches)"
    ]
    if run.precision.name == "fp32":
        advice.append('Trainer(precision="bf16"), which halves what forwards keep and changes bits')
    advice.append('lw.checkpoint_activations(model, "blocks.*") on the largest blocks, which computes them twice')
    return advice


def _state_bytes(run: Run) -> dict[int, int]:
    """Bytes that the optimizers keep, by the id of the parameter."""
    return {
        id(parameter): sum(_bytes(value) for value in state.values() if isinstance(value, Tensor))
        for optimizer in run.optimizers.values()
        for parameter, state in optimizer.state.items()
    }


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size() if tensor.layout == torch.strided else 0


def _text(size: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} bytes"
