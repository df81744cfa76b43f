"""Functions in several real processes: results, errors, deaths, signals, and that nothing stays."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

import loopwright as lw
from loopwright.checkpoint import list_checkpoints, read
from loopwright.parallel import World, find_world, join
from loopwright.parallel.watch import Watch
from tiny import line, pairs, sgd_task, trainer


def met() -> World:
    world = find_world()
    join(world, "cpu", timeout_s=60)
    return world


def summed(start: float) -> tuple[int, torch.Tensor]:
    world = met()
    value = torch.tensor([world.rank + start])
    dist.all_reduce(value)
    return world.rank, value


@pytest.mark.parametrize("nproc", [1, 2, 3])
def test_results_come_back_in_the_order_of_ranks(nproc: int) -> None:
    results = lw.launch(summed, nproc, 1.0)
    assert [rank for rank, _ in results] == list(range(nproc))
    assert all(torch.equal(value, torch.tensor([sum(range(1, nproc + 1)) * 1.0])) for _, value in results)
    assert mp.active_children() == []


def test_functions_that_no_file_names_can_be_run_and_change_nothing_here() -> None:
    before, seen = dict(os.environ), list[int]()

    def local(add: int) -> Any:
        seen.append(1)
        return find_world().rank + add, torch.get_num_threads(), os.environ["WORLD_SIZE"]

    assert lw.launch(local, 2, 10) == [(10, 1, "2"), (11, 1, "2")]
    assert lw.launch(lambda: find_world(), 1)[0].local_world_size == 1
    assert (os.environ, seen) == (before, [])


def test_a_large_result_comes_whole() -> None:
    (one,) = lw.launch(lambda: torch.arange(10**6), 1)
    assert torch.equal(one, torch.arange(10**6))


def test_a_fork_after_work_on_many_threads_does_not_wait_for_threads_that_it_has_not() -> None:
    torch.set_num_threads(2)
    try:
        big = torch.rand(500, 500)
        (big @ big).sigmoid().sum()

        def work() -> float:
            x = torch.ones(500, 500, requires_grad=True)
            (x @ x).sigmoid().sum().backward()
            return float(summed(1.0)[1])

        assert lw.launch(work, 2) == [3.0, 3.0]
    finally:
        torch.set_num_threads(1)


def test_the_error_of_a_rank_is_raised_with_its_name_and_its_traceback() -> None:
    def train() -> None:
        world = met()
        if world.rank == 1:
            raise ZeroDivisionError("no more")
        dist.all_reduce(torch.ones(1))  # fails as well, a moment later: the other one is gone

    with pytest.raises(ZeroDivisionError, match=r"^no more") as caught:
        lw.launch(train, 3)
    (note,) = caught.value.__notes__
    assert note.startswith("[loopwright] raised in rank 1 of 3:\nTraceback (most recent call last):")
    assert note.endswith("ZeroDivisionError: no more")
    assert 'raise ZeroDivisionError("no more")' in note
    assert mp.active_children() == []


def late_cause(seconds: float) -> None:
    rank = met().rank
    try:
        with Watch(rank, 2, lambda: 7, timeout=6):
            if rank == 1:
                raise ValueError("mine")
    finally:
        time.sleep(seconds * rank)  # closes a logger


@pytest.mark.slow
def test_the_cause_is_raised_though_it_needs_longer_to_leave_than_those_that_heard_of_it() -> None:
    with pytest.raises(ValueError, match=r"^mine") as caught:
        lw.launch(late_cause, 2, 2.5)
    assert caught.value.__notes__[-1].startswith("[loopwright] raised in rank 1 of 2:")


def test_a_cause_that_never_leaves_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopwright.parallel.launch._CAUSE_S", 0.3)
    with pytest.raises(lw.LoopwrightError, match=r"^rank 1 failed at step 7, .*ValueError: mine") as caught:
        lw.launch(late_cause, 2, 600.0)
    assert caught.value.__notes__[-1].startswith("[loopwright] raised in rank 0 of 2:")
    assert mp.active_children() == []


def test_an_error_that_cannot_be_sent_keeps_its_name_and_text() -> None:
    class OddError(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(f"{a} and {b}")

    def train() -> None:
        raise OddError(1, 2)

    with pytest.raises(lw.LoopwrightError, match=r"^OddError: 1 and 2\n") as caught:
        lw.launch(train, 1)
    assert "raise OddError(1, 2)" in caught.value.__notes__[0]


def test_a_rank_that_dies_is_named_and_the_others_end() -> None:
    def train() -> None:
        if met().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))

    with pytest.raises(lw.LoopwrightError) as caught:
        lw.launch(train, 2)
    assert str(caught.value) == (
        "rank 1 of 2 was killed by SIGKILL before its function had returned. The system kills what takes too much "
        "memory"
    )
    with pytest.raises(lw.LoopwrightError, match=r"^rank 0 of 1 ended with exit status 7 before its function had"):
        lw.launch(lambda: os._exit(7), 1)
    assert mp.active_children() == []


def logs_alone() -> None:
    class Log(lw.Callback):
        def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
            if run.comm.rank == 0:
                run.comm.sum(float(result.values["loss"]))

    x, net = torch.ones(8, 2), torch.nn.Linear(2, 1)
    task = lw.Supervised(net, torch.nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.1))
    strategy = lw.DDP(timeout=6)
    lw.Trainer(epochs=2, folder=None, progress=False, callbacks=[Log()], strategy=strategy).fit(task, (x, x[:, :1]))


@pytest.mark.slow
@pytest.mark.capability("B-25")
def test_ranks_that_wait_for_one_another_raise_where_launch_was_called_what_each_waits_for() -> None:
    told = r"^collectives do not match at step 1: call \d+ of Loopwright's group: rank 0: all_reduce\(double\[1\]\)"
    with pytest.raises(lw.LoopwrightError, match=told) as caught:
        lw.launch(logs_alone, 2)
    assert "test_launch.py" in str(caught.value)
    assert "in on_step_end" in str(caught.value)
    assert "rank 0 stood in, when it last reported (most recent call last):" in caught.value.__notes__[0]


def test_a_rank_that_hears_no_signal_is_killed_when_another_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopwright.parallel.launch._GRACE_S", 0.2)

    def train() -> None:
        if find_world().rank == 1:
            raise ValueError("over")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)

    with pytest.raises(ValueError, match=r"^over"):
        lw.launch(train, 2)
    assert mp.active_children() == []


def test_what_leaves_with_a_status_leaves_here_too() -> None:
    with pytest.raises(SystemExit) as caught:
        lw.launch(lambda: sys.exit(143), 1)
    assert caught.value.code == 143


def test_a_result_that_cannot_be_sent_says_what_to_return() -> None:
    with pytest.raises(lw.SettingError) as caught:
        lw.launch(threading.Lock, 1)
    assert str(caught.value) == (
        "rank 0 returned a lock, which cannot be sent to the process that called lw.launch (cannot pickle "
        "'_thread.lock' object). Return plain data and tensors, such as run.metrics"
    )


@pytest.mark.parametrize(
    ("fn", "nproc", "says"),
    [
        (summed, 0, "nproc=0: expected the number of processes, from 1"),
        (summed, True, "nproc=True: expected the number of processes, from 1"),
        (None, 2, "launch runs a function; got None. Write lw.launch(train, 2), without calling train"),
    ],
)
def test_what_cannot_be_launched_is_refused(fn: Any, nproc: Any, says: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        lw.launch(fn, nproc)
    assert str(caught.value) == says


def test_a_launch_inside_a_rank_or_with_an_open_group_is_refused() -> None:
    def again() -> None:
        lw.launch(print, 2)

    with pytest.raises(lw.SettingError, match=r"torchrun or lw\.launch has started already; call the function itself"):
        lw.launch(again, 2)

    def in_group() -> None:
        met()
        lw.launch(print, 2)

    with pytest.raises(lw.SettingError, match=r"Leave it first: torch\.distributed\.destroy_process_group"):
        lw.launch(in_group, 1)


def test_where_there_is_no_fork_a_function_must_be_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(lw.SettingError) as caught:
        lw.launch(lambda: 1, 1)
    assert str(caught.value) == (
        "this system cannot fork safely, so that test_where_there_is_no_fork_a_function_must_be_in_a_file.<locals>."
        "<lambda> must be sent to new processes, which works for functions of a file only. Write it to a file and "
        "import it, or call lw.launch before anything uses CUDA (restart the kernel first)"
    )


def test_after_cuda_was_looked_for_no_process_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
    assert lw.launch(lambda: find_world().rank, 2) == [0, 1]  # a build for CUDA that has not looked yet
    monkeypatch.setattr("torch.cuda._is_in_bad_fork", lambda: True)
    with pytest.raises(lw.SettingError, match=r"^CUDA was looked for or used in this process, so that .*<lambda> must"):
        lw.launch(lambda: 1, 2)


SCRIPT = """
import os, sys, time, torch
from torch import distributed as dist
import loopwright as lw
from loopwright.parallel import find_world, join

