"""The folder of a run is enough to make the same run again."""

from __future__ import annotations

import dataclasses
import functools
import gc
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
from loopwright.provenance import conda_packages, files_of_modules, framework_archive

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
    """What the command prints: a hash of the weights. ``framework``: the folder to import this package from."""
    env = None if framework is None else {**os.environ, "PYTHONPATH": str(framework)}
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def records(run: Path) -> list[dict[str, Any]]:
    """Of ``metrics.jsonl``, less the times that they were written at."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


TWICE = """
import hashlib, random, sys
import numpy as np
import torch
from torch import nn
import loopwright as lw

seed = int(sys.argv[1])
torch.manual_seed(seed)
x = torch.randn(60, 4)
net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 2))
task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), 0.01))
noisy = lambda sample: (sample[0] + 0.1 * torch.randn(4) + np.random.rand() + random.random(), sample[1])
torch.seed(), np.random.seed(), random.seed()  # other numbers in each process: what follows is the framework's affair
train = lw.Loader((x, (x[:, 0] > 0).long()), 8, shuffle=True, workers=2, transform=noisy)
run = lw.Trainer(epochs=3, seed=seed, folder=None, progress=False).fit(task, train, (x, (x[:, 0] > 0).long()))
kept = hashlib.sha256()
for name, tensor in sorted(net.state_dict().items()):
    kept.update(name.encode() + tensor.contiguous().numpy().tobytes())
print(kept.hexdigest(), run.metrics["valid/loss"].hex())
"""


@pytest.mark.slow
@pytest.mark.capability("CA-31")
def test_two_fresh_processes_print_the_same_hash_of_all_weights(tmp_path: Path) -> None:
    """With shuffling, dropout and augmentation in workers, bit for bit on one CPU; another seed prints another hash."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "twice.py").write_text(TWICE)

    def printed(seed: int, folder: str, hashes: str) -> str:
        command = [sys.executable, str(tmp_path / "twice.py"), str(seed)]
        env = os.environ | {"PYTHONHASHSEED": hashes}
        done = subprocess.run(command, cwd=tmp_path / folder, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = printed(0, ".", "1")
    assert len(first.split()[0]) == hashlib.sha256().digest_size * 2
    assert first == printed(0, "elsewhere", "2")
    assert first != printed(1, ".", "1")


@pytest.mark.slow
@pytest.mark.capability("CA-12", "CA-33", "CA-37")
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


@pytest.mark.slow
@pytest.mark.capability("CA-33")
@pytest.mark.parametrize(
    ("where", "command"),
    [
        ("else", ["../proj/parts/train.py"]),
        pytest.param("proj", ["-m", "parts.train"], marks=pytest.mark.nightly),
    ],
    ids=["elsewhere", "-m"],
)
def test_the_whole_experiment_is_kept_and_runs_from_there_however_it_was_started(
    tmp_path: Path, where: str, command: list[str]
) -> None:
    """From another directory or as a module: script, callbacks and what is imported late, and none of the originals."""
    home = script(tmp_path / "proj")
    (home / "else").mkdir()
    (home / "train.py").rename(home / "parts/train.py")
    if where == "else":  # beside its modules, some of which have words of secrets in their names
        (home / "parts/net.py").rename(home / "parts/tokens.py")
        (home / "parts/train.py").write_text(
            SCRIPT.replace("from parts import callbacks", "import callbacks").replace("parts.net", "tokens")
        )
    (tmp_path / "else").mkdir()
    late = "        import key_value_attention\n"
    with (home / "parts/callbacks.py").open("a") as file:
        file.write(late)
    (home / ("parts" if where == "else" else "") / "key_value_attention.py").write_text("")
    printed = started(tmp_path / where, command)
    (kept,) = (tmp_path / where / "runs/again").iterdir()
    kept = Path(shutil.copytree(kept, tmp_path / "kept"))
    shutil.rmtree(home)
    record = json.loads((kept / "run.json").read_text())
    with zipfile.ZipFile(kept / "source.zip") as archive:
        names = sorted(archive.namelist())
        archive.extractall(tmp_path / "again")
    whole = ["callbacks.py", "key_value_attention.py", "tokens.py", "train.py"]
    if where == "proj":
        whole = ["key_value_attention.py", *(f"parts/{name}.py" for name in ("__init__", "callbacks", "net", "train"))]
    assert names == whole
    assert record["source"] == {"files": len(whole), "left_out": [], "later": ["key_value_attention.py"]}
    assert record["command"] == (["train.py"] if where == "else" else command)
    assert started(tmp_path / "again", record["command"]) == printed


CELLS = [
    "from parts.net import make\n" + SCRIPT.partition("torch.manual_seed")[0].replace("from parts.net import make", ""),
    "token = 'hf_" + "a" * 32 + "'",
    "torch" + SCRIPT.partition("\ntorch")[2],
]


@pytest.mark.slow
@pytest.mark.capability("CA-33")
def test_the_cells_of_a_notebook_are_kept_and_run_as_a_script(tmp_path: Path) -> None:
    """Those executed up to the fit, less one with a secret, of which is warned; and the modules that they import."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    home = script(tmp_path / "proj")
    cells = [nbformat.v4.new_code_cell(cell) for cell in CELLS]
    nbclient.NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=120).execute(cwd=str(home))
    texts = {out["name"]: out["text"] for out in cells[-1].outputs if "text" in out}
    (kept,) = (home / "runs/again").iterdir()
    kept = Path(shutil.copytree(kept, tmp_path / "kept"))
    shutil.rmtree(home)
    record = json.loads((kept / "run.json").read_text())
    with zipfile.ZipFile(kept / "source.zip") as archive:
        assert sorted(archive.namelist()) == ["cells.py", "parts/__init__.py", "parts/callbacks.py", "parts/net.py"]
        archive.extractall(tmp_path / "again")
    assert record["source"] == {"files": 4, "left_out": ["a part of cells.py"]}
    assert "a part of cells.py: it looks as if it held a secret" in texts["stderr"]
    assert record["command"] == ["cells.py"]
    assert started(tmp_path / "again", record["command"]) == texts["stdout"].strip()


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
    assert stage["data"]["sampler"]["class"] == "<torch.utils.data.sampler.RandomSampler>"
    assert stage["valid"]["valid"]["batch_size"] == 5


class Mine(lw.Callback):
    def __init__(self, *, threshold: float = 1.0) -> None:
        self.threshold = threshold


def lw_callbacks() -> list[Any]:
    """Each callback that has arguments, and one of a user's own."""
    kinds = [getattr(lw, name) for name in lw.__all__]
    kinds = [kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, lw.Callback)]
    found = [kind for kind in kinds if kind is not lw.Callback and inspect.signature(kind).parameters]
    assert len(found) > 20
    return [*found, Mine]


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


