"""Print the requirements of dependency groups, one a line: pip before 25.1 cannot read pyproject's.

Usage: ``python tools/groups.py dev build``
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(groups: dict[str, list[Any]], name: str) -> Iterator[str]:
    """Requirements of group ``name``, with ``{include-group = "..."}`` entries opened up in their place."""
    if name not in groups:
        raise SystemExit(f"no dependency group {name!r} in pyproject.toml; known: {', '.join(sorted(groups))}")
    for entry in groups[name]:
        if isinstance(entry, dict):
            yield from requirements(groups, entry["include-group"])
        else:
            yield entry


if __name__ == "__main__":
    table = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["dependency-groups"]
    for group in sys.argv[1:]:
        print("\n".join(requirements(table, group)))
