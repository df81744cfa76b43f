"""Any step function can be trained: here one of physics, and one of scikit-learn.

``trainer.run(step, data, state=...)`` calls ``step(run, batch)`` for each batch. The step does the work itself,
with any library; it gets what training always needs: progress, logging, handlers, checkpoints, a clean stop.
Run: python examples/function.py [--epochs 200]
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier
from sklearn.model_selection import train_test_split
from torch import Tensor

import loopwright as lw


def swing(t: Tensor, omega: Tensor, damping: Tensor) -> Tensor:
    """Angle of a damped pendulum at times ``t`` (s), let go at 1 rad."""
    return torch.exp(-damping * t) * torch.cos(torch.sqrt(omega**2 - damping**2) * t)


def pendulum(epochs: int) -> dict[str, float]:
    """Frequency and damping of a pendulum, from 200 noisy measurements of its angle."""
    torch.manual_seed(0)
    t = torch.linspace(0, 10, 200)
    angle = swing(t, torch.tensor(2.0), torch.tensor(0.15)) + 0.05 * torch.randn(200)

    law = torch.nn.ParameterDict({"omega": torch.tensor(1.8), "damping": torch.tensor(0.4)})
    optimizer = torch.optim.Adam(law.parameters(), lr=0.01)

    def step(run: lw.Run, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        t, angle = batch
        optimizer.zero_grad()
        loss = torch.mean((swing(t, law["omega"], law["damping"]) - angle) ** 2)
        loss.backward()
        optimizer.step()
        return {"loss": loss}

    trainer = lw.Trainer(epochs=epochs, name="pendulum")
    trainer.run(step, [(t, angle)], state={"law": law, "optimizer": optimizer})
    return {name: value.item() for name, value in law.items()}


def digits(epochs: int) -> float:
    """Accuracy of a linear classifier of scikit-learn, fed batch by batch; it is no torch at all."""
    X, y = load_digits(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(X / 16, y, stratify=y, random_state=0)
    model = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.1, random_state=0)

    def step(run: lw.Run, batch: list[Tensor]) -> dict[str, float]:
        X, y = (part.numpy() for part in batch)
        model.partial_fit(X, y, classes=range(10))
        return {"accuracy": model.score(X, y)}

    # what checkpoints keep of an object that has no state_dict: a function to read it, and one to put it back
    learned = ("coef_", "intercept_", "t_")
    state = {"model": (lambda: {k: vars(model).get(k) for k in learned}, vars(model).update)}
    trainer = lw.Trainer(epochs=epochs, seed=0, name="sgd", device="cpu")
    trainer.run(step, lw.Loader((X_train, y_train), batch_size=64, shuffle=True), state=state)
    return float(model.score(X_test, y_test))


def main(epochs: int = 200) -> tuple[dict[str, float], float]:
    """Solve both problems and return what was found."""
    law = pendulum(epochs)
    print(f"pendulum: frequency {law['omega']:.3f} (true 2), damping {law['damping']:.3f} (true 0.15)")
    accuracy = digits(max(1, epochs // 20))
    print(f"scikit-learn, in batches: test accuracy {accuracy:.1%}")
    return law, accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200)
    main(**vars(parser.parse_args()))
