"""Small trainings that give the same numbers with any number of ranks; run by every rank, rank 0 writes the results.

python cases.py OUT.json [CASE ...]; with STRATEGY=fsdp in the environment parameters are shared out as well.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import loopwright as lw
from loopwright.parallel import FSDP

N = 70  # the last batch of 16 has 6 samples: with 4 ranks uneven parts
X = torch.randn(N, 5, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(2))
PAIRS = list(zip(X, Y, strict=True))
CASES: dict[str, Callable[[], dict[str, Any]]] = {}


def case(make: Callable[..., Any]) -> Callable[..., Any]:
    CASES[make.__name__] = make
    return make


class Pairs:
    def __getitem__(self, i: int) -> Any:
        return PAIRS[i]

    def __len__(self) -> int:
        return N


class Windows(lw.data.BatchSampler):
    """Batches of 1 to 9 samples: some ranks have no part of the small ones."""

    def batches(self, epoch: int, key: int) -> list[list[int]]:
        order = torch.randperm(N, generator=torch.Generator().manual_seed(epoch)).tolist()
        found, size = [], 1
        while order:
            found.append(order[:size])
            order, size = order[size:], size % 9 + 1
        return found


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


def supervised(**more: Any) -> lw.Supervised:
    metrics = {"accuracy": lw.metrics.Accuracy()}
    return lw.Supervised(
        net(), nn.CrossEntropyLoss(), lambda params: torch.optim.SGD(params, 0.1, momentum=0.9), metrics=metrics, **more
    )


def trainer(**settings: Any) -> lw.Trainer:
    strategy: Any = FSDP(blocks=nn.Linear) if os.environ.get("STRATEGY") == "fsdp" else "auto"
    given = {"epochs": 3, "seed": 1, "folder": None, "progress": False, "log_every": 3, "strategy": strategy}
    return lw.Trainer(**(given | settings))


def outcome(run: lw.Run, **more: Any) -> dict[str, Any]:
    p = run.progress
    weights = [q.detach().double().flatten().tolist() for model in run.models.values() for q in model.parameters()]
    history = [{k: v for k, v in record.items() if k != "seconds"} for record in run.history]
    place = {"step": p.step, "epoch": p.epoch, "batch": p.batch, "samples": p.samples, "phase_steps": p.phase_steps}
    return {"weights": weights, "history": history, "progress": place, "stop": run.stop_reason, **more}


def trained(data: Any, *, weight: Any = None, **settings: Any) -> dict[str, Any]:
    task = supervised()
    return outcome(trainer(**settings).fit(task, data, (X[:50], Y[:50]), weight=weight))


@case
def arrays() -> dict[str, Any]:
    return trained((X, Y))


@case
def tensor_dataset() -> dict[str, Any]:
    return trained(DataLoader(TensorDataset(X, Y), 16, shuffle=True))


@case
def data_loader() -> dict[str, Any]:
    return trained(DataLoader(PAIRS, 16, shuffle=True))


@case
def data_loader_workers() -> dict[str, Any]:
    return trained(DataLoader(PAIRS, 16, shuffle=True, num_workers=2))


@case
def own_loader_workers() -> dict[str, Any]:
    return trained(lw.Loader(Pairs(), 16, shuffle=True, workers=2))


@case
def a_list_of_batches() -> dict[str, Any]:
    return trained([[x, y] for x, y in zip(X.split(16), Y.split(16), strict=True)])


@case
def a_generator_function() -> dict[str, Any]:
    def batches() -> Any:
        yield from zip(X.split(16), Y.split(16), strict=True)

    return trained(batches)


@case
def small_batches() -> dict[str, Any]:
    return trained(lw.Loader((X, Y), sampler=Windows()))


@case
def mixed() -> dict[str, Any]:
    return trained(lw.data.Mix({"a": (X, Y), "b": lw.Loader((X, Y), 5, shuffle=True)}))


@case
def limited() -> dict[str, Any]:
    return trained(lw.data.limit(DataLoader(PAIRS, 16, shuffle=True), batches=3))


@case
def accumulated() -> dict[str, Any]:
    return trained(DataLoader(TensorDataset(X, Y), 9, shuffle=True), accumulate=3)


@case
def accumulated_small_batches() -> dict[str, Any]:
    return trained(lw.Loader((X, Y), sampler=Windows()), accumulate=4)


def by_tokens(batch_size: int, **settings: Any) -> dict[str, Any]:
    """A loss that is a mean over some of the targets; a rank's part may have none of them, and is left out."""
    task = supervised()
    task.metrics = {}
    task.loss = nn.CrossEntropyLoss(ignore_index=0)
    data = DataLoader(TensorDataset(X, Y), batch_size)
    run = trainer(**settings).fit(task, data, weight=lambda batch: (batch[1] != 0).sum())
    return outcome(run)


