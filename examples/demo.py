"""The demo: a small convolutional network learns to read handwritten digits, and a report shows how well.

Real data: the 1797 digits of scikit-learn, 8x8 pixels. A quarter, drawn evenly from the ten classes, is the test:
it is looked at once, after training. A tenth of the rest chooses the best checkpoint. ``--seed`` sets everything
that is drawn: the split, the first weights, the order of the images and their distortions.
Run: python examples/demo.py [--seed 0] [--epochs 24] [--folder runs]
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from digits_picture import draw_picture
from digits_report import Findings, write_tables
from run_folder import describe_folder
from safetensors.torch import load_file
from torch import nn

import loopwright as lw
from digits import Distort, load, network


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
    warnings.filterwarnings("ignore", "this very run")  # shown twice, it is the same run
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
