"""What is found before step 0: every mistake that can be known, no false alarm, and nothing touched by looking."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as sched
from torch.utils.data import DataLoader, Dataset

import loopwright as lw
from tiny import acts, bits, classifier, line, loader, pairs, same, samples, sgd_task, trainer

DATA = pairs([1.0], [2.0], [3.0])  # 3 batches


def task_of(*optimizers: Any, net: nn.Module | None = None, **overridden: Any) -> lw.Task:
    """A task around ``net`` with the given optimizers and methods."""

    class Own(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = net if net is not None else line()

        def training_step(self, batch: Any) -> Any:
            return self.net(batch[0]).mean()

        def configure_optimizers(self) -> Any:
            if len(optimizers) == 1:
                return optimizers[0]
            return {f"o{i}": optimizer for i, optimizer in enumerate(optimizers)}

    for name, method in overridden.items():
        setattr(Own, name, method)
    return Own()


def sgd(module: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), **{"lr": 0.1, **settings})


def two() -> nn.Sequential:
    return nn.Sequential(line(bias=1.0), line(bias=1.0))


# ----------------------------------------------------------------------------------------------------------- mistakes

Case = tuple[Callable[[], tuple[lw.Trainer, Any, Any]], str]


def monitored(callback: Any, valid: Any = None, **settings: Any) -> Callable[[], tuple[lw.Trainer, Any, Any]]:
    return lambda: (trainer(epochs=2, callbacks=[callback]), sgd_task(line(), **settings), valid)


def scheduled(make: Callable[..., Any], **settings: Any) -> Callable[[], tuple[lw.Trainer, Any, Any]]:
    return lambda: (trainer(**{"epochs": 2, **settings}), sgd_task(line(), schedule=make), None)


def lbfgs(**settings: Any) -> Callable[[], tuple[lw.Trainer, Any, Any]]:
    def made() -> tuple[lw.Trainer, Any, Any]:
        net = line()
        return (
            trainer(epochs=1, **settings),
            lw.Supervised(net, nn.MSELoss(), torch.optim.LBFGS(net.parameters())),
            None,
        )

    return made


def shared_parameter() -> tuple[lw.Trainer, Any, Any]:
    net = two()
    return trainer(epochs=1), task_of(sgd(net), sgd(net[1]), net=net), None


def forgotten_parameters() -> tuple[lw.Trainer, Any, Any]:
    net = two()
    return trainer(epochs=1), task_of(sgd(net[0]), net=net), None


def frozen() -> tuple[lw.Trainer, Any, Any]:
    net = line()
    optimizer = sgd(net)
    return trainer(epochs=1), lw.Supervised(net.requires_grad_(False), nn.MSELoss(), optimizer), None


ACCURACY = {"accuracy": lw.metrics.Accuracy()}
MISTAKES: dict[str, Case] = {
    "monitors a typing error": (
        monitored(lw.EarlyStopping("valid/acuracy", mode="max"), DATA, metrics=ACCURACY),
        "EarlyStopping monitors 'valid/acuracy', which nothing produces. Known: 'valid/accuracy', 'valid/loss'. "
        "Did you mean 'valid/accuracy'?",
    ),
    "monitors validation without any": (
        monitored(lw.EarlyStopping()),
        "EarlyStopping monitors 'valid/loss', but there is no validation; pass fit(..., valid=loader) or monitor "
        "'train/loss'",
    ),
    "monitors without train/ or valid/": (
        monitored(lw.EarlyStopping("loss"), DATA),
        "EarlyStopping monitors 'loss', which is not logged. Known: 'train/loss', 'valid/loss'. "
        "Did you mean 'valid/loss'?",
    ),
    "monitors an unknown metric of training": (
        monitored(lw.EarlyStopping("train/f1")),
        "EarlyStopping monitors 'train/f1', which nothing produces. Known: 'train/loss'. Did you mean 'train/loss'?",
    ),
    "monitors a metric of several values as one": (
        monitored(lw.EarlyStopping("valid/f1"), DATA, metrics={"f1": lw.metrics.F1(2, average=None)}),
        "EarlyStopping monitors 'valid/f1', which nothing produces. Known: 'valid/f1/0', 'valid/f1/1', 'valid/loss'. "
        "Did you mean 'valid/f1/1'?",
    ),
    "monitors a part of a metric of one value": (
        monitored(lw.EarlyStopping("valid/f1/0"), DATA, metrics={"f1": 2 * lw.metrics.F1(2)}),
        "EarlyStopping monitors 'valid/f1/0', which nothing produces. Known: 'valid/f1', 'valid/loss'. "
        "Did you mean 'valid/f1'?",
    ),
    "monitors a class that has another name": (
        monitored(
            lw.EarlyStopping("valid/f1/dogs", mode="max"),
            DATA,
            metrics={"f1": lw.metrics.F1(["cat", "dog"], average=None)},
        ),
        "EarlyStopping monitors 'valid/f1/dogs', which nothing produces. Known: 'valid/f1/cat', 'valid/f1/dog', "
        "'valid/loss'. Did you mean 'valid/f1/dog'?",
    ),
    "a plateau that watches nothing": (
        lambda: (
            trainer(epochs=2),
            sgd_task(line(), schedule=lambda o: lw.Scheduler(sched.ReduceLROnPlateau(o), monitor="valid/los")),
            DATA,
        ),
        "ReduceLROnPlateau monitors 'valid/los', which nothing produces. Known: 'valid/loss'. Did you mean "
        "'valid/loss'?",
    ),
    "parameters in no optimizer": (
        forgotten_parameters,
        "2 trainable parameters are in no optimizer (net.1.weight, net.1.bias); add them to one, or say that they "
        "are not "
        "to be trained: parameter.requires_grad_(False)",
    ),
    "parameters in two optimizers": (
        shared_parameter,
        "net.1.weight is moved by two optimizers in stage 'main'; give each parameter to one of them",
    ),
    "an optimizer of another module": (
        lambda: (trainer(epochs=1), lw.Supervised(line(), nn.MSELoss(), sgd(line())), None),
        "the optimizer 'main' moves no parameter of the task; make it from the task's own: SGD(net.parameters(), ...), "
        "where net is the very module that is trained",
    ),
    "everything frozen": (
        frozen, "every parameter of phase 'main' is frozen; set requires_grad_(True) on what shall be trained",
    ),
    "no optimizer at all": (
        lambda: (trainer(epochs=1), task_of(), None),
        "no phase of stage 'main' moves an optimizer; return one from configure_optimizers",
    ),
    "a lazy module": (
        lambda: (trainer(epochs=1), sgd_task(nn.LazyLinear(1)), None),
        "module.weight, module.bias of a lazy module has no shape yet; call the module once with a batch before its "
        "optimizer is made",
    ),
    "OneCycleLR that is too short": (
        scheduled(lambda o: sched.OneCycleLR(o, 0.1, total_steps=5)),
        "OneCycleLR was made for 5 steps, but phase 'main' takes 6; make it with total_steps=6",
    ),
    "OneCycleLR stepped by epochs in a run by steps": (
        scheduled(lambda o: lw.Scheduler(sched.OneCycleLR(o, 0.1, total_steps=5), every="epoch"), epochs=None, steps=6),
        "OneCycleLR is stepped once an epoch here, but the run counts steps; wrap it: lw.per_step(scheduler)",
    ),
    "a schedule for steps stepped by epochs": (
        scheduled(lambda o: sched.CosineAnnealingLR(o, T_max=6)),
        "CosineAnnealingLR was made for T_max=6, the steps of this run, but is stepped once an epoch; wrap it, "
        "lw.per_step(scheduler), or make it with T_max=2",
    ),
    "a schedule by epochs that is never stepped": (
        scheduled(lambda o: sched.StepLR(o, 1), epochs=None, steps=2),
        "StepLR is stepped once an epoch, but this run ends after 2 steps, inside of its first epoch. Wrap it: "
        "lw.per_step(scheduler), or train for at least one epoch",
    ),
    "validate_every without validation": (
        lambda: (trainer(epochs=1, validate_every="2 steps"), sgd_task(line()), None),
        "validate_every='2 steps', but there is no validation data; pass fit(..., valid=loader)",
    ),
    "validation without a step": (
        lambda: (
            trainer(epochs=1),
            task_of(
                sgd(net := line()), net=net, training_step=lw.Task.training_step,
                phases=lambda self: [lw.Phase("main", lambda batch: self.net(batch[0]).mean())],
            ),
            DATA,
        ),
        "Own has neither validation_step nor training_step, but validation data was given; write one",
    ),
    "LBFGS with accumulation": (
        lbfgs(accumulate=2),
        "accumulate=2 cannot apply to LBFGS, which calls the step back as often as it needs; leave it out",
    ),
    "LBFGS with clipping": (
        lbfgs(clip_norm=1.0),
        "clip_norm=1.0 cannot apply to LBFGS, which calls the step back as often as it needs; leave it out",
    ),
    "LBFGS with skipping": (
        lbfgs(nonfinite="skip"),
        "nonfinite='skip' cannot apply to LBFGS, which calls the step back as often as it needs; leave it out",
    ),
    "LBFGS with bf16": (
        lbfgs(precision="bf16"),
        "precision='bf16' cannot apply to LBFGS, which calls the step back as often as it needs; leave it out",
    ),
    "LBFGS with a hook on its gradients": (
        lbfgs(callbacks=[acts(on_grads_ready=lambda run, phase, norm: None)]),
        "Acts.on_grads_ready cannot apply to LBFGS, which calls the step back as often as it needs; leave it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_before_step_0(mistake: str) -> None:
    """plan() names each seeded mistake and nothing else; fit refuses the run with the same words before any batch."""
    made, problem = MISTAKES[mistake]
    user, task, valid = made()
    assert user.plan(task, DATA, valid).problems == [problem]
    user, task, valid = made()
    with pytest.raises(lw.PlanError) as caught:
        user.fit(task, DATA, valid)
    assert caught.value.problems == [problem]
    told, _, place = str(caught.value).partition("\n    at ")
    assert told == f"this run cannot start:\n  - {problem}"
    assert re.fullmatch(r".*tests/(test_plan|tiny)\.py:\d+", place)
    assert not hasattr(task, "_run")  # nothing was begun


def test_state_that_no_checkpoint_can_hold_is_found_before_step_0(folder: Path) -> None:
    class Keeps(lw.Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"tools": {"loss": print}}

        def load_state_dict(self, state: Any) -> None: ...

    user, task = trainer(epochs=1, callbacks=[Keeps()], folder=folder, loggers=[]), sgd_task(line())
    with pytest.raises(lw.CheckpointError, match=r"Keeps\.state_dict\(\)\['tools'\]\['loss'\] is a builtin"):
        user.fit(task, DATA)
    assert task._run.progress.step == 0
    run = trainer(epochs=1, callbacks=[Keeps()], folder=folder, checkpoint=False).fit(sgd_task(line()), DATA)
    assert run.status == "done"


def test_a_step_function_refuses_settings_that_only_the_loop_could_apply() -> None:
    with pytest.raises(lw.PlanError) as caught:
        trainer(epochs=1, clip_norm=1.0, nonfinite="skip", accumulate=2).run(lambda run, batch: None, [1])
    assert caught.value.problems == [
        f"{name} cannot apply, since no phase moves an optimizer by itself; do it in the step"
        for name in ("clip_norm=1.0", "nonfinite='skip'", "accumulate=2")
    ]


def test_all_problems_are_told_at_once() -> None:
    user = trainer(epochs=1, callbacks=[lw.EarlyStopping()], validate_every="2 steps")
    plan = user.plan(lw.Supervised(line(), nn.MSELoss(), sgd(line())), DATA)
    assert len(plan.problems) == 3
    told = [f"problem: {problem} (at {plan.places[problem]})" for problem in plan.problems]
    assert str(plan).splitlines()[-3:] == told
    with pytest.raises(lw.PlanError, match=r"(?s)this run cannot start:\n  - .*\n  - .*\n  - "):
        plan.check()


@pytest.mark.parametrize(
    ("task", "data", "problem"),
    [
        (lambda: line(), DATA, "Linear is a plain module; say how to train it: lw.Supervised(module, "
         "loss=nn.CrossEntropyLoss(), optimizer=torch.optim.AdamW(module.parameters(), lr=1e-3)), or derive it from "
         "lw.Task"),
        (lambda: lw.Task, DATA, "Task is a class; make an instance: Task()"),
        (lambda: 3, DATA, "int is no task; pass lw.Supervised(...) or an lw.Task, or call "
         "trainer.run(step, data)"),
        (lambda: lw.Supervised(line()), DATA, "Supervised has no optimizer to train with; pass one: "
         "optimizer=torch.optim.AdamW(module.parameters(), lr=1e-3)"),
        (lambda: lw.Supervised(line(), optimizer="adam"), DATA, "the optimizer 'main' is 'adam'; pass a torch "
                                                                "optimizer "
         "such as torch.optim.AdamW(net.parameters(), lr=1e-3), or a factory: lambda params: torch.optim.AdamW(params, "
         "lr=1e-3)"),
        (lambda: lw.Supervised(line(), optimizer=lambda params: 5), DATA, "the factory of optimizer 'main' returned "
                                                                          "int; "
         "it must return a torch optimizer"),
        (lambda: task_of(phases=lambda self: []), DATA, "stage 'main' has no phase to train; return at least one from "
         "phases()"),
        (lambda: task_of(sgd(line()), phases=lambda self: [lw.Phase("a", print, optimizers="man")]), DATA,
         "phase 'a' moves the optimizer 'man', which does not exist. Known: 'main'. Did you mean 'main'?"),
        (lambda: sgd_task(line()), [], "there is not one batch in the data ([]): it is empty. Check the path, the "
                                       "filter "
         "or the split that it comes from"),
        (lambda: sgd_task(line(), metrics={"loss": lw.metrics.Accuracy()}), DATA,
         "a metric cannot be named 'loss': the mean of what steps return as 'loss' is logged so"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_into_a_run_is_a_problem_too(task: Callable[[], Any], data: Any, problem: str) -> None:
    assert trainer(epochs=1).plan(task(), data).problems == [problem]
    with pytest.raises((lw.SettingError, lw.DataError)) as caught:
        trainer(epochs=1).fit(task(), data)
    assert str(caught.value) == problem


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "how long to train is not said; write lw.Trainer(epochs=10), steps=1000 or time='10 min'"),
        ({"epochs": 1, "stages": [lw.Stage("a", "1 epoch")]}, "both the Trainer and the stages say how long to train; "
         "leave epochs, steps and time out of the Trainer"),
    ],
)  # fmt: skip
def test_how_long_to_train_is_said_once(settings: dict[str, Any], problem: str) -> None:
    stages = settings.pop("stages", None)
    with pytest.raises(lw.SettingError) as caught:
        trainer(**settings).fit(sgd_task(line()), DATA, stages=stages)
    assert str(caught.value) == problem


def saved(folder: Path, net: nn.Module, **settings: Any) -> Any:
    """A run of 3 of 6 steps, to go on from."""
    user = trainer(steps=3, folder=folder, name="first", checkpoint=lw.Checkpoint(), loggers=[], **settings)
    return user.fit(lw.Supervised(net, nn.CrossEntropyLoss(), sgd(net)), samples())


@pytest.mark.filterwarnings("ignore:accumulate=")
@pytest.mark.parametrize("how", ["exact", "weights"])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"net": lambda: classifier(batch_norm=True)}, "  - model, missing there: 1.weight, 1.bias, 1.running_mean"),
        ({"optimizer": torch.optim.Adam}, "  - optimizer 'main' is SGD there and Adam here"),
        ({"accumulate": 2}, "cannot be resumed with the same bits:\n  - stages/main/accumulate was 1 and is 2"),
        ({"torn": True}, "is damaged: "),
        ({"gone": True}, " is not a checkpoint: it does not exist. Give the folder of a run or of a checkpoint"),
    ],
    ids=["it fits", "other weights", "another optimizer", "other settings", "it is damaged", "it is gone"],
)
def test_a_plan_says_whether_a_checkpoint_can_be_gone_on_from(
    how: Any, change: dict[str, Any], problem: str | None, folder: Path
) -> None:
    """The plan of a resume has the words of the fit that would fail, and loads nothing."""
    run, change = saved(folder, classifier()), dict(change)
    path = next((run.folder / "checkpoints").glob("step-*"))
    if change.pop("torn", False):
        (path / "model.safetensors").write_bytes(b"torn")
    path = path / "gone" if change.pop("gone", False) else path
    net = change.pop("net", classifier)()
    optimizer = change.pop("optimizer", torch.optim.SGD)(net.parameters(), lr=0.1)
    before, files = bits(net), sorted(folder.rglob("*"))

    def job() -> dict[str, Any]:
        task = lw.Supervised(net, nn.CrossEntropyLoss(), optimizer)
        return {"task": task, "train": samples(), "resume": lw.Resume(path, how=how)}

    def user() -> lw.Trainer:
        return trainer(**{"steps": 6, "folder": folder, "name": "first", "loggers": [], **change})

    plan = user().plan(**job())
    assert same(bits(net), before)
    assert sorted(folder.rglob("*")) == files
    weights_only = how == "weights" and problem is not None and ("Adam" in problem or "accumulate" in problem)
    if problem is None or weights_only:
        assert plan.problems == []
        assert f"goes on from {path}" in plan.facts
        assert user().fit(**job()).status == "done"
        return
    (told,) = plan.problems
    assert problem in told
    assert re.fullmatch(r".*test_plan\.py:\d+", plan.places[told])
    with pytest.raises(lw.CheckpointError) as caught:
        user().fit(**job())
    assert str(caught.value) == told
    assert same(bits(net), before)


def test_a_tensor_that_is_moved_and_that_no_checkpoint_holds_makes_a_resume_inexact() -> None:
    net, free = line(), torch.zeros(1, requires_grad=True)
    task = lw.Supervised(net, nn.MSELoss(), torch.optim.SGD([*net.parameters(), free], lr=0.1))
    reason = "the optimizer 'main' moves 1 tensors that are no parameters of the task's models"
    assert trainer(epochs=1).plan(task, DATA).facts[-1] == f"exact resume: no, since {reason}"
    assert trainer(epochs=1).fit(task, DATA).exact == [reason]
    assert trainer(epochs=1).fit(sgd_task(line()), DATA).exact is True


# ----------------------------------------------------------------------------------------------------- no false alarm


def gan() -> tuple[lw.Trainer, Any, dict[str, Any]]:
    gen, disc = line(1.0), line(0.5)
    task = task_of(
        sgd(disc), sgd(gen), net=nn.ModuleDict({"gen": gen, "disc": disc}),
        phases=lambda self: [
            lw.Phase("disc", lambda batch: disc(gen(batch[0]).detach()).mean(), "o0", every=2, clip_norm=1.0),
            lw.Phase("gen", lambda batch: disc(gen(batch[0])).mean(), "o1"),
        ],
    )  # fmt: skip
    return trainer(epochs=2, callbacks=[lw.EarlyStopping("train/gen/loss")]), task, {"train": DATA}


def fine_tuned() -> tuple[lw.Trainer, Any, dict[str, Any]]:
    net = two()
    stages = [lw.Stage("head", "1 epoch", train="module.1.*"), lw.Stage("all", "0.5 epochs", accumulate=2)]
    return trainer(), sgd_task(net), {"train": DATA, "valid": DATA, "stages": stages}


def with_everything(folder: Path) -> tuple[lw.Trainer, Any, dict[str, Any]]:
    net = classifier(dropout=0.1, batch_norm=True)
    task = lw.Supervised(
        net, nn.CrossEntropyLoss(), torch.optim.AdamW(net.parameters()),
        schedule=lambda o: [sched.OneCycleLR(o, 0.1, total_steps=12), lw.Scheduler(sched.ReduceLROnPlateau(o))],
        metrics={"accuracy": lw.metrics.Accuracy(), "top": lw.metrics.Accuracy()},
    )  # fmt: skip
    user = trainer(
        epochs=2, accumulate=1, clip_norm=1.0, validate_every="0.5 epochs", log_every=2, seed=1, folder=folder,
        nonfinite="skip 3", loggers=[lw.CSVLogger(), lw.JSONLLogger()],
        checkpoint=[lw.Checkpoint("2 steps"), lw.Checkpoint("1 epoch", monitor="valid/accuracy")],
        callbacks=[lw.EarlyStopping("valid/top", patience=9), lw.EarlyStopping("train/accuracy", patience=9)],
    )  # fmt: skip
    user.on(lw.Event.STEP_END(every="10 min"))(lambda run: None)
    return user, task, {"train": loader(batch_size=7, shuffle=True), "valid": samples(11)}


def frozen_body() -> tuple[lw.Trainer, Any, dict[str, Any]]:
    net = two()
    net[0].requires_grad_(False)
    task = lw.Supervised(net, optimizer=lambda params: torch.optim.Adam(params), schedule=lambda o: sched.StepLR(o, 5))
    return trainer(steps=7), task, {"train": lambda: iter(DATA)}


def logs_itself() -> tuple[lw.Trainer, Any, dict[str, Any]]:
    """A callback's own value and a dict metric's part are monitored: only the run will tell."""

    class Collection(lw.metrics.Accuracy):
        def compute(self) -> Any:
            return {"a": 1.0}

    def logged(run: lw.Run, result: Any) -> None:
        run.log({"aux": 1.0})

    callbacks = [acts(on_step_end=logged), lw.EarlyStopping("train/aux", mode="max"),
                 lw.EarlyStopping("valid/many/a", mode="max")]  # fmt: skip
    task = lw.Supervised(
        net := classifier(),
        nn.CrossEntropyLoss(),
        sgd(net),
        metrics={"many": Collection(), "one": lw.metrics.Accuracy()},
    )
    return trainer(epochs=1, callbacks=callbacks), task, {"train": samples(), "valid": samples(11)}


def returns_more() -> tuple[lw.Trainer, Any, dict[str, Any]]:
    """A step of one's own returns what is monitored; several validation sets give names of their own."""

    class More(lw.Supervised):
        def training_step(self, batch: Any) -> dict[str, Any]:
            return {**super().training_step(batch), "f1": 0.5}

    net = line()
    callbacks = [lw.EarlyStopping("valid/near/f1"), lw.EarlyStopping("train/f1"), lw.EarlyStopping("valid/far/loss")]
    return (
        trainer(epochs=1, callbacks=callbacks), More(net, nn.MSELoss(), sgd(net)),
        {"train": DATA, "valid": {"near": DATA, "far": pairs([5.0])}},
    )  # fmt: skip


