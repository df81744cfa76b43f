"""What belongs to whom: the experiment says what, the trainer says how, and a run is what both share."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import loopwright as lw
from tiny import acts, bits, classifier, same, samples, seed_all, trainer

X, Y = samples(40)


class Points(lw.DataModule):
    """The data of an experiment, with its transform."""

    def __init__(self, batch_size: int, jitter: float) -> None:
        self.batch_size, self.jitter = batch_size, jitter

    def augmented(self, sample: tuple[Tensor, Tensor], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return sample[0] + self.jitter * torch.randn(5, generator=rng), sample[1]

    def train_data(self) -> Any:
        return lw.Loader((X[:30], Y[:30]), self.batch_size, shuffle=True, transform=self.augmented, seed=1)

    def valid_data(self) -> Any:
        return lw.Loader((X[30:], Y[30:]), 5)


class Paper(lw.Task):
    """The research: model, losses, pre- and post-processing, optimizer, schedule, metrics and hyper-parameters."""

    def __init__(self, *, lr: float = 0.05, smooth: float = 0.1, dropout: float = 0.2) -> None:
        super().__init__()
        self.lr, self.smooth = lr, smooth
        self.net = classifier(dropout=dropout)

    def training_step(self, batch: Any) -> dict[str, Any]:
        inputs, target = batch
        inputs = inputs / inputs.norm(dim=1, keepdim=True)  # before
        scores = self.net(inputs)
        fit = nn.functional.cross_entropy(scores, target, label_smoothing=self.smooth)
        size = scores.square().mean()
        return {"loss": fit + 0.01 * size, "fit": fit, "preds": scores.softmax(1), "target": target}  # after

    def predict_step(self, batch: Any) -> Tensor:
        return self.net(batch / batch.norm(dim=1, keepdim=True)).argmax(1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return optimizer, StepLR(optimizer, 1, gamma=0.5)

    def configure_metrics(self) -> dict[str, Any]:
        return {"accuracy": lw.metrics.Accuracy()}


class Gan(lw.Task):
    """Another project: other data, two models, two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.judge = nn.Linear(5, 5), nn.Linear(5, 1)

    def configure_optimizers(self) -> Any:
        return {n: torch.optim.SGD(getattr(self, n).parameters(), lr=0.01) for n in ("maker", "judge")}

    def phases(self) -> list[lw.Phase]:
        return [lw.Phase("judge", self.tell, "judge"), lw.Phase("maker", self.fool, "maker", every=2)]

    def tell(self, batch: Tensor) -> Tensor:
        return self.judge(self.maker(batch.flip(0)).detach()).mean() - self.judge(batch).mean()

    def fool(self, batch: Tensor) -> Tensor:
        return -self.judge(self.maker(batch)).mean()