def summed(start):
    world = find_world()
    join(world, "cpu")
    value = torch.tensor([world.rank + start])
    dist.all_reduce(value)
    return value

def waits():
    os.write(1, f"{os.getpid()}\\n".encode())  # at once: two ranks share the pipe
    time.sleep(600)

if __name__ == "__main__":
"""


def script(folder: Path, body: str) -> list[str]:
    path = folder / "program.py"
    path.write_text(SCRIPT + textwrap.indent(textwrap.dedent(body), "    "))
    return [sys.executable, "-W", "error", str(path)]


@pytest.mark.slow
@pytest.mark.nightly
def test_spawned_processes_do_the_same(tmp_path: Path) -> None:
    body = """
    import multiprocessing
    multiprocessing.get_all_start_methods = lambda: ["spawn"]
    assert [float(value) for value in lw.launch(summed, 2, 1.0)] == [3.0, 3.0]
    """
    done = subprocess.run(script(tmp_path, body), capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_a_cell_of_a_notebook_launches_what_it_defines(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    defines, launches = (SCRIPT.partition("def waits")[0], "lw.launch(summed, 2, 1.0)")
    cells = [nbformat.v4.new_code_cell(source) for source in (defines, launches)]
    done = nbclient.NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=120).execute(cwd=str(tmp_path))
    assert done.cells[1].outputs[0].data["text/plain"] == "[tensor([3.]), tensor([3.])]"
    assert len(done.cells[1].outputs) == 1  # no warning


def ended(pid: int) -> bool:
    """True once a process is gone, or is a zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.nightly)])
