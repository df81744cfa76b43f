"""``loopwright checkpoints``: ls, show, verify, prune."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loopwright as lw
from loopwright.checkpoint import list_checkpoints, read, write, write_index
from loopwright.cli import main
from loopwright.folder import hold

RUN = Path("runs/digits/20260101-000000-abcdef")
VALUES = {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.6}

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``loopwright checkpoints ...``: exit status, output, errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["checkpoints", *arguments])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


def make(step: int, **info: Any) -> Path:
    """A checkpoint of ``RUN``, the second the best of four."""
    RUN.mkdir(parents=True, exist_ok=True)
    (RUN / "run.json").write_text('{"status": "done", "pid": 1, "host": "here"}')
    (RUN / "config.yaml").write_text("epochs: 5\nname: digits\n")
    weight = torch.arange(6.0).reshape(2, 3)
    about = {
        "step": 10 * step, "epoch": step // 2, "batch": 3 * (step % 2), "samples": 1200 * step, "seconds": 62.0,
        "stage": "main", "metrics": {"valid/accuracy": VALUES[step], "train/loss": 0.25}, "exact": True,
        "written": f"2026-01-01T00:00:0{step}+00:00", "versions": {"loopwright": "0.1.0", "torch": "2.13.0"},
        "monitor": "valid/accuracy", "mode": "max", "value": VALUES[step], **info,
    }  # fmt: skip
    state = {"optimizers": {"main": {"m": torch.zeros(2, 3)}}, "rng": torch.zeros(4, dtype=torch.uint8)}
    path = RUN / "checkpoints" / f"step-{10 * step:08d}"
    write(path, {"model": {"w": weight, "tied": weight, "half": torch.ones(2).bfloat16()}}, state, about)
    return path


def make_all() -> list[Path]:
    paths = [make(step) for step in VALUES]
    write_index(RUN / "checkpoints", last=paths[-1], best=paths[1])
    return paths


def damage(path: Path, name: str = "model.safetensors") -> Path:
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)
    return path / name


# ---------------------------------------------------------------------------------------------------- ls


@pytest.mark.parametrize("where", ["runs/digits", str(RUN), str(RUN / "checkpoints")])
def test_checkpoints_are_listed_as_they_were_written(where: str, command: Command, monkeypatch: Any) -> None:
    monkeypatch.setenv("TZ", "UTC")
    make_all()
    status, text, _ = command("ls", where)
    assert status == 0
    lines = text.splitlines()
    assert lines[0].split() == ["checkpoint", "step", "epoch", "written", "size", "valid/accuracy", "exact"]
    assert [line.split()[:3] for line in lines[1:5]] == [
        ["step-00000010", "10", "0"], ["step-00000020", "20", "1"], ["step-00000030", "30", "1"],
        ["step-00000040", "40", "2"],
    ]  # fmt: skip
    assert [line.split("yes")[1].strip() for line in lines[1:5]] == ["", "best", "", "last"]
    assert "0 +3 " in lines[1]
    assert "0.9000" in lines[2]
    assert lines[-1].startswith("4 checkpoints, ")
    assert lines[-1].endswith(f", in {RUN}/checkpoints")


def test_columns_are_aligned(command: Command) -> None:
    make_all()
    lines = command("ls", str(RUN))[1].splitlines()
    assert len({line.index("yes") for line in lines[1:5]} | {lines[0].index("exact")}) == 1
    assert len({line.index("0.") + 6 for line in lines[1:5]} | {lines[0].index("valid/accuracy") + 14}) == 1


def test_one_checkpoint_can_be_listed_with_its_place_among_the_others(command: Command) -> None:
    path = make_all()[1]
    lines = command("ls", str(path))[1].splitlines()
    assert len(lines) == 4
    assert lines[1].endswith("best")
    assert lines[-1].startswith("1 checkpoint, ")


def test_the_newest_run_of_a_name_is_taken(command: Command) -> None:
    make_all()
    newer = RUN.with_name("20260202-000000-000000")
    shutil.copytree(RUN, newer)
    assert f", in {newer}/checkpoints" in command("ls", "runs/digits")[1]
    shutil.rmtree(newer / "checkpoints")
    status, _, error = command("ls", "runs/digits")
    assert (status, error) == (2, f"loopwright: the run {newer} has no checkpoints (yet)\n")


def test_ls_says_which_are_damaged_only_when_it_has_looked(command: Command) -> None:
    bad = damage(make_all()[2])
    assert command("ls", str(RUN))[0] == 0
    status, text, _ = command("ls", str(RUN), "--verify")
    lines = text.splitlines()
    assert status == 1
    assert [line.endswith("good") for line in lines[1:5]] == [True, True, False, True]
    assert f"DAMAGED: {bad} is damaged: its blake2b is " in lines[3]


def test_an_inexact_checkpoint_and_one_without_a_value_show_it(command: Command) -> None:
    make(1, exact=["a generator is hidden in a module"], monitor=None, value=None)
    lines = command("ls", str(RUN))[1].splitlines()
    assert lines[0].split() == ["checkpoint", "step", "epoch", "written", "size", "exact"]
    assert lines[1].split()[-2:] == ["no", "last"]


def test_each_monitored_value_has_its_best(command: Command) -> None:
    make_all()
    make(1, monitor="train/loss", mode="min", value=0.2)
    text = command("ls", str(RUN))[1]
    assert [line.split()[0] for line in text.splitlines() if "best valid/accuracy" in line] == ["step-00000020"]
    assert [line.split()[0] for line in text.splitlines() if "best train/loss" in line] == ["step-00000010"]


def test_the_list_as_json(command: Command) -> None:
    paths = make_all()
    rows = json.loads(command("ls", str(RUN), "--json")[1])
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert rows[1] == {
        "path": str(paths[1]), "name": "step-00000020", "step": 20, "epoch": 1, "batch": 0,
        "written": "2026-01-01T00:00:02+00:00", "monitor": "valid/accuracy", "value": 0.9, "exact": True,
        "size": sum(file.stat().st_size for file in paths[1].iterdir()), "marks": ["best"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("runs/digit", "runs/digit does not exist. Known: 'digits'. Did you mean 'digits'?"),
        ("runs", "runs is no run and no checkpoint. It holds runs named digits: give runs/digits"),
        ("empty", "empty is no run and no checkpoint"),
        ("rums", "rums does not exist. Known: 'runs'. Did you mean 'runs'?"),
        ("empty/nope", "empty/nope does not exist"),
    ],
)
def test_a_path_without_checkpoints_is_an_error_that_says_what_to_type(
    path: str, message: str, command: Command
) -> None:
    make(1)
    Path("empty").mkdir()
    assert command("ls", path) == (2, "", f"loopwright: {message}\n")


# ---------------------------------------------------------------------------------------------------- show


def test_show_prints_what_the_manifest_says(command: Command, monkeypatch: Any) -> None:
    make_all()
    make(3, exact=["the sampler draws index by index", "a stream without position"])
    status, text, _ = command("show", str(RUN / "checkpoints" / "step-00000030"))
    assert status == 0
    rows = [line.split(maxsplit=1) for line in text.splitlines()]
    for row in (
        ["stage", "main"], ["step", "30"], ["epoch", "1"], ["batch", "3"], ["samples", "3,600"], ["time", "1:02"],
        ["exact", "no, since"], ["-", "the sampler draws index by index"], ["-", "a stream without position"],
        ["versions", "loopwright 0.1.0, torch 2.13.0"], ["metrics", "valid/accuracy  0.7000  (monitored)"],
        ["train/loss", "0.2500"], ["model.safetensors", "3 tensors, 8 values, 28 B"],
        ["w", "float32   [2, 3]  24 B"], ["half", "bfloat16  [2]      4 B"], ["tied", "is w"],
        ["optimizer.safetensors", "1 tensor, 6 values, 24 B"], ["state.safetensors", "1 tensor, 4 values, 4 B"],
        ["epochs:", "5"], ["name:", "digits"],
    ):  # fmt: skip
        assert row in rows, (row, text)
    assert "optimizers['main']['m']" not in text
    assert "optimizers['main']['m']" in command("show", str(RUN), "--all")[1]


def test_show_prints_what_schedules_were_made_with(command: Command) -> None:
    net = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=4)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.25, patience=3)
    task = lw.Supervised(net, torch.nn.MSELoss(), optimizer, schedule=[cycle, lw.Scheduler(plateau)])
    data = [(torch.ones(2, 1), torch.ones(2, 1))]
    run = lw.Trainer(epochs=1, name="s", progress=False).fit(task, data, data)
    lines = [line.strip() for line in command("show", str(run.folder))[1].splitlines()]
    start = lines.index("- class: <torch.optim.lr_scheduler.OneCycleLR>")
    assert {"every: step", "max_lr: 0.5000", "total_steps: 4"} <= set(lines[start:])
    start = lines.index("- class: <torch.optim.lr_scheduler.ReduceLROnPlateau>")
    assert lines[start : start + 6] == [
        "- class: <torch.optim.lr_scheduler.ReduceLROnPlateau>", "every: epoch", "monitor: valid/loss", "mode: min",
        "factor: 0.2500", "patience: 3",
    ]  # fmt: skip


def test_show_as_json_holds_everything(command: Command) -> None:
    path = make_all()[1]
    make(2, metrics={"valid/loss": float("nan")})
    shown = json.loads(command("show", str(path), "--json")[1])
    assert shown["path"] == str(path)
    assert shown["info"]["metrics"] == {"valid/loss": "nan"}
    assert shown["settings"] == {"epochs": 5, "name": "digits"}
    model = shown["files"]["model.safetensors"]
    assert model["tensors"] == {
        "w": {"dtype": "float32", "shape": [2, 3], "count": 6, "bytes": 24},
        "half": {"dtype": "bfloat16", "shape": [2], "count": 2, "bytes": 4},
        "tied": {"tied_to": "w"},
    }
    assert set(shown["files"]) == {"model.safetensors", "optimizer.safetensors", "state.safetensors", "state.json"}


def test_types_that_are_stored_as_bytes_are_shown_as_they_are(command: Command) -> None:
    write("c/a", {"model": {"z": torch.zeros(2, 2, dtype=torch.complex64)}}, {}, {"step": 1})
    shown = json.loads(command("show", "c/a", "--json")[1])
    assert shown["files"]["model.safetensors"]["tensors"]["z"] == {
        "dtype": "complex64", "shape": [2, 2], "count": 4, "bytes": 32,
    }  # fmt: skip


def test_show_of_a_damaged_file_says_how_to_check(command: Command) -> None:
    path = make(1)
    (path / "model.safetensors").write_bytes(b"x" * 100)
    status, _, error = command("show", str(path))
    assert status == 2
    assert f"{path}/model.safetensors cannot be read as tensors" in error
    assert f"loopwright checkpoints verify {path}" in error


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_show_of_a_checkpoint_with_a_wrong_bit_shows_it_and_ends_with_1(name: str, command: Command) -> None:
    paths = make_all()
    assert "DAMAGED" not in command("show", str(paths[0]))[1]
    bad = damage(paths[0], name)
    status, text, _ = command("show", str(paths[0]))
    assert status == 1
    assert "optimizer.safetensors" in text
    assert text.splitlines()[-2].startswith(f"DAMAGED: {bad} is damaged: its blake2b is ")
    assert text.splitlines()[-1] == f"Which to use instead: loopwright checkpoints verify {RUN}/checkpoints"
    status, text, _ = command("show", str(paths[0]), "--json")
    assert status == 1
    assert json.loads(text)["damage"].startswith(f"{bad} is damaged")
    assert json.loads(command("show", str(paths[1]), "--json")[1])["damage"] is None


def test_what_a_terminal_would_obey_is_written_out(command: Command) -> None:
    path = make(1, metrics={"\x1b[2Jclear": 1.0}, monitor="\x1b]0;title\x07")
    for arguments in (["ls", str(path)], ["show", str(path)]):
        text = command(*arguments)[1]
        assert "\x1b" not in text
        assert "\\x1b" in text


# ---------------------------------------------------------------------------------------------------- verify


def test_verify_is_silent_about_nothing_and_ends_with_0_when_all_is_good(command: Command) -> None:
    paths = make_all()
    status, text, _ = command("verify", str(RUN))
    assert status == 0
    assert [line.split()[:2] for line in text.splitlines()] == [["good", str(path)] for path in paths]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.safetensors", "state.json"])
def test_verify_names_the_bad_file_and_the_newest_good_checkpoint(name: str, command: Command) -> None:
    paths = make_all()
    bad = damage(paths[3], name)
    status, text, _ = command("verify", str(RUN))
    assert status == 1
    assert f"DAMAGED {paths[3]}  {bad} is damaged: its blake2b is " in text
    assert text.splitlines()[-2:] == [
        f"1 of 4 damaged. The newest good one is {paths[2]}",
        f"To go on from it: fit(..., resume='{paths[2]}')",
    ]
    status, text, _ = command("verify", str(paths[3]))
    assert status == 1
    assert f"1 of 1 damaged. The newest good one is {paths[2]}" in text


def test_verify_says_when_no_good_one_is_left(command: Command) -> None:
    damage(make(1), "manifest.json")
    status, text, _ = command("verify", str(RUN))
    assert status == 1
    assert text.splitlines()[-1] == f"1 of 1 damaged. No good one is left in {RUN}/checkpoints"


def test_verify_in_a_process_of_its_own_sets_the_exit_status() -> None:
    path = make(1)
    damage(path)
    done = subprocess.run([sys.executable, "-m", "loopwright", "checkpoints", "verify", str(path)], check=False,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1
    assert "model.safetensors is damaged" in done.stdout


# ---------------------------------------------------------------------------------------------------- prune


def names() -> list[str]:
    return [path.name[-2:] for path in list_checkpoints(RUN / "checkpoints")]


@pytest.mark.parametrize(("keep", "left"), [(1, ["20", "40"]), (2, ["20", "30", "40"]), (9, ["10", "20", "30", "40"])])
def test_prune_keeps_the_newest_the_last_and_the_best(keep: int, left: list[str], command: Command) -> None:
    make_all()
    status, text, _ = command("prune", str(RUN), "--keep", str(keep))
    assert status == 0
    assert names() == left
    assert text.count("deleted ") == 4 - len(left)
    assert f"{len(left)} of 4 checkpoints kept" in text
    assert read(RUN / "checkpoints" / "step-00000040").info["step"] == 40


def test_prune_leaves_an_index_of_what_is_left(command: Command) -> None:
    """The best by each value that was watched stays, and the index says so also where it knew none."""
    for step in VALUES:
        make(step, others=[{"monitor": "valid/loss", "mode": "min", "value": VALUES[step]}])
    (RUN / "checkpoints" / "index.json").write_text('{"last": "step-00000040", "best": null}')
    _, text, _ = command("prune", str(RUN), "--keep", "1")
    assert names() == ["10", "20", "40"]
    assert [line.split("  ")[-1] for line in text.splitlines() if line.startswith("kept")] == [
        "best valid/loss", "best valid/accuracy", "last",
    ]  # fmt: skip
    told = json.loads((RUN / "checkpoints" / "index.json").read_text())
    assert told == {"last": "step-00000040", "best": "step-00000020"}


def test_prune_can_be_tried_first(command: Command) -> None:
    make_all()
    text = command("prune", str(RUN), "--keep", "1", "--dry-run")[1]
    assert f"would delete  {RUN}/checkpoints/step-00000010" in text
    assert f"would keep    {RUN}/checkpoints/step-00000020  best" in text
    assert names() == ["10", "20", "30", "40"]


def test_prune_leaves_a_good_checkpoint_where_the_newest_are_damaged(command: Command) -> None:
    paths = make_all()
    damage(paths[3])
    damage(paths[1])
    text = command("prune", str(RUN), "--keep", "1")[1]
    assert names() == ["20", "30", "40"]
    assert f"{paths[2]}  newest good" in text


def test_prune_refuses_while_another_process_trains_there(command: Command) -> None:
    make_all()
    code = (
        "import sys; from loopwright.folder import hold; file = hold(sys.argv[1]); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(RUN)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        status, _, error = command("prune", str(RUN), "--keep", "1")
        assert status == 2
        assert f"{RUN} is in use" in error
        assert names() == ["10", "20", "30", "40"]
        assert command("prune", str(RUN), "--keep", "1", "--dry-run")[0] == 0
        other.communicate(b"\n")
    assert command("prune", str(RUN), "--keep", "1")[0] == 0
    hold(RUN).close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([str(RUN), "--keep", "0"], "--keep 0: expected how many of the newest checkpoints to keep, from 1"),
        ([str(RUN / "checkpoints" / "step-00000010"), "--keep", "1"],
         f"{RUN}/checkpoints/step-00000010 is one checkpoint, and prune takes a run: {RUN}"),
    ],
)  # fmt: skip
def test_prune_refuses_what_it_cannot_mean(arguments: list[str], message: str, command: Command) -> None:
    make_all()
    assert command("prune", *arguments) == (2, "", f"loopwright: {message}\n")
    assert names() == ["10", "20", "30", "40"]


def test_checkpoints_behind_a_url_are_listed_shown_verified_and_pruned(command: Command) -> None:
    pytest.importorskip("fsspec")
    for step in (1, 2, 3):
        write(f"memory://bucket/run/checkpoints/step-{step}", {"model": {"w": torch.ones(2)}}, {}, {"step": step})
    assert "step-2" in command("ls", "memory://bucket/run")[1]
    assert "1 tensor, 2 values" in command("show", "memory://bucket/run")[1]
    assert command("verify", "memory://bucket/run")[0] == 0
    assert "2 of 3 checkpoints kept" in command("prune", "memory://bucket/run", "--keep", "2")[1]
    assert [path.name for path in list_checkpoints("memory://bucket/run/checkpoints")] == ["step-2", "step-3"]


def test_a_reader_that_has_seen_enough_ends_the_command_quietly() -> None:
    path = make(1)
    line = f"{sys.executable} -m loopwright checkpoints show {path} --json | head -n 1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{\n", "")
