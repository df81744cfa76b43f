"""The page is one file that shows a run, and nothing in a run folder can get out of its place."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from loopwright.cli import main
from loopwright.report import write
from loopwright.report.comparing import group_by_seed
from loopwright.report.reading import read_run
from recorded import line, made
from tiny import classifier, samples

EVIL = "</script><img src=x onerror=alert(1)>\"'&amp;\u202e\x00"
ASSETS = Path(lw.__file__).parent / "report"


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text of the scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def names(self, *but: str) -> set[str]:
        return {tag for tag, _ in self.found} - set(but)


def data_of(page: str) -> Any:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def fitted(folder: Path, *, seed: int = 0, lr: float = 0.1, **settings: Any) -> lw.Run:
    """Three classes, learned for 3 epochs, 4 steps each."""
    net = classifier(seed=1)
    task = lw.Supervised(
        net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr), metrics={"accuracy": lw.metrics.Accuracy()}
    )
    data = lw.Loader(samples(40), batch_size=10, shuffle=True)
    given = {"checkpoint": False, "progress": False, "name": "net", **settings}
    return lw.Trainer(epochs=3, seed=seed, folder=folder, **given).fit(
        task, data, valid=lw.Loader(samples(11), batch_size=4)
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[lw.Run, str]:
    """A run with all parts that a page can have, and its page."""
    folder = tmp_path_factory.mktemp("page") / "runs"
    done = fitted(folder, callbacks=[lw.Report(classes=["ant", "bee", "cow"]), lw.Profiler(show=False)],
                  checkpoint=lw.Checkpoint("1 epoch", monitor="valid/loss"))  # fmt: skip
    return done, (done.folder / "report.html").read_text(encoding="utf-8")


def test_the_page_has_every_part(run):
    _, page = run
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "Curves", "Validation: confusions", "Validation: worst predictions", "Validation: best predictions", "Metrics",
        "Time and memory", "Checkpoints", "Model", "Settings", "Environment",
    ]  # fmt: skip
    for text in (
        "net",
        "done",
        "ant",
        "optimizers.main.lr",
        "exact resume",
        "data content",
        torch.__version__,
        "12 epochs"[3:],
        "best",
        "last",
    ):
        assert text in page
    assert re.search(r"1 ReLU|1 Tanh", page)


def test_the_page_needs_no_network(run):
    _, page = run
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!data:)\w""", page)
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    policy = next(a["content"] for tag, a in Elements(page).found if a.get("http-equiv") == "Content-Security-Policy")
    script = (ASSETS / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert f"<script>{script}</script>" in page


def test_curves_are_those_of_the_run(run):
    done, page = run
    charts = {chart["title"]: chart["lines"] for chart in data_of(page)["charts"]}
    assert list(charts) == ["loss", "accuracy", "lr"]
    lines = {(one["name"], one["style"]): one for one in charts["loss"]}
    assert set(lines) == {("valid/loss", "main"), ("train/loss", "raw"), ("train/loss", "main")}
    assert lines["valid/loss", "main"]["x"] == [4, 8, 12]
    assert lines["valid/loss", "main"]["y"] == pytest.approx(done.history["valid/loss"], rel=1e-5)
    assert lines["train/loss", "raw"]["x"] == list(range(1, 13))
    assert lines["train/loss", "raw"]["y"] == pytest.approx(list(done.history.losses["loss"]), rel=1e-5)


def test_confusions_are_those_of_the_validation(run):
    done, page = run
    with torch.no_grad():
        x, y = samples(11)
        guess = done.task.module.eval()(x).argmax(1)
    seen = json.loads((done.folder / "report" / "valid.json").read_text())
    counts = torch.zeros(3, 3, dtype=torch.long)
    for true, said in zip(y, guess, strict=True):
        counts[true, said] += 1
    assert seen["counts"] == counts.tolist()
    assert f"{int(counts.diag().sum())} of 11 right" in page


def test_an_empty_run_has_no_empty_boxes(tmp_path):
    page = write(made(tmp_path / "a")).read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Environment"]
    assert "Nothing was logged" in page
    assert "<table></table>" not in page


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"status": "running"}, "This run is still going on, or was killed"),
        ({"status": "interrupted"}, "This run was interrupted. fit(resume="),
        ({"status": "failed", "error": {"type": "NonFiniteError", "message": "loss is nan"}, "progress": {"step": 7}},
         "<strong>NonFiniteError after step 7</strong><pre>loss is nan</pre>"),
        ({"status": "failed", "error": {"type": "ConnectionError", "message": "closed", "notes": ["rank 1 failed"]}},
         "<strong>ConnectionError</strong><pre>closed\nrank 1 failed</pre>"),
    ],
)  # fmt: skip
def test_how_a_run_ended_stands_at_the_top(tmp_path, record, told):
    page = write(made(tmp_path / "a", line(1, x=1.0), **record)).read_text(encoding="utf-8")
    assert told in page
    assert f'class="badge {record["status"]}"' in page


