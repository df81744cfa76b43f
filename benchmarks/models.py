"""Loopwright with defaults next to the loop written by hand, on models where the work is not all overhead.

Both train from the same seed with the same data pipeline, and must end with the same weights, bit for bit: only then
is the comparison of times fair. The text sets are read from ../shared/data or Python's own documentation; what is
absent is left out, with the reason. ``python benchmarks/models.py --write`` on an idle machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, pad
from torch.utils.data import DataLoader, Dataset

import loopwright as lw
import measure
from digits import FOLDER, Lap
from measure import Goal

HAND, OURS = "by hand", "Loopwright"


@dataclass(frozen=True)
class Case:
    """A model, its loss and its loader; ``parts()`` makes all three anew from the same seed."""

    name: str
    parts: Callable[[], tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], DataLoader]]
    accuracy: bool = True


# ---------------------------------------------------------------- a CNN, augmented in two workers


class Augmented(Dataset):
    """Digits as 1x24x24 images, shifted by up to 2 pixels and made noisy anew each time one is asked for."""

    def __init__(self):
        images, self.target = load_digits(return_X_y=True)
        small = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
        self.images = interpolate(small, scale_factor=3, mode="bilinear")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        top, left = torch.randint(0, 5, (2,)).tolist()
        image = pad(self.images[index], (2, 2, 2, 2))[:, top : top + 24, left : left + 24]
        return image + 0.1 * torch.randn(1, 24, 24), int(self.target[index])


def cnn_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(32 * 36, 10),
    )


def cnn():
    return cnn_net(), nn.CrossEntropyLoss(), DataLoader(Augmented(), 64, shuffle=True, num_workers=2)


# ---------------------------------------------------------------- ragged text

LETTERS = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz", 1)}  # 0 is the padding


class Names(Dataset):
    """First names: all letters but the last, of which there are 1 to 14, and the last as the class to predict."""

    def __init__(self, path: Path, count: int = 6400):
        words = [word for word in path.read_text().split() if len(word) > 1]
        self.words = [torch.tensor([LETTERS[letter] for letter in word]) for word in words[:count]]

    def __len__(self):
        return len(self.words)

    def __getitem__(self, index):
        return self.words[index][:-1], int(self.words[index][-1])


def padded(samples):
    words, targets = zip(*samples, strict=True)
    return nn.utils.rnn.pad_sequence(words, batch_first=True), torch.tensor(targets)


class Reader(nn.Module):
    """A GRU over the letters; the mean of its states, padding left out, says which letter comes last."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(27, 24, padding_idx=0), nn.Linear(48, 27)
        self.gru = nn.GRU(24, 48, batch_first=True)

    def forward(self, letters):
        states, _ = self.gru(self.embed(letters))
        there = (letters != 0).unsqueeze(-1)
        return self.head((states * there).sum(1) / there.sum(1))


def names(path: Path):
    data = Names(path)

    def parts():
        torch.manual_seed(0)
        return Reader(), nn.CrossEntropyLoss(), DataLoader(data, 64, shuffle=True, collate_fn=padded)

    return parts


# ---------------------------------------------------------------- a small transformer


class Windows(Dataset):
    """Windows of 64 characters from Python's own documentation, and the same moved on by one."""

    def __init__(self, count: int = 320):
        from pydoc_data.topics import topics

        text = "".join(topics[name] for name in sorted(topics))
        letters = {letter: number for number, letter in enumerate(sorted(set(text)))}
        self.text, self.vocabulary, self.count = torch.tensor([letters[letter] for letter in text]), len(letters), count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        window = self.text[index * 64 : index * 64 + 65]
        return window[:-1], window[1:]


class Transformer(nn.Module):
    """Causal layers over characters: two of width 64, unless more are asked for."""

    def __init__(self, vocabulary: int, width: int = 64, context: int = 64, layers: int = 2):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, text):
        hidden = self.embed(text) + self.place.weight
        return self.head(self.layers(hidden, mask=self.mask, is_causal=True))


