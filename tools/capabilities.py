"""Write docs/capabilities.md: which capability is proved by which passing tests.

Usage: ``python tools/capabilities.py PROVED.json [...] docs/capabilities.md``, where each PROVED.json comes from
``pytest --capabilities PROVED.json``; ``make capabilities`` does both.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

HEAD = """\
# Capabilities

Each line is something that a user can do, with the tests that prove it. Only tests that passed are listed.
Written by `make capabilities`; do not edit.

| id | what | proved by |
|---|---|---|
"""


def table(proved: dict[str, list[dict[str, str]]]) -> str:
    """The whole page for ``{id: [{"test": node id, "claim": line}, ...]}``; equal input gives equal text."""
    rows = []
    for name in sorted(proved, key=_natural):
        tests = sorted(proved[name], key=lambda row: row["test"])
        claims = dict.fromkeys(row["claim"].replace("|", "\\|") for row in tests)
        files = dict.fromkeys(f"`{row['test'].split('::')[0]}`" for row in tests)
        rows.append(f"| {name} | {'<br>'.join(claims)} | {'<br>'.join(files)} |\n")
    return HEAD + "".join(rows)


def _natural(name: str) -> tuple[str, int]:
    letters, _, number = name.rpartition("-")
    return letters, int(re.sub(r"\D", "", number) or 0)


if __name__ == "__main__":
    *sources, target = map(Path, sys.argv[1:])
    found: dict[str, list[dict[str, str]]] = {}
    for source in sources:
        for name, rows in json.loads(source.read_text(encoding="utf-8")).items():
            found.setdefault(name, []).extend(rows)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(table(found), encoding="utf-8")
    print(f"{target}: {len(found)} capabilities proved")
