"""Compiled steps: the user's module keeps its names, few graphs are made, and the numbers are those of eager steps."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import loopwright as lw
from loopwright._compat import graphs_compiled
from tiny import acts, bits, classifier, loader, same, samples, trainer

TRACED = {"backend": "eager"}  # what torch captures, without code from a C++ compiler: the same bits, in less time


class Net(lw.Task):
    """A step of its own, another one for validation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()
        self.called: list[str] = []

    def training_step(self, batch: Any) -> dict[str, Any]:
        preds = self.net(batch[0])
        return {"loss": cross_entropy(preds, batch[1]), "preds": preds, "target": batch[1], "half": 0.5}

    def validation_step(self, batch: Any) -> dict[str, Any]:
        preds = self.net(batch[0])
        return {"loss": cross_entropy(preds, batch[1]), "preds": preds, "target": batch[1]}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def configure_metrics(self) -> dict[str, Any]:
        return {"accuracy": lw.metrics.Accuracy()}


def supervised() -> lw.Supervised:
    net = classifier()
    metrics = {"accuracy": lw.metrics.Accuracy()}
    return lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), lr=0.01), metrics=metrics)


@pytest.mark.parametrize("make", [supervised, Net], ids=["Supervised", "Task"])
def test_a_compiled_run_has_the_bits_of_an_eager_one_where_the_code_is_the_same(make: Any) -> None:
    ends = []
    for compile in (False, TRACED):
        task = make()
        user = trainer(epochs=2, compile=compile, accumulate=2, seed=0)
        run = user.fit(task, loader(37, batch_size=8), loader(21, batch_size=8))
        tested, predicted = user.test(task, loader(9, batch_size=4)), user.predict(task, samples(9)[0])
        ends.append([bits(task, *run.optimizers.values()), dict(run.metrics), tested, predicted])
        assert not any("_orig_mod" in name for name in task.state_dict())
    assert same(*ends)


@pytest.mark.capability("PT-04")
@pytest.mark.parametrize("settings", [{}, {"compile": TRACED}], ids=["by default", "compiled"])
def test_steps_are_eager_by_default_and_without_the_modules_python_once_compiled(settings: dict[str, Any]) -> None:
    """A default run calls the forward in Python at each step; a compiled one only while it is captured."""
    net, calls = classifier(), 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code is nn.Sequential.forward.__code__

    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    trainer(epochs=1, **settings).fit(task, loader(32, batch_size=8))  # which compiles
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run = trainer(epochs=2, **settings).fit(task, loader(32, batch_size=8))
    finally:
        sys.setprofile(before)
    assert run.progress.step == 8
    assert calls == (0 if settings else 4)


def test_graphs_are_counted_and_a_short_last_batch_makes_one_more_once() -> None:
    task, at = supervised(), []
    watch = acts(on_step_end=lambda run, result: at.append(run.compiler.graphs))
    run = trainer(epochs=2, compile=TRACED, callbacks=[watch]).fit(task, loader(37, batch_size=8))
    assert at == [1] * 4 + [2] * 6  # 37 = 4 * 8 + 5
    assert run.compiler.graphs == 2
    assert trainer(epochs=3, compile=TRACED).fit(task, loader(37, batch_size=8)).compiler.graphs == 0  # kept
    other = trainer(epochs=1, compile={**TRACED, "dynamic": True}).fit(supervised(), loader(37, batch_size=8))
    assert other.compiler.graphs == 1


def test_data_of_many_sizes_has_one_graph_for_all_on_demand() -> None:
    ragged = [samples(n) for n in range(2, 12)]
    assert trainer(epochs=1, compile={**TRACED, "dynamic": True}).fit(supervised(), ragged).compiler.graphs == 1


def test_training_and_validation_have_a_graph_each() -> None:
    run = trainer(epochs=2, compile=TRACED).fit(supervised(), loader(32, batch_size=8), loader(16, batch_size=8))
    assert run.compiler.graphs == 2


def test_more_models_than_torch_keeps_graphs_for_one_function_are_all_compiled() -> None:
    for width in range(2, 13):
        net = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))
        task = lw.Supervised(net, cross_entropy, torch.optim.SGD(net.parameters(), lr=0.1))
        run = trainer(steps=1, compile=TRACED).fit(task, loader(8, batch_size=8))
        assert run.compiler.graphs == 1


