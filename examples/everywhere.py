"""One script for a laptop, for several processes and machines, and for a SLURM job, in 32 or 16 bits.

Digits are read as sixteen patches by a network of residual blocks; nothing below asks how many processes there are.

  python examples/everywhere.py [--epochs 12]              one process, on the accelerator if there is one
  ... everywhere.py --precision bf16                       16 bits; also fp16
  loopwright launch --nproc 2 -- examples/everywhere.py    two processes, data parallel
  srun python examples/everywhere.py --strategy fsdp       every task of a SLURM job, parameters shared out

Run: python examples/everywhere.py [--epochs 12] [--precision fp32] [--strategy auto]
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import loopwright as lw


class Block(nn.Module):
    """Looks across the patches, then into each of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.across = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.within = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(x.transpose(1, 2)).transpose(1, 2)
        return x + self.within(x)


class Mixer(nn.Module):
    """Images [N, 64] to the scores of ten digits, as the MLP-Mixer of Tolstikhin et al. 2021."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.scores = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)  # sixteen patches of 2x2 pixels
        x = self.patches(x)
        for block in self.blocks:
            x = block(x)
        return self.scores(x.mean(1))


def main(epochs: int = 12, precision: str = "fp32", strategy: str = "auto") -> dict[str, float]:
    """Train, and return loss and accuracy on the images that were held out; every process returns the same."""
    images, digits = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    images, digits = images.float() / 8 - 1, digits.long()
    torch.manual_seed(0)
    schedule = lw.schedules.warmup(lw.schedules.cosine(0.1, 0.0), 0.1)
    sgd = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)  # noqa: E731 - made where parameters end up
    metrics = {"accuracy": lw.metrics.Accuracy()}
    task = lw.Supervised(Mixer(), nn.CrossEntropyLoss(), sgd, schedule=schedule, metrics=metrics)
    trainer = lw.Trainer(
        epochs, seed=0, name="everywhere", precision=precision, strategy=strategy, accumulate=2, clip_norm=1.0,
        callbacks=[lw.Requeue()], loggers=[lw.JSONLLogger(), lw.CSVLogger()],
    )  # fmt: skip
    train = lw.Loader((images[:1400], digits[:1400]), 32, shuffle=True)
    run = trainer.fit(task, train, lw.Loader((images[1400:], digits[1400:]), 32), resume="auto")
    if run.comm.rank == 0:
        print(f"accuracy {run.metrics['valid/accuracy']:.1%} by {run.comm.world_size} of {run.device}; {run.folder}")
    return {name: value for name, value in run.metrics.items() if name.startswith("valid/")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--strategy", default="auto")
    main(**vars(parser.parse_args()))
