"""A run goes on from a snapshot as if it had never stopped; what does not fit is refused before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopwright as lw
from loopwright.checkpoint import Contents, read, snapshot, write
from loopwright.errors import CheckpointError
from tiny import acts, bits, classifier, loader, same, seed_all, trainer


class Memory(lw.Callback):
    """Remembers the loss of each step, and takes a snapshot after step ``at``."""

    def __init__(self, at: int = -1) -> None:
        self.losses: list[float] = []
        self.at = at

    def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
        self.losses.append(float(result.values["loss"]))

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses = list(state["losses"])


def save(run: lw.Run) -> Path:
    return write(Path("checkpoints") / f"step-{run.progress.step}", *snapshot.take(run), snapshot.info(run))


def parts(*, schedule: str | None = "plateau", optimizer: Any = torch.optim.AdamW, **net: Any) -> lw.Supervised:
    model = classifier(dropout=0.3, batch_norm=True, **net)
    optimizers = optimizer(model.parameters(), lr=0.01)
    made = {
        "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
        "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=100),
    }
    metrics = {"accuracy": lw.metrics.Accuracy()}
    return lw.Supervised(model, nn.CrossEntropyLoss(), optimizers, schedule=made.get(schedule or ""), metrics=metrics)


def fit(
    *more: lw.Callback, memory: Memory | None = None, noisy: bool = True, **settings: Any
) -> tuple[lw.Run, lw.Supervised]:
    seed_all(3)
    task = parts(**settings)
    callbacks = [memory or Memory(), *more]
    data = {"train": loader(37, noisy=noisy, batch_size=5, shuffle=True), "valid": loader(9, batch_size=4)}
    run = trainer(epochs=3, accumulate=2, clip_norm=1.0, log_every="3 steps", callbacks=callbacks).fit(task, **data)
    return run, task


def fields(run: lw.Run) -> list[Any]:
    progress = {k: v for k, v in run.progress._asdict().items() if k != "seconds"}
    records = [{k: v for k, v in r.items() if k != "seconds"} for r in run.history.records]
    return [progress, records, run.history.losses["loss"].tolist(), run.metrics, run.series.state_dict()]


@pytest.mark.parametrize("schedule", ["plateau", "one cycle"])
@pytest.mark.parametrize("at", [1, 3, 4, 5, 8, 11])
def test_a_run_goes_on_with_the_same_bits_from_any_step(at: int, schedule: str) -> None:
    def keep(run: lw.Run, result: Any) -> None:
        if run.progress.step == at:
            save(run)

    memory = Memory()
    run, task = fit(acts(on_step_end=keep), memory=memory, schedule=schedule)
    expected = [*bits(task, *run.optimizers.values()), *fields(run), memory.losses]

    torch.rand(100)
    data = read(f"checkpoints/step-{at}")
    resumed = Memory()
    again, other = fit(
        acts(on_fit_start=lambda run: snapshot.restore(run, data)), memory=resumed, schedule=schedule, seed=99
    )
    assert len(resumed.losses) == 12
    found = [*bits(other, *again.optimizers.values()), *fields(again), resumed.losses]
    assert [same(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(expected)


def test_a_snapshot_holds_the_model_by_its_own_names_and_no_live_reference() -> None:
    run, task = fit()
    path = save(run)
    before = bits(task.module)[0]
    nn.init.zeros_(task.module[0].weight)
    data = read(path)
    assert set(data.files) == {"model"}
    assert same(data.files["model"], before)
    assert data.info["step"] == 12
    assert data.info["exact"] is True
    assert data.info["metrics"]["valid/loss"] == run.metrics["valid/loss"]
    assert set(data.info["versions"]) == {"python", "torch", "numpy", "loopwright"}
    assert snapshot.progress(data) == run.progress


def test_counts_and_what_was_replaced_are_kept() -> None:
    run, _ = fit()
    run.skipped, run.skips_in_row, run.validated_at, run.replaced = 3, 2, 7, ["loss by Other after step 1"]
    data = read(save(run))
    other, _ = fit(seed=5)
    other.stop_reason = "early stopping"
    snapshot.restore(other, data)
    found = (other.skipped, other.skips_in_row, other.validated_at, other.replaced, other.stop_reason)
    assert found == (3, 2, 7, ["loss by Other after step 1"], "early stopping")  # why a run stopped is its own


def test_weights_alone_can_be_restored() -> None:
    run, task = fit()
    expected = bits(task.module)[0]
    data = read(save(run))
    other, net = fit(seed=5)
    optimizer = bits(*other.optimizers.values())[0]
    snapshot.restore_models(other, data)
    assert same(bits(net.module)[0], expected)
    assert same(bits(*other.optimizers.values())[0], optimizer)


class WithExtra(nn.Module):
    """Keeps more than tensors, as quantizers and tokenizers do."""

    def __init__(self, seen: int = 0) -> None:
        super().__init__()
        self.line, self.seen = nn.Linear(5, 3), seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        out: Tensor = self.line(x)
        return out

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def test_extra_state_of_modules_is_kept() -> None:
    def run_of(net: nn.Module) -> lw.Run:
        task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1))
        return trainer(epochs=1).fit(task, loader(8, batch_size=4))

    data = read(save(run_of(WithExtra())))
    net = WithExtra(seen=100)
    snapshot.restore(run_of(net), data)
    assert net.seen == 2


class Gan(lw.Task):
    def __init__(self) -> None:
        super().__init__()
        self.gen, self.disc = nn.Linear(5, 5), nn.Linear(5, 1)

    def training_step(self, batch: Any) -> Tensor:
        out: Tensor = self.disc(self.gen(batch[0])).mean()
        return out

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"a": torch.optim.SGD(self.gen.parameters(), lr=0.1), "b": torch.optim.Adam(self.disc.parameters())}


def test_a_task_with_several_optimizers_is_restored() -> None:
    seed_all()
    first, second = Gan(), Gan()
    run = trainer(epochs=2).fit(first, loader(8, batch_size=4))
    data = read(save(run))
    assert set(data.state["optimizers"]) == set(run.optimizers)
    again = trainer(epochs=1).fit(second, loader(8, batch_size=4))
    snapshot.restore(again, data)
    assert same(bits(second, *again.optimizers.values())[:3], bits(first, *run.optimizers.values())[:3])


def test_objects_of_a_plain_step_are_kept() -> None:
    net, box = nn.Linear(2, 1), {"n": 0}
    state = {"net": net, "box": (lambda: dict(box), box.update)}

    def step(run: lw.Run, batch: int) -> None:
        box["n"] += batch

    run = trainer(epochs=1).run(step, [1, 2, 3], state=state)
    expected = bits(net)[0]
    data = read(save(run))
    box["n"] = 0
    nn.init.zeros_(net.weight)
    snapshot.restore(run, data)
    assert box == {"n": 6}
    assert same(bits(net)[0], expected)


# ------------------------------------------------------------------------------------------------ refusals


def refusal(run: lw.Run, data: Contents) -> str:
    before = bits(*run.models.values(), *run.optimizers.values())
    with pytest.raises(CheckpointError) as caught:
        snapshot.restore(run, data)
    assert same(bits(*run.models.values(), *run.optimizers.values()), before)  # nothing was loaded, nothing drawn
    return str(caught.value)


def fitted(net: nn.Module, make: Any = torch.optim.SGD, **settings: Any) -> lw.Run:
    task = lw.Supervised(net, nn.CrossEntropyLoss(), make(net.parameters(), lr=0.1), **settings.pop("task", {}))
    return trainer(epochs=1, **settings).fit(task, loader(8, batch_size=4))


def test_another_model_is_refused_with_all_differences() -> None:
    data = read(save(fitted(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)))))
    run = fitted(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))
    assert refusal(run, data) == (
        "checkpoints/step-2 does not fit this run, and nothing was loaded:\n"
        "  - model, missing there: 2.weight, 2.bias\n"
        "  - model, unexpected: 1.weight, 1.bias\n"
        "  - model, different: 0.weight is float32[4, 5] there and float32[6, 5] here, 0.bias is float32[4] there and "
        "float32[6] here\n"
        "Build the run as it was when the checkpoint was written. To start anew with the weights that fit: "
        "model.load_state_dict(loopwright.checkpoint.read('checkpoints/step-2').files['model'], strict=False)"
    )


def test_another_dtype_is_refused() -> None:
    data = read(save(fitted(nn.Linear(5, 3))))
    run = fitted(nn.Linear(5, 3))
    run.models[next(iter(run.models))].double()
    assert "weight is float32[3, 5] there and float64[3, 5] here" in refusal(run, data)


def test_another_optimizer_is_refused() -> None:
    data = read(save(fitted(nn.Linear(5, 3))))
    assert "optimizer 'main' is SGD there and Adam here" in refusal(fitted(nn.Linear(5, 3), torch.optim.Adam), data)
    run = fitted(nn.Linear(5, 3), lambda params, lr: torch.optim.SGD([{"params": [p]} for p in params], lr=lr))
    assert "optimizer 'main' has groups of [2] parameters there and of [1, 1] here" in refusal(run, data)


def test_another_schedule_is_refused() -> None:
    make = {"task": {"schedule": lambda o: torch.optim.lr_scheduler.StepLR(o, 1)}}
    data = read(save(fitted(nn.Linear(5, 3), **make)))
    assert "phase 'main' has 0 schedulers, the checkpoint 1" in refusal(fitted(nn.Linear(5, 3)), data)


def test_what_only_watches_may_come_and_go() -> None:
    memory = Memory()
    data = read(save(fitted(nn.Linear(5, 3), callbacks=[memory])))
    again = Memory()
    run = fitted(nn.Linear(5, 3), callbacks=[acts(on_step_end=lambda run, result: None), again])
    snapshot.restore(run, data)
    assert again.losses == memory.losses


def test_what_cannot_be_saved_is_found_before_the_first_save() -> None:
    class Bad(Memory):
        def state_dict(self) -> dict[str, Any]:
            return {"best": {"f": len}}

    run = fitted(nn.Linear(5, 3), callbacks=[Bad()])
    with pytest.raises(CheckpointError, match=r"Bad.state_dict\(\)\['best'\]\['f'\] is a builtin_function_or_method"):
        snapshot.check(run)
    run.callbacks.clear()
    snapshot.check(run)
    run.state["queue"] = object()
    with pytest.raises(CheckpointError) as caught:
        snapshot.check(run)
    assert str(caught.value) == (
        "state['queue'] is an object, which has no state_dict and load_state_dict; give an object that has them, or "
        "two functions: state={'queue': (get, set)}"
    )
