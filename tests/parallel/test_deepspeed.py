"""The recipe of docs/parallel.md for DeepSpeed's engine, where it is installed: on CPUs, over gloo."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor:FutureWarning"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

PAGE = Path(__file__).parents[2] / "docs" / "parallel.md"
Told = tuple[dict[str, torch.Tensor], int, int]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``by_deepspeed`` as docs/parallel.md prints it; imported in its processes, as it sets variables."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (code,) = [block for block in blocks if "import deepspeed" in block]
    code, _, call = code.partition("\n\nlw.launch(")
    assert call == "by_deepspeed, 2)\n"

    def run(*args: Any) -> Told:
        scope: dict[str, Any] = {"torch": torch, "nn": nn, "lw": lw, "dist": torch.distributed}
        exec(code, scope)
        weights, *rest = scope["by_deepspeed"](*args)
        return {name: value.clone() for name, value in weights.items()}, *rest

    return run


def plain() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    x, net = torch.randn(64, 4), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    trainer = lw.Trainer(4, accumulate=2, clip_norm=0.5, strategy="single", folder=None, progress=False)
    trainer.fit(task, lw.Loader((x, (x.sum(1) > 0).long()), 16, shuffle=True))
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.capability("CA-05")
@pytest.mark.parametrize(("world", "zero"), [(1, 1), (2, 0), (2, 1), (2, 2)])
def test_the_engine_trains_to_the_weights_of_one_process_and_goes_on_to_the_same_bits(
    world: int, zero: int, recipe: Any, tmp_path: Path
) -> None:
    """DeepSpeed's engine with ZeRO as a function of ``trainer.run``: accumulation, clipping, checkpoints, resume."""
    (wanted,) = lw.launch(plain, 1)
    whole = lw.launch(recipe, world, 4, zero, tmp_path / "whole")
    for weights, samples, updates in whole:
        torch.testing.assert_close(weights, wanted, atol=1e-6, rtol=0)
        assert (samples, updates) == (4 * 64, 4 * 2)
    lw.launch(recipe, world, 2, zero, tmp_path / "cut")
    again = lw.launch(recipe, world, 4, zero, tmp_path / "cut")
    for (resumed, *counts), (weights, *_) in zip(again, whole, strict=True):
        assert all(torch.equal(resumed[name], value) for name, value in weights.items())
        assert counts == [4 * 64, 4 * 2]
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    lw.load_weights(net, max((tmp_path / "cut").glob("zero/*/checkpoints/step-*")))
    assert all(torch.equal(whole[0][0][name], value) for name, value in net.state_dict().items())


def test_a_checkpoint_without_the_engine_is_not_gone_on_with(recipe: Any, tmp_path: Path) -> None:
    """As when the process was killed after the checkpoint had been written, and before the engine's part was."""
    lw.launch(recipe, 1, 2, 1, tmp_path)
    newest = max(tmp_path.glob("zero/*/checkpoints/step-*"))
    (newest / "engine").rename(newest / "elsewhere")
    with pytest.raises(FileNotFoundError, match="has no state of the engine; resume from an older one"):
        lw.launch(recipe, 1, 4, 1, tmp_path)
