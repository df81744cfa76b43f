"""A GAN in two phases: one network draws digits, the other tells them from real ones.

Each ``lw.Phase`` is an objective with an optimizer of its own; at every step they run in order, on the same batch.
Real data: the 1797 handwritten digits of scikit-learn, 8x8 pixels. The samples are saved as a picture.
Run: python examples/gan.py [--epochs 150]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

import loopwright as lw


class DigitGAN(lw.Task):
    """Images are rows of 64 pixels in [-1, 1], each drawn from 32 random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(32, 128), nn.BatchNorm1d(128), nn.ReLU(),
            nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh(),
        )  # fmt: skip
        self.critic = nn.Sequential(
            nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Dropout(0.3),
            nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(128, 1),
        )  # fmt: skip

    def forward(self, like: Tensor) -> Tensor:  # draws as many images as there are in `like`
        return self.generator(torch.randn(len(like), 32, device=like.device))

    def critic_step(self, real: Tensor) -> Tensor:
        """Real images should score high, drawn ones low."""
        return (softplus(-self.critic(real)) + softplus(self.critic(self(like=real).detach()))).mean()

    def generator_step(self, real: Tensor) -> Tensor:
        """Drawn images should score high."""
        return softplus(-self.critic(self(like=real))).mean()

    def phases(self) -> list[lw.Phase]:
        return [
            lw.Phase("critic", self.critic_step, optimizers="critic"),
            lw.Phase("generator", self.generator_step, optimizers="generator"),
        ]

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        parts = {"critic": self.critic, "generator": self.generator}
        return {n: torch.optim.Adam(p.parameters(), lr=5e-4, betas=(0.5, 0.99)) for n, p in parts.items()}


def main(epochs: int = 150) -> tuple[Tensor, Path]:
    """Train, and return 64 drawn images, [64, 64] in [-1, 1], and the path of their picture."""
    real = torch.from_numpy(load_digits().data).float() / 8 - 1
    torch.manual_seed(0)
    task = DigitGAN()
    trainer = lw.Trainer(epochs=epochs, seed=0, name="gan")
    run = trainer.fit(task, train=lw.Loader(real, 64, shuffle=True))
    drawn = trainer.predict(task, real[:64])  # the real ones only say how many

    path = run.folder / "samples.png"
    framed = pad(drawn.view(8, 8, 8, 8), (1, 1, 1, 1), value=-1.0)
    rows = framed.transpose(1, 2).reshape(80, 80)  # eight rows of eight images
    plt.imsave(path, rows.repeat_interleave(8, 0).repeat_interleave(8, 1), cmap="gray_r")
    nearest, noise = (torch.cdist(some, real).amin(1).mean() for some in (drawn, torch.rand(64, 64) * 2 - 1))
    print(f"distance to the nearest real digit: {nearest:.2f}, that of noise: {noise:.2f}; see {path}")
    return drawn, path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=150)
    main(**vars(parser.parse_args()))
