"""``loopwright launch`` is torchrun: what it runs, and that real processes meet."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from loopwright.cli import main

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SEVERAL = ["--nodes", "2", "--node-rank", "1", "--address", "node0:29500"]


@pytest.fixture(autouse=True)
def program(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(
        """
import os, sys, time
import torch
from torch import distributed as dist
from loopwright.parallel import find_world, join

world = find_world()
if world.rank == 0 and os.path.exists("failed"):
    time.sleep(1)  # the others look for it first: its old address may not be there
join(world, "cpu", timeout_s=60)
value = torch.tensor([world.rank + 1.0])
dist.all_reduce(value)
if world.rank == 0:
    print(*sys.argv[1:], int(value), world.nodes, world.started_by, flush=True)
if "fail" in sys.argv and world.rank == 0 and not os.path.exists("failed"):
    open("failed", "w").close()
    raise SystemExit(3)
dist.barrier()
"""
    )
    return path


@pytest.mark.parametrize(
    ("options", "command"),
    [
        (["--", "train.py", "--lr", "1", "--", "x"],
         ["--standalone", "--nproc-per-node", "2", "train.py", "--lr", "1", "--", "x"]),
        (["train.py", "--nproc", "9"], ["--standalone", "--nproc-per-node", "2", "train.py", "--nproc", "9"]),
        (["--", "-m", "pkg.train", "-x"], ["--standalone", "--nproc-per-node", "2", "-m", "pkg.train", "-x"]),
        (["--restarts", "3", "--", "train.py"],
         ["--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "train.py"]),
        ([*SEVERAL, "--", "train.py"],
         ["--nnodes", "2", "--node-rank", "1", "--master-addr", "node0", "--master-port", "29500",
          "--nproc-per-node", "2", "train.py"]),
        ([*SEVERAL, "--restarts", "1", "--", "train.py"],
         ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "--nnodes", "2", "--rdzv-backend", "c10d",
          "--rdzv-endpoint", "node0:29500", "--rdzv-id", "loopwright",
          "--rdzv-conf", "is_host=0", "--nproc-per-node", "2", "--max-restarts", "1", "train.py"]),
        (["--nodes", "2", "--node-rank", "0", "--address", "[::1]:29500", "--", "train.py"],
         ["--nnodes", "2", "--node-rank", "0", "--master-addr", "::1", "--master-port", "29500",
          "--nproc-per-node", "2", "train.py"]),
    ],
)  # fmt: skip
def test_a_dry_run_prints_the_command(
    options: list[str], command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--nproc", "2", "--dry-run", *options]) == 0
    variables = [word for word in command if word.startswith("TORCH_")]
    assert shlex.split(capsys.readouterr().out) == [*variables, *TORCHRUN, *command[len(variables) :]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--nproc", "0", "--", "train.py"], "--nproc 0: expected a whole number from 1"),
        (["--nproc", "2", "--restarts", "-1", "--", "train.py"], "--restarts -1: expected a whole number from 0"),
        (
            ["--nproc", "2"],
            "nothing to start; type `loopwright launch --nproc 2 -- train.py`, or -- -m package.train",
        ),
        (
            ["--nproc", "2", "--", "pkg.train"],
            "there is no file 'pkg.train'; a module is started with -- -m package.train",
        ),
        (
            ["--nproc", "2", "--node-rank", "1", "--", "train.py"],
            "--node-rank: one machine needs none; for several add --nodes 2",
        ),
        (
            ["--nproc", "2", "--nodes", "2", "--address", "a:1", "--", "train.py"],
            "--nodes 2, but --node-rank is not given: expected 0 on the first machine, to 1",
        ),
        (
            ["--nproc", "2", "--nodes", "2", "--node-rank", "2", "--address", "a:1", "--", "train.py"],
            "--nodes 2, but --node-rank is 2: expected 0 on the first machine, to 1",
        ),
        (
            ["--nproc", "2", "--nodes", "2", "--node-rank", "1", "--address", "a", "--", "train.py"],
            "--nodes 2, but --address is 'a': expected the first machine and a free port on it, the same on all, such "
            "as --address node0:29500",
        ),
    ],
)
def test_what_cannot_be_launched_says_what_to_type(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *options]) == 2
    assert capsys.readouterr().err == f"loopwright: {says}\n"


def test_its_help_shows_the_line_to_type_and_does_not_import_torch() -> None:
    code = """
import sys
from loopwright.cli import main
try:
    main(["launch", "--help"])
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("usage: loopwright launch --nproc N [--nodes N --node-rank R --address HOST:PORT]")
    assert lines[-1] == "False"


def start(*options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "loopwright", "launch", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    try:
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()  # if it hangs
    return process.returncode, out.splitlines(), err


@pytest.mark.slow
def test_processes_on_one_machine_meet() -> None:
    status, out, err = outcome(start("--nproc", "2", "--", "train.py", "--lr", "1"))
    assert (status, out) == (0, ["--lr 1 3 1 torchrun"]), err


@pytest.mark.slow
def test_the_exit_status_is_that_of_torchrun() -> None:
    status, out, err = outcome(start("--nproc", "1", "--", "train.py", "fail"))
    assert (status, out) == (1, ["fail 1 1 torchrun"]), err


@pytest.mark.slow
@pytest.mark.nightly
def test_after_a_failure_all_start_anew_and_meet_again() -> None:
    status, out, err = outcome(start("--nproc", "2", "--restarts", "1", "--", "train.py", "fail"))
    assert (status, out) == (0, ["fail 3 1 torchrun", "fail 3 1 torchrun"]), err


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("restarts", ["0", "2"])
def test_two_machines_meet_at_an_address_and_again_after_a_failure(restarts: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    machines = [
        start("--nproc", "1", "--nodes", "2", "--node-rank", rank, "--address", address, "--restarts", restarts,
              "--", "-m", "train", *["fail"] * (restarts != "0"))
        for rank in "01"
    ]  # fmt: skip
    done = [outcome(machine) for machine in machines]
    assert [status for status, _, _ in done] == [0, 0], done
    lines = ["3 2 torchrun"] if restarts == "0" else ["fail 3 2 torchrun"] * 2
    assert [line for _, out, _ in done for line in out] == lines
