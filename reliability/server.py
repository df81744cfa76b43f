"""A process that has imported all that is slow and forks a child for each run, which a real SIGKILL can end.

The harness writes one line of JSON for a run and is told the process id; when the run has ended, by itself or not, it
is told the exit status. Messages of the child come between the two.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
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
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"job": job, **arguments}) + "\n")
        self.process.stdin.flush()
        pid = self._hear("pid")
        began = time.perf_counter()
        if kill_after is not None:
            for _ in range(until):
                self._hear("said")
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)  # an ended child waits for its status to be read: the id is still its own
            self._tell("reap")
        else:
            self._tell("reap")
        status = self._hear("status")
        if status == -signal.SIGKILL:
            return None
        if status != 0:
            self.said.seek(0)
            raise RuntimeError(f"{job} {arguments} ended with status {status}: {self.said.read()[-800:]}")
        return time.perf_counter() - began

    def _tell(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(text) + "\n")
        self.process.stdin.flush()


def serve() -> None:
    """The loop of the server: fork a run, tell its id, wait until the harness wants its status."""
    import torch

    import loopwright as lw
    from loopwright.folder import open_folder
    from reliability.jobs import JOBS

    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports torch's compiler
    for name in lw.__all__:
        getattr(lw, name)
    with tempfile.TemporaryDirectory() as place:
        open_folder(place, "warm", settings={}, seed=0)  # lists the installed packages
    print("ready 1", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(0)
                JOBS[request.pop("job")](**request)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(f"pid {pid}", flush=True)
        sys.stdin.readline()
        _, status = os.waitpid(pid, 0)
        print(f"status {os.waitstatus_to_exitcode(status)}", flush=True)


def say(number: int) -> None:
    """From within a job: one line to the harness, in one write."""
    os.write(1, f"said {number}\n".encode())
