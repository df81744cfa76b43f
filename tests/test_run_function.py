"""Trainer.run: a plain function as the step, with any library, optimizer and kind of batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import loopwright as lw
from tiny import bits, classifier, line, loader, pairs, same, samples, seed_all, sgd_task, trainer


@pytest.mark.parametrize(
    ("state", "shown"), [([1], "[int]"), ("net", "str"), (nn.Linear(1, 1), "Linear"), ({"net"}, "set")]
)
def test_a_state_without_names_is_refused(state: Any, shown: str) -> None:
    with pytest.raises(lw.SettingError) as error:
        trainer(epochs=1).run(lambda run, batch: None, [1], state=state)
    assert str(error.value) == (
        f"state={shown}: expected a dict of the objects that checkpoints keep, by name, such as "
        'state={"net": net, "opt": opt}'
    )


@pytest.mark.capability("IG-02", "IG-03")
def test_a_function_with_its_own_optimizer_has_the_bits_of_the_plain_loop() -> None:
    """The loop runs a function over given data and returns its results; what the function moves is its own affair."""
    ends = []
    for by_hand in (True, False):
        net = classifier(dropout=0.5)
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        seed_all(6)

        def step(run: Any, batch: Any, net: nn.Module = net, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            return loss

        data = loader(batch_size=7, shuffle=True)
        if by_hand:
            losses = [float(step(None, batch).detach()) for _ in range(2) for batch in data]
        else:
            run = trainer(epochs=2).run(step, data, state={"net": net, "optimizer": optimizer})
            assert list(run.history.losses["loss"]) == losses
            assert run.progress[:6] == (1, 2, 0, 12, 0, 2 * 37)
            assert (run.models, run.optimizers) == ({"net": net}, {"optimizer": optimizer})
            assert run.lr == 0.01
        ends.append(bits(net, optimizer))
    assert same(*ends)


@pytest.mark.capability("CA-03")
def test_scikit_learn_trains_through_partial_fit() -> None:
    """The loop is independent of torch: numpy batches, a model of scikit-learn, and its state in a checkpoint."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 4))
    y = (X @ [1.0, -2.0, 0.5, 0.0] > 0).astype(int)
    model = linear_model.SGDClassifier(random_state=0)
    by_hand = linear_model.SGDClassifier(random_state=0)
    batches = [(X[i : i + 30], y[i : i + 30]) for i in range(0, 300, 30)]
    for _ in range(3):
        for a, b in batches:
            by_hand.partial_fit(a, b, classes=[0, 1])

    def step(run: lw.Run, batch: Any) -> dict[str, Any]:
        model.partial_fit(*batch, classes=[0, 1])
        return {"accuracy": model.score(*batch)}

    def put(state: Any) -> None:
        model.coef_, model.intercept_ = state

    run = trainer(epochs=3).run(step, batches, state={"model": (lambda: (model.coef_, model.intercept_), put)})
    assert np.array_equal(model.coef_, by_hand.coef_)
    assert run.metrics["train/accuracy"] > 0.9
    assert run.progress.samples == 900


