"""The picture that the demo ends with: curves, confusions and the hardest images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from digits_report import Findings
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, RED = "#1f5fa8", "#e08214", "#c0182b"


def draw_picture(findings: Findings, path: Path) -> None:
    """Save curves, confusions and the twelve hardest images as a PNG of about 1300 x 1000 pixels."""
    figure = Figure(figsize=(13, 10), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    wrong = int((findings.predicted != findings.digits).sum())
    title = f"Handwritten digits: {findings.accuracy:.2%} of {len(findings.digits)} test images read correctly"
    figure.suptitle(f"{title} ({wrong} wrong)", fontsize=16, fontweight="bold")
    upper, lower = figure.subfigures(2, 1, height_ratios=[4, 5.5])
    loss, accuracy = upper.subplots(1, 2)
    _curves(loss, findings, "loss")
    _curves(accuracy, findings, "accuracy")
    left, right = lower.subfigures(1, 2)
    _heat_map(left.subplots(), findings.confusion)
    right.suptitle("The hardest test images", fontsize=12)
    for axes, i in zip(right.subplots(3, 4).flat, findings.hardest(12), strict=True):
        _image(axes, findings, i)
    figure.savefig(path, dpi=100)


def _curves(axes: Axes, findings: Findings, name: str) -> None:
    history, epochs = findings.history, range(1, len(findings.history) + 1)
    for part, color in (("train", ORANGE), ("valid", BLUE)):
        label = {"train": "train (distorted images)", "valid": "valid"}[part]
        axes.plot(epochs, history[f"{part}/{name}"], color=color, label=label, marker=".", linewidth=1.8)
    axes.axvline(findings.best_epoch, color="0.5", linestyle=":", label="best checkpoint")
    axes.set_title({"loss": "Loss (cross entropy of smoothed labels)", "accuracy": "Accuracy"}[name], fontsize=12)
    axes.set_xlabel("epoch")
    if name == "accuracy":  # the first epochs would hide what happens near the top
        shown = [a for part in ("train", "valid") for a in history[f"{part}/accuracy"][len(history) // 4 :]]
        axes.set_ylim(max(0.0, min(shown) - 0.01), 1.004)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _heat_map(axes: Axes, confusion: np.ndarray) -> None:
    axes.imshow(confusion / confusion.sum(axis=1, keepdims=True), cmap="Blues", vmin=0, vmax=1)
    for true, predicted in np.argwhere(confusion):
        color = "white" if true == predicted else RED
        axes.text(predicted, true, confusion[true, predicted], ha="center", va="center", color=color, fontweight="bold")
    axes.set_title("Confusions: number of images", fontsize=12)
    axes.set(xticks=range(10), yticks=range(10), xlabel="predicted", ylabel="true")
    axes.tick_params(length=0)


def _image(axes: Axes, findings: Findings, i: int) -> None:
    predicted, true = findings.predicted[i], findings.digits[i]
    axes.imshow(findings.images[i, 0], cmap="gray_r", vmin=0, vmax=1)
    text = f"predicted {predicted} ({findings.chances[i, predicted]:.0%})\ntrue {true}"
    text += "" if predicted == true else f" ({findings.chances[i, true]:.0%})"
    axes.set_title(text, fontsize=10, color=RED if predicted != true else "black")
    axes.set(xticks=[], yticks=[])
