"""What lies in a run folder: its path, and a line about each thing in it.

Run: python examples/run_folder.py runs/digits/<time>-<id>
"""

from __future__ import annotations

import sys
from pathlib import Path

ABOUT = {
    "report.png": "this report as a picture: curves, confusions, hardest images",
    "report.txt": "the tables above",
    "report.html": "the run as a page: curves to zoom into, confusions, images, settings",
    "report": "what the page shows besides the rest of this folder",
    "metrics.jsonl": "every logged value, one JSON record a line",
    "checkpoints": "the best weights and the last, as safetensors and JSON",
    "run.json": "command, seed, versions, git commit, final metrics",
    "config.yaml": "the settings of the trainer",
    "environment.txt": "all installed packages",
    "environment.conda.txt": "those of the conda environment",
    "source.zip": "the code that ran",
    "framework.zip": "the source of Loopwright as it was",
}


def describe_folder(folder: Path) -> str:
    """The path of a run folder and a line about each thing in it."""
    names = (p.name for p in folder.iterdir() if not p.name.startswith("."))
    names = sorted(names, key=lambda name: ([*ABOUT, name].index(name), name))
    width = max(map(len, names)) + 2
    return "\n".join([f"{folder}/", *(f"  {name:{width}}{ABOUT.get(name, '')}".rstrip() for name in names)])


if __name__ == "__main__":
    print(describe_folder(Path(sys.argv[1])))
