"""What MLflow's own client reads back from SQLite."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from mlflow import MlflowClient

import loopwright as lw
from loopwright.data import fingerprint
from loopwright.loggers import MLflowLogger, send
from tiny import bits, line, same, sgd_task, trainer
from tracked import CURVES, DATA, expected, failed, fit, killed

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of MLflow, about SQLAlchemy


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database: MLflow takes seconds to make one."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def uri(migrated: Path, tmp_path: Path) -> str:
    shutil.copy(migrated, "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"  # whole: MLflow keeps connections by this text


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(uri)


def only(client: MlflowClient, name: str = "digits") -> Any:
    """The one run of an experiment."""
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def curves(client: MlflowClient, run: Any) -> dict[str, list[tuple[int, Any]]]:
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in CURVES}
    return {name: sorted((m.step, pytest.approx(m.value)) for m in found) for name, found in histories.items()}


def git(*arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    return subprocess.run(["git", *who, *arguments], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.capability("IG-20")
def test_settings_software_and_data_are_recorded_with_every_value(client: MlflowClient, uri: str, folder: Path) -> None:
    """The tracker has parameters, versions and commit, the fingerprint of the data, and every value once."""
    git("init")
    git("commit", "--allow-empty", "-m", "a change")
    run = fit(f"mlflow:{uri}", folder)
    assert run.folder is not None
    found = only(client)
    assert curves(client, found) == expected(run)
    assert found.info.run_name == run.folder.name
    assert found.info.status == "FINISHED"
    assert found.data.params["optimizers.main.lr"] == "0.1"
    assert found.data.params["models.model.parameters"] == "1"
    assert found.data.tags["versions.loopwright"] == lw.__version__
    assert found.data.tags["git.commit"] == git("rev-parse", "HEAD")
    assert found.data.tags["data.kind"] == "list of batches"
    assert found.data.tags["data.content"] == fingerprint(DATA)["content"] != fingerprint(DATA[:1])["content"]
    config = json.loads(Path(client.download_artifacts(found.info.run_id, "config.json")).read_text())
    assert config["settings"]["epochs"] == 3
    assert "numpy" in config["packages"]


def test_figures_texts_and_files_are_artifacts(client: MlflowClient, uri: str, folder: Path) -> None:
    user = trainer(epochs=1, loggers=[MLflowLogger(uri, experiment="other")], folder=folder)
    Path("maps").mkdir()
    Path("maps/a.txt").write_text("a")
    figure = plt.figure()
    things = {"valid/drawn": figure, "a/note": "look", "data": Path("maps")}
    user.on(lw.Event.STEP_END(once=2))(lambda run: run.log(things))
    user.fit(sgd_task(line()), DATA)
    plt.close(figure)
    run = only(client, "other")

    def files(path: str = "") -> list[str]:
        found = client.list_artifacts(run.info.run_id, path or None)
        return [one for f in found for one in (files(f.path) if f.is_dir else [f.path])]

    assert sorted(files()) == [
        "config.json", "data/maps/a.txt", "figures/valid/drawn-00000002.png", "texts/a/note-00000002.txt",
    ]  # fmt: skip


def test_a_killed_run_goes_on_as_the_same_run_without_a_point_twice_or_lost(
    client: MlflowClient, uri: str, folder: Path
) -> None:
    killed(f"mlflow:{uri}", folder, "killed", 11)
    run = fit(f"mlflow:{uri}", folder, "killed")
    assert run.resumed_from is not None
    assert curves(client, only(client, "killed")) == expected(run)
    assert only(client, "killed").info.status == "FINISHED"


def test_a_failed_run_goes_on_without_a_point_twice(client: MlflowClient, uri: str, folder: Path) -> None:
    failed(f"mlflow:{uri}", folder, "failed", 8)
    run = fit(f"mlflow:{uri}", folder, "failed")
    assert curves(client, only(client, "failed")) == expected(run)


def test_points_that_had_arrived_before_are_not_sent_twice(client: MlflowClient, uri: str, folder: Path) -> None:
    """Every point is sent at once, so that the tracker is ahead of the checkpoint; then the run goes on from that."""
    eager = MLflowLogger(uri)
    sent = fit([eager], folder, "whole")
    assert sent.folder is not None
    state = {"run_id": eager.run_id, "waiting": []}
    late = MLflowLogger(uri)
    late.load_state_dict(state)
    late.start(sent)
    for step in (11, 12, 13):
        late.log(lw.Progress(step=step), {"train/loss": 0.5}, "train")
    late.close("done")
    history = client.get_metric_history(only(client, "whole").info.run_id, "train/loss")
    assert sorted(m.step for m in history) == [*range(1, 14)]


def test_a_task_that_is_fitted_again_adds_to_its_run(client: MlflowClient, uri: str, folder: Path) -> None:
    task, logger = sgd_task(line(), lr=0.1), MLflowLogger(uri)
    for epochs in (1, 2):
        trainer(epochs=epochs, log_every=1, loggers=[logger], folder=folder, name="digits").fit(task, DATA)
    history = client.get_metric_history(only(client).info.run_id, "train/loss")
    assert sorted(m.step for m in history) == [*range(1, 9)]


def test_names_that_mlflow_refuses_are_replaced(client: MlflowClient, uri: str, folder: Path) -> None:
    user = trainer(epochs=1, loggers=f"mlflow:{uri}", folder=folder, name="digits")
    user.on(lw.Event.STEP_END(once=1))(lambda run: run.log({"f1(ü)%": 1.0, "../up": 2.0, "x" * 300: 3.0}))
    user.fit(sgd_task(line()), DATA)
    metrics = only(client).data.metrics
    assert metrics["train/f1____"] == 1.0
    assert metrics["train/_/up"] == 2.0
    assert metrics["train/" + "x" * 244] == 3.0


@pytest.mark.filterwarnings("ignore::loopwright.LoopwrightWarning")
def test_a_server_that_is_down_does_not_hold_up_or_change_training() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    net, other = line(), line()
    run = trainer(epochs=1, loggers=f"mlflow:http://127.0.0.1:{port}").fit(sgd_task(net, lr=0.1), DATA)
    assert run.status == "done"
    trainer(epochs=1).fit(sgd_task(other, lr=0.1), DATA)
    assert same(bits(net), bits(other))


def test_a_recorded_run_is_sent_once(client: MlflowClient, uri: str, folder: Path) -> None:
    run = fit(None, folder)
    assert run.folder is not None
    assert send(run.folder, f"mlflow:{uri}") > 0
    assert send(run.folder, f"mlflow:{uri}") == 0
    assert curves(client, only(client)) == expected(run)
    assert only(client).data.params["optimizers.main.lr"] == "0.1"


def test_the_default_is_a_file_in_the_working_directory(client: MlflowClient, folder: Path) -> None:
    fit("mlflow", folder)
    assert curves(client, only(client))["train/loss"]
