"""Who starts a run that has been done before is told so, and where its result is; nothing else is called the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from tiny import acts, classifier, samples

SAME = "this very run was done before"
SCRIPT = """
import os
import warnings

import torch
import loopwright as lw

def fit(lr=0.05):
    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    net = torch.nn.Linear(3, 1)
    task = lw.Supervised(net, torch.nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=lr))
    run = lw.Trainer(epochs=2, seed=4, progress=False, name="again").fit(task, (x, y), (x, y))
    print(run.folder, format(run.metrics["valid/loss"], ".4g"))

fit()
if len(os.listdir("runs/again")) > 1:
    warnings.simplefilter("error")
    fit(lr=0.06)  # another run: nothing is said
    warnings.filterwarnings("ignore", "this very run")
    fit()
"""


@pytest.mark.capability("GEN-04")
def test_a_finished_run_that_is_started_again_is_told_with_its_result_and_nothing_if_told_not_to() -> None:
    """A script that is run again says that this very run was done before, where and with which result; a filter ends
    that."""
    Path("train.py").write_text(SCRIPT)
    (first, said), (again, said_again) = [
        (done.stdout.split(), done.stderr)
        for done in (
            subprocess.run([sys.executable, "train.py"], capture_output=True, text=True, check=True) for _ in range(2)
        )
    ]
    assert said == ""
    folder, result = first
    assert said_again.count("Warning") == 1
    assert f"train.py:13: LoopwrightWarning: {SAME}: {folder} finished on " in said_again  # the line that started it
    assert f" with valid/loss {result}. Settings, code, seed and starting weights are the same" in said_again
    assert again[1] == again[5] == result  # it was the same indeed
    assert again[3] != result


# ------------------------------------------------------------------------------------------ what is the same, what not


@pytest.fixture(autouse=True)
def script(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the main program: under pytest-xdist there is none."""
    path = Path("main.py").resolve()
    path.write_text("version = 1\n")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(path), raising=False)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    return path


def fit(*, lr: float = 0.1, net: int = 1, data: int = 2, valid: int = 3, resume: Any = None, **settings: Any) -> lw.Run:
    model = classifier(seed=net)
    task = lw.Supervised(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=lr))
    trainer = lw.Trainer(**{"epochs": 2, "seed": 0, "progress": False, **settings})
    return trainer.fit(task, samples(seed=data), samples(seed=valid), resume=resume)


def told(**settings: Any) -> list[str]:
    """What a run says of earlier ones."""
    with warnings.catch_warnings(record=True, action="always") as caught:
        fit(**settings)
    return [str(one.message) for one in caught if SAME in str(one.message)]


@pytest.mark.capability("GEN-04")
def test_it_is_told_before_anything_is_spent() -> None:
    """A run that was done before is told before its first step and its folder: as an error, it costs nothing."""
    steps: list[int] = []
    count = acts(on_step_start=lambda run: steps.append(run.progress.step))
    fit(callbacks=[count])
    first = len(steps)
    with warnings.catch_warnings(action="error"), pytest.raises(lw.LoopwrightWarning, match=SAME):
        fit(callbacks=[count])
    assert len(steps) == first > 0
    assert len(list(Path("runs").glob("*/*/run.json"))) == 1


@pytest.mark.capability("GEN-04")
@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.2}, {"net": 5}, {"data": 6}, {"valid": 7}, {"epochs": 3}, {"seed": 8}, {"clip_norm": 1.0},
        {"callbacks": [lw.EMA(0.9)]}, {"deterministic": True}, {"precision": "bf16"}, {"folder": "elsewhere"},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_another_run_is_not_called_the_same(change: dict[str, Any]) -> None:
    fit()
    assert told(**change) == []
    assert len(told()) == 1


def test_where_it_is_written_and_shown_makes_no_other_run() -> None:
    folder = fit(name="first").folder
    for change in ({"name": "second"}, {"loggers": ["csv"]}):
        assert len(told(**change)) == 1
    assert folder is not None
    assert told(name="first")[0].startswith(f"{SAME} under another name, 'Sequential': runs/Sequential/")
    assert told(name="first")[0].startswith(f"{SAME}: runs/first/")
    assert folder.exists()


