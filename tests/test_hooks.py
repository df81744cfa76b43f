"""Hooks: when they fire, what they see, what they may change, and what they may not."""

from __future__ import annotations

import inspect
import re
import signal
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopwright as lw
from loopwright import events
from tiny import acts, classifier, line, loader, mean_of_preds, pairs, recorder, sgd_task, trainer

# ------------------------------------------------------------------------------------------------------------- order

STEP = ["on_step_start"]
BATCH = ["on_batch_start", "map_batch", "map_output", "map_loss", "on_backward_end"]
READY = ["on_grads_ready", "on_step_end"]
LOOK = ["on_loader_start", "on_eval_batch_start", "on_eval_batch_end", "on_loader_end"]
VALID = ["on_validation_start", *LOOK, "on_validation_end"]
TRAINING_HOOKS = [*STEP, *BATCH, *READY]


def recorded(data: Any, **settings: Any) -> list[str]:
    seen: list[str] = []
    trainer(**{"epochs": 1, "callbacks": [recorder(seen)], **settings}).fit(sgd_task(line()), data, pairs([1.0]))
    return seen


@pytest.mark.capability("FA-22")
def test_a_real_run_fires_in_the_order_of_the_picture(folder: Path) -> None:
    """The picture in the docstring of events.py is what a run with one batch, validation and checkpoint does."""
    picture = (events.__doc__ or "").partition("::")[2].partition("``on_*``")[0]
    drawn = re.findall(r"(?:on|map)_\w+", re.sub("#.*", "", picture))
    seen = recorded(
        pairs([1.0]), validate_every="1 step", checkpoint=lw.Checkpoint("1 step", at_end=False), folder=folder
    )
    assert seen == drawn
    evaluating = {"on_exception", *(name for name in events.HOOKS if "test" in name or "predict" in name)}
    assert set(events.HOOKS) - set(drawn) == evaluating


