"""Precision: the bits of the loop by hand under autocast and a gradient scaler, what is converted, what is saved."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import loopwright as lw
from loopwright._compat import has_unscaled, overflowed
from loopwright.data.batch import move
from loopwright.parallel import Autocast, Plain, Scaled
from tiny import acts, bits, classifier, line, loader, pairs, same, samples, sgd_task, trainer

SCALER = {"init_scale": 2.0**20, "growth_interval": 3}  # so large that it overflows and falls, and soon grows again


def fp16(**settings: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{**SCALER, **settings})


def net_and_optimizer(dropout: float = 0.0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    net = classifier(dropout=dropout)
    return net, torch.optim.Adam(net.parameters(), lr=0.05)


def hot(preds: Tensor, target: Tensor) -> Tensor:
    return 3 * cross_entropy(preds, target)


def by_hand(
    epochs: int, batches: list[Any], scaler: torch.amp.GradScaler, *, accumulate: int = 1, clip: float | None = None,
    dtype: torch.dtype = torch.float16,
) -> tuple[nn.Module, torch.optim.Optimizer, list[float]]:  # fmt: skip
    """The loop of torch's own AMP recipe, with true means over short windows."""
    net, optimizer = net_and_optimizer(dropout=0.2)
    torch.manual_seed(5)
    scales = []
    for _ in range(epochs):
        for i in range(0, len(batches), accumulate):
            window = batches[i : i + accumulate]
            total = sum(len(x) for x, _ in window)
            optimizer.zero_grad()
            for x, y in window:
                with torch.autocast("cpu", dtype=dtype):
                    loss = hot(net(x), y)
                scaler.scale(loss * (len(x) / total)).backward()
            scaler.unscale_(optimizer)
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
    return net, optimizer, scales


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_fp16_gives_the_bits_of_the_loop_by_hand_with_torchs_scaler(accumulate: int, clip: float | None) -> None:
    batches = [list(pair) for pair in DataLoader(TensorDataset(*samples(38)), 4)]  # 10, the last one of 2
    scaler = fp16()
    net, optimizer, scales = by_hand(3, batches, scaler, accumulate=accumulate, clip=clip)
    assert len(set(scales)) > 3  # it fell, and grew
    ours, mine = net_and_optimizer(dropout=0.2)
    torch.manual_seed(5)
    user = trainer(epochs=3, precision=fp16(), accumulate=accumulate, clip_norm=clip)
    run = user.fit(lw.Supervised(ours, hot, mine), batches)
    assert same(bits(ours, mine), bits(net, optimizer))
    assert run.precision.scaler is not None
    assert run.precision.scaler.state_dict() == scaler.state_dict()
    per_epoch = -(-10 // accumulate)
    dropped = sum(b < a for a, b in zip([SCALER["init_scale"], *scales], scales, strict=False))
    assert dropped > 0
    assert (run.progress.step, run.skipped) == (3 * per_epoch - dropped, dropped)
    assert run.progress.phase_steps == {"main": run.progress.step}
    assert run.progress.epoch == 3


@pytest.mark.parametrize("accumulate", [1, 3])
def test_bf16_gives_the_bits_of_the_loop_by_hand_under_autocast(accumulate: int) -> None:
    batches = [list(pair) for pair in DataLoader(TensorDataset(*samples(38)), 4)]
    off = torch.amp.GradScaler("cpu", enabled=False)
    net, optimizer, _ = by_hand(2, batches, off, accumulate=accumulate, dtype=torch.bfloat16)
    ours, mine = net_and_optimizer(dropout=0.2)
    torch.manual_seed(5)
    trainer(epochs=2, precision="bf16", accumulate=accumulate).fit(lw.Supervised(ours, hot, mine), batches)
    assert same(bits(ours, mine), bits(net, optimizer))


class Two(lw.Task):
    """Two objectives with an optimizer each; the second reads what the first one has changed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)
        self.seen: list[str] = []

    def first(self, batch: Any) -> Tensor:
        return 3 * self.a(batch[0]).square().mean()

    def second(self, batch: Any) -> Tensor:
        return 3 * cross_entropy(self.b(self.a(batch[0]).detach()), batch[1])

    def configure_optimizers(self) -> dict[str, Any]:
        return {name: torch.optim.SGD(getattr(self, name).parameters(), lr=0.1, momentum=0.5) for name in "ab"}

    def phases(self) -> list[lw.Phase]:
        return [lw.Phase("first", self.first, "a"), lw.Phase("second", self.second, "b", every=2)]


@pytest.mark.capability("B-11")
def test_several_optimizers_share_one_scale_which_is_updated_once_a_step() -> None:
    batches = [list(pair) for pair in DataLoader(TensorDataset(*samples(32)), 4)]
    scaler, hand = fp16(init_scale=1024.0), Two()
    optimizers = hand.configure_optimizers()
    for step, batch in enumerate(batches, 1):
        for name, of in (("a", hand.first), ("b", hand.second)):
            if name == "b" and step % 2:
                continue
            optimizers[name].zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = of(batch)
            scaler.scale(loss).backward()
            scaler.step(optimizers[name])
        scaler.update()
    task = Two()
    run = trainer(epochs=1, precision=fp16(init_scale=1024.0)).fit(task, batches)
    assert same(bits(task, *run.optimizers.values()), bits(hand, *optimizers.values()))
    assert run.precision.scaler is not None
    assert run.precision.scaler.state_dict() == scaler.state_dict()
    assert scaler.get_scale() > 1024.0


def test_one_phase_with_two_optimizers_moves_both_or_neither() -> None:
    net = nn.ModuleDict({"a": line(1.0), "b": line(1.0)})

    class Both(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any) -> Tensor:
            return (net["a"](batch[0]) * 1e3).mean() + net["b"](batch[0]).mean()

        def configure_optimizers(self) -> dict[str, Any]:
            return {n: torch.optim.SGD(m.parameters(), lr=1.0) for n, m in net.items()}

    weights: list[Any] = []
    look = acts(on_step_start=lambda run: weights.append([m.weight.item() for m in net.values()]))
    data = pairs([1.0], [1.0], [1.0])
    run = trainer(epochs=1, precision=fp16(init_scale=256.0), callbacks=[look]).fit(Both(), data)
    assert weights == [[1.0, 1.0]] * 3  # 1e3 * 256 and 1e3 * 128 are no float16, 1e3 * 64 is
    assert [m.weight.item() for m in net.values()] == [-999.0, 0.0]
    assert (run.progress.step, run.progress.batch, run.skipped) == (1, 0, 2)
    assert run.precision.scaler is not None
    assert run.precision.scaler.get_scale() == 64.0


def test_hooks_see_gradients_that_are_not_scaled() -> None:
    seen: list[Any] = []
    watch = acts(on_grads_ready=lambda run, phase, norm: seen.append((phase.parameters()[0].grad.item(), norm)))
    net = line(1.0)
    user = trainer(epochs=1, precision=fp16(init_scale=64.0), accumulate=2, callbacks=[watch])
    user.fit(sgd_task(net, lr=0.0), pairs([2.0], [4.0]))
    assert seen == [(3.0, None)]


def test_a_scheduler_does_not_count_a_step_that_the_scaler_dropped() -> None:
    net = line(1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-9)
    schedule = lw.per_step(torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
    task = lw.Supervised(net, lambda preds, target: preds.mean() * 1e3, optimizer, schedule=schedule)
    run = trainer(epochs=1, precision=fp16(init_scale=256.0)).fit(task, pairs([1.0], [1.0], [1.0], [1.0]))
    assert (run.progress.step, run.skipped) == (2, 2)
    assert optimizer.param_groups[0]["lr"] == 0.25e-9


def test_steps_and_batches_that_hooks_drop_leave_the_scaler_ready() -> None:
    n = iter(range(100))

    def drop(run: lw.Run, *rest: Any) -> None:
        if next(n) % 2:
            raise lw.SkipStep

    def leave_out(run: lw.Run, batch: Any) -> None:
        if batch[0][0] == 5.0:
            raise lw.SkipBatch

    net = line(1.0)
    data = pairs([1.0], [1.0], [5.0], [1.0], [1.0], [5.0], [5.0])
    watch = acts(on_grads_ready=drop, on_batch_start=leave_out)
    user = trainer(epochs=2, precision=fp16(init_scale=64.0), callbacks=[watch], accumulate=2)
    run = user.fit(sgd_task(net, lr=0.125), data)
    assert (run.progress.step, run.progress.epoch) == (3, 2)  # 6 windows with a batch, every second one dropped
    assert net.weight.item() == 1.0 - 3 * 0.125


# ------------------------------------------------------------------------------------------------------- non-finite


def test_gradients_that_never_stop_overflowing_end_with_an_error() -> None:
    net = line(1.0)
    task = sgd_task(net, loss=lambda preds, target: (preds - preds.detach()).sqrt().sum() + preds.detach().sum())
    with pytest.raises(lw.NonFiniteError) as caught:
        trainer(epochs=1, precision="fp16").fit(task, pairs(*[[1.0]] * 40))
    assert str(caught.value) == (
        "phase 'main': the gradients of 31 steps in a row were not finite, though the scale of the loss has fallen to "
        "6.10352e-05. The loss itself is 1, so a backward is what overflows: look for a division by 0 or the root of 0 "
        "in the step. precision='bf16' has the range of fp32"
    )
    assert net.weight.item() == 1.0
    run = trainer(epochs=1, precision="fp16", nonfinite=None).fit(sgd_task(net, loss=task.loss), pairs(*[[1.0]] * 40))
    assert (run.skipped, run.progress.step, net.weight.item()) == (40, 0, 1.0)  # as by hand


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "skip 2", None])
def test_a_loss_that_is_not_finite_is_judged_by_nonfinite(nonfinite: str | None) -> None:
    net, nan = line(1.0), float("nan")
    user = trainer(epochs=1, precision=fp16(init_scale=64.0), nonfinite=nonfinite)
    data = pairs([1.0], [nan], [nan], [nan], [1.0])
    if nonfinite in ("raise", "skip 2"):
        with pytest.raises(lw.NonFiniteError, match=r"phase 'main' has a loss of nan at step 2"):
            user.fit(sgd_task(net, lr=0.125), data)
        assert net.weight.item() == 0.875
    else:
        run = user.fit(sgd_task(net, lr=0.125), data)
        assert net.weight.item() == 0.75
        assert (run.progress.step, run.skipped, run.skips_in_row) == (2, 3, 0)
        assert run.history["train/loss"][0] == (1.0 + 0.875) / 2


def test_what_the_scaler_says_is_read_and_an_update_without_it_is_not_made() -> None:
    scaler, net = fp16(init_scale=2.0), line(1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    assert not has_unscaled(scaler)
    for value, found in ((1.0, False), (float("inf"), True), (float("nan"), True)):
        scaler.scale(net.weight.sum()).backward()
        net.weight.grad = torch.full_like(net.weight, value)
        scaler.unscale_(optimizer)
        assert has_unscaled(scaler)
        assert overflowed(scaler, [optimizer]) is found
        scaler.update()
        assert not has_unscaled(scaler)
    assert not overflowed(scaler, [optimizer])
    assert not overflowed(scaler, [optimizer], [torch.tensor(1.0), torch.ones(1)])
    assert overflowed(scaler, [optimizer], [torch.tensor(1.0), torch.tensor(float("inf"))])


# ---------------------------------------------------------------------------------------------------------- resume


def resumed(stop: int, folder: Path | None, resume: Any = None) -> tuple[lw.Run, nn.Module]:
    net, optimizer = net_and_optimizer(dropout=0.2)
    every = lw.Checkpoint("1 step") if folder is not None else False
    user = trainer(
        steps=stop, precision=fp16(), accumulate=2, clip_norm=0.3, folder=folder, name="n", checkpoint=every, seed=4
    )
    data = loader(39, noisy=True, batch_size=4, shuffle=True)
    return user.fit(lw.Supervised(net, hot, optimizer), data, resume=resume), net


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_resumed_run_goes_on_with_the_scale_to_the_same_bits(stop: int, folder: Path) -> None:
    whole, net = resumed(12, None)
    resumed(stop, folder)
    run, again = resumed(12, folder, "auto")
    assert run.resumed_from is not None
    assert same(bits(again, *run.optimizers.values()), bits(net, *whole.optimizers.values()))
    assert run.precision.scaler is not None
    assert whole.precision.scaler is not None
    assert run.precision.scaler.state_dict() == whole.precision.scaler.state_dict()
    assert (run.skipped, run.progress.step) == (whole.skipped, whole.progress.step)
    assert whole.skipped > 0


def test_a_checkpoint_is_not_resumed_exactly_with_another_precision(folder: Path) -> None:
    net, optimizer = net_and_optimizer()

    def fit(steps: int, precision: str, resume: Any = None) -> lw.Run:
        user = trainer(steps=steps, precision=precision, folder=folder, name="n")
        return user.fit(lw.Supervised(net, hot, optimizer), loader(batch_size=4), resume=resume)

    fit(2, "fp32")
    with pytest.raises(lw.CheckpointError, match="precision was 'fp32' and is 'fp16'"):
        fit(4, "fp16", "auto")
    assert fit(4, "fp16", "approximate").progress.step == 4


def test_the_same_task_fitted_again_goes_on_with_its_scale() -> None:
    net = line(1.0)
    task = lw.Supervised(net, lambda preds, target: preds.mean() * 1e3, torch.optim.SGD(net.parameters(), lr=0.0))
    user = trainer(epochs=1, precision=fp16(init_scale=256.0))
    assert user.fit(task, pairs([1.0], [1.0])).skipped == 2
    again = trainer(epochs=2, precision=fp16(init_scale=256.0)).fit(task, pairs([1.0], [1.0]))
    assert again.skipped == 0  # 64 from the beginning
    fresh = user.fit(sgd_task(line(1.0), loss=task.loss), pairs([1.0], [1.0]))
    assert fresh.skipped == 2  # a Trainer holds settings only


# ------------------------------------------------------------------------------------------ bf16-true, fp64: converted


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("fp64", torch.float64)])
def test_the_model_and_floating_inputs_are_converted_everywhere(precision: str, dtype: torch.dtype) -> None:
    net = classifier(batch_norm=True)
    seen: list[Any] = []

    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.dtype)
            out: Tensor = self.net(x)
            return out

    model = Watch()
    task = lw.Supervised(model, cross_entropy, torch.optim.Adam(model.parameters(), lr=0.01))
    user = trainer(epochs=2, precision=precision)
    x, y = samples(20)
    keys = list(net.state_dict())
    run = user.fit(task, (x, y), (x, y))
    assert user.predict(task, x).dtype == dtype
    user.validate(task, (x, y))
    assert set(seen) == {dtype}
    assert {t.dtype for t in (*net.parameters(), *net.buffers())} == {dtype, torch.int64}
    assert {s["exp_avg"].dtype for s in run.optimizers["main"].state.values()} == {dtype}
    assert x.dtype == torch.float32  # the data is untouched
    assert list(net.state_dict()) == keys


def test_fp64_gives_the_bits_of_a_model_and_data_in_float64() -> None:
    hand = classifier().double()
    optimizer = torch.optim.SGD(hand.parameters(), lr=0.1)
    x, y = samples(12)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(hand(x.double()), y).backward()
        optimizer.step()
    ours = classifier()
    trainer(epochs=3, precision="fp64").fit(sgd_task(ours, lr=0.1, loss=cross_entropy), [(x, y)])
    assert same(bits(ours), bits(hand))


def test_a_task_that_was_trained_in_fp32_goes_on_in_another_dtype_with_its_optimizer() -> None:
    net = classifier()
    task = lw.Supervised(net, cross_entropy, torch.optim.Adam(net.parameters(), lr=0.1))
    trainer(epochs=1).fit(task, loader(8, batch_size=4))
    run = trainer(epochs=2, precision="fp64").fit(task, loader(8, batch_size=4))
    assert run.progress.step == 4
    assert {v.dtype for s in run.optimizers["main"].state.values() for k, v in s.items() if k != "step"} == {
        torch.float64
    }


def test_lbfgs_works_in_fp64() -> None:
    net = line(1.0)
    task = lw.Supervised(net, nn.MSELoss(), torch.optim.LBFGS(net.parameters(), line_search_fn="strong_wolfe"))
    trainer(epochs=3, precision="fp64").fit(task, pairs([1.0, 2.0]))
    assert net.weight.dtype == torch.float64
    assert abs(net.weight.item()) < 1e-12


def test_move_converts_floating_tensors_only_and_wherever_they_are() -> None:
    batch = {"x": torch.zeros(2), "n": [torch.tensor([1]), (torch.ones(1, dtype=torch.bfloat16), "a")]}
    moved = move(batch, "cpu", torch.float64)
    assert moved["x"].dtype == moved["n"][1][0].dtype == torch.float64
    assert moved["n"][0] is batch["n"][0]
    assert move(moved, "cpu", torch.float64)["x"] is moved["x"]


# ---------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("precision", "name"),
    [("16-mixed", "fp16"), ("bf16-mixed", "bf16"), (32, "fp32"), (torch.float16, "fp16"), (torch.float64, "fp64")],
)
def test_the_names_of_others_are_answered_with_ours(precision: Any, name: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        trainer(epochs=1, precision=precision)
    assert str(caught.value) == f"precision={precision!r} is called {name!r} here: precision={name!r}"


def test_an_object_that_lacks_something_is_refused_with_what_it_lacks() -> None:
    class Half:
        name, plain = "half", True

    with pytest.raises(lw.SettingError) as caught:
        trainer(epochs=1, precision=Half())
    assert re.sub(r"<.*?Half object at \w+>", "Half()", str(caught.value)) == (
        "precision=Half(): expected one of 'fp32', 'bf16', 'fp16', 'bf16-true', 'fp64', a torch.amp.GradScaler, or an "
        "object with name, plain, holds, scaler, autocast; this one has no holds, scaler, autocast"
    )


def test_a_precision_of_the_users_own_is_used(folder: Path) -> None:
    entered = []

    class Mine(Autocast):
        def autocast(self, device: torch.device) -> Any:
            entered.append(device.type)
            return super().autocast(device)

    net = classifier()
    user = trainer(epochs=1, precision=Mine("mine", torch.bfloat16))
    run = user.fit(sgd_task(net, lr=0.1, loss=cross_entropy), loader(8, batch_size=4))
    assert (run.precision.name, entered) == ("mine", ["cpu", "cpu"])


def test_a_scaler_that_is_off_is_refused() -> None:
    with pytest.raises(lw.SettingError, match=r"it is not enabled, so nothing would be scaled"):
        trainer(epochs=1, precision=torch.amp.GradScaler("cpu", enabled=False))


def test_float16_weights_are_refused_before_the_start() -> None:
    net = line().half()
    with pytest.raises(lw.PlanError) as caught:
        trainer(epochs=1, precision="fp16").fit(sgd_task(net), pairs([1.0]))
    assert caught.value.problems == [
        "precision='fp16' computes in float16 and keeps the weights in float32, but weight of the model came in "
        "float16; call net.float() before the optimizer is made"
    ]


def test_complex_weights_are_not_cut_to_their_real_part() -> None:
    net = nn.Linear(1, 1, dtype=torch.complex64)
    with pytest.raises(lw.SettingError, match=r"the model has complex parameters or buffers, which torch.fl"):
        trainer(epochs=1, precision="fp64").fit(sgd_task(net), pairs([1.0]))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp64"])
def test_a_step_that_does_all_the_work_sees_to_its_precision_itself(precision: str) -> None:
    with pytest.raises(lw.PlanError, match=f"precision='{precision}' cannot apply, since no phase moves an optimizer"):
        trainer(epochs=1, precision=precision).run(lambda run, batch: batch, [1.0])


def test_names_make_fresh_objects_and_the_plan_tells_them() -> None:
    expected: dict[str, tuple[Callable[..., Any], bool]] = {
        "fp32": (Plain, True), "bf16": (Autocast, False), "fp16": (Scaled, False), "bf16-true": (Plain, True),
        "fp64": (Plain, True),
    }  # fmt: skip
    for name, (kind, plain) in expected.items():
        user = trainer(epochs=1, precision=name)
        plan = user.plan(sgd_task(line()), pairs([1.0]))
        assert f"device: cpu, precision: {name}" in plan.facts
        run = user.fit(sgd_task(line(), lr=0.0), pairs([1.0]))
        assert (type(run.precision), run.precision.plain, run.precision.name) == (kind, plain, name)


# ------------------------------------------------------------------------------------------------------ channels last


def images() -> nn.Sequential:
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4 * 36, 3))


def test_channels_last_needs_a_converted_model_and_keeps_its_format(folder: Path) -> None:
    data = [(torch.randn(4, 3, 8, 8), torch.randint(3, (4,))) for _ in range(4)]
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        net = images().to(memory_format=memory_format)
        seen: list[Tensor] = []
        watch = net[0].register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        user = trainer(steps=4, folder=folder, name=str(memory_format), checkpoint=lw.Checkpoint("2 steps"))
        run = user.fit(lw.Supervised(net, cross_entropy, torch.optim.Adam(net.parameters(), lr=0.01)), data)
        assert all(out.is_contiguous(memory_format=memory_format) for out in seen)  # of inputs that were not converted
        state = run.optimizers["main"].state[net[0].weight]
        for tensor in (net[0].weight, net[3].weight, net[0].weight.grad, state["exp_avg"]):
            assert tensor.is_contiguous(memory_format=memory_format)
        watch.remove()
        ends.append(bits(net)[0])
        again = images().to(memory_format=memory_format)
        task = lw.Supervised(again, cross_entropy, torch.optim.Adam(again.parameters(), lr=0.01))
        first = sorted((run.folder / "checkpoints").glob("step-*"))[0]  # type: ignore[operator]
        trainer(steps=4).fit(task, data, resume=first)
        assert again[3].weight.is_contiguous(memory_format=memory_format)
        assert same(bits(again)[0], ends[-1])
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-3, atol=1e-5)
