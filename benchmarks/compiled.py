"""Compiled steps: a small CNN and transformers of 6 layers, eager and compiled, next to the same loops by hand.

The transformer of characters is built as GPT-2 is (GELU, fused causal attention). That of torch's own encoder layers,
with ReLU and dropout, stands beside it without a goal: on a CPU that is slower compiled, also by hand.

By hand, forward and loss are compiled with the options that ``Trainer(compile=True)`` has. Compiling itself is not
timed (it lies in the first lap); the eager runs must end with the same weights, bit for bit.
``python benchmarks/compiled.py --write`` on an idle machine; it needs a C++ compiler.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import loopwright as lw
import measure
from digits import FOLDER, Lap
from gpu import GPT, Size
from loopwright.compiling import Compiler, compile_options
from measure import Goal
from models import Augmented, Transformer, Windows, cnn_net, of_characters, optimizer_of

HAND, OURS = "by hand", "Loopwright"
HAND_COMPILED, OURS_COMPILED = "by hand, compiled", "Loopwright, compiled"


@dataclass(frozen=True)
class Case:
    """A model, its loss and its loader; ``parts()`` makes all three anew from the same seed."""

    name: str
    parts: Callable[[], tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], DataLoader]]
    gains: bool = True  # compiling it should make it faster on a CPU


def cnn(count: int):
    images = Augmented()
    data = TensorDataset(images.images[:count], torch.as_tensor(images.target[:count]).long())

    def parts():
        net = cnn_net()
        return net, nn.CrossEntropyLoss(), DataLoader(data, 64, shuffle=True)

    return parts


def transformer(count: int, *, encoder: bool = False):
    windows = Windows(count)
    data = TensorDataset(*map(torch.stack, zip(*(windows[i] for i in range(count)), strict=True)))

    def parts():
        torch.manual_seed(0)
        size = Size(layers=6, heads=4, width=64, context=64, vocabulary=windows.vocabulary, batch=32)
        net = Transformer(windows.vocabulary, layers=6) if encoder else GPT(size)
        return net, of_characters, DataLoader(data, 32, shuffle=True)

    return parts


def by_hand(case: Case, *, compiled: bool):
    def prepare(epochs, end_of_epoch):
        net, loss_of, loader = case.parts()
        optimizer = optimizer_of(net)

        def step(inputs, target):
            return loss_of(net(inputs), target)

        step.__code__ = step.__code__.replace()  # or its graphs would be those of the rounds before
        options = Compiler(compile_options(True), torch.device("cpu")).options if compiled else {}
        call = torch.compile(step, **options) if compiled else step

        def go():
            for _ in range(epochs):
                for inputs, target in loader:
                    optimizer.zero_grad()
                    call(inputs, target).backward()
                    optimizer.step()
                end_of_epoch()
            return net

        return go

    return prepare


def ours(case: Case, *, compiled: bool):
    def prepare(epochs, end_of_epoch):
        net, loss_of, loader = case.parts()
        task = lw.Supervised(net, loss_of, optimizer_of(net))

        def go():
            trainer = lw.Trainer(epochs=epochs, folder=FOLDER, callbacks=[Lap(end_of_epoch)], compile=compiled)
            run = trainer.fit(task, train=loader)
            assert run.compiler is None or run.compiler.graphs > 0
            return net

        return go

    return prepare


def main() -> int:
    parser = measure.arguments(__doc__.splitlines()[0], rounds=5)
    parser.add_argument("--case", default="", help="only the cases whose name contains this")
    options = parser.parse_args()
    laps, rounds = (2, 1) if options.quick else (6, 5)
    rounds = options.rounds or rounds
    torch.set_num_threads(1)
    size = 4 if options.quick else 1
    cases = [
        Case("CNN", cnn(1797 // size)),
        Case("char transformer, 6 layers", transformer(640 // size)),
        Case("torch's encoder, 6 layers", transformer(640 // size, encoder=True), gains=False),
    ]
    lines, rows = [], []
    for case in (case for case in cases if options.case in case.name):
        steps = len(case.parts()[2])
        with measure.terminal():
            results = measure.race(
                {
                    HAND: by_hand(case, compiled=False),
                    OURS: ours(case, compiled=False),
                    HAND_COMPILED: by_hand(case, compiled=True),
                    OURS_COMPILED: ours(case, compiled=True),
                },
                laps=laps,
                chunk=1,
                steps_per_epoch=steps,
                rounds=rounds,
                clock=measure.clock_of(options),
            )
        assert results.same_bits(OURS, HAND), f"{case.name}: the weights are not those of the loop by hand"
        for name, to, limit in ((OURS, HAND, 1.03), (OURS_COMPILED, HAND_COMPILED, 1.03), (OURS_COMPILED, HAND, 1.0)):
            limit = limit if case.gains or (name, to) != (OURS_COMPILED, HAND) else None
            low, high = measure.middle_half(results.ratios(name, to))
            bits = "same bits" if results.same_bits(name, to) else "other bits, within rounding"
            spread = f"middle half {low:.3f} - {high:.3f}, fastest laps {results.best_ratio(name, to):.3f}; {bits}"
            lines.append(Goal(f"{case.name}: {name} / {to}", results.ratio(name, to), "", limit, spread))
        names = (HAND, OURS, HAND_COMPILED, OURS_COMPILED)
        rows.append([case.name, f"{steps}", *(f"{results.step_us(name) / 1000:.2f}" for name in names)])
    page = "\n\n".join(
        [
            "## Compiled steps",
            f"Machine: {measure.machine()}. {rounds} rounds of {laps} laps of one epoch.",
            measure.goal_table(lines),
            measure.table(
                ["", "steps an epoch", *(f"{n}, ms a step" for n in (HAND, OURS, HAND_COMPILED, OURS_COMPILED))], rows
            ),
        ]
    )
    print(page)
    if options.write:
        measure.write_section(options.write, "compiled", page)
    return 1 if any(line.limit is not None and line.value > line.limit for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
