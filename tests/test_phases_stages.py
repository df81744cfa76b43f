"""Several objectives in one step, several parts of one experiment, and training that goes on where it stood."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.optim.lr_scheduler import LinearLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

import loopwright as lw
from tiny import acts, bits, classifier, line, loader, mean_of_preds, pairs, same, samples, seed_all, sgd_task, trainer

# ------------------------------------------------------------------------------------------------------------ phases


def gan() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
    seed_all(4)
    gen, disc = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 1))
    return gen, disc, torch.optim.Adam(gen.parameters(), 0.01), torch.optim.SGD(disc.parameters(), 0.1, momentum=0.9)


def real(batch_size: int = 5) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(8)
    return DataLoader(TensorDataset(torch.randn(23, 3, generator=generator)), batch_size, shuffle=True)


def disc_loss(gen: nn.Module, disc: nn.Module, x: Tensor) -> Tensor:
    fake = gen(torch.randn(len(x), 2)).detach()
    return bce(disc(x), torch.ones(len(x), 1)) + bce(disc(fake), torch.zeros(len(x), 1))


def gen_loss(gen: nn.Module, disc: nn.Module, x: Tensor) -> Tensor:
    return bce(disc(gen(torch.randn(len(x), 2))), torch.ones(len(x), 1))


class GAN(lw.Task):
    def __init__(self, parts: tuple[Any, ...], every: int = 1, clip: float | None = None) -> None:
        super().__init__()
        self.gen, self.disc, *optimizers = parts
        self.optimizers, self.every, self.clip = optimizers, every, clip

    def configure_optimizers(self) -> Any:
        return dict(zip(("gen", "disc"), self.optimizers, strict=True))

    def phases(self) -> list[lw.Phase]:
        return [
            lw.Phase("disc", self.disc_step, optimizers="disc", clip_norm=self.clip),
            lw.Phase("gen", self.gen_step, optimizers="gen", every=self.every),
        ]

    def disc_step(self, batch: Any) -> Tensor:
        return disc_loss(self.gen, self.disc, batch[0])

    def gen_step(self, batch: Any) -> dict[str, Any]:
        return {"loss": gen_loss(self.gen, self.disc, batch[0]), "size": len(batch[0])}


@pytest.mark.capability("PL-17", "IG-01")
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_gan_in_two_phases_has_the_bits_of_the_hand_written_one(
    every: int, accumulate: int, clip: float | None
) -> None:
    """Two models and optimizers, one moved at every second step, clipped, accumulated: the bits of the loop by hand."""
    gen, disc, gen_optimizer, disc_optimizer = gan()
    step = 0
    for _ in range(2):
        batches = iter(real())
        while window := [x for (x,) in islice(batches, accumulate)]:
            step, total = step + 1, sum(map(len, window))
            for model, optimizer, loss_of in ((disc, disc_optimizer, disc_loss), (gen, gen_optimizer, gen_loss)):
                if model is gen and step % every:
                    continue
                optimizer.zero_grad()
                for x in window:
                    (loss_of(gen, disc, x) * (len(x) / total)).backward()
                if model is disc and clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
    expected = bits(gen, disc, gen_optimizer, disc_optimizer)

    parts = gan()
    run = trainer(epochs=2, accumulate=accumulate).fit(GAN(parts, every, clip), real())
    assert same(bits(*parts), expected)
    assert run.progress.step == step
    assert run.progress.phase_steps == {"disc": step, "gen": step // every}


@pytest.mark.capability("IG-01", "CA-08")
def test_values_of_several_phases_carry_their_names() -> None:
    run = trainer(epochs=1).fit(GAN(gan()), real())
    assert set(run.metrics) == {"train/disc/loss", "train/gen/loss", "train/gen/size", "lr/gen", "lr/disc"}
    assert run.metrics["train/gen/size"] == pytest.approx((4 * 5 * 5 + 3 * 3) / 23)
    assert list(run.history.losses) == ["disc/loss", "gen/loss"]


def test_every_counts_completed_steps_from_one() -> None:
    moved: list[tuple[str, ...]] = []
    watcher = trainer(steps=5)
    watcher.on(lw.Event.STEP_END)(lambda run, result: moved.append(result.moved))
    run = watcher.fit(GAN(gan(), every=2), real())
    assert moved == [("disc",), ("disc", "gen"), ("disc",), ("disc", "gen"), ("disc",)]
    assert run.progress.phase_steps == {"disc": 5, "gen": 2}


def test_a_step_without_a_due_phase_is_counted_and_moves_nothing() -> None:
    net = line()
    moved = []

    class Rarely(lw.Task):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(net.parameters(), 1.0)

        def phases(self) -> list[lw.Phase]:
            return [lw.Phase("main", lambda batch: net(batch[0]).mean(), every=3)]

    task = Rarely()
    task.net = net
    watch = acts(on_step_end=lambda run, result: moved.append((result.moved, result.weight)))
    run = trainer(epochs=1, callbacks=[watch]).fit(task, pairs([1], [2], [3, 5], [6]))
    assert net.weight.item() == -4.0
    assert moved == [((), 1), ((), 1), (("main",), 2.0), ((), 1)]
    assert run.progress.samples == 5


def test_a_phase_without_optimizers_moves_nothing_by_itself() -> None:
    net = line()
    optimizer = torch.optim.SGD(net.parameters(), 1.0)

    class Mixed(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.seen = net, 0.0

        def configure_optimizers(self) -> Any:
            return optimizer

        def phases(self) -> list[lw.Phase]:
            return [lw.Phase("look", self.look, optimizers=()), lw.Phase("move", self.move)]

        def look(self, batch: Any) -> Any:
            self.seen += batch[0].sum().item()
            return {"seen": self.seen}

        def move(self, batch: Any) -> Tensor:
            return self.net(batch[0]).mean()

    run = trainer(epochs=1).fit(Mixed(), pairs([1], [2]))
    assert net.weight.item() == -3.0
    assert run.history["train/look/seen"] == [(1 + 3) / 2]
    assert run.progress.phase_steps == {"look": 2, "move": 2}


@pytest.mark.parametrize("hook", ["map_loss", "on_grads_ready"])
def test_skip_step_in_a_later_phase_keeps_what_earlier_phases_did(hook: str) -> None:
    def drop(run: lw.Run, value: Any, *rest: Any) -> Any:
        phase = value if hook == "on_grads_ready" else rest[-1]
        if phase.name == "gen" and run.progress.step == 1:
            raise lw.SkipStep
        return None if hook == "on_grads_ready" else value

    values: list[set[str]] = []
    watch = acts(**{hook: drop}, on_step_end=lambda run, result: values.append(set(result.values)))
    run = trainer(steps=3, callbacks=[watch]).fit(GAN(gan()), real())
    assert run.progress.phase_steps == {"disc": 3, "gen": 2}
    full = {"disc/loss", "gen/loss", "gen/size"}
    assert values == [full, {"disc/loss"}, full]


def test_stop_epoch_while_batches_are_collected_keeps_those_before() -> None:
    def stop(run: lw.Run, batch: Any) -> Any:
        if run.progress.step == 1 and len(run.task.calls) == 5:
            raise lw.StopEpoch
        run.task.calls = [*run.task.calls, 1]
        return batch

    task = GAN(gan())
    task.calls = []
    run = trainer(epochs=1, accumulate=3, callbacks=[acts(map_batch=stop)]).fit(task, real(2))
    assert run.progress[:6] == (1, 1, 0, 2, 0, 5 * 2)


def test_a_phase_can_have_a_schedule_of_its_own() -> None:
    parts = gan()

    class Scheduled(GAN):
        def phases(self) -> list[lw.Phase]:
            disc, gen = super().phases()
            gen.schedule = lambda optimizer: lw.per_step(StepLR(optimizer, 1, gamma=0.5))
            return [disc, gen]

    run = trainer(steps=4).fit(Scheduled(parts, every=2), real())
    assert run.optimizers["gen"].param_groups[0]["lr"] == 0.01 * 0.5**2  # stepped when the phase ran
    assert run.optimizers["disc"].param_groups[0]["lr"] == 0.1


def test_an_unknown_optimizer_of_a_phase_is_refused_with_the_known_ones() -> None:
    class Wrong(GAN):
        def phases(self) -> list[lw.Phase]:
            return [lw.Phase("main", self.disc_step, optimizers="dics")]

    with pytest.raises(lw.SettingError) as caught:
        trainer(epochs=1).fit(Wrong(gan()), real())
    assert str(caught.value) == (
        "phase 'main' moves the optimizer 'dics', which does not exist. Known: 'disc', 'gen'. Did you mean 'disc'?"
    )


# ------------------------------------------------------------------------------------------------------------ stages


def two_layers() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    nn.init.constant_(net[0].weight, 1.0)
    nn.init.constant_(net[1].weight, 1.0)
    return net


def sgd(lr: float) -> Any:
    return lambda params: torch.optim.SGD(params, lr=lr)


@pytest.mark.capability("CA-13", "CA-19")
def test_head_first_then_all_with_own_rates_data_and_lengths() -> None:
    """Two stages as data: each trains its own parameters with its own rate on its own batches, for its own time."""
    net, seen = two_layers(), []
    task = lw.Supervised(net, mean_of_preds, sgd(100.0))
    before = [p.requires_grad for p in net.parameters()]
    watch = acts(
        on_stage_start=lambda run, stage: seen.append(("start", stage.name)),
        on_stage_end=lambda run, stage: seen.append(("end", stage.name, *(p.item() for p in net.parameters()))),
    )
    run = trainer(callbacks=[watch]).fit(
        task,
        pairs([9.0]),
        stages=[
            lw.Stage("head", "2 epochs", source=pairs([1.0]), train="module.1.*", optimizer=sgd(0.5)),
            lw.Stage("all", "1 step", source=pairs([2.0], [2.0]), optimizer=sgd(0.25)),
        ],
    )
    # head: w1 = 1 - 0.5 - 0.5; all: w0 - 0.25 * 2 * w1, w1 - 0.25 * 2 * w0
    assert seen == [("start", "head"), ("end", "head", 1.0, 0.0), ("start", "all"), ("end", "all", 1.0, -0.5)]
    assert [p.requires_grad for p in net.parameters()] == before
    assert run.progress[:6] == (2, 2, 1, 3, 0, 3)
    assert [record["stage"] for record in run.history] == ["head", "head"]
    assert list(run.optimizers) == ["main", "head.main", "all.main"]


@pytest.mark.parametrize("stop_at", [2, 3])
def test_frozen_parameters_are_those_of_the_stage_and_come_back_after_an_error(stop_at: int) -> None:
    net = two_layers()
    net[0].weight.requires_grad_(False)
    flags = []

    def look(run: lw.Run, loss: Any, *rest: Any) -> Any:
        flags.append([p.requires_grad for p in net.parameters()])
        if len(flags) == stop_at:
            raise ValueError("far enough")
        return loss

    stages = [
        lw.Stage("as given", "1 epoch"),
        lw.Stage("first", "1 epoch", train="*.0.*"),
        lw.Stage("both", "1 epoch", train="*", freeze="module.0.*"),
    ]
    with pytest.raises(ValueError, match="far enough"):
        trainer(callbacks=[acts(map_loss=look)]).fit(
            lw.Supervised(net, mean_of_preds, torch.optim.SGD(net.parameters(), 0.1)), pairs([1.0]), stages=stages
        )
    assert flags == [[False, True], [True, False], [False, True]][:stop_at]
    assert [p.requires_grad for p in net.parameters()] == [False, True]


def test_a_factory_schedule_is_made_once_for_all_stages() -> None:
    net = line()
    task = lw.Supervised(
        net, mean_of_preds, sgd(1.0), schedule=lambda o: LinearLR(o, start_factor=0.5, end_factor=1.0, total_iters=4)
    )
    rates = []
    watch = acts(on_step_start=lambda run: rates.append(run.lr))
    stages = [lw.Stage("one", "2 epochs"), lw.Stage("two", "2 epochs")]
    trainer(callbacks=[watch]).fit(task, pairs([1.0]), stages=stages)
    assert rates == [0.5, 0.625, 0.75, 0.875]


@pytest.mark.parametrize(
    ("until", "steps"),
    [("7 steps", 7), (7, 7 * 5), ("2 epochs", 10), ("30 samples", 7), ("1.4 epochs", 7), (["9 epochs", "3 steps"], 3)],
)
def test_a_stage_ends_where_its_duration_says(until: Any, steps: int) -> None:
    """Steps, epochs, parts of epochs, samples, or whichever comes first; a bare number counts epochs."""
    data = loader(23, batch_size=5)  # 5 batches: 5, 5, 5, 5, 3
    run = trainer().fit(
        sgd_task(classifier(), loss=nn.CrossEntropyLoss(), lr=0.1), data, stages=[lw.Stage("main", until)]
    )
    assert run.progress.step == steps
    assert run.status == "done"


def test_a_run_that_ends_with_the_last_batch_has_completed_its_epoch() -> None:
    for stop in (False, True):
        user = trainer(steps=99 if stop else 3)
        user.on(lw.Event.STEP_END(once=3))(lambda run, stop=stop: run.request_stop("enough") if stop else None)
        run = user.fit(sgd_task(line()), pairs([1], [2], [4]))
        assert run.progress[1:4] == (1, 0, 3)
        assert len(run.history) == 1


def test_a_stage_ends_after_its_time() -> None:
    run = trainer(time="0.2 s").fit(sgd_task(line(), lr=0.0), pairs([1.0], [1.0]))
    assert 0.2 <= run.progress.seconds < 5.0
    assert run.progress.step > 2


def test_a_part_of_an_epoch_needs_data_of_known_length() -> None:
    with pytest.raises(lw.SettingError) as caught:
        trainer(epochs=1.5).fit(sgd_task(line()), lambda: iter(pairs([1.0], [1.0])))
    assert "'1.5 epochs' needs data with a known number of batches; count steps instead" in str(caught.value)


def test_a_stage_that_ends_inside_an_epoch_is_followed_by_a_new_epoch() -> None:
    epochs = []
    net = line()
    watch = acts(on_epoch_start=lambda run: epochs.append((run.progress.stage, run.progress.epoch)))
    run = trainer(callbacks=[watch]).fit(
        sgd_task(net), pairs([1], [2], [4]), stages=[lw.Stage("a", "2 steps"), lw.Stage("b", "2 steps")]
    )
    assert epochs == [(0, 0), (1, 1)]
    assert net.weight.item() == -(1 + 2 + 1 + 2)
    assert run.progress[:5] == (2, 1, 2, 4, 0)


def test_stages_inherit_what_they_leave_out() -> None:
    net = line()
    run = trainer(accumulate=2, clip_norm=1.5).fit(
        sgd_task(net), pairs([1], [3]), stages=[lw.Stage("a", "1 epoch"), lw.Stage("b", "1 epoch", accumulate=1)]
    )
    assert run.progress.step == 3
    assert net.weight.item() == pytest.approx(-(1.5 + 1 + 1.5))  # the mean 2 clipped; then 1, and 3 clipped


def test_lengths_from_the_trainer_and_from_stages_exclude_one_another() -> None:
    with pytest.raises(lw.SettingError) as caught:
        trainer(epochs=1).fit(sgd_task(line()), pairs([1.0]), stages=[lw.Stage("a", "1 epoch")])
    assert str(caught.value) == (
        "both the Trainer and the stages say how long to train; leave epochs, steps and time out of the Trainer"
    )


# ----------------------------------------------------------------------------------------------------------- going on


def experiment(kind: str = "adam") -> tuple[lw.Supervised, nn.Module, torch.optim.Optimizer]:
    net = classifier(dropout=0.5)
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    seed_all(5)
    schedule = lambda o: LinearLR(o, start_factor=0.1, total_iters=5)  # noqa: E731
    return lw.Supervised(net, nn.CrossEntropyLoss(), optimizer, schedule=schedule), net, optimizer


LOADERS = {
    "gathered": lambda: loader(batch_size=7, shuffle=True),
    "own generator": lambda: loader(batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "noisy": lambda: loader(batch_size=7, shuffle=True, noisy=True),
    "noisy, own generator": lambda: loader(
        batch_size=7, shuffle=True, noisy=True, generator=torch.Generator().manual_seed(3)
    ),
    "noisy, workers": lambda: loader(batch_size=7, shuffle=True, noisy=True, num_workers=1),
    "ours": lambda: lw.Loader(loader(noisy=True).dataset, 7, shuffle=True),
}


@pytest.mark.parametrize("data", LOADERS)
@pytest.mark.parametrize("first", ["2 epochs", "12 steps", "8 steps"])
def test_fit_again_goes_on_as_one_long_run(data: str, first: str) -> None:
    """To a new total, from an epoch's end (12 steps: 2 epochs) or from inside an epoch: the same bits, one history."""
    task, net, optimizer = experiment()
    long = trainer(epochs=4).fit(task, LOADERS[data]())
    expected = bits(net, optimizer)

    task, net, optimizer = experiment()
    train, amount = LOADERS[data](), int(first.split()[0])
    trainer(**{first.split()[1]: amount}).fit(task, train)
    run = trainer(epochs=4).fit(task, train)
    assert run.progress._replace(seconds=0) == long.progress._replace(seconds=0)
    assert run.history.losses == long.history.losses
    assert run.history["train/loss"] == long.history["train/loss"]
    assert run.lr == long.lr
    assert same(bits(net, optimizer), expected)


