"""Arithmetic on metrics: ``2 * p * r / (p + r)`` is a metric, and each of its parts is updated once."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from loopwright.errors import CheckpointError, MetricError, SettingError, choose, name_nearest
from loopwright.metrics.memory import remember, restore
from loopwright.written import warn

__all__ = ["Algebra", "Derived", "inputs_of", "is_metric", "leaves"]

INPUTS = ("preds", "target")  # what a metric without ``inputs`` reads


class Algebra:
    """Operators, indexing, ``mean`` and every torch function build a ``Derived`` of the metric.

    ``==`` stays what it is for objects: write ``torch.eq(a, b)`` to compare values.

    >>> from loopwright.metrics import Mean
    >>> loss = Mean("loss")
    >>> perplexity = torch.exp(loss)
    >>> perplexity.update(torch.tensor([0.0, 2.0]))
    >>> round(perplexity.compute(), 4)
    2.7183
    """

    __array_ufunc__: ClassVar[None] = None  # numpy leaves ``array * metric`` to the metric
    __iter__: ClassVar[None] = None  # indexing alone would make it endlessly iterable
    __contains__: ClassVar[None] = None
    _said_nothing = False

    def __init_subclass__(cls, **settings: Any) -> None:
        """An unknown argument of a metric is an error that names the nearest, as everywhere."""
        super().__init_subclass__(**settings)
        if "__init__" in vars(cls) and not hasattr(cls.__init__, "__wrapped__"):
            name_nearest(cls)

    def _nothing(self) -> float:
        """nan, the value where nothing was taken in; a warning says so, once."""
        if not self._said_nothing:
            self._said_nothing = True
            warn(f"{type(self).__name__} was given no sample (none came, or a filter left none): it is nan")
        return math.nan

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Derived:
        return Derived(function, *args, **(kwargs or {}))

    def mean(self) -> Derived:
        """The mean over the elements of the value."""
        return Derived(_mean, self)

    def __getitem__(self, key: Any) -> Derived:
        return Derived(_item, self, key, getattr(self, "keys", None))

    def __add__(self, other: Any) -> Derived:
        return Derived(operator.add, self, other)

    def __radd__(self, other: Any) -> Derived:
        return Derived(operator.add, other, self)

    def __sub__(self, other: Any) -> Derived:
        return Derived(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Derived:
        return Derived(operator.sub, other, self)

    def __mul__(self, other: Any) -> Derived:
        return Derived(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Derived:
        return Derived(operator.mul, other, self)

    def __truediv__(self, other: Any) -> Derived:
        return Derived(operator.truediv, self, other)

    def __rtruediv__(self, other: Any) -> Derived:
        return Derived(operator.truediv, other, self)

    def __floordiv__(self, other: Any) -> Derived:
        return Derived(operator.floordiv, self, other)

    def __mod__(self, other: Any) -> Derived:
        return Derived(operator.mod, self, other)

    def __pow__(self, other: Any) -> Derived:
        return Derived(operator.pow, self, other)

    def __rpow__(self, other: Any) -> Derived:
        return Derived(operator.pow, other, self)

    def __matmul__(self, other: Any) -> Derived:
        return Derived(operator.matmul, self, other)

    def __neg__(self) -> Derived:
        return Derived(operator.neg, self)

    def __abs__(self) -> Derived:
        return Derived(operator.abs, self)

    def __lt__(self, other: Any) -> Derived:
        return Derived(operator.lt, self, other)

    def __le__(self, other: Any) -> Derived:
        return Derived(operator.le, self, other)

    def __gt__(self, other: Any) -> Derived:
        return Derived(operator.gt, self, other)

    def __ge__(self, other: Any) -> Derived:
        return Derived(operator.ge, self, other)


_ELEMENTWISE = (
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow,
    operator.neg, operator.abs, operator.lt, operator.le, operator.gt, operator.ge,
)  # fmt: skip


class Derived(Algebra):
    """``function`` of the values of metrics among ``args`` and ``kwargs``, at any depth of lists, tuples and dicts.

    Values reach the function as float64 tensors on the CPU. The result is a float, or a tensor where it has several
    elements. Each metric is updated once a batch however often it occurs; in a dict of ``metrics=`` that also holds for
    equal built-in ones of different entries. By hand, ``update`` takes the ``inputs``: the names that the parts read.

    >>> from loopwright.metrics import MAE, MSE
    >>> relative = Derived(lambda a, b: a / b.sqrt(), MAE(), MSE())
    >>> relative.update(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]))
    >>> round(relative.compute(), 4)
    0.8944
    """

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if not callable(function):
            raise SettingError(
                f"Derived({function!r}, ...): expected a function of values, and metrics to take them of"
            )
        self.function, self.args, self.kwargs = function, args, kwargs
        found = {id(leaf): leaf for part in _metrics((args, kwargs)) for leaf in leaves(part)}
        self._leaves = list(found.values())
        if not found:
            raise SettingError("Derived(function, ...) has no metric among its arguments: pass those to compute it of")

    @property
    def keys(self) -> tuple[str, ...] | None:
        """Those of the parts, in arithmetic on values of the same keys and on numbers; () of a mean; else None."""
        if self.function is _mean:
            return ()
        plain = all(isinstance(arg, (int, float)) or is_metric(arg) for arg in self.args)
        if not plain or self.function not in _ELEMENTWISE:
            return None
        found = {getattr(part, "keys", None) for part in _metrics(self.args)} - {()}
        return found.pop() if len(found) == 1 else None if found else ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names in a step's output that its parts read, each once."""
        return tuple(dict.fromkeys(name for leaf in leaves(self) for name in inputs_of(leaf)))

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take in one batch: what ``inputs`` names, in order or by name."""
        if len(self._leaves) == 1 and not kwargs:
            self._leaves[0].update(*args)
            return
        given = dict(zip(self.inputs, args, strict=False)) | kwargs
        if len(args) > len(self.inputs) or given.keys() != set(self.inputs):
            raise MetricError(
                f"this metric reads {', '.join(self.inputs)}; got {len(args)} values"
                f"{''.join(f', {name}=' for name in kwargs)}. Call update({', '.join(self.inputs)})"
            )
        for leaf in leaves(self):
            leaf.update(*(given[name] for name in inputs_of(leaf)))

    def compute(self) -> Any:
        """The function of the values of the parts: a float, or a tensor of several elements."""
        value = self._value({})
        return float(value) if isinstance(value, Tensor) and value.ndim == 0 else value

    def combine(self, *args: Any, **kwargs: Any) -> Any:
        """The value, given those of the parts."""
        return self.function(*args, **kwargs)

    def _value(self, known: dict[int, Any]) -> Any:
        def value_of(part: Any) -> Any:
            if id(part) not in known:
                known[id(part)] = part._value(known) if isinstance(part, Derived) else _wide(part.compute())
            return known[id(part)]

        return self.combine(*_mapped(self.args, value_of), **_mapped(self.kwargs, value_of))

    def reset(self) -> None:
        """Forget all that the parts have taken in."""
        for leaf in leaves(self):
            leaf.reset()

    def merge(self, other: Derived) -> None:
        """Add what the parts of ``other`` have taken in; raises MetricError if it is built otherwise."""
        mine, theirs = leaves(self), leaves(other)
        if len(mine) != len(theirs) or not all(hasattr(leaf, "merge") for leaf in mine):
            raise MetricError("cannot merge: both must be built of the same metrics, each of which has merge(other)")
        for leaf, its in zip(mine, theirs, strict=True):
            leaf.merge(its)

    def state_dict(self) -> dict[str, Any]:
        """What each part has taken in, by its number."""
        return {str(i): remember(leaf) for i, leaf in enumerate(leaves(self))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave. Raises CheckpointError if it is that of other parts."""
        mine = leaves(self)
        if state.keys() != {str(i) for i in range(len(mine))}:
            raise CheckpointError(
                f"the saved metric has {len(state)} parts, this one has {len(mine)}. Resume with the metrics that the "
                "run was started with"
            )
        for i, leaf in enumerate(mine):
            if state[str(i)] is not None:
                restore(leaf, state[str(i)])

    def __bool__(self) -> bool:
        raise MetricError("a comparison of metrics has no truth value before it is computed: compare .compute()")


