"""The recipe of docs/fsdp.md for tensor parallelism, with two ranks; rank 0 writes the weights.

python cases_of_tensor_parallel.py OUT.json
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import loopwright as lw
from cases_of_ranks import X, Y, net


def spread(module: nn.Module) -> None:
    """The first layer by its rows, the second by its columns: one message forward, one backward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    parallelize_module(module, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def main(out: str) -> None:
    module = net()
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
        spread(module)
    task = lw.Supervised(module, nn.CrossEntropyLoss(), torch.optim.AdamW(module.parameters(), 1e-2))
    trainer = lw.Trainer(epochs=3, seed=1, strategy="single", clip_norm=0.5, folder=None, progress=False)
    run = trainer.fit(task, DataLoader(TensorDataset(X, Y), 16, shuffle=True), (X[:50], Y[:50]))
    weights: list[Any] = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in module.parameters()]
    if os.environ.get("RANK", "0") == "0":
        with open(out, "w") as file:
            json.dump([[w.double().flatten().tolist() for w in weights], run.history["train/loss"]], file)


if __name__ == "__main__":
    main(sys.argv[1])
