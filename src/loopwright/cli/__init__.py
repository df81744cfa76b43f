"""The ``loopwright`` command. Torch is imported only where a command needs it."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from loopwright import __version__
from loopwright.errors import LoopwrightError, choose

__all__ = ["main"]

_RUN = "a run folder, its folder checkpoints, runs/NAME for the newest run of that name, or one checkpoint"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for what was found (damage, old names), 2 for what failed.

    >>> main(["runs", "no-such-folder"])
    no runs in no-such-folder
    0
    """
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        args.parser.error(f"{unknown[0]}: there is no such argument. {choose(unknown[0], args.parser.options)}")
    try:
        status: int = args.command(args)
        sys.stdout.flush()
    except (LoopwrightError, ImportError) as error:  # an extra may be missing
        print(f"loopwright: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `loopwright ... | head` has read enough; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


class _Parser(argparse.ArgumentParser):
    """Names the nearest command or option where one is misspelt."""

    @property
    def options(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]

    def error(self, message: str) -> NoReturn:
        commands = next((action.choices for action in self._actions if isinstance(action.choices, dict)), {})
        wrong = re.match(r"argument COMMAND: invalid choice: '(.*)' \(", message)
        super().error(f"there is no command {wrong[1]!r}. {choose(wrong[1], commands)}" if wrong else message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="loopwright", description="A training framework for PyTorch with one readable loop.")
    parser.add_argument("--version", action="version", version=f"loopwright {__version__}")
    parser.set_defaults(command=_help(parser), parser=parser)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")

    _add(commands, "env", _env, "versions and hardware, to paste into a bug report")
    runs = _add(commands, "runs", _runs, "list the runs in a folder, the newest first")
    runs.add_argument("folder", nargs="?", default="runs", type=Path, help="where the runs are (default: runs)")

    report = _add(commands, "report", _report, "a page that shows a run, or several side by side: one file, no network")
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or runs/NAME for the newest of that name")
    report.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help="where to write it (default: report.html in the folder of a run, comparison.html here for several)",
    )  # fmt: skip
    report.add_argument(
        "--series", nargs="+", metavar="NAME", help="draw these curves only, such as valid/loss 'grad/*' (default: all)"
    )

    log = _add(commands, "log", _log, "send what a run has recorded to another logger")
    log.add_argument("run", metavar="RUN", help="a run folder, or runs/NAME for the newest run of that name")
    log.add_argument(
        "--to", required=True, metavar="LOGGER",
        help="its name: tensorboard, mlflow, wandb, csv, or one that is installed; a colon and its first argument may "
        "follow, such as mlflow:http://server:5000",
    )  # fmt: skip
    log.add_argument("--again", action="store_true", help="send all of it, also what was sent there before")

    _add_launch(_add(commands, "launch", _launch, "start a script in several processes, through torchrun"))

    checkpoints = _add(commands, "checkpoints", None, "list, show, verify and prune the checkpoints of a run")
    _add_checkpoints(checkpoints.add_subparsers(metavar="COMMAND", title="commands"))

    legacy = _add(commands, "import-legacy", _import, "make a checkpoint of what another program saved")
    legacy.description = (
        "Turn the weights that another program saved (a state dict of PyTorch, a checkpoint of Lightning, safetensors) "
        "into a checkpoint. A pickle is read in a process of its own, in which it may hold tensors and plain data: "
        "whatever else it asks for is refused, and nothing in it is executed."
    )
    legacy.add_argument("source", type=Path, metavar="SOURCE", help="the file to read")
    legacy.add_argument("dest", metavar="DEST", help="the folder to write; it may not exist yet")
    legacy.add_argument("--key", help="where in the file the weights are, such as state_dict (default: looked for)")
    legacy.add_argument(
        "--prefix", default="", help="begin of the names to keep, and to take off them, such as model. (with the dot)"
    )

    upgrade = _add(commands, "upgrade", _upgrade, "rewrite code that uses old names of Loopwright")
    upgrade.description = (
        "Show, as a diff, what is to be changed in code that uses old names of Loopwright, or change it with --write: "
        "those names, and no byte beside them. Exit status: 0 if nothing is left to do, 1 if there is, 2 if a file "
        "could not be read or written (the others are done)."
    )
    upgrade.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a file, or a folder for all .py in it")
    upgrade.add_argument("--write", action="store_true", help="change the files")

    replay = _add(commands, "replay", _replay, "run the step that failed again, from its crash capsule")
    replay.add_argument(
        "capsule", type=Path, metavar="CAPSULE",
        help="the folder that the failed run wrote; of a run, or runs/NAME, the newest one is taken",
    )  # fmt: skip
    replay.add_argument("--task", required=True, metavar="MODULE:FUNCTION", help="what makes the task of that run")
    return parser


