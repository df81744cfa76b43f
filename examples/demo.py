"""The demo: a small convolutional network learns to read handwritten digits, and a report shows how well.

Real data: the 1797 digits of scikit-learn, 8x8 pixels. A quarter, drawn evenly from the ten classes, is the test:
it is looked at once, after training. A tenth of the rest chooses the best checkpoint. ``--seed`` sets everything
that is drawn: the split, the first weights, the order of the images and their distortions.
Run: python examples/demo.py [--seed 0] [--epochs 24] [--folder runs]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from digits_report import Findings, describe_folder, draw_picture, write_tables
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import loopwright as lw


class Split(NamedTuple):
    """Images [N, 1, 8, 8], float32 in [0, 1], and their digits [N], int64, of each part."""

    train: tuple[np.ndarray, np.ndarray]
    valid: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def load(seed: int) -> Split:
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype("float32").reshape(-1, 1, 8, 8)
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.25, stratify=y, random_state=seed)
    X, X_valid, y, y_valid = train_test_split(X, y, test_size=0.1, stratify=y, random_state=seed)
    return Split((X, y), (X_valid, y_valid), (X_test, y_test))


class Distort(lw.Callback):
    """Turns, stretches, slants and moves each training image a little, and adds noise: all images of a batch at once.

    Reads: nothing. Changes: the images that are trained on, never those of a validation or test.
    """

    def __init__(self, degrees: float = 10, stretch: float = 0.1, slant: float = 0.1, pixels: float = 0.5) -> None:
        self.largest = torch.tensor([math.radians(degrees), stretch, slant, pixels / 4, pixels / 4])

    def map_batch(self, run: lw.Run, batch: list[Tensor]) -> list[Tensor]:
        images, digits = batch
        drawn = torch.rand(len(images), 5, device=images.device) * 2 - 1
        angle, stretch, slant, right, down = (drawn * self.largest.to(images.device)).unbind(1)
        cos, sin = angle.cos() * (1 + stretch), angle.sin() * (1 + stretch)
        affine = torch.stack([cos, slant - sin, right, sin, cos, down], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(affine, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, align_corners=False)
        return [images + 0.03 * torch.randn_like(images), digits]


def network(width: int = 24) -> nn.Sequential:
    """Four convolutions with batch norm: images [N, 1, 8, 8] to scores [N, 10]."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    wide = 2 * width
    return nn.Sequential(
        *block(1, width), *block(width, width), nn.MaxPool2d(2),
        *block(width, wide), *block(wide, wide), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(4 * wide, 10),
    )  # fmt: skip


def main(seed: int = 0, epochs: int = 24, folder: str = "runs") -> float:
    """Train, test the best checkpoint, print and save the report, and return the accuracy on the test images."""
    data = load(seed)
    torch.manual_seed(seed)
    net = network()
    train = lw.Loader(data.train, batch_size=64, shuffle=True)
    print(
        f"Handwritten digits: {len(data.train[1])} images to train on, {len(data.valid[1])} to choose the best "
        f"checkpoint,\n{len(data.test[1])} to test it; {sum(p.numel() for p in net.parameters()):,} weights\n"
    )

    task = lw.Supervised(
        net,
        loss=nn.CrossEntropyLoss(label_smoothing=0.1),
        optimizer=torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=1e-2),
        schedule=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=epochs * len(train)),
        metrics={"accuracy": lw.metrics.Accuracy()},
    )
    checkpoint = lw.Checkpoint(monitor="valid/loss", keep=1)
    report = lw.Report()
    trainer = lw.Trainer(
        epochs=epochs, seed=seed, folder=folder, name="digits", checkpoint=checkpoint, callbacks=[Distort(), report]
    )
    run = trainer.fit(task, train, valid=lw.Loader(data.valid, batch_size=256))

    # a checkpoint is plain safetensors: any tool can read it
    net.load_state_dict(load_file(checkpoint.best / "model.safetensors"))
    scores = trainer.predict(task, data.test[0])
    best = min(run.history, key=lambda record: record["valid/loss"])
    findings = Findings(*data.test, scores.softmax(1).numpy(), run.history, best["epoch"])

    tables = write_tables(findings)
    (run.folder / "report.txt").write_text(tables, encoding="utf-8")
    draw_picture(findings, run.folder / "report.png")
    trainer.test(task, data.test)  # adds what the best checkpoint says of them to the page
    print(f"\n{tables}\n{describe_folder(run.folder)}\n\nOpen {report.path} in a browser: the whole run on one page")
    return findings.accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    main(**vars(parser.parse_args()))
