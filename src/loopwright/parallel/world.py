"""Which process this is among those that were started together, told by its environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from torch import distributed as dist

from loopwright.errors import SettingError
from loopwright.written import warn

__all__ = ["World", "check_counts", "check_world", "find_world", "first_host", "in_batch_job"]

_LOCALHOST = "127.0.0.1"
_NUMBERS = re.compile(r"\[(\d+)(?:-\d+)?(?:,\d+(?:-\d+)?)*\]")
_HOST = re.compile(rf"(?:[^\[\],\s]|{_NUMBERS.pattern})+")
_UNSET = "or run alone: unset RANK LOCAL_RANK WORLD_SIZE"


@dataclass(frozen=True, slots=True)
class World:
    """The place of this process among the ``world_size`` processes of a run; all numbers count from 0.

    ``local_rank`` and ``local_world_size`` count on this machine, ``nodes`` counts machines. ``address`` and ``port``
    are where rank 0 is met, None where nothing tells. ``started_by`` is what the numbers come from.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    nodes: int = 1
    started_by: Literal["torchrun", "slurm", "mpi", "group", "single"] = "single"
    address: str | None = None
    port: int | None = None


def find_world(environ: Mapping[str, str] = os.environ) -> World:
    """The world that launched this process, from the first of these that describes it.

    torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); mpirun's (OMPI_COMM_WORLD_*); those
    of a SLURM step that srun started, unless the job is interactive; a single process. mpirun comes before SLURM: it
    starts its daemons with srun, whose numbers are not those of the ranks. A process group that exists already is
    right where the environment differs: then ``started_by`` is "group".

    Nothing is changed or opened. Raises SettingError for variables that are incomplete or contradict one another, and
    warns inside a SLURM job of several tasks that was not started with srun.

    >>> find_world({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}).rank
    1
    >>> find_world({})
    World(rank=0, local_rank=0, world_size=1, local_world_size=1, nodes=1, started_by='single', address=None, port=None)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return _launched(environ)
    rank, size = dist.get_rank(), dist.get_world_size()
    with suppress(SettingError):  # whoever made the group may have had other sources
        found = _launched(environ)
        if (found.rank, found.world_size) == (rank, size):
            return found
    return World(rank, rank, size, size, 1, "group")


def _launched(environ: Mapping[str, str]) -> World:
    by_srun, by_mpirun = _is_srun_task(environ), "OMPI_COMM_WORLD_RANK" in environ
    given = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in environ]
    if given and not (given == ["WORLD_SIZE"] and (by_srun or by_mpirun)):  # which job scripts export for themselves
        return _of_torchrun(environ)
    if by_mpirun:
        return _of_mpi(environ)
    if by_srun:
        return _of_slurm(environ)
    if in_batch_job(environ) and _number(environ, "SLURM_NTASKS", 1) > 1:
        warn(
            f"SLURM gave this job {environ['SLURM_NTASKS']} tasks, but this process was not started with srun and "
            "trains alone. Type `srun python train.py` in the job script, or ask for one task: --ntasks=1"
        )
    return World()


def check_counts(devices: int | str, nodes: int | str) -> None:
    """Raise SettingError for a number of processes or of machines that cannot be one."""
    for name, value in (("devices", devices), ("nodes", nodes)):
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise SettingError(f"{name}={value!r}: expected 'auto' or a whole number from 1")


def check_world(world: World, devices: int | str, nodes: int | str) -> None:
    """Compare what was launched with what was asked for: a number of processes on this machine, and of machines.

    "auto" takes what was launched. Raises SettingError with what to type where a number is another.

    >>> check_world(World(), 2, "auto")
    Traceback (most recent call last):
    loopwright.errors.SettingError: devices=2, but 1 process was started here. Start 2 with
    `loopwright launch --nproc 2 -- train.py` or `torchrun --nproc-per-node 2 train.py`, in a notebook with
    lw.launch(fn, nproc=2); or leave devices out to take what was started
    """
    check_counts(devices, nodes)
    if nodes not in ("auto", world.nodes):
        n = world.local_world_size if devices == "auto" else devices
        here = "1 machine takes" if world.nodes == 1 else f"{world.nodes} machines take"
        again = f"`loopwright launch --nproc {n} --nodes {nodes} --node-rank 0 --address HOST:29500 -- train.py`"
        how = f"with {again}, on the others with --node-rank 1 and so on" if nodes != 1 else "alone"
        raise SettingError(
            f"nodes={nodes}, but {here} part. Start it {how}; or leave nodes out to take what was started"
        )
    if devices not in ("auto", world.local_world_size):
        n = world.local_world_size
        here = "1 process was" if n == 1 else f"{n} processes were"
        raise SettingError(
            f"devices={devices}, but {here} started here. Start {devices} with `loopwright launch --nproc {devices} -- "
            f"train.py` or `torchrun --nproc-per-node {devices} train.py`, in a notebook with lw.launch(fn, "
            f"nproc={devices}); or leave devices out to take what was started"
        )


# ---------------------------------------------------------------------------------------------- launchers


def _of_torchrun(environ: Mapping[str, str]) -> World:
    alone = environ.get("WORLD_SIZE") == "1"
    needed = ["RANK", "WORLD_SIZE"] if alone else ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needed if name not in environ]
    if missing and not (alone and missing == ["RANK"]):
        there = [name for name in needed if name in environ]
        raise SettingError(
            f"the environment has {' and '.join(there)} but not {' and '.join(missing)}. Start with torchrun, which "
            f"sets them all: `torchrun --nproc-per-node 2 train.py`; {_UNSET}"
        )
    rank, size = _number(environ, "RANK", 0), _number(environ, "WORLD_SIZE", least=1)
    local_rank = _number(environ, "LOCAL_RANK", 0)
    if "LOCAL_WORLD_SIZE" not in environ and rank != local_rank:
        raise SettingError(
            f"RANK={rank} and LOCAL_RANK={local_rank}, but nothing says how many processes run on this machine. Set "
            "LOCAL_WORLD_SIZE, as torchrun does"
        )
    local_size = _number(environ, "LOCAL_WORLD_SIZE", size, least=1)
    nodes = _number(environ, "GROUP_WORLD_SIZE", -(-size // local_size), least=1)
    address, port = _meeting(environ)
    return _checked(World(rank, local_rank, size, local_size, nodes, "torchrun", address, port))


def _of_mpi(environ: Mapping[str, str]) -> World:
    rank, size, local_rank, local_size = (
        _number(environ, f"OMPI_COMM_WORLD_{name}") for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    )
    nodes = -(-size // max(local_size, 1))
    address, port = _meeting(environ, local=nodes == 1)
    if address is None:
        raise SettingError(
            f"mpirun started {size} processes on {nodes} machines, and nothing says where rank 0 is. Name its machine: "
            "`mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 python train.py`"
        )
    return _checked(World(rank, local_rank, size, local_size, nodes, "mpi", address, port))


def _of_slurm(environ: Mapping[str, str]) -> World:
    rank, local_rank = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID")
    size = _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", -1))
    node = _number(environ, "SLURM_NODEID", 0)
    if size == -1:
        raise SettingError(
            "srun started this process, but SLURM_NTASKS is not set. Say how many tasks: `srun --ntasks=2 ...`"
        )
    nodes = _number(environ, "SLURM_STEP_NUM_NODES", _number(environ, "SLURM_NNODES", 1))
    local_size = _tasks_here(environ, node) or -(-size // max(nodes, 1))
    address, port = _meeting(environ, local=nodes == 1)
    if address is None:
        raise SettingError(
            f"srun started {size} tasks on {nodes} machines, but SLURM_NODELIST does not say which. Set MASTER_ADDR to "
            "the machine of rank 0"
        )
    return _checked(World(rank, local_rank, size, local_size, nodes, "slurm", address, port))


def _is_srun_task(environ: Mapping[str, str]) -> bool:
    """Job scripts have SLURM_PROCID and SLURM_NTASKS too, with one process: the number of a step is srun's alone."""
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    of_its_own = step.isdecimal() and int(step) < 0xFFFFFFF0  # above are the job script and shells
    return "SLURM_PROCID" in environ and (of_its_own or "SLURM_STEP_NUM_TASKS" in environ) and in_batch_job(environ)