def hostile(folder: Path) -> Path:
    """A run in which every text is an attack."""
    log = "".join(
        line(step, kind, **{EVIL: 1.0 * step, f"train/{EVIL}": 2.0}) for kind in ("train", "epoch") for step in (1, 2)
    )
    made(folder, log, name=EVIL, status=EVIL, command=[EVIL], started=EVIL, seed=EVIL, host=EVIL, exact=[EVIL],
         error={"type": EVIL, "message": EVIL}, versions={EVIL: EVIL}, source={"left_out": [EVIL]}, restarts=[EVIL],
         data={EVIL: [EVIL]},
         git={"commit": EVIL, "dirty": True, "diff": EVIL}, progress={"step": EVIL, "seconds": EVIL})  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps({EVIL[:-2]: [EVIL[:-2], {"a": EVIL[:-2]}]}), encoding="utf-8")
    (folder / "environment.txt").write_text(EVIL, encoding="utf-8")
    (folder / "profile.json").write_text(json.dumps({"lines": {EVIL: {"seconds": 2.0}}}))
    (folder / "report").mkdir()
    seen = {"counts": [[1, 2], [0, 1]], "classes": [EVIL, EVIL], "columns": [EVIL], "step": EVIL, "samples": EVIL,
            "points": [[1.0, 2.0], [2.0, EVIL], EVIL], "kind": EVIL,
            "worst": [{"text": EVIL, "p": 0.5, "guess": 0, "target": EVIL, "top": [[0, EVIL], EVIL]},
                      {"image": EVIL}, {"image": "iVBORw0K\" onerror=\"alert(1)"}, EVIL],
            "best": [{"row": [EVIL, 1.0], "guess": [EVIL], "target": EVIL, "n": EVIL}],
            "metrics": {EVIL: 1.0}}  # fmt: skip
    for name in ("valid", "test"):
        (folder / "report" / f"{name}.json").write_text(json.dumps(seen))
    about = {
        "summary": {"rows": [[EVIL] * 5], "totals": [EVIL], "parameters": EVIL},
        "device": EVIL,
    }
    (folder / "report" / "about.json").write_text(json.dumps(about))
    (folder / "report" / "warnings.json").write_text(json.dumps([{"kind": EVIL, "text": EVIL, "times": EVIL}, EVIL]))
    return folder


