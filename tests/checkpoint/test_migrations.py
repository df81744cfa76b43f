"""Checkpoints of every release are read for ever: the golden ones, and what changed from one format to the next."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import loopwright as lw
from loopwright.checkpoint import list_checkpoints, manifest, migrations, read, verify
from loopwright.checkpoint.migrations import FORMAT, STEPS
from loopwright.progress import Progress

ROOT = Path(__file__).parents[2]
GOLDEN = sorted(path for path in (ROOT / "tests" / "golden").iterdir() if path.is_dir())


def tool() -> types.ModuleType:
    """The script that writes golden checkpoints."""
    spec = importlib.util.spec_from_file_location("golden", ROOT / "tools" / "golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden = pytest.mark.parametrize("folder", GOLDEN, ids=lambda path: path.name)


def parts(folder: Path) -> tuple[Path, dict[str, Any]]:
    (path,) = list_checkpoints(folder)
    expected: dict[str, Any] = json.loads((folder / "expected.json").read_text())
    return path, expected


def numbers(texts: list[str]) -> torch.Tensor:
    return torch.tensor([float.fromhex(text) for text in texts], dtype=torch.float64).to(torch.float32)


@pytest.mark.capability("B-26")
@golden
def test_a_golden_checkpoint_is_read_to_the_very_values_that_its_run_had(folder: Path) -> None:
    """Checkpoints of every release and format are read by this one."""
    path, expected = parts(folder)
    data = read(path)
    assert set(data.files) == {"model"}
    assert {name: value.shape for name, value in data.files["model"].items()} == {
        "0.weight": (3, 4), "0.bias": (3,), "2.weight": (2, 3), "2.bias": (2,),
    }  # fmt: skip
    for name, texts in expected["weights"].items():
        assert torch.equal(data.files["model"][name].flatten(), numbers(texts)), name
    (optimizer,) = data.state["optimizers"].values()
    for name, texts in expected["exp_avg"].items():
        assert torch.equal(optimizer["state"][int(name)]["exp_avg"].flatten(), numbers(texts)), name
    assert optimizer["param_groups"][0]["lr"] == float.fromhex(expected["lr"])
    assert {name: data.state["progress"][name] for name in expected["progress"]} == expected["progress"]
    assert {name: data.info[name] for name in expected["progress"]} == expected["progress"]
    metrics = {name: float.fromhex(text) for name, text in expected["metrics"].items()}
    assert data.state["metrics"] == data.info["metrics"] == metrics


@golden
def test_a_golden_checkpoint_is_gone_on_from(folder: Path, tmp_path: Path) -> None:
    """Other processors may give other last bits, hence the tolerance."""
    path, expected = parts(folder)
    copy = shutil.copytree(path, tmp_path / path.name)
    tools = tool()
    run = tools.fit(tools.STEPS + tools.MORE, None, resume=lw.Resume(copy, how="approximate"))
    assert run.progress.step == 12
    (model,) = run.models.values()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value.flatten(), numbers(expected["later"][name]), rtol=1e-4, atol=1e-6)


@golden
def test_a_golden_checkpoint_is_small(folder: Path) -> None:
    path, _ = parts(folder)
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 30_000


@pytest.mark.capability("B-26")
def test_each_release_leaves_a_golden_checkpoint() -> None:
    assert lw.__version__ in [folder.name for folder in GOLDEN] or "dev" in lw.__version__, (
        "write it with: python tools/golden.py"
    )


def test_the_script_writes_what_can_be_read(tmp_path: Path) -> None:
    tools = tool()
    tools.main(tmp_path / "new")
    path, expected = parts(tmp_path / "new")
    assert verify(path)["format"] == FORMAT
    assert expected["progress"] == {"step": 8, "epoch": 1, "batch": 3, "samples": 32}
    with pytest.raises(SystemExit, match="exists, and golden checkpoints are never changed"):
        tools.main(tmp_path / "new")


# ------------------------------------------------------------------------------------------------ the mechanism


def rewritten(path: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with another manifest, whose checksum is right."""
    found = json.loads((path / "manifest.json").read_text()) | changes
    del found["checksum"]
    copy = Path("copies") / path.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy)
    (copy / "manifest.json").write_bytes(manifest.render(found))
    return copy


