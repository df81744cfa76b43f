"""The base of metrics: totals that join, forget, merge, are saved, and hold neither graph nor foreign memory."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torchmetrics.text
from torch import Tensor, nn

import loopwright as lw
from loopwright import metrics as m
from loopwright.errors import CheckpointError, MetricError, SettingError
from loopwright.metrics import MAE, MSE, Accuracy, Mean, Metric
from loopwright.state import Metric as Protocol


class Span(Metric):
    """Every reduction once."""

    state = {"total": "sum", "top": "max", "low": "min", "rows": "cat"}  # noqa: RUF012

    def update(self, values: Any) -> None:
        """Take in one batch."""
        high, low = (values.amax(0), values.amin(0)) if isinstance(values, Tensor) else (values, values)
        self.add(total=values.sum(0) if isinstance(values, Tensor) else values, top=high, low=low, rows=values)

    def compute(self) -> dict[str, Any]:
        """All totals."""
        return {name: self.total(name) for name in self.state}


def filled(*batches: Any) -> Span:
    span = Span()
    for batch in batches:
        span.update(batch)
    return span


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


A, B = torch.tensor([[1.0, 5.0], [2.0, -3.0]]), torch.tensor([[0.5, 7.0]])


def test_each_reduction_joins_as_its_name_says() -> None:
    values = filled(A, B).compute()
    assert values["total"].tolist() == [3.5, 9.0]
    assert values["total"].dtype == torch.float64
    assert values["top"].tolist() == [2.0, 7.0]
    assert values["low"].tolist() == [0.5, -3.0]
    assert torch.equal(values["rows"], torch.cat([A, B]))


def test_numbers_join_like_tensors() -> None:
    values = filled(3, 5, 4).compute()
    assert {k: v.tolist() for k, v in values.items()} == {"total": 12, "top": 5, "low": 3, "rows": [3, 5, 4]}
    assert filled(torch.tensor([3.0]), 5.0).compute()["top"].item() == 5.0


def test_totals_of_nothing_are_the_neutral_ones() -> None:
    values = Span().compute()
    assert [values[k].item() for k in ("total", "top", "low")] == [0, -math.inf, math.inf]
    assert values["rows"].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32])
def test_sums_of_integers_do_not_wrap(dtype: torch.dtype) -> None:
    metric = Span()
    for _ in range(300):
        metric.add(total=torch.tensor(1, dtype=dtype))
    assert metric.total("total").item() == 300
    assert metric.total("total").dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_of_short_floats_are_float64(dtype: torch.dtype) -> None:
    metric = Span()
    for _ in range(3000):
        metric.add(total=torch.tensor(1.0, dtype=dtype))
    assert metric.total("total").item() == 3000.0


def test_merging_equals_taking_in_both() -> None:
    left, right = filled(A), filled(B)
    left.merge(right)
    assert same(left.compute(), filled(A, B).compute())
    assert same(right.compute(), filled(B).compute())
    empty = Span()
    empty.merge(right)
    empty.update(A)
    assert same(right.compute(), filled(B).compute())  # nothing is shared


def test_merging_what_does_not_match_is_refused() -> None:
    message = (
        r"cannot merge Accuracy\(top_k=2\) into Accuracy\(top_k=1\): both must be of one class with the same settings"
    )
    with pytest.raises(MetricError, match=message):
        Accuracy().merge(Accuracy(top_k=2))
    with pytest.raises(MetricError, match="cannot merge"):
        MAE().merge(MSE())


def test_a_state_is_a_snapshot_and_goes_on_elsewhere() -> None:
    first = filled(A)
    state = first.state_dict()
    first.update(B)
    second = Span()
    second.load_state_dict(state)
    assert same(second.compute(), filled(A).compute())
    second.update(B)
    assert same(second.compute(), first.compute())
    for value in state.values():
        value.zero_()
    for value in second.state_dict().values():
        value.zero_()
    assert same(second.compute(), first.compute())


def test_a_state_of_another_metric_is_refused() -> None:
    message = "the saved metric has the state 'hit', which Accuracy does not have. .* Did you mean 'hits'"
    with pytest.raises(CheckpointError, match=message):
        Accuracy().load_state_dict({"hit": 3})


def test_reset_forgets_everything() -> None:
    span = filled(A, B)
    span.reset()
    assert span.state_dict() == {}
    span.update(B)
    assert same(span.compute(), filled(B).compute())


def test_totals_hold_no_graph_and_no_foreign_memory() -> None:
    leaf = A.clone().requires_grad_()
    values = leaf * 1
    span = filled(values)
    before = {k: v.clone() for k, v in span.compute().items()}
    assert not any(v.requires_grad for v in before.values())
    values.data.fill_(100.0)  # a loop that reuses its buffers
    assert same(span.compute(), before)


def test_totals_are_copies_of_what_is_added() -> None:
    for dtype in (torch.float64, torch.int64):
        metric, buffer = Span(), torch.ones(2, dtype=dtype)
        for name in Span.state:
            metric.add(**{name: buffer})
        buffer.fill_(9)
        assert all(metric.total(name).tolist() == [1, 1] for name in Span.state)


def test_totals_of_inference_mode_go_on_outside_of_it() -> None:
    with torch.inference_mode():
        span = filled(A)
    span.update(B)
    assert same(span.compute(), filled(A, B).compute())


def test_a_copy_collects_by_itself() -> None:
    span = filled(A)
    other = copy.deepcopy(span)
    other.update(B)
    assert same(span.compute(), filled(A).compute())
    assert same(other.compute(), filled(A, B).compute())


def test_names_and_reductions_are_checked() -> None:
    with pytest.raises(MetricError, match=r"Span has no state 'totl'\. Known: .* Did you mean 'total'"):
        Span().add(totl=1)
    with pytest.raises(MetricError, match="Span has no state 'totl'"):
        Span().total("totl")
    with pytest.raises(MetricError, match=r"Span\.add\(total=\.\.\.\) takes a number or a tensor, got list"):
        Span().add(total=[1])

    class Wrong(Metric):
        state = {"a": "summ"}  # noqa: RUF012

    message = r"Wrong.state\['a'\] = 'summ' is no reduction. Known: 'cat', 'max', 'min', 'sum'. Did you mean 'sum'"
    with pytest.raises(SettingError, match=message):
        Wrong()


def test_an_own_init_need_not_call_the_base() -> None:
    class Scaled(Mean):
        def __init__(self, scale: float) -> None:
            self.scale = scale

        def compute(self) -> float:
            return self.scale * super().compute()

    mean = Scaled(10.0)
    mean.update(torch.tensor([1.0, 2.0]))
    assert mean.compute() == 15.0


def test_what_a_subclass_forgot_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"Metric needs update\(preds, target\)"):
        Metric().update(1, 2)
    with pytest.raises(NotImplementedError, match="Metric needs compute"):
        Metric().compute()


@pytest.mark.parametrize("metric", [Accuracy(), MAE(), MSE(), Mean(), Span()])
def test_ours_keep_the_protocol(metric: Any) -> None:
    assert isinstance(metric, Protocol)


def test_updates_read_nothing_from_the_device() -> None:
    scores_, classes = torch.zeros(9000, 3, device="meta"), torch.zeros(9000, dtype=torch.int64, device="meta")
    numbers = torch.zeros(9000, device="meta")
    fed: list[tuple[Any, tuple[torch.Tensor, ...]]] = [
        (m.Accuracy(), (scores_, classes)), (m.Accuracy(2, average=None), (scores_, classes)),
        (m.Accuracy(ignore_index=0), (scores_, classes)), (m.ConfusionMatrix(3, ignore_index=0), (scores_, classes)),
        (m.ConfusionMatrix(), (numbers, classes)), (m.Precision(labels=3), (scores_, scores_.long())),
        (m.Mean(), (numbers,)), (m.Sum(), (numbers,)), (m.Min(), (numbers,)), (m.Max(), (numbers,)),
        (m.MAE(), (numbers, numbers)), (m.RMSE(), (numbers, numbers)), (m.R2(), (numbers, numbers)),
        (m.Perplexity(ignore_index=0), (scores_, classes)),
    ]  # fmt: skip
    for metric, given_ in fed:
        for _ in range(3):
            metric.update(*given_)  # a read of this device is an error of torch


TWINS: dict[str, tuple[Any, ...]] = {  # a metric, its twin's name, inputs
    "Accuracy": (m.Accuracy(), "accuracy", "classes"), "ConfusionMatrix": (m.ConfusionMatrix(3), "confusion_matrix", 3),
    "Dice": (m.Dice(3), "dice", 3), "F1": (m.F1(3), "f1", 3), "FBeta": (m.FBeta(2.0, 3), "fbeta", (2.0, 3)),
    "IoU": (m.IoU(3), "iou", 3), "Precision": (m.Precision(3), "precision", 3), "Recall": (m.Recall(3), "recall", 3),
    "Specificity": (m.Specificity(3), "specificity", 3), "MAE": (m.MAE(), "mae", "numbers"),
    "MSE": (m.MSE(), "mse", "numbers"), "RMSE": (m.RMSE(), "rmse", "numbers"), "R2": (m.R2(), "r2", "numbers"),
    "Perplexity": (m.Perplexity(), "perplexity", "classes"), "Max": (m.Max(), "maximum", "value"),
    "Mean": (m.Mean(), "mean", "value"), "Min": (m.Min(), "minimum", "value"), "Sum": (m.Sum(), "sum", "value"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TWINS))
def test_each_metric_and_its_functional_twin_give_one_number(name: str) -> None:
    twin_equals(name)


def twin_equals(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    scores, classes = torch.randn(40, 3, generator=g), torch.randint(3, (40,), generator=g)
    numbers = torch.randn(40, generator=g), torch.randn(40, generator=g)
    metric, twin, kind = TWINS[name]
    given = {"numbers": numbers, "value": numbers[:1]}.get(kind, (scores, classes))
    settings = () if isinstance(kind, str) else kind if isinstance(kind, tuple) else (kind,)
    metric.reset()
    metric.update(*given)
    found = getattr(m.functional, twin)(*given, *settings)
    assert torch.allclose(torch.as_tensor(metric.compute()).double(), found.double(), rtol=1e-6)


@pytest.mark.capability("PL-23")
def test_a_metric_is_an_object_and_a_function_and_torchmetrics_modules_go_in_beside() -> None:
    """Each metric as an object and as a function gives one number; accuracy in a training step; BLEU as it is."""
    for name in TWINS:
        twin_equals(name)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=g), torch.randint(3, (40,), generator=g)

    class Says(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(5, 3)

        def training_step(self, batch: Any) -> Any:
            logits = self.net(batch[0])
            accuracy = m.functional.accuracy(logits, batch[1])
            said = {"said": ["the cat is here now"], "references": [["the cat is here"]]}
            return {"loss": nn.functional.cross_entropy(logits, batch[1]), "accuracy": accuracy, **said}

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

        def configure_metrics(self) -> Any:
            return {"bleu": m.On(torchmetrics.text.BLEUScore(), "said", "references")}

    task = Says()
    run = lw.Trainer(epochs=1, folder=None, progress=False).fit(task, lw.Loader((x, y), batch_size=8), (x, y))
    right = (task.net(x).argmax(1) == y).float().mean().item()
    bleu = torchmetrics.functional.text.bleu_score(["the cat is here now"], [["the cat is here"]]).item()
    assert run.metrics["train/accuracy"] == pytest.approx(right)
    assert run.metrics["valid/bleu"] == run.metrics["train/bleu"] == pytest.approx(bleu)


def test_no_metric_is_without_a_twin() -> None:
    others = {
        "Derived",
        "Function",
        "Grouped",
        "Meters",
        "Metric",
        "On",
        "Rate",
        "Running",
        "Where",
        "Window",
    }
    assert {name for name in m.__all__ if name[0].isupper()} - others == TWINS.keys()
    assert {twin for _, twin, _ in TWINS.values()} == set(m.functional.__all__)
