"""A function of all predictions and targets as a metric: one's own, or one of scikit-learn or torchmetrics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopwright.errors import MetricError, SettingError
from loopwright.events import describe
from loopwright.given import not_callable_with
from loopwright.metrics.base import Metric
from loopwright.metrics.trial import check_applies

__all__ = ["Function"]

_SCORES = ("y_score", "y_scores", "y_prob", "y_proba")  # how scikit-learn calls what is no class


class Function(Metric):
    """``function`` of everything that was taken in: it is called once, in ``compute``, on whole tensors.

    It returns a number, a vector, or a dict of such. ``inputs`` names what it is given, in order. Who calls it so is
    told by the names of its parameters: ``f(y_true, y_pred)`` or ``f(y_true, y_score)``, as in scikit-learn, gets numpy
    arrays, the target first, and classes or probabilities as it asks for; ``f(estimator, X, y)``, a scorer, an
    estimator that answers with the predictions; ``f(preds, target, task)``, as in ``torchmetrics.functional``, the task
    that the shapes tell. Anything else gets tensors in the order of ``inputs``. Scores outside of [0, 1] are logits,
    of which softmax or sigmoid makes probabilities where those are asked for.

    One of scikit-learn or torchmetrics that is not for such predictions at all (f1 of several classes) is refused at
    the first batch, with those that are.

    All inputs are kept, on their device, until the reset: memory grows with the data, and the value is the same over
    any number of ranks. Nothing taken in gives nan.

    >>> worst = Function(lambda preds, target: (preds - target).abs().max())
    >>> worst.update(torch.tensor([1.0, 4.0]), torch.tensor([0.0, 2.0]))
    >>> worst.update(torch.tensor([1.0]), torch.tensor([0.0]))
    >>> float(worst.compute())
    2.0
    """

    def __init__(self, function: Callable[..., Any], *inputs: str) -> None:
        if not callable(function) or isinstance(function, type):
            raise SettingError(f"Function({function!r}): expected a function such as f(preds, target)")
        self.function = function
        self.inputs = inputs or ("preds", "target")
        self.state = {str(i): "cat" for i in range(len(self.inputs))}  # type: ignore[misc]
        self._call = _convention(function, len(self.inputs))
        if self._call is _plainly and (why := not_callable_with(function, *self.inputs)) is not None:
            raise SettingError(
                f"Function({_name(function)}): {why}. Write: def {_name(function)}({', '.join(self.inputs)}): ..."
            )
        self._tried = self._call is _plainly

    def update(self, *args: Any) -> None:
        """Take in one batch. Raises MetricError at the first one, if the function is not for such predictions."""
        if not self._tried and all(isinstance(value, Tensor) for value in args):
            self._tried = True
            check_applies(self.function, self._call, *args, as_scorer=_as_scorer)
        for i, (name, value) in enumerate(zip(self.inputs, args, strict=True)):
            if not isinstance(value, Tensor):
                try:
                    value = torch.as_tensor(value)
                except (TypeError, ValueError, RuntimeError):
                    raise MetricError(
                        f"{_name(self.function)} is given {name}: {describe(value)}; only tensors, arrays and numbers "
                        "are kept. Return it as a tensor"
                    ) from None
            kept = self._totals.get(str(i))
            if kept and kept[0].shape[1:] != value.shape[1:] and kept[0].numel() and value.numel():
                raise MetricError(
                    f"{_name(self.function)} is given {name}: {describe(value)}, and {describe(kept[0])} before: all "
                    "are joined along dimension 0 for one call. Where texts are padded to another length each time, "
                    "let the step return rows without padding, preds[target != pad] and target[target != pad], or "
                    "write an lw.metrics.Metric that adds up totals"
                )
            self.add(**{str(i): value})

    def compute(self) -> Any:
        """The function's value."""
        values = [self.total(name) for name in self.state]
        if not any(len(value) for value in values):
            return self._nothing()
        try:
            return self._call(self.function, *values)
        except ValueError as error:
            if not isinstance(error, MetricError) and len(values) == 2:
                for cause in _causes(*values):
                    error.add_note(f"[loopwright] a cause may be that {cause}")
            raise


def _causes(preds: Tensor, target: Tensor) -> Iterator[str]:
    """What about the data makes functions fail that are for such predictions, with what to do."""
    if target.is_floating_point() and not bool(target.isfinite().all()):
        rows = int((~target.isfinite()).reshape(len(target), -1).any(1).sum())
        yield (
            f"the targets are NaN or infinite in {rows} of {len(target)} samples: look at the data, or leave these "
            "samples out with lw.metrics.Where(metric, lambda target: target.isfinite())"
        )
    if target.ndim == 1 and not target.is_floating_point() and len(target):
        found = target.unique().tolist()
        classes = preds.shape[1] if preds.ndim == 2 else 2
        if len(found) < classes:
            seen = f"one class alone, {found[0]}" if len(found) == 1 else f"{len(found)} of the {classes} classes"
            yield (
                f"the {len(target)} targets of this evaluation have {seen}; what compares classes needs all of them: "
                "give data that has them, such as lw.data.train_valid_split(data, 0.2, stratify=y)"
            )