@pytest.mark.capability("GEN-04")
def test_other_code_or_another_command_line_is_another_run(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit()
    script.write_text("version = 2\n")
    assert told() == []
    script.write_text("version = 1\n")
    assert len(told()) == 1
    monkeypatch.setattr(sys, "argv", ["main.py", "--width", "3"])
    assert told() == []


def test_a_module_that_the_script_imports_is_code_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("widths_of_it.py").write_text("width = 1\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    __import__("widths_of_it")
    fit()
    assert len(told()) == 1
    Path("widths_of_it.py").write_text("width = 3\n")
    assert told() == []
    Path("widths_of_it.py").unlink()  # nobody knows what runs
    assert told() == []
    del sys.modules["widths_of_it"]


def test_without_a_seed_the_generators_must_stand_where_they_stood() -> None:
    for manual, times in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(manual)
        assert len(told(seed=None)) == times
    torch.rand(1)
    assert told(seed=None) == []


def test_where_the_code_is_not_known_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook, or at a prompt."""
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    fit()
    assert told() == []


# ------------------------------------------------------------------------------------------------------- which counts


class Fails(lw.Callback):
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def on_epoch_end(self, run: lw.Run) -> None:
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_did_not_finish_does_not_count(error: type[BaseException]) -> None:
    for _ in range(2):
        with pytest.raises(error), warnings.catch_warnings(action="error"):
            fit(callbacks=[Fails(error)])


def test_a_run_that_is_gone_or_went_on_with_other_settings_does_not_count() -> None:
    folder = fit().folder
    assert folder is not None
    fit(epochs=4, resume=folder)
    assert told() == []
    newest = fit().folder
    assert newest is not None
    (newest / "run.json").unlink()
    assert told() == []


def test_a_run_that_was_interrupted_and_ended_after_a_resume_counts() -> None:
    stop = lw.Event.EPOCH_END(once=1)

    def fit_again(*, stops: bool, resume: Any = None) -> lw.Run:
        model = classifier(seed=1)
        task = lw.Supervised(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))
        trainer = lw.Trainer(epochs=2, seed=0, progress=False)

        @trainer.on(stop)
        def interrupt(run: lw.Run) -> None:
            if stops:
                raise KeyboardInterrupt

        return trainer.fit(task, samples(), resume=resume)

    with pytest.raises(KeyboardInterrupt):
        fit_again(stops=True)
    with warnings.catch_warnings(action="error"):
        run = fit_again(stops=False, resume="auto")
    assert run.resumed_from is not None or run.progress.step > 0
    with pytest.warns(lw.LoopwrightWarning, match=f"{SAME}: {re.escape(str(run.folder))}"):
        fit_again(stops=False)


def test_the_same_task_fitted_on_is_no_repetition() -> None:
    model = classifier()
    task = lw.Supervised(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    with warnings.catch_warnings(action="error"):
        for epochs in (1, 2, 3):
            run = lw.Trainer(epochs=epochs, seed=0, progress=False).fit(task, samples())
    assert run.progress.epoch == 3
    assert run.folder is not None
    assert json.loads((run.folder / "run.json").read_text())["identity"] is None


def test_a_mark_that_was_not_written_by_a_run_is_passed_over() -> None:
    fit()
    listed = Path("runs/.finished")
    (mark,) = listed.read_text().splitlines()
    assert len(told()) == 1
    for text in ("../../etc", "a/b/c", "", "no/such", "\0", "x/..", "../x"):
        listed.write_text(f"{mark.split()[0]} {text}\nno line of ours \x00\n")
        assert told() == [], text


def test_a_folder_of_runs_that_holds_nothing_else_is_not_searched() -> None:
    """Two files are opened, however many runs there are."""
    fit()
    for i in range(200):
        (Path("runs/Sequential") / f"old-{i}").mkdir()
        (Path("runs/Sequential") / f"old-{i}" / "run.json").write_text("no JSON")
    assert len(told()) == 1


class Asked(torch.utils.data.Dataset[Any]):
    """Counts how often it is asked what it is."""

    times = 0

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        return torch.zeros(2), torch.tensor(0)

    def fingerprint(self) -> dict[str, Any]:
        self.times += 1
        return {"kind": "Asked"}


@pytest.mark.parametrize("loader", [lw.Loader, torch.utils.data.DataLoader])
def test_data_is_looked_at_once_for_the_folder_the_identity_and_every_checkpoint(loader: Any) -> None:
    data, model = Asked(), nn.Linear(2, 2)
    task = lw.Supervised(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    run = lw.Trainer(epochs=2, progress=False, checkpoint=lw.Checkpoint("1 step")).fit(task, loader(data, 4))
    assert data.times == 1
    assert json.loads((run.folder / "run.json").read_text())["data"]["kind"] == "Asked"
