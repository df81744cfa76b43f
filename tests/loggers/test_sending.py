"""Runs that were recorded before reach another logger afterwards."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

import loopwright as lw
from loopwright.cli import main
from loopwright.loggers import read_jsonl, send
from tiny import line, pairs, sgd_task, trainer

DATA = pairs([1.0], [2.0], [3.0], [4.0])


class Keep:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start(self, run: lw.Run) -> None:
        self.calls.append(("start", run.folder and run.folder.name))

    def log_config(self, config: Any) -> None:
        self.calls.append(("config", config["settings"]["optimizers"]["main"]["lr"], config["data"]["kind"]))

    def log(self, progress: lw.Progress, values: Any, kind: str) -> None:
        self.calls.append((kind, progress.step, dict(values)))

    def log_text(self, progress: lw.Progress, name: str, text: str) -> None:
        self.calls.append(("text", progress.step, name, text))

    def log_artifact(self, progress: lw.Progress, name: str, path: Path) -> None:
        self.calls.append(("artifact", name, path.name))

    def close(self, status: str) -> None:
        self.calls.append(("close", status))


@pytest.fixture
def recorded(folder: Path) -> Path:
    user = trainer(epochs=1, log_every=2, folder=folder, name="digits")
    Path("weights.bin").write_bytes(b"w")
    user.on(lw.Event.STEP_END(once=2))(lambda run: run.log({"a/note": "see", "weights": Path("weights.bin")}))
    run = user.fit(sgd_task(line(), lr=0.25), DATA)
    assert run.folder is not None
    return run.folder


def test_a_run_is_named_as_its_folder_and_without_one_as_its_trainer_or_task(folder: Path) -> None:
    for settings, name in (
        ({"folder": folder, "name": "digits"}, "digits"), ({"name": "digits"}, "digits"), ({}, "Supervised"),
    ):  # fmt: skip
        run = trainer(epochs=1, **settings).fit(sgd_task(line()), DATA)
        assert lw.loggers.run_name(run) == (name, run.folder.name if run.folder else "")


def test_a_recorded_run_is_sent_as_it_was_logged(recorded: Path) -> None:
    live, late = Keep(), Keep()
    trainer(epochs=1, log_every=2, loggers=[live]).fit(sgd_task(line(), lr=0.25), DATA)
    assert send(recorded, late) == 3
    records = [call for call in late.calls if call[0] in ("train", "valid", "epoch")]
    assert records == [call for call in live.calls if call[0] in ("train", "valid", "epoch")]
    assert [call for call in late.calls if call not in records] == [
        ("start", recorded.name), ("config", 0.25, "list of batches"), ("text", 2, "a/note", "see"),
        ("artifact", "artifacts/weights", "weights.bin"), ("close", "done"),
    ]  # fmt: skip


def test_nothing_is_sent_twice_unless_it_is_asked_for(recorded: Path) -> None:
    assert send(recorded, Keep()) == 3
    with (recorded / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "test", "step": 4, "test/loss": "NaN"}\n{"kind": "tr')
    again = Keep()
    assert send(recorded, again) == 1
    assert [call[0] for call in again.calls] == ["start", "test", "close"]
    assert send(recorded, Keep(), again=True) == 4


def test_a_table_that_is_sent_to_grows(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["log", str(recorded), "--to", "csv:table.csv"]) == 0
    with (recorded / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "test", "step": 4, "test/loss": 0.5}\n')
    assert main(["log", str(recorded.parent), "--to", "csv:table.csv"]) == 0
    rows = list(csv.DictReader(Path("table.csv").read_text().splitlines()))
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("train", "2"),
        ("train", "4"),
        ("epoch", "4"),
        ("test", "4"),
    ]
    assert capsys.readouterr().out.splitlines() == [
        f"3 records of {recorded} sent to csv:table.csv", f"1 record of {recorded} sent to csv:table.csv",
    ]  # fmt: skip


def test_a_line_that_is_torn_is_told_with_its_number(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (recorded / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "test", "st')
    assert main(["log", str(recorded), "--to", "csv:table.csv"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"3 records of {recorded} sent to csv:table.csv",
        f"left out: line 4 of {recorded / 'metrics.jsonl'}, which was not written to its end",
    ]


def test_a_line_in_the_middle_that_is_no_record_is_left_out_with_its_number(recorded: Path) -> None:
    """As the report does: what follows it is sent as well, and once."""
    file = recorded / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1][:20], *lines[1:], "[2]"]) + "\n")
    told = f"2 lines of {file} could not be read: line 2, 5. They are left out, the others are sent"
    with pytest.warns(lw.LoopwrightWarning) as caught:
        assert main(["log", str(recorded), "--to", "csv:table.csv"]) == 0
    assert [str(one.message) for one in caught] == [told]
    assert len(list(csv.DictReader(Path("table.csv").read_text().splitlines()))) == 3
    with file.open("a") as more:
        more.write('{"kind": "test", "step": 4, "test/loss": 0.5}\n')
    with pytest.warns(lw.LoopwrightWarning, match="could not be read: line 2, 5"):
        assert send(recorded, "csv:table.csv") == 1


class Buffered:
    """Sends at ``flush``, and what is left at a good end."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.sent: list[int] = []

    def log(self, progress: lw.Progress, values: Any, kind: str) -> None:
        self.rows.append(progress.step)

    def flush(self) -> None:
        self.sent, self.rows = self.sent + self.rows, []

    def close(self, status: str) -> None:
        if status != "failed":
            self.flush()


