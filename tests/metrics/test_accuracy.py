"""Accuracy counts exactly what torchmetrics counts, keeps copies only, and explains what does not fit."""

from __future__ import annotations

import math
import warnings
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torchmetrics.functional.classification as reference
from hypothesis import given, settings
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from loopwright.errors import LoopwrightWarning, MetricError, SettingError
from loopwright.metrics import Accuracy, functional
from loopwright.metrics import accuracy as module
from undefined import is_of_nothing


def scores(n: int, c: int, extra: tuple[int, ...], seed: int, levels: int) -> tuple[Tensor, Tensor]:
    """Scores with few different values, so that there are ties."""
    g = torch.Generator().manual_seed(seed)
    preds = torch.randint(levels, (n, c, *extra), generator=g).float() / levels
    return preds, torch.randint(c, (n, *extra), generator=g)


def counts(metric: Accuracy) -> tuple[int, int]:
    return int(metric.total("hits")), int(metric.total("count"))


batches = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2**30)), min_size=1, max_size=5)


@settings(max_examples=60)
@given(batches, st.integers(2, 6), st.sampled_from([(), (1,), (2, 3)]), st.data())
def test_scores_are_counted_as_by_torchmetrics(rows: Any, c: int, extra: tuple[int, ...], data: Any) -> None:
    top_k = data.draw(st.integers(1, c - 1))
    ignore_index = data.draw(st.sampled_from([None, 0, c - 1, -100]))
    levels = data.draw(st.sampled_from([1, 3, 1000]))
    mine, hits, count = Accuracy(top_k, ignore_index=ignore_index), 0, 0
    for n, seed in rows:
        preds, target = scores(n, c, extra, seed, levels)
        if ignore_index == -100:
            target[torch.rand(target.shape, generator=torch.Generator().manual_seed(seed)) < 0.3] = -100
        mine.update(preds, target)
        if not n:
            continue
        tp, _, _, fn, _ = reference.multiclass_stat_scores(
            preds, target, c, average="micro", top_k=top_k, ignore_index=ignore_index
        ).tolist()
        hits, count = hits + tp, count + tp + fn
        batch = functional.accuracy(preds, target, top_k, ignore_index=ignore_index)
        assert batch.item() == pytest.approx(tp / (tp + fn) if tp + fn else math.nan, nan_ok=True)
    assert counts(mine) == (hits, count)
    assert mine.compute() == hits / count if count else is_of_nothing(mine)


@settings(max_examples=60)
@given(batches, st.sampled_from([None, 0.0, 0.3, 1.0]), st.sampled_from([None, 0, 1, -1]), st.sampled_from([(), (3,)]))
def test_probabilities_are_counted_as_by_torchmetrics(
    rows: Any, threshold: float | None, ignore_index: int | None, extra: tuple[int, ...]
) -> None:
    mine, hits, count = Accuracy(threshold=threshold, ignore_index=ignore_index), 0, 0
    for n, seed in rows:
        g = torch.Generator().manual_seed(seed)
        preds = torch.randint(11, (n, *extra), generator=g) / 10
        target = torch.randint(2, (n, *extra), generator=g)
        if ignore_index == -1:
            target[preds > 0.8] = -1
        mine.update(preds, target)
        if n:
            level = 0.5 if threshold is None else threshold
            tp, fp, tn, fn, _ = reference.binary_stat_scores(preds, target, level, ignore_index=ignore_index).tolist()
            hits, count = hits + tp + tn, count + tp + fp + tn + fn
    assert counts(mine) == (hits, count)


@pytest.mark.parametrize(
    ("preds", "target", "expected"),
    [
        ([1, 2, 3, 3], [1, 2, 0, 0], 0.5),
        ([True, False], [True, True], 0.5),
        ([0.9, 0.2], [True, True], 0.5),
        ([0.9, 0.2], [1.0, 0.0], 1.0),
        ([0.5, 0.6], [1, 1], 0.5),  # above the threshold, not at it
        ([[-math.inf, math.inf], [-math.inf, -math.inf]], [1, 0], 1.0),
    ],
)
def test_known_answers(preds: Any, target: Any, expected: float) -> None:
    accuracy = Accuracy()
    accuracy.update(torch.tensor(preds), torch.tensor(target))
    assert accuracy.compute() == expected
    assert functional.accuracy(torch.tensor(preds), torch.tensor(target)).item() == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_class_indices_may_have_any_integer_type(dtype: torch.dtype) -> None:
    accuracy = Accuracy()
    accuracy.update(torch.eye(200), torch.arange(200).to(dtype))
    assert accuracy.compute() == 1.0


