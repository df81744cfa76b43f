"""EMA and SWA are torch's AveragedModel, updated as by hand; validation sees them and training does not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import loopwright as lw
from every_step import Experiment, resumed_at_every_step
from loopwright.errors import SettingError
from tiny import acts, classifier, line, loader, pairs, same, samples, seed_all, sgd_task, trainer


def task(net: nn.Module, **more: Any) -> lw.Supervised:
    return lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.AdamW(net.parameters(), 0.05), **more)


def fit(*callbacks: Any, net: nn.Module | None = None, epochs: int = 3, **settings: Any) -> tuple[nn.Module, lw.Run]:
    """3 epochs of 5 steps, with dropout and batch norm, validated after each epoch unless ``valid`` says no."""
    torch.manual_seed(4)
    net = net or classifier(dropout=0.2, batch_norm=True)
    valid = loader(9, batch_size=4) if settings.pop("valid", True) else None
    run = trainer(epochs=epochs, callbacks=list(callbacks), **settings).fit(
        task(net), loader(20, batch_size=4, shuffle=True), valid
    )
    return net, run


def by_hand(every: str = "step", *, start: int = 0, epochs: int = 3, **how: Any) -> tuple[nn.Module, AveragedModel]:
    """The same training in a loop, with torch's own class."""
    torch.manual_seed(4)
    net = classifier(dropout=0.2, batch_norm=True)
    averaged, optimizer = AveragedModel(net, **how), torch.optim.AdamW(net.parameters(), 0.05)
    data = loader(20, batch_size=4, shuffle=True)
    for epoch in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            if every == "step":
                averaged.update_parameters(net)
        if every == "epoch" and epoch >= start:
            averaged.update_parameters(net)
    return net, averaged


@pytest.mark.parametrize("buffers", [False, True])
def test_ema_has_the_bits_of_torchs_averaged_model(buffers: bool) -> None:
    net, averaged = by_hand(multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=buffers)
    ema = lw.EMA(0.9, buffers=buffers)
    ours, _ = fit(ema)
    assert same(ours.state_dict(), net.state_dict())
    assert same(ema.averages["model"].state_dict(), averaged.state_dict())


def test_swa_has_the_bits_of_torchs_averaged_model() -> None:
    net, averaged = by_hand("epoch", start=1, epochs=4)
    swa = lw.SWA("1 epoch", batch_norm=False)
    ours, _ = fit(swa, epochs=4)
    assert same(ours.state_dict(), net.state_dict())
    assert swa.updates == 4  # after the epochs 1 to 4
    _, averaged = by_hand("epoch", start=0, epochs=4)
    assert same(swa.averages["model"].state_dict(), averaged.state_dict())


def test_swa_starts_when_as_much_as_it_says_has_been_trained() -> None:
    _, averaged = by_hand("epoch", start=2, epochs=4)
    swa = lw.SWA("3 epochs", batch_norm=False)
    fit(swa, epochs=4)
    assert same(swa.averages["model"].state_dict(), averaged.state_dict())
    assert swa.updates == 2


@pytest.mark.parametrize("valid", [False, True])
def test_watching_changes_nothing(valid: bool) -> None:
    """Training has the bits that it has without, and the average those that it has without a validation."""
    plain, _ = fit(valid=valid)
    ema = lw.EMA(0.9)
    ours, _ = fit(ema, valid=valid)
    assert same(ours.state_dict(), plain.state_dict())
    without = lw.EMA(0.9)
    fit(without, valid=False)
    assert same(
        ema.averages["model"].state_dict()["module.0.weight"], without.averages["model"].module[0].weight.detach()
    )


def test_validation_sees_the_average_and_training_the_weights() -> None:
    ema = lw.EMA(0.9)
    seen: list[Any] = []
    look = acts(
        on_eval_batch_end=lambda run, output, batch: seen.append(run.models["model"][0].weight.detach().clone())
    )
    net, run = fit(ema, look, epochs=2)
    averaged = ema.averages["model"].module[0].weight
    assert torch.equal(seen[-1], averaged)
    assert not torch.equal(net[0].weight, averaged)
    again = trainer().validate(task(net), loader(9, batch_size=4))
    assert again["valid/loss"] != run.metrics["valid/loss"]
    with ema.applied():
        assert trainer().validate(task(net), loader(9, batch_size=4))["valid/loss"] == run.metrics["valid/loss"]
    assert not torch.equal(net[0].weight, averaged)


