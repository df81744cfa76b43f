"""The folder of a run tells later which code, settings and packages made its results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from loopwright.errors import SettingError
from loopwright.folder import close_folder, open_folder, reopen_folder
from loopwright.provenance import DIFF_LIMIT


def record(path: Path) -> dict[str, Any]:
    found = json.loads((path / "run.json").read_text())
    assert isinstance(found, dict)
    return found


def opened(name: str = "digits", **settings: Any) -> Path:
    return open_folder("runs", name, settings=settings, seed=3)


def test_a_new_run_has_its_own_folder() -> None:
    paths = {opened() for _ in range(5)}
    assert len(paths) == 5
    assert {p.parent for p in paths} == {Path("runs/digits")}
    run = record(paths.pop())
    assert run["status"] == "running"
    assert run["seed"] == 3
    assert run["command"] == sys.argv
    assert run["pid"] == os.getpid()
    assert run["versions"]["torch"] == metadata.version("torch")
    assert set(run["versions"]) == {"python", "torch", "numpy", "loopwright"}


def test_settings_can_be_read_back() -> None:
    path = opened(epochs=2, lr=1e-3, betas=(0.9, 0.99), text="é: #", none=None, root=Path("a/b"), net={"width": [1, 2]})
    assert yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) == {
        "epochs": 2, "lr": 1e-3, "betas": [0.9, 0.99], "text": "é: #", "none": None, "root": "a/b",
        "net": {"width": [1, 2]},
    }  # fmt: skip


def test_settings_that_are_no_plain_data_are_named_by_class() -> None:
    path = opened(optimizer=torch.optim.SGD, net=torch.nn.Linear(1, 1), f=time.time)
    assert yaml.safe_load((path / "config.yaml").read_text()) == {
        "optimizer": "<torch.optim.sgd.SGD>", "net": "<torch.nn.modules.linear.Linear>", "f": "<time.time>",
    }  # fmt: skip


def test_the_environment_is_what_is_installed() -> None:
    lines = (opened() / "environment.txt").read_text().splitlines()
    assert f"torch=={metadata.version('torch')}" in lines
    assert f"pytest=={metadata.version('pytest')}" in lines
    assert lines == sorted(lines, key=lambda line: line.split("==")[0].lower())


def test_no_environment_variable_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "hunter-2-is-the-password")
    path = opened()
    close_folder(path, "done")
    assert not any(b"hunter-2" in file.read_bytes() for file in path.rglob("*") if file.is_file())


def test_closing_says_how_it_ended() -> None:
    path = opened()
    close_folder(path, "failed", error=ValueError("no data"), metrics={"a": 0.5, "b": float("nan")})
    run = record(path)
    assert run["status"] == "failed"
    assert run["error"] == {"type": "ValueError", "message": "no data"}
    assert run["metrics"] == {"a": 0.5, "b": "nan"}
    assert 0 <= run["seconds"] < 60
    assert run["seed"] == 3
    assert sorted(p.name for p in path.iterdir() if p.name.startswith(".")) == []


def test_closing_a_folder_that_was_deleted_or_torn_still_says_how_it_ended() -> None:
    path = opened()
    (path / "run.json").write_text('{"status": "run')
    close_folder(path, "done")
    assert record(path)["status"] == "done"


def test_a_run_that_goes_on_is_running_again() -> None:
    path = opened()
    close_folder(path, "failed", error=ValueError("x"))
    reopen_folder(path)
    run = record(path)
    assert run["status"] == "running"
    assert "error" not in run
    assert "ended" not in run
    assert len(run["restarts"]) == 1
    close_folder(path, "done")
    assert record(path)["status"] == "done"
    assert record(path)["seconds"] < 60


def test_an_unknown_status_is_refused() -> None:
    path = opened()
    with pytest.raises(SettingError, match=r"status='finished' is unknown. Known: 'done', 'failed', 'interrupted'"):
        close_folder(path, "finished")  # type: ignore[arg-type]
    assert record(path)["status"] == "running"


@pytest.mark.parametrize(
    "name",
    [
        "", " ", ".", "..", "../x", "/etc/x", "a/b", "a\\b", "a\0b", "a\nb", "~", ".hidden", "x" * 101, "a:b",
        "x.", "x ", "-rf", None, 3, "*",
    ],
    ids=repr,
)  # fmt: skip
def test_names_that_are_no_folder_names_are_refused(name: Any) -> None:
    with pytest.raises(SettingError, match=r"cannot be the name of a folder; use up to 100 letters, digits"):
        open_folder("runs", name, settings={}, seed=None)
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["digits", "a.b-c_d 2", "lr=0.1", "x" * 100, "Größe", "猫", "7"])
def test_ordinary_names_are_taken(name: str) -> None:
    assert opened(name).parent.name == name


def test_a_root_that_cannot_be_written_is_an_error_before_training() -> None:
    Path("runs").write_text("a file")
    with pytest.raises(
        SettingError, match=r"^the run cannot be written to runs/digits/.*: .*Give a folder that can be"
    ):
        opened()


# ------------------------------------------------------------------------------------------------ provenance


def git(*arguments: str) -> str:
    identity = [
        "-c",
        "user.name=t",
        "-c",
        "user.email=t@t",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "init.defaultBranch=main",
    ]
    done = subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


SCRIPT = """
import json, sys
for name in sys.argv[1:]:
    __import__(name)
