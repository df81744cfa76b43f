"""Several losses as one: the weighted sum, each term logged by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopwright as lw
from tiny import classifier, line, loader, pairs, sgd_task, trainer


def rows(*values: float) -> Any:
    return [(torch.tensor(values).view(-1, 1), torch.zeros(len(values), 1))]


def test_it_is_the_weighted_sum_and_every_term_is_logged_in_training_and_validation() -> None:
    """With x = 2, weight 3 and target 0: mse 36, l1 6."""
    net = line(3.0)
    loss = lw.losses.Weighted({"mse": nn.MSELoss(), "l1": nn.functional.l1_loss}, {"l1": 0.5})
    run = trainer(epochs=1).fit(sgd_task(net, lr=0.1, loss=loss), rows(2.0), rows(1.0))
    assert run.history["train/loss"] == [39.0]
    assert (run.metrics["train/mse"], run.metrics["train/l1"]) == (36.0, 6.0)
    weight = 3.0 - 0.1 * (2 * 6 * 2 + 0.5 * 2)
    assert net.weight.item() == pytest.approx(weight)
    assert run.metrics["valid/mse"] == pytest.approx(weight**2)
    assert run.metrics["valid/loss"] == pytest.approx(weight**2 + 0.5 * weight)


def test_it_has_the_bits_of_the_sum_by_hand_over_100_steps() -> None:
    first, second = classifier(), classifier()
    x, y = torch.randn(100, 5), torch.randint(3, (100,))
    loss = lw.losses.Weighted({"ce": nn.CrossEntropyLoss(), "margin": nn.MultiMarginLoss()}, {"margin": 0.3})
    task = sgd_task(first, lr=0.1, loss=loss)
    trainer(epochs=1).fit(task, list(zip(x.split(1), y.split(1), strict=True)))
    sgd = torch.optim.SGD(second.parameters(), lr=0.1)
    for one, label in zip(x.split(1), y.split(1), strict=True):
        sgd.zero_grad()
        out = second(one)
        (nn.functional.cross_entropy(out, label) + 0.3 * nn.functional.multi_margin_loss(out, label)).backward()
        sgd.step()
    assert all(map(torch.equal, first.parameters(), second.parameters()))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.label, self.size = nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"label": self.label(x), "size": self.size(x)}


def test_heads_and_targets_are_matched_by_name() -> None:
    net, x = Heads(), torch.randn(4, 5)
    target = {"label": torch.tensor([0, 1, 2, 0]), "size": torch.randn(4, 1)}
    loss = lw.losses.Weighted({"label": nn.CrossEntropyLoss(), "size": nn.MSELoss()}, {"size": 2.0}, by_name=True)
    expected = nn.functional.cross_entropy(net(x)["label"], target["label"])
    expected = expected + 2.0 * nn.functional.mse_loss(net(x)["size"], target["size"])
    run = trainer(epochs=1).fit(sgd_task(net, lr=0.1, loss=loss), [(x, target)])
    assert run.metrics["train/loss"] == pytest.approx(expected.item())
    with pytest.raises(lw.StepOutputError) as caught:
        loss({"lable": x}, target)
    assert str(caught.value) == (
        "the loss 'label' looks for its preds by name, in {'lable': float32[4, 5]}. Known: 'lable'. "
        "Did you mean 'lable'?"
    )


def test_a_term_can_be_monitored() -> None:
    loss = lw.losses.Weighted({"mse": nn.MSELoss()})
    user = trainer(epochs=3, callbacks=[lw.EarlyStopping("valid/mse", mode="min", patience=1)])
    assert user.fit(sgd_task(line(1.0), lr=0.0, loss=loss), rows(1.0), rows(1.0)).progress.epoch == 2
    user = trainer(epochs=3, callbacks=[lw.EarlyStopping("valid/mes", mode="min")])
    with pytest.raises(lw.PlanError, match=r"which nothing produces\. Known: 'valid/loss', 'valid/mse'"):
        user.fit(sgd_task(line(1.0), loss=loss), rows(1.0), rows(1.0))


def test_a_loss_with_weights_of_its_own_is_in_checkpoints_and_moves_with_the_model() -> None:
    loss = lw.losses.Weighted({"ce": nn.CrossEntropyLoss(weight=torch.ones(3))})
    task = sgd_task(classifier(), lr=0.1, loss=loss)
    assert list(task.models()["loss"].state_dict()) == ["ce.weight"]
    trainer(epochs=1, precision="fp64").fit(task, loader(batch_size=8))


def test_any_loss_may_return_a_dict() -> None:
    class Own:
        terms = ("twice",)

        def __call__(self, preds: Tensor, target: Tensor) -> dict[str, Tensor]:
            return {"loss": preds.mean(), "twice": 2 * preds.mean()}

    run = trainer(epochs=1).fit(sgd_task(line(1.0), lr=0.0, loss=Own()), pairs([3]))
    assert run.metrics["train/twice"] == 6.0


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: lw.losses.Weighted({}), "Weighted({}): expected losses by name, functions of (preds, target)"),
        (lambda: lw.losses.Weighted({"a": nn.MSELoss()}, {"b": 1}), "weights has 'b', which is no loss. Known: 'a'."),
        (lambda: lw.losses.Weighted({"a": nn.MSELoss()}, {"a": float("nan")}), "the weight of the loss 'a' is nan: "
         "expected a finite number"),
        (lambda: lw.losses.Weighted({"a": nn.MSELoss()}, {"a": "1"}), "the weight of the loss 'a' is '1': expected a "
         "finite number"),
        (lambda: lw.losses.Weighted({"loss": nn.MSELoss()}), "a loss cannot be named 'loss'; call it something else"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_used_are_refused(make: Any, text: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        make()
    assert str(caught.value) == text
