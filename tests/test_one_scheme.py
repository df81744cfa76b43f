"""One task and one set of settings: searched, debugged, spread over processes, steered and logged in the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopwright as lw
from tiny import classifier, samples

X, Y = samples(48)


class Both(lw.Task):
    """Two phases: the second runs at every other step."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.net, self.rate = classifier(), rate

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        preds = self.net(batch[0])
        return {"loss": nn.functional.cross_entropy(preds, batch[1]), "preds": preds, "target": batch[1]}

    def phases(self) -> list[lw.Phase]:
        return [
            lw.Phase("body", self.training_step, optimizers="body"),
            lw.Phase("head", self.training_step, optimizers="head", every=2),
        ]

    def configure_optimizers(self) -> Any:
        parts = {"body": self.net[0], "head": self.net[-1]}
        return {name: torch.optim.SGD(part.parameters(), self.rate) for name, part in parts.items()}

    def configure_metrics(self) -> Any:
        return {"accuracy": lw.metrics.Accuracy()}


def trained(rate: float, *, stop_at: int | None = None, **settings: Any) -> lw.Run:
    """What everything below calls: the settings differ, the code does not."""
    settings = {"epochs": 4, "accumulate": 2, "folder": "runs", "name": "one", "log_every": 1, **settings}
    loggers = ["csv", "jsonl"] if settings["folder"] else []
    user = lw.Trainer(progress=False, checkpoint=False, seed=0, loggers=loggers, **settings)
    if stop_at is not None:
        user.on(lw.Event.STEP_END(once=stop_at))(lambda run: run.request_stop("enough"))
    return user.fit(Both(rate), lw.Loader((X, Y), 8, shuffle=True), lw.Loader((X, Y), 24))


@pytest.mark.slow
@pytest.mark.capability("PL-14")
def test_search_debug_ranks_steering_and_logs_are_settings_of_one_scheme(folder: Path) -> None:
    """The same task and call: searched over, rehearsed, overfitted, on two ranks, stopped by a handler, logged."""
    # a search: each run has its folder, its settings in it, and the best is that of the smallest loss
    runs = {rate: trained(rate) for rate in (0.001, 0.5)}
    assert min(runs, key=lambda rate: runs[rate].metrics["valid/loss"]) == 0.5
    assert len({run.folder for run in runs.values()}) == 2

    # logging: the same numbers in every logger
    whole = runs[0.5]
    assert whole.folder is not None
    lines = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line["train/body/loss"] for line in lines if line["kind"] == "train"]
    assert logged == pytest.approx(whole.history.losses["body/loss"].tolist())
    table = (whole.folder / "metrics.csv").read_text().splitlines()
    assert "train/head/loss" in table[0]
    assert len(logged) == whole.progress.step == 12

    # loop logic: a phase at every other step, a handler that stops
    assert whole.progress.phase_steps == {"body": 12, "head": 6}
    stopped = trained(0.5, stop_at=5)
    assert (stopped.progress.step, stopped.stop_reason, stopped.status) == (5, "enough", "stopped")

    # debugging: a rehearsal that leaves no folder, and one batch again and again
    before = sorted(Path("runs").rglob("*"))
    rehearsed = trained(0.5, debug=lw.Debug(dev_run=2))
    assert rehearsed.progress.step < 12
    assert sorted(Path("runs").rglob("*")) == before
    assert trained(0.5, debug=lw.Debug(overfit=1), epochs=30, folder=None).metrics["train/body/loss"] < 0.5

    # two processes: the same call, the same weights
    def rank() -> list[Tensor]:
        return [p.detach().clone() for p in trained(0.5).task.parameters()]

    first, second = lw.launch(rank, 2)
    assert all(map(torch.equal, first, second))
    torch.testing.assert_close(first, list(whole.task.parameters()), atol=1e-6, rtol=1e-6)
