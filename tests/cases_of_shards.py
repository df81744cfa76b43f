"""Trainings of which parameters are shared out over ranks, and their checkpoints; run by every rank.

python cases_of_shards.py FOLDER COMMAND ...; with STRATEGY in the environment. Rank 0 writes FOLDER/<COMMAND>.json.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import loopwright as lw
from cases_of_ranks import PAIRS, N, X, Y
from loopwright.parallel import whole

STEPS, EVERY = 20, 7
COMMANDS: dict[str, Callable[[Path], Any]] = {}


def command(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    COMMANDS[make.__name__] = make
    return make


class Reads:
    """A dataset that knows what has been read."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __getitem__(self, i: int) -> Any:
        self.seen.append(i)
        return PAIRS[i]

    def __len__(self) -> int:
        return N


class Losses:
    """A logger that keeps the loss of each step, over all ranks."""

    def __init__(self) -> None:
        self.found: dict[int, float] = {}

    def log(self, progress: lw.Progress, values: Any, kind: str) -> None:
        if kind == "train":
            self.found[progress.step] = values["train/loss"]


class Average(lw.Callback):
    """A moving average of the parameters, held as they are: in parts where these are."""

    def on_fit_start(self, run: lw.Run) -> None:
        self.mean = {name: p.detach().clone() for name, p in run.models["model"].named_parameters()}

    def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
        for name, p in run.models["model"].named_parameters():
            self.mean[name].lerp_(p.detach(), 0.2)

    def on_fit_end(self, run: lw.Run) -> None:
        self.whole = {name: whole(mean).double().flatten().tolist() for name, mean in self.mean.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: Any) -> None:
        self.mean = dict(state["mean"])


