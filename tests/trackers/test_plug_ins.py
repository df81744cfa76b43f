"""The plug-ins of ``examples/trackers`` against the real clients, all of it on this machine."""

from __future__ import annotations

import inspect
import json
import os
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import loopwright as lw
import wandb_files
from loopwright.loggers import send
from tiny import acts, line, sgd_task, trainer
from tracked import DATA, expected, failed, fit, killed, plug_in

plt = pytest.importorskip("matplotlib.pyplot")
Points = dict[str, list[tuple[int, Any]]]  # (step, value) by curve
Found = tuple[Points, dict[str, Any]]  # and the settings

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the clients
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(find_spec(client) is None, reason=f"{client} is not installed"))
    for name, client in (
        ("comet", "comet_ml"), ("neptune", "neptune_scale"), ("visdom", "visdom"), ("polyaxon", "polyaxon")
    )
]  # fmt: skip


def read(name: str, run: lw.Run) -> Found:
    """What the client has kept of ``run``, in all of its files."""
    assert run.folder is not None
    if name == "wandb":
        found = wandb_files.read(run.folder)
        config = {u.key: json.loads(u.value_json) for r in found for u in (*r.run.config.update, *r.config.update)}
        return wandb_files.curves(run.folder), lw.loggers.flat(config)
    curves: Points = {}
    parameters: dict[str, Any] = {}
    kept = {"comet": _comet, "neptune": _neptune, "visdom": _visdom, "polyaxon": _polyaxon}[name]
    for kind, key, step, value in kept(run.folder / name):
        if kind == "point":
            curves.setdefault(key, []).append((step, pytest.approx(value)))
        else:
            parameters[key] = value
    return {key: sorted(points, key=lambda point: point[0]) for key, points in curves.items()}, parameters


def _comet(folder: Path) -> Iterator[tuple[str, str, int, Any]]:
    for file in sorted(folder.glob("*/*.zip")):
        with zipfile.ZipFile(file) as archive:
            lines = archive.read("messages.json").decode().splitlines()
        for message in map(json.loads, lines):
            told = message["payload"]
            if message["type"] == "metric_msg":
                metric = told["metric"]
                yield "point", metric["metricName"], metric["step"], metric["metricValue"]
            elif message["type"] == "parameter_msg":
                yield "parameter", told["param"]["paramName"], 0, told["param"]["paramValue"]


def _neptune(folder: Path) -> Iterator[tuple[str, str, int, Any]]:
    from neptune_scale.sync.operations_repository import OperationsRepository, OperationType

    for file in sorted(folder.glob("*/run_operations.sqlite3")):
        store = OperationsRepository(db_path=file)
        for operation in store.get_operations(up_to_bytes=1 << 24):
            if operation.operation_type == OperationType.UPDATE_SNAPSHOT:
                told = operation.operation
                for key, value in told.append.items():
                    yield "point", key, told.step.whole, value.float64
                for key, value in told.assign.items():
                    yield "parameter", key, 0, getattr(value, value.WhichOneof("value"))
        store.close(cleanup_files=False)


def _visdom(folder: Path) -> Iterator[tuple[str, str, int, Any]]:
    """Of the file that ``visdom.Visdom().replay_log`` sends to a server."""
    for sent in folder.with_suffix(".log").read_text().splitlines():
        _, message = json.loads(sent)
        (data,) = message["data"]
        if data["type"] == "scatter":
            yield from (("point", message["win"], x, y) for x, y in zip(data["x"], data["y"], strict=True))
        elif message["win"] == "config":
            for row in data["content"].split("<tr><td>")[1:]:
                key, _, value = row.removesuffix("</table>").partition("<td>")
                yield "parameter", key, 0, value


def _polyaxon(folder: Path) -> Iterator[tuple[str, str, int, Any]]:
    from traceml.events import V1Events

    for file in sorted((folder / "events" / "metric").glob("*.plx")):
        found = V1Events.read(kind="metric", name=file.stem, data=str(file))
        for _, row in found.df.iterrows():
            yield "point", file.stem.replace("__", "/"), row["step"], row["metric"]
    for key, value in json.loads((folder / "run.plx.json").read_text())["inputs"].items():
        yield "parameter", key.replace("-", "."), 0, value


CLIENTS = ("comet_ml", "neptune_scale", "visdom", "polyaxon")
needs_all = pytest.mark.skipif(not all(map(find_spec, CLIENTS)), reason="needs all clients: make trackers")


