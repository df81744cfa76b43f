"""Ctrl-C and SIGTERM: the run is saved and closed at the next boundary, and the process ends as it should."""

from __future__ import annotations

import json
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

import loopwright as lw
from tiny import acts, line, pairs, sgd_task, trainer

DATA = pairs([1.0], [2.0], [3.0])

SCRIPT = textwrap.dedent("""\
    import os, signal, sys, torch
    import loopwright as lw

    net = torch.nn.Linear(1, 1)
    task = lw.Supervised(net, torch.nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.1))
    trainer = lw.Trainer(epochs=10**9, folder=sys.argv[1], name="long", progress=False)

    @trainer.on(lw.Event.STEP_END(once=25))
    def ready(run):
        print("ready", flush=True)

    @trainer.on(lw.Event.STEP_END(after=25))
    def slowly(run):
        pass  # the run only has to last until the signal comes

    try:
        trainer.fit(task, [(torch.ones(2, 1), torch.zeros(2, 1))] * 10)
    finally:
        back = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, signal.getsignal(signal.SIGINT).__name__
        print("left", *back, flush=True)
""")


def interrupted(number: int, folder: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any], Path]:
    """The outcome of a script that was sent a signal in the middle of a fit, its run.json and its folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    (file,) = folder.glob("long/*/run.json")
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    return done, json.loads(file.read_text(encoding="utf-8")), file.parent


def test_ctrl_c_saves_closes_and_raises_keyboard_interrupt(folder: Path) -> None:
    done, record, path = interrupted(signal.SIGINT, folder)
    step = record["progress"]["step"]
    assert record["status"] == "interrupted"
    assert step >= 25
    assert [p.name for p in (path / "checkpoints").glob("step-*")] == [f"step-{step:08d}"]
    assert done.returncode == -signal.SIGINT  # Python ends itself by the signal: 130 in a shell
    assert done.stderr.splitlines()[-1] == (
        f"KeyboardInterrupt: stopped after step {step}; its folder is {path}. To go on, start it again with "
        "fit(..., resume='auto')"
    )
    assert done.stdout == "left True default_int_handler\n"
    assert "error" not in record


def test_sigterm_saves_closes_and_leaves_with_143(folder: Path) -> None:
    done, record, path = interrupted(signal.SIGTERM, folder)
    assert record["status"] == "interrupted"
    assert [p.name for p in (path / "checkpoints").glob("step-*")] == [f"step-{record['progress']['step']:08d}"]
    assert done.returncode == 143
    assert done.stderr == ""
    assert done.stdout == "left True default_int_handler\n"


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_the_step_in_which_the_signal_comes_is_completed() -> None:
    net, ended = line(), []
    user = trainer(epochs=2, callbacks=[acts(on_fit_end=lambda run: ended.append(run.stop_reason))])
    user.on(lw.Event.BACKWARD_END(once=2))(lambda run: send(signal.SIGINT))
    task = sgd_task(net)
    with pytest.raises(KeyboardInterrupt) as caught:
        user.fit(task, DATA)
    assert str(caught.value) == "stopped after step 2"
    assert net.weight.item() == -3.0
    assert ended == ["SIGINT"]
    assert task._run.status == "interrupted"
    run = trainer(epochs=2).fit(task, DATA)  # it goes on where it stopped
    assert net.weight.item() == -12.0
    assert run.progress.step == 6


def test_a_second_ctrl_c_does_not_wait_for_the_boundary(folder: Path) -> None:
    waited: list[None] = []

    def impatient(run: lw.Run) -> None:
        send(signal.SIGINT)
        send(signal.SIGINT)  # passed on by a launcher: the same press
        time.sleep(0.4)
        send(signal.SIGINT)
        waited.append(time.sleep(2))  # it does not come to this

    user = trainer(epochs=1, folder=folder, name="x", loggers=[])
    user.on(lw.Event.BATCH_START(once=2))(impatient)
    with pytest.raises(KeyboardInterrupt):
        user.fit(sgd_task(line()), DATA)
    assert not waited
    (file,) = folder.glob("x/*/run.json")
    assert json.loads(file.read_text())["status"] == "interrupted"
    assert not list(folder.glob("x/*/checkpoints/step-*"))


def test_a_keyboard_interrupt_of_the_users_own_is_interrupted_too(folder: Path) -> None:
    def leave(run: lw.Run) -> None:
        raise KeyboardInterrupt

    user = trainer(epochs=1, folder=folder, name="x", loggers=[])
    user.on(lw.Event.STEP_END(once=2))(leave)
    with pytest.raises(KeyboardInterrupt) as caught:
        user.fit(sgd_task(line()), DATA)
    assert caught.value.__notes__ == [
        f"[loopwright] in {leave.__qualname__}, at STEP_END(once=2), after epoch 0, batch 2 of the open epoch, step 2; "
        "batch: (float32[1, 1], float32[1, 1])"
    ]
    (file,) = folder.glob("x/*/run.json")
    assert json.loads(file.read_text())["status"] == "interrupted"


def test_sigterm_raises_system_exit_in_trainer_run_as_well() -> None:
    def step(run: lw.Run, batch: Any) -> None:
        send(signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        trainer(epochs=5).run(step, [1, 2, 3])
    assert caught.value.code == 143


def test_handlers_are_in_place_during_the_fit_only_and_the_users_own_come_back() -> None:
    def mine(number: int, frame: Any) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    seen: list[Any] = []
    try:
        user = trainer(epochs=1)
        user.on(lw.Event.STEP_END(once=1))(lambda run: seen.append(signal.getsignal(signal.SIGTERM)))
        user.fit(sgd_task(line()), DATA)
        assert seen[0] is not mine
        assert signal.getsignal(signal.SIGTERM) is mine
        with pytest.raises(ZeroDivisionError):
            user.fit(sgd_task(line(), loss=lambda preds, target: preds / (1 // 0)), DATA)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_fit_within_a_fit_gives_the_signals_back_to_the_outer_one() -> None:
    stopped: list[str | None] = []
    outer, inner = trainer(epochs=2), trainer(epochs=1)

    @outer.on(lw.Event.STEP_END(once=2))
    def nested(run: lw.Run) -> None:
        stopped.append(inner.fit(sgd_task(line()), DATA).stop_reason)
        send(signal.SIGINT)

    task = sgd_task(line())
    with pytest.raises(KeyboardInterrupt):
        outer.fit(task, DATA)
    assert stopped == [None]
    assert task._run.progress.step == 2


def test_a_fit_in_a_thread_leaves_the_signals_alone() -> None:
    seen: list[Any] = []
    user = trainer(epochs=1)
    user.on(lw.Event.STEP_END(once=1))(lambda run: seen.append(signal.getsignal(signal.SIGINT)))

    def fit() -> None:
        seen.append(user.fit(sgd_task(line()), DATA).status)

    thread = threading.Thread(target=fit)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT), "done"]


def test_fits_in_several_threads_at_once_do_not_meet() -> None:
    nets = [line() for _ in range(4)]
    users = [trainer(epochs=20) for _ in nets]
    work = [
        threading.Thread(target=user.fit, args=(sgd_task(net, lr=0.5), DATA))
        for user, net in zip(users, nets, strict=True)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert [net.weight.item() for net in nets] == [-60.0] * 4