def test_fit_again_after_a_stop_request_goes_on_inside_the_epoch() -> None:
    task, net, optimizer = experiment()
    trainer(epochs=2).fit(task, loader(batch_size=7, shuffle=True))
    expected = bits(net, optimizer)

    task, net, optimizer = experiment()
    train, starts = loader(batch_size=7, shuffle=True), []
    stopper = trainer(epochs=2)
    stopper.on(lw.Event.STEP_END(once=4))(lambda run: run.request_stop("enough"))
    stopper.on(lw.Event.EPOCH_START | lw.Event.STAGE_START)(lambda run: starts.append(run.progress.step))
    run = stopper.fit(task, train)
    assert (run.status, run.stop_reason, run.progress.batch) == ("stopped", "enough", 4)
    run = stopper.fit(task, train)
    assert (run.status, run.stop_reason, run.progress.epoch, run.progress.batch) == ("done", None, 2, 0)
    assert starts == [0, 0, 6]  # the stage and the open epoch do not start twice
    assert same(bits(net, optimizer), expected)


def test_going_on_with_other_data_begins_a_new_epoch() -> None:
    net = line()
    task = sgd_task(net)
    trainer(steps=1).fit(task, pairs([1], [2]))
    run = trainer(epochs=2).fit(task, pairs([4], [8]))
    assert net.weight.item() == -(1 + 4 + 8)
    assert run.progress[:4] == (1, 2, 0, 3)


