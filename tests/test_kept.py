"""What each module keeps for the backward is counted without computing, and is what a real forward keeps."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import loopwright as lw
from loopwright import kept, rng
from loopwright.kept import kept_for_backward


def paths(net: nn.Module) -> dict[nn.Module, str]:
    return {module: path or "net" for path, module in net.named_modules()}


def really_kept(step: Callable[[Any], Any], batch: tuple[Tensor, ...], net: nn.Module) -> Counter[str]:
    """The same of a real forward, as torch's own hooks see it."""
    before = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers(), *batch)}
    storages: dict[int, Any] = {}
    found: Counter[str] = Counter()
    opened = [""]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in before and storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage
            found[opened[-1]] += storage.nbytes()
        return tensor

    def enter(module: nn.Module, *_: Any) -> None:
        opened.append(names[module])

    def leave(*_: Any) -> None:
        opened.pop()

    names = paths(net)
    handles = [module.register_forward_pre_hook(enter) for module in names]
    handles += [module.register_forward_hook(leave) for module in names]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(batch)
    for handle in handles:
        handle.remove()
    return found


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 3))


def cnn() -> nn.Module:
    first = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(),
                         nn.Linear(8 * 7 * 7, 3))  # fmt: skip


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(80, 3))


class Words(nn.Module):
    """Embeddings, tied to the head, with a buffer and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(20, 16), nn.LayerNorm(16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * self.mask
        return self.head(x + self.norm(x).tanh()).transpose(1, 2)  # type: ignore[no-any-return]


IMAGES, CLASSES, TEXT = torch.ones(4, 3, 16, 16), torch.tensor([0, 1, 2, 1]), torch.arange(24).view(4, 6) % 20
NETS: list[Any] = [
    pytest.param(mlp, (torch.ones(4, 6), CLASSES), id="mlp"),
    pytest.param(cnn, (IMAGES, CLASSES), id="cnn"),
    pytest.param(encoder, (torch.ones(4, 5, 16), CLASSES), id="encoder"),
    pytest.param(Words, (TEXT, TEXT), id="words"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("make", "batch"), NETS)
def test_what_is_counted_is_what_a_real_forward_keeps_module_by_module(
    make: Callable[[], nn.Module], batch: tuple[Tensor, Tensor], precision: str
) -> None:
    net = make()

    def step(batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return cross_entropy(net(batch[0]), batch[1])

    counted, true = kept_for_backward(step, batch, paths(net)), really_kept(step, batch, net)
    assert true
    if precision == "fp32":
        assert counted == true
    else:  # torch's fake kernels give the few statistics of a norm under autocast in another type
        assert counted == pytest.approx(true, rel=0.02)


def test_of_a_checkpointed_block_its_inputs_alone_are_counted() -> None:
    net = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(3)))
    batch = (torch.ones(4, 6), CLASSES)
    sizes = []
    for patterns in ("2.0", "1"):
        with lw.checkpoint_activations(net, patterns):
            counted = kept_for_backward(lambda batch: net(batch[0]).sum(), batch, paths(net))
            assert counted == really_kept(lambda batch: net(batch[0]).sum(), batch, net)
            assert counted is not None
            sizes.append(counted.total())
    assert sizes[1] < sizes[0]


def test_the_count_is_what_is_worked_out_by_hand() -> None:
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    counted = kept_for_backward(lambda x: net(x).exp().sum(), torch.ones(4, 6), paths(net))
    assert counted == {"1": 4 * 10 * 4, "": 4 * 3 * 4}  # tanh and exp keep what they give; the last Linear the same


class Rich(nn.Module):
    """Changes all that a forward may change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.calls, self.seen, self.counts = 0, [0.5], {"inner": [1]}
        self.center, self.table = torch.zeros(6), np.zeros(2)
        self.own, self.others = random.Random(3), np.random.default_rng(3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(float(self.calls))
        self.counts["inner"].append(self.calls)
        self.counts["more"] = []
        self.center += x.detach().mean(0)
        self.table += 1
        self.last = x
        self.head.weight.grad = torch.ones_like(self.head.weight)
        self.training = False
        random.random()
        np.random.rand()
        x.mul_(self.own.random() + self.others.random()).add_(self.head.weight.sum())
        return self.head(self.norm(x) + torch.randn_like(x))  # type: ignore[no-any-return]


def test_nothing_is_changed_by_counting() -> None:
    net, x = Rich(), torch.ones(4, 6)
    outside, calls = torch.zeros(3), []
    handle = net.head.register_forward_hook(lambda *_: calls.append(1))
    before, generators = {n: (v.clone(), v._version) for n, v in net.state_dict(keep_vars=True).items()}, rng.get()
    own, hooks = dict(vars(net)), dict(net.head._forward_hooks)

    def step(x: Tensor) -> Tensor:
        outside.add_(1)
        outside.mul_(torch.ones(3))
        return net(x).sum()  # type: ignore[no-any-return]

    assert kept_for_backward(step, x, paths(net)) is not None
    assert calls == [1]  # the step was run
    assert torch.equal(outside, torch.zeros(3))
    assert torch.equal(x, torch.ones(4, 6))
    assert (x.requires_grad, x._version) == (False, 0)
    assert rng.same(rng.get(), generators)
    for name, value in net.state_dict(keep_vars=True).items():
        assert torch.equal(value, before[name][0])
        assert value._version == before[name][1]
    assert vars(net).keys() == own.keys()
    assert all(vars(net)[name] is value for name, value in own.items())
    assert net.head._forward_hooks == hooks
    assert len(net._forward_hooks) == len(net._forward_pre_hooks) == 0
    assert (net.calls, net.seen, net.counts, net.training) == (0, [0.5], {"inner": [1]}, True)
    assert torch.equal(net.center, torch.zeros(6))
    assert net.table.tolist() == [0, 0]
    assert net.head.weight.grad is None
    assert net.own.random() == random.Random(3).random()
    assert net.others.random() == np.random.default_rng(3).random()
    handle.remove()


def test_no_memory_is_taken() -> None:
    net = nn.Linear(6, 1)
    table = torch.ones(1)
    counted = kept_for_backward(
        lambda x: (net(x).repeat(2**44, 1) * (table.expand(2**50) + 1)[:1]).exp().sum(), torch.ones(4, 6), paths(net)
    )
    assert counted is not None
    assert counted[""] == 4 * 2**44 * 4 + 4 * 2**50  # what exp gives, and what the sum gave


def test_what_cannot_be_told_is_none_and_leaves_no_trace() -> None:
    def reads(net: Rich, x: Tensor) -> Tensor:
        loss = net(x).sum()
        return loss if loss.item() > 0 else -loss

    def fails(net: Rich, x: Tensor) -> Tensor:
        net(x)
        raise MemoryError

    x = torch.ones(4, 6)
    for step in (reads, fails):
        net, generators = Rich(), rng.get()
        assert kept_for_backward(lambda x, net=net, step=step: step(net, x), x, paths(net)) is None
        assert (net.calls, net.seen) == (0, [0.5])
        assert rng.same(rng.get(), generators)
        net(x.clone()).sum().backward()  # it trains as before


def test_modules_that_do_not_run_here_and_now_are_not_tried() -> None:
    compiled, x = nn.Linear(6, 3), torch.ones(4, 6)
    compiled.compile(backend="eager")
    for one in (compiled, torch.compile(nn.Linear(6, 3), backend="eager"), nn.DataParallel(nn.Linear(6, 3))):
        assert kept_for_backward(lambda x, one=one: one(x).exp().sum(), x, paths(one)) is None


def test_it_is_given_up_when_it_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(6, 3)
    monkeypatch.setattr(kept, "_SECONDS", -1.0)
    assert kept_for_backward(lambda x: net(x).exp().sum(), torch.ones(4, 6), paths(net)) is None
