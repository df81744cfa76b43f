"""What a stage can have of its own: an end by a plateau, callbacks, a loss, the best weights, a loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopwright as lw
from every_step import Experiment, left, resumed_at_every_step
from loopwright.checkpoint import list_checkpoints, read
from loopwright.events import HOOKS, fire
from loopwright.loop import after_step, count, end_epoch, train_step
from tiny import acts, bits, classifier, line, loader, mean_of_preds, pairs, recorder, same, seed_all, sgd_task, trainer


class Scripted(lw.Supervised):
    """Its validation gives the values of a script, one after the other, and the last one for ever."""

    def __init__(self, *values: float, net: Any = None, **settings: Any) -> None:
        net = line() if net is None else net
        super().__init__(net, mean_of_preds, torch.optim.SGD(net.parameters(), 1.0), **settings)
        self.values, self.register = list(values), self.register_buffer("asked", torch.zeros((), dtype=torch.int64))

    def validation_step(self, batch: Any) -> dict[str, float]:
        value = self.values[min(int(self.asked), len(self.values) - 1)]
        self.asked += 1
        return {"loss": value, "gain": value}

    def models(self) -> dict[str, nn.Module]:
        return {"model": self}


# ------------------------------------------------------------------------------------------------------------ plateau


@pytest.mark.parametrize(
    ("until", "epochs"),
    [
        (lw.Plateau("valid/loss", patience=2), 5),
        (["3 epochs", lw.Plateau("valid/loss", patience=2)], 3),
        ([lw.Plateau("valid/loss", patience=2), "50 epochs"], 5),
        (lw.Plateau("valid/loss", patience=1), 3),
        (lw.Plateau("valid/loss", patience=2, min_delta=0.5), 4),
        (lw.Plateau("valid/gain", mode="max", patience=3), 4),
    ],
)
def test_a_stage_ends_where_a_value_stays_or_its_bound_is_reached(until: Any, epochs: int) -> None:
    """9, 8, 8, 7.8, 7.8, 7.8: the best is at the fourth look; the stage after it goes on from there."""
    task = Scripted(9, 8, 8, 7.8, 8, 8) if epochs != 5 else Scripted(9, 8, 7, 7, 7, 7)
    stages = [lw.Stage("first", until=until), lw.Stage("second", until="2 epochs")]
    run = trainer().fit(task, pairs([1], [2]), pairs([1]), stages=stages)
    assert [record["stage"] for record in run.history] == ["first"] * epochs + ["second"] * 2
    assert run.status == "done"
    assert run.stop_reason is None


def test_a_plateau_of_the_training_looks_at_each_epoch() -> None:
    net = line(1.0)
    task = lw.Supervised(net, mean_of_preds, torch.optim.SGD(net.parameters(), 0.0))
    run = trainer().fit(task, pairs([1], [2]), stages=[lw.Stage("s", until=lw.Plateau("train/loss", patience=3))])
    assert run.progress.epoch == 1 + 3


def test_a_plateau_inside_an_epoch_ends_the_stage_there() -> None:
    task = Scripted(3, 3, 3)
    stages = [lw.Stage("a", until=lw.Plateau(patience=2), validate_every="1 steps"), lw.Stage("b", until="1 epoch")]
    run = trainer().fit(task, pairs([1], [2], [3], [4], [5]), pairs([1]), stages=stages)
    assert run.progress[:4] == (2, 2, 0, 3 + 5)


def test_each_stage_counts_its_own_plateau() -> None:
    plateau = lw.Plateau(patience=2)
    stages = [lw.Stage(name, until=plateau) for name in "ab"]
    run = trainer().fit(Scripted(5, 5, 5, 6, 6, 6), pairs([1]), pairs([1]), stages=stages)
    assert [record["stage"] for record in run.history] == ["a"] * 3 + ["b"] * 3


def test_a_plan_tells_the_ends_of_a_stage_and_refuses_what_nothing_produces() -> None:
    stages = [lw.Stage("s", until=["50 epochs", lw.Plateau("valid/loss", patience=1)])]
    told = str(trainer().plan(sgd_task(line()), pairs([1]), pairs([1]), stages=stages))
    assert "stage 's': until 50 epochs or valid/loss has not improved in 1 look; an epoch" in told
    with pytest.raises(lw.PlanError, match=r"Plateau monitors 'valid/loss', but there is no validation"):
        trainer().fit(sgd_task(line()), pairs([1]), stages=stages)


def noisy_experiment(stages: Callable[[], list[lw.Stage]], **settings: Any) -> Experiment:
    net = classifier(dropout=0.3)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), 0.05))
    data = loader(12, noisy=True, batch_size=5, shuffle=True)
    return Experiment(task, data, loader(9, batch_size=5), stages(), settings)


def test_stages_with_plateaus_callbacks_and_losses_resume_exactly_at_every_step(tmp_path: Path) -> None:
    """Two plateaus, the best of the first kept, a loss and an optimizer of the second's own, a counting callback."""

    def stages() -> list[lw.Stage]:
        return [
            lw.Stage("a", until=["9 epochs", lw.Plateau(patience=1)], callbacks=[lw.KeepBest(), Counts()]),
            lw.Stage(
                "b", until=["4 epochs", lw.Plateau(patience=2)], validate_every="2 steps", callbacks=[Counts()],
                loss=nn.CrossEntropyLoss(label_smoothing=0.3),
                optimizer=lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
            ),
        ]  # fmt: skip

    run = resumed_at_every_step(lambda: noisy_experiment(stages), tmp_path)
    assert {record["stage"] for record in run.history} == {"a", "b"}
    steps = [callback.steps for callback in run.callbacks if isinstance(callback, Counts)]
    assert len(steps) == 2
    assert sum(steps) == run.progress.step


