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
import torch

import loopwright as lw
from loopwright import loop

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
TWO_PAPERS = [page(f"recipes/{name}.md") for name in ("dcgan", "optimizers")]
APART = [page(name) for name in ("callbacks.md", "recipes/search.md", "recipes/starting_and_predicting.md")]
DEPTHS = [page(f"recipes/{name}.md") for name in ("how_deep", "kinds", "config")]
DOMAINS, ELSEWHERE = page("recipes/domains.md"), page("recipes/without_python.md")
MARKED = [*FEW_LINES, *TWO_PAPERS, *DEPTHS, *APART, DOMAINS, ELSEWHERE]  # they have tests of their own


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


@pytest.mark.capability("CA-02", "CA-06", "CA-42", "TB-04")
@pytest.mark.parametrize("page", FEW_LINES, ids=lambda path: path.name)
def test_recipes_of_a_few_lines(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Augmentation, losses and a recommender take a few lines; its parts, no class of ours, serve words unchanged."""
    run(page, tmp_path, monkeypatch)


@pytest.mark.capability("CA-02", "TB-03")
@pytest.mark.parametrize("page", DEPTHS, ids=lambda path: path.name)
def test_a_user_chooses_how_deep_to_go(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task said, its step written, or all of a step by hand: the same bits; and the kinds of task, each shown."""
    run(page, tmp_path, monkeypatch)


KINDS = (
    "linear regression", "several classes", "several labels", "several heads", "a recommender",
    "digits by a convolutional network", "segmentation", "metric learning", "GAN", "variational autoencoder",
    "a search with Optuna", "a configuration file",
)  # fmt: skip


@pytest.mark.capability("CA-02")
def test_each_kind_of_task_is_shown_in_a_few_lines() -> None:
    """Twelve kinds of task, each a tested section of under 40 lines, or a tested example."""
    text = page("recipes/how_deep.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| \[[^\]]+\]\(([^)#]+)#?([^)]*)\) \|$", text, re.M)
    assert tuple(kind for kind, *_ in rows) == KINDS
    for _, file, anchor in rows:
        target = page("recipes") / file
        if not anchor:
            assert target.resolve() in {(ROOT / "examples" / f"{name}.py").resolve() for name in ("gan", "task")}
            continue  # test_examples.py runs it
        assert target in (*FEW_LINES, *DEPTHS, *APART)
        sections = re.split(r"^## +", target.read_text(encoding="utf-8"), flags=re.M)
        (section,) = (one for one in sections if slug(one.partition("\n")[0]) == anchor)
        assert 3 <= len([line for line in script(section).splitlines() if line]) < 40


def slug(heading: str) -> str:
    """What a heading is called in a link: ``"Two words (2019)"`` -> ``"two-words-2019"``."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.capability("SK-16", "TB-01")
def test_the_page_about_callbacks_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own callbacks, training steps and trainers are documented; one line more makes 15 % more answers right."""
    run(page("callbacks.md"), tmp_path, monkeypatch)


@pytest.mark.capability("TB-04")
@pytest.mark.parametrize("page", TWO_PAPERS, ids=lambda path: path.name)
def test_recipes_of_networks_against_each_other_and_of_optimizers(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DCGAN in two phases and SAM as a callback draw nearer to the digits and walk uphill, and replace nothing."""
    run(page, tmp_path, monkeypatch)


@pytest.mark.capability("CA-02", "PL-14")
def test_the_recipe_of_a_search_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search for hyper-parameters is a loop over runs, ours or Optuna's; a handler stops what comes to nothing."""
    pytest.importorskip("optuna")
    run(page("recipes/search.md"), tmp_path, monkeypatch)


@pytest.mark.capability("CA-26", "TB-04")
def test_the_recipes_of_predicting_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test-time augmentation is a predict_step of four lines, for predictions and tests."""
    run(page("recipes/starting_and_predicting.md"), tmp_path, monkeypatch)


def run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Execute a page as the script that it prints, in ``folder``; a failure names the page and the line.

    No page may put something of its own in the place of a function or a class of Loopwright.
    """
    before = inside()
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
    after = inside()
    gone = {name for name, value in before.items() if after.get(name) is not value}
    patched = sorted(gone | {name for name in after.keys() - before.keys() if name.rpartition(".")[0] in before})
    if patched:
        pytest.fail(f"{page.name} replaces {', '.join(patched)}", False)


def inside() -> dict[str, object]:
    """All functions and classes of Loopwright, and what its classes are made of, by name."""
    lw.optim.Stepwise([torch.nn.Parameter(torch.ones(1))], [lw.optim.adam])  # torch wraps step of a class at its first
    found: dict[str, object] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "loopwright":
            continue
        for key, value in list(vars(module).items()):
            if callable(value) and not key.startswith("__compiled_fn_"):  # torch's, until what it belongs to is gone
                found[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}.{key}.{own}": made for own, made in vars(value).items() if callable(made)}
    return found


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


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("lw.Trainer.validate = print", "loopwright.trainer.Trainer.validate"),
        ("lw.Trainer.more = print", "loopwright.trainer.Trainer.more"),
        ("del lw.Trainer.validate", "loopwright.trainer.Trainer.validate"),
        ("import loopwright.loop; loopwright.loop.train_step = print", "loopwright.loop.train_step"),
    ],
)
def test_a_page_that_replaces_something_of_ours_fails(
    code: str, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```python\nimport loopwright as lw\n{code}\n```\n", encoding="utf-8")
    kept = dict(vars(lw.Trainer)), loop.train_step
    try:
        with pytest.raises(pytest.fail.Exception, match=rf"page.md replaces {re.escape(names)}"):
            run(page, tmp_path, monkeypatch)
    finally:
        lw.Trainer.validate, loop.train_step = kept[0]["validate"], kept[1]
        if hasattr(lw.Trainer, "more"):
            del lw.Trainer.more


def test_what_the_table_of_callbacks_shows_can_be_typed_as_it_stands() -> None:
    page = (ROOT / "docs" / "callbacks.md").read_text(encoding="utf-8").partition("## One line")[0]
    shown = re.findall(r"`(lw\.[\w.]+\([^`]*\))`", page)
    assert len(shown) > 20
    names = {"lw": lw, "fn": abs, "schedule": lw.schedules.linear(0.1, 0.5), "loader": [torch.ones(1)]}
    for code in shown:
        eval(code, dict(names))
