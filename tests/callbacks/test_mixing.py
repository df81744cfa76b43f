"""MixUp and CutMix do what their papers say, on the first batch and the hundredth, and touch nothing else."""

from __future__ import annotations

from collections import namedtuple
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import loopwright as lw
from pictures import SIDE, N, images, net, seen_through, spy
from resumed import resumes_exactly
from tiny import acts, bits, classifier, same, samples, seed_all, sgd_task, trainer


def partners(y: Tensor) -> tuple[Tensor, Tensor]:
    """Of soft targets over N classes of N samples: the share of each sample itself, and the number of its partner."""
    own = y.diagonal()
    others = y - torch.diag(own)
    return own, torch.where(others.amax(1) == 0, torch.arange(len(y)), others.argmax(1))


@pytest.mark.parametrize("per_sample", [False, True])
def test_mixup_is_equation_1_of_its_paper_on_the_first_batch_and_the_hundredth(per_sample: bool) -> None:
    data = images(100)
    out = seen_through(lw.MixUp(0.4, classes=N, per_sample=per_sample), data=data)
    shares = []
    for (x, _), (mixed, y) in zip(data, out, strict=True):
        torch.testing.assert_close(y.sum(1), torch.ones(N))
        share, j = partners(y)
        assert per_sample or sorted(j.tolist()) == list(range(N))  # a permutation; a share may round to 1
        wide = share.view(-1, 1, 1, 1)
        torch.testing.assert_close(mixed, wide * x + (1 - wide) * x[j])
        swapped = share[j != torch.arange(N)]
        assert per_sample or len(swapped) == 0 or torch.equal(swapped, swapped[:1].expand_as(swapped))
        shares += swapped.tolist() if per_sample else swapped[:1].tolist()
    found = torch.tensor(shares)
    assert abs(found.mean() - 0.5) < 0.1
    assert abs(found.var() - 1 / (4 * (2 * 0.4 + 1))) < 0.03  # of Beta(0.4, 0.4)


def test_cutmix_pastes_a_rectangle_and_mixes_targets_by_its_area_on_the_first_batch_and_the_hundredth() -> None:
    data = images(100)
    areas = []
    for (x, _), (mixed, y) in zip(data, seen_through(lw.CutMix(classes=N), data=data), strict=True):
        share, j = partners(y)
        pasted = (mixed != x).any(1)  # [N, SIDE, SIDE]
        assert torch.equal(mixed, torch.where(pasted[:, None], x[j], x))
        for mask, own, partner, i in zip(pasted, share, j, range(N), strict=True):
            if partner == i:
                continue
            rows, columns = mask.any(1), mask.any(0)
            assert torch.equal(mask, rows[:, None] & columns[None])
            assert rows.sum() == rows.nonzero().max() - rows.nonzero().min() + 1
            assert own == 1 - torch.tensor(float(mask.sum())) / SIDE**2
            areas.append(float(mask.sum()) / SIDE**2)
    assert 0.1 < sum(areas) / len(areas) < 0.5
    assert len(set(areas)) > 10


@pytest.mark.filterwarnings("ignore:.*what the first has mixed is mixed again")
def test_training_on_mixed_batches_is_the_hand_written_loop_on_them() -> None:
    mixed: list[Any] = []
    first, data = net(), images(20)
    seed_all()
    trainer(epochs=1, callbacks=[lw.MixUp(classes=N), lw.CutMix(classes=N), spy(mixed)]).fit(
        sgd_task(first, lr=0.1, loss=nn.CrossEntropyLoss()), data
    )
    second = net()
    sgd = torch.optim.SGD(second.parameters(), lr=0.1)
    for x, y in mixed:
        sgd.zero_grad()
        nn.functional.cross_entropy(second(x), y).backward()
        sgd.step()
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_soft_targets_are_the_two_losses_of_the_paper() -> None:
    (x, labels), (mixed, y) = images()[0], seen_through(lw.MixUp(classes=N))[0]
    share, j = partners(y)
    logits = net()(mixed)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    others = nn.functional.cross_entropy(logits, labels[j], reduction="none")
    torch.testing.assert_close(nn.functional.cross_entropy(logits, y), (share * losses + (1 - share) * others).mean())
    assert not torch.equal(mixed, x)


