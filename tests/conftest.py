"""Fixtures of the suite, and the record of which capability is proved by which test."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import hypothesis
import pytest
import torch

CAPABILITY = re.compile(r"(B|CA|FA|GEN|HY|IG|PL|PT|SK|TB)-\d\d")

# the same examples in every run; a CI machine may be slow
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place for runs that does not exist yet, as a first ``Trainer(folder=...)`` meets it."""
    return tmp_path / "runs"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--capabilities",
        metavar="FILE.json",
        type=Path,
        help="write which capabilities were proved by which tests, passing ones only",
    )


def pytest_configure(config: pytest.Config) -> None:
    target: Path | None = config.getoption("--capabilities")
    if target is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Proved(target.resolve()), "capabilities")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA: make gpu"))
        for mark in item.iter_markers("capability"):
            wrong = [name for name in mark.args if not (isinstance(name, str) and CAPABILITY.fullmatch(name))]
            if wrong or not mark.args or mark.kwargs:
                raise pytest.UsageError(
                    f"{item.nodeid}: a capability mark takes ids such as 'SK-07', not {wrong or mark}"
                )
            item.user_properties.extend(("capability", [name, _claim(item)]) for name in mark.args)


def _claim(item: pytest.Item) -> str:
    """First line of the docstring of a test, or its name in words."""
    text = inspect.getdoc(getattr(item, "function", None)) or ""
    name = getattr(item, "originalname", None) or item.name
    return text.partition("\n")[0].strip() or name.removeprefix("test_").replace("_", " ")


class Proved:
    """Collects, where all reports arrive, the marked tests of which every phase and parameter passed."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.claims: dict[str, dict[str, str]] = {}  # id -> test -> claim
        self.passed: set[str] = set()
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid.partition("[")[0]
        if report.failed or hasattr(report, "wasxfail"):
            self.failed.add(test)
        elif report.passed and report.when == "call":
            self.passed.add(test)
        for key, value in report.user_properties:
            if key == "capability":
                assert isinstance(value, list)
                self.claims.setdefault(value[0], {})[test] = value[1]

    def pytest_sessionfinish(self) -> None:
        proved = {
            name: [{"test": test, "claim": tests[test]} for test in sorted(tests.keys() & self.passed - self.failed)]
            for name, tests in sorted(self.claims.items())
        }
        self.target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({name: tests for name, tests in proved.items() if tests}, indent=1, ensure_ascii=False)
        self.target.write_text(text + "\n", encoding="utf-8")
