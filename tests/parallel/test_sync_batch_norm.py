"""Batch norm over ranks: the numbers of one process with the whole batch, whoever has how much of it; over gloo."""

from __future__ import annotations

import copy
import io
import pickle
import re
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from loopwright.parallel.norms import Norms, norms_in

N = 23
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(1)) * 3 + 2
Y = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(2))
STRATEGIES = {
    "ddp": lw.DDP(sync_batch_norm=True),
    "fsdp": lw.FSDP(nn.Linear, sync_batch_norm=True),
}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def dense() -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm1d(6), nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=None), nn.Tanh(), nn.Linear(8, 8),
        nn.BatchNorm1d(8, affine=False), nn.Linear(8, 4), nn.BatchNorm1d(4, track_running_stats=False),
        nn.Linear(4, 4), nn.BatchNorm1d(4, eps=0.1, momentum=0.3), nn.Linear(4, 3),
    )  # fmt: skip


def images() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(2),
        nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(36, 3),
    )  # fmt: skip


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


def frozen() -> nn.Module:
    net = small()
    net[1].eval()  # by its statistics, which stay
    return net


def task_of(make: Any, dtype: torch.dtype = torch.float32, **more: Any) -> lw.Supervised:
    torch.manual_seed(0)
    return lw.Supervised(make().to(dtype), nn.CrossEntropyLoss(), sgd, **more)


def trainer(strategy: Any = "auto", **settings: Any) -> lw.Trainer:
    return lw.Trainer(**({"epochs": 2, "seed": 1, "folder": None, "progress": False, "strategy": strategy} | settings))


# ------------------------------------------------------------------------------------------------- the same numbers


