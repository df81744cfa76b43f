"""The Trainer: settings that are checked and can be read back, and the verbs that use them."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import loopwright as lw
from loopwright.loggers import read_jsonl
from tiny import acts, bits, classifier, line, loader, mean_of_preds, pairs, same, samples, seed_all, sgd_task, trainer

DATA = pairs([1.0, 1.0], [2.0])

# ----------------------------------------------------------------------------------------------------------- settings


def test_settings_are_kept_as_given_and_read_back() -> None:
    callback = lw.EarlyStopping()
    given: dict[str, Any] = {
        "epochs": 3, "time": "2 hours", "precision": "bf16", "accumulate": 4, "clip_norm": 0.5, "callbacks": [callback],
        "folder": None, "progress": False, "validate_every": "0.5 epochs", "log_every": 10, "seed": 7,
        "nonfinite": "skip 25",
    }  # fmt: skip
    user = lw.Trainer(**given)
    names = list(inspect.signature(lw.Trainer).parameters)
    defaults = {n: p.default for n, p in inspect.signature(lw.Trainer).parameters.items()}
    assert list(user.settings) == names
    assert user.settings == {**defaults, **given}
    again = lw.Trainer(**user.settings)
    assert again.settings == user.settings


def test_settings_are_written_into_the_folder(folder: Path) -> None:
    import yaml

    callbacks = [lw.EarlyStopping("train/loss")]
    user = trainer(epochs=1, folder=folder, name="n", seed=3, callbacks=callbacks)
    run = user.fit(sgd_task(line()), DATA)
    assert run.folder is not None
    written = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert (written["epochs"], written["seed"], written["validate_every"], written["key"]) == (1, 3, "1 epoch", 3)
    (told,) = written["callbacks"]
    assert told["class"] == "<loopwright.callbacks.early_stopping.EarlyStopping>"
    assert (told["monitor"], told["patience"]) == ("train/loss", 3)
    assert {"epochs": 1, "seed": 3}.items() <= run.settings.items()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs=0: expected a positive number, such as epochs=10"),
        ({"epochs": -1}, "epochs=-1: expected a positive number, such as epochs=10"),
        ({"epochs": True}, "epochs=True: expected a positive number, such as epochs=10"),
        ({"epochs": float("inf")}, "epochs=inf: expected a positive number, such as epochs=10"),
        ({"steps": -5}, "steps=-5: expected a positive number, such as steps=1000"),
        ({"time": float("nan")}, "time=nan: expected a positive number, such as time='10 min'"),
        ({"steps": 2.5}, "steps=2.5: the duration 2.5 must be a positive whole number"),
        ({"time": "soon"}, "time='soon' is not a duration; write a number and a unit, such as '500 "
                           "steps', '2 epochs', '10 min' or '1e6 samples'"),
        ({"accumulate": 0}, "accumulate=0: expected a whole number of batches, at least 1"),
        ({"accumulate": True}, "accumulate=True: expected a whole number of batches, at least 1"),
        ({"clip_norm": 0.0}, "clip_norm=0.0: expected a positive number, or None for no clipping"),
        ({"seed": -1}, "seed=-1: expected a whole number from 0, or None to leave the generators alone"),
        ({"seed": 2**64 + 1}, "seed=18446744073709551617: torch takes seeds below 2**64, such as seed=1"),
        ({"seed": "7"}, "seed='7': expected a whole number from 0, or None to leave the generators alone"),
        ({"nonfinite": "ignore"}, "nonfinite='ignore': expected 'raise', 'skip', 'skip 25' (at most so many in a "
                                  "row) or "
                                  "None"),
        ({"nonfinite": "skip 0"}, "nonfinite='skip 0': expected 'raise', 'skip', 'skip 25' (at most so many in a "
                                  "row) or "
                                  "None"),
        ({"nonfinite": False}, "nonfinite=False: expected 'raise', 'skip', 'skip 25' (at most so many in a row) or "
                               "None"),
        ({"precision": "fp23"}, "precision='fp23' is unknown. Known: 'bf16', 'bf16-true', 'fp16', 'fp32', 'fp64'. Did "
                                "you mean 'fp32'?"),
        ({"precision": 16}, "precision=16 is called 'fp16' here: precision='fp16'"),
        ({"validate_every": "1 epock"}, "validate_every='1 epock': unknown unit 'epock' in the duration '1 epock'. "
         "Known: '%', 'batch', 'batches', 'day', 'days', 'epoch', 'epochs', 'h', 'hour', 'hours', 'min', 'minute', "
         "'minutes', 'percent', "
         "'s', 'sample', 'samples', 'sec', 'second', 'seconds', 'step', 'steps', 'token', 'tokens'. Did you mean "
         "'epoch'?"),
        ({"log_every": 0}, "log_every=0: the duration 0 must be a positive number"),
        ({"callbacks": lw.EarlyStopping()}, "callbacks=EarlyStopping: expected a list of them, such as "
                                            "callbacks=[EarlyStopping(...)]"),
        ({"loggers": lw.JSONLLogger()}, "loggers=JSONLLogger: expected a list of them, such as "
                                        "loggers=[JSONLLogger(...)]"),
        ({"callbacks": lw.EarlyStopping}, "callbacks=EarlyStopping: expected a list of them, such as "
                                          "callbacks=[EarlyStopping(...)]"),
        ({"callbacks": None}, "callbacks=None: expected a list of them, such as "
                              "callbacks=[lw.EarlyStopping('valid/loss')]"),
        ({"loggers": 3}, "loggers=3: expected a list of them, such as loggers=['csv']"),
        ({"loggers": False}, "loggers=False: expected a list of them, such as loggers=['csv']"),
        ({"clip_norm": True}, "clip_norm=True: expected a positive number, or None for no clipping"),
        ({"clip_norm": "1"}, "clip_norm='1': expected a positive number, or None for no clipping"),
        ({"clip_norm": float("nan")}, "clip_norm=nan: expected a positive number, or None for no clipping"),
        ({"deterministic": "no"}, "deterministic='no': expected True or False"),
        ({"deterministic": None}, "deterministic=None: expected True or False"),
        ({"deterministic": 1}, "deterministic=1: expected True or False"),
        ({"name": ""}, "name='': expected a text, such as name='baseline'"),
        ({"name": 3}, "name=3: expected a text, such as name='baseline'"),
        ({"folder": 3}, "folder=3: expected a path, such as folder='runs', or None to write nothing"),
        ({"folder": False}, "folder=False: expected a path, such as folder='runs', or None to write nothing"),
        ({"device": None}, "device=None: expected 'auto', or a device such as 'cpu' or 'cuda:0'"),
        ({"device": True}, "device=True: expected 'auto', or a device such as 'cpu' or 'cuda:0'"),
        ({"device": -1}, "device=-1: expected 'auto', or a device such as 'cpu' or 'cuda:0'"),
        ({"devices": "no"}, "devices='no': expected 'auto' or a whole number from 1"),
        ({"devices": True}, "devices=True: expected 'auto' or a whole number from 1"),
        ({"nodes": -1}, "nodes=-1: expected 'auto' or a whole number from 1"),
        ({"checkpoint": "5 min", "folder": "runs"}, "checkpoint='5 min': expected True, False, an lw.Checkpoint or a "
                                                    "list "
         "of them, such as checkpoint=lw.Checkpoint('10 min')"),
        ({"checkpoint": lw.Checkpoint()}, "checkpoint=... needs a folder to write to; leave folder=None out, or "
                                          "checkpoint=False"),
        ({"callbacks": [lw.Checkpoint()]}, "checkpoint=... needs a folder to write to; leave folder=None out, or "
                                           "checkpoint=False"),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", repr(value)),  # the same in every worker
)  # fmt: skip
def test_a_setting_that_cannot_be_used_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        trainer(**{"epochs": 1, **settings})
    assert str(caught.value) == message


_NAMES = "; expected a name of those of configure_optimizers, an optimizer, a list of these, or None for all"
_PATTERN = "expected a pattern of names of parameters, such as "


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lw.Phase("", print), "Phase: name='': expected a text, such as name='generator'"),
        (lambda: lw.Phase("a", print, clip_norm=True), "Phase 'a': clip_norm=True; expected a positive number or None"),
        (lambda: lw.Phase("a", print, clip_norm="1"), "Phase 'a': clip_norm='1'; expected a positive number or None"),
        (lambda: lw.Phase("a", print, optimizers=True), f"Phase 'a': optimizers=True{_NAMES}"),
        (lambda: lw.Phase("a", print, optimizers=["main", 3]), f"Phase 'a': optimizers=['main', 3]{_NAMES}"),
        (lambda: lw.Stage(3, "1 epoch"), "Stage: name=3: expected a text, such as name='head'"),
        (lambda: lw.Stage("a", 1, train=True), f"Stage 'a': train=True; {_PATTERN}train='head.*', or a list of them"),
        (lambda: lw.Stage("a", 1, freeze=[3]), f"Stage 'a': freeze=[3]; {_PATTERN}freeze='head.*', or a list of them"),
        (lambda: lw.Stage("a", 1, callbacks=3), "Stage 'a': callbacks=3: expected a list of them, such as "
                                                "callbacks=[lw.EarlyStopping('valid/loss')]"),
        (lambda: lw.Checkpoint(monitor=3), "monitor=3: expected a text, such as monitor='valid/loss'"),
        (lambda: lw.Checkpoint(async_save="no"), "async_save='no': expected True or False"),
        (lambda: lw.Checkpoint(at_end=None), "at_end=None: expected True or False"),
        (lambda: lw.Checkpoint(folder=3), "folder=3: expected a path or a URL, such as folder='s3://bucket/run', or "
                                          "None for the run folder"),
        (lambda: lw.EarlyStopping(None), "monitor=None: expected a text, such as monitor='valid/loss'"),
        (lambda: lw.EarlyStopping(min_delta="0"), "min_delta='0': expected 0 or more; mode tells the direction"),
        (lambda: lw.EarlyStopping(min_delta=True), "min_delta=True: expected 0 or more; mode tells the direction"),
        (lambda: lw.EarlyStopping(min_delta=0.1, relative="no"), "relative='no': expected True or False"),
        (lambda: lw.EarlyStopping(stop_at="1"), "stop_at='1': expected a number, or None"),
        (lambda: lw.EarlyStopping(diverged_at=float("nan")), "diverged_at=nan: expected a number, or None"),
        (lambda: lw.Loader([1], seed="x"), "seed='x': expected a whole number from 0, or None for that of the run"),
        (lambda: lw.Loader([1], seed=1.5), "seed=1.5: expected a whole number from 0, or None for that of the run"),
        (lambda: lw.Loader([1], seed=True), "seed=True: expected a whole number from 0, or None for that of the run"),
        (lambda: lw.Loader([1], drop_last="no"), "drop_last='no': expected True or False"),
    ],
)  # fmt: skip
def test_an_argument_that_cannot_be_used_is_refused_where_it_is_given(make: Any, message: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"until": []},
         "Stage 'a': until=[] says no end, and it would train forever; write a duration, until='2 epochs', or several, "
         "until=['10 epochs', '2 h'], of which the first one counts"),
        ({"phases": True}, "stage 'a': phases=True: expected a list of phases: [lw.Phase('main', step), ...]"),
        ({"phases": ["a"]}, "stage 'a': phases=['a']: expected a list of phases: [lw.Phase('main', step), ...]"),
        ({"weight": 3}, "weight=3 cannot be called; pass a function of the batch that returns how many samples or "
                        "tokens it has"),
        ({"weight": []}, "weight=[] cannot be called; pass a function of the batch that returns how many samples or "
                         "tokens it has"),
    ],
)  # fmt: skip
def test_a_part_of_a_stage_that_cannot_be_used_is_refused_before_any_work(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        trainer().fit(sgd_task(line()), DATA, stages=[lw.Stage(**{"name": "a", "until": "1 epoch", **stage})])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu:zero", "device='gpu:zero' is no torch device ("),
        ("xpu:7", "device='xpu:7' is not on this machine (accelerators: "),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_any_work(device: str, message: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        trainer(epochs=1, device=device).fit(sgd_task(line()), DATA)
    assert str(caught.value).startswith(message)


@pytest.mark.capability("FA-15")
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_an_accelerator_is_used_unasked() -> None:
    net = line()
    trainer(epochs=1).fit(sgd_task(net), DATA)
    assert net.weight.device.type != "cpu"


def test_no_more_is_imported_for_a_fit_than_it_needs() -> None:
    """torch.use_deterministic_algorithms alone would import the compiler, for seconds."""
    code = """
