"""A step that fails can be made to fail again, from what its capsule holds, with the same bits."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import loopwright as lw
from loopwright.checkpoint import read
from loopwright.replaying import replay_command
from tiny import acts, bits, classifier, line, loader, pairs, same, samples, seed_all, sgd_task

BAD = 5  # the forward, counted from 1 over the run


class Broken(nn.Module):
    """A classifier with dropout and batch norm, one of whose forwards goes wrong."""

    def __init__(self, kind: str = "nan") -> None:
        super().__init__()
        self.net, self.kind = classifier(dropout=0.4, batch_norm=True), kind
        self.register_buffer("drift", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.drift += 0.125  # a buffer that enters the forward: it must be as before the step
        out = self.net(x + self.drift)
        bad = float(self.drift) == 0.125 * BAD
        if self.kind == "forward" and bad:
            raise ValueError(f"a spoiled activation of {out.sum().item()!r}")
        if self.kind == "nan" and bad:
            return out / 0.0 - out / 0.0
        return out  # type: ignore[no-any-return]


def index_loss(preds: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(preds, target + 3 if preds.shape[0] == 3 else target)


def task_of(kind: str = "nan") -> lw.Supervised:
    seed_all(3)
    net = Broken(kind)
    loss = index_loss if kind == "loss" else nn.CrossEntropyLoss()
    return lw.Supervised(net, loss, torch.optim.Adam(net.parameters(), 0.01))


class Breaks(lw.Callback):
    """Draws in each step, and fails in the fifth, or the window of the fifth batch."""

    def map_batch(self, run: lw.Run, batch: Any) -> Any:
        x, y = batch
        return [x * torch.rand(()), y]

    def on_grads_ready(self, run: lw.Run, phase: lw.Phase, grad_norm: Any) -> None:
        if run.progress.batch + run.stage.accumulate >= BAD:
            raise KeyError(f"gradient {next(iter(phase.parameters())).grad.sum().item()!r}")


def fit(
    task: lw.Task, folder: Path, *callbacks: lw.Callback, data: Any = None, **settings: Any
) -> tuple[BaseException | None, list[Path]]:
    """What a fit raised, and the capsules that are there then."""
    settings = {"epochs": 1, "seed": 1, "checkpoint": False, **settings}
    user = lw.Trainer(folder=folder, name="x", progress=False, callbacks=callbacks, **settings)
    error: BaseException | None = None
    try:
        user.fit(task, loader(27, batch_size=4, noisy=True, shuffle=True) if data is None else data)
    except BaseException as caught:
        error = caught
    return error, sorted(folder.glob("x/*/capsules/*"))


def frames(error: BaseException | None) -> list[tuple[str, int | None]]:
    """The user's own frames of a traceback."""
    assert error is not None
    found = traceback.extract_tb(error.__traceback__)
    return [(frame.name, frame.lineno) for frame in found if frame.filename == __file__ and frame.name != "fit"]


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("kind", ["nan", "forward", "loss", "hook"])
def test_the_same_error_comes_again_with_the_same_bits(kind: str, accumulate: int, folder: Path) -> None:
    breaks = [Breaks()] if kind == "hook" else []
    task = task_of(kind)
    error, (path,) = fit(task, folder, *breaks, accumulate=accumulate)
    assert error is not None
    found = lw.replay(path, task_of(kind), callbacks=breaks)
    assert isinstance(found, lw.Replay)
    assert type(found.error) is type(error)
    assert str(found.error) == str(error)
    assert frames(found.error) == frames(error)[-len(frames(found.error)) :]
    assert found.same_error
    assert found.same_values is (True if found.saved_values else None)
    if kind in ("nan", "hook"):
        assert list(found.saved_values) == ["loss"]
    assert path.name == f"step-{task._run.progress.step + 1:08d}-{type(error).__name__}"
    assert error.__notes__[-1] == f"[loopwright] to make it happen again: lw.replay({str(path)!r}, task)"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_drawn_before_the_first_batch_is_drawn_again(accumulate: int, folder: Path) -> None:
    """A replay begins where the step began, so that an on_step_start that draws finds the generator as it was."""
    draws = acts(on_step_start=lambda run: torch.rand(3).sum() and None)
    _, (path,) = fit(task_of("forward"), folder, draws, accumulate=accumulate)
    assert lw.replay(path, task_of("forward"), callbacks=[draws]).same_error  # its text holds the values


