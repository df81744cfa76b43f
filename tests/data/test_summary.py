from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import loopwright as lw
from loopwright.data import Loader
from loopwright.data.generators import get_globals
from loopwright.data.lengths import limit
from loopwright.data.mix import Mix
from loopwright.data.summary import summary
from loopwright.errors import DataError

Image = pytest.importorskip("PIL.Image")


class Compose:
    def __init__(self, *transforms: Any) -> None:
        self.transforms = list(transforms)

    def __call__(self, x: Any) -> Any:
        for one in self.transforms:
            x = one(x)
        return x


class RandomApply(Compose):
    def __call__(self, x: Any) -> Any:
        return super().__call__(x) if random.random() < 0.5 else x

    def __repr__(self) -> str:
        return "RandomApply(p=0.5)"


class ToTensor:
    def __call__(self, x: Any) -> Any:
        return torch.from_numpy(x).float().div(255)[None]

    def __repr__(self) -> str:
        return "ToTensor()"


class Crop:
    def __call__(self, x: Any) -> Any:
        size = int(torch.randint(20, 28, (), generator=torch.Generator().manual_seed(int(x.sum()))))
        return x[..., :size, :size]


class Digits(Dataset[Any]):
    def __init__(self, transform: Any = None, target_transform: Any = None) -> None:
        values = np.arange(100 * 28 * 28, dtype=np.int64) % 251
        self.data = values.astype(np.uint8).reshape(100, 28, 28)
        self.transform, self.target_transform = transform, target_transform
        self.rng = np.random.default_rng(0)
        self.read = 0

    def __len__(self) -> int:
        return 100

    def __getitem__(self, i: int) -> Any:
        image, label = self.data[i], i % 10
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label


