"""A watch over the ranks of a run: when one fails, dies, is stopped or waits alone, all end, and say why."""

from __future__ import annotations

import atexit
import faulthandler
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from loopwright.parallel.calls import Call, last_calls
from loopwright.parallel.comm import Ranks
from loopwright.parallel.standing import Still, place_of, stand, state_of, this_process
from loopwright.parallel.verdict import (
    IN_ORDER,
    FailedElsewhereError,
    Report,
    Seen,
    Verdict,
    awaited,
    ended,
    judge,
    unreachable,
)
from loopwright.written import warn

__all__ = ["LAST_WORDS", "Watch"]

# called with what ended the run, before a process ends without raising: so lw.launch tells it to the one that called
LAST_WORDS: list[Callable[[Verdict], object]] = []

_BEATS = 30  # in a timeout, and at least one a second
_PATIENCE, _GRACE, _CLEANING = 0.5, 0.1, 0.1  # parts of the timeout; the rest is for news to spread and Python to end
_SHORT = 5e-4  # seconds of rank 0's first wait for the others to have left: as a rule they are there
_TELL_S = 30.0  # of waiting for the others to be through, before it is said for whom
_SUSPECT = 2  # beats in which a rank does not move in a collective, before its last calls are told
_CAUSED_ELSEWHERE = re.compile(
    r"gloo|nccl|c10d|connection (was )?(closed|reset|refused)|broken pipe|socket|timed out|no route", re.I
)


