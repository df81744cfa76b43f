"""What a metric costs a batch, ours beside torchmetrics' in the same run: ``python benchmarks/metrics.py [--quick]``.

Each update is timed alone, in turns (ours, theirs, the bare tensor work), in time of the processor; the best of many
rounds is told. "beyond" is what ours costs more than its tensor work done by hand, the goal of which is 10 us; "times"
is theirs over ours. ``--write`` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torchmetrics
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import classification as tm
from torchmetrics.text import Perplexity

from loopwright import metrics as lw
from measure import PAGE, in_text, write_section

N, C = 64, 10


def accuracy(preds: Tensor, target: Tensor, total: Tensor) -> None:
    total += (preds.argmax(1) == target).sum()


def counts(preds: Tensor, target: Tensor, total: Tensor) -> None:
    total += torch.bincount(target * C + preds.argmax(1), minlength=C * C)


def squared(preds: Tensor, target: Tensor, total: Tensor) -> None:
    total += (preds - target).square().sum()


def absolute(preds: Tensor, target: Tensor, total: Tensor) -> None:
    total += (preds - target).abs().sum()


def variance(preds: Tensor, target: Tensor, total: Tensor) -> None:
    target = target.double()
    total[0] += (preds - target).square().sum()
    total[1] += target.sum()
    total[2] += target.square().sum()


def likelihood(preds: Tensor, target: Tensor, total: Tensor) -> None:
    total += cross_entropy(preds.flatten(0, -2), target.flatten(), reduction="none").sum(dtype=torch.float64)


def one(function: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def work(value: Tensor, total: Tensor) -> None:
        total += function(value)

    return work


def cases() -> dict[str, tuple[Any, Any, Callable[..., None], tuple[Tensor, ...], Tensor]]:
    g = torch.Generator().manual_seed(0)
    scores, classes = torch.randn(N, C, generator=g), torch.randint(C, (N,), generator=g)
    numbers, truth = torch.randn(N, generator=g), torch.randn(N, generator=g)
    tokens = torch.randn(8, 16, 100, generator=g), torch.randint(100, (8, 16), generator=g)
    zero, matrix = torch.zeros(()), torch.zeros(C * C, dtype=torch.int64)
    both, pair = (scores, classes), (numbers, truth)
    return {
        "Accuracy": (lw.Accuracy(), tm.MulticlassAccuracy(C, average="micro"), accuracy, both, zero.long()),
        "ConfusionMatrix": (lw.ConfusionMatrix(C), tm.MulticlassConfusionMatrix(C), counts, both, matrix),
        "Precision": (lw.Precision(C), tm.MulticlassPrecision(C), counts, both, matrix),
        "F1": (lw.F1(C), tm.MulticlassF1Score(C), counts, both, matrix),
        "IoU": (lw.IoU(C), tm.MulticlassJaccardIndex(C), counts, both, matrix),
        "MAE": (lw.MAE(), torchmetrics.MeanAbsoluteError(), absolute, pair, zero),
        "MSE": (lw.MSE(), torchmetrics.MeanSquaredError(), squared, pair, zero),
        "R2": (lw.R2(), torchmetrics.R2Score(), variance, pair, torch.zeros(3).double()),
        "Perplexity": (lw.Perplexity(), Perplexity(), likelihood, tokens, zero),
        "Mean": (lw.Mean(), torchmetrics.MeanMetric(), one(torch.sum), (numbers,), zero),
        "Sum": (lw.Sum(), torchmetrics.SumMetric(), one(torch.sum), (numbers,), zero),
        "Max": (lw.Max(), torchmetrics.MaxMetric(), one(torch.amax), (numbers,), zero),
    }  # fmt: skip


def timed(call: Callable[[], object], calls: int) -> float:
    start = time.thread_time()
    for _ in range(calls):
        call()
    return (time.thread_time() - start) / calls * 1e6


def compare(named: dict[str, Callable[[], object]], rounds: int, calls: int) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(rounds):
        for name, call in named.items():
            found[name].append(timed(call, calls))
    return {name: min(values) for name, values in found.items()}


def several(rounds: int, calls: int) -> dict[str, float]:
    """Five rates of one batch in one dict: ours share a pass, a MetricCollection has compute groups."""
    g = torch.Generator().manual_seed(0)
    batch = {"preds": torch.randn(N, C, generator=g), "target": torch.randint(C, (N,), generator=g)}
    ours = lw.Meters({"p": lw.Precision(C), "r": lw.Recall(C), "f": lw.F1(C), "s": lw.Specificity(C), "i": lw.IoU(C)})
    each = [tm.MulticlassPrecision(C), tm.MulticlassRecall(C), tm.MulticlassF1Score(C), tm.MulticlassSpecificity(C)]
    theirs = torchmetrics.MetricCollection([*each, tm.MulticlassJaccardIndex(C)])
    theirs.update(**batch)
    return compare({"ours": lambda: ours.feed(batch), "theirs": lambda: theirs.update(**batch)}, rounds, calls)


def main() -> None:
    torch.set_num_threads(1)
    rounds, calls = (5, 50) if "--quick" in sys.argv else (30, 500)
    sizes = f"us an update, {N} samples, {C} classes, torchmetrics {torchmetrics.__version__}"
    lines = [f"{'':16} {'ours':>7} {'theirs':>7} {'times':>6} {'tensors':>8} {'beyond':>7}"]
    for name, (ours, theirs, work, given, total) in cases().items():
        calls_ = {
            "ours": lambda ours=ours, given=given: ours.update(*given),
            "theirs": lambda theirs=theirs, given=given: theirs.update(*given),
            "tensors": lambda work=work, given=given, total=total: work(*given, total),
        }
        us = compare(calls_, rounds, calls)
        beyond = us["ours"] - us["tensors"]
        lines.append(
            f"{name:16} {us['ours']:7.1f} {us['theirs']:7.1f} {us['theirs'] / us['ours']:6.1f} {us['tensors']:8.1f} "
            f"{beyond:7.1f}{'' if beyond < 10 else '  over 10 us'}"
        )
    us = several(rounds, calls)
    lines.append(f"{'five rates':16} {us['ours']:7.1f} {us['theirs']:7.1f} {us['theirs'] / us['ours']:6.1f}")
    print(sizes, *lines, sep="\n")
    if "--write" in sys.argv:
        goal = "The goal is at most 10 us beyond the tensor work, done by hand."
        write_section(
            PAGE, "metrics", in_text("An update of a metric, next to torchmetrics", f"{sizes}. {goal}", lines)
        )


if __name__ == "__main__":
    main()