def test_a_module_that_takes_the_place_of_another_is_compiled_too() -> None:
    first, second = classifier(), nn.Sequential(nn.Linear(5, 3))
    task = lw.Supervised(first, cross_entropy, torch.optim.SGD(first.parameters(), lr=0.1))

    def change(run: lw.Run, result: Any) -> None:
        if run.progress.step == 2:
            run.replace("model", second)
            run.replace("optimizer", torch.optim.SGD(second.parameters(), lr=0.1))

    before = bits(second)[0]
    run = trainer(steps=4, compile=TRACED, callbacks=[acts(on_step_end=change)]).fit(task, loader(32, batch_size=8))
    assert run.compiler.graphs == 2
    assert not same(bits(second)[0], before)


def test_several_phases_are_compiled_each() -> None:
    class Two(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

        def configure_optimizers(self) -> dict[str, Any]:
            return {n: torch.optim.SGD(getattr(self, n).parameters(), lr=0.1) for n in "ab"}

        def phases(self) -> list[lw.Phase]:
            return [
                lw.Phase(n, lambda batch, n=n: cross_entropy(getattr(self, n)(batch[0]), batch[1]), n)  # type: ignore[misc]
                for n in "ab"
            ]

    run = trainer(epochs=2, compile=TRACED).fit(Two(), loader(16, batch_size=8))
    assert run.compiler.graphs == 2


def test_a_copy_of_a_task_leaves_its_compiled_steps_behind() -> None:
    task = supervised()
    trainer(epochs=1, compile=TRACED).fit(task, loader(8, batch_size=8))
    assert "_compiled" in task.__dict__
    twin = copy.deepcopy(task)
    assert "_compiled" not in twin.__dict__
    before = bits(task)[0]
    trainer(epochs=1, compile=TRACED).fit(twin, loader(8, batch_size=8))
    assert same(bits(task)[0], before)


def test_it_goes_with_autocast_and_a_scaler() -> None:
    ends = []
    for compile in (False, TRACED):
        task = supervised()
        user = trainer(epochs=2, compile=compile, precision="fp16", clip_norm=1.0, seed=0)
        run = user.fit(task, loader(37, batch_size=8))
        ends.append([bits(task, *run.optimizers.values()), run.skipped, run.precision.scaler.state_dict()])  # type: ignore[union-attr]
    assert same(*ends)


def test_the_number_of_graphs_and_the_options_are_told(folder: Path) -> None:
    user = trainer(epochs=1, compile=TRACED, folder=folder)
    task = supervised()
    assert "steps are compiled: backend='eager', dynamic=False" in user.plan(task, loader()).facts
    assert "output = Supervised.training_step(batch), compiled" in user.explain(task, loader())
    run = user.fit(task, loader(8, batch_size=8))
    assert run.folder is not None
    assert '"graphs": 1' in (run.folder / "run.json").read_text()


def test_an_error_in_a_compiled_step_is_the_users_own_and_one_of_the_compiler_says_how_to_go_on() -> None:
    class Bad(Net):
        def training_step(self, batch: Any) -> Any:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        trainer(epochs=1, compile=TRACED).fit(Bad(), loader())

    class Breaks(Net):
        def training_step(self, batch: Any) -> Any:
            torch._dynamo.graph_break()
            return cross_entropy(self.net(batch[0]), batch[1])

    with pytest.raises(Exception, match="graph_break") as caught:
        trainer(epochs=1, compile={**TRACED, "fullgraph": True}).fit(Breaks(), loader())
    note = "[loopwright] this came while the step was compiled; Trainer(compile=False) trains without that"
    assert note in caught.value.__notes__


# ---------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("compile", "message"),
    [
        ("yes", "compile='yes': expected True, False or a dict of options of torch.compile, such as "
                'compile={"fullgraph": True}'),
        (None, "compile=None: expected True, False or a dict of options of torch.compile, such as "
               'compile={"fullgraph": True}'),
        ({"mod": "default"}, "compile={'mod': ...} is no option of torch.compile. Known: 'backend', 'dynamic', "
                             "'fullgraph', 'mode', 'options'. Did you mean 'mode'?"),
    ],
)  # fmt: skip
def test_options_are_checked_at_once(compile: Any, message: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        trainer(epochs=1, compile=compile)
    assert str(caught.value) == message


def test_a_step_that_does_all_the_work_is_not_compiled() -> None:
    with pytest.raises(lw.PlanError, match="compile=True cannot apply to a step that does all the work"):
        trainer(epochs=1, compile=TRACED).run(lambda run, batch: batch, [1.0])


@pytest.mark.slow
def test_without_a_cpp_compiler_the_plan_says_what_to_install(tmp_path: Path) -> None:
    code = """
import torch, loopwright as lw
net = torch.nn.Linear(1, 1)
task = lw.Supervised(net, torch.nn.MSELoss(), torch.optim.SGD(net.parameters(), 0.1))
trainer, x = lw.Trainer(epochs=1, folder=None, progress=False, compile=True), torch.ones(4, 1)
for verb in (lambda: trainer.fit(task, [(x, x)]), lambda: trainer.predict(task, x)):
    try:
        verb()
    except lw.SettingError as error:
        print(error)
"""
    env = {**os.environ, "PATH": str(tmp_path)} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("CXX", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    problem = (
        "compile=True needs a C++ compiler, and none was found ($CXX, clang++, g++). Install one, such as: apt install "
        "g++; or leave compile out"
    )
    assert done.stdout == f"this run cannot start:\n  - {problem}\n    at <string>:5\n{problem}\n"


def test_the_compiler_is_imported_only_where_something_is_compiled() -> None:
    code = """
import sys, torch, loopwright as lw
net = torch.nn.Linear(1, 1)
task = lw.Supervised(net, torch.nn.MSELoss())
lw.Trainer(epochs=1, folder=None, progress=False, precision="fp16").validate(task, [(torch.ones(4, 1),) * 2])
print("torch._dynamo" in sys.modules, "torch._inductor" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


# ---------------------------------------------------------------------------------------------------- with inductor


def fitted(compile: Any, steps: int = 12, **settings: Any) -> tuple[lw.Run, nn.Module]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 3))
    task = lw.Supervised(net, cross_entropy, torch.optim.AdamW(net.parameters(), lr=0.01))
    resume = settings.pop("resume", None)
    user = trainer(steps=steps, compile=compile, seed=3, name="n", **settings)
    return user.fit(task, loader(37, batch_size=8, shuffle=True), loader(21, batch_size=8), resume=resume), net


def generated() -> int:
    """How often torch has asked for generated code."""
    from torch._dynamo.utils import counters

    return sum(n for name, n in counters["inductor"].items() if name.startswith("fxgraph_cache"))


@pytest.mark.slow
@pytest.mark.capability("PT-04")
def test_generated_code_trains_as_eager_code_does_within_rounding() -> None:
    eager, net = fitted(False)
    fitted(TRACED, 2)
    before = generated()
    run, ours = fitted(True)
    assert generated() > before
    assert run.compiler.graphs == 4  # training and validation, whole batches and the short last one
    for (name, a), b in zip(net.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert run.metrics["valid/loss"] == pytest.approx(eager.metrics["valid/loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_compiled_run_that_is_resumed_in_another_process_ends_with_the_same_bits(folder: Path) -> None:
    """What is compiled is a function of the step alone: not of the sizes that came first."""
    _, whole = fitted(True)
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
import torch; torch.set_num_threads(1); torch.use_deterministic_algorithms(True)  # it changes the code that is made
import test_compile, loopwright as lw
from pathlib import Path
test_compile.fitted(True, 9, folder=Path({str(folder)!r}), checkpoint=lw.Checkpoint("1000 steps"))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    run, again = fitted(True, folder=folder, resume="auto")
    assert run.resumed_from is not None
    assert run.exact is True
    assert same(bits(whole)[0], bits(again)[0])


def test_graphs_are_counted_by_torch() -> None:
    before = graphs_compiled()
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))
    assert graphs_compiled() == before + 1


def test_a_checkpoint_of_a_compiled_run_is_not_resumed_exactly_without(folder: Path) -> None:
    fitted(TRACED, 2, folder=folder, checkpoint=lw.Checkpoint("1 step"))
    with pytest.raises(lw.CheckpointError, match=r"compile was \{backend: 'eager'\} and is False"):
        fitted(False, folder=folder, resume="auto")
