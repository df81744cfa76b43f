"""The folder of a run is enough to make the same run again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import loopwright as lw
from loopwright import folder as folder_module
from loopwright.checkpoint import newest, read
from loopwright.folder import open_folder
from loopwright.provenance import conda_packages, framework_archive

NET = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 2))
"""
CALLBACKS = """
import loopwright as lw

class Quiet(lw.Callback):
    def on_epoch_end(self, run):
        assert run.history
"""
SCRIPT = """
import torch
import loopwright as lw
from parts import callbacks
from parts.net import make

torch.manual_seed(0)
x = torch.randn(40, 4)
data = (x, (x[:, 0] > 0).long())
torch.manual_seed(0)
net = make()
task = lw.Supervised(net, optimizer=torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9))
trainer = lw.Trainer(epochs=2, seed=4, callbacks=[callbacks.Quiet()], progress=False, name="again", accumulate=2)
run = trainer.fit(task, lw.Loader(data, 5, shuffle=True))
manifest = next(run.folder.glob("checkpoints/*/manifest.json"))
import json
print(json.loads(manifest.read_text())["files"]["model.safetensors"]["blake2b"])
"""


def script(folder: Path) -> Path:
    (folder / "parts").mkdir(parents=True)
    (folder / "parts/__init__.py").write_text("")
    (folder / "parts/net.py").write_text(NET)
    (folder / "parts/callbacks.py").write_text(CALLBACKS)
    (folder / "train.py").write_text(SCRIPT)
    return folder


def started(folder: Path, command: list[str], framework: Path | None = None) -> str:
    """What the command prints: the sha256 of the weights. ``framework``: the folder to import this package from."""
    env = None if framework is None else {**os.environ, "PYTHONPATH": str(framework)}
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def records(run: Path) -> list[dict[str, Any]]:
    """Of ``metrics.jsonl``, less the times that they were written at."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.slow
@pytest.mark.capability("CA-12", "CA-31", "CA-33", "CA-37")
def test_the_folder_of_a_run_alone_makes_the_same_run_again_in_a_fresh_process(tmp_path: Path) -> None:
    """Two fresh processes give the same bits, and so does a third from the first one's run folder alone."""
    first = script(tmp_path / "first")
    printed = started(first, ["train.py"])
    assert printed == started(script(tmp_path / "second"), ["train.py"])
    assert len(printed) == hashlib.sha256().digest_size * 2

    (kept,) = (first / "runs/again").iterdir()
    kept = Path(shutil.copytree(kept, tmp_path / "kept"))
    shutil.rmtree(first)
    record = json.loads((kept / "run.json").read_text())
    again = tmp_path / "again"
    with zipfile.ZipFile(kept / "source.zip") as archive:
        assert sorted(archive.namelist()) == ["parts/__init__.py", "parts/callbacks.py", "parts/net.py", "train.py"]
        archive.extractall(again)
    assert started(again, record["command"]) == printed
    (rebuilt,) = (again / "runs/again").iterdir()
    assert records(rebuilt) == records(kept)
    assert len(records(kept)) >= 2  # one an epoch at least
    assert (rebuilt / "config.yaml").read_bytes() == (kept / "config.yaml").read_bytes()
    assert yaml.safe_load((kept / "config.yaml").read_text())["accumulate"] == 2
    path = newest(kept / "checkpoints")
    assert path is not None
    assert read(path).info["step"] == record["progress"]["step"] == 8


