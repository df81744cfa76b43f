"""Bad input: a clear error with the fix and the place; the folder closed; type and traceback of the cause kept."""

from __future__ import annotations

import json
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import loopwright as lw
from loopwright.events import HOOKS
from tiny import acts, line, pairs, sgd_task, trainer

DATA = pairs([1.0, 1.0], [2.0, 2.0], [3.0])  # 3 batches: 2, 2 and 1 samples


def failure(
    folder: Path, task: Any, data: Any, valid: Any = None, **settings: Any
) -> tuple[BaseException, dict[str, Any]]:
    """What a fit raises, and the record that it leaves in its folder; no worker process outlives it."""
    user = trainer(**{"epochs": 2, "folder": folder, "name": "bad", "checkpoint": False, "capsule": False, **settings})
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - what it is, is asserted by the caller
        user.fit(task, data, valid)
    assert multiprocessing.active_children() == []
    (file,) = folder.glob("bad/*/run.json")
    return caught.value, json.loads(file.read_text(encoding="utf-8"))


def assert_failed(record: dict[str, Any], error: BaseException) -> None:
    assert record["status"] == "failed"
    told = {"type": type(error).__qualname__, "message": str(error)}
    assert record["error"] == told | ({"notes": error.__notes__} if hasattr(error, "__notes__") else {})
    assert "ended" in record