def plain() -> lw.Supervised:
    return sgd_task(classifier(), lr=0.1, loss=nn.CrossEntropyLoss())


def failing_at(step: int) -> Any:
    """A hook that raises after the backward of the step after ``step``, with the loss in its words."""

    def fail(run: lw.Run, loss: Tensor, *args: Any) -> None:
        if run.progress.step == step:
            raise ValueError(f"a loss of {loss.item()!r}")

    return fail


@pytest.mark.parametrize(("first", "same", "limits"), [(3, True, 0), (20, True, 1), (18, False, 1)])
def test_who_begins_to_draw_late_is_named(first: int, same: bool, limits: int, folder: Path) -> None:
    """The random state is read at few steps as long as nobody draws; the last case is the one that this costs."""

    def draw(run: lw.Run, batch: Any) -> Any:
        return [batch[0] * torch.rand(()), batch[1]] if run.progress.batch >= first else batch

    hooks = acts(map_batch=draw, on_backward_end=failing_at(20))
    _, (path,) = fit(plain(), folder, hooks, data=loader(60, batch_size=2, shuffle=True))
    found = lw.replay(path, plain(), callbacks=[hooks])
    assert found.same_error == same
    assert sum("was read up to 15 steps before" in limit for limit in found.limits) == limits


DRAWS: dict[str, Any] = {
    "Python": random.random, "NumPy": np.random.rand, "NumPy's normal, of which two are made at once": np.random.randn,
    "torch": lambda: torch.rand(()).item(),
}  # fmt: skip


@pytest.mark.parametrize("whose", DRAWS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_draws_inside_of_the_step_are_made_again_whoever_draws(whose: str, accumulate: int, folder: Path) -> None:
    """Of Python, NumPy and torch: the error, which tells what was drawn, and the loss, have the same bits."""

    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = classifier()

        def forward(self, x: Tensor) -> Tensor:
            drawn = DRAWS[whose]()
            if x.shape[0] == 3:  # the last batch
                raise ValueError(f"{drawn!r} was drawn")
            return self.net(x) * drawn  # type: ignore[no-any-return]

    def task() -> lw.Supervised:
        seed_all(3)
        return sgd_task(Draws(), lr=0.1, loss=nn.CrossEntropyLoss())

    error, (path,) = fit(task(), folder, data=loader(107, batch_size=4, shuffle=True), accumulate=accumulate)
    found = lw.replay(path, task())
    assert re.fullmatch(r"-?\d\.\d+ was drawn", str(error))
    assert str(found.error) == str(error)
    assert found.same_error
    assert found.same_values is (None if accumulate == 1 else True)
    assert found.limits == []


@pytest.mark.parametrize(("first", "limits"), [(0, 0), (60, 0), (64, 2), (90, 2)])
def test_who_begins_to_draw_from_python_and_numpy_late_is_named(first: int, limits: int, folder: Path) -> None:
    def draw(run: lw.Run, batch: Any) -> Any:
        return [batch[0] * random.random() * float(np.random.rand()), batch[1]] if run.progress.step >= first else batch

    hooks = acts(map_batch=draw, on_backward_end=failing_at(90))
    _, (path,) = fit(plain(), folder, hooks, data=loader(200, batch_size=2, shuffle=True))
    found = lw.replay(path, plain(), callbacks=[hooks])
    assert found.limits == [
        f"{whose}'s random state was read up to 63 steps before: until then no step had drawn"
        for whose in ("Python", "NumPy")[:limits]
    ]
    assert found.same_error or limits


IN_STEP = ("on_step_start", "on_batch_start", "on_grads_ready", "on_step_end")


def kills_itself(step: int, hook: str) -> lw.Callback:
    def kill(run: lw.Run, *args: Any) -> None:
        if run.progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return acts(**{hook: kill})


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("hook", ["on_step_start", "on_backward_end"])
def test_a_step_to_which_sigterm_comes_has_a_capsule_and_a_checkpoint(hook: str, accumulate: int, folder: Path) -> None:
    """Its batch, random state, weights and place are kept as they were before it: replayed, it has the same loss."""
    task = task_of("fine")
    error, (path,) = fit(task, folder, kills_itself(2, hook), accumulate=accumulate, checkpoint=True, clip_norm=1.0)
    assert isinstance(error, SystemExit)
    assert error.code == 143
    assert path.name == "step-00000003-SIGTERM"
    (checkpoint,) = folder.glob("x/*/checkpoints/step*")
    assert checkpoint.name == "step-00000003"  # after that step, from which the run goes on
    kept = read(path)
    assert kept.state["progress"]["step"] == 2
    assert len(kept.state["window"]) == accumulate
    before = {name: value.clone() for name, value in task_of("fine").state_dict().items()}
    again, absent = task_of("fine"), ["callbacks of the run that are not here: Acts"]
    found = lw.replay(path, again)
    assert (found.same_error, found.same_values, found.error, found.limits) == (True, True, None, absent)
    assert found.saved_values["loss"] == task._run.history.losses["loss"][2]
    assert str(found).splitlines()[1] == "error    SIGTERM: it came to this step, which had no error"
    assert str(found).endswith("the step was reproduced")
    moved = dict(again.named_parameters())["module.net.0.weight"]
    assert not torch.equal(moved, before["module.net.0.weight"])  # those of step 2, where it was made again


def test_a_replay_of_other_weights_is_not_the_step_that_sigterm_came_to(folder: Path) -> None:
    _, (path,) = fit(task_of("fine"), folder, lw.Capsule(10**5), kills_itself(2, "on_backward_end"), checkpoint=True)
    assert lw.replay(path, task_of("fine")).same_values
    state = read(path).state
    assert state["phase"] == "main"

    class Doubled(Broken):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    seed_all(3)
    net = Doubled("fine")
    other = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), 0.01))
    found = lw.replay(path, other)
    assert (found.same_error, found.same_values) == (True, False)


