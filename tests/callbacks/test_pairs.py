"""Every two of what ships go together: in each pair each one has the effect that it states.

An entry makes a callback (or settings, a task, data) and has a function that checks its effect in a finished trial.
A new callback needs one entry in ENTRIES.
"""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import loopwright as lw
from loggers.test_plugin import printed
from tiny import acts, bits, same, seed_all

CLASSES, SIDE, BATCH, EPOCHS = 6, 8, 6, 3


@dataclass
class Seen:
    """What went into a callback, and what came out."""

    batches: list[tuple[Any, Any]] = field(default_factory=list)
    outputs: list[tuple[Any, Any]] = field(default_factory=list)
    weights: list[list[Tensor]] = field(default_factory=list)  # of the phase, when the output came


class Trial:
    """A fit with some entries, each between two spies."""

    run: lw.Run

    def __init__(self, names: tuple[str, ...], folder: Path) -> None:
        self.names, self.folder = names, folder
        self.callbacks: dict[str, Any] = {}
        self.seen = {name: Seen() for name in names}
        self.results: list[lw.StepResult] = []
        self.lrs: list[list[float]] = []  # of each optimizer
        self.grads: list[float] = []
        self.dropout: list[float] = []
        self.after: list[list[Tensor]] = []  # weights, after each step
        self.places: dict[tuple[int, str], list[Tensor]] = {}  # where the weights of a phase were at each forward

    def fit(self, extra: lw.Callback | None = None) -> Trial:
        seed_all(3)
        entries = [ENTRIES[name] for name in self.names]
        settings: dict[str, Any] = {"checkpoint": False, "loggers": [], "log_every": 1, "capsule": False}
        for entry in entries:
            given = entry.settings(self.folder)
            settings |= given | {"loggers": [*settings["loggers"], *given.get("loggers", [])]}
        net = model()
        schedule = next((entry.schedule for entry in entries if entry.schedule), None)
        task = next((entry.task for entry in entries if entry.task), supervised)(net, schedule)
        data = next((e.data() for e in entries if e.data), None) or images()
        listed = self._between_spies(entries)
        savers = [c for c in self.callbacks.values() if isinstance(c, lw.Checkpoint)]
        if savers:
            settings["checkpoint"] = savers
        callbacks = [*listed, *([extra] if extra else [])]
        ends = [c for c in self.callbacks.values() if isinstance(c, lw.Plateau)]
        stages = [lw.Stage("main", until=[f"{EPOCHS} epochs", *ends])]
        runs = self.folder / "runs"
        trainer = lw.Trainer(folder=runs, name="x", progress=False, callbacks=callbacks, **settings)
        self.run = trainer.fit(task, data, images(9, seed=2), stages=stages)
        return self

    def _between_spies(self, entries: list[Entry]) -> list[lw.Callback]:
        waits: dict[str, Any] = {}

        def before(seen: Seen) -> lw.Callback:
            return acts(
                map_batch=lambda run, batch: waits.update(batch=batch) or batch,
                map_output=lambda run, output, *_: waits.update(output=output) or output,
            )

        def after(seen: Seen) -> lw.Callback:
            def output(run: lw.Run, output: Any, batch: Any, phase: lw.Phase) -> Any:
                seen.outputs.append((waits["output"], output))
                own = {id(p) for p in phase.parameters()}
                seen.weights.append([p.detach().clone() for p in run.task.parameters() if id(p) in own and p.dim() > 1])
                return output

            def batch(run: lw.Run, batch: Any) -> Any:
                seen.batches.append((waits["batch"], batch))
                return batch

            return acts(map_batch=batch, map_output=output)

        def note(run: lw.Run, result: lw.StepResult) -> None:
            result.output = dict(result.output)
            self.results.append(result)
            self.lrs.append([optimizer.param_groups[0]["lr"] for optimizer in run.optimizers.values()])
            self.dropout.append(run.task.module[3].p)
            self.after.append([p.detach().clone() for p in run.models["model"].parameters()])

        def place(run: lw.Run, output: Any, batch: Any, phase: lw.Phase) -> Any:
            flat = torch.cat([p.detach().flatten() for p in phase.parameters()])
            self.places.setdefault((run.progress.step, phase.name), []).append(flat)
            return output

        def grads(run: lw.Run, phase: lw.Phase, norm: Any) -> None:
            squares = [float(p.grad.double().square().sum()) for p in phase.parameters() if p.grad is not None]
            self.grads.append(sum(squares) ** 0.5)

        listed: list[lw.Callback] = []
        for name, entry in zip(self.names, entries, strict=True):
            made = None if entry.make is None else entry.make(self.folder)
            self.callbacks[name] = made
            if isinstance(made, lw.Callback) and not isinstance(made, (lw.Checkpoint, lw.Plateau)):
                listed += [before(self.seen[name]), made, after(self.seen[name])]
        return [*listed, acts(on_step_end=note, on_grads_ready=grads, map_output=place)]