def functions(error: BaseException | None) -> list[str]:
    """Names of the functions in the traceback of ``error`` and of its causes."""
    found = []
    while error is not None:
        found += [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        error = error.__cause__
    return found


def notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


# ------------------------------------------------------------------------------------------------------- steps


def stepping(returns: Callable[[Tensor], Any]) -> lw.Task:
    class Own(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = line(1.0)

        def training_step(self, batch: Any) -> Any:
            return returns(self.net(batch[0]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Own()


WHERE = "[loopwright] after epoch 0, batch 0 of the open epoch, step 0; batch: (float32[2, 1], float32[2, 1])"
NO_LOSS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "nothing": (
        lambda preds: None,
        "step 'main' returned None; return the loss (a tensor), or a dict such as "
        '{"loss": loss, "preds": preds, "target": target}',
    ),
    "a dict without loss": (
        lambda preds: {"los": preds.mean(), "acc": 0.5},
        "step 'main' returned the keys ['acc', 'los']; a training step must return 'loss', a scalar tensor",
    ),
    "None as loss": (
        lambda preds: {"loss": None},
        "step 'main' returned a loss of type NoneType; return the tensor itself (without .item() or float()), so that "
        "gradients can be computed from it",
    ),
    "a number": (
        lambda preds: {"loss": preds.mean().item()},
        "step 'main' returned a loss of type float; return the tensor itself (without .item() or float()), so that "
        "gradients can be computed from it",
    ),
    "one loss a sample": (
        lambda preds: preds[:, 0],
        "step 'main' returned a loss of shape [2]; return a scalar, such as loss.mean()",
    ),
    "a detached loss": (
        lambda preds: preds.mean().detach(),
        "step 'main' returned a loss that depends on no trainable parameter; leave out .detach(), .item() and "
        "torch.no_grad() in the step, and check requires_grad of the parameters",
    ),
    "a complex number": (
        lambda preds: preds.mean().to(torch.complex64),
        "step 'main' returned a loss of torch.complex64; return a real one, such as loss.abs() or loss.real",
    ),
    "a value without a name": (
        lambda preds: {"loss": preds.mean(), 3: 1.0},
        "a step returned a dict with the key 3; name values by strings: '3'",
    ),
    "a tuple": (
        lambda preds: (preds.mean(), preds),
        "step 'main' returned (float32[], float32[2, 1]); return the loss (a tensor), or a dict such as "
        '{"loss": loss, "preds": preds, "target": target}',
    ),
}


@pytest.mark.parametrize("returned", NO_LOSS)
def test_a_step_without_a_usable_loss_is_told_what_to_return(returned: str, folder: Path) -> None:
    returns, message = NO_LOSS[returned]
    error, record = failure(folder, stepping(returns), DATA)
    assert type(error) is lw.StepOutputError
    assert str(error) == message
    assert notes(error) == [WHERE]
    assert_failed(record, error)


@pytest.mark.parametrize(
    ("hook", "returned", "message"),
    [
        ("map_output", [1.0], 'Acts.map_output returned [float]; return the loss (a tensor), or a dict such as '
         '{"loss": loss, "preds": preds, "target": target}'),
        ("map_output", {"los": 1.0}, "Acts.map_output returned the keys ['los']; a training step must return 'loss', "
         "a scalar tensor"),
        ("map_loss", 1.0, "step 'main' or Acts.map_loss returned a loss of type float; return the tensor itself "
         "(without .item() or float()), so that gradients can be computed from it"),
    ],
    ids=["a list", "no loss", "no tensor"],
)  # fmt: skip
def test_a_hook_that_returns_no_usable_loss_is_named(hook: str, returned: Any, message: str, folder: Path) -> None:
    error, record = failure(folder, sgd_task(line()), DATA, callbacks=[acts(**{hook: lambda *args: returned})])
    assert (type(error), str(error)) == (lw.StepOutputError, message)
    assert notes(error) == [WHERE]
    assert_failed(record, error)


def test_a_loss_that_reaches_no_parameter_of_the_optimizer_is_told_once() -> None:
    task, other = sgd_task(line()), line()
    task.loss = lambda preds, target: other(preds.detach()).mean()
    with pytest.warns(lw.LoopwrightWarning) as told:
        run = trainer(epochs=2).fit(task, pairs([1.0], [2.0]))
    assert [str(one.message) for one in told] == [
        "the first loss of phase 'main' gave no gradient to any parameter of its SGD, which moves nothing so: compute "
        "the loss from the very module whose parameters the optimizer has"
    ]
    assert run.progress.step == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_move(bad: float, folder: Path) -> None:
    net = line(1.0)
    task = sgd_task(net, loss=lambda preds, target: preds.mean() * (bad if preds.mean() < 0 else 1.0))
    error, record = failure(folder, task, pairs([3.0], [1.0], [1.0]))  # weight 1 -> -2: the second loss is bad
    assert type(error) is lw.NonFiniteError
    assert isinstance(error, FloatingPointError)
    assert str(error).startswith(
        f"phase 'main' has a loss of {-2.0 * bad:g} at step 2; gradients not finite: weight. The parameters are "
        f"those of "
        "before this step. "
    )
    assert net.weight.item() == -2.0
    place = "[loopwright] after epoch 0, batch 1 of the open epoch, step 1; batch: (float32[1, 1], float32[1, 1])"
    assert notes(error) == [place]
    assert_failed(record, error)
    assert record["progress"]["step"] == 1


def test_a_gradient_that_is_not_finite_is_named() -> None:
    net = line(0.0, bias=1.0)
    task = sgd_task(net, loss=lambda preds, target: (preds * 0).sqrt().mean())
    with pytest.raises(lw.NonFiniteError, match=r"has a loss of 0 at step 1; gradients not finite: weight, bias\. "):
        trainer(epochs=1).fit(task, DATA)


class Breaks(nn.Module):
    """A user's module with a bug that shows at the second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = line(), 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.inner(x) if self.calls == 2 else self.net(x)

    def inner(self, x: Tensor) -> Any:
        return x @ torch.ones(7, 3)


def test_an_error_in_the_module_keeps_its_type_and_traceback(folder: Path) -> None:
    error, record = failure(folder, sgd_task(Breaks()), DATA)
    assert type(error) is RuntimeError
    assert "mat1 and mat2 shapes cannot be multiplied (2x1 and 7x3)" in str(error)
    assert functions(error)[-1] == "inner"
    assert notes(error) == [
        "[loopwright] after epoch 0, batch 1 of the open epoch, step 1; batch: (float32[2, 1], float32[2, 1])"
    ]
    assert_failed(record, error)


def test_an_error_in_a_validation_step_says_where(folder: Path) -> None:
    def loss(preds: Tensor, target: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            raise LookupError("no labels here")
        return preds.mean()

    task = sgd_task(line(), loss=loss)
    error, record = failure(folder, task, DATA, DATA)
    assert type(error) is LookupError
    assert functions(error)[-1] == "loss"
    assert notes(error) == [
        "[loopwright] in valid, batch 1; batch: (float32[2, 1], float32[2, 1])",
        "[loopwright] after epoch 1, batch 0 of the open epoch, step 3",
    ]
    assert task.module.training
    assert torch.is_grad_enabled()
    assert_failed(record, error)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_an_error_in_a_look_at_a_model_says_at_which_batch(verb: str) -> None:
    net = line()
    net.register_forward_pre_hook(lambda module, args: 1 / 0 if len(args[0]) == 1 else None)
    with pytest.raises(ZeroDivisionError) as caught:
        getattr(trainer(), verb)(sgd_task(net), DATA)
    kind = {"validate": "valid"}.get(verb, verb)
    assert notes(caught.value) == [f"[loopwright] in {kind}, batch 3; batch: (float32[1, 1], float32[1, 1])"]


# -------------------------------------------------------------------------------------------------------- data


def used_up() -> Iterator[Any]:
    spent = iter(DATA)
    list(spent)
    return spent


class Empty(Dataset[Any]):
    def __len__(self) -> int:
        return 0

    def __getitem__(self, i: int) -> Any:
        raise IndexError


NO_DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "an empty list": (list, "there is not one batch in the data ([]): it is empty. Check the path, the filter or the "
                            "split "
                            "that it comes from"),
    "an empty dataset": (lambda: DataLoader(Empty()), "there is not one batch in the data (DataLoader): it is empty. "
                                                      "Check "
                         "the path, the filter or the split that it comes from"),
    "drop_last of too few": (lambda: DataLoader(torch.zeros(3, 1), 8, drop_last=True),
                             "there is not one batch in the data (DataLoader): drop_last=True leaves nothing of 3 "
                             "samples "
                             "in batches of 8. Use drop_last=False or a batch_size of at most 3"),
    "None": (lambda: None, "cannot read batches from None; expected a DataLoader, a dataset, arrays (a tensor, NumPy "
                           "array "
             "or data frame, or a tuple or dict of them), a list of batches, or a generator function of batches"),
    "a path": (lambda: "data/train", "cannot read batches from 'data/train'; expected a DataLoader, a dataset, "
                                     "arrays (a "
               "tensor, NumPy array or data frame, or a tuple or dict of them), a list of batches, or a generator "
               "function "
               "of batches"),
}  # fmt: skip


@pytest.mark.parametrize("data", NO_DATA)
def test_data_without_a_batch_is_refused_before_anything_is_written(data: str, folder: Path) -> None:
    made, message = NO_DATA[data]
    with pytest.raises(lw.DataError) as caught:
        trainer(epochs=1, folder=folder).fit(sgd_task(line()), made())
    assert str(caught.value) == message
    assert not folder.exists()


@pytest.mark.parametrize(
    ("valid", "named"),
    [([], "the validation data: "), ({"near": DATA, "far": []}, "the validation data: the data 'far': ")],
)
def test_data_without_a_batch_to_validate_on_is_not_taken_for_that_of_training(valid: Any, named: str) -> None:
    with pytest.raises(lw.DataError) as caught:
        trainer(epochs=1).fit(sgd_task(line()), DATA, valid)
    assert str(caught.value).startswith(f"{named}there is not one batch in the data ([]): it is empty.")


def test_an_iterator_that_is_used_up_is_named(folder: Path) -> None:
    error, record = failure(folder, sgd_task(line()), used_up(), epochs=1)
    assert type(error) is lw.DataError
    assert str(error) == (
        "epoch 1 of stage 'main' had no batch to train on. If the data is an iterator, it is used up: pass a list, a "
        "DataLoader or a generator function instead"
    )
    assert_failed(record, error)


def test_an_iterator_that_would_be_read_again_is_refused_before_anything_is_written(folder: Path) -> None:
    with pytest.raises(lw.LoopwrightError, match=r"an iterator \(list_iterator\), .* this run reads it again"):
        trainer(epochs=2, folder=folder).fit(sgd_task(line()), iter(DATA))
    assert not folder.exists()


def test_an_iterator_lasts_for_one_epoch(folder: Path) -> None:
    """Of a number of steps it is not known before: an iterator may have no end."""
    error, record = failure(folder, sgd_task(line()), iter(DATA), epochs=None, steps=7)
    assert type(error) is lw.DataError
    assert str(error) == (
        "the iterator list_iterator was used up in an earlier epoch. Pass a list of batches, or a generator function "
        "(the "
        "function itself, not its result), which can be started anew each epoch"
    )
    assert notes(error) == ["[loopwright] after epoch 1, batch 0 of the open epoch, step 3"]
    assert record["progress"]["epoch"] == 1
    assert_failed(record, error)


def test_validation_data_without_a_batch_is_named(folder: Path) -> None:
    error, record = failure(folder, sgd_task(line()), DATA, used_up(), epochs=1)
    assert type(error) is lw.DataError
    assert str(error) == (
        "the valid data gave no batch. If it is an iterator, it is used up: pass a list or a DataLoader"
    )
    assert_failed(record, error)


class Damaged(Dataset[Any]):
    """Item 17 cannot be read."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.read(i)

    def read(self, i: int) -> tuple[Tensor, Tensor]:
        if i == 17:
            raise OSError(f"image {i} is torn")
        return torch.full((1,), 1.0), torch.zeros(1)


READERS: dict[str, Callable[[], Any]] = {
    "DataLoader": lambda: DataLoader(Damaged(), 5),
    "DataLoader with workers": lambda: DataLoader(Damaged(), 5, num_workers=2),
    "Loader": lambda: lw.Loader(Damaged(), 5),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_dataset_that_raises_at_item_17_is_told_with_the_item(reader: str, folder: Path) -> None:
    error, record = failure(folder, sgd_task(line()), READERS[reader]())
    assert type(error) is OSError
    assert "image 17 is torn" in str(error)
    assert "read" in functions(error) or "in read\n" in str(error)  # a worker sends its traceback as text
    assert notes(error)[0].startswith(
        "[loopwright] while fetching batch 4 of epoch 1, dataset indices [15, 16, 17, 18, 19]; "
    )
    assert notes(error)[0].endswith("it was dataset[17] that raised")
    assert notes(error)[-1] == "[loopwright] after epoch 0, batch 3 of the open epoch, step 3"
    assert record["progress"]["step"] == 3
    assert record["error"]["type"] == "OSError"
    assert record["status"] == "failed"


def test_a_generator_that_raises_keeps_its_traceback(folder: Path) -> None:
    def batches() -> Iterator[Any]:
        yield DATA[0]
        raise OSError("the stream broke")

    error, record = failure(folder, sgd_task(line()), batches)
    assert type(error) is OSError
    assert functions(error)[-1] == "batches"
    assert notes(error)[0] == "[loopwright] while fetching batch 2 of epoch 1"
    assert_failed(record, error)


class Stuck:
    """A part of a batch that cannot be moved."""

    def to(self, device: Any, **options: Any) -> Any:
        raise NotImplementedError("pinned to this host")


def test_a_batch_that_cannot_be_moved_is_told_with_its_part(folder: Path) -> None:
    data = [({"x": torch.ones(2, 1), "extra": [Stuck()]}, torch.zeros(2, 1))]
    task = lw.Supervised(line(), nn.MSELoss(), lambda params: torch.optim.SGD(params, lr=0.1))
    error, record = failure(folder, task, data, device="meta")  # a device that batches are moved to
    assert type(error) is lw.DataError
    assert str(error) == (
        "batch[0]['extra'][0] (Stuck) cannot be moved to meta: pinned to this host. Return tensors, or objects whose "
        ".to(device) works, from the dataset or its collate_fn"
    )
    assert type(error.__cause__) is NotImplementedError
    assert functions(error)[-1] == "to"
    assert_failed(record, error)


def test_a_batch_without_samples_asks_for_their_number(folder: Path) -> None:
    error, record = failure(folder, stepping(lambda preds: preds.mean()), [[torch.tensor(1.0)]])
    assert type(error) is lw.DataError
    assert str(error) == (
        "cannot tell how many samples this batch holds: [float32[]] has no tensor with a first dimension. Pass "
        "weight=..., a function of the batch that returns the number"
    )
    assert_failed(record, error)


def test_a_batch_that_does_not_fit_the_module_is_shown(folder: Path) -> None:
    error, _ = failure(folder, sgd_task(line()), [{"x": torch.ones(2, 1), "y": torch.zeros(2, 1)}])
    assert type(error) is TypeError
    assert notes(error) == [
        "[loopwright] after epoch 0, batch 0 of the open epoch, step 0; "
        "batch: {'x': float32[2, 1], 'y': float32[2, 1]}",
        "[loopwright] the module was called with the names 'x', 'y', as a dict of arrays gives them. Say which is the "
        "input and which the target: Supervised(..., inputs='x', targets='y'); inputs='x' is passed by position, "
        "inputs=['x'] by its name",
    ]


def test_doubles_for_a_module_of_floats_are_told_both_ways_out(folder: Path) -> None:
    batch = torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    error, _ = failure(folder, sgd_task(line()), [batch])
    assert type(error) is RuntimeError
    assert notes(error)[-1] == (
        "[loopwright] floats of NumPy and Python are float64, weights as a rule float32: give the data as "
        "array.astype('float32') or tensor.float(), or train in doubles with Trainer(precision='fp64')"
    )


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_doubles_in_a_look_at_a_model_are_told_both_ways_out_too(verb: str) -> None:
    batch = torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError) as caught:
        getattr(trainer(), verb)(sgd_task(line()), [batch])
    assert [note[:53] for note in notes(caught.value)][-1] == "[loopwright] floats of NumPy and Python are float64, "


Y = torch.zeros(6, dtype=torch.int64)
FLOATS = "this loss takes targets as floats: y.float(), array.astype('float32') or frame['y'].astype('float32')"


def supervised(net: nn.Module, loss: Any = None) -> lw.Task:
    return lw.Supervised(net, loss or nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1))


class Tiny(lw.Task):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.kept = nn.Linear(1, 2), torch.zeros(())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class GoesBack(Tiny):
    def training_step(self, batch: Any) -> Any:
        loss = self.net(batch[0]).square().mean()
        loss.backward()
        return loss


class Keeps(Tiny):
    def training_step(self, batch: Any) -> Any:
        self.kept = self.net(batch[0]).square().mean() + self.kept
        return self.kept


class Logs(Tiny):
    def training_step(self, batch: Any) -> Any:
        loss = self.net(batch[0]).square().mean()
        self.log("mine", loss)  # type: ignore[operator]
        return loss


TWICE = (
    "the loop goes backward from the loss that a step returns: leave loss.backward() out of the step; and what is kept "
    "from one step to the next, such as a hidden state, is kept without its graph: h.detach()"
)
TWO = "the module gives 2 outputs, for the classes 0 to 1, and the batch has targets from "
USUAL: dict[str, tuple[Callable[[], lw.Task], Any, str]] = {
    "classes from 1": (lambda: supervised(nn.Linear(1, 2)), Y + torch.tensor([1, 2, 1, 1, 1, 1]),
                       f"{TWO}1 to 2: where they are counted from 1 write y - 1, else give the module 3 outputs"),
    "classes of -1 and 1": (lambda: supervised(nn.Linear(1, 2)), Y - 1,
                            f"{TWO}-1 to -1: for yes or no write (y > 0).long(); "
                            "nn.CrossEntropyLoss(ignore_index=-1) leaves those without a class out"),
    "more classes": (lambda: supervised(nn.Linear(1, 2), nn.CrossEntropyLoss(ignore_index=-1)),
                     torch.tensor([0, -1, 5, 0, 0, 0]), f"{TWO}0 to 5: give the module 6 outputs"),
    "whole numbers for yes or no": (lambda: supervised(nn.Sequential(nn.Linear(1, 1), nn.Flatten(0)),
                                                       nn.BCEWithLogitsLoss()), Y, FLOATS),
    "whole numbers for probabilities": (lambda: supervised(nn.Sequential(nn.Linear(1, 1), nn.Sigmoid(), nn.Flatten(0)),
                                                           nn.BCELoss()), Y, FLOATS),
    "a step that goes backward": (GoesBack, Y, TWICE),
    "a step that keeps a graph": (Keeps, Y, TWICE),
    "a step that logs": (Logs, Y, "a task has no log: return values by their names with the loss, {'loss': loss, "
                                  "'accuracy': accuracy}; callbacks and handlers write run.log({'name': value})"),
    "batches of three": (lambda: supervised(nn.Linear(1, 2)), (Y, Y),
                         "of a batch of 3 parts the module was passed the first 2, and the last is the target. Say "
                         "which is which: Supervised(..., inputs=0, targets=1); inputs=[0, 1] passes two"),
    "images without a channel": (lambda: supervised(nn.Conv1d(1, 2, 1)), Y,
                                 "Conv1d was given [5, 1], which has no dimension for the channel: "
                                 "images.unsqueeze(1) or array[:, None] adds it"),
    "a last batch of one": (lambda: supervised(nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))), Y,
                            "the batch has one sample, and BatchNorm needs two or more to train: leave the short last "
                            "batch out, lw.Loader(data, batch_size=32, drop_last=True) or DataLoader(..., "
                            "drop_last=True), or choose a batch_size that leaves none of one"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", USUAL)
def test_an_error_of_torch_with_a_usual_cause_says_what_to_type(mistake: str) -> None:
    """The error itself stays as torch raised it."""
    make, given, told = USUAL[mistake]
    data = (torch.ones(6, 1), *(given if isinstance(given, tuple) else (given,)))
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever torch raises
        trainer(epochs=1).fit(make(), lw.Loader(data, 5))
    assert not isinstance(caught.value, lw.LoopwrightError)
    assert [one for one in notes(caught.value) if "open epoch" not in one] == [f"[loopwright] {told}"]


class Inner(nn.Linear):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(a, b)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: supervised(nn.Conv1d(1, 2, 1)), (torch.ones(6, 3, 4), Y)),  # three channels
        (lambda: supervised(Inner(1, 2)), (torch.ones(6, 1), Y, Y)),
    ],
)  # fmt: skip
def test_an_error_with_another_cause_is_told_no_more_of(make: Any, data: Any) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        trainer(epochs=1).fit(make(), lw.Loader(data, 5))
    assert ["open epoch" in one for one in notes(caught.value)] == [True]


