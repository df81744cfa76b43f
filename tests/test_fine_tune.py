"""fine_tune: the head with the body frozen, then all of it, on one cycle each; nothing that a user could not write."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from anywhere import ends_alike
from tiny import acts, loader, seed_all, trainer


def pretrained() -> nn.Sequential:
    seed_all(6)
    stem = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU())
    body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
    return nn.Sequential(stem, body, nn.Linear(8, 3))


DATA: dict[str, Any] = {"batch_size": 8, "shuffle": True}
LAYERS = ["0.*", "1.*"]


def fine_tuned(net: nn.Module, *callbacks: lw.Callback, **settings: Any) -> lw.Run:
    at = trainer(callbacks=callbacks)
    return lw.fine_tune(
        net, loader(40, **DATA), **{"head": "2.*", "epochs": 2, "trainer": at, "layers": LAYERS, **settings}
    )


def weights(net: nn.Module) -> list[Any]:
    return list(net.state_dict().values())


@pytest.mark.capability("FA-02")
def test_fine_tune_is_written_by_a_user_with_public_calls_to_the_same_bits() -> None:
    net = pretrained()
    run = fine_tuned(net, optimizer=torch.optim.AdamW, loss=nn.CrossEntropyLoss(), lr=0.02)

    mine = pretrained()
    groups = lw.groups(mine, ["0.*", "1.*", "2.*"], lr=(0.02 / 100, 0.02), no_decay=True)
    task = lw.Supervised(mine, nn.CrossEntropyLoss(), torch.optim.AdamW(groups))
    s = lw.schedules
    momentum = s.concat([s.cosine(0.95, 0.85), s.cosine(0.85, 0.95)], [0.99])
    first = s.concat([s.cosine(1 / 25, 1.0), s.cosine(1.0, 1e-5)], [0.99])
    then = s.concat([s.cosine(0.5 / 5, 0.5), s.cosine(0.5, 0.5 / 1e5)], [0.3])
    stages = [
        lw.Stage("head", until="1 epoch", train="module.2.*", schedule={"lr": s.scaled(first), "momentum": momentum}),
        lw.Stage("all", until="2 epochs", schedule={"lr": s.scaled(then), **_momentum_of_one_cycle(0.3)}),
    ]
    same = trainer().fit(task, loader(40, **DATA), stages=stages)
    assert all(map(torch.equal, weights(net), weights(mine)))
    assert list(run.history["lr"]) == list(same.history["lr"])


def _momentum_of_one_cycle(rise: float) -> dict[str, Any]:
    return {"momentum": lw.schedules.one_cycle(rise=rise)["momentum"]}


@pytest.mark.capability("FA-16")
def test_the_body_keeps_every_bit_while_the_head_trains_and_then_each_layer_has_its_rate() -> None:
    net, ends, rates = pretrained(), dict[str, Any](), dict[str, list[Any]]()
    before = copy.deepcopy(net.state_dict())

    def keep(run: lw.Run, stage: lw.Stage) -> None:
        ends[stage.name] = (copy.deepcopy(net.state_dict()), run.progress.epoch)

    def note(run: lw.Run, phase: lw.Phase, norm: Any) -> None:
        groups = phase.moved[0].param_groups
        rates.setdefault(run.stage.name, []).append({g["name"]: g["lr"] for g in groups})  # type: ignore[union-attr]

    fine_tuned(net, acts(on_stage_end=keep, on_grads_ready=note), epochs=3, lr=0.02, spread=4.0)
    after, epoch = ends["head"]
    assert epoch == 1
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"2.weight", "2.bias"}
    last, epoch = ends["all"]
    assert epoch == 4
    assert all(not torch.equal(after[name], last[name]) for name in before)
    first = lw.schedules.one_cycle(1.0, rise=0.99)["lr"]
    then = lw.schedules.one_cycle(0.5, rise=0.3, div=5.0)["lr"]
    own = {"0.*": 0.005, "1.*": 0.01, "2.*": 0.02}  # by a factor of 2 each
    for k, seen in enumerate(rates["head"]):
        assert seen == pytest.approx({name: rate * first(k / 5) for name, rate in own.items()})
    for k, seen in enumerate(rates["all"]):
        assert seen == pytest.approx({name: rate * then(k / 15) for name, rate in own.items()})
    assert [len(rates["head"]), len(rates["all"])] == [5, 15]


@pytest.mark.capability("FA-12")
def test_both_stages_go_through_one_cycle_of_the_rate_and_of_the_momentum_against_it() -> None:
    seen: list[tuple[float, float]] = []

    def note(run: lw.Run, phase: lw.Phase, norm: Any) -> None:
        group = phase.moved[0].param_groups[-1]
        seen.append((group["lr"], group["betas"][0]))

    fine_tuned(pretrained(), acts(on_grads_ready=note), epochs=4, head_epochs=4, lr=0.02)
    for stage, rise, top in ((seen[:20], 0.99, 0.02), (seen[20:], 0.3, 0.01)):
        lrs, momentums = [lr for lr, _ in stage], [momentum for _, momentum in stage]
        peak = max(range(20), key=lrs.__getitem__)
        assert peak == min(int(rise * 20 + 0.5), 19)
        assert lrs[peak] <= top
        assert lrs[peak] == pytest.approx(top, rel=0.02)
        assert lrs[: peak + 1] == sorted(lrs[: peak + 1])
        assert lrs[peak:] == sorted(lrs[peak:], reverse=True)
        assert momentums[0] == 0.95
        assert momentums[: peak + 1] == sorted(momentums[: peak + 1], reverse=True)
        assert momentums[peak:] == sorted(momentums[peak:])
        assert momentums[peak] == pytest.approx(0.85, abs=1e-3)


def test_any_optimizer_and_all_that_supervised_takes() -> None:
    def sgd(groups: Any) -> torch.optim.SGD:
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)

    net = pretrained()
    settings = {"optimizer": sgd, "metrics": {"accuracy": lw.metrics.Accuracy()}, "valid": loader(9, batch_size=4)}
    run = fine_tuned(net, head=["2.weight", "2.bias"], layers=["*"], **settings)
    assert len(run.history["valid/accuracy"]) == 3
    assert [g["name"] for g in run.optimizers["main"].param_groups] == [
        "*",
        "*",
        "2.weight, 2.bias",
        "2.weight, 2.bias",
    ]
    assert [g["weight_decay"] for g in run.optimizers["main"].param_groups] == [0, 0.0, 0, 0.0]
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"head": "fc.*"}, "the pattern 'fc.*' matches no trainable parameter. Known: '0.0.bias', "),
        ({"head": "*"}, "head='*' leaves no body to freeze; name the head"),
        ({"layers": ["0.*"]}, "left over by all patterns: 1.0.weight"),
        ({"epochs": 0}, "epochs=0: expected a positive number"),
        ({"lr": "high"}, "lr='high': expected a positive number"),
        ({"trainer": trainer(epochs=3)}, "both the Trainer and the stages say how long to train"),
    ],
)
def test_what_cannot_be_is_refused_with_the_fix(settings: Any, text: str) -> None:
    with pytest.raises(lw.SettingError) as error:
        fine_tuned(pretrained(), **settings)
    assert text in str(error.value)


def test_a_body_that_came_frozen_is_refused_with_the_fix() -> None:
    net = pretrained()
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)
    with pytest.raises(lw.SettingError, match=r"head='2\.\*' is all of Sequential that can be trained: the body came"):
        fine_tuned(net)


def test_resumed_in_either_stage_it_ends_with_the_same_bits(folder: Path) -> None:
    def fit(resume: Any, **settings: Any) -> lw.Run:
        return fine_tuned(pretrained(), trainer=lw.Trainer(**settings), resume=resume)

    assert ends_alike(fit, folder) == 14