class Gan(lw.Task):
    """Two phases, each of which goes through batch norm of the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gen = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6)).double()
        self.disc = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()

    def configure_optimizers(self) -> Any:
        return {"disc": sgd(self.disc.parameters()), "gen": sgd(self.gen.parameters())}

    def disc_step(self, batch: Any) -> Any:
        return self.disc(batch[0]).pow(2).mean() - self.disc(self.gen(batch[0]).detach()).tanh().mean()

    def gen_step(self, batch: Any) -> Any:
        return (self.disc(self.gen(batch[0])) - 1).pow(2).mean()

    def validation_step(self, batch: Any) -> Any:
        return self.gen_step(batch)

    def phases(self) -> list[lw.Phase]:
        return [lw.Phase("disc", self.disc_step, "disc"), lw.Phase("gen", self.gen_step, "gen", every=2)]


def trained(strategy: Any) -> dict[str, Any]:
    """What is left of small trainings, by name: batches of 7 (the last has 2) and of 2 (some ranks have none)."""
    found: dict[str, Any] = {}
    for name, make, dtype, size, accumulate in (
        ("dense", dense, torch.float64, 7, 1), ("a sample or none", dense, torch.float64, 3, 1),
        ("accumulated", dense, torch.float64, 3, 3), ("images", images, torch.float64, 7, 2),
        ("frozen", frozen, torch.float64, 7, 1),
        ("in float32", small, torch.float32, 6, 1), ("gan", None, torch.float64, 3, 2),
    ):  # fmt: skip
        task = Gan() if make is None else task_of(make, dtype)
        x = X.to(dtype)
        run = trainer(strategy, accumulate=accumulate).fit(task, lw.Loader((x, Y), size, shuffle=True), (x[:9], Y[:9]))
        found[name] = task.state_dict(), {k: v for k, v in run.metrics.items() if k.endswith("loss")}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "world"),
    [
        ("ddp", 2),
        pytest.param("ddp", 3, marks=pytest.mark.nightly),
        ("fsdp", 2),
        pytest.param("fsdp", 3, marks=pytest.mark.nightly),
    ],
)
def test_weights_and_statistics_are_those_of_one_process_with_the_whole_batch(strategy: str, world: int) -> None:
    alone, ranks = trained("auto"), lw.launch(trained, world, STRATEGIES[strategy])
    for name, (state, metrics) in alone.items():
        # nearly nothing is left of gradients through a batch of two: what is, shows rounding 1e7 times as large
        tolerance = 1e-5 if name == "in float32" else 1e-7
        for found in ranks:
            mine, measured = found[name]
            assert list(mine) == list(state)
            for key, value in state.items():
                torch.testing.assert_close(mine[key], value, atol=tolerance, rtol=0, msg=f"{name}, {key}")
                assert torch.equal(mine[key], ranks[0][name][0][key])
            assert measured == pytest.approx(metrics, abs=tolerance)


def test_with_one_process_the_bits_are_those_without_the_setting() -> None:
    for strategy in STRATEGIES.values():
        for (mine, _), (other, _) in zip(trained(strategy).values(), trained("auto").values(), strict=True):
            assert all(torch.equal(mine[key], value) for key, value in other.items())


# ------------------------------------------------------------------------------------------------- your own module


class Looks(lw.Callback):
    """Looks at the layers while they are trained, and uses them on one rank alone."""

    def on_step_end(self, run: lw.Run, result: Any) -> None:
        net = run.models["model"]
        norm = net[1]
        self.kinds = [isinstance(norm, kind) for kind in (nn.BatchNorm1d, nn.SyncBatchNorm)]
        if run.comm.rank:
            return
        copied = copy.deepcopy(norm).eval()
        kept = {name: buffer.clone() for name, buffer in net.named_buffers()}
        with torch.no_grad():
            net(X[:4])  # in train mode
            net.eval()(X[:4])
        net.train()
        for name, buffer in net.named_buffers():
            buffer.copy_(kept[name])
        self.copied = type(copied)


class Trained(lw.Supervised):
    """Validates in train mode: each rank has whole batches then, and other numbers of them."""

    def validation_step(self, batch: Any) -> Any:
        self.module.train()
        out = self.training_step(batch)
        self.module.eval()
        return out


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp"])
def test_your_module_is_what_it_was_and_outside_of_a_training_step_nobody_is_waited_for(strategy: str) -> None:
    def fit() -> Any:
        torch.manual_seed(0)
        net, called = small(), []
        net[1].register_forward_hook(lambda *args: called.append(1))
        net[1].note = "mine"
        before = [(type(module), module) for module in net.modules()], list(net.parameters()), set(vars(net[1]))
        optimizer, looks = sgd(net.parameters()), Looks()
        task = Trained(net, nn.CrossEntropyLoss(), optimizer)
        valid = lw.Loader((X[:9], Y[:9]), 3)  # two batches on rank 0, one on rank 1
        lw_run = trainer(STRATEGIES[strategy], callbacks=[looks]).fit(task, lw.Loader((X, Y), 6), valid)
        for (kind, module), now in zip(before[0], net.modules(), strict=True):
            assert (type(now), now) == (kind, module)
        assert all(map(lambda one, other: one is other, before[1], net.parameters()))
        assert all(map(lambda one, other: one is other, optimizer.param_groups[0]["params"], net.parameters()))
        assert set(vars(net[1])) == before[2]
        assert len(called) >= 8
        assert looks.kinds == [True, True]
        assert all(one["forward"] == 0 for one in lw_run.team.needs)  # it has waited for others there
        assert lw_run.comm.rank or looks.copied is nn.BatchNorm1d
        return lw_run.metrics["valid/loss"]

    first, second = lw.launch(fit, 2)
    assert first == second


@pytest.mark.slow
def test_after_an_error_the_layers_are_your_own_too() -> None:
    def fit() -> Any:
        class Bad(lw.Callback):
            def on_step_end(self, run: lw.Run, result: Any) -> None:
                raise ValueError("on all ranks")

        task = task_of(small)
        with pytest.raises(ValueError, match="on all ranks"):
            trainer(STRATEGIES["ddp"], callbacks=[Bad()]).fit(task, (X, Y))
        return type(task.module[1]) is nn.BatchNorm1d

    assert lw.launch(fit, 2) == [True, True]


def test_a_layer_takes_the_shapes_that_it_took() -> None:
    net, norms = nn.Sequential(nn.BatchNorm1d(6)), Norms()
    norms.join([net])
    norms.on = True
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        net(torch.ones(2, 6, 3, 3))
    norms.put_back()
    assert type(net[0]) is nn.BatchNorm1d


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_model_that_is_written_meanwhile_is_read_as_your_own(protocol: int) -> None:
    net, norms, file = small(), Norms(), io.BytesIO()
    net[1].note = "mine"
    norms.join([net])
    torch.save(net, file, pickle_protocol=max(protocol, 2))
    file.seek(0)
    for found in (pickle.loads(pickle.dumps(net, protocol)), torch.load(file, weights_only=False)):
        assert type(found[1]) is nn.BatchNorm1d
        assert found[1].note == "mine"
        assert all(map(torch.equal, found.state_dict().values(), net.state_dict().values()))
    norms.put_back()


def test_a_fit_in_a_hook_of_a_fit_has_the_layers_until_it_ends() -> None:
    net, outer, inner = small(), Norms(), Norms()
    for norms in (outer, inner, inner):
        norms.join([net])
        assert net[1].norms is norms
        assert net[1].own is nn.BatchNorm1d
    inner.put_back()
    assert net[1].norms is outer
    outer.put_back()
    assert type(net[1]) is nn.BatchNorm1d


class Counted(torch.utils.data.Dataset[Any]):
    """Notes what is read of it."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        self.read.append(i)
        return X[i], Y[i]


