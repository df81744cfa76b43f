"""Process groups: made once, the user's own used as it is, left at exit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import distributed as dist

import loopwright as lw
from loopwright.parallel import World, find_world, join, local_device

PAIR = World(0, 0, 2, 2, 1, "torchrun", "127.0.0.1", 1)


def test_a_group_is_made_once_and_the_environment_stays_as_it_is() -> None:
    def twice() -> Any:
        before, world = dict(os.environ), find_world()
        join(world, "cpu")
        group = dist.group.WORLD
        join(find_world(), "cpu")
        assert dist.group.WORLD is group
        assert find_world() == world  # the launcher still says who started it
        return dict(os.environ) == before, dist.get_backend(), dist.get_rank(), dist.get_world_size()

    assert lw.launch(twice, 2) == [(True, "gloo", 0, 2), (True, "gloo", 1, 2)]


def test_a_process_alone_gets_a_group_as_well() -> None:
    def alone() -> Any:
        join(World(), "cpu")
        value = torch.ones(2)
        dist.all_reduce(value)
        return value.tolist(), dist.get_world_size()

    assert lw.launch(alone, 1) == [([1.0, 1.0], 1)]


def test_a_group_that_the_user_made_is_used_and_tells_the_ranks_where_no_launcher_does() -> None:
    def own() -> Any:
        rank, meet = int(os.environ["RANK"]), f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}"
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
        group, world = dist.group.WORLD, find_world()
        join(world, "cpu")
        assert dist.group.WORLD is group
        return world

    assert lw.launch(own, 2) == [World(0, 0, 2, 2, 1, "group"), World(1, 1, 2, 2, 1, "group")]


def test_a_group_that_cannot_serve_is_an_error() -> None:
    def other_ranks() -> None:
        join(World(), "cpu")
        join(PAIR, "cpu")

    with pytest.raises(lw.SettingError) as caught:
        lw.launch(other_ranks, 1)
    assert str(caught.value) == (
        "this process is rank 0 of 1 in its process group, and rank 0 of 2 by its launcher; leave the group first: "
        "torch.distributed.destroy_process_group()"
    )

    def no_device() -> None:
        join(World(), "cpu")
        join(World(), "meta")

    with pytest.raises(lw.SettingError, match="cannot send what is on 'meta'; make it with init_process_group"):
        lw.launch(no_device, 1)


def test_a_world_that_does_not_say_where_to_meet_is_an_error() -> None:
    with pytest.raises(lw.SettingError) as caught:
        join(World(0, 0, 2, 2, 1, "group"), "cpu")
    assert str(caught.value) == (
        "nothing says where the 2 processes meet. Start them with torchrun, or set MASTER_ADDR and MASTER_PORT"
    )
    assert not dist.is_initialized()


@pytest.mark.parametrize("libuv", ["0", "1"])
def test_a_port_that_is_taken_is_told_as_that(libuv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_LIBUV", libuv)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(lw.LoopwrightError) as caught:
            join(World(0, 0, 2, 2, 1, "slurm", "127.0.0.1", port), "cpu", timeout_s=5)
    assert str(caught.value) == (
        f"rank 0 of 2 cannot open port {port}, where the others are to find it: another program has it, or a run that "
        f"has not ended. Give all ranks another one: type `export MASTER_PORT={port + 1}` before you start them"
    )
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="counts the accelerators of this machine")
def test_more_processes_than_devices_are_refused() -> None:
    with pytest.raises(lw.SettingError) as caught:
        local_device(PAIR, "cuda")
    assert str(caught.value) == (
        "2 processes were started on this machine, which has 0 devices of type 'cuda': one each is needed. Start 1, or "
        "train on the CPU: Trainer(device='cpu')"
    )


SLURM = {
    "SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "train", "SLURM_STEP_ID": "0", "SLURM_PROCID": "{}", "SLURM_LOCALID": "{}",
    "SLURM_NODEID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_NODELIST": "gpu[07-08]",
}  # fmt: skip
MPI = {
    "OMPI_COMM_WORLD_RANK": "{}", "OMPI_COMM_WORLD_LOCAL_RANK": "{}", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.capability("CA-38")
@pytest.mark.parametrize("variables", [SLURM, MPI], ids=["srun", "mpirun"])
def test_processes_of_other_launchers_meet_without_an_agent(variables: dict[str, str]) -> None:
    """Tasks of a SLURM step on one machine find each other by its variables and a port, in torch's process group."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    code = """
import torch
from torch import distributed as dist
from loopwright.parallel import find_world, join
world = find_world()
join(world, "cpu", timeout_s=60)
value = torch.tensor([world.rank + 1.0])
dist.all_reduce(value)
print(world.rank, world.started_by, int(value))
"""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {name: text.format(rank) for name, text in variables.items()} | {"MASTER_PORT": port},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=120) for rank in ranks]
    kind = "slurm" if variables is SLURM else "mpi"
    assert [out for out, _ in said] == [f"0 {kind} 3\n", f"1 {kind} 3\n"], said


@pytest.mark.parametrize(("end", "status", "left"), [("", 0, True), ("sys.exit(143)", 143, True), ("1 / 0", 1, False)])
def test_the_group_is_left_at_an_orderly_exit_and_at_no_other(end: str, status: int, left: bool) -> None:
    code = f"""
import atexit, sys
from torch import distributed as dist
from loopwright.parallel import World, join
atexit.register(lambda: print("left", not dist.is_initialized()))
join(World(), "cpu")
join(World(), "cpu")
{end}
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, f"left {left}\n"), done.stderr
    assert "destroy_process_group" not in done.stderr