@pytest.mark.capability("FA-22")
def test_hooks_lie_between_all_that_a_step_does() -> None:
    """Between batch, forward and loss, backward and optimizers is a hook; between forward and loss there is torch's."""
    seen: list[str] = []
    net = line()

    def loss(preds: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append("LOSS")
        found = preds.mean()
        found.register_hook(lambda grad: seen.append("BACKWARD"))
        return found

    net.register_forward_pre_hook(lambda *_: seen.append("FORWARD"))
    net.register_forward_hook(lambda *_: seen.append("torch's forward hook"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    task = lw.Supervised(net, loss, optimizer)
    optimizer.register_step_pre_hook(lambda *_: seen.append("STEP"))
    trainer(epochs=1, callbacks=[recorder(seen)]).fit(task, pairs([1.0]))
    begin = seen.index("on_step_start")
    assert seen[begin : seen.index("on_step_end") + 1] == [
        *("on_step_start", "on_batch_start", "map_batch"),
        *("FORWARD", "torch's forward hook", "LOSS"),
        *("map_output", "map_loss", "BACKWARD", "on_backward_end", "on_grads_ready", "STEP", "on_step_end"),
    ]


def test_windows_validations_and_checkpoints_fire_where_they_belong(folder: Path) -> None:
    seen = recorded(
        pairs([1], [2], [3]), accumulate=2, checkpoint=lw.Checkpoint("1 epoch", at_end=False), folder=folder
    )
    assert seen == [
        *("on_fit_start", "on_stage_start", "on_epoch_start", "on_loader_start"),
        *(*STEP, *BATCH, *BATCH, *READY),
        *(*STEP, *BATCH, *READY),
        "on_loader_end",
        *VALID,
        *("on_epoch_end", "on_checkpoint", "on_stage_end", "on_fit_end"),
    ]


def test_with_two_phases_batches_are_prepared_once_and_phases_follow_one_another() -> None:
    seen: list[Any] = []
    net = line()

    class Two(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def phases(self) -> list[lw.Phase]:
            return [lw.Phase(name, lambda batch: self.net(batch[0]).mean()) for name in ("a", "b")]

    def note(name: str, run: lw.Run, args: tuple[Any, ...]) -> Any:
        return name, *(arg.name for arg in args if isinstance(arg, lw.Phase))

    trainer(epochs=1, accumulate=2, callbacks=[recorder(seen, note=note)]).fit(Two(), pairs([1], [2]))
    prepared = [("on_batch_start",), ("map_batch",)]
    assert seen[5:-5] == [
        *prepared * 2,
        *[("map_output", "a"), ("map_loss", "a"), ("on_backward_end", "a")] * 2,
        ("on_grads_ready", "a"),
        *[("map_output", "b"), ("map_loss", "b"), ("on_backward_end", "b")] * 2,
        ("on_grads_ready", "b"),
    ]


@pytest.mark.capability("CA-07")
def test_callbacks_and_handlers_are_called_anywhere_in_the_loop() -> None:
    """At start and end of stage, epoch, each loader, step and batch, and at an exception; each is told where it is."""
    seen: list[Any] = []
    loaders = {"clean": pairs([1.0], [3.0]), "noisy": pairs([2.0])}
    stages = [lw.Stage(name, until="1 epoch") for name in ("head", "all")]
    user = trainer(
        callbacks=[
            acts(
                on_stage_start=lambda run, stage: seen.append(("stage", stage.name)),
                on_stage_end=lambda run, stage: seen.append(("end of stage", stage.name)),
                on_loader_start=lambda run, kind, name: seen.append((kind, name)),
                on_loader_end=lambda run, kind, name, values: seen.append((f"end of {kind}", name, dict(values))),
                on_exception=lambda run, error: seen.append(str(error)),
            )
        ],
    )
    at = lw.Event
    for event in (at.EPOCH_START, at.STEP_START, at.BATCH_START, at.BACKWARD_END, at.STEP_END, at.VALIDATION_START,
                  at.LOADER_START, at.EVAL_BATCH_START, at.EVAL_BATCH_END, at.EPOCH_END):  # fmt: skip
        user.on(event, event.name)(lambda run, told: seen.append(told))

    @user.on(lw.Event.LOADER_END(once=6))
    def fail(run: lw.Run, kind: str, name: str, values: Any) -> None:
        raise ValueError(f"{kind}, {name}: {sorted(values)}")

    with pytest.raises(ValueError, match="valid, noisy"):
        user.fit(sgd_task(line(), lr=0.0), pairs([1.0]), loaders, stages=stages)
    epoch = ["EPOCH_START", ("train", ""), "LOADER_START", "STEP_START", "BATCH_START", "BACKWARD_END", "STEP_END",
             ("end of train", ""), "VALIDATION_START"]  # fmt: skip
    batch = ["EVAL_BATCH_START", "EVAL_BATCH_END"]
    means = [list(one[2]) for one in seen if isinstance(one, tuple) and one[0] == "end of valid"]
    assert means == [["loss"]] * 4
    looks = [("valid", "clean"), "LOADER_START", *batch, *batch, ("end of valid", "clean"),
             ("valid", "noisy"), "LOADER_START", *batch, ("end of valid", "noisy")]  # fmt: skip
    assert [one[:2] if isinstance(one, tuple) else one for one in seen] == [
        *[("stage", "head"), *epoch, *looks, "EPOCH_END", ("end of stage", "head")],
        *[("stage", "all"), *epoch, *looks, "valid, noisy: ['loss']"],
    ]


@pytest.mark.parametrize("at", range(1, 7))
def test_a_training_loader_starts_and_ends_once_an_epoch_also_after_a_resume(at: int, folder: Path) -> None:
    def fit(name: str, *more: lw.Callback, resume: str | None = None) -> list[str]:
        seen: list[str] = []
        marks = acts(
            on_loader_start=lambda run, kind, name: seen.append(f"start {kind} at {run.progress.batch}"),
            on_step_end=lambda run, result: seen.append(f"step {run.progress.step}"),
            on_loader_end=lambda run, kind, name, values: seen.append(
                f"end {kind} at {run.progress.batch} {[*values]}"
            ),
        )
        user = trainer(epochs=2, folder=folder, name=name, callbacks=[*more, marks])
        with suppress(SystemExit):
            user.fit(sgd_task(line()), pairs([1.0], [2.0], [3.0]), resume=resume)
        return seen

    def leave(run: lw.Run, result: lw.StepResult) -> None:
        if run.progress.step == at:
            signal.raise_signal(signal.SIGTERM)

    epoch = ["start train at 0", *["step {}"] * 3, "end train at 3 []"]
    alone = fit("alone")
    assert alone == [one.format(n) for one, n in zip(epoch * 2, [0, 1, 2, 3, 0, 0, 4, 5, 6, 0], strict=True)]
    assert fit("cut", acts(on_step_end=leave)) + fit("cut", resume="auto") == alone


@pytest.mark.capability("CA-07")
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_an_exception_that_leaves_an_evaluation_is_told(verb: str) -> None:
    """Callbacks and handlers hear of it as in training; one that fails in turn does not hide it."""
    told: list[Any] = []

    def fail(batch: Any) -> Any:
        raise ZeroDivisionError(verb)

    def fail_again(run: lw.Run, error: BaseException) -> None:
        raise KeyError("again")

    task = sgd_task(line())
    task.validation_step = task.test_step = task.predict_step = fail
    user = trainer(callbacks=[acts(on_exception=fail_again), acts(on_exception=lambda run, error: told.append(error))])
    user.on(lw.Event.EXCEPTION)(lambda run, error: told.append(str(error)))
    with pytest.raises(ZeroDivisionError) as caught:
        getattr(user, verb)(task, pairs([1.0]))
    assert told == [caught.value, verb]
    kind = "valid" if verb == "validate" else verb
    assert caught.value.__notes__ == [
        f"[loopwright] in {kind}, batch 1; batch: (float32[1, 1], float32[1, 1])",
        "[loopwright] Acts.on_exception failed as well: KeyError('again')",
    ]


@pytest.mark.capability("CA-07")
def test_test_and_predict_fire_their_own_hooks_for_callbacks_and_handlers() -> None:
    seen: list[str] = []
    user = trainer(callbacks=[recorder(seen)])
    user.on(lw.Event.TEST_END)(lambda run, values: seen.append(f"handler: {sorted(values)}"))
    user.on(lw.Event.PREDICT_END)(lambda run: seen.append("handler"))
    user.test(sgd_task(line()), pairs([1], [2]))
    start, *batch, end = LOOK
    assert seen == ["on_test_start", start, *batch * 2, end, "on_test_end", "handler: ['test/loss']"]
    seen.clear()
    user.predict(sgd_task(line()), pairs([1], [2]))
    batch = ["on_predict_batch_start", "on_predict_batch_end"]
    assert seen == ["on_predict_start", start, *batch * 2, end, "on_predict_end", "handler"]
    seen.clear()
    user.validate(sgd_task(line()), pairs([1]))
    assert seen == VALID


def test_callbacks_fire_in_the_order_of_their_list_and_handlers_after_them() -> None:
    seen: list[str] = []
    callbacks = [acts(on_step_end=lambda run, result, n=n: seen.append(n)) for n in "ab"]
    user = trainer(epochs=1, callbacks=callbacks)
    for name in "cd":
        user.on(lw.Event.STEP_END, name)(lambda run, name: seen.append(name))
    user.fit(sgd_task(line()), pairs([1.0]))
    assert seen == ["a", "b", "c", "d"]


# ------------------------------------------------------------------------------------------------- what they may see


@pytest.mark.capability("FA-23")
def test_every_point_of_training_has_a_hook_that_sees_what_is_known_there() -> None:
    """Batch, output, loss, gradients, result, rate and weights are there at the hook of each point of training."""
    net, seen = line(1.0), {}

    def note(value: Any = None, **values: Any) -> Any:
        seen.update(values)
        return value

    watch = acts(
        on_step_start=lambda run: note(step_start=(run.lr, run.progress.step, run.stage.name)),
        on_batch_start=lambda run, batch: note(batch=batch[0].tolist()),
        map_output=lambda run, output, batch, phase: note(output, output=sorted(output), phase=phase.name),
        map_loss=lambda run, loss, output, batch, phase: note(loss, loss=loss.item(), graph=loss.requires_grad),
        on_backward_end=lambda run, *args: note(gradient=net.weight.grad.item(), before=net.weight.item()),
        on_grads_ready=lambda run, phase, norm: note(norm=norm.item(), clipped=net.weight.grad.item()),
        on_step_end=lambda run, result: note(
            result=(result.values["loss"].item(), result.weight, result.grad_norm.item(), result.moved),
            preds=result.output["preds"].tolist(),
            after=net.weight.item(),
            step=run.progress.step,
        ),
    )
    trainer(epochs=1, clip_norm=2.0, callbacks=[watch]).fit(sgd_task(net, lr=0.5), pairs([1, 5]))
    assert seen == {
        "step_start": (0.5, 0, "main"),
        "batch": [[1.0], [5.0]],
        "output": ["loss", "preds", "target"],
        "phase": "main",
        "loss": 3.0,
        "graph": True,
        "gradient": 3.0,
        "before": 1.0,
        "norm": 3.0,
        "clipped": pytest.approx(2.0, rel=1e-6),
        "result": (3.0, 2, 3.0, ("main",)),
        "preds": [[1.0], [5.0]],
        "after": pytest.approx(0.0, abs=1e-6),
        "step": 1,
    }


@pytest.mark.capability("FA-23")
def test_a_backward_is_seen_with_its_loss_its_output_its_batch_and_its_phase() -> None:
    """After the backward: the loss that was gone back from, what the step returned, the batch and the phase."""
    seen: list[Any] = []

    def see(run: lw.Run, loss: Any, output: Any, batch: Any, phase: Any) -> None:
        seen.append((loss.item(), output["preds"].tolist(), output["loss"].item(), batch[0].tolist(), phase.name))

    trainer(epochs=1, accumulate=2, callbacks=[acts(on_backward_end=see)]).fit(sgd_task(line(2.0)), pairs([1, 5], [4]))
    assert seen == [(6.0, [[2.0], [10.0]], 6.0, [[1.0], [5.0]], "main"), (8.0, [[8.0]], 8.0, [[4.0]], "main")]


@pytest.mark.capability("FA-23")
@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_every_point_of_an_evaluation_has_a_hook_that_sees_what_is_known_there(verb: str) -> None:
    """In validation, test and prediction: each batch, what the step made of it, the loader, the means."""
    seen: dict[str, list[Any]] = {}

    def note(hook: str) -> Any:
        def see(run: lw.Run, *args: Any) -> None:
            seen.setdefault(hook, []).append([_plain(one) for one in args])

        return see

    kind = {"fit": "valid", "validate": "valid"}.get(verb, verb)
    looks = "predict" if kind == "predict" else "eval"
    hooks = ["on_loader_start", "on_loader_end", f"on_{looks}_batch_start", f"on_{looks}_batch_end"]
    hooks += {"valid": ["on_validation_end"], "test": ["on_test_end"]}.get(kind, [])
    user, data = trainer(epochs=1, callbacks=[acts(**{hook: note(hook) for hook in hooks})]), pairs([1, 5], [4])
    if verb == "fit":
        user.fit(sgd_task(line(2.0), lr=0.0), pairs([3]), data)
    else:
        getattr(user, verb)(sgd_task(line(2.0)), data)
    batches, zero = [[[1.0], [5.0]], [[4.0]]], [[[0.0], [0.0]], [[0.0]]]
    preds, losses = [[[2.0], [10.0]], [[8.0]]], [6.0, 8.0]
    shown = [[x, y] for x, y in zip(batches, zero, strict=True)]
    made = [
        p if kind == "predict" else {"loss": loss, "preds": p, "target": y}
        for p, loss, y in zip(preds, losses, zero, strict=True)
    ]
    assert seen[f"on_{looks}_batch_start"] == [[batch] for batch in shown]
    assert seen[f"on_{looks}_batch_end"] == [[output, batch] for output, batch in zip(made, shown, strict=True)]
    mean = pytest.approx(20 / 3)
    assert [one for one in seen["on_loader_start"] if one[0] == kind] == [[kind, ""]]
    (end,) = (one for one in seen["on_loader_end"] if one[0] == kind)
    assert end == [kind, "", {} if kind == "predict" else {"loss": mean}]
    for hook in hooks[4:]:
        assert seen[hook] == [[{f"{kind}/loss": mean}]]


def _plain(value: Any) -> Any:
    """Tensors as lists and numbers."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.capability("FA-23")
@pytest.mark.parametrize("hook", [*TRAINING_HOOKS, *VALID, "on_epoch_end", "on_stage_end", "on_fit_end"])
def test_every_hook_sees_the_hyper_parameters_and_the_weights(hook: str) -> None:
    """Settings of the Trainer, of each optimizer's groups and of each phase; models, history and metrics so far."""
    seen: list[Any] = []

    def note(run: lw.Run, *args: Any) -> Any:
        (group,) = run.optimizers["main"].param_groups
        weights = [p.detach().clone() for model in run.models.values() for p in model.parameters()]
        phase = run.stages[0].phases[0]
        seen.append((group["lr"], group["momentum"], run.settings["clip_norm"], phase.clip_norm, len(weights)))
        assert run.metrics.keys() <= {"lr", "train/loss", "valid/loss"}
        return args[0] if hook.startswith("map_") else None

    trainer(epochs=1, clip_norm=2.0, callbacks=[acts(**{hook: note})]).fit(
        sgd_task(line(1.0), lr=0.5), pairs([1, 5]), pairs([1.0])
    )
    assert set(seen) == {(0.5, 0, 2.0, 2.0, 1)}


LIVES = {
    "batch": ["on_batch_start", "map_batch", "map_output", "map_loss", "on_backward_end", "on_eval_batch_start",
              "on_eval_batch_end", "on_predict_batch_start", "on_predict_batch_end"],
    "output": ["map_output", "map_loss", "on_backward_end", "on_eval_batch_end", "on_predict_batch_end"],
    "loss": ["map_loss", "on_backward_end"],
    "phase": ["map_output", "map_loss", "on_backward_end", "on_grads_ready"],
    "grad_norm": ["on_grads_ready"],
    "result": ["on_step_end"],
    "values": ["on_loader_end", "on_validation_end", "on_test_end"],
    "path": ["on_checkpoint"],
    "error": ["on_exception"],
}  # fmt: skip


@pytest.mark.capability("TB-06")
@pytest.mark.parametrize("name", LIVES)
@pytest.mark.parametrize("hook", events.HOOKS)
def test_what_is_asked_for_outside_of_its_life_time_is_an_error_that_names_where_it_lives(name: str, hook: str) -> None:
    """What lives shorter than the run is passed to hooks, and is nowhere else: asking for it elsewhere is an error.

    It is raised where the callback or the handler is given, before anything runs; all else on Run lives as long as it.
    """
    names = list(inspect.signature(getattr(lw.Callback, hook)).parameters)
    lives = LIVES[name]
    assert (hook in lives) == (name in names)
    assert not hasattr(lw.Run, name)
    scope: dict[str, Any] = {}
    exec(f"def {hook}({', '.join([n for n in names if n != name])}, {name}): ...", scope)
    exec(f"def handle(run, {name}): ...", scope)
    callback = type("Asks", (lw.Callback,), {hook: scope[hook]})()
    event = getattr(lw.Event, hook.removeprefix("on_").upper(), None)
    if hook in lives:
        trainer(epochs=1, callbacks=[callback])
        if event is not None:
            trainer(epochs=1).on(event)(scope["handle"])
        return
    with pytest.raises(lw.HookError) as caught:
        trainer(epochs=1, callbacks=[callback])
    assert str(caught.value).endswith(f". {name} is passed to {', '.join(lives)}")
    if event is not None:
        with pytest.raises(lw.SettingError) as refused:
            trainer(epochs=1).on(event)(scope["handle"])
        offers = [one.removeprefix("on_").upper() for one in lives if one.startswith("on_")]
        assert str(refused.value).endswith(f". {name} is offered at {', '.join(offers)}")


@pytest.mark.capability("TB-06", "B-13")
@pytest.mark.parametrize("name", LIVES)
def test_the_run_says_where_it_lives_what_is_asked_of_it_at_any_event(name: str) -> None:
    """``run.batch`` is an AttributeError at every event, in a step and after the fit, and names the valid events."""
    told: dict[str, str] = {}

    def ask(at: str, run: lw.Run, args: tuple[Any, ...] = ()) -> str:
        assert not hasattr(run, name)
        with pytest.raises(AttributeError) as caught:
            getattr(run, name)
        told[at] = str(caught.value)
        return at

    def step(run: lw.Run, batch: Any) -> dict[str, float]:
        ask("step", run)
        return {"loss": 0.0}

    user = trainer(epochs=1, callbacks=[recorder([], note=ask)], checkpoint=lw.Checkpoint("1 epoch"), folder="runs")
    run = user.fit(task := sgd_task(line()), pairs([1.0]), pairs([1.0]))
    trainer(epochs=1).run(step, [[1.0]])
    user.test(task, pairs([1.0]))
    user.predict(task, pairs([1.0]))
    ask("after", run)
    assert set(told) == {"step", "after", *events.HOOKS} - {"on_exception"}
    assert set(told.values()) == {
        f"Run has no {name!r}, which lives shorter than a run: take it where it is passed, in {', '.join(LIVES[name])}"
    }


@pytest.mark.capability("B-13")
@pytest.mark.parametrize("hook", ["on_fit_start", *TRAINING_HOOKS, *VALID, "on_epoch_end", "on_fit_end"])
def test_all_that_is_a_field_is_there_at_every_event(hook: str) -> None:
    """From on_fit_start on, and after the fit, each field has its value; for what is none the nearest is told."""
    seen: list[str] = []

    def look(run: lw.Run, *args: Any) -> Any:
        seen[:] = [name for name in lw.Run.placement if hasattr(run, name)]
        for name in ("task", "stages", "models", "optimizers", "callbacks", "hooks", "comm", "precision", "device"):
            assert getattr(run, name) is not None
        with pytest.raises(AttributeError, match=r"^Run has no 'progres'\. Did you mean 'progress'"):
            run.progres  # type: ignore[attr-defined]  # noqa: B018
        return args[0] if hook.startswith("map_") else None

    run = trainer(epochs=1, callbacks=[acts(**{hook: look})]).fit(sgd_task(line()), pairs([1.0]), pairs([1.0]))
    assert sorted(seen) == sorted(lw.Run.placement)
    look(run, None)


ASKS = """
import loopwright as lw
class Asks(lw.Callback):
    def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
        reveal_type(run.metrics)
        reveal_type(run.progress.step)
        run.batch
        run.progres
"""


@pytest.mark.nightly
@pytest.mark.capability("B-13", "TB-06")
def test_a_type_checker_knows_the_fields_and_what_is_none(tmp_path: Path) -> None:
    """mypy knows the type of each field, and marks a name that is none, as an editor does by the same annotations."""
    api = pytest.importorskip("mypy.api")
    (tmp_path / "asks.py").write_text(ASKS, encoding="utf-8")
    kept = f"--cache-dir={tmp_path / 'cache'}"
    told, _, _ = api.run(["--strict", "--follow-imports=silent", "--config-file=", kept, str(tmp_path / "asks.py")])
    assert re.findall(r"asks.py:(\d+): (.*)", told) == [
        ("5", 'note: Revealed type is "dict[str, float]"'),
        ("6", 'note: Revealed type is "int"'),
        ("7", 'error: "Run" has no attribute "batch"  [attr-defined]'),
        ("8", 'error: "Run" has no attribute "progres"; maybe "progress"?  [attr-defined]'),
    ]


@pytest.mark.capability("TB-06")
def test_what_only_comes_with_an_event_is_an_error_before_that_names_the_event() -> None:
    """Values of steps, records and validations asked for too early: the error says by which event they are there."""
    told: list[str] = []

    def ask(run: lw.Run) -> None:
        for get in (
            lambda: run.latest["loss"], lambda: run.metrics["train/loss"], lambda: run.metrics["valid/loss"],
            lambda: run.history[-1],
        ):  # fmt: skip
            with pytest.raises(LookupError) as caught:
                get()
            told.append(str(caught.value))

    run = trainer(epochs=1, callbacks=[acts(on_fit_start=ask)]).fit(sgd_task(line()), pairs([1.0]), pairs([1.0]))
    assert "'loss' yet. Known: none. What steps return is there by on_step_end" in told[0]
    assert "'train/loss' yet. Known: none. What begins with 'train/' by on_epoch_end, " in told[1]
    assert "'valid/' by on_validation_end, 'test/' by on_test_end is there" in told[2]
    assert told[3].endswith("the history has no record yet; the first is there by on_epoch_end")
    assert {*run.latest, *run.metrics} >= {"loss", "train/loss", "valid/loss"}


@pytest.mark.slow
@pytest.mark.capability("TB-06")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [("run.", "progress"), ("run.progress.", "epoch"), ("result.", "values"), ("lw.Event.", "STEP_END")],
)
def test_an_editor_completes_what_a_callback_is_given(typed: str, offered: str) -> None:
    jedi = pytest.importorskip("jedi")
    lines = ASKS.strip().splitlines()[:3]
    found = jedi.Script("\n".join([*lines, f"        {typed}"])).complete(4, 8 + len(typed))
    assert offered in {one.name for one in found}


@pytest.mark.capability("TB-06")
def test_editors_are_offered_the_fields_and_told_their_types() -> None:
    for hook in events.HOOKS:  # which an editor writes out with them
        assert inspect.get_annotations(getattr(lw.Callback, hook))["run"] == "Run"
    assert inspect.get_annotations(lw.Callback.on_step_end)["result"] == "StepResult"
    hints = {name: str(kind) for name, kind in inspect.get_annotations(lw.Run).items()}
    assert set(lw.Run.placement) <= set(dir(lw.Run)) & set(hints)
    assert (hints["metrics"], hints["progress"], hints["folder"]) == ("dict[str, float]", "Progress", "Path | None")


# ---------------------------------------------------------------------------------------------- what they may change


@pytest.mark.capability("FA-21", "FA-24")
def test_batch_output_loss_and_gradients_can_be_replaced_before_they_are_used() -> None:
    """Each replacement has its effect: batch before forward, output and loss before backward, grads before step."""

    def weight_after(**hooks: Any) -> float:
        net = line()
        trainer(epochs=1, callbacks=[acts(**hooks)]).fit(sgd_task(net), pairs([1, 3]))
        return net.weight.item()

    def halve(run: lw.Run, phase: lw.Phase, norm: Any) -> None:
        for parameter in phase.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(0.5)

    assert weight_after() == -2.0
    assert weight_after(map_batch=lambda run, batch: [batch[0] * 10, batch[1]]) == -20.0
    assert weight_after(map_output=lambda run, out, *_: {**out, "loss": out["preds"].sum()}) == -4.0
    assert weight_after(map_loss=lambda run, loss, *_: loss * 3) == -6.0
    assert weight_after(on_grads_ready=halve) == -1.0


def test_map_hooks_are_threaded_in_the_order_of_the_list() -> None:
    net = line()
    double, add = acts(map_loss=lambda run, loss, *_: loss * 2), acts(map_loss=lambda run, loss, *_: loss + 1)
    run = trainer(epochs=1, callbacks=[double, add]).fit(sgd_task(net, lr=0.0), pairs([1]))
    assert run.metrics["train/loss"] == 1.0
    run = trainer(epochs=1, callbacks=[add, double]).fit(sgd_task(net, lr=0.0), pairs([1]))
    assert run.metrics["train/loss"] == 2.0


@pytest.mark.parametrize("hook", [name for name in TRAINING_HOOKS if name.startswith("on_")] + VALID)
def test_an_observer_that_returns_a_value_is_refused(hook: str) -> None:
    with pytest.raises(lw.HookError) as caught:
        recorded(pairs([1.0]), callbacks=[acts(**{hook: lambda run, *args: 5})])
    assert str(caught.value) == (
        f"Acts.{hook} returned 5; on_* hooks observe and must return None. To change a value, "
        "override map_batch, map_output or map_loss and return the new one there"
    )


def test_a_named_observer_that_returns_a_value_is_named() -> None:
    class Meddler(lw.Callback):
        def on_step_end(self, run: lw.Run, result: lw.StepResult) -> Any:
            return result

    with pytest.raises(lw.HookError, match=r"Meddler\.on_step_end returned StepResult\(.*; on_\* hooks observe"):
        recorded(pairs([1.0]), callbacks=[Meddler()])


@pytest.mark.parametrize("hook", ["map_batch", "map_output", "map_loss"])
def test_a_map_hook_that_returns_nothing_is_refused(hook: str) -> None:
    with pytest.raises(lw.HookError, match=r"returned None; map_\* hooks must return the \(new\) value"):
        recorded(pairs([1.0]), callbacks=[acts(**{hook: lambda run, *args: None})])


# ------------------------------------------------------------------------------------------------- steering the loop


def raising(hook: str, kind: type[Exception], at_batch: int) -> lw.Callback:
    """Raises ``kind`` in ``hook`` when ``at_batch`` batches of the epoch are complete."""

    def steer(run: lw.Run, *args: Any) -> Any:
        if run.progress.batch == at_batch:
            raise kind
        return args[0] if hook.startswith("map_") else None

    return acts(**{hook: steer})


@pytest.mark.capability("FA-24")
@pytest.mark.parametrize("hook", ["on_batch_start", "map_batch"])
def test_skip_batch_leaves_the_batch_out(hook: str) -> None:
    """A batch can be skipped before its forward; with one batch a step, no step is counted."""
    net = line()
    run = trainer(epochs=1, callbacks=[raising(hook, lw.SkipBatch, 1)]).fit(sgd_task(net), pairs([1], [2], [4]))
    assert net.weight.item() == -5.0
    assert run.progress[:4] == (1, 1, 0, 2)


@pytest.mark.parametrize("hook", ["map_output", "map_loss", "on_backward_end"])
def test_skip_batch_after_map_batch_is_refused(hook: str) -> None:
    with pytest.raises(lw.StepOutputError) as caught:
        trainer(epochs=1, callbacks=[raising(hook, lw.SkipBatch, 0)]).fit(sgd_task(line()), pairs([1]))
    assert str(caught.value) == (
        "SkipBatch came after map_batch had returned; raise lw.SkipStep to drop the step instead"
    )


@pytest.mark.capability("FA-24")
@pytest.mark.parametrize("hook", [h for h in TRAINING_HOOKS if h != "on_step_end"])
def test_skip_step_drops_the_step(hook: str) -> None:
    """A step can be dropped anywhere before the optimizers move; its batch is used up, its values are not logged."""
    net, optimizer_calls = line(), []
    task = sgd_task(net)
    task.optimizer.register_step_post_hook(lambda *args: optimizer_calls.append(1))
    run = trainer(epochs=1, callbacks=[raising(hook, lw.SkipStep, 1)]).fit(task, pairs([1], [2], [4]))
    assert net.weight.item() == -5.0
    assert len(optimizer_calls) == run.progress.step == len(run.history.losses["loss"]) == 2
    assert run.progress[:3] == (1, 1, 0)


@pytest.mark.capability("FA-24")
@pytest.mark.parametrize("hook", TRAINING_HOOKS)
@pytest.mark.parametrize("at_batch", [0, 1])
def test_stop_epoch_ends_the_epoch_at_every_training_hook(hook: str, at_batch: int) -> None:
    """The epoch ends, also at its first batch; what has gone backward is stepped, and the next epoch begins anew."""
    net = line()
    task = sgd_task(net, lr=1.0)
    stopped = {"on_backward_end": 1, "on_grads_ready": 1, "on_step_end": 0}.get(hook, 0)
    at = at_batch + (hook == "on_step_end")
    run = trainer(epochs=2, callbacks=[raising(hook, lw.StopEpoch, at)]).fit(task, pairs([1], [2], [4]))
    steps = at + stopped
    assert net.weight.item() == -2.0 * sum([1, 2, 4][:steps])
    assert run.progress[:4] == (1, 2, 0, 2 * steps)
    assert len(run.history) == 2


@pytest.mark.capability("FA-24")
def test_a_stop_request_ends_training_between_two_steps() -> None:
    net, ends = line(), []
    user = trainer(epochs=3, callbacks=[acts(on_fit_end=lambda run: ends.append(run.progress.batch))])
    user.on(lw.Event.BATCH_START(once=2))(lambda run: run.request_stop("seen enough"))
    run = user.fit(sgd_task(net), pairs([1], [2], [4]))
    assert net.weight.item() == -3.0
    assert (run.stop_reason, run.status, run.progress[:4]) == ("seen enough", "stopped", (0, 0, 2, 2))
    assert ends == [2]


def test_the_first_reason_to_stop_is_kept() -> None:
    user = trainer(epochs=3)
    for reason in ("first", "second"):
        user.on(lw.Event.STEP_END, reason)(lambda run, reason: run.request_stop(reason))
    assert user.fit(sgd_task(line()), pairs([1], [2])).stop_reason == "first"


STARTS = ["on_stage_start", "on_epoch_start", "on_loader_start"]
ENDS = ["on_loader_end", "on_epoch_end", "on_stage_end"]


@pytest.mark.parametrize(
    ("settings", "stop_at", "between", "again"),
    [
        ({"epochs": 1}, None, [*STARTS, *ENDS], ["on_stage_end"]),
        ({"steps": 2}, None, [*STARTS, "on_stage_end"], ["on_stage_end"]),
        ({"epochs": 2}, 2, STARTS, [*STARTS[1:], *ENDS]),
        ({"epochs": 2}, 3, [*STARTS, *ENDS[:2]], [*STARTS[1:], *ENDS]),
    ],
)
@pytest.mark.filterwarnings("ignore:this task has already been trained")
def test_what_training_leaves_open_has_no_end_and_is_not_started_again(
    settings: dict[str, Any], stop_at: int | None, between: list[str], again: list[str]
) -> None:
    task = sgd_task(line())
    for expected in (between, again):
        seen: list[str] = []
        user = trainer(callbacks=[recorder(seen)], **settings)
        if stop_at is not None:
            user.on(lw.Event.STEP_END(once=stop_at))(lambda run: run.request_stop("enough"))
        user.fit(task, pairs([1], [2], [3]))
        told = [name for name in seen if name in (*STARTS, *ENDS, "on_fit_start", "on_fit_end")]
        assert told == ["on_fit_start", *expected, "on_fit_end"]


# ----------------------------------------------------------------------------------------------- run.log, run.replace


@pytest.mark.capability("CA-08")
def test_run_log_adds_the_mean_of_a_value_to_the_records() -> None:
    user = trainer(epochs=1)
    user.on(lw.Event.STEP_END)(lambda run: run.log({"twice": 2 * run.progress.step, "t": torch.ones(()) * 3}))
    run = user.fit(sgd_task(line()), pairs([1], [2], [4]))
    assert run.history["train/twice"] == [4.0]
    assert run.metrics["train/t"] == 3.0


def replacing(after: int, **new: Any) -> tuple[lw.Trainer, dict[str, Any]]:
    user = trainer(epochs=2)

    @user.on(lw.Event.STEP_END(once=after))
    def change(run: lw.Run) -> None:
        for name, obj in new.items():
            run.replace(name, obj)

    return user, new


@pytest.mark.capability("TB-02")
def test_model_optimizer_loss_and_data_can_be_replaced_while_training() -> None:
    """A callback replaces model, optimizer, loss and data with run.replace, the output with map_output."""
    data = pairs([1], [2])
    net, other = line(), line(10.0)
    user, _ = replacing(1, model=other, optimizer=torch.optim.SGD(other.parameters(), lr=0.5))
    task = sgd_task(net)
    run = user.fit(task, data)
    assert net.weight.item() == -1.0
    assert other.weight.item() == 10.0 - 0.5 * (2 + 1 + 2)
    assert run.models["model"] is task.module is other
    assert run.replaced == ["model by Linear after step 1", "optimizer by SGD after step 1"]

    net = line()
    user, _ = replacing(1, loss=lambda preds, target: 10 * preds.mean())
    user.fit(sgd_task(net), data)
    assert net.weight.item() == -(1 + 20 + 10 + 20)

    net = line()
    user, _ = replacing(1, optimizer=torch.optim.SGD(net.parameters(), lr=10.0))
    user.fit(sgd_task(net), data)
    assert net.weight.item() == -(1 + 20 + 10 + 20)

    net = line()
    user, _ = replacing(1, train=pairs([100]), valid=pairs([7]))
    run = user.fit(sgd_task(net), data, pairs([5]))
    assert net.weight.item() == -(1 + 2 + 100)  # the open epoch goes on with its data
    assert run.metrics["valid/loss"] == 7 * -103.0

    net = line()
    change = acts(map_output=lambda run, out, *_: {**out, "loss": (out["preds"] * 0 + 5).sum(), "preds": out["preds"]})
    assert trainer(epochs=1, callbacks=[change]).fit(sgd_task(net), data).metrics["train/loss"] == 5.0


def test_a_child_of_a_task_can_be_replaced_by_name() -> None:
    class Own(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = line(1.0), line(1.0)

        def training_step(self, batch: Any) -> Tensor:
            return self.head(self.body(batch[0])).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.body.parameters(), lr=1.0)

    task, head = Own(), line(3.0)
    user, _ = replacing(1, **{"model.head": head})
    task.head.requires_grad_(False)
    user.fit(task, pairs([1], [2]))
    assert task.head is head
    assert task.body.weight.item() == 1.0 - 1 - 3 * (2 + 1 + 2)


def test_a_phase_that_holds_a_child_gets_the_new_one() -> None:
    class Held(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = line()

        def phases(self) -> list[lw.Phase]:
            return [lw.Phase("main", lambda batch, net=self.net: net(batch[0]).mean())]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    task, new = Held(), line(10.0)
    user, _ = replacing(1, **{"model.net": new, "optimizer": torch.optim.SGD(new.parameters(), lr=1.0)})
    user.fit(task, pairs([1], [2]))
    assert new.weight.item() == 10.0 - (2 + 1 + 2)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"modle": 1}, "run.replace has no 'modle' to replace. Known: 'loss', 'model', 'model.module', 'optimizer', "
                       "'optimizer.main', 'train', 'valid'. Did you mean 'model'?"),
        ({"optimizer": 5}, "run.replace('optimizer', 5): expected a torch optimizer"),
    ],
)  # fmt: skip
def test_what_cannot_be_replaced_is_refused(new: dict[str, Any], message: str) -> None:
    user, _ = replacing(1, **new)
    with pytest.raises(lw.SettingError) as caught:
        user.fit(sgd_task(line()), pairs([1], [2]))
    assert str(caught.value) == message


