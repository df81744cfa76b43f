"""What every test and every example in a docstring gets: fixed seeds, one thread, an own folder, no leaks."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # bits depend on the number of threads
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms need on CUDA
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

# the examples of loggers whose package is not installed; `make trackers` has them all
TRACKERS = ("tensorboard", "mlflow", "wandb")
collect_ignore = [f"src/loopwright/loggers/{name}.py" for name in TRACKERS if find_spec(name) is None]

# set by pytest, by torch._dynamo (with the first optimizer), threadpoolctl, gymnasium and wandb when they are imported
FOREIGN = ("WANDB_SERVICE", "PYTEST_", "TORCHINDUCTOR_", "_TORCHINDUCTOR_", "KMP_", "PYGAME_")


def process_state() -> dict[str, object]:
    """What belongs to the process and not to a test: folder, torch's switches, signal handlers, variables."""
    return {
        "working directory": os.getcwd(),
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.is_deterministic_algorithms_warn_only_enabled()": (
            torch.is_deterministic_algorithms_warn_only_enabled()
        ),
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
        "torch.is_anomaly_enabled()": torch.is_anomaly_enabled(),
        "handler of SIGINT": signal.getsignal(signal.SIGINT),
        "handler of SIGTERM": signal.getsignal(signal.SIGTERM),
    } | {f"${name}": value for name, value in os.environ.items() if not name.startswith(FOREIGN)}


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path) -> Iterator[None]:
    """Seed all generators, run in ``tmp_path``, and fail a test that leaves the process changed."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    home = os.getcwd()
    os.chdir(tmp_path)
    before = process_state()
    try:
        yield
        after = process_state()
    finally:
        os.chdir(home)
    changed = [
        f"{name}: {before.get(name, 'unset')!r} -> {after.get(name, 'unset')!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if changed:
        _put_back(before)
        pytest.fail("the test left the process changed:\n  " + "\n  ".join(changed), pytrace=False)


def _put_back(before: dict[str, object]) -> None:
    """Undo a leak, so that the next test is not blamed for it."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(FOREIGN)}
    os.environ.clear()
    os.environ.update(kept | {name[1:]: str(value) for name, value in before.items() if name.startswith("$")})
    torch.set_default_dtype(before["torch.get_default_dtype()"])  # type: ignore[arg-type]
    torch.set_grad_enabled(before["torch.is_grad_enabled()"] is True)
    torch.autograd.set_detect_anomaly(before["torch.is_anomaly_enabled()"] is True)
    for number, name in ((signal.SIGINT, "handler of SIGINT"), (signal.SIGTERM, "handler of SIGTERM")):
        signal.signal(number, before[name])  # type: ignore[arg-type]
