"""The recipes in docs/recipes: short, listed in their index, and each asserts its effect (test_docs runs them)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import loopwright as lw

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


TEN_PAPERS = {
    "mixup": "callbacks.md: `lw.MixUp(",
    "SAM": "callbacks.md: `lw.SAM(",
    "manifold mixup": "augmentation.md: Manifold mixup (Verma et al. 2018",
    "cutout": "augmentation.md: Cutout (DeVries and Taylor 2017",
    "BC+": "augmentation.md: Between-class learning, BC+ (Tokozume et al. 2018",
    "sample pairing": "augmentation.md: Sample pairing (Inoue 2018",
    "adversarial training": "augmentation.md: Adversarial training by the fast gradient sign (Goodfellow et al. 2014",
    "LSUV": "starting_and_predicting.md: LSUV initialisation (Mishkin and Matas 2016",
    "distillation": "losses.md: Knowledge distillation (Hinton et al. 2015",
    "DCGAN": "dcgan.md: DCGAN (Radford et al. 2016",
}


@pytest.mark.parametrize("paper", TEN_PAPERS)
def test_ten_papers_are_there_and_touch_nothing_inside(paper: str) -> None:
    """Ten odd ideas of ten papers: two ship as callbacks, eight are recipes that use public names and patch nothing."""
    page, _, title = TEN_PAPERS[paper].partition(": ")
    if page == "callbacks.md":
        text = (FOLDER.parent / page).read_text(encoding="utf-8")
        assert f"| {title}" in text
        assert issubclass(getattr(lw, title[4:-1]), lw.Callback)
        return
    text = (FOLDER / page).read_text(encoding="utf-8")
    assert re.search(rf"^#+ {re.escape(title)}", text, re.MULTILINE)
    assert touched("\n".join(CODE.findall(text))) == []


def touched(code: str) -> list[str]:
    """What ``code`` takes from inside of Loopwright: modules that are not public, private names, names it assigns."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("loopwright."):
            module = getattr(lw, (node.module or "").partition(".")[2], None)
            found += [
                f"{node.module}.{one.name}" for one in node.names if one.name not in getattr(module, "__all__", ())
            ]
        if isinstance(node, ast.Attribute):
            path = ast.unparse(node).split(".")
            ours = path[0] in ("lw", "loopwright", "run", "trainer")
            if ours and any(name.startswith("_") for name in path):
                found.append(".".join(path))
            if path[0] in ("lw", "loopwright") and isinstance(node.ctx, (ast.Store, ast.Del)):
                found.append(f"{'.'.join(path)} = ...")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr" and ast.unparse(node.args[0])[:2] == "lw":
            found.append(ast.unparse(node))
    return found


def test_what_a_recipe_takes_from_inside_is_found() -> None:
    code = """
from loopwright.optim import Stepwise
from loopwright.loop import train_step
lw.loop.train_step = None
setattr(lw.Trainer, "fit", None)
run._place
lw.data.limit
"""
    assert sorted(touched(code)) == [
        "loopwright.loop.train_step", "lw.loop.train_step = ...", "run._place", "setattr(lw.Trainer, 'fit', None)",
    ]  # fmt: skip
