"""Data parallel: our fit next to a loop written by hand around torch's DistributedDataParallel, two gloo processes.

``torchrun --standalone --nproc-per-node 2 benchmarks/ddp.py --write``. Both train the same network on the same global
batches, one after the other in the same processes, in an order that alternates; the median of the ratios counts.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import loopwright as lw
import measure

BATCH, SAMPLES = 64, 1280
IMAGES = torch.randn(SAMPLES, 1, 16, 16, generator=torch.Generator().manual_seed(0))
TARGET = torch.randint(0, 10, (SAMPLES,), generator=torch.Generator().manual_seed(1))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(48, 48, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48 * 16, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def by_hand(make: Callable[[], nn.Module], epochs: int) -> nn.Module:
    net = make()
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    dataset = TensorDataset(IMAGES, TARGET)
    sampler = DistributedSampler(dataset, seed=0)
    loader = DataLoader(dataset, BATCH // dist.get_world_size(), sampler=sampler)
    loss_of = nn.CrossEntropyLoss()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for inputs, target in loader:
            optimizer.zero_grad()
            loss_of(model(inputs), target).backward()
            optimizer.step()
    return net


def ours(make: Callable[[], nn.Module], epochs: int) -> nn.Module:
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), optimizer, metrics={"accuracy": lw.metrics.Accuracy()})
    data = DataLoader(TensorDataset(IMAGES, TARGET), BATCH, shuffle=True)
    lw.Trainer(epochs=epochs, folder=None, progress=False).fit(task, data)
    return net


def main() -> int:
    parser = measure.arguments(__doc__.splitlines()[0], rounds=31)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    rounds, epochs = options.rounds or (3 if options.quick else 31), 2 if options.quick else options.epochs
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    first, goals = dist.get_rank() == 0, []
    for name, make in (("CNN, 31k parameters", cnn), ("MLP, 134k parameters", mlp)):
        for train in (by_hand, ours):
            train(make, 1)
        ratios, steps = [], []
        for number in range(rounds):
            seconds = {}
            for train in (by_hand, ours) if number % 2 else (ours, by_hand):
                dist.barrier()
                began = time.perf_counter()
                train(make, epochs)
                dist.barrier()
                seconds[train] = time.perf_counter() - began
            ratios.append(seconds[ours] / seconds[by_hand])
            steps.append(1e3 * seconds[by_hand] / epochs / (SAMPLES // BATCH))
        low, high = measure.middle_half(ratios)
        note = f"middle half {low:.3f} - {high:.3f}; by hand {statistics.median(steps):.2f} ms a step"
        what = f"{name}: Loopwright / DistributedDataParallel by hand"
        goals.append(measure.Goal(what, statistics.median(ratios), "", 1.05, note))
    dist.destroy_process_group()
    about = f"Machine: {measure.machine()}.\nTwo gloo processes; {rounds} rounds of {epochs} epochs, set-up included."
    page = f"## Data parallel\n\n{about}\n\n{measure.goal_table(goals)}"
    if first:
        print(page, flush=True)
        if options.write:
            measure.write_section(options.write, "ddp", page)
    return 1 if first and any(goal.share > 1 for goal in goals) else 0


if __name__ == "__main__":
    sys.exit(main())