def oldest() -> Path:
    (path,) = list_checkpoints(ROOT / "tests" / "golden" / "format-0")
    return path


def test_there_is_a_step_from_every_format_to_the_next() -> None:
    assert sorted(STEPS) == list(range(FORMAT))


def test_format_0_did_not_say_what_the_bits_depend_on_and_so_cannot_be_resumed_exactly() -> None:
    path = oldest()
    stored = json.loads((path / "manifest.json").read_text())
    state = json.loads((path / "state.json").read_text())
    assert stored["format"] == 0
    assert stored["info"]["exact"] is True
    assert not {"recipe", "conditions", "data", "stop_reason"} & state.keys()
    assert state["stage_start"] == state["progress"]

    data = read(path)
    reason = "it has format 0, which does not say with which settings and on which hardware it was written"
    assert data.info["exact"] == [reason]
    assert data.state["recipe"] == {"key": None}
    assert data.state["data"] == {"fingerprint": None, "schema": None}
    assert (data.state["conditions"], data.state["stop_reason"]) == ({}, None)
    assert data.state["stage_start"] == Progress()._asdict()
    tools = tool()
    with pytest.raises(lw.LoopwrightError, match=re.escape(f"cannot be resumed with the same bits:\n  - {reason}")):
        tools.fit(12, None, resume=path)


def test_the_same_data_as_format_1_is_not_migrated() -> None:
    path = rewritten(oldest(), format=1)
    assert read(path).info["exact"] is True
    assert "recipe" not in read(path).state


def test_steps_are_taken_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (
        STEPS[0],
        migrations.Step(
            lambda found: {**found, "info": {**found["info"], "seen": found["info"]["exact"]}},
            lambda state: {"wrapped": state},
        ),
    )
    monkeypatch.setattr(migrations, "STEPS", {0: first, 1: second})
    monkeypatch.setattr(migrations, "FORMAT", 2)
    monkeypatch.setattr(manifest, "FORMAT", 2)
    data = read(oldest())
    assert data.info["seen"] == data.info["exact"]
    assert len(data.info["seen"]) == 1
    assert data.state["wrapped"]["recipe"] == {"key": None}
    data = read(rewritten(oldest(), format=1))
    assert data.info["seen"] is True
    assert "recipe" not in data.state["wrapped"]


def test_a_listing_reads_old_manifests_as_well() -> None:
    assert isinstance(manifest.peek(oldest())["info"]["exact"], list)


def test_a_newer_format_is_refused_with_what_to_type() -> None:
    path = rewritten(oldest(), format=7)
    with pytest.raises(lw.CheckpointError) as caught:
        verify(path)
    assert str(caught.value) == (
        f"{path} has format 7, and this version of Loopwright reads format {FORMAT} and older: it was written by a "
        f"newer Loopwright than {lw.__version__}. To read it: pip install -U loopwright"
    )


@pytest.mark.parametrize("number", [-1, 1.0, True, "1", None, [], 2.5])
def test_a_format_that_is_no_number_is_damage(number: Any) -> None:
    path = rewritten(oldest(), format=number)
    with pytest.raises(lw.CheckpointError, match=r"manifest.json is damaged: its format is .*, not a number from 0$"):
        verify(path)


@pytest.mark.parametrize("info", [None, [], {}, {"exact": 1}, "text"])
def test_what_a_step_cannot_read_is_damage(info: Any) -> None:
    path = rewritten(oldest(), info=info)
    if info == {"exact": 1}:
        assert len(read(path).info["exact"]) == 1
        return
    with pytest.raises(lw.CheckpointError, match=r"manifest.json is damaged: it does not hold what format 0 has"):
        verify(path)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": NaN}', '{"a": -Infinity}'])
def test_what_two_readers_may_read_differently_is_damage(text: str) -> None:
    Path("c").mkdir()
    Path("c/manifest.json").write_text(text)
    with pytest.raises(lw.CheckpointError, match=r"manifest.json is damaged: it is not JSON"):
        verify(Path("c"))
