"""State that a task keeps in plain attributes, and not in buffers, is part of a run as everything else is."""

from __future__ import annotations

import re
from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import loopwright as lw
from loopwright.checkpoint import read
from loopwright.checkpoint.attributes import Attributes

X = torch.arange(24.0).reshape(12, 2) / 24
CPU = torch.device("cpu")


class Centred(lw.Task):
    """Its loss goes by a running centre, by a count, and by what the last steps have left in lists and dicts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(2, 2)
        self.center = torch.zeros(2)  # no buffer
        self.seen, self.scale = 0, 1.0
        self.last: deque[Any] = deque(maxlen=3)
        self.by_kind: dict[str, Any] = {"even": torch.zeros(2), "odd": np.zeros(2)}

    def training_step(self, batch: Any) -> Any:
        out = self.net(batch)
        self.center = 0.9 * self.center + 0.1 * out.mean(0).detach()
        self.seen += 1
        self.scale *= 0.95
        self.last.append(out.detach().sum())
        self.by_kind["even"].add_(self.seen)
        self.by_kind["odd"] += self.seen
        if self.seen > 1:
            self.late = self.late + 1 if hasattr(self, "late") else 1  # one that comes into being in training
        pull = self.by_kind["even"].mean() + float(self.by_kind["odd"].sum()) + getattr(self, "late", 0)
        return self.scale * (out - self.center).square().mean() + 1e-3 * (out.sum() - sum(self.last)) * pull

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


class PowerCut(lw.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, run: Any, result: Any) -> None:
        if run.progress.step == self.at:
            raise RuntimeError("the lights went out")


def trainer(folder: Path | None, **more: Any) -> lw.Trainer:
    more = {"checkpoint": lw.Checkpoint("1 steps"), **more}
    return lw.Trainer(epochs=4, folder=folder, name="x", progress=False, log_every=1, **more)


def data() -> lw.Loader:
    return lw.Loader(X, batch_size=4, shuffle=True)


@pytest.mark.parametrize("at", [1, 2, 3, 7])
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(tmp_path: Path, at: int) -> None:
    whole = trainer(None, checkpoint=False).fit(Centred(), data())
    with pytest.raises(RuntimeError, match="lights"):
        trainer(tmp_path, callbacks=[PowerCut(at + 1)]).fit(Centred(), data())
    run = trainer(tmp_path).fit(Centred(), data(), resume="auto")
    assert run.resumed_from.name == f"step-{at:08d}"
    assert run.history.losses == whole.history.losses
    for name in ("center", "seen", "scale", "late"):
        assert repr(getattr(run.task, name)) == repr(getattr(whole.task, name))
    assert torch.equal(run.task.by_kind["even"], whole.task.by_kind["even"])
    assert run.task.by_kind["odd"].tolist() == whole.task.by_kind["odd"].tolist()
    assert run.task.last == whole.task.last
    assert run.task.last.maxlen == 3


def test_what_an_earlier_fit_has_changed_is_in_the_checkpoints_of_the_next(tmp_path: Path) -> None:
    """Also where the next does not change it any more."""

    class Early(Centred):
        def training_step(self, batch: Any) -> Any:
            if self.seen < 2:
                return super().training_step(batch)
            return (self.net(batch) - self.center).square().mean()

    task = Early()
    for epochs in (1, 2):
        run = lw.Trainer(epochs=epochs, folder=tmp_path, name="x", progress=False).fit(task, data())
    fresh = Early()
    lw.Trainer(epochs=2, folder=tmp_path, name="x", progress=False).fit(fresh, data(), resume=run.folder)
    assert torch.equal(fresh.center, task.center)
    assert fresh.seen == 2


def test_weights_alone_leave_them_as_they_are_in_the_new_task(tmp_path: Path) -> None:
    run = trainer(tmp_path).fit(Centred(), data())
    again = lw.Trainer(steps=1, folder=tmp_path, name="y", progress=False).fit(
        Centred(), data(), resume=lw.Resume(run.folder, how="weights")
    )
    assert again.task.seen == 1


def test_a_rehearsal_leaves_no_trace() -> None:
    task = Centred()
    before = repr([vars(task)[name] for name in ("center", "seen", "scale", "last", "by_kind")])
    lw.Trainer(epochs=1, folder=None, progress=False, debug=lw.Debug(dev_run=2)).fit(task, data())
    assert repr([vars(task)[name] for name in ("center", "seen", "scale", "last", "by_kind")]) == before
    assert not hasattr(task, "late")


def test_a_capsule_has_them(tmp_path: Path) -> None:
    class Fails(Centred):
        def training_step(self, batch: Any) -> Any:
            if self.seen == 5:
                raise ValueError(f"center {self.center.tolist()}")
            return super().training_step(batch)

    with pytest.raises(ValueError, match="center"):
        trainer(tmp_path, capsule=True).fit(Fails(), data())
    found = lw.replay(tmp_path / "x", Fails())
    assert found.same_error
    assert any(
        limit.startswith("plain attributes are those of after the error: model.center") for limit in found.limits
    )


@pytest.mark.parametrize(
    ("many", "why"),
    [
        (lambda task: task.kept.extend(range(10_001)), r"it has 10,001 items, 0 bytes"),
        (lambda task: setattr(task, "kept", torch.zeros(2**26 + 1)), r"it has 1 items, 268,435,460 bytes"),
        (lambda task: setattr(task, "kept", defaultdict(lambda: 0)), r"Keeps\.kept .*lambda"),
    ],
)
def test_what_is_too_much_or_cannot_be_saved_is_told_once(tmp_path: Path, many: Any, why: str) -> None:
    class Keeps(Centred):
        kept: Any

        def training_step(self, batch: Any) -> Any:
            if self.seen == 2:
                many(self)
            return super().training_step(batch)

    task = Keeps()
    task.kept = []
    with pytest.warns(lw.LoopwrightWarning) as told:
        run = trainer(tmp_path, checkpoint=lw.Checkpoint("2 steps")).fit(task, data())
    (one,) = [str(w.message) for w in told]
    assert one.startswith("Keeps.kept changes in training and is not in checkpoints: ")
    assert re.search(why, one)
    assert "register_buffer" in one
    assert "kept" not in read(lw.checkpoint.find(run.folder)).state["attributes"]["model"]


KINDS: list[Any] = [
    1, 2.5, float("nan"), "text", b"bytes", None, True, 1j, (1, 2), [1, [2]], {"a": {"b": 1}}, {1, 2}, deque([1], 2),
    Counter("aab"), defaultdict(list, a=[1]), np.arange(3), np.float32(1.5), torch.ones(2), [torch.ones(2)],
]  # fmt: skip


class Holds(nn.Module):
    held: Any = None


@pytest.mark.parametrize("value", KINDS, ids=lambda value: type(value).__name__)
def test_every_plain_kind_comes_back(value: Any) -> None:
    net = Holds()
    before = Attributes({"model": net})
    assert before.changed() == {}
    net.held = value
    Attributes({"model": (other := Holds())}).load(before.changed(), CPU)
    assert repr(other.held) == repr(value)
    assert Attributes({"model": net}).changed() == {}  # and what stays as it was is not saved


def test_an_object_of_another_kind_and_what_torch_keeps_on_its_modules_are_left_alone() -> None:
    net = nn.Sequential(Holds(), nn.Linear(2, 2))
    before = Attributes({"model": net})
    net[0].held, net[1].note = object(), 3
    assert before.changed() == {}


def test_a_tensor_that_is_replaced_by_an_equal_one_counts_as_changed() -> None:
    net = Holds()
    net.held = torch.ones(2)
    before = Attributes({"model": net})
    net.held = torch.ones(2)
    assert list(before.changed()["model"]) == ["held"]


class Stats:
    """An object of the user's own, no module."""

    def __init__(self) -> None:
        self.seen, self.inner = 0, Inner()


