"""Changes remembers who changed what in the last steps, in order, and costs nothing where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopwright as lw
from loopwright.events import Hooks
from tiny import bits, classifier, line, loader, pairs, same, seed_all, sgd_task, trainer


class Double(lw.Callback):
    def map_loss(self, run: lw.Run, loss: Tensor, output: Any, batch: Any, phase: lw.Phase) -> Tensor:
        return loss * 2


class Add(lw.Callback):
    def map_loss(self, run: lw.Run, loss: Tensor, output: Any, batch: Any, phase: lw.Phase) -> Tensor:
        return loss + (run.progress.step == 2)  # the third step only

    def map_batch(self, run: lw.Run, batch: Any) -> Any:
        return [batch[0] + 1, batch[1]]


class InPlace(lw.Callback):
    def map_loss(self, run: lw.Run, loss: Tensor, output: Any, batch: Any, phase: lw.Phase) -> Tensor:
        return loss.mul_(3)

    def on_grads_ready(self, run: lw.Run, phase: lw.Phase, grad_norm: Any) -> None:
        for p in phase.parameters():
            p.grad.zero_()


class Looks(lw.Callback):
    def map_output(self, run: lw.Run, output: Any, batch: Any, phase: lw.Phase) -> Any:
        return output

    def on_backward_end(self, run: lw.Run, loss: Tensor, output: Any, batch: Any, phase: lw.Phase) -> None:
        loss.detach().item()


def ones(preds: Tensor, target: Tensor) -> Tensor:
    return preds.mean() * 0 + 1


@pytest.mark.capability("B-08")
def test_who_changed_the_loss_is_told_in_order_after_the_run() -> None:
    """who_changed("loss", step=3) lists both callbacks that edited it, in order, with values; without it no cost."""
    changes = lw.Changes()
    user = trainer(steps=5, callbacks=[Double(), Looks(), Add(), changes])
    user.fit(sgd_task(line(), loss=ones), pairs(*[[1.0]] * 5))
    assert changes.who_changed("loss", step=3) == ["Double.map_loss: 1 -> 2", "Add.map_loss: 2 -> 3"]
    assert changes.who_changed("loss", step=4) == ["Double.map_loss: 1 -> 2"]
    assert changes.who_changed("batch", step=4) == ["Add.map_batch: batch[0]"]
    assert changes.who_changed("output", step=4) == changes.who_changed("gradients", step=4) == []

    hooks = Hooks([Double(), Add()])
    assert [one.__func__ for one in hooks.map_loss] == [Double.map_loss, Add.map_loss]  # the bare methods, unwrapped


def test_edits_in_place_are_seen_also_of_gradients_and_by_handlers() -> None:
    changes = lw.Changes()
    user = trainer(steps=2, callbacks=[changes, InPlace()])

    @user.on(lw.Event.GRADS_READY(once=2))
    def refill(run: lw.Run) -> None:
        run.models["model"].weight.grad.fill_(7.0)

    user.fit(sgd_task(line()), pairs([1.0], [1.0]))
    assert changes.who_changed("gradients", step=1) == ["InPlace.on_grads_ready: weight"]
    (first, second) = changes.who_changed("gradients", step=2)
    assert first == "InPlace.on_grads_ready: weight"
    assert second.endswith("refill, at GRADS_READY(once=2): weight")
    task = sgd_task(line(1.0), loss=lambda preds, target: preds.sum())
    user.fit(task, pairs([1.0], [1.0]))
    assert changes.who_changed("loss", step=2) == ["InPlace.map_loss: 1 -> 3"]


def test_every_batch_of_a_window_and_every_phase_is_told() -> None:
    class Two(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = line(1.0)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def phases(self) -> list[lw.Phase]:
            return [lw.Phase(n, lambda batch: self.net(batch[0]).mean()) for n in ("a", "b")]

    changes = lw.Changes()
    trainer(steps=1, accumulate=2, callbacks=[Double(), changes]).fit(Two(), pairs([1.0], [3.0]))
    assert changes.who_changed("loss", step=1) == [
        f"Double.map_loss, phase {name!r}: {value} -> {2 * value}" for name in "ab" for value in (1, 3)
    ]


def test_only_the_last_steps_are_remembered_and_no_batch_is_held() -> None:
    changes = lw.Changes(steps=2)
    user = trainer(steps=9, callbacks=[Double(), Add(), changes])
    user.fit(sgd_task(line(), loss=ones), pairs(*[[1.0]] * 9))
    assert changes.who_changed("loss", step=8) == changes.who_changed("loss", step=9) == ["Double.map_loss: 1 -> 2"]
    held = [how for told in changes._ring.values() for _, _, how in told]
    assert len(changes._ring) == 2
    assert all(isinstance(how, list) or how[0].ndim == 0 for how in held)
    for step in (7, 10, 0):
        with pytest.raises(lw.SettingError) as caught:
            changes.who_changed("loss", step=step)
        assert str(caught.value) == (
            f"who_changed(step={step}) is not remembered (steps 8 to 9); Changes(steps=...) more"
        )
    with pytest.raises(
        lw.SettingError, match=r"who_changed\('los'\): nothing here is called so. Known: 'batch', 'grad"
    ):
        changes.who_changed("los", step=9)
    with pytest.raises(lw.SettingError, match="steps none yet"):
        lw.Changes().who_changed("loss", step=1)
    with pytest.raises(lw.SettingError, match=r"Changes\(steps=0\): expected how many steps to remember, from 1"):
        lw.Changes(steps=0)


def test_looking_changes_no_bit() -> None:
    def fitted(*more: lw.Callback) -> list[Any]:
        seed_all(5)
        net = classifier(dropout=0.4, batch_norm=True)
        task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), 0.01))
        user = trainer(epochs=2, callbacks=[Double(), InPlace(), lw.MixUp(classes=3), *more], seed=1)
        user.fit(task, loader(20, batch_size=4, shuffle=True, noisy=True))
        return bits(net)

    assert same(fitted(lw.Changes()), fitted())
