"""Research code in one class: a variational autoencoder and a classifier that share their encoder.

An ``lw.Task`` says what happens to a batch and knows nothing of loops, devices or logging.
Real data: the 1797 handwritten digits of scikit-learn, 8x8 pixels.
Run: python examples/task.py [--epochs 40]
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import loopwright as lw


class DigitVAE(lw.Task):
    """Sixteen numbers for 64 pixels, from which the image can be drawn again and its digit read."""

    def __init__(self, latent: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 256), nn.SiLU(), nn.Linear(256, 64))
        self.classifier = nn.Linear(latent, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Redraw images [N, 64] from the means of their codes; predictions are made with it."""
        mean, _ = self.encoder(pixels).chunk(2, dim=1)
        return self.decoder(mean).sigmoid()

    def training_step(self, batch: list[Tensor]) -> dict[str, Tensor]:
        pixels, digit = batch
        mean, log_variance = self.encoder(pixels).chunk(2, dim=1)
        noise = torch.randn_like(mean) if self.training else 0.0  # measured at the mean, trained around it
        code = mean + noise * (0.5 * log_variance).exp()

        logits = self.classifier(code)
        drawn = F.binary_cross_entropy_with_logits(self.decoder(code), pixels, reduction="none").sum(1).mean()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
        read = F.cross_entropy(logits, digit)
        loss = drawn + 0.5 * kl + 10 * read
        # the scalars are logged; preds and target feed the metrics
        return {"loss": loss, "drawn": drawn, "kl": kl, "read": read, "preds": logits, "target": digit}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)

    def configure_metrics(self) -> dict[str, lw.metrics.Metric]:
        return {"accuracy": lw.metrics.Accuracy()}


def main(epochs: int = 40) -> dict[str, float]:
    """Train, draw an unseen digit again, and return what was measured on all unseen ones."""
    X, y = load_digits(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(
        (X / 16).astype("float32"), y, test_size=0.25, stratify=y, random_state=0
    )
    torch.manual_seed(0)
    task = DigitVAE()
    trainer = lw.Trainer(epochs=epochs, seed=0, name="vae")
    trainer.fit(task, train=lw.Loader((X_train, y_train), batch_size=64, shuffle=True))
    result = trainer.test(task, lw.Loader((X_test, y_test), batch_size=256))

    redrawn = trainer.predict(task, X_test[:1])
    for row in torch.cat([torch.from_numpy(X_test[:1]).view(8, 8), redrawn.view(8, 8)], dim=1):
        print("   ", "".join(2 * " .:-=+*#%@"[int(9 * value)] for value in row))
    print(f"left: a {y_test[0]} never seen; right: the same, drawn from 16 numbers")
    print(f"test accuracy {result['test/accuracy']:.1%}, {result['test/drawn']:.1f} nats to draw an image")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    main(**vars(parser.parse_args()))
