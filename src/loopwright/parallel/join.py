"""Entering the process group of a run, and leaving it at exit."""

from __future__ import annotations

import atexit
import os
import sys
import time
from datetime import timedelta
from typing import Any, cast

import torch
from torch import distributed as dist

from loopwright.errors import LoopwrightError, SettingError
from loopwright.parallel.world import World
from loopwright.written import warn

__all__ = ["join", "local_device"]

_END_THEM = (
    "Look at what it has printed. torchrun, lw.launch and mpirun end all ranks when one fails; with SLURM, type "
    "`srun --kill-on-bad-exit=1 python train.py`"
)
_TELL_S = 30.0  # of waiting, before it is said for whom


def join(world: World, device_type: str, *, timeout_s: float = 600.0) -> None:
    """Make the process group of ``world``, unless there is one: gloo, and what torch has for an accelerator beside it.

    What is on the CPU goes over gloo, also on an accelerator, whose device of this process is chosen first. A world of
    one process gets a group as well. ``timeout_s`` bounds the wait for the other processes, and each collective.

    The group is left when the process ends in order. One that the user has made is used as it is, and theirs to leave.
    No variable of the environment is changed.

    Raises SettingError if the group at hand cannot send what is on ``device_type``, or other processes are in it, and
    LoopwrightError, which names them, if others have not come in time. Whether they will cannot be known here: a rank
    that imports for minutes and one that has died look alike. What has started them knows, and ends the others.
    """
    if not dist.is_available():
        raise SettingError("this build of torch has no torch.distributed; install one that has it, or train alone")
    if dist.is_initialized():
        _check_group(world, device_type)
        return
    backend, device = "gloo", None
    if device_type != "cpu":
        device = local_device(world, device_type)
        torch.accelerator.set_device_index(device)
        backend = f"cpu:gloo,{device_type}:{_backend(device_type)}"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(
        backend, store=_meeting(world, timeout), rank=world.rank, world_size=world.world_size, timeout=timeout,
        device_id=device,
    )  # fmt: skip
    atexit.unregister(_leave)  # a group that was left and made again is left once
    atexit.register(_leave)


def _meeting(world: World, timeout: timedelta) -> Any:
    """Where the processes tell each other their addresses."""
    if world.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    if world.address is None or world.port is None:
        raise SettingError(
            f"nothing says where the {world.world_size} processes meet. Start them with torchrun, or set MASTER_ADDR "
            "and MASTER_PORT"
        )
    # the agent of torchrun keeps its store over restarts, with the addresses of those that have died in it; agents on
    # several machines do not count alike, hence the variable that `loopwright launch` sets for them
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if world.nodes == 1 else "0"
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # then its store is there already
    began, made = time.monotonic(), cast(Any, dist)
    try:
        store = made.TCPStore(
            world.address, world.port, world.world_size, not agent and world.rank == 0, timeout,
            wait_for_workers=False, multi_tenant=not agent, use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
        )  # fmt: skip
        met = made.PrefixStore(f"loopwright/{again}", store)
        _await_all(met, world, began + timeout.total_seconds())
    except dist.DistNetworkError as error:
        if not agent and world.rank == 0 and "address already in use" in str(error).lower():
            free = world.port + 1 if world.port < 65535 else 29500
            raise LoopwrightError(
                f"rank 0 of {world.world_size} cannot open port {world.port}, where the others are to find it: another "
                f"program has it, or a run that has not ended. Give all ranks another one: type `export "
                f"MASTER_PORT={free}` before you start them"
            ) from error
        where = f"{'the launcher' if agent else 'rank 0'} at {world.address}:{world.port}"
        raise LoopwrightError(
            f"rank {world.rank} of {world.world_size} has waited {time.monotonic() - began:.0f} s to train, and does "
            f"not reach {where}: {str(error).partition(chr(10))[0]}. {_END_THEM}"
        ) from error
    return met


def _await_all(store: Any, world: World, until: float) -> None:
    """Wait until every rank has come, and say who has not."""
    store.set(f"came/{world.rank}", "")
    began, told, keys = time.monotonic(), False, [f"came/{rank}" for rank in range(world.world_size)]
    while True:
        left = max(until - time.monotonic(), 0.001)
        try:
            store.wait(keys, timedelta(seconds=left if told else min(_TELL_S, left / 2)))
            return
        except dist.DistStoreError:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        waited, named = time.monotonic() - began, ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
        who = f"{'rank' if len(missing) == 1 else 'ranks'} {named} of {world.world_size}"
        if missing and told:
            raise LoopwrightError(f"{who} did not come to train within {waited:.0f} s. {_END_THEM}")
        if missing:
            warn(f"rank {world.rank} has waited {waited:.0f} s for {who} to come to train")
        told = True


def local_device(world: World, device_type: str) -> torch.device:
    """The accelerator of this process: the one of its local rank, or the only one that its launcher lets it see.

    Raises SettingError where there are fewer accelerators than processes.
    """
    count = torch.accelerator.device_count()
    if world.local_rank < count:
        return torch.device(device_type, world.local_rank)
    if count == 1 and world.started_by in ("slurm", "mpi"):  # --gpus-per-task hides those of the others
        return torch.device(device_type, 0)
    raise SettingError(
        f"{world.local_world_size} processes were started on this machine, which has {count} devices of type "
        f"{device_type!r}: one each is needed. Start {max(count, 1)}, or train on the CPU: Trainer(device='cpu')"
    )


def _backend(device_type: str) -> str:
    try:
        return dist.get_default_backend_for_device(device_type)
    except ValueError:
        raise SettingError(
            f"torch has nothing to send what is on {device_type!r} with; train on the CPU: Trainer(device='cpu')"
        ) from None


def _check_group(world: World, device_type: str) -> None:
    if (dist.get_rank(), dist.get_world_size()) != (world.rank, world.world_size):
        raise SettingError(
            f"this process is rank {dist.get_rank()} of {dist.get_world_size()} in its process group, and rank "
            f"{world.rank} of {world.world_size} by its launcher; leave the group first: "
            "torch.distributed.destroy_process_group()"
        )
    config = dist.get_backend_config()
    sends = [part.partition(":")[0] for part in config.split(",")]
    missing = [kind for kind in ("cpu", device_type) if kind not in sends]
    if missing:
        raise SettingError(
            f"the process group at hand ({config}) cannot send what is on {missing[0]!r}; make it with "
            "init_process_group() without a backend, which takes one for each kind of device"
        )


def _leave() -> None:
    """Leave the group in an orderly exit only: after an error the others may wait in a collective, or be gone."""
    if dist.is_initialized() and not hasattr(sys, "last_value"):
        dist.destroy_process_group()