import sys, loopwright as lw
lw.Trainer(epochs=1, folder=None, progress=False).run(lambda run, batch: batch, [1.0, 2.0])
print("torch._inductor" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# -------------------------------------------------------------------------------------------- validate, test, predict


def test_validate_and_test_measure_by_samples_and_change_nothing() -> None:
    net = classifier(dropout=0.5, batch_norm=True)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), metrics={"accuracy": lw.metrics.Accuracy()})
    x, y = samples(11)
    data = DataLoader(TensorDataset(x, y), 4, shuffle=True)
    seed_all(5)
    before = bits(net)
    valid, test = trainer().validate(task, data), trainer().test(task, data)
    assert same(bits(net), before)
    assert net.training
    with torch.no_grad():
        logits = net.eval()(x)
    assert valid["valid/loss"] == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-6)
    assert valid["valid/accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert {name.replace("test/", "valid/"): value for name, value in test.items()} == pytest.approx(valid)


def test_several_validation_sets_are_named() -> None:
    values = trainer().validate(sgd_task(line(1.0)), {"near": pairs([1.0]), "far": pairs([5.0])})
    assert values == {"valid/near/loss": 1.0, "valid/far/loss": 5.0}
    run = trainer(epochs=1).fit(sgd_task(line(1.0), lr=0.0), DATA, {"near": pairs([1.0]), "far": pairs([5.0])})
    assert run.history[-1].items() >= values.items()


class Both(NamedTuple):
    a: Tensor
    b: list[Any]


def test_predictions_are_joined_in_order_whatever_they_are_made_of() -> None:
    class Many(lw.Task):
        def predict_step(self, batch: Any) -> Any:
            (x,) = batch
            return {"x": x, "pair": (x + 1, [x.sum()]), "named": Both(x, [2 * x]), "text": f"{len(x)} rows"}

    data = DataLoader(TensorDataset(torch.arange(5.0)), 2)
    made = trainer().predict(Many(), data)
    x = torch.arange(5.0)
    assert torch.equal(made["x"], x)
    assert torch.equal(made["pair"][0], x + 1)
    assert torch.equal(made["pair"][1][0], torch.tensor([1.0, 5.0, 4.0]))
    assert isinstance(made["named"], Both)
    assert torch.equal(made["named"].b[0], 2 * x)
    assert made["text"] == ["2 rows", "2 rows", "1 rows"]


def test_predictions_of_shuffled_own_data_are_in_the_order_of_the_data() -> None:
    x = torch.arange(200.0).view(-1, 1)
    assert torch.equal(trainer().predict(lw.Supervised(line(3.0)), x), 3 * x)


# ---------------------------------------------------------------------------------------------------------------- run


@pytest.mark.capability("IG-02")
def test_a_step_function_does_all_the_work_and_its_values_are_logged() -> None:
    total = {"sum": 0.0}

    def step(run: lw.Run, batch: int) -> Any:
        total["sum"] += batch
        return {"sum": total["sum"], "even": float(batch % 2 == 0)}

    run = trainer(epochs=2).run(step, [1, 2, 3])
    assert total["sum"] == 12
    assert run.progress[:4] == (1, 2, 0, 6)
    assert run.history["train/even"] == [pytest.approx(1 / 3)] * 2
    assert run.history["train/sum"] == [pytest.approx((1 + 3 + 6) / 3), pytest.approx((7 + 9 + 12) / 3)]


@pytest.mark.parametrize("returned", [None, 2, 2.0, torch.tensor(2.0), {"loss": 2.0}, {}])
def test_a_step_function_may_return_a_number_a_dict_or_nothing(returned: Any) -> None:
    run = trainer(epochs=1).run(lambda run, batch: returned, [1, 2])
    assert run.metrics.get("train/loss") == (None if returned is None or returned == {} else 2.0)


@pytest.mark.parametrize("returned", ["text", [1], (1, 2)])
def test_a_step_function_that_returns_something_else_is_told(returned: Any) -> None:
    with pytest.raises(lw.StepOutputError, match=r"^step 'main' returned "):
        trainer(epochs=1).run(lambda run, batch: returned, [1])


def test_state_of_a_step_function_reaches_it_and_its_learning_rate_is_logged() -> None:
    net = line()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.25)

    def step(run: lw.Run, batch: Any) -> Tensor:
        assert run.state["net"] is net
        optimizer.zero_grad()
        loss = net(batch[0]).mean()
        loss.backward()
        optimizer.step()
        return loss

    run = trainer(epochs=1).run(step, pairs([1.0], [1.0]), state={"net": net, "opt": optimizer})
    assert net.weight.item() == -0.5
    assert run.metrics["lr"] == 0.25


