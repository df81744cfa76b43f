"""The suite's own rules hold: a leak fails its test, and a capability is proved by passing tests only."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_suite(tmp_path: Path, code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` as the only test file of a suite with our ``conftest.py`` files."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = capability(id, ...)\n", encoding="utf-8")
    (tmp_path / "tests" / "test_it.py").write_text(code, encoding="utf-8")
    for name in ("conftest.py", "tests/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", *options]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)


LEAKS = """
import os, signal
from pathlib import Path
import torch

HOME = os.getcwd()

def test_variable():
    os.environ["LEAKED"] = "1"

def test_folder():
    os.chdir("/")

def test_dtype():
    torch.set_default_dtype(torch.float64)

def test_threads():
    torch.set_num_threads(2)

def test_handler():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def test_clean(monkeypatch, folder):
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.chdir("/")
    assert "LEAKED" not in os.environ
    assert torch.get_default_dtype() == torch.float32 and torch.get_num_threads() == 1
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN

def test_own_folder(tmp_path):
    assert Path.cwd() == tmp_path != HOME
    Path("runs").mkdir()

def test_seed_a():
    global drawn
    drawn = torch.rand(1)

def test_seed_b():
    assert torch.equal(torch.rand(1), drawn)
"""


@pytest.mark.nightly
def test_a_test_that_leaves_the_process_changed_fails_alone_and_says_what(tmp_path: Path) -> None:
    done = run_suite(tmp_path, LEAKS)
    blamed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ERROR ")]
    assert blamed == [f"tests/test_it.py::test_{n}" for n in ("variable", "folder", "dtype", "threads", "handler")]
    assert "9 passed, 5 errors" in done.stdout
    assert "$LEAKED: 'unset' -> '1'" in done.stdout
    assert "torch.get_default_dtype(): torch.float32 -> torch.float64" in done.stdout
    assert not (tmp_path / "runs").exists()


MARKED = """
import pytest
from hypothesis import given, strategies as st

@pytest.mark.capability("SK-07", "B-01")
def test_one():
    "What the user | can do.\\n\\nMore."

@pytest.mark.capability("SK-07")
@pytest.mark.parametrize("n", [1, 2])
def test_every_parameter_passes(n): pass

@pytest.mark.capability("SK-08")
@pytest.mark.parametrize("n", [1, 2])
def test_one_parameter_fails(n): assert n == 1

@pytest.mark.capability("SK-09")
def test_skipped(): pytest.skip("no device")

@pytest.mark.capability("SK-10")
@pytest.mark.xfail(strict=False)
def test_expected_to_fail(): assert False

@pytest.fixture
def broken():
    yield
    raise RuntimeError

@pytest.mark.capability("SK-11")
def test_teardown_fails(broken): pass

@pytest.mark.capability("SK-12")
class TestGroup:
    @given(st.integers())
    def test_of_a_class(self, n): pass
"""


@pytest.mark.parametrize(
    "workers",
    [
        pytest.param((), id="one process"),
        pytest.param(("-n", "2"), id="xdist", marks=[pytest.mark.slow, pytest.mark.nightly]),
    ],
)
def test_a_capability_is_proved_by_tests_whose_every_part_passed(tmp_path: Path, workers: tuple[str, ...]) -> None:
    done = run_suite(tmp_path, MARKED, "--capabilities", "out/proved.json", *workers)
    assert "1 failed" in done.stdout
    proved = json.loads((tmp_path / "out" / "proved.json").read_text(encoding="utf-8"))
    one = {"test": "tests/test_it.py::test_one", "claim": "What the user | can do."}
    assert proved == {
        "B-01": [one],
        "SK-07": [
            {"test": "tests/test_it.py::test_every_parameter_passes", "claim": "every parameter passes"},
            one,
        ],
        "SK-12": [{"test": "tests/test_it.py::TestGroup::test_of_a_class", "claim": "of a class"}],
    }
    page = runpy.run_path(str(ROOT / "tools" / "capabilities.py"))["table"](proved)
    assert page.splitlines()[-3:] == [
        "| B-01 | What the user \\| can do. | `tests/test_it.py` |",
        "| SK-07 | every parameter passes<br>What the user \\| can do. | `tests/test_it.py` |",
        "| SK-12 | of a class | `tests/test_it.py` |",
    ]


@pytest.mark.nightly
@pytest.mark.parametrize("mark", ['"SK07"', ""], ids=["mistyped", "empty"])
def test_a_capability_mark_without_a_true_id_is_refused(tmp_path: Path, mark: str) -> None:
    code = f"import pytest\n@pytest.mark.capability({mark})\ndef test_it(): pass\n"
    done = run_suite(tmp_path, code)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "test_it.py::test_it: a capability mark takes ids such as 'SK-07'" in done.stderr


def test_a_dependency_group_is_printed_with_the_groups_that_it_includes() -> None:
    requirements = runpy.run_path(str(ROOT / "tools" / "groups.py"))["requirements"]
    groups = {"a": ["x>=1"], "b": [{"include-group": "a"}, "y!=2,!=3"]}
    assert list(requirements(groups, "b")) == ["x>=1", "y!=2,!=3"]
    with pytest.raises(SystemExit, match=r"no dependency group 'c' in pyproject\.toml; known: a, b"):
        list(requirements(groups, "c"))
