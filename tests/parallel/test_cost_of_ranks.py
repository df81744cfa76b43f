"""What a step over ranks costs next to a loop by hand around DistributedDataParallel: messages and calls, counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import loopwright as lw
from loopwright._compat import recorded_collectives

SHORT, LONG = 40, 120  # steps


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def by_hand(data: list[Any]) -> None:
    net, loss, rank = network(), nn.CrossEntropyLoss(), dist.get_rank()
    model, optimizer = DistributedDataParallel(net), torch.optim.SGD(net.parameters(), 0.1)
    for x, y in data:
        part = slice(2 * rank, 2 * rank + 2)
        optimizer.zero_grad()
        loss(model(x[part]), y[part]).backward()
        optimizer.step()


def by_fit(data: list[Any]) -> None:
    net = network()
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    lw.Trainer(epochs=1, log_every=1000, folder=None, progress=False).fit(task, data)


def a_step(train: Callable[[list[Any]], None]) -> tuple[float, float]:
    """Calls of functions, Python's and C's, and messages over the group of the gradients."""
    calls, messages, found = 0, 0, []

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    def sent() -> int:
        return max([e["collective_seq_id"] for e in recorded_collectives() if e["process_group"][0] == "0"], default=0)

    for steps in (3, SHORT, LONG):
        data: list[Any] = [[torch.ones(4, 8), torch.zeros(4, dtype=torch.long)]] * steps
        calls, messages = 0, sent()
        sys.setprofile(count)
        try:
            train(data)
        finally:
            sys.setprofile(None)
        found.append((calls, sent() - messages))
    _, (less, few), (more, many) = found
    return (more - less) / (LONG - SHORT), (many - few) / (LONG - SHORT)


def measured() -> list[tuple[float, float]]:
    dist.init_process_group("gloo")
    return [a_step(by_hand), a_step(by_fit)]


@pytest.mark.slow
def test_a_step_of_fit_sends_what_distributed_data_parallel_sends_and_adds_few_calls() -> None:
    for (hand_calls, hand_sent), (calls, sent) in lw.launch(measured, 2):
        assert sent == hand_sent
        assert 0 < calls <= hand_calls + 80  # of 258; they were 70 more, about 10 us


def messages_of(epochs: int) -> int:
    """For how many a fit waits besides gradients: not for those that tell the time, which depend on it."""
    net, metrics = network(), {"accuracy": lw.metrics.Accuracy()}
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1), metrics=metrics)
    data = TensorDataset(torch.ones(16, 8), torch.zeros(16, dtype=torch.long))
    before = max((e["record_id"] for e in recorded_collectives()), default=-1)
    lw.Trainer(epochs=epochs, log_every=1000, folder=None, progress=False).fit(task, DataLoader(data, 4, shuffle=True))
    ours = [e for e in recorded_collectives() if e["record_id"] > before and e["process_group"][1] == "loopwright"]
    return sum(not e["profiling_name"].endswith("all_reduce") for e in ours)


@pytest.mark.slow
def test_an_epoch_of_fit_ends_with_one_message_of_each_rank_and_one_of_rank_0() -> None:
    def both() -> list[int]:
        dist.init_process_group("gloo")
        return [messages_of(epochs) for epochs in (3, 8)]

    for few, many in lw.launch(both, 2):
        assert many - few == 2 * 5
