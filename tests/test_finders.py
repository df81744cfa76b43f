"""lr_find and batch_size_find: what they say, and that they leave no bit changed."""

from __future__ import annotations

import copy
import math
import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import loopwright as lw
from loopwright.lr_curve import LRCurve
from loopwright.schedules import cosine
from tiny import Noisy, acts, bits, classifier, loader, same, samples, seed_all, trainer


def task_of(net: nn.Module, **settings: Any) -> lw.Supervised:
    optimizer = torch.optim.AdamW(lw.groups(net, ["0.*", "*"], lr=(0.01, 0.03), no_decay=True))
    return lw.Supervised(net, nn.CrossEntropyLoss(), optimizer, **settings)


def find(kind: str, task: Any, data: Any, at: lw.Trainer | None = None) -> Any:
    if kind == "lr":
        return lw.lr_find(at or trainer(epochs=1), task, data)
    return lw.batch_size_find(at or trainer(epochs=1), task, data.dataset)


# ---------------------------------------------------------------------------------------------------- no trace


@pytest.mark.parametrize("kind", ["lr", "batch size"])
def test_a_fit_after_a_finder_equals_a_fit_without_it_bit_for_bit(kind: str) -> None:
    def run(finds: bool) -> list[Any]:
        seed_all()
        net = classifier(dropout=0.3, batch_norm=True)
        task = task_of(net, schedule={"lr": lambda f: 0.02 * (1 - f)})
        data = DataLoader(Noisy(40), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3))
        at = trainer(epochs=2, accumulate=2, clip_norm=1.0)
        if finds:
            find(kind, task, data, at)
        made = at.fit(task, data)
        return [bits(net, task.optimizer), list(made.history["lr"]), made.progress._replace(seconds=0)]

    assert same(run(finds=True), run(finds=False))


@pytest.mark.parametrize("kind", ["lr", "batch size"])
def test_all_is_what_it_was_between_two_fits_and_after_an_error(kind: str) -> None:
    seed_all()
    net = classifier(batch_norm=True)
    task, data = task_of(net), loader(40, batch_size=8, shuffle=True)
    run = trainer(epochs=1).fit(task, data)
    net[0].bias.requires_grad_(False)
    net[1].eval()
    net[0].calls = [1]  # type: ignore[assignment]

    def look() -> Any:
        flags = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in net.parameters()]
        groups = [{k: v for k, v in g.items() if k != "params"} for g in task.optimizer.param_groups]
        return [bits(net, task.optimizer), flags, groups, [m.training for m in net.modules()], net[0].calls,
                [p.data_ptr() for p in net.parameters()], sorted(vars(task)), sorted(vars(task.optimizer))]  # fmt: skip

    before = copy.deepcopy(look())
    find(kind, task, data)
    assert same(before, look())
    assert task._run is run

    def fail(self: Any, inputs: Any, outputs: Any) -> None:
        net[0].calls.append(2)  # type: ignore[operator]
        raise ValueError("broken")

    hook = net.register_forward_hook(fail)
    before = copy.deepcopy(look())
    with pytest.raises(ValueError, match="broken"):
        find(kind, task, data)
    assert same(before, look())
    hook.remove()
    assert trainer(epochs=2).fit(task, data).progress.epoch == 2


def test_callbacks_that_change_training_take_part_as_copies_and_the_others_do_not() -> None:
    class Half(lw.Callback):
        calls = 0

        def map_loss(self, run: lw.Run, loss: Tensor, *_: Any) -> Tensor:
            self.calls += 1
            return loss / 2

    class Frozen(lw.Callback):
        """Holds a parameter of the model, as a copy of it must."""

        def __init__(self, parameter: Tensor) -> None:
            self.parameter = parameter

        def on_grads_ready(self, run: lw.Run, phase: lw.Phase, grad_norm: Tensor | None) -> None:
            assert any(self.parameter is p for p in phase.parameters())

    half, seen = Half(), list[str]()
    watcher = acts(on_step_end=lambda run, _: seen.append("step"))
    net = classifier()
    data = loader(40, batch_size=8)
    plain = lw.lr_find(trainer(epochs=1), task_of(net), data, smooth=0.0)
    at = trainer(epochs=1, callbacks=[half, Frozen(net[0].weight), watcher, lw.EarlyStopping()])
    halved = lw.lr_find(at, task_of(net), data, smooth=0.0)
    assert halved.losses[0] == plain.losses[0] / 2
    assert (half.calls, seen) == (0, [])