@pytest.mark.slow
def test_a_fit_in_a_hook_measures_over_ranks_and_an_evaluation_reads_what_it_needs() -> None:
    def fit(net: nn.Module, *callbacks: Any, valid: Any = None) -> None:
        task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
        trainer(STRATEGIES["ddp"], epochs=1, callbacks=callbacks).fit(task, lw.Loader((X, Y), 6, drop_last=True), valid)

    class Again(lw.Callback):
        """Trains the model of a fit that is not over."""

        def __init__(self, kept: Any) -> None:
            self.kept = kept

        def on_epoch_end(self, run: lw.Run) -> None:
            net = run.models["model"]
            net.load_state_dict(self.kept)
            fit(net)
            self.found = copy.deepcopy(net.state_dict())

    def nested() -> Any:
        torch.manual_seed(0)
        net, read = small(), Counted()
        kept = copy.deepcopy(net.state_dict())
        again = Again(kept)
        fit(net, again)
        net.load_state_dict(kept)
        fit(net, valid=lw.Loader(read, 4))
        return again.found, net.state_dict(), sorted(read.read)

    for rank, (within, alone, read) in enumerate(lw.launch(nested, 2)):
        assert all(torch.equal(within[key], value) for key, value in alone.items())
        assert read == list(range(4 * rank, 4 * rank + 4))


# ------------------------------------------------------------------------------------------------- with other settings


class Skips(lw.Callback):
    """Leaves out a batch on all ranks, and another one on rank 1."""

    def map_batch(self, run: lw.Run, batch: Any) -> Any:
        if run.progress.batch == 1 or (run.comm.rank == 1 and run.progress.batch == 2):
            raise lw.SkipBatch
        return batch


def settings() -> dict[str, Any]:
    """State dicts after trainings with what else takes part in a forward or a backward."""
    found: dict[str, Any] = {}
    ddp = STRATEGIES["ddp"]
    data = lw.Loader((X, Y), 6, drop_last=True)
    for name, strategy, more in (
        ("plain", ddp, {}), ("compiled", ddp, {"compile": {"backend": "aot_eager"}}),
        ("skips", ddp, {"callbacks": [Skips()]}), ("bf16", ddp, {"precision": "bf16"}),
        ("bf16 parts", lw.FSDP(nn.Linear, sync_batch_norm=True, precision="bf16"), {}),
        ("averaged", ddp, {"callbacks": [lw.EMA(0.9)]}),
    ):  # fmt: skip
        task = task_of(small)
        with warnings.catch_warnings():  # torch's compiler asks a tensor between two graphs for its gradient
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            trainer(strategy, **more).fit(task, data)
        found[name] = task.module.state_dict()
    task = task_of(small)
    with lw.checkpoint_activations(task.module, "*"):
        trainer(ddp).fit(task, data)
    found["computed again"] = task.module.state_dict()
    task = task_of(lambda: nn.SyncBatchNorm.convert_sync_batchnorm(small()))
    trainer(ddp).fit(task, data)
    assert type(task.module[1]) is nn.SyncBatchNorm
    found["torch's own layer"] = task.module.state_dict()
    return found