def in_batch_job(environ: Mapping[str, str] = os.environ) -> bool:
    """True inside a SLURM job that is not a shell to work in: named bash or interactive, as SLURM names these.

    >>> in_batch_job({"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "bash"})
    False
    """
    return "SLURM_JOB_ID" in environ and environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def _tasks_here(environ: Mapping[str, str], node: int) -> int | None:
    """From "2(x3),1": 2 tasks on each of three machines, 1 on the fourth."""
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "")).split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        counts += [int(found[1])] * int(found[2] or 1) if found else []
    return counts[node] if node < len(counts) else None


def first_host(nodes: str) -> str:
    """The first machine of a list as SLURM writes it.

    >>> first_host("node[003-007,9],login")
    'node003'
    """
    found = _HOST.match(nodes)
    if found is None or nodes[found.end() : found.end() + 1] not in ("", ","):
        raise SettingError(
            f"SLURM_NODELIST={nodes!r} cannot be read; expected a list such as 'node[003-007,9]'. Set MASTER_ADDR to "
            "the machine of rank 0"
        )
    return _NUMBERS.sub(r"\1", found[0])


# ---------------------------------------------------------------------------------------------- variables


def _meeting(environ: Mapping[str, str], *, local: bool = False) -> tuple[str | None, int | None]:
    """Where rank 0 is met: what the user or torchrun set, else the first machine of the job and a port of its own."""
    listed = next(
        (environ[n] for n in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST") if n in environ), ""
    )
    address = environ.get("MASTER_ADDR") or (_LOCALHOST if local else first_host(listed) if listed else None)
    if "MASTER_PORT" in environ:
        port = _number(environ, "MASTER_PORT")
        if not 0 < port < 2**16:
            raise SettingError(f"MASTER_PORT={port}: a port is a number from 1 to 65535, such as 29500")
        return address, port
    if address is None:
        return None, None
    # one for each job and step, below the ports that systems hand out (from 32768)
    job = environ.get("SLURM_JOB_ID") or re.sub(r"\D", "", environ.get("PMIX_NAMESPACE", "")) or "14500"
    step = environ.get("SLURM_STEP_ID", "0") if "OMPI_COMM_WORLD_RANK" not in environ else "0"
    return address, 15000 + (int(job) + 7919 * int(step)) % 15000


def _number(environ: Mapping[str, str], name: str, default: int | None = None, *, least: int = 0) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isascii() or not text.isdecimal() or int(text) < least:
        said = "is not set" if text is None else f"is {text!r}"
        raise SettingError(
            f"{name} {said} in the environment; expected a whole number from {least}. Start with "
            f"`torchrun --nproc-per-node 2 train.py`, or unset it"
        )
    return int(text)


def _checked(world: World) -> World:
    """Refuse numbers that cannot be true together."""
    w = world
    names = {
        "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        "mpi": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
        "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "tasks on this machine"),
    }[w.started_by]
    wrong = (
        (names[0], w.rank, names[1], w.world_size, w.rank >= w.world_size),
        (names[2], w.local_rank, names[3], w.local_world_size, w.local_rank >= w.local_world_size),
        (names[2], w.local_rank, names[0], w.rank, w.local_rank > w.rank),
        (names[3], w.local_world_size, names[1], w.world_size, w.local_world_size > w.world_size),
        ("machines", w.nodes, names[1], w.world_size, w.nodes > w.world_size),
    )
    for one, a, other, b, is_wrong in wrong:
        if is_wrong:
            raise SettingError(
                f"the environment contradicts itself: {one}={a} with {other}={b}. These variables are the launcher's; "
                "start anew with `torchrun --nproc-per-node 2 train.py`, or unset what an older launch has left behind"
            )
    return world