def test_without_evaluate_validation_sees_the_weights() -> None:
    _, plain = fit()
    _, run = fit(lw.EMA(0.9, evaluate=False))
    assert run.metrics == plain.metrics


def test_a_validation_within_the_validation_leaves_the_average_in_place() -> None:
    """A handler may look at a model by ``trainer.validate``, whose hooks are those of the same callbacks."""
    ema, seen = lw.EMA(0.9), []

    def look(run: lw.Run, output: Any, batch: Any) -> None:
        if run.stages:
            before = run.models["model"][0].weight.clone()
            trainer(callbacks=[ema]).validate(task(run.models["model"]), loader(9, batch_size=4))
            seen.append(torch.equal(run.models["model"][0].weight, before))

    net, _ = fit(ema, acts(on_eval_batch_end=look), epochs=1)
    plain, _ = fit(epochs=1)
    assert seen == [True] * 3
    assert same(net.state_dict(), plain.state_dict())


def test_a_validation_that_a_signal_cuts_short_puts_the_weights_back() -> None:
    plain, _ = fit(epochs=1)
    ema = lw.EMA(0.9)

    def stop(run: lw.Run, output: Any, batch: Any) -> None:
        run.request_stop("SIGTERM")

    torch.manual_seed(4)
    net = classifier(dropout=0.2, batch_norm=True)
    with pytest.raises(SystemExit):
        fit(ema, acts(on_eval_batch_end=stop), net=net, epochs=1)
    assert same(net.state_dict(), plain.state_dict())


def test_an_error_in_a_validation_puts_the_weights_back() -> None:
    plain, _ = fit(epochs=1)

    def fail(run: lw.Run, output: Any, batch: Any) -> None:
        raise ZeroDivisionError

    net = classifier(dropout=0.2, batch_norm=True)
    with pytest.raises(ZeroDivisionError):
        fit(lw.EMA(0.9), acts(on_eval_batch_end=fail), net=net, epochs=1)
    assert same(net.state_dict(), plain.state_dict())


def test_the_models_have_the_average_after_the_fit_only_where_that_is_asked_for() -> None:
    kept, swapped = lw.EMA(0.9), lw.EMA(0.9, replace_at_end=True)
    plain, _ = fit(kept)
    net, _ = fit(swapped)
    averaged = kept.averages["model"].module
    assert same([p.detach() for p in net.parameters()], [p.detach() for p in averaged.parameters()])
    assert not torch.equal(plain[0].weight, averaged[0].weight)
    assert torch.equal(net[1].running_mean, plain[1].running_mean)


def test_warm_up_begins_with_a_smaller_decay() -> None:
    """1, then (1 + n) / (10 + n) for the n-th update after the first, up to the decay."""
    ema, seen = lw.EMA(0.3, warmup=True), []
    fit(ema, acts(on_step_end=lambda run, result: seen.append(run.models["model"][0].bias.detach().clone())), epochs=1)
    expected = seen[0]
    for n, value in enumerate(seen[1:], 1):
        expected = expected.lerp(value, 1 - min(0.3, (1 + n) / (10 + n)))
    assert torch.equal(ema.averages["model"].module[0].bias, expected)


@pytest.mark.parametrize(("every", "updates"), [("1 step", 15), ("4 steps", 3), ("1 epoch", 3), ("2 epochs", 1)])
def test_it_takes_the_weights_as_often_as_it_says(every: str, updates: int) -> None:
    ema = lw.EMA(0.9, every=every)
    net, _ = fit(ema)
    assert ema.updates == ema.averages["model"].n_averaged.item() == updates
    before = ema.averages["model"].module[0].weight.clone()
    fit(ema, net=net)  # another run begins anew
    assert ema.updates == ema.averages["model"].n_averaged.item() == updates
    assert not torch.equal(ema.averages["model"].module[0].weight, before)


