"""A step that fails can be made to fail again, from what its capsule holds, with the same bits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import loopwright as lw
from loopwright.checkpoint import read
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


@pytest.mark.parametrize(("first", "same", "limits"), [(3, True, 0), (20, True, 1), (18, False, 1)])
def test_who_begins_to_draw_late_is_named(first: int, same: bool, limits: int, folder: Path) -> None:
    """The random state is read at few steps as long as nobody draws; the last case is the one that this costs."""

    def draw(run: lw.Run, batch: Any) -> Any:
        return [batch[0] * torch.rand(()), batch[1]] if run.progress.batch >= first else batch

    def fail(run: lw.Run, loss: Tensor, *args: Any) -> None:
        if run.progress.batch == 20:
            raise ValueError(f"a loss of {loss.item()!r}")

    def plain() -> lw.Supervised:
        return sgd_task(classifier(), lr=0.1, loss=nn.CrossEntropyLoss())

    hooks = acts(map_batch=draw, on_backward_end=fail)
    _, (path,) = fit(plain(), folder, hooks, data=loader(60, batch_size=2, shuffle=True))
    found = lw.replay(path, plain(), callbacks=[hooks])
    assert found.same_error == same
    assert sum("was read up to 15 steps before" in limit for limit in found.limits) == limits


def test_a_capsule_costs_one_hook_a_step_where_windows_are_single_batches(folder: Path) -> None:
    fired: list[tuple[int, int, int]] = []
    watch = acts(
        on_epoch_start=lambda run: fired.append(
            tuple(len(getattr(run.hooks, name)) for name in ("on_step_start", "on_batch_start", "on_step_end"))
        )
    )
    for accumulate in (1, 2):
        fit(task_of("none"), folder, watch, accumulate=accumulate)
    assert fired == [(1, 0, 0), (1, 1, 1)]


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

    path, all_of_it = kept(10**6)
    assert all_of_it.info["limits"] == []
    path, nothing = kept(10)
    assert nothing.state["window"] is None
    with pytest.raises(lw.CheckpointError, match="cannot be replayed, it has no batch: the optimizer states"):
        lw.replay(path, task_of("forward"))
    sizes = [int(re.findall(r"([\d,]+) bytes", text)[0].replace(",", "")) for text in nothing.info["limits"]]
    path, some = kept(sum(sizes) - 1)
    assert some.state["optimizers"] is None
    assert some.files["model"]
    assert re.fullmatch(
        r"the optimizer states \([\d,]+ bytes\) were left out: the capsule is bounded by \d+", *some.info["limits"]
    )
    found = lw.replay(path, task_of("forward"))
    assert found.same_error  # they do not enter the forward
    assert found.limits == some.info["limits"]
    path, little = kept(sizes[-1])
    assert little.files == {}
    assert len(little.state["window"]) == 1


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


def test_a_run_in_the_place_of_its_capsule_tells_which_there_are(folder: Path) -> None:
    _, (path,) = fit(task_of(), folder)
    run = path.parent.parent
    with pytest.raises(lw.CheckpointError) as error:
        lw.replay(run, task_of())
    assert str(error.value) == (
        f"{run} is a run; give one of its crash capsules, the newest first:\n  lw.replay({str(path)!r}, task)"
    )
    path.rename(folder / "elsewhere")
    with pytest.raises(lw.CheckpointError, match="is a run, and it has no crash capsule: none of its steps has failed"):
        lw.replay(run, task_of())


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


PROGRAM = """
import sys, torch, loopwright as lw
from torch import nn

def make():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    return lw.Supervised(net, lambda preds, target: (preds / (target - 3)).mean(), optimizer)

if __name__ == "__main__":
    data = [(torch.ones(4, 2), torch.full((4, 1), float(i))) for i in range(5)]
    lw.Trainer(epochs=1, folder="runs", name="x", progress=False).fit(make(), data)
"""


def test_one_command_makes_it_happen_again_in_another_process(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    first = python("program.py")
    assert first.returncode == 1
    (path,) = (tmp_path / "runs" / "x").glob("*/capsules/*")
    command = ("-m", "loopwright", "replay", str(path), "--task")
    again = python(*command, "program:make")
    assert again.returncode == 0, again.stderr
    assert again.stdout.endswith("the error was reproduced\n")
    assert again.stdout.startswith("values  the same bits")
    assert (again.stdout + again.stderr).count("NonFiniteError: ") == 1  # it is said once
    line_of = re.compile(r"loopwright\.errors\.NonFiniteError: .*")
    assert line_of.findall(again.stderr) == line_of.findall(first.stderr)
    missing = python(*command, "program:makes")
    assert missing.returncode != 0
    assert "--task 'program:makes' cannot be imported" in missing.stderr
