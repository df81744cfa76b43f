"""What ships, in one run beside a loop by hand, with TensorBoard reading the points."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn

import loopwright as lw
from loggers.test_plugin import printed, rows
from tiny import classifier, loader, trainer
from trackers.test_tensorboard import read

LOSS = nn.CrossEntropyLoss()


def adamw(net: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(lw.groups(net, no_decay=True), lr=0.02, weight_decay=0.5)


def by_hand(net: nn.Module, epochs: int) -> list[Tensor]:
    """Windows of two batches, each a mean over its samples; clipped; no decay of what has one dimension."""
    wide, flat = ([p for p in net.parameters() if (p.dim() > 1) == many] for many in (True, False))
    optimizer = torch.optim.AdamW([{"params": wide}, {"params": flat, "weight_decay": 0.0}], lr=0.02, weight_decay=0.5)
    batches = list(loader(batch_size=8))
    for _ in range(epochs):
        for window in (batches[i : i + 2] for i in range(0, len(batches), 2)):
            optimizer.zero_grad()
            total = sum(len(y) for _, y in window)
            for x, y in window:
                loss = LOSS(net(x), y)
                loss.backward(torch.tensor(len(y) / total) if len(window) > 1 else None)
            nn.utils.clip_grad_norm_([*wide, *flat], 0.3)
            optimizer.step()
    return list(net.parameters())


@pytest.mark.capability("CA-23")
def test_accumulation_clipping_decay_the_best_checkpoints_and_tensorboard_are_built_in(folder: Path) -> None:
    """All at once: the bits of the loop by hand, no decay on biases and norms, the 3 best kept, TensorBoard."""
    net = classifier(batch_norm=True)
    hand = copy.deepcopy(net)
    keep = lw.Checkpoint("1000 epochs", monitor="valid/loss", keep=3, at_end=False)
    user = trainer(
        epochs=8, accumulate=2, clip_norm=0.3, checkpoint=keep, loggers="tensorboard", log_every=1, folder=folder
    )
    optimizer = adamw(net)
    run = user.fit(lw.Supervised(net, LOSS, optimizer), loader(batch_size=8), loader(20, batch_size=20))
    assert all(map(torch.equal, net.parameters(), by_hand(hand, 8)))

    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert [name for name, p in net.named_parameters() if id(p) in decayed] == ["0.weight", "3.weight"]

    losses = dict(zip(run.history.steps, run.history["valid/loss"], strict=True))
    best = sorted(losses, key=losses.__getitem__)[:3]
    assert run.folder is not None
    there = sorted(int(path.name.removeprefix("step-")) for path in run.folder.glob("checkpoints/step-*"))
    assert set(best) <= set(there) <= {*best, run.progress.step}  # the last one stays besides
    assert keep.best is not None
    assert keep.best.name == f"step-{best[0]:08d}"

    events = read(run.folder / "tensorboard")
    assert [(e.step, e.value) for e in events.Scalars("valid/loss")] == [
        (step, pytest.approx(loss)) for step, loss in losses.items()
    ]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(run.history.losses["loss"].tolist())


@pytest.mark.capability("SK-15")
def test_schedule_scoring_stopping_checkpoint_freezing_and_trackers_ship(folder: Path) -> None:
    """A torch scheduler, a metric of scikit-learn and one of one's own, stopping, checkpoints, freezing, trackers."""
    net = classifier()
    frozen = [p.detach().clone() for p in net[0].parameters()]

    def right(preds: Tensor, target: Tensor) -> Tensor:
        return (preds.argmax(1) == target).double().mean()

    task = lw.Supervised(
        net,
        LOSS,
        torch.optim.SGD(net.parameters(), lr=0.4, momentum=0.9),
        schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
        metrics={"f1": lw.metrics.Function(lambda y_true, y_pred: f1_score(y_true, y_pred, average="macro")),
                 "right": right},
    )  # fmt: skip
    stop = lw.EarlyStopping("valid/f1", patience=2)
    keep = lw.Checkpoint("1000 epochs", monitor="valid/f1", at_end=False, restore="best")
    stages = [lw.Stage("head", until="40 epochs", freeze="module.0.*")]
    answers: list[tuple[float, float]] = []

    class Look(lw.Callback):
        """Says what the two scores are, from the predictions of the validation alone."""

        def on_validation_start(self, run: lw.Run) -> None:
            self.seen: list[Any] = []

        def on_eval_batch_end(self, run: lw.Run, output: Any, batch: Any) -> None:
            self.seen.append((output["target"], output["preds"].argmax(1)))

        def on_validation_end(self, run: lw.Run, values: Any) -> None:
            target, preds = (torch.cat(part) for part in zip(*self.seen, strict=True))
            answers.append((f1_score(target, preds, average="macro"), float((target == preds).double().mean())))

    run = trainer(
        callbacks=[Look(), stop], checkpoint=keep, log_every=1, folder=folder,
        loggers=["tensorboard", printed()()],
    ).fit(task, loader(batch_size=8), loader(30, batch_size=10), stages=stages)  # fmt: skip

    epochs = run.progress.epoch
    assert run.history["lr"] == [0.4 * 0.5 ** (n // 2) for n in range(epochs)]
    assert run.history["valid/f1"] == pytest.approx([macro for macro, _ in answers])
    assert run.history["valid/right"] == pytest.approx([share for _, share in answers])

    scores = run.history["valid/f1"]
    at = scores.index(max(scores))
    assert epochs == at + 3 < 40
    assert "valid/f1" in str(run.stop_reason)

    assert all(map(torch.equal, net[0].parameters(), frozen))
    preds = torch.cat([net(x) for x, _ in loader(30, batch_size=10)]).argmax(1)
    target = torch.cat([y for _, y in loader(30, batch_size=10)])
    assert f1_score(target, preds, average="macro") == pytest.approx(max(scores))  # the best weights are back

    assert run.folder is not None
    assert [e.value for e in read(run.folder / "tensorboard").Scalars("valid/f1")] == pytest.approx(scores)
    assert [value for _, name, value in rows(run) if name == "valid/f1"] == scores
    assert json.loads((run.folder / "run.json").read_text())["status"] == "stopped"