def test_a_schedule_of_the_task_waits_and_all_groups_get_the_same_rate() -> None:
    seen: list[set[float]] = []

    class Look(lw.Callback):
        def on_grads_ready(self, run: lw.Run, phase: lw.Phase, grad_norm: Tensor | None) -> None:
            seen.append({group["lr"] for group in phase.moved[0].param_groups})

        def __deepcopy__(self, memo: Any) -> Any:
            return self

    for schedule in (cosine(0.5, 0.0), lambda o: lw.per_step(lr_scheduler.LinearLR(o, 0.1)), None):
        seen.clear()
        task = task_of(classifier(), schedule=schedule)
        found = lw.lr_find(trainer(epochs=1, callbacks=[Look()]), task, loader(40, batch_size=8), steps=50, stop_at=1e9)
        assert [len(rates) for rates in seen] == [1] * 50
        assert [rates.pop() for rates in seen] == found.lrs
        assert found.lrs == pytest.approx([1e-7 * 1e8 ** (k / 50) for k in range(50)])


# ------------------------------------------------------------------------------------------------- what they say


def curve(loss: Any, n: int = 100) -> LRCurve:
    lrs = [10 ** (-7 + 8 * k / n) for k in range(n)]
    return LRCurve(lrs, [loss(k) for k in range(n)])


def test_steep_is_where_a_smooth_fall_is_steepest() -> None:
    fall = curve(lambda k: 1 / (1 + math.exp((k - 60) / 4)))  # a sigmoid, whose slope is largest at 60
    assert fall.steep == fall.lrs[60]