@pytest.mark.parametrize("make", [lambda: lw.MixUp(classes=3), lambda: lw.RandomErasing(p=1.0)])
def test_the_global_generators_and_the_order_of_the_data_stay_as_they_are(make: Any) -> None:
    def ends(*callbacks: lw.Callback) -> tuple[list[Any], list[Any]]:
        seen: list[Any] = []
        seed_all()
        x, y = samples(30)
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.view(30, 1, 5, 1), y), 4, shuffle=True)
        model = nn.Sequential(nn.Flatten(), classifier(dropout=0.5))
        trainer(epochs=2, callbacks=[spy(seen), *callbacks]).fit(sgd_task(model, loss=nn.CrossEntropyLoss()), data)
        return seen, bits()

    assert same(ends(), ends(make()))


def test_the_draws_depend_on_the_key_the_epoch_and_the_batch() -> None:
    def shares(*before: lw.Callback, **settings: Any) -> list[float]:
        out = seen_through(*before, lw.MixUp(classes=N), data=images(4), **settings)
        return [float(partners(y)[0].min()) for _, y in out]

    twice = shares(epochs=2)
    assert len(set(twice)) == 8
    assert shares() == twice[:4]
    assert shares(accumulate=4) == twice[:4]  # whatever makes a window
    assert shares(seed=8) != twice[:4]
    assert shares(lw.EarlyStopping("train/loss")) == twice[:4]


@pytest.mark.filterwarnings("ignore:.*what the first has mixed is mixed again")
def test_two_of_a_kind_draw_differently() -> None:
    out: list[Any] = []
    seen_through(lw.MixUp(classes=N), spy(out), lw.MixUp(classes=N))
    again = seen_through(lw.MixUp(classes=N), lw.MixUp(classes=N))
    assert not torch.equal(out[0][1] @ out[0][1], again[0][1])


@pytest.mark.filterwarnings("ignore:.*what the first has mixed is mixed again")
def test_they_compose_in_the_order_of_the_list() -> None:
    between: list[Any] = []
    (mixed, y), (x, _) = seen_through(lw.MixUp(classes=N), spy(between), lw.CutMix(classes=N))[0], images()[0]
    (half, soft) = between[0]
    share, j = partners(soft)
    wide = share.view(-1, 1, 1, 1)
    torch.testing.assert_close(half, wide * x + (1 - wide) * x[j])
    mask = (mixed != half).any(1).any(0)  # CutMix cut what MixUp had made
    area = float(mask.sum()) / SIDE**2
    assert 0 < area < 1
    order = torch.cdist((y - (1 - area) * soft) / area, soft).argmin(1)
    torch.testing.assert_close(y, (1 - area) * soft + area * soft[order])
    assert torch.equal(mixed, torch.where(mask, half[order], half))


@pytest.mark.filterwarnings("ignore:.*what the first has mixed is mixed again")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_with_them_resumes_to_the_bit(accumulate: int, folder: Any) -> None:
    def make() -> tuple[Any, list[lw.Callback]]:
        model = net()
        adam = torch.optim.AdamW(model.parameters(), lr=0.01)
        callbacks = [lw.MixUp(classes=N), lw.CutMix(classes=N, p=0.5), lw.RandomErasing(p=0.7)]
        return lw.Supervised(model, nn.CrossEntropyLoss(), adam), callbacks

    resumes_exactly(make, lambda: images(4), accumulate=accumulate)


