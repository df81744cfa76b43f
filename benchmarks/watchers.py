"""What it costs to look inside, in microseconds a step: python benchmarks/watchers.py --write."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable

import torch
from torch import nn

import loopwright as lw
import measure
from digits import FOLDER, NOTHING, Lap, parts
from measure import Goal, Prepare
from step_costs import REPEAT, Make, Race, Stamped

FAR = 10**9  # steps: the callback is there and does nothing yet


def watched(batches: list, make_watchers: Callable[[], list], **options) -> Make:
    def make(loss_of: Stamped) -> Prepare:
        def prepare(epochs, end_of_epoch):
            net, optimizer, _ = parts()
            task = lw.Supervised(net, loss=loss_of, optimizer=optimizer)

            def go():
                callbacks = [Lap(end_of_epoch, 1), *make_watchers()]
                lw.Trainer(epochs=epochs, callbacks=callbacks, **NOTHING, **options).fit(task, train=batches * REPEAT)
                return net

            return go

        return prepare

    return make


def by_hand(batches: list, *, timed: bool) -> Make:
    """The loop by hand; ``timed`` adds up what data, forward, backward and optimizer take."""

    def make(loss_of: Stamped) -> Prepare:
        def prepare(epochs, end_of_epoch):
            net, optimizer, _ = parts()
            many, clock, spent = (
                batches * REPEAT,
                time.perf_counter,
                dict.fromkeys(("data", "forward", "back", "step"), 0.0),
            )

            def plain() -> nn.Module:
                for _ in range(epochs):
                    for inputs, target in many:
                        optimizer.zero_grad()
                        loss_of(net(inputs), target).backward()
                        optimizer.step()
                    end_of_epoch()
                return net

            def with_times() -> nn.Module:
                for _ in range(epochs):
                    at = clock()
                    for inputs, target in many:
                        a = clock()
                        optimizer.zero_grad()
                        loss = loss_of(net(inputs), target)
                        b = clock()
                        loss.backward()
                        c = clock()
                        optimizer.step()
                        d = clock()
                        spent["data"] += a - at
                        spent["forward"] += b - a
                        spent["back"] += c - b
                        spent["step"] += d - c
                        at = d
                    end_of_epoch()
                return net

            return with_times if timed else plain

        return prepare

    return make


def watchers(options) -> Iterable[Goal]:
    batches = [list(batch) for batch in parts()[2]]
    quiet = dict(show=False)
    race = Race(
        options,
        len(batches) * REPEAT,
        hand=by_hand(batches, timed=False),
        hand_timed=by_hand(batches, timed=True),
        plain=watched(batches, list),
        profiler=watched(batches, lambda: [lw.Profiler(**quiet)]),
        waiting=watched(batches, lambda: [lw.TorchProfiler(wait=FAR, folder=FOLDER)]),
        doctor=watched(batches, lambda: [lw.Doctor(FAR, **quiet)]),
        looking=watched(batches, lambda: [lw.Doctor(50, **quiet)]),
        limited=watched(batches, list, debug=lw.Debug(train=1.0)),
        audited=watched(batches, lambda: [lw.Audit()]),
    )
    assert all(race.results.same_bits(name, "hand") for name in ("profiler", "doctor", "looking", "limited", "audited"))
    yield race.extra("times of the parts, by hand", "hand_timed", "hand")
    yield race.extra("Profiler: every hook and part", "profiler", "plain")
    yield race.extra("TorchProfiler, while it waits", "waiting", "plain", 10)
    yield race.extra("Doctor, at a step that it does not look at", "doctor", "plain", 10)
    yield race.extra("Doctor(every=50), tensor work included", "looking", "plain")
    yield race.extra("Audit, around what is called in a step", "audited", "plain")
    yield race.extra("Debug(train=1.0)", "limited", "plain", 10)


def main() -> int:
    options = measure.arguments(__doc__, rounds=9).parse_args()
    torch.set_num_threads(1)
    goals = list(watchers(options))
    page = f"## Looking inside, a step\n\nMachine: {measure.machine()}.\n\n{measure.goal_table(goals)}"
    print(page)
    if options.write:
        measure.write_section(options.write, "watchers", page)
    return 1 if any(goal.limit is not None and goal.value > goal.limit for goal in goals) else 0


if __name__ == "__main__":
    sys.exit(main())