class Written:
    """A logger."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def log(self, progress: lw.Progress, values: Mapping[str, float], kind: str) -> None:
        self.names |= set(values)


@pytest.mark.capability("CA-01")
def test_one_call_links_everything_and_forces_nothing() -> None:
    """One call of fit links data, model, work before and after it, losses and monitoring; none of it is a must."""
    log, half = Written(), acts(map_batch=lambda run, batch: [batch[0] / 2, batch[1]])
    user = trainer(epochs=2, loggers=[log], callbacks=[half, lw.EarlyStopping("valid/fit", mode="min")])
    task, data = Paper(), Points(8, 0.1)
    run = user.fit(task, data)
    assert run.progress.step == 8
    assert log.names >= {f"{kind}/{n}" for kind in ("train", "valid") for n in ("loss", "fit", "accuracy")} | {"lr"}
    predicted = user.predict(task, X)
    assert predicted.tolist() == task.eval().predict_step(X).tolist()

    counts: dict[int, int] = {}

    def step(run: lw.Run, batch: list[int]) -> dict[str, float]:  # no model, no loss, no optimizer, no tensor
        for label in batch:
            counts[label] = counts.get(label, 0) + 1
        return {"distinct": float(len(counts))}

    labels: list[int] = Y.tolist()
    run = trainer(epochs=1, loggers=[log]).run(
        step, [labels[i : i + 10] for i in range(0, 40, 10)], state={}, weight=len
    )
    assert counts == {label: labels.count(label) for label in set(labels)}
    assert run.metrics["train/distinct"] == run.history[-1]["train/distinct"]


@pytest.mark.capability("CA-14")
def test_one_backbone_of_engineering_serves_projects_that_have_nothing_in_common(folder: Path) -> None:
    """House rules are written once, in one trainer; every project gets its seed, logs, checkpoints and resume."""

    class Ours(lw.Trainer):
        def __init__(self, **settings: Any) -> None:
            super().__init__(
                steps=8, seed=3, progress=False, folder=folder, log_every="2 steps",
                checkpoint=lw.Checkpoint("4 steps"), **settings,
            )  # fmt: skip

    def fit_line(run: lw.Run, batch: Any) -> float:
        with torch.no_grad():
            weights.add_(0.1 * (batch[0].T @ (batch[1] - batch[0] @ weights)))
        return float((batch[1] - batch[0] @ weights).square().mean())

    weights, inputs = torch.zeros(5), X[:8] / 4
    state = {"weights": (weights.clone, weights.copy_)}
    project: dict[str, Any] = {
        "classes": lambda **how: Ours(name="classes").fit(Paper(), Points(8, 0.1), **how),
        "gan": lambda **how: Ours(name="gan").fit(Gan(), list(X.split(8)), **how),
        "line": lambda **how: Ours(name="line").run(fit_line, [(inputs, inputs.sum(1))], state=state, **how),
    }
    for name, start in project.items():
        run = start()
        records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        assert sum(one["kind"] == "train" for one in records) == 4, name
        assert [path.name for path in sorted((run.folder / "checkpoints").glob("step-*"))][-1] == "step-00000008"
        assert start(resume="auto").folder == run.folder


@pytest.mark.capability("CA-18")
def test_an_experiment_says_what_and_can_be_handed_to_any_trainer() -> None:
    """Model, criterion, optimizer, schedule, hyper-parameters, data and transforms are the experiment's alone."""

    def experiment(**hyper: Any) -> tuple[lw.Task, lw.DataModule]:
        jitter = hyper.pop("jitter", 0.1)
        return Paper(**hyper), Points(hyper.pop("batch_size", 8), jitter)

    def trained(user: lw.Trainer, **hyper: Any) -> tuple[lw.Run, list[Any]]:
        seed_all(3)
        run = user.fit(*experiment(**hyper))
        return run, bits(run.task)

    run, expected = trained(trainer(epochs=2))
    assert [type(run.models["model"]), type(run.optimizers["main"])] == [Paper, torch.optim.AdamW]
    assert run.history["lr"] == [0.05, 0.025]
    assert "train/fit" in run.metrics
    watched = trainer(epochs=2, callbacks=[lw.EarlyStopping()], loggers=[Written()], log_every=1, validate_every=2)
    assert same(trained(watched)[1], expected)  # another trainer, the same experiment
    for hyper in ({"lr": 0.1}, {"smooth": 0.3}, {"dropout": 0.5}, {"jitter": 0.2}):
        assert not same(trained(trainer(epochs=2), **hyper)[1], expected), hyper


@pytest.mark.capability("CA-20")
def test_a_run_is_the_store_that_all_share() -> None:
    """Model, criterion, optimizers, schedulers, metrics, loggers and loaders are the very objects, in every hook."""
    net, log, met = classifier(), Written(), set[str]()
    optimizer, criterion = torch.optim.SGD(net.parameters(), lr=0.1), nn.CrossEntropyLoss()
    schedule, data = StepLR(optimizer, 1), lw.Loader((X, Y), 10)
    task = lw.Supervised(net, criterion, optimizer, schedule=schedule, metrics={"accuracy": lw.metrics.Accuracy()})

    def look(run: lw.Run, *_: Any) -> None:
        stage = run.stage or run.stages[-1]
        assert run.models["model"] is net
        assert run.task.loss is criterion
        assert run.optimizers["main"] is optimizer
        assert stage.phases[0].epoch_schedulers[0].torch is schedule
        assert run.data is data
        assert set(stage.valid) == {"a", "b"}
        assert run.loggers == [log]
        assert task._run is run
        met.update(run.metrics)
        run.metrics["seen"] = 1.0  # what one leaves, the others find

    hooks = ("on_fit_start", "on_epoch_start", "on_step_end", "on_validation_end", "on_epoch_end", "on_fit_end")
    user = trainer(epochs=2, loggers=[log], callbacks=[acts(**dict.fromkeys(hooks, look))])
    user.on(lw.Event.STEP_START | lw.Event.STAGE_END)(look)
    run = user.fit(task, data, {"a": (X, Y), "b": (X, Y)})
    assert met >= {"seen", "train/accuracy", "valid/a/accuracy", "valid/b/loss", "lr"}
    assert met <= set(run.metrics)


