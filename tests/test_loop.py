"""What the loop promises besides numbers: few frames and device reads, little memory, records; Supervised's batches."""

from __future__ import annotations

import gc
import inspect
import sys
import threading
import weakref
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import loopwright as lw
from loopwright._compat import backward
from loopwright.history import LIMIT
from tiny import acts, classifier, line, loader, mean_of_preds, pairs, samples, sgd_task, trainer

HOME = Path(inspect.getfile(lw)).parent


class Frames(torch.autograd.Function):
    """The identity; its backward notes which functions of Loopwright are on the stack."""

    seen: ClassVar[list[list[str]]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        frame, ours, below_backward = inspect.currentframe(), [], False
        while frame is not None:
            if below_backward and Path(frame.f_code.co_filename).is_relative_to(HOME):
                ours.append(frame.f_code.co_name)
            below_backward |= frame.f_code in (torch.Tensor.backward.__code__, backward.__code__)
            frame = frame.f_back
        Frames.seen.append(ours)
        return grad


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"precision": "bf16"}], ids=str)
def test_at_most_four_frames_lie_between_fit_and_backward(settings: dict[str, Any]) -> None:
    Frames.seen.clear()
    task = sgd_task(classifier(), loss=lambda preds, target: Frames.apply(nn.functional.cross_entropy(preds, target)))
    trainer(epochs=1, callbacks=[acts(on_step_end=lambda *args: None)], **settings).fit(task, loader(batch_size=20))
    assert Frames.seen == [["train_step", "train_epoch", "train", "fit"]] * 2


def test_a_step_adds_few_python_calls() -> None:
    """Calls of functions of Loopwright a step, with the defaults; the hand-written loop makes 134 of torch's."""
    calls: list[str] = []

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and Path(frame.f_code.co_filename).is_relative_to(HOME):
            calls.append(frame.f_code.co_name)

    def measure(steps: int) -> int:
        calls.clear()
        data = loader(2 * steps, batch_size=2)
        sys.setprofile(count)
        try:
            trainer(epochs=1, log_every=1000).fit(sgd_task(classifier(), loss=nn.CrossEntropyLoss()), data)
        finally:
            sys.setprofile(None)
        return len(calls)

    assert (measure(60) - measure(20)) / 40 <= 24