def test_another_task_starts_anew() -> None:
    net = line()
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    setting = trainer(epochs=1)
    for _ in range(2):
        run = setting.fit(lw.Supervised(net, mean_of_preds, optimizer), pairs([1], [2]))
        assert run.progress[:4] == (1, 1, 0, 2)
    assert net.weight.item() == -6.0


def test_a_finished_task_says_that_there_is_nothing_to_do() -> None:
    task = sgd_task(line())
    trainer(epochs=1).fit(task, pairs([1], [2]))
    with pytest.warns(UserWarning, match="already been trained for 1 epochs \\(2 steps\\): nothing to do"):
        run = trainer(epochs=1).fit(task, pairs([1], [2]))
    assert run.progress.step == 2


def test_stages_go_on_with_their_own_optimizers_after_a_stop() -> None:
    def fitted(stop_at: int | None) -> list[Any]:
        net, made = classifier(), []

        def adam(params: Any) -> torch.optim.Optimizer:
            made.append(torch.optim.Adam(params, 0.05))
            return made[-1]

        seed_all(5)
        task = lw.Supervised(net, nn.CrossEntropyLoss(), sgd(0.1))
        train = loader(batch_size=7, shuffle=True)
        stages = [
            lw.Stage("head", "1 epoch", train="module.2.*", optimizer=(adam, lambda o: lw.per_step(LinearLR(o)))),
            lw.Stage("all", "1 epoch", optimizer=(adam, lambda o: lw.per_step(LinearLR(o)))),
        ]
        stopper = trainer()
        if stop_at:
            stopper.on(lw.Event.STEP_END(once=stop_at))(lambda run: run.request_stop("enough"))
        run = stopper.fit(task, train, stages=stages)
        if stop_at:
            run = stopper.fit(task, train, stages=stages)
        assert run.progress[:5] == (2, 2, 0, 12, 0)
        assert len(made) == 2
        return bits(net, *made)

    expected = fitted(None)
    for stop_at in (4, 6, 10):
        assert same(fitted(stop_at), expected), stop_at