# --------------------------------------------------------------------------------------------------------- data module


class Squares(lw.DataModule):
    def __init__(self, n: int = 12) -> None:
        self.n, self.calls = n, list[str]()

    def prepare_data(self) -> None:
        self.calls.append("prepare")

    def setup(self) -> None:
        self.calls.append("setup")
        self.x = torch.linspace(-1, 1, self.n)[:, None]

    def train_data(self) -> Any:
        return self.x, self.x**2

    def valid_data(self) -> Any:
        return self.x[:3], self.x[:3] ** 2

    def test_data(self) -> Any:
        return DataLoader(TensorDataset(self.x, self.x**2), 4)

    def predict_data(self) -> Any:
        return self.x


@pytest.mark.capability("PL-24")
def test_a_data_module_serves_fit_validate_test_and_predict() -> None:
    """The same module serves every verb, is prepared once for each, and can be swapped for another one."""
    task = sgd_task(nn.Linear(1, 1), loss=nn.MSELoss(), lr=0.1)
    user, data = trainer(epochs=2), Squares()
    run = user.fit(task, data)
    assert data.calls == ["prepare", "setup"]
    assert run.progress.samples == 24
    assert run.metrics["valid/loss"] == pytest.approx(user.validate(task, data)["valid/loss"])
    assert set(user.test(task, data)) == {"test/loss"}
    assert user.predict(task, data).shape == (12, 1)
    other = Squares(20)
    user.until = [lw.Duration(3, "epochs")]
    assert user.fit(task, other).progress.samples == 24 + 20
    assert user.fit(sgd_task(nn.Linear(1, 1)), Squares(), pairs([1.0])).metrics.keys() >= {"valid/loss"}


