"""Which data is trained on and predicted where it lies, and which is converted once: by what changes, and in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import loopwright as lw
from allocated import Allocated
from loopwright.data import as_source

N, WIDE, SIZE = 20_000, 64, 100
Make = Callable[[Any], Any]


class Rows(Dataset[Any]):
    def __init__(self, x: Any) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i]


class Anew:
    def __init__(self, x: Any) -> None:
        self.x = x

    def __iter__(self) -> Iterator[Any]:
        yield from batches(self.x)


def batches(x: Any) -> list[Tensor]:
    return [torch.from_numpy(x[i : i + SIZE]) for i in range(0, len(x), SIZE)]


def columns(x: Any) -> dict[str, Any]:
    """Columns in the memory of ``x``."""
    return {f"c{i}": x[:, i] for i in range(x.shape[1])}


def frame(make: Make) -> Make:
    return lambda x: pd.DataFrame({name: make(column) for name, column in columns(x).items()}, copy=False)


def chunked(column: Any) -> Any:
    """An Arrow array in three pieces, the second of which is empty."""
    third = len(column) // 3
    return pa.chunked_array([pa.array(column[:third]), pa.array(column[:0]), pa.array(column[third:])])


def with_missing(column: Any) -> Any:
    """An Arrow array whose last value is missing."""
    valid = np.packbits(np.arange(len(column)) < len(column) - 1, bitorder="little")
    return pa.Array.from_buffers(
        pa.from_numpy_dtype(column.dtype), len(column), [pa.py_buffer(valid), pa.py_buffer(column)]
    )


def some_chunks_with_missing(column: Any) -> Any:
    return pa.chunked_array([pa.array(column[: len(column) // 2]), with_missing(column[len(column) // 2 :])])


def csr(x: Any) -> tuple[Any, Any, Any]:
    """Values, columns and where rows begin, of a matrix of the numbers of ``x.T``, none of which is zero."""
    n, wide = x.shape
    return x.T.reshape(-1), np.tile(np.arange(wide), n), np.arange(0, wide * n + 1, wide)


def csr_tensor(x: Any) -> Any:
    values, at, begins = map(torch.from_numpy, csr(x))
    return torch.sparse_csr_tensor(begins, at, values, tuple(x.shape), check_invariants=False)


def read_only(x: Any) -> Any:
    x = x.view()
    x.flags.writeable = False
    return x


IN_PLACE: dict[str, Make] = {  # data in the memory of x (columns of x.T), of which its own library copied nothing
    "numpy": lambda x: x,
    "numpy, read only": read_only,
    "numpy, memmap": lambda x: x.view(np.memmap),
    "numpy, backwards": lambda x: x[::-1, ::-1],
    "numpy, of another byte order": lambda x: x,  # made so below
    "torch": torch.from_numpy,
    "pandas": lambda x: pd.DataFrame(x, copy=False),
    "pandas, in pieces": frame(lambda column: column),
    "pandas, nullable": frame(lambda column: pd.arrays.FloatingArray(column, np.zeros(len(column), bool))),
    "pandas, of Arrow": frame(lambda column: pd.arrays.ArrowExtensionArray(chunked(column))),
    "series": lambda x: pd.Series(x[:, 0], copy=False),
    "series, nullable": lambda x: pd.Series(pd.arrays.FloatingArray(x[:, 0], np.zeros(len(x), bool)), copy=False),
    "arrow": lambda x: pa.table(columns(x)),
    "arrow, in chunks": lambda x: pa.table({name: chunked(column) for name, column in columns(x).items()}),
    "arrow, with missing values": lambda x: pa.table(
        {name: some_chunks_with_missing(column) for name, column in columns(x).items()}
    ),
    "one column of arrow": lambda x: pa.table({"a": x[:, 0]})["a"],
    "one column of arrow, in chunks": lambda x: chunked(x[:, 0]),
    "one column of arrow, with missing values": lambda x: with_missing(x[:, 0]),
    "dict": lambda x: {"x": x, "more": (torch.from_numpy(x), pd.DataFrame(x, copy=False))},
    "sparse": lambda x: scipy.sparse.csr_array(csr(x), shape=x.shape, copy=False),
    "sparse, of torch": csr_tensor,
    "dataset": Rows,
    "tensor dataset": lambda x: TensorDataset(torch.from_numpy(x)),
    "loader of torch": lambda x: DataLoader(Rows(x), SIZE),
    "loader of torch over tensors": lambda x: DataLoader(TensorDataset(torch.from_numpy(x)), SIZE),
    "list of batches": batches,
    "function of batches": lambda x: lambda: iter(batches(x)),
    "iterable of batches": Anew,
}
READY = [kind for kind in IN_PLACE if kind.endswith("of batches")]
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


def base(kind: str, n: int = N, wide: int = WIDE) -> Any:
    """Memory for data of this kind, a column after the other where columns are wanted in one piece."""
    x = np.random.default_rng(0).uniform(1, 2, (n, wide)).astype(np.float32)
    x = x.astype(x.dtype.newbyteorder()) if kind == "numpy, of another byte order" else x
    return x if kind in READY else np.asfortranarray(x)


def tensors(batch: Any) -> list[Tensor]:
    """All tensors in a batch."""
    if isinstance(batch, Tensor):
        return [batch]
    return [one for part in (batch.values() if isinstance(batch, dict) else batch) for one in tensors(part)]


def opened(data: Any) -> Any:
    whole = isinstance(data, (DataLoader, list, Anew)) or callable(data)
    return as_source(data if whole else lw.Loader(data, SIZE), train=True, key=0)


@pytest.mark.capability("B-30")
@pytest.mark.parametrize("kind", IN_PLACE)
def test_every_batch_is_read_from_where_the_data_lies(kind: str) -> None:
    """What changes there between two batches is in the second one, in each epoch."""
    x = base(kind, 4 * SIZE, 3)
    source, value = opened(IN_PLACE[kind](x)), 0.0
    for epoch in (0, 1):
        read = iter(source.at(epoch, 0))
        for number in range(4):
            value = x[:] = value + 1
            parts = tensors(next(read))
            if number == 3 and "missing" in kind:
                parts = [part[:-1] for part in parts]
            assert parts
            assert all(len(part) and (part == value).all() for part in parts)


@pytest.mark.capability("B-30")
def test_truths_that_arrow_keeps_as_bits_are_read_from_where_they_lie() -> None:
    bits = np.zeros(SIZE // 2, np.uint8)  # of 4 batches
    source = opened(pa.Array.from_buffers(pa.bool_(), 4 * SIZE, [None, pa.py_buffer(bits)]))
    read = iter(source.at(0, 0))
    for value in (0, 255, 0, 255):
        bits[:] = value
        assert torch.equal(next(read), torch.full((SIZE,), bool(value)))


class Takes(lw.Task):
    """Takes any batch: its first tensor, whatever its dtype is and whatever is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(WIDE, 1)

    def predict_step(self, batch: Any) -> Tensor:
        return self.net(tensors(batch)[0].float().nan_to_num())  # type: ignore[no-any-return]

    def training_step(self, batch: Any) -> Tensor:
        return self.predict_step(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


def trained(data: Any) -> lw.Task:
    task = Takes()
    lw.Trainer(steps=3, seed=1, folder=None, progress=False, checkpoint=False).fit(task, data)
    return task


def loader(data: Any) -> Any:
    return lw.Loader(data, SIZE, shuffle=True)


def as_given(kind: str, data: Any) -> Any:
    return data if kind in READY or "loader" in kind else loader(data)


@pytest.mark.capability("B-30")
@pytest.mark.parametrize("kind", [kind for kind in IN_PLACE if "series" not in kind and "one column" not in kind])
def test_training_and_predicting_hold_no_copy_of_the_data(kind: str) -> None:
    """Besides batches there is their order, 8 bytes a sample of 256: all in all less than a quarter of the data."""
    trained(as_given(kind, IN_PLACE[kind](base(kind, 400))))  # what is kept for all later runs
    x = base(kind)
    data = IN_PLACE[kind](x)
    with Allocated() as fitting:
        task = trained(as_given(kind, data))
    with Allocated() as predicting:
        few = lw.data.limit(as_given(kind, data), batches=8)
        assert lw.Trainer(folder=None, progress=False).predict(task, few).shape == (8 * SIZE, 1)
    assert 0 < fitting.peak < x.nbytes / 4
    assert 0 < predicting.peak < x.nbytes / 4


@pytest.mark.capability("B-30")
@pytest.mark.parametrize("form", ["csc", "coo", "lil", "bsr", "dok"])
def test_a_sparse_matrix_in_another_form_is_converted_once_a_loader_to_as_many_bytes_as_csr_has(form: str) -> None:
    n = 60 if form == "dok" else 8000  # which is slow
    matrix = scipy.sparse.random_array((n, WIDE), density=0.25, format="csr", dtype=np.float32, rng=0)
    own = matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes
    other = matrix.asformat(form)
    trained(loader(matrix[:60]))
    assert torch.equal(next(iter(lw.Loader(other, n))), torch.from_numpy(matrix.toarray()))
    if form in ("bsr", "dok"):  # which hold zeros too, or are not counted
        return
    with Allocated() as of_csr:
        trained(loader(matrix))
    with Allocated() as made:
        task = trained(loader(other))
    assert own <= made.peak - of_csr.peak + own // 8
    assert made.peak - of_csr.peak < 1.1 * own  # two would be 2
    del task