class Gan(lw.Task):
    def __init__(self) -> None:
        super().__init__()
        self.gen, self.disc = classifier(seed=1), classifier(seed=2)

    def models(self) -> dict[str, nn.Module]:
        return {"gen": self.gen, "disc": self.disc}

    def configure_optimizers(self) -> dict[str, Any]:
        return {name: torch.optim.SGD(net.parameters(), 0.1) for name, net in self.models().items()}

    def phases(self) -> list[lw.Phase]:
        return [
            lw.Phase("disc", lambda batch: self.disc(batch[0]).square().mean(), "disc"),
            lw.Phase("gen", lambda batch: (self.gen(batch[0]) - self.disc(batch[0])).square().mean(), "gen"),
        ]

    def training_step(self, batch: Any) -> Any:
        return self.gen(batch[0]).mean()


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda: lw.SWA("1 epoch", batch_norm=False), [10, 15]),
        (lambda: lw.SWA("2 epochs", batch_norm=False), [10, 15]),
        (lambda: lw.EMA(0.5, every="1 epoch"), [10, 15]),
        (lambda: lw.EMA(0.5, every="4 steps"), [8, 12]),
    ],
)
@pytest.mark.parametrize("late", ["stage", "fit"])
def test_where_it_comes_late_it_begins_with_what_is_due_from_there_on(late: str, make: Any, steps: list[int]) -> None:
    """Five steps an epoch: what would have been due in the first one is not made up for at step 6."""
    net, average, at = line(), make(), dict[int, Any]()
    keeps = acts(on_step_end=lambda run, result: at.update({run.progress.step: copy.deepcopy(net)}))
    task, data = sgd_task(net, lr=0.1), pairs(*([float(i)] for i in range(5)))
    if late == "stage":
        stages = [lw.Stage("a", "1 epoch"), lw.Stage("b", "2 epochs", callbacks=[average])]
        trainer(callbacks=[keeps]).fit(task, data, stages=stages)
    else:
        trainer(epochs=1).fit(task, data)
        trainer(epochs=3, callbacks=[keeps, average]).fit(task, data)
    by_hand = AveragedModel(line(), multi_avg_fn=get_ema_multi_avg_fn(0.5) if isinstance(average, lw.EMA) else None)
    for step in steps:
        by_hand.update_parameters(at[step])
    assert average.updates == len(steps)
    assert same(average.averages["model"].state_dict(), by_hand.state_dict())


def test_epochs_that_a_stage_did_not_end_are_not_averaged_in_the_next_one() -> None:
    swa, task, ended = lw.SWA("1 epoch", batch_norm=False), sgd_task(line(), lr=0.1), list[int]()
    ends = acts(on_epoch_end=lambda run: ended.append(run.progress.step))
    stages = [lw.Stage("a", "3 steps"), lw.Stage("b", "2 epochs")]
    trainer(callbacks=[swa, ends]).fit(task, pairs(*([float(i)] for i in range(5))), stages=stages)
    assert ended == [8, 13]
    assert swa.updates == 2


def test_several_models_are_averaged_each_for_itself_or_some_of_them() -> None:
    both, one, gan = lw.EMA(0.5), lw.EMA(0.5, models="gen", evaluate=False), Gan()
    x, y = samples(20)
    run = trainer(epochs=2, callbacks=[both, one]).fit(gan, lw.Loader((x, y), 5), lw.Loader((x, y), 10))
    assert set(both.averages) == {"gen", "disc"}
    assert set(one.averages) == {"gen"}
    assert same(both.averages["gen"].state_dict(), one.averages["gen"].state_dict())
    with both.applied():
        assert gan.gen(x).mean().item() == pytest.approx(run.metrics["valid/loss"], rel=1e-4)


def test_a_step_function_of_the_user_is_averaged_as_well() -> None:
    net, seen = nn.Linear(1, 1), []

    def step(run: lw.Run, batch: Any) -> None:
        with torch.no_grad():
            net.weight += 1.0
        seen.append(net.weight.detach().clone())

    ema = lw.EMA(0.5)
    trainer(epochs=1, callbacks=[ema]).run(step, [1, 2, 3], state={"net": net})
    expected = seen[0].lerp(seen[1], 0.5).lerp(seen[2], 0.5)
    assert torch.equal(ema.averages["net"].module.weight, expected)


# ------------------------------------------------------------------------------------------ batch norm of SWA


