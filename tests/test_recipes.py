"""The recipes in docs/recipes: short, listed in their index, and each asserts its effect (test_docs runs them)."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import loopwright as lw

FOLDER = Path(__file__).parent.parent / "docs" / "recipes"
SECTION = re.compile(r"^## ", re.MULTILINE)
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def recipes() -> dict[str, str]:
    """The code of each recipe by its title, with the page before it; "" is the title of what a page begins with."""
    found = {}
    for page in sorted(FOLDER.glob("*.md")):
        first, *sections = SECTION.split(page.read_text(encoding="utf-8"))
        parts = {"": first, **{section.splitlines()[0]: section for section in sections}}
        found |= {f"{page.name}: {title}": "\n".join(CODE.findall(part)) for title, part in parts.items()}
    return {title: code for title, code in found.items() if code}


@pytest.mark.parametrize("title", recipes())
def test_a_recipe_is_short_and_asserts_what_it_does(title: str) -> None:
    found = recipes()
    lines = [line for line in found[title].splitlines() if line.strip() and not line.startswith("assert ")]
    assert len(lines) < 40
    page = title.partition(":")[0]
    begins_a_page = title.endswith(": ") and sum(other.startswith(page) for other in found) > 1
    assert begins_a_page or re.search(r"^(assert |torch\.testing\.assert)", found[title], re.MULTILINE)


def test_the_index_lists_every_recipe_and_links_to_its_page() -> None:
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = [line for line in index.splitlines() if line.startswith("| ")][1:]
    linked = [re.search(r"\(([a-z_]+\.md)\)", row) for row in rows]
    assert all(linked)
    counts: dict[str, int] = {}
    for title in recipes():
        page, _, name = title.partition(": ")
        if name:
            counts[page] = counts.get(page, 0) + 1
    alone = (
        "dcgan",
        "cyclegan",
        "semi_supervised",
        "search",
        "kinds",
        "how_deep",
        "config",
        "domains",
        "without_python",
    )
    counts |= dict.fromkeys((f"{name}.md" for name in alone), 1)
    listed = [match[1] for match in linked if match]
    assert {page: listed.count(page) for page in set(listed)} == counts


TEN_PAPERS = {
    "mixup": "augmentation.md: Mixup (Zhang et al. 2018",
    "manifold mixup": "augmentation.md: Manifold mixup (Verma et al. 2018",
    "cutout": "augmentation.md: Cutout (DeVries and Taylor 2017",
    "SAM": "optimizers.md: SAM (Foret et al. 2021",
    "LSUV": "starting_and_predicting.md: LSUV initialisation (Mishkin and Matas 2016",
    "distillation": "losses.md: Knowledge distillation (Hinton et al. 2015",
    "BC+": "augmentation.md: Between-class learning, BC+ (Tokozume et al. 2018",
    "sample pairing": "augmentation.md: Sample pairing (Inoue 2018",
    "DCGAN": "dcgan.md: DCGAN (Radford et al. 2016",
    "adversarial training": "augmentation.md: Adversarial training by the fast gradient sign (Goodfellow et al. 2014",
}


@pytest.mark.capability("TB-04")
@pytest.mark.parametrize("paper", TEN_PAPERS)
def test_ten_papers_take_nothing_from_inside(paper: str) -> None:
    """Ten odd ideas of ten papers are written with public names alone, assert their effect and replace nothing."""
    page, _, title = TEN_PAPERS[paper].partition(": ")
    text = (FOLDER / page).read_text(encoding="utf-8")
    (begin,) = re.finditer(rf"^(#+) {re.escape(title)}", text, re.MULTILINE)
    section = re.split(rf"^{begin[1]} ", text[begin.start() + 2 :], maxsplit=1, flags=re.MULTILINE)[0]
    assert "lw." in section
    assert "assert " in section
    assert touched("\n".join(CODE.findall(text))) == []


def touched(code: str) -> list[str]:
    """What ``code`` takes from inside of Loopwright: modules that are not public, private names, names it assigns."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "loopwright":
            inner = (node.module or "").partition(".")[2]
            module = getattr(lw, inner, None) if inner else lw
            found += [
                f"{node.module}.{one.name}" for one in node.names if one.name not in getattr(module, "__all__", ())
            ]
        if isinstance(node, ast.Import):
            found += [one.name for one in node.names if one.name.startswith("loopwright.")]
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
from loopwright import loop
import loopwright.steps
lw.loop.train_step = None
setattr(lw.Trainer, "fit", None)
run._place
lw.data.limit
"""
    assert sorted(touched(code)) == [
        "loopwright.loop", "loopwright.loop.train_step", "loopwright.steps", "lw.loop.train_step = ...", "run._place",
        "setattr(lw.Trainer, 'fit', None)",
    ]  # fmt: skip


@pytest.mark.capability("IG-17")
def test_the_cycle_of_a_cyclegan_is_what_brings_a_sample_back() -> None:
    """The CycleGAN of the recipes: what was translated there and back is what it was, and is not without the cycle."""
    names: dict[str, Any] = {}
    exec(recipes()["cyclegan.md: "], names)
    with_it = names["run"].history["train/translators/back"][-1]
    torch.manual_seed(0)
    data = lw.Loader((names["photos"], names["paintings"]), 64, shuffle=True)
    without = lw.Trainer(epochs=20, progress=False, folder=None).fit(names["CycleGAN"](cycle=0.0), data)
    assert with_it < 0.3 * without.history["train/translators/back"][-1]
