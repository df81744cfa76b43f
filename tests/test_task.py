"""How a user says what to train: plain modules with Supervised, research code as a Task, functions."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

import loopwright as lw
from loopwright.errors import LoopwrightWarning
from loopwright.task import StepTask, pick_loss
from tiny import Batches, classifier, line, pairs, same, samples, sgd_task, trainer

X = torch.tensor([[1.0], [2.0]])
Y = torch.tensor([[3.0], [4.0]])
W = torch.tensor([[10.0], [20.0]])


class Seen(nn.Module):
    """Remembers what it is called with, and returns its first argument times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.args, self.kwargs = args, kwargs
        first: Tensor = (*args, *kwargs.values())[0]
        return first * self.weight


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class OwnBatch:
    """A batch of a class of the user's own."""

    shape = (2,)

    def __init__(self) -> None:
        self.inputs, self.labels = X, Y


# --------------------------------------------------------------------------------------------------- batch selection

SELECTIONS: dict[str, tuple[Any, dict[str, Any], tuple[Any, ...], dict[str, Any], Any]] = {
    "pair": ((X, Y), {}, (X,), {}, Y),
    "list, as a DataLoader gives": ([X, Y], {}, (X,), {}, Y),
    "named tuple": (Pair(X, Y), {}, (X,), {}, Y),
    "several inputs": ((X, W, Y), {}, (X, W), {}, Y),
    "by position": ((Y, X), {"inputs": 1, "targets": 0}, (X,), {}, Y),
    "by positions": ((Y, W, X), {"inputs": [2, 1], "targets": 0}, (X, W), {}, Y),
    "by negative position": ((X, W, Y), {"inputs": 0, "targets": -1}, (X,), {}, Y),
    "by key": ({"x": X, "y": Y}, {"inputs": "x", "targets": "y"}, (X,), {}, Y),
    "by keys, as keywords": ({"a": X, "b": W, "c": Y}, {"inputs": ["a", "b"], "targets": "c"}, (), {"a": X, "b": W}, Y),
    "by function": (
        OwnBatch(), {"inputs": lambda batch: batch.inputs, "targets": lambda batch: batch.labels}, (X,), {}, Y,
    ),
    "by function, several": ((X, W, Y), {"inputs": lambda batch: (batch[1], batch[0])}, (W, X), {}, Y),
    "by function, keywords": ((X, W, Y), {"inputs": lambda batch: {"x": batch[0]}}, (), {"x": X}, Y),
    "inputs alone, target last": ((X, W, Y), {"inputs": 1}, (W,), {}, Y),
    "inputs alone, target by its name": ({"x": X, "target": Y}, {"inputs": "x"}, (X,), {}, Y),
    "an autoencoder": (X, {"targets": lambda batch: batch}, (X,), {}, X),
    "an autoencoder over tuples": ((X,), {"targets": 0}, (X,), {}, X),
    "a dict as keywords": ({"x": X, "labels": Y}, {}, (), {"x": X, "labels": Y}, Y),
}  # fmt: skip


@pytest.mark.parametrize("selection", SELECTIONS)
def test_inputs_and_targets_are_chosen_by_place_key_position_or_function(selection: str) -> None:
    batch, settings, args, kwargs, target = SELECTIONS[selection]
    net, losses = Seen(), []

    def loss(preds: Tensor, given: Tensor) -> Tensor:
        losses.append((preds, given))
        return mse_loss(preds, given)

    task = lw.Supervised(net, loss, torch.optim.SGD(net.parameters(), lr=0.0), **settings)
    output = task.training_step(batch)
    assert same(list(net.args), list(args))
    assert same(net.kwargs, kwargs)
    assert losses[0][1] is target is output["target"]
    assert output["preds"] is losses[0][0]
    if not isinstance(batch, OwnBatch):
        run = trainer(epochs=1).fit(task, [batch])
        assert run.metrics["train/loss"] == output["loss"].item()


