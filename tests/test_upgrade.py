"""A public name that is called otherwise goes on to work for two minor releases, and a command rewrites its users."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loopwright as lw
from api import public
from loopwright.cli import main
from loopwright.cli.rewrite import rewritten
from loopwright.renamed import RENAMED, Renamed

OLD = "optim.is_ours"
NAMES = {old: now.to for old, now in RENAMED.items()}
ENTRIES = pytest.mark.parametrize("old", RENAMED)


def ways(path: str) -> dict[str, str]:
    """Every way to write a public name; ``found`` is what it gives."""
    module, _, name = path.rpartition(".")
    found = {
        "lw": f"import loopwright as lw\nfound = lw.{path}\n",
        "loopwright": f"import loopwright\nfound = loopwright.{path}\n",
        "other": f"import torch, loopwright as other\nfound = (other\n  .{path}  # here\n)\n",
        "from": f"from loopwright{'.' * bool(module)}{module} import {name}\nfound = {name}\n",
        "as": f"from loopwright{'.' * bool(module)}{module} import (\n    {name} as mine,\n)\nfound = mine\n",
        "inside": f"import loopwright as lw\ndef get(*, of=lw.{path}):\n    return of\nfound = get()\n",
        "late": f"def get():\n    import loopwright as lw\n    return lw.{path}\nfound = get()\n",
        "maybe": f"try:\n    import loopwright as lw\nexcept ImportError:\n    lw = None\nfound = lw.{path}\n",
        "global": f"def load():\n    global lw\n    import loopwright as lw\nload()\nfound = lw.{path}\n",
    }
    if module:
        found |= {
            "module": f"from loopwright import {module}\nfound = {module}.{name}\n",
            "module as": f"from loopwright import {module} as m\nfound = [m.{name} for _ in 'a'][0]\n",
            "import module": f"import loopwright.{module}\nfound = loopwright.{path}\n",
            "import module as": f"import loopwright.{module} as m\nfound = (lambda: m.{name})()\n",
        }
    return found


def ran(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "user"}
    exec(compile(code, "user.py", "exec"), names)
    return names


# ------------------------------------------------------------------------------------------------- the old names


def test_the_table_says_what_can_be_kept() -> None:
    """A new name is public and in the module of the old one, which stays for two minor releases at least."""
    known = {name for name, _ in public(lw)}
    for old, now in RENAMED.items():
        assert now.to in known
        assert old not in known
        assert old.rpartition(".")[0] == now.to.rpartition(".")[0]
        (since, in_since), (goes, in_goes) = (map(int, text.split(".")[:2]) for text in (now.since, now.goes))
        assert goes > since or in_goes >= in_since + 2


@pytest.mark.capability("B-29")
@pytest.mark.parametrize(
    ("old", "way"), [pytest.param(old, way, id=f"{old}, {way}") for old in RENAMED for way in ways(old)]
)
def test_an_old_name_works_with_a_warning_and_its_users_are_rewritten(
    old: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old name works, with a warning that tells the new one; the command rewrites every way to write it."""
    now, before, after = RENAMED[old], ways(old)[way], ways(RENAMED[old].to)[way]
    monkeypatch.setattr(lw, "__version__", now.since)
    with pytest.warns(lw.LoopwrightWarning) as caught:
        found = ran(before)["found"]
    assert {str(one.message) for one in caught} == {
        f"lw.{old} is called lw.{now.to} since {now.since}, and the old name goes in {now.goes}. "
        "`loopwright upgrade .` shows what to change in your code, and changes it with --write"
    }
    name = old.rpartition(".")[2]
    for one in caught:
        line = before.splitlines()[one.lineno - 1]
        assert (one.filename, name in line or line.endswith("import (")) == ("user.py", True)
    assert rewritten(before, NAMES) == after
    assert rewritten(after, NAMES) == after
    assert found is ran(after)["found"]


@ENTRIES
def test_an_old_name_is_told_once_for_each_line(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lw, "__version__", RENAMED[old].since)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        ran(f"import loopwright as lw\nfor _ in range(3):\n    lw.{old}\nlw.{old}\n")
    assert [one.lineno for one in caught] == [3, 4]