def adds_values() -> tuple[lw.Trainer, Any, dict[str, Any]]:
    """A callback puts more into the values of a validation."""

    class Adds(lw.Callback):
        def on_loader_end(self, run: lw.Run, kind: str, name: str, values: Any) -> None:
            values["gain"] = 1.0

    user = trainer(epochs=1, callbacks=[Adds(), lw.EarlyStopping("valid/gain", mode="max")])
    return user, sgd_task(line()), {"train": DATA, "valid": DATA}


def manual() -> tuple[lw.Trainer, Any, dict[str, Any]]:
    """The step moves its optimizer itself."""
    net = line()
    optimizer = sgd(net)

    def step(batch: Any) -> Any:
        optimizer.zero_grad()
        loss = net(batch[0]).mean()
        loss.backward()
        optimizer.step()
        return {"loss": loss}

    return (
        trainer(epochs=1),
        task_of(net=net, phases=lambda self: [lw.Phase("main", step, optimizers=())]),
        {"train": DATA},
    )


def lbfgs_alone() -> tuple[lw.Trainer, Any, dict[str, Any]]:
    user, task, _ = lbfgs()()
    return user, task, {"train": DATA, "valid": DATA}


def learned_loss() -> tuple[lw.Trainer, Any, dict[str, Any]]:
    """The loss has parameters of its own, one tensor is in no module, weights are tied."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, preds: Any, target: Any) -> Any:
            return (preds * self.scale).mean()

    net, loss, free = two(), Scaled(), torch.zeros(1, requires_grad=True)
    net[1].weight = net[0].weight
    optimizer = torch.optim.SGD([*net.parameters(), *loss.parameters(), free], lr=0.1)
    cosine = sched.CosineAnnealingLR(optimizer, T_max=2)
    return trainer(epochs=2), lw.Supervised(net, loss, optimizer, schedule=cosine), {"train": DATA}


CLEAN: dict[str, Callable[..., tuple[lw.Trainer, Any, dict[str, Any]]]] = {
    made.__name__: made
    for made in (
        gan,
        fine_tuned,
        frozen_body,
        logs_itself,
        returns_more,
        adds_values,
        manual,
        lbfgs_alone,
        learned_loss,
    )
}


@pytest.mark.parametrize("setup", [*CLEAN, "with_everything"])
def test_a_clean_setup_raises_no_alarm(setup: str, folder: Path) -> None:
    """Setups that work have no problem in their plan, and do work."""
    user, task, data = with_everything(folder) if setup == "with_everything" else CLEAN[setup]()
    plan = user.plan(task, **data)
    assert plan.problems == []
    assert str(plan).splitlines()[-1] == "no problem found"
    assert user.fit(task, **data).status == "done"


# ----------------------------------------------------------------------------------------------------- looking is safe


class Untouchable(Dataset[Any]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Any:
        raise AssertionError("a batch was read")


@pytest.mark.parametrize("look", ["plan", "explain"])
def test_looking_reads_no_batch_writes_nothing_and_changes_nothing(look: str, folder: Path) -> None:
    """plan() and explain() read no batch, write nothing, draw nothing, leave model and optimizer as they are."""
    net = classifier(dropout=0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9)
    task = lw.Supervised(
        net, nn.CrossEntropyLoss(), optimizer, schedule=lambda o: sched.LinearLR(o, 0.5, total_iters=4)
    )
    net.eval()
    before = bits(net, optimizer)
    user = trainer(epochs=2, folder=folder)
    for _ in range(2):
        getattr(user, look)(task, DataLoader(Untouchable(), 2, shuffle=True), DataLoader(Untouchable(), 2))
    assert same(bits(net, optimizer), before)
    assert not folder.exists()
    assert not net.training


def rates(task: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    seen: list[float] = []
    user = trainer(epochs=3)
    user.on(lw.Event.STEP_END)(lambda run: seen.append(optimizer.param_groups[0]["lr"]))
    user.fit(task, pairs([1.0]))
    return seen


@pytest.mark.parametrize("before", ["nothing", "plan", "explain", "a refused fit", "a fit without a folder"])
def test_a_warm_up_starts_where_it_should_after_looking(before: str, folder: Path) -> None:
    """Making LinearLR multiplies the learning rate: what made one for nothing must put the rate back."""
    net = line()
    optimizer = sgd(net, lr=1.0)
    task = lw.Supervised(net, nn.MSELoss(), optimizer, schedule=lambda o: sched.LinearLR(o, 0.5, total_iters=2))
    if before == "a refused fit":
        with pytest.raises(lw.PlanError):
            trainer(epochs=1, callbacks=[lw.EarlyStopping()]).fit(task, DATA)
    elif before == "a fit without a folder":
        folder.write_text("a file is in the way")
        with pytest.raises(lw.SettingError, match="cannot be written"):
            trainer(epochs=1, folder=folder).fit(task, DATA)
    elif before != "nothing":
        getattr(trainer(epochs=1), before)(task, DATA)
    assert rates(task, optimizer) == [0.5, 0.75, 1.0]


def test_the_facts_of_a_plan_say_what_the_run_will_do() -> None:
    net = two()
    net[0].requires_grad_(False)
    task = lw.Supervised(net, nn.MSELoss(), torch.optim.SGD(net[1].parameters(), lr=0.1))
    assert str(trainer(epochs=1, steps=9, accumulate=2).plan(task, DATA)).splitlines() == [
        "stage 'main': until 1 epoch or 9 steps; an epoch is 3 batches, 2 steps; phases: main",
        "parameters: 4, of which 2 are trained",
        f"device: {'cpu' if not torch.accelerator.is_available() else torch.accelerator.current_accelerator()}, "
        "precision: fp32",
        "exact resume: yes",
        "no problem found",
    ]
    plan = trainer(steps=9).plan(task, lambda: iter(DATA))
    assert plan.facts[0] == "stage 'main': until 9 steps; an epoch is an unknown number of batches; phases: main"
    assert plan.facts[-1].startswith("exact resume: no, since ")


def test_a_phase_that_is_due_at_some_steps_has_its_epochs_as_any_other() -> None:
    """``every=2`` halves the steps of a phase, not the epochs that its schedule goes by."""
    net = line()
    sgd = torch.optim.SGD(net.parameters(), 0.1)

    class Seldom(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def phases(self) -> list[lw.Phase]:
            return [lw.Phase("main", lambda batch: self.net(batch[0]).mean(), every=2)]

        def configure_optimizers(self) -> object:
            return sgd, torch.optim.lr_scheduler.StepLR(sgd, 1)

    assert trainer(epochs=1).plan(Seldom(), pairs([1.0], [2.0])).problems == []
