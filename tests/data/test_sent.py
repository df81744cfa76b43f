"""What goes wrong while samples are read is told with its index: nothing ends an epoch early, nothing hangs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

import loopwright as lw
from loopwright.data import as_source
from loopwright.data.held import close

N = 12


class Rows(Dataset[Any]):
    """Numbers, of which reading one does something else."""

    def __init__(self, act: Callable[[], Any], at: int = 7) -> None:
        self.act, self.at = act, at

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return self.act() if i == self.at else torch.tensor(float(i))


class Many(Rows):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


def stops() -> Any:
    return next(iter(()))


def raises_local() -> Any:
    class OddError(Exception):
        """Of a class that no other process finds."""

        def __init__(self, text: str, more: Any) -> None:
            super().__init__(text)
            self.more = more

    raise OddError("no such picture: 7.png", more=lambda: None)


def raises_plain() -> Any:
    raise KeyError("7.png")


READERS: dict[str, Callable[[Any], Any]] = {
    "a loader of torch": lambda data: DataLoader(data, 4),
    "a loader of torch with workers": lambda data: DataLoader(data, 4, num_workers=2),
    "our loader": lambda data: lw.Loader(data, 4),
    "our loader with workers": lambda data: lw.Loader(data, 4, workers=2),
}
WITH_WORKERS = [name for name in READERS if "workers" in name]


def read(name: str, data: Any) -> list[Any]:
    source = as_source(READERS[name](data), train=True, key=0)
    try:
        return list(source.at(0, 0))
    finally:
        close(source)


def all_said(error: BaseException) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


@pytest.mark.parametrize("kind", [Rows, Many])
@pytest.mark.parametrize("name", READERS)
def test_a_sample_that_raises_stop_iteration_does_not_end_the_epoch(name: str, kind: type[Rows]) -> None:
    with pytest.raises(lw.DataError, match="a sample raised StopIteration, which would end the epoch as if") as caught:
        read(name, kind(stops))
    said = all_said(caught.value)
    assert "batch 2 of epoch 1, dataset indices [4, 5, 6, 7]" in said
    assert "dataset[7] that raised" in said


@pytest.mark.parametrize("name", ["our loader", "our loader with workers"])
def test_a_transform_that_raises_stop_iteration_does_not_end_the_epoch(name: str) -> None:
    loader = lw.Loader(
        torch.arange(N), 4, workers=2 * ("workers" in name), transform=lambda x: next(iter([x][x == 7 :]))
    )
    with pytest.raises(lw.DataError, match="a sample raised StopIteration"):
        list(loader)
    loader.close()


@pytest.mark.parametrize("kind", [Rows, Many])
@pytest.mark.parametrize("name", WITH_WORKERS)
def test_an_error_that_cannot_be_sent_arrives_with_type_message_traceback_and_index(
    name: str, kind: type[Rows]
) -> None:
    with pytest.raises(lw.DataError) as caught:
        read(name, kind(raises_local))
    said = all_said(caught.value)
    assert "raises_local.<locals>.OddError: no such picture: 7.png" in said
    assert 'raise OddError("no such picture: 7.png", more=lambda: None)' in said  # the line, in the traceback
    assert "dataset indices [4, 5, 6, 7]" in said
    assert "dataset[7]" in said or kind is Many


@pytest.mark.parametrize("name", WITH_WORKERS)
def test_an_error_that_can_be_sent_stays_what_it_is(name: str) -> None:
    with pytest.raises(KeyError) as caught:
        read(name, Rows(raises_plain))
    assert "dataset[7] that raised" in all_said(caught.value)


@pytest.mark.parametrize("name", WITH_WORKERS)
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: {"x": torch.zeros(2), "then": [lambda: 1]},
            r"batch\[0\]\['then'\]\[0\] \(function\) cannot be sent from",
        ),
        (
            lambda: {"x": 1, "open": (i for i in range(3))},
            r"batch\[0\]\['open'\] \(generator\) cannot be sent from a work",
        ),
    ],
)
def test_a_batch_that_cannot_be_sent_is_told_and_not_waited_for(name: str, make: Any, says: str) -> None:
    loaders = {"our loader with workers": lambda data: lw.Loader(data, 1, collate=list, workers=2)}
    make_loader = loaders.get(name, lambda data: DataLoader(data, 1, collate_fn=list, num_workers=2))
    source = as_source(make_loader(Rows(make)), train=True, key=0)
    with pytest.raises(lw.DataError, match=says) as caught:
        list(source.at(0, 0))
    assert "Return tensors, arrays, numbers and texts" in str(caught.value)
    assert "batch 8 of epoch 1, dataset indices [7]" in all_said(caught.value)
    close(source)


@pytest.mark.parametrize("name", WITH_WORKERS)
def test_a_collate_function_whose_error_cannot_be_sent_is_told(name: str) -> None:
    def collate(samples: list[Any]) -> Any:
        raises_local()

    made = (
        DataLoader(Rows(stops, -1), 4, collate_fn=collate, num_workers=1)
        if "torch" in name
        else lw.Loader(Rows(stops, -1), 4, collate=collate, workers=1)
    )
    source = as_source(made, train=True, key=0)
    with pytest.raises(lw.DataError, match=r"raises_local\.<locals>\.OddError: no such picture"):
        list(source.at(0, 0))
    close(source)


def test_a_worker_knows_the_dataset_itself() -> None:
    """And not what stands in for it."""

    class Asking(Rows):
        def __getitem__(self, i: int) -> Any:
            info = get_worker_info()
            assert info is not None
            return float(info.dataset is self)

    def begin(worker: int) -> None:
        info = get_worker_info()
        assert info is not None
        assert type(info.dataset) is Asking

    loader = DataLoader(Asking(stops), 4, num_workers=2, worker_init_fn=begin)
    assert [batch.tolist() for batch in as_source(loader, train=True, key=0).at(0, 0)] == [[1.0] * 4] * 3
