"""Whatever happens to a file of a checkpoint is noticed: the file is named, and a good checkpoint is offered."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from checkpoint.spoil import cuts, flips, holes, swaps, undetected
from loopwright.checkpoint import read, write

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "state.safetensors"]


def two() -> tuple[Path, Path]:
    """A good checkpoint, and a newer one of another step to spoil."""
    paths = []
    for step in (1, 2):
        files = {"model": {"w": torch.randn(40, 40), "b": torch.randn(40)}}
        moments = {"state": {0: {"exp_avg": torch.randn(40, 40), "step": torch.tensor(float(step))}}}
        state = {"optimizers": {"o": moments}, "seen": list(range(step)), "rng": torch.get_rng_state()}
        about = {"step": step, "seconds": 1e-05, "loss": 0.1 * step, "stage": "fein \u00fc", "exact": True}
        paths.append(write(Path(f"checkpoints/step-{step:08d}"), files, state, about))
    return paths[0], paths[1]  # type: ignore[return-value]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "damage",
    [lambda file, draws: flips(file, draws, count=60), lambda file, draws: cuts(file, draws, count=12),
     lambda file, draws: holes(file)],
    ids=["flips", "cuts", "holes"],
)  # fmt: skip
def test_damage_is_found_named_and_got_round(damage: Callable[[Path, random.Random], Iterator[str]], file: str) -> None:
    good, bad = two()
    count, missed = undetected(bad, damage(bad / file, random.Random(0)), instead=good)
    assert missed == []
    assert count > 0
    read(bad)  # all was undone


def test_a_missing_or_foreign_file_is_found_the_manifest_too() -> None:
    good, bad = two()
    swapped, missed = undetected(bad, swaps(bad, good), instead=good)
    assert (swapped, missed) == (10, [])


@pytest.mark.slow
@pytest.mark.parametrize("file", ["manifest.json", "state.json"])
def test_no_byte_can_change_by_a_bit_unseen(file: str) -> None:
    good, bad = two()
    count, missed = undetected(bad, flips(bad / file, random.Random(1)), instead=good)
    assert (count, missed) == ((bad / file).stat().st_size, [])


def test_a_number_spelled_otherwise_is_damage_as_well() -> None:
    good, bad = two()
    text = (bad / "manifest.json").read_text()
    for was, now in (("1e-05", "1E-05"), ("\\u00fc", "\\u00FC")):
        assert was in text
        (bad / "manifest.json").write_text(text.replace(was, now))
        assert undetected(bad, iter(["manifest.json: other bytes"]), instead=good) == (1, [])