@case
def weighted_by_tokens() -> dict[str, Any]:
    return by_tokens(16)


@case
def weighted_and_accumulated() -> dict[str, Any]:
    return by_tokens(5, accumulate=4)


@case
def clipped() -> dict[str, Any]:
    return trained(DataLoader(TensorDataset(X, Y), 16, shuffle=True), clip_norm=0.5)


class Gan(lw.Task):
    """Two phases, one of them every other step."""

    def __init__(self) -> None:
        super().__init__()
        self.gen, self.disc = net(1), net(2)
        self.back = nn.Linear(3, 5)
        nn.init.constant_(self.back.weight, 0.1)
        nn.init.zeros_(self.back.bias)

    def configure_optimizers(self) -> dict[str, Any]:
        generator = [*self.gen.parameters(), *self.back.parameters()]
        return {
            "disc": torch.optim.SGD(self.disc.parameters(), 0.05),
            "gen": torch.optim.Adam(generator, 1e-2),
        }

    def disc_step(self, batch: Any) -> dict[str, Any]:
        x, _ = batch
        fake = self.back(self.gen(x)).detach()
        return {"loss": self.disc(x).pow(2).mean() - self.disc(fake).mean(), "gap": (fake - x).abs().mean()}

    def gen_step(self, batch: Any) -> Any:
        x, _ = batch
        return (self.disc(self.back(self.gen(x))) - 1).pow(2).mean()

    def validation_step(self, batch: Any) -> dict[str, Any]:
        return self.disc_step(batch)

    def phases(self) -> list[lw.Phase]:
        return [
            lw.Phase("disc", self.disc_step, "disc", clip_norm=1.0),
            lw.Phase("gen", self.gen_step, "gen", every=2),
        ]


@case
def two_phases() -> dict[str, Any]:
    data = DataLoader(TensorDataset(X, Y), 9, shuffle=True)
    return outcome(trainer(accumulate=2).fit(Gan(), data, DataLoader(TensorDataset(X, Y), 16)))


@case
def a_last_batch_of_one() -> dict[str, Any]:
    data = DataLoader(TensorDataset(X[:49], Y[:49]), 16)
    return outcome(trainer().fit(supervised(), data, data))


@case
def two_stages() -> dict[str, Any]:
    stages = [lw.Stage("head", "1 epoch", train="module.2.*"), lw.Stage("all", "5 steps", accumulate=2)]
    data = DataLoader(TensorDataset(X, Y), 8, shuffle=True)
    return outcome(trainer(epochs=None).fit(supervised(), data, stages=stages))


class Ruled(Gan):
    """The generator moves by a rule, which all ranks must follow alike though each has a loss of its own."""

    def phases(self) -> list[lw.Phase]:
        disc, gen = super().phases()
        gen.every = lambda run: run.progress.step % 3 != 1 and bool(run.latest.get("disc/loss", 0.0) > -9.0)
        return [disc, gen]


@case
def phases_by_a_rule_and_stages_with_a_plateau() -> dict[str, Any]:
    plateau = lw.Plateau("train/disc/loss", patience=1, min_delta=0.3)
    stages = [lw.Stage("a", ["6 epochs", plateau]), lw.Stage("b", "3 steps")]
    return outcome(trainer(epochs=None).fit(Ruled(), DataLoader(TensorDataset(X, Y), 9, shuffle=True), stages=stages))


@case
def skipped_batches_of_one_rank() -> dict[str, Any]:
    """What is left out depends on the ranks: only that all agree can be compared."""
    rank = int(os.environ.get("RANK", "0"))

    class Picky(lw.Callback):
        def map_batch(self, run: lw.Run, batch: Any) -> Any:
            if rank == 1 and run.progress.batch % 3 == 1:
                raise lw.SkipBatch
            if rank == 0 and run.progress.batch % 5 == 4:
                raise lw.SkipStep
            return batch

    task = supervised()
    run = trainer(callbacks=[Picky()]).fit(task, DataLoader(TensorDataset(X, Y), 16, shuffle=True))
    mine = [q.detach().flatten().tolist() for q in task.module.parameters()]
    return {"step": run.progress.step >= 10, "same": all(one == mine for one in run.comm.gather(mine))}


