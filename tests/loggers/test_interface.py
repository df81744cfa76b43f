"""What a logger may have, how it is named, and what reaches it."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
import yaml

import loopwright as lw
from loopwright.loggers import flat, points, read_jsonl
from loopwright.loggers.files import as_path
from tiny import bits, line, pairs, same, sgd_task, trainer

DATA = pairs([1.0], [2.0], [3.0], [4.0])


class Everything:
    """Has all that a logger may have, and notes what it was given."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start(self, run: lw.Run) -> None:
        self.calls.append(("start", run.progress.step))

    def log_config(self, config: Any) -> None:
        self.calls.append(("config", config))

    def log(self, progress: lw.Progress, values: Any, kind: str) -> None:
        self.calls.append((kind, progress.step))

    def log_figure(self, progress: lw.Progress, name: str, figure: Any) -> None:
        self.calls.append(("figure", progress.step, name, type(figure).__name__))

    def log_text(self, progress: lw.Progress, name: str, text: str) -> None:
        self.calls.append(("text", progress.step, name, text))

    def log_artifact(self, progress: lw.Progress, name: str, path: Path) -> None:
        self.calls.append(("artifact", progress.step, name, path.name))

    def flush(self) -> None:
        self.calls.append(("flush",))

    def close(self, status: str) -> None:
        self.calls.append(("close", status))


class OnlyLog:
    def __init__(self) -> None:
        self.kinds: list[str] = []

    def log(self, progress: lw.Progress, values: Any, kind: str) -> None:
        self.kinds.append(kind)


def shown(user: lw.Trainer, what: Any, step: int = 2) -> lw.Run:
    """A run of 4 steps that logs ``what`` after step 2."""
    user.on(lw.Event.STEP_END(once=step))(lambda run: run.log(what(run) if callable(what) else what))
    return user.fit(sgd_task(line(), lr=0.0), DATA)


def figure() -> Any:
    made = plt.figure()
    made.subplots().plot([1, 2])
    return made


def test_every_method_is_called_with_what_its_signature_says(folder: Path) -> None:
    logger, plain, file = Everything(), OnlyLog(), Path("model.onnx")
    file.write_text("weights")
    run = shown(
        trainer(epochs=1, loggers=[logger, plain], folder=folder, log_every=2, seed=3),
        {"note": "look here", "curve": figure(), "model": file, "number": 0.5},
    )
    plt.close("all")
    calls = [call for call in logger.calls if call[0] != "config"]
    assert calls == [
        ("start", 0), ("flush",), ("train", 2), ("text", 2, "note", "look here"), ("figure", 2, "curve", "Figure"),
        ("artifact", 2, "model", "model.onnx"), ("train", 4), ("epoch", 4), ("flush",), ("close", "done"),
    ]  # fmt: skip
    assert plain.kinds == ["train", "train", "epoch"]
    assert run.metrics["train/number"] == 0.5
    assert run.folder is not None
    kept = {str(p.relative_to(run.folder)) for p in run.folder.rglob("*") if p.is_file()}
    assert {"figures/curve-00000002.png", "texts/note-00000002.txt", "artifacts/model/model.onnx"} <= kept
    assert (run.folder / "figures/curve-00000002.png").read_bytes().startswith(b"\x89PNG")


def test_a_logger_is_told_software_parameters_and_data() -> None:
    logger = Everything()
    trainer(epochs=1, loggers=[logger], seed=3, name="digits").fit(sgd_task(line(), lr=0.25), DATA)
    (config,) = (call[1] for call in logger.calls if call[0] == "config")
    assert config["name"] == "digits"
    assert config["seed"] == 3
    assert config["versions"]["loopwright"] == lw.__version__
    assert config["packages"]["numpy"] == config["versions"]["numpy"]
    assert config["data"]["batches"] == 4
    settings = flat(config["settings"])
    assert settings["optimizers.main.lr"] == 0.25
    assert settings["models.model.parameters"] == 1