def test_data_that_a_module_does_not_have_is_asked_for() -> None:
    class Nothing(lw.DataModule):
        pass

    for verb in ("fit", "test", "predict"):
        with pytest.raises(lw.DataError, match=r"Nothing\.\w+_data\(\) gave None; define it: def \w+_data\(self\)"):
            getattr(trainer(epochs=1), verb)(sgd_task(line()), Nothing())


@pytest.mark.capability("PL-13")
def test_a_part_of_the_data_is_trained_on() -> None:
    """A tenth of the data for some epochs is a Subset; a tenth of an epoch is a duration."""
    data = TensorDataset(*samples(60))
    task = sgd_task(classifier(), loss=nn.CrossEntropyLoss(), lr=0.1)
    run = trainer(epochs=3).fit(task, DataLoader(Subset(data, range(len(data) // 10)), 2, shuffle=True))
    assert (run.progress.samples, run.progress.epoch) == (18, 3)
    task = sgd_task(classifier(), loss=nn.CrossEntropyLoss(), lr=0.1)
    run = trainer(epochs=0.1).fit(task, DataLoader(data, 2, shuffle=True))
    assert (run.progress.samples, run.progress.epoch) == (6, 0)


# ------------------------------------------------------------------------------------------------------------- the run


def test_a_folder_names_the_module_and_tells_how_it_went(folder: Path) -> None:
    run = lw.Trainer(epochs=1, folder=folder, progress=False).fit(sgd_task(line()), DATA, DATA)
    assert run.folder is not None
    assert run.folder.parent == folder / "Linear"
    record = json.loads((run.folder / "run.json").read_text())
    assert record["status"] == run.status == "done"
    assert record["metrics"] == run.metrics
    assert record["progress"]["step"] == 2
    assert record["exact"] is True
    kinds = [json.loads(text)["kind"] for text in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["valid", "train", "epoch"]
    assert [p.name for p in (run.folder / "checkpoints").glob("step-*")] == ["step-00000002"]
    assert (
        repr(run) == f"Run(done, epoch=1, step=2, valid/loss=-4, train/loss=-0.6667, lr=1, folder={str(run.folder)!r})"
    )


@pytest.mark.capability("PL-12")
def test_checkpoints_are_written_by_the_clock_unasked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A default Trainer saves every five minutes of training, not at its end alone."""
    began, steps = time.perf_counter(), [0]
    monkeypatch.setattr(time, "perf_counter", lambda: began + 120.0 * steps[0])
    there: list[list[str]] = []

    def look(run: lw.Run, result: lw.StepResult) -> None:
        steps[0] += 1
        there.append(sorted(path.name for path in folder.glob("*/*/checkpoints/step-*")))

    task = sgd_task(line(), lr=0.1)
    lw.Trainer(steps=7, folder=folder, progress=False, callbacks=[acts(on_step_end=look)]).fit(
        task, pairs(*[[1.0]] * 8)
    )
    assert there[2] == []  # four minutes
    assert there[4] == ["step-00000004"]


@pytest.mark.capability("PL-12")
def test_records_checkpoints_and_early_stopping_take_no_code_of_ones_own() -> None:
    """Records, checkpoints and going on are there unasked, early stopping by one argument, load by a call."""

    def fit(epochs: int, *callbacks: lw.Callback, **how: Any) -> tuple[nn.Module, lw.Run]:
        net = classifier(seed=5)
        adam = torch.optim.Adam(net.parameters(), lr=0.1)
        user = lw.Trainer(epochs=epochs, progress=False, callbacks=callbacks)
        task = lw.Supervised(net, nn.CrossEntropyLoss(), adam, metrics={"accuracy": lw.metrics.Accuracy()})
        return net, user.fit(task, loader(20, batch_size=4), loader(20, batch_size=20), **how)

    net, run = fit(50, lw.EarlyStopping("valid/loss", patience=2, min_delta=0.02))
    assert str(run.stop_reason).startswith("valid/loss has not improved")
    assert run.progress.epoch < 50

    assert run.folder is not None
    records = read_jsonl(run.folder / "metrics.jsonl")
    for name in ("train/loss", "train/accuracy", "valid/loss", "valid/accuracy", "lr"):
        assert [record[name] for record in records if record["kind"] == "epoch"] == run.history[name]
    (saver,) = run.savers
    assert (saver.every, saver.at_end) == ("5 min", True)

    fresh = classifier(seed=6)
    lw.load_weights(fresh, run.folder)
    assert same(fresh.state_dict(), net.state_dict())

    whole, _ = fit(6)
    _, short = fit(3)
    longer, run = fit(6, resume=short.folder)
    assert run.resumed_from is not None
    assert same(longer.state_dict(), whole.state_dict())


def test_nothing_is_written_without_a_folder(tmp_path: Path) -> None:
    run = trainer(epochs=1).fit(sgd_task(line()), DATA)
    assert run.folder is None
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_run_says_why(folder: Path) -> None:
    user = trainer(epochs=5, folder=folder, loggers=[], checkpoint=False)
    user.on(lw.Event.STEP_END(once=3))(lambda run: run.request_stop("good enough"))
    run = user.fit(sgd_task(line()), DATA)
    assert (run.status, run.stop_reason, run.progress.step) == ("stopped", "good enough", 3)
    assert run.folder is not None
    assert json.loads((run.folder / "run.json").read_text())["status"] == "stopped"


def test_the_same_folder_goes_on_with_the_same_task(folder: Path) -> None:
    task = sgd_task(line())
    first = trainer(epochs=1, folder=folder).fit(task, DATA)
    second = trainer(epochs=2, folder=folder).fit(task, DATA)
    assert second.folder == first.folder
    assert second.folder is not None
    record = json.loads((second.folder / "run.json").read_text())
    assert len(record["restarts"]) == 1
    lines = [json.loads(text) for text in (second.folder / "metrics.jsonl").read_text().splitlines()]
    assert [one["epoch"] for one in lines if one["kind"] == "epoch"] == [1, 2]


@pytest.mark.parametrize("warn_only", [False, True])
def test_deterministic_algorithms_are_on_during_the_fit_only(warn_only: bool) -> None:
    def flags() -> tuple[bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        )  # fmt: skip

    seen: list[tuple[bool, bool]] = []
    torch.use_deterministic_algorithms(warn_only, warn_only=warn_only)
    try:
        for deterministic in (True, False):
            user = trainer(epochs=1, deterministic=deterministic)
            user.on(lw.Event.FIT_END)(lambda run: seen.append(flags()))
            user.fit(sgd_task(line()), DATA)
            assert flags() == (warn_only, warn_only)
        assert seen == [(True, False), (warn_only, warn_only)]
    finally:
        torch.use_deterministic_algorithms(True)


def test_weight_gives_the_samples_of_a_batch() -> None:
    task = sgd_task(line(), lr=0.0, loss=lambda preds, target: preds.sum() * 0 + target.sum())
    data = [(torch.ones(1, 1), torch.full((1, 1), weight)) for weight in (3.0, 7.0)]
    run = trainer(epochs=1).fit(task, data, weight=lambda batch: batch[1].item())
    assert run.progress.samples == 10
    assert run.metrics["train/loss"] == pytest.approx((3 * 3 + 7 * 7) / 10)


@pytest.mark.capability("CA-19")
def test_settings_hold_for_every_fit_of_a_trainer() -> None:
    user = trainer(epochs=2, clip_norm=0.5, accumulate=2)
    for _ in range(2):
        net = line()
        run = user.fit(sgd_task(net), pairs([4.0], [4.0]))
        assert net.weight.item() == pytest.approx(-1.0, rel=1e-5)  # two steps of norm 0.5
        assert run.progress.step == 2


def test_generators_as_data_are_started_anew_each_epoch() -> None:
    def batches() -> Iterator[Any]:
        yield from DATA

    net = line()
    run = trainer(epochs=3).fit(sgd_task(net, loss=mean_of_preds), batches)
    assert run.progress[:4] == (1, 3, 0, 6)
    assert net.weight.item() == -9.0


def test_a_handler_sees_the_loader_and_settings_of_the_run() -> None:
    data, seen = loader(batch_size=5), list[Any]()
    user = trainer(epochs=1)
    user.on(lw.Event.FIT_START)(lambda run: seen.extend([run.data is data, run.settings["epochs"], run.stage.name]))
    user.fit(sgd_task(classifier(), loss=nn.CrossEntropyLoss()), data)
    assert seen == [True, 1, "main"]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"epochs": "5 min"}, "epochs='5 min' is not a number of epochs; write time='5 min' instead"),
        ({"steps": "2 epochs"}, "steps='2 epochs' is not a number of steps; write epochs='2 epochs' instead"),
        (
            {"epochs": "5 batches"},
            "epochs='5 batches' is not a number of epochs; write fit(..., "
            "stages=[lw.Stage('all', until='5 batches')]) instead",
        ),
    ],
)
def test_a_length_in_another_unit_is_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        lw.Trainer(**settings)
    assert str(caught.value) == text


@pytest.mark.capability("FA-05")
def test_arrays_are_shuffled_to_train_and_read_in_order_to_validate() -> None:
    """The same arrays, given bare: train shuffled, valid in order, by construction."""
    x = torch.arange(200.0).view(-1, 1)
    trained: list[float] = []
    validated: list[float] = []

    class Look(lw.Callback):
        def on_batch_start(self, run: lw.Run, batch: Any) -> None:
            trained.extend(batch[0].flatten().tolist())

        def on_eval_batch_end(self, run: lw.Run, output: Any, batch: Any) -> None:
            validated.extend(batch[0].flatten().tolist())

    trainer(epochs=1, callbacks=[Look()]).fit(sgd_task(line(), lr=0.0), (x, x), (x, x))
    assert validated == x.flatten().tolist()
    assert trained != validated
    assert sorted(trained) == validated


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: lw.Trainer(max_epochs=3), "max_epochs=3: that argument is called epochs here"),  # type: ignore[call-arg]
        (
            lambda: lw.Trainer(limit_train_batches=5),  # type: ignore[call-arg]
            "limit_train_batches=5: there is no such argument here; write debug=lw.Debug(train=...)",
        ),
        (
            lambda: lw.Trainer(check_val_every_n_epoch=2),  # type: ignore[call-arg]
            "check_val_every_n_epoch=2: there is no such argument here; write validate_every='2 epochs'",
        ),
        (lambda: lw.Trainer(1, logger=None), "logger=None: that argument is called loggers here"),  # type: ignore[call-arg]
        (lambda: lw.Loader([1], num_workers=2), "num_workers=2: that argument is called workers here"),  # type: ignore[call-arg]
    ],
)
def test_the_name_that_an_argument_has_elsewhere_tells_ours(make: Any, says: str) -> None:
    with pytest.raises(TypeError) as error:
        make()
    assert str(error.value) == says


@pytest.mark.parametrize("kind", [lw.Trainer, lw.Loader, lw.Supervised])
def test_names_of_elsewhere_lead_to_arguments_that_exist_and_are_none_themselves(kind: Any) -> None:
    (told,) = (cell.cell_contents for cell in kind.__init__.__closure__ if isinstance(cell.cell_contents, dict))
    own = set(inspect.signature(kind).parameters)
    assert {name for name in told.values() if name.isidentifier()} <= own  # the others say where it goes
    assert not own & told.keys()