def test_batch_norm_is_measured_for_the_averaged_weights_by_torchs_function() -> None:
    data = loader(20, batch_size=4)
    swa, plain = lw.SWA("1 epoch", batch_norm=data), lw.SWA("1 epoch", batch_norm=False)
    net, run = fit(swa)
    same_net, _ = fit(plain)
    assert same(net.state_dict(), same_net.state_dict())
    expected = plain.averages["model"]
    update_bn(data, expected)
    assert same(swa.averages["model"].state_dict(), expected.state_dict())
    again = trainer().validate(task(swa.averages["model"].module), loader(9, batch_size=4))
    assert again["valid/loss"] == run.metrics["valid/loss"]


@pytest.mark.parametrize("valid", [False, True])
def test_data_for_batch_norm_that_is_shuffled_changes_nothing_in_training(valid: bool) -> None:
    plain, _ = fit(valid=valid)
    drawn = torch.get_rng_state()
    own = loader(20, batch_size=4, shuffle=True)
    net, _ = fit(lw.SWA("1 epoch", batch_norm=own), valid=valid)
    assert same(net.state_dict(), plain.state_dict())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_tensor_is_data_for_batch_norm_as_well() -> None:
    x, _ = samples(20)
    swa, plain = lw.SWA("1 epoch", batch_norm=x), lw.SWA("1 epoch", batch_norm=False)
    fit(swa)
    fit(plain)
    update_bn([x], plain.averages["model"])
    assert same(swa.averages["model"].state_dict(), plain.averages["model"].state_dict())


def test_after_the_fit_the_model_has_the_average_and_its_statistics() -> None:
    swa = lw.SWA("1 epoch", batch_norm=loader(20, batch_size=4), replace_at_end=True)
    net, _ = fit(swa)
    assert same(net.state_dict(), swa.averages["model"].module.state_dict())
    assert not net[1].running_mean.isnan().any()


def test_swa_goes_with_torchs_schedule_for_it() -> None:
    net, swa = classifier(), lw.SWA("2 epochs")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    what = lw.Supervised(net, nn.CrossEntropyLoss(), optimizer, schedule=SWALR(optimizer, 0.05, anneal_epochs=2))
    trainer(epochs=5, callbacks=[swa]).fit(what, loader(20, batch_size=4))
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert swa.updates == 4


# ------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("validate_every", ["1 epoch", "2 steps"])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_it_resumes_with_the_same_bits_after_every_step(folder: Path, kind: str, validate_every: str) -> None:
    def make() -> Any:
        if kind == "ema":
            return lw.EMA(0.9, every="2 steps", buffers=True)
        return lw.SWA("1 epoch", batch_norm=loader(12, batch_size=4, shuffle=True))

    def fit(seed: int, **how: Any) -> Any:
        torch.manual_seed(seed)
        net, average = classifier(dropout=0.3, batch_norm=True, seed=seed), make()
        user = trainer(
            epochs=3, folder=folder, name="a", checkpoint=lw.Checkpoint("1 step", keep=20), callbacks=[average],
            validate_every=validate_every,
        )  # fmt: skip
        run = user.fit(task(net), loader(16, batch_size=4, shuffle=True), loader(9, batch_size=4), **how)
        return copy.deepcopy([net.state_dict(), average.state_dict(), run.metrics, run.history.losses["loss"].tolist()])

    whole = fit(1)
    paths = sorted(folder.rglob("checkpoints/step-*"))
    assert len(paths) == 12
    for path in paths[:-1]:
        assert same(fit(7, resume=path), whole)


def test_interrupted_in_the_validation_at_the_end_of_an_epoch_no_update_is_made_twice(folder: Path) -> None:
    def fit(cut: bool, **how: Any) -> Any:
        def stop(run: lw.Run, output: Any, batch: Any) -> None:
            if cut and run.progress.epoch == 2:
                run.request_stop("SIGTERM")

        torch.manual_seed(3)
        net, swa = classifier(batch_norm=True), lw.SWA("1 epoch", batch_norm=False)
        user = trainer(epochs=3, folder=folder, name="a", callbacks=[swa, acts(on_eval_batch_end=stop)])
        user.fit(task(net), loader(16, batch_size=4, shuffle=True), loader(9, batch_size=4), **how)
        return copy.deepcopy([net.state_dict(), swa.state_dict()["averages"], swa.updates])

    whole = fit(False)
    with pytest.raises(SystemExit):
        fit(True)
    assert same(fit(False, resume="auto"), whole)