@pytest.mark.parametrize(
    ("batch", "settings", "message"),
    [
        ({"x": X, "y": Y}, {"inputs": "z", "targets": "y"},
         "inputs='z' is not in the batch {'x': float32[2, 1], 'y': float32[2, 1]}. Known: 'x', 'y'."),
        ({"img": X, "label": Y}, {"inputs": "img", "targets": "lable"},
         "targets='lable' is not in the batch {'img': float32[2, 1], 'label': float32[2, 1]}. Known: 'img', 'label'. "
         "Did you mean 'label'?"),
        ((X, Y), {"inputs": 2}, "inputs=2 is not in the batch (float32[2, 1], float32[2, 1]). Known: '0', '1'."),
        (X, {}, "a batch float32[2, 1] has no target; Supervised expects (input, target). Choose with inputs= and "
                "targets=, such as targets=lambda batch: batch for an autoencoder. A list is ready batches; "
                "arrays go as a tuple: (X, y)"),
        ((X,), {}, "a batch (float32[2, 1]) has no target; Supervised expects (input, target). Choose with inputs= and "
                   "targets=, such as targets=lambda batch: batch for an autoencoder. A list is ready batches; "
                "arrays go as a tuple: (X, y)"),
    ],
)  # fmt: skip
def test_a_batch_without_what_was_chosen_is_shown(batch: Any, settings: dict[str, Any], message: str) -> None:
    task = lw.Supervised(Seen(), nn.MSELoss(), **settings)
    with pytest.raises(lw.StepOutputError) as caught:
        task.training_step(batch)
    assert str(caught.value) == message


def test_predictions_need_no_targets() -> None:
    task = lw.Supervised(line(2.0), nn.MSELoss())
    for data in ([X, X], [(X, Y), (X, Y)], TensorDataset(torch.cat([X, X])), torch.cat([X, X])):
        assert torch.equal(trainer().predict(task, data), torch.cat([X, X]) * 2)
    by_key = lw.Supervised(line(2.0), nn.MSELoss(), inputs="x", targets="y")
    assert torch.equal(trainer().predict(by_key, [{"x": X}, {"x": X, "y": Y}]), torch.cat([X, X]) * 2)


# --------------------------------------------------------------------------------------------------------------- loss


class Output(OrderedDict[str, Any]):
    """What models of the transformers library return: a dict whose entries are attributes too."""

    def __init__(self, **entries: Any) -> None:
        super().__init__(**entries)
        self.__dict__.update(entries)


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.net(x)
        return Output(logits=logits) if labels is None else Output(loss=cross_entropy(logits, labels), logits=logits)


def test_a_module_with_a_loss_of_its_own_is_trained_on_it() -> None:
    """Dict batches go in as keywords, the loss that comes out is used, metrics read what the module returns."""
    x, y = samples(12)
    net = WithLoss()

    class OfLogits(lw.metrics.Accuracy):
        def update(self, preds: Any, target: Tensor) -> None:
            super().update(preds["logits"], target)

    task = lw.Supervised(net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), metrics={"acc": OfLogits()})
    data = [{"x": x[:8], "labels": y[:8]}, {"x": x[8:], "labels": y[8:]}]
    run = trainer(epochs=1).fit(task, data, data)
    assert run.progress.samples == 12
    expected = (net.eval()(x).logits.argmax(1) == y).float().mean().item()
    assert run.metrics["valid/acc"] == pytest.approx(expected)
    logits = trainer().predict(task, [{"x": x[:8]}, {"x": x[8:]}])["logits"]
    assert torch.equal(logits, torch.cat([net(x[:8]).logits, net(x[8:]).logits]).detach())


def test_a_module_that_computes_its_loss_from_the_input_needs_no_target() -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = line(1.0)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.net(x) - 2 * x).abs().mean()}

    for batch in (X, (X,), [X]):
        net = Autoencoder()
        task = lw.Supervised(net, optimizer=torch.optim.SGD(net.parameters(), lr=0.0))
        assert trainer(epochs=1).fit(task, [batch]).metrics["train/loss"] == 1.5