class Inner:
    total = 0.0


class Decays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.stats = nn.Linear(2, 2), Stats()

    def forward(self, x: Any) -> Any:
        self.stats.seen += 1
        self.stats.inner.total += float(x.sum())
        return self.net(x / self.stats.seen) + self.stats.inner.total


class Cools(lw.Callback):
    """Changes the loss by what it remembers, and has no state_dict."""

    calls = 0

    def map_loss(self, run: Any, loss: Any, output: Any, batch: Any, phase: Any) -> Any:
        self.calls += 1
        return loss / self.calls


@pytest.mark.capability("B-01")
def test_objects_on_modules_and_callbacks_that_change_training_resume_too(tmp_path: Path) -> None:
    def fit(folder: Path | None, *callbacks: Any, resume: Any = None) -> lw.Run:
        net = Decays()
        task = lw.Supervised(net, nn.MSELoss(), torch.optim.Adam(net.parameters(), 0.01))
        parts = (Cools(), Cools(), *callbacks)
        given = {} if folder else {"checkpoint": False}
        data = lw.Loader((X, X), 4, shuffle=True)
        return trainer(folder, callbacks=list(parts), **given).fit(task, data, resume=resume)

    whole = fit(None)
    with pytest.raises(RuntimeError, match="lights"):
        fit(tmp_path, PowerCut(6))
    run = fit(tmp_path, resume="auto")
    assert run.resumed_from.name == "step-00000005"
    assert run.history.losses == whole.history.losses
    assert (run.task.module.stats.seen, [c.calls for c in run.callbacks if isinstance(c, Cools)]) == (12, [12, 12])


