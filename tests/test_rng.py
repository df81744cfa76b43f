"""The random generators are taken and put back, all of them."""

import random

import numpy as np
import pytest
import torch

from loopwright import rng


def draw() -> list[float]:
    numbers = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]
    return [float(n) for n in [*numbers, torch.randn(()).item()]]


def test_a_state_put_back_gives_the_same_draws() -> None:
    draw()  # the second number of a pair of normal ones waits in each generator
    state = rng.get()
    first = draw()
    rng.set(state)
    assert draw() == first
    rng.set(state)
    assert draw() == first


def test_what_is_drawn_inside_of_forked_changes_nothing_outside() -> None:
    draw()
    state = rng.get()
    expected = draw()
    rng.set(state)
    with rng.forked():
        inside = draw()
        torch.manual_seed(99)
        random.seed(99)
        np.random.seed(99)
    assert inside == expected
    assert draw() == expected


def test_forked_puts_back_after_an_exception() -> None:
    state = rng.get()
    expected = draw()
    rng.set(state)

    def fail() -> None:
        with rng.forked():
            draw()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert draw() == expected


def test_states_of_devices_that_are_not_here_are_left_out() -> None:
    state = rng.get()
    expected = draw()
    if not torch.cuda.is_available():
        state["cuda"] = [torch.zeros(16, dtype=torch.uint8)]
    rng.set(state)
    assert draw() == expected