def by_hand(data: Any) -> None:
    """Plain PyTorch, as its tutorials write it."""
    net, loss = classifier(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    for x, y in data:
        optimizer.zero_grad()
        loss(net(x), y).backward()
        optimizer.step()


def by_fit(data: Any, **settings: Any) -> None:
    """The same with ``fit``."""
    trainer(epochs=1, log_every=1000, **settings).fit(sgd_task(classifier(), loss=nn.CrossEntropyLoss()), data)


def batches(steps: int) -> list[Any]:
    """Made before, so that nothing is won where batches are made."""
    return list(loader(32 * steps, batch_size=32))


def shuffled(steps: int) -> Any:
    return loader(32 * steps, batch_size=32, shuffle=True)


@pytest.mark.parametrize("data", [shuffled, batches])
def test_a_step_makes_no_more_calls_than_that_of_the_loop_by_hand(data: Any) -> None:
    """A step of ``fit`` with its defaults makes no more calls, Python's and C's together, than one of plain PyTorch."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    def a_step(train: Any) -> float:
        nonlocal calls
        found = []
        train(data(2))  # what is done once a process is no part of a step
        for steps in (20, 60):
            given, calls = data(steps), 0
            sys.setprofile(count)
            try:
                train(given)
            finally:
                sys.setprofile(None)
            found.append(calls)
        return (found[1] - found[0]) / 40

    assert 0 < a_step(by_fit) <= a_step(by_hand)


class Operators(TorchDispatchMode):
    """Counts what torch computes, by the name of the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_torch_computes_at_a_step_what_it_does_in_the_loop_by_hand_and_one_check() -> None:
    """Not an operator more on tensors but the check for NaN, and reading it; without that check, nothing at all."""

    def a_step(train: Any) -> Counter[str]:
        found = []
        train(batches(2))
        for steps in (10, 11):
            with Operators() as operators:
                train(batches(steps))
            found.append(operators.ran)
        return found[1] - found[0]

    hand = a_step(by_hand)
    ranges = {"_record_function_enter_new": 2, "_record_function_exit": 2}  # for a profiler: of zero_grad and of step
    ranges["ones_like"] = 1  # the gradient of the loss by itself is made once
    check = {"_amp_foreach_non_finite_check_and_unscale_": 1, "_local_scalar_dense": 1}  # of all gradients; of the loss
    kept = {"detach": 1, "_local_scalar_dense": 1}  # the loss, for the records; a view and a read, no computation
    assert hand - a_step(by_fit) == ranges
    assert a_step(by_fit) - hand == Counter(check) + Counter(kept)
    assert a_step(lambda data: by_fit(data, nonfinite=None)) - hand == kept


# -------------------------------------------------------------------------------------------------------- device reads


READS = {getattr(Tensor, name) for name in ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__")}


class Reads(TorchFunctionMode):
    """Counts the reads of values from their device, by the step at which they happen."""

    def __init__(self) -> None:
        super().__init__()
        self.at: list[int] = []
        self.run: lw.Run | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and self.run is not None:
            self.at.append(self.run.progress.step)
        return func(*args, **(kwargs or {}))


@pytest.mark.capability("B-23")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_between_two_records_no_value_is_read_from_the_device(accumulate: int) -> None:
    """With clipping, a metric, a history and a schedule, values are read at records and epochs, nowhere else."""
    net, reads = classifier(dropout=0.5), Reads()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)  # Adam's own step counter is read on the CPU
    task = lw.Supervised(
        net,
        nn.CrossEntropyLoss(),
        optimizer,
        metrics={"accuracy": lw.metrics.Accuracy()},
        schedule=lambda o: lw.per_step(torch.optim.lr_scheduler.ExponentialLR(o, 0.9)),
    )
    user = trainer(epochs=1, log_every=10, clip_norm=1.0, nonfinite=None, accumulate=accumulate)
    user.on(lw.Event.FIT_START)(lambda run: setattr(reads, "run", run))
    with reads:
        user.fit(task, loader(35 * accumulate, batch_size=1))
    assert set(reads.at) - {0} == {10, 20, 30, 35}  # at 0, seeds for the order are drawn
    reads.at.clear()
    user = trainer(epochs=1, log_every=10, nonfinite="raise")
    user.on(lw.Event.FIT_START)(lambda run: setattr(reads, "run", run))
    with reads:
        user.fit(sgd_task(classifier(), loss=nn.CrossEntropyLoss()), loader(15, batch_size=1))
    # the documented check, of the loss at each step; the flag for all gradients is read without torch
    assert [reads.at.count(step) for step in range(1, 10)] == [1] * 9


# -------------------------------------------------------------------------------------------------------------- memory


def test_the_loss_of_every_step_is_kept_in_four_bytes() -> None:
    run = trainer(epochs=3, log_every=7).fit(sgd_task(line(1.0)), pairs(*[[float(i)] for i in range(40)]))
    losses = run.history.losses["loss"]
    assert (len(losses), losses.itemsize) == (120, 4)
    assert losses[1] == 1.0


def test_values_that_wait_for_a_record_are_bounded() -> None:
    most = []
    watch = acts(on_step_end=lambda run, result: most.append(len(run.series._rows) + len(run.series._blocks)))
    user = trainer(steps=3 * LIMIT, log_every="1e6 steps", nonfinite=None, callbacks=[watch])
    user.run(lambda run, batch: 1.0, [1] * 4 * LIMIT)
    assert max(most) < LIMIT


def test_outputs_are_let_go_before_the_next_step() -> None:
    alive: list[Any] = []

    def look(run: lw.Run) -> None:
        assert all(ref() is None for ref in alive)

    def keep(run: lw.Run, result: lw.StepResult) -> None:
        alive.append(weakref.ref(result.output["preds"]))

    trainer(epochs=1, callbacks=[acts(on_step_start=look, on_step_end=keep)]).fit(
        sgd_task(line()), pairs([1], [2], [3])
    )
    assert len(alive) == 3


def test_a_finished_run_holds_no_batch_and_no_graph() -> None:
    net, alive = line(), []
    watch = acts(on_batch_start=lambda run, batch: alive.append(weakref.ref(batch[0])))
    run = trainer(epochs=1, callbacks=[watch]).fit(sgd_task(net), lambda: iter(pairs([1], [2])))
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert run.progress.step == 2


# -------------------------------------------------------------------------------------------------------------- records


def test_records_and_epochs_have_means_of_their_own() -> None:
    """A record is the mean since the last record, an epoch's that of the whole epoch: neither empties the other."""
    seen: list[tuple[int, str, float]] = []

    class Keep:
        def log(self, progress: lw.Progress, values: Any, kind: str) -> None:
            seen.append((progress.step, kind, values["train/loss"]))

    data = [(torch.full((n, 1), float(x)), torch.zeros(n, 1)) for n, x in ((1, 2), (3, 6), (2, 4))]
    run = trainer(epochs=2, log_every=2, loggers=[Keep()]).fit(sgd_task(line(1.0), lr=0.0), data)
    assert seen == [
        (2, "train", (2 + 18) / 4),
        (3, "epoch", (2 + 18 + 8) / 6),
        (4, "train", (8 + 2) / 3),
        (6, "train", (18 + 8) / 5),
        (6, "epoch", (2 + 18 + 8) / 6),
    ]
    assert run.history["samples"] == [6, 12]
    assert run.history["step"] == [3, 6]
    assert run.metrics["lr"] == 0.0


def test_the_last_steps_of_a_run_have_a_record() -> None:
    kinds: list[Any] = []

    class Keep:
        def log(self, progress: lw.Progress, values: Any, kind: str) -> None:
            kinds.append((progress.step, kind))

    trainer(steps=4, loggers=[Keep()]).fit(sgd_task(line()), pairs([1], [2], [3]))
    assert kinds == [(3, "epoch"), (4, "train")]
    kinds.clear()
    trainer(epochs=1, loggers=[Keep()]).fit(sgd_task(line()), pairs([1], [2], [3]))
    assert kinds == [(3, "train"), (3, "epoch")]  # the record of the epoch is the last one


# -------------------------------------------------------------------------------------------- what Supervised takes


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


X, Y, Z = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]), torch.tensor([0.0, 0.0])