@pytest.mark.capability("GEN-06")
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


class Scaled:
    """A transform of a user's own, in which there is another object."""

    def __init__(self, by: float, noise: Any) -> None:
        self.by, self._noise = by, noise

    def __call__(self, sample: Any) -> Any:
        return sample[0] * self.by, sample[1]


@dataclasses.dataclass(frozen=True)
class Noise:
    level: float
    kind: str = "normal"


def test_an_object_within_an_object_is_told_with_what_it_was_made_with(folder: Path) -> None:
    """A strategy, a precision, samplers, transforms, a loader of which a part is read, functions with arguments."""
    weights, x, y = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(4, 4), torch.zeros(4, dtype=torch.int64)
    ours = lw.Loader(
        (x, y), sampler=lw.data.WeightedSampler(weights, 2, samples=8), transform=Scaled(0.5, Noise(0.1)),
        collate=functools.partial(torch.utils.data.default_collate),
    )  # fmt: skip
    drawn = torch.utils.data.WeightedRandomSampler([1.0, 3.0], 6, generator=torch.Generator().manual_seed(5))
    theirs = DataLoader(torch.utils.data.Subset(Drawn(4, ["a"]), [3, 1]), sampler=drawn, batch_size=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=7)
    trainer = lw.Trainer(
        epochs=1, progress=False, folder=folder, strategy=lw.DDP(find_unused=True, timeout=9.0), precision=scaler,
        device=torch.device("cpu"), debug=lw.Debug(train=2), capsule=False,
    )  # fmt: skip
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))
    net = nn.Linear(4, 2)
    task = lw.Supervised(net, loss, torch.optim.SGD(net.parameters(), 0.1))
    mixed = lw.data.Mix({"ours": ours, "theirs": theirs}, weights={"ours": 1, "theirs": 3}, until="longest")
    run = trainer.fit(task, mixed, ours, weight=float_of)
    assert run.folder is not None
    config = yaml.safe_load((run.folder / "config.yaml").read_text())

    assert config["strategy"] == {
        "class": "<loopwright.parallel.ddp.DDP>", "find_unused": True, "sync_batch_norm": False, "timeout": 9.0,
        "options": {},
    }  # fmt: skip
    assert (config["precision"]["growth_interval"], config["device"]) == (7, "cpu")
    assert (config["debug"], config["loss"]["weight"]) == ({"train": 2}, [1.0, 2.0])
    stage = config["stages"]["main"]
    assert stage["weight"] == f"<{__name__}.float_of>"
    valid = stage["valid"]["valid"]
    assert valid["sampler"] == {
        "class": "<loopwright.data.samplers.WeightedSampler>", "weights": weights.tolist(), "batch_size": 2,
        "samples": 8,
    }  # fmt: skip
    noise = {"class": f"<{__name__}.Noise>", "level": 0.1, "kind": "normal"}
    assert valid["transform"] == {"class": f"<{__name__}.Scaled>", "by": 0.5, "noise": noise}
    assert valid["collate"]["func"] == "<torch.utils.data._utils.collate.default_collate>"
    assert (stage["data"]["count"], stage["data"]["batches"]) == (2, 2)  # the part that lw.Debug leaves
    mix = stage["data"]["source"]
    assert mix["mix"]["weights"] == {"ours": 1, "theirs": 3}
    assert (mix["mix"]["until"], mix["mix"]["seed"], mix["mix"]["tag"]) == ("longest", None, False)
    assert mix["mix"]["sources"]["ours"]["transform"]["by"] == 0.5
    told = mix["mix"]["sources"]["theirs"]
    assert (told["batch_size"], told["drop_last"], told["num_workers"]) == (3, False, 0)
    assert (told["dataset"]["indices"], told["dataset"]["dataset"]["size"]) == ([3, 1], 4)
    assert told["sampler"] == {
        "class": "<torch.utils.data.sampler.WeightedRandomSampler>", "weights": [1.0, 3.0], "num_samples": 6,
        "replacement": True, "generator": {"class": "<torch._C.Generator>", "seed": 5},
    }  # fmt: skip


