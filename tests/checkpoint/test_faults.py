"""The disk fails while a checkpoint is written: it is said, what was there is there, and nothing is left over."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from loopwright.checkpoint import list_checkpoints, read, sweep, write
from loopwright.errors import CheckpointError, LoopwrightWarning
from tiny import acts, bits, loader, same, trainer

CODES = ["ENOSPC", "EACCES", "EROFS", "EIO", "EDQUOT"]


class Faulty:
    """The operating system, whose calls of one kind fail; each kind stands in front of what it would do."""

    def __init__(self, patched: pytest.MonkeyPatch, call: str, code: str, *, after: int = 0) -> None:
        self.error, self.left, self.seen = getattr(errno, code), after, 0
        self._lock = threading.Lock()
        if call in ("open", "write"):
            genuine = io.open

            def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
                if "checkpoints" not in str(file) or "r" in mode:
                    return genuine(file, mode, *args, **kwargs)
                if call == "open":
                    self.fail()
                out = genuine(file, mode, *args, **kwargs)
                return out if call == "open" else _Out(out, self)

            patched.setattr(io, "open", opened)
        else:
            original = getattr(os, call)

            def failing(*args: Any, **kwargs: Any) -> Any:
                self.fail()
                return original(*args, **kwargs)

            patched.setattr(os, call, failing)

    def fail(self) -> None:
        with self._lock:
            self.seen += 1
            if self.seen == self.left + 1:
                raise OSError(self.error, os.strerror(self.error))


class _Out:
    def __init__(self, file: Any, faulty: Faulty) -> None:
        self._file, self._faulty = file, faulty
        self.flush, self.fileno, self.close = file.flush, file.fileno, file.close

    def write(self, data: Any) -> Any:
        self._faulty.fail()
        return self._file.write(data)

    def __enter__(self) -> _Out:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def refusal(work: Callable[[], object]) -> str | None:
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return None


def make(step: int, *, name: str | None = None) -> Any:
    files = {"model": {"w": torch.full((30, 30), float(step))}}
    state = {"optimizers": {"m": torch.zeros(3)}, "t": torch.ones(2)}
    return write(Path("checkpoints") / (name or f"step-{step:08d}"), files, state, {"step": step})


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("call", ["open", "write", "fsync", "mkdir", "rename"])
@pytest.mark.parametrize("name", [None, "step-00000001"], ids=["new", "replacing"])
def test_a_failing_call_is_said_and_changes_nothing(call: str, code: str, name: str | None) -> None:
    old = make(1)
    for after in range(99):  # each time that the call is made
        with pytest.MonkeyPatch.context() as patched:
            faulty = Faulty(patched, call, code, after=after)
            said = refusal(lambda: make(2, name=name))
            if said is None:
                assert faulty.seen <= after
                break
            assert os.strerror(getattr(errno, code)) in said
            assert said.endswith("Older ones are untouched")
        assert list(Path("checkpoints").iterdir()) == [old]
        assert read(old).info == {"step": 1}
    assert after > 0


def fit(saver: lw.Checkpoint, hook: lw.Callback) -> lw.Run:
    """Four epochs of 3 steps."""
    net = nn.Linear(5, 3)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1))
    made = trainer(epochs=4, folder="runs", checkpoint=saver, loggers=[], callbacks=[hook])
    return made.fit(task, loader(12, batch_size=4))


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename", "unlink", "rmdir"])
def test_a_run_stops_with_the_error_and_keeps_what_it_had(
    call: str, code: str, background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = lw.Checkpoint("3 steps", keep=1, async_save=background)

    def break_it(run: lw.Run, result: Any) -> None:
        if run.progress.step == 5:
            saver.finish(run)
            Faulty(monkeypatch, call, code)

    with pytest.raises(CheckpointError) as caught:
        saver.finish(fit(saver, acts(on_step_end=break_it)))
    monkeypatch.undo()
    assert os.strerror(getattr(errno, code)) in str(caught.value)
    (folder,) = Path("runs").glob("*/*/checkpoints")
    deleted = call in ("unlink", "rmdir")  # then the new one was written, and the old one could not be removed
    sweep(folder)
    left = list_checkpoints(folder)
    assert left[-1].name == ("step-00000006" if deleted else "step-00000003")
    assert sorted(folder.iterdir()) == sorted([*left, folder / "index.json"])
    assert saver.last == left[-1]
    for path in left:
        read(path)


def test_an_error_in_the_background_is_raised_before_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    saver = lw.Checkpoint("4 steps", async_save=True)
    steps: list[int] = []

    def look(run: lw.Run, result: Any) -> None:
        steps.append(run.progress.step)
        if run.progress.step == 4:
            Faulty(monkeypatch, "fsync", "EIO")
        if run.progress.step == 5:  # by now the write has failed
            assert saver._writing is not None
            assert isinstance(saver._writing[2].exception(), CheckpointError)

    with pytest.raises(CheckpointError, match=r"step-00000004 could not be written: .*Input/output error"):
        fit(saver, acts(on_step_end=look))
    assert steps == [1, 2, 3, 4, 5]


def test_an_error_in_the_background_can_be_a_warning_and_the_end_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    saver = lw.Checkpoint("12 steps", async_save=True, on_error="warn")

    def break_it(run: lw.Run, result: Any) -> None:
        if run.progress.step == 12:
            Faulty(monkeypatch, "rename", "EDQUOT")

    with pytest.warns(LoopwrightWarning, match=r"no checkpoint at step 12: .*could not be written: .*"):
        run = fit(saver, acts(on_step_end=break_it))
    saver.finish(run)
    assert run.status == "done"
    assert saver.last is not None
    assert read(saver.last).info["step"] == 12


def test_a_full_disk_is_noticed_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    old = make(1)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    monkeypatch.setattr(os, "mkdir", None)
    with pytest.raises(CheckpointError) as caught:
        make(2)
    assert str(caught.value) == (
        "the checkpoint checkpoints/step-00000002 was not written: it needs 0.1 MB, and the disk has 0.1 MB free. "
        "Older ones are untouched. Make room, keep fewer (Checkpoint(keep=1)), or write to another disk "
        "(Checkpoint(folder=...))"
    )
    monkeypatch.undo()
    assert list_checkpoints("checkpoints") == [old]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB, where this process may have one."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this process may not mount a disk")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "while writing"])
def test_a_disk_that_is_really_full(small_disk: Path, announced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    big = {"model": {"w": torch.zeros(260_000)}}
    old = write(small_disk / "step-1", {"model": {"w": torch.ones(50_000)}}, {}, {})
    if not announced:
        usage = shutil.disk_usage(small_disk)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    with pytest.raises(CheckpointError, match="it needs 1.1 MB, and the disk has" if announced else "No space left"):
        write(small_disk / "step-2", big, {}, {})
    assert list(small_disk.iterdir()) == [old]
    assert torch.equal(read(old).files["model"]["w"], torch.ones(50_000))


@pytest.mark.parametrize("keep", [1, 3])
def test_async_changes_no_bit_and_leaves_the_same_checkpoints(keep: int) -> None:
    found = []
    for background in (False, True):
        torch.manual_seed(0)
        saver = lw.Checkpoint("1 steps", keep=keep, async_save=background)
        run = fit(saver, acts())
        saver.finish(run)
        assert run.folder is not None
        paths = list_checkpoints(run.folder / "checkpoints")
        state = [(p.name, read(p).files, read(p).state["optimizers"], read(p).state["rng"]["torch"]) for p in paths]
        found.append((bits(run.task), state, saver.last and saver.last.name))
    assert same(found[0], found[1])
    assert len(found[0][1]) == keep


def test_async_hooks_hear_of_what_is_on_disk_in_order() -> None:
    heard: list[int] = []

    def hear(run: lw.Run, path: Path) -> None:
        heard.append(read(path).info["step"])

    saver = lw.Checkpoint("2 steps", keep=9, async_save=True)
    saver.finish(fit(saver, acts(on_checkpoint=hear)))
    assert list(dict.fromkeys(heard)) == [2, 4, 6, 8, 10, 12]  # the last one again at the end, as without async_save


def test_async_writes_the_tensors_of_its_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    go, genuine = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (go.wait(10), genuine(handle))[1])
    kept: list[torch.Tensor] = []

    def look(run: lw.Run, result: Any) -> None:
        kept.append(next(iter(run.models.values())).weight.detach().clone())
        if run.progress.step == 5:
            go.set()

    saver = lw.Checkpoint("3 steps", keep=9, async_save=True)
    run = fit(saver, acts(on_step_end=look))
    saver.finish(run)
    assert run.folder is not None
    for path in list_checkpoints(run.folder / "checkpoints"):
        data = read(path)
        assert torch.equal(data.files["model"]["weight"], kept[data.info["step"] - 1])