def test_a_task_that_is_fitted_further_goes_on_averaging() -> None:
    whole, ema = lw.EMA(0.9), lw.EMA(0.9)
    fit(whole, epochs=4, valid=False)
    torch.manual_seed(4)
    net = classifier(dropout=0.2, batch_norm=True)
    what, data = task(net), loader(20, batch_size=4, shuffle=True)
    for epochs in (2, 4):
        trainer(epochs=epochs, callbacks=[ema]).fit(what, data)
    assert same(ema.averages["model"].state_dict(), whole.averages["model"].state_dict())


def test_a_fit_that_goes_on_from_averages_has_the_bits_of_one() -> None:
    """They stand in the models between two fits, and training goes on from its own weights."""
    whole, ema = lw.EMA(0.9, replace_at_end=True), lw.EMA(0.9, replace_at_end=True)
    expected, _ = fit(whole, epochs=4, valid=False)
    torch.manual_seed(4)
    net = classifier(dropout=0.2, batch_norm=True)
    what, data = task(net), loader(20, batch_size=4, shuffle=True)
    trainer(epochs=2, callbacks=[ema]).fit(what, data)
    assert torch.equal(net[0].weight, ema.averages["model"].module[0].weight)
    trainer(epochs=4, callbacks=[ema]).fit(what, data)
    assert same(net.state_dict(), expected.state_dict())
    changed = torch.zeros_like(net[0].weight)
    net[0].load_state_dict({"weight": changed, "bias": net[0].bias})  # those are meant
    starts = acts(on_stage_start=lambda run, stage: None, on_epoch_start=lambda run: seen.append(net[0].weight.clone()))
    seen: list[Any] = []
    trainer(epochs=5, callbacks=[ema, starts]).fit(what, data)
    assert torch.equal(seen[0], changed)


@pytest.mark.parametrize("kind", ["ema", "swa", "early", "stopped"])
def test_a_run_that_had_ended_comes_back_with_the_weights_that_it_ended_with(kind: str, folder: Path) -> None:
    def experiment() -> dict[str, Any]:
        torch.manual_seed(1)
        net, stop = classifier(batch_norm=True), acts(on_step_end=lambda run, _: ended(run))
        more: dict[str, Any] = {
            "ema": lambda: [lw.EMA(0.9, replace_at_end=True)],
            "swa": lambda: [lw.SWA("1 epoch", replace_at_end=True, batch_norm=loader(12, batch_size=4))],
            "early": lambda: [lw.EarlyStopping(restore="best")],
            "stopped": lambda: [
                lw.SWA("2 steps", every="1 step", replace_at_end=True, batch_norm=loader(12, batch_size=4)),
                stop,
            ],
        }
        user = lw.Trainer(epochs=3, seed=0, folder=folder, name="a", progress=False, callbacks=more[kind]())
        user.fit(task(net), loader(20, batch_size=4), loader(9, batch_size=4), resume="auto")
        return copy.deepcopy(net.state_dict())

    def ended(run: lw.Run) -> None:
        if run.progress.step == 8:
            run.request_stop("enough")

    first = experiment()
    assert same(experiment(), first)


# --------------------------------------------------------------------------------- what is best, and stages


def loud(net: nn.Module) -> lw.Supervised:
    """It goes up and down, so that the best is not the last."""
    return lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 3.0))


@pytest.mark.parametrize("keeps", ["before", "after", "checkpoint", "stage"])
@pytest.mark.parametrize(
    "average", [lambda: lw.EMA(0.8), lambda: lw.SWA("1 epoch", batch_norm=loader(20, batch_size=5))]
)
def test_what_was_measured_as_the_best_is_put_back(average: Any, keeps: str, folder: Path) -> None:
    """Validation sees averages, and the best of those is kept, in whatever order the callbacks are given."""
    torch.manual_seed(4)
    net, early = classifier(batch_norm=True), lw.EarlyStopping("valid/loss", restore="best", patience=99)
    callbacks: dict[str, list[Any]] = {"before": [early, average()], "after": [average(), early]}
    saver = lw.Checkpoint("1 epoch", monitor="valid/loss", restore="best") if keeps == "checkpoint" else False
    user = trainer(callbacks=callbacks.get(keeps, [average()]), checkpoint=saver, folder=folder)
    kept = [lw.KeepBest("valid/loss")] if keeps == "stage" else []
    data, valid = loader(20, batch_size=4, shuffle=True), loader(20, batch_size=5)
    run = user.fit(loud(net), data, valid, stages=[lw.Stage("a", "6 epochs", callbacks=kept)])
    losses = [value for value in run.history["valid/loss"] if value is not None]
    assert min(losses) < losses[-1]
    assert trainer().validate(loud(net), valid)["valid/loss"] == min(losses)


