"""The picture of ``lw.Doctor``: outputs of layers as histograms over time, and curves of all else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loopwright.callbacks.diagnosis import DEAD, SATURATED, UPDATE
from loopwright.errors import SettingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from loopwright.callbacks.doctor import Doctor

__all__ = ["draw"]

_ROWS = 8  # layers whose histograms are drawn


def draw(doctor: Doctor, path: str | Path | None) -> Figure:
    """One figure: a column of histograms, as "colourful dimension" charts, and a column of curves."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SettingError("Doctor.plot needs matplotlib: pip install 'loopwright[plot]'") from error

    shown = _chosen(doctor)
    figure = Figure(figsize=(14, max(9.0, 1.5 * len(shown) + 1)), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    left, right = halves
    left.suptitle("outputs: values (up and down) over steps, bright where many", fontsize=11)
    charts = left.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, i in zip(charts, shown, strict=True):
        _histogram(axes, doctor, i)
    charts[-1].set_xlabel("step")
    curves = right.subplots(4, 1, sharex=True)
    _curves(curves, doctor)
    curves[-1].set_xlabel("step")
    figure.suptitle(_headline(doctor), fontsize=11, ha="left", x=0.01)
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


def _headline(doctor: Doctor) -> str:
    """The first findings, each up to the end of its first sentence."""
    found = [one.partition(". ")[0] for one in doctor.findings]
    more = f"\nand {len(found) - 3} more" if len(found) > 3 else ""
    head = f"step {doctor.steps[-1]:,}: {'no finding' if not found else ''}"
    return head + "\n".join(["", *found[:3]] if found else []) + more


def _chosen(doctor: Doctor) -> list[int]:
    """Layers that were called, at most so many, from the first to the last."""
    called = [i for i in range(len(doctor.layers)) if doctor.histograms[:, i].any()]
    return [called[round(i)] for i in np.linspace(0, len(called) - 1, min(_ROWS, len(called)))]


def _histogram(axes: Axes, doctor: Doctor, i: int) -> None:
    from loopwright.callbacks.doctor import BINS

    counts, steps = doctor.histograms[:, i].T, doctor.steps
    share = counts / np.maximum(1, counts.sum(axis=0))
    gap = steps[1] - steps[0] if len(steps) > 1 else 1
    extent = (steps[0] - gap / 2, steps[-1] + gap / 2, 0, len(share))
    axes.imshow(np.sqrt(share), origin="lower", aspect="auto", extent=extent, cmap="magma", interpolation="nearest")
    wanted = [-100.0, -1.0, 0.0, 1.0, 100.0]
    axes.set_yticks([float(np.interp(value, BINS, np.arange(len(BINS)))) for value in wanted])
    axes.set_yticklabels([f"{value:g}" for value in wanted], fontsize=8)
    axes.set_title(f"{doctor.layers[i]} ({doctor.kinds[i]})", fontsize=9, loc="left", pad=2)


def _curves(charts: Any, doctor: Doctor) -> None:
    spread, idle, gradients, updates = charts
    outputs, weights = doctor.activations, doctor.weights
    matrices = [i for i, parameter in enumerate(doctor._own) if parameter.dim() > 1]
    _lines(spread, doctor, {doctor.layers[i]: outputs[:, i, 1] for i in range(len(doctor.layers))}, log=True)
    spread.set_title("standard deviation of outputs", fontsize=10, loc="left")
    shares = {f"{n}, dead": outputs[:, i, 4] for i, n in enumerate(doctor.layers)}
    shares |= {f"{n}, saturated": outputs[:, i, 3] for i, n in enumerate(doctor.layers)}
    _lines(idle, doctor, shares, log=False)
    idle.axhline(DEAD, color="0.4", linewidth=0.8, linestyle=":")
    idle.axhline(SATURATED, color="0.4", linewidth=0.8, linestyle=":")
    idle.set_ylim(-0.03, 1.03)
    idle.set_title("share of dead units and of saturated outputs (dotted: too much)", fontsize=10, loc="left")
    _lines(gradients, doctor, {doctor.parameters[i]: weights[:, i, 0] for i in matrices}, log=True)
    gradients.set_title("norm of the gradient of each weight", fontsize=10, loc="left")
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = {doctor.parameters[i]: weights[:, i, 3] / weights[:, i, 2] for i in matrices}
    _lines(updates, doctor, ratio, log=True)
    updates.axhline(UPDATE, color="0.4", linewidth=0.8, linestyle=":")
    title = f"norm of the update over that of the weight (dotted: the usual {UPDATE:.0e})"
    updates.set_title(title, fontsize=10, loc="left")


def _lines(axes: Axes, doctor: Doctor, series: dict[str, NDArray[Any]], *, log: bool) -> None:
    """A line for each, dark for the first layers to bright for the last; what is nowhere a number is left out."""
    from matplotlib import colormaps

    kept = {name: values for name, values in series.items() if np.isfinite(values).any()}
    colors = colormaps["viridis"](np.linspace(0, 0.92, max(1, len(kept))))
    for (name, values), color in zip(kept.items(), colors, strict=True):
        drawn = np.where(values > 0, values, np.nan) if log else values
        axes.plot(doctor.steps, drawn, color=color, label=name, linewidth=1.4, marker="." if len(values) < 3 else None)
    if log and any((values > 0).any() for values in kept.values()):
        axes.set_yscale("log")
    if kept and len(kept) <= 12:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.grid(alpha=0.25)
