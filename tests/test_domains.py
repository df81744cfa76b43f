"""Standard domains, in docs/recipes/domains.md: as good as what is strong there, at every level the same numbers."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import loopwright as lw
from test_docs import DOMAINS, run, script
from test_recipes import touched

APPLICATIONS = ("Images", "A table", "Texts", "Recommendations")
SECTIONS = re.split(r"^## +", DOMAINS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]


def code(title: str) -> str:
    (found,) = (script(section) for section in SECTIONS if section.startswith(title))
    return found


@pytest.mark.slow
@pytest.mark.capability("FA-01", "FA-20")
def test_four_domains_reach_a_strong_baseline_at_once_and_the_loop_by_hand_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images, tables, texts, recommendations: not behind scikit-learn, parts exchanged, by hand the same bits."""
    run(DOMAINS, tmp_path, monkeypatch)


@pytest.mark.capability("FA-01")
@pytest.mark.parametrize("application", APPLICATIONS)
def test_each_domain_is_said_in_short_and_one_part_of_it_exchanged(application: str) -> None:
    """A domain is one task and one trainer; the other program takes the same parts but one. Nothing is from inside."""
    said, exchanged = code(f"{application}:"), code(f"{application}, one part exchanged")
    for program in (said, exchanged):
        assert touched(program) == []
        assert len([line for line in program.splitlines() if line.strip()]) < 60
    assert len(re.findall(r"\.fit\(task, ", said)) == 1
    assert said.count("lw.Supervised(") <= 2  # to train, and to judge by a metric
    assert not re.search(r"backward\(\)|\.step\(\)|zero_grad", said + exchanged)
    assert re.search(r"^assert \w*.* >= .*(baseline|theirs|by_neighbours)", said, re.MULTILINE)


@pytest.mark.capability("FA-20")
def test_each_application_has_methods_of_its_own_and_the_primitives_come_in_both_forms() -> None:
    """Methods for the data, the training and the measuring of each; metrics, schedules, steps, losses in both forms."""
    for application, methods in {
        "Images": {"lw.BatchTransform", "lw.EMA", "lw.fine_tune", "lw.data.train_valid_split"},
        "A table": {"lw.data.folds", "lw.groups", "lw.metrics.R2", "lw.metrics.Function"},
        "Texts": {"lw.data.BucketSampler", "lw.BatchTransform", "lw.data.train_valid_split"},
        "Recommendations": {"lw.metrics.Function", "lw.schedules.one_cycle"},
    }.items():
        assert methods <= names("\n".join(script(part) for part in SECTIONS if part.startswith(application)))
    low = names(code("The primitives"))
    assert {"lw.metrics.Accuracy", "lw.metrics.functional", "lw.optim.Scheduled", "lw.losses.Weighted"} <= low
    assert {"lw.optim.Stepwise", "lw.optim.Bunch", "lw.optim.adam", "lw.optim.decay"} <= low
    by_hand = names(code("By hand"))
    assert not {"lw.Trainer", "lw.Supervised", "lw.Task"} & by_hand


def names(program: str) -> set[str]:
    """The public names of ours in a program, each of which there is."""
    found = {ast.unparse(node) for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Attribute)}
    found = {name for name in found if re.fullmatch(r"lw(\.\w+)+", name)}
    for name in found:
        eval(name, {"lw": lw})
    return found