def test_going_backward_twice_in_a_step_of_ones_own_is_told_no_more_of() -> None:
    net = line()

    def step(run: lw.Run, batch: Any) -> None:
        loss = net(torch.ones(1, 1)).square().sum()
        loss.backward()
        loss.backward()

    with pytest.raises(RuntimeError, match="second time") as caught:
        trainer(epochs=1).run(step, [1], state={"net": net})
    assert ["open epoch" in one for one in notes(caught.value)] == [True]


@pytest.mark.parametrize("weight", [None, "many", -1, float("nan"), float("inf"), torch.ones(2)])
def test_a_weight_that_is_no_number_of_samples_is_told(weight: Any) -> None:
    with pytest.raises(lw.DataError) as caught:
        trainer(epochs=1).fit(sgd_task(line()), DATA, weight=lambda batch: weight)
    assert str(caught.value) == (
        f"weight(batch) returned {weight!r}; return how many samples or tokens the batch has: a number from 0"
    )
    assert notes(caught.value) == [WHERE]


def test_a_weight_that_fails_keeps_its_error() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        trainer(epochs=1).fit(sgd_task(line()), DATA, weight=lambda batch: 1 / 0)
    assert functions(caught.value)[-1] == "<lambda>"


RETURNED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "a tuple of 3": (
        lambda task: (torch.optim.SGD(task.parameters(), lr=0.1), None, None),
        "configure_optimizers returned a tuple of 3; return an optimizer, (optimizer, schedule), or a dict of a name "
        'to either, such as {"body": optimizer, "head": (optimizer, schedule)}',
    ),
    "a name that is a number": (
        lambda task: {0: torch.optim.SGD(task.parameters(), lr=0.1)},
        "configure_optimizers returned the name 0; return an optimizer, (optimizer, schedule), or a dict of a name "
        'to either, such as {"body": optimizer, "head": (optimizer, schedule)}',
    ),
    "a list": (
        lambda task: [torch.optim.SGD(task.parameters(), lr=0.1)],
        "the optimizer 'main' is a list; pass a torch optimizer such as torch.optim.AdamW(net.parameters(), lr=1e-3), "
        "or a factory: lambda params: torch.optim.AdamW(params, lr=1e-3)",
    ),
    "a factory for what is frozen": (
        lambda task: task.requires_grad_(False) and torch.optim.SGD,
        "the factory of optimizer 'main' has nothing to move: no parameter of Own is trainable. Add the module that is "
        "to be trained to the task, or set requires_grad_(True) on its parameters",
    ),
    "a schedule that is none": (
        lambda task: (torch.optim.SGD(task.parameters(), lr=0.1), lambda optimizer: None),
        "the factory schedule=... returned None; it must return what it makes of the optimizer",
    ),
}


