"""Recorded steps, on a tape that does on the CPU what a CUDA graph does: they leave the bits of steps that are not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import loopwright as lw
from loopwright import graphs, recordable
from loopwright.checkpoint import list_checkpoints
from tape import Tapes
from tiny import acts, bits, classifier, loader, same, samples, sgd_task, trainer


@pytest.fixture(autouse=True)
def on_a_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "CudaRecorder", Tapes)
    monkeypatch.setattr(recordable, "_DEVICE", "cpu")


def momentum(params: Any) -> Any:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)


def adam(params: Any) -> Any:
    optim: Any = lw.optim
    return optim.Stepwise(params, [optim.decay, optim.adam], lr=torch.tensor(0.01), capturable=True)


class Net(nn.Module):
    """Counts how often Python comes by, where it is not looked for."""

    calls = 0

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.inner = classifier(**settings)

    def forward(self, x: Tensor) -> Tensor:
        Net.calls += 1
        out: Tensor = self.inner(x)
        return out


def untimed(run: lw.Run) -> Any:
    """All records and losses, without what the clock says."""
    records = [
        {k: v for k, v in one.items() if not k.startswith(("seconds", "time", "throughput"))} for one in run.history
    ]
    return [records, {name: list(values) for name, values in run.history.losses.items()}]


def ends(make: Callable[..., Any] = momentum, data: Any = None, task: Any = None, **settings: Any) -> list[Any]:
    """Bits of what is left and what was told, of a run that is recorded and of one that is not."""
    found = []
    for recorded in (False, True):
        net, Net.calls = Net(dropout=0.3, batch_norm=True), 0
        own = (
            task(net)
            if task
            else lw.Supervised(
                net, nn.CrossEntropyLoss(), make, metrics={"acc": lw.metrics.Accuracy(ignore_index=-100)}
            )
        )
        given = {"epochs": 6, "seed": 3, "log_every": 2} | settings
        given["callbacks"] = [one() for one in given.get("callbacks", ())]
        of_fit = given.pop("fit", {})
        read = data() if data else loader(batch_size=8, shuffle=True)
        run = trainer(cuda_graphs=recorded, **given).fit(own, read, **of_fit)
        told = [untimed(run), run.metrics, run.progress._replace(seconds=0)]
        found.append(([*bits(net, *run.optimizers.values()), told], run, net))
    (plain, *_), (recorded_bits, run, net) = found
    assert same(plain, recorded_bits)
    return [run, net]


@pytest.mark.parametrize("make", [momentum, adam])
@pytest.mark.parametrize(
    "settings", [{}, {"clip_norm": 0.05}, {"nonfinite": None}, {"accumulate": 3}, {"precision": "bf16"}], ids=str
)
def test_the_bits_are_those_of_steps_that_are_not_recorded(make: Any, settings: dict[str, Any]) -> None:
    run, _ = ends(make, **settings)
    assert run.graphs.recorded == 2  # whole windows and the short last one


def test_python_does_not_come_by_a_step_that_is_replayed() -> None:
    run, _ = ends(data=lambda: loader(32, batch_size=8), epochs=5)
    # the momentum is made in the first step; three more of one kind; the one that is recorded
    assert (run.progress.step, run.graphs.recorded, Net.calls) == (20, 1, 1 + 3 + 1)


def test_a_schedule_is_followed_where_the_rate_is_a_tensor() -> None:
    def task(net: nn.Module) -> lw.Supervised:
        return lw.Supervised(net, cross_entropy, adam, schedule=lw.schedules.cosine(0.1, 0.001))

    run, _ = ends(task=task)
    assert run.graphs.recorded == 2


@pytest.mark.parametrize("change", ["rate", "frozen", "dropout", "eval"])
def test_what_is_changed_between_two_steps_is_recorded_anew(change: str) -> None:
    class Changes(lw.Callback):
        def on_epoch_start(self, run: lw.Run) -> None:
            if run.progress.epoch != 2:
                return
            inner = run.task.module.inner
            if change == "rate":
                run.optimizers["main"].param_groups[0]["lr"] = 0.01
            elif change == "frozen":
                inner[0].requires_grad_(False)
            elif change == "dropout":
                inner[3].p = 0.9
            else:
                inner[1].eval()

    run, _ = ends(data=lambda: loader(32, batch_size=8), callbacks=[Changes])
    assert run.graphs.recorded == 2


@pytest.mark.parametrize("nonfinite", ["raise", None])
def test_hooks_before_and_after_a_step_are_called_in_every_step(nonfinite: str | None) -> None:
    seen: list[Any] = []

    class Looks(lw.Callback):
        def on_step_start(self, run: lw.Run) -> None:
            seen.append(("start", len(run.window)))

        def map_batch(self, run: lw.Run, batch: Any) -> Any:
            return [batch[0] + torch.rand(()), batch[1]]

        def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
            seen.append((result.values["loss"], result.output["preds"], result.weight))
            seen.append([p.grad.clone() for p in run.task.parameters() if p.grad is not None])

    run, _ = ends(callbacks=[Looks], nonfinite=nonfinite)
    half = len(seen) // 2
    assert same(seen[:half], seen[half:])  # also those that were kept: a replay does not write into them
    assert half == 3 * run.progress.step


def test_a_hook_that_comes_into_the_middle_of_a_step_is_called() -> None:
    """As on SIGTERM, for which the step stands still."""
    seen: list[int] = []

    class Comes(lw.Callback):
        def on_epoch_start(self, run: lw.Run) -> None:
            own = (lambda run, phase, norm: seen.append(run.progress.step),)
            run.hooks.on_grads_ready = own if run.progress.epoch == 4 else ()

    run, _ = ends(callbacks=[Comes])
    assert run.graphs.recorded == 2
    assert seen == [20, 21, 22, 23, 24] * 2


def test_batches_are_weighed_before_they_are_recorded() -> None:
    """Counting reads the device; windows of one shape and other weights have other gradients."""
    x, y = samples(48)
    y = torch.where(torch.arange(48) % 16 < 3, -100, y)
    data = [[x[i : i + 8], y[i : i + 8]] for i in range(0, 48, 8)]
    counted = {"accumulate": 2, "epochs": 8}
    run, _ = ends(data=lambda: data, fit={"weight": lambda batch: int((batch[1] >= 0).sum())}, **counted)
    assert run.graphs.recorded == 1
    mixed = [data[0], data[1], data[1], data[1], data[0], data[0]]
    run, _ = ends(data=lambda: mixed, fit={"weight": lambda batch: int((batch[1] >= 0).sum())}, **counted)
    assert run.graphs.recorded == 3


class OfDicts(lw.Task):
    """Whose metrics read the batch, and whose second phase may be dropped by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = classifier(seed=1), classifier(seed=2)

    def configure_optimizers(self) -> Any:
        return {"one": momentum(self.one.parameters()), "two": momentum(self.two.parameters())}

    def configure_metrics(self) -> Any:
        return {"acc": lw.metrics.Accuracy()}

    def phases(self) -> list[lw.Phase]:
        return [lw.Phase("one", self.step_one, "one"), lw.Phase("two", self.step_two, "two")]

    def step_one(self, batch: Any) -> dict[str, Any]:
        preds = self.one(batch["x"])
        return {"loss": cross_entropy(preds, batch["target"]), "preds": preds}

    def step_two(self, batch: Any) -> dict[str, Any]:
        preds = self.two(batch["x"])
        return {"loss": cross_entropy(preds, batch["target"]) * batch["scale"].mean(), "preds": preds}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_phase_that_is_dropped_is_neither_told_nor_measured(accumulate: int) -> None:
    x, y = samples(64)
    data = [{"x": x[i : i + 8], "target": y[i : i + 8], "scale": torch.ones(8)} for i in range(0, 64, 8)]
    data[5]["scale"] = torch.full((8,), torch.nan)
    told: list[Any] = []

    class Looks(lw.Callback):
        def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
            told.append((sorted(result.values), result.moved))

    run, _ = ends(
        data=lambda: data, task=lambda net: OfDicts(), nonfinite="skip", callbacks=[Looks], accumulate=accumulate
    )
    assert run.graphs.recorded == 1
    assert run.skipped == 6
    assert told[: len(told) // 2] == told[len(told) // 2 :]
    assert (["one/loss"], ("one",)) in told


@pytest.mark.parametrize("rule", ["skip", "raise"])
def test_a_step_that_is_not_finite_moves_nothing(rule: str) -> None:
    batches = [list(batch) for batch in loader(32, batch_size=8)]
    spoilt = [torch.full((8, 5), torch.nan), batches[0][1]]
    data = [*batches * 3, spoilt, *batches]
    if rule == "skip":
        run, _ = ends(data=lambda: data, nonfinite="skip", epochs=2)
        assert run.skipped == 2
        return
    found = []
    for recorded in (False, True):
        net = classifier()
        with pytest.raises(lw.NonFiniteError, match="loss of nan at step 13") as caught:
            trainer(epochs=1, cuda_graphs=recorded).fit(sgd_task(net, lr=0.1, loss=cross_entropy), data)
        found.append((net.state_dict(), str(caught.value)))
    assert same(*found)


class Gan(lw.Task):
    """Two phases, of which the second meets gradients that the first has left."""

    def __init__(self) -> None:
        super().__init__()
        self.gen, self.disc = classifier(seed=1), classifier(seed=2, dropout=0.2)

    def configure_optimizers(self) -> Any:
        return {"disc": momentum(self.disc.parameters()), "gen": momentum(self.gen.parameters())}

    def phases(self) -> list[lw.Phase]:
        return [lw.Phase("disc", self.step_disc, "disc", clip_norm=0.5), lw.Phase("gen", self.step_gen, "gen")]

    def step_disc(self, batch: Any) -> dict[str, Any]:
        return {"loss": cross_entropy(self.disc(batch[0]), batch[1]), "size": self.disc[0].weight.norm()}

    def step_gen(self, batch: Any) -> Any:
        return -cross_entropy(self.disc(torch.cat([self.gen(batch[0]), batch[0][:, :2]], 1)), batch[1])


@pytest.mark.parametrize("rule", ["raise", "skip", None])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_several_phases_are_one_recorded_step(rule: str | None, accumulate: int) -> None:
    run, _ = ends(task=lambda net: Gan(), nonfinite=rule, accumulate=accumulate)
    assert run.graphs.recorded == 2


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    def fit(name: str, **settings: Any) -> Any:
        net = classifier(dropout=0.3)
        user = lw.Trainer(
            folder=tmp_path, name=name, seed=3, progress=False, cuda_graphs=True, callbacks=[lw.EMA(0.9)],
            checkpoint=lw.Checkpoint("7 steps", keep=9), **settings,
        )  # fmt: skip
        task = lw.Supervised(
            net, nn.CrossEntropyLoss(), momentum, metrics={"acc": lw.metrics.Accuracy(ignore_index=-100)}
        )
        return user, task, net

    whole, task, net = fit("whole", epochs=4)
    run = whole.fit(task, loader(batch_size=8, shuffle=True))
    assert run.graphs.recorded == 2
    for folder in list_checkpoints(run.folder / "checkpoints"):
        again, task, second = fit("again", epochs=4)
        again.fit(task, loader(batch_size=8, shuffle=True), resume=folder)
        assert same(second.state_dict(), net.state_dict())


def test_what_comes_in_too_many_shapes_is_done_without() -> None:
    def data() -> list[Any]:
        x, y = samples(60)
        return [[x[:n], y[:n]] for n in range(2, 14)]

    with pytest.warns(lw.LoopwrightWarning, match="more than 8 kinds of windows have come"):
        run, _ = ends(data=data)
    assert run.graphs.recorded == 8


class Same(lw.Task):
    """Two phases that move the same parameters, with other gradients each; some batches spoil one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = classifier(seed=1)

    def configure_optimizers(self) -> Any:
        return momentum(self.parameters())

    def phases(self) -> list[lw.Phase]:
        return [lw.Phase("one", self.step_one), lw.Phase("two", self.step_two, clip_norm=1.0)]

    def step_one(self, batch: Any) -> Any:
        return cross_entropy(self.net(batch[0]), batch[1]) * batch[2].mean()

    def step_two(self, batch: Any) -> Any:
        return cross_entropy(self.net(batch[0]), batch[1], label_smoothing=0.1) * batch[3].mean()


@pytest.mark.parametrize("spoilt", [2, 3])
def test_each_phase_is_judged_by_its_own_gradients(spoilt: int) -> None:
    x, y = samples(64)
    data = [[x[i : i + 8], y[i : i + 8], torch.ones(8), torch.ones(8)] for i in range(0, 64, 8)]
    data[5][spoilt] = torch.full((8,), torch.nan)
    norms: list[Any] = []

    class Looks(lw.Callback):
        def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
            norms.append(None if result.grad_norm is None else result.grad_norm.clone())

    run, _ = ends(data=lambda: data, task=lambda net: Same(), nonfinite="skip", callbacks=[Looks])
    assert run.skipped == 6
    assert same(norms[: len(norms) // 2], norms[len(norms) // 2 :])


def test_a_step_that_was_dropped_has_made_nothing_ready() -> None:
    """The momentum is made by the first step that is taken, and not in a recording."""
    good = [list(batch) for batch in loader(32, batch_size=8)]
    spoilt = [[torch.full((8, 5), torch.nan), y] for _, y in good]
    ends(data=lambda: [*spoilt, *spoilt[:2], *good], task=lambda net: plain(), nonfinite="skip")


def test_kinds_whose_steps_train_other_parameters() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = classifier(seed=1), classifier(seed=2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = (self.one if len(x) == 8 else self.two)(x)
            return out

    x, y = samples(40)
    data = [[x[:8], y[:8]], [x[8:14].clone(), y[8:14]], [torch.full((8, 5), torch.nan), y[:8]]]
    data.append([x[14:20].clone(), y[14:20]])  # what is copied into a recording is aligned, and has the bits of that

    def task(net: nn.Module) -> lw.Supervised:
        return lw.Supervised(Branches(), cross_entropy, lambda params: torch.optim.SGD(params, 0.1))

    run, _ = ends(data=lambda: data, task=task, nonfinite="skip")
    assert run.skipped == 6


def test_an_epoch_that_a_hook_ends_within_a_window() -> None:
    class Ends(lw.Callback):
        def on_batch_start(self, run: lw.Run, batch: Any) -> None:
            if run.progress.epoch > 3 and batch[0][0, 0] == self.at:
                raise lw.StopEpoch

        def __init__(self, at: float) -> None:
            self.at = at

    data = [list(batch) for batch in loader(37, batch_size=8)]
    for i in (3, 1):  # the first of a window, and the second
        ends(data=lambda: data, accumulate=3, callbacks=[lambda i=i: Ends(data[i][0][0, 0].item())], fit={})


def test_numbers_that_hang_on_other_objects_are_seen() -> None:
    class Loss:
        def __init__(self) -> None:
            self.settings = SimpleNamespace(smooth={"by": [0.0]})

        def __call__(self, preds: Tensor, target: Tensor) -> Tensor:
            return cross_entropy(preds, target, label_smoothing=self.settings.smooth["by"][0])

    class Smooths(lw.Callback):
        def on_epoch_start(self, run: lw.Run) -> None:
            run.task.loss.settings.smooth["by"][0] = 0.1 * (run.progress.epoch // 3)

    def task(net: nn.Module) -> lw.Supervised:
        return lw.Supervised(net, Loss(), momentum)

    run, _ = ends(data=lambda: loader(48, batch_size=8), task=task, callbacks=[Smooths])
    assert run.graphs.recorded == 2


def test_what_a_forward_leaves_with_its_graph_is_no_change() -> None:
    """As mixtures of experts leave the loss of their balance."""

    class Leaves(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.aux = self.inner[0].weight.square().mean()
            return super().forward(x)

    def task(net: nn.Module) -> lw.Supervised:
        net = Leaves()
        return lw.Supervised(net, lambda preds, target: cross_entropy(preds, target) + net.aux, momentum)

    run, _ = ends(task=task)
    assert run.graphs.recorded == 2


def test_a_rate_that_is_another_in_each_epoch_of_one_step_is_told_and_followed() -> None:
    def task(net: nn.Module) -> lw.Supervised:
        def schedule(optimizer: Any) -> Any:
            return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

        return lw.Supervised(net, cross_entropy, momentum, schedule=schedule)

    with pytest.warns(lw.LoopwrightWarning, match="lr of a group of SGD changes so often that few steps are replayed"):
        ends(data=lambda: [list(batch) for batch in loader(8, batch_size=8)], task=task, epochs=20)


def test_rates_are_sought_with_steps_that_are_not_recorded() -> None:
    found = lw.lr_find(trainer(epochs=1, cuda_graphs=True), plain(), loader(64, batch_size=8), steps=20)
    assert len(found.lrs) > 9


def test_the_values_of_a_step_that_fails_are_in_its_capsule(tmp_path: Path) -> None:
    batches = [list(batch) for batch in loader(32, batch_size=8)]
    data = [*batches * 3, [torch.full((8, 5), torch.nan), batches[0][1]]]
    user = lw.Trainer(epochs=1, folder=tmp_path, progress=False, cuda_graphs=True, checkpoint=False)
    with pytest.raises(lw.NonFiniteError):
        user.fit(plain(), data)
    (capsule,) = tmp_path.glob("*/*/capsules/*")
    assert json.loads((capsule / "state.json").read_text())["values"]["loss"] != {}


# ------------------------------------------------------------------------------------------- what cannot be recorded


def refused(step: Callable[[Any], Any], net: nn.Module | None = None, **settings: Any) -> str:
    class Own(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = net or classifier()
            self.seen = 0

        def training_step(self, batch: Any) -> Any:
            return step(self, batch)

        def configure_optimizers(self) -> Any:
            return momentum(self.parameters())

    with pytest.raises(lw.SettingError) as caught:
        trainer(epochs=9, cuda_graphs=True, **settings).fit(Own(), loader(32, batch_size=8))
    return str(caught.value)


def test_a_number_that_changes_in_every_step_is_named() -> None:
    def step(task: Any, batch: Any) -> Tensor:
        task.seen += 1
        return cross_entropy(task.net(batch[0]), batch[1]) * task.seen

    assert "before each of 12 steps seen of Own was another" in refused(step)


def test_a_step_that_reads_the_device_or_draws_on_the_host_is_refused() -> None:
    def loss(task: Any, batch: Any) -> Tensor:
        return cross_entropy(task.net(batch[0]), batch[1])

    assert "reads nothing from the device" in refused(lambda task, batch: loss(task, batch) * loss(task, batch).item())
    assert "draws random numbers of python on" in refused(lambda task, batch: loss(task, batch) * random.random())
    assert "numpy" in refused(lambda task, batch: loss(task, batch) * float(np.random.rand()))
    net = classifier()
    net.own = np.random.default_rng(0)  # type: ignore[assignment]
    assert "task.net.own on the host" in refused(lambda task, batch: loss(task, batch) * task.net.own.random(), net)


def test_hooks_that_come_when_the_fit_begins_are_refused() -> None:
    class Clips(lw.Callback):
        def on_fit_start(self, run: lw.Run) -> None:
            for parameter in run.task.parameters():
                parameter.register_hook(lambda grad: grad.clamp(-1, 1))

    class Joins(lw.Callback):
        def on_fit_start(self, run: lw.Run) -> None:
            run.hooks.map_loss = (lambda run, loss, *_: loss,)

    for callback, why in ((Clips(), "register_hook"), (Joins(), "in the middle of a step")):
        with pytest.raises(lw.SettingError, match=why):
            trainer(epochs=9, cuda_graphs=True, callbacks=[callback]).fit(plain(), loader(32, batch_size=8))


@pytest.mark.parametrize("kind", [lw.StopEpoch, lw.SkipStep])
def test_a_step_that_steers_is_refused(kind: type[Exception]) -> None:
    """It has run three times, and the fourth is recorded: one that raises in Python would do so in every replay."""
    count = iter(range(10**6))

    def step(task: Any, batch: Any) -> Any:
        if next(count) == 4:
            raise kind
        return cross_entropy(task.net(batch[0]), batch[1])

    assert "raised SkipStep or StopEpoch" in refused(step)


def test_a_batch_that_cannot_be_copied_is_refused() -> None:
    data = [[x, y, object()] for x, y in loader(32, batch_size=8)]
    with pytest.raises(lw.SettingError, match="a batch holds a object"):
        trainer(epochs=2, cuda_graphs=True).fit(lw.Supervised(classifier(), cross_entropy, momentum), data)


def with_phase(**settings: Any) -> lw.Task:
    class Own(lw.Supervised):
        def phases(self) -> list[lw.Phase]:
            return [lw.Phase("main", self.training_step, **settings)]

    return Own(classifier(), cross_entropy, momentum)


def plain(make: Any = momentum, **settings: Any) -> lw.Task:
    return lw.Supervised(classifier(), cross_entropy, make, **settings)


REFUSED: dict[str, tuple[Callable[[], lw.Task], dict[str, Any]]] = {
    "Acts.map_loss would be called in the middle": (plain, {"callbacks": [acts(map_loss=lambda run, loss, *_: loss)]}),
    "on_grads_ready would be called in the middle": (plain, {"callbacks": [acts(on_grads_ready=lambda *_: None)]}),
    "precision='fp16'": (plain, {"precision": "fp16"}),
    "Adam counts its steps on the host": (lambda: plain(torch.optim.Adam), {}),
    r"the lr of SGD is set before every step.* lr=torch.tensor\(0.1, device='cuda'\), fused=True":
        (lambda: plain(schedule=lw.schedules.cosine(0.1, 0.0)), {}),
    "a phase that does not run in every step": (lambda: with_phase(every=2), {}),
    "calls the step back": (lambda: plain(torch.optim.LBFGS), {"nonfinite": None}),
    "which has accumulate": (plain, {"accumulate": "9 samples"}),
    "Doctor looks at each module, which cuda_graphs=True merges": (plain, {"callbacks": [lw.Doctor()]}),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_recorded_is_told_before_it_begins(why: str) -> None:
    make, settings = REFUSED[why]
    with pytest.raises(lw.PlanError, match=why):
        trainer(epochs=1, cuda_graphs=True, **settings).fit(make(), loader(batch_size=8))


def test_without_cuda_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordable, "_DEVICE", "cuda")
    with pytest.raises(
        lw.PlanError, match="cuda_graphs=True needs a CUDA device, and this run is on cpu; leave it out"
    ):
        trainer(epochs=1, cuda_graphs=True, device="cpu").fit(plain(), loader(batch_size=8))
    with pytest.raises(lw.SettingError, match="cuda_graphs"):
        trainer(epochs=1, cuda_graphs="yes")


def test_the_plan_says_so() -> None:
    assert "steps are CUDA graphs" in str(trainer(epochs=1, cuda_graphs=True).plan(plain(), loader(batch_size=8)))