@ENTRIES
def test_an_old_name_goes_in_the_version_that_was_told(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to take it out; who comes later is told its new name all the same."""
    now = RENAMED[old]
    for version in (now.goes, f"{now.goes}rc1", "10.0.0"):
        monkeypatch.setattr(lw, "__version__", version)
        with pytest.raises(AttributeError) as told:
            ran(ways(old)["lw"])
        assert str(told.value) == (
            f"lw.{old} went in {now.goes}; it is called lw.{now.to}. "
            "`loopwright upgrade .` shows what to change in your code, and changes it with --write"
        )
        with pytest.raises(ImportError, match=f"cannot import name {old.rpartition('.')[2]!r}"):
            ran(ways(old)["from"])


def test_a_name_of_the_package_itself_can_be_called_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RENAMED, "Teacher", Renamed("Trainer", since="0.1.0", goes="0.3.0"))
    for way, before in ways("Teacher").items():
        with pytest.warns(lw.LoopwrightWarning, match=r"lw.Teacher is called lw.Trainer since 0\.1\.0"):
            assert ran(before)["found"] is lw.Trainer
        assert rewritten(before, {"Teacher": "Trainer"}) == ways("Trainer")[way]


def test_a_name_that_never_was_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'loopwright\.optim' has no attribute 'is_our'$"):
        _ = lw.optim.is_our  # type: ignore[attr-defined]
    assert not hasattr(lw.optim, "__wrapped__")
    assert OLD.rpartition(".")[2] not in dir(lw.optim)


# ----------------------------------------------------------------------------------------------- what is rewritten

BOUND = "from loopwright import optim\n"
KEPT = {
    "another package": "import loopwright\nfrom torch import optim\noptim.is_ours\n",
    "another module": "import loopwright\nimport my.loopwright as lw\nlw.optim.is_ours\n",
    "a module beside it": "import loopwright\nfrom .loopwright.optim import is_ours\nis_ours\n",
    "another path": "import loopwright as lw\nlw.is_ours, lw.data.is_ours, my.lw.optim.is_ours, lw.optim().is_ours\n",
    "an attribute": "import loopwright as lw\nself.is_ours = self.optim.is_ours\n",
    "a string": "import loopwright as lw\ngetattr(lw.optim, 'is_ours')  # lw.optim.is_ours\n",
    "an argument": BOUND + "def f(optim, *a: optim.x, **k):\n    return optim.is_ours, [optim.is_ours]\n",
    "an argument by position": BOUND + "f = lambda optim, /: optim.is_ours\n",
    "an argument of a function outside": BOUND + "def f(*optim):\n    def g():\n        return optim.is_ours\n",
    "a local name": BOUND + "def f():\n    optim = SGD()\n    optim.is_ours\n",
    "a local import": BOUND + "def f():\n    import torch.optim as optim\n    optim.is_ours\n",
    "a class": BOUND + "class A:\n    optim = 3\n    optim.is_ours\n",
    "a function": BOUND + "def f():\n    def optim(): ...\n    optim.is_ours\n",
    "an error": BOUND + "def f():\n    try: ...\n    except E as optim: optim.is_ours\n",
    "a pattern": BOUND + "def f(x):\n    match x:\n        case {**optim}: optim.is_ours\n",
    "a pattern of a list": BOUND + "def f(x):\n    match x:\n        case [*optim]: optim.is_ours\n",
    "a pattern of a class": BOUND + "def f(x):\n    match x:\n        case A(optim): optim.is_ours\n",
    "now one, now the other": BOUND + "if x:\n    optim = SGD()\noptim.is_ours\n",
    "letters that look alike": BOUND + "optim.i\N{FULLWIDTH LATIN SMALL LETTER S}_ours\n",
}


@pytest.mark.capability("B-29")
@pytest.mark.parametrize("code", KEPT.values(), ids=KEPT)
def test_a_name_of_the_users_own_is_left_alone(code: str) -> None:
    """The command leaves alone what is the user's own and only spelt the same."""
    compile(code, "user.py", "exec")
    assert rewritten(code, NAMES) == code


ELSEWHERE = {
    "what a method sees is not the class": (
        BOUND + "class A:\n    optim = 3\n    def f(self): return lambda x=optim.is_ours: optim.is_ours\n",
        BOUND + "class A:\n    optim = 3\n    def f(self): return lambda x=optim.is_schedule: optim.is_schedule\n",
    ),
    "defaults and annotations are outside": (
        BOUND + "def f(optim: optim.is_ours = optim.is_ours) -> optim.is_ours: return optim.is_ours\n",
        BOUND + "def f(optim: optim.is_schedule = optim.is_schedule) -> optim.is_schedule: return optim.is_ours\n",
    ),
    "bases and decorators are outside": (
        BOUND + "@optim.is_ours\nclass A(optim.is_ours):\n    optim = 1\n",
        BOUND + "@optim.is_schedule\nclass A(optim.is_schedule):\n    optim = 1\n",
    ),
    "f-strings": (
        BOUND + "f'{optim.is_ours(1)!r:>{optim.is_ours}} é {optim.is_ours} optim.is_ours'\n",
        BOUND + "f'{optim.is_schedule(1)!r:>{optim.is_schedule}} é {optim.is_schedule} optim.is_ours'\n",
    ),
    "columns after other letters": (
        BOUND + "'é\N{GRINNING FACE}', optim.is_ours, '\x0c\u2028', optim . \\\n is_ours\n",
        BOUND + "'é\N{GRINNING FACE}', optim.is_schedule, '\x0c\u2028', optim . \\\n is_schedule\n",
    ),
    "import *": (
        "from loopwright.optim import *\nis_ours(1)\nmy(is_ours=is_ours)\n",
        "from loopwright.optim import *\nis_schedule(1)\nmy(is_ours=is_schedule)\n",
    ),
    "import * of all": (
        "from torch import *\nfrom loopwright import *\noptim.is_ours(1)\n",
        "from torch import *\nfrom loopwright import *\noptim.is_schedule(1)\n",
    ),
    "imported for others": (
        "from loopwright.optim import sgd, is_ours, adam\n",
        "from loopwright.optim import sgd, is_schedule as is_ours, adam\n",
    ),
    "imported for others in words": (
        "from loopwright.optim import is_ours as is_ours\nis_ours\n",
        "from loopwright.optim import is_schedule as is_ours\nis_ours\n",
    ),
    "named in a string": (
        "from loopwright.optim import is_ours\n__all__ = ['is_ours']\nis_ours(1)\n",
        "from loopwright.optim import is_schedule as is_ours\n__all__ = ['is_ours']\nis_ours(1)\n",
    ),
    "the user's own elsewhere": (
        "from loopwright.optim import is_ours\nis_ours(1)\ndef f(is_ours): return is_ours\n",
        "from loopwright.optim import is_schedule as is_ours\nis_ours(1)\ndef f(is_ours): return is_ours\n",
    ),
    "a longer name": (
        "from loopwright.optim import is_ours as is_ours_too  # is_ours\nis_ours_too(1)\n",
        "from loopwright.optim import is_schedule as is_ours_too  # is_ours\nis_ours_too(1)\n",
    ),
    "the new name is taken": (
        "from loopwright.optim import is_ours\nis_schedule = is_ours(1)\n",
        "from loopwright.optim import is_schedule as is_ours\nis_schedule = is_ours(1)\n",
    ),
    "whichever there is": (
        "try:\n    from loopwright.optim import is_schedule\nexcept ImportError:\n"
        "    from loopwright.optim import is_ours as is_schedule\n",
        "try:\n    from loopwright.optim import is_schedule\nexcept ImportError:\n"
        "    from loopwright.optim import is_schedule as is_schedule\n",
    ),
}


@pytest.mark.capability("B-29")
@pytest.mark.parametrize(("before", "after"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_name_is_rewritten_where_it_is_ours(before: str, after: str) -> None:
    """The command follows Python's scopes; a name that others may mean is kept by ``import new as old``."""
    compile(before, "user.py", "exec")
    assert rewritten(before, NAMES) == after
    assert rewritten(after, NAMES) == after


LINES = [
    "import loopwright",
    "import loopwright as lw",
    "from loopwright import optim",
    "from loopwright import optim as lw",
    "from loopwright.optim import is_ours",
    "from loopwright.optim import is_ours, is_schedule as optim",
    "from loopwright.optim import is_ours as lw",
    "from torch import optim",
    "class optim: is_ours = 1",
    "class lw:\n    optim = lw\n    def is_ours(self, lw=lw): return lw",
    "is_ours = 2",
    "lw = None",
    "def f(is_ours=is_ours): return is_ours, lw.optim",
    "def f(lw): return lw.is_ours, lw",
    "def f():\n    global is_ours\n    from loopwright.optim import is_ours",
    "def f():\n    from loopwright.optim import is_ours\n    return is_ours, lambda optim: optim.is_ours",
    "del is_ours",
    "seen.append(f(lw))",
    "seen.append(f())",
    "seen.append(is_ours)",
    "seen.append(lw.is_ours)",
    "seen.append(lw.optim.is_ours)",
    "seen.append([optim.is_ours for _ in 'ab'])",
    "seen.append(loopwright.optim.is_ours)",
    "seen.append('is_ours')  # is_ours",
]


@pytest.mark.capability("B-29")
@settings(max_examples=400)
@given(st.lists(st.sampled_from(LINES), min_size=2, max_size=8), st.sampled_from(["\n", "\r\n", "\r"]))
def test_rewritten_code_does_what_it_did(lines: list[str], newline: str) -> None:
    """Rewritten code does what it did, stays as it is if rewritten again, and keeps every line without an old name."""
    caught = "try:\n    {}\nexcept Exception as error:\n    seen.append(type(error))\n"
    before = "".join(caught.format(line.replace("\n", "\n    ")) for line in lines).replace("\n", newline)
    after = rewritten(before, NAMES)
    assert rewritten(after, NAMES) == after
    pairs = list(zip(before.split(newline), after.split(newline), strict=True))
    assert [(old, new) for old, new in pairs if old != new and "is_ours" not in old] == []
    results = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        patch.setattr(lw, "__version__", RENAMED[OLD].since)
        for code in (before, after):
            names: dict[str, Any] = {"__name__": "user", "seen": []}
            exec(compile(code, "user.py", "exec"), names)
            results.append(re.sub(r" at 0x[0-9a-f]+", "", str(names["seen"])))
    assert results[0] == results[1]


# -------------------------------------------------------------------------------------------------- the command

USER = "import loopwright as lw\n\n\ndef test(x):\n    return lw.optim.is_ours(x)  # tell\n"


@pytest.mark.capability("B-29")
def test_the_command_shows_what_it_would_change_and_changes_it_when_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`loopwright upgrade` prints a diff and leaves all as it is; with --write it changes the files."""
    Path("src").mkdir()
    Path("src/train.py").write_text(USER)
    Path("src/other.py").write_text("import loopwright as lw\nlw.Trainer\n")
    assert main(["upgrade", "src"]) == 1
    out, err = capsys.readouterr()
    assert out == (
        "--- src/train.py\n+++ src/train.py\n@@ -2,4 +2,4 @@\n \n \n def test(x):\n"
        "-    return lw.optim.is_ours(x)  # tell\n+    return lw.optim.is_schedule(x)  # tell\n"
    )
    assert err == "\nold names in 1 of 2 files. To change them: loopwright upgrade src --write\n"
    assert Path("src/train.py").read_text() == USER
    assert main(["upgrade", "src", "--write"]) == 0
    assert capsys.readouterr() == ("changed  src/train.py\n", "changed 1 of 2 files\n")
    assert Path("src/train.py").read_text() == USER.replace("is_ours", "is_schedule")
    assert sorted(os.listdir("src")) == ["other.py", "train.py"]
    times = [path.stat().st_mtime_ns for path in sorted(Path("src").iterdir())]
    assert main(["upgrade", "src", "src/train.py", "--write"]) == 0
    assert capsys.readouterr() == ("", "nothing to change in 2 files\n")
    assert [path.stat().st_mtime_ns for path in sorted(Path("src").iterdir())] == times


def test_what_cannot_be_read_is_told_and_the_others_are_done(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.py").write_text("import loopwright as lw\nlw.optim.is_ours(\n")
    Path("b.py").write_bytes(b"# coding: utf-8\nimport loopwright as lw; lw.optim.is_ours('\xff')\n")
    Path("c.py").write_bytes(b"# coding: nonsense\nimport loopwright\n")
    Path("d.py").write_bytes(b"import loopwright as lw; lw.optim.is_ours('\0')\n")
    Path("f.py").write_text(f"import loopwright as lw; lw.optim.is_ours{'.a' * 5000}\n")
    Path("g.py").write_bytes(b"print 'Python 2 \xff'\n")
    Path("z.py").write_text(USER)
    assert main(["upgrade", ".", "no.py", "--write"]) == 2
    out, err = capsys.readouterr()
    assert out == "changed  z.py\n"
    told = err.splitlines()
    assert told[0] == "loopwright: a.py:2: '(' was never closed"
    assert told[1].startswith("loopwright: b.py: 'utf-8' codec can't decode byte 0xff")
    assert told[2] == "loopwright: c.py: unknown encoding: nonsense"
    assert told[3].startswith("loopwright: d.py: ")
    assert told[4].startswith("loopwright: f.py: ")
    assert told[5:] == ["loopwright: no.py: No such file or directory", "changed 1 of 8 files, 6 left out"]


LINE = b"import loopwright as lw; lw.optim.is_ours(1) "
FILES = {
    "line endings": LINE + b"\r\n#\tx\r\n" + LINE + b"\n" + LINE + b"\r# the end",
    "byte order mark": b"\xef\xbb\xbf" + LINE + b"# \xc3\xa9\n",
    "latin-1": b"#!x\n# -*- coding: latin-1 -*-\n'\xe9'; " + LINE + b"# \xe9\x85\n",
    "cp932": b"# coding: cp932\n'\x83\x5c'; " + LINE + b"# \x83\x5c",
    "blanks": b"\x0cif 1:\n\t" + LINE + b"  \n\n\n\x0c\n \t\n",
    "what Python warns of": b"x = '\\d'\n" + LINE + b"; x is '\\d'\n",
}


@pytest.mark.capability("B-29")
@pytest.mark.parametrize("raw", FILES.values(), ids=FILES)
def test_all_else_stays_to_the_byte(raw: bytes, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Line endings, encodings, blanks and the end of a file stay as they are, to the byte, in the diff as well."""
    after = raw.replace(b"is_ours", b"is_schedule")
    Path("a.py").write_bytes(raw)
    assert main(["upgrade", "a.py"]) == 1
    out = capfdbinary.readouterr().out.replace(b"\n\\ No newline at end of file", b"")
    for begin, text in ((b"-", raw), (b"+", after)):
        shown = [line[1:] for line in out.split(b"\n")[3:] if line[:1] in (b" ", begin)]
        assert b"\n".join(shown) in text
        assert (b"is_ours" if begin == b"-" else b"is_schedule") in b"\n".join(shown)
    assert main(["upgrade", "a.py", "--write"]) == 0
    assert Path("a.py").read_bytes() == after


def test_what_could_not_be_written_back_to_the_byte_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    raw = b"# coding: cp932\nimport loopwright as lw; lw.optim.is_ours # \x87\x90\n"  # which it writes \x81\xe0
    Path("a.py").write_bytes(raw)
    assert main(["upgrade", "a.py", "--write"]) == 2
    assert "cp932 has two ways to write some letter in it; change it by hand" in capsys.readouterr().err
    assert Path("a.py").read_bytes() == raw


def test_permissions_and_links_stay() -> None:
    Path("a.py").write_text(USER)
    Path("a.py").chmod(0o750)
    Path("link.py").symlink_to("a.py")
    assert main(["upgrade", "link.py", "--write"]) == 0
    assert Path("link.py").is_symlink()
    assert "is_schedule" in Path("a.py").read_text()
    assert Path("a.py").stat().st_mode & 0o777 == 0o750


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write what is read-only")
def test_a_file_that_may_not_be_written_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.py").write_text(USER)
    Path("a.py").chmod(0o440)
    assert main(["upgrade", "a.py", "--write"]) == 2
    assert capsys.readouterr().err == "loopwright: a.py: Permission denied\nchanged 0 of 1 file, 1 left out\n"
    assert Path("a.py").read_text() == USER


def test_a_file_is_never_half_written() -> None:
    """The new text does not fit on this disk: the file is as it was, and nothing lies beside it."""
    pytest.importorskip("resource")
    Path("a.py").write_text(USER)
    code = (
        "import resource, sys; from loopwright.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(USER)}, resource.RLIM_INFINITY))\n"
        "sys.exit(main(['upgrade', 'a.py', '--write']))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("loopwright: a.py: File too large\n")
    assert Path("a.py").read_text() == USER
    assert os.listdir() == ["a.py"]


def test_what_is_hidden_or_installed_in_a_folder_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.py", "deep/b.py", ".git/c.py", "env/lib/d.py", "x/site-packages/e.py", "notes.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(USER)
    Path("env/pyvenv.cfg").touch()
    assert main(["upgrade", ".", "--write"]) == 0
    assert capsys.readouterr().out == "changed  a.py\nchanged  deep/b.py\n"


def test_the_command_does_not_import_torch() -> None:
    Path("a.py").write_text(USER)
    code = "import sys; from loopwright.cli import main; main(['upgrade', 'a.py']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
