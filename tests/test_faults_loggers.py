"""A logger whose backend fails costs its records, and nothing else."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import loopwright as lw
from loopwright.loggers import read_jsonl
from tiny import bits, classifier, line, loader, pairs, same, seed_all, sgd_task, trainer

DATA = pairs(*([float(i)] for i in range(20)))


class Keep:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, progress: lw.Progress, values: Any, kind: str) -> None:
        self.steps.append(progress.step)


class Down(Keep):
    """Its backend is down from the ``first`` call of ``method`` to the ``last``."""

    def __init__(self, method: str, first: int, last: int) -> None:
        super().__init__()
        self.method, self.first, self.last, self.calls, self.closed = method, first, last, 0, 0

    def happen(self, method: str) -> None:
        if method == self.method:
            self.calls += 1
            if self.first <= self.calls <= self.last:
                raise ConnectionError("the backend is down")

    def start(self, run: lw.Run) -> None:
        self.happen("start")

    def log(self, progress: lw.Progress, values: Any, kind: str) -> None:
        self.happen("log")
        super().log(progress, values, kind)

    def close(self, status: str) -> None:
        self.closed += 1
        self.happen("close")


def told(loggers: list[Any], **settings: Any) -> tuple[lw.Run, list[str]]:
    """A run of 20 steps with a record at each and one for the epoch, and what it warned of."""
    user = trainer(epochs=1, log_every=1, loggers=loggers, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = user.fit(sgd_task(line(), lr=0.0), DATA)
    return run, [str(w.message) for w in caught if issubclass(w.category, lw.LoopwrightWarning)]


class Wrong(Keep):
    def __init__(self, **methods: Any) -> None:
        super().__init__()
        self.__dict__.update(methods)


@pytest.mark.parametrize(
    ("methods", "given", "wanted"),
    [
        ({"log": lambda values: None}, "log(values)", "log(self, progress, values, kind)"),
        ({"log": lambda p, v, *, kind: None}, "log(p, v, *, kind)", "log(self, progress, values, kind)"),
        ({"start": lambda: None}, "start()", "start(self, run)"),
        ({"close": lambda: None}, "close()", "close(self, status)"),
    ],
)  # fmt: skip
def test_a_logger_that_cannot_be_called_is_refused_where_it_is_given(
    methods: dict[str, Any], given: str, wanted: str
) -> None:
    with pytest.raises(lw.HookError) as error:
        trainer(epochs=1, loggers=[Wrong(**methods)])
    assert str(error.value) == f"Wrong.{given} has the wrong parameters; write: def {wanted}"


def test_a_logger_may_take_more_than_it_is_given() -> None:
    seen: list[Any] = []
    trainer(epochs=1, loggers=[Wrong(log=lambda *given, **more: seen.append(given))])
    trainer(epochs=1, loggers=[Wrong(log=lambda progress, values, kind, extra=1: None, close=print)])


def test_a_backend_that_fails_is_said_once_and_asked_again_after_a_rest() -> None:
    logger, other = Down("log", 3, 4), Keep()
    run, texts = told([logger, other])
    assert run.status == "done"
    assert other.steps == [*range(1, 21), 20]
    # record 3 is lost, 4 is not sent; 5 is lost, 6 to 8 are not sent
    assert logger.steps == [1, 2, *range(9, 21), 20]
    assert texts == [
        "Down.log failed after step 3: ConnectionError('the backend is down'). Training goes on, and it is asked again "
        "at later records; how many were lost is said at the end. Mend what it writes to, or leave it out of "
        "Trainer(loggers=[...])",
        "6 records were lost by Down, which failed 2 times",
    ]


def test_a_backend_that_stays_down_is_asked_less_and_less() -> None:
    logger = Down("log", 1, 10**9)
    _, texts = told([logger])
    assert logger.calls == 4  # at records 1, 3, 7 and 15 of 21
    assert texts[1:] == ["21 records were lost by Down, which failed 4 times"]


def test_a_logger_that_could_not_start_is_started_later() -> None:
    logger = Down("start", 1, 1)
    _, texts = told([logger])
    assert logger.calls == 2
    assert logger.steps == [*range(2, 21), 20]
    assert texts[-1] == "1 records were lost by Down, which failed 1 times"


def test_a_logger_that_cannot_close_leaves_the_run_done_and_the_others_closed() -> None:
    loggers = [Down("close", 1, 1), Down("never", 1, 1)]
    run, texts = told(loggers)
    assert run.status == "done"
    assert [logger.closed for logger in loggers] == [1, 1]
    assert len(texts) == 1
    assert texts[0].startswith("Down.close failed after step 20: ")


def test_a_wrong_setting_of_a_logger_is_still_an_error(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a table\n")
    with pytest.raises(lw.SettingError, match="CSVLogger cannot add to"):
        told([lw.CSVLogger(path)])


def test_failing_loggers_change_no_bit_of_training(folder: Path) -> None:
    def trained(loggers: list[Any]) -> list[Any]:
        net = classifier(dropout=0.5, batch_norm=True)
        task = sgd_task(net, lr=0.1, loss=None)
        seed_all(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lw.LoopwrightWarning)
            trainer(epochs=2, log_every=1, loggers=loggers).fit(task, loader(batch_size=5, shuffle=True))
        return bits(net)

    alone = trained([])
    for method in ("start", "log", "close"):
        assert same(trained([Down(method, 1, 10**9)]), alone)


@pytest.mark.parametrize("kind", [lw.JSONLLogger, lw.CSVLogger])
def test_a_full_disk_tears_no_record_of_our_own_loggers(kind: Any, tmp_path: Path) -> None:
    """A real limit of the file size stops a write in the middle of a record; later ones are whole again."""
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    path = tmp_path / "metrics"
    logger = kind(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(run: lw.Run) -> None:
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))

    def free(run: lw.Run) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    user = trainer(epochs=1, log_every=1, loggers=[logger])
    user.on(lw.Event.STEP_END(once=5))(limit)
    user.on(lw.Event.STEP_END(once=11))(free)
    try:
        with pytest.warns(lw.LoopwrightWarning) as caught:
            user.fit(sgd_task(line(), lr=0.0), DATA)
    finally:
        free(None)  # type: ignore[arg-type]
        signal.signal(signal.SIGXFSZ, old)
    assert "File too large" in str(caught[0].message)
    if kind is lw.JSONLLogger:
        steps = [record["step"] for record in read_jsonl(path)]
    else:
        head, *rows = path.read_text().splitlines()
        assert {len(row.split(",")) for row in rows} == {len(head.split(","))}
        steps = [int(row.split(",")[2]) for row in rows]  # after run and kind
    assert steps == [*range(1, 6), *range(12, 21), 20]  # asked in vain at 6 and 8
    assert str(caught[-1].message) == f"6 records were lost by {kind.__name__}, which failed 2 times"