def test_valley_is_half_way_down_the_longest_fall() -> None:
    fall = curve(lambda k: 1.0 if k < 30 else 1 - (k - 30) / 50 if k <= 70 else 0.2 + (k - 70) / 10)
    assert fall.valley == fall.lrs[70 - 41 + 41 // 3 + 41 // 6]  # 41 losses, from 30 to 70
    bumps = curve(lambda k: 1.0 if k < 30 else 1 - (k - 30) / 50 + 0.5 * (k % 10 == 5) if k <= 70 else 2 + k)
    assert bumps.valley == bumps.lrs[70 - 37 + 37 // 3 + 37 // 6]  # four bumps are stepped over


def test_slide_is_before_the_explosion() -> None:
    explosion = curve(lambda k: 0.5 if k < 80 else 0.5 + 0.1 * (k - 80) ** 2)
    right = next(r for r in range(84, 0, -1) if abs(_slope(r + 10) - _slope(r + 10 - 15)) <= 0.005)
    assert explosion.slide == explosion.lrs[right + 10 - 15]
    assert curve(lambda k: 1 - k / 1000).slide == curve(lambda k: 1.0).lrs[94 - 15]


def _slope(k: int) -> float:
    """Of the explosion above, by central differences."""
    loss = [0.5 if i < 80 else 0.5 + 0.1 * (i - 80) ** 2 for i in range(95)]
    return loss[k] - loss[k - 1] if k == 94 else (loss[k + 1] - loss[k - 1]) / 2


@pytest.mark.parametrize("seed", range(5))
def test_the_longest_fall_is_that_of_a_search_over_all(seed: int) -> None:
    values = random.Random(seed).sample(range(1000), 12)
    falls = [
        (len(chosen), -chosen[-1])  # of several as long, the one that ends first
        for mask in range(1, 1 << 12)
        if (chosen := [i for i in range(12) if mask >> i & 1])
        and all(values[a] > values[b] for a, b in pairwise(chosen))
    ]
    n, end = max(falls)
    found = LRCurve([float(i) for i in range(1, 19)], [0.0, *map(float, values), *[0.0] * 5])  # 12 are judged
    assert found.valley == found.lrs[1 - end - n + n // 3 + n // 6]


def test_the_losses_are_smoothed_as_a_corrected_moving_average() -> None:
    found = lw.lr_find(trainer(epochs=1), task_of(classifier()), loader(40, batch_size=8), smooth=0.5)
    average, expected = 0.0, []
    for k, loss in enumerate(found.raw, start=1):
        average = 0.5 * average + 0.5 * loss
        expected.append(average / (1 - 0.5**k))
    assert found.losses == pytest.approx(expected, rel=1e-12)
    assert found.raw[0] == found.losses[0]


def test_it_stops_where_the_loss_explodes_or_is_not_finite() -> None:
    net = nn.Linear(5, 1)
    task = lw.Supervised(net, lambda preds, y: preds.square().mean(), torch.optim.SGD(net.parameters(), 0.1))
    before = bits(net)
    found = lw.lr_find(trainer(epochs=1), task, [(10 * torch.ones(8, 5), torch.zeros(8))], end=1e4, smooth=0.5)
    assert 10 < len(found.losses) < 100
    assert found.losses[-1] > 4 * min(found.losses)
    wild = lw.lr_find(trainer(epochs=1), task, [(10 * torch.ones(8, 5), torch.zeros(8))], end=1e30, stop_at=math.inf)
    assert len(wild.losses) < 100
    assert all(map(math.isfinite, wild.losses))
    assert same(before, bits(net))


def test_the_picture_has_the_losses_and_a_mark_for_each_suggestion() -> None:
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib import pyplot

    found = lw.lr_find(trainer(epochs=1), task_of(classifier()), loader(40, batch_size=8))
    ax = found.plot()
    labels = [line.get_label().split()[0] for line in ax.lines]
    assert labels == ["loss", "smoothed", "valley", "steep", "slide"]
    assert [line.get_xdata()[0] for line in ax.lines[2:]] == list(found.suggestions.values())
    pyplot.close("all")


class Heavy(nn.Module):
    """Runs out of memory where a batch has more than ``most`` samples, or the third step of one has."""

    def __init__(self, most: int, error: BaseException) -> None:
        super().__init__()
        self.net, self.most, self.error = classifier(), most, error
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise self.error
        return self.net(x)  # type: ignore[no-any-return]


MEMORY = [torch.OutOfMemoryError("out of memory"), MemoryError(), RuntimeError("not enough memory: you tried to")]


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
def test_the_batch_size_is_doubled_until_memory_runs_out(error: BaseException) -> None:
    for most, expected in ((7, 4), (8, 8), (1000, 32)):  # of 37 samples
        task = lw.Supervised(Heavy(most, error), nn.CrossEntropyLoss(), lambda params: torch.optim.Adam(params))
        assert lw.batch_size_find(trainer(epochs=1), task, samples(37)) == expected


@pytest.mark.parametrize(
    ("data", "settings", "expected"),
    [
        (loader(37, batch_size=2), {}, 32),
        (samples(37), {"limit": 9}, 8),
        (samples(37), {"start": 3}, 24),
        (lambda n: loader(64, batch_size=n), {"limit": 50}, 32),
        (TensorDataset(*samples(20)), {}, 16),
    ],
    ids=["a DataLoader", "a limit", "a start", "a function", "a dataset"],
)
def test_no_batch_is_larger_than_the_data_or_the_limit(data: Any, settings: Any, expected: int) -> None:
    task = lw.Supervised(classifier(), nn.CrossEntropyLoss(), lambda params: torch.optim.Adam(params))
    assert lw.batch_size_find(trainer(epochs=1), task, data, **settings) == expected


def test_an_error_that_is_not_of_memory_is_raised() -> None:
    task = lw.Supervised(Heavy(3, RuntimeError("shapes")), nn.CrossEntropyLoss(), lambda p: torch.optim.Adam(p))
    with pytest.raises(RuntimeError, match="shapes"):
        lw.batch_size_find(trainer(epochs=1), task, samples(37))
    task.module.error = MEMORY[0]  # type: ignore[assignment]
    with pytest.raises(lw.SettingError, match=r"^not even a batch of 4 fits into memory; begin with a smaller one"):
        lw.batch_size_find(trainer(epochs=1), task, samples(37), start=4)


def two_phases() -> lw.Task:
    class Two(lw.Task):
        def phases(self) -> list[lw.Phase]:
            return [lw.Phase("a", lambda batch: None), lw.Phase("b", lambda batch: None)]

    return Two()


NAN = [(torch.full((4, 5), math.nan), torch.zeros(4).long())]


def test_a_curve_without_a_loss_says_why_where_it_is_printed() -> None:
    curve = lw.lr_find(trainer(epochs=1), task_of(classifier()), NAN)
    assert repr(curve) == "LRCurve(no suggestion: the first loss is not finite; no step)"
    assert "there is no loss to judge by" in curve._repr_html_()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda t, d: lw.lr_find(t, task_of(classifier()), iter(d)), "lr_find would use up the list_iterator; pass a"),
        (lambda t, d: lw.lr_find(t, two_phases(), d), "lr_find tries one phase, and this task has several: a, b"),
        (lambda t, d: lw.lr_find(t, classifier(), d), "lr_find needs a task: lw.Supervised(net, loss, optimizer)"),
        (lambda t, d: lw.lr_find(t, task_of(classifier()), d, start=1.0, end=0.1), "expected learning rates that grow"),
        (lambda t, d: lw.lr_find(t, task_of(classifier()), d, steps=12).valley, "12 losses are too few to judge by"),
        (lambda t, d: lw.lr_find(t, task_of(classifier()), d, smooth=1.0), "expected 0 <= smooth < 1"),
        (lambda t, d: lw.lr_find(t, task_of(classifier()), NAN).valley, "there is no loss to judge by: the first one "
         "is not finite, and no learning rate was used before it. Look for NaN in the data"),
        (lambda t, d: lw.batch_size_find(t, task_of(classifier()), d), "this is a list of batches or of samples; pass "
         "arrays, (x, y), a dataset, or a function of the size: lambda n: DataLoader(samples, n)"),
        (lambda t, d: lw.batch_size_find(t, task_of(classifier()), samples(3), start=4), "start=4 is over the 3"),
        (lambda t, d: lw.batch_size_find(t, task_of(classifier()), lw.Loader(samples(3))), "pass what the"),
        (lambda t, d: lw.batch_size_find(t, task_of(classifier()), samples(3), steps=0), "steps=0: expected a whole"),
    ],
)  # fmt: skip
def test_what_cannot_be_found_is_refused_with_the_fix(call: Any, text: str) -> None:
    with pytest.raises(lw.SettingError) as error:
        call(trainer(epochs=1), [tuple(samples(9))])
    assert text in str(error.value)