def test_what_is_saved_by_itself_is_not_saved_twice(tmp_path: Path) -> None:
    class Counts(Stats):
        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.seen = state["seen"]

    net, stats = nn.Linear(2, 2), Counts()
    net.stats = stats

    def step(run: Any, batch: Any) -> Any:
        stats.seen += 1
        return net(batch[0]).sum()

    run = trainer(tmp_path).run(step, lw.Loader((X, X), 4), state={"stats": stats, "net": net})
    found = read(lw.checkpoint.find(run.folder)).state
    assert found["user"]["stats"] == {"seen": 12}
    assert found["attributes"] == {}


class Distils(lw.Task):
    """Its teacher follows by hand and its positions are recomputed; models() leaves out both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.teacher = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.teacher.requires_grad_(False)
        self.net.register_buffer("shift", torch.zeros(2), persistent=False)

    def training_step(self, batch: Any) -> Any:
        for mine, its in zip(self.net.parameters(), self.teacher[0].parameters(), strict=True):
            its.data.lerp_(mine.data, 0.1)  # which counts as no change in its version
        self.net.shift.add_(0.01)
        return (self.net(batch) + self.net.shift - self.teacher(batch) - 1).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.1)

    def models(self) -> Any:
        return {"net": self.net}


def test_a_teacher_that_models_leaves_out_is_in_checkpoints_as_far_as_it_changes(tmp_path: Path) -> None:
    whole, first, again = Distils(), Distils(), Distils()
    lw.Trainer(steps=6, folder=tmp_path, name="a", progress=False).fit(whole, X)
    with pytest.raises(RuntimeError, match="lights"):
        lw.Trainer(
            steps=6, folder=tmp_path, name="b", progress=False, callbacks=[PowerCut(4)],
            checkpoint=lw.Checkpoint(every="3 steps"),
        ).fit(first, X)  # fmt: skip
    run = lw.Trainer(steps=6, folder=tmp_path, name="b", progress=False).fit(again, X, resume="auto")
    assert run.exact is True
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert torch.equal(whole.net.shift, again.net.shift)
    assert run.folder is not None
    kept = read(sorted((run.folder / "checkpoints").glob("step-*"))[-1]).state["attributes"]
    assert {f"{path}.{name}" for path, values in kept.items() for name in values} == {
        "net.shift", "task.teacher.0.weight", "task.teacher.0.bias",
        "task.teacher.1.running_mean", "task.teacher.1.running_var", "task.teacher.1.num_batches_tracked",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int8])
@pytest.mark.parametrize("size", [1, 7, 100_003, 300_000])
def test_the_content_of_a_tensor_tells_without_its_version(dtype: torch.dtype, size: int) -> None:
    class Net(nn.Linear):
        plain: torch.Tensor

    net = Net(1, 1)
    net.plain = torch.ones(size + 1).to(dtype)[1:]  # not aligned
    before = Attributes({"net": net})
    same = net.plain.clone()
    net.plain.data.copy_(same)
    assert before.changed() == {}
    for at in (0, size // 2, -1):
        net.plain.data.copy_(same)
        net.plain.data[at] = 0
        assert before.changed()["net"]["plain"] is net.plain