@pytest.mark.parametrize("returned", RETURNED)
def test_what_is_no_optimizer_is_told_with_what_to_return(returned: str) -> None:
    made, problem = RETURNED[returned]
    task = stepping(lambda preds: preds.mean())
    task.configure_optimizers = lambda: made(task)  # type: ignore[method-assign]
    with pytest.raises(lw.SettingError) as caught:
        trainer(epochs=1).fit(task, DATA)
    assert str(caught.value) == problem


def test_an_unknown_argument_of_an_event_names_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"evry=3: there is no such argument.* Did you mean 'every'\?"):
        lw.Event.STEP_END(evry=3)  # type: ignore[call-arg]


# ----------------------------------------------------------------------------------------------------- metrics


def test_a_metric_with_the_wrong_shapes_is_named_with_them(folder: Path) -> None:
    class Same(lw.metrics.Accuracy):
        def update(self, preds: Tensor, target: Tensor) -> None:
            assert_same(preds, target)

    def assert_same(preds: Tensor, target: Tensor) -> None:
        raise ValueError("shapes differ")

    task = sgd_task(line(), metrics={"same": Same()})
    error, record = failure(folder, task, DATA)
    assert type(error) is ValueError
    assert functions(error)[-1] == "assert_same"
    assert "[loopwright] in metric 'same', given preds: float32[2, 1], target: float32[2, 1]" in notes(error)
    assert WHERE in notes(error)
    assert_failed(record, error)


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        (lw.metrics.MSE(), "do not fit: these are scores of 2 classes and class indices; take lw.metrics.Accuracy()"),
        (lw.metrics.Accuracy(top_k=3), ": 2 classes are fewer than top_k=3; write top_k=1 or less"),
    ],
    ids=["MSE", "top_k"],
)
def test_a_metric_that_does_not_fit_the_outputs_ends_with_what_to_type(metric: Any, told: str, folder: Path) -> None:
    net = nn.Linear(1, 2)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1), metrics={"bad": metric})
    error, record = failure(folder, task, [(torch.ones(2, 1), torch.zeros(2, dtype=torch.long))])
    assert type(error) is lw.MetricError
    assert str(error) == f"preds float32[2, 2] and target int64[2]{' ' * told.startswith('do')}{told}"
    assert notes(error)[0] == "[loopwright] in metric 'bad', given preds: float32[2, 2], target: int64[2]"
    assert notes(error)[1].endswith("step 0; batch: (float32[2, 1], int64[2])")
    assert_failed(record, error)