@pytest.mark.slow
def test_it_goes_with_compiled_steps_skipped_batches_16_bits_averages_and_activations_computed_again() -> None:
    first, second = lw.launch(settings, 2)
    for name, state in first.items():
        assert all(torch.equal(second[name][key], value) for key, value in state.items()), name
        tolerance = {"bf16": 0.05, "bf16 parts": 0.05}.get(name, 1e-6)
        for key, value in state.items() if name != "skips" else ():
            torch.testing.assert_close(value, first["plain"][key], atol=tolerance, rtol=0, msg=f"{name}, {key}")
    assert first["plain"]["1.num_batches_tracked"] == 6
    assert first["skips"]["1.num_batches_tracked"] == 4  # what all ranks leave out is no batch
    assert all(value.isfinite().all() for value in first["skips"].values())


@pytest.mark.slow
def test_three_ranks_that_are_stopped_go_on_to_the_same_bits(tmp_path: Path) -> None:
    def fit() -> Any:
        found = []
        for folder, steps in (("whole", [8]), ("parts", [3, 8])):
            for last in steps:
                task = task_of(small)
                saver = lw.Checkpoint(1, keep=2)
                one = trainer(
                    STRATEGIES["ddp"], epochs=None, steps=last, folder=tmp_path / folder, name="n", checkpoint=saver
                )
                one.fit(task, lw.Loader((X, Y), 6, shuffle=True), resume="auto")
            found.append(task.module.state_dict())
        return found

    for whole, parts in lw.launch(fit, 3):
        assert all(torch.equal(parts[key], value) for key, value in whole.items())


@pytest.mark.slow
def test_a_batch_of_one_sample_is_an_error_as_with_one_process() -> None:
    def fit(strategy: Any) -> None:
        trainer(strategy).fit(task_of(small), lw.Loader((X[:7], Y[:7]), 6))

    for strategy in ("auto", STRATEGIES["ddp"]):
        with pytest.raises(ValueError, match=r"Expected more than 1 value per channel .*\[1, 4\]") as caught:
            fit(strategy) if strategy == "auto" else lw.launch(fit, 2, strategy)
        assert "the batch has one sample, and BatchNorm needs two or more" in "".join(caught.value.__notes__)


def test_a_gradient_of_a_gradient_is_refused() -> None:
    def fit() -> None:
        class Twice(lw.Supervised):
            def training_step(self, batch: Any) -> Any:
                x = batch[0].requires_grad_()
                (grad,) = torch.autograd.grad(self.module(x).pow(2).sum(), x, create_graph=True)
                return grad.pow(2).sum()

        torch.manual_seed(0)
        trainer(STRATEGIES["ddp"]).fit(Twice(small(), nn.CrossEntropyLoss(), sgd), (X, Y))

    with pytest.raises(RuntimeError, match="once_differentiable"):
        lw.launch(fit, 2)


# ------------------------------------------------------------------------------------------------- when a rank fails


class Spoiled(nn.Module):
    """Between two batch norms: at the third step rank 1 raises, or waits in a collective of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls = how, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3 and torch.distributed.get_rank() == 1:
            if self.how == "raise":
                raise ValueError("a bad day")
            torch.distributed.barrier()
        return x


@pytest.mark.slow
@pytest.mark.capability("B-25")
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ("raise", ValueError, r"rank 1 failed at step [12], HERE: ValueError: a bad day"),
        ("barrier", lw.LoopwrightError, r"do not match at step [12]: .*; rank 1: barrier\(\), HERE"),
    ],
)  # fmt: skip
def test_a_rank_that_leaves_in_the_middle_of_a_forward_ends_all_in_time_and_is_named(
    how: str, error: type[Exception], says: str, strategy: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The others wait in the next batch norm by then. The time-out is that of the strategy: nothing is set."""

    def fit() -> None:
        task = task_of(lambda: nn.Sequential(nn.BatchNorm1d(6), Spoiled(how), nn.BatchNorm1d(6), nn.Linear(6, 3)))
        trainer(STRATEGIES[strategy], epochs=9).fit(task, lw.Loader((X, Y), 6))

    began = time.monotonic()
    with pytest.raises(error):
        lw.launch(fit, 2)
    assert time.monotonic() - began < 20  # 4 s, and what it takes to begin and to end
    waits = r"rank 0: all_reduce\(double\[13\]\), .*norms.py:\d+ in .*; rank 1"  # in the second of them
    says = says.replace("; rank 1", waits).replace("HERE", r".*test_sync_batch_norm.py:\d+ in forward")
    assert re.search(says, capfd.readouterr().err)


