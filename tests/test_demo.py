"""The demo keeps its promise. All five seeds: ``for s in 0 1 2 3 4; do python examples/demo.py --seed $s; done``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
from safetensors.torch import load_file

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the demo prints and leaves behind after one epoch."""
    return run_demo(tmp_path_factory.mktemp("demo") / "runs", "--epochs", "1")


def run_demo(folder: Path, *options: str) -> tuple[str, Path]:
    """Run the demo as ``make demo`` does, without a terminal; what it printed, and its run folder."""
    command = [sys.executable, "-W", "error", str(DEMO), "--folder", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "digits").iterdir()
    return done.stdout, run


def rows(out: str, title: str) -> list[list[str]]:
    """Cells of the ten lines, one a digit, of the table whose first line holds ``title``."""
    (table,) = (part.splitlines() for part in out.split("\n\n") if title in part.partition("\n")[0])
    rule = next(i for i, line in enumerate(table) if set(line.strip()) == {"-"})
    return [line.split() for line in table[rule + 1 : rule + 11]]


def test_one_epoch_gives_the_whole_report(short):
    out, run = short
    report = (run / "report.txt").read_text(encoding="utf-8")
    assert report in out
    assert max(map(len, report.splitlines())) <= 80
    picture = matplotlib.image.imread(run / "report.png")
    assert picture.shape == (1000, 1300, 4)
    (best,) = (run / "checkpoints").glob("step-*")
    assert sum(weights.numel() for weights in load_file(best / "model.safetensors").values()) > 30_000
    assert f"{run}/\n  report.png " in out
    listed = out.partition(f"{run}/\n")[2].partition("\n\n")[0].splitlines()
    names, about = zip(*(line.split(maxsplit=1) for line in listed), strict=True)  # a line about each
    assert sorted(names) == sorted(path.name for path in run.iterdir() if not path.name.startswith("."))
    assert all(about)


def test_the_tables_agree_with_one_another(short):
    out, _ = short
    right, total = map(int, re.search(r": (\d+) of (\d+) images", out).groups())
    classes, confusion = rows(out, "precision"), rows(out, "true digit")
    assert [row[0] for row in classes] == [row[0] for row in confusion] == [str(digit) for digit in range(10)]
    counts = [[0 if cell == "." else int(cell) for cell in row[1:]] for row in confusion]
    assert total == 450 == sum(map(sum, counts))
    assert right == sum(counts[i][i] for i in range(10))
    assert [int(row[-1]) for row in classes] == [sum(row) for row in counts]
    assert [row[2] for row in classes] == [f"{counts[i][i] / sum(counts[i]):.1%}" for i in range(10)]


def test_it_ends_with_a_page_of_the_run(short):
    out, run = short
    assert out.endswith(f"\n\nOpen {run / 'report.html'} in a browser: the whole run on one page\n")
    page = (run / "report.html").read_text(encoding="utf-8")
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles[:4] == ["Curves", "Test: confusions", "Test: worst predictions", "Test: best predictions"]
    right, total = re.search(r": (\d+) of (\d+) images", out).groups()
    assert f"{right} of {total} right" in page  # as the tables say
    assert page.count("data:image/png;base64,") >= 24


@pytest.mark.slow
def test_the_demo_reads_99_percent_of_unseen_digits(folder):
    out, run = run_demo(folder, "--seed", "0")
    assert float(re.search(r"Test accuracy ([\d.]+)%", out)[1]) >= 99.0
    assert all(float(row[3].rstrip("%")) > 90 for row in rows(out, "precision"))
    assert (run / "report.png").stat().st_size > 30_000
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "done"
    assert record["seed"] == 0
