"""Floating point operations: torch's counter, with formulas for what it does not know, and what nobody has counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Operations"]

_PRODUCTS = {  # words in the names of what takes operations
    "addbmm", "addmm", "addmv", "addr", "attention", "baddbmm", "bmm", "conv", "convolution", "dot", "gru", "linear",
    "lstm", "matmul", "mm", "mv", "rnn", "trilinear", "vdot",
}  # fmt: skip
_KNOWN = ("aten", "prim", "prims", "profiler", "c10d", "_c10d_functional", "rngprims", "inductor", "debugprims")


class Operations:
    """Counts the operations of what is run inside, as ``torch.utils.flop_counter`` does, and of what that leaves out.

    Two for each multiplication and addition of matrix products, convolutions, attention and recurrent layers.
    ``left_out`` names what was run and has no formula: more matrix products, and operations that torch does not have.

    >>> with Operations() as count:
    ...     out = torch.nn.LSTM(8, 16)(torch.zeros(5, 2, 8))
    >>> count.total, count.left_out
    (30720, [])
    """

    def __init__(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode  # imports half of torch

        formulas = _formulas()
        self._counter: Any = FlopCounterMode(display=False, custom_mapping=formulas)
        self._seen: Any = _Seen()
        self._has_formula = {*self._counter.flop_registry}

    def __enter__(self) -> Operations:
        self._seen.__enter__()  # below the counter, which takes operations apart where it can
        self._counter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._counter.__exit__(*error)
        self._seen.__exit__(*error)

    @property
    def total(self) -> int:
        return int(self._counter.get_total_flops())

    def by_module(self) -> dict[str, int]:
        """Those of each module, by its path, which begins with the class of the outermost one."""
        return {path: sum(counts.values()) for path, counts in self._counter.get_flop_counts().items()}

    @property
    def left_out(self) -> list[str]:
        return sorted(str(one) for one in self._seen.found - self._has_formula if _counts(one))


class _Seen(TorchDispatchMode):
    """Notes what is run."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.add(getattr(func, "overloadpacket", func))
        return func(*args, **(kwargs or {}))


def _counts(operation: Any) -> bool:
    space, _, name = str(operation).partition(".")
    return space not in _KNOWN or ("cell" not in name and bool(_PRODUCTS & {*name.split("_")}))


def _formulas() -> dict[Any, Callable[..., int]]:
    """Of what torch's counter lets pass for nothing, as of torch 2.13: what the CPU fuses, and recurrent layers."""
    aten = torch.ops.aten
    given: dict[str, Callable[..., int]] = {
        "mkldnn_rnn_layer": _one_rnn_layer,
        "mkldnn_rnn_layer_backward": lambda *args, **kwargs: 2 * _one_rnn_layer(*args, **kwargs),
        "_cudnn_rnn": _rnn,
        "_cudnn_rnn_backward": _rnn_backward,
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
        "_native_multi_head_attention": _multi_head,
        "_transformer_encoder_layer_fwd": _encoder_layer,
        "mv": lambda matrix, vector, **_: 2 * matrix.numel(),
        "addmv": lambda base, matrix, vector, **_: 2 * matrix.numel(),
        "dot": lambda one, other, **_: 2 * one.numel(),
    }
    found = {}
    for name, formula in given.items():
        if (packet := getattr(aten, name, None)) is not None:
            raw: Any = formula
            raw._get_raw = True  # is passed tensors, since those of nested ones have no shape
            found[packet] = raw
    return found


def _one_rnn_layer(data: Tensor, of_input: Tensor, of_state: Tensor, *args: Any, **kwargs: Any) -> int:
    """A direction of a layer: every step of every sequence is multiplied with both of its weights."""
    return 2 * prod(data.shape[:2]) * (of_input.numel() + of_state.numel())


def _rnn(data: Tensor, weights: Sequence[Tensor], *args: Any, **kwargs: Any) -> int:
    """All layers at once: [steps, sequences, values], or [values of all steps, values] where they are packed."""
    return 2 * prod(data.shape[:-1]) * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _rnn_backward(data: Tensor, weights: Sequence[Tensor], *args: Any, **kwargs: Any) -> int:
    """The gradient of the input, and that of the weights where it is asked for: the last of four flags, at the end."""
    return _rnn(data, weights) * (1 + bool(args[-1][3]))


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """Scores, and the values that they weigh."""
    *batch, length, size = query.shape
    return 2 * prod(batch) * length * key.shape[-2] * (size + value.shape[-1])


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """Five products, as the scores are made anew: torch counts its other kernels so as well."""
    *batch, length, size = query.shape
    return 2 * prod(batch) * length * key.shape[-2] * (3 * size + 2 * value.shape[-1])


def _multi_head(query: Tensor, key: Tensor, value: Tensor, size: int, *args: Any, **kwargs: Any) -> int:
    """Three projections, the attention, and a projection of what comes out."""
    asked, held = _lengths(query), _lengths(key)
    return 4 * size * (size * (sum(asked) + sum(held)) + sum(n * m for n, m in zip(asked, held, strict=True)))


def _encoder_layer(data: Tensor, size: int, heads: int, *args: Any, **kwargs: Any) -> int:
    """The attention, and the weights of the two layers after it."""
    hidden: int = args[11].numel() + args[13].numel()
    return _multi_head(data, data, data, size) + 2 * sum(_lengths(data)) * hidden


def _lengths(data: Tensor) -> list[int]:
    """Of the sequences of a batch, which may be a nested tensor."""
    return [len(one) for one in data.unbind()] if data.is_nested else [data.shape[1]] * data.shape[0]
