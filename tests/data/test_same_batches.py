"""Order and augmentation are functions of (key, epoch, sample): whoever reads, however many, gets the same batches."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import loopwright as lw
import ranked

N = 37  # a short last batch
READERS = [(0, None), (1, 1), (4, 3)]  # workers, batches that each reads ahead


class Ids(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return torch.tensor([float(i)])


def augmented(sample: Any, rng: torch.Generator) -> Any:
    """The id, and noise of every stream that an augmentation may draw from."""
    drawn = [torch.rand((), generator=rng), torch.rand(()), random.random(), float(np.random.rand())]
    return torch.cat([sample, torch.tensor(drawn)])


def global_batches(workers: int, prefetch: int | None) -> list[list[list[float]]]:
    """What all ranks together trained on, batch for batch, in two epochs; the model draws as well."""
    mine: list[Any] = []

    def step(run: lw.Run, batch: Any) -> None:
        mine.append(batch.tolist())
        torch.rand(1 + run.comm.rank)

    loader = lw.Loader(Ids(), 8, shuffle=True, transform=augmented, seed=7, workers=workers, prefetch=prefetch)
    user = lw.Trainer(epochs=2, folder=None, progress=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
        run = user.run(step, loader, state={})
    loader.close()
    return [[row for part in parts for row in part] for parts in zip(*run.comm.gather(mine), strict=True)]


@pytest.fixture(scope="module")
def alone() -> list[list[list[float]]]:
    return global_batches(*READERS[0])


@pytest.mark.capability("B-03")
@pytest.mark.parametrize(("workers", "prefetch"), READERS)
def test_batches_are_the_same_with_any_number_of_workers_and_any_prefetch(
    workers: int, prefetch: int | None, alone: Any
) -> None:
    """The same samples with the same augmentation in the same batches with 0, 1 or 4 workers, whoever else draws."""
    torch.manual_seed(workers + 50), random.seed(workers), np.random.seed(workers)
    found = global_batches(workers, prefetch)
    assert found == alone
    assert [len(batch) for batch in found] == [8, 8, 8, 8, 5] * 2
    first, second = ([row for batch in found[part] for row in batch] for part in (slice(0, 5), slice(5, 10)))
    assert sorted(row[0] for row in first) == sorted(row[0] for row in second) == list(range(N))
    assert [row[0] for row in first] != [row[0] for row in second]
    assert not {tuple(row[1:]) for row in first} & {tuple(row[1:]) for row in second}  # each epoch draws anew


@pytest.mark.slow
@pytest.mark.capability("B-03")
def test_two_ranks_read_the_batches_of_one(alone: Any, tmp_path: Path) -> None:
    """The slices of two ranks make up the global batches of one process, with 0, 1 and 4 workers on each."""
    command = [sys.executable, ranked.__file__, "2", __file__, str(tmp_path / "found.json")]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])  # what test files share
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "found.json").read_text()) == [alone] * len(READERS)


if __name__ == "__main__":
    everything = [global_batches(*reader) for reader in READERS]
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(everything))