def test_nothing_seen_is_nan() -> None:
    assert is_of_nothing(Accuracy())
    empty = Accuracy()
    empty.update(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))
    assert is_of_nothing(empty)
    ignored = Accuracy(ignore_index=1)
    ignored.update(torch.eye(3)[:1], torch.tensor([1]))
    assert is_of_nothing(ignored)


@pytest.mark.parametrize("spoilt", [0, 1])
@pytest.mark.parametrize(("kind", "top_k"), [("scores", 1), ("scores", 2), ("probabilities", 1), ("indices", 1)])
def test_reused_buffers_change_nothing(kind: str, top_k: int, spoilt: int) -> None:
    accuracy = Accuracy(top_k)
    preds, target = {
        "scores": (torch.eye(4), torch.arange(4)),
        "probabilities": (torch.ones(4), torch.ones(4)),
        "indices": (torch.ones(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)),
    }[kind]
    accuracy.update(preds, target)
    (preds, target)[spoilt].copy_((preds, target)[spoilt].flip(0) if kind == "scores" else torch.zeros(4))
    assert accuracy.compute() == 1.0


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("held", [0, 100, 10**9])
def test_the_value_does_not_depend_on_when_it_is_counted(
    held: int, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HELD", held)
    accuracy, hits = Accuracy(top_k), 0
    for seed, n in enumerate([7, 7, 3, 90, 1]):
        preds, target = scores(n, 4, (2,), seed, 5)
        accuracy.update(preds, target)
        hits += (
            int((preds.topk(top_k, 1).indices == target[:, None]).any(1).sum())
            if top_k > 1
            else int((preds.argmax(1) == target).sum())
        )
        if seed == 2:
            accuracy.compute()
    assert counts(accuracy) == (hits, 2 * 108)


def test_what_is_held_is_bounded() -> None:
    accuracy = Accuracy()
    for _ in range(1100):
        accuracy.update(torch.eye(2)[:1], torch.tensor([0]))
        assert len(accuracy._held) <= 1024
    accuracy.update(torch.zeros(1, 2, 300, 300), torch.zeros(1, 300, 300, dtype=torch.int64))
    assert accuracy._held == []
    assert counts(accuracy) == (1100 + 90_000, 1100 + 90_000)


def test_kinds_of_input_may_follow_one_another() -> None:
    accuracy = Accuracy()
    accuracy.update(torch.eye(3), torch.tensor([0, 1, 0]))
    accuracy.update(torch.eye(5), torch.arange(5))
    accuracy.update(torch.tensor([0.9, 0.1]), torch.tensor([0, 0]))
    accuracy.update(torch.tensor([7, 8]), torch.tensor([7, 7]))
    assert counts(accuracy) == (2 + 5 + 1 + 1, 3 + 5 + 2 + 2)


def test_a_state_taken_while_answers_are_held_is_complete() -> None:
    whole, first = Accuracy(), Accuracy()
    for metric in (whole, first):
        metric.update(torch.eye(4), torch.tensor([0, 1, 0, 0]))
    second = Accuracy()
    second.load_state_dict(first.state_dict())
    for metric in (whole, second):
        metric.update(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    assert counts(second) == counts(whole) == (5, 8)
    merged = Accuracy()
    merged.merge(whole)
    assert counts(merged) == (5, 8)
    whole.reset()
    assert is_of_nothing(whole)


F, I = torch.float32, torch.int64  # noqa: E741


@pytest.mark.parametrize(
    ("preds", "target", "top_k", "message"),
    [
        (((64, 10), F), ((64, 1), I), 1, "preds float32[64, 10] and target int64[64, 1] do not fit: "
         "write target.squeeze(1)"),
        (((64,), F), ((64, 1), I), 1, "preds float32[64] and target int64[64, 1] do not fit: write target.squeeze(1)"),
        (((64, 1), F), ((64,), I), 1, "preds float32[64, 1] and target int64[64]: one class only. "
         "Where one output means two, write preds.squeeze(1)"),
        (((64, 10), F), ((64,), F), 1, "preds float32[64, 10] and target float32[64]: class indices are integers. "
         "Write target.long()"),
        (((64, 3), F), ((64,), I), 5, "preds float32[64, 3] and target int64[64]: 3 classes are fewer than top_k=5; "
         "write top_k=2 or less"),
        (((64,), F), ((64,), I), 2, "preds float32[64] and target int64[64]: top_k=2 needs a score for each class, "
         "preds of shape [N, C, ...]"),
        (((64, 10), F), ((32,), I), 1, "preds float32[64, 10] and target int64[32] do not fit: expected one shape for "
         "both, or scores [N, C, ...] with class indices [N, ...]"),
        (((1, 10), F), ((64,), I), 1, "preds float32[1, 10] and target int64[64] do not fit: expected one shape for "
         "both, or scores [N, C, ...] with class indices [N, ...]"),
        (((8, 5, 4), F), ((8, 5), I), 1, "preds float32[8, 5, 4] and target int64[8, 5] do not fit: expected one shape "
         "for both, or scores [N, C, ...] with class indices [N, ...]. The classes are last here: let the step return "
         "preds.movedim(-1, 1)"),
        (((10,), F), ((), I), 1, "preds float32[10] and target int64[] do not fit: expected one shape for "
         "both, or scores [N, C, ...] with class indices [N, ...]"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused_with_the_way_out(preds: Any, target: Any, top_k: int, message: str) -> None:
    p, t = (torch.zeros(shape, dtype=dtype) for shape, dtype in (preds, target))
    for call in (Accuracy(top_k).update, lambda p, t: functional.accuracy(p, t, top_k)):
        with pytest.raises(MetricError) as error:
            call(p, t)
        assert str(error.value) == message


@pytest.mark.parametrize(("index", "low", "high"), [(3, 0, 3), (-100, -100, 1), (-1, -1, 1)])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_class_that_is_none_is_found(index: int, low: int, high: int, top_k: int) -> None:
    accuracy = Accuracy(top_k)
    accuracy.update(torch.eye(3), torch.tensor([0, 1, index]))
    with pytest.raises(MetricError) as error:
        accuracy.compute()
    assert str(error.value) == (
        f"targets range from {low} to {high}, but 3 classes have the indices 0 to 2. To leave a target out, name it: "
        f"Accuracy(ignore_index={index})"
    )
    accuracy = Accuracy(top_k, ignore_index=index)
    accuracy.update(torch.eye(3), torch.tensor([0, 1, index]))
    assert accuracy.compute() == 1.0


def test_what_is_ignored_may_be_anything() -> None:
    accuracy = Accuracy(ignore_index=-1)
    accuracy.update(torch.tensor([7.0, 0.3, -2.0]), torch.tensor([-1, 0, -1]))
    assert accuracy.compute() == 1.0


def test_logits_taken_for_probabilities_are_found() -> None:
    accuracy = Accuracy()
    accuracy.update(torch.tensor([-2.0, 0.3]), torch.tensor([0, 1]))
    with pytest.raises(MetricError) as error:
        accuracy.compute()
    assert str(error.value) == (
        "preds range from -2 to 0.3, which are no probabilities. For logits, write Accuracy(threshold=0.0)"
    )
    accuracy = Accuracy(threshold=0.0)
    accuracy.update(torch.tensor([-2.0, 0.3]), torch.tensor([0, 1]))
    assert accuracy.compute() == 1.0


@pytest.mark.parametrize("kind", [torch.float32, torch.int64])
def test_one_hot_targets_of_logits_are_told_at_the_first_batch(kind: torch.dtype) -> None:
    target = torch.eye(3, dtype=kind)
    with pytest.raises(MetricError) as error:
        Accuracy().update(torch.eye(3) * 5 - 2, target)
    told = (
        "preds range from -2 to 3, which are no probabilities. Where targets are one-hot give the classes, "
        "y.argmax(1), which nn.CrossEntropyLoss takes as well; for logits of several labels write "
        "Accuracy(threshold=0.0)"
    )
    assert str(error.value) == told
    for other in (Accuracy(threshold=0.0), Accuracy(ignore_index=0)):
        other.update(torch.eye(3) * 5 - 2, target)
    labels = Accuracy()
    labels.update(torch.eye(3) * 5 - 2, 1 - target)
    with pytest.raises(MetricError) as error:
        labels.compute()
    assert str(error.value) == told


@pytest.mark.parametrize("top_k", [0, -1, 1.0, True, "5"])
def test_top_k_is_a_whole_number_from_one(top_k: Any) -> None:
    with pytest.raises(SettingError, match="expected a whole number from 1, such as top_k=5"):
        Accuracy(top_k)


def test_top_k_and_a_threshold_exclude_each_other() -> None:
    with pytest.raises(SettingError, match=r"threshold=0.5 is for two classes, top_k=2 for more: give one of them"):
        Accuracy(2, threshold=0.5)


def test_accuracy_is_at_hand_in_a_training_step() -> None:
    net = torch.nn.Linear(2, 3)
    logits, target = net(torch.randn(8, 2)), torch.randint(3, (8,))
    value = functional.accuracy(logits, target)
    assert value.dtype == torch.float32
    assert not value.requires_grad
    assert value.item() == reference.multiclass_accuracy(logits, target, 3, average="micro").item()


# ---------------------------------------------------------------------------------------------------- each class


@settings(max_examples=40)
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3), c=st.integers(2, 5), top_k=st.integers(1, 2),
    seed=st.integers(0, 99), ignore=st.booleans(), large=st.booleans(), few=st.booleans(),
)  # fmt: skip
def test_the_accuracy_of_each_class_is_that_of_torchmetrics(
    rows: Any, c: int, top_k: int, seed: int, ignore: bool, large: bool, few: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    ignored = {"ignore_index": 0} if ignore else {}
    ours, mean = (Accuracy(top_k, average=average, **ignored) for average in (None, "macro"))
    theirs = MulticlassAccuracy(c, top_k=top_k, average=None, **ignored)
    counts = torch.zeros(c)
    for n in rows:
        n = n + 3000 * large
        preds, target = torch.randn(n, c, generator=g), torch.randint(2 if few else c, (n,), generator=g)
        for metric in (ours, mean, theirs):
            metric.update(preds, target)
        counts += torch.bincount(target, minlength=c)
    counts[0] = 0 if ignore else counts[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.as_tensor(ours.compute())
    if not counts.any():
        assert found.isnan().all()
        return
    has = counts > 0
    assert torch.allclose(found[has].float(), theirs.compute()[has])
    assert found[~has].isnan().all()
    assert mean.compute() == pytest.approx(theirs.compute()[has].mean().item(), abs=1e-6)


def test_a_class_without_targets_is_nan_and_said_once() -> None:
    accuracy = Accuracy(average=None)
    accuracy.update(torch.eye(3), torch.tensor([0, 1, 1]))
    with pytest.warns(LoopwrightWarning) as told:
        assert str(accuracy.compute().tolist()) == "[1.0, 0.5, nan]"
    assert str(told[0].message) == "Accuracy of the classes [2] is 0/0, since they have no target: it is nan"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accuracy.compute()


def test_classes_that_cannot_be_told_are_refused() -> None:
    with pytest.raises(MetricError, match=r"give scores \[N, C, ...\], or take Recall\(classes=..., average=None\)"):
        Accuracy(average=None).update(torch.tensor([1, 2]), torch.tensor([1, 2]))
    with pytest.raises(SettingError, match="average='weighted': expected 'micro'"):
        Accuracy(average="weighted")


@pytest.mark.parametrize("n", [2, 9000])
@pytest.mark.parametrize(
    ("settings_", "row"), [({}, [0.5, math.nan]), ({"top_k": 2}, [0.1, math.nan, 0.3]), ({}, math.nan),
                           ({"threshold": 0.5}, math.nan)],
)  # fmt: skip
def test_scores_that_are_nan_are_found(settings_: Any, row: Any, n: int) -> None:
    accuracy = Accuracy(**settings_)
    accuracy.update(torch.tensor([row] * n), torch.ones(n).long())
    with pytest.raises(MetricError, match=f"the scores of {n} samples are NaN. Look for where they come from with"):
        accuracy.compute()


@pytest.mark.parametrize("soft", [0.3, math.nan])
def test_targets_between_two_classes_are_refused(soft: float) -> None:
    """No prediction is equal to them: accuracy was 0 without a word."""
    accuracy = Accuracy()
    accuracy.update(torch.tensor([0.2, 0.9, 0.6]), torch.tensor([0.0, 1.0, soft]))
    with pytest.raises(MetricError, match=r"^1 targets are neither 0 nor 1, .* write target\.round\(\)"):
        accuracy.compute()
    whole = Accuracy()
    whole.update(torch.tensor([0.2, 0.9, 0.6]), torch.tensor([0.0, 1.0, 0.0]))
    assert whole.compute() == 2 / 3