def test_run_json_has_the_fingerprint_of_the_data(folder: Path) -> None:
    import json

    run = trainer(epochs=1, folder=folder).fit(sgd_task(line()), DATA)
    assert run.folder is not None
    assert json.loads((run.folder / "run.json").read_text())["data"]["kind"] == "list of batches"


def test_a_client_that_draws_as_it_begins_leaves_the_generators_alone(folder: Path) -> None:
    """As Neptune's does, which draws the name of a run from Python's."""

    class Draws(OnlyLog):
        def start(self, run: lw.Run) -> None:
            random.random()

        def log_config(self, config: Any) -> None:
            torch.rand(())

    before = bits()
    trainer(epochs=1, loggers=[Draws()]).fit(sgd_task(line()), DATA)
    assert same(bits(), before)


def test_the_records_of_a_run_with_a_folder_are_always_in_it(folder: Path) -> None:
    run = trainer(epochs=1, loggers="csv", folder=folder).fit(sgd_task(line()), DATA)
    assert run.folder is not None
    assert len(read_jsonl(run.folder / "metrics.jsonl")) == 2
    assert len((run.folder / "metrics.csv").read_text().splitlines()) == 3
    elsewhere = lw.JSONLLogger("own.jsonl")
    run = trainer(epochs=1, loggers=[elsewhere], folder=folder).fit(sgd_task(line()), DATA)
    assert run.folder is not None
    assert not (run.folder / "metrics.jsonl").exists()
    assert len(read_jsonl("own.jsonl")) == 2


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({"note": "text"}, "run.log({'note': ...}): no logger of this run has log_text(). Give the Trainer a folder, "
                           "which keeps it, or a logger that takes it, such as loggers=['tensorboard']"),
        ({"model": Path("gone.pt")}, "run.log({'model': ...}): there is no file gone.pt"),
        ({"x": [1, 2]}, "run.log({'x': ...}) takes a number, a 0-dimensional tensor, a text, a figure with "
                        "savefig() or a Path; got [1, 2]"),
        ({"x": None}, "run.log({'x': ...}) takes a number, a 0-dimensional tensor, a text, a figure with "
                      "savefig() or a Path; got None"),
    ],
)  # fmt: skip
def test_nothing_that_is_asked_for_is_dropped(what: Any, says: str) -> None:
    with pytest.raises(lw.SettingError) as error:
        shown(trainer(epochs=1, loggers=[OnlyLog()]), what)
    assert str(error.value) == says


class CannotDraw(Everything):
    def log_figure(self, progress: lw.Progress, name: str, figure: Any) -> None:
        raise RuntimeError("no font")


def test_a_figure_that_cannot_be_drawn_is_said_and_harms_no_record() -> None:
    logger = CannotDraw()
    with pytest.warns(lw.LoopwrightWarning) as caught:
        run = shown(trainer(epochs=1, loggers=[logger], log_every=1), {"curve": figure()})
    plt.close("all")
    assert run.status == "done"
    assert [str(w.message) for w in caught] == [
        "'curve' is lost: CannotDraw.log_figure failed after step 2: RuntimeError('no font')"
    ]
    assert [call[1] for call in logger.calls if call[0] == "train"] == [1, 2, 3, 4]


class Forgets(OnlyLog):
    def state_dict(self) -> Any:
        raise ConnectionError("the backend is down")

    def load_state_dict(self, state: Any) -> None: ...


