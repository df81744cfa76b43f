"""What Loopwright costs next to a loop written by hand, an expert's loop and the other frameworks.

The contenders are in `digits.py` (the small network on which the loop itself shows) and `peers.py`; `measure.py` says
how the times are taken, `costs.py` measures what is not a ratio, `models.py` shows larger models. On an idle machine:
``python benchmarks/overhead.py --write``.
"""

from __future__ import annotations

import importlib.util
import sys

import torch

import measure
import peers
from digits import STEPS, expert, hand, loopwright, parts
from measure import Goal, Results

HAND, EXPERT, EXPERT_FUSED = "hand-written loop", "expert's loop", "expert's loop, fused SGD"
OURS, OURS_FUSED = "Loopwright defaults", "Loopwright defaults, fused SGD"
OURS_VALID, OURS_OFF = "Loopwright defaults + validation", "Loopwright, all off"
OURS_BARE = "Loopwright defaults, no check, no capsule"


def races(which: str) -> list[dict[str, measure.Prepare]]:
    """Who trains side by side: few at a time, so that a lap and the one that it is compared with lie close together."""
    ours = which != "peers" and importlib.util.find_spec("loopwright")
    groups = [
        {HAND: hand, EXPERT: expert(False)}
        | ({OURS: loopwright(), OURS_BARE: loopwright(guards=False)} if ours else {}),
        {HAND: hand, EXPERT_FUSED: expert(True)} | ({OURS_FUSED: loopwright(fused=True)} if ours else {}),
    ]
    if ours:
        groups += [{HAND: hand, OURS_VALID: loopwright(valid=True), OURS_OFF: loopwright(off=True)}]
    others = list(peers.installed(parts).items()) if which != "ours" else []
    return groups + [{HAND: hand} | dict(others[i : i + 2]) for i in range(0, len(others), 2)]


def ratio_table(results: list[Results]) -> str:
    """Every contender against the hand-written loop beside it, the dearest first."""
    head = ["", "ratio", "middle half", "fastest laps", "us a step", "fixed ms", "weights as by hand"]
    rows = {HAND: [HAND, "1", "", "1", f"{results[0].step_us(HAND):.0f}", f"{results[0].fixed_ms(HAND):.1f}", ""]}
    ratios = {HAND: 1.0}
    for race in results:
        for name in race.rounds[0].keys() - {HAND}:
            low, high = measure.middle_half(race.ratios(name, HAND))
            ratios[name] = race.ratio(name, HAND)
            rows[name] = [
                name, f"{ratios[name]:.3f}", f"{low:.3f} - {high:.3f}", f"{race.best_ratio(name, HAND):.3f}",
                f"{race.step_us(name):.0f}", f"{race.fixed_ms(name):.1f}",
                "yes" if race.same_bits(name, HAND) else "no",
            ]  # fmt: skip
    return measure.table(head, [rows[name] for name in sorted(rows, key=lambda name: -ratios[name])])


def ratio_goals(results: list[Results]) -> list[Goal]:
    plain, fused, more, *_ = results
    for race, name in ((plain, OURS), (plain, OURS_BARE), (more, OURS_VALID), (more, OURS_OFF)):
        assert race.same_bits(name, HAND), f"{name}: the weights are not those of the loop by hand"

    def goal(what, race, name, to, limit=None):
        low, high = measure.middle_half(race.ratios(name, to))
        note = f"middle half {low:.3f} - {high:.3f}, fastest laps {race.best_ratio(name, to):.3f}"
        return Goal(what, race.ratio(name, to), "", limit, note)

    return [
        goal("bar, JSONL, accuracy, history, checkpoint policy / hand-written loop", plain, OURS_BARE, HAND, 0.55),
        goal("all defaults: the same with the non-finite check and the capsule", plain, OURS, HAND),
        goal("`fit` with defaults / expert's loop", plain, OURS, EXPERT, 1.15),
        goal("`fit` with defaults / expert's loop, fused SGD in both", fused, OURS_FUSED, EXPERT_FUSED, 1.10),
        goal("`fit` with defaults + validation / hand-written loop without", more, OURS_VALID, HAND),
        goal("`fit` with all off / hand-written loop", more, OURS_OFF, HAND),
    ]


def main() -> int:
    parser = measure.arguments(__doc__.splitlines()[0], rounds=7)
    parser.add_argument("--laps", type=int, default=None, help="laps of a run in a round (default 12, quick 3)")
    parser.add_argument(
        "--chunk", type=int, default=10, help="epochs of a lap (default 10; in short ones bars draw more)"
    )
    parser.add_argument("--only", choices=["peers", "ours", "ratios", "costs"], default="all")
    options = parser.parse_args()
    laps, rounds = (3, 3) if options.quick else (12, 7)
    laps, rounds = options.laps or laps, options.rounds or rounds
    torch.set_num_threads(1)
    peers.quiet()

    text, goals, ours = [], [], options.only != "peers" and importlib.util.find_spec("loopwright")
    if options.only != "costs":
        with measure.terminal():
            results = [
                measure.race(group, laps=laps, chunk=options.chunk, steps_per_epoch=STEPS, rounds=rounds,
                             clock=measure.clock_of(options))
                for group in races(options.only)
            ]  # fmt: skip
        size = f"{rounds} rounds of {laps} laps of {options.chunk} epochs ({STEPS} steps each)"
        how = f"Digits, {size}; bars draw on a terminal."
        text += ["## A step, next to the loop written by hand", how, ratio_table(results)]
        goals += ratio_goals(results) if ours else []
    if ours and options.only != "ratios":
        import costs

        goals += costs.goals(options)
    if goals:
        text = ["## What was promised", measure.goal_table(goals), *text]
    page = "\n\n".join([f"Machine: {measure.machine()}.", *text])
    print(page)
    if options.write:
        measure.write_section(options.write, "overhead", page)
    return 1 if any(goal.limit is not None and goal.value > goal.limit for goal in goals) else 0


if __name__ == "__main__":
    sys.exit(main())