@pytest.mark.parametrize("hook", ["on_step_end", "on_epoch_start"])
def test_sigterm_between_steps_leaves_no_capsule_of_the_step_before(hook: str, folder: Path) -> None:
    error, capsules = fit(task_of("fine"), folder, kills_itself(1 if hook == "on_step_end" else 0, hook))
    assert isinstance(error, SystemExit)
    assert [path.name for path in capsules] == ([] if hook == "on_step_end" else ["step-00000001-SIGTERM"])


def test_sigterm_in_a_step_of_two_phases_keeps_the_first_of_them(folder: Path) -> None:
    class Two(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            seed_all(4)
            self.a, self.b = classifier(dropout=0.5), classifier(dropout=0.5, seed=2)

        def configure_optimizers(self) -> Any:
            return {n: torch.optim.SGD(getattr(self, n).parameters(), 0.1) for n in "ab"}

        def phases(self) -> list[lw.Phase]:
            step = nn.functional.cross_entropy
            return [lw.Phase(n, lambda batch, n=n: step(getattr(self, n)(batch[0]), batch[1]), n) for n in "ab"]

    _, (path,) = fit(Two(), folder, kills_itself(2, "on_step_start"))
    found = lw.replay(path, Two())
    assert (found.same_error, found.same_values) == (True, True)
    assert list(found.saved_values) == ["a/loss"]


def test_a_capsule_costs_one_hook_a_step_where_windows_are_single_batches(folder: Path) -> None:
    fired: list[tuple[int, ...]] = []
    watch = acts(on_epoch_start=lambda run: fired.append(tuple(len(getattr(run.hooks, name)) for name in IN_STEP)))
    for accumulate in (1, 2):
        fit(task_of("none"), folder, watch, accumulate=accumulate)
    assert fired == [(1, 0, 0, 0), (1, 1, 0, 1)]


def test_a_replay_leaves_the_generators_and_the_last_run_of_a_task_alone(folder: Path) -> None:
    task = task_of()
    _, (path,) = fit(task, folder)
    run, before = task._run, bits()
    lw.replay(path, task)
    assert same(bits(), before)
    assert task._run is run


def test_a_capsule_changes_no_bit_of_training(folder: Path) -> None:
    def trained(*callbacks: lw.Callback, **settings: Any) -> list[Any]:
        task = task_of("none")
        error, capsules = fit(task, folder, *callbacks, epochs=2, accumulate=2, **settings)
        assert (error, capsules) == (None, [])
        return bits(task, task.optimizer)

    assert same(trained(lw.Capsule()), trained(capsule=False))


def test_the_first_skipped_step_has_a_capsule_and_training_goes_on(folder: Path) -> None:
    class Often(Broken):
        def forward(self, x: Tensor) -> Tensor:
            self.drift += self.training
            return self.net(x) * (float("nan") if self.drift in (2, 4) else 1.0)  # type: ignore[no-any-return]

    def task() -> lw.Supervised:
        seed_all(3)
        net = Often()
        return lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), 0.01))

    one = task()
    error, (path,) = fit(one, folder, nonfinite="skip")
    assert error is None
    assert one._run.skipped == 2
    assert path.name == "step-00000002-NonFiniteError"
    found = lw.replay(path, task())
    assert (found.same_error, found.same_values) == (True, True)
    other = task()
    fit(other, folder, nonfinite="skip", capsule=False)
    assert same(bits(one), bits(other))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_of_two_phases_fails_again(accumulate: int, folder: Path) -> None:
    class Two(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            seed_all(4)
            self.a, self.b = classifier(dropout=0.5), classifier(dropout=0.5, seed=2)

        def configure_optimizers(self) -> Any:
            return {n: torch.optim.SGD(getattr(self, n).parameters(), 0.1, momentum=0.9) for n in "ab"}

        def phases(self) -> list[lw.Phase]:
            return [lw.Phase("a", self.first, "a"), lw.Phase("b", self.second, "b", every=2)]

        def first(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.a(batch[0]), batch[1])

        def second(self, batch: Any) -> Tensor:
            loss = nn.functional.cross_entropy(self.b(batch[0]), batch[1])
            if self._run.progress.step == 3:
                raise ArithmeticError(f"loss {loss.item()!r}")
            return loss

    error, (path,) = fit(Two(), folder, accumulate=accumulate, epochs=3)
    again = Two()
    found = lw.replay(path, again)
    assert str(found.error) == str(error)
    assert found.limits == [
        "if it was not the first phase of the step that failed, weights are those after the phases before it"
    ]
    assert path.name == "step-00000004-ArithmeticError"


def test_flags_of_modules_and_a_batch_that_is_a_dict_come_back(folder: Path) -> None:
    class Task(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            seed_all(4)
            self.net = classifier(dropout=0.5, batch_norm=True)

        def training_step(self, batch: Any) -> Tensor:
            target = batch.pop("y")
            loss = nn.functional.cross_entropy(self.net(batch["x"]), target)
            if batch["n"] == 3:
                raise ValueError(f"{loss.item()!r} {batch['name']} {self.net[1].training}")
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    x, y = samples(8)
    data = [{"x": x, "y": y, "n": n, "name": f"batch {n}"} for n in range(5)]
    frozen = acts(on_epoch_start=lambda run: run.task.net[1].eval() and None)
    error, (path,) = fit(Task(), folder, frozen, data=data)
    assert str(error).endswith(" batch 3 False")
    assert str(lw.replay(path, Task()).error) == str(error)


def test_what_no_file_can_hold_is_named(folder: Path) -> None:
    @dataclass
    class Note:
        text: str

    class Task(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = line(1.0)

        def training_step(self, batch: Any) -> Tensor:
            raise ValueError(f"{self.net(batch[0]).item()} {batch[1]}")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    error, (path,) = fit(Task(), folder, data=[(torch.ones(1, 1), Note("a"))])
    assert str(error) == "1.0 test_what_no_file_can_hold_is_named.<locals>.Note(text='a')"
    found = lw.replay(path, Task())
    assert str(found.error) == "1.0 None"
    assert not found.same_error
    assert found.limits == [f"batch 1[1] was left out: it is a {__name__}.{Note.__qualname__}"]
    assert str(found).endswith("the error was not reproduced")


def test_what_is_too_much_is_left_out_the_optimizer_first(folder: Path) -> None:
    def kept(size: int) -> Any:
        for old in folder.glob("x/*/capsules"):
            old.rename(old.with_name(f"old {size}"))
        _, (path,) = fit(task_of("forward"), folder, lw.Capsule(size))
        return path, read(path)

    def taken(path: Path) -> int:
        return sum(file.stat().st_size for file in path.iterdir())

    path, all_of_it = kept(10**6)
    assert all_of_it.info["limits"] == []
    whole = taken(path)
    path, nothing = kept(10)
    assert nothing.state["window"] is None
    rest = taken(path)
    with pytest.raises(lw.CheckpointError, match="cannot be replayed, it has no batch: the optimizer states"):
        lw.replay(path, task_of("forward"))
    sizes = [int(re.findall(r"([\d,]+) bytes", text)[0].replace(",", "")) for text in nothing.info["limits"]]
    path, some = kept(whole - 100)  # times have more digits or fewer
    assert taken(path) < whole
    assert some.state["optimizers"] is None
    assert some.files["model"]
    assert re.fullmatch(
        r"the optimizer states \([\d,]+ bytes\) were left out: the capsule is bounded by \d+", *some.info["limits"]
    )
    found = lw.replay(path, task_of("forward"))
    assert found.same_error  # they do not enter the forward
    assert found.limits == some.info["limits"]
    path, little = kept(rest + sizes[-1] + 500)
    assert taken(path) <= rest + sizes[-1] + 500
    assert little.files == {}
    assert len(little.state["window"]) == 1


def test_the_bound_of_a_capsule_holds_for_all_that_it_writes(folder: Path) -> None:
    """What is no tensor counts as well: a batch of texts, the manifest."""

    class Task(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(100, 100)

        def training_step(self, batch: Any) -> Tensor:
            raise ValueError("no text of mine")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    def taken(size: int) -> tuple[int, Any]:
        for old in folder.glob("x/*/capsules"):
            shutil.rmtree(old)
        _, (path,) = fit(Task(), folder, lw.Capsule(size), data=[["a text " * 1000] * 3])
        return sum(file.stat().st_size for file in path.iterdir()), read(path).state

    whole, _ = taken(10**6)
    rest, _ = taken(0)
    for size, window in ((whole + 100, True), (whole - 100, True), (whole - 42_000, False), (rest + 100, False)):
        found, state = taken(size)
        assert found <= size
        assert (state["window"] is not None) is window
    assert taken(whole + 100)[0] > whole - 100


@pytest.mark.parametrize("kind", ["fetch", "in the window", "in a worker", "on_step_end", "validation", "ctrl-c"])
def test_errors_between_steps_have_no_capsule(kind: str, folder: Path) -> None:
    class Samples(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> Any:
            if i == 3 and kind in ("fetch", "in the window", "in a worker"):
                raise ValueError("unreadable")
            return torch.ones(1), torch.zeros(1)

    def stop(run: lw.Run, *args: Any) -> None:
        raise KeyboardInterrupt if kind == "ctrl-c" else ValueError

    hook = {"on_step_end": "on_step_end", "validation": "on_epoch_end", "ctrl-c": "on_grads_ready"}.get(kind)
    callbacks = [acts(**{hook: stop})] if hook else []
    accumulate = 2 if kind in ("in the window", "in a worker") else 1
    data: Any = lw.Loader(Samples(), 1, workers=1) if kind == "in a worker" else DataLoader(Samples())
    error, capsules = fit(sgd_task(line()), folder, *callbacks, data=data, accumulate=accumulate)
    assert error is not None
    assert capsules == []


def test_a_capsule_is_no_checkpoint_and_a_checkpoint_no_capsule(folder: Path) -> None:
    _, (path,) = fit(task_of(), folder)
    fit(sgd_task(line()), folder, data=pairs([1.0]), checkpoint=True)
    (checkpoint,) = folder.glob("x/*/checkpoints/step*")
    with pytest.raises(lw.CheckpointError, match="is a checkpoint, not a crash capsule"):
        lw.replay(checkpoint, sgd_task(line()))
    with pytest.raises(lw.CheckpointError, match="does not fit this run"):
        lw.replay(path, sgd_task(line()))
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(lw.CheckpointError, match=r"model\.safetensors is damaged"):
        lw.replay(path, task_of())


def test_a_run_in_the_place_of_a_capsule_is_replayed_from_its_newest_one(folder: Path) -> None:
    _, (path,) = fit(task_of(), folder)
    run, old = path.parent.parent, path.with_name("step-00000001-Old")
    shutil.copytree(path, old)
    os.utime(old / "manifest.json", (1, 1))
    fit(task_of("fine"), folder)  # a newer run of that name, without one
    for where in (run, run.parent, path.parent, str(run)):
        found = lw.replay(where, task_of())
        assert (found.path, found.same_error) == (str(path), True)
    for gone in (path, old):
        gone.rename(folder / f"elsewhere-{gone.name}")
    for where in (run, run.parent):
        with pytest.raises(lw.CheckpointError) as error:
            lw.replay(where, task_of())
        assert str(error.value) == f"{where} has no crash capsule: none of its steps has failed"
    for where, told in (
        (folder / "no", "does not exist"),
        (run / "report", "is no crash capsule, and no run that has"),
    ):
        (run / "report").mkdir(exist_ok=True)
        with pytest.raises(lw.CheckpointError, match=re.escape(f"{where} {told}")):
            lw.replay(where, task_of())


def test_what_is_no_path_is_no_capsule() -> None:
    with pytest.raises(lw.SettingError, match=r"^the first argument of replay is function; expected the folder of a"):
        lw.replay(task_of, task_of())  # type: ignore[arg-type]
    with pytest.raises(lw.SettingError, match=r"^the first argument of replay is NoneType; expected the folder"):
        lw.replay(None, task_of())  # type: ignore[arg-type]


def test_a_capsule_of_ones_own_goes_among_the_callbacks() -> None:
    with pytest.raises(
        lw.SettingError, match=r"expected True or False; lw\.Capsule\(\.\.\.\) goes among the callbacks"
    ):
        lw.Trainer(epochs=1, capsule=lw.Capsule())  # type: ignore[arg-type]


def test_without_a_folder_there_is_no_capsule_and_one_asked_for_is_refused() -> None:
    lw.Trainer(epochs=1, folder=None, progress=False).fit(sgd_task(line()), pairs([1.0]))
    with pytest.raises(lw.SettingError, match="Capsule needs a folder"):
        lw.Trainer(epochs=1, folder=None, progress=False, callbacks=[lw.Capsule()]).fit(sgd_task(line()), pairs([1.0]))


@pytest.mark.parametrize(("size", "bytes_"), [(5, 5), ("5", 5), ("2.5 kB", 2500), ("100MB", 10**8), ("1 GB", 10**9)])
def test_sizes_that_are_one(size: int | str, bytes_: int) -> None:
    assert lw.Capsule(size).max_bytes == bytes_


@pytest.mark.parametrize("size", ["much", "", "-1", True, "1 TB", None])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(lw.SettingError, match="is no size; write a number of bytes, or a text such as '100 MB'"):
        lw.Capsule(size)


NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, x):
        return self.checked(self.net(x), x)

    def checked(self, preds, x):
        if x[0, 0] == 13:
            raise ValueError("an unlucky batch")
        return preds
"""
PROGRAM = """
import os, signal, torch, traceback, loopwright as lw
from parts.net import Net

def loss(preds, target):
    return (preds / (target - 3)).mean()

def make():
    torch.manual_seed(1)
    net = Net()
    return lw.Supervised(net, loss, torch.optim.SGD(net.parameters(), 0.1))

class Terminated(lw.Callback):
    def on_backward_end(self, run, *given):
        if run.progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

def fit(first, *callbacks):
    data = [(torch.full((4, 2), first + i), torch.full((4, 1), float(i))) for i in range(5)]
    lw.Trainer(epochs=1, folder="runs", name="x", progress=False, callbacks=callbacks).fit(make(), data)

if __name__ == "__main__":
    for first in (11.0, 1.0):  # the third batch is an unlucky one; the loss of the fourth is infinite
        try:
            fit(first)
        except Exception:
            traceback.print_exc()
    fit(1.0, Terminated())
"""
FRAME = re.compile(r'^  File "(.*)", line (\d+), in (\S+)', re.MULTILINE)


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Python, in a folder that has the program."""
    command, env = [sys.executable, *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True)


def within(fit: str) -> list[tuple[str, str, str]]:
    """File, line and function of each frame of a traceback below the fit: the user's, and those between."""
    frames = FRAME.findall(fit)
    began = [i for i, (file, _, function) in enumerate(frames) if function == "fit" and file.endswith("trainer.py")]
    return frames[began[0] + 1 :]


@pytest.mark.slow
def test_one_command_makes_each_happen_again_in_another_process(tmp_path: Path) -> None:
    """An exception, a value that is not finite, and a step to which SIGTERM came: the same traceback, the same bits."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "net.py").write_text(NET)
    (tmp_path / "program.py").write_text(PROGRAM)
    first = started(tmp_path, "program.py")
    _, told = first.communicate()
    assert first.returncode == 143, told
    tracebacks = dict(
        zip(("ValueError", "NonFiniteError"), told.split("Traceback (most recent call last):")[1:], strict=True)
    )
    made = {path.name.rpartition("-")[2]: path for path in (tmp_path / "runs" / "x").glob("*/capsules/*")}
    assert {name: path.name[:13] for name, path in made.items()} == {
        "ValueError": "step-00000003", "NonFiniteError": "step-00000004", "SIGTERM": "step-00000002"
    }  # fmt: skip
    command = ("-m", "loopwright", "replay")
    again = {name: started(tmp_path, *command, str(path), "--task", "program:make") for name, path in made.items()}
    printed = {name: process.communicate() for name, process in again.items()}
    for name, (out, err) in printed.items():
        assert again[name].returncode == 0, err
        assert err == ""
        result, _, trace = out.partition("\n\ntraceback of the error that was reproduced:\n\n")
        lines = result.splitlines()
        assert lines[0] == f"capsule  {made[name]}"
        if name == "SIGTERM":
            assert lines[1] == "error    SIGTERM: it came to this step, which had no error"
            assert lines[2].startswith("values   the same bits: then {")
            assert (lines[-1], trace) == ("the step was reproduced", "")
            continue
        assert within(trace) == within(tracebacks[name]) != []
        said = re.compile(rf"^(?:loopwright\.errors\.)?{name}: .*", re.MULTILINE)
        assert said.findall(trace) == said.findall(tracebacks[name]) != []
        assert lines[1].removeprefix("error    ") == said.findall(trace)[0].removeprefix("loopwright.errors.")
        measured = "none were measured before the error" if name == "ValueError" else "the same bits: then {"
        assert lines[2].startswith(f"values   {measured}")
        assert lines[-1] == "the error was reproduced"
    users = [frame for frame in within(tracebacks["ValueError"]) if frame[0].startswith(str(tmp_path))]
    line = NET.splitlines().index("        return self.checked(self.net(x), x)") + 1
    net = str(tmp_path / "parts" / "net.py")
    assert users == [(net, str(line), "forward"), (net, str(line + 4), "checked")]


def test_a_task_that_cannot_be_made_is_named_after_a_path_that_is_none(folder: Path) -> None:
    _, (path,) = fit(task_of(), folder)
    for spec, says in (
        ("no_such_program:make", "--task 'no_such_program:make' cannot be imported from "),
        (
            "json:loads",
            "--task 'json:loads': missing a required argument: 's'; expected a function that is called with",
        ),
        ("json", "--task 'json' does not say where the task is made; write --task module:function"),
    ):
        with pytest.raises(lw.SettingError, match=re.escape(says)):
            replay_command(path, spec)
    with pytest.raises(lw.CheckpointError, match=r"^x does not exist"):
        replay_command("x", "no_such_program:make")