@dataclass(frozen=True)
class Entry:
    effect: Callable[[Trial, str], None]
    make: Callable[[Path], Any] | None = None
    settings: Callable[[Path], dict[str, Any]] = lambda folder: {}
    task: Callable[[nn.Module, Any], lw.Task] | None = None
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None  # of each optimizer of the task
    data: Callable[[], Any] | None = None
    observes: bool = False  # with and without it, every weight is the same


# ------------------------------------------------------------------------------------------------- what is trained


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pixels = 2 * SIDE * SIDE
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, CLASSES))


def supervised(net: nn.Module, schedule: Any = None) -> lw.Supervised:
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    accuracy = {"accuracy": lw.metrics.Accuracy()}
    return lw.Supervised(net, nn.CrossEntropyLoss(), sgd, metrics=accuracy, schedule=schedule)


def optimizers(parts: dict[str, nn.Module], schedule: Any) -> dict[str, Any]:
    made = {name: torch.optim.SGD(part.parameters(), lr=0.05) for name, part in parts.items()}
    return {name: (sgd, schedule(sgd)) for name, sgd in made.items()} if schedule else made


def arrays(n: int = 22, *, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 2, SIDE, SIDE, generator=generator) + 1, torch.arange(n) % CLASSES


def images(n: int = 22, *, seed: int = 1) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*arrays(n, seed=seed)), BATCH, shuffle=n > 9)


class Two(lw.Task):
    """A body and a head, each with an optimizer and a phase of its own."""

    def __init__(self, net: nn.Module, schedule: Any = None) -> None:
        super().__init__()
        self.module, self.schedule = net, schedule

    def training_step(self, batch: Any) -> Any:
        preds = self.module(batch[0])
        return {"loss": nn.functional.cross_entropy(preds, batch[1]), "preds": preds, "target": batch[1]}

    def phases(self) -> list[lw.Phase]:
        return [lw.Phase(name, self.training_step, optimizers=name) for name in ("body", "head")]

    def configure_optimizers(self) -> Any:
        return optimizers({"body": self.module[1], "head": self.module[4]}, self.schedule)  # type: ignore[index]


class GAN(lw.Task):
    """The net as a critic, which tells real images from drawn ones besides their classes, and a generator of images."""

    def __init__(self, net: nn.Module, schedule: Any = None) -> None:
        super().__init__()
        self.module, self.schedule = net, schedule
        self.generator = nn.Sequential(nn.Linear(4, 2 * SIDE * SIDE), nn.Unflatten(1, (2, SIDE, SIDE)))

    def drawn(self, like: Tensor) -> Tensor:
        images: Tensor = self.generator(torch.randn(len(like), 4))
        return images

    def critic_step(self, batch: Any) -> Any:
        preds = self.module(batch[0])
        real, fake = preds.logsumexp(1), self.module(self.drawn(batch[0]).detach()).logsumexp(1)
        apart = nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean()
        loss = nn.functional.cross_entropy(preds, batch[1]) + apart
        return {"loss": loss, "preds": preds, "target": batch[1], "fake": fake.mean()}

    def generator_step(self, batch: Any) -> Any:
        preds = self.module(self.drawn(batch[0]))
        return {"loss": nn.functional.softplus(-preds.logsumexp(1)).mean(), "preds": preds, "target": batch[1]}

    def validation_step(self, batch: Any) -> Any:
        preds = self.module(batch[0])
        return {"loss": nn.functional.cross_entropy(preds, batch[1]), "preds": preds, "target": batch[1]}

    def phases(self) -> list[lw.Phase]:
        return [lw.Phase(name, getattr(self, f"{name}_step"), optimizers=name) for name in ("critic", "generator")]

    def configure_optimizers(self) -> Any:
        return optimizers({"critic": self.module, "generator": self.generator}, self.schedule)


