"""Windows, filters and groups: each equals the metric over just those batches and samples, in runs and over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn

import loopwright as lw
from every_step import Experiment, resumed_at_every_step
from loopwright.errors import MetricError, SettingError
from loopwright.metrics import (
    MAE,
    Accuracy,
    Grouped,
    Mean,
    Meters,
    On,
    Precision,
    Recall,
    Running,
    Where,
    Window,
    renamed,
)


def batches(count: int = 5, n: int = 6) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    return [
        {
            "preds": torch.randn(n, 3, generator=g), "target": torch.randint(3, (n,), generator=g),
            "site": torch.randint(2, (n,), generator=g), "loss": torch.rand((), generator=g),
        }
        for _ in range(count)
    ]  # fmt: skip


def accuracy(*seen: dict[str, Any], keep: Any = None) -> float:
    metric = Accuracy()
    for batch in seen:
        rows = slice(None) if keep is None else keep(batch)
        metric.update(batch["preds"][rows], batch["target"][rows])
    return metric.compute()


def test_a_window_sees_the_last_batches() -> None:
    meters = Meters(
        {"last": Window(Accuracy(), 1), "two": Window(Accuracy(), 2), "f": Window(Precision(3) + Recall(3), 2)}
    )
    for i, batch in enumerate(batches()):
        meters.feed(batch)
        values = meters.compute()
        assert values["last"] == accuracy(batch)
        assert values["two"] == accuracy(*batches()[max(0, i - 1) : i + 1])


def test_a_filter_sees_the_samples_for_which_it_is_true() -> None:
    metrics = {
        "some": Where(Accuracy(), lambda target: target > 0), "on": Where(Accuracy(), lambda site: site == 1),
        "all": Where(Accuracy(), lambda loss: loss > 0.5), "none": Where(Accuracy(), lambda target: target > 5),
    }  # fmt: skip
    meters = Meters(metrics)
    for batch in batches():
        meters.feed(batch)
    with pytest.warns(lw.LoopwrightWarning, match="Accuracy was given no sample") as told:
        values = meters.compute()
    assert len(told) == 1
    assert values["some"] == accuracy(*batches(), keep=lambda batch: batch["target"] > 0)
    assert values["on"] == accuracy(*batches(), keep=lambda batch: batch["site"] == 1)
    assert values["all"] == accuracy(*(batch for batch in batches() if batch["loss"] > 0.5))
    assert values["none"] != values["none"]


def test_groups_have_a_value_each() -> None:
    meters = Meters(
        {"by": Grouped(Accuracy(), by="site"), "names": Grouped(On(torchmetrics.MeanMetric(), "target"), by="who")}
    )
    for i, batch in enumerate(batches()):
        meters.feed(batch | {"who": ["ab"[j % 2] for j in range(6)] if i else "c"})
    values = meters.compute()
    for site in (0, 1):
        assert values[f"by/{site}"] == accuracy(*batches(), keep=lambda batch, site=site: batch["site"] == site)
    assert list(values)[2:] == ["names/a", "names/b", "names/c"]
    assert values["names/c"] == pytest.approx(batches()[0]["target"].float().mean().item())


MODES: dict[str, Any] = {
    "running": lambda: Running(Precision(3) * Accuracy()),
    "window": lambda: Window(Accuracy(), 2),
    "where": lambda: Where(Accuracy(), lambda target: target > 0),
    "grouped": lambda: Grouped(Accuracy(), by="site"),
    "grouped torchmetrics": lambda: Grouped(On(torchmetrics.MeanMetric(), "target"), by="site"),
    "both": lambda: Grouped(Where(Accuracy(), lambda target: target > 0), by="site"),
    "function": lambda: lw.metrics.Function(lambda preds, target: (preds.argmax(1) == target).double().mean()),
}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("cut", [1, 4])
def test_a_series_cut_in_two_gives_the_same_bits(name: str, cut: int) -> None:
    whole, first, second = (Meters({"m": MODES[name]()}) for _ in range(3))
    for batch in batches():
        whole.feed(batch)
    for batch in batches()[:cut]:
        first.feed(batch)
    second.load_state_dict(first.state_dict())
    for batch in batches()[cut:]:
        second.feed(batch)
    assert second.compute() == whole.compute()
    assert whole.exact == []
    second.reset()
    assert second.compute() == {}


@pytest.mark.parametrize("name", ["running", "where", "grouped", "both", "function"])
def test_parts_from_several_ranks_join_to_the_same_value(name: str) -> None:
    whole, joined = Meters({"m": MODES[name]()}), Meters({"m": MODES[name]()})
    ranks = [Meters({"m": MODES[name]()}) for _ in batches()]
    for batch, meters in zip(batches(), ranks, strict=True):
        whole.feed(batch)
        meters.feed(batch)
        meters.check_ranks()
    joined.join([meters.cut() for meters in ranks])
    assert joined.compute() == whole.compute()


def test_what_cannot_be_joined_over_ranks_is_refused() -> None:
    with pytest.raises(SettingError, match="metric 'w' is a Window, whose batches could not be told apart on several"):
        Meters({"w": Grouped(Window(Accuracy(), 2), by="site")}).check_ranks()
    with pytest.raises(SettingError, match=r"metric 'g' \(Grouped\) sees a part of the data on each rank"):
        Meters({"g": Grouped(On(torchmetrics.MeanMetric(), "target"), by="site")}).check_ranks()


# ------------------------------------------------------------------------------------------------------------ runs


class Log:
    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, float]]] = []

    def log(self, progress: lw.Progress, values: Any, kind: str) -> None:
        self.seen.append((kind, dict(values)))


class Echo(lw.Task):
    """Returns what its batches hold: what is measured can be told beforehand."""

    def __init__(self, metrics: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.metrics = metrics

    def training_step(self, batch: Any) -> Any:
        return {"loss": self.weight * batch["loss"], "preds": batch["preds"]}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)

    def configure_metrics(self) -> Any:
        return self.metrics


@pytest.mark.capability("CA-08", "FA-14")
def test_epoch_running_window_and_batch_values_are_in_the_records_under_clear_names() -> None:
    """Values over the epoch, so far, over a window and of the last batch, by group: each in its records."""
    metrics = {
        "epoch": Accuracy(), "running": Running(Accuracy()), "window": Window(Accuracy(), 2),
        "batch": Window(Accuracy(), 1), "site": Grouped(Accuracy(), by="site"),
    }  # fmt: skip
    log = Log()
    trainer = lw.Trainer(epochs=2, folder=None, progress=False, log_every=1, loggers=[log])
    trainer.fit(Echo(metrics), batches(), batches()[:2])
    train = [values for kind, values in log.seen if kind == "train"]
    for i, values in enumerate(train):
        epoch = batches()[: i % 5 + 1]
        assert values["train/running"] == accuracy(*epoch)
        assert values["train/window"] == accuracy(*epoch[-2:])
        assert values["train/batch"] == accuracy(*epoch[-1:])
        assert "train/epoch" not in values
    last = log.seen[-1][1]
    assert last["train/epoch"] == last["train/running"] == accuracy(*batches())
    assert last["train/site/1"] == accuracy(*batches(), keep=lambda batch: batch["site"] == 1)
    assert last["valid/epoch"] == last["valid/window"] == accuracy(*batches()[:2])


def test_names_are_looked_up_in_a_batch_that_is_a_dict() -> None:
    task = Echo({"accuracy": Accuracy(), "loss_of_batch": Mean("loss"), "site": Grouped(Mean("target"), by="site")})
    found = lw.Trainer(folder=None, progress=False).test(task, batches())
    assert found["test/accuracy"] == accuracy(*batches())  # target is in the batch only
    assert found["test/loss_of_batch"] == 0.0  # what the step returns goes before the batch


def test_a_training_step_that_returns_no_input_leaves_a_metric_out_whatever_the_batch_holds() -> None:
    meters = Meters({"accuracy": Accuracy(), "site": Mean("site")}, training=True)
    meters.feed({"loss": torch.tensor(1.0)}, {"target": torch.tensor([1]), "site": torch.tensor([2.0])})
    assert meters.compute() == {"site": 2.0}


def test_one_prediction_pass_serves_all_metrics_of_a_validation() -> None:
    net, calls = nn.Linear(3, 3), []
    net.register_forward_hook(lambda *_: calls.append(1))
    several = {"a": Accuracy(), "p": Precision(3), "f": 2 * Precision(3) * Recall(3), "auroc": "torchmetrics:auroc"}
    task = lw.Supervised(net, nn.CrossEntropyLoss(), metrics=several)
    lw.Trainer(folder=None, progress=False).validate(task, [(b["preds"], b["target"]) for b in batches()])
    assert len(calls) == len(batches())


@pytest.mark.slow
def test_a_run_with_every_mode_resumes_exactly_at_every_step(tmp_path: Any) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(23, 3), torch.randint(3, (23,))

    def make() -> Experiment:
        torch.manual_seed(1)
        net = nn.Linear(3, 3)
        metrics = {
            "accuracy": Accuracy(), "running": Running(Accuracy()), "window": Window(Accuracy(), 3),
            "f": 2 * Precision(3, zero_division=0.0) / (1 + Recall(3, zero_division=0.0)),
            "some": Where(Accuracy(), lambda target: target > 0), "by": Grouped(Accuracy(), by="target"),
            "f1": "sklearn:f1_macro",
        }  # fmt: skip
        task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1), metrics=metrics)
        train = lw.Loader((x, y), batch_size=5, shuffle=True)
        return Experiment(task, train, (x[:9], y[:9]), settings={"epochs": 2, "seed": 3})

    run = resumed_at_every_step(make, tmp_path)
    assert {"train/by/0", "train/f1", "valid/f", "train/window"} <= run.history[-1].keys()


def _ranked() -> dict[str, Any]:
    x, y = torch.randn(23, 3, generator=torch.Generator().manual_seed(1)), torch.arange(23) % 3
    torch.manual_seed(1)
    net = nn.Linear(3, 3)
    precision, recall = Precision(3, zero_division=0.0), Recall(3, zero_division=0.0)
    metrics = {
        "accuracy": Accuracy(average="macro"), "running": Running(Accuracy()), "p": precision,
        "f": 2 * precision * recall / (precision + recall), "some": Where(Accuracy(), lambda target: target > 0),
        "by": Grouped(Accuracy(), by="target"), "f1": "sklearn:f1_macro", "auroc": "torchmetrics:auroc",
        "perplexity": lw.metrics.Perplexity(), "counts": lw.metrics.ConfusionMatrix(3),
    }  # fmt: skip
    task = lw.Supervised(net, nn.CrossEntropyLoss(), lambda p: torch.optim.SGD(p, 0.1), metrics=metrics)
    log = Log()
    trainer = lw.Trainer(epochs=2, seed=0, folder=None, progress=False, log_every=1, loggers=[log])
    run = trainer.fit(task, lw.Loader((x, y), batch_size=5), lw.Loader((x, y), batch_size=4))
    return {**run.metrics, "records": [v.get("train/running") for kind, v in log.seen if kind == "train"]}


@pytest.mark.slow
def test_values_do_not_depend_on_the_number_of_ranks() -> None:
    alone = _ranked()
    first, second = lw.launch(_ranked, 2)
    assert first.keys() == alone.keys()
    assert first.pop("records") == alone.pop("records")
    second.pop("records")
    assert first == second
    assert first == pytest.approx(alone, abs=1e-6)


# ------------------------------------------------------------------------------------------------- names and checks


def test_one_set_of_metrics_for_each_head() -> None:
    shared = Precision(3)
    several = {"p": shared, "f": shared * Recall(3), "mean": torchmetrics.MeanMetric(), "accuracy": Accuracy()}
    heads = renamed(several, prefix="a_", preds="left") | renamed(several, suffix="_b", preds="right", target="y")
    assert [(name, metric.inputs) for name, metric in heads.items()] == [
        ("a_p", ("left", "target")), ("a_f", ("left", "target")), ("a_mean", ("left", "target")),
        ("a_accuracy", ("left", "target")), ("p_b", ("right", "y")), ("f_b", ("right", "y")),
        ("mean_b", ("right", "y")), ("accuracy_b", ("right", "y")),
    ]  # fmt: skip
    assert len(Meters(heads)._parts) == 6
    more = {
        "running": Running(Accuracy()),
        "gap": lambda preds, target: (preds - target).max(),
        "f": several["mean"] + 1,
    }
    meters = Meters(renamed({"mean": several["mean"], **more}, preds="left"), training=True)
    meters.feed({"left": torch.tensor([0.5, 0.75]), "target": torch.tensor([0, 1])})
    assert meters.each_record() == {"running": 1.0}
    assert meters.metrics["gap"].compute() == 0.5
    assert meters.metrics["f"].compute() == meters.metrics["mean"].compute() + 1
    with pytest.raises(SettingError, match=r"none of the metrics reads 'pred'\. Known: 'preds', 'target'\. Did you"):
        renamed(several, pred="x")


def test_modes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SettingError, match=r"Window\(metric, 0\): expected a whole number of batches from 1"):
        Window(Accuracy(), 0)
    with pytest.raises(SettingError, match=r"needs a metric with merge.other., .* torchmetrics.wrappers.Running"):
        Window(torchmetrics.MeanMetric(), 3)
    with pytest.raises(SettingError, match="expected a function whose parameters name what it reads"):
        Where(Accuracy(), lambda: True)
    with pytest.raises(SettingError, match="expected the name of the groups"):
        Grouped(Accuracy(), by=3)  # type: ignore[arg-type]
    with pytest.raises(MetricError, match=r"returned int64\[6\]; expected a bool for each sample"):
        Meters({"m": Where(Accuracy(), lambda target: target)}).feed(batches()[0])
    with pytest.raises(MetricError, match=r"the group 0\.5 of 'g': expected integers or strings"):
        Grouped(MAE(), by="g").update(torch.zeros(1), torch.zeros(1), torch.tensor([0.5]))
    with pytest.raises(MetricError, match=r"given float32\[2\], and there are groups or bools for 3 samples"):
        Grouped(MAE(), by="g").update(torch.zeros(2), torch.zeros(2), [1, 2, 3])


def test_a_metric_inside_that_cannot_be_saved_is_a_reason_for_inexactness() -> None:
    class Plain:
        def update(self, *args: Tensor) -> None: ...
        def compute(self) -> float:
            return 0.0

        def reset(self) -> None: ...

    assert len(Meters({"m": Running(Plain()), "f": On(Plain(), "preds") + 1}).exact) == 2
