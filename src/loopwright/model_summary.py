"""A model in a table: what each layer gets and gives, its parameters, its FLOPs, and the memory that training takes."""

from __future__ import annotations

import copy
import html
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from loopwright import rng
from loopwright.errors import SettingError
from loopwright.events import describe
from loopwright.flops import Operations

__all__ = ["Layer", "ModelSummary", "rows_of", "summary"]


@dataclass(slots=True)
class Layer:
    """One module of the model. ``parameters`` are those in it, each counted once; ``flops`` of all its calls."""

    path: str
    kind: str
    depth: int
    inputs: str = ""
    output: str = ""
    calls: int = 0
    parameters: int = 0
    trained: int = 0
    shared: bool = False  # an earlier layer has all its parameters
    flops: int = 0


@dataclass(slots=True)
class ModelSummary:
    """What ``lw.summary`` found; ``print`` it, or let a notebook show it.

    ``memory``: bytes of "weights", "buffers", "gradients", "saved for backward" and "inputs". ``problem`` is None
    where the forward went well, else what stopped it, and where. ``not_counted``: operations of which nobody knows how
    many FLOPs they take.
    """

    layers: list[Layer] = field(default_factory=list)
    parameters: int = 0
    trained: int = 0
    flops: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    problem: str | None = None
    not_counted: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [("layer", "input", "output", "parameters", "FLOPs"), *map(_row, self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(_placed(cell, width, i) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
                 for row in rows]  # fmt: skip
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join([*(line.rstrip() for line in lines), lines[1], *self._totals()])

    __repr__ = __str__

    def _totals(self) -> Iterator[str]:
        frozen = f", of which {self.trained:,} are trained" if self.trained != self.parameters else ""
        yield f"parameters: {self.parameters:,}{frozen}"
        if self.problem is not None:
            yield f"PROBLEM: {self.problem}"
            return
        rest = f"; not counted: {', '.join(self.not_counted)}" if self.not_counted else ""
        yield f"forward: {_short(self.flops)}FLOPs (matrix products, convolutions, attention){rest}"
        yield f"memory: {', '.join(f'{name} {_short(size, 1024)}B' for name, size in self.memory.items() if size)}"

    def _repr_html_(self) -> str:
        def cells(row: tuple[str, ...], tag: str) -> str:
            texts = (html.escape(cell).replace(" ", "&nbsp;") for cell in row)
            return "".join(f'<{tag} style="text-align:{"left" if i < 3 else "right"}">{text}</{tag}>'
                           for i, text in enumerate(texts))  # fmt: skip

        head = cells(("layer", "input", "output", "parameters", "FLOPs"), "th")
        body = "".join(f"<tr>{cells(_row(layer), 'td')}</tr>" for layer in self.layers)
        totals = "<br>".join(map(html.escape, self._totals()))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{totals}</p>"


def rows_of(module: nn.Module, found: ModelSummary | None) -> tuple[list[list[str]], list[str], int]:
    """The table as its cells, the lines below it, and how many parameters there are.

    Without a summary, of which a forward is the condition: the layers and their parameters alone.

    >>> rows_of(nn.Linear(2, 1), None)
    ([['Linear', '', '', '3', '']], ['parameters: 3'], 3)
    """
    if found is not None:
        return [list(_row(layer)) for layer in found.layers], list(found._totals()), found.parameters
    rows = []
    for path, one in module.named_modules():
        name, kind = path.rpartition(".")[2], type(one).__name__
        count = sum(p.numel() for p in one.parameters() if not is_lazy(p))
        label = f"{'  ' * (path.count('.') + bool(path))}{name} {kind}" if name else kind
        rows.append([label, "", "", f"{count:,}" if count else "-", ""])
    total = sum(p.numel() for p in module.parameters() if not is_lazy(p))
    return rows, [f"parameters: {total:,}"], total


def summary(module: nn.Module, inputs: Any, *, depth: int | None = None) -> ModelSummary:
    """``module`` layer by layer, as one forward of ``inputs`` finds it.

    ``inputs`` are what the module takes: a tensor, a tuple of arguments, or a dict of keyword arguments, on the
    module's device; anything nested is passed on as it is. ``depth`` folds what lies deeper into its parents. FLOPs are
    those of the forward as ``torch.utils.flop_counter`` counts them: two for each multiplication and addition of matrix
    products, convolutions, attention and recurrent layers; none for what works element by element. What else may take
    some, such as operations of a library, is printed as not counted. Memory for the backward is what autograd really
    keeps, in eval mode; the state of an optimizer comes on top (Adam: twice the weights).

    The forward runs in eval mode with random generators forked; flags, buffers and gradients are as before. Of a lazy
    module a copy is run, and it stays lazy. Where the forward fails, the table ends there, and ``problem`` says in
    which layer, with the shapes that it was given.

    Raises SettingError for what is no module.

    >>> print(summary(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(16, 4)))
    layer       input    output   parameters   FLOPs
    ------------------------------------------------
    Sequential  [16, 4]  [16, 2]          58  1.54 k
      0 Linear  [16, 4]  [16, 8]          40  1.02 k
      1 ReLU    [16, 8]  [16, 8]           -       -
      2 Linear  [16, 8]  [16, 2]          18     512
    ------------------------------------------------
    parameters: 58
    forward: 1.54 kFLOPs (matrix products, convolutions, attention)
    memory: weights 232 B, gradients 232 B, saved for backward 512 B, inputs 256 B
    """
    if not isinstance(module, nn.Module):
        raise SettingError(f"lw.summary needs an nn.Module; got {describe(module)}")
    if depth is not None and (type(depth) is not int or depth < 1):
        raise SettingError(f"depth={depth!r}: expected a whole number from 1, or None for all layers")
    if any(map(is_lazy, module.parameters())):
        # torch has no copy of a lazy buffer: a fresh one takes its place
        fresh: Any = UninitializedBuffer
        lazy = {id(b): fresh(device=b.device, dtype=b.dtype) for b in module.buffers() if is_lazy(b)}
        module = copy.deepcopy(module, lazy)
    look = _Look(module, inputs)
    with _untouched(module), look:
        try:
            with torch.enable_grad():
                _call(module, inputs)
        except Exception as error:
            look.failed(error)
    return look.told(depth)


def _call(module: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if type(inputs) is tuple else module(inputs)


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards flags, buffers and random generators are as they were."""
    flags = [(one, one.training) for one in module.modules()]
    buffers = [(b, b.detach().clone()) for b in module.buffers() if not is_lazy(b)]
    places = [(one, dict(one._buffers)) for one in module.modules()]
    module.eval()
    try:
        with rng.forked():
            yield
    finally:
        with torch.no_grad():
            for one, kept in places:
                one._buffers.update(kept)
            for buffer, value in buffers:
                buffer.copy_(value)
        for one, training in flags:
            one.training = training


class _Look:
    """Hooks on every module, a counter of FLOPs, and what autograd keeps, during one forward."""

    def __init__(self, module: nn.Module, inputs: Any) -> None:
        self.module, self.inputs = module, inputs
        self.layers: dict[str, Layer] = {}
        self.order: list[str] = []  # as they are entered
        self.open: list[str] = []
        self.saved: dict[int, int] = {}
        self.problem: str | None = None
        self.handles: list[Any] = []
        self.paths: dict[int, str] = {id(one): path for path, one in module.named_modules()}

    def __enter__(self) -> None:
        for path, module in self.module.named_modules():
            name = path.rpartition(".")[2]
            kind = type(module).__name__
            self.layers[path] = Layer(path, f"{name} {kind}" if name else kind, path.count(".") + bool(path))
            self.handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._leave))
        given = {t.untyped_storage().data_ptr() for t in _tensors(self.inputs) if t.layout == torch.strided}

        def pack(tensor: Tensor) -> Any:
            if tensor.layout != torch.strided or isinstance(tensor, nn.Parameter):
                return
            own = {p.untyped_storage().data_ptr() for p in self.module.parameters() if not is_lazy(p)}
            if (at := tensor.untyped_storage().data_ptr()) not in own | given:
                self.saved[at] = tensor.untyped_storage().nbytes()
                self.kept.append(tensor.untyped_storage())  # or its memory, and address, would be used again

        self.kept: list[Any] = []
        self.counter = Operations()
        self.saving = torch.autograd.graph.saved_tensors_hooks(pack, _never)
        self.counter.__enter__()
        self.saving.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.saving.__exit__(*error)
        self.counter.__exit__(*error)
        while self.handles:
            self.handles.pop().remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer = self.layers[self.paths[id(module)]]
        layer.calls += 1
        layer.inputs = ", ".join([*map(_shape, args), *(f"{k}={_shape(v)}" for k, v in kwargs.items())])
        self.open.append(layer.path)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.layers[self.paths[id(module)]].output = _shape(output)
        self.open.pop()

    def failed(self, error: Exception) -> None:
        layer = self.layers[self.open[-1] if self.open else ""]
        where = f"{layer.path} ({type(self.module.get_submodule(layer.path)).__name__})" if layer.path else layer.kind
        self.problem = f"{where} raised {type(error).__name__} for {layer.inputs or 'what it was given'}: {error}"

    def told(self, depth: int | None) -> ModelSummary:
        flops = {} if self.problem else self.counter.by_module()
        root, seen = type(self.module).__name__, set[int]()
        for path, module in self.module.named_modules():
            layer = self.layers[path]
            known = [p for p in module.parameters() if not is_lazy(p)]
            layer.parameters = sum(p.numel() for p in known)
            layer.trained = sum(p.numel() for p in known if p.requires_grad)
            layer.shared = bool(known) and all(id(p) in seen for p in known)
            seen |= {id(p) for p in module.parameters(recurse=False)}
            layer.flops = flops.get(f"{root}.{path}" if path else root, 0)
        total = self.layers[""]
        sizes = {
            "weights": _bytes(self.module.parameters()), "buffers": _bytes(self.module.buffers()),
            "gradients": _bytes(p for p in self.module.parameters() if p.requires_grad),
            "saved for backward": sum(self.saved.values()), "inputs": _bytes(_tensors(self.inputs)),
        }  # fmt: skip
        shown = [layer for layer in self.layers.values() if depth is None or layer.depth <= depth]
        if self.problem:
            shown = [layer for layer in shown if layer.calls]
        count = self.counter
        return ModelSummary(shown, total.parameters, total.trained, count.total, sizes, self.problem, count.left_out)


def _never(packed: Any) -> Any:
    """There is no backward."""


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if not is_lazy(t))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _shape(value: Any) -> str:
    """Shapes of a nested value on one line."""
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_shape(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_shape, value))})"
    return "None" if value is None else type(value).__name__


def _row(layer: Layer) -> tuple[str, ...]:
    times = f" x{layer.calls}" if layer.calls > 1 else "" if layer.calls else " (not called)"
    frozen = " frozen" if layer.parameters and not layer.trained else ""
    frozen = frozen or (f" ({layer.trained:,} trained)" if layer.trained != layer.parameters else "")
    count = "shared" if layer.shared else f"{layer.parameters:,}{frozen}" if layer.parameters else "-"
    flops = _short(layer.flops).strip() if layer.flops else "-"
    return f"{'  ' * layer.depth}{layer.kind}{times}", _cut(layer.inputs), _cut(layer.output), count, flops


def _cut(text: str) -> str:
    return text if len(text) <= 28 else f"{text[:25]}..."


def _placed(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 3 else cell.rjust(width)


def _short(number: float, base: int = 1000) -> str:
    """A number with the prefix of its size.

    >>> _short(1536), _short(2048, 1024), _short(512)
    ('1.54 k', '2 k', '512 ')
    """
    for prefix in ("", "k", "M", "G", "T"):
        if number < base or prefix == "T":
            return f"{number:.3g} {prefix}"
        number /= base
    raise AssertionError