# ----------------------------------------------------------------------------------------------------- the effects


def soft(y: Tensor) -> Tensor:
    return y if y.is_floating_point() else nn.functional.one_hot(y, CLASSES).float()


def partner(x: Tensor, mixed: Tensor, i: int) -> tuple[int, float]:
    """Which row of ``x`` was mixed into row i, and the share that row i has kept."""
    if torch.equal(mixed[i], x[i]):
        return i, 1.0
    for j in range(len(x)):
        way = (x[j] - x[i]).flatten()
        if j != i and (length := float(way @ way)):
            part = float((mixed[i] - x[i]).flatten() @ way) / length
            if torch.allclose(mixed[i], torch.lerp(x[i], x[j], part), atol=1e-4):
                return j, 1 - part
    raise AssertionError(f"row {i} is no mixture of two")


def mixup(trial: Trial, name: str) -> None:
    shares = []
    for (x, y), (mixed, target) in trial.seen[name].batches:
        found = [partner(x, mixed, i) for i in range(len(x))]
        wanted = torch.stack([share * soft(y)[i] + (1 - share) * soft(y)[j] for i, (j, share) in enumerate(found)])
        torch.testing.assert_close(target, wanted, atol=1e-3, rtol=0)
        shares += [share for j, share in found if j]
    assert min(shares) < 0.9  # something was mixed


def cutmix(trial: Trial, name: str) -> None:
    areas = []
    for (x, y), (mixed, target) in trial.seen[name].batches:
        for i in range(len(x)):
            mask = (mixed[i] != x[i]).any(0)
            area = float(mask.double().mean())
            fits = [j for j in range(len(x)) if torch.equal(torch.where(mask, x[j], x[i]), mixed[i])]
            wanted = [torch.lerp(soft(y)[j], soft(y)[i], 1 - area) for j in fits]
            # a pixel that is the same in both, such as an erased one, makes the mask smaller than the rectangle
            assert any(torch.allclose(target[i], w, atol=1e-4) for w in wanted) or bool((x == 7).any())
            assert fits
            areas.append(area)
    assert max(areas) > 0.1


def erasing(trial: Trial, name: str) -> None:
    for (x, y), (erased, target) in trial.seen[name].batches:
        mask = (erased != x).any(1)
        assert torch.equal(erased, torch.where(mask[:, None], torch.tensor(7.0), x))
        assert 0.01 < float(mask.double().mean()) < 0.5
        assert target is y


def doubled(trial: Trial, name: str) -> None:
    assert all(torch.equal(2 * before[0], after[0]) for before, after in trial.seen[name].batches)
    assert len(trial.seen[name].batches) >= 8


def penalty(trial: Trial, name: str) -> None:
    seen = trial.seen[name]
    for (before, after), weights in zip(seen.outputs, seen.weights, strict=True):
        wanted = 0.001 * float(sum(weight.abs().sum() for weight in weights))
        assert float(after["penalty_l1"]) == pytest.approx(wanted, rel=1e-4)
        assert float((after["loss"] - before["loss"]).detach()) == pytest.approx(wanted, rel=1e-2, abs=1e-4)


def stopped(trial: Trial, name: str) -> None:
    assert trial.run.progress.epoch == 2
    assert str(trial.run.stop_reason).startswith("valid/loss has not improved by more than 1e+09 in 1 validation")


def saved(trial: Trial, name: str) -> None:
    callback = trial.callbacks[name]
    assert callback.last.name == f"step-{trial.run.progress.step:08d}"
    assert len(list(callback.last.parent.glob("step-*"))) == 2


def shown(trial: Trial, name: str) -> None:
    lines = trial.callbacks[name].file.getvalue().splitlines()
    assert len(lines) >= trial.run.progress.epoch
    assert any("loss" in line for line in lines)


