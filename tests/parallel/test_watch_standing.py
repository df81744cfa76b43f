"""Where threads and processes are seen to stand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from loopwright.parallel.standing import Process, Stand, Still, place_of, stand, state_of, this_process

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def elsewhere(work: Callable[[], object], look: Callable[[threading.Thread], Stand]) -> Stand:
    """What ``look`` sees of a thread that is inside of ``work``."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        return look(thread)
    finally:
        thread.join()


def until(thread: threading.Thread, waits: str) -> Stand:
    for _ in range(2000):
        assert thread.ident is not None
        found = stand(thread.ident)
        if found.waits == waits and "test_watch_standing" in found.place:
            return found
        time.sleep(0.001)
    raise AssertionError(found)


def test_the_place_is_the_line_of_the_user_even_inside_of_python_and_torch() -> None:
    def work() -> None:
        time.sleep(0.05)

    line = work.__code__.co_firstlineno + 1
    found = elsewhere(work, lambda thread: until(thread, ""))
    assert found.place.endswith(f"test_watch_standing.py:{line} in work")


def test_a_call_that_waits_in_backward_is_told_and_one_that_reads_data_is_not() -> None:
    go = threading.Event()

    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            go.wait()  # code of the user's own: it may do anything
            return grad

    def work() -> None:
        Waits.apply(torch.ones(1, requires_grad=True)).backward()  # type: ignore[no-untyped-call]

    def look(thread: threading.Thread) -> Stand:
        try:
            return until(thread, "")
        finally:
            go.set()

    assert elsewhere(work, look).waits == ""
    big = torch.ones(1_500_000, requires_grad=True)

    def long() -> None:
        y = big
        for _ in range(20):
            y = y.exp().log()
        y.sum().backward()

    found = elsewhere(long, lambda thread: until(thread, "backward"))
    assert " in long" in found.place


def test_the_path_tells_two_callers_of_one_line_apart() -> None:
    def inner() -> None:
        time.sleep(0.05)

    def one() -> None:
        inner()

    def other() -> None:
        inner()

    def look(thread: threading.Thread) -> Stand:
        while True:
            assert thread.ident is not None
            found = stand(thread.ident)
            if " in inner" in found.place:
                return found

    paths = [elsewhere(call, look).path for call in (one, one, other)]
    assert paths[0] == paths[1]
    assert paths[0] != paths[2]


def test_an_error_is_placed_where_the_user_code_raised_it() -> None:
    def wrong() -> None:
        torch.ones(2) @ torch.ones(3)

    with pytest.raises(RuntimeError) as caught:
        wrong()
    assert place_of(caught.value).endswith(f"test_watch_standing.py:{wrong.__code__.co_firstlineno + 1} in wrong")


@linux
def test_a_thread_is_still_while_it_sleeps_and_not_while_it_computes() -> None:
    ready, clocks = threading.Event(), list[Still]()
    done = threading.Event()

    def sleeps() -> None:
        clocks.append(Still())
        ready.set()
        done.wait()

    thread = threading.Thread(target=sleeps)
    thread.start()
    ready.wait()
    for _ in range(200):  # until it has come to rest
        if clocks[0].look(1.0) >= 5:
            break
        time.sleep(0.005)
    assert clocks[0].seconds >= 5
    done.set()
    thread.join()
    mine = Still()
    mine.look(1.0)
    sum(range(1000))
    assert mine.look(1.0) == 0.0


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "100"])
    yield process
    process.kill()
    process.wait()


@linux
def test_a_process_is_seen_to_run_to_be_stopped_and_to_be_gone(sleeper: subprocess.Popen[bytes]) -> None:
    from loopwright.parallel.standing import _stat

    here = Process(this_process().machine, "here", sleeper.pid, _stat(sleeper.pid)[1])
    assert state_of(here) == "runs"
    assert state_of(here._replace(began="1")) == "gone"  # the number belongs to another process now
    assert state_of(here._replace(machine="another")) == "unknown"
    assert state_of(here._replace(machine="")) == "unknown"
    os.kill(sleeper.pid, signal.SIGSTOP)
    for _ in range(500):
        if state_of(here) == "stopped":
            break
        time.sleep(0.01)
    assert state_of(here) == "stopped"
    sleeper.kill()
    for _ in range(500):
        if state_of(here) == "gone":
            break
        time.sleep(0.01)
    assert state_of(here) == "gone"  # its status is not read yet
    sleeper.wait()
    assert state_of(here) == "gone"


@linux
def test_the_process_itself_runs() -> None:
    assert state_of(this_process()) == "runs"