def test_a_logger_that_cannot_tell_its_state_does_not_stop_a_checkpoint(folder: Path) -> None:
    with pytest.warns(lw.LoopwrightWarning) as caught:
        run = trainer(epochs=1, loggers=[Forgets()], folder=folder, checkpoint=lw.Checkpoint("2 steps")).fit(
            sgd_task(line()), DATA
        )
    assert str(caught[0].message).startswith(
        "Forgets.flush failed after step 0: ConnectionError('the backend is down')"
    )
    assert run.status == "done"
    assert run.folder is not None
    assert any((run.folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("valid/confusion", "valid/confusion"),
        ("../../../etc/passwd", "%2e%2e/%2e%2e/%2e%2e/etc/passwd"),
        ("/etc/passwd", "etc/passwd"),
        (".hidden", "%2ehidden"),
        ("a\\b\0:c", "a%5cb%00%3ac"),
        ("", "%"),
        ("..", "%2e%2e"),
        ("\ud800", "%ed%a0%80"),
        ("ünïcode", "ünïcode"),
    ],
)
def test_no_name_leads_out_of_the_folder(name: str, path: str, folder: Path) -> None:
    assert as_path(name) == path
    assert len(as_path(name + "x" * 500).split("/")[-1]) <= 60
    run = shown(trainer(epochs=1, folder=folder), {name: "text"})
    assert run.folder is not None
    assert (run.folder / "texts" / f"{path}-00000002.txt").read_text() == "text"
    assert {p.name for p in Path.cwd().iterdir()} == {"runs"}


def test_a_folder_is_copied_and_what_lies_in_the_run_folder_is_not(folder: Path) -> None:
    Path("maps/deep").mkdir(parents=True)
    Path("maps/deep/a.txt").write_text("a")
    run = shown(trainer(epochs=1, folder=folder), {"maps": Path("maps")})
    assert run.folder is not None
    assert (run.folder / "artifacts/maps/maps/deep/a.txt").read_text() == "a"
    run = shown(trainer(epochs=1, folder=folder), lambda run: {"own": run.folder / "run.json"})
    assert run.folder is not None
    assert not (run.folder / "artifacts").exists()
    with pytest.raises(lw.SettingError, match=r"the run folder .* lies in it"):
        shown(trainer(epochs=1, folder=folder), {"all": Path()})


def test_a_resumed_run_writes_its_figures_once(folder: Path) -> None:
    def fit(stop: bool) -> lw.Run:
        user = trainer(epochs=2, folder=folder, checkpoint=lw.Checkpoint("2 steps"))
        user.on(lw.Event.STEP_END)(lambda run: run.log({"note": f"at {run.progress.step}"}))
        user.on(lw.Event.STEP_END(once=5))(lambda run: stop and os.kill(os.getpid(), 2))
        return user.fit(sgd_task(line()), DATA, resume="auto")

    with pytest.raises(KeyboardInterrupt):
        fit(stop=True)
    run = fit(stop=False)
    assert run.folder is not None
    assert sorted(p.name for p in (run.folder / "texts").iterdir()) == [f"note-{n:08d}.txt" for n in range(1, 9)]


