"""The state of an average of which each rank holds a part is that of an average of the whole model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from loopwright.callbacks.in_parts import InParts, held, load_parts, parts_of
from tiny import same


class Net(nn.Module):
    """Tied, with buffers of both kinds and a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(2, 3)
        self.b.weight = self.a.weight
        self.register_buffer("kept", torch.rand(2))
        self.register_buffer("scratch", torch.rand(2), persistent=False)

    def get_extra_state(self) -> Any:
        return {"of": 1}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"of": 1}


def averaged(net: nn.Module, of: nn.Module) -> AveragedModel:
    made = AveragedModel(of)
    for n in range(3):
        with torch.no_grad():
            for p in net.parameters():
                p += n
        made.update_parameters(InParts(net) if of is not net else net)
    return made


def test_parts_have_the_state_of_the_whole_and_take_it() -> None:
    torch.manual_seed(0)
    net = Net()
    before = {name: value.clone() for name, value in net.named_parameters()}
    whole = averaged(net, net)
    with torch.no_grad():
        for name, value in net.named_parameters():
            value.copy_(before[name])
    parts = averaged(net, InParts(net))
    state = parts_of(parts, net)
    expected = dict(whole.state_dict())
    assert state.keys() == expected.keys()
    assert state.pop("module._extra_state") == expected.pop("module._extra_state")
    assert same(state, expected)
    other = AveragedModel(InParts(Net()))
    load_parts(other, net, expected)
    assert same(dict(parts_of(other, net)), dict(parts_of(parts, net)))
    assert held(net) is net  # which nobody shares out


def test_keys_that_a_state_dict_renames_are_those_of_the_parameters() -> None:
    net = nn.Linear(2, 2)
    net._register_state_dict_hook(lambda module, state, *_: {f"new_{k}": v for k, v in state.items()})
    parts = AveragedModel(InParts(net))
    state = parts_of(parts, net)
    assert state.keys() == {"n_averaged", "module.weight", "module.bias"}
    other = AveragedModel(InParts(nn.Linear(2, 2)))
    load_parts(other, net, state)
    assert torch.equal(other.module.held[0], net.weight)
