"""examples/everywhere.py: one short script, with one process and several, in 32 and 16 bits, below any launcher."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import loopwright as lw
from loopwright.checkpoint import read
from test_examples import EXAMPLES, load

SCRIPT = EXAMPLES / "everywhere.py"
Fit = Callable[..., Any]


def trained(folder: Path) -> Path:
    """The only run below ``folder``."""
    (found,) = folder.glob("runs/everywhere/*")
    return found


def newest(run: Path) -> Path:
    """The last checkpoint."""
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def weights(run: Path) -> dict[str, Any]:
    """Of the last checkpoint, read by safetensors; those that ranks have written in pieces by ``load_weights``."""
    last = newest(run)
    if (last / "model.safetensors").exists():
        return load_file(last / "model.safetensors")
    net = load("everywhere").Mixer()
    lw.load_weights(net, last)
    return net.state_dict()


def apart(one: dict[str, Any], two: dict[str, Any]) -> float:
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """The script's ``main`` with so many processes and the flags: what each rank returned, and its run folder; once."""
    done: dict[Any, Any] = {}
    main = load("everywhere").main

    def get(nproc: int, precision: str = "fp32", strategy: str = "auto") -> Any:
        key = nproc, precision, strategy
        if key not in done:
            folder, home = tmp_path_factory.mktemp("everywhere"), os.getcwd()
            os.chdir(folder)
            try:
                done[key] = lw.launch(main, nproc, 1, precision, strategy), trained(folder)
            finally:
                os.chdir(home)
        return done[key]

    return get


@pytest.mark.slow
@pytest.mark.capability("CA-04", "CA-05", "CA-11")
@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_two_processes_train_to_the_weights_of_one_by_a_flag(fit: Fit, strategy: str) -> None:
    """One script, unchanged, on one process and on two, with DDP and with FSDP: the same weights and measurements."""
    (alone,), home = fit(1)
    (first, second), folder = fit(2, strategy=strategy)
    assert first == second
    assert first["valid/accuracy"] == pytest.approx(alone["valid/accuracy"], abs=0.01)
    assert alone["valid/accuracy"] > 0.3  # of ten digits
    one, two = weights(home), weights(folder)
    assert one.keys() == two.keys()
    assert apart(one, two) < 1e-5
    assert bool(list(folder.glob("checkpoints/step-*/model-*.safetensors"))) == (strategy == "fsdp")  # in pieces
    assert first["valid/loss"] == pytest.approx(alone["valid/loss"], rel=1e-5)
    assert len(json.loads((folder / "run.json").read_text())["ranks"]) == 2


@pytest.mark.slow
@pytest.mark.capability("CA-04", "CA-05", "CA-12", "FA-26", "IG-23")
@pytest.mark.nightly
def test_sixteen_bits_and_two_processes_are_a_word_each_in_a_script_of_80_lines(fit: Fit) -> None:
    """Distributed and in fp16, with warm-up, accumulation, clipping, resume and requeue, in less than 80 lines."""
    _, home = fit(1)
    (first, second), folder = fit(2, "fp16")
    assert first == second
    half, coarse = (apart(weights(home), weights(one)) for one in (folder, fit(2, "bf16")[1]))
    assert 1e-5 < half < 1e-2
    assert half < coarse / 2  # of 10 bits of precision, where bf16 has 7
    scaling = read(newest(folder)).state["precision"]
    assert scaling["scale"] == 2.0**16  # by which gradients do not vanish
    assert scaling["_growth_tracker"] == 22  # steps
    assert all(tensor.dtype.itemsize == 4 for tensor in weights(folder).values())
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.slow
@pytest.mark.capability("CA-11")
def test_metrics_checkpoints_and_two_ways_of_logging_come_with_it_and_are_written_once(fit: Fit) -> None:
    """Two processes leave one folder: records in JSON and CSV, a checkpoint, the settings; nothing is there twice."""
    _, folder = fit(2)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = [record for record in records if record.get("kind") == "epoch"]
    assert [record["epoch"] for record in epochs] == [1]
    assert sorted(row["kind"] for row in rows) == ["epoch", "train", "valid"]
    assert {"train/loss", "valid/accuracy", "lr"} <= rows[0].keys() & epochs[0].keys()
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == [f"step-{epochs[-1]['step']:08}"]


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.capability("CA-04", "CA-05")
def test_the_script_is_the_same_below_a_launcher(fit: Fit, tmp_path: Path) -> None:
    """``loopwright launch`` starts the file as it is, two processes in bf16; rank 0 alone speaks."""
    command = [sys.executable, "-m", "loopwright", "launch", "--nproc", "2", "--", str(SCRIPT), "--epochs", "1"]
    done = subprocess.run(
        [*command, "--precision", "bf16"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("accuracy ")
    assert " by 2 of cpu; runs/everywhere/" in done.stdout
    assert done.stdout.count("\n") == 1
    assert json.loads((trained(tmp_path) / "run.json").read_text())["status"] == "done"
    assert 1e-4 < apart(weights(fit(2)[1]), weights(trained(tmp_path))) < 1e-1  # of 8 bits of precision, and close


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.capability("CA-38")
def test_the_script_is_the_same_as_the_tasks_of_a_slurm_job(fit: Fit, tmp_path: Path) -> None:
    """Two processes with the variables that srun sets train to the weights of one, and write one folder."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    step = {"SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "train", "SLURM_STEP_ID": "0", "SLURM_NODEID": "0"}
    step |= {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_NODELIST": "gpu[07-08]", "MASTER_PORT": port}
    tasks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), "--epochs", "1"], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.PIPE, env=os.environ | step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
        )
        for rank in "01"
    ]  # fmt: skip
    (first, errors), (second, _) = (task.communicate(timeout=200) for task in tasks)
    assert " by 2 of cpu; runs/everywhere/" in first, errors[-4000:]
    assert second == ""
    assert len(json.loads((trained(tmp_path) / "run.json").read_text())["ranks"]) == 2
    assert apart(weights(fit(1)[1]), weights(trained(tmp_path))) < 1e-5