class Counts(lw.Callback):
    steps = 0

    def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Any) -> None:
        self.steps = state["steps"]


# ---------------------------------------------------------------------------------------------------------- callbacks


def test_callbacks_of_a_stage_are_active_in_it_only_and_come_last() -> None:
    """Begin and end of the fit reach them all; everything else those of the open stage, after the Trainer's."""
    seen: list[tuple[str, str]] = []

    def named(name: str) -> lw.Callback:
        return recorder(seen, note=lambda hook, run, args: (name, hook))

    stages = [lw.Stage("a", "1 epoch", callbacks=[named("A")]), lw.Stage("b", "1 epoch", callbacks=[named("B")])]
    user = trainer(callbacks=[named("T")])
    user.on(lw.Event.STEP_END)(lambda run: seen.append(("H", "on_step_end")))
    user.fit(sgd_task(line()), pairs([1]), pairs([1]), stages=stages)
    hooks = {who: [hook for name, hook in seen if name == who] for who in "TAB"}
    assert hooks["T"] == [
        "on_fit_start", *(inner := [h for h in hooks["A"] if not h.startswith("on_fit")]), *inner, "on_fit_end",
    ]  # fmt: skip
    assert hooks["A"] == hooks["B"] == ["on_fit_start", *inner, "on_fit_end"]
    assert "map_loss" in inner
    assert "on_validation_end" in inner
    order = [who for who, hook in seen if hook == "on_step_end"]
    assert order == ["T", "H", "A", "T", "H", "B"]
    assert seen.index(("B", "on_stage_start")) > seen.index(("A", "on_stage_end"))


def test_an_early_stop_of_a_stage_watches_that_stage_only() -> None:
    stages = [lw.Stage("a", "4 epochs"), lw.Stage("b", "9 epochs", callbacks=[lw.EarlyStopping(patience=2)])]
    run = trainer().fit(Scripted(5, 5, 5, 5, 4, 4, 4), pairs([1]), pairs([1]), stages=stages)
    assert run.progress.epoch == 4 + 3
    assert run.status == "stopped"


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (
            lambda: lw.Stage("s", "1 epoch", callbacks=Counts()),
            lw.SettingError,
            r"expected a list of them, such as callbacks=\[",
        ),
        (lambda: fit_stage(callbacks=[Counts]), lw.errors.HookError, "got the class Counts"),
        (
            lambda: fit_stage(callbacks=[lw.Checkpoint()]),
            lw.SettingError,
            r"a Checkpoint belongs to Trainer\(checkpoint",
        ),
        (
            lambda: fit_stage(callbacks=[SHARED]),
            lw.SettingError,
            "one Counts is among the callbacks of the Trainer and",
        ),
        (lambda: lw.Stage("s", "1 epoch", loss=nn.MSELoss), lw.SettingError, "cannot be called; pass a function"),
        (lambda: fit_stage(loss=nn.Linear(1, 1)), lw.SettingError, "has parameters, which no checkpoint would hold"),
        (lambda: fit_stage(task=Bare(), loss=nn.MSELoss()), lw.SettingError, "Bare has none whose place it could take"),
        (lambda: lw.Plateau("valid/loss", patience=0), lw.SettingError, "patience=0: expected a whole number of looks"),
        (lambda: lw.Plateau("valid/thing"), lw.SettingError, "add mode='min'"),
        (lambda: lw.Stage("s", "1 epoch", reuse=3), lw.SettingError, "reuse=3; expected True, False, or a text"),
        (lambda: fit_stage(callbacks=[lw.KeepBest("valid/f1")]), lw.PlanError, "KeepBest monitors 'valid/f1'"),
    ],
)
def test_what_a_stage_cannot_have_is_refused(make: Callable[[], Any], error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize("until", [[], (), "", " ", None, [None], ["2 epochs", ""]])
def test_a_stage_that_says_no_end_is_refused_where_it_is_made(until: Any) -> None:
    with pytest.raises(lw.SettingError) as caught:
        lw.Stage("s", until=until)
    assert str(caught.value) == (
        f"Stage 's': until={until!r} says no end, and it would train forever; write a duration, until='2 epochs', or "
        "several, until=['10 epochs', '2 h'], of which the first one counts"
    )


SHARED = Counts()


class Bare(lw.Task):
    def __init__(self) -> None:
        super().__init__()
        self.net = line()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch: Any) -> Tensor:
        return self.net(batch[0]).mean()