@pytest.mark.capability("PL-04")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp64"])
def test_a_module_knows_nothing_of_what_the_trainer_does_with_it(precision: str, folder: Path) -> None:
    """One class, as it is, with 16 bit, clipping, accumulation, early stopping, logs and checkpoints by the Trainer."""
    code = inspect.getsource(Paper)
    for word in ("device", "cuda", "cpu", "half", "bfloat", "autocast", "run", "log", "stop", "backward", "zero_grad"):
        assert word not in code
    user = lw.Trainer(
        epochs=9, precision=precision, accumulate=2, clip_norm=0.5, folder=folder, progress=False, log_every="2 steps",
        device="cpu", checkpoint=lw.Checkpoint("2 steps", monitor="valid/fit", mode="min"),
        callbacks=[lw.EarlyStopping("valid/fit", mode="min", patience=1, min_delta=10.0)],
    )  # fmt: skip
    task = Paper()
    seen = set[torch.dtype]()
    task.net[0].register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    run = user.fit(task, Points(8, 0.1))
    assert run.status == "stopped"
    assert run.progress.epoch == 2
    assert seen == {
        {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}.get(precision, torch.float32)
    }
    assert run.folder is not None
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) >= 4
    assert list((run.folder / "checkpoints").glob("step-*"))


@pytest.mark.capability("PL-05")
def test_the_training_step_is_all_there_is_to_understand() -> None:
    """Nothing hides elsewhere: training_step in the loop that everyone knows gives the bits of fit."""
    data = list(zip(X.split(8), Y.split(8), strict=True))

    seed_all(3)
    task = Paper()
    optimizer, schedule = task.configure_optimizers()
    for _ in range(2):
        for batch in data:
            optimizer.zero_grad()
            task.training_step(batch)["loss"].backward()
            optimizer.step()
        schedule.step()
    expected = bits(task)

    seed_all(3)
    same_task = Paper()
    user = trainer(epochs=2)
    assert "output = Paper.training_step(batch)" in user.explain(same_task, data)
    user.fit(same_task, data)
    assert same(bits(same_task), expected)


@pytest.mark.capability("PT-02")
def test_the_low_level_stays_in_reach() -> None:
    """A backward of one's own, LBFGS, autograd inside a step; every tensor can be looked at and changed."""

    class Clamp(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clamp(-1, 1)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * grad  # straight through, twice

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.5, 3.0]))

        def forward(self, x: Tensor) -> Tensor:
            return (Clamp.apply(self.weight) * x).sum(1)

    seen: dict[str, Any] = {}

    def look(run: lw.Run, phase: lw.Phase, grad_norm: Any) -> None:
        (weight,) = run.models["model"].parameters()
        seen["gradient"] = weight.grad.tolist()
        weight.grad[0] = 0.0  # into the very tensor that the optimizer reads

    def look_again(run: lw.Run, result: lw.StepResult) -> None:
        optimizer = run.optimizers["main"]
        seen["momentum"] = [state["momentum_buffer"].tolist() for state in optimizer.state.values()]
        optimizer.param_groups[0]["lr"] = 0.0

    net = Layer()
    sgd = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    task = lw.Supervised(net, lambda preds, target: (preds - target).sum(), sgd)
    hooks = acts(on_grads_ready=look, on_step_end=look_again)
    trainer(epochs=2, callbacks=[hooks]).fit(task, [(torch.tensor([[1.0, 2.0]]), torch.zeros(1))])
    assert seen == {"gradient": [2.0, 4.0], "momentum": [[0.0, pytest.approx(0.9 * 4 + 4)]]}
    assert net.weight.tolist() == [0.5, 1.0]  # one step of 0.5 * 4, then a rate of 0

    root = torch.tensor([2.0], requires_grad=True)  # numeric optimisation: Newton's method for x ** 3 = 27

    def newton(run: lw.Run, batch: Any) -> Tensor:
        value = root**3 - 27
        (slope,) = torch.autograd.grad(value, root)
        with torch.no_grad():
            root.sub_(value / slope)
        return value.detach().abs().sum()

    trainer(steps=8).run(newton, [()] * 8, state={}, weight=lambda batch: 1)
    assert root.item() == pytest.approx(3.0, abs=1e-6)

    minimum = nn.Parameter(torch.tensor([-1.0, 2.0]))
    bowl = nn.Module()
    bowl.at = minimum
    bowl.forward = lambda x: (1 - minimum[0]) ** 2 + 100 * (minimum[1] - minimum[0] ** 2) ** 2  # type: ignore[method-assign]
    lbfgs = torch.optim.LBFGS([minimum], max_iter=50, line_search_fn="strong_wolfe")
    trainer(steps=3).fit(lw.Supervised(bowl, lambda preds, target: preds, lbfgs), [(torch.ones(1), torch.ones(1))] * 3)
    assert minimum.tolist() == pytest.approx([1.0, 1.0], abs=1e-3)