def float_of(batch: Any) -> float:
    return float(len(batch[0]))


KINDS: dict[Any, tuple[str, str]] = {  # an argument that is misspelt, and what is meant
    lw.Trainer: ("validate_evry", "validate_every"),
    lw.Supervised: ("optimiser", "optimizer"),
    lw.Stage: ("accumulates", "accumulate"),
    lw.Phase: ("clipnorm", "clip_norm"),
    lw.Debug: ("overfits", "overfit"),
    lw.Loader: ("shufle", "shuffle"),
    lw.CSVLogger: ("pth", "path"),
}


@pytest.mark.capability("GEN-06")
@pytest.mark.parametrize("kind", [*KINDS, *lw_callbacks()], ids=lambda kind: kind.__name__)
def test_a_misspelt_argument_is_refused_and_the_nearest_named(kind: Any) -> None:
    """Of the Trainer, tasks, stages, phases, loaders, loggers and of every callback, also of one's own."""
    named = [name for name, one in inspect.signature(kind).parameters.items() if one.kind is not one.VAR_POSITIONAL]
    wrong, meant = KINDS.get(kind, (f"{named[0]}_", named[0]))
    with pytest.raises(TypeError) as caught:
        kind(**{wrong: 1})
    assert str(caught.value).startswith(f"{wrong}=1: there is no such argument. Known: ")
    assert str(caught.value).endswith(f" Did you mean {meant!r}?")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"trainer": {"epochs": 1, "validate_every": "3 steps"}}, "validate_every"),
        ({"trainer": {}, "stages": [lw.Stage("a", "1 epoch", freeze="modul.*")]}, "'modul.*' matches no"),
        ({"trainer": {"epochs": 1, "callbacks": [lw.EarlyStopping("valid/loss")]}}, "valid/loss"),
    ],
)
def test_an_argument_that_would_be_idle_is_refused(settings: dict[str, Any], says: str) -> None:
    """An interval of a validation that is not made, a pattern that matches nothing, a monitor that nothing produces."""
    net = nn.Linear(4, 2)
    task = lw.Supervised(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), 0.1))
    trainer = lw.Trainer(progress=False, folder=None, **settings["trainer"])
    with pytest.raises(lw.LoopwrightError) as caught:
        trainer.fit(task, (torch.zeros(10, 4), torch.zeros(10, 2)), stages=settings.get("stages"))
    assert says in str(caught.value)


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
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip


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
    folder_module.packages.cache_clear()
    try:
        assert folder_module.packages() == {"PyYAML": "6.0", "torch": "9.0+cpu", "x_y": "2"}
    finally:
        folder_module.packages.cache_clear()


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


def test_modules_may_be_imported_while_their_files_are_listed() -> None:
    """What the collector of garbage calls may import, and the list is made of what was there before."""

    class Imports:
        def __init__(self) -> None:
            self.itself = self  # so that only the collector finds it

        def __del__(self) -> None:
            sys.modules[f"late_{id(self)}"] = sys
            late.append(f"late_{id(self)}")

    late: list[str] = []
    before = gc.get_threshold()
    try:
        gc.set_threshold(50)
        for _ in range(20):
            Imports()
            assert __file__ in files_of_modules()
    finally:
        gc.set_threshold(*before)
        gc.collect()
        for name in late:
            del sys.modules[name]
    assert late