def _add_launch(launch: argparse.ArgumentParser) -> None:
    launch.usage = (
        "loopwright launch --nproc N [--nodes N --node-rank R --address HOST:PORT] [--restarts K] [--dry-run] "
        "-- train.py [ARGUMENT ...]"
    )
    launch.add_argument("--nproc", type=int, required=True, metavar="N", help="processes on this machine")
    launch.add_argument("--nodes", type=int, default=1, metavar="N", help="machines; type the command on each of them")
    launch.add_argument("--node-rank", type=int, metavar="R", help="which machine this is: 0, 1, ...")
    launch.add_argument("--address", metavar="HOST:PORT", help="where they meet: a free port on machine 0")
    launch.add_argument(
        "--restarts", type=int, default=0, metavar="K",
        help='start all processes anew after a failure, up to K times; with fit(resume="auto") they go on',
    )  # fmt: skip
    launch.add_argument("--dry-run", action="store_true", help="print what would be run")
    launch.add_argument(
        "program", nargs=argparse.REMAINDER, metavar="-- train.py",
        help="a script, or -m and a module, with its arguments",
    )  # fmt: skip


def _add_checkpoints(commands: Any) -> None:
    ls = _add(commands, "ls", _ls, "list checkpoints in the order in which they were written")
    ls.add_argument("run", metavar="RUN", help=_RUN)
    ls.add_argument("--verify", action="store_true", help="read every file and say which checkpoints are good")
    ls.add_argument("--json", action="store_true", help="print JSON")

    show = _add(commands, "show", _show, "what a checkpoint holds: progress, metrics, versions, tensors, settings")
    show.description = f"{show.description} Every file is compared with its checksum; exit status 1 if one is damaged."
    show.add_argument("path", metavar="PATH", help="a checkpoint, or a run, whose newest one is shown")
    show.add_argument("--all", action="store_true", help="list the tensors of optimizers and other state as well")
    show.add_argument("--json", action="store_true", help="print JSON (with all tensors)")

    verify = _add(commands, "verify", _verify, "compare every file with its checksum; exit status 1 if one is damaged")
    verify.add_argument("path", metavar="RUN_OR_PATH", help=_RUN)

    prune = _add(commands, "prune", _prune, "delete old checkpoints, never the last one nor the best")
    prune.add_argument("run", metavar="RUN", help=_RUN)
    prune.add_argument("--keep", type=int, required=True, metavar="N", help="how many of the newest to keep")
    prune.add_argument("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")


def _add(commands: Any, name: str, run: Callable[[Any], int] | None, what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    parser.set_defaults(command=run or _help(parser), parser=parser)
    return parser


def _help(parser: argparse.ArgumentParser) -> Callable[[Any], int]:
    def show(args: Any) -> int:
        parser.print_help()
        return 0

    return show


# what a command needs is imported when it runs


def _env(args: Any) -> int:
    from loopwright.cli.runs import print_environment

    return print_environment()


def _runs(args: Any) -> int:
    from loopwright.cli.runs import print_runs

    return print_runs(args.folder)


def _report(args: Any) -> int:
    from loopwright.report import write

    print(write(args.runs, args.output, series=args.series))
    return 0


def _log(args: Any) -> int:
    from loopwright.cli.runs import send_run

    return send_run(args.run, args.to, again=args.again)


def _launch(args: Any) -> int:
    from loopwright.cli.launch import launch

    return launch(
        args.program, nproc=args.nproc, nodes=args.nodes, node_rank=args.node_rank, address=args.address,
        restarts=args.restarts, dry=args.dry_run,
    )  # fmt: skip


def _ls(args: Any) -> int:
    from loopwright.cli.checkpoints import print_list

    return print_list(args.run, verified=args.verify, as_json=args.json)


def _show(args: Any) -> int:
    from loopwright.cli.show import print_checkpoint

    return print_checkpoint(args.path, every=args.all, as_json=args.json)


def _verify(args: Any) -> int:
    from loopwright.cli.checkpoints import print_verified

    return print_verified(args.path)


def _prune(args: Any) -> int:
    from loopwright.cli.checkpoints import prune

    return prune(args.run, keep=args.keep, dry=args.dry_run)


def _import(args: Any) -> int:
    from loopwright.cli.imported import print_imported

    return print_imported(args.source, args.dest, key=args.key, prefix=args.prefix)


def _upgrade(args: Any) -> int:
    from loopwright.cli.upgrade import upgrade

    return upgrade(args.paths, write=args.write)


def _replay(args: Any) -> int:
    from loopwright.replaying import replay_command

    return replay_command(args.capsule, args.task)
