"""Doctor: the numbers of each layer are the known ones, what is wrong is said, and no bit changes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import loopwright as lw
from loopwright.callbacks.doctor import ACTIVATIONS, BINS, WEIGHTS
from tiny import bits, classifier, line, loader, pairs, same, seed_all, sgd_task, trainer


def looked(net: nn.Module, data: Any, *, every: int = 1, lr: float = 0.1, loss: Any = None, **settings: Any) -> Any:
    doctor = lw.Doctor(every, show=False)
    task = sgd_task(net, lr=lr, loss=loss or (lambda preds, target: preds.mean()))
    trainer(**{"epochs": 1, "callbacks": [doctor], **settings}).fit(task, data)
    return doctor


def row(values: Any, names: tuple[str, ...]) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))


def test_the_numbers_of_activations_gradients_and_updates_are_the_known_ones() -> None:
    net = nn.Sequential(line(2.0), nn.ReLU(), nn.Tanh())
    doctor = looked(net, pairs([-1.0, 1.0, 3.0, -2.0]), loss=lambda preds, target: preds.sum())
    assert doctor.layers == ["0", "1", "2"]
    outputs = doctor.activations[0]
    rectified, squashed = torch.tensor([0.0, 2.0, 6.0, 0.0]), torch.tensor([0.0, 2.0, 6.0, 0.0]).tanh()
    assert row(outputs[0], ACTIVATIONS) == pytest.approx(
        {"mean": 0.5, "std": torch.tensor([-2.0, 2, 6, -4]).std(correction=0).item(), "zero": 0.0,
         "saturated": np.nan, "dead": np.nan}, nan_ok=True,
    )  # fmt: skip
    assert row(outputs[1], ACTIVATIONS) == pytest.approx(
        {"mean": 2.0, "std": rectified.std(correction=0).item(), "zero": 0.5, "saturated": np.nan, "dead": 0.0},
        nan_ok=True,
    )
    assert row(outputs[2], ACTIVATIONS)["saturated"] == 0.25
    gradient = (1 - squashed[1] ** 2) * 1 + (1 - squashed[2] ** 2) * 3
    expected = {"gradient": gradient.item(), "no gradient": 0.0, "weight": 2.0, "update": 0.1 * gradient.item()}
    assert row(doctor.weights[0, 0], WEIGHTS) == pytest.approx(expected, rel=1e-4)
    counts = doctor.histograms[0, 0]
    assert counts.sum() == 4
    assert [(BINS[i], BINS[i + 1]) for i in np.flatnonzero(counts)] == [
        next((a, b) for a, b in itertools.pairwise(BINS) if a < value <= b) for value in (-4, -2, 2, 6)
    ]


def test_dead_units_are_those_that_are_0_for_the_whole_window() -> None:
    net = nn.Sequential(nn.Linear(1, 4, bias=False), nn.ReLU())
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0], [0.0], [0.0]]))  # one for positive, one for negative inputs
    for accumulate, dead in ((1, [0.75, 0.75]), (2, [0.5])):
        doctor = looked(net, pairs([1.0, 2.0], [-1.0, -2.0]), accumulate=accumulate, lr=1e-9)
        assert doctor.activations[:, 1, 4].tolist() == dead
    images = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU())
    nn.init.constant_(images[0].weight[0], 1.0)  # type: ignore[index]
    nn.init.constant_(images[0].weight[1], -1.0)  # type: ignore[index]
    assert looked(images, [(torch.ones(2, 1, 3, 3), torch.zeros(2))]).activations[0, 1, 4] == 0.5


def test_only_every_so_many_th_step_is_looked_at_and_validation_never() -> None:
    net = classifier()
    doctor = lw.Doctor(3, show=False)
    hooked: list[bool] = []
    user = trainer(epochs=2, callbacks=[doctor])
    user.on(lw.Event.STEP_START)(lambda run: hooked.append(bool(net[0]._forward_hooks)))
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    user.fit(task, loader(20, batch_size=5), loader(10))
    assert doctor.steps == [3, 6]
    assert hooked == [False, False, True, False, False, True, False, False]
    assert doctor.activations.shape == (2, 3, len(ACTIVATIONS))
    assert doctor.histograms[:, 0].sum(axis=1).tolist() == [5 * 8, 5 * 8]  # the training batch alone


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2, "clip_norm": 1.0}, {"precision": "bf16"}])
def test_the_doctor_changes_no_bit(settings: Any, folder: Path) -> None:
    def fitted(*callbacks: lw.Callback) -> list[Any]:
        net = classifier(dropout=0.5, batch_norm=True)
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        seed_all(2)
        task = lw.Supervised(net, nn.CrossEntropyLoss(), optimizer)
        user = trainer(epochs=2, callbacks=callbacks, **settings)
        user.fit(task, loader(23, batch_size=7, shuffle=True, noisy=True), loader(9, noisy=True))
        assert not any(module._forward_hooks for module in net.modules())
        return bits(net, optimizer)

    assert same(fitted(lw.Audit(), lw.Doctor(1, show=False)), fitted())


class HostReads(TorchDispatchMode):
    """Counts where a value of a tensor is read by the program: there a device would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


