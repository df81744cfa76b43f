"""A process that has imported all that is slow and forks a child for each run, which a real SIGKILL can end.

The harness writes one line of JSON for a run and is told the process id; when the run has ended, by itself or not, it
is told the exit status. Messages of the child come between the two.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START = "import sys; sys.path.insert(0, {root!r}); from reliability.server import serve; serve()"


class Server:
    """Starts runs and kills them; use it with ``with``."""

    def __enter__(self) -> Server:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", START.format(root=str(ROOT))]
        self.said = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True, env=env
        )
        self._hear("ready")
        return self

    def __exit__(self, *error: Any) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.said.close()

    def _hear(self, kind: str) -> Any:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith(f"{kind} "):
                return json.loads(line.removeprefix(f"{kind} "))
        raise RuntimeError("the server of runs has died")

    def run(self, job: str, *, kill_after: float | None = None, until: int = 0, **arguments: Any) -> float | None:
        """Run a job of ``JOBS``; the seconds it took, or None if it was killed.

        It is killed ``kill_after`` seconds after it began, or after it said something for the ``until``-th time.
        Raises RuntimeError if it failed.
        """
        pid = self._start(job, arguments)
        began = time.perf_counter()
        if kill_after is not None:
            for _ in range(until):
                self._hear("said")
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)  # an ended child waits for its status to be read: the id is still its own
        status = self._status()
        if status == -signal.SIGKILL:
            return None
        if status != 0:
            raise RuntimeError(f"{job} {arguments} ended with status {status}: {self._errors()[-800:]}")
        return time.perf_counter() - began

    def interrupt(self, job: str, number: signal.Signals, **arguments: Any) -> tuple[int, float, str]:
        """Run a job that leads a process group, and send ``number`` to the group when it has said something.

        Its exit status, the time (``time.monotonic``) when the signal was sent, and its errors.
        """
        pid = self._start(job, arguments)
        self._hear("said")
        sent = time.monotonic()
        with suppress(ProcessLookupError):  # it never came to the point, and says so
            os.killpg(pid, number)
        return self._status(), sent, self._errors()

    def _start(self, job: str, arguments: dict[str, Any]) -> int:
        self._before = os.fstat(self.said.fileno()).st_size
        self._tell({"job": job, **arguments})
        pid: int = self._hear("pid")
        return pid

    def _status(self) -> int:
        self._tell("reap")
        status: int = self._hear("status")
        return status

    def _errors(self) -> str:
        """What the last child has written on its standard error."""
        return os.pread(self.said.fileno(), 1 << 20, self._before).decode(errors="replace")

    def _tell(self, request: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()


def warm_up() -> None:
    """Import all that is slow, for the processes that are forked from this one."""
    import torch

    import loopwright as lw
    from loopwright.folder import open_folder

    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports torch's compiler
    for name in lw.__all__:
        getattr(lw, name)
    with tempfile.TemporaryDirectory() as place:
        open_folder(place, "warm", settings={}, seed=0)  # lists the installed packages


def serve() -> None:
    """The loop of the server: fork a run, tell its id, wait until the harness wants its status."""
    from reliability.jobs import JOBS

    warm_up()
    gc.collect()
    gc.freeze()  # a forked process that ends would look through all of it
    print("ready 1", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _end_with(JOBS[request.pop("job")], request)
        sys.stdin.readline()
        _, status = os.waitpid(pid, 0)
        print(f"status {os.waitstatus_to_exitcode(status)}", flush=True)


def _end_with(job: Callable[..., None], arguments: dict[str, Any]) -> None:
    """Do the job in the forked process, which ends as a script does: with the status of what was raised."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _line("pid", os.getpid())  # before all that it says
    try:
        job(**arguments)
    finally:
        say(0)  # nobody waits for what it has not come to
    sys.exit()


def say(number: int) -> None:
    """From within a job: one line to the harness."""
    _line("said", number)


def _line(kind: str, number: int) -> None:
    os.write(1, f"{kind} {number}\n".encode())  # in one write, so that lines of several processes stay whole
