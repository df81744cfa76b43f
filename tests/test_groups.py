"""Parameter groups: every trainable parameter once, decay where it belongs, rates from first to last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from tiny import classifier, loader, trainer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.PReLU())
        self.body = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
        self.rnn = nn.LSTM(4, 4)
        self.attention = nn.MultiheadAttention(4, 1)
        self.head = nn.Linear(4, 2)


def named(module: nn.Module, groups: list[dict[str, Any]]) -> list[list[str]]:
    names = {id(p): name for name, p in module.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in groups]


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    net = Net()
    net.stem[0].weight.requires_grad_(False)
    made = lw.groups(net, {("stem.*", "rnn.*"): {"lr": 0.1}, "*": {}, "head.*": {"lr": 1.0}}, no_decay=True)
    listed = [name for group in named(net, made) for name in group]
    assert sorted(listed) == sorted(name for name, p in net.named_parameters() if p.requires_grad)
    assert [(g["name"], g.get("lr")) for g in made] == [
        (name, lr) for name, lr in (("stem.*, rnn.*", 0.1), ("*", None), ("head.*", 1.0)) for _ in range(2)
    ]


def test_biases_and_norms_are_told_by_the_type_of_their_module_and_do_not_decay() -> None:
    net = Net()
    decay, free = named(net, lw.groups(net, no_decay=True))
    assert decay == [
        "stem.0.weight", "stem.2.weight", "body.0.weight", "body.2.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0",
        "attention.in_proj_weight", "attention.out_proj.weight", "head.weight",
    ]  # fmt: skip
    assert free == [
        "stem.0.bias", "stem.1.weight", "stem.1.bias", "body.0.bias", "body.1.weight", "body.1.bias", "rnn.bias_ih_l0",
        "rnn.bias_hh_l0", "attention.in_proj_bias", "attention.out_proj.bias", "head.bias",
    ]  # fmt: skip

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

    own = nn.Sequential(nn.Linear(4, 4), Norm())
    assert named(own, lw.groups(own, no_decay=True)) == [["0.weight", "1.scale"], ["0.bias"]]
    assert named(own, lw.groups(own, no_decay=True, norms=(Norm,))) == [["0.weight"], ["0.bias", "1.scale"]]


def test_weight_decay_moves_the_weights_and_nothing_else() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for p in net.parameters():
        nn.init.ones_(p)
    made = lw.groups(net, no_decay=True)
    sgd = torch.optim.SGD(made, lr=1.0, weight_decay=0.5)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    sgd.step()
    assert {name: float(p.detach().min()) for name, p in net.named_parameters()} == {
        "0.weight": 0.5, "0.bias": 1.0, "1.weight": 1.0, "1.bias": 1.0,
    }  # fmt: skip


def test_rates_grow_by_the_same_factor_from_the_first_group_to_the_last() -> None:
    net = Net()
    patterns = ["stem.*", "body.*", ("rnn.*", "attention.*"), "head.*"]
    rates = [group["lr"] for group in lw.groups(net, patterns, lr=(1e-4, 1e-1))]
    assert rates == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1], rel=1e-12)
    assert (rates[0], rates[-1]) == (1e-4, 1e-1)
    assert [g["lr"] for g in lw.groups(net, lr=(1e-4, 1e-1))] == [1e-1]


def test_tied_parameters_are_taken_once_by_their_first_name() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    net[1].weight = net[0].weight
    assert named(net, lw.groups(net)) == [["0.weight"]]
    assert named(net, lw.groups(net, ["0.*"])) == [["0.weight"]]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_any_torch_optimizer_takes_them_and_a_factory_too(kind: Any) -> None:
    net = classifier(batch_norm=True)
    task = lw.Supervised(
        net,
        nn.CrossEntropyLoss(),
        lambda params: kind(lw.groups(net, ["0.*", "*"], lr=(0.01, 0.1), no_decay=True), lr=9.0),
        schedule={"lr/0.*": 0.005},
    )
    run = trainer(steps=2).fit(task, loader(40, batch_size=8))
    assert [g["lr"] for g in run.optimizers["main"].param_groups] == [0.005, 0.005, 0.1, 0.1]


@pytest.mark.parametrize(
    ("patterns", "settings", "text"),
    [
        (["head.*", "stem.*"], {}, "left over by all patterns: body.0.weight, body.0.bias, body.1.weight, "),
        (["*.weight", "head.*", "*"], {}, "taken by two patterns: head.weight (by '*.weight' and 'head.*'); "),
        (["heads.*", "*"], {}, "the pattern 'heads.*' matches no trainable parameter. Known: "),
        (["*.*", "*"], {}, "the pattern '*' is left nothing by the others; leave it out"),
        ({"*": 0.1}, {}, "'*': 0.1 are no settings of a group; write a dict such as {'lr': 1e-3}"),
        ("head.*", {}, "patterns='head.*': expected a list of them, or a dict of their settings"),
        ({"head.*": {"lr": 1}, "*": {}}, {"lr": (1, 2)}, "every group, and 'head.*' has one of its own"),
        (["*"], {"lr": 0.1}, "lr=0.1: expected two positive numbers, those of the first and the last group"),
        (["*"], {"norms": ("norm",), "no_decay": True}, "expected classes of modules, such as (MyNorm,)"),
    ],
)  # fmt: skip
def test_what_is_left_over_or_doubled_is_named(patterns: Any, settings: Any, text: str) -> None:
    with pytest.raises(lw.SettingError) as error:
        lw.groups(Net(), patterns, **settings)
    assert text in str(error.value)


def test_a_module_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(lw.SettingError, match="ReLU has no trainable parameter"):
        lw.groups(nn.ReLU())