def test_every_setting_stands_in_one_file() -> None:
    """Those that were given, those that were not, and those of optimizer, schedule and data."""
    net = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    task = lw.Supervised(net, nn.MSELoss(), optimizer, schedule=schedule)
    data = TensorDataset(torch.zeros(10, 4), torch.zeros(10, 2))
    trainer = lw.Trainer(epochs=2, progress=False, accumulate=2, clip_norm=1.0)
    run = trainer.fit(task, DataLoader(data, 4, shuffle=True), lw.Loader(data, 5))
    assert run.folder is not None
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert set(inspect.signature(lw.Trainer).parameters) <= set(config)
    assert (config["epochs"], config["seed"], config["precision"]) == (2, None, "fp32")
    told = config["models"]["model"]
    assert (told["class"], told["in_features"], told["parameters"]) == ("<torch.nn.modules.linear.Linear>", 4, 10)
    told = config["optimizers"]["main"]
    assert (told["class"], told["lr"], told["momentum"]) == ("<torch.optim.sgd.SGD>", 0.05, 0.9)
    stage = config["stages"]["main"]
    assert (stage["until"], stage["accumulate"], stage["validate_every"]) == (["2 epochs"], 2, "1 epoch")
    assert stage["phases"]["main"]["clip_norm"] == 1.0
    assert stage["phases"]["main"]["schedules"] == [
        {"class": "<torch.optim.lr_scheduler.StepLR>", "every": "epoch", "step_size": 1, "gamma": 0.1}
    ]
    assert (stage["data"]["batch_size"], stage["data"]["batches"]) == (4, 3)
    assert stage["data"]["sampler"] == "<torch.utils.data.sampler.RandomSampler>"
    assert stage["valid"]["valid"]["batch_size"] == 5


class Fitted(lw.Supervised):
    def __init__(self, width: int, *, drop: float = 0.5, schedule: str = "none", api_key: str = "") -> None:
        layers = nn.Sequential(nn.Linear(4, width), nn.Dropout(drop), nn.Linear(width, 2))
        optimizer = torch.optim.SGD(lw.groups(layers, ["0.*", "*"], lr=(0.01, 0.03)), momentum=0.9)
        super().__init__(layers, nn.CrossEntropyLoss(label_smoothing=0.1), optimizer)
        self.metrics = {"top": lw.metrics.Accuracy(top_k=2)}
        self.width, self.api_key = width, api_key


class Drawn(TensorDataset):
    def __init__(self, size: int, names: list[str]) -> None:
        super().__init__(torch.zeros(size, 4), torch.zeros(size, dtype=torch.int64))
        self.size, self.names = size, names


def test_every_knob_of_a_run_is_in_one_file_and_none_can_be_misspelt_or_idle(folder: Path) -> None:
    """config.yaml has each argument of trainer, task, model, loss, metrics, callbacks, data; idle or unknown: error."""
    trainer = lw.Trainer(
        epochs=2, progress=False, folder=folder, checkpoint=lw.Checkpoint("3 steps", keep=5), loggers=[lw.CSVLogger()],
        callbacks=[lw.EarlyStopping("train/loss", patience=7), lw.MixUp(0.3, classes=2)],
    )  # fmt: skip
    task = Fitted(8, drop=0.25, api_key="hunter-2")
    data = Drawn(10, ["x"] * 1000)
    run = trainer.fit(task, DataLoader(data, 4, shuffle=True))
    assert run.folder is not None
    text = (run.folder / "config.yaml").read_text()
    config = yaml.safe_load(text)
    assert set(inspect.signature(lw.Trainer).parameters) <= set(config)

    def found(at: Any, **wanted: Any) -> None:
        assert {name: at[name] for name in wanted} == wanted

    found(config["task"], width=8, api_key="<not kept>")
    assert "hunter" not in text
    found(config["loss"], label_smoothing=0.1, reduction="mean")
    found(config["metrics"]["top"], top_k=2)
    found(config["models"]["model"]["layers"], **{"1": "Dropout(p=0.25, inplace=False)"})
    found(config["optimizers"]["main"], momentum=0.9, nesterov=False)
    assert [group["lr"] for group in config["optimizers"]["main"]["groups"]] == [0.01, 0.03]
    found(config["callbacks"][0], monitor="train/loss", patience=7, mode=None)
    found(config["callbacks"][1], alpha=0.3, classes=2)
    found(config["checkpoint"], every="3 steps", keep=5, monitor=None)
    assert config["loggers"][0]["class"] == "<loopwright.loggers.csv.CSVLogger>"
    found(config["stages"]["main"]["data"]["dataset"], size=10, names="<list of 1000>")

    with pytest.raises(TypeError) as caught:
        lw.Trainer(epochs=2, acumulate=4)  # type: ignore[arg-type]
    assert str(caught.value).startswith("acumulate=4: there is no such argument. Known: 'accumulate', 'callbacks', ")
    assert str(caught.value).endswith("Did you mean 'accumulate'?")
    for make in (lw.Supervised, lw.Loader, lw.Checkpoint, lw.EarlyStopping, lw.Stage, lw.Phase):
        name = {lw.Supervised: "module", lw.Loader: "data", lw.Stage: "name", lw.Phase: "name"}.get(make)
        required = {} if name is None else {name: nn.Linear(1, 1)}
        with pytest.raises(TypeError, match="zzz"):
            make(**required, zzz=1)
    with pytest.raises(lw.PlanError, match="validate_every='2 epochs', but there is no validation data"):
        lw.Trainer(epochs=2, folder=None, validate_every="2 epochs").fit(Fitted(8), data)


