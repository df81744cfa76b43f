"""What a notebook shows of our objects: tables and curves, without widgets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from tiny import classifier, samples

EVIL = "<img src=x onerror=alert(1)>"
SAFE = "&lt;img src=x onerror=alert(1)&gt;"


def fitted(**settings: Any) -> lw.Run:
    net = classifier()
    task = lw.Supervised(
        net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1), metrics={EVIL: lw.metrics.Accuracy()}
    )
    return lw.Trainer(epochs=2, progress=False, **settings).fit(task, [samples(6)] * 3, valid=[samples(4)])


def cells(page: str) -> list[list[str]]:
    """The texts of a table, row by row."""
    rows = re.findall("<tr>(.*?)</tr>", page)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]


def test_a_history_is_a_curve_and_a_line_an_epoch():
    history = fitted(folder=None).history
    page = history._repr_html_()
    head, first, second = cells(page)
    assert head[:5] == ["epoch", "step", "samples", "seconds", "train/loss"]
    assert (first[0], second[1], second[4]) == ("1", "6", f"{history[1]['train/loss']:.4f}")
    assert "<polyline" in page
    assert SAFE in page
    assert EVIL not in page
    assert lw.History()._repr_html_() == "<p>no epoch yet</p>"


def test_a_run_is_its_status_its_values_and_its_folder(tmp_path: Path):
    run = fitted(folder=tmp_path / "<runs>")
    page = run._repr_html_()
    assert ["status", "done"] in cells(page)
    assert ["valid/loss", f"{run.metrics['valid/loss']:.4f}"] in cells(page)
    assert "&lt;runs&gt;" in page
    assert "<runs>" not in page
    assert EVIL not in page


def test_a_plan_lists_facts_and_problems():
    net = classifier()
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    trainer = lw.Trainer(epochs=2, folder=None, progress=False, callbacks=[lw.EarlyStopping(EVIL)])
    page = trainer.plan(task, [samples(6)])._repr_html_()
    assert "<li>stage &#x27;" in page
    assert '<b style="color:#c0182b">problem:</b>' in page
    assert EVIL not in page
    assert "no problem found" in lw.Trainer(epochs=2, folder=None).plan(task, [samples(6)])._repr_html_()


CELLS = [
    """
import torch, loopwright as lw
net = torch.nn.Linear(1, 1)
task = lw.Supervised(net, torch.nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.1))
data = [(torch.ones(2, 1) * i, torch.ones(2, 1)) for i in range(4)]
trainer = lw.Trainer(epochs=2, log_every=2, callbacks=[lw.Report()])
trainer.plan(task, data, data)
""",
    "run = trainer.fit(task, data, data)\nrun",
    "run.history",
    "lw.summary(net, data[0][0])",
]


@pytest.mark.slow
def test_in_a_notebook_every_object_is_shown_as_html(tmp_path: Path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    sources = [nbformat.v4.new_code_cell(source) for source in CELLS]
    nbclient.NotebookClient(nbformat.v4.new_notebook(cells=sources), timeout=120).execute(cwd=str(tmp_path))
    plan, (live, run), history, summary = ([out["data"]["text/html"] for out in cell.outputs] for cell in sources)
    assert "no problem found" in plan[0]
    assert "finished after 2 epochs" in live
    assert ["status", "done"] in cells(run)
    assert len(cells(history[0])) == 3
    assert "parameters: 2" in summary[0]
    assert len(list(tmp_path.glob("runs/Linear/*/report.html"))) == 1
