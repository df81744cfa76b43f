"""Losses at growing learning rates: what they suggest, and how they look."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopwright.errors import SettingError
from loopwright.notebook import sparkline, table_html

__all__ = ["LRCurve"]

_MARGIN = 5  # losses at the end, where they explode
_WINDOW, _SLOPE = 15, 0.005  # of the sliding window: its steps, and what its slopes may differ by


@dataclass(frozen=True, slots=True, repr=False)
class LRCurve:
    """What ``lr_find`` has seen: the learning rate of each step, and the loss after smoothing (and as it was, ``raw``).

    ``valley``, ``steep`` and ``slide`` are suggestions, ``plot()`` the picture. The first tenth of the losses and the
    last 5 are left out of them, as in fastai. Raises SettingError where fewer than 10 are left to judge by.

    >>> rates = [10 ** (k / 10 - 5) for k in range(50)]
    >>> curve = LRCurve(rates, [1 / (1 + (rate / 1e-3) ** 2) + rate for rate in rates])
    >>> curve
    LRCurve(valley 5.0e-04, steep 1.0e-03, slide 1.6e-04; 50 steps, lr 1.0e-05 to 7.9e-01)
    """

    lrs: list[float]
    losses: list[float]
    raw: list[float] = field(default_factory=list)

    def __repr__(self) -> str:
        try:
            told = ", ".join(f"{name} {lr:.1e}" for name, lr in self.suggestions.items())
        except SettingError:
            why = "too few losses to judge by" if self.losses else "the first loss is not finite"
            told = f"no suggestion: {why}"
        return f"LRCurve({told}; {self._tried()})"

    def _tried(self) -> str:
        n = len(self.lrs)
        return f"{n} step{'s' * (n != 1)}, lr {self.lrs[0]:.1e} to {self.lrs[-1]:.1e}" if n else "no step"

    def _repr_html_(self) -> str:
        """What a notebook shows: the losses over the logarithm of the rate, and a line a suggestion."""
        top = max(self.losses[: len(self.losses) // 2 + 1], default=0.0)  # an explosion would flatten all else
        try:
            rows = [(name, f"{lr:.1e}") for name, lr in self.suggestions.items()]
        except SettingError as error:
            rows = [("none", str(error))]
        rows.append(("tried", self._tried()))
        return sparkline([min(loss, top) for loss in self.losses]) + table_html(["suggestion", "learning rate"], rows)

    @property
    def valley(self) -> float:
        """Half-way down the longest fall: the longest sequence of losses, not all side by side, that only falls.

        Half-way is as many steps before its end as half of its losses, so that a plateau before it does not count.
        Source: the learning rate finder of ArcGIS's API for Python, as fastai has it (``valley``).
        """
        lrs, losses = self._judged()
        length = np.ones(len(losses), dtype=int)  # of the longest fall to each loss
        for i in range(1, len(losses)):
            higher = length[:i][losses[:i] > losses[i]]
            length[i] += higher.max() if len(higher) else 0
        last, n = int(np.argmax(length)), int(length.max())
        return float(lrs[last - n + n // 3 + n // 6])

    @property
    def steep(self) -> float:
        """Where the loss falls fastest, over the logarithm of the rate."""
        lrs, losses = self._judged()
        return float(lrs[int(np.argmin(np.gradient(losses, np.log(lrs))))])

    @property
    def slide(self) -> float:
        """Before the losses explode: a window slides down from the end until its two ends slope alike.

        The rate is that of its lower end. Source: the sliding interval of fastai's ``slide``, with its settings.
        """
        lrs, losses = self._judged()
        slope = np.gradient(losses)
        right = len(losses) - 1
        left = right - min(_WINDOW, right)
        while left > 0 and abs(slope[right] - slope[left]) > _SLOPE:
            right, left = right - 1, left - 1
        return float(lrs[left])

    @property
    def suggestions(self) -> dict[str, float]:
        """All three by their names."""
        return {"valley": self.valley, "steep": self.steep, "slide": self.slide}

    def _judged(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        judged = slice(len(self.losses) // 10, max(len(self.losses) - _MARGIN, 0))
        lrs, losses = np.asarray(self.lrs)[judged], np.asarray(self.losses)[judged]
        if not self.losses:
            raise SettingError(
                "there is no loss to judge by: the first one is not finite, and no learning rate was used before it. "
                "Look for NaN in the data, and in what the model returns for its first batch"
            )
        if len(losses) < 10:
            raise SettingError(
                f"{len(self.losses)} losses are too few to judge by; begin with a smaller learning rate (start=), or "
                "take more steps (steps=)"
            )
        return lrs, losses

    def plot(self, ax: Any = None) -> Any:
        """Draw the losses and the suggestions with matplotlib, on ``ax`` if given; the axes are returned.

        Needs matplotlib: ``pip install "loopwright[plot]"``. Nothing is shown or written.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError('plot() needs matplotlib: pip install "loopwright[plot]"') from error
        if ax is None:
            _, ax = pyplot.subplots(figsize=(6.0, 3.8), layout="constrained")
        if self.raw:
            ax.plot(self.lrs, self.raw, color="0.75", linewidth=0.8, label="loss of a step")
        ax.plot(self.lrs, self.losses, color="C0", linewidth=1.8, label="smoothed")
        for i, (name, lr) in enumerate(self.suggestions.items(), start=1):
            ax.plot(
                lr, np.interp(np.log(lr), np.log(self.lrs), self.losses), "o", color=f"C{i}", label=f"{name} {lr:.1e}"
            )
        low, high = min(self.losses), max(self.losses[: len(self.losses) // 2 + 1])
        ax.set_ylim(low - 0.1 * (high - low), high + 0.4 * (high - low))  # an explosion would flatten all else
        ax.set_xscale("log")
        ax.set_xlabel("learning rate")
        ax.set_ylabel("loss")
        ax.grid(visible=True, alpha=0.3)
        ax.legend(frameon=False, fontsize="small")
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        return ax