def test_a_signal_to_the_one_that_launched_them_saves_the_run(number: signal.Signals, tmp_path: Path) -> None:
    body = """
    def train():
        net = torch.nn.Linear(2, 1)
        task = lw.Supervised(net, torch.nn.MSELoss(), torch.optim.SGD(net.parameters(), 0.01))
        trainer = lw.Trainer(steps=10**6, folder="runs", name="n", progress=False)
        trainer.on(lw.Event.STEP_END(once=9))(lambda run: run.comm.rank or print("began", flush=True))
        trainer.fit(task, lw.Loader((torch.randn(64, 2), torch.randn(64, 1)), 8))

    lw.launch(train, 2)
    """
    command = script(tmp_path, body)
    program = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert program.stdout is not None
    try:
        assert program.stdout.readline() == "began\n"
        program.send_signal(number)
        _, errors = program.communicate(timeout=60)
    finally:
        program.kill()
    assert program.returncode == 128 + number, errors
    (record,) = tmp_path.glob("runs/n/*/run.json")
    found = json.loads(record.read_text())
    assert found["status"] == "interrupted"
    last = list_checkpoints(record.parent / "checkpoints")[-1]
    assert read(last).info["step"] == found["progress"]["step"] >= 9


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel is not asked to do it")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_one_that_launched_it(number: signal.Signals, tmp_path: Path) -> None:
    program = subprocess.Popen(
        script(tmp_path, "lw.launch(waits, 2)"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    ranks = [int(program.stdout.readline()) for _ in range(2)]
    program.send_signal(number)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == (143 if number == signal.SIGTERM else -number)
    assert errors.rstrip().endswith("KeyboardInterrupt") == (number == signal.SIGINT)
    until = time.monotonic() + 60
    while not all(ended(pid) for pid in ranks):
        assert time.monotonic() < until, "a rank is left"
        time.sleep(0.01)


def test_a_signal_while_a_rank_is_started_ends_that_rank_too(tmp_path: Path) -> None:
    body = """
    import signal
    os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
    lw.launch(waits, 1)
    """
    done = subprocess.run(script(tmp_path, body), capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (143, "")


@pytest.mark.slow
@pytest.mark.capability("B-25")
def test_a_collective_that_one_rank_calls_alone_ends_all_also_where_the_other_is_in_a_backward(tmp_path: Path) -> None:
    """Of a net without buffers, whose forward waits for nobody."""
    body = """
    class Alone(lw.Callback):
        def on_step_end(self, run, result):
            if run.comm.rank == 1 and run.progress.step == 5:
                dist.barrier()

    def train():
        net = torch.nn.Linear(2, 1)
        task = lw.Supervised(net, torch.nn.MSELoss(), torch.optim.SGD(net.parameters(), 0.01))
        trainer = lw.Trainer(1, folder=None, progress=False, callbacks=[Alone()], strategy=lw.DDP(timeout=10))
        trainer.fit(task, lw.Loader((torch.randn(64, 2), torch.randn(64, 1)), 4))

    lw.launch(train, 2)
    """
    done = subprocess.run(script(tmp_path, body), capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 1
    assert "collectives do not match at step" in done.stderr
    assert "program.py" in done.stderr
    assert "in on_step_end" in done.stderr


def test_a_rank_ends_nothing_that_its_parent_has_left(tmp_path: Path) -> None:
    """Garbage of the parent, which may hold threads of C++, is not collected in a fork, however soon that would."""
    program = f"""
        import gc, os, pathlib
        import loopwright as lw

        class Left:
            def __del__(self):
                (pathlib.Path({str(tmp_path)!r}) / str(os.getpid())).touch()

        def soon():
            gc.set_threshold(1)
            [[] for _ in range(1000)]

        os.register_at_fork(after_in_child=soon)
        gc.set_threshold(10**6)  # not before the fork
        left = Left()
        left.self = left
        del left
        assert lw.launch(gc.isenabled, 2) == [True, True]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)
    assert len(list(tmp_path.iterdir())) <= 1  # the parent's, at its end


def test_a_plan_that_fails_in_a_rank_keeps_its_problems() -> None:
    def fit() -> None:
        trainer = lw.Trainer(epochs=1, callbacks=[lw.EarlyStopping("train/losses")], folder=None, progress=False)
        trainer.fit(sgd_task(line()), pairs([1, 1]))

    with pytest.raises(lw.PlanError, match="this run cannot start:\n  - EarlyStopping monitors") as caught:
        lw.launch(fit, 2)
    (problem,) = caught.value.problems
    assert "test_launch.py:" in caught.value.places[problem]


class Odd(Exception):  # noqa: N818
    """Pickle calls it with its message."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(" and ".join(names))


def test_an_error_that_pickle_would_change_keeps_its_words() -> None:
    def fail() -> None:
        raise Odd(["this", "that"])

    with pytest.raises(lw.LoopwrightError, match=r"^Odd: this and that\n"):
        lw.launch(fail, 1)


def test_a_rank_that_is_stopped_is_told_as_that_and_not_as_killed() -> None:
    def fit() -> None:
        slow = trainer(steps=1000, strategy=lw.DDP(timeout=2.0))

        @slow.on(lw.Event.STEP_END(every=3))
        def stop(run: lw.Run) -> None:
            if run.comm.rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)

        slow.fit(sgd_task(line()), pairs([1, 1]))

    with pytest.raises(lw.LoopwrightError, match=r"rank 1 has not been heard of .*: its process was stopped by"):
        lw.launch(fit, 2)