def leaves(metric: Any) -> list[Any]:
    """The metrics that ``metric`` is computed of, each once; itself unless it is a ``Derived``.

    >>> from loopwright.metrics import MSE
    >>> mse = MSE()
    >>> leaves(mse / (mse + 1)) == [mse]
    True
    """
    return metric._leaves if isinstance(metric, Derived) else [metric]


def inputs_of(metric: Any) -> Any:
    """The names in a step's output that ``metric`` reads.

    >>> inputs_of(object())
    ('preds', 'target')
    """
    return getattr(metric, "inputs", INPUTS)


def is_metric(thing: Any) -> bool:
    """True for an object with ``update``, ``compute`` and ``reset``."""
    return not isinstance(thing, type) and all(
        callable(getattr(thing, name, None)) for name in ("update", "compute", "reset")
    )


def _metrics(tree: Any) -> Iterator[Any]:
    if type(tree) in (list, tuple):
        for item in tree:
            yield from _metrics(item)
    elif type(tree) is dict:
        yield from _metrics(list(tree.values()))
    elif is_metric(tree):
        yield tree


def _mapped(tree: Any, value_of: Callable[[Any], Any]) -> Any:
    if type(tree) in (list, tuple):
        return type(tree)(_mapped(item, value_of) for item in tree)
    if type(tree) is dict:
        return {key: _mapped(item, value_of) for key, item in tree.items()}
    if is_metric(tree):
        return value_of(tree)
    return _wide(tree) if isinstance(tree, np.ndarray) else tree


def _wide(value: Any) -> Any:
    """What a part computed as float64 tensors on the CPU, so that 0/0 is nan and no digit is lost."""
    if isinstance(value, Mapping):
        return {key: _wide(item) for key, item in value.items()}
    if isinstance(value, (bool, int, float, np.ndarray, np.generic, Tensor)):
        value = torch.as_tensor(value).detach().cpu()
        return value if value.is_complex() else value.double()
    return value


def _mean(value: Any) -> Any:
    return value.double().mean()


def _item(value: Any, key: Any, names: Any = None) -> Any:
    """``value[key]``, where a vector may be asked by the ``names`` under which its elements are recorded."""
    if isinstance(key, str) and isinstance(value, Tensor):
        if not isinstance(names, tuple) or value.numel() != len(names):
            found = f"{list(value.shape)} values, which have no names: take a number, such as [0]"
            one = "a single number. Of each class there is one with average=None"
            raise MetricError(f"[{key!r}] of a metric that computed {found if value.ndim else one}")
        value = dict(zip(names, value.flatten(), strict=True))
    if isinstance(value, Mapping) and key not in value:
        raise MetricError(f"the metric computed no {key!r}. {choose(key, value)}")
    try:
        return value[key]
    except IndexError as error:
        raise MetricError(f"[{key!r}] of a metric that computed {list(value.shape)} values: {error}") from None