def _name(function: Any) -> str:
    score = getattr(function, "_score_func", None)  # of a scorer of scikit-learn, which has no name itself
    return str(getattr(function, "__name__", None) or getattr(score, "__name__", None) or type(function).__name__)


def _convention(function: Callable[..., Any], inputs: int) -> Callable[..., Any]:
    """How ``function`` is called with the kept tensors, as the names of its parameters tell."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return _plainly
    names = list(parameters)
    if inputs == 2 and names[:1] == ["estimator"]:
        return _as_scorer
    if inputs == 2 and names[:1] == ["y_true"] and len(names) > 1:
        return _with_scores if names[1] in _SCORES else _with_classes
    task = parameters.get("task")
    if inputs == 2 and task is not None and task.default is inspect.Parameter.empty:
        return _with_task
    return _plainly


def _plainly(function: Callable[..., Any], *values: Tensor) -> Any:
    return function(*values)


def _with_classes(function: Callable[..., Any], preds: Tensor, target: Tensor) -> Any:
    preds, target = _samples(function, preds, target)
    return function(_array(target), _array(_classes(preds, target)))


def _with_scores(function: Callable[..., Any], preds: Tensor, target: Tensor) -> Any:
    preds, target = _samples(function, preds, target)
    return function(_array(target), _array(_probabilities(preds)))


def _with_task(function: Callable[..., Any], preds: Tensor, target: Tensor) -> Any:
    _check_nan(function, preds)
    if preds.ndim == target.ndim + 1 and preds.shape[1] == 1:
        preds = preds.squeeze(1)
    if preds.ndim == target.ndim + 1:
        settings: dict[str, Any] = {"task": "multiclass", "num_classes": preds.shape[1]}
    elif not preds.is_floating_point():
        raise MetricError(
            f"{_name(function)}: whether preds {describe(preds)} and target {describe(target)} are two classes, "
            "several or several labels does not follow from the shapes. Give scores, or a function that says it: "
            f'functools.partial({_name(function)}, task="multiclass", num_classes=10)'
        )
    else:
        settings = {"task": "binary"} if preds.ndim == 1 else {"task": "multilabel", "num_labels": preds.shape[1]}
    return function(preds, target.long() if not target.is_floating_point() else target, **settings)


def _as_scorer(function: Callable[..., Any], preds: Tensor, target: Tensor) -> Any:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin

    preds, target = _samples(function, preds, target)
    answers: dict[str, Any] = {}

    def answer(method: str, value: Any) -> None:
        def call(self: Any, X: Any) -> Any:
            return value

        call.__name__ = method  # scikit-learn asks by this name
        answers[method] = call

    answer("predict", _array(_classes(preds, target)))
    if not target.is_floating_point():
        if preds.is_floating_point():
            chances = _probabilities(preds)
            answer("predict_proba", _array(torch.stack([1 - chances, chances], 1) if preds.ndim == 1 else chances))
            answer("decision_function", _array(preds))
        highest = int(target.max()) if preds.is_floating_point() else max(int(preds.max()), int(target.max()))
        answers["classes_"] = np.arange(preds.shape[1] if preds.ndim == 2 else max(2, highest + 1))
    kind = RegressorMixin if target.is_floating_point() else ClassifierMixin
    answers["__sklearn_is_fitted__"] = lambda self: True
    estimator = type("Answers", (kind, BaseEstimator), answers)()
    return float(function(estimator, np.zeros((len(target), 1)), _array(target)))


def _samples(function: Callable[..., Any], preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [M, C] with targets [M], or one shape for both; further dimensions are samples too."""
    _check_nan(function, preds)
    if preds.ndim == target.ndim + 1 and not target.is_floating_point():
        if preds.shape[1] == 1:
            return preds.flatten(), target.flatten()
        return preds.movedim(1, -1).flatten(0, -2), target.flatten()
    if preds.shape != target.shape:
        raise MetricError(
            f"{_name(function)}: preds {describe(preds)} and target {describe(target)} do not fit: expected one shape "
            "for both, or scores [N, C, ...] with class indices [N, ...]"
        )
    return preds, target


def _check_nan(function: Callable[..., Any], preds: Tensor) -> None:
    if preds.is_floating_point() and bool(preds.isnan().any()):
        rows = int(preds.isnan().flatten(1).any(1).sum()) if preds.ndim > 1 else int(preds.isnan().sum())
        raise MetricError(
            f"{_name(function)}: preds are NaN in {rows} of {len(preds)} samples. Look for where they come from with "
            "Trainer(debug=lw.Debug(anomaly=True)), or leave these samples out with lw.metrics.Where"
        )


def _classes(preds: Tensor, target: Tensor) -> Tensor:
    """The class that the scores say, where the targets are classes."""
    if target.is_floating_point() or not preds.is_floating_point():
        return preds
    if preds.ndim == target.ndim + 1:
        return preds.argmax(1)
    return (preds > (0.5 if _are_probabilities(preds) else 0.0)).long()


def _probabilities(preds: Tensor) -> Tensor:
    preds = preds.double()
    if _are_probabilities(preds):
        return preds
    return preds.softmax(1) if preds.ndim == 2 else preds.sigmoid()


def _are_probabilities(preds: Tensor) -> bool:
    return bool(((preds >= 0) & (preds <= 1)).all())


def _array(value: Tensor) -> Any:
    value = value.detach().cpu()
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