# ------------------------------------------------------------------------------------------------------------- names


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A distribution with a logger, as pip would install it."""
    site = tmp_path / "site"
    (site / "notebook_log-1.0.dist-info").mkdir(parents=True)
    (site / "notebook_log.py").write_text(
        "class Log:\n"
        "    def __init__(self, path='plain.txt'):\n"
        "        self.file = open(path, 'a')\n"
        "    def log(self, progress, values, kind):\n"
        "        self.file.write(f'{kind} {progress.step}\\n')\n"
        "    def close(self, status):\n"
        "        self.file.close()\n"
    )
    info = site / "notebook_log-1.0.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: notebook-log\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[loopwright.loggers]\nplaintext = notebook_log:Log\n")
    monkeypatch.syspath_prepend(site)
    return "plaintext"


def test_a_plug_in_is_found_by_the_name_of_its_entry_point(installed: str) -> None:
    trainer(epochs=1, loggers=installed).fit(sgd_task(line()), DATA)
    assert Path("plain.txt").read_text() == "train 4\nepoch 4\n"
    trainer(epochs=1, loggers=[f"{installed}:other.txt"]).fit(sgd_task(line()), DATA)
    assert Path("other.txt").read_text() == "train 4\nepoch 4\n"
    sys.modules.pop("notebook_log")


def test_a_name_carries_the_first_argument() -> None:
    assert lw.loggers.logger_named("csv:table.csv").path == "table.csv"


def test_an_unknown_name_lists_the_known_ones(installed: str) -> None:
    with pytest.raises(lw.SettingError) as error:
        trainer(epochs=1, loggers="tensorbord")
    assert str(error.value) == (
        "there is no logger named 'tensorbord'. Known: 'csv', 'jsonl', 'mlflow', 'plaintext', 'table', 'tensorboard', "
        "'wandb'. Did you mean 'tensorboard'? Another one is an object with log(progress, values, kind), or a "
        "plug-in: examples/trackers has those of Comet, Neptune, Polyaxon and Visdom, which docs/loggers.md tells how "
        "to add"
    )


@pytest.mark.parametrize(
    ("name", "package", "says"),
    [
        ("tensorboard", "tensorboard", 'TensorBoardLogger needs tensorboard: pip install "loopwright[tensorboard]"'),
        ("mlflow", "mlflow", 'MLflowLogger needs mlflow: pip install "loopwright[mlflow]"'),
        ("wandb", "wandb", 'WandbLogger needs wandb: pip install "loopwright[wandb]"'),
    ],
)
def test_a_missing_package_is_an_error_that_says_what_to_install(
    name: str, package: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr("loopwright.loggers.tracking.find_spec", lambda n: None if n == package else found(n))
    with pytest.raises(ImportError) as error:
        trainer(epochs=1, loggers=name)
    assert str(error.value) == says


def test_the_environment_names_the_usual_loggers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Where a Trainer is told none and has a folder; the settings of the run have them."""
    monkeypatch.setenv("LOOPWRIGHT_LOGGERS", " csv, csv:all.csv ,")
    task = sgd_task(line(), lr=0.1)
    run = trainer(epochs=1, folder=folder).fit(task, pairs([1.0]))
    assert run.folder is not None
    assert run.settings["loggers"] == ["csv", "csv:all.csv"]
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["loggers"] == ["csv", "csv:all.csv"]
    rows = Path("all.csv").read_text().splitlines()
    assert rows[1].startswith(f"{run.folder.parent.name}/{run.folder.name},")
    assert [row.partition(",")[2] for row in rows] == (run.folder / "metrics.csv").read_text().splitlines()
    for settings in ({"folder": None}, {"folder": folder, "loggers": []}, {"folder": folder, "loggers": "table"}):
        assert not any(isinstance(one, lw.CSVLogger) for one in trainer(epochs=1, **settings).loggers)
    monkeypatch.setenv("LOOPWRIGHT_LOGGERS", "cvs")
    with pytest.raises(lw.SettingError, match=r"there is no logger named 'cvs'\..*'csv'") as caught:
        trainer(epochs=1, folder=folder)
    assert caught.value.__notes__ == [
        "[loopwright] LOOPWRIGHT_LOGGERS='cvs' asks for it; Trainer(loggers=[]) does without"
    ]


@pytest.mark.parametrize(
    ("loggers", "says"),
    [
        ("csv", "CSVLogger() has no place to write to, since folder=None: give the Trainer a folder, or the logger a "
                "path, loggers=['csv:one.csv'] or CSVLogger('one.csv')"),
        ([OnlyLog(), lw.JSONLLogger()], "JSONLLogger() has no place to write to, since folder=None: give the Trainer a "
         "folder, or the logger a path, loggers=['jsonl:one.jsonl'] or JSONLLogger('one.jsonl')"),
    ],
)  # fmt: skip
def test_a_logger_of_files_without_a_place_is_refused_before_training(loggers: Any, says: str) -> None:
    with pytest.raises(lw.SettingError) as error:
        trainer(epochs=1, loggers=loggers)
    assert str(error.value) == says
    trainer(epochs=1, loggers=["csv:one.csv", lw.JSONLLogger("one.jsonl")]).fit(sgd_task(line()), DATA)
    assert Path("one.csv").exists()
    assert Path("one.jsonl").exists()


class Misspelt(OnlyLog):
    def log_fig(self, progress: lw.Progress, name: str, figure: Any) -> None: ...

    def on_close(self, status: str) -> None: ...

    def flsh(self) -> None: ...

    def _clos(self) -> None: ...

    def draw(self) -> None: ...