def kept_by_all(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[lw.Run, dict[str, Points]]:
    """A run with all trackers at once, and the curves that each has, as its own client reads them."""
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    uri = f"sqlite:///{folder}.db"
    plug_ins = [one for name in ("comet", "neptune", "visdom", "polyaxon") for one in plug_in(name)]
    loggers = ["tensorboard", f"mlflow:{uri}", "wandb", *plug_ins]
    run = fit(loggers, folder, progress=lw.Callback(), **settings)
    assert run.folder is not None
    found = {name: read(name, run)[0] for name in ("comet", "neptune", "visdom", "polyaxon")}
    events = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found["tensorboard"] = {
        name: [(e.step, pytest.approx(e.value)) for e in events.Scalars(name)] for name in events.Tags()["scalars"]
    }
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    (sent,) = client.search_runs([experiment.experiment_id])
    found["mlflow"] = {
        name: sorted((m.step, pytest.approx(m.value)) for m in client.get_metric_history(sent.info.run_id, name))
        for name in sent.data.metrics
    }
    return run, found


def inside(found: dict[str, Points]) -> Points:
    """What ``lw.Watch`` has logged, which all trackers have alike."""
    watched = {
        tracker: {
            name: [(step, value.expected) for step, value in points]
            for name, points in sorted(curves.items())
            if name.startswith(("train/optimizer/", "train/gpu_"))
        }
        for tracker, curves in found.items()
    }
    kept = watched["comet"]
    for curves in watched.values():
        assert curves.keys() == kept.keys()
        for name, points in curves.items():
            assert points == [(step, pytest.approx(value)) for step, value in kept[name]]
    return kept


@pytest.mark.capability("CA-09", "PL-11")
@needs_all
def test_one_interface_writes_the_same_to_all_monitoring_systems_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard, MLflow, W&B, Comet, Neptune, Visdom and Polyaxon have every value of a run whose task logs nothing
    itself, and the settings of its optimizer, as their clients read them; how to view it is printed."""
    run, found = kept_by_all(folder, monkeypatch, callbacks=[lw.Watch("optimizer", at=lw.Event.STEP_START)])
    points = expected(run)
    logged = inside(found)
    assert logged["train/optimizer/lr"] == [(step, pytest.approx(0.1)) for step in range(1, 13)]
    assert logged["train/optimizer/momentum"] == [(step, 0.0) for step in range(1, 13)]
    for name, curves in found.items():
        assert {key: curves[key] for key in points} == points, name
    assert run.folder is not None
    assert wandb_files.curves(run.folder) == points
    assert f"to look at it: tensorboard --logdir {run.folder}/tensorboard\n" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.capability("IG-12")
@needs_all
def test_loss_metrics_memory_and_utilisation_of_the_gpu_and_settings_reach_all_trackers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of each batch, the metric, memory and utilisation of the GPU, settings of the optimizer."""
    watch = lw.Watch("optimizer", "gpu", at=lw.Event.STEP_START)
    run, found = kept_by_all(folder, monkeypatch, callbacks=[watch], device="cuda")
    points = expected(run)
    for name, curves in found.items():
        assert {key: curves[key] for key in points} == points, name
    logged = inside(found)
    assert logged["train/optimizer/lr"] == [(step, pytest.approx(0.1)) for step in range(1, 13)]
    memory, peak, used = (
        [value for _, value in logged[f"train/gpu_{name}"]] for name in ("memory_mb", "memory_peak_mb", "utilization")
    )
    assert len(memory) == len(peak) == len(used) == 12
    assert all(0 < now <= most for now, most in zip(memory, peak, strict=True))
    assert all(0 <= percent <= 100 for percent in used)


@pytest.mark.capability("SK-15")
@pytest.mark.parametrize("name", NAMES)
def test_every_value_is_there_once_with_the_settings(name: str, folder: Path) -> None:
    torch.manual_seed((1 << 64) - 1)  # the largest that there is
    run = fit(plug_in(name), folder)
    curves, parameters = read(name, run)
    assert {key: curves[key] for key in expected(run)} == expected(run)
    assert [step for step, _ in curves["lr"]] == [step for step, _ in curves["train/loss"]]
    assert float(parameters["settings.optimizers.main.lr"]) == 0.1
    assert parameters["data.kind"] == "list of batches"


SCRIPT = """
import torch
import loopwright as lw

net = torch.nn.Linear(3, 1)
task = lw.Supervised(net, torch.nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.1))
run = lw.Trainer(epochs=2, log_every=1).fit(task, lw.Loader((torch.ones(64, 3), torch.ones(64, 1)), batch_size=32))
print("PLACE", run.folder)
"""


@pytest.mark.capability("PL-11")
@needs_all
def test_every_run_of_a_user_is_in_tensorboard_unasked_and_says_how_to_view_it(tmp_path: Path) -> None:
    """A script that names no logger logs to TensorBoard where the environment says so once, and prints how to view it;
    Comet, MLflow and Neptune can stand beside it there or in the script, and the test above has them all at once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Path("train.py").write_text(SCRIPT)
    usual = os.environ | {"LOOPWRIGHT_LOGGERS": f"tensorboard, mlflow:sqlite:///{tmp_path}/mlflow.db"}
    done = subprocess.run([sys.executable, "train.py"], env=usual, capture_output=True, text=True, check=True)
    place = Path(done.stdout.partition("PLACE ")[2].strip())
    assert f"to look at it: tensorboard --logdir {place}/tensorboard\n" in done.stdout
    losses = [row["train/loss"] for row in lw.loggers.read_jsonl(place / "metrics.jsonl") if row["kind"] == "train"]
    events = EventAccumulator(str(place / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses)
    assert len(losses) == 4
    assert Path("mlflow.db").exists()


def show(run: lw.Run, result: Any) -> None:
    """Logs a figure, a text and a file after step 2."""
    if run.progress.step != 2:
        return
    Path("labels.txt").write_text("cat")
    figure, axes = plt.subplots(figsize=(2, 1), dpi=50)
    axes.plot([1, 2])
    run.log({"drawn": figure, "note": "look <here>", "labels": Path("labels.txt")})
    plt.close(figure)


def more(name: str, folder: Path) -> dict[str, tuple[int, bytes]]:
    """The figure, the text and the file that a client has kept, with the step that it knows, else 0."""
    kept = {"comet": _more_comet, "neptune": _more_neptune, "wandb": _more_wandb, "polyaxon": _more_polyaxon}
    return dict(kept[name](folder))


def _more_comet(folder: Path) -> Iterator[tuple[str, tuple[int, bytes]]]:
    (file,) = folder.glob("comet/*/*.zip")
    with zipfile.ZipFile(file) as archive:
        for message in map(json.loads, archive.read("messages.json").decode().splitlines()):
            if message["type"] == "file_upload":
                told, about = message["payload"], message["payload"]["additional_params"]
                name = about.get("figName") or told["metadata"].get("name") or about["fileName"].partition(".")[0]
                yield name, (about["step"], archive.read(told["file_path"]))


def _more_neptune(folder: Path) -> Iterator[tuple[str, tuple[int, bytes]]]:
    from neptune_scale.sync.operations_repository import OperationsRepository, OperationType

    (file,) = folder.glob("neptune/*/run_operations.sqlite3")
    store = OperationsRepository(db_path=file)
    files = {asked.destination: Path(asked.source_path).read_bytes() for asked in store.get_file_upload_requests(9)}
    for operation in store.get_operations(up_to_bytes=1 << 24):
        if operation.operation_type == OperationType.UPDATE_SNAPSHOT:
            told = operation.operation
            for name, value in (*told.append.items(), *told.assign.items()):
                if value.WhichOneof("value") == "file_ref":
                    yield name, (told.step.whole, files[value.file_ref.path])
                elif name == "note":
                    yield name, (told.step.whole, value.string.encode())
    store.close(cleanup_files=False)


def _more_wandb(folder: Path) -> Iterator[tuple[str, tuple[int, bytes]]]:
    for row in wandb_files.rows(folder):
        if "note" in row:
            yield "note", (row["_step"], row["note"].encode())
        if "drawn/path" in row:
            (file,) = folder.glob(f"wandb/offline-run-*/files/{row['drawn/path']}")
            yield "drawn", (row["_step"], file.read_bytes())
    for record in wandb_files.read(folder):
        for kept in record.artifact.manifest.contents:
            yield record.artifact.name.partition("-")[2], (0, Path(kept.local_path).read_bytes())


def _more_polyaxon(folder: Path) -> Iterator[tuple[str, tuple[int, bytes]]]:
    told = json.loads((folder / "polyaxon/events/text/note.plx").read_text())
    yield "note", (told["step"], told["text"].encode())
    for file in folder.glob("polyaxon/assets/*/*"):
        name, _, step = file.stem.rpartition("_")
        yield name, (int(step), file.read_bytes())


@pytest.mark.capability("CA-36")
@pytest.mark.parametrize("name", [*(mark for mark in NAMES if mark.values[0] != "visdom"), "wandb"])
def test_metrics_settings_figures_texts_and_files_of_a_run_are_kept(name: str, folder: Path) -> None:
    """W&B, Neptune, Comet and Polyaxon have every value, what the run was made with, a figure, a text and a file."""
    run = fit(plug_in(name), folder, callbacks=[acts(on_step_end=show)])
    assert run.folder is not None
    curves, settings = read(name, run)
    assert {key: curves[key] for key in expected(run)} == expected(run)
    assert float(settings["settings.optimizers.main.lr"]) == 0.1
    assert settings["versions.torch"] == torch.__version__
    assert settings["data.kind"] == "list of batches"
    kept = more(name, run.folder)
    assert kept["drawn"][0] == 2
    assert kept["drawn"][1].startswith((b"\x89PNG", b"<?xml"))
    assert kept["note"] == (2, b"look <here>")
    assert kept["labels"][1] == b"cat"


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_failed_goes_on_without_a_point_twice_or_lost(name: str, folder: Path) -> None:
    failed(plug_in(name), folder, "digits", 7)
    failed(plug_in(name), folder, "digits", 11)
    run = fit(plug_in(name), folder)
    assert run.resumed_from is not None
    curves, _ = read(name, run)
    assert {key: curves[key] for key in expected(run)} == expected(run)
    if name == "polyaxon":
        assert run.folder is not None
        kept = json.loads((run.folder / "polyaxon" / "run.plx.json").read_text())
        states = [one["type"] for one in kept["status_conditions"]]
        assert list(dict.fromkeys(states)) == ["created", "running", "failed", "succeeded"]
        assert (states.count("failed"), kept["status"]) == (2, "succeeded")


@pytest.mark.parametrize("name", NAMES[1:3])  # offline, Comet and Polyaxon lose what a process has that is killed
def test_a_run_that_was_killed_as_well(name: str, folder: Path) -> None:
    killed(name, folder, "digits", 11)
    run = fit(plug_in(name), folder)
    assert run.resumed_from is not None
    curves, _ = read(name, run)
    assert {key: curves[key] for key in expected(run)} == expected(run)


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_run_is_sent(name: str, folder: Path) -> None:
    run = fit(None, folder)
    assert run.folder is not None
    assert send(run.folder, plug_in(name)[0]) > 0
    assert read(name, run)[0].keys() >= expected(run).keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_plug_in_takes_less_than_50_lines(name: str) -> None:
    (logger,) = plug_in(name)
    assert len(inspect.getsource(type(logger)).splitlines()) < 50


# -------------------------------------------------------------------------------------------------- Visdom, its server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[int]:
    """The port of a Visdom server on this machine."""
    pytest.importorskip("visdom")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    # what the command `visdom` runs, once it has loaded its page from the network
    code = (
        "from visdom.server.run_server import start_server as s; s(port=%d, base_url='', env_path=%r, bind_local=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code % (port, str(tmp_path))],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for _ in range(600):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.1):
            break
        time.sleep(0.1)
    yield port
    process.terminate()
    process.wait()


def test_a_visdom_server_has_the_curves_of_a_run_and_of_a_file_that_is_sent_later(folder: Path, server: int) -> None:
    """A NaN is a gap; texts are escaped, figures and settings have windows of their own."""
    import visdom
    from visdom_logger import VisdomLogger

    def write(run: lw.Run) -> None:
        figure = plt.figure(figsize=(2, 1))
        run.log({"note": "<b>look</b>", "drawn": figure, "odd": float("nan")})
        plt.close(figure)

    shown = visdom.Visdom("http://127.0.0.1", port=server, raise_exceptions=True, use_incoming_socket=False)

    def window(run: lw.Run, name: str) -> Any:
        found = shown.get_window_data(win=name, env="_".join(lw.loggers.run_name(run)))
        return json.loads(found)["content"]

    for offline in (False, True):
        logger = VisdomLogger("http://127.0.0.1", port=server, offline=offline)
        user = trainer(epochs=2, log_every=1, loggers=[logger], folder=folder)
        user.on(lw.Event.STEP_END(once=2))(write)
        run = user.fit(sgd_task(line(), lr=0.1), DATA)
        assert run.folder is not None
        if offline:
            shown.replay_log(str(run.folder / "visdom.log"))
        (curve,) = window(run, "train/loss")["data"]
        assert curve["x"] == [1, 2, 3, 4, 5, 6, 7, 8]
        assert curve["y"] == pytest.approx(run.history.losses["loss"].tolist())
        assert window(run, "train/odd")["data"][0]["y"] == [None]
        assert window(run, "note") == "&lt;b&gt;look&lt;/b&gt;"
        assert "<svg" in window(run, "drawn")
        assert "<tr><td>settings.optimizers.main.lr<td>0.1<tr>" in window(run, "config")


def test_visdom_offline_without_a_folder_is_refused_and_a_server_that_is_not_there_stops_nothing() -> None:
    pytest.importorskip("visdom")
    from visdom_logger import VisdomLogger

    with pytest.raises(lw.SettingError, match=r"VisdomLogger\(offline=True\) writes to the run folder"):
        fit([VisdomLogger(offline=True)], None)
    with (
        pytest.warns(lw.LoopwrightWarning, match=r"VisdomLogger\.start failed .* Training goes on"),
        pytest.warns(lw.LoopwrightWarning, match="18 records were lost by VisdomLogger"),
    ):
        run = fit([VisdomLogger("http://127.0.0.1", port=9)], None)
    assert run.status == "done"
