"""What techniques cost over the same loop written by hand, in microseconds a batch.

``python benchmarks/techniques.py --write`` puts the table into docs/benchmarks.md. Each line is a loop by hand
that uses a technique, and a fit that is told to, side by side over the same list of batches, with nothing else
enabled; both end with the same bits, which is checked.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import loopwright as lw
import measure
from digits import NOTHING, Lap, parts
from measure import Goal, Prepare
from step_costs import REPEAT, Make, Race, Stamped

LIMIT_US = 10.0
BATCHES = [list(batch) for batch in parts()[2]] * REPEAT
WALKS = [[torch.randn(16, 40, 4), torch.randn(16, 40, 2)] for _ in range(10)]


def by_hand(start: Callable[[], tuple[Any, ...]], epoch: Callable[..., None]) -> Make:
    """``start()`` gives a network and its optimizers, ``epoch(*those, loss_of)`` goes over the batches once."""

    def make(loss_of: Stamped) -> Prepare:
        def prepare(epochs: int, end_of_epoch: Callable[[], None]) -> Callable[[], nn.Module]:
            made = start()

            def go() -> nn.Module:
                for _ in range(epochs):
                    epoch(*made, loss_of)
                    end_of_epoch()
                return made[0]

            return go

        return prepare

    return make


def ours(
    start: Callable[[], tuple[Any, ...]], task_of: Callable[..., lw.Task], data: Any = BATCHES,
    stages: Callable[[int], list[lw.Stage]] | None = None, weight: Any = None, **options: Any,
) -> Make:  # fmt: skip
    """The same by a fit of ``task_of(*start(), loss_of)``."""

    def make(loss_of: Stamped) -> Prepare:
        def prepare(epochs: int, end_of_epoch: Callable[[], None]) -> Callable[[], nn.Module]:
            made = start()

            def go() -> nn.Module:
                planned = stages(epochs) if stages else None
                length = None if planned else epochs
                trainer = lw.Trainer(epochs=length, callbacks=[Lap(end_of_epoch)], **NOTHING, **options)
                trainer.fit(task_of(*made, loss_of), train=data, stages=planned, weight=weight)
                return made[0]

            return go

        return prepare

    return make


# ---------------------------------------------------------------- one network, one optimizer


def one() -> tuple[nn.Module, torch.optim.Optimizer]:
    return parts()[:2]


def supervised(net: nn.Module, optimizer: Any, loss_of: Any, **options: Any) -> lw.Supervised:
    return lw.Supervised(net, loss=loss_of, optimizer=optimizer, **options)


def plain(net, optimizer, loss_of) -> None:
    for inputs, target in BATCHES:
        optimizer.zero_grad()
        loss_of(net(inputs), target).backward()
        optimizer.step()


def clipped(net, optimizer, loss_of) -> None:
    for inputs, target in BATCHES:
        optimizer.zero_grad()
        loss_of(net(inputs), target).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()


def accumulated(enough: int, measured: Callable[[Any], int], weigh: Callable[[Any], int]) -> Callable[..., None]:
    """A step for as many batches as have ``enough`` of what is measured; the loss is their weighted mean."""

    def step(net, optimizer, loss_of, window) -> None:
        total = sum(map(weigh, window))
        optimizer.zero_grad()
        for inputs, target in window:
            loss = loss_of(net(inputs), target)
            loss.backward(loss.new_full((), weigh((inputs, target)) / total))
        optimizer.step()

    def epoch(net, optimizer, loss_of) -> None:
        window, seen = [], 0
        for batch in BATCHES:
            window.append(batch)
            seen += measured(batch)
            if seen >= enough:
                step(net, optimizer, loss_of, window)
                window, seen = [], 0
        if window:
            step(net, optimizer, loss_of, window)

    return epoch


def samples(batch: Any) -> int:
    return len(batch[0])


def tokens(batch: Any) -> int:
    return 4 * len(batch[0])


def frozen() -> tuple[nn.Module, torch.optim.Optimizer]:
    net, optimizer = one()
    net[0].requires_grad_(False)
    return net, optimizer


# ---------------------------------------------------------------- two networks, an optimizer each


class Pair(nn.Module):
    """A network, and a critic of what it draws."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.critic = nn.Linear(64, 64), nn.Linear(64, 1)


def two() -> tuple[nn.Module, Any, Any]:
    pair = Pair()
    return pair, *(torch.optim.SGD(part.parameters(), 0.01) for part in (pair.critic, pair.net))


def judged(pair: Pair, inputs: torch.Tensor) -> torch.Tensor:
    return pair.critic(pair.net(inputs).detach()).mean() - pair.critic(inputs).mean()


def turns(pair, of_critic, of_net, loss_of) -> None:
    for inputs, _ in BATCHES:
        loss_of.at.append(time.perf_counter())
        of_critic.zero_grad()
        judged(pair, inputs).backward()
        of_critic.step()
        of_net.zero_grad()
        (-pair.critic(pair.net(inputs)).mean()).backward()
        of_net.step()