def kept(trial: Trial, name: str) -> None:
    """A step that fails is kept with its batch, as it came from the data."""

    class Boom(Exception):  # noqa: N818
        pass

    def fail(run: lw.Run, *args: Any) -> None:
        if run.progress.step == 2:
            raise Boom

    again = Trial(trial.names, trial.folder / "again")
    with pytest.raises(Boom):
        again.fit(acts(on_backward_end=fail))
    capsule = again.callbacks[name].last
    assert capsule.name == "step-00000003-Boom"
    assert (capsule / "manifest.json").is_file()


def rates(trial: Trial, name: str) -> None:
    for rate in ("samples", "tokens", "flops"):
        assert trial.run.metrics[f"train/{rate}_per_second"] > 0


def resources(trial: Trial, name: str) -> None:
    assert trial.run.metrics["train/memory_mb"] > 10


def written(trial: Trial, name: str) -> None:
    files = sorted((trial.folder / "predictions").glob("valid-*.npz"))
    assert len(files) == trial.run.progress.epoch
    found = np.load(files[-1])
    assert found["target"].tolist() == [i % CLASSES for i in range(9)]
    assert found["preds"].shape == (9, CLASSES)
    if "valid/accuracy" in trial.run.metrics:
        right = float((found["preds"].argmax(1) == found["target"]).mean())
        assert trial.run.metrics["valid/accuracy"] == pytest.approx(right)


def reported(trial: Trial, name: str) -> None:
    report = trial.callbacks[name]
    assert report.path == trial.run.folder / "report.html"
    page = report.path.read_text(encoding="utf-8")
    assert "Validation: confusions" in page
    seen = json.loads((trial.run.folder / "report" / "valid.json").read_text())
    assert sum(map(sum, seen["counts"])) == 9
    assert seen["step"] == trial.run.progress.step
    if "valid/accuracy" in trial.run.metrics:
        right = sum(seen["counts"][i][i] for i in range(CLASSES)) / 9
        assert trial.run.metrics["valid/accuracy"] == pytest.approx(right)


def accumulated(trial: Trial, name: str) -> None:
    assert trial.run.progress.step == 2 * trial.run.progress.epoch
    assert trial.run.progress.samples == 22 * trial.run.progress.epoch


def clipped(trial: Trial, name: str) -> None:
    assert max(trial.grads) <= 0.01 * 1.001
    assert all(float(result.grad_norm) > 0.01 for result in trial.results)  # type: ignore[arg-type]


def half(trial: Trial, name: str) -> None:
    assert trial.results[0].output["preds"].dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in trial.run.models["model"].parameters())


def halved(trial: Trial, name: str) -> None:
    epochs, each = trial.run.progress.epoch, len(trial.lrs) // trial.run.progress.epoch
    of_an_epoch = [[rate] * len(trial.run.optimizers) for rate in (0.05, 0.025, 0.0125)]
    assert trial.lrs == [rates for rates in of_an_epoch[:epochs] for _ in range(each)]


def two(trial: Trial, name: str) -> None:
    assert trial.run.progress.phase_steps == dict.fromkeys(("body", "head"), trial.run.progress.step)
    parts = zip(model().parameters(), trial.run.task.module.parameters(), strict=True)
    assert not any(torch.equal(before, after) for before, after in parts)


def against(trial: Trial, name: str) -> None:
    """Critic and generator take turns, and each phase moves its own network alone."""
    task, steps = trial.run.task, trial.run.progress.step
    assert trial.run.progress.phase_steps == {"critic": steps, "generator": steps}
    turns = [phase for step, phase in trial.places if step < steps]
    assert turns == ["critic", "generator"] * steps
    sizes = {phase: place[0].numel() for (_, phase), place in trial.places.items()}
    assert sizes == {
        phase: sum(p.numel() for p in part.parameters())
        for phase, part in (("critic", task.module), ("generator", task.generator))
    }
    for phase in sizes:
        first, last = (trial.places[step, phase][0] for step in (0, steps - 1))
        assert not torch.equal(first, last)