class Samples(Dataset[Any]):
    def __init__(self, *samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Any:
        if isinstance(self.samples[i], Exception):
            raise self.samples[i]
        return self.samples[i]


def double(label: int) -> int:
    return 2 * label


def test_a_sample_is_walked_through_dataset_transforms_batch_and_epoch() -> None:
    data = DataLoader(Subset(Digits(Compose(ToTensor(), Compose(nn.Flatten(0))), double), range(90)), 32, num_workers=0)
    told = summary(data)
    assert (
        str(told)
        == """\
DataLoader of Subset

 1. dataset Subset with 90 samples, of Digits with 100 samples; it reads
           uint8 (28, 28), 0 to 250
 2. transform, step 1 of 2: ToTensor()
           float32 (1, 28, 28), 0 to 0.9804
 3. transform, step 2 of 2: Compose
           float32 (784), 0 to 0.9804
 4. target_transform: double
           int 0
 5. sample 0, as the dataset gives it
      [0]  float32 (784), 0 to 0.9804
      [1]  int 0
 6. batch: samples 0 to 31
      [0]  float32 (32, 784), 0 to 0.9804
      [1]  int64 (32), 0 to 18
 7. epoch: 90 samples in 3 batches of at most 32, in order, read in the training process; resumes exactly

No problem found."""
    )
    assert (told.samples, told.batches, told.batch_size, told.workers, told.exact) == (90, 3, 32, 0, [])
    assert [tuple(part.shape) for part in told.steps[5].value] == [(32, 784), (32,)]


@pytest.mark.parametrize("train", [True, False])
def test_looking_changes_neither_generators_nor_the_data(train: bool) -> None:
    class Noisy(Digits):
        def __getitem__(self, i: int) -> Any:
            return torch.rand(2), random.random(), np.random.rand(), self.rng.random()

    data = Noisy(Compose(ToTensor()))
    loader = DataLoader(data, 8, shuffle=train, generator=torch.Generator().manual_seed(1))
    held = dict(vars(data))
    before = get_globals(), data.rng.bit_generator.state, loader.generator.get_state().tolist()
    summary(loader)
    assert (get_globals(), data.rng.bit_generator.state, loader.generator.get_state().tolist()) == before
    assert vars(data) == held


def test_what_chooses_among_transforms_is_one_step() -> None:
    titles = [step.title for step in summary(Digits(Compose(RandomApply(ToTensor()), nn.Sequential()))).steps]
    assert titles[1:3] == ["transform, step 1 of 2: RandomApply(p=0.5)", "transform, step 2 of 2: Sequential()"]


def image(size: int) -> torch.Tensor:
    return torch.zeros(3, size, size)


@pytest.mark.parametrize(
    ("samples", "why", "how"),
    [
        ([{"image": image(32)}, {"image": image(28)}],
         "sample 0 has ['image'] of shape (3, 32, 32), sample 1 of shape (3, 28, 28)", "bring all images to one size"),
        ([torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(7, 2)],
         "sample 0 has shape (4, 2), sample 2 has shape (7, 2)", "pad_sequence"),
        ([torch.zeros(4), torch.zeros(4, 1)],
         "sample 0 has shape (4), sample 1 has shape (4, 1)", "give all samples one"),
        ([(1, 2), None, (3, 4), None], "samples 1, 3 are None", "if s is not None"),
        ([{"a": 1.5, "b": "x"}, {"a": 2.5}], "sample 0 has ['b'], and sample 1 does not", "the same entries"),
        ([(Image.new("RGB", (4, 5)), 1)] * 2,
         "[0] is an Image, which has no default way to be stacked", "pil_to_tensor"),
        ([{"a": 1.5, "when": object()}] * 2, "['when'] is an object, which has no default way", "pass a collate_fn"),
    ],
)  # fmt: skip
def test_where_collating_fails_it_is_said_why_and_how_to_mend_it(samples: list[Any], why: str, how: str) -> None:
    told = summary(DataLoader(Samples(*samples), 4))
    assert told.problem is not None
    assert told.fix is not None
    assert told.problem.startswith(f"{len(samples)} samples could not be put together: {why}")
    assert how in told.fix
    ours = summary(lw.Loader(Samples(*samples), 4))  # whose argument has another name
    assert (ours.problem, ours.fix) == (told.problem, told.fix.replace("collate_fn", "collate"))
    assert f"PROBLEM: {told.problem}\nTO MEND IT: {told.fix}" in str(told)


def test_samples_of_several_sizes_from_a_transform_are_found_before_training() -> None:
    told = summary(Digits(Compose(ToTensor(), Crop())))
    assert "sample 0 has [0] of shape (1, " in str(told.problem)


def test_a_collate_function_of_ones_own_is_named_when_it_fails_and_shown_when_it_does_not() -> None:
    def stack(samples: list[Any]) -> Any:
        return torch.stack(samples)

    data = Samples(torch.zeros(2), torch.zeros(3))
    assert str(summary(DataLoader(data, 2, collate_fn=stack)).problem).startswith(
        "2 samples could not be put together, by test_a_collate_function_of_ones_own_is_named_when_it_fails_and_shown_"
        "when_it_does_not.<locals>.stack: sample 0 has shape (2), sample 1 has shape (3)"
    )
    told = summary(DataLoader(data, 2, collate_fn=nn.utils.rnn.pad_sequence))
    assert told.problem is None
    assert told.steps[-2].parts == {"": "float32 (3, 2), all 0"}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (Samples(1, KeyError("3.jpg")), "dataset[1] raised KeyError: '3.jpg'"),
        (Digits(Compose(ToTensor(), ToTensor())),
         "transform, step 2 of 2, ToTensor(), raised TypeError for float32 (1, 28, 28), 0 to 0.9804: expected np"),
        (Samples(), "there is no sample to read"),
        (Loader(torch.zeros(3, 2), 2, drop_last=False, transform=lambda x: x.nothing),
         "the loader's transform, "),
    ],
)  # fmt: skip
def test_a_step_that_raises_is_named(data: Any, says: str) -> None:
    assert str(summary(data).problem).startswith(says)


