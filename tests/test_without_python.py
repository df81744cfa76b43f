"""What was trained leaves Python, as the recipe prints it: its code, its C++ and its commands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "recipes" / "without_python.md"


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.capability("PT-04")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")  # torch.export, of itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_program_without_python_answers_as_the_trainer_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained net is exported and compiled to machine code, which a C++ program without an interpreter runs."""
    text = PAGE.read_text(encoding="utf-8")
    (cpp,), (build,) = (re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.M) for kind in ("cpp", "sh"))
    train, compare = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.M)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    code: dict[str, object] = {}
    exec(train, code)
    Path("digits.cpp").write_text(cpp, encoding="utf-8")
    subprocess.run(["sh", "-ec", build], check=True)
    exec(compare, code)
    linked = subprocess.run(["ldd", "digits"], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in linked
    assert "libpython" not in linked
    right = [int(line) for line in str(code["answered"]).split()] == code["y"][1400:].tolist()  # type: ignore[index]
    assert not right  # it is the net that answers, with the errors that it makes
