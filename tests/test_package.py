"""What the package as a whole promises: a cheap import without side effects, a recorded public surface."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import operator
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import loopwright as lw
from api import api_pages, doc, public, surface
from test_docs import pages, script

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "loopwright"

# slow to import, or not installed everywhere
HEAVY = {
    "IPython", "matplotlib", "pandas", "rich", "scipy", "sklearn", "sympy", "tensorboard",
    "torch._dynamo", "torch.distributed.tensor", "torchmetrics",
}  # fmt: skip
OPTIONAL = {name for name in HEAVY if not name.startswith("torch.")} | {"tqdm", "yaml"}  # imported where used

IMPORT = "import loopwright"
RESOLVE = "import loopwright as lw; [getattr(lw, name) for name in lw.__all__]"


def fresh(code: str) -> object:
    """What ``code`` prints as JSON in a new process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("load", [IMPORT, RESOLVE], ids=["import", "every public name"])
def test_import_loads_nothing_heavy_beyond_torch(load: str) -> None:
    look = "print(json.dumps([*set(sys.modules) - before]))"
    loaded = fresh(f"import json, sys, torch; before = set(sys.modules); {load}; {look}")
    assert isinstance(loaded, list)
    heavy = sorted(name for name in loaded if any(name == h or name.startswith(h + ".") for h in HEAVY))
    assert heavy == []


@pytest.mark.parametrize("load", [IMPORT, RESOLVE], ids=["import", "every public name"])
def test_import_leaves_the_process_as_it_is(load: str) -> None:
    """No thread, signal handler, variable, torch switch, random draw, log handler, warning filter."""
    code = f"""
import json, logging, os, random, signal, threading, warnings
import numpy, torch

def look():
    return {{
        "threads": [thread.name for thread in threading.enumerate()],
        "native threads": len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else None,
        "signals": {{str(s): str(signal.getsignal(s)) for s in signal.valid_signals()}},
        "environment": dict(os.environ),
        "folder": [os.getcwd(), sorted(os.listdir())],
        "torch": [str(torch.get_default_dtype()), torch.get_num_threads(), torch.get_num_interop_threads(),
                  torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
                  torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark],
        "random": [hash(random.getstate()), str(numpy.random.get_state()), torch.get_rng_state().tolist()],
        "logging": [str(handler) for handler in logging.getLogger().handlers] + [logging.getLogger().level],
        "warnings": [str(f) for f in warnings.filters],
    }}

before = look()
{load}
after = look()
print(json.dumps([[key, before[key], after[key]] for key in before if before[key] != after[key]]))
"""
    assert fresh(code) == []


def test_help_of_the_command_line_does_not_wait_for_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "loopwright", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "usage: loopwright" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "loopwright" in imported, "-X importtime printed something else than expected"
    assert sorted(name for name in imported if name.split(".")[0] in {"torch", "numpy"}) == []


def test_optional_packages_are_imported_only_where_they_are_used() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{line} imports {name}"
        for path in sorted(SOURCE.rglob("*.py"))
        for line, name in imports_at_load(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] in OPTIONAL
    ]
    assert found == []


def imports_at_load(node: ast.AST) -> Iterator[tuple[int, str]]:
    """``(line, module)`` of each import that runs at load, not in functions or for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            if child.level == 0:
                yield child.lineno, child.module or ""
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (found for other in child.orelse for found in imports_at_load(ast.Module([other], [])))
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imports_at_load(child)


def test_imports_at_load_are_told_from_the_others() -> None:
    code = """
import a
if TYPE_CHECKING:
    import b
else:
    import c
try:
    from d.e import f
except ImportError:
    pass
class K:
    import g
def h():
    import i