def test_values_that_are_seldom_meant_are_noted() -> None:
    told = summary((np.array([[1.0, np.nan]]), torch.zeros(1)))
    assert told.notes == [
        "[0] is float64, and models are float32: convert it once, with .float() or astype('float32')",
        "[0] has values that are not finite; a loss computed from them is NaN",
    ]
    assert str(told).endswith("\n\nNo error found; 2 notes above.")


@pytest.mark.parametrize(
    ("make", "title"),
    [
        (list, "a list of 0 ready batches"),
        (lambda: lambda: iter(()), "a function that gives ready batches"),
    ],
)
def test_data_without_a_batch_is_a_problem(make: Callable[[], Any], title: str) -> None:
    told = summary(make())
    assert [step.title for step in told.steps] == [title]
    assert str(told).endswith(
        "\n\nPROBLEM: there is not one batch in it\nTO MEND IT: check the path, the filter or the split that the data "
        "comes from"
    )


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from torch.arange(6.0).view(3, 2)


def batches() -> Iterator[Any]:
    yield torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("make", "last", "epoch"),
    [
        (lambda: (np.zeros((70, 2), np.float32), np.arange(70)),
         {"[0]": "float32 (64, 2), all 0", "[1]": "int64 (64), 0 to 63"},
         "70 samples in 2 batches of at most 64, shuffled when trained on, read"),
        (lambda: DataLoader(TensorDataset(torch.ones(9)), 4, shuffle=True, drop_last=True),
         {"[0]": "float32 (4), all 1"},
         "8 samples in 2 batches of at most 4, shuffled, read in the training process; resumes exactly"),
        (lambda: [torch.zeros(4, 2)] * 3, {"": "float32 (4, 2), all 0"}, "12 samples in 3 batches, read"),
        (lambda: batches, {"": "float32 (4, 2), all 0"}, "an unknown number of batches, read"),
        (lambda: DataLoader(Stream(), 2), {"": "float32 (2, 2), 0 to 3"},
         "an unknown number of batches of at most 2, read"),
        (lambda: limit(Mix({"a": Samples(1, 2), "b": torch.zeros(3)}), batches=2), {"": "float32 (3), all 0"},
         "2 batches, "),
    ],
)  # fmt: skip
def test_every_kind_of_data_has_a_summary(make: Callable[[], Any], last: dict[str, str], epoch: str) -> None:
    told = summary(make())
    assert told.problem is None
    assert told.steps[-2].parts == last
    assert told.steps[-1].title.startswith(f"epoch: {epoch}")


def test_an_iterator_is_not_read() -> None:
    data = iter([1, 2])
    assert "can be read only once" in str(summary(data))
    assert list(data) == [1, 2]


def test_what_is_no_data_is_refused() -> None:
    with pytest.raises(DataError, match="cannot read batches from 3"):
        summary(3)


@pytest.mark.parametrize("sample", [{"x": np.ones(3, "f4"), "label": 1}, (torch.ones(3), torch.tensor(1))])
def test_a_list_of_samples_is_told_that_a_list_is_one_of_batches(sample: Any) -> None:
    (note,) = summary([sample] * 3).notes
    assert note == (
        "a list is one of ready batches, and the first looks like a single sample: of a list of samples make a "
        "dataset, torch.utils.data.Subset(samples, range(len(samples)))"
    )
    as_it_says = summary(torch.utils.data.Subset([sample] * 3, range(3)))
    assert (as_it_says.notes, as_it_says.problem, as_it_says.samples) == ([], None, 3)
    assert summary([(torch.ones(4, 3), torch.ones(4)), (torch.ones(2, 3), torch.ones(2))]).notes == []


def test_a_list_of_texts_and_a_sparse_tensor_are_told_and_raise_nothing() -> None:
    told = summary(["one", "two"])
    assert told.problem is not None
    assert told.problem.startswith("cannot tell how many samples this batch holds: str")
    assert "of a list of samples make a dataset" in told.notes[0]
    assert "sparse coo float32 (4, 4)" in str(summary((torch.eye(4).to_sparse_coo(), torch.arange(4))))
