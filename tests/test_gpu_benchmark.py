"""The benchmark that `make gpu` runs: everything but the GPU is tried here, with tiny sizes."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
PATH = ROOT / "benchmarks" / "gpu.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module
    spec.loader.exec_module(module)
    return module


def test_a_gpt_is_timed_by_hand_and_with_fit(gpu: ModuleType) -> None:
    size = gpu.Size(layers=2, heads=2, width=16, context=8, vocabulary=32, batch=2)
    compile = {"backend": "eager", "dynamic": False}
    assert gpu.gpt_by_hand(size, CPU, 4, 2, compile) > 0
    assert gpu.gpt_ours(size, CPU, 4, 2, compile) > 0


def test_its_gpt_has_124_million_parameters(gpu: ModuleType) -> None:
    with torch.device("meta"):
        net = gpu.GPT(gpu.Size())
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == 124


def test_digits_are_timed_by_hand_and_with_fit(gpu: ModuleType) -> None:
    assert gpu.digits_by_hand(CPU, 1) > 0
    assert gpu.digits_ours(CPU, 1, nonfinite=None, compile={"backend": "eager"}) > 0


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_images_are_timed_by_hand_and_with_fit(gpu: ModuleType) -> None:
    assert gpu.images_by_hand(CPU, 4, 2, 2, 32) > 0
    for early in (False, True):
        assert gpu.images_ours(CPU, 4, 2, 2, 32, early=early) > 0
    assert gpu.ahead._LEAST == 1 << 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_without_cuda_it_says_so_and_fails() -> None:
    done = subprocess.run([sys.executable, str(PATH), "--write"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("no CUDA device was found by torch ")
    assert not (PATH.parents[1] / "docs" / "benchmarks-gpu.md").exists()


BARE = """#!{python}
import runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
_, flag, module, *options = sys.argv
assert flag == "-m"
sys.argv = [module, *options, "--collect-only", "-p", "no:cacheprovider"]
runpy.run_module(module, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_gpu_finds_its_tests_where_what_other_tests_need_is_missing(tmp_path: Path) -> None:
    """A machine with a GPU and no network has torch, and pytest with hypothesis; of the rest, who knows."""
    missing = {"gymnasium", "IPython", "matplotlib", "nbclient", "pandas", "pyarrow", "torchdata", "torchmetrics"}
    bare = tmp_path / "python"
    bare.write_text(BARE.format(python=sys.executable, missing=missing))
    bare.chmod(0o755)
    printed = subprocess.run(["make", "-n", "gpu", f"PYTHON={bare}"], cwd=ROOT, capture_output=True, text=True)
    (command,) = [line for line in printed.stdout.splitlines() if " -m pytest " in line]
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    marked = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert {"tests/test_gpu.py", "tests/callbacks/test_erasing.py", "tests/callbacks/test_watch.py"} <= marked