def test_a_metric_without_its_input_says_what_to_return(folder: Path) -> None:
    task = stepping(lambda preds: {"loss": preds.mean(), "preds": preds})
    task.configure_metrics = lambda: {"acc": lw.metrics.Accuracy()}  # type: ignore[method-assign]
    error, record = failure(folder, task, DATA)
    assert type(error) is lw.MetricError
    assert str(error).startswith(
        "metric 'acc' reads 'preds' and 'target' of what the step returns, which has no 'target'."
    )
    assert_failed(record, error)


# --------------------------------------------------------------------------------------------------- callbacks

FITTING = [name for name in HOOKS if "test" not in name and "predict" not in name and name != "on_exception"]
OF_STEP = ["on_step_start", "on_grads_ready", "on_step_end"]  # the batch of the step is known
WITH_BATCH = [name for name in FITTING if "batch" in name or name in ("map_output", "map_loss", "on_backward_end")]


class Fails(lw.Callback):
    """Raises in one hook, from a function of its own."""

    def __init__(self, hook: str, error: BaseException) -> None:
        self.hook, self.error, self.told = hook, error, list[BaseException]()

    def happen(self, hook: str) -> None:
        if hook == self.hook:
            raise self.error


def failing(hook: str) -> Callable[..., Any]:
    def called(self: Fails, run: lw.Run, *args: Any) -> Any:
        self.happen(hook)
        return args[0] if hook.startswith("map_") else None

    return called