class Turns(lw.Task):
    """The same in two phases."""

    def __init__(self, pair, of_critic, of_net, loss_of) -> None:
        super().__init__()
        self.pair, self.optimizers, self.loss_of = pair, {"critic": of_critic, "net": of_net}, loss_of

    def configure_optimizers(self):
        return self.optimizers

    def phases(self):
        return [
            lw.Phase("critic", self.judge, optimizers="critic"),
            lw.Phase("net", self.draw, optimizers="net"),
        ]

    def judge(self, batch):
        self.loss_of.at.append(time.perf_counter())
        return judged(self.pair, batch[0])

    def draw(self, batch):
        return -self.pair.critic(self.pair.net(batch[0])).mean()


# ---------------------------------------------------------------- sequences in pieces


class Reader(nn.Module):
    """A recurrent network that begins where the piece before has ended."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.out = nn.RNN(4, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x, carry=None):
        states, carry = self.rnn(x, carry)
        return self.out(states), carry


def reader() -> tuple[nn.Module, torch.optim.Optimizer]:
    net = Reader()
    return net, torch.optim.SGD(net.parameters(), 0.01)


class Squares(Stamped):
    """The squared error in the place of cross entropy."""

    def __init__(self, stamped: Stamped) -> None:
        self.loss, self.at = nn.MSELoss(), stamped.at


def in_pieces(net, optimizer, loss_of) -> None:
    squares = Squares(loss_of)
    for inputs, target in WALKS:
        carry = None
        for x, y in zip(inputs.split(10, 1), target.split(10, 1), strict=True):
            optimizer.zero_grad()
            preds, carry = net(x, carry)
            squares(preds, y).backward()
            optimizer.step()
            carry = carry.detach()


# ---------------------------------------------------------------- the table


def freezing(epochs: int) -> list[lw.Stage]:
    return [lw.Stage("head", until=f"{epochs} epochs", freeze="module.0.*")]


def scheduled(net, optimizer, loss_of) -> lw.Supervised:
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 10**6)
    return supervised(net, optimizer, loss_of, schedule=lw.per_step(rate))


def scheduled_by_hand() -> tuple[Any, ...]:
    net, optimizer = one()
    return net, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 10**6)


def with_schedule(net, optimizer, schedule, loss_of) -> None:
    for inputs, target in BATCHES:
        optimizer.zero_grad()
        loss_of(net(inputs), target).backward()
        optimizer.step()
        schedule.step()


def techniques() -> dict[str, tuple[Make, Make]]:
    return {
        "one step a batch": (by_hand(one, plain), ours(one, supervised)),
        "clip_norm": (by_hand(one, clipped), ours(one, supervised, clip_norm=1.0)),
        "accumulate=4": (by_hand(one, accumulated(4, lambda batch: 1, samples)), ours(one, supervised, accumulate=4)),
        'accumulate="256 samples"': (
            by_hand(one, accumulated(256, samples, samples)), ours(one, supervised, accumulate="256 samples"),
        ),
        'accumulate="1024 tokens"': (
            by_hand(one, accumulated(1024, tokens, tokens)),
            ours(one, supervised, weight=tokens, accumulate="1024 tokens"),
        ),
        "Stage(freeze=)": (by_hand(frozen, plain), ours(one, supervised, stages=freezing)),
        "a scheduler of torch, each step": (by_hand(scheduled_by_hand, with_schedule), ours(one, scheduled)),
        "two phases, an optimizer each": (by_hand(two, turns), ours(two, Turns)),
        "truncate=10": (
            by_hand(reader, in_pieces),
            ours(reader, lambda net, opt, loss_of: supervised(net, opt, Squares(loss_of), truncate=10), WALKS),
        ),
    }  # fmt: skip


def costs(options: Any) -> Iterable[Goal]:
    for name, (hand, mine) in techniques().items():
        steps = 4 * len(WALKS) if name == "truncate=10" else len(BATCHES)
        race = Race(options, steps, hand=hand, ours=mine)
        assert race.results.same_bits("ours", "hand"), f"{name}: the weights are not those by hand"
        note = f"{race.results.spread_us('ours', 'hand')}; by hand {race.results.step_us('hand'):.0f} us"
        yield Goal(f"{name}, over the same by hand", race.results.extra_us("ours", "hand"), "us", LIMIT_US, note)


def main() -> int:
    options = measure.arguments(__doc__.splitlines()[0], rounds=9).parse_args()
    torch.set_num_threads(1)
    goals = list(costs(options))
    title = "## Techniques, over the same loop by hand, a batch"
    page = f"{title}\n\nMachine: {measure.machine()}.\n\n{measure.goal_table(goals)}"
    print(page)
    if options.write:
        measure.write_section(options.write, "techniques", page)
    return 1 if any(goal.value > LIMIT_US for goal in goals) else 0


if __name__ == "__main__":
    sys.exit(main())