@pytest.mark.capability("FA-04")
@pytest.mark.parametrize("kind", ["classes", "values", "segments"])
def test_the_loss_is_chosen_from_the_targets(kind: str) -> None:
    """Module, optimizer and data are enough: cross entropy for integer targets, squared error for floating ones."""
    x, y = samples(8)
    if kind == "segments":
        x, y = torch.randn(2, 3, 4), torch.randint(3, (2, 4))
    net: nn.Module = {"classes": classifier(), "values": nn.Linear(5, 2), "segments": nn.Conv1d(3, 3, 1)}[kind]
    target = torch.randn(8, 2) if kind == "values" else y
    reference = mse_loss if kind == "values" else cross_entropy
    task = lw.Supervised(net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    assert torch.equal(task.training_step((x, target))["loss"], reference(net(x), target))
    assert trainer(epochs=1).fit(task, [(x, target)]).status == "done"


@pytest.mark.parametrize(
    ("preds", "target", "shown"),
    [
        (torch.zeros(3, 1), torch.zeros(3), "preds float32[3, 1] and target float32[3]"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), "preds float32[3] and target int64[3]"),
        ({"a": torch.zeros(3)}, torch.zeros(3), "preds {'a': float32[3]} and target float32[3]"),
        (torch.zeros(3), None, "preds float32[3] and target NoneType"),
    ],
)
def test_a_loss_that_cannot_be_chosen_is_asked_for(preds: Any, target: Any, shown: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        pick_loss(preds, target)
    assert str(caught.value) == (
        f"no loss was given, and none can be chosen for {shown}; pass loss=..., a function of (preds, target)"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lw.Supervised(print), "Supervised needs an nn.Module; got builtin_function_or_method"),
        (lambda: lw.Supervised(line(), "mse"), "loss='mse' cannot be called; pass a function or module, such as "
                                               "nn.CrossEntropyLoss()"),
        (lambda: lw.Supervised(line(), nn.MSELoss), "loss=MSELoss is a class; make an instance: MSELoss()"),
        (lambda: trainer(epochs=1).run(5, []), "step=5 cannot be called; pass a function step(run, batch)"),
        (lambda: trainer(epochs=1).run(print, [1], state={"n": 5}), "state['n'] is an int, which has no state_dict; "
                                                                    "pass a "
         "pair of functions instead: state={'n': (get, set)}, where set(get()) puts the object back"),
        (lambda: trainer().validate(line(), []), "Linear is a plain module; say how to train it: lw.Supervised(module, "
         "loss=nn.CrossEntropyLoss(), optimizer=torch.optim.AdamW(module.parameters(), lr=1e-3)), or derive it from "
         "lw.Task"),
    ],
)  # fmt: skip
def test_a_wrong_task_is_refused_where_it_is_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        make()
    assert str(caught.value) == message


# ------------------------------------------------------------------------------------------------------------ metrics


@pytest.mark.capability("CA-08")
def test_several_metrics_are_measured_in_training_and_validation() -> None:
    net = classifier()
    task = lw.Supervised(
        net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.0),
        metrics={"acc": lw.metrics.Accuracy(), "again": lw.metrics.Accuracy(), "mean": lw.metrics.Mean("loss")},
    )  # fmt: skip
    x, y = samples(12)
    run = trainer(epochs=2).fit(task, [(x[:8], y[:8]), (x[8:], y[8:])], [(x, y)])
    expected = (net(x).argmax(1) == y).float().mean().item()
    assert run.history["train/acc"] == run.history["valid/acc"] == [pytest.approx(expected)] * 2
    assert run.history["train/again"] == run.history["train/acc"]
    assert set(run.history[-1]) >= {f"{kind}/{name}" for kind in ("train", "valid") for name in ("acc", "mean", "loss")}


@pytest.mark.capability("CA-08")
def test_metrics_of_torchmetrics_go_in_unchanged() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    net = classifier()
    metrics = {
        "acc": torchmetrics.Accuracy("multiclass", num_classes=3),
        "all": torchmetrics.MetricCollection([torchmetrics.F1Score("multiclass", num_classes=3, average="macro")]),
    }
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.0), metrics=metrics)
    x, y = samples(12)
    watch = lw.EarlyStopping("valid/all/MulticlassF1Score")
    run = trainer(epochs=1, callbacks=[watch]).fit(task, [(x[:8], y[:8]), (x[8:], y[8:])], [(x, y)])
    assert run.metrics["valid/acc"] == pytest.approx((net(x).argmax(1) == y).float().mean().item())
    expected = torchmetrics.functional.f1_score(net(x), y, "multiclass", num_classes=3, average="macro").item()
    assert run.metrics["valid/all/MulticlassF1Score"] == pytest.approx(expected)
    assert run.metrics["train/acc"] == run.metrics["valid/acc"]
    assert not metrics["acc"].update_called  # the user's own have collected nothing


# --------------------------------------------------------------------------------------------------------------- Task