def fit_stage(task: Any = None, **more: Any) -> Any:
    task = sgd_task(line()) if task is None else task
    return trainer(callbacks=[SHARED]).fit(task, pairs([1]), stages=[lw.Stage("s", "1 epoch", **more)])


# ----------------------------------------------------------------------------------------------- loss, best, the loop


def test_a_stage_has_a_loss_of_its_own_for_training_and_validation() -> None:
    net, task = line(1.0), None
    task = lw.Supervised(net, mean_of_preds, torch.optim.SGD(net.parameters(), 0.0))
    own = [lw.Stage("a", "1 epoch"), lw.Stage("b", "1 epoch", loss=nn.MSELoss()), lw.Stage("c", "1 epoch")]
    run = trainer().fit(task, pairs([3]), pairs([2]), stages=own)
    assert run.history["train/loss"] == [3.0, 9.0, 3.0]
    assert run.history["valid/loss"] == [2.0, 4.0, 2.0]
    assert task.loss is mean_of_preds
    own[2].loss = nn.MSELoss()
    with pytest.raises(ZeroDivisionError):
        trainer(callbacks=[acts(on_stage_end=lambda run, stage: 1 / 0)]).fit(
            lw.Supervised(net, mean_of_preds, torch.optim.SGD(net.parameters(), 0.0)), pairs([3]), stages=own[1:]
        )
    assert task.loss is mean_of_preds


def test_the_next_stage_starts_from_the_best_of_this_one(folder: Path) -> None:
    """The weight falls by 1 a step; the second validation is the best. With a folder and without one."""
    for root in (None, folder):
        starts = []
        net = line()
        task = Scripted(5, 3, 4, 9, net=net)
        stages = [lw.Stage("a", "3 epochs", callbacks=[lw.KeepBest("valid/loss")]), lw.Stage("b", "1 epoch")]
        look = acts(on_stage_start=lambda run, stage, net=net, starts=starts: starts.append(net.weight.item()))
        trainer(callbacks=[look], folder=root).fit(task, pairs([1]), pairs([1]), stages=stages)
        assert starts == [0.0, -2.0]
        assert net.weight.item() == -3.0


def test_without_a_number_the_last_weights_stay_and_it_is_said() -> None:
    stages = [lw.Stage("a", "2 epochs", callbacks=[lw.KeepBest("valid/loss")])]
    net = line()
    with pytest.warns(UserWarning, match="KeepBest: valid/loss had no value in stage 'a' that is a number"):
        trainer(nonfinite=None).fit(Scripted(float("nan"), net=net), pairs([1]), pairs([1]), stages=stages)
    assert net.weight.item() == -2.0


def until_easy(run: lw.Run, stage: lw.Stage) -> None:
    """A loop of one's own: each batch is trained on until its loss is small, or the steps are a multiple of three."""
    if run.progress.batch == 0:
        fire(run.hooks.on_epoch_start, run)
    for batch in stage.source.at(run.progress.epoch, run.progress.batch):
        easy = False
        while not easy and run.stop_reason is None:
            result = train_step(run, stage, [batch], None)
            easy = float(result.values["loss"]) < 0.5 or (run.progress.step + 1) % 3 == 0
            count(run, result, 1 if easy else 0)
            after_step(run, stage, result)
    end_epoch(run, stage)


