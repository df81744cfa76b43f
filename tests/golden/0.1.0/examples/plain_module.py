"""A plain PyTorch module, trained in about fifteen lines: which tumours are malignant?

Real data: 569 biopsies with 30 measurements each (the breast cancer data of scikit-learn).
Run: python examples/plain_module.py [--epochs 30]
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import nn

import loopwright as lw


def main(epochs: int = 30) -> dict[str, float]:
    """Train, test on the quarter that was held out, and return its loss and accuracy."""
    X, y = load_breast_cancer(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(
        X.astype("float32"), y, test_size=0.25, stratify=y, random_state=0
    )
    torch.manual_seed(0)
    # the first layer brings the 30 measurements, of very different units, to one scale
    net = nn.Sequential(nn.BatchNorm1d(30), nn.Linear(30, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 2))

    task = lw.Supervised(
        net,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW(net.parameters(), lr=3e-3),
        metrics={"accuracy": lw.metrics.Accuracy()},
    )
    trainer = lw.Trainer(epochs=epochs, seed=0, name="plain_module")
    run = trainer.fit(task, train=lw.Loader((X_train, y_train), batch_size=32, shuffle=True))
    result = trainer.test(task, lw.Loader((X_test, y_test), batch_size=256))

    print(run.history)
    print(f"test accuracy {result['test/accuracy']:.1%} on {len(y_test)} biopsies; the run is in {run.folder}")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    main(**vars(parser.parse_args()))