class Net(nn.Module):
    """7 rows cannot be cut evenly, a parameter of one row leaves ranks with none, and two are tied."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.inp = nn.Linear(5, 7)
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(7, 7), nn.LayerNorm(7), nn.Tanh(), nn.Dropout(dropout)) for _ in range(2)
            )
            self.out, self.again = nn.Linear(7, 3), nn.Linear(7, 3, bias=False)
        self.again.weight = self.out.weight
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("scale", torch.full((), 0.9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x)
        return (self.out(x) + self.again(x)) * self.scale * self.gain


def task(dropout: float = 0.0) -> lw.Supervised:
    def schedule(optimizer: Any) -> Any:
        return lw.per_step(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS))

    return lw.Supervised(
        Net(dropout), nn.CrossEntropyLoss(), lambda params: torch.optim.AdamW(params, 1e-2), schedule=schedule
    )


def fit(
    folder: Path | None,
    *,
    dropout: float = 0.0,
    resume: Any = None,
    steps: int = STEPS,
    of: Any = None,
    **settings: Any,
) -> dict[str, Any]:
    """Everything about a training that must not depend on how it was done."""
    reads, losses, average, ema = Reads(), Losses(), Average(), lw.EMA(0.8)
    saver = lw.Checkpoint(f"{EVERY} steps", keep=9) if folder is not None else False
    given: dict[str, Any] = {"steps": steps, "seed": 4, "progress": False, "log_every": 1, "checkpoint": saver,
                             "loggers": [losses],
                             "callbacks": [average, ema, *settings.pop("callbacks", ())]}  # fmt: skip
    trainer = lw.Trainer(folder=folder, strategy=os.environ.get("STRATEGY", "auto"), **(given | settings))
    of = of or task(dropout)
    run = trainer.fit(of, DataLoader(reads, 12, shuffle=True), (X[:20], Y[:20]), resume=resume)  # type: ignore[arg-type]
    state = run.optimizers["main"].state_dict()["state"]
    tensors = [*of.module.state_dict().values(), *(one[key] for one in state.values() for key in sorted(one))]
    return {
        "plain": all(type(p) is nn.Parameter for p in of.module.parameters()) and type(of.module) is Net,
        "tied": of.module.out.weight is of.module.again.weight,
        "tensors": [tensor.double().flatten().tolist() for tensor in tensors],
        "average": average.whole,
        "ema": [tensor.double().flatten().tolist() for tensor in ema.averages["model"].state_dict().values()],
        "losses": losses.found,
        "history": list(run.history.losses["loss"]),
        "valid": [record.get("valid/loss") for record in run.history],
        "reads": run.comm.gather(reads.seen),
        "folder": str(run.folder),
    }


def checkpoint(folder: Path, name: str, step: int = 2 * EVERY) -> Path:
    """Of the run in the folder that a command wrote to, the one in its middle."""
    return next((folder / name).glob(f"Net/*/checkpoints/step-{step:08d}"))


@command
def with_dropout(folder: Path) -> Any:
    return fit(folder / f"dropout-{kind()}", dropout=0.3)


@command
def with_dropout_resumed(folder: Path) -> Any:
    return fit(folder / "again", dropout=0.3, resume=checkpoint(folder, f"dropout-{kind()}"))


@command
def whole_run(folder: Path) -> Any:
    return fit(folder / f"run-{kind()}")


def resumed(folder: Path, of: str) -> Any:
    how = lw.Resume(checkpoint(folder, f"run-{of}"), how="approximate")
    return fit(folder / f"from-{of}-{kind()}", resume=how)


def second(folder: Path, of: str) -> Any:
    """Goes on from what 4 ranks wrote first, to the middle."""
    how = lw.Resume(checkpoint(folder, f"run-{of}", EVERY), how="approximate")
    return fit(folder / f"second-{of}", resume=how, steps=2 * EVERY)


def last(folder: Path, of: str) -> Any:
    """Goes on from what was gone on to, to the end."""
    how = lw.Resume(checkpoint(folder, f"second-{of}"), how="approximate")
    return fit(folder / f"last-{of}", resume=how)


for of in ("fsdp-2", "alone-1", "fsdp-4", "ddp-4"):
    COMMANDS[f"resumed_from_{of.removesuffix('-1').replace('-', '_')}"] = partial(resumed, of=of)
for of in ("fsdp-4", "ddp-4"):
    for again in (second, last):
        COMMANDS[f"{again.__name__}_from_{of.replace('-', '_')}"] = partial(again, of=of)


@command
def refused(folder: Path) -> Any:
    """Another number of ranks is not exact."""
    return error(lambda: fit(folder / "refused", resume=checkpoint(folder, "run-fsdp-2")))


@command
def twice(folder: Path) -> Any:
    """The same task again goes on, with the optimizer that it had."""
    own = task()
    fit(None, of=own, steps=6)
    return fit(None, of=own)


@command
def used_afterwards(folder: Path) -> Any:
    """The model is the plain one of before, the same objects; a checkpoint of it is one like any other."""
    own = task()
    weight = own.module.inp.weight
    held = [id(p) for p in own.module.parameters()]
    fit(None, of=own, steps=3)
    trainer = lw.Trainer(progress=False, folder=None, strategy=os.environ.get("STRATEGY", "auto"))
    hooks = [len(vars(m)[name]) for m in own.module.modules() for name in vars(m) if name.endswith("_hooks")]
    return {
        "same": held == [id(p) for p in own.module.parameters()] and weight is own.module.inp.weight,
        "hooks": sum(hooks),
        "left": [name for m in own.module.modules() for name in vars(m) if "fsdp" in name or "composable" in name],
        "predicted": trainer.predict(own, X).double().flatten().tolist(),
        "by hand": own.module.eval()(X).double().flatten().tolist(),
    }


@command
def kept_shared_out(folder: Path) -> Any:
    """With gather=False the model stays in parts, can be evaluated so, and goes on."""
    from loopwright.parallel import is_shard

    own, strategy = task(), lw.FSDP(gather=False)
    trainer = lw.Trainer(steps=3, seed=4, progress=False, folder=None, strategy=strategy)
    trainer.fit(own, (X[:36], Y[:36]))
    parts = all(map(is_shard, own.module.parameters()))
    valid = trainer.validate(own, [(X[:5], Y[:5])])  # one batch: some ranks have none
    again = lw.Trainer(steps=5, seed=4, progress=False, folder=None, strategy="fsdp")
    run = again.fit(own, (X[:36], Y[:36]))
    return {"parts": parts, "valid": valid, "step": run.progress.step, "plain": type(own.module) is Net}


@command
def in_bfloat16(folder: Path) -> Any:
    """A block that was frozen when FSDP first looked at it computes in bfloat16 like the others once it trains."""
    stages = [lw.Stage("head", "2 steps", train="module.out.*"), lw.Stage("all", "4 steps")]
    seen = set()

    class Look(lw.Callback):
        def on_grads_ready(self, run: lw.Run, phase: Any, norm: Any) -> None:
            seen.update(str(p.grad.dtype) for p in phase.parameters() if p.grad is not None)

    found = {}
    for name, precision in (("fp32", None), ("bf16", "bf16")):
        own, strategy = task(), lw.FSDP(nn.Linear, precision=precision)
        own.module.again.weight = nn.Parameter(torch.zeros(3, 7))  # what is tied must be in one block
        trainer = lw.Trainer(seed=4, progress=False, folder=None, strategy=strategy, callbacks=[Look()])
        trainer.fit(own, (X, Y), stages=stages)
        found[name] = [p.detach().double().flatten().tolist() for p in own.module.parameters()]
    return {**found, "gradients": sorted(seen)}


@command
def best_put_back(folder: Path) -> Any:
    return best_of(folder / f"best-{kind()}")


@command
def best_average_put_back(folder: Path) -> Any:
    """Where blocks stay whole after a forward, those of a validation are the average's."""
    strategy = lw.FSDP("layers.*", reshard_after_forward=False)
    return best_of(folder / f"best-average-{kind()}", callbacks=[lw.EMA(0.9)], strategy=strategy)