def test_other_stages_come_after_those_of_an_earlier_fit() -> None:
    task = sgd_task(line())
    lw.Trainer(folder=None, progress=False).fit(
        task, pairs([1.0, 2.0]), stages=[lw.Stage("a", until="1 epoch"), lw.Stage("b", until="1 epoch")]
    )
    run = trainer(epochs=3).fit(task, pairs([1.0, 2.0]))
    assert (run.progress.epoch, run.progress.stage) == (5, 1)


@pytest.mark.parametrize("every", ["1 epoch", "2 epochs"])
def test_a_plateau_counts_each_validation_once(every: str) -> None:
    task = sgd_task(line(), schedule=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5))
    run = trainer(epochs=4, validate_every=every).fit(task, pairs([1.0, 2.0]), valid=pairs([1.0, 2.0]))
    scheduler = run.stages[0].phases[0].epoch_schedulers[0].torch
    assert scheduler.last_epoch == {"1 epoch": 4, "2 epochs": 2}[every]


def test_an_optimizer_given_to_a_phase_is_one_of_the_run() -> None:
    class Own(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = line()
            self.adam = torch.optim.Adam(self.net.parameters())

        def phases(self) -> list[lw.Phase]:
            return [lw.Phase("p", lambda batch: self.net(batch[0]).mean(), optimizers=self.adam)]

        def configure_optimizers(self) -> dict[str, Any]:
            return {}

    task = Own()
    run = trainer(epochs=1).fit(task, pairs([1.0]))
    assert run.optimizers == {"p": task.adam}


@pytest.mark.parametrize("kind", ["stage", "phase"])
def test_two_of_one_name_are_refused(kind: str) -> None:
    stages = [lw.Stage("a", until="1 epoch"), lw.Stage("a", until="1 epoch")]
    task = sgd_task(line())
    if kind == "phase":
        stages = [lw.Stage("s", until="1 epoch", phases=[lw.Phase("a", task.training_step) for _ in range(2)])]
    with pytest.raises(lw.SettingError, match=f"two {kind}s are named 'a'; give each {kind} a name of its own"):
        lw.Trainer(folder=None, progress=False).fit(task, pairs([1.0]), stages=stages)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: lw.Phase("p", print, every=0),
        lambda: lw.Phase("p", print, clip_norm=-1.0),
        lambda: lw.Stage("s", "1 epoch", accumulate=0),
    ],
)
def test_a_phase_or_stage_that_cannot_work_is_refused_where_it_is_made(wrong: Any) -> None:
    with pytest.raises(lw.SettingError, match="expected a"):
        wrong()


