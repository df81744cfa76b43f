"""Hand a SLURM job back to the queue when its time is over."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence

from loopwright.errors import SettingError, choose
from loopwright.events import Callback
from loopwright.parallel.world import in_batch_job
from loopwright.state import SIGNALS, Run
from loopwright.written import warn

__all__ = ["Requeue"]

_PATIENCE_S = 60.0  # for a busy controller; SLURM kills what is left of the job anyway


class Requeue(Callback):
    """Puts the SLURM job of this run back into the queue when one of ``signals`` has interrupted it, once it is saved.

    SLURM sends SIGUSR1 some time before the limit where the job asks for it (``#SBATCH --signal=USR1@120``); the fit
    stops at its next boundary and writes a checkpoint, rank 0 calls ``scontrol requeue``, and the same job starts
    again later. With ``fit(..., resume="auto")`` it goes on there. SIGTERM is what ``scancel`` sends too: add it where
    a job that is cancelled shall come back. Outside of a SLURM job, and in an interactive one, nothing is done. Put it
    last in the list of callbacks: SLURM stops the job as soon as it is requeued.

    Reads: run.stop_reason, run.comm.rank. Changes: nothing in the run. Stops: no.

    >>> Requeue(signals=["SIGUSR1", "SIGTERM"]).signals
    ('SIGUSR1', 'SIGTERM')

    Raises SettingError for a signal that interrupts no run, and at the start inside a job for a run that does not save
    where it is stopped. Warns, with what scontrol said, where the job could not be requeued.
    """

    def __init__(self, *, signals: Sequence[str] = ("SIGUSR1",)) -> None:
        self.signals = (signals,) if isinstance(signals, str) else tuple(signals)
        for name in self.signals:
            if name not in SIGNALS:
                raise SettingError(f"Requeue(signals={name!r}): no such signal stops a run. {choose(name, SIGNALS)}")

    def on_fit_start(self, run: Run) -> None:
        if in_batch_job() and not any(saver.at_end for saver in run.savers):
            raise SettingError(
                "Requeue starts this job again, but the run would have nothing to go on from: it saves no checkpoint "
                "when it is stopped. Leave out checkpoint=False, folder=None and at_end=False"
            )

    def on_fit_end(self, run: Run) -> None:
        if run.stop_reason not in self.signals or run.stage is None or run.comm.rank != 0 or not in_batch_job():
            return
        job = _job_id()
        problem = _requeue(job)
        if problem is not None:
            warn(
                f"SLURM job {job} is not requeued: {problem}. The run is saved; to go on, submit the script again, "
                "with `#SBATCH --requeue` in it where the cluster does not requeue by itself"
            )


def _job_id() -> str:
    """The number of the job; of an array, this task alone."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def _requeue(job: str) -> str | None:
    """Ask for it; what went wrong, or None."""
    if shutil.which("scontrol") is None:
        return "there is no scontrol on the PATH of this machine"
    command = f"scontrol requeue {shlex.quote(job)}"
    # SLURM signals all processes of a job, and the job as soon as it is requeued: scontrol shall end before that
    deaf = ["sh", "-c", f"trap '' INT TERM USR1; exec {command}"]
    try:
        done = subprocess.run(deaf, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        return f"`{command}` has not answered in {_PATIENCE_S:g} s"
    if done.returncode == 0:
        return None
    said = (done.stderr or done.stdout).strip() or "no message"
    return f"`{command}` failed with status {done.returncode}: {said}"