def test_what_was_best_by_the_weights_is_not_replaced_by_averages(folder: Path) -> None:
    """A value of the training, an average that validation does not see, and one that has not begun."""
    for monitor, ema in (
        ("train/loss", lw.EMA(0.8)),
        ("valid/loss", lw.EMA(0.8, evaluate=False)),
        ("valid/loss", lw.SWA("6 epochs", batch_norm=False)),
    ):
        torch.manual_seed(4)
        net, ends = classifier(), []
        look = acts(on_checkpoint=lambda run, path, net=net, ends=ends: ends.append(net[0].weight.detach().clone()))
        saver = lw.Checkpoint("1 epoch", monitor=monitor, restore="best", keep=9)
        user = trainer(epochs=6, callbacks=[ema, look], checkpoint=saver, folder=folder)
        run = user.fit(loud(net), loader(20, batch_size=4, shuffle=True), loader(20, batch_size=5))
        values = list(run.history[monitor])[:5]
        assert torch.equal(net[0].weight, ends[values.index(min(values))]) or min(run.history[monitor]) < min(values)


RESTORING: dict[str, Any] = {
    "ema": lambda: lw.EMA(0.8, replace_at_end=True),
    "swa": lambda: lw.SWA("1 epoch", replace_at_end=True, batch_norm=loader(20, batch_size=5)),
    "early": lambda: lw.EarlyStopping("valid/loss", restore="best", patience=99),
}


@pytest.mark.parametrize("kind", RESTORING)
def test_of_a_stage_it_decides_the_weights_of_that_and_not_of_later_ones(kind: str, folder: Path) -> None:
    """The next stage starts from them, whether or not the run is killed on the way."""
    starts: list[Any] = []

    def make() -> Experiment:
        net, one = classifier(batch_norm=True), RESTORING[kind]()

        def look(run: lw.Run, stage: lw.Stage) -> None:
            if stage.name == "b":
                average = one.averages["model"].module if kind != "early" else None
                starts.append((copy.deepcopy(net.state_dict()), average and average.state_dict(), run.history))

        def leave(run: lw.Run, stage: lw.Stage) -> None:
            if stage.name == "b":
                starts.append(copy.deepcopy(net.state_dict()))

        watch = acts(on_stage_start=look, on_stage_end=leave)
        data, valid = loader(16, batch_size=4, shuffle=True), loader(20, batch_size=5)
        stages = [lw.Stage("a", "5 epochs", callbacks=[one]), lw.Stage("b", "2 epochs")]
        return Experiment(loud(net), data, valid, stages, {"callbacks": [watch]})

    run = resumed_at_every_step(make, folder)
    (began, average, _), ended = starts[:2]
    if kind == "early":
        net = classifier(batch_norm=True)
        net.load_state_dict(began)
        losses = list(run.history["valid/loss"])[:5]
        assert trainer().validate(loud(net), loader(20, batch_size=5))["valid/loss"] == min(losses) < losses[-1]
        assert not any("weights" in c.state_dict() for c in run.callbacks)  # no later checkpoint holds them
    else:
        assert same(began["0.weight"], average["0.weight"])
    assert same(run.models["model"].state_dict(), ended)


@pytest.mark.parametrize("kind", RESTORING)
def test_a_stage_that_is_reused_ends_with_the_weights_that_were_put_back(kind: str, folder: Path) -> None:
    def experiment(lr: float) -> tuple[lw.Run, dict[str, Any]]:
        seed_all(3)
        net = classifier(batch_norm=True)
        stages = [
            lw.Stage("a", "5 epochs", reuse=True, callbacks=[RESTORING[kind]()]),
            lw.Stage("b", "1 epoch", optimizer=lambda params: torch.optim.SGD(params, lr)),
        ]
        user = lw.Trainer(folder=folder, name="x", progress=False, checkpoint=False, seed=0)
        data, valid = loader(16, batch_size=4, shuffle=True), loader(20, batch_size=5)
        run = user.fit(loud(net), data, valid, stages=stages)
        return run, copy.deepcopy(net.state_dict())

    _, whole = experiment(0.1)
    run, again = experiment(0.1)
    assert run.reused == ["a"]
    assert same(again, whole)