@pytest.mark.capability("TB-08")
def test_a_loop_of_ones_own_in_10_lines_keeps_every_callback_working(folder: Path) -> None:
    """Checkpoints, early stopping, best weights, metrics, logs and every hook work under a loop that a user wrote."""
    seen: list[str] = []
    net = classifier()
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.3, momentum=0.9),
                         metrics={"accuracy": lw.metrics.Accuracy()})  # fmt: skip
    best, stop = lw.KeepBest("valid/accuracy"), lw.EarlyStopping("valid/loss", patience=40)
    saver = lw.Checkpoint("5 steps", monitor="valid/loss")
    user = lw.Trainer(folder=folder, progress=False, checkpoint=saver, callbacks=[recorder(seen), best, stop])
    until = ["30 epochs", lw.Plateau("train/loss", patience=2, min_delta=0.02)]
    run = user.fit(task, loader(23, batch_size=5), loader(9, batch_size=5),
                   stages=[lw.Stage("mine", until, loop=until_easy)])  # fmt: skip
    assert run.status == "done"
    assert stop.looks == run.progress.epoch
    assert run.progress.epoch < 30
    assert 5 * run.progress.epoch < run.progress.step <= 15 * run.progress.epoch
    assert len(run.history) == run.progress.epoch
    assert None not in run.history["train/accuracy"]
    assert best.best == max(run.history["valid/accuracy"])
    assert saver.last is not None
    elsewhere = {hook for hook in HOOKS if hook.startswith(("on_test", "on_predict", "on_exception"))}
    assert set(seen) == set(HOOKS) - elsewhere


def looped(train: Any) -> Experiment:
    net = classifier(dropout=0.2)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.3))
    return Experiment(task, train, stages=[lw.Stage("s", "2 epochs", loop=until_easy)])


def test_a_loop_of_ones_own_resumes_at_the_batch_where_it_stood(tmp_path: Path) -> None:
    dataset = loader(23, noisy=True).dataset
    whole = resumed_at_every_step(lambda: looped(lw.Loader(dataset, 5, shuffle=True)), tmp_path)
    assert whole.progress.step > 2 * 5


def test_what_a_loop_of_ones_own_leaves_open_is_told_by_the_checkpoint(tmp_path: Path) -> None:
    """A DataLoader cannot give a batch again: a checkpoint in the middle of one says so, all others are exact."""

    def make() -> Experiment:
        return looped(loader(23, noisy=True, batch_size=5, shuffle=True))

    seed_all(3)
    whole = make().run(tmp_path / "whole", checkpoint=lw.Checkpoint("1 steps", keep=99, at_end=False))
    expected, refused = left(whole), 0
    assert whole.folder is not None
    says = "the loop of stage 's' has not done with a batch that its data has given"
    for place in list_checkpoints(whole.folder / "checkpoints"):
        seed_all(8)
        if read(place).info["exact"] is True:
            assert same(left(make().run(tmp_path / "again", resume=lw.Resume(place))), expected)
            continue
        refused += 1
        with pytest.raises(lw.CheckpointError, match=says):
            make().run(tmp_path / "again", resume=lw.Resume(place))
    assert 0 < refused == whole.progress.step - 2 * 5


# ------------------------------------------------------------------------------------------------- Adam, and then LBFGS


def test_adam_first_and_lbfgs_after_it_each_in_its_stage(tmp_path: Path) -> None:
    """A stage with an optimizer that calls the step back: the bits of torch's own, and a resume at every step."""

    def parts() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        x = torch.linspace(-1, 1, 20)[:, None]
        return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), [(x, torch.sin(3 * x))]

    def lbfgs(params: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(params, max_iter=4, line_search_fn="strong_wolfe")

    net, data = parts()
    adam, second = torch.optim.Adam(net.parameters(), 0.01), lbfgs(net.parameters())

    def closure() -> Tensor:
        second.zero_grad()
        loss = nn.functional.mse_loss(net(data[0][0]), data[0][1])
        loss.backward()
        return loss

    for _ in range(6):
        adam.zero_grad()
        nn.functional.mse_loss(net(data[0][0]), data[0][1]).backward()
        adam.step()
    for _ in range(5):
        second.step(closure)
    expected = bits(net)[0]

    def make() -> Experiment:
        mine, batches = parts()
        task = lw.Supervised(mine, nn.MSELoss(), torch.optim.Adam(mine.parameters(), 0.01))
        return Experiment(task, batches, stages=[lw.Stage("a", "6 epochs"), lw.Stage("b", "5 epochs", optimizer=lbfgs)])

    run = resumed_at_every_step(make, tmp_path)
    assert same(bits(*run.models.values())[0], expected)