for name in HOOKS:
    setattr(Fails, name, failing(name))


class UsersError(Exception):
    """An error of the user's own."""


@pytest.mark.parametrize("hook", FITTING)
def test_a_callback_that_raises_in_any_hook_is_named_with_the_place(hook: str, folder: Path) -> None:
    told: list[BaseException] = []
    callbacks = [Fails(hook, UsersError("oh")), acts(on_exception=lambda run, error: told.append(error))]
    error, record = failure(
        folder, sgd_task(line()), DATA, DATA, callbacks=callbacks, checkpoint=lw.Checkpoint("1 step"), validate_every=2
    )
    assert type(error) is UsersError
    assert str(error) == "oh"
    assert functions(error)[-2:] == ["called", "happen"]
    note, *more = notes(error)
    batch = "[loopwright] in valid, batch 1; batch: (float32[2, 1], float32[2, 1])"
    assert more == ([batch] if hook in ("on_eval_batch_start", "on_eval_batch_end") else [])
    assert note.startswith(f"[loopwright] in Fails.{hook}, after epoch ")
    assert note.endswith("; batch: (float32[2, 1], float32[2, 1])") == (hook in WITH_BATCH or hook in OF_STEP)
    assert told == [error]
    assert_failed(record, error)


@pytest.mark.parametrize("hook", ["on_test_start", "on_eval_batch_start", "on_eval_batch_end", "on_test_end",
                                  "on_predict_start", "on_predict_batch_start", "on_predict_batch_end",
                                  "on_predict_end"])  # fmt: skip