class Helped(Everything):
    def log_texts(self) -> None: ...

    def load_state(self) -> None: ...

    def load_state_dict(self, state: Any) -> None: ...


def test_a_misspelt_method_of_a_logger_is_told_with_the_nearest() -> None:
    with pytest.warns(lw.LoopwrightWarning) as caught:
        trainer(epochs=1, loggers=[Misspelt()])
    known = "'close', 'flush', 'load_state_dict', 'log', 'log_artifact', 'log_config', 'log_figure', 'log_text', "
    assert [str(one.message) for one in caught] == [
        f"Misspelt.{name} is no method of loggers, and nothing calls it. Known: {known}'start', 'state_dict'. Did you "
        f"mean {near!r}? A helper of your own is passed over if its name begins with _"
        for name, near in (("flsh", "flush"), ("log_fig", "log_figure"), ("on_close", "close"))
    ]
    trainer(epochs=1, loggers=[Helped()])  # what they are near to is there


def test_curves_have_one_value_a_step() -> None:
    logger = Points()
    trainer(epochs=2, loggers=[logger], log_every=1).fit(sgd_task(line()), DATA, pairs([1.0]))
    assert len(logger.seen) == len(set(logger.seen))
    assert {name for name, _ in logger.seen} == {"train/loss", "lr", "valid/loss", "epoch/train/loss"}


class Points:
    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def log(self, progress: lw.Progress, values: Any, kind: str) -> None:
        self.seen += [(name, progress.step) for name in points(values, kind)]


def test_of_several_processes_only_rank_0_hands_things_over(make_run: Any, tmp_path: Path) -> None:
    other = make_run(rank=1)
    other.loggers = [Everything()]
    other.log({"note": "text"})
    assert other.loggers[0].calls == []
    assert not list(tmp_path.glob("texts"))


def test_a_logger_whose_place_cannot_be_taken_back_begins_anew_and_training_goes_on(folder: Path) -> None:
    def fit(logger: Any, epochs: int) -> lw.Run:
        user = trainer(epochs=epochs, loggers=[logger], folder=folder, checkpoint=lw.Checkpoint("4 steps"))
        return user.fit(sgd_task(line()), DATA, resume="auto")

    fit(Remembers(), 1)
    with pytest.warns(lw.LoopwrightWarning) as caught:
        run = fit(Remembers(broken=True), 2)
    assert str(caught[0].message).startswith("Remembers.load_state_dict failed after step 4: ValueError('not mine')")
    assert (run.status, run.progress.step) == ("done", 8)


class Remembers(OnlyLog):
    def __init__(self, *, broken: bool = False) -> None:
        super().__init__()
        self.broken = broken

    def state_dict(self) -> Any:
        return {"place": 1}

    def load_state_dict(self, state: Any) -> None:
        if self.broken:
            raise ValueError("not mine")


class Scored(lw.Task):
    """Its step tells the loss and the accuracy of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = line()

    def training_step(self, batch: Any) -> Any:
        x, _ = batch
        return {"loss": self.net(x).mean(), "accuracy": (x > 2).float().mean()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=1.0)


@pytest.mark.capability("FA-14")
def test_losses_and_metrics_of_every_batch_are_recorded(folder: Path) -> None:
    """``log_every=1`` records losses and metrics that a step returns after every batch; the run keeps every loss."""
    run = trainer(epochs=1, log_every=1, folder=folder).fit(Scored(), pairs([1.0], [3.0], [1.0, 5.0]))
    assert run.folder is not None
    records = [record for record in read_jsonl(run.folder / "metrics.jsonl") if record["kind"] == "train"]
    assert [(r["step"], r["train/loss"], r["train/accuracy"]) for r in records] == [
        (1, 0.0, 0.0), (2, -3.0, 1.0), (3, -12.0, 0.5),
    ]  # fmt: skip
    assert run.history.losses["loss"].tolist() == [0.0, -3.0, -12.0]
