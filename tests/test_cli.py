"""The ``loopwright`` command."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import loopwright as lw
from loopwright.cli import main
from tiny import line, pairs, sgd_task, trainer


def run_command(*arguments: str, code: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "loopwright", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_the_module_is_a_command_that_says_what_it_can_do() -> None:
    text = run_command("--help")
    assert text.startswith("usage: loopwright ")
    for word in ("env", "runs", "log", "checkpoints", "import-legacy", "replay", "upgrade", "--version"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rums"], "loopwright: error: there is no command 'rums'. Known: "),
        (["rums"], " Did you mean 'runs'?"),
        (["checkpoints", "lss"], "loopwright checkpoints: error: there is no command 'lss'. Known: 'ls', "),
        (["checkpoints", "prune", "x", "--keep", "1", "--kep", "2"], "--kep: there is no such argument. Known: "),
        (["checkpoints", "prune", "x", "--keep", "1", "--kep", "2"], " Did you mean '--keep'?"),
        (["report", "x", "--seriess"], "loopwright report: error: --seriess: there is no such argument. Known: "),
    ],
)
def test_an_unknown_command_or_option_is_refused_with_the_nearest(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert says in capsys.readouterr().err


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: loopwright ")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"loopwright {lw.__version__}\n"


def test_env_prints_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert main(["env"]) == 0
    rows = dict(row.split(maxsplit=1) for row in capsys.readouterr().out.splitlines())
    assert list(rows) == ["loopwright", "python", "torch", "numpy", "platform", "accelerator", "threads"]
    assert rows["loopwright"] == lw.__version__
    assert rows["torch"] == torch.__version__


def test_help_does_not_import_torch() -> None:
    code = "import sys; from loopwright.cli import main; main([]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_runs_are_listed_the_newest_first_with_status_and_metrics(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in (("first", [1.0]), ("second", [2.0])):
        trainer(epochs=1, folder=folder, name=name, checkpoint=False).fit(sgd_task(line()), pairs(data, data))
    task = sgd_task(line(), loss=lambda preds, target: {}["loss"])
    with pytest.raises(KeyError):
        trainer(epochs=1, folder=folder, name="broken", checkpoint=False).fit(task, pairs([1.0]))
    for i, path in enumerate(folder.glob("*/*")):  # a second each apart
        path.rename(path.parent / f"20260101-00000{['first', 'second', 'broken'].index(path.parent.name)}-{i}")
    (folder / "torn" / "0").mkdir(parents=True)
    (folder / "torn" / "0" / "run.json").write_text('{"status": ')
    (folder / "torn" / "1").mkdir()
    (folder / "torn" / "1" / "run.json").write_text("[1]")
    assert main(["runs", str(folder)]) == 0
    lines = [text.replace(str(folder), "runs") for text in capsys.readouterr().out.splitlines()]
    assert [text.split()[1:] for text in lines] == [
        ["failed", "after", "step", "0:", "KeyError:", "'loss'"],
        ["done", "train/loss", "-2", "lr", "1"],
        ["done", "train/loss", "-0.5", "lr", "1"],
        ["unreadable", "run.json"],
        ["unreadable", "run.json"],
    ]
    assert lines[0].startswith("runs/broken/20260101-000002-")


def test_a_run_that_another_rank_has_ended_is_listed_with_what_that_rank_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = ["[loopwright] after epoch 1", "[loopwright] rank 1 failed at step 60, a.py:8: RuntimeError: no disk\nmore"]
    for name, kept in (("a", notes), ("b", 5)):  # a file may be anybody's
        (folder / name / "0").mkdir(parents=True)
        error = {"type": "RuntimeError", "message": "Connection closed by peer", "notes": kept}
        (folder / name / "0" / "run.json").write_text(json.dumps({"status": "failed", "error": error}))
    assert main(["runs", str(folder)]) == 0
    assert sorted(text.partition("  ")[2] for text in capsys.readouterr().out.splitlines()) == [
        "failed       RuntimeError: Connection closed by peer",
        "failed       rank 1 failed at step 60, a.py:8: RuntimeError: no disk",
    ]


def test_metrics_that_are_no_numbers_do_not_stop_the_list(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "run.json").write_text(json.dumps({"metrics": {"x": "nan", "y": 2}}))
    assert main(["runs", str(folder)]) == 0
    assert capsys.readouterr().out.split()[1:] == ["?", "y", "2"]


def test_the_runs_of_a_name_and_a_single_run_are_listed_as_well(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "run.json").write_text(json.dumps({"status": "done"}))
    for given in (folder, folder / "a", folder / "a" / "b"):
        assert main(["runs", str(given)]) == 0
        assert capsys.readouterr().out.split() == [str(folder / "a" / "b"), "done"]


def test_a_run_that_was_killed_does_not_seem_to_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child = subprocess.Popen([sys.executable, "-c", "0"])
    child.wait()
    for pid, host in ((child.pid, platform.node()), (os.getpid(), platform.node()), (child.pid, "elsewhere")):
        (folder / "a" / f"{pid}{host}").mkdir(parents=True)
        record = {"status": "running", "host": host, "pid": pid}
        (folder / "a" / f"{pid}{host}" / "run.json").write_text(json.dumps(record))
    assert main(["runs", str(folder)]) == 0
    told = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert {Path(path).name: status for path, status in told.items()} == {
        f"{child.pid}{platform.node()}": "killed", f"{os.getpid()}{platform.node()}": "running",
        f"{child.pid}elsewhere": "running",
    }  # fmt: skip


def test_a_folder_without_runs_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "nowhere"]) == 0
    assert capsys.readouterr().out == "no runs in nowhere\n"
