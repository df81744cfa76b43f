"""The ``loopwright`` command. Torch is imported only where a command needs it."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from loopwright import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    >>> main(["runs", "no-such-folder"])
    no runs in no-such-folder
    0
    """
    parser = argparse.ArgumentParser(
        prog="loopwright", description="A training framework for PyTorch with one readable loop."
    )
    parser.add_argument("--version", action="version", version=f"loopwright {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("env", help="versions and hardware, to paste into a bug report")
    runs = commands.add_parser("runs", help="list the runs in a folder, the newest first")
    runs.add_argument("folder", nargs="?", default="runs", type=Path, help="where the runs are (default: runs)")
    args = parser.parse_args(argv)
    if args.command == "env":
        return _env()
    if args.command == "runs":
        return _runs(args.folder)
    parser.print_help()
    return 0


def _env() -> int:
    import numpy
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    rows = {
        "loopwright": __version__, "python": sys.version.split()[0], "torch": torch.__version__,
        "numpy": numpy.__version__, "platform": platform.platform(), "accelerator": str(accelerator or "none"),
        "threads": str(torch.get_num_threads()),
    }  # fmt: skip
    for name, value in rows.items():
        print(f"{name:<12} {value}")
    return 0


def _runs(folder: Path) -> int:
    found = sorted(folder.glob("*/*/run.json"), key=lambda path: path.parent.name, reverse=True)
    if not found:
        print(f"no runs in {folder}")
    for path in found:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            metrics = dict(record.get("metrics") or {})
        except (OSError, ValueError, AttributeError, TypeError):
            print(f"{path.parent}  unreadable run.json")
            continue
        shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, (int, float)))
        print(f"{path.parent}  {record.get('status', '?'):<11} {shown}")
    return 0