def test_a_schedule_on_an_optimizer_that_two_phases_share_is_stepped_once() -> None:
    net = line()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    task = lw.Supervised(net, mean_of_preds, optimizer, schedule=schedule)
    stage = lw.Stage("s", "1 epoch", phases=[lw.Phase(name, task.training_step) for name in ("a", "b")])
    run = lw.Trainer(folder=None, progress=False).fit(task, pairs([1.0]), stages=[stage])
    assert run.lr == 0.5


def test_the_mean_of_an_epoch_holds_nothing_of_an_earlier_stage() -> None:
    task = sgd_task(line(1.0), lr=0.0)
    stages = [lw.Stage("a", "1 steps", pairs([10.0], [10.0])), lw.Stage("b", "1 epoch", pairs([1.0]))]
    run = lw.Trainer(folder=None, progress=False).fit(task, pairs([0.0]), stages=stages)
    assert run.history["train/loss"] == [1.0]


def test_an_error_of_a_later_phase_is_told_as_it_is() -> None:
    def fails(batch: Any) -> Tensor:
        raise RuntimeError("out of memory")

    task = sgd_task(line())
    stage = lw.Stage("s", "1 epoch", phases=[lw.Phase("a", task.training_step), lw.Phase("b", fails)])
    with pytest.raises(RuntimeError, match=r"^out of memory\n"):
        lw.Trainer(folder=None, progress=False).fit(task, pairs([1.0]), stages=[stage])


