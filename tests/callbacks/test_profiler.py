"""Profilers: every moment is charged to what it was spent on, traces are written, and no bit changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopwright as lw
from loopwright._compat import at_end_of_backward
from tiny import acts, bits, classifier, line, loader, pairs, same, seed_all, sgd_task, trainer


class Clock:
    """Time that passes in naps only, so that what each line is charged with is known to the last digit."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopwright.callbacks.profiler.perf_counter", CLOCK)


def nap(*args: Any) -> None:
    CLOCK.now += 1.0


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        nap()
        return grads[0]


class SlowSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        nap()
        return super().step(closure)


class SlowMean(lw.metrics.Metric):
    """Naps when it is fed."""

    def __init__(self) -> None:
        pass

    def update(self, preds: Tensor, target: Tensor) -> None:
        nap()

    def compute(self) -> float:
        return 0.0

    def reset(self) -> None:
        pass


class Slow(lw.Callback):
    def on_epoch_end(self, run: lw.Run) -> None:
        nap()

    def map_loss(self, run: lw.Run, loss: Tensor, output: Any, batch: Any, phase: lw.Phase) -> Tensor:
        nap()
        return loss


def slow_batches() -> Any:
    for batch in pairs([1], [2], [3], [4]):
        nap()
        yield batch


def profiled(where: str, **settings: Any) -> lw.Profiler:
    """A run of 4 batches, 2 epochs, that naps in one place."""
    net, profiler = line(1.0), lw.Profiler(show=False)
    data: Any = slow_batches if where == "data" else pairs([1], [2], [3], [4])

    class Task(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any) -> Any:
            if where == "forward":
                nap()
            preds = self.net(batch[0])
            loss = SlowBackward.apply(preds).mean() if where == "backward" else preds.mean()
            return {"loss": loss, "preds": preds, "target": batch[1]}

        def validation_step(self, batch: Any) -> Any:
            if where == "validation":
                nap()
            return {"loss": self.net(batch[0]).mean(), "preds": batch[0], "target": batch[1]}

        def configure_optimizers(self) -> Any:
            return (SlowSGD if where == "optimizer" else torch.optim.SGD)(self.net.parameters(), 0.1)

        def configure_metrics(self) -> dict[str, Any]:
            return {"slow": SlowMean()} if where == "metrics" else {}

    class SlowLogger:
        def log(self, progress: Any, values: Any, kind: str) -> None:
            if where == "record":
                nap()

    callbacks = [Slow()] if where.startswith("Slow.") else []
    user = trainer(epochs=2, log_every=2, callbacks=[profiler, *callbacks], loggers=[SlowLogger()], **settings)
    user.fit(Task(), data, pairs([1.0], [1.0]))
    return profiler


