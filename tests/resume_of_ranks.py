"""A training that dies, is stopped, or goes on with another number of ranks; rank 0 prints what came of it.

python resume_of_ranks.py FOLDER {full,die,stop,resume,approximate} [plain]
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import loopwright as lw
from cases_of_ranks import PAIRS, X, Y

RANK = int(os.environ.get("RANK", "0"))
FIRST = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


class Fault(lw.Callback):
    """After step 7: rank 1 dies, or is asked to stop."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_step_end(self, run: lw.Run, result: Any) -> None:
        if run.progress.step == 7 and RANK == 1 and FIRST:
            os.kill(os.getpid(), signal.SIGKILL if self.kind == "die" else signal.SIGTERM)


def main(folder: str, mode: str, kind: str = "all") -> None:
    torch.manual_seed(RANK + 5)  # ranks that were not seeded alike
    extra = [] if kind == "plain" else [nn.BatchNorm1d(16), nn.Dropout(0.3)]
    net = nn.Sequential(nn.Linear(5, 16), *extra, nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), optimizer, metrics={"accuracy": lw.metrics.Accuracy()})
    trainer = lw.Trainer(
        epochs=3, folder=folder, name="n", progress=False, seed=3, log_every=2,
        callbacks=[Fault(mode)] if mode in ("die", "stop") else [],
        checkpoint=lw.Checkpoint(3, keep=2, monitor="valid/loss"),
    )  # fmt: skip
    data = DataLoader(PAIRS, 16, shuffle=True, num_workers=0 if kind == "plain" else 2)
    resume = {"full": None, "approximate": "approximate"}.get(mode, "auto")
    run = trainer.fit(task, data, (X[:50], Y[:50]), resume=resume)
    if RANK == 0:
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        records = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
        weights = [value.double().flatten().tolist() for value in net.state_dict().values()]
        print(json.dumps({"weights": weights, "records": records, "folder": str(run.folder)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
