"""An optimizer step over several batches is a step over one big batch: true means, whatever the window holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import loopwright as lw
from tiny import Batches, acts, bits, classifier, line, loader, pairs, same, samples, sgd_task, trainer


def gradients(data: Any, *callbacks: lw.Callback, **settings: Any) -> list[float]:
    """The gradient of each optimizer step; with the loss of ``sgd_task`` it is the mean of x over the window."""
    seen: list[float] = []
    net = line()
    look = acts(on_grads_ready=lambda run, phase, norm: seen.append(net.weight.grad.item()))  # type: ignore[union-attr]
    weight = settings.pop("weight", None)
    trainer(**{"epochs": 1, **settings}, callbacks=[*callbacks, look]).fit(sgd_task(net), data, weight=weight)
    return seen


def generated(data: Batches) -> Callable[[], Any]:
    """The same batches from a generator, which tells no sizes: windows are read ahead."""
    return lambda: iter(data)


BOTH = pytest.mark.parametrize("given_as", [list, generated], ids=["planned", "read ahead"])


@pytest.mark.capability("B-05", "PL-09")
@BOTH
def test_a_window_of_unequal_batches_is_the_mean_over_its_samples(given_as: Callable[..., Any]) -> None:
    """Accumulation by one argument: the gradient of a window is the mean over its samples, not over its batches."""
    data = given_as(pairs([1, 2, 3], [6], [4, 4]))
    assert gradients(data, accumulate=2) == [3.0, 4.0]  # (1 + 2 + 3 + 6) / 4; not the mean of 2 and 6


@pytest.mark.capability("B-05")
@BOTH
@pytest.mark.parametrize("last", [1, 2])
def test_a_short_last_window_is_a_true_mean_and_is_stepped(given_as: Callable[..., Any], last: int) -> None:
    """A last window of fewer batches than ``accumulate`` is divided by what it holds, and moves the weights."""
    data = given_as(pairs([1, 1], [1, 1], [1, 1], *[[2.0, 4.0]] * last))
    assert gradients(data, accumulate=3) == [1.0, 3.0]
    net = line()
    run = trainer(epochs=1, accumulate=3).fit(sgd_task(net), given_as(pairs([1, 1], [1, 1], [1, 1], [2, 4])))
    assert net.weight.item() == -1.0 - 3.0
    assert run.progress[:6] == (1, 1, 0, 2, 0, 8)


@pytest.mark.capability("B-05")
@pytest.mark.filterwarnings("ignore:accumulate=")
@given(st.integers(1, 9), st.integers(1, 6), st.integers(2, 37))
def test_accumulation_equals_the_big_batch(size: int, window: int, n: int) -> None:
    """Steps over windows of small batches equal steps over the big batches to 1e-6, ragged tail and schedule too."""
    data, ends = TensorDataset(*samples(n)), []
    for batch_size, accumulate in ((size, window), (size * window, 1)):
        net = classifier()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        task = lw.Supervised(net, nn.CrossEntropyLoss(), optimizer, schedule=lw.per_step(StepLR(optimizer, 2, 0.5)))
        run = trainer(epochs=2, accumulate=accumulate).fit(task, DataLoader(data, batch_size))
        ends.append((run.progress.step, run.lr, run.history.losses["loss"], net))
    (steps, lr, losses, net), (big_steps, big_lr, big_losses, big) = ends
    assert (steps, lr) == (big_steps, big_lr)
    assert list(losses) == pytest.approx(list(big_losses), abs=1e-6)
    for p, q in zip(net.parameters(), big.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.capability("B-05")
def test_tokens_weigh_the_batches_of_a_window() -> None:
    """``weight=`` counts tokens instead of samples: a window is the mean over its tokens."""

    def masked_mean(preds: Tensor, mask: Tensor) -> Tensor:
        return (preds * mask).sum() / mask.sum()

    x = [torch.tensor([[1.0], [2.0], [9.0]]), torch.tensor([[5.0], [9.0], [9.0]])]
    masks = [torch.tensor([[1.0], [1.0], [0.0]]), torch.tensor([[1.0], [0.0], [0.0]])]
    net = line()
    task = sgd_task(net, loss=masked_mean)
    run = trainer(epochs=1, accumulate=2).fit(
        task, list(zip(x, masks, strict=True)), weight=lambda b: b[1].sum().item()
    )
    assert net.weight.item() == pytest.approx(-(1 + 2 + 5) / 3)
    assert run.progress.samples == 3
    assert run.metrics["train/loss"] == 0.0


def test_the_loss_of_a_window_is_logged_as_its_mean() -> None:
    net = line(1.0)
    run = trainer(epochs=1, accumulate=2, log_every=1).fit(sgd_task(net, lr=0.0), pairs([1, 2, 3], [6], [4, 4]))
    assert list(run.history.losses["loss"]) == [3.0, 4.0]
    assert run.history["train/loss"] == [(3.0 * 4 + 4.0 * 2) / 6]


# ------------------------------------------------------------------------------------------------- skipped, changed


def skip(value: float) -> lw.Callback:
    def without(run: lw.Run, batch: Any) -> None:
        if batch[0][0].item() == value:
            raise lw.SkipBatch

    return acts(on_batch_start=without)


@pytest.mark.capability("B-05")
@BOTH
def test_a_skipped_batch_leaves_a_true_mean_of_the_others(given_as: Callable[..., Any]) -> None:
    data = given_as(pairs([1, 2, 3], [6], [4, 4]))
    assert gradients(data, skip(6), accumulate=3) == pytest.approx([14 / 5])
    assert gradients(data, skip(6), accumulate=2) == [2.0, 4.0]
    assert gradients(data, skip(4), accumulate=2) == [3.0]  # the second window has nothing to step


def test_skipped_batches_are_not_counted_as_samples_but_as_batches() -> None:
    progress = []
    watch = acts(on_step_end=lambda run, result: progress.append((run.progress.batch, run.progress.samples)))
    net = line()
    data = pairs([1, 1], [6, 6], [2, 2])
    run = trainer(epochs=1, callbacks=[skip(6), watch]).fit(sgd_task(net), data)
    assert progress == [(1, 2), (3, 4)]
    assert run.progress.step == 2
    assert net.weight.item() == -3.0
    assert list(run.history.losses["loss"]) == [0.0, -2.0]


def test_a_loss_of_a_window_with_a_skipped_batch_is_the_mean_of_the_others() -> None:
    net = line(1.0)
    run = trainer(epochs=1, accumulate=3, callbacks=[skip(6)]).fit(sgd_task(net, lr=0.0), pairs([1, 2, 3], [6], [4, 4]))
    assert run.metrics["train/loss"] == pytest.approx(14 / 5)
    assert run.progress.samples == 5


@pytest.mark.capability("B-05")
@BOTH
def test_a_hook_may_change_the_size_of_a_batch_inside_a_window(given_as: Callable[..., Any]) -> None:
    def cut(run: lw.Run, batch: Any) -> Any:
        return [part[:1] for part in batch]

    data = given_as(pairs([1, 9, 9], [6], [4, 9]))
    assert gradients(data, acts(map_batch=cut), accumulate=2) == [3.5, 4.0]
    assert gradients(data, acts(map_batch=cut)) == [1.0, 6.0, 4.0]


@pytest.mark.parametrize("hook", ["map_batch", "map_output", "map_loss"])
@BOTH
def test_stop_epoch_inside_a_window_steps_what_is_there(given_as: Callable[..., Any], hook: str) -> None:
    """Raised before the backward of a batch, it leaves that batch out; those before it are stepped as a true mean."""
    calls = []

    def stop(run: lw.Run, value: Any, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise lw.StopEpoch
        return value

    data = given_as(pairs([1, 2, 3], [6], [5, 5], [7]))
    net = line()
    run = trainer(epochs=2, accumulate=4, callbacks=[acts(**{hook: stop})]).fit(sgd_task(net), data)
    second = (1 + 2 + 3 + 6 + 5 + 5 + 7) / 7
    assert net.weight.item() == pytest.approx(-3.0 - second)
    assert run.progress[:6] == (1, 2, 0, 2, 0, 4 + 7)


@BOTH
def test_stop_epoch_after_a_backward_keeps_its_gradient(given_as: Callable[..., Any]) -> None:
    def stop(run: lw.Run, loss: Tensor, output: Any, batch: Any, phase: lw.Phase) -> None:
        if batch[0][0].item() == 6:
            raise lw.StopEpoch

    data = given_as(pairs([1, 2, 3], [6], [5, 5], [7]))
    assert gradients(data, acts(on_backward_end=stop), accumulate=4) == pytest.approx([3.0])
    assert gradients(data, acts(on_backward_end=stop)) == [2.0, 6.0]


@BOTH
@pytest.mark.parametrize("hook", ["map_batch", "map_loss", "on_backward_end"])
def test_skip_step_uses_up_the_whole_window(given_as: Callable[..., Any], hook: str) -> None:
    """A step dropped at the first batch of its window does not move the borders of the next windows."""
    calls = []

    def drop(run: lw.Run, value: Any, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise lw.SkipStep
        return None if hook == "on_backward_end" else value

    data = given_as(pairs([1], [2], [3], [5], [6], [8]))
    assert gradients(data, acts(**{hook: drop}), accumulate=2) == [4.0, 7.0]


def test_skip_step_before_a_window_uses_it_up() -> None:
    def drop(run: lw.Run) -> None:
        if run.progress.batch == 0:
            raise lw.SkipStep

    seen: list[int] = []
    watch = acts(on_step_start=drop, on_step_end=lambda run, result: seen.append(run.progress.batch))
    assert gradients(pairs([1], [2], [3], [5], [6]), watch, accumulate=2) == [4.0, 6.0]
    assert seen == [4, 5]


# ---------------------------------------------------------------------------------------------------------- details


def test_a_loss_of_shape_1_can_be_accumulated() -> None:
    net = line()
    task = sgd_task(net, loss=lambda preds, target: preds.mean().reshape(1))
    trainer(epochs=1, accumulate=2).fit(task, pairs([1, 2, 3], [6]))
    assert net.weight.item() == -3.0


def test_clipping_looks_at_the_whole_window() -> None:
    norms = []
    watch = acts(on_step_end=lambda run, result: norms.append(result.grad_norm.item()))
    assert gradients(pairs([2, 4], [6, 12]), watch, accumulate=2, clip_norm=3.0) == pytest.approx([3.0])
    assert norms == [6.0]


def test_batches_of_a_window_are_fetched_one_at_a_time() -> None:
    """With known sizes no batch is fetched before the one before it has gone backward, as in a hand-written loop."""
    order: list[str] = []

    class Told(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> Any:
            order.append(f"read {i}")
            return torch.ones(1), torch.zeros(1)

    watch = acts(on_backward_end=lambda *args: order.append("backward"))
    data = DataLoader(Told(), batch_size=1)
    gradients(data, watch, accumulate=2)
    assert order == [f"{what}" for i in range(4) for what in (f"read {i}", "backward")]
    order.clear()
    gradients(data, watch, accumulate=2, weight=lambda batch: 1.0)
    assert order[:3] == ["read 0", "read 1", "backward"]


@pytest.mark.filterwarnings("ignore:accumulate=")
def test_a_window_of_one_batch_has_the_bits_of_no_accumulation() -> None:
    nets = [classifier(), classifier()]
    for net, accumulate in zip(nets, (1, 50), strict=True):
        trainer(epochs=2, accumulate=accumulate).fit(
            sgd_task(net, lr=0.1, loss=nn.CrossEntropyLoss()), loader(batch_size=37)
        )
    assert same(bits(nets[0])[0], bits(nets[1])[0])
