"""The step functions against the formulas of their papers, written out for one tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopwright as lw
from loopwright.optim import Stepwise, adam, decay, lamb, lookahead, radam, sgd
from tiny import trainer


def gradients(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(n)]


def descended(optimizer: Any, weight: Tensor, n: int) -> Tensor:
    for grad in gradients(n):
        weight.grad = grad
        optimizer.step()
    return weight.detach()


def start() -> nn.Parameter:
    return nn.Parameter(torch.arange(6, dtype=torch.float64).view(3, 2) / 4)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lamb_is_algorithm_2_of_its_paper(weight_decay: float) -> None:
    x, m, v = start().detach(), torch.zeros(3, 2).double(), torch.zeros(3, 2).double()
    for t, g in enumerate(gradients(20), 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        r = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-6) + weight_decay * x
        x = x - 0.01 * x.norm() / r.norm() * r
    weight = start()
    ours = descended(Stepwise([weight], [lamb], lr=0.01, weight_decay=weight_decay), weight, 20)
    assert torch.allclose(ours, x, rtol=1e-12, atol=0)


def test_the_trust_ratio_of_lamb_is_one_for_weights_of_zero() -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, -2.0])
    Stepwise([weight], [lamb], lr=0.5, eps=0.0).step()
    assert weight.tolist() == pytest.approx([-0.5, 0.5])
    weight.grad = torch.zeros(2)
    still = Stepwise([weight], [lamb], lr=0.5)
    still.step()  # an update of zeros has no length
    assert weight.tolist() == pytest.approx([-0.5, 0.5])


@pytest.mark.parametrize(("k", "alpha"), [(5, 0.5), (3, 0.8)])
def test_lookahead_is_algorithm_1_of_its_paper(k: int, alpha: float) -> None:
    fast = start()
    slow, inner = fast.detach().clone(), torch.optim.SGD([fast], 0.1, momentum=0.9)
    for t, g in enumerate(gradients(11), 1):
        fast.grad = g
        inner.step()
        if t % k == 0:
            slow += alpha * (fast.detach() - slow)
            fast.data.copy_(slow)
    weight = start()
    ours = Stepwise([weight], lookahead(sgd), lr=0.1, momentum=0.9, k=k, alpha=alpha)
    assert torch.allclose(descended(ours, weight, 11), fast.detach(), rtol=1e-13, atol=0)
    assert torch.allclose(ours.state[weight]["slow"], slow, rtol=1e-13, atol=0)


def test_radam_is_momentum_alone_until_the_variance_can_be_told() -> None:
    """With beta2 = 0.999 the approximated length passes 5 at the sixth step."""
    weight, x, m = start(), start().detach(), torch.zeros(3, 2).double()
    optimizer = Stepwise([weight], [radam], lr=0.1)
    for t, g in enumerate(gradients(6), 1):
        m = 0.9 * m + 0.1 * g
        x = x - 0.1 * m / (1 - 0.9**t)
        weight.grad = g
        optimizer.step()
        assert torch.allclose(weight.detach(), x, rtol=1e-12, atol=0) is (t < 6)


@pytest.mark.parametrize("capturable", [False, True])
def test_radam_whose_variance_is_never_told_is_momentum_alone(capturable: bool) -> None:
    """With beta2 = 0.6 the longest length is 4, for which the rectification is not defined."""
    weight, x, m = start(), start().detach(), torch.zeros(3, 2).double()
    for t, g in enumerate(gradients(8), 1):
        m = 0.9 * m + 0.1 * g
        x = x - 0.1 * m / (1 - 0.9**t)
    optimizer = Stepwise([weight], [radam], lr=0.1, betas=(0.9, 0.6), capturable=capturable)
    assert torch.allclose(descended(optimizer, weight, 8), x, rtol=1e-5, atol=0)


def test_decay_is_added_to_the_gradient_or_taken_from_the_weights() -> None:
    for decoupled, expected in ((False, 2 - 0.1 * (1 + 0.5 * 2)), (True, 2 * (1 - 0.1 * 0.5) - 0.1)):
        weight = nn.Parameter(torch.tensor([2.0]))
        weight.grad = torch.ones(1)
        Stepwise([weight], [decay, sgd], lr=0.1, weight_decay=0.5, decoupled_weight_decay=decoupled).step()
        assert weight.item() == pytest.approx(expected)
        assert weight.grad.item() == 1.0  # the gradient itself is left alone


def test_the_order_of_the_functions_is_that_of_the_list() -> None:
    found = []
    for steps in ([decay, sgd], [sgd, decay]):
        weight = nn.Parameter(torch.tensor([2.0]))
        weight.grad = torch.ones(1)
        Stepwise([weight], steps, lr=0.5, weight_decay=1.0, decoupled_weight_decay=True).step()
        found.append(weight.item())
    assert found == [0.5, 0.75]


def test_steps_are_counted_only_where_a_function_asks() -> None:
    weight = start()
    descended(optimizer := Stepwise([weight], [sgd], lr=0.1, momentum=0.9), weight, 3)
    assert set(optimizer.state[weight]) == {"momentum_buffer"}
    descended(optimizer := Stepwise([weight], [adam]), weight, 3)
    assert optimizer.state[weight]["step"].item() == 3


@pytest.mark.capability("CA-24")
@pytest.mark.parametrize("name", ["adamw", "ranger"])
def test_the_pieces_go_together(name: str) -> None:
    """AdamW or Ranger (RAdam in Lookahead), OneCycle on rate and momentum, SWA of the last epochs: as by hand."""
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    data = [[x[i : i + 10], (x[i : i + 10].sum(1) > 0).long()] for i in range(0, 60, 10)]
    nets = [nn.Linear(4, 2) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    inner = torch.optim.AdamW if name == "adamw" else torch.optim.RAdam
    by_hand = inner(nets[0].parameters(), 0.01, betas=(0.95, 0.999), weight_decay=0.0)
    steps = [adam] if name == "adamw" else lookahead(radam)
    ours: Any = Stepwise(nets[1].parameters(), steps, lr=0.01, betas=(0.95, 0.999))

    def cycle(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=31)

    schedule, averaged = cycle(by_hand), torch.optim.swa_utils.AveragedModel(nets[0])
    slow = [p.detach().clone() for p in nets[0].parameters()]
    for step in range(30):
        by_hand.zero_grad()
        inputs, target = data[step % 6]
        nn.functional.cross_entropy(nets[0](inputs), target).backward()
        by_hand.step()
        if name == "ranger" and (step + 1) % 5 == 0:
            for kept, p in zip(slow, nets[0].parameters(), strict=True):
                p.data.copy_(kept.lerp_(p.detach(), 0.5))
        schedule.step()
        if step in (17, 23, 29):
            averaged.update_parameters(nets[0])
    swa = lw.SWA("3 epochs", replace_at_end=True)
    task = lw.Supervised(nets[1], nn.CrossEntropyLoss(), ours, schedule=cycle)
    run = trainer(epochs=5, callbacks=[swa]).fit(task, data, data)
    for expected, p in zip(averaged.parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(p, expected, atol=1e-6)
    assert ours.param_groups[0]["lr"] == pytest.approx(by_hand.param_groups[0]["lr"])
    assert trainer().validate(task, data)["valid/loss"] == run.metrics["valid/loss"]
