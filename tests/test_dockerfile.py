"""The Dockerfile says what the README and the Makefile say; it is read here, and built by whoever has docker."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
LINES = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]


def said(word: str) -> list[str]:
    return [line.removeprefix(f"{word} ") for line in LINES if line.startswith(f"{word} ")]


def test_the_readme_has_the_command_that_the_dockerfile_names() -> None:
    (command,) = re.findall(r"^#\s+(docker build .* && docker run .*)$", DOCKERFILE, re.MULTILINE)
    assert f"`{command}`" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_built_and_run_by_targets_that_the_makefile_has() -> None:
    ready = re.search(r"^READY\s*:= (\S+)$", MAKEFILE, re.MULTILINE)
    assert ready is not None
    assert said("RUN")[-1].split(maxsplit=1) == ["PIP_NO_CACHE_DIR=1", f"make {ready[1]}"]
    assert said("CMD") == ['["make", "demo"]']
    assert re.search(r"^demo: \$\(READY\) ## ", MAKEFILE, re.MULTILINE)
    (folder,) = said("WORKDIR")
    bin_ = re.search(r"^BIN\s*:= (\S+)$", MAKEFILE, re.MULTILINE)
    assert bin_ is not None
    assert said("ENV") == [f"PATH={folder}/{bin_[1]}:$PATH"]


def test_its_python_is_one_that_the_package_takes_and_its_shell_tools_are_those_of_the_makefile() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (image,) = said("FROM")
    version = re.fullmatch(r"python:(\d+)\.(\d+)-slim", image)
    oldest = re.fullmatch(r">=(\d+)\.(\d+)", project["requires-python"])
    assert version is not None
    assert oldest is not None
    assert tuple(map(int, version.groups())) >= tuple(map(int, oldest.groups()))
    assert f"Programming Language :: Python :: {version[1]}.{version[2]}" in project["classifiers"]
    assert {"g++", "make"} <= set(said("RUN")[0].split())


def test_no_environment_of_the_machine_is_copied_into_it() -> None:
    ignored = {one.removeprefix("**/") for one in (ROOT / ".dockerignore").read_text(encoding="utf-8").split()}
    assert {".git", ".venv*", "runs"} <= ignored
    assert said("COPY") == [". ."]
    left = re.findall(r"^(\S+)/$", (ROOT / ".gitignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert {one for one in left if not any(fnmatch(one, name) for name in ignored)} == {".idea", ".vscode"}


def test_torch_comes_from_where_the_readme_and_the_file_say() -> None:
    (argument,) = said("ARG")
    assert argument == "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
    (pinned,) = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    for_cpu = Version(f"{pinned}+cpu")  # as that index calls it: it fits the pin, and comes before the one with CUDA
    assert for_cpu in SpecifierSet(f"=={pinned}")
    assert for_cpu > Version(pinned)
    assert LINES.index(f"ARG {argument}") < LINES.index(f"RUN {said('RUN')[-1]}")  # or it would not be seen
