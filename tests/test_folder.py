"""The folder of a run tells later which code, settings and packages made its results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
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
from loopwright.sources import sources


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
    assert (run["typed"], run["cwd"]) == (sys.argv, os.getcwd())
    assert run["command"][-1:] == sys.argv[-1:]
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


def test_the_notes_of_an_error_are_kept_with_it() -> None:
    path, error = opened(), ConnectionError("closed by peer")
    error.add_note("[loopwright] rank 1 failed at step 3")
    close_folder(path, "failed", error=error)
    assert record(path)["error"] == {
        "type": "ConnectionError", "message": "closed by peer", "notes": ["[loopwright] rank 1 failed at step 3"],
    }  # fmt: skip


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
        private__data="", secrets_local="", my_credentials="", api_key="", tokenizer="ok = 1", parts__tokens="ok = 1",
        key_value_attention="ok = 1",
        big="#" * 1_000_001, pem=f"k = '''-----BEGIN {'RSA'} PRIVATE KEY-----'''", aws=f"k = 'AKIA{'A' * 16}'",
    )  # fmt: skip
    left = ["api_key", "aws", "big", "my_credentials", "pem", "private/data", "secrets_local"]
    kept = ["key_value_attention", "parts/tokens", "tokenizer"]  # code, whatever the words of its name
    path = script(*[name.replace("/", ".") for name in (*left, *kept)])
    assert archived(path) == [f"{name}.py" for name in (*kept, "train")]
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


def told(folder: Path, *command: str, **environment: str) -> tuple[list[Path], str]:
    """What a command prints, as paths, and what it says on stderr."""
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [folder / line for line in done.stdout.split()], done.stderr


@pytest.mark.nightly
def test_code_that_is_piped_into_python_is_said_to_be_lost() -> None:
    done = subprocess.run([sys.executable, "-"], input=SCRIPT, capture_output=True, text=True, check=True)
    assert record(Path(done.stdout.strip()))["source"] == {"files": 0, "left_out": ["<stdin>"]}
    assert "<stdin>: it was typed or piped into Python, not written in a file" in done.stderr


@pytest.mark.nightly
def test_what_stands_behind_c_is_kept() -> None:
    put(net="")
    (path,), said = told(Path.cwd(), "-c", SCRIPT, "net")
    assert (archived(path), said) == (["command.py", "net.py"], "")
    assert record(path)["command"] == ["command.py", "net"]


def test_modules_of_a_script_elsewhere_and_of_other_folders_are_kept_by_the_names_they_are_imported_by() -> None:
    """Those beside the script, those of the working directory, those of PYTHONPATH; what is ignored there is not."""
    put(
        proj__train=SCRIPT,
        proj__pkg__net="",
        proj__local="",
        proj__big="#" * 1_000_001,
        proj__credentials="",
        lib__shared__tool="",
        here__beside="",
    )
    git("init", "proj")
    Path("proj/.gitignore").write_text("local.py")
    lib = os.pathsep.join([str(Path("lib").absolute()), str(Path("here").absolute()), os.environ.get("PYTHONPATH", "")])
    command = ["../proj/train.py", "pkg.net", "local", "big", "credentials", "shared.tool", "beside"]
    (path,), said = told(Path("here").absolute(), *command, PYTHONPATH=lib)
    assert archived(path) == ["beside.py", "pkg/net.py", "shared/tool.py", "train.py"]
    run = record(path)
    assert run["source"]["left_out"] == ["big.py", "credentials.py", "local.py"]
    assert said.count("LoopwrightWarning") == 1
    assert (
        "not all of your code is kept with the run. Left out of source.zip: big.py: it is larger than 1 MB; "
        "credentials.py: its name says that it holds secrets; local.py: git ignores it. Keep it elsewhere"
    ) in said
    assert (run["command"], run["typed"]) == (["train.py", *command[1:]], command)
    assert run["cwd"] == str(Path("here").absolute())


@pytest.mark.nightly
def test_a_script_that_is_profiled_is_kept() -> None:
    put(train="import sys; sys.stdout.flush()\n" + SCRIPT, net="")
    (path, *_), _ = told(Path.cwd(), "-m", "cProfile", "-o", "times", "train.py", "net")
    assert (record(path)["command"], archived(path)) == (["train.py", "net"], ["net.py", "train.py"])


LATER = """
from loopwright.folder import close_folder
import net
open("net.py", "a").write("# edited since")
import late, big
close_folder(path, "done")
"""


def test_what_is_first_imported_during_the_run_is_added_at_its_end_and_a_module_is_run_again_as_one() -> None:
    put(pkg__train=SCRIPT + LATER, net="", late="late = 1", big="#" * 1_000_001)
    (path,), said = told(Path.cwd(), "-m", "pkg.train", "net")
    assert record(path)["command"] == ["-m", "pkg.train", "net"]
    assert archived(path) == ["late.py", "net.py", "pkg/train.py"]
    assert record(path)["source"] == {"files": 3, "left_out": ["big.py"], "later": ["late.py"]}
    assert said.count("LoopwrightWarning") == 1
    with zipfile.ZipFile(path / "source.zip") as archive:
        assert (archive.read("net.py"), archive.read("late.py")) == (b"", b"late = 1")  # as it was at the start


def test_what_torchs_compiler_has_written_is_not_the_users_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is imported from a folder of torch's own under a name of torch's, and may be gone at the end."""
    monkeypatch.chdir(tmp_path)
    made = types.ModuleType("torch._inductor.runtime.compile_tasks.abc")
    made.__file__ = str(tmp_path / "abc.py")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    assert not any("abc.py" in name for name in (*sources().names, *sources().left_out))
    mine = types.ModuleType("abc_of_mine")
    mine.__file__ = made.__file__
    monkeypatch.setitem(sys.modules, mine.__name__, mine)
    assert "abc.py" in sources().left_out