def test_a_capsule_replays_a_mixed_step_in_another_process(folder: Any) -> None:
    def make() -> lw.Supervised:
        model = net()
        return lw.Supervised(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))

    def fail(run: lw.Run, loss: Tensor, *args: Any) -> Tensor:
        return loss * (float("nan") if run.progress.step == 2 else 1.0)

    def trained(seed: int) -> tuple[list[Any], list[lw.Callback]]:
        seed_all(seed)  # the key of a run without a seed
        seen: list[Any] = []
        return seen, [lw.MixUp(classes=N), spy(seen), acts(map_loss=fail)]

    seen, callbacks = trained(3)
    with pytest.raises(lw.NonFiniteError):
        lw.Trainer(epochs=1, name="a", progress=False, callbacks=callbacks).fit(make(), images(3))
    (capsule,) = folder.glob("a/*/capsules/*")
    again, callbacks = trained(4)
    assert lw.replay(capsule, make(), callbacks=callbacks).same_error
    assert same(again[0], seen[2])


def test_only_a_share_of_the_batches_is_mixed() -> None:
    data = images(200)
    out = seen_through(lw.MixUp(classes=N, p=0.25), data=data)
    untouched = sum(torch.equal(x, mixed) for (x, _), (mixed, _) in zip(data, out, strict=True))
    assert 0.65 < untouched / 200 < 0.85
    assert all(y.shape == (N, N) for _, y in out)  # the loss gets one kind of targets


def test_metrics_of_training_are_fed_the_class_with_the_larger_share() -> None:
    seen: list[Any] = []
    for _, y in seen_through(lw.MixUp(classes=N), data=images(9)):
        seen += y.argmax(1).tolist()

    class Labels:
        def __init__(self) -> None:
            self.labels: list[int] = []

        def update(self, preds: Tensor, target: Tensor) -> None:
            self.labels += target.tolist()

        def compute(self) -> float:
            return float(self.labels == seen)

        def reset(self) -> None:
            self.labels = []

    task = lw.Supervised(net(), nn.CrossEntropyLoss(), lambda p: torch.optim.SGD(p, lr=0.0))
    task.metrics = {"labels": Labels(), "accuracy": lw.metrics.Accuracy()}
    run = trainer(epochs=1, seed=7, callbacks=[lw.MixUp(classes=N)]).fit(task, images(9), images(1))
    assert run.history["train/labels"] == [1.0]
    assert 0 <= run.metrics["train/accuracy"] <= 1


def test_validation_sees_whole_samples() -> None:
    seen: list[Any] = []
    look = acts(on_eval_batch_end=lambda run, output, batch: seen.append(batch))
    task = sgd_task(net(), loss=nn.CrossEntropyLoss())
    trainer(epochs=1, callbacks=[lw.MixUp(classes=N), look]).fit(task, images(2), images(1))
    assert same(list(seen[0]), list(images(1)[0]))


Pair = namedtuple("Pair", "image label")


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        ({"image": torch.rand(4, 3), "id": ["a"] * 4, "value": torch.rand(4, 2)}, ("image", "value")),
        ((torch.rand(4, 3), "kept", torch.rand(4)), (0, 2)),
        ([torch.rand(4, 3), torch.rand(4, 1)], (0, 1)),
        (Pair(torch.rand(4, 3), torch.rand(4)), (0, 1)),
    ],
)
def test_floating_targets_are_mixed_and_the_rest_of_the_batch_stays(batch: Any, names: Any) -> None:
    run = trainer(epochs=1).fit(sgd_task(nn.Linear(1, 1)), [(torch.ones(2, 1), torch.ones(2, 1))])
    mixup = lw.MixUp(inputs=names[0], target=names[1])
    mixup.on_fit_start(run)
    made = mixup.map_batch(run, batch)
    assert type(made) is type(batch)
    for key in batch if isinstance(batch, dict) else range(len(batch)):
        assert (key in names) != (made[key] is batch[key])
    joined = torch.cat([batch[names[0]], batch[names[1]].view(4, -1)], 1)
    mixed = torch.cat([made[names[0]], made[names[1]].view(4, -1)], 1)
    torch.testing.assert_close(mixed.sum(0), joined.sum(0))  # a permutation mixed by one share keeps the sum
    assert not torch.equal(mixed, joined)