def test_a_callback_that_raises_in_a_test_or_a_prediction_is_named(hook: str) -> None:
    net = line()
    user = trainer(callbacks=[Fails(hook, UsersError("oh"))])
    with pytest.raises(UsersError) as caught:
        (user.predict if "predict" in hook else user.test)(sgd_task(net), DATA)
    assert notes(caught.value)[0].startswith(f"[loopwright] in Fails.{hook}, after epoch 0, ")
    assert net.training
    assert torch.is_grad_enabled()


def test_a_callback_that_raises_in_on_exception_does_not_hide_the_error(folder: Path) -> None:
    told: list[str] = []
    callbacks = [
        acts(on_exception=lambda run, error: told.append(f"first {error}")),
        Fails("on_exception", KeyError("second")),
        acts(on_exception=lambda run, error: told.append(f"last {error}")),
        Fails("on_step_end", UsersError("oh")),
    ]
    error, record = failure(folder, sgd_task(line()), DATA, callbacks=callbacks)
    assert type(error) is UsersError
    assert told == ["first oh", "last oh"]
    assert notes(error) == [
        "[loopwright] in Fails.on_step_end, after epoch 0, batch 1 of the open epoch, step 1; batch: "
        "(float32[2, 1], float32[2, 1])",
        "[loopwright] Fails.on_exception failed as well: KeyError('second')",
    ]
    assert_failed(record, error)


