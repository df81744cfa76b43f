"""A SLURM job that is interrupted goes back to the queue, asked of a scontrol that writes down what it was told."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

import loopwright as lw
from tiny import acts, line, pairs, sgd_task, trainer

DATA = pairs([1.0], [2.0], [3.0], [4.0])


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Inside of job 42; ``asked`` tells what scontrol was asked for."""
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    scontrol(tmp_path, monkeypatch)
    return monkeypatch


def scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, then: str = "") -> None:
    program = folder / "bin" / "scontrol"
    program.parent.mkdir(exist_ok=True)
    program.write_text(
        f'#!/bin/sh\nls "{folder}"/runs/x/*/checkpoints >> "{folder}/saved"\n{then}\necho "$@" >> "{folder}/asked"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


def asked(folder: Path) -> list[str]:
    path = folder / "asked"
    return path.read_text().splitlines() if path.exists() else []


def gets(number: signal.Signals) -> lw.Callback:
    def hook(run: lw.Run, result: Any) -> None:
        if run.progress.step == 2:
            signal.raise_signal(number)

    return acts(on_step_end=hook)


def fit(number: signal.Signals | None = None, *, requeue: lw.Requeue | None = None, **settings: Any) -> lw.Run:
    callbacks = [*([gets(number)] if number else []), requeue or lw.Requeue()]
    user = trainer(**{"epochs": 2, "name": "x", "loggers": [], "callbacks": callbacks} | settings)
    return user.fit(sgd_task(line(), lr=0.1), DATA, resume=None if user.folder is None else "auto")


@pytest.mark.capability("CA-38")
def test_an_interrupted_job_is_requeued_once_it_is_saved_and_goes_on(
    job: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    """A SLURM job whose time is over saves, goes back to the queue, and goes on when it starts again."""
    with pytest.raises(SystemExit) as caught:
        fit(signal.SIGUSR1, folder=folder)
    assert caught.value.code == 138
    assert asked(tmp_path) == ["requeue 42"]
    assert "step-00000002" in (tmp_path / "saved").read_text()
    run = fit(folder=folder)  # the same script, started again
    assert run.resumed_from is not None
    assert (run.status, run.progress.step) == ("done", 8)
    assert asked(tmp_path) == ["requeue 42"]


def test_a_task_of_an_array_requeues_itself_alone(job: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    job.setenv("SLURM_ARRAY_JOB_ID", "40")
    job.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(SystemExit):
        fit(signal.SIGUSR1, folder=folder)
    assert asked(tmp_path) == ["requeue 40_3"]


@pytest.mark.parametrize(
    ("number", "signals", "calls"),
    [
        (signal.SIGTERM, ("SIGUSR1",), []),
        (signal.SIGTERM, ["SIGUSR1", "SIGTERM"], ["requeue 42"]),
        (signal.SIGTERM, "SIGTERM", ["requeue 42"]),
        (signal.SIGUSR1, "SIGTERM", []),
    ],
)
def test_the_signals_that_requeue_are_those_asked_for(
    job: pytest.MonkeyPatch, folder: Path, tmp_path: Path, number: signal.Signals, signals: Any, calls: list[str]
) -> None:
    with pytest.raises(SystemExit):
        fit(number, folder=folder, requeue=lw.Requeue(signals=signals))
    assert asked(tmp_path) == calls


def test_a_run_that_nothing_interrupts_is_not_requeued(job: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    assert fit(folder=folder).status == "done"
    stops = acts(on_step_end=lambda run, result: run.request_stop("enough"))
    assert fit(folder=folder, name="stopped", callbacks=[stops, lw.Requeue()]).status == "stopped"
    late = acts(on_fit_end=lambda run: signal.raise_signal(signal.SIGUSR1))
    with pytest.raises(SystemExit):
        fit(folder=folder, name="late", callbacks=[late, lw.Requeue()])
    assert asked(tmp_path) == []


@pytest.mark.parametrize("name", ["bash", "interactive", None])
def test_outside_of_a_batch_job_nothing_is_done(
    job: pytest.MonkeyPatch, folder: Path, tmp_path: Path, name: str | None
) -> None:
    if name is None:
        job.delenv("SLURM_JOB_ID")
    else:
        job.setenv("SLURM_JOB_NAME", name)
    with pytest.raises(SystemExit):
        fit(signal.SIGUSR1, folder=folder)
    assert asked(tmp_path) == []


def test_only_rank_0_asks(job: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    def other(run: lw.Run) -> None:
        run.comm.rank = 1

    with pytest.raises(SystemExit):
        fit(folder=folder, callbacks=[gets(signal.SIGUSR1), acts(on_fit_end=other), lw.Requeue()])
    assert asked(tmp_path) == []


@pytest.mark.parametrize(
    ("then", "why"),
    [
        (
            "echo 'Requested operation is presently disabled for job 42' >&2; exit 1",
            "`scontrol requeue 42` failed with status 1: Requested operation is presently disabled for job 42",
        ),
        ("exit 3", "`scontrol requeue 42` failed with status 3: no message"),
        ("kill -9 $$", "`scontrol requeue 42` failed with status -9: no message"),
        (None, "there is no scontrol on the PATH of this machine"),
        ("exec sleep 60", "`scontrol requeue 42` has not answered in 0.2 s"),
    ],
)
def test_a_scontrol_that_fails_is_told_and_the_run_stays_saved(
    job: pytest.MonkeyPatch, folder: Path, tmp_path: Path, then: str | None, why: str
) -> None:
    job.setattr("loopwright.callbacks.requeue._PATIENCE_S", 0.2 if then == "exec sleep 60" else 60.0)
    if then is None:
        (tmp_path / "bin" / "scontrol").unlink()
    else:
        scontrol(tmp_path, job, then)
    with pytest.warns(lw.LoopwrightWarning) as caught, pytest.raises(SystemExit) as left:
        fit(signal.SIGUSR1, folder=folder)
    assert [str(w.message) for w in caught] == [
        f"SLURM job 42 is not requeued: {why}. The run is saved; to go on, submit the script again, with `#SBATCH "
        "--requeue` in it where the cluster does not requeue by itself"
    ]
    assert left.value.code == 138
    assert fit(folder=folder).progress.step == 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_before_the_run_is_saved_does_not_undo_the_first(
    job: pytest.MonkeyPatch, folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    saving = acts(on_checkpoint=lambda run, path: signal.raise_signal(number))
    with pytest.raises(SystemExit) as caught:
        fit(folder=folder, callbacks=[gets(signal.SIGUSR1), saving, lw.Requeue()])
    assert caught.value.code == 138
    assert asked(tmp_path) == ["requeue 42"]


@pytest.mark.parametrize("number", ["USR1", "TERM", "INT"])
def test_a_second_signal_while_it_asks_stops_neither_scontrol_nor_the_run(
    job: pytest.MonkeyPatch, folder: Path, tmp_path: Path, number: str
) -> None:
    """SLURM sends one to every process of a job that it requeues: to scontrol and to the run."""
    scontrol(tmp_path, job, f"kill -{number} $$ $PPID; sleep 0.1")
    with pytest.raises(SystemExit) as caught:
        fit(signal.SIGUSR1, folder=folder)
    assert asked(tmp_path) == ["requeue 42"]
    assert caught.value.code == 138  # the first signal is the one that counts
    assert fit(folder=folder).progress.step == 8


def test_a_run_that_saves_nothing_when_stopped_is_refused_inside_a_job(job: pytest.MonkeyPatch, folder: Path) -> None:
    says = (
        "Requeue starts this job again, but the run would have nothing to go on from: it saves no checkpoint when it "
        "is stopped. Leave out checkpoint=False, folder=None and at_end=False"
    )
    settings: list[dict[str, Any]] = [
        {"checkpoint": False}, {"folder": None}, {"checkpoint": lw.Checkpoint("1 step", at_end=False)},
    ]  # fmt: skip
    for one in settings:
        with pytest.raises(lw.SettingError) as caught:
            fit(**({"folder": folder} | one))
        assert str(caught.value) == says
    job.delenv("SLURM_JOB_ID")
    assert fit(folder=folder, checkpoint=False).status == "done"


def test_a_signal_that_stops_no_run_is_refused() -> None:
    with pytest.raises(lw.SettingError) as caught:
        lw.Requeue(signals=["SIGUSR2"])
    assert str(caught.value) == (
        "Requeue(signals='SIGUSR2'): no such signal stops a run. Known: 'SIGINT', 'SIGTERM', 'SIGUSR1'. Did you mean "
        "'SIGUSR1'?"
    )
