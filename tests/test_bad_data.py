"""Data as newcomers give it: where it does not fit, the error leads to what to type."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import loopwright as lw
from loopwright.errors import DataError, LoopwrightWarning, NonFiniteError, StepOutputError
from tiny import classifier, samples, trainer

X, Y = samples(24)


def task_of(net: nn.Module | None = None, **more: Any) -> lw.Supervised:
    net = classifier() if net is None else net
    return lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1), **more)


def notes(task: lw.Task, data: Any, error: type[Exception], *, verb: str = "fit") -> str:
    with pytest.raises(error) as caught:
        getattr(trainer(epochs=1), verb)(task, data)
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


# -------------------------------------------------------------------------------------------------- what goes as what


@pytest.mark.parametrize("data", [[X, Y], [X.numpy(), Y.numpy()]])
def test_a_list_of_two_arrays_is_told_to_be_a_tuple(data: Any) -> None:
    assert "ready batches, and these are two arrays of one length; arrays go as a tuple: (X, y)" in notes(
        task_of(), data, DataError
    )


@pytest.mark.parametrize("data", [[torch.ones(4, 5), torch.ones(4, 5)], [torch.ones(4, 5), torch.ones(3, 5)]])
def test_a_list_of_two_batches_of_inputs_is_read(data: Any) -> None:
    assert trainer(epochs=1).run(lambda run, batch: None, data, state={}).progress.step == 2


@pytest.mark.parametrize("chosen", [{}, {"targets": "y"}, {"inputs": ["x"], "targets": "y"}])
def test_a_dict_of_arrays_names_inputs_and_targets(chosen: dict[str, Any]) -> None:
    told = notes(task_of(**chosen), {"x": X, "y": Y}, TypeError)
    assert (
        "Supervised(..., inputs='x', targets='y'); inputs='x' is passed by position, inputs=['x'] by its name" in told
    )
    run = trainer(epochs=1).fit(task_of(inputs="x", targets="y"), {"x": X, "y": Y})
    assert run.status == "done"


class Both(nn.Linear):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(left + right)


def test_a_dict_of_arrays_as_inputs_beside_the_targets_is_told_how_it_is_passed() -> None:
    data = ({"left": X, "right": X}, Y)
    assert (
        "the module was passed the dict {'left': ..., 'right': ...} as one argument; to pass what is in it by name, "
        "write Supervised(..., inputs=lambda batch: batch[0])"
    ) in notes(task_of(Both(5, 3)), data, TypeError)
    run = trainer(epochs=1).fit(task_of(Both(5, 3), inputs=lambda batch: batch[0]), data)
    assert run.status == "done"


def test_a_type_error_of_the_module_itself_is_left_alone() -> None:
    class Wrong(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise TypeError("no argument of mine")

    assert "Supervised(" not in notes(task_of(Wrong(5, 3)), (X, Y), TypeError)


@pytest.mark.parametrize("chosen", [{"targets": "target"}, {"inputs": ["mean radius"]}, {"inputs": "a", "targets": 1}])
def test_names_that_do_not_come_with_the_batch_are_told(chosen: dict[str, Any]) -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(np.ones((8, 3)), columns=["a", "mean radius", "target"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = notes(task_of(**chosen), frame, StepOutputError)
    assert "asks for a part by its name, and the batch float64[8, 3] has none" in told
    assert "of a data frame (frame.drop(columns=['y']), frame['y'])" in told


# --------------------------------------------------------------------------------------------------- dtypes and shapes


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ((X, Y.int()), "cross entropy takes classes as int64: y.long()"),
        ((X, Y.bool()), "cross entropy takes classes as int64: y.long()"),
        ((X, Y.float()), "For measured values take nn.MSELoss()"),
        ((X, Y.view(-1, 1)), "cross entropy takes one class for each sample, of shape [n]: y.squeeze(1)"),
        ((X.to(torch.uint8), Y), "images.float() / 255"),
        ((X.long(), Y), "other numbers as tensor.float()"),
        ((X.double(), Y), "floats of NumPy and Python are float64"),
    ],
)
def test_dtypes_and_shapes_that_torch_refuses_name_the_conversion(data: Any, said: str) -> None:
    assert said in notes(task_of(), data, RuntimeError)


def test_images_of_bytes_name_the_conversion() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten())
    assert "images.float() / 255" in notes(task_of(net), (torch.zeros(24, 1, 4, 4).byte(), Y), RuntimeError)


class OfTwoSizes(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        return torch.zeros(3, 4 + i % 2), 1


@pytest.mark.parametrize("kind", ["loader", "workers", "ours"])
def test_samples_of_two_sizes_name_the_summary(kind: str) -> None:
    data: Any = lw.Loader(OfTwoSizes(), 4)
    if kind != "ours":
        data = DataLoader(OfTwoSizes(), 4, num_workers=2 * (kind == "workers"))
    told = notes(task_of(), data, RuntimeError)
    assert told.count("print(lw.data.summary(data)) shows them") == 1


def test_what_is_not_finite_in_the_batch_itself_is_told_with_its_place() -> None:
    x = X.clone()
    x[3, 1] = x[5, 0] = torch.nan
    told = notes(task_of(), (x, Y), NonFiniteError)  # in an order that is drawn
    assert "the batch itself holds 2 values that are not finite in batch[0], the first at [" in told
    assert "lw.data.summary(data) counts them" in told
    net = classifier()
    nn.init.constant_(net[0].weight, torch.nan)
    assert "the batch itself" not in notes(task_of(net), (X, Y), NonFiniteError)


# ------------------------------------------------------------------------------------------------------ tables in pairs


def misaligned(data: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        lw.Loader(data, 4)
    return [str(one.message) for one in told if issubclass(one.category, LoopwrightWarning)]


def test_tables_whose_labels_stand_in_another_order_are_told() -> None:
    pd = pytest.importorskip("pandas")
    x, y = pd.DataFrame({"a": [0.0, 1.0, 2.0]}), pd.Series([0, 1, 2])
    assert misaligned((x, y)) == []
    assert misaligned((x, y.set_axis([7, 8, 9]))) == []  # labels of its own
    assert misaligned((x, y.iloc[::-1].reset_index(drop=True))) == []
    (told,) = misaligned((x, y.iloc[::-1]))
    assert told.startswith(
        "the rows of data[0] and data[1] are paired by their position, and their indices hold the same"
    )
    assert "y = y.loc[X.index]" in told
    assert len(misaligned({"x": x.iloc[[2, 0, 1]], "y": y})) == 1


# ---------------------------------------------------------------------------------------------------------- prediction


class Predicts(lw.Task):
    def __init__(self, returns: Any = None) -> None:
        super().__init__()
        self.net, self.returns = classifier(), returns


class Asked(Predicts):
    def predict_step(self, batch: Any) -> Any:
        return self.returns(batch)


class Forward(Predicts):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize(
    ("returns", "told"),
    [
        (lambda x: torch.zeros(2, len(x)), "float32[2, 3] for batch 2, and float32[2, 5] for batch 1"),
        (lambda x: {"y": torch.zeros(2, len(x))}, "float32[2, 3] as ['y'] for batch 2"),
        (lambda x: {"a" if len(x) > 3 else "b": x}, "{'b': float32[3, 5]} for batch 2, and {'a': float32[5, 5]}"),
        (list, "[float32[5], float32[5], float32[5]] for batch 2"),
        (lambda x: x if len(x) > 3 else None, "NoneType for batch 2, and float32[5, 5] for batch 1"),
    ],
)
def test_predictions_that_cannot_be_joined_name_the_batch(returns: Any, told: str) -> None:
    said = notes(Asked(returns), [X[:5], X[:3]], StepOutputError, verb="predict")
    assert f"predict_step returned {told}" in said
    assert "predict_step(self, batch)" in said


def test_arrays_are_kept_apart_as_the_error_says() -> None:
    kept = trainer().predict(Asked(lambda x: x.numpy(force=True)), [X[:5], X[:3]])
    assert [one.shape for one in kept] == [(5, 5), (3, 5)]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            Predicts,
            "Predicts.predict_step is the default one, which calls forward(batch), and Predicts has no forward.",
        ),
        (Forward, "Forward.predict_step is the default one, which calls forward(batch). Write your own"),
    ],
)
def test_a_default_prediction_that_cannot_take_a_batch_names_predict_step(kind: Any, told: str) -> None:
    said = notes(kind(), [(X, Y)], Exception, verb="predict")
    assert told in said
    assert "in predict, batch 1; batch: (float32[24, 5], int64[24])" in said
    assert trainer().predict(Forward(), [X]).shape == (24, 3)