@given(st.floats(0.05, 50), st.integers(0, 2**31))
def test_a_share_lies_between_0_and_1(alpha: float, seed: int) -> None:
    from loopwright.callbacks.draws import betas

    shares = betas(7, alpha, torch.Generator().manual_seed(seed))
    assert bool(((shares >= 0) & (shares <= 1)).all())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: lw.MixUp(0), "MixUp(alpha=0): expected a number above 0, as for Beta(alpha, alpha)"),
        (lambda: lw.CutMix(p=2), "CutMix(p=2): expected the share of batches to mix, above 0 and at most 1"),
        (lambda: lw.MixUp(classes=1), "MixUp(classes=1): expected the number of classes, from 2, or None"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(make: Any, text: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        make()
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("callback", "batch", "text"),
    [
        (lw.MixUp(), images()[0], "the target is int64[6]: class indices cannot be mixed as they are. Say how many "
         "classes there are, lw.MixUp(classes=10), to train on soft targets"),
        (lw.MixUp(), (torch.ones(3, 2).long(), torch.rand(3)), "MixUp needs floating inputs, a sample in each row; 0 "
         "of the batch is int64[3, 2]. Convert it in the dataset, or in lw.BatchTransform before"),
        (lw.MixUp(inputs="x"), {"image": torch.rand(3)}, "MixUp looks for 'x' in a batch {'image': float32[3]}. "
         "Known: 'image'."),
        (lw.MixUp(), (torch.rand(3, 2), torch.rand(2)), "MixUp needs a tensor of targets, one for each sample; got "
         "float32[2]"),
        (lw.CutMix(), (torch.rand(3, 2), torch.rand(3)), "CutMix needs images [samples, ..., height, width]; got "
         "float32[3, 2]. Give them that shape in the dataset, or take lw.MixUp, which mixes any inputs"),
        (lw.RandomErasing(), (torch.rand(3, 2), torch.rand(3)), "RandomErasing needs images [samples, ..., height, "
         "width]; got float32[3, 2]. Give them that shape in the dataset, or leave it out"),
        (lw.MixUp(classes=2), (torch.rand(3, 2), torch.tensor([0, 2, 1])), "the target has classes from 0 to 2, and "
         "MixUp(classes=2) makes soft targets for 0 to 1; say classes=3, and leave out samples without a class"),
        (lw.CutMix(classes=2), (torch.rand(1, 2, 2), torch.tensor([[-1, 1]])), "the target has classes from -1 to 1, "
         "and CutMix(classes=2) makes soft targets for 0 to 1; say classes=2, and leave out samples without a class"),
        (lw.MixUp(classes=3), (torch.rand(3, 2), torch.rand(3, 1)), "MixUp(classes=3) makes soft targets of class "
         "indices, and the target is float32[3, 1], which is mixed as it is; leave classes out"),
        (lw.RandomErasing(1.0, scale=(1, 1), ratio=(4, 4)), images()[0], "RandomErasing(scale=(1, 1), ratio=(4, 4)): "
         "of 1024 such rectangles none lies inside of an image of 8 x 8; ask for smaller ones"),
    ],
)  # fmt: skip
def test_batches_that_cannot_be_mixed_are_refused(callback: Any, batch: Any, text: str) -> None:
    run = trainer(epochs=1).fit(sgd_task(nn.Linear(1, 1)), [(torch.ones(2, 1), torch.ones(2, 1))])
    callback.on_fit_start(run)
    with pytest.raises(lw.DataError) as caught:
        callback.map_batch(run, batch)
    assert str(caught.value) == text


def test_soft_targets_of_so_many_classes_are_mixed_and_measured() -> None:
    soft = [(x, torch.eye(N)[y]) for x, y in images()]
    run = trainer(epochs=1, callbacks=[lw.MixUp(classes=N)]).fit(
        sgd_task(net(), loss=nn.CrossEntropyLoss(), metrics={"accuracy": lw.metrics.Accuracy()}), soft
    )
    assert 0 <= run.metrics["train/accuracy"] <= 1


@pytest.mark.parametrize("classes", [N + 2, N - 1])
def test_targets_of_other_classes_than_the_net_has_are_told_with_their_maker(classes: int) -> None:
    data = [(x, y.clamp(max=classes - 1)) for x, y in images()]
    with pytest.raises(RuntimeError) as caught:
        trainer(epochs=1, callbacks=[lw.MixUp(classes=classes)]).fit(sgd_task(net(), loss=nn.CrossEntropyLoss()), data)
    assert caught.value.__notes__[-1] == (
        f"[loopwright] MixUp(classes={classes}) has made the target float32[6, {classes}]: the loss has to take it, "
        "and the net to give as many scores for each sample"
    )


def test_what_is_sure_to_be_mixed_twice_is_warned_of() -> None:
    told = (
        "MixUp and CutMix both change a batch: what the first has mixed is mixed again. Say how often each is to: "
        "p=0.5, or leave one out"
    )
    task = sgd_task(net(), loss=nn.CrossEntropyLoss())

    def warnings_of(*callbacks: lw.Callback) -> list[str]:
        return trainer(epochs=1, callbacks=callbacks).plan(task, images()).warnings

    assert warnings_of(lw.MixUp(classes=N), lw.CutMix(classes=N)) == [told]
    assert warnings_of(lw.MixUp(classes=N, p=0.5), lw.CutMix(classes=N, p=0.6)) == [told]
    assert warnings_of(lw.MixUp(classes=N, p=0.5), lw.CutMix(classes=N, p=0.5)) == []
    assert warnings_of(lw.MixUp(classes=N), lw.CutMix(classes=N, inputs=1)) == []  # of another image
    stages = [lw.Stage("a", "1 epoch", callbacks=[lw.MixUp(classes=N)]),
              lw.Stage("b", "1 epoch", callbacks=[lw.CutMix(classes=N)])]  # fmt: skip
    assert trainer().plan(task, images(), stages=stages).warnings == []


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (nn.NLLLoss(), "NLLLoss takes class indices alone"),
        (nn.functional.nll_loss, "nll_loss takes class indices alone"),
        (lw.losses.Weighted({"ce": nn.CrossEntropyLoss(), "margin": nn.MultiMarginLoss()}), "MultiMarginLoss takes "
         "class indices alone"),
        (nn.CrossEntropyLoss(ignore_index=0), "CrossEntropyLoss(ignore_index=0) needs class indices to leave one out"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), None),
        (nn.MSELoss(), None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("of_stage", [False, True])
def test_a_loss_that_takes_no_soft_targets_is_refused_before_anything_runs(
    loss: Any, text: str | None, of_stage: bool
) -> None:
    """Losses that are refused are those that torch refuses."""
    task = sgd_task(net(), loss=nn.CrossEntropyLoss() if of_stage else loss)
    stages = [lw.Stage("one", until="1 epoch", loss=loss if of_stage else None)]
    user = trainer(callbacks=[lw.CutMix(classes=N)])
    told = user.plan(task, images(1), stages=stages).problems
    assert told == (
        []
        if text is None
        else [
            f"CutMix makes soft targets, rows of a share for each class, and {text}; train with "
            "nn.CrossEntropyLoss(), on scores without a softmax, or leave it out"
        ]
    )
    preds, target = torch.rand(2, 3).log_softmax(1), torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    with nullcontext() if text is None else pytest.raises((RuntimeError, ValueError)):
        loss(preds, target)