@pytest.mark.parametrize("several", [False, True])
def test_no_text_of_a_run_gets_out_of_its_place(tmp_path, several):
    runs = [hostile(tmp_path / name) for name in ("a", "b")[: 1 + several]]
    page = write(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    found = Elements(page)
    scripts = [attributes for tag, attributes in found.found if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    assert "img" not in found.names()
    assert not any(name.startswith("on") for _, attributes in found.found for name in attributes)
    assert "\u202e" not in page
    assert "\x00" not in page
    assert data_of(page)["charts"]
    assert page.count(html.escape("</script><img src=x onerror=alert(1)>")) > 3


JUNK = [
    "[]", "{}", "3", '"x"', "null", "{", "[" * 9999, '{"counts": 3, "points": 4, "worst": 5, "classes": 6}',
    '{"counts": [[1]], "summary": [], "rows": 1, "lines": [], "seconds": "x"}',
]  # fmt: skip


@pytest.mark.parametrize("junk", JUNK)
def test_parts_that_are_not_what_they_should_be_do_not_stop_the_page(tmp_path, junk):
    folder = made(tmp_path / "a", line(1, x=1.0))
    (folder / "report").mkdir()
    for name in ("valid.json", "test.json", "about.json", "warnings.json", "losses.safetensors"):
        (folder / "report" / name).write_text(junk)
    for name in ("run.json", "config.yaml", "profile.json"):
        (folder / name).write_text(junk)
    assert data_of(write(folder).read_text(encoding="utf-8"))["charts"][0]["title"] == "x"


def test_huge_names_are_cut(tmp_path):
    folder = made(tmp_path / "a", line(1, **{"n" * 100_000: 1.0}), name="x" * 1_000_000, command=["y" * 1_000_000])
    page = write(folder).read_text(encoding="utf-8")
    assert len(page) < 400_000
    assert f"<h1><span title={'x'!r}"[:10] in page


def test_a_page_of_many_series_stays_small(tmp_path):
    log = "".join(line(step, **{f"grad/{i}": step / 7 for i in range(150)}) for step in range(1, 1001))
    assert write(made(tmp_path / "a", log)).stat().st_size < 5_000_000


def test_series_are_chosen_by_name_or_pattern(tmp_path):
    folder = made(tmp_path / "a", line(1, **{"grad/a": 1.0, "grad/b": 2.0, "lr": 3.0}))
    charts = data_of(write(folder, series=["grad/*"]).read_text(encoding="utf-8"))["charts"]
    assert [one["name"] for chart in charts for one in chart["lines"]] == ["grad/a", "grad/b"]
    with pytest.raises(
        lw.SettingError, match=re.escape("no series 'grd/a' was logged. Known: 'grad/a', 'grad/b', 'lr'")
    ):
        write(folder, series=["grd/a"])
    with pytest.raises(lw.SettingError, match=re.escape("expected a list of names or patterns, such as ['lr']")):
        write(folder, series="lr")
    with pytest.raises(lw.SettingError, match="a report needs a run"):
        write([])


# ---------------------------------------------------------------------------------------------------- several runs


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of one setting, and another learning rate."""
    folder = tmp_path_factory.mktemp("three")
    return [fitted(folder, seed=seed, lr=lr).folder for seed, lr in ((0, 0.1), (1, 0.1), (0, 0.5))]


def test_runs_that_differ_by_their_seed_alone_are_one_band(three, tmp_path):
    assert group_by_seed([read_run(folder) for folder in three]) == [[0, 1], [2]]
    page = write(three, tmp_path / "all.html").read_text(encoding="utf-8")
    data = data_of(page)
    assert data["groups"] == ["net · lr=0.1 · 2 seeds", "net · lr=0.5"]
    loss = next(chart["lines"] for chart in data["charts"] if chart["title"] == "valid/loss")
    assert [(one["style"], one["color"]) for one in loss] == [("mean", 0), ("member", 0), ("member", 0), ("main", 1)]
    mean, first, second, _ = loss
    for i in range(3):
        values = sorted([first["y"][i], second["y"][i]])
        assert (mean["lo"][i], mean["hi"][i]) == pytest.approx(values)
        assert mean["y"][i] == pytest.approx(sum(values) / 2, rel=1e-5)


def test_only_settings_that_differ_are_shown(three, tmp_path):
    page = write(three, tmp_path / "all.html").read_text(encoding="utf-8")
    table = page[page.index("<h2>Differences</h2>") :]
    assert re.findall(r'<th scope="row">(.*?)</th>', table) == ["seed", "optimizers.main.lr"]


# ------------------------------------------------------------------------------------------------ the command line


def test_the_command_writes_the_page_and_prints_where(three, tmp_path, capsys):
    assert main(["report", str(three[0])]) == 0
    assert capsys.readouterr().out == f"{three[0] / 'report.html'}\n"
    assert main(["report", *map(str, three), "-o", "deep/all.html"]) == 0
    assert capsys.readouterr().out == "deep/all.html\n"
    assert Path("deep/all.html").is_file()
    assert main(["report", *map(str, three)]) == 0
    assert Path("comparison.html").is_file()


def test_the_command_says_what_is_no_run(tmp_path, capsys):
    assert main(["report", "nowhere"]) == 2
    assert capsys.readouterr().err == (
        "loopwright: nowhere does not exist. A run writes one with Trainer(folder='runs'). To list runs: loopwright "
        "runs FOLDER\n"
    )


@pytest.mark.slow
def test_the_wheel_has_style_and_script(tmp_path):
    from hatchling.builders.wheel import WheelBuilder

    root = Path(__file__).parent.parent.parent
    (built,) = WheelBuilder(str(root)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(built).namelist()
    assert {"loopwright/report/page.css", "loopwright/report/page.js", "loopwright/py.typed"} <= set(names)