def test_numpy_draws_are_put_back_as_well() -> None:
    np.random.seed(4)
    before = np.random.get_state(legacy=False)["state"]["pos"]
    lw.lr_find(trainer(epochs=1, seed=7), task_of(classifier()), loader(40, noisy=True, batch_size=8), steps=20)
    assert np.random.get_state(legacy=False)["state"]["pos"] == before


def test_what_is_printed_of_a_curve_is_one_line_with_its_suggestions() -> None:
    found = curve(lambda k: 1.0 - k / 100)
    told = repr(found)
    assert told.startswith(f"LRCurve(valley {found.valley:.1e}, steep {found.steep:.1e}, slide {found.slide:.1e}; 100 ")
    assert told.endswith(f"steps, lr {found.lrs[0]:.1e} to {found.lrs[-1]:.1e})")
    assert len(told) < 120
    shown = found._repr_html_()
    assert "<polyline" in shown
    assert f"{found.valley:.1e}" in shown


@pytest.mark.parametrize("count", [1, 9])
def test_a_curve_too_short_to_judge_by_says_so_where_it_is_printed(count: int) -> None:
    found = LRCurve([1e-3] * count, [1.0] * count)
    steps = f"{count} step{'s' * (count != 1)}, lr 1.0e-03 to 1.0e-03"
    assert repr(found) == f"LRCurve(no suggestion: too few losses to judge by; {steps})"
    assert f"{count} losses are too few to judge by" in found._repr_html_()