def best_of(folder: Path, **settings: Any) -> Any:
    saver = lw.Checkpoint("2 steps", monitor="valid/loss", keep=2, restore="best")
    own = task()
    given: dict[str, Any] = {"progress": False, "seed": 1, "validate_every": 2, "checkpoint": saver}
    given["strategy"] = os.environ.get("STRATEGY", "auto")
    trainer = lw.Trainer(steps=8, folder=folder, **(given | settings))
    trainer.fit(own, (X, Y), (X[:20], Y[:20]))
    alone = lw.Trainer(progress=False, folder=None, strategy="single")
    best = alone.validate(own, (X[:20], Y[:20]))["valid/loss"]
    return {"best": best, "told": saver.best_value}


@command
def averages_left_in_the_model(folder: Path) -> Any:
    """Another fit goes on from the weights of the training, whether the model was left in parts or not."""
    own, ema, found = task(), lw.EMA(0.5, replace_at_end=True), []
    for steps in (3, 6, 9):
        shares = os.environ.get("STRATEGY") == "fsdp"
        strategy = lw.FSDP(gather=steps != 6) if shares else "auto"
        trainer = lw.Trainer(steps=steps, seed=4, progress=False, folder=None, callbacks=[ema], strategy=strategy)
        trainer.fit(own, (X[:36], Y[:36]))
        found.append([whole(p).detach().double().flatten().tolist() for p in own.module.parameters()])
    with ema.applied():
        found.append(own.module.eval()(X).double().flatten().tolist())
    return {"found": found, "average": ema.averages["model"].module(X).double().flatten().tolist()}


@command
def cannot_write(folder: Path) -> Any:
    """One rank may write no files any more when the second checkpoint is due."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    rank, seen, place = int(os.environ["RANK"]), list[list[str]](), folder / "full"

    class Fills(lw.Callback):
        def on_checkpoint(self, run: lw.Run, path: Any) -> None:
            seen.append(run.comm.broadcast(sorted(str(p) for p in place.rglob("*") if p.name != "metrics.jsonl")))
            if rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))

    told = error(lambda: fit(place, callbacks=[Fills()]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = sorted(str(p) for p in place.rglob("*") if p.name != "metrics.jsonl")
    return {"told": comm().gather(told), "before": seen[0], "after": after}


def comm() -> Any:
    from loopwright.parallel import Ranks

    return Ranks()


@command
def mistakes(folder: Path) -> Any:
    module = Net(0.0)

    def given(optimizer: Any = None, strategy: Any = None, **more: Any) -> Any:
        own = lw.Supervised(module, nn.CrossEntropyLoss(), optimizer or (lambda p: torch.optim.SGD(p, 0.1)))
        trainer = lw.Trainer(steps=2, progress=False, folder=None, strategy=strategy or lw.FSDP(), **more)
        return error(lambda: trainer.fit(own, (X, Y)))

    class OnTask(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = Net(0.0), nn.Parameter(torch.ones(1))

    class New(lw.Callback):
        def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
            run.replace("model", Net(0.0))

    plan = lw.Trainer(steps=2, progress=False, folder=None, strategy="fsdp").plan(task(), (X, Y))
    return {
        "instance": given(torch.optim.SGD(module.parameters(), 0.1)),
        "pattern": given(strategy=lw.FSDP("layer.*")),
        "class": given(strategy=lw.FSDP(nn.TransformerEncoderLayer)),
        "offload": given(strategy=lw.FSDP(offload=True)),
        "async": given(checkpoint=lw.Checkpoint(async_save=True, folder=folder / "async")),
        "plain": all(type(p) is nn.Parameter and p.numel() for p in module.parameters()) and type(module) is Net,
        "on the task": error(lambda: lw.Trainer(steps=1, folder=None, strategy="fsdp").fit(OnTask(), (X, Y))),
        "plan": plan.problems,
        "replaced": given(callbacks=[New()]),
    }


@command
def nonfinite(folder: Path) -> Any:
    """What one rank sees all of them know: a gradient that is not finite in rows that only one holds."""

    class Poison(lw.Callback):
        def on_grads_ready(self, run: lw.Run, phase: Any, norm: Any) -> None:
            if (run.progress.epoch, run.progress.batch) == (0, 2):
                grad = run.models["model"].inp.weight.grad  # type: ignore[union-attr]
                part = grad.to_local() if hasattr(grad, "to_local") else grad
                if run.comm.rank == run.comm.world_size - 1:
                    part[-1] = float("nan")

    own = task()
    before = error(lambda: fit(None, of=own, callbacks=[Poison()]))
    skipping = task()
    after = fit(None, of=skipping, callbacks=[Poison()], nonfinite="skip")
    return {"raised": before.split(" at ")[0], "losses": after["losses"], "tensors": after["tensors"]}


def error(make: Callable[[], Any]) -> str:
    try:
        make()
    except lw.LoopwrightError as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing was raised"


def kind() -> str:
    return f"{os.environ.get('STRATEGY', 'alone')}-{os.environ.get('WORLD_SIZE', '1')}"


def main(folder: Path, names: list[str]) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "this very run was done before")
    warnings.filterwarnings("ignore", "CosineAnnealingLR was made for")  # the short runs of one task
    for name in names:
        result = COMMANDS[name](folder)
        if int(os.environ.get("RANK", "0")) == 0:
            out = folder / f"{name}-{kind()}.json"
            out.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