def test_looking_reads_nothing_from_the_device() -> None:
    """As many reads as without it: the numbers wait where they were made."""

    def reads(*callbacks: lw.Callback) -> int:
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Tanh(), nn.Linear(8, 2))
        task = sgd_task(net, loss=square)
        with HostReads() as counted:
            trainer(epochs=1, callbacks=callbacks).fit(task, DATA)
        return counted.count

    assert reads(lw.Doctor(1, show=False)) == reads()


def test_phases_with_their_own_models_are_looked_at_each() -> None:
    class Two(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = line(1.0), line(2.0)

        def phases(self) -> list[lw.Phase]:
            return [
                lw.Phase("a", lambda batch: self.a(batch[0]).mean(), optimizers="a"),
                lw.Phase("b", lambda batch: self.b(batch[0]).mean(), optimizers="b", every=2),
            ]

        def configure_optimizers(self) -> Any:
            return {n: torch.optim.SGD(getattr(self, n).parameters(), 0.1) for n in "ab"}

    doctor = lw.Doctor(1, show=False)
    trainer(epochs=1, callbacks=[doctor]).fit(Two(), pairs([1.0], [2.0]))
    assert doctor.parameters == ["a.weight", "b.weight"]
    assert doctor.weights[:, 0, 0].tolist() == [1.0, 2.0]
    assert np.isnan(doctor.weights[0, 1, 0])
    assert doctor.weights[1, 1, 0] == 2.0


def test_more_records_than_may_wait_are_all_kept(folder: Path) -> None:
    doctor = lw.Doctor(1, show=False)
    user = lw.Trainer(epochs=100, callbacks=[doctor], folder=folder, progress=False)
    run = user.fit(sgd_task(line(1.0), lr=0.01), pairs([1.0], [2.0]))
    assert doctor.steps == list(range(1, 201))
    assert doctor.weights[:, 0, 0].tolist() == [1.0, 2.0] * 100
    assert run.folder is not None
    written = json.loads((run.folder / "doctor.json").read_text())
    assert written == doctor.as_dict()
    assert written["parameters"]["weight"]["gradient"] == [1.0, 2.0] * 100
    assert written["layers"]["Linear"]["dead"] == [None] * 200


# ------------------------------------------------------------------------------------------------------- in words


def deep(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    return nn.Sequential(*layers)


DATA = [(torch.linspace(-1, 1, 64).view(16, 4), torch.zeros(16, 2)) for _ in range(8)]


def square(preds: Tensor, target: Tensor) -> Tensor:
    return (preds - target - 1).square().mean()


def test_a_healthy_model_has_no_finding() -> None:
    doctor = looked(deep(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)), DATA, lr=0.003, loss=square)
    assert doctor.findings == []
    assert str(doctor) == "Doctor: 8 looks at 3 layers, up to step 8: all is well"


def test_dead_units_are_found() -> None:
    net = deep(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
    nn.init.constant_(net[0].bias[:6], -100.0)  # type: ignore[index]
    (found,) = looked(net, DATA, lr=0.001, loss=square).findings
    assert found.startswith("1 (ReLU): 60% of its units are 0 for every sample of the batch, and learn nothing more. L")


def test_saturated_units_are_found() -> None:
    net = deep(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 2))
    nn.init.constant_(net[0].bias, 50.0)  # type: ignore[arg-type]
    found = looked(net, DATA, lr=0.01, loss=square).findings
    assert any(
        one.startswith("1 (Tanh): 100% of its outputs are saturated, where the gradient is next") for one in found
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_learning_rate_that_is_too_high_or_too_low_is_found() -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return deep(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))

    (found,) = looked(net(), DATA[:2], lr=0.2, loss=square).findings
    assert "2.weight: a step moves the weights by 1.0e-01 of their norm (median), far more" in found
    assert found.endswith("far more than the usual 1e-03. Lower the learning rate (CS231n, Neural Networks Part 3)")
    (found,) = looked(net(), DATA, lr=1e-6, loss=square).findings
    assert found.startswith("0.weight, 2.weight: a step moves the weights by ")
    assert found.endswith("far less than the usual 1e-03. Raise the learning rate (CS231n, Neural Networks Part 3)")


def test_gradients_that_vanish_or_explode_on_the_way_back_are_found() -> None:
    layers = [layer for _ in range(8) for layer in (nn.Linear(4, 4), nn.Sigmoid())]
    found = looked(deep(*layers, nn.Linear(4, 2)), DATA, lr=0.01, loss=square).findings
    assert found[0].startswith("gradients vanish on the way back: relative to the weights 0.weight gets ")
    layers = [nn.Linear(4, 4, bias=False) for _ in range(8)]
    for layer in layers:
        nn.init.eye_(layer.weight)
    layers[0].weight.data /= 1e5  # type: ignore[operator]
    found = looked(deep(*layers, nn.Linear(4, 2)), DATA, lr=1e-9, loss=square).findings
    assert found[0].startswith("gradients explode on the way back: relative to the weights 0.weight gets ")


def test_parameters_that_never_get_a_gradient_are_found_and_those_that_cease_to() -> None:
    class Forgets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.calls = nn.Linear(4, 2), nn.Linear(4, 2), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.used(x) * float(self.calls < 4) + self.used.bias

    found = looked(Forgets(), DATA, lr=0.001, loss=square).findings
    assert found[0].startswith("used.weight: no gradient any more, after there was one.")
    assert found[1].startswith("unused.weight, unused.bias: no gradient at any look. The loss does not depend on it")


def test_training_that_diverges_is_found_and_outputs_that_are_not_finite() -> None:
    net = deep(nn.Linear(4, 2))
    found = looked(net, DATA, lr=30.0, loss=square).findings
    assert any(one.startswith("the norm of all gradients has grown from ") for one in found)
    found = looked(deep(nn.Linear(4, 2)), DATA, lr=1e30, loss=square, nonfinite=None, epochs=2).findings
    assert found[0].startswith("0 (Linear): outputs that are not finite. Trainer(debug=lw.Debug(anomaly=True)) names")


# --------------------------------------------------------------------------------------------------------- a picture


def test_the_picture_has_a_histogram_for_each_layer_and_four_charts_of_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    doctor = looked(deep(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), DATA, loss=square)
    figure = doctor.plot(tmp_path / "doctor.png")
    assert (tmp_path / "doctor.png").read_bytes().startswith(b"\x89PNG")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:3] == ["0 (Linear)", "1 (ReLU)", "2 (Linear)"]
    assert len(titles) == 3 + 4
    (updates,) = (axes for axes in figure.axes if "norm of the update" in axes.get_title(loc="left"))
    drawn = {curve.get_label(): curve.get_ydata() for curve in updates.lines}
    assert np.allclose(drawn["0.weight"], doctor.weights[:, 0, 3] / doctor.weights[:, 0, 2])


def test_without_a_look_there_is_nothing_to_draw_and_that_is_said(capsys: Any) -> None:
    doctor = lw.Doctor(100)
    with pytest.warns(lw.LoopwrightWarning, match="Doctor: '100 steps' comes after the end of this run"):
        trainer(epochs=1, callbacks=[doctor]).fit(sgd_task(line()), pairs([1]))
    assert capsys.readouterr().out == "Doctor: nothing was looked at yet; the first look is at step 100\n"
    with pytest.raises(lw.SettingError, match="Doctor has nothing to draw: the first look is at step 100"):
        doctor.plot()


def test_the_doctor_is_refused_where_it_sees_nothing() -> None:
    plan = trainer(epochs=1, callbacks=[lw.Doctor()], compile=True).plan(sgd_task(line()), pairs([1]))
    assert "Doctor looks at each module, which compile=True merges; leave one of them out" in plan.problems
    with pytest.raises(lw.SettingError, match=r"Doctor\(every='5 steps'\): expected a whole number of steps, from 1"):
        lw.Doctor("5 steps")  # type: ignore[arg-type]