def test_a_stop_inside_of_a_stage_is_an_end_at_which_the_best_is_put_back(folder: Path) -> None:
    """And a signal is none. What the Trainer decides comes before what a stage does."""
    nets: list[nn.Module] = []

    def fit_until(reason: str, *more: Any, **how: Any) -> tuple[float, lw.Run]:
        torch.manual_seed(4)
        net = classifier()
        nets.append(net)
        stop = acts(on_epoch_end=lambda run: run.request_stop(reason) if run.progress.epoch == 5 else None)
        user = lw.Trainer(folder=folder, name=reason, progress=False, callbacks=[*more, stop], seed=0)
        stages = [lw.Stage("a", "9 epochs", callbacks=[lw.KeepBest("valid/loss")]), lw.Stage("b", "1 epoch")]
        valid = loader(20, batch_size=5)
        run = user.fit(loud(net), loader(20, batch_size=4, shuffle=True), valid, stages=stages, **how)
        return trainer().validate(loud(net), valid)["valid/loss"], run

    now, run = fit_until("enough")
    assert run.status == "stopped"
    assert now == min(run.history["valid/loss"]) < run.history["valid/loss"][-1]
    assert fit_until("enough", resume="auto")[0] == now  # it had ended, and comes back so
    top = lw.EarlyStopping("train/loss", patience=99, restore="best")
    later, run = fit_until("other", top)
    at = list(run.history["train/loss"])
    assert later == run.history["valid/loss"][at.index(min(at))] != min(run.history["valid/loss"])
    with pytest.raises(SystemExit):
        fit_until("SIGTERM")
    assert trainer().validate(loud(nets[-1]), loader(20, batch_size=5))["valid/loss"] != now


# ------------------------------------------------------------------------------------------ what is refused


def test_two_that_decide_the_weights_of_one_end_are_refused_and_of_two_are_not() -> None:
    def planned(*of_stages: Any, callbacks: Any = ()) -> list[str]:
        stages = [lw.Stage(f"s{i}", "1 epoch", callbacks=list(one)) for i, one in enumerate(of_stages)]
        user = trainer(callbacks=list(callbacks))
        return list(user.plan(task(classifier()), loader(20), loader(9), stages=stages).problems)

    def early(monitor: str = "valid/loss") -> lw.EarlyStopping:
        return lw.EarlyStopping(monitor, restore="best")

    ema = RESTORING["ema"]
    assert planned([ema()], [early()]) == planned([early()], [early("train/loss")]) == []
    assert planned([ema()], [], callbacks=[early()]) == []
    (one,) = planned([ema(), early()], [])
    assert "EMA(replace_at_end=True) and EarlyStopping(restore=...) both decide the weights at the end of stage" in one
    (one,) = planned([], [ema()], callbacks=[early()])
    assert "both decide the weights after the fit" in one
    (one,) = planned([ema(), lw.KeepBest()], [])
    assert "EMA(replace_at_end=True) and KeepBest both decide the weights at the end of stage 's0'" in one
    (one,) = planned([early(), lw.KeepBest("train/loss")], [])
    assert "both put weights back at the end of stage 's0'; leave that to one of them" in one


def refused(match: str, *callbacks: Any, **settings: Any) -> None:
    with pytest.raises(SettingError, match=match):
        fit(*callbacks, epochs=1, **settings)


