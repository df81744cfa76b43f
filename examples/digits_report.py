"""What the test of the demo found, and its tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import classification_report, confusion_matrix

import loopwright as lw


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


def write_tables(findings: Findings) -> str:
    """Accuracy, how each digit fared, the confusions, and each mistake; at most 72 columns."""
    right, total = int((findings.predicted == findings.digits).sum()), len(findings.digits)
    head = f"Test accuracy {findings.accuracy:.2%}: {right} of {total} images, never seen before"
    seconds = findings.history[-1]["seconds"]
    kept = f"trained in {seconds:.0f} s; weights of epoch {findings.best_epoch}, which had the lowest valid/loss"
    parts = [[head, kept], _classes(findings), _confusions(findings.confusion), _mistakes(findings)]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _classes(findings: Findings) -> Iterator[str]:
    true, predicted = findings.digits, findings.predicted
    found = classification_report(true, predicted, labels=range(10), output_dict=True, zero_division=0)
    rule = "  " + "-" * 49
    yield from ("  digit   precision      recall          F1    images", rule)
    for name in (*map(str, range(10)), "macro avg"):
        precision, recall, f1, support = found[name].values()
        yield from [rule] * (name == "macro avg")
        yield f"  {name[:5]:>5}{precision:>12.1%}{recall:>12.1%}{f1:>12.1%}{support:>10.0f}"


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
    yield from [f"  and {len(wrong) - 10} more"] if len(wrong) > 10 else []