@pytest.mark.parametrize("hook", [name for name in FITTING if name.startswith("on_")])
def test_a_callback_that_returns_a_value_is_told_what_to_override(hook: str, folder: Path) -> None:
    error, record = failure(
        folder, sgd_task(line()), DATA, DATA, callbacks=[acts(**{hook: lambda run, *args: "done"})],
        checkpoint=lw.Checkpoint("1 step"),
    )  # fmt: skip
    assert type(error) is lw.HookError
    assert str(error) == (
        f"Acts.{hook} returned 'done'; on_* hooks observe and must return None. To change a value, override map_batch, "
        "map_output or map_loss and return the new one there"
    )
    assert notes(error)[0].startswith(f"[loopwright] in Acts.{hook}, after epoch ")
    assert_failed(record, error)


def test_a_method_that_serves_two_hooks_is_named_by_the_one_that_was_called() -> None:
    class Both(lw.Callback):
        def on_epoch_start(self, run: lw.Run) -> None:
            if run.progress.epoch:
                raise UsersError

        on_epoch_end = on_epoch_start

    class Derived(Both):
        pass

    with pytest.raises(UsersError) as caught:
        trainer(epochs=1, callbacks=[Derived()]).fit(sgd_task(line()), DATA)
    place = "after epoch 1, batch 0 of the open epoch, step 3"
    assert notes(caught.value) == [f"[loopwright] in {Derived.__qualname__}.on_epoch_end, {place}"]


def test_a_hook_made_by_partialmethod_is_named_too() -> None:
    class Counts(lw.Callback):
        def at(self, name: str, run: lw.Run) -> None:
            raise UsersError

        on_epoch_end = partialmethod(at, "epoch")

    with pytest.raises(UsersError) as caught:
        trainer(epochs=1, callbacks=[Counts()]).fit(sgd_task(line()), DATA)
    assert notes(caught.value)[0].startswith(f"[loopwright] in {Counts.__qualname__}.on_epoch_end, after ")


def test_a_handler_that_raises_is_named_with_its_event() -> None:
    user = trainer(epochs=1)

    @user.on(lw.Event.STEP_END(once=2))
    def look(run: lw.Run) -> None:
        raise UsersError("oh")

    with pytest.raises(UsersError) as caught:
        user.fit(sgd_task(line()), DATA)
    assert functions(caught.value)[-1] == "look"
    assert notes(caught.value) == [
        f"[loopwright] in {look.__qualname__}, at STEP_END(once=2), after epoch 0, batch 2 of the open epoch, step 2; "
        "batch: (float32[2, 1], float32[2, 1])"
    ]


STEERING: dict[type[Exception], list[str]] = {
    lw.SkipBatch: ["on_step_start", "on_grads_ready", "on_step_end", "on_epoch_end", "on_validation_end"],
    lw.SkipStep: ["on_step_end", "on_fit_start", "on_epoch_start", "on_validation_start"],
    lw.StopEpoch: ["on_fit_start", "on_epoch_start", "on_epoch_end", "on_eval_batch_end", "on_fit_end"],
}


@pytest.mark.parametrize(("kind", "hook"), [(kind, hook) for kind, hooks in STEERING.items() for hook in hooks])
def test_an_exception_that_steers_the_loop_from_the_wrong_hook_is_explained(kind: type[Exception], hook: str) -> None:
    with pytest.raises(lw.HookError) as caught:
        trainer(epochs=1, callbacks=[Fails(hook, kind())]).fit(sgd_task(line()), DATA, DATA)
    assert str(caught.value).startswith(f"Fails.{hook} raised {kind.__name__}, which steers the loop only from ")
    assert str(caught.value).endswith(". Raise it there, or stop training with run.request_stop(reason)")
    assert type(caught.value.__cause__) is kind


# ------------------------------------------------------------------------------------------------- afterwards


def test_a_failed_fit_can_be_gone_on_with(folder: Path) -> None:
    """The step that failed has not happened: after the repair, training goes on with the next batch."""
    net = line()
    broken = Breaks()
    broken.net = net
    task = sgd_task(broken)
    user = trainer(epochs=1)
    with pytest.raises(RuntimeError):
        user.fit(task, DATA)
    run = user.fit(task, DATA)
    assert run.status == "done"
    assert run.progress[:4] == (1, 1, 0, 3)
    assert net.weight.item() == -1.0 - 2.0 - 3.0


def test_the_session_is_put_back_after_an_error() -> None:
    net = nn.Sequential(line(), line())
    net[0].requires_grad_(False)
    stages = [lw.Stage("a", "1 epoch", train="module.0.*")]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    task = lw.Supervised(net, nn.MSELoss(), optimizer)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(UsersError):
            trainer(deterministic=True, callbacks=[Fails("on_step_end", UsersError())]).fit(task, DATA, stages=stages)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(True)
    assert [p.requires_grad for p in net.parameters()] == [False, True]