def test_what_cannot_be_is_refused_with_the_fix() -> None:
    refused(r"has batch norm, .*SWA\(batch_norm=train_loader\), or batch_norm=False", lw.SWA("1 epoch"))
    refused("EMA and SWA both show their averages.*evaluate=False", lw.EMA(), lw.SWA("1 epoch", batch_norm=False))
    refused(r"EMA\(models='disc'\).*model", lw.EMA(models="disc"))
    x, _ = samples(20)
    none = r"SWA\(batch_norm=data\) is for models with batch norm, and there is none here; leave it out"
    refused(none, lw.SWA("1 epoch", batch_norm=x), net=classifier())
    with pytest.raises(SettingError, match="EMA has no model to average; with Trainer"):
        trainer(epochs=1, callbacks=[lw.EMA()]).run(lambda run, batch: 1.0, [x], state={})
    best = lw.Checkpoint(monitor="valid/loss", restore="best")
    refused("both decide the weights", lw.EMA(replace_at_end=True), checkpoint=best, folder="runs")
    with pytest.raises(SettingError, match=r"EMA\(decay=1\): expected a number from 0 to below 1"):
        lw.EMA(1)
    with pytest.raises(SettingError, match="expected steps, samples or whole epochs"):
        lw.EMA(every="0.5 epochs")
    with pytest.raises(SettingError, match="expected steps, samples or whole epochs"):
        lw.SWA("10 min")
    with pytest.raises(SettingError, match="EMA has averaged nothing yet"), lw.EMA().applied():
        pass


@pytest.mark.parametrize("average", [lambda: lw.SWA("15 epochs"), lambda: lw.EMA(every="15 epochs")])
def test_an_average_that_never_begins_says_so(average: Any) -> None:
    made = average()
    end = acts(on_epoch_end=lambda run: run.end_stage() if run.progress.epoch == 2 else None)
    told = f"{type(made).__name__} has averaged nothing: it begins after '15 epochs', and the run ended after 2 epochs"
    with pytest.warns(lw.LoopwrightWarning, match=told):
        trainer(epochs=20, callbacks=[made, end]).fit(task(classifier()), loader(20, batch_size=8))
    with pytest.warns(lw.LoopwrightWarning) as caught:
        trainer(epochs=2, callbacks=[average()]).fit(task(classifier()), loader(20, batch_size=8))
    told = f"{type(made).__name__}: '15 epochs' comes after the end of this run, which has 2 epochs (at "
    assert [str(one.message)[: len(told)] for one in caught] == [told]  # once, at the start
    trainer(epochs=2, callbacks=[average()], debug=lw.Debug(dev_run=2)).fit(
        task(classifier()), loader(20, batch_size=8)
    )
    stop = acts(on_epoch_end=lambda run: run.request_stop("enough"))
    trainer(epochs=20, callbacks=[average(), stop]).fit(task(classifier()), loader(20, batch_size=8))


def test_another_model_in_the_middle_of_a_run_is_refused() -> None:
    def change(run: lw.Run, result: Any) -> None:
        if run.progress.step == 2:
            run.replace("model", classifier(batch_norm=True))
            run.replace("optimizer", torch.optim.SGD(run.changes[0][1].parameters(), 0.1))

    refused(
        "run.replace has changed 'model', and EMA holds averages of the one before", lw.EMA(), acts(on_step_end=change)
    )


@pytest.mark.slow
def test_what_several_ranks_cannot_average_alike_is_refused_at_the_start() -> None:
    def with_ranks(average: Any, strategy: str) -> None:
        net = classifier(batch_norm=True)
        made = lw.Supervised(net, nn.CrossEntropyLoss(), lambda params: torch.optim.SGD(params, 0.1))
        trainer(epochs=1, strategy=strategy, callbacks=[average]).fit(made, samples(20))

    own = r"works in one process: each rank would have statistics of its own. "
    for average, strategy, match in (
        (lw.EMA(buffers=True), "fsdp", rf"EMA\(buffers=True\) {own}Leave it out"),
        (lw.EMA(buffers=True), "ddp", rf"EMA\(buffers=True\) {own}Leave it out"),
        (lw.SWA("1 epoch", batch_norm=samples(20)), "ddp", rf"SWA\(batch_norm=data\) {own}Say batch_norm=False"),
    ):
        with pytest.raises(SettingError, match=match):
            lw.launch(lambda average=average, strategy=strategy: with_ranks(average, strategy), 2)


def test_an_average_each_so_many_tokens_asks_how_many_there_are() -> None:
    (problem,) = trainer(epochs=1, callbacks=[lw.EMA(every="5 tokens")]).plan(sgd_task(line()), pairs([1.0])).problems
    assert problem == (
        "EMA: '5 tokens' counts tokens, and nothing says how many a batch has; pass fit(..., weight=lambda batch: ...)"
    )