@pytest.mark.slow
@pytest.mark.capability("CA-34")
@pytest.mark.nightly
@pytest.mark.parametrize("installed", [False, True])
def test_the_source_of_the_framework_is_kept_whole_and_runs_from_there(tmp_path: Path, installed: bool) -> None:
    """The very framework that trained, as it was then, is kept with the run, and trains again to the same bits.

    What the user's own .gitignore says is about the user's files; and a development version may be installed.
    """
    source, home = Path(lw.__file__).parent, tmp_path / ("site-packages" if installed else "checkout")
    shutil.copytree(source, home / "loopwright", ignore=shutil.ignore_patterns("__pycache__"))
    with (home / "loopwright/loop.py").open("a") as file:
        file.write("\nCHANGED = True  # by hand, under the same version\n")
    first = script(tmp_path / "first")
    (first / ".gitignore").write_text("data/\ncheckpoint*\nmetrics/\nkeys.py\n*.zip\n")
    subprocess.run(["git", "init", "--quiet"], cwd=first, check=True)
    printed = started(first, ["train.py"], home)

    (kept,) = (first / "runs/again").iterdir()
    with zipfile.ZipFile(kept / "framework.zip") as archive:
        archive.extractall(tmp_path / "there")
    assert contents(tmp_path / "there") == contents(home)
    shutil.rmtree(home)
    (first / "train.py").write_text(SCRIPT + "assert lw.loop.CHANGED and 'there' in lw.__file__\n")
    assert started(first, ["train.py"], tmp_path / "there") == printed
    assert len(framework_archive()) < 800_000


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}


def test_distributions_of_every_kind_are_listed_the_first_on_the_path_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "a/torch-9.0+cpu.dist-info",
        "a/PyYAML-6.0-py3.11.egg-info",
        "b/torch-1.0.dist-info",
        "b/x_y-2.dist-info",
    ):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / part) for part in ("none", "a", "b")])
    folder_module._packages.cache_clear()
    try:
        assert folder_module._packages() == {"PyYAML": "6.0", "torch": "9.0+cpu", "x_y": "2"}
    finally:
        folder_module._packages.cache_clear()


@pytest.mark.capability("CA-35")
def test_the_packages_of_pip_and_of_conda_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """environment.txt is what pip installs again, environment.conda.txt what conda creates again."""
    meta = tmp_path / "conda-meta"
    meta.mkdir()
    for name in ("python-3.11.7-h955ad1f_0", "ca-certificates-2023.12.12-h06a4308_0", "history"):
        (meta / f"{name}.json").write_text("{}")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    conda_packages.cache_clear()
    try:
        path = open_folder("runs", "digits", settings={}, seed=0)
    finally:
        conda_packages.cache_clear()
    assert (path / "environment.conda.txt").read_text() == (
        "ca-certificates=2023.12.12=h06a4308_0\npython=3.11.7=h955ad1f_0\n"
    )
    pins = dict(line.split("==") for line in (path / "environment.txt").read_text().splitlines())
    installed: dict[str, str] = {}
    for one in importlib.metadata.distributions():
        installed.setdefault(normal(one.name), one.version)
    assert {normal(name): version for name, version in pins.items()} == installed
    pip: Any = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--no-index", "-r",
         str(path / "environment.txt")], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert pip.returncode == 0, pip.stderr  # all of them are installed: nothing to fetch
    assert pins["torch"] == torch.__version__


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