@pytest.mark.capability("PT-03")
def test_an_inverse_problem_of_physics_is_solved_with_bare_tensors() -> None:
    """Damping and frequency of an oscillator are found from its path: an ODE solved inside the step, no module."""
    dt, steps = 0.1, 40

    def path(damping: Tensor, stiffness: Tensor) -> Tensor:
        x, v, points = torch.tensor(1.0), torch.tensor(0.0), []
        for _ in range(steps):
            v = v - dt * (stiffness * x + damping * v)  # semi-implicit Euler
            x = x + dt * v
            points.append(x)
        return torch.stack(points)

    measured = path(torch.tensor(0.4), torch.tensor(2.5))
    damping, stiffness = torch.tensor(0.1, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    optimizer = torch.optim.Adam([damping, stiffness], lr=0.1)

    def step(run: lw.Run, batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = ((path(damping, stiffness) - batch) ** 2).mean()
        loss.backward()
        optimizer.step()
        return loss

    trainer(steps=80).run(step, [measured] * 10, state={"optimizer": optimizer})
    assert damping.item() == pytest.approx(0.4, abs=0.01)
    assert stiffness.item() == pytest.approx(2.5, abs=0.01)


@pytest.mark.capability("CA-03")
def test_batches_may_be_anything_and_no_tensor_is_needed(folder: Path) -> None:
    """Strings as batches, a dict as the model: counted, logged, saved and put back without torch."""
    counts: dict[str, int] = {}

    def step(run: lw.Run, batch: str) -> int:
        for word in batch.split():
            counts[word] = counts.get(word, 0) + 1
        return len(counts)

    state = {"counts": (lambda: dict(counts), counts.update)}
    data = ["a b a", "c", "a c"]
    run = trainer(epochs=2, folder=folder).run(step, data, state=state)
    assert counts == {"a": 6, "b": 2, "c": 4}
    assert run.history["train/loss"] == [pytest.approx((2 + 3 + 3) / 3), 3.0]
    assert run.progress.samples == 6  # a batch without an array counts as one
    assert run.folder is not None
    (checkpoint,) = (run.folder / "checkpoints").glob("step-*/state.json")
    assert json.loads(checkpoint.read_text())["user"]["counts"] == counts


@pytest.mark.parametrize(
    "value", [2.0, 2, np.float32(2), np.float64(2), np.array(2.0), torch.tensor(2.0), torch.tensor([2.0])]
)
def test_every_kind_of_number_is_logged(value: Any) -> None:
    assert trainer(epochs=1).run(lambda run, batch: value, [1, 2]).history["train/loss"] == [2.0]
    if np.ndim(value) == 0:
        assert trainer(epochs=1).run(lambda run, batch: {"n": value}, [1, 2]).history["train/n"] == [2.0]


def test_a_step_may_return_nothing() -> None:
    run = trainer(epochs=2).run(lambda run, batch: None, [1, 2, 3])
    assert run.progress.step == 6
    assert run.metrics == {}
    assert [set(record) for record in run.history] == [{"epoch", "step", "samples", "seconds"}] * 2


def test_a_step_sees_its_run_and_may_stop_it() -> None:
    seen = []

    def step(run: lw.Run, batch: int) -> None:
        seen.append((run.progress.epoch, run.progress.step, batch))
        if batch == 20:
            run.request_stop("20 came")

    run = trainer(epochs=5).run(step, lambda: iter([10, 20, 30]))
    assert seen == [(0, 0, 10), (0, 1, 20)]
    assert (run.status, run.stop_reason) == ("stopped", "20 came")


def test_two_runs_of_one_function_do_not_know_of_one_another() -> None:
    seen: list[int] = []
    user = trainer(epochs=1)
    for _ in range(2):
        run = user.run(lambda run, batch: seen.append(run.progress.step), [1, 2])
        assert run.progress.step == 2
    assert seen == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("step", "state", "message"),
    [
        (5, {}, "step=5 cannot be called; pass a function step(run, batch)"),
        (lambda batch: None, {}, "step=<lambda>(batch) cannot be called with (run, batch): too many positional "
                                 "arguments. Write: def step(run, batch): ..."),
        (print, {"n": [1]}, "state['n'] is a list, which has no state_dict; pass a pair of functions instead: "
                            "state={'n': (get, set)}, where set(get()) puts the object back"),
        (print, {"n": nn.Parameter(torch.ones(1)) * 2},
                            "state['n'] is a Tensor, which has no state_dict; pass a pair of functions instead: "
                            "state={'n': (get, set)}, where set(get()) puts the object back"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_or_saved_is_refused(step: Any, state: dict[str, Any], message: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        trainer(epochs=1).run(step, [1], state=state)
    assert str(caught.value) == message


@pytest.mark.parametrize("returned", ["text", [1, 2], object()])
def test_what_cannot_be_logged_is_refused(returned: Any) -> None:
    with pytest.raises(lw.StepOutputError, match=r"^step 'main' returned .*; return the loss"):
        trainer(epochs=1).run(lambda run, batch: returned, [1])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (3, "run.log(3) takes a dict with a name for each: run.log({'name': value})"),
        ({3: 1.0}, "run.log({3: ...}): names are texts; write {'3': ...}"),
        ({"train/loss": 9.0}, "run.log({'train/loss': ...}) would be logged as 'train/train/loss': it adds to the "
                              "records of training, whose names begin with 'train/'. Write {'my_loss': ...}"),
        ({"train/width": 9.0}, "run.log({'train/width': ...}) would be logged as 'train/train/width': it adds to the "
                               "records of training, whose names begin with 'train/'. Write {'width': ...}"),
        ({"a": [1]}, "run.log({'a': ...}) takes a number, a 0-dimensional tensor, a text, a figure with savefig() or a "
                     "Path; got [1]"),
        ({"a": torch.zeros(3, 8, 8)}, "run.log({'a': ...}) takes a number, a 0-dimensional tensor, a text, a figure "
                                      "with savefig() or a Path; got an array of shape (3, 8, 8): log its .mean(), or "
                                      "draw it, figure.gca().imshow(...)"),
    ],
)  # fmt: skip
def test_what_run_log_cannot_take_is_refused_with_what_it_takes(values: Any, says: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        trainer(epochs=1).run(lambda run, batch: run.log(values), [1])
    assert str(caught.value) == says


def test_a_step_function_is_planned_and_explained_as_run_takes_it() -> None:
    calls, net = [], line()

    def step(run: lw.Run, batch: Any) -> Any:
        calls.append(run.state["net"](batch[0]))

    user = trainer(epochs=2)
    plan = user.plan(step, pairs([1.0], [2.0]), state={"net": net})
    assert plan.problems == []
    assert plan.facts[0] == "stage 'main': until 2 epochs; an epoch is 2 batches, 2 steps; phases: main"
    assert "exact resume: yes" in plan.facts
    assert any("state= was not given" in fact for fact in user.plan(step, pairs([1.0])).facts)
    assert "takes_it.<locals>.step(batch)" in user.explain(step, pairs([1.0]), state={"net": net})
    assert not calls
    cost = user.plan(step, pairs([1.0], [2.0]), state={"net": net}, measure=1).cost
    assert cost.steps == 4
    assert user.run(step, pairs([1.0], [2.0]), state={"net": net}).progress.step == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"valid": [1]}, "valid= goes with a task; trainer.run(step, data) has none, leave it out"),
        ({"stages": [lw.Stage("a", 1)]}, "stages= goes with a task; trainer.run(step, data) has none, leave it out"),
        ({"state": [1]}, "state=[int]: expected a dict of the objects that checkpoints keep, by name, such as "
                         'state={"net": net, "opt": opt}'),
    ],
)  # fmt: skip
def test_what_run_does_not_take_is_no_part_of_its_plan(arguments: Any, message: str) -> None:
    user = trainer(epochs=1)
    assert user.plan(lambda run, batch: None, [1], **arguments).problems == [message]
    with pytest.raises(lw.SettingError) as caught:
        user.explain(lambda run, batch: None, [1], **arguments)
    assert str(caught.value) == message


def test_state_is_no_argument_of_a_plan_of_a_task() -> None:
    told = trainer(epochs=1).plan(sgd_task(line()), pairs([1.0]), state={})
    assert told.problems == ["state= goes with a function step(run, batch); a task holds its own, leave it out"]


def test_what_validate_returns_can_be_logged_as_it_is() -> None:
    net = classifier()
    judge = lw.Supervised(net, nn.CrossEntropyLoss(), metrics={"accuracy": lw.metrics.Accuracy()})
    looking = lw.Trainer(folder=None, progress=False)
    user = lw.Trainer(epochs=2, name="a", progress=False)

    @user.on(lw.Event.EPOCH_END)
    def validate(run: lw.Run) -> None:
        run.log({**looking.validate(judge, samples(12)), "width": 3.0})

    run = user.run(lambda run, batch: 1.0, [1, 2], state={"net": net})
    assert run.folder is not None
    written = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    valid = [one for one in written if one["kind"] == "valid"]
    assert [one["step"] for one in valid] == [2, 4]
    assert {"valid/loss", "valid/accuracy"} <= valid[0].keys()
    assert run.metrics["valid/loss"] == valid[1]["valid/loss"]
    assert run.metrics["train/width"] == 3.0
