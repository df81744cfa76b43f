"""The Python code in the README and the docs runs as it is printed.

The ``python`` blocks of a page are one script, run top to bottom in an empty folder. A block after the
comment ``<!-- no-run -->`` is left out; what is no script (a console, a fragment) is fenced otherwise.
"""

from __future__ import annotations

import re
import sys
import traceback
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[^\s`]*)[^`]*$")


def script(text: str) -> str:
    """The ``python`` blocks of a page, each line at its own line number; ``""`` when there are none."""
    lines: list[str] = []
    indent, ticks, language, before = "", "", "", ""
    for line in text.splitlines():
        fence = FENCE.match(line)
        inside, keep = ticks != "", ""
        if not inside and fence:
            indent, ticks, language = fence["indent"], fence["ticks"], fence["language"]
            if before == "<!-- no-run -->":
                language = "no-run"
        elif inside and line.strip() == ticks:
            ticks = ""
        elif inside and language == "python":
            keep = line.removeprefix(indent)
        lines.append(keep)
        before = line.strip() or before
    return "\n".join(lines).rstrip()


def pages() -> list[Path]:
    found = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in found if path.is_file() and script(path.read_text(encoding="utf-8"))]


def page(name: str) -> Path:
    return ROOT / "docs" / name


FEW_LINES = [page(f"recipes/{name}.md") for name in ("augmentation", "losses", "ranking")]
MARKED = [*FEW_LINES, page("callbacks.md"), page("recipes/starting_and_predicting.md")]  # they have tests of their own


@pytest.mark.capability("TB-03")
@pytest.mark.parametrize(
    "page", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in pages() if path not in MARKED]
)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page of the docs runs as it is printed, those of the recipes too; what it shows it asserts."""
    run(page, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.capability("TB-03")
def test_a_page_runs_cell_by_cell_in_a_notebook(tmp_path: Path) -> None:
    """The blocks of the guide are the cells of a notebook, as on Colab."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    text = page("guide.md").read_text(encoding="utf-8")
    cells = [nbformat.v4.new_code_cell(code) for code in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.M)]
    assert len(cells) > 5
    done = nbclient.NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=120).execute(cwd=str(tmp_path))
    assert [cell.execution_count for cell in done.cells] == [*range(1, len(cells) + 1)]
    assert (tmp_path / "runs").is_dir()


@pytest.mark.capability("CA-06", "CA-12", "CA-42")
@pytest.mark.parametrize("page", FEW_LINES, ids=lambda path: path.name)
def test_recipes_of_a_few_lines(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Augmentation, losses and a recommender take a few lines; its parts, no class of ours, serve words unchanged."""
    run(page, tmp_path, monkeypatch)


@pytest.mark.capability("SK-16", "TB-01")
def test_the_page_about_callbacks_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own callbacks, training steps and trainers are documented; one line more makes 15 % more answers right."""
    run(page("callbacks.md"), tmp_path, monkeypatch)


@pytest.mark.capability("CA-26")
def test_the_recipes_of_predicting_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test-time augmentation is a predict_step of four lines, for predictions and tests."""
    run(page("recipes/starting_and_predicting.md"), tmp_path, monkeypatch)


def run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Execute a page as the script that it prints, in ``folder``; a failure names the page and the line."""
    code = script(page.read_text(encoding="utf-8"))
    path = folder / f"{page.stem}.py"
    path.write_text(code, encoding="utf-8")  # inspect and tracebacks find their source
    main = types.ModuleType("__main__")
    main.__file__ = str(path)
    monkeypatch.setitem(sys.modules, "__main__", main)
    try:
        exec(compile(code, path, "exec"), main.__dict__)
    except BaseException as error:  # SystemExit too: a page that leaves has failed
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = frames[-1].lineno if frames else getattr(error, "lineno", "?")
        if isinstance(error, (KeyboardInterrupt, pytest.exit.Exception)):
            raise
        pytest.fail(f"{page.name}, line {line}: {type(error).__name__}: {error}\n\n{traceback.format_exc()}", False)


PAGE = """\
# Title

```python
x = 1
```

<!-- no-run -->
```python
raise SystemExit
```

```console
$ python
```

- a list

  ````python
  text = '''
  ```
  '''
  ````

```python
assert x == 2, "x is 1"
```
"""


def test_blocks_of_a_page_are_one_script_at_their_own_line_numbers() -> None:
    lines = script(PAGE).splitlines()
    assert {number: line for number, line in enumerate(lines, 1) if line} == {
        4: "x = 1",
        19: "text = '''",
        20: "```",
        21: "'''",
        25: 'assert x == 2, "x is 1"',
    }


def test_a_page_without_code_has_no_script() -> None:
    assert script("# Title\n\n```yaml\na: 1\n```\n") == ""


def test_a_failing_block_names_the_page_and_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    with pytest.raises(pytest.fail.Exception, match=r"page\.md, line 25: AssertionError: x is 1"):
        run(page, tmp_path, monkeypatch)
