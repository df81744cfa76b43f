"""A weight penalty is a term of the loss, as written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopwright as lw
from resumed import resumes_exactly
from tiny import classifier, line, loader, pairs, samples, sgd_task, trainer


def by_hand(net: nn.Module, term: Any, *, lr: float = 0.1, **sgd: Any) -> nn.Module:
    x, y = samples(100)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, **sgd)
    for rows in torch.arange(100).split(1):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x[rows]), y[rows]) + term(net)
        loss.backward()
        optimizer.step()
    return net


def fitted(*penalties: lw.Callback, **settings: Any) -> tuple[nn.Module, lw.Run]:
    net = classifier()
    x, y = samples(100)
    task = sgd_task(net, lr=0.1, loss=nn.CrossEntropyLoss())
    run = trainer(epochs=1, callbacks=penalties, **settings).fit(task, list(zip(x.split(1), y.split(1), strict=True)))
    return net, run


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


def test_l1_is_the_sum_of_absolute_values_as_by_hand_over_100_steps() -> None:
    hand = by_hand(classifier(), lambda net: 0.01 * sum(p.abs().sum() for p in net.parameters()))
    net, _ = fitted(lw.Penalty("l1", 0.01))
    assert same_weights(net, hand)
    assert not same_weights(net, fitted()[0])


def test_l2_is_half_the_sum_of_squares_and_so_the_weight_decay_of_sgd() -> None:
    hand = by_hand(classifier(), lambda net: 0.01 * sum(p.square().sum() / 2 for p in net.parameters()))
    net, _ = fitted(lw.Penalty("l2", 0.01))
    assert same_weights(net, hand)
    decayed = by_hand(classifier(), lambda net: 0.0, weight_decay=0.01)
    for a, b in zip(net.parameters(), decayed.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_function_of_the_parameters_that_a_pattern_matches() -> None:
    def orthogonal(weight: Tensor) -> Tensor:
        return (weight @ weight.T - torch.eye(len(weight))).square().sum()

    hand = by_hand(classifier(), lambda net: 0.01 * orthogonal(net[0].weight))
    net, run = fitted(lw.Penalty(orthogonal, 0.01, parameters="module.0.weight"))
    assert same_weights(net, hand)
    assert run.metrics["train/penalty_orthogonal"] > 0


def test_the_term_is_logged_and_part_of_the_loss() -> None:
    net = line(3.0)
    callbacks = [lw.Penalty("l1", 0.5), lw.Penalty("l1", 0.25)]
    run = trainer(epochs=1, callbacks=callbacks).fit(sgd_task(net, lr=0.0), pairs([1], [2]), pairs([5]))
    assert run.history["train/penalty_l1"] == [0.75 * 3]
    assert run.history["train/loss"] == [4.5 + 0.75 * 3]
    assert run.history["valid/loss"] == [15.0]


def test_a_window_is_penalised_once_and_clipped_with_it() -> None:
    net = line(3.0)
    trainer(epochs=1, accumulate=3, callbacks=[lw.Penalty("l1", 0.5)]).fit(sgd_task(net), pairs([1, 1], [1], [2]))
    assert net.weight.item() == 3.0 - (5 / 4 + 0.5)
    net = line(3.0)
    trainer(epochs=1, clip_norm=1.0, callbacks=[lw.Penalty("l1", 9.0)]).fit(sgd_task(net), pairs([1]))
    assert net.weight.item() == pytest.approx(2.0)


def test_what_does_not_train_is_not_penalised() -> None:
    net = classifier()
    net[0].requires_grad_(False)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.0))
    run = trainer(epochs=1, callbacks=[lw.Penalty("l1", 1.0)]).fit(task, loader(batch_size=8))
    expected = sum(p.abs().sum().item() for p in net[2].parameters())
    assert run.metrics["train/penalty_l1"] == pytest.approx(expected)


def test_each_stage_and_a_replaced_model_are_looked_at_anew() -> None:
    net, other = line(3.0), line(7.0)
    user = trainer(epochs=2, callbacks=[lw.Penalty("l1", 1.0)])

    @user.on(lw.Event.EPOCH_END(once=1))
    def change(run: lw.Run) -> None:
        run.replace("model", other)
        run.replace("optimizer", torch.optim.SGD(other.parameters(), lr=0.0))

    run = user.fit(sgd_task(net, lr=0.0), pairs([1]))
    assert run.history["train/penalty_l1"] == [3.0, 7.0]


def test_a_run_with_it_resumes_to_the_bit(folder: Any) -> None:
    def make() -> tuple[Any, list[lw.Callback]]:
        net = classifier(dropout=0.2)
        adam = torch.optim.Adam(net.parameters(), lr=0.01)
        return lw.Supervised(net, nn.CrossEntropyLoss(), adam), [lw.Penalty("l1", 0.01), lw.Penalty("l2", 0.01)]

    resumes_exactly(make, lambda: loader(20, batch_size=5, shuffle=True))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: lw.Penalty("l3", 1.0), "Penalty('l3') is unknown; give a function of a parameter. Known: 'l1', 'l2'."),
        (lambda: lw.Penalty("l1", 0.0), "Penalty(strength=0.0): expected a number above 0"),
        (lambda: lw.Penalty(3, 1.0), "Penalty(3) cannot be called; pass 'l1', 'l2' or a function of a parameter"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_used_are_refused(make: Any, text: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        make()
    assert str(caught.value) == text


def test_a_pattern_that_matches_nothing_is_refused_before_the_first_step() -> None:
    net = line(1.0)
    with pytest.raises(lw.SettingError, match=r"the pattern 'head' matches no parameter\. Known: 'module\.weight'"):
        trainer(epochs=1, callbacks=[lw.Penalty("l1", 1.0, parameters="head")]).fit(sgd_task(net), pairs([1]))
    assert net.weight.item() == 1.0


def test_a_step_that_does_all_the_work_is_refused() -> None:
    with pytest.raises(lw.SettingError, match="Penalty cannot apply to a step that does all the work"):
        trainer(epochs=1, callbacks=[lw.Penalty("l1", 1.0)]).run(lambda run, batch: None, [1], state={})
