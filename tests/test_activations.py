"""Activation checkpointing: the same bits, less kept for the backward, no other names, and nothing left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy

import loopwright as lw
from tiny import bits, loader, same, samples, trainer


class Block(nn.Module):
    """Dropout, batch statistics and a buffer that its forward reads and changes."""

    count: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.BatchNorm1d(4 * width), nn.GELU(), nn.Dropout(0.3))
        self.out = nn.Linear(4 * width, width)
        self.register_buffer("count", torch.ones(()))

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        if self.training and not torch.compiler.is_compiling():  # torch 2.13 compiles it to wrong gradients
            self.count.add_(1)
        out: Tensor = x + scale * self.out(self.layers(x)) / self.count
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(5) for _ in range(3))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=0.5)
        out: Tensor = self.head(x)
        return out


def fitted(patterns: Any = None, **settings: Any) -> tuple[lw.Run, nn.Module]:
    torch.manual_seed(1)
    net = Net()
    task = lw.Supervised(net, cross_entropy, torch.optim.Adam(net.parameters(), lr=0.01))
    handle = None if patterns is None else lw.checkpoint_activations(net, patterns)
    run = trainer(epochs=2, seed=2, **settings).fit(task, loader(23, batch_size=6, shuffle=True), loader(9))
    if handle is not None:
        handle.remove()
    return run, net


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    "patterns", ["blocks.*", ["blocks.0", "blocks.2.layers", "head"], "blocks.*.layers.1"], ids=str
)
def test_the_bits_are_those_without(patterns: Any, precision: str) -> None:
    plain, net = fitted(precision=precision, accumulate=2)
    run, again = fitted(patterns, precision=precision, accumulate=2)
    assert same(bits(net, *plain.optimizers.values()), bits(again, *run.optimizers.values()))
    assert run.metrics == plain.metrics
    assert net.state_dict().keys() == again.state_dict().keys()


def test_less_is_kept_for_the_backward() -> None:
    net, kept = Net(), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    def elements() -> int:
        kept.clear()
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            net(samples(64)[0]).sum().backward()
        return sum(kept)

    whole = elements()
    with lw.checkpoint_activations(net, "blocks.*"):
        inside = elements() + 3 * 64 * 5  # the inputs of the three blocks, which their recomputation begins with
    assert inside < whole / 7
    assert elements() == whole


def test_nothing_is_left_behind_and_names_never_change() -> None:
    net = Net()
    names, own = list(net.state_dict()), dict(net.blocks[0].__dict__)
    handle = lw.checkpoint_activations(net, "blocks.*")
    assert list(net.state_dict()) == names
    assert repr(handle) == "CheckpointedActivations(blocks.0, blocks.1, blocks.2)"
    handle.remove()
    handle.remove()
    assert dict(net.blocks[0].__dict__) == own


def test_a_forward_of_an_instance_is_put_back() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    net[1].forward = lambda x: 3 * x
    with lw.checkpoint_activations(net, "1"):
        out = net(torch.ones(1, 2))
        out.sum().backward()
    assert torch.equal(net(torch.ones(1, 2)), out)


def test_a_deep_copy_computes_with_its_own_weights() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False))
    lw.checkpoint_activations(net, "0")
    twin = copy.deepcopy(net)
    nn.init.constant_(twin[0].weight, 2.0)
    twin(torch.ones(1, 2)).sum().backward()
    assert torch.equal(twin(torch.ones(1, 2)), torch.full((1, 2), 4.0))
    assert twin[0].weight.grad is not None
    assert net[0].weight.grad is None


def test_where_no_gradient_is_recorded_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net().eval()
    with lw.checkpoint_activations(net, "blocks.*"), torch.no_grad():
        monkeypatch.setattr("loopwright.activations.checkpoint", None)
        net(samples(4)[0])


@pytest.mark.slow
@pytest.mark.nightly
def test_it_goes_with_compiled_steps() -> None:
    plain, net = fitted(compile={"backend": "aot_eager"})
    run, again = fitted("blocks.*", compile={"backend": "aot_eager"})
    for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    assert run.compiler.graphs == plain.compiler.graphs == 3


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("block.*", "the pattern 'block.*' matches no module. Known: "),
        ("blocks", "blocks is a ModuleList, which is never called; write 'blocks.*'"),
        ("blocks.0", "blocks.0 is checkpointed already; call remove() on what the first call returned"),
    ],
)
def test_what_cannot_be_checkpointed_is_refused(patterns: str, message: str) -> None:
    net = Net()
    lw.checkpoint_activations(net, "blocks.0")
    with pytest.raises(lw.SettingError) as caught:
        lw.checkpoint_activations(net, patterns)
    assert str(caught.value).startswith(message)