class Watch:
    """Ends all ranks within ``timeout`` seconds of one that raises, dies, is stopped or calls a collective alone.

    Used around training, by every rank, after ``init_process_group``; ``step()`` tells how many steps are behind it,
    and costs these nothing. Two threads in each rank tell rank 0 every second where the training thread stands, and
    hear what it makes of it; the reports travel through a store of their own, which lives in rank 0. What is wrong is
    printed once by each rank, by rank 0 in full: which rank, at which step, in which line, with its error. The training
    thread may leave by an exception of its own; one that still waits after a moment is ended with its process, status
    1, after ``on_abort(text)`` was called in another thread; it must not wait for other ranks.

    The ranks leave together: one that is through waits until all are, however long that takes, and raises
    FailedElsewhereError if another one fails or dies meanwhile.

    Waiting is no error: ranks may wait for hours while another one saves, reads or validates. A rank is silent if its
    process does not run. On another machine, one that is stopped cannot be told from one in which a call of C holds
    Python's lock: there, none may for more than half of ``timeout``. A deadlock is noticed where a thread that waits
    does not run: with gloo on Linux, and not with NCCL, which has a time-out of its own. Where torch has noted calls
    that do not match it is told after four beats, and otherwise when nobody has moved for half of ``timeout``.

    >>> with Watch(0, 1, lambda: 0):  # a single rank has nobody to wait for
    ...     pass
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        step: Callable[[], int],
        *,
        timeout: float = 30.0,
        on_abort: Callable[[str], object] | None = None,
    ) -> None:
        self.rank, self.world_size, self.step = rank, world_size, step
        self.timeout, self.on_abort = timeout, on_abort
        self.beat = min(1.0, timeout / _BEATS)
        self._seen: dict[int, Seen] = {}  # all ranks, if this is rank 0; rank 0 otherwise
        self._ending: Verdict | None = None
        self._error: dict[str, Any] = {}  # fields of the report
        self._failed_at: float | None = None
        self._unreachable = ""
        self._asked = self._answered = 0
        self._threads: list[threading.Thread] = []
        self._said = False
        self._calls: list[Call] = []
        self._prints_crashes = False
        self._deciding = threading.Lock()
        self._left, self._known, self._over = threading.Event(), threading.Event(), threading.Event()
        self._wake, self._told = threading.Event(), threading.Event()

    @property
    def verdict(self) -> Verdict | None:
        """What has ended the run; None while it is not known, and where all have left in order."""
        return None if self._ending == IN_ORDER else self._ending

    # ------------------------------------------------------------------------------------------ the training thread

    def start(self) -> Self:
        """Begin to watch, in the thread that trains. All ranks must call it: they are told where the store is."""
        if self.world_size == 1:
            return self
        self._thread, self._still = threading.get_ident(), Still()
        store = self._open_store()
        self._threads = [
            threading.Thread(target=self._report, args=(store,), name="loopwright report", daemon=True),
            threading.Thread(target=self._watch, name="loopwright watch", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self._end)  # a thread that comes back from C++ while Python ends would crash the process
        if not faulthandler.is_enabled():  # a message of a wrong size aborts the process in a thread of gloo
            faulthandler.enable(2)
            self._prints_crashes = True
        return self

    def _open_store(self) -> Any:
        """A store of the watch's own, in rank 0: that of the process group may be gone when it is needed."""
        make: Any = dist.TCPStore  # type: ignore[attr-defined]
        how = {"wait_for_workers": False, "timeout": timedelta(seconds=60)}
        store: Any = None
        mine = this_process()
        address = os.environ.get("MASTER_ADDR") or mine.name
        if self.rank == 0:
            store = make("localhost", 0, is_master=True, **how)
            store.multi_set([*map(str, range(self.world_size)), "verdict"], [""] * (self.world_size + 1))
        there = Ranks().gather((mine, address, store.port if store is not None else 0))
        for rank, (process, *_) in enumerate(there[: self.world_size if self.rank == 0 else 1]):
            self._seen[rank] = Seen(process)
        if store is not None:
            return store
        host, address, port = there[0]
        return make("localhost" if host.machine == mine.machine != "" else address, port, **how)

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks of an error of this one; to be called first thing when training raises.

        An error that came of another rank's end ("Connection closed by peer") gets a note that names that rank.
        """
        if not self._threads or self._error or self._over.is_set():
            return
        lost = isinstance(error, FailedElsewhereError) or (  # of a fit inside of this one
            isinstance(error, RuntimeError) and _CAUSED_ELSEWHERE.search(str(error)) is not None
        )
        self._failed_at = time.monotonic()
        self._error = {
            "error": _named(error)[:2000], "lost": lost, "place": place_of(error),
            "trace": "".join(traceback.format_exception(error))[-8000:], "calls": last_calls() if lost else [],
        }  # fmt: skip
        self._tell()
        if lost:  # a moment for the cause to be known
            self._known.wait(_PATIENCE * self.timeout)
        verdict = self.verdict
        if verdict is not None and (lost or verdict.rank != self.rank):  # also of what this rank itself has caused
            error.add_note(f"[loopwright] {verdict.text}")
        else:
            self._say(f"rank {self.rank} failed at step {self.step()}, {self._error['place']}: {self._error['error']}")

    def stop(self) -> None:
        """This rank's training is over: it does not count as dead from now on. Wait until that of all is, or fails.

        An interrupt ends the wait, and is an error of this rank.
        """
        if not self._threads or self._left.is_set():
            return
        self._left.set()
        try:
            self._tell()
            self._wait()
        except BaseException as error:
            if self._ending is None:
                self.fail(error)
                self._wait()
            raise
        finally:
            if self.rank != 0 or self._settled():  # else rank 0 goes on for those that have not heard yet
                self._end()

    def _wait(self) -> None:
        """Until all is settled: without end for ranks that train, and for a moment once it is known how all ended."""
        began, known_at, pause, told = time.monotonic(), None, _SHORT, False
        while not self._settled():
            now = time.monotonic()
            if self._error or self._ending is not None:
                known_at = now if known_at is None else known_at
                in_order = self._ending == IN_ORDER  # else some may never answer
                if now - known_at > (_PATIENCE * self.timeout if in_order else 5 * self.beat):
                    return
            elif not told and now - began >= _TELL_S and (who := awaited(self._seen)):
                told = True
                text = f"rank {self.rank} of {self.world_size} is through, and has waited {now - began:.0f} s for {who}"
                warn(f"{text}. To end the run, press Ctrl-C twice")
            self._wake.set()
            time.sleep(min(pause, 0.02, self.beat))
            pause *= 1.2  # slowly: as a rule all have left within a few milliseconds

    def _settled(self) -> bool:
        """Whether this rank has nothing more to tell or to hear: then the thread that reports ends.

        If it ended because the store is gone, the other thread says what that means, or ends as well.
        """
        reports, judges = self._threads
        known = bool(self._error) or self._ending is not None
        return not reports.is_alive() and (known or not judges.is_alive())

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self.fail(error)
        finally:
            self.stop()
        if error is None and self.verdict is not None:
            self._say(self._words(self.verdict))
            raise FailedElsewhereError(self.verdict.text)

    def _tell(self) -> None:
        """Have the state of this rank sent now, and wait until it is."""
        until = time.monotonic() + _PATIENCE * self.timeout
        self._asked += 1
        self._wake.set()
        while self._answered < self._asked and self._threads[0].is_alive() and time.monotonic() < until:
            self._told.wait(self.beat)
            self._told.clear()

    def _end(self) -> None:
        if self._prints_crashes:
            faulthandler.disable()
            self._prints_crashes = False
        self._over.set()
        self._wake.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(4 * self.beat)
        atexit.unregister(self._end)

    # ------------------------------------------------------------------------------------------ the thread that reports

    def _report(self, store: Any) -> None:
        """The only one that uses the store: a call may never come back."""
        try:
            self._exchange(store)
        except Exception as error:  # whatever it is, as a rule of the network: this rank hears no more of the others
            self._unreachable = _named(error).partition("\n")[0]
        finally:
            self._told.set()

    def _exchange(self, store: Any) -> None:
        """Send and fetch reports, every beat, until there is nothing more to tell or to hear."""
        keys = [*map(str, self._seen), "verdict"]
        beat, posted, before = 0, False, time.monotonic()
        while not self._over.is_set():
            beat, now = beat + 1, time.monotonic()
            asked, left = self._asked, self._left.is_set()  # in this order: what was asked for is in the report
            ending = self._ending
            at = stand(self._thread)
            still = self._still.look(min(now - before, 2 * self.beat))
            before = now
            if not at.waits or still < _SUSPECT * self.beat:
                self._calls = []
            elif not self._calls:
                self._calls = last_calls()
            seen: dict[str, Any] = {"place": at.place, "stack": at.stack, "calls": self._calls}
            fields = seen | {"left": left, "heard": ending is not None} | self._error
            mine = Report(beat, self.step(), waits=at.waits, path=at.path, still=still, **fields)
            # before the reports are read: one that is gone may have said that it left
            states = [state_of(one.process) for one in self._seen.values()]
            if self.rank != 0 and states[0] == "gone":
                self._unreachable = "its process has ended"  # a call would fail as well, with pages of C++ on stderr
                return
            store.set(str(self.rank), mine.pack())
            if self.rank != 0 and _has_all(mine):
                return
            if self.rank == 0 and ending is not None and not posted:
                store.set("verdict", ending.pack())
                posted = True
            *reports, found = store.multi_get(keys)
            for one, state, text in zip(self._seen.values(), states, reports, strict=True):
                report = Report.unpack(text.decode()) if text else None
                if report is not None and (one.report is None or report.beat != one.report.beat):
                    one.came = time.monotonic()
                one.report, one.state = report, state
            if found:
                self._decide(Verdict.unpack(found.decode()))
            self._answered = asked
            self._told.set()
            if posted and all(map(_needs_no_more, self._seen.values())):
                return  # the store may go
            if self.rank == 0 and ending is None and all(one.report and one.report.done for one in self._seen.values()):
                self._decide(IN_ORDER)
                continue
            self._wake.wait(self.beat)
            self._wake.clear()

    def _decide(self, verdict: Verdict) -> None:
        """The first verdict stands, whichever thread has come to it."""
        with self._deciding:
            self._ending = self._ending or verdict

    # ------------------------------------------------------------------------------------------ the thread that judges

    def _watch(self) -> None:
        beats, before = dict.fromkeys(self._seen, 0), time.monotonic()
        while not self._over.wait(self.beat):
            now = time.monotonic()
            # time in which this process was stopped itself does not count against others
            elapsed, before = min(now - before, 2 * self.beat), now
            for rank, one in self._seen.items():
                report = one.report
                one.silent += elapsed
                one.age = now - one.came
                if report is not None:
                    if report.beat != beats[rank]:
                        one.silent, beats[rank] = 0.0, report.beat
                    one.lost += elapsed if report.lost else 0.0
                if self.rank != 0:  # the store may not answer: it is in that process
                    one.state = state_of(one.process)
            if self._ending is None and (found := self._judge()) is not None:
                self._decide(found)
            if self._ending is not None:
                self._known.set()
                self._wake.set()
                if self.verdict is not None:
                    self._conclude(self.verdict)
                return
            if self._unreachable:
                return  # rank 0 has left

    def _judge(self) -> Verdict | None:
        patience = _PATIENCE * self.timeout
        if self._unreachable:
            return unreachable(self._seen[0], self._unreachable)
        if self.rank == 0:
            return judge(self._seen, patience=patience, beat=self.beat)
        return ended(self._seen, patience=patience)

    def _conclude(self, verdict: Verdict) -> None:
        """Say it, give the training thread a moment to leave by itself, clean up and end the process."""
        if verdict.rank != self.rank or not self._error:
            _within(self.beat, lambda: self._say(self._words(verdict)))
        if verdict.silent is not None and state_of(verdict.silent) == "stopped":
            with suppress(OSError):  # what is stopped cannot end by itself; those who wait for it now get an error
                os.kill(verdict.silent.pid, signal.SIGKILL)
        # of ranks that wait for one another none can leave by itself
        until = time.monotonic() + (self.beat if verdict.rank is None else _GRACE * self.timeout)
        while not self._left.wait(self.beat):
            if self._failed_at is not None:  # it is on its way out: saving what it can, closing files
                until = max(until, self._failed_at + _PATIENCE * self.timeout)
            if time.monotonic() >= until:
                break
        else:
            return
        if self.on_abort is not None:
            _within(_CLEANING * self.timeout, self.on_abort, verdict.text)
        for say in LAST_WORDS:
            _within(self.beat, say, verdict)
        _within(self.beat, sys.stdout.flush)
        os._exit(1)

    def _words(self, verdict: Verdict) -> str:
        through = self._left.is_set() and not self._error
        mine = "" if through else f"rank {self.rank} ends at step {self.step()}: "
        more = f"\n{verdict.more.rstrip()}" if self.rank == 0 and verdict.more else ""
        return f"{mine}{verdict.text}{more}"

    def _say(self, text: str) -> None:
        if not self._said:
            self._said = True
            print(f"[loopwright] {text}", file=sys.stderr, flush=True)


def _has_all(report: Report) -> bool:
    """Whether a rank needs rank 0 no more: it has heard, or has left with an error, which it has told."""
    return report.heard or (report.left and not report.done)


def _needs_no_more(one: Seen) -> bool:
    return (one.report is not None and _has_all(one.report)) or state_of(one.process) == "gone"


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _within(seconds: float, call: Callable[..., object], *args: object) -> None:
    """Call it in a thread of its own, and go on if it hangs."""
    thread = threading.Thread(target=call, args=args, daemon=True)
    thread.start()
    thread.join(seconds)