def oversampled(trial: Trial, name: str) -> None:
    """Only classes 1 and 2 have weight."""
    first = next((trial.seen[n] for n in trial.names if trial.seen[n].batches), None)
    labels = [label for before, _ in first.batches for label in soft(before[1]).argmax(1).tolist()] if first else []
    assert set(labels) <= {1, 2}
    drawn = [label for result in trial.results for label in soft(result.output["target"]).argmax(1).tolist()]
    assert set(drawn) == {1, 2}


def tabled(trial: Trial, name: str) -> None:
    lines = (trial.folder / "metrics.csv").read_text().splitlines()
    assert all(f"train/{logged}" in lines[0] for logged in trial.run.history.losses)
    assert len(lines) > trial.run.progress.epoch


def plugged(trial: Trial, name: str) -> None:
    """Each loss of each step is a row of the database, and so are the measurements of each epoch."""
    with sqlite3.connect(trial.folder / "runs.db") as db:
        rows = db.execute("select name, step, value from points order by rowid").fetchall()
    for logged, losses in trial.run.history.losses.items():
        found = {step: value for name, step, value in rows if name == f"train/{logged}"}
        assert sorted(found) == [*range(1, trial.run.progress.step + 1)]
        if trial.run.comm.world_size == 1:  # the losses that a rank keeps are its own
            assert [found[step] for step in sorted(found)] == pytest.approx(losses.tolist())
    found = {step: value for name, step, value in rows if name == "valid/loss"}
    assert [found[step] for step in trial.run.history.steps] == trial.run.history["valid/loss"]


def annealed(trial: Trial, name: str) -> None:
    total = EPOCHS * len(trial.dropout) // trial.run.progress.epoch
    assert trial.dropout == pytest.approx([0.1 + 0.4 * k / total for k in range(len(trial.dropout))])


def close(callback: Any, wanted: list[Tensor]) -> None:
    torch.testing.assert_close(list(callback.averages["model"].module.parameters()), wanted)


def smoothed(trial: Trial, name: str) -> None:
    wanted = trial.after[0]
    for weights in trial.after[1:]:
        wanted = [torch.lerp(mean, weight, 0.5) for mean, weight in zip(wanted, weights, strict=True)]
    close(trial.callbacks[name], wanted)


def averaged(trial: Trial, name: str) -> None:
    each = len(trial.after) // trial.run.progress.epoch
    close(trial.callbacks[name], [torch.stack(w).mean(0) for w in zip(*trial.after[each - 1 :: each], strict=True)])


