from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from loopwright.data.generators import Streams, find_generators, find_on_modules, get_globals, kept, set_globals


def draw(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return float(torch.rand((), generator=generator))
    return float(generator.random_sample() if isinstance(generator, np.random.RandomState) else generator.random())


@pytest.mark.parametrize(
    "generator",
    [
        torch.Generator(),
        random.Random(1),
        np.random.RandomState(1),
        np.random.default_rng(1),
        np.random.Generator(np.random.Philox(1)),
        np.random.Generator(np.random.MT19937(1)),
        np.random.Generator(np.random.SFC64(1)),
    ],
    ids=lambda g: type(g).__name__ + type(getattr(g, "bit_generator", None)).__name__,
)
def test_a_generator_found_on_an_object_comes_back(generator: Any) -> None:
    class Transform:
        def __init__(self) -> None:
            self.parts = [{"rng": generator}]

    streams = Streams({"dataset": Transform()})
    draw(generator)
    state = streams.get()
    first = draw(generator)
    assert streams.get() != state
    streams.set(state)
    assert draw(generator) == first


def test_generators_are_found_once_through_cycles_and_not_in_tensors_or_types() -> None:
    class Node:
        shared = random.Random(0)

    node = Node()
    node.self, node.rng, node.again = node, random.Random(1), node  # type: ignore[attr-defined]
    node.data, node.secure, node.kind = torch.zeros(3), random.SystemRandom(), Node  # type: ignore[attr-defined]
    assert list(find_generators({"node": node, "other": node})) == ["node.rng"]


def test_the_search_stays_short_on_long_lists() -> None:
    rng = random.Random(0)
    assert find_generators({"paths": [str(i) for i in range(1000)], "late": [0] * 1000 + [rng]}) == {}


def test_global_states_come_back_and_gauss_halves_with_them() -> None:
    random.gauss(0, 1)
    np.random.standard_normal()
    state = get_globals()

    def drawn() -> tuple[float, ...]:
        return random.gauss(0, 1), float(np.random.standard_normal()), float(torch.randn(()))

    first = drawn()
    set_globals(state)
    assert drawn() == first


def test_a_part_of_the_globals_leaves_the_rest() -> None:
    state = Streams({}).get(only_torch=True)
    torch.rand(1)
    random.random()
    before = random.getstate()
    Streams({}).set(state)
    assert random.getstate() == before
    assert Streams({}).get(only_torch=True) == state


def test_generators_on_modules_are_found_at_any_depth_and_optimizers_are_left_alone() -> None:
    net: nn.Module = nn.Linear(1, 1)
    net.rng = generator = torch.Generator()  # type: ignore[assignment]
    for _ in range(8):
        net = nn.Sequential(net)
    net.optimizer = torch.optim.SGD(net.parameters(), 1.0)  # type: ignore[assignment]
    net.optimizer.rng = random.Random()  # type: ignore[union-attr]
    assert find_on_modules(net.modules()) == [generator]


def test_kept_generators_come_back_after_an_error() -> None:
    generators = [torch.Generator(), random.Random(1), np.random.default_rng(1), np.random.RandomState(1)]
    first: list[float] = []
    with pytest.raises(TypeError), kept(generators):  # noqa: PT012 - drawing comes before the error
        first += [draw(generator) for generator in generators]
        raise TypeError
    assert [draw(generator) for generator in generators] == first