from . import j
"""
    assert [name for _, name in imports_at_load(ast.parse(code))] == ["a", "c", "d.e", "g"]


# ---------------------------------------------------------------------------------------- public surface


def test_all_is_sorted_and_every_name_resolves() -> None:
    assert list(lw.__all__) == sorted(set(lw.__all__))
    assert [name for name in lw.__all__ if not hasattr(lw, name)] == []
    assert set(lw.__all__) <= set(dir(lw))


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        _ = lw.Trainr


def test_every_public_name_is_documented() -> None:
    bare = [name for name, thing in public(lw) if callable(thing) or isinstance(thing, ModuleType) if not doc(thing)]
    assert bare == []


@pytest.mark.capability("TB-09")
def test_every_public_name_has_an_example_and_a_test() -> None:
    """Each public name is shown by its doctest, the docs or an example, which all run, and is used by a test."""
    shown = taken(script(path.read_text(encoding="utf-8")) for path in pages())
    shown |= taken(path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py"))
    tested = taken(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    named = [(name, thing) for name, thing in public(lw) if not isinstance(thing, ModuleType)]
    assert len(named) > 100
    assert [name for name, thing in named if not (has_doctest(thing) or id(thing) in shown)] == []
    assert [name for name, thing in named if id(thing) not in tested] == []


def has_doctest(thing: object) -> bool:
    """True where its own docstring, or that of a method, shows how it is used."""
    parts = [thing, *(vars(thing).values() if inspect.isclass(thing) else ())]
    return any(">>> " in doc(part) for part in parts if inspect.isclass(part) or callable(part))


def taken(codes: Iterable[str]) -> set[int]:
    """The ``id`` of every object of the package that ``codes`` import or reach by its dots."""
    found: set[int] = set()
    for code in codes:
        known: dict[str, Any] = {"lw": lw, "loopwright": lw}
        for node in ast.walk(ast.parse(code)):  # imports inside of functions come later than the module's own
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "loopwright":
                module = importlib.import_module(node.module or "")
                known |= {one.asname or one.name: getattr(module, one.name, None) for one in node.names}
        found |= {id(thing) for thing in known.values()}
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute):
                root, *path = ast.unparse(node).split(".")
                thing = known.get(root)
                for name in path:
                    thing = getattr(thing, name, None)
                found.add(id(thing))
    return found - {id(None)}


def test_what_code_takes_of_the_package_is_found() -> None:
    code = """
import loopwright as lw
from loopwright import data
from loopwright.optim import Stepwise as ours
lw.data.limit(lw.Loader([]), 3)
data.Mix
other.Trainer
"""
    found = taken([code])
    assert {id(thing) for thing in (lw.optim.Stepwise, lw.data.limit, lw.Loader, lw.data.Mix)} <= found
    assert not {id(lw.Trainer), id(lw.data.Blocks)} & found


@pytest.mark.capability("B-29")
def test_the_public_surface_is_the_recorded_one() -> None:
    """Every public name and signature is recorded in tests/api.txt, so that no change to it goes unseen."""
    assert [*surface(lw)] == (ROOT / "tests" / "api.txt").read_text(encoding="utf-8").splitlines(), (
        "the public surface changed: say so in CHANGELOG.md, then record it with `make api`"
    )


@pytest.mark.capability("CA-10")
def test_the_api_pages_list_every_trainer_strategy_task_callback_metric_and_logger() -> None:
    """docs/api has each with its call and its docstring, as they are in the code, and the index leads to all."""
    folder = ROOT / "docs" / "api"
    written = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    assert written == dict(api_pages(lw)), "docs/api is not what the code says: write it by `make api`"
    told = {name for text in written.values() for name in re.findall(r"^## `lw\.(\S+)`$", text, re.M)}
    links = set(re.findall(r"\[`lw\.(\S+)`\]", written["README.md"]))
    assert told == links
    assert {"Trainer", "DDP", "FSDP", "launch", "Task", "Supervised"} <= told
    shown = {id(operator.attrgetter(name)(lw)) for name in told}
    listed = (lw.Callback, lw.Task, lw.Trainer, lw.metrics.Metric)
    kinds = [
        thing
        for module in pkgutil.walk_packages(lw.__path__, "loopwright.")
        if module.name.split(".")[1] in ("callbacks", "events", "loggers", "metrics", "report", "task", "trainer")
        for name, thing in vars(importlib.import_module(module.name)).items()
        if inspect.isclass(thing) and thing.__module__ == module.name and not name.startswith("_")
        if issubclass(thing, listed) or name.endswith("Logger")
    ]
    assert len(kinds) > 40
    hidden = {kind.__qualname__ for kind in kinds if id(kind) not in shown}
    assert hidden == {
        "Anomaly",
        "Average",
        "Mixing",
        "Restoring",
    }  # and what others derive from


# --------------------------------------------------------------------------------------------- packaging


def test_the_package_is_typed() -> None:
    assert (SOURCE / "py.typed").is_file()


def test_everything_that_development_needs_is_pinned() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, groups = table["project"], table["dependency-groups"]
    lists = [project["dependencies"], *project["optional-dependencies"].values(), *groups.values()]
    wanted = {plain(text) for listed in lists for text in listed if isinstance(text, str)} - {"loopwright"}
    pins = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []
    assert sorted(wanted - {plain(line) for line in pins}) == []


def plain(requirement: str) -> str:
    """``"Foo_Bar[x]>=1"`` -> ``"foo-bar"``."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()
