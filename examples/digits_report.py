"""The report of the demo: tables for a terminal, a picture, and a guide to the run folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

import loopwright as lw

BLUE, ORANGE, RED = "#1f5fa8", "#e08214", "#c0182b"


@dataclass(frozen=True)
class Findings:
    """What a test found: images [N, 1, 8, 8], their digits [N], and the probabilities [N, 10] that were given."""

    images: np.ndarray
    digits: np.ndarray
    chances: np.ndarray
    history: lw.History
    best_epoch: int

    @property
    def predicted(self) -> np.ndarray:
        """The digit that each image was taken for, [N]."""
        return self.chances.argmax(axis=1)

    @property
    def accuracy(self) -> float:
        return float((self.predicted == self.digits).mean())

    @property
    def confusion(self) -> np.ndarray:
        """Images by true digit (row) and predicted digit (column), [10, 10]."""
        return confusion_matrix(self.digits, self.predicted, labels=range(10))

    def hardest(self, count: int) -> np.ndarray:
        """Positions of the images whose true digit was given the least probability, worst first."""
        return self.chances[np.arange(len(self.digits)), self.digits].argsort(kind="stable")[:count]


# ------------------------------------------------------------------------------------------------ for a terminal


def write_tables(findings: Findings) -> str:
    """Accuracy, how each digit fared, the confusions, and each mistake; at most 72 columns."""
    right, total = int((findings.predicted == findings.digits).sum()), len(findings.digits)
    head = f"Test accuracy {findings.accuracy:.2%}: {right} of {total} images, never seen before"
    seconds = findings.history[-1]["seconds"]
    kept = f"trained in {seconds:.0f} s; weights of epoch {findings.best_epoch}, which had the lowest valid/loss"
    parts = [[head, kept], _classes(findings), _confusions(findings.confusion), _mistakes(findings)]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _classes(findings: Findings) -> Iterator[str]:
    precision, recall, f1, support = precision_recall_fscore_support(
        findings.digits, findings.predicted, labels=range(10), zero_division=0
    )
    yield "  digit   precision      recall          F1    images"
    yield "  " + "-" * 49
    for digit, row in enumerate(zip(precision, recall, f1, support, strict=True)):
        yield f"  {digit:>5}{row[0]:>12.1%}{row[1]:>12.1%}{row[2]:>12.1%}{row[3]:>10}"
    yield "  " + "-" * 49
    yield f"  {'all':>5}{precision.mean():>12.1%}{recall.mean():>12.1%}{f1.mean():>12.1%}{support.sum():>10}"


def _confusions(confusion: np.ndarray) -> Iterator[str]:
    yield "  true digit (rows) and predicted digit (columns)"
    yield "       " + "".join(f"{digit:>5}" for digit in range(10))
    yield "  " + "-" * 55
    for digit, row in enumerate(confusion):
        yield f"  {digit:>5}" + "".join(f"{count or '.':>5}" for count in row)


def _mistakes(findings: Findings) -> Iterator[str]:
    wrong = [i for i in findings.hardest(len(findings.digits)) if findings.predicted[i] != findings.digits[i]]
    yield f"  {len(wrong) or 'no'} mistake{'s' * (len(wrong) != 1)}{':' * bool(wrong)}"
    for i in wrong[:10]:
        predicted, true, chances = findings.predicted[i], findings.digits[i], findings.chances[i]
        names = [f"an {digit}" if digit == 8 else f"a {digit}" for digit in (true, predicted)]
        yield f"  {names[0]} taken for {names[1]}: {chances[predicted]:.0%} against {chances[true]:.0%}"
    if len(wrong) > 10:
        yield f"  and {len(wrong) - 10} more"


ABOUT = {
    "report.png": "this report as a picture: curves, confusions, hardest images",
    "report.txt": "the tables above",
    "report.html": "the run as a page: curves to zoom into, confusions, images, settings",
    "report": "what the page shows besides the rest of this folder",
    "metrics.jsonl": "every logged value, one JSON record a line",
    "checkpoints": "the best weights and the last, as safetensors and JSON",
    "run.json": "command, seed, versions, git commit, final metrics",
    "config.yaml": "the settings of the trainer",
    "environment.txt": "all installed packages",
    "source.zip": "the code that ran",
}


def describe_folder(folder: Path) -> str:
    """The path of a run folder and a line about each thing in it."""
    names = sorted((p.name for p in folder.iterdir()), key=lambda name: ([*ABOUT, name].index(name), name))
    return "\n".join([f"{folder}/", *(f"  {name:17}{ABOUT.get(name, '')}".rstrip() for name in names)])


# ---------------------------------------------------------------------------------------------------- as a picture


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
