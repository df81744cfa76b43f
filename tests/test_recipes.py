"""The recipes in docs/recipes: short, listed in their index, and each asserts its effect (test_docs runs them)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "recipes"
SECTION = re.compile(r"^## ", re.MULTILINE)
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def recipes() -> dict[str, str]:
    """The code of each recipe by its title, with the page before it."""
    found = {}
    for page in sorted(FOLDER.glob("*.md")):
        for section in SECTION.split(page.read_text(encoding="utf-8"))[1:]:
            found[f"{page.name}: {section.splitlines()[0]}"] = "\n".join(CODE.findall(section))
    return found


@pytest.mark.parametrize("title", recipes())
def test_a_recipe_is_short_and_asserts_what_it_does(title: str) -> None:
    code = recipes()[title]
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith("assert ")]
    assert len(lines) <= 40
    assert re.search(r"^(assert |torch\.testing\.assert)", code, re.MULTILINE)


def test_the_index_lists_every_recipe_and_links_to_its_page() -> None:
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = [line for line in index.splitlines() if line.startswith("| ")][1:]
    linked = [re.search(r"\(([a-z_]+\.md)\)", row) for row in rows]
    assert all(linked)
    counts: dict[str, int] = {}
    for title in recipes():
        page = title.partition(":")[0]
        counts[page] = counts.get(page, 0) + 1
    counts |= dict.fromkeys(["ranking.md", "dcgan.md", "cyclegan.md", "semi_supervised.md"], 1)  # a page is a recipe
    listed = [match[1] for match in linked if match]
    assert {page: listed.count(page) for page in set(listed)} == counts