class Two(lw.Task):
    """A child for each of two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = line(1.0), line(1.0)

    def training_step(self, batch: Any) -> Tensor:
        return (self.a(batch[0]) + self.b(batch[0])).mean()

    def configure_optimizers(self) -> Any:
        return {name: torch.optim.SGD(getattr(self, name).parameters(), lr=1.0) for name in "ab"}


def test_an_optimizer_of_several_is_replaced_by_its_name_alone() -> None:
    task = Two()
    new = torch.optim.SGD(task.b.parameters(), lr=10.0)
    with pytest.raises(lw.SettingError) as caught:
        replacing(1, optimizer=new)[0].fit(task, pairs([1], [2]))
    assert str(caught.value) == (
        "run.replace('optimizer', ...) could mean 'a', 'b'; name the one: run.replace('optimizer.a', new)"
    )
    task = Two()
    new = torch.optim.SGD(task.b.parameters(), lr=10.0)
    replacing(1, **{"optimizer.b": new})[0].fit(task, pairs([1], [2]))
    assert [task.a.weight.item(), task.b.weight.item()] == [1.0 - (1 + 2 + 1 + 2), 1.0 - (1 + 20 + 10 + 20)]


def test_the_optimizer_of_the_open_stage_is_the_one_that_is_replaced() -> None:
    net = line()
    new = torch.optim.SGD(net.parameters(), lr=10.0)
    stages = [lw.Stage("own", "4 steps", optimizer=torch.optim.SGD(net.parameters(), lr=1.0))]
    user = trainer()
    user.on(lw.Event.STEP_END(once=1))(lambda run: run.replace("optimizer", new))
    run = user.fit(sgd_task(net), pairs([1], [2]), stages=stages)
    assert run.optimizers["own.main"] is new
    assert net.weight.item() == -(1 + 20 + 10 + 20)


@pytest.mark.parametrize("says_so", [False, True])
def test_what_a_new_optimizer_leaves_out_is_told(says_so: bool) -> None:
    task = Two()
    new = torch.optim.SGD(task.a.parameters(), lr=1.0)
    user, _ = replacing(1, **{"optimizer.b": new})
    user.on(lw.Event.STEP_END(once=1))(lambda run: task.b.requires_grad_(not says_so))
    with nullcontext() if says_so else pytest.warns(lw.LoopwrightWarning) as caught:
        user.fit(task, pairs([1], [2]))
    assert [str(one.message) for one in caught or ()] == ([] if says_so else [
        "after optimizer.b by SGD after step 1, 1 parameters that were trained are in no optimizer any more (b.weight) "
        "and stay as they are; give them to the new one as well, or say that they are not to be trained: "
        "parameter.requires_grad_(False)"
    ])  # fmt: skip


def test_a_model_replaced_without_its_optimizer_is_refused() -> None:
    user, _ = replacing(1, model=line())
    with pytest.raises(lw.SettingError, match="the optimizer 'main' moves no parameter of the model any more"):
        user.fit(sgd_task(line()), pairs([1], [2]))


def test_an_optimizer_is_not_replaced_under_its_schedule_or_by_one_with_a_closure() -> None:
    for schedule, new, why in (
        (lambda o: torch.optim.lr_scheduler.StepLR(o, 1), torch.optim.SGD, "StepLR would go on with the old one"),
        (None, torch.optim.LBFGS, "one of them calls the step back and the other does not"),
    ):
        net = line()
        user, _ = replacing(1, optimizer=new(net.parameters(), lr=1.0))
        with pytest.raises(lw.SettingError, match=why):
            user.fit(sgd_task(net, schedule=schedule), pairs([1], [2]))


# ----------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("hook", ["on_fit_start", *TRAINING_HOOKS, *VALID, "on_epoch_end", "on_fit_end"])
def test_an_error_in_a_hook_keeps_its_type_and_says_where_it_was(hook: str) -> None:
    def fail(run: lw.Run, *args: Any) -> None:
        raise ZeroDivisionError("by a hook")

    caught: list[BaseException] = []
    watch = acts(on_exception=lambda run, error: caught.append(error))
    with pytest.raises(ZeroDivisionError, match="by a hook") as raised:
        recorded(pairs([1.0]), callbacks=[acts(**{hook: fail}), watch])
    assert caught == [raised.value]
    notes = raised.value.__notes__
    assert notes[0].startswith(f"[loopwright] in Acts.{hook}, after epoch ")


SHAPES = "; batch: (float32[2, 1], float32[2, 1])"


@pytest.mark.parametrize("hook", TRAINING_HOOKS)
def test_an_error_in_a_hook_of_a_step_has_the_shapes_of_its_batch(hook: str) -> None:
    def fail(run: lw.Run, *args: Any) -> None:
        raise ZeroDivisionError("by a hook")

    done = int(hook == "on_step_end")
    with pytest.raises(ZeroDivisionError) as raised:
        recorded(pairs([1.0, 2.0]), callbacks=[acts(**{hook: fail})])
    assert raised.value.__notes__ == [
        f"[loopwright] in Acts.{hook}, after epoch 0, batch {done} of the open epoch, step {done}{SHAPES}"
    ]


@pytest.mark.parametrize("hook", TRAINING_HOOKS)
def test_what_a_hook_may_not_return_is_told_with_the_shapes_of_its_batch(hook: str) -> None:
    wrong = None if hook.startswith("map_") else 5
    with pytest.raises(lw.HookError) as raised:
        recorded(pairs([1.0, 2.0]), callbacks=[acts(**{hook: lambda run, *args: wrong})])
    assert len(raised.value.__notes__) == 1
    assert raised.value.__notes__[0].endswith(SHAPES)


def test_a_loss_that_is_not_finite_is_told_with_the_shapes_of_all_batches_that_are_held() -> None:
    def fit(*batches: list[float], **settings: Any) -> list[str]:
        with pytest.raises(lw.NonFiniteError) as raised:
            trainer(epochs=1, **settings).fit(sgd_task(line(float("nan"))), lambda: iter(pairs(*batches)))
        return raised.value.__notes__

    place = "[loopwright] after epoch 0, batch 0 of the open epoch, step 0; batch: "
    assert fit([1, 2]) == [f"{place}(float32[2, 1], float32[2, 1])"]
    held = fit([1, 2], [3], accumulate=2)
    assert held == [f"{place}[(float32[2, 1], float32[2, 1]), (float32[1, 1], float32[1, 1])]"]


def test_an_error_in_a_hook_between_steps_has_no_batch() -> None:
    def fail(run: lw.Run, *args: Any) -> None:
        raise ZeroDivisionError("by a hook")

    for hook in ("on_epoch_start", "on_validation_start", "on_epoch_end", "on_stage_end"):
        with pytest.raises(ZeroDivisionError) as raised:
            recorded(pairs([1.0, 2.0]), callbacks=[acts(**{hook: fail})])
        assert not [note for note in raised.value.__notes__ if "; batch: " in note]


def test_an_error_in_a_step_says_after_which_step_and_with_which_batch() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = line()

        def forward(self, x: Tensor) -> Any:
            if x[0] == 4:
                raise KeyError("lost")
            return self.net(x)

    with pytest.raises(KeyError, match="lost") as raised:
        trainer(epochs=1).fit(sgd_task(Fails()), pairs([1], [2], [4, 5]))
    assert raised.value.__notes__ == [
        "[loopwright] after epoch 0, batch 2 of the open epoch, step 2; batch: (float32[2, 1], float32[2, 1])"
    ]


def test_a_failing_on_exception_does_not_hide_the_error() -> None:
    def fail(run: lw.Run, *args: Any) -> None:
        raise ValueError("first")

    def fail_again(run: lw.Run, error: BaseException) -> None:
        raise RuntimeError("second")

    with pytest.raises(ValueError, match="first") as raised:
        recorded(pairs([1.0]), callbacks=[acts(on_step_end=fail, on_exception=fail_again)])
    assert any("failed as well: RuntimeError('second')" in note for note in raised.value.__notes__)


def test_the_data_is_closed_when_a_step_fails_or_a_run_stops() -> None:
    for failing in (True, False):
        closed = []

        def batches(closed: list[int] = closed) -> Any:
            try:
                yield from pairs([1], [2], [4])
            finally:
                closed.append(1)

        user = trainer(epochs=1)

        @user.on(lw.Event.STEP_END(once=2))
        def leave(run: lw.Run, failing: bool = failing, closed: list[int] = closed) -> None:
            assert not closed
            if failing:
                raise ValueError("stop")
            run.request_stop("enough")

        try:
            user.fit(sgd_task(line()), batches)
        except ValueError as error:
            kept = error  # the traceback keeps the frames alive; closing must not wait for it
            assert closed == [1], kept
        assert closed == [1]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            None,
            "step 'main' returned None; return the loss (a tensor), or a dict such as "
            '{"loss": loss, "preds": preds, "target": target}',
        ),
        (
            {"los": torch.zeros(())},
            "step 'main' returned the keys ['los']; a training step must return 'loss', a scalar tensor",
        ),
        (
            {"loss": 0.5},
            "step 'main' returned a loss of type float; return the tensor itself (without .item() or float()), "
            "so that gradients can be computed from it",
        ),
        (
            torch.zeros(3, requires_grad=True),
            "step 'main' returned a loss of shape [3]; return a scalar, such as loss.mean()",
        ),
        (
            torch.zeros(()),
            "step 'main' returned a loss that depends on no trainable parameter; leave out .detach(), .item() and "
            "torch.no_grad() in the step, and check requires_grad of the parameters",
        ),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_wrong_output_of_a_step_is_explained(returned: Any, message: str, accumulate: int) -> None:
    net = line()

    class Own(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any) -> Any:
            return returned

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(net.parameters(), lr=1.0)

    with pytest.raises(lw.StepOutputError) as caught:
        trainer(epochs=1, accumulate=accumulate).fit(Own(), pairs([1], [2]))
    assert str(caught.value) == message


def test_an_empty_epoch_is_an_error_that_says_why() -> None:
    with pytest.raises(lw.DataError, match="epoch 1 of stage 'main' had no batch to train on"):
        trainer(epochs=1).fit(sgd_task(line(), loss=mean_of_preds), lambda: iter([]))


@pytest.mark.capability("TB-02")
def test_replaced_predictions_are_what_the_metrics_see() -> None:
    class Perfect(lw.Callback):
        def map_output(self, run: lw.Run, output: Any, batch: Any, phase: lw.Phase) -> Any:
            return output | {"preds": nn.functional.one_hot(output["target"], 3).float()}

    net = classifier()
    task = lw.Supervised(
        net,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(net.parameters(), lr=0.0),
        metrics={"accuracy": lw.metrics.Accuracy()},
    )
    run = trainer(epochs=1, callbacks=[Perfect()]).fit(task, loader(batch_size=8))
    assert run.history["train/accuracy"] == [1.0]