from loopwright.folder import open_folder
path = open_folder("runs", "x", settings={}, seed=None)
print(path)
"""


def script(*modules: str, **environment: str) -> Path:
    """The folder that a script makes in the working directory, after it has imported ``modules``."""
    Path("train.py").write_text(SCRIPT)
    command = [sys.executable, "train.py", *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def archived(path: Path) -> list[str]:
    if not (path / "source.zip").exists():
        return []
    with zipfile.ZipFile(path / "source.zip") as archive:
        assert archive.testzip() is None
        return sorted(archive.namelist())


def put(**files: str) -> None:
    for name, text in files.items():
        path = Path(name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_commit_and_what_was_changed_since_are_noted() -> None:
    git("init")
    put(net="width = 1\n")
    git("add", ".")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert record(script("net"))["git"] == {"commit": commit, "dirty": False, "diff": "", "diff_cut": False}
    put(net="width = 2\n")
    state = record(script("net"))["git"]
    assert (state["commit"], state["dirty"]) == (commit, True)
    assert "-width = 1\n+width = 2\n" in state["diff"]
    put(net="# " + "x" * (2 * DIFF_LIMIT))
    state = record(script())["git"]
    assert len(state["diff"]) == DIFF_LIMIT
    assert state["diff_cut"]
    put(net="key = 'sk-" + "a" * 30 + "'\n")
    state = record(script())["git"]
    assert (state["dirty"], state["diff"]) == (True, None)


def test_a_machine_without_git_is_no_problem(tmp_path: Path) -> None:
    put(net="", data="", local="")
    Path(".gitignore").write_text("local*\n# a comment\n/data.py\n")
    path = script("net", "data", "local", PATH=str(tmp_path / "empty"))
    assert record(path)["git"] is None
    assert archived(path) == ["net.py", "train.py"]


def test_the_source_is_the_script_and_what_it_imports_from_here() -> None:
    put(net="", unused="", pkg__part="", pkg____init="")
    Path("pkg/__init__.py").write_text("from pkg import part")
    path = script("net", "pkg")
    assert archived(path) == ["net.py", "pkg/__init__.py", "pkg/part.py", "train.py"]
    assert record(path)["source"] == {"files": 4, "left_out": []}
    with zipfile.ZipFile(path / "source.zip") as archive:
        assert archive.read("train.py").decode() == SCRIPT


def test_what_git_ignores_what_is_secret_and_what_is_large_is_left_out() -> None:
    git("init")
    Path(".gitignore").write_text("private/\n")
    put(
        private__data="", secrets_local="", my_credentials="", api_key="", tokenizer="ok = 1", keyboard="ok = 1",
        big="#" * 1_000_001, pem="k = '''-----BEGIN RSA PRIVATE KEY-----'''", aws=f"k = 'AKIA{'A' * 16}'",
    )  # fmt: skip
    left = ["api_key", "aws", "big", "my_credentials", "pem", "private/data", "secrets_local"]
    path = script(*[name.replace("/", ".") for name in left], "tokenizer", "keyboard")
    assert archived(path) == ["keyboard.py", "tokenizer.py", "train.py"]
    assert record(path)["source"]["left_out"] == [f"{name}.py" for name in left]


def test_the_archive_follows_the_files() -> None:
    put(net="a = 1")
    sys.path.insert(0, os.getcwd())
    try:
        __import__("net")
        with zipfile.ZipFile(opened() / "source.zip") as archive:
            assert archive.read("net.py") == b"a = 1"
        put(net="a = 22")
        with zipfile.ZipFile(opened() / "source.zip") as archive:
            assert archive.read("net.py") == b"a = 22"
    finally:
        sys.path.remove(os.getcwd())
        sys.modules.pop("net")