class Digits(lw.Task):
    """Research code in one class: no word of devices, precision, logging, saving or stopping."""

    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()
        self.calls: list[str] = []

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any) -> Any:
        x, y = batch
        preds = self(x)
        return {"loss": cross_entropy(preds, y), "preds": preds, "target": y, "largest": preds.max()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_metrics(self) -> dict[str, Any]:
        return {"accuracy": lw.metrics.Accuracy()}


@pytest.mark.capability("PL-01", "PL-02")
def test_a_task_is_a_class_and_a_call_of_fit() -> None:
    """Only the core logic is written: validation, metrics, logging and stopping come with fit; weights as by hand."""
    x, y = samples(12)
    task, hand = Digits(), classifier()
    run = trainer(epochs=3, callbacks=[lw.EarlyStopping("valid/accuracy", patience=3)]).fit(task, [(x, y)], [(x, y)])
    optimizer = torch.optim.SGD(hand.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(hand(x), y).backward()
        optimizer.step()
    assert same(task.net.state_dict(), hand.state_dict())
    assert set(run.history[-1]) >= {"train/loss", "train/largest", "train/accuracy", "valid/loss", "valid/accuracy"}


@pytest.mark.capability("PL-03", "PL-22")
def test_steps_default_to_one_another_and_can_all_be_written() -> None:
    """training_step, validation_step, test_step, predict_step, forward, optimizers, metrics: all in plain PyTorch."""
    x, y = samples(6)
    task = Digits()
    user = trainer(epochs=1)
    assert user.validate(task, [(x, y)]) == {
        "valid/" + k[5:]: v for k, v in user.test(task, [(x, y)]).items()
    }  # test_step is validation_step is training_step until they are written
    assert torch.equal(user.predict(task, [x, x]), torch.cat([task(x), task(x)]).detach())

    class All(Digits):
        def training_step(self, batch: Any) -> Any:
            self.calls.append("train")
            return super().training_step(batch)["loss"]

        def validation_step(self, batch: Any) -> Any:
            self.calls.append("valid")
            return {"loss": 1.0, "preds": self(batch[0]), "target": batch[1]}

        def test_step(self, batch: Any) -> Any:
            self.calls.append("test")
            return {"score": torch.tensor(2.0), "preds": self(batch[0]), "target": batch[1]}

        def predict_step(self, batch: Any) -> Any:
            self.calls.append("predict")
            return self(batch).argmax(1)

    task = All()
    user.fit(task, [(x, y)], [(x, y)])
    assert user.test(task, [(x, y)])["test/score"] == 2.0
    assert user.predict(task, [x]).dtype == torch.int64
    assert task.calls == ["train", "valid", "test", "predict"]


def test_what_is_missing_in_a_task_is_named() -> None:
    class Bare(lw.Task):
        pass

    class Optimized(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = line()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(lw.SettingError) as caught:
        trainer(epochs=1).fit(Bare(), [X])
    assert str(caught.value) == (
        "Bare has no configure_optimizers; write: def configure_optimizers(self): "
        "return torch.optim.AdamW(self.parameters(), lr=1e-3)"
    )
    with pytest.raises(lw.PlanError) as refused:
        trainer(epochs=1).fit(Optimized(), [X])
    assert refused.value.problems == [
        "Optimized has no training_step; write: def training_step(self, batch): ... return loss"
    ]


@pytest.mark.parametrize(
    ("flat", "target", "loss", "told"),
    [
        (False, (16,), nn.MSELoss(), "outputs [16, 1] and targets [16] are broadcast to [16, 16], each output compared "
         "with every target; write loss=lambda preds, target: your_loss(preds.squeeze(1), target)"),
        (True, (16, 1), nn.functional.l1_loss, "outputs [16] and targets [16, 1] are broadcast to [16, 16], each "
         "output compared with every target; write loss=lambda preds, target: your_loss(preds, target.squeeze(1))"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("more", [{}, {"targets": 1}])
def test_a_loss_of_torch_is_not_broadcast(
    flat: bool, target: tuple[int, ...], loss: Any, told: str, more: dict[str, Any]
) -> None:
    net = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)) if flat else nn.Linear(2, 1)
    with pytest.raises(lw.SettingError) as caught:
        trainer(epochs=1).fit(sgd_task(net, loss=loss, **more), [(torch.ones(16, 2), torch.ones(target))])
    assert str(caught.value) == told
    assert not any(p.grad is not None for p in net.parameters())


def test_a_loss_of_ones_own_that_is_broadcast_is_told_once() -> None:
    """Only one that makes a square of both: many losses bring them to one shape themselves."""
    data = [(torch.ones(16, 2), torch.ones(16))] * 3
    crossed = sgd_task(nn.Linear(2, 1), loss=lambda preds, target: (preds - target).square().mean())
    with pytest.warns(LoopwrightWarning, match=r"outputs \[16, 1\] and targets \[16\] are broadcast") as told:
        trainer(epochs=2).fit(crossed, data)
    assert len(told) == 1
    for loss in (
        lambda preds, target: mse_loss(preds.squeeze(1), target),
        lambda preds, target: (target - preds[:, 0]).square().mean(),
        lambda preds, target: mse_loss(preds, target[:, None]),
        lambda preds, target: (preds.T @ target).sum(),
    ):
        trainer(epochs=1).fit(sgd_task(nn.Linear(2, 1), loss=loss), data)


def test_an_optimizer_may_be_an_instance_a_factory_a_pair_or_a_dict() -> None:
    made: list[int] = []

    def factory(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(len(params))
        return torch.optim.SGD(params, lr=1.0)

    for returned in (factory, (factory, None), {"a": factory}, {"a": (factory, lambda o: StepLR(o, 1, 0.5))}):
        net = nn.Sequential(line(), line(1.0).requires_grad_(False))
        task = sgd_task(net)
        task.configure_optimizers = lambda returned=returned: returned  # type: ignore[method-assign]
        run = trainer(epochs=2).fit(task, pairs([1.0]))
        assert net[0].weight.item() == (-2.0 if not isinstance(returned, dict) or returned["a"] is factory else -1.5)
        assert list(run.optimizers) == [("a" if isinstance(returned, dict) else "main")]
    assert made == [1] * 4  # the frozen one is left out


# --------------------------------------------------------------------------------------------------------- fit again


def test_the_same_task_goes_on_and_another_starts_anew() -> None:
    net = line()
    task = sgd_task(net)
    run = trainer(epochs=2).fit(task, pairs([1.0]))
    again = trainer(epochs=3).fit(task, pairs([1.0]))
    assert (run.progress.epoch, again.progress.epoch, net.weight.item()) == (2, 3, -3.0)
    assert again.history["epoch"] == [1, 2, 3]
    assert trainer(epochs=2).fit(sgd_task(net), pairs([1.0])).history["epoch"] == [1, 2]


def test_momentum_and_schedule_go_on_with_the_task() -> None:
    results = []
    for epochs in ([4], [1, 2, 4]):
        net = line()
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9)
        task = lw.Supervised(net, lambda p, t: p.mean(), optimizer, schedule=lambda o: StepLR(o, 2, 0.5))
        for n in epochs:
            run = trainer(epochs=n).fit(task, pairs([1.0]))
        results.append((net.weight.item(), run.lr, run.history["lr"]))
    assert results[0] == results[1]


def test_a_deep_copy_of_a_fitted_task_starts_anew_and_shares_nothing() -> None:
    task = sgd_task(line(), schedule=lambda o: StepLR(o, 1, 0.5))
    trainer(epochs=2).fit(task, pairs([1.0]))
    copied = copy.deepcopy(task)
    weight = task.module.weight.item()
    assert copied.module.weight.item() == weight
    run = trainer(epochs=2).fit(copied, pairs([1.0]))
    assert run.history["epoch"] == [1, 2]
    assert copied.module.weight.item() != weight == task.module.weight.item()
    assert trainer(epochs=3).fit(task, pairs([1.0])).history["epoch"] == [1, 2, 3]


def test_a_module_in_eval_mode_is_set_to_train_and_it_is_said_once_where_fit_was_called() -> None:
    net = nn.Sequential(line(), nn.Dropout())
    net.eval()
    with pytest.warns(UserWarning, match="^model was in eval mode; it has been set to train mode$") as caught:
        trainer(epochs=2).fit(sgd_task(net), pairs([1.0], [1.0]))
    assert [w.filename for w in caught] == [__file__]
    assert all(module.training for module in net.modules())
    net[1].eval()  # a part in eval mode is the user's own decision
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(epochs=1).fit(sgd_task(net), pairs([1.0]))
    assert not net[1].training


def test_training_for_nothing_is_said() -> None:
    task = sgd_task(line())
    trainer(epochs=2).fit(task, pairs([1.0], [1.0]))
    with pytest.warns(LoopwrightWarning) as caught:
        run = trainer(epochs=2).fit(task, pairs([1.0], [1.0]))
    assert [str(w.message) for w in caught] == [
        "this task has already been trained for 2 epochs (4 steps): nothing to do. Ask the Trainer for more, or make "
        "a new "
        "task to start anew"
    ]
    assert caught[0].filename == __file__
    assert run.progress.step == 4


# ----------------------------------------------------------------------------------------------------- plain PyTorch


@pytest.mark.capability("CA-16")
def test_plain_model_criterion_optimizer_scheduler_and_loaders_are_passed_in(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain loaders, model, criterion, optimizer and ReduceLROnPlateau go in as they are, and do their work.

    With the folder to write to, the number of epochs, and a line of progress for each of them.
    """
    net = line(1.0)
    criterion, optimizer = nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=1.0)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    loaders = {
        name: DataLoader(TensorDataset(torch.ones(6, 1), torch.zeros(6, 1)), batch_size=2, shuffle=name == "train")
        for name in ("train", "valid")
    }
    task = lw.Supervised(net, criterion, optimizer, schedule=scheduler)
    run = lw.Trainer(epochs=4, folder=folder, progress=True).fit(task, **loaders)
    assert [line[:9] for line in capsys.readouterr().err.splitlines()[:4]] == [f"epoch {n}/4" for n in range(1, 5)]
    assert run.folder is not None
    assert run.folder.parents[1] == folder
    assert {path.name for path in run.folder.iterdir()} >= {"metrics.jsonl", "checkpoints", "config.yaml"}
    assert (len(run.history), set(run.history[-1])) >= (4, {"train/loss", "valid/loss"})
    assert task.module is net
    # lr 1 turns the sign of the weight at each step: the loss of validation stays, and the plateau halves lr
    assert run.history["lr"][:2] == [1.0, 1.0]
    assert run.history["lr"][-1] < 1.0
    assert scheduler.last_epoch == 4


@pytest.mark.capability("PL-06")
def test_a_hand_written_loop_becomes_a_task_line_by_line() -> None:
    """What is trained stays plain PyTorch; the loop with its zero_grad, backward and step is what goes away."""

    def by_hand(net: nn.Module, data: Batches) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(2):
            for x, y in data:
                optimizer.zero_grad()
                loss = mse_loss(net(x), y)
                loss.backward()
                optimizer.step()

    def with_loopwright(net: nn.Module, data: Batches) -> None:
        task = lw.Supervised(net, mse_loss, torch.optim.SGD(net.parameters(), lr=0.1))
        trainer(epochs=2).fit(task, data)

    nets = [nn.Linear(1, 1), nn.Linear(1, 1)]
    nets[1].load_state_dict(nets[0].state_dict())
    data = pairs([1.0, 2.0], [3.0])
    by_hand(nets[0], data)
    with_loopwright(nets[1], data)
    assert same(nets[0].state_dict(), nets[1].state_dict())
    assert type(nets[1]) is nn.Linear
    lines = [len(inspect.getsource(function).splitlines()) for function in (by_hand, with_loopwright)]
    assert lines == [8, 3]


def test_the_task_itself_is_a_module_that_can_be_called() -> None:
    net = line(2.0)
    task = lw.Supervised(net, nn.MSELoss())
    assert torch.equal(task(X), net(X))
    assert set(task.state_dict()) == {"module.weight"}
    assert task.models() == {"model": net}


def test_a_step_task_tells_its_models_and_optimizers() -> None:
    net = line()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    task = StepTask(lambda run, batch: None, {"net": net, "opt": optimizer, "n": (lambda: 1, lambda n: None)})
    assert task.models() == {"net": net}
    assert task.configure_optimizers() == {"opt": optimizer}
    with pytest.raises(lw.SettingError, match="has no validation of its own"):
        task.validation_step(None)


@pytest.mark.parametrize("targets", [1, -1, "y"])
def test_what_is_not_the_target_is_the_input(targets: Any) -> None:
    seen: list[Any] = []

    class Watch(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            seen.append((len(args), sorted(kwargs)))
            return (args[0] if args else kwargs["x"]) * 2

    batch: Any = {"x": torch.ones(3, 1), "y": torch.zeros(3, 1)}
    output = lw.Supervised(Watch(), nn.MSELoss(), targets=targets).training_step(
        batch if targets == "y" else list(batch.values())
    )
    assert seen == [(0, ["x"]) if targets == "y" else (1, [])]
    assert output["loss"].item() == 4.0
