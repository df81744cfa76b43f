"""Running a function in several processes on this machine, from a notebook, a test or a script."""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing as mp
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pickle import PicklingError, dumps, loads  # noqa: TID251 - between processes of one program, never a file
from typing import Any, NamedTuple

import torch
from torch import distributed as dist

from loopwright._compat import fork_works
from loopwright.errors import LoopwrightError, SettingError
from loopwright.parallel.verdict import FailedElsewhereError, Verdict
from loopwright.parallel.watch import LAST_WORDS

__all__ = ["launch"]

_GRACE_S = 5.0  # what is asked to stop has so long; then it is killed
_SAVE_S = 60.0  # after a signal, to save at the next boundary; a second one shortens it
_BLAME_S = 0.5  # a rank that dies takes others with it, whose errors may arrive first
_CAUSE_S = 30.0  # those that only heard of a failure are here before the one that failed, which closes its files first
_LOCALHOST = "127.0.0.1"
_STOPPING = (signal.SIGINT, signal.SIGTERM)
_PASSED_ON = [signal.Signals[name] for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class _Said(NamedTuple):
    """What a rank has to say at its end: its result, or its error, as bytes."""

    at: float
    ok: bool
    content: bytes
    text: str = ""


def launch(fn: Callable[..., Any], nproc: int, *args: Any) -> list[Any]:
    """Run ``fn(*args)`` in ``nproc`` processes that see each other as if torchrun had started them; their results.

    One result a rank, in the order of ranks: plain data and tensors on the CPU. A Trainer in ``fn`` finds all ranks.
    The processes are forked where that is safe, so that functions of a notebook work; each computes with one thread.
    After CUDA was looked for in this process, and where there is no fork, they are spawned: ``fn`` must then be a
    function of a file, and OMP_NUM_THREADS tells the threads, one if it is not set.

    An error in a rank ends the others and is raised here, with a note that names the rank and shows where it was; a
    rank that dies is a LoopwrightError. Ctrl-C is passed on, so that runs are saved, and raised again; SIGTERM and
    SIGUSR1 likewise, as SystemExit, where this is the main thread and nobody else handles them. No rank is left.

    Raises SettingError where it cannot work: inside a rank, with an open process group, for a function that cannot
    be sent.

    >>> launch(max, 2, 3, 5)
    [5, 5]
    """
    method = _start_method(fn, nproc)
    context: Any = mp.get_context(method)
    listener = socket.create_server((_LOCALHOST, 0))  # opened before the start: nobody can take the port
    ranks: list[Any] = []
    pipes: list[Connection] = []
    handled = _raise_at_signals()
    try:
        for rank in range(nproc):
            mine, theirs = context.Pipe(duplex=False)
            pipes.append(mine)
            call = (fn, args, rank, nproc, listener.getsockname()[1], theirs, os.getpid(), method, gc.isenabled())
            process = context.Process(target=_run_rank, args=call, name=f"rank {rank}")
            with _quiet_fork(), _held_back(), _uncollected():
                process.start()
                ranks.append(process)  # a signal that was held back finds it there
            theirs.close()
        # the ranks meet here, as they meet at torchrun's agent; after the start, for a fork copies no threads
        port, descriptor = listener.getsockname()[1], listener.detach()
        store = dist.TCPStore(  # type: ignore[attr-defined]
            _LOCALHOST, port, None, True, wait_for_workers=False, master_listen_fd=descriptor
        )
        said, lost = _listen(ranks, pipes)
        _raise_first(said, lost, nproc)
        _end(ranks, None, _GRACE_S)
        del store  # it has served until here
        return [loads(said[rank].content) for rank in range(nproc)]
    except KeyboardInterrupt:
        _end(ranks, signal.SIGINT, _SAVE_S)
        raise
    except _Signalled as asked:
        _end(ranks, signal.Signals(asked.code - 128), _SAVE_S)
        raise
    finally:
        try:
            _end(ranks, signal.SIGTERM, _GRACE_S)
        finally:  # whoever presses Ctrl-C again and again
            _end(ranks, signal.SIGKILL, None)
            for number in handled:
                signal.signal(number, signal.SIG_DFL)
            listener.close()
            for pipe in pipes:
                pipe.close()


def _start_method(fn: Callable[..., Any], nproc: int) -> str:
    if not isinstance(nproc, int) or isinstance(nproc, bool) or nproc < 1:
        raise SettingError(f"nproc={nproc!r}: expected the number of processes, from 1")
    if not callable(fn):
        raise SettingError(
            f"launch runs a function; got {fn!r}. Write lw.launch(train, {nproc}), without calling train"
        )
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE") != "1":
        raise SettingError(
            "lw.launch was called in a process that torchrun or lw.launch has started already; call the function itself"
        )
    if dist.is_initialized():
        raise SettingError(
            "this process is in a process group, which its children cannot use. Leave it first: "
            "torch.distributed.destroy_process_group()"
        )
    can_fork = "fork" in mp.get_all_start_methods() and sys.platform != "darwin"
    with _quiet_fork():
        if can_fork and fork_works():
            return "fork"
    why = "CUDA was looked for or used in this process" if can_fork else "this system cannot fork safely"
    try:
        dumps(fn)
        found = fn.__module__ != "__main__" or hasattr(sys.modules["__main__"], "__file__")
    except (PicklingError, AttributeError, TypeError):
        found = False
    if not found:
        name = getattr(fn, "__qualname__", repr(fn))
        raise SettingError(
            f"{why}, so that {name} must be sent to new processes, which works for functions of a file only. Write it "
            "to a file and import it, or call lw.launch before anything uses CUDA (restart the kernel first)"
        )
    return "spawn"


class _Signalled(SystemExit):
    """A signal that would have ended this process at once, and with it the ranks."""

    code: int


def _signalled(number: int, frame: Any) -> None:
    raise _Signalled(128 + number)


def _raise_at_signals() -> list[signal.Signals]:
    """Let those that nobody handles be raised as _Signalled from now on; which ones."""
    if threading.current_thread() is not threading.main_thread():
        return []
    mine = [number for number in _PASSED_ON if signal.getsignal(number) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, _signalled)
    return mine


@contextmanager
def _quiet_fork() -> Iterator[None]:
    """Python 3.12 warns of every fork in a process with threads; that of torch are not used in the children."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"This process .* is multi-threaded", DeprecationWarning)
        yield


@contextmanager
def _held_back() -> Iterator[None]:
    """A signal to stop comes after this block: what Python calls at a fork would swallow the exception of one.

    A rank that has begun and is not yet in the list would outlive it, and this process would wait for it at its end.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _uncollected() -> Iterator[None]:
    """What there is to collect here, some of it of C++ and its threads, is not for a fork to end: it would crash."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


# ---------------------------------------------------------------------------------------------- in a rank


def _run_rank(
    fn: Callable[..., Any], args: tuple[Any, ...], rank: int, nproc: int, port: int, pipe: Connection, parent: int,
    method: str, collects: bool,
) -> None:  # fmt: skip
    """What a child does: look like a process of torchrun, call ``fn``, say what came of it."""
    for number in _PASSED_ON:
        if signal.getsignal(number) is _signalled:
            signal.signal(number, signal.SIG_DFL)  # this is a fork; what the parent passes on is for the run to handle
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)  # the parent holds them back while it starts this one
    _die_with(parent)
    gc.freeze()  # what the parent has left to collect
    if collects:
        gc.enable()
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "GROUP_RANK": 0}
    there = {"GROUP_WORLD_SIZE": 1, "MASTER_ADDR": _LOCALHOST, "MASTER_PORT": port}
    agent = {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    os.environ.update({name: str(value) for name, value in (here | there | agent).items()})
    if method == "fork" or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a fork has none of the threads of its parent, and would wait for them
    LAST_WORDS[:] = [lambda verdict: pipe.send_bytes(dumps(_aborted(verdict)))]
    try:
        said = _result(fn(*args), rank)
    except BaseException as error:
        said = _error(error)
        sys.last_value = error  # as for any error that nothing catches: the group is not left in order
    with suppress(BrokenPipeError):  # the parent has stopped listening
        pipe.send_bytes(dumps(said))
    if not said.ok:
        sys.exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


def _result(value: Any, rank: int) -> _Said:
    try:
        return _Said(time.monotonic(), True, dumps(value))
    except Exception as error:
        raise SettingError(
            f"rank {rank} returned a {type(value).__name__}, which cannot be sent to the process that called lw.launch "
            f"({error}). Return plain data and tensors, such as run.metrics"
        ) from None


def _error(error: BaseException) -> _Said:
    text = "".join(traceback.format_exception(error))
    at = math.inf if isinstance(error, FailedElsewhereError) else time.monotonic()  # the cause goes before
    try:
        content = dumps(error)
        changed = str(loads(content)) != str(error)
    except Exception:
        content, changed = b"", True
    if changed:  # a class of its own, with arguments that pickle cannot repeat
        content = dumps(LoopwrightError(f"{type(error).__name__}: {error}"))
    return _Said(at, False, content, text)


def _aborted(verdict: Verdict) -> _Said:
    """Of a rank that is ended while it waits: after an error that was the cause, before those that its end gives."""
    at = math.inf if f"rank {verdict.rank} failed" in verdict.text else time.monotonic()
    return _Said(at, False, dumps(LoopwrightError(verdict.text)), verdict.more)


def _die_with(parent: int) -> None:
    """Let the kernel end this process when its parent is killed; where it cannot, the parent must end in order."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


# ---------------------------------------------------------------------------------------------- in the parent


def _listen(ranks: list[Any], pipes: list[Connection]) -> tuple[dict[int, _Said], dict[int, int]]:
    """What the ranks said, and the exit codes of those that died: of all, or until a moment after the cause."""
    said: dict[int, _Said] = {}
    lost: dict[int, int] = {}
    until = math.inf
    while waiting := [rank for rank in range(len(ranks)) if rank not in said and rank not in lost]:
        left = None if until == math.inf else max(until - time.monotonic(), 0.0)
        if not wait([*(pipes[rank] for rank in waiting), *(ranks[rank].sentinel for rank in waiting)], left):
            break
        for rank in waiting:
            code = ranks[rank].exitcode  # asked before the pipe, which by then holds all that it has sent
            with suppress(EOFError):
                if pipes[rank].poll():
                    said[rank] = loads(pipes[rank].recv_bytes())
            if rank not in said and code is not None:
                lost[rank] = code
        failed = [one.at for one in said.values() if not one.ok]
        if lost or failed:
            cause = lost or min(failed) < math.inf
            until = min(until, time.monotonic() + (_BLAME_S if cause else _CAUSE_S))
    return said, lost


def _raise_first(said: dict[int, _Said], lost: dict[int, int], nproc: int) -> None:
    """Raise for the rank that failed first: one that died, else the earliest error."""
    for rank, code in lost.items():
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        told = "\n".join(f"{loads(one.content)}\n{one.text}" for one in said.values() if not one.ok)
        seen = re.search(rf"rank {rank} has not been heard of.*", told)  # it was stopped, and ended by us
        hint = ". The system kills what takes too much memory" if code == -signal.SIGKILL else ""
        hint = hint if seen is None else f": {seen[0]}"
        raise LoopwrightError(f"rank {rank} of {nproc} {how} before its function had returned{hint}")
    failed = [(one.at, rank) for rank, one in said.items() if not one.ok]
    if failed:
        rank = min(failed)[1]
        error: BaseException = loads(said[rank].content)
        error.add_note(f"[loopwright] raised in rank {rank} of {nproc}:\n{said[rank].text.rstrip()}")
        raise error


def _end(ranks: list[Any], number: signal.Signals | None, patience_s: float | None) -> None:
    """Send a signal to the ranks that are alive, if any is given, and wait for their end."""
    for process in ranks:
        if number is not None and process.is_alive():
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)
    until = None if patience_s is None else time.monotonic() + patience_s
    for process in ranks:
        process.join(None if until is None else max(until - time.monotonic(), 0.0))
