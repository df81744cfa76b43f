"""Which process this is: the variables of every launcher, and those that cannot be right."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import loopwright as lw
from loopwright.parallel import World, check_world, find_world
from loopwright.parallel.world import first_host

TORCHRUN = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29400",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "1234567", "SLURM_JOB_NAME": "train", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NTASKS": "4", "SLURM_NNODES": "2",
    "SLURM_NODELIST": "gpu[07-08]", "SLURM_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
SLURM_PORT = 15000 + 1234567 % 15000


def without(variables: dict[str, str], *names: str, **others: Any) -> dict[str, str]:
    return {k: v for k, v in variables.items() if k not in names} | {k: str(v) for k, v in others.items()}


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, World()),
        (TORCHRUN, World(3, 1, 4, 2, 2, "torchrun", "node0", 29400)),
        (without(TORCHRUN, "GROUP_WORLD_SIZE"), World(3, 1, 4, 2, 2, "torchrun", "node0", 29400)),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", RANK=1),
         World(1, 1, 4, 4, 1, "torchrun", "node0", 29400)),
        ({"WORLD_SIZE": "1"}, World(started_by="torchrun")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, World(started_by="torchrun")),
        ({**SLURM, **TORCHRUN}, World(3, 1, 4, 2, 2, "torchrun", "node0", 29400)),
        (SLURM, World(3, 1, 4, 2, 2, "slurm", "gpu07", SLURM_PORT)),
        (without(SLURM, SLURM_STEP_ID=1), World(3, 1, 4, 2, 2, "slurm", "gpu07", 15000 + (1234567 + 7919) % 15000)),
        ({**SLURM, "MASTER_ADDR": "login", "MASTER_PORT": "9", "WORLD_SIZE": "4"},
         World(3, 1, 4, 2, 2, "slurm", "login", 9)),
        (without(SLURM, SLURM_STEP_NODELIST="gpu08", SLURM_STEP_NUM_NODES=1, SLURM_STEP_NUM_TASKS=2, SLURM_PROCID=1,
                 SLURM_NODEID=0), World(1, 1, 2, 2, 1, "slurm", "127.0.0.1", SLURM_PORT)),
        (without(SLURM, SLURM_TASKS_PER_NODE="3,1", SLURM_LOCALID=0),
         World(3, 0, 4, 1, 2, "slurm", "gpu07", SLURM_PORT)),
        (without(SLURM, SLURM_JOB_NAME="bash"), World()),
        (without(SLURM, SLURM_JOB_NAME="interactive"), World()),
        (without(SLURM, SLURM_STEP_ID=0xFFFFFFFA, SLURM_NTASKS=1), World()),  # the shell of salloc
        (without(SLURM, "SLURM_STEP_ID", SLURM_PROCID=0, SLURM_NTASKS=1), World()),
        ({**MPI, "PMIX_NAMESPACE": "prterun-node-77@1"}, World(1, 1, 2, 2, 1, "mpi", "127.0.0.1", 15000 + 771)),
        ({**MPI, "MASTER_ADDR": "a", "MASTER_PORT": "29500"}, World(1, 1, 2, 2, 1, "mpi", "a", 29500)),
        ({**SLURM, **MPI, "OMPI_COMM_WORLD_SIZE": "4"}, World(1, 1, 4, 2, 2, "mpi", "gpu07", SLURM_PORT)),
    ],
)  # fmt: skip
def test_a_world_is_what_the_launcher_says(environ: dict[str, str], world: World) -> None:
    assert find_world(environ) == world


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        (
            without(TORCHRUN, "LOCAL_RANK", "MASTER_PORT"),
            "the environment has RANK and WORLD_SIZE and MASTER_ADDR but not LOCAL_RANK and MASTER_PORT. Start with "
            "torchrun, which sets them all: `torchrun --nproc-per-node 2 train.py`; or run alone: unset RANK "
            "LOCAL_RANK WORLD_SIZE",
        ),
        (
            without(TORCHRUN, RANK=4),
            "the environment contradicts itself: RANK=4 with WORLD_SIZE=4. These variables are the launcher's; start "
            "anew with `torchrun --nproc-per-node 2 train.py`, or unset what an older launch has left behind",
        ),
        (without(TORCHRUN, LOCAL_RANK=2), "contradicts itself: LOCAL_RANK=2 with LOCAL_WORLD_SIZE=2."),
        (without(TORCHRUN, RANK=0), "contradicts itself: LOCAL_RANK=1 with RANK=0."),
        (without(TORCHRUN, LOCAL_WORLD_SIZE=5), "contradicts itself: LOCAL_WORLD_SIZE=5 with WORLD_SIZE=4."),
        (without(TORCHRUN, GROUP_WORLD_SIZE=5), "contradicts itself: machines=5 with WORLD_SIZE=4."),
        (
            without(TORCHRUN, "LOCAL_WORLD_SIZE"),
            "RANK=3 and LOCAL_RANK=1, but nothing says how many processes run on this machine. Set LOCAL_WORLD_SIZE, "
            "as torchrun does",
        ),
        (
            without(TORCHRUN, RANK="one"),
            "RANK is 'one' in the environment; expected a whole number from 0. Start with `torchrun --nproc-per-node 2 "
            "train.py`, or unset it",
        ),
        (without(TORCHRUN, WORLD_SIZE=0), "WORLD_SIZE is '0' in the environment; expected a whole number from 1."),
        (without(TORCHRUN, MASTER_PORT=70000), "MASTER_PORT=70000: a port is a number from 1 to 65535, such as 29500"),
        (
            without(SLURM, "SLURM_NTASKS"),
            "srun started this process, but SLURM_NTASKS is not set. Say how many tasks: `srun --ntasks=2 ...`",
        ),
        (without(SLURM, SLURM_PROCID=4), "contradicts itself: SLURM_PROCID=4 with SLURM_NTASKS=4."),
        (
            without(SLURM, "SLURM_NODELIST"),
            "srun started 4 tasks on 2 machines, but SLURM_NODELIST does not say which. Set MASTER_ADDR to the machine "
            "of rank 0",
        ),
        (
            without(SLURM, SLURM_NODELIST="gpu[7-"),
            "SLURM_NODELIST='gpu[7-' cannot be read; expected a list such as 'node[003-007,9]'. Set MASTER_ADDR to the "
            "machine of rank 0",
        ),
        (without(MPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE is not set in the environment;"),
        (
            without(MPI, OMPI_COMM_WORLD_SIZE=4),
            "mpirun started 4 processes on 2 machines, and nothing says where rank 0 is. Name its machine: `mpirun -x "
            "MASTER_ADDR=HOST -x MASTER_PORT=29500 python train.py`",
        ),
    ],
)
def test_an_environment_that_cannot_be_right_is_an_error_with_the_fix(environ: dict[str, str], says: str) -> None:
    with pytest.raises(lw.SettingError, match=re.escape(says)):
        find_world(environ)


def test_a_job_of_several_tasks_without_srun_trains_alone_and_says_so() -> None:
    script = without(SLURM, "SLURM_STEP_ID", SLURM_PROCID=0, SLURM_LOCALID=0, SLURM_NODEID=0)
    with pytest.warns(lw.LoopwrightWarning) as caught:
        assert find_world(script) == World()
    assert [str(w.message) for w in caught] == [
        "SLURM gave this job 4 tasks, but this process was not started with srun and trains alone. Type `srun python "
        "train.py` in the job script, or ask for one task: --ntasks=1"
    ]


def test_all_tasks_of_a_step_agree_on_where_they_meet() -> None:
    worlds = [
        find_world(without(SLURM, SLURM_PROCID=rank, SLURM_LOCALID=rank % 2, SLURM_NODEID=rank // 2))
        for rank in range(4)
    ]
    assert [w.rank for w in worlds] == [0, 1, 2, 3]
    assert len({(w.address, w.port, w.world_size, w.nodes, w.local_world_size) for w in worlds}) == 1


# ------------------------------------------------------------------------------------------------ lists of machines

words = st.from_regex(r"[a-z][a-z0-9-]{0,5}[a-z]", fullmatch=True)
numbers = st.from_regex(r"[0-9]{1,4}", fullmatch=True)
ranges = st.lists(st.tuples(numbers, st.none() | numbers), min_size=1, max_size=3)
parts = st.lists(st.tuples(words, st.none() | ranges), min_size=1, max_size=3)


def written(host: list[Any], *, first: bool) -> str:
    """A host as SLURM writes it, or the first one that it stands for."""
    text = ""
    for word, groups in host:
        text += word
        if groups is not None:
            listed = ",".join(a if b is None else f"{a}-{b}" for a, b in groups)
            text += groups[0][0] if first else f"[{listed}]"
    return text


@given(st.lists(parts, min_size=1, max_size=4))
def test_the_first_machine_of_any_list_is_found(hosts: list[Any]) -> None:
    assert first_host(",".join(written(host, first=False) for host in hosts)) == written(hosts[0], first=True)


@given(st.text(alphabet="ab01[]-, \n", max_size=12))
def test_any_other_text_gives_a_name_or_an_error_of_ours(text: str) -> None:
    host = None
    with suppress(lw.SettingError):
        host = first_host(text)
    assert host is None or re.fullmatch(r"[ab01-]+", host)


# ------------------------------------------------------------------------------------------------ what was asked for


@pytest.mark.parametrize(
    ("world", "devices", "nodes"),
    [(World(), "auto", "auto"), (World(), 1, 1), (World(3, 1, 4, 2, 2, "torchrun"), 2, 2), (World(), 1, "auto")],
)
def test_what_was_launched_is_taken_and_equal_numbers_pass(world: World, devices: Any, nodes: Any) -> None:
    check_world(world, devices, nodes)


@pytest.mark.parametrize(
    ("world", "devices", "nodes", "says"),
    [
        (
            World(), 2, "auto",
            "devices=2, but 1 process was started here. Start 2 with `loopwright launch --nproc 2 -- train.py` or "
            "`torchrun --nproc-per-node 2 train.py`, in a notebook with lw.launch(fn, nproc=2); or leave devices out "
            "to take what was started",
        ),
        (
            World(1, 1, 4, 4, 1, "torchrun"), 2, 1,
            "devices=2, but 4 processes were started here. Start 2 with `loopwright launch --nproc 2 -- train.py` or "
            "`torchrun --nproc-per-node 2 train.py`, in a notebook with lw.launch(fn, nproc=2); or leave devices out "
            "to take what was started",
        ),
        (
            World(), 2, 3,
            "nodes=3, but 1 machine takes part. Start it with `loopwright launch --nproc 2 --nodes 3 --node-rank 0 "
            "--address HOST:29500 -- train.py`, on the others with --node-rank 1 and so on; or leave nodes out to take "
            "what was started",
        ),
        (
            World(3, 1, 4, 2, 2, "slurm"), "auto", 1,
            "nodes=1, but 2 machines take part. Start it alone; or leave nodes out to take what was started",
        ),
        (World(), 0, "auto", "devices=0: expected 'auto' or a whole number from 1"),
        (World(), "auto", True, "nodes=True: expected 'auto' or a whole number from 1"),
        (World(), "two", "auto", "devices='two': expected 'auto' or a whole number from 1"),
    ],
)  # fmt: skip
def test_a_number_that_was_not_launched_is_an_error_that_says_what_to_type(
    world: World, devices: Any, nodes: Any, says: str
) -> None:
    with pytest.raises(lw.SettingError) as caught:
        check_world(world, devices, nodes)
    assert str(caught.value) == says