@pytest.mark.parametrize(
    ("choice", "batch"),
    [
        ({}, (X, Y, Z)),
        ({}, [X, Y, Z]),
        ({"inputs": ["a", "b"], "targets": "t"}, {"t": Z, "a": X, "b": Y, "more": 5}),
        ({"inputs": [2, 1], "targets": 0}, (Z, Y, X)),
        ({"inputs": lambda batch: (batch.pop(), batch.pop()), "targets": lambda batch: Z}, [X, Y]),
    ],
)
def test_inputs_and_targets_are_found_by_place_key_or_function(choice: dict[str, Any], batch: Any) -> None:
    task = lw.Supervised(Sum(), nn.MSELoss(), **choice)
    out = task.training_step(batch)
    assert torch.equal(out["preds"], X + Y)
    assert torch.equal(out["target"], Z)
    assert out["loss"].item() == (11**2 + 22**2) / 2


def test_the_loss_is_chosen_by_the_kind_of_target_or_given_by_the_module() -> None:
    logits, labels = torch.randn(3, 4), torch.tensor([0, 3, 1])
    task = lw.Supervised(nn.Identity())
    assert torch.equal(task.training_step((logits, labels))["loss"], nn.functional.cross_entropy(logits, labels))
    assert torch.equal(task.training_step((X, Y))["loss"], nn.functional.mse_loss(X, Y))

    class Own(nn.Module):
        def forward(self, x: Tensor, labels: Tensor) -> Any:
            return {"loss": x.sum(), "logits": x}

    assert lw.Supervised(Own()).training_step({"x": X, "labels": labels})["loss"] == 3.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lw.Supervised(5), "Supervised needs an nn.Module; got int"),
        (lambda: lw.Supervised(line(), nn.MSELoss), "loss=MSELoss is a class; make an instance: MSELoss()"),
        (lambda: lw.Supervised(line(), "mse"),
         "loss='mse' cannot be called; pass a function or module, such as nn.CrossEntropyLoss()"),
        (lambda: trainer(epochs=1).fit(lw.Supervised(line(), mean_of_preds), pairs([1])),
         "Supervised has no optimizer to train with; pass one: "
         "optimizer=torch.optim.AdamW(module.parameters(), lr=1e-3)"),
        (lambda: trainer(epochs=1).fit(lw.Task(), pairs([1])),
         "Task has no configure_optimizers; write: def configure_optimizers(self): "
         "return torch.optim.AdamW(self.parameters(), lr=1e-3)"),
        (lambda: trainer().fit(sgd_task(line()), pairs([1])),
         "how long to train is not said; write lw.Trainer(epochs=10), steps=1000 or time='10 min'"),
        (lambda: trainer(epochs=1).fit(lw.Supervised(line(), optimizer=lambda p: 5), pairs([1])),
         "the factory of optimizer 'main' returned int; it must return a torch optimizer"),
        (lambda: trainer(epochs=1, accumulate=0), "accumulate=0: expected a whole number of batches, at least 1"),
        (lambda: trainer(epochs=1, clip_norm=-1.0),
         "clip_norm=-1.0: expected a positive number, or None for no clipping"),
        (lambda: trainer(epochs=1, nonfinite="stop"),
         "nonfinite='stop': expected 'raise', 'skip', 'skip 25' (at most so many in a row) or None"),
        (lambda: trainer(epochs=0), "epochs=0: expected a positive number, such as epochs=10"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_fix(call: Any, message: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        call()
    assert str(caught.value) == message


def test_a_batch_that_does_not_have_the_chosen_key_is_explained() -> None:
    task = lw.Supervised(Sum(), nn.MSELoss(), inputs=["a", "c"], targets="t")
    with pytest.raises(lw.StepOutputError) as caught:
        task.training_step({"a": X, "b": Y, "t": Z})
    assert str(caught.value) == (
        "inputs='c' is not in the batch {'a': float32[2], 'b': float32[2], 't': float32[2]}. Known: 'a', 'b', 't'."
    )


def test_samples_are_counted_by_the_first_dimension() -> None:
    run = trainer(epochs=1).fit(sgd_task(classifier(), loss=nn.CrossEntropyLoss()), loader(batch_size=10))
    assert run.progress.samples == 37
    with pytest.raises(lw.DataError, match=r"cannot tell how many samples .* Pass weight=\.\.\."):
        trainer(epochs=1).fit(sgd_task(line()), ["text"])


def test_clipping_bounds_the_norm_at_every_step() -> None:
    """On the second and every later step as on the first: a stored iterator over parameters would clip only once."""
    net, norms = classifier(), []
    watch = acts(
        on_grads_ready=lambda run, phase, norm: norms.append(
            torch.stack([p.grad.norm() for p in net.parameters()]).norm().item()
        )
    )
    task = sgd_task(net, lr=0.1, loss=nn.CrossEntropyLoss())
    trainer(epochs=3, clip_norm=1e-3, callbacks=[watch]).fit(task, [samples()])
    assert norms == pytest.approx([1e-3] * 3, rel=1e-3)


class Alias(lw.Task):
    """Returns what may change after the step: a buffer that is counted up, and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.net = line()
        self.register_buffer("n", torch.zeros(()))

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        self.n += 1
        return {"loss": self.net(batch[0]).mean(), "n": self.n, "weight": self.net.weight[0, 0]}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("log_every", ["1 step", "100 steps"])
def test_values_that_change_later_are_logged_as_they_were(log_every: str) -> None:
    run = trainer(epochs=1, log_every=log_every).fit(Alias(), pairs([1.0], [1.0], [1.0]))
    assert run.history["train/n"] == [2.0]
    assert run.history["train/weight"] == [-1.0]


def test_a_weight_may_be_a_tensor_and_counts_in_validation_too() -> None:
    data = [(torch.full((2, 1), v), torch.zeros(2, 1)) for v in (1.0, 4.0)]
    weight = lambda batch: batch[0].sum()  # noqa: E731
    task = sgd_task(line(1.0), lr=0.0)
    run = trainer(epochs=1).fit(task, data, data, weight=weight)
    assert run.metrics["train/loss"] == run.metrics["valid/loss"] == (1 * 2 + 4 * 8) / 10
    assert trainer().validate(task, data, weight=weight) == {"valid/loss": (1 * 2 + 4 * 8) / 10}
    assert type(run.progress.samples) is int


def test_a_value_that_only_some_batches_give_is_their_mean() -> None:
    class Sometimes(lw.Supervised):
        def training_step(self, batch: Any) -> dict[str, Any]:
            output = super().training_step(batch)
            return output | ({"big": 4.0} if batch[0].max() > 1 else {})

    net = line()
    task = Sometimes(net, mean_of_preds, torch.optim.SGD(net.parameters(), lr=0.1))
    run = trainer(epochs=1, accumulate=2).fit(task, pairs([1.0], [2.0]))
    assert run.history["train/big"] == [4.0]


def test_a_default_dtype_of_float64_changes_nothing() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        net = nn.Linear(1, 1)
        task = lw.Supervised(net, mean_of_preds, torch.optim.SGD(net.parameters(), lr=0.1))
        thread = threading.Thread(target=lambda: trainer(epochs=1).fit(task, [(torch.ones(1, 1), torch.zeros(1, 1))]))
        thread.start()  # the check of gradients keeps its flags per thread
        thread.join()
        assert task._run.status == "done"
    finally:
        torch.set_default_dtype(torch.float32)


def test_run_log_takes_scalars_of_other_names_only() -> None:
    run = trainer(epochs=1).fit(sgd_task(line()), pairs([1.0]))
    with pytest.raises(lw.SettingError, match="takes a number, a 0-dimensional tensor, a text"):
        run.log({"x": torch.ones(3)})
    with pytest.raises(lw.SettingError, match="cannot log 'loss'"):
        run.log({"loss": 1.0})


def test_handlers_count_for_each_run(recwarn: Any) -> None:
    seen: list[str] = []
    user = trainer(epochs=1)

    @user.on(lw.Event.BATCH_START(every=2))
    def look(run: lw.Run) -> None:
        seen.append(run.task.name)
        if run.task.name == "outer" and len(seen) == 1:
            inner = sgd_task(line())
            inner.name = "inner"
            user.fit(inner, pairs([1.0], [1.0], [1.0]))

    outer = sgd_task(line())
    outer.name = "outer"
    user.fit(outer, pairs([1.0], [1.0], [1.0], [1.0]))
    assert seen == ["outer", "inner", "outer"]
