"""What optimizers of step functions, EMA and SAM cost next to torch's foreach forms and to the same written by hand.

``python benchmarks/optimizers.py --write`` puts medians of ratios (above 1: slower than torch) and differences into
docs/benchmarks.md. Both contenders take turns within each round, so that what else the machine does meets both.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import loopwright as lw
import measure
from loopwright.optim import Stepwise, adam, decay, radam, sgd
from measure import Goal

ROUNDS = 41
LIMIT, LIMIT_US = 1.25, 10.0  # of torch's time: 80 % of its speed
BLOCK = [(768, 256), (768,), (256, 256), (256,), (1024, 256), (1024,), (256, 1024), (256,)]
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "a net of 20 layers, 32 wide": [(32, 32), (32,)] * 20,
    "a transformer, 4 layers, 256 wide": BLOCK * 4,
    "6 matrices of 1024 x 1024": [(1024, 1024)] * 6,
}


def my_adam(b: Any, lr: float = 1e-3, betas: Any = (0.9, 0.999), eps: float = 1e-8) -> None:
    m, v = b.average("exp_avg", betas[0]), b.average_square("exp_avg_sq", betas[1])
    b.descend(m, lr, beta=betas[0], over=b.root(v, eps, beta=betas[1]))


OPTIMIZERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "[my_adam], of a user": (
        lambda p: torch.optim.Adam(p, foreach=True),
        lambda p: Stepwise(p, [my_adam]),
    ),
    "[adam]": (lambda p: torch.optim.Adam(p, foreach=True), lambda p: Stepwise(p, [adam])),
    "[decay, adam], AdamW": (
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: Stepwise(p, [decay, adam], weight_decay=0.01, decoupled_weight_decay=True),
    ),
    "[decay, radam]": (lambda p: torch.optim.RAdam(p, foreach=True), lambda p: Stepwise(p, [decay, radam])),
    "[sgd], momentum": (
        lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, foreach=True),
        lambda p: Stepwise(p, [sgd], lr=0.01, momentum=0.9),
    ),
}


def laps(first: Callable[[], Any], second: Callable[[], Any], times: int, rounds: int = ROUNDS) -> list[list[float]]:
    """Seconds a call of both, ``rounds`` times, in turns."""
    found = []
    for n in range(rounds + 2):
        pair = []
        for call in (first, second) if n % 2 else (second, first):
            began = time.perf_counter()
            for _ in range(times):
                call()
            pair.append((time.perf_counter() - began) / times)
        found.append(pair if n % 2 else pair[::-1])
    return found[2:]  # the first two warm up


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4)


def compare_optimizers(rounds: int) -> list[Goal]:
    goals = []
    for shape, sizes in SHAPES.items():
        for name, makes in OPTIMIZERS.items():
            contenders = []
            for make in makes:
                params = [nn.Parameter(torch.randn(size)) for size in sizes]
                for p in params:
                    p.grad = torch.randn_like(p)
                contenders.append(make(params).step)
            size = sum(p.numel() for p in params)
            pairs = laps(*contenders, times=max(1, 200_000 // size), rounds=rounds)
            low, middle, high = quartiles([ours / torchs for torchs, ours in pairs])
            typical = statistics.median(torchs for torchs, _ in pairs) * 1e6
            note = f"middle half {low:.3f} - {high:.3f}; torch's step {typical:.0f} us"
            goals.append(Goal(f"{name} / torch's foreach form; {shape}", middle, "", LIMIT, note))
    return goals


def pass_a_step(run: lw.Run) -> None:
    """As the loop would count it: what is due at some steps only does at each what it does at its own."""
    run.progress = run.progress._replace(step=run.progress.step + 1)


class Beside(lw.Callback):
    """Inside of a run: what a callback does, and the same by hand."""

    def __init__(self, sam: lw.SAM, ema: lw.EMA) -> None:
        self.sam, self.ema, self.found = sam, ema, dict[str, list[list[float]]]()

    def on_grads_ready(self, run: lw.Run, phase: lw.Phase, grad_norm: Any) -> None:
        net, (batch,) = run.models["model"], self.sam._window
        optimizer, loss_of = phase.moved[0], nn.CrossEntropyLoss()

        def ours() -> None:
            self.sam._window = [batch]
            self.sam.on_grads_ready(run, phase, grad_norm)

        def by_hand() -> None:
            moved = [p for p in net.parameters() if p.grad is not None]
            with torch.no_grad():
                before = [p.clone() for p in moved]
                scale = 0.05 / (nn.utils.get_total_norm([p.grad for p in moved]) + 1e-12)
                torch._foreach_add_(moved, torch._foreach_mul([p.grad for p in moved], scale))
            optimizer.zero_grad()
            loss_of(net(batch[0]), batch[1]).backward()
            with torch.no_grad():
                for p, value in zip(moved, before, strict=True):
                    p.copy_(value)

        self.found["SAM"] = laps(by_hand, ours, times=2, rounds=30 * ROUNDS)

    def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
        net = run.models["model"]
        averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.999))

        def ours() -> None:
            pass_a_step(run)
            self.ema.on_step_end(run, result)

        def by_hand() -> None:
            pass_a_step(run)
            averaged.update_parameters(net)

        self.found["EMA"] = laps(by_hand, ours, times=5, rounds=60 * ROUNDS)
        run.request_stop("measured")


def compare_callbacks() -> list[Goal]:
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    sam, ema = lw.SAM(), lw.EMA()
    beside = Beside(sam, ema)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.01))
    data = [[torch.randn(50, 64), torch.randint(10, (50,))]] * 2
    lw.Trainer(steps=2, folder=None, progress=False, callbacks=[beside, ema, sam]).fit(task, data)
    goals = []
    for name, pairs in beside.found.items():
        hand, mine = ([pair[i] * 1e6 for pair in pairs] for i in (0, 1))
        typical = statistics.median(mine) - statistics.median(hand)
        note = f"the fastest of {len(pairs)}; a typical step {typical:+.1f}; by hand {min(hand):.0f} us"
        goals.append(Goal(f"{name} over the same by hand, a step", min(mine) - min(hand), "us", LIMIT_US, note))
    return goals


def main() -> int:
    options = measure.arguments(__doc__.splitlines()[0], rounds=ROUNDS).parse_args()
    torch.set_num_threads(1)
    goals = compare_optimizers(11 if options.quick else options.rounds or ROUNDS) + compare_callbacks()
    title = "## Optimizers made of step functions, next to torch's; EMA and SAM, next to the same by hand"
    page = f"{title}\n\nMachine: {measure.machine()}.\n\n{measure.goal_table(goals)}"
    print(page)
    if options.write:
        measure.write_section(options.write, "optimizers", page)
    return 1 if any(goal.limit is not None and goal.value > goal.limit for goal in goals) else 0


if __name__ == "__main__":
    sys.exit(main())
