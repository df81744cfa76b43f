"""``loopwright launch``: torchrun, with the options that are usually meant."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from loopwright.errors import SettingError

__all__ = ["launch", "torchrun_command"]


def launch(
    program: Sequence[str], *, nproc: int, nodes: int, node_rank: int | None, address: str | None, restarts: int,
    dry: bool,
) -> int:  # fmt: skip
    """Become torchrun, which starts ``program`` ``nproc`` times; signals and the exit status are its own."""
    command = torchrun_command(
        program, nproc=nproc, nodes=nodes, node_rank=node_rank, address=address, restarts=restarts
    )
    # with it, processes on several machines meet at a new port after a restart, where nobody has left an old address
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if nodes > 1 and restarts else {}
    if not dry:
        sys.stdout.flush()
        os.execve(command[0], command, os.environ | variables)
    print(*(f"{name}={value}" for name, value in variables.items()), shlex.join(command))
    return 0


def torchrun_command(
    program: Sequence[str], *, nproc: int, nodes: int = 1, node_rank: int | None = None, address: str | None = None,
    restarts: int = 0,
) -> list[str]:  # fmt: skip
    """The command for ``program``, a script or ``-m module`` with its arguments.

    On one machine torchrun finds a free port. On several, all meet at ``address``; with restarts they meet there anew
    after each failure, and torchrun chooses the order of the ranks. Raises SettingError for what cannot work.

    >>> torchrun_command(["-m", "pkg.train", "--lr", "1"], nproc=2)[1:]
    ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'pkg.train', '--lr', '1']
    """
    for name, value, least in (("nproc", nproc, 1), ("nodes", nodes, 1), ("restarts", restarts, 0)):
        if value < least:
            raise SettingError(f"--{name} {value}: expected a whole number from {least}")
    program = list(program[1:] if program[:1] == ["--"] else program)
    if not program or program == ["-m"]:
        raise SettingError(
            f"nothing to start; type `loopwright launch --nproc {nproc} -- train.py`, or -- -m package.train"
        )
    if program[0] != "-m" and not Path(program[0]).is_file():
        raise SettingError(f"there is no file {program[0]!r}; a module is started with -- -m package.train")
    where = _one_machine(node_rank, address) if nodes == 1 else _machines(nodes, node_rank, address, restarts)
    again = ["--max-restarts", str(restarts)] if restarts else []
    return [
        sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(nproc), *again, *program,
    ]  # fmt: skip


def _one_machine(node_rank: int | None, address: str | None) -> list[str]:
    given = [name for name, value in (("--node-rank", node_rank), ("--address", address)) if value is not None]
    if given:
        raise SettingError(f"{' and '.join(given)}: one machine needs none; for several add --nodes 2")
    return ["--standalone"]


def _machines(nodes: int, node_rank: int | None, address: str | None, restarts: int) -> list[str]:
    if node_rank is None or not 0 <= node_rank < nodes:
        said = "is not given" if node_rank is None else f"is {node_rank}"
        raise SettingError(f"--nodes {nodes}, but --node-rank {said}: expected 0 on the first machine, to {nodes - 1}")
    host, port = address_of(address, nodes)
    if restarts:  # only this way do the others learn of a failure, and come back
        host = f"[{host}]" if ":" in host else host
        first = "1" if node_rank == 0 else "0"
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{port}", "--rdzv-id", "loopwright"]
        return ["--nnodes", str(nodes), *meet, "--rdzv-conf", f"is_host={first}"]
    meet = ["--master-addr", host, "--master-port", port]
    return ["--nnodes", str(nodes), "--node-rank", str(node_rank), *meet]


def address_of(address: str | None, nodes: int) -> tuple[str, str]:
    """Host and port of ``host:port`` or ``[ipv6]:port``."""
    found = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\s]+)):(\d{1,5})", address or "")
    if found is None or not 0 < int(found[3]) < 2**16:
        said = "is not given" if address is None else f"is {address!r}"
        raise SettingError(
            f"--nodes {nodes}, but --address {said}: expected the first machine and a free port on it, the same on "
            "all, such as --address node0:29500"
        )
    return found[1] or found[2], found[3]