# ------------------------------------------------------------------------------------------------- what a plan tells


class Own(nn.BatchNorm1d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).relu()


def plan(net: nn.Module, strategy: Any) -> lw.plan.Plan:
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    return trainer(strategy).plan(task, (X, Y))


def test_a_plan_tells_what_measures_over_ranks_and_what_does_not() -> None:
    for strategy in STRATEGIES.values():
        assert "batch norm measures the whole batch, in one process, as ever: 5 layers" in plan(dense(), strategy).facts
        found = plan(nn.Linear(6, 3), strategy)
        assert (found.problems, found.warnings) == (
            [], ["sync_batch_norm=True does nothing, since the model has no batch norm; leave it out"],
        )  # fmt: skip
        found = plan(nn.Sequential(Own(6), nn.BatchNorm1d(6), nn.Linear(6, 3)), strategy)
        assert found.warnings == [
            "sync_batch_norm=True leaves out 1 batch norms that are lazy, or have a forward or a process_group of "
            "their own (Own): each rank measures its part of a batch there"
        ]
    for strategy in ("auto", lw.DDP(), lw.FSDP()):
        assert not any("batch norm" in fact for fact in plan(dense(), strategy).facts)


def test_layers_whose_forward_is_replaced_or_whose_class_is_yet_to_come_are_left_out() -> None:
    net = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.LazyBatchNorm1d(affine=False))
    net[1].forward = torch.relu
    with lw.checkpoint_activations(net, "*"):  # which sets a forward too
        assert norms_in([net]) == ([net[0]], [net[1], net[2]])
    assert norms_in([net]) == ([net[0]], [net[1], net[2]])


def test_settings_that_cannot_apply_are_refused() -> None:
    with pytest.raises(lw.SettingError, match="sync_batch_norm='yes': expected True or False"):
        lw.DDP(sync_batch_norm="yes")  # type: ignore[arg-type]
    with pytest.raises(lw.SettingError, match="sync_batch_norm=1: expected True or False"):
        lw.FSDP(sync_batch_norm=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"write strategy=lw.DDP\(sync_batch_norm=True\)"):
        lw.Trainer(1, sync_batchnorm=True)  # type: ignore[call-arg]
    found = trainer(STRATEGIES["ddp"]).plan(lambda run, batch: None, [(X, Y)], state={})
    assert found.problems == [
        "sync_batch_norm=True cannot apply, since no phase moves an optimizer by itself; call "
        "nn.SyncBatchNorm.convert_sync_batchnorm on the model, which works on accelerators"
    ]


@pytest.mark.slow
def test_it_is_refused_where_ranks_have_the_same_samples() -> None:
    class Same(lw.DDP):
        def data_part(self, device: torch.device, world_size: int) -> Any:
            return 0, 1

    told = "several have the same samples, which would count several times; leave sync_batch_norm=True out"
    with pytest.raises(lw.SettingError, match=told):
        lw.launch(lambda: trainer(Same(sync_batch_norm=True)).fit(task_of(small), (X, Y)) and None, 2)


@pytest.mark.slow
def test_what_cannot_be_together_with_it_on_several_ranks_is_refused() -> None:
    def planned() -> Any:
        task = task_of(small)
        more = {"compile": {"fullgraph": True, "backend": "aot_eager"}, "callbacks": [lw.SAM()]}
        found = trainer(STRATEGIES["ddp"], **more).plan(task, (X, Y))
        return found.problems, found.facts

    (problems, facts), _ = lw.launch(planned, 2)
    assert problems == [
        "compile={'fullgraph': True} cannot apply with sync_batch_norm=True: what ranks tell one another stands "
        "between graphs; leave one of the two out",
        "SAM cannot go over the window again with sync_batch_norm=True; leave one of the two out",
    ]
    assert "batch norm measures the whole batch, over 2 ranks: 1 layer" in facts
