"""Every example does in a few seconds, on real data, what it says it does."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sklearn.datasets import load_digits

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = ("char_lm", "dqn", "everywhere", "function", "gan", "handlers", "lbfgs", "plain_module", "reinforce", "task")
PARTS = ("cartpole", "demo", "digits", "digits_picture", "digits_report", "run_folder")  # of the demo and of DQN


def load(name: str) -> ModuleType:
    """An example as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)  # as for a script: its neighbours can be imported
        spec.loader.exec_module(module)
    return module


def test_every_example_is_tested_here_or_is_part_of_the_demo():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SHORT, *PARTS}


@pytest.mark.parametrize("name", [*SHORT, *PARTS])
def test_an_example_is_shorter_than_80_lines(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.parametrize("name", SHORT)
def test_an_example_says_how_to_run_it(name):
    module = load(name)
    assert f"Run: python examples/{name}.py [--" in module.__doc__


@pytest.mark.capability("TB-03")
def test_an_example_runs_as_a_script_from_any_folder(tmp_path):
    command = [sys.executable, str(EXAMPLES / "plain_module.py"), "--epochs", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "on 143 biopsies; the run is in runs" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_plain_module_finds_malignant_tumours(capsys):
    result = load("plain_module").main(epochs=12)
    assert result["test/accuracy"] >= 0.94
    assert f"test accuracy {result['test/accuracy']:.1%}" in capsys.readouterr().out


@pytest.mark.capability("CA-02")
def test_task_reads_digits_and_draws_them_again(capsys):
    result = load("task").main(epochs=8)
    assert result["test/accuracy"] >= 0.92
    mean_image = torch.from_numpy(load_digits().data).float().mean(0) / 16
    entropy = torch.nn.functional.binary_cross_entropy(mean_image, mean_image, reduction="sum")
    assert result["test/drawn"] < 0.9 * entropy  # better than drawing the mean of all digits each time
    drawing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert len(drawing) == 8
    assert all(len(line) == 4 + 2 * 16 for line in drawing)


def test_function_finds_the_law_of_the_pendulum_and_trains_scikit_learn():
    law, accuracy = load("function").main(epochs=120)
    assert law["omega"] == pytest.approx(2.0, abs=0.01)
    assert law["damping"] == pytest.approx(0.15, abs=0.02)
    assert accuracy >= 0.93


def test_handlers_are_called_when_they_ask_to_be():
    lines = load("handlers").main(epochs=60)
    assert lines[0].startswith("the first step is done; its loss was ")
    assert len([line for line in lines if line.startswith("above 95 %: lr is 0.002")]) == 1
    assert lines[-1] == "stopped: valid/loss is below 0.2"
    epochs = [int(line.split(":")[0].split()[-1]) for line in lines if line.startswith("after epoch")]
    assert epochs == [*range(10, epochs[-1], 10), epochs[-1]]
    assert 10 < epochs[-1] < 60


def test_char_lm_learns_to_expect_the_next_character():
    module = load("char_lm")
    metrics, text = module.main(steps=40)
    counts = torch.bincount(module.encode("\n".join(module.topics.values()))).double()
    share = counts[counts > 0] / counts.sum()
    guess = float(-(share * share.log2()).sum())  # bits a character when only their frequencies are known
    assert 1 < metrics["valid/bits"] < 0.85 * guess
    assert len(text) == len('The "for" statement') + 400
    assert set(text) <= set(module.CHARS)


@pytest.mark.capability("CA-02")
def test_gan_draws_images_that_look_more_like_digits_than_noise_does():
    drawn, path = load("gan").main(epochs=12)
    real = torch.from_numpy(load_digits().data).float() / 8 - 1
    assert drawn.shape == (64, 64)
    assert torch.cdist(drawn, real).amin(1).mean() < 4.5  # 7.2 for noise, 2.6 after the whole training
    assert torch.cdist(drawn, drawn).fill_diagonal_(9).amin(1).mean() > 0.5  # and they are not one and the same
    assert path.read_bytes().startswith(b"\x89PNG")


def test_lbfgs_reaches_the_closed_form_in_both_ways():
    errors = load("lbfgs").main(epochs=6)
    assert set(errors) == {"Supervised", "step function"}
    assert max(errors.values()) < 1e-6