def test_freezing_what_is_in_no_optimizer_is_no_problem() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    task = lw.Supervised(net, mean_of_preds, torch.optim.SGD(net[1].parameters(), lr=0.1))
    stages = [lw.Stage("head", "1 epoch", freeze="module.0.*")]
    assert lw.Trainer(folder=None, progress=False).plan(task, pairs([1.0]), stages=stages).problems == []


class Fails(lw.Callback):
    """An error inside of the step after ``step``, once."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_grads_ready(self, run: lw.Run, phase: lw.Phase, grad_norm: Any) -> None:
        if run.progress.step == self.step:
            self.step = -1
            raise OverflowError("once")


@pytest.mark.parametrize("data", ["torch", "gather", "ours", "list"])
def test_fit_again_goes_on_after_an_error_inside_a_step(data: str) -> None:
    """Where the source can give the batch again it does; otherwise the next epoch begins, and the fit says so."""
    x, y = samples(12)
    makes: dict[str, Callable[[], Any]] = {
        "torch": lambda: loader(12, noisy=True, batch_size=4),
        "gather": lambda: loader(12, batch_size=4),
        "ours": lambda: lw.Loader((x, y), 4),
        "list": lambda: list(zip(x.split(4), y.split(4), strict=True)),
    }
    net = classifier()
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    user, train = trainer(epochs=3, callbacks=[Fails(2)]), makes[data]()
    with pytest.raises(OverflowError):
        user.fit(task, train)
    if data != "torch":
        run = user.fit(task, train)
        assert run.progress[:4] == (1, 3, 0, 9)
        return
    says = (
        "the last fit ended inside a step: 2 batches of epoch 1 were trained on, but its data had already given 3, and "
        "cannot go back. This fit goes on with epoch 2; ask the Trainer for one more epoch to make up for it"
    )
    with pytest.warns(lw.errors.LoopwrightWarning) as warned:
        run = user.fit(task, train)
    assert [str(w.message) for w in warned] == [says]
    assert warned[0].filename == __file__
    assert run.progress[:4] == (1, 3, 0, 8)
    assert [record["epoch"] for record in run.history] == [2, 3]
    losses = run.history.losses["loss"]
    assert run.history["train/loss"][0] == pytest.approx(sum(losses[2:5]) / 3)


@pytest.mark.parametrize("other", ["data", "stages"])
def test_the_record_after_an_epoch_that_was_closed_holds_its_own_steps_only(other: str) -> None:
    net = line()
    task = sgd_task(net)
    trainer(steps=1).fit(task, pairs([100], [2]))
    weight = net.weight.item()
    if other == "data":
        run = trainer(epochs=2).fit(task, pairs([4]))
    else:
        run = trainer().fit(task, pairs([4]), stages=[lw.Stage("after", until="1 epoch")])
    assert run.history[-1]["train/loss"] == 4 * weight


def test_a_plan_leaves_the_open_epoch_of_the_task_as_it_is() -> None:
    net = line()
    task, data = sgd_task(net), pairs([100], [2])
    trainer(steps=1).fit(task, data)
    trainer(epochs=2).plan(task, pairs([4]))
    run = trainer(epochs=1).fit(task, data)
    assert run.history["train/loss"] == [(0 + 2 * -100) / 2]


def test_a_second_fit_writes_where_its_own_settings_say(tmp_path: Path) -> None:
    """The same folder and name: the same run folder. Another one: a new folder. None: nothing."""
    task, data = sgd_task(line()), pairs([1], [2])

    def folder(epochs: int, root: Path | str | None, name: str | None = None) -> Path | None:
        return trainer(epochs=epochs, folder=root, name=name).fit(task, data).folder

    def written() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    first = folder(1, tmp_path / "a")
    assert first is not None
    assert folder(2, str(tmp_path / "a")) == first
    before = written()
    assert folder(3, None) is None
    assert written() == before
    other = folder(4, tmp_path / "b")
    assert other is not None
    assert other.is_relative_to(tmp_path / "b")
    named = folder(5, tmp_path / "b", "named")
    assert named is not None
    assert named.parent.name == "named"
    shutil.rmtree(named)
    again = folder(6, tmp_path / "b", "named")
    assert again is not None
    assert again.is_dir()