def of_characters(logits, target):
    return cross_entropy(logits.flatten(0, 1), target.flatten())


def transformer():
    data = Windows()

    def parts():
        torch.manual_seed(0)
        return Transformer(data.vocabulary), of_characters, DataLoader(data, 32, shuffle=True)

    return parts


# ---------------------------------------------------------------- the comparison


def optimizer_of(net):
    return torch.optim.AdamW(net.parameters(), 1e-3)


def by_hand(case: Case):
    def prepare(epochs, end_of_epoch):
        net, loss_of, loader = case.parts()
        optimizer = optimizer_of(net)
        return measure.by_hand(net, loss_of, optimizer, loader, epochs, end_of_epoch)

    return prepare


def ours(case: Case):
    def prepare(epochs, end_of_epoch):
        net, loss_of, loader = case.parts()
        optimizer = optimizer_of(net)

        def go():
            metrics = {"accuracy": lw.metrics.Accuracy()} if case.accuracy else None
            task = lw.Supervised(net, loss=loss_of, optimizer=optimizer, metrics=metrics)
            lw.Trainer(epochs=epochs, folder=FOLDER, callbacks=[Lap(end_of_epoch)]).fit(task, train=loader)
            return net

        return go

    return prepare


def text_folder() -> Path | None:
    places = [measure.ROOT / "shared" / "data", measure.ROOT.parent / "shared" / "data"]
    return next((place for place in places if (place / "names.txt").exists()), None)


def cases(data: Path | None) -> tuple[list[Case], list[str]]:
    """The cases that can run here, and a line for each that cannot."""
    found = [Case("CNN, augmented in 2 workers", cnn), Case("transformer, 2 layers", transformer(), accuracy=False)]
    absent = []
    folder = data or text_folder()
    if folder is not None and (folder / "names.txt").exists():
        found.append(Case("GRU on ragged names, own collate_fn", names(folder / "names.txt")))
    else:
        absent.append("GRU on ragged names: left out, names.txt was not found (say where with --data FOLDER)")
    return found, absent


def main() -> int:
    parser = measure.arguments(__doc__.splitlines()[0], rounds=9)
    parser.add_argument("--data", type=Path, default=None, help="folder of names.txt (default ../shared/data)")
    parser.add_argument("--case", default="", help="only the cases whose name contains this")
    options = parser.parse_args()
    laps, rounds = (2, 2) if options.quick else (20, 9)  # short laps: what else the machine does meets both
    rounds = options.rounds or rounds
    torch.set_num_threads(1)
    found, absent = cases(options.data)
    lines, rows = [], []
    for case in (case for case in found if options.case in case.name):
        steps = len(case.parts()[2])
        with measure.terminal():
            results = measure.race(
                {HAND: by_hand(case), OURS: ours(case)},
                laps=laps,
                chunk=1,
                steps_per_epoch=steps,
                rounds=rounds,
                clock=measure.clock_of(options),
            )
        assert results.same_bits(OURS, HAND), f"{case.name}: the weights are not those of the loop by hand"
        low, high = measure.middle_half(results.ratios(OURS, HAND))
        spread = f"middle half {low:.3f} - {high:.3f}, fastest laps {results.best_ratio(OURS, HAND):.3f}; same bits"
        lines.append(Goal(case.name, results.ratio(OURS, HAND), "", 1.03, spread))
        rows.append([case.name, f"{steps}", f"{results.step_us(HAND):.0f}", f"{results.step_us(OURS):.0f}"])
    page = "\n\n".join(
        [
            "## Larger models, defaults next to the loop written by hand",
            f"Machine: {measure.machine()}. {rounds} rounds of {laps} laps of one epoch.",
            measure.goal_table(lines),
            measure.table(["", "steps an epoch", f"{HAND}, us a step", f"{OURS}, us a step"], rows),
            *absent,
        ]
    )
    print(page)
    if options.write:
        measure.write_section(options.write, "models", page)
    return 1 if any(line.value > line.limit for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
