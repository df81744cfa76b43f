"""LBFGS, which asks for the loss several times a step: in one line through Supervised, and written out as a step.

Both are held against the closed-form solution of least squares, and reach it to many digits.
Real data: 442 diabetes patients with 10 measurements each, and how far the disease went in a year.
Run: python examples/lbfgs.py [--epochs 20]
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import loopwright as lw


def closed_form(X: Tensor, y: Tensor) -> Tensor:
    """Weights and intercept, [11, 1], that minimise the squared error: no training at all."""
    return torch.linalg.lstsq(torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], dim=1), y).solution


def weights(net: nn.Linear) -> Tensor:
    """Weights and intercept of ``net`` in the order of ``closed_form``."""
    return torch.cat([net.weight.detach().T, net.bias.detach().view(1, 1)])


def optimizer(net: nn.Linear) -> torch.optim.LBFGS:
    limits = {"tolerance_grad": 1e-12, "tolerance_change": 1e-15}  # go on until float64 ends
    return torch.optim.LBFGS(net.parameters(), **limits, line_search_fn="strong_wolfe")


def supervised(X: Tensor, y: Tensor, epochs: int) -> Tensor:
    """Nothing to learn here: LBFGS is an optimizer like any other."""
    net = nn.Linear(10, 1, dtype=torch.float64)
    task = lw.Supervised(net, loss=nn.MSELoss(), optimizer=optimizer(net))
    trainer = lw.Trainer(epochs=epochs, name="lbfgs", device="cpu")
    trainer.fit(task, train=[(X, y)])  # one batch, which holds everything
    return weights(net)


def step_function(X: Tensor, y: Tensor, epochs: int) -> Tensor:
    """The same with a step of one's own."""
    net = nn.Linear(10, 1, dtype=torch.float64)
    lbfgs = optimizer(net)

    def step(run: lw.Run, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        X, y = batch

        def closure() -> Tensor:
            lbfgs.zero_grad()
            loss = nn.functional.mse_loss(net(X), y)
            loss.backward()
            return loss

        return {"loss": lbfgs.step(closure)}

    trainer = lw.Trainer(epochs=epochs, name="lbfgs_step", device="cpu")
    trainer.run(step, [(X, y)], state={"net": net, "lbfgs": lbfgs})
    return weights(net)


def main(epochs: int = 20) -> dict[str, float]:
    """Solve the problem in both ways and return the largest relative difference to the closed form."""
    X, y = (torch.from_numpy(part) for part in load_diabetes(return_X_y=True, scaled=False))
    X, y = (X - X.mean(0)) / X.std(0), (y / 100).view(-1, 1)
    exact = closed_form(X, y)
    ways = {"Supervised": supervised(X, y, epochs), "step function": step_function(X, y, epochs)}
    errors = {name: ((found - exact).norm() / exact.norm()).item() for name, found in ways.items()}
    for name, error in errors.items():
        print(f"{name:15}relative distance to the closed form: {error:.1e}")
    return errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    main(**vars(parser.parse_args()))