def test_a_logger_that_holds_records_back_gets_those_of_a_failed_run_as_well(folder: Path) -> None:
    user = trainer(epochs=1, log_every=1, folder=folder)

    @user.on(lw.Event.STEP_END(once=3))
    def fail(run: lw.Run) -> None:
        raise OSError("the power went off")

    with pytest.raises(OSError, match="the power went off"):
        user.fit(sgd_task(line(), lr=0.25), DATA)
    (run,) = (path.parent for path in folder.rglob("run.json"))
    late = Buffered()
    assert send(run, late) == len(late.sent) >= 2


@pytest.mark.parametrize(
    ("run", "to", "says"),
    [
        ("RUN/figures", "csv", "RUN/figures is a folder of a run; give that: RUN"),
        ("nowhere", "csv", "nowhere does not exist. "),
        ("empty", "csv", "empty is not the folder of a run: it has no run.json. "),
        ("RUN", "cvs", "there is no logger named 'cvs'. Known: "),
    ],
)
def test_the_command_says_what_is_wrong(
    run: str, to: str, says: str, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    (recorded / "figures").mkdir()
    assert main(["log", run.replace("RUN", str(recorded)), "--to", to]) == 2
    assert capsys.readouterr().err.startswith(f"loopwright: {says.replace('RUN', str(recorded))}")


def test_a_folder_that_is_no_run_is_an_error(recorded: Path) -> None:
    Path("empty").mkdir()
    with pytest.raises(lw.SettingError) as error:
        send("empty", Keep())
    assert str(error.value) == (
        "empty is no run: it has no run.json that can be read. Give the folder of a run, such as "
        "runs/digits/20261121-101500-1a2b3c"
    )
    with pytest.raises(lw.SettingError, match=r"loggers=\[5\]: expected objects with log\(\)"):
        send(recorded, 5)


def test_what_a_hostile_folder_says_does_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run folder of somebody else: names that lead elsewhere, values of wrong types, a nest of aliases, a link."""
    run = tmp_path / "theirs" / "a\x1b[2Jb"
    run.mkdir(parents=True)
    (run / "run.json").write_text(
        '{"name": "../../x", "status": "d\\u001bone", "data": [1], "git": "no", "versions": 7}'
    )
    (run / "config.yaml").write_text("a: &a [1, 2]\nb: &b [*a, *a]\nc: [*b, *b]\n")
    (run / "metrics.jsonl").write_text(
        '{"kind": 7, "step": "x", "epoch": null, "../../evil": 1.5, "nested": {"a": 1}, "big": true}\n'
        '{"step": 2, "y": "NaN"}\n'
    )
    (run / "texts").mkdir()
    (run / "texts" / "link-00000001.txt").symlink_to("/etc/passwd")
    keep = Keep()
    keep.log_config = lambda config: keep.calls.append(config["settings"])  # type: ignore[method-assign]
    assert send(run, keep) == 2
    assert [c for c in keep.calls if isinstance(c, dict)] == [{}]
    assert not [c for c in keep.calls if "text" in c]
    assert main(["log", str(run), "--to", "csv:t.csv"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert read_jsonl(run / "metrics.jsonl")[1]["step"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.csv", "theirs"]
