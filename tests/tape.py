"""What a CUDA graph does, on the CPU: operations are recorded with the memory that they use, and replayed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class Tape(TorchDispatchMode):
    """Operations while it is on. Afterwards all that was there before is as it was: nothing has been done yet."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> Any:
        self.state = torch.get_rng_state()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        for spec, value in zip(func._schema.arguments, args, strict=False):
            if spec.alias_info is not None and spec.alias_info.is_write:
                self.before += [(tensor, tensor.detach().clone()) for tensor in tensors(value)]
        if "batch_norm" in func.name():  # its schema does not say that it writes into the running statistics
            self.before += [(tensor, tensor.clone()) for tensor in tensors(args[3:5])]
        out = func(*args, **kwargs)
        given = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
        made = [(i, tensor) for i, tensor in enumerate(tensors(out)) if tensor.untyped_storage()._cdata not in given]
        self.operations.append((func, args, kwargs, made))
        return out

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        with torch.no_grad():
            for tensor, value in reversed(self.before):
                tensor.copy_(value)
        self.before.clear()
        torch.set_rng_state(self.state)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.operations:
            found = tensors(func(*args, **kwargs))
            for i, tensor in made:
                tensor.copy_(found[i])


class Tapes:
    """In the place of ``CudaRecorder``."""

    def __init__(self, device: torch.device) -> None:
        self.asides = 0

    def aside(self) -> AbstractContextManager[Any]:
        self.asides += 1
        return nullcontext()

    def begin(self) -> None:
        self.tape = Tape()
        self.tape.__enter__()

    def end(self) -> Callable[[], None]:
        self.tape.__exit__(None, None, None)
        replay: Callable[[], None] = self.tape.replay
        return replay
