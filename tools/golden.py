"""Write the golden checkpoint of this version: a tiny run with Adam, a scheduler and metrics, inside an epoch.

Run it once a release, and commit what it writes: tests/golden/<version>/. ``expected.json`` beside the checkpoint holds
the values as the run had them, not as they are read back. A folder that exists is never written again: old checkpoints
must be read for ever, and tests/checkpoint/test_migrations.py reads all of them. The short examples of the version and
its public surface are kept beside it: tests/test_contract.py runs the ones and looks for the other in every later one.
Run: python tools/golden.py [FOLDER]
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import loopwright as lw

EXAMPLES = ("handlers", "lbfgs", "plain_module", "task")
STEPS, MORE = 8, 4  # 5 steps an epoch: the checkpoint stands after 3 steps of the second one
GOLDEN = Path(__file__).parent.parent / "tests" / "golden"


def task() -> lw.Supervised:
    """4 features, 2 classes, Adam, a scheduler and a metric; the weights are always the same."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    for weight in net.parameters():
        weight.data = torch.linspace(-0.5, 0.75, weight.numel()).reshape(weight.shape)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.125)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    metrics = {"accuracy": lw.metrics.Accuracy()}
    return lw.Supervised(net, nn.CrossEntropyLoss(), optimizer, schedule=schedule, metrics=metrics)


def data() -> DataLoader[Any]:
    """20 samples in batches of 4, shuffled."""
    x = torch.arange(80, dtype=torch.float32).reshape(20, 4) % 7 / 8 - 0.375
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=4, shuffle=True)


def fit(steps: int, folder: Path | None, **more: Any) -> lw.Run:
    """Train for ``steps`` steps in all."""
    keep = lw.Checkpoint("1000 steps") if folder is not None else False
    trainer = lw.Trainer(steps=steps, seed=7, folder=folder, name="golden", progress=False, checkpoint=keep)
    return trainer.fit(task(), data(), **more)


def values(run: lw.Run) -> dict[str, Any]:
    """What a checkpoint of ``run`` must give back, floats as hexadecimal text."""
    (model,), (optimizer,) = run.models.values(), run.optimizers.values()
    moments = {str(n): _hex(state["exp_avg"]) for n, state in optimizer.state_dict()["state"].items()}
    p = run.progress
    return {
        "weights": {name: _hex(value) for name, value in model.state_dict().items()},
        "exp_avg": moments, "lr": optimizer.param_groups[0]["lr"].hex(),
        "progress": {"step": p.step, "epoch": p.epoch, "batch": p.batch, "samples": p.samples},
        "metrics": {name: float(value).hex() for name, value in run.metrics.items()},
    }  # fmt: skip


def _hex(tensor: Tensor) -> list[str]:
    return [float(value).hex() for value in tensor.flatten()]


def main(target: Path) -> None:
    """Write ``target``."""
    if target.exists():
        raise SystemExit(f"{target} exists, and golden checkpoints are never changed")
    with tempfile.TemporaryDirectory() as folder:
        run = fit(STEPS, Path(folder))
        later = fit(STEPS + MORE, None)
        assert run.folder is not None
        (written,) = (run.folder / "checkpoints").glob("step-*")
        shutil.copytree(written, target / written.name)
    (target / "examples").mkdir()
    for name in EXAMPLES:
        shutil.copy(GOLDEN.parent.parent / "examples" / f"{name}.py", target / "examples")
    shutil.copy(GOLDEN.parent / "api.txt", target)
    expected = {**values(run), "later": values(later)["weights"]}
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN / lw.__version__)