def charged(profiler: lw.Profiler) -> dict[str, float]:
    return {name: seconds for name, (seconds, _) in profiler.times.items() if seconds}


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "where", ["data", "forward", "backward", "metrics", "optimizer", "record", "validation", "Slow.map_loss"]
)
def test_a_nap_is_charged_to_what_takes_it_and_to_nothing_else(where: str, accumulate: int) -> None:
    naps = {"optimizer": 8 // accumulate, "validation": 4, "record": 4 // accumulate + 2}.get(where, 8)
    also = {"Slow.map_loss": {"Slow.on_epoch_end": 2.0}, "metrics": {"validation": 4.0}, "record": {"validation": 2.0}}
    assert charged(profiled(where, accumulate=accumulate)) == {where: naps, **also.get(where, {})}


@pytest.mark.usefixtures("clock")
def test_a_save_and_a_handler_are_charged_to_their_own_lines(folder: Path) -> None:
    class SlowSave(lw.Checkpoint):
        def save(self, run: lw.Run) -> Any:
            nap()
            return super().save(run)

    profiler = lw.Profiler(show=False)
    user = lw.Trainer(
        epochs=2, folder=folder, progress=False, callbacks=[profiler], checkpoint=SlowSave("1 epoch", at_end=False)
    )
    user.on(lw.Event.STEP_END(every=2))(nap)
    user.fit(sgd_task(line()), pairs([1], [2], [3], [4]))
    assert charged(profiler) == {"checkpoint": 2, "nap, at STEP_END(every=2)": 4}
    assert profiler.times["checkpoint"][1] == 2
    assert profiler.times["nap, at STEP_END(every=2)"][1] == 8


def test_the_lines_count_what_they_say(folder: Path) -> None:
    profiler = lw.Profiler(show=False)
    user = lw.Trainer(epochs=2, callbacks=[profiler, Slow()], folder=folder, progress=False)
    run = user.fit(sgd_task(line()), pairs([1], [2], [3]))
    times = profiler.times
    counts = {name: times[name][1] for name in ("data", "forward", "backward", "optimizer", "Slow.on_epoch_end")}
    assert counts == {"data": 6, "forward": 6, "backward": 6, "optimizer": 6, "Slow.on_epoch_end": 2}
    assert run.folder is not None
    written = json.loads((run.folder / "profile.json").read_text())
    assert written == profiler.as_dict()
    assert (written["steps"], written["synchronised"]) == (6, False)
    assert written["lines"]["Slow.map_loss"]["calls"] == 6


@pytest.mark.capability("PL-10")
def test_a_flag_profiles_a_run_and_prints_the_table(capsys: Any, folder: Path) -> None:
    """Debug(profile=True) is all: a table of data, forward, backward, optimizer and each callback's hooks."""
    user = lw.Trainer(epochs=2, callbacks=[Slow()], folder=folder, progress=False, debug=lw.Debug(profile=True))
    run = user.fit(sgd_task(line()), pairs([1], [2], [3]))
    printed = capsys.readouterr().out
    assert printed.startswith("Profile: 6 steps in ")
    names = [text.split("  ")[0] for text in printed.splitlines()[2:]]
    assert names[:4] == ["data", "forward", "backward", "metrics"]
    assert {"optimizer", "record", "rest", "Slow.map_loss", "Slow.on_epoch_end", "Profiler"} <= set(names)
    assert run.folder is not None
    assert (run.folder / "profile.json").exists()


def fitted(folder: Path, *watchers: lw.Callback, **settings: Any) -> list[Any]:
    net = classifier(dropout=0.5, batch_norm=True)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    seed_all(2)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), optimizer, metrics={"accuracy": lw.metrics.Accuracy()})
    user = lw.Trainer(**{"epochs": 2, "folder": folder, "progress": False, "callbacks": watchers, **settings})
    user.fit(task, loader(23, batch_size=7, shuffle=True, noisy=True), loader(9, batch_size=4, noisy=True))
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    return bits(net, optimizer)


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2, "clip_norm": 1.0}, {"precision": "bf16"}])
def test_profiling_changes_no_bit(settings: Any, folder: Path) -> None:
    plain = fitted(folder, **settings)
    assert same(fitted(folder, lw.Profiler(show=False), **settings), plain)
    assert same(fitted(folder, lw.TorchProfiler(wait=1, warmup=1, active=1), **settings), plain)
    watchers = [lw.Audit(), lw.Profiler(show=False), lw.EarlyStopping(), acts(on_step_end=lambda run, result: None)]
    assert same(fitted(folder, *watchers, **settings), plain)


def test_an_optimizer_that_calls_back_and_one_that_was_replaced_are_timed() -> None:
    net, profiler = line(1.0), lw.Profiler(show=False)
    task = lw.Supervised(net, nn.MSELoss(), torch.optim.LBFGS(net.parameters(), max_iter=3))
    trainer(epochs=1, callbacks=[profiler]).fit(task, pairs([1], [2]))
    assert profiler.times["optimizer"][1] == 2
    assert profiler.times["forward"][1] >= 2
    user = trainer(epochs=1, callbacks=[profiler])

    @user.on(lw.Event.STEP_END(once=1))
    def swap(run: lw.Run) -> None:
        run.replace("optimizer", torch.optim.Adam(net.parameters()))

    user.fit(sgd_task(net), pairs([1], [2], [3]))
    assert {name: profiler.times[name][1] for name in ("forward", "optimizer")} == {"forward": 3, "optimizer": 3}