def uphill(trial: Trial, name: str) -> None:
    for places in trial.places.values():
        assert float((places[-1] - places[0]).norm()) == pytest.approx(0.05, rel=1e-3)
        half = len(places) // 2
        assert all(torch.equal(place, places[i // half * half]) for i, place in enumerate(places))


def best(trial: Trial, name: str) -> None:
    callback = trial.callbacks[name]
    assert callback.best == min(record["valid/loss"] for record in trial.run.history)
    kept = callback.models["model"]
    assert all(torch.equal(value, kept[key]) for key, value in trial.run.models["model"].state_dict().items())


def plateaued(trial: Trial, name: str) -> None:
    assert trial.run.progress.epoch == 2


def caught(trial: Trial, name: str) -> None:
    """Who changes weights where nobody may is named."""

    class Meddler(lw.Callback):
        def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
            with torch.no_grad():
                next(iter(run.task.parameters())).mul_(2)

    again = Trial(trial.names, trial.folder / "again")
    with pytest.raises(lw.HookError, match=r"Meddler\.on_step_end"):
        again.fit(Meddler())


def examined(trial: Trial, name: str) -> None:
    doctor = trial.callbacks[name]
    assert doctor.steps == list(range(1, trial.run.progress.step + 1))
    assert np.isfinite(doctor.activations[..., :3]).all()  # mean, std, share of zeros
    assert doctor.weights.size > 0


def timed(trial: Trial, name: str) -> None:
    times = trial.callbacks[name].times
    assert {"forward", "backward"} <= {part.split(" ")[0] for part in times}


def traced(trial: Trial, name: str) -> None:
    (trace,) = trial.callbacks[name].traces
    assert trace.stat().st_size > 1000


def remembered(trial: Trial, name: str) -> None:
    writers = {"MixUp", "CutMix", "RandomErasing", "BatchTransform"} & trial.callbacks.keys()
    told = trial.callbacks[name].who_changed("batch", step=1)
    assert {line.partition(".")[0] for line in told} == writers


def looked(trial: Trial, name: str) -> None:
    assert any(logged.startswith("train/gradient_norm/") for logged in trial.run.metrics)
    assert any(logged.startswith("train/activation_std/") for logged in trial.run.metrics)


def weighted() -> Any:
    x, y = arrays()
    weights = ((y == 1) | (y == 2)).double()
    return lw.Loader((x, y), sampler=lw.data.WeightedSampler(weights, BATCH, samples=22))


ENTRIES: dict[str, Entry] = {
    "MixUp": Entry(mixup, lambda folder: lw.MixUp(classes=CLASSES)),
    "CutMix": Entry(cutmix, lambda folder: lw.CutMix(classes=CLASSES)),
    "RandomErasing": Entry(erasing, lambda folder: lw.RandomErasing(1.0, value=7.0)),
    "BatchTransform": Entry(doubled, lambda folder: lw.BatchTransform(lambda batch: (batch[0] * 2, batch[1]))),
    "Penalty": Entry(penalty, lambda folder: lw.Penalty("l1", 0.001, parameters="*weight")),
    "EarlyStopping": Entry(stopped, lambda folder: lw.EarlyStopping("valid/loss", patience=1, min_delta=1e9)),
    "Anneal": Entry(annealed, lambda folder: lw.Anneal({"module.3.p": lw.schedules.linear(0.1, 0.5)})),
    "SAM": Entry(uphill, lambda folder: lw.SAM(0.05)),
    "EMA": Entry(smoothed, lambda folder: lw.EMA(0.5)),
    "SWA": Entry(averaged, lambda folder: lw.SWA("1 epoch", evaluate=False)),
    "KeepBest": Entry(best, lambda folder: lw.KeepBest("valid/loss")),
    "Plateau": Entry(plateaued, lambda folder: lw.Plateau("valid/loss", patience=1, min_delta=1e9)),
    "Audit": Entry(caught, lambda folder: lw.Audit(), observes=True),
    "Changes": Entry(remembered, lambda folder: lw.Changes(), observes=True),
    "Doctor": Entry(examined, lambda folder: lw.Doctor(1, show=False), observes=True),
    "Profiler": Entry(timed, lambda folder: lw.Profiler(show=False), observes=True),
    "TorchProfiler": Entry(traced, lambda folder: lw.TorchProfiler(wait=1, warmup=1, active=1), observes=True),
    "Checkpoint": Entry(saved, lambda folder: lw.Checkpoint("1 epoch"), observes=True),
    "ProgressBar": Entry(shown, lambda folder: lw.ProgressBar(file=io.StringIO(), mode="lines"), observes=True),
    "Capsule": Entry(kept, lambda folder: lw.Capsule(), observes=True),
    "Throughput": Entry(
        rates, lambda folder: lw.Throughput(1, tokens=lambda batch: batch[0].numel(), flops=True), observes=True
    ),
    "Resources": Entry(resources, lambda folder: lw.Resources("0.000001 s"), observes=True),
    "Watch": Entry(
        looked, lambda folder: lw.Watch("gradients", "activations", at=lw.Event.STEP_END(every=1)), observes=True
    ),
    "Predictions": Entry(written, lambda folder: lw.Predictions(folder / "predictions"), observes=True),
    "Report": Entry(reported, lambda folder: lw.Report(), observes=True),
    "CSVLogger": Entry(
        tabled, settings=lambda folder: {"loggers": [lw.CSVLogger(folder / "metrics.csv")]}, observes=True
    ),
    "a tracker of one's own": Entry(
        plugged, settings=lambda folder: {"loggers": [printed()(str(folder / "runs.db"))]}, observes=True
    ),
    "accumulate": Entry(accumulated, settings=lambda folder: {"accumulate": 2}),
    "clip_norm": Entry(clipped, settings=lambda folder: {"clip_norm": 0.01}),
    "bf16": Entry(half, settings=lambda folder: {"precision": "bf16"}),
    "a schedule": Entry(halved, schedule=lambda sgd: torch.optim.lr_scheduler.StepLR(sgd, 1, 0.5)),
    "oversampling": Entry(oversampled, data=weighted),
    "body and head": Entry(two, task=Two),
    "GAN": Entry(against, task=GAN),
}
TASKS = [name for name, entry in ENTRIES.items() if entry.task]
APART = {tuple(TASKS)}  # each of these two is a task, and a run has one
NAMES = list(ENTRIES)


def result_of(trial: Trial) -> list[Any]:
    return [*bits(trial.run.task, *trial.run.optimizers.values()), trial.run.history.losses]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What a run with one entry ends with."""
    known: dict[str, list[Any]] = {}

    def ends(name: str) -> list[Any]:
        if name not in known:
            known[name] = result_of(Trial((name,), tmp_path_factory.mktemp("alone")).fit())
        return known[name]

    return ends


@pytest.mark.filterwarnings("ignore:.*what the first has mixed is mixed again")
@pytest.mark.capability("FA-25")
@pytest.mark.parametrize(
    "first",
    [pytest.param(name, marks=[pytest.mark.nightly] if i % 4 else []) for i, name in enumerate(NAMES[:-1])],
)
def test_in_every_pair_each_has_its_effect(first: str, alone: Any, tmp_path: Path) -> None:
    """In pairs: all callbacks that ship, schedules, mixed precision, accumulation, oversampling, loggers, a GAN."""
    for second in NAMES[NAMES.index(first) + 1 :]:
        if (first, second) in APART:
            continue
        trial = Trial((first, second), tmp_path / str(NAMES.index(second))).fit()
        ended = result_of(trial)
        for name, other in ((first, second), (second, first)):
            if ENTRIES[name].observes:
                assert same(ended, alone(other)), f"{name} has changed a run with {other}"
        for name in (first, second):
            try:
                ENTRIES[name].effect(trial, name)
            except AssertionError as error:
                raise AssertionError(
                    f"{name} has not its effect in a run with {first} and {second}: {error}"
                ) from error


@pytest.mark.filterwarnings("ignore:.*what the first has mixed is mixed again")
@pytest.mark.capability("FA-25")
def test_all_together_each_has_its_effect(tmp_path: Path) -> None:
    """All of them at once: callbacks, a schedule, mixed precision, accumulation, oversampling, loggers."""
    names = tuple(name for name in NAMES if name not in ("EarlyStopping", *TASKS))
    trial = Trial(names, tmp_path).fit()
    for name in names:
        ENTRIES[name].effect(trial, name)


ON_RANK_0 = {"Checkpoint", "ProgressBar", "Capsule", "Report", "a tracker of one's own"}  # there alone they write


@pytest.mark.capability("FA-25")
@pytest.mark.slow
def test_with_two_ranks_each_has_its_effect(tmp_path: Path) -> None:
    """Distributed training with each of what ships: its effect is there, and the ranks end with the same weights."""

    def rank(folder: Path) -> dict[str, Any]:
        ends = {}
        for name in NAMES:
            trial = Trial((name,), folder / str(NAMES.index(name))).fit()
            assert trial.run.comm.world_size == 2
            elsewhere = trial.run.comm.rank and name in ON_RANK_0
            with suppress(AssertionError, AttributeError) if elsewhere else nullcontext():
                ENTRIES[name].effect(trial, name)  # on all ranks: some effects train again
            if name != "oversampling":
                assert trial.run.progress.samples == 22 * trial.run.progress.epoch, name
            ends[name] = [p.detach().clone() for p in trial.run.task.parameters()]
        return ends

    first, second = lw.launch(rank, 2, tmp_path)
    assert list(first) == NAMES
    assert [name for name in NAMES if not same(first[name], second[name])] == []


def test_every_callback_that_ships_has_an_entry() -> None:
    public = {name: getattr(lw, name) for name in lw.__all__}
    shipped = {name for name, it in public.items() if isinstance(it, type) and issubclass(it, lw.Callback)}
    elsewhere = {"Callback", "Requeue"}  # the base; what acts in a SLURM job only (test_requeue.py)
    assert shipped - elsewhere <= set(ENTRIES)
