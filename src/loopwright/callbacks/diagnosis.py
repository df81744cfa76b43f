"""What the numbers of a model in training say about it: the rules of ``lw.Doctor``, each with its source.

A rule looks at the last quarter of the records, and at the median over them: what passes is no finding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["diagnose"]

Array = NDArray[Any]

DEAD = 0.4  # of the units of a ReLU: "as much as 40 % can be dead", CS231n, Neural Networks Part 1
SATURATED = 0.5  # of the values of a Tanh or Sigmoid: Glorot & Bengio 2010 watched layers saturate one by one
UPDATE = 1e-3  # of the weights in a step: CS231n, Neural Networks Part 3; ten times more or a hundred less is told
TOO_FAST, TOO_SLOW = 10.0, 0.01
VANISHED = 1e-3  # of the last layer's gradient, root mean square, at the first: Pascanu et al. 2013 for the two effects
GROWN = 100.0  # times the first gradient


def diagnose(
    layers: Sequence[str], kinds: Sequence[str], outputs: Array, parameters: Sequence[str], dims: Sequence[int],
    weights: Array,
) -> list[str]:  # fmt: skip
    """Sentences about what is wrong, the gravest first.

    ``outputs`` is (records, layers, 5): mean, std, share of 0, of saturated values, of dead units. ``weights`` is
    (records, parameters, 4): norm of the gradient, share of it that is 0, norm, norm of the update. NaN where a layer
    was not called, or a parameter not trained.

    >>> outputs = np.array([[[0.1, 0.2, 0.9, np.nan, 0.75]]])
    >>> diagnose(["act"], ["ReLU"], outputs, [], [], np.zeros((1, 0, 4)))[0].partition(":")[0]
    'act (ReLU)'
    """
    last = max(1, len(outputs) // 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing are NaN, and compare as False
        now, moved = np.nanmedian(outputs[-last:], axis=0), np.nanmedian(weights[-last:], axis=0)
        names = [f"{name} ({kind})" for name, kind in zip(layers, kinds, strict=True)]
        return [
            *_infinite(names, outputs[-last:]),
            *_without_gradient(parameters, weights),
            *_dead(names, now),
            *_saturated(names, now),
            *_vanishing(parameters, dims, moved),
            *_growing(weights),
            *_updates(parameters, dims, moved),
        ]


def _infinite(names: list[str], outputs: Array) -> Iterator[str]:
    """A mean that is NaN or infinite where the zeros could be counted."""
    called = np.isfinite(outputs[..., 2])
    bad = (called & ~np.isfinite(outputs[..., 0])).any(axis=0)
    if bad.any():
        yield (
            f"{_listed(names, bad)}: outputs that are not finite. Trainer(debug=lw.Debug(anomaly=True)) names where "
            "they begin"
        )


def _without_gradient(parameters: Sequence[str], weights: Array) -> Iterator[str]:
    trained = np.isfinite(weights[..., 2]).any(axis=0)
    gradients = np.nan_to_num(weights[..., 0], nan=0.0, posinf=1.0)
    none = trained & (gradients == 0).all(axis=0)
    ended = trained & ~none & (gradients[-max(1, len(gradients) // 4) :] == 0).all(axis=0)
    if ended.any():
        yield (
            f"{_listed(parameters, ended)}: no gradient any more, after there was one. What follows gives 0 for "
            "everything, or is saturated: see there"
        )
    if none.any():
        yield (
            f"{_listed(parameters, none)}: no gradient at any look. The loss does not depend on it: it is not used, is "
            "behind a .detach() or no_grad, or all that follows is 0. Mend that, or freeze it: requires_grad_(False)"
        )


def _dead(names: list[str], now: Array) -> Iterator[str]:
    for name, share in zip(names, now[:, 4], strict=True):
        if share > DEAD:
            yield (
                f"{name}: {share:.0%} of its units are 0 for every sample of the batch, and learn nothing more. Lower "
                "the learning rate, initialise with kaiming_normal_, put a norm before it, or use LeakyReLU "
                f"(above {DEAD:.0%}; CS231n, Neural Networks Part 1; Lu et al. 2019, arXiv:1903.06733)"
            )


def _saturated(names: list[str], now: Array) -> Iterator[str]:
    for name, share in zip(names, now[:, 3], strict=True):
        if share > SATURATED:
            yield (
                f"{name}: {share:.0%} of its outputs are saturated, where the gradient is next to 0. Make the weights "
                "before it smaller (xavier_normal_), put a norm before it, or lower the learning rate "
                f"(above {SATURATED:.0%}; Glorot & Bengio 2010, AISTATS)"
            )


def _vanishing(parameters: Sequence[str], dims: Sequence[int], moved: Array) -> Iterator[str]:
    """From the last weight to the first: gradients relative to the weights, so that sizes do not matter."""
    matrices = [i for i, dim in enumerate(dims) if dim > 1 and moved[i, 0] > 0 and moved[i, 2] > 0]
    if len(matrices) < 2:
        return
    relative = moved[matrices, 0] / moved[matrices, 2]
    first, last = parameters[matrices[0]], parameters[matrices[-1]]
    ratio = relative[0] / relative[-1]
    if ratio < VANISHED:
        yield (
            f"gradients vanish on the way back: relative to the weights {first} gets {ratio:.1e} of what {last} gets. "
            "Add skip connections or norms, or another initialisation and activation "
            f"(below {VANISHED:.0e}; Pascanu et al. 2013, arXiv:1211.5063)"
        )
    elif ratio > 1 / VANISHED:
        yield (
            f"gradients explode on the way back: relative to the weights {first} gets {ratio:.1e} times what {last} "
            f"gets. Clip them, Trainer(clip_norm=1.0), or add norms (above {1 / VANISHED:.0e}; Pascanu et al. 2013, "
            "arXiv:1211.5063)"
        )


def _growing(weights: Array) -> Iterator[str]:
    totals = np.sqrt(np.nansum(weights[..., 0] ** 2, axis=1))
    totals = totals[np.isfinite(totals) & (totals > 0)]
    if len(totals) > 3 and np.median(totals[-max(1, len(totals) // 4) :]) > GROWN * totals[0]:
        yield (
            f"the norm of all gradients has grown from {totals[0]:.2g} to {totals[-1]:.2g}: training diverges. Lower "
            f"the learning rate, or clip, Trainer(clip_norm=1.0) (more than {GROWN:g} times; Pascanu et al. 2013, "
            "arXiv:1211.5063)"
        )


def _updates(parameters: Sequence[str], dims: Sequence[int], moved: Array) -> Iterator[str]:
    """Half of the matrices must be beyond: one alone, such as a small last layer, often is."""
    if not any(dim > 1 for dim in dims):
        return
    matrices = np.array([dim > 1 for dim in dims]) & (moved[:, 2] > 0) & (moved[:, 0] > 0)
    ratio = np.where(matrices, moved[:, 3] / moved[:, 2], np.nan)
    middle, usual = np.nanmedian(ratio), f"than the usual {UPDATE:.0e}"
    if middle > UPDATE * TOO_FAST:
        yield (
            f"{_listed(parameters, ratio > UPDATE * TOO_FAST)}: a step moves the weights by {middle:.1e} of their norm "
            f"(median), far more {usual}. Lower the learning rate (CS231n, Neural Networks Part 3)"
        )
    elif middle < UPDATE * TOO_SLOW:
        yield (
            f"{_listed(parameters, ratio < UPDATE * TOO_SLOW)}: a step moves the weights by {middle:.1e} of their norm "
            f"(median), far less {usual}. Raise the learning rate (CS231n, Neural Networks Part 3)"
        )


def _listed(names: Sequence[str], chosen: Any) -> str:
    found = [name for name, one in zip(names, chosen, strict=True) if one]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
