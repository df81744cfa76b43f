"""Runs a script in several processes that are forked from one that has torch already: ``ranked.py 3 script.py ...``."""

from __future__ import annotations

import runpy
import sys

import torch  # noqa: F401 - here, and not in each of them

import loopwright as lw


def main(world: str, script: str, *args: str) -> None:
    def rank() -> None:
        sys.argv = [script, *args]
        runpy.run_path(script, run_name="__main__")

    lw.launch(rank, int(world))


if __name__ == "__main__":
    main(*sys.argv[1:])