def by_step_functions(*steps: Any, **hypers: Any) -> dict[str, Any]:
    task = supervised()
    task.optimizer = lambda params: lw.optim.Stepwise(params, steps, lr=0.01, **hypers)
    return outcome(trainer().fit(task, DataLoader(TensorDataset(X, Y), 16, shuffle=True)))


@case
def step_functions() -> dict[str, Any]:
    return by_step_functions(*lw.optim.lookahead(lw.optim.decay, lw.optim.adam), k=3, weight_decay=0.1)


@case
def lamb() -> dict[str, Any]:
    return by_step_functions(lw.optim.lamb, weight_decay=0.1)


WHOLE = {"sharpness_aware", "sharpness_aware_small_batches", "averaged_weights"}  # they refuse parts of parameters


def is_shared_out() -> bool:
    """What a case asks for is refused where parameters are shared out; it is left out there."""
    return "STRATEGY" in os.environ


@case
def sharpness_aware() -> dict[str, Any]:
    if is_shared_out():
        return {}
    data = DataLoader(TensorDataset(X, Y), 9, shuffle=True)
    return trained(data, accumulate=3, clip_norm=0.5, callbacks=[lw.SAM(0.1)])


@case
def sharpness_aware_small_batches() -> dict[str, Any]:
    if is_shared_out():
        return {}
    return trained(lw.Loader((X, Y), sampler=Windows()), accumulate=2, callbacks=[lw.SAM(0.1)])


@case
def averaged_weights() -> dict[str, Any]:
    """Validation sees them; they are the same on all ranks."""
    task, ema = supervised(), lw.EMA(0.9)
    run = trainer(callbacks=[ema]).fit(task, DataLoader(TensorDataset(X, Y), 16, shuffle=True), (X[:50], Y[:50]))
    mine = [q.detach().flatten().tolist() for q in ema.averages["model"].parameters()]
    return outcome(run, average=mine, same=all(one == mine for one in run.comm.gather(mine)))


@case
def stopped_early() -> dict[str, Any]:
    return trained((X, Y), epochs=20, callbacks=[lw.EarlyStopping("valid/loss", patience=1, min_delta=0.02)])


@case
def evaluated() -> dict[str, Any]:
    """7 samples, predictions in order, metrics whose totals are floats."""
    task, alone = supervised(), trainer()

    class Own(lw.metrics.Metric):
        state: ClassVar = {"total": "sum", "rows": "cat", "top": "max"}

        def update(self, preds: Any, target: Any) -> None:
            self.add(total=preds.exp().sum(), rows=preds[:, 0], top=preds.max())

        def compute(self) -> dict[str, Any]:
            rows = self.total("rows")
            return {"total": self.total("total"), "last": rows[-1], "n": len(rows), "top": self.total("top")}

    task.metrics = {"accuracy": lw.metrics.Accuracy(), "own": Own()}
    data = lw.Loader((X[:7], Y[:7]), 2)
    found = {f"{k}": v for k, v in alone.test(task, data).items()}
    return {"test": found, "predicted": alone.predict(task, data).tolist()}


@case
def torchmetrics_metric() -> dict[str, Any]:
    from torchmetrics.classification import MulticlassAUROC, MulticlassF1Score

    task = supervised()
    task.metrics = {
        "auroc": lw.metrics.On(MulticlassAUROC(3), "preds", "target"),
        "f1": MulticlassF1Score(3, average="macro"),
    }
    data = lw.Loader((X, Y), 2)
    return {"test": trainer().test(task, data), "history": trainer().fit(task, (X, Y)).history.records[-1]["train/f1"]}


@case
def a_function() -> dict[str, Any]:
    seen: list[int] = []

    def step(run: lw.Run, batch: Any) -> float:
        seen.append(len(batch[0]))
        return float(batch[0].sum())

    run = trainer(epochs=1).run(step, [(X[i : i + 10], Y[i : i + 10]) for i in range(0, N, 10)])
    return {"seen": sum(run.comm.gather(sum(seen))), "samples": run.progress.samples}


def main(out: str) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "this very run was done before")
    warnings.filterwarnings("ignore", message=".*The ``compute`` method of metric")
    results: dict[str, Any] = {}
    for name, make in CASES.items():
        if len(sys.argv) < 3 or name in sys.argv[2:]:
            results[name] = make()
    if int(os.environ.get("RANK", "0")) == 0:
        with open(out, "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main(sys.argv[1])