def test_an_error_is_told_as_without_a_profiler_and_the_table_is_kept(capsys: Any) -> None:
    def fail(run: lw.Run, result: Any) -> None:
        raise ValueError("no")

    texts = []
    for watchers in ([], [lw.Profiler()]):
        with pytest.raises(ValueError, match="no") as caught:
            trainer(epochs=1, callbacks=[acts(on_step_end=fail), *watchers]).fit(sgd_task(line()), pairs([1]))
        texts.append(caught.value.__notes__)
    place = "[loopwright] in Acts.on_step_end, after epoch 0, batch 1 of the open epoch, step 1"
    assert texts[0] == texts[1] == [f"{place}; batch: (float32[1, 1], float32[1, 1])"]
    assert "Profile: 1 steps in" in capsys.readouterr().out


def test_waiting_for_a_device_that_is_none_is_refused() -> None:
    plan = trainer(epochs=1, callbacks=[lw.Profiler(sync=True)]).plan(sgd_task(line()), pairs([1]))
    assert plan.problems == ["Profiler(sync=True) has nothing to wait for on cpu; leave it out"]


def test_the_end_of_a_backward_is_told_once_it_is_over() -> None:
    seen: list[str] = []
    x = torch.ones(1, requires_grad=True)
    y = SlowBackward.apply(x)
    x.register_hook(lambda grad: seen.append("x"))
    y.register_hook(lambda grad: at_end_of_backward(lambda: seen.append("end")))
    y.sum().backward()
    seen.append("after")
    assert seen == ["x", "end", "after"]


# ----------------------------------------------------------------------------------------------- torch's own profiler


def test_a_trace_holds_the_operators_of_the_steps_that_were_asked_for(folder: Path) -> None:
    watch = lw.TorchProfiler(wait=1, warmup=1, active=2, shapes=True)
    run = lw.Trainer(epochs=2, folder=folder, progress=False, callbacks=[watch]).fit(
        sgd_task(line()), pairs([1], [2], [3], [4])
    )
    assert run.folder is not None
    assert watch.traces == [run.folder / "traces" / "step-00000004.json"]
    assert watch.last_step == 4
    events = json.loads(watch.traces[0].read_text())["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert {"ProfilerStep#2", "ProfilerStep#3", "aten::linear"} <= names
    assert not {"ProfilerStep#1", "ProfilerStep#4"} & names
    assert any("Input Dims" in event.get("args", {}) for event in events)


def test_a_trace_is_repeated_and_what_was_begun_is_written_at_the_end(folder: Path) -> None:
    watch = lw.TorchProfiler(wait=0, warmup=1, active=2, repeat=2, folder=folder)
    trainer(epochs=1, callbacks=[watch]).fit(sgd_task(line()), pairs([1], [2], [3], [4], [5]))
    assert [path.name for path in watch.traces] == ["step-00000003.json", "step-00000005.json"]


def test_torchs_profiler_is_refused_where_it_has_no_folder_or_too_few_steps() -> None:
    plan = trainer(steps=5, callbacks=[lw.TorchProfiler()]).plan(sgd_task(line()), pairs([1]))
    assert plan.problems == [
        "TorchProfiler needs a folder for its traces: Trainer(folder='runs'), or TorchProfiler(folder=...)",
        "TorchProfiler(wait=5, warmup=1, active=3) needs 9 steps, but 5 are taken; lower them",
    ]
    with pytest.raises(lw.SettingError, match=r"TorchProfiler\(active=0\): expected a whole number of at least 1"):
        lw.TorchProfiler(active=0)
